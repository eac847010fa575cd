//! What people are told when they make a mistake: what happened, what it means, and what to do. Each mistake is made for real, with
//! the real binary.

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, chown},
    path::Path,
    process::Command,
};

use rcgen::{BasicConstraints, ExtendedKeyUsagePurpose, IsCa, KeyUsagePurpose};
use reqwest::Method;
use time::{Duration, OffsetDateTime};

use crate::{
    client_commands::client,
    expected::{OTHER_USER, says},
    pki,
    process::{Broker, until},
    rest::site::RestSite,
    site::{Finished, Options, Site},
    softhsm::write_private,
};

fn text(path: &Path) -> String {
    fs::read_to_string(path).unwrap()
}

fn encrypt_key(path: &Path) {
    let status = Command::new("openssl")
        .args(["pkey", "-aes256", "-passout", "pass:secret", "-in"])
        .arg(path)
        .arg("-out")
        .arg(path.with_extension("encrypted"))
        .status()
        .unwrap();
    assert!(status.success());
    let encrypted = text(&path.with_extension("encrypted"));
    write_private(path, &encrypted);
}

type Mistake = fn(&Site);

/// Mistakes with certificates and keys, and words of the problem that `config check` reports.
const CERTIFICATES: [(&str, Mistake, &[&str]); 13] = [
    (
        "no subject alternative name",
        |site| {
            site.pki
                .issue_server_with(|one| one.subject_alt_names.clear());
        },
        &["no DNS name and no IP address", "subjectAltName"],
    ),
    (
        "a certificate for clients",
        |site| {
            site.pki.issue_server_with(|one| {
                one.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
            });
        },
        &["extendedKeyUsage", "serverAuth"],
    ),
    (
        "a key that may not sign",
        |site| {
            site.pki.issue_server_with(|one| {
                one.key_usages = vec![KeyUsagePurpose::KeyEncipherment];
            });
        },
        &["keyUsage", "digitalSignature"],
    ),
    (
        "an authority as a server",
        |site| {
            site.pki
                .issue_server_with(|one| one.is_ca = IsCa::Ca(BasicConstraints::Unconstrained));
        },
        &["CA:TRUE", "separate certificate"],
    ),
    (
        "an expired certificate",
        |site| site.pki.issue_expired_server(),
        &["expired on 2020-02-01", "renew the certificate"],
    ),
    (
        "a certificate of tomorrow",
        |site| {
            site.pki.issue_server_with(|one| {
                one.not_before = OffsetDateTime::now_utc() + Duration::days(1);
            });
        },
        &["is not valid before", "clock"],
    ),
    (
        "a leaf as the authority of clients",
        |site| {
            let leaf = text(&site.pki.certificate_file("releaser"));
            fs::write(site.pki.ca_file(), leaf).unwrap();
        },
        &["CA:FALSE", "use the certificate of the CA"],
    ),
    (
        "no certificate in the file of authorities",
        |site| fs::write(site.pki.ca_file(), "").unwrap(),
        &["client_ca_file", "contains no certificate"],
    ),
    (
        "half of a certificate",
        |site| {
            let path = site.pki.certificate_file("server");
            let whole = text(&path);
            fs::write(&path, &whole[..whole.len() / 2]).unwrap();
        },
        &["certificate_file", "truncated or damaged"],
    ),
    (
        "a key under a passphrase",
        |site| encrypt_key(&site.pki.key_file("server")),
        &["key_file", "encrypted", "openssl pkey -in"],
    ),
    (
        "the key of another certificate",
        |site| {
            let other = text(&site.pki.key_file("releaser"));
            write_private(&site.pki.key_file("server"), &other);
        },
        &["is not the private key of the certificate"],
    ),
    (
        "a certificate as the key",
        |site| {
            let certificate = text(&site.pki.certificate_file("server"));
            write_private(&site.pki.key_file("server"), &certificate);
        },
        &["key_file", "contains no private key"],
    ),
    (
        "a certificate in the format of OpenSSL",
        |site| {
            let path = site.pki.certificate_file("server");
            fs::write(
                &path,
                text(&path).replace("CERTIFICATE", "TRUSTED CERTIFICATE"),
            )
            .unwrap();
        },
        &["TRUSTED CERTIFICATE", "openssl x509"],
    ),
];

