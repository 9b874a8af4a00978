//! What the parts of a process know of themselves and are asked for: databases, credentials, records, limits.

use std::sync::Arc;

use super::{Family, Snapshot, publish};
use crate::{
    audit::AuditSink,
    authn::{CachedAuthenticator, Judgements},
    cache,
    db::{Database, JobKind},
    limits::{Limiter, RedisStats, StoreState},
};

static DB_READ_STATEMENTS: Family =
    Family::counter("paperkey_db_read_statements_total", &["service"], "Statements of reading jobs.");
static DB_WRITE_STATEMENTS: Family =
    Family::counter("paperkey_db_write_statements_total", &["service"], "Statements of writing jobs.");
static DB_WRITE_JOBS: Family =
    Family::counter("paperkey_db_write_jobs_total", &["service"], "Jobs given to the writer.");
static DB_COMMITS: Family =
    Family::counter("paperkey_db_commits_total", &["service"], "Commits; a group of jobs may share one.");
static DB_UP: Family = Family::gauge(
    "paperkey_db_up",
    &["service"],
    "Whether the database answered when it was last looked at, a few seconds ago at most.",
);
static DB_CONNECTIONS_MAX: Family =
    Family::gauge("paperkey_db_connections_max", &["service"], "Connections, or readers of a file, that there may be.");
static DB_CONNECTIONS: Family = Family::gauge(
    "paperkey_db_connections",
    &["service", "state"],
    "Connections, or readers of a file, by what they do.",
);
static DB_WAITING: Family = Family::gauge(
    "paperkey_db_jobs_waiting",
    &["service"],
    "Jobs under way that hold no connection: they wait for one, or are between two statements.",
);
static DB_IN_FLIGHT: Family = Family::gauge("paperkey_db_jobs_in_flight", &["service"], "Jobs under way.");
static DB_DURATION: Family = Family::histogram(
    "paperkey_db_job_duration_seconds",
    &["service", "kind"],
    "How long jobs took, with the wait for a connection or for the writer.",
);
static DB_FAILURES: Family =
    Family::counter("paperkey_db_job_failures_total", &["service", "kind"], "Jobs that gave no result.");
static DB_QUEUE: Family =
    Family::gauge("paperkey_db_writer_queue_depth", &["service"], "Jobs that wait for the writer of a file.");
static DB_GROUP: Family =
    Family::histogram("paperkey_db_group_jobs", &["service"], "Jobs of a group that the writer of a file ran as one.");
static OUTBOX_WAITING: Family = Family::gauge(
    "paperkey_outbox_waiting",
    &["service", "target"],
    "Events that are not delivered yet; counting ends at 10000.",
);
static OUTBOX_AGE: Family = Family::gauge(
    "paperkey_outbox_oldest_age_seconds",
    &["service", "target"],
    "How long the oldest event that is not delivered yet has waited.",
);
static OUTBOX_FAILURES: Family = Family::counter(
    "paperkey_outbox_delivery_failures_total",
    &["service", "target"],
    "Deliveries that failed and are tried again.",
);
static OUTBOX_DELIVERED: Family =
    Family::counter("paperkey_outbox_delivered_total", &["service", "target"], "Events that were delivered.");
static LEASE: Family =
    Family::gauge("paperkey_lease_held", &["service", "lease"], "Whether this process holds the lease.");
static DB_FAMILIES: &[&Family] = &[
    &DB_READ_STATEMENTS,
    &DB_WRITE_STATEMENTS,
    &DB_WRITE_JOBS,
    &DB_COMMITS,
    &DB_UP,
    &DB_CONNECTIONS_MAX,
    &DB_CONNECTIONS,
    &DB_WAITING,
    &DB_IN_FLIGHT,
    &DB_DURATION,
    &DB_FAILURES,
    &DB_QUEUE,
    &DB_GROUP,
    &OUTBOX_WAITING,
    &OUTBOX_AGE,
    &OUTBOX_FAILURES,
    &OUTBOX_DELIVERED,
    &LEASE,
];

