//! Lists of licences, newest first, each found by an index however many licences there are.
//!
//! What all filters say together is in every statement; which index it walks follows from the narrowest filter. Most
//! indexes end in the id, so that a page is a walk from where the last one ended. Three things have no such index:
//! * a prefix of an email address. Its matches are counted first, up to a bound. As long as it is not reached, their
//!   ids are sorted; beyond it they are so many that walking all licences by id meets them soon. Where a status is
//!   named too, those of the status are walked, since of the matches few may have it;
//! * what is due to expire and was not told yet, which the clock makes expired and the index does not know yet;
//! * what was told and has its end before it nevertheless, since the clock was set back.
//!   Of the last two there are few, and they are sorted in the same way.
//!
//! SQLite is told which index to walk. PostgreSQL chooses by its statistics, so a statement is put in such a way that
//! the choice is between good ones: the order that it asks for is one that only the right index has. That of ids is the
//! order of their bytes, which the primary key has not (see the migration).
//!
//! Deliberately absent: how many there are in all.

use paperkey_kit::{
    db::{DbError, Engine, Reader, checked},
    values::Page,
};
use sea_orm::{ConnectionTrait as _, FromQueryResult as _, Statement, Value};

use super::{
    Failure, TenantStore,
    licenses::{Model, license_of},
};
use crate::domain::{
    could_be_id,
    license::{License, Status},
    license_key::LicenseKey,
};

/// Matches that are sorted; where there are more, all are walked.
const SORTED: u64 = 10_000;
/// Sorted matches whose rows are read at once at most.
const CHUNK: u64 = 512;

/// Which licences a list shows. Fields that are absent leave all.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Those of a product.
    pub product_id: Option<String>,
    /// Those of a status.
    pub status: Option<Status>,
    /// Those of an email address.
    pub email: Option<String>,
    /// Those of a client.
    pub client_id: Option<String>,
    /// Those whose email address begins so, or whose licence key or id is this.
    pub query: Option<String>,
}

impl TenantStore {
    /// A page of licences, newest first, and the token of the next.
    pub async fn list(&self, filter: Filter, page: Page) -> Result<(Vec<License>, Option<String>), Failure> {
        let Some(plan) = self.plan(filter) else { return Ok((Vec::new(), None)) };
        let (before, limit) = (page.before.clone(), page.size + 1);
        let rows = self
            .parts()
            .database
            .read(move |reader| async move { plan.rows(&reader, before.as_deref(), limit).await })
            .await?;
        let (rows, next) = page.cut(rows, |row| &row.id);
        let vault = &self.parts().vault;
        Ok((rows.into_iter().map(|row| license_of(row, vault)).collect(), next))
    }

    /// How to find what a filter leaves; `None` where that is nothing.
    fn plan(&self, filter: Filter) -> Option<Plan> {
        let Filter { product_id, status, email, client_id, query } = filter;
        let product_id = match (&self.product_id, product_id) {
            (Some(bound), Some(named)) if *bound != named => return None,
            (Some(bound), _) => Some(bound.clone()),
            (None, named) => named,
        };
        let now_ms = self.store.now_ms();
        let tenant =
            Sql::new("team_id = ? AND mode = ?").bind(self.tenant.team_id.as_str()).bind(self.tenant.mode_word());
        let mut whole = tenant.clone();
        if let Some(product_id) = &product_id {
            whole = whole.and("product_id = ?").bind(product_id.as_str());
        }
        match status {
            None => {}
            Some(Status::Revoked) => whole = whole.and("revoked_at_ms IS NOT NULL"),
            Some(Status::Expired) => whole = whole.and("revoked_at_ms IS NULL AND expires_at_ms <= ?").bind(now_ms),
            Some(Status::Active) => {
                let term = "revoked_at_ms IS NULL AND (expires_at_ms IS NULL OR expires_at_ms > ?)";
                whole = whole.and(term).bind(now_ms);
            }
        }
        if let Some(client_id) = &client_id {
            whole = whole.and("client_id = ?").bind(client_id.as_str());
        }
        if let Some(email) = &email {
            whole = whole.and("email_lower = ?").bind(email.to_lowercase());
        }
        let query = query.map(|query| self.search(&query));
        if let Some(search) = &query {
            whole = whole.and(&format!("({})", search.any.text)).bind_all(&search.any.values);
        }

        let by_product = product_id.is_some();
        let all = if by_product { "licenses_by_product" } else { "licenses_by_tenant" };
        let all = if client_id.is_some() { "licenses_by_client" } else { all };
        let of_status = |status| of_status(status, by_product, &tenant, &whole, now_ms);
        let (sources, dense) = match (email, query, client_id, status) {
            (Some(_), ..) => (vec![Source::walk("licenses_by_email", &whole)], Vec::new()),
            (None, Some(search), None, Some(status)) => (search.sources(&tenant, &whole), of_status(status)),
            (None, Some(search), ..) => (search.sources(&tenant, &whole), Vec::new()),
            (None, None, None, Some(status)) => (of_status(status), Vec::new()),
            (None, None, Some(_), _) | (None, None, None, None) => (vec![Source::walk(all, &whole)], Vec::new()),
        };
        let ways = [sources, dense, vec![Source::walk(all, &whole)]];
        let engine = self.parts().database.engine();
        Some(Plan { engine, ways, whole, sorted: SORTED, chunk: CHUNK })
    }

