//! Changes of records that callers request.

use keybroker_core::{
    call::{Call, RequestId},
    key::Revision,
    principal::{Action, Principal},
    secret::KeyMaterial,
};

use super::UserKeyRef;

/// The requested change.
#[derive(Debug)]
pub(super) enum Change {
    Create {
        material: KeyMaterial,
    },
    Replace {
        material: KeyMaterial,
        expected: Revision,
    },
    Delete {
        expected: Revision,
    },
    Undelete,
    Restore {
        revision: Revision,
        expected: Revision,
    },
}

impl Change {
    pub(super) fn action(&self) -> Action {
        match self {
            Self::Create { .. } => Action::Create,
            Self::Replace { .. } => Action::Replace,
            Self::Delete { .. } => Action::Delete,
            Self::Undelete => Action::Undelete,
            Self::Restore { .. } => Action::Restore,
        }
    }
}

/// A running mutation. The value owns all its data, because a mutation can run longer than the call that started it.
pub(super) struct Mutation {
    pub(super) principal: Principal,
    pub(super) call: Call,
    pub(super) key: UserKeyRef,
    pub(super) change: Change,
    pub(super) request: Option<RequestId>,
}
