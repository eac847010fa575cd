//! Administers tokens and keys in the admin worker. Only one thread uses the module.

use std::{cell::RefCell, collections::HashMap, ops::RangeInclusive};

use cryptoki::{
    mechanism::{MechanismInfo, MechanismType},
    session::UserType,
    slot::Slot,
};

use keybroker_core::{
    call::Timestamp,
    envelope::{Algorithm, Mac},
    key::{IntegrityPlace, ObjectId, ObjectIds, Purpose, Sealing, WrappingKeyId},
};
use keybroker_pkcs11_ffi::{Module, TokenInfo as PkcsTokenInfo};
use keybroker_worker_protocol::{AccessControl, IntegrityKey, Pin, Settings, TokenInfo, unpadded};

use crate::{
    PinRecord,
    attribute_check::{self, Exception, Finding},
    calling,
    classify::{Class, Fault},
    keys::{
        self, Cause, HmacKey, Identity, KeyPair, KeySession, Making, OrganizationKey, Place,
        Refusal, SigningKey, Terms,
    },
    mac_key::WorkerKey,
    module,
    negative::{self, Subject},
    open::{OpenToken, auth_pin},
    operation, organization,
    report::{self, Counted, waits_of_this_thread},
    select::{self, Registered, Selected},
};

mod verifier;

pub(crate) use verifier::Verifier;

/// The error for a sealed wrapping key whose integrity key would not be on the token.
const SEALED_NEEDS_TOKEN: &str = "a sealed wrapping key cannot decrypt the file of an integrity key, so its integrity key must be on the token: \
     with `integrity_key = \"worker\"` in [token], only plain wrapping keys can be made. No key was made";
/// Length of `CK_TOKEN_INFO.label`.
const LABEL_BYTES: usize = 32;

/// Returns the negative tests that are run only with session keys.
fn tests_that_change_a_key() -> Vec<&'static str> {
    let tests = negative::TESTS.iter().filter(|test| test.changes_the_key);
    tests.map(|test| test.name).collect()
}

/// Describes the settings with which the token would make the refused keys, and the risks of these settings.
fn helped_by_settings(
    refusal: &Refusal,
    integrity_key: IntegrityKey,
    attributes: &[Exception],
    settings: &Settings,
) -> AdminError {
    let making = refusal
        .making
        .map_or_else(|| "the keys".to_owned(), |making| making.to_string());
    let mut help = Vec::new();
    if integrity_key != settings.integrity_key {
        help.push(format!(
            "The token makes an integrity key of another kind: set `integrity_key = \"{}\"` in [token]",
            integrity_key.as_str()
        ));
    }
    if !attributes.is_empty() {
        let names: Vec<&str> = attributes
            .iter()
            .map(|exception| exception.attribute)
            .collect();
        let mut all: Vec<Exception> =
            attribute_check::exceptions_in_use(&settings.attribute_exceptions).collect();
        all.extend(attributes);
        help.push(format!(
            "The token refuses {0} in templates. If the token does not support {0}, {1}",
            listed_names(&names),
            attribute_check::accept(&all)
        ));
    }
    AdminError::Token(format!(
        "the token did not make {making}: {}. {}. No key was made",
        refusal.fault,
        help.join(". ")
    ))
}

fn listed_names(names: &[&str]) -> String {
    match names {
        [] => String::new(),
        [only] => (*only).to_owned(),
        [most @ .., last] => format!("{} and {last}", most.join(", ")),
    }
}

/// Suggests the other kinds of integrity keys, for a token that refused the configured kind.
fn other_kinds(making: Making) -> String {
    let Making::IntegrityKey(kind) = making else {
        return String::new();
    };
    let others: Vec<String> = HmacKey::all_with_first(kind.setting())
        .skip(1)
        .map(|other| format!("\"{}\"", other.setting().as_str()))
        .collect();
    format!(
        ". If the token's keys for HMAC-SHA-256 are of another kind, set `integrity_key` in [token] to {}. If the token \
         has no keys for HMAC-SHA-256 at all, set `integrity_key = \"worker\"`: the integrity key is then outside the token, so the rows are less protected (docs/tokens.md)",
        others.join(" or ")
    )
}

/// The class of an administrative failure, with its message.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum AdminError {
    /// The token refused the request, or does not match the request.
    #[error("{0}")]
    Token(String),
    /// The module cannot be loaded, or no token matches the settings. The module's environment may be incomplete.
    #[error("{0}")]
    NoToken(String),
    /// The user PIN or, when a token is initialised, the security officer's PIN is missing or was rejected.
    #[error("{0}")]
    Pin(String),
    /// The new user PIN is too short or too long for the token.
    #[error("{0}")]
    NewPin(String),
    /// A key, an attribute or a MAC differs from what is required.
    #[error("{0}")]
    Untrusted(String),
}

