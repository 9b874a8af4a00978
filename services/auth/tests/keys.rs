//! The whole life of keys, raced for and asked for in nonsense: the same on SQLite and on PostgreSQL.

#[expect(dead_code, reason = "the other tests of this crate use the rest")]
mod common;

use std::sync::Arc;

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use common::{App, Signed, answer, fresh, reason, refusal};
use futures_util::future::join_all;
use paperkey_kit::{
    db::{Database, DbError},
    secrets::{Keyring, Purpose, Secret},
    store_suite,
    token::TokenKind,
    values::{time_ms, timestamp},
};
use paperkey_proto::{
    Error,
    auth::v1::{
        ApiKey, ApiKeyKind, ApiKeyScope, ApiKeyStatus, CreateApiKeyRequest, CreatePlatformApiKeyRequest,
        CreateTemporaryApiKeyRequest, CreateTestApiKeyRequest, GetApiKeyRequest, GetCurrentApiKeyRequest,
        GetCurrentApiKeyResponse, KeyUse, ListApiKeysRequest, RecordKeyUsesRequest, ReportLeakedApiKeysRequest,
        RevokeApiKeyRequest, RevokeApiKeyResponse, RotateApiKeyRequest, RotateCurrentApiKeyRequest,
        UpdateApiKeyRequest, api_key_service_client::ApiKeyServiceClient,
        credential_service_client::CredentialServiceClient,
    },
    errors::v1::Reason,
    events::v1::Event,
    options::v1::Caller,
    principal::v1::{Mode, Principal, Role},
};
use prost::Message as _;
use prost_types::FieldMask;
use sea_orm::{ConnectionTrait as _, Statement};
use serde_json::Value;

store_suite! {
    paperkey_migrations::auth::Migrator;
    of_twenty_new_keys_beside_five_exactly_five_are_made,
    what_does_not_count_is_made_beside_ten,
    of_twenty_rotations_one_makes_a_key_also_at_ten,
    twenty_rotations_by_the_old_token_leave_one_successor,
    keys_that_were_rotated_one_into_the_next_name_the_first,
    a_lost_answer_is_made_good_until_the_new_token_is_used,
    what_a_person_put_in_the_place_of_a_key_stays,
    what_a_credential_said_a_moment_ago_does_not_count,
    of_twenty_new_tokens_beside_45_exactly_five_are_made,
    a_call_in_test_mode_makes_no_live_key,
    a_rotation_takes_everything_over,
    a_rotation_with_no_overlap_ends_the_old_token_at_once,
    a_key_makes_only_what_lies_within_itself,
    a_test_key_ends_within_a_day_however_it_is_made_or_changed,
    a_key_rotates_only_what_lies_within_itself,
    a_users_token_shrinks_with_the_role_and_ends_with_the_membership,
    an_admin_does_not_touch_the_token_of_an_owner,
    what_is_changed_counts_at_once,
    a_key_that_has_ended_does_not_change,
    a_revocation_stays_as_it_was,
    a_test_call_sees_no_live_key,
    a_foreign_key_is_not_there,
    a_sandbox_has_one_key_and_a_team_of_its_own,
    what_belongs_to_a_deleted_team_is_dead,
    a_token_is_found_under_the_pepper_before,
    a_leaked_token_is_revoked_or_told_of_and_no_answer_says_which,
    uses_are_written_to_the_minute_and_only_forward,
    a_key_tells_about_itself,
    what_happens_to_keys_is_told_and_audited,
    nonsense_is_refused_by_its_field,
    no_answer_prints_a_token,
    a_temporary_key_is_a_test_key_of_an_hour,
    temporary_keys_and_the_ten_are_counted_apart_also_in_a_race,
    a_temporary_key_is_neither_extended_nor_rotated_and_makes_no_other,
    owners_and_admins_make_temporary_keys_and_nobody_else,
    a_temporary_key_that_has_ended_is_listed_for_a_day,
}

const HOUR_MS: i64 = 60 * 60 * 1_000;
const DAY_MS: i64 = 24 * HOUR_MS;

/// A team whose owner has signed in. Two services on one database are two processes.
struct Team {
    app: Arc<App>,
    other: Arc<App>,
    owner: Principal,
    id: String,
    live_key: String,
    free_key: String,
}

/// A key with its token.
struct Made {
    key: ApiKey,
    token: String,
}

async fn team(database: Database) -> Team {
    let (app, other) = (Arc::new(App::new(database.clone())), Arc::new(App::new(database)));
    let registered = app.registered("ada@example.com").await;
    let owner = app.authenticate(&registered.token).await.unwrap();
    let (live_key, free_key) = (registered.live_key.clone(), registered.free_key.clone());
    Team { id: owner.team_id.clone(), app, other, owner, live_key, free_key }
}

fn named(name: &str) -> CreateApiKeyRequest {
    CreateApiKeyRequest { name: name.to_owned(), ..CreateApiKeyRequest::default() }
}

fn of_user() -> CreateApiKeyRequest {
    CreateApiKeyRequest { kind: ApiKeyKind::UserToken.into(), ..named("Laptop") }
}

