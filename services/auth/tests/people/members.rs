//! Who is in a team, and who is invited.

use std::{sync::Arc, time::Duration};

use paperkey_kit::{db::Database, store_suite};
use paperkey_proto::{
    Error,
    auth::v1::{
        ApiKeyKind, CreateApiKeyRequest, CreateMemberResponse, MemberStatus, RotateApiKeyRequest,
        RotateCurrentApiKeyRequest, UpdateMemberRequest, api_key_service_client::ApiKeyServiceClient,
    },
    errors::v1::Reason,
    principal::v1::{Principal, Role},
};

use super::{Acting, DAY_MS, Person, at_once, by_hand, count, meddle, ticket};
use crate::common::{App, Signed, answer, reason, refusal};

store_suite! {
    paperkey_migrations::auth::Migrator;
    an_invitation_is_mailed_and_accepted,
    of_twenty_acceptances_of_a_link_one_joins,
    a_link_is_good_for_the_invited_address_only,
    inviting_again_replaces_link_and_role,
    an_invitation_that_was_taken_back_is_worth_nothing,
    who_is_in_already_uses_the_link_up,
    who_is_in_already_cannot_be_invited,
    a_team_has_a_hundred_people_at_most,
    a_page_of_people_goes_on_where_the_last_one_ended,
    the_last_owner_stays,
    of_two_owners_who_demote_each_other_one_stays,
    of_twenty_owners_who_leave_at_once_one_stays,
    of_two_owners_who_remove_each_other_one_stays,
    a_role_that_changes_is_announced,
    the_tokens_of_a_person_end_with_the_membership,
    nobody_holds_the_token_of_one_who_becomes_owner,
    what_is_done_to_people_stands_in_the_audit_log,
    strange_roles_emails_and_pages_are_refused_politely,
}

const NO_INVITATION: (Reason, &str) = (Reason::NotFound, "No such invitation");

impl Acting {
    fn keys(&self) -> ApiKeyServiceClient<Signed> {
        ApiKeyServiceClient::new(self.app.signed(Some(&self.principal)))
    }

    /// The id of a new token of somebody, and the token.
    async fn token_for(&self, user: &Person) -> (String, String) {
        let request = CreateApiKeyRequest {
            name: "Laptop".to_owned(),
            kind: ApiKeyKind::UserToken.into(),
            user_id: Some(user.user_id.clone()),
            ..CreateApiKeyRequest::default()
        };
        let made = answer(self.keys().create_api_key(request).await).unwrap();
        (made.api_key.unwrap().id, made.key)
    }

    async fn rotated(&self, id: &str) -> (String, String) {
        let request = RotateApiKeyRequest { key_id: id.to_owned(), ..RotateApiKeyRequest::default() };
        let made = answer(self.keys().rotate_api_key(request).await).unwrap();
        (made.api_key.unwrap().id, made.key)
    }

    async fn rotated_by_itself(&self) -> (String, String) {
        let request = RotateCurrentApiKeyRequest::default();
        let made = answer(self.keys().rotate_current_api_key(request).await).unwrap();
        (made.api_key.unwrap().id, made.key)
    }
}

async fn pair(database: Database) -> (Arc<App>, Person, Person) {
    let app = Arc::new(App::new(database));
    let (ada, bob) = (Person::new(&app, "ada@example.com").await, Person::new(&app, "Bob@Example.com").await);
    (app, ada, bob)
}

