-- Forgets the re-wrap that was requested last. Rows that it moved stay moved.
DROP TABLE rewraps;
DROP INDEX revisions_wrapping_key;
