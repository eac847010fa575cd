//! Limits connections by principal and network. Connections without a principal may make up only a
//! part of all connections, with a lower limit for each network. The connections of one principal
//! may also make up only a part of all connections. Therefore, neither unauthenticated peers nor a
//! single client can use up all connections.
//!
//! Mitigation: M3 of `THREAT_MODEL.md`.

use std::{
    net::{IpAddr, Ipv4Addr},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use ipnet::IpNet;

use keybroker_broker::limits;
use keybroker_core::{counts::Counts, metrics, principal::Principal};

/// Divisor for the share of unauthenticated connections that may come from one network: an eighth.
const NETWORK_DIVISOR: usize = 8;
/// Minimum number of unauthenticated connections that one network may have.
const NETWORK_MIN: usize = 8;

/// Returns how many of the `places` for unauthenticated connections one network may use.
fn per_network(places: usize) -> usize {
    (places / NETWORK_DIVISOR).max(NETWORK_MIN).min(places)
}

/// The network to which a peer's connections are assigned: an IPv4 /24 or an IPv6 /64. `None` for a
/// trusted proxy, whose connections transport calls of many clients.
pub(super) fn network(peer: IpAddr, trusted_proxies: &[IpNet]) -> Option<IpAddr> {
    const IPV4_HOST_BITS: u32 = 8;
    let peer = peer.to_canonical();
    if trusted_proxies
        .iter()
        .any(|network| network.contains(&peer))
    {
        return None;
    }
    Some(match limits::network(peer) {
        IpAddr::V4(v4) => {
            let bits = v4.to_bits() >> IPV4_HOST_BITS << IPV4_HOST_BITS;
            IpAddr::V4(Ipv4Addr::from_bits(bits))
        }
        v6 @ IpAddr::V6(_) => v6,
    })
}

/// The limits on connections, and the number of connections of each principal and network.
#[derive(Debug)]
pub(super) struct Places {
    unauthenticated_max: usize,
    unauthenticated: Mutex<Unauthenticated>,
    per_principal: usize,
    by_principal: Mutex<Counts<String>>,
}

#[derive(Debug, Default)]
struct Unauthenticated {
    all: usize,
    /// The number of unauthenticated connections of each network. The map has at most one entry for
    /// each unauthenticated connection.
    by_network: Counts<IpAddr>,
}

impl Places {
    pub(super) fn new(unauthenticated_max: usize, per_principal: usize) -> Arc<Self> {
        Arc::new(Self {
            unauthenticated_max,
            unauthenticated: Mutex::default(),
            per_principal,
            by_principal: Mutex::default(),
        })
    }

    /// Counts a connection without a principal, unless a limit is reached. If the network is
    /// `None`, only the limit for all networks applies.
    fn of_network(self: &Arc<Self>, network: Option<IpAddr>) -> Option<Place> {
        let mut taken = lock(&self.unauthenticated);
        if taken.all >= self.unauthenticated_max {
            return None;
        }
        if let Some(network) = network
            && !taken
                .by_network
                .take(network, per_network(self.unauthenticated_max))
        {
            return None;
        }
        taken.all += 1;
        Some(Place {
            places: Arc::clone(self),
            holder: Holder::Network(network),
        })
    }

    fn of_principal(self: &Arc<Self>, principal: &Principal) -> Option<Place> {
        let name = principal.to_string();
        let mut taken = lock(&self.by_principal);
        taken.take(name.clone(), self.per_principal).then(|| Place {
            places: Arc::clone(self),
            holder: Holder::Principal(name),
        })
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug)]
enum Holder {
    Network(Option<IpAddr>),
    Principal(String),
}

#[derive(Debug)]
struct Place {
    places: Arc<Places>,
    holder: Holder,
}

impl Drop for Place {
    fn drop(&mut self) {
        match &self.holder {
            Holder::Network(network) => {
                let mut taken = lock(&self.places.unauthenticated);
                taken.all -= 1;
                if let Some(network) = network {
                    taken.by_network.give_back(network);
                }
            }
            Holder::Principal(name) => lock(&self.places.by_principal).give_back(name),
        }
    }
}

/// The limit that causes the broker to refuse a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Full {
    /// The number of unauthenticated connections, in total or from the network, has reached its
    /// maximum.
    Unauthenticated,
    /// The principal has the maximum number of connections.
    Principal,
}

impl Full {
    /// The cause as a label in the metrics.
    pub(super) fn cause(self) -> &'static str {
        match self {
            Self::Unauthenticated => "unauthenticated",
            Self::Principal => "principal",
        }
    }
}

/// Whether a principal was authenticated on a connection, and the limit towards which the
/// connection counts.
#[derive(Debug)]
pub(super) struct Authentication {
    places: Arc<Places>,
    place: Mutex<Option<Place>>,
    done: Arc<AtomicBool>,
    /// Whether the peer is a trusted proxy. The connection of a trusted proxy transports calls of
    /// many principals, and counts towards the limit of none of them.
    is_proxy: bool,
    accepts_credentials: bool,
}

impl Authentication {
    /// Counts a connection whose certificate identifies a principal, unless the limit is reached.
    pub(super) fn done(places: &Arc<Places>, principal: &Principal) -> Result<Self, Full> {
        let place = places.of_principal(principal).ok_or(Full::Principal)?;
        Ok(Self {
            places: Arc::clone(places),
            place: Mutex::new(Some(place)),
            done: Arc::new(AtomicBool::new(true)),
            is_proxy: false,
            accepts_credentials: true,
        })
    }

