-- The wrapping keys whose destruction is scheduled. An earlier release does not read the rows and destroys no key; if it changes the
-- state of a key, the scheduled destruction of this key is no longer valid.
CREATE TABLE IF NOT EXISTS key_destructions (
    key_id        VARBINARY(16)   NOT NULL COMMENT 'The wrapping key.',
    signer_key_id VARBINARY(16)   NOT NULL COMMENT 'The wrapping key whose integrity key made the MAC.',
    sequence      BIGINT          NOT NULL
        COMMENT 'The number of the key''s registry row. A row with another number makes the destruction invalid.',
    requested_us  BIGINT          NOT NULL COMMENT 'When the destruction was requested.',
    due_us        BIGINT          NOT NULL COMMENT 'When the key is destroyed.',
    requested_by  VARBINARY(1024) NOT NULL COMMENT 'The principal that requested the destruction.',
    mac           VARBINARY(32)   NOT NULL
        COMMENT 'HMAC by the integrity key of signer_key_id over all of the above.',
    holder        VARBINARY(64)   NOT NULL
        COMMENT 'The instance that destroys the key at present, as in audit.instance; empty before the first one begins.',
    lease_us      BIGINT          NOT NULL COMMENT 'Until when the holder works alone.',
    PRIMARY KEY (key_id),
    CONSTRAINT key_destructions_key_id_length CHECK (length(key_id) = 16),
    CONSTRAINT key_destructions_signer_key_id_length CHECK (length(signer_key_id) = 16)
) ENGINE = InnoDB COMMENT = 'The wrapping keys whose destruction is scheduled.';
