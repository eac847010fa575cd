-- The CKA_ID of the objects of a wrapping key, where it is not key_id: keys that were made with a vendor's tool, and integrity keys on
-- tokens that allow no second object with a CKA_ID. Both are covered by the MAC of the row unless both are empty.

-- Of the RSA private key; empty if it is key_id.
ALTER TABLE wrapping_keys ADD COLUMN private_cka_id BLOB NOT NULL DEFAULT x''
    CONSTRAINT wrapping_keys_private_cka_id_length CHECK (length(private_cka_id) <= 255);
-- Of the integrity key; empty if it is key_id.
ALTER TABLE wrapping_keys ADD COLUMN integrity_cka_id BLOB NOT NULL DEFAULT x''
    CONSTRAINT wrapping_keys_integrity_cka_id_length CHECK (length(integrity_cka_id) <= 255);
