//! Teams: made, changed, deleted, and who may do what in them.

use std::sync::Arc;

use paperkey_kit::{config::Tiers, db::Database, store_suite};
use paperkey_proto::{
    Error,
    auth::v1::{DeleteTeamRequest, GetTeamRequest, LeakAction, LeaveTeamRequest, UpdateTeamRequest},
    errors::v1::Reason,
    principal::v1::{Mode, Role},
};
use prost_types::FieldMask;

use super::{Acting, DAY_MS, Person, ROLES, START_MS, at_once, by_hand, count, meddle, ticket};
use crate::common::{App, answer, fresh, reason, refusal};

store_suite! {
    paperkey_migrations::auth::Migrator;
    a_team_is_made_found_and_changed,
    every_role_does_what_its_row_of_the_table_says_and_no_more,
    what_a_credential_said_a_moment_ago_does_not_count,
    a_foreign_team_is_not_there,
    an_account_is_in_fifty_teams_at_most,
    the_installation_sets_the_tier,
    a_deleted_team_is_gone_at_once,
    who_had_no_team_is_known_with_the_new_one_at_once,
    of_many_deletions_of_a_team_one_succeeds,
}

async fn a_team_is_made_found_and_changed(database: Database) {
    let app = Arc::new(App::new(database));
    let ada = Person::new(&app, "ada@example.com").await;
    let made = ada.home().await.create_team("  Engines  ").await.unwrap();
    assert_eq!((made.name.as_str(), made.role(), made.tier.as_str()), ("Engines", Role::Owner, "free"));
    assert_eq!(made.leak_action(), LeakAction::Revoke);
    let acting = ada.at(&made.id).await;
    assert_eq!(acting.team("").await.unwrap(), made);
    assert_eq!(acting.team(&made.id).await.unwrap(), made);
    let names: Vec<_> = ada.home().await.list_teams().await.into_iter().map(|team| team.id).collect();
    assert_eq!(names, [ada.team_id.clone(), made.id.clone()], "oldest first");

    let masked = |name: Option<&str>, leak_action: LeakAction, paths: &[&str]| UpdateTeamRequest {
        team_id: made.id.clone(),
        name: name.map(str::to_owned),
        leak_action: leak_action.into(),
        update_mask: Some(FieldMask { paths: paths.iter().map(|path| (*path).to_owned()).collect() }),
    };
    let both = acting.update_team(masked(Some(" Works "), LeakAction::Alert, &["name", "leak_action"])).await.unwrap();
    assert_eq!((both.name.as_str(), both.leak_action()), ("Works", LeakAction::Alert));
    let one = acting.update_team(masked(Some("Not named"), LeakAction::Revoke, &["leak_action"])).await.unwrap();
    assert_eq!((one.name.as_str(), one.leak_action()), ("Works", LeakAction::Revoke));
    let none = acting.update_team(masked(Some("Not named"), LeakAction::Alert, &[])).await.unwrap();
    assert_eq!(none, one);
    for (request, field) in [
        (masked(None, LeakAction::Alert, &["name"]), "name"),
        (masked(Some("  "), LeakAction::Alert, &["name"]), "name"),
        (masked(Some("a\nb"), LeakAction::Alert, &["name"]), "name"),
        (masked(Some("x"), LeakAction::Unspecified, &["leak_action"]), "leak_action"),
        (masked(Some("x"), LeakAction::Alert, &["tier"]), "tier"),
    ] {
        let error = acting.update_team(request).await.unwrap_err();
        assert_eq!((error.reason(), error.violations()[0].field.as_str()), (Reason::ValidationFailed, field));
    }
    for bad in ["", "   ", "a\u{0}b", &"x".repeat(101)] {
        assert_eq!(reason(ada.home().await.create_team(bad).await), Reason::ValidationFailed, "{bad:?}");
    }
}

