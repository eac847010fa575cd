-- API clients: services that show an id and a secret. What is known of one is a document, under a MAC of the token, so that
-- whoever can write here cannot make a client that releases keys, nor give one another secret or another role.

CREATE TABLE clients (
    client_id  bytea  NOT NULL CONSTRAINT clients_client_id_length CHECK (octet_length(client_id) = 16),
    revision   bigint NOT NULL CONSTRAINT clients_revision_positive CHECK (revision > 0),
    document   bytea  NOT NULL CONSTRAINT clients_document_length CHECK (octet_length(document) <= 32768),
    mac        bytea  NOT NULL,
    key_id     bytea  NOT NULL,
    created_us bigint NOT NULL,
    updated_us bigint NOT NULL,
    CONSTRAINT clients_pk PRIMARY KEY (client_id)
);
COMMENT ON TABLE clients IS 'One API client each: a service that shows an id and a secret.';
COMMENT ON COLUMN clients.client_id IS 'What it shows beside its secret.';
COMMENT ON COLUMN clients.revision IS 'Of the document, from 1; grows with each change.';
COMMENT ON COLUMN clients.document IS
    'JSON: label, tenant, roles, reach, and its secrets as Argon2id hashes with their expiries.';
COMMENT ON COLUMN clients.mac IS 'HMAC by a binding key over id, revision and the document''s SHA-256.';
COMMENT ON COLUMN clients.key_id IS 'The wrapping key whose binding key made it.';
COMMENT ON COLUMN clients.created_us IS 'When it was created.';
COMMENT ON COLUMN clients.updated_us IS 'When it last changed.';

-- Apart from the documents, so that a use rewrites nothing that a MAC covers. No foreign key: a note that comes late must not
-- fail.
CREATE TABLE client_uses (
    client_id     bytea  NOT NULL,
    secret_number bigint NOT NULL,
    used_us       bigint NOT NULL,
    CONSTRAINT client_uses_pk PRIMARY KEY (client_id, secret_number)
);
COMMENT ON TABLE client_uses IS
    'When each secret was last accepted. Written some seconds later, if at all: nothing is lost when these rows are.';
COMMENT ON COLUMN client_uses.client_id IS 'Whose secret.';
COMMENT ON COLUMN client_uses.secret_number IS 'Which of its secrets, from 1, as in the document.';
COMMENT ON COLUMN client_uses.used_us IS 'When.';
