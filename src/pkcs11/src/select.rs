//! Selects the token. The settings contain exactly one of label, serial number and RFC 7512 URI, and exactly one token
//! must match.

use std::{
    thread,
    time::{Duration, Instant},
};

use cryptoki::slot::Slot;

use keybroker_pkcs11_ffi::Module;
use keybroker_worker_protocol::{Settings, TokenInfo, unpadded};

use crate::{
    calling,
    classify::{Class, Fault},
};

/// Time for which a process that starts waits for an absent token. SoftHSM rewrites the token's
/// file at each login, so the token can be absent for a moment while another process logs in.
const ABSENT_RETRY: Duration = Duration::from_secs(2);
const ABSENT_PAUSE: Duration = Duration::from_millis(50);

/// Reason why the settings do not select a token.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum SelectorError {
    #[error("no token is selected: set one of `token.label`, `token.serial` and `token.uri`")]
    None,
    #[error(
        "the token is selected twice: set only one of `token.label`, `token.serial` and `token.uri`"
    )]
    Twice,
    #[error("`token.uri` must begin with `pkcs11:`")]
    Scheme,
    #[error("`token.uri` must have no query: the module and the PIN have separate settings")]
    Query,
    #[error("`token.uri`: {0:?} has no value")]
    NoValue(String),
    #[error(
        "`token.uri`: {0:?} is not an attribute of a token; use token, serial, manufacturer and model"
    )]
    Attribute(String),
    #[error("`token.uri` contains {0:?} twice")]
    AttributeTwice(String),
    #[error("`token.uri` contains no attribute of a token")]
    Empty,
    #[error("`token.uri`: {0:?} is not percent-encoded UTF-8")]
    Encoding(String),
}

/// The properties that a token must have. A field that is `None` matches every token.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Selector {
    label: Option<String>,
    serial: Option<String>,
    manufacturer: Option<String>,
    model: Option<String>,
}

impl Selector {
    /// Builds a selector from the settings, which must contain exactly one of `label`, `serial` and `uri`.
    pub(super) fn from_settings(settings: &Settings) -> Result<Self, SelectorError> {
        match (&settings.label, &settings.serial, &settings.uri) {
            (Some(label), None, None) => Ok(Self {
                label: Some(label.clone()),
                ..Self::default()
            }),
            (None, Some(serial), None) => Ok(Self {
                serial: Some(serial.clone()),
                ..Self::default()
            }),
            (None, None, Some(uri)) => Self::from_uri(uri),
            (None, None, None) => Err(SelectorError::None),
            _ => Err(SelectorError::Twice),
        }
    }

    /// Builds a selector from an RFC 7512 URI. The URI may contain only the path attributes of a token.
    pub(super) fn from_uri(uri: &str) -> Result<Self, SelectorError> {
        // The scheme is not case-sensitive (RFC 3986 section 3.1).
        let (scheme, path) = uri.split_once(':').ok_or(SelectorError::Scheme)?;
        if !scheme.eq_ignore_ascii_case("pkcs11") {
            return Err(SelectorError::Scheme);
        }
        if path.contains('?') {
            return Err(SelectorError::Query);
        }
        let mut selector = Self::default();
        for attribute in path.split(';').filter(|attribute| !attribute.is_empty()) {
            let (name, value) = attribute
                .split_once('=')
                .ok_or_else(|| SelectorError::NoValue(attribute.to_owned()))?;
            let field = match name {
                "token" => &mut selector.label,
                "serial" => &mut selector.serial,
                "manufacturer" => &mut selector.manufacturer,
                "model" => &mut selector.model,
                other => return Err(SelectorError::Attribute(other.to_owned())),
            };
            if field.replace(percent_decode(value)?).is_some() {
                return Err(SelectorError::AttributeTwice(name.to_owned()));
            }
        }
        if selector == Self::default() {
            return Err(SelectorError::Empty);
        }
        Ok(selector)
    }

    pub(super) fn fits(&self, info: &keybroker_pkcs11_ffi::TokenInfo) -> bool {
        let same = |wanted: &Option<String>, found: &str| {
            wanted
                .as_deref()
                .is_none_or(|wanted| unpadded(wanted) == unpadded(found))
        };
        same(&self.label, info.label())
            && same(&self.serial, info.serial_number())
            && same(&self.manufacturer, info.manufacturer_id())
            && same(&self.model, info.model())
    }

