//! Rules: which calls they hit, and what they do.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    os::unix::net::UnixStream,
    process, thread,
    time::{Duration, Instant},
};

use cryptoki_sys::{CK_SESSION_HANDLE, CK_SESSION_INFO, CKO_SECRET_KEY};
use keybroker_scriptable_pkcs11::CALLS_FILE;

use crate::{
    cases,
    module::{Module, call, is_slow, outcome, until},
};

/// What several calls of one function return.
fn randoms(module: &Module, calls: usize) -> String {
    let session = module.ready();
    let outcomes = (0..calls).map(|_| outcome(module.random(session)));
    outcomes.collect::<Vec<_>>().join(" ")
}

/// The numbers of the calls that failed.
fn failed(outcomes: &str) -> String {
    let hit = outcomes.split(' ').enumerate();
    hit.filter(|(_, outcome)| *outcome != "ok")
        .map(|(number, _)| number.to_string())
        .collect::<Vec<_>>()
        .join(" ")
}

/// Whether the call returns within a time that it takes on no machine.
fn returns(module: &Module, session: CK_SESSION_HANDLE) -> bool {
    (0..5).any(|_| {
        let wait = Duration::from_millis(300);
        thread::scope(|scope| {
            let call = scope.spawn(|| module.random(session).unwrap());
            let began = Instant::now();
            while !call.is_finished() && began.elapsed() < wait {
                thread::sleep(Duration::from_millis(5));
            }
            let returned = call.is_finished();
            // Ends the call: without its rule it returns.
            let script = module.script();
            module.set_script(&script.replace("hang = true", "hang = false"));
            call.join().unwrap();
            module.set_script(&script);
            returned
        })
    })
}

fn state(module: &Module, session: CK_SESSION_HANDLE) -> String {
    let mut info = CK_SESSION_INFO::default();
    match call!(module, C_GetSessionInfo(session, &raw mut info)) {
        Ok(()) => info.state.to_string(),
        Err(code) => code.to_string(),
    }
}

/// Sends one command to the control socket of this process and returns the answer.
fn control(module: &Module, command: &str) -> String {
    let path = module.folder().join(format!("control-{}", process::id()));
    let Ok(mut stream) = UnixStream::connect(path) else {
        return "no socket".to_owned();
    };
    writeln!(stream, "{command}").unwrap();
    let lines = BufReader::new(stream).lines().map(Result::unwrap);
    let mut answer = Vec::new();
    for line in lines {
        let is_last = line == "ok" || line.starts_with("error");
        answer.push(line);
        if is_last {
            break;
        }
    }
    answer.join(", ")
}

/// The lines of the log about one function.
fn logged(module: &Module, function: &str) -> String {
    let text = std::fs::read_to_string(module.folder().join(CALLS_FILE)).unwrap_or_default();
    let own = process::id().to_string();
    text.lines()
        .filter_map(|line| line.strip_prefix(&own)?.trim_start().strip_prefix(function))
        .map(str::trim)
        .collect::<Vec<_>>()
        .join(", ")
}

