//! Tests weak and malformed keys in a set, and the choice of keys for an access token.

use rcgen::PublicKeyData as _;
use rsa::{BigUint, RsaPublicKey, pkcs8::EncodePublicKey as _};
use serde_json::{Value, json};

use super::*;

/// Ed25519 points of small order, in canonical and other encodings.
const SMALL_ORDER: [&str; 12] = [
    "0100000000000000000000000000000000000000000000000000000000000000",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "0000000000000000000000000000000000000000000000000000000000000000",
    "0000000000000000000000000000000000000000000000000000000000000080",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc85",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac03fa",
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff",
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "0100000000000000000000000000000000000000000000000000000000000080",
];

/// The DER prefixes of an Ed25519 key (RFC 8410) and of a P-256 key (RFC 5480).
const ED25519_PREFIX: &str = "302a300506032b6570032100";
const P256_PREFIX: &str = "3059301306072a8648ce3d020106082a8648ce3d030107034200";

fn encode(bytes: &[u8]) -> String {
    Base64UrlUnpadded::encode_string(bytes)
}

fn public_pem(der: &[u8]) -> String {
    let text = base64ct::Base64::encode_string(der);
    format!("-----BEGIN PUBLIC KEY-----\n{text}\n-----END PUBLIC KEY-----\n")
}

fn fresh(algorithm: &'static rcgen::SignatureAlgorithm) -> rcgen::KeyPair {
    rcgen::KeyPair::generate_for(algorithm).unwrap()
}

/// Returns the modulus of a new key.
fn good_modulus() -> BigUint {
    let der = fresh(&rcgen::PKCS_RSA_SHA256).subject_public_key_info();
    let (_, info) = SubjectPublicKeyInfo::from_der(&der).unwrap();
    let Ok(PublicKey::RSA(key)) = info.parsed() else {
        panic!("not RSA")
    };
    BigUint::from_bytes_be(key.modulus)
}

/// RSA keys: name, modulus, exponent, and words of the expected problem.
fn weak_rsa() -> Vec<(&'static str, BigUint, BigUint, &'static str)> {
    let good = good_modulus();
    let number = |number: u64| BigUint::from(number);
    let usual = || number(65_537);
    let one = number(1);
    // A modulus of 2048 bits with the factor 65521, the largest prime of 16 bits.
    let with_factor = ((&one << 2_047_usize) / number(65_521) + number(2)) * number(65_521);
    let with_factor = if with_factor.to_bytes_le()[0].is_multiple_of(2) {
        with_factor + number(65_521)
    } else {
        with_factor
    };
    vec![
        ("e-0", good.clone(), number(0), "RSA exponent 0"),
        ("e-1", good.clone(), number(1), "RSA exponent 1"),
        ("e-2", good.clone(), number(2), "RSA exponent 2"),
        ("e-3", good.clone(), number(3), "RSA exponent 3"),
        ("e-even", good.clone(), number(65_538), "even"),
        ("e-long", good.clone(), (&one << 40_usize) + &one, "longer"),
        ("n-even", &good + &one, usual(), "even RSA modulus"),
        ("n-0", number(0), usual(), "0 bits"),
        ("n-1024", &good >> 1_024_usize, usual(), "of 1024 bits"),
        ("n-2047", &good >> 1_usize, usual(), "of 2047 bits"),
        ("n-long", &good << 6_145_usize, usual(), "of 8193 bits"),
        (
            "n-3",
            (&one << 2_048_usize) - &one,
            usual(),
            "divisible by 3",
        ),
        ("n-65521", with_factor, usual(), "divisible by"),
    ]
}

fn point_of(key: &rcgen::KeyPair) -> Vec<u8> {
    key.public_key_raw().to_vec()
}

