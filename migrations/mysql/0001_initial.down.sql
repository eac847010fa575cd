-- Back to an empty database: every record is lost. Back up first.
DROP TABLE IF EXISTS wrapping_keys;
DROP TABLE IF EXISTS requests;
DROP TABLE IF EXISTS changes;
DROP TABLE IF EXISTS revisions;
DROP TABLE IF EXISTS records;