async fn an_invitation_is_mailed_and_accepted(database: Database) {
    let (app, ada, bob) = pair(database).await;
    let by_ada = ada.home().await;
    by_ada.rename_team("Engines").await.unwrap();
    let invited = by_ada.invite("bOB@example.com", Role::Manager).await.unwrap();
    let member = invited.member.clone().unwrap();
    assert!(member.id.starts_with("inv_"));
    assert_eq!((member.email.as_str(), member.role(), &member.name), ("bOB@example.com", Role::Manager, &None));
    assert_eq!(member.status(), MemberStatus::Invited);
    assert_eq!(member.expires_at.unwrap().seconds - member.created_at.unwrap().seconds, 7 * DAY_MS / 1_000);

    let mails = app.mails().await;
    assert_eq!(mails.len(), 1);
    for said in [
        "From: Paperkey <paperkey@example.com>",
        "To: bOB@example.com",
        "Subject: You are invited to join Engines on Paperkey",
        "ada@example.com has invited you",
        invited.invite_url.as_deref().unwrap(),
    ] {
        assert!(mails[0].contains(said), "{said}: {}", mails[0]);
    }
    assert!(app.mails().await.is_empty(), "it is sent once");
    assert_eq!(count(&app, "SELECT COUNT(*) AS n FROM mails").await, 0);

    let before = app.changes(-1).await.seq;
    let joined = bob.home().await.accept(&ticket(&invited)).await.unwrap();
    assert_eq!((joined.id.as_str(), joined.role()), (ada.team_id.as_str(), Role::Manager));
    assert_eq!(app.changes(before).await.subjects, [format!("user:{}", bob.user_id)]);
    let listed = by_ada.members().await.unwrap();
    let seen: Vec<_> = listed.iter().map(|one| (one.email.as_str(), one.role(), one.status())).collect();
    assert_eq!(
        seen,
        [
            ("Bob@Example.com", Role::Manager, MemberStatus::Active),
            ("ada@example.com", Role::Owner, MemberStatus::Active)
        ]
    );
    assert_eq!(bob.role_in(&ada.team_id).await, Role::Manager);
}

async fn of_twenty_acceptances_of_a_link_one_joins(database: Database) {
    let (app, ada, bob) = pair(database).await;
    let ticket = ticket(&ada.home().await.invite(&bob.email, Role::Member).await.unwrap());
    let by_bob = bob.home().await;
    let outcomes = at_once(20, |_| {
        let (by_bob, ticket) = (by_bob.clone(), ticket.clone());
        async move { by_bob.accept(&ticket).await }
    })
    .await;
    let (joined, refused): (Vec<_>, Vec<_>) = outcomes.into_iter().partition(Result::is_ok);
    assert_eq!(joined.len(), 1);
    for refused in refused {
        assert_eq!(refusal(refused), (NO_INVITATION.0, NO_INVITATION.1.to_owned()));
    }
    assert_eq!(count(&app, "SELECT COUNT(*) AS n FROM memberships").await, 3);
    assert_eq!(count(&app, "SELECT COUNT(*) AS n FROM invitations").await, 0);
}

async fn a_link_is_good_for_the_invited_address_only(database: Database) {
    let (app, ada, bob) = pair(database).await;
    let eve = Person::new(&app, "eve@example.com").await;
    let ticket = ticket(&ada.home().await.invite("bob@example.com", Role::Member).await.unwrap());
    let mut one_off = ticket.clone();
    one_off.replace_range(..1, if ticket.starts_with('A') { "B" } else { "A" });
    let made_up = "A".repeat(43);
    for bad in [one_off.as_str(), &made_up, "x", "\u{7f}", &ticket[1..], &format!("{ticket} ")] {
        let (reason, message) = refusal(bob.home().await.accept(bad).await);
        assert_eq!((reason, message.as_str()), NO_INVITATION, "{bad:?}");
    }
    for other in [&eve, &ada] {
        let (reason, message) = refusal(other.home().await.accept(&ticket).await);
        assert_eq!((reason, message.as_str()), NO_INVITATION);
    }
    bob.home().await.accept(&ticket).await.unwrap();
}

async fn inviting_again_replaces_link_and_role(database: Database) {
    let (app, ada, bob) = pair(database).await;
    let by_ada = ada.home().await;
    let first = by_ada.invite("bob@example.com", Role::Member).await.unwrap();
    meddle(&app, "UPDATE invitations SET created_at_ms = created_at_ms - 60000", Vec::new()).await;
    let second = by_ada.invite("BOB@example.com", Role::Admin).await.unwrap();
    assert_eq!(by_ada.members().await.unwrap().len(), 2);
    assert_eq!(reason(bob.home().await.accept(&ticket(&first)).await), Reason::NotFound);
    // What an Owner offers to an Owner-to-be, an Admin does not touch.
    bob.home().await.accept(&ticket(&second)).await.unwrap();
    by_ada.invite("carl@example.com", Role::Owner).await.unwrap();
    let by_bob = bob.at(&ada.team_id).await;
    assert_eq!(reason(by_bob.invite("carl@example.com", Role::Member).await), Reason::RoleInsufficient);
    assert_eq!(app.mails().await.len(), 3);
}

