//! Networks with names. The name of the network of an address is the *place* of a call or of a request, which policies use and
//! which people read.

use std::{collections::BTreeSet, net::IpAddr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use keybroker_core::key::KeyName;

/// Largest number of ranges of all networks together. Each lookup compares the address with all of them.
const RANGES_MAX: usize = 1_024;
/// Length of the prefix of the IPv6 addresses that stand for IPv4 addresses, in bits.
const MAPPED_BITS: u8 = 96;

/// A `[[network]]` section of the configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NamedNetwork {
    /// The name of the network in policies, lists and the audit log: 1 to 64 bytes of `[a-z0-9._-]`.
    pub name: String,
    /// The address ranges of the network in CIDR notation.
    pub ranges: Vec<IpNet>,
}

/// The networks of the configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Networks {
    /// Each range with the name of its network, the most specific ranges first.
    ranges: Vec<(IpNet, String)>,
}

impl Networks {
    /// Networks from the configuration. If an address is in several networks, the one with the most specific range applies.
    pub fn new(networks: &[NamedNetwork]) -> Self {
        let named = networks.iter().flat_map(|network| {
            let ranges = network.ranges.iter();
            ranges.map(|range| (range.trunc(), network.name.clone()))
        });
        let mut ranges: Vec<_> = named.collect();
        ranges.sort_by_key(|(range, _)| std::cmp::Reverse(range.prefix_len()));
        Self { ranges }
    }

    /// The name of the network of an address, or an empty string if no network contains the address.
    pub fn place_of(&self, address: IpAddr) -> &str {
        // A socket for both address families reports IPv4 addresses in IPv6 form.
        let address = address.to_canonical();
        let mut ranges = self.ranges.iter();
        let found = ranges.find(|(range, _)| range.contains(&address));
        found.map_or("", |(_, name)| name)
    }
}

impl NamedNetwork {
    /// The problems of the `[[network]]` sections.
    pub fn problems(networks: &[Self]) -> Vec<String> {
        let mut problems = Vec::new();
        let (mut names, mut ranges) = (BTreeSet::new(), BTreeSet::new());
        for network in networks {
            let name = &network.name;
            if KeyName::parse(name).is_err() {
                problems.push(format!(
                    "[[network]]: `name` is {name:?}; it must be 1 to 64 bytes of [a-z0-9._-]"
                ));
            }
            if !names.insert(name) {
                problems.push(format!(
                    "[[network]]: `name` {name:?} appears twice; write all ranges of a network in one section"
                ));
            }
            if network.ranges.is_empty() {
                problems.push(format!(
                    "[[network]] {name:?}: `ranges` is empty, so no address is in this network"
                ));
            }
            for range in &network.ranges {
                if let Some(problem) = problem_of(range) {
                    problems.push(format!("[[network]] {name:?}: {problem}"));
                }
                if !ranges.insert(range.trunc()) {
                    problems.push(format!(
                        "[[network]] {name:?}: the range {range} appears twice, so the place of its addresses is not clear"
                    ));
                }
            }
        }
        if ranges.len() > RANGES_MAX {
            problems.push(format!(
                "[[network]]: there are {} ranges; at most {RANGES_MAX} are allowed",
                ranges.len()
            ));
        }
        problems
    }
}

/// The problem of one range.
fn problem_of(range: &IpNet) -> Option<String> {
    if *range != range.trunc() {
        return Some(format!(
            "the range {range} has bits of a host; write {}",
            range.trunc()
        ));
    }
    let IpNet::V6(v6) = range else { return None };
    let mapped = v6.addr().to_ipv4_mapped()?;
    let bits = v6.prefix_len().checked_sub(MAPPED_BITS)?;
    Some(format!(
        "the range {range} has IPv4 addresses in IPv6 form, which never match; write {mapped}/{bits}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network(name: &str, ranges: &[&str]) -> NamedNetwork {
        NamedNetwork {
            name: name.to_owned(),
            ranges: ranges.iter().map(|range| range.parse().unwrap()).collect(),
        }
    }

    #[test]
    fn the_most_specific_range_is_the_place() {
        let networks = [
            network("company", &["10.0.0.0/8", "2001:db8::/32"]),
            network("office", &["10.20.0.0/16", "2001:db8:20::/48"]),
            network("printer", &["10.20.0.9/32"]),
        ];
        assert_eq!(NamedNetwork::problems(&networks), Vec::<String>::new());
        let networks = Networks::new(&networks);
        for (address, place) in [
            ("10.1.2.3", "company"),
            ("10.20.0.8", "office"),
            ("10.20.0.9", "printer"),
            ("::ffff:10.20.0.9", "printer"),
            ("2001:db8:20::1", "office"),
            ("2001:db8:21::1", "company"),
            ("192.0.2.1", ""),
            ("::1", ""),
        ] {
            assert_eq!(
                networks.place_of(address.parse().unwrap()),
                place,
                "{address}"
            );
        }
        assert_eq!(
            Networks::default().place_of("10.1.2.3".parse().unwrap()),
            ""
        );
    }

    #[test]
    fn each_mistake_has_its_message() {
        for (networks, expected) in [
            (
                vec![network("Office", &["10.0.0.0/8"])],
                "1 to 64 bytes of [a-z0-9._-]",
            ),
            (
                vec![network("", &["10.0.0.0/8"])],
                "1 to 64 bytes of [a-z0-9._-]",
            ),
            (vec![network("a", &[])], "`ranges` is empty"),
            (vec![network("a", &["10.1.2.3/8"])], "write 10.0.0.0/8"),
            (
                vec![network("a", &["::ffff:10.0.0.0/104"])],
                "write 10.0.0.0/8",
            ),
            (
                vec![network("a", &["10.0.0.0/8"]), network("b", &["10.0.0.0/8"])],
                "the range 10.0.0.0/8 appears twice",
            ),
            (
                vec![network("a", &["10.0.0.0/8"]), network("a", &["10.0.0.0/9"])],
                "`name` \"a\" appears twice",
            ),
        ] {
            let found = NamedNetwork::problems(&networks);
            assert_eq!(found.len(), 1, "{found:?}");
            assert!(found[0].contains(expected), "{found:?}");
        }
        let many = (0..=RANGES_MAX).map(|number| {
            let number = u32::try_from(number).unwrap();
            IpNet::new(IpAddr::from(number.to_be_bytes()), 32).unwrap()
        });
        let many = [NamedNetwork {
            name: "many".to_owned(),
            ranges: many.collect(),
        }];
        assert_eq!(NamedNetwork::problems(&many).len(), 1);
    }
}
