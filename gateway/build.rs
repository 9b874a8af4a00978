//! Compiles what is spoken with other servers and is no part of the contract.

use std::{env, error::Error, fs, path::PathBuf};

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    let files = protox::compile(["external_auth.proto"], ["proto/envoy"])?;
    tonic_prost_build::configure().build_client(false).compile_fds(files.clone())?;
    // The client is for tests alone.
    let client = PathBuf::from(env::var("OUT_DIR")?).join("client");
    fs::create_dir_all(&client)?;
    tonic_prost_build::configure().build_server(false).out_dir(client).compile_fds(files)?;
    Ok(())
}
