//! Teams and the people in them: made, invited, given roles, removed, deleted.

use std::{future::Future, time::Duration};

use paperkey_proto::errors::v1::Reason;
use paperkey_tests::{Account, Answer, Installation, on_both_kinds, people::text, within};
use serde_json::{Value, json};

on_both_kinds! {
    somebody_is_invited_does_their_part_and_is_removed,
    a_team_is_made_changed_and_left,
    a_foreign_team_does_not_exist,
    of_two_owners_who_demote_each_other_one_stays,
    a_deleted_team_takes_everything_with_it,
    the_installation_sets_the_tier_of_a_team,
}

/// Asks until the answer has that status, as every gateway must answer within a second of a change.
pub(crate) async fn soon<F, Fut>(status: u16, ask: F) -> Answer
where
    F: Fn() -> Fut,
    Fut: Future<Output = Answer>,
{
    let asked = || async { Some(ask().await).filter(|answer| answer.status == status) };
    within(Duration::from_secs(1), "the change is seen", asked).await.0
}

async fn somebody_is_invited_does_their_part_and_is_removed(install: Installation) {
    let (ada, bob, eve) = (install.register().await, install.register().await, install.register().await);
    let team = format!("/teams/{}", ada.team_id);
    let invitation = ada.invite(&bob.email, "member").await;
    assert!(invitation.url.starts_with("http") && invitation.url.contains("/app/accept-invitation?token="));
    let listed = ada.get(&format!("{team}/members")).await;
    let invited = &listed.gives(200)["members"][0];
    assert_eq!((invited["id"].as_str(), &invited["status"]), (Some(invitation.id.as_str()), &json!("invited")));

    bob.get(&team).await.refused(Reason::NotFound);
    eve.accept(&invitation).await.refused(Reason::NotFound);
    let joined = bob.accept(&invitation).await;
    assert_eq!(joined.gives(200)["team"]["role"], "member");
    bob.accept(&invitation).await.refused(Reason::NotFound);
    let me = bob.get("/auth/me").await;
    let teams = me.gives(200)["teams"].as_array().unwrap();
    assert!(teams.iter().any(|one| one["id"] == ada.team_id.as_str() && one["role"] == "member"), "{teams:?}");

    let product = ada.create_product("App").await;
    let in_team = bob.for_team(&ada.team_id);
    in_team.get(&format!("/products/{}", product.id)).await.gives(200);
    in_team.post("/products", json!({"name": "Mine"})).await.refused(Reason::RoleInsufficient);
    bob.get(&format!("{team}/members")).await.refused(Reason::RoleInsufficient);
    bob.patch(&team, json!({"name": "Bob's"})).await.refused(Reason::RoleInsufficient);
    bob.delete(&team).await.refused(Reason::RoleInsufficient);

    let member = format!("{team}/members/{}", bob.user_id);
    assert_eq!(ada.patch(&member, json!({"role": "manager"})).await.gives(200)["role"], "manager");
    soon(201, || in_team.post("/products", json!({"name": "Ours"}))).await;
    ada.patch(&member, json!({"role": "admin"})).await.gives(200);
    let members = format!("{team}/members");
    soon(200, || bob.get(&members)).await;
    let to_be_owner = json!({"email": "new@example.com", "role": "owner"});
    bob.post(&format!("{team}/members"), to_be_owner).await.refused(Reason::RoleInsufficient);
    bob.delete(&format!("{team}/members/{}", ada.user_id)).await.refused(Reason::RoleInsufficient);
    ada.patch(&member, json!({"role": "emperor"})).await.refused(Reason::ValidationFailed);

    ada.delete(&member).await.gives(204);
    soon(404, || bob.get(&team)).await.refused(Reason::NotFound);
    let of_the_team = format!("/products/{}", product.id);
    soon(404, || in_team.get(&of_the_team)).await.refused(Reason::NotFound);
    ada.delete(&member).await.refused(Reason::NotFound);
    bob.get("/products").await.gives(200);
}

async fn a_team_is_made_changed_and_left(install: Installation) {
    let (ada, bob) = (install.register().await, install.register().await);
    let team = ada.create_team("Engines").await;
    let path = format!("/teams/{team}");
    let found = ada.get(&path).await;
    let json = found.gives(200);
    assert_eq!((&json["name"], &json["role"], &json["tier"]), (&json!("Engines"), &json!("owner"), &json!("free")));
    assert_eq!(json["leakAction"], "revoke");
    let changed = ada.patch(&path, json!({"name": " Works ", "leakAction": "alert"})).await;
    assert_eq!(changed.gives(200)["name"], "Works");
    assert_eq!(ada.get(&path).await.gives(200)["leakAction"], "alert");
    ada.patch(&path, json!({"name": null})).await.refused_for("name");
    ada.post("/teams", json!({"name": "   "})).await.refused_for("name");
    ada.post(&format!("{path}/leave"), json!({})).await.refused(Reason::Conflict);
    ada.takes_in(&team, &bob, "owner").await;
    ada.post(&format!("{path}/leave"), json!({})).await.gives(200);
    soon(404, || ada.get(&path)).await.refused(Reason::NotFound);
    assert_eq!(ada.get("/teams").await.gives(200)["teams"].as_array().map(Vec::len), Some(1));
    bob.get(&path).await.gives(200);
}

