//! Clients as their callers meet them, and the end of a team, on both engines.

mod common;

use std::collections::BTreeSet;

use common::{START_MS, World, mask, named, owner, reason, refused};
use paperkey_kit::{
    db::{Database, DbError},
    store_suite,
    values::{struct_of, timestamp},
};
use paperkey_proto::{
    Contract,
    catalog::v1::{
        Client, CreateClientRequest, CreateProductRequest, DeleteClientRequest, DeleteProductRequest, GetClientRequest,
        GetProductRequest, ListClientsRequest, ListProductsRequest, UpdateClientRequest, UpdateProductRequest,
    },
    errors::v1::Reason,
    events::v1::Event,
    options::v1::{Caller as Kind, Scope},
    principal::v1::{Mode, Principal, Role},
};
use sea_orm::ConnectionTrait as _;
use serde_json::{Value, json};
use tokio::task::JoinSet;

store_suite! {
    paperkey_migrations::catalog::Migrator;
    a_client_is_created_and_read,
    what_a_client_cannot_be_is_refused_by_name,
    a_patch_sets_clears_merges_and_leaves,
    merges_of_metadata_follow_each_other,
    clients_are_listed_newest_first_in_pages_and_by_email,
    a_deleted_client_is_gone_and_licensing_is_told_once,
    neither_world_sees_the_other_by_any_method,
    roles_and_scopes_decide_and_keys_of_products_do_not_get_in,
    a_deleted_team_takes_its_catalogue_with_it_and_no_others,
    a_large_catalogue_goes_in_parts,
}

fn client(name: &str) -> CreateClientRequest {
    CreateClientRequest { name: name.into(), ..CreateClientRequest::default() }
}

fn email(address: &str) -> CreateClientRequest {
    CreateClientRequest { email: Some(address.into()), ..client("Ada") }
}

async fn a_client_is_created_and_read(database: Database) {
    let world = World::new(database);
    let request = CreateClientRequest {
        email: Some("Ada@Example.com".into()),
        company: Some("Engines Ltd".into()),
        metadata: struct_of(&json!({"a": [1, null, {"b": "ü\u{0}"}]})),
        ..client("Ada")
    };
    let created = world.create_client(request.clone()).await;
    assert!(created.id.starts_with("cli_"));
    let expected = Client {
        id: created.id.clone(),
        name: "Ada".into(),
        email: request.email,
        company: request.company,
        metadata: request.metadata,
        created_at: Some(timestamp(START_MS)),
        updated_at: Some(timestamp(START_MS)),
    };
    assert_eq!(created, expected);
    assert_eq!(world.get_client(&created.id).await.unwrap(), expected);
    let bare = world.create_client(client("Bob")).await;
    assert_eq!((bare.email, bare.company, bare.metadata), (None, None, None));
    assert_eq!(world.count("SELECT COUNT(*) AS n FROM audit_entries").await, 2);
    world.end().await;
}

async fn what_a_client_cannot_be_is_refused_by_name(database: Database) {
    let world = World::new(database);
    for (request, field) in [
        (client(""), "name"),
        (client(" \t"), "name"),
        (client("a\0b"), "name"),
        (client(&"x".repeat(201)), "name"),
        (email(""), "email"),
        (email("nobody"), "email"),
        (email(&format!("{}@example.com", "x".repeat(250))), "email"),
        (CreateClientRequest { company: Some("x".repeat(201)), ..client("a") }, "company"),
        (CreateClientRequest { metadata: struct_of(&json!({"a": "x".repeat(20_000)})), ..client("a") }, "metadata"),
    ] {
        let refusal = refused(world.clients(owner()).create_client(request).await);
        assert_eq!((refusal.reason(), refusal.violations()[0].field.as_str()), (Reason::ValidationFailed, field));
    }
    for id in ["cli_none", "'; DROP TABLE clients --", "🦀"] {
        assert_eq!(reason(world.get_client(id).await), Reason::NotFound, "{id}");
        let delete = DeleteClientRequest { id: id.into() };
        assert_eq!(reason(world.clients(owner()).delete_client(delete).await), Reason::NotFound, "{id}");
    }
    assert_eq!(world.count("SELECT COUNT(*) AS n FROM clients").await, 0);
    world.end().await;
}

