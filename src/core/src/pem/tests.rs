//! Files as editors, shells and other tools leave them.

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
    // As `printf '%s%s\n' "$(cat a.pem)" "$(cat b.pem)"` joins them.
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
            "ends a block that does not begin",
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
        (renamed("CERTIFICATE REQUEST"), "that is a request"),
        (renamed("X509 CRL"), "revocation list"),
        (renamed("PKCS7"), "openssl pkcs7"),
        (renamed("SOMETHING ELSE"), "remove it"),
        (private.clone(), "private key does not belong"),
    ] {
        for text in [text.clone(), format!("{a}{text}")] {
            let error = certificates(text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(words), "{words}: {error}");
        }
    }
    for bytes in [a.as_bytes(), private.as_bytes()] {
        let error = revocation_lists(bytes).unwrap_err().to_string();
        assert!(error.contains("does not belong"), "{error}");
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
