//! Recognises the hosts of URLs to which plain http is safe, because the data does not leave this machine.

use std::net::{Ipv4Addr, Ipv6Addr};

/// Whether the host of a URL is a loopback address. `host` is written as in the URL: an IPv6 address is in brackets.
///
/// A name such as `localhost` is not a loopback address, because a name server or the hosts file can give it another
/// address.
pub fn is_loopback_host(host: &str) -> bool {
    let in_brackets = host
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'));
    match in_brackets {
        Some(address) => address
            .parse::<Ipv6Addr>()
            .is_ok_and(|address| address.is_loopback()),
        None => host
            .parse::<Ipv4Addr>()
            .is_ok_and(|address| address.is_loopback()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_addresses_of_this_machine_are_loopback_hosts() {
        for (host, is_loopback) in [
            ("127.0.0.1", true),
            ("127.1.2.3", true),
            ("[::1]", true),
            ("[0:0:0:0:0:0:0:1]", true),
            ("localhost", false),
            ("localhost.example.org", false),
            ("127.0.0.1.example.org", false),
            ("192.0.2.1", false),
            ("0.0.0.0", false),
            ("[::]", false),
            ("[2001:db8::1]", false),
            // A host without brackets cannot be an IPv6 address, and brackets contain no IPv4 address.
            ("::1", false),
            ("[127.0.0.1]", false),
            ("[::1", false),
            ("", false),
        ] {
            assert_eq!(is_loopback_host(host), is_loopback, "{host}");
        }
    }
}
