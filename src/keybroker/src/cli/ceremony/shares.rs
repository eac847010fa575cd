//! Shows shares to custodians, one at a time, and reads shares back. A share is never written to standard output, to a log
//! or to a file.
//!
//! Mitigation: M23 of `THREAT_MODEL.md`.

use std::{
    fs::{File, OpenOptions},
    io::{self, BufRead as _, BufReader, IsTerminal as _, Write as _},
};

use rustix::termios::{
    LocalModes, OptionalActions, QueueSelector, Termios, tcflush, tcgetattr, tcsetattr,
};
use zeroize::Zeroizing;

use keybroker_ceremony::{
    share::{self, Share, ShareError},
    transcript::Token,
};

use crate::cli::exit::{Exit, Failure};

/// Clears the screen and the lines that can be scrolled back to, and moves the cursor to the top left.
const CLEAR: &str = "\x1b[H\x1b[2J\x1b[3J";
/// How often a custodian may type a share.
const TRIES: u32 = 3;
/// Room for a line of input, in bytes. A longer line is copied, and the first copy is not overwritten.
const LINE_BYTES: usize = 1_024;

/// Where shares are shown.
#[derive(Debug)]
pub(super) enum Display {
    /// The terminal of the process.
    Terminal(Terminal),
    /// Nowhere: a rehearsal makes shares of a PIN that is not used afterwards.
    Nowhere,
}

impl Display {
    /// Shows each custodian one share.
    pub(super) fn show(&mut self, shares: &[(String, Share)]) -> Result<(), Failure> {
        match self {
            Self::Terminal(terminal) => shares
                .iter()
                .try_for_each(|(name, share)| terminal.show(name, share)),
            Self::Nowhere => Ok(()),
        }
    }
}

/// The terminal of the process.
#[derive(Debug)]
pub(super) struct Terminal {
    input: BufReader<File>,
    output: File,
}

impl Terminal {
    pub(super) fn open() -> Result<Self, Failure> {
        let no_terminal = |error: io::Error| {
            Failure::new(
                Exit::Usage,
                format!(
                    "the shares of a PIN are shown at a terminal, and this process has none ({error}). Nothing was changed"
                ),
            )
        };
        let open = || OpenOptions::new().read(true).write(true).open("/dev/tty");
        Ok(Self {
            input: BufReader::new(open().map_err(no_terminal)?),
            output: open().map_err(no_terminal)?,
        })
    }

    /// Shows a share until its custodian has typed it back. A share that was not written down would be noticed only when it is
    /// needed.
    fn show(&mut self, custodian: &str, share: &Share) -> Result<(), Failure> {
        for _ in 0..TRIES {
            self.confirm(custodian, share.number())?;
            self.show_once(custodian, share)?;
            if self.is_typed_back(custodian, share)? {
                return self.write(&format!(
                    "The share is right. {custodian} keeps share {}.\r\n",
                    share.number()
                ));
            }
            self.write("This is not the share. It is shown again.\r\n")?;
        }
        let what = format!(
            "{custodian} did not type share {} as it was shown, so the PIN was discarded. The token was not changed",
            share.number()
        );
        Err(Failure::new(Exit::Pin, what))
    }

    /// Waits until the custodian has typed their name. A bare Enter is not enough, because the custodian before may have
    /// pressed Enter twice.
    fn confirm(&mut self, custodian: &str, number: u8) -> Result<(), Failure> {
        let prompt = format!(
            "\r\nShare {number} is for {custodian}. Only {custodian} looks at the screen now.\r\n\
             Type the name {custodian} and press Enter to see the share: "
        );
        while self.ask(&[&prompt])?.trim() != custodian {}
        Ok(())
    }

    fn show_once(&mut self, custodian: &str, share: &Share) -> Result<(), Failure> {
        let line = share.to_line();
        let before = format!(
            "{CLEAR}Share {}, for {custodian}:\r\n\r\n    ",
            share.number()
        );
        let after = "\r\n\r\nWrite the share down, with the number before the first hyphen.\r\n\
                     Press Enter to clear the screen: ";
        let asked = self.ask(&[&before, &line, after]);
        // The screen is cleared even if the input ended.
        let cleared = self.write(CLEAR);
        asked.and(cleared)
    }