#[test]
fn config_check_reports_certificates_that_clients_would_refuse() {
    let site = Site::without_keys(Options::default());
    let [ca, server, key] = [
        site.pki.ca_file(),
        site.pki.certificate_file("server"),
        site.pki.key_file("server"),
    ];
    let authority = text(&ca);
    says("no mistake", &site.run(&["config", "check"]), 0, &[]);
    for (what, mistake, words) in CERTIFICATES {
        mistake(&site);
        says(what, &site.run(&["config", "check"]), 3, words);
        fs::write(&ca, &authority).unwrap();
        for path in [&server, &key] {
            fs::remove_file(path).unwrap();
        }
        site.pki.issue_server();
    }
    says("corrected", &site.run(&["config", "check"]), 0, &[]);
    // The authorities of an issuer are read in the same way.
    let leaf = site.pki.certificate_file("releaser");
    let issuer = format!(
        "\n[[issuer]]\nname = \"sso\"\nissuer = \"https://sso.example\"\naudience = [\"keybroker\"]\nca_file = \"{}\"\n",
        leaf.display()
    );
    site.write_configuration(|text| text.push_str(&issuer));
    let finished = site.run(&["config", "check"]);
    let words = ["[[issuer]] sso: `ca_file`", "CA:FALSE"];
    says("a leaf as an authority", &finished, 3, &words);
}

/// A certificate that lives for a day is renewed every day; only one that is late for its own lifetime is worth a warning.
#[test]
fn config_check_reports_an_end_that_is_near_for_the_lifetime_of_the_certificate() {
    let site = Site::without_keys(Options::default());
    let now = OffsetDateTime::now_utc();
    for (from, until, is_late) in [
        (Duration::hours(1), Duration::hours(23), false),
        (Duration::hours(22), Duration::hours(2), true),
        (Duration::days(60), Duration::days(30), false),
        (Duration::days(340), Duration::days(25), true),
    ] {
        site.pki.issue_server_with(|one| {
            one.not_before = now - from;
            one.not_after = now + until;
        });
        let finished = site.run(&["config", "check"]);
        says("a certificate in use", &finished, 0, &[]);
        assert_eq!(
            finished.stderr.contains("the certificate expires soon, on"),
            is_late,
            "{until}: {finished:#?}"
        );
    }
}

const LIMIT: &str = "drain_timeout_ms = \"30s\"";

/// What stands in a good configuration, what is written instead, and the advice.
const VALUES: &[(&str, &str, &str)] = &[
    (
        "address = \"127.0.0.1:0\"",
        "address = \"localhost:8443\"",
        "for `localhost`, write 127.0.0.1",
    ),
    (
        "address = \"127.0.0.1:0\"",
        "address = \"::1:8443\"",
        "[::1]:8443",
    ),
    (
        "roles = [\"release\"]",
        "roles = \"release\"",
        "`roles = [\"release\"]`",
    ),
    (
        "key_names = [\"*\"]",
        "key_names = [\"backup-*\"]",
        "patterns are not supported",
    ),
    (
        LIMIT,
        "drain_timeout_ms = -1",
        "write milliseconds as a whole number that is not negative",
    ),
    (
        LIMIT,
        "drain_timeout_ms = 30.5",
        "write milliseconds as a whole number that is not negative",
    ),
    (
        LIMIT,
        "drain_timeout_ms = 30s",
        "`drain_timeout_ms = 30000`",
    ),
    (
        "label = \"",
        "label = keybroker # \"",
        "`label = \"keybroker\"`",
    ),
    (
        "[[listener]]",
        "[listener]",
        "double brackets: `[[listener]]`",
    ),
    (
        "roles = [\"release\"]",
        "roles = [\"relaese\"]",
        "did you mean `release`?",
    ),
];

