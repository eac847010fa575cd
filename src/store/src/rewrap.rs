//! The functions of the store for a re-wrap: finding the rows under a wrapping key, swapping single
//! envelopes and MACs, and storing the requested run.
//!
//! A swap compares the stored bytes with the bytes that were read, and replaces only the envelope
//! or the MAC that the wrapping key made. A swap never changes the material, the revision or the
//! times of a row. Therefore a swap does not overwrite a row that another change or another broker
//! altered in between, and no row is moved twice.

use async_trait::async_trait;

use keybroker_core::{
    call::{CallId, Timestamp},
    envelope::Mac,
    key::{ClientId, ID_BYTES, KeyAddress, KeyUse, RecordId, Revision, WrappingKeyId},
};

use super::error::Error;

/// Maximum length of the encoded progress of a run, in bytes.
pub const DOCUMENT_BYTES_MAX: usize = 32_768;

/// The number of rows that need a wrapping key, by kind of row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KeyUses {
    /// Current and superseded revisions of records, including deleted records. Revisions need the
    /// RSA key and the integrity key of the wrapping key.
    pub revisions: u64,
    /// API clients. API clients need the integrity key of the wrapping key.
    pub clients: u64,
    /// Answers to request ids that are not older than 24 hours. Stored answers need the integrity
    /// key of the wrapping key until the answers expire.
    pub requests: u64,
    /// Requests for approval that are pending or approved and have not expired. They need the integrity
    /// key of the wrapping key until they expire.
    pub approvals: u64,
    /// Devices of members. Devices need the integrity key of the wrapping key.
    pub devices: u64,
    /// Requests for access that are pending or approved and have not expired. They need the integrity key of the wrapping key until
    /// they expire.
    pub access_requests: u64,
}

impl KeyUses {
    /// The number of rows of all kinds.
    pub fn total(&self) -> u64 {
        self.revisions
            + self.clients
            + self.requests
            + self.approvals
            + self.devices
            + self.access_requests
    }
}

/// The position of a revision in the order of the primary key. A row that cannot be decoded also
/// has a position.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RevisionPlace {
    pub(super) record: Vec<u8>,
    pub(super) revision: i64,
}

impl RevisionPlace {
    /// The position before all rows, with an empty record id.
    pub const START: Self = Self {
        record: Vec::new(),
        revision: 0,
    };

    /// The record id; `None` if it does not have 16 bytes.
    pub fn record(&self) -> Option<RecordId> {
        RecordId::from_slice(&self.record)
    }

    /// The number of the revision; `None` if it is out of range.
    pub fn revision(&self) -> Option<Revision> {
        u64::try_from(self.revision).ok().and_then(Revision::new)
    }
}

/// A revision with the address of its record, as a re-wrap reads it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RevisionUnder {
    /// The record to which the revision belongs.
    pub record: RecordId,
    /// The address of the record.
    pub address: KeyAddress,
    /// The number of the revision.
    pub revision: Revision,
    /// The envelope as bytes that are not parsed yet.
    pub envelope: Vec<u8>,
    /// When the revision was created. A re-wrap of the row does not change the time of the
    /// revision.
    pub created: Timestamp,
}

/// A row of a page of revisions.
#[derive(Clone, Debug)]
pub struct RowUnder {
    /// The position of the row. The next page begins after the position of the last row.
    pub place: RevisionPlace,
    /// The row, or the reason why the row cannot be decoded.
    pub row: Result<RevisionUnder, Error>,
}

/// The swap of one envelope.
#[derive(Clone, Debug)]
pub struct RevisionMove {
    /// The record.
    pub record: RecordId,
    /// The revision.
    pub revision: Revision,
    /// The wrapping key that the row must still contain.
    pub from: WrappingKeyId,
    /// The envelope that the row must still contain.
    pub old: Vec<u8>,
    /// The wrapping key of the new envelope.
    pub to: WrappingKeyId,
    /// The new envelope.
    pub new: Vec<u8>,
}

/// The swap of the MAC of one API client.
#[derive(Clone, Debug)]
pub struct ClientMove {
    /// The API client.
    pub id: ClientId,
    /// The revision that the row must still have.
    pub revision: u64,
    /// The wrapping key whose integrity key made the MAC that the row must still contain.
    pub from: WrappingKeyId,
    /// That MAC.
    pub old: Mac,
    /// The wrapping key whose integrity key made the new MAC.
    pub to: WrappingKeyId,
    /// The new MAC.
    pub new: Mac,
}

/// The id of a run, new for each run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunId([u8; ID_BYTES]);

impl RunId {
    /// From exactly 16 bytes.
    pub const fn from_bytes(bytes: [u8; ID_BYTES]) -> Self {
        Self(bytes)
    }

