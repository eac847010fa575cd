-- The tokens that hold a wrapping key, in addition to the token whose serial number is in wrapping_keys. A broker with one token
-- needs no rows, and an earlier release does not read the rows.
CREATE TABLE IF NOT EXISTS wrapping_key_places (
    key_id              VARBINARY(16)  NOT NULL COMMENT 'The wrapping key.',
    token               VARBINARY(64)  NOT NULL COMMENT 'Name of the token, as in token.name.',
    token_serial        VARBINARY(255) NOT NULL COMMENT 'Serial number of the token.',
    private_cka_id      VARBINARY(255) NOT NULL
        COMMENT 'CKA_ID of the RSA private key on this token; empty if it is key_id.',
    integrity_cka_id    VARBINARY(255) NOT NULL
        COMMENT 'CKA_ID of the integrity key on this token; empty if it is key_id.',
    registered_us       BIGINT         NOT NULL COMMENT 'When the key was registered for this token.',
    backup_confirmed_us BIGINT         NULL COMMENT 'When a backup of this token was confirmed; NULL until then.',
    mac                 VARBINARY(32)  NOT NULL
        COMMENT 'HMAC by the integrity key of the wrapping key over all of the above.',
    PRIMARY KEY (key_id, token),
    CONSTRAINT wrapping_key_places_key_id_length CHECK (length(key_id) = 16)
) ENGINE = InnoDB
  COMMENT = 'The tokens that hold a wrapping key, in addition to the token whose serial number is in wrapping_keys.';
