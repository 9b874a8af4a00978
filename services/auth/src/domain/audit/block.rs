//! Blocks: some records of one team, compressed, that were made within one second.
//!
//! Calls and changes lie in different blocks, since there are many of the one and few of the other, and a reader who
//! looks for the changes of a call need not read other calls.

use std::collections::BTreeMap;

use paperkey_kit::audit::make_fit;
use paperkey_proto::auth::v1::{AuditRecord, RecordAuditRequest};
use prost::Message as _;

use crate::domain::could_be_id;

/// Records of one block at most.
pub(crate) const MAX_RECORDS: usize = 1_000;
/// The records of a block were made within less than this.
pub(crate) const SPAN_MS: i64 = 1_000;
/// Clocks of two machines may differ by this; nothing was recorded later.
const FUTURE_MS: i64 = 60_000;
/// No block of ours is longer, in bytes, before it is compressed.
const MAX_PLAIN: usize = 16 * 1_024 * 1_024;
/// The form of a payload: lengths and records in LZ4.
const LZ4: u8 = 1;

/// Some records of one team.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Block {
    pub(crate) id: String,
    /// Empty where no team is concerned.
    pub(crate) team_id: String,
    /// Whether it holds changes, or else calls.
    pub(crate) changes: bool,
    pub(crate) first_ms: i64,
    pub(crate) last_ms: i64,
    pub(crate) records: i64,
    pub(crate) payload: Vec<u8>,
}

/// The blocks of a batch. Their ids are made of the batch's, so that a batch which comes again makes the same.
pub(crate) fn blocks_of(batch_id: &str, records: Vec<AuditRecord>, now_ms: i64) -> Vec<Block> {
    let mut parts: BTreeMap<(String, bool), Vec<AuditRecord>> = BTreeMap::new();
    for mut record in records {
        make_fit(&mut record);
        record.at_ms = record.at_ms.clamp(0, now_ms.saturating_add(FUTURE_MS));
        if !could_be_id(&record.team_id) {
            record.team_id.clear();
        }
        if record.rpc.starts_with('/') {
            record.rpc.remove(0);
        }
        let part = (std::mem::take(&mut record.team_id), record.call.is_none());
        parts.entry(part).or_default().push(record);
    }
    let mut blocks = Vec::new();
    for ((team_id, changes), mut records) in parts {
        records.sort_by_key(|record| record.at_ms);
        let mut rest = records.as_slice();
        while let Some(first) = rest.first() {
            let end_ms = first.at_ms.saturating_add(SPAN_MS);
            let count = rest.iter().take(MAX_RECORDS).take_while(|record| record.at_ms < end_ms).count();
            let (these, others) = rest.split_at(count);
            rest = others;
            blocks.push(Block {
                id: format!("{batch_id}.{}", blocks.len()),
                team_id: team_id.clone(),
                changes,
                first_ms: first.at_ms,
                last_ms: these.last().map_or(first.at_ms, |last| last.at_ms),
                records: i64::try_from(count).unwrap_or(0),
                payload: packed(these.to_vec()),
            });
        }
    }
    blocks
}

/// The team stands in the block, and not once more in each record.
fn packed(records: Vec<AuditRecord>) -> Vec<u8> {
    let plain = RecordAuditRequest { batch_id: String::new(), records }.encode_to_vec();
    let mut payload = vec![LZ4];
    payload.extend_from_slice(&lz4_flex::block::compress_prepend_size(&plain));
    payload
}

/// The records of a block; `None` where it is damaged.
pub(crate) fn records_in(payload: &[u8]) -> Option<Vec<AuditRecord>> {
    let packed = payload.strip_prefix(&[LZ4])?;
    let (length, _) = packed.split_first_chunk::<4>()?;
    if usize::try_from(u32::from_le_bytes(*length)).ok()? > MAX_PLAIN {
        return None;
    }
    let plain = lz4_flex::block::decompress_size_prepended(packed).ok()?;
    Some(RecordAuditRequest::decode(plain.as_slice()).ok()?.records)
}

#[cfg(test)]
mod tests {
    use paperkey_proto::auth::v1::AuditCall;

    use super::*;

    const NOW_MS: i64 = 1_790_000_000_000;

    fn record(at_ms: i64, team_id: &str, call: bool) -> AuditRecord {
        let call = call.then(AuditCall::default);
        AuditRecord { at_ms, team_id: team_id.into(), request_id: format!("req_{at_ms}"), call, ..Default::default() }
    }

    #[test]
    fn a_batch_is_split_by_team_and_kind_and_second() {
        let records = vec![
            record(NOW_MS + 1_000, "team_a", true),
            record(NOW_MS, "team_a", true),
            record(NOW_MS + 999, "team_a", true),
            record(NOW_MS, "team_a", false),
            record(NOW_MS, "team_b", true),
            record(NOW_MS, "no\0team", true),
        ];
        let blocks = blocks_of("audb_1", records.clone(), NOW_MS);
        let shape: Vec<_> = blocks
            .iter()
            .map(|block| (block.id.as_str(), block.team_id.as_str(), block.changes, block.records))
            .collect();
        let expected = [
            ("audb_1.0", "", false, 1),
            ("audb_1.1", "team_a", false, 2),
            ("audb_1.2", "team_a", false, 1),
            ("audb_1.3", "team_a", true, 1),
            ("audb_1.4", "team_b", false, 1),
        ];
        assert_eq!(shape, expected);
        assert_eq!((blocks[1].first_ms, blocks[1].last_ms), (NOW_MS, NOW_MS + 999));
        assert_eq!(blocks, blocks_of("audb_1", records, NOW_MS), "the same batch makes the same blocks");
    }

    #[test]
    fn a_block_holds_a_thousand_records_and_gives_them_back() {
        let records: Vec<_> = (0..2_500).map(|_| record(NOW_MS, "team_a", true)).collect();
        let blocks = blocks_of("audb_1", records, NOW_MS);
        assert_eq!(blocks.iter().map(|block| block.records).collect::<Vec<_>>(), [1_000, 1_000, 500]);
        let back = records_in(&blocks[2].payload).unwrap();
        assert_eq!((back.len(), back[0].request_id.as_str()), (500, format!("req_{NOW_MS}").as_str()));
        assert!(blocks[0].payload.len() < 10_000, "it is compressed");
    }

    #[test]
    fn nothing_was_recorded_in_the_future() {
        let blocks = blocks_of("audb_1", vec![record(i64::MAX, "", true), record(i64::MIN, "", true)], NOW_MS);
        assert_eq!((blocks[0].first_ms, blocks[1].last_ms), (0, NOW_MS + FUTURE_MS));
    }

    #[test]
    fn what_is_no_payload_is_told_from_one() {
        for nonsense in [&[][..], &[0], &[LZ4], &[LZ4, 255, 255, 255, 255], &[LZ4, 4, 0, 0, 0, 9, 9]] {
            assert!(records_in(nonsense).is_none(), "{nonsense:?}");
        }
    }
}
