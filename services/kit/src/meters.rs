//! Units of meters, taken from auth: durably, before what they are for is done.
//!
//! Deliberately absent: any counting here. Units that a process held in advance would be lost with it.

use std::time::Duration;

use paperkey_proto::{
    Error,
    auth::v1::{ConsumeUnitsRequest, RefundUnitsRequest, quota_service_client::QuotaServiceClient},
    errors::v1::Reason,
    principal::v1::{Mode, Principal},
};

use crate::{
    channel::{Channel, ServiceChannel},
    clock::Clock,
    ids::new_id,
    principal::Signer,
};

/// How often it is tried to give units back, and how long is waited in between.
const REFUND_TRIES: u32 = 5;
const REFUND_PAUSE: Duration = Duration::from_secs(1);

/// Takes units for the teams that call.
#[derive(Clone, Debug)]
pub struct Meters {
    client: QuotaServiceClient<ServiceChannel>,
    clock: Clock,
}

/// Where a team stands within the month's units of a meter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Taken {
    /// Whether the units were taken.
    pub granted: bool,
    /// Units used this month, these included.
    pub used: i64,
    /// Units a month; none for unlimited.
    pub limit: Option<i64>,
    /// When the next month begins, in milliseconds since 1970.
    pub resets_at_ms: i64,
    /// By which they are given back.
    pub consume_id: String,
}

impl Meters {
    /// Takes them in the name of that process.
    pub fn new(auth: &Channel, process: &'static str, signer: Signer, clock: Clock) -> Self {
        Self { client: QuotaServiceClient::new(auth.as_service(process, signer, None)), clock }
    }

    /// Takes units of a meter for the team of a credential, or says that there are too few. A cost of 0 only looks.
    /// Whoever gives up on the answer, or does not get one, has taken nothing in the end.
    pub async fn take(&self, principal: &Principal, meter: &str, cost: i64) -> Result<Taken, Error> {
        let consume_id = new_id("use", &self.clock);
        let counts = cost > 0 && principal.mode() != Mode::Test;
        let mut unsure = Unsure { meters: counts.then(|| self.clone()), consume_id: consume_id.clone() };
        let request = ConsumeUnitsRequest {
            consume_id: consume_id.clone(),
            team_id: principal.team_id.clone(),
            mode: if principal.mode() == Mode::Unspecified { Mode::Live.into() } else { principal.mode },
            meter: meter.to_owned(),
            cost,
        };
        let taken = self.client.clone().consume_units(request.clone()).await;
        let taken = match taken.map_err(|status| Error::from_status(&status)) {
            // Whether they were taken is not known: the same id takes them once at most.
            Err(error) if matches!(error.reason(), Reason::Unavailable | Reason::Deadline) => {
                let again = self.client.clone().consume_units(request).await;
                again.map_err(|status| Error::from_status(&status))?
            }
            taken => taken?,
        };
        unsure.meters = None;
        let taken = taken.into_inner();
        Ok(Taken {
            granted: taken.granted,
            used: taken.used,
            limit: taken.limit,
            resets_at_ms: taken.resets_at_ms,
            consume_id,
        })
    }

    /// Gives units back that did no good. What auth does not take back at once is tried again without being waited for;
    /// if that fails too they stay taken, which is on the safe side.
    pub async fn give_back(&self, taken: &Taken) {
        let mut unsure = Unsure { meters: Some(self.clone()), consume_id: taken.consume_id.clone() };
        if self.refund(&taken.consume_id).await {
            unsure.meters = None;
        }
    }

    /// Whether auth knows now that the units are not wanted.
    async fn refund(&self, consume_id: &str) -> bool {
        let request = RefundUnitsRequest { consume_id: consume_id.to_owned() };
        let told = self.client.clone().refund_units(request).await;
        if let Err(status) = &told {
            tracing::warn!(code = ?status.code(), "units could not be given back yet");
        }
        told.is_ok()
    }
}

/// Units of which nobody knows whether they are taken, and which nobody wants.
struct Unsure {
    /// None once that is known, or where nothing is counted.
    meters: Option<Meters>,
    consume_id: String,
}

impl Drop for Unsure {
    fn drop(&mut self) {
        let Some(meters) = self.meters.take() else { return };
        let consume_id = std::mem::take(&mut self.consume_id);
        // What was not taken yet cannot be taken any more after this. Outside of a runtime there is nobody to tell.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                for _ in 0..REFUND_TRIES {
                    if meters.refund(&consume_id).await {
                        return;
                    }
                    tokio::time::sleep(REFUND_PAUSE).await;
                }
            });
        }
    }
}