/// Publishes what databases do, and what stands in them that others wait for.
pub fn observe_databases(databases: Vec<(&'static str, Database)>) {
    publish(DB_FAMILIES, move |snapshot| {
        for (service, database) in &databases {
            observe_database(snapshot, service, database);
        }
    });
}

fn observe_database(snapshot: &mut Snapshot, service: &'static str, database: &Database) {
    let stats = database.stats();
    snapshot.put(&DB_READ_STATEMENTS, &[service], stats.read_statements);
    snapshot.put(&DB_WRITE_STATEMENTS, &[service], stats.write_statements);
    snapshot.put(&DB_WRITE_JOBS, &[service], stats.write_jobs);
    snapshot.put(&DB_COMMITS, &[service], stats.commits);

    let pool = database.pool();
    snapshot.put(&DB_CONNECTIONS_MAX, &[service], pool.max);
    snapshot.put(&DB_CONNECTIONS, &[service, "used"], pool.open.saturating_sub(pool.idle));
    snapshot.put(&DB_CONNECTIONS, &[service, "idle"], pool.idle);
    snapshot.put(&DB_WAITING, &[service], pool.waiting);
    if let Some(depth) = pool.writer_queue {
        snapshot.put(&DB_QUEUE, &[service], depth);
    }

    let figures = database.figures();
    snapshot.put(&DB_UP, &[service], figures.is_up());
    snapshot.put(&DB_IN_FLIGHT, &[service], figures.in_flight());
    for (kind, word) in [(JobKind::Read, "read"), (JobKind::Write, "write")] {
        let (durations, failures) = figures.jobs(kind);
        snapshot.put(&DB_DURATION, &[service, word], durations);
        snapshot.put(&DB_FAILURES, &[service, word], failures);
    }
    if pool.writer_queue.is_some() {
        snapshot.put(&DB_GROUP, &[service], figures.groups());
    }
    for (target, outbox) in figures.outboxes() {
        snapshot.put(&OUTBOX_WAITING, &[service, target], outbox.waiting);
        snapshot.put(&OUTBOX_AGE, &[service, target], outbox.oldest);
        snapshot.put(&OUTBOX_FAILURES, &[service, target], outbox.failures);
        snapshot.put(&OUTBOX_DELIVERED, &[service, target], outbox.delivered);
    }
    let now_ms = database.clock().now_ms();
    for (lease, until_ms) in figures.leases() {
        snapshot.put(&LEASE, &[service, &lease], until_ms > now_ms);
    }
}

static LOOKUPS: Family =
    Family::counter("paperkey_credential_lookups_total", &[], "Credentials that auth was asked about.");
static HITS: Family = Family::counter("paperkey_credential_hits_total", &[], "Credentials that were known.");
static MALFORMED: Family =
    Family::counter("paperkey_credential_malformed_total", &[], "Credentials that could be none, by form or checksum.");
static CREDENTIALS: Family = Family::gauge("paperkey_credential_entries", &[], "Credentials that are remembered.");
static FEED_POLLS: Family =
    Family::counter("paperkey_feed_polls_total", &["outcome"], "How often auth was asked what has changed.");
static FEED_AGE: Family = Family::gauge(
    "paperkey_feed_age_seconds",
    &[],
    "How long ago the last question of what has changed began that was answered to its end. Beyond 0.9 seconds nothing \
     that is remembered is trusted.",
);
static CACHE_HITS: Family =
    Family::counter("paperkey_cache_hits_total", &["cache"], "Questions whose answer was known and still good.");
static CACHE_MISSES: Family =
    Family::counter("paperkey_cache_misses_total", &["cache"], "Questions whose answer was not known, or not good.");
static CACHE_FAMILIES: &[&Family] =
    &[&LOOKUPS, &HITS, &MALFORMED, &CREDENTIALS, &FEED_POLLS, &FEED_AGE, &CACHE_HITS, &CACHE_MISSES];

/// Publishes what is known of credentials without asking, and how well it is kept; and the other caches of the process.
pub fn observe_authenticator(authenticator: Arc<CachedAuthenticator>) {
    publish(CACHE_FAMILIES, move |snapshot| {
        let Judgements { lookups, hits, malformed } = authenticator.judgements();
        snapshot.put(&LOOKUPS, &[], lookups);
        snapshot.put(&HITS, &[], hits);
        snapshot.put(&MALFORMED, &[], malformed);
        let feed = authenticator.feed();
        snapshot.put(&CREDENTIALS, &[], feed.entries);
        snapshot.put(&FEED_POLLS, &["answered"], feed.answered);
        snapshot.put(&FEED_POLLS, &["failed"], feed.failed);
        snapshot.put(&FEED_AGE, &[], feed.age);
        for (name, hits, misses) in cache::counts() {
            snapshot.put(&CACHE_HITS, &[name], hits);
            snapshot.put(&CACHE_MISSES, &[name], misses);
        }
    });
}

static AUDIT_RECORDS: Family = Family::counter("paperkey_audit_records_total", &[], "Calls recorded.");
static AUDIT_HANDED_OVER: Family =
    Family::counter("paperkey_audit_handed_over_total", &[], "Records that auth has taken.");
static AUDIT_LOST: Family = Family::counter("paperkey_audit_lost_total", &[], "Records that found no room.");
static AUDIT_WAITING: Family = Family::gauge("paperkey_audit_waiting", &[], "Records that wait in memory.");
static AUDIT_SPOOLED: Family = Family::gauge("paperkey_audit_spooled_bytes", &[], "Bytes that wait on disk.");
static AUDIT_SPOOL_MAX: Family =
    Family::gauge("paperkey_audit_spool_max_bytes", &[], "Bytes that may wait on disk until no call is let in.");
static AUDIT_OPEN: Family = Family::gauge(
    "paperkey_audit_open",
    &[],
    "Whether there is room for records. Where there is none, calls are refused.",
);
static AUDIT_FAMILIES: &[&Family] =
    &[&AUDIT_RECORDS, &AUDIT_HANDED_OVER, &AUDIT_LOST, &AUDIT_WAITING, &AUDIT_SPOOLED, &AUDIT_SPOOL_MAX, &AUDIT_OPEN];

/// Publishes where the records of calls are that auth has not taken yet.
pub fn observe_audit(audit: Arc<AuditSink>, spool_max_bytes: u64) {
    publish(AUDIT_FAMILIES, move |snapshot| {
        let counts = audit.counts();
        snapshot.put(&AUDIT_RECORDS, &[], counts.recorded);
        snapshot.put(&AUDIT_HANDED_OVER, &[], counts.handed_over);
        snapshot.put(&AUDIT_LOST, &[], counts.lost);
        snapshot.put(&AUDIT_WAITING, &[], counts.waiting);
        snapshot.put(&AUDIT_SPOOLED, &[], counts.spooled_bytes);
        snapshot.put(&AUDIT_SPOOL_MAX, &[], spool_max_bytes);
        snapshot.put(&AUDIT_OPEN, &[], audit.is_open());
    });
}

static STORE_UP: Family = Family::gauge("paperkey_limits_store_up", &[], "Whether gateways share their limits.");
static STORE_FAILURES: Family =
    Family::counter("paperkey_limits_store_failures_total", &[], "How often the store of limits was lost.");
static GATEWAYS: Family = Family::gauge("paperkey_limits_gateways", &[], "Gateways that share limits.");
static STORE_FAMILIES: &[&Family] = &[&STORE_UP, &STORE_FAILURES, &GATEWAYS];

/// Publishes how the store is that gateways share their limits in. Without one there are no numbers.
pub fn observe_limiter(limiter: Arc<Limiter>) {
    publish(STORE_FAMILIES, move |snapshot| {
        let Limiter::Redis(limiter) = &*limiter else { return };
        let RedisStats { state, failures, gateways } = limiter.stats();
        snapshot.put(&STORE_UP, &[], state == StoreState::Up);
        snapshot.put(&STORE_FAILURES, &[], failures);
        snapshot.put(&GATEWAYS, &[], gateways);
    });
}
