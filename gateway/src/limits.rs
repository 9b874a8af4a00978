//! Which limits a call counts against, and what its caller is told of them.
//!
//! The classes come from the contract and the numbers from the configuration: of the tier, the team and the key, of the
//! address and of the licence. Counting itself is the kit's.
//!
//! A key counts by itself wherever keys are known; everybody else counts by address. A credential that is refused counts
//! by address in a class of its own, whatever is wrong with it, and its answer tells of no other limit.

use std::{fmt::Write as _, net::IpAddr, sync::Arc, time::Duration};

use arrayvec::ArrayVec;
use http::{HeaderName, HeaderValue};
use paperkey_kit::{
    clock::Clock,
    config::{
        Limits as Numbers, Tiers,
        limits::{ClassLimit, FIRST_TIER, REFUSED_CREDENTIALS},
    },
    limits::{Claim, Limiter, MAX_CLAIMS, Refused, Standing, Standings, Subjects, Verdict},
};
use paperkey_proto::{
    Contract, Error,
    errors::v1::Reason,
    options::v1::{Caller, RateClass},
    principal::v1::Principal,
};

use crate::{
    GatewayError,
    call::Told,
    figures::{self, Decision},
};

const LIMIT: HeaderName = HeaderName::from_static("x-ratelimit-limit");
const REMAINING: HeaderName = HeaderName::from_static("x-ratelimit-remaining");
const RESET: HeaderName = HeaderName::from_static("x-ratelimit-reset");
const POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");
const STANDING: HeaderName = HeaderName::from_static("ratelimit");

/// The claims of one call.
pub(crate) type Claims = ArrayVec<Claim, MAX_CLAIMS>;

/// Counts calls by class.
#[derive(Clone)]
pub(crate) struct Limits {
    limiter: Arc<Limiter>,
    subjects: Subjects,
    tiers: Arc<Tiers>,
    clock: Clock,
    /// By number of the class.
    classes: Vec<Option<(&'static str, ClassLimit)>>,
    refused: ClassLimit,
}

impl Limits {
    /// The limits of all classes of the contract. A class without a number is no class without a limit.
    pub(crate) fn new(
        limiter: Arc<Limiter>,
        subjects: Subjects,
        numbers: &Numbers,
        tiers: Arc<Tiers>,
        clock: Clock,
    ) -> Result<Self, GatewayError> {
        let missing = |word: &str| GatewayError::Limit(word.to_owned());
        let mut classes = Vec::new();
        for (class, options) in Contract::get().rate_classes() {
            let limit = numbers.class(&options.word).ok_or_else(|| missing(&options.word))?;
            let at = class as usize;
            if classes.len() <= at {
                classes.resize(at + 1, None);
            }
            classes[at] = Some((options.word.as_str(), limit));
        }
        let refused = numbers.class(REFUSED_CREDENTIALS).ok_or_else(|| missing(REFUSED_CREDENTIALS))?;
        Ok(Self { limiter, subjects, tiers, clock, classes, refused })
    }

    /// What a call of these classes claims. `field` is what the licence is named by, where that is known.
    pub(crate) fn claims(
        &self,
        classes: &[RateClass],
        principal: Option<&Principal>,
        client: IpAddr,
        field: Option<&[u8]>,
    ) -> Claims {
        let mut claims = Claims::new();
        let key = principal.filter(|principal| counts_by_itself(principal.kind()));
        for class in classes {
            let Some((word, limit)) = self.classes.get(*class as usize).copied().flatten() else { continue };
            let claim = match class {
                RateClass::Unspecified => None,
                RateClass::PerKey => key.map(|key| self.of_key(key)),
                // A key is limited by itself where the method says so: many may share an address.
                RateClass::PerIp if key.is_some() && classes.contains(&RateClass::PerKey) => None,
                RateClass::PerIp | RateClass::Auth | RateClass::TestKey => Some(self.of_address(word, limit, client)),
                RateClass::LicenseValidate | RateClass::LicenseActivate => field.map(|field| {
                    let product = principal.map_or("", |principal| principal.product_id.as_str());
                    self.of_license(word, limit, product, field)
                }),
            };
            // More than fit are a fault of the contract, which a test finds.
            claims.extend(claim.into_iter().take(claims.remaining_capacity()));
        }
        claims
    }