    /// Returns the required label, serial number, manufacturer and model; `None` matches any value.
    pub(super) fn parts(&self) -> [Option<&str>; 4] {
        [&self.label, &self.serial, &self.manufacturer, &self.model].map(Option::as_deref)
    }

    fn describe(&self) -> String {
        [
            ("label", &self.label),
            ("serial", &self.serial),
            ("manufacturer", &self.manufacturer),
            ("model", &self.model),
        ]
        .into_iter()
        .filter_map(|(name, value)| Some(format!("{name} {:?}", value.as_ref()?)))
        .collect::<Vec<_>>()
        .join(", ")
    }
}

fn percent_decode(text: &str) -> Result<String, SelectorError> {
    let bad = || SelectorError::Encoding(text.to_owned());
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        rest = tail;
        if *first == b'%' {
            let (digits, tail) = rest.split_at_checked(2).ok_or_else(bad)?;
            let mut byte = [0];
            hex::decode_to_slice(digits, &mut byte).map_err(|_| bad())?;
            bytes.extend(byte);
            rest = tail;
        } else {
            bytes.push(*first);
        }
    }
    String::from_utf8(bytes).map_err(|_| bad())
}

/// The selected token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Selected {
    pub(super) slot: Slot,
    pub(super) info: TokenInfo,
    /// Whether other tokens also match the settings, so that a serial number in the registry selected this token.
    pub(super) is_one_of_several: bool,
}

/// Effect of the serial numbers in the registry on the choice of a token. If the registry contains
/// no serial numbers, it has no effect on the choice.
#[derive(Clone, Copy, Debug)]
pub(super) enum Registered<'a> {
    /// For `serve`: only a token whose serial number is in the registry is chosen. Another token with the same label
    /// may belong to another user, who would learn the PIN.
    Required(&'a [&'a str]),
    /// For commands: the registry's serial numbers are used only if several tokens match. Some commands are used with a
    /// clone of the registered token, or with a token that has no registered keys.
    Preferred(&'a [&'a str]),
}

impl Registered<'_> {
    fn serials(&self) -> Vec<&str> {
        let (Self::Required(serials) | Self::Preferred(serials)) = self;
        serials
            .iter()
            .map(|serial| unpadded(serial))
            .filter(|serial| !serial.is_empty())
            .collect()
    }
}

/// Finds the only initialised token that matches. If no token matches, repeats the search for up to two seconds.
pub(super) fn find(
    module: &Module,
    selector: &Selector,
    registered: Registered<'_>,
) -> Result<Selected, Fault> {
    let until = Instant::now() + ABSENT_RETRY;
    loop {
        match find_now(module, selector, registered) {
            Err(_) if Instant::now() < until => thread::sleep(ABSENT_PAUSE),
            result => return result,
        }
    }
}

fn find_now(
    module: &Module,
    selector: &Selector,
    registered: Registered<'_>,
) -> Result<Selected, Fault> {
    let tokens = list(module)?;
    let fitting: Vec<_> = tokens
        .iter()
        .filter(|(_, info)| selector.fits(info))
        .collect();
    let wanted = selector.describe();
    if tokens.is_empty() {
        return Err(Fault::new(
            Class::NoToken,
            format!(
                "no token with {wanted}: the module shows no initialised token at all. Is [token.environment] complete \
                 (SoftHSM: SOFTHSM2_CONF)? List tokens with `keybroker token list`, or create a token with `keybroker \
                 token init`"
            ),
        ));
    }
    if fitting.is_empty() {
        return Err(no_token(&wanted, &tokens));
    }
    let serials = registered.serials();
    let mut candidates: Vec<_> = fitting
        .iter()
        .copied()
        .filter(|(_, info)| serials.contains(&unpadded(info.serial_number())))
        .collect();
    let is_required = matches!(registered, Registered::Required(_)) && !serials.is_empty();
    if candidates.is_empty() && !is_required {
        candidates.clone_from(&fitting);
    }
    match candidates.as_slice() {
        [(slot, info)] => Ok(Selected {
            slot: *slot,
            info: describe(info),
            is_one_of_several: fitting.len() > 1,
        }),
        [] => Err(Fault::new(
            Class::NoToken,
            format!(
                "the registry contains the token with the serial number {}, but the settings match only {}, so no login \
                 was tried. Connect the registered token and set `token.serial` to its serial number. If the connected token is a \
                 clone of the registered token, run `keybroker key register ID` with the connected token",
                quoted(serials.iter().copied()),
                quoted(
                    fitting
                        .iter()
                        .map(|(_, info)| unpadded(info.serial_number()))
                ),
            ),
        )),
        several => Err(Fault::new(
            Class::Configuration,
            format!(
                "more than one token has {wanted} (serial numbers {}): select one of these tokens with \
                 `token.serial`",
                quoted(
                    several
                        .iter()
                        .map(|(_, info)| unpadded(info.serial_number()))
                )
            ),
        )),
    }
}