    fn search(&self, query: &str) -> Search {
        let prefix = query.to_lowercase();
        // The index of PostgreSQL sorts by bytes, and only these operators do.
        let (from, to) = match self.parts().database.engine() {
            Engine::Sqlite => ("email_lower >= ?", "email_lower < ?"),
            Engine::Postgres => ("email_lower ~>=~ ?", "email_lower ~<~ ?"),
        };
        let mut prefixed = Sql::new(from).bind(prefix.as_str());
        if let Some(end) = after_all_with(&prefix) {
            prefixed = prefixed.and(to).bind(end);
        }
        let mut exact = Vec::new();
        if let Ok(key) = LicenseKey::parse(query) {
            exact.push(Sql::new("key_hash = ?").bind(self.parts().vault.hash(&key).to_vec()));
        }
        if could_be_id(query) {
            exact.push(Sql::new("id = ?").bind(query));
        }
        let mut any = Sql::new(&format!("({})", prefixed.text)).bind_all(&prefixed.values);
        for term in &exact {
            any = any.or(&term.text).bind_all(&term.values);
        }
        Search { any, prefixed, exact }
    }
}

/// What a search looks for.
struct Search {
    /// All of it.
    any: Sql,
    /// Email addresses.
    prefixed: Sql,
    /// A key, and an id.
    exact: Vec<Sql>,
}

impl Search {
    fn sources(self, tenant: &Sql, whole: &Sql) -> Vec<Source> {
        let prefixed = tenant.clone().and(&self.prefixed.text).bind_all(&self.prefixed.values);
        let by_email = Source::Sorted { index: "licenses_by_email", order: Order::Email, condition: prefixed };
        let exact = self.exact.into_iter().map(|term| {
            let condition = whole.checked().and(&term.text).bind_all(&term.values);
            Source::Walk { index: None, condition }
        });
        std::iter::once(by_email).chain(exact).collect()
    }
}

/// The least text that is greater than all that begin with `prefix`; `None` if there is none.
fn after_all_with(prefix: &str) -> Option<String> {
    let mut characters: Vec<char> = prefix.chars().collect();
    while let Some(last) = characters.pop() {
        // Characters sort as their bytes do.
        if let Some(next) = (last..=char::MAX).nth(1) {
            characters.push(next);
            return Some(characters.into_iter().collect());
        }
    }
    None
}

fn of_status(status: Status, by_product: bool, tenant: &Sql, whole: &Sql, now_ms: i64) -> Vec<Source> {
    let walk = |of_all, of_product, told: &str| {
        Source::walk(if by_product { of_product } else { of_all }, &whole.clone().and(told))
    };
    // Of all products of the tenant, since they are few, and no index has them by product.
    let few = |index, term: &str| {
        let condition = tenant.clone().and("revoked_at_ms IS NULL").and(term).bind(now_ms);
        Source::Sorted { index, order: Order::Expiry, condition }
    };
    match status {
        Status::Revoked => vec![walk("licenses_revoked", "licenses_revoked_by_product", "revoked_at_ms IS NOT NULL")],
        Status::Active => vec![
            walk("licenses_active", "licenses_active_by_product", "expired_event_at_ms IS NULL"),
            few("licenses_early", "expired_event_at_ms IS NOT NULL AND expires_at_ms > ?"),
        ],
        // What is due is looked at first: if it is told in between, it is found twice and not never.
        Status::Expired => vec![
            few(
                "licenses_due_by_tenant",
                "expires_at_ms IS NOT NULL AND expired_event_at_ms IS NULL AND expires_at_ms <= ?",
            ),
            walk("licenses_expired", "licenses_expired_by_product", "expired_event_at_ms IS NOT NULL"),
        ],
    }
}

