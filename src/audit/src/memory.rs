//! The facts about its log that a broker instance stores outside the log's directory: the last durable entry, the
//! segments, and whether the log's files were tampered with. The facts are in the state directory, so that they survive
//! a restart and a replacement of the log's directory.
//!
//! A damaged fact is treated as tampering, so that an operator can repair it with `keybroker audit acknowledge`.
//!
//! Not protected: a process that can write to the state directory can change the facts.
//!
//! Mitigation: M14 of `THREAT_MODEL.md`.

use serde::{Deserialize, Serialize};

use keybroker_core::{
    call::Timestamp,
    error::chain,
    state::{self, StateDirectory},
};

use super::{Error, extent::Extent};

/// The stored facts about the log of one broker instance.
#[derive(Clone, Debug)]
pub(super) struct Memory {
    state: StateDirectory,
    instance: String,
}

/// The mark of a log: the last entry that is known to be durable. The mark may be up to one second older than the log,
/// but never refers to an entry that is not in the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Mark {
    pub(super) log_id: String,
    /// Sequence number of the last entry.
    pub(super) sequence: u64,
    /// The segments that existed when the mark was stored. The list is empty in a mark of an earlier release, which did
    /// not store the segments.
    #[serde(default)]
    pub(super) segments: Vec<Extent>,
}

/// The fact that the log's files were tampered with. Nothing is written to the log until an operator acknowledges the
/// tampering.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tampering {
    /// The finding.
    pub finding: String,
    /// When the tampering was found, in microseconds since 1970 (UTC).
    pub found_us: i64,
}

/// An operator's acknowledgement of tampering.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Acknowledgement {
    /// The operator's user name in the operating system.
    pub(super) principal: String,
    /// When the acknowledged tampering was found, as in [`Tampering::found_us`].
    found_us: i64,
}

/// An operator's request to remove the oldest segments.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Removal {
    /// The operator's user name in the operating system.
    pub(super) principal: String,
    /// Number of the last segment to remove.
    pub(super) through: u64,
}

const MARK: &str = "mark";
const TAMPERING: &str = "tampering";
const ACKNOWLEDGEMENT: &str = "acknowledgement";
const REMOVAL: &str = "removal";
const BINDING: &str = "binding";

impl Memory {
    pub(super) fn new(state: StateDirectory, instance: &str) -> Self {
        Self {
            state,
            instance: instance.to_owned(),
        }
    }

    /// Returns the mark. A damaged mark is an error for which [`Error::is_tampering`] is true.
    pub(super) fn mark(&self) -> Result<Option<Mark>, Error> {
        self.state.read_json(&self.name(MARK)).map_err(unusable)
    }

    pub(super) fn set_mark(&self, mark: &Mark) -> Result<(), Error> {
        self.write(MARK, mark)
    }

    /// Returns the stored finding of tampering, unless an operator has acknowledged the finding. A
    /// damaged fact is treated as tampering.
    pub(super) fn tampering(&self) -> Result<Option<Tampering>, Error> {
        match self.state.read_json(&self.name(TAMPERING)) {
            Err(error) if error.is_damaged() => Ok(Some(Tampering {
                finding: chain(&error),
                found_us: 0,
            })),
            read => read.map_err(unusable),
        }
    }

    pub(super) fn set_tampering(&self, finding: &str) -> Result<(), Error> {
        let tampering = Tampering {
            finding: finding.to_owned(),
            found_us: Timestamp::now().micros(),
        };
        self.write(TAMPERING, &tampering)
    }

    /// Returns the acknowledgement of the stored tampering. An acknowledgement that is damaged or belongs to another
    /// finding is ignored. The operator's next acknowledgement replaces an ignored acknowledgement.
    pub(super) fn acknowledgement(&self) -> Result<Option<Acknowledgement>, Error> {
        let Some(tampering) = self.tampering()? else {
            return Ok(None);
        };
        let acknowledgement: Option<Acknowledgement> =
            match self.state.read_json(&self.name(ACKNOWLEDGEMENT)) {
                Err(error) if error.is_damaged() => None,
                read => read.map_err(unusable)?,
            };
        Ok(acknowledgement.filter(|one| one.found_us == tampering.found_us))
    }

    pub(super) fn acknowledge(&self, tampering: &Tampering, principal: &str) -> Result<(), Error> {
        let acknowledgement = Acknowledgement {
            principal: principal.to_owned(),
            found_us: tampering.found_us,
        };
        self.write(ACKNOWLEDGEMENT, &acknowledgement)
    }

    /// Whether the log must be recorded in the database. True for every log that this release or a later release
    /// created, and for every log that is already recorded in the database.
    pub(super) fn is_binding_required(&self) -> Result<bool, Error> {
        match self.state.read(&self.name(BINDING)) {
            Ok(fact) => Ok(fact.is_some()),
            Err(error) => Err(unusable(error)),
        }
    }

    pub(super) fn require_binding(&self) -> Result<(), Error> {
        if self.is_binding_required()? {
            return Ok(());
        }
        self.write(BINDING, &true)
    }

    /// Removes the facts about tampering after the acknowledgement of the tampering has taken effect. Afterwards, a log
    /// that is not recorded in the database is accepted.
    pub(super) fn forget_tampering(&self) -> Result<(), Error> {
        self.remove(BINDING)?;
        self.remove(ACKNOWLEDGEMENT)?;
        self.remove(TAMPERING)
    }

    /// Returns the pending request to remove segments. A request that cannot be parsed is ignored.
    pub(super) fn removal(&self) -> Result<Option<Removal>, Error> {
        match self.state.read_json(&self.name(REMOVAL)) {
            Err(error) if error.is_damaged() => Ok(None),
            read => read.map_err(unusable),
        }
    }

    pub(super) fn request_removal(&self, removal: &Removal) -> Result<(), Error> {
        self.write(REMOVAL, removal)
    }

    /// Removes a request that was carried out or withdrawn.
    pub(super) fn forget_removal(&self) -> Result<(), Error> {
        self.remove(REMOVAL)
    }

    fn name(&self, fact: &str) -> String {
        format!("audit-{}.{fact}", self.instance)
    }

    fn write<T: Serialize>(&self, fact: &str, value: &T) -> Result<(), Error> {
        let written = self.state.write_json(&self.name(fact), value);
        written.map_err(unusable)
    }

    fn remove(&self, fact: &str) -> Result<(), Error> {
        self.state.remove(&self.name(fact)).map_err(unusable)
    }
}

#[expect(clippy::needless_pass_by_value, reason = "an argument of map_err")]
fn unusable(error: state::Error) -> Error {
    if error.is_damaged() {
        Error::tampered(chain(&error))
    } else {
        Error::new(chain(&error))
    }
}
