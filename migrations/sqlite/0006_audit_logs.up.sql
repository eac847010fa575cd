-- The audit logs that were used with this database, so that a broker notices when its own was replaced while it was stopped. The
-- first start of an instance adds the row; `store copy` leaves the rows out.
CREATE TABLE audit_logs (
    -- Name of the instance, as in `audit.instance`.
    instance TEXT    NOT NULL,
    -- The id of its log: 32 hexadecimal digits.
    log_id   TEXT    NOT NULL CONSTRAINT audit_logs_log_id_length CHECK (length(log_id) = 32),
    -- When the row was written.
    bound_us INTEGER NOT NULL,
    CONSTRAINT audit_logs_pk PRIMARY KEY (instance, log_id)
) STRICT, WITHOUT ROWID;
