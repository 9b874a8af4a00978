//! What is told of licences and activations: the `data` of webhook payloads.
//!
//! Names are camel case and times RFC 3339 here, since webhooks are read by the code that reads the dashboard's API.

use paperkey_kit::values::rfc3339;
use serde_json::{Value, json};

use super::{
    license::{Activation, License},
    license_key::LicenseKey,
};

/// A licence was issued.
pub const LICENSE_CREATED: &str = "license.created";
/// Its vendor changed it.
pub const LICENSE_UPDATED: &str = "license.updated";
/// Its vendor took it back.
pub const LICENSE_REVOKED: &str = "license.revoked";
/// Its vendor gave it again.
pub const LICENSE_REINSTATED: &str = "license.reinstated";
/// Its time is over.
pub const LICENSE_EXPIRED: &str = "license.expired";
/// A machine was bound to it.
pub const ACTIVATION_CREATED: &str = "activation.created";
/// A machine was released.
pub const ACTIVATION_REMOVED: &str = "activation.removed";

/// What `license.*` says.
pub fn license_data(license: &License, now_ms: i64) -> Value {
    json!({
        "id": license.id,
        "key": license.key.as_ref().map(ToString::to_string),
        "email": license.email,
        "productId": license.product_id,
        "status": license.standing.status(now_ms).word(),
        "maxActivations": license.standing.max_activations,
        "expiresAt": license.standing.expires_at_ms.map(rfc3339),
        "metadata": license.metadata,
    })
}

/// What `activation.*` says.
pub fn activation_data(activation: &Activation, key: Option<&LicenseKey>) -> Value {
    json!({
        "id": activation.id,
        "licenseId": activation.license_id,
        "licenseKey": key.map(ToString::to_string),
        "fingerprint": activation.fingerprint,
        "name": activation.name,
        "createdAt": rfc3339(activation.created_at_ms),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::license::Standing;

    #[test]
    fn absent_values_are_null_and_times_have_milliseconds() {
        let key = LicenseKey::parse("K7WX9-M3NP4-H8TRC-DJ").ok();
        let license = License {
            id: "lic_1".into(),
            product_id: "prod_1".into(),
            key: key.clone(),
            email: None,
            client_id: Some("cli_1".into()),
            standing: Standing {
                max_activations: None,
                activations_count: 0,
                expires_at_ms: Some(1_798_675_200_000),
                revoked_at_ms: None,
            },
            metadata: Some(json!({"seats": 3})),
            created_at_ms: 0,
            updated_at_ms: 0,
        };
        let expected = json!({
            "id": "lic_1", "key": "K7WX9-M3NP4-H8TRC-DJ", "email": null, "productId": "prod_1", "status": "active",
            "maxActivations": null, "expiresAt": "2026-12-31T00:00:00.000Z", "metadata": {"seats": 3},
        });
        assert_eq!(license_data(&license, 0), expected);

        let activation = Activation {
            id: "act_1".into(),
            license_id: "lic_1".into(),
            fingerprint: "fp".into(),
            name: None,
            created_at_ms: 1_798_675_200_123,
            last_check_at_ms: 0,
        };
        let expected = json!({
            "id": "act_1", "licenseId": "lic_1", "licenseKey": "K7WX9-M3NP4-H8TRC-DJ", "fingerprint": "fp",
            "name": null, "createdAt": "2026-12-31T00:00:00.123Z",
        });
        assert_eq!(activation_data(&activation, key.as_ref()), expected);
    }
}
