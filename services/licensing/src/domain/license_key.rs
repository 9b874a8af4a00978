//! Licence keys: made, read as people type them, and judged without a look-up.
//!
//! A key is 15 random characters and 2 check characters of Crockford's base 32, shown as `K7WX9-M3NP4-H8TRC-DJ`. The
//! whole is a code word of the Reed–Solomon code over GF(32) (x⁵+x²+1, α = 2) whose generator has the roots α and α²,
//! the first character being the coefficient of the highest power. Any one or two wrong characters, and any two that
//! changed places, leave a remainder; one wrong character can be named and put right.
//!
//! Deliberately absent: knowledge of which keys exist.

use std::fmt;

use rand::RngExt as _;

/// All characters of a key.
pub const LENGTH: usize = 17;
/// The random ones.
const RANDOM: usize = 15;
/// The groups in which a key is shown.
const GROUPS: [usize; 4] = [5, 5, 5, 2];
/// Crockford's base 32: no I, L, O, U.
const ALPHABET: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";
/// The order of the multiplicative group of GF(32).
const ORDER: usize = 31;

/// The powers of α, twice over, so that sums of two logarithms need no reduction.
const POWERS: [u8; 2 * ORDER] = {
    let mut powers = [1_u8; 2 * ORDER];
    let mut at = 1;
    while at < 2 * ORDER {
        let doubled = powers[at - 1] << 1;
        powers[at] = if doubled & 32 == 0 { doubled } else { doubled ^ 0b10_0101 };
        at += 1;
    }
    powers
};

/// The logarithms to the base α; that of 0 is never asked for.
const LOGARITHMS: [u8; 32] = {
    let mut logarithms = [0_u8; 32];
    let mut at = 0_u8;
    while (at as usize) < ORDER {
        logarithms[POWERS[at as usize] as usize] = at;
        at += 1;
    }
    logarithms
};

fn logarithm(value: u8) -> usize {
    usize::from(LOGARITHMS[usize::from(value & 31)])
}

fn multiply(a: u8, b: u8) -> u8 {
    if a == 0 || b == 0 { 0 } else { POWERS[logarithm(a) + logarithm(b)] }
}

fn divide(a: u8, b: u8) -> u8 {
    if a == 0 { 0 } else { POWERS[logarithm(a) + ORDER - logarithm(b)] }
}

/// The values of the 17 characters, first character first.
type Word = [u8; LENGTH];

/// The polynomial of a word at α and at α²; both 0 for a code word.
fn syndromes(word: &Word) -> (u8, u8) {
    let at = |x| word.iter().fold(0, |sum, value| multiply(sum, x) ^ value);
    (at(POWERS[1]), at(POWERS[2]))
}

/// Chooses the last two values so that the whole is a code word.
fn complete(word: &mut Word) {
    word[RANDOM..].fill(0);
    let (one, two) = syndromes(word);
    // p·α + q = one and p·α² + q = two, where subtraction is addition.
    let p = divide(one ^ two, POWERS[1] ^ POWERS[2]);
    word[RANDOM] = p;
    word[RANDOM + 1] = one ^ multiply(p, POWERS[1]);
}

/// The code word that differs in exactly one character, and where.
fn nearest(word: &Word) -> Option<(usize, Word)> {
    let (one, two) = syndromes(word);
    if one == 0 || two == 0 {
        return None;
    }
    // An error e at the power k leaves e·αᵏ and e·α²ᵏ.
    let locator = divide(two, one);
    let position = (LENGTH - 1).checked_sub(logarithm(locator))?;
    let mut corrected = *word;
    corrected[position] ^= divide(one, locator);
    Some((position, corrected))
}

/// A licence key whose check characters are right.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct LicenseKey([u8; LENGTH]);

/// Why a text is no licence key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Malformed {
    /// It has another number of characters.
    Length(usize),
    /// It has a character that no licence key has.
    Character {
        /// The character.
        found: char,
        /// The key it stands in, if everything else is right.
        suggestion: Option<LicenseKey>,
    },
    /// Its check characters are wrong.
    Check {
        /// The key that differs in one character, if there is one.
        suggestion: Option<LicenseKey>,
    },
}

