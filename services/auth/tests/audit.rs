//! The audit log: what is taken over, how it is read, and how it tells that somebody has touched it.

#[expect(dead_code, reason = "the other tests of this crate use the rest")]
mod common;

use std::{
    collections::{BTreeMap, HashSet},
    fs,
    sync::Arc,
};

use common::{App, answer, fresh, reason, refusal};
use futures_util::{StreamExt as _, future::join_all};
use paperkey_auth::audit::{AuditFault, AuditLog, AuditReport};
use paperkey_kit::{
    clock::Clock,
    db::{Database, DatabaseUrl, DbError, Engine},
    ids::new_id,
    secrets::Keyring,
    store_suite,
    testing::TestDb,
};
use paperkey_proto::{
    Error,
    auth::v1::{
        AuditCall, AuditEntry, AuditRecord, ExportAuditLogsRequest, ListAuditLogsRequest, ListAuditLogsResponse,
        RecordAuditRequest, audit_intake_service_client::AuditIntakeServiceClient,
        audit_log_service_client::AuditLogServiceClient,
    },
    errors::v1::Reason,
    options::v1::Caller,
    principal::v1::{Mode, Principal, Role},
};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use sea_orm::{ConnectionTrait as _, Statement};

/// Long ago enough to be older than the log is kept, if that is a day.
const START_MS: i64 = 1_700_000_000_000;

store_suite! {
    paperkey_migrations::auth::Migrator;
    a_change_of_this_service_is_in_the_log_of_its_team,
    a_call_and_its_changes_are_one_entry,
    a_batch_that_comes_again_is_passed_over,
    what_is_no_batch_is_refused,
    a_filter_leaves_what_is_asked_for,
    pages_of_overlapping_blocks_are_those_of_a_plain_list,
    a_crowded_millisecond_is_read_whole,
    nobody_reads_the_log_of_another_team,
    an_export_holds_what_the_list_shows,
    a_whole_log_is_found_whole,
    every_way_to_touch_a_log_is_found,
    an_end_that_was_cut_off_is_known_to_the_file,
    what_is_written_after_a_cut_does_not_hide_it,
    old_blocks_are_removed_and_a_forged_checkpoint_is_found,
    a_block_that_was_touched_is_not_removed_and_is_found,
    of_many_who_chain_there_is_one_chain,
}

struct Log {
    app: App,
    log: AuditLog,
}

fn log_on(database: Database) -> Log {
    let app = App::new(database.clone());
    let log = AuditLog::new(database, &Keyring::for_tests(), app.kept.path());
    Log { app, log }
}

fn owner(team: &str) -> Principal {
    Principal {
        kind: Caller::Account.into(),
        id: "usr_1".into(),
        user_id: "usr_1".into(),
        team_id: team.into(),
        mode: Mode::Live.into(),
        role: Role::Owner.into(),
        ..Principal::default()
    }
}

impl Log {
    async fn record(&self, records: Vec<AuditRecord>) {
        self.record_as(&fresh("audb"), records).await.unwrap();
    }

    async fn record_as(&self, batch_id: &str, records: Vec<AuditRecord>) -> Result<(), Error> {
        let request = RecordAuditRequest { batch_id: batch_id.into(), records };
        answer(AuditIntakeServiceClient::new(self.app.service()).record_audit(request).await).map(drop)
    }

    async fn list(&self, team: &str, request: ListAuditLogsRequest) -> Result<ListAuditLogsResponse, Error> {
        answer(AuditLogServiceClient::new(self.app.signed(Some(&owner(team)))).list_audit_logs(request).await)
    }

    /// Every entry that a request leaves, page by page.
    async fn all(&self, team: &str, request: ListAuditLogsRequest) -> Vec<AuditEntry> {
        let (mut entries, mut page_token) = (Vec::new(), String::new());
        loop {
            let page = self.list(team, ListAuditLogsRequest { page_token, ..request.clone() }).await.unwrap();
            assert!(page.entries.len() <= usize::try_from(request.page_size.unwrap_or(20)).unwrap());
            entries.extend(page.entries);
            match page.next_page_token {
                Some(next) => page_token = next,
                None => return entries,
            }
        }
    }

    async fn export(&self, team: &str, request: ExportAuditLogsRequest) -> Result<(String, String), Error> {
        let mut client = AuditLogServiceClient::new(self.app.signed(Some(&owner(team))));
        let mut pieces = answer(client.export_audit_logs(request).await)?;
        let (mut content_type, mut text) = (String::new(), Vec::new());
        while let Some(piece) = pieces.next().await {
            let piece = piece.map_err(|status| Error::from_status(&status))?;
            assert!(piece.data.len() < 80_000, "a piece is small");
            content_type.push_str(&piece.content_type);
            text.extend(piece.data);
        }
        Ok((content_type, String::from_utf8(text).unwrap()))
    }

