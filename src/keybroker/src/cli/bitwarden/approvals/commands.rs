//! The commands of a person: list, approve and deny.

use std::io::{self, IsTerminal as _};

use serde_json::json;
use tokio::{runtime::Handle, task::block_in_place};

use crate::{
    cli::{
        Context, block_on,
        change::audited_in_parts,
        exit::{Exit, Failure},
        output::Field,
        pin::UserPin,
    },
    config::Config,
};
use keybroker_audit::{AuditLog, Entry};
use keybroker_core::organization::Guid;
use keybroker_hsm::admin::Admin;
use keybroker_store::tables::Tables;

use super::{
    Approve, Deny, List, Organization,
    api::{Api, Approved},
    decision::{self, Decided},
    key::WrappedKey,
    pending::{Pending, Unreadable},
    pins::{KeyState, MemberKey, NewPins, Pins},
    refusal::Refusal,
    requests,
    review::{Reviewed, chosen, open_token, review, with_store},
};

/// What the audit entry of an approval names as its policy if a person accepted a key whose key pin does not match.
const ACCEPTED_KEY: &str = "accept-key";

pub(super) fn list(list: &List, context: &Context) -> Result<(), Failure> {
    let config = context.config_for_token()?;
    let organization = Organization::of(&config, &list.choice)?;
    let token = Token::open(&config, &list.pin, organization)?;
    let rows = with_store(&config, async |store| {
        let mut api = Api::open(organization)?;
        let found = api.pending().await?;
        let pins = token.pins(&**store);
        let mut rows = Vec::new();
        for one in found.pending {
            rows.push(review(&mut api, pins, one).await?.fields());
        }
        rows.extend(found.unreadable.iter().map(Unreadable::fields));
        Ok(rows)
    })?;
    show(context, rows)
}

/// Shows each request as a block, because a request has too many fields for a line.
fn show(context: &Context, rows: Vec<Vec<Field>>) -> Result<(), Failure> {
    let output = context.output;
    if output.is_json() || rows.is_empty() {
        return output.list(rows, "no request is pending");
    }
    for (number, row) in rows.into_iter().enumerate() {
        if number > 0 {
            output.text("")?;
        }
        output.fields(row)?;
    }
    Ok(())
}

pub(super) fn approve(approve: &Approve, context: &Context) -> Result<(), Failure> {
    let wanted = requests(&approve.requests)?;
    let one_only = approve.phrase.is_some() || approve.accept_key.is_some();
    if one_only && wanted.len() != 1 {
        let what = "`--phrase` and `--accept-key` are for one request";
        return Err(Failure::new(Exit::Usage, what));
    }
    let config = context.config_for_token()?;
    let organization = Organization::of(&config, &approve.choice)?;
    let token = Token::open(&config, &approve.pin, organization)?;
    // The person who types the phrase may take minutes, so the database is closed meanwhile, and the requests are reviewed again.
    let mut confirmed = None;
    if approve.phrase.is_none() && !approve.yes {
        let reviewed = with_store(&config, async |store| {
            Session::open(&token, &**store, approve)?
                .reviewed(&wanted)
                .await
        })?;
        confirm(context, approve, &reviewed)?;
        confirmed = Some(reviewed);
    }
    let results = with_store(&config, async |store| {
        let mut session = Session::open(&token, &**store, approve)?;
        let reviewed = session.reviewed(&wanted).await?;
        match &confirmed {
            Some(confirmed) => require_same(confirmed, &reviewed)?,
            None => confirm(context, approve, &reviewed)?,
        }
        session.approve(context, &config, reviewed).await
    })?;
    let failed = results.iter().filter(|one| one.failure.is_some()).count();
    let rows = results.iter().map(Done::fields).collect();
    context.output.list(rows, "")?;
    if failed == 0 {
        return Ok(());
    }
    let what = format!("{failed} of {} requests were not approved", results.len());
    Err(Failure::new(Exit::Refused, what))
}

/// The result of one request.
struct Done {
    request: Guid,
    email: String,
    /// Why the request was not approved.
    failure: Option<String>,
}

impl Done {
    fn of(pending: &Pending, failure: Option<String>) -> Self {
        Self {
            request: pending.id,
            email: pending.email.clone(),
            failure,
        }
    }

    fn fields(&self) -> Vec<Field> {
        let result = self.failure.as_deref().unwrap_or("approved");
        vec![
            ("request", json!(self.request.to_string())),
            ("email", json!(self.email)),
            ("result", json!(result)),
        ]
    }
}