/// What somebody may try in a team, and the weakest role that may.
#[derive(Clone, Copy, Debug)]
enum Deed {
    SeeTheTeam,
    SeeThePeople,
    Rename,
    InviteAMember,
    InviteAnOwner,
    TakeAnInvitationBack,
    TakeAnOwnersInvitationBack,
    PromoteAMember,
    MakeAnOwner,
    DemoteAnOwner,
    RemoveAMember,
    RemoveAnOwner,
    Leave,
    Delete,
}

impl Deed {
    const ALL: [Self; 14] = [
        Self::SeeTheTeam,
        Self::SeeThePeople,
        Self::Rename,
        Self::InviteAMember,
        Self::InviteAnOwner,
        Self::TakeAnInvitationBack,
        Self::TakeAnOwnersInvitationBack,
        Self::PromoteAMember,
        Self::MakeAnOwner,
        Self::DemoteAnOwner,
        Self::RemoveAMember,
        Self::RemoveAnOwner,
        Self::Leave,
        Self::Delete,
    ];

    fn is_allowed(self, role: Role) -> bool {
        let weakest = match self {
            Self::SeeTheTeam | Self::Leave => Role::Member,
            Self::SeeThePeople
            | Self::Rename
            | Self::InviteAMember
            | Self::TakeAnInvitationBack
            | Self::PromoteAMember
            | Self::RemoveAMember => Role::Admin,
            Self::InviteAnOwner
            | Self::TakeAnOwnersInvitationBack
            | Self::MakeAnOwner
            | Self::DemoteAnOwner
            | Self::RemoveAnOwner
            | Self::Delete => Role::Owner,
        };
        let strength = |role| ROLES.iter().position(|other| *other == role).unwrap();
        strength(role) <= strength(weakest)
    }

    async fn done_by(self, actor: &Acting, owner: &Person, member: &Person, invited: [&str; 2]) -> Result<(), Error> {
        match self {
            Self::SeeTheTeam => actor.team("").await.map(drop),
            Self::SeeThePeople => actor.members().await.map(drop),
            Self::Rename => actor.rename_team("Renamed").await.map(drop),
            Self::InviteAMember => actor.invite("new@example.com", Role::Member).await.map(drop),
            Self::InviteAnOwner => actor.invite("new@example.com", Role::Owner).await.map(drop),
            Self::TakeAnInvitationBack => actor.remove(invited[0]).await,
            Self::TakeAnOwnersInvitationBack => actor.remove(invited[1]).await,
            Self::PromoteAMember => actor.give_role(&member.user_id, Role::Manager).await.map(drop),
            Self::MakeAnOwner => actor.give_role(&member.user_id, Role::Owner).await.map(drop),
            Self::DemoteAnOwner => actor.give_role(&owner.user_id, Role::Admin).await.map(drop),
            Self::RemoveAMember => actor.remove(&member.user_id).await,
            Self::RemoveAnOwner => actor.remove(&owner.user_id).await,
            Self::Leave => actor.leave().await,
            Self::Delete => actor.delete_team().await,
        }
    }
}

async fn every_role_does_what_its_row_of_the_table_says_and_no_more(database: Database) {
    let app = Arc::new(App::new(database));
    let [boss, owner, member, actor] = [
        Person::new(&app, "boss@example.com").await,
        Person::new(&app, "owner@example.com").await,
        Person::new(&app, "member@example.com").await,
        Person::new(&app, "actor@example.com").await,
    ];
    for deed in Deed::ALL {
        for role in ROLES {
            let team = boss.new_team("Engines").await;
            for (person, role) in [(&owner, Role::Owner), (&member, Role::Member), (&actor, role)] {
                boss.takes_in(&team, person, role).await;
            }
            let by_boss = boss.at(&team).await;
            let one = by_boss.invite("one@example.com", Role::Member).await.unwrap().member.unwrap().id;
            let two = by_boss.invite("two@example.com", Role::Owner).await.unwrap().member.unwrap().id;
            let acting = actor.at(&team).await;
            assert_eq!(acting.principal.role(), role);
            let outcome = deed.done_by(&acting, &owner, &member, [&one, &two]).await;
            match outcome {
                Ok(()) => assert!(deed.is_allowed(role), "{deed:?} by {role:?} was not refused"),
                Err(error) => {
                    assert!(!deed.is_allowed(role), "{deed:?} by {role:?}: {error}");
                    assert_eq!(error.reason(), Reason::RoleInsufficient, "{deed:?} by {role:?}");
                }
            }
            // They may be in fifty at most.
            let _ = by_boss.delete_team().await;
        }
    }
}

