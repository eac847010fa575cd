//! Scheduled destruction of wrapping keys.
//!
//! An administrator schedules the destruction. The time is under a MAC by the wrapping key that is in use, and the schedule names the
//! number of the key's registry row. Each change of the registry row makes the schedule invalid, so a cancelled schedule cannot be
//! put back. When the time has come, one broker checks again that no row needs the key, marks the key as destroyed
//! in the same transaction, and then removes the objects of the key from every token.
//!
//! Mitigation: M11 of `THREAT_MODEL.md`.

use std::time::Duration;

use keybroker_core::{
    call::{Call, Deadline, Timestamp},
    error::{Error, Reason},
    key::{WrappingKeyId, WrappingKeyState},
    principal::Principal,
};
use keybroker_hsm::Caller;
use keybroker_store::{
    ApprovalChange, DestructionChange, DestructionRow, KeyUses, REQUESTED_BY_BYTES_MAX,
    RegistryChange, RegistryRow,
};

use crate::{
    Broker,
    approval::{self, Asked},
    journal::Draft,
    registry::Registry,
};

use super::{KeyChange, MAC_TIMEOUT, Planner, legal};

mod accepted;
mod marking;
mod removal;
mod row_check;
mod schedules;
mod verdict;

pub(crate) use accepted::forget as forget_accepted;
pub(crate) use schedules::Scheduled;

use schedules::{Origin, Schedules};

/// The waiting time of a destruction without a waiting time. A call that began before the request ends within this time.
const SHORTEST_WAIT: Duration = Duration::from_secs(15);
const DAY: Duration = Duration::from_hours(24);

/// How long a destruction waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// The configured waiting time: `wrapping_keys.destroy_after_days`.
    Configured,
    /// This number of days, which must not be less than the configured number.
    Days(u32),
    /// No waiting time. Policies decide about it separately.
    None,
}

impl Broker {
    /// Plans the schedule of a destruction.
    pub(super) async fn plan_destruction(
        &self,
        registry: &Registry,
        id: WrappingKeyId,
        wait: Wait,
        principal: &Principal,
    ) -> Result<RegistryChange, Error> {
        let row = registry.verified(id)?;
        legal(row.state, WrappingKeyState::Destroyed)?;
        let wait = self.waiting_time(wait)?;
        let signer = other_key(registry, id)?;
        let schedules = self.schedules(registry).await?;
        if let Some(known) = schedules.of(row) {
            let what = format!(
                "the destruction of key {id} is scheduled for {} already",
                known.row.due
            );
            return Err(refused(&what));
        }
        check_signatures(&schedules, registry, id)?;
        let uses = self.store.key_uses(id).await?;
        if let Some(what) = needed(row, uses) {
            return Err(refused(&what));
        }
        let requested = Timestamp::now();
        let schedule = DestructionRow {
            key: id,
            signer,
            sequence: 0,
            requested,
            due: after(requested, wait),
            requested_by: bounded(principal.name()),
            mac: [0; 32],
        };
        self.plan_schedule(registry, row, schedule).await
    }

    /// Plans a schedule that another instance accepted, so that this instance may carry it out. The time of the destruction stays, but
    /// it is not before the administrator can cancel the destruction.
    pub(super) async fn plan_confirmation(
        &self,
        registry: &Registry,
        id: WrappingKeyId,
        principal: &Principal,
    ) -> Result<RegistryChange, Error> {
        let row = registry.verified(id)?;
        let schedules = self.schedules(registry).await?;
        let Some(known) = schedules
            .of(row)
            .filter(|known| known.origin == Origin::Broker)
        else {
            return Err(refused(&format!(
                "no destruction of key {id} is scheduled that a broker made and that is still valid, so there is nothing to confirm"
            )));
        };
        check_signatures(&schedules, registry, id)?;
        let schedule = DestructionRow {
            signer: other_key(registry, id)?,
            due: known.row.due.max(after(Timestamp::now(), SHORTEST_WAIT)),
            requested_by: bounded(principal.name()),
            ..known.row.clone()
        };
        self.plan_schedule(registry, row, schedule).await
    }

