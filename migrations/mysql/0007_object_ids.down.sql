-- Removes where the objects of wrapping keys are. The MACs of rows that had one of these ids no longer verify, so restore the backup that
-- was made before the migration if there are such rows.
ALTER TABLE wrapping_keys DROP COLUMN integrity_cka_id;
ALTER TABLE wrapping_keys DROP COLUMN private_cka_id;
