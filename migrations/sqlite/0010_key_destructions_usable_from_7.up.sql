-- The wrapping keys whose destruction is scheduled. An earlier release does not read the rows and destroys no key; if it changes the
-- state of a key, the scheduled destruction of this key is no longer valid.
CREATE TABLE key_destructions (
    -- The wrapping key.
    key_id        BLOB    NOT NULL CONSTRAINT key_destructions_key_id_length CHECK (length(key_id) = 16),
    -- The wrapping key whose integrity key made the MAC.
    signer_key_id BLOB    NOT NULL CONSTRAINT key_destructions_signer_key_id_length CHECK (length(signer_key_id) = 16),
    -- The number of the key's registry row. A row with another number makes the destruction invalid.
    sequence      INTEGER NOT NULL,
    -- When the destruction was requested.
    requested_us  INTEGER NOT NULL,
    -- When the key is destroyed.
    due_us        INTEGER NOT NULL,
    -- The principal that requested the destruction.
    requested_by  TEXT    NOT NULL CONSTRAINT key_destructions_requested_by_length CHECK (length(requested_by) <= 1024),
    -- HMAC by the integrity key of signer_key_id over all of the above.
    mac           BLOB    NOT NULL,
    -- The instance that destroys the key at present, as in audit.instance; empty before the first one begins.
    holder        TEXT    NOT NULL,
    -- Until when the holder works alone.
    lease_us      INTEGER NOT NULL,
    CONSTRAINT key_destructions_pk PRIMARY KEY (key_id)
) STRICT, WITHOUT ROWID;
