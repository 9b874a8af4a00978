//! Units of a month, raced for and given back: the same on SQLite and on PostgreSQL.

#[expect(dead_code, reason = "the other tests of this crate use the rest")]
mod common;

use std::{
    collections::{BTreeMap, HashMap},
    future::Future,
    sync::Arc,
};

use common::{App, Signed, answer, fresh, reason, refusal};
use futures_util::future::join_all;
use paperkey_kit::{
    clock::{Clock, ManualClock},
    config::Tiers,
    db::{Database, DbError},
    secrets::{Keyring, Purpose},
    testing::TestDb,
};
use paperkey_proto::{
    Error,
    auth::v1::{
        ConsumeUnitsRequest, ConsumeUnitsResponse, DeleteTeamRequest, GetUsageHistoryRequest, GetUsageRequest,
        MeterHistory, MeterUsage, RefundUnitsRequest, SetTeamLimitsRequest, SetTeamLimitsResponse,
        quota_service_client::QuotaServiceClient, team_service_client::TeamServiceClient,
        usage_service_client::UsageServiceClient,
    },
    errors::v1::Reason,
    events::v1::Event,
    principal::v1::{Mode, Principal},
};
use prost::Message as _;
use sea_orm::{ConnectionTrait as _, QueryResult, Statement};
use serde_json::{Value, json};

/// 21 November 2026, about noon.
const START_MS: i64 = 1_795_262_400_000;
/// The first of December.
const DECEMBER_MS: i64 = 1_796_083_200_000;
const DAY_MS: i64 = 24 * 60 * 60 * 1_000;

const RENDERS: &str = "renders";

/// A team of tier Free (100 renders, 10 pages), and a clock that stands still.
struct Team {
    app: Arc<App>,
    hand: ManualClock,
    id: String,
    owner: Principal,
    live_key: String,
}

/// The usual tiers, of which some name pages too, and one that is not usual.
fn tiers() -> Arc<Tiers> {
    let written = json!({
        "free": {"quota": {"pages": 10}},
        "tiny": {"requests_per_minute": 7, "quota": {"renders": 5}},
    });
    Arc::new(serde_json::from_value(written).unwrap())
}

fn app(database: Database) -> App {
    App::with_tiers(database, true, &Keyring::for_tests(), tiers())
}

async fn open(db: &TestDb) -> (Database, ManualClock) {
    let (clock, hand) = Clock::manual(START_MS);
    let mut options = db.options();
    options.clock = clock;
    (Database::open(options).await.unwrap(), hand)
}

async fn on_both<F, Fut>(test: F)
where
    F: Fn(Team) -> Fut,
    Fut: Future<Output = ()>,
{
    for db in [Some(TestDb::sqlite()), TestDb::postgres().await].into_iter().flatten() {
        let (database, hand) = open(&db).await;
        database.migrate_up::<paperkey_migrations::auth::Migrator>().await.unwrap();
        test(Team::new(database.clone(), hand).await).await;
        database.close().await;
        db.remove().await;
    }
}

impl Team {
    async fn new(database: Database, hand: ManualClock) -> Self {
        let app = Arc::new(app(database));
        let registered = app.registered("ada@example.com").await;
        let owner = app.authenticate(&registered.token).await.unwrap();
        Self { id: owner.team_id.clone(), app, hand, owner, live_key: registered.live_key }
    }

    fn asks(&self, id: &str, cost: i64) -> ConsumeUnitsRequest {
        ConsumeUnitsRequest {
            consume_id: id.to_owned(),
            team_id: self.id.clone(),
            mode: Mode::Live.into(),
            meter: RENDERS.to_owned(),
            cost,
        }
    }

    async fn take(&self, id: &str, cost: i64) -> ConsumeUnitsResponse {
        consume(&self.app, self.asks(id, cost)).await.unwrap()
    }

    /// Whether units were taken.
    async fn takes(&self, cost: i64) -> bool {
        self.take(&fresh("take"), cost).await.granted
    }

    async fn look(&self) -> ConsumeUnitsResponse {
        self.take(&fresh("look"), 0).await
    }

    async fn used(&self) -> i64 {
        self.look().await.used
    }

    async fn refund(&self, id: &str) {
        refund(&self.app, id).await.unwrap();
    }

    async fn set_tier(&self, tier: &str) {
        self.app.admin.set_tier(&tiers(), &self.id, tier).await.unwrap();
    }

    async fn system(&self) -> Principal {
        let key = self.app.system_key().await;
        self.app.authenticate(key.expose()).await.unwrap()
    }

    async fn usage(&self, principal: &Principal) -> Vec<MeterUsage> {
        usage(&self.app, principal, "").await.unwrap()
    }

    async fn rows(&self, sql: &'static str) -> Vec<QueryResult> {
        let job = self.app.database.read(move |reader| async move {
            let statement = Statement::from_string(reader.get_database_backend(), sql);
            Ok::<_, DbError>(reader.query_all_raw(statement).await?)
        });
        job.await.unwrap()
    }

    async fn number(&self, sql: &'static str) -> i64 {
        self.rows(sql).await[0].try_get("", "n").unwrap()
    }