impl From<Fault> for AdminError {
    fn from(fault: Fault) -> Self {
        match fault.class {
            Class::Pin => Self::Pin(fault.detail),
            Class::NoToken => Self::NoToken(fault.detail),
            Class::Login => Self::Token(format!(
                "{}. This login used up one login attempt; run the command again when the token works",
                fault.detail
            )),
            Class::Untrusted | Class::KeyMissing | Class::Input => Self::Untrusted(fault.detail),
            _ => Self::Token(fault.detail),
        }
    }
}

/// A token as `token list` shows it.
#[derive(Clone, Debug)]
pub(crate) struct Listed {
    /// Slot number. Slot numbers may change when tokens are initialised.
    pub(crate) slot: u64,
    /// Label, serial number and model of the token.
    pub(crate) info: TokenInfo,
    /// Whether the token is initialised.
    pub(crate) initialised: bool,
    /// Whether the user PIN is locked, or will be locked after one more wrong PIN.
    pub(crate) pin_state: &'static str,
    /// The modulus lengths of `CKM_RSA_PKCS_OAEP`, in bits; `None` if the slot does not list the mechanism.
    pub(crate) oaep_bits: Option<RangeInclusive<u64>>,
    /// Whether the slot lists `CKM_SHA256_HMAC`.
    pub(crate) sha256_hmac: bool,
    /// Whether the settings choose this token.
    pub(crate) is_chosen: bool,
    /// The shortest and the longest PIN that the token accepts, in bytes.
    pub(crate) pin_bytes: [u64; 2],
}

impl Listed {
    /// Describes the open token. Only `info` contains real values, because the command needs nothing else.
    pub(crate) fn of(info: &TokenInfo) -> Self {
        Self {
            slot: 0,
            info: info.clone(),
            initialised: true,
            pin_state: "",
            oaep_bits: None,
            sha256_hmac: false,
            is_chosen: true,
            pin_bytes: [0, 0],
        }
    }
}

/// A key on the token, with the results of its attribute check and its self-test.
#[derive(Clone, Debug)]
pub(crate) struct CheckedKey {
    /// The id of the key.
    pub(crate) id: WrappingKeyId,
    /// The `CKA_ID` of the key's objects on the token.
    pub(crate) objects: ObjectIds,
    /// DER SubjectPublicKeyInfo.
    pub(crate) spki: Vec<u8>,
    /// Modulus length in bits.
    pub(crate) modulus_bits: usize,
    /// The algorithm that the capability probe chose; `None` if the key was rejected.
    pub(crate) algorithm: Option<Algorithm>,
    /// The results of the attribute check of the RSA private key.
    pub(crate) private: Vec<Finding>,
    /// The results of the attribute check of the integrity key.
    pub(crate) integrity_key: Vec<Finding>,
    /// Reason why the key must not be used; `None` if the key passed all checks.
    pub(crate) problem: Option<String>,
    /// The negative tests that cannot be run on this token.
    pub(crate) not_tried: Vec<&'static str>,
    /// The content of the integrity key's file, if the integrity key was made in the memory of this process.
    pub(crate) integrity_key_file: Option<String>,
    /// The purpose of the key, according to its attributes.
    pub(crate) purpose: Purpose,
    /// The protection of a sealed wrapping key; `None` for a plain wrapping key, and for a key that was rejected.
    pub(crate) sealing: Option<Sealing>,
}

/// Lists all slots with a token, initialised or not. Needs no PIN.
pub(crate) fn list_tokens(settings: &Settings) -> Result<Vec<Listed>, AdminError> {
    let module = module::load(settings)?;
    // Lists the tokens even if the settings are invalid, because the list helps to find the right settings.
    let selector = select::Selector::from_settings(settings).ok();
    let mut listed = Vec::new();
    calling::next("C_GetSlotList");
    for slot in module.slots_with_token().map_err(Fault::from)? {
        calling::next("C_GetTokenInfo");
        let info = module.get_token_info(slot).map_err(Fault::from)?;
        listed.push(Listed {
            slot: slot.id(),
            info: select::describe(&info),
            initialised: info.token_initialized(),
            pin_state: if info.user_pin_locked() {
                "locked"
            } else if info.user_pin_final_try() {
                "final try"
            } else if info.user_pin_count_low() {
                "wrong PIN tried"
            } else if info.user_pin_initialized() {
                "ok"
            } else {
                "not set"
            },
            oaep_bits: oaep_bits(&module, slot),
            sha256_hmac: mechanism(&module, slot, MechanismType::SHA256_HMAC).is_some(),
            is_chosen: info.token_initialized()
                && selector
                    .as_ref()
                    .is_some_and(|selector| selector.fits(&info)),
            pin_bytes: [info.min_pin_length(), info.max_pin_length()]
                .map(|bytes| u64::try_from(bytes).unwrap_or(u64::MAX)),
        });
    }
    Ok(listed)
}

