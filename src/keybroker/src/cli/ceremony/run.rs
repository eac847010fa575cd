//! `keybroker ceremony run`: does every step of a plan, and writes the transcript after each step.

use std::{
    collections::BTreeSet,
    fs::File,
    path::{Path, PathBuf},
};

use base64ct::{Base64, Encoding as _};
use clap::Args;
use serde_json::json;
use zeroize::Zeroizing;

use keybroker_audit::Entry;
use keybroker_ceremony::{
    complete, page,
    plan::Plan,
    script::{self, Action, Step},
    sha256_hex,
    share::{self, Share},
    signatures::{SignatureAlgorithm, Signatures, TokenSignature},
    transcript::{self, Attribute, Identity, ShareDigest, SigningKey, SoPin, Status, Transcript},
    verify,
};
use keybroker_core::{
    call::Timestamp,
    key::{IntegrityPlace, ObjectId, Purpose, WrappingKeyId},
};
use keybroker_hsm::admin::{self, Admin, CheckedKey, Finding};
use keybroker_store as store;
use keybroker_store::RegistryRow;
use keybroker_worker_protocol::{Pin, PinSource};

use crate::{
    cli::{
        Context, OWN_PROGRAM, block_on, change, environment,
        exit::{Exit, Failure},
        key,
        pin::{self, UserPin, log_in, serials},
    },
    config::Config,
    output_file,
};

use super::{
    Files, checks, internal, read_plan,
    shares::{Display, Terminal},
    usage,
};

/// What a person does if only the user PIN is missing. Erasing the token is not needed, because the shares are valid.
const HINT_OF_INITIALISATION: &str = "if the token is initialised but has no user PIN, do not erase it: `keybroker ceremony unlock-pin` \
     with `--serial` sets the user PIN with the shares";
/// What a new signing key signs, to show that the token can sign.
const TRIAL: &str = "keybroker-ceremony-trial/1\n";

#[derive(Args, Debug)]
pub(in crate::cli) struct Run {
    /// Plan of the ceremony
    plan: PathBuf,
    /// File for the transcript; the signatures and the page to print are beside it [default: `transcript.json` beside the plan]
    #[arg(long, value_name = "FILE")]
    transcript: Option<PathBuf>,
    #[command(flatten)]
    pin: UserPin,
}

pub(super) fn run(arguments: &Run, context: &Context) -> Result<(), Failure> {
    let text = read_plan(&arguments.plan)?;
    let plan = parse(&arguments.plan, &text)?;
    let transcript = match &arguments.transcript {
        Some(path) => path.clone(),
        None => arguments.plan.with_file_name("transcript.json"),
    };
    let splits = plan.tokens.iter().any(|token| token.initialise);
    let display = if splits {
        Display::Terminal(Terminal::open()?)
    } else {
        Display::Nowhere
    };
    let files = Files::beside(&transcript);
    let ceremony = Ceremony::prepare(context, plan, &text, files, &arguments.pin, display)?;
    let ended = ceremony.run()?;
    ended.show(context)
}

/// Parses a plan, with the name of its file in the error.
pub(super) fn parse(path: &Path, text: &str) -> Result<Plan, Failure> {
    Plan::parse(text).map_err(|error| {
        usage(format!("{}:\n  {error}", path.display()))
            .hint("docs/ceremony.md explains every field of a plan")
    })
}

/// A ceremony that came to its end.
pub(super) struct Ended {
    pub(super) transcript: Transcript,
    sha256: String,
    files: Files,
}

impl Ended {
    fn show(&self, context: &Context) -> Result<(), Failure> {
        let transcript = self.files.transcript.display().to_string();
        let plan = self.transcript.plan().map_err(|error| internal(&error))?;
        for line in script::afterwards(&plan, &transcript) {
            context.output.note(&line);
        }
        context.output.fields(vec![
            ("transcript", json!(transcript)),
            ("sha256", json!(self.sha256)),
            (
                "signatures",
                json!(self.files.signatures.display().to_string()),
            ),
            ("page", json!(self.files.page.display().to_string())),
        ])
    }
}

