-- Forgets the re-wrap that was requested last. Rows that it moved stay moved.
DROP TABLE IF EXISTS rewraps;
DROP INDEX revisions_wrapping_key ON revisions;
