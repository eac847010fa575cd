//! Determines from the registry which wrapping keys a token must have.
//!
//! A registry row contains the serial number of the token on which the key was registered. For each
//! further token that has the key, the registry contains a row with the configured name of the
//! token. If only one token is configured, only the registry row is relevant.

use keybroker_core::{
    call::Timestamp,
    key::{ObjectId, ObjectIds, WrappingKeyId, WrappingKeyState},
};
use keybroker_hsm::{ExpectedKey, Proof, Settings};
use keybroker_store as store;
use keybroker_store::{DestructionRow, PlaceRow, RegistryRow, Store};
use keybroker_worker_protocol::unpadded;

/// The rows of the registry: the wrapping keys, and their places on further tokens.
#[derive(Clone, Debug, Default)]
pub(crate) struct Registry {
    /// The wrapping keys.
    pub(crate) rows: Vec<RegistryRow>,
    /// The places of the wrapping keys on further tokens.
    pub(crate) places: Vec<PlaceRow>,
    /// Their scheduled destructions.
    pub(crate) destructions: Vec<DestructionRow>,
}

/// A registered key, with its expected properties on one token.
#[derive(Clone, Copy, Debug)]
pub(crate) struct KeyHere<'a> {
    /// The registry row of the key.
    pub(crate) row: &'a RegistryRow,
    /// The place of the key on this token; `None` if the registry row describes this token.
    pub(crate) place: Option<&'a PlaceRow>,
}

impl KeyHere<'_> {
    /// The ids of the key's objects on this token.
    pub(crate) fn objects(&self) -> &ObjectIds {
        self.place.map_or(&self.row.objects, |place| &place.objects)
    }

    /// `CKA_ID` of the RSA private key on this token.
    pub(crate) fn private_object(&self) -> ObjectId {
        self.objects().private_object(self.row.id)
    }

    /// The serial number of this token in the registry.
    pub(crate) fn serial(&self) -> &str {
        let padded = self
            .place
            .map_or(&self.row.token_serial, |place| &place.token_serial);
        unpadded(padded)
    }

    /// Whether a backup of this token with the key was confirmed.
    pub(crate) fn is_backup_confirmed(&self) -> bool {
        match self.place {
            Some(place) => place.backup_confirmed.is_some(),
            None => self.row.backup_confirmed.is_some(),
        }
    }
}

impl Registry {
    /// Reads the registry.
    pub(crate) async fn read(store: &dyn Store) -> Result<Self, store::Error> {
        Ok(Self {
            rows: store.registry().await?,
            places: store.places().await?,
            // A damaged schedule must not hide the keys. A broker raises an alert about it.
            destructions: store.destructions().await?.rows,
        })
    }

    /// Reads the registry for a broker that starts. A damaged place does not prevent the start: the broker raises an alert and
    /// uses the other places.
    pub(crate) async fn read_for_service(store: &dyn Store) -> Result<Self, store::Error> {
        let rows = store.registry().await?;
        let (places, damaged) = store.readable_places().await?;
        for detail in damaged {
            tracing::warn!(%detail, "a row that names a further token of a wrapping key cannot be read");
        }
        // A broker that starts needs no schedules to find its keys.
        Ok(Self {
            rows,
            places,
            ..Self::default()
        })
    }

    /// The place of a key on a token; `None` if the registry has no row for this place.
    pub(crate) fn place(&self, key: WrappingKeyId, token: &str) -> Option<&PlaceRow> {
        self.places
            .iter()
            .find(|place| place.key == key && place.token == token)
    }

    /// When a key is destroyed; absent if no destruction is scheduled, or if the key was changed afterwards.
    pub(crate) fn destroyed_at(&self, row: &RegistryRow) -> Option<Timestamp> {
        let mut rows = self.destructions.iter();
        let of_key = |one: &&DestructionRow| one.key == row.id && one.sequence == row.sequence;
        rows.find(of_key).map(|one| one.due)
    }

