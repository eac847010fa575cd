-- The stored answer to a request id comes under a MAC of the token, so that a writer of the database cannot change what a retry is told.
--
-- HMAC by the same key over the request id, content_mac and the answer; empty in rows of releases before schema 4.
ALTER TABLE requests ADD COLUMN result_mac BLOB NOT NULL DEFAULT x'';
