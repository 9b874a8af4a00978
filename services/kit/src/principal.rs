//! Who is calling, as it travels between processes: signed, bound to one rpc and one request, good for seconds.
//!
//! The gateway strips whatever arrives under [`PRINCIPAL_HEADER`] from outside and puts its own on; services believe
//! nothing else. The key is derived from the installation's master key, which every process is given; while that changes,
//! an assertion under any that is known counts.

use std::sync::{Arc, LazyLock};

use base64::{
    Engine as _, alphabet,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use bytes::Bytes;
use http::HeaderValue;
use paperkey_proto::{
    Error,
    options::v1::Caller as Kind,
    principal::v1::{Mode, Once as Token, Principal},
};
use prost::{
    Message as _,
    encoding::{self, WireType},
};
use quick_cache::sync::Cache;

use crate::{clock::Clock, once::Once, secrets::Keyring};

/// The metadata entry that carries a signed assertion.
pub const PRINCIPAL_HEADER: &str = "paperkey-principal-bin";

/// The metadata entry that carries the request id.
pub const REQUEST_ID_HEADER: &str = "x-request-id";

/// How long an assertion is good, in milliseconds.
const LIFETIME_MS: i64 = 5_000;

const MAC_LENGTH: usize = 32;

/// Binary metadata is written without padding and read with or without it, as gRPC asks.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_encode_padding(false).with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// How many principals are kept decoded.
const KNOWN_PRINCIPALS: usize = 10_000;

/// Signs and verifies assertions.
#[derive(Clone, Debug)]
pub struct Signer {
    keys: Keyring,
    pub(crate) clock: Clock,
    /// Principals that arrived before, by their bytes: the same few make most of the calls.
    known: Arc<Cache<Bytes, Arc<Principal>>>,
}

/// An [`Assertion`] whose parts are looked at before they are decoded; the same on the wire.
#[derive(Clone, PartialEq, prost::Message)]
struct Sealed {
    #[prost(bytes = "bytes", tag = "1")]
    principal: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    rpc: Bytes,
    #[prost(string, tag = "3")]
    request_id: String,
    #[prost(int64, tag = "4")]
    issued_at_ms: i64,
    #[prost(message, optional, tag = "5")]
    once: Option<Token>,
}

impl Signer {
    /// Signs with the installation's keys.
    pub fn new(keys: &Keyring, clock: Clock) -> Self {
        Self { keys: keys.clone(), clock, known: Arc::new(Cache::new(KNOWN_PRINCIPALS)) }
    }

    /// Asserts that this principal makes this call; nobody in particular where there is none.
    pub fn sign(&self, principal: Option<&Principal>, rpc: &str, request_id: &str) -> HeaderValue {
        self.assertion(principal.unwrap_or(&nobody()), rpc, request_id, None)
    }

    /// Asserts that this caller makes this call, once where the caller wants it so.
    pub fn sign_as(&self, caller: &Caller, rpc: &str) -> HeaderValue {
        let token = caller.once.as_ref().map(|once| once.token());
        self.assertion(&caller.principal, rpc, &caller.request_id, token)
    }

    fn assertion(&self, principal: &Principal, rpc: &str, request_id: &str, once: Option<&Token>) -> HeaderValue {
        let mut signed = Vec::with_capacity(MAC_LENGTH + 256);
        signed.resize(MAC_LENGTH, 0);
        // The fields of `Assertion`, written without a copy of the principal.
        encoding::message::encode(1, principal, &mut signed);
        for (tag, text) in [(2, rpc), (3, request_id)] {
            encoding::encode_key(tag, WireType::LengthDelimited, &mut signed);
            encoding::encode_varint(text.len() as u64, &mut signed);
            signed.extend_from_slice(text.as_bytes());
        }
        encoding::int64::encode(4, &self.clock.now_ms(), &mut signed);
        if let Some(once) = once {
            encoding::message::encode(5, once, &mut signed);
        }
        let (mac, body) = signed.split_at_mut(MAC_LENGTH);
        mac.copy_from_slice(&self.keys.assert(body));
        let mut value = HeaderValue::from_maybe_shared(Bytes::from(BASE64.encode(&signed)))
            .expect("base 64 is made of visible ASCII characters");
        value.set_sensitive(true);
        value
    }

    /// Who makes this call, if the assertion is ours, of this rpc and fresh.
    pub fn verify(&self, header: &HeaderValue, rpc: &str) -> Result<Caller, Error> {
        let refused = || Error::unauthenticated();
        let signed = BASE64.decode(header.as_bytes()).map_err(|_| refused())?;
        let (mac, body) = signed.split_at_checked(MAC_LENGTH).ok_or_else(refused)?;
        if !self.keys.is_asserted(body, mac) {
            return Err(refused());
        }
        let assertion = Sealed::decode(Bytes::from(signed).slice(MAC_LENGTH..)).map_err(|_| refused())?;
        let age_ms = self.clock.now_ms().saturating_sub(assertion.issued_at_ms);
        // Clocks of two machines may differ by a little, in either direction.
        if assertion.rpc != rpc.as_bytes() || age_ms.abs() > LIFETIME_MS {
            return Err(refused());
        }
        let principal = if let Some(principal) = self.known.get(&assertion.principal) {
            principal
        } else {
            let principal = Principal::decode(assertion.principal.clone()).map(Arc::new).map_err(|_| refused())?;
            // A copy of its own: the slice would keep the whole assertion.
            let bytes = Bytes::copy_from_slice(&assertion.principal);
            self.known.insert(bytes, Arc::clone(&principal));
            principal
        };
        let once = assertion.once.map(|once| Once::new(once).map(Arc::new).ok_or_else(refused)).transpose()?;
        Ok(Caller { principal, request_id: assertion.request_id, once })
    }
}

/// The verified caller of a method, as its handler finds it among the request's extensions.
#[derive(Clone, Debug)]
pub struct Caller {
    /// Who calls.
    pub principal: Arc<Principal>,
    /// The request that the call serves.
    pub request_id: String,
    /// What tells a repetition of the call, where the caller has asked for it to take effect once.
    pub once: Option<Arc<Once>>,
}

/// The principal of a call that nobody in particular makes.
pub fn nobody() -> Arc<Principal> {
    static NOBODY: LazyLock<Arc<Principal>> =
        LazyLock::new(|| Arc::new(Principal { kind: Kind::Anyone.into(), ..Principal::default() }));
    Arc::clone(&NOBODY)
}

/// The team and mode whose data a call may touch. Stores open by it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Tenant {
    /// The team.
    pub team_id: String,
    /// The mode.
    pub mode: Mode,
}