    /// Plans the row of a schedule. The registry row of the key gets the number that the schedule names.
    async fn plan_schedule(
        &self,
        registry: &Registry,
        key: &RegistryRow,
        schedule: DestructionRow,
    ) -> Result<RegistryChange, Error> {
        let mut planner = Planner::new(registry);
        planner.change(key, key.clone());
        let mut schedule = DestructionRow {
            sequence: planner.sequence,
            ..schedule
        };
        let caller = Caller::background(Deadline::after(MAC_TIMEOUT));
        let message = schedule.mac_message();
        schedule.mac = self.token.mac(schedule.signer, &message, &caller).await?;
        let mut change = self.with_macs(planner, key.id).await?;
        change.destruction = Some(DestructionChange::Schedule(schedule));
        Ok(change)
    }

    /// Checks whether a second person has approved the destruction, if it needs an approval. Only a destruction that the broker
    /// would schedule is worth the time of a second person, so the plan is made before.
    pub(super) async fn approved_destruction(
        &self,
        principal: &Principal,
        call: &Call,
        id: WrappingKeyId,
        wait: Wait,
        draft: &mut Draft,
    ) -> Result<Option<ApprovalChange>, Error> {
        let after_days = match wait {
            Wait::None => 0,
            Wait::Configured => self.scheduled.days_min,
            Wait::Days(days) => days,
        };
        let sequence = self.registry()?.verified(id)?.sequence;
        let action = KeyChange::Destroy(wait).action();
        let asked = Asked::destruction(action, id, after_days, sequence);
        let fresh = approval::fresh_id()?;
        self.approved(principal, call, draft, &asked, fresh).await
    }

    /// Returns the use of the approval that permits to record the loss of a key, or `None` if no approval is needed. A loss counts as
    /// a destruction, and a person who can write to the database can make a key seem to be missing.
    pub(super) async fn approved_loss(
        &self,
        principal: &Principal,
        call: &Call,
        id: WrappingKeyId,
        draft: &mut Draft,
    ) -> Result<Option<ApprovalChange>, Error> {
        let registry = self.registry()?;
        let unknown = || Error::new(Reason::KeyNotFound, format!("wrapping key {id}"));
        let asked = Asked::loss(id, registry.row(id).ok_or_else(unknown)?.sequence);
        let fresh = approval::fresh_id()?;
        self.approved(principal, call, draft, &asked, fresh).await
    }

    /// Plans the end of a schedule. The registry row of the key gets another number, so that the schedule stays invalid even if a
    /// person puts it back into the database.
    pub(super) async fn plan_keeping(
        &self,
        registry: &Registry,
        id: WrappingKeyId,
    ) -> Result<RegistryChange, Error> {
        let row = registry.verified(id)?;
        if row.state == WrappingKeyState::Destroyed {
            return Err(refused(&format!("key {id} is destroyed already")));
        }
        if !self.store.destructions().await?.has(id) {
            return Err(refused(&format!("no destruction of key {id} is scheduled")));
        }
        let mut planner = Planner::new(registry);
        planner.change(row, row.clone());
        let mut change = self.with_macs(planner, id).await?;
        change.destruction = Some(DestructionChange::Remove(id));
        Ok(change)
    }

    /// Whether a key is marked as destroyed, and its objects are still to be removed.
    pub(super) async fn is_being_removed(
        &self,
        registry: &Registry,
        id: WrappingKeyId,
    ) -> Result<bool, Error> {
        let is_marked = registry
            .verified(id)
            .is_ok_and(|row| row.state == WrappingKeyState::Destroyed);
        Ok(is_marked && (registry.is_unremoved(id) || self.store.destructions().await?.has(id)))
    }

