//! One process of the product: started, listened to, killed or asked to end.

use std::{
    ffi::OsStr,
    fmt, io,
    io::{BufRead as _, BufReader, Write as _},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::Arc,
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use tokio::sync::watch;

use crate::wait::{GENEROUS, PAUSE, eventually};

/// Where a line was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Out,
    /// Standard error: the log.
    Err,
}

/// A line that a process wrote.
#[derive(Clone, Debug)]
pub struct Line {
    /// Where it was written.
    pub stream: Stream,
    /// What it says.
    pub text: String,
}

/// A running process of the product. It is killed when this value goes.
pub struct Process {
    name: String,
    child: Child,
    written: watch::Receiver<Vec<Line>>,
    readers: Vec<JoinHandle<()>>,
}

impl fmt::Debug for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.name, self.child.id())
    }
}

/// How a command ended.
#[derive(Clone, Debug)]
pub struct Ended {
    /// Its exit status.
    pub status: ExitStatus,
    /// What it wrote to standard output.
    pub out: String,
    /// What it wrote to standard error.
    pub err: String,
}

impl Ended {
    /// The output of a command that must have succeeded.
    #[track_caller]
    pub fn succeeded(&self) -> &str {
        assert!(self.status.success(), "the command failed: {self:?}");
        self.out.trim()
    }

    /// What a command said that must have failed.
    #[track_caller]
    pub fn failed(&self) -> &str {
        assert!(!self.status.success(), "the command should have failed: {self:?}");
        self.err.trim()
    }
}

/// The binary, beside the tests that run it.
pub fn binary() -> PathBuf {
    let test = std::env::current_exe().expect("a test knows where it is");
    let profile = test.ancestors().nth(2).expect("tests are in target/<profile>/deps");
    let path = profile.join("paperkey");
    assert!(path.is_file(), "{} is missing: build it first: cargo build -p paperkey-server", path.display());
    path
}

/// The variable that names the binary of the release before this one.
const PREVIOUS: &str = "PAPERKEY_TEST_PREVIOUS";

/// The binary of the release before this one; `None`, and a loud line, where there is none.
#[expect(clippy::print_stderr, reason = "a skipped test must be seen in the output of the tests")]
pub fn previous_binary() -> Option<PathBuf> {
    match std::env::var_os(PREVIOUS) {
        // A tree without history has none, which is not its fault.
        Some(none) if none == "none" => {}
        Some(path) => {
            let path = PathBuf::from(path);
            assert!(path.is_file(), "{PREVIOUS} names {}, which is not there", path.display());
            return Some(path);
        }
        None => {
            let skips = std::env::var("CI").as_deref() != Ok("true");
            assert!(skips, "{PREVIOUS} is not set, and a skipped test is a failure here");
        }
    }
    eprintln!("*** {PREVIOUS} names no release before this one: this test of an upgrade was SKIPPED ***");
    None
}

/// A command of the binary, in an environment that holds nothing of ours but what is given.
pub fn command<A: AsRef<OsStr>>(arguments: &[A], environment: &[(String, String)], folder: &Path) -> Command {
    command_of(&binary(), arguments, environment, folder)
}

