//! Licences in bulk, as callers meet them: issued at once, exported, and imported.

mod common;

use std::sync::atomic::Ordering;

use common::{
    CLIENT, PRODUCT, START_MS, TEST_CLIENT, World, activation, mask, owner, public_key, reason, refused, secret_key,
};
use futures_util::stream;
use paperkey_kit::{
    db::{Database, DbError},
    store_suite,
    values::{struct_of, timestamp},
};
use paperkey_licensing::domain::license_key::LicenseKey;
use paperkey_proto::{
    errors::v1::Reason,
    licensing::v1::{
        BatchCreateLicensesRequest, CreateLicenseRequest, ExportLicensesRequest, ImportLicensesRequest, License,
        LicenseStatus, ListLicensesRequest, RevokeLicenseRequest,
    },
    principal::v1::{Mode, Principal},
};
use sea_orm::{ConnectionTrait as _, Statement};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tonic::Status;

store_suite! {
    paperkey_migrations::licensing::Migrator;
    a_thousand_licences_are_issued_at_once,
    one_that_is_refused_takes_all_others_with_it,
    faults_are_named_by_their_places,
    an_export_has_everything_that_its_filters_leave_and_reads_as_an_import,
    what_is_revoked_or_expired_stays_so_in_another_installation,
    an_import_reports_on_every_line,
    an_import_made_again_changes_nothing,
    imports_of_one_file_at_once_make_each_licence_once,
    a_file_whose_first_line_is_at_fault_is_refused_as_a_whole,
    a_secret_key_imports_into_its_product_alone,
    an_import_that_is_cut_off_leaves_what_was_reported,
    an_import_reads_no_further_than_its_report_is_read,
}

fn in_test_mode(principal: Principal) -> Principal {
    Principal { mode: Mode::Test.into(), ..principal }
}

fn license() -> CreateLicenseRequest {
    CreateLicenseRequest { product_id: PRODUCT.into(), ..CreateLicenseRequest::default() }
}

async fn number(database: &Database, sql: &'static str) -> i64 {
    let job = database.read(move |reader| async move {
        let statement = Statement::from_string(reader.get_database_backend(), sql);
        let row = reader.query_one_raw(statement).await?.unwrap();
        Ok::<i64, DbError>(row.try_get("", "n")?)
    });
    job.await.unwrap()
}

async fn count(world: &World) -> i64 {
    number(&world.database, "SELECT COUNT(*) AS n FROM licenses").await
}

async fn batch(
    world: &World,
    principal: Principal,
    licenses: Vec<CreateLicenseRequest>,
) -> Result<Vec<License>, Status> {
    let made = world.vendor(principal).batch_create_licenses(BatchCreateLicensesRequest { licenses }).await?;
    Ok(made.into_inner().licenses)
}

async fn export(world: &World, principal: Principal, request: ExportLicensesRequest) -> (String, String) {
    let mut pieces = world.vendor(principal).export_licenses(request).await.unwrap().into_inner();
    let (mut content_type, mut bytes) = (String::new(), Vec::new());
    while let Some(piece) = pieces.message().await.unwrap() {
        assert_eq!(piece.content_type.is_empty(), !content_type.is_empty(), "named once, in the first");
        content_type.push_str(&piece.content_type);
        bytes.extend(piece.data);
    }
    (content_type, String::from_utf8(bytes).unwrap())
}

/// Imports a file that arrives in pieces of that size.
async fn import_pieces(
    world: &World,
    principal: Principal,
    product_id: &str,
    file: &[u8],
    size: usize,
) -> Result<Vec<Value>, Status> {
    let mut pieces: Vec<_> = file
        .chunks(size)
        .map(|data| ImportLicensesRequest { product_id: String::new(), data: data.to_vec() })
        .collect();
    match pieces.first_mut() {
        Some(first) => first.product_id = product_id.into(),
        None => pieces.push(ImportLicensesRequest { product_id: product_id.into(), data: Vec::new() }),
    }
    let mut report = world.vendor(principal).import_licenses(stream::iter(pieces)).await?.into_inner();
    let (mut content_type, mut bytes) = (String::new(), Vec::new());
    while let Some(piece) = report.message().await? {
        content_type.push_str(&piece.content_type);
        bytes.extend(piece.data);
    }
    assert_eq!(content_type, "application/x-ndjson");
    let text = String::from_utf8(bytes).unwrap();
    Ok(text.lines().map(|line| serde_json::from_str(line).unwrap()).collect())
}