#[test]
fn a_value_of_the_wrong_type_is_answered_with_what_to_write() {
    let site = Site::without_keys(Options {
        limits: LIMIT.to_owned(),
        ..Options::default()
    });
    let check = || site.run(&["config", "check"]);
    says(
        "a unit",
        &check(),
        3,
        &["line ", "hint: ", "`drain_timeout_ms = 30000`"],
    );
    site.replace_once("drain_timeout_ms = \"30s\"", "drain_timout_ms = 1");
    says(
        "a typing error",
        &check(),
        3,
        &["did you mean `drain_timeout_ms`?"],
    );
    for &(from, to, advice) in VALUES {
        site.write_configuration(|text| {
            assert!(text.contains(from), "{from}: {text}");
            *text = text.replacen(from, to, 1).replace(LIMIT, "");
        });
        says(to, &check(), 3, &["line ", advice]);
    }
    fs::remove_file(site.configuration_file()).unwrap();
    says(
        "no file",
        &check(),
        3,
        &["hint: pass another file with --config"],
    );
}

#[test]
fn a_database_that_cannot_be_used_is_named_with_the_remedy() {
    let site = Site::without_keys(Options::default());
    let database = site.database();
    site.expect_ok(&["store", "migrate"]);
    let mode = |mode| fs::set_permissions(&database, fs::Permissions::from_mode(mode)).unwrap();
    mode(0o644);
    says(
        "other users can read it",
        &site.run(&["config", "check"]),
        3,
        &["mode 0644", "chmod 600"],
    );
    mode(0o600);
    says("corrected", &site.run(&["config", "check"]), 0, &[]);
    fs::write(
        &database,
        "a text that somebody saved under this name\n".repeat(100),
    )
    .unwrap();
    says(
        "a text",
        &site.run(&["store", "status"]),
        7,
        &["is not a SQLite database"],
    );
}

/// SQLite makes files beside the database even to read it.
#[test]
fn a_database_on_a_read_only_file_system_is_named_as_such() {
    let site = Site::without_keys(Options::default());
    site.expect_ok(&["store", "migrate"]);
    let folder = site.data_directory();
    let plain = site.command(&["store", "status"]);
    let command = if rustix::process::geteuid().is_root() {
        // Root may write to every file, so a read-only mount of its own stands in for the mode.
        let shown = folder.display();
        let line = format!(
            "mount --bind '{shown}' '{shown}' && mount -o remount,bind,ro '{shown}' && exec \"$0\" \"$@\""
        );
        let mut unshared = Command::new("unshare");
        unshared.args(["--mount", "sh", "-c", &line]);
        unshared.arg(plain.get_program()).args(plain.get_args());
        unshared
    } else {
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o500)).unwrap();
        plain
    };
    let finished = site.run_to_its_end(command);
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o700)).unwrap();
    let words = ["write access to the directory of the database", "read-only"];
    says("a read-only file system", &finished, 7, &words);
}

/// A forbid with a typing error is valid, and forbids nothing.
#[test]
fn a_policy_about_an_unknown_principal_is_reported() {
    let site = Site::without_keys(Options::default());
    let policies = site.folder().join("policies");
    fs::create_dir(&policies).unwrap();
    let known = pki::uri("releaser");
    let write = |kind: &str, name: &str| {
        let policy = format!(
            "@id(\"no-backup\")\nforbid (principal == Keybroker::{kind}::\"{name}\", action == Keybroker::Action::\"user_key.unwrap\", resource);\n"
        );
        fs::write(policies.join("site.cedar"), policy).unwrap();
    };
    site.write_configuration(|text| {
        let section = format!("\n[policy]\ndirectory = \"{}\"\n", policies.display());
        text.push_str(&section);
    });
    let commands = [&["config", "check"][..], &["policy", "check"]];
    let client = format!("client:{}", "0a".repeat(16));
    for good in [format!("URI:{known}"), client] {
        write("Service", &good);
        for command in commands {
            let finished = site.run(command);
            says(&good, &finished, 0, &[]);
            assert!(!finished.stderr.contains("no-backup"), "{finished:#?}");
        }
    }
    for (kind, bad, advice) in [
        (
            "Service",
            format!("URI:{}", known.replace("releaser", "relaeser")),
            "did you mean",
        ),
        ("Service", "backup".to_owned(), "`san` of a [[principal]]"),
        ("Service", "token:nobody:1".to_owned(), "[[issuer]]"),
        ("User", format!("URI:{known}"), "[[issuer]]"),
    ] {
        write(kind, &bad);
        for command in commands {
            let finished = site.run(command);
            says(&bad, &finished, 0, &["policy `no-backup`", &bad, advice]);
        }
        let json = site.run(&["-o", "json", "policy", "check"]);
        assert!(
            json.stdout.contains("\"unknown_principals\": 1"),
            "{json:#?}"
        );
    }
}

