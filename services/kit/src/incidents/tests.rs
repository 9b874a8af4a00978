use std::sync::atomic::{AtomicBool, Ordering};

use paperkey_proto::{
    auth::v1::{
        AuthenticateRequest, AuthenticateResponse, KeyUse, ListChangesRequest, ListChangesResponse,
        ProvisionProductRequest, ProvisionProductResponse, RecordIncidentsResponse, RecordKeyUsesRequest,
        RecordKeyUsesResponse,
        credential_service_server::{CredentialService, CredentialServiceServer},
    },
    errors::v1::Reason,
    principal::v1::Mode,
};
use tonic::{Request, Response, Status};

use super::*;
use crate::{
    channel::Channel, clock::ManualClock, policy::Guarded, principal::Signer, secrets::Keyring, service::Rpcs,
};

/// At the beginning of a minute.
const START_MS: i64 = 1_789_999_980_000;

#[derive(Default)]
struct FakeAuth {
    is_gone: AtomicBool,
    uses: Mutex<Vec<Vec<KeyUse>>>,
    incidents: Mutex<Vec<Vec<Incident>>>,
}

#[derive(Clone)]
struct Handler(Arc<FakeAuth>);

impl FakeAuth {
    fn must_be_there(&self) -> Result<(), Status> {
        if self.is_gone.load(Ordering::SeqCst) { Err(Error::unavailable("nobody is there").into()) } else { Ok(()) }
    }
}

#[tonic::async_trait]
impl CredentialService for Handler {
    async fn authenticate(&self, _: Request<AuthenticateRequest>) -> Result<Response<AuthenticateResponse>, Status> {
        Err(Status::unimplemented("not in these tests"))
    }

    async fn provision_product(
        &self,
        _: Request<ProvisionProductRequest>,
    ) -> Result<Response<ProvisionProductResponse>, Status> {
        Err(Status::unimplemented("not in these tests"))
    }

    async fn record_key_uses(
        &self,
        request: Request<RecordKeyUsesRequest>,
    ) -> Result<Response<RecordKeyUsesResponse>, Status> {
        self.0.must_be_there()?;
        self.0.uses.lock().push(request.into_inner().uses);
        Ok(Response::new(RecordKeyUsesResponse {}))
    }

    async fn record_incidents(
        &self,
        request: Request<RecordIncidentsRequest>,
    ) -> Result<Response<RecordIncidentsResponse>, Status> {
        self.0.must_be_there()?;
        self.0.incidents.lock().push(request.into_inner().incidents);
        Ok(Response::new(RecordIncidentsResponse {}))
    }

    async fn list_changes(&self, _: Request<ListChangesRequest>) -> Result<Response<ListChangesResponse>, Status> {
        Err(Status::unimplemented("not in these tests"))
    }
}

struct World {
    auth: Arc<FakeAuth>,
    uses: Arc<KeyUses>,
    incidents: Arc<Incidents>,
    clock: Clock,
    hand: ManualClock,
}

impl World {
    fn new() -> Self {
        let (clock, hand) = Clock::manual(START_MS);
        let signer = Signer::new(&Keyring::for_tests(), clock.clone());
        let auth = Arc::new(FakeAuth::default());
        let channel = Channel::local();
        let rpcs = Rpcs::new(CredentialServiceServer::new(Handler(Arc::clone(&auth))));
        channel.bind(Guarded::new(rpcs, signer.clone(), clock.clone(), None, None));
        let client = CredentialServiceClient::new(channel.as_service("gateway", signer, None));
        let uses = Arc::new(KeyUses::new(client.clone()));
        let incidents = Incidents::new(client, Arc::clone(&uses), clock.clone());
        Self { auth, uses, incidents, clock, hand }
    }

