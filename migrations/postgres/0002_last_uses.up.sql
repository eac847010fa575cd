-- When each record was last released. Apart from the records, so that a release rewrites no row that anybody's key depends on.

-- No foreign key: a note that comes late must not fail.
CREATE TABLE last_uses (
    record_id bytea  NOT NULL,
    used_us   bigint NOT NULL,
    CONSTRAINT last_uses_pk PRIMARY KEY (record_id)
);
COMMENT ON TABLE last_uses IS
    'When each record was last released. Written some seconds later, if at all: nothing is lost when these rows are.';
COMMENT ON COLUMN last_uses.record_id IS 'The record that was released.';
COMMENT ON COLUMN last_uses.used_us IS 'When.';

COMMENT ON TABLE revisions IS
    'Every revision of every record, current and superseded. No row is changed; superseded ones are purged after a time.';
