//! The contract refuses to leave anything open, and what it says is consistent.

use std::{collections::HashSet, fs, path::Path};

use paperkey_proto::{
    Contract, DESCRIPTORS,
    contract::{Repeats, pool},
    error,
    errors::v1::Reason,
    options::v1::{Caller, Surface},
};
use prost_reflect::DescriptorPool;
use protox::file::{ChainFileResolver, File, FileResolver, GoogleFileResolver, IncludeFileResolver};

/// A contract of one service, written as a test, compiled against the real options.
struct Draft(String);

impl FileResolver for Draft {
    fn open_file(&self, name: &str) -> Result<File, protox::Error> {
        if name == "paperkey/draft/v1/draft.proto" {
            File::from_source(name, &self.0)
        } else {
            Err(protox::Error::file_not_found(name))
        }
    }
}

const GOOD_POLICY: &str = "callers: [CALLER_ACCOUNT] scope: SCOPE_PRODUCTS_READ tenant: TENANT_CALLER \
                           rate_classes: [RATE_CLASS_PER_IP] visibility: VISIBILITY_PUBLIC";

fn method(name: &str, http: &str, policy: &str) -> String {
    let repeats = if http.starts_with("get:") { "option idempotency_level = NO_SIDE_EFFECTS;" } else { "" };
    let http = if http.is_empty() { String::new() } else { format!("option (google.api.http) = {{{http}}};") };
    let policy =
        if policy.is_empty() { String::new() } else { format!("option (paperkey.options.v1.policy) = {{{policy}}};") };
    format!("rpc {name}(Request) returns (Response) {{ {http} {repeats} {policy} }}")
}

fn problems_of(methods: &[String]) -> Vec<String> {
    let source = format!(
        "syntax = \"proto3\"; package paperkey.draft.v1;
         import \"google/api/annotations.proto\"; import \"google/protobuf/field_mask.proto\";
         import \"paperkey/options/v1/options.proto\";
         service DraftService {{ {} }}
         message Request {{ string id = 1; int32 number = 2; }} message Response {{ string id = 1; }}
         message Token {{ string token = 1 [(paperkey.options.v1.presentation).session = true]; }}
         message Number {{ int32 token = 1 [(paperkey.options.v1.presentation).session = true]; }}
         message Many {{ repeated string token = 1 [(paperkey.options.v1.presentation).session = true]; }}
         message Nested {{ repeated Token tokens = 1; }}",
        methods.join("\n")
    );
    let mut resolver = ChainFileResolver::new();
    resolver.add(Draft(source));
    resolver.add(IncludeFileResolver::new(env!("CARGO_MANIFEST_DIR").into()));
    resolver.add(GoogleFileResolver::new());
    let mut compiler = protox::Compiler::with_file_resolver(resolver);
    compiler.include_imports(true);
    compiler.open_file("paperkey/draft/v1/draft.proto").unwrap();
    let bytes = compiler.encode_file_descriptor_set();
    match Contract::read(&DescriptorPool::decode(bytes.as_slice()).unwrap()) {
        Ok(_) => Vec::new(),
        Err(problems) => problems.0,
    }
}

#[track_caller]
fn assert_refused(methods: &[String], because: &str) {
    let problems = problems_of(methods);
    assert!(problems.iter().any(|problem| problem.contains(because)), "expected “{because}” among {problems:?}");
}

#[test]
fn a_sound_draft_is_accepted() {
    assert_eq!(problems_of(&[method("GetThing", "get: \"/products/{id}\"", GOOD_POLICY)]), Vec::<String>::new());
}

#[test]
fn a_method_without_policy_is_refused() {
    assert_refused(&[method("GetThing", "get: \"/products/{id}\"", "")], "has no policy");
    assert_refused(&[method("GetThing", "", "visibility: VISIBILITY_PUBLIC")], "names no caller");
}

#[test]
fn two_methods_on_one_route_are_refused() {
    let methods = [
        method("GetThing", "get: \"/products/{id}\"", GOOD_POLICY),
        method("GetOther", "get: \"/products/x\" additional_bindings { get: \"/products/{id}\" }", GOOD_POLICY),
    ];
    assert_refused(&methods, "shares the route GET /products/{} with");
}

