//! `paperkey licenses`: many at once, from a file and into one, over the public API.
//!
//! Both ways are streams: neither file nor report is ever held in memory. How far it is stands on standard error, as a
//! bar on a terminal and as a line now and then elsewhere.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fmt::Write as _,
    fs::{self, File, OpenOptions},
    io::{self, BufWriter, IsTerminal as _, Read, Write as _},
    mem,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use clap::{Args, Subcommand, ValueEnum};
use futures_util::stream;
use indicatif::{ProgressBar, ProgressStyle};
use paperkey_kit::api::{Refusal, Reported};
use paperkey_proto::licensing::v1::{
    ExportLicensesRequest, ImportLicensesRequest, LicenseStatus, licensing_service_client::LicensingServiceClient,
};
use tokio::sync::{mpsc, oneshot};

use crate::{
    Failure,
    client::{self, ApiArgs},
    process::Signals,
};

/// Bytes of a file in one message.
const PIECE: usize = 64 * 1024;
/// Pieces that are read ahead.
const AHEAD: usize = 4;
/// The longest line of a report that is looked at.
const MAX_LINE: usize = 1024 * 1024;
/// How often it is said how far it is, where there is no terminal.
const NOW_AND_THEN: Duration = Duration::from_secs(5);
/// How often the bar is drawn.
const TICK: Duration = Duration::from_millis(100);

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Issue a licence for each line of a CSV file
    Import(Import),
    /// Write licences into a file
    Export(Export),
}

#[derive(Debug, Args)]
pub(crate) struct Import {
    /// The file, or - for standard input
    file: PathBuf,
    /// The product that lines without a product_id are for
    #[arg(long, value_name = "ID", default_value = "")]
    product: String,
    /// Where the report goes, a JSON object for each line; without it what failed is shown on standard error
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    #[command(flatten)]
    api: ApiArgs,
}

