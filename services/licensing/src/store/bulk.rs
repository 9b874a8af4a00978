//! Licences that are issued by the hundred.
//!
//! What many licences need of one transaction is asked in a few statements: their products and clients are locked in
//! the order of their ids, the rows go in by some hundred at a time in the order of their keys, so that two imports of
//! the same file wait for each other and never for ever.

use std::collections::{BTreeSet, HashMap, HashSet};

use paperkey_kit::{
    db::{DbError, Tx},
    ids::new_id,
};
use sea_orm::Value;

use super::{
    Act, Failure, ROWS, TenantStore, all_rows,
    clients::lock_clients,
    insert_rows,
    licenses::{Model, license_of},
    lookups::key_subject,
    products::lock_products,
};
use crate::domain::{
    Fault, at_place,
    event::LICENSE_CREATED,
    license::{Draft, License},
    license_key::LicenseKey,
    of_places,
};

/// Rounds of keys before giving up: the first leaves one out once in 2⁷⁵ over the number of licences.
const ROUNDS: usize = 4;
/// Licences that one audit entry names; with their products no more than an entry keeps.
const AN_ENTRY: usize = 100;

const INTO: &str = "licenses (id, team_id, mode, product_id, key_hash, key_sealed, email, email_lower, client_id, \
                    max_activations, activations_count, expires_at_ms, expired_event_at_ms, metadata, created_at_ms, \
                    updated_at_ms, revoked_at_ms)";

/// What became of a line of an import.
#[derive(Clone, Debug, PartialEq)]
pub enum Imported {
    /// It is a licence now.
    Created(License),
    /// The product has a licence of that key, which is left as it is.
    Exists {
        /// `lic_…`
        id: String,
        /// Its key.
        key: LicenseKey,
    },
    /// It may not be.
    Refused(Fault),
}

/// One licence on its way.
struct Candidate {
    place: usize,
    draft: Draft,
    key: LicenseKey,
    key_hash: [u8; 32],
}

impl TenantStore {
    /// Issues licences for products that were found to exist: all of them, or none. A fault is named by its place.
    pub async fn create_all(&self, drafts: Vec<Draft>, act: Act) -> Result<Vec<License>, Failure> {
        let this = self.clone();
        self.parts()
            .database
            .write(move |tx| async move {
                let mut licenses = Vec::with_capacity(drafts.len());
                let mut faults = Vec::new();
                for (place, outcome) in this.issue(&tx, drafts).await?.into_iter().enumerate() {
                    match outcome {
                        Imported::Created(license) => licenses.push(license),
                        Imported::Exists { .. } => faults.extend(placed(place, Fault::KeyInUse)),
                        Imported::Refused(fault) => faults.extend(placed(place, fault)),
                    }
                }
                if !faults.is_empty() {
                    return Err(Failure::Invalid(of_places(faults)));
                }
                this.tell_all(&tx, licenses.iter(), &act);
                act.answer(&tx, &licenses)?;
                Ok(licenses)
            })
            .await
    }

    /// Issues those of the licences that may be, and says what became of each.
    pub async fn import(&self, drafts: Vec<Draft>, act: Act) -> Result<Vec<Imported>, Failure> {
        let this = self.clone();
        self.parts()
            .database
            .write(move |tx| async move {
                let outcomes = this.issue(&tx, drafts).await?;
                let created = outcomes.iter().filter_map(|outcome| match outcome {
                    Imported::Created(license) => Some(license),
                    _ => None,
                });
                this.tell_all(&tx, created, &act);
                Ok(outcomes)
            })
            .await
    }

    async fn issue(&self, tx: &Tx, drafts: Vec<Draft>) -> Result<Vec<Imported>, Failure> {
        let mut outcomes: Vec<Option<Imported>> = drafts.iter().map(|_| None).collect();
        let ids = drafts.iter().map(|draft| draft.product_id.as_str()).collect();
        let products = lock_products(tx, &self.tenant, &ids).await?;
        let ids: BTreeSet<_> = drafts.iter().filter_map(|draft| draft.terms.client_id.as_deref()).collect();
        let clients = lock_clients(tx, &self.tenant, &ids).await?;

        let mut waiting = Vec::with_capacity(drafts.len());
        for (place, draft) in drafts.into_iter().enumerate() {
            let has_client = draft.terms.client_id.as_ref().is_none_or(|id| clients.contains(id));
            if !products.contains(&draft.product_id) {
                outcomes[place] = Some(Imported::Refused(Fault::NoSuchProduct));
            } else if !has_client {
                outcomes[place] = Some(Imported::Refused(Fault::NoSuchClient));
            } else {
                let key = draft.key.clone().unwrap_or_else(LicenseKey::random);
                waiting.push(self.candidate(place, draft, key));
            }
        }
        for _ in 0..ROUNDS {
            if waiting.is_empty() {
                break;
            }
            waiting = self.round(tx, waiting, &mut outcomes).await?;
        }
        if !waiting.is_empty() {
            return Err(DbError::Internal("no new license key is free".to_owned()).into());
        }
        Ok(outcomes.into_iter().flatten().collect())
    }

    fn candidate(&self, place: usize, draft: Draft, key: LicenseKey) -> Candidate {
        let key_hash = self.parts().vault.hash(&key);
        Candidate { place, draft, key, key_hash }
    }

