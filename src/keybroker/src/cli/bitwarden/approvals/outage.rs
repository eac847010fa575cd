//! Distinguishes an outage of the server from a server error that concerns only one member.

use std::collections::HashSet;

use crate::cli::exit::Failure;
use keybroker_core::organization::Guid;

use super::refusal::Refusal;

/// Server errors for this number of members, one after the other, end a pass. Requests of one member do not suffice,
/// because a member could otherwise block the requests of the others.
const MEMBERS_OF_OUTAGE: usize = 3;

/// The members for whom the server answered with a server error since its last other answer.
#[derive(Debug, Default)]
pub(super) struct Outage(HashSet<Guid>);

impl Outage {
    /// Counts the result of the call for a member's key. Returns the error of the server if it concerns too many
    /// members.
    pub(super) fn count<T>(
        &mut self,
        member: Guid,
        key: &Result<T, Refusal>,
    ) -> Result<(), Failure> {
        match key {
            // The server was not called.
            Err(Refusal::Expired) => Ok(()),
            Err(Refusal::Server {
                status: Some(500..=599),
                failure,
            }) => {
                self.0.insert(member);
                if self.0.len() < MEMBERS_OF_OUTAGE {
                    return Ok(());
                }
                Err(failure.clone())
            }
            _ => {
                self.0.clear();
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::exit::Exit;

    const fn id(number: u8) -> Guid {
        Guid::from_bytes([number; 16])
    }

    fn server_error(status: u16) -> Result<(), Refusal> {
        Err(Refusal::Server {
            status: Some(status),
            failure: Failure::new(Exit::Refused, "no"),
        })
    }

    #[test]
    fn server_errors_for_three_members_are_an_outage() {
        let mut outage = Outage::default();
        for (member, key, is_outage) in [
            (1, server_error(500), false),
            (2, server_error(502), false),
            (3, Ok(()), false),
            (1, server_error(500), false),
            (1, server_error(500), false),
            (1, server_error(500), false),
            (2, server_error(599), false),
            (4, Err(Refusal::NoMember), false),
            (1, server_error(500), false),
            (2, server_error(503), false),
            (5, server_error(403), false),
            (1, server_error(500), false),
            (2, server_error(503), false),
            (6, Err(Refusal::Expired), false),
            (3, server_error(504), true),
        ] {
            let counted = outage.count(id(member), &key);
            assert_eq!(counted.is_err(), is_outage, "member {member}: {key:?}");
        }
    }
}
