//! Whatever is sent, the answer says what is wrong with it: never a failure of ours, never a cut connection.
//!
//! Bodies are made from the contract: every route that takes one is sent every kind of nonsense for every field.

use bytes::Bytes;
use http::{HeaderMap, Method as Verb, StatusCode};
use paperkey_proto::{
    Contract,
    contract::{Method, Route, mask_field},
    errors::v1::Reason,
    options::v1::{Caller, LetterCase, Surface},
};
use paperkey_tests::{Account, Api, Installation, Product, envelope, grpc, http1::Connection, on_both_kinds};
use prost_reflect::{FieldDescriptor, Kind};
use serde_json::{Value, json};

use crate::samples::{NOBODYS, nobodys_path, path};

on_both_kinds! {
    bodies_that_are_no_objects_are_refused,
    members_of_the_wrong_type_are_named,
    unknown_and_repeated_names_are_named,
    bodies_are_bounded_and_must_be_json,
    broken_framing_ends_nothing_but_its_own_connection,
    an_answer_that_does_not_wait_for_the_body_says_that_the_connection_ends,
    odd_queries_are_refused,
    odd_paths_are_not_found,
    wrong_verbs_are_told_the_right_ones,
    numbers_and_texts_keep_their_bounds,
    strange_grpc_is_refused,
    refused_grpc_calls_do_not_use_up_a_connection,
}

const JSON: Option<&str> = Some("application/json");

/// The largest body of a method that declares no other bound.
const LARGEST: usize = 65_536;

/// The largest of one that takes many at once.
const LARGEST_BATCH: usize = 4 * 1_024 * 1_024;

/// Clients with a good credential for each surface.
struct Clients {
    owner: Account,
    product: Product,
    app: Api,
    integration: Api,
    installation: Api,
    /// Somebody whose sessions a call may end.
    leaver: Account,
}

impl Clients {
    async fn new(install: &Installation) -> Self {
        let owner = install.register().await;
        let product = owner.create_product("App").await;
        let installation = install.api().with_key(&install.system_key().await).for_team(&owner.team_id);
        let leaver = install.register().await;
        Self { app: owner.app(&product).0, integration: owner.integration(), owner, product, installation, leaver }
    }

    fn of(&self, method: &Method, surface: Surface) -> &Api {
        match surface {
            Surface::Team | Surface::Platform if method.callers == [Caller::SystemKey] => &self.installation,
            Surface::Dashboard if method.descriptor.name() == "Logout" => &self.leaver,
            Surface::Client => &self.app,
            Surface::Team | Surface::Platform => &self.integration,
            Surface::Dashboard | Surface::Unspecified => &self.owner,
        }
    }

    /// The route with ids that exist where they can.
    fn path(&self, route: &Route) -> String {
        path(route, |name| match name {
            "product_id" => self.product.id.clone(),
            "team_id" => self.owner.team_id.clone(),
            "id" if route.template.contains("/products/") => self.product.id.clone(),
            _ => NOBODYS.to_owned(),
        })
    }
}

/// Every route that takes JSON. What takes a file, takes any.
fn body_routes() -> impl Iterator<Item = (&'static Method, &'static Route)> {
    let all =
        Contract::get().methods().iter().flat_map(|method| method.routes.iter().map(move |route| (&**method, route)));
    all.filter(|(method, route)| route.body && method.body_field().is_none())
}

/// The fields that a body may name, by what they are called on the route's surface.
fn body_fields(method: &Method, route: &Route) -> Vec<(String, FieldDescriptor)> {
    let input = method.descriptor.input();
    let mask = mask_field(&input);
    let surface = Contract::get().surfaces().iter().find(|entry| entry.surface == route.surface).unwrap();
    input
        .fields()
        .filter(|field| Some(field) != mask.as_ref() && !route.variables.iter().any(|name| name == field.name()))
        .map(|field| match surface.options.request_case() {
            LetterCase::Camel => (field.json_name().to_owned(), field),
            _ => (field.name().to_owned(), field),
        })
        .collect()
}

