//! Files of a listener that change, and lists of revoked certificates that must not be taken over.

use std::{fs, path::PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DnType,
    IsCa, KeyPair, KeyUsagePurpose, RevokedCertParams, SerialNumber,
};
use rustls_pki_types::pem::PemObject as _;
use time::{Duration, OffsetDateTime};

use super::*;

type Authority = CertifiedIssuer<'static, KeyPair>;

fn authority(name: &str, algorithm: &'static rcgen::SignatureAlgorithm) -> Authority {
    let mut parameters = CertificateParams::new(Vec::new()).unwrap();
    parameters.distinguished_name.push(DnType::CommonName, name);
    parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let key = KeyPair::generate_for(algorithm).unwrap();
    CertifiedIssuer::self_signed(parameters, key).unwrap()
}

/// A list of that authority, in PEM, from and until so many hours from now.
fn list(authority: &Authority, revoked: &[u64], from: i64, until: i64) -> String {
    numbered(authority, 1, revoked, from, until)
}

/// The same with that number.
fn numbered(authority: &Authority, number: u64, revoked: &[u64], from: i64, until: i64) -> String {
    let now = OffsetDateTime::now_utc();
    let revoked_certs = revoked.iter().map(|serial| RevokedCertParams {
        serial_number: SerialNumber::from(*serial),
        revocation_time: now - Duration::days(9),
        reason_code: None,
        invalidity_date: None,
    });
    let parameters = CertificateRevocationListParams {
        this_update: now + Duration::hours(from),
        next_update: now + Duration::hours(until),
        crl_number: SerialNumber::from(number),
        issuing_distribution_point: None,
        revoked_certs: revoked_certs.collect(),
        key_identifier_method: rcgen::KeyIdMethod::Sha256,
    };
    parameters.signed_by(authority).unwrap().pem().unwrap()
}

fn read(pem: &str, authorities: &[&Authority]) -> Result<Lists, String> {
    let ders: Vec<CertificateDer<'static>> = authorities
        .iter()
        .map(|authority| authority.der().clone())
        .collect();
    Lists::read(pem.as_bytes(), &ders)
        .and_then(|lists| lists.follow(&Newest::default(), None))
        .map_err(|error| chain(&error))
}

/// Why a reload left out lists, after it was reported.
fn left_out(tls: &Tls) -> Option<String> {
    tls.left_out.lock().unwrap().clone()
}

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
        (good.replace("\nMI", "\nMA"), vec![&ca], "does not parse"),
        (list(&other, &[], -1, 24), vec![&ca], "no list of"),
        (list(&namesake, &[], -1, 24), vec![&ca], "not signed by it"),
        (good.clone(), vec![&ca, &other], "no list of"),
        (list(&ca, &[], -2, -1), vec![&ca], "ended on"),
        (list(&ca, &[], 1, 24), vec![&ca], "not valid before"),
        (
            format!("{good}{}", list(&other, &[], -2, -1)),
            vec![&ca, &other],
            "ended on",
        ),
    ] {
        let problem = read(&pem, &authorities).unwrap_err();
        assert!(problem.contains(words), "{words}: {problem}");
    }
    let both = format!("{good}{}", list(&other, &[], -1, 24));
    assert_eq!(read(&both, &[&ca, &other]).unwrap().count(), 2);
}

/// A list that the CA did not sign, beside one that it did: the verifier would use the newer one, and refuse every client.
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
            problem.contains("\"CN=CA\" (number 0x11 of") && problem.contains("not signed by it"),
            "{problem}"
        );
        assert_eq!(lists.count(), 1);
        assert_eq!(read(&pem, &[&ca, &namesake]).unwrap().count(), 2);
    }
}

/// Signatures of lists of an intermediate authority are verified in the handshake, which uses only the newest list of a name.
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
        for words in ["more than one list of \"CN=CA below\"", "client_ca_file"] {
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
    let der = rustls_pki_types::CertificateRevocationListDer::from_pem_slice(pem.as_bytes());
    let der = der.unwrap().to_vec();
    let authorities = [ca.der().clone()];
    assert_eq!(Lists::read(&der, &authorities).unwrap().count(), 1);
    let twice = [&der[..], &der].concat();
    let problem = Lists::read(&twice, &authorities).unwrap_err().to_string();
    assert!(problem.contains("more bytes after"), "{problem}");
    let problem = Lists::read(&der[..der.len() - 1], &authorities)
        .unwrap_err()
        .to_string();
    assert!(problem.contains("neither PEM nor"), "{problem}");
}

