//! The differences between the SQL of the engines. Statements are written once, in
//! [`crate::statements`]. When the program uses an engine for the first time, the engine's dialect
//! converts each statement to the SQL of the engine.

use super::columns::{Column, Kind, Table};

/// The SQL of one engine, where it differs from the SQL of other engines.
#[derive(Debug)]
pub(super) struct Dialect {
    pub(super) placeholder: Placeholder,
    /// The quote around the name of a column that is a keyword of an engine.
    pub(super) quote: char,
    /// Begins a transaction in which each statement sees everything that was committed before the statement began.
    pub(super) begin: &'static str,
    /// Ends a query that locks the found rows until the transaction ends. `None` if a transaction
    /// locks the entire database.
    pub(super) lock: Option<&'static str>,
    /// The clause at the end of an `INSERT` that inserts nothing if the row exists. Empty for an
    /// engine that has no clause of this kind and reports the duplicate row as an error.
    pub(super) unless_taken: &'static str,
    pub(super) upsert: Upsert,
    pub(super) limited_delete: LimitedDelete,
    /// Reads the server's time as `now_us`, in microseconds since 1970. `None` for a file.
    pub(super) clock: Option<&'static str>,
    /// Returns a row if the table of migrations exists.
    pub(super) has_migrations: &'static str,
    /// Reads names and values of the settings that affect durability, as text.
    pub(super) durability: &'static str,
    /// The two columns of the query `durability` that contain the name and the value of a setting.
    pub(super) durability_columns: [&'static str; 2],
}

/// The syntax with which a statement marks the position of a value.
#[derive(Clone, Copy, Debug)]
pub(super) enum Placeholder {
    /// `?`
    Question,
    /// `$1`, `$2`, …
    Dollar,
}

/// The syntax with which a statement inserts a row or increases the time of an existing row.
#[derive(Clone, Copy, Debug)]
pub(super) enum Upsert {
    /// `ON CONFLICT … DO UPDATE`; the statement may contain a row several times.
    Conflict,
    /// `ON CONFLICT … DO UPDATE`; the engine refuses a statement that contains a row several times,
    /// so rows with the same key are merged first.
    ConflictOnce,
    /// `ON DUPLICATE KEY UPDATE`
    DuplicateKey,
}

/// The syntax with which a statement deletes at most a given number of rows.
#[derive(Clone, Copy, Debug)]
pub(super) enum LimitedDelete {
    /// `DELETE … LIMIT`
    Limit,
    /// `DELETE … WHERE … IN (SELECT … LIMIT)`
    Subquery,
}

impl Dialect {
    /// The text of a statement for this engine. In the statement, `?` marks the position of a
    /// value, and `"` surrounds the name of a column that is a keyword. A statement cannot contain
    /// `?` or `"` with another meaning. The text for each statement and engine is kept until the
    /// process ends.
    pub(super) fn text(&self, statement: &str) -> &'static str {
        let mut text = String::with_capacity(statement.len() + 64);
        let mut values = 0;
        for c in statement.chars() {
            match (c, self.placeholder) {
                ('?', Placeholder::Dollar) => {
                    values += 1;
                    text.push('$');
                    text.push_str(&values.to_string());
                }
                ('"', _) => text.push(self.quote),
                (c, _) => text.push(c),
            }
        }
        text.leak()
    }

    /// Inserts a row with all columns. If a row with the same key exists, the statement fails.
    pub(super) fn insert(&self, table: Table) -> &'static str {
        self.text(&insert(table))
    }

    /// Inserts a row with all columns. If a row with the same key exists, [`Self::unless_taken`] determines the result.
    pub(super) fn insert_unless_taken(&self, table: Table) -> &'static str {
        self.text(&format!("{}{}", insert(table), self.unless_taken))
    }

    /// Inserts `rows` rows into a table whose only column besides the key is `used_us`. If a row
    /// with the same key exists, the later of the two times is stored. The values may contain the
    /// same row several times.
    pub(super) fn note_latest(&self, table: Table, rows: usize) -> &'static str {
        let (name, columns, key) = (table.name(), names(table.columns()), names(table.key()));
        let row = format!("({})", places(table.columns().len()));
        let rows = vec![row; rows].join(", ");
        let latest = format!(
            "ON CONFLICT ({key}) DO UPDATE SET used_us = excluded.used_us \
             WHERE excluded.used_us > {name}.used_us"
        );
        self.text(&match self.upsert {
            Upsert::Conflict => {
                format!("INSERT INTO {name} ({columns}) VALUES {rows} {latest}")
            }
            Upsert::ConflictOnce => {
                // The first row determines the types of the columns.
                let types: Vec<&str> = table.columns().iter().map(place_with_type).collect();
                let rows = rows.replacen(&places(types.len()), &types.join(", "), 1);
                format!(
                    "INSERT INTO {name} ({columns}) SELECT DISTINCT {columns} \
                     FROM (VALUES {rows}) AS noted ({columns}) ORDER BY {key} {latest}"
                )
            }
            Upsert::DuplicateKey => format!(
                "INSERT INTO {name} ({columns}) VALUES {rows} \
                 ON DUPLICATE KEY UPDATE used_us = GREATEST(used_us, VALUES(used_us))"
            ),
        })
    }

    /// Deletes rows that meet a condition. The last value of the statement is the highest number of rows to delete.
    pub(super) fn delete_some(&self, table: Table, condition: &str) -> &'static str {
        let (name, key) = (table.name(), names(table.key()));
        self.text(&match self.limited_delete {
            LimitedDelete::Limit => format!("DELETE FROM {name} WHERE {condition} LIMIT ?"),
            LimitedDelete::Subquery => format!(
                "DELETE FROM {name} WHERE ({key}) IN \
                 (SELECT {key} FROM {name} WHERE {condition} LIMIT ?)"
            ),
        })
    }
}

