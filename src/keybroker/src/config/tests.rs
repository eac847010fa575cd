//! Tests that the example configuration is valid, and that it shows the defaults of the code.

use std::{fs, sync::LazyLock};

use keybroker_auth::issuer;

use super::*;

const WRITTEN: &str = include_str!("../../../../keybroker.example.toml");

/// The example with its optional tables, whose lines start with `#: `.
static EXAMPLE: LazyLock<String> = LazyLock::new(|| WRITTEN.replace("\n#: ", "\n"));

/// Returns the example with every default that it shows in a comment as a setting.
fn with_defaults_in_force() -> String {
    EXAMPLE
        .lines()
        .map(|line| match line.strip_prefix("# ") {
            Some(setting) if is_default(setting) => setting,
            _ => line,
        })
        .collect::<Vec<_>>()
        .join("\n")
}

fn is_default(text: &str) -> bool {
    let Some((name, _)) = text.split_once(" = ") else {
        return false;
    };
    let alternatives = [
        "serial",
        "copy_of",
        "assurance",
        "uri",
        "initialize_string",
        "integrity_key_directory",
        "socket_users",
        "password_file",
        "password_variable",
        "ca_file",
        "client_crl_file",
        "client_crl_issuers_file",
        "plaintext",
        "profile",
        "discovery_url",
        "jwks_url",
        "jwks_file",
        "pem_file",
        "device_claim",
        "directory",
        "remote",
        "users",
        "key_names",
        "authorization_url",
        "token_url",
    ];
    name.chars()
        .all(|c| c.is_ascii_lowercase() || c == '_' || c == '1')
        && !alternatives.contains(&name)
}

#[test]
fn the_example_is_a_good_configuration() {
    for text in [WRITTEN, EXAMPLE.as_str()] {
        let config = Config::parse(text).unwrap();
        assert_eq!(config.problems(), Vec::<String>::new());
    }
}

#[test]
fn the_example_shows_the_defaults() {
    let shown = with_defaults_in_force();
    assert_ne!(shown, *EXAMPLE);
    let (with, without) = (
        Config::parse(&shown).unwrap(),
        Config::parse(&EXAMPLE).unwrap(),
    );
    assert_eq!(
        serde_json::to_value(with).unwrap(),
        serde_json::to_value(without).unwrap()
    );
}

/// The example contains every field of the settings, either as a setting or in a comment.
#[test]
fn the_example_names_every_field() {
    let value = serde_json::to_value(Config::parse(&with_defaults_in_force()).unwrap()).unwrap();
    let mut names = Vec::new();
    collect_names(&value, &mut names);
    for name in names {
        assert!(EXAMPLE.contains(&name), "{name} is not in the example");
    }
}

fn collect_names(value: &serde_json::Value, names: &mut Vec<String>) {
    match value {
        serde_json::Value::Object(fields) => {
            for (name, value) in fields {
                names.push(name.clone());
                collect_names(value, names);
            }
        }
        serde_json::Value::Array(values) => values.iter().for_each(|v| collect_names(v, names)),
        _ => {}
    }
}

