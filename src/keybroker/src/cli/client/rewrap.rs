//! `keybroker rewrap`: uses the admin API to start, pause, resume and watch a re-wrap.

use std::time::Duration;

use clap::{Args, Subcommand};
use keybroker_client::{WrappingKeyId, proto};
use serde_json::{Value, json};

use crate::cli::{
    exit::{Exit, Failure},
    output::Field,
    progress::Progress,
};

use super::{Caller, arguments, refusal, show};

/// Interval between requests of `--wait` for the progress of the re-wrap.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
const RATE_MAX: i64 = 1_000_000;

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Move all rows to the active wrapping key, which wraps new user keys
    Start {
        /// Move only the rows under this wrapping key (its id, 32 hexadecimal digits)
        #[arg(long, value_name = "ID", value_parser = arguments::wrapping_key_id)]
        from: Option<WrappingKeyId>,
        /// Move the rows of this compromised wrapping key that `keybroker audit envelopes` listed on the host of a broker
        ///
        /// The user keys count as disclosed, also those that are moved: enrol them again.
        #[arg(
            long, value_name = "ID", value_parser = arguments::wrapping_key_id, conflicts_with = "from"
        )]
        from_compromised: Option<WrappingKeyId>,
        #[command(flatten)]
        rate: Rate,
        #[command(flatten)]
        wait: Wait,
    },
    /// Show the progress of the re-wrap, and the number of rows under each wrapping key
    Status {
        #[command(flatten)]
        wait: Wait,
    },
    /// Pause the re-wrap; rows that were already moved stay under the new wrapping key
    Pause,
    /// Resume the paused re-wrap; without --rate, the rate limit does not change
    Resume {
        #[command(flatten)]
        rate: Rate,
        #[command(flatten)]
        wait: Wait,
    },
}

#[derive(Args, Clone, Copy, Debug)]
pub(super) struct Rate {
    /// Maximum number of rows per second, up to 1000000; 0 for no limit
    #[arg(long, value_name = "ROWS", value_parser = clap::value_parser!(u32).range(0..=RATE_MAX))]
    rate: Option<u32>,
}

#[derive(Args, Clone, Copy, Debug)]
pub(super) struct Wait {
    /// Wait until the re-wrap ends, and show a progress bar on a terminal; the command fails with
    /// exit code 12 if a row could not be re-wrapped. Interrupting the command does not interrupt
    /// the re-wrap
    #[arg(long)]
    wait: bool,
}

impl Caller {
    pub(super) async fn rewrap(&self, command: Command) -> Result<(), Failure> {
        let (client, failure) = (&self.client, |error| refusal::failure(&error));
        let wait = match command {
            Command::Start {
                from,
                from_compromised,
                rate,
                wait,
            } => {
                if let Some(id) = from_compromised {
                    self.output.note(&format!(
                        "warning: the user keys under key {id} count as disclosed, also those that are moved: enrol them again"
                    ));
                }
                let source = from.or(from_compromised);
                let request = proto::StartRewrapRequest {
                    source_wrapping_key_id: source
                        .map_or_else(Vec::new, |id| id.as_bytes().to_vec()),
                    rows_per_second_max: rate.rate.unwrap_or(0),
                    from_compromised: from_compromised.is_some(),
                };
                let answer = client.start_rewrap(request).await.map_err(failure)?;
                if !answer.started {
                    self.output.note(unchanged(answer.rewrap.as_ref()));
                }
                wait.wait
            }
            Command::Status { wait } => wait.wait,
            Command::Pause => {
                let answer = client.pause_rewrap().await.map_err(failure)?;
                if !answer.paused {
                    self.output
                        .note("no re-wrap is running; nothing was changed");
                }
                false
            }
            Command::Resume { rate, wait } => {
                let answer = client.resume_rewrap(rate.rate).await.map_err(failure)?;
                if !answer.resumed {
                    self.output
                        .note("no re-wrap is paused; nothing was changed");
                }
                wait.wait
            }
        };
        if wait {
            self.wait_for_rewrap().await
        } else {
            let answer = client.get_rewrap().await.map_err(failure)?;
            self.show(&answer)
        }
    }