#[derive(Debug, Args)]
pub(crate) struct Export {
    /// How licences are written
    #[arg(long, default_value = "csv")]
    format: Format,
    /// Only those of this product
    #[arg(long, value_name = "ID")]
    product: Option<String>,
    /// Only those of this status
    #[arg(long)]
    status: Option<Status>,
    /// Where they are written to; - is standard output
    #[arg(short, long, value_name = "FILE", default_value = "-")]
    output: PathBuf,
    #[command(flatten)]
    api: ApiArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    Csv,
    Ndjson,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Status {
    Active,
    Expired,
    Revoked,
}

/// Runs until it is done, or until SIGINT or SIGTERM.
pub(crate) async fn run(command: &Command) -> Result<(), Failure> {
    let mut signals = Signals::new()?;
    let reported = Arc::new(AtomicU64::new(0));
    let work = async {
        match command {
            Command::Import(import) => import.run(Arc::clone(&reported)).await,
            Command::Export(export) => export.run().await,
        }
    };
    tokio::select! {
        outcome = work => outcome,
        () = signals.received() => Err(Failure(match command {
            Command::Import(_) => format!("interrupted: {}", again(reported.load(Ordering::Relaxed))),
            Command::Export(export) if is_standard(&export.output) => {
                "interrupted: what was written is not all".to_owned()
            }
            Command::Export(_) => "interrupted: nothing was written".to_owned(),
        })),
    }
}

/// What of an import that was cut off may be made again: a line without a key makes a licence each time it is sent.
fn again(last_reported: u64) -> String {
    format!(
        "what was reported is done; lines that have keys may be sent again; of the others, those after line \
         {last_reported}"
    )
}

fn is_standard(path: &Path) -> bool {
    path.as_os_str() == "-"
}

fn at(path: &Path) -> impl Fn(io::Error) -> Failure {
    move |error| Failure(format!("{}: {error}", path.display()))
}

impl Import {
    async fn run(&self, reported: Arc<AtomicU64>) -> Result<(), Failure> {
        let api = self.api.connect()?;
        let (reader, size): (Box<dyn Read + Send>, _) = if is_standard(&self.file) {
            (Box::new(io::stdin()), None)
        } else {
            let file = File::open(&self.file).map_err(at(&self.file))?;
            let about = file.metadata().map_err(at(&self.file))?;
            if about.is_dir() {
                return Err(Failure(format!("{} is a folder", self.file.display())));
            }
            (Box::new(file), about.is_file().then_some(about.len()))
        };
        let file = match &self.report {
            Some(path) => Some(BufWriter::new(create(path).map_err(at(path))?)),
            None => None,
        };
        let mut report = Report::new(file, reported);
        let progress = Progress::of_bytes(size);

        let (mut pieces, broken) = read_ahead(reader, self.product.clone(), progress.clone());
        let requests = stream::poll_fn(move |context| pieces.poll_recv(context));
        let mut client = LicensingServiceClient::new(api);
        let importing = async {
            let refused = |status| self.api.explain(&Refusal::from(status), "licenses:write");
            let mut answers = client.import_licenses(requests).await.map_err(refused)?.into_inner();
            loop {
                // Not by `?` alone: what was reported before a cut is true, and is to be seen.
                match answers.message().await {
                    Ok(Some(answer)) => report.take(&answer.data, &progress)?,
                    Ok(None) => {
                        report.finish(&progress)?;
                        return report.is_whole();
                    }
                    Err(status) => {
                        report.finish(&progress)?;
                        return Err(refused(status));
                    }
                }
            }
        };
        let outcome = tokio::select! {
            outcome = importing => outcome,
            // The stream stays open, so that a file that could not be read to its end never passes for a whole one.
            Ok((error, _stream)) = broken => Err(at(&self.file)(error)),
        };
        progress.end();
        if report.lines > 0 || outcome.is_ok() {
            client::note(report.summary());
        } else if let Some(path) = &self.report
            && fs::metadata(path).is_ok_and(|about| about.len() == 0)
        {
            // It reports on nothing, and would be in the way of the next attempt.
            fs::remove_file(path).map_err(at(path))?;
        }
        outcome?;
        match report.failed {
            0 => Ok(()),
            1 => Err(Failure("1 line failed".to_owned())),
            failed => Err(Failure(format!("{failed} lines failed"))),
        }
    }
}

/// The end of a file that was not reached, and the stream that must not end for it.
type Broken = (io::Error, mpsc::Sender<ImportLicensesRequest>);

/// Reads a file on a thread of its own, a few pieces ahead.
fn read_ahead(
    mut reader: Box<dyn Read + Send>,
    product_id: String,
    progress: Progress,
) -> (mpsc::Receiver<ImportLicensesRequest>, oneshot::Receiver<Broken>) {
    let (send, pieces) = mpsc::channel(AHEAD);
    let (say, broken) = oneshot::channel();
    // Not one of the runtime's: those are waited for at the end, and standard input may never say anything.
    std::thread::spawn(move || {
        let (mut product_id, mut buffer) = (Some(product_id), vec![0; PIECE]);
        loop {
            let read = match reader.read(&mut buffer) {
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    // Nobody may wait for it any more.
                    let _ = say.send((error, send));
                    return;
                }
            };
            // Only the first piece names the product; an empty file has one too.
            let first = product_id.take();
            let is_last = read == 0;
            if is_last && first.is_none() {
                return;
            }
            progress.add(read as u64);
            let product_id = first.unwrap_or_default();
            let piece = ImportLicensesRequest { product_id, data: buffer[..read].to_vec() };
            if send.blocking_send(piece).is_err() || is_last {
                return;
            }
        }
    });
    (pieces, broken)
}

/// The report of an import: kept in a file, or what failed shown; counted either way.
struct Report {
    file: Option<BufWriter<File>>,
    /// A line whose end has not come yet.
    rest: Vec<u8>,
    outcomes: BTreeMap<String, u64>,
    lines: u64,
    failed: u64,
    /// The last line of the file that was reported on.
    last: Arc<AtomicU64>,
    /// What the report says of the number of lines, at its end.
    end: Option<u64>,
}