    /// Reads a line without showing it, and compares it with a share.
    fn is_typed_back(&mut self, custodian: &str, share: &Share) -> Result<bool, Failure> {
        let prompt = format!(
            "{custodian} types share {} from the paper and presses Enter. The text is not shown: ",
            share.number()
        );
        let _silent = Silent::start(&self.output).map_err(|error| lost(&error))?;
        loop {
            let line = self.ask(&[&prompt])?;
            self.write("\r\n")?;
            if !line.trim().is_empty() {
                return Ok(Share::from_line(&line).is_ok_and(|typed| typed == *share));
            }
        }
    }

    fn write(&mut self, text: &str) -> Result<(), Failure> {
        let written = self.output.write_all(text.as_bytes());
        written
            .and_then(|()| self.output.flush())
            .map_err(|error| lost(&error))
    }

    /// Discards what was typed so far, writes the parts of a prompt, and reads a line. The parts are written one by one, so
    /// that no further copy of a share is made.
    fn ask(&mut self, prompt: &[&str]) -> Result<Zeroizing<String>, Failure> {
        self.discard_input()?;
        for part in prompt {
            self.write(part)?;
        }
        let mut line = Zeroizing::new(String::with_capacity(LINE_BYTES));
        match self.input.read_line(&mut line) {
            Ok(0) => Err(lost(&io::Error::from(io::ErrorKind::UnexpectedEof))),
            Ok(_) => Ok(line),
            Err(error) => Err(lost(&error)),
        }
    }

    fn discard_input(&mut self) -> Result<(), Failure> {
        let read = self.input.buffer().len();
        self.input.consume(read);
        tcflush(&self.output, QueueSelector::IFlush).map_err(|error| lost(&error.into()))
    }
}

/// A terminal that does not show what is typed. The terminal shows it again when this value is dropped.
struct Silent {
    terminal: File,
    before: Termios,
}

impl Silent {
    fn start(terminal: &File) -> io::Result<Self> {
        let terminal = terminal.try_clone()?;
        let before = tcgetattr(&terminal)?;
        let mut silent = before.clone();
        silent.local_modes.remove(LocalModes::ECHO);
        tcsetattr(&terminal, OptionalActions::Flush, &silent)?;
        Ok(Self { terminal, before })
    }
}

impl Drop for Silent {
    fn drop(&mut self) {
        if let Err(error) = tcsetattr(&self.terminal, OptionalActions::Now, &self.before) {
            tracing::error!(%error, "cannot restore the terminal, so it does not show what you type; run `stty echo`");
        }
    }
}

fn lost(error: &io::Error) -> Failure {
    Failure::new(
        Exit::Usage,
        format!("the terminal was lost while shares were shown: {error}"),
    )
}

/// Reads as many shares as the threshold says from the terminal, or all lines of standard input, and combines them. Without a token
/// of a transcript, the threshold is that of the first share, and no share is compared with a digest.
pub(super) fn combine(token: Option<&Token>) -> Result<Zeroizing<String>, Failure> {
    let threshold = token.map(threshold).transpose()?;
    let shares = if io::stdin().is_terminal() {
        from_terminal(token, threshold)?
    } else {
        from_standard_input(token)?
    };
    if shares.is_empty() {
        // A PIN is split into at least two shares.
        let (needed, given) = (threshold.unwrap_or(2), 0);
        return Err(no_pin(&ShareError::TooFew { needed, given }));
    }
    share::combine(&shares).map_err(|error| no_pin(&error))
}

fn threshold(token: &Token) -> Result<usize, Failure> {
    token
        .so_pin
        .as_ref()
        .and_then(|so_pin| usize::try_from(so_pin.threshold).ok())
        .ok_or_else(|| {
            let what = format!("the ceremony did not split a PIN of token {:?}", token.name);
            Failure::new(Exit::Usage, what)
        })
}

fn from_terminal(
    token: Option<&Token>,
    mut threshold: Option<usize>,
) -> Result<Vec<Share>, Failure> {
    let mut shares: Vec<Share> = Vec::new();
    while threshold.is_none_or(|threshold| shares.len() < threshold) {
        let share = typed(token, shares.len() + 1, threshold)?;
        if shares.iter().any(|one| one.number() == share.number()) {
            return Err(no_pin(&ShareError::Twice(share.number())));
        }
        threshold = threshold.or(Some(share.threshold()));
        shares.push(share);
    }
    Ok(shares)
}

