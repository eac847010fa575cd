//! The information that a token reports about itself.

use cryptoki_sys::{
    CK_FLAGS, CK_TOKEN_INFO, CK_ULONG, CK_UNAVAILABLE_INFORMATION, CK_VERSION, CKF_CLOCK_ON_TOKEN,
    CKF_LOGIN_REQUIRED, CKF_PROTECTED_AUTHENTICATION_PATH, CKF_SO_PIN_FINAL_TRY, CKF_SO_PIN_LOCKED,
    CKF_TOKEN_INITIALIZED, CKF_USER_PIN_COUNT_LOW, CKF_USER_PIN_FINAL_TRY,
    CKF_USER_PIN_INITIALIZED, CKF_USER_PIN_LOCKED, CKF_WRITE_PROTECTED,
};

/// A copy of `CK_TOKEN_INFO`. Trailing blanks of text fields are removed; NUL bytes are kept.
#[derive(Clone, Debug)]
pub struct TokenInfo {
    label: String,
    manufacturer_id: String,
    model: String,
    serial_number: String,
    utc_time: String,
    raw: CK_TOKEN_INFO,
}

/// Converts the information that `cryptoki` has read.
impl From<cryptoki::slot::TokenInfo> for TokenInfo {
    fn from(info: cryptoki::slot::TokenInfo) -> Self {
        use cryptoki::slot::Limit;
        let mut flags = 0;
        for (is_set, flag) in [
            (info.token_initialized(), CKF_TOKEN_INITIALIZED),
            (info.login_required(), CKF_LOGIN_REQUIRED),
            (info.write_protected(), CKF_WRITE_PROTECTED),
            (info.clock_on_token(), CKF_CLOCK_ON_TOKEN),
            (
                info.protected_authentication_path(),
                CKF_PROTECTED_AUTHENTICATION_PATH,
            ),
            (info.user_pin_initialized(), CKF_USER_PIN_INITIALIZED),
            (info.user_pin_count_low(), CKF_USER_PIN_COUNT_LOW),
            (info.user_pin_final_try(), CKF_USER_PIN_FINAL_TRY),
            (info.user_pin_locked(), CKF_USER_PIN_LOCKED),
            (info.so_pin_final_try(), CKF_SO_PIN_FINAL_TRY),
            (info.so_pin_locked(), CKF_SO_PIN_LOCKED),
        ] {
            if is_set {
                flags |= flag;
            }
        }
        let limit = |limit| match limit {
            Limit::Max(max) => max,
            Limit::Unavailable => CK_UNAVAILABLE_INFORMATION,
            Limit::Infinite => 0,
        };
        let version = |version: cryptoki::types::Version| CK_VERSION {
            major: version.major(),
            minor: version.minor(),
        };
        let length = |length: usize| CK_ULONG::try_from(length).unwrap_or(CK_ULONG::MAX);
        Self {
            label: info.label().to_owned(),
            manufacturer_id: info.manufacturer_id().to_owned(),
            model: info.model().to_owned(),
            serial_number: info.serial_number().to_owned(),
            utc_time: String::new(),
            raw: CK_TOKEN_INFO {
                flags,
                ulMaxSessionCount: limit(info.max_session_count()),
                ulMaxRwSessionCount: limit(info.max_rw_session_count()),
                ulMaxPinLen: length(info.max_pin_length()),
                ulMinPinLen: length(info.min_pin_length()),
                hardwareVersion: version(info.hardware_version()),
                firmwareVersion: version(info.firmware_version()),
                ..CK_TOKEN_INFO::default()
            },
        }
    }
}

impl From<CK_TOKEN_INFO> for TokenInfo {
    fn from(raw: CK_TOKEN_INFO) -> Self {
        Self {
            label: text(&raw.label),
            manufacturer_id: text(&raw.manufacturerID),
            model: text(&raw.model),
            serial_number: text(&raw.serialNumber),
            utc_time: text(&raw.utcTime),
            raw,
        }
    }
}

fn text(padded: &[u8]) -> String {
    let text = String::from_utf8_lossy(padded);
    text.trim_end_matches(' ').to_owned()
}