/// The token of a command, which stays open while the database is closed.
struct Token<'a> {
    admin: Admin,
    organization: Organization<'a>,
    new: NewPins,
}

impl<'a> Token<'a> {
    fn open(
        config: &Config,
        pin: &UserPin,
        organization: Organization<'a>,
    ) -> Result<Self, Failure> {
        Ok(Self {
            admin: open_token(config, &pin.get(config.token())?, organization)?,
            organization,
            new: NewPins::of(organization.settings),
        })
    }

    fn pins<'b>(&'b self, store: &'b dyn Tables) -> Pins<'b> {
        Pins {
            store,
            admin: &self.admin,
            organization: self.organization.id,
            new: &self.new,
        }
    }
}

/// The parts of an approval by a person.
struct Session<'a> {
    api: Api<'a>,
    pins: Pins<'a>,
    organization: Organization<'a>,
    arguments: &'a Approve,
}

impl<'a> Session<'a> {
    fn open(
        token: &'a Token<'_>,
        store: &'a dyn Tables,
        arguments: &'a Approve,
    ) -> Result<Self, Failure> {
        Ok(Self {
            api: Api::open(token.organization)?,
            pins: token.pins(store),
            organization: token.organization,
            arguments,
        })
    }

    async fn reviewed(&mut self, wanted: &[Guid]) -> Result<Vec<Reviewed>, Failure> {
        let found = self.api.pending().await?;
        let mut reviewed = Vec::new();
        for pending in chosen(&found.pending, wanted)? {
            reviewed.push(review(&mut self.api, self.pins, pending).await?);
        }
        Ok(reviewed)
    }

    /// Approves the requests that can be approved, and returns the result of each.
    async fn approve(
        &mut self,
        context: &Context,
        config: &Config,
        reviewed: Vec<Reviewed>,
    ) -> Result<Vec<Done>, Failure> {
        let mut results = Vec::new();
        let mut ready = Vec::new();
        for one in reviewed {
            match self.ready(&one).await? {
                Ok(approved) => ready.push(approved),
                Err(why) => results.push(Done::of(&one.pending, Some(why.to_string()))),
            }
        }
        if ready.is_empty() {
            return Ok(results);
        }
        let approved: Vec<Pending> = ready.iter().map(|(one, _)| one.pending.clone()).collect();
        let count = u64::try_from(approved.len()).unwrap_or(u64::MAX);
        let describe = |entry: &mut Entry| entry.count = Some(count);
        let action = "bitwarden.approvals";
        let (api, organization) = (&mut self.api, self.organization);
        // The log of the command is written by code that is not async.
        block_in_place(|| {
            audited_in_parts(context, config, action, describe, |log| {
                wait(decision::approve(api, log, organization, ready))?.map_err(Failure::from)
            })
        })?;
        results.extend(approved.iter().map(|pending| Done::of(pending, None)));
        Ok(results)
    }

    /// Lets the token re-encrypt a member's key. Returns the reason if this request cannot be approved; an error of the token
    /// ends the command.
    async fn ready(
        &self,
        reviewed: &Reviewed,
    ) -> Result<Result<(Decided, Approved), Refusal>, Failure> {
        let (key, state) = match &reviewed.key {
            Ok(found) => found,
            Err(why) => return Ok(Err(why.clone())),
        };
        let policy = match self.accepted(key, *state) {
            Ok(policy) => policy,
            Err(why) => return Ok(Err(why)),
        };
        let approved = match reviewed.release(self.pins.admin, self.organization, key)? {
            Ok(approved) => approved,
            Err(why) => return Ok(Err(why)),
        };
        if policy.is_some() {
            self.pins
                .accept(&MemberKey::new(&reviewed.pending, key.digest))
                .await?;
        }
        let decided = Decided {
            pending: reviewed.pending.clone(),
            digest: Some(key.digest),
            policy: policy.map(str::to_owned),
        };
        Ok(Ok((decided, approved)))
    }

    /// Whether the key may be used: its pin matches, or the person accepts it by its digest.
    fn accepted(&self, key: &WrappedKey, state: KeyState) -> Result<Option<&'static str>, Refusal> {
        let digest = hex::encode(key.digest);
        match self.arguments.accept_key.as_deref() {
            _ if state.is_for_policy() => Ok(None),
            Some(accepted) if accepted.eq_ignore_ascii_case(&digest) => Ok(Some(ACCEPTED_KEY)),
            _ => Err(Refusal::Pin { state, digest }),
        }
    }
}

/// Waits for a call of the server inside [`block_in_place`].
fn wait<T>(work: impl Future<Output = T>) -> T {
    Handle::current().block_on(work)
}

