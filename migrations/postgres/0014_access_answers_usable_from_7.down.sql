-- Forgets the requests for access: devices have to ask again. No device and no user key is lost.
DELETE FROM access_requests;
ALTER TABLE access_requests
    DROP COLUMN answer_revision,
    DROP COLUMN wrong_words;
