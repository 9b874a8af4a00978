//! The whole log, looked at block by block: from the checkpoint of what was removed for its age to the head.
//!
//! It goes on beside a running installation. What is chained meanwhile is looked at as well, and what is removed
//! meanwhile is passed over, since a signed checkpoint then says so.

use std::fmt;

use paperkey_kit::{db::Engine, values::rfc3339};
use paperkey_proto::Error;

use super::head_file::{HeadFile, Witness};
use crate::{
    domain::audit::chain::{ChainKey, Link, Purpose},
    store::{Head, Store, StoredBlock},
};

/// How often the log may grow while it is looked at; then what was there at the beginning has been seen long since.
const MAX_GROWTHS: u32 = 1_000;

/// A log in which nothing is wrong.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AuditReport {
    /// Records in all blocks. A call and what it changed are one record each.
    pub records: u64,
    /// Blocks in the chain.
    pub blocks: u64,
    /// Blocks that came a moment ago and are not chained yet. Their removal would not be seen.
    pub unchained: u64,
    /// When the oldest record was made.
    pub first_ms: Option<i64>,
    /// When the newest record was made.
    pub last_ms: Option<i64>,
    /// Whether the file beside the database could be compared. Without it, an end that was cut off together with its
    /// head would not be seen.
    pub has_witness: bool,
}

/// What is wrong with a log: one sentence, with the place and the time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuditFault(String);

impl fmt::Display for AuditFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for AuditFault {}

/// Ends the look at the first fault.
enum Stop {
    Fault(AuditFault),
    Failed(Error),
}

impl<E: Into<Error>> From<E> for Stop {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

fn fault(text: impl Into<String>) -> Stop {
    Stop::Fault(AuditFault(text.into()))
}

pub(super) async fn verify(store: &Store, file: &HeadFile) -> Result<Result<AuditReport, AuditFault>, Error> {
    // Before the table: the file never says more than the table did.
    let witness = file.read().await?;
    let mut walk = Walk {
        store,
        key: store.chain_key(),
        file,
        witness: None,
        at: Link::origin(),
        at_ms: None,
        report: AuditReport::default(),
    };
    match walk.all(witness).await {
        Ok(()) => Ok(Ok(walk.report)),
        Err(Stop::Fault(fault)) => Ok(Err(fault)),
        Err(Stop::Failed(error)) => Err(error),
    }
}

struct Walk<'a> {
    store: &'a Store,
    key: &'a ChainKey,
    file: &'a HeadFile,
    witness: Option<Link>,
    /// How far it has come.
    at: Link,
    /// When the newest record there was made.
    at_ms: Option<i64>,
    report: AuditReport,
}

