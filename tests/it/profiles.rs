//! The real commands on tokens that behave like the products that the profiles of the scriptable module describe. This shows
//! what the product does with such a token, not that it was tested with the product.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::{
    adopted,
    conformance::{self, Conforming},
    expected::{TOKEN, UNTRUSTED},
    faulty, faulty_token,
    modules::{copy_folder, empty},
    site::{Finished, Options, Site},
    softhsm::write_private,
    worker_key,
};

/// What `key generate`, and `token check` after it, say of a token.
#[derive(Clone, Copy, Debug)]
enum Verdict {
    /// Both succeed.
    Works,
    /// `key generate` ends with this exit code, names this cause, and leaves this number of objects on the token.
    Refused(i32, &'static str, usize),
}

use Verdict::{Refused, Works};

/// A profile with its verdicts.
#[derive(Clone, Copy, Debug)]
struct Expected {
    profile: &'static str,
    /// What stands before the PIN of the real token.
    before_pin: &'static str,
    /// With the settings that have no default.
    verdict: Verdict,
    /// Lines of `[token]`, and the verdict with them.
    with: Option<(&'static [&'static str], Verdict)>,
}

const fn expected(profile: &'static str, verdict: Verdict) -> Expected {
    Expected {
        profile,
        before_pin: "",
        verdict,
        with: None,
    }
}

/// The directory and the digest are added to it.
const IN_WORKER: &str = "integrity_key = \"worker\"";

const COPYABLE_AND_MECHANISMS: &str =
    "attribute_exceptions = [\"CKA_COPYABLE\", \"CKA_ALLOWED_MECHANISMS\"]";

const EXPECTED: [Expected; 12] = [
    Expected {
        before_pin: "crypto_user:",
        with: Some((
            &[
                "attribute_exceptions = [\"CKA_COPYABLE\", \"CKA_ALLOWED_MECHANISMS\", \"CKA_SIGN_RECOVER\"]",
            ],
            Works,
        )),
        ..expected(
            "aws-cloudhsm-sdk5",
            Refused(
                TOKEN,
                "The token refuses CKA_COPYABLE, CKA_ALLOWED_MECHANISMS and CKA_SIGN_RECOVER in templates",
                0,
            ),
        )
    },
    expected(
        "google-kmsp11",
        Refused(TOKEN, "TemplateInconsistent from C_GenerateKey", 0),
    ),
    expected(
        "liar",
        Refused(
            UNTRUSTED,
            "the RSA private key can be wrapped with CKM_AES_KEY_WRAP",
            0,
        ),
    ),
    Expected {
        with: Some((&[COPYABLE_AND_MECHANISMS], Works)),
        ..expected(
            "luna-cloud",
            Refused(
                TOKEN,
                "The token refuses CKA_COPYABLE and CKA_ALLOWED_MECHANISMS in templates",
                0,
            ),
        )
    },
    Expected {
        with: Some((&[COPYABLE_AND_MECHANISMS], Works)),
        ..expected(
            "luna7",
            Refused(
                TOKEN,
                "The token refuses CKA_COPYABLE and CKA_ALLOWED_MECHANISMS in templates",
                0,
            ),
        )
    },
    expected(
        "nethsm",
        Refused(TOKEN, "FunctionNotSupported from C_GenerateKey", 0),
    ),
    Expected {
        with: Some((
            &[
                "integrity_key = \"nshield\"",
                "attribute_exceptions = [\"CKA_COPYABLE\"]",
            ],
            Works,
        )),
        ..expected(
            "nshield",
            Refused(
                TOKEN,
                "The token makes an integrity key of another kind: set `integrity_key = \"nshield\"`",
                0,
            ),
        )
    },
    Expected {
        with: Some((&[COPYABLE_AND_MECHANISMS], Works)),
        ..expected(
            "opencryptoki-3.8",
            Refused(
                TOKEN,
                "The token refuses CKA_COPYABLE and CKA_ALLOWED_MECHANISMS in templates",
                0,
            ),
        )
    },
    expected("p11-kit-remote", Works),
    expected("pkcs11-proxy", Works),
    Expected {
        with: Some((&[IN_WORKER], Works)),
        ..expected(
            "tpm2",
            Refused(TOKEN, "FunctionNotSupported from C_GenerateKey", 0),
        )
    },
    Expected {
        before_pin: "0001",
        with: Some((
            &[
                "integrity_key = \"sha256-hmac\"",
                "attribute_exceptions = [\"CKA_ALLOWED_MECHANISMS\"]",
            ],
            Refused(
                UNTRUSTED,
                "CKA_ALLOWED_MECHANISMS is not exactly CKM_RSA_PKCS_OAEP",
                0,
            ),
        )),
        ..expected(
            "yubihsm2",
            Refused(
                TOKEN,
                "set `integrity_key` in [token] to \"sha256-hmac\" or \"nshield\"",
                0,
            ),
        )
    },
];

