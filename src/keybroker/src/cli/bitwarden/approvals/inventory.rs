//! The inventory: the devices of the fleet, one on each line.

use std::{collections::HashMap, path::Path};

use crate::config::bitwarden::INVENTORY;
use keybroker_core::trusted_file;

const BYTES_MAX: u64 = 16 * 1024 * 1024;

/// The devices of the fleet. A line has the identifier of a device and, optionally, after white space, the e-mail address of the
/// member to whom it belongs. Empty lines and lines that begin with `#` are ignored.
#[derive(Debug, Default)]
pub(super) struct Inventory(HashMap<String, Vec<Owner>>);

#[derive(Debug, PartialEq, Eq)]
enum Owner {
    Anyone,
    Member(String),
}

/// The reason why an inventory cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum InventoryError {
    #[error(transparent)]
    File(#[from] trusted_file::Error),
    #[error("{file} is not UTF-8")]
    Encoding { file: String },
    #[error(
        "{file}, line {line}: a line has the identifier of a device and at most one e-mail address"
    )]
    Line { file: String, line: usize },
}

impl Inventory {
    pub(super) fn load(path: &Path) -> Result<Self, InventoryError> {
        let bytes = trusted_file::read(path, BYTES_MAX, INVENTORY)?;
        let file = || path.display().to_string();
        let text =
            std::str::from_utf8(&bytes).map_err(|_| InventoryError::Encoding { file: file() })?;
        Self::parse(text).map_err(|line| InventoryError::Line { file: file(), line })
    }

    /// Parses the text of an inventory. The error is the number of the first bad line.
    fn parse(text: &str) -> Result<Self, usize> {
        let mut devices: HashMap<String, Vec<Owner>> = HashMap::new();
        for (number, line) in text.lines().enumerate() {
            let mut words = line.split_whitespace();
            let Some(device) = words.next().filter(|word| !word.starts_with('#')) else {
                continue;
            };
            let owner = match (words.next(), words.next()) {
                (None, _) => Owner::Anyone,
                (Some(email), None) => Owner::Member(email.to_lowercase()),
                (Some(_), Some(_)) => return Err(number + 1),
            };
            devices
                .entry(device.to_lowercase())
                .or_default()
                .push(owner);
        }
        Ok(Self(devices))
    }

    /// Whether a line lists the device for this member or for any member.
    pub(super) fn has(&self, device: &str, email: &str) -> bool {
        let email = email.to_lowercase();
        let owners = self.0.get(&device.to_lowercase());
        owners.is_some_and(|owners| {
            owners.iter().any(|owner| match owner {
                Owner::Anyone => true,
                Owner::Member(known) => *known == email,
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_may_belong_to_one_member() {
        let text = "# fleet\n\nF1 Ada@example.org\nf1\tbob@example.org\r\n  f2  \n";
        let inventory = Inventory::parse(text).unwrap();
        for (device, email, is_known) in [
            ("f1", "ada@example.org", true),
            ("F1", "BOB@example.org", true),
            ("f1", "eve@example.org", false),
            ("f2", "eve@example.org", true),
            ("f3", "ada@example.org", false),
            ("#", "fleet", false),
        ] {
            assert_eq!(inventory.has(device, email), is_known, "{device} {email}");
        }
        assert_eq!(Inventory::parse("f1\nf2 a b\n").unwrap_err(), 2);
        assert!(!Inventory::default().has("f1", "ada@example.org"));
    }
}
