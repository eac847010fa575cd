-- The CKA_ID of the objects of a wrapping key, where it is not key_id: keys that were made with a vendor's tool, and integrity keys on
-- tokens that allow no second object with a CKA_ID. Both are covered by the MAC of the row unless both are empty.
ALTER TABLE wrapping_keys
    ADD COLUMN private_cka_id bytea NOT NULL DEFAULT ''
        CONSTRAINT wrapping_keys_private_cka_id_length CHECK (octet_length(private_cka_id) <= 255),
    ADD COLUMN integrity_cka_id bytea NOT NULL DEFAULT ''
        CONSTRAINT wrapping_keys_integrity_cka_id_length CHECK (octet_length(integrity_cka_id) <= 255);

COMMENT ON COLUMN wrapping_keys.private_cka_id IS 'CKA_ID of the RSA private key; empty if it is key_id.';
COMMENT ON COLUMN wrapping_keys.integrity_cka_id IS 'CKA_ID of the integrity key; empty if it is key_id.';
