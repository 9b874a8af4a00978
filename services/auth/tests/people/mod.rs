//! Teams and the people in them, and what people do with their accounts: on both engines.

mod accounts;
mod members;
mod teams;

use std::{future::Future, sync::Arc};

use futures_util::future::join_all;
use paperkey_kit::{
    clock::{Clock, ManualClock},
    db::{Database, DbError},
    testing::TestDb,
};
use paperkey_proto::{
    Error,
    auth::v1::{
        AcceptInvitationRequest, CreateMemberRequest, CreateMemberResponse, CreateTeamRequest, DeleteMemberRequest,
        DeleteTeamRequest, GetTeamRequest, LeaveTeamRequest, ListMembersRequest, ListMembersResponse, ListTeamsRequest,
        Member, SetTeamTierRequest, Team, TeamDetails, UpdateMemberRequest, UpdateTeamRequest,
        auth_service_client::AuthServiceClient, member_service_client::MemberServiceClient,
        team_service_client::TeamServiceClient,
    },
    principal::v1::{Mode, Principal, Role},
};
use sea_orm::{ConnectionTrait as _, Statement, Value};

use crate::common::{App, PASSWORD, Signed, answer};

/// All roles, the strongest first.
const ROLES: [Role; 4] = [Role::Owner, Role::Admin, Role::Manager, Role::Member];

/// Somebody with an account.
#[derive(Clone)]
struct Person {
    app: Arc<App>,
    email: String,
    token: String,
    user_id: String,
    /// Their first team.
    team_id: String,
}

/// Somebody who acts in a team, as their credential was judged when they set out.
#[derive(Clone)]
struct Acting {
    app: Arc<App>,
    principal: Principal,
}

impl Person {
    async fn new(app: &Arc<App>, email: &str) -> Self {
        let registered = app.registered(email).await;
        Self {
            app: Arc::clone(app),
            email: email.to_owned(),
            token: registered.token,
            user_id: registered.user.unwrap().id,
            team_id: registered.team.unwrap().id,
        }
    }

    /// The same person, signed in anew.
    async fn back(&self) -> Self {
        let token = self.app.login(&self.email, PASSWORD).await.unwrap().token;
        Self { token, ..self.clone() }
    }

    async fn acting_in(&self, team: &str) -> Result<Acting, Error> {
        let principal = self.app.authenticate_in(&self.token, team, Mode::Live).await?;
        Ok(Acting { app: Arc::clone(&self.app), principal })
    }

    async fn at(&self, team: &str) -> Acting {
        self.acting_in(team).await.unwrap()
    }

    /// Without naming a team.
    async fn home(&self) -> Acting {
        let principal = self.app.authenticate(&self.token).await.unwrap();
        Acting { app: Arc::clone(&self.app), principal }
    }

    async fn new_team(&self, name: &str) -> String {
        self.home().await.create_team(name).await.unwrap().id
    }

    /// Has somebody join a team of this Owner.
    async fn takes_in(&self, team: &str, other: &Self, role: Role) {
        let ticket = ticket(&self.at(team).await.invite(&other.email, role).await.unwrap());
        other.home().await.accept(&ticket).await.unwrap();
    }

    async fn role_in(&self, team: &str) -> Role {
        self.at(team).await.principal.role()
    }
}

impl Acting {
    fn teams(&self) -> TeamServiceClient<Signed> {
        TeamServiceClient::new(self.app.signed(Some(&self.principal)))
    }

    fn people(&self) -> MemberServiceClient<Signed> {
        MemberServiceClient::new(self.app.signed(Some(&self.principal)))
    }

    fn account(&self) -> AuthServiceClient<Signed> {
        AuthServiceClient::new(self.app.signed(Some(&self.principal)))
    }

    async fn create_team(&self, name: &str) -> Result<TeamDetails, Error> {
        let made = answer(self.teams().create_team(CreateTeamRequest { name: name.to_owned() }).await)?;
        Ok(made.team.unwrap())
    }

    async fn list_teams(&self) -> Vec<Team> {
        answer(self.teams().list_teams(ListTeamsRequest {}).await).unwrap().teams
    }

    async fn team(&self, named: &str) -> Result<TeamDetails, Error> {
        let found = answer(self.teams().get_team(GetTeamRequest { team_id: named.to_owned() }).await)?;
        Ok(found.team.unwrap())
    }

    async fn update_team(&self, request: UpdateTeamRequest) -> Result<TeamDetails, Error> {
        Ok(answer(self.teams().update_team(request).await)?.team.unwrap())
    }