/// A ceremony in progress.
pub(super) struct Ceremony<'a> {
    context: &'a Context,
    plan: Plan,
    files: Files,
    transcript: Transcript,
    tokens: Vec<Open>,
    /// The registered keys. `None` if the plan registers no key.
    registry: Option<Vec<RegistryRow>>,
    display: Display,
    /// SHA-256 of the signed transcript. `None` until it is written.
    signed: Option<String>,
    /// Kept until the end, so that no broker uses a SQLite database meanwhile.
    _lock: Option<store::StoreLock>,
}

/// A token during the ceremony.
struct Open {
    config: Config,
    user_pin: PinSource,
    so_pin: Option<Zeroizing<String>>,
    admin: Option<Admin>,
    signing_key: Option<(ObjectId, Vec<u8>)>,
    /// The wrapping keys that were generated, in the order of the plan.
    keys: Vec<CheckedKey>,
}

impl Open {
    fn admin(&self) -> Result<&Admin, Failure> {
        self.admin
            .as_ref()
            .ok_or_else(|| lacking("the token is not open"))
    }

    fn log_in(&self, registry: &[RegistryRow]) -> Result<Admin, Failure> {
        log_in(&self.config, &self.user_pin, true, &serials(registry))
    }
}

impl<'a> Ceremony<'a> {
    /// Checks that nothing exists yet that the plan makes, and begins the transcript. Until then, nothing is changed.
    pub(super) fn prepare(
        context: &'a Context,
        plan: Plan,
        text: &str,
        files: Files,
        pin: &UserPin,
        display: Display,
    ) -> Result<Self, Failure> {
        let started = Timestamp::now();
        checks::files(&files)?;
        if pin.is_given() && plan.tokens.len() > 1 {
            return Err(usage(
                "an option selects one PIN, but the plan has several tokens: set `pin_file` for each token in the configuration"
                    .to_owned(),
            ));
        }
        let configs = configs(context, &plan)?;
        let (registry, lock) = registry(&plan, &configs)?;
        let mut tokens = Vec::new();
        for (planned, config) in plan.tokens.iter().zip(configs) {
            let user_pin = pin.get(config.token())?;
            checks::later_files(&config, &user_pin, &plan)?;
            let mut open = Open {
                config,
                user_pin,
                so_pin: None,
                admin: None,
                signing_key: None,
                keys: Vec::new(),
            };
            if planned.initialise {
                checks::is_blank(planned, &open.config, &open.user_pin)?;
            } else {
                let admin = open.log_in(registry.as_deref().unwrap_or_default())?;
                checks::has_no_key_of_plan(planned, &admin)?;
                open.admin = Some(admin);
            }
            tokens.push(open);
        }
        are_different(&plan, &tokens)?;
        let transcript = begin(&plan, text, started)?;
        let mut ceremony = Self {
            context,
            plan,
            files,
            transcript,
            tokens,
            registry,
            display,
            signed: None,
            _lock: lock,
        };
        ceremony.claim_files()?;
        Ok(ceremony)
    }

    /// Creates the files, so that no other process can use their names, and records the first step as done. The signatures
    /// and the page are empty until the end.
    fn claim_files(&mut self) -> Result<(), Failure> {
        for path in self.files.all() {
            File::create_new(path)
                .map_err(|error| usage(format!("cannot create {}: {error}", path.display())))?;
        }
        if let Some(first) = script::steps(&self.plan).first() {
            self.transcript.steps.push(transcript::Step {
                number: first.number,
                what: first.what.clone(),
                started: self.transcript.started.clone(),
                ended: Some(Timestamp::now().to_string()),
                result: "done".to_owned(),
            });
        }
        self.write()
    }

    /// Does the steps, and signs the transcript.
    pub(super) fn run(mut self) -> Result<Ended, Failure> {
        let steps = script::steps(&self.plan);
        let all = steps.len();
        for step in steps {
            self.context
                .output
                .note(&format!("Step {} of {all}: {}", step.number, step.what));
            match step.action {
                Action::CheckNothingExists => {}
                Action::Sign => self.complete(&step)?,
                Action::Register => self.register(&step)?,
                _ => self.do_step(&step)?,
            }
        }
        let sha256 = self
            .signed
            .ok_or_else(|| lacking("the plan has no step that signs the transcript"))?;
        Ok(Ended {
            transcript: self.transcript,
            sha256,
            files: self.files,
        })
    }

