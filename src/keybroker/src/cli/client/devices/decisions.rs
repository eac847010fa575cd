//! Decisions about requests for access: one request, or several with a result for each.

use std::{
    collections::BTreeSet,
    fs::File,
    io::{self, IsTerminal as _, Read as _},
    path::{Path, PathBuf},
};

use clap::{ArgGroup, Args};
use keybroker_client::{AccessRequestId, UserId, proto};
use serde_json::{Value, json};

use crate::cli::{
    confirm::typed_id,
    exit::{Exit, Failure},
    output::{Field, printable},
};

use super::{
    super::{Caller, arguments, refusal::failure},
    phrase, request_fields, request_state,
};

/// Highest number of requests of one command.
const REQUESTS_MAX: usize = 200;
/// Longest file with words, in bytes.
const WORDS_FILE_BYTES_MAX: u64 = 64 * 1024;

#[derive(Args, Debug)]
#[command(group(ArgGroup::new("which").required(true).args(["ids", "words_file"])))]
pub(in crate::cli::client) struct ApproveArguments {
    /// Ids of the requests, 32 hexadecimal digits each
    #[arg(value_name = "ID", value_parser = arguments::access_request_id)]
    ids: Vec<AccessRequestId>,
    /// The two words, instead of a prompt; only with one id
    #[arg(long, num_args = 2, value_names = ["WORD", "WORD"], conflicts_with = "words_file")]
    words: Vec<String>,
    /// File with one line for each request: its id and its two words; `-` is standard input
    #[arg(long, value_name = "FILE")]
    words_file: Option<PathBuf>,
}

#[derive(Args, Debug)]
#[command(group(ArgGroup::new("which").required(true).args(["ids", "user"])))]
pub(in crate::cli::client) struct DenyArguments {
    /// Ids of the requests, 32 hexadecimal digits each
    #[arg(value_name = "ID", value_parser = arguments::access_request_id)]
    ids: Vec<AccessRequestId>,
    /// Deny all pending requests of this member
    #[arg(long, value_parser = arguments::user)]
    user: Option<UserId>,
    /// Do not ask for a confirmation; only with --user
    #[arg(long, requires = "user")]
    yes: bool,
}

/// A request to approve; without words, the command asks for them.
type Wanted = (AccessRequestId, Option<[String; 2]>);
/// The result of a decision about one request.
type Decided = (AccessRequestId, Result<proto::AccessRequest, Failure>);

impl ApproveArguments {
    /// The requests to approve.
    fn wanted(self) -> Result<Vec<Wanted>, Failure> {
        if let Some(file) = &self.words_file {
            return wanted_in(&read(file)?, file);
        }
        let words = <[String; 2]>::try_from(self.words).ok();
        match &self.ids[..] {
            [only] => Ok(vec![(*only, words)]),
            _ if words.is_some() => Err(usage(
                "--words belongs to one request: pass one id, or a file with --words-file",
            )),
            ids => Ok(ids.iter().map(|id| (*id, None)).collect()),
        }
    }
}

impl Caller {
    /// Approves requests of members.
    pub(super) async fn approve_for_members(
        &self,
        arguments: ApproveArguments,
    ) -> Result<(), Failure> {
        let wanted = arguments.wanted()?;
        check_ids(wanted.iter().map(|(id, _)| *id))?;
        let asks = wanted.iter().any(|(_, words)| words.is_none());
        if asks && !io::stdin().is_terminal() {
            return Err(usage(
                "this command needs the two words of the phrase: pass --words or --words-file, or run the command at a \
                 terminal",
            ));
        }
        let listed = self.all_access_requests(false).await?.access_requests;
        let is_one = wanted.len() == 1;
        let mut decided: Vec<Decided> = Vec::with_capacity(wanted.len());
        for (id, words) in wanted {
            let result = if has_ended(&decided) {
                Err(not_tried())
            } else {
                self.approve_for_member(&listed, id, words).await
            };
            decided.push((id, result));
        }
        self.report(decided, is_one, "approved")
    }

    async fn approve_for_member(
        &self,
        listed: &[proto::AccessRequest],
        id: AccessRequestId,
        words: Option<[String; 2]>,
    ) -> Result<proto::AccessRequest, Failure> {
        let request = listed.iter().find(|one| one.id == id.as_bytes());
        let request = request.ok_or_else(|| {
            let what = format!("there is no pending request {id} that you may decide");
            Failure::new(Exit::Refused, what)
                .hint("`keybroker device requests --all` shows the requests")
        })?;
        let words = match words {
            Some(words) => words,
            None => self.heard_words(request)?,
        };
        let approved = self.client.approve_for_member(id, words).await;
        let approved = approved.map_err(|error| failure(&error))?;
        if approved.state() == proto::AccessRequestState::Pending {
            self.output.note(&format!(
                "the approval of {id} is recorded; a second approver has to approve the request"
            ));
        }
        Ok(approved)
    }