/// Returns the information of a slot about a mechanism, or `None` if the slot does not list the mechanism.
fn mechanism(module: &Module, slot: Slot, kind: MechanismType) -> Option<MechanismInfo> {
    calling::next("C_GetMechanismInfo");
    module.get_mechanism_info(slot, kind).ok()
}

fn oaep_bits(module: &Module, slot: Slot) -> Option<RangeInclusive<u64>> {
    let info = mechanism(module, slot, MechanismType::RSA_PKCS_OAEP)?;
    let bits = |size: usize| u64::try_from(size).unwrap_or(u64::MAX);
    Some(bits(info.min_key_size())..=bits(info.max_key_size()))
}

/// Initialises a token with a label and sets its user PIN. If the token is already initialised, `erase_serial` must be
/// its serial number. Initialising a token again erases its content permanently.
pub(crate) fn init_token(
    settings: &Settings,
    label: &str,
    so_pin: &Pin,
    user_pin: &Pin,
    erase_serial: Option<&str>,
) -> Result<TokenInfo, AdminError> {
    check_label(label)?;
    let module = module::load(settings)?;
    let slot = match erase_serial {
        None => blank_slot(&module, label)?,
        Some(serial) => slot_to_erase(&module, serial, label)?,
    };
    // All checks are made before the token is initialised, so that a refused command erases nothing.
    let token_info = module.get_token_info(slot).map_err(Fault::from)?;
    if let Some(problem) = pin_problem("security officer's PIN", so_pin, &token_info) {
        return Err(AdminError::Pin(problem));
    }
    if let Some(problem) = pin_problem("user PIN", user_pin, &token_info) {
        return Err(AdminError::NewPin(problem));
    }
    check_so_counter(&token_info)?;
    calling::next("C_InitToken");
    module
        .init_token(slot, &auth_pin(so_pin), label)
        .map_err(|error| refused_so_pin(error.into()))?;
    // After the initialisation, SoftHSM moves the token to another slot. The label identifies the token in its new
    // slot, because no other token has the same label.
    let selector = Settings {
        label: Some(label.to_owned()),
        serial: None,
        uri: None,
        ..settings.clone()
    };
    let selector = select::Selector::from_settings(&selector)
        .map_err(|error| AdminError::Token(error.to_string()))?;
    let Selected { slot, info, .. } = select::find(&module, &selector, Registered::Preferred(&[]))?;
    set_user_pin(&module, slot, so_pin, user_pin).map_err(|fault| {
        AdminError::Token(format!(
            "the token {label:?} (serial {:?}) is initialised, but has no user PIN: {fault}; {}. Run the command again with \
             `--erase-serial {}`",
            info.serial, takes(&token_info), info.serial
        ))
    })?;
    Ok(info)
}

/// Sets the user PIN of an initialised token, which also unlocks a locked user PIN. The security officer logs in for this
/// once, and only to the token with this serial number.
pub(crate) fn reset_user_pin(
    settings: &Settings,
    serial: &str,
    so_pin: &Pin,
    user_pin: &Pin,
) -> Result<TokenInfo, AdminError> {
    let module = module::load(settings)?;
    let selector = select::Selector::from_settings(settings)
        .map_err(|error| AdminError::Token(error.to_string()))?;
    let Selected { slot, info, .. } =
        select::find(&module, &selector, Registered::Preferred(&[serial]))?;
    if info.serial != serial {
        return Err(AdminError::Token(format!(
            "the token has the serial number {:?} instead of {serial:?}, so the PIN of the security officer is not for \
             this token. Nothing was changed",
            info.serial
        )));
    }
    let token_info = module.get_token_info(slot).map_err(Fault::from)?;
    if let Some(problem) = pin_problem("user PIN", user_pin, &token_info) {
        return Err(AdminError::NewPin(problem));
    }
    check_so_counter(&token_info)?;
    set_user_pin(&module, slot, so_pin, user_pin).map_err(refused_so_pin)?;
    Ok(info)
}

