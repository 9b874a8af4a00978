//! Licences by the hundred: batches, imports, exports.

use std::collections::{BTreeMap, BTreeSet};

use http::Method;
use paperkey_proto::errors::v1::Reason;
use paperkey_tests::{
    Account, Answer, Installation, License, Product, Receiver, eventually, on_both_kinds, people::text,
};
use serde_json::{Value, json};

on_both_kinds! {
    a_thousand_licences_are_issued_at_once_and_each_is_told,
    one_fault_in_a_batch_refuses_all_of_it_and_names_its_place,
    an_import_reports_on_each_line,
    an_import_that_was_cut_off_can_be_made_again,
    a_file_that_cannot_be_read_changes_nothing,
    what_was_exported_can_be_imported,
    an_export_is_what_the_filters_leave,
}

async fn import(owner: &Account, product: &Product, file: &str) -> Answer {
    let path = format!("/licenses/import?productId={}", product.id);
    owner.send(Method::POST, &path, Some("text/csv"), file.to_owned().into()).await
}

/// The lines of a body of JSON objects.
#[track_caller]
fn lines(answer: &Answer) -> Vec<Value> {
    assert_eq!(answer.status, 200, "{}: {}", answer.asked, answer.text());
    assert_eq!(answer.header("content-type"), Some("application/x-ndjson"), "{}", answer.asked);
    let read = |line: &str| serde_json::from_str(line).unwrap_or_else(|_| panic!("no JSON: {line}"));
    answer.text().lines().map(read).collect()
}

/// The report of an import: what became of each line, and the last line.
#[track_caller]
fn report(answer: &Answer) -> (BTreeMap<u64, Value>, Value) {
    let mut all = lines(answer);
    let last = all.pop().expect("a report has an end");
    (all.into_iter().map(|line| (line["line"].as_u64().expect("a line has a number"), line)).collect(), last)
}

async fn all_licenses(owner: &Account, product: &Product) -> Vec<Value> {
    lines(&owner.get(&format!("/licenses/export?format=ndjson&productId={}", product.id)).await)
}

async fn a_thousand_licences_are_issued_at_once_and_each_is_told(install: Installation) {
    let receiver = Receiver::start().await;
    let owner = install.register().await;
    let product = owner.create_product("App").await;
    let webhook = owner.subscribe(&product, receiver.url()).await;
    let licenses: Vec<Value> = (0..1_000)
        .map(|n| json!({"productId": product.id, "email": format!("customer-{n}@example.com"), "maxActivations": null}))
        .collect();
    let made = owner.post("/licenses/batch", json!({"licenses": licenses})).await;
    let made = made.gives(201)["licenses"].as_array().unwrap().clone();
    assert_eq!(made.len(), 1_000);
    for (n, license) in made.iter().enumerate() {
        assert_eq!(license["email"], format!("customer-{n}@example.com"), "in the order of the request");
        assert_eq!((&license["maxActivations"], &license["status"]), (&Value::Null, &json!("active")));
    }
    let ids: BTreeSet<String> = made.iter().map(|license| text(license, "/id")).collect();
    let keys: BTreeSet<String> = made.iter().map(|license| text(license, "/key")).collect();
    assert_eq!((ids.len(), keys.len()), (1_000, 1_000));
    assert_eq!(owner.app(&product).verdict(&License::of(&made[999])).await, "valid");
    let arrived = receiver
        .wait("every event", |arrived| {
            let told: BTreeSet<&str> = arrived.iter().filter_map(|d| d.json["data"]["id"].as_str()).collect();
            (told.len() == 1_000).then(|| arrived.to_vec())
        })
        .await;
    assert!(arrived.iter().all(|delivery| ids.contains(delivery.json["data"]["id"].as_str().unwrap())));
    arrived[0].is_signed_with(&webhook.secret);
}

async fn one_fault_in_a_batch_refuses_all_of_it_and_names_its_place(install: Installation) {
    let owner = install.register().await;
    let product = owner.create_product("App").await;
    let good = || json!({"productId": product.id});
    let batch = async |licenses: Vec<Value>| owner.post("/licenses/batch", json!({"licenses": licenses})).await;
    let mut faulty: Vec<Value> = (0..10).map(|_| good()).collect();
    faulty[3]["email"] = json!("nonsense");
    batch(faulty).await.refused_for("licenses[3].email");
    let mut faulty: Vec<Value> = (0..10).map(|_| good()).collect();
    faulty[7]["maxActivations"] = json!(-1);
    faulty[9]["nonsense"] = json!(1);
    batch(faulty).await.refused(Reason::ValidationFailed);
    let stranger = install.register().await.create_product("Theirs").await;
    batch(vec![good(), json!({"productId": stranger.id})]).await.refused_for("licenses[1].productId");
    batch(vec![good(), json!({"productId": product.id, "clientId": "cli_nobody"})])
        .await
        .refused_for("licenses[1].clientId");
    batch(Vec::new()).await.refused_for("licenses");
    batch((0..1_001).map(|_| good()).collect()).await.refused_for("licenses");
    assert_eq!(all_licenses(&owner, &product).await, Vec::<Value>::new(), "nothing of it was made");
}

