//! Two teams, live and test: four worlds, of which none sees another. What is not yours does not exist.

use http::HeaderMap;
use paperkey_proto::{Contract, contract::Method, errors::v1::Reason, options::v1::Caller};
use paperkey_tests::{Account, Answer, Api, Installation, Product, Receiver, grpc, on_both_kinds, people::text};
use serde_json::json;
use tonic::transport::Channel;

use crate::samples::{World, body, is_of_team, list_clients};

on_both_kinds! {
    what_is_another_worlds_does_not_exist,
    a_call_names_its_team_and_mode_by_headers,
    a_product_key_works_in_the_mode_it_was_born_with,
}

/// Keys, members and teams themselves are no data of a mode.
const OF_NO_WORLD: [&str; 6] =
    ["AlertService", "ApiKeyService", "AuditLogService", "MemberService", "TeamService", "UsageService"];

/// The methods whose request names something of a world by its id.
fn naming_methods() -> impl Iterator<Item = &'static Method> {
    let names = |method: &Method| {
        let input = method.descriptor.input();
        input.fields().any(|field| matches!(field.name(), "id" | "license_key") || field.name().ends_with("_id"))
    };
    let of_a_world = |method: &Method| !OF_NO_WORLD.iter().any(|name| method.service.ends_with(&format!(".{name}")));
    let methods = Contract::get().methods().iter().map(AsRef::as_ref);
    methods.filter(move |method: &&Method| method.is_public() && of_a_world(method) && names(method))
}

/// Somebody who looks from outside at a world.
struct Stranger {
    name: &'static str,
    account: Account,
    product: Product,
    /// The clients of each kind of credential.
    clients: Vec<(Caller, Api)>,
    metadata: Vec<(&'static str, &'static str)>,
}

impl Stranger {
    async fn new(name: &'static str, account: Account, receiver: &Receiver, in_test_mode: bool) -> Self {
        // They have one of everything themselves: nothing is refused for want of a product.
        let own = World::of(account, receiver).await;
        let account = own.owner.clone();
        let mut clients = vec![
            (Caller::Account, (*account).clone()),
            (Caller::ProductSecretKey, account.server(&own.product)),
            (Caller::ProductPublicKey, account.app(&own.product).0),
        ];
        let metadata = if in_test_mode { vec![("paperkey-mode", "test")] } else { Vec::new() };
        if in_test_mode {
            clients.push((Caller::TeamKey, account.test_integration().await));
        } else {
            clients.push((Caller::TeamKey, account.integration()));
            clients.push((Caller::FreeKey, account.integration().with_key(&account.free_key)));
        }
        Self { name, account, product: own.product, clients, metadata }
    }

    /// Whether they are of the team whose other world this is.
    fn shares_the_team_of(&self, target: &World) -> bool {
        self.account.team_id == target.owner.team_id
    }

    fn headers(&self) -> HeaderMap {
        let mut headers = grpc::credential(&self.account.token);
        for (name, value) in &self.metadata {
            headers.insert(*name, value.parse().unwrap());
        }
        headers
    }
}

async fn what_is_another_worlds_does_not_exist(install: Installation) {
    let receiver = Receiver::start().await;
    let owner = install.register().await;
    let world = World::of(owner.clone(), &receiver).await;
    let test_world = World::of(owner.in_test_mode(), &receiver).await;
    let other = install.register().await;
    let strangers = [
        (&world, Stranger::new("another team, live", other.clone(), &receiver, false).await),
        (&world, Stranger::new("another team, test", other.in_test_mode(), &receiver, true).await),
        (&world, Stranger::new("the same team, test", owner.in_test_mode(), &receiver, true).await),
        (&test_world, Stranger::new("the same team, live", owner.clone(), &receiver, false).await),
        (&test_world, Stranger::new("another team, live", other.clone(), &receiver, false).await),
    ];
    let before = (world.everything().await, test_world.everything().await);
    let channel = grpc::connect(&install.url()).await;
    let mut asked = 0;
    for (target, stranger) in &strangers {
        for method in naming_methods() {
            asked += over_rest(target, stranger, method).await;
            // What is asked for beside an id is looked at first, and a list that is filtered by one is empty.
            let by_filter = ["ListLicenses", "ExportLicenses", "ImportLicenses"].contains(&method.descriptor.name());
            if method.serves(Caller::Account) && !by_filter {
                asked += over_grpc(&channel, target, stranger, method).await;
            }
        }
        lists_show_nothing(target, stranger).await;
        checks_find_nothing(target, stranger).await;
        many_are_made_for_nobody_else(target, stranger, &stranger.product).await;
    }
    assert!(asked > 200, "the contract names things: {asked} calls");
    let after = (world.everything().await, test_world.everything().await);
    assert_eq!(before, after, "nobody has changed anything from outside");
}

