-- The identity of the database, so that a broker notices when another database is in its place. `store migrate` writes the
-- row, `store copy` carries it over.
CREATE TABLE store_identity (
    singleton  bigint NOT NULL CONSTRAINT store_identity_singleton CHECK (singleton = 1),
    store_id   bytea  NOT NULL CONSTRAINT store_identity_store_id_length CHECK (octet_length(store_id) = 16),
    created_us bigint NOT NULL,
    CONSTRAINT store_identity_pk PRIMARY KEY (singleton)
);
COMMENT ON TABLE store_identity IS 'The identity of the database: one row.';
COMMENT ON COLUMN store_identity.singleton IS 'Always 1.';
COMMENT ON COLUMN store_identity.store_id IS '16 random bytes.';
COMMENT ON COLUMN store_identity.created_us IS 'When it was written.';
