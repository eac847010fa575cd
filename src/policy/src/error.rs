//! The error that occurs if Cedar refuses a question or the parts of a policy. This crate checks policies and questions
//! first, so each such error is a defect of this crate. Therefore, one error type with the cause for the log is enough.

/// A failed call to Cedar.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action}")]
pub(crate) struct Error {
    action: &'static str,
    source: Box<dyn std::error::Error + Send + Sync>,
}

impl Error {
    /// Adds the failed action to a cause, as an infinitive.
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