fn set_user_pin(module: &Module, slot: Slot, so_pin: &Pin, user_pin: &Pin) -> Result<(), Fault> {
    calling::next("C_OpenSession");
    let session = module.open_rw_session(slot)?;
    calling::next("C_Login");
    session.login(UserType::So, Some(&auth_pin(so_pin)))?;
    calling::next("C_InitPIN");
    session.init_pin(&auth_pin(user_pin))?;
    session.logout()?;
    Ok(())
}

/// Describes the rejection of the security officer's PIN. `C_InitToken` and `C_Login` with a wrong PIN change nothing.
fn refused_so_pin(fault: Fault) -> AdminError {
    if fault.class != Class::Pin {
        return fault.into();
    }
    AdminError::Pin(format!(
        "the token rejected the security officer's PIN ({fault}). Nothing was changed. Tokens count wrong PINs and lock after a \
         few: correct the PIN before you run the command again"
    ))
}

/// Describes the lengths of PINs that the token accepts.
fn takes(info: &PkcsTokenInfo) -> String {
    format!(
        "the token accepts PINs of {} to {} bytes",
        info.min_pin_length(),
        info.max_pin_length()
    )
}

/// Checks that the token can return the label unchanged, because commands find the token by its label.
fn check_label(label: &str) -> Result<(), AdminError> {
    let problem = if label.is_empty() || label.chars().any(char::is_control) {
        "the label must have 1 to 32 bytes and no control characters"
    } else if label.len() > LABEL_BYTES {
        "the label is longer than 32 bytes of UTF-8"
    } else if label != label.trim() {
        "the label begins or ends with a blank, which tokens cannot distinguish from padding"
    } else {
        return Ok(());
    };
    Err(AdminError::Token(format!(
        "token label {label:?}: {problem}. Nothing was changed"
    )))
}

/// Compares the length of a PIN with the limits that the token reports. A minimum or maximum of 0 means no limit.
fn pin_problem(what: &str, pin: &Pin, info: &PkcsTokenInfo) -> Option<String> {
    let (shortest, longest) = (info.min_pin_length(), info.max_pin_length());
    let length = pin.expose().len();
    let is_bad = length < shortest || longest >= shortest.max(1) && length > longest;
    is_bad.then(|| {
        format!(
            "the {what} has {length} bytes; {}. Nothing was changed",
            takes(info)
        )
    })
}

/// Refuses an attempt that could lock the security officer's PIN. A token counts wrong PINs of the security officer,
/// and cannot be administered after it has locked this PIN.
fn check_so_counter(info: &PkcsTokenInfo) -> Result<(), AdminError> {
    // An uninitialised token accepts any PIN, and its flags have no meaning.
    if !info.token_initialized() {
        return Ok(());
    }
    let problem = if info.so_pin_locked() {
        "the security officer's PIN is locked"
    } else if info.so_pin_final_try() {
        "one more wrong PIN of the security officer would lock the token: log in once with the vendor's tool to reset the \
         counter"
    } else {
        return Ok(());
    };
    Err(AdminError::Pin(format!("{problem}. Nothing was changed")))
}

fn blank_slot(module: &Module, label: &str) -> Result<Slot, AdminError> {
    let mut blank = None;
    calling::next("C_GetSlotList");
    for slot in module.slots_with_token().map_err(Fault::from)? {
        let info = module.get_token_info(slot).map_err(Fault::from)?;
        if !info.token_initialized() {
            blank.get_or_insert(slot);
        } else if unpadded(info.label()) == label {
            return Err(AdminError::Token(format!(
                "a token with the label {label:?} already exists (serial {}). Nothing was changed. To erase this \
                 token and every key on it permanently, pass --erase-serial {}",
                unpadded(info.serial_number()),
                unpadded(info.serial_number())
            )));
        }
    }
    blank.ok_or_else(|| {
        AdminError::NoToken(
            "every token of this module is initialised, and keybroker erases an initialised token only with --erase-serial"
                .to_owned(),
        )
    })
}

fn slot_to_erase(module: &Module, serial: &str, label: &str) -> Result<Slot, AdminError> {
    let mut wanted = None;
    for (slot, info) in select::list(module)? {
        let found = unpadded(info.serial_number());
        if found == serial {
            wanted = Some(slot);
        } else if unpadded(info.label()) == label {
            return Err(AdminError::Token(format!(
                "another token already has the label {label:?} (serial {found}), so the label would not identify \
                 the new token; nothing was erased. Choose another label"
            )));
        }
    }
    wanted.ok_or_else(|| {
        AdminError::NoToken(format!(
            "no initialised token has the serial number {serial:?}; nothing was erased"
        ))
    })
}