    fn do_step(&mut self, step: &Step) -> Result<(), Failure> {
        self.begin_step(step)
            .map_err(|failure| self.explained(step, failure))?;
        let result = self.perform(step);
        self.recorded(step, result)
    }

    /// Records the result of a step. If this fails too, the failure of the step comes first.
    fn recorded(&mut self, step: &Step, result: Result<(), Failure>) -> Result<(), Failure> {
        let failure = match (self.end_step(&result), result) {
            (Ok(()), Ok(())) => return Ok(()),
            (Ok(()), Err(failure)) | (Err(failure), Ok(())) => failure,
            (Err(unwritten), Err(failure)) => Failure {
                message: format!("{failure}. The transcript does not say so: {unwritten}"),
                ..failure
            },
        };
        Err(self.explained(step, failure))
    }

    fn begin_step(&mut self, step: &Step) -> Result<(), Failure> {
        self.add_step(step);
        self.write()
    }

    fn add_step(&mut self, step: &Step) {
        self.transcript.steps.push(transcript::Step {
            number: step.number,
            what: step.what.clone(),
            started: Timestamp::now().to_string(),
            ended: None,
            result: "begun".to_owned(),
        });
    }

    fn end_step(&mut self, result: &Result<(), Failure>) -> Result<(), Failure> {
        if let Some(last) = self.transcript.steps.last_mut() {
            last.ended = Some(Timestamp::now().to_string());
            last.result = match result {
                Ok(()) => "done".to_owned(),
                Err(failure) => format!("failed: {failure}"),
            };
        }
        self.write()
    }

    /// Adds what a person does after a failed step.
    fn explained(&self, step: &Step, failure: Failure) -> Failure {
        let what = format!("step {} failed: {failure}", step.number);
        let hint = failure
            .hint
            .map_or_else(String::new, |hint| format!("{hint}. "));
        Failure::new(failure.exit, what).hint(format!(
            "{hint}{} is marked as incomplete and lists what was done; keep it, and read docs/ceremony.md, \"After a failed step\"",
            self.files.transcript.display()
        ))
    }

    fn perform(&mut self, step: &Step) -> Result<(), Failure> {
        let token = step
            .token
            .ok_or_else(|| lacking("the step names no token"))?;
        match step.action {
            Action::SplitSoPin => self.split_so_pin(token),
            Action::Initialise => self.initialise(token),
            Action::Identify => self.identify(token),
            Action::GenerateKey => self.generate_key(token, step.key.unwrap_or_default()),
            Action::GenerateSigningKey => self.generate_signing_key(token),
            Action::CheckNothingExists | Action::Sign | Action::Register => Ok(()),
        }
    }

    fn split_so_pin(&mut self, token: usize) -> Result<(), Failure> {
        let planned = &self.plan.tokens[token];
        let threshold = planned.so_pin_threshold.unwrap_or_default();
        let characters = planned.so_pin_characters();
        let custodians = &self.plan.custodians;
        let pin = share::random_pin(characters).map_err(|error| internal(&error))?;
        let shares =
            share::split(&pin, threshold, custodians.len()).map_err(|error| internal(&error))?;
        let names = custodians.iter().map(|one| one.name.clone());
        let shares: Vec<(String, Share)> = names.zip(shares).collect();
        self.display.show(&shares)?;
        self.transcript.tokens[token].so_pin = Some(SoPin {
            threshold: number(threshold),
            characters: number(characters),
            shares: shares
                .iter()
                .map(|(custodian, share)| ShareDigest {
                    number: share.number().into(),
                    custodian: custodian.clone(),
                    sha256: share.digest(),
                })
                .collect(),
        });
        self.tokens[token].so_pin = Some(pin);
        Ok(())
    }

