-- The revision that an answer opens, and the count of wrong words. An earlier release does not read the rows.
ALTER TABLE access_requests
    ADD COLUMN answer_revision bigint,
    ADD COLUMN wrong_words bigint NOT NULL DEFAULT 0;
COMMENT ON COLUMN access_requests.answer_revision IS
    'The revision of the user key that the answer opens; NULL unless the request was approved.';
COMMENT ON COLUMN access_requests.wrong_words IS
    'How many approvals had wrong words of the fingerprint phrase.';
