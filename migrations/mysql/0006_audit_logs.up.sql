-- The audit logs that were used with this database, so that a broker notices when its own was replaced while it was stopped. The
-- first start of an instance adds the row; `store copy` leaves the rows out.
CREATE TABLE IF NOT EXISTS audit_logs (
    instance VARBINARY(64) NOT NULL COMMENT 'Name of the instance, as in audit.instance.',
    log_id   VARBINARY(32) NOT NULL COMMENT 'The id of its log: 32 hexadecimal digits.',
    bound_us BIGINT        NOT NULL COMMENT 'When the row was written.',
    PRIMARY KEY (instance, log_id),
    CONSTRAINT audit_logs_log_id_length CHECK (length(log_id) = 32)
) ENGINE = InnoDB COMMENT = 'The audit logs that were used with this database.';
