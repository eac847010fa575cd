-- Back to an empty database. Refused by the foreign key while records exist would be kinder, but SQLite drops regardless:
-- back up first.
DROP TABLE wrapping_keys;
DROP TABLE requests;
DROP TABLE changes;
DROP TABLE revisions;
DROP TABLE records;
