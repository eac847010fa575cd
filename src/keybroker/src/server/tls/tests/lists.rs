//! Tests which lists of a file of revocation lists are used.

use rustls_pki_types::CertificateRevocationListDer;

use super::*;

#[test]
fn lists_of_each_kind_of_key_are_verified() {
    for algorithm in [
        &rcgen::PKCS_ECDSA_P256_SHA256,
        &rcgen::PKCS_ECDSA_P384_SHA384,
        &rcgen::PKCS_ED25519,
        &rcgen::PKCS_RSA_SHA256,
        &rcgen::PKCS_ECDSA_P521_SHA512,
    ] {
        let ca = authority("CA", algorithm);
        assert!(
            read(&list(&ca, &[7], -1, 24), &[&ca]).is_ok(),
            "{algorithm:?}"
        );
    }
}

#[test]
fn a_list_that_proves_nothing_is_not_taken_over() {
    let ca = authority("CA", &rcgen::PKCS_ECDSA_P256_SHA256);
    let namesake = authority("CA", &rcgen::PKCS_ECDSA_P256_SHA256);
    let other = authority("other CA", &rcgen::PKCS_ECDSA_P256_SHA256);
    let good = list(&ca, &[], -1, 24);
    for (pem, authorities, words) in [
        (String::new(), vec![&ca], "no list of"),
        ("nonsense".to_owned(), vec![&ca], "no list of"),
        (good.replace("\nMI", "\nMA"), vec![&ca], "cannot be parsed"),
        (list(&other, &[], -1, 24), vec![&ca], "no list of"),
        (
            list(&namesake, &[], -1, 24),
            vec![&ca],
            "this CA did not sign",
        ),
        (good.clone(), vec![&ca, &other], "no list of"),
        (list(&ca, &[], -2, -1), vec![&ca], "expired on"),
        (list(&ca, &[], 1, 24), vec![&ca], "not valid before"),
        (
            format!("{good}{}", list(&other, &[], -2, -1)),
            vec![&ca, &other],
            "expired on",
        ),
    ] {
        let problem = read(&pem, &authorities).unwrap_err();
        assert!(problem.contains(words), "{words}: {problem}");
    }
    let both = format!("{good}{}", list(&other, &[], -1, 24));
    assert_eq!(read(&both, &[&ca, &other]).unwrap().count(), 2);
}

/// The file contains a list that the CA signed and a newer list that the CA did not sign. If the
/// verifier used the newer list, every client would be rejected.
#[test]
fn each_list_of_a_file_is_verified_and_the_bad_one_is_named() {
    let ca = authority("CA", &rcgen::PKCS_ECDSA_P256_SHA256);
    let namesake = authority("CA", &rcgen::PKCS_ECDSA_P256_SHA256);
    let good = numbered(&ca, 16, &[], -2, 24);
    let unsigned = numbered(&namesake, 17, &[], -1, 24);
    for pem in [format!("{good}{unsigned}"), format!("{unsigned}{good}")] {
        let lists = read(&pem, &[&ca]).unwrap();
        let problem = lists.left_out().unwrap();
        assert!(
            problem.contains("\"CN=CA\" (number 0x11 of")
                && problem.contains("this CA did not sign"),
            "{problem}"
        );
        assert_eq!(lists.count(), 1);
        assert_eq!(read(&pem, &[&ca, &namesake]).unwrap().count(), 2);
    }
}