impl LicenseKey {
    /// A new key.
    pub fn random() -> Self {
        // 75 of the 128 bits are used.
        let mut chance = rand::rng().random::<u128>();
        let mut word = [0; LENGTH];
        for value in &mut word[..RANDOM] {
            *value = u8::try_from(chance & 31).unwrap_or(0);
            chance >>= 5;
        }
        complete(&mut word);
        Self::of(&word)
    }

    /// Reads a key as people write it: in either case, with hyphens and spaces anywhere, O for 0, and I or L for 1.
    pub fn parse(text: &str) -> Result<Self, Malformed> {
        let mut word = [0; LENGTH];
        let mut count = 0;
        let mut strange = None;
        for found in text.chars().filter(|c| *c != '-' && !c.is_whitespace()) {
            if let Some(place) = word.get_mut(count) {
                match value_of(found) {
                    Some(value) => *place = value,
                    // Of several strange characters the last is named, and nothing is suggested.
                    None => strange = Some((found, count, strange.is_none())),
                }
            }
            count += 1;
        }
        if count != LENGTH {
            return Err(Malformed::Length(count));
        }
        let intact = syndromes(&word) == (0, 0);
        if let Some((found, position, alone)) = strange {
            // The strange character was read as 0: the key is found if that, or another value in its place, fits.
            let fitting = if intact { Some((position, word)) } else { nearest(&word) };
            let suggestion = fitting.filter(|(at, _)| alone && *at == position).map(|(_, word)| Self::of(&word));
            return Err(Malformed::Character { found, suggestion });
        }
        if intact {
            Ok(Self::of(&word))
        } else {
            Err(Malformed::Check { suggestion: nearest(&word).map(|(_, word)| Self::of(&word)) })
        }
    }

    /// Reads back what [`Self::as_bytes`] gave.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(bytes).ok()?;
        Self::parse(text).ok()
    }

    /// The 17 characters without hyphens: what is hashed and sealed.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    fn of(word: &Word) -> Self {
        Self(word.map(|value| ALPHABET[usize::from(value & 31)]))
    }
}

fn value_of(character: char) -> Option<u8> {
    let upper = match character.to_ascii_uppercase() {
        'O' => '0',
        'I' | 'L' => '1',
        other => other,
    };
    let position = ALPHABET.iter().position(|known| char::from(*known) == upper)?;
    u8::try_from(position).ok()
}

impl fmt::Display for LicenseKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = self.0.as_slice();
        for (index, length) in GROUPS.into_iter().enumerate() {
            let (group, after) = rest.split_at(length);
            rest = after;
            if index > 0 {
                f.write_str("-")?;
            }
            for byte in group {
                fmt::Write::write_char(f, char::from(*byte))?;
            }
        }
        Ok(())
    }
}

