//! The script: what the module does to the calls that pass through it. The README explains each setting.

use std::{
    fmt, fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use toml::{Table, Value};

use crate::{
    functions::Function,
    names::{Attribute, Code, Flag, KeyType, MechanismName},
};

/// Every behaviour, by its setting. For each there is a test that passes with it and fails without it.
pub const BEHAVIOURS: &[&str] = &[
    "interface",
    "seed",
    "log_calls",
    "control",
    "rule.on.call",
    "rule.on.every",
    "rule.on.probability",
    "rule.on.skip",
    "rule.on.times",
    "rule.on.process",
    "rule.do.return",
    "rule.do.when = succeeded",
    "rule.do.when = failed",
    "rule.do.delay_ms",
    "rule.do.hang",
    "rule.do.abort",
    "rule.do.segfault",
    "rule.do.exit",
    "rule.do.corrupt",
    "rule.do.truncate",
    "rule.do.close_sessions",
    "rule.do.logout",
    "rule.do.new_handles",
    "token.absent",
    "token.pad",
    "token.label",
    "token.serial",
    "token.changing_serial",
    "token.utc_time",
    "token.set_flags",
    "token.clear_flags",
    "token.hardware_slot",
    "sessions.max",
    "sessions.refuse_read_only",
    "login.protected_authentication_path",
    "login.shared",
    "login.lock_after",
    "login.pin_form = user:password",
    "login.pin_form = id-password",
    "login.accept_any_pin",
    "limits.parallel_calls",
    "limits.operations_per_second",
    "limits.latency_ms",
    "limits.refuse",
    "objects.new_handles_at_login",
    "objects.refuse_duplicate_id",
    "attribute.in_template.refuse",
    "attribute.in_template.when",
    "attribute.in_template.unless",
    "attribute.in_template.leave_out",
    "attribute.in_template.replace",
    "attribute.on_read.absent",
    "attribute.on_read.fail",
    "attribute.on_read.empty",
    "attribute.on_read.value",
    "attribute.on_read.size_query",
    "attribute.parts",
    "template.only",
    "mechanism.absent",
    "mechanism.functions",
    "mechanism.refuse",
    "hmac.key_type",
    "hmac.mechanism",
    "hmac.length",
    "hmac.refuse_at_use",
];

/// Bounds includes within included files.
const INCLUDE_DEPTH_MAX: usize = 8;

/// Why a script is not used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ScriptError {
    #[error("the script {path} cannot be read: {source}")]
    Unreadable {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("the script {path} is not valid: {source}")]
    Invalid {
        path: PathBuf,
        source: Box<toml::de::Error>,
    },
    #[error("the script {path} includes too many files within each other")]
    TooDeep { path: PathBuf },
}

/// Reads a script without running it and returns what it says of the product that it describes, if it is a profile.
pub fn check(path: &Path) -> Result<Option<Profile>, Box<dyn std::error::Error + Send + Sync>> {
    let (script, _) = Script::read(path);
    Ok(script?.profile)
}

/// A script as it was read.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Script {
    pub(crate) module: Option<PathBuf>,
    pub(crate) state: Option<PathBuf>,
    pub(crate) seed: u64,
    pub(crate) log_calls: bool,
    pub(crate) control: bool,
    pub(crate) interface: Option<Interface>,
    pub(crate) profile: Option<Profile>,
    pub(crate) token: Token,
    pub(crate) sessions: Sessions,
    pub(crate) login: Login,
    pub(crate) limits: Limits,
    pub(crate) objects: Objects,
    pub(crate) hmac: Option<Hmac>,
    #[serde(rename = "rule")]
    pub(crate) rules: Vec<Rule>,
    #[serde(rename = "attribute")]
    pub(crate) attributes: Vec<AttributeRule>,
    #[serde(rename = "template")]
    pub(crate) templates: Vec<TemplateRule>,
    #[serde(rename = "mechanism")]
    pub(crate) mechanisms: Vec<MechanismRule>,
}

/// The newest version that the module shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub(crate) enum Interface {
    #[serde(rename = "2.40")]
    V2,
    #[serde(rename = "3.0")]
    V3_0,
    #[serde(rename = "3.2")]
    V3_2,
}

/// What a profile says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// The product, with its version.
    pub product: String,
    /// Where the knowledge comes from.
    pub evidence: Evidence,
    /// One quotation or measurement each, with its place.
    pub sources: Vec<String>,
}