    /// The registered keys that are not destroyed and may be on a token. Includes keys without a
    /// row for this token, unless the token is a declared copy.
    pub(crate) fn may_be_on<'a>(&'a self, token: &Settings) -> Vec<KeyHere<'a>> {
        let rows = self
            .rows
            .iter()
            .filter(|row| row.state != WrappingKeyState::Destroyed);
        rows.filter_map(|row| {
            let place = self.place(row.id, &token.name);
            let is_possible = place.is_some() || token.copy_of.is_none();
            is_possible.then_some(KeyHere { row, place })
        })
        .collect()
    }

    /// The registered keys that must be on the token with this serial number.
    pub(crate) fn on<'a>(&'a self, token: &Settings, serial: &str) -> Vec<KeyHere<'a>> {
        let mut keys = self.may_be_on(token);
        keys.retain(|key| key.place.is_some() || key.serial() == serial);
        keys
    }

    /// The registered keys that a command must find on a token with this serial number. The only
    /// token of a configuration must have every key.
    pub(crate) fn needed_on<'a>(
        &'a self,
        token: &Settings,
        serial: &str,
        is_one_of_several: bool,
    ) -> Vec<KeyHere<'a>> {
        if is_one_of_several {
            self.on(token, serial)
        } else {
            self.may_be_on(token)
        }
    }

    /// The keys that the workers of a token search for. `all` are all configured tokens. A key that was made on a declared copy of
    /// this token is not searched for on this token: its registry row has the serial number of both, and each search costs a login.
    pub(crate) fn expected_among(&self, token: &Settings, all: &[Settings]) -> Vec<ExpectedKey> {
        let mut keys = self.expected(token, all.len() > 1);
        keys.retain(|key| !self.was_made_on_copy(key.id, token, all));
        keys
    }

    /// Whether a key was made on a declared copy of a token, and is not registered for the token itself. The row of the copy is then as
    /// old as the registry row.
    fn was_made_on_copy(&self, id: WrappingKeyId, original: &Settings, all: &[Settings]) -> bool {
        let is_copy = |name: &str| {
            let token = all.iter().find(|token| token.name == name);
            token.is_some_and(|token| token.copy_of.as_ref() == Some(&original.name))
        };
        let row = self.rows.iter().find(|row| row.id == id);
        self.place(id, &original.name).is_none()
            && row.is_some_and(|row| {
                self.places.iter().any(|place| {
                    place.key == id && place.registered == row.registered && is_copy(&place.token)
                })
            })
    }

    /// The keys that the workers of a token search for. With several tokens, and if a row names the only token, the token must first
    /// verify the MACs of the registry, because a token with a wrong integrity key would reject
    /// every row.
    pub(crate) fn expected(&self, token: &Settings, is_one_of_several: bool) -> Vec<ExpectedKey> {
        let keys = self.may_be_on(token).into_iter();
        keys.map(|key| ExpectedKey {
            id: key.row.id,
            objects: key.objects().clone(),
            token_serial: key.serial().to_owned(),
            fingerprint: key.row.fingerprint,
            purpose: key.row.purpose,
            may_be_elsewhere: is_one_of_several && key.place.is_none(),
            proofs: if is_one_of_several || key.place.is_some() {
                proofs(&key)
            } else {
                Vec::new()
            },
        })
        .collect()
    }

    /// The names of the tokens that have a key, according to the registry. The result contains the
    /// serial number of a token if its name is unknown.
    pub(crate) fn tokens_of(&self, row: &RegistryRow, configured: &[Settings]) -> Vec<String> {
        let named = self.places.iter().filter(|place| place.key == row.id);
        let mut tokens: Vec<String> = named.map(|place| place.token.clone()).collect();
        // A declared copy has the serial number of its original.
        let is_copy = |name: &str| {
            let token = configured.iter().find(|token| token.name == name);
            token.is_some_and(|token| token.copy_of.is_some())
        };
        let is_named = self.places.iter().any(|place| {
            place.key == row.id
                && unpadded(&place.token_serial) == unpadded(&row.token_serial)
                && !is_copy(&place.token)
        });
        if !is_named {
            tokens.insert(0, home_of(row, configured));
        }
        tokens
    }
}

/// The name of the token that a registry row describes: the only configured token, or the token
/// with the row's serial number.
fn home_of(row: &RegistryRow, configured: &[Settings]) -> String {
    let serial = unpadded(&row.token_serial);
    let by_serial = configured
        .iter()
        .find(|token| token.serial.as_deref() == Some(serial));
    match (configured, by_serial) {
        ([only], _) => only.name.clone(),
        (_, Some(token)) => token.name.clone(),
        _ => format!("serial {serial}"),
    }
}