/// A key is a secret: it is shown only where someone asks for its text.
impl fmt::Debug for LicenseKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LicenseKey([redacted])")
    }
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let suggestion = match self {
            Self::Length(count) => {
                write!(f, "must have {LENGTH} characters besides hyphens and spaces, such as ")?;
                return write!(f, "K7WX9-M3NP4-H8TRC-DJ, but has {count}");
            }
            Self::Character { found, suggestion } => {
                // Debug escapes what a terminal or a log would act upon.
                write!(f, "contains {found:?}, which no license key has")?;
                suggestion
            }
            Self::Check { suggestion } => {
                f.write_str("is mistyped: its check characters do not match")?;
                suggestion
            }
        };
        match suggestion {
            Some(key) => write!(f, "; did you mean {key}?"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VECTOR: &str = "K7WX9-M3NP4-H8TRC-DJ";

    /// Enough keys for every value in every place, and the vector first.
    fn keys() -> Vec<LicenseKey> {
        let vector = LicenseKey::parse(VECTOR).expect("the vector is a key");
        std::iter::once(vector).chain(std::iter::repeat_with(LicenseKey::random).take(40)).collect()
    }

    fn text(bytes: &[u8]) -> String {
        String::from_utf8(bytes.to_vec()).unwrap()
    }

    #[test]
    fn the_vector_of_the_specification_is_a_key() {
        assert_eq!(LicenseKey::parse(VECTOR).unwrap().to_string(), VECTOR);
        assert!(LicenseKey::parse("K7WX9-M3NP4-H8TRC-R2").is_err(), "the seed's is only an illustration");
    }

    #[test]
    fn a_key_is_read_as_people_write_it() {
        for written in ["k7wx9m3np4h8trcdj", " K7WX9 M3NP4 H8TRC DJ ", "K-7-W-X-9M3NP4H8TRCDJ--"] {
            assert_eq!(LicenseKey::parse(written).unwrap().to_string(), VECTOR, "{written}");
        }
        let has_both = |key: &LicenseKey| key.0.contains(&b'0') && key.0.contains(&b'1');
        let confusing = std::iter::repeat_with(LicenseKey::random).find(has_both).unwrap();
        let plain = text(&confusing.0);
        for (zero, one) in [("O", "I"), ("o", "l"), ("0", "L"), ("O", "i")] {
            assert_eq!(LicenseKey::parse(&plain.replace('0', zero).replace('1', one)).as_ref(), Ok(&confusing));
        }
    }

    #[test]
    fn every_wrong_character_is_caught_and_put_right() {
        for key in keys() {
            for at in 0..LENGTH {
                for wrong in ALPHABET.iter().filter(|wrong| **wrong != key.0[at]) {
                    let mut bytes = key.0;
                    bytes[at] = *wrong;
                    let found = LicenseKey::parse(&text(&bytes));
                    assert_eq!(found, Err(Malformed::Check { suggestion: Some(key.clone()) }), "{key} at {at}");
                }
            }
        }
    }

    #[test]
    fn every_swap_of_two_characters_is_caught() {
        for key in keys() {
            for (a, b) in (0..LENGTH).flat_map(|a| (0..a).map(move |b| (a, b))).filter(|(a, b)| key.0[*a] != key.0[*b])
            {
                let mut bytes = key.0;
                bytes.swap(a, b);
                assert!(LicenseKey::parse(&text(&bytes)).is_err(), "{key} with {a} and {b} swapped");
            }
        }
    }

    #[test]
    fn every_pair_of_wrong_characters_is_caught() {
        // The code is linear: what an error does, it does to every key.
        let key = LicenseKey::parse(VECTOR).unwrap();
        let word: Word = key.0.map(|byte| value_of(char::from(byte)).unwrap());
        for (a, b) in (0..LENGTH).flat_map(|a| (0..a).map(move |b| (a, b))) {
            for (first, second) in (1..32).flat_map(|first| (1..32).map(move |second| (first, second))) {
                let mut wrong = word;
                wrong[a] ^= first;
                wrong[b] ^= second;
                assert_ne!(syndromes(&wrong), (0, 0), "{a} and {b}");
            }
        }
    }

    #[test]
    fn every_pair_of_wrong_characters_is_refused_in_keys_of_every_kind() {
        for key in keys().into_iter().take(4) {
            let mut text = key.0;
            for (a, b) in (0..LENGTH).flat_map(|a| (0..a).map(move |b| (a, b))) {
                for first in ALPHABET.iter().filter(|wrong| **wrong != key.0[a]) {
                    for second in ALPHABET.iter().filter(|wrong| **wrong != key.0[b]) {
                        (text[a], text[b]) = (*first, *second);
                        let read = std::str::from_utf8(&text).map(LicenseKey::parse);
                        assert!(matches!(read, Ok(Err(Malformed::Check { .. }))), "{key} at {a} and {b}");
                    }
                }
                (text[a], text[b]) = (key.0[a], key.0[b]);
            }
        }
    }

    #[test]
    fn two_characters_that_changed_places_are_never_taken_for_another_key() {
        // A suggestion may be wrong where two characters are; a key must not be.
        for key in keys() {
            for (a, b) in (0..LENGTH).flat_map(|a| (0..a).map(move |b| (a, b))) {
                let mut bytes = key.0;
                bytes.swap(a, b);
                let read = LicenseKey::parse(&text(&bytes));
                assert_eq!(read.is_ok(), key.0[a] == key.0[b], "{key} with {a} and {b} swapped");
                if let Err(Malformed::Check { suggestion: Some(suggestion) }) = read {
                    assert_eq!(syndromes(&suggestion.0.map(|byte| value_of(byte.into()).unwrap())), (0, 0));
                }
            }
        }
    }

    #[test]
    fn hyphens_and_spaces_stand_anywhere_and_look_alikes_of_other_scripts_are_refused() {
        let key = LicenseKey::parse(VECTOR).unwrap();
        let plain = text(&key.0);
        for at in 0..=LENGTH {
            let (before, after) = plain.split_at(at);
            for between in ["-", " ", "--", " - ", "\t", "\r\n", "\u{a0}"] {
                assert_eq!(LicenseKey::parse(&format!("{before}{between}{after}")).as_ref(), Ok(&key));
                let lower = format!("{between}{before}{after}{between}").to_lowercase();
                assert_eq!(LicenseKey::parse(&lower).as_ref(), Ok(&key));
            }
        }
        // Greek and Cyrillic letters, full-width ones, a long s, the sign of kelvin, a dotless i.
        for stranger in ['Κ', 'К', 'Ｋ', 'ſ', '\u{212a}', 'ı', '７', '٧', 'Х', 'Н', '\u{200b}'] {
            let written = plain.replacen('K', &stranger.to_string(), 1);
            let expected = Malformed::Character { found: stranger, suggestion: Some(key.clone()) };
            assert_eq!(LicenseKey::parse(&written), Err(expected), "{stranger:?}");
        }
    }

    #[test]
    fn a_character_that_no_key_has_is_named_and_put_right() {
        for key in keys() {
            for at in 0..LENGTH {
                for strange in ['U', 'u', '*', 'é', '٣'] {
                    let found: String = (0..LENGTH).map(|i| if i == at { strange } else { key.0[i].into() }).collect();
                    let expected = Malformed::Character { found: strange, suggestion: Some(key.clone()) };
                    assert_eq!(LicenseKey::parse(&found), Err(expected));
                }
            }
        }
        let two = LicenseKey::parse("U7WX9-M3NP4-H8TRC-DU").unwrap_err();
        assert_eq!(two, Malformed::Character { found: 'U', suggestion: None });
    }

    #[test]
    fn nonsense_is_refused_in_words() {
        for nonsense in ["", "-", "K7WX9", "K7WX9-M3NP4-H8TRC-DJ-0", &"9".repeat(64), "\u{0}", "🦀🦀"] {
            assert!(matches!(LicenseKey::parse(nonsense), Err(Malformed::Length(_))), "{nonsense:?}");
        }
        let message = |text| LicenseKey::parse(text).unwrap_err().to_string();
        assert_eq!(
            message("K7WX9-M3NP4-H8TRC-DK"),
            "is mistyped: its check characters do not match; did you mean K7WX9-M3NP4-H8TRC-DJ?"
        );
        assert_eq!(
            message("K7WX9-M3NP4-H8TRC"),
            "must have 17 characters besides hyphens and spaces, such as K7WX9-M3NP4-H8TRC-DJ, but has 15"
        );
        assert!(message("\u{7}7WX9-M3NP4-H8TRC-DJ").starts_with("contains '\\u{7}', which no license key has; did"));
    }

    #[test]
    fn a_key_comes_back_from_its_bytes_and_does_not_print_itself() {
        for key in keys() {
            assert_eq!(LicenseKey::from_bytes(key.as_bytes()), Some(key.clone()));
            assert_eq!(format!("{key:?}"), "LicenseKey([redacted])");
        }
        assert_eq!(LicenseKey::from_bytes(&[0xff; LENGTH]), None);
    }
}