async fn import(world: &World, file: &str) -> Result<Vec<Value>, Status> {
    import_pieces(world, owner(), PRODUCT, file.as_bytes(), 16_384).await
}

async fn a_thousand_licences_are_issued_at_once(database: Database) {
    let mut world = World::on(database);
    let licenses: Vec<_> = (0..1_000)
        .map(|number| CreateLicenseRequest {
            email: Some(format!("User{number}@example.com")),
            client_id: (number % 2 == 0).then(|| CLIENT.to_owned()),
            max_activations: (number % 3 == 0).then_some(7),
            field_mask: (number % 3 == 1).then(|| mask(&["product_id", "email", "max_activations"])),
            expires_at: Some(timestamp(START_MS + 1_000_000 + i64::from(number))),
            metadata: struct_of(&json!({"number": number})),
            ..license()
        })
        .collect();
    let made = batch(&world, owner(), licenses.clone()).await.unwrap();
    assert_eq!(made.len(), 1_000);
    for (asked, made) in licenses.iter().zip(&made) {
        assert_eq!((&asked.email, &asked.client_id, &asked.metadata), (&made.email, &made.client_id, &made.metadata));
        assert_eq!((asked.expires_at, made.status()), (made.expires_at, LicenseStatus::Active));
        let expected = if asked.field_mask.is_some() { None } else { asked.max_activations.or(Some(1)) };
        assert_eq!(made.max_activations, expected);
        assert!(LicenseKey::parse(&made.key).is_ok());
    }
    // Made once, though the call was sent twice.
    assert_eq!(count(&world).await, 1_000);
    assert_eq!(world.asked.load(Ordering::SeqCst), 1, "catalog is asked for the product once");
    let mut told = std::collections::BTreeSet::new();
    for _ in 0..1_000 {
        let (topic, data) = world.event().await;
        assert_eq!(topic, "license.created");
        told.insert(data["id"].as_str().unwrap().to_owned());
    }
    assert_eq!(told, made.iter().map(|made| made.id.clone()).collect());
    assert!(world.validate(&made[999].key, None).await.valid);
    // Each entry of the log is small, and together they name all.
    assert_eq!(number(&world.database, "SELECT COUNT(*) AS n FROM audit_entries").await, 10);
    assert!(
        number(&world.database, "SELECT CAST(MAX(LENGTH(resources)) AS BIGINT) AS n FROM audit_entries").await < 4_000
    );
    world.end().await;
}

async fn one_that_is_refused_takes_all_others_with_it(database: Database) {
    let mut world = World::on(database);
    let foreign = |client_id: &str| CreateLicenseRequest { client_id: Some(client_id.into()), ..license() };
    let lost = [
        (CreateLicenseRequest { max_activations: Some(-1), ..license() }, "licenses[2].max_activations"),
        (CreateLicenseRequest { product_id: "prod_none".into(), ..license() }, "licenses[2].product_id"),
        (CreateLicenseRequest { product_id: "'".into(), ..license() }, "licenses[2].product_id"),
        (foreign("cli_none"), "licenses[2].client_id"),
        (foreign(TEST_CLIENT), "licenses[2].client_id"),
        (CreateLicenseRequest { email: Some("nobody".into()), ..license() }, "licenses[2].email"),
        (CreateLicenseRequest { field_mask: Some(mask(&["id"])), ..license() }, "licenses[2].id"),
    ];
    for (one, field) in lost {
        let refusal = refused(batch(&world, owner(), vec![license(), license(), one, license()]).await);
        assert_eq!(refusal.reason(), Reason::ValidationFailed);
        let fields: Vec<_> = refusal.violations().iter().map(|violation| violation.field.as_str()).collect();
        assert_eq!(fields, [field]);
    }
    let down = refused(batch(&world, owner(), vec![license(), foreign("cli_unlucky")]).await);
    assert_eq!(down.reason(), Reason::Unavailable);
    // What catalog still knows and licensing knows to be gone, is refused by the store.
    world.store.of(tenant()).forget_client(CLIENT, act()).await.unwrap();
    let gone = refused(batch(&world, owner(), vec![license(), foreign(CLIENT)]).await);
    assert_eq!(gone.violations()[0].field, "licenses[1].client_id");
    assert_eq!(count(&world).await, 0);
    assert!(world.events.try_recv().is_err());

    let own = batch(&world, secret_key(PRODUCT), vec![license(), license()]).await.unwrap();
    assert_eq!(own.len(), 2);
    for stranger in [secret_key("prod_2"), in_test_mode(owner()), Principal { team_id: "team_2".into(), ..owner() }] {
        let refusal = refused(batch(&world, stranger, vec![license()]).await);
        assert_eq!(refusal.violations()[0].field, "licenses[0].product_id");
    }
    assert_eq!(reason(batch(&world, public_key(), vec![license()]).await), Reason::ScopeInsufficient);
    assert_eq!(count(&world).await, 2);
    world.end().await;
}

