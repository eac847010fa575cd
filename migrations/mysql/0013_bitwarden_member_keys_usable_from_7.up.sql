-- The wrapped keys of the members of Bitwarden organisations, as they were first seen. An earlier release does not read the rows.
CREATE TABLE IF NOT EXISTS bitwarden_member_keys (
    organization_id VARBINARY(16) NOT NULL COMMENT 'The organisation.',
    digest          VARBINARY(32) NOT NULL COMMENT 'SHA-256 of the wrapped key.',
    member_id       VARBINARY(16) NOT NULL COMMENT 'The member.',
    email_digest    VARBINARY(32) NOT NULL COMMENT 'SHA-256 of the member''s e-mail address in lower case.',
    pinned_us       BIGINT        NOT NULL
        COMMENT 'When the wrapped key was first seen, or last accepted by a person.',
    mac             VARBINARY(32) NOT NULL
        COMMENT 'HMAC by the integrity key of the organisation''s key over all of the above.',
    PRIMARY KEY (organization_id, digest),
    CONSTRAINT bitwarden_member_keys_organization_id_length CHECK (length(organization_id) = 16),
    CONSTRAINT bitwarden_member_keys_digest_length CHECK (length(digest) = 32),
    CONSTRAINT bitwarden_member_keys_member_id_length CHECK (length(member_id) = 16),
    CONSTRAINT bitwarden_member_keys_email_digest_length CHECK (length(email_digest) = 32),
    INDEX bitwarden_member_keys_member (organization_id, member_id, pinned_us)
) ENGINE = InnoDB COMMENT = 'The wrapped keys of the members of Bitwarden organisations, as they were first seen.';
