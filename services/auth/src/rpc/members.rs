//! `MemberService`: the people of a team, and those who are invited.

use paperkey_kit::{
    principal::Caller,
    secrets::Secret,
    values::{Mask, Page, timestamp},
};
use paperkey_proto::{
    Error,
    auth::v1::{
        AcceptInvitationRequest, AcceptInvitationResponse, CreateMemberRequest, CreateMemberResponse,
        DeleteMemberRequest, DeleteMemberResponse, ListMembersRequest, ListMembersResponse, Member as MemberMessage,
        MemberStatus, UpdateMemberRequest, UpdateMemberResponse, member_service_server::MemberService,
    },
    principal::v1::Role,
};
use tonic::{Request, Response, Status};

use super::{accounts::team, known, teams::own_team};
use crate::{
    domain::{
        Fault,
        account::Email,
        member::{Member, Place},
        team::{MemberTeam, given_role},
        ticket::{could_be_ticket, link, new_ticket},
    },
    mail::is_mailable,
    store::{Act, Actor, NewInvitation, Store},
};

const CHANGEABLE: [&str; 1] = ["role"];

/// The handlers.
#[derive(Debug)]
pub(crate) struct Handler {
    pub(crate) store: Store,
    pub(crate) public_url: String,
    /// Whether the inviter is told the link, since no mail carries it.
    pub(crate) tells_link: bool,
}

#[tonic::async_trait]
impl MemberService for Handler {
    async fn create_member(
        &self,
        request: Request<CreateMemberRequest>,
    ) -> Result<Response<CreateMemberResponse>, Status> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let team_id = own_team(&caller, &request.team_id)?;
        let email = Email::parse(&request.email)?;
        if !is_mailable(&email.shown) {
            return Err(Error::field("email", "must be an email address").into());
        }
        let role = given_role(request.role())?;
        let ticket = new_ticket();
        let link = link(&self.public_url, "accept-invitation", &ticket);
        let invite_url = self.tells_link.then(|| link.expose().to_owned());
        let invitation = NewInvitation { email, role, ticket, link };
        let answer = move |invited: &Member| CreateMemberResponse {
            member: Some(encode(invited.clone())),
            invite_url: invite_url.clone(),
        };
        let act = Act::by(&caller, "/paperkey.auth.v1.MemberService/CreateMember").answered_by(answer.clone());
        let invited = self.store.invite(team_id, actor(&caller), invitation, act).await?;
        Ok(Response::new(answer(&invited)))
    }

    async fn list_members(
        &self,
        request: Request<ListMembersRequest>,
    ) -> Result<Response<ListMembersResponse>, Status> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let team_id = own_team(&caller, &request.team_id)?;
        let page = Page::new(request.page_size, &request.page_token)?;
        let after = page.before.as_deref().map(Place::decode).transpose()?;
        let listed = self.store.members(team_id, page.size, after).await?;
        let places: Vec<_> = listed.into_iter().map(|member| (Place::encode(&member), member)).collect();
        let (listed, next_page_token) = page.cut(places, |(place, _)| place);
        let members = listed.into_iter().map(|(_, member)| encode(member)).collect();
        Ok(Response::new(ListMembersResponse { members, next_page_token }))
    }

    async fn update_member(
        &self,
        request: Request<UpdateMemberRequest>,
    ) -> Result<Response<UpdateMemberResponse>, Status> {
        let caller = Caller::of(&request)?;
        let act = Act::by(&caller, "/paperkey.auth.v1.MemberService/UpdateMember");
        let request = request.into_inner();
        let team_id = own_team(&caller, &request.team_id)?;
        let role = request.role();
        let mask = Mask::new(request.update_mask, &CHANGEABLE)?;
        let role = mask.names("role", role != Role::Unspecified).then(|| given_role(role)).transpose()?;
        let user_id = known(request.user_id, Fault::NoSuchMember)?;
        let changed = self.store.change_role(team_id, actor(&caller), user_id, role, act).await?;
        Ok(Response::new(UpdateMemberResponse { member: Some(encode(changed)) }))
    }

    async fn delete_member(
        &self,
        request: Request<DeleteMemberRequest>,
    ) -> Result<Response<DeleteMemberResponse>, Status> {
        let caller = Caller::of(&request)?;
        let act = Act::by(&caller, "/paperkey.auth.v1.MemberService/DeleteMember");
        let request = request.into_inner();
        let team_id = own_team(&caller, &request.team_id)?;
        self.store.remove_member(team_id, actor(&caller), known(request.user_id, Fault::NoSuchMember)?, act).await?;
        Ok(Response::new(DeleteMemberResponse {}))
    }

    async fn accept_invitation(
        &self,
        request: Request<AcceptInvitationRequest>,
    ) -> Result<Response<AcceptInvitationResponse>, Status> {
        let caller = Caller::of(&request)?;
        let answer = |joined: &MemberTeam| AcceptInvitationResponse { team: Some(team(joined.clone())) };
        let act = Act::by(&caller, "/paperkey.auth.v1.MemberService/AcceptInvitation").answered_by(answer);
        let ticket = Secret::new(request.into_inner().token);
        if !could_be_ticket(ticket.expose()) {
            return Err(Error::from(Fault::NoSuchInvitation).into());
        }
        let joined = self.store.accept(&ticket, caller.principal.user_id.clone(), act).await?;
        Ok(Response::new(answer(&joined)))
    }
}

/// Who changes something, as it is recorded.
pub(super) fn actor(caller: &Caller) -> Actor {
    Actor { user_id: caller.principal.user_id.clone(), name: caller.principal.name.clone() }
}

fn encode(member: Member) -> MemberMessage {
    let status = if member.expires_at_ms.is_some() { MemberStatus::Invited } else { MemberStatus::Active };
    MemberMessage {
        id: member.id,
        email: member.email,
        name: member.name,
        role: member.role.into(),
        status: status.into(),
        created_at: Some(timestamp(member.since_ms)),
        expires_at: member.expires_at_ms.map(timestamp),
    }
}