async fn faults_are_named_by_their_places(database: Database) {
    let world = World::on(database);
    for wrong in [0, 1_001] {
        let refusal = refused(batch(&world, owner(), vec![license(); wrong]).await);
        assert_eq!(refusal.violations()[0].field, "licenses");
    }
    // By the rules of the contract and by those of the domain, all of them at once.
    let contract = vec![
        CreateLicenseRequest { email: Some("x".into()), ..license() },
        license(),
        CreateLicenseRequest { product_id: String::new(), max_activations: Some(-1), ..license() },
    ];
    let refusal = refused(batch(&world, owner(), contract).await);
    let fields: Vec<_> = refusal.violations().iter().map(|violation| violation.field.as_str()).collect();
    assert_eq!(fields, ["licenses[0].email", "licenses[2].max_activations", "licenses[2].product_id"]);
    let domain = vec![
        CreateLicenseRequest { expires_at: Some(timestamp(-1)), ..license() },
        license(),
        CreateLicenseRequest { metadata: struct_of(&json!({"a": "x".repeat(20_000)})), ..license() },
    ];
    let refusal = refused(batch(&world, owner(), domain).await);
    let fields: Vec<_> = refusal.violations().iter().map(|violation| violation.field.as_str()).collect();
    assert_eq!(fields, ["licenses[0].expires_at", "licenses[2].metadata"]);
    // What would be too long to answer is refused before it is made.
    let large = CreateLicenseRequest { metadata: struct_of(&json!({"a": "x".repeat(4_050)})), ..license() };
    let refusal = refused(batch(&world, owner(), vec![large; 1_000]).await);
    assert!([Reason::ValidationFailed, Reason::BodyTooLarge].contains(&refusal.reason()));
    assert_eq!(count(&world).await, 0);
    world.end().await;
}

fn tenant() -> paperkey_kit::principal::Tenant {
    paperkey_kit::principal::Tenant { team_id: "team_1".into(), mode: Mode::Live }
}

fn act() -> paperkey_licensing::store::Act {
    paperkey_licensing::store::Act::by_service("test", "/test")
}