fn typed(token: Option<&Token>, place: usize, threshold: Option<usize>) -> Result<Share, Failure> {
    let mut tries = TRIES;
    let of = threshold.map_or_else(String::new, |threshold| format!(" of {threshold}"));
    loop {
        let prompt = format!("Share {place}{of}: ");
        let line = rpassword::prompt_password(prompt)
            .map(Zeroizing::new)
            .map_err(|error| Failure::new(Exit::Pin, format!("cannot read the share: {error}")))?;
        match parse(token, &line) {
            Ok(share) => return Ok(share),
            Err(failure) => {
                tries -= 1;
                if tries == 0 {
                    return Err(failure);
                }
                Terminal::open()?.write(&format!("{failure}\r\n"))?;
            }
        }
    }
}

fn from_standard_input(token: Option<&Token>) -> Result<Vec<Share>, Failure> {
    let mut shares = Vec::new();
    for (index, line) in io::stdin().lock().lines().enumerate() {
        let line = line
            .map(Zeroizing::new)
            .map_err(|error| Failure::new(Exit::Pin, format!("cannot read the shares: {error}")))?;
        if line.trim().is_empty() {
            continue;
        }
        let place = index + 1;
        shares.push(
            parse(token, &line).map_err(|failure| {
                Failure::new(failure.exit, format!("line {place}: {failure}"))
            })?,
        );
    }
    Ok(shares)
}

/// Reads a share, and compares it with the digest in the transcript. The error names the custodian of the share. Without a transcript,
/// only the checksum of the share is compared.
fn parse(token: Option<&Token>, line: &str) -> Result<Share, Failure> {
    let Some(token) = token else {
        return Share::from_line(line).map_err(|error| no_pin(&error));
    };
    let share = Share::from_line(line).map_err(|error| {
        let number = match error {
            ShareError::Mistyped { number } | ShareError::Version { number, .. } => Some(number),
            _ => None,
        };
        match number.and_then(|number| token.share(number)) {
            Some(known) => {
                let what = format!(
                    "{error} (share {} belongs to {})",
                    known.number, known.custodian
                );
                Failure::new(Exit::Pin, what)
            }
            None => no_pin(&error),
        }
    })?;
    let number = share.number();
    let Some(known) = token.share(number) else {
        let what = format!(
            "share {number} is not one of this ceremony: the transcript has no share {number}"
        );
        return Err(Failure::new(Exit::Pin, what));
    };
    if known.sha256 != share.digest() {
        let what = format!(
            "share {number}, which belongs to {}, is not the share of this ceremony: it has another digest than in the \
             transcript",
            known.custodian
        );
        return Err(Failure::new(Exit::Pin, what)
            .hint("ask the custodian for the share of this ceremony, or use the share of another custodian"));
    }
    Ok(share)
}

fn no_pin(error: &ShareError) -> Failure {
    let failure = Failure::new(Exit::Pin, error.to_string());
    match error {
        ShareError::TooFew { .. } => failure.hint("ask further custodians; nothing was changed"),
        _ => failure,
    }
}

#[cfg(test)]
mod tests {
    use keybroker_ceremony::transcript::{ShareDigest, SoPin};

    use super::*;

    fn token(shares: &[Share]) -> Token {
        let digest = |(share, name): (&Share, &str)| ShareDigest {
            number: share.number().into(),
            custodian: name.to_owned(),
            sha256: share.digest(),
        };
        Token {
            name: "default".to_owned(),
            so_pin: Some(SoPin {
                threshold: 2,
                characters: 24,
                shares: shares
                    .iter()
                    .zip(["ada", "bob", "cyd"])
                    .map(digest)
                    .collect(),
            }),
            ..Token::default()
        }
    }

    #[test]
    fn a_wrong_share_is_named_by_its_custodian() {
        let shares = share::split("SECRET", 2, 3).unwrap();
        let token = token(&shares);
        for share in &shares {
            assert_eq!(parse(Some(&token), &share.to_line()).unwrap(), *share);
        }
        let other = share::split("SECRET", 2, 4).unwrap();
        let refused = parse(Some(&token), &other[1].to_line())
            .unwrap_err()
            .message;
        assert!(refused.contains("belongs to bob"), "{refused}");
        let refused = parse(Some(&token), &other[3].to_line())
            .unwrap_err()
            .message;
        assert!(refused.contains("no share 4"), "{refused}");
        let mut line = shares[2].to_line().to_string();
        let last = line.pop().unwrap();
        line.push(if last == 'A' { 'B' } else { 'A' });
        let refused = parse(Some(&token), &line).unwrap_err().message;
        assert!(
            refused.contains("mistyped") && refused.contains("belongs to cyd"),
            "{refused}"
        );
        assert!(!refused.contains(&line[2..]), "{refused}");
    }
}
