-- The changes that a second person must approve. An earlier release does not read the rows, and makes these changes without an
-- approval.
CREATE TABLE approvals (
    approval_id      bytea            NOT NULL
        CONSTRAINT approvals_approval_id_length CHECK (octet_length(approval_id) = 16),
    signer_key_id    bytea            NOT NULL
        CONSTRAINT approvals_signer_key_id_length CHECK (octet_length(signer_key_id) = 16),
    state            text COLLATE "C" NOT NULL,
    action           text COLLATE "C" NOT NULL,
    document         bytea            NOT NULL,
    digest           bytea            NOT NULL
        CONSTRAINT approvals_digest_length CHECK (octet_length(digest) = 32),
    requested_by     text COLLATE "C" NOT NULL
        CONSTRAINT approvals_requested_by_length CHECK (octet_length(requested_by) <= 2048),
    requested_person text COLLATE "C" NOT NULL
        CONSTRAINT approvals_requested_person_length CHECK (octet_length(requested_person) <= 128),
    requested_us     bigint           NOT NULL,
    expires_us       bigint           NOT NULL,
    decided_by       text COLLATE "C" NOT NULL
        CONSTRAINT approvals_decided_by_length CHECK (octet_length(decided_by) <= 2048),
    decided_person   text COLLATE "C" NOT NULL
        CONSTRAINT approvals_decided_person_length CHECK (octet_length(decided_person) <= 128),
    decided_us       bigint,
    used_us          bigint,
    mac              bytea            NOT NULL,
    CONSTRAINT approvals_pk PRIMARY KEY (approval_id),
    CONSTRAINT approvals_digest UNIQUE (digest)
);
CREATE INDEX approvals_expires ON approvals (expires_us);
COMMENT ON TABLE approvals IS 'The changes that a second person must approve.';
COMMENT ON COLUMN approvals.approval_id IS
    'The request. An API client that is created with the approval gets the same id.';
COMMENT ON COLUMN approvals.signer_key_id IS 'The wrapping key whose integrity key made the MAC.';
COMMENT ON COLUMN approvals.state IS
    'pending, approved, rejected or used. An open request whose time has passed counts as expired.';
COMMENT ON COLUMN approvals.action IS 'The name of the action, as in the audit log.';
COMMENT ON COLUMN approvals.document IS 'The requested change with all its parameters, as JSON.';
COMMENT ON COLUMN approvals.digest IS
    'SHA-256 of action, document and requesting person: finds the request when the change is requested again.';
COMMENT ON COLUMN approvals.requested_by IS 'The principal that requested the change.';
COMMENT ON COLUMN approvals.requested_person IS 'The person to whom this principal belongs.';
COMMENT ON COLUMN approvals.requested_us IS 'When the change was requested.';
COMMENT ON COLUMN approvals.expires_us IS 'When the request expires, unless it was rejected or used before.';
COMMENT ON COLUMN approvals.decided_by IS 'The principal that approved or rejected the request; empty before.';
COMMENT ON COLUMN approvals.decided_person IS 'The person to whom this principal belongs; empty before.';
COMMENT ON COLUMN approvals.decided_us IS 'When the request was approved or rejected.';
COMMENT ON COLUMN approvals.used_us IS 'When the change was made.';
COMMENT ON COLUMN approvals.mac IS 'HMAC by the integrity key of signer_key_id over all of the above.';