async fn an_export_has_everything_that_its_filters_leave_and_reads_as_an_import(database: Database) {
    let world = World::on(database);
    let request = |format: &str| ExportLicensesRequest { format: format.into(), ..ExportLicensesRequest::default() };
    let head = "id,product_id,key,status,email,client_id,max_activations,activations_count,expires_at,metadata,\
                created_at,updated_at,revoked_at\r\n";
    assert_eq!(export(&world, owner(), request("csv")).await, ("text/csv; charset=utf-8".into(), head.into()));
    assert_eq!(export(&world, owner(), request("ndjson")).await, ("application/x-ndjson".into(), String::new()));
    for format in ["", "xlsx", "CSV"] {
        let refusal = world.vendor(owner()).export_licenses(request(format)).await.map(drop);
        assert_eq!(refused(refusal).violations()[0].field, "format");
    }
    let unknown = ExportLicensesRequest { status: 77, ..request("csv") };
    let refusal = world.vendor(owner()).export_licenses(unknown).await.map(drop);
    assert_eq!(refused(refusal).violations()[0].field, "status");

    let mut licenses: Vec<_> = (0..650)
        .map(|number| CreateLicenseRequest {
            email: Some(format!("{}user{number}@example.com", ["=", "+", "-", "'=", "o'"][number % 5])),
            client_id: (number % 2 == 0).then(|| CLIENT.to_owned()),
            field_mask: (number % 3 == 1).then(|| mask(&["max_activations"])),
            expires_at: (number % 4 == 0).then(|| timestamp(START_MS + 60_000)),
            metadata: struct_of(&json!({"text": "a,\"b\"\r\n=1", "number": number, "x": "y".repeat(200)})),
            ..license()
        })
        .collect();
    licenses[0].metadata = None;
    licenses[0].email = None;
    let made = batch(&world, owner(), licenses).await.unwrap();
    world.vendor(owner()).revoke_license(RevokeLicenseRequest { id: made[5].id.clone() }).await.unwrap();
    world.app(public_key()).activate_license(activation(&made[7].key, "fp")).await.unwrap();

    let (_, csv) = export(&world, owner(), request("csv")).await;
    let mut reader = csv::Reader::from_reader(csv.as_bytes());
    let rows: Vec<csv::StringRecord> = reader.records().map(Result::unwrap).collect();
    assert_eq!(rows.len(), 650);
    assert!(rows.windows(2).all(|pair| pair[0][0] > pair[1][0]), "newest first, each once");
    assert!(rows.iter().all(|row| row.iter().all(|cell| !cell.starts_with(['=', '+', '-', '@']))));
    let row = |id: &str| rows.iter().find(|row| &row[0] == id).unwrap();
    let revoked = row(&made[5].id);
    assert_eq!(
        (&revoked[3], &revoked[4], &revoked[12]),
        ("revoked", "'=user5@example.com", "2026-12-31T00:00:00.000Z")
    );
    assert_eq!((&row(&made[1].id)[6], &row(&made[0].id)[6], &row(&made[7].id)[7]), ("unlimited", "1", "1"));
    assert_eq!((&row(&made[0].id)[4], &row(&made[0].id)[9]), ("", ""));
    assert_eq!(&row(&made[4].id)[8], "2026-12-31T00:01:00.000Z");

    let (_, lines) = export(&world, owner(), request("ndjson")).await;
    let objects: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(objects.len(), 650);
    let object = objects.iter().find(|object| object["id"] == made[2].id.as_str()).unwrap();
    let expected = json!({
        "id": made[2].id, "productId": PRODUCT, "key": made[2].key, "status": "active",
        "email": "-user2@example.com", "clientId": CLIENT, "maxActivations": 1, "activationsCount": 0,
        "expiresAt": null, "metadata": {"text": "a,\"b\"\r\n=1", "number": 2, "x": "y".repeat(200)},
        "createdAt": "2026-12-31T00:00:00.000Z", "updatedAt": "2026-12-31T00:00:00.000Z", "revokedAt": null,
    });
    assert_eq!(object, &expected);

    // Each filter leaves what it leaves in a list.
    for filtered in [
        ExportLicensesRequest { status: LicenseStatus::Revoked.into(), ..request("ndjson") },
        ExportLicensesRequest { client_id: Some(CLIENT.into()), ..request("ndjson") },
        ExportLicensesRequest { query: Some("+USER6".into()), ..request("ndjson") },
        ExportLicensesRequest { email: Some("-USER2@example.com".into()), ..request("ndjson") },
        ExportLicensesRequest { product_id: Some("prod_2".into()), ..request("ndjson") },
    ] {
        let mut listed = Vec::new();
        let mut page_token = String::new();
        loop {
            let ExportLicensesRequest { product_id, status, email, client_id, query, .. } = filtered.clone();
            let list =
                ListLicensesRequest { product_id, status, email, client_id, query, page_size: Some(100), page_token };
            let page = world.vendor(owner()).list_licenses(list).await.unwrap().into_inner();
            listed.extend(page.licenses.into_iter().map(|license| Value::from(license.id)));
            let Some(next) = page.next_page_token else { break };
            page_token = next;
        }
        let (_, lines) = export(&world, owner(), filtered.clone()).await;
        let exported = lines.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["id"].clone());
        assert_eq!(exported.collect::<Vec<_>>(), listed, "{filtered:?}");
    }
    for stranger in [in_test_mode(owner()), secret_key("prod_2"), Principal { team_id: "team_2".into(), ..owner() }] {
        assert_eq!(export(&world, stranger, request("ndjson")).await.1, "");
    }

    // In an installation that has none of them, the export is an import.
    for made in &made {
        assert!(csv.contains(&made.key));
    }
    let again = import(&world, &csv).await.unwrap();
    assert_eq!(again.last().unwrap(), &json!({"lines": 650, "created": 0, "existing": 650, "failed": 0}));
    clear(&world.database).await;
    let report = import(&world, &csv).await.unwrap();
    assert_eq!(report.last().unwrap(), &json!({"lines": 650, "created": 650, "existing": 0, "failed": 0}));
    let (_, copied) = export(&world, owner(), request("ndjson")).await;
    let mut copied: Vec<Value> = copied.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let mut objects = objects;
    for object in objects.iter_mut().chain(&mut copied) {
        let members = object.as_object_mut().unwrap();
        for told in ["id", "activationsCount"] {
            members.remove(told);
        }
    }
    let key = |object: &Value| object["key"].as_str().unwrap().to_owned();
    objects.sort_by_key(key);
    copied.sort_by_key(key);
    assert_eq!(copied, objects);
    world.end().await;
}

