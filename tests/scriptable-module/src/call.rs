//! One call: counted, subjected to the rules of the script, and forwarded.

use std::{
    cell::Cell,
    sync::{Arc, PoisonError, atomic::Ordering},
    thread,
    time::Duration,
};

use cryptoki_sys::{
    CK_BYTE, CK_MECHANISM, CK_OBJECT_HANDLE, CK_RV, CK_ULONG, CKR_DEVICE_REMOVED,
    CKR_GENERAL_ERROR, CKR_MECHANISM_INVALID, CKR_OK, CKR_TOKEN_NOT_PRESENT,
};

use crate::{
    functions::Function,
    limits,
    process::{self, ModuleError, Process, report},
    script::{On, Rule, Script, When},
};

/// How often a hanging call looks whether its rule is still there.
const LOOK: Duration = Duration::from_millis(10);
/// Handles of one generation differ from those of another in these bits.
const GENERATION_SHIFT: u32 = 48;

/// A call that is under way.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) process: &'static Process,
    pub(crate) script: Arc<Script>,
    pub(crate) function: Function,
    /// Where the real module writes its output; the length follows among the arguments.
    pub(crate) output: Cell<*mut CK_BYTE>,
    effects: Effects,
}

/// What the rules that hit this call do to its result.
#[derive(Debug, Default)]
struct Effects {
    instead: Option<CK_RV>,
    on_success: Option<CK_RV>,
    on_failure: Option<CK_RV>,
    /// A number that decides which bit of the output is changed.
    corrupt: Option<u64>,
    truncate: Option<CK_ULONG>,
}

/// Runs `body`, which calls the real function, unless the script wants something else.
pub(crate) fn run(function: Function, body: impl FnOnce(&Call) -> CK_RV) -> CK_RV {
    let process = match process::current() {
        Ok(process) => process,
        Err(error) => {
            report(&error);
            return CKR_GENERAL_ERROR;
        }
    };
    process.shared.begin(function);
    let Some(script) = process.script() else {
        return CKR_GENERAL_ERROR;
    };
    let log_calls = script.log_calls;
    if log_calls {
        process.log(function, "begins");
    }
    let code = scripted(process, script, function, body);
    process.shared.end(function, code);
    if log_calls {
        process.log(function, &format!("ends {code}"));
    }
    code
}

fn scripted(
    process: &'static Process,
    script: Arc<Script>,
    function: Function,
    body: impl FnOnce(&Call) -> CK_RV,
) -> CK_RV {
    let mut effects = Effects::default();
    for rule in script.rules.iter().filter(|rule| rule.covers(function)) {
        match hit(process, script.seed, rule) {
            Ok(Some(number)) => apply(process, script.seed, rule, number, &mut effects),
            Ok(None) => (),
            Err(code) => return code,
        }
    }
    if let Some(code) = effects.instead {
        return code;
    }
    if script.token.absent
        && let Some(code) = without_token(function)
    {
        if !process.sessions().is_empty() {
            process.close_sessions();
        }
        return code;
    }
    let _turn = match limits::wait(process, &script.limits, function) {
        Ok(turn) => turn,
        Err(code) => return code,
    };
    let call = Call {
        process,
        script,
        function,
        output: Cell::new(std::ptr::null_mut()),
        effects,
    };
    // A call that waits for a slot may wait for ever, and must not keep others from closing sessions.
    let _guard = (function != Function::C_WaitForSlotEvent)
        .then(|| process.calls.read().unwrap_or_else(PoisonError::into_inner));
    let code = body(&call);
    let other = if code == CKR_OK {
        call.effects.on_success
    } else {
        call.effects.on_failure
    };
    other.unwrap_or(code)
}

/// The number of the call, from 0, if the rule hits it.
fn hit(process: &Process, seed: u64, rule: &Rule) -> Result<Option<u64>, CK_RV> {
    let On {
        call,
        every,
        probability,
        skip,
        times,
        process: id,
    } = &rule.on;
    if id.is_some_and(|id| id != process.id()) {
        return Ok(None);
    }
    let Some(number) = process.shared.next_of_rule(rule.key) else {
        report(&ModuleError::TooManyRules);
        return Err(CKR_GENERAL_ERROR);
    };
    let hits = call.is_none_or(|call| number + 1 == call)
        && every.is_none_or(|every| every != 0 && (number + 1).is_multiple_of(every))
        && number >= *skip
        && times.is_none_or(|times| number - skip < times)
        && probability.is_none_or(|probability| chance(seed, rule.key, number) < probability);
    Ok(hits.then_some(number))
}

/// A number below 1 that depends on nothing but its arguments: a run can be repeated.
fn chance(seed: u64, key: u64, number: u64) -> f64 {
    let [.., a, b, c, d] = scrambled(seed, key, number).to_be_bytes();
    f64::from(u32::from_be_bytes([a, b, c, d])) / (f64::from(u32::MAX) + 1.0)
}

