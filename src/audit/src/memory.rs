//! What an instance remembers of its log outside the log's own directory: how far it was durable, and whether its files were
//! tampered with. Facts in the state directory, so that neither a restart nor a new directory makes the broker forget.
//!
//! Not protected: somebody who can write to the state directory can change these facts, too.
//!
//! Mitigation: M14 of `THREAT_MODEL.md`.

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use keybroker_core::{call::Timestamp, state::StateDirectory};

use super::Error;

/// The facts of one instance's log.
#[derive(Clone, Debug)]
pub(super) struct Memory {
    state: StateDirectory,
    instance: String,
}

/// How far the log was durable. It may lag behind by a second, never be ahead.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Mark {
    pub(super) log_id: String,
    /// Sequence number of the last entry.
    pub(super) sequence: u64,
}

/// A log whose files were tampered with. Nothing is written to it until an operator acknowledges that.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tampering {
    /// What was found.
    pub finding: String,
    /// When it was found, in UTC microseconds since 1970.
    pub found_us: i64,
}

/// The operator's acknowledgement.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Acknowledgement {
    /// The operator, as the operating system knows the user.
    pub(super) principal: String,
    /// When the tampering was found that this is about, as in [`Tampering::found_us`].
    found_us: i64,
}

impl Memory {
    pub(super) fn new(state: StateDirectory, instance: &str) -> Self {
        Self {
            state,
            instance: instance.to_owned(),
        }
    }

    pub(super) fn mark(&self) -> Result<Option<Mark>, Error> {
        self.read("mark")
    }

    pub(super) fn set_mark(&self, mark: &Mark) -> Result<(), Error> {
        self.write("mark", mark)
    }

    pub(super) fn tampering(&self) -> Result<Option<Tampering>, Error> {
        self.read("tampering")
    }

    pub(super) fn set_tampering(&self, finding: &str) -> Result<(), Error> {
        let tampering = Tampering {
            finding: finding.to_owned(),
            found_us: Timestamp::now().micros(),
        };
        self.write("tampering", &tampering)
    }

    /// The acknowledgement of the tampering that is remembered. One that is about an earlier finding, or about none, does not
    /// count.
    pub(super) fn acknowledgement(&self) -> Result<Option<Acknowledgement>, Error> {
        let Some(tampering) = self.tampering()? else {
            return Ok(None);
        };
        let acknowledgement: Option<Acknowledgement> = self.read("acknowledgement")?;
        Ok(acknowledgement.filter(|one| one.found_us == tampering.found_us))
    }

    pub(super) fn acknowledge(&self, tampering: &Tampering, principal: &str) -> Result<(), Error> {
        let acknowledgement = Acknowledgement {
            principal: principal.to_owned(),
            found_us: tampering.found_us,
        };
        self.write("acknowledgement", &acknowledgement)
    }

    /// The acknowledgement has taken effect.
    pub(super) fn forget_tampering(&self) -> Result<(), Error> {
        for fact in ["acknowledgement", "tampering"] {
            self.state
                .remove(&self.name(fact))
                .map_err(|error| unusable(&error))?;
        }
        Ok(())
    }

    fn name(&self, fact: &str) -> String {
        format!("audit-{}.{fact}", self.instance)
    }

    fn read<T: DeserializeOwned>(&self, fact: &str) -> Result<Option<T>, Error> {
        let name = self.name(fact);
        let Some(bytes) = self.state.read(&name).map_err(|error| unusable(&error))? else {
            return Ok(None);
        };
        let parsed = serde_json::from_slice(&bytes);
        parsed
            .map(Some)
            .map_err(|error| Error::tampered(format!("the state file {name} is damaged: {error}")))
    }

    fn write<T: Serialize>(&self, fact: &str, value: &T) -> Result<(), Error> {
        let bytes = serde_json::to_vec(value).map_err(|error| unusable(&error))?;
        let written = self.state.write(&self.name(fact), &bytes);
        written.map_err(|error| unusable(&error))
    }
}

fn unusable(error: &dyn std::error::Error) -> Error {
    let mut text = error.to_string();
    if let Some(source) = error.source() {
        text = format!("{text}: {source}");
    }
    Error::new(text)
}