    async fn rename_team(&self, name: &str) -> Result<TeamDetails, Error> {
        self.update_team(UpdateTeamRequest { name: Some(name.to_owned()), ..UpdateTeamRequest::default() }).await
    }

    async fn delete_team(&self) -> Result<(), Error> {
        answer(self.teams().delete_team(DeleteTeamRequest::default()).await).map(drop)
    }

    async fn leave(&self) -> Result<(), Error> {
        answer(self.teams().leave_team(LeaveTeamRequest::default()).await).map(drop)
    }

    async fn set_tier(&self, team: &str, tier: &str) -> Result<(), Error> {
        let request = SetTeamTierRequest { team_id: team.to_owned(), tier: tier.to_owned() };
        answer(self.teams().set_team_tier(request).await).map(drop)
    }

    async fn invite(&self, email: &str, role: Role) -> Result<CreateMemberResponse, Error> {
        let request = CreateMemberRequest { email: email.to_owned(), role: role.into(), ..Default::default() };
        answer(self.people().create_member(request).await)
    }

    async fn page(&self, size: i32, token: &str) -> Result<ListMembersResponse, Error> {
        let request = ListMembersRequest { page_size: Some(size), page_token: token.to_owned(), ..Default::default() };
        answer(self.people().list_members(request).await)
    }

    async fn members(&self) -> Result<Vec<Member>, Error> {
        Ok(self.page(100, "").await?.members)
    }

    async fn give_role(&self, user: &str, role: Role) -> Result<Member, Error> {
        let request = UpdateMemberRequest { user_id: user.to_owned(), role: role.into(), ..Default::default() };
        Ok(answer(self.people().update_member(request).await)?.member.unwrap())
    }

    async fn remove(&self, id: &str) -> Result<(), Error> {
        let request = DeleteMemberRequest { user_id: id.to_owned(), ..Default::default() };
        answer(self.people().delete_member(request).await).map(drop)
    }

    async fn accept(&self, ticket: &str) -> Result<Team, Error> {
        let request = AcceptInvitationRequest { token: ticket.to_owned() };
        Ok(answer(self.people().accept_invitation(request).await)?.team.unwrap())
    }
}

/// What the link of an invitation carries.
fn ticket(invited: &CreateMemberResponse) -> String {
    carried(invited.invite_url.as_deref().unwrap(), "accept-invitation")
}

/// What the link to a page carries, in a text that holds one.
fn carried(text: &str, page: &str) -> String {
    let (_, rest) = text.split_once(&format!("https://paperkey.example.com/app/{page}?token=")).unwrap();
    rest.split_whitespace().next().unwrap().to_owned()
}

/// Runs the same thing many times at once.
async fn at_once<T, F, Fut>(count: usize, what: F) -> Vec<T>
where
    F: Fn(usize) -> Fut,
    Fut: Future<Output = T> + Send + 'static,
    T: Send + 'static,
{
    let running: Vec<_> = (0..count).map(|number| tokio::spawn(what(number))).collect();
    join_all(running).await.into_iter().map(Result::unwrap).collect()
}

/// Changes the database behind the service's back.
async fn meddle(app: &App, sql: &'static str, values: Vec<Value>) {
    let meddling = app.database.write(move |tx| async move {
        let statement = Statement::from_sql_and_values(tx.get_database_backend(), sql, values);
        tx.execute_raw(statement).await?;
        Ok::<_, DbError>(())
    });
    meddling.await.unwrap();
}

/// How many rows a query counts as `n`.
async fn count(app: &App, sql: &'static str) -> i64 {
    let counting = app.database.read(move |reader| async move {
        let row = reader.query_one_raw(Statement::from_string(reader.get_database_backend(), sql)).await?.unwrap();
        Ok::<_, DbError>(row.try_get::<i64>("", "n")?)
    });
    counting.await.unwrap()
}

const START_MS: i64 = 1_790_000_000_000;
const DAY_MS: i64 = 24 * 60 * 60 * 1_000;

/// Runs a test on both engines, with a clock that the test moves.
async fn by_hand<F, Fut>(test: F)
where
    F: Fn(Arc<App>, ManualClock) -> Fut,
    Fut: Future<Output = ()>,
{
    for db in [Some(TestDb::sqlite()), TestDb::postgres().await].into_iter().flatten() {
        let (clock, hand) = Clock::manual(START_MS);
        let mut options = db.options();
        options.clock = clock;
        let database = Database::open(options).await.unwrap();
        database.migrate_up::<paperkey_migrations::auth::Migrator>().await.unwrap();
        test(Arc::new(App::new(database.clone())), hand).await;
        database.close().await;
        db.remove().await;
    }
}
