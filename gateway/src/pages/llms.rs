//! `/llms.txt` (llmstxt.org): what a program that reads text should know of this installation, and where to read on.

use std::fmt::Write as _;

use paperkey_proto::error::catalogue;

use super::{docs, errors, twin};

/// Where it is.
pub(super) const PATH: &str = "/llms.txt";

/// The text.
pub(super) fn text(public_url: &str) -> String {
    let mut out = format!(
        "# Paperkey\n\n> {}\n\n\
         - The API is at {public_url}. Send keys and session tokens as `Authorization: Bearer …`; shipped apps may send \
         their product's `pk_…` as `x-api-key`.\n\
         - Bodies are JSON. Unknown names are refused with a list of them; both `camelCase` and `snake_case` names are taken.\n\
         - Every answer has `X-Request-Id` and says what is left of each limit. After a 429 wait for `Retry-After` seconds.\n\
         - POSTs that change something take an `Idempotency-Key`, and then take effect once within 24 hours.\n\
         - A key of 24 hours to try things out needs no account: `curl -X POST {public_url}/v1/keys/test -H 'Content-Type: \
         application/json' -d '{{}}'`.\n",
        docs::SUMMARY,
    );
    let _ = write!(out, "{}\n## Reference\n\n{}", docs::listed(public_url), docs::look_up(public_url));
    out.push_str("\n## Optional\n\n");
    for (_, entry) in catalogue() {
        let page = twin(&errors::page_of(&entry.agent_code));
        let _ = writeln!(out, "- [{}]({public_url}{page}): {}", entry.agent_code, entry.message);
    }
    out
}
