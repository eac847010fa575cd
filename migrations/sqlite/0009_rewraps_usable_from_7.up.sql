-- What the broker needs to move rows from one wrapping key to another: an index by which it finds the revisions under a wrapping key,
-- and the run of the re-wrap that was requested last.
CREATE INDEX revisions_wrapping_key ON revisions (wrapping_key_id);

-- The run that was requested last. `store copy` leaves the row out.
CREATE TABLE rewraps (
    -- Always 1: there is one row.
    singleton  INTEGER NOT NULL CONSTRAINT rewraps_singleton CHECK (singleton = 1),
    -- 16 random bytes, new for each run.
    run_id     BLOB    NOT NULL CONSTRAINT rewraps_run_id_length CHECK (length(run_id) = 16),
    -- 'running', 'paused' or 'done'.
    state      TEXT    NOT NULL CONSTRAINT rewraps_state_known CHECK (state IN ('running', 'paused', 'done')),
    -- Highest number of rows per second; 0 for no limit.
    rate       INTEGER NOT NULL,
    -- Id of the wrapping key whose rows are moved; empty for all wrapping keys that no longer wrap.
    source_key BLOB    NOT NULL,
    -- JSON: who requested the run, its progress, and the rows that could not be moved.
    document   BLOB    NOT NULL CONSTRAINT rewraps_document_length CHECK (length(document) <= 32768),
    -- The instance that moves rows at present, as in `audit.instance`; empty before the first one begins.
    holder     TEXT    NOT NULL,
    -- Until when the holder works alone.
    lease_us   INTEGER NOT NULL,
    -- When the run was requested.
    started_us INTEGER NOT NULL,
    CONSTRAINT rewraps_pk PRIMARY KEY (singleton)
) STRICT;
