//! `BatchCreateLicenses`: many licences, all of them or none.

use paperkey_proto::{
    Error,
    licensing::v1::{BatchCreateLicensesRequest, CreateLicenseRequest},
};
use prost_types::{Struct, Value, value::Kind};

use super::{catalog::Known, licenses::terms};
use crate::domain::{Fault, at_place, license::Draft, of_places};

/// The longest answer: what a caller reads, with room for what stands around it.
const MAX_ANSWER_BYTES: usize = 4_000_000;
/// What a licence takes in it at least, its texts and its metadata aside.
const LICENSE_BYTES: usize = 200;

/// What is to be issued. All faults are named, each by its place.
pub(super) fn drafts(request: BatchCreateLicensesRequest) -> Result<Vec<Draft>, Error> {
    let answer: usize = request.licenses.iter().map(room).sum();
    if answer > MAX_ANSWER_BYTES {
        // Found out after the licences were made, it would be an answer that nobody can read.
        return Err(Error::field("licenses", "take more than 4 MB with their metadata: issue fewer at once"));
    }
    let mut drafts = Vec::with_capacity(request.licenses.len());
    let mut faults = Vec::new();
    for (place, request) in request.licenses.into_iter().enumerate() {
        let product_id = request.product_id.clone();
        match terms(request) {
            Ok(terms) => drafts.push(Draft { product_id, terms, key: None, revoked_at_ms: None }),
            Err(error) => faults.extend(at_place(place, &error)),
        }
    }
    if faults.is_empty() { Ok(drafts) } else { Err(of_places(faults)) }
}

/// Refuses what names a product or a client that catalog has not.
pub(super) fn must_have_all(known: &Known, drafts: &[Draft]) -> Result<(), Error> {
    let mut faults = Vec::new();
    for (place, draft) in drafts.iter().enumerate() {
        match known.missing(draft) {
            None => {}
            Some(Fault::NoSuchProduct) => {
                faults.push((format!("licenses[{place}].product_id"), "must be the id of a product".to_owned()));
            }
            Some(fault) => faults.extend(at_place(place, &fault.into())),
        }
    }
    if faults.is_empty() { Ok(()) } else { Err(of_places(faults)) }
}

/// How many bytes a licence takes in the answer at most.
fn room(request: &CreateLicenseRequest) -> usize {
    let text = |text: &Option<String>| text.as_ref().map_or(0, String::len);
    let metadata = request.metadata.as_ref().map_or(0, room_of_object);
    LICENSE_BYTES + request.product_id.len() + text(&request.email) + text(&request.client_id) + metadata
}

/// What stands around a value: two tags, a length, and what is in place of a length in one that has none.
const AROUND: usize = 14;

fn room_of_object(object: &Struct) -> usize {
    object.fields.iter().map(|(name, value)| AROUND + name.len() + room_of_value(value)).sum()
}

fn room_of_value(value: &Value) -> usize {
    AROUND
        + match &value.kind {
            Some(Kind::StringValue(text)) => text.len(),
            Some(Kind::ListValue(list)) => list.values.iter().map(room_of_value).sum(),
            Some(Kind::StructValue(object)) => room_of_object(object),
            _ => 0,
        }
}
