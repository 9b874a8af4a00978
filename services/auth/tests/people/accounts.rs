//! Names, passwords, forgotten ones, and logins that fail.

use std::{sync::Arc, time::Duration};

use paperkey_kit::{db::Database, store_suite};
use paperkey_proto::{
    Error,
    auth::v1::{
        ForgotPasswordRequest, LogoutRequest, ResetPasswordRequest, UpdateMeRequest, UpdateMeResponse,
        auth_service_client::AuthServiceClient,
    },
    errors::v1::Reason,
};
use prost_types::FieldMask;

use super::{Acting, Person, at_once, by_hand, carried, count};
use crate::common::{App, PASSWORD, answer, reason, refusal};

store_suite! {
    paperkey_migrations::auth::Migrator;
    a_name_is_changed_and_removed,
    a_new_password_takes_the_current_one_and_ends_every_session,
    of_twenty_changes_of_a_password_one_succeeds,
    signing_out_ends_every_session,
    a_forgotten_password_is_replaced_by_a_mailed_link,
    of_twenty_uses_of_a_link_one_succeeds,
    of_many_links_of_one_account_one_is_used,
    nothing_tells_who_has_an_account,
    an_account_is_mailed_a_few_links_an_hour,
    what_is_done_to_accounts_stands_in_the_audit_log,
}

const NEW: &str = "another horse entirely";

impl Acting {
    async fn update_me(&self, request: UpdateMeRequest) -> Result<UpdateMeResponse, Error> {
        answer(self.account().update_me(request).await)
    }

    async fn change_password(&self, current: &str, new: &str) -> Result<UpdateMeResponse, Error> {
        let (password, current_password) = (Some(new.to_owned()), Some(current.to_owned()));
        self.update_me(UpdateMeRequest { password, current_password, ..UpdateMeRequest::default() }).await
    }

    async fn logout(&self) {
        answer(self.account().logout(LogoutRequest {}).await).unwrap();
    }
}

async fn forgot(app: &App, email: &str) {
    let request = ForgotPasswordRequest { email: email.to_owned() };
    answer(AuthServiceClient::new(app.signed(None)).forgot_password(request).await).unwrap();
}

async fn reset(app: &App, token: &str, password: &str) -> Result<(), Error> {
    let request = ResetPasswordRequest { token: token.to_owned(), password: password.to_owned() };
    answer(AuthServiceClient::new(app.signed(None)).reset_password(request).await).map(drop)
}

/// What the mailed link of a forgotten password carries.
async fn mailed_ticket(app: &App, email: &str) -> String {
    forgot(app, email).await;
    let mails = app.mails().await;
    assert_eq!(mails.len(), 1);
    carried(&mails[0], "reset-password")
}

/// The fields that a refusal names.
fn fields<T>(outcome: Result<T, Error>) -> Vec<String> {
    match outcome {
        Ok(_) => panic!("it was not refused"),
        Err(error) => error.violations().iter().map(|violation| violation.field.clone()).collect(),
    }
}

async fn ada(database: Database) -> (Arc<App>, Person) {
    let app = Arc::new(App::new(database));
    let ada = Person::new(&app, "ada@example.com").await;
    (app, ada)
}

async fn a_name_is_changed_and_removed(database: Database) {
    let (app, ada) = ada(database).await;
    let by_ada = ada.home().await;
    let named = |name: Option<&str>| UpdateMeRequest {
        name: name.map(str::to_owned),
        update_mask: Some(FieldMask { paths: vec!["name".to_owned()] }),
        ..UpdateMeRequest::default()
    };
    let answer = by_ada.update_me(named(Some("  Ada L. "))).await.unwrap();
    assert_eq!((answer.user.unwrap().name.as_deref(), answer.token), (Some("Ada L."), None));
    assert_eq!(app.me(&by_ada.principal).await.unwrap().user.unwrap().name.as_deref(), Some("Ada L."));
    let same = by_ada.update_me(UpdateMeRequest::default()).await.unwrap();
    assert_eq!(same.user.unwrap().name.as_deref(), Some("Ada L."));
    assert_eq!(by_ada.update_me(named(None)).await.unwrap().user.unwrap().name, None);
    assert_eq!(fields(by_ada.update_me(named(Some("A\nda"))).await), ["name"]);
    let mask = Some(FieldMask { paths: vec!["email".to_owned()] });
    assert_eq!(fields(by_ada.update_me(UpdateMeRequest { update_mask: mask, ..Default::default() }).await), ["email"]);
    assert!(app.authenticate(&ada.token).await.is_ok(), "a name ends no session");
    assert!(app.mails().await.is_empty());
}

