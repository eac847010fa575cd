//! Tests changes of files while a listener serves.

use super::*;

#[test]
fn only_a_change_of_trust_ends_connections() {
    let site = Site::fresh();
    site.write("crl", &list(&site.ca, &[7], -2, 24));
    let tls = site.load();
    let first = tls.current();

    site.write("crl", &list(&site.ca, &[7], -1, 48));
    tls.reload();
    assert!(!Arc::ptr_eq(&first, &tls.current()), "taken over");
    assert!(
        !first.outdated.is_cancelled(),
        "a renewed list revokes no certificate"
    );

    site.renew_server();
    tls.reload();
    assert!(!first.outdated.is_cancelled());

    // The reload also ends connections that were opened before the last two reloads.
    site.write("crl", &list(&site.ca, &[7, 8], -1, 48));
    tls.reload();
    assert!(first.outdated.is_cancelled());
    assert!(!tls.current().outdated.is_cancelled());
}

/// With an older list, certificates that were revoked since then would be accepted again.
#[test]
fn a_list_that_goes_back_is_refused() {
    let site = Site::fresh();
    site.write("crl", &numbered(&site.ca, 300, &[7], -2, 24));
    let tls = site.load();
    let first = tls.current();
    for (number, from) in [(299, -1), (255, -1), (300, -3), (301, -3)] {
        site.write("crl", &numbered(&site.ca, number, &[], from, 24));
        tls.reload();
        assert_eq!(tls.current().trust, first.trust, "{number} {from}");
        let refused = left_out(&tls).unwrap();
        assert!(
            refused.contains("a list of \"CN=CA\"") && refused.contains("number 0x012c"),
            "{refused}"
        );
    }
    // If the file contains a new and an old list, the new list applies.
    let both = [
        numbered(&site.ca, 301, &[7], -1, 24),
        numbered(&site.ca, 299, &[], -5, 24),
    ];
    site.write("crl", &both.concat());
    tls.reload();
    assert_eq!(left_out(&tls), None);
    site.write("crl", &numbered(&site.ca, 300, &[], -1, 24));
    tls.reload();
    let refused = left_out(&tls).unwrap();
    assert!(
        refused.contains("accepted list (number 0x012d"),
        "{refused}"
    );
}

/// A file with a problem is not parsed each second, because parsing a large file takes a long time.
#[test]
fn a_file_with_a_problem_is_evaluated_once_a_minute_and_at_each_change() {
    let site = Site::fresh();
    site.write("crl", &list(&site.ca, &[7], -3, 24));
    let tls = site.load();
    let first = Instant::now();
    assert_eq!(tls.reload_at(first), Look::Unchanged);
    assert_eq!(
        tls.reload_at(first + RETRY_AFTER),
        Look::Unchanged,
        "a good one is not"
    );
    let bad = [
        ("crl", "nothing".to_owned()),
        ("crl", list(&site.ca, &[], -3, -1)),
        ("server", "half a certificate".to_owned()),
        ("ca", String::new()),
    ];
    for (file, text) in bad {
        let good = fs::read_to_string(site.path(file)).unwrap();
        site.write(file, &text);
        assert_eq!(tls.reload_at(first), Look::Evaluated, "{text}");
        assert_eq!(tls.reload_at(first), Look::Unchanged, "{text}");
        let almost = first + RETRY_AFTER.mul_f64(0.9);
        assert_eq!(tls.reload_at(almost), Look::Unchanged, "{text}");
        assert_eq!(
            tls.reload_at(first + RETRY_AFTER),
            Look::Evaluated,
            "{text}"
        );
        assert_eq!(
            tls.reload_at(first + RETRY_AFTER),
            Look::Unchanged,
            "{text}"
        );
        // If an operator requests a reload, the files are evaluated immediately.
        tls.report_again();
        assert_eq!(tls.reload_at(Instant::now()), Look::Evaluated, "{text}");
        fs::remove_file(site.path(file)).unwrap();
        assert_eq!(tls.reload_at(first), Look::Evaluated, "{text}");
        assert_eq!(tls.reload_at(first), Look::Unchanged, "{text}");
        site.write(file, &good);
        assert_eq!(tls.reload_at(first), Look::Evaluated, "{text}");
        assert_eq!(*tls.refused.lock().unwrap(), None, "{text}");
        assert_eq!(left_out(&tls), None, "{text}");
    }
}

