//! Opens a token: loads the module, selects the token and logs in once. After the login, finds the keys, checks their
//! attributes and runs their self-tests. Workers and admin workers use the same code.
//!
//! Mitigation: M15 of `THREAT_MODEL.md`.

use std::time::{Duration, Instant};

use cryptoki::{
    context::Function,
    error::{Error, RvError},
    session::UserType,
    slot::Slot,
    types::AuthPin,
};

use keybroker_core::key::{Fingerprint, Purpose, Sealing};
use keybroker_pkcs11_ffi::{Module, Session};
use keybroker_worker_protocol::{AccessControl, Pin, Settings, TokenInfo};

use crate::{
    PinRecord, calling,
    classify::{Class, Fault},
    keys::{self, KeyPair, KeySession, Place, PublicSide},
    login_policy::{self, Answer, Counter, Decision, Refusal, Standing},
    mac_key::MacKey,
    module,
    negative::{self, Subject, Terms},
    operation::{self, SelfTest},
    pin_record::RecordError,
    select::{self, Registered, Selected, Selector},
    unwrap,
};

/// A token to which this process is logged in.
#[derive(Debug)]
pub(super) struct OpenToken {
    pub(super) module: Module,
    pub(super) slot: Slot,
    pub(super) info: TokenInfo,
    /// A session that stays open to keep the login: the token ends a login when the last session of the process is
    /// closed.
    pub(super) anchor: Session,
    /// Whether this process uses the login of another process, because the token reported that the other process was
    /// already logged in.
    pub(super) is_login_of_another: bool,
    pub(super) times: Times,
}

/// The durations of the calls that open a token.
#[derive(Clone, Copy, Debug)]
pub(super) struct Times {
    pub(super) initialize: Duration,
    /// Duration of `C_Login`; `None` for a token that is used without a login.
    pub(super) login: Option<Duration>,
}

/// A key that passed the attribute check and the self-test.
#[derive(Clone, Debug)]
pub(super) struct ProvedKey {
    /// The `CKA_ID` of the key's objects.
    pub(super) place: Place,
    pub(super) public: PublicSide,
    pub(super) self_test: SelfTest,
    /// The negative tests that cannot be run on this token.
    pub(super) not_tried: Vec<&'static str>,
    /// The protection of a sealed wrapping key; `None` for a plain wrapping key.
    pub(super) sealing: Option<Sealing>,
}

