//! The table that classifies return codes by their consequence for the job, the session and the worker.
//!
//! The meaning of a return code depends on the token. SoftHSM returns `CKR_GENERAL_ERROR` for a
//! damaged ciphertext, but also for a token that was removed. NSS returns `CKR_DEVICE_ERROR` for a
//! wrong MAC. If a code is ambiguous, the result of a self-test decides instead of the code.

use std::fmt;

use cryptoki::error::{Error, RvError};

/// The consequence of a failure for the job, the session and the worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    /// The input is wrong, and the session can be used again.
    Input,
    /// The session or its handles are lost. The job may succeed in a new session.
    SessionLost,
    /// The token or the module is lost. Only a new worker can use the token again.
    TokenLost,
    /// The return code is ambiguous, so the result of a self-test determines the consequence.
    Ambiguous,
    /// The token has no free session, or memory is exhausted. The job may succeed later.
    BackOff,
    /// The PIN was rejected, or must not be presented to the token.
    Pin,
    /// A login failed with a code that does not concern the PIN. This class comes from the login rules, and never from
    /// a return code.
    Login,
    /// The configuration or the key does not match the token. A retry cannot help.
    Configuration,
    /// The module cannot be loaded, or no token matches the settings. The module's environment may be incomplete. This
    /// class comes from the search for a token, and never from a return code.
    NoToken,
    /// A registered key is not found. If a key is missing at the first start, an administrator must act. Later, a
    /// missing key can also mean that the token is unavailable or has lost its login. This class comes from the search
    /// for keys, and never from a return code.
    KeyMissing,
    /// An object on the token has a property that is not allowed. This class comes from a check of
    /// the worker, such as the attribute check, and never from a return code.
    Untrusted,
}

/// A failure with its class, and with a description for the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) class: Class,
    pub(super) detail: String,
}

impl Fault {
    pub(super) fn new(class: Class, detail: impl Into<String>) -> Self {
        Self {
            class,
            detail: detail.into(),
        }
    }

    /// Whether the cause may be the input, the token or a short overload of the token.
    pub(super) fn is_ambiguous(&self) -> bool {
        matches!(
            self.class,
            Class::Input | Class::Ambiguous | Class::Configuration | Class::NoToken
        )
    }

    /// Adds a sentence to the text of the failure.
    pub(super) fn with(self, sentence: &str) -> Self {
        Self {
            class: self.class,
            detail: format!("{}; {sentence}", self.detail),
        }
    }

    /// Prepends the subject of the failure to its text.
    pub(super) fn about(self, what: &str) -> Self {
        Self {
            class: self.class,
            detail: format!("{what}: {}", self.detail),
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.detail)
    }
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        match error {
            // The text contains the return code and the name of the C function, because both are necessary to diagnose
            // an HSM.
            Error::Pkcs11(code, function) => {
                Self::new(classify(code), format!("{code:?} from C_{function:?}"))
            }
            Error::NotSupported | Error::NullFunctionPointer | Error::MissingSymbol(_) => {
                Self::new(Class::Configuration, error.to_string())
            }
            other => Self::new(Class::Ambiguous, other.to_string()),
        }
    }
}

/// Classifies a return code.
pub(super) fn classify(code: RvError) -> Class {
    use RvError as Rv;
    match code {
        Rv::EncryptedDataInvalid
        | Rv::EncryptedDataLenRange
        | Rv::DataInvalid
        | Rv::DataLenRange
        | Rv::WrappedKeyInvalid
        | Rv::WrappedKeyLenRange
        | Rv::SignatureInvalid
        | Rv::SignatureLenRange => Class::Input,
        Rv::SessionHandleInvalid
        | Rv::SessionClosed
        | Rv::OperationActive
        | Rv::OperationNotInitialized
        | Rv::UserNotLoggedIn
        | Rv::ObjectHandleInvalid
        | Rv::KeyHandleInvalid
        | Rv::UnwrappingKeyHandleInvalid
        | Rv::WrappingKeyHandleInvalid => Class::SessionLost,
        Rv::CryptokiNotInitialized
        | Rv::DeviceRemoved
        | Rv::TokenNotPresent
        | Rv::TokenNotRecognized
        | Rv::SlotIdInvalid => Class::TokenLost,
        Rv::SessionCount | Rv::HostMemory | Rv::DeviceMemory => Class::BackOff,
        Rv::PinIncorrect
        | Rv::PinInvalid
        | Rv::PinLenRange
        | Rv::PinExpired
        | Rv::PinLocked
        | Rv::PinTooWeak
        | Rv::NewPinMode => Class::Pin,
        Rv::UserPinNotInitialized
        | Rv::UserTypeInvalid
        | Rv::KeyFunctionNotPermitted
        | Rv::KeyTypeInconsistent
        | Rv::MechanismInvalid
        | Rv::MechanismParamInvalid
        | Rv::FunctionNotSupported => Class::Configuration,
        // All other codes are ambiguous: general-error, function-failed, device-error, arguments-bad, and also codes
        // that are not in the standard.
        _ => Class::Ambiguous,
    }
}