    async fn history(&self, principal: &Principal, days: Option<i32>) -> Vec<MeterHistory> {
        history(&self.app, principal, "", days).await.unwrap()
    }

    /// What was used of a meter on the last days, oldest first.
    async fn days_of(&self, meter: &str, days: i32) -> Vec<i64> {
        // Whatever day it is.
        let owner = Principal { expires_at_ms: 0, ..self.owner.clone() };
        let histories = self.history(&owner, Some(days)).await;
        let history = histories.into_iter().find(|one| one.meter == meter).unwrap();
        history.days.into_iter().map(|day| day.used).collect()
    }

    async fn run(&self, sql: String) {
        let job = self.app.database.write(|tx| async move {
            tx.execute_unprepared(&sql).await?;
            Ok::<_, DbError>(())
        });
        job.await.unwrap();
    }

    /// Every unit that is used was taken by somebody who has not given it back, month by month and day by day.
    async fn must_add_up(&self) {
        let of = |rows: Vec<QueryResult>| -> BTreeMap<(String, String), i64> {
            let text = |row: &QueryResult, name| row.try_get::<String>("", name).unwrap();
            let count = |row: &QueryResult| row.try_get::<i64>("", "n").unwrap();
            rows.iter()
                .map(|row| ((text(row, "meter"), text(row, "month")), count(row)))
                .filter(|(_, n)| *n != 0)
                .collect()
        };
        let job = self.app.database.snapshot(|reader| async move {
            let backend = reader.get_database_backend();
            let used = "SELECT meter, month, used AS n FROM quota_usage";
            let taken = "SELECT meter, month, CAST(SUM(units) AS BIGINT) AS n FROM quota_consumptions \
                         WHERE refunded_at_ms IS NULL GROUP BY meter, month";
            // The name of the second column is one for all.
            let days = "SELECT meter, day AS month, used AS n FROM quota_days";
            let taken_by_day = "SELECT meter, day AS month, CAST(SUM(units) AS BIGINT) AS n FROM quota_consumptions \
                                WHERE refunded_at_ms IS NULL GROUP BY meter, day";
            let mut found = Vec::new();
            for sql in [used, taken, days, taken_by_day] {
                found.push(reader.query_all_raw(Statement::from_string(backend, sql)).await?);
            }
            Ok::<_, DbError>(found)
        });
        let [used, taken, days, taken_by_day] = job.await.unwrap().try_into().unwrap();
        let (used, days) = (of(used), of(days));
        assert_eq!((&used, &days), (&of(taken), &of(taken_by_day)));
        let mut months = BTreeMap::new();
        for ((meter, day), units) in days {
            *months.entry((meter, day[..7].to_owned())).or_insert(0) += units;
        }
        assert_eq!(used, months, "a month is its days");
    }

    /// What was told of quotas, oldest first: topic and data.
    async fn told(&self) -> Vec<(String, Value)> {
        let sealer = Keyring::for_tests().sealer(Purpose::Outbox);
        let rows = self.rows("SELECT id, target, payload FROM outbox WHERE topic LIKE 'quota.%' ORDER BY seq").await;
        let open = |row: &QueryResult| {
            assert_eq!(row.try_get::<String>("", "target").unwrap(), "webhook");
            let (id, payload): (String, Vec<u8>) =
                (row.try_get("", "id").unwrap(), row.try_get("", "payload").unwrap());
            let event = Event::decode(sealer.open(&id, &payload).unwrap().as_slice()).unwrap();
            assert_eq!((event.mode(), event.product_id.as_str(), &event.team_id), (Mode::Live, "", &self.id));
            (event.topic, serde_json::from_str(&event.data_json).unwrap())
        };
        rows.iter().map(open).collect()
    }

    async fn topics(&self) -> Vec<String> {
        self.told().await.into_iter().map(|(topic, _)| topic).collect()
    }
}

fn quotas(app: &App) -> QuotaServiceClient<paperkey_kit::channel::ServiceChannel> {
    QuotaServiceClient::new(app.service())
}

async fn consume(app: &App, request: ConsumeUnitsRequest) -> Result<ConsumeUnitsResponse, Error> {
    answer(quotas(app).consume_units(request).await)
}

async fn refund(app: &App, id: &str) -> Result<(), Error> {
    answer(quotas(app).refund_units(RefundUnitsRequest { consume_id: id.to_owned() }).await).map(drop)
}

async fn usage(app: &App, principal: &Principal, team: &str) -> Result<Vec<MeterUsage>, Error> {
    let client: UsageServiceClient<Signed> = UsageServiceClient::new(app.signed(Some(principal)));
    let request = GetUsageRequest { team_id: team.to_owned() };
    Ok(answer({ client }.get_usage(request).await)?.meters)
}

async fn history(app: &App, principal: &Principal, team: &str, days: Option<i32>) -> Result<Vec<MeterHistory>, Error> {
    let request = GetUsageHistoryRequest { team_id: team.to_owned(), days };
    let mut client = UsageServiceClient::new(app.signed(Some(principal)));
    Ok(answer(client.get_usage_history(request).await)?.meters)
}