/// `openssl` as the authority, with signatures that the other tests cannot make.
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
    // SHA-224 is not among the algorithms of the handshake.
    openssl("ca -config conf -gencrl -out odd -md sha224");
    let ca = fs::read(folder.path().join("ca")).unwrap();
    let ca = CertificateDer::from_pem_slice(&ca).unwrap();
    let read = |bytes: &[u8]| {
        Lists::read(bytes, std::slice::from_ref(&ca))
            .and_then(|lists| lists.follow(&Newest::default(), None))
    };
    let of = |name: &str| read(&fs::read(folder.path().join(name)).unwrap());
    of("good").unwrap();
    let problem = of("odd").unwrap_err().to_string();
    assert!(problem.contains("is not supported"), "{problem}");
    // Changed, and still of a kind that is known.
    let changed = fs::read_to_string(folder.path().join("good")).unwrap();
    let mut der =
        rustls_pki_types::CertificateRevocationListDer::from_pem_slice(changed.as_bytes())
            .unwrap()
            .to_vec();
    *der.last_mut().unwrap() ^= 1;
    let problem = read(&der).unwrap_err().to_string();
    assert!(problem.contains("not signed by it"), "{problem}");
}

#[test]
fn of_two_lists_the_newest_counts() {
    let ca = authority("CA", &rcgen::PKCS_ECDSA_P256_SHA256);
    let (old, new) = (list(&ca, &[], -9, 24), list(&ca, &[7], -1, 24));
    for pem in [format!("{old}{new}"), format!("{new}{old}")] {
        let lists = read(&pem, &[&ca]).unwrap();
        let newest =
            rustls_pki_types::CertificateRevocationListDer::from_pem_slice(new.as_bytes()).unwrap();
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

/// A listener's files in a separate folder.
struct Site {
    folder: tempfile::TempDir,
    ca: Authority,
}

impl Site {
    fn fresh() -> Self {
        rustls::crypto::aws_lc_rs::default_provider()
            .install_default()
            .ok();
        let site = Self {
            folder: tempfile::tempdir().unwrap(),
            ca: authority("CA", &rcgen::PKCS_ECDSA_P256_SHA256),
        };
        site.write("ca", &site.ca.pem());
        site.renew_server();
        site
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        use std::os::unix::fs::PermissionsExt as _;
        fs::write(self.path(name), text).unwrap();
        fs::set_permissions(self.path(name), fs::Permissions::from_mode(0o600)).unwrap();
    }

    fn renew_server(&self) {
        let key = KeyPair::generate().unwrap();
        let parameters = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        self.write("server", &parameters.self_signed(&key).unwrap().pem());
        self.write("key", &key.serialize_pem());
    }

    /// Whether the listener would accept a client certificate of that CA with that serial number.
    fn verifies(tls: &Tls, ca: &Authority, serial: u64) -> bool {
        let key = KeyPair::generate().unwrap();
        let mut parameters = CertificateParams::new(Vec::new()).unwrap();
        parameters.serial_number = Some(SerialNumber::from(serial));
        parameters.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
        let leaf = parameters.signed_by(&key, ca).unwrap();
        let current = tls.current();
        let files = Files::read(&tls.settings, tls.clients).unwrap();
        let verifier = files.verifier(&tls.settings, tls.clients, current.lists.as_ref());
        let verifier = verifier.unwrap().unwrap();
        let now = rustls_pki_types::UnixTime::now();
        match verifier.verify_client_cert(leaf.der(), &[], now) {
            Ok(_) => true,
            Err(rustls::Error::InvalidCertificate(rustls::CertificateError::Revoked)) => false,
            Err(error) => panic!("{error}"),
        }
    }

    fn load(&self) -> Tls {
        self.try_load().unwrap()
    }

    fn try_load(&self) -> Result<Tls, String> {
        self.try_load_with(None)
    }

    fn try_load_with(&self, state: Option<&StateDirectory>) -> Result<Tls, String> {
        let settings = TlsSettings {
            certificate_file: self.path("server"),
            key_file: self.path("key"),
            client_ca_file: Some(self.path("ca")),
            client_crl_file: Some(self.path("crl")),
            client_auth_usage_required: true,
            trust_domains: BTreeSet::new(),
        };
        Tls::load(
            settings,
            ClientCertificates::Required,
            vec![b"h2".to_vec()],
            state,
        )
        .map_err(|error| chain(&error))
    }
}

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
        "a list made anew revokes nobody"
    );

    site.renew_server();
    tls.reload();
    assert!(!first.outdated.is_cancelled());

    // A connection from before the last two reloads must go as well.
    site.write("crl", &list(&site.ca, &[7, 8], -1, 48));
    tls.reload();
    assert!(first.outdated.is_cancelled());
    assert!(!tls.current().outdated.is_cancelled());
}