/// Whether a return code counts as a refusal of the operation. Every return code counts as a refusal, except codes that
/// mean that the token or the session is unusable at this time.
pub(crate) fn is_a_refusal(error: &Error) -> bool {
    match error {
        Error::Pkcs11(
            RvError::SessionHandleInvalid
            | RvError::SessionClosed
            | RvError::UserNotLoggedIn
            | RvError::OperationActive,
            _,
        ) => false,
        Error::Pkcs11(code, _) => !matches!(classify(*code), Class::TokenLost | Class::BackOff),
        Error::NotSupported | Error::NullFunctionPointer => true,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use RvError as Rv;

    /// The codes that a token can return for a job. A change of `classify` requires a change of this list.
    const TABLE: &[(Class, &[Rv])] = &[
        (
            Class::Input,
            &[
                Rv::EncryptedDataInvalid,
                Rv::EncryptedDataLenRange,
                Rv::DataInvalid,
                Rv::DataLenRange,
                Rv::WrappedKeyInvalid,
                Rv::WrappedKeyLenRange,
                Rv::SignatureInvalid,
                Rv::SignatureLenRange,
            ],
        ),
        (
            Class::SessionLost,
            &[
                Rv::SessionHandleInvalid,
                Rv::SessionClosed,
                Rv::OperationActive,
                Rv::OperationNotInitialized,
                Rv::UserNotLoggedIn,
                Rv::ObjectHandleInvalid,
                Rv::KeyHandleInvalid,
                Rv::UnwrappingKeyHandleInvalid,
                Rv::WrappingKeyHandleInvalid,
            ],
        ),
        (
            Class::TokenLost,
            &[
                Rv::CryptokiNotInitialized,
                Rv::DeviceRemoved,
                Rv::TokenNotPresent,
                Rv::TokenNotRecognized,
                Rv::SlotIdInvalid,
            ],
        ),
        (
            Class::Ambiguous,
            &[
                Rv::GeneralError,
                Rv::FunctionFailed,
                Rv::DeviceError,
                Rv::ArgumentsBad,
                Rv::FunctionCanceled,
                Rv::BufferTooSmall,
                Rv::Cancel,
            ],
        ),
        (
            Class::BackOff,
            &[Rv::SessionCount, Rv::HostMemory, Rv::DeviceMemory],
        ),
        (
            Class::Pin,
            &[
                Rv::PinIncorrect,
                Rv::PinInvalid,
                Rv::PinLenRange,
                Rv::PinExpired,
                Rv::PinLocked,
                Rv::PinTooWeak,
                Rv::NewPinMode,
            ],
        ),
        (
            Class::Configuration,
            &[
                Rv::UserPinNotInitialized,
                Rv::UserTypeInvalid,
                Rv::KeyFunctionNotPermitted,
                Rv::KeyTypeInconsistent,
                Rv::MechanismInvalid,
                Rv::MechanismParamInvalid,
                Rv::FunctionNotSupported,
            ],
        ),
    ];

    #[test]
    fn every_code_has_its_class() {
        for (class, codes) in TABLE {
            for code in *codes {
                assert_eq!(classify(*code), *class, "{code:?}");
            }
        }
    }

    #[test]
    fn a_fault_keeps_code_and_function() {
        let error = Error::Pkcs11(RvError::GeneralError, cryptoki::context::Function::Decrypt);
        let fault = Fault::from(error);
        assert_eq!(fault.class, Class::Ambiguous);
        assert_eq!(fault.detail, "GeneralError from C_Decrypt");
    }
}