    /// The 16 bytes.
    pub const fn as_bytes(&self) -> &[u8; ID_BYTES] {
        &self.0
    }
}

/// Whether rows are moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunState {
    /// A broker moves rows, or the run waits for a broker to take the lease.
    Running,
    /// An administrator paused the run.
    Paused,
    /// The run has ended.
    Done,
}

impl RunState {
    /// As stored and shown.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Done => "done",
        }
    }

    /// From the stored text.
    pub fn parse(text: &str) -> Option<Self> {
        [Self::Running, Self::Paused, Self::Done]
            .into_iter()
            .find(|state| state.as_str() == text)
    }
}

/// The run that was requested last. The row has no MAC, so a person who can write to the database
/// can begin, pause and end a run. The row does not contain the target of the run, which is always
/// the wrapping key that wraps new user keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunRow {
    /// The id of the run.
    pub id: RunId,
    /// Whether rows are moved.
    pub state: RunState,
    /// Highest number of rows per second; 0 for no limit.
    pub rate: u32,
    /// The wrapping key whose rows are moved; `None` for all wrapping keys that do not wrap new
    /// user keys.
    pub source: Option<WrappingKeyId>,
    /// The run's progress as the broker encodes it, at most [`DOCUMENT_BYTES_MAX`] bytes.
    pub document: Vec<u8>,
    /// The instance that moves rows; empty before the first instance begins.
    pub holder: String,
    /// The time until which only the holder works on the run.
    pub lease: Timestamp,
    /// The time at which the run was requested.
    pub started: Timestamp,
}

/// The operations of a store for a re-wrap.
#[async_trait]
pub trait Rewraps: Send + Sync {
    /// The number of rows that need a wrapping key.
    async fn key_uses(&self, key: WrappingKeyId) -> Result<KeyUses, Error>;

    /// The number of rows that name a wrapping key that is not registered.
    async fn unregistered_uses(&self) -> Result<KeyUses, Error>;

    /// Returns at most `limit` revisions under a wrapping key, beginning after a position, in the
    /// order of the primary key. `limit` is 1 to [`PAGE_SIZE_MAX`](crate::PAGE_SIZE_MAX).
    async fn revisions_under(
        &self,
        key: WrappingKeyId,
        after: &RevisionPlace,
        limit: u32,
    ) -> Result<Vec<RowUnder>, Error>;

    /// Swaps envelopes and stores the mark of the call, in one transaction. For each swap, returns
    /// whether the row still contained the old envelope. Returns [`Error::State`] without any swap if the state of a
    /// registered key forbids the move. `source` is the use of the old wrapping keys: [`KeyUse::RewrapFrom`], or
    /// [`KeyUse::RewrapListed`] if every row is listed.
    async fn move_revisions(
        &self,
        moves: Vec<RevisionMove>,
        source: KeyUse,
        call: CallId,
    ) -> Result<Vec<bool>, Error>;

    /// Swaps the MACs of API clients and stores the mark of the call, in one transaction. For each
    /// swap, returns whether the row still contained the old MAC. Returns [`Error::State`] without any swap if the state of
    /// a registered key forbids the move.
    async fn move_clients(&self, moves: Vec<ClientMove>, call: CallId) -> Result<Vec<bool>, Error>;

    /// The run that was requested last.
    async fn rewrap_run(&self) -> Result<Option<RunRow>, Error>;

    /// Stores a new run, and the mark of the call. Returns [`Error::Conflict`] if another run has not ended.
    async fn start_rewrap(&self, run: &RunRow, call: CallId) -> Result<(), Error>;

    /// Changes the state of a run and stores the mark of the call. If `rate` is present, the rate
    /// is changed, too. Returns [`Error::Conflict`] if the run is no longer in the state `from`.
    async fn change_rewrap(
        &self,
        run: RunId,
        from: RunState,
        to: RunState,
        rate: Option<u32>,
        call: CallId,
    ) -> Result<(), Error>;

    /// Makes an instance the holder of a run in the state `Running` until `until`, or extends the
    /// instance's lease. Returns `false` if another instance holds the run at `now`, or if the run
    /// is not running. A lease of another instance that ends long after `until` counts as ended,
    /// because only a wrong clock can cause such a lease.
    async fn hold_rewrap(
        &self,
        run: RunId,
        holder: &str,
        now: Timestamp,
        until: Timestamp,
    ) -> Result<bool, Error>;

    /// Stores the progress of a run, and ends the run if `is_done`. Returns `false` if the instance is no longer the holder.
    async fn note_rewrap(
        &self,
        run: RunId,
        holder: &str,
        document: &[u8],
        is_done: bool,
    ) -> Result<bool, Error>;
}
