//! What the contract's comments say of its parts.

use std::collections::HashMap;

use prost_reflect::DescriptorPool;

/// The comments, by file and by the path of what they stand above.
#[derive(Debug)]
pub(super) struct Comments(HashMap<String, HashMap<Vec<i32>, String>>);

impl Comments {
    pub(super) fn read(pool: &DescriptorPool) -> Self {
        let of_file = |file: prost_reflect::FileDescriptor| {
            let source = file.file_descriptor_proto().source_code_info.as_ref();
            let locations = source.into_iter().flat_map(|source| &source.location);
            let comments = locations
                .filter_map(|location| Some((location.path.clone(), paragraphs(location.leading_comments.as_deref()?))))
                .collect();
            (file.name().to_owned(), comments)
        };
        Self(pool.files().filter(|file| file.name().starts_with("paperkey/")).map(of_file).collect())
    }

    /// What stands above a part of a file.
    pub(super) fn above(&self, file: &str, path: &[i32]) -> Option<&str> {
        self.0.get(file)?.get(path).map(String::as_str).filter(|text| !text.is_empty())
    }
}

/// A comment as text: lines belong together up to an empty one.
fn paragraphs(comment: &str) -> String {
    let mut out = String::with_capacity(comment.len());
    for line in comment.lines().map(str::trim) {
        if line.is_empty() {
            out.push_str("\n\n");
        } else {
            if !out.is_empty() && !out.ends_with('\n') {
                out.push(' ');
            }
            out.push_str(line);
        }
    }
    out.trim().to_owned()
}

/// The first sentence, without its full stop.
pub(super) fn first_sentence(text: &str) -> &str {
    let first = text.split("\n\n").next().unwrap_or_default();
    let end = first.find(". ").unwrap_or(first.len());
    first[..end].trim_end_matches('.')
}

#[cfg(test)]
mod tests {
    use paperkey_proto::contract::pool;

    use super::*;

    #[test]
    fn a_comment_is_found_above_its_method_and_read_in_paragraphs() {
        let comments = Comments::read(pool());
        let service = pool().get_service_by_name("paperkey.licensing.v1.LicensingService").unwrap();
        let method = service.methods().find(|method| method.name() == "GetLicense").unwrap();
        let said = comments.above(service.parent_file().name(), method.path());
        assert_eq!(said, Some("Answers one licence with its 100 most recent activations."));
        assert_eq!(paragraphs(" One\n line.\n\n Another.\n"), "One line.\n\nAnother.");
        assert_eq!(first_sentence("One line, of v1.2. And more."), "One line, of v1.2");
        assert_eq!(first_sentence("One.\n\nTwo"), "One");
    }
}
