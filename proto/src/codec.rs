//! The codec of the generated clients and servers: protobuf, judged by the contract's rules on arrival.
//!
//! Rules are enforced here, on the wire bytes, so that no method of any service can forget them and a direct
//! gRPC call meets the same answers as one through the gateway.

use std::marker::PhantomData;

use bytes::Buf as _;
use prost::{Message, Name};
use tonic::{
    Status,
    codec::{BufferSettings, Codec, DecodeBuf, Decoder},
};
use tonic_prost::ProstEncoder;

use crate::{error::Error, rules};

/// What a message is first given to grow in: most of ours are smaller, and tonic's default of 8 KiB for each direction
/// of each call costs more than the call.
const BUFFER_BYTES: usize = 512;
/// How much is buffered before it is sent on; tonic's own default.
const YIELD_BYTES: usize = 32 * 1_024;

fn buffers() -> BufferSettings {
    BufferSettings::new(BUFFER_BYTES, YIELD_BYTES)
}

/// Decodes a message that keeps its rules, or says which field breaks which.
pub fn decode<M: Message + Name + Default>(bytes: &[u8]) -> Result<M, Error> {
    if let Some(rules) = rules::of::<M>() {
        rules.check(bytes)?;
    }
    M::decode(bytes).map_err(|_| Error::malformed("the message is not valid protobuf of its type"))
}

/// Judges a message that was made here by the rules that it would meet on arrival.
pub fn check<M: Message + Name>(message: &M) -> Result<(), Error> {
    match rules::of::<M>() {
        Some(rules) => rules.check(&message.encode_to_vec()),
        None => Ok(()),
    }
}

/// Encodes `T`, and decodes `U` where it keeps the rules.
#[derive(Debug)]
pub struct ContractCodec<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for ContractCodec<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T, U> Codec for ContractCodec<T, U>
where
    T: Message + Send + 'static,
    U: Message + Name + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = RulesDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstEncoder::new(buffers())
    }

    fn decoder(&mut self) -> Self::Decoder {
        RulesDecoder(PhantomData)
    }
}

/// The decoder of [`ContractCodec`].
#[derive(Debug)]
pub struct RulesDecoder<U>(PhantomData<U>);

impl<U: Message + Name + Default> Decoder for RulesDecoder<U> {
    type Item = U;
    type Error = Status;

    fn decode(&mut self, buf: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        Ok(Some(decode(&buf.copy_to_bytes(buf.remaining()))?))
    }

    fn buffer_settings(&self) -> BufferSettings {
        buffers()
    }
}