async fn clear(database: &Database) {
    let job = database.write(|tx| async move {
        for table in ["licenses", "activations"] {
            tx.execute_unprepared(&format!("DELETE FROM {table}")).await?;
        }
        Ok::<_, DbError>(())
    });
    job.await.unwrap();
}

async fn what_is_revoked_or_expired_stays_so_in_another_installation(database: Database) {
    let mut world = World::on(database);
    let keys: Vec<_> = (0..4).map(|_| LicenseKey::random().to_string()).collect();
    let (past, then) = ("2026-12-30T00:00:00.000Z", "2026-12-29T12:00:00.007Z");
    let mut file = format!(
        "key,expires_at,revoked_at\n{},,\n{},{past},\n{},,{then}\n{},{past},{then}\n",
        keys[0], keys[1], keys[2], keys[3]
    );
    let ndjson = || ExportLicensesRequest { format: "ndjson".into(), ..ExportLicensesRequest::default() };
    for round in 0..2 {
        let report = import(&world, &file).await.unwrap();
        assert_eq!(report.last().unwrap()["created"], 4, "{report:#?}");
        let (_, lines) = export(&world, owner(), ndjson()).await;
        let lines: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let expected = [
            ("active", Value::Null, Value::Null, true),
            ("expired", json!(past), Value::Null, false),
            ("revoked", Value::Null, json!(then), false),
            ("revoked", json!(past), json!(then), false),
        ];
        for (key, (status, expires_at, revoked_at, is_valid)) in keys.iter().zip(expected) {
            let line = lines.iter().find(|line| line["key"] == key.as_str()).unwrap();
            assert_eq!((&line["status"], &line["revokedAt"]), (&json!(status), &revoked_at), "round {round}");
            assert_eq!(line["expiresAt"], expires_at);
            assert_eq!(world.validate(key, None).await.valid, is_valid);
        }
        // Nobody's expiry is told who is revoked.
        world.store.expire_due().await.unwrap();
        let mut told = Vec::new();
        for _ in 0..5 {
            let (topic, data) = world.event().await;
            told.push((topic, data["key"].as_str().unwrap().to_owned(), data["status"].as_str().unwrap().to_owned()));
        }
        told.sort();
        let mut expected: Vec<_> = keys.iter().zip(["active", "expired", "revoked", "revoked"]).collect();
        expected.sort();
        let created = expected.into_iter().map(|(key, status)| ("license.created", key.as_str(), status));
        let expected: Vec<_> = created.chain([("license.expired", keys[1].as_str(), "expired")]).collect();
        let told = told.iter().map(|(topic, key, status)| (topic.as_str(), key.as_str(), status.as_str()));
        assert_eq!(told.collect::<Vec<_>>(), expected);
        assert!(world.events.try_recv().is_err());
        file = export(&world, owner(), ExportLicensesRequest { format: "csv".into(), ..ndjson() }).await.1;
        clear(&world.database).await;
    }
    world.end().await;
}