async fn an_invitation_that_was_taken_back_is_worth_nothing(database: Database) {
    let (_, ada, bob) = pair(database).await;
    let by_ada = ada.home().await;
    let invited = by_ada.invite("bob@example.com", Role::Member).await.unwrap();
    let id = invited.member.clone().unwrap().id;
    assert_eq!(refusal(by_ada.give_role(&id, Role::Admin).await).1, "No such member", "it is nobody's role yet");
    let outcomes = at_once(20, |_| {
        let (by_ada, id) = (by_ada.clone(), id.clone());
        async move { by_ada.remove(&id).await }
    })
    .await;
    assert_eq!(outcomes.iter().filter(|outcome| outcome.is_ok()).count(), 1);
    assert_eq!(reason(bob.home().await.accept(&ticket(&invited)).await), Reason::NotFound);
    assert_eq!(by_ada.members().await.unwrap().len(), 1);
}

async fn who_is_in_already_uses_the_link_up(database: Database) {
    let (app, ada, bob) = pair(database).await;
    let invited = ada.home().await.invite("bob@example.com", Role::Admin).await.unwrap();
    meddle(
        &app,
        "INSERT INTO memberships (team_id, user_id, role, created_at_ms) VALUES ($1, $2, 'member', 1)",
        vec![ada.team_id.as_str().into(), bob.user_id.as_str().into()],
    )
    .await;
    let joined = bob.home().await.accept(&ticket(&invited)).await.unwrap();
    assert_eq!((joined.id.as_str(), joined.role()), (ada.team_id.as_str(), Role::Member), "it changes no role");
    assert_eq!(reason(bob.home().await.accept(&ticket(&invited)).await), Reason::NotFound);
}

async fn who_is_in_already_cannot_be_invited(database: Database) {
    let (_, ada, bob) = pair(database).await;
    ada.takes_in(&ada.team_id, &bob, Role::Member).await;
    for email in ["bob@example.com", "ADA@example.com"] {
        assert_eq!(reason(ada.home().await.invite(email, Role::Admin).await), Reason::Conflict);
    }
}

async fn a_team_has_a_hundred_people_at_most(database: Database) {
    let (app, ada, _) = pair(database).await;
    for number in 1..95_i64 {
        meddle(
            &app,
            "INSERT INTO invitations (id, team_id, email_lower, email, role, token_hash, invited_by, created_at_ms, \
             expires_at_ms) VALUES ($1, $2, $3, $3, 'member', $4, 'usr_1', 1, $5)",
            vec![
                format!("inv_{number}").into(),
                ada.team_id.as_str().into(),
                format!("somebody-{number}@example.com").into(),
                number.to_be_bytes().to_vec().into(),
                i64::MAX.into(),
            ],
        )
        .await;
    }
    let by_ada = ada.home().await;
    let outcomes = at_once(20, |number| {
        let by_ada = by_ada.clone();
        async move { by_ada.invite(&format!("new-{number}@example.com"), Role::Member).await }
    })
    .await;
    let (made, refused): (Vec<_>, Vec<_>) = outcomes.into_iter().partition(Result::is_ok);
    assert_eq!(made.len(), 5);
    assert!(refused.into_iter().all(|refused| reason(refused) == Reason::Conflict));
    by_ada.invite("somebody-1@example.com", Role::Admin).await.expect("it takes no new place");
    // One that has ended takes no place.
    meddle(&app, "UPDATE invitations SET expires_at_ms = 1 WHERE id = 'inv_2'", Vec::new()).await;
    by_ada.invite("the-last@example.com", Role::Member).await.unwrap();
    assert_eq!(reason(by_ada.invite("too-late@example.com", Role::Member).await), Reason::Conflict);
    assert_eq!(by_ada.members().await.unwrap().len(), 100);
}

