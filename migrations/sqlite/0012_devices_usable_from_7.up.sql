-- Trusted devices of members, and requests for access of new devices. An earlier release does not read the rows: upgrade all brokers
-- before a wrapping key is destroyed, because an earlier release does not count the devices that need it.
-- Devices of members. The encrypted keys belong to the app on the device: the broker cannot open them.
CREATE TABLE devices (
    -- The tenant of the member.
    tenant TEXT NOT NULL,
    -- The member.
    "user" TEXT NOT NULL,
    -- The device, which chose the id. Different members may have devices with the same id.
    device_id BLOB NOT NULL CONSTRAINT devices_device_id_length CHECK (length(device_id) = 16),
    -- The wrapping key whose integrity key made the MAC.
    signer_key_id BLOB NOT NULL CONSTRAINT devices_signer_key_id_length CHECK (length(signer_key_id) = 16),
    -- trusted, untrusted or lost.
    state TEXT NOT NULL,
    -- The name that the member gave the device.
    name TEXT NOT NULL,
    -- The type of the device, as its app states it.
    kind TEXT NOT NULL,
    -- The public key of the signatures of the device: Ed25519 or P-256.
    verification_key BLOB NOT NULL,
    -- The name of the user key that the device opens.
    key_name TEXT NOT NULL,
    -- The revision of the user key that the device opens.
    revision INTEGER NOT NULL,
    -- The user key, encrypted to the public key of the device; empty unless the device is trusted.
    sealed_user_key BLOB NOT NULL
        CONSTRAINT devices_sealed_user_key_length CHECK (length(sealed_user_key) <= 1024),
    -- The public key of the device, encrypted with the user key; empty unless the device is trusted.
    sealed_public_key BLOB NOT NULL
        CONSTRAINT devices_sealed_public_key_length CHECK (length(sealed_public_key) <= 2048),
    -- The private key of the device, encrypted with its device key; empty unless the device is trusted.
    sealed_private_key BLOB NOT NULL
        CONSTRAINT devices_sealed_private_key_length CHECK (length(sealed_private_key) <= 8192),
    -- When the trust was established.
    trusted_us INTEGER NOT NULL,
    -- When the row was last changed, except the time of its last use.
    changed_us INTEGER NOT NULL,
    -- The time of the last signature of the device that was accepted.
    signed_us INTEGER NOT NULL,
    -- When the device was reported as lost.
    lost_us INTEGER,
    -- When the device last fetched its keys. Not covered by the MAC.
    used_us INTEGER,
    -- HMAC by the integrity key of signer_key_id over all of the above, except signer_key_id and used_us.
    mac BLOB NOT NULL,
    CONSTRAINT devices_pk PRIMARY KEY (tenant, "user", device_id)
) STRICT, WITHOUT ROWID;
CREATE INDEX devices_signer ON devices (signer_key_id);
-- Requests of new devices to receive the user key of their member.
CREATE TABLE access_requests (
    -- The request.
    request_id BLOB NOT NULL CONSTRAINT access_requests_request_id_length CHECK (length(request_id) = 16),
    -- The wrapping key whose integrity key made the MAC.
    signer_key_id BLOB NOT NULL CONSTRAINT access_requests_signer_key_id_length CHECK (length(signer_key_id) = 16),
    -- pending, approved, denied, consumed or revoked. An open request whose time has passed counts as expired.
    state TEXT NOT NULL,
    -- Who is asked to approve: device or administrator.
    road TEXT NOT NULL,
    -- The tenant of the member.
    tenant TEXT NOT NULL,
    -- The member.
    "user" TEXT NOT NULL,
    -- The name of the requested user key.
    key_name TEXT NOT NULL,
    -- The device that asks.
    device_id BLOB NOT NULL CONSTRAINT access_requests_device_id_length CHECK (length(device_id) = 16),
    -- The name of this device.
    device_name TEXT NOT NULL,
    -- The type of this device, as its app states it.
    device_kind TEXT NOT NULL,
    -- The public key of the signatures of this device.
    verification_key BLOB NOT NULL,
    -- The public key to which the answer is encrypted, as SubjectPublicKeyInfo.
    public_key BLOB NOT NULL
        CONSTRAINT access_requests_public_key_length CHECK (length(public_key) <= 1024),
    -- HMAC by the integrity key of code_key_id over request and access code.
    code_mac BLOB NOT NULL,
    -- The wrapping key whose integrity key made code_mac.
    code_key_id BLOB NOT NULL CONSTRAINT access_requests_code_key_id_length CHECK (length(code_key_id) = 16),
    -- The principal that made the request.
    requested_by TEXT NOT NULL
        CONSTRAINT access_requests_requested_by_length CHECK (length(requested_by) <= 2048),
    -- The network address from which the request came.
    peer TEXT NOT NULL,
    -- When the request was made.
    requested_us INTEGER NOT NULL,
    -- When the request or its answer expires.
    expires_us INTEGER NOT NULL,
    -- How many wrong access codes the requesting principal sent.
    tries INTEGER NOT NULL,
    -- The first of two approving administrators, if two are needed; empty before.
    first_approved_by TEXT NOT NULL
        CONSTRAINT access_requests_first_approved_by_length CHECK (length(first_approved_by) <= 2048),
    -- The principal that approved or denied the request; empty before.
    decided_by TEXT NOT NULL
        CONSTRAINT access_requests_decided_by_length CHECK (length(decided_by) <= 2048),
    -- The device that approved the request; empty unless a device did.
    decided_device BLOB NOT NULL,
    -- When the request was approved or denied.
    decided_us INTEGER,
    -- The user key, encrypted to public_key; empty unless the request is approved.
    answer BLOB NOT NULL
        CONSTRAINT access_requests_answer_length CHECK (length(answer) <= 1024),
    -- How the answer is encrypted, as the approving device states it, or the algorithm of the token.
    answer_form TEXT NOT NULL,
    -- When the answer was first fetched.
    fetched_us INTEGER,
    -- When the answer was confirmed, or the approval withdrawn.
    closed_us INTEGER,
    -- HMAC by the integrity key of signer_key_id over all of the above, except signer_key_id.
    mac BLOB NOT NULL,
    CONSTRAINT access_requests_pk PRIMARY KEY (request_id)
) STRICT, WITHOUT ROWID;
CREATE INDEX access_requests_user ON access_requests (tenant, "user");
CREATE INDEX access_requests_expires ON access_requests (expires_us);
