//! `AuthService`: sign up, sign in, who am I; new names and passwords.

use paperkey_kit::{
    principal::Caller,
    secrets::Secret,
    values::{Mask, timestamp},
};
use paperkey_proto::auth::v1::{
    ForgotPasswordRequest, ForgotPasswordResponse, GetMeRequest, GetMeResponse, LoginRequest, LoginResponse,
    LogoutRequest, LogoutResponse, RegisterRequest, RegisterResponse, ResetPasswordRequest, ResetPasswordResponse,
    Team, UpdateMeRequest, UpdateMeResponse, User, auth_service_server::AuthService,
};
use tonic::{Request, Response, Status};

use crate::{
    accounts::{Accounts, Registration, Wish},
    domain::{Fault, account::Account, team::MemberTeam},
    store::Act,
};

const CHANGEABLE: [&str; 3] = ["name", "password", "current_password"];

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

    async fn update_me(&self, request: Request<UpdateMeRequest>) -> Result<Response<UpdateMeResponse>, Status> {
        let caller = Caller::of(&request)?;
        let act = Act::by(&caller, "/paperkey.auth.v1.AuthService/UpdateMe");
        let request = request.into_inner();
        let mask = Mask::new(request.update_mask, &CHANGEABLE)?;
        let wish = Wish {
            name: mask.change("name", request.name),
            password: mask.required_change("password", request.password)?.map(Secret::new),
            current_password: request.current_password.map(Secret::new),
        };
        let is_new_password = wish.password.is_some();
        let account = self.accounts.change(&caller.principal.user_id, wish, act).await?;
        let token = is_new_password.then(|| self.accounts.session(&account).expose().to_owned());
        Ok(Response::new(UpdateMeResponse { user: Some(user(account)), token }))
    }

    async fn logout(&self, request: Request<LogoutRequest>) -> Result<Response<LogoutResponse>, Status> {
        let caller = Caller::of(&request)?;
        let act = Act::by(&caller, "/paperkey.auth.v1.AuthService/Logout");
        self.accounts.sign_out(&caller.principal.user_id, act).await?;
        Ok(Response::new(LogoutResponse {}))
    }

    async fn forgot_password(
        &self,
        request: Request<ForgotPasswordRequest>,
    ) -> Result<Response<ForgotPasswordResponse>, Status> {
        let act = Act::by(&Caller::of(&request)?, "/paperkey.auth.v1.AuthService/ForgotPassword");
        self.accounts.forgot_password(&request.get_ref().email, act).await?;
        Ok(Response::new(ForgotPasswordResponse {}))
    }

    async fn reset_password(
        &self,
        request: Request<ResetPasswordRequest>,
    ) -> Result<Response<ResetPasswordResponse>, Status> {
        let act = Act::by(&Caller::of(&request)?, "/paperkey.auth.v1.AuthService/ResetPassword");
        let request = request.into_inner();
        let (ticket, password) = (Secret::new(request.token), Secret::new(request.password));
        self.accounts.use_reset(ticket, password, act).await?;
        Ok(Response::new(ResetPasswordResponse {}))
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

pub(super) fn team(team: MemberTeam) -> Team {
    Team { id: team.id, name: team.name, role: team.role.into(), tier: team.tier }
}
