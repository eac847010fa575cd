//! Tests with published vectors of Bitwarden's clients, and with texts that must not decrypt.

use aws_lc_rs::hkdf::{HKDF_SHA256, Prk};
use base64ct::{Base64, Encoding as _};
use proptest::prelude::*;
use rsa::{pkcs8::DecodePrivateKey as _, pkcs8::EncodePublicKey as _};
use zeroize::Zeroizing;

use super::{keys::expand, *};

const PBKDF2_600_000: Kdf = Kdf::Pbkdf2 {
    iterations: 600_000,
};
const PROTECTED_USER_KEY: &str = "2.Q/2PhzcC7GdeiMHhWguYAQ==|GpqzVdr0go0ug5cZh1n+uixeBC3oC90CIe0hd/HWA/pTRDZ8ane4fmsEIcuc8eMKUt55Y2q/fbNzsYu41YTZzzsJUSeqVjT8/iTQtgnNdpo=|dwI+uyvZ1h/iZ03VQ+/wrGEFYVewBUUl/syYgjsNMbE=";
const USER_KEY: &str = "6d80ac93ce7b865f10249b71c912bae6d8d4adbc4a0b868389f269b2697e348bf85bd715805be2dea543fb2253514d93e14c0d29662db7da6a59fed0fb65820a";
const DEVICE_KEY: &str = "72eb3c73ac9ccb91c382d7fa5892d7e60c6df5de36d9ffd3dd69e6ec4134d1854cd071fec2d89c13e63e205d5707909c758efa20b676bb08f707cbc94193cef7";
const DEVICE_PROTECTED_USER_KEY: &str =
    include_str!("../../../tests/vectors/bitwarden/device-protected-user-key.txt");
const DEVICE_PROTECTED_PRIVATE_KEY: &str =
    include_str!("../../../tests/vectors/bitwarden/device-protected-private-key.txt");

const PROTECTED_BY_AN_OLD_ACCOUNT: &str = "0.8UClLa8IPE1iZT7chy5wzQ==|6PVfHnVk5S3XqEtQemnM5yb4JodxmPkkWzmDRdfyHtjORmvxqlLX40tBJZ+CKxQWmS8tpEB5w39rbgHg/gqs0haGdZG4cPbywsgGzxZ7uNI=";

fn password(text: &str) -> Password {
    Password::new(Zeroizing::new(text.to_owned())).unwrap()
}

fn email(text: &str) -> Email {
    Email::parse(text).unwrap()
}

fn argon2id(iterations: u32, memory_mib: u32, parallelism: u32) -> Kdf {
    Kdf::Argon2id {
        iterations,
        memory_mib,
        parallelism,
    }
}

fn symmetric(hexadecimal: &str) -> SymmetricKey {
    SymmetricKey::from_bytes(Zeroizing::new(hex::decode(hexadecimal).unwrap())).unwrap()
}

fn parse(text: &str) -> EncString {
    EncString::parse(text).unwrap()
}

/// The master key and both halves of the stretched key, in hexadecimal.
fn assert_keys(key: &MasterKey, master: &str, encryption: &str, mac: &str) {
    assert_eq!(hex::encode(key.expose()), master);
    let stretched = hex::encode(key.stretch().unwrap().expose());
    assert_eq!(stretched, format!("{encryption}{mac}"));
}

#[test]
fn vectors_1_and_2_pbkdf2_and_its_stretched_key() {
    let kdf = Kdf::Pbkdf2 { iterations: 10_000 };
    let key = kdf.master_key(&password("67t9b5g67$%Dh89n"), &email("test_key"));
    let key = key.unwrap();
    assert_keys(
        &key,
        "1f4f68e29647b15ac250acd1118184518aa745a7fe95021b27c5402a16c3564b",
        "6f1fb22dee9825728fd77c5387adc3178e8678f93d84a3b671c5bdccbc15ed60",
        "dd7fceea651bca265634221c4e1cb910303d7fa6d1f7c257e81a3055c1f9b39b",
    );
    assert_eq!(
        Base64::encode_string(key.expose()),
        "H09o4pZHsVrCUKzREYGEUYqnRaf+lQIbJ8VAKhbDVks="
    );
}

#[test]
fn vector_3_argon2id() {
    let key = argon2id(4, 32, 2).master_key(&password("67t9b5g67$%Dh89n"), &email("test_key"));
    assert_eq!(
        hex::encode(key.unwrap().expose()),
        "cff0e1b1a213a34c626ab3afe00911f01493ed2ff6968db83ee183f23335e1f2"
    );
}

