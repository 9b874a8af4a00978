//! Alerts, from their causes to where they are told: the same on SQLite and on PostgreSQL.

#[expect(dead_code, reason = "the other tests of this crate use the rest")]
mod common;

use std::{future::Future, sync::Arc};

use common::{App, PASSWORD, Signed, answer, fresh, reason};
use futures_util::future::join_all;
use paperkey_kit::{
    clock::{Clock, ManualClock},
    db::{Database, DbError},
    ids::new_id,
    secrets::{Keyring, Purpose},
    testing::TestDb,
    values::{rfc3339, time_ms},
};
use paperkey_proto::{
    Error,
    auth::v1::{
        Alert, AlertCause, ApiKey, CreateApiKeyRequest, CreateTestApiKeyRequest, Incident, KeyUse, ListAlertsRequest,
        ListAlertsResponse, RecordIncidentsRequest, RecordKeyUsesRequest, RefusalBurst, ReportLeakedApiKeysRequest,
        RevokeApiKeyRequest, RotateApiKeyRequest, alert_service_client::AlertServiceClient,
        api_key_service_client::ApiKeyServiceClient, credential_service_client::CredentialServiceClient,
        incident::What,
    },
    errors::v1::Reason,
    events::v1::Event,
    options::v1::Caller,
    principal::v1::{Mode, Principal},
};
use prost::Message as _;
use sea_orm::{ConnectionTrait as _, Statement};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
    sync::mpsc,
};

const HOUR_MS: i64 = 60 * 60 * 1_000;
const DAY_MS: i64 = 24 * HOUR_MS;
/// At the beginning of an hour.
const START_MS: i64 = 1_790_000_000_000 / HOUR_MS * HOUR_MS;
const HERE: &str = "203.0.113.0/24";
const THERE: &str = "198.51.100.0/24";

/// Runs a test on both engines, with a clock that the test moves.
async fn on_both<F, Fut>(test: F)
where
    F: Fn(Database, ManualClock) -> Fut,
    Fut: Future<Output = ()>,
{
    for db in [Some(TestDb::sqlite()), TestDb::postgres().await].into_iter().flatten() {
        let (clock, hand) = Clock::manual(START_MS);
        let mut options = db.options();
        options.clock = clock;
        let database = Database::open(options).await.unwrap();
        database.migrate_up::<paperkey_migrations::auth::Migrator>().await.unwrap();
        test(database.clone(), hand).await;
        database.close().await;
        db.remove().await;
    }
}

/// A team whose Owner has signed in.
#[derive(Clone)]
struct Team {
    app: Arc<App>,
    id: String,
    owner: Principal,
    session: String,
}

struct Made {
    key: ApiKey,
    token: String,
}

impl Team {
    async fn new(app: &Arc<App>, email: &str) -> Self {
        let registered = app.registered(email).await;
        let owner = app.authenticate(&registered.token).await.unwrap();
        Self { app: Arc::clone(app), id: owner.team_id.clone(), owner, session: registered.token }
    }

    fn keys(&self) -> ApiKeyServiceClient<Signed> {
        ApiKeyServiceClient::new(self.app.signed(Some(&self.owner)))
    }

    async fn key_in(&self, name: &str, mode: Mode) -> Made {
        let request =
            CreateApiKeyRequest { name: name.to_owned(), mode: mode.into(), ..CreateApiKeyRequest::default() };
        let made = answer(self.keys().create_api_key(request).await).unwrap();
        Made { key: made.api_key.unwrap(), token: made.key }
    }

    async fn key(&self, name: &str) -> Made {
        self.key_in(name, Mode::Live).await
    }

    async fn rotate(&self, id: &str) -> Made {
        let request = RotateApiKeyRequest { key_id: id.to_owned(), ..RotateApiKeyRequest::default() };
        let made = answer(self.keys().rotate_api_key(request).await).unwrap();
        Made { key: made.api_key.unwrap(), token: made.key }
    }

    async fn revoke(&self, id: &str) {
        let request = RevokeApiKeyRequest { key_id: id.to_owned(), ..RevokeApiKeyRequest::default() };
        answer(self.keys().revoke_api_key(request).await).unwrap();
    }

    /// Somebody of that role.
    async fn joined(&self, email: &str, role: &str) -> Principal {
        let registered = self.app.registered(email).await;
        let (team, user) = (&self.id, registered.user.unwrap().id);
        run(
            &self.app,
            format!(
                "INSERT INTO memberships (team_id, user_id, role, created_at_ms) VALUES ('{team}', '{user}', '{role}', {START_MS})"
            ),
        )
        .await;
        self.app.authenticate_in(&registered.token, team, Mode::Live).await.unwrap()
    }

    async fn alerts_in(&self, mode: Mode) -> Vec<Alert> {
        // Signed in anew, however much time has passed.
        let principal = Principal { mode: mode.into(), expires_at_ms: 0, ..self.owner.clone() };
        list(&self.app, &principal, Some(100), "").await.unwrap().alerts
    }

    /// The live alerts, newest first.
    async fn alerts(&self) -> Vec<Alert> {
        self.alerts_in(Mode::Live).await
    }

    /// The one live alert.
    async fn alert(&self) -> Alert {
        let alerts = self.alerts().await;
        let [alert] = alerts.as_slice() else { panic!("one alert, not {alerts:?}") };
        alert.clone()
    }

    /// What webhooks are told of alerts of this team.
    async fn events(&self) -> Vec<Value> {
        let events = events(&self.app).await;
        let of_team = events.into_iter().filter(|event| event.team_id == self.id);
        of_team.map(|event| serde_json::from_str(&event.data_json).unwrap()).collect()
    }
}

