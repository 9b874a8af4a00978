//! The blocks of the audit log and the head of their chain.
//!
//! Whoever chains or prunes holds the row of the head while it does, and judges what is there then. So however many
//! believe that they hold the lease, there is one chain.

use std::collections::HashSet;

use paperkey_kit::db::{Database, DbError, Tx};
use paperkey_proto::{Error, auth::v1::AuditRecord};
use sea_orm::{
    ActiveModelTrait as _, ColumnTrait as _, Condition, ConnectionTrait, DbBackend, EntityTrait as _, FromQueryResult,
    QueryFilter as _, QueryOrder as _, QueryResult, QuerySelect as _, Statement, Value, sea_query::OnConflict,
};

use super::{Failure, Store};
use crate::domain::audit::{
    block::{Block, SPAN_MS, records_in},
    chain::{ChainKey, Link, Purpose},
    entry::Placed,
};

mod blocks {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "audit_blocks")]
    pub(crate) struct Model {
        #[sea_orm(primary_key)]
        pub(crate) seq: i64,
        pub(crate) id: String,
        pub(crate) team_id: String,
        pub(crate) changes: bool,
        pub(crate) first_ms: i64,
        pub(crate) last_ms: i64,
        pub(crate) records: i64,
        pub(crate) payload: Vec<u8>,
        pub(crate) seal: Vec<u8>,
        pub(crate) chain_no: Option<i64>,
        pub(crate) mac: Option<Vec<u8>>,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub(crate) enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// Blocks of one INSERT at most: each has nine values.
const AN_INSERT: usize = 100;
/// Blocks that one transaction chains or removes at most.
const A_STEP: u64 = 200;
/// Blocks that are read at once.
const A_READ: u64 = 64;
/// Records that are read at once, unless more were made in one moment.
const MOST_RECORDS: i64 = 2_000;

/// Where the chain begins and where it ends, signed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Head {
    pub(crate) newest: Link,
    /// The newest block that was removed for its age.
    pub(crate) pruned: Link,
    /// Which of the two is not signed by us, if one is not.
    pub(crate) forged: Option<Purpose>,
}

/// What chaining did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Chained {
    /// There was nothing to chain.
    Nothing,
    /// So many blocks, the last of which is that one.
    Blocks(u64, Link),
    /// The head is not one of ours. What was made of it would hide that.
    Tampered,
}

/// A block as it stands there.
#[derive(Clone, Debug)]
pub(crate) struct StoredBlock {
    pub(crate) seq: i64,
    pub(crate) block: Block,
    pub(crate) seal: Vec<u8>,
    pub(crate) link: Option<Link>,
}

/// Records of a stretch of time, newest blocks first: all that there are.
#[derive(Debug)]
pub(crate) struct Window {
    /// From here.
    pub(crate) from_ms: i64,
    pub(crate) calls: Vec<Placed>,
    pub(crate) changes: Vec<Placed>,
}

/// A stretch of time: from the one to before the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stretch {
    pub(crate) from_ms: i64,
    pub(crate) until_ms: i64,
}

impl Stretch {
    fn holds(self, at_ms: i64) -> bool {
        (self.from_ms..self.until_ms).contains(&at_ms)
    }
}

/// What stands in the table beside the head.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Summary {
    pub(crate) lowest_no: Option<i64>,
    pub(crate) highest_no: Option<i64>,
}

impl Store {
    /// Takes over the blocks of a batch; those of one that was taken over before are passed over.
    pub(crate) async fn take_over(&self, blocks: Vec<Block>) -> Result<(), Error> {
        let mut rows = blocks.into_iter().map(|block| {
            let seal = self.chain.seal(&block).to_vec();
            let Block { id, team_id, changes, first_ms, last_ms, records, payload } = block;
            let row = blocks::Model {
                seq: 0,
                id,
                team_id,
                changes,
                first_ms,
                last_ms,
                records,
                payload,
                seal,
                chain_no: None,
                mac: None,
            };
            let mut row = blocks::ActiveModel::from(row).reset_all();
            row.not_set(blocks::Column::Seq);
            row
        });
        let Some(first) = rows.next() else { return Ok(()) };
        let rest: Vec<_> = rows.collect();
        self.database
            .write(move |tx| async move {
                // The batch is one transaction, so its first block stands for all.
                let is_new = blocks::Entity::insert(first)
                    .on_conflict(OnConflict::column(blocks::Column::Id).do_nothing().to_owned())
                    .exec_without_returning(&tx)
                    .await?
                    > 0;
                if is_new {
                    for some in rest.chunks(AN_INSERT) {
                        blocks::Entity::insert_many(some.to_vec()).exec_without_returning(&tx).await?;
                    }
                }
                Ok::<_, Failure>(())
            })
            .await?;
        Ok(())
    }

