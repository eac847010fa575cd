//! Tests with files in the forms that editors, shells and other tools write.

use rcgen::{CertificateParams, CertifiedIssuer, KeyPair};

use super::*;

fn certificate() -> String {
    let key = KeyPair::generate().unwrap();
    CertifiedIssuer::self_signed(CertificateParams::new(vec!["a".to_owned()]).unwrap(), key)
        .unwrap()
        .pem()
        .replace('\r', "")
}

fn key() -> String {
    KeyPair::generate()
        .unwrap()
        .serialize_pem()
        .replace('\r', "")
}

#[track_caller]
fn two_are_read(text: &str) {
    for read in [certificates, chain] {
        let found = read(text.as_bytes()).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(found.len(), 2, "{text}");
        assert_ne!(found[0], found[1]);
        assert_eq!(read(encode(&found).as_bytes()).unwrap(), found);
    }
}

#[test]
fn every_block_is_read_however_the_file_was_written() {
    let (a, b) = (certificate(), certificate());
    let both = format!("{a}{b}");
    two_are_read(&both);
    two_are_read(&format!("\u{feff}{both}"));
    two_are_read(&both.replace('\n', "\r\n"));
    two_are_read(&both.replace('\n', " "));
    two_are_read(both.trim_end());
    // The join of two files by `printf '%s%s\n' "$(cat a.pem)" "$(cat b.pem)"`.
    two_are_read(&format!("{}{}\n", a.trim_end(), b.trim_end()));
    two_are_read(&format!(
        "# first\n{a}\nSubject: CN = b - BEGINS here\nn\u{e4}chste: \u{2014}\n{b}# end\n"
    ));
    two_are_read(&format!("    {}", both.replace('\n', "\n    ")));
}

#[test]
fn a_file_that_would_be_half_read_is_refused_with_its_line() {
    let (a, b) = (certificate(), certificate());
    let lines = a.lines().count();
    let truncated: String = b.lines().take(4).collect::<Vec<_>>().join("\n");
    for (text, words) in [
        (format!("{a}{truncated}"), "has no END line"),
        (format!("{truncated}\n{a}"), "line 1 has no END line"),
        (
            a.replacen("END CERTIFICATE", "END CERTIFICATF", 1) + &b,
            "has no END line",
        ),
        (
            a.clone() + &b.replacen("-----BEGIN", "----BEGIN", 1),
            "looks like a BEGIN or END",
        ),
        (
            a.clone() + &b.replacen("-----BEGIN CERTIFICATE", "-----BEGIN CERTIFICATE--", 1),
            "cannot be decoded",
        ),
        (
            a.clone() + &b.replacen("-----BEGIN ", "----- BEGIN ", 1),
            "looks like",
        ),
        (
            a.clone() + &b.replacen("-----BEGIN", "\u{2014}\u{2013}BEGIN", 1),
            "looks like",
        ),
        (a.clone() + &b.replacen("BEGIN", "begin", 1), "looks like"),
        (
            a.clone() + &b.replacen("-----BEGIN CERTIFICATE-----\n", "", 1),
            "is an END line without a BEGIN line",
        ),
        // The END line ends with dashes that the BEGIN line needs, and the second block is truncated.
        (
            a.trim_end().to_owned() + truncated.trim_start_matches('-'),
            "looks like a BEGIN or END",
        ),
        (a.replace("\nMI", "\n!!") + &b, "cannot be decoded"),
        (a.replace('\n', "\\n"), "cannot be decoded"),
    ] {
        let error = certificates(text.as_bytes()).unwrap_err().to_string();
        assert!(error.contains(words), "{words}: {error}\n{text}");
    }
    let error = certificates(format!("{a}{}", b.replacen("-----BEGIN", "----BEGIN", 1)).as_bytes());
    let place = format!("line {}", lines + 1);
    assert!(error.unwrap_err().to_string().contains(&place), "{place}");
}