/// The process that was sent nonsense must be as well as before.
async fn is_well(install: &mut Installation, clients: &Clients) {
    for name in install.names() {
        assert_eq!(install.operations(&name).get("/readyz").await.status, 200, "{name} is not ready");
        assert!(install.process(&name).is_running(), "{name} has ended");
    }
    clients.owner.get(&format!("/products/{}", clients.product.id)).await.gives(200);
    let panicked = install.written().into_iter().find(|(_, line)| line.text.contains("panicked"));
    assert!(panicked.is_none(), "{panicked:?}");
}

fn nested(depth: usize, open: &str, inside: &str, close: &str) -> String {
    format!("{}{inside}{}", open.repeat(depth), close.repeat(depth))
}

async fn bodies_that_are_no_objects_are_refused(mut install: Installation) {
    let clients = Clients::new(&install).await;
    let texts = [
        "{",
        "}",
        "{\"name\"",
        "{\"name\":",
        "{\"name\":\"a\"",
        "{\"name\":\"a\",}",
        "{'name':'a'}",
        "{name:1}",
        "{} {}",
        "{}]",
        "nul",
        "null",
        "true",
        "17",
        "\"text\"",
        "[]",
        "[{}]",
        "\u{0}",
        "\u{feff}{}",
        "<xml/>",
        "name=App",
        "{\"name\":\"\\ud800\"}",
        "{\"name\":\"\t\"}",
        "{\"name\":01}",
        "{\"name\":NaN}",
        "{\"name\":1e999}",
        "//",
        "{/* */}",
    ];
    let mut bodies: Vec<Bytes> = texts.iter().map(|text| Bytes::from(*text)).collect();
    bodies.push(Bytes::from_static(b"{\"name\":\"\xff\xfe\"}"));
    bodies.push(Bytes::from_static(b"\xff\xfe{\0}\0"));
    bodies.push(nested(20_000, "[", "", "]").into());
    bodies.push(nested(20_000, "[", "", "").into());
    bodies.push(nested(10_000, "{\"a\":", "1", "}").into());
    bodies.push(format!("{{\"metadata\":{}}}", nested(5_000, "{\"a\":", "1", "}")).into());
    bodies.push(format!("{{\"metadata\":{{\"a\":{}}}}}", nested(20_000, "[", "", "]")).into());
    for (method, route) in body_routes() {
        for body in &bodies {
            let path = clients.path(route);
            let answer = clients.of(method, route.surface).send(route.verb.clone(), &path, JSON, body.clone()).await;
            let shown: String = String::from_utf8_lossy(body).chars().take(60).collect();
            assert_eq!(answer.status, 400, "{} with {shown:?}: {}", answer.asked, answer.text());
            answer.refused(Reason::ValidationFailed);
            assert!(answer.body.len() < 4_096, "{} with {shown:?}: a fault is told briefly", answer.asked);
        }
        let empty =
            clients.of(method, route.surface).send(route.verb.clone(), &clients.path(route), JSON, Bytes::new()).await;
        assert!(!empty.status.is_server_error(), "{} without a body: {}", empty.asked, empty.text());
    }
    is_well(&mut install, &clients).await;
}

/// Values that a field of that kind does not take.
fn wrong_values(field: &FieldDescriptor) -> Vec<Value> {
    let of_kind = match field.kind() {
        Kind::String => vec![json!(17), json!(true), json!({}), json!([]), json!(1.5)],
        Kind::Bool => vec![json!("true"), json!(1), json!({}), json!([])],
        Kind::Int32 | Kind::Int64 => {
            vec![json!("many"), json!(true), json!(1.5), json!({}), json!([]), json!(1e30), json!(u64::MAX)]
        }
        Kind::Enum(_) => vec![json!("nonsense"), json!(""), json!(17), json!({}), json!([])],
        Kind::Message(message) => match message.full_name() {
            "google.protobuf.Timestamp" => vec![
                json!(17),
                json!({}),
                json!([]),
                json!(true),
                json!(""),
                json!("yesterday"),
                json!("2026-13-01T00:00:00Z"),
                json!("2026-02-30T00:00:00Z"),
                json!("2026-01-01"),
                json!("2026-01-01T00:00:00"),
            ],
            _ => vec![json!(17), json!("text"), json!([]), json!(true)],
        },
        kind => panic!("{field:?}: no nonsense is known for {kind:?}"),
    };
    if field.is_list() {
        let mut wrong: Vec<Value> = of_kind.into_iter().map(|value| json!([value])).collect();
        wrong.extend([json!("text"), json!({}), json!(17), json!([null])]);
        wrong
    } else {
        of_kind
    }
}

