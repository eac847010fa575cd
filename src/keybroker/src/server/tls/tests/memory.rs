//! Tests the storage of revocation lists across restarts.

use std::path::Path;

use rustls_pki_types::{CertificateRevocationListDer, pem::PemObject as _};

use super::*;

/// After a restart, a client with a revoked certificate must still be rejected, because the state
/// directory contains the newest list.
#[test]
fn a_list_that_goes_back_is_refused_after_a_restart_too() {
    let site = Site::fresh();
    let state = StateDirectory::at(&site.path("state"));
    let start = || site.try_load_with(Some(&state));
    site.write("crl", &numbered(&site.ca, 300, &[7], -3, 24));
    start().unwrap().remember_lists().unwrap();
    // A list that a reload accepts is also stored.
    let tls = start().unwrap();
    site.write("crl", &numbered(&site.ca, 301, &[7, 8], -2, 24));
    tls.reload();
    assert_eq!(*tls.refused.lock().unwrap(), None);
    drop(tls);

    for (number, from) in [(300, -3), (300, -1), (301, -3)] {
        site.write("crl", &numbered(&site.ca, number, &[], from, 24));
        let tls = start().unwrap();
        let refused = left_out(&tls).unwrap();
        assert!(
            refused.contains("accepted list (number 0x012d") && refused.contains("client-crl-"),
            "{refused}"
        );
        assert!(!Site::verifies(&tls, &site.ca, 8), "{number} {from}");
        // The rejected list does not replace the accepted list.
        tls.remember_lists().unwrap();
        // A check of the configuration neither reads nor writes the state directory.
        site.try_load().unwrap();
    }
    for number in [301, 302] {
        site.write("crl", &numbered(&site.ca, number, &[], -2, 24));
        assert_eq!(left_out(&start().unwrap()), None);
    }

    // To accept an older list, operators delete the stored list, as the documentation says.
    let [file] = &stored(&state)[..] else {
        panic!("one list of one authority")
    };
    fs::remove_file(file).unwrap();
    site.write("crl", &numbered(&site.ca, 1, &[], -4, 24));
    assert_eq!(left_out(&start().unwrap()), None);
}