async fn a_page_of_people_goes_on_where_the_last_one_ended(database: Database) {
    let (app, ada, bob) = pair(database).await;
    ada.takes_in(&ada.team_id, &bob, Role::Member).await;
    for number in 0..3 {
        let other = Person::new(&app, &format!("joined-{number}@example.com")).await;
        ada.takes_in(&ada.team_id, &other, Role::Member).await;
    }
    for number in 0..4 {
        ada.home().await.invite(&format!("invited-{number}@example.com"), Role::Member).await.unwrap();
    }
    // Times are all alike here and there: ids decide then.
    meddle(&app, "UPDATE memberships SET created_at_ms = 7", Vec::new()).await;
    let by_ada = ada.home().await;
    let whole: Vec<_> = by_ada.members().await.unwrap().into_iter().map(|member| member.id).collect();
    assert_eq!(whole.len(), 9);
    let mut newest_first = whole.clone();
    newest_first[..4].sort_by(|a, b| b.cmp(a));
    newest_first[4..].sort_by(|a, b| b.cmp(a));
    assert_eq!(whole, newest_first);
    assert!(whole[..4].iter().all(|id| id.starts_with("inv_")), "those who are invited come first: {whole:?}");
    for size in 1..=10 {
        let (mut seen, mut token) = (Vec::new(), String::new());
        loop {
            let page = by_ada.page(size, &token).await.unwrap();
            assert!(page.members.len() <= usize::try_from(size).unwrap());
            seen.extend(page.members.into_iter().map(|member| member.id));
            match page.next_page_token {
                Some(next) => token = next,
                None => break,
            }
        }
        assert_eq!(seen, whole, "by {size}");
    }
}

async fn the_last_owner_stays(database: Database) {
    let (_, ada, bob) = pair(database).await;
    ada.takes_in(&ada.team_id, &bob, Role::Admin).await;
    let by_ada = ada.home().await;
    let outcomes = [
        by_ada.leave().await,
        by_ada.remove(&ada.user_id).await,
        by_ada.give_role(&ada.user_id, Role::Admin).await.map(drop),
    ];
    for outcome in outcomes {
        let (reason, message) = refusal(outcome);
        assert_eq!(reason, Reason::Conflict);
        assert!(message.contains("last Owner"), "{message}");
    }
    by_ada.give_role(&ada.user_id, Role::Owner).await.expect("it changes nothing");
    by_ada.give_role(&bob.user_id, Role::Owner).await.unwrap();
    by_ada.leave().await.unwrap();
    assert_eq!(refusal(ada.acting_in(&ada.team_id).await.map(drop)).1, "No such team");
    assert_eq!(bob.role_in(&ada.team_id).await, Role::Owner);
}

const OWNERS: &str = "SELECT COUNT(*) AS n FROM memberships m JOIN teams t ON t.id = m.team_id \
                      WHERE m.role = 'owner' AND t.name = 'Engines'";

async fn of_two_owners_who_demote_each_other_one_stays(database: Database) {
    let (app, ada, bob) = pair(database).await;
    let team = ada.new_team("Engines").await;
    ada.takes_in(&team, &bob, Role::Owner).await;
    let (by_ada, by_bob) = (ada.at(&team).await, bob.at(&team).await);
    let outcomes = at_once(20, |number| {
        let (by_ada, by_bob) = (by_ada.clone(), by_bob.clone());
        let (ada, bob) = (ada.user_id.clone(), bob.user_id.clone());
        async move {
            if number % 2 == 0 {
                by_ada.give_role(&bob, Role::Member).await
            } else {
                by_bob.give_role(&ada, Role::Member).await
            }
        }
    })
    .await;
    for refused in outcomes.into_iter().filter_map(Result::err) {
        assert!(matches!(refused.reason(), Reason::Conflict | Reason::RoleInsufficient), "{refused}");
    }
    assert_eq!(count(&app, OWNERS).await, 1);
}

async fn of_two_owners_who_remove_each_other_one_stays(database: Database) {
    let (app, ada, bob) = pair(database).await;
    let team = ada.new_team("Engines").await;
    ada.takes_in(&team, &bob, Role::Owner).await;
    let (by_ada, by_bob) = (ada.at(&team).await, bob.at(&team).await);
    let outcomes = at_once(20, |number| {
        let (by_ada, by_bob) = (by_ada.clone(), by_bob.clone());
        let (ada, bob) = (ada.user_id.clone(), bob.user_id.clone());
        async move { if number % 2 == 0 { by_ada.remove(&bob).await } else { by_bob.remove(&ada).await } }
    })
    .await;
    assert_eq!(outcomes.iter().filter(|outcome| outcome.is_ok()).count(), 1);
    assert!(outcomes.into_iter().filter_map(Result::err).all(|refused| refused.reason() == Reason::NotFound));
    assert_eq!(count(&app, OWNERS).await, 1);
}