    /// Shows a request, its phrase in capitals, and asks for the hidden words.
    fn heard_words(&self, request: &proto::AccessRequest) -> Result<[String; 2], Failure> {
        for (name, value) in request_fields(request, false) {
            if let Some(text) = value.as_str().filter(|_| name != "phrase") {
                self.output.note(&format!("{name}: {text}"));
            }
        }
        let large = phrase(&request.phrase).to_uppercase();
        self.output
            .note(&format!("\n    {}\n", large.replace(' ', "   ")));
        self.output
            .note("Call or meet the member, and let the member read all five words from the new device. If one of the three words above \
                   differs, stop, and deny the request. Type the two missing words:");
        let mut line = String::new();
        io::stdin()
            .read_line(&mut line)
            .map_err(|_| usage("the two words cannot be read"))?;
        let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        words
            .try_into()
            .map_err(|_| usage("type two words; the request was not approved"))
    }

    /// Denies requests.
    pub(super) async fn deny_requests(&self, arguments: DenyArguments) -> Result<(), Failure> {
        let DenyArguments { ids, user, yes } = arguments;
        let is_one = ids.len() == 1;
        let ids = match user {
            Some(user) => self.pending_of(&user, yes).await?,
            None => ids,
        };
        check_ids(ids.iter().copied())?;
        let mut decided: Vec<Decided> = Vec::with_capacity(ids.len());
        for id in ids {
            let result = if has_ended(&decided) {
                Err(not_tried())
            } else {
                let denied = self.client.deny_access_request(id, None).await;
                denied.map_err(|error| failure(&error))
            };
            decided.push((id, result));
        }
        self.report(decided, is_one, "denied")
    }

    /// The ids of the pending requests of a member, after a confirmation.
    async fn pending_of(
        &self,
        user: &UserId,
        is_confirmed: bool,
    ) -> Result<Vec<AccessRequestId>, Failure> {
        let listed = self.all_access_requests(false).await?.access_requests;
        let of_member = listed.iter().filter(|one| one.user == user.as_str());
        let ids: Vec<_> = of_member
            .filter_map(|one| AccessRequestId::from_slice(&one.id))
            .collect();
        if !ids.is_empty() {
            let shown = printable(user.as_str());
            let count = ids.len();
            let what = format!("This denies {count} pending requests of the member {shown}");
            typed_id(self.output, is_confirmed, user.as_str(), "member", &what)?;
        }
        Ok(ids)
    }

    /// Shows one request, or a line for each of several. Fails if a request was not decided.
    fn report(&self, decided: Vec<Decided>, is_one: bool, done: &str) -> Result<(), Failure> {
        let json = self.output.is_json();
        if is_one {
            for (_, result) in decided {
                self.output.fields(request_fields(&result?, json))?;
            }
            return Ok(());
        }
        let rows = decided
            .iter()
            .map(|(id, result)| row(*id, result, json))
            .collect();
        self.output.list(rows, "no pending requests for access")?;
        let total = decided.len();
        let failures: Vec<Failure> = decided
            .into_iter()
            .filter_map(|(_, result)| result.err())
            .collect();
        let count = failures.len();
        let is_other = |failure: &&Failure| failure.exit != Exit::Refused;
        let telling = failures.iter().find(is_other).or(failures.first());
        match telling {
            None => Ok(()),
            Some(first) => Err(Failure::new(
                first.exit,
                format!("{count} of {total} requests were not {done}; the list shows why"),
            )),
        }
    }
}

/// Whether a decision failed in a way in which all further decisions would fail, too.
fn has_ended(decided: &[Decided]) -> bool {
    let last = decided.last().and_then(|(_, result)| result.as_ref().err());
    last.is_some_and(|failure| !matches!(failure.exit, Exit::Refused | Exit::Usage))
}

fn not_tried() -> Failure {
    Failure::new(
        Exit::Unreachable,
        "not tried, because the broker could not be reached or did not answer the previous call in time",
    )
}

fn row(
    id: AccessRequestId,
    result: &Result<proto::AccessRequest, Failure>,
    json: bool,
) -> Vec<Field> {
    let text = |text: &str| {
        if json {
            json!(text)
        } else {
            json!(printable(text))
        }
    };
    let (user, state, reason, error) = match result {
        Ok(request) => (
            text(&request.user),
            json!(request_state(request.state())),
            Value::Null,
            Value::Null,
        ),
        Err(failure) => (
            Value::Null,
            Value::Null,
            json!(failure.reason),
            text(&failure.message),
        ),
    };
    vec![
        ("id", json!(id.to_string())),
        ("user", user),
        ("state", state),
        ("reason", reason),
        ("error", error),
    ]
}

/// Refuses too many ids, and an id that appears twice.
fn check_ids(ids: impl Iterator<Item = AccessRequestId>) -> Result<(), Failure> {
    let mut seen = BTreeSet::new();
    for id in ids {
        if !seen.insert(id) {
            return Err(usage(&format!("the request {id} appears twice")));
        }
    }
    if seen.len() > REQUESTS_MAX {
        let what = format!("pass at most {REQUESTS_MAX} requests");
        return Err(usage(&what));
    }
    Ok(())
}