async fn set_limits(
    app: &App,
    principal: &Principal,
    team: &str,
    requests_per_minute: Option<i32>,
    quotas: &[(&str, i64)],
) -> Result<SetTeamLimitsResponse, Error> {
    let quotas: HashMap<_, _> = quotas.iter().map(|(meter, units)| ((*meter).to_owned(), *units)).collect();
    let request = SetTeamLimitsRequest { team_id: team.to_owned(), requests_per_minute, quotas };
    answer(TeamServiceClient::new(app.signed(Some(principal))).set_team_limits(request).await)
}

/// Runs the same thing many times at once.
async fn at_once<T, Fut>(count: i64, what: impl Fn(i64) -> Fut) -> Vec<T>
where
    Fut: Future<Output = T> + Send + 'static,
    T: Send + 'static,
{
    let running: Vec<_> = (0..count).map(|number| tokio::spawn(what(number))).collect();
    join_all(running).await.into_iter().map(Result::unwrap).collect()
}

/// Fifty callers, of whom each wants 1 to 7 units, some of them through another process.
async fn race(apps: [&Arc<App>; 2], team: &Team) -> Vec<(i64, ConsumeUnitsResponse)> {
    at_once(50, |number| {
        let app = Arc::clone(apps[usize::try_from(number % 2).unwrap()]);
        let cost = number % 7 + 1;
        let request = team.asks(&fresh("take"), cost);
        async move { (cost, consume(&app, request).await.unwrap()) }
    })
    .await
}

fn judge_race(outcomes: &[(i64, ConsumeUnitsResponse)]) -> i64 {
    let granted: i64 = outcomes.iter().filter(|(_, outcome)| outcome.granted).map(|(cost, _)| cost).sum();
    assert!(granted <= 100, "{granted} units of 100");
    for (cost, outcome) in outcomes.iter().filter(|(_, outcome)| !outcome.granted) {
        assert!(outcome.used + cost > 100, "{cost} would have fitted beside {}", outcome.used);
    }
    // Whoever wanted one unit fitted as long as there was one.
    assert!(granted == 100 || outcomes.iter().all(|(cost, outcome)| outcome.granted || *cost > 100 - granted));
    granted
}

