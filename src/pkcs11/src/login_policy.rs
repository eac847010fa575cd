//! The rules that decide whether a PIN is sent to a token, and how the token's answer is interpreted. The functions of
//! this module are pure: they use no token, file or clock.
//!
//! A token counts wrong PINs, and locks the PIN after a few wrong attempts. Modules return many different codes for a
//! wrong PIN, and some return the same codes while a device restarts. Therefore a return code alone is sufficient only
//! if it concerns the PIN. For other codes, the decision also uses the history of this PIN on this token and the
//! counter flags of `CK_TOKEN_INFO` (PKCS#11 3.0 section 3.3).
//!
//! Mitigation: M15 of `THREAT_MODEL.md`.

use cryptoki::error::RvError;
use keybroker_pkcs11_ffi::TokenInfo;
use serde::{Deserialize, Serialize};

/// Largest number of logins with a PIN that the token has never accepted, if these logins fail with return codes that
/// do not concern the PIN.
const UNPROVEN_TRIES_MAX: u32 = 2;

/// The flags of a token's counter of wrong user PINs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Counter {
    /// `CKF_USER_PIN_COUNT_LOW`: the token has received a wrong PIN since the last successful login.
    #[serde(default)]
    pub(super) low: bool,
    /// `CKF_USER_PIN_FINAL_TRY`: one more wrong PIN locks the token.
    #[serde(default)]
    pub(super) final_try: bool,
    /// `CKF_USER_PIN_LOCKED`: the user PIN is locked.
    #[serde(default)]
    pub(super) locked: bool,
}

impl Counter {
    pub(super) fn of(info: &TokenInfo) -> Self {
        Self {
            low: info.user_pin_count_low(),
            final_try: info.user_pin_final_try(),
            locked: info.user_pin_locked(),
        }
    }

    /// Describes the remaining attempts that the token allows, as an addition to a message.
    pub(super) fn describe(self) -> &'static str {
        if self.locked {
            "; the user PIN is now locked"
        } else if self.final_try {
            "; one more wrong PIN locks the token"
        } else if self.low {
            "; the token counts wrong PINs and locks after a few"
        } else {
            ""
        }
    }

    /// Whether a flag is set that was not set in `earlier`.
    fn rose_since(self, earlier: Self) -> bool {
        self.low && !earlier.low
            || self.final_try && !earlier.final_try
            || self.locked && !earlier.locked
    }
}

/// The history of one PIN on one token. There is no history for a PIN that was never sent to the token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "standing", rename_all = "kebab-case")]
pub(super) enum Standing {
    /// The PIN was sent to the token, and the token neither accepted nor rejected it. The state `Unproven` is also
    /// recorded before the first login, so that the attempt counts even if the process is killed during the login.
    Unproven {
        /// Number of logins with this PIN so far.
        tries: u32,
        /// The token's counter of wrong PINs before the first login that `tries` counts.
        counter: Counter,
    },
    /// The PIN was accepted by this token before.
    Proven {
        /// The token's counter before the first login that failed after the PIN was accepted; `None` if no login has
        /// failed.
        failing_since: Option<Counter>,
    },
    /// The PIN was rejected and is not used on this token again.
    Rejected {
        /// The token's answer.
        answer: String,
    },
}

/// Whether a login is allowed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Decision {
    /// Log in. If there is a [`Standing`], record it before the login.
    Login(Option<Standing>),
    /// Do not log in.
    Refuse(Refusal),
}

/// Reason why a login is not allowed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// The token reports that the user PIN is locked.
    Locked,
    /// One more wrong PIN would lock the token.
    FinalTry,
    /// A login failed, and the token's flags show that the token counted a wrong PIN.
    CounterRose,
    /// The token has never accepted the PIN, and all attempts for an unproven PIN are used up.
    Unproven,
    /// The token rejected this PIN before.
    Rejected(String),
}

/// The meaning of a token's answer to a login.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// The PIN was accepted.
    Accepted,
    /// The return code proves that the PIN was not checked; therefore the token counted no wrong
    /// PIN.
    NotChecked,
    /// The return code states that the token rejected the PIN.
    Rejected,
    /// The return code does not concern the PIN.
    Unclear,
}

