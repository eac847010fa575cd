//! The admin worker: the process that loads the vendor's module for a command such as `keybroker key generate`.
//!
//! The command sends one request at a time over a socket pair and receives one answer to each
//! request. The worker ends when the command closes the socket. If the module crashes or hangs,
//! only this process is affected. The process of the command uses the network and the database; the
//! admin worker uses neither.
//!
//! Mitigation: M7 of `THREAT_MODEL.md`.

use std::{
    io::{self, Write as _},
    os::{fd::AsFd as _, unix::net::UnixStream},
    path::Path,
    process::ExitCode,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use keybroker_core::{
    call::Timestamp,
    key::{ObjectId, ObjectIds, Purpose, WrappingKeyId},
    state::StateDirectory,
};
use keybroker_worker_protocol::{
    Pin, Settings,
    frame::{Inbox, Outbox},
    wire::{
        AdminFailure, AdminFailureClass, AdminReply, AdminRequest, AttributeFinding,
        CheckOrganizationKey, CheckedKey, DecryptLoop, GenerateKey, ImportOrganizationKey,
        InitToken, KeyIds, KnowKeys, LoopCount, MadeSignature, MakeReport, OaepSupport, OpenToken,
        OrganizationKey, PinSource, ReleaseToDevice, Sealing, SetUserPin, Setup, Sign, SigningKey,
        TokenEntry, TokenKey, TokenList, admin_reply::Outcome, admin_request::Job,
        pin_source::Source,
    },
};

use zeroize::Zeroize as _;

use crate::{
    PinRecord,
    admin::{self, Admin, AdminError, Verifier},
    attribute_check::Finding,
    calling,
    keys::{self, Identity},
    organization::Release,
    worker,
};

/// Runs the hidden command `keybroker token-admin-worker`.
pub fn run() -> ExitCode {
    match serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(%error, "admin worker");
            ExitCode::FAILURE
        }
    }
}

fn serve() -> io::Result<()> {
    let _signals = worker::ignore_signals()?;
    let stream = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    worker::end_with_front(stream.try_clone()?);
    let mut input = stream.try_clone()?;
    let replies = Arc::new(Mutex::new(Replies {
        stream,
        outbox: Outbox::default(),
    }));
    let reported = Arc::clone(&replies);
    calling::report_to(move |function| {
        let calling = Outcome::Calling(function.to_owned());
        // A failed report is ignored: if the command has ended, the socket is closed, and this process ends, too.
        let _sent = lock(&reported).send(calling);
    });
    let mut inbox = Inbox::default();
    let mut state = State::default();
    while let Some(request) = inbox.receive::<AdminRequest>(&mut input)? {
        let outcome = match request.job {
            Some(mut job) => {
                let outcome = state.run(&job).unwrap_or_else(|error| failure(&error));
                if let Job::ImportOrganizationKey(job) = &mut job {
                    job.pkcs8.zeroize();
                }
                outcome
            }
            None => failure(&AdminError::Token("the request has no job".to_owned())),
        };
        lock(&replies).send(outcome)?;
    }
    drop(state);
    calling::report_no_more();
    Ok(())
}

/// The sending side of the socket.
struct Replies {
    stream: UnixStream,
    outbox: Outbox,
}

impl Replies {
    fn send(&mut self, outcome: Outcome) -> io::Result<()> {
        self.outbox.push(&AdminReply {
            outcome: Some(outcome),
        });
        let written = self.stream.write_all(self.outbox.rest());
        self.outbox.sent(self.outbox.rest().len());
        written
    }
}

fn lock(replies: &Mutex<Replies>) -> std::sync::MutexGuard<'_, Replies> {
    replies.lock().unwrap_or_else(PoisonError::into_inner)
}

