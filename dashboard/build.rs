//! Compresses what stands in `dist/` and `reference/` and writes a table of it.
//!
//! `dist/` is built by `scripts/dashboard` and kept in the repository, so a build of Paperkey needs no Node. What stands in
//! `reference/` is written by hand, and served as it is.

use std::{
    env,
    error::Error,
    fmt::Write as _,
    fs,
    io::Write as _,
    path::{Path, PathBuf},
};

use flate2::{Compression, write::GzEncoder};
use sha2::{Digest as _, Sha256};

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=dist");
    println!("cargo::rerun-if-changed=reference");
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let mut found = Vec::new();
    for folder in ["dist", "reference"] {
        collect(Path::new(folder), &mut found)?;
    }
    let mut files = Vec::with_capacity(found.len());
    for file in found {
        let name =
            file.strip_prefix("dist").unwrap_or(&file).to_str().ok_or("a name that is no text")?.replace('\\', "/");
        files.push((name, file));
    }
    // The order of a table that is searched by halves: that of the names, byte by byte.
    files.sort();
    let mut table = String::from("&[\n");
    for (at, (name, file)) in files.iter().enumerate() {
        let bytes = fs::read(file)?;
        let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
        encoder.write_all(&bytes)?;
        let compressed = out.join(format!("{at}.gz"));
        fs::write(&compressed, encoder.finish()?)?;
        let digest = Sha256::digest(&bytes);
        let tag = digest.iter().take(12).fold(String::new(), |tag, byte| format!("{tag}{byte:02x}"));
        writeln!(
            table,
            "Asset {{ path: {name:?}, tag: \"W/\\\"{tag}\\\"\", gzip: include_bytes!({:?}), bytes: {}, \
             plain: {{ static PLAIN: Plain = Plain::new(); &PLAIN }} }},",
            compressed.to_str().ok_or("a name that is no text")?,
            separated(bytes.len())
        )?;
    }
    table.push(']');
    fs::write(out.join("assets.rs"), table)?;
    Ok(())
}

/// A number as code writes it, such as `4_353_277`.
fn separated(number: usize) -> String {
    let digits = number.to_string();
    let groups: Vec<&str> =
        digits.as_bytes().rchunks(3).rev().filter_map(|group| std::str::from_utf8(group).ok()).collect();
    groups.join("_")
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) -> Result<(), Box<dyn Error>> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() { collect(&path, files)? } else { files.push(path) }
    }
    Ok(())
}
