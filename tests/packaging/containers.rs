//! Image, compose file and Kubernetes manifests: they parse, they agree with each other, and the configurations in them are
//! good.

use std::{collections::BTreeSet, fs, process::Command};

use keybroker::config::{Config, INSTANCE_VARIABLE};
use yaml_rust2::{Yaml, YamlLoader};

use crate::root;

const COMPOSE: &str = "deploy/compose.yaml";
const BROKERS: &str = "deploy/kubernetes/keybroker.yaml";
const COMMAND: &str = "deploy/kubernetes/command.yaml";
const POLICY: &str = "deploy/kubernetes/network-policy.yaml";
const NAME_LABEL: &str = "app.kubernetes.io/name";
/// Where a sidecar serves the metrics that it reads on loopback.
const METRICS_SIDECAR_PORT: i64 = 9465;
/// Each configuration, and where the file system of its container has something.
const CONFIGURATIONS: [&str; 2] = [
    "deploy/compose/keybroker.toml",
    "deploy/kubernetes/keybroker.toml",
];

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn documents(path: &str) -> Vec<Yaml> {
    YamlLoader::load_from_str(&read(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The document of a kind.
fn document(path: &str, kind: &str) -> Yaml {
    let found = documents(path)
        .into_iter()
        .find(|document| document["kind"].as_str() == Some(kind));
    found.unwrap_or_else(|| panic!("{path}: no {kind}"))
}

/// The network policy of a name.
fn policy(name: &str) -> Yaml {
    let found = documents(POLICY)
        .into_iter()
        .find(|document| document["metadata"]["name"].as_str() == Some(name));
    found.unwrap_or_else(|| panic!("{POLICY}: no {name}"))
}

fn config(path: &str) -> Config {
    Config::parse(&read(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn items(value: &Yaml) -> &[Yaml] {
    value.as_vec().map(Vec::as_slice).unwrap_or_default()
}

fn strings(value: &Yaml) -> Vec<String> {
    items(value)
        .iter()
        .map(|item| item.as_str().unwrap().to_owned())
        .collect()
}

fn ports(path: &str) -> BTreeSet<i64> {
    config(path)
        .listeners
        .iter()
        .map(|listener| listener.address.port().into())
        .collect()
}

/// Every path that a configuration names.
fn paths(path: &str) -> Vec<String> {
    let config = config(path);
    let mut paths = vec![
        config.audit.directory.clone(),
        config.token().module.clone(),
    ];
    paths.extend(config.token().pin_file.clone());
    paths.extend(config.store.password_file);
    paths.extend(config.store.ca_file);
    for listener in config.listeners {
        let tls = listener.tls.unwrap();
        paths.extend([tls.certificate_file, tls.key_file]);
        paths.extend(tls.client_ca_file);
    }
    paths
        .into_iter()
        .map(|path| path.to_str().unwrap().to_owned())
        .collect()
}

/// Arguments of a command that stands in a manifest are ones that the program takes.
fn assert_understood(arguments: &[String]) {
    let output = Command::new(env!("CARGO_BIN_EXE_keybroker"))
        .args(arguments)
        .arg("--help")
        .output()
        .unwrap();
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    // A word that is no argument would be refused without `--help`, too: the group's help does not name the command.
    let help = String::from_utf8(output.stdout).unwrap();
    let usage = help
        .lines()
        .find(|line| line.starts_with("Usage: "))
        .unwrap();
    assert!(!usage.contains("<COMMAND>"), "{arguments:?}: {usage}");
}

#[test]
fn each_configuration_is_good() {
    for path in CONFIGURATIONS {
        assert_eq!(config(path).problems(), Vec::<String>::new(), "{path}");
    }
}

#[test]
fn the_image_is_not_root_and_is_probed_by_a_command_that_exists() {
    let file = read("Dockerfile");
    assert!(file.contains("\nUSER 10001:10001\n"));
    let (_, probe) = file.split_once("HEALTHCHECK ").unwrap();
    let (_, probe) = probe.split_once("CMD ").unwrap();
    let probe: Vec<String> = serde_json::from_str(probe.lines().next().unwrap()).unwrap();
    assert_eq!(probe[0], "keybroker");
    assert_understood(&probe[1..]);
    let (_, command) = file.rsplit_once("\nCMD ").unwrap();
    let command: Vec<String> = serde_json::from_str(command.trim()).unwrap();
    assert_understood(&command);
    // What the build copies is what the builder is sent.
    let ignore = read(".dockerignore");
    for line in file.lines().filter_map(|line| line.strip_prefix("COPY ")) {
        if line.starts_with("--from") {
            continue;
        }
        let mut words: Vec<&str> = line.split_whitespace().collect();
        words.pop();
        for word in words {
            let sent = ignore
                .lines()
                .filter_map(|line| line.strip_prefix('!'))
                .any(|line| word == line || word.starts_with(&format!("{line}/")));
            assert!(sent, "{word} is not sent");
            assert!(root().join(word).exists(), "{word}");
        }
    }
}

/// The check comes before the search for a tool, so it needs none.
#[test]
fn a_release_image_has_base_images_by_digest() {
    let digest = "0123456789abcdef".repeat(4);
    let build = |arguments: &[&str]| {
        let output = Command::new(root().join("scripts/image.sh"))
            .args(["--release", "--"])
            .args(arguments)
            .env("PATH", "/usr/bin:/bin")
            .env_remove("DOCKER_HOST")
            .output()
            .unwrap();
        assert!(!output.status.success(), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    let pinned = format!("BUILD_IMAGE=rust@sha256:{digest}");
    for (arguments, missing) in [
        (vec![], "BUILD_IMAGE"),
        (vec!["--build-arg", "BUILD_IMAGE=rust:1.95"], "BUILD_IMAGE"),
        (vec!["--build-arg", &pinned], "RUNTIME_IMAGE"),
        (
            vec![
                "--build-arg",
                &pinned,
                "--build-arg",
                "RUNTIME_IMAGE=debian@sha256:12",
            ],
            "RUNTIME_IMAGE",
        ),
    ] {
        let refusal = build(&arguments);
        let expected = format!("image: --release: {missing} is not named by digest");
        assert!(refusal.starts_with(&expected), "{arguments:?}: {refusal}");
    }
}

#[test]
fn compose_starts_two_brokers_that_share_database_and_token_but_no_log() {
    let compose = &documents(COMPOSE)[0];
    let services = &compose["services"];
    let ports = ports(CONFIGURATIONS[0]);
    let (mut logs, mut instances) = (BTreeSet::new(), BTreeSet::new());
    for name in ["keybroker-1", "keybroker-2"] {
        let service = &services[name];
        let published: BTreeSet<i64> = strings(&service["ports"])
            .iter()
            .map(|port| port.rsplit(':').next().unwrap().parse().unwrap())
            .collect();
        assert_eq!(published, ports, "{name}");
        let test = strings(&service["healthcheck"]["test"]);
        assert_eq!(test[..2], ["CMD", "keybroker"], "{name}");
        assert_understood(&test[2..]);
        let volumes = strings(&service["volumes"]);
        assert!(
            volumes.contains(&"token:/var/lib/keybroker".to_owned()),
            "{volumes:?}"
        );
        assert!(
            volumes.contains(&"database-socket:/run/postgresql".to_owned()),
            "{volumes:?}"
        );
        let log = volumes
            .iter()
            .find(|volume| volume.ends_with(":/var/log/keybroker"));
        assert!(logs.insert(log.unwrap().clone()), "one log for both");
        let instance = service["environment"][INSTANCE_VARIABLE].as_str();
        let instance = instance.unwrap_or_else(|| panic!("{name} has no {INSTANCE_VARIABLE}"));
        assert_accepted_as_instance(instance);
        assert!(instances.insert(instance), "{instance} for both");
    }
    let broker = &compose["x-broker"];
    assert_eq!(broker["read_only"].as_bool(), Some(true));
    assert_eq!(strings(&broker["cap_drop"]), ["ALL"]);
    let declared: BTreeSet<&str> = compose["secrets"]
        .as_hash()
        .unwrap()
        .keys()
        .map(|name| name.as_str().unwrap())
        .collect();
    for secret in strings(&broker["secrets"]) {
        assert!(declared.contains(secret.as_str()), "{secret}");
    }
    for path in paths(CONFIGURATIONS[0]) {
        if let Some(secret) = path.strip_prefix("/run/secrets/") {
            assert!(declared.contains(secret), "{path}");
        }
    }
}

/// Several brokers under one name would take each other's audit log for a replaced one.
#[test]
fn each_replica_has_an_instance_name_of_its_own() {
    let set = document(BROKERS, "StatefulSet");
    assert!(set["spec"]["replicas"].as_i64().unwrap() > 1);
    let container = &items(&set["spec"]["template"]["spec"]["containers"])[0];
    let variable = items(&container["env"])
        .iter()
        .find(|variable| variable["name"].as_str() == Some(INSTANCE_VARIABLE));
    let source = &variable.expect("no variable")["valueFrom"]["fieldRef"]["fieldPath"];
    // A StatefulSet names its pods by itself and a number, so no two of them share a name.
    assert_eq!(source.as_str(), Some("metadata.name"));
    let name = set["metadata"]["name"].as_str().unwrap();
    assert_accepted_as_instance(&format!("{name}-0"));
}

fn assert_accepted_as_instance(name: &str) {
    let mut config = config(CONFIGURATIONS[1]);
    name.clone_into(&mut config.audit.instance);
    assert_eq!(config.problems(), Vec::<String>::new(), "{name}");
}

/// The image has no user of a database server, so a name would stand for no user.
#[test]
fn the_users_of_a_local_socket_are_named_by_number() {
    let store = config(CONFIGURATIONS[0]).store;
    assert!(store.url.as_str().contains("?socket="));
    let users = store
        .socket_users
        .expect("the defaults exist nowhere in the image");
    assert!(!users.is_empty());
    for user in users {
        assert!(user.parse::<u32>().is_ok_and(|id| id != 0), "{user}");
    }
}

/// The commands in the head of the compose file are ones that the program takes.
#[test]
fn the_commands_of_the_compose_file_exist() {
    let text = read(COMPOSE);
    let mut seen = 0;
    for line in text.lines().filter(|line| line.starts_with('#')) {
        let Some((_, arguments)) = line.split_once("run --rm command ") else {
            continue;
        };
        let arguments: Vec<String> = arguments.split_whitespace().map(str::to_owned).collect();
        assert_understood(&arguments);
        seen += 1;
    }
    assert_eq!(seen, 3);
    for script in ["scripts/image.sh", "deploy/compose/prepare.sh"] {
        assert!(
            text.contains(script) && root().join(script).exists(),
            "{script}"
        );
    }
}

#[test]
fn pods_have_what_the_configuration_names_and_no_privilege() {
    for (path, kind) in [(BROKERS, "StatefulSet"), (COMMAND, "Job")] {
        let pod = &document(path, kind)["spec"]["template"]["spec"];
        let context = &pod["securityContext"];
        assert_eq!(context["runAsNonRoot"].as_bool(), Some(true), "{kind}");
        assert_eq!(context["runAsUser"].as_i64(), Some(10_001), "{kind}");
        assert_eq!(context["fsGroup"].as_i64(), Some(10_001), "{kind}");
        assert_eq!(
            context["seccompProfile"]["type"].as_str(),
            Some("RuntimeDefault")
        );
        let container = &items(&pod["containers"])[0];
        let context = &container["securityContext"];
        assert_eq!(
            context["readOnlyRootFilesystem"].as_bool(),
            Some(true),
            "{kind}"
        );
        assert_eq!(
            context["allowPrivilegeEscalation"].as_bool(),
            Some(false),
            "{kind}"
        );
        assert_eq!(strings(&context["capabilities"]["drop"]), ["ALL"], "{kind}");
        assert_understood(&strings(&container["args"]));

        let volumes: BTreeSet<&str> = items(&pod["volumes"])
            .iter()
            .map(|volume| volume["name"].as_str().unwrap())
            .chain(["log"])
            .collect();
        let mounts = items(&container["volumeMounts"]);
        for mount in mounts {
            assert!(
                volumes.contains(mount["name"].as_str().unwrap()),
                "{mount:?}"
            );
        }
        for volume in items(&pod["volumes"]) {
            if !volume["secret"].is_badvalue() {
                // The parser reads YAML 1.2, where an octal number begins with `0o`: Kubernetes reads 1.1.
                let mode = &volume["secret"]["defaultMode"];
                assert_eq!(mode.as_i64(), Some(440), "{mode:?}");
            }
        }
        let files = paths(CONFIGURATIONS[1])
            .into_iter()
            .filter(|path| !path.starts_with("/opt/hsm/"))
            .filter(|path| kind == "StatefulSet" || !path.starts_with("/run/secrets/tls/"));
        for file in files {
            let mounted = mounts.iter().any(|mount| {
                file.starts_with(&format!("{}/", mount["mountPath"].as_str().unwrap()))
            });
            assert!(mounted, "{kind}: nothing is mounted for {file}");
        }
    }
}

#[test]
fn probes_ask_and_ports_are_those_of_the_configuration() {
    let set = document(BROKERS, "StatefulSet");
    let pod = &set["spec"]["template"]["spec"];
    let container = &items(&pod["containers"])[0];
    for (probe, question) in [
        ("startupProbe", "live"),
        ("livenessProbe", "live"),
        ("readinessProbe", "ready"),
    ] {
        let command = strings(&container[probe]["exec"]["command"]);
        assert_eq!(command, ["keybroker", "probe", question], "{probe}");
        assert_understood(&command[1..]);
    }
    let expected = ports(CONFIGURATIONS[1]);
    let numbers = |list: &Yaml, field: &str| -> BTreeSet<i64> {
        items(list)
            .iter()
            .map(|port| port[field].as_i64().unwrap())
            .collect()
    };
    assert_eq!(numbers(&container["ports"], "containerPort"), expected);
    let service = document(BROKERS, "Service");
    assert_eq!(numbers(&service["spec"]["ports"], "port"), expected);
    let policy = policy("keybroker-ingress");
    let mut allowed: BTreeSet<i64> = items(&policy["spec"]["ingress"])
        .iter()
        .flat_map(|rule| numbers(&rule["ports"], "port"))
        .collect();
    assert!(allowed.remove(&METRICS_SIDECAR_PORT));
    assert_eq!(allowed, expected);
    // Longer than the drain and what follows it.
    let drain_s = config(CONFIGURATIONS[1]).limits.drain_timeout_ms / 1_000;
    let grace_s = pod["terminationGracePeriodSeconds"].as_i64().unwrap();
    assert!(
        u64::try_from(grace_s).unwrap() > drain_s + 25 + 5,
        "{grace_s}"
    );
    let budget = document(BROKERS, "PodDisruptionBudget");
    let labels = &set["spec"]["selector"]["matchLabels"];
    assert_eq!(&budget["spec"]["selector"]["matchLabels"], labels);
    assert_eq!(&service["spec"]["selector"], labels);
    assert_eq!(&policy["spec"]["podSelector"]["matchLabels"], labels);
}

/// A Service routes to every running pod that its selector matches, whether or not the pod listens.
#[test]
fn pods_of_one_shot_commands_get_no_calls_and_the_network_they_need() {
    let job = document(COMMAND, "Job");
    let labels = &job["spec"]["template"]["metadata"]["labels"];
    let name = labels[NAME_LABEL].as_str().unwrap();
    let selector = &document(BROKERS, "Service")["spec"]["selector"];
    let selected = selector
        .as_hash()
        .unwrap()
        .iter()
        .all(|(key, value)| &labels[key.as_str().unwrap()] == value);
    assert!(!selected, "the Service selects {labels:?}");

    let ingress = policy("keybroker-command-ingress");
    assert_eq!(
        ingress["spec"]["podSelector"]["matchLabels"][NAME_LABEL].as_str(),
        Some(name)
    );
    assert!(ingress["spec"]["ingress"].is_badvalue());

    let egress = policy("keybroker-egress");
    let expression = &items(&egress["spec"]["podSelector"]["matchExpressions"])[0];
    assert_eq!(expression["key"].as_str(), Some(NAME_LABEL));
    let selected = strings(&expression["values"]);
    assert_eq!(selected, ["keybroker", name]);
    let ports: BTreeSet<i64> = items(&egress["spec"]["egress"])
        .iter()
        .flat_map(|rule| items(&rule["ports"]))
        .map(|port| port["port"].as_i64().unwrap())
        .collect();
    // Name service, OpenID provider, the vendor's HSM, PostgreSQL.
    assert_eq!(ports, BTreeSet::from([53, 443, 1792, 5432]));
}

/// A tag can be moved to another image; a digest cannot.
#[test]
fn images_are_named_by_digest() {
    let kustomization = &documents("deploy/kubernetes/kustomization.yaml")[0];
    let image = &items(&kustomization["images"])[0];
    assert!(image["newTag"].is_badvalue());
    let digest = image["digest"].as_str().unwrap();
    let pod = &document(COMMAND, "Job")["spec"]["template"]["spec"];
    let command = items(&pod["containers"])[0]["image"].as_str().unwrap();
    let expected = format!("{}@{digest}", image["newName"].as_str().unwrap());
    assert_eq!(command, expected);
    let hex = digest.strip_prefix("sha256:").unwrap();
    assert!(hex.len() == 64 && hex.bytes().all(|byte| byte.is_ascii_hexdigit()));
}

#[test]
fn the_kustomization_names_files_that_exist() {
    let file = &documents("deploy/kubernetes/kustomization.yaml")[0];
    let mut named = strings(&file["resources"]);
    named.extend(strings(&items(&file["configMapGenerator"])[0]["files"]));
    assert_eq!(named.len(), 4);
    for name in named {
        assert!(
            root().join("deploy/kubernetes").join(&name).exists(),
            "{name}"
        );
    }
}
