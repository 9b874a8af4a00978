//! Certificates: what the listener shows, what processes show each other, and whom they believe.
//!
//! The files are read when a process starts, where anything that is wrong with them is said in a sentence, and looked at
//! once a second from then on. New ones are used whole or not at all: a pair of which only one half has been written yet
//! changes nothing, and connections that are open keep what they began with. Links are followed, as Kubernetes swaps them.
//!
//! Deliberately absent: the cryptography that a process may have installed as its default. Everything here names its own.

use std::{
    fmt, fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use arc_swap::ArcSwap;
use rustls::{
    ClientConfig, Error as TlsError, InconsistentKeys, RootCertStore, ServerConfig,
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    server::WebPkiClientVerifier,
    sign::{CertifiedKey, SingleCertAndKey},
};

use crate::{
    channel::ClientTls,
    clock::Clock,
    config::{self, Problems},
    host::ServerTls,
    shutdown::Shutdown,
    values::rfc3339,
};

/// How often the files are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// HTTP/2 and HTTP/1.1, as the handshake names them.
const H2: &[u8] = b"h2";
const HTTP1: &[u8] = b"http/1.1";

/// The certificates of a process. Clones are the same ones.
#[derive(Clone)]
pub struct Tls(Arc<Inner>);

struct Inner {
    files: config::Tls,
    clock: Clock,
    current: ArcSwap<Current>,
}

/// What is in use, made whole.
struct Current {
    /// What the files were when they were read.
    marks: Vec<Option<Mark>>,
    public: Option<Arc<ServerConfig>>,
    peers: Option<Arc<ServerConfig>>,
    client: Arc<ClientConfig>,
    shown: Vec<Shown>,
}

/// A certificate that is shown to others, and until when it is good.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shown {
    /// The key of the configuration that names it, such as `tls.cert`.
    pub name: &'static str,
    /// Its end, in milliseconds since 1970.
    pub not_after_ms: i64,
    /// The certificate itself, to tell one from another.
    leaf: CertificateDer<'static>,
}

/// What tells a file from the one that was there before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mark {
    device: u64,
    inode: u64,
    bytes: u64,
    changed_s: i64,
    changed_ns: i64,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").field("files", &self.0.files).finish_non_exhaustive()
    }
}

impl Tls {
    /// Reads and judges what the configuration names. Where it names nothing, nothing is shown, and the public
    /// authorities are believed.
    pub fn load(files: &config::Tls, clock: Clock) -> Result<Self, Problems> {
        let current = read(files)?;
        for shown in &current.shown {
            let (name, not_after) = (shown.name, rfc3339(shown.not_after_ms));
            if shown.not_after_ms <= clock.now_ms() {
                tracing::warn!(name, not_after, "this certificate has expired, and nobody believes it");
            } else {
                tracing::info!(name, not_after, "a certificate is in use");
            }
        }
        Ok(Self(Arc::new(Inner { files: files.clone(), clock, current: ArcSwap::from_pointee(current) })))
    }

    /// What a listener shows at the moment; none where it speaks plain HTTP. With `peers`, and where the configuration
    /// says who signs them, callers must show a certificate of this installation.
    pub fn server(&self, peers: bool) -> Option<Arc<ServerConfig>> {
        let current = self.0.current.load();
        if peers { current.peers.clone() } else { current.public.clone() }
    }

    /// How other services are dialled at the moment.
    pub fn client(&self) -> Arc<ClientConfig> {
        Arc::clone(&self.0.current.load().client)
    }

    /// [`Self::server`], for a listener that asks at each connection.
    pub fn for_listener(&self, peers: bool) -> Option<ServerTls> {
        let (first, tls) = (self.server(peers)?, self.clone());
        Some(Arc::new(move || tls.server(peers).unwrap_or_else(|| Arc::clone(&first))))
    }

    /// [`Self::client`], for a channel that asks at each connection.
    pub fn for_channels(&self) -> ClientTls {
        let tls = self.clone();
        Arc::new(move || tls.client())
    }

    /// The certificates in use.
    pub fn shown(&self) -> Vec<Shown> {
        self.0.current.load().shown.clone()
    }

    /// Whether there is any file to look at.
    pub fn has_files(&self) -> bool {
        paths(&self.0.files).iter().any(|(_, path)| path.is_some())
    }

