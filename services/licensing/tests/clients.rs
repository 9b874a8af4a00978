//! Clients of licences, the end of a team, and the two worlds, on both engines.

mod common;

use std::{collections::BTreeSet, sync::Arc};

use common::{
    CLIENT, PRODUCT, START_MS, TEST_CLIENT, TEST_PRODUCT, World, activation, deactivation, mask, owner, public_key,
    reason, refused, secret_key, validation,
};
use futures_util::stream;
use paperkey_kit::{db::Database, store_suite, values::timestamp};
use paperkey_proto::{
    Contract, Error,
    errors::v1::Reason,
    events::v1::Event,
    licensing::v1::{
        BatchCreateLicensesRequest, CreateLicenseRequest, DeleteActivationRequest, ExportLicensesRequest,
        GetLicenseRequest, ImportLicensesRequest, License, ListLicensesRequest, ReinstateLicenseRequest,
        RevokeLicenseRequest, UpdateLicenseRequest, ValidationCode,
    },
    options::v1::{Caller as Kind, Scope},
    principal::v1::{Mode, Principal, Role},
};
use serde_json::json;
use tokio::{sync::Barrier, task::JoinSet};

store_suite! {
    paperkey_migrations::licensing::Migrator;
    a_licence_names_a_client_of_its_team_and_mode_or_none,
    a_catalogue_that_is_down_is_no_fault_of_the_client,
    a_deleted_client_is_named_by_no_licence,
    a_client_that_is_named_while_it_is_deleted_is_not_kept,
    a_deleted_team_takes_its_licences_of_both_modes_with_it,
    neither_world_sees_the_other_by_any_method,
    an_integration_and_the_system_key_issue_licences_in_their_team,
}

fn issue(client_id: Option<&str>) -> CreateLicenseRequest {
    CreateLicenseRequest {
        product_id: PRODUCT.into(),
        client_id: client_id.map(Into::into),
        ..CreateLicenseRequest::default()
    }
}

fn update_of(id: &str) -> UpdateLicenseRequest {
    UpdateLicenseRequest { id: id.into(), ..UpdateLicenseRequest::default() }
}

fn in_test_mode(principal: Principal) -> Principal {
    Principal { mode: Mode::Test.into(), ..principal }
}

fn event(topic: &str, mode: Mode, client_id: &str) -> Event {
    Event {
        id: "evt_1".into(),
        topic: topic.into(),
        team_id: "team_1".into(),
        mode: mode.into(),
        data_json: json!({"id": client_id}).to_string(),
        ..Event::default()
    }
}

async fn client_of(world: &World, license: &License) -> Option<String> {
    let got = world.vendor(owner()).get_license(GetLicenseRequest { id: license.id.clone() }).await.unwrap();
    got.into_inner().license.unwrap().client_id
}

fn field_of(error: &Error) -> &str {
    assert_eq!(error.reason(), Reason::ValidationFailed);
    &error.violations()[0].field
}

async fn a_licence_names_a_client_of_its_team_and_mode_or_none(database: Database) {
    let world = World::on(database);
    let mut vendor = world.vendor(owner());
    let license = world.issue(issue(Some(CLIENT))).await;
    assert_eq!(license.client_id.as_deref(), Some(CLIENT));
    let update = |client_id: Option<&str>| UpdateLicenseRequest {
        id: license.id.clone(),
        client_id: client_id.map(Into::into),
        update_mask: Some(mask(&["client_id"])),
        ..UpdateLicenseRequest::default()
    };
    for stranger in [TEST_CLIENT, "cli_none", "", "'; DROP TABLE clients --", "🦀", &"x".repeat(64)] {
        assert_eq!(field_of(&refused(vendor.create_license(issue(Some(stranger))).await)), "client_id", "{stranger}");
        assert_eq!(field_of(&refused(vendor.update_license(update(Some(stranger))).await)), "client_id", "{stranger}");
    }
    assert_eq!(client_of(&world, &license).await.as_deref(), Some(CLIENT));
    assert_eq!(vendor.update_license(update(None)).await.unwrap().into_inner().license.unwrap().client_id, None);
    let again = vendor.update_license(update(Some(CLIENT))).await.unwrap().into_inner().license.unwrap();
    assert_eq!(again.client_id.as_deref(), Some(CLIENT));
    // A change of something else asks nobody.
    let email = UpdateLicenseRequest { id: license.id.clone(), email: Some("a@b.cd".into()), ..Default::default() };
    let kept = vendor.update_license(email).await.unwrap().into_inner().license.unwrap();
    assert_eq!(kept.client_id.as_deref(), Some(CLIENT));

    let by_key = world.vendor(secret_key(PRODUCT)).create_license(issue(Some(CLIENT))).await.unwrap().into_inner();
    assert_eq!(by_key.license.unwrap().client_id.as_deref(), Some(CLIENT));
    let tested = CreateLicenseRequest { product_id: TEST_PRODUCT.into(), ..issue(Some(TEST_CLIENT)) };
    let tested = world.vendor(in_test_mode(owner())).create_license(tested).await.unwrap().into_inner();
    assert_eq!(tested.license.unwrap().client_id.as_deref(), Some(TEST_CLIENT));
    world.end().await;
}

