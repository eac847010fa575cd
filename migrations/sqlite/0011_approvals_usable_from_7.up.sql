-- The changes that a second person must approve. An earlier release does not read the rows, and makes these changes without an
-- approval.
CREATE TABLE approvals (
    -- The request. An API client that is created with the approval gets the same id.
    approval_id      BLOB    NOT NULL CONSTRAINT approvals_approval_id_length CHECK (length(approval_id) = 16),
    -- The wrapping key whose integrity key made the MAC.
    signer_key_id    BLOB    NOT NULL CONSTRAINT approvals_signer_key_id_length CHECK (length(signer_key_id) = 16),
    -- pending, approved, rejected or used. An open request whose time has passed counts as expired.
    state            TEXT    NOT NULL,
    -- The name of the action, as in the audit log.
    action           TEXT    NOT NULL,
    -- The requested change with all its parameters, as JSON.
    document         BLOB    NOT NULL,
    -- SHA-256 of action, document and requesting person: finds the request when the change is requested again.
    digest           BLOB    NOT NULL CONSTRAINT approvals_digest_length CHECK (length(digest) = 32),
    -- The principal that requested the change.
    requested_by     TEXT    NOT NULL CONSTRAINT approvals_requested_by_length CHECK (length(requested_by) <= 2048),
    -- The person to whom this principal belongs.
    requested_person TEXT    NOT NULL CONSTRAINT approvals_requested_person_length CHECK (length(requested_person) <= 128),
    -- When the change was requested.
    requested_us     INTEGER NOT NULL,
    -- When the request expires, unless it was rejected or used before.
    expires_us       INTEGER NOT NULL,
    -- The principal that approved or rejected the request; empty before.
    decided_by       TEXT    NOT NULL CONSTRAINT approvals_decided_by_length CHECK (length(decided_by) <= 2048),
    -- The person to whom this principal belongs; empty before.
    decided_person   TEXT    NOT NULL CONSTRAINT approvals_decided_person_length CHECK (length(decided_person) <= 128),
    -- When the request was approved or rejected.
    decided_us       INTEGER,
    -- When the change was made.
    used_us          INTEGER,
    -- HMAC by the integrity key of signer_key_id over all of the above.
    mac              BLOB    NOT NULL,
    CONSTRAINT approvals_pk PRIMARY KEY (approval_id),
    CONSTRAINT approvals_digest UNIQUE (digest)
) STRICT, WITHOUT ROWID;
CREATE INDEX approvals_expires ON approvals (expires_us);