impl OpenToken {
    /// Logs in to the only token that matches the settings.
    #[cfg(test)]
    pub(super) fn login<'a>(
        settings: &Settings,
        record: &PinRecord,
        pin: impl Into<Option<&'a Pin>>,
        write: bool,
    ) -> Result<Self, Fault> {
        Self::login_to(
            settings,
            record,
            pin.into(),
            write,
            Registered::Preferred(&[]),
        )
    }

    /// Loads the module, chooses the token and logs in once, if the record of PINs allows the login. Without a PIN,
    /// this function does not log in. If several tokens match the settings, the token whose serial number is in the
    /// registry is chosen.
    pub(super) fn login_to(
        settings: &Settings,
        record: &PinRecord,
        pin: Option<&Pin>,
        write: bool,
        registered: Registered<'_>,
    ) -> Result<Self, Fault> {
        let selector = Selector::from_settings(settings)
            .map_err(|error| Fault::new(Class::Configuration, error.to_string()))?;
        let (module, initialize) = module::load_timed(settings)?;
        let Selected {
            slot,
            mut info,
            is_one_of_several,
        } = select::find(&module, &selector, registered)?;
        calling::next("C_GetSlotInfo");
        // The property is only shown to administrators, so a module without this function can be used.
        info.is_hardware = module.is_hardware_slot(slot).unwrap_or(false);
        match pin {
            Some(_) => refuse_pin_pad(&module, slot, &info)?,
            None => require_no_login(&module, slot, &info, settings.access_control)?,
        }
        let anchor = if write {
            keys::writing_session(&module, slot)?
        } else {
            keys::reading_session(&module, slot)?
        };
        let mut token = Self {
            module,
            slot,
            info,
            anchor,
            is_login_of_another: false,
            times: Times {
                initialize,
                login: None,
            },
        };
        if let Some(pin) = pin {
            let (is_login_of_another, took) = token.log_in(record, pin, is_one_of_several)?;
            token.is_login_of_another = is_login_of_another;
            token.times.login = Some(took);
        }
        Ok(token)
    }

    /// Calls `C_Login` once, after a check of the record of PINs, and records the answer of the token. Returns whether
    /// another process was already logged in, and the duration of the call.
    fn log_in(
        &self,
        record: &PinRecord,
        pin: &Pin,
        is_one_of_several: bool,
    ) -> Result<(bool, Duration), Fault> {
        let mut login = record.begin(&self.info.serial, pin)?;
        let before = self.counter()?;
        let was = login.standing().cloned();
        if is_one_of_several && !matches!(was, Some(Standing::Proven { .. })) {
            return Err(unproven_twin(&self.info));
        }
        let begun = match login_policy::decide(was.as_ref(), before, login.final_try_allowed()) {
            Decision::Login(begun) => begun,
            Decision::Refuse(refusal) => return Err(refused(&refusal, &self.info)),
        };
        login.set(begun.clone().or_else(|| was.clone()))?;
        calling::next("C_Login");
        let began = Instant::now();
        let result = self.anchor.login(UserType::User, Some(&auth_pin(pin)));
        let took = began.elapsed();
        let (answer, error) = match result {
            Ok(()) => (Answer::Accepted, None),
            Err(Error::Pkcs11(code, function)) => {
                (Answer::of(code), Some(Error::Pkcs11(code, function)))
            }
            Err(error) => (Answer::Unclear, Some(error)),
        };
        let after = error.as_ref().and_then(|_| self.counter().ok());
        let text = error.as_ref().map(|error| fault_of(error).detail);
        let now = login_policy::conclude(
            was.as_ref(),
            begun.as_ref(),
            answer,
            text.as_deref().unwrap_or_default(),
            before,
            after,
        );
        let recorded = login.set(now.clone());
        drop(login);
        let Some(error) = error else {
            // The login itself succeeded, but the success could not be recorded. If the token had not accepted the PIN
            // before, the record still counts this login as a used attempt.
            if let Err(error) = recorded {
                tracing::warn!(%error, "cannot record that the PIN was accepted");
            }
            return Ok((false, took));
        };
        // On some tokens, a login applies to several processes, and another process was already logged in. The token
        // did not check the PIN. The attribute check and the self-test show whether this process can use the login.
        if matches!(error, Error::Pkcs11(RvError::UserAlreadyLoggedIn, _)) {
            tracing::info!(
                token = self.info.label,
                "another process is already logged in to the token; this process shares its login"
            );
            return Ok((true, took));
        }
        recorded?;
        Err(self.failed_login(&error, answer, now.as_ref(), after))
    }

    /// If the login of another process may be the cause of a failure, adds an explanation to the failure.
    pub(super) fn explained(&self, fault: Fault) -> Fault {
        let may_be_the_login = matches!(
            fault.class,
            Class::KeyMissing | Class::SessionLost | Class::Ambiguous | Class::Configuration
        );
        if !self.is_login_of_another || !may_be_the_login {
            return fault;
        }
        fault.with(
            "another process is logged in to this token (USER_ALREADY_LOGGED_IN): if the token shares one login among \
             processes, set `workers = 1` in [token], and stop `serve` before you run other commands",
        )
    }

    fn counter(&self) -> Result<Counter, Fault> {
        calling::next("C_GetTokenInfo");
        Ok(Counter::of(&self.module.get_token_info(self.slot)?))
    }

    /// Classifies a failed login. `after` is the token's counter of wrong PINs after the login, or `None` if the token
    /// does not answer.
    fn failed_login(
        &self,
        error: &Error,
        answer: Answer,
        now: Option<&Standing>,
        after: Option<Counter>,
    ) -> Fault {
        let fault = fault_of(error);
        let token = named(&self.info);
        if matches!(
            error,
            Error::Pkcs11(RvError::UserPinNotInitialized, Function::Login)
        ) {
            let serial = &self.info.serial;
            return fault.about(&token).with(&format!(
                "the token has no user PIN, because its initialisation was not completed. Set a user PIN with the \
                 vendor's tool or, if the token holds no keys, erase the token with `keybroker token init --erase-serial \
                 {serial}`"
            ));
        }
        if answer == Answer::NotChecked {
            return fault;
        }
        match now {
            Some(Standing::Rejected { .. }) => Fault::new(
                Class::Pin,
                format!(
                    "{token} rejected the PIN: {fault}{}. {ONCE}",
                    after.map_or("", Counter::describe)
                ),
            ),
            _ if after.is_none() => Fault::new(Class::TokenLost, fault.detail),
            Some(Standing::Unproven { tries, .. }) if *tries > 1 => {
                let what = refused(&Refusal::Unproven, &self.info);
                Fault::new(Class::Pin, format!("{fault}: {what}"))
            }
            _ => Fault::new(
                Class::Login,
                format!(
                    "{token}: the login failed with a return code that does not concern the PIN: {fault}"
                ),
            ),
        }
    }

    /// Finds a wrapping key, compares it with the registry, checks its attributes and runs its self-test. If the
    /// integrity key is not on the token, unwraps the integrity key before the self-test.
    pub(super) fn prove(
        &self,
        settings: &Settings,
        place: &Place,
        fingerprint: Fingerprint,
    ) -> Result<ProvedKey, Fault> {
        let pair = keys::find(&self.anchor, place)?;
        keys::inspect(&self.anchor, &pair, settings)?.require(pair.id)?;
        let public = keys::public_side(&self.anchor, &pair)?;
        if public.fingerprint != fingerprint {
            return Err(Fault::new(
                Class::Untrusted,
                format!(
                    "wrapping key {} on the token has the public key {}, but the registry has the public key \
                     {fingerprint}: the token has another key under the same CKA_ID",
                    pair.id, public.fingerprint
                ),
            ));
        }
        let pair = self.with_integrity_key(settings, pair)?;
        let self_test = self.probe(&pair.place(), &public, settings.allow_oaep_sha1)?;
        let not_tried =
            self.try_what_must_fail(settings, &pair, &public, &self_test, Subject::InUse)?;
        let sealing = match pair.purpose {
            Purpose::Plain => None,
            Purpose::Sealed => Some(self_test.sealed(&pair).sealing(|| self.session(&[]))?),
        };
        Ok(ProvedKey {
            place: pair.place(),
            public,
            self_test,
            not_tried,
            sealing,
        })
    }

    /// Returns the key pair. If the integrity key is not on the token, unwraps the integrity key from its file.
    pub(super) fn with_integrity_key(
        &self,
        settings: &Settings,
        pair: KeyPair,
    ) -> Result<KeyPair, Fault> {
        if !matches!(pair.integrity_key, MacKey::InWorker(None)) {
            return Ok(pair);
        }
        if pair.purpose == Purpose::Sealed {
            let what = format!(
                "wrapping key {} is a sealed wrapping key, which cannot decrypt the file of its integrity key",
                pair.id
            );
            return Err(Fault::new(Class::Configuration, what));
        }
        let session = self.session(&[])?;
        let secret = unwrap::integrity_key(&session.session, &pair, settings)?;
        Ok(KeyPair {
            integrity_key: MacKey::InWorker(Some(secret)),
            ..pair
        })
    }

    pub(super) fn probe(
        &self,
        key: &Place,
        public: &PublicSide,
        allow_oaep_sha1: bool,
    ) -> Result<SelfTest, Fault> {
        let open = || self.session(std::slice::from_ref(key));
        operation::probe(open, key.id, public, allow_oaep_sha1)
    }

    /// Runs the negative tests, and logs the risk of each exception. Returns the names of the tests that cannot be run
    /// on this token.
    pub(super) fn try_what_must_fail(
        &self,
        settings: &Settings,
        pair: &KeyPair,
        public: &PublicSide,
        self_test: &SelfTest,
        subject: Subject,
    ) -> Result<Vec<&'static str>, Fault> {
        let terms = Terms {
            exceptions: &settings.attribute_exceptions,
            spared: &settings.spared_tests,
        };
        let open = || self.session(&[]);
        let report = negative::run(open, pair, public, self_test, subject, terms)?;
        for meaning in report.given_away {
            tracing::warn!(key = %pair.id, "{meaning}: `token.attribute_exceptions` accepts this risk");
        }
        if !report.not_made.is_empty() {
            let tests = report.not_made.join(", ");
            tracing::info!(key = %pair.id, %tests, "the token cannot run these negative tests");
        }
        Ok(report.not_made)
    }

    /// Opens another session of the same login, with the handles of the keys.
    pub(super) fn session(&self, keys: &[Place]) -> Result<KeySession, Fault> {
        KeySession::open(&self.module, self.slot, keys)
    }
}

