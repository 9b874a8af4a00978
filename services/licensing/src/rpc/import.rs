//! `ImportLicenses`: a file is read as fast as its lines are written, and reported on as it is read.
//!
//! Some hundred lines make a transaction, which is durable before they are reported on. Nothing is read ahead of
//! what is taken of the report: a caller who does not read it is not read from, and one who goes away leaves what was
//! reported, and at most one transaction more. Over REST the gateway takes some megabytes of it for its caller.
//!
//! Deliberately absent: taking back what was written when a later line is at fault, or the file is cut off. The same
//! file can be sent again, if its lines have keys.

use std::time::Duration;

use paperkey_kit::{principal::Caller, values};
use paperkey_proto::{
    Contract, Error, codec,
    errors::v1::Reason,
    licensing::v1::{ImportLicensesRequest, ImportLicensesResponse},
};
use tokio::time::{Instant, timeout_at};
use tonic::Streaming;

use super::{
    catalog::{Catalog, Known},
    licenses::terms,
};
use crate::{
    domain::{
        Fault,
        csv::{Malformed, Reader, Record},
        file::{Header, Line, REPORT_TYPE, Report},
        license::Draft,
    },
    store::{Act, Failure, Imported, TenantStore},
};

pub(super) const IMPORT: &str = "/paperkey.licensing.v1.LicensingService/ImportLicenses";

/// Lines of one transaction.
const BATCH: usize = 200;
/// Lines of an import.
const MAX_LINES: u64 = 1_000_000;
/// How long the next bytes may keep an import waiting.
const IDLE: Duration = Duration::from_secs(30);
/// How long lines that are there wait for others to share a transaction with.
const LINGER: Duration = Duration::from_millis(200);
/// How often a transaction that met another is tried.
const TRIES: u32 = 5;

/// Where the bytes of the file come from.
struct Pieces {
    stream: Streaming<ImportLicensesRequest>,
    piece: Vec<u8>,
    /// How far it was read.
    at: usize,
    /// How many bytes of the file may still come.
    left: u64,
    /// By when the next must be there.
    patience: Instant,
}

/// What the next bytes are.
enum Next {
    Bytes,
    /// There are none, for the moment.
    None,
    End,
}

impl Pieces {
    /// Waits for more bytes, no longer than until then.
    async fn next(&mut self, until: Option<Instant>) -> Result<Next, Error> {
        loop {
            let deadline = until.map_or(self.patience, |until| until.min(self.patience));
            let Ok(message) = timeout_at(deadline, self.stream.message()).await else {
                return if Instant::now() < self.patience { Ok(Next::None) } else { Err(idle()) };
            };
            let Some(message) = message.map_err(|status| Error::from_status(&status))? else { return Ok(Next::End) };
            let length = message.data.len() as u64;
            let Some(left) = self.left.checked_sub(length) else {
                return Err(Error::new(Reason::BodyTooLarge));
            };
            // What is empty is no sign of life.
            if length > 0 {
                self.left = left;
                self.take(message.data);
                return Ok(Next::Bytes);
            }
        }
    }

    fn take(&mut self, piece: Vec<u8>) {
        self.piece = piece;
        self.at = 0;
        self.patience = Instant::now() + IDLE;
    }

    /// The next record in the bytes that are there.
    fn record(&mut self, reader: &mut Reader) -> Option<Record> {
        let mut rest = self.piece.get(self.at..).unwrap_or_default();
        let record = reader.next(&mut rest);
        self.at = self.piece.len() - rest.len();
        record
    }

    /// Waiting for the database is nobody's idleness.
    fn resume(&mut self) {
        self.patience = Instant::now() + IDLE;
    }
}

fn idle() -> Error {
    Error::new(Reason::Deadline).with_message("The next bytes of the file did not come in time")
}

/// How far an import is.
enum Stage {
    Reading,
    /// Read to its end, and reported on but for the last line of the report.
    Ending,
    /// Cut off, once what was read is written.
    Cut(Error),
    Over,
}

/// An import that is under way.
pub(super) struct Import {
    store: TenantStore,
    catalog: Catalog,
    caller: Caller,
    act: Act,
    pieces: Pieces,
    reader: Reader,
    header: Header,
    product_id: String,
    known: Known,
    report: Report,
    begun: bool,
    stage: Stage,
}

impl Import {
    /// Begins with the first line. What is wrong with that is wrong with the file, and nothing is written.
    pub(super) async fn begin(
        store: TenantStore,
        catalog: Catalog,
        caller: Caller,
        stream: Streaming<ImportLicensesRequest>,
    ) -> Result<Self, Error> {
        let max_bytes = Contract::get().method(IMPORT).map_or(0, |method| u64::from(method.policy.max_body_bytes));
        let patience = Instant::now() + IDLE;
        let mut pieces = Pieces { stream, piece: Vec::new(), at: 0, left: max_bytes, patience };
        let Ok(first) = timeout_at(patience, pieces.stream.message()).await else { return Err(idle()) };
        let first = first.map_err(|status| Error::from_status(&status))?.unwrap_or_default();
        pieces.left = max_bytes.checked_sub(first.data.len() as u64).ok_or_else(|| Error::new(Reason::BodyTooLarge))?;
        pieces.take(first.data);
        let product_id = match (first.product_id, caller.product_id()) {
            (named, Some(bound)) if named.is_empty() => bound.to_owned(),
            (named, _) => named,
        };
        if !product_id.is_empty() {
            catalog.must_have_product(&store, &caller, &product_id).await?;
        }

        let mut reader = Reader::default();
        let first = loop {
            if let Some(record) = pieces.record(&mut reader) {
                break Some(record);
            }
            if let Next::End = pieces.next(None).await? {
                break reader.finish();
            }
        };
        let Some(first) = first else {
            return Err(Error::field("data", "is empty: the first line must name the columns"));
        };
        let names =
            first.cells.map_err(|malformed| Error::field("data", format!("The first line {}", malformed.message())))?;
        let header = Header::read(&names)?;
        if product_id.is_empty() && !header.names_products() {
            return Err(Error::field("product_id", "is required where no column of the file has that name"));
        }
        let act = Act::by(&caller, IMPORT);
        Ok(Self {
            store,
            catalog,
            caller,
            act,
            pieces,
            reader,
            header,
            product_id,
            known: Known::default(),
            report: Report::default(),
            begun: false,
            stage: Stage::Reading,
        })
    }

