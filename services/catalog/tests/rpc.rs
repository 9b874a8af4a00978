//! Products as their callers meet them, on both engines.

mod common;

use common::{START_MS, World, mask, named, owner, price, reason, refused};
use paperkey_kit::{
    db::Database,
    store_suite,
    values::{struct_of, timestamp},
};
use paperkey_proto::{
    catalog::v1::{
        CreateProductRequest, CreateProductResponse, DeleteProductRequest, GetProductRequest, ListProductsRequest,
        Product, UpdateProductRequest, catalog_service_client::CatalogServiceClient,
    },
    errors::v1::Reason,
    options::v1::{Caller as Kind, Scope},
    principal::v1::{Mode, Principal},
};
use sea_orm::ConnectionTrait as _;
use serde_json::json;
use tokio::task::JoinSet;

store_suite! {
    paperkey_migrations::catalog::Migrator;
    a_product_is_created_with_its_first_key_pair,
    no_product_without_its_keys,
    of_two_processes_that_make_the_same_product_one_makes_it,
    a_product_that_nobody_completed_is_taken_back_with_its_keys,
    a_creation_that_was_taken_back_in_between_makes_no_product,
    what_a_product_cannot_be_is_refused_by_name,
    a_patch_sets_clears_merges_and_leaves,
    what_cannot_be_cleared_is_not,
    merges_of_metadata_follow_each_other,
    products_are_listed_newest_first_and_in_pages,
    a_deleted_product_is_gone_and_all_keepers_are_told,
    deleting_twice_at_once_is_told_once,
    another_team_or_mode_meets_only_absence,
    a_process_reads_for_the_tenant_that_it_names_and_keys_of_products_do_not_get_in,
}

async fn a_product_is_created_with_its_first_key_pair(database: Database) {
    let world = World::new(database);
    let request = CreateProductRequest {
        description: Some("Edits".into()),
        sku: Some("E-1".into()),
        price: Some(price(4_900, "EUR")),
        unit: Some("seat".into()),
        metadata: struct_of(&json!({"a": [1, null, {"b": "ü\u{0}"}]})),
        ..named("Editor")
    };
    let answer: CreateProductResponse = world.by(owner()).create_product(request.clone()).await.unwrap().into_inner();
    let (product, pair) = (answer.product.unwrap(), answer.api_key.unwrap());
    assert!(product.id.starts_with("prod_"));
    assert_eq!(pair.secret_key, "sk_secret");
    assert_eq!(pair.api_key.unwrap().id, format!("key_of_{}", product.id));
    let expected = Product {
        id: product.id.clone(),
        name: "Editor".into(),
        description: request.description,
        sku: request.sku,
        price: request.price,
        unit: request.unit,
        active: true,
        metadata: request.metadata,
        created_at: Some(timestamp(START_MS)),
        updated_at: Some(timestamp(START_MS)),
    };
    assert_eq!(product, expected);
    assert_eq!(world.get(&product.id).await.unwrap(), expected);
    let idle = world.create(CreateProductRequest { active: Some(false), ..named("Idle") }).await;
    assert_eq!((idle.active, idle.price, idle.metadata), (false, None, None));
    assert_eq!(world.count("SELECT COUNT(*) AS n FROM audit_entries").await, 2);
    world.end().await;
}

async fn no_product_without_its_keys(database: Database) {
    let mut world = World::new(database);
    let unlucky = Principal { team_id: "team_unlucky".into(), ..owner() };
    assert_eq!(reason(world.by(unlucky).create_product(named("Editor")).await), Reason::Unavailable);
    assert_eq!(world.count("SELECT COUNT(*) AS n FROM products").await, 0);
    assert_eq!(world.count("SELECT COUNT(*) AS n FROM drafts").await, 0);
    // Nobody knows whether the keys were made: auth is told that there is no such product, and the others are not.
    let (keeper, event) = world.events.recv().await.unwrap();
    assert_eq!((keeper, event.topic.as_str(), event.team_id.as_str()), ("auth", "product.deleted", "team_unlucky"));
    assert!(event.product_id.starts_with("prod_"));
    assert!(world.events.try_recv().is_err());
    world.end().await;
}