#[test]
fn what_does_not_belong_into_a_file_is_refused_with_the_remedy() {
    let (a, private) = (certificate(), key());
    let renamed = |label: &str| a.replace("CERTIFICATE", label);
    for (text, words) in [
        (renamed("TRUSTED CERTIFICATE"), "openssl x509 -in"),
        (renamed("X509 CERTIFICATE"), "write CERTIFICATE instead"),
        (
            renamed("CERTIFICATE REQUEST"),
            "the block is a certificate request",
        ),
        (renamed("X509 CRL"), "revocation list"),
        (renamed("PKCS7"), "openssl pkcs7"),
        (renamed("SOMETHING ELSE"), "remove the block"),
        (private.clone(), "private key does not belong"),
    ] {
        for text in [text.clone(), format!("{a}{text}")] {
            let error = certificates(text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(words), "{words}: {error}");
        }
    }
    for bytes in [a.as_bytes(), private.as_bytes()] {
        let [
            Err(DamagedBlock {
                place: Place::Block(1),
                source,
            }),
        ] = &revocation_lists(bytes)[..]
        else {
            panic!("one block, which is refused")
        };
        assert!(source.to_string().contains("does not belong"), "{source}");
    }
    for (bytes, words) in [
        (&b"\x30\x82\x01\x0a"[..], "openssl x509 -inform der"),
        (b"\xff\xfe-\0-\0", "UTF-16"),
        (b"", "no certificate"),
        (b"nothing", "no certificate"),
    ] {
        let error = certificates(bytes).unwrap_err().to_string();
        assert!(error.contains(words), "{words}: {error}");
    }
}

#[test]
fn a_key_file_holds_one_key_in_clear() {
    let (a, private) = (certificate(), key());
    let parameters =
        "-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----\n";
    for text in [
        private.clone(),
        format!("{parameters}{private}"),
        format!("{private}{a}"),
        format!("\u{feff}{}", private.replace('\n', "\r\n")),
    ] {
        let read = private_key(text.as_bytes()).unwrap();
        assert_eq!(private_key(encode_key(&read).as_bytes()).unwrap(), read);
    }
    assert_eq!(chain(format!("{a}{private}").as_bytes()).unwrap().len(), 1);
    let encrypted = private.replace(
        "PRIVATE KEY-----\n",
        "PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n\n",
    );
    for (text, words) in [
        (
            private.replace("PRIVATE", "ENCRYPTED PRIVATE"),
            "openssl pkey -in",
        ),
        (encrypted, "openssl pkey -in"),
        (private.replace("PRIVATE", "OPENSSH PRIVATE"), "ssh-keygen"),
        (format!("{private}{}", key()), "2 private keys"),
        (a, "no private key"),
    ] {
        let error = private_key(text.as_bytes()).unwrap_err().to_string();
        assert!(error.contains(words), "{words}: {error}");
        assert!(!error.contains(private.lines().nth(1).unwrap()), "{error}");
    }
}

/// A file with the lists of several authorities, one of which is damaged.
#[test]
fn a_damaged_block_does_not_withhold_the_revocation_lists_after_it() {
    let block = |text: &str| format!("-----BEGIN X509 CRL-----\n{text}\n-----END X509 CRL-----\n");
    let (first, last) = (block("Zmlyc3Q="), block("bGFzdA=="));
    for (damaged, place, words) in [
        (block("!!"), Place::Block(2), "in line 4 cannot be decoded"),
        (
            block("Zmlyc3Q=").replace("END X509", "END X508"),
            Place::Block(2),
            "has no END line",
        ),
        (
            "-----BEGIN X509 CRL-----\nZmly\n".to_owned(),
            Place::Block(2),
            "has no END line",
        ),
        (certificate(), Place::Block(2), "does not belong"),
        (
            block("Zmly").replacen("-----BEGIN", "----BEGIN", 1),
            Place::After(1),
            "line 4 looks like",
        ),
        (
            "-----END X509 CRL-----\n".to_owned(),
            Place::After(1),
            "line 4 is an END line",
        ),
    ] {
        let read = revocation_lists(format!("{first}{damaged}{last}").as_bytes());
        let good: Vec<&[u8]> = read.iter().flatten().map(AsRef::as_ref).collect();
        assert_eq!(good, [&b"first"[..], b"last"], "{damaged}");
        let bad = read.iter().find_map(|one| one.as_ref().err()).unwrap();
        assert_eq!(bad.place, place, "{damaged}");
        assert!(bad.source.to_string().contains(words), "{words}: {bad:?}");
    }
    let truncated = &last[..last.len() / 2];
    let read = revocation_lists(format!("{first}{truncated}").as_bytes());
    assert!(
        matches!(
            &read[..],
            [
                Ok(_),
                Err(DamagedBlock {
                    place: Place::Block(2),
                    ..
                })
            ]
        ),
        "{read:?}"
    );
}

#[test]
fn a_file_of_damaged_blocks_is_not_read_to_its_end() {
    let block = "-----BEGIN X509 CRL-----\n!!\n-----END X509 CRL-----\n";
    let read = revocation_lists(block.repeat(DAMAGED_BLOCKS_MAX + 9).as_bytes());
    assert_eq!(read.len(), DAMAGED_BLOCKS_MAX + 1);
    let last = read.last().unwrap().as_ref().unwrap_err();
    assert!(matches!(last.source, Error::TooDamaged(_)), "{last:?}");
}
