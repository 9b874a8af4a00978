//! Which addresses a webhook may go to: public ones.
//!
//! The tables follow the special-purpose registries of IANA. An address that carries an IPv4 address inside (mapped,
//! NAT64, 6to4, Teredo, ISATAP) is judged by that one, since a translator on the way would go there.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// IPv4 blocks that are not public: base and prefix length.
const CLOSED_V4: [(Ipv4Addr, u32); 15] = [
    // This network.
    (Ipv4Addr::UNSPECIFIED, 8),
    // Private use.
    (Ipv4Addr::new(10, 0, 0, 0), 8),
    // Shared by carriers.
    (Ipv4Addr::new(100, 64, 0, 0), 10),
    // Loopback.
    (Ipv4Addr::new(127, 0, 0, 0), 8),
    // Link-local, where clouds keep their metadata.
    (Ipv4Addr::new(169, 254, 0, 0), 16),
    // Private use.
    (Ipv4Addr::new(172, 16, 0, 0), 12),
    // Protocol assignments.
    (Ipv4Addr::new(192, 0, 0, 0), 24),
    // Documentation.
    (Ipv4Addr::new(192, 0, 2, 0), 24),
    // Relays of 6to4, which are gone.
    (Ipv4Addr::new(192, 88, 99, 0), 24),
    // Private use.
    (Ipv4Addr::new(192, 168, 0, 0), 16),
    // Benchmarks.
    (Ipv4Addr::new(198, 18, 0, 0), 15),
    // Documentation.
    (Ipv4Addr::new(198, 51, 100, 0), 24),
    (Ipv4Addr::new(203, 0, 113, 0), 24),
    // Multicast.
    (Ipv4Addr::new(224, 0, 0, 0), 4),
    // Reserved, and broadcast.
    (Ipv4Addr::new(240, 0, 0, 0), 4),
];

/// Blocks inside IPv6's global unicast space (`2000::/3`) that are not public all the same. Whatever lies outside
/// that space (loopback, unique local, link-local, site-local, multicast and so on) is closed without being listed.
const CLOSED_V6: [(Ipv6Addr, u32); 3] = [
    // Protocol assignments; Teredo, which lies within, is judged before.
    (Ipv6Addr::new(0x2001, 0, 0, 0, 0, 0, 0, 0), 23),
    // Documentation.
    (Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0), 32),
    (Ipv6Addr::new(0x3fff, 0, 0, 0, 0, 0, 0, 0), 20),
];

/// Whether anyone on the internet could reach that address.
pub(crate) fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => is_public_v4(address),
        IpAddr::V6(address) => is_public_v6(address),
    }
}

fn is_public_v4(address: Ipv4Addr) -> bool {
    !CLOSED_V4.iter().any(|(base, length)| {
        let mask = u32::MAX << (32 - length);
        address.to_bits() & mask == base.to_bits()
    })
}

fn is_public_v6(address: Ipv6Addr) -> bool {
    let segments = address.segments();
    let v4_at = |index: usize| {
        let bits = (u32::from(segments[index]) << 16) | u32::from(segments[index + 1]);
        Ipv4Addr::from_bits(bits)
    };
    match segments {
        // Mapped (`::ffff:0:0/96`), and NAT64 under its well-known prefix (`64:ff9b::/96`).
        [0, 0, 0, 0, 0, 0xffff, ..] | [0x64, 0xff9b, 0, 0, 0, 0, ..] => is_public_v4(v4_at(6)),
        // 6to4 (`2002::/16`).
        [0x2002, ..] => is_public_v4(v4_at(1)) && isatap_is_public(segments),
        // Teredo (`2001::/32`): a server, and a client whose address is written inverted.
        [0x2001, 0, ..] => is_public_v4(v4_at(2)) && is_public_v4(Ipv4Addr::from_bits(!v4_at(6).to_bits())),
        // Global unicast is 2000::/3.
        [first, ..] => first & 0xe000 == 0x2000 && !is_closed_v6(address) && isatap_is_public(segments),
    }
}