    /// Whether a block waits to be chained.
    pub(crate) async fn is_unchained(&self) -> Result<bool, DbError> {
        let sql = "SELECT seq FROM audit_blocks WHERE chain_no IS NULL LIMIT 1";
        Ok(first_row(&self.database, sql, Vec::new()).await?.is_some())
    }

    /// Chains some blocks, in the order in which they came.
    pub(crate) async fn chain_some(&self) -> Result<Chained, DbError> {
        let key = self.chain.clone();
        self.database
            .write(move |tx| async move {
                let Some(head) = lock_head(&tx, &key).await? else { return Ok(Chained::Tampered) };
                if head.forged.is_some() {
                    return Ok(Chained::Tampered);
                }
                let backend = tx.get_database_backend();
                let sql = "SELECT seq, seal FROM audit_blocks WHERE chain_no IS NULL ORDER BY seq LIMIT $1";
                let limit = i64::try_from(A_STEP).unwrap_or(i64::MAX);
                let rows = tx.query_all_raw(Statement::from_sql_and_values(backend, sql, [limit.into()])).await?;
                if rows.is_empty() {
                    return Ok(Chained::Nothing);
                }
                let bytes = if backend == DbBackend::Sqlite { "BLOB" } else { "BYTEA" };
                let (mut newest, mut values, mut places) = (head.newest, Vec::<Value>::new(), Vec::new());
                for row in &rows {
                    newest = key.link(&newest, &row.try_get::<Vec<u8>>("", "seal")?);
                    values.extend([
                        row.try_get::<i64>("", "seq")?.into(),
                        newest.no.into(),
                        newest.mac.as_slice().into(),
                    ]);
                    let at = values.len();
                    let (seq, no) = (at - 2, at - 1);
                    places.push(format!("(CAST(${seq} AS BIGINT), CAST(${no} AS BIGINT), CAST(${at} AS {bytes}))"));
                }
                let sql = format!(
                    "UPDATE audit_blocks SET chain_no = chained.column2, mac = chained.column3 \
                     FROM (VALUES {}) AS chained WHERE audit_blocks.seq = chained.column1 \
                     AND audit_blocks.chain_no IS NULL",
                    places.join(", ")
                );
                let count = u64::try_from(rows.len()).unwrap_or(0);
                let chained = tx.execute_raw(Statement::from_sql_and_values(backend, sql, values)).await?;
                if chained.rows_affected() != count {
                    return Err(DbError::Internal("a block was chained by somebody without the head".to_owned()));
                }
                let sql = "UPDATE audit_head SET chain_no = $1, mac = $2, signature = $3 WHERE id = 1";
                let values = vec![
                    newest.no.into(),
                    newest.mac.as_slice().into(),
                    key.sign(Purpose::Head, &newest).to_vec().into(),
                ];
                tx.execute_raw(Statement::from_sql_and_values(backend, sql, values)).await?;
                Ok(Chained::Blocks(count, newest))
            })
            .await
    }

