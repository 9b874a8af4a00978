//! What is stored, raced for and revoked: the same on SQLite and on PostgreSQL.

#[expect(dead_code, reason = "the other tests of this crate use the rest")]
mod common;
mod people;

use std::{collections::BTreeSet, sync::Arc};

use common::{App, PASSWORD, fresh, put_system_key, reason, refusal, registration};
use futures_util::future::join_all;
use paperkey_auth::admin::Existing;
use paperkey_kit::{
    config::Tiers,
    db::{Database, MigrationState},
    events::PRODUCT_DELETED,
    secrets::Secret,
    store_suite,
    token::TokenKind,
};
use paperkey_proto::{
    Error,
    auth::v1::RegisterResponse,
    errors::v1::Reason,
    events::v1::Event,
    options::v1::{Caller, Scope},
    principal::v1::{Mode, Principal, Role},
};

store_suite! {
    paperkey_migrations::auth::Migrator;
    of_twenty_registrations_of_one_email_one_succeeds,
    an_account_comes_back_with_its_team_and_keys,
    of_twenty_new_pairs_beside_five_exactly_five_are_made,
    a_revoked_pair_is_refused_at_once_and_makes_room,
    a_page_of_pairs_goes_on_where_the_last_one_ended,
    the_pairs_of_a_tenant_are_there_for_nobody_else,
    a_deleted_product_takes_its_pairs_along_once,
    a_product_deleted_before_it_was_known_stays_deleted,
    deleting_a_product_while_pairs_are_made_leaves_none,
    a_tier_is_set_and_announced,
    a_new_password_ends_the_sessions_before_it,
    one_of_many_first_starts_gets_the_system_key,
    a_rotated_system_key_works_for_a_day_more_or_ends_at_once,
    of_many_rotations_one_system_key_is_left,
    every_change_stands_in_the_audit_log,
    the_schema_goes_down_and_up_again_and_what_is_there_stays,
}

struct Shop {
    app: Arc<App>,
    owner: Principal,
    team_id: String,
    registered: RegisterResponse,
}

/// An account whose owner has signed in.
async fn shop(database: Database) -> Shop {
    let app = Arc::new(App::new(database));
    let registered = app.registered("ada@example.com").await;
    let owner = app.authenticate(&registered.token).await.unwrap();
    Shop { team_id: registered.team.clone().unwrap().id, app, owner, registered }
}

impl Shop {
    async fn product(&self) -> String {
        let product = fresh("prod");
        self.app.provision(&product, &self.team_id, Mode::Live).await.unwrap();
        product
    }
}

fn deleted(product: &str, team: &str) -> Event {
    Event {
        id: fresh("evt"),
        topic: PRODUCT_DELETED.to_owned(),
        team_id: team.to_owned(),
        mode: Mode::Live.into(),
        product_id: product.to_owned(),
        ..Event::default()
    }
}

async fn of_twenty_registrations_of_one_email_one_succeeds(database: Database) {
    let app = Arc::new(App::new(database));
    let racers = (0..20).map(|number| {
        let app = Arc::clone(&app);
        let email = if number % 2 == 0 { "Ada@Example.com" } else { "ada@example.com" };
        tokio::spawn(async move { app.register(registration(email)).await })
    });
    let outcomes: Vec<_> = join_all(racers).await.into_iter().map(Result::unwrap).collect();
    let (made, refused): (Vec<_>, Vec<_>) = outcomes.into_iter().partition(Result::is_ok);
    assert_eq!(made.len(), 1);
    for refused in refused {
        assert_eq!(refusal(refused), (Reason::Conflict, "An account with this email exists".to_owned()));
    }
    let me = app.authenticate(&app.login("ada@example.com", PASSWORD).await.unwrap().token).await.unwrap();
    assert_eq!(app.me(&me).await.unwrap().teams.len(), 1);
}

