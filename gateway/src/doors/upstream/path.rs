//! Paths that two servers might read in two ways are refused, not rewritten.
//!
//! What was matched here and what is read there must be the same path. So a path may not climb, may not hide a slash,
//! and may not have an empty segment before its last, however often it is decoded on the way.

/// How often a path may be encoded over itself.
const MAX_DECODINGS: usize = 4;

/// A path as a server may read it: decoded to the end, and without the parameters of its segments. Or what is wrong
/// with it.
pub(super) fn as_read(path: &str) -> Result<String, &'static str> {
    let mut bytes = path.as_bytes().to_vec();
    if path.contains("//") {
        return Err("The path has an empty segment");
    }
    for round in 0..MAX_DECODINGS {
        if climbs(&bytes) {
            return Err("The path has a segment that leads elsewhere");
        }
        if bytes.iter().any(|byte| *byte == b'\\' || byte.is_ascii_control()) {
            return Err("The path has a character that paths do not have");
        }
        let decoded = decoded(&bytes);
        if round == 0 && decoded.malformed {
            return Err("The path is not percent-encoded as it should be");
        }
        if decoded.slash {
            return Err("The path hides a slash");
        }
        if decoded.bytes == bytes {
            return Ok(without_parameters(&bytes));
        }
        bytes = decoded.bytes;
    }
    Err("The path is percent-encoded over and over")
}

/// A path that was decoded once.
struct Decoded {
    bytes: Vec<u8>,
    /// A slash was encoded.
    slash: bool,
    /// A percent sign stood for itself.
    malformed: bool,
}

fn decoded(bytes: &[u8]) -> Decoded {
    let mut decoded = Decoded { bytes: Vec::with_capacity(bytes.len()), slash: false, malformed: false };
    let mut rest = bytes;
    while let Some((byte, after)) = rest.split_first() {
        let digit = |at: usize| after.get(at).and_then(|digit| char::from(*digit).to_digit(16));
        let pair = digit(0).zip(digit(1)).and_then(|(high, low)| u8::try_from(high * 16 + low).ok());
        rest = after;
        if let Some(hidden) = pair.filter(|_| *byte == b'%') {
            decoded.slash |= hidden == b'/';
            decoded.bytes.push(hidden);
            rest = &after[2..];
        } else {
            decoded.malformed |= *byte == b'%';
            decoded.bytes.push(*byte);
        }
    }
    decoded
}

fn without_parameters(path: &[u8]) -> String {
    let segments = path.split(|byte| *byte == b'/').map(|segment| {
        let name = segment.split(|byte| *byte == b';').next().unwrap_or_default();
        String::from_utf8_lossy(name)
    });
    segments.collect::<Vec<_>>().join("/")
}

/// Whether a segment is a dot or two, with parameters of its own or without.
fn climbs(path: &[u8]) -> bool {
    path.split(|byte| *byte == b'/').any(|segment| {
        let name = segment.split(|byte| *byte == b';').next().unwrap_or_default();
        matches!(name, b"." | b"..")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_paths_pass() {
        for path in [
            "/v1/pdf",
            "/v1/pdf/",
            "/v1/pdf/generate",
            "/v1/pdf/a%20b",
            "/v1/pdf/...",
            "/v1/pdf/.hidden",
            "/v1/pdf/a..b",
            "/v1/pdf/a;b=c",
            "/v1/pdf/%C3%A4",
            "/v1/pdf/a:b@c",
            "/v1/pdf/100%25",
            "/v1/pdf/100%25/of",
        ] {
            assert!(as_read(path).is_ok(), "{path}");
        }
    }

    #[test]
    fn a_path_is_read_without_its_disguises() {
        for path in ["/v1/pdf/admin", "/v1/pdf/%61dmin", "/v1/pdf/%2561dmin", "/v1/pdf/admin;a=b", "/v1/pdf;x/admin"] {
            assert_eq!(as_read(path).unwrap(), "/v1/pdf/admin", "{path}");
        }
    }

    #[test]
    fn paths_that_could_be_read_in_two_ways_do_not() {
        for path in [
            "/v1/pdf/..",
            "/v1/pdf/../status",
            "/v1/pdf/./x",
            "/v1/pdf/%2e%2e/status",
            "/v1/pdf/%2E./status",
            "/v1/pdf/.%2e/status",
            "/v1/pdf/%252e%252e/status",
            "/v1/pdf/%25252e%25252e/x",
            "/v1/pdf/..;/status",
            "/v1/pdf/..;a=b/status",
            "/v1/pdf/..%3b/status",
            "/v1/pdf//x",
            "/v1/pdf//",
            "/v1/pdf/a%2fb",
            "/v1/pdf/..%2fstatus",
            "/v1/pdf/a%252Fb",
            "/v1/pdf/a\\b",
            "/v1/pdf/..%5cstatus",
            "/v1/pdf/a%00",
            "/v1/pdf/a%0d%0aX:y",
            "/v1/pdf/a%7f",
            "/v1/pdf/%25/%252e%252e/x",
            "/v1/pdf/%",
            "/v1/pdf/%2",
            "/v1/pdf/%zz",
            "/v1/pdf/%252525252541",
        ] {
            assert!(as_read(path).is_err(), "{path}");
        }
    }
}
