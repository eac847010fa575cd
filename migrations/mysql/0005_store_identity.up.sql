-- The identity of the database, so that a broker notices when another database is in its place. `store migrate` writes the
-- row, `store copy` carries it over.
CREATE TABLE IF NOT EXISTS store_identity (
    singleton  BIGINT        NOT NULL COMMENT 'Always 1.',
    store_id   VARBINARY(16) NOT NULL COMMENT '16 random bytes.',
    created_us BIGINT        NOT NULL COMMENT 'When it was written.',
    PRIMARY KEY (singleton),
    CONSTRAINT store_identity_singleton CHECK (singleton = 1),
    CONSTRAINT store_identity_store_id_length CHECK (length(store_id) = 16)
) ENGINE = InnoDB COMMENT = 'The identity of the database: one row.';