    /// Plans the end of a removal that cannot be completed, because a token of the destroyed key does not exist any more.
    pub(super) async fn plan_end_of_removal(
        &self,
        registry: &Registry,
        id: WrappingKeyId,
    ) -> Result<RegistryChange, Error> {
        let row = registry.verified(id)?;
        self.check_no_token_is_away(id)?;
        // The tokens that exist may still have the objects, because the removal waits for all tokens.
        if registry.is_unremoved(id) {
            self.remove_remaining_objects(registry, row).await?;
        }
        self.plan_removed(registry, row).await
    }

    /// Plans the registry row that says that the objects of a destroyed key need not be removed any more, and the end of the schedule.
    async fn plan_removed(
        &self,
        registry: &Registry,
        row: &RegistryRow,
    ) -> Result<RegistryChange, Error> {
        let mut planner = Planner::new(registry);
        planner.change(row, row.clone());
        let signer = other_key(registry, row.id)?;
        let mut change = self.with_macs(planner, signer).await?;
        change.destruction = Some(DestructionChange::Remove(row.id));
        Ok(change)
    }

    /// Refuses a change of the state of a key whose destruction is scheduled. A row that no broker made does not count.
    pub(super) async fn check_not_scheduled(
        &self,
        registry: &Registry,
        row: &RegistryRow,
    ) -> Result<(), Error> {
        let schedules = self.schedules(registry).await?;
        if let Some(unreadable) = schedules.unreadable_row(row.id) {
            return Err(refused(&format!(
                "{unreadable}. It may be a scheduled destruction of the key, so the state of the key cannot be changed: remove the row \
                 with `keybroker key destroy {} --cancel`",
                row.id
            )));
        }
        match schedules.of(row) {
            None => Ok(()),
            Some(known) => Err(refused(&format!(
                "the destruction of key {} is scheduled for {}: cancel it first with `keybroker key destroy {} --cancel`",
                row.id, known.row.due, row.id
            ))),
        }
    }

    /// The keys whose destruction is scheduled.
    pub(super) async fn keys_to_destroy(
        &self,
        registry: &Registry,
    ) -> Result<Vec<WrappingKeyId>, Error> {
        let schedules = self.schedules(registry).await?;
        let rows = registry.rows().map(|(row, _)| row);
        Ok(rows
            .filter(|row| schedules.of(row).is_some() || schedules.unreadable_row(row.id).is_some())
            .map(|row| row.id)
            .collect())
    }

    fn waiting_time(&self, wait: Wait) -> Result<Duration, Error> {
        let least = self.scheduled.days_min;
        let days = match wait {
            Wait::None => return Ok(SHORTEST_WAIT),
            Wait::Configured => least,
            Wait::Days(days) if days >= least => days,
            Wait::Days(_) => {
                let what = format!(
                    "at least {least}, the value of `wrapping_keys.destroy_after_days` in the configuration of the broker"
                );
                return Err(Error::violation("destroy_after_days", what));
            }
        };
        Ok(DAY * days)
    }
}

/// The wrapping key in use, which authenticates the destruction of another key.
fn other_key(registry: &Registry, id: WrappingKeyId) -> Result<WrappingKeyId, Error> {
    let in_use = registry.wrapping_key().ok();
    in_use.filter(|other| *other != id).ok_or_else(|| {
        refused(&format!(
            "no other wrapping key is in use, so key {id} cannot be destroyed: make a key with `keybroker key rotate` first"
        ))
    })
}

/// Refuses to destroy a key that authenticates the scheduled destruction of another key.
fn check_signatures(
    schedules: &Schedules,
    registry: &Registry,
    id: WrappingKeyId,
) -> Result<(), Error> {
    let is_signed = |row: &DestructionRow| {
        let key = registry.row(row.key);
        // A release before the rows of destroyed keys recorded the removal needs the row of the schedule for the removal.
        let needs_row = |key: &RegistryRow| {
            key.state == WrappingKeyState::Destroyed && !registry.is_unremoved(key.id)
        };
        let is_needed = |key: &RegistryRow| needs_row(key) || schedules.of(key).is_some();
        row.signer == id && row.key != id && key.is_some_and(is_needed)
    };
    let made = schedules
        .rows
        .iter()
        .filter(|schedule| schedule.origin != Origin::Forger)
        .map(|schedule| &schedule.row);
    match made.into_iter().find(|row| is_signed(row)) {
        None => Ok(()),
        Some(other) => Err(refused(&format!(
            "1 scheduled destruction needs key {id}: that of key {0}. Cancel it with `keybroker key destroy {0} --cancel` and \
             schedule it again, or wait until key {0} is destroyed",
            other.key
        ))),
    }
}

