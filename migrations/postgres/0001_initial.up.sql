-- Records, their revisions, what changed them, request ids, and the registry of wrapping keys.
--
-- Ids are 16 bytes. Times are UTC microseconds since 1970. Texts have the collation "C", so that they are compared and
-- ordered bytewise whatever the database's locale. The CHECKs refuse what no release of the broker writes.

CREATE TABLE records (
    record_id  bytea           NOT NULL CONSTRAINT records_record_id_length CHECK (octet_length(record_id) = 16),
    tenant     text COLLATE "C" NOT NULL,
    "user"     text COLLATE "C" NOT NULL,
    key_name   text COLLATE "C" NOT NULL,
    state      text COLLATE "C" NOT NULL CONSTRAINT records_state_known CHECK (state IN ('active', 'deleted')),
    revision   bigint          NOT NULL CONSTRAINT records_revision_positive CHECK (revision > 0),
    created_us bigint          NOT NULL,
    updated_us bigint          NOT NULL,
    deleted_us bigint,
    CONSTRAINT records_pk PRIMARY KEY (record_id),
    CONSTRAINT records_address_unique UNIQUE (tenant, "user", key_name)
);
COMMENT ON TABLE records IS 'One user key each. Its material is in the revisions, wrapped.';
COMMENT ON COLUMN records.record_id IS 'New at every create, so that a purged and re-created record is another one.';
COMMENT ON COLUMN records.tenant IS 'Owner of the record; comes from the caller''s credential.';
COMMENT ON COLUMN records."user" IS 'Whose key it is: 1 to 255 bytes.';
COMMENT ON COLUMN records.key_name IS 'Which of the user''s keys.';
COMMENT ON COLUMN records.state IS 'active or deleted. A deleted record keeps its name until it is purged.';
COMMENT ON COLUMN records.revision IS 'The current revision, from 1.';
COMMENT ON COLUMN records.created_us IS 'When it was created.';
COMMENT ON COLUMN records.updated_us IS 'When it last changed.';
COMMENT ON COLUMN records.deleted_us IS 'When it was deleted; NULL while active.';

CREATE TABLE revisions (
    record_id       bytea  NOT NULL,
    revision        bigint NOT NULL CONSTRAINT revisions_revision_positive CHECK (revision > 0),
    envelope        bytea  NOT NULL,
    wrapping_key_id bytea  NOT NULL,
    created_us      bigint NOT NULL,
    CONSTRAINT revisions_pk PRIMARY KEY (record_id, revision),
    CONSTRAINT revisions_record_fk FOREIGN KEY (record_id) REFERENCES records (record_id)
);
COMMENT ON TABLE revisions IS 'Every revision of every record, current and superseded. Rows are only ever added.';
COMMENT ON COLUMN revisions.record_id IS 'Whose revision it is.';
COMMENT ON COLUMN revisions.revision IS 'Which, from 1.';
COMMENT ON COLUMN revisions.envelope IS
    'Wrapped key and MAC. The MAC binds it to tenant, record, user, key name and revision.';
COMMENT ON COLUMN revisions.wrapping_key_id IS 'CKA_ID of the wrapping key that the envelope names, for scans by key.';
COMMENT ON COLUMN revisions.created_us IS 'When this revision became current.';

CREATE TABLE changes (
    call_id    bytea  NOT NULL CONSTRAINT changes_call_id_length CHECK (octet_length(call_id) = 16),
    record_id  bytea  NOT NULL,
    changed_us bigint NOT NULL,
    CONSTRAINT changes_pk PRIMARY KEY (call_id)
);
COMMENT ON TABLE changes IS
    'One row per committed mutation: tells after a crash which intents of the audit log were committed.';
COMMENT ON COLUMN changes.call_id IS 'Of the call that made the change; the same as in the audit log.';
COMMENT ON COLUMN changes.record_id IS 'What was changed.';
COMMENT ON COLUMN changes.changed_us IS 'When.';

