//! Who may do what with a request for access in which state: every cell of the table is asked of the real broker.

use std::cell::Cell;

use tonic::Status;

use keybroker_proto::{self as proto, AccessApprover};

use crate::{
    client::reason,
    identity::{Identity, Options},
    process::Broker,
    tokens::{ADA, BOB, start},
};

use super::{
    approvers::{approver, mappings},
    member::{App, CODE, Member},
};

const ROLES: [&str; 4] = ["member", "other", "approver", "approver-of-other"];
const ACTIONS: [&str; 4] = ["fetch", "confirm", "approve", "deny"];

/// The answers to each action, for each role in the order of [`ROLES`].
const MATRIX: &str = "
pending   fetch    OK            DEVICE_NOT_FOUND  POLICY        POLICY
pending   confirm  DEVICE_STATE  DEVICE_NOT_FOUND  POLICY        POLICY
pending   approve  OK            DEVICE_NOT_FOUND  POLICY        POLICY
pending   deny     OK            DEVICE_NOT_FOUND  OK            POLICY
approved  fetch    OK            DEVICE_NOT_FOUND  POLICY        POLICY
approved  confirm  DEVICE_STATE  DEVICE_NOT_FOUND  POLICY        POLICY
approved  approve  DEVICE_STATE  DEVICE_NOT_FOUND  POLICY        POLICY
approved  deny     OK            DEVICE_NOT_FOUND  OK            POLICY
fetched   fetch    OK            DEVICE_NOT_FOUND  POLICY        POLICY
fetched   confirm  OK            DEVICE_NOT_FOUND  POLICY        POLICY
fetched   approve  DEVICE_STATE  DEVICE_NOT_FOUND  POLICY        POLICY
fetched   deny     OK            DEVICE_NOT_FOUND  OK            POLICY
denied    fetch    DEVICE_STATE  DEVICE_NOT_FOUND  POLICY        POLICY
denied    confirm  DEVICE_STATE  DEVICE_NOT_FOUND  POLICY        POLICY
denied    approve  DEVICE_STATE  DEVICE_NOT_FOUND  POLICY        POLICY
denied    deny     DEVICE_STATE  DEVICE_NOT_FOUND  DEVICE_STATE  POLICY
consumed  fetch    DEVICE_STATE  DEVICE_NOT_FOUND  POLICY        POLICY
consumed  confirm  DEVICE_STATE  DEVICE_NOT_FOUND  POLICY        POLICY
consumed  approve  DEVICE_STATE  DEVICE_NOT_FOUND  POLICY        POLICY
consumed  deny     OK            DEVICE_NOT_FOUND  OK            POLICY
revoked   fetch    DEVICE_STATE  DEVICE_NOT_FOUND  POLICY        POLICY
revoked   confirm  DEVICE_STATE  DEVICE_NOT_FOUND  POLICY        POLICY
revoked   approve  DEVICE_STATE  DEVICE_NOT_FOUND  POLICY        POLICY
revoked   deny     DEVICE_STATE  DEVICE_NOT_FOUND  DEVICE_STATE  POLICY
";

struct Stage {
    ada: Member,
    first: App,
    others: Vec<Member>,
    /// The number of the device that asked last.
    asked: Cell<u8>,
}

impl Stage {
    async fn new(broker: &Broker, service: &Identity) -> Self {
        let (ada, first) = Member::with_first_device(broker, service, ADA).await;
        Self {
            ada,
            first,
            others: vec![
                Member::of(broker, service, BOB),
                approver(broker, service, "approvers"),
                approver(broker, service, "approvers-of-bob"),
            ],
            asked: Cell::new(1),
        }
    }

    /// A new request in this state.
    async fn request_in(&self, state: &str) -> proto::AccessRequest {
        let ada = &self.ada;
        self.asked.update(|number| number + 1);
        let app = App::new(self.asked.get());
        let asked = ada.asks(&app, AccessApprover::Device).await;
        let request = asked.unwrap();
        if state == "denied" {
            ada.denies(&request).await.unwrap();
        } else if state != "pending" {
            ada.approves(&request, &self.first).await.unwrap();
        }
        if ["fetched", "consumed"].contains(&state) {
            ada.fetches(&request, CODE).await.unwrap();
        }
        match state {
            "consumed" => ada.confirms(&request).await.unwrap(),
            "revoked" => drop(ada.denies(&request).await.unwrap()),
            _ => {}
        }
        request
    }

    async fn attempt(
        &self,
        role: &str,
        action: &str,
        request: &proto::AccessRequest,
    ) -> Result<(), Status> {
        let place = ROLES.iter().position(|known| *known == role).unwrap();
        let member = match place {
            0 => &self.ada,
            other => &self.others[other - 1],
        };
        match action {
            "fetch" => member.fetches(request, CODE).await.map(drop),
            "confirm" => member.confirms(request).await,
            "approve" => member.approves(request, &self.first).await.map(drop),
            _ => member.denies(request).await.map(drop),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_cell_has_its_answer() {
    let service = Identity::start(Options::default());
    let broker = start(&service, &mappings());
    let stage = Stage::new(&broker, &service).await;
    let mut wrong = Vec::new();
    let mut cells = 0;
    let mut shared: Option<(String, proto::AccessRequest)> = None;
    for line in MATRIX.lines().filter(|line| !line.is_empty()) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [state, action, expected @ ..] = &words[..] else {
            panic!("{line}");
        };
        assert!(ACTIONS.contains(action) && expected.len() == ROLES.len());
        for (role, expected) in ROLES.iter().zip(expected) {
            // An action that succeeds changes the state of the request. Each such action therefore gets a new request.
            let request = match &shared {
                Some((known, request)) if known == state && *expected != "OK" => request.clone(),
                _ => stage.request_in(state).await,
            };
            let attempt = stage.attempt(role, action, &request).await;
            let actual = attempt.map_or_else(|status| reason(&status), |()| "OK".to_owned());
            if actual != *expected {
                wrong.push(format!("{state} {role} {action}: {actual}, not {expected}"));
            }
            if *expected == "OK" && *state == "pending" && *action == "fetch" {
                // Withdrawn, so that few requests are pending.
                stage.ada.denies(&request).await.unwrap();
            } else if *expected != "OK" {
                shared = Some(((*state).to_owned(), request));
            }
            cells += 1;
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert_eq!(cells, 6 * ACTIONS.len() * ROLES.len());
}