#[test]
fn vector_4_authentication_hash_whatever_the_case_of_the_address() {
    let kdf = Kdf::Pbkdf2 {
        iterations: 100_000,
    };
    let password = password("asdfasdf");
    for address in [
        "test@bitwarden.com",
        " test@bitwarden.com",
        "TEST@bitwarden.com",
    ] {
        let key = kdf.master_key(&password, &email(address)).unwrap();
        assert_eq!(
            hex::encode(key.expose()),
            "8fa2c8c4233b33854aa1bca4ca725ccd12abde38b7482720def4eea018049268"
        );
        let hashes = [
            key.authentication_hash(&password),
            key.local_hash(&password),
        ];
        assert_eq!(
            hashes[0].as_str(),
            "wmyadRMyBZOH7P/a/ucTCbSghKgdzDpPqUnu/DAVtSw="
        );
        assert_eq!(
            hashes[1].as_str(),
            "npf6w9mFGiNJZkg6QdWsiqZr94+ClKDTzF/B3XW4XV4="
        );
    }
}

#[test]
fn vector_5_authentication_hash_of_argon2id() {
    let password = password("asdfasdf");
    let key = argon2id(4, 32, 2).master_key(&password, &email("test_salt"));
    assert_eq!(
        key.unwrap().authentication_hash(&password).as_str(),
        "PR6UjYmjmppTYcdyTiNbAhPJuQQOmynKbdEl1oyi/iQ="
    );
}

/// Tests all steps from the password to the user key, including the value that is sent to a Key
/// Connector.
#[test]
fn vector_6_end_to_end() {
    let password = password("asdfasdfasdf");
    let key = PBKDF2_600_000.master_key(&password, &email("test@bitwarden.com"));
    let key = key.unwrap();
    assert_eq!(
        Base64::encode_string(key.expose()),
        "ySXq1RVLKEaV1eoQE/ui9aFKIvXTl9PAXwp1MljfF50="
    );
    let stretched = hex::encode(key.stretch().unwrap().expose());
    assert_eq!(
        stretched,
        "aadfd15d1d39fcb852ee64309ac21fc1d7102a5f881b1917f599ebaa07668c20\
         19524b777636b49745b169087e618e40358ec771b0973a44270fd0385dec1197"
    );
    assert_eq!(
        key.authentication_hash(&password).as_str(),
        "8HT+qrqqhBaGEIHp9mwuv1ivoW9r6yaauAkOCYbe+SM="
    );
    assert_eq!(
        key.local_hash(&password).as_str(),
        "aOvkBXFhSdgrBWR3hZCMRoML9+h5yRblU3lFphCdkeA="
    );
    let user_key = key.unprotect(&parse(PROTECTED_USER_KEY)).unwrap();
    assert_eq!(hex::encode(&user_key), USER_KEY);
}

#[test]
fn vector_7_an_old_account_is_under_the_master_key_itself() {
    let key = PBKDF2_600_000.master_key(&password("asdfasdfasdf"), &email("legacy@bitwarden.com"));
    let protected = parse(PROTECTED_BY_AN_OLD_ACCOUNT);
    let user_key = key.unwrap().unprotect(&protected).unwrap();
    assert_eq!(
        hex::encode(&user_key),
        "0c5f97cb2504ec4389615a3a067ff21cd1a87d1d7618d52c75ca027384a57d94\
         bad7ea8918a9e31dda39b4ed495bbd33fd1a1134e204864bc2d0b28580e08ca7"
    );
}

/// Type 0 has no MAC, so every 256th wrong key leaves padding that looks valid.
#[test]
fn a_wrong_key_whose_padding_happens_to_be_good_opens_nothing() {
    let protected = parse(PROTECTED_BY_AN_OLD_ACCOUNT);
    let wrong = (0_u32..10_000).find_map(|number| {
        let mut bytes = Zeroizing::new(vec![0x5a; MASTER_KEY_BYTES]);
        bytes[..4].copy_from_slice(&number.to_be_bytes());
        let as_it_is = SymmetricKey::from_bytes(bytes.clone()).unwrap();
        let plain = as_it_is.decrypt(&protected).ok()?;
        assert_ne!(plain.len(), 64);
        Some(MasterKey::from_bytes(bytes).unwrap())
    });
    let opened = wrong.expect("one of 256").unprotect(&protected);
    assert_eq!(opened.unwrap_err(), Error::Decrypt);
}