async fn an_import_reports_on_every_line(database: Database) {
    let mut world = World::on(database);
    let (own, other) = (LicenseKey::random(), LicenseKey::random());
    let taken = world.issue(CreateLicenseRequest::default()).await;
    let foreign = CreateLicenseRequest { product_id: common::TEST_PRODUCT.into(), ..license() };
    let foreign = world.vendor(in_test_mode(owner())).create_license(foreign).await.unwrap().into_inner();
    let foreign = foreign.license.unwrap();
    for _ in 0..2 {
        world.events.recv().await.unwrap();
    }
    let file = format!(
        "\u{feff}key,email,clientId,max_activations,expiresAt,metadata,status,productId\r\n\
         {own},Ann@Example.com,{CLIENT},5,2027-01-01T00:00:00+01:00,\"{{\"\"a\"\": [1,\n null]}}\",revoked,\r\n\
         ,,,,,,,\n\
         ,'=x@example.com,,UNLIMITED,,,,{PRODUCT}\n\
         \n\
         {taken},changed@example.com,,9,,,,\n\
         {foreign},,,,,,,\n\
         {own},twice@example.com,,,,,,\n\
         K7WX9-M3NP4-H8TRC-DK,,,,,,,\n\
         short,,,,,,,\n\
         ,nobody,,,,,,\n\
         ,,cli_none,,,,,\n\
         ,,,-1,,,,\n\
         ,,,many,,,,\n\
         ,,,,tomorrow,,,\n\
         ,,,,,[1],,\n\
         ,,,,,{{\"\"a\"\":9007199254740993}},,\n\
         ,,,,,,,prod_none\n\
         a,b\n\
         ,{long},,,,,,\n\
         {other},,,0,1969-12-31T23:59:59Z,,,\n\
         {other},,,0,,{{}},,\n\
         ,\"never closed,,,,,,\n",
        taken = taken.key,
        foreign = foreign.key,
        long = "x".repeat(70_000),
    );
    let mut file = file.into_bytes();
    // A line that is not UTF-8, before the last.
    let at = file.iter().rposition(|byte| *byte == b'"').unwrap() - 1;
    file.splice(at..at, b",\xff\xfe,,,,,,\n".iter().copied());
    let report = import_pieces(&world, owner(), PRODUCT, &file, 1_000).await.unwrap();
    let brief = |line: &Value| {
        let error = &line["error"];
        let text = |value: &Value| value.as_str().unwrap_or("-").to_owned();
        (line["line"].as_u64().unwrap_or(0), text(&line["status"]), text(&error["field"]), text(&error["code"]))
    };
    let line = |line: u64, status: &str, field: &str, code: &str| (line, status.into(), field.into(), code.into());
    let failed = |number: u64, field: &str| line(number, "failed", field, "validation_error");
    let found: Vec<_> = report.iter().map(brief).collect();
    assert_eq!(
        found,
        [
            line(2, "created", "-", "-"),
            line(4, "created", "-", "-"),
            line(5, "created", "-", "-"),
            line(7, "exists", "-", "-"),
            line(8, "failed", "key", "conflict"),
            line(9, "exists", "-", "-"),
            failed(10, "key"),
            failed(11, "key"),
            failed(12, "email"),
            failed(13, "client_id"),
            failed(14, "max_activations"),
            failed(15, "max_activations"),
            failed(16, "expires_at"),
            failed(17, "metadata"),
            failed(18, "metadata"),
            line(19, "failed", "product_id", "not_found"),
            failed(20, "-"),
            failed(21, "-"),
            failed(22, "expires_at"),
            line(23, "created", "-", "-"),
            failed(24, "-"),
            failed(25, "-"),
            line(0, "-", "-", "-"),
        ],
        "{report:#?}"
    );
    assert_eq!(report.last().unwrap(), &json!({"lines": 22, "created": 4, "existing": 2, "failed": 16}));
    let message = |at: usize| report[at]["error"]["message"].as_str().unwrap();
    assert!(message(6).ends_with("did you mean K7WX9-M3NP4-H8TRC-DJ?"));
    assert_eq!(message(4), "is in use", "and no more");
    assert_eq!((&report[0]["key"], &report[3]["id"]), (&json!(own.to_string()), &json!(taken.id)));
    assert_eq!(report[5]["id"], report[0]["id"]);

    let listed = world.vendor(owner()).list_licenses(ListLicensesRequest::default()).await.unwrap().into_inner();
    assert_eq!(listed.licenses.len(), 5);
    let found =
        |index: usize| listed.licenses.iter().find(|license| report[index]["id"] == license.id.as_str()).unwrap();
    let first = found(0);
    assert_eq!((first.email.as_deref(), first.client_id.as_deref()), (Some("Ann@Example.com"), Some(CLIENT)));
    assert_eq!((first.max_activations, first.status()), (Some(5), LicenseStatus::Active));
    assert_eq!(first.expires_at, Some(timestamp(START_MS + 23 * 3_600_000)));
    assert_eq!(first.metadata, struct_of(&json!({"a": [1, null]})));
    assert_eq!((found(1).max_activations, found(1).email.as_deref()), (Some(1), None));
    assert_eq!((found(2).max_activations, found(2).email.as_deref()), (None, Some("=x@example.com")));
    assert_eq!((found(3).max_activations, found(3).email.as_deref()), (Some(1), None), "left as it is");
    assert_eq!(found(19).max_activations, Some(0));
    assert!(world.validate(&own.to_string(), None).await.valid);
    for _ in 0..4 {
        assert_eq!(world.event().await.0, "license.created");
    }
    assert!(world.events.try_recv().is_err(), "nothing else was told");
    world.end().await;
}

