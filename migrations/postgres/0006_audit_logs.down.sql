-- Forgets which audit logs were used with the database. After a later migration the next start of each instance records its log.
DROP TABLE audit_logs;