/// Mistakes in the example. Each entry contains a string from the example, its replacement, and
/// words that the error message must contain.
const MISTAKES: &[(&str, &str, &str)] = &[
    ("label = \"keybroker\"", "", "exactly one of `label`"),
    (
        "label = \"keybroker\"",
        "label = \"a\"\nserial = \"b\"",
        "exactly one of `label`",
    ),
    ("# workers = 2", "workers = 0", "`workers` is 0"),
    ("# workers = 2", "workers = 65", "1 to 64"),
    (
        "# sessions_per_worker = 2",
        "sessions_per_worker = 0",
        "1 to 256",
    ),
    ("pin_file = \"/etc", "pin_file = \"etc", "absolute path"),
    ("pin_file = \"/etc/keybroker/pin\"", "", "set `pin_file`"),
    ("module = \"/usr", "module = \"usr", "absolute path"),
    (
        "# attribute_exceptions = []",
        "attribute_exceptions = [\"CKA_X\"]",
        "\"CKA_X\"",
    ),
    ("sqlite:/var", "sqlite:var", "absolute path"),
    ("sqlite:/var", "oracle:/var", "must be `sqlite:`"),
    (
        "sqlite:/var/lib/keybroker/keybroker.db",
        "postgres://me:hunter2@db/keys",
        "`password_file`",
    ),
    (
        "sqlite:/var/lib/keybroker/keybroker.db",
        "postgres://me@db/keys?sslmode=disable",
        "parameters",
    ),
    (
        "# password_file = ",
        "password_variable = \"X\"\npassword_file = ",
        "remove one of them",
    ),
    (
        "# password_file = \"/",
        "password_file = \"",
        "absolute path",
    ),
    ("# ca_file = \"/", "ca_file = \"", "absolute path"),
    (
        "# tls = \"verify\"",
        "tls = \"plaintext\"\nca_file = \"/ca.pem\"",
        "verifies no certificate",
    ),
    (
        "# connections_max = 10",
        "connections_max = 0",
        "`connections_max` is 0",
    ),
    (
        "# acquire_timeout_ms = 800",
        "acquire_timeout_ms = 1",
        "50 to 60000",
    ),
    (
        "# statement_timeout_ms = 2000",
        "statement_timeout_ms = 1",
        "100 to 600000",
    ),
    (
        "# lock_timeout_ms = 1000",
        "lock_timeout_ms = 1",
        "100 to 600000",
    ),
    (
        "# accept_weaker_durability = []",
        "accept_weaker_durability = [\"fsinc\"]",
        "\"fsinc\"",
    ),
    (
        "address = \"127.0.0.1:9464\"",
        "address = \"0.0.0.0:9464\"",
        "loopback",
    ),
    (
        "# defaults = true",
        "defaults = false",
        "would deny every request",
    ),
    (
        "# directory = \"/etc/keybroker/policies",
        "directory = \"policies",
        "[policy] `directory`",
    ),
    ("apis = [\"grpc\"]", "apis = []", "`apis` is empty"),
    (
        "apis = [\"console\"]",
        "apis = [\"console\", \"rest\"]",
        "the page for approvers needs a separate listener",
    ),
    (
        "apis = [\"console\"]",
        "apis = [\"grpc\"]",
        "[console] has no effect",
    ),
    (
        "issuer = \"sso\"",
        "issuer = \"other\"",
        "no [[issuer]] has this `name`",
    ),
    (
        "roles = [\"approver\"]",
        "roles = [\"lifecycle\"]",
        "gives the role `approver`",
    ),
    (
        "external_url = \"https://approvers.example.org:8445\"",
        "external_url = \"https://approvers.example.org/\"",
        "without a slash at the end",
    ),
    (
        "# scopes = [\"openid\"]",
        "scopes = [\"groups\"]",
        "must contain \"openid\"",
    ),
    (
        "client_secret_file = \"/etc/keybroker/console",
        "client_secret_file = \"console",
        "absolute path",
    ),
    ("# idle_minutes = 15", "idle_minutes = 0", "1 to 480"),
    (
        "# allowed_origins = []",
        "allowed_origins = [\"*\"]",
        "which no browser sends",
    ),
    (
        "# path_prefix = \"\"",
        "path_prefix = \"keys/\"",
        "begin with a slash",
    ),
    (
        "client_ca_file = \"/etc/keybroker/tls/client-ca.pem\"",
        "",
        "`client_ca_file`",
    ),
    (
        "# call_timeout_max_ms = 30000",
        "call_timeout_max_ms = 1",
        "100 to 600000",
    ),
    ("# instance = \"serve\"", "instance = \"A/b\"", "`instance`"),
    ("# instance = \"serve\"", "instance = \"..\"", "`instance`"),
    (
        "# instance = \"serve\"",
        "instance = \"state\"",
        "`instance`",
    ),
    ("127.0.0.1:8444", "127.0.0.1:8443", "uses the same address"),
    ("127.0.0.1:8444", "127.0.0.1:9464", "uses the same address"),
    ("SOFTHSM2_CONF =", "\"A=B\" =", "cannot be set"),
    ("SOFTHSM2_CONF =", "\"\" =", "cannot be set"),
    (
        "\"release\", \"enrol\"",
        "\"release\", \"admin\"",
        "must not be able to obtain keys",
    ),
    ("\"release\", \"enrol\"", "", "has no role"),
    (
        "URI:spiffe://example.org/ops",
        "URI:spiffe://example.org/vault",
        "appears twice",
    ),
    ("URI:spiffe://example.org/ops", "ops", "`URI:…` or `DNS:…`"),
    (
        "audience = [\"keybroker\"]",
        "",
        "issued for other applications",
    ),
    (
        "issuer = \"https://",
        "issuer = \"http://",
        "allow_http = true",
    ),
    ("# leeway_s = 30", "leeway_s = 3000", "0 to 300"),
    (
        "# subject_claim = \"sub\"",
        "subject_claim = \"email\"",
        "assign to another person",
    ),
    (
        "# mapping_required = false",
        "mapping_required = true\nkind = \"service\"\nroles = [\"enrol\"]",
        "`roles` of the issuer has no effect",
    ),
    (
        "any_of = [\"keybroker-approvers\"]",
        "any_of = []",
        "the mapping can never apply",
    ),
    (
        "# kind = \"service\"",
        "kind = \"user\"",
        "users have no role",
    ),
    (
        "# client_crl_file = \"/",
        "client_crl_file = \"",
        "absolute path",
    ),
    (
        "# client_crl_issuers_file = \"/",
        "client_crl_issuers_file = \"",
        "absolute path",
    ),
    (
        "# client_crl_issuers_file",
        "client_crl_issuers_file",
        "`client_crl_file`, which is not set",
    ),
    (
        "# trust_domains = []",
        "trust_domains = [\"Example.org\"]",
        "\"Example.org\"",
    ),
    ("name = \"office\"", "name = \"Office\"", "[a-z0-9._-]"),
    (
        "\"198.51.100.0/24\"",
        "\"198.51.100.7/24\"",
        "write 198.51.100.0/24",
    ),
    (
        "spiffe://example.org/vault",
        "spiffe://example.org/vault/",
        "not a valid SPIFFE id",
    ),
];