/// Returns a count, or `None` if the token does not report the count.
fn count(number: CK_ULONG) -> Option<u64> {
    (number != CK_UNAVAILABLE_INFORMATION).then_some(number)
}

fn length(number: CK_ULONG) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

impl TokenInfo {
    /// The label.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// The manufacturer of the device.
    pub fn manufacturer_id(&self) -> &str {
        &self.manufacturer_id
    }

    /// The model of the device.
    pub fn model(&self) -> &str {
        &self.model
    }

    /// The serial number of the device.
    pub fn serial_number(&self) -> &str {
        &self.serial_number
    }

    /// The token's time, in the token's own format (16 digits in the standard). The value is meaningless without
    /// `CKF_CLOCK_ON_TOKEN`.
    pub fn utc_time(&self) -> &str {
        &self.utc_time
    }

    /// Version of the hardware, major and minor.
    pub fn hardware_version(&self) -> (u8, u8) {
        let version = self.raw.hardwareVersion;
        (version.major, version.minor)
    }

    /// Version of the firmware, major and minor.
    pub fn firmware_version(&self) -> (u8, u8) {
        let version = self.raw.firmwareVersion;
        (version.major, version.minor)
    }

    /// Largest number of sessions that one application may open; 0 means no limit.
    pub fn max_session_count(&self) -> Option<u64> {
        count(self.raw.ulMaxSessionCount)
    }

    /// Largest number of read-write sessions that one application may open; 0 means no limit.
    pub fn max_rw_session_count(&self) -> Option<u64> {
        count(self.raw.ulMaxRwSessionCount)
    }

    /// The longest PIN, in bytes.
    pub fn max_pin_length(&self) -> usize {
        length(self.raw.ulMaxPinLen)
    }

    /// The shortest PIN, in bytes.
    pub fn min_pin_length(&self) -> usize {
        length(self.raw.ulMinPinLen)
    }

    fn has(&self, flag: CK_FLAGS) -> bool {
        self.raw.flags & flag != 0
    }

    /// All flags.
    pub fn flags(&self) -> u64 {
        self.raw.flags
    }

    /// Whether `CKF_TOKEN_INITIALIZED` is set.
    pub fn token_initialized(&self) -> bool {
        self.has(CKF_TOKEN_INITIALIZED)
    }

    /// Whether `CKF_LOGIN_REQUIRED` is set.
    pub fn login_required(&self) -> bool {
        self.has(CKF_LOGIN_REQUIRED)
    }

    /// Whether `CKF_WRITE_PROTECTED` is set.
    pub fn write_protected(&self) -> bool {
        self.has(CKF_WRITE_PROTECTED)
    }

    /// Whether `CKF_CLOCK_ON_TOKEN` is set.
    pub fn clock_on_token(&self) -> bool {
        self.has(CKF_CLOCK_ON_TOKEN)
    }

    /// Whether `CKF_PROTECTED_AUTHENTICATION_PATH` is set.
    pub fn protected_authentication_path(&self) -> bool {
        self.has(CKF_PROTECTED_AUTHENTICATION_PATH)
    }

    /// Whether `CKF_USER_PIN_INITIALIZED` is set.
    pub fn user_pin_initialized(&self) -> bool {
        self.has(CKF_USER_PIN_INITIALIZED)
    }

    /// Whether `CKF_USER_PIN_COUNT_LOW` is set.
    pub fn user_pin_count_low(&self) -> bool {
        self.has(CKF_USER_PIN_COUNT_LOW)
    }

    /// Whether `CKF_USER_PIN_FINAL_TRY` is set.
    pub fn user_pin_final_try(&self) -> bool {
        self.has(CKF_USER_PIN_FINAL_TRY)
    }

    /// Whether `CKF_USER_PIN_LOCKED` is set.
    pub fn user_pin_locked(&self) -> bool {
        self.has(CKF_USER_PIN_LOCKED)
    }

    /// Whether `CKF_SO_PIN_FINAL_TRY` is set.
    pub fn so_pin_final_try(&self) -> bool {
        self.has(CKF_SO_PIN_FINAL_TRY)
    }

    /// Whether `CKF_SO_PIN_LOCKED` is set.
    pub fn so_pin_locked(&self) -> bool {
        self.has(CKF_SO_PIN_LOCKED)
    }
}
