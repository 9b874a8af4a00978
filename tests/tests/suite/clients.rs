//! Clients: the customers of a team, and the licences that name them.

use paperkey_proto::errors::v1::Reason;
use paperkey_tests::{Installation, License, eventually, on_both_kinds, people::text};
use serde_json::{Value, json};

on_both_kinds! {
    a_client_is_kept_from_its_creation_to_its_deletion,
    clients_are_listed_newest_first_and_found_by_email,
    what_a_client_cannot_be_is_refused_by_name,
    a_licence_names_a_client_and_loses_the_name_with_it,
    only_keys_of_the_team_reach_clients,
    a_live_key_and_a_test_key_each_see_their_own_world,
}

async fn a_client_is_kept_from_its_creation_to_its_deletion(install: Installation) {
    let team = install.register().await.integration();
    let body = json!({"name": "Ada", "email": "Ada@Example.com", "metadata": {"crm": {"id": 7}, "old": true}});
    let created = team.post("/api/v1/clients", body).await;
    let client = created.gives(201).clone();
    let path = format!("/api/v1/clients/{}", text(&client, "/id"));
    assert!(text(&client, "/id").starts_with("cli_"));
    assert_eq!(client["email"], "Ada@Example.com", "as it was written");
    assert_eq!((&client["company"], &client["created_at"]), (&Value::Null, &client["updated_at"]));
    assert_eq!(team.get(&path).await.gives(200), &client);

    let patch = json!({"company": "Engines Ltd", "email": null, "metadata": {"old": null, "crm": {"tier": "gold"}}});
    let patched = team.patch(&path, patch).await;
    let patched = patched.gives(200);
    assert_eq!(
        (&patched["name"], &patched["company"], &patched["email"]),
        (&json!("Ada"), &json!("Engines Ltd"), &Value::Null)
    );
    assert_eq!(patched["metadata"], json!({"crm": {"id": 7, "tier": "gold"}}));
    assert_eq!(team.get(&path).await.gives(200), patched);
    team.patch(&path, json!({"name": null})).await.refused_for("name");
    team.patch(&path, json!({"team_id": "team_1"})).await.refused_for("team_id");

    team.delete(&path).await.gives(204);
    for answer in [team.get(&path).await, team.patch(&path, json!({})).await, team.delete(&path).await] {
        answer.refused(Reason::NotFound);
    }
}

async fn clients_are_listed_newest_first_and_found_by_email(install: Installation) {
    let team = install.register().await.integration();
    for (name, email) in [("a", "Ada@Example.com"), ("b", "bob@example.com"), ("c", "ada@EXAMPLE.com")] {
        team.post("/api/v1/clients", json!({"name": name, "email": email})).await.gives(201);
    }
    let names = |json: &Value| -> String {
        json["clients"].as_array().unwrap().iter().map(|client| text(client, "/name")).collect()
    };
    let first = team.get("/api/v1/clients?page_size=2").await;
    assert_eq!(names(first.gives(200)), "cb");
    let next = text(&first.json, "/next_page_token");
    let second = team.get(&format!("/api/v1/clients?page_size=2&page_token={next}")).await;
    assert_eq!((names(second.gives(200)), &second.json["next_page_token"]), ("a".to_owned(), &Value::Null));
    assert_eq!(names(team.get("/api/v1/clients?email=ada%40example.com").await.gives(200)), "ca");
    assert_eq!(names(team.get("/api/v1/clients?email=nobody%40example.com").await.gives(200)), "");
    team.get("/api/v1/clients?page_size=0").await.refused_for("page_size");
}

async fn what_a_client_cannot_be_is_refused_by_name(install: Installation) {
    let team = install.register().await.integration();
    for (body, field) in [
        (json!({}), "name"),
        (json!({"name": "  "}), "name"),
        (json!({"name": "x".repeat(201)}), "name"),
        (json!({"name": "Ada", "email": "nobody"}), "email"),
        (json!({"name": "Ada", "company": "x".repeat(201)}), "company"),
        (json!({"name": "Ada", "metadata": {"a": "x".repeat(20_000)}}), "metadata"),
        (json!({"name": "Ada", "phone": "1"}), "phone"),
    ] {
        team.post("/api/v1/clients", body).await.refused_for(field);
    }
    assert_eq!(team.get("/api/v1/clients").await.gives(200)["clients"], json!([]));
}

