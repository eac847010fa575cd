//! `approvals run`: the policy approves or leaves a request to a person, and the service survives outages.

use std::{
    fs,
    process::{Child, Stdio},
};

use rustix::process::Signal;

use super::desk::{DEVICE, Desk, Device};
use crate::{
    faulty::{Fault, code},
    faulty_token::put_before,
    process::{WAIT_MAX, send, until, until_within},
    softhsm::write_private,
};

mod attempts;
mod fairness;

const POLICY: &str = r#"
    @id("fleet")
    permit (principal, action, resource)
    when { context.inInventory && context.networks.contains("office") && context.pendingOfMember == 1 };
    @id("not-eve")
    forbid (principal, action, resource) when { context.email == "eve@example.org" };
"#;

/// A desk with a policy, an inventory and a network.
fn desk(inventory: &str, policy: &str) -> Desk {
    let desk = Desk::new();
    configure(&desk, inventory, policy);
    desk
}

fn configure(desk: &Desk, inventory: &str, policy: &str) {
    let folder = desk.site.folder();
    write_private(&folder.join("inventory.txt"), inventory);
    write_private(&folder.join("approvals.cedar"), policy);
    desk.append(&format!(
        "interval_seconds = 5\npolicy_file = \"{0}/approvals.cedar\"\ninventory_file = \"{0}/inventory.txt\"\n\
         automatic_per_hour = 2\nnetworks = {{ office = [\"192.0.2.0/24\"] }}\n",
        folder.display()
    ));
}

#[test]
fn the_policy_approves_known_devices_and_leaves_the_others_to_a_person() {
    let desk = desk(
        &format!("{DEVICE} ada@example.org\n{DEVICE} eve@example.org\n"),
        POLICY,
    );
    let device = Device::new();
    let (ada, user_key) = desk.member("ada@example.org");
    let (eve, _) = desk.member("eve@example.org");
    let (bob, _) = desk.member("bob@example.org");
    let good = desk.request(&ada, &device);
    let forbidden = desk.request(&eve, &Device::new());
    let unknown = desk.request(&bob, &Device::new());
    let finished = desk.run(&["run", "--once"]);
    assert_eq!(finished.code, Some(0), "{finished:#?}");
    let decisions = desk.server.decisions();
    assert_eq!(decisions.len(), 1);
    assert_eq!(decisions[0].request, good);
    assert_eq!(device.open(&decisions[0]), user_key);
    for (request, words) in [
        (&good, "approved"),
        (&forbidden, "policy not-eve"),
        (&unknown, "no policy permits the approval"),
    ] {
        let line = finished
            .stderr
            .lines()
            .find(|line| line.contains(&**request))
            .unwrap();
        assert!(line.contains(words), "{line}");
    }
    let entries = desk.entries("bitwarden.approve_device");
    assert_eq!(entries.len(), 2);
    assert_eq!(entries[1]["policy"], "fleet");
    // From another network, and with a second request of the same member.
    let from_elsewhere = desk.request(&ada, &Device::new());
    desk.server.edit(&from_elsewhere, |one| {
        one.address = "203.0.113.1".to_owned();
    });
    let finished = desk.run(&["run", "--once"]);
    assert_eq!(finished.code, Some(0), "{finished:#?}");
    desk.server
        .edit(&from_elsewhere, |one| one.address = "192.0.2.1".to_owned());
    desk.request(&ada, &Device::new());
    let finished = desk.run(&["run", "--once"]);
    assert_eq!(finished.code, Some(0), "{finished:#?}");
    assert_eq!(desk.server.decisions().len(), 1);
}

/// A policy that permits everything does not decide about a key whose pin does not match.
#[test]
fn a_key_of_another_member_waits_whatever_the_policy_says() {
    let desk = desk("", "permit (principal, action, resource);");
    let (victim, _) = desk.member("victim@example.org");
    let (thief, _) = desk.member("thief@example.org");
    desk.request(&victim, &Device::new());
    desk.ok(&["list"]);
    desk.server.set_key(&thief, victim.key.as_deref());
    let request = desk.request(&thief, &Device::new());
    let finished = desk.run(&["run", "--once"]);
    assert_eq!(finished.code, Some(0), "{finished:#?}");
    let line = finished
        .stderr
        .lines()
        .find(|line| line.contains(&request))
        .unwrap();
    assert!(
        line.contains("waits for a person") && line.contains("another member"),
        "{line}"
    );
    // The victim's own request was approved.
    assert_eq!(desk.server.decisions().len(), 1);
    assert_ne!(desk.server.decisions()[0].request, request);
    // A changed key waits, too.
    let rotated = desk.organization.wrap(&[9; 64]);
    desk.server.set_key(&victim, Some(&rotated));
    desk.request(&victim, &Device::new());
    let finished = desk.run(&["run", "--once"]);
    assert!(finished.stderr.contains("has changed"), "{finished:#?}");
    assert_eq!(desk.server.decisions().len(), 1);
}

