//! What the module keeps in a process: the script, the counters, and the sessions and handles that it must follow.

use std::{
    collections::HashMap,
    env,
    fs::{File, OpenOptions},
    io::Write as _,
    path::{self, Path, PathBuf},
    process, ptr,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock,
        atomic::{AtomicPtr, AtomicU64, Ordering},
    },
};

use cryptoki_sys::{CK_SESSION_HANDLE, CK_SLOT_ID};

use crate::{
    CALLS_FILE, MODULE_VARIABLE, SCRIPT_FILE, SCRIPT_VARIABLE, control,
    functions::Function,
    limits::Place,
    real::{self, Real},
    script::{Files, Script, ScriptError, stamp},
    shared::{RULES_MAX, Shared},
};

/// Why the module answers `CKR_GENERAL_ERROR`.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ModuleError {
    #[error(
        "no real module: set {MODULE_VARIABLE}, or `module` in the script that {SCRIPT_VARIABLE} names"
    )]
    NoModule,
    #[error(transparent)]
    Module(#[from] &'static real::LoadError),
    #[error(transparent)]
    Script(#[from] ScriptError),
    #[error("the state directory has counters for {RULES_MAX} rules: use an empty one")]
    TooManyRules,
    #[error("the state directory {path} cannot be used: {source}")]
    State {
        path: PathBuf,
        source: std::io::Error,
    },
}

/// A session that the application has opened.
#[derive(Debug)]
pub(crate) struct OpenedSession {
    pub(crate) slot: CK_SLOT_ID,
    /// Its place among the sessions that the token has room for.
    pub(crate) _place: Option<Place>,
}

/// What belongs to one process. A forked child has its own, since locks that other threads of its parent held stay locked
/// in it.
#[derive(Debug)]
pub(crate) struct Process {
    id: u32,
    pub(crate) real: &'static Real,
    pub(crate) shared: Shared,
    /// Where counters, log and control socket are.
    pub(crate) state: Option<PathBuf>,
    script_path: Option<PathBuf>,
    loaded: RwLock<Loaded>,
    /// Held for reading by calls into the real module, and for writing while sessions are taken from them: several modules
    /// crash when a session is closed that another thread is using.
    pub(crate) calls: RwLock<()>,
    sessions: Mutex<HashMap<CK_SESSION_HANDLE, OpenedSession>>,
    /// Held while this process is logged in to a token with a shared login.
    pub(crate) login: Mutex<Option<Place>>,
    /// Counts the times that handles changed.
    pub(crate) generation: AtomicU64,
    log: OnceLock<Option<File>>,
}

/// The script as it was last read.
#[derive(Debug)]
struct Loaded {
    script: Option<Arc<Script>>,
    files: Files,
}

/// The process that runs now.
pub(crate) fn current() -> Result<&'static Process, ModuleError> {
    static CURRENT: AtomicPtr<Process> = AtomicPtr::new(ptr::null_mut());
    let known = CURRENT.load(Ordering::Acquire);
    // SAFETY: the pointer is null or comes from a leaked box.
    if let Some(process) = unsafe { known.as_ref() }
        && process.id == process::id()
    {
        return Ok(process);
    }
    let fresh = Box::into_raw(Box::new(Process::start()?));
    match CURRENT.compare_exchange(known, fresh, Ordering::AcqRel, Ordering::Acquire) {
        Ok(_) => {
            // SAFETY: the box was leaked on purpose and is never freed.
            let process = unsafe { &*fresh };
            control::start(process);
            Ok(process)
        }
        // SAFETY: another thread was first, so no other thread has seen ours; the other one is leaked and never freed.
        Err(first) => unsafe {
            drop(Box::from_raw(fresh));
            Ok(&*first)
        },
    }
}

/// Locks, also after a thread has panicked: a panic ends the process before it leaves the module.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[allow(
    clippy::print_stderr,
    reason = "a module has no other place for the cause"
)]
pub(crate) fn report(error: &dyn std::error::Error) {
    eprintln!("scriptable PKCS#11 module: {error}");
}