#[test]
fn vector_8_passwords_and_addresses_beyond_ascii() {
    let kdf = Kdf::Pbkdf2 { iterations: 5_000 };
    for (secret, address, expected) in [
        (
            "password",
            "user@example.com",
            "pj9prw/OHPleXI6bRdmlaD+saJS4awrMiQsQiDjeu2I=",
        ),
        (
            "pǻssword",
            "üser@example.com",
            "yqvoFXgMRmHR3QPYr5pyR4uVuoHkltv9aHUP63p8n7I=",
        ),
        (
            "😀password🙏",
            "user@example.com",
            "ZdeOata6xoRpB4DLp8zHhXz5kLmkWtX5pd+TdRH8w8w=",
        ),
    ] {
        let key = kdf.master_key(&password(secret), &email(address)).unwrap();
        assert_eq!(Base64::encode_string(key.expose()), expected, "{secret}");
    }
}

#[test]
fn vector_9_hkdf_expand() {
    let prk = Base64::decode_vec("F5h4KdYQnIVH4rKH0P9CZb1GrR4n16/sJrS0PsQEn0Y=").unwrap();
    let prk = Prk::new_less_safe(HKDF_SHA256, &prk);
    for (length, expected) in [
        (32, "BnIqJlfnHm0e/2iB/15cbHyR19ARPIcWRp4oNS22CD8="),
        (
            64,
            "BnIqJlfnHm0e/2iB/15cbHyR19ARPIcWRp4oNS22CD9BV+/queOZenPNkDhmlVyL2WZ3OSU5+7ISNF5NhNfvZA==",
        ),
    ] {
        let mut out = vec![0; length];
        expand(&prk, b"info", &mut out).unwrap();
        assert_eq!(Base64::encode_string(&out), expected);
    }
}

fn device_private_key() -> Zeroizing<Vec<u8>> {
    let protected = parse(DEVICE_PROTECTED_PRIVATE_KEY);
    symmetric(DEVICE_KEY).decrypt(&protected).unwrap()
}

#[test]
fn vector_10_a_trusted_device() {
    let device = PrivateKey::from_pkcs8(&device_private_key()).unwrap();
    let user_key = device.decrypt(&parse(DEVICE_PROTECTED_USER_KEY)).unwrap();
    assert_eq!(hex::encode(&user_key), USER_KEY);
}

#[test]
fn vector_11_both_defaults_of_argon2id() {
    let password = password("asdfasdfasdf");
    for (kdf, hash, keys) in [
        (
            argon2id(3, 64, 4),
            "0UxDVLCruT75iJoCSuqfCxNaPPGDt5wyVRIjdYVSHP0=",
            [
                "9826b2023a398ccea10d13db04e27e208557b8180bb3357b12374e42e2e2963d",
                "79fd5b16afce15431a3156a9f706dee49c7baa7cbe922be17bbbc89ef3e050b1",
                "912651dbbc4961c39cc71b460d2ef9899e2ae611565b64ed47ca0aed7d4ca54f",
            ],
        ),
        (
            argon2id(6, 32, 4),
            "2t+k4VnGvB+1sETQa0va0kbCzIV0xhGk/idIQW/tY8M=",
            [
                "60e363835b5391822fc376b59352404320cb0602d4252037932c087193fa9013",
                "6b7f6208d497d738eee425561dbaa22b6858fec6557185b4d85a868b3db9df91",
                "7f3af1eddd679a2fd2169c370a9f852bb65cdf4c3147847870e4439633a2d54a",
            ],
        ),
    ] {
        let key = kdf.master_key(&password, &email("test@bitwarden.com"));
        let key = key.unwrap();
        let [master, encryption, mac] = keys;
        assert_keys(&key, master, encryption, mac);
        assert_eq!(key.authentication_hash(&password).as_str(), hash);
    }
}

#[test]
fn what_is_encrypted_is_read_again() {
    let key = symmetric(USER_KEY);
    for length in [0, 1, 15, 16, 17, 64, 10_000] {
        let plain = vec![7; length];
        let first = key.encrypt(&plain).unwrap();
        assert_eq!(*key.decrypt(&parse(&first.to_string())).unwrap(), plain);
        assert_ne!(first, key.encrypt(&plain).unwrap(), "the IV is fresh");
    }
    let most = vec![7; ENC_STRING_BYTES_MAX];
    assert_eq!(key.encrypt(&most), Err(Error::TooLong));
}

