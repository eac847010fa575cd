//! The control socket: one command a line, answered by lines that end with `ok` or begin with `error`.

use std::{
    fmt::Write as _,
    fs,
    io::{self, BufRead as _, BufReader, Write as _},
    os::unix::net::{UnixListener, UnixStream},
    thread,
};

use crate::process::{Process, report};

/// Listens on `control-PID` in the state directory, if the script wants it.
pub(crate) fn start(process: &'static Process) {
    let wanted = process.script().is_some_and(|script| script.control);
    let Some(state) = process.state.as_ref().filter(|_| wanted) else {
        return;
    };
    let path = state.join(format!("control-{}", process.id()));
    // Of an earlier process with this id.
    if path.exists()
        && let Err(error) = fs::remove_file(&path)
    {
        report(&error);
    }
    match UnixListener::bind(&path) {
        Ok(listener) => {
            thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    thread::spawn(move || {
                        if let Err(error) = serve(process, &stream) {
                            report(&error);
                        }
                    });
                }
            });
        }
        Err(error) => report(&error),
    }
}

fn serve(process: &Process, stream: &UnixStream) -> io::Result<()> {
    let mut answers = stream.try_clone()?;
    for line in BufReader::new(stream).lines() {
        let mut answer = String::new();
        match line?.trim() {
            "counts" => {
                for count in process.shared.counts() {
                    if count.calls > 0 {
                        let (name, calls, good) = (count.function, count.calls, count.succeeded);
                        writeln!(answer, "{name} {calls} {good}").map_err(io::Error::other)?;
                    }
                }
            }
            "close-sessions" => process.close_sessions(),
            "logout" => process.log_out(),
            "new-handles" => process.change_handles(),
            "reload" => process.reload(),
            other => {
                writeln!(answers, "error: {other:?} is not a command")?;
                continue;
            }
        }
        answer.push_str("ok\n");
        answers.write_all(answer.as_bytes())?;
    }
    Ok(())
}