async fn a_catalogue_that_is_down_is_no_fault_of_the_client(database: Database) {
    let world = World::on(database);
    let outcome = world.vendor(owner()).create_license(issue(Some("cli_unlucky"))).await;
    assert_eq!(reason(outcome), Reason::Unavailable);
    world.end().await;
}

async fn a_deleted_client_is_named_by_no_licence(database: Database) {
    let world = World::on(database);
    let license = world.issue(issue(Some(CLIENT))).await;
    let other = world.issue(issue(None)).await;
    // Another world's event, nonsense, and what is not for this service, change nothing and hold up nothing.
    let odd = Event { data_json: "{".into(), ..event("client.deleted", Mode::Live, CLIENT) };
    let foreign = Event { team_id: "team_2".into(), ..event("client.deleted", Mode::Live, CLIENT) };
    let unmoded = event("client.deleted", Mode::Unspecified, CLIENT);
    let not_named = event("client.deleted", Mode::Live, "");
    let in_test = event("client.deleted", Mode::Test, CLIENT);
    world.ingest(vec![odd, foreign, unmoded, not_named, in_test, event("client.renamed", Mode::Live, CLIENT)]).await;
    assert_eq!(client_of(&world, &license).await.as_deref(), Some(CLIENT));

    world.hand.advance_ms(7);
    for _ in 0..2 {
        world.ingest(vec![event("client.deleted", Mode::Live, CLIENT)]).await;
        let got = world.vendor(owner()).get_license(GetLicenseRequest { id: license.id.clone() }).await.unwrap();
        let got = got.into_inner().license.unwrap();
        assert_eq!(got.client_id, None);
        assert_eq!(got.updated_at, Some(timestamp(START_MS + 7)));
        let listed = ListLicensesRequest { client_id: Some(CLIENT.into()), ..ListLicensesRequest::default() };
        assert!(world.vendor(owner()).list_licenses(listed).await.unwrap().into_inner().licenses.is_empty());
    }
    // The catalogue still knows it, as it may for those who asked before the end.
    let mut vendor = world.vendor(owner());
    assert_eq!(field_of(&refused(vendor.create_license(issue(Some(CLIENT))).await)), "client_id");
    let update = UpdateLicenseRequest { id: other.id, client_id: Some(CLIENT.into()), ..Default::default() };
    assert_eq!(field_of(&refused(vendor.update_license(update).await)), "client_id");
    assert!(world.validate(&license.key, None).await.valid, "the licence itself stays");
    world.end().await;
}

async fn a_client_that_is_named_while_it_is_deleted_is_not_kept(database: Database) {
    let world = Arc::new(World::on(database));
    let licenses = [world.issue(issue(None)).await, world.issue(issue(None)).await];
    let start = Arc::new(Barrier::new(7));
    let mut calls = JoinSet::new();
    for at in 0..6 {
        let (mut vendor, start) = (world.vendor(owner()), Arc::clone(&start));
        let id = licenses[at % 2].id.clone();
        calls.spawn(async move {
            start.wait().await;
            let outcome = if at < 3 {
                vendor.create_license(issue(Some(CLIENT))).await.map(drop)
            } else {
                let update = UpdateLicenseRequest { id, client_id: Some(CLIENT.into()), ..Default::default() };
                vendor.update_license(update).await.map(drop)
            };
            outcome.map_err(|status| Error::from_status(&status).reason())
        });
    }
    start.wait().await;
    world.ingest(vec![event("client.deleted", Mode::Live, CLIENT)]).await;
    let outcomes = calls.join_all().await;
    assert!(outcomes.iter().all(|outcome| matches!(outcome, Ok(()) | Err(Reason::ValidationFailed))), "{outcomes:?}");
    let listed = ListLicensesRequest { client_id: Some(CLIENT.into()), ..ListLicensesRequest::default() };
    assert!(world.vendor(owner()).list_licenses(listed).await.unwrap().into_inner().licenses.is_empty());
    Arc::into_inner(world).unwrap().end().await;
}

