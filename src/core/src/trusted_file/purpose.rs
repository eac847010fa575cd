//! What a file is used for, which decides the rule and the text of a refusal.

/// What a file is used for: decides the rule and the text of a refusal.
#[derive(Clone, Copy, Debug)]
pub struct Purpose(Kind);

#[derive(Clone, Copy, Debug)]
enum Kind {
    /// Other users may read it.
    Trust {
        /// What another user could do, as a clause that begins with `other users could`.
        risk: &'static str,
        /// What to do about a foreign owner, when it is not `chown`.
        owner_remedy: Option<&'static str>,
    },
    /// Other users must not read it. Names the content, such as `PIN`.
    Secret(&'static str),
}

impl Purpose {
    /// A file that other users may read but not change. `risk` is the clause that says what they could do otherwise.
    pub const fn trust(risk: &'static str) -> Self {
        Self(Kind::Trust {
            risk,
            owner_remedy: None,
        })
    }

    /// The same as [`Purpose::trust`], with a remedy for what belongs to another user.
    pub const fn trust_with_remedy(risk: &'static str, owner_remedy: &'static str) -> Self {
        Self(Kind::Trust {
            risk,
            owner_remedy: Some(owner_remedy),
        })
    }

    /// A file that holds a secret, named by `what`, such as `PIN`.
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
            Kind::Secret(_) => "other users could replace it",
        }
    }

    pub(super) const fn owner_remedy(self) -> Option<&'static str> {
        match self.0 {
            Kind::Trust { owner_remedy, .. } => owner_remedy,
            Kind::Secret(_) => None,
        }
    }
}
