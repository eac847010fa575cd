-- When each record was last released. Apart from the records, so that a release rewrites no row that anybody's key depends on.
--
-- Each statement commits by itself, and can run again.

-- No foreign key: a note that comes late must not fail.
CREATE TABLE IF NOT EXISTS last_uses (
    record_id VARBINARY(16) NOT NULL COMMENT 'The record that was released.',
    used_us   BIGINT        NOT NULL COMMENT 'When.',
    PRIMARY KEY (record_id)
) ENGINE = InnoDB
  COMMENT = 'When each record was last released. Written some seconds later, if at all: nothing is lost when these rows are.';

ALTER TABLE revisions
  COMMENT = 'Every revision of every record, current and superseded. No row is changed; superseded ones are purged after a time.';