/// An older list would accept again what was revoked since.
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
            refused.contains("older list of \"CN=CA\"") && refused.contains("number 0x012c"),
            "{refused}"
        );
    }
    // Beside a good one, the newer of the two counts.
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
    assert!(refused.contains("accepted: number 0x012d"), "{refused}");
}

/// A restart must not re-admit a client whose certificate was revoked: the newest list is remembered by the state directory.
#[test]
fn a_list_that_goes_back_is_refused_after_a_restart_too() {
    let site = Site::fresh();
    let state = StateDirectory::at(&site.path("state"));
    let start = || site.try_load_with(Some(&state));
    site.write("crl", &numbered(&site.ca, 300, &[7], -3, 24));
    start().unwrap().remember_lists().unwrap();
    // What a reload accepts is remembered as well.
    let tls = start().unwrap();
    site.write("crl", &numbered(&site.ca, 301, &[7, 8], -2, 24));
    tls.reload();
    assert_eq!(*tls.refused.lock().unwrap(), None);
    drop(tls);

    for (number, from) in [(300, -3), (300, -1), (301, -3)] {
        site.write("crl", &numbered(&site.ca, number, &[], from, 24));
        let refused = start().unwrap_err();
        assert!(
            refused.contains("accepted: number 0x012d") && refused.contains("client-crl-"),
            "{refused}"
        );
        // Checking the configuration neither reads nor writes the state.
        site.try_load().unwrap();
    }
    for number in [301, 302] {
        site.write("crl", &numbered(&site.ca, number, &[], -2, 24));
        start().unwrap();
    }

    // A state that cannot be understood is reported, and not taken for an empty one.
    let entries = fs::read_dir(state.path()).unwrap();
    let [file] = &entries
        .map(|entry| entry.unwrap().path())
        .collect::<Vec<_>>()[..]
    else {
        panic!("one fact for one file of lists")
    };
    fs::write(file, "[{}]").unwrap();
    let refused = start().unwrap_err();
    assert!(refused.contains(file.to_str().unwrap()), "{refused}");
    // The documented way back.
    fs::remove_file(file).unwrap();
    site.write("crl", &numbered(&site.ca, 1, &[], -4, 24));
    start().unwrap();
}

