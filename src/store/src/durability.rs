//! Checks whether the database keeps acknowledged writes. Durability depends on settings that the
//! server's administrator can weaken, so the settings are read before the broker serves. After a
//! failover, the server may have other settings. Therefore the settings are read again on each new
//! connection.

use super::{Error, session::Columns};

/// The names of the checked settings, as in `accept_weaker_durability`.
pub(super) const NAMES: [&str; 7] = [
    "synchronous",
    "fsync",
    "full_page_writes",
    "synchronous_commit",
    "innodb_flush_log_at_trx_commit",
    "innodb_doublewrite",
    "sync_binlog",
];

/// A setting that is too weak to protect acknowledged writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Weakness {
    pub(super) name: &'static str,
    pub(super) value: String,
    /// The required value.
    pub(super) remedy: &'static str,
}

pub(super) fn is_known(name: &str) -> bool {
    NAMES.contains(&name)
}

/// The settings of one database, under the names that the database uses.
#[derive(Debug)]
pub(super) struct Found(pub(super) Vec<(String, String)>);

impl Found {
    /// Reads the answer to [`Dialect::durability`](super::dialect::Dialect::durability).
    pub(super) fn read(
        rows: &[impl Columns],
        [name, value]: [&str; 2],
    ) -> Result<Self, sqlx::Error> {
        let read = |row| {
            Ok((
                Columns::text(row, name)?.to_owned(),
                Columns::text(row, value)?.to_owned(),
            ))
        };
        rows.iter().map(read).collect::<Result<_, _>>().map(Self)
    }

    fn value(&self, name: &str) -> Option<String> {
        let found = self
            .0
            .iter()
            .find(|(found, _)| found.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.to_ascii_lowercase())
    }

    fn expect(
        &self,
        weaknesses: &mut Vec<Weakness>,
        name: &'static str,
        remedy: &'static str,
        enough: impl FnOnce(&str) -> bool,
    ) {
        // A setting that cannot be read is treated as too weak.
        let value = self
            .value(name)
            .unwrap_or_else(|| "not readable".to_owned());
        if !enough(&value) {
            weaknesses.push(Weakness {
                name,
                value,
                remedy,
            });
        }
    }

    pub(super) fn sqlite(&self) -> Vec<Weakness> {
        let mut weak = Vec::new();
        self.expect(&mut weak, "synchronous", "2 (FULL) or 3 (EXTRA)", |v| {
            ["2", "3"].contains(&v)
        });
        weak
    }

    pub(super) fn postgres(&self) -> Vec<Weakness> {
        let mut weak = Vec::new();
        self.expect(&mut weak, "fsync", "on", |v| v == "on");
        self.expect(&mut weak, "full_page_writes", "on", |v| v == "on");
        // Without a synchronous standby, a commit waits for the local disk even with `local` and
        // `remote_write`.
        let standbys = self.value("synchronous_standby_names").unwrap_or_default();
        self.expect(&mut weak, "synchronous_commit", "on or remote_apply", |v| {
            ["on", "remote_apply"].contains(&v)
                || standbys.is_empty() && ["local", "remote_write"].contains(&v)
        });
        weak
    }

    pub(super) fn mysql(&self) -> Vec<Weakness> {
        let mut weak = Vec::new();
        self.expect(&mut weak, "innodb_flush_log_at_trx_commit", "1", |v| {
            v == "1"
        });
        self.expect(&mut weak, "innodb_doublewrite", "ON", |v| {
            ["on", "1", "detect_and_recover"].contains(&v)
        });
        let has_binlog = self
            .value("log_bin")
            .is_none_or(|v| ["on", "1"].contains(&v.as_str()));
        if has_binlog {
            self.expect(&mut weak, "sync_binlog", "1", |v| v == "1");
        }
        weak
    }
}