    async fn run(&self, sql: &'static str) {
        let job = self.app.database.write(move |tx| async move {
            tx.execute_unprepared(sql).await?;
            Ok::<_, DbError>(())
        });
        job.await.unwrap();
    }

    async fn number(&self, sql: &'static str) -> i64 {
        let job = self.app.database.read(move |reader| async move {
            let row = reader.query_one_raw(Statement::from_string(reader.get_database_backend(), sql)).await?;
            Ok::<_, DbError>(row.unwrap().try_get("", "n")?)
        });
        job.await.unwrap()
    }

    async fn whole(&self) -> AuditReport {
        self.log.verify().await.unwrap().unwrap()
    }

    async fn fault(&self) -> String {
        self.log.verify().await.unwrap().unwrap_err().to_string()
    }

    /// Some blocks, each of one call, chained.
    async fn chained(&self, range: std::ops::Range<i64>) {
        for number in range {
            self.record(vec![call("team_a", START_MS + number * 1_000, &format!("req_{number}"))]).await;
        }
        self.log.chain().await.unwrap();
    }
}

fn call(team: &str, at_ms: i64, request_id: &str) -> AuditRecord {
    let call = AuditCall {
        method: "GET".into(),
        path: "/v1/products".into(),
        status: 200,
        duration_us: 1_500,
        ip: "203.0.113.9".into(),
        user_agent: "curl/8".into(),
        ..AuditCall::default()
    };
    AuditRecord {
        at_ms,
        team_id: team.into(),
        request_id: request_id.into(),
        actor_kind: "team_key".into(),
        actor_id: "key_1".into(),
        actor_name: "CI".into(),
        rpc: "/paperkey.catalog.v1.CatalogService/ListProducts".into(),
        call: Some(call),
        ..AuditRecord::default()
    }
}

fn change(team: &str, at_ms: i64, request_id: &str, resource: &str) -> AuditRecord {
    AuditRecord {
        at_ms,
        team_id: team.into(),
        request_id: request_id.into(),
        actor_kind: "team_key".into(),
        actor_id: "key_1".into(),
        rpc: "/paperkey.catalog.v1.CatalogService/CreateProduct".into(),
        resources: vec![resource.into()],
        ..AuditRecord::default()
    }
}

fn everything() -> ListAuditLogsRequest {
    ListAuditLogsRequest { page_size: Some(100), ..ListAuditLogsRequest::default() }
}

fn at_ms(entry: &AuditEntry) -> i64 {
    let time = entry.time.unwrap();
    time.seconds * 1_000 + i64::from(time.nanos / 1_000_000)
}

async fn a_change_of_this_service_is_in_the_log_of_its_team(database: Database) {
    let log = log_on(database);
    let registered = log.app.registered("ada@example.com").await;
    let (user, team) = (registered.user.unwrap().id, registered.team.unwrap().id);
    log.app.admin.set_tier(&log.app.tiers, &team, "pro").await.unwrap();
    log.app.run_once("audit relay").await;
    let entries = log.all(&team, everything()).await;
    let [tier, register] = entries.as_slice() else { panic!("{entries:?}") };
    let actor = register.actor.clone().unwrap();
    assert_eq!((actor.kind.as_str(), actor.id), ("account", Some(user.clone())));
    assert_eq!(actor.name.as_deref(), Some("ada@example.com"));
    assert_eq!(register.rpc.as_deref(), Some("paperkey.auth.v1.AuthService/Register"));
    assert!(register.resources.contains(&user) && register.resources.contains(&team));
    assert_eq!((register.status, register.request_id.as_deref()), (None, Some("req_test")));
    assert_eq!((tier.actor.clone().unwrap().kind.as_str(), tier.resources.as_slice()), ("operator", &[team][..]));
    assert_ne!(tier.id, register.id);
    assert_eq!(log.number("SELECT COUNT(*) AS n FROM audit_entries").await, 0, "they are in one place");
    log.app.run_once("auth/audit").await;
    assert_eq!((log.whole().await.records, log.whole().await.unchained), (2, 0));
}

async fn a_call_and_its_changes_are_one_entry(database: Database) {
    let log = log_on(database);
    let id = "req_01j00000000000000000000001";
    let mut unknown = call("team_a", START_MS, id);
    (unknown.actor_kind, unknown.actor_id, unknown.rpc) = ("anyone".into(), String::new(), String::new());
    log.record(vec![change("team_a", START_MS + 20, id, "prod_1"), change("team_a", START_MS + 30, id, "key_2")]).await;
    log.record(vec![unknown]).await;
    let entries = log.all("team_a", everything()).await;
    let [entry] = entries.as_slice() else { panic!("{entries:?}") };
    assert_eq!((entry.id.as_str(), at_ms(entry)), ("aud_01j00000000000000000000001", START_MS));
    assert_eq!(entry.resources, ["prod_1", "key_2"]);
    assert_eq!(entry.actor.clone().unwrap().id.as_deref(), Some("key_1"));
    assert_eq!(entry.rpc.as_deref(), Some("paperkey.catalog.v1.CatalogService/CreateProduct"));
    assert_eq!((entry.method.as_deref(), entry.status, entry.duration_ms), (Some("GET"), Some(200), Some(2)));
    assert_eq!((entry.code.as_deref(), entry.ip.as_deref()), (None, Some("203.0.113.9")));
    // The same words, much later: another matter.
    log.record(vec![change("team_a", START_MS + 40_000, id, "prod_9")]).await;
    let entries = log.all("team_a", everything()).await;
    assert_eq!(entries.iter().map(|entry| entry.status).collect::<Vec<_>>(), [None, Some(200)]);
}

