//! The report on a token: its identity, its abilities, and the forbidden operations that it performs. All tests use
//! session keys. Temporary keys on the token are made only if the operator allows them, and are removed.
//!
//! Mitigation: M16 of `THREAT_MODEL.md`.

use std::fs;

use aws_lc_rs::digest;
use cryptoki::{
    error::Error,
    mechanism::Mechanism,
    object::{Attribute, AttributeType, KeyType, ObjectClass, ObjectHandle},
    session::UserType,
};

use keybroker_core::{envelope::Algorithm, key::ObjectId};
use keybroker_pkcs11_ffi::{Session, TokenInfo};
use keybroker_worker_protocol::{
    IntegrityKey, Pin, Settings,
    report::{
        Answer, Attribute as AttributeRow, FORMAT, Identity, NegativeAnswer, Outcome, REMOVED,
        Report, SUCCEEDED, Verdict, WORKS,
    },
    unpadded,
};

use crate::{
    attribute_check::{self, Finding, Rule},
    calling,
    classify::{Class, Fault},
    keys::{self, HmacKey, KeyPair, Lifetime, PublicSide, Terms},
    mac_key::{MacKey, WorkerKey},
    negative::survey::{Found, survey},
    open::{OpenToken, auth_pin},
    operation::SelfTest,
    select,
};

mod abilities;
mod rates;
pub(crate) mod sealed;

pub(crate) use rates::{Counted, waits_of_this_thread};

/// Largest number of sessions that are opened to find the token's limit.
const SESSIONS_MAX: usize = 64;
const MODULUS_BITS: u32 = 2_048;
const OLD_HANDLE: &str = "a handle of a session key from before C_Logout";
/// Number of digits of a time in the form `YYYYMMDDhhmmss00`.
const CLOCK_DIGITS: usize = 16;

/// The operator's permissions.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Allowed {
    /// Whether temporary keys may be made on the token.
    pub(crate) write: bool,
    /// Whether the report may contain the serial number.
    pub(crate) serial: bool,
}

/// The kind of a key that has a template.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    IntegrityKey(HmacKey),
    RsaPair,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::IntegrityKey(_) => "integrity key",
            Self::RsaPair => "RSA private key",
        }
    }

    fn rules(self) -> &'static [Rule] {
        match self {
            Self::IntegrityKey(_) => attribute_check::INTEGRITY_KEY,
            Self::RsaPair => attribute_check::RSA_PRIVATE,
        }
    }

    /// Returns the template for a session key, without the attributes whose names are in `left_out`.
    fn template(self, left_out: &[&str]) -> Vec<Attribute> {
        let id = keys::no_id();
        let template = match self {
            Self::IntegrityKey(kind) => keys::integrity_template(kind, id, &ObjectId::from(id)),
            Self::RsaPair => keys::private_template(id),
        };
        keys::adapted(template, Lifetime::Session, |attribute| {
            left_out.contains(&name_of(attribute).as_str())
        })
    }

    /// Returns the attributes of the template for which an exception is permitted.
    fn exceptable(self) -> Vec<String> {
        let template = self.template(&[]);
        let excepted = template
            .iter()
            .filter(|attribute| attribute_check::exceptable(attribute.attribute_type()).is_some());
        excepted.map(name_of).collect()
    }

    /// Makes a session key.
    fn make(self, session: &Session, bits: u32, left_out: &[&str]) -> Result<ObjectHandle, Error> {
        let template = self.template(left_out);
        if let Self::IntegrityKey(kind) = self {
            let mechanism = keys::integrity_mechanism(kind).map_err(|_| Error::NotSupported)?;
            calling::next("C_GenerateKey");
            return session.generate_key(&mechanism, &template);
        }
        let public = keys::public_template(keys::no_id(), bits);
        let public = keys::adapted(public, Lifetime::Session, |_| false);
        calling::next("C_GenerateKeyPair");
        let (_, private) =
            session.generate_key_pair(&Mechanism::RsaPkcsKeyPairGen, &public, &template)?;
        Ok(private)
    }
}

/// Returns the name of an attribute in the standard.
fn name_of(attribute: &Attribute) -> String {
    attribute.attribute_type().to_string()
}

/// Returns the return code of a failure, without the name of the function. The name of the test already identifies the
/// function.
fn code(error: &Error) -> String {
    match error {
        Error::Pkcs11(code, _) => format!("{code:?}"),
        other => other.to_string(),
    }
}

