//! `keybroker ceremony rehearse`: prints the script of a plan, and does every step on a temporary SoftHSM.

use std::{
    fmt::Write as _,
    fs::{self, DirBuilder, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use clap::Args;
use serde_json::json;

use keybroker_audit::Entry;
use keybroker_ceremony::{page, plan::Plan, script, share, transcript::Transcript};
use keybroker_core::call::CallId;
use keybroker_hsm::admin;
use keybroker_store as store;
use keybroker_worker_protocol::{Pin, PinSource};

use crate::cli::{
    Context, OWN_PROGRAM, block_on, change,
    exit::{Exit, Failure},
    pin::{self, UserPin},
};

use super::{
    Files, internal, read_plan,
    run::{Ceremony, parse},
    shares::Display,
};

/// Where distributions put the module of SoftHSM.
const MODULES: [&str; 4] = [
    "/usr/lib/softhsm/libsofthsm2.so",
    "/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so",
    "/usr/lib/aarch64-linux-gnu/softhsm/libsofthsm2.so",
    "/usr/local/lib/softhsm/libsofthsm2.so",
];
/// Number of characters of the PINs of a rehearsal.
const PIN_CHARACTERS: usize = 16;

#[derive(Args, Debug)]
pub(in crate::cli) struct Rehearse {
    /// Plan of the ceremony
    plan: PathBuf,
    /// PKCS#11 module of SoftHSM [default: where distributions put it]
    #[arg(long, value_name = "FILE")]
    softhsm_module: Option<PathBuf>,
}

pub(super) fn run(arguments: &Rehearse, context: &Context) -> Result<(), Failure> {
    let text = read_plan(&arguments.plan)?;
    let plan = parse(&arguments.plan, &text)?;
    let module = module(arguments.softhsm_module.as_deref())?;
    let script = page::of_script(&plan, "transcript.json");
    let folder = Folder::create()?;
    let rehearsal = folder.context(context, &module, &plan)?;
    let transcript = rehearse(&folder, &rehearsal, &plan, &text, &module)?;
    show(context, &script, &rehearsed(&plan, &transcript))
}

fn module(given: Option<&Path>) -> Result<PathBuf, Failure> {
    if let Some(module) = given {
        return Ok(module.to_owned());
    }
    let found = MODULES.iter().map(PathBuf::from).find(|path| path.exists());
    found.ok_or_else(|| {
        Failure::new(
            Exit::Token,
            "SoftHSM is not installed, and a rehearsal needs it",
        )
        .hint("install the package softhsm2, or pass its module with --softhsm-module")
    })
}

/// Does the steps of the plan on tokens of SoftHSM.
fn rehearse(
    folder: &Folder,
    context: &Context,
    plan: &Plan,
    text: &str,
    module: &Path,
) -> Result<Transcript, Failure> {
    let config = context.config_for_tokens()?;
    let nothing_more = |_: &mut Entry| {};
    change::audited(context, &config, "store.migrate", nothing_more, || {
        Ok(block_on(store::migrate(&config.store, false))??)
    })?;
    let plan = on_softhsm(plan, module);
    for token in plan.tokens.iter().filter(|token| !token.initialise) {
        let mut config = config.clone();
        config.select_token(Some(&token.name))?;
        let so_pin = share::random_pin(PIN_CHARACTERS).map_err(|error| internal(&error))?;
        let so_pin = Pin::from_text(so_pin.to_string()).map_err(|error| internal(&error))?;
        admin::init_token(
            Path::new(OWN_PROGRAM),
            config.token(),
            &pin::state(&config),
            token.label.as_deref().unwrap_or_default(),
            &PinSource::Text(so_pin),
            &PinSource::File(folder.path("pin")),
            None,
        )?;
    }
    let files = Files::beside(&folder.path("transcript.json"));
    let from_configuration = UserPin::from_configuration();
    let ceremony = Ceremony::prepare(
        context,
        plan,
        text,
        files,
        &from_configuration,
        Display::Nowhere,
    )?;
    Ok(ceremony.run()?.transcript)
}

/// The plan with the module of SoftHSM and a label for each token. SoftHSM may have another algorithm than the real token.
fn on_softhsm(plan: &Plan, module: &Path) -> Plan {
    let mut plan = plan.clone();
    for token in &mut plan.tokens {
        module.clone_into(&mut token.module);
        token.label = Some(label(token));
        token.serial = None;
        token.uri = None;
        for key in &mut token.keys {
            key.algorithm = None;
        }
    }
    plan
}

/// The label of a token, at most 32 bytes. Names of tokens in a plan are different, but may be too long for a label.
fn label(token: &keybroker_ceremony::plan::Token) -> String {
    token.label.clone().unwrap_or_else(|| {
        let digest = keybroker_ceremony::sha256_hex(token.name.as_bytes());
        format!("rehearsal-{}", &digest[..16])
    })
}

/// Number, text and result of every step. The transcript does not have the last step, which signs it; the rehearsal ends only
/// after this step.
fn rehearsed(plan: &Plan, transcript: &Transcript) -> Vec<(u64, String, String)> {
    let steps = script::steps(plan).into_iter().map(|step| {
        let recorded = transcript
            .steps
            .iter()
            .find(|one| one.number == step.number);
        let result = recorded.map_or_else(|| "done".to_owned(), |one| one.result.clone());
        (step.number, step.what, result)
    });
    steps.collect()
}

fn show(context: &Context, script: &str, steps: &[(u64, String, String)]) -> Result<(), Failure> {
    if context.output.is_json() {
        let steps: Vec<_> = steps
            .iter()
            .map(|(number, what, result)| json!({"number": number, "what": what, "result": result}))
            .collect();
        return context
            .output
            .json(&json!({"script": script, "rehearsed": steps}));
    }
    let mut text = script.to_owned();
    text.push_str("\nRehearsed on a temporary SoftHSM, which was removed again:\n");
    for (number, _, result) in steps {
        let _written = writeln!(text, "  step {number}: {result}");
    }
    context.output.text(text.trim_end())
}

/// A temporary folder, which only this user can read. It is removed when this value is dropped.
struct Folder(PathBuf);

impl Folder {
    fn create() -> Result<Self, Failure> {
        let path = std::env::temp_dir().join(format!("keybroker-rehearsal-{}", CallId::fresh()));
        let create = || {
            DirBuilder::new().mode(0o700).create(&path)?;
            let folder = Self(path.clone());
            for name in ["tokens", "data", "audit"] {
                DirBuilder::new().mode(0o700).create(folder.path(name))?;
            }
            Ok(folder)
        };
        create().map_err(|error: io::Error| {
            let what = format!(
                "cannot create the temporary folder {}: {error}",
                path.display()
            );
            Failure::new(Exit::Internal, what)
        })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn write(&self, name: &str, text: &str) -> Result<(), Failure> {
        let path = self.path(name);
        let write = || {
            let mut options = OpenOptions::new();
            let mut file = options
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&path)?;
            file.write_all(text.as_bytes())
        };
        write().map_err(|error: io::Error| {
            internal(&format!("cannot write {}: {error}", path.display()))
        })
    }

    /// The configuration of the rehearsal: one SoftHSM with the tokens of the plan, and a SQLite database.
    fn context(&self, context: &Context, module: &Path, plan: &Plan) -> Result<Context, Failure> {
        let user_pin = share::random_pin(PIN_CHARACTERS).map_err(|error| internal(&error))?;
        self.write("pin", &user_pin)?;
        self.write(
            "softhsm2.conf",
            &format!(
                "directories.tokendir = {}\nobjectstore.backend = file\nlog.level = ERROR\n",
                self.path("tokens").display()
            ),
        )?;
        let mut text = String::new();
        for token in &on_softhsm(plan, module).tokens {
            let _written = write!(
                text,
                "[[token]]\nname = {}\nmodule = {}\nlabel = {}\npin_file = {}\nallow_oaep_sha1 = true\n\
                 [token.environment]\nSOFTHSM2_CONF = {}\n",
                quoted(&token.name),
                quoted(&module.display().to_string()),
                quoted(token.label.as_deref().unwrap_or_default()),
                quoted(&self.path("pin").display().to_string()),
                quoted(&self.path("softhsm2.conf").display().to_string()),
            );
        }
        let _written = write!(
            text,
            "[store]\nurl = {}\n[audit]\ndirectory = {}\n[status]\naddress = \"127.0.0.1:0\"\n",
            quoted(&format!(
                "sqlite:{}",
                self.path("data").join("keybroker.db").display()
            )),
            quoted(&self.path("audit").display().to_string()),
        );
        self.write("keybroker.toml", &text)?;
        Ok(Context {
            config_file: self.path("keybroker.toml"),
            output: context.output,
            token: None,
        })
    }
}

/// A text as a TOML string.
fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

impl Drop for Folder {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            tracing::error!(path = %self.0.display(), %error, "the temporary folder of the rehearsal was not removed");
        }
    }
}