async fn over_grpc(channel: &Channel, target: &World, stranger: &Stranger, method: &Method) -> usize {
    let input = method.descriptor.input();
    let mut asked = 0;
    for of_team in [false, true] {
        if of_team && input.get_field_by_name("team_id").is_none() {
            continue;
        }
        // In the team that they share, they may make and list what is of their own world.
        let of_the_team_alone = of_team && input.get_field_by_name("webhook_id").is_none();
        if of_the_team_alone && stranger.shares_the_team_of(target) {
            continue;
        }
        let outcome = grpc::call(channel, &method.path, target.message(method, of_team), stranger.headers()).await;
        grpc::refused(outcome, Reason::NotFound);
        asked += 1;
    }
    asked
}

async fn over_rest(target: &World, stranger: &Stranger, method: &Method) -> usize {
    let mut asked = 0;
    for route in &method.routes {
        let surface = Contract::get().surfaces().iter().find(|entry| entry.surface == route.surface).unwrap();
        let in_path = !route.variables.is_empty();
        let in_body = method.path.ends_with("/CreateLicense");
        if !in_path && !in_body {
            continue;
        }
        for (kind, client) in &stranger.clients {
            if !method.serves(*kind) || !surface.options.callers().any(|caller| caller == *kind) {
                continue;
            }
            // In the team that they share, they may make and list what is of their own world.
            let of_the_team_alone = is_of_team(route) && route.variables.len() == 1;
            if of_the_team_alone && *kind == Caller::Account && stranger.shares_the_team_of(target) {
                continue;
            }
            let json = route.body.then(|| body(method, &target.product.id, &target.license.key));
            let answer = client.call(route.verb.clone(), &target.path(method, route), json).await;
            assert_eq!(answer.status, 404, "{} by {}, {kind:?}: {}", answer.asked, stranger.name, answer.text());
            answer.refused(Reason::NotFound);
            nothing_is_told(&answer, target, stranger);
            asked += 1;
        }
    }
    asked
}

async fn lists_show_nothing(target: &World, stranger: &Stranger) {
    let lists = [
        "/products".to_owned(),
        "/licenses".to_owned(),
        "/licenses?email=customer@example.com".to_owned(),
        format!("/licenses?productId={}", target.product.id),
        format!("/licenses?query={}", target.license.id),
        format!("/licenses?query={}", target.license.key),
        format!("/licenses?clientId={}", target.client_id),
        format!("/licenses/export?format=csv&productId={}", target.product.id),
        format!("/licenses/export?format=ndjson&query={}", target.license.key),
        "/licenses/export?format=ndjson".to_owned(),
        format!("/teams/{}/webhooks/{}/deliveries", stranger.account.team_id, target.team_webhook.id),
        format!("/teams/{}/webhooks", stranger.account.team_id),
        "/auth/me".to_owned(),
    ];
    for path in lists {
        nothing_is_told(&stranger.account.get(&path).await, target, stranger);
    }
    for email in [None, Some("customer@example.com")] {
        let clients = list_clients(&stranger.account, email).await;
        assert!(!clients.is_empty(), "they see their own");
        assert!(!clients.contains(&target.client_id), "{} sees a client", stranger.name);
    }
    let of_team_keys = ["/api/v1/products", "/api/v1/licenses", "/api/v1/clients?email=customer@example.com"];
    for (_, client) in stranger.clients.iter().filter(|(kind, _)| matches!(kind, Caller::TeamKey | Caller::FreeKey)) {
        for path in of_team_keys {
            let answer = client.get(path).await;
            answer.gives(200);
            nothing_is_told(&answer, target, stranger);
        }
    }
}

