//! The commands of `docs/bitwarden.md` are run as they stand there.

use std::{fmt::Write as _, fs, path::Path, process::Command, sync::Arc};

use crate::{
    process::Broker,
    site::{Options, Site},
};

/// The first block of shell commands of the page that begins with these words.
fn commands(beginning: &str) -> String {
    let page = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../..")).join("docs/bitwarden.md");
    let page = fs::read_to_string(page).unwrap();
    let mut blocks = page.split("```sh\n").skip(1);
    let block = blocks.find(|block| block.starts_with(beginning)).unwrap();
    block.split("```").next().unwrap().to_owned()
}

#[test]
fn the_guide_to_curl_stores_a_key_and_reads_it_back() {
    let site = Site::fresh(Options::default());
    let folder = tempfile::tempdir().unwrap();
    let run = |commands: &str| {
        let mut shell = Command::new("bash");
        let shell = shell.args(["-euo", "pipefail", "-c", commands]);
        let output = shell.current_dir(folder.path()).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    run(&commands("openssl genpkey"));
    site.write_configuration(|text| {
        *text = text.replace(r#"["grpc", "admin"]"#, r#"["grpc", "admin", "rest"]"#);
        *text = text.replace("[listener.tls]", "client_certificates = \"optional\"\n\n[listener.tls]");
        let pem_file = folder.path().join("issuer.pem");
        write!(
            text,
            "\n[[issuer]]\nname = \"try\"\nprofile = \"bitwarden\"\nissuer = \"https://try.example/identity\"\npem_file = \"{}\"\n",
            pem_file.display()
        )
        .unwrap();
    });
    let broker = Broker::start_on(Arc::new(site));
    fs::copy(
        broker.site.pki.ca_file(),
        folder.path().join("server-ca.pem"),
    )
    .unwrap();
    let address = format!("localhost:{}", broker.grpc.port());
    let calls = commands("call()").replace("localhost:8087", &address);
    let answer = run(&format!("{calls}\nprintf '\\n%s' \"$key\""));
    let (answer, key) = answer.rsplit_once('\n').unwrap();
    let answer: serde_json::Value = serde_json::from_str(answer).unwrap();
    assert_eq!(answer["key"], key);
}