impl Answer {
    /// Interprets a return code of `C_Login`.
    pub(super) fn of(code: RvError) -> Self {
        use RvError as Rv;
        match code {
            Rv::PinIncorrect
            | Rv::PinInvalid
            | Rv::PinLenRange
            | Rv::PinExpired
            | Rv::PinLocked
            | Rv::PinTooWeak
            | Rv::NewPinMode => Self::Rejected,
            Rv::CryptokiNotInitialized
            | Rv::SlotIdInvalid
            | Rv::TokenNotPresent
            | Rv::TokenNotRecognized
            | Rv::DeviceRemoved
            | Rv::SessionHandleInvalid
            | Rv::SessionClosed
            | Rv::SessionCount
            | Rv::SessionReadOnlyExists
            | Rv::HostMemory
            | Rv::UserAlreadyLoggedIn
            | Rv::UserAnotherAlreadyLoggedIn
            | Rv::UserTooManyTypes
            | Rv::UserTypeInvalid
            | Rv::UserPinNotInitialized
            | Rv::FunctionNotSupported => Self::NotChecked,
            _ => Self::Unclear,
        }
    }
}

/// Decides whether a login is allowed. `final_try_allowed` is the operator's permission for this one login.
pub(super) fn decide(
    standing: Option<&Standing>,
    counter: Counter,
    final_try_allowed: bool,
) -> Decision {
    if counter.locked {
        return Decision::Refuse(Refusal::Locked);
    }
    if let Some(Standing::Rejected { answer }) = standing {
        return Decision::Refuse(Refusal::Rejected(answer.clone()));
    }
    if counter.final_try && !final_try_allowed {
        return Decision::Refuse(Refusal::FinalTry);
    }
    match standing {
        None => Decision::Login(Some(Standing::Unproven { tries: 1, counter })),
        Some(Standing::Unproven {
            tries,
            counter: first,
        }) => {
            if counter.rose_since(*first) {
                Decision::Refuse(Refusal::CounterRose)
            } else if *tries >= UNPROVEN_TRIES_MAX {
                Decision::Refuse(Refusal::Unproven)
            } else {
                Decision::Login(Some(Standing::Unproven {
                    tries: tries + 1,
                    counter: *first,
                }))
            }
        }
        Some(Standing::Proven {
            failing_since: Some(first),
        }) if counter.rose_since(*first) => Decision::Refuse(Refusal::CounterRose),
        Some(Standing::Proven { .. }) => Decision::Login(None),
        Some(Standing::Rejected { answer }) => Decision::Refuse(Refusal::Rejected(answer.clone())),
    }
}

