//! What a process of a fleet knows of its ways to others, of the places that it has for calls, and of its certificates.
//!
//! Where there is nothing of a kind, as in a process that holds everything, the names are announced without numbers.

use std::time::Duration;

use super::{Family, publish};
use crate::{channel::ChannelStats, shed::Load, tls::Shown};

static CHANNEL_CALLS: Family =
    Family::counter("paperkey_channel_calls_total", &["service"], "Calls that this process has made to another.");
static CHANNEL_RETRIES: Family =
    Family::counter("paperkey_channel_retries_total", &["service"], "How often such a call was sent again.");
static CHANNEL_REFUSED: Family = Family::counter(
    "paperkey_channel_retries_refused_total",
    &["service"],
    "How often such a call was not sent again, because too many were.",
);
static CHANNEL_DIALS: Family = Family::counter(
    "paperkey_channel_dials_failed_total",
    &["service"],
    "Attempts to connect to another process that came to nothing.",
);
static CHANNEL_CONNECTED: Family =
    Family::gauge("paperkey_channel_connected", &["service"], "Addresses of a service to which there is a connection.");
static CHANNEL_KNOWN: Family = Family::gauge("paperkey_channel_known", &["service"], "Addresses of a service.");
static CHANNEL_IN_FLIGHT: Family =
    Family::gauge("paperkey_channel_in_flight", &["service"], "Calls to another process that are under way.");
static CHANNEL_FAMILIES: &[&Family] = &[
    &CHANNEL_CALLS,
    &CHANNEL_RETRIES,
    &CHANNEL_REFUSED,
    &CHANNEL_DIALS,
    &CHANNEL_CONNECTED,
    &CHANNEL_KNOWN,
    &CHANNEL_IN_FLIGHT,
];

/// Publishes the ways to other processes, by the service that they lead to.
pub fn observe_channels(read: impl Fn() -> Vec<(String, ChannelStats)> + Send + Sync + 'static) {
    publish(CHANNEL_FAMILIES, move |snapshot| {
        for (service, figures) in read() {
            let service: &[&str] = &[&service];
            snapshot.put(&CHANNEL_CALLS, service, figures.calls);
            snapshot.put(&CHANNEL_RETRIES, service, figures.retries);
            snapshot.put(&CHANNEL_REFUSED, service, figures.retries_refused);
            snapshot.put(&CHANNEL_DIALS, service, figures.dials_failed);
            snapshot.put(&CHANNEL_CONNECTED, service, figures.connected);
            snapshot.put(&CHANNEL_KNOWN, service, figures.known);
            snapshot.put(&CHANNEL_IN_FLIGHT, service, figures.in_flight);
        }
    });
}

static PLACES_MAX: Family =
    Family::gauge("paperkey_places_max", &[], "Calls that the process answers at a time; more are shed.");
static PLACES_USED: Family =
    Family::gauge("paperkey_places_used", &["kind"], "Calls and streams that the process is answering.");
static SHED: Family = Family::counter(
    "paperkey_shed_total",
    &["kind"],
    "Calls and streams that were refused unread because the process had no place for them.",
);
static LOAD_FAMILIES: &[&Family] = &[&PLACES_MAX, &PLACES_USED, &SHED];

/// Publishes the places that the process has for calls.
pub fn observe_load(read: impl Fn() -> Load + Send + Sync + 'static) {
    publish(LOAD_FAMILIES, move |snapshot| {
        let figures = read();
        snapshot.put(&PLACES_MAX, &[], figures.most);
        snapshot.put(&PLACES_USED, &["call"], figures.calls);
        snapshot.put(&PLACES_USED, &["stream"], figures.streams);
        snapshot.put(&SHED, &["call"], figures.shed_calls);
        snapshot.put(&SHED, &["stream"], figures.shed_streams);
    });
}

static CERTIFICATE: Family = Family::gauge(
    "paperkey_certificate_expiry_timestamp_seconds",
    &["certificate"],
    "Until when a certificate is good that the process shows, since 1970.",
);
static CERTIFICATE_FAMILIES: &[&Family] = &[&CERTIFICATE];

/// Publishes the certificates that the process shows: by the key of the configuration that names each, with its end in
/// milliseconds since 1970.
pub fn observe_certificates(read: impl Fn() -> Vec<Shown> + Send + Sync + 'static) {
    publish(CERTIFICATE_FAMILIES, move |snapshot| {
        for Shown { name, not_after_ms, .. } in read() {
            let end = Duration::from_millis(u64::try_from(not_after_ms).unwrap_or(0));
            snapshot.put(&CERTIFICATE, &[name], end);
        }
    });
}
