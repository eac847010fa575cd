//! What the token shows of itself, how many sessions and operations it takes.

use std::{
    fs::File,
    time::{Duration, Instant},
};

use cryptoki_sys::{
    CK_SLOT_INFO, CKF_ERROR_STATE, CKF_HW_SLOT, CKF_LOGIN_REQUIRED, CKF_RW_SESSION,
    CKM_AES_KEY_GEN, CKM_SHA256_HMAC,
};

use crate::{
    cases,
    module::{Module, call, is_slow, length, outcome},
};

fn text(field: &[u8]) -> String {
    String::from_utf8_lossy(field).into_owned()
}

/// Whether the token shows a mechanism.
fn shows(module: &Module, mechanism: u64) -> bool {
    let mut list = [0; 512];
    let mut count = length(&list);
    call!(
        module,
        C_GetMechanismList(module.slot(), list.as_mut_ptr(), &raw mut count)
    )
    .unwrap();
    list[..usize::try_from(count).unwrap()].contains(&mechanism)
}

cases! {
    is_absent_from_the_start covers ["token.absent"]: "0 tokens", not "2 tokens",
    with "token.absent = true", |module| {
        module.initialize().unwrap();
        format!("{} tokens", module.slots().len())
    };

    is_removed_and_put_back covers ["token.absent"]:
    "CKR_DEVICE_REMOVED CKR_TOKEN_NOT_PRESENT CKR_SESSION_HANDLE_INVALID ok", not "ok ok ok ok",
    with "token.absent = false", |module| {
        let session = module.ready();
        let slot = module.slot();
        let script = module.script();
        module.set_script(&script.replace("absent = false", "absent = true"));
        let mut seen = vec![outcome(module.random(session)), outcome(module.token_info(slot))];
        module.set_script(&script);
        seen.push(outcome(module.random(session)));
        seen.push(outcome(module.open()));
        seen.join(" ")
    };

    is_in_a_hardware_slot covers ["token.hardware_slot"]: "true", not "false",
    with "token.hardware_slot = true", |module| {
        module.initialize().unwrap();
        let mut info = CK_SLOT_INFO::default();
        call!(module, C_GetSlotInfo(module.slot(), &raw mut info)).unwrap();
        (info.flags & CKF_HW_SLOT != 0).to_string()
    };

    pads_texts_with_nul covers ["token.pad"]: "0 0", not "32 32",
    with r#"token.pad = "nul""#, |module| {
        module.initialize().unwrap();
        let info = module.info();
        format!("{} {}", info.label[31], info.model[15])
    };

    shows_another_label covers ["token.label"]: "twin", not "different",
    with r#"token.label = "twin""#, |module| {
        module.initialize().unwrap();
        let label = text(&module.info().label);
        if label.trim() == "twin" { "twin" } else { "different" }.to_owned()
    };

    shows_an_empty_serial covers ["token.serial"]: "0 characters", not "16 characters",
    with r#"token.serial = """#, |module| {
        module.initialize().unwrap();
        format!("{} characters", text(&module.info().serialNumber).trim().len())
    };

    shows_a_changing_serial covers ["token.changing_serial"]: "changes", not "stays",
    with "token.changing_serial = true", |module| {
        module.initialize().unwrap();
        let same = module.info().serialNumber == module.info().serialNumber;
        if same { "stays" } else { "changes" }.to_owned()
    };

    shows_an_odd_clock covers ["token.utc_time"]: "21:38:18", not "14 digits",
    with r#"token.utc_time = "21:38:18""#, |module| {
        module.initialize().unwrap();
        let time = text(&module.info().utcTime);
        let digits = time.bytes().take_while(u8::is_ascii_digit).count();
        if digits >= 14 { "14 digits".to_owned() } else { time.trim_end_matches('\0').to_owned() }
    };

    shows_a_flag covers ["token.set_flags"]: "true", not "false",
    with r#"token.set_flags = ["CKF_ERROR_STATE"]"#, |module| {
        module.initialize().unwrap();
        (module.info().flags & CKF_ERROR_STATE != 0).to_string()
    };

    hides_a_flag covers ["token.clear_flags"]: "false", not "true",
    with r#"token.clear_flags = ["CKF_LOGIN_REQUIRED"]"#, |module| {
        module.initialize().unwrap();
        (module.info().flags & CKF_LOGIN_REQUIRED != 0).to_string()
    };

    limits_sessions covers ["sessions.max"]: "ok ok CKR_SESSION_COUNT, later ok", not "ok ok ok, later ok",
    with "sessions.max = 2", |module| {
        module.initialize().unwrap();
        let first = module.open();
        let seen = [outcome(first), outcome(module.open()), outcome(module.open())];
        call!(module, C_CloseSession(first.unwrap())).unwrap();
        format!("{}, later {}", seen.join(" "), outcome(module.open()))
    };

    refuses_read_only_sessions covers ["sessions.refuse_read_only"]: "CKR_TOKEN_WRITE_PROTECTED ok", not "ok ok",
    with r#"sessions.refuse_read_only = "CKR_TOKEN_WRITE_PROTECTED""#, |module| {
        module.initialize().unwrap();
        let slot = module.slot();
        format!("{} {}", outcome(module.open_as(slot, 0)), outcome(module.open_as(slot, CKF_RW_SESSION)))
    };

    limits_parallel_calls covers ["limits.parallel_calls", "limits.refuse"]: "CKR_DEVICE_MEMORY, later ok", not "ok, later ok",
    with r#"
        [limits]
        parallel_calls = 1
        refuse = "CKR_DEVICE_MEMORY"
    "#, |module| {
        let session = module.ready();
        let key = module.secret(session, &[]).unwrap();
        // As another process that is calling does.
        let other = File::create(module.folder().join("operation-0")).unwrap();
        other.lock().unwrap();
        let refused = outcome(module.sign(session, key, b"data"));
        drop(other);
        // The operation that was refused is still active in the first session.
        let session = module.open().unwrap();
        format!("{refused}, later {}", outcome(module.sign(session, key, b"data")))
    };

    limits_operations_per_second covers ["limits.operations_per_second"]: "limited", not "unlimited",
    with "limits.operations_per_second = 20", |module| {
        let session = module.ready();
        let key = module.secret(session, &[]).unwrap();
        // Five operations are four intervals of 50 ms, however busy the machine is.
        let is_limited = (0..5).all(|_| {
            let began = Instant::now();
            for _ in 0..5 {
                module.sign(session, key, b"data").unwrap();
            }
            began.elapsed() >= Duration::from_millis(200)
        });
        if is_limited { "limited" } else { "unlimited" }.to_owned()
    };

    takes_its_time covers ["limits.latency_ms"]: "slow", not "fast",
    with "limits.latency_ms = 50", |module| {
        let session = module.ready();
        let key = module.secret(session, &[]).unwrap();
        let slow = is_slow(Duration::from_millis(50), || {
            module.sign(session, key, b"data").unwrap();
        });
        if slow { "slow" } else { "fast" }.to_owned()
    };

    lacks_a_mechanism covers ["mechanism.absent"]: "false CKR_MECHANISM_INVALID, true", not "true ok, true",
    with r#"
        [[mechanism]]
        absent = "CKM_SHA256_HMAC"
    "#, |module| {
        let session = module.ready();
        let key = module.secret(session, &[]).unwrap();
        let signed = outcome(module.sign(session, key, b"data"));
        format!("{} {signed}, {}", shows(module, CKM_SHA256_HMAC), shows(module, CKM_AES_KEY_GEN))
    };

    lacks_a_mechanism_for_one_function covers ["mechanism.functions", "mechanism.refuse"]:
    "true ok CKR_FUNCTION_NOT_SUPPORTED", not "true ok ok",
    with r#"
        [[mechanism]]
        absent = "CKM_SHA256_HMAC"
        functions = ["C_VerifyInit"]
        refuse = "CKR_FUNCTION_NOT_SUPPORTED"
    "#, |module| {
        let session = module.ready();
        let key = module.secret(session, &[]).unwrap();
        let mac = module.sign(session, key, b"data");
        let verified = module.verify(session, key, b"data", mac.as_deref().unwrap());
        format!("{} {} {}", shows(module, CKM_SHA256_HMAC), outcome(mac), outcome(verified))
    };
}
