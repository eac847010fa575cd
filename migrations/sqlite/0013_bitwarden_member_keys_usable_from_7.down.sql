-- Forgets which wrapped key belongs to which member of a Bitwarden organisation. Each wrapped key is seen for the first time again.
DROP TABLE bitwarden_member_keys;
