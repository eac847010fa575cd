//! Ports for programs that must be told on which port to listen.
//!
//! A test reserves such a port before the program starts, and keeps it while the program is stopped. During this time, the kernel
//! could give a port of the ephemeral range to a socket of another test. A port from here is outside that range, and only one
//! test has it at a time.

use std::{
    fs,
    net::TcpListener,
    ops::{Range, RangeInclusive},
    os::{
        linux::net::SocketAddrExt as _,
        unix::net::{SocketAddr, UnixDatagram},
    },
    process,
};

/// Below the ephemeral range that Linux has without further configuration.
const PORTS: Range<u16> = 15_000..32_000;

/// A port of the loopback interface that no other test has. It is given back when the value is dropped.
#[derive(Debug)]
pub struct Port {
    number: u16,
    /// Only one socket can have its name. The kernel closes the socket when the process ends, however it ends.
    _reserved: UnixDatagram,
}

impl Port {
    /// Reserves a free port.
    pub fn reserve() -> Self {
        let ephemeral = ephemeral_ports();
        let start = usize::try_from(process::id()).unwrap() % PORTS.len();
        let ports = PORTS.cycle().skip(start).take(PORTS.len());
        let (inside, outside): (Vec<u16>, Vec<u16>) =
            ports.partition(|port| ephemeral.contains(port));
        // On a machine whose ephemeral range contains all of them, any port has to do.
        let mut ports = outside.into_iter().chain(inside);
        ports.find_map(Self::take).expect("a free port")
    }

    fn take(number: u16) -> Option<Self> {
        let name = format!("keybroker-test-port-{number}");
        let name = SocketAddr::from_abstract_name(name).unwrap();
        let reserved = UnixDatagram::bind_addr(&name).ok()?;
        // A program that is no test can have the port.
        TcpListener::bind(("127.0.0.1", number)).ok()?;
        Some(Self {
            number,
            _reserved: reserved,
        })
    }

    /// Its number.
    pub fn number(&self) -> u16 {
        self.number
    }
}

/// The ports that the kernel gives to sockets that ask for any port.
fn ephemeral_ports() -> RangeInclusive<u16> {
    let text = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap();
    let mut bounds = text
        .split_whitespace()
        .map(|bound| bound.parse::<u16>().unwrap());
    let (Some(first), Some(last)) = (bounds.next(), bounds.next()) else {
        panic!("ip_local_port_range: {text}");
    };
    first..=last
}

#[test]
fn a_port_is_reserved_once_and_outside_the_ephemeral_range() {
    let ports = [(); 8].map(|()| Port::reserve());
    let numbers: std::collections::BTreeSet<u16> = ports.iter().map(Port::number).collect();
    assert_eq!(numbers.len(), ports.len());
    let ephemeral = ephemeral_ports();
    let has_all = ephemeral.contains(&PORTS.start) && ephemeral.contains(&(PORTS.end - 1));
    for number in numbers {
        assert!(has_all || !ephemeral.contains(&number), "{number}");
        assert!(Port::take(number).is_none(), "{number}");
        TcpListener::bind(("127.0.0.1", number)).unwrap();
    }
}