async fn of_twenty_owners_who_leave_at_once_one_stays(database: Database) {
    let (app, ada, _) = pair(database).await;
    let team = ada.new_team("Engines").await;
    let mut owners = vec![ada.at(&team).await];
    for number in 1..20 {
        let user = format!("usr_{number}");
        meddle(
            &app,
            "INSERT INTO memberships (team_id, user_id, role, created_at_ms) VALUES ($1, $2, 'owner', 1)",
            vec![team.as_str().into(), user.as_str().into()],
        )
        .await;
        let mut owner = owners[0].clone();
        owner.principal = Principal { id: user.clone(), user_id: user, ..owner.principal };
        owners.push(owner);
    }
    let outcomes = at_once(20, |number| {
        let owner = owners[number].clone();
        async move { owner.leave().await }
    })
    .await;
    let refused: Vec<_> = outcomes.into_iter().filter_map(Result::err).collect();
    assert_eq!(refused.iter().map(paperkey_proto::Error::reason).collect::<Vec<_>>(), [Reason::Conflict]);
    assert_eq!(count(&app, OWNERS).await, 1);
}

async fn a_role_that_changes_is_announced(database: Database) {
    let (app, ada, bob) = pair(database).await;
    ada.takes_in(&ada.team_id, &bob, Role::Member).await;
    let remembered = app.remember(&bob.at(&ada.team_id).await.principal);
    let before = app.changes(-1).await.seq;
    let changed = ada.home().await.give_role(&bob.user_id, Role::Admin).await.unwrap();
    assert_eq!((changed.role(), changed.email.as_str()), (Role::Admin, "Bob@Example.com"));
    assert!(!remembered.is_served());
    assert_eq!(app.changes(before).await.subjects, [format!("user:{}", bob.user_id)]);
    assert_eq!(bob.role_in(&ada.team_id).await, Role::Admin);
    // What changes nothing is no change.
    ada.home().await.give_role(&bob.user_id, Role::Admin).await.unwrap();
    let nothing = UpdateMemberRequest { user_id: bob.user_id.clone(), ..Default::default() };
    let same = answer(ada.home().await.people().update_member(nothing).await).unwrap().member.unwrap();
    assert_eq!(same.role(), Role::Admin);
    assert_eq!(app.changes(before).await.subjects.len(), 1);
}

async fn the_tokens_of_a_person_end_with_the_membership(database: Database) {
    let (app, ada, bob) = pair(database).await;
    ada.takes_in(&ada.team_id, &bob, Role::Member).await;
    for (id, kind, team, user) in [
        ("key_1", "user", &ada.team_id, Some(&bob.user_id)),
        ("key_2", "user", &ada.team_id, Some(&ada.user_id)),
        ("key_3", "user", &bob.team_id, Some(&bob.user_id)),
        ("key_4", "team", &ada.team_id, None),
    ] {
        meddle(
            &app,
            "INSERT INTO keys (id, kind, team_id, mode, user_id, created_by, name, token_hash, shown_prefix, scopes, \
             read_only, enabled, created_at_ms) \
             VALUES ($1, $2, $3, 'live', $4, $5, 'CI', $6, 'po_ut_x', '[]', FALSE, TRUE, 1)",
            vec![
                id.into(),
                kind.into(),
                team.as_str().into(),
                user.map(String::as_str).into(),
                bob.user_id.as_str().into(),
                id.as_bytes().to_vec().into(),
            ],
        )
        .await;
    }
    // One that has expired ended before.
    meddle(
        &app,
        "INSERT INTO keys (id, kind, team_id, mode, user_id, name, token_hash, shown_prefix, scopes, read_only, enabled, \
         created_at_ms, expires_at_ms) \
         VALUES ('key_5', 'user', $1, 'live', $2, 'CI', $3, 'po_ut_x', '[]', FALSE, TRUE, 1, 2)",
        vec![ada.team_id.as_str().into(), bob.user_id.as_str().into(), b"key_5".to_vec().into()],
    )
    .await;
    meddle(&app, "UPDATE users SET name = 'Ada L.' WHERE id = $1", vec![ada.user_id.as_str().into()]).await;
    let remembered = app.remember(&bob.at(&ada.team_id).await.principal);
    let before = app.changes(-1).await.seq;
    ada.home().await.remove(&bob.user_id).await.unwrap();
    assert!(!remembered.is_served());
    let mut announced = app.changes(before).await.subjects;
    announced.sort();
    assert_eq!(announced, ["key:key_1".to_owned(), format!("user:{}", bob.user_id)]);
    let ended = "SELECT COUNT(*) AS n FROM keys WHERE revoked_at_ms IS NOT NULL AND revoked_by_name = 'Ada L.'";
    assert_eq!(count(&app, ended).await, 1);
    assert_eq!(count(&app, "SELECT COUNT(*) AS n FROM keys WHERE revoked_at_ms IS NOT NULL").await, 1);
    assert_eq!(count(&app, "SELECT COUNT(*) AS n FROM outbox WHERE topic = 'api_key.revoked'").await, 1);
    assert_eq!(refusal(ada.home().await.remove(&bob.user_id).await).1, "No such member");
    assert_eq!(refusal(bob.acting_in(&ada.team_id).await.map(drop)).1, "No such team");
}

