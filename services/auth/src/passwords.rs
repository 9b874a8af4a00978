//! Passwords: Argon2id, as much of it at a time as the machine can bear.
//!
//! One hash takes 19 MiB and a few hundredths of a second of a core, which makes signing in the cheapest way to
//! exhaust a server. So few are computed at a time, few wait, and the rest are told to come back.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use argon2::{Algorithm, Argon2, Params, PasswordHasher as _, PasswordVerifier as _, Version, password_hash};
use paperkey_kit::secrets::Secret;
use paperkey_proto::Error;
use tokio::sync::Semaphore;

/// OWASP's recommendation: memory in KiB, passes, lanes.
const MEMORY_KIB: u32 = 19_456;
const PASSES: u32 = 2;
const LANES: u32 = 1;

/// How many are computed at a time.
const RUNNING: usize = 2;
/// How many are computed or wait.
const ADMITTED: usize = 64;
/// When those who found no place may try again.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// The hash that no password has. Whoever names an unknown account is measured against it.
const NOBODY: &str = "$argon2id$v=19$m=19456,t=2,p=1$cGFwZXJrZXkvbm9ib2R5$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";

/// Hashes and verifies.
pub(crate) struct Passwords {
    admitted: Arc<Semaphore>,
    running: Arc<Semaphore>,
    computed: Arc<AtomicU64>,
}

impl Default for Passwords {
    fn default() -> Self {
        Self {
            admitted: Arc::new(Semaphore::new(ADMITTED)),
            running: Arc::new(Semaphore::new(RUNNING)),
            computed: Arc::default(),
        }
    }
}

impl Passwords {
    /// The hash to be stored for a password.
    pub(crate) async fn hash(&self, password: Secret) -> Result<String, Error> {
        self.compute(move |argon| argon.hash_password(password.expose().as_bytes()).map(|hash| hash.to_string()))
            .await?
            .map_err(Error::internal)
    }

    /// Whether it is the password of that hash. Takes as long where there is no hash.
    pub(crate) async fn verify(&self, password: Secret, hash: Option<String>) -> Result<bool, Error> {
        let verdict = self
            .compute(move |argon| {
                argon.verify_password(password.expose().as_bytes(), hash.as_deref().unwrap_or(NOBODY))
            })
            .await?;
        match verdict {
            Ok(()) => Ok(true),
            Err(password_hash::Error::PasswordInvalid) => Ok(false),
            Err(error) => Err(Error::internal(error)),
        }
    }

    /// How many times a hash was computed.
    #[cfg(test)]
    pub(crate) fn computed(&self) -> u64 {
        self.computed.load(Ordering::SeqCst)
    }

    async fn compute<T: Send + 'static>(
        &self,
        job: impl FnOnce(&Argon2<'_>) -> T + Send + 'static,
    ) -> Result<T, Error> {
        let place = Arc::clone(&self.admitted)
            .try_acquire_owned()
            .map_err(|_| Error::unavailable("too many passwords wait to be hashed").with_retry_after(RETRY_AFTER))?;
        let turn = Arc::clone(&self.running).acquire_owned().await.map_err(Error::internal)?;
        let computed = Arc::clone(&self.computed);
        let params = Params::new(MEMORY_KIB, PASSES, LANES, None).map_err(Error::internal)?;
        tokio::task::spawn_blocking(move || {
            // Held by the work itself: a caller who goes away does not end it.
            let _held = (place, turn);
            computed.fetch_add(1, Ordering::SeqCst);
            job(&Argon2::new(Algorithm::Argon2id, Version::V0x13, params))
        })
        .await
        .map_err(Error::internal)
    }
}

impl fmt::Debug for Passwords {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Passwords").field("computed", &self.computed).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use paperkey_proto::errors::v1::Reason;

    use super::*;

    #[tokio::test]
    async fn a_password_fits_its_own_hash_only() {
        let passwords = Passwords::default();
        let hash = passwords.hash(Secret::new("correct horse")).await.unwrap();
        assert!(hash.starts_with("$argon2id$v=19$m=19456,t=2,p=1$"), "{hash}");
        assert!(passwords.verify(Secret::new("correct horse"), Some(hash.clone())).await.unwrap());
        assert!(!passwords.verify(Secret::new("Correct horse"), Some(hash)).await.unwrap());
    }

    #[tokio::test]
    async fn nobody_has_a_password_but_is_hashed_for_all_the_same() {
        let passwords = Passwords::default();
        for guess in ["", "nobody", "\u{0}"] {
            assert!(!passwords.verify(Secret::new(guess), None).await.unwrap());
        }
        assert_eq!(passwords.computed(), 3);
    }

    #[tokio::test]
    async fn a_damaged_hash_is_an_error_of_ours_and_not_a_wrong_password() {
        let error = Passwords::default().verify(Secret::new("x"), Some("damaged".into())).await.unwrap_err();
        assert_eq!(error.reason(), Reason::Internal);
    }

    #[tokio::test]
    async fn who_finds_no_place_is_told_to_come_back() {
        let passwords = Passwords::default();
        let all = Arc::clone(&passwords.admitted).try_acquire_many_owned(u32::try_from(ADMITTED).unwrap()).unwrap();
        let error = passwords.hash(Secret::new("correct horse")).await.unwrap_err();
        assert_eq!((error.reason(), error.retry_after()), (Reason::Unavailable, Some(RETRY_AFTER)));
        assert_eq!(passwords.computed(), 0);
        drop(all);
        assert!(passwords.hash(Secret::new("correct horse")).await.is_ok());
    }
}
