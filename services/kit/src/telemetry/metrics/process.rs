//! The process itself: what it was built from, what it uses, how busy its runtime is.
//!
//! Memory, files and time come from `/proc`, and are absent where there is none.

use std::{
    fs,
    time::{Duration, UNIX_EPOCH},
};

use tokio::runtime::Handle;

use super::{Family, Gauge, Snapshot, calls, publish, started};

static BUILD_INFO: Family = Family::gauge(
    "paperkey_build_info",
    &["version", "part"],
    "Always 1: the version of the process, and which part of the product it is.",
);
static READY_FAMILY: Family = Family::gauge(
    "paperkey_ready",
    &[],
    "Whether the process could do its work when it was last looked at, a few seconds ago at most.",
);
static WORKERS: Family = Family::gauge("paperkey_runtime_workers", &[], "Threads that run tasks.");
static TASKS: Family = Family::gauge("paperkey_runtime_alive_tasks", &[], "Tasks that have not ended.");
static QUEUE: Family =
    Family::gauge("paperkey_runtime_queue_depth", &[], "Tasks that wait in the queue which all threads share.");
static CPU: Family =
    Family::counter("process_cpu_seconds_total", &[], "Time of the processors that was used, in seconds.");
static OPEN_FDS: Family = Family::gauge("process_open_fds", &[], "Open file descriptors.");
static MAX_FDS: Family = Family::gauge("process_max_fds", &[], "How many file descriptors may be open.");
static RESIDENT: Family = Family::gauge("process_resident_memory_bytes", &[], "Memory that is in use.");
static VIRTUAL: Family = Family::gauge("process_virtual_memory_bytes", &[], "Addresses that are taken.");
static THREADS: Family = Family::gauge("process_threads", &[], "Threads of the operating system.");
static STARTED: Family = Family::gauge("process_start_time_seconds", &[], "When the process began, since 1970.");

static FAMILIES: &[&Family] = &[
    &BUILD_INFO,
    &READY_FAMILY,
    &WORKERS,
    &TASKS,
    &QUEUE,
    &CPU,
    &OPEN_FDS,
    &MAX_FDS,
    &RESIDENT,
    &VIRTUAL,
    &THREADS,
    &STARTED,
];

/// Whether the process is ready, as whoever judges it has said last.
pub static READY: Gauge = Gauge::new();

/// Publishes what every process has: itself, and the calls of its services. Once a process, in its runtime.
pub fn observe_process(version: &'static str, part: &'static str) {
    let runtime = Handle::current();
    // Made now, so that it is when the process began and not when somebody first looked.
    let since = started().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    publish(FAMILIES, move |snapshot| {
        snapshot.put(&BUILD_INFO, &[version, part], 1_u64);
        snapshot.put(&READY_FAMILY, &[], READY.get());
        snapshot.put(&STARTED, &[], since);
        let metrics = runtime.metrics();
        snapshot.put(&WORKERS, &[], metrics.num_workers());
        snapshot.put(&TASKS, &[], metrics.num_alive_tasks());
        snapshot.put(&QUEUE, &[], metrics.global_queue_depth());
        usage(snapshot);
    });
    publish(calls::FAMILIES, calls::collect);
}

fn usage(snapshot: &mut Snapshot) {
    let used = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    let (whole, part) = (u64::try_from(used.tv_sec).unwrap_or(0), u32::try_from(used.tv_nsec).unwrap_or(0));
    snapshot.put(&CPU, &[], Duration::new(whole, part));
    if let Ok(folder) = fs::read_dir("/proc/self/fd") {
        // One of them is the folder that is being read.
        snapshot.put(&OPEN_FDS, &[], folder.count().saturating_sub(1));
    }
    if let Some(most) = rustix::process::getrlimit(rustix::process::Resource::Nofile).current {
        snapshot.put(&MAX_FDS, &[], most);
    }
    let Ok(status) = fs::read_to_string("/proc/self/status") else { return };
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next()?.parse::<u64>().ok()
    };
    for (family, name, unit) in [(&RESIDENT, "VmRSS:", 1_024), (&VIRTUAL, "VmSize:", 1_024), (&THREADS, "Threads:", 1)]
    {
        if let Some(value) = field(name) {
            snapshot.put(family, &[], value.saturating_mul(unit));
        }
    }
}
