//! Reading the log backwards in time, a window at a time, so that a reader holds little however long the log is.
//!
//! A window is a stretch of time of which all records are known. What belongs together may lie in two: the changes of a
//! call are looked for beyond the window's end, and the call of a change where the id of its request says that it
//! began.

use std::collections::{BTreeMap, HashSet};

use paperkey_kit::db::DbError;
use paperkey_proto::Error;

use crate::{
    domain::audit::{
        entry::{AFTER_MS, BEFORE_MS, Cursor, Entry, Filter, Placed, belongs, entries},
        made_at_ms,
    },
    store::{Store, Stretch, Window},
};

/// Windows that are looked at for one page at most. A filter that leaves little makes short pages.
const MAX_WINDOWS: u32 = 20;
/// A request gets its id within this of its beginning.
const MADE_MS: i64 = 1_000;

/// What is asked for.
#[derive(Clone, Debug)]
pub(crate) struct Query {
    pub(crate) team_id: String,
    pub(crate) within: Stretch,
    pub(crate) filter: Filter,
}

/// Goes backwards through what a query leaves.
#[derive(Debug)]
pub(crate) struct Reader {
    store: Store,
    query: Query,
    cursor: Option<Cursor>,
    ended: bool,
}

impl Reader {
    /// Begins after the cursor, or at the newest.
    pub(crate) fn new(store: Store, query: Query, cursor: Option<Cursor>) -> Self {
        Self { store, query, cursor, ended: false }
    }

    /// Where it stands; `None` at the end.
    pub(crate) fn cursor(&self) -> Option<&Cursor> {
        self.cursor.as_ref().filter(|_| !self.ended)
    }

    /// Entries up to that many; fewer where a filter leaves little.
    pub(crate) async fn page(&mut self, size: usize) -> Result<Vec<Entry>, Error> {
        let mut page: Vec<Entry> = Vec::new();
        for _ in 0..MAX_WINDOWS {
            let Some(found) = self.window().await? else { break };
            let room = size - page.len();
            let cut = found.len() > room;
            page.extend(found.into_iter().take(room));
            if cut {
                // The rest of the window is found again by the next page.
                self.cursor = page.last().map(Cursor::after);
                self.ended = false;
                break;
            }
            if page.len() == size {
                break;
            }
        }
        Ok(page)
    }

    /// The entries of the next window; `None` at the end.
    pub(crate) async fn window(&mut self) -> Result<Option<Vec<Entry>>, Error> {
        let until_ms = self.cursor.as_ref().map_or(i64::MAX, Cursor::until_ms);
        let within = Stretch { until_ms: until_ms.min(self.query.within.until_ms), ..self.query.within };
        if self.ended || within.from_ms >= within.until_ms {
            self.ended = true;
            return Ok(None);
        }
        let window = self.store.audit_window(&self.query.team_id, within).await?;
        let from_ms = window.from_ms;
        let found = self.entries_of(window, Stretch { from_ms, ..within }).await?;
        let beyond = |entry: &Entry| self.cursor.as_ref().is_none_or(|cursor| cursor.is_before(entry));
        let found = found.into_iter().filter(|entry| beyond(entry) && self.query.filter.leaves(entry)).collect();
        self.ended = from_ms <= within.from_ms;
        self.cursor = Some(Cursor { at_ms: from_ms, id: String::new() });
        Ok(Some(found))
    }

    async fn entries_of(&self, window: Window, stretch: Stretch) -> Result<Vec<Entry>, Error> {
        let Window { calls, changes, .. } = window;
        let requests: HashSet<String> = calls.iter().map(|call| call.record.request_id.clone()).collect();
        let made = if requests.is_empty() {
            Vec::new()
        } else {
            let around = Stretch {
                from_ms: stretch.from_ms.saturating_sub(BEFORE_MS),
                until_ms: stretch.until_ms.saturating_add(AFTER_MS),
            };
            self.store.records_of_requests(&self.query.team_id, true, around, &requests).await?
        };
        let alone = self.alone(&calls, changes).await?;
        Ok(entries(calls, &made, alone))
    }

    /// The changes that no call has made.
    async fn alone(&self, calls: &[Placed], changes: Vec<Placed>) -> Result<Vec<Placed>, DbError> {
        let mut times: BTreeMap<String, Vec<i64>> = BTreeMap::new();
        let mut know = |request_id: &str, at_ms| times.entry(request_id.to_owned()).or_default().push(at_ms);
        for call in calls {
            know(&call.record.request_id, call.record.at_ms);
        }
        let has_call = |times: &BTreeMap<String, Vec<i64>>, change: &Placed| {
            let at = times.get(&change.record.request_id).filter(|_| !change.record.request_id.is_empty());
            at.into_iter().flatten().any(|call_at_ms| belongs(change.record.at_ms, *call_at_ms))
        };
        let changes: Vec<Placed> = changes.into_iter().filter(|change| !has_call(&times, change)).collect();
        let asked = changes.iter().filter(|change| !change.record.request_id.is_empty());
        let (mut requests, mut places) = (HashSet::new(), Vec::new());
        for change in asked {
            requests.insert(change.record.request_id.clone());
            places.push(place_of_call(&change.record.request_id, change.record.at_ms));
        }
        for place in joined(places) {
            for call in self.store.records_of_requests(&self.query.team_id, false, place, &requests).await? {
                times.entry(call.request_id).or_default().push(call.at_ms);
            }
        }
        Ok(changes.into_iter().filter(|change| !has_call(&times, change)).collect())
    }
}

/// Where the call of a change would be.
fn place_of_call(request_id: &str, change_at_ms: i64) -> Stretch {
    let earliest_ms = change_at_ms.saturating_sub(AFTER_MS);
    let latest_ms = change_at_ms.saturating_add(BEFORE_MS);
    match made_at_ms(request_id) {
        Some(made_ms) => Stretch {
            from_ms: made_ms.saturating_sub(MADE_MS).max(earliest_ms),
            until_ms: made_ms.saturating_add(MADE_MS).min(latest_ms).saturating_add(1),
        },
        None => Stretch { from_ms: earliest_ms, until_ms: latest_ms.saturating_add(1) },
    }
}

/// Stretches that touch, as one.
fn joined(mut places: Vec<Stretch>) -> Vec<Stretch> {
    places.retain(|place| place.from_ms < place.until_ms);
    places.sort_by_key(|place| place.from_ms);
    let mut joined: Vec<Stretch> = Vec::new();
    for place in places {
        match joined.last_mut().filter(|last| place.from_ms <= last.until_ms) {
            Some(last) => last.until_ms = last.until_ms.max(place.until_ms),
            None => joined.push(place),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_that_touch_are_looked_at_once() {
        let place = |from_ms, until_ms| Stretch { from_ms, until_ms };
        let places = vec![place(10, 20), place(0, 5), place(5, 8), place(9, 3), place(12, 30)];
        assert_eq!(joined(places), [place(0, 8), place(10, 30)]);
    }
}