fn answer<T>(name: impl Into<String>, result: &Result<T, Error>) -> Answer {
    let result = result.as_ref().err();
    told(name, result.map_or_else(|| WORKS.to_owned(), code))
}

fn told(name: impl Into<String>, result: impl Into<String>) -> Answer {
    Answer {
        name: name.into(),
        result: result.into(),
    }
}

/// Session keys with all attributes that the token accepts.
struct Probe {
    pair: KeyPair,
    public: PublicSide,
    self_test: SelfTest,
}

/// The findings so far.
#[derive(Default)]
struct Findings {
    integrity_key: IntegrityKey,
    exceptions: Vec<String>,
    allow_oaep_sha1: bool,
    /// Reasons why the token cannot be used.
    reasons: Vec<String>,
}

impl Findings {
    fn cannot_make(&mut self, kind: Kind, error: &Error) {
        let reason = format!("the token makes no {}: {}", kind.name(), code(error));
        self.reasons.push(reason);
    }

    /// Returns the settings that the token needs.
    fn settings(&self, settings: &Settings) -> Settings {
        Settings {
            attribute_exceptions: self.exceptions.clone(),
            integrity_key: self.integrity_key,
            allow_oaep_sha1: self.allow_oaep_sha1,
            spared_tests: Vec::new(),
            ..settings.clone()
        }
    }

    fn except(&mut self, attribute: &str) {
        if !self.exceptions.iter().any(|name| name == attribute) {
            self.exceptions.push(attribute.to_owned());
        }
    }
}

/// Makes the report and logs out at the end.
pub(crate) fn make(
    token: &OpenToken,
    settings: &Settings,
    pin: Option<&Pin>,
    allowed: Allowed,
) -> Result<Report, Fault> {
    calling::next("C_GetTokenInfo");
    let info = token.module.get_token_info(token.slot)?;
    let mut findings = Findings::default();
    let mut report = Report {
        format: FORMAT,
        keybroker: env!("CARGO_PKG_VERSION").to_owned(),
        verdict: Verdict {
            result: Outcome::Refused,
            reasons: Vec::new(),
            attribute_exceptions: Vec::new(),
            allow_oaep_sha1: false,
            settings: Vec::new(),
        },
        identity: identity(token, settings, &info, allowed)?,
        sessions: sessions(token, pin),
        templates: Vec::new(),
        positive: Vec::new(),
        negative: Vec::new(),
        sealed: None,
        errors: Vec::new(),
        token_objects: Vec::new(),
        rates: rates::of_opening(token).collect(),
        token_cpu_is_local: None,
    };
    let keeper = token.session(&[])?;
    let session = &keeper.session;
    let (mut probe, mut sealed) = (None, None);
    let secret = integrity_key(session, settings, &mut report, &mut findings)?;
    let private = made(session, Kind::RsaPair)
        .map(|made| templates(session, Kind::RsaPair, &made, &mut report, &mut findings))
        .map_err(|error| findings.cannot_make(Kind::RsaPair, &error))
        .ok();
    if let (Some(secret), Some(private)) = (secret, private) {
        let pair = keys::session_pair(private, secret);
        let public = keys::public_side(session, &pair)?;
        abilities::try_all(session, &pair, &public, &mut report)?;
        if let Some(self_test) = chosen(&report, &public, &mut findings)? {
            let probe = probe.insert(Probe {
                pair,
                public,
                self_test,
            });
            negative(token, probe, &mut report, &mut findings)?;
            abilities::wrong_input(token, probe, &mut report)?;
            let left_out = left_out(&report).map(str::to_owned).collect();
            let algorithm = probe.self_test.algorithm();
            let tests = sealed::Tests::without_template(token, session, left_out, algorithm)?;
            let tests = sealed.insert(tests);
            let settings = findings.settings(settings);
            rates::measure(token, probe, tests.working(), &settings, &mut report)?;
        }
    }
    if allowed.write {
        on_token(token, settings, &findings, &mut report)?;
    }
    report.sealed = sealed.map(sealed::Tests::with_template).transpose()?;
    after_logout(token, pin, probe.as_ref(), session, &mut report);
    report.verdict = verdict(settings, findings);
    Ok(report)
}