async fn a_patch_sets_clears_merges_and_leaves(database: Database) {
    let world = World::new(database);
    let before = world
        .create_client(CreateClientRequest {
            company: Some("Engines Ltd".into()),
            metadata: struct_of(&json!({"a": 1, "b": {"c": 2}})),
            ..email("ada@example.com")
        })
        .await;
    let update = async |request: UpdateClientRequest| {
        let request = UpdateClientRequest { id: before.id.clone(), ..request };
        world.clients(owner()).update_client(request).await.map(|answer| answer.into_inner().client.unwrap())
    };
    world.hand.advance_ms(5);
    let after = update(UpdateClientRequest {
        email: Some("Countess@Example.com".into()),
        metadata: struct_of(&json!({"a": null, "b": {"d": 3}})),
        update_mask: Some(mask(&["id", "email", "company", "metadata"])),
        ..UpdateClientRequest::default()
    })
    .await
    .unwrap();
    let expected = Client {
        email: Some("Countess@Example.com".into()),
        company: None,
        metadata: struct_of(&json!({"b": {"c": 2, "d": 3}})),
        updated_at: Some(timestamp(START_MS + 5)),
        ..before.clone()
    };
    assert_eq!(after, expected);
    world.hand.advance_ms(5);
    let nothing = UpdateClientRequest { update_mask: Some(mask(&[])), ..UpdateClientRequest::default() };
    assert_eq!(update(nothing).await.unwrap(), expected, "nothing named, nothing changed");
    let cleared = UpdateClientRequest { update_mask: Some(mask(&["email", "metadata"])), ..Default::default() };
    let cleared = update(cleared).await.unwrap();
    assert_eq!((cleared.email, cleared.metadata), (None, None));
    assert_eq!(world.count("SELECT COUNT(*) AS n FROM clients WHERE email_lower IS NULL").await, 1);

    for (path, field) in [("name", "name"), ("created_at", "created_at"), ("team_id", "team_id")] {
        let request = UpdateClientRequest { update_mask: Some(mask(&[path])), ..UpdateClientRequest::default() };
        assert_eq!(refused(update(request).await).violations()[0].field, field);
    }
    let blank = UpdateClientRequest { name: Some(" ".into()), ..UpdateClientRequest::default() };
    assert_eq!(refused(update(blank).await).violations()[0].field, "name");
    world.end().await;
}

async fn merges_of_metadata_follow_each_other(database: Database) {
    let world = World::new(database);
    let created = world.create_client(client("Ada")).await;
    let mut calls = JoinSet::new();
    for number in 0..20 {
        let mut clients = world.clients(owner());
        let metadata = struct_of(&json!({format!("m{number}"): number}));
        let request = UpdateClientRequest { id: created.id.clone(), metadata, ..Default::default() };
        calls.spawn(async move { clients.update_client(request).await.map(drop) });
    }
    assert!(calls.join_all().await.iter().all(Result::is_ok));
    assert_eq!(world.get_client(&created.id).await.unwrap().metadata.unwrap().fields.len(), 20);
    world.end().await;
}

async fn clients_are_listed_newest_first_in_pages_and_by_email(database: Database) {
    let world = World::new(database);
    for (name, address) in [
        ("a", Some("Ada@Example.com")),
        ("b", None),
        ("c", Some("ADA@example.com")),
        ("d", Some("ada@example.org")),
        ("e", Some("ada@example.com")),
    ] {
        world.hand.advance_ms(1);
        world.create_client(CreateClientRequest { email: address.map(Into::into), ..client(name) }).await;
    }
    let pages = async |email: Option<&str>| {
        let (mut pages, mut page_token) = (Vec::new(), String::new());
        loop {
            let request = ListClientsRequest { email: email.map(Into::into), page_size: Some(2), page_token };
            let answer = world.clients(owner()).list_clients(request).await.unwrap().into_inner();
            pages.push(answer.clients.into_iter().map(|client| client.name).collect::<String>());
            let Some(next) = answer.next_page_token else { return pages };
            page_token = next;
        }
    };
    assert_eq!(pages(None).await, ["ed", "cb", "a"]);
    assert_eq!(pages(Some("aDA@example.COM")).await, ["ec", "a"]);
    assert_eq!(pages(Some("ada@")).await, [""], "a part of an address is none");
    assert_eq!(pages(Some("%")).await, [""]);
    for (page_size, page_token) in [(Some(0), ""), (Some(-3), ""), (None, "nonsense!")] {
        let request = ListClientsRequest { email: None, page_size, page_token: page_token.into() };
        assert_eq!(reason(world.clients(owner()).list_clients(request).await), Reason::ValidationFailed);
    }
    world.end().await;
}