impl Report {
    fn new(file: Option<BufWriter<File>>, last: Arc<AtomicU64>) -> Self {
        Self { file, rest: Vec::new(), outcomes: BTreeMap::new(), lines: 0, failed: 0, last, end: None }
    }

    /// Takes the next piece, which may end within a line.
    fn take(&mut self, data: &[u8], progress: &Progress) -> io::Result<()> {
        if let Some(file) = &mut self.file {
            file.write_all(data)?;
        }
        for part in data.split_inclusive(|byte| *byte == b'\n') {
            if self.rest.len() + part.len() > MAX_LINE {
                return Err(io::Error::other("a line of the report is longer than any can be"));
            }
            self.rest.extend_from_slice(part);
            if part.ends_with(b"\n") {
                self.end_line(progress);
            }
        }
        Ok(())
    }

    fn end_line(&mut self, progress: &Progress) {
        let line = mem::take(&mut self.rest);
        match Reported::read(&line) {
            Some(Reported::Line { line: number, outcome, failed }) => {
                self.lines += 1;
                self.last.fetch_max(number.unwrap_or_default(), Ordering::Relaxed);
                *self.outcomes.entry(outcome).or_default() += 1;
                if failed {
                    self.failed += 1;
                    if self.file.is_none() {
                        progress.note(String::from_utf8_lossy(line.trim_ascii()).as_ref());
                    }
                }
            }
            Some(Reported::End { lines }) => self.end = Some(lines),
            None => {}
        }
    }

    /// The last line says how many there were: without it, the report is cut off.
    fn is_whole(&self) -> Result<(), Failure> {
        if self.end == Some(self.lines) {
            return Ok(());
        }
        Err(Failure(format!("the report is cut off: {}", again(self.last.load(Ordering::Relaxed)))))
    }

    fn finish(&mut self, progress: &Progress) -> io::Result<()> {
        self.end_line(progress);
        match &mut self.file {
            Some(file) => file.flush(),
            None => Ok(()),
        }
    }

    /// Such as `3 lines: 2 created, 1 failed`.
    fn summary(&self) -> String {
        let mut text = format!("{} {}", self.lines, if self.lines == 1 { "line" } else { "lines" });
        for (position, (outcome, count)) in self.outcomes.iter().enumerate() {
            // Writing to a String does not fail.
            let _ = write!(text, "{} {count} {outcome}", if position == 0 { ":" } else { "," });
        }
        text
    }
}

impl Export {
    async fn run(&self) -> Result<(), Failure> {
        let api = self.api.connect()?;
        let request = ExportLicensesRequest {
            format: match self.format {
                Format::Csv => "csv",
                Format::Ndjson => "ndjson",
            }
            .to_owned(),
            product_id: self.product.clone(),
            status: match self.status {
                None => LicenseStatus::Unspecified,
                Some(Status::Active) => LicenseStatus::Active,
                Some(Status::Expired) => LicenseStatus::Expired,
                Some(Status::Revoked) => LicenseStatus::Revoked,
            }
            .into(),
            ..ExportLicensesRequest::default()
        };
        let refused = |status| self.api.explain(&Refusal::from(status), "licenses:read");
        let mut client = LicensingServiceClient::new(api);
        let mut answers = client.export_licenses(request).await.map_err(refused)?.into_inner();
        let progress = Progress::of_licenses();
        let (mut lines, header) = (0, u64::from(self.format == Format::Csv));
        let mut sink = Sink::open(&self.output).map_err(at(&self.output))?;
        while let Some(answer) = answers.message().await.map_err(refused)? {
            match sink.write(&answer.data) {
                Ok(()) => {}
                // Whoever reads has seen enough.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
                Err(error) => return Err(at(&self.output)(error)),
            }
            lines += answer.data.iter().map(|byte| u64::from(*byte == b'\n')).sum::<u64>();
            progress.set(lines.saturating_sub(header));
        }
        sink.finish().map_err(at(&self.output))?;
        progress.end();
        let licenses = lines.saturating_sub(header);
        client::note(format_args!("{licenses} {}", if licenses == 1 { "licence" } else { "licences" }));
        Ok(())
    }
}