#[test]
fn a_path_variable_without_a_text_field_is_refused() {
    assert_refused(&[method("GetThing", "get: \"/products/{other}\"", GOOD_POLICY)], "path variable {other}");
    assert_refused(&[method("GetThing", "get: \"/products/{number}\"", GOOD_POLICY)], "path variable {number}");
}

#[test]
fn a_scope_without_a_tenant_and_a_tenant_without_a_scope_are_refused() {
    let policy = GOOD_POLICY.replace("TENANT_CALLER", "TENANT_NONE");
    assert_refused(&[method("GetThing", "get: \"/products/{id}\"", &policy)], "but no tenant");
    let policy = GOOD_POLICY.replace("tenant: TENANT_CALLER", "");
    assert_refused(&[method("GetThing", "get: \"/products/{id}\"", &policy)], "does not say whose data");
    let policy = GOOD_POLICY.replace("scope: SCOPE_PRODUCTS_READ", "");
    assert_refused(&[method("GetThing", "get: \"/products/{id}\"", &policy)], "without a scope");
}

#[test]
fn scopes_and_rate_classes_that_nobody_defines_are_refused() {
    // Enums are open on the wire: a later contract may name what this one does not know.
    let scope = GOOD_POLICY.replace("SCOPE_PRODUCTS_READ", "SCOPE_UNSPECIFIED");
    assert_refused(&[method("GetThing", "get: \"/products/{id}\"", &scope)], "without a scope");
    let class = GOOD_POLICY.replace("RATE_CLASS_PER_IP", "RATE_CLASS_UNSPECIFIED");
    assert_refused(&[method("GetThing", "get: \"/products/{id}\"", &class)], "rate class that nobody defines");
    let none = GOOD_POLICY.replace("rate_classes: [RATE_CLASS_PER_IP]", "");
    assert_refused(&[method("GetThing", "get: \"/products/{id}\"", &none)], "counts against no rate class");
    let subject = GOOD_POLICY.replace("RATE_CLASS_PER_IP", "RATE_CLASS_LICENSE_VALIDATE");
    assert_refused(&[method("GetThing", "get: \"/products/{id}\"", &subject)], "rate subject that is no text field");
}

#[test]
fn a_route_that_makes_no_sense_is_refused() {
    assert_refused(&[method("GetThing", "get: \"/elsewhere/{id}\"", GOOD_POLICY)], "belongs to no surface");
    assert_refused(&[method("GetThing", "get: \"/v1/status/{id}\"", GOOD_POLICY)], "accepts none of its callers");
    assert_refused(&[method("SetThing", "post: \"/products/{id}\"", GOOD_POLICY)], "none on a verb with one");
    assert_refused(&[method("GetThing", "get: \"/products/{id}\" body: \"*\"", GOOD_POLICY)], "verb without one");
    assert_refused(&[method("SetThing", "patch: \"/products/{id}\" body: \"*\"", GOOD_POLICY)], "no field mask");
    let code = format!("{GOOD_POLICY} success_code: 204");
    assert_refused(&[method("GetThing", "get: \"/products/{id}\"", &code)], "fields that nobody would see");
    let code = format!("{GOOD_POLICY} success_code: 302");
    assert_refused(&[method("GetThing", "get: \"/products/{id}\"", &code)], "success code other than");
}

#[test]
fn an_internal_method_has_no_route_and_a_public_one_serves_people() {
    let internal = "callers: [CALLER_SERVICE] tenant: TENANT_NONE visibility: VISIBILITY_INTERNAL";
    assert_refused(&[method("GetThing", "get: \"/products/{id}\"", internal)], "is internal and has a REST route");
    let public = GOOD_POLICY.replace("CALLER_ACCOUNT", "CALLER_SERVICE");
    assert_refused(&[method("GetThing", "", &public)], "serves only other processes");
}

#[test]
fn a_method_takes_an_idempotency_key_only_where_one_answer_is_kept_for_a_credential() {
    let refused = "takes an Idempotency-Key, and is not";
    let policy = format!("{GOOD_POLICY} idempotent: true");
    assert_eq!(problems_of(&[method("GetThing", "get: \"/products/{id}\"", &policy)]), Vec::<String>::new());
    let open = "callers: [CALLER_ACCOUNT, CALLER_ANYONE] tenant: TENANT_NONE rate_classes: [RATE_CLASS_PER_IP] \
                visibility: VISIBILITY_PUBLIC idempotent: true";
    assert_refused(&[method("GetThing", "get: \"/products/{id}\"", open)], refused);
    let internal = "callers: [CALLER_SERVICE] tenant: TENANT_NONE visibility: VISIBILITY_INTERNAL idempotent: true";
    assert_refused(&[method("GetThing", "", internal)], refused);
    let streaming = method("GetThing", "", &policy).replace("returns (", "returns (stream ");
    assert_refused(&[streaming], refused);
}

