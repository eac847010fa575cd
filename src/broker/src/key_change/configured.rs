//! The tokens of the configuration, on which admin workers make, find and remove wrapping keys.

use std::sync::Arc;

use arc_swap::ArcSwap;

use keybroker_hsm::admin::KeyAdmin;

/// The tokens of the configuration. All clones of this value show the same list, which is replaced when the tokens of a
/// running broker change.
#[derive(Clone, Debug, Default)]
pub struct ConfiguredTokens(Arc<ArcSwap<Vec<KeyAdmin>>>);

impl ConfiguredTokens {
    /// The tokens in the order of the configuration.
    pub fn new(tokens: Vec<KeyAdmin>) -> Self {
        Self(Arc::new(ArcSwap::from_pointee(tokens)))
    }

    /// Replaces the list. A change of a wrapping key that is in progress continues with the previous list.
    pub fn replace(&self, tokens: Vec<KeyAdmin>) {
        self.0.store(Arc::new(tokens));
    }

    pub(crate) fn all(&self) -> Arc<Vec<KeyAdmin>> {
        self.0.load_full()
    }
}
