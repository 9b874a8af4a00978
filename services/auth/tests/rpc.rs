//! The rpcs, as callers of every kind meet them, nonsense included.

#[expect(dead_code, reason = "the other tests of this crate use the rest")]
mod common;

use common::{App, PASSWORD, fresh, reason, refusal, registration};
use paperkey_kit::{
    clock::{Clock, ManualClock},
    config::Tiers,
    db::Database,
    events::PRODUCT_DELETED,
    secrets::Secret,
    testing::TestDb,
    token::TokenKind,
};
use paperkey_proto::{
    auth::v1::RegisterRequest,
    errors::v1::Reason,
    events::v1::Event,
    options::v1::{Caller, Scope},
    principal::v1::{Mode, Principal, Role},
};

const START_MS: i64 = 1_790_000_000_000;
const DAY_MS: i64 = 24 * 60 * 60 * 1_000;

struct Bench {
    app: App,
    hand: ManualClock,
    db: TestDb,
}

async fn database() -> (TestDb, Database, ManualClock) {
    let db = TestDb::sqlite();
    let (clock, hand) = Clock::manual(START_MS);
    let mut options = db.options();
    options.clock = clock;
    let database = Database::open(options).await.unwrap();
    database.migrate_up::<paperkey_migrations::auth::Migrator>().await.unwrap();
    (db, database, hand)
}