async fn members_of_the_wrong_type_are_named(mut install: Installation) {
    let clients = Clients::new(&install).await;
    let mut asked = 0;
    for (method, route) in body_routes() {
        for (name, field) in body_fields(method, route) {
            for wrong in wrong_values(&field) {
                let body = json!({&name: wrong}).to_string();
                let answer = clients
                    .of(method, route.surface)
                    .send(route.verb.clone(), &clients.path(route), JSON, body.clone().into())
                    .await;
                assert_eq!(answer.status, 400, "{} with {body}: {}", answer.asked, answer.text());
                answer.refused(Reason::ValidationFailed);
                let named = envelope::details(&answer).iter().any(|detail| {
                    detail["field"].as_str().is_some_and(|path| path == name || path.starts_with(&format!("{name}[")))
                });
                assert!(named, "{} with {body} does not name {name}: {}", answer.asked, answer.text());
                asked += 1;
            }
        }
    }
    assert!(asked > 200, "the contract has fields: {asked} calls");
    is_well(&mut install, &clients).await;
}

async fn unknown_and_repeated_names_are_named(mut install: Installation) {
    let clients = Clients::new(&install).await;
    for (method, route) in body_routes() {
        let (client, path) = (clients.of(method, route.surface), clients.path(route));
        let send = |body: String| client.send(route.verb.clone(), &path, JSON, body.into());
        send(json!({"nonsense": 1}).to_string()).await.refused_for("nonsense");
        send(json!({"": 1}).to_string()).await.refused(Reason::ValidationFailed);
        for variable in &route.variables {
            send(json!({variable: "x"}).to_string()).await.refused(Reason::ValidationFailed);
        }
        if let Some(mask) = mask_field(&method.descriptor.input()) {
            for name in [mask.name(), mask.json_name()] {
                send(json!({name: "name"}).to_string()).await.refused(Reason::ValidationFailed);
            }
        }
        for (name, field) in body_fields(method, route) {
            // A value that is right as far as its type goes.
            let value = match field.kind() {
                _ if field.is_list() => json!([]),
                Kind::String => json!("text"),
                Kind::Bool => json!(true),
                Kind::Message(message) if message.full_name() == "google.protobuf.Timestamp" => {
                    json!("2030-01-01T00:00:00Z")
                }
                Kind::Message(_) => json!({}),
                Kind::Enum(_) => json!("active"),
                _ => json!(1),
            };
            send(format!("{{\"{name}\":{value},\"{name}\":{value}}}")).await.refused_for(&name);
            let (snake, camel) = (field.name(), field.json_name());
            if snake != camel {
                send(format!("{{\"{snake}\":{value},\"{camel}\":{value}}}")).await.refused_for(&name);
            }
        }
    }
    let nested =
        clients.owner.post("/products", json!({"name": "A", "price": {"amount": 1, "currency": "EUR", "x": 1}}));
    nested.await.refused_for("price.x");
    let nested = clients.owner.post("/products", json!({"name": "A", "price": {"amount": "much", "currency": "EUR"}}));
    nested.await.refused_for("price.amount");
    let path = format!("/products/{}/webhooks", clients.product.id);
    let nested = clients.owner.post(&path, json!({"url": "https://example.com", "events": ["license.created", 17]}));
    nested.await.refused_for("events[1]");
    let both = clients.integration.post("/api/v1/licenses", json!({"nonsense": 1, "max_activations": "many"})).await;
    both.refused_for("nonsense").refused_for("max_activations");
    is_well(&mut install, &clients).await;
}

