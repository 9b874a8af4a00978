//! What browsers are given: the dashboard under `app/`, and the viewer of the reference under `reference/`.
//!
//! The files are compressed when this crate is built and stand in the binary. Deliberately absent: how they are served,
//! which is the gateway's.

use std::{io::Read as _, sync::OnceLock};

use flate2::read::GzDecoder;

type Plain = OnceLock<Option<Box<[u8]>>>;

/// A file.
#[derive(Clone, Copy)]
pub struct Asset {
    /// Such as `app/index.html`.
    pub path: &'static str,
    /// Tells its contents from all others, in whatever encoding they are sent: a weak entity tag.
    pub tag: &'static str,
    /// Its contents, as gzip.
    pub gzip: &'static [u8],
    /// How long it is when it is not compressed.
    pub bytes: usize,
    /// Its contents as they are, once somebody has asked for them.
    plain: &'static Plain,
}

impl std::fmt::Debug for Asset {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Asset").field("path", &self.path).field("bytes", &self.bytes).finish_non_exhaustive()
    }
}

/// All files, in the order of their paths.
pub static ASSETS: &[Asset] = include!(concat!(env!("OUT_DIR"), "/assets.rs"));

/// The file with that path.
pub fn asset(path: &str) -> Option<&'static Asset> {
    ASSETS.binary_search_by(|asset| asset.path.cmp(path)).ok().map(|at| &ASSETS[at])
}

impl Asset {
    /// Its contents, for a client that takes no compression: unpacked once, however many ask.
    pub fn plain(&self) -> Option<&'static [u8]> {
        let unpacked = || {
            let mut plain = Vec::with_capacity(self.bytes);
            GzDecoder::new(self.gzip).read_to_end(&mut plain).ok().map(|_| plain.into_boxed_slice())
        };
        self.plain.get_or_init(unpacked).as_deref()
    }

    /// The media type, by the end of the name.
    pub fn media_type(&self) -> &'static str {
        match self.path.rsplit_once('.').map(|(_, end)| end) {
            Some("html") => "text/html; charset=utf-8",
            Some("js") => "text/javascript; charset=utf-8",
            Some("css") => "text/css; charset=utf-8",
            Some("svg") => "image/svg+xml",
            Some("png") => "image/png",
            Some("json") => "application/json",
            Some("webmanifest") => "application/manifest+json",
            Some("txt") => "text/plain; charset=utf-8",
            _ => "application/octet-stream",
        }
    }

    /// Whether its name changes with its contents.
    pub fn is_immutable(&self) -> bool {
        self.path.contains("/assets/")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_is_found_whole_and_has_a_media_type() {
        assert!(asset("app/index.html").is_some());
        for known in ASSETS {
            let found = asset(known.path).unwrap();
            assert_eq!(found.plain().unwrap().len(), found.bytes, "{known:?}");
            assert_ne!(found.media_type(), "application/octet-stream", "{known:?}");
        }
        assert!(asset("app/no-such-file.js").is_none());
    }

    #[test]
    fn all_scripts_and_styles_of_the_dashboard_are_small() {
        let is_code = |asset: &&Asset| {
            let end = asset.path.rsplit_once('.').map(|(_, end)| end);
            asset.path.starts_with("app/") && matches!(end, Some("js" | "css"))
        };
        let bytes: usize = ASSETS.iter().filter(is_code).map(|asset| asset.gzip.len()).sum();
        assert!(bytes < 180_000, "{bytes} bytes as gzip");
    }
}
