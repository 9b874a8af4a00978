//! Kept keys: those of hashes that outlive a change of the master key.
//!
//! Licences are looked up by a keyed hash, and the audit log is chained by another. Neither is hashed anew, so their keys
//! are what the master key derived when they were first kept, and stay that. They lie in the database of the service that
//! needs them, sealed as everything else is.

use sea_orm::{ConnectionTrait as _, Statement};

use super::{KeptKey, KeyedHash, Keyring, Purpose, key_named};
use crate::db::{Database, DbError};

/// Why a kept key is not to be had.
#[derive(Debug, thiserror::Error)]
pub enum KeptKeyError {
    /// The database failed.
    #[error(transparent)]
    Database(#[from] DbError),
    /// It is sealed under a master key that nobody has given.
    #[error(
        "the key {name} in the database is sealed under {under}, which is not known here: \
         give that key in secrets.master_key or secrets.previous_master_keys, or restore the folder of the keys"
    )]
    Sealed {
        /// What it is called.
        name: &'static str,
        /// Which master key, if it says so.
        under: String,
    },
    /// Which of several master keys it must be derived from cannot be known.
    #[error(
        "the key {0} is not kept in the database yet: start once with the master key that was used so far, and \
         without secrets.previous_master_keys; then change it"
    )]
    Undecided(&'static str),
}

impl Keyring {
    /// The same keys, with those that the database of a service keeps; where it keeps none yet, they are made.
    pub async fn with_kept(mut self, database: &Database, service: &str) -> Result<Self, KeptKeyError> {
        for &kept in KeptKey::of(service) {
            let sealed = match find(database, kept).await? {
                Some(sealed) => sealed,
                None => self.keep(database, kept).await?,
            };
            let opened = self.sealer(Purpose::KeptKey).open(kept.name(), &sealed);
            let key = opened.map_err(|_| KeptKeyError::Sealed {
                name: kept.name(),
                under: key_named(&sealed)
                    .map_or_else(|| "another master key".to_owned(), |id| format!("the master key {id}")),
            })?;
            self.kept[kept as usize] = Some(KeyedHash::new(&key));
        }
        Ok(self)
    }

    /// Hashes under a kept key.
    ///
    /// # Panics
    ///
    /// If it was not brought in ([`Self::with_kept`]), which is a fault of whoever puts a service together.
    pub fn kept(&self, kept: KeptKey) -> KeyedHash {
        self.kept[kept as usize].clone().expect("kept keys are brought in before a store is made that needs them")
    }

    /// Of several processes that start for the first time, all get the one that was first.
    async fn keep(&self, database: &Database, kept: KeptKey) -> Result<Vec<u8>, KeptKeyError> {
        let masters = self.source.masters();
        // What was hashed so far was hashed under one of them, and nothing says which.
        if !masters.others.is_empty() && is_used(database, kept).await? {
            return Err(KeptKeyError::Undecided(kept.name()));
        }
        let key = masters.current.derive(kept.name());
        let sealed = self.sealer(Purpose::KeptKey).seal(kept.name(), &key);
        database
            .write(move |tx| async move {
                let sql = "INSERT INTO kept_keys (name, sealed) VALUES ($1, $2) ON CONFLICT (name) DO NOTHING";
                let values = [kept.name().into(), sealed.into()];
                tx.execute_raw(Statement::from_sql_and_values(tx.get_database_backend(), sql, values)).await?;
                Ok::<_, DbError>(())
            })
            .await?;
        Ok(find(database, kept).await?.ok_or(DbError::NotFound)?)
    }
}

async fn find(database: &Database, kept: KeptKey) -> Result<Option<Vec<u8>>, DbError> {
    database
        .read(move |reader| async move {
            let sql = "SELECT sealed FROM kept_keys WHERE name = $1";
            let statement = Statement::from_sql_and_values(reader.get_database_backend(), sql, [kept.name().into()]);
            let row = reader.query_one_raw(statement).await?;
            Ok(row.map(|row| row.try_get::<Vec<u8>>("", "sealed")).transpose()?)
        })
        .await
}

async fn is_used(database: &Database, kept: KeptKey) -> Result<bool, DbError> {
    database
        .read(move |reader| async move {
            let sql = format!("SELECT 1 AS used FROM {} LIMIT 1", kept.used_in());
            let statement = Statement::from_string(reader.get_database_backend(), sql);
            Ok(reader.query_one_raw(statement).await?.is_some())
        })
        .await
}