async fn nobody_holds_the_token_of_one_who_becomes_owner(database: Database) {
    let (app, ada, bob) = pair(database).await;
    let carl = Person::new(&app, "carl@example.com").await;
    ada.takes_in(&ada.team_id, &bob, Role::Admin).await;
    ada.takes_in(&ada.team_id, &carl, Role::Admin).await;
    let (by_bob, by_carl) = (bob.at(&ada.team_id).await, carl.at(&ada.team_id).await);
    let (own, to_be_rotated) = (by_bob.token_for(&bob).await, by_bob.token_for(&bob).await);
    let from_carl = by_carl.token_for(&bob).await;
    let rotated = by_carl.rotated(&to_be_rotated.0).await;
    let again = Acting { app: Arc::clone(&app), principal: app.authenticate(&rotated.1).await.unwrap() };
    let by_itself = again.rotated_by_itself().await;
    let own_again = by_bob.rotated(&own.0).await;
    let of_carl = by_carl.token_for(&carl).await;
    let elsewhere = bob.home().await.token_for(&bob).await;

    let remembered = app.remember(&app.authenticate(&from_carl.1).await.unwrap());
    ada.home().await.give_role(&bob.user_id, Role::Manager).await.unwrap();
    assert!(app.authenticate(&from_carl.1).await.is_ok(), "an Admin may hold it");
    ada.home().await.give_role(&bob.user_id, Role::Owner).await.unwrap();
    assert!(!remembered.is_served());
    for (_, held_by_carl) in [&from_carl, &rotated, &by_itself] {
        assert_eq!(reason(app.authenticate(held_by_carl).await), Reason::InvalidCredentials);
    }
    for (_, own) in [&own, &own_again, &to_be_rotated, &of_carl, &elsewhere] {
        assert!(app.authenticate(own).await.is_ok());
    }
    assert_eq!(count(&app, "SELECT COUNT(*) AS n FROM outbox WHERE topic = 'api_key.revoked'").await, 3);
}

async fn what_is_done_to_people_stands_in_the_audit_log(database: Database) {
    let (app, ada, bob) = pair(database).await;
    let by_ada = ada.home().await;
    ada.takes_in(&ada.team_id, &bob, Role::Member).await;
    by_ada.give_role(&bob.user_id, Role::Owner).await.unwrap();
    by_ada.rename_team("Engines").await.unwrap();
    bob.at(&ada.team_id).await.leave().await.unwrap();
    let new = ada.new_team("New").await;
    ada.at(&new).await.delete_team().await.unwrap();
    for (action, actor) in [
        ("MemberService/CreateMember", &ada),
        ("MemberService/AcceptInvitation", &bob),
        ("MemberService/UpdateMember", &ada),
        ("TeamService/UpdateTeam", &ada),
        ("TeamService/LeaveTeam", &bob),
        ("TeamService/CreateTeam", &ada),
        ("TeamService/DeleteTeam", &ada),
    ] {
        let sql: &'static str = Box::leak(
            format!(
                "SELECT COUNT(*) AS n FROM audit_entries WHERE action = '/paperkey.auth.v1.{action}' \
                 AND actor_id = '{}' AND request_id = 'req_test'",
                actor.user_id
            )
            .into_boxed_str(),
        );
        assert_eq!(count(&app, sql).await, 1, "{action}");
    }
}

