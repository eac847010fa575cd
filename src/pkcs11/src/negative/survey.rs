//! Runs all negative tests on one key and collects every result, for the report on a token.

use super::{Done, KeyPair, KeySession, NegativeTest, PublicSide, SelfTest, for_each_wanted};
use crate::classify::{Fault, is_a_refusal};
use cryptoki::error::Error;

/// The result of one test.
#[derive(Debug)]
pub(crate) struct Surveyed {
    pub(crate) test: &'static NegativeTest,
    pub(crate) found: Found,
    /// Whether the self-test passes in the session of the negative test, after this test.
    pub(crate) session_is_usable: bool,
}

/// The token's reaction to a test.
#[derive(Debug)]
pub(crate) enum Found {
    /// The token performed the forbidden operation.
    Succeeded,
    /// The operation had no effect that an attacker can use, or the token does not offer the operation for any key.
    Nothing,
    /// The test cannot be run on this token.
    NotMade,
    /// The token refused the operation.
    Refused(Error),
    /// The token could not perform any operation at the time of the test, so the test has no
    /// result.
    NotAnswered(Error),
}

/// Runs every test on keys that were made for testing.
pub(crate) fn survey(
    open: impl Fn() -> Result<KeySession, Fault>,
    pair: &KeyPair,
    public: &PublicSide,
    self_test: &SelfTest,
) -> Result<Vec<Surveyed>, Fault> {
    let mut surveyed = Vec::new();
    for_each_wanted(
        open,
        pair,
        public,
        self_test,
        |_| true,
        |test, result, session| {
            let found = match result {
                Ok(Done::It | Done::Kept(_)) => Found::Succeeded,
                Ok(Done::Nothing) => Found::Nothing,
                Ok(Done::NotMade) => Found::NotMade,
                Err(error) if is_a_refusal(&error) => Found::Refused(error),
                Err(error) => Found::NotAnswered(error),
            };
            surveyed.push(Surveyed {
                test,
                found,
                session_is_usable: self_test.check(session, pair).is_ok(),
            });
            Ok(())
        },
    )?;
    Ok(surveyed)
}