/// The finaliser of `splitmix64`.
pub(crate) fn scrambled(seed: u64, key: u64, number: u64) -> u64 {
    let mut mixed = seed
        .wrapping_add(key)
        .wrapping_add(number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

fn apply(process: &'static Process, seed: u64, rule: &Rule, number: u64, effects: &mut Effects) {
    let action = &rule.action;
    if action.delay_ms > 0 {
        thread::sleep(Duration::from_millis(action.delay_ms));
    }
    if action.hang {
        hang(process, rule.key);
    }
    if action.segfault {
        // SAFETY: resets the handler of the Rust runtime, which returns from a signal that was only raised, and ends the
        // process, which is the purpose.
        unsafe {
            libc::signal(libc::SIGSEGV, libc::SIG_DFL);
            libc::raise(libc::SIGSEGV);
        }
    }
    if action.abort {
        std::process::abort();
    }
    if let Some(code) = action.exit {
        // SAFETY: ends the process at once, without handlers that could wait for threads in the real module.
        unsafe { libc::_exit(code) };
    }
    if action.close_sessions {
        process.close_sessions();
    }
    if action.logout {
        process.log_out();
    }
    if action.new_handles {
        process.change_handles();
    }
    if action.corrupt {
        effects.corrupt = Some(scrambled(seed, rule.key, number));
    }
    effects.truncate = action.truncate.or(effects.truncate);
    if let Some(code) = action.code {
        let place = match action.when {
            When::Instead => &mut effects.instead,
            When::Succeeded => &mut effects.on_success,
            When::Failed => &mut effects.on_failure,
        };
        place.get_or_insert(code.0);
    }
}

/// Returns when the script no longer has the rule, or the rule no longer hangs.
fn hang(process: &Process, key: u64) {
    let is_there = || {
        process.script().is_some_and(|script| {
            script
                .rules
                .iter()
                .any(|rule| rule.key == key && rule.action.hang)
        })
    };
    while is_there() {
        thread::sleep(LOOK);
    }
}

/// What a function returns whose token is absent; `None` for those that do not need one.
fn without_token(function: Function) -> Option<CK_RV> {
    match function {
        Function::C_Initialize
        | Function::C_Finalize
        | Function::C_GetInfo
        | Function::C_GetSlotList
        | Function::C_GetSlotInfo
        | Function::C_WaitForSlotEvent => None,
        Function::C_GetTokenInfo
        | Function::C_GetMechanismList
        | Function::C_GetMechanismInfo
        | Function::C_InitToken
        | Function::C_OpenSession
        | Function::C_CloseAllSessions => Some(CKR_TOKEN_NOT_PRESENT),
        _ => Some(CKR_DEVICE_REMOVED),
    }
}

impl Call {
    /// The real handle of an object that the application names; `None` when the handle is of an earlier generation.
    pub(crate) fn real_handle(&self, shown: CK_OBJECT_HANDLE) -> Option<CK_OBJECT_HANDLE> {
        let generation = self.process.generation.load(Ordering::Acquire);
        if generation == 0 || shown == 0 {
            return Some(shown);
        }
        (shown >> GENERATION_SHIFT == generation)
            .then(|| shown ^ mask(self.script.seed, generation))
    }

    /// What the application sees of a real handle.
    pub(crate) fn shown_handle(&self, real: CK_OBJECT_HANDLE) -> CK_OBJECT_HANDLE {
        match self.process.generation.load(Ordering::Acquire) {
            0 => real,
            generation => real ^ mask(self.script.seed, generation),
        }
    }

    /// The return code for a mechanism that the token does not have.
    pub(crate) fn refuses_mechanism(&self, mechanism: Option<&CK_MECHANISM>) -> Option<CK_RV> {
        let mechanism = mechanism?.mechanism;
        let mut rules = self.script.mechanisms.iter();
        rules
            .find(|rule| rule.absent.0 == mechanism && rule.covers(self.function))
            .map(|rule| rule.refuse.map_or(CKR_MECHANISM_INVALID, |code| code.0))
    }

    /// Applies `corrupt` and `truncate` to the output that was noted last.
    ///
    /// # Safety
    ///
    /// The output that was noted last is null or has as many bytes as `length` says.
    pub(crate) unsafe fn damage_output(&self, length: Option<&mut CK_ULONG>) {
        let output = self.output.replace(std::ptr::null_mut());
        let Some(length) = length else {
            return;
        };
        if output.is_null() || *length == 0 {
            return;
        }
        if let Some(number) = self.effects.corrupt {
            let at = usize::try_from(number % *length).unwrap_or_default();
            // SAFETY: the offset is below the length, which the caller vouches for.
            unsafe { *output.add(at) ^= 1 << (number >> 61) };
        }
        if let Some(truncate) = self.effects.truncate {
            *length = length.saturating_sub(truncate);
        }
    }
}

/// The generation in the upper bits, and in the lower ones a number that differs from one generation to the next.
fn mask(seed: u64, generation: u64) -> u64 {
    let low = scrambled(seed, 0, generation) & ((1 << GENERATION_SHIFT) - 1);
    (generation << GENERATION_SHIFT) | low
}