async fn list(app: &App, principal: &Principal, size: Option<i32>, token: &str) -> Result<ListAlertsResponse, Error> {
    let request = ListAlertsRequest { page_size: size, page_token: token.to_owned(), ..ListAlertsRequest::default() };
    answer(AlertServiceClient::new(app.signed(Some(principal))).list_alerts(request).await)
}

async fn run(app: &App, sql: String) {
    let job = app.database.write(|tx| async move {
        tx.execute_unprepared(&sql).await?;
        Ok::<_, DbError>(())
    });
    job.await.unwrap();
}

async fn count(app: &App, of: &'static str) -> i64 {
    let job = app.database.read(move |reader| async move {
        let sql = format!("SELECT COUNT(*) AS n FROM {of}");
        let row = reader.query_one_raw(Statement::from_string(reader.get_database_backend(), sql)).await?;
        Ok::<_, DbError>(row.unwrap().try_get::<i64>("", "n")?)
    });
    job.await.unwrap()
}

/// Every event of an alert, in the order in which they were made.
async fn events(app: &App) -> Vec<Event> {
    let job = app.database.read(|reader| async move {
        let sql = "SELECT id, payload FROM outbox WHERE target = 'webhook' AND topic = 'alert.created' ORDER BY seq";
        let rows = reader.query_all_raw(Statement::from_string(reader.get_database_backend(), sql)).await?;
        let row = |row: &sea_orm::QueryResult| {
            (row.try_get::<String>("", "id").unwrap(), row.try_get::<Vec<u8>>("", "payload").unwrap())
        };
        Ok::<_, DbError>(rows.iter().map(row).collect::<Vec<_>>())
    });
    let sealer = Keyring::for_tests().sealer(Purpose::Outbox);
    let open =
        |(id, payload): (String, Vec<u8>)| Event::decode(sealer.open(&id, &payload).unwrap().as_slice()).unwrap();
    job.await.unwrap().into_iter().map(open).collect()
}

fn used(key: &str, at_ms: i64, network: &str) -> KeyUse {
    KeyUse { key_id: key.to_owned(), used_at_ms: at_ms, network: network.to_owned() }
}

async fn record(app: &App, uses: Vec<KeyUse>) -> Result<(), Error> {
    let mut client = CredentialServiceClient::new(app.service());
    answer(client.record_key_uses(RecordKeyUsesRequest { uses }).await).map(drop)
}

fn burst(key: &str, ip: &str, refused: i32) -> Incident {
    let burst = RefusalBurst { key_id: key.to_owned(), ip: ip.to_owned(), refused, since_ms: START_MS };
    Incident { what: Some(What::RefusalBurst(burst)), ..Incident::default() }
}

async fn refused(app: &App, incidents: Vec<Incident>) -> Result<(), Error> {
    let mut client = CredentialServiceClient::new(app.service());
    answer(client.record_incidents(RecordIncidentsRequest { incidents }).await).map(drop)
}

async fn report(app: &App, token: &str) {
    let request = ReportLeakedApiKeysRequest { tokens: vec![token.to_owned()] };
    answer(ApiKeyServiceClient::new(app.signed(None)).report_leaked_api_keys(request).await).unwrap();
}

fn paused(app: &App, team: &Team, data: &Value) -> Event {
    Event {
        id: new_id("evt", app.database.clock()),
        topic: "webhook.paused".to_owned(),
        team_id: team.id.clone(),
        mode: Mode::Live.into(),
        product_id: "prod_1".to_owned(),
        created_at_ms: START_MS,
        data_json: data.to_string(),
        traceparent: String::new(),
    }
}

