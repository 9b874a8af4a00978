//! CSV (RFC 4180) as it arrives: in pieces of any size, one record at a time, in bounded memory.
//!
//! Lines end with CRLF, LF or CR; empty ones are passed over, and a byte order mark before the first is. A quote has a
//! meaning only at the beginning of a cell and inside of one that began so; elsewhere it is a character. A record that
//! is too long is read to its end and not kept.
//!
//! What a spreadsheet would take for a formula is written with an apostrophe before it, as in the audit log's export,
//! and read without ([`guarded`], [`unguarded`]).
//!
//! Deliberately absent: what the cells mean, and guessing at other separators.

use std::borrow::Cow;

/// The longest record, in bytes.
pub const MAX_RECORD: usize = 65_536;

/// What an editor may put before a file that is UTF-8.
const BYTE_ORDER_MARK: [u8; 3] = [0xef, 0xbb, 0xbf];

/// A record, or what is wrong with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The line on which it begins; the first is 1.
    pub line: u64,
    /// Its cells.
    pub cells: Result<Vec<String>, Malformed>,
}

/// Why a record has no cells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Malformed {
    /// It has more than [`MAX_RECORD`] bytes.
    TooLong,
    /// It is not UTF-8.
    NotUtf8,
    /// The file ends within quotes.
    Unterminated,
}