async fn bodies_are_bounded_and_must_be_json(mut install: Installation) {
    let clients = Clients::new(&install).await;
    for (method, route) in body_routes() {
        let client = clients.of(method, route.surface);
        let path = clients.path(route);
        let largest = method.max_body_bytes();
        assert!([LARGEST, LARGEST_BATCH].contains(&largest), "{} declares another bound: test it too", method.path);
        let padded = |length: usize| Bytes::from(format!("{{\"nonsense\":\"{}\"}}", "x".repeat(length - 15)));
        let fits = client.send(route.verb.clone(), &path, JSON, padded(largest)).await;
        fits.refused(Reason::ValidationFailed);
        for length in [largest + 1, largest * 4] {
            client.announce(route.verb.clone(), &path, length).await.refused(Reason::BodyTooLarge);
            if largest == LARGEST {
                // On a connection of its own: an answer that does not wait for the body ends it. What is larger is
                // cut off before its sender reads.
                let client = client.on_new_connections();
                let answer = client.send(route.verb.clone(), &path, JSON, padded(length)).await;
                answer.refused(Reason::BodyTooLarge);
            }
        }
        let typed = [
            "text/plain",
            "application/x-www-form-urlencoded",
            "multipart/form-data; boundary=x",
            "application/xml",
            "application/jsonx",
            "nonsense",
            "application/octet-stream",
        ];
        for content_type in typed {
            let answer = client.send(route.verb.clone(), &path, Some(content_type), Bytes::from_static(b"{}")).await;
            assert_eq!(answer.status, 415, "{} as {content_type}: {}", answer.asked, answer.text());
            answer.refused(Reason::UnsupportedMediaType);
        }
        for content_type in ["application/json; charset=utf-8", "APPLICATION/JSON"] {
            let body = Bytes::from_static(b"{\"nonsense\":1}");
            client.send(route.verb.clone(), &path, Some(content_type), body).await.refused_for("nonsense");
        }
    }
    is_well(&mut install, &clients).await;
}

async fn broken_framing_ends_nothing_but_its_own_connection(mut install: Installation) {
    let clients = Clients::new(&install).await;
    let url = install.url();
    let head = |length: &str| {
        format!(
            "POST /products HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {}\r\nContent-Type: application/json\r\n{length}\r\n",
            clients.owner.token
        )
    };

    // Says how much it will send, and it is too much: told before any of it is sent.
    let mut connection = Connection::open(&url).await;
    connection.write(head("Content-Length: 10000000\r\n")).await;
    connection.answer().await.expect("an answer").refused(Reason::BodyTooLarge);

    // Does not say how much, and sends too much.
    let mut connection = Connection::open(&url).await;
    connection.write(head("Transfer-Encoding: chunked\r\n")).await;
    for _ in 0..5 {
        connection.write(format!("4000\r\n{}\r\n", "x".repeat(0x4000))).await;
    }
    connection.write("0\r\n\r\n").await;
    connection.answer().await.expect("an answer").refused(Reason::BodyTooLarge);

    // Does not say how much, and sends what is right.
    let mut connection = Connection::open(&url).await;
    connection.write(head("Transfer-Encoding: chunked\r\n")).await;
    connection.write("f\r\n{\"name\":\"Chunk\"\r\n1\r\n}\r\n0\r\n\r\n").await;
    assert_eq!(connection.answer().await.expect("an answer").gives(201)["name"], "Chunk");

    // Says more than it sends, and goes away: nothing was asked, so nothing may be done.
    let mut connection = Connection::open(&url).await;
    connection.write(head("Content-Length: 100\r\n")).await;
    connection.write("{\"name\":\"Never\"}").await;
    connection.finish().await;
    if let Some(answer) = connection.answer().await {
        assert!(answer.status.is_client_error(), "{}", answer.text());
    }

    // Says less than it sends: the rest is read as another request, which it is not.
    let mut connection = Connection::open(&url).await;
    connection.write(head("Content-Length: 2\r\n")).await;
    connection.write("{}{\"name\":\"Smuggled\"}\r\n\r\n").await;
    connection.answer().await.expect("an answer").refused_for("name");

    for framing in [
        "Content-Length: nonsense\r\n",
        "Content-Length: -1\r\n",
        "Content-Length: 2\r\nContent-Length: 3\r\n",
        "Content-Length: 99999999999999999999999999\r\n",
        "Transfer-Encoding: nonsense\r\n",
        "No colon\r\n",
        "Bad\u{0}Name: x\r\n",
    ] {
        let mut connection = Connection::open(&url).await;
        connection.write(head(framing)).await;
        connection.write("{}").await;
        connection.finish().await;
        if let Some(answer) = connection.answer().await {
            assert!(answer.status.is_client_error(), "{framing:?}: {} {}", answer.status, answer.text());
        }
    }
    let mut connection = Connection::open(&url).await;
    connection.write(head("Transfer-Encoding: chunked\r\n")).await;
    connection.write("nonsense\r\n").await;
    connection.finish().await;
    if let Some(answer) = connection.answer().await {
        assert!(answer.status.is_client_error(), "a chunk of nonsense: {}", answer.status);
    }
    let mut connection = Connection::open(&url).await;
    connection.write("\u{16}\u{3}\u{1}\u{2}nonsense\r\n\r\n").await;
    connection.finish().await;
    if let Some(answer) = connection.answer().await {
        assert!(answer.status.is_client_error());
    }

    let names: Vec<Value> = clients.owner.get("/products").await.gives(200)["products"]
        .as_array()
        .unwrap()
        .iter()
        .map(|product| product["name"].clone())
        .collect();
    assert_eq!(names, ["Chunk", "App"], "nothing else was done");
    // A client that keeps its connection is served on it again after a fault.
    let mut connection = Connection::open(&url).await;
    for _ in 0..3 {
        connection.write(head("Content-Length: 1\r\n")).await;
        connection.write("{").await;
        connection.answer().await.expect("the connection is kept").refused(Reason::ValidationFailed);
    }
    assert!(install.process(install.gateway()).is_running());
}