    /// What was told of uses since the last look: key, network, and how long after the start, in seconds.
    async fn told_uses(&self) -> Vec<(String, String, i64)> {
        self.uses.flush().await.unwrap();
        let told = std::mem::take(&mut *self.auth.uses.lock()).concat();
        told.into_iter().map(|it| (it.key_id, it.network, (it.used_at_ms - START_MS) / 1_000)).collect()
    }

    /// What was told of bursts since the last look: team, key, address, how many, and since how long after the start.
    async fn told_bursts(&self) -> Vec<(String, String, String, i32, i64)> {
        self.incidents.flush().await.unwrap();
        let told = std::mem::take(&mut *self.auth.incidents.lock()).concat();
        let burst = |incident: Incident| {
            let Some(What::RefusalBurst(burst)) = incident.what else { panic!("{incident:?}") };
            (incident.team_id, burst.key_id, burst.ip, burst.refused, (burst.since_ms - START_MS) / 1_000)
        };
        let mut told: Vec<_> = told.into_iter().map(burst).collect();
        told.sort();
        told
    }

    fn refuse(&self, principal: Option<&Principal>, client: &str, count: usize) {
        for _ in 0..count {
            self.incidents.refused(principal, ip(client));
        }
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn key(id: &str) -> Principal {
    Principal {
        kind: Kind::TeamKey.into(),
        id: id.into(),
        team_id: "team_1".into(),
        mode: Mode::Test.into(),
        ..Principal::default()
    }
}

fn told(key: &str, network: &str, after_s: i64) -> (String, String, i64) {
    (key.to_owned(), network.to_owned(), after_s)
}

#[tokio::test]
async fn a_network_is_told_once_an_hour_with_the_use_of_its_key() {
    let world = World::new();
    let one = key("key_1");
    for address in ["203.0.113.7", "203.0.113.250", "::ffff:203.0.113.9", "2001:db8:1:2::3", "2001:db8:1:ffff::1"] {
        world.uses.note("key_1", START_MS);
        world.incidents.used(&one, ip(address));
    }
    let expected = vec![told("key_1", "203.0.113.0/24", 0), told("key_1", "2001:db8:1::/48", 0)];
    assert_eq!(world.told_uses().await, expected, "by the network, and by nothing else");
    // Somewhere within each hour, wherever that hour begins.
    let mut times = 0;
    for _ in 0..(24 * 60) {
        world.hand.advance_ms(60_000);
        world.incidents.used(&one, ip("203.0.113.7"));
        times += world.told_uses().await.len();
    }
    assert_eq!(times, 24);
    world.incidents.used(&key("key_2"), ip("203.0.113.7"));
    assert_eq!(world.told_uses().await.len(), 1, "another key, another story");
}

#[tokio::test]
async fn an_old_token_is_told_each_minute() {
    let world = World::new();
    let old = Principal { superseded: true, ..key("key_1") };
    world.incidents.used(&key("key_1"), ip("203.0.113.7"));
    assert_eq!(world.told_uses().await.len(), 1);
    for second in 0..180 {
        world.incidents.used(&old, ip("203.0.113.7"));
        let expected: &[_] = if second % 60 == 0 { &[told("key_1", "203.0.113.0/24", second)] } else { &[] };
        assert_eq!(world.told_uses().await, expected);
        world.hand.advance_ms(1_000);
    }
}

#[tokio::test]
async fn what_tells_nothing_of_a_team_is_not_noted() {
    let world = World::new();
    for kind in [Kind::Account, Kind::SystemKey, Kind::ProductPublicKey, Kind::Service, Kind::Anyone] {
        world.incidents.used(&Principal { kind: kind.into(), ..key("key_1") }, ip("203.0.113.7"));
    }
    assert_eq!(world.uses.waiting(), 0);
    for kind in [Kind::TeamKey, Kind::FreeKey, Kind::UserToken, Kind::ProductSecretKey] {
        world.incidents.used(&Principal { kind: kind.into(), ..key(kind.as_str_name()) }, ip("203.0.113.7"));
    }
    assert_eq!(world.uses.waiting(), 4);
}

#[tokio::test]
async fn a_use_that_came_later_than_its_networks_is_told_by_itself() {
    let world = World::new();
    world.incidents.used(&key("key_1"), ip("203.0.113.7"));
    world.hand.advance_ms(60_000);
    world.uses.note("key_1", world.clock.now_ms());
    assert_eq!(world.told_uses().await, [told("key_1", "203.0.113.0/24", 0), told("key_1", "", 60)]);
}

#[tokio::test]
async fn networks_that_auth_does_not_take_are_kept() {
    let world = World::new();
    world.auth.is_gone.store(true, Ordering::SeqCst);
    world.incidents.used(&key("key_1"), ip("203.0.113.7"));
    assert_eq!(world.uses.flush().await.unwrap_err().reason(), Reason::Unavailable);
    world.incidents.used(&key("key_1"), ip("198.51.100.7"));
    world.auth.is_gone.store(false, Ordering::SeqCst);
    let mut networks: Vec<_> = world.told_uses().await.into_iter().map(|(_, network, _)| network).collect();
    networks.sort();
    assert_eq!(networks, ["198.51.100.0/24", "203.0.113.0/24"]);
}

#[tokio::test]
async fn a_key_that_is_used_from_everywhere_fills_no_memory_and_no_batch() {
    let world = World::new();
    for key_number in 0..3_000 {
        let key = key(&format!("key_{key_number}"));
        for number in 0..if key_number < 20 { 200 } else { 1 } {
            world.incidents.used(&key, IpAddr::from([10, 0, number, 1]));
        }
    }
    world.uses.flush().await.unwrap();
    let sizes: Vec<usize> = std::mem::take(&mut *world.auth.uses.lock()).iter().map(Vec::len).collect();
    assert!(sizes.iter().all(|size| *size <= 1_000), "what auth takes: {sizes:?}");
    assert_eq!(sizes.iter().sum::<usize>(), 20 * 64 + 2_980);
    // Those that did not fit are told when they come again.
    world.incidents.used(&key("key_0"), ip("10.0.199.1"));
    assert_eq!(world.told_uses().await, [told("key_0", "10.0.199.0/24", 0)]);
}

#[tokio::test]
async fn the_twentieth_refusal_within_a_minute_is_a_burst() {
    let world = World::new();
    let one = key("key_1");
    // Nineteen, and one a minute after the first: never twenty within a minute.
    world.refuse(Some(&one), "203.0.113.7", 19);
    world.hand.advance_ms(60_000);
    world.refuse(Some(&one), "203.0.113.7", 1);
    assert!(world.told_bursts().await.is_empty());
    // Eighteen more are nineteen with that one.
    world.hand.advance_ms(30_000);
    world.refuse(Some(&one), "203.0.113.7", 18);
    assert!(world.told_bursts().await.is_empty());
    world.hand.advance_ms(29_999);
    world.refuse(Some(&one), "203.0.113.8", 1);
    let burst = |ip: &str, refused, since_s| ("team_1".to_owned(), "key_1".to_owned(), ip.to_owned(), refused, since_s);
    assert_eq!(world.told_bursts().await, [burst("203.0.113.8", 20, 60)]);
}

#[tokio::test]
async fn a_burst_that_goes_on_is_told_each_minute_with_how_many() {
    let world = World::new();
    let one = key("key_1");
    let mut told = Vec::new();
    for second in 0..150 {
        world.refuse(Some(&one), "203.0.113.7", 2);
        told.extend(world.told_bursts().await.into_iter().map(|(.., refused, since_s)| (second, refused, since_s)));
        world.hand.advance_ms(1_000);
    }
    assert_eq!(told, [(9, 20, 0), (69, 139, 0), (129, 259, 0)]);
    // Once it has ended, another begins with twenty.
    world.hand.advance_ms(60_000);
    world.refuse(Some(&one), "203.0.113.7", 19);
    assert!(world.told_bursts().await.is_empty());
    world.refuse(Some(&one), "203.0.113.7", 1);
    assert_eq!(world.told_bursts().await[0].3, 20);
}

#[tokio::test]
async fn strangers_are_counted_by_address_and_ipv6_by_its_64() {
    let world = World::new();
    for number in 0..20_u16 {
        world.incidents.refused(None, Ipv6Addr::new(0x2001, 0xdb8, 1, 2, 3, 4, 5, number).into());
        world.incidents.refused(None, Ipv6Addr::new(0x2001, 0xdb8, 1, number, 0, 0, 0, 1).into());
        world.incidents.refused(None, IpAddr::from([203, 0, 113, u8::try_from(number).unwrap()]));
    }
    let bursts = world.told_bursts().await;
    let [(team, key, ip, refused, _)] = bursts.as_slice() else { panic!("{bursts:?}") };
    // One of the second kind lies in the network of the first.
    assert_eq!((team.as_str(), key.as_str(), ip.as_str(), *refused), ("", "", "2001:db8:1:2::/64", 20));
    // People are told by where they are.
    let person = Principal { kind: Kind::Account.into(), ..self::key("usr_1") };
    world.refuse(Some(&person), "::ffff:198.51.100.7", 20);
    let expected = (String::new(), String::new(), "198.51.100.7".to_owned(), 20, 0);
    assert_eq!(world.told_bursts().await, [expected]);
}

#[tokio::test]
async fn one_key_makes_no_burst_of_its_address_and_many_do() {
    let world = World::new();
    world.refuse(Some(&key("key_1")), "203.0.113.7", 1_000);
    let bursts = world.told_bursts().await;
    assert_eq!(bursts.len(), 1);
    assert_eq!(bursts[0].1, "key_1");
    for number in 0..10 {
        world.refuse(Some(&key(&format!("other_{number}"))), "198.51.100.7", 2);
    }
    let bursts = world.told_bursts().await;
    assert_eq!(bursts.len(), 1);
    assert_eq!((bursts[0].1.as_str(), bursts[0].2.as_str()), ("", "198.51.100.7"));
}

#[tokio::test]
async fn incidents_that_auth_does_not_take_are_kept_and_the_newest_of_each_counts() {
    let world = World::new();
    world.auth.is_gone.store(true, Ordering::SeqCst);
    world.refuse(None, "203.0.113.7", 20);
    assert_eq!(world.incidents.flush().await.unwrap_err().reason(), Reason::Unavailable);
    for _ in 0..6 {
        world.hand.advance_ms(10_000);
        world.refuse(None, "203.0.113.7", 10);
    }
    assert!(world.incidents.flush().await.is_err());
    assert_eq!(world.incidents.waiting(), 1);
    world.auth.is_gone.store(false, Ordering::SeqCst);
    assert_eq!(world.told_bursts().await[0].3, 20 + 51, "the first of the tenth that came last is told");
    assert_eq!(world.incidents.waiting(), 0);
}

#[tokio::test]
async fn an_attack_from_everywhere_fills_no_memory() {
    let world = World::new();
    for number in 0..30_000_u32 {
        for _ in 0..20 {
            world.incidents.refused(None, Ipv4Addr::from_bits(number).into());
        }
    }
    assert_eq!(world.incidents.waiting(), MAX_WAITING);
    assert!(world.incidents.refusals.len() <= SUBJECTS + SUBJECTS / 10);
    world.incidents.flush().await.unwrap();
    assert!(world.auth.incidents.lock().iter().all(|batch| batch.len() <= BATCH));
    assert_eq!(world.incidents.waiting(), 0);
}

#[tokio::test]
async fn the_worker_ends_when_it_is_told_to() {
    let world = World::new();
    let (handle, shutdown) = crate::shutdown::channel();
    let running = tokio::spawn(Arc::clone(&world.incidents).run(shutdown));
    handle.shut_down();
    running.await.unwrap();
}