async fn a_batch_that_comes_again_is_passed_over(database: Database) {
    let log = log_on(database);
    let records: Vec<_> =
        (0..20).map(|number| call("team_a", START_MS + number * 700, &format!("req_{number}"))).collect();
    let again = (0..8).map(|_| log.record_as("audb_same", records.clone()));
    assert!(join_all(again).await.into_iter().all(|outcome| outcome.is_ok()));
    assert_eq!(log.all("team_a", everything()).await.len(), 20);
    log.log.chain().await.unwrap();
    assert_eq!(log.whole().await.records, 20);
}

async fn what_is_no_batch_is_refused(database: Database) {
    let log = log_on(database);
    for id in ["a b", "", "audb_1'--"] {
        assert_eq!(reason(log.record_as(id, Vec::new()).await), Reason::ValidationFailed, "{id:?}");
    }
    let many = vec![AuditRecord::default(); 2_001];
    assert_eq!(reason(log.record_as("audb_many", many).await), Reason::ValidationFailed);
    // What stands in a record is cut to size, and never keeps a batch from being taken.
    let mut odd = call("te\0am", i64::MAX, "r\0");
    odd.call.as_mut().unwrap().path = "/".repeat(10_000);
    log.record_as("audb_odd", vec![odd, AuditRecord::default()]).await.unwrap();
    log.record_as("audb_none", Vec::new()).await.unwrap();
    assert_eq!(log.number("SELECT COUNT(*) AS n FROM audit_blocks").await, 2);
    let nobody = answer(
        AuditIntakeServiceClient::new(log.app.signed(Some(&owner("team_a"))))
            .record_audit(RecordAuditRequest { batch_id: "audb_1".into(), records: Vec::new() })
            .await,
    );
    assert_eq!(reason(nobody), Reason::ScopeInsufficient);
}

async fn a_filter_leaves_what_is_asked_for(database: Database) {
    let log = log_on(database);
    let mut refused = call("team_a", START_MS + 1_000, "req_2");
    (refused.actor_kind, refused.actor_id) = ("account".into(), "usr_9".into());
    let of_call = refused.call.as_mut().unwrap();
    (of_call.status, of_call.method, of_call.code) = (404, "DELETE".into(), "not_found".into());
    let records = vec![call("team_a", START_MS, "req_1"), refused, call("team_a", START_MS + 2_000, "req_3")];
    log.record(records).await;
    log.record(vec![change("team_a", START_MS + 5, "req_1", "key_7")]).await;
    let asked = |change: fn(&mut ListAuditLogsRequest)| {
        let mut request = ListAuditLogsRequest { page_size: Some(1), ..Default::default() };
        change(&mut request);
        let log = &log;
        async move {
            let entries = log.all("team_a", request).await;
            entries.into_iter().map(|entry| entry.request_id.unwrap()).collect::<Vec<_>>()
        }
    };
    assert_eq!(asked(|_| {}).await, ["req_3", "req_2", "req_1"]);
    assert_eq!(asked(|request| request.actor = "usr_9".into()).await, ["req_2"]);
    assert_eq!(asked(|request| request.actor = "team_key".into()).await, ["req_3", "req_1"]);
    assert_eq!(asked(|request| request.key = "key_7".into()).await, ["req_1"]);
    assert_eq!(asked(|request| request.key = "key_1".into()).await, ["req_3", "req_1"]);
    assert_eq!(asked(|request| request.method = "delete".into()).await, ["req_2"]);
    assert_eq!(asked(|request| request.method = "ListProducts".into()).await, ["req_3", "req_2", "req_1"]);
    assert_eq!(asked(|request| request.status = "4xx".into()).await, ["req_2"]);
    assert_eq!(asked(|request| request.status = "200".into()).await, ["req_3", "req_1"]);
    let time = |ms| Some(paperkey_kit::values::timestamp(ms));
    let mut request = ListAuditLogsRequest { since: time(START_MS + 1_000), ..everything() };
    assert_eq!(log.all("team_a", request.clone()).await.len(), 2);
    request.until = time(START_MS + 2_000);
    assert_eq!(log.all("team_a", request.clone()).await.len(), 1);
    request.until = request.since;
    assert_eq!(log.all("team_a", request).await.len(), 0);
    for bad in [
        ListAuditLogsRequest { status: "9xx".into(), ..everything() },
        ListAuditLogsRequest { page_token: "nonsense".into(), ..everything() },
        ListAuditLogsRequest { page_size: Some(0), ..everything() },
    ] {
        assert_eq!(reason(log.list("team_a", bad).await), Reason::ValidationFailed);
    }
}