/// Describes the token and its module, with the serial number.
pub(crate) fn identity_of(token: &OpenToken, settings: &Settings) -> Result<Identity, Fault> {
    calling::next("C_GetTokenInfo");
    let info = token.module.get_token_info(token.slot)?;
    let allowed = Allowed {
        write: false,
        serial: true,
    };
    identity(token, settings, &info, allowed)
}

fn identity(
    token: &OpenToken,
    settings: &Settings,
    info: &TokenInfo,
    allowed: Allowed,
) -> Result<Identity, Fault> {
    let unreadable = |error: std::io::Error| {
        Fault::new(
            Class::NoToken,
            format!("cannot read {}: {error}", settings.module.display()),
        )
    };
    let bytes = fs::read(&settings.module).map_err(unreadable)?;
    let file = settings.module.file_name().unwrap_or_default();
    calling::next("C_GetInfo");
    let library = token.module.get_library_info()?;
    let version = |(major, minor): (u8, u8)| format!("{major}.{minor}");
    let serial = unpadded(info.serial_number());
    let same_label = select::list(&token.module)?
        .iter()
        .filter(|(_, other)| unpadded(other.label()) == token.info.label)
        .count();
    let clock = info.utc_time();
    Ok(Identity {
        module: file.to_string_lossy().into_owned(),
        module_sha256: sha256(&bytes),
        module_bytes: u64::try_from(bytes.len()).unwrap_or(u64::MAX),
        cryptoki_version: library.cryptoki_version().to_string(),
        library: format!(
            "{}, {}, {}",
            unpadded(library.manufacturer_id()),
            unpadded(library.library_description()),
            library.library_version()
        ),
        manufacturer: unpadded(info.manufacturer_id()).to_owned(),
        model: unpadded(info.model()).to_owned(),
        hardware_version: version(info.hardware_version()),
        firmware_version: version(info.firmware_version()),
        serial: allowed.serial.then(|| serial.to_owned()),
        has_serial: !serial.is_empty(),
        label_is_shared: same_label > 1,
        padded_with_nul: info.label().contains('\0') || info.model().contains('\0'),
        clock: if !info.clock_on_token() {
            "none".to_owned()
        } else if clock.len() == CLOCK_DIGITS && clock.bytes().all(|byte| byte.is_ascii_digit()) {
            "valid".to_owned()
        } else {
            "not a time".to_owned()
        },
        flags: format!("{:#x}", info.flags()),
        pin_bytes: [info.min_pin_length(), info.max_pin_length()]
            .map(|length| u64::try_from(length).unwrap_or(u64::MAX)),
        sessions_max: [info.max_session_count(), info.max_rw_session_count()],
    })
}

fn sha256(bytes: &[u8]) -> String {
    hex::encode(digest::digest(&digest::SHA256, bytes))
}

fn sessions(token: &OpenToken, pin: Option<&Pin>) -> Vec<Answer> {
    calling::next("C_OpenSession");
    let read_only = token.module.open_ro_session(token.slot);
    let read_write = token.module.open_rw_session(token.slot);
    let mut answers = vec![
        answer("a read-only session", &read_only),
        answer("a read-write session", &read_write),
    ];
    let mut open = Vec::new();
    let mut limit = None;
    while open.len() < SESSIONS_MAX && limit.is_none() {
        match keys::reading_session(&token.module, token.slot) {
            Ok(session) => open.push(session),
            Err(fault) => limit = Some(fault),
        }
    }
    answers.push(told(
        format!("up to {SESSIONS_MAX} more sessions"),
        limit.map_or_else(
            || WORKS.to_owned(),
            |fault| format!("{}: {fault}", open.len()),
        ),
    ));
    drop(open);
    if let Some(pin) = pin {
        calling::next("C_Login");
        let again = token.anchor.login(UserType::User, Some(&auth_pin(pin)));
        answers.push(answer("a second login", &again));
    }
    answers
}

