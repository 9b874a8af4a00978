//! What came of sending a delivery once.

/// Attempts that fail in a row until the endpoint is paused.
pub(crate) const MAX_CONSECUTIVE_FAILURES: i64 = 10;

/// How much of an answer is kept, in bytes.
pub(crate) const SNIPPET_BYTES: usize = 1_024;

/// Why an attempt failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AttemptFault {
    /// The whole exchange took too long.
    Timeout,
    /// The name does not resolve.
    Dns,
    /// It resolves to an address that webhooks may not go to.
    AddressNotAllowed,
    /// Nobody accepts connections there.
    Connect,
    /// No trustworthy encrypted connection.
    Tls,
    /// The answer's status says no.
    HttpStatus,
    /// The answer sends elsewhere, which is not followed.
    Redirect,
    /// Anything else, such as an answer that is not HTTP.
    Other,
}

impl AttemptFault {
    /// The word that is stored and shown.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Timeout => "timeout",
            Self::Dns => "dns",
            Self::AddressNotAllowed => "address_not_allowed",
            Self::Connect => "connect",
            Self::Tls => "tls",
            Self::HttpStatus => "http_status",
            Self::Redirect => "redirect",
            Self::Other => "other",
        }
    }
}

/// One try of a delivery, as it went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Attempt {
    /// When it began.
    pub(crate) at_ms: i64,
    /// How long it took.
    pub(crate) duration_ms: i64,
    /// The status of the answer, if there was one.
    pub(crate) response_status: Option<u16>,
    /// Why it failed; `None` where it did not.
    pub(crate) fault: Option<AttemptFault>,
    /// The start of the answer's body.
    pub(crate) snippet: Option<String>,
    /// How long the receiver asks to be left alone.
    pub(crate) retry_after_ms: Option<i64>,
}

impl Attempt {
    /// An attempt that ended before anything was sent.
    pub(crate) fn unsent(at_ms: i64, fault: AttemptFault) -> Self {
        let fault = Some(fault);
        Self { at_ms, duration_ms: 0, response_status: None, fault, snippet: None, retry_after_ms: None }
    }

    /// Whether the receiver says that it wants no more, ever.
    pub(crate) fn is_gone(&self) -> bool {
        self.response_status == Some(410)
    }
}

/// Judges a status: 2xx is success, and no other.
pub(crate) fn fault_of_status(status: u16) -> Option<AttemptFault> {
    match status {
        200..=299 => None,
        300..=399 => Some(AttemptFault::Redirect),
        _ => Some(AttemptFault::HttpStatus),
    }
}

/// The start of an answer's body as text that any database takes.
pub(crate) fn snippet(body: &[u8]) -> Option<String> {
    let start = body.get(..SNIPPET_BYTES).unwrap_or(body);
    if start.is_empty() {
        return None;
    }
    let mut text = String::from_utf8_lossy(start).replace('\0', "\u{fffd}");
    // Replacement characters are longer than what they replace.
    let mut end = text.len().min(SNIPPET_BYTES);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_2xx_is_success() {
        assert_eq!(fault_of_status(200), None);
        assert_eq!(fault_of_status(204), None);
        assert_eq!(fault_of_status(302), Some(AttemptFault::Redirect));
        assert_eq!(fault_of_status(410), Some(AttemptFault::HttpStatus));
        assert_eq!(fault_of_status(500), Some(AttemptFault::HttpStatus));
        assert_eq!(fault_of_status(999), Some(AttemptFault::HttpStatus));
    }

    #[test]
    fn a_snippet_is_text_of_at_most_a_kilobyte() {
        assert_eq!(snippet(b""), None);
        assert_eq!(snippet(b"ok").as_deref(), Some("ok"));
        assert_eq!(snippet(b"a\0b").as_deref(), Some("a\u{fffd}b"));
        for body in [vec![0xff; 5_000], "é".repeat(3_000).into_bytes(), vec![0; 1_023]] {
            let text = snippet(&body).unwrap();
            assert!(text.len() <= SNIPPET_BYTES && !text.contains('\0'));
        }
    }
}
