-- The wrapping keys whose destruction is scheduled. An earlier release does not read the rows and destroys no key; if it changes the
-- state of a key, the scheduled destruction of this key is no longer valid.
CREATE TABLE key_destructions (
    key_id        bytea            NOT NULL
        CONSTRAINT key_destructions_key_id_length CHECK (octet_length(key_id) = 16),
    signer_key_id bytea            NOT NULL
        CONSTRAINT key_destructions_signer_key_id_length CHECK (octet_length(signer_key_id) = 16),
    sequence      bigint           NOT NULL,
    requested_us  bigint           NOT NULL,
    due_us        bigint           NOT NULL,
    requested_by  text COLLATE "C" NOT NULL
        CONSTRAINT key_destructions_requested_by_length CHECK (octet_length(requested_by) <= 1024),
    mac           bytea            NOT NULL,
    holder        text COLLATE "C" NOT NULL,
    lease_us      bigint           NOT NULL,
    CONSTRAINT key_destructions_pk PRIMARY KEY (key_id)
);
COMMENT ON TABLE key_destructions IS 'The wrapping keys whose destruction is scheduled.';
COMMENT ON COLUMN key_destructions.key_id IS 'The wrapping key.';
COMMENT ON COLUMN key_destructions.signer_key_id IS 'The wrapping key whose integrity key made the MAC.';
COMMENT ON COLUMN key_destructions.sequence IS
    'The number of the key''s registry row. A row with another number makes the destruction invalid.';
COMMENT ON COLUMN key_destructions.requested_us IS 'When the destruction was requested.';
COMMENT ON COLUMN key_destructions.due_us IS 'When the key is destroyed.';
COMMENT ON COLUMN key_destructions.requested_by IS 'The principal that requested the destruction.';
COMMENT ON COLUMN key_destructions.mac IS 'HMAC by the integrity key of signer_key_id over all of the above.';
COMMENT ON COLUMN key_destructions.holder IS
    'The instance that destroys the key at present, as in audit.instance; empty before the first one begins.';
COMMENT ON COLUMN key_destructions.lease_us IS 'Until when the holder works alone.';
