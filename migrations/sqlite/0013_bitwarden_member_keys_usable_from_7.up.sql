-- The wrapped keys of the members of Bitwarden organisations, as they were first seen. An earlier release does not read the rows.
CREATE TABLE bitwarden_member_keys (
    -- The organisation.
    organization_id BLOB    NOT NULL CONSTRAINT bitwarden_member_keys_organization_id_length CHECK (length(organization_id) = 16),
    -- SHA-256 of the wrapped key.
    digest          BLOB    NOT NULL CONSTRAINT bitwarden_member_keys_digest_length CHECK (length(digest) = 32),
    -- The member.
    member_id       BLOB    NOT NULL CONSTRAINT bitwarden_member_keys_member_id_length CHECK (length(member_id) = 16),
    -- SHA-256 of the member's e-mail address in lower case.
    email_digest    BLOB    NOT NULL CONSTRAINT bitwarden_member_keys_email_digest_length CHECK (length(email_digest) = 32),
    -- When the wrapped key was first seen, or last accepted by a person.
    pinned_us       INTEGER NOT NULL,
    -- HMAC by the integrity key of the organisation's key over all of the above.
    mac             BLOB    NOT NULL,
    CONSTRAINT bitwarden_member_keys_pk PRIMARY KEY (organization_id, digest)
) STRICT, WITHOUT ROWID;
CREATE INDEX bitwarden_member_keys_member ON bitwarden_member_keys (organization_id, member_id, pinned_us);
