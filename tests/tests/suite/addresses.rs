//! A key that is bound to addresses, called directly, through one proxy and through two. What a caller writes into
//! `X-Forwarded-For` never widens its allowlist.
//!
//! The proxies of these tests are clients that write what a proxy would: its caller's address, put at the end of what
//! was there. Real ones are in `forward_auth`.

use paperkey_proto::errors::v1::Reason;
use paperkey_tests::{Api, Installation, Kind, Settings};

const HOME: &str = "127.0.0.5";
const ELSEWHERE: &str = "127.0.0.6";
const PROXY: &str = "127.0.0.21";
const SECOND_PROXY: &str = "127.0.0.22";

/// What a caller may write to look as if it called from home.
const FORGERIES: [&str; 6] = [
    "127.0.0.5",
    "127.0.0.5, 127.0.0.5",
    "127.0.0.5, 127.0.0.21",
    "127.0.0.5:80, 127.0.0.22, 127.0.0.21",
    "::ffff:127.0.0.5",
    "nonsense, 127.0.0.5",
];

async fn installed(kind: Kind, trusted: &str) -> Option<Installation> {
    let settings = Settings {
        environment: vec![("PAPERKEY__SERVER__TRUSTED_PROXIES", trusted.to_owned())],
        ..Settings::default()
    };
    match kind {
        Kind::AllInOne => Some(Installation::all_in_one_with(settings).await),
        Kind::Fleet => Installation::fleet_with(settings).await,
    }
}

/// Calls with a header that says which way the call came.
async fn passes(caller: &Api, came_by: &str) -> bool {
    let caller = if came_by.is_empty() { caller.clone() } else { caller.with("x-forwarded-for", came_by) };
    let answer = caller.get("/v1/status").await;
    if answer.status != 200 {
        answer.refused(Reason::IpNotAllowed);
    }
    assert_eq!(caller.get("/v1/authz").await.status, answer.status, "both judge alike");
    answer.status == 200
}

async fn without_proxies(kind: Kind) {
    let Some(install) = installed(kind, "[]").await else { return };
    let key = install.register().await.allowlisted_key(HOME).await;
    let from = |address: &str| install.api().with_key(&key).from_address(address);
    assert!(passes(&from(HOME), "").await);
    assert!(passes(&from(HOME), ELSEWHERE).await, "what it says of itself does not count either way");
    assert!(!passes(&from(ELSEWHERE), "").await);
    for forged in FORGERIES {
        assert!(!passes(&from(ELSEWHERE), forged).await, "{forged}");
        assert!(!passes(&from(PROXY), forged).await, "{forged}");
    }
}

async fn with_one_proxy(kind: Kind) {
    let Some(install) = installed(kind, "[\"127.0.0.21/32\"]").await else { return };
    let key = install.register().await.allowlisted_key(HOME).await;
    let from = |address: &str| install.api().with_key(&key).from_address(address);
    assert!(passes(&from(PROXY), HOME).await);
    assert!(passes(&from(PROXY), "6.6.6.6, 127.0.0.5").await);
    assert!(passes(&from(HOME), "").await, "without the proxy it is still at home");
    assert!(!passes(&from(PROXY), "").await && !passes(&from(PROXY), ELSEWHERE).await);
    for forged in FORGERIES {
        assert!(!passes(&from(ELSEWHERE), forged).await, "past the proxy: {forged}");
        assert!(!passes(&from(SECOND_PROXY), forged).await, "through a proxy that is not trusted: {forged}");
        assert!(!passes(&from(PROXY), &format!("{forged}, {ELSEWHERE}")).await, "through the proxy: {forged}");
    }
}

async fn with_two_proxies(kind: Kind) {
    let Some(install) = installed(kind, "[\"127.0.0.21/32\", \"127.0.0.22/32\"]").await else { return };
    let key = install.register().await.allowlisted_key(HOME).await;
    let from = |address: &str| install.api().with_key(&key).from_address(address);
    assert!(passes(&from(SECOND_PROXY), "127.0.0.5, 127.0.0.21").await);
    assert!(passes(&from(SECOND_PROXY), "6.6.6.6, 127.0.0.5, 127.0.0.21").await);
    assert!(!passes(&from(SECOND_PROXY), "127.0.0.21").await, "the client is not known");
    for forged in FORGERIES {
        assert!(!passes(&from(ELSEWHERE), forged).await, "past both: {forged}");
        assert!(!passes(&from(SECOND_PROXY), &format!("{forged}, {ELSEWHERE}")).await, "past the first: {forged}");
        let both = format!("{forged}, {ELSEWHERE}, {PROXY}");
        assert!(!passes(&from(SECOND_PROXY), &both).await, "through both: {forged}");
    }
}

mod all_in_one {
    use super::Kind::AllInOne;

    #[tokio::test(flavor = "multi_thread")]
    async fn nothing_widens_an_allowlist_without_proxies() {
        super::without_proxies(AllInOne).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn nothing_widens_an_allowlist_through_one_proxy() {
        super::with_one_proxy(AllInOne).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn nothing_widens_an_allowlist_through_two_proxies() {
        super::with_two_proxies(AllInOne).await;
    }
}

mod fleet {
    use super::Kind::Fleet;

    #[tokio::test(flavor = "multi_thread")]
    async fn nothing_widens_an_allowlist_through_two_proxies() {
        super::with_two_proxies(Fleet).await;
    }
}