fn failure(error: &AdminError) -> Outcome {
    let class = match error {
        AdminError::Token(_) => AdminFailureClass::Token,
        AdminError::NoToken(_) => AdminFailureClass::NoToken,
        AdminError::Pin(_) | AdminError::NewPin(_) => AdminFailureClass::Pin,
        AdminError::Untrusted(_) => AdminFailureClass::Untrusted,
    };
    Outcome::Failure(AdminFailure {
        class: class.into(),
        detail: error.to_string(),
    })
}

/// The state that the admin worker keeps between two requests.
#[derive(Default)]
struct State {
    // The verifier is declared before the token, so that the verifier's session is closed first.
    verifier: Option<Verifier>,
    token: Option<Admin>,
}

impl State {
    fn run(&mut self, job: &Job) -> Result<Outcome, AdminError> {
        match job {
            Job::ListTokens(job) => list_tokens(&parse(job.setup.as_ref())?.settings),
            Job::InitToken(job) => init_token(job),
            Job::Open(job) => self.open(job),
            Job::ListKeys(_) => {
                let ids = self.token()?.key_ids()?;
                let ids = ids.iter().map(|id| id.as_bytes().to_vec()).collect();
                let has_signing_key = self.token()?.has_signing_key()?;
                Ok(Outcome::KeyIds(KeyIds {
                    ids,
                    has_signing_key,
                }))
            }
            Job::GenerateKey(job) => self.generate_key(job),
            Job::CheckKey(job) => {
                let (token, id) = (self.token()?, key_id(&job.key_id)?);
                Ok(key(if job.make_integrity_key {
                    token.check_with_new_integrity_key(id)?
                } else {
                    token.check(id)?
                }))
            }
            Job::Mac(job) => {
                let mac = self.token()?.mac(key_id(&job.key_id)?, &job.message)?;
                Ok(Outcome::Mac(mac.to_vec()))
            }
            Job::VerifyMac(job) => self.verify(&job.key_id, &job.message, &job.mac),
            Job::DecryptLoop(job) => self.decrypt_loop(job),
            Job::MakeReport(job) => self.report(job),
            Job::KnowKeys(job) => self.know(job),
            Job::Identify(_) => {
                let identity = self.token()?.identity()?;
                let text = serde_json::to_string(&identity).map_err(|error| {
                    AdminError::Token(format!("cannot encode the identity: {error}"))
                })?;
                Ok(Outcome::Identity(text))
            }
            Job::MakeSigningKey(_) => {
                let made = self.token()?.make_signing_key()?;
                Ok(Outcome::SigningKey(SigningKey {
                    cka_id: made.object.as_bytes().to_vec(),
                    spki: made.spki,
                    attributes: made.findings.iter().map(finding).collect(),
                }))
            }
            Job::Sign(job) => self.sign(job),
            Job::SetUserPin(job) => set_user_pin(job),
            Job::ImportOrganizationKey(job) => self.import_organization_key(job),
            Job::CheckOrganizationKey(job) => self.check_organization_key(job),
            Job::ReleaseToDevice(job) => self.release_to_device(job),
            Job::RemoveKey(job) => {
                let id = key_id(&job.key_id)?;
                // The handles of the removed objects must not be used again.
                self.verifier = None;
                let removed = self.token()?.remove_key(id, &Identity::of(job));
                Ok(Outcome::Removed(removed?))
            }
        }
    }

    fn generate_key(&mut self, job: &GenerateKey) -> Result<Outcome, AdminError> {
        let id = (!job.key_id.is_empty())
            .then(|| key_id(&job.key_id))
            .transpose()?;
        let purpose = if job.is_sealed {
            Purpose::Sealed
        } else {
            Purpose::Plain
        };
        let made = self
            .token()?
            .generate_key_for(purpose, job.modulus_bits, id)?;
        Ok(key(made))
    }

