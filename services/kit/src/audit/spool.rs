//! Batches on disk, in their order, until auth has them.
//!
//! A segment is a file of frames: length, CRC-32, body. Frames are appended to the newest segment, and a file goes when
//! nothing in it is needed any more. After a crash some that were taken over are there again; they keep their ids, by
//! which auth passes them over. A frame that was cut off by the end of a process is the last of its file, and is lost.
//!
//! Nothing is synced: what is written outlives the process, and a machine that loses its power loses its last seconds.
//!
//! Each process has a folder of its own under the one it is given, and takes over what dead ones have left in theirs.

use std::{
    collections::VecDeque,
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use bytes::Bytes;
use parking_lot::Mutex;

/// A segment ends where it has grown to this, in bytes.
const SEGMENT_BYTES: u64 = 4 * 1_024 * 1_024;
/// No frame of ours is longer.
const MAX_FRAME: u32 = 4 * 1_024 * 1_024;
/// Length and checksum.
const HEADER: u64 = 8;
/// As much is kept in memory as well, so that what auth takes at once is not read again.
const CACHED_BYTES: u64 = 4 * 1_024 * 1_024;
/// Processes that may share a folder.
const SLOTS: u32 = 64;
const EXTENSION: &str = "spool";

/// The batches of one process.
pub(super) struct Spool {
    folder: PathBuf,
    max_bytes: u64,
    state: Mutex<State>,
    /// Held for as long as the process lives.
    _lock: File,
}

#[derive(Default)]
struct State {
    frames: VecDeque<Frame>,
    /// Of all frames, with their headers.
    bytes: u64,
    /// Of the bodies in memory.
    cached: u64,
    /// The segment that is appended to.
    open: Option<(File, u64)>,
    newest: u64,
    failing: bool,
}

struct Frame {
    /// Where it is on disk; `None` where the disk did not take it.
    place: Option<Place>,
    length: u32,
    body: Option<Bytes>,
}

#[derive(Clone, Copy)]
struct Place {
    segment: u64,
    offset: u64,
}

impl Frame {
    fn bytes(&self) -> u64 {
        HEADER + u64::from(self.length)
    }

    fn segment(&self) -> Option<u64> {
        self.place.map(|place| place.segment)
    }
}

impl Spool {
    /// The spool in a folder, with all that earlier processes have left there.
    pub(super) fn open(folder: &Path, max_bytes: u64) -> io::Result<Self> {
        let (own, lock) = (0..SLOTS)
            .find_map(|slot| take_slot(&folder.join(slot.to_string())).transpose())
            .unwrap_or_else(|| Err(io::Error::other("too many processes share the folder of the audit log")))?;
        let mut state = State::default();
        for (number, path) in segments(&own)? {
            state.newest = number;
            state.find_frames(number, &path)?;
        }
        for slot in 0..SLOTS {
            let other = folder.join(slot.to_string());
            if other == own || !other.is_dir() {
                continue;
            }
            // Whoever lives has a lock on it.
            let Some((other, _lock)) = take_slot(&other)? else { continue };
            for (_, path) in segments(&other)? {
                state.newest += 1;
                let moved = segment_path(&own, state.newest);
                fs::rename(path, &moved)?;
                state.find_frames(state.newest, &moved)?;
            }
        }
        Ok(Self { folder: own, max_bytes, state: Mutex::new(state), _lock: lock })
    }

    /// How many bytes wait.
    pub(super) fn bytes(&self) -> u64 {
        self.state.lock().bytes
    }

    /// Whether another batch may be written.
    pub(super) fn has_room(&self) -> bool {
        self.bytes() < self.max_bytes
    }

    /// Writes a batch. Says whether it is kept: on disk, or where that fails in memory, as long as little is.
    pub(super) fn append(&self, body: Bytes) -> bool {
        let mut state = self.state.lock();
        let Ok(length) = u32::try_from(body.len()) else { return false };
        let place = match state.write(&self.folder, &body, length) {
            Ok(place) => {
                state.failing = false;
                Some(place)
            }
            Err(error) => {
                if !std::mem::replace(&mut state.failing, true) {
                    tracing::error!(%error, folder = %self.folder.display(), "the audit log cannot be written to disk");
                }
                // What is half written is no longer written after.
                state.open = None;
                None
            }
        };
        let fits = state.cached + u64::from(length) <= CACHED_BYTES;
        if place.is_none() && !fits {
            return false;
        }
        if fits {
            state.cached += u64::from(length);
        }
        let frame = Frame { place, length, body: fits.then_some(body) };
        state.bytes += frame.bytes();
        state.frames.push_back(frame);
        true
    }

    /// The oldest batch, if it is in memory.
    pub(super) fn in_memory(&self) -> Option<Bytes> {
        self.state.lock().frames.front().and_then(|frame| frame.body.clone())
    }

    /// The oldest batch. One that can no longer be read is passed over, loudly.
    pub(super) fn oldest(&self) -> Option<Bytes> {
        loop {
            let (place, length) = {
                let state = self.state.lock();
                let frame = state.frames.front()?;
                if let Some(body) = &frame.body {
                    return Some(body.clone());
                }
                (frame.place, frame.length)
            };
            match place.map(|place| read_frame(&self.folder, place, length)) {
                Some(Ok(body)) => return Some(body),
                outcome => {
                    let why = outcome.and_then(Result::err).map(|error| error.to_string()).unwrap_or_default();
                    tracing::error!(why, "a batch of the audit log on disk cannot be read, and is lost");
                    self.remove_oldest();
                }
            }
        }
    }

    /// Forgets the oldest batch, and the file of which it was the last.
    pub(super) fn remove_oldest(&self) {
        let mut state = self.state.lock();
        let Some(gone) = state.frames.pop_front() else { return };
        state.bytes = state.bytes.saturating_sub(gone.bytes());
        if gone.body.is_some() {
            state.cached = state.cached.saturating_sub(u64::from(gone.length));
        }
        let Some(segment) = gone.segment() else { return };
        // Frames of one segment stand together; only those that the disk refused stand between.
        let needed = state.frames.iter().find_map(Frame::segment).is_some_and(|next| next == segment);
        if needed {
            return;
        }
        let ended = if segment == state.newest && state.open.is_some() {
            // Emptied and written on, so that a quiet process does not make a file a batch.
            state.open.as_mut().map_or(Ok(()), |(file, length)| {
                *length = 0;
                file.set_len(0)
            })
        } else {
            fs::remove_file(segment_path(&self.folder, segment))
        };
        if let Err(error) = ended {
            // It is handed over once more by the next process, and passed over.
            tracing::warn!(%error, segment, "a file of the audit log cannot be removed");
        }
    }
}

impl State {
    fn write(&mut self, folder: &Path, body: &[u8], length: u32) -> io::Result<Place> {
        if self.open.as_ref().is_none_or(|(_, length)| *length >= SEGMENT_BYTES) {
            let path = segment_path(folder, self.newest + 1);
            let file = OpenOptions::new().append(true).create_new(true).mode(0o600).open(path)?;
            self.newest += 1;
            self.open = Some((file, 0));
        }
        let Some((file, end)) = &mut self.open else { return Err(io::Error::other("no file is open")) };
        let mut frame = Vec::with_capacity(body.len() + 8);
        frame.extend_from_slice(&length.to_le_bytes());
        frame.extend_from_slice(&crc32fast::hash(body).to_le_bytes());
        frame.extend_from_slice(body);
        file.write_all(&frame)?;
        let place = Place { segment: self.newest, offset: *end };
        *end += HEADER + u64::from(length);
        Ok(place)
    }

    fn find_frames(&mut self, segment: u64, path: &Path) -> io::Result<()> {
        let (mut file, mut offset) = (File::open(path)?, 0);
        let length = file.metadata()?.len();
        let before = self.frames.len();
        while offset < length {
            let Some(body) = next_frame(&mut file)? else {
                let lost = length - offset;
                tracing::warn!(file = %path.display(), lost, "the end of a file of the audit log is damaged");
                break;
            };
            self.frames.push_back(Frame { place: Some(Place { segment, offset }), length: body, body: None });
            offset += HEADER + u64::from(body);
        }
        self.bytes += offset;
        if self.frames.len() == before {
            fs::remove_file(path)?;
        }
        Ok(())
    }
}

/// The length of the next frame, if it is whole.
fn next_frame(file: &mut File) -> io::Result<Option<u32>> {
    let mut header = Vec::new();
    file.take(HEADER).read_to_end(&mut header)?;
    let Some((length, checksum)) = split_header(&header) else { return Ok(None) };
    if length > MAX_FRAME {
        return Ok(None);
    }
    let mut body = Vec::new();
    file.take(length.into()).read_to_end(&mut body)?;
    let whole = body.len() as u64 == u64::from(length) && crc32fast::hash(&body) == checksum;
    Ok(whole.then_some(length))
}

fn split_header(header: &[u8]) -> Option<(u32, u32)> {
    let (length, checksum) = header.split_first_chunk::<4>()?;
    Some((u32::from_le_bytes(*length), u32::from_le_bytes(checksum.try_into().ok()?)))
}

fn read_frame(folder: &Path, place: Place, length: u32) -> io::Result<Bytes> {
    let file = File::open(segment_path(folder, place.segment))?;
    let mut header = [0; 8];
    file.read_exact_at(&mut header, place.offset)?;
    let mut body = vec![0; usize::try_from(length).unwrap_or(0)];
    file.read_exact_at(&mut body, place.offset + HEADER)?;
    if split_header(&header) == Some((length, crc32fast::hash(&body))) {
        Ok(body.into())
    } else {
        Err(io::Error::new(io::ErrorKind::InvalidData, "the checksum is another"))
    }
}

fn segment_path(folder: &Path, number: u64) -> PathBuf {
    folder.join(format!("{number:020}.{EXTENSION}"))
}

/// The segments of a folder, oldest first.
fn segments(folder: &Path) -> io::Result<Vec<(u64, PathBuf)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let number = path.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| stem.parse().ok());
        if let (Some(number), true) = (number, path.extension().is_some_and(|extension| extension == EXTENSION)) {
            found.push((number, path));
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// A folder for this process alone; `None` where it is another's.
fn take_slot(folder: &Path) -> io::Result<Option<(PathBuf, File)>> {
    DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    let lock = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(folder.join("lock"))?;
    match lock.try_lock() {
        Ok(()) => Ok(Some((folder.to_owned(), lock))),
        Err(fs::TryLockError::WouldBlock) => Ok(None),
        Err(fs::TryLockError::Error(error)) => Err(error),
    }
}