/// Reads a file with words, or standard input.
fn read(file: &Path) -> Result<String, Failure> {
    if file == Path::new("-") {
        return text_of(io::stdin().lock(), file);
    }
    let opened = File::open(file).map_err(|error| unreadable(file, &error))?;
    text_of(opened, file)
}

/// Reads the whole text of a file with words. A longer text is refused: if its end were cut off, the last word could be
/// incomplete and count as a wrong guess, and the later requests would be missing without a message.
fn text_of(source: impl io::Read, file: &Path) -> Result<String, Failure> {
    let mut bytes = Vec::new();
    source
        .take(WORDS_FILE_BYTES_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| unreadable(file, &error))?;
    let fits = u64::try_from(bytes.len()).is_ok_and(|length| length <= WORDS_FILE_BYTES_MAX);
    if !fits {
        let shown = file.display();
        let kib = WORDS_FILE_BYTES_MAX / 1024;
        return Err(usage(&format!(
            "{shown} is longer than {kib} KiB; no request was approved. Write at most {REQUESTS_MAX} requests to one file"
        )));
    }
    String::from_utf8(bytes).map_err(|_| {
        let shown = file.display();
        usage(&format!("{shown} is not UTF-8 text"))
    })
}

fn unreadable(file: &Path, error: &io::Error) -> Failure {
    usage(&format!("cannot read {}: {error}", file.display()))
}

/// The requests in the text of a file with words. A line that begins with `#` is a comment.
fn wanted_in(text: &str, file: &Path) -> Result<Vec<Wanted>, Failure> {
    let mut wanted = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let is_comment = words.first().is_none_or(|word| word.starts_with('#'));
        if is_comment {
            continue;
        }
        let parsed = match words[..] {
            [id, first, second] => AccessRequestId::from_hex(id)
                .map(|id| (id, Some([first.to_owned(), second.to_owned()]))),
            _ => None,
        };
        wanted.push(parsed.ok_or_else(|| {
            let shown = file.display();
            usage(&format!(
                "{shown}: line {number} is not the id of a request (32 hexadecimal digits) and two words"
            ))
        })?);
    }
    if wanted.is_empty() {
        let shown = file.display();
        return Err(usage(&format!("{shown} has no request")));
    }
    Ok(wanted)
}

fn usage(what: &str) -> Failure {
    Failure::new(Exit::Usage, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_with_words_has_one_request_on_each_line() {
        let (one, two) = ("01".repeat(16), "02".repeat(16));
        let file = Path::new("words");
        let text = format!("# of today\n{one}  turban anime\n\n{two}\tabacus abacus\n");
        let wanted = wanted_in(&text, file).unwrap();
        let words = |first: &str, second: &str| Some([first.to_owned(), second.to_owned()]);
        let expected = [
            (
                AccessRequestId::from_bytes([1; 16]),
                words("turban", "anime"),
            ),
            (
                AccessRequestId::from_bytes([2; 16]),
                words("abacus", "abacus"),
            ),
        ];
        assert_eq!(wanted, expected);
        for (text, expected) in [
            (String::new(), "has no request"),
            (format!("\n{one} turban"), "line 2"),
            (format!("{one} turban anime abacus"), "line 1"),
            ("0101 turban anime".to_owned(), "32 hexadecimal digits"),
        ] {
            let failure = wanted_in(&text, file).unwrap_err();
            assert!(failure.message.contains(expected), "{}", failure.message);
            assert_eq!(failure.exit, Exit::Usage);
        }
    }

    #[test]
    fn a_file_with_words_that_is_too_long_is_refused_and_not_cut() {
        let file = Path::new("words");
        let limit = usize::try_from(WORDS_FILE_BYTES_MAX).unwrap();
        let longest = "#".repeat(limit);
        assert_eq!(text_of(longest.as_bytes(), file).unwrap(), longest);
        // The last character of the longer text has two bytes, and the limit is between them.
        for longer in [format!("{longest}#"), format!("{}\u{e9}", &longest[1..])] {
            let failure = text_of(longer.as_bytes(), file).unwrap_err();
            assert_eq!(failure.exit, Exit::Usage);
            assert!(
                failure.message.contains("longer than 64 KiB"),
                "{}",
                failure.message
            );
        }
        let failure = text_of(&b"\xff"[..], file).unwrap_err();
        assert_eq!(failure.message, "words is not UTF-8 text");
    }

    #[test]
    fn an_id_appears_once_and_the_number_is_bounded() {
        let id = |number: usize| {
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&number.to_be_bytes());
            AccessRequestId::from_bytes(bytes)
        };
        assert!(check_ids((0..REQUESTS_MAX).map(id)).is_ok());
        assert!(check_ids((0..=REQUESTS_MAX).map(id)).is_err());
        assert!(check_ids([id(1), id(2), id(1)].into_iter()).is_err());
    }
}
