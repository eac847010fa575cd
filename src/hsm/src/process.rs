//! Starts worker processes, and describes how they ended.

use std::{
    io,
    os::{
        fd::OwnedFd,
        unix::{
            net::UnixStream,
            process::{CommandExt as _, ExitStatusExt as _},
        },
    },
    path::Path,
    process::{Command, ExitStatus, Stdio},
};

use keybroker_worker_protocol::Settings;

/// Prepares a worker process. `worker` is the hidden command that runs the worker. Returns the command and the front's
/// end of the socket; the worker's end is the worker's standard input.
///
/// The environment of every worker contains exactly the variables of `[token.environment]`, both for `serve` and for
/// commands.
pub(crate) fn command(
    program: &Path,
    settings: &Settings,
    worker: &str,
) -> io::Result<(Command, UnixStream)> {
    let (ours, theirs) = UnixStream::pair()?;
    let mut command = Command::new(program);
    command
        .arg0("keybroker")
        .arg(worker)
        .env_clear()
        .envs(&settings.environment)
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        // The worker gets a separate process group, so that Ctrl-C at a terminal reaches only the front.
        .process_group(0);
    Ok((command, ours))
}

/// Names of the signals that usually end a process: signals that a defect causes, and signals that users or the kernel
/// send.
const SIGNALS: [(i32, &str); 10] = [
    (3, "SIGQUIT"),
    (4, "SIGILL"),
    (5, "SIGTRAP"),
    (6, "SIGABRT"),
    (7, "SIGBUS"),
    (8, "SIGFPE"),
    (9, "SIGKILL"),
    (11, "SIGSEGV"),
    (15, "SIGTERM"),
    (31, "SIGSYS"),
];

/// Describes in a message how a process ended.
pub(crate) fn describe_end(status: ExitStatus) -> String {
    let Some(signal) = status.signal() else {
        return match status.code() {
            Some(code) => format!("exited with code {code}"),
            None => "ended".to_owned(),
        };
    };
    match SIGNALS.iter().find(|(number, _)| *number == signal) {
        Some((_, name)) => format!("was ended by signal {signal} ({name})"),
        None => format!("was ended by signal {signal}"),
    }
}

/// Describes in a message which function of the module the worker called last, if the worker reported a function.
pub(crate) fn describe_call(calling: Option<&str>, module: &Path) -> String {
    match calling {
        Some("dlopen") => format!("while it loaded {}", module.display()),
        Some(function) => format!("in {function} of {}", module.display()),
        None => format!("before it loaded {}", module.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_names_signal_function_and_module() {
        let crashed = ExitStatus::from_raw(11);
        assert_eq!(describe_end(crashed), "was ended by signal 11 (SIGSEGV)");
        assert_eq!(
            describe_end(ExitStatus::from_raw(3 << 8)),
            "exited with code 3"
        );
        let module = Path::new("/lib/m.so");
        assert_eq!(
            describe_call(Some("C_Login"), module),
            "in C_Login of /lib/m.so"
        );
        assert_eq!(
            describe_call(Some("dlopen"), module),
            "while it loaded /lib/m.so"
        );
        assert_eq!(describe_call(None, module), "before it loaded /lib/m.so");
    }
}
