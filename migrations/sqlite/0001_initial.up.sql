-- Records, their revisions, what changed them, request ids, and the registry of wrapping keys.
--
-- Ids are 16 bytes. Times are UTC microseconds since 1970. Texts are compared bytewise (BINARY, SQLite's default). STRICT
-- refuses a value of another type than the column's; the CHECKs refuse what no release of the broker writes.

-- One user key. Its material is in the revisions, wrapped.
CREATE TABLE records (
    -- New at every create, so that a purged and re-created record is another one.
    record_id  BLOB    NOT NULL CONSTRAINT records_record_id_length CHECK (length(record_id) = 16),
    -- Owner of the record; comes from the caller's credential.
    tenant     TEXT    NOT NULL,
    -- Whose key it is: 1 to 255 bytes.
    user       TEXT    NOT NULL,
    -- Which of the user's keys.
    key_name   TEXT    NOT NULL,
    -- 'active' or 'deleted'. A deleted record keeps its name until it is purged.
    state      TEXT    NOT NULL CONSTRAINT records_state_known CHECK (state IN ('active', 'deleted')),
    -- The current revision, from 1.
    revision   INTEGER NOT NULL CONSTRAINT records_revision_positive CHECK (revision > 0),
    -- When it was created, last changed, and deleted (NULL while active).
    created_us INTEGER NOT NULL,
    updated_us INTEGER NOT NULL,
    deleted_us INTEGER,
    CONSTRAINT records_pk PRIMARY KEY (record_id),
    CONSTRAINT records_address_unique UNIQUE (tenant, user, key_name)
) STRICT;

-- Every revision of every record, current and superseded. Rows are only ever added.
CREATE TABLE revisions (
    record_id       BLOB    NOT NULL,
    revision        INTEGER NOT NULL CONSTRAINT revisions_revision_positive CHECK (revision > 0),
    -- The envelope: wrapped key and MAC. The MAC binds it to tenant, record, user, key name and revision.
    envelope        BLOB    NOT NULL,
    -- CKA_ID of the wrapping key that the envelope names, for scans by key.
    wrapping_key_id BLOB    NOT NULL,
    -- When this revision became current.
    created_us      INTEGER NOT NULL,
    CONSTRAINT revisions_pk PRIMARY KEY (record_id, revision),
    CONSTRAINT revisions_record_fk FOREIGN KEY (record_id) REFERENCES records (record_id)
) STRICT, WITHOUT ROWID;

-- One row per committed mutation: tells after a crash which intents of the audit log were committed.
CREATE TABLE changes (
    -- Of the call that made the change; the same as in the audit log.
    call_id    BLOB    NOT NULL CONSTRAINT changes_call_id_length CHECK (length(call_id) = 16),
    -- What was changed.
    record_id  BLOB    NOT NULL,
    -- When.
    changed_us INTEGER NOT NULL,
    CONSTRAINT changes_pk PRIMARY KEY (call_id)
) STRICT, WITHOUT ROWID;

-- Request ids of the last 24 hours, so that a retried mutation gets the first answer.
CREATE TABLE requests (
    -- A request id is unique per tenant and principal.
    tenant          TEXT    NOT NULL,
    principal       TEXT    NOT NULL,
    request_id      BLOB    NOT NULL CONSTRAINT requests_request_id_length CHECK (length(request_id) = 16),
    -- On-token HMAC over action and content, and the binding key that made it.
    content_mac     BLOB    NOT NULL,
    key_id          BLOB    NOT NULL,
    -- The record as the mutation left it: what the first answer said, whatever happened since.
    record_id       BLOB    NOT NULL,
    user            TEXT    NOT NULL,
    key_name        TEXT    NOT NULL,
    state           TEXT    NOT NULL,
    revision        INTEGER NOT NULL,
    wrapping_key_id BLOB    NOT NULL,
    created_us      INTEGER NOT NULL,
    updated_us      INTEGER NOT NULL,
    deleted_us      INTEGER,
    -- When the request id was used.
    used_us         INTEGER NOT NULL,
    CONSTRAINT requests_pk PRIMARY KEY (tenant, principal, request_id)
) STRICT, WITHOUT ROWID;

CREATE INDEX requests_used ON requests (used_us);

-- The registry of wrapping keys. No public key: that is always read from the token.
CREATE TABLE wrapping_keys (
    -- CKA_ID.
    key_id              BLOB    NOT NULL CONSTRAINT wrapping_keys_key_id_length CHECK (length(key_id) = 16),
    -- SHA-256 of the DER SubjectPublicKeyInfo.
    fingerprint         BLOB    NOT NULL,
    -- 'plain' or 'sealed'.
    purpose             TEXT    NOT NULL,
    -- SP 800-57 state.
    state               TEXT    NOT NULL,
    -- Serial number of the token that holds it.
    token_serial        TEXT    NOT NULL,
    -- Grows with each change of a state; the active key with the highest wraps.
    sequence            INTEGER NOT NULL,
    registered_us       INTEGER NOT NULL,
    -- When a backup of its token was confirmed; NULL until then.
    backup_confirmed_us INTEGER,
    -- HMAC by the key's own binding key over all of the above.
    mac                 BLOB    NOT NULL,
    CONSTRAINT wrapping_keys_pk PRIMARY KEY (key_id)
) STRICT;
