//! `ExportLicenses`: as it is taken, window by window, with nothing open in between.

use paperkey_kit::values::Page;
use paperkey_proto::{Error, licensing::v1::ExportLicensesResponse};

use crate::{
    domain::{file::Format, license::License},
    store::{Filter, TenantStore},
};

/// Licences that are read at once.
const WINDOW: u64 = 200;
/// A piece ends where it has grown to this, in bytes.
const PIECE: usize = 48 * 1_024;

/// An export that is under way.
pub(super) struct Export {
    store: TenantStore,
    filter: Filter,
    format: Format,
    now_ms: i64,
    /// The next window; `None` after the last.
    next: Option<Page>,
    found: std::vec::IntoIter<License>,
    begun: bool,
}

impl Export {
    pub(super) fn new(store: TenantStore, filter: Filter, format: Format, now_ms: i64) -> Self {
        let next = Some(Page { size: WINDOW, before: None });
        Self { store, filter, format, now_ms, next, found: Vec::new().into_iter(), begun: false }
    }

    /// The next piece; `None` at the end.
    pub(super) async fn piece(&mut self) -> Result<Option<ExportLicensesResponse>, Error> {
        let mut content_type = String::new();
        let mut text = String::with_capacity(PIECE + 4_096);
        let is_first = !std::mem::replace(&mut self.begun, true);
        if is_first {
            self.format.content_type().clone_into(&mut content_type);
            text.push_str(&self.format.head());
        }
        while text.len() < PIECE {
            if let Some(license) = self.found.next() {
                self.format.write(&mut text, &license, self.now_ms);
            } else if !self.read().await? {
                break;
            }
        }
        let is_any = is_first || !text.is_empty();
        Ok(is_any.then(|| ExportLicensesResponse { content_type, data: text.into() }))
    }

    /// Reads one window more, and says whether there was one.
    async fn read(&mut self) -> Result<bool, Error> {
        let Some(page) = self.next.take() else { return Ok(false) };
        let (licenses, token) = self.store.list(self.filter.clone(), page).await?;
        if let (Some(_), Some(last)) = (token, licenses.last()) {
            self.next = Some(Page { size: WINDOW, before: Some(last.id.clone()) });
        }
        self.found = licenses.into_iter();
        Ok(true)
    }
}
