-- Trusted devices of members, and requests for access of new devices. An earlier release does not read the rows: upgrade all brokers
-- before a wrapping key is destroyed, because an earlier release does not count the devices that need it.
CREATE TABLE devices (
    tenant text COLLATE "C" NOT NULL,
    "user" text COLLATE "C" NOT NULL,
    device_id bytea NOT NULL
        CONSTRAINT devices_device_id_length CHECK (octet_length(device_id) = 16),
    signer_key_id bytea NOT NULL
        CONSTRAINT devices_signer_key_id_length CHECK (octet_length(signer_key_id) = 16),
    state text COLLATE "C" NOT NULL,
    name text COLLATE "C" NOT NULL,
    kind text COLLATE "C" NOT NULL,
    verification_key bytea NOT NULL,
    key_name text COLLATE "C" NOT NULL,
    revision bigint NOT NULL,
    sealed_user_key bytea NOT NULL
        CONSTRAINT devices_sealed_user_key_length CHECK (octet_length(sealed_user_key) <= 1024),
    sealed_public_key bytea NOT NULL
        CONSTRAINT devices_sealed_public_key_length CHECK (octet_length(sealed_public_key) <= 2048),
    sealed_private_key bytea NOT NULL
        CONSTRAINT devices_sealed_private_key_length CHECK (octet_length(sealed_private_key) <= 8192),
    trusted_us bigint NOT NULL,
    changed_us bigint NOT NULL,
    signed_us bigint NOT NULL,
    lost_us bigint,
    used_us bigint,
    mac bytea NOT NULL,
    CONSTRAINT devices_pk PRIMARY KEY (tenant, "user", device_id)
);
CREATE INDEX devices_signer ON devices (signer_key_id);
COMMENT ON TABLE devices IS 'Devices of members. The encrypted keys belong to the app on the device: the broker cannot open them.';
COMMENT ON COLUMN devices.tenant IS
    'The tenant of the member.';
COMMENT ON COLUMN devices."user" IS
    'The member.';
COMMENT ON COLUMN devices.device_id IS
    'The device, which chose the id. Different members may have devices with the same id.';
COMMENT ON COLUMN devices.signer_key_id IS
    'The wrapping key whose integrity key made the MAC.';
COMMENT ON COLUMN devices.state IS
    'trusted, untrusted or lost.';
COMMENT ON COLUMN devices.name IS
    'The name that the member gave the device.';
COMMENT ON COLUMN devices.kind IS
    'The type of the device, as its app states it.';
COMMENT ON COLUMN devices.verification_key IS
    'The public key of the signatures of the device: Ed25519 or P-256.';
COMMENT ON COLUMN devices.key_name IS
    'The name of the user key that the device opens.';
COMMENT ON COLUMN devices.revision IS
    'The revision of the user key that the device opens.';
COMMENT ON COLUMN devices.sealed_user_key IS
    'The user key, encrypted to the public key of the device; empty unless the device is trusted.';
COMMENT ON COLUMN devices.sealed_public_key IS
    'The public key of the device, encrypted with the user key; empty unless the device is trusted.';
COMMENT ON COLUMN devices.sealed_private_key IS
    'The private key of the device, encrypted with its device key; empty unless the device is trusted.';
COMMENT ON COLUMN devices.trusted_us IS
    'When the trust was established.';
COMMENT ON COLUMN devices.changed_us IS
    'When the row was last changed, except the time of its last use.';
COMMENT ON COLUMN devices.signed_us IS
    'The time of the last signature of the device that was accepted.';
COMMENT ON COLUMN devices.lost_us IS
    'When the device was reported as lost.';
COMMENT ON COLUMN devices.used_us IS
    'When the device last fetched its keys. Not covered by the MAC.';
COMMENT ON COLUMN devices.mac IS
    'HMAC by the integrity key of signer_key_id over all of the above, except signer_key_id and used_us.';