/// Checks that a token may be used without a PIN: the token must not require a login, and the settings must declare
/// access control outside PKCS#11.
fn require_no_login(
    module: &Module,
    slot: Slot,
    info: &TokenInfo,
    access: AccessControl,
) -> Result<(), Fault> {
    if access != AccessControl::OutsidePkcs11 {
        return Err(Fault::new(Class::Pin, "no PIN was given"));
    }
    calling::next("C_GetTokenInfo");
    if !module.get_token_info(slot)?.login_required() {
        return Ok(());
    }
    Err(Fault::new(
        Class::Pin,
        format!(
            "{} demands a login (CKF_LOGIN_REQUIRED), and there is no PIN: set `token.pin_file`",
            named(info)
        ),
    ))
}

/// Refuses a login if several tokens match the settings and only the registry distinguishes them. An attacker who can
/// write to the database must not be able to choose the token that gets the PIN.
fn unproven_twin(info: &TokenInfo) -> Fault {
    Fault::new(
        Class::Configuration,
        format!(
            "more than one token matches the settings. The registry contains {}, but there is no record of an earlier login to this token \
             with this PIN, so no login was tried. If this is the right token, set `token.serial` to its serial number",
            named(info)
        ),
    )
}

/// Refuses a token with a PIN pad. A PIN pad needs a person at each login, so the broker could not restart unattended.
fn refuse_pin_pad(module: &Module, slot: Slot, info: &TokenInfo) -> Result<(), Fault> {
    calling::next("C_GetTokenInfo");
    if !module.get_token_info(slot)?.protected_authentication_path() {
        return Ok(());
    }
    Err(Fault::new(
        Class::Configuration,
        format!(
            "{} reads its PIN from a PIN pad (CKF_PROTECTED_AUTHENTICATION_PATH), but the broker must be able to start without an operator at the PIN pad; no login was tried. Use a token that accepts its PIN from the program",
            named(info)
        ),
    ))
}