/// What an entry is known by.
type Known = (i64, String, Option<i32>, Vec<String>);

fn known(entry: &AuditEntry) -> Known {
    (at_ms(entry), entry.request_id.clone().unwrap_or_default(), entry.status, entry.resources.clone())
}

/// The list as it would be made by somebody who has all records before them.
fn plain_list(records: &[AuditRecord]) -> Vec<Known> {
    let mut entries = Vec::new();
    for call in records.iter().filter(|record| record.call.is_some()) {
        let mut changes: Vec<_> =
            records.iter().filter(|change| change.call.is_none() && is_of(change, call)).collect();
        changes.sort_by_key(|change| change.at_ms);
        let resources = changes.iter().flat_map(|change| change.resources.clone()).collect();
        entries.push((call.at_ms, call.request_id.clone(), call.call.as_ref().map(|call| call.status), resources));
    }
    for change in records.iter().filter(|record| record.call.is_none()) {
        if !records.iter().any(|call| call.call.is_some() && is_of(change, call)) {
            entries.push((change.at_ms, change.request_id.clone(), None, change.resources.clone()));
        }
    }
    entries.sort();
    entries
}

fn is_of(change: &AuditRecord, call: &AuditRecord) -> bool {
    !change.request_id.is_empty()
        && change.request_id == call.request_id
        && (-5_000..=30_000).contains(&(change.at_ms - call.at_ms))
}

async fn pages_of_overlapping_blocks_are_those_of_a_plain_list(database: Database) {
    let log = log_on(database);
    let mut rng = StdRng::seed_from_u64(7);
    let (mut gateways, mut services) = (vec![Vec::new(); 3], vec![Vec::new(); 2]);
    for number in 0..700 {
        let at_ms = START_MS + rng.random_range(0..40_000);
        let (clock, _hand) = Clock::manual(at_ms);
        let request_id = new_id("req", &clock);
        let is_known = rng.random_range(0..10) > 0;
        if is_known {
            gateways[rng.random_range(0..3)].push(call("team_a", at_ms, &request_id));
        }
        for part in 0..rng.random_range(0..3) {
            // Some are made by a machine whose clock is behind, some late, some too late.
            let after_ms = [rng.random_range(-200..500), rng.random_range(0..30_000), rng.random_range(30_001..40_000)];
            let after_ms = after_ms[[0, 0, 0, 1, 2][rng.random_range(0..5)]];
            let request_id = if rng.random_range(0..20) == 0 { "" } else { &request_id };
            let resource = format!("prod_{number}_{part}");
            services[rng.random_range(0..2)].push(change("team_a", at_ms + after_ms, request_id, &resource));
        }
    }
    let mut all = Vec::new();
    for mut records in gateways.into_iter().chain(services) {
        records.sort_by_key(|record| record.at_ms);
        all.extend(records.clone());
        let mut rest = records.as_slice();
        while !rest.is_empty() {
            let (batch, others) = rest.split_at(rng.random_range(1..=rest.len().min(40)));
            rest = others;
            log.record(batch.to_vec()).await;
        }
    }
    // And others, who must not be in it.
    log.record((0..50).map(|number| call("team_b", START_MS + number * 500, "req_b")).collect()).await;
    let expected = plain_list(&all);
    for page_size in [3, 50, 100] {
        let entries = log.all("team_a", ListAuditLogsRequest { page_size: Some(page_size), ..everything() }).await;
        assert!(entries.is_sorted_by(|one, other| (at_ms(one), &one.id) > (at_ms(other), &other.id)), "newest first");
        let mut found: Vec<_> = entries.iter().map(known).collect();
        found.sort();
        assert_eq!(found, expected, "in pages of {page_size}");
    }
    let (since, until) = (START_MS + 11_111, START_MS + 22_222);
    let time = |ms| Some(paperkey_kit::values::timestamp(ms));
    let entries =
        log.all("team_a", ListAuditLogsRequest { since: time(since), until: time(until), ..everything() }).await;
    let mut found: Vec<_> = entries.iter().map(known).collect();
    found.sort();
    let expected: Vec<_> = expected.into_iter().filter(|(at_ms, ..)| (since..until).contains(at_ms)).collect();
    assert_eq!(found, expected);
}

async fn a_crowded_millisecond_is_read_whole(database: Database) {
    let log = log_on(database);
    // More blocks at one moment than are read at once.
    for number in 0..150 {
        log.record(vec![call("team_a", START_MS, &format!("req_{number:03}"))]).await;
    }
    log.record(vec![call("team_a", START_MS - 1, "req_older"), call("team_a", START_MS + 1, "req_newer")]).await;
    let entries = log.all("team_a", ListAuditLogsRequest { page_size: Some(7), ..everything() }).await;
    let ids: HashSet<_> = entries.iter().map(|entry| entry.id.clone()).collect();
    assert_eq!((entries.len(), ids.len()), (152, 152));
    assert_eq!(entries[0].request_id.as_deref(), Some("req_newer"));
    assert_eq!(entries[151].request_id.as_deref(), Some("req_older"));
}