/// A command that another user than the broker's runs says which user to be.
#[test]
fn a_command_of_the_wrong_user_says_which_user_to_be() {
    let site = Site::without_keys(Options::default());
    let owner = if rustix::process::geteuid().is_root() {
        fs::create_dir(site.audit_directory()).unwrap();
        fs::set_permissions(site.audit_directory(), fs::Permissions::from_mode(0o700)).unwrap();
        chown(site.audit_directory(), Some(OTHER_USER), None).unwrap();
        OTHER_USER
    } else {
        // Only root can give a directory to another user, but /usr is another user's already.
        let ours = format!("directory = \"{}\"", site.audit_directory().display());
        site.replace_once(&ours, "directory = \"/usr\"");
        0
    };
    let finished = site.run(&["store", "migrate"]);
    says(
        "the wrong user",
        &finished,
        8,
        &[
            &format!("belongs to user {owner}"),
            &format!("run the command as user {owner}"),
        ],
    );
}

/// The capability is dropped for this process, because the tests may run as root.
#[test]
fn a_port_that_needs_a_capability_is_named_with_it() {
    let site = Site::fresh(Options::default());
    site.replace_once(
        "[[listener]]\naddress = \"127.0.0.1:0\"",
        "[[listener]]\naddress = \"127.0.0.1:1\"",
    );
    let plain = site.serve();
    let mut command = Command::new("setpriv");
    if rustix::process::geteuid().is_root() {
        command.args([
            "--bounding-set",
            "-net_bind_service",
            "--inh-caps",
            "-net_bind_service",
        ]);
    }
    command
        .arg("--")
        .arg(plain.get_program())
        .args(plain.get_args());
    let finished = site.run_to_its_end(command);
    says(
        "port 1",
        &finished,
        3,
        &["127.0.0.1:1", "CAP_NET_BIND_SERVICE"],
    );
}

#[test]
fn a_running_broker_that_has_the_database_is_named_with_the_remedy() {
    let broker = Broker::start(Options::default());
    let finished = broker.site.run(&["key", "generate", "--bits", "2048"]);
    says("a second process", &finished, 9, &["stop the broker first"]);
}

/// What goes wrong on the side of the client is found there, before the broker refuses it without a word.
#[test]
fn a_client_that_cannot_connect_says_why() {
    let broker = Broker::start(Options::default());
    let run = |name: &str| Finished::from(client(&broker, name, &["health"]).output().unwrap());
    let pki = &broker.site.pki;

    says(
        "expired",
        &run(pki::EXPIRED),
        2,
        &["--cert", "expired on 2020-02-01", "renew the certificate"],
    );
    pki.issue_client_with("early", |one| {
        one.not_before = OffsetDateTime::now_utc() + Duration::days(1);
    });
    says("early", &run("early"), 2, &["is not valid before", "clock"]);
    pki.issue_client_with("server-only", |one| {
        one.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    });
    says("for servers", &run("server-only"), 2, &["clientAuth"]);
    let other = text(&pki.key_file("auditor"));
    write_private(&pki.key_file("server-only"), &other);
    pki.issue_client_with("mixed", |_| {});
    write_private(&pki.key_file("mixed"), &other);
    says(
        "another key",
        &run("mixed"),
        2,
        &["--key", "is not the private key of the certificate"],
    );
}