async fn a_deleted_team_takes_its_licences_of_both_modes_with_it(database: Database) {
    let world = World::on(database);
    let license = world.issue(issue(Some(CLIENT))).await;
    world.app(public_key()).activate_license(activation(&license.key, "fp")).await.unwrap();
    let tested = CreateLicenseRequest { product_id: TEST_PRODUCT.into(), ..issue(None) };
    let tested = world.vendor(in_test_mode(owner())).create_license(tested).await.unwrap().into_inner();
    let tested = tested.license.unwrap();
    assert!(world.validate(&license.key, Some("fp")).await.valid);

    let other = Event { team_id: "team_2".into(), ..event("team.deleted", Mode::Live, "") };
    let nobody = Event { team_id: "'".into(), ..event("team.deleted", Mode::Live, "") };
    world.ingest(vec![other, nobody]).await;
    assert!(world.validate(&license.key, Some("fp")).await.valid);
    // Told twice, with one mode for both; the second time it finds what was under way at the first.
    for _ in 0..2 {
        world.ingest(vec![event("team.deleted", Mode::Live, "")]).await;
        assert_eq!(world.validate(&license.key, Some("fp")).await.code(), ValidationCode::NotFound);
        for (principal, id) in [(owner(), &license.id), (in_test_mode(owner()), &tested.id)] {
            let got = world.vendor(principal).get_license(GetLicenseRequest { id: id.clone() }).await;
            assert_eq!(reason(got), Reason::NotFound);
        }
    }
    world.end().await;
}