async fn nobody_reads_the_log_of_another_team(database: Database) {
    let log = log_on(database);
    log.record(vec![call("team_a", START_MS, "req_1"), call("", START_MS, "req_2")]).await;
    assert_eq!(log.all("team_a", everything()).await.len(), 1);
    assert_eq!(log.all("team_b", everything()).await.len(), 0);
    let named = ListAuditLogsRequest { team_id: "team_a".into(), ..everything() };
    assert_eq!(log.all("team_a", named.clone()).await.len(), 1);
    let foreign = (Reason::NotFound, "No such team".to_owned());
    assert_eq!(refusal(log.list("team_b", named).await), foreign);
    let export = ExportAuditLogsRequest { team_id: "team_a".into(), format: "csv".into(), ..Default::default() };
    assert_eq!(refusal(log.export("team_b", export).await), foreign);
    let member = Principal { role: Role::Member.into(), ..owner("team_a") };
    let refused = AuditLogServiceClient::new(log.app.signed(Some(&member))).list_audit_logs(everything()).await;
    assert_eq!(reason(answer(refused)), Reason::RoleInsufficient);
}

async fn an_export_holds_what_the_list_shows(database: Database) {
    let log = log_on(database);
    let mut formula = call("team_a", START_MS, "req_0");
    formula.call.as_mut().unwrap().user_agent = "=HYPERLINK(\"http://evil.example\",\"x\")".into();
    log.record(vec![formula, change("team_a", START_MS, "", "prod_1")]).await;
    for number in 1..20 {
        let records = (0..200).map(|part| call("team_a", START_MS + number * 1_000 + part, "req_same")).collect();
        log.record(records).await;
    }
    let listed = log.all("team_a", everything()).await;
    assert_eq!(listed.len(), 19 * 200 + 2);
    let export = |format: &str| ExportAuditLogsRequest { format: format.into(), ..Default::default() };

    let (content_type, text) = log.export("team_a", export("ndjson")).await.unwrap();
    assert_eq!(content_type, "application/x-ndjson");
    let lines: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), listed.len());
    for (line, entry) in lines.iter().zip(&listed) {
        assert_eq!(
            (line["id"].as_str(), line["requestId"].as_str()),
            (Some(entry.id.as_str()), entry.request_id.as_deref())
        );
    }
    assert_eq!(lines[0]["time"], "2023-11-14T22:13:39.199Z");
    assert_eq!((&lines[0]["durationMs"], &lines[0]["actor"]["name"]), (&2.into(), &"CI".into()));
    assert!(lines.last().unwrap()["status"].is_null() || lines[lines.len() - 2]["status"].is_null());

    let (content_type, text) = log.export("team_a", export("csv")).await.unwrap();
    assert_eq!(content_type, "text/csv; charset=utf-8");
    let mut rows = text.split_terminator("\r\n");
    assert!(rows.next().unwrap().starts_with("id,time,actorKind,"));
    let rows: Vec<_> = rows.collect();
    assert_eq!(rows.len(), listed.len());
    for (row, entry) in rows.iter().zip(&listed) {
        assert!(row.starts_with(&entry.id), "{row}");
    }
    assert!(text.contains(",\"'=HYPERLINK(\"\"http://evil.example\"\",\"\"x\"\")\","), "no formula");
    let filtered = ExportAuditLogsRequest { key: "prod_1".into(), ..export("csv") };
    assert_eq!(log.export("team_a", filtered).await.unwrap().1.lines().count(), 2);
    assert_eq!(reason(log.export("team_a", export("xlsx")).await), Reason::ValidationFailed);
    assert_eq!(log.export("team_b", export("csv")).await.unwrap().1.lines().count(), 1, "a head without rows");
}

async fn a_whole_log_is_found_whole(database: Database) {
    let log = log_on(database);
    assert_eq!(log.whole().await, AuditReport::default(), "there is none yet");
    log.chained(0..300).await;
    log.record(vec![call("team_b", START_MS, "req_b"), call("team_a", START_MS - 1, "req_a")]).await;
    let report = log.whole().await;
    let expected = AuditReport {
        records: 302,
        blocks: 300,
        unchained: 2,
        first_ms: Some(START_MS - 1),
        last_ms: Some(START_MS + 299_000),
        has_witness: true,
    };
    assert_eq!(report, expected);
}

