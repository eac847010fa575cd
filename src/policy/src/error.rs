//! Why Cedar could not be asked, or a policy not be taken apart. All of these are faults of this crate, because policies and
//! questions were checked before: so they have one form, with the cause for the log.

/// Something that this crate asked of Cedar and that Cedar refused.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action}")]
pub(crate) struct Error {
    action: &'static str,
    source: Box<dyn std::error::Error + Send + Sync>,
}

impl Error {
    /// Gives the cause its context: what was to be done, as an infinitive.
    pub(crate) fn on<E>(action: &'static str) -> impl Fn(E) -> Self
    where
        E: std::error::Error + Send + Sync + 'static,
    {
        move |source| Self {
            action,
            source: Box::new(source),
        }
    }
}