/// A set with one valid key and all bad keys, and words of each expected problem.
fn weak_set() -> (Value, Vec<(String, &'static str)>) {
    let good = point_of(&fresh(&rcgen::PKCS_ED25519));
    let mut keys = vec![json!({"kid": "good", "kty": "OKP", "crv": "Ed25519", "x": encode(&good)})];
    let mut said = Vec::new();
    for (kid, n, e, words) in weak_rsa() {
        let (n, e) = (encode(&n.to_bytes_be()), encode(&e.to_bytes_be()));
        keys.push(json!({"kid": kid, "kty": "RSA", "n": n, "e": e}));
        said.push((kid.to_owned(), words));
    }
    for curve in ["P-256", "P-384"] {
        let (algorithm, length) = match curve {
            "P-256" => (&rcgen::PKCS_ECDSA_P256_SHA256, 32),
            _ => (&rcgen::PKCS_ECDSA_P384_SHA384, 48),
        };
        let point = point_of(&fresh(algorithm));
        let (x, y) = point[1..].split_at(length);
        let mut beside = y.to_vec();
        beside[length - 1] ^= 1;
        for (name, x, y, words) in [
            ("off", x, &beside[..], "not on its curve"),
            (
                "zero",
                &[0; 48][..length],
                &[0; 48][..length],
                "not on its curve",
            ),
            ("large", &[0xff; 48][..length], y, "not on its curve"),
            ("short", &x[1..], y, "coordinates of"),
        ] {
            let kid = format!("{curve}-{name}");
            keys.push(
                json!({"kid": kid, "kty": "EC", "crv": curve, "x": encode(x), "y": encode(y)}),
            );
            said.push((kid, words));
        }
    }
    for (number, point) in SMALL_ORDER.iter().enumerate() {
        let kid = format!("ed-{number}");
        let x = encode(&hex::decode(point).unwrap());
        keys.push(json!({"kid": kid, "kty": "OKP", "crv": "Ed25519", "x": x}));
        said.push((kid, "small order"));
    }
    let no_point = (2..=u8::MAX)
        .map(|first| [&[first][..], &[0; 31]].concat())
        .find(|bytes| strength::check_ed25519(bytes).is_err());
    for (kid, x, words) in [
        ("ed-no-point", no_point.unwrap(), "not a point"),
        ("ed-short", good[1..].to_vec(), "31 bytes"),
    ] {
        keys.push(json!({"kid": kid, "kty": "OKP", "crv": "Ed25519", "x": encode(&x)}));
        said.push((kid.to_owned(), words));
    }
    (json!({"keys": keys}), said)
}

#[test]
fn weak_and_malformed_keys_of_a_set_are_refused_by_name_and_the_rest_is_used() {
    let (set, said) = weak_set();
    let read = KeySet::parse_jwks(set.to_string().as_bytes()).unwrap();
    assert_eq!(read.names(), ["good"]);
    assert_eq!(read.refused().len(), said.len(), "{:#?}", read.refused());
    for ((kid, words), refused) in said.iter().zip(read.refused()) {
        assert!(
            refused.starts_with(&format!("{kid:?}: ")) && refused.contains(words),
            "{kid} {words}: {refused}"
        );
    }
    // Without the valid key, the set is refused.
    for key in set["keys"].as_array().unwrap().iter().skip(1) {
        let alone = json!({"keys": [key]}).to_string();
        let problem = chain(&KeySet::parse_jwks(alone.as_bytes()).unwrap_err());
        assert!(problem.contains("weak or malformed"), "{key}: {problem}");
    }
}

#[test]
fn weak_and_malformed_keys_of_a_pem_file_are_refused_by_place_and_the_rest_is_used() {
    let good = fresh(&rcgen::PKCS_ED25519);
    let elliptic = point_of(&fresh(&rcgen::PKCS_ECDSA_P256_SHA256));
    let mut off = elliptic;
    off[64] ^= 1;
    let mut pems = vec![public_pem(&good.subject_public_key_info())];
    for (_, n, e, _) in weak_rsa() {
        let key = RsaPublicKey::new_unchecked(n, e);
        pems.push(public_pem(key.to_public_key_der().unwrap().as_bytes()));
    }
    let spki = |prefix: &str, key: &[u8]| {
        let prefix = hex::decode(prefix).unwrap();
        public_pem(&[&prefix[..], key].concat())
    };
    for point in SMALL_ORDER {
        pems.push(spki(ED25519_PREFIX, &hex::decode(point).unwrap()));
    }
    pems.push(spki(P256_PREFIX, &off));
    // The point at infinity is one byte long.
    let infinity = "3019301306072a8648ce3d020106082a8648ce3d03010703020000";
    pems.push(spki(infinity, &[]));
    let read = KeySet::parse_pem(pems.concat().as_bytes()).unwrap();
    assert_eq!(read.names(), ["(key without `kid`)"]);
    assert_eq!(
        read.refused().len(),
        pems.len() - 1,
        "{:#?}",
        read.refused()
    );
    for (place, refused) in read.refused().iter().enumerate() {
        let named = format!("number {}: ", place + 2);
        assert!(refused.starts_with(&named), "{named}: {refused}");
    }
    let last = read.refused().last().unwrap();
    assert!(last.contains("point at infinity"), "{last}");
}

#[test]
fn keys_of_a_set_without_weak_ones_are_all_used() {
    let n = encode(&good_modulus().to_bytes_be());
    let point = point_of(&fresh(&rcgen::PKCS_ECDSA_P384_SHA384));
    let (x, y) = point[1..].split_at(48);
    let set = json!({"keys": [
        {"kid": "rsa", "kty": "RSA", "n": n, "e": "AQAB"},
        {"kid": "ec", "kty": "EC", "crv": "P-384", "x": encode(x), "y": encode(y)},
    ]});
    let read = KeySet::parse_jwks(set.to_string().as_bytes()).unwrap();
    assert_eq!(read.names(), ["rsa", "ec"]);
    assert!(read.refused().is_empty(), "{:?}", read.refused());
}

/// Returns RSA keys with the names `names`. The keys after the first have thumbprints if requested.
fn rsa_set(names: &[&str], thumbprints: bool) -> KeySet {
    let n = encode(&good_modulus().to_bytes_be());
    let keys: Vec<Value> = names
        .iter()
        .map(|kid| {
            let mut key = json!({"kid": kid, "kty": "RSA", "n": n, "e": "AQAB"});
            if thumbprints {
                key["x5t"] = json!(format!("{kid}-sha1="));
                key["x5t#S256"] = json!(format!("{kid}-sha256"));
            }
            key
        })
        .collect();
    KeySet::parse_jwks(json!({"keys": keys}).to_string().as_bytes()).unwrap()
}

#[test]
fn a_token_without_a_kid_means_the_keys_that_fit_and_a_few_at_most() {
    let unnamed = Named::default();
    let few = rsa_set(&["a", "b", "c", "d"], false);
    assert_eq!(few.find(unnamed, Algorithm::PS256).unwrap().len(), 4);
    let found = few.find(unnamed, Algorithm::ES256);
    assert_eq!(found.unwrap_err(), NoKey::OtherAlgorithm);
    let many = rsa_set(&["a", "b", "c", "d", "e"], false);
    let found = many.find(unnamed, Algorithm::RS256);
    assert_eq!(found.unwrap_err(), NoKey::TooMany);
    let named = Named {
        kid: Some("e"),
        ..unnamed
    };
    assert_eq!(many.find(named, Algorithm::RS256).unwrap().len(), 1);
}

#[test]
fn a_thumbprint_chooses_where_the_set_knows_it() {
    let of = |sha1, sha256| Named {
        kid: None,
        sha1,
        sha256,
    };
    let known = rsa_set(&["a", "b", "c", "d", "e"], true);
    let count = |set: &KeySet, named| set.find(named, Algorithm::RS256).map(|keys| keys.len());
    assert_eq!(count(&known, of(Some("e-sha1"), None)), Ok(1));
    assert_eq!(count(&known, of(None, Some("b-sha256="))), Ok(1));
    assert_eq!(count(&known, of(Some("x"), None)), Err(NoKey::Unknown));
    // In a set without certificates, a thumbprint does not restrict the keys.
    let unknown = rsa_set(&["a", "b"], false);
    assert_eq!(count(&unknown, of(Some("x"), None)), Ok(2));
    // If an access token has a `kid`, the thumbprint is not used.
    let both = Named {
        kid: Some("a"),
        ..of(Some("e-sha1"), None)
    };
    assert_eq!(count(&known, both), Ok(1));
}

/// A hostile provider can choose names and mistakes, but cannot make the log lines longer.
#[test]
fn what_a_provider_puts_into_a_log_line_is_short_and_plain() {
    let hostile = "\u{10ffff}\n\"".repeat(5_000);
    let good = encode(&point_of(&fresh(&rcgen::PKCS_ED25519)));
    let mut keys = vec![json!({"kid": hostile, "kty": "OKP", "crv": "Ed25519", "x": good})];
    keys.push(json!({"kid": "operations", "kty": "RSA", "key_ops": hostile}));
    keys.extend((0..1_000).map(|_| json!({"kty": "RSA"})));
    let set = KeySet::parse_jwks(json!({"keys": keys}).to_string().as_bytes()).unwrap();
    let line = format!("{:?} {:?}", set.names(), set.refused());
    assert!(line.len() < 8_000, "{}", line.len());
    assert!(line.is_ascii());
    assert_eq!(set.refused_count(), 1_001);
    // The complete name still chooses the key.
    let named = Named {
        kid: Some(&hostile),
        ..Named::default()
    };
    assert_eq!(set.find(named, Algorithm::EdDSA).unwrap().len(), 1);
    let no_key = json!({"keys": keys[1..]}).to_string();
    let problem = chain(&KeySet::parse_jwks(no_key.as_bytes()).unwrap_err());
    assert!(problem.len() < 8_000, "{}", problem.len());
    let issuer = format!("not {hostile}");
    assert!(brief(&issuer).len() < 310);
}
