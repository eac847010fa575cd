-- Back to an empty database: every record is lost. Back up first.
DROP TABLE wrapping_keys;
DROP TABLE requests;
DROP TABLE changes;
DROP TABLE revisions;
DROP TABLE records;