    /// What a call claims that reaches no method, or whose caller is nobody.
    pub(crate) fn claims_of_stranger(&self, client: IpAddr) -> Claims {
        self.claims(&[RateClass::PerIp], None, client, None)
    }

    /// What a call claims whose credential was refused.
    pub(crate) fn claims_of_refused(&self, client: IpAddr) -> Claims {
        Claims::from_iter([self.of_address(REFUSED_CREDENTIALS, self.refused, client)])
    }

    /// What a key claims by itself: its own limit, and never more than its team has.
    pub(crate) fn of_key(&self, key: &Principal) -> Claim {
        let (word, class) = self.classes[RateClass::PerKey as usize].unwrap_or(("per_key", self.refused));
        let positive = |number: i32| u32::try_from(number).ok().filter(|number| *number > 0);
        let of_team = match key.kind() {
            Caller::SystemKey => class.requests,
            Caller::FreeKey => self.tiers.of_team(FIRST_TIER).requests_per_minute,
            _ => positive(key.team_requests_per_minute)
                .unwrap_or_else(|| self.tiers.of_team(&key.tier).requests_per_minute),
        };
        let requests = positive(key.requests_per_minute).map_or(of_team, |own| own.min(of_team)).max(1);
        // A tier counts by the minute; the class's own window is that of keys that have no tier.
        let window = if key.kind() == Caller::SystemKey { class.window() } else { Duration::from_mins(1) };
        // A rotation makes a new key, and no new limit.
        let first = if key.lineage.is_empty() { &key.id } else { &key.lineage };
        Claim {
            subject: self.subjects.of(word, first.as_bytes()),
            class: word,
            requests,
            window,
            on_store_failure: class.on_store_failure,
        }
    }

    fn of_address(&self, word: &'static str, limit: ClassLimit, client: IpAddr) -> Claim {
        let mut name = ArrayVec::<u8, 16>::new();
        match client.to_canonical() {
            IpAddr::V4(address) => name.extend(address.octets()),
            // One subscriber has a whole /64.
            IpAddr::V6(address) => name.extend(address.octets().into_iter().take(8)),
        }
        self.claim(word, limit, &name)
    }

    fn of_license(&self, word: &'static str, limit: ClassLimit, product: &str, key: &[u8]) -> Claim {
        let mut name = Vec::with_capacity(product.len() + 1 + key.len());
        name.extend_from_slice(product.as_bytes());
        name.push(0);
        // However it is written, it is one licence: as Crockford's base 32 is read, where O is 0, and I and L are 1.
        name.extend(key.iter().filter(|byte| byte.is_ascii_alphanumeric()).map(
            |byte| match byte.to_ascii_uppercase() {
                b'O' => b'0',
                b'I' | b'L' => b'1',
                byte => byte,
            },
        ));
        self.claim(word, limit, &name)
    }

    fn claim(&self, word: &'static str, limit: ClassLimit, name: &[u8]) -> Claim {
        Claim {
            subject: self.subjects.of(word, name),
            class: word,
            requests: limit.requests,
            window: limit.window(),
            on_store_failure: limit.on_store_failure,
        }
    }

    async fn judged(&self, claims: &[Claim]) -> Verdict {
        let verdict = self.limiter.check(claims).await;
        match &verdict {
            Verdict::Passed(_) => claims.iter().for_each(|claim| figures::decided(claim.class, Decision::Allowed)),
            Verdict::Refused(refused) => {
                let decision = if refused.store_is_gone { Decision::Closed } else { Decision::Refused };
                let class = refused.standings.get(refused.by).map(|standing| standing.class);
                // Where the store is gone, nothing says which of them is closed.
                if let Some(class) = class.or_else(|| claims.first().map(|claim| claim.class)) {
                    figures::decided(class, decision);
                }
            }
        }
        verdict
    }

    /// Counts a call, and tells its caller where it stands.
    pub(crate) async fn count(&self, claims: &[Claim], told: &mut Told) -> Result<(), Error> {
        match self.judged(claims).await {
            Verdict::Passed(receipt) => {
                self.tell(&receipt.standings, told);
                Ok(())
            }
            Verdict::Refused(refused) => {
                self.tell(&refused.standings, told);
                Err(refusal(&refused))
            }
        }
    }

