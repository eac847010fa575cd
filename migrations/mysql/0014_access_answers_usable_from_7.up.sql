-- The revision that an answer opens, and the count of wrong words. An earlier release does not read the rows.
--
-- A statement that changes a table is not undone with the transaction, so an interrupted migration may find the columns. ADD COLUMN IF
-- NOT EXISTS is not known to MySQL.
SET @statement = IF(
    (SELECT count(*) FROM information_schema.columns
     WHERE table_schema = DATABASE() AND table_name = 'access_requests' AND column_name = 'answer_revision') = 0,
    'ALTER TABLE access_requests
        ADD COLUMN answer_revision BIGINT
            COMMENT ''The revision of the user key that the answer opens; NULL unless the request was approved.'',
        ADD COLUMN wrong_words BIGINT NOT NULL DEFAULT 0
            COMMENT ''How many approvals had wrong words of the fingerprint phrase.''',
    'DO 0'
);
PREPARE access_answers FROM @statement;
EXECUTE access_answers;
DEALLOCATE PREPARE access_answers;
