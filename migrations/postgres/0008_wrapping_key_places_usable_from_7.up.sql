-- The tokens that hold a wrapping key, in addition to the token whose serial number is in wrapping_keys. A broker with one token
-- needs no rows, and an earlier release does not read the rows.
CREATE TABLE wrapping_key_places (
    key_id              bytea            NOT NULL
        CONSTRAINT wrapping_key_places_key_id_length CHECK (octet_length(key_id) = 16),
    token               text COLLATE "C" NOT NULL
        CONSTRAINT wrapping_key_places_token_length CHECK (octet_length(token) <= 64),
    token_serial        text COLLATE "C" NOT NULL,
    private_cka_id      bytea            NOT NULL
        CONSTRAINT wrapping_key_places_private_cka_id_length CHECK (octet_length(private_cka_id) <= 255),
    integrity_cka_id    bytea            NOT NULL
        CONSTRAINT wrapping_key_places_integrity_cka_id_length CHECK (octet_length(integrity_cka_id) <= 255),
    registered_us       bigint           NOT NULL,
    backup_confirmed_us bigint,
    mac                 bytea            NOT NULL,
    CONSTRAINT wrapping_key_places_pk PRIMARY KEY (key_id, token)
);
COMMENT ON TABLE wrapping_key_places IS
    'The tokens that hold a wrapping key, in addition to the token whose serial number is in wrapping_keys.';
COMMENT ON COLUMN wrapping_key_places.key_id IS 'The wrapping key.';
COMMENT ON COLUMN wrapping_key_places.token IS 'Name of the token, as in token.name.';
COMMENT ON COLUMN wrapping_key_places.token_serial IS 'Serial number of the token.';
COMMENT ON COLUMN wrapping_key_places.private_cka_id IS 'CKA_ID of the RSA private key on this token; empty if it is key_id.';
COMMENT ON COLUMN wrapping_key_places.integrity_cka_id IS 'CKA_ID of the integrity key on this token; empty if it is key_id.';
COMMENT ON COLUMN wrapping_key_places.registered_us IS 'When the key was registered for this token.';
COMMENT ON COLUMN wrapping_key_places.backup_confirmed_us IS 'When a backup of this token was confirmed; NULL until then.';
COMMENT ON COLUMN wrapping_key_places.mac IS 'HMAC by the integrity key of the wrapping key over all of the above.';
