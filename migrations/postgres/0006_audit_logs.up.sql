-- The audit logs that were used with this database, so that a broker notices when its own was replaced while it was stopped. The
-- first start of an instance adds the row; `store copy` leaves the rows out.
CREATE TABLE audit_logs (
    instance text COLLATE "C" NOT NULL,
    log_id   text COLLATE "C" NOT NULL CONSTRAINT audit_logs_log_id_length CHECK (octet_length(log_id) = 32),
    bound_us bigint           NOT NULL,
    CONSTRAINT audit_logs_pk PRIMARY KEY (instance, log_id)
);
COMMENT ON TABLE audit_logs IS 'The audit logs that were used with this database.';
COMMENT ON COLUMN audit_logs.instance IS 'Name of the instance, as in audit.instance.';
COMMENT ON COLUMN audit_logs.log_id IS 'The id of its log: 32 hexadecimal digits.';
COMMENT ON COLUMN audit_logs.bound_us IS 'When the row was written.';