#[test]
fn the_service_approves_at_most_so_many_requests_in_an_hour() {
    let desk = desk("", "permit (principal, action, resource);");
    let (ada, _) = desk.member("ada@example.org");
    for _ in 0..3 {
        desk.request(&ada, &Device::new());
    }
    let finished = desk.run(&["run", "--once"]);
    assert_eq!(finished.code, Some(0), "{finished:#?}");
    assert!(
        finished
            .stderr
            .contains("`automatic_per_hour` (2) is reached"),
        "{finished:#?}"
    );
    assert_eq!(desk.server.decisions().len(), 2);
    // The count survives the process, and ends with the hour.
    let later = desk.run(&["run", "--once"]);
    assert_eq!(later.code, Some(0), "{later:#?}");
    assert_eq!(desk.server.decisions().len(), 2);
    let slots = "member_id = zeroblob(16)";
    let count = format!("SELECT count(*) FROM bitwarden_member_keys WHERE {slots}");
    assert_eq!(desk.site.sql(&count).trim(), "2");
    assert_eq!(desk.site.run(&["store", "check"]).code, Some(0));
    // A slot that was altered permits nothing.
    let earlier = format!("UPDATE bitwarden_member_keys SET pinned_us = 1 WHERE {slots}");
    desk.site.sql(&earlier);
    desk.run(&["run", "--once"]);
    assert_eq!(desk.server.decisions().len(), 2);
    desk.site
        .sql(&format!("DELETE FROM bitwarden_member_keys WHERE {slots}"));
    desk.run(&["run", "--once"]);
    assert_eq!(desk.server.decisions().len(), 3);
}

#[test]
fn a_bad_policy_prevents_the_start_and_a_missing_one_approves_nothing() {
    let desk = desk(
        "",
        "permit (principal, action, resource) when { context.colour };",
    );
    let finished = desk.run(&["run", "--once"]);
    assert_eq!(finished.code, Some(3), "{finished:#?}");
    assert!(finished.stderr.contains("policy_file"), "{finished:#?}");
    let checked = desk.site.run(&["config", "check"]);
    assert!(
        checked.stderr.contains("colour") || checked.stdout.contains("colour"),
        "{checked:#?}"
    );
    desk.append("");
    let (ada, _) = desk.member("ada@example.org");
    desk.request(&ada, &Device::new());
    let finished = desk.run(&["run", "--once"]);
    assert_eq!(finished.code, Some(0), "{finished:#?}");
    assert!(
        finished.stderr.contains("waits for a person"),
        "{finished:#?}"
    );
    assert_eq!(desk.server.decisions(), []);
}

/// The service in the background, which is ended with this value.
struct Running(Child);

impl Running {
    fn start(desk: &Desk) -> Self {
        let log = fs::File::create(desk.site.folder().join("run.log")).unwrap();
        let mut command = desk.site.command(&["bitwarden", "approvals", "run"]);
        Self(command.stderr(log).stdout(Stdio::null()).spawn().unwrap())
    }

    /// Sends SIGTERM, and waits until the thread that waits for this signal has ended.
    fn signal(&self) {
        let id = self.0.id();
        send(id, Signal::TERM);
        until("the end of the thread that waits for SIGTERM", || {
            let tasks = fs::read_dir(format!("/proc/{id}/task")).unwrap().flatten();
            let mut names =
                tasks.filter_map(|task| fs::read_to_string(task.path().join("comm")).ok());
            (!names.any(|name| name.trim_end() == "terminate")).then_some(())
        });
    }

    fn terminate(self) -> Option<i32> {
        self.signal();
        self.end()
    }

    fn end(mut self) -> Option<i32> {
        let ended = until("the end of the service", || self.0.try_wait().unwrap());
        ended.code()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

fn log(desk: &Desk) -> String {
    fs::read_to_string(desk.site.folder().join("run.log")).unwrap_or_default()
}

#[test]
fn the_service_goes_on_after_the_token_and_the_server_were_gone() {
    let desk = desk("", "permit (principal, action, resource);");
    let faulty = put_before(&desk.site);
    configure(&desk, "", "permit (principal, action, resource);");
    let service = Running::start(&desk);
    // The pause between two rounds doubles with each failure.
    let wait = 4 * WAIT_MAX;
    let says = |words: &str| {
        until_within(wait, words, || log(&desk).contains(words).then_some(()));
    };
    says("every 5 s");
    // The token is gone in the middle of an approval.
    faulty.set("C_UnwrapKey", &Fault::always(code::DEVICE_REMOVED));
    let (ada, user_key) = desk.member("ada@example.org");
    let device = Device::new();
    desk.request(&ada, &device);
    says("warning: ");
    assert_eq!(desk.server.decisions(), []);
    assert_eq!(desk.entries("bitwarden.approve_device").len(), 0);
    desk.answer(&desk.server.requests_path(), 503, "");
    faulty.clear("C_UnwrapKey");
    says("503");
    desk.server.answer(&desk.server.requests_path(), None);
    until_within(wait, "an approval", || desk.server.decisions().pop());
    assert_eq!(device.open(&desk.server.decisions()[0]), user_key);
    // A person can use the same embedded database meanwhile.
    assert_eq!(desk.ok(&["list"]).as_array().unwrap().len(), 0);
    assert_eq!(service.terminate(), Some(0));
    let runs = desk.entries("bitwarden.approvals_run");
    assert_eq!(runs.last().unwrap()["outcome"], "ok");
}
