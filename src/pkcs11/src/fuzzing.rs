//! Gives the fuzz targets of `tests/fuzz-targets` access to a parser of this crate. No program uses this module.

use super::select::Selector;

/// Reads `token.uri`. Returns the label, serial number, manufacturer and model in the URI.
pub fn token_uri(uri: &str) -> Option<[Option<String>; 4]> {
    let selector = Selector::from_uri(uri).ok()?;
    Some(selector.parts().map(|part| part.map(str::to_owned)))
}
