//! `TeamService`: teams, and what the installation sets in them.

use std::sync::Arc;

use paperkey_kit::{
    clock::Clock,
    config::Tiers,
    ids::new_id,
    principal::Caller,
    values::{Mask, timestamp},
};
use paperkey_proto::{
    Error,
    auth::v1::{
        CreateTeamRequest, CreateTeamResponse, DeleteTeamRequest, DeleteTeamResponse, GetTeamRequest, GetTeamResponse,
        LeakAction as LeakActionMessage, LeaveTeamRequest, LeaveTeamResponse, ListTeamsRequest, ListTeamsResponse,
        SetTeamLimitsRequest, SetTeamLimitsResponse, SetTeamTierRequest, SetTeamTierResponse,
        TeamDetails as TeamDetailsMessage, UpdateTeamRequest, UpdateTeamResponse, team_service_server::TeamService,
    },
};
use tonic::{Request, Response, Status};

use super::{accounts::team, members::actor};
use crate::{
    domain::{
        Fault, could_be_id,
        quota::OwnLimits,
        team::{LeakAction, TeamChanges, TeamDetails, team_name, tier_name},
    },
    store::{Act, Store},
};

const CHANGEABLE: [&str; 2] = ["name", "leak_action"];

/// The handlers.
#[derive(Debug)]
pub(crate) struct Handler {
    pub(crate) store: Store,
    pub(crate) clock: Clock,
    pub(crate) tiers: Arc<Tiers>,
}

#[tonic::async_trait]
impl TeamService for Handler {
    async fn create_team(&self, request: Request<CreateTeamRequest>) -> Result<Response<CreateTeamResponse>, Status> {
        let caller = Caller::of(&request)?;
        let answer = |made: &TeamDetails| CreateTeamResponse { team: Some(encode(made.clone())) };
        let act = Act::by(&caller, "/paperkey.auth.v1.TeamService/CreateTeam").answered_by(answer);
        let name = team_name(&request.into_inner().name)?;
        let user_id = caller.principal.user_id.clone();
        let made = self.store.create_team(new_id("team", &self.clock), name, user_id, act).await?;
        Ok(Response::new(answer(&made)))
    }

    async fn list_teams(&self, request: Request<ListTeamsRequest>) -> Result<Response<ListTeamsResponse>, Status> {
        let caller = Caller::of(&request)?;
        let found = self.store.account_and_teams(&caller.principal.user_id).await?;
        let (_, teams) = found.ok_or_else(|| Error::from(Fault::NoSuchAccount))?;
        Ok(Response::new(ListTeamsResponse { teams: teams.into_iter().map(team).collect() }))
    }

    async fn get_team(&self, request: Request<GetTeamRequest>) -> Result<Response<GetTeamResponse>, Status> {
        let caller = Caller::of(&request)?;
        let team_id = own_team(&caller, &request.get_ref().team_id)?;
        let found = self.store.team(team_id, caller.principal.user_id.clone()).await?;
        Ok(Response::new(GetTeamResponse { team: Some(encode(found)) }))
    }

    async fn update_team(&self, request: Request<UpdateTeamRequest>) -> Result<Response<UpdateTeamResponse>, Status> {
        let caller = Caller::of(&request)?;
        let act = Act::by(&caller, "/paperkey.auth.v1.TeamService/UpdateTeam");
        let request = request.into_inner();
        let team_id = own_team(&caller, &request.team_id)?;
        let changes = changes(request)?;
        let user_id = caller.principal.user_id.clone();
        let changed = self.store.update_team(team_id, user_id, changes, act).await?;
        Ok(Response::new(UpdateTeamResponse { team: Some(encode(changed)) }))
    }