    /// The next piece of the report; `None` after the last.
    pub(super) async fn piece(&mut self) -> Result<Option<ImportLicensesResponse>, Error> {
        let mut text = String::new();
        while text.is_empty() {
            match std::mem::replace(&mut self.stage, Stage::Over) {
                Stage::Over => return Ok(None),
                Stage::Cut(error) => return Err(error),
                Stage::Ending => self.report.end(&mut text),
                Stage::Reading => {
                    let (records, stage) = self.read().await;
                    self.write(records, &mut text).await?;
                    self.stage = stage;
                }
            }
        }
        let is_first = !std::mem::replace(&mut self.begun, true);
        let content_type = if is_first { REPORT_TYPE.to_owned() } else { String::new() };
        Ok(Some(ImportLicensesResponse { content_type, data: text.into() }))
    }

    /// As many lines as make a transaction, or as there are for now; and how to go on.
    async fn read(&mut self) -> (Vec<Record>, Stage) {
        let mut records = Vec::new();
        let mut until = None;
        loop {
            while let Some(record) = self.pieces.record(&mut self.reader) {
                records.push(record);
                if self.report.lines() + records.len() as u64 > MAX_LINES {
                    return (records, Stage::Ending);
                }
                if records.len() == BATCH {
                    return (records, Stage::Reading);
                }
            }
            if !records.is_empty() && until.is_none() {
                until = Some(Instant::now() + LINGER);
            }
            match self.pieces.next(until).await {
                Ok(Next::Bytes) => {}
                Ok(Next::None) => return (records, Stage::Reading),
                Ok(Next::End) => {
                    records.extend(self.reader.finish());
                    return (records, Stage::Ending);
                }
                Err(error) => return (records, Stage::Cut(error)),
            }
        }
    }

    /// Writes lines, durably, and reports on them.
    async fn write(&mut self, records: Vec<Record>, text: &mut String) -> Result<(), Error> {
        let mut lines = Vec::with_capacity(records.len());
        for (index, record) in (self.report.lines()..).zip(records) {
            let draft = if index < MAX_LINES {
                self.draft(record.cells)
            } else {
                Err(Error::malformed(format!(
                    "An import has at most {MAX_LINES} lines: send this one and those after it in another"
                )))
            };
            lines.push((record.line, draft));
        }
        let drafts = lines.iter().filter_map(|(_, draft)| draft.as_ref().ok());
        self.catalog.look_up(&self.store, &self.caller, &mut self.known, drafts).await?;
        for (_, line) in &mut lines {
            if let Some(fault) = line.as_ref().ok().and_then(|draft| self.known.missing(draft)) {
                *line = Err(refusal(fault));
            }
        }
        let drafts: Vec<Draft> = lines.iter().filter_map(|(_, draft)| draft.as_ref().ok()).cloned().collect();
        let mut outcomes = self.import(drafts).await?.into_iter();
        for (line, draft) in lines {
            let outcome = match draft {
                Ok(_) => outcomes.next(),
                Err(error) => {
                    self.report.failed(text, line, &error);
                    continue;
                }
            };
            match outcome {
                Some(Imported::Created(license)) => self.report.created(text, line, &license.id, license.key.as_ref()),
                Some(Imported::Exists { id, key }) => self.report.exists(text, line, &id, Some(&key)),
                Some(Imported::Refused(fault)) => self.report.failed(text, line, &refusal(fault)),
                None => return Err(Error::internal("a line of an import has no outcome")),
            }
        }
        self.pieces.resume();
        Ok(())
    }

    fn draft(&self, cells: Result<Vec<String>, Malformed>) -> Result<Draft, Error> {
        let cells = cells.map_err(|malformed| Error::malformed(format!("This line {}", malformed.message())))?;
        let Line { request, key, revoked_at } = self.header.line(&cells, &self.product_id)?;
        codec::check(&request)?;
        let product_id = request.product_id.clone();
        let revoked_at_ms = revoked_at.map(|time| values::time_ms("revoked_at", &time)).transpose()?;
        Ok(Draft { product_id, terms: terms(request)?, key, revoked_at_ms })
    }

    async fn import(&self, drafts: Vec<Draft>) -> Result<Vec<Imported>, Error> {
        if drafts.is_empty() {
            return Ok(Vec::new());
        }
        for attempt in 1.. {
            match self.store.import(drafts.clone(), self.act.clone()).await {
                // Nothing of it was kept.
                Err(Failure::Database(error)) if error.is_retryable() && attempt < TRIES => {
                    tokio::time::sleep(LINGER * attempt).await;
                }
                outcome => return Ok(outcome?),
            }
        }
        Ok(Vec::new())
    }
}

fn refusal(fault: Fault) -> Error {
    match fault {
        Fault::NoSuchProduct => Error::from(fault).with_violation("product_id", "must be the id of a product"),
        fault => fault.into(),
    }
}