async fn an_account_comes_back_with_its_team_and_keys(database: Database) {
    let Shop { app, owner, team_id, registered } = shop(database).await;
    let user = registered.user.unwrap();
    assert_eq!((owner.kind(), owner.role(), owner.mode()), (Caller::Account, Role::Owner, Mode::Live));
    assert_eq!((&owner.id, &owner.user_id, owner.name.as_str()), (&user.id, &user.id, "ada@example.com"));
    assert_eq!((&owner.team_id, owner.tier.as_str()), (&team_id, "free"));
    assert_eq!(owner.subjects, [format!("user:{}", user.id), format!("team:{team_id}")]);
    let me = app.me(&owner).await.unwrap();
    assert_eq!(me.user.unwrap(), user);
    assert_eq!(me.teams, [registered.team.unwrap()]);

    let live = app.authenticate(&registered.live_key).await.unwrap();
    assert_eq!((live.kind(), live.mode(), live.read_only), (Caller::TeamKey, Mode::Live, false));
    assert_eq!((&live.team_id, live.expires_at_ms, live.tier.as_str()), (&team_id, 0, "free"));
    assert_eq!(live.subjects, [format!("key:{}", live.id), format!("team:{team_id}")]);
    assert!(live.scopes().any(|scope| scope == Scope::KeysWrite));
    assert!(live.user_id.is_empty() && live.role() == Role::Unspecified);
    let free = app.authenticate(&registered.free_key).await.unwrap();
    assert_eq!((free.kind(), &free.team_id), (Caller::FreeKey, &team_id));
    let days_28 = 28 * 24 * 60 * 60 * 1_000;
    let now_ms = app.database.clock().now_ms();
    assert!((now_ms..=now_ms + days_28).contains(&free.expires_at_ms));
}

async fn of_twenty_new_pairs_beside_five_exactly_five_are_made(database: Database) {
    let shop = shop(database).await;
    let product = shop.product().await;
    for _ in 1..5 {
        shop.app.create_pair(&shop.owner, &product).await.unwrap();
    }
    let racers = (0..20).map(|_| {
        let (app, owner, product) = (Arc::clone(&shop.app), shop.owner.clone(), product.clone());
        tokio::spawn(async move { app.create_pair(&owner, &product).await })
    });
    let outcomes: Vec<_> = join_all(racers).await.into_iter().map(Result::unwrap).collect();
    let (made, refused): (Vec<_>, Vec<_>) = outcomes.into_iter().partition(Result::is_ok);
    assert_eq!(made.len(), 5);
    assert!(refused.into_iter().all(|refused| reason(refused) == Reason::KeyLimitReached));
    let listed = shop.app.list_pairs(&shop.owner, &product, None, "").await.unwrap();
    assert_eq!((listed.api_keys.len(), listed.next_page_token), (10, None));
}

async fn a_revoked_pair_is_refused_at_once_and_makes_room(database: Database) {
    let shop = shop(database).await;
    let product = shop.product().await;
    let mut pairs = Vec::new();
    for _ in 1..10 {
        pairs.push(shop.app.create_pair(&shop.owner, &product).await.unwrap());
    }
    assert_eq!(reason(shop.app.create_pair(&shop.owner, &product).await), Reason::KeyLimitReached);

    let pair = pairs.remove(3);
    let key = pair.api_key.unwrap();
    assert_eq!(shop.app.authenticate(&pair.secret_key).await.unwrap().kind(), Caller::ProductSecretKey);
    assert_eq!(shop.app.authenticate(&key.public_key).await.unwrap().kind(), Caller::ProductPublicKey);
    let before = shop.app.changes(-1).await.seq;
    shop.app.delete_pair(&shop.owner, &product, &key.id).await.unwrap();
    for token in [&pair.secret_key, &key.public_key] {
        assert_eq!(reason(shop.app.authenticate(token).await), Reason::InvalidCredentials);
    }
    assert_eq!(shop.app.changes(before).await.subjects, [format!("key:{}", key.id)]);
    let again = shop.app.delete_pair(&shop.owner, &product, &key.id).await;
    assert_eq!(refusal(again), (Reason::NotFound, "No such key".to_owned()));

    let listed = shop.app.list_pairs(&shop.owner, &product, None, "").await.unwrap();
    let revoked = listed.api_keys.into_iter().find(|listed| listed.id == key.id).unwrap();
    assert!(revoked.revoked_at.is_some());
    assert_eq!(revoked.revoked_by.as_ref(), Some(&shop.owner.user_id));
    shop.app.create_pair(&shop.owner, &product).await.unwrap();
    assert_eq!(reason(shop.app.create_pair(&shop.owner, &product).await), Reason::KeyLimitReached);
}