async fn every_way_to_touch_a_log_is_found(database: Database) {
    let log = log_on(database);
    log.chained(0..10).await;
    log.record(vec![call("team_a", START_MS + 60_000, "req_new")]).await;
    log.run("CREATE TABLE kept_blocks AS SELECT * FROM audit_blocks").await;
    log.run("CREATE TABLE kept_head AS SELECT * FROM audit_head").await;
    let block_5 = "block 5 (records of 2023-11-14T22:13:24.000Z to 2023-11-14T22:13:24.000Z) was changed";
    let not_chained_there = "is not the one that was chained there";
    let cases = [
        (
            "UPDATE audit_blocks SET payload = (SELECT payload FROM kept_blocks WHERE chain_no = 6) WHERE chain_no = 5",
            block_5,
        ),
        ("UPDATE audit_blocks SET team_id = 'team_b' WHERE chain_no = 5", block_5),
        ("UPDATE audit_blocks SET id = 'audb_other' WHERE chain_no = 5", block_5),
        ("UPDATE audit_blocks SET records = 0 WHERE chain_no = 5", block_5),
        ("UPDATE audit_blocks SET changes = NOT changes WHERE chain_no = 5", block_5),
        (
            "UPDATE audit_blocks SET last_ms = last_ms + 1 WHERE chain_no = 5",
            "block 5 (records of 2023-11-14T22:13:24.000Z to 2023-11-14T22:13:24.001Z) was changed",
        ),
        (
            "UPDATE audit_blocks SET seal = (SELECT seal FROM kept_blocks WHERE chain_no = 6) WHERE chain_no = 5",
            "block 5",
        ),
        ("DELETE FROM audit_blocks WHERE chain_no = 5", "block 5 is gone, after records of 2023-11-14T22:13:23.000Z"),
        ("DELETE FROM audit_blocks WHERE chain_no = 1", "block 1 is gone"),
        ("UPDATE audit_blocks SET chain_no = NULL, mac = NULL WHERE chain_no = 5", "block 5 is gone"),
        ("DELETE FROM audit_blocks WHERE chain_no = 10", "block 10 is gone, after"),
        ("DELETE FROM audit_blocks", "block 1 is gone"),
        (
            "UPDATE audit_blocks SET chain_no = -1 WHERE chain_no = 5; \
             UPDATE audit_blocks SET chain_no = 5 WHERE chain_no = 6; \
             UPDATE audit_blocks SET chain_no = 6 WHERE chain_no = -1",
            not_chained_there,
        ),
        // With the links swapped as well.
        (
            "UPDATE audit_blocks SET chain_no = NULL WHERE chain_no IN (5, 6); \
             UPDATE audit_blocks SET chain_no = 6, mac = (SELECT mac FROM kept_blocks WHERE chain_no = 6) \
             WHERE seq = (SELECT seq FROM kept_blocks WHERE chain_no = 5); \
             UPDATE audit_blocks SET chain_no = 5, mac = (SELECT mac FROM kept_blocks WHERE chain_no = 5) \
             WHERE seq = (SELECT seq FROM kept_blocks WHERE chain_no = 6)",
            not_chained_there,
        ),
        (
            "UPDATE audit_blocks SET chain_no = 11, mac = (SELECT mac FROM kept_blocks WHERE chain_no = 10) \
             WHERE chain_no IS NULL",
            "block 11 stands behind the end of the log, which is block 10",
        ),
        (
            "UPDATE audit_blocks SET chain_no = 0, mac = (SELECT mac FROM kept_blocks WHERE chain_no = 10) \
             WHERE chain_no IS NULL",
            "block 0 stands there",
        ),
        ("UPDATE audit_blocks SET team_id = 'team_b' WHERE chain_no IS NULL", "which is not chained yet,"),
        (
            "INSERT INTO audit_blocks (seq, id, team_id, changes, first_ms, last_ms, records, payload, seal) \
             SELECT 1000, 'audb_forged.0', team_id, changes, first_ms, last_ms, records, payload, seal \
             FROM kept_blocks WHERE chain_no = 5",
            "block audb_forged.0, which is not chained yet,",
        ),
        ("UPDATE audit_head SET chain_no = 9", "the head of the log is not signed by this installation"),
        ("UPDATE audit_head SET pruned_no = 9", "the checkpoint at block 9"),
        (
            "UPDATE audit_head SET pruned_no = chain_no, pruned_mac = mac, pruned_signature = signature; \
             DELETE FROM audit_blocks",
            "the checkpoint at block 10",
        ),
        ("DELETE FROM audit_head", "the head of the log is gone, and there are blocks in its chain"),
        ("DELETE FROM audit_head; DELETE FROM audit_blocks", "the whole log is gone"),
    ];
    for (touch, expected) in cases {
        log.run(touch).await;
        let fault = log.fault().await;
        assert!(fault.contains(expected), "{touch}\n{fault}");
        log.run("DELETE FROM audit_blocks").await;
        log.run("INSERT INTO audit_blocks SELECT * FROM kept_blocks").await;
        log.run("DELETE FROM audit_head").await;
        log.run("INSERT INTO audit_head SELECT * FROM kept_head").await;
        assert_eq!(log.whole().await.blocks, 10, "as it was before");
    }
    let file = log.app.kept.path().join("audit-head");
    let text = fs::read_to_string(&file).unwrap();
    fs::write(&file, text.replace("v1 10", "v1 11")).unwrap();
    assert!(log.fault().await.contains("is not as it was written"));
    fs::remove_file(&file).unwrap();
    match log.app.database.engine() {
        Engine::Sqlite => assert!(log.fault().await.contains("is gone, which says where the log ends")),
        // There it may lie on another machine.
        Engine::Postgres => assert!(!log.whole().await.has_witness),
    }
}