/// Profiles of products whose keys are made with the vendor's tool, with the lines of `[token]` that such keys need, and what `key
/// register` says of them.
const ADOPTED: [(&str, &str, &[&str], Verdict); 4] = [
    (
        "aws-cloudhsm-sdk5",
        "crypto_user:",
        &[
            "attribute_exceptions = [\"CKA_COPYABLE\", \"CKA_ALLOWED_MECHANISMS\", \"CKA_SIGN_RECOVER\"]",
        ],
        Works,
    ),
    (
        "google-kmsp11",
        "",
        &["access_control = \"outside-pkcs11\""],
        Works,
    ),
    (
        "nethsm",
        "",
        &["attribute_exceptions = [\"CKA_COPYABLE\", \"CKA_LOCAL\"]"],
        Refused(UNTRUSTED, "CKA_LOCAL is not true", 3),
    ),
    ("yubihsm2", "0001", &[], Works),
];

/// A token without keys that behaves like the profile.
fn site(profile: &str, before_pin: &str) -> Site {
    let site = Site::without_keys(Options::default());
    let faulty = faulty_token::put_before(&site);
    faulty.set_profile(profile);
    put_before_pin(&site, before_pin);
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

fn put_before_pin(site: &Site, text: &str) {
    let pin = format!("{text}{}", site.token.pin());
    write_private(&site.token.pin_file(), &pin);
}

/// Registers the keys that the vendor's tool made.
fn register(site: &Site) -> Finished {
    site.run(&[
        "key",
        "register",
        adopted::PRIVATE,
        "--integrity-id",
        adopted::INTEGRITY,
    ])
}

#[test]
fn keys_of_the_vendors_tool_have_their_verdict() {
    let mut found = BTreeMap::new();
    for (profile, before_pin, lines, verdict) in ADOPTED {
        let (site, faulty) = adopted::site();
        faulty.set_profile(profile);
        put_before_pin(&site, before_pin);
        configure(&site, lines);
        let registered = register(&site);
        let is_met = match verdict {
            Works => registered.code == Some(0) && site.run(&["token", "check"]).code == Some(0),
            Refused(code, cause, left) => {
                registered.code == Some(code)
                    && registered.stderr.contains(cause)
                    && objects(&site) == left
            }
        };
        if !is_met {
            found.insert(profile, (verdict, registered));
        }
    }
    assert!(found.is_empty(), "{found:#?}");
}

/// Adds lines to `[token]`.
fn configure(site: &Site, lines: &[&str]) {
    let file = site.configuration_file();
    let text = fs::read_to_string(&file).unwrap();
    let in_worker = lines.contains(&IN_WORKER);
    let lines: Vec<&str> = lines
        .iter()
        .copied()
        .filter(|line| *line != IN_WORKER)
        .collect();
    let token = format!("[token]\n{}\n", lines.join("\n"));
    write_private(&file, &text.replacen("[token]\n", &token, 1));
    if in_worker {
        worker_key::permit(site);
    }
}

/// Makes a key, and adds the digest of its file to the configuration if there is one.
fn generate(site: &Site) -> Finished {
    let generated = site.run(&["key", "generate", "--bits", "2048"]);
    if worker_key::directory(site).exists() {
        worker_key::pin_files(site);
    }
    generated
}

/// What was found instead, if a verdict is not met.
fn other_than(site: &Site, expected: Verdict) -> Option<String> {
    let generated = generate(site);
    match expected {
        Works if generated.code == Some(0) => {
            let checked = site.run(&["token", "check"]);
            (checked.code != Some(0)).then(|| format!("{checked:#?}"))
        }
        Refused(code, cause, left)
            if generated.code == Some(code) && generated.stderr.contains(cause) =>
        {
            let found = objects(site);
            (found != left).then(|| format!("{found} objects are left"))
        }
        _ => Some(format!("{generated:#?}")),
    }
}

#[test]
fn each_profile_has_its_verdict() {
    let mut found = BTreeMap::new();
    for expected in EXPECTED {
        let site = site(expected.profile, expected.before_pin);
        if let Some(other) = other_than(&site, expected.verdict) {
            found.insert(expected.profile, (expected.verdict, other));
        }
    }
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn with_the_settings_that_it_needs_each_profile_has_its_verdict() {
    let mut found = BTreeMap::new();
    for expected in EXPECTED {
        let Some((lines, verdict)) = expected.with else {
            continue;
        };
        let site = site(expected.profile, expected.before_pin);
        configure(&site, lines);
        if let Some(other) = other_than(&site, verdict) {
            found.insert(expected.profile, (verdict, other));
        }
    }
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn every_profile_has_a_verdict() {
    let expected = EXPECTED.map(|expected| expected.profile);
    assert_eq!(faulty::profiles(), expected);
}

/// The table of `docs/tokens.md` is what the tests have found.
#[test]
fn the_page_shows_each_verdict() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/tokens.md");
    let page = fs::read_to_string(page).unwrap();
    let (_, section) = page
        .split_once("## Products that the tests do not run")
        .unwrap();
    let (section, adopted) = section
        .split_once("| Profile | Settings | Result |")
        .unwrap();
    let shown = |verdict: Verdict| match verdict {
        Works => "works".to_owned(),
        Refused(_, cause, 0) => format!("refused: ``{cause}``"),
        Refused(_, cause, left) => format!("refused: ``{cause}``; {left} objects are left"),
    };
    let settings = |lines: &[&str]| {
        let lines: Vec<String> = lines.iter().map(|line| format!("`{line}`")).collect();
        lines.join(", ")
    };
    let rows = |text: &str| -> Vec<String> {
        let lines = text.lines().filter(|line| line.starts_with("| `"));
        lines.map(str::to_owned).collect()
    };
    let expected = EXPECTED.map(|expected| {
        let name = expected.profile;
        let profile = faulty::profile(name);
        let (product, evidence) = (profile.product, profile.evidence);
        let result = shown(expected.verdict);
        let with = expected.with.map_or_else(String::new, |(lines, verdict)| {
            format!("{}: {}", settings(lines), shown(verdict))
        });
        format!("| `{name}` | {product} | {evidence} | {result} | {with} |")
    });
    assert_eq!(rows(section), expected);
    let expected = ADOPTED.map(|(name, _, lines, verdict)| {
        // The keys of the tool are not ours to remove.
        let verdict = match verdict {
            Refused(code, cause, _) => Refused(code, cause, 0),
            Works => Works,
        };
        format!("| `{name}` | {} | {} |", settings(lines), shown(verdict))
    });
    assert_eq!(rows(adopted), expected);
}

/// A token that behaves like a profile, with the settings with which it works.
struct Product {
    site: Arc<Site>,
    profile: &'static str,
    is_adopted: bool,
}

impl Product {
    /// How the product works: with keys of `key generate` where it makes them, else with keys of the vendor's tool.
    fn that_works(profile: &'static str) -> Self {
        let expected = EXPECTED.iter().find(|one| one.profile == profile);
        let lines = expected.and_then(|one| match (one.verdict, one.with) {
            (Works, _) => Some(&[][..]),
            (_, Some((lines, Works))) => Some(lines),
            _ => None,
        });
        if let (Some(expected), Some(lines)) = (expected, lines) {
            let site = site(profile, expected.before_pin);
            configure(&site, lines);
            return Self {
                site: Arc::new(site),
                profile,
                is_adopted: false,
            };
        }
        let adopted = ADOPTED.iter().find(|one| one.0 == profile);
        let Some((_, before_pin, lines, Works)) = adopted else {
            panic!("{profile} does not work");
        };
        let (site, faulty) = adopted::site();
        faulty.set_profile(profile);
        put_before_pin(&site, before_pin);
        configure(&site, lines);
        Self {
            site: Arc::new(site),
            profile,
            is_adopted: true,
        }
    }

    /// What must be backed up, and under which names.
    fn folders(&self) -> Vec<(PathBuf, &'static str)> {
        let files = worker_key::directory(&self.site);
        let files = files.exists().then_some((files, "integrity-keys"));
        let token = Some((self.site.token.directory(), "token"));
        token.into_iter().chain(files).collect()
    }
}

impl Conforming for Product {
    fn site(&self) -> &Arc<Site> {
        &self.site
    }

    fn workers(&self) -> usize {
        Options::default().workers
    }

    fn make_key(&self) {
        let made = if self.is_adopted {
            register(&self.site)
        } else {
            generate(&self.site)
        };
        assert_eq!(made.code, Some(0), "{}: {made:#?}", self.profile);
    }

    fn back_up(&self) -> PathBuf {
        let copy = self.site.folder().join("backup");
        fs::create_dir(&copy).unwrap();
        for (folder, name) in self.folders() {
            copy_folder(&folder, &copy.join(name));
        }
        copy
    }

    fn lose(&self) {
        for (folder, _) in self.folders() {
            empty(&folder);
        }
    }

    fn restore(&self, copy: &Path) {
        self.lose();
        for (folder, name) in self.folders() {
            copy_folder(&copy.join(name), &folder);
        }
    }
}

/// One test of the whole suite for each profile.
macro_rules! conform {
    ($($test:ident: $profile:literal),*) => {
        const CONFORM: &[&str] = &[$($profile),*];

        $(
            #[test]
            fn $test() {
                conformance::run_on(&Product::that_works($profile));
            }
        )*
    };
}

conform! {
    aws_cloudhsm_conforms: "aws-cloudhsm-sdk5",
    google_kmsp11_conforms: "google-kmsp11",
    luna_cloud_conforms: "luna-cloud",
    luna_conforms: "luna7",
    nshield_conforms: "nshield",
    opencryptoki_profile_conforms: "opencryptoki-3.8",
    p11_kit_remote_profile_conforms: "p11-kit-remote",
    pkcs11_proxy_conforms: "pkcs11-proxy",
    tpm_conforms: "tpm2",
    yubihsm_conforms: "yubihsm2"
}

#[test]
fn the_suite_runs_on_every_profile_that_works() {
    let generated = EXPECTED
        .iter()
        .filter(|one| matches!(one.verdict, Works) || matches!(one.with, Some((_, Works))));
    let adopted = ADOPTED.iter().filter(|one| matches!(one.3, Works));
    let works: BTreeSet<&str> = generated
        .map(|one| one.profile)
        .chain(adopted.map(|one| one.0))
        .collect();
    assert_eq!(works, CONFORM.iter().copied().collect());
}
