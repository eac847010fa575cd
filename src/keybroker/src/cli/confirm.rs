//! Asks a person to type an id again, before a change that cannot be undone.

use std::io::{self, IsTerminal as _};

use super::{
    exit::{Exit, Failure},
    output::Output,
};

/// Prompts for an id, unless the command has `--yes`. `warning` is the text of the prompt, a sentence without a full stop, and
/// `thing` is what the id identifies.
pub(super) fn typed_id(
    output: Output,
    is_confirmed: bool,
    id: &str,
    thing: &str,
    warning: &str,
) -> Result<(), Failure> {
    if is_confirmed {
        return Ok(());
    }
    let refuse = |what: String| Err(Failure::new(Exit::Usage, what));
    if !io::stdin().is_terminal() {
        return refuse(format!(
            "this command needs a confirmation: pass --yes, or run the command at a terminal and type the id of the {thing}"
        ));
    }
    output.note(&format!(
        "{warning}. To continue, type the id of the {thing}:"
    ));
    let mut line = String::new();
    let typed = io::stdin().read_line(&mut line);
    if typed.is_err() || !line.trim().eq_ignore_ascii_case(id) {
        return refuse(format!(
            "the typed id is not the id of the {thing}; nothing was changed"
        ));
    }
    Ok(())
}
