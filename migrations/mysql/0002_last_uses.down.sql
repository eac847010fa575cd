-- Forgets when records were last released, and nothing else.
DROP TABLE IF EXISTS last_uses;