/// A file that only its owner reads: it holds licence keys. One that is there stays as it is: it may be the only report of
/// what an import has done.
fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => io::Error::new(error.kind(), "is there already: name another file"),
        _ => error,
    })
}

/// Where an export goes.
enum Sink {
    Standard(io::Stdout),
    File(Draft),
}

/// A file that takes its name when it is whole, and leaves nothing behind when it is not.
struct Draft {
    file: BufWriter<File>,
    path: PathBuf,
    target: PathBuf,
    is_whole: bool,
}

impl Sink {
    fn open(target: &Path) -> io::Result<Self> {
        if is_standard(target) {
            return Ok(Self::Standard(io::stdout()));
        }
        // What is no file, such as a pipe or a terminal, cannot be moved into place.
        let special = fs::metadata(target).is_ok_and(|about| !about.is_file());
        if special {
            return Err(io::Error::other("is no file: name one, or - for standard output"));
        }
        let name = target.file_name().ok_or_else(|| io::Error::other("is no name of a file"))?;
        let mut draft = OsString::from(".");
        draft.push(name);
        draft.push(format!(".{}.part", std::process::id()));
        let path = target.with_file_name(draft);
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
        Ok(Self::File(Draft { file: BufWriter::new(file), path, target: target.to_owned(), is_whole: false }))
    }

    fn write(&mut self, data: &[u8]) -> io::Result<()> {
        match self {
            Self::Standard(out) => out.write_all(data),
            Self::File(draft) => draft.file.write_all(data),
        }
    }