/// An independent implementation can decrypt a type 4 text of this crate.
#[test]
fn another_implementation_of_rsa_reads_type_4() {
    let private = rsa::RsaPrivateKey::from_pkcs8_der(&device_private_key()).unwrap();
    let spki = private.to_public_key().to_public_key_der().unwrap();
    let public = PublicKey::from_spki(spki.as_bytes()).unwrap();
    let plain = hex::decode(USER_KEY).unwrap();
    let EncString::RsaOaepSha1 { ciphertext } = public.encrypt(&plain).unwrap() else {
        panic!("another type");
    };
    let padding = rsa::Oaep::new::<sha1::Sha1>();
    assert_eq!(private.decrypt(padding, &ciphertext).unwrap(), plain);
    assert_eq!(public.encrypt(&[0; 215]), Err(Error::TooLong));
}

#[test]
fn a_new_kdf_leaves_the_user_key_as_it_was() {
    let (password, address) = (password("asdfasdfasdf"), email("test@bitwarden.com"));
    let old = PBKDF2_600_000.master_key(&password, &address).unwrap();
    let new = argon2id(3, 64, 4).master_key(&password, &address).unwrap();
    let user_key = old.unprotect(&parse(PROTECTED_USER_KEY)).unwrap();
    let protected = new.protect(&user_key).unwrap();
    assert_eq!(*new.unprotect(&protected).unwrap(), *user_key);
    assert_eq!(old.unprotect(&protected).unwrap_err(), Error::Decrypt);
    assert!(!old.is(&new));
}

#[test]
fn every_changed_byte_is_noticed() {
    let key = symmetric(USER_KEY);
    let whole = key.encrypt(b"a secret note").unwrap();
    let EncString::Aes256CbcHmac {
        iv,
        ciphertext,
        mac,
    } = &whole
    else {
        panic!("another type");
    };
    for at in 0..16 + 16 + 32 {
        let (mut iv, mut ciphertext, mut mac) = (*iv, ciphertext.clone(), *mac);
        match at {
            0..16 => iv[at] ^= 1,
            16..32 => ciphertext[at - 16] ^= 0x80,
            _ => mac[at - 32] ^= 1,
        }
        let changed = EncString::Aes256CbcHmac {
            iv,
            ciphertext,
            mac,
        };
        assert_eq!(key.decrypt(&changed).unwrap_err(), Error::Decrypt, "{at}");
    }
    let other = symmetric(DEVICE_KEY);
    assert_eq!(other.decrypt(&whole).unwrap_err(), Error::Decrypt);
}

/// The text lacks one block, so its MAC does not match.
#[test]
fn a_truncated_text_is_noticed() {
    let key = symmetric(USER_KEY);
    let EncString::Aes256CbcHmac {
        iv,
        mut ciphertext,
        mac,
    } = key.encrypt(&[7; 40]).unwrap()
    else {
        panic!("another type");
    };
    ciphertext.truncate(32);
    let cut = EncString::Aes256CbcHmac {
        iv,
        ciphertext,
        mac,
    };
    assert_eq!(key.decrypt(&cut).unwrap_err(), Error::Decrypt);
    let mut damaged = parse(DEVICE_PROTECTED_USER_KEY);
    if let EncString::RsaOaepSha1 { ciphertext } = &mut damaged {
        ciphertext[0] ^= 1;
    }
    let device = PrivateKey::from_pkcs8(&device_private_key()).unwrap();
    assert_eq!(device.decrypt(&damaged).unwrap_err(), Error::Decrypt);
}

#[test]
fn a_type_is_read_by_its_own_kind_of_key_alone() {
    let iv_and_block = "AAAAAAAAAAAAAAAAAAAAAA==|AAAAAAAAAAAAAAAAAAAAAA==";
    let unauthenticated = parse(&format!("0.{iv_and_block}"));
    let authenticated = parse(PROTECTED_USER_KEY);
    let rsa = parse(DEVICE_PROTECTED_USER_KEY);
    let (long, short) = (symmetric(USER_KEY), symmetric(&USER_KEY[..64]));
    // A key with a MAC half never decrypts a text without a MAC, because an attacker could remove the MAC.
    for (key, text, number) in [
        (&long, &unauthenticated, 0),
        (&long, &rsa, 4),
        (&short, &authenticated, 2),
        (&short, &rsa, 4),
    ] {
        assert_eq!(key.decrypt(text).unwrap_err(), Error::KeyKind(number));
    }
    assert_eq!(short.encrypt(b"x").unwrap_err(), Error::KeyKind(2));
    let device = PrivateKey::from_pkcs8(&device_private_key()).unwrap();
    let wrong = device.decrypt(&authenticated).unwrap_err();
    assert_eq!(wrong, Error::KeyKind(2));
}

