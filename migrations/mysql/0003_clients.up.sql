-- API clients: services that show an id and a secret. What is known of one is a document, under a MAC of the token, so that
-- whoever can write here cannot make a client that releases keys, nor give one another secret or another role.
--
-- Each statement commits by itself, and can run again.

CREATE TABLE IF NOT EXISTS clients (
    client_id  VARBINARY(16)    NOT NULL COMMENT 'What it shows beside its secret.',
    revision   BIGINT           NOT NULL COMMENT 'Of the document, from 1; grows with each change.',
    document   VARBINARY(32768) NOT NULL
        COMMENT 'JSON: label, tenant, roles, reach, and its secrets as Argon2id hashes with their expiries.',
    mac        VARBINARY(32)    NOT NULL
        COMMENT 'HMAC by a binding key over id, revision and the document''s SHA-256.',
    key_id     VARBINARY(16)    NOT NULL COMMENT 'The wrapping key whose binding key made it.',
    created_us BIGINT           NOT NULL COMMENT 'When it was created.',
    updated_us BIGINT           NOT NULL COMMENT 'When it last changed.',
    PRIMARY KEY (client_id),
    CONSTRAINT clients_client_id_length CHECK (length(client_id) = 16),
    CONSTRAINT clients_revision_positive CHECK (revision > 0)
) ENGINE = InnoDB COMMENT = 'One API client each: a service that shows an id and a secret.';

-- Apart from the documents, so that a use rewrites nothing that a MAC covers. No foreign key: a note that comes late must not
-- fail.
CREATE TABLE IF NOT EXISTS client_uses (
    client_id     VARBINARY(16) NOT NULL COMMENT 'Whose secret.',
    secret_number BIGINT        NOT NULL COMMENT 'Which of its secrets, from 1, as in the document.',
    used_us       BIGINT        NOT NULL COMMENT 'When.',
    PRIMARY KEY (client_id, secret_number)
) ENGINE = InnoDB
  COMMENT = 'When each secret was last accepted. Written some seconds later, if at all: nothing is lost when these rows are.';
