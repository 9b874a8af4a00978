//! `AuthService`: sign up, sign in, who am I.

use paperkey_kit::{principal::Caller, secrets::Secret, values::timestamp};
use paperkey_proto::auth::v1::{
    GetMeRequest, GetMeResponse, LoginRequest, LoginResponse, RegisterRequest, RegisterResponse, Team, User,
    auth_service_server::AuthService,
};
use tonic::{Request, Response, Status};

use crate::{
    accounts::{Accounts, Registration},
    domain::{Fault, account::Account, team::MemberTeam},
    store::Act,
};

/// The handlers.
#[derive(Debug)]
pub(crate) struct Handler {
    pub(crate) accounts: Accounts,
    pub(crate) registration_open: bool,
}

#[tonic::async_trait]
impl AuthService for Handler {
    async fn register(&self, request: Request<RegisterRequest>) -> Result<Response<RegisterResponse>, Status> {
        let act = Act::by(&Caller::of(&request)?, "/paperkey.auth.v1.AuthService/Register");
        let request = request.into_inner();
        if !self.registration_open {
            return Err(paperkey_proto::Error::from(Fault::RegistrationClosed).into());
        }
        let registration =
            Registration { email: request.email, password: Secret::new(request.password), name: request.name };
        let welcome = self.accounts.register(registration, act).await?;
        Ok(Response::new(RegisterResponse {
            token: self.accounts.session(&welcome.account).expose().to_owned(),
            free_key: welcome.free_key.expose().to_owned(),
            live_key: welcome.live_key.expose().to_owned(),
            user: Some(user(welcome.account)),
            team: Some(team(welcome.team)),
        }))
    }

    async fn login(&self, request: Request<LoginRequest>) -> Result<Response<LoginResponse>, Status> {
        let request = request.into_inner();
        let account = self.accounts.sign_in(&request.email, Secret::new(request.password)).await?;
        let token = self.accounts.session(&account).expose().to_owned();
        Ok(Response::new(LoginResponse { user: Some(user(account)), token }))
    }

    async fn get_me(&self, request: Request<GetMeRequest>) -> Result<Response<GetMeResponse>, Status> {
        let caller = Caller::of(&request)?;
        let (account, teams) = self.accounts.me(&caller.principal.user_id).await?;
        Ok(Response::new(GetMeResponse { user: Some(user(account)), teams: teams.into_iter().map(team).collect() }))
    }
}

fn user(account: Account) -> User {
    User {
        id: account.id,
        email: account.email,
        name: account.name,
        created_at: Some(timestamp(account.created_at_ms)),
    }
}

fn team(team: MemberTeam) -> Team {
    Team { id: team.id, name: team.name, role: team.role.into(), tier: team.tier }
}