/// The same, of another binary.
pub fn command_of<A: AsRef<OsStr>>(
    binary: &Path,
    arguments: &[A],
    environment: &[(String, String)],
    folder: &Path,
) -> Command {
    let mut command = Command::new(binary);
    command
        .args(arguments)
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .env("RUST_BACKTRACE", "1")
        .envs(environment.iter().map(|(name, value)| (name, value)))
        .current_dir(folder)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// Runs a command to its end, with something on its standard input.
pub async fn run(mut command: Command, input: &str) -> Ended {
    command.stdin(Stdio::piped());
    let input = input.to_owned();
    let finished = tokio::task::spawn_blocking(move || -> io::Result<_> {
        let mut child = command.spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            // A command that does not read its input may be gone already.
            let _ = stdin.write_all(input.as_bytes());
        }
        child.wait_with_output()
    });
    let output = tokio::time::timeout(GENEROUS, finished)
        .await
        .expect("a command ends within a minute")
        .expect("nothing panics here")
        .expect("the binary starts");
    Ended {
        status: output.status,
        out: String::from_utf8_lossy(&output.stdout).into_owned(),
        err: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// Runs a command to its end, with nothing on its standard input. Where that takes too long, it is ended with all that it
/// has started, and the test fails with what it was at.
pub async fn run_within(limit: Duration, name: &str, mut command: Command, at: impl Fn() -> String) -> Ended {
    // A group of its own: what a command has started would hold its streams open after it.
    command.process_group(0).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut process = Process::start(name, command);
    let began = Instant::now();
    let ended = loop {
        let ended = process.child.try_wait().expect("it is our child");
        if ended.is_some() || began.elapsed() > limit {
            break ended;
        }
        tokio::time::sleep(PAUSE).await;
    };
    let group = format!("kill -KILL -{} 2> /dev/null", process.child.id());
    // Mostly there is nobody left.
    let _ = Command::new("sh").args(["-c", &group]).status();
    let Some(status) = ended else { panic!("{name} does not end within {limit:?}: {}", at()) };
    let lines = process.kill();
    let of =
        |stream: Stream| lines.iter().filter(move |line| line.stream == stream).map(|line| line.text.clone() + "\n");
    Ended { status, out: of(Stream::Out).collect(), err: of(Stream::Err).collect() }
}

impl Process {
    /// Starts a command and listens to what it writes.
    pub fn start(name: &str, mut command: Command) -> Self {
        let mut child = command.spawn().unwrap_or_else(|error| panic!("{name} does not start: {error}"));
        let (write, written) = watch::channel(Vec::new());
        let write = Arc::new(write);
        let readers = vec![
            listen(child.stdout.take().expect("it is piped"), Stream::Out, Arc::clone(&write)),
            listen(child.stderr.take().expect("it is piped"), Stream::Err, write),
        ];
        Self { name: name.to_owned(), child, written, readers }
    }

    /// What it has written so far.
    pub fn lines(&self) -> Vec<Line> {
        self.written.borrow().clone()
    }

    /// Waits for a line. `Err` holds everything it wrote, if it ended without.
    pub async fn line<T>(&mut self, find: impl Fn(&Line) -> Option<T>) -> Result<T, String> {
        let name = self.name.clone();
        let mut written = self.written.clone();
        let found = tokio::time::timeout(GENEROUS, async {
            loop {
                if let Some(found) = written.borrow_and_update().iter().find_map(&find) {
                    return Some(found);
                }
                // The sender goes when both streams are at their end.
                if written.changed().await.is_err() {
                    let lines = written.borrow();
                    return lines.iter().find_map(&find);
                }
            }
        })
        .await;
        let Ok(found) = found else {
            panic!("{name} did not write the awaited line within {GENEROUS:?}:\n{}", self.text())
        };
        found.ok_or_else(|| self.text())
    }

    /// Everything it wrote, as text.
    pub fn text(&self) -> String {
        self.lines().into_iter().map(|line| line.text + "\n").collect()
    }

    /// Kills it as `kill -9` does, and takes what it wrote.
    pub fn kill(mut self) -> Vec<Line> {
        self.end()
    }

    fn end(&mut self) -> Vec<Line> {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
        for reader in self.readers.drain(..) {
            // A reader that panicked has nothing more to say.
            let _ = reader.join();
        }
        self.lines()
    }

    /// Sends it a signal by its name, such as `TERM`.
    pub fn signal(&self, signal: &str) {
        let kill = format!("kill -{signal} {}", self.child.id());
        let status = Command::new("sh").args(["-c", &kill]).status().expect("there is a shell");
        assert!(status.success(), "{kill} failed");
    }

    /// Waits until it has ended by itself.
    pub async fn ended(&mut self) -> ExitStatus {
        let name = self.name.clone();
        eventually(&format!("{name} ends"), || {
            let ended = self.child.try_wait().expect("it is our child");
            async move { ended }
        })
        .await
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().is_ok_and(|ended| ended.is_none())
    }

    /// Asks it to end, and waits until it has.
    pub async fn terminate(&mut self) -> (ExitStatus, Duration) {
        let began = Instant::now();
        self.signal("TERM");
        let status = self.ended().await;
        (status, began.elapsed())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let lines = self.end();
        if thread::panicking() {
            print_lines(&self.name, &lines);
        }
    }
}

/// Shows what a process wrote, in the output of a test that fails.
#[expect(clippy::print_stderr, reason = "whoever reads of a failed test wants to know what the processes said")]
pub(crate) fn print_lines(name: &str, lines: &[Line]) {
    const SHOWN: usize = 300;
    let skipped = lines.len().saturating_sub(SHOWN);
    eprintln!("--- {name} wrote {} lines; the last of them:", lines.len());
    for line in lines.iter().skip(skipped) {
        eprintln!("{name}: {}", line.text);
    }
}

fn listen(
    stream: impl io::Read + Send + 'static,
    which: Stream,
    write: Arc<watch::Sender<Vec<Line>>>,
) -> JoinHandle<()> {
    thread::spawn(move || {
        let mut reader = BufReader::new(stream);
        let mut bytes = Vec::new();
        while reader.read_until(b'\n', &mut bytes).is_ok_and(|length| length > 0) {
            let text = String::from_utf8_lossy(&bytes).trim_end().to_owned();
            bytes.clear();
            write.send_modify(|lines| lines.push(Line { stream: which, text }));
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    #[should_panic(expected = "a shell does not end within 300ms: at its second line")]
    async fn what_hangs_is_ended_with_all_that_it_has_started() {
        let mut shell = Command::new("bash");
        // Without its end the stream stays open for as long as the other lives.
        shell.args(["-c", "sleep 600 &\nwait"]);
        run_within(Duration::from_millis(300), "a shell", shell, || "at its second line".to_owned()).await;
    }
}
