//! `AuditLogService` and `AuditIntakeService`: the audit log.

use std::pin::Pin;

use futures_util::{Stream, stream};
use paperkey_kit::{
    clock::Clock,
    principal::Caller,
    values::{Page, time_ms, timestamp},
};
use paperkey_proto::{
    Error,
    auth::v1::{
        AuditActor, AuditEntry, ExportAuditLogsRequest, ExportAuditLogsResponse, ListAuditLogsRequest,
        ListAuditLogsResponse, RecordAuditRequest, RecordAuditResponse,
        audit_intake_service_server::AuditIntakeService, audit_log_service_server::AuditLogService,
    },
};
use prost_types::Timestamp;
use tonic::{Request, Response, Status};

use super::teams::own_team;
use crate::{
    audit::{Query, Reader},
    domain::{
        audit::{
            block::blocks_of,
            entry::{Cursor, Entry, Filter},
            export::{Format, duration_ms, some},
        },
        could_be_id,
    },
    store::{Store, Stretch},
};

/// Records of one batch at most.
const MAX_RECORDS: usize = 2_000;
/// A piece of an export ends where it has grown to this, in bytes.
const PIECE: usize = 48 * 1_024;

/// The handlers.
#[derive(Clone, Debug)]
pub(crate) struct Handler {
    pub(crate) store: Store,
    pub(crate) clock: Clock,
}

#[tonic::async_trait]
impl AuditLogService for Handler {
    type ExportAuditLogsStream = Pin<Box<dyn Stream<Item = Result<ExportAuditLogsResponse, Status>> + Send>>;

    async fn list_audit_logs(
        &self,
        request: Request<ListAuditLogsRequest>,
    ) -> Result<Response<ListAuditLogsResponse>, Status> {
        let caller = Caller::of(&request)?;
        let ListAuditLogsRequest { team_id, since, until, actor, key, method, status, page_size, page_token } =
            request.into_inner();
        let query = Query {
            team_id: own_team(&caller, &team_id)?,
            within: within(since.as_ref(), until.as_ref())?,
            filter: Filter::new(actor, key, method, &status)?,
        };
        let cursor = Cursor::read(&page_token)?;
        let size = usize::try_from(Page::new(page_size, "")?.size).map_err(Error::internal)?;
        let mut reader = Reader::new(self.store.clone(), query, cursor);
        let page = reader.page(size).await?;
        Ok(Response::new(ListAuditLogsResponse {
            entries: page.into_iter().map(encode).collect(),
            next_page_token: reader.cursor().map(Cursor::token),
        }))
    }

    async fn export_audit_logs(
        &self,
        request: Request<ExportAuditLogsRequest>,
    ) -> Result<Response<Self::ExportAuditLogsStream>, Status> {
        let caller = Caller::of(&request)?;
        let ExportAuditLogsRequest { team_id, format, since, until, actor, key, method, status } = request.into_inner();
        let format = Format::read(&format)?;
        let query = Query {
            team_id: own_team(&caller, &team_id)?,
            within: within(since.as_ref(), until.as_ref())?,
            filter: Filter::new(actor, key, method, &status)?,
        };
        let export = Export {
            reader: Reader::new(self.store.clone(), query, None),
            format,
            found: Vec::new().into_iter(),
            begun: false,
        };
        // Read as it is taken: a slow client holds one window.
        let pieces = stream::try_unfold(export, |mut export| async move {
            let piece = export.piece().await?;
            Ok(piece.map(|piece| (piece, export)))
        });
        Ok(Response::new(Box::pin(pieces)))
    }
}

#[tonic::async_trait]
impl AuditIntakeService for Handler {
    async fn record_audit(
        &self,
        request: Request<RecordAuditRequest>,
    ) -> Result<Response<RecordAuditResponse>, Status> {
        let RecordAuditRequest { batch_id, records } = request.into_inner();
        if !could_be_id(&batch_id) {
            return Err(Error::field("batch_id", "must be an id").into());
        }
        if records.len() > MAX_RECORDS {
            return Err(Error::field("records", format!("must have at most {MAX_RECORDS} entries")).into());
        }
        self.store.take_over(blocks_of(&batch_id, records, self.clock.now_ms())).await?;
        Ok(Response::new(RecordAuditResponse {}))
    }
}

/// An export that is under way.
struct Export {
    reader: Reader,
    format: Format,
    found: std::vec::IntoIter<Entry>,
    begun: bool,
}

impl Export {
    /// The next piece; `None` at the end.
    async fn piece(&mut self) -> Result<Option<ExportAuditLogsResponse>, Error> {
        let mut content_type = String::new();
        let mut text = String::with_capacity(PIECE + 4_096);
        let first = !std::mem::replace(&mut self.begun, true);
        if first {
            self.format.content_type().clone_into(&mut content_type);
            text.push_str(&self.format.head());
        }
        while text.len() < PIECE {
            if let Some(entry) = self.found.next() {
                self.format.write(&mut text, &entry);
                continue;
            }
            match self.reader.window().await? {
                Some(found) => self.found = found.into_iter(),
                None => break,
            }
        }
        let is_any = first || !text.is_empty();
        Ok(is_any.then(|| ExportAuditLogsResponse { content_type, data: text.into() }))
    }
}

fn within(since: Option<&Timestamp>, until: Option<&Timestamp>) -> Result<Stretch, Error> {
    let read = |field, time: Option<&Timestamp>| time.map(|time| time_ms(field, time)).transpose();
    Ok(Stretch { from_ms: read("since", since)?.unwrap_or(0), until_ms: read("until", until)?.unwrap_or(i64::MAX) })
}

fn encode(entry: Entry) -> AuditEntry {
    let text = |text: &str| some(text).map(str::to_owned);
    let call = entry.call.as_ref();
    AuditEntry {
        time: Some(timestamp(entry.at_ms)),
        actor: Some(AuditActor { kind: entry.actor_kind, id: text(&entry.actor_id), name: text(&entry.actor_name) }),
        method: call.and_then(|call| text(&call.method)),
        path: call.and_then(|call| text(&call.path)),
        rpc: text(&entry.rpc),
        status: call.map(|call| call.status),
        code: call.and_then(|call| text(&call.code)),
        duration_ms: call.map(duration_ms),
        ip: call.and_then(|call| text(&call.ip)),
        user_agent: call.and_then(|call| text(&call.user_agent)),
        request_id: text(&entry.request_id),
        id: entry.id,
        resources: entry.resources,
    }
}
