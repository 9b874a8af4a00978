//! How much is done at a time, and who is told to come back: a bound on the calls that a process answers at once.
//!
//! Work that waits in a process that has too much of it is answered too late for everybody. So a call that finds no
//! place is refused at once, before anything is spent on it, and says when to come back. A place comes back when the
//! call is answered or its caller goes away.
//!
//! Streams last, so they have places of their own and take none from calls. What processes ask of each other in their
//! own name finishes what others have begun: where all places are taken, there is a reserve for it.
//!
//! A service that hangs keeps its callers waiting. No more than half of the places are given to calls of one service, so
//! that the others are still reached. Whoever sends slowly has no place until all has come, and waits among as many as its
//! network may have.

use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, Ipv6Addr},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::HeaderName;
use http_body::{Frame, SizeHint};
use paperkey_proto::{Error, errors::v1::Reason};
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::{Status, body::Body};

/// When a refused caller may come back.
pub const RETRY_AFTER: Duration = Duration::from_secs(1);

/// The metadata entry of an answer by which a process says that it has refused a call for want of a place, so that
/// nothing was spent on it and another may be asked.
pub(crate) const SHED_HEADER: HeaderName = HeaderName::from_static("paperkey-shed");

/// The reserve is this part of the places.
const RESERVE: usize = 4;

use crate::service::SERVICES;

/// As many may be slow to send, for each place.
const SENDERS: usize = 4;
/// One network may have this part of them.
const OF_ONE_NETWORK: usize = 32;

/// What a place is taken for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Errand {
    /// One question and one answer.
    Call,
    /// The same, of a process in its own name.
    Internal,
    /// What lasts for as long as somebody listens.
    Stream,
}

/// The places of a process. Clones are the same ones.
#[derive(Clone, Debug)]
pub struct Places(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    most: usize,
    calls: Arc<Semaphore>,
    reserve: Arc<Semaphore>,
    streams: Arc<Semaphore>,
    /// How many of the places calls of each service may take.
    shares: BTreeMap<&'static str, Arc<Semaphore>>,
    senders: Mutex<Senders>,
    shed_calls: AtomicU64,
    shed_streams: AtomicU64,
}

/// Who is waited for.
#[derive(Debug, Default)]
struct Senders {
    all: usize,
    by_network: HashMap<IpAddr, usize>,
}

/// What a process does and has refused to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Calls that may be answered at a time.
    pub most: usize,
    /// Calls that are answered at the moment, those in the reserve included.
    pub calls: usize,
    /// Streams that last at the moment.
    pub streams: usize,
    /// Calls that were refused because there was no place.
    pub shed_calls: u64,
    /// Streams that were refused because there was no place.
    pub shed_streams: u64,
}

/// A place, given back when this goes.
#[derive(Debug)]
#[must_use = "a place that nobody holds is free"]
pub struct Place {
    _place: OwnedSemaphorePermit,
    _share: Option<OwnedSemaphorePermit>,
}

/// Somebody who is waited for until all that is sent has come, until this goes.
#[derive(Debug)]
#[must_use = "whom nobody waits for has gone"]
pub struct Sender {
    places: Places,
    network: IpAddr,
}

impl Drop for Sender {
    fn drop(&mut self) {
        let mut senders = self.places.0.senders.lock();
        senders.all -= 1;
        if let Some(of_network) = senders.by_network.get_mut(&self.network) {
            *of_network -= 1;
            if *of_network == 0 {
                senders.by_network.remove(&self.network);
            }
        }
    }
}

impl Places {
    /// Places for as many calls, and for as many streams beside them.
    pub fn new(most: usize) -> Self {
        let most = most.clamp(1, Semaphore::MAX_PERMITS);
        let of = |count: usize| Arc::new(Semaphore::new(count));
        Self(Arc::new(Inner {
            most,
            calls: of(most),
            reserve: of(reserve(most)),
            streams: of(most),
            shares: SERVICES.into_iter().map(|service| (service, of((most / 2).max(1)))).collect(),
            senders: Mutex::default(),
            shed_calls: AtomicU64::new(0),
            shed_streams: AtomicU64::new(0),
        }))
    }

    /// A place, or a refusal that says when to come back.
    pub fn take(&self, errand: Errand) -> Result<Place, Error> {
        self.take_towards(errand, None)
    }

    /// A place for what leads to a service, or a refusal where there is none, or where the service has its share of them.
    pub fn take_towards(&self, errand: Errand, service: Option<&str>) -> Result<Place, Error> {
        let take = |from: &Arc<Semaphore>| Arc::clone(from).try_acquire_owned().ok();
        let share = service.filter(|_| errand != Errand::Stream).and_then(|service| self.0.shares.get(service));
        let share = share.map(|share| take(share).ok_or_else(|| self.shed(errand))).transpose()?;
        let place = match errand {
            Errand::Call => take(&self.0.calls),
            Errand::Internal => take(&self.0.calls).or_else(|| take(&self.0.reserve)),
            Errand::Stream => take(&self.0.streams),
        };
        let place = place.ok_or_else(|| self.shed(errand))?;
        Ok(Place { _place: place, _share: share })
    }

    /// Lets somebody be waited for who has not sent all yet, or refuses it where too many are already, of that network or
    /// altogether.
    pub fn wait_for(&self, client: IpAddr) -> Result<Sender, Error> {
        let network = network_of(client);
        let most = self.0.most.saturating_mul(SENDERS);
        let mut senders = self.0.senders.lock();
        let of_network = senders.by_network.get(&network).copied().unwrap_or(0);
        if senders.all >= most || of_network >= (most / OF_ONE_NETWORK).max(1) {
            return Err(self.shed(Errand::Call));
        }
        senders.all += 1;
        senders.by_network.insert(network, of_network + 1);
        Ok(Sender { places: self.clone(), network })
    }

