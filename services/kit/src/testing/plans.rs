//! Judges how a database would answer what a test has asked it, once its tables have grown.
//!
//! Every statement that a store's own code ran in a test is explained before the test's database goes. Tables of tests
//! are small, so the engine is told otherwise: PostgreSQL is made to believe in millions of rows and is kept from reading
//! a whole table where there is any other way; SQLite, without statistics, supposes a large table by itself.
//! Refused is what costs more the more there is:
//! * reading a whole table, or a whole index;
//! * walking an index in its order up to a limit, and passing over rows on the way;
//! * sorting what nothing bounds, to keep the first rows of it;
//! * naming one row by what is unique of it, and beside that so much else that an index of lists looks as cheap. A planner
//!   goes by what a tenant has on average: where most have one row, it takes either, and whoever has a million is read
//!   through from the first to the last for each of them.
//!
//! A planner that is free to choose takes what looks cheapest in a small table, so PostgreSQL is asked several times, and
//! one good plan is enough: what is judged is that there is an index to serve the statement. Of a table in which the test
//! has put nothing only reading all of it counts; whoever puts something there judges the rest.
//!
//! What is right all the same stands in a list here, with its reason. A statement that a test makes up itself is not
//! judged: whose a statement is, its job's type tells.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    env,
    fmt::Write as _,
    io::Write as _,
};

use sea_orm::{
    ConnectOptions, ConnectionTrait as _, DatabaseConnection, DatabaseTransaction, DbBackend, DbErr, Statement,
    TransactionTrait as _, sqlx::Row as _,
};
use serde_json::Value;

use crate::db::{Database, DbError, Recorded};

/// A file to which every judged statement is added, to see what the tests run.
const LIST_ENV: &str = "PAPERKEY_TEST_STATEMENTS";

/// Tables that stay small, and why.
const SMALL: [(&str, &str); 7] = [
    ("leases", "a row for each kind of work"),
    ("change_counter", "one row"),
    ("kept_keys", "a row for each kind of key"),
    ("seaql_migrations", "a row for each migration"),
    ("audit_head", "one row"),
    ("slack_posts", "a post is only stored where fewer than a thousand wait"),
    ("watchers", "a row for each stream that is being watched, and those of the last minutes"),
];