/// Refuses weak settings that the configuration does not accept.
pub(super) fn require_accepted(weaknesses: &[Weakness], accepted: &[String]) -> Result<(), Error> {
    let is_accepted = |weak: &&Weakness| accepted.iter().any(|name| name == weak.name);
    let refused: Vec<_> = weaknesses
        .iter()
        .filter(|weak| !is_accepted(weak))
        .collect();
    if refused.is_empty() {
        return Ok(());
    }
    let list: Vec<String> = refused
        .iter()
        .map(|weak| {
            format!(
                "{} is {} and should be {}",
                weak.name, weak.value, weak.remedy
            )
        })
        .collect();
    let names: Vec<String> = refused
        .iter()
        .map(|weak| format!("{:?}", weak.name))
        .collect();
    Err(Error::Durability(format!(
        "the database may lose writes that it acknowledged: {}. Change these settings of the database, or, if losing keys is \
         acceptable, set `accept_weaker_durability = [{}]` in [store]",
        list.join("; "),
        names.join(", ")
    )))
}

/// Logs the weak settings that the configuration accepts.
pub(super) fn announce(weaknesses: &[Weakness]) {
    for weak in weaknesses {
        tracing::warn!(
            setting = weak.name,
            value = %weak.value,
            "the database may lose acknowledged writes in a power failure, and the configuration accepts this risk"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(pairs: &[(&str, &str)]) -> Found {
        Found(
            pairs
                .iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
                .collect(),
        )
    }

    fn names(weak: &[Weakness]) -> Vec<&str> {
        weak.iter().map(|weak| weak.name).collect()
    }

    #[test]
    fn strong_settings_pass_and_weak_ones_are_named() {
        let good = [
            ("fsync", "on"),
            ("full_page_writes", "on"),
            ("synchronous_commit", "on"),
        ];
        assert!(found(&good).postgres().is_empty());
        assert!(found(&[("synchronous", "2")]).sqlite().is_empty());
        assert_eq!(
            names(&found(&[("synchronous", "1")]).sqlite()),
            ["synchronous"]
        );
        let local = |standbys| {
            let mut pairs = good[..2].to_vec();
            pairs.extend([
                ("synchronous_commit", "local"),
                ("synchronous_standby_names", standbys),
            ]);
            found(&pairs).postgres()
        };
        assert!(local("").is_empty());
        assert_eq!(names(&local("b")), ["synchronous_commit"]);
        let innodb = [
            ("innodb_flush_log_at_trx_commit", "1"),
            ("innodb_doublewrite", "ON"),
        ];
        let with =
            |more: &[(&'static str, &'static str)]| found(&[&innodb[..], more].concat()).mysql();
        assert!(with(&[("log_bin", "OFF"), ("sync_binlog", "0")]).is_empty());
        assert_eq!(
            names(&with(&[("log_bin", "ON"), ("sync_binlog", "0")])),
            ["sync_binlog"]
        );
        assert!(with(&[("log_bin", "ON"), ("sync_binlog", "1")]).is_empty());
    }

    /// A setting that cannot be read counts as too weak.
    #[test]
    fn a_setting_that_is_missing_is_weak() {
        assert_eq!(names(&found(&[]).sqlite()), ["synchronous"]);
        assert_eq!(
            names(&found(&[]).postgres()),
            ["fsync", "full_page_writes", "synchronous_commit"]
        );
        assert_eq!(
            names(&found(&[]).mysql()),
            [
                "innodb_flush_log_at_trx_commit",
                "innodb_doublewrite",
                "sync_binlog"
            ]
        );
    }

    #[test]
    fn only_what_is_named_is_accepted() {
        let weak = found(&[
            ("fsync", "off"),
            ("full_page_writes", "on"),
            ("synchronous_commit", "off"),
        ])
        .postgres();
        let refused = require_accepted(&weak, &["fsync".to_owned()])
            .unwrap_err()
            .to_string();
        assert!(refused.contains("synchronous_commit is off"), "{refused}");
        assert!(!refused.contains("fsync is"), "{refused}");
        require_accepted(
            &weak,
            &["fsync".to_owned(), "synchronous_commit".to_owned()],
        )
        .unwrap();
        assert!(NAMES.iter().all(|name| is_known(name)) && !is_known("fsinc"));
    }
}