#[test]
fn texts_that_are_not_well_formed_are_refused() {
    let (iv, block) = ("AAAAAAAAAAAAAAAAAAAAAA==", "AAAAAAAAAAAAAAAAAAAAAA==");
    let mac = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";
    let whole = format!("2.{iv}|{block}|{mac}");
    assert!(EncString::parse(&whole).is_ok());
    let refused = [
        String::new(),
        "2".to_owned(),
        "2.".to_owned(),
        format!("{iv}|{block}"),
        format!("2.{iv}|{block}"),
        format!("0.{iv}|{block}|{mac}"),
        format!("{whole}|"),
        format!("{whole}|{mac}"),
        format!("{whole}\n"),
        format!(" {whole}"),
        format!("{whole}AAAA"),
        format!("02.{iv}|{block}|{mac}"),
        format!("+2.{iv}|{block}|{mac}"),
        format!("9.{iv}|{block}|{mac}"),
        format!("2.{iv}||{mac}"),
        format!("2.{iv}|AAAA|{mac}"),
        format!("2.AAAA|{block}|{mac}"),
        format!("2.{iv}|{block}|AAAA"),
        // Texts that are not canonical, because of unused bits, missing padding, other alphabets or
        // white space.
        format!("2.AAAAAAAAAAAAAAAAAAAAAB==|{block}|{mac}"),
        format!("2.AAAAAAAAAAAAAAAAAAAAAA|{block}|{mac}"),
        format!("2.AAAAAAAAAAAAAAAAAAAA_A==|{block}|{mac}"),
        format!("2.AAAAAAAAAAAAAAAAAAAA AA==|{block}|{mac}"),
        "4.AAAA".to_owned(),
        format!("{DEVICE_PROTECTED_USER_KEY}|{mac}"),
        format!("2.{}", "A".repeat(ENC_STRING_BYTES_MAX)),
    ];
    for text in refused {
        let error = EncString::parse(&text).unwrap_err();
        assert!(matches!(error, Error::Form(_)), "{text}: {error}");
    }
    for number in [1, 3, 5, 6, 7] {
        let error = EncString::parse(&format!("{number}.{block}")).unwrap_err();
        assert_eq!(error, Error::Type(number));
    }
}

#[test]
fn keys_of_another_length_are_refused() {
    for length in [0, 31, 33, 64] {
        assert!(MasterKey::from_bytes(Zeroizing::new(vec![0; length])).is_err());
    }
    for length in [0, 16, 31, 33, 63, 65, 80] {
        assert!(SymmetricKey::from_bytes(Zeroizing::new(vec![0; length])).is_err());
    }
    for der in [vec![], vec![0x30; 100], hex::decode(USER_KEY).unwrap()] {
        assert_eq!(PrivateKey::from_pkcs8(&der).unwrap_err(), Error::KeyPair);
        assert_eq!(PublicKey::from_spki(&der).unwrap_err(), Error::KeyPair);
    }
}

#[test]
fn kdf_parameters_keep_their_limits() {
    let pbkdf2 = |iterations| Kdf::Pbkdf2 { iterations };
    for refused in [
        pbkdf2(0),
        pbkdf2(4_999),
        pbkdf2(100_000_001),
        argon2id(1, 64, 4),
        argon2id(101, 64, 4),
        argon2id(3, 15, 4),
        argon2id(3, 4_097, 4),
        argon2id(3, 64, 0),
        argon2id(3, 64, 256),
    ] {
        let made = refused.master_key(&password("x"), &email("a@b"));
        assert!(matches!(made, Err(Error::Kdf { .. })), "{refused:?}");
    }
    for (kdf, warns) in [
        (pbkdf2(5_000), true),
        (pbkdf2(599_999), true),
        (pbkdf2(600_000), false),
        (pbkdf2(2_000_000), false),
        (argon2id(2, 16, 1), true),
        (argon2id(3, 63, 4), true),
        (argon2id(2, 64, 4), true),
        (argon2id(3, 64, 3), true),
        (argon2id(3, 64, 4), false),
        (argon2id(6, 32, 4), false),
        (argon2id(5, 32, 4), true),
        (argon2id(10, 1_024, 16), false),
    ] {
        kdf.check_new().unwrap();
        assert_eq!(kdf.warning().is_some(), warns, "{kdf:?}");
    }
}

