//! `paperkey licenses`: many licences from a file and into one.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    fs,
    path::Path,
};

use paperkey_proto::{Error, licensing::v1::ExportLicensesResponse};
use paperkey_tests::{
    Installation, StandIn, on_both_kinds,
    process::{self, Ended},
};
use serde_json::Value;
use tempfile::TempDir;
use tonic::Status;

on_both_kinds! {
    a_thousand_lines_are_imported_once_and_exported_again,
    a_line_that_is_refused_is_said_and_the_others_are_issued,
}

async fn licenses(folder: &Path, api: &str, key: &str, arguments: &[&str], input: &str) -> Ended {
    let environment = [("PAPERKEY_URL", api), ("PAPERKEY_API_KEY", key)];
    let environment: Vec<_> =
        environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    let mut all = vec!["licenses"];
    all.extend(arguments);
    process::run(process::command(&all, &environment, folder), input).await
}

fn names(folder: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(folder).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

// --- against a stand-in ----------------------------------------------------------------------------------------------

fn piece(text: &str) -> ExportLicensesResponse {
    ExportLicensesResponse { data: text.as_bytes().to_vec(), ..ExportLicensesResponse::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_goes_in_pieces_and_the_report_is_kept() {
    let (api, folder) = (StandIn::exporting(Vec::new()).await, TempDir::new().unwrap());
    let mut file = "email\n".to_owned();
    for n in 0..20_000 {
        writeln!(file, "somebody-{n}@example.com").unwrap();
    }
    fs::write(folder.path().join("in.csv"), &file).unwrap();
    let arguments = ["import", "in.csv", "--product", "prod_1", "--report", "report.ndjson"];
    let ended = licenses(folder.path(), api.url(), "pb_live_x", &arguments, "").await;
    ended.succeeded();
    assert!(ended.err.contains("20000 lines: 20000 created"), "{}", ended.err);
    assert_eq!(fs::read_to_string(folder.path().join("report.ndjson")).unwrap().lines().count(), 20_001);
    let pieces = api.imported();
    let whole: Vec<u8> = pieces.iter().flat_map(|piece| piece.data.clone()).collect();
    assert_eq!(whole, file.as_bytes());
    assert!(pieces.len() > 5 && pieces.iter().all(|piece| piece.data.len() <= 64 * 1024));
    assert_eq!(pieces.iter().filter(|piece| piece.product_id == "prod_1").count(), 1, "the first names the product");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_failed_is_shown_and_makes_the_command_fail() {
    let (api, folder) = (StandIn::exporting(Vec::new()).await, TempDir::new().unwrap());
    let arguments = ["import", "-", "--product", "prod_1"];
    let ended = licenses(folder.path(), api.url(), "pb_live_x", &arguments, "email\na@b.c\nbad\n").await;
    assert_eq!((ended.failed(), ended.status.code()), (ended.err.trim(), Some(1)));
    assert!(ended.err.contains("\"line\":3") && !ended.err.contains("\"line\":2"), "{}", ended.err);
    assert!(ended.err.contains("2 lines: 1 created, 1 failed"), "{}", ended.err);
    let ended = licenses(folder.path(), api.url(), "pb_live_x", &arguments, "email\na@b.c\ncut\n").await;
    assert!(ended.failed().contains("the report is cut off"), "{ended:?}");
    assert!(ended.err.contains("of the others, those after line 3"), "{}", ended.err);
    licenses(folder.path(), api.url(), "pb_live_x", &["import", "missing.csv"], "").await.failed();
    let kept = [&arguments[..], &["--report", "report.ndjson"]].concat();
    licenses(folder.path(), "http://127.0.0.1:1", "pb_live_x", &kept, "email\n").await.failed();
    assert_eq!(names(folder.path()), BTreeSet::new(), "it would be in the way");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_that_is_cut_off_leaves_nothing_that_looks_whole() {
    let folder = TempDir::new().unwrap();
    let cut = vec![Ok(piece("id,key\nlic_1,K\n")), Err(Status::from(Error::internal("it broke")))];
    let api = StandIn::exporting(cut).await;
    let ended = licenses(folder.path(), api.url(), "pb_live_x", &["export", "-o", "out.csv"], "").await;
    assert_eq!(ended.status.code(), Some(1));
    assert_eq!(names(folder.path()), BTreeSet::new());

    let api = StandIn::exporting(vec![Ok(piece("id,key\nlic")), Ok(piece("_1,K\n"))]).await;
    let ended = licenses(folder.path(), api.url(), "pb_live_x", &["export", "-o", "out.csv"], "").await;
    ended.succeeded();
    assert!(ended.err.contains("1 licence"), "{}", ended.err);
    assert_eq!(fs::read_to_string(folder.path().join("out.csv")).unwrap(), "id,key\nlic_1,K\n");
    assert_eq!(names(folder.path()).len(), 1);
    let ended = licenses(folder.path(), api.url(), "pb_live_x", &["export"], "").await;
    assert_eq!(ended.succeeded(), "id,key\nlic_1,K");
}

// --- against an installation -----------------------------------------------------------------------------------------

async fn a_thousand_lines_are_imported_once_and_exported_again(install: Installation) {
    let owner = install.register().await;
    let (product, copy) = (owner.create_product("App").await, owner.create_product("Copy").await);
    let (folder, url) = (TempDir::new().unwrap(), install.url());
    let mut file = "email,max_activations,metadata\n".to_owned();
    for n in 0..1_000 {
        writeln!(file, "buyer-{n}@example.com,{},\"{{\"\"n\"\":{n}}}\"", n % 5 + 1).unwrap();
    }
    fs::write(folder.path().join("in.csv"), &file).unwrap();
    let arguments = ["import", "in.csv", "--product", &product.id, "--report", "report.ndjson"];
    let ended = licenses(folder.path(), &url, &owner.live_key, &arguments, "").await;
    ended.succeeded();
    assert!(ended.err.contains("1000 lines"), "{}", ended.err);
    let report = fs::read_to_string(folder.path().join("report.ndjson")).unwrap();
    assert_eq!(report.lines().filter(|line| serde_json::from_str::<Value>(line).is_ok()).count(), 1_001);

    let exported = async |product: &str, file: &str| {
        let arguments = ["export", "--format", "ndjson", "--product", product, "-o", file];
        let ended = licenses(folder.path(), &url, &owner.live_key, &arguments, "").await;
        ended.succeeded();
        let text = fs::read_to_string(folder.path().join(file)).unwrap();
        let licenses = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let by_email: BTreeMap<String, Value> =
            licenses.map(|license| (license["email"].as_str().unwrap().to_owned(), license)).collect();
        by_email
    };
    let first = exported(&product.id, "first.ndjson").await;
    assert_eq!(first.len(), 1_000);
    assert_eq!(first["buyer-7@example.com"]["metadata"]["n"], 7);

    // What an export has written, an import takes: the same licences in another product, and never twice.
    let arguments = ["export", "--product", product.id.as_str(), "-o", "all.csv"];
    licenses(folder.path(), &url, &owner.live_key, &arguments, "").await.succeeded();
    let csv = fs::read_to_string(folder.path().join("all.csv")).unwrap();
    assert_eq!(csv.lines().count(), 1_001);
    let arguments = ["import", "all.csv"];
    licenses(folder.path(), &url, &owner.live_key, &arguments, "").await.succeeded();
    assert_eq!(exported(&product.id, "again.ndjson").await, first, "nothing was issued twice");
    assert_eq!(exported(&copy.id, "copy.ndjson").await.len(), 0);
}

async fn a_line_that_is_refused_is_said_and_the_others_are_issued(install: Installation) {
    let owner = install.register().await;
    let product = owner.create_product("App").await;
    let (folder, url) = (TempDir::new().unwrap(), install.url());
    let file = "email,max_activations\na@example.com,1\nb@example.com,none at all\nc@example.com,3\n";
    let arguments = ["import", "-", "--product", &product.id];
    let ended = licenses(folder.path(), &url, &owner.live_key, &arguments, file).await;
    assert_eq!(ended.status.code(), Some(1));
    assert!(ended.failed().contains("1 line failed"), "{ended:?}");
    let ended = licenses(folder.path(), &url, &owner.live_key, &["export"], "").await;
    let csv = ended.succeeded();
    assert!(csv.contains("a@example.com") && csv.contains("c@example.com") && !csv.contains("b@example.com"), "{csv}");
    for key in ["pb_live_nonsense", product.public_key.as_str()] {
        let ended = licenses(folder.path(), &url, key, &arguments, file).await;
        assert_eq!(ended.status.code(), Some(1), "{ended:?}");
    }
}