    /// Removes some blocks from the beginning of the chain, all of whose records are older. Says how many. What is
    /// removed is vouched for by the checkpoint, so each block is judged first: where one is not the one that was
    /// chained there, nothing of that step is removed, and it stands there to be found.
    pub(crate) async fn prune_audit(&self, before_ms: i64) -> Result<u64, DbError> {
        let key = self.chain.clone();
        self.database
            .write(move |tx| async move {
                let Some(head) = lock_head(&tx, &key).await?.filter(|head| head.forged.is_none()) else {
                    return Ok(0);
                };
                let mut pruned = head.pruned.clone();
                let most = head.pruned.no.saturating_add(i64::try_from(A_STEP).unwrap_or(i64::MAX));
                'old: while pruned.no < most {
                    let some = blocks::Entity::find()
                        .filter(blocks::Column::ChainNo.gt(pruned.no))
                        .filter(blocks::Column::ChainNo.lte(most.min(head.newest.no)))
                        .order_by_asc(blocks::Column::ChainNo)
                        .limit(A_READ)
                        .all(&tx)
                        .await?;
                    if some.is_empty() {
                        break;
                    }
                    for block in some.into_iter().map(StoredBlock::from) {
                        if block.block.last_ms >= before_ms {
                            break 'old;
                        }
                        pruned = successor(&key, &pruned, &block)?;
                    }
                }
                if pruned == head.pruned {
                    return Ok(0);
                }
                let backend = tx.get_database_backend();
                let sql = "UPDATE audit_head SET pruned_no = $1, pruned_mac = $2, pruned_signature = $3 WHERE id = 1";
                let values = vec![
                    pruned.no.into(),
                    pruned.mac.as_slice().into(),
                    key.sign(Purpose::Checkpoint, &pruned).to_vec().into(),
                ];
                tx.execute_raw(Statement::from_sql_and_values(backend, sql, values)).await?;
                let gone = blocks::Entity::delete_many()
                    .filter(blocks::Column::ChainNo.gt(head.pruned.no))
                    .filter(blocks::Column::ChainNo.lte(pruned.no))
                    .exec(&tx)
                    .await?;
                Ok(gone.rows_affected)
            })
            .await
    }

    /// The head, and what stands in the table beside it; `None` where nothing was ever chained.
    pub(crate) async fn audit_head(&self) -> Result<(Option<Head>, Summary), DbError> {
        let key = self.chain.clone();
        self.database
            .snapshot(move |reader| async move {
                let backend = reader.get_database_backend();
                let head = reader.query_one_raw(Statement::from_string(backend, "SELECT * FROM audit_head")).await?;
                let head = head.map(|row| head_of(&row, &key)).transpose()?;
                let sql = "SELECT MIN(chain_no) AS lowest, MAX(chain_no) AS highest FROM audit_blocks";
                let row = reader.query_one_raw(Statement::from_string(backend, sql)).await?;
                let at = |column| match &row {
                    Some(row) => row.try_get::<Option<i64>>("", column).map_err(DbError::from),
                    None => Ok(None),
                };
                Ok((head, Summary { lowest_no: at("lowest")?, highest_no: at("highest")? }))
            })
            .await
    }

    /// The link of a block.
    pub(crate) async fn link_of(&self, no: i64) -> Result<Option<Link>, DbError> {
        let row =
            first_row(&self.database, "SELECT mac FROM audit_blocks WHERE chain_no = $1", vec![no.into()]).await?;
        row.map(|row| Ok(Link { no, mac: row.try_get("", "mac")? })).transpose()
    }

    /// Some blocks of the chain from that number on, in its order.
    pub(crate) async fn chained_from(&self, no: i64, until: i64) -> Result<Vec<StoredBlock>, DbError> {
        let of = Condition::all().add(blocks::Column::ChainNo.gte(no)).add(blocks::Column::ChainNo.lte(until));
        self.stored_blocks(of, blocks::Column::ChainNo).await
    }

    /// Some blocks that are not chained yet, of those that came later.
    pub(crate) async fn unchained_after(&self, seq: i64) -> Result<Vec<StoredBlock>, DbError> {
        let of = Condition::all().add(blocks::Column::ChainNo.is_null()).add(blocks::Column::Seq.gt(seq));
        self.stored_blocks(of, blocks::Column::Seq).await
    }

    async fn stored_blocks(&self, of: Condition, order: blocks::Column) -> Result<Vec<StoredBlock>, DbError> {
        let query = blocks::Entity::find().filter(of).order_by_asc(order).limit(A_READ);
        let rows = self.database.read(move |reader| async move { Ok::<_, DbError>(query.all(&reader).await?) }).await?;
        Ok(rows.into_iter().map(StoredBlock::from).collect())
    }

    /// The newest records of a team in a stretch of time: all since a moment that the answer names, which is the
    /// beginning of the stretch where there are not too many.
    pub(crate) async fn audit_window(&self, team_id: &str, within: Stretch) -> Result<Window, DbError> {
        let mut most = 1;
        loop {
            let calls = self.newest_blocks(team_id, false, within, most).await?;
            let changes = self.newest_blocks(team_id, true, within, most).await?;
            let from_ms = [&calls, &changes].iter().filter_map(|some| some.whole_from_ms).max();
            let from_ms = from_ms.unwrap_or(within.from_ms).max(within.from_ms);
            // More blocks than that reach into the last millisecond: without some of them nothing is known for sure.
            if from_ms >= within.until_ms {
                most *= 4;
                continue;
            }
            let whole = Stretch { from_ms, ..within };
            return Ok(Window {
                from_ms,
                calls: self.records_of(calls.seqs, whole).await?,
                changes: self.records_of(changes.seqs, whole).await?,
            });
        }
    }

    /// Blocks by their newest record: those that are left out have none since the newest of the last that is in.
    async fn newest_blocks(
        &self,
        team_id: &str,
        changes: bool,
        within: Stretch,
        most: u64,
    ) -> Result<NewestBlocks, DbError> {
        let (limit, mut budget) = (A_READ * most, MOST_RECORDS.saturating_mul(i64::try_from(most).unwrap_or(i64::MAX)));
        let query = blocks::Entity::find()
            .select_only()
            .columns([blocks::Column::Seq, blocks::Column::LastMs, blocks::Column::Records])
            .filter(reaching(team_id, changes, within))
            .order_by_desc(blocks::Column::LastMs)
            .limit(limit + 1)
            .into_model::<Meta>();
        let mut found =
            self.database.read(move |reader| async move { Ok::<_, DbError>(query.all(&reader).await?) }).await?;
        let mut more = u64::try_from(found.len()).unwrap_or(u64::MAX) > limit;
        if more {
            found.pop();
        }
        let fitting = found
            .iter()
            .take_while(|block| {
                let fits = budget > 0;
                budget = budget.saturating_sub(block.records);
                fits
            })
            .count();
        more |= fitting < found.len();
        found.truncate(fitting);
        let whole_from_ms = found.last().filter(|_| more).map(|last| last.last_ms.saturating_add(1));
        Ok(NewestBlocks { seqs: found.into_iter().map(|block| block.seq).collect(), whole_from_ms })
    }

    async fn records_of(&self, seqs: Vec<i64>, within: Stretch) -> Result<Vec<Placed>, DbError> {
        let mut records = Vec::new();
        for some in seqs.chunks(usize::try_from(A_READ).unwrap_or(1)) {
            let query = blocks::Entity::find().filter(blocks::Column::Seq.is_in(some.to_vec()));
            let query = query.filter(blocks::Column::LastMs.gte(within.from_ms));
            for block in self.payloads(query).await? {
                records.extend(placed(&block)?.into_iter().filter(|placed| within.holds(placed.record.at_ms)));
            }
        }
        Ok(records)
    }

    /// The records of these requests within a stretch of time, be there ever so many others.
    pub(crate) async fn records_of_requests(
        &self,
        team_id: &str,
        changes: bool,
        within: Stretch,
        requests: &HashSet<String>,
    ) -> Result<Vec<AuditRecord>, DbError> {
        let mut records = Vec::new();
        let mut after: Option<(i64, i64)> = None;
        loop {
            let mut query = blocks::Entity::find().filter(reaching(team_id, changes, within));
            if let Some((last_ms, seq)) = after {
                let later = Condition::all().add(blocks::Column::LastMs.eq(last_ms)).add(blocks::Column::Seq.gt(seq));
                query = query.filter(Condition::any().add(blocks::Column::LastMs.gt(last_ms)).add(later));
            }
            let query = query.order_by_asc(blocks::Column::LastMs).order_by_asc(blocks::Column::Seq).limit(A_READ);
            let found = self.payloads(query).await?;
            let Some(last) = found.last() else { return Ok(records) };
            after = Some((last.last_ms, last.seq));
            for block in &found {
                let of = |record: &AuditRecord| within.holds(record.at_ms) && requests.contains(&record.request_id);
                records.extend(placed(block)?.into_iter().map(|placed| placed.record).filter(of));
            }
        }
    }

    async fn payloads(&self, query: sea_orm::Select<blocks::Entity>) -> Result<Vec<Packed>, DbError> {
        let query = query
            .select_only()
            .columns([blocks::Column::Seq, blocks::Column::Id, blocks::Column::LastMs, blocks::Column::Payload])
            .into_model::<Packed>();
        self.database.read(move |reader| async move { Ok::<_, DbError>(query.all(&reader).await?) }).await
    }
}