/// What is made many at a time is made for one's own products and clients.
async fn many_are_made_for_nobody_else(target: &World, stranger: &Stranger, own: &Product) {
    let (foreign, own) = (&target.product.id, &own.id);
    let of_product = json!({"licenses": [{"productId": own}, {"productId": foreign}]});
    let refused = stranger.account.post("/licenses/batch", of_product).await;
    refused.refused_for("licenses[1].productId");
    let of_client = json!({"licenses": [{"productId": own, "clientId": target.client_id}]});
    stranger.account.post("/licenses/batch", of_client).await.refused_for("licenses[0].clientId");

    let import = async |query: &str, file: String| {
        let path = format!("/licenses/import{query}");
        stranger.account.send(http::Method::POST, &path, Some("text/csv"), file.into()).await
    };
    import(&format!("?productId={foreign}"), "email\na@example.com\n".to_owned()).await.refused(Reason::NotFound);
    let of_lines = format!("product_id,client_id\n{foreign},\n{own},{}\n", target.client_id);
    let report = import("", of_lines).await;
    assert_eq!(report.status, 200, "{}", report.text());
    let failed = report.text().lines().filter(|line| line.contains("\"failed\",")).count();
    assert_eq!(failed, 2, "{}", report.text());
    // A licence key that somebody has is not told of, and not taken from them.
    let taken = import(&format!("?productId={own}"), format!("key\n{}\n", target.license.key)).await;
    assert!(!taken.text().contains(&target.license.id), "{}", taken.text());
    assert!(taken.text().contains("\"failed\","), "{}", taken.text());
}

async fn checks_find_nothing(target: &World, stranger: &Stranger) {
    let (_, app) = stranger.clients.iter().find(|(kind, _)| *kind == Caller::ProductPublicKey).unwrap();
    let asked = json!({"license_key": target.license.key, "fingerprint": "machine-1"});
    let verdict = app.post("/v1/licenses/validate", asked.clone()).await;
    assert_eq!(verdict.gives(200), &json!({"valid": false, "code": "not_found", "license": null}), "{}", stranger.name);
    app.post("/v1/licenses/activate", asked.clone()).await.refused(Reason::NotFound);
    app.post("/v1/licenses/deactivate", asked).await.refused(Reason::NotFound);
}

#[track_caller]
fn nothing_is_told(answer: &Answer, target: &World, stranger: &Stranger) {
    let text = answer.text();
    for id in target.ids() {
        assert!(!text.contains(id), "{} by {} tells of {id}: {text}", answer.asked, stranger.name);
    }
}

async fn a_call_names_its_team_and_mode_by_headers(install: Installation) {
    let (owner, other) = (install.register().await, install.register().await);
    let product = owner.create_product("Live").await;
    let tested = owner.in_test_mode().create_product("Test").await;
    let names = |answer: &Answer| -> Vec<String> {
        answer.gives(200)["products"].as_array().unwrap().iter().map(|product| text(product, "/name")).collect()
    };
    assert_eq!(names(&owner.get("/products").await), ["Live"]);
    assert_eq!(names(&owner.with("paperkey-mode", "live").get("/products").await), ["Live"]);
    assert_eq!(names(&owner.in_test_mode().get("/products").await), ["Test"]);
    assert_eq!(names(&owner.for_team(&owner.team_id).get("/products").await), ["Live"]);
    owner.in_test_mode().get(&format!("/products/{}", product.id)).await.refused(Reason::NotFound);
    owner.get(&format!("/products/{}", tested.id)).await.refused(Reason::NotFound);

    for nobodys in ["team_00000000000000000000000000", "nonsense", "%00"] {
        owner.for_team(nobodys).get("/products").await.refused(Reason::NotFound);
    }
    owner.for_team(&other.team_id).get("/products").await.refused(Reason::NotFound);
    owner.for_team(&other.team_id).post("/products", json!({"name": "Intruder"})).await.refused(Reason::NotFound);
    assert_eq!(names(&other.get("/products").await), Vec::<String>::new());
    owner.with("paperkey-mode", "nonsense").get("/products").await.refused(Reason::ValidationFailed);

    let channel = grpc::connect(&install.url()).await;
    let rpc = "/paperkey.catalog.v1.CatalogService/ListProducts";
    let mut headers = grpc::credential(&owner.token);
    headers.insert("paperkey-team", other.team_id.parse().unwrap());
    grpc::refused(grpc::call(&channel, rpc, bytes::Bytes::new(), headers).await, Reason::NotFound);
}

async fn a_product_key_works_in_the_mode_it_was_born_with(install: Installation) {
    let owner = install.register().await;
    let tester = owner.in_test_mode();
    let tested = tester.create_product("Test").await;
    let license = tester.issue(&tested, json!({})).await;
    let app = owner.app(&tested);
    assert_eq!(app.verdict(&license).await, "valid");
    let in_live = app.0.with("paperkey-mode", "live");
    let answer = in_live.post("/v1/licenses/validate", json!({"license_key": license.key})).await;
    assert_eq!(answer.gives(200)["code"], "valid", "no header moves a key to another world");
    let listed = owner.integration().in_test_mode().get("/api/v1/products").await;
    assert_eq!(listed.gives(200)["products"], json!([]), "a live key sees no test data");
}