    /// Whether where somebody stands is known here, without asking a store.
    pub(crate) fn is_known_here(&self) -> bool {
        matches!(&*self.limiter, Limiter::Memory(_))
    }

    /// Tells a caller where it stands, without counting the call.
    pub(crate) async fn look(&self, claims: &[Claim], told: &mut Told) {
        let mut standings = Standings::new();
        for claim in claims {
            standings.push(self.limiter.standing(claim).await);
        }
        self.tell(&standings, told);
    }

    /// Counts a call of a key that is verified for somebody else.
    pub(crate) async fn check(&self, claim: Claim) -> Verdict {
        self.judged(&[claim]).await
    }

    /// Where a key stands, without counting anything.
    pub(crate) async fn standing(&self, claim: &Claim) -> Standing {
        self.limiter.standing(claim).await
    }

    /// Takes back what was counted.
    pub(crate) async fn take_back(&self, receipt: &paperkey_kit::limits::Receipt) {
        self.limiter.take_back(receipt).await;
    }

    /// When the oldest counted call leaves the window, in milliseconds since 1970.
    pub(crate) fn resets_at_ms(&self, standing: &Standing) -> i64 {
        let until = i64::try_from(standing.resets_in.as_micros().div_ceil(1_000)).unwrap_or(i64::MAX);
        self.clock.now_ms().saturating_add(until)
    }

    fn tell(&self, standings: &[Standing], told: &mut Told) {
        // The tightest is the one with the least part left.
        let left = |standing: &Standing| {
            u64::from(standing.remaining) * u64::from(u32::MAX) / u64::from(standing.requests.max(1))
        };
        let Some(tightest) = standings.iter().min_by_key(|standing| left(standing)) else { return };
        let resets_at_ms = self.resets_at_ms(tightest);
        let reset = resets_at_ms.div_euclid(1_000) + i64::from(resets_at_ms % 1_000 > 0);
        told.tell(LIMIT, HeaderValue::from(tightest.requests));
        told.tell(REMAINING, HeaderValue::from(tightest.remaining));
        told.tell(RESET, HeaderValue::from(reset));
        let (mut policy, mut standing) = (String::with_capacity(64), String::with_capacity(64));
        for (index, it) in standings.iter().enumerate() {
            let comma = if index > 0 { ", " } else { "" };
            let (class, reset) = (it.class, it.resets_in.as_micros().div_ceil(1_000_000));
            // Writing to a String cannot fail.
            let _ = write!(policy, "{comma}\"{class}\";q={};w={}", it.requests, it.window.as_secs().max(1));
            let _ = write!(standing, "{comma}\"{class}\";r={};t={reset}", it.remaining);
        }
        for (name, text) in [(POLICY, policy), (STANDING, standing)] {
            if let Ok(value) = HeaderValue::from_maybe_shared(bytes::Bytes::from(text)) {
                told.tell(name, value);
            }
        }
    }
}

/// Whether a kind of caller is limited by its key, wherever it calls from.
fn counts_by_itself(kind: Caller) -> bool {
    matches!(kind, Caller::TeamKey | Caller::FreeKey | Caller::UserToken | Caller::SystemKey)
}

/// What a caller is told who made one call too many.
fn refusal(refused: &Refused) -> Error {
    if refused.store_is_gone {
        let error = Error::unavailable("the store of limits is gone, and this limit is closed without it");
        return error.with_retry_after(refused.retry_after.max(Duration::from_secs(1)));
    }
    let Some(standing) = refused.standings.get(refused.by) else { return Error::new(Reason::RateLimited) };
    let class = Contract::get().rate_classes().find(|(_, options)| options.word == standing.class);
    let reason = match class.map(|(class, _)| class) {
        Some(RateClass::Auth) => Reason::AuthRateLimited,
        Some(RateClass::LicenseValidate | RateClass::LicenseActivate) => Reason::LicenseRateLimited,
        _ => Reason::RateLimited,
    };
    let (limit, window) = (standing.requests, standing.window.as_secs().max(1));
    let error = Error::new(reason);
    let message = format!("{}: the limit is {limit} in {window} seconds", error.message());
    error
        .with_message(message)
        .with_quota_violation(standing.class, format!("{limit} calls in {window} seconds"))
        .with_retry_after(refused.retry_after)
}
