//! Removes the objects of a destroyed key from every token.

use keybroker_core::{
    call::{CallId, Timestamp},
    error::Error,
    key::{ObjectIds, WrappingKeyId, WrappingKeyState},
};
use keybroker_hsm as hsm;
use keybroker_hsm::{
    Proof,
    admin::{Admin, AdminError, KeyAdmin},
};
use keybroker_store::{DestructionRow, KeyUses, PlaceRow, RegistryRow};

use crate::{Broker, journal::Draft, registry::Registry};

use super::{
    super::making::{blocking, end_worker},
    refused,
};

/// The removal of a key from one token.
#[derive(Clone, Debug)]
struct Removal {
    /// The registry row of the key, which is authentic.
    key: RegistryRow,
    /// The row that names the objects on this token, if there is one. The token checks that the key authenticated the row.
    place: Option<PlaceRow>,
    /// The serial numbers and objects of the keys that must stay.
    kept: Vec<(String, KeptObjects)>,
}

/// The objects of a key that must stay.
type KeptObjects = [Option<keybroker_core::key::ObjectId>; 2];

/// What the removal from one token found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Removed {
    /// The serial number of the token.
    serial: String,
    /// The number of removed objects. `None` if the key is registered for another token, and is not on this one.
    count: Option<u32>,
}

/// An open token, from which the objects have not been removed yet.
struct Opened {
    removal: Removal,
    token: Admin,
    serial: String,
    /// Whether the token may have objects of the key.
    may_have: bool,
}

impl Broker {
    /// Removes the objects from every configured token, in a separate read-write worker for each token. The registry row of the key
    /// says that the objects must be removed until the last token is done, so the removal goes on after an interruption.
    pub(super) async fn remove_objects(
        &self,
        registry: &Registry,
        row: &DestructionRow,
    ) -> Result<(), Error> {
        if !registry.is_unremoved(row.key) {
            self.check_marked(registry, row).await?;
        }
        if !self.hold_lease(row).await? {
            return Ok(());
        }
        let key = registry.verified(row.key)?;
        self.check_not_needed(key.id).await?;
        let places = self.store.places().await?;
        self.check_configured(key, &places)?;
        let removed = self.remove_from_all(registry, key, &places).await?;
        let found: Vec<&str> = removed.iter().map(|one| one.serial.as_str()).collect();
        check_found(key, &places, &found)?;
        let counts = removed.iter().filter_map(|one| one.count);
        self.end_removal(registry, key, counts.map(u64::from).sum())
            .await
    }

    /// Removes the objects from every configured token, before an administrator ends the removal although a token of the key does
    /// not exist any more.
    pub(super) async fn remove_remaining_objects(
        &self,
        registry: &Registry,
        key: &RegistryRow,
    ) -> Result<(), Error> {
        self.check_not_needed(key.id).await?;
        let places = self.store.places().await?;
        self.remove_from_all(registry, key, &places).await.map(drop)
    }

    async fn remove_from_all(
        &self,
        registry: &Registry,
        key: &RegistryRow,
        places: &[PlaceRow],
    ) -> Result<Vec<Removed>, Error> {
        let mut removed = Vec::new();
        for admin in self.configured.all().iter() {
            let name = admin.name();
            let removal = Removal::of(key, name, registry, places);
            removed.push(self.remove_from(name, admin.clone(), removal).await?);
        }
        Ok(removed)
    }

    /// Removes the objects from one token. The audit log has the intent before the first object is removed.
    async fn remove_from(
        &self,
        name: &str,
        admin: KeyAdmin,
        removal: Removal,
    ) -> Result<Removed, Error> {
        let key = removal.key.id;
        if let Some(removed) = self.scheduled.emptied_before(key, name) {
            return Ok(removed);
        }
        let opened = blocking("opening a token", move || removal.open(&admin)).await?;
        if !opened.may_have {
            return Ok(opened.close().await);
        }
        let mut draft = Draft::of_removal(CallId::fresh(), key, name);
        let intent = match self.record_intent(&draft, Timestamp::now()).await {
            Ok(intent) => intent,
            Err(error) => {
                opened.close().await;
                return Err(error);
            }
        };
        let removed = blocking("removing a wrapping key", move || opened.remove()).await;
        if let Ok(removed) = &removed {
            draft.objects(removed.count.unwrap_or(0).into());
        }
        let removed = self.close_intent(intent, &draft, removed).await?;
        tracing::info!(
            wrapping_key = %key, token = name, count = removed.count,
            "the objects of a destroyed key were removed"
        );
        self.scheduled.note_emptied(key, name, removed.clone());
        Ok(removed)
    }

