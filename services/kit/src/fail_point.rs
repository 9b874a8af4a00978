//! Places at which a process may be made to die, for tests of crashes.
//!
//! A test that kills a process from outside hits it at some moment; here it dies at one that matters, as often as the
//! test is run. In a build with debug assertions the variable `PAPERKEY_FAIL_POINT` names a [`Point`], such as
//! `claim.after_commit`, or its third reaching as `claim.after_commit:3`: the process then ends as by `kill -9`. Nothing
//! unwinds, nothing is flushed, no connection is closed in an orderly way. A release build holds none of this.
//!
//! Points are reached by work alone and never by idling, so that their numbers count what happens to events.
//!
//! Deliberately absent: failures that a process survives. Errors, delays and cut connections are brought about from
//! outside, by receivers and databases that behave so.

#[cfg(debug_assertions)]
use std::{
    env,
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
    },
};

/// The variable that arms a point.
pub const VARIABLE: &str = "PAPERKEY_FAIL_POINT";

/// A moment on an event's way, from the change that causes it to the outcome of its delivery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Point {
    /// The change and its event are written, and not yet committed.
    OutboxBeforeCommit,
    /// They are committed; nobody was answered, and the relay knows nothing.
    OutboxAfterCommit,
    /// The relay has read events, and has not handed them over.
    RelayBeforeDelivery,
    /// They were taken over, and still stand in the outbox.
    RelayAfterDelivery,
    /// Events and their deliveries are written, and not yet committed.
    FanOutBeforeCommit,
    /// They are committed, and whoever handed the events over was not answered.
    FanOutAfterCommit,
    /// Deliveries are claimed, and nothing of them was sent.
    ClaimAfterCommit,
    /// A delivery is about to be sent.
    PostBefore,
    /// Its receiver has answered, or has not, and nothing of that is queued.
    PostAfter,
    /// Outcomes are written, and not yet committed.
    OutcomeBeforeCommit,
    /// They are committed, and the dispatcher knows nothing of it.
    OutcomeAfterCommit,
    /// A backup holds all writers.
    BackupHolding,
    /// It has let them go, and copies.
    BackupCopying,
    /// All of it is on disk, and not yet under its name.
    BackupBeforeRename,
    /// A restored installation is on disk, and nothing of it in its place.
    RestoreBeforeMove,
    /// A part of it is.
    RestoreMoving,
}

impl Point {
    /// Those of an event, in the order of its way.
    pub const ALL: [Self; 11] = [
        Self::OutboxBeforeCommit,
        Self::OutboxAfterCommit,
        Self::RelayBeforeDelivery,
        Self::RelayAfterDelivery,
        Self::FanOutBeforeCommit,
        Self::FanOutAfterCommit,
        Self::ClaimAfterCommit,
        Self::PostBefore,
        Self::PostAfter,
        Self::OutcomeBeforeCommit,
        Self::OutcomeAfterCommit,
    ];

    /// Those of a backup and of its way back.
    pub const OF_BACKUPS: [Self; 5] = [
        Self::BackupHolding,
        Self::BackupCopying,
        Self::BackupBeforeRename,
        Self::RestoreBeforeMove,
        Self::RestoreMoving,
    ];

    /// What the variable calls it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::OutboxBeforeCommit => "outbox.before_commit",
            Self::OutboxAfterCommit => "outbox.after_commit",
            Self::RelayBeforeDelivery => "relay.before_delivery",
            Self::RelayAfterDelivery => "relay.after_delivery",
            Self::FanOutBeforeCommit => "fan_out.before_commit",
            Self::FanOutAfterCommit => "fan_out.after_commit",
            Self::ClaimAfterCommit => "claim.after_commit",
            Self::PostBefore => "post.before",
            Self::PostAfter => "post.after",
            Self::OutcomeBeforeCommit => "outcome.before_commit",
            Self::OutcomeAfterCommit => "outcome.after_commit",
            Self::BackupHolding => "backup.holding",
            Self::BackupCopying => "backup.copying",
            Self::BackupBeforeRename => "backup.before_rename",
            Self::RestoreBeforeMove => "restore.before_move",
            Self::RestoreMoving => "restore.moving",
        }
    }

    /// The value of the variable that arms its `nth` reaching, from 1.
    pub fn at(self, nth: u64) -> String {
        format!("{}:{nth}", self.name())
    }
}

/// Says that work has come to a point; ends the process where that was asked for.
#[inline]
pub fn reach(point: Point) {
    reach_if(point, || true);
}