/// A client that keeps its connection must know whether it may go on using it.
async fn an_answer_that_does_not_wait_for_the_body_says_that_the_connection_ends(mut install: Installation) {
    let clients = Clients::new(&install).await;
    let token = &clients.owner.token;
    for (path, token, status) in [
        ("/products", token.as_str(), 413),
        ("/products", "nonsense", 401),
        ("/v1/status", token.as_str(), 405),
        ("/nowhere", token.as_str(), 404),
    ] {
        let mut connection = Connection::open(&install.url()).await;
        let head = |length: usize| {
            format!(
                "POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n\
                 Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
            )
        };
        connection.write(head(3 * LARGEST)).await;
        let answer = connection.answer().await.expect("an answer");
        assert_eq!(answer.status, status, "{path}: {}", answer.text());
        if answer.header("connection").is_some_and(|value| value.eq_ignore_ascii_case("close")) {
            continue;
        }
        connection.write("x".repeat(3 * LARGEST)).await;
        connection.write(head(2)).await;
        connection.write("{}").await;
        assert!(connection.answer().await.is_some(), "after {status} the connection was cut without a word");
    }
    is_well(&mut install, &clients).await;
}

async fn odd_queries_are_refused(mut install: Installation) {
    let clients = Clients::new(&install).await;
    let lists = Contract::get().methods().iter().flat_map(|method| {
        let paged = method.descriptor.input().get_field_by_name("page_size").is_some();
        method.routes.iter().filter(move |_| paged).map(move |route| (&**method, route))
    });
    let mut asked = 0;
    for (method, route) in lists {
        let client = clients.of(method, route.surface);
        let base = clients.path(route);
        let exists = !base.contains(NOBODYS);
        for query in [
            "pageSize=0",
            "pageSize=-1",
            "page_size=0",
            "pageSize=x",
            "pageSize=",
            "pageSize=1.5",
            "pageSize=1e2",
            "pageSize=99999999999",
            "pageSize=1&pageSize=2",
            "pageSize=1&page_size=2",
            "nonsense=1",
            "pageSize=1&nonsense=1",
            "pageToken=%ff",
            "pageSize=%zz",
            "=1",
            "%00=1",
            "pageToken%5B%5D=x",
        ] {
            let answer = client.get(&format!("{base}?{query}")).await;
            assert_eq!(answer.status, 400, "{}: {}", answer.asked, answer.text());
            answer.refused(Reason::ValidationFailed);
            asked += 1;
        }
        for token in ["nonsense", "%00", "AAAA", "bGljXzE7RFJPUA", "é", &"A".repeat(600), "..%2f..", "bGljX8O8"] {
            let token = token.replace('é', "%c3%a9");
            let answer = client.get(&format!("{base}?pageToken={token}")).await;
            let refused = if exists { answer.status == 400 } else { [400, 404].contains(&answer.status.as_u16()) };
            assert!(refused, "{}: {} {}", answer.asked, answer.status, answer.text());
            asked += 1;
        }
        if exists {
            client.get(&format!("{base}?pageSize=101")).await.gives(200);
            client.get(&format!("{base}?pageSize=2147483647&")).await.gives(200);
            client.get(&format!("{base}?")).await.gives(200);
        }
        let long = client.get(&format!("{base}?{}", "a=1&".repeat(2_000))).await;
        assert!(long.status.is_client_error(), "{}", long.status);
        assert!(long.body.len() < 8_192, "a fault is told briefly");
    }
    assert!(asked > 100, "the contract has lists: {asked} calls");
    clients.owner.get("/licenses?status=nonsense").await.refused_for("status");
    clients.owner.get(&format!("/products/{}?nonsense=1", clients.product.id)).await.refused(Reason::ValidationFailed);
    clients.owner.get(&format!("/products/{}?id=x", clients.product.id)).await.refused(Reason::ValidationFailed);
    let beside = clients.owner.post("/products?name=Query", json!({"name": "Body"})).await;
    beside.refused(Reason::ValidationFailed);
    is_well(&mut install, &clients).await;
}