async fn an_import_made_again_changes_nothing(database: Database) {
    let world = World::on(database);
    let keys: Vec<_> = (0..450).map(|_| LicenseKey::random().to_string()).collect();
    let file = format!("key\n{}\n", keys.join("\n"));
    let first = import(&world, &file).await.unwrap();
    assert_eq!(first.last().unwrap(), &json!({"lines": 450, "created": 450, "existing": 0, "failed": 0}));
    let numbers: Vec<_> = first.iter().filter_map(|line| line["line"].as_u64()).collect();
    assert_eq!(numbers, (2..=451).collect::<Vec<_>>());
    let second = import(&world, &file.to_lowercase().replace('\n', "\r\n")).await.unwrap();
    assert_eq!(second.last().unwrap(), &json!({"lines": 450, "created": 0, "existing": 450, "failed": 0}));
    for (first, second) in first.iter().zip(&second).take(450) {
        assert_eq!((&first["id"], &first["key"]), (&second["id"], &second["key"]));
    }
    assert_eq!(count(&world).await, 450);
    // In pieces of one byte as well.
    let bytewise = import_pieces(&world, owner(), PRODUCT, format!("key\n{}", keys[0]).as_bytes(), 1).await.unwrap();
    assert_eq!(bytewise[0]["status"], "exists");
    world.end().await;
}

async fn imports_of_one_file_at_once_make_each_licence_once(database: Database) {
    let world = World::on(database);
    let keys: Vec<_> = (0..400).map(|_| LicenseKey::random().to_string()).collect();
    let backwards: Vec<_> = keys.iter().rev().cloned().collect();
    let files = [format!("key\n{}", keys.join("\n")), format!("key\n{}", backwards.join("\n"))];
    let imports = (0..6).map(|at| import(&world, &files[at % 2]));
    let mut created = 0;
    for report in futures_util::future::join_all(imports).await {
        let report = report.unwrap();
        let end = report.last().unwrap();
        assert_eq!((&end["lines"], &end["failed"]), (&json!(400), &json!(0)));
        created += end["created"].as_u64().unwrap();
    }
    assert_eq!((created, count(&world).await), (400, 400));
    world.end().await;
}

async fn a_file_whose_first_line_is_at_fault_is_refused_as_a_whole(database: Database) {
    let world = World::on(database);
    let many = vec!["id"; 101].join(",");
    let long = format!("key\n{}", "x".repeat(70_000));
    let huge = "x".repeat(70_000);
    for (file, field) in [
        ("", "data"),
        ("\r\n\n", "data"),
        ("\"key", "data"),
        ("email,plan\na@b.cd,pro\n", "plan"),
        ("email,,key\n", "data"),
        ("email,Email\n", "Email"),
        ("client_id,clientId\n", "clientId"),
        (many.as_str(), "data"),
        (huge.as_str(), "data"),
    ] {
        let refusal = refused(import(&world, file).await);
        assert_eq!((refusal.reason(), refusal.violations()[0].field.as_str()), (Reason::ValidationFailed, field));
    }
    let nowhere = import_pieces(&world, owner(), "", b"email\na@b.cd\n", 100).await;
    assert_eq!(refused(nowhere).violations()[0].field, "product_id");
    for product in ["prod_none", "'"] {
        let foreign = import_pieces(&world, owner(), product, b"email\na@b.cd\n", 100).await;
        assert_eq!(reason(foreign), Reason::NotFound);
    }
    let named = import_pieces(&world, owner(), "", format!("product_id\n{PRODUCT}\n").as_bytes(), 100).await.unwrap();
    assert_eq!(named.last().unwrap()["created"], 1);
    // A first line alone is a file without licences.
    assert_eq!(import(&world, "key").await.unwrap(), [json!({"lines": 0, "created": 0, "existing": 0, "failed": 0})]);
    assert_eq!(import(&world, &long).await.unwrap()[0]["status"], "failed");
    assert_eq!(count(&world).await, 1);
    world.end().await;
}

