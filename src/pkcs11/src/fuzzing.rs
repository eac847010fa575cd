//! A reader of this crate for the fuzz targets of `tests/fuzz-targets`. No program uses it.

use super::select::Selector;

/// Reads `token.uri`. Returns label, serial number, manufacturer and model.
pub fn token_uri(uri: &str) -> Option<[Option<String>; 4]> {
    let selector = Selector::from_uri(uri).ok()?;
    Some(selector.parts().map(|part| part.map(str::to_owned)))
}