/// Tests which sessions a logout ends, and whether the handle of a key is still valid after the next login. The test of
/// the logout is the last part of the report.
fn after_logout(
    token: &OpenToken,
    pin: Option<&Pin>,
    probe: Option<&Probe>,
    session: &Session,
    report: &mut Report,
) {
    calling::next("C_Logout");
    let ended = token.anchor.logout();
    if ended.is_err() {
        report.sessions.push(answer("C_Logout", &ended));
        return;
    }
    calling::next("C_FindObjects");
    let found = token
        .anchor
        .find_objects(&[Attribute::Class(ObjectClass::PRIVATE_KEY)]);
    report.sessions.push(told(
        "private keys visible after C_Logout",
        found.map_or_else(|error| code(&error), |found| found.len().to_string()),
    ));
    // The report logs in again only with a PIN that the token has already accepted from this process.
    let (Some(pin), Some(probe), false) = (pin, probe, token.is_login_of_another) else {
        return;
    };
    calling::next("C_Login");
    let again = token.anchor.login(UserType::User, Some(&auth_pin(pin)));
    report
        .sessions
        .push(answer("a login after C_Logout", &again));
    if again.is_err() {
        return;
    }
    calling::next("C_Decrypt");
    let used = session.decrypt(
        &probe.self_test.mechanism(),
        probe.pair.private,
        probe.self_test.wrapped(),
    );
    report.sessions.push(match used {
        Ok(plaintext) if plaintext != probe.self_test.plaintext() => {
            told(OLD_HANDLE, "another plaintext")
        }
        used => answer(OLD_HANDLE, &used),
    });
    // If the logout fails, the token logs out when the process ends.
    let _ended = token.anchor.logout();
}

/// A session key, and the attributes that the token refused in the key's template, each with the return code.
struct Made {
    object: ObjectHandle,
    refused: Vec<(String, String)>,
}

/// Makes a key with all attributes that the token accepts. If the token refuses the template, tries each attribute
/// separately.
fn made(session: &Session, kind: Kind) -> Result<Made, Error> {
    if let Ok(object) = kind.make(session, MODULUS_BITS, &[]) {
        return Ok(Made {
            object,
            refused: Vec::new(),
        });
    }
    let exceptable = kind.exceptable();
    let all: Vec<&str> = exceptable.iter().map(String::as_str).collect();
    destroy(session, kind.make(session, MODULUS_BITS, &all)?);
    let mut refused = Vec::new();
    for name in &all {
        let others: Vec<&str> = all.iter().copied().filter(|other| other != name).collect();
        match kind.make(session, MODULUS_BITS, &others) {
            Ok(object) => destroy(session, object),
            Err(error) => refused.push(((*name).to_owned(), code(&error))),
        }
    }
    let left_out: Vec<&str> = refused.iter().map(|(name, _)| name.as_str()).collect();
    Ok(Made {
        object: kind.make(session, MODULUS_BITS, &left_out)?,
        refused,
    })
}

/// Returns an integrity key of the first kind that the token can make. The kind of integrity key in the settings is
/// tried first. If the token makes no integrity key, returns a key in the memory of this process, provided that the
/// settings permit such a key.
fn integrity_key(
    session: &Session,
    settings: &Settings,
    report: &mut Report,
    findings: &mut Findings,
) -> Result<Option<MacKey>, Fault> {
    let mut first = None;
    for kind in HmacKey::all_with_first(settings.integrity_key).map(Kind::IntegrityKey) {
        match made(session, kind) {
            Ok(made) => {
                if let Kind::IntegrityKey(kind) = kind {
                    findings.integrity_key = kind.setting();
                }
                let object = templates(session, kind, &made, report, findings);
                return Ok(Some(object.into()));
            }
            Err(error) => {
                first.get_or_insert((kind, error));
            }
        }
    }
    if settings.permits_integrity_key_in_worker() {
        findings.integrity_key = IntegrityKey::Worker;
        return Ok(Some(MacKey::InWorker(Some(WorkerKey::random()?))));
    }
    if let Some((kind, error)) = first {
        findings.cannot_make(kind, &error);
    }
    Ok(None)
}

/// Tests how the token handles each attribute of a template. Returns the key that was made.
fn templates(
    session: &Session,
    kind: Kind,
    made: &Made,
    report: &mut Report,
    findings: &mut Findings,
) -> ObjectHandle {
    let Made { object, refused } = made;
    let object = *object;
    for attribute in kind.template(&[]) {
        let name = name_of(&attribute);
        let refusal = refused.iter().find(|(refused, _)| *refused == name);
        let attribute_type = attribute.attribute_type();
        calling::next("C_GetAttributeValue");
        let read = session.attribute(object, attribute_type);
        let in_template = match (refusal, &read) {
            (Some((_, code)), _) => code.clone(),
            (None, Ok(Some(found))) if *found != attribute => "ignored".to_owned(),
            _ => "accepted".to_owned(),
        };
        let length = session.attribute_by_length_query(object, attribute_type);
        report.templates.push(AttributeRow {
            object: kind.name().to_owned(),
            attribute: name,
            in_template,
            read: shown(&read, &attribute),
            length_query: shown(&length, &attribute),
        });
    }
    for (name, _) in refused {
        findings.except(name);
    }
    for rule in kind.rules() {
        check_attribute(session, object, rule, kind, findings);
    }
    object
}