/// The examples of `docs/identity.md` can be copied into a configuration.
#[test]
fn each_issuer_of_the_page_about_identities_is_valid() {
    let page = include_str!("../../../../docs/identity.md");
    let blocks = page.split("```toml\n").skip(1);
    let blocks = blocks.filter_map(|block| block.split("\n```").next());
    let issuers: Vec<&str> = blocks
        .filter(|block| block.contains("[[issuer]]"))
        .collect();
    assert!(issuers.len() >= 8, "{issuers:?}");
    for text in issuers {
        let config = Config::parse(&format!("{WRITTEN}\n{text}\n")).unwrap();
        assert_eq!(config.problems(), Vec::<String>::new(), "{text}");
        assert_eq!(issuer::remarks(&config.issuers), Vec::<String>::new());
    }
}

/// If a URL contains a password, neither messages nor shown settings repeat the password.
#[test]
fn a_password_in_the_url_is_nowhere_repeated() {
    let text = EXAMPLE.replace(
        "sqlite:/var/lib/keybroker/keybroker.db",
        "postgres://me:hunter2@db/keys",
    );
    let config = Config::parse(&text).unwrap();
    let shown = format!(
        "{config:?} {:?} {} {}",
        config.problems(),
        toml::to_string(&config).unwrap(),
        serde_json::to_string(&config).unwrap()
    );
    assert!(!shown.contains("hunter2"), "{shown}");
}

#[test]
fn each_mistake_has_its_message() {
    let unknown = Config::parse(&EXAMPLE.replace("[status]", "[status]\nport = 1"))
        .unwrap_err()
        .to_string();
    assert!(unknown.contains("unknown field `port`"), "{unknown}");
    assert!(unknown.contains("line"), "{unknown}");

    for (good, bad, words) in MISTAKES {
        assert!(EXAMPLE.contains(good), "{good}");
        let problems = Config::parse(&EXAMPLE.replacen(good, bad, 1))
            .unwrap()
            .problems();
        assert!(
            problems.iter().any(|p| p.contains(words)),
            "{bad:?}: {problems:?}"
        );
    }
}

/// In configurations of earlier releases, the setting `apis` of a listener has the name `doors`.
#[test]
fn the_earlier_name_of_the_setting_apis_is_accepted() {
    let earlier = EXAMPLE.replace("\napis = ", "\ndoors = ");
    assert_eq!(earlier.matches("\ndoors = ").count(), 3);
    let (earlier, now) = (Config::parse(&earlier), Config::parse(&EXAMPLE));
    let apis =
        |config: &Config| -> Vec<_> { config.listeners.iter().map(|it| it.apis.clone()).collect() };
    assert_eq!(apis(&earlier.unwrap()), apis(&now.unwrap()));
}