async fn a_new_password_takes_the_current_one_and_ends_every_session(database: Database) {
    let (app, ada) = ada(database).await;
    let by_ada = ada.home().await;
    let without = UpdateMeRequest { password: Some(NEW.to_owned()), ..UpdateMeRequest::default() };
    assert_eq!(fields(by_ada.update_me(without).await), ["current_password"]);
    let wrong = by_ada.change_password("not it at all", NEW).await.unwrap_err();
    assert_eq!(
        (wrong.reason(), fields::<()>(Err(wrong)).as_slice()),
        (Reason::ValidationFailed, &["current_password".to_owned()][..])
    );
    assert_eq!(fields(by_ada.change_password(PASSWORD, "short").await), ["password"]);
    assert_eq!(count(&app, "SELECT failures AS n FROM login_failures").await, 1, "a wrong one is a failed login");

    forgot(&app, &ada.email).await;
    let link = carried(&app.mails().await[0], "reset-password");
    let remembered = app.remember(&by_ada.principal);
    let before = app.changes(-1).await.seq;
    let changed = by_ada.change_password(PASSWORD, NEW).await.unwrap();
    assert!(!remembered.is_served());
    assert_eq!(app.changes(before).await.subjects, [format!("user:{}", ada.user_id)]);
    assert_eq!(reason(app.authenticate(&ada.token).await), Reason::InvalidCredentials);
    assert!(app.authenticate(&changed.token.unwrap()).await.is_ok());
    assert_eq!(reason(app.login(&ada.email, PASSWORD).await), Reason::InvalidCredentials);
    assert!(app.login(&ada.email, NEW).await.is_ok());
    assert_eq!(count(&app, "SELECT COUNT(*) AS n FROM login_failures").await, 0);
    assert_eq!(fields(reset(&app, &link, NEW).await), ["token"], "links of before are worth nothing");
    let mails = app.mails().await;
    assert_eq!(mails.len(), 1);
    assert!(mails[0].contains("Subject: Your Paperkey password was changed") && !mails[0].contains("http"));
}

async fn of_twenty_changes_of_a_password_one_succeeds(database: Database) {
    let (app, ada) = ada(database).await;
    let by_ada = ada.home().await;
    let outcomes = at_once(10, |number| {
        let by_ada = by_ada.clone();
        async move { by_ada.change_password(PASSWORD, &format!("{NEW} {number}")).await }
    })
    .await;
    let good: Vec<_> = outcomes.into_iter().filter_map(Result::ok).collect();
    assert_eq!(good.len(), 1);
    assert!(app.authenticate(good[0].token.as_deref().unwrap()).await.is_ok());
}

async fn signing_out_ends_every_session(database: Database) {
    let (app, ada) = ada(database).await;
    let other = ada.back().await;
    let remembered = app.remember(&other.home().await.principal);
    ada.home().await.logout().await;
    assert!(!remembered.is_served());
    for token in [&ada.token, &other.token] {
        assert_eq!(reason(app.authenticate(token).await), Reason::InvalidCredentials);
    }
    assert!(app.authenticate(&ada.back().await.token).await.is_ok());
}

async fn a_forgotten_password_is_replaced_by_a_mailed_link(database: Database) {
    let (app, ada) = ada(database).await;
    forgot(&app, " ADA@example.com").await;
    let mails = app.mails().await;
    assert!(mails[0].contains("To: ada@example.com") && mails[0].contains("30 minutes"), "{}", mails[0]);
    let ticket = carried(&mails[0], "reset-password");
    let second = mailed_ticket(&app, &ada.email).await;
    assert!(app.authenticate(&ada.token).await.is_ok(), "asking changes nothing");
    assert_eq!(fields(reset(&app, &ticket, "short").await), ["password"]);

    reset(&app, &ticket, NEW).await.unwrap();
    assert_eq!(reason(app.authenticate(&ada.token).await), Reason::InvalidCredentials);
    assert_eq!(reason(app.login(&ada.email, PASSWORD).await), Reason::InvalidCredentials);
    assert!(app.login(&ada.email, NEW).await.is_ok());
    assert!(app.mails().await[0].contains("Your Paperkey password was changed"));
    let mut said = Vec::new();
    let made_up = "A".repeat(43);
    for bad in [ticket.as_str(), &second, &made_up, "x", "\u{7f}"] {
        let error = reset(&app, bad, PASSWORD).await.unwrap_err();
        said.push((error.reason(), error.message().to_owned(), error.violations().to_vec()));
    }
    said.dedup();
    assert_eq!(said.len(), 1, "all bad links are refused alike: {said:?}");
    assert_eq!((said[0].0, said[0].2[0].field.as_str()), (Reason::ValidationFailed, "token"));
}

