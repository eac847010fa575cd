-- Forgets when records were last released, and nothing else.
DROP TABLE last_uses;
