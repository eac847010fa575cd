//! A person types the phrase at a terminal, and meanwhile the server and other commands go on.

use std::{
    fs,
    io::Write as _,
    path::PathBuf,
    process::{Child, Command, Stdio},
};

use super::{Desk, Device};
use crate::process::until;

/// `approvals approve` at a terminal, which is ended with this value.
struct Terminal {
    command: Child,
    /// What the terminal has shown.
    shown: PathBuf,
}

impl Terminal {
    /// Returns when the command prompts for the phrase.
    fn prompting(desk: &Desk, request: &str) -> Self {
        let plain = desk
            .site
            .command(&["bitwarden", "approvals", "approve", request]);
        let words = std::iter::once(plain.get_program()).chain(plain.get_args());
        let line: Vec<String> = words
            .map(|word| format!("'{}'", word.to_str().unwrap()))
            .collect();
        let shown = desk.site.folder().join("terminal");
        let command = Command::new("script")
            .args(["-qefc", &line.join(" ")])
            .arg(&shown)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let terminal = Self { command, shown };
        until("the prompt", || {
            terminal
                .text()
                .contains("type its five words")
                .then_some(())
        });
        terminal
    }

    fn text(&self) -> String {
        fs::read_to_string(&self.shown).unwrap_or_default()
    }

    /// Types a line, and returns the exit code.
    fn answered(&mut self, line: &str) -> Option<i32> {
        let input = self.command.stdin.as_mut().unwrap();
        input.write_all(format!("{line}\n").as_bytes()).unwrap();
        let ended = until("the end", || self.command.try_wait().unwrap());
        ended.code()
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.command.kill().ok();
        self.command.wait().ok();
    }
}

#[test]
fn other_commands_use_the_database_while_a_person_types() {
    let desk = Desk::new();
    let (ada, user_key) = desk.member("ada@example.org");
    let device = Device::new();
    let request = desk.request(&ada, &device);
    let mut terminal = Terminal::prompting(&desk, &request);
    assert_eq!(desk.ok(&["list"])[0]["key_state"], "known");
    let code = terminal.answered(&device.phrase("ada@example.org"));
    assert_eq!(code, Some(0), "{}", terminal.text());
    assert_eq!(device.open(&desk.server.decisions()[0]), user_key);
}

/// The person compares the phrase of one device, and the server then shows the public key of another one.
#[test]
fn a_public_key_that_is_exchanged_after_the_comparison_gets_nothing() {
    let desk = Desk::new();
    let (ada, _) = desk.member("ada@example.org");
    let (device, thief) = (Device::new(), Device::new());
    let request = desk.request(&ada, &device);
    let mut terminal = Terminal::prompting(&desk, &request);
    desk.server
        .edit(&request, |one| one.public_key.clone_from(&thief.0.spki));
    let code = terminal.answered(&device.phrase("ada@example.org"));
    assert_eq!(code, Some(12), "{}", terminal.text());
    assert!(
        terminal.text().contains("changed after you typed"),
        "{}",
        terminal.text()
    );
    assert_eq!(desk.server.decisions(), []);
    assert_eq!(desk.entries("bitwarden.approve_device").len(), 0);
}