async fn of_twenty_uses_of_a_link_one_succeeds(database: Database) {
    let (app, ada) = ada(database).await;
    let ticket = mailed_ticket(&app, &ada.email).await;
    let outcomes = at_once(20, |number| {
        let (app, ticket) = (Arc::clone(&app), ticket.clone());
        async move { reset(&app, &ticket, &format!("{NEW} {number}")).await.map(|()| number) }
    })
    .await;
    let (used, refused): (Vec<_>, Vec<_>) = outcomes.into_iter().partition(Result::is_ok);
    assert_eq!(used.len(), 1);
    assert!(refused.into_iter().all(|refused| fields(refused) == ["token"]));
    let number = *used[0].as_ref().unwrap();
    assert!(app.login(&ada.email, &format!("{NEW} {number}")).await.is_ok());
}

async fn of_many_links_of_one_account_one_is_used(database: Database) {
    let (app, ada) = ada(database).await;
    let mut tickets = Vec::new();
    for _ in 0..5 {
        tickets.push(mailed_ticket(&app, &ada.email).await);
    }
    let outcomes = at_once(10, |number| {
        let (app, ticket) = (Arc::clone(&app), tickets[number % 5].clone());
        async move { reset(&app, &ticket, &format!("{NEW} {number}")).await }
    })
    .await;
    assert_eq!(outcomes.iter().filter(|outcome| outcome.is_ok()).count(), 1);
    assert!(outcomes.into_iter().filter(Result::is_err).all(|refused| fields(refused) == ["token"]));
}

async fn nothing_tells_who_has_an_account(database: Database) {
    let (app, ada) = ada(database).await;
    let mut work = Vec::new();
    for email in [ada.email.as_str(), "nobody@example.com", "no email at all", "\u{7f}", "ADA@EXAMPLE.COM"] {
        let before = app.database.stats();
        forgot(&app, email).await;
        let after = app.database.stats();
        work.push((
            after.statements() - before.statements(),
            after.write_jobs - before.write_jobs,
            after.read_jobs - before.read_jobs,
        ));
    }
    work.dedup();
    assert_eq!(work.len(), 1, "{work:?}");
    assert_eq!(count(&app, "SELECT COUNT(*) AS n FROM password_resets").await, 5);
    assert_eq!(count(&app, "SELECT COUNT(*) AS n FROM mails").await, 5);
    assert_eq!(count(&app, "SELECT COUNT(*) AS n FROM audit_entries WHERE action LIKE '%ForgotPassword'").await, 5);
    assert_eq!(app.mails().await.len(), 2);
    assert_eq!(count(&app, "SELECT COUNT(*) AS n FROM mails").await, 0);
}

async fn an_account_is_mailed_a_few_links_an_hour(database: Database) {
    let (app, ada) = ada(database).await;
    let bob = Person::new(&app, "bob@example.com").await;
    let mut mailed = 0;
    for _ in 0..8 {
        forgot(&app, &ada.email).await;
        mailed += app.mails().await.len();
    }
    assert_eq!(mailed, 5);
    forgot(&app, &bob.email).await;
    assert_eq!(app.mails().await.len(), 1, "others are mailed");
}

