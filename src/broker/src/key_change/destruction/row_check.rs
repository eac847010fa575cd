//! Checks every row of the database before a wrapping key is marked as destroyed.
//!
//! The column that names the wrapping key of a row has no MAC, so a count of the column does not find a row whose column was changed.
//! The token verifies the MAC of each row under the key that the row names. If a MAC does not verify, the
//! token verifies it under the key that is to be destroyed. If the MAC then verifies, the row needs this key, although the row names
//! another key. The check uses the pace of a re-wrap, so that callers do not wait for it.

use std::time::{Duration, Instant};

use futures_util::{
    FutureExt as _,
    future::BoxFuture,
    stream::{self, StreamExt as _},
};

use keybroker_core::{
    envelope::{Context, Envelope, Mac, Unsealed, mac::MacMessage},
    error::{Error, Reason},
    key::{KeyUse, WrappingKeyId},
};
use keybroker_hsm as hsm;
use keybroker_store::{
    ClientRow, DestructionRow, DeviceAddress, Position, RevisionPlace, RowUnder,
};

use crate::{
    Broker,
    registry::Registry,
    rewrap::{Pace, background, context_of, envelope_of},
};

use super::refused;

/// Rows per page.
const PAGE_ROWS: u32 = 50;
/// Longest time between two renewals of the lease.
const RENEWED_AFTER: Duration = Duration::from_mins(1);
/// The largest number of rows that the alert names.
const NAMED_MAX: usize = 5;

/// A check of all rows.
struct RowCheck<'b> {
    broker: &'b Broker,
    registry: &'b Registry,
    schedule: &'b DestructionRow,
    pace: Pace,
    renewed: Instant,
    found: Found,
}

/// The rows that forbid the destruction.
#[derive(Debug, Default)]
struct Found {
    /// The rows that need the key, but name another key.
    hidden: u64,
    /// The rows that cannot be read or verified.
    damaged: u64,
    /// The first rows of both kinds.
    named: Vec<String>,
}

/// What a row needs.
enum Needs {
    /// Another key than the one that is destroyed.
    Other,
    /// The key that is destroyed.
    Key,
    /// No key authenticates the row.
    Unknown,
}

impl Broker {
    /// Checks every row that names another key than the key of the schedule. Returns an error that names the first rows that need the
    /// key of the schedule after all, or that cannot be read or verified.
    pub(super) async fn check_rows(
        &self,
        registry: &Registry,
        schedule: &DestructionRow,
    ) -> Result<(), Error> {
        let unregistered = self.store.unregistered_uses().await?;
        if unregistered.revisions + unregistered.clients + unregistered.devices > 0 {
            return Err(refused(&format!(
                "{} revisions, {} API clients and {} devices name a wrapping key that is not registered, so it is not known whether they need key \
                 {}: `keybroker store check` lists them; restore them from a backup, or remove them",
                unregistered.revisions, unregistered.clients, unregistered.devices, schedule.key
            )));
        }
        let mut check = RowCheck {
            broker: self,
            registry,
            schedule,
            pace: Pace::new(0, &*self.token),
            renewed: Instant::now(),
            found: Found::default(),
        };
        for (key, _) in registry.rows().filter(|(row, _)| row.id != schedule.key) {
            check.revisions(key.id).await?;
        }
        check.clients().await?;
        check.devices().await?;
        check.found.result(schedule.key)
    }
}

