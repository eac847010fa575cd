//! The use of a file, which determines the checks and the text of a refusal.

/// The use of a file, which determines the checks and the text of a refusal.
#[derive(Clone, Copy, Debug)]
pub struct Purpose(Kind);

#[derive(Clone, Copy, Debug)]
enum Kind {
    /// Other users may read the file.
    Trust {
        /// The risk, as a clause that begins with `other users could`.
        risk: &'static str,
        /// The remedy if the file belongs to another user; absent if the remedy is `chown`.
        owner_remedy: Option<&'static str>,
    },
    /// Other users must not read the file. The text describes the content, such as `PIN`.
    Secret(&'static str),
}

impl Purpose {
    /// A file that other users may read but not change. `risk` is a clause that says what other users could do if they
    /// changed the file.
    pub const fn trust(risk: &'static str) -> Self {
        Self(Kind::Trust {
            risk,
            owner_remedy: None,
        })
    }

    /// Like [`Purpose::trust`], with another remedy for files that belong to another user.
    pub const fn trust_with_remedy(risk: &'static str, owner_remedy: &'static str) -> Self {
        Self(Kind::Trust {
            risk,
            owner_remedy: Some(owner_remedy),
        })
    }

    /// A file that contains a secret. `what` describes the secret, such as `PIN`.
    pub const fn secret(what: &'static str) -> Self {
        Self(Kind::Secret(what))
    }

    pub(super) const fn is_secret(self) -> bool {
        matches!(self.0, Kind::Secret(_))
    }

    pub(super) const fn content(self) -> &'static str {
        match self.0 {
            Kind::Trust { .. } => "content",
            Kind::Secret(what) => what,
        }
    }

    pub(super) const fn risk(self) -> &'static str {
        match self.0 {
            Kind::Trust { risk, .. } => risk,
            Kind::Secret(_) => "other users could replace the secret",
        }
    }

    pub(super) const fn owner_remedy(self) -> Option<&'static str> {
        match self.0 {
            Kind::Trust { owner_remedy, .. } => owner_remedy,
            Kind::Secret(_) => None,
        }
    }
}
