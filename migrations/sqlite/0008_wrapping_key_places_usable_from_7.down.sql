-- Forgets on which further tokens wrapping keys are. After a later migration, register these keys again with `keybroker key register`.
DROP TABLE wrapping_key_places;
