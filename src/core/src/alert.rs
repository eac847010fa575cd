//! Alerts: conditions to which an operator must react. This module has the only list of alerts. `docs/operations.md`
//! has a section for each alert, and a test compares the sections with this list.
//!
//! The macro [`alert!`](crate::alert!) is the only way to raise an alert. The macro logs one line at level ERROR with the fields
//! `alert` (the name) and `severity`, and counts the alert in `keybroker_alerts_total`.

/// The macro `alert!` uses this path, because the macro also expands in crates that do not depend on `tracing`.
#[doc(hidden)]
pub use tracing;

/// The urgency of an alert: how soon an operator must react.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// An operator must react to the alert immediately. The release of user keys fails or may soon
    /// fail, or another program may have changed the token, the registry, the audit log or the
    /// complete database.
    Critical,
    /// An operator must react to the alert soon. The broker answers calls, but one of its functions
    /// does not work, a limit is near, or one caller is affected.
    Warning,
}

impl Severity {
    /// Name in the log and in the documentation.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Critical => "critical",
            Self::Warning => "warning",
        }
    }
}

macro_rules! alerts {
    ($($alert:ident = $name:literal, $severity:ident, $meaning:literal;)*) => {
        /// The name of an alert.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Alert {
            $(#[doc = $meaning] $alert,)*
        }

        impl Alert {
            /// Every alert, in the order of the documentation.
            pub const ALL: [Self; <[&str]>::len(&[$($name),*])] = [$(Self::$alert,)*];

            /// Name in the log, in `keybroker_alerts_total` and in the documentation.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$alert => $name,)*
                }
            }

            /// The urgency of an alert: how soon an operator must react.
            pub const fn severity(self) -> Severity {
                match self {
                    $(Self::$alert => Severity::$severity,)*
                }
            }

            /// The meaning of the alert, in one sentence.
            pub const fn meaning(self) -> &'static str {
                match self {
                    $(Self::$alert => $meaning,)*
                }
            }
        }
    };
}

alerts! {
    TokenDown = "token-down", Critical, "No worker can use the token.";
    TokenUntrusted = "token-untrusted", Critical, "The token answers, but an attribute, a key or a self-test is wrong.";
    PinLatched = "pin-latched", Critical, "The token rejected the PIN, and no further login is made with this PIN.";
    TokenLogin = "token-login", Warning, "A login failed with a return code that says nothing about the PIN.";
    BulkRelease = "bulk-release", Warning, "A service released keys of unusually many users.";
    FrequentReplacement = "frequent-replacement", Warning, "A record was replaced unusually often.";
    FrequentAccessRequests = "frequent-access-requests", Warning, "A member made unusually many requests for access.";
    FrequentApprovals = "frequent-approvals", Warning, "A person approved unusually many requests for access.";
    ClientDamaged = "client-damaged", Warning, "The row of an API client is damaged.";
    Registry = "registry", Critical, "The registry of wrapping keys and the token disagree.";
    WrappingKey = "wrapping-key", Critical, "A registered wrapping key is missing from the token, or must not be used.";
    KeyAge = "key-age", Warning, "The wrapping key that wraps new user keys is older than the limit.";
    KeyDestruction = "key-destruction", Warning, "A scheduled destruction of a wrapping key is postponed or not valid.";
    RecordDamaged = "record-damaged", Warning, "A stored row cannot be parsed, or its MAC is wrong.";
    StoreSwapped = "store-swapped", Critical, "The files of the SQLite database were replaced while the database was open.";
    StoreRestored =
        "store-restored", Critical, "The database was replaced by another database, or by an earlier state of itself.";
    AuditLog = "audit-log", Critical, "The audit log cannot be written.";
    AuditTampered = "audit-tampered", Critical, "Another process changed the files of the audit log.";
    TlsReload = "tls-reload", Warning, "New TLS files are refused; the old files stay in use.";
    ClientCrl =
        "client-crl", Warning, "A revocation list for client certificates was refused, is missing, has expired, expires soon, or could not be stored.";
    IssuerKeys = "issuer-keys", Warning, "The keys of an issuer could not be fetched, or some of them are refused.";
    PolicyReload = "policy-reload", Warning, "Changed policies are refused; the earlier policies stay in force.";
    ConfigReload = "config-reload", Warning, "Changed tokens in the configuration are refused; the earlier tokens stay in use.";
    Watchdog = "watchdog", Critical, "The process did not answer its own health request in time.";
    Bug = "bug", Warning, "An internal error of the broker.";
}

/// Raises an [`Alert`]. The arguments are the name of the alert, then fields and text as for `tracing::error!`. In the form
/// `alert!(raise …)`, the first argument is an expression of type [`Alert`] instead of a name.
///
/// ```
/// keybroker_core::alert!(TokenDown, cause = "C_Login hangs", "the token does not serve");
/// ```
#[macro_export]
macro_rules! alert {
    ($alert:ident, $($event:tt)+) => {
        $crate::alert!(raise $crate::alert::Alert::$alert, $($event)+)
    };
    (raise $alert:expr, $($event:tt)+) => {{
        let alert: $crate::alert::Alert = $alert;
        $crate::metrics::count_alert(alert);
        $crate::alert::tracing::error!(
            alert = alert.name(),
            severity = alert.severity().name(),
            $($event)+
        );
    }};
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn each_alert_has_a_name_of_its_own_and_a_sentence() {
        let names: BTreeSet<_> = Alert::ALL.map(Alert::name).into();
        assert_eq!(names.len(), Alert::ALL.len());
        for alert in Alert::ALL {
            let is_plain = |c: char| c.is_ascii_lowercase() || c == '-';
            assert!(alert.name().chars().all(is_plain), "{alert:?}");
            assert!(alert.meaning().ends_with('.'), "{alert:?}");
        }
    }
}