    fn open(&mut self, job: &OpenToken) -> Result<Outcome, AdminError> {
        let parsed = parse(job.setup.as_ref())?;
        let pin = read(job.pin.as_ref())?;
        let serials: Vec<&str> = job.serials.iter().map(String::as_str).collect();
        let admin = Admin::open_one_of(
            &parsed.settings,
            &parsed.record,
            pin.as_ref(),
            job.write,
            &serials,
        )
        .map_err(|error| of_pin(error, job.pin.as_ref()))?;
        let entry = TokenEntry {
            is_login_of_another: admin.is_login_of_another(),
            ..entry(&admin::Listed::of(admin.info()))
        };
        self.token = Some(admin);
        Ok(Outcome::Token(entry))
    }

    fn sign(&self, job: &Sign) -> Result<Outcome, AdminError> {
        let object = ObjectId::from_slice(&job.cka_id)
            .ok_or_else(|| AdminError::Untrusted("the request has no CKA_ID".to_owned()))?;
        let (signature, pss) = self.token()?.sign(&object, &job.message)?;
        Ok(Outcome::MadeSignature(MadeSignature { signature, pss }))
    }

    fn import_organization_key(&self, job: &ImportOrganizationKey) -> Result<Outcome, AdminError> {
        let id = key_id(&job.key_id)?;
        let key = self.token()?.import_organization_key(id, &job.pkcs8)?;
        Ok(organization_key(key))
    }

    fn check_organization_key(&self, job: &CheckOrganizationKey) -> Result<Outcome, AdminError> {
        let key = self.token()?.check_organization_key(key_id(&job.key_id)?)?;
        Ok(organization_key(key))
    }

    fn release_to_device(&self, job: &ReleaseToDevice) -> Result<Outcome, AdminError> {
        let (id, fingerprint) = (key_id(&job.key_id)?, &job.fingerprint);
        let answer =
            self.token()?
                .release_to_device(id, fingerprint, &job.wrapped, &job.recipient)?;
        Ok(match answer {
            Release::ForDevice(released) => Outcome::ForDevice(released),
            Release::Refused(why) => Outcome::ReleaseRefused(why),
        })
    }

    fn token(&self) -> Result<&Admin, AdminError> {
        self.token
            .as_ref()
            .ok_or_else(|| AdminError::Token("no token is open".to_owned()))
    }

    /// Records the `CKA_ID` of the objects of keys. The handles of keys that were found earlier are discarded.
    fn know(&mut self, job: &KnowKeys) -> Result<Outcome, AdminError> {
        self.verifier = None;
        let token = self
            .token
            .as_mut()
            .ok_or_else(|| AdminError::Token("no token is open".to_owned()))?;
        for key in &job.keys {
            let objects = ObjectIds::from_slices(&key.private_cka_id, &key.integrity_cka_id)
                .ok_or_else(|| {
                    AdminError::Untrusted("a CKA_ID in the request is too long".to_owned())
                })?;
            token.know(key_id(&key.id)?, objects);
        }
        Ok(Outcome::Known(
            u64::try_from(job.keys.len()).unwrap_or(u64::MAX),
        ))
    }

    /// Verifies a MAC. The worker searches for each integrity key once, when it verifies the first MAC with this key.
    fn verify(&mut self, id: &[u8], message: &[u8], mac: &[u8]) -> Result<Outcome, AdminError> {
        let id = key_id(id)?;
        let admin = self
            .token
            .as_ref()
            .ok_or_else(|| AdminError::Token("no token is open".to_owned()))?;
        let verifier = match &mut self.verifier {
            Some(verifier) => {
                verifier.add(admin, id)?;
                verifier
            }
            None => self.verifier.insert(Verifier::new(admin, id)?),
        };
        Ok(Outcome::Verified(verifier.verify(admin, id, message, mac)?))
    }