CREATE TABLE access_requests (
    request_id bytea NOT NULL
        CONSTRAINT access_requests_request_id_length CHECK (octet_length(request_id) = 16),
    signer_key_id bytea NOT NULL
        CONSTRAINT access_requests_signer_key_id_length CHECK (octet_length(signer_key_id) = 16),
    state text COLLATE "C" NOT NULL,
    road text COLLATE "C" NOT NULL,
    tenant text COLLATE "C" NOT NULL,
    "user" text COLLATE "C" NOT NULL,
    key_name text COLLATE "C" NOT NULL,
    device_id bytea NOT NULL
        CONSTRAINT access_requests_device_id_length CHECK (octet_length(device_id) = 16),
    device_name text COLLATE "C" NOT NULL,
    device_kind text COLLATE "C" NOT NULL,
    verification_key bytea NOT NULL,
    public_key bytea NOT NULL
        CONSTRAINT access_requests_public_key_length CHECK (octet_length(public_key) <= 1024),
    code_mac bytea NOT NULL,
    code_key_id bytea NOT NULL
        CONSTRAINT access_requests_code_key_id_length CHECK (octet_length(code_key_id) = 16),
    requested_by text COLLATE "C" NOT NULL
        CONSTRAINT access_requests_requested_by_length CHECK (octet_length(requested_by) <= 2048),
    peer text COLLATE "C" NOT NULL,
    requested_us bigint NOT NULL,
    expires_us bigint NOT NULL,
    tries bigint NOT NULL,
    first_approved_by text COLLATE "C" NOT NULL
        CONSTRAINT access_requests_first_approved_by_length CHECK (octet_length(first_approved_by) <= 2048),
    decided_by text COLLATE "C" NOT NULL
        CONSTRAINT access_requests_decided_by_length CHECK (octet_length(decided_by) <= 2048),
    decided_device bytea NOT NULL,
    decided_us bigint,
    answer bytea NOT NULL
        CONSTRAINT access_requests_answer_length CHECK (octet_length(answer) <= 1024),
    answer_form text COLLATE "C" NOT NULL,
    fetched_us bigint,
    closed_us bigint,
    mac bytea NOT NULL,
    CONSTRAINT access_requests_pk PRIMARY KEY (request_id)
);
CREATE INDEX access_requests_user ON access_requests (tenant, "user");
CREATE INDEX access_requests_expires ON access_requests (expires_us);
COMMENT ON TABLE access_requests IS 'Requests of new devices to receive the user key of their member.';
COMMENT ON COLUMN access_requests.request_id IS
    'The request.';
COMMENT ON COLUMN access_requests.signer_key_id IS
    'The wrapping key whose integrity key made the MAC.';
COMMENT ON COLUMN access_requests.state IS
    'pending, approved, denied, consumed or revoked. An open request whose time has passed counts as expired.';
COMMENT ON COLUMN access_requests.road IS
    'Who is asked to approve: device or administrator.';
COMMENT ON COLUMN access_requests.tenant IS
    'The tenant of the member.';
COMMENT ON COLUMN access_requests."user" IS
    'The member.';
COMMENT ON COLUMN access_requests.key_name IS
    'The name of the requested user key.';
COMMENT ON COLUMN access_requests.device_id IS
    'The device that asks.';
COMMENT ON COLUMN access_requests.device_name IS
    'The name of this device.';
COMMENT ON COLUMN access_requests.device_kind IS
    'The type of this device, as its app states it.';
COMMENT ON COLUMN access_requests.verification_key IS
    'The public key of the signatures of this device.';
COMMENT ON COLUMN access_requests.public_key IS
    'The public key to which the answer is encrypted, as SubjectPublicKeyInfo.';
COMMENT ON COLUMN access_requests.code_mac IS
    'HMAC by the integrity key of code_key_id over request and access code.';
COMMENT ON COLUMN access_requests.code_key_id IS
    'The wrapping key whose integrity key made code_mac.';
COMMENT ON COLUMN access_requests.requested_by IS
    'The principal that made the request.';
COMMENT ON COLUMN access_requests.peer IS
    'The network address from which the request came.';
COMMENT ON COLUMN access_requests.requested_us IS
    'When the request was made.';
COMMENT ON COLUMN access_requests.expires_us IS
    'When the request or its answer expires.';
COMMENT ON COLUMN access_requests.tries IS
    'How many wrong access codes the requesting principal sent.';
COMMENT ON COLUMN access_requests.first_approved_by IS
    'The first of two approving administrators, if two are needed; empty before.';
COMMENT ON COLUMN access_requests.decided_by IS
    'The principal that approved or denied the request; empty before.';
COMMENT ON COLUMN access_requests.decided_device IS
    'The device that approved the request; empty unless a device did.';
COMMENT ON COLUMN access_requests.decided_us IS
    'When the request was approved or denied.';
COMMENT ON COLUMN access_requests.answer IS
    'The user key, encrypted to public_key; empty unless the request is approved.';
COMMENT ON COLUMN access_requests.answer_form IS
    'How the answer is encrypted, as the approving device states it, or the algorithm of the token.';
COMMENT ON COLUMN access_requests.fetched_us IS
    'When the answer was first fetched.';
COMMENT ON COLUMN access_requests.closed_us IS
    'When the answer was confirmed, or the approval withdrawn.';
COMMENT ON COLUMN access_requests.mac IS
    'HMAC by the integrity key of signer_key_id over all of the above, except signer_key_id.';