struct NewestBlocks {
    seqs: Vec<i64>,
    /// Since when there are no others; `None` where there are none at all.
    whole_from_ms: Option<i64>,
}

#[derive(FromQueryResult)]
struct Meta {
    seq: i64,
    last_ms: i64,
    records: i64,
}

#[derive(FromQueryResult)]
struct Packed {
    seq: i64,
    id: String,
    last_ms: i64,
    payload: Vec<u8>,
}

impl From<blocks::Model> for StoredBlock {
    fn from(row: blocks::Model) -> Self {
        let blocks::Model { seq, id, team_id, changes, first_ms, last_ms, records, payload, seal, chain_no, mac } = row;
        let link = chain_no.map(|no| Link { no, mac: mac.unwrap_or_default() });
        Self { seq, block: Block { id, team_id, changes, first_ms, last_ms, records, payload }, seal, link }
    }
}

/// Blocks with records in a stretch of time. No block reaches further than its span.
fn reaching(team_id: &str, changes: bool, within: Stretch) -> Condition {
    Condition::all()
        .add(blocks::Column::TeamId.eq(team_id))
        .add(blocks::Column::Changes.eq(changes))
        .add(blocks::Column::LastMs.gte(within.from_ms))
        .add(blocks::Column::LastMs.lt(within.until_ms.saturating_add(SPAN_MS)))
        .add(blocks::Column::FirstMs.lt(within.until_ms))
}

