//! Removes the objects of a destroyed key from every token.

use keybroker_audit::{Entry, EntryKind, Outcome};
use keybroker_core::{
    error::Error,
    key::{ObjectIds, WrappingKeyState},
};
use keybroker_hsm as hsm;
use keybroker_hsm::{
    Proof,
    admin::{Admin, AdminError, KeyAdmin},
};
use keybroker_store::{DestructionRow, KeyUses, PlaceRow, RegistryRow};

use crate::{Broker, registry::Registry};

use super::{super::making::blocking, refused};

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
#[derive(Debug, PartialEq, Eq)]
struct Removed {
    /// The serial number of the token.
    serial: String,
    /// The number of removed objects. `None` if the key is registered for another token, and is not on this one.
    count: Option<u32>,
}

impl Broker {
    /// Removes the objects from every configured token, in a separate read-write worker for each token. The schedule stays until the
    /// last token is done, so the removal goes on after an interruption.
    pub(super) async fn remove_objects(
        &self,
        registry: &Registry,
        row: &DestructionRow,
    ) -> Result<(), Error> {
        self.check_marked(registry, row).await?;
        if !self.hold_lease(row).await? {
            return Ok(());
        }
        let key = registry.verified(row.key)?;
        self.check_not_needed(row).await?;
        let places = self.store.places().await?;
        self.check_configured(key, &places)?;
        let (mut removed, mut found) = (0, Vec::new());
        for admin in self.configured.all().iter() {
            let name = admin.name();
            let removal = Removal::of(key, name, registry, &places);
            let admin = admin.clone();
            let done = blocking("removing a wrapping key", move || removal.run(&admin));
            let done = done.await?;
            if let Some(count) = done.count {
                tracing::info!(wrapping_key = %row.key, token = name, count, "the objects of a destroyed key were removed");
                removed += u64::from(count);
            }
            found.push(done.serial);
        }
        check_found(key, &places, &found)?;
        let mut entry = Entry::new(
            EntryKind::Decision,
            "wrapping_key.objects_removed",
            Outcome::Ok,
        );
        entry.principal = Some(row.requested_by.clone());
        entry.wrapping_key = Some(row.key);
        entry.count = Some(removed);
        self.audit.append(entry).await?;
        self.store.end_destruction(row).await?;
        self.scheduled.forget(row.key);
        self.read_destructions().await
    }

    /// Checks that no row needs the key. A broker that learnt too late of the mark may have made a row with the key.
    async fn check_not_needed(&self, row: &DestructionRow) -> Result<(), Error> {
        let KeyUses {
            revisions,
            clients,
            requests,
            approvals,
        } = self.store.key_uses(row.key).await?;
        if revisions + clients + requests + approvals == 0 {
            return Ok(());
        }
        Err(refused(&format!(
            "key {} is marked as destroyed, but {revisions} revisions, {clients} API clients, {requests} answers to request ids and \
             {approvals} requests for approval need it, so its objects stay on the token: enrol these user keys again, create these API clients again, and remove the \
             earlier rows with `keybroker store purge`; answers to request ids and requests for approval \
             expire",
            row.key
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
fn check_found(key: &RegistryRow, places: &[PlaceRow], found: &[String]) -> Result<(), Error> {
    let of_key = places.iter().filter(|place| place.key == key.id);
    let mut needed = of_key
        .map(|place| place.token_serial.as_str())
        .chain([key.token_serial.as_str()])
        .map(hsm::unpadded);
    match needed.find(|serial| !found.iter().any(|one| one == serial)) {
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

    /// Removes the objects. Without a row for this token, a token with another serial number than the registry row may also have the
    /// key: a person may have copied it. There, only the private key with the right fingerprint and its other objects are removed.
    fn run(&self, admin: &KeyAdmin) -> Result<Removed, AdminError> {
        let token = admin.open(&[self.serial()])?;
        let serial = hsm::unpadded(&token.info().serial).to_owned();
        let count = if serial == self.serial() {
            self.check_kept(&serial)?;
            Some(self.remove(&token)?)
        } else if self.place.is_some() {
            return Err(AdminError::Token(format!(
                "the objects of key {} are on the token with serial number {}, but the token has {serial}",
                self.key.id,
                self.serial()
            )));
        } else {
            self.remove_copy(&token, &serial)?
        };
        Ok(Removed { serial, count })
    }

    fn remove(&self, token: &Admin) -> Result<u32, AdminError> {
        let proof = self.place.as_ref().map(|place| Proof {
            message: place.mac_message().as_bytes().to_vec(),
            mac: place.mac,
        });
        token.know([(self.key.id, self.objects())])?;
        token.remove_registered(self.key.id, self.key.fingerprint, proof.as_ref())
    }

    fn remove_copy(&self, token: &Admin, serial: &str) -> Result<Option<u32>, AdminError> {
        let private = self.objects().private_object(self.key.id);
        if !token.key_ids()?.contains(&private) {
            return Ok(None);
        }
        self.check_kept(serial)?;
        match self.remove(token) {
            Ok(count) => Ok(Some(count)),
            // Another key has the same `CKA_ID`.
            Err(AdminError::Untrusted(_)) => Ok(None),
            Err(other) => Err(other),
        }
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
    use keybroker_core::{
        call::Timestamp,
        error::Reason,
        key::{ObjectId, WrappingKeyId},
    };

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
        let found = |serials: &[&str]| {
            let serials: Vec<String> = serials.iter().map(|one| (*one).to_owned()).collect();
            check_found(&key, &places, &serials)
        };
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
