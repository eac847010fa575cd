//! Client certificates that were taken back, or are of somebody else's trust domain.

use std::{fs, path::Path, process::Command, sync::Arc, time::Duration};

use crate::{
    client::{Caller, refused},
    pki,
    process::{Broker, until},
    site::{Options, Site},
    wire::get,
};

const MATERIAL: &[u8] = b"material of this user";
/// A day.
const LONG_S: i64 = 86_400;
/// In the last quarter of the lifetime of a list that [`pki::Pki::revoke`] makes.
const HOUR_S: i64 = 3_600;

/// A site whose listener asks a list, on which these clients are.
fn site(revoked: &[&str], ends_in_s: i64) -> Arc<Site> {
    let site = Site::fresh(Options::default());
    site.pki.revoke(revoked, ends_in_s);
    configure(
        &site,
        &format!("client_crl_file = \"{}\"", site.pki.crl_file().display()),
    );
    Arc::new(site)
}

/// Adds lines to the listener's TLS.
fn configure(site: &Site, lines: &str) {
    site.write_configuration(|text| {
        *text = text.replace("client_ca_file", &format!("{lines}\nclient_ca_file"));
    });
}

fn until_logged(site: &Site, words: &str) {
    until(words, || site.log().contains(words).then_some(()));
}

/// Asks with its own connection until it is refused.
async fn until_refused(broker: &Broker, client: &str) {
    for _ in 0..100 {
        if Caller::of(broker, client)
            .create("eve", MATERIAL)
            .await
            .is_err()
        {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("{client} is still served");
}

fn metrics(broker: &Broker) -> String {
    get(broker.status, "/metrics")
}

#[tokio::test(flavor = "multi_thread")]
async fn with_a_list_in_force_only_good_certificates_are_accepted() {
    let broker = Broker::start_on(site(&["enroller"], LONG_S));
    let users = ["releaser", "other-releaser"];
    for client in users {
        let answer = Caller::of(&broker, client).unwrap("ada").await;
        refused(answer, "KEY_NOT_FOUND");
    }
    for client in ["enroller", pki::EXPIRED, pki::OTHER_CA] {
        let answer = Caller::of(&broker, client).unwrap("ada").await;
        assert!(answer.is_err(), "{client}");
        assert_ne!(
            crate::client::reason(&answer.unwrap_err()),
            "KEY_NOT_FOUND",
            "{client}"
        );
    }
    let shown = metrics(&broker);
    for cause in ["revoked", "expired", "unknown_ca"] {
        let none = format!("keybroker_handshakes_failed_total{{cause=\"{cause}\"}} 0\n");
        assert!(!shown.contains(&none), "{cause}:\n{shown}");
    }
    assert!(shown.contains("keybroker_client_crl_expiry_timestamp_seconds{"));
}

/// The library that verifies chains accepts it for any purpose.
#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_that_does_not_say_that_it_is_for_clients_is_refused_unless_configured() {
    let broker = Broker::start(Options::default());
    let answer = Caller::of(&broker, pki::NO_USAGE).unwrap("ada").await;
    let reason = crate::client::reason(&answer.unwrap_err());
    assert_ne!(reason, "KEY_NOT_FOUND");
    let shown = metrics(&broker);
    let none = "keybroker_handshakes_failed_total{cause=\"bad_certificate\"} 0\n";
    assert!(!shown.contains(none), "{shown}");
    let (site, _) = broker.stop();
    configure(&site, "client_auth_usage_required = false");
    let broker = Broker::start_on(site);
    let answer = Caller::of(&broker, pki::NO_USAGE).unwrap("ada").await;
    refused(answer, "KEY_NOT_FOUND");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_is_revoked_while_it_is_connected_loses_its_connection() {
    let broker = Broker::start_on(site(&[], LONG_S));
    let enroller = Caller::of(&broker, "enroller");
    let releaser = Caller::of(&broker, "releaser");
    enroller.create("ada", MATERIAL).await.unwrap();
    releaser.unwrap("ada").await.unwrap();

    broker.site.pki.revoke(&["enroller"], LONG_S);
    until_logged(&broker.site, "TLS files reloaded");
    // The client whose connection was open: asked to leave, and not let in again.
    let mut is_refused = false;
    for n in 0..100 {
        is_refused = enroller
            .create(&format!("user-{n}"), MATERIAL)
            .await
            .is_err();
        if is_refused {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(is_refused, "a revoked client is still served");
    until_refused(&broker, "enroller").await;
    // Who is still trusted comes back by itself.
    let key = crate::client::eventually(|| releaser.unwrap("ada")).await;
    assert_eq!(key.key_material, MATERIAL);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_list_on_reload_leaves_the_old_one_in_use() {
    let broker = Broker::start_on(site(&["enroller"], LONG_S));
    fs::write(broker.site.pki.crl_file(), "no list").unwrap();
    until_logged(&broker.site, "no longer has a list of");
    let log = broker.site.log();
    assert_eq!(log.matches("\"alert\":\"client-crl\"").count(), 1, "{log}");
    // Neither forgotten nor widened.
    until_refused(&broker, "enroller").await;
    refused(
        Caller::of(&broker, "releaser").unwrap("ada").await,
        "KEY_NOT_FOUND",
    );
    fs::remove_file(broker.site.pki.crl_file()).unwrap();
    until_logged(&broker.site, "cannot read");
    refused(
        Caller::of(&broker, "releaser").unwrap("ada").await,
        "KEY_NOT_FOUND",
    );
}

/// A renewal of the server's certificate that went wrong keeps no revoked client in.
#[tokio::test(flavor = "multi_thread")]
async fn a_new_list_counts_beside_a_bad_server_certificate() {
    let broker = Broker::start_on(site(&[], LONG_S));
    Caller::of(&broker, "enroller")
        .create("ada", MATERIAL)
        .await
        .unwrap();
    let certificate = broker.site.pki.certificate_file("server");
    fs::write(&certificate, "half a certificate").unwrap();
    until_logged(&broker.site, "\"alert\":\"tls-reload\"");
    broker.site.pki.revoke(&["enroller"], LONG_S);
    until_logged(
        &broker.site,
        "the client CAs and revocation lists were applied without",
    );
    until_refused(&broker, "enroller").await;
    let key = Caller::of(&broker, "releaser").unwrap("ada").await.unwrap();
    assert_eq!(key.key_material, MATERIAL);
}

/// A list that has ended says nothing about a certificate.
#[tokio::test(flavor = "multi_thread")]
async fn an_expired_revocation_list_refuses_every_client_until_there_is_a_new_one() {
    let site = site(&[], LONG_S);
    let broker = Broker::start_on(Arc::clone(&site));
    site.pki.revoke(&[], HOUR_S);
    until_logged(&site, "a revocation list expires soon");
    // On a busy machine a short list may end before the broker reads it. Such a list is left out, and a longer one follows.
    let ended = "a revocation list has expired";
    let mut lifetimes_s = [2, 4, 8, 16].into_iter();
    let mut left_out = 0;
    site.pki.revoke(&[], 1);
    until(ended, || {
        let log = site.log();
        let count = log.matches("that expired on").count();
        if count > left_out {
            left_out = count;
            site.pki
                .revoke(&[], lifetimes_s.next().expect("read too late each time"));
        }
        log.contains(ended).then_some(())
    });
    until_refused(&broker, "enroller").await;
    assert!(metrics(&broker).contains("cause=\"revocation_list_ended\""));
    site.pki.revoke(&[], LONG_S);
    let enroller = Caller::of(&broker, "enroller");
    crate::client::eventually(|| enroller.create("ada", MATERIAL)).await;
}

/// A restart must neither fail nor accept a revoked client because somebody damaged the file or put an older list in its place.
#[tokio::test(flavor = "multi_thread")]
async fn a_start_serves_with_the_accepted_list_when_the_file_has_no_better_one() {
    let site = site(&[], LONG_S);
    let older = fs::read_to_string(site.pki.crl_file()).unwrap();
    site.pki.revoke(&["enroller"], LONG_S);
    let newer = fs::read_to_string(site.pki.crl_file()).unwrap();
    let (mut site, _) = Broker::start_on(site).stop();
    let damaged = newer.replace("-----END X509 CRL-----", "");
    for (text, words) in [
        (older.as_str(), "that is older than the last accepted list"),
        (&damaged, "has no END line of the same label"),
        ("", "no longer has a list of"),
    ] {
        fs::write(site.pki.crl_file(), text).unwrap();
        let broker = Broker::start_on(site);
        until_logged(&broker.site, words);
        until_refused(&broker, "enroller").await;
        let answer = Caller::of(&broker, "releaser").unwrap("ada").await;
        refused(answer, "KEY_NOT_FOUND");
        until("the problem in health and metrics", || {
            let is_ready =
                get(broker.status, "/readyz").contains("revocation lists are rejected or missing");
            let is_counted = metrics(&broker).lines().any(|line| {
                line.starts_with("keybroker_client_crl_problems{") && !line.ends_with(" 0")
            });
            (is_ready && is_counted).then_some(())
        });
        fs::write(broker.site.pki.crl_file(), &newer).unwrap();
        until("the problem to be gone", || {
            (!get(broker.status, "/readyz").contains("client_crl_file")).then_some(())
        });
        (site, _) = broker.stop();
    }
}

/// The first start of a listener has no accepted list to serve with.
#[test]
fn a_bad_list_stops_the_first_start() {
    let site = site(&[], LONG_S);
    fs::write(site.pki.crl_file(), "no list").unwrap();
    let ended = site.serve_to_its_end();
    assert_eq!(ended.code, Some(3), "{ended:#?}");
    let checked = site.run(&["config", "check"]);
    assert_eq!(checked.code, Some(3), "{checked:#?}");
    assert!(
        format!("{checked:?}").contains("client_crl_file"),
        "{checked:#?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_listener_accepts_the_trust_domains_that_it_names() {
    for (domains, is_accepted) in [("test.example", true), ("prod.example", false)] {
        let site = Site::fresh(Options::default());
        configure(&site, &format!("trust_domains = [\"{domains}\"]"));
        let broker = Broker::start_on(Arc::new(site));
        let answer = Caller::of(&broker, "releaser").unwrap("ada").await;
        refused(
            answer,
            if is_accepted {
                "KEY_NOT_FOUND"
            } else {
                "CREDENTIAL"
            },
        );
        let told = broker.site.log().contains("in the trust domain");
        assert_eq!(told, !is_accepted);
    }
}

/// The shell commands of the guide are run as they stand there.
#[tokio::test(flavor = "multi_thread")]
async fn the_guide_to_a_ca_makes_certificates_that_the_broker_accepts_and_takes_back() {
    let guide = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../..")).join("docs/identity.md");
    let guide = fs::read_to_string(guide).unwrap();
    let commands = |beginning: &str| {
        let mut blocks = guide.split("```sh\n").skip(1);
        let block = blocks.find(|block| block.starts_with(beginning)).unwrap();
        block.split("```").next().unwrap().to_owned()
    };
    let folder = tempfile::tempdir().unwrap();
    let run = |commands: &str| {
        let output = Command::new("sh")
            .args(["-e", "-c", commands])
            .current_dir(folder.path())
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
    };
    run(&commands("umask"));

    let site = Site::fresh(Options::default());
    for (from, to) in [
        ("vault.pem", site.pki.certificate_file("vault")),
        ("vault.key", site.pki.key_file("vault")),
    ] {
        fs::copy(folder.path().join(from), to).unwrap();
    }
    let in_folder = |name: &str| folder.path().join(name).display().to_string();
    site.write_configuration(|text| {
        let ca = site.pki.ca_file().display().to_string();
        *text = text.replace(&ca, &in_folder("client-ca.pem"));
        *text = text.replace(
            "spiffe://test.example/releaser",
            "spiffe://example.org/vault",
        );
        let crl = in_folder("client-crl.pem");
        let lines = format!("client_crl_file = \"{crl}\"\ntrust_domains = [\"example.org\"]\n");
        *text = text.replace("client_ca_file", &(lines + "client_ca_file"));
    });
    let broker = Broker::start_on(Arc::new(site));
    let vault = Caller::of(&broker, "vault");
    refused(vault.unwrap("ada").await, "KEY_NOT_FOUND");
    run(&commands("openssl ca -config ca.conf -revoke"));
    until_logged(&broker.site, "TLS files reloaded");
    until_refused(&broker, "vault").await;
    assert!(metrics(&broker).contains("cause=\"revoked\""));
}