impl Caller {
    /// The caller of a request. The policy layer has put it there; without it there is no call.
    pub fn of<T>(request: &tonic::Request<T>) -> Result<Self, Error> {
        request.extensions().get::<Self>().cloned().ok_or_else(Error::unauthenticated)
    }

    /// Whose data the caller may touch.
    pub fn tenant(&self) -> Result<Tenant, Error> {
        let principal = &self.principal;
        if principal.team_id.is_empty() || principal.mode() == Mode::Unspecified {
            return Err(Error::not_found("team"));
        }
        Ok(Tenant { team_id: principal.team_id.clone(), mode: principal.mode() })
    }

    /// The one product that the credential is bound to, if it is.
    pub fn product_id(&self) -> Option<&str> {
        Some(self.principal.product_id.as_str()).filter(|id| !id.is_empty())
    }

    /// Refuses a team that is not the caller's, as if there were none. A request need not name it.
    pub fn must_be_of_team(&self, team_id: &str) -> Result<(), Error> {
        if team_id.is_empty() || team_id == self.principal.team_id { Ok(()) } else { Err(Error::not_found("team")) }
    }

    /// Refuses a product that the credential is not bound to, as if there were none.
    pub fn must_reach_product(&self, product_id: &str) -> Result<(), Error> {
        match self.product_id() {
            Some(bound) if bound != product_id => Err(Error::not_found("product")),
            _ => Ok(()),
        }
    }
}

