//! The head of the chain in a file beside the database, so that whoever can write to the database alone cannot cut off
//! its end unseen.
//!
//! The file only goes forward, and only along the chain: where the block that it names is no longer the one that it was,
//! it stays as it is, as a witness. It may lag behind the table, by the moment after a commit, or for long where
//! another process of a fleet keeps the chain.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD as BASE64};
use paperkey_proto::Error;

use crate::{
    domain::audit::chain::{ChainKey, Link, Purpose},
    store::Store,
};

const NAME: &str = "audit-head";
/// What the line begins with.
const FORM: &str = "v1";

/// How often, and how far apart, a file is looked for that may be about to be written.
const LOOKS: u32 = 20;
const LOOK_PAUSE: Duration = Duration::from_millis(50);

/// The file.
#[derive(Clone, Debug)]
pub(super) struct HeadFile {
    path: PathBuf,
    key: ChainKey,
}

/// What the file says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Witness {
    /// There is none.
    Absent,
    /// It was not written by us, or only in part.
    Damaged,
    /// The chain was there.
    At(Link),
}

/// Whether the file followed the chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Moved {
    /// It says the same as the table now, or what comes later.
    Forward,
    /// What it says does not lie on the chain.
    Doubted,
}

impl HeadFile {
    pub(super) fn new(folder: &Path, key: ChainKey) -> Self {
        Self { path: folder.join(NAME), key }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// What the file says.
    pub(super) async fn read(&self) -> Result<Witness, Error> {
        let this = self.clone();
        blocking(move || this.read_now()).await
    }

    /// Whether there is one, or comes to be in a moment: the first is written after the commit that it tells of.
    pub(super) async fn appears(&self) -> Result<bool, Error> {
        for _ in 0..LOOKS {
            if !matches!(self.read().await?, Witness::Absent) {
                return Ok(true);
            }
            tokio::time::sleep(LOOK_PAUSE).await;
        }
        Ok(false)
    }

    fn read_now(&self) -> io::Result<Witness> {
        match fs::read(&self.path) {
            Ok(bytes) => Ok(self.parse(&bytes).map_or(Witness::Damaged, Witness::At)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Witness::Absent),
            Err(error) => Err(error),
        }
    }

    fn parse(&self, bytes: &[u8]) -> Option<Link> {
        let mut words = std::str::from_utf8(bytes).ok()?.strip_suffix('\n')?.split(' ');
        let (form, no, mac, signature) = (words.next()?, words.next()?, words.next()?, words.next()?);
        if form != FORM || words.next().is_some() {
            return None;
        }
        let link = Link { no: no.parse().ok()?, mac: BASE64.decode(mac).ok()? };
        self.key.is_signed(Purpose::Head, &link, &BASE64.decode(signature).ok()?).then_some(link)
    }

    /// Follows the chain to its newest block.
    pub(super) async fn advance(&self, store: &Store, newest: Link) -> Result<Moved, Error> {
        match self.read().await? {
            Witness::Damaged => return Ok(Moved::Doubted),
            Witness::Absent => {}
            Witness::At(seen) if seen == newest => return Ok(Moved::Forward),
            Witness::At(seen) => {
                if !lies_on_chain(store, &seen).await? {
                    return Ok(Moved::Doubted);
                }
            }
        }
        let this = self.clone();
        blocking(move || this.write(&newest)).await?;
        Ok(Moved::Forward)
    }

    fn write(&self, link: &Link) -> io::Result<()> {
        // One at a time, or a slow one would take the file back.
        let lock = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(self.beside("lock"))?;
        lock.lock()?;
        if let Witness::At(seen) = self.read_now()?
            && seen.no >= link.no
        {
            return Ok(());
        }
        let signature = self.key.sign(Purpose::Head, link);
        let line = format!("{FORM} {} {} {}\n", link.no, BASE64.encode(&link.mac), BASE64.encode(signature));
        let draft = self.beside("new");
        let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&draft)?;
        file.write_all(line.as_bytes())?;
        file.sync_all()?;
        fs::rename(draft, &self.path)?;
        if let Some(folder) = self.path.parent() {
            File::open(folder)?.sync_all()?;
        }
        Ok(())
    }

    fn beside(&self, extension: &str) -> PathBuf {
        self.path.with_extension(extension)
    }
}

/// Whether a place that was on the chain still is. What was removed for its age was: its checkpoint is signed.
async fn lies_on_chain(store: &Store, seen: &Link) -> Result<bool, Error> {
    if let Some(link) = store.link_of(seen.no).await? {
        return Ok(link == *seen);
    }
    let (head, _) = store.audit_head().await?;
    Ok(head.is_some_and(|head| head.forged.is_none() && head.pruned.no >= seen.no))
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> Result<T, Error> {
    tokio::task::spawn_blocking(work).await.map_err(Error::internal)?.map_err(Error::internal)
}
