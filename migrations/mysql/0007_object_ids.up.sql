-- The CKA_ID of the objects of a wrapping key, where it is not key_id: keys that were made with a vendor's tool, and integrity keys on
-- tokens that allow no second object with a CKA_ID. Both are covered by the MAC of the row unless both are empty.
--
-- A statement that changes a table is not undone with the transaction, so an interrupted migration may find the columns. ADD COLUMN IF
-- NOT EXISTS is not known to MySQL.
SET @statement = IF(
    (SELECT count(*) FROM information_schema.columns
     WHERE table_schema = DATABASE() AND table_name = 'wrapping_keys' AND column_name = 'private_cka_id') = 0,
    'ALTER TABLE wrapping_keys
        ADD COLUMN private_cka_id VARBINARY(255) NOT NULL DEFAULT ''''
            COMMENT ''CKA_ID of the RSA private key; empty if it is key_id.'',
        ADD COLUMN integrity_cka_id VARBINARY(255) NOT NULL DEFAULT ''''
            COMMENT ''CKA_ID of the integrity key; empty if it is key_id.''',
    'DO 0'
);
PREPARE object_ids FROM @statement;
EXECUTE object_ids;
DEALLOCATE PREPARE object_ids;
