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
    follow(pem.as_bytes(), &ders, &Memory::default(), None, now())
}

/// What a listener would use of a file at that time.
fn follow(
    bytes: &[u8],
    authorities: &[CertificateDer<'_>],
    memory: &Memory,
    in_use: Option<&Lists>,
    now: i64,
) -> Result<Lists, String> {
    Lists::read(&ListsFile::Content(bytes.to_vec()), authorities, now)
        .and_then(|lists| lists.follow(memory, in_use, now))
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
        let authorities = std::slice::from_ref(&ca);
        follow(bytes, authorities, &Memory::default(), None, now())
    };
    let of = |name: &str| read(&fs::read(folder.path().join(name)).unwrap());
    of("good").unwrap();
    let problem = of("odd").unwrap_err();
    assert!(problem.contains("is not supported"), "{problem}");
    // Changed, and still of a kind that is known.
    let changed = fs::read_to_string(folder.path().join("good")).unwrap();
    let mut der =
        rustls_pki_types::CertificateRevocationListDer::from_pem_slice(changed.as_bytes())
            .unwrap()
            .to_vec();
    *der.last_mut().unwrap() ^= 1;
    let problem = read(&der).unwrap_err();
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
        match Self::verify(tls, ca, serial, &[]) {
            Ok(()) => true,
            Err(rustls::Error::InvalidCertificate(rustls::CertificateError::Revoked)) => false,
            Err(error) => panic!("{error}"),
        }
    }

    /// Why not, with the intermediates that the client sends.
    fn verify(
        tls: &Tls,
        ca: &Authority,
        serial: u64,
        intermediates: &[CertificateDer<'_>],
    ) -> Result<(), rustls::Error> {
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
        let verified = verifier.verify_client_cert(leaf.der(), intermediates, now);
        verified.map(drop)
    }

    fn load(&self) -> Tls {
        self.try_load().unwrap()
    }

    fn try_load(&self) -> Result<Tls, String> {
        self.try_load_with(None)
    }

    fn try_load_with(&self, state: Option<&StateDirectory>) -> Result<Tls, String> {
        self.try_load_of("ca", state)
    }

    /// A listener with other authorities and the same other files.
    fn try_load_of(&self, ca: &str, state: Option<&StateDirectory>) -> Result<Tls, String> {
        let issuers = self.path("issuers");
        let settings = TlsSettings {
            certificate_file: self.path("server"),
            key_file: self.path("key"),
            client_ca_file: Some(self.path(ca)),
            client_crl_file: Some(self.path("crl")),
            client_crl_issuers_file: issuers.exists().then_some(issuers),
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
        let tls = start().unwrap();
        let refused = left_out(&tls).unwrap();
        assert!(
            refused.contains("accepted: number 0x012d") && refused.contains("client-crl-"),
            "{refused}"
        );
        assert!(!Site::verifies(&tls, &site.ca, 8), "{number} {from}");
        // It does not take the place of the accepted one.
        tls.remember_lists().unwrap();
        // Checking the configuration neither reads nor writes the state.
        site.try_load().unwrap();
    }
    for number in [301, 302] {
        site.write("crl", &numbered(&site.ca, number, &[], -2, 24));
        assert_eq!(left_out(&start().unwrap()), None);
    }

    // The documented way back.
    let [file] = &stored(&state)[..] else {
        panic!("one list of one authority")
    };
    fs::remove_file(file).unwrap();
    site.write("crl", &numbered(&site.ca, 1, &[], -4, 24));
    assert_eq!(left_out(&start().unwrap()), None);
}

/// The accepted lists in the state directory.
fn stored(state: &StateDirectory) -> Vec<PathBuf> {
    let entries = fs::read_dir(state.path()).unwrap();
    entries.map(|entry| entry.unwrap().path()).collect()
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
    let der = rustls_pki_types::CertificateRevocationListDer::from_pem_slice(pem.as_bytes());
    assert_eq!(fs::read(file).unwrap(), der.unwrap().as_ref());
    let mode = fs::metadata(file).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

/// Neither ignored nor used: it may have been changed to hide a revocation.
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
    let forged = rustls_pki_types::CertificateRevocationListDer::from_pem_slice(forged.as_bytes());
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

/// A file with a problem was parsed again each second, which takes long for a large one.
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
        // An operator who asks for it does not wait.
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

/// Lists of several authorities are often put together by a script, and one of them is damaged on the way.
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
        (of_other.replace("\nMI", "\nMA"), "does not parse: block 1"),
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
                reported.contains("no longer holds a list of \"CN=other CA\""),
                "{reported}"
            );
            assert!(!Site::verifies(tls, &site.ca, 99 + round), "{words}");
            assert!(!Site::verifies(tls, &other, 9), "{words}");
            assert!(Site::verifies(tls, &other, 8), "{words}");
        }
        // Without an accepted list there is nothing to serve with.
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

/// An authority that was removed for a while, and returns with an older list.
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
    assert!(refused.contains("accepted: number 0x012c"), "{refused}");
    assert!(!Site::verifies(&tls, &site.ca, 7));
    site.write("crl", &newest);
    tls.reload();
    assert_eq!(left_out(&tls), None);
}

/// Each listener overwrote what the other one had remembered.
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

/// A listener that looked at the file before it changed must not store what the other one has replaced meanwhile.
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

