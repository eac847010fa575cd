//! The real commands on tokens that behave like the products that the profiles of the scriptable module describe. This shows
//! what the product does with such a token, not that it was tested with the product.

use std::{collections::BTreeMap, fs, path::Path};

use crate::{
    faulty, faulty_token,
    site::{Options, Site},
    softhsm::write_private,
};

const TOKEN: i32 = 4;
const UNTRUSTED: i32 = 6;

/// What `key generate`, and `token check` after it, say of a token.
#[derive(Clone, Copy, Debug)]
enum Verdict {
    /// Both succeed.
    Works,
    /// `key generate` ends with this exit code, names this cause, and leaves this number of objects on the token.
    Refused(i32, &'static str, usize),
}

use Verdict::{Refused, Works};

/// Each profile with its verdict, and with what stands before the PIN of the real token.
const VERDICTS: [(&str, &str, Verdict); 12] = [
    (
        "aws-cloudhsm-sdk5",
        "crypto_user:",
        Refused(
            TOKEN,
            "CKA_COPYABLE and CKA_ALLOWED_MECHANISMS in the template of the integrity key",
            0,
        ),
    ),
    (
        "google-kmsp11",
        "",
        Refused(TOKEN, "TemplateInconsistent from C_GenerateKey", 0),
    ),
    (
        "liar",
        "",
        Refused(
            UNTRUSTED,
            "the RSA private key can be wrapped with CKM_AES_KEY_WRAP",
            0,
        ),
    ),
    (
        "luna-cloud",
        "",
        Refused(
            TOKEN,
            "CKA_COPYABLE and CKA_ALLOWED_MECHANISMS in the template of the integrity key",
            0,
        ),
    ),
    (
        "luna7",
        "",
        Refused(
            TOKEN,
            "CKA_COPYABLE and CKA_ALLOWED_MECHANISMS in the template of the integrity key",
            0,
        ),
    ),
    (
        "nethsm",
        "",
        Refused(TOKEN, "FunctionNotSupported from C_GenerateKey", 0),
    ),
    (
        "nshield",
        "",
        Refused(TOKEN, "KeyTypeInconsistent from C_GenerateKey", 0),
    ),
    (
        "opencryptoki-3.8",
        "",
        Refused(
            TOKEN,
            "CKA_COPYABLE and CKA_ALLOWED_MECHANISMS in the template of the integrity key",
            0,
        ),
    ),
    ("p11-kit-remote", "", Works),
    ("pkcs11-proxy", "", Works),
    (
        "tpm2",
        "",
        Refused(TOKEN, "FunctionNotSupported from C_GenerateKey", 0),
    ),
    (
        "yubihsm2",
        "0001",
        Refused(TOKEN, "TemplateInconsistent from C_GenerateKey", 0),
    ),
];

/// A token without keys that behaves like the profile.
fn site(profile: &str, before_pin: &str) -> Site {
    let site = Site::without_keys(Options::default());
    let faulty = faulty_token::put_before(&site);
    faulty.set_profile(profile);
    let pin = format!("{before_pin}{}", site.token.pin());
    write_private(&site.token.pin_file(), &pin);
    site.expect_ok(&["store", "migrate"]);
    site
}

/// The number of objects on the real token.
fn objects(site: &Site) -> usize {
    let output = site.token.pkcs11_tool(&["--list-objects"]);
    assert!(output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stdout)
        .matches(" Object;")
        .count()
}

#[test]
fn each_profile_has_its_verdict() {
    let mut found = BTreeMap::new();
    for (profile, before_pin, expected) in VERDICTS {
        let site = site(profile, before_pin);
        let generated = site.run(&["key", "generate", "--bits", "2048"]);
        let is_met = match expected {
            Works => generated.code == Some(0) && site.run(&["token", "check"]).code == Some(0),
            Refused(code, cause, left) => {
                generated.code == Some(code)
                    && generated.stderr.contains(cause)
                    && objects(&site) == left
            }
        };
        if !is_met {
            found.insert(profile, (expected, generated));
        }
    }
    assert!(found.is_empty(), "{found:#?}");
}

/// Products whose keys are made and pass once the attributes that the message names are excepted.
const WITH_EXCEPTIONS: [(&str, &[&str]); 2] = [
    ("luna7", &["CKA_COPYABLE", "CKA_ALLOWED_MECHANISMS"]),
    (
        "opencryptoki-3.8",
        &["CKA_COPYABLE", "CKA_ALLOWED_MECHANISMS"],
    ),
];

#[test]
fn with_the_exceptions_that_it_needs_a_product_works() {
    for (profile, exceptions) in WITH_EXCEPTIONS {
        let site = site(profile, "");
        let file = site.configuration_file();
        let text = fs::read_to_string(&file).unwrap();
        let excepted = format!("[token]\nattribute_exceptions = {exceptions:?}\n");
        write_private(&file, &text.replacen("[token]\n", &excepted, 1));
        site.expect_ok(&["key", "generate", "--bits", "2048"]);
        let checked = site.run(&["token", "check"]);
        assert_eq!(checked.code, Some(0), "{profile}: {checked:#?}");
        for exception in exceptions {
            let warning = format!("warning: {exception} is excepted");
            assert!(checked.stderr.contains(&warning), "{profile}: {checked:#?}");
        }
    }
}

#[test]
fn every_profile_has_a_verdict() {
    assert_eq!(faulty::profiles(), VERDICTS.map(|(profile, ..)| profile));
}

/// The table of `docs/tokens.md` is what the tests have found.
#[test]
fn the_page_shows_each_verdict() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/tokens.md");
    let page = fs::read_to_string(page).unwrap();
    let (_, section) = page
        .split_once("## Products that the tests do not run")
        .unwrap();
    let rows: Vec<&str> = section
        .lines()
        .filter(|line| line.starts_with("| `"))
        .collect();
    let expected = VERDICTS.map(|(name, _, verdict)| {
        let profile = faulty::profile(name);
        let (product, evidence) = (profile.product, profile.evidence);
        let result = match verdict {
            Works => "works | ".to_owned(),
            Refused(_, cause, left) => format!("refused: `{cause}` | {left}"),
        };
        format!("| `{name}` | {product} | {evidence} | {result} |")
    });
    assert_eq!(rows, expected);
}