    /// Records in the registry row of the key that its objects were removed, and removes the schedule.
    async fn end_removal(
        &self,
        registry: &Registry,
        key: &RegistryRow,
        count: u64,
    ) -> Result<(), Error> {
        let change = self.plan_removed(registry, key).await?;
        let call = CallId::fresh();
        let mut draft = Draft::of_broker(call, "wrapping_key.objects_removed", key.id);
        draft.objects(count);
        self.commit_by_broker(&draft, change).await?;
        self.scheduled.forget(key.id);
        self.apply_key_change().await;
        Ok(())
    }

    /// Checks that no row needs the key. A broker that learnt too late of the mark may have made a row with the key.
    async fn check_not_needed(&self, id: WrappingKeyId) -> Result<(), Error> {
        let KeyUses {
            revisions,
            clients,
            requests,
            approvals,
            devices,
            access_requests,
        } = self.store.key_uses(id).await?;
        if revisions + clients + requests + approvals + devices + access_requests == 0 {
            return Ok(());
        }
        Err(refused(&format!(
            "key {id} is marked as destroyed, but {revisions} revisions, {clients} API clients, {devices} devices, \
             {requests} answers to request ids, {approvals} requests for approval and {access_requests} requests for access need it, so its objects stay on the token: enrol these user keys again, create these API clients again, establish the trust of these devices again, and remove the \
             earlier rows with `keybroker store purge`; answers to request ids and requests for \
             approval and access expire"
        )))
    }

    /// Checks that each token that has the key according to the registry is in the configuration of this broker.
    pub(super) fn check_configured(
        &self,
        key: &RegistryRow,
        places: &[PlaceRow],
    ) -> Result<(), Error> {
        let tokens = self.configured.all();
        let mut of_key = places.iter().filter(|place| place.key == key.id);
        let unknown = of_key.find(|place| !tokens.iter().any(|one| one.name() == place.token));
        match unknown {
            None => Ok(()),
            Some(place) => Err(not_configured(key, &format!("token {}", place.token))),
        }
    }
}

fn not_configured(key: &RegistryRow, token: &str) -> Error {
    refused(&format!(
        "key {} is on {token}, which is not in the configuration of this broker. If this token does not exist any more, run \
         `keybroker key lost {}`",
        key.id, key.id
    ))
}

/// Checks that the tokens with these serial numbers are all tokens that have the key according to the registry.
fn check_found(key: &RegistryRow, places: &[PlaceRow], found: &[&str]) -> Result<(), Error> {
    let of_key = places.iter().filter(|place| place.key == key.id);
    let mut needed = of_key
        .map(|place| place.token_serial.as_str())
        .chain([key.token_serial.as_str()])
        .map(hsm::unpadded);
    match needed.find(|serial| !found.contains(serial)) {
        None => Ok(()),
        Some(serial) => {
            let token = format!("the token with serial number {serial}");
            Err(not_configured(key, &token))
        }
    }
}

impl Removal {
    fn of(key: &RegistryRow, token: &str, registry: &Registry, places: &[PlaceRow]) -> Self {
        let is_here = |place: &&PlaceRow| place.key == key.id && place.token == token;
        Self {
            key: key.clone(),
            place: places.iter().find(is_here).cloned(),
            kept: kept(key, registry, places),
        }
    }

    fn objects(&self) -> &ObjectIds {
        let place = self.place.as_ref();
        place.map_or(&self.key.objects, |place| &place.objects)
    }

    fn serial(&self) -> &str {
        let place = self.place.as_ref();
        hsm::unpadded(place.map_or(&self.key.token_serial, |place| &place.token_serial))
    }

    /// Opens a token. Without a row for this token, a token with another serial number than the registry row may also have the key: a
    /// person may have copied it.
    fn open(self, admin: &KeyAdmin) -> Result<Opened, AdminError> {
        let token = admin.open(&[self.serial()])?;
        let serial = hsm::unpadded(&token.info().serial).to_owned();
        let is_registered = serial == self.serial();
        if !is_registered && self.place.is_some() {
            return Err(AdminError::Token(format!(
                "the objects of key {} are on the token with serial number {}, but the token has {serial}",
                self.key.id,
                self.serial()
            )));
        }
        let private = self.objects().private_object(self.key.id);
        let may_have = is_registered || token.key_ids()?.contains(&private);
        if may_have {
            self.check_kept(&serial)?;
        } else {
            // A person may have removed the row that names the objects on this token.
            token.check_removed(self.key.id, self.key.fingerprint)?;
        }
        Ok(Opened {
            removal: self,
            token,
            serial,
            may_have,
        })
    }

    /// Refuses to remove an object that another key needs. Two keys may share an integrity key.
    fn check_kept(&self, serial: &str) -> Result<(), AdminError> {
        let own = named(&self.key, self.objects());
        let mut kept = self.kept.iter().filter(|(token, _)| token == serial);
        let is_shared = kept.any(|(_, objects)| {
            let mut objects = objects.iter().flatten();
            objects.any(|object| own.iter().flatten().any(|one| one == object))
        });
        if !is_shared {
            return Ok(());
        }
        Err(AdminError::Untrusted(format!(
            "another wrapping key that is not destroyed uses the same objects as key {}; nothing was removed from the token with \
             serial number {serial}",
            self.key.id
        )))
    }
}