impl Malformed {
    /// What is wrong, for a person.
    pub fn message(self) -> String {
        match self {
            Self::TooLong => format!("is longer than {MAX_RECORD} bytes"),
            Self::NotUtf8 => "must be valid UTF-8".to_owned(),
            Self::Unterminated => "ends within quotes: a quote at the beginning of a cell is not closed".to_owned(),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Before a record.
    Between,
    /// Before the first character of a cell.
    CellStart,
    /// In a cell without quotes, or after the end of those.
    Plain,
    /// Within quotes.
    Quoted,
    /// After a quote within quotes: their end, or half of a quote.
    QuoteSeen,
}

/// Cuts a file that arrives in pieces into records.
#[derive(Debug)]
pub struct Reader {
    place: Place,
    /// How many bytes of a byte order mark were there; `None` once it is clear whether there is one.
    mark: Option<usize>,
    /// The line of the next byte.
    line: u64,
    after_cr: bool,
    /// The record under way: where it began, how many bytes it has, its cells one after another, and their ends.
    began: u64,
    length: usize,
    text: Vec<u8>,
    ends: Vec<usize>,
}

impl Default for Reader {
    fn default() -> Self {
        Self {
            place: Place::Between,
            mark: Some(0),
            line: 1,
            after_cr: false,
            began: 1,
            length: 0,
            text: Vec::new(),
            ends: Vec::new(),
        }
    }
}

impl Reader {
    /// The next record, as far as it ends within these bytes; those that were read are cut off. `None` where more is
    /// needed.
    pub fn next(&mut self, bytes: &mut &[u8]) -> Option<Record> {
        while let Some((first, rest)) = bytes.split_first() {
            *bytes = rest;
            if let Some(record) = self.read(*first) {
                return Some(record);
            }
        }
        None
    }

    /// What is left at the end of the file.
    pub fn finish(&mut self) -> Option<Record> {
        if let Some(seen @ 1..) = self.mark.take() {
            self.replay(seen);
        }
        match self.place {
            Place::Between => None,
            Place::Quoted => {
                self.clear();
                Some(Record { line: self.began, cells: Err(Malformed::Unterminated) })
            }
            Place::CellStart | Place::Plain | Place::QuoteSeen => Some(self.record()),
        }
    }

    fn read(&mut self, byte: u8) -> Option<Record> {
        if let Some(seen) = self.mark {
            if BYTE_ORDER_MARK.get(seen) == Some(&byte) {
                self.mark = (seen + 1 < BYTE_ORDER_MARK.len()).then_some(seen + 1);
                return None;
            }
            self.mark = None;
            self.replay(seen);
        }
        self.step(byte)
    }

    /// Takes the beginning of a mark that was none for what it is.
    fn replay(&mut self, seen: usize) {
        for byte in BYTE_ORDER_MARK.into_iter().take(seen) {
            // None of them ends a record.
            self.step(byte);
        }
    }

    fn step(&mut self, byte: u8) -> Option<Record> {
        let began = self.line;
        let ends_line = match byte {
            b'\n' => !self.after_cr,
            other => other == b'\r',
        };
        self.line += u64::from(ends_line);
        self.after_cr = byte == b'\r';
        let is_end = matches!(byte, b'\r' | b'\n');
        if self.place == Place::Between {
            if is_end {
                return None;
            }
            self.began = began;
            self.place = Place::CellStart;
        }
        if is_end && self.place != Place::Quoted {
            return Some(self.record());
        }
        self.length = self.length.saturating_add(1);
        if self.length > MAX_RECORD {
            // Still to be read to its end, and to no other use.
            self.text = Vec::new();
            self.ends = Vec::new();
        }
        match (self.place, byte) {
            (Place::CellStart, b'"') => self.place = Place::Quoted,
            (Place::Quoted, b'"') => self.place = Place::QuoteSeen,
            (Place::QuoteSeen, b'"') => {
                self.keep(byte);
                self.place = Place::Quoted;
            }
            (Place::Quoted, _) => self.keep(byte),
            (_, b',') => {
                self.end_cell();
                self.place = Place::CellStart;
            }
            _ => {
                self.keep(byte);
                self.place = Place::Plain;
            }
        }
        None
    }

    fn keep(&mut self, byte: u8) {
        if self.length <= MAX_RECORD {
            self.text.push(byte);
        }
    }

    fn end_cell(&mut self) {
        if self.length <= MAX_RECORD {
            self.ends.push(self.text.len());
        }
    }

    /// Ends the record under way.
    fn record(&mut self) -> Record {
        self.end_cell();
        let cells = if self.length > MAX_RECORD {
            Err(Malformed::TooLong)
        } else {
            let starts = std::iter::once(&0).chain(&self.ends);
            let cells = starts.zip(&self.ends).map(|(start, end)| self.text.get(*start..*end).unwrap_or_default());
            let cells = cells.map(|cell| std::str::from_utf8(cell).map(ToOwned::to_owned));
            cells.collect::<Result<_, _>>().map_err(|_| Malformed::NotUtf8)
        };
        self.clear();
        Record { line: self.began, cells }
    }

    fn clear(&mut self) {
        self.text.clear();
        self.ends.clear();
        self.length = 0;
        self.place = Place::Between;
    }
}

/// Whether a spreadsheet would take it for a formula, apostrophes before it aside.
fn is_formula(cell: &str) -> bool {
    cell.trim_start_matches('\'').starts_with(['=', '+', '-', '@', '\t', '\r'])
}

/// A cell as it is written: no formula, whatever a customer has made of it.
pub fn guarded(cell: &str) -> Cow<'_, str> {
    if is_formula(cell) { Cow::Owned(format!("'{cell}")) } else { Cow::Borrowed(cell) }
}

/// What was meant by a cell: what [`guarded`] was given.
pub fn unguarded(cell: &str) -> &str {
    cell.strip_prefix('\'').filter(|rest| is_formula(rest)).unwrap_or(cell)
}

#[cfg(test)]
mod tests {
    use rand::{Rng as _, RngExt as _};

    use super::*;

    /// All records of a file that arrives in pieces of that size.
    fn records(file: &[u8], piece: usize) -> Vec<Record> {
        let mut reader = Reader::default();
        let mut records = Vec::new();
        for mut piece in file.chunks(piece) {
            while let Some(record) = reader.next(&mut piece) {
                records.push(record);
            }
            assert!(piece.is_empty());
        }
        records.extend(reader.finish());
        assert_eq!(reader.finish(), None);
        records
    }

    fn cells(line: u64, cells: &[&str]) -> Record {
        Record { line, cells: Ok(cells.iter().map(ToString::to_string).collect()) }
    }

