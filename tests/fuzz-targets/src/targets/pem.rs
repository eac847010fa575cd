//! PEM files: certificates, private keys and revocation lists.

use keybroker_core::pem;

pub(crate) const WORDS: &[&str] = &[
    "-----BEGIN ",
    "-----END ",
    "-----",
    "CERTIFICATE",
    "PRIVATE KEY",
    "X509 CRL",
    "EC PARAMETERS",
    "\n",
    "\r\n",
    "\u{feff}",
    "=",
    "----- BEGIN",
    "-----BEGIN CERTIFICATE-----\n",
    "-----END CERTIFICATE-----\n",
];

/// A certificate of an EC key.
pub(super) const CERTIFICATE: &str = "\
-----BEGIN CERTIFICATE-----\n\
MIIBdTCCARugAwIBAgIUASqCmYZaK3bCNi1WLn93wqiI7HswCgYIKoZIzj0EAwIw\n\
DzENMAsGA1UEAwwEZnV6ejAgFw0yNjExMjkxNjQ4MDlaGA8yMTI2MTEwNTE2NDgw\n\
OVowDzENMAsGA1UEAwwEZnV6ejBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABOeT\n\
YP/l2SeU9U+I7I3Tcc4hzHWZrPIvJ4G1SwrPGKZBQcNeaSOiXRihyqgUaz8EllG5\n\
lSEFQizL8MEbLQUhbt2jUzBRMB0GA1UdDgQWBBSaxkTWS8G5UTIUIhTECpj4J/jl\n\
SzAfBgNVHSMEGDAWgBSaxkTWS8G5UTIUIhTECpj4J/jlSzAPBgNVHRMBAf8EBTAD\n\
AQH/MAoGCCqGSM49BAMCA0gAMEUCIQCNdLUXpCpQgg7jYnycb0X9lJqnhpzHGqS7\n\
GVS8CDJvvgIgLBn7TRDHjnMdPBBTY7F9fLusZ672DFYVr6YKCvTp02I=\n\
-----END CERTIFICATE-----\n\
";
/// Its key, made for this purpose.
const PRIVATE_KEY: &str = "\
-----BEGIN PRIVATE KEY-----\n\
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgcsZ3CCEyDKBxXLYX\n\
NlZdxnnDQbLLtYN5qi52qcnMO6WhRANCAATnk2D/5dknlPVPiOyN03HOIcx1mazy\n\
LyeBtUsKzximQUHDXmkjol0YocqoFGs/BJZRuZUhBUIsy/DBGy0FIW7d\n\
-----END PRIVATE KEY-----\n\
";
const REVOCATION_LIST: &str = "\
-----BEGIN X509 CRL-----\n\
MIGUMD0wCgYIKoZIzj0EAwIwDzENMAsGA1UEAwwEZnV6ehcNMjYxMTI5MTY0ODA5\n\
WhgPMjEyNjExMDUxNjQ4MDlaMAoGCCqGSM49BAMCA0cAMEQCIHPLpPErZP0U7P/2\n\
m8HbI4aCOj+TZ5xrj3vDifbF8lb0AiAkCJB27NtBZFa3jAOOGqqjmhj24qksZSmS\n\
Jqf8/geNdg==\n\
-----END X509 CRL-----\n\
";

/// Reads a file in each way in which one is read.
///
/// # Panics
/// If a block of a file that is accepted was left out, or what was read does not survive being written and read again.
pub fn pem(bytes: &[u8]) -> bool {
    let begins = count(bytes, b"-----BEGIN ");
    let certificates = pem::certificates(bytes);
    if let Ok(certificates) = &certificates {
        assert_eq!(
            certificates.len(),
            begins,
            "every BEGIN line is accounted for"
        );
        let written = pem::encode(certificates);
        assert_eq!(
            &pem::certificates(written.as_bytes()).unwrap(),
            certificates
        );
    }
    let chain = pem::chain(bytes);
    if let Ok(chain) = &chain {
        assert!((1..=begins).contains(&chain.len()));
    }
    let key = pem::private_key(bytes);
    if let Ok(key) = &key {
        let written = pem::encode_key(key);
        let read = pem::private_key(written.as_bytes()).unwrap();
        assert_eq!(read.secret_der(), key.secret_der());
    }
    let lists = pem::revocation_lists(bytes);
    let damaged = lists.iter().filter(|list| list.is_err()).count();
    assert!(damaged <= pem::DAMAGED_BLOCKS_MAX + 1);
    assert!(lists.len() - damaged <= begins);
    let has_lists = !lists.is_empty() && damaged == 0;
    if has_lists {
        assert_eq!(lists.len(), begins);
        assert!(certificates.is_err() && key.is_err());
    }
    certificates.is_ok() || chain.is_ok() || key.is_ok() || has_lists
}

fn count(bytes: &[u8], wanted: &[u8]) -> usize {
    bytes
        .windows(wanted.len())
        .filter(|window| *window == wanted)
        .count()
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    [
        CERTIFICATE.to_owned(),
        CERTIFICATE.repeat(2),
        [PRIVATE_KEY, CERTIFICATE].concat(),
        PRIVATE_KEY.to_owned(),
        REVOCATION_LIST.repeat(2),
        CERTIFICATE.replace('\n', "\r\n"),
    ]
    .map(String::into_bytes)
    .to_vec()
}