/// Returns the history of the PIN after a login. `was` is the history before [`decide`], and `begun` is the history
/// that was recorded before the login. `after` is `None` if the token no longer answers.
pub(super) fn conclude(
    was: Option<&Standing>,
    begun: Option<&Standing>,
    answer: Answer,
    text: &str,
    before: Counter,
    after: Option<Counter>,
) -> Option<Standing> {
    let rejected = || {
        Some(Standing::Rejected {
            answer: text.to_owned(),
        })
    };
    match answer {
        Answer::Accepted => Some(Standing::Proven {
            failing_since: None,
        }),
        Answer::NotChecked => was.cloned(),
        Answer::Rejected => rejected(),
        Answer::Unclear if after.is_some_and(|after| after.rose_since(before)) => rejected(),
        Answer::Unclear => match was {
            Some(Standing::Proven { failing_since }) => Some(Standing::Proven {
                failing_since: failing_since.or(Some(before)),
            }),
            _ => begun.or(was).cloned(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUIET: Counter = Counter {
        low: false,
        final_try: false,
        locked: false,
    };
    const LOW: Counter = Counter { low: true, ..QUIET };
    const FINAL: Counter = Counter {
        final_try: true,
        ..LOW
    };
    const LOCKED: Counter = Counter {
        locked: true,
        ..FINAL
    };

    /// A simulated token with a strict counter, and a PIN that is sent to the token repeatedly.
    struct History {
        standing: Option<Standing>,
        logins: u32,
    }

    impl History {
        fn new() -> Self {
            Self {
                standing: None,
                logins: 0,
            }
        }

        /// Returns whether a login was made.
        fn show(&mut self, answer: Answer, before: Counter, after: Counter) -> bool {
            let Decision::Login(begun) = decide(self.standing.as_ref(), before, false) else {
                return false;
            };
            self.logins += 1;
            self.standing = conclude(
                self.standing.as_ref(),
                begun.as_ref(),
                answer,
                "answer",
                before,
                Some(after),
            );
            true
        }
    }

    #[test]
    fn a_rejected_pin_is_shown_once() {
        let mut history = History::new();
        for _ in 0..5 {
            history.show(Answer::Rejected, QUIET, QUIET);
        }
        assert_eq!(history.logins, 1);
    }

    #[test]
    fn a_proven_pin_outlasts_any_number_of_passing_errors() {
        let mut history = History::new();
        assert!(history.show(Answer::Accepted, QUIET, QUIET));
        for _ in 0..100 {
            assert!(history.show(Answer::Unclear, QUIET, QUIET));
        }
        assert!(history.show(Answer::Accepted, QUIET, QUIET));
        assert_eq!(
            history.standing,
            Some(Standing::Proven {
                failing_since: None
            })
        );
    }

    /// The token counted the failure, so its return code was a response to a wrong PIN.
    #[test]
    fn a_counter_that_rises_ends_the_tries_of_a_proven_pin() {
        let mut history = History::new();
        history.show(Answer::Accepted, QUIET, QUIET);
        history.show(Answer::Unclear, QUIET, LOW);
        assert!(!history.show(Answer::Accepted, LOW, LOW));
        assert_eq!(history.logins, 2);

        let mut history = History::new();
        history.show(Answer::Accepted, QUIET, QUIET);
        history.show(Answer::Unclear, QUIET, QUIET);
        // The new counter flag is detected only before the next login.
        assert!(!history.show(Answer::Accepted, LOW, LOW));
    }

    /// A wrong PIN was entered with the vendor's tool while the broker was running.
    #[test]
    fn a_counter_that_was_low_before_does_not_stop_a_proven_pin() {
        let mut history = History::new();
        history.show(Answer::Accepted, QUIET, QUIET);
        assert!(history.show(Answer::Unclear, LOW, LOW));
        assert!(history.show(Answer::Accepted, LOW, QUIET));
    }

    #[test]
    fn an_unproven_pin_gets_one_further_try_and_only_with_a_still_counter() {
        let mut history = History::new();
        for _ in 0..5 {
            history.show(Answer::Unclear, QUIET, QUIET);
        }
        assert_eq!(history.logins, 2);
        let mut history = History::new();
        history.show(Answer::Unclear, QUIET, QUIET);
        assert!(!history.show(Answer::Unclear, LOW, LOW));
    }

    #[test]
    fn a_login_that_checked_nothing_costs_nothing() {
        let mut history = History::new();
        for _ in 0..10 {
            assert!(history.show(Answer::NotChecked, QUIET, QUIET));
        }
        assert_eq!(history.standing, None);
        assert!(history.show(Answer::Accepted, QUIET, QUIET));
    }

    #[test]
    fn the_last_try_is_the_operators() {
        let proven = Standing::Proven {
            failing_since: None,
        };
        for standing in [None, Some(&proven)] {
            assert_eq!(
                decide(standing, FINAL, false),
                Decision::Refuse(Refusal::FinalTry)
            );
            assert!(matches!(decide(standing, FINAL, true), Decision::Login(_)));
            assert_eq!(
                decide(standing, LOCKED, true),
                Decision::Refuse(Refusal::Locked)
            );
        }
        // The flag belongs to the token and not to the PIN. When the flag is cleared, logins continue.
        assert_eq!(decide(Some(&proven), QUIET, false), Decision::Login(None));
    }

    /// If a process is killed between the two calls, its attempt is used up.
    #[test]
    fn a_login_is_recorded_before_it_is_made() {
        let Decision::Login(Some(begun)) = decide(None, QUIET, false) else {
            panic!("a PIN that was never shown is refused");
        };
        let Decision::Login(Some(second)) = decide(Some(&begun), QUIET, false) else {
            panic!("the further try is refused");
        };
        assert_eq!(
            decide(Some(&second), QUIET, false),
            Decision::Refuse(Refusal::Unproven)
        );
    }
}