    fn initialise(&mut self, token: usize) -> Result<(), Failure> {
        let open = &mut self.tokens[token];
        let pin = open.so_pin.take().ok_or_else(|| {
            lacking("the security officer's PIN was not made before the initialisation")
        })?;
        let pin = Pin::from_text(pin.to_string()).map_err(|error| internal(&error))?;
        let so_pin = PinSource::Text(pin);
        let label = self.plan.tokens[token].label.clone().unwrap_or_default();
        let (config, context) = (&open.config, self.context);
        let nothing_more = |_: &mut Entry| {};
        let info = change::audited(context, config, "token.init", nothing_more, || {
            let (info, note) = admin::init_token(
                Path::new(OWN_PROGRAM),
                config.token(),
                &pin::state(config),
                &label,
                &so_pin,
                &open.user_pin,
                None,
            )
            .map_err(|error| environment::explain(error, config))?;
            if let Some(note) = note {
                context.output.note(&format!("note: {note}"));
            }
            Ok(info)
        })
        .map_err(|failure: Failure| {
            let hint = failure
                .hint
                .as_ref()
                .map_or_else(String::new, |hint| format!("{hint}. "));
            failure.hint(format!("{hint}{HINT_OF_INITIALISATION}"))
        })?;
        self.transcript.tokens[token].initialised = true;
        self.transcript.tokens[token].initialised_serial = Some(info.serial);
        Ok(())
    }

    fn identify(&mut self, token: usize) -> Result<(), Failure> {
        let registry = self.registry.as_deref().unwrap_or_default();
        let open = &mut self.tokens[token];
        if open.admin.is_none() {
            open.admin = Some(open.log_in(registry)?);
        }
        let admin = open.admin()?;
        let found = admin.identity()?;
        self.transcript.tokens[token].identity = Some(Identity {
            module_sha256: found.module_sha256,
            library: found.library,
            label: admin.info().label.clone(),
            serial: admin.info().serial.clone(),
            manufacturer: found.manufacturer,
            model: found.model,
            hardware_version: found.hardware_version,
            firmware_version: found.firmware_version,
        });
        Ok(())
    }

    fn generate_key(&mut self, token: usize, index: usize) -> Result<(), Failure> {
        let open = &self.tokens[token];
        let planned = &self.plan.tokens[token].keys[index];
        let admin = open.admin()?;
        let make = || made_as_planned(admin, planned);
        let (context, config) = (self.context, &open.config);
        let checked = key::generate_without_registration(context, config, make)?;
        let key = described(&planned.name, &checked);
        self.transcript.tokens[token].keys.push(key);
        self.tokens[token].keys.push(checked);
        Ok(())
    }

    fn generate_signing_key(&mut self, token: usize) -> Result<(), Failure> {
        let open = &mut self.tokens[token];
        let (admin, config) = (open.admin()?, &open.config);
        let nothing_more = |_: &mut Entry| {};
        let key = change::audited(
            self.context,
            config,
            "ceremony.signing_key",
            nothing_more,
            || Ok(admin.make_signing_key()?),
        )?;
        self.transcript.tokens[token].signing_key = Some(SigningKey {
            id: key.object.to_string(),
            public_key: Base64::encode_string(&key.spki),
            fingerprint: sha256_hex(&key.spki),
            attributes: attributes(complete::SIGNING_KEY, &key.attributes),
        });
        open.signing_key = Some((key.object, key.spki));
        // A token that cannot sign is found before there is a wrapping key.
        self.signature(token, TRIAL).map(drop)
    }

    /// Registers a key after the transcript is complete and signed. A failure does not change the transcript.
    fn register(&self, step: &Step) -> Result<(), Failure> {
        let no_key = || lacking("the step names no key that the ceremony made");
        let (token, key) = step.token.zip(step.key).ok_or_else(no_key)?;
        let open = self.tokens.get(token).ok_or_else(no_key)?;
        let key = open.keys.get(key).ok_or_else(no_key)?;
        let rows = self.registry.as_deref().unwrap_or_default();
        key::register_generated(self.context, &open.config, open.admin()?, rows, key).map_err(
            |failure| {
                let what = format!("step {} failed: {failure}", step.number);
                Failure::new(failure.exit, what).hint(format!(
                    "the ceremony is complete and {} is signed by the token; only the registration is missing",
                    self.files.transcript.display()
                ))
            },
        )
    }

