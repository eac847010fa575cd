//! What slots and tokens show of themselves.

use std::{slice, sync::atomic::Ordering};

use cryptoki_sys::{
    CK_MECHANISM_INFO, CK_MECHANISM_TYPE, CK_RV, CK_SLOT_ID, CK_SLOT_INFO, CK_TOKEN_INFO, CK_ULONG,
    CKF_HW_SLOT, CKF_PROTECTED_AUTHENTICATION_PATH, CKF_SO_PIN_COUNT_LOW, CKF_SO_PIN_FINAL_TRY,
    CKF_SO_PIN_LOCKED, CKF_TOKEN_PRESENT, CKF_USER_PIN_COUNT_LOW, CKF_USER_PIN_FINAL_TRY,
    CKF_USER_PIN_LOCKED, CKM_GENERIC_SECRET_KEY_GEN, CKR_BUFFER_TOO_SMALL, CKR_MECHANISM_INVALID,
    CKR_OK,
};

use crate::{
    call::Call,
    functions::kinds::{
        Bool, MechanismInfo, MechanismType, MechanismTypes, OutCount, Slot, SlotInfo, Slots,
        TokenInfo,
    },
    script::{Pad, Script},
    shared::Value,
};

/// `C_GetSlotList`: no slot has a token while it is absent.
pub(crate) unsafe fn slot_list(
    call: &Call,
    real: unsafe extern "C" fn(Bool, Slots, OutCount) -> CK_RV,
    present: Bool,
    slots: Slots,
    count: OutCount,
) -> CK_RV {
    if call.script.token.absent
        && present != 0
        // SAFETY: the caller vouches for the pointer.
        && let Some(count) = unsafe { count.as_mut() }
    {
        *count = 0;
        return CKR_OK;
    }
    // SAFETY: the arguments of our caller.
    unsafe { real(present, slots, count) }
}

/// `C_GetSlotInfo`: without a token while it is absent, and a hardware slot if the script says so.
pub(crate) unsafe fn slot_info(
    call: &Call,
    real: unsafe extern "C" fn(CK_SLOT_ID, *mut CK_SLOT_INFO) -> CK_RV,
    slot: Slot,
    info: SlotInfo,
) -> CK_RV {
    // SAFETY: the arguments of our caller.
    let code = unsafe { real(slot, info) };
    if code == CKR_OK
        // SAFETY: the caller vouches for the pointer.
        && let Some(info) = unsafe { info.as_mut() }
    {
        if call.script.token.absent {
            info.flags &= !CKF_TOKEN_PRESENT;
        }
        if call.script.token.hardware_slot {
            info.flags |= CKF_HW_SLOT;
        }
    }
    code
}

/// `C_GetTokenInfo`: texts, clock, flags and limits as the script says.
pub(crate) unsafe fn token_info(
    call: &Call,
    real: unsafe extern "C" fn(CK_SLOT_ID, *mut CK_TOKEN_INFO) -> CK_RV,
    slot: Slot,
    info: TokenInfo,
) -> CK_RV {
    // SAFETY: the arguments of our caller.
    let code = unsafe { real(slot, info) };
    if code == CKR_OK
        // SAFETY: the caller vouches for the pointer.
        && let Some(info) = unsafe { info.as_mut() }
    {
        edit(call, info);
    }
    code
}

fn edit(call: &Call, info: &mut CK_TOKEN_INFO) {
    let Script {
        token,
        sessions,
        login,
        ..
    } = &*call.script;
    if let Some(label) = &token.label {
        fill(&mut info.label, label.as_bytes(), b' ');
    }
    if let Some(serial) = &token.serial {
        fill(&mut info.serialNumber, serial.as_bytes(), b' ');
    }
    if token.changing_serial {
        let reads = call.process.shared.value(Value::InfoReads);
        let serial = format!("{:016x}", reads.fetch_add(1, Ordering::AcqRel));
        fill(&mut info.serialNumber, serial.as_bytes(), b' ');
    }
    if token.pad == Pad::Nul {
        pad(&mut info.label);
        pad(&mut info.manufacturerID);
        pad(&mut info.model);
        pad(&mut info.serialNumber);
    }
    if let Some(time) = &token.utc_time {
        fill(&mut info.utcTime, time.as_bytes(), 0);
    }
    if let Some(max) = sessions.max {
        let max = CK_ULONG::try_from(max).unwrap_or(CK_ULONG::MAX);
        info.ulMaxSessionCount = max;
        info.ulMaxRwSessionCount = max;
    }
    if login.protected_authentication_path {
        info.flags |= CKF_PROTECTED_AUTHENTICATION_PATH;
    }
    if let Some(max) = login.lock_after {
        let tries = |value| call.process.shared.value(value).load(Ordering::Acquire);
        let user = [
            CKF_USER_PIN_COUNT_LOW,
            CKF_USER_PIN_FINAL_TRY,
            CKF_USER_PIN_LOCKED,
        ];
        let officer = [
            CKF_SO_PIN_COUNT_LOW,
            CKF_SO_PIN_FINAL_TRY,
            CKF_SO_PIN_LOCKED,
        ];
        for (value, [low, last, locked]) in
            [(Value::UserTries, user), (Value::OfficerTries, officer)]
        {
            info.flags &= !(low | last | locked);
            info.flags |= match tries(value) {
                0 => 0,
                tries if tries >= max => locked,
                tries if tries + 1 == max => low | last,
                _ => low,
            };
        }
    }
    for flag in &token.set_flags {
        info.flags |= flag.0;
    }
    for flag in &token.clear_flags {
        info.flags &= !flag.0;
    }
}