/// Clients open accounts with too strong parameters, so that the owner can reduce the parameters.
#[test]
fn an_account_above_what_clients_offer_is_opened_with_a_warning_and_cannot_be_made() {
    for kdf in [
        Kdf::Pbkdf2 {
            iterations: 3_000_000,
        },
        argon2id(11, 16, 4),
        argon2id(3, 1_025, 4),
        argon2id(2, 16, 17),
    ] {
        kdf.check().unwrap();
        let warning = kdf.warning().unwrap();
        assert!(warning.contains("more than the"), "{warning}");
        assert!(matches!(kdf.check_new(), Err(Error::Kdf { .. })), "{kdf:?}");
    }
    let key = argon2id(11, 16, 17).master_key(&password("x"), &email("a@b"));
    key.unwrap();
}

/// A salt that differs from the address is used unchanged.
#[test]
fn a_salt_of_its_own_takes_the_place_of_the_address() {
    let kdf = Kdf::Pbkdf2 { iterations: 5_000 };
    let with = |salt: &Salt| {
        let key = kdf.master_key(&password("password"), salt).unwrap();
        Base64::encode_string(key.expose())
    };
    let address = "pj9prw/OHPleXI6bRdmlaD+saJS4awrMiQsQiDjeu2I=";
    assert_eq!(with(&Salt::parse("user@example.com").unwrap()), address);
    assert_eq!(with(&Salt::from(&email(" User@example.com"))), address);
    assert_ne!(with(&Salt::parse("User@example.com").unwrap()), address);
    for bad in ["", "a\0b", &"x".repeat(257)] {
        assert_eq!(Salt::parse(bad), Err(Error::Salt), "{bad:?}");
    }
}

#[test]
fn addresses_and_passwords_have_limits() {
    assert_eq!(
        email("\u{feff} Ünï@Example.COM\t\n").as_str(),
        "ünï@example.com"
    );
    for bad in ["", "  ", "a\0b", &"x".repeat(257)] {
        assert_eq!(Email::parse(bad), Err(Error::Email), "{bad:?}");
    }
    for bad in [String::new(), "x".repeat(PASSWORD_BYTES_MAX + 1)] {
        assert!(Password::new(Zeroizing::new(bad)).is_err());
    }
}

#[test]
fn debug_shows_nothing() {
    let secrets = [
        format!("{:?}", password("hunter2")),
        format!("{:?}", symmetric(USER_KEY)),
        format!("{:?}", symmetric(USER_KEY).expose().len()),
        format!("{:?}", PrivateKey::from_pkcs8(&device_private_key())),
    ];
    assert_eq!(
        secrets,
        [
            "Password(redacted)",
            "SymmetricKey(redacted)",
            "64",
            "Ok(PrivateKey(redacted))"
        ]
    );
}

proptest! {
    #[test]
    fn no_text_panics(text in "\\PC{0,200}", bytes in prop::collection::vec(any::<u8>(), 0..100)) {
        for text in [text.clone(), format!("2.{text}"), format!("0.{text}|{text}"), format!("4.{text}")] {
            if let Ok(read) = EncString::parse(&text) {
                prop_assert_eq!(read.to_string(), text);
            }
        }
        let _email = Email::parse(&text);
        let _made = SymmetricKey::from_bytes(Zeroizing::new(bytes.clone())).is_ok();
        prop_assert!(PrivateKey::from_pkcs8(&bytes).is_err());
        prop_assert!(PublicKey::from_spki(&bytes).is_err());
    }

    /// Every well-formed text is either decrypted by its key, or refused with the same error.
    #[test]
    fn no_parts_panic(
        iv in any::<[u8; 16]>(), mac in any::<[u8; 32]>(), ciphertext in prop::collection::vec(any::<u8>(), 0..80),
    ) {
        let key = symmetric(USER_KEY);
        let text = EncString::Aes256CbcHmac { iv, ciphertext: ciphertext.clone(), mac };
        prop_assert_eq!(key.decrypt(&text).unwrap_err(), Error::Decrypt);
        let old = symmetric(&USER_KEY[..64]);
        let length = ciphertext.len();
        if let Ok(plain) = old.decrypt(&EncString::Aes256Cbc { iv, ciphertext }) {
            prop_assert!(plain.len() < length);
        }
    }
}