    /// Signs the complete transcript on every token. The file of the transcript becomes complete only with the signatures and
    /// the page.
    fn complete(&mut self, step: &Step) -> Result<(), Failure> {
        self.transcript.status = Status::Complete;
        self.transcript.ended = Timestamp::now().to_string();
        match self.signed().and_then(|signed| self.write_all(&signed)) {
            Ok(sha256) => {
                self.signed = Some(sha256);
                Ok(())
            }
            Err(failure) => {
                self.transcript.status = Status::Incomplete;
                self.add_step(step);
                self.recorded(step, Err(failure))
            }
        }
    }

    /// Writes the files of a complete ceremony, the transcript last. Returns the SHA-256 of the transcript.
    fn write_all(&self, (text, signatures): &(String, Signatures)) -> Result<String, Failure> {
        let sha256 = &signatures.transcript_sha256;
        let list = signatures.to_text().map_err(|error| internal(&error))?;
        replace(&self.files.signatures, &list)?;
        replace(
            &self.files.page,
            &page::of_transcript(&self.transcript, sha256),
        )?;
        replace(&self.files.transcript, text)?;
        Ok(sha256.clone())
    }

    fn signed(&self) -> Result<(String, Signatures), Failure> {
        let problems = complete::problems(&self.transcript, &self.plan);
        if !problems.is_empty() {
            return Err(Failure::new(Exit::Untrusted, problems.join("; ")));
        }
        let text = self
            .transcript
            .to_canonical()
            .map_err(|error| internal(&error))?;
        let mut signatures = Signatures::new(sha256_hex(text.as_bytes()));
        let statement = verify::statement(&signatures.transcript_sha256);
        for token in 0..self.tokens.len() {
            signatures.tokens.push(self.signature(token, &statement)?);
        }
        Ok((text, signatures))
    }

    /// A signature by the signing key of a token. The signature was verified with the public key.
    fn signature(&self, token: usize, message: &str) -> Result<TokenSignature, Failure> {
        let (open, name) = (&self.tokens[token], &self.transcript.tokens[token].name);
        let (object, public) = open.signing_key.as_ref().ok_or_else(|| {
            lacking(&format!(
                "the ceremony made no signing key on token {name:?}"
            ))
        })?;
        let made = open.admin()?.sign(object, message.as_bytes())?;
        let algorithm = if made.pss {
            SignatureAlgorithm::RsaPssSha256
        } else {
            SignatureAlgorithm::RsaPkcs1Sha256
        };
        if !verify::verifies(public, algorithm, message.as_bytes(), &made.signature) {
            let what = format!(
                "the signature of token {name:?} does not verify with the public key of its signing key"
            );
            return Err(Failure::new(Exit::Untrusted, what));
        }
        Ok(TokenSignature {
            token: name.clone(),
            algorithm,
            signature: Base64::encode_string(&made.signature),
        })
    }

    /// Writes the transcript so far.
    fn write(&mut self) -> Result<(), Failure> {
        self.transcript.ended = Timestamp::now().to_string();
        let text = self
            .transcript
            .to_canonical()
            .map_err(|error| internal(&error))?;
        replace(&self.files.transcript, &text)
    }
}

/// The failure if the steps of the ceremony contradict each other, which is an error of the program.
fn lacking(what: &str) -> Failure {
    Failure::new(Exit::Internal, format!("internal error: {what}"))
}

fn replace(path: &Path, text: &str) -> Result<(), Failure> {
    output_file::replace_durably(path, text)
        .map_err(|error| usage(format!("cannot write {}: {error}", path.display())))
}

/// Two entries of the plan must not select the same token.
fn are_different(plan: &Plan, tokens: &[Open]) -> Result<(), Failure> {
    let mut seen = BTreeSet::new();
    for (planned, open) in plan.tokens.iter().zip(tokens) {
        let Some(admin) = &open.admin else { continue };
        if !seen.insert((&planned.module, &admin.info().serial)) {
            let what = format!(
                "token {:?}: another token of the plan has the same serial number {:?}, so both are one token. Nothing was \
                 changed",
                planned.name,
                admin.info().serial
            );
            return Err(Failure::new(Exit::Token, what));
        }
    }
    Ok(())
}