    /// Uses what the files become, until shut down.
    pub async fn follow(self, mut shutdown: Shutdown) {
        if !self.has_files() {
            return;
        }
        let mut broken = None;
        loop {
            tokio::select! {
                () = tokio::time::sleep(LOOK_EVERY) => {}
                () = shutdown.wait() => return,
            }
            let looking = self.clone();
            broken = tokio::task::spawn_blocking(move || looking.look(broken)).await.unwrap_or_default();
        }
    }

    /// Looks once. What is broken is looked at twice before it is called so: it may be half written.
    fn look(&self, broken: Option<Broken>) -> Option<Broken> {
        let marks = marks(&self.0.files);
        let before = self.0.current.load_full();
        if before.marks == marks {
            return None;
        }
        if broken.as_ref().is_some_and(|broken| broken.warned && broken.marks == marks) {
            return broken;
        }
        match read(&self.0.files) {
            Ok(current) => {
                for shown in current.shown.iter().filter(|shown| !before.shown.contains(shown)) {
                    let (name, not_after) = (shown.name, rfc3339(shown.not_after_ms));
                    tracing::info!(name, not_after, "a new certificate is in use");
                    if shown.not_after_ms <= self.0.clock.now_ms() {
                        tracing::warn!(name, not_after, "it has expired, and nobody believes it");
                    }
                }
                self.0.current.store(Arc::new(current));
                None
            }
            Err(problems) => {
                let again = broken.is_some_and(|broken| broken.marks == marks);
                if again {
                    tracing::warn!(%problems, "the new certificates are no good: those before stay in use");
                }
                Some(Broken { marks, warned: again })
            }
        }
    }
}

/// Files that could not be used.
#[derive(Clone, Debug)]
struct Broken {
    marks: Vec<Option<Mark>>,
    warned: bool,
}

fn paths(files: &config::Tls) -> [(&'static str, &Option<PathBuf>); 5] {
    [
        ("tls.cert", &files.cert),
        ("tls.key", &files.key),
        ("tls.client_ca", &files.client_ca),
        ("tls.service_cert", &files.service_cert),
        ("tls.service_key", &files.service_key),
    ]
}

fn marks(files: &config::Tls) -> Vec<Option<Mark>> {
    let mark = |path: &PathBuf| {
        let found = fs::metadata(path).ok()?;
        Some(Mark {
            device: found.dev(),
            inode: found.ino(),
            bytes: found.size(),
            changed_s: found.mtime(),
            changed_ns: found.mtime_nsec(),
        })
    };
    paths(files).into_iter().filter_map(|(_, path)| path.as_ref().map(mark)).collect()
}

/// Everything that the files make, or all that is wrong with them.
fn read(files: &config::Tls) -> Result<Current, Problems> {
    // Before the files themselves: one that changes while it is read is read again.
    let marks = marks(files);
    let provider = Arc::new(ring::default_provider());
    let mut problems = Vec::new();
    let mut sound = |found: Result<_, String>| found.map_err(|problem| problems.push(problem)).ok();
    let mut of_pair = |names: [&'static str; 2], cert: &Option<PathBuf>, key: &Option<PathBuf>| {
        let (Some(cert), Some(key)) = (cert, key) else { return None };
        sound(pair(names, cert, key, &provider))
    };
    let own = of_pair(["tls.cert", "tls.key"], &files.cert, &files.key);
    let service = of_pair(["tls.service_cert", "tls.service_key"], &files.service_cert, &files.service_key);
    let authorities = files.client_ca.as_deref().map(roots).transpose();
    let authorities = authorities.map_err(|problem| problems.push(problem)).ok().flatten();
    if !problems.is_empty() {
        return Err(Problems(problems));
    }
    let shown = [("tls.cert", &own), ("tls.service_cert", &service)]
        .into_iter()
        .filter_map(|(name, pair)| Some((name, pair.as_ref()?)))
        .filter_map(|(name, pair)| {
            let leaf = pair.cert.first()?.clone();
            Some(Shown { name, not_after_ms: not_after_ms(&leaf)?, leaf })
        })
        .collect();
    made(own.as_ref(), service.as_ref(), authorities, &provider)
        .map(|(public, peers, client)| Current { marks, public, peers, client, shown })
        // The files are sound one by one, so this is about what they are together.
        .map_err(|error| Problems(vec![format!("tls: the certificates cannot be used: {error}")]))
}

type Made = (Option<Arc<ServerConfig>>, Option<Arc<ServerConfig>>, Arc<ClientConfig>);

fn made(
    own: Option<&Arc<CertifiedKey>>,
    service: Option<&Arc<CertifiedKey>>,
    authorities: Option<Arc<RootCertStore>>,
    provider: &Arc<CryptoProvider>,
) -> Result<Made, TlsError> {
    let server = |peers: Option<&Arc<RootCertStore>>| {
        let Some(own) = own else { return Ok::<_, TlsError>(None) };
        let builder =
            ServerConfig::builder_with_provider(Arc::clone(provider)).with_safe_default_protocol_versions()?;
        let builder = match peers {
            Some(authorities) => {
                let verifier =
                    WebPkiClientVerifier::builder_with_provider(Arc::clone(authorities), Arc::clone(provider))
                        .build()
                        .map_err(|error| TlsError::General(error.to_string()))?;
                builder.with_client_cert_verifier(verifier)
            }
            None => builder.with_no_client_auth(),
        };
        let mut config = builder.with_cert_resolver(resolver(own));
        config.alpn_protocols = vec![H2.to_vec(), HTTP1.to_vec()];
        Ok(Some(Arc::new(config)))
    };
    let (public, peers) = (server(None)?, server(authorities.as_ref())?);
    let believed =
        authorities.unwrap_or_else(|| Arc::new(RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() }));
    let builder = ClientConfig::builder_with_provider(Arc::clone(provider))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(believed);
    let mut client = match service.or(own) {
        Some(pair) => builder.with_client_cert_resolver(resolver(pair)),
        None => builder.with_no_client_auth(),
    };
    client.alpn_protocols = vec![H2.to_vec()];
    Ok((public, peers, Arc::new(client)))
}