/// The lists of an intermediate CA are verified, but the intermediate CA is not a trust anchor.
#[test]
fn the_lists_of_an_authority_in_the_issuers_file_are_verified() {
    let site = Site::fresh();
    let state = StateDirectory::at(&site.path("state"));
    let start = || site.try_load_with(Some(&state));
    let mut parameters = CertificateParams::new(Vec::new()).unwrap();
    parameters
        .distinguished_name
        .push(DnType::CommonName, "CA below");
    parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    parameters.serial_number = Some(SerialNumber::from(5_u64));
    let key = KeyPair::generate().unwrap();
    let below = CertifiedIssuer::signed_by(parameters, key, &site.ca).unwrap();
    let forger = authority("CA below", &rcgen::PKCS_ECDSA_P256_SHA256);
    let root = list(&site.ca, &[], -4, 24);
    let genuine = numbered(&below, 20, &[9], -3, 24);
    site.write("issuers", &below.pem());
    site.write("crl", &root);
    let refused = start().unwrap_err();
    assert!(refused.contains("no list of \"CN=CA below\""), "{refused}");
    site.write("crl", &format!("{root}{genuine}"));
    let tls = start().unwrap();
    tls.remember_lists().unwrap();
    let sent = [below.der().clone()];
    for (bad, words) in [
        (numbered(&forger, 21, &[], -1, 24), "this CA did not sign"),
        (numbered(&below, 19, &[], -4, 24), "older list"),
        (String::new(), "no longer has"),
    ] {
        site.write("crl", &format!("{root}{bad}"));
        tls.reload();
        for tls in [&tls, &start().unwrap()] {
            let reported = left_out(tls).unwrap();
            assert!(reported.contains(words), "{words}: {reported}");
            Site::verify(tls, &below, 9, &sent).unwrap_err();
            Site::verify(tls, &below, 8, &sent).unwrap();
            // The intermediate CA is not a trust anchor.
            Site::verify(tls, &below, 8, &[]).unwrap_err();
        }
    }
    // The certificate of the intermediate CA can be revoked.
    let newer = numbered(&site.ca, 2, &[5], -1, 24);
    site.write("crl", &format!("{newer}{genuine}"));
    tls.reload();
    assert_eq!(left_out(&tls), None);
    Site::verify(&tls, &below, 8, &sent).unwrap_err();
    // If the certificate of the intermediate CA is removed, its list is not kept.
    site.write("issuers", &site.ca.pem());
    site.write("crl", &newer);
    tls.reload();
    assert_eq!(left_out(&tls), None);
    assert_eq!(tls.contents().revocation_lists, 1);
}

#[test]
fn a_bad_list_leaves_the_old_one_in_use() {
    let site = Site::fresh();
    site.write("crl", &list(&site.ca, &[7], -2, 24));
    let tls = site.load();
    let first = tls.current();
    let namesake = authority("CA", &rcgen::PKCS_ECDSA_P256_SHA256);
    for bad in [
        String::new(),
        list(&namesake, &[], -1, 24),
        list(&site.ca, &[], -2, -1),
    ] {
        site.write("crl", &bad);
        tls.reload();
        assert_eq!(first.trust, tls.current().trust);
        assert!(left_out(&tls).is_some(), "{bad}");
        assert!(Site::verifies(&tls, &site.ca, 8));
        assert!(!Site::verifies(&tls, &site.ca, 7));
        // An unchanged file is not evaluated again, and its problem is still reported.
        let taken_over = tls.current();
        tls.reload();
        assert!(Arc::ptr_eq(&taken_over, &tls.current()));
        assert!(left_out(&tls).is_some(), "{bad}");
    }
    assert!(!first.outdated.is_cancelled());
    site.write("crl", &list(&site.ca, &[], -1, 24));
    tls.reload();
    assert_eq!(left_out(&tls), None);
    assert!(Site::verifies(&tls, &site.ca, 7));
}