/// The names of columns, for a list in a statement.
pub(super) fn names(columns: &[Column]) -> String {
    let quoted: Vec<String> = columns.iter().map(quoted).collect();
    quoted.join(", ")
}

/// An assignment for each column, for an `UPDATE`.
pub(super) fn assignments(columns: &[Column]) -> String {
    let assigned: Vec<String> = columns
        .iter()
        .map(|column| format!("{} = ?", quoted(column)))
        .collect();
    assigned.join(", ")
}

/// Returns placeholders for `values` values.
pub(super) fn places(values: usize) -> String {
    vec!["?"; values].join(", ")
}

fn insert(table: Table) -> String {
    let (name, columns) = (table.name(), table.columns());
    format!(
        "INSERT INTO {name} ({}) VALUES ({})",
        names(columns),
        places(columns.len())
    )
}

/// Quotes a column name if necessary: `user` is a keyword of PostgreSQL.
pub(super) fn quoted(column: &Column) -> String {
    match column.name {
        "user" => "\"user\"".to_owned(),
        name => name.to_owned(),
    }
}

fn place_with_type(column: &Column) -> &'static str {
    match column.kind {
        Kind::Bytes => "?::bytea",
        Kind::Text => "?::text",
        Kind::Integer | Kind::OptionalInteger => "?::bigint",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dialect(placeholder: Placeholder, quote: char, upsert: Upsert) -> Dialect {
        Dialect {
            placeholder,
            quote,
            begin: "BEGIN",
            lock: None,
            unless_taken: "",
            upsert,
            limited_delete: LimitedDelete::Subquery,
            clock: None,
            has_migrations: "SELECT 1",
            durability: "SELECT 1",
            durability_columns: ["name", "value"],
        }
    }

    #[test]
    fn a_statement_gets_the_placeholders_and_quotes_of_its_engine() {
        let statement = r#"SELECT "user" FROM records WHERE "user" = ? AND key_name = ?"#;
        let mysql = dialect(Placeholder::Question, '`', Upsert::DuplicateKey);
        assert_eq!(
            mysql.text(statement),
            "SELECT `user` FROM records WHERE `user` = ? AND key_name = ?"
        );
        let postgres = dialect(Placeholder::Dollar, '"', Upsert::ConflictOnce);
        assert_eq!(
            postgres.text(statement),
            r#"SELECT "user" FROM records WHERE "user" = $1 AND key_name = $2"#
        );
    }

    #[test]
    fn the_later_time_is_kept_in_the_form_of_each_engine() {
        let texts = [Upsert::Conflict, Upsert::ConflictOnce, Upsert::DuplicateKey].map(|upsert| {
            dialect(Placeholder::Dollar, '"', upsert).note_latest(Table::LastUses, 2)
        });
        assert_eq!(
            texts,
            [
                "INSERT INTO last_uses (record_id, used_us) VALUES ($1, $2), ($3, $4) \
                 ON CONFLICT (record_id) DO UPDATE SET used_us = excluded.used_us \
                 WHERE excluded.used_us > last_uses.used_us",
                "INSERT INTO last_uses (record_id, used_us) SELECT DISTINCT record_id, used_us \
                 FROM (VALUES ($1::bytea, $2::bigint), ($3, $4)) AS noted (record_id, used_us) \
                 ORDER BY record_id ON CONFLICT (record_id) DO UPDATE SET used_us = excluded.used_us \
                 WHERE excluded.used_us > last_uses.used_us",
                "INSERT INTO last_uses (record_id, used_us) VALUES ($1, $2), ($3, $4) \
                 ON DUPLICATE KEY UPDATE used_us = GREATEST(used_us, VALUES(used_us))",
            ]
        );
    }

    #[test]
    fn a_bounded_delete_names_the_key_where_the_engine_has_no_limit() {
        let mut dialect = dialect(Placeholder::Question, '"', Upsert::Conflict);
        assert_eq!(
            dialect.delete_some(Table::Requests, "used_us < ?"),
            "DELETE FROM requests WHERE (tenant, principal, request_id) IN \
             (SELECT tenant, principal, request_id FROM requests WHERE used_us < ? LIMIT ?)"
        );
        dialect.limited_delete = LimitedDelete::Limit;
        assert_eq!(
            dialect.delete_some(Table::Requests, "used_us < ?"),
            "DELETE FROM requests WHERE used_us < ? LIMIT ?"
        );
    }
}