async fn an_import_reports_on_each_line(install: Installation) {
    let receiver = Receiver::start().await;
    let owner = install.register().await;
    let product = owner.create_product("App").await;
    owner.subscribe(&product, receiver.url()).await;
    let file = "email,max_activations,expires_at,metadata\r\n\
                ada@example.com,5,2030-01-01T00:00:00Z,\"{\"\"seats\"\": 3, \"\"note\"\": \"\"a, b\nc\"\"}\"\r\n\
                nonsense,,,\r\n\
                grace@example.com,,,\r\n\
                edsger@example.com,many,,\r\n\
                too,few\r\n\
                alan@example.com,unlimited,,\r\n";
    // A line break within quotes is none within JSON.
    let file = file.replace("a, b\nc", "a, b");
    let (told, end) = report(&import(&owner, &product, &file).await);
    let status = |line: u64| told[&line]["status"].as_str().unwrap_or_default().to_owned();
    let statuses: Vec<String> = (2..=7).map(status).collect();
    assert_eq!(statuses, ["created", "failed", "created", "failed", "failed", "created"], "{told:#?}");
    assert_eq!(
        (told[&3]["error"]["field"].as_str(), told[&5]["error"]["field"].as_str()),
        (Some("email"), Some("max_activations"))
    );
    assert_eq!(end, json!({"lines": 6, "created": 3, "existing": 0, "failed": 3}));
    let seen = owner.get(&format!("/licenses/{}", text(&told[&2], "/id"))).await;
    let seen = seen.gives(200);
    assert_eq!(seen["key"], told[&2]["key"]);
    assert_eq!((&seen["email"], &seen["maxActivations"]), (&json!("ada@example.com"), &json!(5)));
    assert_eq!(seen["metadata"], json!({"seats": 3, "note": "a, b"}));
    assert_eq!(seen["expiresAt"], "2030-01-01T00:00:00.000Z");
    let unlimited = owner.get(&format!("/licenses/{}", text(&told[&7], "/id"))).await;
    assert_eq!(unlimited.gives(200)["maxActivations"], Value::Null);
    let arrived = receiver.received(3).await;
    assert!(arrived.iter().all(|delivery| delivery.event() == "license.created"), "each is told");
}

async fn an_import_that_was_cut_off_can_be_made_again(install: Installation) {
    let owner = install.register().await;
    let (first, product) = (owner.create_product("Old").await, owner.create_product("New").await);
    // Keys that are as they must be, and free again.
    let keys: Vec<String> = {
        let mut keys = Vec::new();
        for _ in 0..3 {
            keys.push(owner.issue(&first, json!({})).await.key);
        }
        keys
    };
    let taken = report(&import(&owner, &product, &format!("key\n{}\n", keys[0])).await);
    assert_eq!(taken.1["failed"], 1, "a key of another product is not taken from it: {taken:?}");
    owner.delete(&format!("/products/{}", first.id)).await.gives(204);
    let half = format!("key,email\n{},a@example.com\n", keys[0]);
    eventually("the keys are free", || async {
        (report(&import(&owner, &product, &half).await).1["failed"] == 0).then_some(())
    })
    .await;
    let whole = format!("{half}{},b@example.com\n{},c@example.com\n{},d@example.com\n", keys[1], keys[2], keys[2]);
    let (told, end) = report(&import(&owner, &product, &whole).await);
    let statuses: Vec<&str> = told.values().map(|line| line["status"].as_str().unwrap()).collect();
    assert_eq!(statuses, ["exists", "created", "created", "exists"], "{told:#?}");
    assert_eq!(end, json!({"lines": 4, "created": 2, "existing": 2, "failed": 0}));
    let (again, end) = report(&import(&owner, &product, &whole).await);
    assert_eq!(end["existing"], 4);
    for (line, told) in &told {
        assert_eq!(told["id"], again[line]["id"], "the same licences");
    }
    // However a key is written.
    let (_, end) =
        report(&import(&owner, &product, &format!("key\n{}\n", keys[1].to_lowercase().replace('-', " "))).await);
    assert_eq!(end["existing"], 1);
    assert_eq!(all_licenses(&owner, &product).await.len(), 3);
}

