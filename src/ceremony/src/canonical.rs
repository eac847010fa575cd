//! Canonical JSON (RFC 8785) for documents without fractions.
//!
//! `serde_json` alone does not write canonical JSON, because it may keep the order in which keys were added. This module
//! sorts the keys itself, and refuses numbers whose canonical form needs the number format of ECMAScript.

use serde_json::{Map, Value};

/// Largest integer that every JSON reader represents exactly (RFC 8785, section 3.2.2.3; I-JSON, RFC 7493).
const INTEGER_MAX: u64 = (1 << 53) - 1;

/// Why a value has no canonical form here.
#[derive(Debug, thiserror::Error)]
pub enum CanonicalError {
    /// A number is not an integer from 0 to 2^53 - 1.
    #[error("the number {0} is not an integer from 0 to 2^53 - 1")]
    Number(String),
    /// The value cannot be represented in JSON.
    #[error("the value cannot be written as JSON: {0}")]
    Json(#[from] serde_json::Error),
}

/// Writes a value as canonical JSON, without a line end.
pub fn to_string(value: &Value) -> Result<String, CanonicalError> {
    let mut text = String::new();
    write(value, &mut text)?;
    Ok(text)
}

fn write(value: &Value, text: &mut String) -> Result<(), CanonicalError> {
    match value {
        Value::Null => text.push_str("null"),
        Value::Bool(true) => text.push_str("true"),
        Value::Bool(false) => text.push_str("false"),
        Value::Number(number) => match number.as_u64() {
            Some(integer) if integer <= INTEGER_MAX => text.push_str(&integer.to_string()),
            _ => return Err(CanonicalError::Number(number.to_string())),
        },
        // `serde_json` escapes exactly the characters that RFC 8785 section 3.2.2.2 names, in the same form.
        Value::String(string) => text.push_str(&serde_json::to_string(string)?),
        Value::Array(values) => {
            text.push('[');
            for (index, value) in values.iter().enumerate() {
                if index > 0 {
                    text.push(',');
                }
                write(value, text)?;
            }
            text.push(']');
        }
        Value::Object(object) => write_object(object, text)?,
    }
    Ok(())
}

fn write_object(object: &Map<String, Value>, text: &mut String) -> Result<(), CanonicalError> {
    let mut fields: Vec<(&String, &Value)> = object.iter().collect();
    // RFC 8785 section 3.2.3: keys are compared as UTF-16 code units.
    fields.sort_by(|(one, _), (other, _)| one.encode_utf16().cmp(other.encode_utf16()));
    text.push('{');
    for (index, (key, value)) in fields.into_iter().enumerate() {
        if index > 0 {
            text.push(',');
        }
        text.push_str(&serde_json::to_string(key)?);
        text.push(':');
        write(value, text)?;
    }
    text.push('}');
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    /// The strings and the order of keys of RFC 8785 sections 3.2.2 and 3.2.3.
    #[test]
    fn the_examples_of_the_standard_are_written_in_its_form() {
        let value = json!({
            "string": "\u{20ac}$\u{000F}\u{000a}A'\u{0042}\u{0022}\u{005c}\\\"\u{002f}",
            "literals": [null, true, false],
        });
        let expected = "{\"literals\":[null,true,false],\"string\":\"\u{20ac}$\\u000f\\nA'B\\\"\\\\\\\\\\\"/\"}";
        assert_eq!(to_string(&value).unwrap(), expected);
        let value = json!({
            "\u{20ac}": "Euro Sign",
            "\r": "Carriage Return",
            "\u{fb33}": "Hebrew Letter Dalet With Dagesh",
            "1": "One",
            "\u{1f600}": "Emoji: Grinning Face",
            "\u{0080}": "Control",
            "\u{00f6}": "Latin Small Letter O With Diaeresis",
        });
        let text = to_string(&value).unwrap();
        let order = [
            "Carriage Return",
            "One",
            "Control",
            "Latin Small",
            "Euro Sign",
            "Emoji",
            "Hebrew",
        ];
        let places: Vec<usize> = order.iter().map(|name| text.find(name).unwrap()).collect();
        assert!(places.is_sorted(), "{text}");
    }

    #[test]
    fn numbers_without_one_exact_form_are_refused() {
        for value in [
            json!(1.5),
            json!(-1),
            json!(1_u64 << 53),
            json!([{"a": 1e30}]),
        ] {
            let refused = to_string(&value).unwrap_err();
            assert!(matches!(refused, CanonicalError::Number(_)), "{refused}");
        }
        assert_eq!(
            to_string(&json!((1_u64 << 53) - 1)).unwrap(),
            "9007199254740991"
        );
    }

    proptest! {
        #[test]
        fn the_form_depends_on_the_content_alone(
            fields in proptest::collection::btree_map(".{0,8}", ".{0,8}", 0..8),
            seed in any::<usize>(),
        ) {
            let sorted: Vec<_> = fields.iter().collect();
            let mut turned = sorted.clone();
            if !turned.is_empty() {
                let by = seed % turned.len();
                turned.rotate_left(by);
            }
            let object = |fields: &[(&String, &String)]| {
                Value::Object(fields.iter().map(|(k, v)| ((*k).clone(), json!(v))).collect())
            };
            let text = to_string(&object(&sorted)).unwrap();
            prop_assert_eq!(&text, &to_string(&object(&turned)).unwrap());
            let parsed: Value = serde_json::from_str(&text).unwrap();
            prop_assert_eq!(&text, &to_string(&parsed).unwrap());
        }
    }
}