/// The file has a list of somebody else where that of an authority was: its clients were refused without a word.
#[test]
fn a_list_that_is_missing_is_reported_and_kept_until_it_ends() {
    let site = Site::fresh();
    let other = authority("other CA", &rcgen::PKCS_ECDSA_P256_SHA256);
    let below = authority("CA below", &rcgen::PKCS_ECDSA_P256_SHA256);
    let stranger = authority("unrelated CA", &rcgen::PKCS_ECDSA_P256_SHA256);
    let authorities = [site.ca.der().clone(), other.der().clone()];
    let own = list(&site.ca, &[7], -2, 24);
    let lasting = list(&other, &[], -2, 48);
    let of_below = list(&below, &[9], -2, 24);
    let in_place = list(&stranger, &[], -1, 48);
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
        let words = format!("no longer holds a list of \"{missing}\"");
        let reported = kept.left_out().unwrap();
        assert!(reported.contains(&words), "{reported}");
    }
    // A part that cannot be read may be any list.
    let damaged = of_below.replace("\nMI", "\n!!");
    let text = format!("{own}{lasting}{damaged}");
    let kept = follow(text.as_bytes(), &authorities, &memory, Some(&first), now()).unwrap();
    assert_eq!((kept.count(), kept.problem_count()), (3, 2));
    // After its end it covers no certificate, and its authority's clients are refused.
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
    // At a start there is no list in use.
    let refused = follow(lasting.as_bytes(), &authorities, &memory, None, now() + day);
    assert!(refused.unwrap_err().contains("no list of \"CN=CA\""));
}

/// The list that covers only the certificates with that distribution point.
fn partial(authority: &Authority, number: u64, revoked: &[u64], point: &str, from: i64) -> String {
    let now = OffsetDateTime::now_utc();
    let revoked_certs = revoked.iter().map(|serial| RevokedCertParams {
        serial_number: SerialNumber::from(*serial),
        revocation_time: now - Duration::days(9),
        reason_code: None,
        invalidity_date: None,
    });
    let parameters = CertificateRevocationListParams {
        this_update: now + Duration::hours(from),
        next_update: now + Duration::hours(24),
        crl_number: SerialNumber::from(number),
        issuing_distribution_point: Some(rcgen::CrlIssuingDistributionPoint {
            distribution_point: rcgen::CrlDistributionPoint {
                uris: vec![point.to_owned()],
            },
            scope: None,
        }),
        revoked_certs: revoked_certs.collect(),
        key_identifier_method: rcgen::KeyIdMethod::Sha256,
    };
    parameters.signed_by(authority).unwrap().pem().unwrap()
}

/// An authority may make a list for each part of its certificates. An older one of them was accepted beside a newer list of
/// another part.
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
    assert!(reported.contains("accepted: number 0x0a"), "{reported}");
    let missing = read(&second, &memory);
    assert_eq!((missing.count(), missing.problem_count()), (2, 1));
    // The first list for certificates that had none: it may be an old one of the authority.
    let three = "http://crl.example/3";
    for (from, problems) in [(-9, 1), (-1, 0)] {
        let added = partial(&ca, 1, &[], three, from);
        let read = read(&format!("{first}{second}{added}"), &memory);
        assert_eq!(read.problem_count(), problems, "{from}");
    }
}

/// An intermediate CA whose lists are verified without making it a trust anchor.
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
        (numbered(&forger, 21, &[], -1, 24), "not signed by it"),
        (numbered(&below, 19, &[], -4, 24), "older list"),
        (String::new(), "no longer holds"),
    ] {
        site.write("crl", &format!("{root}{bad}"));
        tls.reload();
        for tls in [&tls, &start().unwrap()] {
            let reported = left_out(tls).unwrap();
            assert!(reported.contains(words), "{words}: {reported}");
            Site::verify(tls, &below, 9, &sent).unwrap_err();
            Site::verify(tls, &below, 8, &sent).unwrap();
            // It is no trust anchor.
            Site::verify(tls, &below, 8, &[]).unwrap_err();
        }
    }
    // Its own certificate can be revoked.
    let newer = numbered(&site.ca, 2, &[5], -1, 24);
    site.write("crl", &format!("{newer}{genuine}"));
    tls.reload();
    assert_eq!(left_out(&tls), None);
    Site::verify(&tls, &below, 8, &sent).unwrap_err();
    // Without its certificate, its list is not kept either.
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

/// Earlier releases stored only versions, also those of lists that were not verified.
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
        refused.contains("accepted: number 0x012c") && refused.contains(&file),
        "{refused}"
    );
    site.write(
        "crl",
        &format!("{}{of_below}", numbered(&site.ca, 300, &[7], -2, 24)),
    );
    let tls = start().unwrap();
    assert_eq!(left_out(&tls), None);
    assert_eq!(tls.contents().revocation_lists, 2);
    // From now on there is a list to serve with.
    tls.remember_lists().unwrap();
    site.write("crl", &numbered(&site.ca, 299, &[], -2, 24));
    assert!(!Site::verifies(&start().unwrap(), &site.ca, 7));
    // A state that cannot be understood is reported, and not taken for an empty one.
    for damaged in [
        "[{}]",
        "[{\"authority\":\"x\",\"number\":null,\"this_update\":1}]",
    ] {
        state.write(&file, damaged.as_bytes()).unwrap();
        let refused = start().unwrap_err();
        assert!(refused.contains(&file), "{refused}");
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
        (numbered(&forger, 21, &[], -1, 24), "not signed by it"),
        (numbered(&other, 21, &[], -3, -1), "ended on"),
        (of_other.replace("\nMI", "\nMA"), "does not parse"),
        (String::new(), "no longer holds a list of \"CN=other CA\""),
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