/// The handshake verifies the lists of an intermediate authority, and uses only one list for each
/// name.
#[test]
fn two_lists_that_cannot_be_verified_are_not_told_apart_by_their_numbers() {
    let ca = authority("CA", &rcgen::PKCS_ECDSA_P256_SHA256);
    let (below, forger) = (
        authority("CA below", &rcgen::PKCS_ECDSA_P256_SHA256),
        authority("CA below", &rcgen::PKCS_ECDSA_P256_SHA256),
    );
    let own = list(&ca, &[], -1, 24);
    let good = numbered(&below, 16, &[7], -2, 24);
    let forged = numbered(&forger, 17, &[], -1, 24);
    for pem in [
        format!("{own}{good}{forged}"),
        format!("{forged}{own}{good}"),
    ] {
        let lists = read(&pem, &[&ca]).unwrap();
        assert_eq!(lists.count(), 1, "only the list of the configured CA");
        let problem = lists.left_out().unwrap();
        for words in [
            "more than one list of the CA \"CN=CA below\"",
            "client_ca_file",
        ] {
            assert!(problem.contains(words), "{problem}");
        }
    }
    for pem in [format!("{own}{good}"), format!("{own}{good}{good}")] {
        assert_eq!(read(&pem, &[&ca]).unwrap().left_out(), None);
    }
}

#[test]
fn a_list_in_der_is_read() {
    let ca = authority("CA", &rcgen::PKCS_ECDSA_P256_SHA256);
    let pem = list(&ca, &[7], -1, 24);
    let der = CertificateRevocationListDer::from_pem_slice(pem.as_bytes());
    let der = der.unwrap().to_vec();
    let read = |bytes: &[u8]| {
        let authorities = [ca.der().clone()];
        follow(bytes, &authorities, &Memory::default(), None, now())
    };
    assert_eq!(read(&der).unwrap().count(), 1);
    let twice = [&der[..], &der].concat();
    let problem = read(&twice).unwrap_err();
    assert!(problem.contains("more bytes after"), "{problem}");
    let problem = read(&der[..der.len() - 1]).unwrap_err();
    assert!(problem.contains("neither PEM nor"), "{problem}");
}

/// The program `openssl` makes signatures that the other tests cannot make.
#[test]
fn lists_signed_with_rsa_pss_are_verified_and_an_unsupported_algorithm_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let openssl = |line: &str| {
        let mut command = std::process::Command::new("openssl");
        let made = command
            .args(line.split(' '))
            .current_dir(folder.path())
            .output();
        let made = made.unwrap();
        assert!(made.status.success(), "{line}: {made:?}");
    };
    fs::write(folder.path().join("index"), "").unwrap();
    fs::write(folder.path().join("number"), "01\n").unwrap();
    let configuration = "[ca]\ndefault_ca = it\n[it]\ndatabase = index\ncrlnumber = number\n\
                         certificate = ca\nprivate_key = key\ndefault_md = sha256\ndefault_crl_days = 7\n";
    fs::write(folder.path().join("conf"), configuration).unwrap();
    openssl("req -x509 -newkey rsa:2048 -noenc -keyout key -out ca -days 9 -subj /CN=CA");
    let pss = "-sigopt rsa_padding_mode:pss -sigopt rsa_pss_saltlen:";
    openssl(&format!("ca -config conf -gencrl -out good {pss}32"));
    // The TLS handshake does not support SHA-224.
    openssl("ca -config conf -gencrl -out odd -md sha224");
    let ca = fs::read(folder.path().join("ca")).unwrap();
    let ca = CertificateDer::from_pem_slice(&ca).unwrap();
    let read = |bytes: &[u8]| {
        let authorities = std::slice::from_ref(&ca);
        follow(bytes, authorities, &Memory::default(), None, now())
    };
    let of = |name: &str| read(&fs::read(folder.path().join(name)).unwrap());
    of("good").unwrap();
    let problem = of("odd").unwrap_err();
    assert!(problem.contains("is not supported"), "{problem}");
    // The signature is wrong, but its algorithm is supported.
    let changed = fs::read_to_string(folder.path().join("good")).unwrap();
    let mut der = CertificateRevocationListDer::from_pem_slice(changed.as_bytes())
        .unwrap()
        .to_vec();
    *der.last_mut().unwrap() ^= 1;
    let problem = read(&der).unwrap_err();
    assert!(problem.contains("this CA did not sign"), "{problem}");
}