async fn bench() -> Bench {
    let (db, database, hand) = database().await;
    Bench { app: App::new(database), hand, db }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registration_answers_everything_once() {
    let Bench { app, db: _db, .. } = bench().await;
    let request = RegisterRequest { name: Some("  Ada L. ".into()), ..registration("Ada@Example.com") };
    let answer = app.register(request).await.unwrap();
    let (user, team) = (answer.user.unwrap(), answer.team.unwrap());
    assert_eq!((user.email.as_str(), user.name.as_deref()), ("Ada@Example.com", Some("Ada L.")));
    assert_eq!((team.name.as_str(), team.role(), team.tier.as_str()), ("Ada L.'s team", Role::Owner, "free"));
    assert_eq!(user.created_at.unwrap().seconds, START_MS / 1_000);
    assert_eq!(TokenKind::of(&answer.free_key), Some(TokenKind::Free));
    assert_eq!(TokenKind::of(&answer.live_key), Some(TokenKind::PlatformLive));
    let again = app.login("aDA@example.COM", PASSWORD).await.unwrap();
    assert_eq!(again.user.unwrap(), user);
    assert_ne!(again.token, answer.token);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registration_with_faults_names_them() {
    let Bench { app, db: _db, .. } = bench().await;
    let faults = [
        (RegisterRequest { email: "ada".into(), ..registration("") }, "email"),
        (registration(""), "email"),
        (RegisterRequest { password: "1234567".into(), ..registration("a@b.example") }, "password"),
        (RegisterRequest { password: "x".repeat(257), ..registration("a@b.example") }, "password"),
        (RegisterRequest { name: Some("n".repeat(101)), ..registration("a@b.example") }, "name"),
        (RegisterRequest { name: Some("A\u{0}da".into()), ..registration("a@b.example") }, "name"),
    ];
    for (request, field) in faults {
        let error = app.register(request).await.unwrap_err();
        assert_eq!(error.reason(), Reason::ValidationFailed);
        assert_eq!(error.violations().first().map(|violation| violation.field.as_str()), Some(field));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_closed_installation_takes_no_registration_but_sign_ins() {
    let (_db, database, _) = database().await;
    let app = App::with_registration(database, false);
    assert_eq!(reason(app.register(registration("ada@example.com")).await), Reason::RegistrationClosed);
    let made = app.admin.create_account("ada@example.com", Secret::new(PASSWORD), None).await.unwrap();
    let token = app.login("ada@example.com", PASSWORD).await.unwrap().token;
    let principal = app.authenticate(&token).await.unwrap();
    assert_eq!((principal.user_id, principal.team_id), (made.user_id, made.team_id));
    assert_eq!(app.authenticate(made.live_key.expose()).await.unwrap().kind(), Caller::TeamKey);
    assert_eq!(app.authenticate(made.free_key.expose()).await.unwrap().kind(), Caller::FreeKey);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_email_and_a_wrong_password_look_alike() {
    let Bench { app, db: _db, .. } = bench().await;
    app.registered("ada@example.com").await;
    let expected = (Reason::InvalidCredentials, "Email or password is wrong".to_owned());
    for (email, password) in
        [("ada@example.com", "wrong"), ("eve@example.com", PASSWORD), ("x", PASSWORD), ("a\u{7f}@b", "\u{7f}")]
    {
        assert_eq!(refusal(app.login(email, password).await), expected, "{email:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_acts_in_the_team_and_mode_that_it_names() {
    let Bench { app, db: _db, .. } = bench().await;
    let ada = app.registered("ada@example.com").await;
    let team = ada.team.unwrap().id;
    let principal = app.authenticate_in(&ada.token, &team, Mode::Test).await.unwrap();
    assert_eq!((principal.team_id.as_str(), principal.mode()), (team.as_str(), Mode::Test));
    let eve = app.registered("eve@example.com").await;
    let absent = (Reason::NotFound, "No such team".to_owned());
    for other in [team.as_str(), "team_0", "team_\u{0}", "'; DROP TABLE teams", &"t".repeat(60_000)] {
        assert_eq!(refusal(app.authenticate_in(&eve.token, other, Mode::Live).await), absent);
    }
    // Who has no good session learns nothing of teams.
    assert_eq!(reason(app.authenticate_in("nonsense", &team, Mode::Live).await), Reason::InvalidCredentials);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_keeps_its_own_team_and_mode() {
    let Bench { app, db: _db, .. } = bench().await;
    let ada = app.registered("ada@example.com").await;
    let eve = app.registered("eve@example.com").await.team.unwrap().id;
    let principal = app.authenticate_in(&ada.live_key, &eve, Mode::Test).await.unwrap();
    assert_eq!((principal.mode(), principal.team_id), (Mode::Live, ada.team.unwrap().id));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_system_key_acts_on_the_team_that_it_names() {
    let Bench { app, db: _db, .. } = bench().await;
    let team = app.registered("ada@example.com").await.team.unwrap().id;
    let key = app.system_key().await;
    let principal = app.authenticate_in(key.expose(), &team, Mode::Test).await.unwrap();
    assert_eq!((principal.team_id.as_str(), principal.mode()), (team.as_str(), Mode::Test));
    assert_eq!(principal.subjects, [format!("key:{}", principal.id), format!("team:{team}")]);
    for absent in ["team_0", "\u{0}"] {
        assert_eq!(refusal(app.authenticate_in(key.expose(), absent, Mode::Live).await).1, "No such team");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_and_free_keys_end_by_time() {
    let Bench { app, hand, db: _db } = bench().await;
    let ada = app.registered("ada@example.com").await;
    assert_eq!(app.authenticate(&ada.token).await.unwrap().expires_at_ms, START_MS + 7 * DAY_MS);
    assert_eq!(app.authenticate(&ada.free_key).await.unwrap().expires_at_ms, START_MS + 28 * DAY_MS);
    hand.advance_ms(7 * DAY_MS);
    assert_eq!(reason(app.authenticate(&ada.token).await), Reason::InvalidCredentials);
    assert!(app.authenticate(&ada.free_key).await.is_ok());
    hand.advance_ms(21 * DAY_MS);
    assert_eq!(reason(app.authenticate(&ada.free_key).await), Reason::InvalidCredentials);
    assert!(app.authenticate(&ada.live_key).await.is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn every_bad_credential_is_refused_alike() {
    let Bench { app, db: _db, .. } = bench().await;
    let ada = app.registered("ada@example.com").await;
    let mut bad: Vec<String> = TokenKind::ALL.iter().map(|kind| kind.generate()).collect();
    bad.extend(["nonsense", "a.b.c", "é", "\u{0}", "pk_live_", " "].map(str::to_owned));
    bad.push("x".repeat(60_000));
    bad.push(format!("{}A", ada.token));
    bad.push(format!(" {}", ada.live_key));
    bad.push(ada.live_key.replace("pb_live_", "pb_test_"));
    for credential in bad {
        let expected = (Reason::InvalidCredentials, "Invalid or missing API token".to_owned());
        assert_eq!(refusal(app.authenticate(&credential).await), expected, "{credential:.80}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_malformed_credential_does_not_reach_the_database() {
    let Bench { app, db: _db, .. } = bench().await;
    let ada = app.registered("ada@example.com").await;
    let mut mistyped = ada.live_key.clone();
    mistyped.pop();
    assert!(app.authenticate(&ada.live_key).await.is_ok(), "the first use is written down");
    let before = app.database.stats().statements();
    let tampered = format!("{}A", ada.token);
    for malformed in ["nonsense", "a.b.c", "po_sk_", mistyped.as_str(), tampered.as_str()] {
        assert!(app.authenticate(malformed).await.is_err());
    }
    assert_eq!(app.database.stats().statements(), before);
    assert!(app.authenticate(&ada.live_key).await.is_ok());
    assert_eq!(app.database.stats().statements(), before + 1, "a good one is one look-up");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_halves_of_a_pair_are_told_apart() {
    let Bench { app, db: _db, .. } = bench().await;
    let team = app.registered("ada@example.com").await.team.unwrap().id;
    let made = app.provision("prod_1", &team, Mode::Test).await.unwrap();
    let pair = made.api_key.unwrap();
    assert_eq!((pair.product_id.as_str(), pair.mode()), ("prod_1", Mode::Test));
    assert_eq!(pair.secret_key_prefix, made.secret_key[..7]);
    let public = app.authenticate(&pair.public_key).await.unwrap();
    let secret = app.authenticate(&made.secret_key).await.unwrap();
    assert_eq!((public.kind(), secret.kind()), (Caller::ProductPublicKey, Caller::ProductSecretKey));
    assert_eq!(public.scopes().collect::<Vec<_>>(), [Scope::LicensesCheck]);
    assert_eq!(
        secret.scopes().collect::<Vec<_>>(),
        [Scope::LicensesRead, Scope::LicensesWrite, Scope::WebhooksRead, Scope::WebhooksWrite]
    );
    for half in [public, secret] {
        assert_eq!((half.id.as_str(), half.product_id.as_str()), (pair.id.as_str(), "prod_1"));
        assert_eq!((half.team_id.as_str(), half.mode(), half.tier.as_str()), (team.as_str(), Mode::Test, "free"));
        assert_eq!(half.subjects, [format!("key:{}", pair.id), format!("team:{team}")]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_provisioning_whose_answer_was_lost_can_be_repeated_within_the_limit() {
    let Bench { app, db: _db, .. } = bench().await;
    let team = app.registered("ada@example.com").await.team.unwrap().id;
    for _ in 0..10 {
        let made = app.provision("prod_1", &team, Mode::Unspecified).await.unwrap();
        assert_eq!(app.authenticate(&made.secret_key).await.unwrap().mode(), Mode::Live);
    }
    assert_eq!(reason(app.provision("prod_1", &team, Mode::Live).await), Reason::KeyLimitReached);
    assert_eq!(reason(app.provision("prod\u{0}", &team, Mode::Live).await), Reason::ValidationFailed);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revocation_empties_the_caches_of_this_process_before_it_is_answered() {
    let Bench { app, db: _db, .. } = bench().await;
    let ada = app.registered("ada@example.com").await;
    let owner = app.authenticate(&ada.token).await.unwrap();
    let made = app.provision("prod_1", &owner.team_id, Mode::Live).await.unwrap();
    let principal = app.authenticate(&made.secret_key).await.unwrap();
    let remembered = app.remember(&principal);
    assert!(remembered.is_served());
    app.delete_pair(&owner, "prod_1", &principal.id).await.unwrap();
    assert!(!remembered.is_served());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pair_revoked_long_ago_is_no_longer_listed() {
    let Bench { app, hand, db: _db } = bench().await;
    let ada = app.registered("ada@example.com").await;
    let owner = Principal { expires_at_ms: 0, ..app.authenticate(&ada.token).await.unwrap() };
    let made = app.provision("prod_1", &owner.team_id, Mode::Live).await.unwrap().api_key.unwrap();
    app.create_pair(&owner, "prod_1").await.unwrap();
    app.delete_pair(&owner, "prod_1", &made.id).await.unwrap();
    assert_eq!(app.list_pairs(&owner, "prod_1", None, "").await.unwrap().api_keys.len(), 2);
    hand.advance_ms(90 * DAY_MS);
    assert_eq!(app.list_pairs(&owner, "prod_1", None, "").await.unwrap().api_keys.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn strange_ids_and_pages_are_refused_politely() {
    let Bench { app, db: _db, .. } = bench().await;
    let ada = app.registered("ada@example.com").await;
    let owner = app.authenticate(&ada.token).await.unwrap();
    app.provision("prod_1", &owner.team_id, Mode::Live).await.unwrap();
    for strange in ["prod_0", "\u{7f}", "' OR 1=1 --", "é"] {
        assert_eq!(refusal(app.create_pair(&owner, strange).await).1, "No such product");
        assert_eq!(refusal(app.list_pairs(&owner, strange, None, "").await).1, "No such product");
        assert_eq!(refusal(app.delete_pair(&owner, strange, "key_1").await).1, "No such product");
        assert_eq!(refusal(app.delete_pair(&owner, "prod_1", strange).await).1, "No such key");
    }
    for (size, token) in [(Some(0), ""), (Some(-1), ""), (None, "%"), (None, "AA"), (None, "\u{0}")] {
        let outcome = app.list_pairs(&owner, "prod_1", size, token).await;
        assert_eq!(reason(outcome), Reason::ValidationFailed, "{size:?} {token:?}");
    }
    assert!(app.list_pairs(&owner, "prod_1", Some(i32::MAX), "").await.is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn roles_and_kinds_are_held_to_the_contract() {
    let Bench { app, db: _db, .. } = bench().await;
    let ada = app.registered("ada@example.com").await;
    let owner = app.authenticate(&ada.token).await.unwrap();
    let made = app.provision("prod_1", &owner.team_id, Mode::Live).await.unwrap();
    let member = Principal { role: Role::Member.into(), ..owner.clone() };
    assert!(app.list_pairs(&member, "prod_1", None, "").await.is_ok());
    assert_eq!(reason(app.create_pair(&member, "prod_1").await), Reason::RoleInsufficient);
    for token in [&made.secret_key, &ada.live_key] {
        let key = app.authenticate(token).await.unwrap();
        assert_eq!(reason(app.create_pair(&key, "prod_1").await), Reason::ScopeInsufficient);
        assert_eq!(reason(app.me(&key).await), Reason::ScopeInsufficient);
    }
    let teamless = Principal { team_id: String::new(), role: Role::Owner.into(), ..owner };
    assert_eq!(reason(app.create_pair(&teamless, "prod_1").await), Reason::NotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_status_tells_whose_key_was_sent() {
    let Bench { app, db: _db, .. } = bench().await;
    let ada = app.registered("ada@example.com").await;
    let nobody = app.status(None).await.unwrap();
    assert_eq!((nobody.status.as_str(), nobody.version.as_str(), nobody.caller), ("ok", "1.2.3", None));
    assert_eq!(nobody.time.unwrap().seconds, START_MS / 1_000);
    let key = app.authenticate(&ada.live_key).await.unwrap();
    let owner = app.status(Some(&key)).await.unwrap().caller.unwrap();
    assert_eq!((owner.id, owner.name.as_str(), owner.team_id), (key.id, "First live key", Some(key.team_id)));
    let system = app.system_key().await;
    let system = app.authenticate(system.expose()).await.unwrap();
    assert_eq!(app.status(Some(&system)).await.unwrap().caller.unwrap().team_id, None);
    let account = app.authenticate(&ada.token).await.unwrap();
    assert_eq!(app.status(Some(&account)).await.unwrap().caller, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_are_told_from_where_the_asker_was() {
    let Bench { app, db: _db, .. } = bench().await;
    let team = app.registered("ada@example.com").await.team.unwrap().id;
    let newest = app.changes(-1).await;
    assert_eq!((newest.subjects.len(), newest.gap), (0, false));
    app.admin.set_tier(&Tiers::default(), &team, "pro").await.unwrap();
    let next = app.changes(newest.seq).await;
    assert_eq!((next.seq, next.gap), (newest.seq + 1, false));
    assert_eq!(next.subjects, [format!("team:{team}")]);
    let future = app.changes(i64::MAX).await;
    assert_eq!((future.seq, future.gap), (next.seq, true));
    assert_eq!(app.changes(i64::MIN).await.seq, next.seq);
}

#[tokio::test(flavor = "multi_thread")]
async fn events_that_say_nothing_to_us_are_passed_over() {
    let Bench { app, db: _db, .. } = bench().await;
    let team = app.registered("ada@example.com").await.team.unwrap().id;
    let made = app.provision("prod_1", &team, Mode::Live).await.unwrap();
    let event = |topic: &str, product: &str, mode: Mode| Event {
        id: fresh("evt"),
        topic: topic.to_owned(),
        team_id: team.clone(),
        mode: mode.into(),
        product_id: product.to_owned(),
        ..Event::default()
    };
    app.ingest(vec![
        event("license.created", "prod_1", Mode::Live),
        event(PRODUCT_DELETED, "", Mode::Live),
        event(PRODUCT_DELETED, "prod_1", Mode::Unspecified),
        event(PRODUCT_DELETED, "prod_1", Mode::Test),
        event(PRODUCT_DELETED, "\u{0}", Mode::Live),
        Event::default(),
    ])
    .await
    .unwrap();
    assert!(app.authenticate(&made.secret_key).await.is_ok());
    app.ingest(vec![]).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn who_has_no_team_still_is_someone() {
    use sea_orm::ConnectionTrait as _;
    let Bench { app, db: _db, .. } = bench().await;
    let ada = app.registered("ada@example.com").await;
    app.database
        .write(|tx| async move {
            tx.execute_unprepared("DELETE FROM memberships").await?;
            Ok::<_, paperkey_kit::db::DbError>(())
        })
        .await
        .unwrap();
    let principal = app.authenticate(&ada.token).await.unwrap();
    assert_eq!((principal.team_id.as_str(), principal.role()), ("", Role::Unspecified));
    assert_eq!(principal.subjects, [format!("user:{}", principal.id)]);
    let me = app.me(&principal).await.unwrap();
    assert_eq!((me.user.unwrap().id, me.teams.len()), (principal.id, 0));
    let asked = app.authenticate_in(&ada.token, &ada.team.unwrap().id, Mode::Live).await;
    assert_eq!(refusal(asked).1, "No such team");
}

#[tokio::test(flavor = "multi_thread")]
async fn whose_password_the_operator_has_set_is_told() {
    let Bench { app, db: _db, .. } = bench().await;
    app.registered("ada@example.com").await;
    app.admin.reset_password("ada@example.com", Secret::new("another horse")).await.unwrap();
    let mails = app.mails().await;
    assert_eq!(mails.len(), 1);
    assert!(mails[0].contains("To: ada@example.com") && !mails[0].contains("another horse"), "{}", mails[0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn no_message_that_holds_a_secret_prints_it() {
    let Bench { app, db: _db, .. } = bench().await;
    let request = registration("ada@example.com");
    let before = format!("{request:?}");
    let ada = app.register(request).await.unwrap();
    let login = app.login("ada@example.com", PASSWORD).await.unwrap();
    let team = ada.team.clone().unwrap().id;
    let made = app.provision("prod_1", &team, Mode::Live).await.unwrap();
    let owner = app.authenticate(&ada.token).await.unwrap();
    let pair = app.create_pair(&owner, "prod_1").await.unwrap();
    let system = app.system_key().await;
    let operator = app.admin.create_account("eve@example.com", Secret::new(PASSWORD), None).await.unwrap();
    let admin = &app.admin;
    let printed = format!("{before} {ada:?} {login:?} {made:?} {owner:?} {pair:?} {system:?} {operator:?} {admin:?}");
    let secrets = [
        PASSWORD,
        &ada.token,
        &ada.free_key,
        &ada.live_key,
        &login.token,
        &made.secret_key,
        &pair.secret_key,
        system.expose(),
        operator.live_key.expose(),
    ];
    for secret in secrets {
        assert!(!printed.contains(secret));
    }
}