impl Opened {
    /// Removes the objects. From a token that has the key only because a person copied it, only the private key with the right
    /// fingerprint and its other objects are removed.
    fn remove(self) -> Result<Removed, AdminError> {
        let Self {
            removal,
            token,
            serial,
            ..
        } = self;
        let proof = removal.place.as_ref().map(|place| Proof {
            message: place.mac_message().as_bytes().to_vec(),
            mac: place.mac,
        });
        let key = &removal.key;
        token.know([(key.id, removal.objects())])?;
        let count = match token.remove_registered(key.id, key.fingerprint, proof.as_ref()) {
            Ok(count) => Some(count),
            // Another key has the same `CKA_ID`.
            Err(AdminError::Untrusted(_)) if serial != removal.serial() => {
                token.check_removed(key.id, key.fingerprint)?;
                None
            }
            Err(other) => return Err(other),
        };
        Ok(Removed { serial, count })
    }

    /// Ends the admin worker. Nothing was removed.
    async fn close(self) -> Removed {
        let Self { token, serial, .. } = self;
        end_worker(token.pid(), token).await;
        Removed {
            serial,
            count: None,
        }
    }
}

/// The `CKA_ID`s of the RSA private key and of the integrity key.
fn named(key: &RegistryRow, objects: &ObjectIds) -> KeptObjects {
    [
        Some(objects.private_object(key.id)),
        objects.integrity_object(key.id),
    ]
}

/// The objects of all other keys that are not destroyed, with the serial numbers of their tokens.
fn kept(key: &RegistryRow, registry: &Registry, places: &[PlaceRow]) -> Vec<(String, KeptObjects)> {
    let others = registry.rows().map(|(row, _)| row);
    let others = others.filter(|row| row.id != key.id && row.state != WrappingKeyState::Destroyed);
    let of_key = |row: &RegistryRow| {
        let own = (row.token_serial.clone(), named(row, &row.objects));
        let further = places.iter().filter(|place| place.key == row.id);
        let further = further.map(|place| (place.token_serial.clone(), named(row, &place.objects)));
        further.chain([own]).collect::<Vec<_>>()
    };
    let objects = others.flat_map(of_key);
    objects
        .map(|(serial, objects)| (hsm::unpadded(&serial).to_owned(), objects))
        .collect()
}

#[cfg(test)]
mod tests {
    use keybroker_core::{call::Timestamp, error::Reason, key::ObjectId};

    use super::{super::verdict::tests::registered, *};

    fn destroyed() -> RegistryRow {
        registered(WrappingKeyState::Destroyed, 9)
    }

    fn place(key: WrappingKeyId, token: &str, serial: &str) -> PlaceRow {
        PlaceRow {
            key,
            token: token.to_owned(),
            token_serial: serial.to_owned(),
            objects: ObjectIds::from_slices(&[7], &[8]).unwrap(),
            registered: Timestamp::from_micros(1),
            backup_confirmed: None,
            mac: [0; 32],
        }
    }

    #[test]
    fn a_destruction_ends_only_after_each_token_of_the_key() {
        let key = destroyed();
        let other = WrappingKeyId::from_bytes([9; 16]);
        let places = [
            place(key.id, "b", "serial-b "),
            place(other, "c", "serial-c"),
        ];
        let found = |serials: &[&str]| check_found(&key, &places, serials);
        assert!(found(&["serial", "serial-b"]).is_ok());
        for missing in [&["serial"][..], &["serial-b"], &[]] {
            let error = found(missing).unwrap_err();
            assert_eq!(error.reason(), Reason::KeyState);
            assert!(error.detail().contains("key lost"), "{error}");
        }
    }

    #[test]
    fn an_object_of_another_key_on_the_same_token_is_kept() {
        let key = destroyed();
        let object = |byte| ObjectId::from_slice(&[byte]);
        let removal = |serial: &str, objects| Removal {
            key: key.clone(),
            place: Some(place(key.id, "b", "serial-b")),
            kept: vec![(serial.to_owned(), objects)],
        };
        let same = [object(1), object(8)];
        assert!(
            removal("serial-b", same.clone())
                .check_kept("serial-b")
                .is_err()
        );
        assert!(
            removal("serial-b", [object(7), None])
                .check_kept("serial-b")
                .is_err()
        );
        assert!(removal("serial-c", same).check_kept("serial-b").is_ok());
        assert!(
            removal("serial-b", [object(1), None])
                .check_kept("serial-b")
                .is_ok()
        );
    }
}