    /// Counts a connection whose certificate identifies no principal, unless a limit is reached. A
    /// connection without a network comes from a trusted proxy.
    pub(super) fn pending(places: &Arc<Places>, network: Option<IpAddr>) -> Result<Self, Full> {
        let place = places.of_network(network).ok_or(Full::Unauthenticated)?;
        Ok(Self {
            places: Arc::clone(places),
            place: Mutex::new(Some(place)),
            done: Arc::default(),
            is_proxy: network.is_none(),
            accepts_credentials: true,
        })
    }

    /// Stops calls on this connection from authenticating with credentials.
    #[must_use]
    pub(super) fn without_credentials(self) -> Self {
        Self {
            accepts_credentials: false,
            ..self
        }
    }

    /// Whether calls on this connection may authenticate with credentials.
    pub(super) fn accepts_credentials(&self) -> bool {
        self.accepts_credentials
    }

    pub(super) fn is_done(&self) -> bool {
        self.done.load(Ordering::Relaxed)
    }

    /// A shared flag with the value of [`Self::is_done`].
    pub(super) fn flag(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.done)
    }

    /// Records that the credential of a call was accepted. The connection then counts towards the
    /// limit of this principal. If the principal has reached its limit, the connection remains
    /// unauthenticated and ends soon.
    pub(super) fn complete(&self, principal: &Principal) {
        if self.is_done() {
            return;
        }
        let place = if self.is_proxy {
            None
        } else {
            let place = self.places.of_principal(principal);
            if place.is_none() {
                refused(Full::Principal);
                return;
            }
            place
        };
        // If two calls authenticate concurrently, the connection counts for the call that gets this
        // lock first.
        let mut held = lock(&self.place);
        if !self.done.swap(true, Ordering::Relaxed) {
            *held = place;
        }
    }
}

/// Counts a connection that was refused because of a limit.
pub(super) fn refused(full: Full) {
    metrics::CONNECTIONS_REFUSED
        .with([full.cause()])
        .increment(1);
}

#[cfg(test)]
mod tests {
    use super::*;
    use keybroker_core::{
        key::Tenant,
        principal::{Claims, Credential, Identity, Kind, Reach, Role},
    };

    fn service(name: &str) -> Principal {
        Principal::authenticated(Identity {
            name: name.to_owned(),
            credential: Credential::Certificate,
            kind: Kind::Service,
            tenant: Tenant::default(),
            roles: [Role::Release].into(),
            users: Reach::All,
            key_names: Reach::All,
            subject: None,
            mapping: None,
            claims: Claims::default(),
        })
    }

    fn network_of(text: &str) -> Option<IpAddr> {
        network(text.parse().unwrap(), &[])
    }

    #[test]
    fn one_network_takes_a_part_and_gives_it_back() {
        let places = Places::new(100, 10);
        let [one, neighbour, other] = ["192.0.2.1", "192.0.2.200", "192.0.3.1"].map(network_of);
        let mut held: Vec<_> = (0..12)
            .map(|number| {
                let network = if number % 2 == 0 { one } else { neighbour };
                Authentication::pending(&places, network).unwrap()
            })
            .collect();
        assert!(Authentication::pending(&places, one).is_err());
        let elsewhere = Authentication::pending(&places, other).unwrap();
        // The number of unauthenticated connections decreases when a connection authenticates or
        // ends.
        held[0].complete(&service("one"));
        held[0].complete(&service("two"));
        let next = Authentication::pending(&places, neighbour).unwrap();
        assert!(Authentication::pending(&places, one).is_err());
        held.clear();
        drop((next, elsewhere));
        assert_eq!(lock(&places.unauthenticated).all, 0);
        assert!(lock(&places.unauthenticated).by_network.is_empty());
        assert!(lock(&places.by_principal).is_empty());
    }

    #[test]
    fn one_principal_has_a_part_of_the_places() {
        let places = Places::new(100, 2);
        let one = service("one");
        let held: Vec<_> = (0..2)
            .map(|_| Authentication::done(&places, &one).unwrap())
            .collect();
        let full = Authentication::done(&places, &one).unwrap_err();
        assert_eq!(full, Full::Principal);
        // A connection with a credential in a header counts in the same way.
        let header = Authentication::pending(&places, network_of("192.0.2.1")).unwrap();
        header.complete(&one);
        assert!(!header.is_done());
        Authentication::done(&places, &service("other")).unwrap();
        drop(held);
        header.complete(&one);
        assert!(header.is_done());
    }

    #[test]
    fn behind_a_proxy_only_the_whole_counts() {
        let places = Places::new(20, 2);
        let proxies = ["10.0.0.0/8".parse().unwrap()];
        let proxy = network("10.1.2.3".parse().unwrap(), &proxies);
        assert_eq!(proxy, None);
        assert!(network("11.1.2.3".parse().unwrap(), &proxies).is_some());
        let held: Vec<_> = (0..20)
            .map(|_| Authentication::pending(&places, proxy).unwrap())
            .collect();
        assert!(Authentication::pending(&places, proxy).is_err());
        for connection in &held {
            connection.complete(&service("one"));
            assert!(connection.is_done());
        }
        Authentication::pending(&places, proxy).unwrap();
    }

    #[test]
    fn networks_are_24_and_64_bits_wide() {
        assert_eq!(network_of("192.0.2.1"), network_of("::ffff:192.0.2.77"));
        assert_ne!(network_of("192.0.2.1"), network_of("192.0.3.1"));
        assert_eq!(network_of("2001:db8::1"), network_of("2001:db8::ffff:1"));
        assert_ne!(network_of("2001:db8::1"), network_of("2001:db8:0:1::1"));
    }
}
