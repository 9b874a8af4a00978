//! A name server on a socket of this machine, which says what it is told to.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use tokio::{net::UdpSocket, task::JoinHandle};

const A: u16 = 1;
const CNAME: u16 = 5;
const AAAA: u16 = 28;

/// What is said of a name.
#[derive(Clone, Debug)]
pub(super) enum Says {
    /// These addresses, good for a day.
    Addresses(Vec<IpAddr>),
    /// Another name, and of that what is said here, in the same answer.
    Alias(&'static str, Vec<IpAddr>),
    /// That there is no such name.
    Nothing,
    /// That something is wrong.
    Trouble,
    /// Not a word to questions for that family, and these addresses to those for the other.
    SilentFor(u16, Vec<IpAddr>),
    /// Not a word.
    Silence,
}

impl Says {
    pub(super) const V6: u16 = AAAA;

    pub(super) fn addresses(addresses: &[&str]) -> Self {
        Self::Addresses(parsed(addresses))
    }
}

pub(super) fn parsed(addresses: &[&str]) -> Vec<IpAddr> {
    addresses.iter().map(|address| address.parse().expect("it is an address")).collect()
}

/// The server.
pub(super) struct NameServer {
    pub(super) address: SocketAddr,
    names: Arc<Mutex<HashMap<String, Says>>>,
    asked: Arc<AtomicUsize>,
    serving: JoinHandle<()>,
}

impl NameServer {
    pub(super) async fn start() -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").await.expect("a port is free");
        let address = socket.local_addr().expect("it is bound");
        let (names, asked) = (Arc::<Mutex<HashMap<String, Says>>>::default(), Arc::new(AtomicUsize::new(0)));
        let (said, counted) = (Arc::clone(&names), Arc::clone(&asked));
        let serving = tokio::spawn(async move {
            let mut buffer = [0; 1_500];
            while let Ok((length, from)) = socket.recv_from(&mut buffer).await {
                counted.fetch_add(1, Ordering::SeqCst);
                let answer = answer(&buffer[..length], &said.lock().expect("nobody panics"));
                if let Some(answer) = answer {
                    let _ = socket.send_to(&answer, from).await;
                }
            }
        });
        Self { address, names, asked, serving }
    }

    /// From now on that is said of a name.
    pub(super) fn says(&self, name: &str, what: Says) {
        self.names.lock().expect("nobody panics").insert(name.to_owned(), what);
    }

    /// How many questions there were.
    pub(super) fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }
}

impl Drop for NameServer {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

fn answer(question: &[u8], names: &HashMap<String, Says>) -> Option<Vec<u8>> {
    let mut labels = Vec::new();
    let mut at = 12;
    while question[at] != 0 {
        let end = at + 1 + usize::from(question[at]);
        labels.push(String::from_utf8(question[at + 1..end].to_vec()).ok()?.to_ascii_lowercase());
        at = end;
    }
    let end = at + 5;
    let kind = u16::from_be_bytes([question[at + 1], question[at + 2]]);
    let of_kind = |addresses: &[IpAddr]| -> Vec<(u16, Vec<u8>)> {
        let record = |address: &IpAddr| match address {
            IpAddr::V4(address) => (A, address.octets().to_vec()),
            IpAddr::V6(address) => (AAAA, address.octets().to_vec()),
        };
        addresses.iter().map(record).filter(|(of, _)| *of == kind).collect()
    };
    let (code, alias, records) = match names.get(&labels.join(".")).unwrap_or(&Says::Nothing) {
        Says::Addresses(addresses) => (0, None, of_kind(addresses)),
        Says::Alias(other, addresses) => (0, Some(encoded(other)), of_kind(addresses)),
        Says::Nothing => (3, None, Vec::new()),
        Says::Trouble => (2, None, Vec::new()),
        Says::SilentFor(silent, addresses) if *silent != kind => (0, None, of_kind(addresses)),
        Says::SilentFor(..) | Says::Silence => return None,
    };
    let count = u16::try_from(records.len() + usize::from(alias.is_some())).ok()?;
    let mut answer = question[..2].to_vec();
    answer.extend([0x81, 0x80 | code, 0, 1]);
    answer.extend(count.to_be_bytes());
    answer.extend([0; 4]);
    answer.extend(&question[12..end]);
    let mut add = |name: &[u8], kind: u16, data: &[u8]| {
        answer.extend(name);
        answer.extend(kind.to_be_bytes());
        answer.extend([0, 1]);
        answer.extend(86_400_u32.to_be_bytes());
        answer.extend(u16::try_from(data.len()).expect("it is short").to_be_bytes());
        answer.extend(data);
    };
    // The name of the question, by reference to it.
    let mut owner = vec![0xc0, 12];
    if let Some(alias) = alias {
        add(&owner, CNAME, &alias);
        owner = alias;
    }
    for (kind, data) in records {
        add(&owner, kind, &data);
    }
    Some(answer)
}

fn encoded(name: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    for label in name.split('.') {
        bytes.push(u8::try_from(label.len()).expect("a label is short"));
        bytes.extend(label.as_bytes());
    }
    bytes.push(0);
    bytes
}