/// A condition with its values, each of them a question mark.
#[derive(Clone, Debug)]
struct Sql {
    text: String,
    values: Vec<Value>,
}

impl Sql {
    fn new(text: &str) -> Self {
        Self { text: text.to_owned(), values: Vec::new() }
    }

    fn bind(mut self, value: impl Into<Value>) -> Self {
        self.values.push(value.into());
        self
    }

    fn bind_all(mut self, values: &[Value]) -> Self {
        self.values.extend_from_slice(values);
        self
    }

    /// The same of rows that are found otherwise.
    fn checked(&self) -> Self {
        Self { text: checked(&self.text), values: self.values.clone() }
    }

    fn and(self, term: &str) -> Self {
        self.then(" AND ").then(term)
    }

    fn or(self, term: &str) -> Self {
        self.then(" OR ").then(term)
    }

    fn then(mut self, text: &str) -> Self {
        self.text.push_str(text);
        self
    }

    /// The statement, with numbers as both engines take them.
    fn statement(self, engine: Engine) -> Statement {
        let backend = match engine {
            Engine::Sqlite => sea_orm::DbBackend::Sqlite,
            Engine::Postgres => sea_orm::DbBackend::Postgres,
        };
        let mut text = String::with_capacity(self.text.len() + 2 * self.values.len());
        for (number, part) in self.text.split('?').enumerate() {
            if number > 0 {
                text.push('$');
                text.push_str(&number.to_string());
            }
            text.push_str(part);
        }
        Statement::from_sql_and_values(backend, text, self.values)
    }
}

/// In which order an index has its matches, where that is not by id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    Email,
    Expiry,
}