async fn an_end_that_was_cut_off_is_known_to_the_file(database: Database) {
    let log = log_on(database);
    log.chained(0..5).await;
    log.run("CREATE TABLE kept_head AS SELECT * FROM audit_head").await;
    log.chained(5..8).await;
    // An older head, which was once signed by us.
    log.run("DELETE FROM audit_blocks WHERE chain_no > 5").await;
    log.run("DELETE FROM audit_head").await;
    log.run("INSERT INTO audit_head SELECT * FROM kept_head").await;
    let fault = log.fault().await;
    let expected = "the end of the log is cut off after block 5, after records of 2023-11-14T22:13:24.000Z";
    assert!(fault.starts_with(expected) && fault.ends_with("knows of 8 blocks"), "{fault}");
}

async fn what_is_written_after_a_cut_does_not_hide_it(database: Database) {
    let log = log_on(database);
    log.chained(0..5).await;
    log.run("CREATE TABLE kept_head AS SELECT * FROM audit_head").await;
    log.chained(5..8).await;
    log.run("DELETE FROM audit_blocks WHERE chain_no > 5").await;
    log.run("DELETE FROM audit_head").await;
    log.run("INSERT INTO audit_head SELECT * FROM kept_head").await;
    for number in 10..20 {
        log.record(vec![call("team_a", START_MS + number * 1_000, "req_new")]).await;
    }
    // It goes on, since entries must be kept, and says so.
    assert_eq!(reason(log.log.chain().await), Reason::Internal);
    log.app.run_once("auth/audit").await;
    let fault = log.fault().await;
    assert!(
        fault.starts_with("block 8, after records of") && fault.contains("was cut off and written anew"),
        "{fault}"
    );
}

async fn old_blocks_are_removed_and_a_forged_checkpoint_is_found(database: Database) {
    let log = log_on(database);
    log.chained(0..450).await;
    let now_ms = log.app.database.clock().now_ms();
    log.record(vec![call("team_a", now_ms, "req_young")]).await;
    // It came late, and stands behind one that is younger.
    log.record(vec![call("team_a", START_MS, "req_late")]).await;
    assert_eq!(log.log.prune(1).await.unwrap(), 450, "what is not chained stays");
    log.log.chain().await.unwrap();
    assert_eq!(log.log.prune(1).await.unwrap(), 0);
    let report = log.whole().await;
    assert_eq!((report.records, report.blocks, report.unchained), (2, 2, 0));
    assert_eq!(log.all("team_a", everything()).await.len(), 2);
    log.chained(500..510).await;
    assert_eq!(log.whole().await.blocks, 12);

    log.run("CREATE TABLE kept_head AS SELECT * FROM audit_head").await;
    log.run("CREATE TABLE kept_blocks AS SELECT * FROM audit_blocks").await;
    let forged = "UPDATE audit_head SET pruned_no = 452, \
                  pruned_mac = (SELECT mac FROM kept_blocks WHERE chain_no = 452); \
                  DELETE FROM audit_blocks WHERE chain_no <= 452";
    log.run(forged).await;
    assert!(log.fault().await.contains("the checkpoint at block 452"));
    assert_eq!(log.log.prune(1).await.unwrap(), 0, "nothing is made of a forged one");
    assert_eq!(reason(log.log.chain().await), Reason::Internal);
    log.run("DELETE FROM audit_head").await;
    log.run("INSERT INTO audit_head SELECT * FROM kept_head").await;
    assert!(log.fault().await.starts_with("block 451 is gone"));
}

