//! What a return code means for the job, the session and the worker: one table.
//!
//! The same code means different things on different tokens: `CKR_GENERAL_ERROR` is SoftHSM's answer to a damaged
//! ciphertext and to a token that was removed; `CKR_DEVICE_ERROR` is a wrong MAC on NSS. Such codes are ambiguous, and a
//! known-answer operation decides, never the code.

use std::fmt;

use cryptoki::error::{Error, RvError};

/// Class of a return code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    /// The input is at fault; the session is usable.
    Input,
    /// The session or its handles are gone; a new session may help.
    SessionLost,
    /// The token or the module is lost; only a new worker helps.
    TokenLost,
    /// The self-test decides.
    Ambiguous,
    /// The token is busy.
    BackOff,
    /// The PIN was rejected, or must not be shown to the token.
    Pin,
    /// A login failed with a code that does not concern the PIN: found by our own rules, never a return code.
    Login,
    /// The configuration or the key does not fit: a retry cannot help.
    Configuration,
    /// The module does not load, or shows no token that fits: its environment may be incomplete. Found by our own search,
    /// never a return code.
    NoToken,
    /// A registered key is not found. At the first start an administrator has to act; later a token that is unavailable or
    /// has lost its login looks the same. Found by our own search, never a return code.
    KeyMissing,
    /// Something on the token is not as it must be: found by our own checks, never a return code.
    Untrusted,
}

/// A failure inside the module, classified, with text for the log.
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

    /// The same failure, with a further sentence.
    pub(super) fn with(self, sentence: &str) -> Self {
        Self {
            class: self.class,
            detail: format!("{}; {sentence}", self.detail),
        }
    }

    /// The same failure, with what it was about in front.
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
            // The return code and the C function's name: both are needed to debug an HSM.
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

/// The table.
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
        // Among them general-error, function-failed, device-error, arguments-bad, and codes that no standard names.
        _ => Class::Ambiguous,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use RvError as Rv;

    /// A row per code that a token can answer a job with; a change of the table must change this list.
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