/// Says which rows need a key, and how they are moved. `None` if no row needs the key.
fn needed(row: &RegistryRow, uses: KeyUses) -> Option<String> {
    let KeyUses {
        revisions,
        clients,
        requests,
        approvals,
        devices,
        access_requests,
    } = uses;
    if uses.total() == 0 {
        return None;
    }
    let id = row.id;
    let mut text = format!(
        "{revisions} revisions of records (those of deleted records included), {clients} API clients, {devices} devices, \
         {requests} answers to request ids, {approvals} requests for approval and {access_requests} requests for access need key {id}"
    );
    if revisions + clients + devices > 0 {
        text.push_str(if row.state == WrappingKeyState::Compromised {
            "; rows under a compromised key are not moved: enrol these user keys again, create these API clients again, establish the \
             trust of these devices again, and remove the earlier rows with `keybroker store purge`"
        } else {
            "; move the revisions, API clients and devices with `keybroker rewrap start`"
        });
    }
    if requests > 0 {
        text.push_str("; the answers to request ids expire within 24 hours");
    }
    if approvals > 0 {
        text.push_str(
            "; the requests for approval are over when they are used, rejected or expired: see `keybroker approval list`",
        );
    }
    if access_requests > 0 {
        text.push_str("; the requests for access expire within seven days");
    }
    Some(text)
}

fn refused(what: &str) -> Error {
    Error::new(Reason::KeyState, what.to_owned()).explained("id", what)
}

/// A moment after a duration.
fn after(at: Timestamp, duration: Duration) -> Timestamp {
    let micros = i64::try_from(duration.as_micros()).unwrap_or(i64::MAX);
    Timestamp::from_micros(at.micros().saturating_add(micros))
}

fn bounded(name: &str) -> String {
    name[..name.floor_char_boundary(REQUESTED_BY_BYTES_MAX)].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_refusal_names_each_kind_of_row_and_the_command() {
        let row = verdict::tests::registered(WrappingKeyState::Deactivated, 1);
        let uses = |revisions, clients, requests| KeyUses {
            revisions,
            clients,
            requests,
            ..KeyUses::default()
        };
        assert_eq!(needed(&row, uses(0, 0, 0)), None);
        let text = needed(&row, uses(2, 3, 4)).unwrap();
        for part in [
            "2 revisions",
            "3 API clients",
            "4 answers",
            "`keybroker rewrap start`",
            "24 hours",
        ] {
            assert!(text.contains(part), "{text}");
        }
        let text = needed(&row, uses(0, 0, 1)).unwrap();
        assert!(!text.contains("rewrap"), "{text}");
        let waiting = KeyUses {
            approvals: 5,
            ..uses(0, 0, 0)
        };
        let text = needed(&row, waiting).unwrap();
        assert!(text.contains("5 requests for approval"), "{text}");
        assert!(text.contains("`keybroker approval list`"), "{text}");
        let compromised = verdict::tests::registered(WrappingKeyState::Compromised, 1);
        let text = needed(&compromised, uses(1, 0, 0)).unwrap();
        assert!(text.contains("enrol") && !text.contains("rewrap"), "{text}");
    }

    #[test]
    fn the_name_of_the_principal_is_shortened_between_two_characters() {
        assert_eq!(bounded("URI:ada"), "URI:ada");
        let long = bounded(&"ä".repeat(200));
        assert_eq!(long.len(), 254);
    }
}