impl Process {
    fn start() -> Result<Self, ModuleError> {
        let script_path = env::var_os(SCRIPT_VARIABLE).map(|path| {
            // The application may change its directory later.
            let path = path::absolute(&path).unwrap_or_else(|_| PathBuf::from(path));
            if path.is_dir() {
                path.join(SCRIPT_FILE)
            } else {
                path
            }
        });
        let loaded = match &script_path {
            Some(path) => {
                let (loaded, error) = Loaded::read(path);
                if let Some(error) = error {
                    return Err(error.into());
                }
                loaded
            }
            None => Loaded {
                script: Some(Arc::default()),
                files: Vec::new(),
            },
        };
        let script = loaded.script.clone().unwrap_or_default();
        let module = env::var_os(MODULE_VARIABLE)
            .map(PathBuf::from)
            .or_else(|| script.module.clone())
            .ok_or(ModuleError::NoModule)?;
        let real = real::load(&module)?;
        let directory = script_path.as_deref().and_then(Path::parent);
        let state = match (&script.state, directory) {
            (Some(state), Some(directory)) => Some(directory.join(state)),
            (_, directory) => directory.map(Path::to_owned),
        };
        let shared = match &state {
            Some(path) => Shared::open(path).map_err(|source| ModuleError::State {
                path: path.clone(),
                source,
            })?,
            None => Shared::private(),
        };
        Ok(Self {
            id: process::id(),
            real,
            shared,
            state,
            script_path,
            loaded: RwLock::new(loaded),
            calls: RwLock::new(()),
            sessions: Mutex::default(),
            login: Mutex::default(),
            generation: AtomicU64::new(0),
            log: OnceLock::new(),
        })
    }

    pub(crate) fn id(&self) -> u32 {
        self.id
    }

    /// The script as its files have it now. `None` when they are not valid: the reason was reported.
    pub(crate) fn script(&self) -> Option<Arc<Script>> {
        let loaded = self.loaded.read().unwrap_or_else(PoisonError::into_inner);
        if loaded.is_current() {
            return loaded.script.clone();
        }
        drop(loaded);
        self.read_script(false)
    }

    /// Reads the script again, also when its files look the same.
    pub(crate) fn reload(&self) {
        self.read_script(true);
    }

    fn read_script(&self, also_current: bool) -> Option<Arc<Script>> {
        let path = self.script_path.as_deref()?;
        let mut loaded = self.loaded.write().unwrap_or_else(PoisonError::into_inner);
        // Another thread may have read it already.
        if also_current || !loaded.is_current() {
            let (fresh, error) = Loaded::read(path);
            *loaded = fresh;
            if let Some(error) = error {
                report(&error);
            }
        }
        loaded.script.clone()
    }

    pub(crate) fn sessions(&self) -> MutexGuard<'_, HashMap<CK_SESSION_HANDLE, OpenedSession>> {
        lock(&self.sessions)
    }

    /// Appends a line to the log of calls. Lines of several processes do not mix: each is one write.
    pub(crate) fn log(&self, function: Function, what: &str) {
        let file = self.log.get_or_init(|| {
            let path = self.state.as_ref()?.join(CALLS_FILE);
            OpenOptions::new().append(true).create(true).open(path).ok()
        });
        if let Some(mut file) = file.as_ref() {
            let line = format!("{} {function:?} {what}\n", self.id);
            if let Err(error) = file.write_all(line.as_bytes()) {
                report(&error);
            }
        }
    }

    /// Ends every session, as a token does that was reset. The login ends with the last one.
    pub(crate) fn close_sessions(&self) {
        let _quiet = self.calls.write().unwrap_or_else(PoisonError::into_inner);
        let mut sessions = self.sessions();
        let mut slots: Vec<CK_SLOT_ID> = sessions.values().map(|session| session.slot).collect();
        slots.sort_unstable();
        slots.dedup();
        sessions.clear();
        *lock(&self.login) = None;
        for slot in slots {
            if let Some(close) = self.real.list.C_CloseAllSessions {
                // SAFETY: a function of the real module, and no other call is in it.
                unsafe { close(slot) };
            }
        }
    }

    /// Ends the login, as a token does whose login has expired. The sessions stay.
    pub(crate) fn log_out(&self) {
        let _quiet = self.calls.write().unwrap_or_else(PoisonError::into_inner);
        let sessions = self.sessions();
        let mut slots = Vec::new();
        *lock(&self.login) = None;
        for (session, opened) in sessions.iter() {
            if !slots.contains(&opened.slot)
                && let Some(log_out) = self.real.list.C_Logout
            {
                // SAFETY: a function of the real module, and no other call is in it.
                unsafe { log_out(*session) };
                slots.push(opened.slot);
            }
        }
    }

    /// From now on the handles of all objects are others, and the old ones are not valid.
    pub(crate) fn change_handles(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
    }
}

impl Loaded {
    /// Without a script when the files are not valid; the error says why.
    fn read(path: &Path) -> (Self, Option<ScriptError>) {
        let (script, files) = Script::read(path);
        let (script, error) = match script {
            Ok(script) => (Some(Arc::new(script)), None),
            Err(error) => (None, Some(error)),
        };
        (Self { script, files }, error)
    }

    fn is_current(&self) -> bool {
        self.files.iter().all(|(path, known)| stamp(path) == *known)
    }
}