    fn finish(self) -> io::Result<()> {
        match self {
            Self::Standard(mut out) => out.flush(),
            Self::File(mut draft) => {
                draft.file.flush()?;
                draft.file.get_ref().sync_all()?;
                fs::rename(&draft.path, &draft.target)?;
                draft.is_whole = true;
                Ok(())
            }
        }
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.is_whole {
            // It is hidden, and named for what it is.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// How far it is, on standard error.
#[derive(Clone, Debug)]
struct Progress {
    bar: ProgressBar,
    plain: bool,
    unit: &'static str,
    said: Arc<Mutex<Instant>>,
}

impl Progress {
    fn of_bytes(size: Option<u64>) -> Self {
        let template = match size {
            Some(_) => "{bar:40} {bytes} of {total_bytes}, {eta} left",
            None => "{spinner} {bytes}",
        };
        Self::new(size, template, "bytes")
    }

    fn of_licenses() -> Self {
        Self::new(None, "{spinner} {human_pos} licences", "licences")
    }

    fn new(size: Option<u64>, template: &str, unit: &'static str) -> Self {
        let plain = !io::stderr().is_terminal();
        let bar =
            if plain { ProgressBar::hidden() } else { size.map_or_else(ProgressBar::new_spinner, ProgressBar::new) };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        if let (true, Some(size)) = (plain, size) {
            bar.set_length(size);
        }
        if !plain {
            bar.enable_steady_tick(TICK);
        }
        Self { bar, plain, unit, said: Arc::new(Mutex::new(Instant::now())) }
    }

    fn add(&self, more: u64) {
        self.bar.inc(more);
        self.say_now_and_then();
    }

    fn set(&self, position: u64) {
        self.bar.set_position(position);
        self.say_now_and_then();
    }

    /// Writes a line without tearing the bar.
    fn note(&self, text: &str) {
        self.bar.suspend(|| client::note(text));
    }

    fn say_now_and_then(&self) {
        if !self.plain {
            return;
        }
        let Ok(mut said) = self.said.lock() else { return };
        if said.elapsed() >= NOW_AND_THEN {
            *said = Instant::now();
            match self.bar.length() {
                Some(size) => client::note(format_args!("{} of {size} {}", self.bar.position(), self.unit)),
                None => client::note(format_args!("{} {}", self.bar.position(), self.unit)),
            }
        }
    }

    fn end(&self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn folder(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("paperkey-licenses-{name}-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        folder
    }

    #[test]
    fn a_report_is_counted_wherever_its_pieces_are_cut() {
        let report = b"{\"line\":2,\"status\":\"created\"}\n{\"line\":3,\"error\":{\"code\":\"X\"}}\n\n\
            {\"line\":4,\"status\":\"created\"}\n{\"lines\":3,\"created\":2,\"failed\":1}";
        for piece in [1, 7, report.len()] {
            let progress = Progress::of_licenses();
            let mut counted = Report::new(None, Arc::default());
            for data in report.chunks(piece) {
                counted.take(data, &progress).unwrap();
            }
            let cut_off = counted.is_whole().expect_err("its end is not read yet").to_string();
            assert!(cut_off.ends_with("have keys may be sent again; of the others, those after line 4"), "{cut_off}");
            counted.finish(&progress).unwrap();
            counted.is_whole().unwrap();
            assert_eq!((counted.lines, counted.failed), (3, 1));
            assert_eq!(counted.summary(), "3 lines: 2 created, 1 failed");
        }
    }

    #[test]
    fn a_line_that_never_ends_is_not_kept() {
        let mut report = Report::new(None, Arc::default());
        let progress = Progress::of_licenses();
        let outcome = (0..).find_map(|_| report.take(&vec![b' '; PIECE], &progress).err());
        assert!(outcome.is_some() && report.rest.len() <= MAX_LINE);
    }

    #[test]
    fn an_export_takes_its_name_when_it_is_whole_and_else_leaves_nothing() {
        let folder = folder("whole");
        let target = folder.join("licences.csv");
        fs::write(&target, "before").unwrap();
        let mut cut_off = Sink::open(&target).unwrap();
        cut_off.write(b"half").unwrap();
        drop(cut_off);
        assert_eq!(fs::read_to_string(&target).unwrap(), "before");
        let mut whole = Sink::open(&target).unwrap();
        whole.write(b"whole").unwrap();
        whole.finish().unwrap();
        assert_eq!(fs::read_to_string(&target).unwrap(), "whole");
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1, "no draft is left");
        assert!(Sink::open(&folder).is_err() && Sink::open(Path::new("/dev/null")).is_err());
        fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn a_report_is_its_owners_and_takes_the_place_of_no_other() {
        let folder = folder("report");
        let path = folder.join("report.ndjson");
        create(&path).unwrap().write_all(b"of before").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(create(&path).unwrap_err().to_string().contains("is there already"));
        assert_eq!(fs::read_to_string(&path).unwrap(), "of before");
        fs::remove_dir_all(&folder).unwrap();
    }

    struct Broken(usize);

    impl Read for Broken {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            if self.0 == 0 {
                return Err(io::Error::other("the disk is gone"));
            }
            self.0 -= 1;
            buffer[0] = b'a';
            Ok(1)
        }
    }

    #[tokio::test]
    async fn a_file_is_read_in_pieces_of_which_the_first_names_the_product() {
        for (length, expected) in [(0, vec![0]), (1, vec![1]), (PIECE + 1, vec![PIECE, 1])] {
            let reader = Box::new(io::Cursor::new(vec![b'x'; length]));
            let (mut pieces, broken) = read_ahead(reader, "prod_1".to_owned(), Progress::of_licenses());
            let mut read = Vec::new();
            while let Some(piece) = pieces.recv().await {
                assert_eq!(piece.product_id.is_empty(), !read.is_empty());
                read.push(piece.data.len());
            }
            assert_eq!(read, expected);
            assert!(broken.await.is_err(), "nothing went wrong");
        }
    }

    #[tokio::test]
    async fn a_file_that_cannot_be_read_to_its_end_does_not_look_whole() {
        let (mut pieces, broken) = read_ahead(Box::new(Broken(1)), String::new(), Progress::of_licenses());
        assert_eq!(pieces.recv().await.unwrap().data, b"a");
        let (error, stream) = broken.await.unwrap();
        assert_eq!(error.to_string(), "the disk is gone");
        assert!(pieces.try_recv().is_err_and(|error| error == mpsc::error::TryRecvError::Empty));
        drop(stream);
    }
}