/// The same, where the work is of the kind that the point is about.
#[cfg(debug_assertions)]
pub fn reach_if(point: Point, concerned: impl FnOnce() -> bool) {
    static ARMED: OnceLock<Option<Armed>> = OnceLock::new();
    let armed = ARMED.get_or_init(|| env::var(VARIABLE).ok().as_deref().and_then(Armed::read));
    if let Some(armed) = armed
        && armed.point == point
        && concerned()
        && armed.reached.fetch_add(1, Ordering::SeqCst) + 1 == armed.nth
    {
        // Nothing runs in this process after the signal; what follows is for a system that refuses to send it.
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        std::process::abort();
    }
}

/// Nothing, in a release build.
#[cfg(not(debug_assertions))]
#[inline]
pub fn reach_if(_point: Point, _concerned: impl FnOnce() -> bool) {}

/// At which reaching of which point this process ends.
#[cfg(debug_assertions)]
struct Armed {
    point: Point,
    nth: u64,
    reached: AtomicU64,
}

#[cfg(debug_assertions)]
impl Armed {
    /// Reads the variable. A point that there is not would make a test pass for nothing, so it is said loudly.
    fn read(value: &str) -> Option<Self> {
        let (name, nth) = value.split_once(':').unwrap_or((value, "1"));
        let mut points = Point::ALL.into_iter().chain(Point::OF_BACKUPS);
        let point = points.find(|point| point.name() == name);
        let nth = nth.parse().ok().filter(|nth| *nth > 0);
        if let (Some(point), Some(nth)) = (point, nth) {
            return Some(Self { point, nth, reached: AtomicU64::new(0) });
        }
        tracing::error!(value, "{VARIABLE} names no point");
        None
    }
}

#[cfg(all(test, debug_assertions))]
mod tests {
    use std::{
        collections::BTreeSet,
        io::Write as _,
        os::unix::process::ExitStatusExt as _,
        process::{Command, ExitStatus},
    };

    use super::*;

    const IN_CHILD: &str = "PAPERKEY_FAIL_POINT_TEST_CHILD";
    const SIGKILL: i32 = 9;

    /// What the child of the other tests does; by itself it does nothing.
    #[test]
    fn child() {
        if env::var_os(IN_CHILD).is_none() {
            return;
        }
        for number in 1..=5 {
            reach(Point::PostBefore);
            reach_if(Point::PostAfter, || number > 2);
            // Not `print`, which the harness would keep until a test has ended.
            writeln!(std::io::stdout(), "<{number}>").unwrap();
        }
    }

    /// How a child ends with this value of the variable, and how many rounds it has made.
    fn child_with(value: Option<&str>) -> (ExitStatus, usize) {
        let mut command = Command::new(env::current_exe().unwrap());
        command.args(["fail_point::tests::child", "--exact"]).env(IN_CHILD, "1").env_remove(VARIABLE);
        if let Some(value) = value {
            command.env(VARIABLE, value);
        }
        let output = command.output().unwrap();
        (output.status, String::from_utf8_lossy(&output.stdout).matches('>').count())
    }

    #[test]
    fn a_process_dies_at_the_reaching_that_was_named_and_not_before() {
        for (value, rounds) in [("post.before", 0), ("post.before:1", 0), ("post.before:3", 2), ("post.before:5", 4)] {
            let (status, made) = child_with(Some(value));
            assert_eq!((status.signal(), made), (Some(SIGKILL), rounds), "{value}");
        }
        // Only what a point is about counts.
        let (status, made) = child_with(Some("post.after:2"));
        assert_eq!((status.signal(), made), (Some(SIGKILL), 3));
    }

    #[test]
    fn a_process_lives_where_nothing_is_armed_or_the_point_is_not_reached() {
        for value in [None, Some("claim.after_commit"), Some("post.before:6"), Some("post.before:0"), Some("nonsense")]
        {
            let (status, made) = child_with(value);
            assert!(status.success() && made == 5, "{value:?}: {status} after {made}");
        }
    }

    #[test]
    fn every_point_has_a_name_of_its_own_that_arms_it() {
        let points = || Point::ALL.into_iter().chain(Point::OF_BACKUPS);
        let names: BTreeSet<&str> = points().map(Point::name).collect();
        assert_eq!(names.len(), points().count());
        for point in points() {
            let armed = Armed::read(&point.at(7)).unwrap();
            assert_eq!((armed.point, armed.nth), (point, 7));
        }
    }
}