cases! {
    returns_a_code covers ["rule.do.return"]: "CKR_DEVICE_ERROR", not "ok",
    with r#"
        [[rule]]
        function = "C_GenerateRandom"
        do = { return = "CKR_DEVICE_ERROR" }
    "#, |module| randoms(module, 1);

    returns_a_code_of_the_vendor_from_several_functions covers ["rule.do.return"]: "0x80000001 0x80000001", not "ok ok",
    with r#"
        [[rule]]
        function = ["C_GenerateRandom", "C_SignInit"]
        do = { return = 0x80000001 }
    "#, |module| {
        let session = module.ready();
        let key = module.secret(session, &[]).unwrap();
        format!("{} {}", outcome(module.random(session)), outcome(module.sign(session, key, b"data")))
    };

    hits_one_call covers ["rule.on.call"]: "ok ok CKR_DEVICE_ERROR ok", not "ok ok ok ok",
    with r#"
        [[rule]]
        function = "C_GenerateRandom"
        on = { call = 3 }
        do = { return = "CKR_DEVICE_ERROR" }
    "#, |module| randoms(module, 4);

    hits_every_second_call covers ["rule.on.every"]: "ok CKR_DEVICE_ERROR ok CKR_DEVICE_ERROR", not "ok ok ok ok",
    with r#"
        [[rule]]
        function = "C_GenerateRandom"
        on = { every = 2 }
        do = { return = "CKR_DEVICE_ERROR" }
    "#, |module| randoms(module, 4);

    // The same seed and name always give the same calls.
    hits_random_calls covers ["rule.on.probability"]: "4 5 8 9 10 11 14 15 19 22 24 27 37 38", not "",
    with r#"
        seed = 7
        [[rule]]
        name = "random"
        function = "C_GenerateRandom"
        on = { probability = 0.25 }
        do = { return = "CKR_DEVICE_ERROR" }
    "#, |module| failed(&randoms(module, 40));

    hits_other_calls_with_another_seed covers ["seed"]: "1 6 10 11 13 14 17 18 21 29 30 34 36 38", not "",
    with r#"
        seed = 8
        [[rule]]
        name = "random"
        function = "C_GenerateRandom"
        on = { probability = 0.25 }
        do = { return = "CKR_DEVICE_ERROR" }
    "#, |module| failed(&randoms(module, 40));

    hits_calls_after_others covers ["rule.on.skip", "rule.on.times"]:
    "ok CKR_DEVICE_ERROR CKR_DEVICE_ERROR ok", not "ok ok ok ok",
    with r#"
        [[rule]]
        function = "C_GenerateRandom"
        on = { skip = 1, times = 2 }
        do = { return = "CKR_DEVICE_ERROR" }
    "#, |module| randoms(module, 4);

    hits_one_process covers ["rule.on.process"]: "ok CKR_DEVICE_ERROR", not "ok ok",
    with r#"
        [[rule]]
        function = "C_GenerateRandom"
        on = { process = 1 }
        do = { return = "CKR_DEVICE_ERROR" }
    "#, |module| {
        let session = module.ready();
        let other = outcome(module.random(session));
        let script = module.script().replace("process = 1", &format!("process = {}", process::id()));
        module.set_script(&script);
        format!("{other} {}", outcome(module.random(session)))
    };

    hides_a_success covers ["rule.do.when = succeeded"]: "CKR_DEVICE_ERROR 1", not "ok 1",
    with r#"
        [[rule]]
        function = "C_GenerateKey"
        do = { return = "CKR_DEVICE_ERROR", when = "succeeded" }
    "#, |module| {
        let session = module.ready();
        let made = outcome(module.secret(session, &[]));
        format!("{made} {}", module.find_class(session, CKO_SECRET_KEY).unwrap().len())
    };

    hides_a_failure covers ["rule.do.when = failed"]: "ok ok", not "CKR_SIGNATURE_INVALID ok",
    with r#"
        [[rule]]
        function = "C_Verify"
        do = { return = "CKR_OK", when = "failed" }
    "#, |module| {
        let session = module.ready();
        let key = module.secret(session, &[]).unwrap();
        let mac = module.sign(session, key, b"data").unwrap();
        let wrong = outcome(module.verify(session, key, b"other", &mac));
        format!("{wrong} {}", outcome(module.verify(session, key, b"data", &mac)))
    };

    delays_a_call covers ["rule.do.delay_ms"]: "slow", not "fast",
    with r#"
        [[rule]]
        function = "C_GenerateRandom"
        do = { delay_ms = 50 }
    "#, |module| {
        let session = module.ready();
        let slow = is_slow(Duration::from_millis(50), || { module.random(session).unwrap(); });
        if slow { "slow" } else { "fast" }.to_owned()
    };

    hangs_until_the_rule_is_gone covers ["rule.do.hang"]: "hangs", not "returns",
    with r#"
        [[rule]]
        name = "hanging"
        function = "C_GenerateRandom"
        do = { hang = true }
    "#, |module| {
        let session = module.ready();
        if returns(module, session) { "returns" } else { "hangs" }.to_owned()
    };

    aborts_the_process covers ["rule.do.abort"]: "signal 6", not "ok",
    with r#"
        [[rule]]
        function = "C_GenerateRandom"
        do = { abort = true }
    "#, |module| randoms(module, 1);

    crashes_the_process covers ["rule.do.segfault"]: "signal 11", not "ok",
    with r#"
        [[rule]]
        function = "C_GenerateRandom"
        do = { segfault = true }
    "#, |module| randoms(module, 1);

    ends_the_process covers ["rule.do.exit"]: "exit 7", not "ok",
    with r#"
        [[rule]]
        function = "C_GenerateRandom"
        do = { exit = 7 }
    "#, |module| randoms(module, 1);

    corrupts_output covers ["rule.do.corrupt"]: "32 bytes, 1 bit wrong", not "32 bytes, 0 bit wrong",
    with r#"
        [[rule]]
        function = "C_Sign"
        on = { call = 2 }
        do = { corrupt = true }
    "#, |module| {
        let session = module.ready();
        let key = module.secret(session, &[]).unwrap();
        let right = module.sign(session, key, b"data").unwrap();
        let wrong = module.sign(session, key, b"data").unwrap();
        let bits: u32 = right.iter().zip(&wrong).map(|(right, wrong)| (right ^ wrong).count_ones()).sum();
        format!("{} bytes, {bits} bit wrong", wrong.len())
    };

    truncates_output covers ["rule.do.truncate"]: "31 bytes", not "32 bytes",
    with r#"
        [[rule]]
        function = "C_Sign"
        do = { truncate = 1 }
    "#, |module| {
        let session = module.ready();
        let key = module.secret(session, &[]).unwrap();
        format!("{} bytes", module.sign(session, key, b"data").unwrap().len())
    };

    closes_all_sessions covers ["rule.do.close_sessions"]: "CKR_SESSION_HANDLE_INVALID, then 2", not "ok, then 3",
    with r#"
        [[rule]]
        function = "C_GenerateRandom"
        do = { close_sessions = true }
    "#, |module| {
        let session = module.ready();
        let lost = outcome(module.random(session));
        // The login is lost with the sessions.
        format!("{lost}, then {}", state(module, module.open().unwrap()))
    };

    loses_the_login covers ["rule.do.logout"]: "2", not "3",
    with r#"
        [[rule]]
        function = "C_GetSessionInfo"
        do = { logout = true }
    "#, |module| {
        let session = module.ready();
        state(module, session)
    };

    changes_handles covers ["rule.do.new_handles"]: "CKR_KEY_HANDLE_INVALID, found again: ok", not "ok, found again: ok",
    with r#"
        [[rule]]
        function = "C_GenerateRandom"
        do = { new_handles = true }
    "#, |module| {
        let session = module.ready();
        let key = module.secret(session, &[]).unwrap();
        module.random(session).unwrap();
        let old = outcome(module.sign(session, key, b"data"));
        let found = module.find_class(session, CKO_SECRET_KEY).unwrap();
        format!("{old}, found again: {}", outcome(module.sign(session, found[0], b"data")))
    };

    logs_calls covers ["log_calls"]: "begins, ends 0, begins, ends 48", not "",
    with r#"
        log_calls = true
        [[rule]]
        function = "C_GenerateRandom"
        on = { call = 2 }
        do = { return = "CKR_DEVICE_ERROR" }
    "#, |module| {
        randoms(module, 2);
        logged(module, "C_GenerateRandom")
    };

    obeys_the_control_socket covers ["control"]:
    "error: \"what\" is not a command; C_GenerateRandom 2 2; ok; CKR_KEY_HANDLE_INVALID; ok; 2; ok; CKR_SESSION_HANDLE_INVALID",
    not "no socket; ; no socket; ok; no socket; 3; no socket; 3",
    with "control = true", |module| {
        let session = module.ready();
        let key = module.secret(session, &[]).unwrap();
        let unknown = control(module, "what");
        module.random(session).unwrap();
        module.random(session).unwrap();
        until("count", || module.calls("C_GenerateRandom") == 2);
        let counts = control(module, "counts");
        let counted = counts.split(", ").find(|line| line.starts_with("C_GenerateRandom"));
        let mut seen = vec![unknown, counted.unwrap_or_default().to_owned()];
        seen.push(control(module, "new-handles"));
        seen.push(outcome(module.sign(session, key, b"data")));
        seen.push(control(module, "logout"));
        seen.push(state(module, session));
        seen.push(control(module, "close-sessions"));
        seen.push(state(module, session));
        seen.join("; ")
    };
}