async fn what_is_done_to_accounts_stands_in_the_audit_log(database: Database) {
    let (app, ada) = ada(database).await;
    let changed = ada.home().await.change_password(PASSWORD, NEW).await.unwrap();
    let ada = Person { token: changed.token.unwrap(), ..ada };
    ada.home().await.logout().await;
    app.mails().await;
    let ticket = mailed_ticket(&app, &ada.email).await;
    reset(&app, &ticket, PASSWORD).await.unwrap();
    for action in ["UpdateMe", "Logout", "ResetPassword"] {
        let sql = format!(
            "SELECT COUNT(*) AS n FROM audit_entries WHERE action = '/paperkey.auth.v1.AuthService/{action}' \
             AND actor_kind = 'account' AND actor_id = '{}'",
            ada.user_id
        );
        assert_eq!(count(&app, Box::leak(sql.into_boxed_str())).await, 1, "{action}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn after_ten_failures_no_password_is_looked_at_for_a_quarter_of_an_hour() {
    by_hand(|app, hand| async move {
        let ada = Person::new(&app, "ada@example.com").await;
        for email in [ada.email.as_str(), "nobody@example.com"] {
            for _ in 0..9 {
                assert_eq!(reason(app.login(email, "wrong").await), Reason::InvalidCredentials);
            }
        }
        hand.advance_ms(60_000);
        assert!(app.login(&ada.email, PASSWORD).await.is_ok(), "a success forgives");
        for _ in 0..10 {
            assert_eq!(reason(app.login("ADA@example.com ", "wrong").await), Reason::InvalidCredentials);
            hand.advance_ms(1_000);
        }
        assert_eq!(reason(app.login("nobody@example.com", "wrong").await), Reason::InvalidCredentials);
        for (email, password, wait_ms) in [
            (ada.email.as_str(), PASSWORD, 14 * 60_000 + 50_000),
            (ada.email.as_str(), "wrong", 14 * 60_000 + 50_000),
            ("nobody@example.com", "wrong", 13 * 60_000 + 50_000),
        ] {
            let error = app.login(email, password).await.unwrap_err();
            assert_eq!(error.reason(), Reason::AuthRateLimited);
            assert_eq!(error.retry_after(), Some(Duration::from_millis(wait_ms)), "{email}");
        }
        // Nor by the way of a signed-in user.
        let by_ada = ada.home().await;
        assert_eq!(reason(by_ada.change_password(PASSWORD, NEW).await), Reason::AuthRateLimited);
        hand.advance_ms(14 * 60_000 + 50_000 - 1);
        assert_eq!(reason(app.login(&ada.email, PASSWORD).await), Reason::AuthRateLimited);
        hand.advance_ms(1);
        assert!(app.login(&ada.email, PASSWORD).await.is_ok());
        app.run_once("auth/forget_ended").await;
        assert_eq!(count(&app, "SELECT COUNT(*) AS n FROM login_failures").await, 0);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reset_forgives_failed_logins_and_parallel_ones_are_bounded() {
    by_hand(|app, _hand| async move {
        let ada = Person::new(&app, "ada@example.com").await;
        let outcomes = at_once(40, |_| {
            let app = Arc::clone(&app);
            async move { app.login("ada@example.com", "wrong").await.map(drop) }
        })
        .await;
        let looked_at = outcomes.into_iter().filter(|one| reason_of(one) == Reason::InvalidCredentials).count();
        assert_eq!(looked_at, 10);
        assert_eq!(reason(app.login(&ada.email, PASSWORD).await), Reason::AuthRateLimited);
        let ticket = mailed_ticket(&app, &ada.email).await;
        reset(&app, &ticket, NEW).await.unwrap();
        assert!(app.login(&ada.email, NEW).await.is_ok());
    })
    .await;
}

fn reason_of(outcome: &Result<(), Error>) -> Reason {
    outcome.as_ref().map_or_else(Error::reason, |()| panic!("it was not refused"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mailed_link_is_good_for_thirty_minutes() {
    by_hand(|app, hand| async move {
        let ada = Person::new(&app, "ada@example.com").await;
        let (first, second) = (mailed_ticket(&app, &ada.email).await, mailed_ticket(&app, &ada.email).await);
        hand.advance_ms(30 * 60_000 - 1);
        reset(&app, &first, NEW).await.unwrap();
        app.mails().await;
        let third = mailed_ticket(&app, &ada.email).await;
        hand.advance_ms(30 * 60_000);
        assert_eq!(fields(reset(&app, &third, NEW).await), ["token"]);
        assert_eq!(fields(reset(&app, &second, NEW).await), ["token"]);
        hand.advance_ms(2 * 60 * 60_000);
        app.run_once("auth/forget_ended").await;
        assert_eq!(count(&app, "SELECT COUNT(*) AS n FROM password_resets").await, 0);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_asks_in_the_name_of_another_keeps_no_link_from_them() {
    by_hand(|app, hand| async move {
        let ada = Person::new(&app, "ada@example.com").await;
        let mut mailed = Vec::new();
        for _ in 0..4 {
            let mut in_the_hour = 0;
            for _ in 0..20 {
                forgot(&app, &ada.email).await;
                in_the_hour += app.mails().await.len();
                hand.advance_ms(3 * 60_000);
            }
            mailed.push(in_the_hour);
        }
        assert_eq!(mailed, [5; 4], "those that were not mailed do not count");
        // All at once as well.
        hand.advance_ms(60 * 60_000);
        for _ in 0..20 {
            forgot(&app, &ada.email).await;
        }
        assert_eq!(app.mails().await.len(), 5);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_answers_to_a_throttled_login_are_alike() {
    by_hand(|app, _hand| async move {
        Person::new(&app, "ada@example.com").await;
        let mut said = Vec::new();
        for email in ["ada@example.com", "nobody@example.com", "no email at all"] {
            for _ in 0..10 {
                said.push(refusal(app.login(email, "wrong").await));
            }
            said.push(refusal(app.login(email, "wrong").await));
        }
        let (one, others) = said.split_at(11);
        assert!(others.chunks(11).all(|other| other == one), "{said:?}");
    })
    .await;
}