async fn a_page_of_pairs_goes_on_where_the_last_one_ended(database: Database) {
    let shop = shop(database).await;
    let product = shop.product().await;
    let mut made = BTreeSet::new();
    for _ in 1..7 {
        made.insert(shop.app.create_pair(&shop.owner, &product).await.unwrap().api_key.unwrap().id);
    }
    let (mut seen, mut token) = (Vec::new(), String::new());
    loop {
        let page = shop.app.list_pairs(&shop.owner, &product, Some(3), &token).await.unwrap();
        assert!(page.api_keys.len() <= 3);
        seen.extend(page.api_keys.into_iter().map(|pair| pair.id));
        match page.next_page_token {
            Some(next) => token = next,
            None => break,
        }
    }
    assert_eq!(seen.len(), 7);
    assert!(seen.is_sorted_by(|earlier, later| earlier > later), "newest first");
    assert!(made.is_subset(&seen.into_iter().collect()));
}

async fn the_pairs_of_a_tenant_are_there_for_nobody_else(database: Database) {
    let shop = shop(database).await;
    let product = shop.product().await;
    let key = shop.app.create_pair(&shop.owner, &product).await.unwrap().api_key.unwrap();
    let eve = shop.app.registered("eve@example.com").await;
    let foreign = shop.app.authenticate(&eve.token).await.unwrap();
    let test_mode = Principal { mode: Mode::Test.into(), ..shop.owner.clone() };
    let absent = (Reason::NotFound, "No such product".to_owned());
    for other in [&foreign, &test_mode] {
        assert_eq!(refusal(shop.app.create_pair(other, &product).await), absent);
        assert_eq!(refusal(shop.app.list_pairs(other, &product, None, "").await), absent);
        assert_eq!(refusal(shop.app.delete_pair(other, &product, &key.id).await), absent);
    }
    // Nor can a team take a product over by provisioning it once more, nor have it deleted.
    assert_eq!(refusal(shop.app.provision(&product, &foreign.team_id, Mode::Live).await), absent);
    assert_eq!(refusal(shop.app.provision(&product, &shop.team_id, Mode::Test).await), absent);
    shop.app.ingest(vec![deleted(&product, &foreign.team_id)]).await.unwrap();
    assert!(shop.app.authenticate(&key.public_key).await.is_ok());
    // A key of one product is not there under another product of the same team.
    let sibling = shop.product().await;
    let crossed = shop.app.delete_pair(&shop.owner, &sibling, &key.id).await;
    assert_eq!(refusal(crossed), (Reason::NotFound, "No such key".to_owned()));
}

async fn a_deleted_product_takes_its_pairs_along_once(database: Database) {
    let shop = shop(database).await;
    let (product, sibling) = (shop.product().await, shop.product().await);
    let pair = shop.app.create_pair(&shop.owner, &product).await.unwrap();
    let other = shop.app.create_pair(&shop.owner, &sibling).await.unwrap();
    let before = shop.app.changes(-1).await.seq;
    let event = deleted(&product, &shop.team_id);
    shop.app.ingest(vec![event.clone(), event.clone()]).await.unwrap();
    shop.app.ingest(vec![event]).await.unwrap();
    let announced = shop.app.changes(before).await.subjects;
    assert_eq!(announced.len(), 2, "each of the two pairs once: {announced:?}");
    assert!(announced.contains(&format!("key:{}", pair.api_key.as_ref().unwrap().id)));
    assert_eq!(reason(shop.app.authenticate(&pair.secret_key).await), Reason::InvalidCredentials);
    assert!(shop.app.authenticate(&other.secret_key).await.is_ok());
    for refused in [
        refusal(shop.app.create_pair(&shop.owner, &product).await),
        refusal(shop.app.list_pairs(&shop.owner, &product, None, "").await),
        refusal(shop.app.delete_pair(&shop.owner, &product, &pair.api_key.unwrap().id).await),
    ] {
        assert_eq!(refused, (Reason::NotFound, "No such product".to_owned()));
    }
}

async fn a_product_deleted_before_it_was_known_stays_deleted(database: Database) {
    let shop = shop(database).await;
    let product = fresh("prod");
    shop.app.ingest(vec![deleted(&product, &shop.team_id)]).await.unwrap();
    assert_eq!(reason(shop.app.provision(&product, &shop.team_id, Mode::Live).await), Reason::NotFound);
}

async fn deleting_a_product_while_pairs_are_made_leaves_none(database: Database) {
    let shop = shop(database).await;
    let product = shop.product().await;
    let makers: Vec<_> = (0..8)
        .map(|_| {
            let (app, owner, product) = (Arc::clone(&shop.app), shop.owner.clone(), product.clone());
            tokio::spawn(async move { app.create_pair(&owner, &product).await })
        })
        .collect();
    shop.app.ingest(vec![deleted(&product, &shop.team_id)]).await.unwrap();
    for made in join_all(makers).await {
        match made.unwrap() {
            Ok(pair) => {
                assert_eq!(reason(shop.app.authenticate(&pair.secret_key).await), Reason::InvalidCredentials);
            }
            Err(error) => assert_eq!(error.reason(), Reason::NotFound),
        }
    }
}