impl Walk<'_> {
    async fn all(&mut self, witness: Witness) -> Result<(), Stop> {
        let path = self.file.path().display();
        self.witness = match witness {
            Witness::At(link) => Some(link),
            Witness::Absent => None,
            Witness::Damaged => return Err(fault(format!("{path} is not as it was written"))),
        };
        let Some(head) = self.head().await? else {
            return match &self.witness {
                None => self.unchained().await,
                Some(seen) => Err(fault(format!("the whole log is gone: {path} knows of {} blocks", seen.no))),
            };
        };
        // On PostgreSQL it may lie on another machine.
        let is_here = self.store.engine() == Engine::Sqlite;
        if self.witness.is_none() && head.newest.no > 0 && is_here && !self.file.appears().await? {
            return Err(fault(format!(
                "{path} is gone, which says where the log ends: that nothing was cut off there cannot be known"
            )));
        }
        self.report.has_witness = self.witness.is_some();
        self.at = head.pruned.clone();
        self.compare_with_witness()?;
        let mut target = head;
        for _ in 0..MAX_GROWTHS {
            self.walk_to(target.newest.no).await?;
            if self.at.no == target.newest.no && self.at.mac != target.newest.mac {
                return Err(fault(format!("the head of the log names another block {} than there is", self.at.no)));
            }
            let Some(now) = self.head().await? else { return Err(fault("the head of the log is gone")) };
            if now.newest.no <= self.at.no {
                break;
            }
            target = now;
        }
        if let Some(seen) = self.witness.as_ref().filter(|seen| seen.no > self.at.no) {
            return Err(fault(format!(
                "the end of the log is cut off after block {}{}: {path} knows of {} blocks",
                self.at.no,
                self.after(),
                seen.no
            )));
        }
        self.unchained().await
    }

    /// The head, if it is one of ours and the table keeps to it.
    async fn head(&self) -> Result<Option<Head>, Stop> {
        let (head, summary) = self.store.audit_head().await?;
        let Some(head) = head else {
            return match summary.lowest_no {
                None => Ok(None),
                Some(_) => Err(fault("the head of the log is gone, and there are blocks in its chain")),
            };
        };
        match head.forged {
            Some(Purpose::Head) => return Err(fault("the head of the log is not signed by this installation")),
            Some(Purpose::Checkpoint) => {
                return Err(fault(format!(
                    "the checkpoint at block {}, up to which old blocks are said to have been removed, is not signed \
                     by this installation",
                    head.pruned.no
                )));
            }
            None => {}
        }
        if let Some(no) = summary.highest_no.filter(|no| *no > head.newest.no) {
            return Err(fault(format!(
                "block {no} stands behind the end of the log, which is block {}",
                head.newest.no
            )));
        }
        if let Some(no) = summary.lowest_no.filter(|no| *no <= head.pruned.no) {
            return Err(fault(format!("block {no} stands there, though blocks up to {} were removed", head.pruned.no)));
        }
        Ok(Some(head))
    }

    async fn walk_to(&mut self, no: i64) -> Result<(), Stop> {
        while self.at.no < no {
            let blocks = self.store.chained_from(self.at.no + 1, no).await?;
            let first = blocks.first().and_then(|block| block.link.as_ref()).map(|link| link.no);
            if first != Some(self.at.no + 1) {
                // Removed for its age while we looked, or by somebody else.
                let pruned = self.head().await?.map(|head| head.pruned).filter(|pruned| pruned.no > self.at.no);
                let Some(pruned) = pruned else { return Err(self.gone()) };
                self.at = pruned;
                self.at_ms = None;
                continue;
            }
            for block in &blocks {
                if block.link.as_ref().is_none_or(|link| link.no != self.at.no + 1) {
                    break;
                }
                self.step(block)?;
            }
        }
        Ok(())
    }

    fn step(&mut self, stored: &StoredBlock) -> Result<(), Stop> {
        self.judge_seal(stored)?;
        let next = self.key.link(&self.at, &stored.seal);
        if stored.link.as_ref() != Some(&next) {
            return Err(fault(format!(
                "block {}{} is not the one that was chained there: one was moved, exchanged or inserted",
                next.no,
                made(stored)
            )));
        }
        self.at = next;
        self.at_ms = Some(stored.block.last_ms);
        self.report.blocks += 1;
        self.compare_with_witness()
    }

    fn judge_seal(&mut self, stored: &StoredBlock) -> Result<(), Stop> {
        if self.key.seal(&stored.block)[..] != stored.seal {
            let place = stored.link.as_ref().map_or_else(
                || format!("block {}, which is not chained yet,", stored.block.id),
                |link| format!("block {}", link.no),
            );
            return Err(fault(format!("{place}{} was changed", made(stored))));
        }
        let report = &mut self.report;
        report.records += u64::try_from(stored.block.records).unwrap_or(0);
        report.first_ms = Some(report.first_ms.map_or(stored.block.first_ms, |ms| ms.min(stored.block.first_ms)));
        report.last_ms = Some(report.last_ms.map_or(stored.block.last_ms, |ms| ms.max(stored.block.last_ms)));
        Ok(())
    }

    fn compare_with_witness(&self) -> Result<(), Stop> {
        match &self.witness {
            Some(seen) if seen.no == self.at.no && seen.mac != self.at.mac => Err(fault(format!(
                "block {}{} is another than {} knows: the end of the log was cut off and written anew",
                seen.no,
                self.after(),
                self.file.path().display()
            ))),
            _ => Ok(()),
        }
    }

    async fn unchained(&mut self) -> Result<(), Stop> {
        let mut after = 0;
        loop {
            let blocks = self.store.unchained_after(after).await?;
            let Some(last) = blocks.last() else { return Ok(()) };
            after = last.seq;
            for block in &blocks {
                self.judge_seal(block)?;
                self.report.unchained += 1;
            }
        }
    }

    fn gone(&self) -> Stop {
        fault(format!("block {} is gone{}", self.at.no + 1, self.after()))
    }

    fn after(&self) -> String {
        self.at_ms.map(|ms| format!(", after records of {}", rfc3339(ms))).unwrap_or_default()
    }
}

fn made(stored: &StoredBlock) -> String {
    let block = &stored.block;
    format!(" (records of {} to {})", rfc3339(block.first_ms), rfc3339(block.last_ms))
}