fn resolver(pair: &Arc<CertifiedKey>) -> Arc<SingleCertAndKey> {
    Arc::new(SingleCertAndKey::from(CertifiedKey::clone(pair)))
}

/// A certificate and its key, if they are one.
fn pair(
    [cert_name, key_name]: [&'static str; 2],
    cert: &Path,
    key: &Path,
    provider: &CryptoProvider,
) -> Result<Arc<CertifiedKey>, String> {
    let chain = certificates(cert_name, cert)?;
    let bytes = contents(key_name, key)?;
    let key_der = PrivateKeyDer::from_pem_slice(&bytes).map_err(|_| {
        let key = key.display();
        format!("{key_name}: {key} holds no private key that can be read: it must be PEM, and not be encrypted")
    })?;
    CertifiedKey::from_der(chain, key_der, provider).map(Arc::new).map_err(|error| {
        let (cert, key) = (cert.display(), key.display());
        match error {
            TlsError::InconsistentKeys(InconsistentKeys::KeyMismatch) => {
                format!("{key_name}: {key} does not fit the certificate in {cert}: name the two that belong together")
            }
            TlsError::InvalidCertificate(_) => {
                format!("{cert_name}: {cert} holds a certificate that cannot be read: name a file of PEM certificates")
            }
            _ => format!("{key_name}: {key} holds a key of a kind that is not known here: take ECDSA, RSA or Ed25519"),
        }
    })
}

fn roots(path: &Path) -> Result<Arc<RootCertStore>, String> {
    let mut store = RootCertStore::empty();
    for certificate in certificates("tls.client_ca", path)? {
        store.add(certificate).map_err(|_| {
            let path = path.display();
            format!("tls.client_ca: {path} holds a certificate that cannot be read: name a file of PEM certificates")
        })?;
    }
    Ok(Arc::new(store))
}

fn certificates(name: &str, path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let bytes = contents(name, path)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    found
        .ok()
        .filter(|found| !found.is_empty())
        .ok_or_else(|| format!("{name}: {} holds no certificate: name a file of PEM certificates", path.display()))
}

fn contents(name: &str, path: &Path) -> Result<Vec<u8>, String> {
    fs::read(path).map_err(|error| {
        let why = match error.kind() {
            io::ErrorKind::NotFound => "does not exist".to_owned(),
            io::ErrorKind::PermissionDenied => "may not be read by this process".to_owned(),
            _ => format!("cannot be read ({error})"),
        };
        format!("{name}: {} {why}: name a PEM file that this process may read", path.display())
    })
}

/// Until when a certificate is good: the second time of its validity, the fourth or fifth thing that it says (RFC 5280).
fn not_after_ms(certificate: &[u8]) -> Option<i64> {
    const SEQUENCE: u8 = 0x30;
    const VERSION: u8 = 0xa0;
    let inside = |(tag, content, _): (u8, _, _)| (tag == SEQUENCE).then_some(content);
    let mut rest = inside(element(inside(element(certificate)?)?)?)?;
    if let (VERSION, _, after) = element(rest)? {
        rest = after;
    }
    // The serial number, the kind of signature, the issuer.
    for _ in 0..3 {
        rest = element(rest)?.2;
    }
    let (_, _, rest) = element(inside(element(rest)?)?)?;
    let (tag, time, _) = element(rest)?;
    let time = std::str::from_utf8(time).ok()?;
    let time = match tag {
        // Two digits of a year: below 50 they are this century's.
        0x17 => format!("{}{time}", if time < "50" { "20" } else { "19" }),
        0x18 => time.to_owned(),
        _ => return None,
    };
    let time = jiff::civil::DateTime::strptime("%Y%m%d%H%M%SZ", time).ok()?;
    Some(time.to_zoned(jiff::tz::TimeZone::UTC).ok()?.timestamp().as_millisecond())
}

/// The first element of DER: its tag, what it holds, and what comes after it.
fn element(input: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&tag, rest) = input.split_first()?;
    let (&first, rest) = rest.split_first()?;
    let (length, rest) = if first < 0x80 {
        (usize::from(first), rest)
    } else {
        let (digits, rest) = rest.split_at_checked(usize::from(first & 0x7f))?;
        if digits.len() > 4 {
            return None;
        }
        (digits.iter().fold(0, |length, digit| length << 8 | usize::from(*digit)), rest)
    };
    let (content, rest) = rest.split_at_checked(length)?;
    Some((tag, content, rest))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
    use tempfile::TempDir;

    use super::*;

    struct Authority {
        issuer: Issuer<'static, KeyPair>,
        pem: String,
    }

    impl Authority {
        fn new() -> Self {
            let mut params = CertificateParams::new(Vec::new()).unwrap();
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            let key = KeyPair::generate().unwrap();
            let pem = params.self_signed(&key).unwrap().pem();
            Self { issuer: Issuer::new(params, key), pem }
        }

        /// A certificate and its key, good until the first day of a year.
        fn pair(&self, until: i32) -> (String, String) {
            let key = KeyPair::generate().unwrap();
            let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
            params.not_after = rcgen::date_time_ymd(until, 1, 1);
            (params.signed_by(&key, &self.issuer).unwrap().pem(), key.serialize_pem())
        }
    }

    /// Files that a configuration names.
    struct Files {
        folder: TempDir,
        named: config::Tls,
    }

    impl Files {
        fn new() -> Self {
            let folder = TempDir::with_prefix("paperkey-tls-").unwrap();
            let path = |name: &str| Some(folder.path().join(name));
            let named = config::Tls { cert: path("tls.crt"), key: path("tls.key"), ..config::Tls::default() };
            Self { folder, named }
        }

        fn write(&self, name: &str, text: &str) {
            fs::write(self.folder.path().join(name), text).unwrap();
        }

        fn write_pair(&self, (cert, key): &(String, String)) {
            self.write("tls.crt", cert);
            self.write("tls.key", key);
        }

        fn problems(&self) -> Vec<String> {
            Tls::load(&self.named, Clock::system()).err().map(|problems| problems.0).unwrap_or_default()
        }
    }

    #[test]
    fn what_is_wrong_with_the_files_is_said_in_a_sentence_each() {
        let (files, authority) = (Files::new(), Authority::new());
        let [one, other] = [authority.pair(2040), authority.pair(2040)];
        let said = files.problems();
        assert!(said.len() == 1 && said[0].contains("tls.crt does not exist"), "{said:?}");
        files.write_pair(&(String::new(), one.1.clone()));
        assert!(files.problems()[0].contains("tls.crt holds no certificate"), "{:?}", files.problems());
        files.write_pair(&(one.0.clone(), one.0.clone()));
        assert!(files.problems()[0].contains("tls.key holds no private key"), "{:?}", files.problems());
        files.write_pair(&(one.0.clone(), other.1));
        assert!(files.problems()[0].contains("does not fit the certificate"), "{:?}", files.problems());
        files.write_pair(&one);
        assert_eq!(files.problems(), Vec::<String>::new());
        let with_ca = config::Tls { client_ca: Some(files.folder.path().join("ca.crt")), ..files.named.clone() };
        files.write("ca.crt", "nonsense");
        let said = Tls::load(&with_ca, Clock::system()).unwrap_err().to_string();
        assert!(said.contains("ca.crt holds no certificate"), "{said}");
        files.write("tls.key", "nonsense");
        assert_eq!(Tls::load(&with_ca, Clock::system()).unwrap_err().0.len(), 2);
    }

    #[test]
    fn the_end_of_a_certificate_is_read_from_it() {
        let (files, authority) = (Files::new(), Authority::new());
        for (year, end_ms) in [(2019, 1_546_300_800_000), (2040, 2_208_988_800_000), (2060, 2_840_140_800_000)] {
            files.write_pair(&authority.pair(year));
            let tls = Tls::load(&files.named, Clock::system()).unwrap();
            assert_eq!(tls.shown().iter().map(|shown| shown.not_after_ms).collect::<Vec<_>>(), [end_ms]);
        }
        assert_eq!(not_after_ms(b""), None);
        assert_eq!(not_after_ms(&[0x30, 0x84, 0xff, 0xff, 0xff, 0xff, 0x30]), None);
    }

    #[test]
    fn a_new_pair_is_used_and_half_of_one_is_not() {
        let (files, authority) = (Files::new(), Authority::new());
        let (first, second) = (authority.pair(2040), authority.pair(2041));
        files.write_pair(&first);
        let tls = Tls::load(&files.named, Clock::system()).unwrap();
        let before = tls.server(false).unwrap();
        let same = |tls: &Tls| Arc::ptr_eq(&before, &tls.server(false).unwrap());
        assert!(tls.look(None).is_none() && same(&tls));

        files.write("tls.crt", &second.0);
        let broken = tls.look(None).unwrap();
        assert!(!broken.warned && same(&tls), "it may be half written");
        let broken = tls.look(Some(broken)).unwrap();
        assert!(broken.warned && same(&tls));
        let broken = tls.look(Some(broken)).unwrap();
        assert!(broken.warned && same(&tls));

        files.write("tls.key", &second.1);
        assert!(tls.look(Some(broken)).is_none() && !same(&tls));
        assert_eq!(tls.shown()[0].not_after_ms, 2_240_611_200_000);
        fs::remove_file(files.folder.path().join("tls.key")).unwrap();
        let after = tls.server(false).unwrap();
        assert!(tls.look(None).is_some() && Arc::ptr_eq(&after, &tls.server(false).unwrap()));
    }

    #[test]
    fn links_are_followed_when_they_are_swapped() {
        let (files, authority) = (Files::new(), Authority::new());
        let folder = files.folder.path();
        for (name, year) in [("one", 2040), ("two", 2041)] {
            let (cert, key) = authority.pair(year);
            fs::create_dir(folder.join(name)).unwrap();
            fs::write(folder.join(name).join("tls.crt"), cert).unwrap();
            fs::write(folder.join(name).join("tls.key"), key).unwrap();
        }
        symlink("one", folder.join("..data")).unwrap();
        for name in ["tls.crt", "tls.key"] {
            symlink(format!("..data/{name}"), folder.join(name)).unwrap();
        }
        let tls = Tls::load(&files.named, Clock::system()).unwrap();
        let before = tls.shown();
        symlink("two", folder.join("..new")).unwrap();
        fs::rename(folder.join("..new"), folder.join("..data")).unwrap();
        assert!(tls.look(None).is_none());
        assert_ne!(tls.shown(), before);
    }

    #[test]
    fn nothing_that_is_printed_holds_a_key() {
        let (files, authority) = (Files::new(), Authority::new());
        let pair = authority.pair(2040);
        files.write_pair(&pair);
        files.write("ca.crt", &authority.pem);
        let named = config::Tls { client_ca: Some(files.folder.path().join("ca.crt")), ..files.named.clone() };
        let printed = format!("{:?}", Tls::load(&named, Clock::system()).unwrap());
        assert!(!printed.contains("PRIVATE") && printed.contains("tls.key"), "{printed}");
    }

    #[test]
    fn without_files_nothing_is_shown_and_the_public_is_believed() {
        let tls = Tls::load(&config::Tls::default(), Clock::system()).unwrap();
        assert!(tls.server(false).is_none() && tls.server(true).is_none() && !tls.has_files());
        assert_eq!(tls.client().alpn_protocols, [H2.to_vec()]);
    }
}
