//! Mails as files, for an installation without a mail server: only its owner may read them.

use std::{
    fs,
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

/// Writes a mail as `{id}.eml`, whole or not at all.
pub(super) async fn write(folder: PathBuf, id: String, bytes: Vec<u8>) -> io::Result<()> {
    tokio::task::spawn_blocking(move || write_now(&folder, &id, &bytes)).await.map_err(io::Error::other)?
}

fn write_now(folder: &Path, id: &str, bytes: &[u8]) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    let draft = folder.join(format!(".{id}.new"));
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&draft)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&draft, folder.join(format!("{id}.eml")))
}