/// Writes a text into a field, cut to its length, and fills the rest.
fn fill(field: &mut [u8], text: &[u8], rest: u8) {
    field.fill(rest);
    for (place, byte) in field.iter_mut().zip(text) {
        *place = *byte;
    }
}

/// Replaces the blanks at the end by NUL bytes.
fn pad(field: &mut [u8]) {
    for byte in field.iter_mut().rev().take_while(|byte| **byte == b' ') {
        *byte = 0;
    }
}

/// The mechanisms that the token does not show, and the one that it shows instead.
fn shown_mechanisms(script: &Script, real: &[CK_MECHANISM_TYPE]) -> Vec<CK_MECHANISM_TYPE> {
    let is_absent = |mechanism: &CK_MECHANISM_TYPE| {
        let mut rules = script.mechanisms.iter();
        rules.any(|rule| rule.absent.0 == *mechanism && rule.functions.is_none())
    };
    let own = script.hmac.as_ref().and_then(|hmac| hmac.mechanism);
    let shown = real
        .iter()
        .copied()
        .filter(|mechanism| !is_absent(mechanism));
    shown.chain(own.map(|own| own.0)).collect()
}

/// `C_GetMechanismList`.
pub(crate) unsafe fn mechanism_list(
    call: &Call,
    real: unsafe extern "C" fn(CK_SLOT_ID, *mut CK_MECHANISM_TYPE, *mut CK_ULONG) -> CK_RV,
    slot: Slot,
    list: MechanismTypes,
    count: OutCount,
) -> CK_RV {
    // SAFETY: the caller vouches for the pointer.
    let Some(count) = (unsafe { count.as_mut() }) else {
        // SAFETY: the arguments of our caller.
        return unsafe { real(slot, list, count) };
    };
    let mut length: CK_ULONG = 0;
    // SAFETY: asks for the number only.
    let code = unsafe { real(slot, std::ptr::null_mut(), &raw mut length) };
    if code != CKR_OK {
        return code;
    }
    let mut all = vec![0; usize::try_from(length).unwrap_or_default()];
    // SAFETY: the list has room for as many mechanisms as `length` says.
    let code = unsafe { real(slot, all.as_mut_ptr(), &raw mut length) };
    if code != CKR_OK {
        return code;
    }
    all.truncate(usize::try_from(length).unwrap_or_default());
    let shown = shown_mechanisms(&call.script, &all);
    let needed = CK_ULONG::try_from(shown.len()).unwrap_or(CK_ULONG::MAX);
    let room = std::mem::replace(count, needed);
    if list.is_null() {
        return CKR_OK;
    }
    if room < needed {
        return CKR_BUFFER_TOO_SMALL;
    }
    // SAFETY: the caller vouches for room for `room` mechanisms, which are enough.
    unsafe { slice::from_raw_parts_mut(list, shown.len()) }.copy_from_slice(&shown);
    CKR_OK
}

/// `C_GetMechanismInfo`.
pub(crate) unsafe fn mechanism_info(
    call: &Call,
    real: unsafe extern "C" fn(CK_SLOT_ID, CK_MECHANISM_TYPE, *mut CK_MECHANISM_INFO) -> CK_RV,
    slot: Slot,
    mechanism: MechanismType,
    info: MechanismInfo,
) -> CK_RV {
    let own = call.script.hmac.as_ref().and_then(|hmac| hmac.mechanism);
    let asked = if own.is_some_and(|own| own.0 == mechanism) {
        CKM_GENERIC_SECRET_KEY_GEN
    } else if shown_mechanisms(&call.script, &[mechanism]).contains(&mechanism) {
        mechanism
    } else {
        return CKR_MECHANISM_INVALID;
    };
    // SAFETY: the arguments of our caller.
    unsafe { real(slot, asked, info) }
}
