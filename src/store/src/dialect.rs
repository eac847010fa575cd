//! What differs between the SQL of the engines. Statements are written once, in [`crate::statements`], and a dialect turns each
//! into the text for its engine, when the program uses that engine for the first time.

use super::columns::{Column, Kind, Table};

/// The SQL of one engine, as far as it differs from that of the others.
#[derive(Debug)]
pub(super) struct Dialect {
    pub(super) placeholder: Placeholder,
    /// Begins and ends the name of a column that is a keyword somewhere.
    pub(super) quote: char,
    /// Begins a transaction that sees what was committed before each of its statements.
    pub(super) begin: &'static str,
    /// Ends a query that holds the rows it finds until the transaction ends. None where a transaction holds everything.
    pub(super) lock: Option<&'static str>,
    /// Ends an `INSERT` that inserts nothing when the row is there. Empty where there is no such form: the engine then reports
    /// the duplicate.
    pub(super) unless_taken: &'static str,
    pub(super) upsert: Upsert,
    pub(super) limited_delete: LimitedDelete,
    /// Reads the server's time as `now_us`, in microseconds since 1970. A file has none.
    pub(super) clock: Option<&'static str>,
    /// Finds a row if the table of migrations is there.
    pub(super) has_migrations: &'static str,
    /// Reads names and values of the settings that durability rests on, as text.
    pub(super) durability: &'static str,
    /// What that query calls the name and the value.
    pub(super) durability_columns: [&'static str; 2],
}

/// How a statement marks the place of a value.
#[derive(Clone, Copy, Debug)]
pub(super) enum Placeholder {
    /// `?`
    Question,
    /// `$1`, `$2`, …
    Dollar,
}

/// How a row is inserted, or its time is moved forward when it is there.
#[derive(Clone, Copy, Debug)]
pub(super) enum Upsert {
    /// `ON CONFLICT … DO UPDATE`, in which a row may come several times.
    Conflict,
    /// `ON CONFLICT … DO UPDATE`, which refuses a statement in which a row comes several times: equal rows become one before.
    ConflictOnce,
    /// `ON DUPLICATE KEY UPDATE`
    DuplicateKey,
}

/// How a bounded number of rows is deleted.
#[derive(Clone, Copy, Debug)]
pub(super) enum LimitedDelete {
    /// `DELETE … LIMIT`
    Limit,
    /// The keys of the rows are chosen by a subquery.
    Subquery,
}

impl Dialect {
    /// The text of a statement for this engine. In the statement `?` marks the place of a value, and `"` stands around the name of
    /// a column that is a keyword; neither may stand for itself. The text is kept until the process ends: there is one for each
    /// statement and engine.
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

    /// Inserts a row of all columns. A duplicate is an error.
    pub(super) fn insert(&self, table: Table) -> &'static str {
        self.text(&insert(table))
    }

    /// Inserts a row of all columns; of a duplicate see [`Self::unless_taken`].
    pub(super) fn insert_unless_taken(&self, table: Table) -> &'static str {
        self.text(&format!("{}{}", insert(table), self.unless_taken))
    }

    /// Inserts so many rows of a table whose only value is `used_us`, and where a row of the same key is there, keeps the later
    /// time. Equal rows may come several times.
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
                // The first row gives the columns their types.
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

    /// Deletes rows that meet a condition. The last value is how many at most.
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

/// Columns and the places of their new values, for an `UPDATE`.
pub(super) fn assignments(columns: &[Column]) -> String {
    let assigned: Vec<String> = columns
        .iter()
        .map(|column| format!("{} = ?", quoted(column)))
        .collect();
    assigned.join(", ")
}

/// The places of so many values.
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

/// `user` is a keyword of PostgreSQL.
fn quoted(column: &Column) -> String {
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