fn detail(alert: &Alert, name: &str) -> Value {
    fn json(value: &prost_types::Value) -> Value {
        use prost_types::value::Kind;
        match value.kind.as_ref() {
            Some(Kind::StringValue(text)) => text.as_str().into(),
            Some(Kind::NumberValue(number)) => (*number).into(),
            Some(Kind::BoolValue(is)) => (*is).into(),
            Some(Kind::ListValue(list)) => list.values.iter().map(json).collect(),
            _ => Value::Null,
        }
    }
    alert.details.as_ref().and_then(|details| details.fields.get(name)).map_or(Value::Null, json)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_network_is_news_where_the_key_was_in_another_and_not_in_this_for_thirty_days() {
    on_both(|database, hand| async move {
        let app = Arc::new(App::new(database));
        let team = Team::new(&app, "ada@example.com").await;
        let key = team.key("CI").await.key;
        let now = || app.database.clock().now_ms();
        let seen = async |network: &str| record(&app, vec![used(&key.id, now(), network)]).await.unwrap();
        seen(HERE).await;
        assert!(team.alerts().await.is_empty(), "the first of all is no news");
        seen(HERE).await;
        seen("").await;
        for nonsense in ["203.0.113.7/24", "203.0.113.0/8", "<script>", &"1".repeat(5_000)] {
            seen(nonsense).await;
        }
        assert!(team.alerts().await.is_empty());
        seen(THERE).await;
        seen(THERE).await;
        let alert = team.alert().await;
        assert_eq!((alert.cause(), &alert.subject, alert.count), (AlertCause::NewNetwork, &key.id, 1));
        assert!(alert.message.contains("\"CI\"") && alert.message.contains(THERE), "{}", alert.message);
        assert_eq!((detail(&alert, "networks"), detail(&alert, "keyId")), (json!([THERE]), json!(key.id)));
        seen("2001:db8:1::/48").await;
        let alert = team.alert().await;
        assert_eq!((alert.count, detail(&alert, "networks")), (2, json!([THERE, "2001:db8:1::/48"])));
        // Twenty-nine days on it is known, and for thirty more from then.
        hand.advance_ms(29 * DAY_MS);
        seen(HERE).await;
        hand.advance_ms(30 * DAY_MS - 1);
        seen(HERE).await;
        assert_eq!(team.alerts().await.len(), 1);
        hand.advance_ms(30 * DAY_MS);
        app.run_once("auth/forget_ended").await;
        assert_eq!(count(&app, "key_networks").await, 1, "the last one stays, or the next would be the first of all");
        seen(THERE).await;
        let alerts = team.alerts().await;
        assert_eq!((alerts.len(), detail(&alerts[0], "networks")), (2, json!([THERE])));
        assert_eq!(team.events().await.len(), 2);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_secret_key_of_a_product_is_watched_as_well() {
    on_both(|database, _| async move {
        let app = Arc::new(App::new(database));
        let team = Team::new(&app, "ada@example.com").await;
        let pair = app.provision(&fresh("prod"), &team.id, Mode::Test).await.unwrap().api_key.unwrap();
        record(&app, vec![used(&pair.id, START_MS, HERE), used("key_0", START_MS, HERE)]).await.unwrap();
        record(&app, vec![used(&pair.id, START_MS, THERE)]).await.unwrap();
        assert!(team.alerts().await.is_empty());
        let alerts = team.alerts_in(Mode::Test).await;
        assert_eq!((alerts.len(), alerts[0].cause(), &alerts[0].subject), (1, AlertCause::NewNetwork, &pair.id));
        refused(&app, vec![burst(&pair.id, "203.0.113.7", 20)]).await.unwrap();
        assert_eq!(team.alerts_in(Mode::Test).await.len(), 2);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_network_that_many_tell_of_at_once_is_new_once() {
    on_both(|database, _| async move {
        let app = Arc::new(App::new(database));
        let team = Team::new(&app, "ada@example.com").await;
        let keys = [team.key("A").await.key.id, team.key("B").await.key.id];
        record(&app, keys.iter().map(|id| used(id, START_MS, HERE)).collect()).await.unwrap();
        let racers = (0..20).map(|number| {
            let (app, mut uses) = (Arc::clone(&app), keys.clone().map(|id| used(&id, START_MS, THERE)).to_vec());
            if number % 2 == 0 {
                uses.reverse();
            }
            tokio::spawn(async move { record(&app, uses).await })
        });
        for outcome in join_all(racers).await {
            outcome.unwrap().unwrap();
        }
        let alerts = team.alerts().await;
        assert_eq!(alerts.iter().map(|alert| alert.count).collect::<Vec<_>>(), [1, 1]);
        assert_eq!(team.events().await.len(), 2);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_more_networks_of_a_key_are_kept_than_may_be() {
    on_both(|database, hand| async move {
        let app = Arc::new(App::new(database));
        let team = Team::new(&app, "ada@example.com").await;
        let key = team.key("Everywhere").await.key.id;
        for part in 0..6_i64 {
            hand.advance_ms(1_000);
            let at_ms = app.database.clock().now_ms();
            let networks = (0..200_i64).map(|number| format!("10.{part}.{number}.0/24"));
            record(&app, networks.map(|network| used(&key, at_ms, &network)).collect()).await.unwrap();
        }
        let kept = count(&app, "key_networks").await;
        assert!((800..=1_000).contains(&kept), "{kept}");
        let alert = team.alert().await;
        assert_eq!((alert.count, detail(&alert, "networks").as_array().unwrap().len()), (1_199, 20));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_old_token_in_use_is_told_with_who_uses_it() {
    on_both(|database, hand| async move {
        let app = Arc::new(App::new(database));
        let team = Team::new(&app, "ada@example.com").await;
        let old = team.key("CI").await;
        let now = || app.database.clock().now_ms();
        record(&app, vec![used(&old.key.id, now(), HERE)]).await.unwrap();
        let new = team.rotate(&old.key.id).await;
        hand.advance_ms(60_000);
        record(&app, vec![used(&old.key.id, now(), HERE), used(&new.key.id, now(), HERE)]).await.unwrap();
        assert!(team.alerts().await.is_empty(), "holders have a minute to change over");
        hand.advance_ms(1);
        // Who has no answer tells of it again.
        for _ in 0..2 {
            record(&app, vec![used(&new.key.id, now(), HERE), used(&old.key.id, now(), HERE)]).await.unwrap();
        }
        let alert = team.alert().await;
        assert_eq!((alert.cause(), &alert.subject, alert.count), (AlertCause::OldKeyUsed, &old.key.id, 1));
        assert!(alert.message.contains("\"CI\"") && alert.message.contains(HERE), "{}", alert.message);
        for (name, value) in [
            ("keyId", json!(old.key.id)),
            ("name", json!("CI")),
            ("networks", json!([HERE])),
            ("supersededBy", json!(new.key.id)),
            ("expiresAt", json!(rfc3339(START_MS + DAY_MS))),
        ] {
            assert_eq!(detail(&alert, name), value, "{name}");
        }
        hand.advance_ms(60_000);
        record(&app, vec![used(&old.key.id, now(), "")]).await.unwrap();
        assert_eq!(team.alert().await.count, 2);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_burst_is_told_to_the_team_of_its_key_whatever_the_gateway_says() {
    on_both(|database, hand| async move {
        let app = Arc::new(App::new(database));
        let (ada, bob) = (Team::new(&app, "ada@example.com").await, Team::new(&app, "bob@example.com").await);
        let key = ada.key("CI").await.key.id;
        let mistaken = Incident { team_id: bob.id.clone(), mode: Mode::Test.into(), ..burst(&key, "203.0.113.7", 20) };
        refused(&app, vec![mistaken]).await.unwrap();
        hand.advance_ms(60_000);
        refused(&app, vec![burst(&key, "2001:db8::/64", 4_000)]).await.unwrap();
        let alert = ada.alert().await;
        assert_eq!((alert.cause(), &alert.subject, alert.count), (AlertCause::RefusalBurst, &key, 2));
        assert!(alert.message.starts_with("20 calls of the key \"CI\""), "{}", alert.message);
        assert_eq!(
            (detail(&alert, "refused"), detail(&alert, "addresses")),
            (json!(4_000.0), json!(["203.0.113.7", "2001:db8::/64"]))
        );
        let times = (alert.created_at.unwrap(), alert.last_at.unwrap());
        assert_eq!((time_ms("", &times.0).unwrap(), time_ms("", &times.1).unwrap()), (START_MS, START_MS + 60_000));
        assert!(bob.alerts().await.is_empty() && bob.alerts_in(Mode::Test).await.is_empty());

        // Nonsense is passed over, and takes nothing along.
        let nonsense =
            [burst("key_0", "203.0.113.7", 20), burst("' OR 1=1", "203.0.113.7", 20), burst(&key, "<x>", 20)];
        refused(&app, [&nonsense[..], &[Incident::default(), burst(&key, "203.0.113.7", -1)]].concat()).await.unwrap();
        assert_eq!((ada.alert().await.count, count(&app, "alerts").await), (3, 1));
        let many = vec![burst(&key, "203.0.113.7", 20); 1_001];
        assert_eq!(reason(refused(&app, many).await), Reason::ValidationFailed);
        let mut by_ada = CredentialServiceClient::new(app.signed(Some(&ada.owner)));
        assert!(by_ada.record_incidents(RecordIncidentsRequest::default()).await.is_err());
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_key_is_refused_as_any_other_and_its_team_is_told() {
    on_both(|database, hand| async move {
        let app = Arc::new(App::new(database.clone()));
        let team = Team::new(&app, "ada@example.com").await;
        let (key, other) = (team.key("CI").await, team.key_in("Test", Mode::Test).await);
        let pair = app.provision(&fresh("prod"), &team.id, Mode::Live).await.unwrap();
        let product = pair.api_key.clone().unwrap();
        team.revoke(&key.key.id).await;
        team.revoke(&other.key.id).await;
        app.delete_pair(&team.owner, &product.product_id, &product.id).await.unwrap();
        let unknown = paperkey_kit::token::TokenKind::TeamLive.generate();
        let expected = app.authenticate(&unknown).await.unwrap_err();
        for token in [&key.token, &other.token, &pair.secret_key, &product.public_key] {
            for _ in 0..3 {
                let refusal = app.authenticate(token).await.unwrap_err();
                assert_eq!((refusal.reason(), refusal.message()), (expected.reason(), expected.message()));
            }
        }
        assert!(team.alerts().await.is_empty(), "a refusal writes nothing");
        app.run_own("auth/revoked_uses").await;
        let mut alerts = team.alerts().await;
        alerts.sort_by(|one, other| one.subject.cmp(&other.subject));
        let told: Vec<_> = alerts.iter().map(|alert| (alert.cause(), alert.subject.as_str(), alert.count)).collect();
        let mut expected = [&key.key.id, &product.id].map(|id| (AlertCause::RevokedKeyUsed, id.as_str(), 1));
        expected.sort();
        assert_eq!(told, expected, "nothing of the public key, which lives on in apps");
        let in_test = team.alerts_in(Mode::Test).await;
        assert_eq!((in_test.len(), &in_test[0].subject), (1, &other.key.id));
        assert_eq!(detail(&in_test[0], "revokedAt"), json!(rfc3339(START_MS)));

        hand.advance_ms(60_000);
        let later = App::new(database);
        later.authenticate(&key.token).await.unwrap_err();
        later.run_own("auth/revoked_uses").await;
        let alerts = team.alerts().await;
        assert_eq!(alerts.iter().find(|alert| alert.subject == key.key.id).unwrap().count, 2);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leak_is_told_once_an_hour_where_the_team_wants_to_be_told() {
    on_both(|database, hand| async move {
        let app = Arc::new(App::new(database));
        let team = Team::new(&app, "ada@example.com").await;
        run(&app, "UPDATE teams SET leak_action = 'alert'".to_owned()).await;
        let key = team.key("CI").await;
        for _ in 0..3 {
            report(&app, &key.token).await;
        }
        let alert = team.alert().await;
        assert_eq!((alert.cause(), &alert.subject, alert.count), (AlertCause::KeyLeaked, &key.key.id, 3));
        let expected = json!({
            "id": alert.id,
            "cause": "key_leaked",
            "subject": key.key.id,
            "message": alert.message,
            "count": 1,
            "details": {"keyId": key.key.id, "name": "CI", "prefix": key.key.prefix},
            "createdAt": rfc3339(START_MS),
        });
        assert_eq!(team.events().await, [expected]);
        assert_eq!(count(&app, "audit_entries WHERE action LIKE '%ReportLeakedApiKeys'").await, 1);
        hand.advance_ms(HOUR_MS - 1);
        report(&app, &key.token).await;
        assert_eq!(team.alert().await.count, 4);
        hand.advance_ms(1);
        report(&app, &key.token).await;
        assert_eq!(team.alerts().await.iter().map(|alert| alert.count).collect::<Vec<_>>(), [1, 4]);
        assert_eq!(team.events().await.len(), 2);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn leaks_are_reported_and_uses_recorded_at_once() {
    on_both(|database, _| async move {
        let app = Arc::new(App::new(database));
        let team = Team::new(&app, "ada@example.com").await;
        let mut made = Vec::new();
        for number in 0..8 {
            made.push(team.key(&format!("Key {number}")).await);
        }
        let uses: Vec<_> = made.iter().map(|made| used(&made.key.id, START_MS, HERE)).collect();
        let tokens: Vec<_> = made.into_iter().map(|made| made.token).collect();
        let racers = (0..40).map(|number| {
            let (app, uses, tokens) = (Arc::clone(&app), uses.clone(), tokens.clone());
            tokio::spawn(async move {
                if number % 2 == 0 {
                    return record(&app, uses).await;
                }
                let request = ReportLeakedApiKeysRequest { tokens };
                answer(ApiKeyServiceClient::new(app.signed(None)).report_leaked_api_keys(request).await).map(drop)
            })
        });
        for outcome in join_all(racers).await {
            outcome.unwrap().unwrap();
        }
        assert_eq!(count(&app, "keys WHERE revoked_at_ms IS NOT NULL").await, 8);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_webhook_is_told_once_however_often_its_event_comes() {
    on_both(|database, _| async move {
        let app = Arc::new(App::new(database));
        let team = Team::new(&app, "ada@example.com").await;
        let data =
            json!({"webhookId": "wh_1", "host": "example.com", "productId": "prod_1", "failures": 12, "gone": false});
        let event = paused(&app, &team, &data);
        let racers = (0..10).map(|_| {
            let (app, event) = (Arc::clone(&app), event.clone());
            tokio::spawn(async move { app.ingest(vec![event.clone(), event]).await })
        });
        for outcome in join_all(racers).await {
            outcome.unwrap().unwrap();
        }
        let alert = team.alert().await;
        assert_eq!((alert.cause(), alert.subject.as_str(), alert.count), (AlertCause::WebhookPaused, "wh_1", 1));
        assert_eq!(alert.message, "The webhook wh_1 to example.com is paused: 12 deliveries in a row have failed");
        assert_eq!((detail(&alert, "productId"), detail(&alert, "failures")), (json!("prod_1"), json!(12.0)));
        // What cannot be read holds nothing up.
        let mut nonsense =
            vec![paused(&app, &team, &json!({})), paused(&app, &team, &json!({"webhookId": "é", "host": ""}))];
        nonsense.push(Event { data_json: "{".to_owned(), ..event.clone() });
        nonsense.push(Event { id: fresh("evt"), mode: 0, ..event.clone() });
        nonsense.push(Event { id: fresh("evt"), team_id: "team_0".to_owned(), ..event });
        nonsense.push(paused(&app, &team, &json!({"webhookId": "wh_1", "host": "example.com", "gone": true})));
        app.ingest(nonsense).await.unwrap();
        assert_eq!((team.alert().await.count, count(&app, "alerts").await), (2, 1));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_that_raise_at_once_one_tells_and_all_count() {
    on_both(|database, _| async move {
        let (app, other) = (Arc::new(App::new(database.clone())), Arc::new(App::new(database)));
        let team = Team::new(&app, "ada@example.com").await;
        let keys = [team.key("A").await.key.id, team.key("B").await.key.id];
        let racers = (0..30).map(|number| {
            let app = Arc::clone(if number % 2 == 0 { &app } else { &other });
            let mut bursts = keys.clone().map(|id| burst(&id, "203.0.113.7", 20)).to_vec();
            if number % 3 == 0 {
                bursts.reverse();
            }
            tokio::spawn(async move { refused(&app, bursts).await })
        });
        for outcome in join_all(racers).await {
            outcome.unwrap().unwrap();
        }
        assert_eq!(team.alerts().await.iter().map(|alert| alert.count).collect::<Vec<_>>(), [30, 30]);
        assert_eq!((team.events().await.len(), app.mails().await.len()), (2, 2));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn owners_and_admins_are_mailed_and_nobody_else() {
    on_both(|database, hand| async move {
        let app = Arc::new(App::new(database));
        let team = Team::new(&app, "ada@example.com").await;
        for (email, role) in [
            ("admin@example.com", "admin"),
            ("former@example.com", "admin"),
            ("weaker@example.com", "admin"),
            ("manager@example.com", "manager"),
            ("member@example.com", "member"),
        ] {
            team.joined(email, role).await;
        }
        Team::new(&app, "bob@example.com").await;
        // A name has no line of its own; what is stored by other means is not believed either.
        let key = team.key("CI").await.key;
        run(&app, format!("UPDATE keys SET name = 'CI\r\nBcc: eve@example.com' WHERE id = '{}'", key.id)).await;
        refused(&app, vec![burst(&key.id, "203.0.113.7", 20)]).await.unwrap();
        refused(&app, vec![burst(&key.id, "203.0.113.7", 30)]).await.unwrap();
        // Between the alert and the mail.
        run(&app, "DELETE FROM memberships WHERE user_id IN (SELECT id FROM users WHERE email = 'former@example.com')".to_owned()).await;
        run(&app, "UPDATE memberships SET role = 'manager' WHERE user_id IN (SELECT id FROM users WHERE email = 'weaker@example.com')".to_owned()).await;
        let mails = app.mails().await;
        let mut to: Vec<&str> = mails.iter().map(|mail| mail.split("\r\nTo: ").nth(1).unwrap().lines().next().unwrap()).collect();
        to.sort_unstable();
        assert_eq!(to, ["ada@example.com", "admin@example.com"]);
        for mail in &mails {
            assert!(mail.contains("Many calls refused") && mail.contains("203.0.113.7"), "{mail}");
            assert!(!mail.contains("\nBcc"), "{mail}");
        }
        assert!(app.mails().await.is_empty());
        hand.advance_ms(HOUR_MS);
        refused(&app, vec![burst(&key.id, "203.0.113.7", 20)]).await.unwrap();
        assert_eq!(app.mails().await.len(), 2, "another hour, another mail");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_team_of_many_owners_mails_twenty() {
    on_both(|database, _| async move {
        let app = Arc::new(App::new(database));
        let team = Team::new(&app, "ada@example.com").await;
        for number in 0..25 {
            run(&app, format!(
                "INSERT INTO memberships (team_id, user_id, role, created_at_ms) VALUES ('{}', 'usr_{number}', 'owner', {})",
                team.id, START_MS + 1,
            )).await;
        }
        let key = team.key("CI").await.key.id;
        refused(&app, vec![burst(&key, "203.0.113.7", 20)]).await.unwrap();
        assert_eq!(count(&app, "mails").await, 20);
        let mut sent = 0;
        for _ in 0..3 {
            sent += app.mails().await.len();
        }
        assert_eq!((sent, count(&app, "mails").await), (1, 0), "of whom the first is a person");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn neither_a_team_nor_a_mode_sees_alerts_of_another() {
    on_both(|database, hand| async move {
        let app = Arc::new(App::new(database));
        let (ada, bob) = (Team::new(&app, "ada@example.com").await, Team::new(&app, "bob@example.com").await);
        let (live, test) = (ada.key("Live").await.key.id, ada.key_in("Test", Mode::Test).await.key.id);
        for number in 0..5 {
            refused(&app, vec![burst(&live, "203.0.113.7", 20 + number), burst(&test, "203.0.113.7", 20)])
                .await
                .unwrap();
            hand.advance_ms(HOUR_MS);
        }
        assert!(bob.alerts().await.is_empty() && bob.alerts_in(Mode::Test).await.is_empty());
        let subjects =
            async |mode| ada.alerts_in(mode).await.into_iter().map(|alert| alert.subject).collect::<Vec<_>>();
        assert_eq!((subjects(Mode::Live).await, subjects(Mode::Test).await), (vec![live; 5], vec![test; 5]));
        let mut by_bob = AlertServiceClient::new(app.signed(Some(&bob.owner)));
        let request = ListAlertsRequest { team_id: ada.id.clone(), ..ListAlertsRequest::default() };
        assert_eq!(reason(answer(by_bob.list_alerts(request).await)), Reason::NotFound);

        // Newest first, page by page.
        let (mut seen, mut token) = (Vec::new(), String::new());
        loop {
            let page = list(&app, &ada.owner, Some(2), &token).await.unwrap();
            assert!(page.alerts.len() <= 2);
            seen.extend(page.alerts.iter().map(|alert| detail(alert, "refused").as_f64().unwrap()));
            match page.next_page_token {
                Some(next) => token = next,
                None => break,
            }
        }
        assert_eq!(seen, [24.0, 23.0, 22.0, 21.0, 20.0]);
        assert_eq!(reason(list(&app, &ada.owner, Some(0), "").await), Reason::ValidationFailed);
        assert_eq!(reason(list(&app, &ada.owner, None, "nonsense").await), Reason::ValidationFailed);

        for (email, role, may) in [
            ("admin@example.com", "admin", true),
            ("manager@example.com", "manager", false),
            ("member@example.com", "member", false),
        ] {
            let somebody = ada.joined(email, role).await;
            assert_eq!(list(&app, &somebody, None, "").await.is_ok(), may, "{role}");
        }
        let key = app.authenticate(&ada.key("Key").await.token).await.unwrap();
        assert_eq!(key.kind(), Caller::TeamKey);
        assert!(list(&app, &key, None, "").await.is_err(), "the feed is for people");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_gone_hears_nothing_and_keeps_nothing() {
    on_both(|database, hand| async move {
        let app = Arc::new(App::new(database));
        let team = Team::new(&app, "ada@example.com").await;
        let key = team.key("CI").await.key.id;
        record(&app, vec![used(&key, START_MS, HERE)]).await.unwrap();
        refused(&app, vec![burst(&key, "203.0.113.7", 20)]).await.unwrap();
        run(&app, format!("UPDATE teams SET deleted_at_ms = {START_MS} WHERE id = '{}'", team.id)).await;
        let before = events(&app).await.len();
        record(&app, vec![used(&key, START_MS, THERE)]).await.unwrap();
        refused(&app, vec![burst(&key, "203.0.113.7", 20)]).await.unwrap();
        assert_eq!((count(&app, "alerts").await, events(&app).await.len()), (1, before));
        assert_eq!(count(&app, "alerts WHERE count > 1").await, 0);
        hand.advance_ms(60_000);
        app.run_once("auth/teams").await;
        assert_eq!((count(&app, "alerts").await, count(&app, "key_networks").await), (0, 0));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_bothers_nobody() {
    on_both(|database, _| async move {
        let mut slack = Slack::answering(&[]).await;
        let app = Arc::new(App::with_slack(database, &slack.url));
        let mut strangers = ApiKeyServiceClient::new(app.signed(None));
        let made = answer(strangers.create_test_api_key(CreateTestApiKeyRequest::default()).await).unwrap();
        let key = app.authenticate(&made.key).await.unwrap();
        refused(&app, vec![burst(&key.id, "203.0.113.7", 20)]).await.unwrap();
        assert_eq!((count(&app, "alerts").await, events(&app).await.len()), (1, 1));
        app.run_once("auth/slack").await;
        assert!(app.mails().await.is_empty() && slack.all_taken().is_empty());
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_old_is_forgotten() {
    on_both(|database, hand| async move {
        let app = Arc::new(App::new(database));
        let team = Team::new(&app, "ada@example.com").await;
        let key = team.key("CI").await.key.id;
        let data = json!({"webhookId": "wh_1", "host": "example.com", "failures": 12});
        app.ingest(vec![paused(&app, &team, &data)]).await.unwrap();
        refused(&app, vec![burst(&key, "203.0.113.7", 20), burst("", "203.0.113.7", 20)]).await.unwrap();
        assert_eq!(count(&app, "alerts").await, 3);
        hand.advance_ms(DAY_MS);
        app.run_once("auth/forget_ended").await;
        assert_eq!(count(&app, "alerts").await, 2, "nobody reads those of nobody");
        hand.advance_ms(89 * DAY_MS - 1);
        app.run_once("auth/forget_ended").await;
        assert_eq!((count(&app, "alerts").await, count(&app, "handled_events").await), (2, 0));
        hand.advance_ms(HOUR_MS);
        app.run_once("auth/forget_ended").await;
        assert_eq!(count(&app, "alerts").await, 0);
        assert_eq!(app.mails().await.len(), 0, "and mail of that time was given up");
    })
    .await;
}

/// What Slack is here: a socket that takes one post a connection.
struct Slack {
    url: String,
    taken: mpsc::UnboundedReceiver<Value>,
}

impl Slack {
    /// Answers the first posts so, and then that all is well.
    async fn answering(statuses: &'static [&'static str]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/services/T0/B0/hunter2", listener.local_addr().unwrap());
        let (sender, taken) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            let mut statuses = statuses.iter();
            while let Ok((mut stream, _)) = listener.accept().await {
                let status = statuses.next().copied().unwrap_or("200 OK\r\n");
                let mut read = Vec::new();
                let body = loop {
                    let mut some = [0; 4_096];
                    let count = stream.read(&mut some).await.unwrap();
                    read.extend_from_slice(&some[..count]);
                    let text = String::from_utf8(read.clone()).unwrap();
                    let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
                    assert!(head.starts_with("POST /services/T0/B0/hunter2 HTTP/1.1\r\n"), "{head}");
                    if let Ok(body) = serde_json::from_str::<Value>(body) {
                        break body;
                    }
                };
                if status.starts_with("200") {
                    sender.send(body).unwrap();
                }
                let answer = format!("HTTP/1.1 {status}Content-Length: 0\r\nConnection: close\r\n\r\n");
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        });
        Self { url, taken }
    }

    fn all_taken(&mut self) -> Vec<String> {
        let text = |post: Value| {
            assert_eq!(post.as_object().unwrap().len(), 1, "{post}");
            post["text"].as_str().unwrap().to_owned()
        };
        std::iter::from_fn(|| self.taken.try_recv().ok()).map(text).collect()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn slack_is_told_once_also_where_it_fails_at_first_and_the_process_ends() {
    on_both(|database, hand| async move {
        let mut slack = Slack::answering(&["500 Oops\r\n", "429 Slow\r\nRetry-After: 90\r\n"]).await;
        let app = Arc::new(App::with_slack(database.clone(), &slack.url));
        let team = Team::new(&app, "ada@example.com").await;
        run(&app, "UPDATE teams SET name = '<!channel> & co'".to_owned()).await;
        let key = team.key("CI <https://evil.example.com|here>").await.key.id;
        for _ in 0..3 {
            refused(&app, vec![burst(&key, "203.0.113.7", 20)]).await.unwrap();
        }
        app.run_once("auth/slack").await;
        app.run_once("auth/slack").await;
        assert!(slack.all_taken().is_empty());
        hand.advance_ms(30_000);
        app.run_once("auth/slack").await;
        drop(app);
        let app = App::with_slack(database, &slack.url);
        hand.advance_ms(89_999);
        app.run_once("auth/slack").await;
        assert!(slack.all_taken().is_empty(), "it has asked for ninety seconds");
        hand.advance_ms(1);
        app.run_once("auth/slack").await;
        app.run_once("auth/slack").await;
        let posts = slack.all_taken();
        let [post] = posts.as_slice() else { panic!("one post, not {posts:?}") };
        assert!(post.starts_with("*Many calls refused*\nTeam &lt;!channel&gt; &amp; co (live): 20 calls"), "{post}");
        assert!(!post.contains(['<', '>']), "{post}");
        assert_eq!(count(&app, "slack_posts").await, 0);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_post_that_slack_never_takes_is_given_up_after_a_day() {
    on_both(|database, hand| async move {
        let app = Arc::new(App::with_slack(database, "http://127.0.0.1:1/hunter2"));
        let team = Team::new(&app, "ada@example.com").await;
        let key = team.key("CI").await.key.id;
        refused(&app, vec![burst(&key, "203.0.113.7", 20)]).await.unwrap();
        let mut minutes = 0;
        while count(&app, "slack_posts").await > 0 {
            app.run_once("auth/slack").await;
            hand.advance_ms(30 * 60_000);
            minutes += 30;
            assert!(minutes <= 24 * 60, "it is tried for ever");
        }
        assert!(minutes > 16 * 60, "after {minutes} minutes");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_belongs_to_no_team_goes_to_slack_a_few_times_an_hour_and_into_no_feed() {
    on_both(|database, hand| async move {
        let mut slack = Slack::answering(&[]).await;
        let app = Arc::new(App::with_slack(database, &slack.url));
        let team = Team::new(&app, "ada@example.com").await;
        let strangers = || (0..30).map(|number| burst("", &format!("203.0.113.{number}"), 20)).collect::<Vec<_>>();
        for _ in 0..2 {
            refused(&app, strangers()).await.unwrap();
        }
        let told = async |slack: &mut Slack| {
            for _ in 0..10 {
                app.run_once("auth/slack").await;
            }
            slack.all_taken()
        };
        let posts = told(&mut slack).await;
        assert_eq!(posts.len(), 20);
        assert!(
            posts.iter().all(|post| post.starts_with("*Many calls refused*\n20 calls from 203.0.113.")),
            "{posts:?}"
        );
        assert_eq!((count(&app, "alerts").await, count(&app, "alerts WHERE count = 2").await), (30, 30));
        assert!(team.alerts().await.is_empty() && events(&app).await.is_empty() && app.mails().await.is_empty());
        hand.advance_ms(HOUR_MS);
        refused(&app, strangers()).await.unwrap();
        assert_eq!(told(&mut slack).await.len(), 20);
        let system = app.system_key().await;
        let system = app.authenticate(system.expose()).await.unwrap();
        hand.advance_ms(HOUR_MS);
        refused(&app, vec![burst(&system.id, "203.0.113.7", 20)]).await.unwrap();
        let posts = told(&mut slack).await;
        assert!(matches!(posts.as_slice(), [post] if post.contains("calls of the key")), "{posts:?}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_ever_more_addresses_no_more_than_a_thousand_an_hour_are_told_of() {
    on_both(|database, hand| async move {
        let app = Arc::new(App::new(database));
        let strangers = |part: i32| {
            (0..600).map(|number| burst("", &format!("10.{part}.{}.{}", number / 200, number % 200), 20)).collect()
        };
        for part in 0..4 {
            refused(&app, strangers(part)).await.unwrap();
        }
        assert_eq!(count(&app, "alerts").await, 1_000);
        refused(&app, strangers(0)).await.unwrap();
        assert_eq!(count(&app, "alerts").await, 1_000);
        assert_eq!(count(&app, "alerts WHERE count = 2").await, 600, "those that were told of count on");
        // What is not an address is told of all the same.
        let team = Team::new(&app, "ada@example.com").await;
        let key = team.key("CI").await.key.id;
        let system = app.system_key().await;
        let system = app.authenticate(system.expose()).await.unwrap().id;
        refused(&app, vec![burst(&key, "10.9.9.9", 20), burst(&system, "10.9.9.9", 20)]).await.unwrap();
        assert_eq!((team.alerts().await.len(), count(&app, "alerts").await), (1, 1_002));
        hand.advance_ms(HOUR_MS);
        refused(&app, strangers(4)).await.unwrap();
        assert_eq!(count(&app, "alerts").await, 1_602);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_secret_is_in_what_is_told() {
    on_both(|database, hand| async move {
        let mut slack = Slack::answering(&[]).await;
        let app = Arc::new(App::with_slack(database, &slack.url));
        let team = Team::new(&app, "ada@example.com").await;
        run(&app, "UPDATE teams SET leak_action = 'alert'".to_owned()).await;
        let (old, revoked) = (team.key("Old").await, team.key("Revoked").await);
        let now = || app.database.clock().now_ms();
        record(&app, vec![used(&old.key.id, now(), HERE)]).await.unwrap();
        report(&app, &old.token).await;
        let new = team.rotate(&old.key.id).await;
        hand.advance_ms(120_000);
        record(&app, vec![used(&old.key.id, now(), THERE)]).await.unwrap();
        refused(&app, vec![burst(&new.key.id, "203.0.113.7", 20)]).await.unwrap();
        team.revoke(&revoked.key.id).await;
        app.authenticate(&revoked.token).await.unwrap_err();
        app.run_own("auth/revoked_uses").await;
        let alerts = team.alerts().await;
        let mut causes: Vec<_> = alerts.iter().map(|alert| alert.cause().as_str_name()).collect();
        causes.sort_unstable();
        assert_eq!(
            causes,
            [
                "ALERT_CAUSE_KEY_LEAKED",
                "ALERT_CAUSE_NEW_NETWORK",
                "ALERT_CAUSE_OLD_KEY_USED",
                "ALERT_CAUSE_REFUSAL_BURST",
                "ALERT_CAUSE_REVOKED_KEY_USED"
            ]
        );
        for _ in 0..3 {
            app.run_once("auth/slack").await;
        }
        let mails = app.mails().await;
        let posts = slack.all_taken();
        assert_eq!((mails.len(), posts.len(), team.events().await.len()), (5, 5, 5));
        let told = format!("{alerts:?}{mails:?}{posts:?}{:?}", team.events().await);
        for token in [&old.token, &new.token, &revoked.token, &team.session] {
            assert!(!told.contains(&token[20..]), "the end of a token is told");
        }
        assert!(!told.contains(PASSWORD) && !told.contains("hunter2"));
    })
    .await;
}
