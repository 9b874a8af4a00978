//! The rules of fields hold on the wire, whoever sends it.

use paperkey_proto::{
    auth::v1::{LoginRequest, RegisterRequest},
    catalog::v1::{CreateProductRequest, GetProductResponse, ListProductsRequest, Price},
    licensing::v1::{CreateLicenseRequest, ValidateLicenseRequest},
    rules,
    webhook::v1::{CreateWebhookRequest, RecoverDeliveriesRequest},
};
use prost::{Message, Name};
use prost_types::Timestamp;

fn faults<M: Message + Name>(message: &M) -> Vec<(String, String)> {
    match rules::of::<M>().expect("the message has rules").check(&message.encode_to_vec()) {
        Ok(()) => Vec::new(),
        Err(error) => error.violations().iter().map(|v| (v.field.clone(), v.message.clone())).collect(),
    }
}

fn fault(field: &str, message: &str) -> (String, String) {
    (field.to_owned(), message.to_owned())
}

#[test]
fn all_faults_of_a_request_are_named_at_once() {
    let request = RegisterRequest { email: "nobody".into(), password: "short".into(), name: Some("x".repeat(101)) };
    assert_eq!(
        faults(&request),
        [
            fault("email", "must be an email address"),
            fault("password", "must be at least 8 characters long"),
            fault("name", "must be at most 100 characters long"),
        ]
    );
}

#[test]
fn a_required_text_that_is_absent_or_empty_is_required() {
    assert_eq!(faults(&LoginRequest::default()), [fault("email", "is required"), fault("password", "is required")]);
    let empty = ValidateLicenseRequest { license_key: "K".into(), fingerprint: Some(String::new()) };
    assert_eq!(faults(&empty), [fault("fingerprint", "must be at least 1 character long")]);
}

#[test]
fn a_required_time_may_be_any_time() {
    let since = |since| RecoverDeliveriesRequest { webhook_id: "wh_1".into(), since, ..Default::default() };
    assert_eq!(faults(&since(None)), [fault("since", "is required")]);
    // The first of all times is an empty message on the wire, and others are no text.
    for seconds in [0, 1, 1_798_675_200, -1, i64::MAX] {
        assert_eq!(faults(&since(Some(Timestamp { seconds, nanos: 999 }))), [], "{seconds}");
        assert_eq!(faults(&since(Some(Timestamp { seconds, nanos: 0 }))), [], "{seconds}");
    }
}

#[test]
fn a_fault_inside_a_message_or_a_list_is_named_by_its_path() {
    let price = Price { amount: -1, currency: "EURO".into() };
    let request = CreateProductRequest { name: "x".into(), price: Some(price), ..Default::default() };
    assert_eq!(
        faults(&request),
        [fault("price.amount", "must be at least 0"), fault("price.currency", "must be 3 characters long")]
    );
    let events = vec!["license.created".into(), "x".repeat(65), "license.created".into()];
    let request =
        CreateWebhookRequest { product_id: "p".into(), url: "u".into(), events, ..CreateWebhookRequest::default() };
    assert_eq!(
        faults(&request),
        [fault("events[1]", "must be at most 64 characters long"), fault("events[2]", "must not be listed twice")]
    );
    let request = CreateWebhookRequest { product_id: "p".into(), url: "u".into(), ..CreateWebhookRequest::default() };
    assert_eq!(faults(&request), [fault("events", "needs at least 1 item")]);
}

#[test]
fn a_negative_limit_is_refused_and_zero_is_not() {
    let request =
        |max| CreateLicenseRequest { product_id: "p".into(), max_activations: Some(max), ..Default::default() };
    assert_eq!(faults(&request(-1)), [fault("max_activations", "must be at least 0")]);
    assert_eq!(faults(&request(0)), []);
}

#[test]
fn length_is_counted_in_characters() {
    let request =
        |name: String| RegisterRequest {
            email: "a@b.example".into(), password: "ключключ".into(), name: Some(name)
        };
    assert_eq!(faults(&request("é".repeat(100))), []);
}

#[test]
fn odd_email_addresses_are_refused() {
    let request = |email: &str| RegisterRequest { email: email.into(), password: "long enough".into(), name: None };
    for odd in
        ["@b.example", "a@", "a@b", "a b@c.example", "a@b..example", "a@-b.example", "a@b.example\n", "a@b@c.example"]
    {
        assert_eq!(faults(&request(odd)), [fault("email", "must be an email address")], "{odd:?}");
    }
    for good in ["you@example.com", "first.last+tag@sub.example.co.uk", "ü@exämple.de"] {
        assert_eq!(faults(&request(good)), [], "{good:?}");
    }
}

#[test]
fn no_text_holds_a_nul_character() {
    let request = ListProductsRequest { page_token: "a\0b".into(), ..Default::default() };
    assert_eq!(faults(&request), [fault("page_token", "must not contain a NUL character")]);
    let request = CreateProductRequest { name: "a\0".into(), sku: Some("\0".into()), ..Default::default() };
    assert_eq!(faults(&request).len(), 2);
}

#[test]
fn an_answer_is_not_judged_by_the_rules_of_requests() {
    assert!(rules::of::<GetProductResponse>().is_none());
}

#[test]
fn nonsense_on_the_wire_is_refused_without_a_panic() {
    let rules = rules::of::<CreateProductRequest>().unwrap();
    let mut seed = 7_u64;
    for _ in 0..20_000 {
        let bytes: Vec<u8> = (0..seed % 40)
            .map(|_| {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                seed.to_le_bytes()[5]
            })
            .collect();
        seed = seed.wrapping_add(1);
        // Whatever it says, it says it: accepted by chance or refused, never a panic.
        let _ = rules.check(&bytes);
    }
    assert!(rules.check(&[0x0a, 0xff]).is_err(), "a length beyond the end");
    assert!(rules.check(&[0x0a, 0x02, 0xc3, 0x28]).is_err(), "text that is no UTF-8");
}