async fn what_a_credential_said_a_moment_ago_does_not_count(database: Database) {
    let app = Arc::new(App::new(database));
    let (ada, bob) = (Person::new(&app, "ada@example.com").await, Person::new(&app, "bob@example.com").await);
    let team = ada.new_team("Engines").await;
    ada.takes_in(&team, &bob, Role::Owner).await;
    let (by_ada, by_bob) = (ada.at(&team).await, bob.at(&team).await);
    by_ada.give_role(&bob.user_id, Role::Member).await.unwrap();
    // As a gateway may still see him for a moment.
    assert_eq!(reason(by_bob.rename_team("Bob's").await), Reason::RoleInsufficient);
    assert_eq!(reason(by_bob.give_role(&bob.user_id, Role::Owner).await), Reason::RoleInsufficient);
    assert_eq!(reason(by_bob.remove(&ada.user_id).await), Reason::RoleInsufficient);
    assert_eq!(reason(by_bob.delete_team().await), Reason::RoleInsufficient);
    by_ada.remove(&bob.user_id).await.unwrap();
    for outcome in [by_bob.rename_team("Bob's").await.map(drop), by_bob.delete_team().await, by_bob.leave().await] {
        assert_eq!(refusal(outcome), (Reason::NotFound, "No such team".to_owned()));
    }
}

async fn a_foreign_team_is_not_there(database: Database) {
    let app = Arc::new(App::new(database));
    let (ada, eve) = (Person::new(&app, "ada@example.com").await, Person::new(&app, "eve@example.com").await);
    let absent = (Reason::NotFound, "No such team".to_owned());
    for team in [ada.team_id.as_str(), "team_0", "' OR 1=1 --", "\u{7f}"] {
        assert_eq!(refusal(eve.acting_in(team).await.map(drop)), absent, "{team}");
        // Over gRPC the message may name another team than the credential acts in.
        let by_eve = eve.home().await;
        assert_eq!(refusal(by_eve.team(team).await), absent);
        let team_id = team.to_owned();
        let update = UpdateTeamRequest { team_id: team_id.clone(), name: Some("Eve's".into()), ..Default::default() };
        assert_eq!(refusal(by_eve.update_team(update).await), absent);
        let delete = DeleteTeamRequest { team_id: team_id.clone() };
        assert_eq!(refusal(answer(by_eve.teams().delete_team(delete).await)), absent);
        let leave = LeaveTeamRequest { team_id };
        assert_eq!(refusal(answer(by_eve.teams().leave_team(leave).await)), absent);
    }
    let own = GetTeamRequest { team_id: eve.team_id.clone() };
    assert!(answer(eve.home().await.teams().get_team(own).await).is_ok());
    // People of another team are not there either.
    let by_eve = eve.home().await;
    for stranger in [ada.user_id.as_str(), "usr_0", "inv_0", "\u{7f}", "' OR 1=1 --"] {
        assert_eq!(refusal(by_eve.remove(stranger).await).1, "No such member");
        assert_eq!(refusal(by_eve.give_role(stranger, Role::Member).await).1, "No such member");
    }
}

