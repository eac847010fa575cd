-- The changes that a second person must approve. An earlier release does not read the rows, and makes these changes without an
-- approval.
CREATE TABLE IF NOT EXISTS approvals (
    approval_id      VARBINARY(16)   NOT NULL
        COMMENT 'The request. An API client that is created with the approval gets the same id.',
    signer_key_id    VARBINARY(16)   NOT NULL COMMENT 'The wrapping key whose integrity key made the MAC.',
    state            VARBINARY(16)   NOT NULL
        COMMENT 'pending, approved, rejected or used. An open request whose time has passed counts as expired.',
    action           VARBINARY(64)   NOT NULL COMMENT 'The name of the action, as in the audit log.',
    document         VARBINARY(8192) NOT NULL COMMENT 'The requested change with all its parameters, as JSON.',
    digest           VARBINARY(32)   NOT NULL
        COMMENT 'SHA-256 of action, document and requesting person: finds the request when the change is requested again.',
    requested_by     VARBINARY(2048) NOT NULL COMMENT 'The principal that requested the change.',
    requested_person VARBINARY(128)  NOT NULL COMMENT 'The person to whom this principal belongs.',
    requested_us     BIGINT          NOT NULL COMMENT 'When the change was requested.',
    expires_us       BIGINT          NOT NULL
        COMMENT 'When the request expires, unless it was rejected or used before.',
    decided_by       VARBINARY(2048) NOT NULL
        COMMENT 'The principal that approved or rejected the request; empty before.',
    decided_person   VARBINARY(128)  NOT NULL COMMENT 'The person to whom this principal belongs; empty before.',
    decided_us       BIGINT          NULL COMMENT 'When the request was approved or rejected.',
    used_us          BIGINT          NULL COMMENT 'When the change was made.',
    mac              VARBINARY(32)   NOT NULL
        COMMENT 'HMAC by the integrity key of signer_key_id over all of the above.',
    PRIMARY KEY (approval_id),
    CONSTRAINT approvals_digest UNIQUE (digest),
    CONSTRAINT approvals_approval_id_length CHECK (length(approval_id) = 16),
    CONSTRAINT approvals_signer_key_id_length CHECK (length(signer_key_id) = 16),
    CONSTRAINT approvals_digest_length CHECK (length(digest) = 32),
    INDEX approvals_expires (expires_us)
) ENGINE = InnoDB COMMENT = 'The changes that a second person must approve.';
