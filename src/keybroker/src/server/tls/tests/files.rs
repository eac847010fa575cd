//! Tests files with hidden or unusable contents.

use super::*;

/// Returns a server certificate, the certificate of its issuer, and the private key, in PEM.
fn issued(site: &Site) -> (String, String, String) {
    let key = KeyPair::generate().unwrap();
    let parameters = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    let leaf = parameters.signed_by(&key, &site.ca).unwrap();
    (leaf.pem(), site.ca.pem(), key.serialize_pem())
}

/// No PEM block is lost if two blocks are on one line, or if the file begins with a byte order
/// mark.
#[test]
fn no_block_of_a_listeners_files_is_lost() {
    let site = Site::fresh();
    let other = authority("other CA", &rcgen::PKCS_ECDSA_P256_SHA256);
    let (leaf, issuer, key) = issued(&site);
    let lists = [list(&site.ca, &[7], -2, 24), list(&other, &[], -2, 24)];
    let joined =
        |parts: [&str; 2]| format!("\u{feff}{}{}\n", parts[0].trim_end(), parts[1].trim_end());
    site.write("ca", &joined([&site.ca.pem(), &other.pem()]));
    site.write("crl", &joined([&lists[0], &lists[1]]));
    site.write("server", &joined([&leaf, &issuer]));
    site.write("key", &format!("\u{feff}{}", key.replace('\n', "\r\n")));
    let contents = site.load().contents();
    let expected = Contents {
        certificates: 2,
        authorities: 2,
        revocation_lists: 2,
        is_chain_in_order: true,
    };
    assert_eq!(contents, expected);
    assert_eq!(
        contents.to_string(),
        "2 certificates in the chain, 2 client authorities, 2 revocation lists"
    );
    site.write("server", &format!("{leaf}{}", other.pem()));
    let contents = site.load().contents();
    assert!(!contents.is_chain_in_order);
    assert!(contents.to_string().contains("not in order"), "{contents}");
}

#[test]
fn a_listeners_file_that_cannot_be_used_is_refused_with_the_remedy() {
    let site = Site::fresh();
    site.write("crl", &list(&site.ca, &[], -2, 24));
    let (leaf, issuer, key) = issued(&site);
    let other = KeyPair::generate().unwrap().serialize_pem();
    let trusted = site.ca.pem().replace("CERTIFICATE", "TRUSTED CERTIFICATE");
    let encrypted = key.replace("PRIVATE", "ENCRYPTED PRIVATE");
    let revocations = list(&site.ca, &[], -2, 24);
    for (file, text, setting, words) in [
        (
            "server",
            format!("{issuer}{leaf}"),
            "server",
            "is number 2 of 2; it must be the first",
        ),
        (
            "key",
            other,
            "is not the private key of the certificate",
            "server",
        ),
        ("key", encrypted, "`key_file`", "openssl pkey -in"),
        ("key", leaf.clone(), "`key_file`", "no private key"),
        ("ca", trusted, "`client_ca_file`", "openssl x509 -in"),
        (
            "ca",
            format!("{issuer}{revocations}"),
            "`client_ca_file`",
            "the setting for revocation lists",
        ),
        (
            "ca",
            "nothing".to_owned(),
            "`client_ca_file`",
            "no certificate",
        ),
        (
            "crl",
            issuer.clone(),
            "`client_crl_file`",
            "does not belong",
        ),
    ] {
        site.write("server", &format!("{leaf}{issuer}"));
        site.write("key", &key);
        let good = fs::read_to_string(site.path(file)).unwrap();
        site.load();
        site.write(file, &text);
        let problem = site.try_load().unwrap_err();
        assert!(
            problem.contains(setting) && problem.contains(words),
            "{words}: {problem}"
        );
        site.write(file, &good);
    }
}