/// The name of the host, the port and the authority: each has its own message.
#[test]
fn a_broker_that_cannot_be_reached_is_told_by_its_cause() {
    let broker = Broker::start(Options::default());
    let pki = &broker.site.pki;
    let to = |endpoint: &str, ca: &Path| {
        let mut command =
            broker
                .site
                .command(&["client", "health", "--endpoint", endpoint, "--ca"]);
        Finished::from(command.arg(ca).output().unwrap())
    };
    let ca = pki.ca_file();
    let status = format!("https://localhost:{}", broker.status.port());
    says(
        "status listener",
        &to(&status, &ca),
        11,
        &["does not use TLS", "[status] address"],
    );
    says(
        "no listener",
        &to("https://localhost:1", &ca),
        11,
        &["nothing listens"],
    );
    let grpc = format!("https://localhost:{}", broker.grpc.port());
    says(
        "no certificate",
        &to(&grpc, &ca),
        11,
        &["requires a client certificate: pass --cert and --key"],
    );
    let others = pki.certificate_file("other-ca");
    says(
        "another authority",
        &to(&grpc, &others),
        11,
        &[
            "certificate is not signed by a CA in --ca (",
            "hint: --ca must contain the certificate of the CA",
        ],
    );
    says(
        "no port",
        &to("https://127.0.0.3", &ca),
        11,
        &["--endpoint has no port, so port 443 was used"],
    );
    let by_name = to(&grpc.replace("localhost", "127.0.0.2"), &ca);
    says(
        "no listener at this address",
        &by_name,
        11,
        &["nothing listens"],
    );
}

#[test]
fn a_broker_of_another_name_is_told_from_one_of_another_authority() {
    let site = Site::fresh(Options::default());
    site.pki.issue_server_with(|one| {
        one.subject_alt_names = vec![rcgen::SanType::DnsName("keys.example".try_into().unwrap())];
    });
    let broker = Broker::start_on(site.into());
    let finished = Finished::from(client(&broker, "auditor", &["health"]).output().unwrap());
    says(
        "another name",
        &finished,
        11,
        &["whose host name is in the broker's certificate"],
    );
}

/// Which broker and which credential: before or after the name of the command.
#[test]
fn options_of_the_connection_are_taken_at_either_end() {
    let broker = Broker::start(Options::default());
    let pki = &broker.site.pki;
    let endpoint = format!("https://localhost:{}", broker.grpc.port());
    let paths = [
        pki.ca_file(),
        pki.certificate_file("auditor"),
        pki.key_file("auditor"),
    ];
    let [ca, cert, key] = paths.each_ref().map(|path| path.to_str().unwrap());
    let options = [
        "--endpoint",
        &endpoint,
        "--ca",
        ca,
        "--cert",
        cert,
        "--key",
        key,
    ];
    for command in [&["client", "list"][..], &["client-credential", "list"]] {
        let (group, rest) = command.split_at(1);
        for arguments in [
            [command, &options].concat(),
            [group, &options, rest].concat(),
            [group, &options[..4], rest, &options[4..]].concat(),
        ] {
            says(
                &format!("{arguments:?}"),
                &broker.site.run(&arguments),
                0,
                &[],
            );
        }
    }
    for (wrong, words) in [
        (&options[2..], "pass --endpoint"),
        (&[&options[..2], &options[4..]].concat(), "pass --ca"),
        (&options[..6], "--cert requires --key"),
        (
            &[&options[..4], &options[6..]].concat(),
            "--key requires --cert",
        ),
        (
            &[&options[..], &["--client-id", "x"]].concat(),
            "--client-secret-file",
        ),
        (
            &[&options[..], &["--client-id", "x", "--token-file", "y"]].concat(),
            "pass only one",
        ),
    ] {
        let arguments = [&["client", "list"], wrong].concat();
        says(words, &broker.site.run(&arguments), 2, &[words]);
    }
}

/// Where the gRPC API and the admin API have separate listeners.
#[test]
fn a_method_of_another_listener_is_explained() {
    let site = Site::fresh(Options::default());
    site.replace_once("apis = [\"grpc\", \"admin\"]", "apis = [\"grpc\"]");
    let broker = Broker::start_on(site.into());
    let finished = Finished::from(client(&broker, "admin", &["token-state"]).output().unwrap());
    says(
        "the admin API",
        &finished,
        10,
        &["separate listeners", "[[listener]]"],
    );
}