async fn a_tier_is_set_and_announced(database: Database) {
    let shop = shop(database).await;
    let before = shop.app.changes(-1).await.seq;
    let remembered = shop.app.remember(&shop.owner);
    shop.app.admin.set_tier(&Tiers::default(), &shop.team_id, "pro").await.unwrap();
    assert!(!remembered.is_served());
    assert_eq!(shop.app.changes(before).await.subjects, [format!("team:{}", shop.team_id)]);
    assert_eq!(shop.app.authenticate(&shop.registered.live_key).await.unwrap().tier, "pro");
    assert_eq!(shop.app.authenticate(&shop.registered.token).await.unwrap().tier, "pro");
    assert_eq!(
        reason(shop.app.admin.set_tier(&Tiers::default(), &shop.team_id, "gold").await),
        Reason::ValidationFailed
    );
    for absent in ["team_0", "", "team_\u{0}"] {
        assert_eq!(refusal(shop.app.admin.set_tier(&Tiers::default(), absent, "pro").await).1, "No such team");
    }
}

async fn a_new_password_ends_the_sessions_before_it(database: Database) {
    let shop = shop(database).await;
    let before = shop.app.changes(-1).await.seq;
    shop.app.admin.reset_password(" ADA@example.com", Secret::new("another horse")).await.unwrap();
    assert_eq!(shop.app.changes(before).await.subjects, [format!("user:{}", shop.owner.id)]);
    assert_eq!(reason(shop.app.authenticate(&shop.registered.token).await), Reason::InvalidCredentials);
    assert_eq!(reason(shop.app.login("ada@example.com", PASSWORD).await), Reason::InvalidCredentials);
    let token = shop.app.login("ada@example.com", "another horse").await.unwrap().token;
    assert!(shop.app.authenticate(&token).await.is_ok());
    assert!(shop.app.authenticate(&shop.registered.live_key).await.is_ok(), "keys are none of the account's sessions");
    let short = shop.app.admin.reset_password("ada@example.com", Secret::new("short")).await;
    assert_eq!(reason(short), Reason::ValidationFailed);
    let unknown = shop.app.admin.reset_password("eve@example.com", Secret::new(PASSWORD)).await;
    assert_eq!(reason(unknown), Reason::NotFound);
}

async fn one_of_many_first_starts_gets_the_system_key(database: Database) {
    let app = Arc::new(App::new(database));
    let starts = (0..8).map(|_| {
        let admin = app.admin.clone();
        tokio::spawn(async move { put_system_key(&admin, Existing::Stays).await.unwrap() })
    });
    let got: Vec<_> = join_all(starts).await.into_iter().filter_map(Result::unwrap).collect();
    assert_eq!(got.len(), 1);
    assert_eq!(TokenKind::of(got[0].expose()), Some(TokenKind::System));
    let principal = app.authenticate(got[0].expose()).await.unwrap();
    assert_eq!((principal.kind(), principal.team_id.as_str()), (Caller::SystemKey, ""));
    assert_eq!(principal.subjects, [format!("key:{}", principal.id)]);
    assert!(principal.scopes().any(|scope| scope == Scope::AuditRead));
    assert!(put_system_key(&app.admin, Existing::Stays).await.unwrap().is_none());
}

async fn a_rotated_system_key_works_for_a_day_more_or_ends_at_once(database: Database) {
    let app = App::new(database);
    let old = app.system_key().await;
    let id = app.authenticate(old.expose()).await.unwrap().id;
    let before = app.changes(-1).await.seq;
    let new = put_system_key(&app.admin, Existing::Overlaps).await.unwrap().unwrap();
    assert_eq!(app.changes(before).await.subjects, [format!("key:{id}")]);
    let (replaced, current) =
        (app.authenticate(old.expose()).await.unwrap(), app.authenticate(new.expose()).await.unwrap());
    let day_ms = 24 * 60 * 60 * 1_000;
    assert!(replaced.superseded && replaced.expires_at_ms <= app.database.clock().now_ms() + day_ms);
    assert!(!current.superseded && current.expires_at_ms == 0 && current.kind() == Caller::SystemKey);
    assert_eq!((replaced.lineage.as_str(), &current.lineage), ("", &id));
    let newest = put_system_key(&app.admin, Existing::Ends).await.unwrap().unwrap();
    for ended in [old, new] {
        assert_eq!(reason(app.authenticate(ended.expose()).await), Reason::InvalidCredentials);
    }
    assert!(app.authenticate(newest.expose()).await.is_ok());
}