fn quoted<'a>(serials: impl Iterator<Item = &'a str>) -> String {
    let quoted: Vec<String> = serials.map(|serial| format!("{serial:?}")).collect();
    quoted.join(", ")
}

fn no_token(wanted: &str, tokens: &[(Slot, keybroker_pkcs11_ffi::TokenInfo)]) -> Fault {
    Fault::new(
        Class::NoToken,
        format!(
            "no token with {wanted}; the module shows {} initialised token(s): {}. List tokens with `keybroker token \
             list`, or create a token with `keybroker token init`",
            tokens.len(),
            tokens
                .iter()
                .map(|(_, info)| format!("{:?}", unpadded(info.label())))
                .collect::<Vec<_>>()
                .join(", ")
        ),
    )
}

/// Returns all initialised tokens.
pub(super) fn list(module: &Module) -> Result<Vec<(Slot, keybroker_pkcs11_ffi::TokenInfo)>, Fault> {
    let mut tokens = Vec::new();
    calling::next("C_GetSlotList");
    for slot in module.slots_with_token()? {
        calling::next("C_GetTokenInfo");
        let info = module.get_token_info(slot)?;
        if info.token_initialized() {
            tokens.push((slot, info));
        }
    }
    Ok(tokens)
}

/// Returns the token information (`C_GetTokenInfo`) without padding.
pub(super) fn describe(info: &keybroker_pkcs11_ffi::TokenInfo) -> TokenInfo {
    TokenInfo {
        label: unpadded(info.label()).to_owned(),
        serial: unpadded(info.serial_number()).to_owned(),
        model: format!(
            "{} {}",
            unpadded(info.manufacturer_id()),
            unpadded(info.model())
        ),
        // Only the token that is opened needs this property, from another function of the module.
        is_hardware: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uri_names_a_token() {
        let selector = Selector::from_uri("pkcs11:token=My%20token;serial=0a1b").unwrap();
        assert_eq!(selector.label.as_deref(), Some("My token"));
        assert_eq!(selector.serial.as_deref(), Some("0a1b"));
        assert_eq!(selector.describe(), r#"label "My token", serial "0a1b""#);
        // RFC 3986 section 3.1: the comparison of the scheme ignores case.
        let upper = Selector::from_uri("PKCS11:token=My%20token;serial=0a1b");
        assert_eq!(upper, Ok(selector));
    }

    #[test]
    fn padding_is_not_part_of_a_text() {
        for padded in [
            "demo",
            "demo  ",
            "demo\0\0",
            "demo\0  ",
            "demo  \0",
            "demo\0old label",
        ] {
            assert_eq!(unpadded(padded), "demo", "{padded:?}");
        }
        assert_eq!(unpadded("\0\0"), "");
        assert_eq!(unpadded("  a b "), "  a b");
    }

    #[test]
    fn a_uri_that_names_more_or_less_is_refused() {
        for bad in [
            "token=x",
            "pkcs11:",
            "pkcs11:token",
            "pkcs11:object=key",
            "pkcs11:token=a;token=b",
            "pkcs11:token=%2",
            "pkcs11:token=%ff",
            "pkcs11:token=a?pin-value=1234",
        ] {
            assert!(Selector::from_uri(bad).is_err(), "{bad}");
        }
    }
}