/// Where the knowledge about a product comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum Evidence {
    /// Documents or source text, read and not run.
    #[serde(rename = "from documents")]
    Documents,
    /// The product was run.
    #[serde(rename = "measured")]
    Measured,
    /// There is no such product.
    #[serde(rename = "invented")]
    Invented,
}

impl fmt::Display for Evidence {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Documents => "from documents",
            Self::Measured => "measured",
            Self::Invented => "invented",
        })
    }
}

/// One rule: to some calls of some functions, something happens.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Rule {
    /// Rules of the same name count together, also when the script is read again.
    #[serde(default)]
    name: Option<String>,
    function: FunctionNames,
    #[serde(default)]
    pub(crate) on: On,
    #[serde(rename = "do")]
    pub(crate) action: Action,
    /// Identifies the counter of the rule; set after reading.
    #[serde(skip)]
    pub(crate) key: u64,
}

/// One function, several, or `*` for all.
#[derive(Debug, Deserialize)]
#[serde(try_from = "OneOrSeveral")]
struct FunctionNames(Vec<FunctionName>);

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrSeveral {
    One(String),
    Several(Vec<String>),
}

impl TryFrom<OneOrSeveral> for FunctionNames {
    type Error = String;

    fn try_from(names: OneOrSeveral) -> Result<Self, String> {
        let names = match names {
            OneOrSeveral::One(name) => vec![name],
            OneOrSeveral::Several(names) => names,
        };
        let names = names.into_iter().map(FunctionName::try_from);
        names.collect::<Result<_, _>>().map(Self)
    }
}

#[derive(Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub(crate) enum FunctionName {
    All,
    Named(Function),
}

impl TryFrom<String> for FunctionName {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        if name == "*" {
            return Ok(Self::All);
        }
        let known = Function::ALL.iter().find(|(known, _)| *known == name);
        known
            .map(|(_, function)| Self::Named(*function))
            .ok_or_else(|| format!("{name:?} is not a function that can be scripted"))
    }
}

impl FunctionName {
    fn covers(&self, function: Function) -> bool {
        match self {
            Self::All => true,
            Self::Named(named) => *named == function,
        }
    }
}

impl Rule {
    pub(crate) fn covers(&self, function: Function) -> bool {
        self.function.0.iter().any(|name| name.covers(function))
    }
}

/// Which calls a rule hits: all that satisfy each condition given. Calls are counted per rule, over all processes.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct On {
    /// Only this call, counted from 1.
    pub(crate) call: Option<u64>,
    /// Every n-th call.
    pub(crate) every: Option<u64>,
    /// A call with this probability, decided by the seed and the number of the call.
    pub(crate) probability: Option<f64>,
    /// Calls that pass first.
    pub(crate) skip: u64,
    /// Calls that are hit after these.
    pub(crate) times: Option<u64>,
    /// Only calls of the process with this id.
    pub(crate) process: Option<u32>,
}

/// What a rule does.
#[allow(clippy::struct_excessive_bools, reason = "each is a separate action")]
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Action {
    #[serde(rename = "return")]
    pub(crate) code: Option<Code>,
    pub(crate) when: When,
    pub(crate) delay_ms: u64,
    pub(crate) hang: bool,
    pub(crate) abort: bool,
    pub(crate) segfault: bool,
    pub(crate) exit: Option<i32>,
    pub(crate) corrupt: bool,
    pub(crate) truncate: Option<u64>,
    pub(crate) close_sessions: bool,
    pub(crate) logout: bool,
    pub(crate) new_handles: bool,
}

/// When the return code of a rule takes effect.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum When {
    /// The real function is not called.
    #[default]
    Instead,
    /// The real function is called and has succeeded.
    Succeeded,
    /// The real function is called and has failed.
    Failed,
}

/// What slot and token show of themselves.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Token {
    pub(crate) absent: bool,
    pub(crate) pad: Pad,
    pub(crate) label: Option<String>,
    pub(crate) serial: Option<String>,
    pub(crate) changing_serial: bool,
    pub(crate) utc_time: Option<String>,
    pub(crate) set_flags: Vec<Flag>,
    pub(crate) clear_flags: Vec<Flag>,
    pub(crate) hardware_slot: bool,
}

