-- When each record was last released. Apart from the records, so that a release rewrites no row that anybody's key depends on.

-- Written some seconds after a release, if at all: nothing is lost when these rows are. No foreign key, because a note that
-- comes late must not fail.
CREATE TABLE last_uses (
    -- The record that was released.
    record_id BLOB    NOT NULL,
    -- When.
    used_us   INTEGER NOT NULL,
    CONSTRAINT last_uses_pk PRIMARY KEY (record_id)
) STRICT, WITHOUT ROWID;