/// What these say is not a change: a look at a key, and at a licence. And who has left or signed out is not known there
/// any more, so nobody could be told the answer again.
const NEVER_AGAIN: [&str; 4] = ["VerifyKey", "ValidateLicense", "LeaveTeam", "Logout"];

#[test]
fn a_session_is_one_text_of_the_one_answer_of_a_public_method() {
    let answers = |with: &str, policy: &str| {
        method("SignIn", "post: \"/auth/sign-in\" body: \"*\"", policy).replace("returns (Response)", with)
    };
    let ends = format!("{GOOD_POLICY} ends_session: true");
    assert_eq!(problems_of(&[answers("returns (Token)", GOOD_POLICY)]), Vec::<String>::new());
    assert_eq!(problems_of(&[answers("returns (Response)", &ends)]), Vec::<String>::new());
    for odd in ["returns (Number)", "returns (Many)"] {
        assert_refused(&[answers(odd, GOOD_POLICY)], "a session that is not one field of text");
    }
    let elsewhere = "a session elsewhere than among the fields of its answer";
    assert_refused(&[answers("returns (Nested)", GOOD_POLICY)], elsewhere);
    assert_refused(&[answers("returns (Response)", GOOD_POLICY).replace("(Request)", "(Token)")], elsewhere);
    assert_refused(&[answers("returns (Token)", &ends)], "its own policy says has ended");
    let not_one = "is not a public method of one answer";
    assert_refused(&[answers("returns (stream Token)", GOOD_POLICY)], not_one);
    assert_refused(&[answers("returns (stream Response)", &ends)], not_one);
    let internal = GOOD_POLICY.replace("VISIBILITY_PUBLIC", "VISIBILITY_INTERNAL");
    assert_refused(&[method("SignIn", "", &internal).replace("(Response)", "(Token)")], not_one);
}

#[test]
fn every_post_that_changes_something_for_a_credential_takes_an_idempotency_key() {
    for method in Contract::get().methods().iter().filter(|method| method.is_public()) {
        let posts = method.routes.iter().any(|route| route.verb == http::Method::POST);
        let streams = method.descriptor.is_client_streaming() || method.descriptor.is_server_streaming();
        let never_again = NEVER_AGAIN.contains(&method.descriptor.name());
        let expected = posts && !streams && !never_again && !method.serves(Caller::Anyone);
        assert_eq!(method.policy.idempotent, expected, "{}", method.path);
    }
}

#[test]
fn what_reads_says_so_and_what_changes_something_does_not() {
    let silent = method("GetThing", "get: \"/products/{id}\"", GOOD_POLICY).replace("NO_SIDE_EFFECTS", "IDEMPOTENT");
    assert_refused(&[silent], "does not say NO_SIDE_EFFECTS");
    let posted = method("GetThing", "get: \"/products/{id}\"", GOOD_POLICY).replace("{get:", "{body: \"*\" post:");
    assert_refused(&[posted], "says NO_SIDE_EFFECTS, and is not read over REST");
    let writes = GOOD_POLICY.replace("PRODUCTS_READ", "PRODUCTS_WRITE");
    let writes = method("GetThing", "get: \"/products/{id}\"", &writes);
    assert_refused(&[writes], "says NO_SIDE_EFFECTS, and has a scope that writes");
}

/// Whatever else is sent again when an answer is lost needs a reason in its comment, and to be counted here.
#[test]
fn what_may_be_sent_again_is_known() {
    let methods = Contract::get().methods().iter();
    let idempotent: HashSet<&str> = methods
        .filter(|method| method.repeats == Repeats::ChangesNothingMore)
        .map(|method| method.descriptor.name())
        .collect();
    let expected = [
        "Authenticate",
        "RecordKeyUses",
        "ConsumeUnits",
        "RefundUnits",
        "RecordAudit",
        "IngestEvents",
        "ValidateLicense",
    ];
    assert_eq!(idempotent, HashSet::from(expected));
}