    /// Inserts what waits, and returns what must be tried again.
    async fn round(
        &self,
        tx: &Tx,
        mut waiting: Vec<Candidate>,
        outcomes: &mut [Option<Imported>],
    ) -> Result<Vec<Candidate>, Failure> {
        let (parts, now_ms) = (self.parts(), self.store.now_ms());
        // Of several lines with one key the first comes first.
        waiting.sort_by_key(|candidate| (candidate.key_hash, candidate.place));
        let models: Vec<Model> = waiting.iter().map(|candidate| self.model(candidate, now_ms)).collect();
        let rows = models.iter().cloned().map(values_of).collect();
        let returned = insert_rows(tx, INTO, "ON CONFLICT (key_hash) DO NOTHING RETURNING id", rows).await?;
        let mut written = HashSet::with_capacity(returned.len());
        for row in returned {
            written.insert(row.try_get::<String>("", "id")?);
        }

        let mut subjects = Vec::with_capacity(written.len());
        let mut again = Vec::new();
        let mut given = Vec::new();
        for (candidate, model) in waiting.into_iter().zip(models) {
            if written.contains(&model.id) {
                subjects.push(key_subject(&model.key_hash));
                outcomes[candidate.place] = Some(Imported::Created(license_of(model, &parts.vault)));
            } else if candidate.draft.key.is_some() {
                given.push(candidate);
            } else {
                again.push(self.candidate(candidate.place, candidate.draft, LicenseKey::random()));
            }
        }
        self.store.announce(tx, subjects);

        let owners = owners(tx, &given).await?;
        for candidate in given {
            match owners.get(candidate.key_hash.as_slice()) {
                // Whoever had it is gone.
                None => again.push(candidate),
                Some(owner) if self.is_of(owner, &candidate.draft.product_id) => {
                    let exists = Imported::Exists { id: owner.id.clone(), key: candidate.key };
                    outcomes[candidate.place] = Some(exists);
                }
                Some(_) => outcomes[candidate.place] = Some(Imported::Refused(Fault::KeyInUse)),
            }
        }
        Ok(again)
    }

    fn model(&self, candidate: &Candidate, now_ms: i64) -> Model {
        let parts = self.parts();
        let id = new_id("lic", &parts.clock);
        let terms = &candidate.draft.terms;
        Model {
            team_id: self.tenant.team_id.clone(),
            mode: self.tenant.mode_word().to_owned(),
            product_id: candidate.draft.product_id.clone(),
            key_hash: candidate.key_hash.to_vec(),
            key_sealed: parts.vault.seal(&id, &candidate.key),
            email_lower: terms.email.as_deref().map(str::to_lowercase),
            email: terms.email.clone(),
            client_id: terms.client_id.clone(),
            max_activations: terms.max_activations,
            activations_count: 0,
            expires_at_ms: terms.expires_at_ms,
            expired_event_at_ms: None,
            metadata: terms.metadata.as_ref().map(ToString::to_string),
            created_at_ms: now_ms,
            updated_at_ms: now_ms,
            revoked_at_ms: candidate.draft.revoked_at_ms,
            id,
        }
    }

    fn is_of(&self, owner: &Owner, product_id: &str) -> bool {
        owner.team_id == self.tenant.team_id && owner.mode == self.tenant.mode_word() && owner.product_id == product_id
    }

    /// Records the events of new licences, and who made them.
    fn tell_all<'a>(&self, tx: &Tx, licenses: impl Iterator<Item = &'a License>, act: &Act) {
        let licenses: Vec<_> = licenses.collect();
        for some in licenses.chunks(AN_ENTRY) {
            let products: BTreeSet<_> = some.iter().map(|license| license.product_id.as_str()).collect();
            let resources = products.into_iter().chain(some.iter().map(|license| license.id.as_str()));
            tx.audit(act.on(resources.map(ToOwned::to_owned).collect()));
        }
        for license in licenses {
            self.tell(tx, LICENSE_CREATED, license);
        }
    }
}

/// Whose a key is.
struct Owner {
    id: String,
    team_id: String,
    mode: String,
    product_id: String,
}

async fn owners(tx: &Tx, candidates: &[Candidate]) -> Result<HashMap<Vec<u8>, Owner>, Failure> {
    let mut owners = HashMap::new();
    for some in candidates.chunks(ROWS) {
        let places: Vec<_> = (1..=some.len()).map(|number| format!("${number}")).collect();
        let sql = format!(
            "SELECT id, key_hash, team_id, mode, product_id FROM licenses WHERE key_hash IN ({})",
            places.join(", ")
        );
        let values = some.iter().map(|candidate| candidate.key_hash.to_vec().into()).collect();
        for row in all_rows(tx, sql, values).await? {
            let owner = Owner {
                id: row.try_get("", "id")?,
                team_id: row.try_get("", "team_id")?,
                mode: row.try_get("", "mode")?,
                product_id: row.try_get("", "product_id")?,
            };
            owners.insert(row.try_get("", "key_hash")?, owner);
        }
    }
    Ok(owners)
}

fn placed(place: usize, fault: Fault) -> Vec<(String, String)> {
    match fault {
        Fault::NoSuchProduct => vec![(format!("licenses[{place}].product_id"), "must be the id of a product".into())],
        fault => at_place(place, &fault.into()),
    }
}

/// In the order of [`INTO`].
fn values_of(row: Model) -> Vec<Value> {
    vec![
        row.id.into(),
        row.team_id.into(),
        row.mode.into(),
        row.product_id.into(),
        row.key_hash.into(),
        row.key_sealed.into(),
        row.email.into(),
        row.email_lower.into(),
        row.client_id.into(),
        row.max_activations.into(),
        row.activations_count.into(),
        row.expires_at_ms.into(),
        row.expired_event_at_ms.into(),
        row.metadata.into(),
        row.created_at_ms.into(),
        row.updated_at_ms.into(),
        row.revoked_at_ms.into(),
    ]
}