#[tokio::test(flavor = "multi_thread")]
async fn fifty_race_for_a_hundred_units_and_get_no_more_and_no_less_than_fits() {
    on_both(|team| async move {
        let outcomes = race([&team.app, &team.app], &team).await;
        let granted = judge_race(&outcomes);
        assert_eq!(team.used().await, granted);
        assert_eq!(team.days_of(RENDERS, 2).await, [0, granted]);
        assert!(outcomes.iter().all(|(_, outcome)| outcome.resets_at_ms == DECEMBER_MS && outcome.limit == Some(100)));
        team.must_add_up().await;
        // What each was told it comes to are all the steps there were.
        let mut steps: Vec<_> =
            outcomes.iter().filter(|(_, one)| one.granted).map(|(cost, one)| (one.used, *cost)).collect();
        steps.sort_unstable();
        let mut used = 0;
        for (after, cost) in steps {
            used += cost;
            assert_eq!(after, used);
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_processes_take_from_the_same() {
    let Some(db) = TestDb::postgres().await else { return };
    let (database, hand) = open(&db).await;
    database.migrate_up::<paperkey_migrations::auth::Migrator>().await.unwrap();
    let team = Team::new(database.clone(), hand).await;
    let (elsewhere, _) = open(&db).await;
    let other = Arc::new(app(elsewhere.clone()));
    let granted = judge_race(&race([&team.app, &other], &team).await);
    assert_eq!(team.used().await, granted);
    team.must_add_up().await;
    assert_eq!(team.topics().await.len(), 2, "each threshold once, whoever crossed it");
    // The same consumption asked for and given back on both sides is one.
    let id = fresh("take");
    let mut request = team.asks(&id, 3);
    request.meter = "pages".to_owned();
    let apps = [Arc::clone(&team.app), Arc::clone(&other)];
    let answers = at_once(20, |number| {
        let app = Arc::clone(&apps[usize::try_from(number % 2).unwrap()]);
        let request = request.clone();
        async move { consume(&app, request).await.unwrap() }
    })
    .await;
    assert!(answers.iter().all(|answer| answer.granted && answer.used == 3));
    at_once(20, |number| {
        let (app, id) = (Arc::clone(&apps[usize::try_from(number % 2).unwrap()]), id.clone());
        async move { refund(&app, &id).await.unwrap() }
    })
    .await;
    team.must_add_up().await;
    assert_eq!(team.number("SELECT used AS n FROM quota_usage WHERE meter = 'pages'").await, 0);
    // A larger tier that one has set counts at the other.
    team.set_tier("pro").await;
    assert_eq!(consume(&other, team.asks(&fresh("take"), 5_000)).await.unwrap().limit, Some(10_000));
    assert_eq!(team.used().await, granted + 5_000);
    // Of one that is asked for in both months at once, one month has it.
    let (in_december, hand) = open(&db).await;
    hand.advance_ms(DECEMBER_MS - START_MS);
    let apps = [Arc::clone(&team.app), Arc::new(app(in_december.clone()))];
    for round in 0..20 {
        let answers = at_once(10, |number| {
            let app = Arc::clone(&apps[usize::try_from(number % 2).unwrap()]);
            let request = team.asks(&format!("midnight_{round}"), 2);
            async move { consume(&app, request).await.unwrap() }
        })
        .await;
        assert!(answers.iter().all(|one| one.granted && *one == answers[0]));
        team.must_add_up().await;
    }
    in_december.close().await;
    elsewhere.close().await;
    database.close().await;
    db.remove().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repetition_takes_nothing_and_is_answered_alike() {
    on_both(|team| async move {
        let first = team.take("use_1", 30).await;
        assert_eq!((first.granted, first.used, first.limit), (true, 30, Some(100)));
        assert!(team.takes(20).await);
        assert_eq!(team.take("use_1", 30).await, first);
        team.set_tier("pro").await;
        team.hand.advance_ms(DECEMBER_MS - START_MS);
        assert_eq!(team.take("use_1", 30).await, first, "also in another month, on another tier");
        assert_eq!(team.used().await, 0);
        let alike = at_once(30, |_| {
            let (app, request) = (Arc::clone(&team.app), team.asks("use_2", 7));
            async move { consume(&app, request).await.unwrap() }
        })
        .await;
        assert!(alike.iter().all(|one| *one == alike[0] && one.granted));
        assert_eq!(team.used().await, 7);
        team.must_add_up().await;
        // What was refused is judged anew.
        assert!(!team.take("use_3", 10_000).await.granted);
        team.set_tier("scale").await;
        assert!(team.take("use_3", 10_000).await.granted);
        for other in [team.asks("use_2", 8), ConsumeUnitsRequest { meter: "pages".into(), ..team.asks("use_2", 7) }] {
            let refused = consume(&team.app, other).await.unwrap_err();
            assert_eq!(
                (refused.reason(), refused.violations()[0].field.as_str()),
                (Reason::ValidationFailed, "consume_id")
            );
        }
        team.must_add_up().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_is_raced_and_given_back_adds_up() {
    on_both(|team| async move {
        team.set_tier("builder").await;
        for round in 0..4_i64 {
            at_once(60, |number| {
                let app = Arc::clone(&team.app);
                let mut request = team.asks(&format!("use_{}", (number * 7 + round * 31) % 90), number % 5 + 1);
                request.cost = i64::try_from(request.consume_id.len()).unwrap();
                if number % 3 == 0 {
                    request.meter = "pages".to_owned();
                    request.consume_id.push_str("_p");
                }
                async move {
                    let id = request.consume_id.clone();
                    match number % 4 {
                        0 => refund(&app, &id).await.unwrap(),
                        1 => {
                            consume(&app, request).await.unwrap();
                            refund(&app, &id).await.unwrap();
                        }
                        2 => {
                            // Gone before the answer.
                            let asked = tokio::spawn(async move { consume(&app, request).await });
                            tokio::task::yield_now().await;
                            asked.abort();
                        }
                        _ => drop(consume(&app, request).await.unwrap()),
                    }
                }
            })
            .await;
            // Later than those who went away: one counter is settled in order.
            for meter in [RENDERS, "pages"] {
                let mut last = team.asks(&fresh("last"), 1);
                last.meter = meter.to_owned();
                consume(&team.app, last).await.unwrap();
            }
            team.must_add_up().await;
        }
        let used = team.number("SELECT CAST(SUM(used) AS BIGINT) AS n FROM quota_usage").await;
        assert!(used > 0);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_month_is_that_of_the_moment_and_units_go_back_to_theirs() {
    on_both(|team| async move {
        team.hand.advance_ms(DECEMBER_MS - 1 - START_MS);
        let last = team.take("november", 90).await;
        assert_eq!((last.granted, last.resets_at_ms), (true, DECEMBER_MS));
        assert!(!team.takes(11).await);
        team.hand.advance_ms(1);
        let first = team.take("december", 100).await;
        assert_eq!((first.granted, first.used, first.resets_at_ms), (true, 100, DECEMBER_MS + 31 * DAY_MS));
        team.refund("november").await;
        assert_eq!(team.used().await, 100, "it is none of December's");
        assert_eq!(team.number("SELECT used AS n FROM quota_usage WHERE month = '2026-11'").await, 0);
        team.refund("december").await;
        assert_eq!(team.used().await, 0);
        team.must_add_up().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_day_is_counted_by_itself_and_units_go_back_to_theirs() {
    on_both(|team| async move {
        team.set_tier("pro").await;
        let noon = team.take("noon", 30).await;
        assert!(noon.granted && team.takes(12).await);
        // The last moment of the day, and the first of the next.
        team.hand.advance_ms(DAY_MS / 2 - 1);
        assert!(team.take("late", 5).await.granted);
        team.hand.advance_ms(1);
        assert!(team.take("early", 7).await.granted);
        assert_eq!(team.days_of(RENDERS, 3).await, [0, 47, 7]);
        // What is given back later, or twice, or was never taken, is taken off its own day, once.
        team.hand.advance_ms(DAY_MS);
        for id in ["noon", "noon", "late", "nobody"] {
            team.refund(id).await;
        }
        assert_eq!(team.days_of(RENDERS, 4).await, [0, 12, 7, 0]);
        assert_eq!(team.take("noon", 30).await.used, noon.used, "said again, and not taken again");
        assert_eq!(team.days_of(RENDERS, 4).await, [0, 12, 7, 0]);
        assert!(!team.takes(1_000_000).await);
        assert_eq!(team.days_of(RENDERS, 1).await, [0], "what was refused is not used");
        team.must_add_up().await;
        // Across the end of a month.
        team.hand.advance_ms(DECEMBER_MS - START_MS - DAY_MS * 3 / 2 - 1);
        assert!(team.take("november", 3).await.granted);
        team.hand.advance_ms(1);
        assert!(team.take("december", 4).await.granted);
        assert_eq!(team.days_of(RENDERS, 2).await, [3, 4]);
        team.refund("november").await;
        assert_eq!(team.days_of(RENDERS, 2).await, [0, 4]);
        team.must_add_up().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fifty_who_take_and_give_back_leave_each_day_what_stays_taken() {
    on_both(|team| async move {
        team.set_tier("scale").await;
        for _ in 0..2 {
            at_once(50, |number| {
                let (app, id) = (Arc::clone(&team.app), fresh("take"));
                let request = team.asks(&id, number + 1);
                async move {
                    consume(&app, request).await.unwrap();
                    if number % 2 == 0 {
                        refund(&app, &id).await.unwrap();
                    }
                }
            })
            .await;
            team.hand.advance_ms(DAY_MS);
        }
        // The even numbers of 1 to 50.
        assert_eq!(team.days_of(RENDERS, 3).await, [650, 650, 0]);
        team.must_add_up().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_history_has_every_day_of_every_meter() {
    on_both(|team| async move {
        assert!(team.takes(9).await);
        let histories = team.history(&team.owner, None).await;
        let meters: Vec<&str> = histories.iter().map(|one| one.meter.as_str()).collect();
        assert_eq!(meters, ["pages", RENDERS]);
        for history in &histories {
            let dates: Vec<&str> = history.days.iter().map(|day| day.date.as_str()).collect();
            assert_eq!((dates.len(), dates[0], dates[9], dates[29]), (30, "2026-10-23", "2026-11-01", "2026-11-21"));
            let used: i64 = history.days.iter().map(|day| day.used).sum();
            assert_eq!(used, if history.meter == RENDERS { 9 } else { 0 });
        }
        // One that no tier names any more is shown where it was used, for as long as it was.
        let id = &team.id;
        team.run(format!(
            "INSERT INTO quota_days (team_id, meter, day, used) VALUES ('{id}', 'airships', '2026-11-19', 3), \
             ('{id}', 'zeppelins', '2026-11-20', 0), ('team_0', 'balloons', '2026-11-20', 8)"
        ))
        .await;
        let meters = async |days| -> Vec<String> {
            team.history(&team.owner, Some(days)).await.into_iter().map(|one| one.meter).collect()
        };
        assert_eq!(meters(3).await, ["airships", "pages", RENDERS]);
        assert_eq!(meters(2).await, ["pages", RENDERS]);
        assert_eq!(team.days_of("airships", 3).await, [3, 0, 0]);
        let longest = team.history(&team.owner, Some(90)).await;
        assert!(longest.iter().all(|one| one.days.len() == 90));
        // Test mode counts nothing.
        let in_test = Principal { mode: Mode::Test.into(), ..team.owner.clone() };
        let histories = team.history(&in_test, Some(3)).await;
        assert_eq!(histories.iter().map(|one| one.meter.as_str()).collect::<Vec<_>>(), ["pages", RENDERS]);
        assert!(histories.iter().all(|one| one.days.len() == 3 && one.days.iter().all(|day| day.used == 0)));
        for days in [0, -1, 91, i32::MAX, i32::MIN] {
            assert_eq!(reason(history(&team.app, &team.owner, "", Some(days)).await), Reason::ValidationFailed);
        }
        assert_eq!(reason(history(&team.app, &team.owner, "team_0", None).await), Reason::NotFound);
        let key = team.app.authenticate(&team.live_key).await.unwrap();
        assert!(history(&team.app, &key, "", None).await.is_err(), "people look at it");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_taken_before_days_were_counted_is_taken_off_none() {
    on_both(|team| async move {
        assert!(team.take("before", 5).await.granted);
        team.run("DELETE FROM quota_days".to_owned()).await;
        team.run("UPDATE quota_consumptions SET day = NULL".to_owned()).await;
        assert!(team.take("after", 2).await.granted);
        team.refund("before").await;
        assert_eq!((team.days_of(RENDERS, 1).await, team.used().await), (vec![2], 2));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn units_are_given_back_once() {
    on_both(|team| async move {
        assert!(team.take("use_1", 60).await.granted && team.take("use_2", 40).await.granted);
        assert!(!team.takes(1).await);
        at_once(20, |_| {
            let app = Arc::clone(&team.app);
            async move { refund(&app, "use_1").await.unwrap() }
        })
        .await;
        assert_eq!(team.used().await, 40);
        assert!(team.take("use_1", 60).await.granted, "it says again what it said");
        assert_eq!(team.used().await, 40, "and takes nothing");
        assert!(team.takes(60).await);
        team.refund("never_seen").await;
        assert_eq!(team.used().await, 100);
        team.set_tier("pro").await;
        let late = team.take("never_seen", 1).await;
        assert_eq!((late.granted, late.used), (false, 100), "whoever asked has given up");
        team.must_add_up().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_tier_counts_at_once_upwards_and_downwards() {
    on_both(|team| async move {
        assert!(team.takes(100).await && !team.takes(1).await);
        team.set_tier("starter").await;
        assert!(team.takes(400).await && !team.takes(1).await);
        team.set_tier("scale").await;
        assert_eq!(team.take(&fresh("take"), 1_000_000_000).await.limit, None);
        team.set_tier("tiny").await;
        let refused = team.take(&fresh("take"), 1).await;
        assert_eq!((refused.granted, refused.used, refused.limit), (false, 1_000_000_500, Some(5)));
        let look = team.look().await;
        assert!(look.granted && look.limit == Some(5), "a look takes nothing, which is never too much");
        let unknown = team.app.admin.set_tier(&tiers(), &team.id, "gold").await.unwrap_err();
        assert_eq!(unknown.violations()[0].message, "must be one of builder, free, pro, scale, starter, tiny");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_team_has_limits_of_its_own_until_others_are_set() {
    on_both(|team| async move {
        let system_key = team.app.system_key().await;
        let system = team.app.authenticate(system_key.expose()).await.unwrap();
        let remembered = team.app.remember(&team.owner);
        let set = set_limits(&team.app, &system, &team.id, Some(9), &[(RENDERS, 7), ("pages", 0)]).await.unwrap();
        assert!(!remembered.is_served());
        assert_eq!(
            (&set.team_id, set.requests_per_minute, set.quotas[RENDERS], set.quotas["pages"]),
            (&team.id, Some(9), 7, 0)
        );
        assert!(team.takes(7).await && !team.takes(1).await);
        team.set_tier("scale").await;
        assert!(!team.takes(1).await, "its own limit stands before any tier's");
        let key = team.app.authenticate(&team.live_key).await.unwrap();
        assert_eq!((key.tier.as_str(), key.team_requests_per_minute, key.requests_per_minute), ("scale", 9, 0));
        let token = team.app.login("ada@example.com", common::PASSWORD).await.unwrap().token;
        for credential in [token.as_str(), system_key.expose()] {
            let named = team.app.authenticate_in(credential, &team.id, Mode::Live).await.unwrap();
            assert_eq!((named.tier.as_str(), named.team_requests_per_minute), ("scale", 9));
        }
        let pair = team.app.provision(&fresh("prod"), &team.id, Mode::Live).await.unwrap();
        assert_eq!(team.app.authenticate(&pair.secret_key).await.unwrap().team_requests_per_minute, 9);
        let set = set_limits(&team.app, &system, &team.id, None, &[("pages", 3)]).await.unwrap();
        assert_eq!((set.requests_per_minute, set.quotas.len()), (None, 1));
        assert_eq!(team.app.authenticate(&team.live_key).await.unwrap().team_requests_per_minute, 0);
        assert!(team.takes(1_000).await, "the tier's again");
        let listed = team.usage(&team.owner).await;
        let limits: Vec<_> = listed.iter().map(|one| (one.meter.as_str(), one.used, one.limit)).collect();
        assert_eq!(limits, [("pages", 0, Some(3)), (RENDERS, 1_007, None)]);
        let audited = team.rows("SELECT team_id FROM audit_entries WHERE action LIKE '%SetTeamLimits'").await;
        let logs: Vec<String> = audited.iter().map(|row| row.try_get("", "team_id").unwrap()).collect();
        assert_eq!(logs, [team.id.as_str(), &team.id], "in the log of the team");
        for (quotas, field) in
            [([("flights", 1)], "quotas"), ([("pages", -1)], "quotas.pages"), ([("pages", 1 << 50)], "quotas.pages")]
        {
            let refused = set_limits(&team.app, &system, &team.id, None, &quotas).await.unwrap_err();
            assert_eq!(refused.violations()[0].field, field);
        }
        for absent in ["team_0", "\u{7f}"] {
            assert_eq!(refusal(set_limits(&team.app, &system, absent, None, &[]).await).1, "No such team");
        }
        assert_eq!(reason(set_limits(&team.app, &team.owner, &team.id, None, &[]).await), Reason::ScopeInsufficient);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_threshold_is_told_once_also_in_a_race() {
    on_both(|team| async move {
        assert!(team.takes(79).await);
        assert_eq!(team.told().await, []);
        assert!(team.take("crossing", 1).await.granted);
        let resets_at = "2026-12-01T00:00:00.000Z";
        let warning = json!({"meter": "renders", "used": 80, "limit": 100, "resetsAt": resets_at});
        assert_eq!(team.told().await, [("quota.warning".to_owned(), warning)]);
        team.refund("crossing").await;
        at_once(40, |_| {
            let (app, request) = (Arc::clone(&team.app), team.asks(&fresh("take"), 1));
            async move { consume(&app, request).await.unwrap() }
        })
        .await;
        assert_eq!(team.topics().await, ["quota.warning", "quota.exceeded"]);
        assert_eq!(
            team.told().await[1].1,
            json!({"meter": "renders", "used": 100, "limit": 100, "resetsAt": resets_at})
        );
        assert!(!team.takes(1).await);
        assert_eq!(team.topics().await.len(), 2);
        // More is allowed, and used as well.
        team.set_tier("starter").await;
        assert!(team.takes(299).await);
        assert_eq!(team.topics().await.len(), 2, "it is below both again");
        assert!(team.takes(1).await && team.takes(100).await);
        assert_eq!(team.topics().await[2..], ["quota.warning", "quota.exceeded"]);
        // Less: that is no news.
        team.set_tier("free").await;
        assert!(!team.takes(1).await);
        assert_eq!(team.topics().await.len(), 4);
        // Another month, another count. One who asks for more than is left does not use the team's one notice up.
        team.hand.advance_ms(DECEMBER_MS - START_MS);
        assert!(!team.takes(101).await);
        assert_eq!(team.topics().await.len(), 4, "nothing is used");
        assert!(team.takes(99).await && !team.takes(2).await && team.takes(1).await);
        assert_eq!(team.topics().await[4..], ["quota.warning", "quota.exceeded"]);
        assert_eq!(team.told().await[5].1["used"], 100);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn test_mode_and_looks_write_nothing() {
    on_both(|team| async move {
        assert!(team.takes(100).await);
        let before = team.app.database.stats();
        let test = |cost| ConsumeUnitsRequest { mode: Mode::Test.into(), ..team.asks(&fresh("take"), cost) };
        for cost in [0, 1, 1_000_000] {
            let answer = consume(&team.app, test(cost)).await.unwrap();
            assert_eq!(
                (answer.granted, answer.used, answer.limit, answer.resets_at_ms),
                (true, 0, Some(100), DECEMBER_MS)
            );
        }
        assert_eq!(team.used().await, 100);
        assert_eq!(team.app.database.stats().write_jobs, before.write_jobs);
        let in_test = Principal { mode: Mode::Test.into(), ..team.owner.clone() };
        let used: Vec<_> = team.usage(&in_test).await.iter().map(|one| one.used).collect();
        assert_eq!(used, [0, 0]);
        let used: Vec<_> = team.usage(&team.owner).await.iter().map(|one| one.used).collect();
        assert_eq!(used, [0, 100]);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nonsense_is_refused_and_takes_nothing() {
    on_both(|team| async move {
        let asks = |change: &dyn Fn(&mut ConsumeUnitsRequest)| {
            let mut request = team.asks(&fresh("take"), 1);
            change(&mut request);
            let app = Arc::clone(&team.app);
            async move { consume(&app, request).await }
        };
        for (refused, field) in [
            (asks(&|request| request.meter = "flights".into()).await, "meter"),
            (asks(&|request| request.meter = "Renders".into()).await, "meter"),
            (asks(&|request| request.meter.clear()).await, "meter"),
            (asks(&|request| request.consume_id.clear()).await, "consume_id"),
            (asks(&|request| request.consume_id = "a b".into()).await, "consume_id"),
            (asks(&|request| request.consume_id = "a\0".into()).await, "consume_id"),
            (asks(&|request| request.consume_id = "a".repeat(129)).await, "consume_id"),
            (asks(&|request| request.team_id = "a".repeat(65)).await, "team_id"),
            (asks(&|request| request.cost = -1).await, "cost"),
            (asks(&|request| request.cost = 1_000_000_001).await, "cost"),
        ] {
            let refused = refused.unwrap_err();
            assert_eq!((refused.reason(), refused.violations()[0].field.as_str()), (Reason::ValidationFailed, field));
        }
        for cost in [0, 1] {
            for absent in ["team_0", "team_\u{7f}", "' OR 1=1 --"] {
                let refused = asks(&|request| (request.team_id, request.cost) = (absent.to_owned(), cost)).await;
                assert_eq!(refusal(refused), (Reason::NotFound, "No such team".to_owned()));
            }
        }
        assert_eq!(team.used().await, 0);
        assert_eq!(reason(usage(&team.app, &team.owner, "team_0").await), Reason::NotFound);
        let mut people = QuotaServiceClient::new(team.app.signed(Some(&team.owner)));
        assert!(answer(people.consume_units(team.asks("use_1", 1)).await).is_err(), "only gateways take units");
        assert!(usage(&team.app, &team.system().await, "").await.is_err(), "a key of no team must name one");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_team_takes_nothing_and_leaves_nothing() {
    on_both(|team| async move {
        assert!(team.takes(5).await);
        let system = team.system().await;
        set_limits(&team.app, &system, &team.id, None, &[("pages", 3)]).await.unwrap();
        let mut client = TeamServiceClient::new(team.app.signed(Some(&team.owner)));
        answer(client.delete_team(DeleteTeamRequest { team_id: team.id.clone() }).await).unwrap();
        for cost in [0, 1] {
            let refused = consume(&team.app, team.asks(&fresh("take"), cost)).await;
            assert_eq!(refusal(refused).1, "No such team");
        }
        assert_eq!(reason(usage(&team.app, &team.owner, "").await), Reason::NotFound);
        assert_eq!(reason(history(&team.app, &team.owner, "", None).await), Reason::NotFound);
        team.hand.advance_ms(60_000);
        team.app.run_once("auth/teams").await;
        for left in [
            "SELECT COUNT(*) AS n FROM quota_usage",
            "SELECT COUNT(*) AS n FROM quota_days",
            "SELECT COUNT(*) AS n FROM team_quotas",
        ] {
            assert_eq!(team.number(left).await, 0);
        }
        refund(&team.app, "use_of_nobody").await.unwrap();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nobody_repeats_any_more_is_forgotten() {
    on_both(|team| async move {
        assert!(team.take("use_1", 5).await.granted);
        team.refund("use_2").await;
        team.hand.advance_ms(7 * DAY_MS);
        team.app.run_once("auth/quotas").await;
        assert_eq!(team.number("SELECT COUNT(*) AS n FROM quota_consumptions").await, 2);
        team.hand.advance_ms(1);
        team.app.run_once("auth/quotas").await;
        assert_eq!(team.number("SELECT COUNT(*) AS n FROM quota_consumptions").await, 0);
        assert_eq!(team.used().await, 5, "what is used stays used");
        assert_eq!(team.number("SELECT COUNT(*) AS n FROM quota_days").await, 1);
        // It is a hundred days old.
        team.hand.advance_ms(93 * DAY_MS - 1);
        team.app.run_once("auth/quotas").await;
        assert_eq!(team.number("SELECT COUNT(*) AS n FROM quota_days").await, 1);
        team.hand.advance_ms(DAY_MS);
        team.app.run_once("auth/quotas").await;
        assert_eq!(team.number("SELECT COUNT(*) AS n FROM quota_days").await, 0);
        // December 2028 is the last month that still keeps November 2026.
        team.hand.advance_ms(DECEMBER_MS + 761 * DAY_MS - START_MS - 101 * DAY_MS);
        team.app.run_once("auth/quotas").await;
        assert_eq!(team.number("SELECT COUNT(*) AS n FROM quota_usage").await, 1);
        team.hand.advance_ms(DAY_MS);
        team.app.run_once("auth/quotas").await;
        assert_eq!(team.number("SELECT COUNT(*) AS n FROM quota_usage").await, 0);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_who_wait_for_one_counter_become_few_writes() {
    on_both(|team| async move {
        team.set_tier("scale").await;
        let before = team.app.database.stats();
        let answers = at_once(500, |_| {
            let (app, request) = (Arc::clone(&team.app), team.asks(&fresh("take"), 1));
            async move { consume(&app, request).await.unwrap() }
        })
        .await;
        assert!(answers.iter().all(|answer| answer.granted));
        let after = team.app.database.stats();
        let (jobs, statements) =
            (after.write_jobs - before.write_jobs, after.write_statements - before.write_statements);
        assert!(jobs <= 250 && statements <= jobs * 6, "{jobs} transactions and {statements} statements for 500");
        assert_eq!(team.used().await, 500);
        team.must_add_up().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn too_many_who_wait_are_told_so_and_take_nothing() {
    on_both(|team| async move {
        team.set_tier("scale").await;
        // Nobody is answered while the counter is held elsewhere.
        let (release, released) = tokio::sync::oneshot::channel::<()>();
        let (taken, holding) = tokio::sync::oneshot::channel::<()>();
        assert!(team.takes(1).await);
        let database = team.app.database.clone();
        let holder = tokio::spawn(async move {
            database
                .write(move |tx| async move {
                    tx.execute_unprepared("UPDATE quota_usage SET used = used").await?;
                    let _ = taken.send(());
                    let _ = released.await;
                    Ok::<_, DbError>(())
                })
                .await
        });
        holding.await.unwrap();
        let waiting: Vec<_> = (0..1_600)
            .map(|_| {
                let (app, request) = (Arc::clone(&team.app), team.asks(&fresh("take"), 1));
                tokio::spawn(async move { consume(&app, request).await })
            })
            .collect();
        // Those for whom there is no place are told at once.
        let (mut refused, mut left) = (0_i64, waiting);
        while refused < 1_600 - 1_024 - 400 {
            tokio::task::yield_now().await;
            let (done, others): (Vec<_>, Vec<_>) = left.into_iter().partition(tokio::task::JoinHandle::is_finished);
            left = others;
            for outcome in join_all(done).await {
                assert_eq!(reason(outcome.unwrap()), Reason::Unavailable);
                refused += 1;
            }
        }
        release.send(()).unwrap();
        holder.await.unwrap().unwrap();
        let mut granted = 0;
        for outcome in join_all(left).await {
            match outcome.unwrap() {
                Ok(answer) => granted += i64::from(answer.granted),
                Err(error) => assert_eq!(error.reason(), Reason::Unavailable),
            }
        }
        assert!(granted >= 1_024);
        assert_eq!(team.used().await, granted + 1);
        team.must_add_up().await;
    })
    .await;
}
