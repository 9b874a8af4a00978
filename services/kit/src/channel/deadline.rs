//! Until when a call may take, from the edge through every process that it passes.
//!
//! On the wire it is what is left, as `grpc-timeout`: two machines share no clock. Within a process it is a moment, kept
//! beside the task that answers a call and read by whatever that task asks of others. What is spawned has none of it, and
//! neither have the workers: nobody waits for them.

use std::{future::Future, time::Duration};

use http::{HeaderMap, HeaderName, HeaderValue, Request};
use paperkey_proto::{Error, errors::v1::Reason};
use tokio::time::Instant;

/// The metadata entry that carries what is left.
pub(crate) const TIMEOUT_HEADER: HeaderName = HeaderName::from_static("grpc-timeout");

tokio::task_local! {
    static UNTIL: Instant;
}

/// Until when the call that this task answers may take.
pub(crate) fn current() -> Option<Instant> {
    UNTIL.try_with(|until| *until).ok()
}

/// Lets what a future asks of others know of the moment.
pub(crate) fn bounded<F: Future>(until: Instant, future: F) -> impl Future<Output = F::Output> {
    UNTIL.scope(until, future)
}

/// The moment that a request names. A moment too far away to be one is none.
pub(crate) fn of<B>(request: &Request<B>) -> Option<Instant> {
    Instant::now().checked_add(left(request.headers())?)
}

/// What is left until a moment, as it is sent; nothing where it has passed.
pub(crate) fn header(until: Instant) -> Option<HeaderValue> {
    let left = until.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return None;
    }
    // Eight digits are the most that gRPC allows. What is left is rounded up: nobody has less than something.
    let text = match left.as_micros() {
        micros @ ..=99_999_999 => format!("{}u", micros.max(1)),
        micros => format!("{}m", (micros / 1_000).min(99_999_999)),
    };
    HeaderValue::try_from(text).ok()
}

/// A call that has used up its time.
pub(crate) fn too_late() -> Error {
    Error::new(Reason::Deadline)
}

/// What is left by a `grpc-timeout`: at most eight digits and a unit.
fn left(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(TIMEOUT_HEADER)?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let is_number = (1..=8).contains(&digits.len()) && digits.bytes().all(|byte| byte.is_ascii_digit());
    let value: u64 = is_number.then(|| digits.parse().ok()).flatten()?;
    match unit {
        "H" => Some(Duration::from_secs(value * 3_600)),
        "M" => Some(Duration::from_secs(value * 60)),
        "S" => Some(Duration::from_secs(value)),
        "m" => Some(Duration::from_millis(value)),
        "u" => Some(Duration::from_micros(value)),
        "n" => Some(Duration::from_nanos(value)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Option<Duration> {
        left(&HeaderMap::from_iter([(TIMEOUT_HEADER, HeaderValue::from_str(text).unwrap())]))
    }

    #[test]
    fn what_is_left_is_read_as_grpc_writes_it() {
        assert_eq!(read("5S"), Some(Duration::from_secs(5)));
        assert_eq!(read("250m"), Some(Duration::from_millis(250)));
        assert_eq!(read("99999999H"), Some(Duration::from_hours(99_999_999)));
        for nonsense in ["", "S", "5", "5s", "-5S", "+5S", "123456789S", "5 S"] {
            assert_eq!(read(nonsense), None, "{nonsense}");
        }
    }

    #[test]
    fn what_is_left_is_written_as_it_is_read_and_nothing_is_left_of_what_has_passed() {
        for given in [Duration::from_secs(5), Duration::from_secs(500)] {
            let told = read(header(Instant::now() + given).unwrap().to_str().unwrap()).unwrap();
            assert!(told <= given && told > given / 2, "{told:?} of {given:?}");
        }
        assert_eq!(header(Instant::now()), None);
        let far = Instant::now() + Duration::from_hours(1_000);
        assert_eq!(read(header(far).unwrap().to_str().unwrap()), Some(Duration::from_millis(99_999_999)));
    }

    #[tokio::test]
    async fn whoever_answers_a_call_knows_until_when_and_what_is_spawned_does_not() {
        let until = Instant::now() + Duration::from_secs(1);
        assert_eq!(current(), None);
        let (own, spawned) =
            bounded(until, async { (current(), tokio::spawn(async { current() }).await.unwrap()) }).await;
        assert_eq!((own, spawned), (Some(until), None));
    }
}