/// Compares the phrases that the members read out. A person who only agrees to what is on the screen compares nothing. All five words
/// are compared: a key whose phrase has two given words is found with about 2^26 attempts.
fn confirm(context: &Context, approve: &Approve, reviewed: &[Reviewed]) -> Result<(), Failure> {
    if approve.yes {
        return Ok(());
    }
    for Reviewed { pending, .. } in reviewed {
        let heard = match &approve.phrase {
            Some(heard) => words(heard),
            None => words(&typed(context, pending)?),
        };
        if heard != *pending.phrase().words() {
            let what = format!(
                "the words do not match the phrase of request {}; no request was approved",
                pending.id
            );
            let hint = "if you typed the words correctly, deny the request: it may come from another device";
            return Err(Failure::new(Exit::Verification, what).hint(hint));
        }
    }
    Ok(())
}

/// Requires that the requests are still those that a person confirmed: a server could exchange the public key after the comparison.
fn require_same(confirmed: &[Reviewed], now: &[Reviewed]) -> Result<(), Failure> {
    let mut both = confirmed.iter().zip(now);
    let Some((_, changed)) = both.find(|(confirmed, now)| !now.is_same_as(confirmed)) else {
        return Ok(());
    };
    let what = format!(
        "request {}, its member or the member's key changed after you typed the phrase; no request was approved",
        changed.pending.id
    );
    let hint = "list the requests again, and deny a request whose phrase has changed";
    Err(Failure::new(Exit::Verification, what).hint(hint))
}

/// Asks for the phrase of a request at the terminal.
fn typed(context: &Context, pending: &Pending) -> Result<String, Failure> {
    if !io::stdin().is_terminal() {
        let what = "this command needs a confirmation: pass --phrase with the words that the member reads out, or --yes";
        return Err(Failure::new(Exit::Usage, what));
    }
    context.output.note(&format!(
        "Request {} of {} (member {}, {}). Call or meet the member, ask for the phrase that the new device shows, and type its five \
         words:",
        pending.id,
        crate::cli::output::printable(&pending.email),
        pending.member,
        crate::cli::output::printable(&pending.device_type),
    ));
    let mut line = String::new();
    // Without input, the words do not match.
    let _read = io::stdin().read_line(&mut line);
    Ok(line)
}

/// The words of a phrase as a person typed them. Four words of the list contain a hyphen, so hyphens separate words only if there
/// is no white space.
fn words(text: &str) -> Vec<String> {
    let text = text.trim().to_lowercase();
    let by_space: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
    match by_space.as_slice() {
        [only] => keybroker_bitwarden::split_phrase(only),
        _ => by_space,
    }
}

pub(super) fn deny(deny: &Deny, context: &Context) -> Result<(), Failure> {
    let wanted = requests(&deny.requests)?;
    let config = context.config()?;
    let organization = Organization::of(&config, &deny.choice)?;
    let denied = block_on(async {
        let mut api = Api::open(organization)?;
        let pending = chosen(&api.pending().await?.pending, &wanted)?;
        let denied = pending.iter().map(|pending| Decided {
            pending: pending.clone(),
            digest: None,
            policy: None,
        });
        let denied: Vec<Decided> = denied.collect();
        let count = u64::try_from(denied.len()).unwrap_or(u64::MAX);
        let describe = |entry: &mut Entry| entry.count = Some(count);
        let action = "bitwarden.approvals";
        block_in_place(|| {
            audited_in_parts(context, &config, action, describe, |log: &AuditLog| {
                wait(decision::deny(&mut api, log, organization, denied))
            })
        })?;
        Ok::<_, Failure>(pending)
    })??;
    let rows = denied.iter().map(|pending| {
        vec![
            ("request", json!(pending.id.to_string())),
            ("email", json!(pending.email)),
            ("result", json!("denied")),
        ]
    });
    context.output.list(rows.collect(), "")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_phrase_is_read_with_spaces_or_hyphens() {
        let expected = ["turban", "deftly", "anime", "chatroom", "unselfish"];
        for text in [
            "turban-deftly-anime-chatroom-unselfish",
            " Turban deftly  anime chatroom UNSELFISH\n",
        ] {
            assert_eq!(words(text), expected);
        }
        assert_eq!(words("drop-down yo-yo"), ["drop-down", "yo-yo"]);
        assert_eq!(
            words("zoom-drop-down-yo-yo-t-shirt-felt-tip"),
            ["zoom", "drop-down", "yo-yo", "t-shirt", "felt-tip"]
        );
    }
}