#[test]
fn the_accepted_list_is_stored_in_der_for_this_user_alone() {
    use std::os::unix::fs::PermissionsExt as _;
    let site = Site::fresh();
    let state = StateDirectory::at(&site.path("state"));
    let pem = list(&site.ca, &[7], -2, 24);
    site.write("crl", &pem);
    let tls = site.try_load_with(Some(&state)).unwrap();
    assert!(
        !state.path().exists(),
        "before the broker owns the directory"
    );
    tls.remember_lists().unwrap();
    let [file] = &stored(&state)[..] else {
        panic!("one list of one authority")
    };
    let der = CertificateRevocationListDer::from_pem_slice(pem.as_bytes());
    assert_eq!(fs::read(file).unwrap(), der.unwrap().as_ref());
    let mode = fs::metadata(file).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

/// A changed list may hide a revocation, so the broker neither ignores nor uses the list.
#[test]
fn a_stored_list_that_was_changed_stops_the_start() {
    let site = Site::fresh();
    let state = StateDirectory::at(&site.path("state"));
    let start = || site.try_load_with(Some(&state));
    site.write("crl", &list(&site.ca, &[7], -2, 24));
    start().unwrap().remember_lists().unwrap();
    let file = stored(&state).remove(0);
    let genuine = fs::read(&file).unwrap();
    let forger = authority("CA", &rcgen::PKCS_ECDSA_P256_SHA256);
    let forged = list(&forger, &[], -1, 24);
    let forged = CertificateRevocationListDer::from_pem_slice(forged.as_bytes());
    let mut changed = genuine.clone();
    *changed.last_mut().unwrap() ^= 1;
    for bytes in [&b""[..], &changed, &genuine[1..], &forged.unwrap()] {
        fs::write(&file, bytes).unwrap();
        let refused = start().unwrap_err();
        assert!(refused.contains(file.to_str().unwrap()), "{refused}");
        assert!(refused.contains("\"CN=CA\" signed"), "{refused}");
    }
    fs::write(&file, genuine).unwrap();
    start().unwrap();
}

#[test]
fn a_list_that_could_not_be_stored_is_stored_later() {
    let site = Site::fresh();
    let state = StateDirectory::at(&site.path("state"));
    site.write("crl", &list(&site.ca, &[7], -3, 24));
    let tls = site.try_load_with(Some(&state)).unwrap();
    site.write("state", "no directory");
    site.write("crl", &list(&site.ca, &[7, 8], -2, 24));
    let first = Instant::now();
    assert_eq!(tls.reload_at(first), Look::Evaluated);
    assert!(!Site::verifies(&tls, &site.ca, 8));
    assert!(tls.unstored.lock().unwrap().is_some());
    fs::remove_file(site.path("state")).unwrap();
    assert_eq!(tls.reload_at(first + RETRY_AFTER), Look::Evaluated);
    assert_eq!(*tls.unstored.lock().unwrap(), None);
    assert_eq!(stored(&state).len(), 1);
}

/// A script may combine the lists of several authorities and damage one of the lists.
#[test]
fn a_damaged_block_withholds_no_other_list_and_no_start() {
    let site = Site::fresh();
    let state = StateDirectory::at(&site.path("state"));
    let other = authority("other CA", &rcgen::PKCS_ECDSA_P256_SHA256);
    site.write("ca", &format!("{}{}", site.ca.pem(), other.pem()));
    let of_other = numbered(&other, 20, &[9], -3, 24);
    let own = numbered(&site.ca, 1, &[], -3, 24);
    site.write("crl", &format!("{own}{of_other}"));
    let tls = site.try_load_with(Some(&state)).unwrap();
    tls.remember_lists().unwrap();
    let truncated = &of_other[..of_other.len() / 2];
    let damaged = [
        (
            of_other.replace("\nMI", "\n!!"),
            "block 1: the block X509 CRL",
        ),
        (format!("{truncated}\n"), "has no END line"),
        (
            of_other.replace("-----BEGIN", "----BEGIN"),
            "looks like a BEGIN",
        ),
        (other.pem(), "does not belong"),
        (
            of_other.replace("\nMI", "\nMA"),
            "cannot be parsed: block 1",
        ),
    ];
    for (round, (damaged, words)) in (2_u64..).zip(damaged) {
        let serials: Vec<u64> = (100..100 + round).collect();
        let newer = numbered(&site.ca, round, &serials, -2, 24);
        site.write("crl", &format!("{damaged}{newer}"));
        tls.reload();
        for tls in [&tls, &site.try_load_with(Some(&state)).unwrap()] {
            let reported = left_out(tls).unwrap();
            assert!(reported.contains(words), "{words}: {reported}");
            assert!(
                reported.contains("no longer has a list of \"CN=other CA\""),
                "{reported}"
            );
            assert!(!Site::verifies(tls, &site.ca, 99 + round), "{words}");
            assert!(!Site::verifies(tls, &other, 9), "{words}");
            assert!(Site::verifies(tls, &other, 8), "{words}");
        }
        // Without an accepted list, the listener cannot start.
        let empty = StateDirectory::at(&site.path("no-state"));
        site.try_load_with(Some(&empty)).unwrap_err();
        site.try_load().unwrap_err();
    }
}

#[test]
fn a_file_of_lists_that_is_too_long_withholds_no_start() {
    let site = Site::fresh();
    let state = StateDirectory::at(&site.path("state"));
    let good = list(&site.ca, &[7], -3, 24);
    site.write("crl", &good);
    let tls = site.try_load_with(Some(&state)).unwrap();
    tls.remember_lists().unwrap();
    let file = fs::File::options().write(true).open(site.path("crl"));
    file.unwrap().set_len(LISTS_BYTES_MAX + 1).unwrap();
    tls.reload();
    for tls in [&tls, &site.try_load_with(Some(&state)).unwrap()] {
        let reported = left_out(tls).unwrap();
        assert!(
            reported.contains("is longer than 67108864 bytes"),
            "{reported}"
        );
        assert!(!Site::verifies(tls, &site.ca, 7));
        assert!(Site::verifies(tls, &site.ca, 8));
    }
    let refused = site.try_load().unwrap_err();
    assert!(refused.contains("is longer than"), "{refused}");
    site.write("crl", &good);
    tls.reload();
    assert_eq!(left_out(&tls), None);
}

/// An authority is removed from the configuration, and later configured again with an older list.
#[test]
fn the_newest_list_of_a_removed_authority_is_remembered() {
    let site = Site::fresh();
    let state = StateDirectory::at(&site.path("state"));
    let other = authority("other CA", &rcgen::PKCS_ECDSA_P256_SHA256);
    let newest = numbered(&site.ca, 300, &[7], -2, 24);
    site.write("crl", &newest);
    let tls = site.try_load_with(Some(&state)).unwrap();
    tls.remember_lists().unwrap();
    site.write("ca", &other.pem());
    site.write("crl", &list(&other, &[], -2, 24));
    tls.reload();
    assert_eq!(*tls.refused.lock().unwrap(), None);
    assert_eq!(
        left_out(&tls),
        None,
        "an authority that was removed on purpose"
    );
    site.write("ca", &site.ca.pem());
    site.write("crl", &numbered(&site.ca, 299, &[], -2, 24));
    tls.reload();
    assert_eq!(*tls.refused.lock().unwrap(), None);
    let refused = left_out(&tls).unwrap();
    assert!(
        refused.contains("accepted list (number 0x012c"),
        "{refused}"
    );
    assert!(!Site::verifies(&tls, &site.ca, 7));
    site.write("crl", &newest);
    tls.reload();
    assert_eq!(left_out(&tls), None);
}

/// Neither listener may overwrite the lists that the other listener stored.
#[test]
fn two_listeners_with_one_file_of_lists_remember_the_lists_of_their_own_authorities() {
    let site = Site::fresh();
    let state = StateDirectory::at(&site.path("state"));
    let other = authority("other CA", &rcgen::PKCS_ECDSA_P256_SHA256);
    site.write("other-ca", &other.pem());
    let start = |ca: &str| site.try_load_of(ca, Some(&state)).unwrap();
    let newest = [
        numbered(&site.ca, 300, &[7], -2, 24),
        numbered(&other, 400, &[9], -2, 24),
    ];
    site.write("crl", &newest.concat());
    for ca in ["ca", "other-ca"] {
        start(ca).remember_lists().unwrap();
    }
    assert_eq!(stored(&state).len(), 2);
    let older = [
        numbered(&site.ca, 299, &[], -3, 24),
        numbered(&other, 399, &[], -3, 24),
    ];
    site.write("crl", &older.concat());
    for (ca, issuer, revoked) in [("ca", &site.ca, 7), ("other-ca", &other, 9)] {
        let tls = start(ca);
        assert!(left_out(&tls).is_some(), "{ca}");
        assert!(!Site::verifies(&tls, issuer, revoked), "{ca}");
        tls.remember_lists().unwrap();
    }
}

/// A listener that read the file before a change must not replace the newer list that another
/// listener stored.
#[test]
fn a_stored_list_is_never_replaced_by_an_older_one() {
    let site = Site::fresh();
    let state = StateDirectory::at(&site.path("state"));
    let start = || site.try_load_with(Some(&state)).unwrap();
    site.write("crl", &numbered(&site.ca, 300, &[7], -3, 24));
    let slower = start();
    site.write("crl", &numbered(&site.ca, 301, &[7, 8], -2, 24));
    start().remember_lists().unwrap();
    slower.remember_lists().unwrap();
    site.write("crl", &numbered(&site.ca, 300, &[7], -3, 24));
    assert!(!Site::verifies(&start(), &site.ca, 8));
}

/// Earlier releases stored only the versions of lists, including the versions of unverified lists.
#[test]
fn what_an_earlier_release_remembered_counts_for_verified_lists() {
    let site = Site::fresh();
    let state = StateDirectory::at(&site.path("state"));
    let start = || site.try_load_with(Some(&state));
    let below = authority("CA below", &rcgen::PKCS_ECDSA_P256_SHA256);
    let id = |authority: &Authority, has_key: bool| {
        let (_, certificate) = X509Certificate::from_der(authority.der()).unwrap();
        let name = certificate.subject().as_raw();
        let mut context = digest::Context::new(&digest::SHA256);
        context.update(&u64::try_from(name.len()).unwrap().to_be_bytes());
        context.update(name);
        if has_key {
            let key = digest::digest(&digest::SHA256, certificate.public_key().raw);
            context.update(key.as_ref());
        }
        hex::encode(context.finish().as_ref())
    };
    let file = digest::digest(
        &digest::SHA256,
        site.path("crl").as_os_str().as_encoded_bytes(),
    );
    let file = format!("client-crl-{}.json", hex::encode(&file.as_ref()[..8]));
    let known = format!(
        r#"[{{"authority":"{}","number":"012c","this_update":1}},{{"authority":"{}","number":"ffff","this_update":4000000000}}]"#,
        id(&site.ca, true),
        id(&below, false),
    );
    state.write(&file, known.as_bytes()).unwrap();

    let of_below = list(&below, &[9], -2, 24);
    site.write(
        "crl",
        &format!("{}{of_below}", numbered(&site.ca, 299, &[], -2, 24)),
    );
    let refused = start().unwrap_err();
    assert!(
        refused.contains("accepted list (number 0x012c") && refused.contains(&file),
        "{refused}"
    );
    site.write(
        "crl",
        &format!("{}{of_below}", numbered(&site.ca, 300, &[7], -2, 24)),
    );
    let tls = start().unwrap();
    assert_eq!(left_out(&tls), None);
    assert_eq!(tls.contents().revocation_lists, 2);
    // Now a list is stored.
    tls.remember_lists().unwrap();
    site.write("crl", &numbered(&site.ca, 299, &[], -2, 24));
    assert!(!Site::verifies(&start().unwrap(), &site.ca, 7));
    // A malformed state file is an error, and does not count as an empty state file.
    for damaged in [
        "[{}]",
        "[{\"authority\":\"x\",\"number\":null,\"this_update\":1}]",
    ] {
        state.write(&file, damaged.as_bytes()).unwrap();
        let refused = start().unwrap_err();
        assert!(refused.contains(&file), "{refused}");
    }
}

/// Over time, authorities are removed, and distribution points get other names.
#[test]
fn the_state_directory_does_not_fill_up_with_lists_that_are_not_needed() {
    let site = Site::fresh();
    let state = StateDirectory::at(&site.path("state"));
    let start = || site.try_load_with(Some(&state)).unwrap();
    site.write("crl", &list(&site.ca, &[7], -3, 24));
    start().remember_lists().unwrap();
    let [needed] = &stored(&state)[..] else {
        panic!("one list of one authority")
    };
    let (prefix, _) = needed
        .to_str()
        .unwrap()
        .rsplit_once("/client-crl-")
        .unwrap();
    let file = needed.file_name().unwrap().to_str().unwrap();
    let file: Vec<&str> = file.split('-').collect();
    let path = |number: u32| {
        let name = format!("client-crl-{}-{number:016x}-all.der", file[2]);
        Path::new(prefix).join(name)
    };
    // Another listener uses the same file of lists with other authorities.
    for valid in 0..10 {
        fs::copy(needed, path(valid)).unwrap();
    }
    let ended = list(&site.ca, &[7], -3, -2);
    let ended = CertificateRevocationListDer::from_pem_slice(ended.as_bytes()).unwrap();
    for former in 10..200 {
        // The copy has the file mode that the state directory requires.
        fs::copy(needed, path(former)).unwrap();
        fs::write(path(former), &ended).unwrap();
    }
    site.write("crl", &list(&site.ca, &[7, 8], -2, 24));
    start().remember_lists().unwrap();
    assert_eq!(stored(&state).len(), 128);
    assert!(needed.exists());
    assert!((0..10).all(|valid| path(valid).exists()));
    fs::write(site.path("crl"), "").unwrap();
    assert!(!Site::verifies(&start(), &site.ca, 8));
}