fn number(value: usize) -> u64 {
    u64::try_from(value).unwrap_or(u64::MAX)
}

/// The configuration for each token of the plan, with this token selected.
fn configs(context: &Context, plan: &Plan) -> Result<Vec<Config>, Failure> {
    let config = context.config_for_tokens()?;
    let mut configs = Vec::new();
    for planned in &plan.tokens {
        let mut config = config.clone();
        config.select_token(Some(&planned.name))?;
        checks::settings(planned, config.token())?;
        configs.push(config);
    }
    Ok(configs)
}

/// The registered keys and the lock of the database, if the plan registers a key.
fn registry(
    plan: &Plan,
    configs: &[Config],
) -> Result<(Option<Vec<RegistryRow>>, Option<store::StoreLock>), Failure> {
    let Some(config) = configs.first().filter(|_| plan.register) else {
        return Ok((None, None));
    };
    let lock = store::lock(&config.store)?;
    let registry = block_on(key::registry(config))??;
    checks::registry(&registry.rows)?;
    Ok((Some(registry.rows), Some(lock)))
}

fn begin(plan: &Plan, text: &str, started: Timestamp) -> Result<Transcript, Failure> {
    let program = std::fs::read(OWN_PROGRAM)
        .map_err(|error| internal(&format!("cannot read {OWN_PROGRAM}: {error}")))?;
    Transcript::begin(
        plan,
        text,
        format!("keybroker {}", env!("CARGO_PKG_VERSION")),
        sha256_hex(&program),
        change::local_operator(),
        &started.to_string(),
    )
    .map_err(|error| internal(&error))
}

/// Generates a key, and removes it again if it does not have the algorithm of the plan.
fn made_as_planned(
    admin: &Admin,
    planned: &keybroker_ceremony::plan::Key,
) -> Result<CheckedKey, Failure> {
    let id = planned.id.as_deref().and_then(WrappingKeyId::from_hex);
    let checked = match id {
        Some(id) => admin.generate_key_with_id(planned.bits, id)?,
        None => admin.generate_key(Purpose::Plain, planned.bits)?,
    };
    let found = checked
        .algorithm
        .map_or("none", |algorithm| algorithm.as_str());
    let Some(wanted) = planned
        .algorithm
        .as_deref()
        .filter(|wanted| *wanted != found)
    else {
        return Ok(checked);
    };
    let end = match admin.remove_key(checked.id) {
        Ok(_) => "The key was removed from the token".to_owned(),
        Err(error) => format!("The key {} is still on the token: {error}", checked.id),
    };
    let what = format!(
        "key {:?} has the algorithm {found}, but the plan demands {wanted}. {end}",
        planned.name
    );
    Err(Failure::new(Exit::Untrusted, what))
}

fn described(name: &str, checked: &CheckedKey) -> transcript::Key {
    let mut found = attributes(complete::PRIVATE_KEY, &checked.private);
    found.extend(attributes("integrity key", &checked.integrity));
    let integrity_key = match checked.objects.integrity {
        IntegrityPlace::Worker => "worker",
        IntegrityPlace::Token | IntegrityPlace::Object(_) => "token",
    };
    transcript::Key {
        name: name.to_owned(),
        id: checked.id.to_string(),
        bits: number(checked.modulus_bits),
        algorithm: checked
            .algorithm
            .map_or("none", |algorithm| algorithm.as_str())
            .to_owned(),
        public_key: Base64::encode_string(&checked.spki),
        fingerprint: sha256_hex(&checked.spki),
        integrity_key: integrity_key.to_owned(),
        attributes: found,
        self_test: match &checked.problem {
            None => "passed".to_owned(),
            Some(problem) => problem.clone(),
        },
        tests_not_run: checked.not_tried.clone(),
    }
}

fn attributes(object: &str, findings: &[Finding]) -> Vec<Attribute> {
    let attribute = |finding: &Finding| Attribute {
        object: object.to_owned(),
        finding: finding.verdict.clone(),
        passes: finding.passes,
    };
    findings.iter().map(attribute).collect()
}