fn shown(read: &Result<Option<Attribute>, Error>, asked: &Attribute) -> String {
    match read {
        Ok(Some(found)) if found == asked => "as asked".to_owned(),
        Ok(Some(_)) => "another value".to_owned(),
        Ok(None) => "absent".to_owned(),
        Err(error) => code(error),
    }
}

/// Checks one rule. Records the exception that the attribute needs, or the reason why the token cannot be used.
fn check_attribute(
    session: &Session,
    object: ObjectHandle,
    rule: &Rule,
    kind: Kind,
    findings: &mut Findings,
) {
    let (name, attribute_type, _) = rule;
    // The key is a session key, so `CKA_TOKEN` is not checked.
    if *attribute_type == AttributeType::Token || findings.exceptions.iter().any(|it| it == name) {
        return;
    }
    let checked = attribute_check::inspect(session, object, std::slice::from_ref(rule), &[]);
    let (is_absent, reason) = match checked {
        Ok(found) if found.iter().all(Finding::passes) => return,
        Ok(found) => (
            found.iter().all(Finding::is_absent),
            found.iter().map(ToString::to_string).collect(),
        ),
        Err(fault) => (true, vec![fault.to_string()]),
    };
    if is_absent && attribute_check::exceptable(*attribute_type).is_some() {
        findings.except(name);
    } else {
        let reason: Vec<String> = reason;
        let reason = format!("{}: {}", kind.name(), reason.join("; "));
        findings.reasons.push(reason);
    }
}

fn destroy(session: &Session, object: ObjectHandle) {
    calling::next("C_DestroyObject");
    // If the removal fails, the token removes the object when the session ends.
    let _destroyed = session.destroy_object(object);
}

/// Creates the self-test for the algorithm that the token supports, according to the results so far.
fn chosen(
    report: &Report,
    public: &PublicSide,
    findings: &mut Findings,
) -> Result<Option<SelfTest>, Fault> {
    let works = |name: &str| {
        let found = report.positive.iter().find(|answer| answer.name == name);
        found.is_some_and(|answer| answer.result == WORKS)
    };
    let is_on_token = findings.integrity_key != IntegrityKey::Worker;
    for name in [abilities::MAC, abilities::VERIFY] {
        if is_on_token && !works(name) {
            findings.reasons.push(format!("{name} does not work"));
        }
    }
    let algorithm = if works(abilities::OAEP_SHA256) {
        Algorithm::RsaOaepSha256
    } else if works(abilities::OAEP_SHA1) {
        findings.allow_oaep_sha1 = true;
        Algorithm::RsaOaepSha1
    } else {
        let reason = "the token supports RSA-OAEP neither with SHA-256 nor with SHA-1";
        findings.reasons.push(reason.to_owned());
        return Ok(None);
    };
    SelfTest::new(public, algorithm).map(Some)
}

fn negative(
    token: &OpenToken,
    probe: &Probe,
    report: &mut Report,
    findings: &mut Findings,
) -> Result<(), Fault> {
    let open = || token.session(&[]);
    for tried in survey(open, &probe.pair, &probe.public, &probe.self_test)? {
        let test = tried.test;
        let (result, code) = match &tried.found {
            Found::Succeeded => (SUCCEEDED, None),
            Found::Nothing => ("refused", None),
            Found::NotMade => ("not made", None),
            Found::Refused(error) => ("refused", Some(code(error))),
            Found::NotAnswered(error) => ("not answered", Some(code(error))),
        };
        match (&tried.found, test.accepted_by) {
            (Found::Succeeded, Some(exception)) => findings.except(exception),
            (Found::Succeeded, None) => {
                let reason = format!("{} (test `{}`)", test.meaning, test.name);
                findings.reasons.push(reason);
            }
            _ => {}
        }
        report.negative.push(NegativeAnswer {
            name: test.name.to_owned(),
            meaning: test.meaning.to_owned(),
            result: result.to_owned(),
            code,
            session_is_usable: tried.session_is_usable,
        });
    }
    Ok(())
}