/// Parts of statements that may do what is refused otherwise, and why.
const ALLOWED: [(&str, &str); 7] = [
    (
        r#"FROM "memberships" LEFT JOIN "teams" ON "memberships"."team_id" = "teams"."id" WHERE "memberships"."user_id" = $1"#,
        "the teams of one person, whom somebody has invited to each",
    ),
    (r#"WHERE "memberships"."team_id" = $1 AND "memberships"."role" IN ($2, $3) ORDER BY"#, "the people of one team"),
    (
        r#"FROM "memberships" LEFT JOIN "users" ON "memberships"."user_id" = "users"."id" WHERE "memberships"."team_id" = $1"#,
        "the people of one team, a hundred at most",
    ),
    (
        r#"FROM "invitations" WHERE "invitations"."team_id" = $1 AND "invitations"."expires_at_ms" > $2"#,
        "the invitations of one team, which count among its people",
    ),
    (
        r#"WHERE "key_networks"."key_id" = $1 ORDER BY "key_networks"."last_seen_ms" DESC"#,
        "the networks of one key, of which so many are kept",
    ),
    (
        r#"FROM "endpoints" WHERE "endpoints"."team_id" = $1 AND "endpoints"."status" = $2 ORDER BY "endpoints"."id""#,
        "the endpoints of one team that goes, a step at a time, in the order in which everybody locks",
    ),
    (
        "SET claimed_by = NULL, due_at_ms = $1 WHERE status = 'pending' AND claimed_by IS NOT NULL",
        "once at the start, on SQLite: what is pending, of which a killed process has claimed some",
    ),
];

/// Indexes by which one row may be found although they find others beside it, and why.
const CLOSE: [(&str, &str); 4] = [
    ("memberships_by_user", "the teams of one person"),
    ("quota_usage_by_month", "no month has far more rows than another, so the average tells that they are many"),
    ("quota_days_by_day", "nor has a day"),
    ("alerts_by_team", "the alerts of one team, asked for once in a burst"),
];

/// Rows of a table of which a tenant has one on average: as many as PostgreSQL supposes different values in a column of
/// which it knows nothing.
const ONE_OF_EACH_TENANT: u32 = 200;

/// Costs that differ by less are the same to PostgreSQL, which then takes either plan.
const AS_CHEAP: f64 = 1.01;

/// What PostgreSQL is kept from, one after the other: only from reading whole tables; from all but walking an index and
/// looking up in others; and from that, but for sorting what an index has found.
const WAYS: [&str; 3] = [
    "SET LOCAL enable_sort = on; SET LOCAL enable_bitmapscan = on; SET LOCAL enable_hashjoin = on; \
     SET LOCAL enable_mergejoin = on",
    "SET LOCAL enable_sort = off; SET LOCAL enable_bitmapscan = off; SET LOCAL enable_hashjoin = off; \
     SET LOCAL enable_mergejoin = off",
    "SET LOCAL enable_sort = on; SET LOCAL enable_bitmapscan = off; SET LOCAL enable_hashjoin = off; \
     SET LOCAL enable_mergejoin = off",
];

/// Judges what was run, on a database of PostgreSQL that is about to go.
///
/// # Panics
///
/// If a statement would read more the more there is; with all such statements and their plans.
pub(super) async fn judge_postgres(url: &str, schema: &str, recorded: Vec<Recorded>) {
    let recorded = of_stores(recorded);
    if recorded.is_empty() {
        return;
    }
    let outcome = async {
        // The test has made nothing.
        if !has_schema(url, schema).await? {
            return Ok(String::new());
        }
        let mut options = ConnectOptions::new(url);
        options.max_connections(1).sqlx_logging(false).set_schema_search_path(schema);
        let connection = sea_orm::Database::connect(options).await?;
        let verdict = postgres_verdict(&connection, schema, &recorded).await;
        connection.close().await?;
        verdict
    };
    match outcome.await {
        Ok(refused) => assert!(refused.is_empty(), "statements that cost more the more there is:\n{refused}"),
        Err(error) => panic!("the plans of the statements cannot be judged: {error}"),
    }
}

async fn has_schema(url: &str, schema: &str) -> Result<bool, DbErr> {
    let connection = sea_orm::Database::connect(ConnectOptions::new(url).sqlx_logging(false).to_owned()).await?;
    let sql = "SELECT 1 AS there FROM pg_namespace WHERE nspname = $1";
    let found = Statement::from_sql_and_values(DbBackend::Postgres, sql, [schema.into()]);
    let found = connection.query_one_raw(found).await?;
    connection.close().await?;
    Ok(found.is_some())
}

/// The same on SQLite, on a connection that nobody has read by yet: what a test has said of its sizes is forgotten.
///
/// # Panics
///
/// As [`judge_postgres`].
pub(super) async fn judge_sqlite(database: &Database, recorded: Vec<Recorded>) {
    let recorded = of_stores(recorded);
    let forgotten = database.write(|tx| async move {
        let known = "SELECT name FROM sqlite_master WHERE name LIKE 'sqlite_stat_'";
        for row in tx.query_all_raw(Statement::from_string(DbBackend::Sqlite, known)).await? {
            let name: String = row.try_get("", "name")?;
            tx.execute_unprepared(&format!("DELETE FROM {name}")).await?;
        }
        Ok::<_, DbError>(())
    });
    assert!(forgotten.await.is_ok(), "the statistics of the test's database cannot be forgotten");
    let verdict = database.read(move |reader| async move {
        let tables = "SELECT name FROM sqlite_master WHERE type = 'table'";
        let tables = reader.query_all_raw(Statement::from_string(DbBackend::Sqlite, tables)).await?;
        let tables = tables.iter().map(|row| row.try_get("", "name")).collect::<Result<HashSet<String>, _>>()?;
        let mut refused = String::new();
        for Recorded { origin, statement } in recorded {
            let explain = Statement { sql: format!("EXPLAIN QUERY PLAN {}", statement.sql), ..statement.clone() };
            let rows = match reader.query_all_raw(explain).await {
                Ok(rows) => rows,
                // The test has taken the tables away.
                Err(error) if error.to_string().contains("no such table") => continue,
                Err(error) => return Err(error.into()),
            };
            let plan = rows.iter().map(|row| row.try_get("", "detail")).collect::<Result<Vec<String>, _>>()?;
            let is_refused = plan.iter().any(|line| reads_all(line, &statement.sql, &tables));
            if is_refused && !is_allowed(&statement.sql) {
                // Writing to a String cannot fail.
                let _ = writeln!(refused, "\n{origin}\n  {}\n  {plan:#?}", statement.sql);
            }
        }
        Ok::<_, DbError>(refused)
    });
    match verdict.await {
        Ok(refused) => assert!(refused.is_empty(), "statements that cost more the more there is:\n{refused}"),
        Err(error) => panic!("the plans of the statements cannot be judged: {error}"),
    }
}

/// What the code of the product ran, and not the tests beside it.
fn of_stores(mut recorded: Vec<Recorded>) -> Vec<Recorded> {
    // The migrator asks PostgreSQL's own tables.
    recorded.retain(|Recorded { origin, .. }| !origin.starts_with("paperkey_kit::db::migrate::"));
    recorded.retain(|Recorded { origin, .. }| origin.starts_with("paperkey_") && !is_of_tests(origin));
    if let Ok(path) = env::var(LIST_ENV) {
        let list = recorded.iter().fold(String::new(), |mut list, Recorded { origin, statement }| {
            let _ = writeln!(list, "{origin}\t{}", statement.sql);
            list
        });
        let file = std::fs::File::options().create(true).append(true).open(path);
        let written = file.and_then(|mut file| file.write_all(list.as_bytes()));
        assert!(written.is_ok(), "the file of {LIST_ENV} cannot be written: {written:?}");
    }
    recorded
}

/// Whether code stands in a module of tests.
fn is_of_tests(origin: &str) -> bool {
    origin.split("::").any(|segment| matches!(segment, "tests" | "testing"))
}

fn is_small(table: &str) -> bool {
    SMALL.iter().any(|(small, _)| *small == table)
}

fn is_allowed(sql: &str) -> bool {
    ALLOWED.iter().any(|(part, _)| sql.contains(part))
}

// --- SQLite ----------------------------------------------------------------------------------------------------------

/// Whether a line of SQLite's plan reads a whole table that grows, by no index.
fn reads_all(line: &str, sql: &str, tables: &HashSet<String>) -> bool {
    let Some(name) = line.strip_prefix("SCAN ") else { return false };
    // An index that is walked is judged on PostgreSQL, which says more of it.
    if name.contains(" USING ") {
        return false;
    }
    let name = name.split(' ').next().unwrap_or_default();
    let table = if tables.contains(name) { Some(name) } else { table_of(name, sql) };
    table.is_some_and(|table| tables.contains(table) && !is_small(table))
}

/// The table that a name stands for in a statement.
fn table_of<'a>(alias: &str, sql: &'a str) -> Option<&'a str> {
    let words: Vec<&str> = sql.split(|c: char| c.is_whitespace() || "(),".contains(c)).collect();
    let words: Vec<&str> = words.into_iter().filter(|word| !word.is_empty() && *word != "AS").collect();
    words.windows(2).find(|pair| pair[1].trim_matches('"') == alias).map(|pair| pair[0].trim_matches('"'))
}