/// A token to which this command is logged in.
#[derive(Debug)]
pub(crate) struct Admin {
    settings: Settings,
    token: OpenToken,
    /// The `CKA_ID` of each key's objects, for the keys that the command has sent.
    known: HashMap<WrappingKeyId, ObjectIds>,
    /// Integrity keys that were made in, or unwrapped into, the memory of this process.
    secrets: RefCell<HashMap<WrappingKeyId, WorkerKey>>,
}

impl Admin {
    /// Logs in to the only token that matches the settings.
    #[cfg(test)]
    pub(crate) fn open<'a>(
        settings: &Settings,
        record: &PinRecord,
        pin: impl Into<Option<&'a Pin>>,
        write: bool,
    ) -> Result<Self, AdminError> {
        Self::open_one_of(settings, record, pin.into(), write, &[])
    }

    /// Logs in if the record of PINs allows the login. If `write` is true, the session is read-write, so that keys can
    /// be made. If several tokens match the settings, the token whose serial number is in the registry is used.
    pub(crate) fn open_one_of(
        settings: &Settings,
        record: &PinRecord,
        pin: Option<&Pin>,
        write: bool,
        serials: &[&str],
    ) -> Result<Self, AdminError> {
        Ok(Self {
            settings: settings.clone(),
            token: OpenToken::login_to(
                settings,
                record,
                pin,
                write,
                Registered::Preferred(serials),
            )?,
            known: HashMap::new(),
            secrets: RefCell::default(),
        })
    }

    /// Records the `CKA_ID` of a key's objects.
    pub(crate) fn know(&mut self, id: WrappingKeyId, objects: ObjectIds) {
        self.known.insert(id, objects);
    }

    /// Returns where the objects of a key are stored. If the command did not send the `CKA_ID` of the objects, returns
    /// where `key generate` would store them.
    fn place(&self, id: WrappingKeyId) -> Place {
        let objects = self.known.get(&id).cloned().unwrap_or_else(|| ObjectIds {
            private: None,
            integrity: if self.settings.permits_integrity_key_in_worker() {
                IntegrityPlace::Worker
            } else {
                IntegrityPlace::Token
            },
        });
        Place {
            secret: self.secrets.borrow().get(&id).cloned(),
            ..Place::of(id, objects)
        }
    }

    /// Finds the objects of a wrapping key, whose attributes show its purpose. The attribute check must follow.
    fn find(&self, id: WrappingKeyId) -> Result<KeyPair, Fault> {
        let pair = keys::find(&self.token.anchor, &self.place(id))?;
        let purpose = keys::purpose_of(&self.token.anchor, pair.private)?;
        Ok(KeyPair { purpose, ..pair })
    }

    /// Finds a wrapping key and its integrity key.
    fn pair(&self, id: WrappingKeyId) -> Result<KeyPair, Fault> {
        let pair = self.find(id)?;
        let pair = self.token.with_integrity_key(&self.settings, pair)?;
        self.keep_secret(&pair.place());
        Ok(pair)
    }

    /// Keeps an integrity key that is in the memory of this process, so that the key is unwrapped only once.
    fn keep_secret(&self, place: &Place) {
        if let Some(secret) = &place.secret {
            self.secrets.borrow_mut().insert(place.id, secret.clone());
        }
    }

    /// Opens a session and finds the handles of the keys with the ids `ids`.
    fn session(&self, ids: &[WrappingKeyId]) -> Result<KeySession, Fault> {
        let places = ids
            .iter()
            .map(|id| Ok(self.pair(*id)?.place()))
            .collect::<Result<Vec<_>, Fault>>()?;
        self.token.session(&places)
    }

    /// Returns the information of the open token.
    pub(crate) fn info(&self) -> &TokenInfo {
        &self.token.info
    }

    /// Whether the token answered the login with `CKR_USER_ALREADY_LOGGED_IN`, because another process was already
    /// logged in.
    pub(crate) fn is_login_of_another(&self) -> bool {
        self.token.is_login_of_another
    }

    /// Returns the `CKA_ID` of all RSA private keys on the token.
    pub(crate) fn key_ids(&self) -> Result<Vec<ObjectId>, AdminError> {
        Ok(keys::list(&self.token.anchor)?)
    }

    /// Makes a plain wrapping key.
    #[cfg(test)]
    pub(crate) fn generate_key(
        &self,
        modulus_bits: u32,
        id: Option<WrappingKeyId>,
    ) -> Result<CheckedKey, AdminError> {
        self.generate_key_for(Purpose::Plain, modulus_bits, id)
    }

    /// Makes a wrapping key and its integrity key, reads back every attribute and runs the self-test of both keys. If a
    /// check fails, the key is removed from the token. Making a key does not add the key to the registry.
    /// Without an id, the key gets a random one.
    pub(crate) fn generate_key_for(
        &self,
        purpose: Purpose,
        modulus_bits: u32,
        id: Option<WrappingKeyId>,
    ) -> Result<CheckedKey, AdminError> {
        if purpose == Purpose::Sealed && self.settings.permits_integrity_key_in_worker() {
            return Err(AdminError::Token(SEALED_NEEDS_TOKEN.to_owned()));
        }
        if self.settings.access_control == AccessControl::OutsidePkcs11 {
            return Err(AdminError::Token(
                "`access_control = \"outside-pkcs11\"` in [token] is for keys with CKA_PRIVATE=false, but this command \
                 does not make such keys. Make the keys with the vendor's tool, and register them with `keybroker key \
                 register`"
                    .to_owned(),
            ));
        }
        let session = &self.token.anchor;
        let not_made = self.try_for_a_session(purpose)?;
        let terms = Terms::for_purpose(&self.settings, purpose);
        let made = match id {
            Some(id) => keys::generate_with_id(session, id, modulus_bits, terms),
            None => keys::generate(session, modulus_bits, terms),
        };
        let made = made.map_err(|refusal| self.explained(refusal, purpose))?;
        self.keep_secret(&made.pair.place());
        let problem = match self.check(made.pair.id) {
            Ok(mut checked) => match &checked.problem {
                None if checked.purpose != purpose => format!(
                    "the attributes of the key are those of a {} wrapping key",
                    checked.purpose.as_str()
                ),
                None if u32::try_from(checked.modulus_bits) == Ok(modulus_bits) => {
                    for test in not_made {
                        if !checked.not_tried.contains(&test) {
                            checked.not_tried.push(test);
                        }
                    }
                    return self.with_integrity_key_file(checked);
                }
                None => format!(
                    "the key has {} bits instead of {modulus_bits}",
                    checked.modulus_bits
                ),
                Some(problem) => problem.clone(),
            },
            Err(error) => error.to_string(),
        };
        let end = match made.remove(session) {
            Ok(()) => "The key was removed from the token".to_owned(),
            Err(left) => left.to_string(),
        };
        Err(AdminError::Untrusted(format!(
            "the token made key {} with wrong properties, or the key could not be checked: {problem}. {end}",
            made.pair.id
        )))
    }

    /// Makes session keys, to check that the token performs the necessary operations and refuses the forbidden
    /// operations. Returns the names of the negative tests that were not run. A token without session keys skips the
    /// tests that change a key.
    fn try_for_a_session(&self, purpose: Purpose) -> Result<Vec<&'static str>, AdminError> {
        let session = &self.token.anchor;
        let terms = Terms::for_purpose(&self.settings, purpose);
        let made = match keys::generate_for_session(session, terms) {
            Ok(made) => made,
            Err(refusal) => {
                return match refusal
                    .making
                    .map(|making| keys::cause_of_refusal(session, making, terms))
                {
                    Some(Cause::Settings {
                        integrity_key,
                        attributes,
                    }) => Err(helped_by_settings(
                        &refusal,
                        integrity_key,
                        &attributes,
                        &self.settings,
                    )),
                    _ => Ok(tests_that_change_a_key()),
                };
            }
        };
        let tried = keys::public_side(session, &made.pair).and_then(|public| {
            let self_test =
                self.token
                    .probe(&made.pair.place(), &public, self.settings.allow_oaep_sha1)?;
            self.token.try_what_must_fail(
                &self.settings,
                &made.pair,
                &public,
                &self_test,
                Subject::Throwaway,
            )
        });
        // If the removal fails, the token removes the keys when the session ends.
        let _removed = made.remove(session);
        match tried {
            Err(fault) if matches!(fault.class, Class::Configuration | Class::Untrusted) => {
                Err(AdminError::Untrusted(format!("{fault}. No key was made")))
            }
            Err(fault) => {
                tracing::warn!(
                    %fault,
                    "an error ended the tests with throwaway keys, so the negative tests that change a key count as not run"
                );
                Ok(tests_that_change_a_key())
            }
            Ok(not_made) => Ok(not_made),
        }
    }

    /// Returns the error for a refusal, with the cause if the cause can be determined.
    fn explained(&self, refusal: Refusal, purpose: Purpose) -> AdminError {
        let Some(making) = refusal.making else {
            return refusal.fault.into();
        };
        let terms = Terms::for_purpose(&self.settings, purpose);
        match keys::cause_of_refusal(&self.token.anchor, making, terms) {
            Cause::Settings {
                integrity_key,
                attributes,
            } => helped_by_settings(&refusal, integrity_key, &attributes, &self.settings),
            Cause::NotTheTemplate => AdminError::Token(format!(
                "the token did not make {making}: {}. The token makes the same key as a session key, so the template is \
                 not the cause: the token may be full or write-protected. If the token is full, remove unused objects \
                 with the vendor's tool. No key was made",
                refusal.fault
            )),
            Cause::Unknown => AdminError::Token(format!(
                "the token did not make {making}: {}. The token does not make this key as a session key either, so \
                 keybroker cannot find out which attribute the token refuses; the token's manual lists the supported \
                 attributes and mechanisms{}. No key was made",
                refusal.fault,
                other_kinds(making)
            )),
        }
    }

    /// If the integrity key was made in the memory of this process, adds the content of the integrity key's file to the
    /// key.
    fn with_integrity_key_file(&self, checked: CheckedKey) -> Result<CheckedKey, AdminError> {
        let (IntegrityPlace::Worker, Some(algorithm)) =
            (&checked.objects.integrity, checked.algorithm)
        else {
            return Ok(checked);
        };
        let pair = self.pair(checked.id)?;
        let public = keys::public_side(&self.token.anchor, &pair)?;
        let secret = self.place(checked.id).secret.ok_or_else(|| {
            AdminError::Untrusted(format!("the integrity key of {} is missing", checked.id))
        })?;
        let wrapped = secret.wrap(checked.id, &public.spki, algorithm)?;
        Ok(CheckedKey {
            integrity_key_file: Some(wrapped.to_text()),
            ..checked
        })
    }

    /// Makes an integrity key in the memory of this process for an RSA key that has no integrity key, and checks both
    /// keys.
    pub(crate) fn check_with_new_integrity_key(
        &self,
        id: WrappingKeyId,
    ) -> Result<CheckedKey, AdminError> {
        let place = self.place(id);
        if place.objects.integrity != IntegrityPlace::Worker {
            return Err(AdminError::Untrusted(format!(
                "the integrity key of {id} is not of the kind that workers unwrap into their memory"
            )));
        }
        // If the registry row of a wrapping key is lost, the records of this wrapping key still need its old integrity
        // key.
        if let Some(object) = keys::integrity_key_on_token(&self.token.anchor, &place)? {
            return Err(AdminError::Untrusted(format!(
                "the token has a secret key with the CKA_ID {object}, which may be the integrity key of {id}, so no \
                 other integrity key was made; register the secret key with `keybroker key register ID --integrity-id \
                 {object}`, or remove it with the vendor's tool if it is not used"
            )));
        }
        self.keep_secret(&Place {
            secret: Some(WorkerKey::random()?),
            ..place
        });
        self.with_integrity_key_file(self.check(id)?)
    }

    /// Checks the attributes of one key and runs its self-test.
    pub(crate) fn check(&self, id: WrappingKeyId) -> Result<CheckedKey, AdminError> {
        let pair = self.find(id)?;
        let verdict = keys::inspect(&self.token.anchor, &pair, &self.settings)?;
        let public = keys::public_side(&self.token.anchor, &pair)?;
        let proved = self
            .token
            .prove(&self.settings, &pair.place(), public.fingerprint);
        if let Ok(proved) = &proved {
            self.keep_secret(&proved.place);
        }
        Ok(CheckedKey {
            id,
            objects: pair.objects,
            spki: public.spki,
            modulus_bits: public.modulus_bits,
            algorithm: proved.as_ref().ok().map(|key| key.self_test.algorithm()),
            private: verdict.private,
            integrity_key: verdict.integrity_key,
            not_tried: proved
                .as_ref()
                .map(|key| key.not_tried.clone())
                .unwrap_or_default(),
            purpose: pair.purpose,
            sealing: proved.as_ref().ok().and_then(|key| key.sealing),
            problem: proved.err().map(|fault| fault.to_string()),
            integrity_key_file: None,
        })
    }

    /// Removes the objects of a key from the token. Returns the number of removed objects, which is 0 if the token has none of them.
    /// Removes nothing if the objects do not have this identity.
    pub(crate) fn remove_key(
        &self,
        id: WrappingKeyId,
        identity: &Identity<'_>,
    ) -> Result<u32, AdminError> {
        let place = self.place(id);
        self.secrets.borrow_mut().remove(&id);
        Ok(keys::remove(&self.token.anchor, &place, identity)?)
    }

    /// Describes the token and its module.
    pub(crate) fn identity(
        &self,
    ) -> Result<keybroker_worker_protocol::report::Identity, AdminError> {
        Ok(report::identity_of(&self.token, &self.settings)?)
    }

    /// Whether the token has a key that signs the transcript of a ceremony.
    pub(crate) fn has_signing_key(&self) -> Result<bool, AdminError> {
        Ok(keys::has_signing_key(&self.token.anchor)?)
    }

    /// Makes the key that signs the transcript of a ceremony.
    pub(crate) fn make_signing_key(&self) -> Result<SigningKey, AdminError> {
        Ok(keys::make_signing_key(&self.token.anchor, &self.settings)?)
    }

    /// Signs with a key of [`Admin::make_signing_key`]. Returns the signature and whether it is RSASSA-PSS.
    pub(crate) fn sign(
        &self,
        object: &ObjectId,
        message: &[u8],
    ) -> Result<(Vec<u8>, bool), AdminError> {
        Ok(keys::sign(&self.token.anchor, object, message)?)
    }

    /// Imports the key of a Bitwarden organisation, with an integrity key that the token makes.
    pub(crate) fn import_organization_key(
        &self,
        id: WrappingKeyId,
        pkcs8: &[u8],
    ) -> Result<OrganizationKey, AdminError> {
        Ok(organization::import(
            &self.token,
            &self.settings,
            id,
            pkcs8,
        )?)
    }

    /// Checks and tests the key of a Bitwarden organisation.
    pub(crate) fn check_organization_key(
        &self,
        id: WrappingKeyId,
    ) -> Result<OrganizationKey, AdminError> {
        Ok(organization::check(&self.token, &self.settings, id)?)
    }

    /// Wraps a member's user key under the public key of a device.
    pub(crate) fn release_to_device(
        &self,
        id: WrappingKeyId,
        fingerprint: &[u8],
        wrapped: &[u8],
        recipient: &[u8],
    ) -> Result<organization::Release, AdminError> {
        let (token, settings) = (&self.token, &self.settings);
        Ok(organization::release(
            token,
            settings,
            id,
            fingerprint,
            wrapped,
            recipient,
        )?)
    }

    /// Computes a MAC with the integrity key of this wrapping key.
    pub(crate) fn mac(&self, id: WrappingKeyId, message: &[u8]) -> Result<Mac, AdminError> {
        let pair = self.pair(id)?;
        Ok(operation::mac(&self.token.anchor, &pair, message)?)
    }

    /// Makes the report with session keys and, if allowed, with temporary keys on the token. Logs out at the end.
    pub(crate) fn report(
        &self,
        pin: Option<&Pin>,
        write: bool,
        serial: bool,
    ) -> Result<keybroker_worker_protocol::report::Report, AdminError> {
        let allowed = report::Allowed { write, serial };
        Ok(report::make(&self.token, &self.settings, pin, allowed)?)
    }

    /// Uses the RSA key in a loop with `threads` threads until `until`, to measure the token without the broker. Returns the
    /// number of operations, and the number of times that a thread waited for something other than the CPU.
    pub(crate) fn decrypt_loop(
        &self,
        id: WrappingKeyId,
        threads: usize,
        until: Timestamp,
    ) -> Result<Counted, AdminError> {
        let pair = self.pair(id)?;
        let public = keys::public_side(&self.token.anchor, &pair)?;
        let self_test = self
            .token
            .probe(&pair.place(), &public, self.settings.allow_oaep_sha1)?;
        let sessions: Vec<KeySession> = (0..threads)
            .map(|_| self.session(&[id]))
            .collect::<Result<_, _>>()?;
        let counts = std::thread::scope(|scope| {
            let running: Vec<_> = sessions
                .into_iter()
                .map(|session| {
                    let self_test = &self_test;
                    scope.spawn(move || -> Result<Counted, Fault> {
                        let pair = session.pair(id).expect("it was opened with this key");
                        let before = waits_of_this_thread();
                        let mut operations = 0;
                        while Timestamp::now() < until {
                            self_test.open(&session, pair)?;
                            operations += 1;
                        }
                        Ok(Counted {
                            operations,
                            waits: waits_of_this_thread().saturating_sub(before),
                        })
                    })
                })
                .collect();
            running
                .into_iter()
                .map(|thread| thread.join().expect("the loop does not panic"))
                .try_fold(Counted::default(), |sum, one| Ok::<_, Fault>(sum.and(one?)))
        })?;
        Ok(counts)
    }
}
