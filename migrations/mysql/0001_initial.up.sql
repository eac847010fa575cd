-- Records, their revisions, what changed them, request ids, and the registry of wrapping keys.
--
-- Ids are 16 bytes. Times are UTC microseconds since 1970. Texts are kept as bytes (VARBINARY): the text types compare with
-- padding or by case, depending on the server. The CHECKs refuse what no release of the broker writes.
--
-- Every statement here can run again: MySQL commits each by itself, so a migration that was cut short is begun anew.

CREATE TABLE IF NOT EXISTS records (
    record_id  VARBINARY(16)  NOT NULL
        COMMENT 'New at every create, so that a purged and re-created record is another one.',
    tenant     VARBINARY(64)  NOT NULL COMMENT 'Owner of the record; comes from the caller''s credential.',
    user       VARBINARY(255) NOT NULL COMMENT 'Whose key it is: 1 to 255 bytes.',
    key_name   VARBINARY(64)  NOT NULL COMMENT 'Which of the user''s keys.',
    state      VARBINARY(16)  NOT NULL
        COMMENT 'active or deleted. A deleted record keeps its name until it is purged.',
    revision   BIGINT         NOT NULL COMMENT 'The current revision, from 1.',
    created_us BIGINT         NOT NULL COMMENT 'When it was created.',
    updated_us BIGINT         NOT NULL COMMENT 'When it last changed.',
    deleted_us BIGINT         NULL     COMMENT 'When it was deleted; NULL while active.',
    PRIMARY KEY (record_id),
    CONSTRAINT records_address_unique UNIQUE (tenant, user, key_name),
    CONSTRAINT records_record_id_length CHECK (length(record_id) = 16),
    CONSTRAINT records_state_known CHECK (state IN ('active', 'deleted')),
    CONSTRAINT records_revision_positive CHECK (revision > 0)
) ENGINE = InnoDB COMMENT = 'One user key each. Its material is in the revisions, wrapped.';

CREATE TABLE IF NOT EXISTS revisions (
    record_id       VARBINARY(16)   NOT NULL COMMENT 'Whose revision it is.',
    revision        BIGINT          NOT NULL COMMENT 'Which, from 1.',
    envelope        VARBINARY(4096) NOT NULL
        COMMENT 'Wrapped key and MAC. The MAC binds it to tenant, record, user, key name and revision.',
    wrapping_key_id VARBINARY(16)   NOT NULL
        COMMENT 'CKA_ID of the wrapping key that the envelope names, for scans by key.',
    created_us      BIGINT          NOT NULL COMMENT 'When this revision became current.',
    PRIMARY KEY (record_id, revision),
    CONSTRAINT revisions_record_fk FOREIGN KEY (record_id) REFERENCES records (record_id),
    CONSTRAINT revisions_revision_positive CHECK (revision > 0)
) ENGINE = InnoDB COMMENT = 'Every revision of every record, current and superseded. Rows are only ever added.';

CREATE TABLE IF NOT EXISTS changes (
    call_id    VARBINARY(16) NOT NULL COMMENT 'Of the call that made the change; the same as in the audit log.',
    record_id  VARBINARY(16) NOT NULL COMMENT 'What was changed.',
    changed_us BIGINT        NOT NULL COMMENT 'When.',
    PRIMARY KEY (call_id),
    CONSTRAINT changes_call_id_length CHECK (length(call_id) = 16)
) ENGINE = InnoDB
  COMMENT = 'One row per committed mutation: tells after a crash which intents of the audit log were committed.';

CREATE TABLE IF NOT EXISTS requests (
    tenant          VARBINARY(64)  NOT NULL
        COMMENT 'Of the principal. A request id is unique per tenant and principal.',
    principal       VARBINARY(2048) NOT NULL COMMENT 'Who sent the request.',
    request_id      VARBINARY(16)  NOT NULL COMMENT 'Chosen by the client.',
    content_mac     VARBINARY(32)  NOT NULL COMMENT 'On-token HMAC over action and content.',
    key_id          VARBINARY(16)  NOT NULL COMMENT 'The wrapping key whose binding key made it.',
    record_id       VARBINARY(16)  NOT NULL COMMENT 'The record that was changed.',
    user            VARBINARY(255) NOT NULL COMMENT 'Its user.',
    key_name        VARBINARY(64)  NOT NULL COMMENT 'Its key name.',
    state           VARBINARY(16)  NOT NULL COMMENT 'Its state after the mutation.',
    revision        BIGINT         NOT NULL COMMENT 'Its revision after the mutation.',
    wrapping_key_id VARBINARY(16)  NOT NULL COMMENT 'The wrapping key of that revision.',
    created_us      BIGINT         NOT NULL COMMENT 'When the record was created.',
    updated_us      BIGINT         NOT NULL COMMENT 'When it had last changed.',
    deleted_us      BIGINT         NULL     COMMENT 'When it was deleted; NULL while active.',
    used_us         BIGINT         NOT NULL COMMENT 'When the request id was used.',
    PRIMARY KEY (tenant, principal, request_id),
    KEY requests_used (used_us),
    CONSTRAINT requests_request_id_length CHECK (length(request_id) = 16)
) ENGINE = InnoDB
  COMMENT = 'Request ids of the last 24 hours, with the record as the mutation left it: a retry gets the first answer.';

CREATE TABLE IF NOT EXISTS wrapping_keys (
    key_id              VARBINARY(16)   NOT NULL COMMENT 'CKA_ID.',
    fingerprint         VARBINARY(32)   NOT NULL COMMENT 'SHA-256 of the DER SubjectPublicKeyInfo.',
    purpose             VARBINARY(32)   NOT NULL COMMENT 'plain or sealed.',
    state               VARBINARY(32)   NOT NULL COMMENT 'SP 800-57 state.',
    token_serial        VARBINARY(255)  NOT NULL COMMENT 'Serial number of the token that holds it.',
    sequence            BIGINT          NOT NULL
        COMMENT 'Grows with each change of a state; the active key with the highest wraps.',
    registered_us       BIGINT          NOT NULL COMMENT 'When it was registered.',
    backup_confirmed_us BIGINT          NULL
        COMMENT 'When a backup of its token was confirmed; NULL until then.',
    mac                 VARBINARY(32)   NOT NULL
        COMMENT 'HMAC by the key''s own binding key over all of the above.',
    PRIMARY KEY (key_id),
    CONSTRAINT wrapping_keys_key_id_length CHECK (length(key_id) = 16)
) ENGINE = InnoDB
  COMMENT = 'The registry of wrapping keys. No public key: that is always read from the token.';
