-- Forgets where the objects of wrapping keys are. The MACs of rows with one of them no longer verify, so such a key cannot be used
-- until a release with schema 7 registers it again.
ALTER TABLE wrapping_keys DROP COLUMN integrity_cka_id;
ALTER TABLE wrapping_keys DROP COLUMN private_cka_id;
