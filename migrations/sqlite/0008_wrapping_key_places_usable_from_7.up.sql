-- The tokens that hold a wrapping key, in addition to the token whose serial number is in wrapping_keys. A broker with one token
-- needs no rows, and an earlier release does not read the rows.
CREATE TABLE wrapping_key_places (
    -- The wrapping key.
    key_id              BLOB    NOT NULL CONSTRAINT wrapping_key_places_key_id_length CHECK (length(key_id) = 16),
    -- Name of the token, as in `token.name`.
    token               TEXT    NOT NULL CONSTRAINT wrapping_key_places_token_length CHECK (length(token) <= 64),
    -- Serial number of the token.
    token_serial        TEXT    NOT NULL,
    -- CKA_ID of the RSA private key on this token; empty if it is key_id.
    private_cka_id      BLOB    NOT NULL
        CONSTRAINT wrapping_key_places_private_cka_id_length CHECK (length(private_cka_id) <= 255),
    -- CKA_ID of the integrity key on this token; empty if it is key_id.
    integrity_cka_id    BLOB    NOT NULL
        CONSTRAINT wrapping_key_places_integrity_cka_id_length CHECK (length(integrity_cka_id) <= 255),
    -- When the key was registered for this token.
    registered_us       INTEGER NOT NULL,
    -- When a backup of this token was confirmed; NULL until then.
    backup_confirmed_us INTEGER,
    -- HMAC by the integrity key of the wrapping key over all of the above.
    mac                 BLOB    NOT NULL,
    CONSTRAINT wrapping_key_places_pk PRIMARY KEY (key_id, token)
) STRICT, WITHOUT ROWID;