async fn a_licence_names_a_client_and_loses_the_name_with_it(install: Installation) {
    let owner = install.register().await;
    let team = owner.integration();
    let product = owner.create_product("App").await;
    let client = text(team.post("/api/v1/clients", json!({"name": "Ada"})).await.gives(201), "/id");
    let foreign = install.register().await.integration();
    let foreign = text(foreign.post("/api/v1/clients", json!({"name": "Eve"})).await.gives(201), "/id");

    let named = owner.issue(&product, json!({"clientId": client})).await;
    let by_team = team.post("/api/v1/licenses", json!({"product_id": product.id, "client_id": client})).await;
    let by_team = License::of(by_team.gives(201));
    let unnamed = owner.issue(&product, json!({})).await;
    for stranger in [foreign.as_str(), "cli_00000000000000000000000000", "nonsense", ""] {
        let body = json!({"productId": product.id, "clientId": stranger});
        owner.post("/licenses", body).await.refused_for("clientId");
        owner.patch(&format!("/licenses/{}", unnamed.id), json!({"clientId": stranger})).await.refused_for("clientId");
        let body = json!({"product_id": product.id, "client_id": stranger});
        team.post("/api/v1/licenses", body).await.refused_for("client_id");
    }
    let of_client = format!("/licenses?clientId={client}");
    assert_eq!(owner.get(&of_client).await.gives(200)["licenses"].as_array().unwrap().len(), 2);

    team.delete(&format!("/api/v1/clients/{client}")).await.gives(204);
    owner.patch(&format!("/licenses/{}", unnamed.id), json!({"clientId": client})).await.refused_for("clientId");
    eventually("no licence names the client", || async {
        let listed = owner.get(&of_client).await;
        listed.gives(200)["licenses"].as_array().unwrap().is_empty().then_some(())
    })
    .await;
    for license in [&named, &by_team] {
        let kept = owner.get(&format!("/licenses/{}", license.id)).await;
        assert_eq!((&kept.gives(200)["clientId"], &kept.json["status"]), (&Value::Null, &json!("active")));
        assert_eq!(owner.app(&product).verdict(license).await, "valid");
    }
}

async fn only_keys_of_the_team_reach_clients(install: Installation) {
    let owner = install.register().await;
    let product = owner.create_product("App").await;
    let client = text(owner.integration().post("/api/v1/clients", json!({"name": "Ada"})).await.gives(201), "/id");
    let path = format!("/api/v1/clients/{client}");
    let api = install.api();
    api.with_key(&owner.free_key).get(&path).await.gives(200);
    for key in [&product.secret_key, &product.public_key, &owner.token] {
        api.with_key(key).get(&path).await.refused(Reason::InvalidCredentials);
    }
    let system = api.with_key(&install.system_key().await);
    system.get(&path).await.refused(Reason::ValidationFailed);
    assert_eq!(system.for_team(&owner.team_id).get(&path).await.gives(200)["name"], "Ada");
    system.for_team(&owner.team_id).in_test_mode().get(&path).await.refused(Reason::NotFound);
    install.register().await.integration().get(&path).await.refused(Reason::NotFound);
}

async fn a_live_key_and_a_test_key_each_see_their_own_world(install: Installation) {
    let owner = install.register().await;
    let (live, test) = (owner.integration(), owner.test_integration().await);
    for (own, other) in [(&live, &test), (&test, &live)] {
        let product = own.post("/api/v1/products", json!({"name": "App"})).await;
        let product = text(product.gives(201), "/id");
        let client = text(own.post("/api/v1/clients", json!({"name": "Ada"})).await.gives(201), "/id");
        let body = json!({"product_id": product, "client_id": client});
        let license = text(own.post("/api/v1/licenses", body.clone()).await.gives(201), "/id");
        let webhooks = format!("/api/v1/products/{product}/webhooks");
        let subscribed = json!({"url": "https://example.com/hook", "events": ["license.created"]});
        let webhook = text(own.post(&webhooks, subscribed).await.gives(201), "/id");
        // No header moves a key to another world.
        for other in [other.clone(), other.with("paperkey-mode", "live"), other.in_test_mode()] {
            for path in [
                format!("/api/v1/products/{product}"),
                format!("/api/v1/clients/{client}"),
                format!("/api/v1/licenses/{license}"),
                webhooks.clone(),
                format!("{webhooks}/{webhook}"),
            ] {
                other.get(&path).await.refused(Reason::NotFound);
            }
            other.post("/api/v1/licenses", body.clone()).await.refused(Reason::NotFound);
            for (list, id) in [("products", &product), ("clients", &client), ("licenses", &license)] {
                let listed = other.get(&format!("/api/v1/{list}")).await;
                listed.gives(200);
                assert!(!listed.text().contains(id.as_str()), "{list}");
            }
        }
    }
}
