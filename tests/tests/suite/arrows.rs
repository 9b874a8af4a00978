//! Who may know whom: `proto` ← `kit` ← services and gateway ← server, tests, bench. No service knows another, and the
//! gateway knows none.

use std::{
    collections::{BTreeMap, BTreeSet},
    env,
    process::Command,
};

use serde_json::Value;

/// For each crate, the crates of the workspace that it may use.
fn allowed() -> BTreeMap<&'static str, BTreeSet<&'static str>> {
    let service = || BTreeSet::from(["paperkey-proto", "paperkey-kit", "paperkey-migrations"]);
    let everything = BTreeSet::from([
        "paperkey-proto",
        "paperkey-kit",
        "paperkey-migrations",
        "paperkey-auth",
        "paperkey-catalog",
        "paperkey-licensing",
        "paperkey-webhook",
        "paperkey-gateway",
    ]);
    BTreeMap::from([
        ("paperkey-proto", BTreeSet::new()),
        ("paperkey-migrations", BTreeSet::new()),
        ("paperkey-kit", BTreeSet::from(["paperkey-proto"])),
        ("paperkey-auth", service()),
        ("paperkey-catalog", service()),
        ("paperkey-licensing", service()),
        ("paperkey-webhook", service()),
        ("paperkey-dashboard", BTreeSet::new()),
        ("paperkey-gateway", BTreeSet::from(["paperkey-proto", "paperkey-kit", "paperkey-dashboard"])),
        ("paperkey-server", everything),
        // A black box is looked at from outside.
        ("paperkey-tests", BTreeSet::from(["paperkey-proto", "paperkey-kit"])),
        // Makes licences by the million, with keys that are keys.
        ("paperkey-bench", BTreeSet::from(["paperkey-proto", "paperkey-kit", "paperkey-licensing"])),
    ])
}

#[test]
fn no_crate_knows_more_than_it_may() {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.toml");
    let output = Command::new(cargo)
        .args(["metadata", "--no-deps", "--offline", "--format-version", "1", "--manifest-path", manifest])
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("cargo writes JSON");
    let packages = metadata["packages"].as_array().expect("a workspace has packages");
    let ours: BTreeSet<&str> = packages.iter().filter_map(|package| package["name"].as_str()).collect();
    let allowed = allowed();
    assert_eq!(ours, allowed.keys().copied().collect(), "every crate of the workspace has its place");
    let mut wrong = Vec::new();
    for package in packages {
        let name = package["name"].as_str().expect("a package has a name");
        for dependency in package["dependencies"].as_array().expect("a package has dependencies") {
            let uses = dependency["name"].as_str().expect("a dependency has a name");
            // Tests may use what makes test doubles; what is shipped may not.
            let shipped = dependency["kind"] != "dev";
            if ours.contains(uses) && shipped && !allowed[name].contains(uses) {
                wrong.push(format!("{name} → {uses}"));
            }
        }
    }
    assert!(wrong.is_empty(), "these arrows point the wrong way: {}", wrong.join(", "));
}