async fn strange_roles_emails_and_pages_are_refused_politely(database: Database) {
    let (app, ada, bob) = pair(database).await;
    let by_ada = ada.home().await;
    for email in ["", "nobody", "a@b@c", "a b@example.com", "a@b\r\nBcc: eve@example.com", "\u{0}@b", "a@-", "<a>@b.c"]
    {
        assert_eq!(reason(by_ada.invite(email, Role::Member).await), Reason::ValidationFailed, "{email:?}");
    }
    assert_eq!(reason(by_ada.invite("new@example.com", Role::Unspecified).await), Reason::ValidationFailed);
    let unknown = UpdateMemberRequest { user_id: bob.user_id.clone(), role: 77, ..Default::default() };
    assert!(answer(by_ada.people().update_member(unknown).await).is_err());
    for (size, token) in [(0, ""), (-1, ""), (1, "%"), (1, "dXNyXzE"), (1, "AA")] {
        assert_eq!(reason(by_ada.page(size, token).await), Reason::ValidationFailed, "{size} {token:?}");
    }
    assert!(by_ada.page(i32::MAX, "").await.is_ok());
    assert!(app.mails().await.is_empty(), "nobody was mailed");
}

#[tokio::test(flavor = "multi_thread")]
async fn invitations_are_no_way_to_flood_people_with_mail() {
    by_hand(|app, hand| async move {
        let ada = Person::new(&app, "ada@example.com").await;
        let by_ada = ada.home().await;
        let waits = |outcome: Result<CreateMemberResponse, Error>| {
            let error = outcome.unwrap_err();
            assert_eq!(error.reason(), Reason::RateLimited);
            error.retry_after().unwrap()
        };
        by_ada.invite("victim@example.com", Role::Member).await.unwrap();
        let outcomes = at_once(10, |_| {
            let by_ada = by_ada.clone();
            async move { by_ada.invite("VICTIM@example.com", Role::Member).await }
        })
        .await;
        assert!(outcomes.into_iter().all(|refused| waits(refused) == Duration::from_mins(1)));
        hand.advance_ms(59_999);
        assert_eq!(waits(by_ada.invite("victim@example.com", Role::Member).await), Duration::from_millis(1));
        hand.advance_ms(1);
        by_ada.invite("victim@example.com", Role::Member).await.unwrap();
        // What is taken back was mailed all the same.
        for number in 0..98 {
            let invited = by_ada.invite(&format!("new-{number}@example.com"), Role::Member).await.unwrap();
            by_ada.remove(&invited.member.unwrap().id).await.unwrap();
        }
        let left_ms = DAY_MS - 60_000;
        let left = Duration::from_millis(u64::try_from(left_ms).unwrap());
        assert_eq!(waits(by_ada.invite("one-more@example.com", Role::Member).await), left);
        hand.advance_ms(left_ms - 1);
        let by_ada = ada.back().await.home().await;
        assert_eq!(waits(by_ada.invite("one-more@example.com", Role::Member).await), Duration::from_millis(1));
        hand.advance_ms(1);
        by_ada.invite("one-more@example.com", Role::Member).await.unwrap();
        assert_eq!(count(&app, "SELECT COUNT(*) AS n FROM mails").await, 101);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_is_good_for_seven_days() {
    by_hand(|app, hand| async move {
        let (ada, bob) = (Person::new(&app, "ada@example.com").await, Person::new(&app, "bob@example.com").await);
        let carl = Person::new(&app, "carl@example.com").await;
        let to_bob = ada.home().await.invite(&bob.email, Role::Member).await.unwrap();
        let to_carl = ada.home().await.invite(&carl.email, Role::Member).await.unwrap();
        hand.advance_ms(7 * DAY_MS - 1);
        bob.home().await.accept(&ticket(&to_bob)).await.unwrap();
        hand.advance_ms(1);
        let (ada, carl) = (ada.back().await, carl.back().await);
        let (reason, message) = refusal(carl.home().await.accept(&ticket(&to_carl)).await);
        assert_eq!((reason, message.as_str()), NO_INVITATION);
        assert_eq!(ada.home().await.members().await.unwrap().len(), 2);
        let id = to_carl.member.unwrap().id;
        assert_eq!(refusal(ada.home().await.remove(&id).await).1, "No such member");
        app.run_once("auth/forget_ended").await;
        assert_eq!(count(&app, "SELECT COUNT(*) AS n FROM invitations").await, 0);
    })
    .await;
}
