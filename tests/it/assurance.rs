//! The word about the protection of a token's keys.

use std::sync::Arc;

use keybroker_proto::GetTokenStateRequest;
use tonic::Request;

use crate::{
    client::Caller,
    client_commands::calling,
    faulty::{Faulty, VARIABLE},
    process::Broker,
    site::{Options, Site},
    softhsm,
    wire::get,
};

/// The word of the only token, as the admin API and the metrics show it.
async fn shown(broker: &Broker) -> String {
    let mut control = Caller::of(broker, "admin").control;
    let state = control.get_token_state(Request::new(GetTokenStateRequest {}));
    let word = state.await.unwrap().into_inner().tokens[0]
        .assurance
        .clone();
    let keys = calling(
        broker,
        &["-o", "json", "client", "wrapping-keys"],
        "admin",
        &[],
    )
    .output();
    let keys = String::from_utf8(keys.unwrap().stdout).unwrap();
    let of_key = format!("\"assurance\": \"default={word}\"");
    assert!(keys.contains(&of_key), "{keys}");
    let metrics = get(broker.status, "/metrics");
    for other in ["hardware", "software", "service", "policy"] {
        let value = u8::from(other == word);
        let line =
            format!("keybroker_token_assurance{{token=\"default\",assurance=\"{other}\"}} {value}");
        assert!(metrics.contains(&line), "{line}: {metrics}");
    }
    word
}

/// The word follows from the report of the module, and the configuration takes precedence. It changes nothing else.
#[tokio::test(flavor = "multi_thread")]
async fn the_module_or_the_configuration_says_what_protects_the_keys() {
    let site = Site::fresh(Options::default());
    let faulty = Faulty::in_folder(site.folder().join("module"), &softhsm::module());
    let configure = |setting: &str| {
        site.write_configuration(|text| {
            *text = text
                .replace("[token]\n", &format!("[token]\n{setting}"))
                .replace(
                    &softhsm::module().display().to_string(),
                    &faulty.module().display().to_string(),
                )
                .replace(
                    "[token.environment]\n",
                    &format!(
                        "[token.environment]\n{VARIABLE} = \"{}\"\n",
                        faulty.folder().display()
                    ),
                );
        });
    };
    configure("");
    let site = Arc::new(site);
    for (script, word) in [
        ("", "software"),
        ("[token]\nhardware_slot = true\n", "hardware"),
    ] {
        faulty.behave(script);
        let checked = site.run(&["token", "check"]);
        assert_eq!(checked.code, Some(0), "{checked:#?}");
        let note = format!("assurance: {word}, as the report of the module implies");
        assert!(checked.stderr.contains(&note), "{checked:#?}");
        let broker = Broker::start_on(Arc::clone(&site));
        assert_eq!(shown(&broker).await, word);
        broker.stop();
    }
    let listed = site.expect_ok(&["-o", "json", "key", "list"]);
    assert!(
        listed.contains("\"assurance\": \"default=unknown\""),
        "{listed}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_configured_word_is_shown_everywhere() {
    let site = Site::fresh(Options::default());
    site.replace_once("[token]\n", "[token]\nassurance = \"service\"\n");
    let listed = site.expect_ok(&["-o", "json", "key", "list"]);
    assert!(listed.contains("default=service"), "{listed}");
    let checked = site.run(&["token", "check"]);
    let note = "assurance: service, as `token.assurance` says";
    assert!(checked.stderr.contains(note), "{checked:#?}");
    let broker = Broker::start_on(Arc::new(site));
    assert_eq!(shown(&broker).await, "service");
    let (site, _) = broker.stop();
    site.replace_once("[token]\n", "[token]\nassurance = \"fips\"\n");
    let refused = site.serve_to_its_end();
    assert_eq!(refused.code, Some(3), "{refused:#?}");
    assert!(refused.stderr.contains("fips"), "{refused:#?}");
}