async fn a_foreign_team_does_not_exist(install: Installation) {
    let (ada, eve) = (install.register().await, install.register().await);
    let invitation = ada.invite("new@example.com", "member").await;
    for team in [ada.team_id.as_str(), "team_00000000000000000000000000", "%00", "x'--"] {
        let path = format!("/teams/{team}");
        for answer in [
            eve.get(&path).await,
            eve.patch(&path, json!({"name": "Eve's"})).await,
            eve.delete(&path).await,
            eve.post(&format!("{path}/leave"), json!({})).await,
            eve.get(&format!("{path}/members")).await,
            eve.post(&format!("{path}/members"), json!({"email": eve.email, "role": "owner"})).await,
            eve.patch(&format!("{path}/members/{}", ada.user_id), json!({"role": "member"})).await,
            eve.delete(&format!("{path}/members/{}", ada.user_id)).await,
            eve.delete(&format!("{path}/members/{}", invitation.id)).await,
        ] {
            answer.refused(Reason::NotFound);
        }
    }
    let own = format!("/teams/{}/members", eve.team_id);
    for stranger in [&ada.user_id, &invitation.id] {
        eve.delete(&format!("{own}/{stranger}")).await.refused(Reason::NotFound);
    }
    ada.get(&format!("/teams/{}", ada.team_id)).await.gives(200);
}

async fn of_two_owners_who_demote_each_other_one_stays(install: Installation) {
    let (ada, bob) = (install.register().await, install.register().await);
    ada.takes_in(&ada.team_id, &bob, "owner").await;
    let member = |account: &Account| format!("/teams/{}/members/{}", ada.team_id, account.user_id);
    let (of_ada, of_bob) = (member(&ada), member(&bob));
    let role = || json!({"role": "member"});
    let outcomes = tokio::join!(ada.patch(&of_bob, role()), bob.patch(&of_ada, role()));
    let good = [outcomes.0, outcomes.1].into_iter().filter(|answer| answer.status == 200).count();
    assert_eq!(good, 1);
    let path = format!("/teams/{}/members", ada.team_id);
    // Who lost is a member now, who may not look.
    let listed = soon(200, || async {
        let answer = ada.get(&path).await;
        if answer.status == 200 { answer } else { bob.get(&path).await }
    })
    .await;
    let members = listed.gives(200)["members"].as_array().unwrap();
    assert_eq!(members.iter().filter(|one| one["role"] == "owner").count(), 1);
}

async fn a_deleted_team_takes_everything_with_it(install: Installation) {
    let (ada, bob) = (install.register().await, install.register().await);
    let team = format!("/teams/{}", ada.team_id);
    ada.takes_in(&ada.team_id, &bob, "admin").await;
    let product = ada.create_product("App").await;
    let license = ada.issue(&product, json!({})).await;
    let pending = ada.invite("new@example.com", "member").await;
    assert_eq!(ada.app(&product).verdict(&license).await, "valid");
    bob.delete(&team).await.refused(Reason::RoleInsufficient);

    ada.delete(&team).await.gives(204);
    let (app, key, server) = (ada.app(&product), ada.integration(), ada.server(&product));
    soon(401, || app.validate(&license)).await.refused(Reason::InvalidCredentials);
    soon(401, || key.get("/api/v1/products")).await.refused(Reason::InvalidCredentials);
    soon(401, || server.get("/licenses")).await.refused(Reason::InvalidCredentials);
    for account in [&ada, &bob] {
        soon(404, || account.get(&team)).await.refused(Reason::NotFound);
        let in_team = account.for_team(&ada.team_id);
        soon(404, || in_team.get("/products")).await.refused(Reason::NotFound);
        account.delete(&team).await.refused(Reason::NotFound);
    }
    bob.accept(&pending).await.refused(Reason::NotFound);
    assert_eq!(ada.get("/auth/me").await.gives(200)["teams"], Value::Array(Vec::new()));
    // They are somebody still, and make a new one.
    let new = ada.create_team("Once more").await;
    assert_eq!(ada.for_team(&new).get("/products").await.gives(200)["products"], json!([]));
}

async fn the_installation_sets_the_tier_of_a_team(install: Installation) {
    let ada = install.register().await;
    let system = install.api().with_key(&install.system_key().await);
    let path = format!("/api/v1/teams/{}/tier", ada.team_id);
    let put = |api: paperkey_tests::Api, path: String, tier: &'static str| async move {
        api.call(http::Method::PUT, &path, Some(json!({"tier": tier}))).await
    };
    let set = put(system.clone(), path.clone(), "pro").await;
    assert_eq!(
        (text(set.gives(200), "/team_id"), text(set.gives(200), "/tier")),
        (ada.team_id.clone(), "pro".to_owned())
    );
    assert_eq!(
        ada.get(&format!("/teams/{}", ada.team_id)).await.gives(200)["tier"],
        "pro",
        "it is read, not remembered"
    );
    put(system.clone(), path.clone(), "gold").await.refused(Reason::ValidationFailed);
    let nobodys = "/api/v1/teams/team_00000000000000000000000000/tier".to_owned();
    put(system, nobodys, "pro").await.refused(Reason::NotFound);
    put(ada.integration(), path, "scale").await.refused(Reason::ScopeInsufficient);
}
