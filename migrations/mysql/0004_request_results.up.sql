-- The stored answer to a request id comes under a MAC of the token, so that a writer of the database cannot change what a retry is told.
ALTER TABLE requests ADD COLUMN result_mac VARBINARY(32) NOT NULL DEFAULT ''
    COMMENT 'HMAC by the same key over the request id, content_mac and the answer; empty in rows of releases before schema 4.';