/// Converts the PIN to the type of the PKCS#11 library.
pub(super) fn auth_pin(pin: &Pin) -> AuthPin {
    AuthPin::new(pin.expose().into())
}

/// Last sentence of every message about a PIN that must not be used again.
const ONCE: &str = "The broker does not use this PIN on this token again, because tokens lock after a few wrong PINs. \
                    Correct the PIN file, or run `keybroker token retry-pin` if the PIN is right";

fn named(info: &TokenInfo) -> String {
    format!("token {:?} (serial {:?})", info.label, info.serial)
}

fn fault_of(error: &Error) -> Fault {
    match error {
        Error::Pkcs11(code, function) => Fault::from(Error::Pkcs11(*code, *function)),
        other => Fault::new(Class::Ambiguous, other.to_string()),
    }
}

/// Returns a failure that explains why a login is not allowed.
fn refused(refusal: &Refusal, info: &TokenInfo) -> Fault {
    let token = named(info);
    let what = match refusal {
        Refusal::Locked => format!(
            "{token}: the user PIN is locked (CKF_USER_PIN_LOCKED); no login was tried. Unlock the user PIN with the \
             security officer's PIN"
        ),
        Refusal::FinalTry => format!(
            "{token}: one more wrong PIN would lock the token (CKF_USER_PIN_FINAL_TRY); no login was tried. Log in \
             once with \
             the vendor's tool to reset the counter, or run `keybroker token retry-pin --force` if you are sure of the PIN"
        ),
        Refusal::CounterRose => format!(
            "{token}: the counter of wrong PINs increased after a failed login of the broker; no login was tried. {ONCE}"
        ),
        Refusal::Unproven => format!(
            "{token}: no login with this PIN has ever succeeded, and two logins failed or were interrupted; no further \
             login is tried. Repair the cause, then run `keybroker token retry-pin`"
        ),
        Refusal::Rejected(answer) => {
            format!("{token} rejected this PIN before ({answer}); no login was tried. {ONCE}")
        }
    };
    Fault::new(Class::Pin, what)
}

impl From<RecordError> for Fault {
    /// Without the record of PINs, a wrong PIN could be used repeatedly, so the login is refused. The failure class
    /// allows retries, because a full disk or a busy lock is temporary.
    fn from(error: RecordError) -> Self {
        let mut detail = error.to_string();
        let mut cause = std::error::Error::source(&error);
        while let Some(source) = cause {
            detail = format!("{detail}: {source}");
            cause = source.source();
        }
        Self::new(
            Class::TokenLost,
            format!("no login was tried, because the record of PINs cannot be used: {detail}"),
        )
    }
}
