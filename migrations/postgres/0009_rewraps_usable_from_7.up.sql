-- What the broker needs to move rows from one wrapping key to another: an index by which it finds the revisions under a wrapping key,
-- and the run of the re-wrap that was requested last.
CREATE INDEX revisions_wrapping_key ON revisions (wrapping_key_id, record_id, revision);

-- The run that was requested last. `store copy` leaves the row out.
CREATE TABLE rewraps (
    singleton  bigint           NOT NULL CONSTRAINT rewraps_singleton CHECK (singleton = 1),
    run_id     bytea            NOT NULL CONSTRAINT rewraps_run_id_length CHECK (octet_length(run_id) = 16),
    state      text COLLATE "C" NOT NULL CONSTRAINT rewraps_state_known CHECK (state IN ('running', 'paused', 'done')),
    rate       bigint           NOT NULL,
    source_key bytea            NOT NULL,
    document   bytea            NOT NULL CONSTRAINT rewraps_document_length CHECK (octet_length(document) <= 32768),
    holder     text COLLATE "C" NOT NULL,
    lease_us   bigint           NOT NULL,
    started_us bigint           NOT NULL,
    CONSTRAINT rewraps_pk PRIMARY KEY (singleton)
);
COMMENT ON TABLE rewraps IS 'The re-wrap that was requested last.';
COMMENT ON COLUMN rewraps.singleton IS 'Always 1: there is one row.';
COMMENT ON COLUMN rewraps.run_id IS '16 random bytes, new for each run.';
COMMENT ON COLUMN rewraps.state IS 'running, paused or done.';
COMMENT ON COLUMN rewraps.rate IS 'Highest number of rows per second; 0 for no limit.';
COMMENT ON COLUMN rewraps.source_key IS
    'Id of the wrapping key whose rows are moved; empty for all wrapping keys that no longer wrap.';
COMMENT ON COLUMN rewraps.document IS
    'JSON: who requested the run, its progress, and the rows that could not be moved.';
COMMENT ON COLUMN rewraps.holder IS
    'The instance that moves rows at present, as in audit.instance; empty before the first one begins.';
COMMENT ON COLUMN rewraps.lease_us IS 'Until when the holder works alone.';
COMMENT ON COLUMN rewraps.started_us IS 'When the run was requested.';