/// An attacker between a distribution point and the broker can replace a list that only the
/// handshake verifies.
#[test]
fn a_list_that_is_not_verified_holds_back_no_later_list_and_no_start() {
    let site = Site::fresh();
    let state = StateDirectory::at(&site.path("state"));
    let start = || site.try_load_with(Some(&state));
    let (below, forger) = (
        authority("CA below", &rcgen::PKCS_ECDSA_P256_SHA256),
        authority("CA below", &rcgen::PKCS_ECDSA_P256_SHA256),
    );
    let root = numbered(&site.ca, 1_000, &[], -3, 24);
    let forged = numbered(&forger, u64::MAX, &[], 0, 24);
    site.write("crl", &format!("{root}{forged}"));
    let tls = start().unwrap();
    tls.remember_lists().unwrap();
    assert!(Site::verifies(&tls, &site.ca, 7));

    // The genuine list has a lower number and an earlier date than the forged list.
    let newer = numbered(&site.ca, 2_000, &[7], -2, 24);
    let genuine = numbered(&below, 0x1001, &[9], -2, 24);
    site.write("crl", &format!("{newer}{genuine}"));
    tls.reload();
    assert_eq!(*tls.refused.lock().unwrap(), None);
    assert_eq!(left_out(&tls), None);
    assert!(!Site::verifies(&tls, &site.ca, 7));
    start().unwrap();

    // Unverified lists that cannot be used are reported, and the other lists are used.
    let ended = numbered(&below, 0x1002, &[], -3, -1);
    let two = format!("{genuine}{forged}");
    let damaged = genuine.replace("\nMI", "\nMA");
    for bad in [ended, two, damaged] {
        site.write("crl", &format!("{newer}{bad}"));
        let tls = start().unwrap();
        assert!(left_out(&tls).is_some(), "{bad}");
        assert!(!Site::verifies(&tls, &site.ca, 7));
        assert!(Site::verifies(&tls, &site.ca, 8));
        // A check of the configuration reports the unusable lists.
        site.try_load().unwrap_err();
    }
}

#[test]
fn a_list_that_is_refused_does_not_hold_back_the_list_of_another_authority() {
    let site = Site::fresh();
    let other = authority("other CA", &rcgen::PKCS_ECDSA_P256_SHA256);
    let forger = authority("other CA", &rcgen::PKCS_ECDSA_P256_SHA256);
    site.write("ca", &format!("{}{}", site.ca.pem(), other.pem()));
    let of_other = numbered(&other, 20, &[9], -3, 24);
    site.write(
        "crl",
        &format!("{}{of_other}", numbered(&site.ca, 1, &[], -3, 24)),
    );
    let tls = site.load();
    let bad = [
        (numbered(&other, 19, &[], -4, 24), "older list"),
        (numbered(&forger, 21, &[], -1, 24), "this CA did not sign"),
        (numbered(&other, 21, &[], -3, -1), "expired on"),
        (of_other.replace("\nMI", "\nMA"), "cannot be parsed"),
        (String::new(), "no longer has a list of \"CN=other CA\""),
    ];
    for (round, (bad, words)) in (1_u64..).zip(bad) {
        let serials: Vec<u64> = (100..100 + round).collect();
        let newer = numbered(&site.ca, 1 + round, &serials, -2, 24);
        site.write("crl", &format!("{newer}{bad}"));
        let before = tls.current();
        tls.reload();
        let reported = left_out(&tls).unwrap();
        assert!(reported.contains(words), "{words}: {reported}");
        assert!(before.outdated.is_cancelled(), "{words}");
        assert!(!Site::verifies(&tls, &site.ca, 99 + round), "{words}");
        // The list of the other authority remains in use.
        assert!(!Site::verifies(&tls, &other, 9), "{words}");
        assert!(Site::verifies(&tls, &other, 8), "{words}");
    }
}

/// While an authority replaces its key, both keys sign certificates and lists under the same name.
#[test]
fn clients_of_two_authorities_of_one_name_are_verified_with_the_list_of_their_own() {
    let site = Site::fresh();
    let namesake = authority("CA", &rcgen::PKCS_ECDSA_P256_SHA256);
    site.write("ca", &format!("{}{}", site.ca.pem(), namesake.pem()));
    let (one, two) = (
        numbered(&site.ca, 16, &[7], -2, 24),
        numbered(&namesake, 17, &[8], -1, 24),
    );
    for lists in [format!("{one}{two}"), format!("{two}{one}")] {
        site.write("crl", &lists);
        let tls = site.load();
        for (ca, revoked, good) in [(&site.ca, 7, 8), (&namesake, 8, 7)] {
            assert!(Site::verifies(&tls, ca, good));
            assert!(!Site::verifies(&tls, ca, revoked));
        }
    }
}
