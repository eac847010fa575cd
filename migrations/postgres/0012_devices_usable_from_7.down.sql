-- Forgets the trusted devices: members have to establish trust again. No user key is lost.
DROP TABLE access_requests;
DROP TABLE devices;