async fn a_deleted_client_is_gone_and_licensing_is_told_once(database: Database) {
    let mut world = World::new(database);
    let created = world.create_client(client("Ada")).await;
    let mut calls = JoinSet::new();
    for _ in 0..10 {
        let (mut clients, id) = (world.clients(owner()), created.id.clone());
        calls.spawn(async move { clients.delete_client(DeleteClientRequest { id }).await.is_ok() });
    }
    assert_eq!(calls.join_all().await.into_iter().filter(|deleted| *deleted).count(), 1);
    assert_eq!(reason(world.get_client(&created.id).await), Reason::NotFound);
    let (keeper, event) = world.events.recv().await.unwrap();
    assert_eq!((keeper, event.topic.as_str(), event.product_id.as_str()), ("licensing", "client.deleted", ""));
    assert_eq!((event.team_id.as_str(), event.mode()), ("team_1", Mode::Live));
    let data: Value = serde_json::from_str(&event.data_json).unwrap();
    assert_eq!(data, json!({"id": created.id}));
    assert_eq!(world.count("SELECT COUNT(*) AS n FROM audit_entries").await, 2);
    assert!(world.events.try_recv().is_err());
    world.end().await;
}

/// Live and test, and two teams: what is in one is not there for the others, whatever the method.
async fn neither_world_sees_the_other_by_any_method(database: Database) {
    let mut world = World::new(database);
    let of = |team: &str, mode: Mode| Principal { team_id: team.into(), mode: mode.into(), ..owner() };
    for (own, others) in [
        (of("team_1", Mode::Live), [of("team_1", Mode::Test), of("team_2", Mode::Live)]),
        (of("team_1", Mode::Test), [of("team_1", Mode::Live), of("team_2", Mode::Test)]),
    ] {
        let made = world.clients(own.clone()).create_client(email("ada@example.com")).await.unwrap();
        let made = made.into_inner().client.unwrap();
        let product = world.by(own.clone()).create_product(named("Editor")).await.unwrap();
        let product = product.into_inner().product.unwrap();
        for other in others {
            let (mut clients, mut products) = (world.clients(other.clone()), world.by(other));
            let mut asked = BTreeSet::new();
            let mut absent = |method: &'static str, reason: Reason| {
                assert_eq!(reason, Reason::NotFound, "{method}");
                asked.insert(method);
            };
            let id = || made.id.clone();
            absent("GetClient", reason(clients.get_client(GetClientRequest { id: id() }).await));
            let update = UpdateClientRequest { id: id(), name: Some("Mine".into()), ..Default::default() };
            absent("UpdateClient", reason(clients.update_client(update).await));
            absent("DeleteClient", reason(clients.delete_client(DeleteClientRequest { id: id() }).await));
            let id = || product.id.clone();
            absent("GetProduct", reason(products.get_product(GetProductRequest { id: id() }).await));
            let update = UpdateProductRequest { id: id(), name: Some("Mine".into()), ..Default::default() };
            absent("UpdateProduct", reason(products.update_product(update).await));
            absent("DeleteProduct", reason(products.delete_product(DeleteProductRequest { id: id() }).await));
            for email in [None, Some("ada@example.com".to_owned())] {
                let list = ListClientsRequest { email, ..ListClientsRequest::default() };
                let listed = clients.list_clients(list).await.unwrap().into_inner().clients;
                assert!(listed.iter().all(|client| client.id != made.id));
            }
            let listed = products.list_products(ListProductsRequest::default()).await.unwrap().into_inner().products;
            assert!(listed.iter().all(|listed| listed.id != product.id));
            asked.extend(["ListClients", "ListProducts", "CreateClient", "CreateProduct"]);
            let methods = Contract::get().methods().iter().filter_map(|method| {
                let path = method.path.strip_prefix("/paperkey.catalog.v1.")?;
                Some(path.split_once('/').unwrap().1)
            });
            assert_eq!(asked, methods.collect(), "no method of the service is left out");
        }
        let kept = world.clients(own.clone()).get_client(GetClientRequest { id: made.id.clone() }).await.unwrap();
        assert_eq!(kept.into_inner().client, Some(made));
        let kept = world.by(own).get_product(GetProductRequest { id: product.id.clone() }).await.unwrap();
        assert_eq!(kept.into_inner().product, Some(product));
    }
    let nobody = Principal { team_id: String::new(), ..owner() };
    assert_eq!(reason(world.clients(nobody).list_clients(ListClientsRequest::default()).await), Reason::NotFound);
    assert!(world.events.try_recv().is_err());
    world.end().await;
}