async fn a_file_that_cannot_be_read_changes_nothing(install: Installation) {
    let owner = install.register().await;
    let product = owner.create_product("App").await;
    for file in ["", "\n\n", "nonsense\na\n", "email,email\na@example.com,b@example.com\n", "\u{0}"] {
        import(&owner, &product, file).await.refused(Reason::ValidationFailed);
    }
    let without_product =
        owner.send(Method::POST, "/licenses/import", Some("text/csv"), "email\na@b.cd\n".into()).await;
    without_product.refused(Reason::ValidationFailed);
    let unknown = owner.send(Method::POST, "/licenses/import?nonsense=1", Some("text/csv"), "email\n".into()).await;
    unknown.refused_for("nonsense");
    // Bytes that are no text, and quotes that never end, are faults of their lines.
    let mut bytes = b"email,metadata\nada@example.com,\n\xff\xfe,\n".to_vec();
    bytes.extend_from_slice(b"grace@example.com,\"{");
    let path = format!("/licenses/import?productId={}", product.id);
    let (told, end) = report(&owner.send(Method::POST, &path, Some("text/csv"), bytes.into()).await);
    assert_eq!(end, json!({"lines": 3, "created": 1, "existing": 0, "failed": 2}), "{told:#?}");
    assert_eq!(all_licenses(&owner, &product).await.len(), 1);
    let app = owner.app(&product).0;
    let refused = app.send(Method::POST, &path, Some("text/csv"), "email\n".into()).await;
    refused.refused(Reason::InvalidCredentials);
}

async fn what_was_exported_can_be_imported(install: Installation) {
    let owner = install.register().await;
    let (old, new) = (owner.create_product("Old").await, owner.create_product("New").await);
    // What CSV, spreadsheets and JSON each have their ways with.
    let odd = [
        json!({"note": "comma, \"quote\" and\nline"}),
        json!({"=formula": "=1+1", "東京": ["🗝", null, true, 1.5, {"deep": {}}]}),
        json!({}),
    ];
    for (n, metadata) in odd.iter().enumerate() {
        let expires = if n == 0 { json!("2031-02-03T04:05:06.789Z") } else { Value::Null };
        let limit = if n == 1 { Value::Null } else { json!(n) };
        let with = json!({"email": format!("-odd+{n}@example.com"), "maxActivations": limit, "metadata": metadata,
                          "expiresAt": expires});
        owner.issue(&old, with).await;
    }
    owner.issue(&old, json!({})).await;
    let csv = owner.get(&format!("/licenses/export?format=csv&productId={}", old.id)).await;
    assert_eq!((csv.status.as_u16(), csv.header("content-type")), (200, Some("text/csv; charset=utf-8")));
    let before = all_licenses(&owner, &old).await;
    assert_eq!(before.len(), 4);
    // The same file changes nothing while its licences are there.
    let (_, end) = report(&import(&owner, &old, &csv.text()).await);
    assert_eq!(end, json!({"lines": 4, "created": 0, "existing": 4, "failed": 0}));

    owner.delete(&format!("/products/{}", old.id)).await.gives(204);
    let moved = csv.text().replace(&old.id, &new.id);
    eventually("the keys are free, and taken again", || async {
        let (_, end) = report(&import(&owner, &new, &moved).await);
        (end["failed"] == 0).then_some(())
    })
    .await;
    let kept = |licenses: &[Value]| -> BTreeMap<String, Vec<Value>> {
        let names = ["email", "maxActivations", "expiresAt", "metadata", "status", "clientId"];
        let one = |license: &Value| (text(license, "/key"), names.map(|name| license[name].clone()).to_vec());
        licenses.iter().map(one).collect()
    };
    assert_eq!(kept(&all_licenses(&owner, &new).await), kept(&before));
}

async fn an_export_is_what_the_filters_leave(install: Installation) {
    let owner = install.register().await;
    let (product, other) = (owner.create_product("App").await, owner.create_product("Other").await);
    let licenses: Vec<Value> =
        (0..450).map(|n| json!({"productId": product.id, "email": format!("c{n}@example.com")})).collect();
    owner.post("/licenses/batch", json!({"licenses": licenses})).await.gives(201);
    let elsewhere = owner.issue(&other, json!({"email": "c7@example.com"})).await;
    owner.revoke(&elsewhere).await.gives(200);
    let export = async |query: &str| lines(&owner.get(&format!("/licenses/export?format=ndjson{query}")).await);
    let all = export("").await;
    assert_eq!(all.len(), 451);
    let ids: Vec<String> = all.iter().map(|license| text(license, "/id")).collect();
    assert!(ids.is_sorted_by(|one, next| one > next), "newest first, each once");
    assert_eq!(export(&format!("&productId={}", product.id)).await.len(), 450);
    assert_eq!(export("&email=c7@example.com").await.len(), 2);
    let revoked = export("&status=revoked").await;
    assert_eq!((revoked.len(), &revoked[0]["id"]), (1, &json!(elsewhere.id)));
    assert_eq!(export(&format!("&query={}", elsewhere.key)).await.len(), 1);
    // As the API shows it.
    let shown = owner.get(&format!("/licenses/{}", elsewhere.id)).await;
    let mut shown = shown.gives(200).clone();
    shown.as_object_mut().unwrap().remove("activations");
    assert_eq!(revoked[0], shown);
    for format in ["", "&format=xml", "&format=csv&format=csv"] {
        owner.get(&format!("/licenses/export?{format}")).await.refused(Reason::ValidationFailed);
    }
    let csv = owner.get("/licenses/export?format=csv").await;
    assert_eq!(csv.text().lines().count(), 452, "a line of names, and one each");
}