CREATE TABLE requests (
    tenant          text COLLATE "C" NOT NULL,
    principal       text COLLATE "C" NOT NULL,
    request_id      bytea  NOT NULL CONSTRAINT requests_request_id_length CHECK (octet_length(request_id) = 16),
    content_mac     bytea  NOT NULL,
    key_id          bytea  NOT NULL,
    record_id       bytea  NOT NULL,
    "user"          text COLLATE "C" NOT NULL,
    key_name        text COLLATE "C" NOT NULL,
    state           text COLLATE "C" NOT NULL,
    revision        bigint NOT NULL,
    wrapping_key_id bytea  NOT NULL,
    created_us      bigint NOT NULL,
    updated_us      bigint NOT NULL,
    deleted_us      bigint,
    used_us         bigint NOT NULL,
    CONSTRAINT requests_pk PRIMARY KEY (tenant, principal, request_id)
);
CREATE INDEX requests_used ON requests (used_us);
COMMENT ON TABLE requests IS
    'Request ids of the last 24 hours, with the record as the mutation left it: a retried mutation gets the first answer.';
COMMENT ON COLUMN requests.tenant IS 'Of the principal. A request id is unique per tenant and principal.';
COMMENT ON COLUMN requests.principal IS 'Who sent the request.';
COMMENT ON COLUMN requests.request_id IS 'Chosen by the client.';
COMMENT ON COLUMN requests.content_mac IS 'On-token HMAC over action and content.';
COMMENT ON COLUMN requests.key_id IS 'The wrapping key whose binding key made it.';
COMMENT ON COLUMN requests.record_id IS 'The record that was changed.';
COMMENT ON COLUMN requests."user" IS 'Its user.';
COMMENT ON COLUMN requests.key_name IS 'Its key name.';
COMMENT ON COLUMN requests.state IS 'Its state after the mutation.';
COMMENT ON COLUMN requests.revision IS 'Its revision after the mutation.';
COMMENT ON COLUMN requests.wrapping_key_id IS 'The wrapping key of that revision.';
COMMENT ON COLUMN requests.created_us IS 'When the record was created.';
COMMENT ON COLUMN requests.updated_us IS 'When it had last changed.';
COMMENT ON COLUMN requests.deleted_us IS 'When it was deleted; NULL while active.';
COMMENT ON COLUMN requests.used_us IS 'When the request id was used.';

CREATE TABLE wrapping_keys (
    key_id              bytea  NOT NULL CONSTRAINT wrapping_keys_key_id_length CHECK (octet_length(key_id) = 16),
    fingerprint         bytea  NOT NULL,
    purpose             text COLLATE "C" NOT NULL,
    state               text COLLATE "C" NOT NULL,
    token_serial        text COLLATE "C" NOT NULL,
    sequence            bigint NOT NULL,
    registered_us       bigint NOT NULL,
    backup_confirmed_us bigint,
    mac                 bytea  NOT NULL,
    CONSTRAINT wrapping_keys_pk PRIMARY KEY (key_id)
);
COMMENT ON TABLE wrapping_keys IS
    'The registry of wrapping keys. No public key: that is always read from the token.';
COMMENT ON COLUMN wrapping_keys.key_id IS 'CKA_ID.';
COMMENT ON COLUMN wrapping_keys.fingerprint IS 'SHA-256 of the DER SubjectPublicKeyInfo.';
COMMENT ON COLUMN wrapping_keys.purpose IS 'plain or sealed.';
COMMENT ON COLUMN wrapping_keys.state IS 'SP 800-57 state.';
COMMENT ON COLUMN wrapping_keys.token_serial IS 'Serial number of the token that holds it.';
COMMENT ON COLUMN wrapping_keys.sequence IS 'Grows with each change of a state; the active key with the highest wraps.';
COMMENT ON COLUMN wrapping_keys.registered_us IS 'When it was registered.';
COMMENT ON COLUMN wrapping_keys.backup_confirmed_us IS 'When a backup of its token was confirmed; NULL until then.';
COMMENT ON COLUMN wrapping_keys.mac IS 'HMAC by the key''s own binding key over all of the above.';