/// Where rows come from.
#[derive(Clone, Debug)]
enum Source {
    /// An index that ends in the id, or finds one row.
    Walk { index: Option<&'static str>, condition: Sql },
    /// An index whose matches must be sorted.
    Sorted { index: &'static str, order: Order, condition: Sql },
}

impl Source {
    fn walk(index: &'static str, condition: &Sql) -> Self {
        Self::Walk { index: Some(index), condition: condition.clone() }
    }
}

/// How licences are found.
#[derive(Clone, Debug)]
struct Plan {
    engine: Engine,
    /// What holds for each of them.
    whole: Sql,
    /// Where they are, all of the sources of one way together: the first that is there and has not too many matches to
    /// be sorted. The last has none to be sorted.
    ways: [Vec<Source>; 3],
    /// [`SORTED`] and [`CHUNK`].
    sorted: u64,
    chunk: u64,
}

impl Plan {
    /// The newest before an id.
    async fn rows(&self, reader: &Reader, before: Option<&str>, limit: u64) -> Result<Vec<Model>, Failure> {
        let mut sources: &[Source] = &[];
        for way in self.ways.iter().filter(|way| !way.is_empty()) {
            sources = way;
            if !self.is_dense(reader, way).await? {
                break;
            }
        }
        let mut rows: Vec<Model> = Vec::new();
        for source in sources {
            match source {
                Source::Walk { index, condition } => {
                    rows.extend(self.read(reader, self.page(*index, condition, before, limit)).await?);
                }
                Source::Sorted { .. } => rows.extend(self.sorted(reader, source, before, limit).await?),
            }
        }
        rows.sort_by(|one, other| other.id.cmp(&one.id));
        rows.dedup_by(|one, other| one.id == other.id);
        rows.truncate(usize::try_from(limit).unwrap_or(usize::MAX));
        Ok(rows)
    }

    /// Whether a way has too many matches to be sorted.
    async fn is_dense(&self, reader: &Reader, way: &[Source]) -> Result<bool, DbError> {
        for count in way.iter().filter_map(|source| self.count(source)) {
            let row = reader.query_one_raw(count).await?;
            let count = row.map(|row| row.try_get::<i64>("", "n")).transpose()?.unwrap_or(0);
            if u64::try_from(count).is_ok_and(|count| count > self.sorted) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    async fn read(&self, reader: &Reader, statement: Statement) -> Result<Vec<Model>, DbError> {
        let rows = reader.query_all_raw(statement).await?;
        Ok(rows.iter().map(|row| Model::from_query_result(row, "")).collect::<Result<_, _>>()?)
    }

    /// The newest of the matches of an index that must be sorted.
    async fn sorted(
        &self,
        reader: &Reader,
        source: &Source,
        before: Option<&str>,
        limit: u64,
    ) -> Result<Vec<Model>, DbError> {
        let mut before = before.map(ToOwned::to_owned);
        let mut rows = Vec::new();
        while (rows.len() as u64) < limit {
            let found = reader.query_all_raw(self.ids(source, before.as_deref())).await?;
            let ids = found.iter().map(|row| row.try_get("", "id")).collect::<Result<Vec<String>, _>>()?;
            let Some(last) = ids.last() else { break };
            before = Some(last.clone());
            let is_last = (ids.len() as u64) < self.chunk;
            rows.extend(self.read(reader, self.of_ids(ids, limit)).await?);
            if is_last {
                break;
            }
        }
        Ok(rows)
    }

    /// `FROM licenses`, by that index. PostgreSQL takes no advice.
    fn from(&self, index: Option<&str>) -> String {
        match (self.engine, index) {
            (Engine::Sqlite, Some(index)) => format!("FROM licenses INDEXED BY {index}"),
            _ => "FROM licenses".to_owned(),
        }
    }

    /// The id, sorted by its bytes.
    fn id(&self) -> &'static str {
        match self.engine {
            Engine::Sqlite => "id",
            Engine::Postgres => "id COLLATE \"C\"",
        }
    }

    /// Reads a page off a walk.
    fn page(&self, index: Option<&'static str>, condition: &Sql, before: Option<&str>, limit: u64) -> Statement {
        let mut sql = Sql::new(&format!("SELECT * {} WHERE {}", self.from(index), condition.text));
        sql = sql.bind_all(&condition.values);
        if let Some(before) = before {
            sql = sql.and(&format!("{} < ?", self.id())).bind(before);
        }
        sql.then(&format!(" ORDER BY {} DESC LIMIT ?", self.id()))
            .bind(i64::try_from(limit).unwrap_or(i64::MAX))
            .statement(self.engine)
    }

    /// The matches of an index that must be sorted, up to a bound: no more than that are looked at.
    fn matches(&self, source: &Source, bound: u64) -> Option<Sql> {
        let Source::Sorted { index, order, condition } = source else { return None };
        let order = match (order, self.engine) {
            (Order::Expiry, _) => "expires_at_ms",
            (Order::Email, Engine::Sqlite) => "email_lower",
            (Order::Email, Engine::Postgres) => "email_lower USING ~<~",
        };
        let text =
            format!("SELECT id {} WHERE {} ORDER BY {order} LIMIT {bound}", self.from(Some(*index)), condition.text);
        Some(Sql::new(&text).bind_all(&condition.values))
    }

    /// Whether there are more matches than are sorted; `None` for a walk.
    fn count(&self, source: &Source) -> Option<Statement> {
        let matches = self.matches(source, self.sorted + 1)?;
        let text = format!("SELECT COUNT(*) AS n FROM ({}) AS matches", matches.text);
        Some(Sql::new(&text).bind_all(&matches.values).statement(self.engine))
    }

    /// The newest ids among the matches.
    fn ids(&self, source: &Source, before: Option<&str>) -> Statement {
        let matches =
            self.matches(source, self.sorted).unwrap_or_else(|| Sql::new("SELECT id FROM licenses WHERE FALSE"));
        let mut sql = Sql::new(&format!("SELECT id FROM ({}) AS matches", matches.text)).bind_all(&matches.values);
        if let Some(before) = before {
            sql = sql.then(&format!(" WHERE {} < ?", self.id())).bind(before);
        }
        sql.then(&format!(" ORDER BY {} DESC LIMIT {}", self.id(), self.chunk)).statement(self.engine)
    }

    /// The rows of those ids that are all that is asked for.
    fn of_ids(&self, mut ids: Vec<String>, limit: u64) -> Statement {
        // Of few lengths, so that there are few statements to prepare. An id may be there twice.
        if let Some(last) = ids.last().cloned() {
            ids.resize(ids.len().next_power_of_two(), last);
        }
        let places = vec!["?"; ids.len()].join(", ");
        let whole = self.whole.checked();
        let text = format!(
            "SELECT * FROM licenses WHERE id IN ({places}) AND {} ORDER BY {} DESC LIMIT ?",
            whole.text,
            self.id()
        );
        let ids: Vec<Value> = ids.into_iter().map(Value::from).collect();
        Sql::new(&text)
            .bind_all(&ids)
            .bind_all(&whole.values)
            .bind(i64::try_from(limit).unwrap_or(i64::MAX))
            .statement(self.engine)
    }
}

#[cfg(test)]
mod tests;
