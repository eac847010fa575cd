-- The stored answer to a request id comes under a MAC of the token, so that a writer of the database cannot change what a retry is told.
ALTER TABLE requests ADD COLUMN result_mac bytea NOT NULL DEFAULT '';

COMMENT ON COLUMN requests.result_mac IS
    'HMAC by the same key over the request id, content_mac and the answer; empty in rows of releases before schema 4.';