async fn an_account_is_in_fifty_teams_at_most(database: Database) {
    let app = Arc::new(App::new(database));
    let ada = Person::new(&app, "ada@example.com").await;
    let bob = Person::new(&app, "bob@example.com").await;
    let acting = ada.home().await;
    for _ in 1..40 {
        acting.create_team("Engines").await.unwrap();
    }
    let outcomes = at_once(20, |_| {
        let acting = acting.clone();
        async move { acting.create_team("Engines").await }
    })
    .await;
    let (made, refused): (Vec<_>, Vec<_>) = outcomes.into_iter().partition(Result::is_ok);
    assert_eq!(made.len(), 10);
    assert!(refused.into_iter().all(|refused| reason(refused) == Reason::Conflict));
    let invited = bob.home().await.invite(&ada.email, Role::Member).await.unwrap();
    assert_eq!(reason(acting.accept(&ticket(&invited)).await), Reason::Conflict);
    let last = made.into_iter().last().unwrap().unwrap().id;
    ada.at(&last).await.delete_team().await.unwrap();
    acting.accept(&ticket(&invited)).await.unwrap();
}

async fn the_installation_sets_the_tier(database: Database) {
    let app = Arc::new(App::new(database));
    let ada = Person::new(&app, "ada@example.com").await;
    let key = app.system_key().await;
    let principal = app.authenticate(key.expose()).await.unwrap();
    let system = Acting { app: Arc::clone(&app), principal };
    let remembered = app.remember(&ada.home().await.principal);
    system.set_tier(&ada.team_id, "scale").await.unwrap();
    assert!(!remembered.is_served());
    assert_eq!(ada.home().await.principal.tier, "scale");
    assert_eq!(reason(system.set_tier(&ada.team_id, "gold").await), Reason::ValidationFailed);
    for absent in ["team_0", "\u{7f}"] {
        assert_eq!(refusal(system.set_tier(absent, "pro").await).1, "No such team");
    }
    assert_eq!(reason(ada.home().await.set_tier(&ada.team_id, "pro").await), Reason::ScopeInsufficient);
}

async fn a_deleted_team_is_gone_at_once(database: Database) {
    let app = Arc::new(App::new(database));
    let registered = app.registered("ada@example.com").await;
    let team_id = registered.team.unwrap().id;
    let pair = app.provision("prod_1", &team_id, Mode::Live).await.unwrap();
    let ada = Person {
        app: Arc::clone(&app),
        email: "ada@example.com".to_owned(),
        token: registered.token.clone(),
        user_id: registered.user.unwrap().id,
        team_id,
    };
    let acting = ada.home().await;
    let remembered = app.remember(&acting.principal);
    let before = app.changes(-1).await.seq;
    acting.delete_team().await.unwrap();
    assert!(!remembered.is_served());
    assert_eq!(app.changes(before).await.subjects, [format!("team:{}", ada.team_id)]);
    for token in [&registered.live_key, &registered.free_key, &pair.secret_key, &pair.api_key.unwrap().public_key] {
        assert_eq!(reason(app.authenticate(token).await), Reason::InvalidCredentials);
    }
    assert_eq!(refusal(ada.acting_in(&ada.team_id).await.map(drop)).1, "No such team");
    assert_eq!(ada.home().await.principal.team_id, "", "their only team is gone, and they still are somebody");
    assert!(ada.home().await.list_teams().await.is_empty());
    assert!(app.me(&acting.principal).await.unwrap().teams.is_empty());
    for outcome in
        [acting.team("").await.map(drop), acting.delete_team().await, acting.rename_team("x").await.map(drop)]
    {
        assert_eq!(refusal(outcome), (Reason::NotFound, "No such team".to_owned()));
    }
    assert_eq!(refusal(app.admin.set_tier(&Tiers::default(), &ada.team_id, "pro").await).1, "No such team");
    assert_eq!(count(&app, "SELECT COUNT(*) AS n FROM outbox WHERE topic = 'team.deleted'").await, 3);
}

async fn who_had_no_team_is_known_with_the_new_one_at_once(database: Database) {
    let app = Arc::new(App::new(database));
    let ada = Person::new(&app, "ada@example.com").await;
    ada.home().await.delete_team().await.unwrap();
    let acting = ada.home().await;
    let remembered = app.remember(&acting.principal);
    let before = app.changes(-1).await.seq;
    let made = acting.create_team("Engines").await.unwrap();
    assert!(!remembered.is_served());
    assert_eq!(app.changes(before).await.subjects, [format!("user:{}", ada.user_id)]);
    assert_eq!(ada.home().await.principal.team_id, made.id);
}