/// Live and test: what is in one is not there for the other, whatever the method.
async fn neither_world_sees_the_other_by_any_method(database: Database) {
    let world = World::on(database);
    for (own, other, product, foreign_product, foreign_client) in [
        (owner(), in_test_mode(owner()), PRODUCT, TEST_PRODUCT, TEST_CLIENT),
        (in_test_mode(owner()), owner(), TEST_PRODUCT, PRODUCT, CLIENT),
    ] {
        let key_of = |principal: &Principal, product: &str| Principal {
            mode: principal.mode,
            product_id: product.into(),
            ..public_key()
        };
        let create = CreateLicenseRequest { product_id: product.into(), ..issue(None) };
        let license = world.vendor(own.clone()).create_license(create.clone()).await.unwrap().into_inner();
        let license = license.license.unwrap();
        let mut app = world.app(key_of(&own, product));
        let made = app.activate_license(activation(&license.key, "fp")).await.unwrap().into_inner();
        let (id, activation_id) = (license.id.clone(), made.activation.unwrap().id);

        let mut vendor = world.vendor(other.clone());
        let mut asked = BTreeSet::new();
        let mut absent = |method: &'static str, reason: Reason| {
            assert_eq!(reason, Reason::NotFound, "{method}");
            asked.insert(method);
        };
        absent("CreateLicense", reason(vendor.create_license(create.clone()).await));
        absent("GetLicense", reason(vendor.get_license(GetLicenseRequest { id: id.clone() }).await));
        let update = UpdateLicenseRequest { email: Some("a@b.cd".into()), ..update_of(&id) };
        absent("UpdateLicense", reason(vendor.update_license(update).await));
        absent("RevokeLicense", reason(vendor.revoke_license(RevokeLicenseRequest { id: id.clone() }).await));
        absent("ReinstateLicense", reason(vendor.reinstate_license(ReinstateLicenseRequest { id: id.clone() }).await));
        let update = UpdateLicenseRequest { client_id: Some("cli_none".into()), ..update_of(&id) };
        absent("UpdateLicense", reason(vendor.update_license(update).await));
        let delete = DeleteActivationRequest { license_id: id.clone(), activation_id };
        absent("DeleteActivation", reason(vendor.delete_activation(delete).await));
        for product in [product, foreign_product] {
            let mut app = world.app(key_of(&other, product));
            absent("ActivateLicense", reason(app.activate_license(activation(&license.key, "fp")).await));
            absent("DeactivateLicense", reason(app.deactivate_license(deactivation(&license.key, "fp")).await));
            let verdict = app.validate_license(validation(&license.key, Some("fp"))).await.unwrap().into_inner();
            assert_eq!((verdict.code(), verdict.license), (ValidationCode::NotFound, None));
        }
        asked.insert("ValidateLicense");
        for query in [None, Some(id.clone()), Some(license.key.clone())] {
            let list = ListLicensesRequest { query, ..ListLicensesRequest::default() };
            let listed = vendor.list_licenses(list).await.unwrap().into_inner().licenses;
            assert!(listed.iter().all(|listed| listed.id != id));
        }
        asked.insert("ListLicenses");
        let export = ExportLicensesRequest { format: "csv".into(), ..ExportLicensesRequest::default() };
        let mut pieces = vendor.export_licenses(export).await.unwrap().into_inner();
        while let Some(piece) = pieces.message().await.unwrap() {
            assert!(!String::from_utf8(piece.data).unwrap().contains(&license.key));
        }
        asked.insert("ExportLicenses");
        let batch = BatchCreateLicensesRequest { licenses: vec![create.clone()] };
        let refusal = refused(vendor.batch_create_licenses(batch).await);
        assert_eq!(field_of(&refusal), "licenses[0].product_id");
        asked.insert("BatchCreateLicenses");
        // A key of one is nothing that an import into the other makes, finds, or learns more of.
        for (product, expected) in [(product, "not_found"), (foreign_product, "conflict")] {
            let data = format!("product_id,key\n{product},{}\n", license.key).into_bytes();
            let file = ImportLicensesRequest { product_id: String::new(), data };
            let mut report = vendor.import_licenses(stream::iter([file])).await.unwrap().into_inner();
            let mut text = String::new();
            while let Some(piece) = report.message().await.unwrap() {
                text.push_str(std::str::from_utf8(&piece.data).unwrap());
            }
            assert!(text.contains(&format!("\"code\":\"{expected}\"")) && !text.contains(&id), "{text}");
        }
        asked.insert("ImportLicenses");
        let methods = Contract::get().methods().iter().filter_map(|method| {
            let path = method.path.strip_prefix("/paperkey.licensing.v1.")?;
            Some(path.split_once('/').unwrap().1)
        });
        assert_eq!(asked, methods.collect(), "no method of the service is left out");

        // Nor can a licence of one name a client of the other.
        let create = CreateLicenseRequest { product_id: product.into(), ..issue(Some(foreign_client)) };
        let refusal = refused(world.vendor(own.clone()).create_license(create).await);
        assert_eq!(field_of(&refusal), "client_id");
        let kept = world.vendor(own).get_license(GetLicenseRequest { id }).await.unwrap().into_inner();
        let kept_license = kept.license.unwrap();
        assert_eq!((kept_license.email, kept_license.activations_count, kept.activations.len()), (None, 1, 1));
    }
    world.end().await;
}

async fn an_integration_and_the_system_key_issue_licences_in_their_team(database: Database) {
    let world = World::on(database);
    let key = |kind: Kind| Principal {
        kind: kind.into(),
        role: Role::Unspecified.into(),
        scopes: vec![Scope::LicensesRead.into(), Scope::LicensesWrite.into()],
        ..owner()
    };
    for kind in [Kind::TeamKey, Kind::FreeKey, Kind::SystemKey] {
        let made = world.vendor(key(kind)).create_license(issue(Some(CLIENT))).await.unwrap().into_inner();
        assert_eq!(made.license.unwrap().client_id.as_deref(), Some(CLIENT), "{kind:?}");
    }
    let nowhere = Principal { team_id: String::new(), mode: Mode::Unspecified.into(), ..key(Kind::SystemKey) };
    assert_eq!(reason(world.vendor(nowhere).create_license(issue(None)).await), Reason::ValidationFailed);
    world.end().await;
}