#[test]
fn of_two_lists_the_newest_counts() {
    let ca = authority("CA", &rcgen::PKCS_ECDSA_P256_SHA256);
    let (old, new) = (list(&ca, &[], -9, 24), list(&ca, &[7], -1, 24));
    for pem in [format!("{old}{new}"), format!("{new}{old}")] {
        let lists = read(&pem, &[&ca]).unwrap();
        let newest = CertificateRevocationListDer::from_pem_slice(new.as_bytes()).unwrap();
        assert_eq!(lists.by_verifier()[0][0], newest);
    }
}

#[test]
fn a_list_is_late_in_the_last_part_of_its_life() {
    let ca = authority("CA", &rcgen::PKCS_ECDSA_P256_SHA256);
    let life = read(&list(&ca, &[], -1, 7), &[&ca])
        .unwrap()
        .life()
        .unwrap();
    let hour = 3_600;
    assert_eq!(life.age(life.until - 3 * hour), Age::Good);
    assert_eq!(life.age(life.until - hour), Age::Late);
    assert_eq!(life.age(life.until + 1), Age::Over);
}

/// The file contains the list of an unrelated authority instead of the expected list.
#[test]
fn a_list_that_is_missing_is_reported_and_kept_until_it_ends() {
    let site = Site::fresh();
    let other = authority("other CA", &rcgen::PKCS_ECDSA_P256_SHA256);
    let below = authority("CA below", &rcgen::PKCS_ECDSA_P256_SHA256);
    let unrelated = authority("unrelated CA", &rcgen::PKCS_ECDSA_P256_SHA256);
    let authorities = [site.ca.der().clone(), other.der().clone()];
    let own = list(&site.ca, &[7], -2, 24);
    let lasting = list(&other, &[], -2, 48);
    let of_below = list(&below, &[9], -2, 24);
    let in_place = list(&unrelated, &[], -1, 48);
    let mut memory = Memory::default();
    let all = format!("{own}{lasting}{of_below}");
    let first = follow(all.as_bytes(), &authorities, &memory, None, now()).unwrap();
    assert_eq!((first.count(), first.left_out()), (3, None));
    memory.accept(&first);
    let day = 25 * SECONDS_PER_HOUR;
    for (text, missing) in [
        (format!("{own}{lasting}{in_place}"), "CN=CA below"),
        (format!("{in_place}{lasting}{of_below}"), "CN=CA"),
    ] {
        let read = |now| follow(text.as_bytes(), &authorities, &memory, Some(&first), now).unwrap();
        let kept = read(now());
        assert_eq!(kept.count(), 4, "{missing}");
        assert_eq!(kept.problem_count(), 1);
        let words = format!("no longer has a list of \"{missing}\"");
        let reported = kept.left_out().unwrap();
        assert!(reported.contains(&words), "{reported}");
    }
    // A damaged block may be the list of any authority.
    let damaged = of_below.replace("\nMI", "\n!!");
    let text = format!("{own}{lasting}{damaged}");
    let kept = follow(text.as_bytes(), &authorities, &memory, Some(&first), now()).unwrap();
    assert_eq!((kept.count(), kept.problem_count()), (3, 2));
    // After its expiry, the list covers no certificate, and the clients of its authority are
    // rejected.
    let kept = follow(
        lasting.as_bytes(),
        &authorities,
        &memory,
        Some(&first),
        now() + day,
    );
    let kept = kept.unwrap();
    assert_eq!(
        kept.count(),
        2,
        "the ended list of a configured CA, but none that is not verified"
    );
    assert!(kept.life().unwrap().until < now() + day);
    // When the broker starts, no list is in use.
    let refused = follow(lasting.as_bytes(), &authorities, &memory, None, now() + day);
    assert!(refused.unwrap_err().contains("no list of \"CN=CA\""));
}

