-- API clients: services that show an id and a secret. What is known of one is a document, under a MAC of the token, so that
-- whoever can write here cannot make a client that releases keys, nor give one another secret or another role.

-- One API client each.
CREATE TABLE clients (
    -- What it shows beside its secret.
    client_id  BLOB    NOT NULL CONSTRAINT clients_client_id_length CHECK (length(client_id) = 16),
    -- Of the document, from 1; grows with each change.
    revision   INTEGER NOT NULL CONSTRAINT clients_revision_positive CHECK (revision > 0),
    -- JSON: label, tenant, roles, reach, and its secrets as Argon2id hashes with their expiries.
    document   BLOB    NOT NULL CONSTRAINT clients_document_length CHECK (length(document) <= 32768),
    -- HMAC by a binding key over id, revision and the document's SHA-256.
    mac        BLOB    NOT NULL,
    -- The wrapping key whose binding key made it.
    key_id     BLOB    NOT NULL,
    -- When it was created.
    created_us INTEGER NOT NULL,
    -- When it last changed.
    updated_us INTEGER NOT NULL,
    CONSTRAINT clients_pk PRIMARY KEY (client_id)
) STRICT;

-- When each secret was last accepted. Written some seconds later, if at all: nothing is lost when these rows are. Apart from
-- the documents, so that a use rewrites nothing that a MAC covers. No foreign key, because a note that comes late must not
-- fail.
CREATE TABLE client_uses (
    -- Whose secret.
    client_id     BLOB    NOT NULL,
    -- Which of its secrets, from 1, as in the document.
    secret_number INTEGER NOT NULL,
    -- When.
    used_us       INTEGER NOT NULL,
    CONSTRAINT client_uses_pk PRIMARY KEY (client_id, secret_number)
) STRICT, WITHOUT ROWID;