async fn odd_paths_are_not_found(mut install: Installation) {
    let clients = Clients::new(&install).await;
    let odd = [
        "%2e%2e",
        "%2e%2e%2f%2e%2e",
        "..",
        ".",
        "%00",
        "%ff",
        "%c3%28",
        "%",
        "%zz",
        "%2f",
        "x%2fy",
        ";",
        "a;b=c",
        "*",
        "~",
        "%20",
        "%0d%0aX:%20y",
        "'%20OR%201=1--",
        "%F0%9F%92%A9",
        "null",
        "undefined",
        "-1",
        "{id}",
        "%7Bid%7D",
        &"a".repeat(10_000),
        &"%61".repeat(3_000),
        &"a".repeat(65),
    ]
    .map(str::to_owned);
    for (method, route) in
        Contract::get().methods().iter().flat_map(|method| method.routes.iter().map(move |route| (method, route)))
    {
        for variable in &route.variables {
            for odd in &odd {
                let path = path(route, |name| match name {
                    name if name == variable => odd.clone(),
                    "product_id" => clients.product.id.clone(),
                    _ => NOBODYS.to_owned(),
                });
                let json = route.body.then(|| crate::samples::body(method, NOBODYS, "K7WX9-M3NP4-H8TRC-DJ"));
                let client = clients.of(method, route.surface);
                let Ok(answer) = client.try_call(route.verb.clone(), &path, json).await else {
                    // A client that keeps to the rules does not send it at all; by hand it is sent below.
                    assert!(odd.contains(['{', ' ']) || odd == "%" || odd == "%zz", "{path} was not answered");
                    continue;
                };
                // A path with one more or one less segment may be another route, or the same with another verb.
                let refused = matches!(answer.status.as_u16(), 400 | 404 | 405);
                assert!(refused, "{}: {} {}", answer.asked, answer.status, answer.text());
            }
        }
    }
    let unknown = [
        "/nowhere",
        "/products/x/y/z",
        "/productsque",
        "/v1",
        "/v1/",
        "/v1/nowhere",
        "/api",
        "/api/v1",
        "/api/v1/nowhere",
        "/v1/licenses",
        "/auth",
        "/auth/nowhere",
        "//products",
        "/products//",
        "/licenses/",
        "/%70roducts",
        "/PRODUCTS",
        "/paperkey.nowhere.v1.Service/Method",
        "/.env",
        "/../etc/passwd",
    ];
    for unknown in unknown {
        for client in [&install.api(), &*clients.owner, &clients.integration] {
            let answer = client.get(unknown).await;
            assert_eq!(answer.status, 404, "{}: {}", answer.asked, answer.text());
            answer.refused(Reason::NotFound);
        }
    }
    for target in
        ["/products/{id}", "/products/ x", "/products/\u{e9}", "products", "*", "http://elsewhere/products", ""]
    {
        let mut connection = Connection::open(&install.url()).await;
        connection.write(format!("GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")).await;
        if let Some(answer) = connection.answer().await {
            assert!(answer.status.is_client_error(), "{target:?}: {} {}", answer.status, answer.text());
        }
    }
    is_well(&mut install, &clients).await;
}