    /// Shows a progress bar until the re-wrap has ended or is paused, and then shows the result.
    async fn wait_for_rewrap(&self) -> Result<(), Failure> {
        let mut bar: Option<(Progress, u64)> = None;
        loop {
            let answer = self.client.get_rewrap().await;
            let answer = answer.map_err(|error| refusal::failure(&error))?;
            let running = answer
                .rewrap
                .as_ref()
                .filter(|rewrap| rewrap.state() == proto::RewrapState::Running);
            let Some(rewrap) = running else {
                drop(bar);
                self.show(&answer)?;
                return verdict(answer.rewrap.as_ref());
            };
            let done = moved(rewrap);
            let (bar, shown) = bar.get_or_insert_with(|| {
                let total = done + rewrap.left;
                (Progress::new(self.output, "rows", total), 0)
            });
            bar.advance(done.saturating_sub(*shown));
            *shown = done;
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    fn show(&self, answer: &proto::GetRewrapResponse) -> Result<(), Failure> {
        let uses: Vec<Vec<Field>> = answer.uses.iter().map(uses).collect();
        if self.output.is_json() {
            let objects: Vec<Value> = uses
                .into_iter()
                .map(|row| row.into_iter().map(|(k, v)| (k.to_owned(), v)).collect())
                .map(Value::Object)
                .collect();
            let mut fields = rewrap(answer.rewrap.as_ref());
            fields.push(("wrapping_keys", Value::Array(objects)));
            return self.output.fields(fields);
        }
        match &answer.rewrap {
            None => self.output.text("no re-wrap was requested\n")?,
            Some(found) => {
                let mut fields = rewrap(Some(found));
                fields.retain(|(name, _)| *name != "failures");
                self.output.fields(fields)?;
                self.output.text("")?;
                if !found.failures.is_empty() {
                    let rows = found.failures.iter().map(failure).collect();
                    self.output.list(rows, "")?;
                    self.output.text("")?;
                }
            }
        }
        self.output.list(uses, "no wrapping key")
    }
}

fn unchanged(rewrap: Option<&proto::Rewrap>) -> &'static str {
    match rewrap.map(proto::Rewrap::state) {
        Some(proto::RewrapState::Paused) => {
            "an earlier re-wrap is paused; nothing was changed. Run `keybroker rewrap resume`"
        }
        _ => "a re-wrap is already running; nothing was changed",
    }
}

fn moved(rewrap: &proto::Rewrap) -> u64 {
    let rows = rewrap.revisions_moved.saturating_add(rewrap.clients_moved);
    rows.saturating_add(rewrap.devices_moved)
}

fn verdict(rewrap: Option<&proto::Rewrap>) -> Result<(), Failure> {
    let Some(rewrap) = rewrap else {
        return Ok(());
    };
    if rewrap.state() == proto::RewrapState::Paused {
        return Err(Failure::new(Exit::Refused, "the re-wrap is paused")
            .hint("run `keybroker rewrap resume`"));
    }
    if rewrap.failed == 0 {
        return Ok(());
    }
    let what = format!("{} rows could not be re-wrapped", rewrap.failed);
    Err(Failure::new(Exit::Verification, what).hint(
        "these rows are unchanged and still need their old wrapping key; compare them with a backup, then run \
         `keybroker rewrap start` again",
    ))
}

fn rewrap(rewrap: Option<&proto::Rewrap>) -> Vec<Field> {
    let default = proto::Rewrap::default();
    let found = rewrap.unwrap_or(&default);
    let id = |bytes: &[u8]| {
        if bytes.is_empty() {
            Value::Null
        } else {
            json!(hex::encode(bytes))
        }
    };
    let text = |text: &str| {
        if text.is_empty() {
            Value::Null
        } else {
            json!(text)
        }
    };
    let number = |number: u64| {
        if number == 0 {
            Value::Null
        } else {
            json!(number)
        }
    };
    let failures = found.failures.iter().map(|row| {
        let fields = failure(row).into_iter();
        Value::Object(fields.map(|(k, v)| (k.to_owned(), v)).collect())
    });
    vec![
        ("state", state(rewrap)),
        ("phase", phase(found)),
        ("target", id(&found.target_wrapping_key_id)),
        ("source", id(&found.source_wrapping_key_id)),
        ("rate", number(found.rows_per_second_max.into())),
        ("requested_by", text(&found.requested_by)),
        ("started", show::time(found.start_time.as_ref())),
        ("updated", show::time(found.update_time.as_ref())),
        ("ended", show::time(found.end_time.as_ref())),
        ("instance", text(&found.instance)),
        ("revisions_moved", json!(found.revisions_moved)),
        ("clients_moved", json!(found.clients_moved)),
        ("devices_moved", json!(found.devices_moved)),
        ("changed_meanwhile", json!(found.changed_meanwhile)),
        ("left", json!(found.left)),
        ("failed", json!(found.failed)),
        ("verified", json!(found.verified)),
        ("rows_per_second", json!(found.rows_per_second)),
        ("seconds_left", number(found.seconds_left)),
        ("blocked_by", text(&found.blocked_by)),
        ("failures", failures.collect()),
    ]
}

fn state(rewrap: Option<&proto::Rewrap>) -> Value {
    let Some(rewrap) = rewrap else {
        return Value::Null;
    };
    json!(match rewrap.state() {
        proto::RewrapState::Running => "running",
        proto::RewrapState::Paused => "paused",
        proto::RewrapState::Done => "done",
        proto::RewrapState::Unspecified => "unknown",
    })
}

fn phase(rewrap: &proto::Rewrap) -> Value {
    match rewrap.phase() {
        proto::RewrapPhase::Moving => json!("moving"),
        proto::RewrapPhase::Verifying => json!("verifying"),
        proto::RewrapPhase::Unspecified => Value::Null,
    }
}

fn failure(row: &proto::RewrapFailure) -> Vec<Field> {
    vec![
        ("id", json!(row.id)),
        ("revision", json!(row.revision)),
        ("problem", json!(row.problem)),
    ]
}

fn uses(uses: &proto::WrappingKeyUse) -> Vec<Field> {
    vec![
        ("wrapping_key", json!(hex::encode(&uses.wrapping_key_id))),
        ("revisions", json!(uses.revisions)),
        ("clients", json!(uses.clients)),
        ("request_answers", json!(uses.request_answers)),
        ("approvals", json!(uses.approvals)),
        ("devices", json!(uses.devices)),
        ("access_requests", json!(uses.access_requests)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(state: proto::RewrapState, failed: u64) -> proto::Rewrap {
        proto::Rewrap {
            state: state.into(),
            failed,
            ..proto::Rewrap::default()
        }
    }

    #[test]
    fn only_a_complete_re_wrap_is_a_success() {
        let code = |rewrap: &proto::Rewrap| verdict(Some(rewrap)).err().map(|error| error.exit);
        assert_eq!(code(&ended(proto::RewrapState::Done, 0)), None);
        assert_eq!(
            code(&ended(proto::RewrapState::Done, 2)),
            Some(Exit::Verification)
        );
        assert_eq!(
            code(&ended(proto::RewrapState::Paused, 0)),
            Some(Exit::Refused)
        );
        assert!(verdict(None).is_ok());
    }

    #[test]
    fn a_re_wrap_that_was_never_requested_has_no_state() {
        let fields = rewrap(None);
        assert_eq!(fields[0], ("state", Value::Null));
        let failed = rewrap(Some(&ended(proto::RewrapState::Done, 2)));
        assert_eq!(failed[0].1, json!("done"));
    }
}
