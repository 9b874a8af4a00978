//! The checks that shipped apps make.

use paperkey_kit::{clock::Clock, principal::Caller, values};
use paperkey_proto::{
    Error,
    licensing::v1::{
        ActivateLicenseRequest, ActivateLicenseResponse, DeactivateLicenseRequest, DeactivateLicenseResponse,
        NewActivation, ValidateLicenseRequest, ValidateLicenseResponse, ValidatedLicense, ValidationCode,
        license_check_service_server::LicenseCheckService,
    },
};
use tonic::{Request, Response, Status};

use super::{count, status, time};
use crate::{
    domain::{Fault, license::Verdict, license_key::LicenseKey},
    store::{Act, Activated, Store, TenantStore},
};

const ACTIVATE: &str = "/paperkey.licensing.v1.LicenseCheckService/ActivateLicense";
const DEACTIVATE: &str = "/paperkey.licensing.v1.LicenseCheckService/DeactivateLicense";

/// The service, as tonic calls it.
pub(crate) struct Checks {
    store: Store,
}

impl Checks {
    pub(crate) fn new(store: Store) -> Self {
        Self { store }
    }

    /// The licences of the caller's product. A caller without one reaches none.
    fn of<T>(&self, request: Request<T>) -> Result<(Caller, TenantStore, T), Error> {
        let caller = Caller::of(&request)?;
        let product_id = caller.product_id().ok_or(Fault::NoSuchProduct)?;
        let store = self.store.of(caller.tenant()?).within(Some(product_id));
        Ok((caller, store, request.into_inner()))
    }

    fn clock(&self) -> &Clock {
        self.store.clock()
    }
}

fn key(text: &str) -> Result<LicenseKey, Error> {
    LicenseKey::parse(text).map_err(|malformed| Error::field("license_key", malformed.to_string()))
}

#[tonic::async_trait]
impl LicenseCheckService for Checks {
    async fn validate_license(
        &self,
        request: Request<ValidateLicenseRequest>,
    ) -> Result<Response<ValidateLicenseResponse>, Status> {
        let (_, store, request) = self.of(request)?;
        let key = key(&request.license_key)?;
        let Some(license) = store.find(&key).await.map_err(Error::from)? else {
            let code = ValidationCode::NotFound.into();
            return Ok(Response::new(ValidateLicenseResponse { valid: false, code, license: None }));
        };
        let is_activated = match &request.fingerprint {
            Some(fingerprint) => Some(store.is_activated(&license.id, fingerprint).await.map_err(Error::from)?),
            None => None,
        };
        let (now_ms, standing) = (self.clock().now_ms(), &license.standing);
        let verdict = standing.verdict(is_activated, now_ms);
        let code = match verdict {
            Verdict::Valid => ValidationCode::Valid,
            Verdict::Expired => ValidationCode::Expired,
            Verdict::Revoked => ValidationCode::Revoked,
            Verdict::LimitReached => ValidationCode::ActivationLimitReached,
        };
        Ok(Response::new(ValidateLicenseResponse {
            valid: verdict == Verdict::Valid,
            code: code.into(),
            license: Some(ValidatedLicense {
                id: license.id.clone(),
                status: status(standing.status(now_ms)).into(),
                expires_at: time(standing.expires_at_ms),
                activations_count: count(standing.activations_count),
                activations_limit: standing.max_activations.map(count),
                is_activated,
                metadata: license.metadata.clone(),
            }),
        }))
    }

    async fn activate_license(
        &self,
        request: Request<ActivateLicenseRequest>,
    ) -> Result<Response<ActivateLicenseResponse>, Status> {
        let (caller, store, request) = self.of(request)?;
        let key = key(&request.license_key)?;
        let act = Act::by(&caller, ACTIVATE).answered_by(activated);
        let made = store.activate(key, request.fingerprint, request.name, act).await.map_err(Error::from)?;
        Ok(Response::new(activated(&made)))
    }

    async fn deactivate_license(
        &self,
        request: Request<DeactivateLicenseRequest>,
    ) -> Result<Response<DeactivateLicenseResponse>, Status> {
        let (caller, store, request) = self.of(request)?;
        let key = key(&request.license_key)?;
        let answer = |remaining: &Option<i64>| DeactivateLicenseResponse {
            success: true,
            activations_remaining: remaining.map(count),
        };
        let act = Act::by(&caller, DEACTIVATE).answered_by(answer);
        let remaining = store.deactivate(key, request.fingerprint, act).await.map_err(Error::from)?;
        Ok(Response::new(answer(&remaining)))
    }
}

fn activated((activation, remaining): &Activated) -> ActivateLicenseResponse {
    ActivateLicenseResponse {
        success: true,
        activation: Some(NewActivation {
            id: activation.id.clone(),
            fingerprint: activation.fingerprint.clone(),
            name: activation.name.clone(),
            created_at: Some(values::timestamp(activation.created_at_ms)),
        }),
        activations_remaining: remaining.map(count),
    }
}