async fn wrong_verbs_are_told_the_right_ones(mut install: Installation) {
    let clients = Clients::new(&install).await;
    let routes: Vec<&Route> = Contract::get().methods().iter().flat_map(|method| &method.routes).collect();
    let shape = |route: &Route| path(route, |_| "{}".to_owned());
    let verbs =
        [Verb::GET, Verb::POST, Verb::PUT, Verb::PATCH, Verb::DELETE, Verb::TRACE, Verb::from_bytes(b"BREW").unwrap()];
    for route in &routes {
        let mut right: Vec<Verb> =
            routes.iter().filter(|other| shape(other) == shape(route)).map(|other| other.verb.clone()).collect();
        right.sort_by_key(ToString::to_string);
        right.dedup();
        for wrong in verbs.iter().filter(|verb| !right.contains(verb)) {
            let answer = install.api().call(wrong.clone(), &nobodys_path(route), None).await;
            assert_eq!(answer.status, 405, "{}: {}", answer.asked, answer.text());
            answer.refused(Reason::MethodNotAllowed);
            let mut allowed: Vec<&str> = answer.header("allow").unwrap_or_default().split(',').map(str::trim).collect();
            allowed.retain(|verb| !matches!(*verb, "HEAD" | "OPTIONS"));
            allowed.sort_unstable();
            let right: Vec<String> = right.iter().map(ToString::to_string).collect();
            assert_eq!(allowed, right, "{}", answer.asked);
        }
    }
    is_well(&mut install, &clients).await;
}

async fn numbers_and_texts_keep_their_bounds(mut install: Installation) {
    let clients = Clients::new(&install).await;
    let (owner, product) = (&clients.owner, &clients.product);
    let create = |member: &'static str, value: Value| owner.post("/products", json!({"name": "A", member: value}));
    create("name", json!("")).await.refused_for("name");
    create("name", json!("x".repeat(101))).await.refused_for("name");
    create("name", json!("ä".repeat(100))).await.gives(201);
    create("description", json!("x".repeat(2_001))).await.refused_for("description");
    create("metadata", json!({"a": "x".repeat(17_000)})).await.refused_for("metadata");
    create("price", json!({"amount": -1, "currency": "EUR"})).await.refused_for("price.amount");
    create("price", json!({"amount": 1, "currency": "EURO"})).await.refused_for("price.currency");
    create("price", json!({"amount": 1})).await.refused_for("price.currency");
    let largest = create("price", json!({"amount": i64::MAX, "currency": "EUR"})).await;
    assert_eq!(largest.gives(201)["price"]["amount"], i64::MAX, "64-bit integers are JSON numbers");
    let text = create("description", json!("\u{1F512} \"quoted\" \\ \n ﷽")).await;
    assert_eq!(text.gives(201)["description"], "\u{1F512} \"quoted\" \\ \n ﷽");

    let issue =
        |member: &'static str, value: Value| owner.post("/licenses", json!({"productId": product.id, member: value}));
    issue("maxActivations", json!(-1)).await.refused_for("maxActivations");
    issue("maxActivations", json!(1.5)).await.refused_for("maxActivations");
    issue("maxActivations", json!(2_147_483_648_i64)).await.refused_for("maxActivations");
    issue("maxActivations", json!(0)).await.gives(201);
    issue("email", json!("nonsense")).await.refused_for("email");
    issue("email", json!("a@b\u{0}.example")).await.refused_for("email");
    issue("expiresAt", json!("99999-01-01T00:00:00Z")).await.refused_for("expiresAt");
    for text in ["\u{0}", "a\u{0}b"] {
        for answer in [create("name", json!(text)).await, create("sku", json!(text)).await] {
            assert!(!answer.status.is_server_error(), "{} with {text:?}: {}", answer.asked, answer.text());
        }
        let answer = issue("metadata", json!({"a": text, text: 1})).await;
        assert!(!answer.status.is_server_error(), "{} with {text:?}: {}", answer.asked, answer.text());
    }

    let check = |body: Value| clients.app.post("/v1/licenses/activate", body);
    let key = crate::samples::NOBODYS_LICENSE_KEY;
    check(json!({"license_key": key})).await.refused_for("fingerprint");
    check(json!({"license_key": key, "fingerprint": ""})).await.refused_for("fingerprint");
    check(json!({"license_key": key, "fingerprint": "x".repeat(256)})).await.refused_for("fingerprint");
    check(json!({"license_key": key, "fingerprint": "ä".repeat(255)})).await.refused(Reason::NotFound);
    for malformed in ["", "nonsense", "K7WX9", "K7WX9-M3NP4-H8TRC-DK", "é", "\u{0}", &"K".repeat(65)] {
        check(json!({"license_key": malformed, "fingerprint": "x"})).await.refused_for("license_key");
    }
    let register = |body: Value| clients.owner.post("/auth/register", body);
    let email = paperkey_tests::people::new_email();
    register(json!({"email": email, "password": "short"})).await.refused_for("password");
    register(json!({"email": email, "password": "x".repeat(257)})).await.refused_for("password");
    register(json!({"email": "nonsense", "password": "long enough"})).await.refused_for("email");
    register(json!({})).await.refused_for("email").refused_for("password");
    is_well(&mut install, &clients).await;
}

