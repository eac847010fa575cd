-- Forgets the identity of the database. A later migration writes a new one, which brokers refuse until it is accepted.
DROP TABLE store_identity;
