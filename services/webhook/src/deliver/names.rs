//! Looks names up: all addresses of both families, asked anew each time.
//!
//! Nothing is remembered here. An answer is good for the one connection that it was asked for, so that a name that
//! answers otherwise the next time is judged by what it says then. A look-up that hangs holds no thread and is given up
//! with whatever waits for it.
//!
//! Where only public addresses are allowed, a name is taken as it is written: the search list of the system is for
//! names of one's own network.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use hickory_resolver::{
    ResolverBuilder, TokioResolver,
    config::{LookupIpStrategy, NameServerConfig, ResolveHosts, ResolverConfig, ResolverOpts},
    net::{NetError, runtime::TokioRuntimeProvider},
    proto::rr::Name,
    system_conf::read_system_conf,
};
use parking_lot::Mutex;
use tokio::time::Instant;

/// How long the configuration of the system is taken to be as it was read.
const REREAD: Duration = Duration::from_secs(30);
/// Who is asked where the system names nobody, as its own resolver would.
const OWN_MACHINE: SocketAddr = SocketAddr::new(IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 53);

/// Knows the addresses of names.
#[derive(Clone)]
pub(super) struct Names(Arc<Shared>);

struct Shared {
    servers: Option<Vec<SocketAddr>>,
    /// How long one question may take before it is asked once more.
    patience: Duration,
    /// Whether short names are looked for in the system's own domains.
    search: bool,
    current: Mutex<Current>,
}

struct Current {
    resolver: TokioResolver,
    read_at: Instant,
}

impl Names {
    /// Asks those servers, or those of the system. `timeout` is what a whole exchange may take.
    pub(super) fn new(
        servers: Option<Vec<SocketAddr>>,
        search: bool,
        timeout: Duration,
    ) -> Result<Self, hickory_resolver::net::NetError> {
        // Asked twice at most, with time left for the exchange itself.
        let patience = timeout * 3 / 10;
        let resolver = read(servers.as_deref(), patience)?;
        let current = Mutex::new(Current { resolver, read_at: Instant::now() });
        Ok(Self(Arc::new(Shared { servers, patience, search, current })))
    }

    /// All addresses of a name, those of IPv4 first; never none. Where one family gets no answer, the other is all that
    /// is known: what is not known is not dialled.
    pub(super) async fn addresses(&self, host: &str) -> Result<Vec<IpAddr>, NetError> {
        let mut name = Name::from_ascii(host)?;
        if !self.0.search {
            name.set_fqdn(true);
        }
        let resolver = self.current();
        let found: Vec<IpAddr> = resolver.lookup_ip(name).await?.iter().collect();
        if found.is_empty() { Err(NetError::from("the name has no address")) } else { Ok(found) }
    }

    /// The resolver, made anew where the system may have been told of other servers meanwhile.
    fn current(&self) -> TokioResolver {
        let mut current = self.0.current.lock();
        if self.0.servers.is_none() && current.read_at.elapsed() > REREAD {
            current.read_at = Instant::now();
            match read(None, self.0.patience) {
                Ok(resolver) => current.resolver = resolver,
                Err(error) => tracing::warn!(%error, "the name servers of the system cannot be read: as before"),
            }
        }
        current.resolver.clone()
    }
}

fn read(servers: Option<&[SocketAddr]>, patience: Duration) -> Result<TokioResolver, NetError> {
    let given = |servers: &[SocketAddr]| {
        let servers = servers.iter().map(|address| server(*address)).collect();
        (ResolverConfig::from_name_servers(servers), ResolverOpts::default())
    };
    let (config, options) = match servers {
        Some(servers) => given(servers),
        None => read_system_conf().unwrap_or_else(|error| {
            tracing::warn!(%error, "the system names no name servers: its own machine is asked");
            given(&[OWN_MACHINE])
        }),
    };
    let mut builder: ResolverBuilder<TokioRuntimeProvider> =
        TokioResolver::builder_with_config(config, TokioRuntimeProvider::default());
    let set = builder.options_mut();
    *set = options;
    set.ip_strategy = LookupIpStrategy::Ipv4AndIpv6;
    set.use_hosts_file = ResolveHosts::Always;
    // A complete name is tried as it is before anything is put behind it.
    set.ndots = 1;
    set.timeout = patience;
    set.attempts = 1;
    set.cache_size = 0;
    set.positive_max_ttl = Some(Duration::ZERO);
    set.negative_max_ttl = Some(Duration::ZERO);
    // Over TCP many are asked at once.
    set.max_active_requests = 1_024;
    builder.build()
}

fn server(address: SocketAddr) -> NameServerConfig {
    let mut server = NameServerConfig::udp_and_tcp(address.ip());
    for connection in &mut server.connections {
        connection.port = address.port();
    }
    server
}