    #[test]
    fn a_file_is_the_same_in_pieces_of_any_size() {
        let file = "\u{feff}a,b\r\n1,\"two\r\nlines, \"\"quoted\"\"\"\n\n\r\n,\n\"\"\rä\"x\",\"y\"z\r\nlast,";
        let expected = [
            cells(1, &["a", "b"]),
            cells(2, &["1", "two\r\nlines, \"quoted\""]),
            cells(6, &["", ""]),
            cells(7, &[""]),
            cells(8, &["ä\"x\"", "yz"]),
            cells(9, &["last", ""]),
        ];
        for piece in 1..=file.len() {
            assert_eq!(records(file.as_bytes(), piece), expected, "{piece}");
        }
        assert_eq!(records(b"", 1), []);
        assert_eq!(records(b"\r\n\n\r", 2), []);
        // Half a mark is text, and none at all.
        assert_eq!(records(&[0xef, 0xbb], 1), [Record { line: 1, cells: Err(Malformed::NotUtf8) }]);
        assert_eq!(records("\u{fec0}".as_bytes(), 1), [cells(1, &["\u{fec0}"])]);
    }

    #[test]
    fn it_reads_what_another_reader_reads() {
        let mut chance = rand::rng();
        for _ in 0..3_000 {
            let length = chance.random_range(0..40);
            let file: Vec<u8> = (0..length).map(|_| b"aaa,,\"\"\n\r\xc3"[chance.random_range(0..10)]).collect();
            let ours = records(&file, chance.random_range(1..9));
            let unterminated = ours.last().is_some_and(|last| last.cells == Err(Malformed::Unterminated));
            let mut reader = ::csv::ReaderBuilder::new().has_headers(false).flexible(true).from_reader(&file[..]);
            let mut theirs: Vec<_> = reader.byte_records().map(Result::unwrap).collect();
            if unterminated {
                theirs.pop();
            }
            let ours = &ours[..ours.len() - usize::from(unterminated)];
            assert_eq!(ours.len(), theirs.len(), "{:?}", String::from_utf8_lossy(&file));
            for (ours, theirs) in ours.iter().zip(&theirs) {
                let theirs: Result<Vec<String>, _> = theirs
                    .iter()
                    .map(|cell| String::from_utf8(cell.to_vec()).map_err(|_| Malformed::NotUtf8))
                    .collect();
                assert_eq!(ours.cells, theirs, "{:?}", String::from_utf8_lossy(&file));
            }
        }
    }

    #[test]
    fn a_record_that_is_too_long_is_passed_over_and_one_that_is_just_not_is_read() {
        let fits = "x".repeat(MAX_RECORD);
        let file = format!("{fits}\n{fits}y\n\"{fits}\n,\n\"\nb,c\n");
        for piece in [1, 7, 4_096, file.len()] {
            let found = records(file.as_bytes(), piece);
            assert!(found[0] == cells(1, &[&fits]));
            assert_eq!(found[1], Record { line: 2, cells: Err(Malformed::TooLong) });
            assert_eq!(found[2], Record { line: 3, cells: Err(Malformed::TooLong) });
            assert_eq!(found[3..], [cells(6, &["b", "c"])]);
        }
        let mut reader = Reader::default();
        let mut endless = vec![b','; 10 * MAX_RECORD];
        endless[0] = b'"';
        assert_eq!(reader.next(&mut endless.as_slice()), None);
        assert!(reader.text.capacity() + 8 * reader.ends.capacity() < MAX_RECORD, "nothing of it is kept");
        assert_eq!(reader.finish().unwrap().cells, Err(Malformed::Unterminated));
    }

    #[test]
    fn nonsense_ends_nobodys_day() {
        let mut chance = rand::rng();
        for _ in 0..200 {
            let mut file = vec![0; chance.random_range(0..2_000)];
            chance.fill_bytes(&mut file);
            let whole = records(&file, file.len().max(1));
            assert_eq!(records(&file, 1), whole);
            assert!(whole.windows(2).all(|pair| pair[0].line < pair[1].line));
        }
    }

    #[test]
    fn a_formula_goes_out_as_text_and_comes_back_as_it_was() {
        for cell in ["=1+1", "+x", "-1", "@sum", "\tx", "\rx", "'=1", "''=1", "'", "'a", "''", "", "a=1", "o'neil"] {
            let written = guarded(cell);
            assert!(!written.starts_with(['=', '+', '-', '@', '\t', '\r']), "{written}");
            assert_eq!(unguarded(&written), cell);
        }
        assert_eq!((guarded("=1").as_ref(), guarded("'a").as_ref()), ("'=1", "'a"));
        assert_eq!(unguarded("=typed"), "=typed", "who types one is believed");
    }
}