/// Without a limit, an attacker who repeatedly replaces the file could fill the memory with lists
/// that do not expire for a long time.
#[test]
fn missing_lists_of_unknown_authorities_are_kept_only_up_to_a_limit() {
    let ca = authority("CA", &rcgen::PKCS_ECDSA_P256_SHA256);
    let authorities = [ca.der().clone()];
    let own = list(&ca, &[7], -2, 24);
    let unknown = |name: &str| {
        let names = (0..70).map(|n| format!("{name} {n}"));
        let lists = names.map(|name| {
            let unknown = authority(&name, &rcgen::PKCS_ECDSA_P256_SHA256);
            list(&unknown, &[], -2, 24)
        });
        lists.collect::<String>()
    };
    let mut in_use = None;
    let mut counts = Vec::new();
    for text in [
        unknown("first"),
        unknown("second"),
        unknown("third"),
        String::new(),
    ] {
        let text = format!("{own}{text}");
        let memory = Memory::default();
        let lists = follow(
            text.as_bytes(),
            &authorities,
            &memory,
            in_use.as_ref(),
            now(),
        )
        .unwrap();
        counts.push((lists.count(), lists.problem_count()));
        in_use = Some(lists);
    }
    assert_eq!(counts, [(71, 0), (141, 70), (199, 140), (129, 198)]);
}

#[test]
fn the_problem_of_a_configured_authority_is_reported_before_others() {
    let ca = authority("CA", &rcgen::PKCS_ECDSA_P256_SHA256);
    let other = authority("other CA", &rcgen::PKCS_ECDSA_P256_SHA256);
    let authorities = [ca.der().clone(), other.der().clone()];
    let mut memory = Memory::default();
    let (own, of_other) = (list(&ca, &[], -2, 24), list(&other, &[], -2, 24));
    let read = |text: &str, memory: &Memory| {
        follow(text.as_bytes(), &authorities, memory, None, now()).unwrap()
    };
    memory.accept(&read(&format!("{own}{of_other}"), &memory));
    let damaged = own.replace("\nMI", "\n!!").repeat(9);
    let reported = read(&format!("{damaged}{own}"), &memory)
        .left_out()
        .unwrap();
    let first = "the file no longer has a list of \"CN=other CA\"";
    assert!(reported.starts_with(first), "{reported}");
    assert!(reported.ends_with("and 5 more"), "{reported}");
}

/// A list that covers only the certificates with the given distribution point.
fn partial(authority: &Authority, number: u64, revoked: &[u64], point: &str, from: i64) -> String {
    signed(authority, Some(point), number, revoked, from, 24)
}

/// An authority may issue a separate list for each part of its certificates. A newer list of
/// another part must not hide that a list is older than the accepted list of its part.
#[test]
fn each_partial_list_of_an_authority_has_a_number_of_its_own() {
    let ca = authority("CA", &rcgen::PKCS_ECDSA_P256_SHA256);
    let authorities = [ca.der().clone()];
    let (one, two) = ("http://crl.example/1", "http://crl.example/2");
    let mut memory = Memory::default();
    let read = |text: &str, memory: &Memory| {
        follow(text.as_bytes(), &authorities, memory, None, now()).unwrap()
    };
    let (first, second) = (
        partial(&ca, 10, &[7], one, -4),
        partial(&ca, 500, &[8], two, -2),
    );
    let both = read(&format!("{first}{second}"), &memory);
    assert_eq!((both.count(), both.left_out()), (2, None));
    memory.accept(&both);
    let newer = partial(&ca, 11, &[7, 9], one, -3);
    assert_eq!(read(&format!("{newer}{second}"), &memory).left_out(), None);
    let older = partial(&ca, 9, &[], one, -5);
    let reported = read(&format!("{older}{second}"), &memory)
        .left_out()
        .unwrap();
    assert!(
        reported.contains("accepted list (number 0x0a"),
        "{reported}"
    );
    let missing = read(&second, &memory);
    assert_eq!((missing.count(), missing.problem_count()), (2, 1));
    // The first list for a part of the certificates may be an old list of the authority.
    let three = "http://crl.example/3";
    for (from, problems) in [(-9, 1), (-1, 0)] {
        let added = partial(&ca, 1, &[], three, from);
        let read = read(&format!("{first}{second}{added}"), &memory);
        assert_eq!(read.problem_count(), problems, "{from}");
    }
}