async fn of_many_deletions_of_a_team_one_succeeds(database: Database) {
    let app = Arc::new(App::new(database));
    let ada = Person::new(&app, "ada@example.com").await;
    let acting = ada.home().await;
    let outcomes = at_once(20, |_| {
        let acting = acting.clone();
        async move { acting.delete_team().await }
    })
    .await;
    let (done, refused): (Vec<_>, Vec<_>) = outcomes.into_iter().partition(Result::is_ok);
    assert_eq!(done.len(), 1);
    assert!(refused.into_iter().all(|refused| reason(refused) == Reason::NotFound));
    assert_eq!(count(&app, "SELECT COUNT(*) AS n FROM outbox WHERE topic = 'team.deleted'").await, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_minute_after_its_deletion_nothing_is_left_of_a_team() {
    by_hand(|app, hand| async move {
        let (ada, bob) = (Person::new(&app, "ada@example.com").await, Person::new(&app, "bob@example.com").await);
        let product = fresh("prod");
        app.provision(&product, &ada.team_id, Mode::Test).await.unwrap();
        // More than one transaction removes.
        meddle(
            &app,
            "WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < 1200) \
             INSERT INTO product_registry (product_id, team_id, mode, deleted) \
             SELECT 'many_' || n, $1, 'live', TRUE FROM numbers",
            vec![ada.team_id.as_str().into()],
        )
        .await;
        ada.home().await.invite("new@example.com", Role::Member).await.unwrap();
        ada.home().await.delete_team().await.unwrap();
        let told = "SELECT COUNT(*) AS n FROM outbox WHERE topic = 'team.deleted'";
        let kept = "SELECT (SELECT COUNT(*) FROM teams) + (SELECT COUNT(*) FROM memberships) \
                    + (SELECT COUNT(*) FROM keys) + (SELECT COUNT(*) FROM invitations) \
                    + (SELECT COUNT(*) FROM product_keys) + (SELECT COUNT(*) FROM product_registry) AS n";
        hand.advance_ms(59_999);
        app.run_once("auth/teams").await;
        assert_eq!((count(&app, told).await, count(&app, kept).await), (3, 1_211));
        hand.advance_ms(1);
        at_once(5, |_| {
            let app = Arc::clone(&app);
            async move { app.run_once("auth/teams").await }
        })
        .await;
        // Bob's team, membership and two keys.
        assert_eq!((count(&app, told).await, count(&app, kept).await), (6, 4));
        assert_eq!(bob.home().await.team("").await.unwrap().id, bob.team_id);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_ends_when_its_time_is_over() {
    by_hand(|app, hand| async move {
        let ada = Person::new(&app, "ada@example.com").await;
        let ends_ms = START_MS + DAY_MS;
        meddle(&app, "UPDATE teams SET sandbox = TRUE, expires_at_ms = $1", vec![ends_ms.into()]).await;
        hand.advance_ms(DAY_MS - 1);
        app.run_once("auth/teams").await;
        assert!(ada.acting_in(&ada.team_id).await.is_ok());
        hand.advance_ms(1);
        app.run_once("auth/teams").await;
        assert_eq!(refusal(ada.acting_in(&ada.team_id).await.map(drop)).1, "No such team");
        let audited = "SELECT COUNT(*) AS n FROM audit_entries WHERE action = 'auth/expire-sandbox'";
        assert_eq!(count(&app, audited).await, 1);
        app.run_once("auth/teams").await;
        assert_eq!(count(&app, "SELECT COUNT(*) AS n FROM teams").await, 1);
        hand.advance_ms(60_000);
        app.run_once("auth/teams").await;
        assert_eq!(count(&app, "SELECT COUNT(*) AS n FROM teams").await, 0);
    })
    .await;
}