async fn of_two_processes_that_make_the_same_product_one_makes_it(database: Database) {
    let (mut one, other) = (World::new(database.clone()), World::new(database));
    for number in 1..=5 {
        let create = |world: &World| {
            let mut client = CatalogServiceClient::new(world.way_of_once(owner(), number));
            async move { client.create_product(named("Editor")).await.unwrap().into_inner() }
        };
        let (first, second) = tokio::join!(create(&one), create(&other));
        assert_eq!(first, second, "the keys included");
        assert_eq!(create(&one).await, first);
        assert_eq!(one.count("SELECT COUNT(*) AS n FROM products").await, i64::from(number));
        // Whoever lost has taken back what it had begun.
        assert_eq!(one.count("SELECT COUNT(*) AS n FROM drafts").await, 0);
    }
    while let Ok((keeper, event)) = one.events.try_recv() {
        assert_eq!((keeper, event.topic.as_str()), ("auth", "product.deleted"));
        let kept = one.get(&event.product_id).await;
        assert_eq!(reason(kept), Reason::NotFound);
    }
    one.end().await;
    other.end().await;
}

async fn draft(database: &Database, id: &'static str, created_at_ms: i64) {
    let written = database.write(move |tx| async move {
        let text = format!("INSERT INTO drafts VALUES ('{id}', 'team_1', 'test', {created_at_ms})");
        tx.execute_unprepared(&text).await?;
        Ok::<_, paperkey_kit::db::DbError>(())
    });
    written.await.unwrap();
}

async fn a_product_that_nobody_completed_is_taken_back_with_its_keys(database: Database) {
    // As a process leaves them that ends in between.
    draft(&database, "prod_old", START_MS - 60_001).await;
    draft(&database, "prod_new", START_MS - 60_000).await;
    let mut world = World::new(database);
    let (keeper, event) = world.events.recv().await.unwrap();
    assert_eq!((keeper, event.topic.as_str(), event.product_id.as_str()), ("auth", "product.deleted", "prod_old"));
    assert_eq!((event.team_id.as_str(), event.mode()), ("team_1", Mode::Test));
    assert_eq!(world.count("SELECT COUNT(*) AS n FROM drafts WHERE id = 'prod_new'").await, 1);
    assert_eq!(world.count("SELECT COUNT(*) AS n FROM drafts").await, 1);
    world.end().await;
}

async fn a_creation_that_was_taken_back_in_between_makes_no_product(database: Database) {
    let mut world = World::new(database);
    // Auth is so slow with this team that the sweep comes first.
    let slow = Principal { team_id: "team_slow".into(), ..owner() };
    assert_eq!(reason(world.by(slow).create_product(named("Editor")).await), Reason::Unavailable);
    assert_eq!(world.count("SELECT COUNT(*) AS n FROM products").await, 0);
    assert_eq!(world.count("SELECT COUNT(*) AS n FROM audit_entries").await, 0);
    assert!(world.events.try_recv().is_err(), "who took it back has told it");
    world.end().await;
}

async fn what_a_product_cannot_be_is_refused_by_name(database: Database) {
    let world = World::new(database);
    for (request, field) in [
        (named(""), "name"),
        (named("  "), "name"),
        (named("a\0b"), "name"),
        (named(&"x".repeat(101)), "name"),
        (CreateProductRequest { price: Some(price(-1, "EUR")), ..named("a") }, "price.amount"),
        (CreateProductRequest { price: Some(price(1, "eur")), ..named("a") }, "price.currency"),
        (CreateProductRequest { price: Some(price(1, "E1R")), ..named("a") }, "price.currency"),
        (CreateProductRequest { price: Some(price(1, "EURO")), ..named("a") }, "price.currency"),
        (CreateProductRequest { price: Some(price(1, "")), ..named("a") }, "price.currency"),
        (CreateProductRequest { unit: Some("x".repeat(51)), ..named("a") }, "unit"),
        (CreateProductRequest { metadata: struct_of(&json!({"a": "x".repeat(20_000)})), ..named("a") }, "metadata"),
    ] {
        let refusal = refused(world.by(owner()).create_product(request).await);
        assert_eq!((refusal.reason(), refusal.violations()[0].field.as_str()), (Reason::ValidationFailed, field));
    }
    for id in ["prod_none", "'; DROP TABLE products --", "🦀"] {
        assert_eq!(reason(world.get(id).await), Reason::NotFound, "{id}");
    }
    assert_eq!(world.count("SELECT COUNT(*) AS n FROM products").await, 0);
    world.end().await;
}