impl Tenant {
    /// The mode as it is stored: `live` or `test`.
    pub fn mode_word(&self) -> &'static str {
        mode_word(self.mode)
    }
}

/// A mode as it is stored and shown.
pub fn mode_word(mode: Mode) -> &'static str {
    match mode {
        Mode::Test => "test",
        Mode::Live | Mode::Unspecified => "live",
    }
}

/// A mode by its word.
pub fn mode_of(word: &str) -> Option<Mode> {
    match word {
        "live" => Some(Mode::Live),
        "test" => Some(Mode::Test),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use paperkey_proto::principal::v1::Assertion;

    use super::*;

    const RPC: &str = "/paperkey.catalog.v1.CatalogService/GetProduct";

    #[test]
    fn an_assertion_is_good_for_its_rpc_and_for_five_seconds() {
        let (clock, hand) = Clock::manual(1_790_000_000_000);
        let signer = Signer::new(&Keyring::for_tests(), clock);
        let principal = Principal { id: "usr_1".into(), ..Principal::default() };
        let header = signer.sign(Some(&principal), RPC, "req_1");
        let caller = signer.verify(&header, RPC).unwrap();
        assert_eq!((caller.principal.id.as_str(), caller.request_id.as_str()), ("usr_1", "req_1"));
        assert!(signer.verify(&header, "/paperkey.catalog.v1.CatalogService/DeleteProduct").is_err());
        hand.advance_ms(5_001);
        assert!(signer.verify(&header, RPC).is_err());
    }

    #[test]
    fn what_is_signed_is_an_assertion_of_the_contract() {
        let signer = Signer::new(&Keyring::for_tests(), Clock::manual(7).0);
        let principal = Principal { id: "usr_1".into(), ..Principal::default() };
        let signed = BASE64.decode(signer.sign(Some(&principal), RPC, "req_1").as_bytes()).unwrap();
        let expected = Assertion {
            principal: Some(principal),
            rpc: RPC.into(),
            request_id: "req_1".into(),
            issued_at_ms: 7,
            once: None,
        };
        assert_eq!(Assertion::decode(&signed[MAC_LENGTH..]).unwrap(), expected);
    }

    #[test]
    fn what_is_to_happen_once_is_signed_with_the_rest_and_not_printed() {
        let signer = Signer::new(&Keyring::for_tests(), Clock::manual(7).0);
        let token = Token { id: vec![1; 32], request_hash: vec![2; 32], seal_key: vec![203; 32] };
        let once = Once::new(token.clone()).map(Arc::new);
        let caller = Caller { principal: nobody(), request_id: "req_1".into(), once };
        let header = signer.sign_as(&caller, RPC);
        let heard = signer.verify(&header, RPC).unwrap();
        assert_eq!(heard.once.as_ref().map(|once| once.token()), Some(&token));
        let signed = BASE64.decode(header.as_bytes()).unwrap();
        assert_eq!(Assertion::decode(&signed[MAC_LENGTH..]).unwrap().once, Some(token.clone()));
        for printed in [format!("{heard:?}"), format!("{token:?}"), format!("{header:?}")] {
            assert!(!printed.contains("203"), "{printed}");
        }
        assert!(Once::new(Token { seal_key: vec![3; 31], ..token }).is_none());
    }

    #[test]
    fn an_assertion_with_any_changed_byte_is_refused() {
        let signer = Signer::new(&Keyring::for_tests(), Clock::manual(0).0);
        let header = signer.sign(None, RPC, "req_1");
        for at in 0..header.len() {
            let mut bytes = header.as_bytes().to_vec();
            bytes[at] = if bytes[at] == b'A' { b'B' } else { b'A' };
            // The last character holds spare bits: a change there may decode to the same bytes, or to none.
            let same = BASE64.decode(&bytes).ok() == BASE64.decode(header.as_bytes()).ok();
            let verdict = signer.verify(&HeaderValue::from_bytes(&bytes).unwrap(), RPC);
            assert!(same || verdict.is_err(), "changed at {at}");
        }
        assert!(signer.verify(&HeaderValue::from_static(""), RPC).is_err());
    }
}