/// The log tells a certificate without any usable name from one with an unknown name.
#[test]
fn a_client_certificate_without_a_name_is_told_from_an_unknown_one() {
    let broker = Broker::start(Options::default());
    broker
        .site
        .pki
        .issue_client_with("nameless", |one| one.subject_alt_names.clear());
    for (name, words) in [
        (
            "nameless",
            "has no subject alternative name of the kind URI or DNS",
        ),
        (
            pki::UNKNOWN,
            "no [[principal]] has a `san` that matches a name in the client certificate",
        ),
    ] {
        let finished = Finished::from(client(&broker, name, &["list"]).output().unwrap());
        says(name, &finished, 10, &["CREDENTIAL"]);
        until(words, || broker.site.log().contains(words).then_some(()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_path_of_the_rest_api_is_answered_with_the_right_ones() {
    let rest = RestSite::open();
    let answer = rest.request(Method::GET, "/nothing").send().await.unwrap();
    assert_eq!(answer.status(), 404);
    let text = answer.text().await.unwrap();
    for word in ["this path does not exist", "/user-keys", "`path_prefix`"] {
        assert!(text.contains(word), "{text}");
    }
}

fn create(broker: &Broker, user: &str) {
    let material = broker.site.folder().join("material");
    write_private(&material, "material of this user");
    let file = material.to_str().unwrap();
    let arguments = [
        "create",
        "--user",
        user,
        "--key-name",
        "vault",
        "--material-file",
        file,
    ];
    let finished = Finished::from(client(broker, "enroller", &arguments).output().unwrap());
    says(user, &finished, 0, &[]);
}

/// The table of an audit log is for people: a block for each entry, of the width of a terminal, and only what is asked for.
#[test]
fn the_audit_log_is_shown_for_people_and_filtered() {
    let broker = Broker::start(Options::default());
    create(&broker, "ada");
    create(&broker, "bob");
    let show = |arguments: &[&str]| {
        broker
            .site
            .expect_ok(&[&["audit", "show"], arguments].concat())
    };
    let all = show(&[]);
    assert!(all.lines().all(|line| line.chars().count() <= 100), "{all}");
    assert!(
        all.contains("user=ada") && all.contains("user=bob"),
        "{all}"
    );
    let bob = show(&["--user", "bob", "--action", "user_key.create"]);
    assert!(!bob.contains("user=ada"), "{bob}");
    assert_eq!(
        bob.matches("user_key.create").count(),
        2,
        "intent and outcome: {bob}"
    );
    let newest = show(&["--user", "bob", "--last", "1"]);
    assert!(newest.contains("kind=outcome"), "{newest}");
    assert_eq!(show(&["--user", "nobody"]), "no entries\n");
    let raw = show(&["--user", "bob", "--raw"]);
    assert!(broker.site.audit().contains(raw.trim_end()), "{raw}");
    let json = show(&["--user", "bob", "-o", "json"]);
    let parsed: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(parsed.as_array().unwrap().len(), 2, "{json}");
}

/// No table is wider than a terminal, whatever it holds.
#[test]
fn no_table_is_wider_than_a_terminal() {
    let broker = Broker::start(Options::default());
    create(
        &broker,
        "a-user-with-a-name-of-sixty-bytes-0123456789-0123456789-01234",
    );
    for command in [
        &["list"][..],
        &["wrapping-keys"],
        &["health"],
        &["audit-tail"],
    ] {
        let finished = Finished::from(client(&broker, "auditor", command).output().unwrap());
        says(command[0], &finished, 0, &[]);
        let widest = finished
            .stdout
            .lines()
            .map(|line| line.chars().count())
            .max();
        assert!(widest.unwrap() <= 100, "{command:?}: {finished:#?}");
    }
    let keys = broker.site.expect_ok(&["token", "list"]);
    assert!(
        keys.lines().all(|line| line.chars().count() <= 100),
        "{keys}"
    );
}