async fn a_patch_sets_clears_merges_and_leaves(database: Database) {
    let world = World::new(database);
    let before = world
        .create(CreateProductRequest {
            description: Some("Edits".into()),
            price: Some(price(1, "EUR")),
            metadata: struct_of(&json!({"a": 1, "b": {"c": 2}})),
            ..named("Editor")
        })
        .await;
    world.hand.advance_ms(5);
    let after = world
        .update(UpdateProductRequest {
            id: before.id.clone(),
            sku: Some("E-1".into()),
            active: Some(false),
            metadata: struct_of(&json!({"a": null, "b": {"d": 3}})),
            update_mask: Some(mask(&["id", "description", "sku", "price", "active", "metadata"])),
            ..UpdateProductRequest::default()
        })
        .await;
    let expected = Product {
        description: None,
        price: None,
        sku: Some("E-1".into()),
        active: false,
        metadata: struct_of(&json!({"b": {"c": 2, "d": 3}})),
        updated_at: Some(timestamp(START_MS + 5)),
        ..before
    };
    assert_eq!(after, expected);
    assert_eq!(world.get(&after.id).await.unwrap(), expected);

    world.hand.advance_ms(5);
    let nothing = UpdateProductRequest { id: after.id.clone(), update_mask: Some(mask(&[])), ..Default::default() };
    assert_eq!(world.update(nothing).await, expected, "nothing named, nothing changed");
    let cleared =
        UpdateProductRequest { id: after.id.clone(), update_mask: Some(mask(&["metadata"])), ..Default::default() };
    assert_eq!(world.update(cleared).await.metadata, None);
    let unmasked = UpdateProductRequest { id: after.id, name: Some("Pro".into()), ..Default::default() };
    assert_eq!(world.update(unmasked).await.name, "Pro");
    world.end().await;
}

async fn what_cannot_be_cleared_is_not(database: Database) {
    let world = World::new(database);
    let product = world.create(named("Editor")).await;
    for (paths, field) in [(["name"], "name"), (["active"], "active"), (["created_at"], "created_at")] {
        let request =
            UpdateProductRequest { id: product.id.clone(), update_mask: Some(mask(&paths)), ..Default::default() };
        let refusal = refused(world.by(owner()).update_product(request).await);
        assert_eq!((refusal.reason(), refusal.violations()[0].field.as_str()), (Reason::ValidationFailed, field));
    }
    let foreign = UpdateProductRequest { id: product.id.clone(), price: Some(price(1, "e€")), ..Default::default() };
    assert_eq!(reason(world.by(owner()).update_product(foreign).await), Reason::ValidationFailed);
    assert_eq!(world.get(&product.id).await.unwrap(), product);
    world.end().await;
}

async fn merges_of_metadata_follow_each_other(database: Database) {
    let world = World::new(database);
    let product = world.create(named("Editor")).await;
    let mut calls = JoinSet::new();
    for number in 0..20 {
        let mut client = world.by(owner());
        let metadata = struct_of(&json!({format!("m{number}"): number}));
        let request = UpdateProductRequest { id: product.id.clone(), metadata, ..Default::default() };
        calls.spawn(async move { client.update_product(request).await.map(drop) });
    }
    assert!(calls.join_all().await.iter().all(Result::is_ok));
    assert_eq!(world.get(&product.id).await.unwrap().metadata.unwrap().fields.len(), 20);
    world.end().await;
}

async fn products_are_listed_newest_first_and_in_pages(database: Database) {
    let world = World::new(database);
    for name in ["a", "b", "c", "d", "e"] {
        world.hand.advance_ms(1);
        world.create(named(name)).await;
    }
    let mut pages = Vec::new();
    let mut page_token = String::new();
    loop {
        let request = ListProductsRequest { page_size: Some(2), page_token };
        let answer = world.by(owner()).list_products(request).await.unwrap().into_inner();
        pages.push(answer.products.into_iter().map(|product| product.name).collect::<String>());
        let Some(next) = answer.next_page_token else { break };
        page_token = next;
    }
    assert_eq!(pages, ["ed", "cb", "a"]);
    for (page_size, page_token) in [(Some(0), ""), (Some(-3), ""), (None, "nonsense!")] {
        let request = ListProductsRequest { page_size, page_token: page_token.into() };
        assert_eq!(reason(world.by(owner()).list_products(request).await), Reason::ValidationFailed);
    }
    world.end().await;
}

