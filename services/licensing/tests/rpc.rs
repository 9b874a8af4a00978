//! The service as its callers meet it: assembled, behind its policy, with catalog and webhook played by the test.

mod common;

use std::sync::atomic::Ordering;

use common::{
    PRODUCT, START_MS, World, activation, deactivation, mask, owner, public_key, reason, refused, secret_key,
    validation,
};
use paperkey_kit::{
    db::Database,
    values::{struct_of, timestamp},
};
use paperkey_licensing::domain::license_key::LicenseKey;
use paperkey_proto::{
    errors::v1::Reason,
    events::v1::{Event, IngestEventsRequest, intake_service_client::IntakeServiceClient},
    licensing::v1::{
        CreateLicenseRequest, DeleteActivationRequest, GetLicenseRequest, LicenseStatus, ListLicensesRequest,
        ReinstateLicenseRequest, RevokeLicenseRequest, UpdateLicenseRequest, ValidationCode,
        license_check_service_client::LicenseCheckServiceClient,
    },
    principal::v1::{Mode, Principal},
};
use serde_json::{Value, json};

#[tokio::test(flavor = "multi_thread")]
async fn a_licence_lives_from_its_issue_to_its_end() {
    const END: &str = "2026-12-31T00:01:00.000Z";
    let mut world = World::new().await;
    let license = world
        .issue(CreateLicenseRequest {
            email: Some("Ann@Example.com".into()),
            expires_at: Some(timestamp(START_MS + 60_000)),
            metadata: struct_of(&json!({"plan": "pro"})),
            ..CreateLicenseRequest::default()
        })
        .await;
    assert_eq!((license.max_activations, license.status()), (Some(1), LicenseStatus::Active));
    let data = |status: &str, max: Value, expires_at: &str| {
        json!({
            "id": license.id, "key": license.key, "email": "Ann@Example.com", "productId": PRODUCT, "status": status,
            "maxActivations": max, "expiresAt": expires_at, "metadata": {"plan": "pro"},
        })
    };
    assert_eq!(world.event().await, ("license.created".into(), data("active", json!(1), END)));

    let valid = world.validate(&license.key.to_lowercase(), Some("fp")).await;
    assert!(valid.valid && valid.code() == ValidationCode::Valid);
    let found = valid.license.unwrap();
    assert_eq!((found.id.as_str(), found.status()), (license.id.as_str(), LicenseStatus::Active));
    assert_eq!((found.activations_count, found.activations_limit, found.is_activated), (0, Some(1), Some(false)));
    assert_eq!(found.metadata, struct_of(&json!({"plan": "pro"})));
    assert_eq!(world.validate(&license.key, None).await.license.unwrap().is_activated, None);

    let mut app = world.app(public_key());
    let activated = app.activate_license(activation(&license.key, "fp")).await.unwrap().into_inner();
    assert!(activated.success && activated.activations_remaining == Some(0));
    let made = activated.activation.unwrap();
    assert_eq!(made.created_at, Some(timestamp(START_MS)));
    let told = json!({
        "id": made.id, "licenseId": license.id, "licenseKey": license.key, "fingerprint": "fp", "name": null,
        "createdAt": "2026-12-31T00:00:00.000Z",
    });
    assert_eq!(world.event().await, ("activation.created".into(), told.clone()));
    assert_eq!(world.validate(&license.key, Some("fp")).await.license.unwrap().is_activated, Some(true));
    assert_eq!(world.validate(&license.key, Some("other")).await.code(), ValidationCode::ActivationLimitReached);
    assert_eq!(reason(app.activate_license(activation(&license.key, "other")).await), Reason::ActivationLimitReached);

    let mut vendor = world.vendor(owner());
    let id = license.id.clone();
    let update = UpdateLicenseRequest {
        id: id.clone(),
        update_mask: Some(mask(&["max_activations"])),
        ..UpdateLicenseRequest::default()
    };
    let updated = vendor.update_license(update).await.unwrap().into_inner().license.unwrap();
    assert_eq!((updated.max_activations, updated.email.as_deref()), (None, Some("Ann@Example.com")));
    assert_eq!(world.event().await, ("license.updated".into(), data("active", Value::Null, END)));
    let again = app.activate_license(activation(&license.key, "fp")).await.unwrap().into_inner();
    assert_eq!((again.activations_remaining, again.activation.unwrap().id), (None, made.id.clone()));

    vendor.revoke_license(RevokeLicenseRequest { id: id.clone() }).await.unwrap();
    assert_eq!(world.validate(&license.key, None).await.code(), ValidationCode::Revoked);
    assert_eq!(world.event().await, ("license.revoked".into(), data("revoked", Value::Null, END)));
    assert_eq!(reason(app.activate_license(activation(&license.key, "fp")).await), Reason::LicenseRevoked);
    let gone = app.deactivate_license(deactivation(&license.key, "fp")).await.unwrap().into_inner();
    assert!(gone.success && gone.activations_remaining.is_none());
    assert_eq!(world.event().await, ("activation.removed".into(), told));
    assert_eq!(reason(app.deactivate_license(deactivation(&license.key, "fp")).await), Reason::NotFound);
    vendor.reinstate_license(ReinstateLicenseRequest { id: id.clone() }).await.unwrap();
    assert_eq!(world.event().await, ("license.reinstated".into(), data("active", Value::Null, END)));

    world.hand.advance_ms(60_000);
    let (mut app, mut vendor) = (world.app(public_key()), world.vendor(owner()));
    let expired = world.validate(&license.key, None).await;
    assert_eq!((expired.valid, expired.code()), (false, ValidationCode::Expired));
    assert_eq!(expired.license.unwrap().status(), LicenseStatus::Expired);
    assert_eq!(reason(app.activate_license(activation(&license.key, "fp")).await), Reason::LicenseExpired);
    // The sweep may have come by itself: told once is once.
    world.store.expire_due().await.unwrap();
    assert_eq!(world.event().await, ("license.expired".into(), data("expired", Value::Null, END)));
    assert_eq!(world.store.expire_due().await.unwrap(), 0);

    let got = vendor.get_license(GetLicenseRequest { id }).await.unwrap().into_inner();
    assert_eq!((got.license.unwrap().status(), got.activations.len()), (LicenseStatus::Expired, 0));
    assert!(world.events.try_recv().is_err(), "nothing else was told");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_warm_validation_asks_no_database_and_a_revocation_is_seen_at_once() {
    let world = World::new().await;
    let license = world.issue(CreateLicenseRequest::default()).await;
    for _ in 0..2 {
        assert!(world.validate(&license.key, Some("fp")).await.valid);
    }
    let jobs = |database: &Database| (database.stats().read_jobs, database.stats().write_jobs);
    // The workers look at the database by themselves now and then, so one quiet round among several is asked for.
    let mut quiet = false;
    for _ in 0..50 {
        let before = jobs(&world.database);
        for _ in 0..10 {
            assert!(world.validate(&license.key, Some("fp")).await.valid);
        }
        quiet |= jobs(&world.database) == before;
    }
    assert!(quiet);
    let mut vendor = world.vendor(owner());
    for _ in 0..10 {
        vendor.revoke_license(RevokeLicenseRequest { id: license.id.clone() }).await.unwrap();
        assert_eq!(world.validate(&license.key, Some("fp")).await.code(), ValidationCode::Revoked);
        vendor.reinstate_license(ReinstateLicenseRequest { id: license.id.clone() }).await.unwrap();
        assert_eq!(world.validate(&license.key, Some("fp")).await.code(), ValidationCode::Valid);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mistyped_key_is_refused_with_what_was_meant() {
    let world = World::new().await;
    let mut app = world.app(public_key());
    for (key, hint) in [
        ("K7WX9-M3NP4-H8TRC-DK", "did you mean K7WX9-M3NP4-H8TRC-DJ?"),
        ("K7WX9-M3NP4-H8TRC-D", "17 characters"),
        ("K7WX9-M3NP4-H8TRC-D*", "no license key has"),
        ("K7WX9-M3NP4-H8TRC-D\0", "NUL"),
    ] {
        let refusals = [
            refused(app.validate_license(validation(key, None)).await),
            refused(app.activate_license(activation(key, "fp")).await),
            refused(app.deactivate_license(deactivation(key, "fp")).await),
        ];
        for refusal in refusals {
            assert_eq!((refusal.reason(), refusal.violations().len()), (Reason::ValidationFailed, 1));
            let violation = &refusal.violations()[0];
            assert_eq!(violation.field, "license_key");
            assert!(violation.message.contains(hint), "{}", violation.message);
        }
    }
    let intact = LicenseKey::random().to_string();
    let answer = world.validate(&intact, Some("fp")).await;
    assert_eq!((answer.valid, answer.code(), answer.license), (false, ValidationCode::NotFound, None));
    assert_eq!(reason(app.activate_license(activation(&intact, "fp")).await), Reason::NotFound);
    assert_eq!(reason(app.deactivate_license(deactivation(&intact, "fp")).await), Reason::NotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn nonsense_is_refused_by_name() {
    let world = World::new().await;
    let license = world.issue(CreateLicenseRequest::default()).await;
    let (mut app, mut vendor) = (world.app(public_key()), world.vendor(owner()));
    let long = "x".repeat(256);
    for fingerprint in ["", "a\0b", &long] {
        let refusals = [
            refused(app.validate_license(validation(&license.key, Some(fingerprint))).await),
            refused(app.activate_license(activation(&license.key, fingerprint)).await),
            refused(app.deactivate_license(deactivation(&license.key, fingerprint)).await),
        ];
        for refusal in refusals {
            assert_eq!(refusal.violations()[0].field, "fingerprint");
        }
    }
    // 255 characters are not 255 bytes.
    let wide = "é".repeat(255);
    assert!(app.activate_license(activation(&license.key, &wide)).await.is_ok());

    let create = |change: fn(&mut CreateLicenseRequest)| {
        let mut request = CreateLicenseRequest { product_id: PRODUCT.into(), ..CreateLicenseRequest::default() };
        change(&mut request);
        request
    };
    for (request, field) in [
        (create(|r| r.product_id = String::new()), "product_id"),
        (create(|r| r.email = Some("nobody".into())), "email"),
        (create(|r| r.max_activations = Some(-1)), "max_activations"),
        (create(|r| r.expires_at = Some(timestamp(-1))), "expires_at"),
        (create(|r| r.client_id = Some("\0".into())), "client_id"),
        (create(|r| r.metadata = struct_of(&json!({"a": "x".repeat(20_000)}))), "metadata"),
        (create(|r| r.field_mask = Some(mask(&["team_id"]))), "team_id"),
    ] {
        let refusal = refused(vendor.create_license(request).await);
        assert_eq!(refusal.violations()[0].field, field);
    }
    for query in ["\0", "a\0"] {
        let list = ListLicensesRequest { query: Some(query.into()), ..ListLicensesRequest::default() };
        assert_eq!(refused(vendor.list_licenses(list).await).violations()[0].field, "query");
    }
    let unknown_status = ListLicensesRequest { status: 77, ..ListLicensesRequest::default() };
    assert_eq!(refused(vendor.list_licenses(unknown_status).await).violations()[0].field, "status");
    for id in ["", "\0", "lic_none", "'; DROP TABLE licenses --"] {
        let outcome = vendor.get_license(GetLicenseRequest { id: id.into() }).await;
        let expected = if ["", "\0"].contains(&id) { Reason::ValidationFailed } else { Reason::NotFound };
        assert_eq!(reason(outcome), expected, "{id:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_creation_names_what_it_wants_and_one_without_names_has_one_slot() {
    let world = World::new().await;
    let slots = |max_activations, field_mask| {
        let request = CreateLicenseRequest { max_activations, field_mask, ..CreateLicenseRequest::default() };
        async { world.issue(request).await.max_activations }
    };
    assert_eq!(slots(None, None).await, Some(1));
    assert_eq!(slots(None, Some(mask(&["product_id"]))).await, Some(1));
    assert_eq!(slots(None, Some(mask(&["product_id", "max_activations"]))).await, None);
    assert_eq!(slots(Some(7), Some(mask(&["max_activations"]))).await, Some(7));
    assert_eq!(slots(Some(0), None).await, Some(0));
    assert_eq!(world.asked.load(Ordering::SeqCst), 1, "catalog is asked once");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_team_mode_or_product_meets_only_absence() {
    let world = World::new().await;
    let license = world.issue(CreateLicenseRequest::default()).await;
    let made = world.app(public_key()).activate_license(activation(&license.key, "fp")).await.unwrap().into_inner();
    let (id, activation_id) = (license.id.clone(), made.activation.unwrap().id);
    assert!(world.validate(&license.key, Some("fp")).await.valid);

    let test_mode = |principal| Principal { mode: Mode::Test.into(), ..principal };
    let other_team = |principal| Principal { team_id: "team_2".into(), ..principal };
    for principal in [test_mode(owner()), other_team(owner()), secret_key("prod_2"), test_mode(secret_key(PRODUCT))] {
        let mut vendor = world.vendor(principal);
        let create = CreateLicenseRequest { product_id: PRODUCT.into(), ..CreateLicenseRequest::default() };
        let update = UpdateLicenseRequest { id: id.clone(), email: Some("a@b.cd".into()), ..Default::default() };
        let delete = DeleteActivationRequest { license_id: id.clone(), activation_id: activation_id.clone() };
        let reasons = [
            reason(vendor.create_license(create).await),
            reason(vendor.get_license(GetLicenseRequest { id: id.clone() }).await),
            reason(vendor.update_license(update).await),
            reason(vendor.revoke_license(RevokeLicenseRequest { id: id.clone() }).await),
            reason(vendor.reinstate_license(ReinstateLicenseRequest { id: id.clone() }).await),
            reason(vendor.delete_activation(delete).await),
        ];
        assert_eq!(reasons, [Reason::NotFound; 6]);
        for query in [None, Some(id.clone()), Some(license.key.clone())] {
            let list = ListLicensesRequest { query, ..ListLicensesRequest::default() };
            assert!(vendor.list_licenses(list).await.unwrap().into_inner().licenses.is_empty());
        }
    }
    let other_product = Principal { product_id: "prod_2".into(), ..public_key() };
    for principal in [test_mode(public_key()), other_team(public_key()), other_product] {
        let mut app = world.app(principal);
        let answer = app.validate_license(validation(&license.key, Some("fp"))).await.unwrap().into_inner();
        assert_eq!((answer.valid, answer.code(), answer.license), (false, ValidationCode::NotFound, None));
        assert_eq!(reason(app.activate_license(activation(&license.key, "fp")).await), Reason::NotFound);
        assert_eq!(reason(app.deactivate_license(deactivation(&license.key, "fp")).await), Reason::NotFound);
    }
    let unbound = Principal { product_id: String::new(), ..public_key() };
    assert_eq!(reason(world.app(unbound).validate_license(validation(&license.key, None)).await), Reason::NotFound);

    // None of it left a trace.
    let got = world.vendor(secret_key(PRODUCT)).get_license(GetLicenseRequest { id }).await.unwrap().into_inner();
    assert_eq!((got.license.unwrap().activations_count, got.activations.len()), (1, 1));
    assert!(world.validate(&license.key, Some("fp")).await.valid);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secret_key_lists_its_product_and_no_other_kind_of_key_gets_in() {
    let world = World::new().await;
    let license = world.issue(CreateLicenseRequest::default()).await;
    let list = || ListLicensesRequest::default();
    let listed = world.vendor(secret_key(PRODUCT)).list_licenses(list()).await.unwrap().into_inner();
    assert_eq!(listed.licenses.iter().map(|listed| &listed.id).collect::<Vec<_>>(), [&license.id]);
    let other = ListLicensesRequest { product_id: Some(PRODUCT.into()), ..list() };
    assert!(world.vendor(secret_key("prod_2")).list_licenses(other).await.unwrap().into_inner().licenses.is_empty());

    assert_eq!(reason(world.vendor(public_key()).list_licenses(list()).await), Reason::ScopeInsufficient);
    let check = validation(&license.key, None);
    assert_eq!(reason(world.app(owner()).validate_license(check.clone()).await), Reason::ScopeInsufficient);
    let bare = LicenseCheckServiceClient::new(world.channel.clone()).validate_license(check).await;
    assert_eq!(reason(bare), Reason::InvalidCredentials);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_product_takes_its_licences_with_it() {
    let world = World::new().await;
    let license = world.issue(CreateLicenseRequest::default()).await;
    world.app(public_key()).activate_license(activation(&license.key, "fp")).await.unwrap();
    assert!(world.validate(&license.key, Some("fp")).await.valid);
    let event = |topic: &str, mode: Mode, product_id: &str| Event {
        id: "evt_1".into(),
        topic: topic.into(),
        team_id: "team_1".into(),
        mode: mode.into(),
        product_id: product_id.into(),
        ..Event::default()
    };
    world
        .ingest(vec![
            event("product.renamed", Mode::Live, PRODUCT),
            event("product.deleted", Mode::Unspecified, PRODUCT),
        ])
        .await;
    assert!(world.validate(&license.key, Some("fp")).await.valid);
    for _ in 0..2 {
        world
            .ingest(vec![
                event("product.deleted", Mode::Live, "prod_other"),
                event("product.deleted", Mode::Live, PRODUCT),
            ])
            .await;
        assert_eq!(world.validate(&license.key, Some("fp")).await.code(), ValidationCode::NotFound);
    }
    let mut vendor = world.vendor(owner());
    assert_eq!(reason(vendor.get_license(GetLicenseRequest { id: license.id.clone() }).await), Reason::NotFound);
    let create = CreateLicenseRequest { product_id: PRODUCT.into(), ..CreateLicenseRequest::default() };
    assert_eq!(reason(vendor.create_license(create).await), Reason::NotFound, "catalog may still know it");
    let outsider = IntakeServiceClient::new(world.way(owner())).ingest_events(IngestEventsRequest::default()).await;
    assert_eq!(reason(outsider), Reason::ScopeInsufficient);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_patch_changes_what_it_names_and_nothing_else() {
    let world = World::new().await;
    let issued = CreateLicenseRequest {
        email: Some("ann@example.com".into()),
        max_activations: Some(3),
        expires_at: Some(timestamp(START_MS + 60_000)),
        metadata: struct_of(&json!({"plan": "pro", "seats": {"a": 1, "b": [1, 2]}, "note": null})),
        ..CreateLicenseRequest::default()
    };
    let license = world.issue(issued).await;
    let id = license.id.clone();
    let patch = |paths: Option<&[&str]>, change: fn(&mut UpdateLicenseRequest)| {
        let mut request =
            UpdateLicenseRequest { id: id.clone(), update_mask: paths.map(mask), ..UpdateLicenseRequest::default() };
        change(&mut request);
        async { world.vendor(owner()).update_license(request).await.map(|now| now.into_inner().license.unwrap()) }
    };
    let metadata = |value: Value| struct_of(&value);

    // Nothing named, the id alone named, or named what is so already: nothing changes.
    world.hand.advance_ms(1);
    for paths in [None, Some(&[][..]), Some(&["id"][..])] {
        assert_eq!(patch(paths, |_| {}).await.unwrap(), license);
    }
    let same = patch(Some(&["max_activations"]), |request| request.max_activations = Some(3)).await.unwrap();
    assert_eq!(same, license);
    // What is there and not named stays, and what is named and not there is cleared.
    let unnamed = patch(Some(&["max_activations"]), |request| request.email = Some("b@b.cd".into())).await.unwrap();
    assert_eq!((unnamed.max_activations, unnamed.email.as_deref()), (None, Some("ann@example.com")));
    assert_eq!((unnamed.updated_at, unnamed.created_at), (Some(timestamp(START_MS + 1)), license.created_at));
    // Without a mask, what is there is named.
    let bare = patch(None, |request| request.max_activations = Some(0)).await.unwrap();
    assert_eq!((bare.max_activations, bare.email.as_deref()), (Some(0), Some("ann@example.com")));
    let cleared = patch(Some(&["email", "client_id"]), |_| {}).await.unwrap();
    assert_eq!((cleared.email, cleared.max_activations), (None, Some(0)));

    // Members are set, removed and merged at every depth; a list is a value.
    let merged = patch(Some(&["metadata"]), |request| {
        request.metadata =
            struct_of(&json!({"plan": null, "absent": null, "seats": {"a": null, "b": [3], "c": {"d": null}}}));
    });
    // A null that was stored is none of a patch, and is kept.
    assert_eq!(merged.await.unwrap().metadata, metadata(json!({"seats": {"b": [3], "c": {}}, "note": null})));
    let replaced =
        patch(Some(&["metadata"]), |request| request.metadata = struct_of(&json!({"seats": 1}))).await.unwrap();
    assert_eq!(replaced.metadata, metadata(json!({"seats": 1, "note": null})));
    let untouched = patch(Some(&["metadata"]), |request| request.metadata = struct_of(&json!({}))).await.unwrap();
    assert_eq!(untouched.metadata, replaced.metadata);
    let none = patch(Some(&["metadata"]), |_| {}).await.unwrap();
    assert_eq!(none.metadata, None);
    let anew = patch(Some(&["metadata"]), |request| request.metadata = struct_of(&json!({"a": null, "b": 1}))).await;
    assert_eq!(anew.unwrap().metadata, metadata(json!({"b": 1})));
    // The bound is that of what comes out.
    let half = patch(Some(&["metadata"]), |request| request.metadata = struct_of(&json!({"x": "x".repeat(9_000)})));
    assert!(half.await.is_ok());
    let both = patch(Some(&["metadata"]), |request| request.metadata = struct_of(&json!({"y": "y".repeat(9_000)})));
    assert_eq!(refused(both.await).violations()[0].field, "metadata");

    // An end in the past expires it, a later one and none at all make it active again.
    let past =
        patch(Some(&["expires_at"]), |request| request.expires_at = Some(timestamp(START_MS - 1))).await.unwrap();
    assert_eq!(past.status(), LicenseStatus::Expired);
    let later = patch(None, |request| request.expires_at = Some(timestamp(START_MS + 10_000))).await.unwrap();
    assert_eq!(later.status(), LicenseStatus::Active);
    let never = patch(Some(&["expires_at"]), |_| {}).await.unwrap();
    assert_eq!((never.status(), never.expires_at), (LicenseStatus::Active, None));

    for (refusal, field) in [
        (patch(Some(&["key"]), |_| {}).await, "key"),
        (patch(Some(&["email", "status"]), |_| {}).await, "status"),
        (patch(None, |request| request.max_activations = Some(-1)).await, "max_activations"),
        (patch(None, |request| request.email = Some("nobody".into())).await, "email"),
        (patch(None, |request| request.expires_at = Some(timestamp(-1))).await, "expires_at"),
        (patch(None, |request| request.client_id = Some("cli_none".into())).await, "client_id"),
    ] {
        assert_eq!(refused(refusal).violations()[0].field, field);
    }
    let got = world.vendor(owner()).get_license(GetLicenseRequest { id: id.clone() }).await.unwrap().into_inner();
    assert_eq!(got.license.unwrap(), never);
}