/// An authority that was removed for a while, and returns with an older list.
#[test]
fn the_newest_list_of_a_removed_authority_is_remembered() {
    let site = Site::fresh();
    let other = authority("other CA", &rcgen::PKCS_ECDSA_P256_SHA256);
    let newest = numbered(&site.ca, 300, &[7], -2, 24);
    site.write("crl", &newest);
    let tls = site.load();
    site.write("ca", &other.pem());
    site.write("crl", &list(&other, &[], -2, 24));
    tls.reload();
    assert_eq!(*tls.refused.lock().unwrap(), None);
    site.write("ca", &site.ca.pem());
    site.write("crl", &numbered(&site.ca, 299, &[], -2, 24));
    tls.reload();
    // The CA has no list in use that it could keep, so the files are refused as a whole.
    let refused = tls.refused.lock().unwrap().clone().unwrap();
    assert!(refused.contains("accepted: number 0x012c"), "{refused}");
    site.write("crl", &newest);
    tls.reload();
    assert_eq!(*tls.refused.lock().unwrap(), None);
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
        // An unchanged file is neither taken over again nor forgotten.
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

/// An attacker between a distribution point and the host can replace a list that only the handshake verifies.
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

    // Its genuine list has a lower number and an earlier date.
    let newer = numbered(&site.ca, 2_000, &[7], -2, 24);
    let genuine = numbered(&below, 0x1001, &[9], -2, 24);
    site.write("crl", &format!("{newer}{genuine}"));
    tls.reload();
    assert_eq!(*tls.refused.lock().unwrap(), None);
    assert_eq!(left_out(&tls), None);
    assert!(!Site::verifies(&tls, &site.ca, 7));
    start().unwrap();

    // Unverified lists that cannot be used are reported, and the rest counts.
    let ended = numbered(&below, 0x1002, &[], -3, -1);
    let two = format!("{genuine}{forged}");
    let damaged = genuine.replace("\nMI", "\nMA");
    for bad in [ended, two, damaged] {
        site.write("crl", &format!("{newer}{bad}"));
        let tls = start().unwrap();
        assert!(left_out(&tls).is_some(), "{bad}");
        assert!(!Site::verifies(&tls, &site.ca, 7));
        assert!(Site::verifies(&tls, &site.ca, 8));
        // A check of the configuration names them.
        site.try_load().unwrap_err();
    }
}

/// Earlier releases remembered the number of a list that was not verified.
#[test]
fn what_an_earlier_release_remembered_of_an_unverified_list_holds_nothing_back() {
    let site = Site::fresh();
    let state = StateDirectory::at(&site.path("state"));
    let start = || site.try_load_with(Some(&state)).unwrap();
    let below = authority("CA below", &rcgen::PKCS_ECDSA_P256_SHA256);
    let own = list(&site.ca, &[7], -2, 24);
    site.write("crl", &own);
    start().remember_lists().unwrap();
    let file = fs::read_dir(state.path()).unwrap().next().unwrap();
    let file = file.unwrap().path();
    let known = fs::read_to_string(&file).unwrap();
    let (_, certificate) = X509Certificate::from_der(below.der()).unwrap();
    let name = certificate.subject().as_raw();
    let mut context = digest::Context::new(&digest::SHA256);
    context.update(&u64::try_from(name.len()).unwrap().to_be_bytes());
    context.update(name);
    let id = hex::encode(context.finish().as_ref());
    let entry = format!(r#"{{"authority":"{id}","number":"ffff","this_update":4000000000}}"#);
    let planted = known.replacen('[', &format!("[{entry},"), 1);
    fs::write(&file, &planted).unwrap();

    site.write("crl", &format!("{own}{}", list(&below, &[9], -2, 24)));
    let tls = start();
    assert_eq!(left_out(&tls), None);
    assert_eq!(tls.contents().revocation_lists, 2);
    tls.remember_lists().unwrap();
    assert_eq!(fs::read_to_string(&file).unwrap(), known);
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
        (numbered(&forger, 21, &[], -1, 24), "not signed by it"),
        (numbered(&other, 21, &[], -3, -1), "ended on"),
        (of_other.replace("\nMI", "\nMA"), "does not parse"),
        (String::new(), "holds no list of \"CN=other CA\""),
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
        // The other authority keeps its list.
        assert!(!Site::verifies(&tls, &other, 9), "{words}");
        assert!(Site::verifies(&tls, &other, 8), "{words}");
    }
}

/// While the key of an authority is replaced, both keys sign certificates and lists under one name.
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

/// A chain of two, the leaf first, and its key.
fn issued(site: &Site) -> (String, String, String) {
    let key = KeyPair::generate().unwrap();
    let parameters = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    let leaf = parameters.signed_by(&key, &site.ca).unwrap();
    (leaf.pem(), site.ca.pem(), key.serialize_pem())
}

/// A file whose blocks are joined, or that begins with a byte order mark, once silently lost one of them.
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
            "file of its own setting",
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