/// A REST listener needs an issuer for users, because users authenticate with access tokens.
#[test]
fn a_rest_listener_needs_an_issuer_of_users() {
    let needs = |text: &str| {
        let text = text.replacen("apis = [\"grpc\"]", "apis = [\"rest\"]", 1);
        let problems = Config::parse(&text).unwrap().problems();
        problems.iter().any(|p| p.contains("has `kind = \"user\"`"))
    };
    assert!(needs(WRITTEN));
    assert!(!needs(&EXAMPLE));
    let of_services = EXAMPLE.replace("# kind = \"user\"", "kind = \"service\"");
    assert!(needs(&of_services));
    // A mapping can have users, too.
    let mapped = of_services
        .replace("# kind = \"service\"", "kind = \"user\"")
        .replace("roles = [\"approver\"]\n", "");
    assert!(!needs(&mapped));
}

/// Policies may name the holders of access tokens of each kind that an issuer has.
#[test]
fn a_policy_may_name_the_services_of_a_mapping() {
    let folder = tempfile::tempdir().unwrap();
    let remarks = |text: &str, kind: &str| {
        let rule = format!(
            "forbid (principal == Keybroker::{kind}::\"token:sso:ada\", action, resource);"
        );
        fs::write(folder.path().join("one.cedar"), rule).unwrap();
        let mut config = Config::parse(text).unwrap();
        config.policy.directory = Some(folder.path().to_owned());
        config.unknown_principals().unwrap().len()
    };
    for kind in ["User", "Service"] {
        assert_eq!(remarks(&EXAMPLE, kind), 0, "{kind}");
        assert_eq!(remarks(WRITTEN, kind), 1, "{kind}");
    }
    let required = EXAMPLE.replace("# mapping_required = false", "mapping_required = true");
    assert_eq!(
        (remarks(&required, "User"), remarks(&required, "Service")),
        (1, 0)
    );
}

/// If an unknown field contains a secret, the log must not contain the secret.
#[test]
fn a_mistake_has_its_place_and_not_its_line() {
    let text = EXAMPLE.replace("[store]", "[store]\n  pin = \"hunter2\"");
    let line = 1 + text
        .lines()
        .position(|line| line.contains("hunter2"))
        .unwrap();
    let message = Config::parse(&text).unwrap_err().to_string();
    assert!(
        message.starts_with(&format!("line {line}, column 3: ")),
        "{message}"
    );
    assert!(message.contains("`pin`"), "{message}");
    assert!(!message.contains("hunter2"), "{message}");
}

/// Each entry contains a correct setting, a wrong value for it, and the advice in the error
/// message.
#[test]
fn a_value_of_the_wrong_type_is_answered_with_the_right_one() {
    for (good, bad, advice) in [
        (
            "# drain_timeout_ms = 30000",
            "drain_timeout_ms = \"30s\"",
            "`drain_timeout_ms = 30000`",
        ),
        (
            "# drain_timeout_ms = 30000",
            "drain_timeout_ms = '2 min'",
            "`drain_timeout_ms = 120000`",
        ),
        (
            "# drain_timeout_ms = 30000",
            "drain_timeout_ms = \"soon\"",
            "milliseconds without a unit",
        ),
        (
            "# segment_bytes_max = 67108864",
            "segment_bytes_max = \"64MiB\"",
            "`segment_bytes_max = 67108864`",
        ),
        ("# workers = 2", "workers = \"2\"", "`workers = 2`"),
        (
            "# defaults = true",
            "defaults = \"yes\"",
            "`defaults = true`",
        ),
        (
            "roles = [\"release\", \"enrol\"]",
            "roles = \"release\"",
            "`roles = [\"release\"]`",
        ),
        (
            "address = \"127.0.0.1:9464\"",
            "address = \"::1:8443\"",
            "[::1]:8443",
        ),
        (
            "address = \"127.0.0.1:9464\"",
            "address = \"localhost:8443\"",
            "for `localhost`, write 127.0.0.1",
        ),
        ("# workers = 2", "worker = 2", "did you mean `workers`?"),
        (
            "\n[[issuer.mapping]]",
            "\n[issuer.mapping]",
            "`[[issuer.mapping]]`",
        ),
        (
            "key_names = [\"vault\"]",
            "key_names = [\"backup-*\"]",
            "patterns are not supported",
        ),
        (
            "# instance = \"serve\"",
            "instance = 7",
            "`instance = \"7\"`",
        ),
    ] {
        assert!(EXAMPLE.contains(good), "{good}");
        let error = Config::parse(&EXAMPLE.replacen(good, bad, 1)).unwrap_err();
        let hint = error.hint().unwrap_or_default();
        assert!(hint.contains(advice), "{bad}: {error}\nhint: {hint}");
    }
}