async fn a_deleted_product_is_gone_and_all_keepers_are_told(database: Database) {
    let mut world = World::new(database);
    let product = world.create(named("Editor")).await;
    let delete = DeleteProductRequest { id: product.id.clone() };
    world.by(owner()).delete_product(delete.clone()).await.unwrap();
    assert_eq!(reason(world.get(&product.id).await), Reason::NotFound);
    assert_eq!(reason(world.by(owner()).delete_product(delete).await), Reason::NotFound);
    let mut told = Vec::new();
    for _ in 0..3 {
        let (keeper, event) = world.events.recv().await.unwrap();
        assert_eq!((event.topic.as_str(), event.product_id.as_str()), ("product.deleted", product.id.as_str()));
        assert_eq!((event.team_id.as_str(), event.mode()), ("team_1", Mode::Live));
        told.push(keeper);
    }
    told.sort_unstable();
    assert_eq!(told, ["auth", "licensing", "webhook"]);
    world.end().await;
}

async fn deleting_twice_at_once_is_told_once(database: Database) {
    let mut world = World::new(database);
    let product = world.create(named("Editor")).await;
    let mut calls = JoinSet::new();
    for _ in 0..10 {
        let (mut client, id) = (world.by(owner()), product.id.clone());
        calls.spawn(async move { client.delete_product(DeleteProductRequest { id }).await.is_ok() });
    }
    assert_eq!(calls.join_all().await.into_iter().filter(|deleted| *deleted).count(), 1);
    for _ in 0..3 {
        world.events.recv().await.unwrap();
    }
    assert_eq!(world.count("SELECT COUNT(*) AS n FROM audit_entries").await, 2);
    assert!(world.events.try_recv().is_err());
    world.end().await;
}

async fn another_team_or_mode_meets_only_absence(database: Database) {
    let world = World::new(database);
    let product = world.create(named("Editor")).await;
    let id = || product.id.clone();
    let strangers =
        [Principal { team_id: "team_2".into(), ..owner() }, Principal { mode: Mode::Test.into(), ..owner() }];
    for stranger in strangers {
        let mut client = world.by(stranger);
        let update = UpdateProductRequest { id: id(), name: Some("Mine".into()), ..Default::default() };
        let reasons = [
            reason(client.get_product(GetProductRequest { id: id() }).await),
            reason(client.update_product(update).await),
            reason(client.delete_product(DeleteProductRequest { id: id() }).await),
        ];
        assert_eq!(reasons, [Reason::NotFound; 3]);
        let listed = client.list_products(ListProductsRequest::default()).await.unwrap().into_inner();
        assert!(listed.products.is_empty());
    }
    let nobody = Principal { team_id: String::new(), ..owner() };
    assert_eq!(reason(world.by(nobody).list_products(ListProductsRequest::default()).await), Reason::NotFound);
    assert_eq!(world.get(&product.id).await.unwrap(), product);
    world.end().await;
}

async fn a_process_reads_for_the_tenant_that_it_names_and_keys_of_products_do_not_get_in(database: Database) {
    let world = World::new(database);
    let product = world.create(named("Editor")).await;
    let process = |team: &str| Principal {
        kind: Kind::Service.into(),
        id: "licensing".into(),
        team_id: team.into(),
        mode: Mode::Live.into(),
        ..Principal::default()
    };
    let get = GetProductRequest { id: product.id.clone() };
    let read = world.by(process("team_1")).get_product(get.clone()).await.unwrap().into_inner();
    assert_eq!(read.product, Some(product.clone()));
    assert_eq!(reason(world.by(process("team_2")).get_product(get.clone()).await), Reason::NotFound);
    let delete = DeleteProductRequest { id: product.id.clone() };
    assert_eq!(reason(world.by(process("team_1")).delete_product(delete).await), Reason::ScopeInsufficient);
    let secret_key = Principal {
        kind: Kind::ProductSecretKey.into(),
        product_id: product.id,
        scopes: vec![Scope::ProductsRead.into()],
        ..owner()
    };
    assert_eq!(reason(world.by(secret_key).get_product(get).await), Reason::ScopeInsufficient);
    world.end().await;
}