impl RowCheck<'_> {
    async fn revisions(&mut self, named: WrappingKeyId) -> Result<(), Error> {
        let mut place = RevisionPlace::START;
        loop {
            let store = &self.broker.store;
            let rows = store.revisions_under(named, &place, PAGE_ROWS).await?;
            let Some(last) = rows.last() else {
                return Ok(());
            };
            place = last.place.clone();
            let jobs: Vec<BoxFuture<'_, _>> = rows
                .iter()
                .map(|row| self.revision(named, row).boxed())
                .collect();
            let in_flight = Pace::in_flight(&*self.broker.token);
            let results: Vec<_> = stream::iter(jobs).buffered(in_flight).collect().await;
            for (row, needs) in rows.iter().zip(results) {
                self.found.note(&needs?, || name_of(row));
            }
            self.keep_lease().await?;
        }
    }

    async fn revision(&self, named: WrappingKeyId, row: &RowUnder) -> Result<Needs, Error> {
        let Ok(found) = &row.row else {
            return Ok(Needs::Unknown);
        };
        let Ok(envelope) = envelope_of(found, named) else {
            // The column names another key than the envelope, or the envelope is damaged.
            return Ok(match Envelope::parse(&found.envelope) {
                Ok(envelope) if envelope.wrapping_key() == self.schedule.key => Needs::Key,
                _ => Needs::Unknown,
            });
        };
        let context = context_of(found);
        let other = under(&envelope, self.schedule.key, &context)?;
        let message = envelope.mac_message(&context);
        self.needs(named, &message, &other, envelope.mac()).await
    }

    async fn clients(&mut self) -> Result<(), Error> {
        let mut position = Position::default();
        loop {
            let store = &self.broker.store;
            let rows = store.clients(&position, PAGE_ROWS).await?;
            if rows.is_empty() {
                return Ok(());
            }
            for row in rows {
                match row {
                    Ok(row) => {
                        position.advance(Some(row.id));
                        let needs = self.client(&row).await?;
                        self.found.note(&needs, || format!("API client {}", row.id));
                    }
                    Err(damaged) => {
                        position.advance(damaged.id);
                        let name = || format!("an API client ({})", damaged.detail);
                        self.found.note(&Needs::Unknown, name);
                    }
                }
            }
            self.keep_lease().await?;
        }
    }

    async fn client(&self, row: &ClientRow) -> Result<Needs, Error> {
        let message = row.mac_message();
        self.needs(row.key, &message, &message, &row.mac).await
    }

    async fn devices(&mut self) -> Result<(), Error> {
        let mut after: Option<DeviceAddress> = None;
        loop {
            let store = &self.broker.store;
            let rows = store.devices_after(after.as_ref(), PAGE_ROWS).await?;
            let Some((last, _)) = rows.last() else {
                return Ok(());
            };
            after = Some(last.clone());
            for (address, row) in rows {
                let needs = match &row {
                    Ok(row) => {
                        let message = row.mac_message();
                        self.needs(row.signer, &message, &message, &row.mac).await?
                    }
                    Err(_) => Needs::Unknown,
                };
                let name = || format!("device {} of {}", address.device, address.user);
                self.found.note(&needs, name);
            }
            self.keep_lease().await?;
        }
    }

    /// Finds out which key authenticates a row. `of_key` is the message if the row needs the key that is destroyed. Rows of keys that
    /// must not be used at present are only tried with the key that is destroyed.
    async fn needs(
        &self,
        named: WrappingKeyId,
        message: &MacMessage,
        of_key: &MacMessage,
        mac: &Mac,
    ) -> Result<Needs, Error> {
        let is_usable = self.registry.check(named, KeyUse::VerifyMac).is_ok();
        if is_usable && self.verifies(named, message, mac).await? {
            return Ok(Needs::Other);
        }
        if self.verifies(self.schedule.key, of_key, mac).await? {
            return Ok(Needs::Key);
        }
        Ok(if is_usable {
            Needs::Unknown
        } else {
            Needs::Other
        })
    }

    async fn verifies(
        &self,
        key: WrappingKeyId,
        message: &MacMessage,
        mac: &Mac,
    ) -> Result<bool, Error> {
        let (token, caller) = (&*self.broker.token, background());
        let job = token.verify_mac(key, message, mac, &caller);
        match self.pace.give_way(token, job).await {
            Ok(()) => Ok(true),
            Err(hsm::Error::MacRefused) => Ok(false),
            Err(other) => Err(other.into()),
        }
    }

    /// Renews the lease of the destruction, because the check of a large database takes longer than a lease.
    async fn keep_lease(&mut self) -> Result<(), Error> {
        if self.renewed.elapsed() < RENEWED_AFTER {
            return Ok(());
        }
        self.renewed = Instant::now();
        if self.broker.hold_lease(self.schedule).await? {
            return Ok(());
        }
        Err(refused(
            "the schedule was changed, or another broker took over, while the rows were checked",
        ))
    }
}

/// The message that the MAC of an envelope covers if its row needs another key than it names.
fn under(
    envelope: &Envelope,
    key: WrappingKeyId,
    context: &Context<'_>,
) -> Result<MacMessage, Error> {
    let wrapped = envelope.wrapped().to_vec();
    let unsealed = Unsealed::new(envelope.algorithm(), key, wrapped);
    let unsealed = unsealed.map_err(|error| Error::caused(Reason::Bug, error))?;
    Ok(unsealed.mac_message(context))
}

fn name_of(row: &RowUnder) -> String {
    let record = row.place.record().map(|id| id.to_string());
    let revision = row.place.revision().map(|revision| revision.to_string());
    let unreadable = || "with an unreadable id".to_owned();
    format!(
        "revision {} of record {}",
        revision.unwrap_or_else(unreadable),
        record.unwrap_or_else(unreadable)
    )
}

impl Found {
    fn note(&mut self, needs: &Needs, name: impl FnOnce() -> String) {
        match needs {
            Needs::Other => return,
            Needs::Key => self.hidden += 1,
            Needs::Unknown => self.damaged += 1,
        }
        if self.named.len() < NAMED_MAX {
            self.named.push(name());
        }
    }

    fn result(self, key: WrappingKeyId) -> Result<(), Error> {
        let Self {
            hidden,
            damaged,
            named,
        } = self;
        if hidden + damaged == 0 {
            return Ok(());
        }
        let what = format!(
            "{hidden} rows need key {key} although they name another wrapping key, and {damaged} rows cannot be read or verified, so it is \
             not known which key they need: {}; `keybroker store check` lists all of them. Restore them from a backup, or remove them. The \
             broker checks the rows again after 10 minutes, or when it starts",
            named.join(", ")
        );
        Err(Error::new(Reason::RecordDamaged, what))
    }
}