/// What fills the texts of `CK_TOKEN_INFO`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Pad {
    /// Blanks, as the standard says.
    #[default]
    Blank,
    /// NUL bytes.
    Nul,
}

/// Limits of sessions.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Sessions {
    pub(crate) max: Option<usize>,
    pub(crate) refuse_read_only: Option<Code>,
}

/// How the token treats a login.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Login {
    pub(crate) protected_authentication_path: bool,
    pub(crate) shared: bool,
    pub(crate) lock_after: Option<u64>,
    pub(crate) pin_form: PinForm,
    pub(crate) accept_any_pin: Option<String>,
}

/// What a PIN consists of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub(crate) enum PinForm {
    /// The PIN of the real token.
    #[default]
    #[serde(rename = "plain")]
    Plain,
    /// A user name, a colon, and the PIN of the real token.
    #[serde(rename = "user:password")]
    UserPassword,
    /// Four hexadecimal digits and the PIN of the real token.
    #[serde(rename = "id-password")]
    IdPassword,
}

/// Limits of operations, over all processes.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Limits {
    pub(crate) parallel_calls: Option<usize>,
    pub(crate) operations_per_second: Option<u32>,
    pub(crate) latency_ms: u64,
    /// What an operation above a limit gets; without it, the operation waits.
    pub(crate) refuse: Option<Code>,
}

/// How the token treats objects in general.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Objects {
    pub(crate) new_handles_at_login: bool,
    pub(crate) refuse_duplicate_id: Option<Code>,
}

/// What a key for HMAC must be.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Hmac {
    /// The only key type that templates may name, and that keys show; the real token sees a generic secret.
    pub(crate) key_type: Option<KeyType>,
    /// The only mechanism that makes such keys; the real token sees `CKM_GENERIC_SECRET_KEY_GEN`.
    pub(crate) mechanism: Option<MechanismName>,
    /// The length of a key whose template names none, in bytes.
    pub(crate) length: Option<u64>,
    /// What another key type or mechanism gets.
    pub(crate) refuse: Code,
    /// Such a key is made nevertheless, and refused when it is used.
    #[serde(default)]
    pub(crate) refuse_at_use: bool,
}

/// What an object is, as far as attributes differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Part {
    Public,
    Private,
    Secret,
    Other,
    /// The template of a search.
    Search,
}

/// The value of an attribute.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub(crate) enum AttributeValue {
    Bool(bool),
    Number(u64),
    Mechanisms(Vec<MechanismName>),
    Hex(HexText),
}

/// Bytes, written as `hex:` and their digits.
#[derive(Clone, Debug, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct HexText(Vec<u8>);

impl TryFrom<String> for HexText {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let digits = text.strip_prefix("hex:").ok_or("bytes begin with hex:")?;
        hex::decode(digits)
            .map(Self)
            .map_err(|error| error.to_string())
    }
}

impl AttributeValue {
    pub(crate) fn bytes(&self) -> Box<[u8]> {
        match self {
            Self::Bool(value) => Box::new([u8::from(*value)]),
            Self::Number(value) => Box::new(value.to_ne_bytes()),
            Self::Mechanisms(list) => list.iter().flat_map(|name| name.0.to_ne_bytes()).collect(),
            Self::Hex(HexText(bytes)) => bytes.clone().into(),
        }
    }
}

/// How the token treats one attribute.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct AttributeRule {
    pub(crate) name: Attribute,
    /// Of which objects; all without it, but not templates of searches.
    #[serde(default)]
    pub(crate) parts: Option<Vec<Part>>,
    #[serde(default)]
    pub(crate) in_template: InTemplate,
    #[serde(default)]
    pub(crate) on_read: OnRead,
}

impl AttributeRule {
    pub(crate) fn covers(&self, part: Part) -> bool {
        match &self.parts {
            Some(parts) => parts.contains(&part),
            None => part != Part::Search,
        }
    }
}

/// What happens to the attribute in a template.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct InTemplate {
    pub(crate) refuse: Option<Code>,
    pub(crate) when: Option<AttributeValue>,
    pub(crate) unless: Option<AttributeValue>,
    pub(crate) leave_out: bool,
    pub(crate) replace: Option<AttributeValue>,
}

/// What happens to the attribute when it is read.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct OnRead {
    pub(crate) absent: bool,
    pub(crate) fail: Option<Code>,
    pub(crate) empty: bool,
    pub(crate) value: Option<AttributeValue>,
    pub(crate) size_query: Option<Code>,
}

