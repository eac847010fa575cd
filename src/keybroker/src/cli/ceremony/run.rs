//! `keybroker ceremony run`: does every step of a plan, and writes the transcript after each step.

use std::{
    fs::File,
    path::{Path, PathBuf},
};

use base64ct::{Base64, Encoding as _};
use clap::Args;
use serde_json::json;
use zeroize::Zeroizing;

use keybroker_audit::Entry;
use keybroker_ceremony::{
    page,
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
    key::{IntegrityPlace, ObjectId, WrappingKeyId},
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
}

impl Open {
    fn admin(&self) -> Result<&Admin, Failure> {
        self.admin
            .as_ref()
            .ok_or_else(|| Failure::new(Exit::Internal, "the token is not open"))
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
            };
            if planned.initialise {
                checks::is_blank(planned, &open.config)?;
            } else {
                let admin = open.log_in(registry.as_deref().unwrap_or_default())?;
                checks::has_no_key_of_plan(planned, &admin)?;
                open.admin = Some(admin);
            }
            tokens.push(open);
        }
        let transcript = begin(&plan, text, started)?;
        let mut ceremony = Self {
            context,
            plan,
            files,
            transcript,
            tokens,
            registry,
            display,
            _lock: lock,
        };
        ceremony.claim_file()?;
        Ok(ceremony)
    }

    /// Creates the file of the transcript, with the first step as done.
    fn claim_file(&mut self) -> Result<(), Failure> {
        let path = &self.files.transcript;
        File::create_new(path)
            .map_err(|error| usage(format!("cannot create {}: {error}", path.display())))?;
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
                Action::Sign => return self.complete(&step),
                _ => self.do_step(&step)?,
            }
        }
        Err(Failure::new(Exit::Internal, "the script has no last step"))
    }

    fn do_step(&mut self, step: &Step) -> Result<(), Failure> {
        self.begin_step(step)?;
        let result = self.perform(step);
        self.end_step(&result)?;
        result.map_err(|failure| self.explained(step, failure))
    }

    fn begin_step(&mut self, step: &Step) -> Result<(), Failure> {
        self.transcript.steps.push(transcript::Step {
            number: step.number,
            what: step.what.clone(),
            started: Timestamp::now().to_string(),
            ended: None,
            result: "begun".to_owned(),
        });
        self.write()
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
            .ok_or_else(|| Failure::new(Exit::Internal, "the step has no token"))?;
        match step.action {
            Action::SplitSoPin => self.split_so_pin(token),
            Action::Initialise => self.initialise(token),
            Action::Identify => self.identify(token),
            Action::GenerateKey => self.generate_key(token, step.key.unwrap_or_default()),
            Action::GenerateSigningKey => self.generate_signing_key(token),
            Action::CheckNothingExists | Action::Sign => Ok(()),
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
        let pin = open
            .so_pin
            .take()
            .ok_or_else(|| Failure::new(Exit::Internal, "there is no security officer's PIN"))?;
        let pin = Pin::from_text(pin.to_string()).map_err(|error| internal(&error))?;
        let so_pin = PinSource::Text(pin);
        let label = self.plan.tokens[token].label.clone().unwrap_or_default();
        let (config, context) = (&open.config, self.context);
        let nothing_more = |_: &mut Entry| {};
        change::audited(context, config, "token.init", nothing_more, || {
            let (_, note) = admin::init_token(
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
            Ok(())
        })?;
        self.transcript.tokens[token].initialised = true;
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
        let checked = match &self.registry {
            Some(rows) => key::generate_and_register(context, config, admin, rows, make)?.checked,
            None => key::generate_without_registration(context, config, make)?,
        };
        let key = described(&planned.name, &checked, self.registry.is_some());
        self.transcript.tokens[token].keys.push(key);
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
            attributes: attributes("signing key", &key.attributes),
        });
        open.signing_key = Some((key.object, key.spki));
        Ok(())
    }

    /// Signs the complete transcript on every token. The file of the transcript becomes complete only with the signatures.
    fn complete(mut self, step: &Step) -> Result<Ended, Failure> {
        self.transcript.status = Status::Complete;
        self.transcript.ended = Timestamp::now().to_string();
        let signed = self.signed();
        match signed {
            Ok((text, signatures)) => {
                let sha256 = signatures.transcript_sha256.clone();
                let list = signatures.to_text().map_err(|error| internal(&error))?;
                replace(&self.files.signatures, &list)?;
                replace(&self.files.transcript, &text)?;
                replace(
                    &self.files.page,
                    &page::of_transcript(&self.transcript, &sha256),
                )?;
                let (transcript, files) = (self.transcript, self.files);
                Ok(Ended {
                    transcript,
                    sha256,
                    files,
                })
            }
            Err(failure) => {
                self.transcript.status = Status::Incomplete;
                self.begin_step(step)?;
                self.end_step(&Err(failure.clone()))?;
                Err(self.explained(step, failure))
            }
        }
    }

    fn signed(&self) -> Result<(String, Signatures), Failure> {
        let text = self
            .transcript
            .to_canonical()
            .map_err(|error| internal(&error))?;
        let mut signatures = Signatures::new(sha256_hex(text.as_bytes()));
        for (open, token) in self.tokens.iter().zip(&self.transcript.tokens) {
            let (object, public) = open
                .signing_key
                .as_ref()
                .ok_or_else(|| Failure::new(Exit::Internal, "there is no signing key"))?;
            let made = open.admin()?.sign(object, text.as_bytes())?;
            let algorithm = if made.pss {
                SignatureAlgorithm::RsaPssSha256
            } else {
                SignatureAlgorithm::RsaPkcs1Sha256
            };
            if !verify::verifies(public, algorithm, text.as_bytes(), &made.signature) {
                let what = format!(
                    "the signature of token {:?} does not verify with the public key of its signing key",
                    token.name
                );
                return Err(Failure::new(Exit::Untrusted, what));
            }
            signatures.tokens.push(TokenSignature {
                token: token.name.clone(),
                algorithm,
                signature: Base64::encode_string(&made.signature),
            });
        }
        Ok((text, signatures))
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

fn replace(path: &Path, text: &str) -> Result<(), Failure> {
    output_file::replace(path, text)
        .map_err(|error| usage(format!("cannot write {}: {error}", path.display())))
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
        None => admin.generate_key(planned.bits)?,
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

fn described(name: &str, checked: &CheckedKey, registered: bool) -> transcript::Key {
    let mut found = attributes("RSA private key", &checked.private);
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
        registered,
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