// --- PostgreSQL ------------------------------------------------------------------------------------------------------

/// An index, as far as plans are judged by it.
struct Index {
    table: String,
    columns: Vec<String>,
    is_unique: bool,
    is_partial: bool,
}

/// What plans are judged by.
struct Schema {
    indexes: HashMap<String, Index>,
    /// Tables without any row, as the files say.
    empty: HashSet<String>,
}

impl Schema {
    /// The table that a node reads, by itself or by an index.
    fn table<'a>(&'a self, node: &'a Value) -> Option<&'a str> {
        let of_index = || self.indexes.get(node["Index Name"].as_str()?).map(|index| index.table.as_str());
        node["Relation Name"].as_str().or_else(of_index)
    }

    /// Whether an index has all columns of a unique one.
    fn finds_one(&self, index: &Index) -> bool {
        let is_of_it = |unique: &Index| unique.table == index.table && unique.is_unique;
        let mut unique = self.indexes.values().filter(|unique| is_of_it(unique));
        !index.is_partial && unique.any(|unique| unique.columns.iter().all(|column| index.columns.contains(column)))
    }

    /// Whether a table stays small, or cannot be judged in this test.
    fn is_passed_over(&self, node: &Value) -> bool {
        self.table(node).is_some_and(|table| is_small(table) || self.empty.contains(table))
    }
}