fn wished(name: &str, mode: Mode) -> CreatePlatformApiKeyRequest {
    CreatePlatformApiKeyRequest { name: name.to_owned(), r#type: mode.into(), ..CreatePlatformApiKeyRequest::default() }
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

#[expect(clippy::unnecessary_wraps, reason = "requests hold it so")]
fn at(ms: i64) -> Option<prost_types::Timestamp> {
    Some(timestamp(ms))
}

fn ms(time: Option<prost_types::Timestamp>) -> Option<i64> {
    time.map(|time| time_ms("time", &time).unwrap())
}

impl Team {
    fn now_ms(&self) -> i64 {
        self.app.database.clock().now_ms()
    }

    async fn whose(&self, token: &str) -> Principal {
        self.app.authenticate(token).await.unwrap()
    }

    async fn is_refused(&self, token: &str) -> bool {
        matches!(self.app.authenticate(token).await, Err(error) if error.reason() == Reason::InvalidCredentials)
    }

    async fn key(&self, name: &str) -> Made {
        create(&self.app, &self.owner, named(name)).await.unwrap()
    }

    /// Fills the team up to so many active keys. One is there since the registration.
    async fn filled_to(&self, count: usize) -> Vec<Made> {
        let mut made = Vec::new();
        for number in 1..count {
            made.push(self.key(&format!("Key {number}")).await);
        }
        made
    }

    async fn list(&self, principal: &Principal) -> Vec<ApiKey> {
        let request = ListApiKeysRequest { page_size: Some(100), ..ListApiKeysRequest::default() };
        answer(client(&self.app, Some(principal)).list_api_keys(request).await).unwrap().api_keys
    }

    async fn get(&self, principal: &Principal, id: &str) -> Result<ApiKey, Error> {
        let request = GetApiKeyRequest { key_id: id.to_owned(), ..GetApiKeyRequest::default() };
        let got = answer(client(&self.app, Some(principal)).get_api_key(request).await)?;
        Ok(got.api_key.unwrap())
    }

    async fn run(&self, sql: String) {
        let job = self.app.database.write(|tx| async move {
            tx.execute_unprepared(&sql).await?;
            Ok::<_, DbError>(())
        });
        job.await.unwrap();
    }

    /// Makes another account a member of this team.
    async fn joined(&self, email: &str, role: &str) -> Principal {
        let registered = self.app.registered(email).await;
        let user = registered.user.unwrap().id;
        let (team, now_ms) = (&self.id, self.now_ms());
        self.run(format!(
            "INSERT INTO memberships (team_id, user_id, role, created_at_ms) VALUES ('{team}', '{user}', '{role}', {now_ms})"
        ))
        .await;
        self.app.authenticate_in(&registered.token, &self.id, Mode::Live).await.unwrap()
    }

    /// What was written down of a method: the resources of each entry.
    async fn audited(&self, method: &str) -> Vec<String> {
        let sql = format!("SELECT resources FROM audit_entries WHERE action LIKE '%/{method}' ORDER BY id");
        let job = self.app.database.read(|reader| async move {
            let statement = Statement::from_string(reader.get_database_backend(), sql);
            Ok::<_, DbError>(reader.query_all_raw(statement).await?)
        });
        job.await.unwrap().iter().map(|row| row.try_get("", "resources").unwrap()).collect()
    }

    async fn events(&self) -> Vec<Event> {
        let job = self.app.database.read(|reader| async move {
            let sql = "SELECT id, payload FROM outbox WHERE target = 'webhook' ORDER BY seq";
            let statement = Statement::from_string(reader.get_database_backend(), sql);
            let rows = reader.query_all_raw(statement).await?;
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
}

fn client(app: &App, principal: Option<&Principal>) -> ApiKeyServiceClient<Signed> {
    ApiKeyServiceClient::new(app.signed(principal))
}

async fn create(app: &App, principal: &Principal, request: CreateApiKeyRequest) -> Result<Made, Error> {
    let made = answer(client(app, Some(principal)).create_api_key(request).await)?;
    Ok(Made { key: made.api_key.unwrap(), token: made.key })
}

async fn try_out(app: &App, principal: &Principal) -> Result<Made, Error> {
    let request = CreateTemporaryApiKeyRequest::default();
    let made = answer(client(app, Some(principal)).create_temporary_api_key(request).await)?;
    Ok(Made { key: made.api_key.unwrap(), token: made.key })
}

async fn make(app: &App, maker: &Principal, request: CreatePlatformApiKeyRequest) -> Result<Made, Error> {
    let made = answer(client(app, Some(maker)).create_platform_api_key(request).await)?;
    Ok(Made { key: made.api_key.unwrap(), token: made.key })
}

async fn update(app: &App, principal: &Principal, request: UpdateApiKeyRequest) -> Result<ApiKey, Error> {
    Ok(answer(client(app, Some(principal)).update_api_key(request).await)?.api_key.unwrap())
}

async fn rotate(app: &App, principal: &Principal, id: &str, hours: Option<i32>) -> Result<(Made, Option<i64>), Error> {
    let request = RotateApiKeyRequest { key_id: id.to_owned(), overlap_hours: hours, ..RotateApiKeyRequest::default() };
    let made = answer(client(app, Some(principal)).rotate_api_key(request).await)?;
    Ok((Made { key: made.api_key.unwrap(), token: made.key }, ms(made.old_key_expires_at)))
}

async fn rotate_self(app: &App, principal: &Principal, hours: Option<i32>) -> Result<(Made, Option<i64>), Error> {
    let request = RotateCurrentApiKeyRequest { overlap_hours: hours };
    let made = answer(client(app, Some(principal)).rotate_current_api_key(request).await)?;
    Ok((Made { key: made.api_key.unwrap(), token: made.key }, ms(made.old_key_expires_at)))
}

async fn revoke(app: &App, principal: &Principal, id: &str) -> Result<RevokeApiKeyResponse, Error> {
    let request = RevokeApiKeyRequest { key_id: id.to_owned(), ..RevokeApiKeyRequest::default() };
    answer(client(app, Some(principal)).revoke_api_key(request).await)
}

async fn me(app: &App, principal: &Principal) -> Result<GetCurrentApiKeyResponse, Error> {
    answer(client(app, Some(principal)).get_current_api_key(GetCurrentApiKeyRequest {}).await)
}

async fn report(app: &App, tokens: Vec<String>) -> Result<i32, Error> {
    let request = ReportLeakedApiKeysRequest { tokens };
    Ok(answer(client(app, None).report_leaked_api_keys(request).await)?.received)
}

fn patch(id: &str, paths: &[&str]) -> UpdateApiKeyRequest {
    UpdateApiKeyRequest {
        key_id: id.to_owned(),
        update_mask: Some(FieldMask { paths: words(paths) }),
        ..UpdateApiKeyRequest::default()
    }
}

fn field<T>(outcome: Result<T, Error>) -> String {
    match outcome {
        Ok(_) => panic!("it was not refused"),
        Err(error) => {
            assert_eq!(error.reason(), Reason::ValidationFailed, "{error}");
            error.violations().first().map(|violation| violation.field.clone()).unwrap_or_default()
        }
    }
}

async fn of_twenty_new_keys_beside_five_exactly_five_are_made(database: Database) {
    let team = team(database).await;
    let made = team.filled_to(5).await;
    // One that is refused for now counts; one of test mode, too.
    update(
        &team.app,
        &team.owner,
        UpdateApiKeyRequest { enabled: Some(false), ..patch(&made[0].key.id, &["enabled"]) },
    )
    .await
    .unwrap();
    let racers = (0..20).map(|number| {
        let app = Arc::clone(if number % 2 == 0 { &team.app } else { &team.other });
        let (owner, mode) = (team.owner.clone(), if number % 3 == 0 { Mode::Test } else { Mode::Live });
        tokio::spawn(
            async move { create(&app, &owner, CreateApiKeyRequest { mode: mode.into(), ..named("Race") }).await },
        )
    });
    let outcomes: Vec<_> = join_all(racers).await.into_iter().map(Result::unwrap).collect();
    let (made, refused): (Vec<_>, Vec<_>) = outcomes.into_iter().partition(Result::is_ok);
    assert_eq!(made.len(), 5);
    for refused in refused {
        assert_eq!(reason(refused), Reason::KeyLimitReached);
    }
    let maker = team.whose(&team.live_key).await;
    assert_eq!(reason(make(&team.app, &maker, wished("One more", Mode::Live)).await), Reason::KeyLimitReached);
    revoke(&team.app, &team.owner, &made[0].as_ref().unwrap().key.id).await.unwrap();
    assert!(make(&team.app, &maker, wished("In its place", Mode::Live)).await.is_ok());
}

async fn what_does_not_count_is_made_beside_ten(database: Database) {
    let team = team(database).await;
    team.filled_to(10).await;
    assert_eq!(reason(create(&team.app, &team.owner, named("Eleventh")).await), Reason::KeyLimitReached);
    for _ in 0..3 {
        create(&team.app, &team.owner, of_user()).await.unwrap();
    }
    let (_, end_ms) = rotate_self(&team.app, &team.whose(&team.live_key).await, Some(168)).await.unwrap();
    assert!(end_ms.is_some());
    assert_eq!(reason(create(&team.app, &team.owner, named("Eleventh")).await), Reason::KeyLimitReached);
    assert_eq!(team.list(&team.owner).await.len(), 15, "ten, the free key, three tokens, and an old half");
}

async fn of_twenty_rotations_one_makes_a_key_also_at_ten(database: Database) {
    let team = team(database).await;
    let old = team.filled_to(10).await.pop().unwrap();
    let racers = (0..20).map(|number| {
        let app = Arc::clone(if number % 2 == 0 { &team.app } else { &team.other });
        let (owner, id) = (team.owner.clone(), old.key.id.clone());
        tokio::spawn(async move { rotate(&app, &owner, &id, None).await })
    });
    let outcomes: Vec<_> = join_all(racers).await.into_iter().map(Result::unwrap).collect();
    let (made, refused): (Vec<_>, Vec<_>) = outcomes.into_iter().partition(Result::is_ok);
    assert_eq!(made.len(), 1);
    for refused in refused {
        assert_eq!(reason(refused), Reason::Conflict);
    }
    let (new, end_ms) = made.into_iter().next().unwrap().unwrap();
    let replaced = team.get(&team.owner, &old.key.id).await.unwrap();
    assert_eq!((replaced.status(), replaced.superseded_by), (ApiKeyStatus::Superseded, Some(new.key.id.clone())));
    assert_eq!(ms(replaced.expires_at), end_ms);
    let (before, after) = (team.whose(&old.token).await, team.whose(&new.token).await);
    assert!(before.superseded && !after.superseded);
    assert_eq!(Some(before.expires_at_ms), end_ms);
    assert_eq!(reason(create(&team.app, &team.owner, named("Eleventh")).await), Reason::KeyLimitReached);
}

async fn twenty_rotations_by_the_old_token_leave_one_successor(database: Database) {
    let team = team(database).await;
    let holder = team.whose(&team.live_key).await;
    let racers = (0..20).map(|number| {
        let app = Arc::clone(if number % 2 == 0 { &team.app } else { &team.other });
        let holder = holder.clone();
        tokio::spawn(async move { rotate_self(&app, &holder, None).await })
    });
    let mut tokens = Vec::new();
    let mut ends = Vec::new();
    for outcome in join_all(racers).await {
        let (made, end_ms) = outcome.unwrap().unwrap();
        tokens.push(made.token);
        ends.push(end_ms);
    }
    ends.dedup();
    assert_eq!(ends.len(), 1, "the end of the old half is set once");
    let mut good = Vec::new();
    for token in &tokens {
        if team.app.authenticate(token).await.is_ok() {
            good.push(token);
        }
    }
    assert_eq!(good.len(), 1);
    let successor = team.whose(good[0]).await.id;
    let old = team.get(&team.owner, &holder.id).await.unwrap();
    assert_eq!(old.superseded_by, Some(successor));
    assert_eq!(reason(rotate_self(&team.app, &holder, None).await), Reason::Conflict, "the new one was used");
}

async fn keys_that_were_rotated_one_into_the_next_name_the_first(database: Database) {
    let team = team(database).await;
    let first = team.key("Key").await;
    let (second, _) = rotate(&team.app, &team.owner, &first.key.id, None).await.unwrap();
    let holder = team.whose(&second.token).await;
    let (lost, _) = rotate_self(&team.app, &holder, None).await.unwrap();
    let (third, _) = rotate_self(&team.app, &holder, None).await.unwrap();
    let (fourth, _) = rotate(&team.app, &team.owner, &third.key.id, None).await.unwrap();
    assert_eq!(team.whose(&first.token).await.lineage, "", "it is the first itself");
    for made in [&second, &third, &fourth] {
        let whose = team.whose(&made.token).await;
        assert_eq!((&whose.lineage, &whose.id), (&first.key.id, &made.key.id));
    }
    assert!(team.is_refused(&lost.token).await);
    assert_eq!(team.whose(&team.key("Other").await.token).await.lineage, "");
}

async fn a_lost_answer_is_made_good_until_the_new_token_is_used(database: Database) {
    let team = team(database).await;
    let holder = team.whose(&team.live_key).await;
    let (lost, end_ms) = rotate_self(&team.app, &holder, Some(2)).await.unwrap();
    // What was changed meanwhile is not lost with the token.
    let rename = UpdateApiKeyRequest { name: Some("Renamed".into()), ..patch(&lost.key.id, &["name"]) };
    update(&team.app, &team.owner, rename).await.unwrap();
    let (new, same_ms) = rotate_self(&team.app, &holder, Some(168)).await.unwrap();
    assert_eq!(same_ms, end_ms, "the old half lives no longer");
    assert_eq!(new.key.name, "Renamed");
    assert!(team.is_refused(&lost.token).await);
    assert_eq!(team.get(&team.owner, &lost.key.id).await.unwrap().status(), ApiKeyStatus::Revoked);
    assert!(team.app.authenticate(&team.live_key).await.is_ok());
    let used = team.whose(&new.token).await;
    assert_eq!(reason(rotate_self(&team.app, &holder, None).await), Reason::Conflict);
    assert!(team.app.authenticate(&new.token).await.is_ok());
    // A new one that somebody has revoked stays revoked.
    let (next, _) = rotate_self(&team.app, &used, None).await.unwrap();
    revoke(&team.app, &team.owner, &next.key.id).await.unwrap();
    assert_eq!(reason(rotate_self(&team.app, &used, None).await), Reason::Conflict);
    // And a holder whose key has ended is a stranger.
    revoke(&team.app, &team.owner, &used.id).await.unwrap();
    assert_eq!(reason(rotate_self(&team.app, &used, None).await), Reason::InvalidCredentials);
}

async fn what_a_person_put_in_the_place_of_a_key_stays(database: Database) {
    let team = team(database).await;
    let admin = team.joined("grace@example.com", "admin").await;
    let old = team.key("Key").await;
    let holder = team.whose(&old.token).await;
    // Whoever has the old token may have stolen it: that is why it is rotated.
    let (new, _) = rotate(&team.app, &admin, &old.key.id, None).await.unwrap();
    assert_eq!(reason(rotate_self(&team.app, &holder, None).await), Reason::Conflict);
    assert!(!team.is_refused(&new.token).await);
    assert_eq!(team.get(&team.owner, &old.key.id).await.unwrap().superseded_by, Some(new.key.id));
    // Nor does the new one, when it rotates itself, take back what a person did after that.
    let used = team.whose(&new.token).await;
    let (next, _) = rotate_self(&team.app, &used, None).await.unwrap();
    let (last, _) = rotate(&team.app, &admin, &next.key.id, None).await.unwrap();
    assert_eq!(reason(rotate_self(&team.app, &used, None).await), Reason::Conflict);
    assert!(!team.is_refused(&last.token).await);
}

async fn what_a_credential_said_a_moment_ago_does_not_count(database: Database) {
    let team = team(database).await;
    let grace = team.joined("grace@example.com", "owner").await;
    let (key, of_ada) = (team.key("Key").await, create(&team.app, &team.owner, of_user()).await.unwrap());
    let by_token = create(&team.app, &grace, of_user()).await.unwrap();
    let by_token = team.whose(&by_token.token).await;
    let where_member = format!("WHERE team_id = '{}' AND user_id = '{}'", team.id, grace.user_id);
    let tried = async |caller: &Principal, id: &str| {
        let rename = UpdateApiKeyRequest { name: Some("Other".into()), ..patch(id, &["name"]) };
        let mut refused = vec![refusal(revoke(&team.app, caller, id).await)];
        // Tokens of users do no more than that.
        if caller.kind() == Caller::Account {
            refused.push(refusal(update(&team.app, caller, rename).await));
            refused.push(refusal(rotate(&team.app, caller, id, None).await));
        }
        refused
    };
    // As a gateway may still see her for a moment: she is an Owner no more.
    team.run(format!("UPDATE memberships SET role = 'admin' {where_member}")).await;
    for caller in [&grace, &by_token] {
        for (why, message) in tried(caller, &of_ada.key.id).await {
            assert_eq!(why, Reason::RoleInsufficient, "{message}");
        }
    }
    let for_ada = CreateApiKeyRequest { user_id: Some(team.owner.user_id.clone()), ..of_user() };
    assert_eq!(reason(create(&team.app, &grace, for_ada).await), Reason::RoleInsufficient);
    create(&team.app, &grace, named("An Admin's")).await.unwrap();
    team.run(format!("UPDATE memberships SET role = 'member' {where_member}")).await;
    for caller in [&grace, &by_token] {
        for (why, message) in tried(caller, &key.key.id).await {
            assert_eq!(why, Reason::RoleInsufficient, "{message}");
        }
    }
    assert_eq!(reason(create(&team.app, &grace, named("Late")).await), Reason::RoleInsufficient);
    team.run(format!("DELETE FROM memberships {where_member}")).await;
    let gone = (Reason::NotFound, "No such team".to_owned());
    for caller in [&grace, &by_token] {
        assert!(tried(caller, &key.key.id).await.iter().all(|refused| *refused == gone));
    }
    assert_eq!(refusal(create(&team.app, &grace, named("Late")).await), gone);
    assert!(!team.is_refused(&key.token).await && !team.is_refused(&of_ada.token).await);
}

async fn of_twenty_new_tokens_beside_45_exactly_five_are_made(database: Database) {
    let team = team(database).await;
    let mut tokens = Vec::new();
    for _ in 0..45 {
        tokens.push(create(&team.app, &team.owner, of_user()).await.unwrap());
    }
    let racers = (0..20).map(|number| {
        let app = Arc::clone(if number % 2 == 0 { &team.app } else { &team.other });
        let owner = team.owner.clone();
        tokio::spawn(async move { create(&app, &owner, of_user()).await })
    });
    let outcomes: Vec<_> = join_all(racers).await.into_iter().map(Result::unwrap).collect();
    let (made, refused): (Vec<_>, Vec<_>) = outcomes.into_iter().partition(Result::is_ok);
    assert_eq!(made.len(), 5);
    for refused in refused {
        let (why, message) = refusal(refused);
        assert!(why == Reason::KeyLimitReached && message.contains("at most 50 tokens"), "{message}");
    }
    // Others have room, and so have keys of the team.
    let grace = team.joined("grace@example.com", "admin").await;
    create(&team.app, &grace, of_user()).await.unwrap();
    team.key("Key").await;
    // Who has all that they may have can rotate each of them once.
    let mut token = tokens.pop().unwrap();
    for number in 0..50 {
        token = if number % 2 == 0 {
            rotate(&team.app, &team.owner, &token.key.id, None).await.unwrap().0
        } else {
            rotate_self(&team.app, &team.whose(&token.token).await, None).await.unwrap().0
        };
    }
    assert_eq!(reason(rotate(&team.app, &team.owner, &token.key.id, None).await), Reason::KeyLimitReached);
    let holder = team.whose(&token.token).await;
    assert_eq!(reason(rotate_self(&team.app, &holder, None).await), Reason::KeyLimitReached);
    revoke(&team.app, &team.owner, &tokens[0].key.id).await.unwrap();
    assert_eq!(reason(create(&team.app, &team.owner, of_user()).await), Reason::KeyLimitReached, "old halves count");
    rotate_self(&team.app, &holder, None).await.unwrap();
}

async fn a_call_in_test_mode_makes_no_live_key(database: Database) {
    let team = team(database).await;
    let in_test = Principal { mode: Mode::Test.into(), ..team.owner.clone() };
    for live in [named("Live"), of_user()] {
        let live = CreateApiKeyRequest { mode: Mode::Live.into(), ..live };
        assert_eq!(field(create(&team.app, &in_test, live).await), "mode");
    }
    let test = CreateApiKeyRequest { mode: Mode::Test.into(), ..named("Test") };
    create(&team.app, &in_test, test.clone()).await.unwrap();
    create(&team.app, &team.owner, test).await.unwrap();
}

async fn a_rotation_takes_everything_over(database: Database) {
    let team = team(database).await;
    let soon_ms = team.now_ms() + HOUR_MS;
    let request = CreateApiKeyRequest {
        scope: ApiKeyScope::ReadOnly.into(),
        scopes: words(&["licenses:read"]),
        allowlist: words(&["10.0.0.0/8"]),
        expires_at: at(soon_ms),
        requests_per_minute: Some(7),
        rotate_every_days: Some(30),
        ..named("Reader")
    };
    let old = create(&team.app, &team.owner, request).await.unwrap();
    let (new, end_ms) = rotate(&team.app, &team.owner, &old.key.id, Some(24)).await.unwrap();
    assert_eq!(end_ms, Some(soon_ms), "never beyond its own end");
    assert_eq!(TokenKind::of(&new.token), Some(TokenKind::TeamLive));
    assert!(new.key.rotated_at.is_some() && new.key.rotation_due_at.is_some());
    let alike = ApiKey {
        id: new.key.id.clone(),
        prefix: new.key.prefix.clone(),
        created_at: new.key.created_at,
        rotated_at: new.key.rotated_at,
        rotation_due_at: new.key.rotation_due_at,
        ..old.key.clone()
    };
    assert_eq!(new.key, alike);
    let holder = team.whose(&new.token).await;
    assert_eq!((holder.allowlist, holder.requests_per_minute), (words(&["10.0.0.0/8"]), 7));
    assert_eq!(Some(holder.rotation_due_at_ms), ms(new.key.rotation_due_at));
    // A free key stays one, to its own end.
    let free = team.whose(&team.free_key).await;
    let (new, _) = rotate_self(&team.app, &free, None).await.unwrap();
    assert_eq!((new.key.kind(), ms(new.key.expires_at)), (ApiKeyKind::Free, Some(free.expires_at_ms)));
    assert_eq!(TokenKind::of(&new.token), Some(TokenKind::Free));
    // A key that is refused for now does not come back by it.
    let disabled = team.key("Disabled").await;
    let off = UpdateApiKeyRequest { enabled: Some(false), ..patch(&disabled.key.id, &["enabled"]) };
    update(&team.app, &team.owner, off).await.unwrap();
    let (new, _) = rotate(&team.app, &team.owner, &disabled.key.id, None).await.unwrap();
    assert_eq!(new.key.status(), ApiKeyStatus::Disabled);
    assert!(team.is_refused(&new.token).await);
}

async fn a_rotation_with_no_overlap_ends_the_old_token_at_once(database: Database) {
    let team = team(database).await;
    let old = team.key("Old").await;
    let remembered = team.app.remember(&team.whose(&old.token).await);
    let (new, _) = rotate(&team.app, &team.owner, &old.key.id, Some(0)).await.unwrap();
    assert!(!remembered.is_served());
    assert!(team.is_refused(&old.token).await && !team.is_refused(&new.token).await);
    assert_eq!(reason(rotate(&team.app, &team.owner, &old.key.id, Some(0)).await), Reason::Conflict);
}

async fn a_key_makes_only_what_lies_within_itself(database: Database) {
    let team = team(database).await;
    let end_ms = team.now_ms() + 10 * DAY_MS;
    let request = CreateApiKeyRequest {
        scopes: words(&["keys:write", "licenses:read"]),
        allowlist: words(&["10.0.0.0/8", "2001:db8::/32"]),
        expires_at: at(end_ms),
        requests_per_minute: Some(9),
        ..named("Maker")
    };
    let maker = create(&team.app, &team.owner, request).await.unwrap();
    let maker = team.whose(&maker.token).await;
    let made = make(&team.app, &maker, wished("Same", Mode::Live)).await.unwrap();
    assert_eq!(TokenKind::of(&made.token), Some(TokenKind::PlatformLive));
    assert_eq!((made.key.kind(), ms(made.key.expires_at)), (ApiKeyKind::Platform, Some(end_ms)));
    assert_eq!(made.key.scopes.len(), 2);
    assert_eq!((made.key.allowlist, made.key.requests_per_minute), (words(&["10.0.0.0/8", "2001:db8::/32"]), Some(9)));
    let creator = made.key.creator.unwrap();
    assert_eq!((creator.id, creator.name.as_str()), (maker.id.clone(), "Maker"));

    let narrow = CreatePlatformApiKeyRequest {
        scope: ApiKeyScope::ReadOnly.into(),
        scopes: words(&["licenses:read"]),
        allowlist: words(&["10.1.0.0/16"]),
        expires_at: at(end_ms - 1),
        ..wished("Narrow", Mode::Live)
    };
    let made = make(&team.app, &maker, narrow.clone()).await.unwrap();
    assert_eq!((made.key.scope(), made.key.allowlist), (ApiKeyScope::ReadOnly, words(&["10.1.0.0/16"])));

    let wider = CreatePlatformApiKeyRequest { scopes: words(&["licenses:write"]), ..narrow.clone() };
    let (reason_of, message) = refusal(make(&team.app, &maker, wider).await);
    assert!(reason_of == Reason::ScopeInsufficient && message.contains("licenses:write"), "{message}");
    let later = CreatePlatformApiKeyRequest { expires_at: at(end_ms + 1), ..narrow.clone() };
    assert_eq!(field(make(&team.app, &maker, later).await), "expires_at");
    let elsewhere = CreatePlatformApiKeyRequest { allowlist: words(&["10.1.2.3", "192.0.2.1"]), ..narrow.clone() };
    assert_eq!(field(make(&team.app, &maker, elsewhere).await), "allowlist[1]");
    let unknown = CreatePlatformApiKeyRequest { scopes: words(&["licenses:check"]), ..narrow.clone() };
    assert_eq!(field(make(&team.app, &maker, unknown).await), "scopes[0]");

    let test = make(&team.app, &maker, wished("Test", Mode::Test)).await.unwrap();
    let test = team.whose(&test.token).await;
    assert_eq!(reason(make(&team.app, &test, wished("More", Mode::Test)).await), Reason::ScopeInsufficient);
    // What the gateway still believes for a second does not count here.
    revoke(&team.app, &team.owner, &maker.id).await.unwrap();
    assert_eq!(reason(make(&team.app, &maker, narrow).await), Reason::InvalidCredentials);

    let system = team.app.system_key().await;
    let system = team.app.authenticate_in(system.expose(), &team.id, Mode::Live).await.unwrap();
    let made = make(&team.app, &system, wished("By the installation", Mode::Live)).await.unwrap();
    assert!(made.key.expires_at.is_none() && !made.key.scopes.contains(&"licenses:check".to_owned()));
    let system = Principal { mode: Mode::Test.into(), ..system };
    assert_eq!(reason(make(&team.app, &system, wished("No", Mode::Live)).await), Reason::ScopeInsufficient);
}

async fn a_test_key_ends_within_a_day_however_it_is_made_or_changed(database: Database) {
    let team = team(database).await;
    let maker = team.whose(&team.live_key).await;
    let before_ms = team.now_ms();
    let made = make(&team.app, &maker, wished("Test", Mode::Test)).await.unwrap();
    let end_ms = ms(made.key.expires_at).unwrap();
    assert!((before_ms + DAY_MS..=team.now_ms() + DAY_MS).contains(&end_ms));
    let long = CreatePlatformApiKeyRequest { expires_at: at(team.now_ms() + 2 * DAY_MS), ..wished("T", Mode::Test) };
    assert_eq!(field(make(&team.app, &maker, long).await), "expires_at");
    for expires_at in [at(end_ms + 1), None] {
        let longer = UpdateApiKeyRequest { expires_at, ..patch(&made.key.id, &["expires_at"]) };
        assert_eq!(field(update(&team.app, &team.owner, longer).await), "expires_at");
    }
    let shorter = UpdateApiKeyRequest { expires_at: at(end_ms - HOUR_MS), ..patch(&made.key.id, &["expires_at"]) };
    update(&team.app, &team.owner, shorter).await.unwrap();
    let back = UpdateApiKeyRequest { expires_at: at(end_ms), ..patch(&made.key.id, &["expires_at"]) };
    update(&team.app, &team.owner, back).await.unwrap();
    // Rotating it lends it no further day.
    let (new, _) = rotate(&team.app, &team.owner, &made.key.id, None).await.unwrap();
    assert_eq!(ms(new.key.expires_at), Some(end_ms));
    let longer = UpdateApiKeyRequest { expires_at: at(end_ms + 1), ..patch(&new.key.id, &["expires_at"]) };
    assert_eq!(field(update(&team.app, &team.owner, longer).await), "expires_at");
    // Nor is the free key's month longer for being changed.
    let free = team.whose(&team.free_key).await;
    let longer = UpdateApiKeyRequest { expires_at: None, ..patch(&free.id, &["expires_at"]) };
    assert_eq!(field(update(&team.app, &team.owner, longer).await), "expires_at");
}

async fn a_key_rotates_only_what_lies_within_itself(database: Database) {
    let team = team(database).await;
    let all = team.whose(&team.live_key).await;
    let narrow = CreateApiKeyRequest { scopes: words(&["keys:write"]), ..named("Narrow") };
    let narrow = create(&team.app, &team.owner, narrow).await.unwrap();
    let holder = team.whose(&narrow.token).await;
    let ending = CreateApiKeyRequest { expires_at: at(team.now_ms() + DAY_MS), ..named("Ending") };
    let ending = create(&team.app, &team.owner, ending).await.unwrap();
    let bound = CreateApiKeyRequest { allowlist: words(&["10.0.0.0/8"]), ..named("Bound") };
    let bound = create(&team.app, &team.owner, bound).await.unwrap();
    let free = team.whose(&team.free_key).await;
    let seldom = CreateApiKeyRequest { requests_per_minute: Some(5), ..named("Seldom") };
    let seldom = create(&team.app, &team.owner, seldom).await.unwrap();
    let slow = team.whose(&seldom.token).await;
    assert_eq!(reason(rotate(&team.app, &slow, &narrow.key.id, None).await), Reason::ScopeInsufficient, "more often");

    assert_eq!(reason(rotate(&team.app, &holder, &all.id, None).await), Reason::ScopeInsufficient, "more scopes");
    let short = team.whose(&ending.token).await;
    assert_eq!(reason(rotate(&team.app, &short, &narrow.key.id, None).await), Reason::ScopeInsufficient, "for longer");
    let office = team.whose(&bound.token).await;
    assert_eq!(reason(rotate(&team.app, &office, &narrow.key.id, None).await), Reason::ScopeInsufficient, "anywhere");
    let token = create(&team.app, &team.owner, of_user()).await.unwrap();
    assert_eq!(reason(rotate(&team.app, &all, &token.key.id, None).await), Reason::ScopeInsufficient, "a user's");
    assert_eq!(reason(revoke(&team.app, &all, &token.key.id).await), Reason::ScopeInsufficient, "a user's");
    let in_test = CreateApiKeyRequest { mode: Mode::Test.into(), ..named("Test") };
    let in_test = create(&team.app, &team.owner, in_test).await.unwrap();
    let tester = team.whose(&in_test.token).await;
    assert_eq!(reason(rotate(&team.app, &tester, &in_test.key.id, None).await), Reason::ScopeInsufficient, "by test");
    assert_eq!(reason(rotate(&team.app, &tester, &all.id, None).await), Reason::NotFound);

    for within in [&narrow.key.id, &ending.key.id, &bound.key.id, &seldom.key.id, &in_test.key.id, &free.id] {
        rotate(&team.app, &all, within, None).await.unwrap();
    }
    let system = team.app.system_key().await;
    let system = team.app.authenticate_in(system.expose(), &team.id, Mode::Live).await.unwrap();
    rotate(&team.app, &system, &all.id, None).await.unwrap();
    assert_eq!(reason(rotate(&team.app, &system, &token.key.id, None).await), Reason::ScopeInsufficient);
    revoke(&team.app, &system, &token.key.id).await.unwrap();
}

async fn a_users_token_shrinks_with_the_role_and_ends_with_the_membership(database: Database) {
    let team = team(database).await;
    let grace = team.joined("grace@example.com", "admin").await;
    let request = CreateApiKeyRequest { user_id: Some(grace.user_id.clone()), ..of_user() };
    let made = create(&team.app, &team.owner, request).await.unwrap();
    assert_eq!(TokenKind::of(&made.token), Some(TokenKind::User));
    assert_eq!(made.key.user_id.as_deref(), Some(grace.user_id.as_str()));
    let holder = team.whose(&made.token).await;
    assert_eq!((holder.kind(), holder.role(), holder.mode()), (Caller::UserToken, Role::Admin, Mode::Live));
    assert_eq!((&holder.user_id, &holder.team_id), (&grace.user_id, &team.id));
    let expected = [format!("key:{}", holder.id), format!("user:{}", grace.user_id), format!("team:{}", team.id)];
    assert_eq!(holder.subjects, expected);
    assert!(!team.list(&holder).await.is_empty());
    let (team_id, user_id) = (&team.id, &grace.user_id);
    let where_member = format!("WHERE team_id = '{team_id}' AND user_id = '{user_id}'");
    team.run(format!("UPDATE memberships SET role = 'member' {where_member}")).await;
    let holder = team.whose(&made.token).await;
    assert_eq!(holder.role(), Role::Member);
    assert_eq!(reason(revoke(&team.app, &holder, &holder.id).await), Reason::RoleInsufficient);
    team.run(format!("DELETE FROM memberships {where_member}")).await;
    assert!(team.is_refused(&made.token).await);
    assert_eq!(reason(rotate_self(&team.app, &holder, None).await), Reason::InvalidCredentials);
    assert_eq!(reason(rotate(&team.app, &team.owner, &made.key.id, None).await), Reason::Conflict);
    // Who comes back begins anew.
    let later_ms = team.now_ms() + 1;
    team.run(format!(
        "INSERT INTO memberships (team_id, user_id, role, created_at_ms) \
         VALUES ('{team_id}', '{user_id}', 'admin', {later_ms})"
    ))
    .await;
    assert!(team.is_refused(&made.token).await);
    assert_eq!(reason(rotate(&team.app, &team.owner, &made.key.id, None).await), Reason::Conflict);
    let request = CreateApiKeyRequest { user_id: Some(user_id.clone()), ..of_user() };
    let made = create(&team.app, &team.owner, request).await.unwrap();
    let holder = team.whose(&made.token).await;
    let (new, _) = rotate_self(&team.app, &holder, None).await.unwrap();
    assert_eq!(team.whose(&new.token).await.user_id, *user_id);
    revoke(&team.app, &team.owner, &new.key.id).await.unwrap();
    assert!(team.is_refused(&new.token).await);
}

async fn an_admin_does_not_touch_the_token_of_an_owner(database: Database) {
    let team = team(database).await;
    let admin = team.joined("grace@example.com", "admin").await;
    let of_owner = CreateApiKeyRequest { user_id: Some(team.owner.user_id.clone()), ..of_user() };
    assert_eq!(reason(create(&team.app, &admin, of_owner).await), Reason::RoleInsufficient);
    let owners = create(&team.app, &team.owner, of_user()).await.unwrap();
    let rename = UpdateApiKeyRequest { name: Some("Mine".into()), ..patch(&owners.key.id, &["name"]) };
    assert_eq!(reason(update(&team.app, &admin, rename).await), Reason::RoleInsufficient);
    assert_eq!(reason(rotate(&team.app, &admin, &owners.key.id, None).await), Reason::RoleInsufficient);
    assert_eq!(reason(revoke(&team.app, &admin, &owners.key.id).await), Reason::RoleInsufficient);
    assert!(!team.is_refused(&owners.token).await);
    let own = create(&team.app, &admin, of_user()).await.unwrap();
    rotate(&team.app, &admin, &own.key.id, None).await.unwrap();
    revoke(&team.app, &team.owner, &own.key.id).await.unwrap();
    assert!(team.is_refused(&own.token).await);
    let eve = team.app.registered("eve@example.com").await.user.unwrap().id;
    for nobody in [eve.as_str(), "usr_0", "\u{7f}", ""] {
        let request = CreateApiKeyRequest { user_id: Some(nobody.to_owned()), ..of_user() };
        assert_eq!(field(create(&team.app, &team.owner, request).await), "user_id", "{nobody:?}");
    }
}

async fn what_is_changed_counts_at_once(database: Database) {
    let team = team(database).await;
    let made = team.key("Old name").await;
    let end_ms = team.now_ms() + DAY_MS;
    let remembered = team.app.remember(&team.whose(&made.token).await);
    let paths = ["name", "scope", "scopes", "allowlist", "expires_at", "requests_per_minute", "rotate_every_days"];
    let request = UpdateApiKeyRequest {
        name: Some("  New name ".into()),
        scope: ApiKeyScope::ReadOnly.into(),
        scopes: words(&["usage:read", "licenses:read"]),
        allowlist: words(&["::ffff:192.0.2.9", "2001:db8::1/64"]),
        expires_at: at(end_ms),
        requests_per_minute: Some(3),
        rotate_every_days: Some(1),
        ..patch(&made.key.id, &paths)
    };
    let changed = update(&team.app, &team.owner, request).await.unwrap();
    assert!(!remembered.is_served());
    assert_eq!((changed.name.as_str(), changed.scope()), ("New name", ApiKeyScope::ReadOnly));
    assert_eq!(changed.allowlist, words(&["192.0.2.9/32", "2001:db8::/64"]));
    assert_eq!((ms(changed.expires_at), changed.requests_per_minute), (Some(end_ms), Some(3)));
    assert!(changed.rotation_due_at.is_some());
    assert_eq!(team.get(&team.owner, &made.key.id).await.unwrap(), changed);
    let holder = team.whose(&made.token).await;
    assert!(holder.read_only && holder.scopes().count() == 2 && holder.expires_at_ms == end_ms);

    let cleared = update(&team.app, &team.owner, patch(&made.key.id, &paths[3..])).await.unwrap();
    assert!(cleared.allowlist.is_empty() && cleared.expires_at.is_none() && cleared.requests_per_minute.is_none());
    assert!(cleared.rotation_due_at.is_none() && cleared.scopes.len() == 2);
    let off = UpdateApiKeyRequest { enabled: Some(false), ..patch(&made.key.id, &["enabled"]) };
    assert_eq!(update(&team.app, &team.owner, off).await.unwrap().status(), ApiKeyStatus::Disabled);
    assert!(team.is_refused(&made.token).await);
    let on = UpdateApiKeyRequest { enabled: Some(true), ..patch(&made.key.id, &["enabled"]) };
    assert_eq!(update(&team.app, &team.owner, on).await.unwrap().status(), ApiKeyStatus::Active);
    assert!(!team.is_refused(&made.token).await);
    for cannot_be_null in ["name", "enabled", "scope", "scopes"] {
        assert_eq!(field(update(&team.app, &team.owner, patch(&made.key.id, &[cannot_be_null])).await), cannot_be_null);
    }
    assert_eq!(field(update(&team.app, &team.owner, patch(&made.key.id, &["kind"])).await), "kind");
    let nothing = update(&team.app, &team.owner, patch(&made.key.id, &[])).await.unwrap();
    assert_eq!(nothing, team.get(&team.owner, &made.key.id).await.unwrap());
}

async fn a_key_that_has_ended_does_not_change(database: Database) {
    let team = team(database).await;
    let (revoked, rotated, expired) = (team.key("A").await, team.key("B").await, team.key("C").await);
    revoke(&team.app, &team.owner, &revoked.key.id).await.unwrap();
    rotate(&team.app, &team.owner, &rotated.key.id, None).await.unwrap();
    team.run(format!("UPDATE keys SET expires_at_ms = {} WHERE id = '{}'", team.now_ms(), expired.key.id)).await;
    for (key, status, says) in [
        (&revoked, ApiKeyStatus::Revoked, "revoked"),
        (&rotated, ApiKeyStatus::Superseded, "rotated"),
        (&expired, ApiKeyStatus::Expired, "expired"),
    ] {
        let id = &key.key.id;
        assert_eq!(team.get(&team.owner, id).await.unwrap().status(), status);
        let rename = UpdateApiKeyRequest { name: Some("Other".into()), ..patch(id, &["name"]) };
        let (why, message) = refusal(update(&team.app, &team.owner, rename).await);
        assert!(why == Reason::Conflict && message.contains(says), "{message}");
        let (why, message) = refusal(rotate(&team.app, &team.owner, id, None).await);
        assert!(why == Reason::Conflict && message.contains(says), "{message}");
    }
    assert!(team.is_refused(&revoked.token).await && team.is_refused(&expired.token).await);
}

async fn a_revocation_stays_as_it_was(database: Database) {
    let team = team(database).await;
    let made = team.key("Key").await;
    let racers = (0..10).map(|number| {
        let app = Arc::clone(if number % 2 == 0 { &team.app } else { &team.other });
        let (owner, id) = (team.owner.clone(), made.key.id.clone());
        tokio::spawn(async move { revoke(&app, &owner, &id).await.unwrap() })
    });
    let answers: Vec<_> = join_all(racers).await.into_iter().map(Result::unwrap).collect();
    assert!(answers.windows(2).all(|pair| pair[0] == pair[1]), "{answers:?}");
    let revoked_ms = ms(answers[0].revoked_at).unwrap();
    assert_eq!((answers[0].id.as_str(), ms(answers[0].effective_by)), (made.key.id.as_str(), Some(revoked_ms + 1_000)));
    assert!(team.is_refused(&made.token).await);
    let admin = team.joined("grace@example.com", "admin").await;
    assert_eq!(revoke(&team.app, &admin, &made.key.id).await.unwrap(), answers[0]);
    let key = team.get(&team.owner, &made.key.id).await.unwrap();
    let by = key.revoked_by.unwrap();
    assert_eq!((by.id, by.name.as_str()), (team.owner.user_id.clone(), "ada@example.com"));
    // A key may end itself.
    let own = team.whose(&team.live_key).await;
    let remembered = team.app.remember(&own);
    revoke(&team.app, &own, &own.id).await.unwrap();
    assert!(!remembered.is_served());
    assert!(team.is_refused(&team.live_key).await);
    let by = team.get(&team.owner, &own.id).await.unwrap().revoked_by.unwrap();
    assert_eq!((by.id, by.name.as_str()), (own.id, "First live key"));
}

async fn a_test_call_sees_no_live_key(database: Database) {
    let team = team(database).await;
    let live = team.key("Live").await;
    let in_test = Principal { mode: Mode::Test.into(), ..team.owner.clone() };
    let test = create(&team.app, &in_test, named("Test")).await.unwrap();
    assert_eq!(TokenKind::of(&test.token), Some(TokenKind::TeamTest));
    let seen: Vec<_> = team.list(&in_test).await.into_iter().map(|key| key.id).collect();
    assert_eq!(seen, [test.key.id.as_str()]);
    let all: Vec<_> = team.list(&team.owner).await.into_iter().map(|key| key.id).collect();
    assert!(all.contains(&live.key.id) && all.contains(&test.key.id) && all[0] == test.key.id, "newest first");
    assert_eq!(reason(team.get(&in_test, &live.key.id).await), Reason::NotFound);
    assert_eq!(reason(revoke(&team.app, &in_test, &live.key.id).await), Reason::NotFound);
    assert_eq!(reason(rotate(&team.app, &in_test, &live.key.id, None).await), Reason::NotFound);
    let rename = UpdateApiKeyRequest { name: Some("Other".into()), ..patch(&live.key.id, &["name"]) };
    assert_eq!(reason(update(&team.app, &in_test, rename).await), Reason::NotFound);
    assert!(!team.is_refused(&live.token).await);
    // Pages go on where the last one ended.
    let mut paged = Vec::new();
    let mut page_token = String::new();
    loop {
        let request = ListApiKeysRequest { page_size: Some(2), page_token, ..ListApiKeysRequest::default() };
        let page = answer(client(&team.app, Some(&team.owner)).list_api_keys(request).await).unwrap();
        paged.extend(page.api_keys.into_iter().map(|key| key.id));
        let Some(next) = page.next_page_token else { break };
        page_token = next;
    }
    assert_eq!(paged, all);
}

async fn a_foreign_key_is_not_there(database: Database) {
    let team = team(database).await;
    let eve = team.app.registered("eve@example.com").await;
    let eve = team.app.authenticate(&eve.token).await.unwrap();
    let key = team.key("Key").await;
    let expected = (Reason::NotFound, "No such key".to_owned());
    for id in [key.key.id.as_str(), "key_0", "\u{7f}", "' OR 1=1 --"] {
        assert_eq!(refusal(team.get(&eve, id).await), expected);
        assert_eq!(refusal(revoke(&team.app, &eve, id).await), expected);
        assert_eq!(refusal(rotate(&team.app, &eve, id, None).await), expected);
        assert_eq!(refusal(update(&team.app, &eve, patch(id, &[])).await), expected);
    }
    let elsewhere = CreateApiKeyRequest { team_id: team.id.clone(), ..named("Key") };
    assert_eq!(refusal(create(&team.app, &eve, elsewhere).await), (Reason::NotFound, "No such team".to_owned()));
    assert!(!team.is_refused(&key.token).await);
}

async fn a_sandbox_has_one_key_and_a_team_of_its_own(database: Database) {
    let team = team(database).await;
    let before_ms = team.now_ms();
    let made = answer(client(&team.app, None).create_test_api_key(CreateTestApiKeyRequest {}).await).unwrap();
    assert_eq!(TokenKind::of(&made.key), Some(TokenKind::PlatformTest));
    let end_ms = ms(made.expires_at).unwrap();
    assert!((before_ms + DAY_MS..=team.now_ms() + DAY_MS).contains(&end_ms));
    let holder = team.whose(&made.key).await;
    assert_eq!((holder.kind(), holder.mode(), holder.expires_at_ms), (Caller::TeamKey, Mode::Test, end_ms));
    assert_ne!(holder.team_id, team.id);
    let me = me(&team.app, &holder).await.unwrap();
    assert_eq!(me.team.unwrap().name, "Sandbox");
    assert_eq!(team.list(&holder).await.len(), 1);
    assert_eq!(reason(make(&team.app, &holder, wished("More", Mode::Test)).await), Reason::ScopeInsufficient);
    let (new, _) = rotate_self(&team.app, &holder, None).await.unwrap();
    assert_eq!(ms(new.key.expires_at), Some(end_ms));
    // The sandbox itself ends, whatever its keys say.
    let earlier_ms = team.now_ms() + HOUR_MS;
    team.run(format!("UPDATE teams SET expires_at_ms = {earlier_ms} WHERE id = '{}'", holder.team_id)).await;
    assert_eq!(team.whose(&new.token).await.expires_at_ms, earlier_ms);
    team.run(format!("UPDATE teams SET expires_at_ms = {} WHERE id = '{}'", team.now_ms(), holder.team_id)).await;
    assert!(team.is_refused(&new.token).await && team.is_refused(&made.key).await);
}

async fn what_belongs_to_a_deleted_team_is_dead(database: Database) {
    let team = team(database).await;
    let registered = team.app.login("ada@example.com", common::PASSWORD).await.unwrap();
    let token = create(&team.app, &team.owner, of_user()).await.unwrap().token;
    let pair = team.app.provision(&fresh("prod"), &team.id, Mode::Live).await.unwrap();
    let public = pair.api_key.unwrap().public_key;
    let system = team.app.system_key().await;
    team.run(format!("UPDATE teams SET deleted_at_ms = {} WHERE id = '{}'", team.now_ms(), team.id)).await;
    for dead in [&team.live_key, &team.free_key, &token, &pair.secret_key, &public] {
        assert!(team.is_refused(dead).await);
    }
    for named in [&registered.token, system.expose()] {
        let asked = team.app.authenticate_in(named, &team.id, Mode::Live).await;
        assert_eq!(refusal(asked), (Reason::NotFound, "No such team".to_owned()));
        assert_eq!(team.whose(named).await.team_id, "");
    }
    assert_eq!(reason(create(&team.app, &team.owner, named("Late")).await), Reason::NotFound);
}

async fn a_token_is_found_under_the_pepper_before(database: Database) {
    let team = team(database.clone()).await;
    let pair = team.app.provision(&fresh("prod"), &team.id, Mode::Live).await.unwrap();
    let public = pair.api_key.unwrap().public_key;
    let used_before = team.whose(&team.live_key).await;
    let key = |byte: u8| Secret::new(BASE64.encode([byte; 32]));
    let changed = Keyring::from_base64(&key(1), &key(9), &key(3)).unwrap().with_derived_kept_keys();
    let alone = App::with_keys(database.clone(), true, &changed);
    let beside = App::with_keys(database, true, &changed.clone().with_previous_pepper(&key(2)).unwrap());
    let tokens = [&team.live_key, &team.free_key, &pair.secret_key, &public];
    for token in tokens {
        assert_eq!(reason(alone.authenticate(token).await), Reason::InvalidCredentials);
    }
    let racers = tokens.iter().flat_map(|token| (0..4).map(|_| beside.authenticate(token)));
    for outcome in join_all(racers).await {
        outcome.unwrap();
    }
    assert_eq!(beside.authenticate(&team.live_key).await.unwrap(), used_before);
    // Each was hashed anew when it was used, so that the pepper of before may go.
    for token in tokens {
        assert!(alone.authenticate(token).await.is_ok());
        assert!(team.is_refused(token).await, "the old pepper finds it no more");
    }
    // Only who is sure to have missed looks a second time.
    let unknown = TokenKind::TeamLive.generate();
    for (app, statements) in [(&alone, 1), (&beside, 2)] {
        let before = app.database.stats().statements();
        assert_eq!(reason(app.authenticate(&unknown).await), Reason::InvalidCredentials);
        assert_eq!(app.database.stats().statements() - before, statements);
        let before = app.database.stats().statements();
        app.authenticate(&team.live_key).await.unwrap();
        assert_eq!(app.database.stats().statements() - before, 1);
    }
}

async fn a_leaked_token_is_revoked_or_told_of_and_no_answer_says_which(database: Database) {
    let team = team(database).await;
    let product = fresh("prod");
    let pair = team.app.provision(&product, &team.id, Mode::Live).await.unwrap();
    let public = pair.api_key.clone().unwrap().public_key;
    let system = team.app.system_key().await;
    let (good, token) = (team.key("Key").await, create(&team.app, &team.owner, of_user()).await.unwrap());
    let remembered = team.app.remember(&team.whose(&good.token).await);
    let mut tokens: Vec<String> = [&good.token, &good.token, &token.token, &pair.secret_key, &public]
        .map(String::clone)
        .into_iter()
        .chain(TokenKind::ALL.iter().map(|kind| kind.generate()))
        .chain(["nonsense", "", "\u{7f}", "é"].map(str::to_owned))
        .collect();
    tokens.push(system.expose().to_owned());
    tokens.push("x".repeat(512));
    let count = i32::try_from(tokens.len()).unwrap();
    assert_eq!(report(&team.app, tokens.clone()).await.unwrap(), count);
    assert!(!remembered.is_served());
    for ended in [&good.token, &token.token, &pair.secret_key, system.expose()] {
        assert!(team.is_refused(ended).await);
    }
    assert!(team.is_refused(&public).await, "a pair is revoked whole");
    let key = team.get(&team.owner, &good.key.id).await.unwrap();
    assert_eq!((key.status(), key.revoked_by.unwrap().name.as_str()), (ApiKeyStatus::Revoked, "Reported as leaked"));
    let topics = async |topic: &str| team.events().await.iter().filter(|event| event.topic == topic).count();
    assert_eq!((topics("api_key.revoked").await, topics("alert.created").await), (2, 0));
    assert_eq!(report(&team.app, tokens).await.unwrap(), count, "and again");
    assert_eq!(topics("api_key.revoked").await, 2);

    team.run(format!("UPDATE teams SET leak_action = 'alert' WHERE id = '{}'", team.id)).await;
    let public_only = team.app.provision(&fresh("prod"), &team.id, Mode::Live).await.unwrap();
    let public = public_only.api_key.unwrap().public_key;
    let leaked = vec![team.live_key.clone(), public_only.secret_key.clone(), public.clone()];
    for _ in 0..3 {
        assert_eq!(report(&team.app, leaked.clone()).await.unwrap(), 3, "and again: it is told once an hour");
    }
    for alive in [&team.live_key, &public_only.secret_key, &public] {
        assert!(!team.is_refused(alive).await);
    }
    let alerts: Vec<_> = team.events().await.into_iter().filter(|event| event.topic == "alert.created").collect();
    assert_eq!(alerts.len(), 2);
    let data: Vec<Value> = alerts.iter().map(|event| serde_json::from_str(&event.data_json).unwrap()).collect();
    let prefix = &team.live_key[..12];
    let of_live_key = |data: &&Value| data["details"]["prefix"] == prefix && data["cause"] == "key_leaked";
    assert!(data.iter().any(|data| of_live_key(&data)), "{data:?}");
    assert!(alerts.iter().all(|event| event.team_id == team.id && event.product_id.is_empty()));

    let audited = team.audited("ReportLeakedApiKeys").await;
    assert_eq!(audited.len(), 4 + 2, "what was revoked, and what was told of: {audited:?}");
    team.run(format!("UPDATE alerts SET hour = hour - {HOUR_MS}")).await;
    report(&team.app, leaked).await.unwrap();
    assert_eq!(topics("alert.created").await, 4);

    for faulty in [vec![], vec!["x".to_owned(); 101], vec!["x".repeat(513)]] {
        assert_eq!(reason(report(&team.app, faulty).await), Reason::ValidationFailed);
    }
}

async fn uses_are_written_to_the_minute_and_only_forward(database: Database) {
    let team = team(database).await;
    let (first, second) = (team.key("A").await.key.id, team.key("B").await.key.id);
    let usage = |key_id: &str, used_at_ms: i64| KeyUse { key_id: key_id.to_owned(), used_at_ms, ..KeyUse::default() };
    let record = async |uses: Vec<KeyUse>| {
        let mut client = CredentialServiceClient::new(team.app.service());
        answer(client.record_key_uses(RecordKeyUsesRequest { uses }).await).map(drop)
    };
    let now_ms = team.now_ms();
    let minute = |ms: i64| ms / 60_000 * 60_000;
    record(vec![
        usage(&first, now_ms - 10 * 60_000),
        usage(&first, now_ms - 20 * 60_000),
        usage(&second, i64::MAX),
        usage("key_0", now_ms),
        usage("\u{0}", now_ms),
        usage("", i64::MIN),
    ])
    .await
    .unwrap();
    let last = async |id: &str| ms(team.get(&team.owner, id).await.unwrap().last_used_at).unwrap();
    assert_eq!(last(&first).await, minute(now_ms - 10 * 60_000));
    assert!(last(&second).await >= minute(now_ms) && last(&second).await <= team.now_ms());
    record(vec![usage(&first, now_ms - 30 * 60_000), usage(&second, i64::MIN)]).await.unwrap();
    assert_eq!(last(&first).await, minute(now_ms - 10 * 60_000));
    record(vec![]).await.unwrap();
    let batches = (0..8_i64).map(|number| {
        let uses = [(&first, number), (&second, 8 - number)].map(|(id, ago)| usage(id, now_ms - ago * 60_000));
        record(if number % 2 == 0 { uses.to_vec() } else { uses.into_iter().rev().collect() })
    });
    for outcome in join_all(batches).await {
        outcome.unwrap();
    }
    assert_eq!(last(&first).await, minute(now_ms));
    record(vec![usage(&first, now_ms); 1_000]).await.unwrap();
    assert_eq!(reason(record(vec![usage(&first, now_ms); 1_001]).await), Reason::ValidationFailed);
}

async fn a_key_tells_about_itself(database: Database) {
    let team = team(database).await;
    let holder = team.whose(&team.live_key).await;
    let told = me(&team.app, &holder).await.unwrap();
    let (key, home) = (told.api_key.unwrap(), told.team.unwrap());
    assert_eq!((&key.id, key.name.as_str(), key.kind()), (&holder.id, "First live key", ApiKeyKind::Platform));
    assert_eq!(key.prefix, team.live_key[..12]);
    assert_eq!((home.id, home.tier.as_str()), (team.id.clone(), "free"));
    assert_eq!(told.limits.unwrap().requests_per_minute, Some(60), "the tier's");
    team.run(format!("UPDATE teams SET requests_per_minute = 600 WHERE id = '{}'", team.id)).await;
    assert_eq!(me(&team.app, &holder).await.unwrap().limits.unwrap().requests_per_minute, Some(600));
    let own = create(&team.app, &team.owner, CreateApiKeyRequest { requests_per_minute: Some(5), ..named("Own") });
    let own = team.whose(&own.await.unwrap().token).await;
    assert_eq!(me(&team.app, &own).await.unwrap().limits.unwrap().requests_per_minute, Some(5));
    team.run(format!("UPDATE teams SET requests_per_minute = 4 WHERE id = '{}'", team.id)).await;
    let limits = me(&team.app, &own).await.unwrap().limits.unwrap();
    assert_eq!(limits.requests_per_minute, Some(4), "never more than the team has");
    let system = team.app.system_key().await;
    let system = team.whose(system.expose()).await;
    let told = me(&team.app, &system).await.unwrap();
    assert_eq!((told.team, told.api_key.unwrap().kind()), (None, ApiKeyKind::System));
    assert_eq!(reason(me(&team.app, &team.owner).await), Reason::ScopeInsufficient);
}

async fn what_happens_to_keys_is_told_and_audited(database: Database) {
    let team = team(database).await;
    let in_test = Principal { mode: Mode::Test.into(), ..team.owner.clone() };
    let old = create(&team.app, &in_test, named("Key")).await.unwrap();
    let (new, _) = rotate(&team.app, &in_test, &old.key.id, None).await.unwrap();
    revoke(&team.app, &in_test, &new.key.id).await.unwrap();
    revoke(&team.app, &in_test, &new.key.id).await.unwrap();
    let events = team.events().await;
    let topics: Vec<_> = events.iter().map(|event| event.topic.as_str()).collect();
    assert_eq!(topics, ["api_key.created", "api_key.rotated", "api_key.revoked"]);
    for event in &events {
        assert_eq!(
            (event.team_id.as_str(), event.mode(), event.product_id.as_str()),
            (team.id.as_str(), Mode::Test, "")
        );
    }
    let data: Value = serde_json::from_str(&events[0].data_json).unwrap();
    let expected = serde_json::json!({
        "id": old.key.id, "name": "Key", "prefix": old.key.prefix, "mode": "test", "expiresAt": null
    });
    assert_eq!(data, expected);
    let data: Value = serde_json::from_str(&events[1].data_json).unwrap();
    assert_eq!((&data["id"], &data["replaces"]), (&Value::from(new.key.id.clone()), &Value::from(old.key.id.clone())));
    let rows = team.app.database.read(|reader| async move {
        let sql = "SELECT action, resources FROM audit_entries ORDER BY id";
        let statement = Statement::from_string(reader.get_database_backend(), sql);
        Ok::<_, DbError>(reader.query_all_raw(statement).await?)
    });
    let rows = rows.await.unwrap();
    let written: Vec<(String, String)> =
        rows.iter().map(|row| (row.try_get("", "action").unwrap(), row.try_get("", "resources").unwrap())).collect();
    let service = "/paperkey.auth.v1.ApiKeyService";
    let expected = [
        (format!("{service}/CreateApiKey"), format!("[\"{}\"]", old.key.id)),
        (format!("{service}/RotateApiKey"), format!("[\"{}\",\"{}\"]", old.key.id, new.key.id)),
        (format!("{service}/RevokeApiKey"), format!("[\"{}\"]", new.key.id)),
    ];
    assert_eq!(written[1..], expected, "after the registration");
}

async fn nonsense_is_refused_by_its_field(database: Database) {
    let team = team(database).await;
    let now_ms = team.now_ms();
    let faults = [
        (named(""), "name"),
        (named("   "), "name"),
        (named(&"n".repeat(101)), "name"),
        (named("a\u{0}b"), "name"),
        (CreateApiKeyRequest { scopes: words(&["licenses:read", "everything"]), ..named("K") }, "scopes[1]"),
        (CreateApiKeyRequest { scopes: words(&["licenses:check"]), ..named("K") }, "scopes[0]"),
        (CreateApiKeyRequest { allowlist: words(&["10.0.0.1", "10.0.0.0/40"]), ..named("K") }, "allowlist[1]"),
        (CreateApiKeyRequest { expires_at: at(now_ms), ..named("K") }, "expires_at"),
        (CreateApiKeyRequest { expires_at: at(i64::from(i32::MAX) * 1_000_000), ..named("K") }, "expires_at"),
        (CreateApiKeyRequest { requests_per_minute: Some(0), ..named("K") }, "requests_per_minute"),
        (CreateApiKeyRequest { requests_per_minute: Some(i32::MAX), ..named("K") }, "requests_per_minute"),
        (CreateApiKeyRequest { rotate_every_days: Some(0), ..named("K") }, "rotate_every_days"),
        (CreateApiKeyRequest { rotate_every_days: Some(366), ..named("K") }, "rotate_every_days"),
        (CreateApiKeyRequest { kind: ApiKeyKind::Platform.into(), ..named("K") }, "kind"),
        (CreateApiKeyRequest { kind: ApiKeyKind::Free.into(), ..named("K") }, "kind"),
        (CreateApiKeyRequest { kind: ApiKeyKind::System.into(), ..named("K") }, "kind"),
        (CreateApiKeyRequest { mode: Mode::Test.into(), ..of_user() }, "mode"),
        (CreateApiKeyRequest { user_id: Some(team.owner.user_id.clone()), ..named("K") }, "user_id"),
    ];
    for (request, at_fault) in faults {
        assert_eq!(field(create(&team.app, &team.owner, request).await), at_fault);
    }
    let many = CreateApiKeyRequest { allowlist: vec!["10.0.0.1".into(); 101], ..named("K") };
    assert_eq!(reason(create(&team.app, &team.owner, many).await), Reason::ValidationFailed);
    for strange in [99, -1] {
        let kind = CreateApiKeyRequest { kind: strange, ..named("K") };
        assert_eq!(reason(create(&team.app, &team.owner, kind).await), Reason::ValidationFailed);
        let mode = CreateApiKeyRequest { mode: strange, ..named("K") };
        assert_eq!(reason(create(&team.app, &team.owner, mode).await), Reason::ValidationFailed);
        let scope = CreateApiKeyRequest { scope: strange, ..named("K") };
        assert_eq!(reason(create(&team.app, &team.owner, scope).await), Reason::ValidationFailed);
    }
    for hours in [-1, 169, i32::MIN] {
        let holder = team.whose(&team.live_key).await;
        assert_eq!(reason(rotate_self(&team.app, &holder, Some(hours)).await), Reason::ValidationFailed);
    }
    let maker = team.whose(&team.live_key).await;
    assert_eq!(field(make(&team.app, &maker, wished("K", Mode::Unspecified)).await), "type");
    assert_eq!(field(make(&team.app, &maker, wished(" ", Mode::Live)).await), "name");
    assert_eq!(team.list(&team.owner).await.len(), 2, "nothing came of it");
}

async fn no_answer_prints_a_token(database: Database) {
    let team = team(database).await;
    let request = CreateApiKeyRequest { ..named("Key") };
    let made = answer(client(&team.app, Some(&team.owner)).create_api_key(request).await).unwrap();
    let rotation = RotateApiKeyRequest { key_id: made.api_key.clone().unwrap().id, ..RotateApiKeyRequest::default() };
    let rotated = answer(client(&team.app, Some(&team.owner)).rotate_api_key(rotation).await).unwrap();
    let test = answer(client(&team.app, None).create_test_api_key(CreateTestApiKeyRequest {}).await).unwrap();
    let temporary = CreateTemporaryApiKeyRequest::default();
    let temporary = answer(client(&team.app, Some(&team.owner)).create_temporary_api_key(temporary).await).unwrap();
    let leaks = ReportLeakedApiKeysRequest { tokens: vec![made.key.clone(), rotated.key.clone()] };
    let printed = format!("{made:?} {rotated:?} {test:?} {temporary:?} {leaks:?}");
    for token in [&made.key, &rotated.key, &test.key, &temporary.key] {
        assert!(!printed.contains(token.as_str()), "{printed}");
    }
}

async fn a_temporary_key_is_a_test_key_of_an_hour(database: Database) {
    let team = team(database).await;
    let (registered, in_test) =
        (team.events().await.len(), Principal { mode: Mode::Test.into(), ..team.owner.clone() });
    for asker in [&team.owner, &in_test] {
        let before_ms = team.now_ms();
        let Made { key, token } = try_out(&team.app, asker).await.unwrap();
        assert_eq!(TokenKind::of(&token), Some(TokenKind::TeamTest));
        assert_eq!((key.kind(), key.mode(), key.scope()), (ApiKeyKind::Team, Mode::Test, ApiKeyScope::ReadWrite));
        assert_eq!((key.name.as_str(), key.temporary), ("Reference, ada@example.com", true));
        assert_eq!(key.scopes, create(&team.app, asker, named("Usual")).await.unwrap().key.scopes, "all of its kind");
        assert_eq!(key.creator.as_ref().unwrap().id, team.owner.user_id);
        let lived_ms = ms(key.expires_at).unwrap() - ms(key.created_at).unwrap();
        assert_eq!(lived_ms, HOUR_MS);
        assert!((before_ms..=team.now_ms()).contains(&ms(key.created_at).unwrap()));
        let holder = team.whose(&token).await;
        assert_eq!((holder.mode(), &holder.team_id, holder.read_only), (Mode::Test, &team.id, false));
        // Whoever looks after keys finds it among them, in either mode, and can tell it from the others.
        for reader in [&team.owner, &in_test] {
            assert!(team.list(reader).await.iter().any(|listed| listed.id == key.id && listed.temporary));
        }
        revoke(&team.app, &team.owner, &key.id).await.unwrap();
        assert!(team.is_refused(&token).await);
    }
    assert_eq!(team.list(&team.owner).await.iter().filter(|key| key.temporary).count(), 2);
    assert_eq!(team.audited("CreateTemporaryApiKey").await.len(), 2);
    let told = team.events().await.split_off(registered);
    let (created, test) = (&told[0], Mode::Test);
    assert_eq!((created.topic.as_str(), created.mode()), ("api_key.created", test));
    let leaked = try_out(&team.app, &team.owner).await.unwrap();
    report(&team.app, vec![leaked.token.clone()]).await.unwrap();
    assert!(team.is_refused(&leaked.token).await);
}

async fn temporary_keys_and_the_ten_are_counted_apart_also_in_a_race(database: Database) {
    let team = team(database).await;
    team.filled_to(5).await;
    let racers = (0..50).map(|number| {
        let app = Arc::clone(if number % 2 == 0 { &team.app } else { &team.other });
        let owner = team.owner.clone();
        tokio::spawn(async move {
            let temporary = number % 5 > 1;
            let outcome = if temporary {
                try_out(&app, &owner).await
            } else {
                create(&app, &owner, CreateApiKeyRequest { mode: Mode::Test.into(), ..named("Race") }).await
            };
            (temporary, outcome)
        })
    });
    let outcomes: Vec<_> = join_all(racers).await.into_iter().map(Result::unwrap).collect();
    let made = |of: bool| outcomes.iter().filter(move |(temporary, outcome)| *temporary == of && outcome.is_ok());
    assert_eq!((made(true).count(), made(false).count()), (20, 5));
    for (temporary, outcome) in &outcomes {
        if let Err(refused) = outcome {
            let says = if *temporary { "at most 20 temporary keys" } else { "at most 10 active keys" };
            assert_eq!(refused.reason(), Reason::KeyLimitReached);
            assert!(refused.message().contains(says), "{refused}");
        }
    }
    // Neither a revoked nor an ended one counts; one that is refused for now does.
    let ids: Vec<&str> = made(true).map(|(_, outcome)| outcome.as_ref().unwrap().key.id.as_str()).collect();
    revoke(&team.app, &team.owner, ids[0]).await.unwrap();
    team.run(format!("UPDATE keys SET expires_at_ms = {} WHERE id = '{}'", team.now_ms(), ids[1])).await;
    let off = UpdateApiKeyRequest { enabled: Some(false), ..patch(ids[2], &["enabled"]) };
    update(&team.app, &team.owner, off).await.unwrap();
    assert!(try_out(&team.app, &team.owner).await.is_ok() && try_out(&team.app, &team.owner).await.is_ok());
    assert_eq!(reason(try_out(&team.app, &team.owner).await), Reason::KeyLimitReached);
    assert_eq!(reason(create(&team.app, &team.owner, named("Eleventh")).await), Reason::KeyLimitReached);
}

async fn a_temporary_key_is_neither_extended_nor_rotated_and_makes_no_other(database: Database) {
    let team = team(database).await;
    let Made { key, token } = try_out(&team.app, &team.owner).await.unwrap();
    let end_ms = ms(key.expires_at).unwrap();
    for expires_at in [at(end_ms + 1), at(end_ms + DAY_MS), None] {
        let longer = UpdateApiKeyRequest { expires_at, ..patch(&key.id, &["expires_at"]) };
        assert_eq!(field(update(&team.app, &team.owner, longer).await), "expires_at");
    }
    let turning = UpdateApiKeyRequest { rotate_every_days: Some(1), ..patch(&key.id, &["rotate_every_days"]) };
    assert_eq!(field(update(&team.app, &team.owner, turning).await), "rotate_every_days");
    let (holder, maker) = (team.whose(&token).await, team.whose(&team.live_key).await);
    let refused = refusal(rotate(&team.app, &team.owner, &key.id, None).await);
    assert_eq!(refused, (Reason::Conflict, "A temporary key is not rotated; make another one".to_owned()));
    assert_eq!(refusal(rotate_self(&team.app, &holder, Some(0)).await), refused);
    assert!(rotate(&team.app, &maker, &key.id, None).await.is_err());
    assert_eq!(reason(make(&team.app, &holder, wished("Wider", Mode::Live)).await), Reason::ScopeInsufficient);
    assert_eq!(reason(make(&team.app, &holder, wished("Longer", Mode::Test)).await), Reason::ScopeInsufficient);
    // What makes it less is well.
    let sooner = UpdateApiKeyRequest {
        expires_at: at(end_ms - 60_000),
        scopes: words(&["licenses:read"]),
        ..patch(&key.id, &["expires_at", "scopes"])
    };
    let less = update(&team.app, &team.owner, sooner).await.unwrap();
    assert_eq!((ms(less.expires_at), less.scopes.len(), less.temporary), (Some(end_ms - 60_000), 1, true));
    assert_eq!(team.list(&team.owner).await.len(), 3, "nothing came of it");
    assert_eq!(team.whose(&token).await.id, key.id);
}

async fn owners_and_admins_make_temporary_keys_and_nobody_else(database: Database) {
    let team = team(database).await;
    let admin = team.joined("grace@example.com", "admin").await;
    assert_eq!(try_out(&team.app, &admin).await.unwrap().key.name, "Reference, grace@example.com");
    for (email, role) in [("m1@example.com", "manager"), ("m2@example.com", "member")] {
        let other = team.joined(email, role).await;
        assert_eq!(reason(try_out(&team.app, &other).await), Reason::RoleInsufficient, "{role}");
    }
    // What the credential said a moment ago does not count.
    team.run(format!("UPDATE memberships SET role = 'member' WHERE user_id = '{}'", admin.user_id)).await;
    assert_eq!(reason(try_out(&team.app, &admin).await), Reason::RoleInsufficient);
    team.run(format!("DELETE FROM memberships WHERE user_id = '{}'", admin.user_id)).await;
    assert_eq!(reason(try_out(&team.app, &admin).await), Reason::NotFound);
    let key = team.whose(&team.live_key).await;
    assert_eq!(reason(try_out(&team.app, &key).await), Reason::ScopeInsufficient, "people make them");
    let elsewhere = CreateTemporaryApiKeyRequest { team_id: "team_0".to_owned() };
    let refused = client(&team.app, Some(&team.owner)).create_temporary_api_key(elsewhere).await;
    assert_eq!(reason(answer(refused)), Reason::NotFound);
    assert_eq!(team.list(&team.owner).await.iter().filter(|key| key.temporary).count(), 1);
}

async fn a_temporary_key_that_has_ended_is_listed_for_a_day(database: Database) {
    let team = team(database).await;
    let (Made { key, token }, usual) = (try_out(&team.app, &team.owner).await.unwrap(), team.key("Usual").await);
    let is_listed = async |id: &str| team.list(&team.owner).await.iter().any(|listed| listed.id == id);
    let ended = async |ago_ms: i64| {
        let (end_ms, ids) = (team.now_ms() - ago_ms, [&key.id, &usual.key.id].map(|id| format!("'{id}'")).join(","));
        team.run(format!("UPDATE keys SET expires_at_ms = {end_ms} WHERE id IN ({ids})")).await;
    };
    ended(0).await;
    assert!(team.is_refused(&token).await);
    assert_eq!(team.get(&team.owner, &key.id).await.unwrap().status(), ApiKeyStatus::Expired);
    ended(DAY_MS - HOUR_MS).await;
    assert!(is_listed(&key.id).await && is_listed(&usual.key.id).await);
    ended(DAY_MS).await;
    assert!(!is_listed(&key.id).await && is_listed(&usual.key.id).await);
    assert_eq!(reason(team.get(&team.owner, &key.id).await), Reason::NotFound);
}