fn is_closed_v6(address: Ipv6Addr) -> bool {
    CLOSED_V6.iter().any(|(base, length)| {
        let mask = u128::MAX << (128 - length);
        address.to_bits() & mask == base.to_bits()
    })
}

/// ISATAP writes an IPv4 address behind `0:5efe` (or `200:5efe`) in the lower half of any prefix.
fn isatap_is_public(segments: [u16; 8]) -> bool {
    let [_, _, _, _, 0 | 0x200, 0x5efe, high, low] = segments else { return true };
    is_public_v4(Ipv4Addr::from_bits((u32::from(high) << 16) | u32::from(low)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(address: &str) -> bool {
        is_public(address.parse().unwrap_or_else(|_| panic!("{address} is no address")))
    }

    /// The first and the last address of a block are closed, and those beside them are not, unless they lie in another.
    fn is_closed_block(first: &str, last: &str, beside_is_open: [bool; 2]) {
        let bits = |address: &str| match address.parse().unwrap() {
            IpAddr::V4(address) => u128::from(address.to_bits()),
            IpAddr::V6(address) => address.to_bits(),
        };
        let address = |bits: u128| match first.parse().unwrap() {
            IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::from_bits(u32::try_from(bits).unwrap())),
            IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::from_bits(bits)),
        };
        let (low, high) = (bits(first), bits(last));
        for inside in [low, low + (high - low) / 2, high] {
            assert!(!is_public(address(inside)), "{} is inside {first} to {last}", address(inside));
        }
        let most = if first.contains(':') { u128::MAX } else { u128::from(u32::MAX) };
        for (beside, open) in [low.checked_sub(1), high.checked_add(1)].into_iter().zip(beside_is_open) {
            let beside = beside.filter(|beside| *beside <= most).map(address);
            assert_eq!(beside.is_some_and(is_public), open, "{beside:?} is beside {first} to {last}");
        }
    }

    #[test]
    fn every_closed_block_of_ipv4_is_closed_from_its_first_address_to_its_last() {
        for (first, last, beside_is_open) in [
            ("0.0.0.0", "0.255.255.255", [false, true]),
            ("10.0.0.0", "10.255.255.255", [true, true]),
            ("100.64.0.0", "100.127.255.255", [true, true]),
            ("127.0.0.0", "127.255.255.255", [true, true]),
            ("169.254.0.0", "169.254.255.255", [true, true]),
            ("172.16.0.0", "172.31.255.255", [true, true]),
            ("192.0.0.0", "192.0.0.255", [true, true]),
            ("192.0.2.0", "192.0.2.255", [true, true]),
            ("192.88.99.0", "192.88.99.255", [true, true]),
            ("192.168.0.0", "192.168.255.255", [true, true]),
            ("198.18.0.0", "198.19.255.255", [true, true]),
            ("198.51.100.0", "198.51.100.255", [true, true]),
            ("203.0.113.0", "203.0.113.255", [true, true]),
            ("224.0.0.0", "239.255.255.255", [true, false]),
            ("240.0.0.0", "255.255.255.255", [false, false]),
        ] {
            is_closed_block(first, last, beside_is_open);
            // The same in IPv6, by each way in which IPv4 is written there.
            for wrap in [mapped, translated, six_to_four, teredo, isatap, isatap_of_this_machine] {
                for address in [first, last] {
                    let wrapped = wrap(address.parse().unwrap());
                    assert!(!is_public(IpAddr::V6(wrapped)), "{wrapped} holds {address}");
                }
            }
        }
    }

    #[test]
    fn every_closed_block_of_ipv6_is_closed_from_its_first_address_to_its_last() {
        for (first, last, beside_is_open) in [
            // What is not global unicast: unspecified, loopback, compatible with IPv4 and so on, but for what is mapped.
            ("::", "::fffe:ffff:ffff", [false, false]),
            ("::1:0:0:0", "64:ff9a:ffff:ffff:ffff:ffff:ffff:ffff", [false, false]),
            ("64:ff9b::1:0:0", "64:ff9b:ffff:ffff:ffff:ffff:ffff:ffff", [false, false]),
            ("100::", "100::ffff:ffff:ffff:ffff", [false, false]),
            ("100::", "1fff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", [false, true]),
            ("2001:1::", "2001:1ff:ffff:ffff:ffff:ffff:ffff:ffff", [false, true]),
            ("2001:db8::", "2001:db8:ffff:ffff:ffff:ffff:ffff:ffff", [true, true]),
            ("3fff::", "3fff:fff:ffff:ffff:ffff:ffff:ffff:ffff", [true, true]),
            ("4000::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", [true, false]),
            ("5f00::", "5f00:ffff:ffff:ffff:ffff:ffff:ffff:ffff", [false, false]),
            ("fc00::", "fdff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", [false, false]),
            ("fe80::", "febf:ffff:ffff:ffff:ffff:ffff:ffff:ffff", [false, false]),
            ("fec0::", "feff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", [false, false]),
            ("ff00::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", [false, false]),
        ] {
            is_closed_block(first, last, beside_is_open);
        }
        for closed in ["::1", "::8.8.8.8", "::ffff:0:8.8.8.8", "2001::", "2001:0:ffff:ffff:ffff:ffff:ffff:ffff"] {
            assert!(!judged(closed), "{closed}");
        }
    }

    #[test]
    fn public_addresses_are_public_however_they_are_written() {
        for address in ["2606:4700:4700::1111", "2a00:1450:4001:81b::200e", "2001:200::1", "2003::1", "3ffe::1"] {
            assert!(judged(address), "{address}");
        }
        for address in ["1.1.1.1", "8.8.8.8", "93.184.215.14", "223.255.255.255"] {
            assert!(judged(address), "{address}");
            for wrap in [mapped, translated, six_to_four, teredo, isatap, isatap_of_this_machine] {
                let wrapped = wrap(address.parse().unwrap());
                assert!(is_public(IpAddr::V6(wrapped)), "{wrapped} holds {address}");
            }
        }
    }

    #[test]
    fn a_relay_or_a_server_on_the_way_is_judged_too() {
        let teredo_by = |server: &str| {
            let mut segments = teredo("8.8.8.8".parse().unwrap()).segments();
            segments[2..4].copy_from_slice(&halves(server.parse().unwrap()));
            IpAddr::V6(segments.into())
        };
        assert!(is_public(teredo_by("9.9.9.9")));
        assert!(!is_public(teredo_by("10.0.0.1")));
        // 6to4 around ISATAP: both have a say.
        assert!(!judged("2002:808:808::5efe:127.0.0.1"));
        assert!(!judged("2002:7f00:1::5efe:8.8.8.8"));
        assert!(judged("2002:808:808::5efe:8.8.8.8"));
    }

    fn halves(address: Ipv4Addr) -> [u16; 2] {
        let [a, b, c, d] = address.octets();
        [u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])]
    }

    fn mapped(address: Ipv4Addr) -> Ipv6Addr {
        address.to_ipv6_mapped()
    }

    fn translated(address: Ipv4Addr) -> Ipv6Addr {
        let [high, low] = halves(address);
        Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, high, low)
    }

    fn six_to_four(address: Ipv4Addr) -> Ipv6Addr {
        let [high, low] = halves(address);
        Ipv6Addr::new(0x2002, high, low, 1, 0, 0, 0, 1)
    }

    fn teredo(address: Ipv4Addr) -> Ipv6Addr {
        let [high, low] = halves(address);
        Ipv6Addr::new(0x2001, 0, 0x0808, 0x0808, 0, 0, !high, !low)
    }

    fn isatap(address: Ipv4Addr) -> Ipv6Addr {
        let [high, low] = halves(address);
        Ipv6Addr::new(0x2606, 0x4700, 0, 0, 0, 0x5efe, high, low)
    }

    fn isatap_of_this_machine(address: Ipv4Addr) -> Ipv6Addr {
        let [high, low] = halves(address);
        Ipv6Addr::new(0x2606, 0x4700, 0, 0, 0x200, 0x5efe, high, low)
    }
}