async fn postgres_verdict(connection: &DatabaseConnection, name: &str, recorded: &[Recorded]) -> Result<String, DbErr> {
    // Never committed: what is explained is not run, and what is said of sizes is not true.
    let transaction = connection.begin().await?;
    transaction.execute_unprepared("SET LOCAL enable_seqscan = off; SET LOCAL jit = off").await?;
    pretend_to_be_large(&transaction, name).await?;
    let schema = Schema { indexes: indexes(&transaction, name).await?, empty: empty(&transaction, name).await? };
    let mut refused = String::new();
    for Recorded { origin, statement } in recorded {
        if is_allowed(&statement.sql) {
            continue;
        }
        let mut all_reasons = BTreeSet::new();
        for way in WAYS {
            let one = transaction.begin().await?;
            one.execute_unprepared(way).await?;
            let plan = explained(&one, statement).await;
            one.rollback().await?;
            let mut reasons = Vec::new();
            match plan {
                Ok(plan) => look_at(&plan, false, &schema, &mut reasons),
                // The test has taken the tables away.
                Err(error) if is_gone(&error) => {}
                Err(error) => return Err(error),
            }
            if reasons.is_empty() {
                all_reasons.clear();
                break;
            }
            all_reasons.insert(reasons.join("; "));
        }
        if !all_reasons.is_empty() {
            let _ = writeln!(refused, "\n{origin}\n  {}", statement.sql);
        }
        for reasons in all_reasons {
            let _ = writeln!(refused, "  {reasons}");
        }
    }
    ties(&transaction, name, &schema, recorded, &mut refused).await?;
    Ok(refused)
}

/// Finds the statements that name one row, of which the planner cannot tell that they do: those that cost no more without
/// any index that has all of what is unique.
async fn ties(
    transaction: &DatabaseTransaction,
    name: &str,
    schema: &Schema,
    recorded: &[Recorded],
    refused: &mut String,
) -> Result<(), DbErr> {
    let of_schema = format!("relnamespace = '\"{name}\"'::regnamespace");
    let sizes = format!("UPDATE pg_class SET reltuples = {ONE_OF_EACH_TENANT} WHERE relkind = 'r' AND {of_schema}");
    transaction.execute_unprepared(&sizes).await?;
    transaction.execute_unprepared(WAYS[0]).await?;
    let mut costs = Vec::with_capacity(recorded.len());
    for Recorded { statement, .. } in recorded {
        costs.push(explained_apart(transaction, statement).await?.map(|plan| cost(&plan)));
    }
    for index in schema.indexes.iter().filter(|(_, index)| schema.finds_one(index)).map(|(index, _)| index) {
        let hide = format!(
            "UPDATE pg_index SET indisvalid = false \
             WHERE indexrelid = (SELECT oid FROM pg_class WHERE relname = '{index}' AND {of_schema})"
        );
        transaction.execute_unprepared(&hide).await?;
    }
    for (Recorded { origin, statement }, cost_with) in recorded.iter().zip(costs) {
        let Some(plan) = explained_apart(transaction, statement).await? else { continue };
        let is_tie = cost_with.is_some_and(|cost_with| cost(&plan) <= cost_with * AS_CHEAP);
        let mut found = Vec::new();
        if is_tie && !is_allowed(&statement.sql) {
            look_for_lists(&plan, schema, &mut found);
        }
        for index in found {
            let _ =
                writeln!(refused, "\n{origin}\n  {}\n  names one row, and might be served by {index}", statement.sql);
        }
    }
    Ok(())
}

