//! `UsageService` and `QuotaService`: units a month per team and meter.

use paperkey_kit::{principal::Caller, values::timestamp};
use paperkey_proto::{
    auth::v1::{
        ConsumeUnitsRequest, ConsumeUnitsResponse, GetUsageHistoryRequest, GetUsageHistoryResponse, GetUsageRequest,
        GetUsageResponse, MeterHistory, MeterUsage, RefundUnitsRequest, RefundUnitsResponse, UsageDay,
        quota_service_server::QuotaService, usage_service_server::UsageService,
    },
    principal::v1::Mode,
};
use tonic::{Request, Response, Status};

use crate::quotas::{Asked, Quotas};

/// The handlers.
#[derive(Clone, Debug)]
pub(crate) struct Handler {
    pub(crate) quotas: Quotas,
}

#[tonic::async_trait]
impl UsageService for Handler {
    async fn get_usage(&self, request: Request<GetUsageRequest>) -> Result<Response<GetUsageResponse>, Status> {
        let caller = Caller::of(&request)?;
        caller.must_be_of_team(&request.get_ref().team_id)?;
        let tenant = caller.tenant()?;
        let (used, ends_at_ms) = self.quotas.usage(tenant.team_id, tenant.mode).await?;
        let meters = used.into_iter().map(|used| MeterUsage {
            meter: used.meter,
            used: used.balance.used,
            limit: used.balance.limit,
            resets_at: Some(timestamp(ends_at_ms)),
        });
        Ok(Response::new(GetUsageResponse { meters: meters.collect() }))
    }

    async fn get_usage_history(
        &self,
        request: Request<GetUsageHistoryRequest>,
    ) -> Result<Response<GetUsageHistoryResponse>, Status> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        caller.must_be_of_team(&request.team_id)?;
        let tenant = caller.tenant()?;
        let histories = self.quotas.history(tenant.team_id, tenant.mode, request.days).await?;
        let meters = histories.into_iter().map(|history| MeterHistory {
            meter: history.meter,
            days: history.days.into_iter().map(|(day, used)| UsageDay { date: day.text(), used }).collect(),
        });
        Ok(Response::new(GetUsageHistoryResponse { meters: meters.collect() }))
    }
}

#[tonic::async_trait]
impl QuotaService for Handler {
    async fn consume_units(
        &self,
        request: Request<ConsumeUnitsRequest>,
    ) -> Result<Response<ConsumeUnitsResponse>, Status> {
        let request = request.into_inner();
        let mode = match request.mode() {
            Mode::Test => Mode::Test,
            // What is not said to be a test counts.
            Mode::Live | Mode::Unspecified => Mode::Live,
        };
        let ConsumeUnitsRequest { consume_id, team_id, meter, cost, .. } = request;
        let outcome = self.quotas.consume(Asked { consume_id, team_id, mode, meter, units: cost }).await?;
        Ok(Response::new(ConsumeUnitsResponse {
            granted: outcome.granted,
            used: outcome.balance.used,
            limit: outcome.balance.limit,
            resets_at_ms: outcome.resets_at_ms,
        }))
    }

    async fn refund_units(
        &self,
        request: Request<RefundUnitsRequest>,
    ) -> Result<Response<RefundUnitsResponse>, Status> {
        self.quotas.refund(request.into_inner().consume_id).await?;
        Ok(Response::new(RefundUnitsResponse {}))
    }
}