/// The only attributes that a template may have.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct TemplateRule {
    function: FunctionName,
    #[serde(default)]
    parts: Option<Vec<Part>>,
    pub(crate) only: Vec<Attribute>,
    pub(crate) refuse: Code,
}

impl TemplateRule {
    pub(crate) fn covers(&self, function: Function, part: Part) -> bool {
        self.function.covers(function)
            && self
                .parts
                .as_ref()
                .is_none_or(|parts| parts.contains(&part))
    }
}

/// A mechanism that the token does not have.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct MechanismRule {
    pub(crate) absent: MechanismName,
    /// Only for these functions, such as `C_VerifyInit`; the list of mechanisms then still shows it.
    #[serde(default)]
    pub(crate) functions: Option<Vec<FunctionName>>,
    /// What its use gets; `CKR_MECHANISM_INVALID` without it.
    #[serde(default)]
    pub(crate) refuse: Option<Code>,
}

impl MechanismRule {
    /// Whether this function refuses it.
    pub(crate) fn covers(&self, function: Function) -> bool {
        match &self.functions {
            Some(functions) => functions.iter().any(|name| name.covers(function)),
            None => true,
        }
    }
}

/// Changes with the file: its inode, its time of modification and its size. `None` without a file.
pub(crate) type Stamp = Option<(u64, i64, i64, u64)>;

pub(crate) fn stamp(path: &Path) -> Stamp {
    let metadata = path.metadata().ok()?;
    Some((
        metadata.ino(),
        metadata.mtime(),
        metadata.mtime_nsec(),
        metadata.size(),
    ))
}

/// The files that a script consists of, with their stamps from before they were read: a change in between is noticed.
pub(crate) type Files = Vec<(PathBuf, Stamp)>;

impl Script {
    /// The script, and every file that it consists of, also when one of them is not valid.
    pub(crate) fn read(path: &Path) -> (Result<Self, ScriptError>, Files) {
        let mut files = Vec::new();
        let script = read_table(path, 0, &mut files).and_then(|table| {
            let mut script: Self =
                Value::Table(table)
                    .try_into()
                    .map_err(|source| ScriptError::Invalid {
                        path: path.to_owned(),
                        source: Box::new(source),
                    })?;
            for (index, rule) in script.rules.iter_mut().enumerate() {
                rule.key = key_of(index, rule);
            }
            Ok(script)
        });
        (script, files)
    }
}

/// Never 0, which marks a counter that is free. The same name gives the same key on every machine, since the key decides
/// which calls a probability hits: FNV-1a.
fn key_of(index: usize, rule: &Rule) -> u64 {
    let text = match &rule.name {
        Some(name) => name.clone(),
        None => format!("{index}: {rule:?}"),
    };
    let hash = text.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    hash.max(1)
}

fn read_table(path: &Path, depth: usize, files: &mut Files) -> Result<Table, ScriptError> {
    if depth > INCLUDE_DEPTH_MAX {
        return Err(ScriptError::TooDeep {
            path: path.to_owned(),
        });
    }
    files.push((path.to_owned(), stamp(path)));
    let text = fs::read_to_string(path).map_err(|source| ScriptError::Unreadable {
        path: path.to_owned(),
        source,
    })?;
    let invalid = |source| ScriptError::Invalid {
        path: path.to_owned(),
        source: Box::new(source),
    };
    let mut table: Table = toml::from_str(&text).map_err(invalid)?;
    let includes: Vec<PathBuf> = match table.remove("include") {
        Some(value) => value.try_into().map_err(invalid)?,
        None => Vec::new(),
    };
    let directory = path.parent().unwrap_or_else(|| Path::new("."));
    let mut merged = Table::new();
    for include in includes {
        let included = read_table(&directory.join(include), depth + 1, files)?;
        merge(&mut merged, included);
    }
    merge(&mut merged, table);
    Ok(merged)
}

/// Tables are merged, lists are joined, and of two other values the later one counts.
fn merge(base: &mut Table, over: Table) {
    for (name, value) in over {
        match (base.get_mut(&name), value) {
            (Some(Value::Table(base)), Value::Table(over)) => merge(base, over),
            (Some(Value::Array(base)), Value::Array(over)) => base.extend(over),
            (_, value) => {
                base.insert(name, value);
            }
        }
    }
}