async fn of_many_rotations_one_system_key_is_left(database: Database) {
    let app = Arc::new(App::new(database));
    app.system_key().await;
    let rotations = (0..8).map(|_| {
        let admin = app.admin.clone();
        tokio::spawn(async move { put_system_key(&admin, Existing::Ends).await })
    });
    let mut good = 0;
    for outcome in join_all(rotations).await {
        match outcome.unwrap() {
            Ok(Some(token)) => good += usize::from(app.authenticate(token.expose()).await.is_ok()),
            Ok(None) => panic!("a rotation always makes a key"),
            Err(error) => assert_eq!(error.reason(), Reason::Conflict),
        }
    }
    assert_eq!(good, 1);
}

async fn every_change_stands_in_the_audit_log(database: Database) {
    use sea_orm::{ConnectionTrait as _, Statement};
    let shop = shop(database).await;
    let product = shop.product().await;
    let key = shop.app.create_pair(&shop.owner, &product).await.unwrap().api_key.unwrap();
    shop.app.delete_pair(&shop.owner, &product, &key.id).await.unwrap();
    shop.app.ingest(vec![deleted(&product, &shop.team_id)]).await.unwrap();
    shop.app.admin.set_tier(&Tiers::default(), &shop.team_id, "pro").await.unwrap();
    let rows = shop
        .app
        .database
        .read(|reader| async move {
            let sql = "SELECT actor_kind, actor_id, action, request_id FROM audit_entries ORDER BY id";
            let statement = Statement::from_string(reader.get_database_backend(), sql);
            reader.query_all_raw(statement).await.map_err(Error::internal)
        })
        .await
        .unwrap();
    let text = |row: &sea_orm::QueryResult, column: &str| row.try_get::<String>("", column).unwrap();
    let written: Vec<_> = rows
        .iter()
        .map(|row| (text(row, "actor_kind"), text(row, "actor_id"), text(row, "action"), text(row, "request_id")))
        .collect();
    let user = shop.owner.id.as_str();
    let expected = [
        ("account", user, "/paperkey.auth.v1.AuthService/Register", "req_test"),
        ("service", "catalog", "/paperkey.auth.v1.CredentialService/ProvisionProduct", ""),
        ("account", user, "/paperkey.auth.v1.ProductApiKeyService/CreateProductApiKey", "req_test"),
        ("account", user, "/paperkey.auth.v1.ProductApiKeyService/DeleteProductApiKey", "req_test"),
        ("service", "catalog", "/paperkey.events.v1.IntakeService/IngestEvents", ""),
        ("operator", "", "admin/set-tier", ""),
    ];
    let expected = expected.map(|(a, b, c, d)| (a.to_owned(), b.to_owned(), c.to_owned(), d.to_owned()));
    assert_eq!(written, expected);
}

async fn the_schema_goes_down_and_up_again_and_what_is_there_stays(database: Database) {
    type Migrator = paperkey_migrations::auth::Migrator;
    let app = App::new(database.clone());
    let registered = app.registered("ada@example.com").await;
    let before = app.authenticate(&registered.live_key).await.unwrap();
    // Down to the first schema, and up with all that it holds.
    let states = database.migration_status::<Migrator>().await.unwrap();
    let later = states.iter().rev().take_while(|status| status.name != "auth_0001_tables").count();
    assert!(later >= 3, "{states:?}");
    database.migrate_down::<Migrator>(u32::try_from(later).unwrap()).await.unwrap();
    let states = database.migration_status::<Migrator>().await.unwrap();
    assert_eq!(states.iter().filter(|status| status.state != MigrationState::Applied).count(), later);
    database.migrate_up::<Migrator>().await.unwrap();
    let app = App::new(database);
    assert!(app.status(None).await.is_ok());
    assert_eq!(app.authenticate(&registered.live_key).await.unwrap(), before);
    let owner = app.authenticate(&app.login("ada@example.com", PASSWORD).await.unwrap().token).await.unwrap();
    assert_eq!(owner.team_id, before.team_id);
    app.registered("grace@example.com").await;
}
