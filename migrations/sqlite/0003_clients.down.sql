-- Forgets every API client, with its secrets: none of them gets in any more. Nothing else is lost.
DROP TABLE client_uses;
DROP TABLE clients;