    async fn delete_team(&self, request: Request<DeleteTeamRequest>) -> Result<Response<DeleteTeamResponse>, Status> {
        let caller = Caller::of(&request)?;
        let act = Act::by(&caller, "/paperkey.auth.v1.TeamService/DeleteTeam");
        let team_id = own_team(&caller, &request.get_ref().team_id)?;
        self.store.delete_team(team_id, caller.principal.user_id.clone(), act).await?;
        Ok(Response::new(DeleteTeamResponse {}))
    }

    async fn leave_team(&self, request: Request<LeaveTeamRequest>) -> Result<Response<LeaveTeamResponse>, Status> {
        let caller = Caller::of(&request)?;
        let act = Act::by(&caller, "/paperkey.auth.v1.TeamService/LeaveTeam");
        let team_id = own_team(&caller, &request.get_ref().team_id)?;
        self.store.leave(team_id, actor(&caller), act).await?;
        Ok(Response::new(LeaveTeamResponse {}))
    }

    async fn set_team_tier(
        &self,
        request: Request<SetTeamTierRequest>,
    ) -> Result<Response<SetTeamTierResponse>, Status> {
        let act = Act::by(&Caller::of(&request)?, "/paperkey.auth.v1.TeamService/SetTeamTier");
        let SetTeamTierRequest { team_id, tier } = request.into_inner();
        let tier = tier_name(&self.tiers, &tier)?;
        if !could_be_id(&team_id) {
            return Err(Error::from(Fault::NoSuchTeam).into());
        }
        self.store.set_tier(team_id.clone(), tier.clone(), act).await?;
        Ok(Response::new(SetTeamTierResponse { team_id, tier }))
    }

    async fn set_team_limits(
        &self,
        request: Request<SetTeamLimitsRequest>,
    ) -> Result<Response<SetTeamLimitsResponse>, Status> {
        let act = Act::by(&Caller::of(&request)?, "/paperkey.auth.v1.TeamService/SetTeamLimits");
        let SetTeamLimitsRequest { team_id, requests_per_minute, quotas } = request.into_inner();
        let limits = OwnLimits {
            requests_per_minute: requests_per_minute.map(i64::from),
            quotas: quotas.clone().into_iter().collect(),
        }
        .judged(&self.tiers.meters())?;
        if !could_be_id(&team_id) {
            return Err(Error::from(Fault::NoSuchTeam).into());
        }
        self.store.set_limits(team_id.clone(), limits, act).await?;
        Ok(Response::new(SetTeamLimitsResponse { team_id, requests_per_minute, quotas }))
    }
}

/// The team of the call, which is the caller's own.
pub(super) fn own_team(caller: &Caller, named: &str) -> Result<String, Error> {
    caller.must_be_of_team(named)?;
    Ok(caller.principal.team_id.clone())
}

fn changes(request: UpdateTeamRequest) -> Result<TeamChanges, Error> {
    let leak_action = request.leak_action();
    let mask = Mask::new(request.update_mask, &CHANGEABLE)?;
    let name = mask.required_change("name", request.name)?;
    let leak_action = if mask.names("leak_action", leak_action != LeakActionMessage::Unspecified) {
        Some(match leak_action {
            LeakActionMessage::Revoke => LeakAction::Revoke,
            LeakActionMessage::Alert => LeakAction::Alert,
            LeakActionMessage::Unspecified => {
                return Err(Error::field("leak_action", "must be one of revoke, alert"));
            }
        })
    } else {
        None
    };
    Ok(TeamChanges { name: name.as_deref().map(team_name).transpose()?, leak_action })
}

fn encode(details: TeamDetails) -> TeamDetailsMessage {
    let leak_action = match details.leak_action {
        LeakAction::Revoke => LeakActionMessage::Revoke,
        LeakAction::Alert => LeakActionMessage::Alert,
    };
    TeamDetailsMessage {
        id: details.team.id,
        name: details.team.name,
        role: details.team.role.into(),
        tier: details.team.tier,
        leak_action: leak_action.into(),
        created_at: Some(timestamp(details.created_at_ms)),
    }
}
