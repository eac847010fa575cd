//! The paths of the page, and their methods.

use axum::http::Method;

use keybroker_core::key::AccessRequestId;

/// What a path is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Pending,
    Style,
    Script,
    SignIn,
    Callback,
    SignOut,
    Request(AccessRequestId),
    Approve(AccessRequestId),
    Deny(AccessRequestId),
    Devices,
    EndTrust,
    Decisions,
}

/// The path to which the provider sends the browser back.
pub(super) const CALLBACK: &str = "/callback";

impl Place {
    pub(super) fn parse(path: &str) -> Option<Self> {
        Some(match path {
            "/" => Self::Pending,
            "/console.css" => Self::Style,
            "/console.js" => Self::Script,
            "/sign-in" => Self::SignIn,
            CALLBACK => Self::Callback,
            "/sign-out" => Self::SignOut,
            "/devices" => Self::Devices,
            "/devices/end-trust" => Self::EndTrust,
            "/decisions" => Self::Decisions,
            _ => {
                let rest = path.strip_prefix("/requests/")?;
                let (id, what) = rest.split_once('/').unwrap_or((rest, ""));
                let id = AccessRequestId::from_hex(id)?;
                match what {
                    "" if !rest.ends_with('/') => Self::Request(id),
                    "approve" => Self::Approve(id),
                    "deny" => Self::Deny(id),
                    _ => return None,
                }
            }
        })
    }

    /// The methods, as in the header `allow`.
    pub(super) const fn methods(self) -> &'static str {
        match self {
            Self::SignOut | Self::Approve(_) => "POST",
            Self::Deny(_) | Self::EndTrust => "GET, POST",
            _ => "GET",
        }
    }

    pub(super) fn allows(self, method: &Method) -> bool {
        self.methods().split(", ").any(|one| one == method.as_str())
    }

    /// The request that the path is about.
    pub(super) const fn request(self) -> Option<AccessRequestId> {
        match self {
            Self::Request(id) | Self::Approve(id) | Self::Deny(id) => Some(id),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_read_exactly() {
        let id = AccessRequestId::from_bytes([0xab; 16]);
        let hex = "ab".repeat(16);
        for (path, expected) in [
            ("/".to_owned(), Some(Place::Pending)),
            (format!("/requests/{hex}"), Some(Place::Request(id))),
            (format!("/requests/{hex}/deny"), Some(Place::Deny(id))),
            (format!("/requests/{hex}/approve"), Some(Place::Approve(id))),
            (format!("/requests/{hex}/"), None),
            (format!("/requests/{hex}/deny/"), None),
            (format!("/requests/{hex}0"), None),
            ("/requests/".to_owned(), None),
            ("//".to_owned(), None),
            ("/devices/".to_owned(), None),
            ("/console.css/..".to_owned(), None),
            (String::new(), None),
        ] {
            assert_eq!(Place::parse(&path), expected, "{path}");
        }
    }

    #[test]
    fn changes_are_made_only_by_forms() {
        let id = AccessRequestId::from_bytes([1; 16]);
        assert!(!Place::Approve(id).allows(&Method::GET));
        assert!(!Place::SignOut.allows(&Method::GET));
        assert!(Place::Deny(id).allows(&Method::POST));
        for place in [
            Place::Pending,
            Place::Request(id),
            Place::Devices,
            Place::Decisions,
        ] {
            assert!(place.allows(&Method::GET) && !place.allows(&Method::POST));
            assert!(!place.allows(&Method::DELETE) && !place.allows(&Method::HEAD));
        }
    }
}