    fn decrypt_loop(&self, job: &DecryptLoop) -> Result<Outcome, AdminError> {
        let threads = usize::try_from(job.threads).unwrap_or(1);
        let duration = Duration::from_secs(job.seconds.into());
        let micros = i64::try_from(duration.as_micros()).unwrap_or(i64::MAX);
        let until = Timestamp::from_micros(Timestamp::now().micros().saturating_add(micros));
        let count = self
            .token()?
            .decrypt_loop(key_id(&job.key_id)?, threads, until)?;
        Ok(Outcome::Count(LoopCount {
            operations: count.operations,
            waits: count.waits,
        }))
    }

    fn report(&self, job: &MakeReport) -> Result<Outcome, AdminError> {
        let pin = read(job.pin.as_ref())?;
        let report = self.token()?.report(pin.as_ref(), job.write, job.serial)?;
        let text = serde_json::to_string(&report)
            .map_err(|error| AdminError::Token(format!("cannot encode the report: {error}")))?;
        Ok(Outcome::Report(text))
    }
}

struct Parsed {
    settings: Settings,
    record: PinRecord,
}

fn parse(setup: Option<&Setup>) -> Result<Parsed, AdminError> {
    let setup = setup.ok_or_else(|| AdminError::Token("the request has no setup".to_owned()))?;
    Ok(Parsed {
        settings: Settings::from_setup(setup),
        record: PinRecord::new(StateDirectory::at(Path::new(&setup.state_directory)))
            .of_token(&setup.token_name)
            .of_copy(&setup.pin_record_name),
    })
}

/// Reads a PIN. Returns `None` for a token that is used without a login.
fn read(source: Option<&PinSource>) -> Result<Option<Pin>, AdminError> {
    source
        .ok_or_else(|| AdminError::Pin("the request has no source of a PIN".to_owned()))?
        .read()
        .map_err(|error| AdminError::Pin(error.to_string()))
}

/// Adds the path of the PIN file to the error about a rejected PIN.
fn of_pin(error: AdminError, source: Option<&PinSource>) -> AdminError {
    match (error, source.and_then(|source| source.source.as_ref())) {
        (AdminError::Pin(detail), Some(Source::File(path))) => {
            AdminError::Pin(format!("PIN file {path}: {detail}"))
        }
        (error, _) => error,
    }
}

fn key_id(bytes: &[u8]) -> Result<WrappingKeyId, AdminError> {
    WrappingKeyId::from_slice(bytes)
        .ok_or_else(|| AdminError::Untrusted("the key id does not have 16 bytes".to_owned()))
}

fn list_tokens(settings: &Settings) -> Result<Outcome, AdminError> {
    let tokens = admin::list_tokens(settings)?.iter().map(entry).collect();
    Ok(Outcome::Tokens(TokenList { tokens }))
}

fn init_token(job: &InitToken) -> Result<Outcome, AdminError> {
    let parsed = parse(job.setup.as_ref())?;
    let (so, user) = (job.so_pin.as_ref(), job.user_pin.as_ref());
    let (so_pin, user_pin) = both_pins("initialising a token", so, user)?;
    let erase = (!job.erase_serial.is_empty()).then_some(job.erase_serial.as_str());
    let made = admin::init_token(&parsed.settings, &job.label, &so_pin, &user_pin, erase);
    let info = made.map_err(|error| of_either_pin(error, so, user))?;
    Ok(with_new_pin(&parsed, &info))
}

fn set_user_pin(job: &SetUserPin) -> Result<Outcome, AdminError> {
    let parsed = parse(job.setup.as_ref())?;
    let (so, user) = (job.so_pin.as_ref(), job.user_pin.as_ref());
    let (so_pin, user_pin) = both_pins("setting the user PIN", so, user)?;
    let set = admin::reset_user_pin(&parsed.settings, &job.serial, &so_pin, &user_pin);
    let info = set.map_err(|error| of_either_pin(error, so, user))?;
    Ok(with_new_pin(&parsed, &info))
}