fn proofs(key: &KeyHere<'_>) -> Vec<Proof> {
    let row = Proof {
        message: key.row.mac_message().as_bytes().to_vec(),
        mac: key.row.mac,
    };
    let place = key.place.map(|place| Proof {
        message: place.mac_message().as_bytes().to_vec(),
        mac: place.mac,
    });
    [Some(row), place].into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use keybroker_core::key::{Fingerprint, Purpose};

    use super::*;

    const ID: WrappingKeyId = WrappingKeyId::from_bytes([1; 16]);

    fn token(name: &str, more: &str) -> Settings {
        toml::from_str(&format!("name = \"{name}\"\nmodule = \"/a.so\"\n{more}")).unwrap()
    }

    fn registry(places: &[&str]) -> Registry {
        let row = RegistryRow {
            id: ID,
            objects: ObjectIds::default(),
            fingerprint: Fingerprint([2; 32]),
            purpose: Purpose::Plain,
            state: WrappingKeyState::Active,
            token_serial: "0a1b            ".to_owned(),
            sequence: 1,
            registered: Timestamp::from_micros(1),
            backup_confirmed: None,
            mac: [3; 32],
        };
        let place = |token: &&str| PlaceRow {
            key: ID,
            token: (*token).to_owned(),
            token_serial: format!("serial-{token}"),
            objects: ObjectIds::from_slices(&[9], &[]).unwrap(),
            registered: Timestamp::from_micros(2),
            backup_confirmed: Some(Timestamp::from_micros(3)),
            mac: [4; 32],
        };
        Registry {
            rows: vec![row],
            places: places.iter().map(place).collect(),
            destructions: Vec::new(),
        }
    }

    #[test]
    fn one_token_is_described_by_the_registry_row() {
        let expected = registry(&[]).expected(&token("default", ""), false);
        assert_eq!(expected.len(), 1);
        let key = &expected[0];
        assert_eq!(
            (key.token_serial.as_str(), key.may_be_elsewhere),
            ("0a1b", false)
        );
        assert!(key.proofs.is_empty());
        // Other tokens were removed from the configuration, and a row names the token that is left.
        let expected = registry(&["b"]).expected(&token("b", ""), false);
        let key = &expected[0];
        assert_eq!(
            (key.token_serial.as_str(), key.may_be_elsewhere),
            ("serial-b", false)
        );
        assert_eq!(key.proofs.len(), 2);
    }

    #[test]
    fn a_place_describes_its_token_and_the_registry_row_describes_the_token_with_its_serial() {
        let registry = registry(&["b"]);
        let home = &registry.expected(&token("a", ""), true)[0];
        assert_eq!(
            (home.token_serial.as_str(), home.may_be_elsewhere),
            ("0a1b", true)
        );
        assert_eq!(home.proofs.len(), 1);
        let further = &registry.expected(&token("b", ""), true)[0];
        assert_eq!(
            (further.token_serial.as_str(), further.may_be_elsewhere),
            ("serial-b", false)
        );
        assert_eq!(further.proofs.len(), 2);
        assert_eq!(further.objects.private_object(ID).to_string(), "09");
        // A declared copy has the serial number of its original, so only a separate row shows that
        // the copy has a key.
        assert!(
            registry
                .expected(&token("c", "copy_of = \"a\""), true)
                .is_empty()
        );
        assert_eq!(
            registry
                .expected(&token("b", "copy_of = \"a\""), true)
                .len(),
            1
        );
        assert_eq!(registry.on(&token("a", ""), "other").len(), 0);
        assert!(!registry.on(&token("a", ""), "0a1b")[0].is_backup_confirmed());
        assert!(registry.on(&token("b", ""), "other")[0].is_backup_confirmed());
    }

    #[test]
    fn a_key_that_was_made_on_a_copy_is_not_searched_for_on_the_original() {
        let tokens = [
            token("a", ""),
            token("b", "copy_of = \"a\""),
            token("c", ""),
        ];
        let searched = |registry: &Registry| {
            let keys = |token| registry.expected_among(token, &tokens).len();
            tokens.each_ref().map(keys)
        };
        // The key was made on the original, and registered for the copy later.
        let mut of_original = registry(&["b"]);
        assert_eq!(searched(&of_original), [1, 1, 1]);
        of_original.places[0].registered = of_original.rows[0].registered;
        let of_copy = of_original;
        assert_eq!(searched(&of_copy), [0, 1, 1]);
        // The key was copied to the original and registered for it.
        let mut of_both = registry(&["a", "b"]);
        of_both.places[1].registered = of_both.rows[0].registered;
        assert_eq!(searched(&of_both), [1, 1, 1]);
        // The token with the key is not a copy of the other one.
        let others = [token("a", ""), token("b", "")];
        assert_eq!(of_copy.expected_among(&others[0], &others).len(), 1);
    }

    #[test]
    fn the_tokens_of_a_key_are_shown_by_name() {
        let registry = registry(&["b"]);
        let row = &registry.rows[0];
        let one = [token("only", "")];
        assert_eq!(registry.tokens_of(row, &one), ["only", "b"]);
        let two = [token("a", "serial = \"0a1b\""), token("b", "")];
        assert_eq!(registry.tokens_of(row, &two), ["a", "b"]);
        let unknown = [token("a", ""), token("b", "")];
        assert_eq!(registry.tokens_of(row, &unknown), ["serial 0a1b", "b"]);
    }
}