async fn a_secret_key_imports_into_its_product_alone(database: Database) {
    let world = World::on(database);
    let file = format!("email,product_id\na@b.cd,\na@b.cd,{PRODUCT}\na@b.cd,prod_2\n");
    let report = import_pieces(&world, secret_key(PRODUCT), "", file.as_bytes(), 10).await.unwrap();
    let statuses: Vec<_> = report.iter().map(|line| line["status"].as_str().unwrap_or_default()).collect();
    assert_eq!(statuses, ["created", "created", "failed", ""]);
    let foreign = import_pieces(&world, secret_key(PRODUCT), "prod_2", b"email\na@b.cd\n", 10).await;
    assert_eq!(reason(foreign), Reason::NotFound);
    assert_eq!(reason(import_pieces(&world, public_key(), PRODUCT, b"email\n", 10).await), Reason::ScopeInsufficient);
    assert_eq!(count(&world).await, 2);
    world.end().await;
}

/// An import whose file the test sends piece by piece.
struct Live {
    file: mpsc::UnboundedSender<ImportLicensesRequest>,
    report: tonic::Streaming<paperkey_proto::licensing::v1::ImportLicensesResponse>,
}

impl Live {
    async fn begin(world: &World, first: &str) -> Self {
        let (file, mut pieces) = mpsc::unbounded_channel();
        let first = ImportLicensesRequest { product_id: PRODUCT.into(), data: first.into() };
        file.send(first).unwrap();
        let pieces = stream::poll_fn(move |context| pieces.poll_recv(context));
        let report = world.vendor(owner()).import_licenses(pieces).await.unwrap().into_inner();
        Self { file, report }
    }

    fn send(&self, data: &str) {
        let piece = ImportLicensesRequest { product_id: String::new(), data: data.into() };
        // Nobody reads any more where the import is over.
        let _ = self.file.send(piece);
    }

    async fn lines(&mut self) -> Result<Option<Vec<Value>>, Status> {
        let Some(piece) = self.report.message().await? else { return Ok(None) };
        let text = String::from_utf8(piece.data).unwrap();
        Ok(Some(text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()))
    }
}

async fn an_import_that_is_cut_off_leaves_what_was_reported(database: Database) {
    let world = World::on(database);
    let mut live = Live::begin(&world, "email\na@b.cd\nb@b.cd\nc@").await;
    // Lines that are there do not wait for more than a moment.
    let lines = live.lines().await.unwrap().unwrap();
    assert_eq!(lines.len(), 2);
    assert_eq!(count(&world).await, 2);
    live.send("b.cd\n");
    assert_eq!(live.lines().await.unwrap().unwrap()[0]["line"], 4);
    let Live { file, report } = live;
    drop(report);
    drop(file);
    assert_eq!(count(&world).await, 3);
    world.end().await;
}

async fn an_import_reads_no_further_than_its_report_is_read(database: Database) {
    let world = World::on(database);
    let mut live = Live::begin(&world, "email\n").await;
    for _ in 0..20 {
        live.send(&"a@b.cd\n".repeat(200));
    }
    let lines = live.lines().await.unwrap().unwrap();
    assert_eq!(lines.len(), 200);
    // The answer is buffered a little on its way, and no more than that is written.
    assert!(count(&world).await <= 2_000, "{}", count(&world).await);
    drop(live);
    let written = count(&world).await;
    assert!(written <= 2_200 && written % 200 == 0, "{written}");
    world.end().await;
}
