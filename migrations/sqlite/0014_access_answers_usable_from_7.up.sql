-- The revision that an answer opens, and the count of wrong words. An earlier release does not read the rows.
-- The revision of the user key that the answer opens; NULL unless the request was approved.
ALTER TABLE access_requests ADD COLUMN answer_revision INTEGER;
-- How many approvals had wrong words of the fingerprint phrase.
ALTER TABLE access_requests ADD COLUMN wrong_words INTEGER NOT NULL DEFAULT 0;
