//! Key ceremonies on a real SoftHSM, with shares shown at a real terminal and signatures of the real `ssh-keygen`.

use std::{
    fmt::Write as _,
    fs,
    io::{Read as _, Write as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

use serde_json::Value;
use tempfile::TempDir;

use crate::{
    modules::{Maker, Stand, in_namespaces},
    process::WAIT_MAX,
    site::{Finished, Options, Site},
    softhsm::{self, write_private},
};

const USAGE: i32 = 2;
const CONFIGURATION: i32 = 3;
const TOKEN: i32 = 4;
const PIN: i32 = 5;
const UNTRUSTED: i32 = 6;
const VERIFICATION: i32 = 12;
const NAMES: [&str; 3] = ["ada", "bob", "cyd"];
const NEW_LABEL: &str = "ceremony";
/// What the terminal shows when it waits for a custodian.
const NAME_PROMPT: &str = " and press Enter to see the share: ";
const CLEAR_PROMPT: &str = "Press Enter to clear the screen: ";
const SHARE_PROMPT: &str = "The text is not shown: ";

/// A person with an SSH key.
struct Person {
    folder: TempDir,
}

impl Person {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let made = Command::new("ssh-keygen")
            .args(["-q", "-t", "ed25519", "-N", "", "-C", "", "-f"])
            .arg(folder.path().join("id"))
            .output()
            .unwrap_or_else(|error| panic!("ssh-keygen: {error}; run scripts/install.sh"));
        assert!(made.status.success(), "{made:?}");
        Self { folder }
    }

    fn public(&self) -> String {
        let text = fs::read_to_string(self.folder.path().join("id.pub")).unwrap();
        text.trim().to_owned()
    }

    /// Signs a transcript, and returns the file with the signature.
    fn sign(&self, transcript: &Path, namespace: &str) -> PathBuf {
        let signed = Command::new("ssh-keygen")
            .args(["-Y", "sign", "-q", "-n", namespace, "-f"])
            .arg(self.folder.path().join("id"))
            .stdin(fs::File::open(transcript).unwrap())
            .output()
            .unwrap();
        assert!(signed.status.success(), "{signed:?}");
        let file = self.folder.path().join("signature");
        fs::write(&file, signed.stdout).unwrap();
        file
    }
}

/// A plan for the token of the site, with three custodians of whom two must sign.
fn plan(people: &[Person; 3], token: &str, key: &str) -> String {
    let mut text = "title = \"Test\"\nquorum = 2\nwitnesses = [\"Grace Example\"]\n".to_owned();
    for (name, person) in NAMES.iter().zip(people) {
        let key = person.public();
        writeln!(
            text,
            "[[custodian]]\nname = \"{name}\"\nssh_key = \"{key}\""
        )
        .unwrap();
    }
    let module = softhsm::module();
    writeln!(
        text,
        "[[token]]\nmodule = \"{}\"\n{token}",
        module.display()
    )
    .unwrap();
    writeln!(text, "[[token.key]]\nname = \"first\"\nbits = 2048\n{key}").unwrap();
    text
}

fn new_token() -> String {
    format!("label = \"{NEW_LABEL}\"\ninitialise = true\nso_pin_threshold = 2")
}

fn people() -> [Person; 3] {
    [(); 3].map(|()| Person::new())
}

/// A site whose configuration names a token that does not exist yet.
fn site_for_new_token() -> Site {
    let site = Site::without_keys(Options::default());
    let label = format!("label = \"{}\"", site.token.label());
    site.replace_once(&label, &format!("label = \"{NEW_LABEL}\""));
    site.expect_ok(&["store", "migrate"]);
    site
}

fn plan_file(site: &Site, text: &str) -> PathBuf {
    let path = site.folder().join("plan.toml");
    write_private(&path, text);
    path
}

fn text_of(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A command as a line of shell.
fn line_of(command: &Command) -> String {
    let words: Vec<String> = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| format!("'{}'", word.to_str().unwrap()))
        .collect();
    words.join(" ")
}

/// The answer of careful custodians to the first prompt in a text, with the end of the prompt.
fn answer(all: &str, from: usize) -> Option<(usize, String)> {
    let rest = &all[from..];
    let prompts = [NAME_PROMPT, CLEAR_PROMPT, SHARE_PROMPT];
    let found = prompts.map(|prompt| rest.find(prompt).map(|place| (place, prompt)));
    let (place, prompt) = found.into_iter().flatten().min()?;
    let end = from + place + prompt.len();
    let text = match prompt {
        NAME_PROMPT => {
            let (_, name) = rest[..place].rsplit_once("Type the name ").unwrap();
            name.to_owned()
        }
        CLEAR_PROMPT => String::new(),
        _ => shares(&all[..end]).pop().unwrap(),
    };
    Some((end, text + "\n"))
}

/// Runs a command at a terminal of its own, with careful custodians.
fn at_terminal(site: &Site, arguments: &[&str]) -> (Option<i32>, String) {
    at_terminal_with(site, arguments, |_, text| vec![text])
}

/// Runs a command at a terminal of its own. `typed` gets the number of a prompt, from 0, and the answer of a careful
/// custodian, and returns what is typed instead.
fn at_terminal_with(
    site: &Site,
    arguments: &[&str],
    typed: impl Fn(usize, String) -> Vec<String>,
) -> (Option<i32>, String) {
    let line = line_of(&site.command(arguments));
    let mut child = Command::new("script")
        .args(["-q", "-e", "-c", &line, "/dev/null"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut output = child.stdout.take().unwrap();
    let mut input = child.stdin.take().unwrap();
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = output.read(&mut buffer) {
            if sender.send(buffer[..count].to_vec()).is_err() {
                break;
            }
        }
    });
    let (mut shown, mut from, mut number) = (Vec::new(), 0, 0);
    // The sender is dropped when the command has ended.
    loop {
        match receiver.recv_timeout(WAIT_MAX) {
            Ok(part) => shown.extend(part),
            Err(mpsc::RecvTimeoutError::Disconnected) => break,
            Err(mpsc::RecvTimeoutError::Timeout) => {
                child.kill().ok();
                panic!("no end: {}", String::from_utf8_lossy(&shown));
            }
        }
        let all = String::from_utf8_lossy(&shown).into_owned();
        while let Some((end, text)) = answer(&all, from) {
            for part in typed(number, text) {
                // The command may have ended.
                input.write_all(part.as_bytes()).ok();
                thread::sleep(Duration::from_millis(200));
            }
            (from, number) = (end, number + 1);
        }
    }
    let code = child.wait().unwrap().code();
    (code, String::from_utf8_lossy(&shown).into_owned())
}

/// The shares that a terminal showed, in the order of the custodians.
fn shares(shown: &str) -> Vec<String> {
    let is_share = |line: &&str| {
        let (number, rest) = line.split_once('-').unwrap_or_default();
        number.parse::<u8>().is_ok() && rest.len() > 40 && !rest.contains(' ')
    };
    let lines = shown.lines().map(str::trim);
    lines.filter(is_share).map(str::to_owned).collect()
}

/// A ceremony that was held on a new token.
struct Held {
    site: Site,
    people: [Person; 3],
    plan: PathBuf,
    transcript: PathBuf,
    shares: Vec<String>,
    shown: String,
}

fn held() -> Held {
    let site = site_for_new_token();
    let people = people();
    let plan = plan_file(&site, &plan(&people, &new_token(), ""));
    let (code, shown) = at_terminal(&site, &["ceremony", "run", text_of(&plan)]);
    assert_eq!(code, Some(0), "{shown}");
    let shares = shares(&shown);
    assert_eq!(shares.len(), 3, "{shown}");
    Held {
        transcript: site.folder().join("transcript.json"),
        site,
        people,
        plan,
        shares,
        shown,
    }
}

impl Held {
    fn content(&self) -> Value {
        serde_json::from_slice(&fs::read(&self.transcript).unwrap()).unwrap()
    }

    fn beside(&self, end: &str) -> PathBuf {
        PathBuf::from(format!("{}{end}", self.transcript.display()))
    }

    fn sign(&self, signatures: &[PathBuf]) -> Finished {
        let mut arguments = vec!["ceremony", "sign", text_of(&self.transcript)];
        for signature in signatures {
            arguments.extend(["--signature", text_of(signature)]);
        }
        self.site.run(&arguments)
    }

    fn allowed_signers(&self) -> PathBuf {
        let lines: Vec<String> = NAMES
            .iter()
            .zip(&self.people)
            .map(|(name, person)| format!("{name} {}\n", person.public()))
            .collect();
        let path = self.site.folder().join("allowed_signers");
        fs::write(&path, lines.concat()).unwrap();
        path
    }

    fn verify(&self, quorum: &str) -> Finished {
        let allowed = self.allowed_signers();
        let arguments = [
            "--config",
            "/nonexistent",
            "ceremony",
            "verify",
            text_of(&self.transcript),
            "--allowed-signers",
            text_of(&allowed),
            "--quorum",
            quorum,
            "--plan",
            text_of(&self.plan),
        ];
        // Nothing of the installation is needed.
        let mut command = Command::new(env!("CARGO_BIN_EXE_keybroker"));
        Finished::from(command.args(arguments).output().unwrap())
    }

    /// Runs a command with shares as its standard input.
    fn with_shares(&self, arguments: &[&str], shares: &[&str]) -> Finished {
        let mut child = self
            .site
            .command(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let text = shares.join("\n");
        child
            .stdin
            .take()
            .unwrap()
            .write_all(text.as_bytes())
            .unwrap();
        Finished::from(child.wait_with_output().unwrap())
    }

    fn combine(&self, shares: &[&str]) -> Finished {
        self.with_shares(&["ceremony", "combine", text_of(&self.transcript)], shares)
    }
}

fn assert_refused(finished: &Finished, code: i32, expected: &[&str]) {
    assert_eq!(finished.code, Some(code), "{finished:#?}");
    for text in expected {
        assert!(finished.stderr.contains(text), "{text}: {finished:#?}");
    }
}

#[test]
fn a_ceremony_is_held_signed_and_verified() {
    let held = held();
    let content = held.content();
    assert_eq!(content["status"], "complete");
    let token = &content["tokens"][0];
    assert_eq!(token["initialised"], true);
    assert_eq!(token["identity"]["label"], NEW_LABEL);
    assert_eq!(
        token["identity"]["module_sha256"].as_str().unwrap().len(),
        64
    );
    assert_eq!(token["so_pin"]["shares"][1]["custodian"], "bob");
    let key = &token["keys"][0];
    let listed = held.site.expect_ok(&["key", "list", "-o", "json"]);
    let listed: Value = serde_json::from_str(&listed).unwrap();
    assert_eq!(listed[0]["id"], key["id"]);
    assert_eq!(listed[0]["fingerprint"], key["fingerprint"]);
    assert_eq!(listed[0]["token_serial"], token["identity"]["serial"]);
    assert!(key["attributes"].as_array().unwrap().len() > 20, "{key}");
    // The signing key is not mistaken for a wrapping key.
    let checked = held.site.run(&["token", "check"]);
    assert_eq!(checked.code, Some(0), "{checked:#?}");

    let unsigned = held.verify("2");
    assert_refused(
        &unsigned,
        VERIFICATION,
        &["2 custodians must sign, but 0", "2 more"],
    );
    let [ada, bob, cyd] = &held.people;
    let namespace = "keybroker-ceremony";
    let signatures = [
        ada.sign(&held.transcript, namespace),
        bob.sign(&held.transcript, namespace),
    ];
    let signed = held.sign(&signatures);
    assert_eq!(signed.code, Some(0), "{signed:#?}");
    let verified = held.verify("2");
    assert_eq!(verified.code, Some(0), "{verified:#?}");
    assert!(verified.stdout.contains("ada, bob"), "{verified:#?}");
    assert_refused(
        &held.verify("3"),
        VERIFICATION,
        &["3 custodians must sign, but 2", "1 more"],
    );

    // The same signatures verify with OpenSSH alone.
    let verified = Command::new("ssh-keygen")
        .args(["-Y", "verify", "-n", namespace, "-I", "ada", "-f"])
        .arg(held.allowed_signers())
        .arg("-s")
        .arg(&signatures[0])
        .stdin(fs::File::open(&held.transcript).unwrap())
        .output()
        .unwrap();
    assert!(verified.status.success(), "{verified:?}");

    let stranger = Person::new();
    let foreign = stranger.sign(&held.transcript, namespace);
    assert_refused(
        &held.sign(&[foreign]),
        VERIFICATION,
        &["belongs to no custodian"],
    );
    let other_purpose = cyd.sign(&held.transcript, "file");
    assert_refused(&held.sign(&[other_purpose]), VERIFICATION, &["namespace"]);
    let other_file = cyd.sign(&held.plan, namespace);
    assert_refused(
        &held.sign(&[other_file]),
        VERIFICATION,
        &["does not fit the transcript"],
    );

    the_key_is_shown(&held, key["fingerprint"].as_str().unwrap());
    changed_files_are_refused(&held);
}

/// A custodian reads the page that the transcript gives, and an auditor sees which key and token the transcript is about.
fn the_key_is_shown(held: &Held, fingerprint: &str) {
    let transcript = text_of(&held.transcript);
    let shown = held.site.expect_ok(&["ceremony", "show", transcript]);
    let page = fs::read_to_string(held.beside(".txt")).unwrap();
    assert_eq!(shown.trim_end(), page.trim_end());
    assert!(shown.contains(fingerprint), "{shown}");
    let allowed = held.allowed_signers();
    let verify = |fingerprint: &str| {
        let list = text_of(&allowed);
        held.site.run(&[
            "ceremony",
            "verify",
            transcript,
            "--allowed-signers",
            list,
            "--quorum",
            "2",
            "--key",
            fingerprint,
        ])
    };
    let verified = verify(fingerprint);
    assert_eq!(verified.code, Some(0), "{verified:#?}");
    let content = held.content();
    let serial = content["tokens"][0]["initialised_serial"].as_str().unwrap();
    for expected in [fingerprint, serial, content["started"].as_str().unwrap()] {
        assert!(verified.stdout.contains(expected), "{verified:#?}");
    }
    assert_refused(&verify(&"0".repeat(64)), VERIFICATION, &["no wrapping key"]);
}

fn changed_files_are_refused(held: &Held) {
    let good = fs::read(&held.transcript).unwrap();
    let length = good.len();
    for place in [0, length / 5, length / 3, length / 2, length - 2] {
        let mut changed = good.clone();
        changed[place] ^= 1;
        fs::write(&held.transcript, &changed).unwrap();
        let refused = held.verify("2");
        assert_eq!(refused.code, Some(VERIFICATION), "{place}: {refused:#?}");
        let refused = held
            .site
            .run(&["ceremony", "show", text_of(&held.transcript)]);
        assert_eq!(refused.code, Some(VERIFICATION), "{place}: {refused:#?}");
    }
    let text = String::from_utf8(good.clone()).unwrap();
    fs::write(
        &held.transcript,
        text.replacen("Grace Example", "Grace Exampel", 1),
    )
    .unwrap();
    assert_refused(
        &held.verify("2"),
        VERIFICATION,
        &[
            "signatures are for a transcript",
            "token default: its signature does not fit",
            "signature of ada",
        ],
    );
    fs::write(&held.transcript, &good).unwrap();
    write_private(&held.plan, "title = \"another plan\"\n");
    assert_refused(&held.verify("2"), VERIFICATION, &["another plan"]);
}

/// Each Enter is pressed twice, once at once and once after a moment. No share is shown before its custodian typed the
/// name.
#[test]
fn a_second_press_of_enter_shows_no_share() {
    let site = site_for_new_token();
    let plan = plan_file(&site, &plan(&people(), &new_token(), ""));
    let twice = |_: usize, text: String| vec![format!("{text}\n"), "\n".to_owned()];
    let (_, shown) = at_terminal_with(&site, &["ceremony", "run", text_of(&plan)], twice);
    let mut before = String::new();
    let mut number = 0;
    for line in shown.lines() {
        if let Some(share) = shares(line).pop() {
            number = share.split('-').next().unwrap().parse().unwrap();
            let typed = format!("{NAME_PROMPT}{}", NAMES[number - 1]);
            assert!(before.contains(&typed), "{shown}");
            before.clear();
        }
        before.push_str(line);
    }
    assert!(number > 0, "{shown}");
}

/// A share that its custodian cannot type back was not written down, so the token is not initialised with the PIN.
#[test]
fn a_share_that_nobody_wrote_down_stops_the_ceremony() {
    let site = site_for_new_token();
    let plan = plan_file(&site, &plan(&people(), &new_token(), ""));
    let careless = |number: usize, text: String| {
        // The first custodian types the share wrongly once, and the second one always.
        let is_wrong = number == 2 || (number > 5 && text.contains('-'));
        vec![if is_wrong {
            "2-ABCD\n".to_owned()
        } else {
            text
        }]
    };
    let (code, shown) = at_terminal_with(&site, &["ceremony", "run", text_of(&plan)], careless);
    assert_eq!(code, Some(PIN), "{shown}");
    assert_eq!(shares(&shown).len(), 2 + 3, "{shown}");
    assert!(
        shown.contains("The share is right. ada keeps share 1"),
        "{shown}"
    );
    assert!(shown.contains("bob did not type share 2"), "{shown}");
    let listed = site.expect_ok(&["token", "list"]);
    assert!(!listed.contains(NEW_LABEL), "{listed}");
}

#[test]
fn only_the_terminal_shows_shares() {
    let held = held();
    let mut texts = vec![held.site.audit()];
    for end in ["", ".txt", ".signatures"] {
        texts.push(fs::read_to_string(held.beside(end)).unwrap());
    }
    for share in &held.shares {
        assert!(!texts.iter().any(|text| text.contains(share.as_str())));
    }
    assert!(held.shown.contains("\x1b[2J"), "the screen was not cleared");

    // The PIN is shown only on request.
    let transcript = text_of(&held.transcript);
    let shares = [held.shares[0].as_str(), held.shares[1].as_str()];
    let print = ["ceremony", "combine", transcript, "--print", "-o", "json"];
    let printed = held.with_shares(&print, &shares);
    let printed: Value = serde_json::from_str(&printed.stdout).unwrap();
    let so_pin = printed["so_pin"].as_str().unwrap();
    assert_eq!(so_pin.len(), 24);
    texts.push(held.combine(&shares).stdout);
    texts.push(held.shown.clone());
    assert!(!texts.iter().any(|text| text.contains(so_pin)));
}

#[test]
fn a_lost_share_is_no_problem_and_a_wrong_one_is_named() {
    let held = held();
    let [one, two, three] = [0, 1, 2].map(|index| held.shares[index].as_str());
    // The share of bob is lost.
    let fitting = held.combine(&[three, one]);
    assert_eq!(fitting.code, Some(0), "{fitting:#?}");
    let (rest, last) = two.split_at(two.len() - 1);
    let mistyped = format!("{rest}{}", if last == "7" { "8" } else { "7" });
    let foreign = self::held().shares.remove(2);
    for (given, expected) in [
        (vec![two], ["2 shares are needed, but 1", "1 more"]),
        (vec![], ["2 shares are needed, but 0", "2 more"]),
        (vec![two, two], ["share 2 was given twice", "counts once"]),
        (
            vec![one, &mistyped],
            ["line 2: share 2 is mistyped", "belongs to bob"],
        ),
        (
            vec![one, &foreign],
            ["share 3, which belongs to cyd", "not the share of this"],
        ),
    ] {
        assert_refused(&held.combine(&given), PIN, &expected);
    }
    // Without the transcript, the shares give the PIN all the same, and wrong shares are refused without a name.
    let alone = |shares: &[&str]| held.with_shares(&["ceremony", "combine"], shares);
    let fitting = alone(&[three, one]);
    assert_eq!(fitting.code, Some(0), "{fitting:#?}");
    assert!(
        fitting.stderr.contains("a wrong share cannot be named"),
        "{fitting:#?}"
    );
    for (given, expected) in [
        (vec![], "2 shares are needed, but 0"),
        (vec![one], "2 shares are needed, but 1"),
        (vec![one, &mistyped], "line 2: share 2 is mistyped"),
        (vec![one, &foreign], "do not belong together"),
    ] {
        let refused = alone(&given);
        assert_refused(&refused, PIN, &[expected]);
        assert!(!refused.stderr.contains("belongs to"), "{refused:#?}");
    }
}

#[test]
fn shares_set_a_new_user_pin_on_their_token_alone() {
    let held = held();
    let new_pin = held.site.folder().join("new-pin");
    write_private(&new_pin, "another-pin");
    let unlock = |transcript: &Path, shares: &[String]| {
        let transcript = text_of(transcript);
        let pin = text_of(&new_pin);
        let unlock = ["ceremony", "unlock-pin", transcript, "--pin-file", pin];
        let shares: Vec<&str> = shares.iter().map(String::as_str).collect();
        held.with_shares(&unlock, &shares)
    };
    assert_refused(
        &unlock(&held.transcript, &held.shares[..1]),
        PIN,
        &["1 more"],
    );
    // The PIN of another token is not presented to this one.
    let foreign = self::held();
    let refused = unlock(&foreign.transcript, &foreign.shares);
    assert_refused(&refused, TOKEN, &["is not for this token"]);
    let check = ["token", "check", "--pin-file", text_of(&new_pin)];
    assert_eq!(held.site.run(&check).code, Some(PIN));

    let unlocked = unlock(&held.transcript, &held.shares[1..]);
    assert_eq!(unlocked.code, Some(0), "{unlocked:#?}");
    let checked = held.site.run(&check);
    assert_eq!(checked.code, Some(0), "{checked:#?}");
    assert!(held.site.audit().contains("token.set_user_pin"));
}

#[test]
fn a_rehearsal_needs_nothing_and_leaves_nothing() {
    let site = site_for_new_token();
    let plan = plan_file(
        &site,
        &plan(&people(), &new_token(), "algorithm = \"RSA-OAEP-SHA-256\""),
    );
    let temporary = site.folder().join("tmp");
    fs::create_dir(&temporary).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_keybroker"));
    command
        .args([
            "--config",
            "/nonexistent",
            "ceremony",
            "rehearse",
            text_of(&plan),
        ])
        .env("TMPDIR", &temporary)
        .stdin(Stdio::null());
    let rehearsed = Finished::from(command.output().unwrap());
    assert_eq!(rehearsed.code, Some(0), "{rehearsed:#?}");
    for expected in [
        "SCRIPT OF THE KEY CEREMONY: Test",
        "Who: ada, bob, cyd",
        "Check: ",
        "ssh-keygen -Y sign -n keybroker-ceremony",
        "step 7: done",
        "step 8: done",
    ] {
        assert!(
            rehearsed.stdout.contains(expected),
            "{expected}: {rehearsed:#?}"
        );
    }
    assert_eq!(shares(&rehearsed.stdout), Vec::<String>::new());
    assert_eq!(fs::read_dir(&temporary).unwrap().count(), 0);
    assert_eq!(
        fs::read_dir(site.folder())
            .unwrap()
            .filter(|entry| {
                entry
                    .as_ref()
                    .unwrap()
                    .file_name()
                    .to_str()
                    .unwrap()
                    .starts_with("transcript")
            })
            .count(),
        0
    );
}

/// A token that keeps its PINs and is selected by a URI, beside a new one.
#[test]
fn a_plan_with_several_tokens_is_rehearsed() {
    let site = site_for_new_token();
    let second = format!(
        "[[token]]\nname = \"second\"\nmodule = \"{}\"\nuri = \"pkcs11:serial=1\"\n",
        softhsm::module().display()
    );
    let text = plan(&people(), &new_token(), "") + &second;
    let plan = plan_file(&site, &text);
    let rehearsed = site.run(&["ceremony", "rehearse", text_of(&plan), "-o", "json"]);
    assert_eq!(rehearsed.code, Some(0), "{rehearsed:#?}");
    let shown: Value = serde_json::from_str(&rehearsed.stdout).unwrap();
    let steps = shown["rehearsed"].as_array().unwrap();
    assert_eq!(steps.len(), 10, "{shown}");
    assert!(steps.iter().all(|step| step["result"] == "done"), "{shown}");
    assert!(
        steps[7]["what"].as_str().unwrap().contains("token second"),
        "{shown}"
    );
}

#[test]
fn a_lost_terminal_leaves_the_token_blank() {
    let site = site_for_new_token();
    let plan = plan_file(&site, &plan(&people(), &new_token(), ""));
    // Ctrl-D ends the input while the first share is on the screen.
    let ended =
        |number: usize, text: String| vec![if number == 1 { "\x04".to_owned() } else { text }];
    let (code, shown) = at_terminal_with(&site, &["ceremony", "run", text_of(&plan)], ended);
    assert_eq!(code, Some(USAGE), "{shown}");
    let (_, after) = shown.rsplit_once(CLEAR_PROMPT).unwrap();
    assert!(
        after.contains("\x1b[2J"),
        "the screen was not cleared: {shown}"
    );
    assert!(shown.contains("the terminal was lost"), "{shown}");
    let transcript = fs::read(site.folder().join("transcript.json")).unwrap();
    let content: Value = serde_json::from_slice(&transcript).unwrap();
    assert_eq!(content["status"], "incomplete");
    assert_eq!(content["tokens"][0]["initialised"], false);
    let listed = site.expect_ok(&["token", "list"]);
    assert!(!listed.contains(NEW_LABEL), "{listed}");
}

/// SoftHSM accepts PINs of 4 to 255 bytes. A shorter user PIN is refused before a custodian sees a share that would be void.
#[test]
fn a_pin_of_a_wrong_length_is_refused_before_a_share_is_shown() {
    let site = site_for_new_token();
    let plan = plan_file(&site, &plan(&people(), &new_token(), ""));
    write_private(&site.token.pin_file(), "abc\n");
    let (code, shown) = at_terminal(&site, &["ceremony", "run", text_of(&plan)]);
    assert_eq!(code, Some(PIN), "{shown}");
    let expected =
        "the length of the user PIN is 3, but the blank token accepts PINs of 4 to 255 bytes";
    assert!(shown.contains(expected), "{shown}");
    assert_eq!(shares(&shown), Vec::<String>::new());
    assert!(!site.folder().join("transcript.json").exists());
}

/// Every refusal comes before anything is changed.
#[test]
fn what_exists_already_is_refused() {
    let people = people();
    let site = Site::fresh(Options::default());
    let label = format!("label = \"{}\"", site.token.label());
    let before = site.expect_ok(&["key", "list", "-o", "json"]);
    let id = serde_json::from_str::<Value>(&before).unwrap()[0]["id"]
        .as_str()
        .unwrap()
        .to_owned();
    let run = |text: &str| {
        let path = plan_file(&site, text);
        let (code, shown) = at_terminal(&site, &["ceremony", "run", text_of(&path)]);
        (code.unwrap(), shown)
    };
    let not_registered = |text: String| text.replacen("quorum", "register = false\nquorum", 1);
    let initialised = format!("{label}\ninitialise = true\nso_pin_threshold = 2");
    let id = format!("id = \"{id}\"");
    for (text, code, expected) in [
        (
            plan(&people, &label, ""),
            UNTRUSTED,
            "already has the wrapping key",
        ),
        (
            not_registered(plan(&people, &label, &id)),
            UNTRUSTED,
            "already has a key with the CKA_ID",
        ),
        (
            not_registered(plan(&people, &initialised, "")),
            TOKEN,
            "is initialised already",
        ),
        (
            not_registered(plan(&people, "label = \"other\"", "")),
            CONFIGURATION,
            "in the plan, but",
        ),
        (plan(&people, "", ""), USAGE, "exactly one of"),
    ] {
        let (found, shown) = run(&text);
        assert_eq!(found, code, "{shown}");
        assert!(shown.contains(expected), "{expected}: {shown}");
        assert!(
            !site.folder().join("transcript.json").exists(),
            "{expected}"
        );
    }
    fs::write(
        site.folder().join("transcript.json.txt"),
        "an earlier ceremony",
    )
    .unwrap();
    let (code, shown) = run(&not_registered(plan(&people, &label, "")));
    assert_eq!(code, USAGE, "{shown}");
    assert!(shown.contains("exists already"), "{shown}");
    assert_eq!(site.expect_ok(&["key", "list", "-o", "json"]), before);
    let objects = site
        .token
        .pkcs11_tool(&["--list-objects", "--type", "privkey"]);
    assert_eq!(
        String::from_utf8_lossy(&objects.stdout)
            .matches("Private Key")
            .count(),
        1
    );
}

#[test]
fn shares_need_a_terminal() {
    let site = site_for_new_token();
    let plan = plan_file(&site, &plan(&people(), &new_token(), ""));
    let command = site.command(&["ceremony", "run", text_of(&plan)]);
    let output = Command::new("setsid")
        .arg("--wait")
        .arg(command.get_program())
        .args(command.get_args())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert_refused(
        &Finished::from(output),
        USAGE,
        &["are shown at a terminal", "Nothing was changed"],
    );
    assert!(!site.folder().join("transcript.json").exists());
}

/// Holds a ceremony on a token of another maker, which is initialised already. Returns the algorithms of the wrapping key and of the
/// token's signature.
fn held_on(maker: Maker) -> (String, String) {
    let stand = Stand::new(maker);
    let site = &stand.site;
    let shown = site.expect_ok(&["config", "show", "-o", "json"]);
    let shown: Value = serde_json::from_str(&shown).unwrap();
    let people = people();
    let text = plan(&people, &format!("label = {}", shown["token"]["label"]), "");
    let module = format!("\"{}\"", softhsm::module().display());
    let text = text.replace(&module, &shown["token"]["module"].to_string());
    let plan = plan_file(site, &text);
    site.expect_ok(&["ceremony", "run", text_of(&plan)]);
    site.expect_ok(&["token", "check"]);

    let transcript = site.folder().join("transcript.json");
    let (mut sign, mut allowed) = (
        vec!["ceremony", "sign", text_of(&transcript)],
        String::new(),
    );
    let files: Vec<PathBuf> = people[..2]
        .iter()
        .map(|person| person.sign(&transcript, "keybroker-ceremony"))
        .collect();
    for (name, (person, file)) in NAMES.iter().zip(people.iter().zip(&files)) {
        writeln!(allowed, "{name} {}", person.public()).unwrap();
        sign.extend(["--signature", text_of(file)]);
    }
    site.expect_ok(&sign);
    let list = site.folder().join("allowed_signers");
    fs::write(&list, allowed).unwrap();
    let verify = [
        "ceremony",
        "verify",
        text_of(&transcript),
        "--allowed-signers",
        text_of(&list),
    ];
    site.expect_ok(&[&verify[..], &["--quorum", "2"]].concat());

    let read = |end: &str| -> Value {
        let path = site.folder().join(format!("transcript.json{end}"));
        serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
    };
    let of = |value: &Value| value["algorithm"].as_str().unwrap().to_owned();
    (
        of(&read("")["tokens"][0]["keys"][0]),
        of(&read(".signatures")["tokens"][0]),
    )
}

#[test]
fn kryoptic_signs_a_transcript() {
    let algorithms = held_on(Maker::Kryoptic);
    assert_eq!(
        algorithms,
        ("RSA-OAEP-SHA-256".to_owned(), "RSA-PSS-SHA-256".to_owned())
    );
}

#[test]
fn a_token_behind_p11_kit_signs_a_transcript() {
    let (wrapping, _) = held_on(Maker::P11Kit);
    assert_eq!(wrapping, "RSA-OAEP-SHA-1");
}

#[test]
fn opencryptoki_signs_a_transcript() {
    if in_namespaces("ceremony::opencryptoki_signs_a_transcript") {
        held_on(Maker::Opencryptoki);
    }
}

/// SoftHSM has RSA-OAEP only with SHA-1.
#[test]
fn a_failed_step_leaves_an_incomplete_transcript() {
    let site = Site::without_keys(Options::default());
    site.expect_ok(&["store", "migrate"]);
    let people = people();
    let label = format!("label = \"{}\"", site.token.label());
    let plan = plan_file(
        &site,
        &plan(&people, &label, "algorithm = \"RSA-OAEP-SHA-256\""),
    );
    let failed = site.run(&["ceremony", "run", text_of(&plan)]);
    assert_refused(
        &failed,
        UNTRUSTED,
        &[
            "step 4 failed",
            "the plan demands",
            "was removed",
            "incomplete",
        ],
    );
    let transcript = site.folder().join("transcript.json");
    let content: Value = serde_json::from_slice(&fs::read(&transcript).unwrap()).unwrap();
    assert_eq!(content["status"], "incomplete");
    let steps = content["steps"].as_array().unwrap();
    let results: Vec<&str> = steps
        .iter()
        .map(|step| step["result"].as_str().unwrap())
        .collect();
    assert_eq!(results[..3], ["done", "done", "done"]);
    assert!(results[3].starts_with("failed: "), "{results:?}");
    assert!(content["tokens"][0]["identity"]["serial"].is_string());
    let listed = site.expect_ok(&["key", "list", "-o", "json"]);
    assert_eq!(
        serde_json::from_str::<Value>(&listed).unwrap(),
        serde_json::json!([])
    );
    let objects = site
        .token
        .pkcs11_tool(&["--list-objects", "--type", "privkey"]);
    let objects = String::from_utf8_lossy(&objects.stdout);
    assert_eq!(objects.matches("Private Key").count(), 1, "{objects}");
    assert!(objects.contains("ceremony signing key"), "{objects}");

    let signature = people[0].sign(&transcript, "keybroker-ceremony");
    let refused = site.run(&[
        "ceremony",
        "sign",
        text_of(&transcript),
        "--signature",
        text_of(&signature),
    ]);
    assert_refused(&refused, VERIFICATION, &["incomplete"]);
    // The name of the transcript is used, so a second attempt needs another one.
    assert_refused(
        &site.run(&["ceremony", "run", text_of(&plan)]),
        USAGE,
        &["exists already"],
    );
}