/// Collects the indexes that are read for one row, and find more than that row.
fn look_for_lists(node: &Value, schema: &Schema, found: &mut Vec<String>) {
    let text = |key: &str| node[key].as_str().unwrap_or_default();
    let index = node["Index Name"].as_str().and_then(|name| schema.indexes.get(name));
    // How large a whole index is, the planner knows; how large a part of it is to one tenant, it does not.
    if let Some(index) = index
        && (index.is_partial || is_narrowed(node, &schema.indexes))
        && !schema.is_passed_over(node)
        && CLOSE.iter().all(|(close, _)| node["Index Name"] != *close)
    {
        let conditions = ["Index Cond", "Filter"].map(text).join(" AND ");
        let is_named = |column: &String| names(&conditions, &format!("{column} ="));
        let narrowing = |column: &&String| names(text("Index Cond"), &format!("{column} ="));
        let bound: Vec<&String> = index.columns.iter().take_while(narrowing).collect();
        let of_row: Vec<&Index> = (schema.indexes.values())
            .filter(|unique| unique.table == index.table && unique.is_unique && unique.columns.iter().all(is_named))
            .collect();
        if !of_row.is_empty() && !of_row.iter().any(|unique| unique.columns.iter().all(|c| bound.contains(&c))) {
            found.push(text("Index Name").to_owned());
        }
    }
    for child in node["Plans"].as_array().into_iter().flatten() {
        look_for_lists(child, schema, found);
    }
}

fn cost(plan: &Value) -> f64 {
    plan["Total Cost"].as_f64().unwrap_or_default()
}