async fn roles_and_scopes_decide_and_keys_of_products_do_not_get_in(database: Database) {
    let world = World::new(database);
    let made = world.create_client(client("Ada")).await;
    let get = || GetClientRequest { id: made.id.clone() };
    let member = Principal { role: Role::Member.into(), ..owner() };
    assert!(world.clients(member.clone()).get_client(get()).await.is_ok());
    assert_eq!(reason(world.clients(member).create_client(client("Bob")).await), Reason::RoleInsufficient);
    let key = |kind: Kind, scopes: &[Scope]| Principal {
        kind: kind.into(),
        role: Role::Unspecified.into(),
        scopes: scopes.iter().map(|scope| (*scope).into()).collect(),
        ..owner()
    };
    let reads = key(Kind::TeamKey, &[Scope::ClientsRead]);
    assert!(world.clients(reads.clone()).get_client(get()).await.is_ok());
    assert_eq!(reason(world.clients(reads).create_client(client("Bob")).await), Reason::ScopeInsufficient);
    // The system key acts in a team that its call names, and nowhere without one.
    let system = key(Kind::SystemKey, &[Scope::ClientsRead, Scope::ClientsWrite]);
    assert!(world.clients(system.clone()).create_client(client("Bob")).await.is_ok());
    let nowhere = Principal { team_id: String::new(), mode: Mode::Unspecified.into(), ..system };
    assert_eq!(reason(world.clients(nowhere).get_client(get()).await), Reason::ValidationFailed);
    let of_product = key(Kind::ProductSecretKey, &[Scope::ClientsRead]);
    assert_eq!(reason(world.clients(of_product).get_client(get()).await), Reason::ScopeInsufficient);
    let process = key(Kind::Service, &[]);
    assert!(world.clients(process.clone()).get_client(get()).await.is_ok());
    let delete = DeleteClientRequest { id: made.id.clone() };
    assert_eq!(reason(world.clients(process).delete_client(delete).await), Reason::ScopeInsufficient);
    world.end().await;
}

fn team_deleted(team: &str) -> Event {
    Event {
        id: "evt_1".into(),
        topic: "team.deleted".into(),
        team_id: team.into(),
        mode: Mode::Live.into(),
        data_json: "{}".into(),
        ..Event::default()
    }
}

async fn a_deleted_team_takes_its_catalogue_with_it_and_no_others(database: Database) {
    let mut world = World::new(database);
    for team in ["team_1", "team_2"] {
        for mode in [Mode::Live, Mode::Test] {
            let owner = Principal { team_id: team.into(), mode: mode.into(), ..owner() };
            world.clients(owner.clone()).create_client(client("Ada")).await.unwrap();
            world.by(owner).create_product(CreateProductRequest::clone(&named("Editor"))).await.unwrap();
        }
    }
    // What is not for it, and what makes no sense, holds up nothing.
    let other = Event { topic: "license.created".into(), ..team_deleted("team_2") };
    world.ingest(vec![other, team_deleted(""), team_deleted("a'b"), team_deleted("team_1")]).await;
    for table in ["products", "clients"] {
        for (team, left) in [("team_1", 0), ("team_2", 2)] {
            let sql = format!("SELECT COUNT(*) AS n FROM {table} WHERE team_id = '{team}'");
            assert_eq!(world.count(sql.leak()).await, left, "{table} of {team}");
        }
    }
    let entries = "SELECT COUNT(*) AS n FROM audit_entries";
    let recorded = world.count(entries).await;
    world.ingest(vec![team_deleted("team_1")]).await;
    assert_eq!(world.count(entries).await, recorded, "the second time there is nothing to do");
    assert!(world.events.try_recv().is_err(), "those who keep something are told of the team");
    world.end().await;
}

async fn a_large_catalogue_goes_in_parts(database: Database) {
    let world = World::new(database);
    let written = world.database.write(|tx| async move {
        for at in 0..1_201 {
            let text = format!(
                "INSERT INTO clients (id, team_id, mode, name, created_at_ms, updated_at_ms) \
                 VALUES ('cli_{at}', 'team_{}', 'live', 'x', 0, 0)",
                1 + at / 1_200
            );
            tx.execute_unprepared(&text).await?;
        }
        Ok::<_, DbError>(())
    });
    written.await.unwrap();
    world.ingest(vec![team_deleted("team_1")]).await;
    assert_eq!(world.count("SELECT COUNT(*) AS n FROM clients").await, 1);
    assert_eq!(world.count("SELECT COUNT(*) AS n FROM audit_entries").await, 1);
    world.end().await;
}
