//! The error that occurs if Cedar refuses a policy question or the parts of a policy. Because this
//! crate checks policies and policy questions first, the error means that this crate has a bug.
//! Therefore a single error type with a cause for the log is sufficient.

/// A failed call to Cedar.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action}")]
pub(crate) struct Error {
    action: &'static str,
    source: Box<dyn std::error::Error + Send + Sync>,
}

impl Error {
    /// Adds the failed action to a cause. `action` is an infinitive without "to".
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