async fn strange_grpc_is_refused(mut install: Installation) {
    use paperkey_tests::grpc;
    use tonic::{Code, Status};

    let clients = Clients::new(&install).await;
    let channel = grpc::connect(&install.url()).await;
    let bearer = || grpc::credential(&clients.owner.token);
    let create = "/paperkey.catalog.v1.CatalogService/CreateProduct";
    for garbage in
        [&b"\xff\xff\xff\xff"[..], b"\x0a\xff", b"\x0a\x02\xff\xfe", b"\x08\x01", &[0x0a; 3], &[0x2a, 2, 0x0a, 0xff]]
    {
        let outcome = grpc::call(&channel, create, Bytes::copy_from_slice(garbage), bearer()).await;
        grpc::refused(outcome, Reason::ValidationFailed);
    }
    for length in [70_000, 1_000_000, 5_000_000] {
        let outcome = grpc::call(&channel, create, Bytes::from(vec![0; length]), bearer()).await;
        grpc::refused(outcome, Reason::BodyTooLarge);
    }
    for unknown in ["/paperkey.catalog.v1.CatalogService/Nothing", "/nothing.Service/Method", "/x"] {
        let outcome = grpc::call(&channel, unknown, Bytes::new(), bearer()).await;
        let code = outcome.as_ref().err().map(Status::code);
        assert!(matches!(code, Some(Code::Unimplemented | Code::NotFound)), "{unknown}: {outcome:?}");
    }
    for (content_type, body) in [
        ("application/grpc-web+proto", Bytes::from_static(b"")),
        ("application/grpc-web+proto", Bytes::from_static(b"\0")),
        ("application/grpc-web+proto", Bytes::from_static(b"\0\xff\xff\xff\xff")),
        ("application/grpc-web+proto", Bytes::from_static(b"\x07\0\0\0\0")),
        ("application/grpc-web-text", Bytes::from_static(b"!!!!")),
        ("application/grpc-web-text", Bytes::from_static(b"AAAAAA")),
        ("application/grpc", Bytes::from_static(b"\0\0\0\0\x09nonsense")),
        ("application/grpc+json", Bytes::from_static(b"\0\0\0\0\x02{}")),
        ("application/json", Bytes::from_static(b"{}")),
    ] {
        let answer = clients.owner.send(Verb::POST, create, Some(content_type), body.clone()).await;
        let shown = format!("{content_type} {body:?}: {} {:?} {}", answer.status, answer.headers, answer.text());
        assert!(!answer.status.is_server_error(), "{shown}");
        // Over gRPC-Web a status of HTTP says nothing: the call must not have been done.
        let grpc_status = answer.header("grpc-status").map(str::to_owned);
        let text = answer.text().to_lowercase();
        assert!(
            answer.status != StatusCode::OK || grpc_status.is_some_and(|s| s != "0") || !text.contains("grpc-status:0"),
            "{shown}"
        );
    }
    assert_eq!(clients.owner.get("/products").await.gives(200)["products"].as_array().map(Vec::len), Some(1));
    is_well(&mut install, &clients).await;
}

async fn refused_grpc_calls_do_not_use_up_a_connection(install: Installation) {
    let channel = grpc::connect(&install.url()).await;
    // More than a server would take of streams that are reset before they are read.
    for number in 0..3_000 {
        let message = Bytes::from(vec![0; number % 50]);
        let outcome =
            grpc::call(&channel, "/paperkey.catalog.v1.CatalogService/ListProducts", message, HeaderMap::new());
        let code = outcome.await.expect_err("nobody may do that").code();
        assert_eq!(code, tonic::Code::Unauthenticated, "after {number} refused calls");
    }
}
