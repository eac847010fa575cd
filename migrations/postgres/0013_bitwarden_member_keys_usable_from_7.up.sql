-- The wrapped keys of the members of Bitwarden organisations, as they were first seen. An earlier release does not read the rows.
CREATE TABLE bitwarden_member_keys (
    organization_id bytea  NOT NULL
        CONSTRAINT bitwarden_member_keys_organization_id_length CHECK (octet_length(organization_id) = 16),
    digest          bytea  NOT NULL
        CONSTRAINT bitwarden_member_keys_digest_length CHECK (octet_length(digest) = 32),
    member_id       bytea  NOT NULL
        CONSTRAINT bitwarden_member_keys_member_id_length CHECK (octet_length(member_id) = 16),
    email_digest    bytea  NOT NULL
        CONSTRAINT bitwarden_member_keys_email_digest_length CHECK (octet_length(email_digest) = 32),
    pinned_us       bigint NOT NULL,
    mac             bytea  NOT NULL,
    CONSTRAINT bitwarden_member_keys_pk PRIMARY KEY (organization_id, digest)
);
CREATE INDEX bitwarden_member_keys_member ON bitwarden_member_keys (organization_id, member_id, pinned_us);
COMMENT ON TABLE bitwarden_member_keys IS 'The wrapped keys of the members of Bitwarden organisations, as they were first seen.';
COMMENT ON COLUMN bitwarden_member_keys.organization_id IS 'The organisation.';
COMMENT ON COLUMN bitwarden_member_keys.digest IS 'SHA-256 of the wrapped key.';
COMMENT ON COLUMN bitwarden_member_keys.member_id IS 'The member.';
COMMENT ON COLUMN bitwarden_member_keys.email_digest IS 'SHA-256 of the member''s e-mail address in lower case.';
COMMENT ON COLUMN bitwarden_member_keys.pinned_us IS
    'When the wrapped key was first seen, or last accepted by a person.';
COMMENT ON COLUMN bitwarden_member_keys.mac IS
    'HMAC by the integrity key of the organisation''s key over all of the above.';
