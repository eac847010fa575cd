//! Sessions: how many, of which kind, and which are open.

use std::ffi::c_void;

use cryptoki_sys::{
    CK_FLAGS, CK_NOTIFY, CK_RV, CK_SESSION_HANDLE, CK_SLOT_ID, CKF_RW_SESSION, CKR_OK,
    CKR_SESSION_COUNT,
};

use crate::{
    call::Call,
    functions::kinds::{Flags, NewSession, Notify, Pointer, Session, Slot},
    limits::Place,
    process::{OpenedSession, Process, lock},
};

type Open = unsafe extern "C" fn(
    CK_SLOT_ID,
    CK_FLAGS,
    *mut c_void,
    CK_NOTIFY,
    *mut CK_SESSION_HANDLE,
) -> CK_RV;

/// `C_OpenSession`.
pub(crate) unsafe fn open(
    call: &Call,
    real: Open,
    slot: Slot,
    flags: Flags,
    application: Pointer,
    notify: Notify,
    new: NewSession,
) -> CK_RV {
    let limits = &call.script.sessions;
    if let Some(code) = limits.refuse_read_only
        && flags & CKF_RW_SESSION == 0
    {
        return code.0;
    }
    let place = match limits.max {
        Some(max) => match Place::take(call.process.state.as_deref(), "session", max) {
            Some(place) => Some(place),
            None => return CKR_SESSION_COUNT,
        },
        None => None,
    };
    // SAFETY: the arguments of our caller.
    let code = unsafe { real(slot, flags, application, notify, new) };
    if code == CKR_OK
        // SAFETY: the real module has just written a handle to it.
        && let Some(session) = unsafe { new.as_ref() }
    {
        let opened = OpenedSession {
            slot,
            _place: place,
        };
        call.process.sessions().insert(*session, opened);
    }
    code
}

/// `C_CloseSession`.
pub(crate) unsafe fn close(
    call: &Call,
    real: unsafe extern "C" fn(CK_SESSION_HANDLE) -> CK_RV,
    session: Session,
) -> CK_RV {
    // SAFETY: the arguments of our caller.
    let code = unsafe { real(session) };
    if code == CKR_OK {
        forget(call.process, |known, _| known == session);
    }
    code
}

/// `C_CloseAllSessions`.
pub(crate) unsafe fn close_all(
    call: &Call,
    real: unsafe extern "C" fn(CK_SLOT_ID) -> CK_RV,
    slot: Slot,
) -> CK_RV {
    // SAFETY: the arguments of our caller.
    let code = unsafe { real(slot) };
    if code == CKR_OK {
        forget(call.process, |_, opened| opened.slot == slot);
    }
    code
}

/// `C_Finalize`.
pub(crate) unsafe fn finalize(
    call: &Call,
    real: unsafe extern "C" fn(*mut c_void) -> CK_RV,
    reserved: Pointer,
) -> CK_RV {
    // SAFETY: the arguments of our caller.
    let code = unsafe { real(reserved) };
    if code == CKR_OK {
        forget(call.process, |_, _| true);
    }
    code
}

/// The login of a process ends with its last session.
fn forget(process: &Process, closed: impl Fn(CK_SESSION_HANDLE, &OpenedSession) -> bool) {
    let mut sessions = process.sessions();
    sessions.retain(|session, opened| !closed(*session, opened));
    if sessions.is_empty() {
        *lock(&process.login) = None;
    }
}