fn placed(block: &Packed) -> Result<Vec<Placed>, DbError> {
    let records = records_in(&block.payload)
        .ok_or_else(|| DbError::Internal(format!("the block {} of the audit log cannot be read", block.id)))?;
    let place = |(index, record)| Placed { record, block_id: block.id.clone(), index };
    Ok(records.into_iter().enumerate().map(place).collect())
}

/// The link of the block that was chained after another, if it is that one and nobody has touched it. What follows a
/// gap is not: removing it would hide that.
fn successor(key: &ChainKey, previous: &Link, stored: &StoredBlock) -> Result<Link, DbError> {
    let next = key.link(previous, &stored.seal);
    if key.seal(&stored.block)[..] == stored.seal && stored.link.as_ref() == Some(&next) {
        return Ok(next);
    }
    Err(DbError::Internal(format!(
        "block {} of the audit log, which is said to be old, is not the one that was chained there, and is not removed: \
         run `paperkey audit verify`",
        next.no
    )))
}

/// The head, which nobody else has until the transaction ends. It is made where there is none, and none was.
async fn lock_head(tx: &Tx, key: &ChainKey) -> Result<Option<Head>, DbError> {
    let backend = tx.get_database_backend();
    let lock = || Statement::from_string(backend, "UPDATE audit_head SET chain_no = chain_no WHERE id = 1 RETURNING *");
    if let Some(row) = tx.query_one_raw(lock()).await? {
        return head_of(&row, key).map(Some);
    }
    let sql = "SELECT seq FROM audit_blocks WHERE chain_no IS NOT NULL LIMIT 1";
    if tx.query_one_raw(Statement::from_string(backend, sql)).await?.is_some() {
        // Gone, or made by another process since it was first looked for.
        let row = tx.query_one_raw(lock()).await?;
        return row.map(|row| head_of(&row, key)).transpose();
    }
    let origin = Link::origin();
    let sql = "INSERT INTO audit_head (id, chain_no, mac, signature, pruned_no, pruned_mac, pruned_signature) \
         VALUES (1, $1, $2, $3, $1, $2, $4) ON CONFLICT (id) DO NOTHING";
    let values = vec![
        origin.no.into(),
        origin.mac.as_slice().into(),
        key.sign(Purpose::Head, &origin).to_vec().into(),
        key.sign(Purpose::Checkpoint, &origin).to_vec().into(),
    ];
    tx.execute_raw(Statement::from_sql_and_values(backend, sql, values)).await?;
    let row = tx.query_one_raw(lock()).await?;
    row.map(|row| head_of(&row, key)).transpose()
}

fn head_of(row: &QueryResult, key: &ChainKey) -> Result<Head, DbError> {
    let newest = Link { no: row.try_get("", "chain_no")?, mac: row.try_get("", "mac")? };
    let pruned = Link { no: row.try_get("", "pruned_no")?, mac: row.try_get("", "pruned_mac")? };
    let signed = |purpose, link: &Link, column| {
        let signature: Vec<u8> = row.try_get("", column)?;
        Ok::<_, DbError>(key.is_signed(purpose, link, &signature))
    };
    let forged =
        match (signed(Purpose::Head, &newest, "signature")?, signed(Purpose::Checkpoint, &pruned, "pruned_signature")?)
        {
            (false, _) => Some(Purpose::Head),
            (true, false) => Some(Purpose::Checkpoint),
            (true, true) => None,
        };
    Ok(Head { newest, pruned, forged })
}

async fn first_row(database: &Database, sql: &'static str, values: Vec<Value>) -> Result<Option<QueryResult>, DbError> {
    database
        .read(move |reader| async move {
            let statement = Statement::from_sql_and_values(reader.get_database_backend(), sql, values);
            Ok(reader.query_one_raw(statement).await?)
        })
        .await
}