/// Reads the PINs of the security officer and of the user. `what` is the beginning of the error message.
fn both_pins(
    what: &str,
    so: Option<&PinSource>,
    user: Option<&PinSource>,
) -> Result<(Pin, Pin), AdminError> {
    let no_pin = || {
        AdminError::Pin(format!(
            "{what} needs the PINs of the security officer and of the user"
        ))
    };
    let so_pin = read(so)?.ok_or_else(no_pin)?;
    let user_pin = read(user)?.ok_or_else(no_pin)?;
    Ok((so_pin, user_pin))
}

/// Names the source of the PIN that caused the error: that of the user for a new PIN, otherwise that of the security officer.
fn of_either_pin(
    error: AdminError,
    so: Option<&PinSource>,
    user: Option<&PinSource>,
) -> AdminError {
    match error {
        AdminError::NewPin(detail) => of_pin(AdminError::Pin(detail), user),
        error => of_pin(error, so),
    }
}

/// The outcome for a token with a new user PIN. The record of PINs forgets the former PINs of the token.
fn with_new_pin(parsed: &Parsed, info: &keybroker_worker_protocol::TokenInfo) -> Outcome {
    let mut entry = entry(&admin::Listed::of(info));
    entry.note = note_of_forgotten(parsed, &info.serial);
    Outcome::Token(entry)
}

/// Removes the PINs of a token from the record, because the token got a new user PIN. Returns a note for the operator if
/// this fails.
fn note_of_forgotten(parsed: &Parsed, serial: &str) -> String {
    match parsed.record.forget(serial) {
        Ok(()) => String::new(),
        Err(error) => format!(
            "cannot clear the record of PINs that this token rejected before it got its user PIN ({error}). If the broker \
             refuses to log in, run `keybroker token retry-pin`"
        ),
    }
}

fn entry(listed: &admin::Listed) -> TokenEntry {
    TokenEntry {
        slot: listed.slot,
        token: Some(listed.info.clone().into()),
        initialised: listed.initialised,
        pin_state: listed.pin_state.to_owned(),
        oaep: listed.oaep_bits.as_ref().map(|bits| OaepSupport {
            bits_min: *bits.start(),
            bits_max: *bits.end(),
        }),
        sha256_hmac: listed.sha256_hmac,
        note: String::new(),
        is_chosen: listed.is_chosen,
        is_login_of_another: false,
        pin_bytes_min: listed.pin_bytes[0],
        pin_bytes_max: listed.pin_bytes[1],
    }
}

fn key(checked: admin::CheckedKey) -> Outcome {
    Outcome::Key(CheckedKey {
        private_cka_id: checked.objects.private_bytes().to_vec(),
        integrity_cka_id: checked.objects.integrity_bytes().to_vec(),
        key: Some(TokenKey {
            id: checked.id.as_bytes().to_vec(),
            spki: checked.spki,
            algorithm: checked
                .algorithm
                .map_or(0, |algorithm| algorithm.number().into()),
            sealing: Sealing::of(checked.sealing).into(),
        }),
        is_sealed: checked.purpose == Purpose::Sealed,
        modulus_bits: u32::try_from(checked.modulus_bits).unwrap_or(u32::MAX),
        private_key: checked.private.iter().map(finding).collect(),
        integrity_key: checked.integrity_key.iter().map(finding).collect(),
        problem: checked.problem.unwrap_or_default(),
        not_tried: checked.not_tried.into_iter().map(str::to_owned).collect(),
        integrity_key_file: checked.integrity_key_file.unwrap_or_default(),
    })
}

fn organization_key(key: keys::OrganizationKey) -> Outcome {
    Outcome::OrganizationKey(OrganizationKey {
        spki: key.public.spki,
        attributes: key.findings.iter().map(finding).collect(),
    })
}

fn finding(finding: &Finding) -> AttributeFinding {
    AttributeFinding {
        attribute: finding.attribute.to_owned(),
        verdict: finding.to_string(),
        passes: finding.passes(),
    }
}
