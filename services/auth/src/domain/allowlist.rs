//! The networks from which a key may be used.
//!
//! Kept in one form: CIDR, host bits cleared, IPv4 also where it was written inside IPv6, without repetitions. Whether
//! an address lies within is judged by the gateway, which sees the address.

use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net};
use paperkey_proto::Error;

/// How many networks at most.
pub(crate) const MAX_NETWORKS: usize = 100;

/// How many leading bits of `::ffff:0:0/96` an IPv4 network has inside IPv6.
const MAPPED_BITS: u8 = 96;

/// Where a key may be used from; anywhere where empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Allowlist(Vec<IpNet>);

impl Allowlist {
    /// Reads addresses and networks as people write them.
    pub(crate) fn parse(entries: &[String]) -> Result<Self, Error> {
        if entries.len() > MAX_NETWORKS {
            return Err(Error::field("allowlist", format!("must have at most {MAX_NETWORKS} entries")));
        }
        let mut networks = Vec::with_capacity(entries.len());
        for (at, entry) in entries.iter().enumerate() {
            let network = network(entry.trim()).ok_or_else(|| {
                let message = "must be an IPv4 or IPv6 address or a network such as 203.0.113.0/24";
                Error::field(format!("allowlist[{at}]"), message)
            })?;
            if !networks.contains(&network) {
                networks.push(network);
            }
        }
        Ok(Self(networks))
    }

    /// What is stored. Text that is no list of networks is none: whoever reads it closes the key.
    pub(crate) fn from_json(json: Option<&str>) -> Option<Self> {
        let Some(json) = json else { return Some(Self::default()) };
        let networks: Vec<String> = serde_json::from_str(json).ok()?;
        let networks = networks.iter().map(|text| network(text)).collect::<Option<Vec<_>>>()?;
        // An empty list would open the key to everyone; the absence of a list is how that is said.
        (!networks.is_empty()).then_some(Self(networks))
    }

    /// As it is stored; `None` for anywhere.
    pub(crate) fn json(&self) -> Option<String> {
        (!self.0.is_empty()).then(|| serde_json::Value::from(self.texts()).to_string())
    }

    /// As it is shown.
    pub(crate) fn texts(&self) -> Vec<String> {
        self.0.iter().map(ToString::to_string).collect()
    }

    /// Whether a key may be used from anywhere.
    pub(crate) fn is_open(&self) -> bool {
        self.0.is_empty()
    }

    /// The first network that reaches beyond those of another; `None` where all lie within.
    pub(crate) fn beyond(&self, other: &Self) -> Option<usize> {
        let within = |network: &IpNet| other.is_open() || other.0.iter().any(|outer| outer.contains(network));
        self.0.iter().position(|network| !within(network))
    }

    /// Whether it lets in nobody whom the other does not let in.
    pub(crate) fn is_within(&self, other: &Self) -> bool {
        other.is_open() || (!self.is_open() && self.beyond(other).is_none())
    }
}

fn network(text: &str) -> Option<IpNet> {
    let network = match text.parse::<IpNet>() {
        Ok(network) => network,
        Err(_) => IpNet::from(text.parse::<IpAddr>().ok()?),
    };
    Some(
        match network {
            IpNet::V6(v6) if v6.prefix_len() >= MAPPED_BITS => match v6.addr().to_ipv4_mapped() {
                Some(v4) => IpNet::V4(Ipv4Net::new(v4, v6.prefix_len() - MAPPED_BITS).ok()?),
                None => network,
            },
            _ => network,
        }
        .trunc(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(entries: &[&str]) -> Allowlist {
        Allowlist::parse(&entries.iter().map(|entry| (*entry).to_owned()).collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn what_people_write_is_kept_in_one_form() {
        let written = [
            " 203.0.113.7 ",
            "203.0.113.7/32",
            "10.1.2.3/8",
            "::ffff:192.0.2.9",
            "::ffff:192.0.2.9/120",
            "2001:DB8::1/32",
        ];
        let kept = ["203.0.113.7/32", "10.0.0.0/8", "192.0.2.9/32", "192.0.2.0/24", "2001:db8::/32"];
        assert_eq!(list(&written).texts(), kept);
        assert_eq!(Allowlist::from_json(list(&written).json().as_deref()), Some(list(&written)));
    }

    #[test]
    fn nonsense_is_named_by_its_place() {
        for nonsense in ["", "localhost", "10.0.0.0/33", "10.0.0", "::/129", "1.2.3.4/", "1.2.3.4-1.2.3.9", "\u{0}"] {
            let error = Allowlist::parse(&["10.0.0.1".to_owned(), nonsense.to_owned()]).unwrap_err();
            assert_eq!(error.violations()[0].field, "allowlist[1]", "{nonsense:?}");
        }
        let many = vec!["10.0.0.1".to_owned(); MAX_NETWORKS + 1];
        assert_eq!(Allowlist::parse(&many).unwrap_err().violations()[0].field, "allowlist");
    }

    #[test]
    fn stored_nonsense_is_no_list() {
        assert_eq!(Allowlist::from_json(None), Some(Allowlist::default()));
        for nonsense in ["", "[]", "{}", "[1]", "[\"everywhere\"]", "10.0.0.0/8"] {
            assert_eq!(Allowlist::from_json(Some(nonsense)), None, "{nonsense}");
        }
    }

    #[test]
    fn a_list_lies_within_another_or_says_where_it_does_not() {
        let (anywhere, office) = (Allowlist::default(), list(&["10.0.0.0/8", "2001:db8::/32"]));
        assert!(office.is_within(&anywhere) && anywhere.is_within(&anywhere) && !anywhere.is_within(&office));
        assert!(list(&["10.1.0.0/16", "2001:db8::7"]).is_within(&office));
        let wider = list(&["10.0.0.1", "0.0.0.0/0"]);
        assert_eq!((wider.beyond(&office), wider.is_within(&office)), (Some(1), false));
        assert_eq!(list(&["10.0.0.0/7"]).beyond(&office), Some(0));
    }
}
