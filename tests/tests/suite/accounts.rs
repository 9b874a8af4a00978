//! What people do with their accounts: names, passwords, forgotten ones, sessions.

use paperkey_proto::errors::v1::Reason;
use paperkey_tests::{Account, Installation, eventually, on_both_kinds, people::text};
use serde_json::{Value, json};

use crate::teams::soon;

on_both_kinds! {
    a_forgotten_password_is_replaced_by_a_mailed_link,
    a_password_is_changed_with_the_one_before,
    signing_out_ends_every_session,
    a_name_is_changed_and_removed,
    failed_logins_are_throttled_for_known_and_unknown_addresses_alike,
    mails_hold_what_they_should_and_lie_where_only_the_owner_reads,
}

const NEW: &str = "another horse entirely";

/// What the latest mail to somebody carries as the token of a link to that page.
async fn mailed_token(install: &Installation, to: &Account, page: &str) -> String {
    let link = format!("/app/{page}?token=");
    eventually("the mail is written", || async {
        let mails = install.mails_to(&to.email);
        let (_, rest) = mails.iter().rev().find_map(|mail| mail.split_once(&link))?;
        rest.split_whitespace().next().map(str::to_owned)
    })
    .await
}

async fn a_forgotten_password_is_replaced_by_a_mailed_link(install: Installation) {
    let (ada, api) = (install.register().await, install.api());
    let known = api.post("/auth/password/forgot", json!({"email": ada.email.to_uppercase()})).await;
    let unknown = api.post("/auth/password/forgot", json!({"email": "nobody@example.com"})).await;
    assert_eq!((known.gives(200), unknown.gives(200)), (&json!({}), &json!({})));
    let token = mailed_token(&install, &ada, "reset-password").await;
    ada.get("/auth/me").await.gives(200);

    let reset = |token: String, password: &'static str| {
        let api = api.clone();
        async move { api.post("/auth/password/reset", json!({"token": token, "password": password})).await }
    };
    reset(token.clone(), "short").await.refused_for("password");
    reset("x".to_owned(), NEW).await.refused_for("token");
    assert_eq!(reset(token.clone(), NEW).await.gives(200), &json!({}));
    soon(401, || ada.get("/auth/me")).await.refused(Reason::InvalidCredentials);
    reset(token, "yet another horse").await.refused_for("token");
    ada.login(&ada.password).await.refused(Reason::InvalidCredentials);
    let token = text(ada.login(NEW).await.gives(200), "/token");
    api.as_account(&token).get("/auth/me").await.gives(200);
    assert!(install.mails_to("nobody@example.com").is_empty());
}

async fn a_password_is_changed_with_the_one_before(install: Installation) {
    let ada = install.register().await;
    ada.patch("/auth/me", json!({"password": NEW})).await.refused_for("currentPassword");
    let wrong = json!({"password": NEW, "currentPassword": "not it at all"});
    ada.patch("/auth/me", wrong).await.refused_for("currentPassword");
    let short = json!({"password": "short", "currentPassword": ada.password});
    ada.patch("/auth/me", short).await.refused_for("password");
    let changed = ada.patch("/auth/me", json!({"password": NEW, "currentPassword": ada.password})).await;
    let token = text(changed.gives(200), "/token");
    soon(401, || ada.get("/auth/me")).await.refused(Reason::InvalidCredentials);
    install.api().as_account(&token).get("/auth/me").await.gives(200);
    ada.login(&ada.password).await.refused(Reason::InvalidCredentials);
    ada.login(NEW).await.gives(200);
    ada.integration().get("/api/v1/products").await.gives(200);
}

async fn signing_out_ends_every_session(install: Installation) {
    let ada = install.register().await;
    let other = text(ada.login(&ada.password).await.gives(200), "/token");
    assert_eq!(ada.post("/auth/logout", json!({})).await.gives(200), &json!({}));
    for token in [&ada.token, &other] {
        let api = install.api().as_account(token);
        soon(401, || api.get("/auth/me")).await.refused(Reason::InvalidCredentials);
    }
    let new = text(ada.login(&ada.password).await.gives(200), "/token");
    install.api().as_account(&new).get("/auth/me").await.gives(200);
}

async fn a_name_is_changed_and_removed(install: Installation) {
    let ada = install.register().await;
    let changed = ada.patch("/auth/me", json!({"name": " Ada L. "})).await;
    assert_eq!((&changed.gives(200)["user"]["name"], &changed.json["token"]), (&json!("Ada L."), &Value::Null));
    assert_eq!(ada.patch("/auth/me", json!({})).await.gives(200)["user"]["name"], "Ada L.");
    assert_eq!(ada.patch("/auth/me", json!({"name": null})).await.gives(200)["user"]["name"], Value::Null);
    ada.patch("/auth/me", json!({"name": "A\nda"})).await.refused_for("name");
    ada.patch("/auth/me", json!({"email": "eve@example.com"})).await.refused(Reason::ValidationFailed);
    assert_eq!(ada.get("/auth/me").await.gives(200)["user"]["name"], Value::Null);
}

async fn failed_logins_are_throttled_for_known_and_unknown_addresses_alike(install: Installation) {
    let (ada, api) = (install.register().await, install.api());
    let login = |email: String, password: String| {
        let api = api.clone();
        async move { api.post("/auth/login", json!({"email": email, "password": password})).await }
    };
    for email in [ada.email.clone(), "nobody@example.com".to_owned()] {
        for _ in 0..10 {
            login(email.clone(), "wrong password".to_owned()).await.refused(Reason::InvalidCredentials);
        }
        let answer = login(email, ada.password.clone()).await;
        answer.refused(Reason::AuthRateLimited);
        let seconds: u64 = answer.header("retry-after").unwrap().parse().unwrap();
        assert!((1..=900).contains(&seconds), "{seconds}");
    }
    ada.get("/auth/me").await.gives(200);
    install.register().await.login("wrong password").await.refused(Reason::InvalidCredentials);
}

async fn mails_hold_what_they_should_and_lie_where_only_the_owner_reads(install: Installation) {
    use std::os::unix::fs::PermissionsExt as _;
    let (ada, bob) = (install.register().await, install.register().await);
    let invitation = ada.invite(&bob.email, "manager").await;
    let token = mailed_token(&install, &bob, "accept-invitation").await;
    assert_eq!(token, invitation.token);
    let mail = install.mails_to(&bob.email).remove(0);
    assert!(mail.contains(&ada.email) && mail.contains("Subject: You are invited to join "), "{mail}");
    for entry in std::fs::read_dir(install.mail_folder()).unwrap() {
        let mode = entry.unwrap().metadata().unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, 0o600);
    }
    let folder = std::fs::metadata(install.mail_folder()).unwrap().permissions().mode() & 0o777;
    assert_eq!(folder, 0o700);
    for (name, line) in install.written() {
        assert!(!line.text.contains(&token) && !line.text.contains(&bob.email), "{name}: {}", line.text);
    }
}
