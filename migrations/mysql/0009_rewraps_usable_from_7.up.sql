-- What the broker needs to move rows from one wrapping key to another: an index by which it finds the revisions under a wrapping key,
-- and the run of the re-wrap that was requested last.
--
-- A statement that changes a table is not undone with the transaction, so an interrupted migration may find the index. CREATE INDEX IF
-- NOT EXISTS is not known to MySQL.
SET @statement = IF(
    (SELECT count(*) FROM information_schema.statistics
     WHERE table_schema = DATABASE() AND table_name = 'revisions' AND index_name = 'revisions_wrapping_key') = 0,
    'CREATE INDEX revisions_wrapping_key ON revisions (wrapping_key_id, record_id, revision)',
    'DO 0'
);
PREPARE rewraps FROM @statement;
EXECUTE rewraps;
DEALLOCATE PREPARE rewraps;

-- The run that was requested last. `store copy` leaves the row out.
CREATE TABLE IF NOT EXISTS rewraps (
    singleton  BIGINT           NOT NULL COMMENT 'Always 1: there is one row.',
    run_id     VARBINARY(16)    NOT NULL COMMENT '16 random bytes, new for each run.',
    state      VARBINARY(16)    NOT NULL COMMENT 'running, paused or done.',
    rate       BIGINT           NOT NULL COMMENT 'Highest number of rows per second; 0 for no limit.',
    source_key VARBINARY(16)    NOT NULL
        COMMENT 'Id of the wrapping key whose rows are moved; empty for all wrapping keys that no longer wrap.',
    document   VARBINARY(32768) NOT NULL
        COMMENT 'JSON: who requested the run, its progress, and the rows that could not be moved.',
    holder     VARBINARY(64)    NOT NULL
        COMMENT 'The instance that moves rows at present, as in audit.instance; empty before the first one begins.',
    lease_us   BIGINT           NOT NULL COMMENT 'Until when the holder works alone.',
    started_us BIGINT           NOT NULL COMMENT 'When the run was requested.',
    PRIMARY KEY (singleton),
    CONSTRAINT rewraps_singleton CHECK (singleton = 1),
    CONSTRAINT rewraps_run_id_length CHECK (length(run_id) = 16),
    CONSTRAINT rewraps_state_known CHECK (state IN ('running', 'paused', 'done'))
) ENGINE = InnoDB COMMENT = 'The re-wrap that was requested last.';
