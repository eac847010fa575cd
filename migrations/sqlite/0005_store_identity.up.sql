-- The identity of the database, so that a broker notices when another database is in its place. `store migrate` writes the
-- row, `store copy` carries it over.
CREATE TABLE store_identity (
    -- Always 1: there is one row.
    singleton  INTEGER NOT NULL CONSTRAINT store_identity_singleton CHECK (singleton = 1),
    -- 16 random bytes.
    store_id   BLOB    NOT NULL CONSTRAINT store_identity_store_id_length CHECK (length(store_id) = 16),
    -- When it was written.
    created_us INTEGER NOT NULL,
    CONSTRAINT store_identity_pk PRIMARY KEY (singleton)
) STRICT;