async fn a_block_that_was_touched_is_not_removed_and_is_found(database: Database) {
    let log = log_on(database);
    log.chained(0..5).await;
    let now_ms = log.app.database.clock().now_ms();
    for number in 0..3 {
        log.record(vec![call("team_a", now_ms - number, "req_young")]).await;
    }
    log.log.chain().await.unwrap();
    log.run("CREATE TABLE kept_blocks AS SELECT * FROM audit_blocks").await;
    for (touch, expected) in [
        // Young ones are made old, so that they are removed and signed for.
        ("UPDATE audit_blocks SET first_ms = 0, last_ms = 0 WHERE chain_no > 5", "block 6 "),
        ("UPDATE audit_blocks SET first_ms = 0, last_ms = 0", "block 1 "),
        (
            "UPDATE audit_blocks SET mac = (SELECT mac FROM kept_blocks WHERE chain_no = 8) WHERE chain_no = 3",
            "block 3 ",
        ),
        (
            "UPDATE audit_blocks SET seal = (SELECT seal FROM kept_blocks WHERE chain_no = 8) WHERE chain_no = 3",
            "block 3 ",
        ),
        ("UPDATE audit_blocks SET payload = seal WHERE chain_no = 5", "block 5 "),
        ("DELETE FROM audit_blocks WHERE chain_no = 2", "block 2 is gone"),
        ("DELETE FROM audit_blocks WHERE chain_no = 1", "block 1 is gone"),
    ] {
        log.run(touch).await;
        let before = log.number("SELECT COUNT(*) AS n FROM audit_blocks").await;
        assert_eq!(reason(log.log.prune(1).await), Reason::Internal, "{touch}");
        assert_eq!(log.number("SELECT COUNT(*) AS n FROM audit_blocks").await, before, "{touch}");
        let fault = log.fault().await;
        assert!(fault.starts_with(expected), "{touch}\n{fault}");
        log.run("DELETE FROM audit_blocks").await;
        log.run("INSERT INTO audit_blocks SELECT * FROM kept_blocks").await;
    }
    assert_eq!(log.log.prune(1).await.unwrap(), 5);
    assert_eq!(log.whole().await.blocks, 3);
}

async fn of_many_who_chain_there_is_one_chain(database: Database) {
    let log = Arc::new(log_on(database));
    let writers = (0..4).map(|writer| {
        let log = Arc::clone(&log);
        tokio::spawn(async move {
            for number in 0..40 {
                log.record(vec![call(&format!("team_{writer}"), START_MS + number, "req_1")]).await;
            }
        })
    });
    let chainers = (0..4).map(|_| {
        let log = Arc::clone(&log);
        tokio::spawn(async move {
            let mut chained = 0;
            for _ in 0..30 {
                chained += log.log.chain().await.unwrap();
            }
            // Whoever looks meanwhile finds it whole.
            log.whole().await;
            chained
        })
    });
    let (written, chained) = tokio::join!(join_all(writers), join_all(chainers));
    assert!(written.into_iter().all(|outcome| outcome.is_ok()));
    let by_each: Vec<u64> = chained.into_iter().map(Result::unwrap).collect();
    let rest = log.log.chain().await.unwrap();
    let report = log.whole().await;
    assert_eq!((report.blocks, report.unchained), (160, 0));
    assert_eq!(by_each.iter().sum::<u64>() + rest, 160, "{by_each:?}");
}

/// What somebody does who has the disk and not the database.
#[tokio::test(flavor = "multi_thread")]
async fn a_byte_that_was_changed_in_the_file_of_the_database_is_found() {
    let db = TestDb::sqlite();
    let DatabaseUrl::Sqlite { folder } = db.options().url else { panic!("it is a folder") };
    let log = log_on(db.migrated::<paperkey_migrations::auth::Migrator>().await);
    let records = (0..10).map(|number| call("team_a", START_MS + number, &format!("req_{number}"))).collect();
    log.record(records).await;
    log.chained(1..5).await;
    let payload: Vec<u8> = {
        let job = log.app.database.read(|reader| async move {
            let sql = "SELECT payload FROM audit_blocks WHERE chain_no = 1";
            let row = reader.query_one_raw(Statement::from_string(reader.get_database_backend(), sql)).await?;
            Ok::<_, DbError>(row.unwrap().try_get("", "payload")?)
        });
        job.await.unwrap()
    };
    let kept = log.app.kept.path().to_owned();
    let Log { app, log: _ } = log;
    let head = fs::read(kept.join("audit-head")).unwrap();
    app.database.clone().close().await;
    drop(app);
    fs::create_dir_all(&kept).unwrap();
    fs::write(kept.join("audit-head"), head).unwrap();

    let path = folder.join("test.db");
    let mut bytes = fs::read(&path).unwrap();
    let part = &payload[payload.len() - 40..];
    let at = bytes.windows(part.len()).position(|window| window == part).unwrap();
    bytes[at + 20] ^= 1;
    fs::write(&path, bytes).unwrap();
    let reopened = AuditLog::new(db.open().await, &Keyring::for_tests(), &kept);
    let fault: AuditFault = reopened.verify().await.unwrap().unwrap_err();
    assert!(fault.to_string().starts_with("block 1 (records of 2023-11-14T22:13:20.000Z"), "{fault}");
    fs::remove_dir_all(kept).unwrap();
}

#[test]
fn entries_are_known_by_what_they_are() {
    let records = [call("team_a", 10, "req_1"), change("team_a", 12, "req_1", "prod_1"), change("team_a", 5, "", "x")];
    let expected: BTreeMap<i64, usize> = [(5, 1), (10, 1)].into();
    let list = plain_list(&records);
    let counted = list.iter().fold(BTreeMap::new(), |mut count, (at_ms, ..)| {
        *count.entry(*at_ms).or_insert(0) += 1;
        count
    });
    assert_eq!(counted, expected);
}
