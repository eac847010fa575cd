//! What to write instead of a value that the configuration does not accept.
//!
//! The parser of TOML knows types and not meanings: it says `expected u64` where a person wrote `"30s"`. The advice looks at the name
//! of the setting and at what was written.

use std::ops::Range;

/// Words closer than this are taken for a slip of the pen (Jaro-Winkler similarity).
const SIMILAR: f64 = 0.8;

/// Advice on the message of the parser about a part of the text.
pub(super) fn on(text: &str, span: Range<usize>, message: &str) -> Option<String> {
    let written = text.get(span.clone())?;
    let setting = setting(text, span.start);
    if message.contains("socket address") {
        return Some(socket_address(written));
    }
    if message.starts_with("key_name") {
        let what = "a key name has no patterns: list the names, or write [\"*\"] for all of them and narrow it with a policy";
        return Some(what.to_owned());
    }
    if message.contains("unknown field") {
        return unknown_field(message);
    }
    let setting = setting?;
    let expects = |words: &[&str]| {
        let expected = message.split("expected ").nth(1)?;
        let word = expected.split([',', ' ', ';']).find(|word| *word != "a")?;
        words.contains(&word).then_some(())
    };
    if message.contains("invalid type: string") {
        if expects(&["u64", "u32", "u16", "u8", "usize", "i64", "integer"]).is_some() {
            return Some(number(setting, written));
        }
        if expects(&["boolean", "bool"]).is_some() {
            return Some(format!(
                "write true or false without quotes: `{setting} = true`"
            ));
        }
    }
    if expects(&["sequence"]).is_some() && !written.contains('[') {
        return Some(format!("write a list: `{setting} = [{written}]`"));
    }
    if expects(&["string", "path", "identifier"]).is_some() && !written.contains('[') {
        return Some(format!("write it in quotes: `{setting} = \"{written}\"`"));
    }
    None
}

/// The name of the setting whose value begins at an offset.
fn setting(text: &str, offset: usize) -> Option<&str> {
    let line = text.get(..offset)?.rsplit('\n').next()?;
    let (name, _) = line.split_once('=')?;
    let name = name.trim();
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    (!name.is_empty() && name.chars().all(is_name)).then_some(name)
}

fn socket_address(written: &str) -> String {
    let example = "write an IP address and a port, such as \"127.0.0.1:8443\"; an IPv6 address is in brackets, such as \"[::1]:8443\"";
    if written.contains(|c: char| c.is_ascii_alphabetic() && !c.is_ascii_hexdigit()) {
        format!("{example}. Host names are not looked up here: `localhost` is 127.0.0.1")
    } else {
        example.to_owned()
    }
}

fn unknown_field(message: &str) -> Option<String> {
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

/// A number that was written as text, perhaps with a unit.
fn number(setting: &str, written: &str) -> String {
    let text = written.trim_matches(['"', '\'']).trim();
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let unit = text[digits.len()..].trim();
    let value = digits.replace('_', "").parse::<u64>().ok();
    let (what, factor) = if setting.ends_with("_ms") {
        ("milliseconds", milliseconds(unit))
    } else if setting.contains("bytes") {
        ("bytes", bytes(unit))
    } else {
        ("a number", unit.is_empty().then_some(1))
    };
    let value = value
        .zip(factor)
        .and_then(|(value, factor)| value.checked_mul(factor));
    match value {
        Some(value) => format!("write {what} without unit and quotes: `{setting} = {value}`"),
        None => format!("write {what} without unit and quotes"),
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
