-- Forgets the MACs of stored answers. A retry of a request id that was used before is not answered then.
ALTER TABLE requests DROP COLUMN result_mac;
