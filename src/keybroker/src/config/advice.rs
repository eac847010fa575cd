//! Gives advice on how to correct an invalid value.
//!
//! The TOML parser reports only the expected type: for the value `"30s"`, the message is
//! `expected u64`. The advice depends on the name of the setting and on the value.

use std::ops::Range;

/// Minimum Jaro-Winkler similarity between an unknown word and the word to suggest.
const SIMILAR: f64 = 0.8;

/// Sections that may occur several times. TOML requires double brackets for repeatable sections.
const REPEATED: [&str; 5] = ["listener", "principal", "issuer", "issuer.mapping", "token"];

/// Names of integer types in the parser's messages.
const WHOLE_NUMBERS: [&str; 7] = ["u64", "u32", "u16", "u8", "usize", "i64", "integer"];

/// Returns advice for a message of the parser; `span` is the part of the configuration file that
/// the message is about.
pub(super) fn on(text: &str, span: Range<usize>, message: &str) -> Option<String> {
    let written = text.get(span.clone())?;
    let setting = setting(text, span.start);
    if message.contains("socket address") {
        return Some(socket_address(written));
    }
    if message.starts_with("key_name") {
        let what = "patterns are not supported for key names: list the names, or write [\"*\"] for all names and \
         restrict them with a policy";
        return Some(what.to_owned());
    }
    if message.contains("unknown field") || message.contains("unknown variant") {
        return nearest_of(message);
    }
    if message.contains("duplicate key") || message.contains("invalid type: map") {
        return repeated_section(text, span.start);
    }
    let setting = setting?;
    if message.contains("must be quoted") {
        let value = text.get(span.start..)?.lines().next()?;
        let value = value.split('#').next()?.trim();
        return Some(if unit_of(setting) == A_NUMBER {
            in_quotes(setting, value)
        } else {
            number(setting, value)
        });
    }
    let expects = |words: &[&str]| {
        let expected = message.split("expected ").nth(1)?;
        let word = expected.split([',', ' ', ';']).find(|word| *word != "a")?;
        words.contains(&word).then_some(())
    };
    if message.contains("invalid type: string") {
        if expects(&WHOLE_NUMBERS).is_some() {
            return Some(number(setting, written));
        }
        if expects(&["boolean", "bool"]).is_some() {
            return Some(format!(
                "write true or false without quotes: `{setting} = true`"
            ));
        }
    }
    let is_number =
        message.contains("invalid value: integer") || message.contains("floating point");
    if is_number && expects(&WHOLE_NUMBERS).is_some() {
        return Some(format!(
            "write {} as a whole number that is not negative",
            unit_of(setting)
        ));
    }
    if expects(&["sequence"]).is_some() && !written.contains('[') {
        return Some(format!("write a list: `{setting} = [{written}]`"));
    }
    if expects(&["string", "path", "identifier"]).is_some() && !written.contains('[') {
        return Some(in_quotes(setting, written));
    }
    None
}

fn in_quotes(setting: &str, value: &str) -> String {
    format!("write the value in quotes: `{setting} = \"{value}\"`")
}

/// Advice for a repeatable section with single brackets instead of double brackets.
fn repeated_section(text: &str, offset: usize) -> Option<String> {
    let begin = text.get(..offset)?.rfind('\n').map_or(0, |at| at + 1);
    let line = text.get(begin..)?.lines().next()?.trim();
    let name = line.strip_prefix('[')?.split(']').next()?;
    REPEATED
        .contains(&name)
        .then(|| format!("a repeatable section needs double brackets: `[[{name}]]`"))
}

/// The name of the setting whose value starts at an offset.
fn setting(text: &str, offset: usize) -> Option<&str> {
    let line = text.get(..offset)?.rsplit('\n').next()?;
    let (name, _) = line.split_once('=')?;
    let name = name.trim();
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    (!name.is_empty() && name.chars().all(is_name)).then_some(name)
}

fn socket_address(written: &str) -> String {
    let example = "write an IP address and a port, such as \"127.0.0.1:8443\"; an IPv6 address needs brackets, such as \
     \"[::1]:8443\"";
    if written.contains(|c: char| c.is_ascii_alphabetic() && !c.is_ascii_hexdigit()) {
        format!("{example}. A host name is not accepted; for `localhost`, write 127.0.0.1")
    } else {
        example.to_owned()
    }
}

/// Suggests the known word that is most similar to an unknown word.
fn nearest_of(message: &str) -> Option<String> {
    let mut words = message.split('`').skip(1).step_by(2);
    let unknown = words.next()?;
    let nearest = words
        .map(|known| (strsim::jaro_winkler(unknown, known), known))
        .max_by(|(one, _), (other, _)| one.total_cmp(other));
    match nearest {
        Some((similarity, known)) if similarity >= SIMILAR => {
            Some(format!("did you mean `{known}`?"))
        }
        _ => None,
    }
}

/// Advice for a number that was written as a string, possibly with a unit.
fn number(setting: &str, written: &str) -> String {
    let text = written.trim_matches(['"', '\'']).trim();
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let unit = text[digits.len()..].trim();
    let value = digits.replace('_', "").parse::<u64>().ok();
    let what = unit_of(setting);
    let factor = match what {
        MILLISECONDS => milliseconds(unit),
        BYTES => bytes(unit),
        _ => unit.is_empty().then_some(1),
    };
    let value = value
        .zip(factor)
        .and_then(|(value, factor)| value.checked_mul(factor));
    match value {
        Some(value) => {
            format!("write {what} without a unit and without quotes: `{setting} = {value}`")
        }
        None => format!("write {what} without a unit and without quotes"),
    }
}

const MILLISECONDS: &str = "milliseconds";
const BYTES: &str = "bytes";
const A_NUMBER: &str = "a number";

/// The unit of a setting, derived from its name.
fn unit_of(setting: &str) -> &'static str {
    if setting.ends_with("_ms") {
        MILLISECONDS
    } else if setting.contains("bytes") {
        BYTES
    } else {
        A_NUMBER
    }
}

fn milliseconds(unit: &str) -> Option<u64> {
    match unit {
        "" | "ms" => Some(1),
        "s" | "sec" => Some(1_000),
        "m" | "min" => Some(60_000),
        "h" => Some(3_600_000),
        _ => None,
    }
}

fn bytes(unit: &str) -> Option<u64> {
    match unit.to_ascii_lowercase().as_str() {
        "" | "b" => Some(1),
        "k" | "kib" => Some(1 << 10),
        "m" | "mib" => Some(1 << 20),
        "g" | "gib" => Some(1 << 30),
        "kb" => Some(1_000),
        "mb" => Some(1_000_000),
        "gb" => Some(1_000_000_000),
        _ => None,
    }
}