    fn shed(&self, errand: Errand) -> Error {
        let shed = if errand == Errand::Stream { &self.0.shed_streams } else { &self.0.shed_calls };
        shed.fetch_add(1, Ordering::Relaxed);
        too_much()
    }

    /// What is done and was refused so far.
    pub fn load(&self) -> Load {
        let Inner { most, calls, reserve: spare, streams, shed_calls, shed_streams, .. } = &*self.0;
        Load {
            most: *most,
            calls: most - calls.available_permits() + (reserve(*most) - spare.available_permits()),
            streams: most - streams.available_permits(),
            shed_calls: shed_calls.load(Ordering::Relaxed),
            shed_streams: shed_streams.load(Ordering::Relaxed),
        }
    }
}

impl Place {
    /// The same body, which keeps the place until it has been sent or dropped.
    pub fn kept_by(self, body: Body) -> Body {
        Body::new(Kept { body, place: Some(self) })
    }
}

/// Whose an address is: one subscriber has a whole /64.
fn network_of(client: IpAddr) -> IpAddr {
    match client.to_canonical() {
        IpAddr::V6(ip) => Ipv6Addr::from_bits(ip.to_bits() & (u128::MAX << 64)).into(),
        ip @ IpAddr::V4(_) => ip,
    }
}

fn reserve(most: usize) -> usize {
    (most / RESERVE).max(1)
}

/// What whoever finds no place is told. No fault of ours to look into, so nothing is logged of it.
pub(crate) fn too_much() -> Error {
    Error::new(Reason::Unavailable)
        .with_message("There is more to do than can be done at the moment")
        .with_retry_after(RETRY_AFTER)
}

/// A body that keeps a place.
struct Kept {
    body: Body,
    place: Option<Place>,
}

impl http_body::Body for Kept {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let polled = Pin::new(&mut self.body).poll_frame(context);
        if let Poll::Ready(None | Some(Err(_))) = polled {
            self.place = None;
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_finds_no_place_is_told_at_once_when_to_come_back() {
        let places = Places::new(2);
        let first = places.take(Errand::Call).unwrap();
        let _second = places.take(Errand::Call).unwrap();
        let refused = places.take(Errand::Call).unwrap_err();
        assert_eq!((refused.reason(), refused.retry_after()), (Reason::Unavailable, Some(RETRY_AFTER)));
        drop(first);
        let _third = places.take(Errand::Call).unwrap();
        let load = places.load();
        assert_eq!(load, Load { most: 2, calls: 2, shed_calls: 1, ..Load::default() });
    }

    #[test]
    fn streams_take_no_place_from_calls_and_what_was_begun_has_a_reserve() {
        let places = Places::new(1);
        let _stream = places.take(Errand::Stream).unwrap();
        assert!(places.take(Errand::Stream).is_err());
        let _call = places.take(Errand::Call).unwrap();
        assert!(places.take(Errand::Call).is_err());
        let internal = places.take(Errand::Internal).unwrap();
        assert!(places.take(Errand::Internal).is_err());
        drop(internal);
        let _internal = places.take(Errand::Internal).unwrap();
        assert_eq!(places.load(), Load { most: 1, calls: 2, streams: 1, shed_calls: 2, shed_streams: 1 });
    }

    #[test]
    fn calls_of_one_service_take_half_of_the_places_at_most() {
        let places = Places::new(4);
        let to = |service| places.take_towards(Errand::Call, Some(service));
        let _held = [to("auth").unwrap(), to("auth").unwrap()];
        assert_eq!(to("auth").unwrap_err().retry_after(), Some(RETRY_AFTER));
        let _held = [to("catalog").unwrap(), places.take(Errand::Call).unwrap()];
        assert!(to("catalog").is_err(), "all places are taken");
        assert_eq!(places.load(), Load { most: 4, calls: 4, shed_calls: 2, ..Load::default() });
        assert!(Places::new(1).take_towards(Errand::Call, Some("auth")).is_ok());
    }

    #[test]
    fn who_sends_slowly_takes_nobodys_place_and_one_network_is_not_all_that_is_waited_for() {
        let places = Places::new(16);
        let client = |text: &str| text.parse::<IpAddr>().unwrap();
        let held = ["2001:db8::1", "2001:db8::2"].map(|of| places.wait_for(client(of)).unwrap());
        assert!(places.wait_for(client("2001:db8::3")).is_err());
        let _other = places.wait_for(client("192.0.2.1")).unwrap();
        assert_eq!(places.load(), Load { most: 16, shed_calls: 1, ..Load::default() });
        drop(held);
        let _again = places.wait_for(client("2001:db8::3")).unwrap();
        let many: Vec<_> = (0..62).map(|of| places.wait_for(Ipv6Addr::from_bits(of << 64).into()).unwrap()).collect();
        assert!(places.wait_for(client("192.0.2.2")).is_err());
        drop(many);
        assert!(places.wait_for(client("192.0.2.2")).is_ok());
    }

    #[tokio::test]
    async fn a_body_keeps_its_place_until_it_ends() {
        use http_body_util::BodyExt as _;
        let places = Places::new(1);
        let body = Body::new(http_body_util::Full::new(Bytes::from_static(b"x")));
        let mut body = places.take(Errand::Stream).unwrap().kept_by(body);
        assert!(body.frame().await.is_some() && places.load().streams == 1);
        assert!(body.frame().await.is_none() && places.load().streams == 0);
        let dropped = places.take(Errand::Stream).unwrap().kept_by(Body::empty());
        drop(dropped);
        assert_eq!(places.load().streams, 0);
    }
}
