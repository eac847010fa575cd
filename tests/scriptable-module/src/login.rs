//! Logins: what a PIN is, how many tries it has, and who shares a login.

use std::{slice, sync::atomic::Ordering};

use cryptoki_sys::{
    CK_RV, CK_SESSION_HANDLE, CK_ULONG, CK_USER_TYPE, CK_UTF8CHAR, CKR_ARGUMENTS_BAD, CKR_OK,
    CKR_PIN_INCORRECT, CKR_PIN_LOCKED, CKR_USER_ALREADY_LOGGED_IN, CKU_SO, CKU_USER,
};

use crate::{
    call::Call,
    functions::kinds::{Count, Session, Text, User},
    limits::Place,
    process::lock,
    script::PinForm,
    shared::Value,
};

type Real =
    unsafe extern "C" fn(CK_SESSION_HANDLE, CK_USER_TYPE, *mut CK_UTF8CHAR, CK_ULONG) -> CK_RV;

/// `C_Login`.
pub(crate) unsafe fn login(
    call: &Call,
    real: Real,
    session: Session,
    user: User,
    pin: Text,
    length: Count,
) -> CK_RV {
    let script = &call.script.login;
    if script.protected_authentication_path && !pin.is_null() {
        return CKR_ARGUMENTS_BAD;
    }
    let tries = match user {
        CKU_USER => Value::UserTries,
        CKU_SO => Value::OfficerTries,
        // SAFETY: the arguments of our caller.
        _ => return unsafe { real(session, user, pin, length) },
    };
    let tries = call.process.shared.value(tries);
    if let Some(max) = script.lock_after
        && tries.load(Ordering::Acquire) >= max
    {
        return CKR_PIN_LOCKED;
    }
    let mut bytes = if pin.is_null() {
        Vec::new()
    } else {
        let length = usize::try_from(length).unwrap_or_default();
        // SAFETY: the caller vouches for a PIN of this length.
        unsafe { slice::from_raw_parts(pin, length) }.to_vec()
    };
    let code = match own_pin(script.pin_form, &bytes) {
        Some(own) => {
            bytes = match &script.accept_any_pin {
                Some(right) if user == CKU_USER => right.as_bytes().to_vec(),
                _ => own,
            };
            let length = CK_ULONG::try_from(bytes.len()).unwrap_or_default();
            let pin = if pin.is_null() && script.accept_any_pin.is_none() {
                pin
            } else {
                bytes.as_mut_ptr()
            };
            // SAFETY: the session of our caller, and a PIN of this length or the null of our caller.
            unsafe { real(session, user, pin, length) }
        }
        None => CKR_PIN_INCORRECT,
    };
    match code {
        CKR_OK => {
            tries.store(0, Ordering::Release);
            if call.script.objects.new_handles_at_login {
                call.process.change_handles();
            }
            shared(call)
        }
        CKR_PIN_INCORRECT => {
            tries.fetch_add(1, Ordering::AcqRel);
            code
        }
        _ => code,
    }
}

/// The PIN of the real token in one of another form.
fn own_pin(form: PinForm, pin: &[u8]) -> Option<Vec<u8>> {
    match form {
        PinForm::Plain => Some(pin.to_vec()),
        PinForm::UserPassword => {
            let at = pin.iter().position(|byte| *byte == b':')?;
            (at > 0).then(|| pin[at + 1..].to_vec())
        }
        PinForm::IdPassword => {
            let (id, password) = pin.split_at_checked(4)?;
            let all_digits = id.iter().all(u8::is_ascii_hexdigit);
            all_digits.then(|| password.to_vec())
        }
    }
}

/// On a token with a shared login, only the first process logs in. The others are logged in, and are told so.
fn shared(call: &Call) -> CK_RV {
    if !call.script.login.shared {
        return CKR_OK;
    }
    match Place::take(call.process.state.as_deref(), "login", 1) {
        Some(place) => {
            *lock(&call.process.login) = Some(place);
            CKR_OK
        }
        None => CKR_USER_ALREADY_LOGGED_IN,
    }
}

/// `C_Logout`.
pub(crate) unsafe fn logout(
    call: &Call,
    real: unsafe extern "C" fn(CK_SESSION_HANDLE) -> CK_RV,
    session: Session,
) -> CK_RV {
    // SAFETY: the arguments of our caller.
    let code = unsafe { real(session) };
    if code == CKR_OK {
        *lock(&call.process.login) = None;
    }
    code
}

/// `C_InitPIN`: a new PIN has all its tries.
pub(crate) unsafe fn init_pin(
    call: &Call,
    real: unsafe extern "C" fn(CK_SESSION_HANDLE, *mut CK_UTF8CHAR, CK_ULONG) -> CK_RV,
    session: Session,
    pin: Text,
    length: Count,
) -> CK_RV {
    // SAFETY: the arguments of our caller.
    let code = unsafe { real(session, pin, length) };
    if code == CKR_OK {
        let tries = call.process.shared.value(Value::UserTries);
        tries.store(0, Ordering::Release);
    }
    code
}
