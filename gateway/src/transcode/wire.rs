//! The wire format of protobuf, as much of it as tables need: tags, varints, lengths.

/// An integer of variable length.
pub(super) const VARINT: u8 = 0;
/// Eight bytes.
pub(super) const FIXED64: u8 = 1;
/// A length, and that many bytes.
pub(super) const LENGTH_DELIMITED: u8 = 2;
/// Four bytes.
pub(super) const FIXED32: u8 = 5;

/// Appends a varint.
pub(super) fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(low_byte(value) | 0x80);
        value >>= 7;
    }
    out.push(low_byte(value));
}

/// Appends a length and that many bytes.
pub(super) fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put_varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

/// Leaves room for a length, to be filled by [`close`] when what it counts is written.
pub(super) fn open(out: &mut Vec<u8>) -> usize {
    out.push(0);
    out.len()
}

/// Fills the length of what was written since [`open`]. Most messages are shorter than 128 bytes, and for them the
/// one byte that was left suffices.
pub(super) fn close(out: &mut Vec<u8>, start: usize) {
    let length = out.len() - start;
    if length < 0x80 {
        out[start - 1] = low_byte(length as u64);
        return;
    }
    let extra = varint_length(length as u64) - 1;
    out.resize(out.len() + extra, 0);
    out.copy_within(start..start + length, start + extra);
    let mut value = length as u64;
    for byte in &mut out[start - 1..start + extra] {
        *byte = low_byte(value) | 0x80;
        value >>= 7;
    }
    out[start - 1 + extra] &= 0x7f;
}

fn varint_length(value: u64) -> usize {
    (64 - (value | 1).leading_zeros() as usize).div_ceil(7)
}

fn low_byte(value: u64) -> u8 {
    value.to_le_bytes()[0]
}

/// One field of a message, as it stands on the wire.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry<'a> {
    pub(super) number: u32,
    pub(super) raw: Raw<'a>,
}

/// A value on the wire.
#[derive(Clone, Copy, Debug)]
pub(super) enum Raw<'a> {
    Varint(u64),
    Fixed64(u64),
    Fixed32(u32),
    Bytes(&'a [u8]),
}

/// The bytes are not a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Garbled;

/// Walks the fields of a message.
#[derive(Clone, Copy, Debug)]
pub(super) struct Walk<'a> {
    rest: &'a [u8],
}

impl<'a> Walk<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// How many bytes are left.
    pub(super) fn left(&self) -> usize {
        self.rest.len()
    }

    /// The next field, or none at the end.
    pub(super) fn next(&mut self) -> Result<Option<Entry<'a>>, Garbled> {
        if self.rest.is_empty() {
            return Ok(None);
        }
        let tag = take_varint(&mut self.rest)?;
        let number = u32::try_from(tag >> 3).map_err(|_| Garbled)?;
        let raw = match u8::try_from(tag & 7).map_err(|_| Garbled)? {
            VARINT => Raw::Varint(take_varint(&mut self.rest)?),
            FIXED64 => Raw::Fixed64(take_fixed64(&mut self.rest)?),
            FIXED32 => Raw::Fixed32(take_fixed32(&mut self.rest)?),
            LENGTH_DELIMITED => {
                let length = usize::try_from(take_varint(&mut self.rest)?).map_err(|_| Garbled)?;
                let (bytes, rest) = self.rest.split_at_checked(length).ok_or(Garbled)?;
                self.rest = rest;
                Raw::Bytes(bytes)
            }
            _ => return Err(Garbled),
        };
        Ok(Some(Entry { number, raw }))
    }
}

/// Takes a varint from the front.
pub(super) fn take_varint(bytes: &mut &[u8]) -> Result<u64, Garbled> {
    if let [byte, rest @ ..] = *bytes
        && *byte < 0x80
    {
        *bytes = rest;
        return Ok(u64::from(*byte));
    }
    let mut value = 0_u64;
    for shift in (0..70).step_by(7) {
        let (byte, rest) = bytes.split_first().ok_or(Garbled)?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f).checked_shl(shift).unwrap_or(0);
        if *byte < 0x80 {
            return Ok(value);
        }
    }
    Err(Garbled)
}

/// Takes eight bytes from the front.
pub(super) fn take_fixed64(bytes: &mut &[u8]) -> Result<u64, Garbled> {
    let (value, rest) = bytes.split_first_chunk::<8>().ok_or(Garbled)?;
    *bytes = rest;
    Ok(u64::from_le_bytes(*value))
}

/// Takes four bytes from the front.
pub(super) fn take_fixed32(bytes: &mut &[u8]) -> Result<u32, Garbled> {
    let (value, rest) = bytes.split_first_chunk::<4>().ok_or(Garbled)?;
    *bytes = rest;
    Ok(u32::from_le_bytes(*value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_length_makes_room_for_itself() {
        for length in [0, 1, 127, 128, 300, 16_383, 16_384, 2_097_152] {
            let mut out = vec![7];
            let start = open(&mut out);
            out.extend((0..length).map(|at| u8::try_from(at % 251).unwrap()));
            close(&mut out, start);
            let mut rest = &out[1..];
            assert_eq!(take_varint(&mut rest), Ok(length as u64));
            assert_eq!(rest.len(), length);
            assert!(rest.iter().enumerate().all(|(at, byte)| usize::from(*byte) == at % 251));
        }
    }

    #[test]
    fn varints_come_back() {
        for value in [0, 1, 127, 128, 300, u64::from(u32::MAX), u64::MAX] {
            let mut out = Vec::new();
            put_varint(&mut out, value);
            assert_eq!(out.len(), varint_length(value));
            assert_eq!(take_varint(&mut out.as_slice()), Ok(value));
        }
    }

    #[test]
    fn what_is_cut_short_is_garbled() {
        assert_eq!(take_varint(&mut [0x80, 0x80].as_slice()), Err(Garbled));
        assert_eq!(take_varint(&mut [0xff; 11].as_slice()), Err(Garbled));
        assert!(Walk::new(&[0x0a, 5, 1]).next().is_err());
        assert!(Walk::new(&[0x0b]).next().is_err());
    }
}