#[test]
fn every_public_method_of_the_contract_has_a_route_and_a_comment() {
    let contract = Contract::get();
    assert!(contract.methods().len() > 20, "the contract is read");
    for method in contract.methods().iter().filter(|method| method.is_public()) {
        assert!(!method.routes.is_empty(), "{} has no route", method.path);
        let file = method.descriptor.parent_file();
        let path = method.descriptor.path();
        let info = file.file_descriptor_proto().source_code_info.as_ref().expect("comments are kept");
        let comment =
            info.location.iter().find(|location| location.path == path).and_then(|l| l.leading_comments.as_deref());
        assert!(comment.is_some_and(|comment| comment.trim().len() > 10), "{} has no comment", method.path);
    }
}

#[test]
fn a_path_belongs_to_the_surface_with_the_longest_prefix() {
    let contract = Contract::get();
    let surface = |path: &str| contract.surface_of(path).map(|entry| entry.surface);
    assert_eq!(surface("/products/prod_1/webhooks"), Some(Surface::Dashboard));
    assert_eq!(surface("/v1/licenses/validate"), Some(Surface::Client));
    assert_eq!(surface("/v1/licensesque"), Some(Surface::Platform));
    assert_eq!(surface("/v1/status"), Some(Surface::Platform));
    assert_eq!(surface("/api/v1/products"), Some(Surface::Team));
    assert_eq!(surface("/productsque"), None);
    assert_eq!(surface("/"), None);
}

#[test]
fn the_catalogue_has_a_whole_entry_for_every_reason() {
    let reasons = pool().get_enum_by_name("paperkey.errors.v1.Reason").unwrap();
    let (mut agent_codes, mut typed_codes) = (HashSet::new(), HashSet::new());
    let mut count = 0;
    for value in reasons.values().filter(|value| value.number() != 0) {
        let entry = error::entry(Reason::try_from(value.number()).unwrap());
        let name = value.name();
        assert!((400..=599).contains(&entry.http_status), "{name} has no HTTP status");
        assert!(entry.grpc_code != 0, "{name} has no gRPC code");
        for text in [&entry.flat_code, &entry.typed_code, &entry.r#type, &entry.message] {
            assert!(!text.is_empty(), "{name} says too little");
        }
        assert!(entry.agent_message.len() > 20, "{name} does not tell an agent what to do");
        assert!(entry.cause.len() > 20, "{name} does not tell a person why");
        assert!(entry.agent_code.starts_with("PB_"), "{name} has no agent code");
        assert!(agent_codes.insert(entry.agent_code.clone()), "{name} shares its page with another");
        assert!(typed_codes.insert(entry.typed_code.clone()), "{name} shares its code with another");
        let pace = matches!(entry.http_status, 429 | 500..);
        assert!(!entry.retryable || pace, "{name} can be retried, and nothing would be different");
        count += 1;
    }
    // Every reason of the specification; "license not usable" is two, as it has two codes.
    assert_eq!(count, 24);
    assert_eq!(error::catalogue().count(), count);
}

#[test]
fn a_method_fails_for_no_reason_that_nobody_defines() {
    let policy = format!("{GOOD_POLICY} reasons: [REASON_CONFLICT, REASON_UNSPECIFIED]");
    assert_refused(&[method("GetThing", "get: \"/products/{id}\"", &policy)], "fails for a reason");
    let policy = format!("{GOOD_POLICY} reasons: [REASON_CONFLICT]");
    assert_eq!(problems_of(&[method("GetThing", "get: \"/products/{id}\"", &policy)]), Vec::<String>::new());
}

#[test]
fn no_caller_can_hold_what_nobody_checks() {
    for entry in Contract::get().surfaces() {
        for caller in entry.options.callers() {
            assert!(!matches!(caller, Caller::Unspecified | Caller::Service), "{:?}", entry.surface);
        }
    }
}

#[test]
fn the_files_on_disk_are_the_ones_compiled_in() {
    let names: HashSet<String> = pool().files().map(|file| file.name().to_owned()).collect();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for entry in fs::read_dir(root.join("paperkey")).unwrap() {
        for file in fs::read_dir(entry.unwrap().path().join("v1")).unwrap() {
            let path = file.unwrap().path();
            let name = path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
            assert!(names.contains(&name), "{name}");
        }
    }
    assert!(!DESCRIPTORS.is_empty());
}