/// The plan of a statement, if it has one: it may name a table that is gone, or what only a unique index can answer.
async fn explained_apart(transaction: &DatabaseTransaction, statement: &Statement) -> Result<Option<Value>, DbErr> {
    let one = transaction.begin().await?;
    let plan = explained(&one, statement).await;
    one.rollback().await?;
    match plan {
        Ok(plan) => Ok(Some(plan)),
        Err(error) if is_gone(&error) || error.to_string().contains("ON CONFLICT specification") => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether a statement names a table that is not there.
fn is_gone(error: &DbErr) -> bool {
    let text = error.to_string();
    text.contains("relation \"") && text.contains("does not exist")
}

/// The tables that have no page.
async fn empty(transaction: &DatabaseTransaction, schema: &str) -> Result<HashSet<String>, DbErr> {
    let sql = format!(
        "SELECT relname::text AS name FROM pg_class WHERE relkind = 'r' AND pg_relation_size(oid) = 0 \
         AND relnamespace = '\"{schema}\"'::regnamespace"
    );
    let rows = transaction.query_all_raw(Statement::from_string(DbBackend::Postgres, sql)).await?;
    rows.iter().map(|row| row.try_get("", "name")).collect()
}

/// Lets the planner believe in a great many rows, of which it knows nothing else: what it has found in a long test is true
/// of few. Only a superuser may say that, as whoever tests is.
async fn pretend_to_be_large(transaction: &DatabaseTransaction, schema: &str) -> Result<(), DbErr> {
    let forget = format!(
        "DELETE FROM pg_statistic WHERE starelid IN \
         (SELECT oid FROM pg_class WHERE relnamespace = '\"{schema}\"'::regnamespace)"
    );
    transaction.execute_unprepared(&forget).await?;
    let sql = format!(
        "UPDATE pg_class SET relpages = GREATEST(1, pg_relation_size(oid) / 8192), \
         reltuples = GREATEST(1, pg_relation_size(oid) / 8192) * 1000000.0 \
         WHERE relkind = 'r' AND relnamespace = '\"{schema}\"'::regnamespace AND pg_relation_size(oid) > 0"
    );
    transaction.execute_unprepared(&sql).await.map(drop)
}

async fn indexes(transaction: &DatabaseTransaction, schema: &str) -> Result<HashMap<String, Index>, DbErr> {
    let sql = format!(
        "SELECT c.relname::text AS name, i.indrelid::regclass::text AS of_table, i.indisunique AND i.indpred IS NULL AS is_unique, i.indpred IS NOT NULL AS is_partial, \
         (SELECT string_agg(COALESCE(a.attname::text, pg_get_indexdef(i.indexrelid, k.place::int, false)), ',' ORDER BY k.place) \
         FROM unnest(i.indkey::int2[]) WITH ORDINALITY AS k (number, place) \
         LEFT JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.number AND k.number > 0) AS columns \
         FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid \
         WHERE c.relnamespace = '\"{schema}\"'::regnamespace"
    );
    let rows = transaction.query_all_raw(Statement::from_string(DbBackend::Postgres, sql)).await?;
    rows.iter()
        .map(|row| {
            let columns: String = row.try_get("", "columns")?;
            let columns = columns.split(',').map(str::to_owned).collect();
            let table: String = row.try_get("", "of_table")?;
            let table = table.rsplit('.').next().unwrap_or(&table).trim_matches('"').to_owned();
            let (is_unique, is_partial) = (row.try_get("", "is_unique")?, row.try_get("", "is_partial")?);
            Ok((row.try_get("", "name")?, Index { table, columns, is_unique, is_partial }))
        })
        .collect()
}

async fn explained(transaction: &DatabaseTransaction, statement: &Statement) -> Result<Value, DbErr> {
    let explain = Statement { sql: format!("EXPLAIN (FORMAT JSON) {}", statement.sql), ..statement.clone() };
    let row = transaction.query_one_raw(explain).await?;
    let text = row.as_ref().and_then(sea_orm::QueryResult::try_as_pg_row).map(|row| row.try_get_unchecked(0));
    let text: String =
        text.ok_or_else(|| DbErr::Custom("no plan".to_owned()))?.map_err(|error| DbErr::Custom(error.to_string()))?;
    let plan: Value = serde_json::from_str(&text).map_err(|error| DbErr::Custom(error.to_string()))?;
    Ok(plan[0]["Plan"].clone())
}

/// Collects what is wrong with a node and those below it. `is_limited` says that rows are taken from it in its own order
/// until there are enough.
fn look_at(node: &Value, is_limited: bool, schema: &Schema, reasons: &mut Vec<String>) {
    let text = |key: &str| node[key].as_str().unwrap_or_default();
    let kind = text("Node Type");
    match kind {
        "Seq Scan" if !is_small(text("Relation Name")) => {
            reasons.push(format!("reads all of {}", text("Relation Name")));
        }
        "Index Scan" | "Index Only Scan" | "Bitmap Index Scan"
            if !schema.is_passed_over(node) && !is_narrowed(node, &schema.indexes) =>
        {
            let (index, filter) = (text("Index Name"), text("Filter"));
            if !is_limited {
                reasons.push(format!("reads all of the index {index}"));
            } else if !filter.is_empty() {
                reasons.push(format!("walks the index {index} past what is not {filter}"));
            }
        }
        // One that an index has begun sorts what is equal so far, and stops at the limit.
        "Sort" if is_limited && !is_bounded(node, schema) => {
            reasons.push(format!("sorts by {} what nothing bounds", node["Sort Key"]));
        }
        _ => {}
    }
    for child in node["Plans"].as_array().into_iter().flatten() {
        let is_fed_in_order = !matches!(child["Parent Relationship"].as_str(), Some("InitPlan" | "SubPlan" | "Inner"));
        let passes_on = match kind {
            "Limit" => true,
            "Result" | "Subquery Scan" | "LockRows" | "ProjectSet" | "Append" | "Merge Append" | "Nested Loop"
            | "Unique" | "Group" => is_limited,
            _ => false,
        };
        look_at(child, is_fed_in_order && passes_on, schema, reasons);
    }
}

/// Whether the condition names the first column of the index: by others alone, all of it is read.
fn is_narrowed(node: &Value, indexes: &HashMap<String, Index>) -> bool {
    let condition = node["Index Cond"].as_str().unwrap_or_default();
    let index = node["Index Name"].as_str().and_then(|name| indexes.get(name));
    let first = index.and_then(|index| index.columns.first());
    first.is_some_and(|first| names(condition, first))
}

/// Whether the rows below a node are no more than its statement names, or than a limit of their own.
fn is_bounded(node: &Value, schema: &Schema) -> bool {
    let kind = node["Node Type"].as_str().unwrap_or_default();
    if kind == "Limit" || kind == "Aggregate" && node["Strategy"] == "Plain" {
        return true;
    }
    if let Some(table) = schema.table(node) {
        let text = |key: &str| node[key].as_str().unwrap_or_default();
        let conditions = ["Index Cond", "Recheck Cond", "Filter"].map(text).join(" AND ");
        let is_one = |column: &String| names(&conditions, &format!("{column} ="));
        let names_rows = |index: &Index| index.table == table && index.is_unique && index.columns.iter().all(is_one);
        return schema.is_passed_over(node) || schema.indexes.values().any(names_rows);
    }
    let mut below = node["Plans"].as_array().into_iter().flatten().peekable();
    below.peek().is_some() && below.all(|child| is_bounded(child, schema))
}

/// Whether a condition names a column (and what follows it).
fn names(condition: &str, column: &str) -> bool {
    condition.match_indices(column).any(|(at, _)| {
        let before = condition[..at].chars().next_back();
        let after = condition[at + column.len()..].chars().next();
        let is_word = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
        !is_word(before) && !is_word(after)
    })
}

#[cfg(test)]
mod tests {
    use std::panic::AssertUnwindSafe;

    use futures_util::FutureExt as _;
    use paperkey_migrations::kit::Migrator;

    use super::*;
    use crate::{
        db::{DatabaseUrl, Engine, OutboxMessage, checked},
        testing::{SERVICE, TestDb},
    };

    /// Whether a statement is good, asked of a database in which there is an event on its way.
    async fn is_good(db: &TestDb, database: &Database, sql: &str) -> bool {
        let backend = match database.engine() {
            Engine::Sqlite => DbBackend::Sqlite,
            Engine::Postgres => DbBackend::Postgres,
        };
        let statement = Statement::from_sql_and_values(backend, sql, ["webhook".into()]);
        let recorded = vec![Recorded { origin: "paperkey_kit::store", statement }];
        let judged = async {
            match &db.options().url {
                DatabaseUrl::Postgres(url) => judge_postgres(url, SERVICE, recorded).await,
                DatabaseUrl::Sqlite { .. } => judge_sqlite(database, recorded).await,
            }
        };
        AssertUnwindSafe(judged).catch_unwind().await.is_ok()
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_no_index_serves_is_refused_and_what_one_serves_is_not() {
        for db in [Some(TestDb::sqlite()), TestDb::postgres().await].into_iter().flatten() {
            let database = db.migrated::<Migrator>().await;
            database
                .write(|tx| async move {
                    tx.emit(OutboxMessage {
                        target: "webhook",
                        id: "evt_1".into(),
                        topic: "license.created".into(),
                        team_id: "team_1".into(),
                        payload: vec![1],
                    });
                    Ok::<_, DbError>(())
                })
                .await
                .unwrap();
            for (sql, expected) in [
                ("SELECT id FROM outbox WHERE target = $1 ORDER BY seq LIMIT 5", true),
                ("SELECT id FROM outbox WHERE topic = $1", false),
                ("DELETE FROM outbox WHERE team_id = $1", false),
                ("SELECT o.id FROM leases l JOIN outbox o ON o.target = l.holder WHERE l.name = $1", true),
                ("SELECT holder FROM leases WHERE holder = $1", true),
            ] {
                assert_eq!(is_good(&db, &database, sql).await, expected, "{:?}: {sql}", database.engine());
            }
            if database.engine() == Engine::Postgres {
                for sql in [
                    "SELECT id FROM outbox WHERE topic = $1 ORDER BY seq LIMIT 5",
                    "SELECT id FROM outbox WHERE target = $1 ORDER BY topic LIMIT 5",
                    "SELECT COUNT(*) FROM outbox WHERE seq > 0 AND target <> $1",
                ] {
                    let is_refused = !is_good(&db, &database, sql).await;
                    // The last reads a range of a key, which only who writes it can tell from all there is.
                    assert_eq!(is_refused, !sql.contains("seq > 0"), "{sql}");
                }
            }
            database.close().await;
            db.discard().await;
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn one_row_that_might_be_sought_among_all_of_its_tenant_is_refused() {
        let Some(db) = TestDb::postgres().await else { return };
        let database = db.migrated::<Migrator>().await;
        let made = database.write(|tx| async move {
            for sql in [
                "CREATE TABLE things (id TEXT PRIMARY KEY, team_id TEXT NOT NULL, kind TEXT NOT NULL, told BOOLEAN)",
                "CREATE INDEX things_by_kind ON things (team_id, kind)",
                "CREATE INDEX things_by_team ON things (team_id, id)",
                "INSERT INTO things VALUES ('thing_1', 'team_1', 'x', FALSE)",
            ] {
                tx.execute_unprepared(sql).await?;
            }
            Ok::<_, DbError>(())
        });
        made.await.unwrap();
        for (sql, expected) in [
            ("SELECT kind FROM things WHERE id = $1", true),
            ("SELECT kind FROM things WHERE team_id = $1 AND kind = 'x'", true),
            ("SELECT told FROM things WHERE id = 'thing_1' AND team_id = $1 AND kind = 'x'", false),
            (
                &format!("SELECT told FROM things WHERE id = 'thing_1' AND {}", checked("team_id = $1 AND kind = 'x'")),
                true,
            ),
        ] {
            assert_eq!(is_good(&db, &database, sql).await, expected, "{sql}");
        }
        database.close().await;
        db.discard().await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_the_database_knows_of_small_tables_is_forgotten() {
        let Some(db) = TestDb::postgres().await else { return };
        let database = db.migrated::<Migrator>().await;
        let made = database.write(|tx| async move {
            for sql in [
                "CREATE TABLE things (id TEXT PRIMARY KEY, batch TEXT)",
                "CREATE INDEX things_by_batch ON things (batch)",
                "INSERT INTO things SELECT 'thing_' || n, 'webhook' FROM generate_series(1, 2000) AS n",
                // That all are of one batch, so that each is read in its turn as well as by an index and sorted.
                "ANALYZE things",
            ] {
                tx.execute_unprepared(sql).await?;
            }
            Ok::<_, DbError>(())
        });
        made.await.unwrap();
        assert!(is_good(&db, &database, "SELECT id, batch FROM things WHERE batch = $1 ORDER BY id").await);
        database.close().await;
        db.discard().await;
    }

    #[test]
    fn a_condition_names_a_column_and_not_another_that_begins_like_it() {
        assert!(names("((team_id = $1) AND (id > $2))", "id") && names("(id = 1)", "id ="));
        assert!(!names("(team_id = $1)", "id") && !names("(id_of = 1)", "id"));
    }
}