/// Makes keys on the token, finds them with another session, checks them and removes them.
fn on_token(
    token: &OpenToken,
    settings: &Settings,
    findings: &Findings,
    report: &mut Report,
) -> Result<(), Fault> {
    calling::next("C_OpenSession");
    let writing = token.module.open_rw_session(token.slot)?;
    // This session is opened before any key is created. If no session is free, no key remains on the token.
    let other = token.session(&[])?;
    let settings = findings.settings(settings);
    let made = match keys::generate(&writing, MODULUS_BITS, Terms::of(&settings)) {
        Ok(made) => made,
        Err(refusal) => {
            let result = refusal.fault.to_string();
            report
                .token_objects
                .push(told("keys that stay on the token", result));
            return Ok(());
        }
    };
    let result =
        |fault: Option<Fault>| fault.map_or_else(|| WORKS.to_owned(), |fault| fault.to_string());
    let found = keys::find(&other.session, &made.pair.place());
    let checked = match &found {
        Ok(pair) => match keys::inspect(&other.session, pair, &settings) {
            Ok(verdict) => {
                let wrong = verdict.private.iter().chain(&verdict.integrity_key);
                let wrong: Vec<String> = wrong
                    .filter(|finding| !finding.passes())
                    .map(ToString::to_string)
                    .collect();
                if wrong.is_empty() {
                    WORKS.to_owned()
                } else {
                    wrong.join("; ")
                }
            }
            Err(fault) => fault.to_string(),
        },
        Err(_) => "not made".to_owned(),
    };
    let removed = made.remove(&writing);
    report.token_objects.extend([
        told("keys that stay on the token", WORKS),
        told("found by another session", result(found.err())),
        told("attribute check", checked),
        told(REMOVED, result(removed.err())),
    ]);
    Ok(())
}

fn verdict(settings: &Settings, findings: Findings) -> Verdict {
    let Findings {
        integrity_key,
        exceptions,
        allow_oaep_sha1,
        reasons,
    } = findings;
    if !reasons.is_empty() {
        return Verdict {
            result: Outcome::Refused,
            reasons,
            attribute_exceptions: exceptions,
            allow_oaep_sha1,
            settings: Vec::new(),
        };
    }
    let file = settings.module.file_name().unwrap_or_default();
    let mut lines = vec![format!("module = \"/path/to/{}\"", file.display())];
    // The report omits the content of `initialize_string`, because reports are published and the content may include
    // names and passwords.
    lines.extend(
        settings
            .initialize_string
            .iter()
            .map(|_| "initialize_string = \"…\"".to_owned()),
    );
    if allow_oaep_sha1 {
        lines.push("allow_oaep_sha1 = true".to_owned());
    }
    if integrity_key != IntegrityKey::default() {
        lines.push(format!("integrity_key = {:?}", integrity_key.as_str()));
    }
    if !exceptions.is_empty() {
        lines.push(format!("attribute_exceptions = {exceptions:?}"));
    }
    let mut accepted: Vec<String> = attribute_check::exceptions_in_use(&exceptions)
        .map(|exception| format!("{}: {}", exception.attribute, exception.gives_away))
        .collect();
    if integrity_key == IntegrityKey::Worker {
        let risk = attribute_check::INTEGRITY_KEY_IN_WORKER;
        accepted.push(format!("the token makes no integrity key: {risk}"));
    }
    Verdict {
        result: if accepted.is_empty() {
            Outcome::Works
        } else {
            Outcome::WorksWithExceptions
        },
        reasons: accepted,
        attribute_exceptions: exceptions,
        allow_oaep_sha1,
        settings: lines,
    }
}

/// Returns the attributes that the token does not accept in the template of an RSA private key.
fn left_out(report: &Report) -> impl Iterator<Item = &str> {
    report
        .templates
        .iter()
        .filter(|row| row.object == Kind::RsaPair.name())
        .filter(|row| !matches!(row.in_template.as_str(), "accepted" | "ignored"))
        .map(|row| row.attribute.as_str())
}

/// Returns the template of a secret key of this type for tests.
fn secret_template(key_type: KeyType) -> Vec<Attribute> {
    vec![
        Attribute::Class(ObjectClass::SECRET_KEY),
        Attribute::KeyType(key_type),
        Attribute::Token(false),
        Attribute::Sign(true),
        Attribute::Verify(true),
    ]
}
