-- Trusted devices of members, and requests for access of new devices. An earlier release does not read the rows: upgrade all brokers
-- before a wrapping key is destroyed, because an earlier release does not count the devices that need it.
CREATE TABLE IF NOT EXISTS devices (
    tenant VARBINARY(64) NOT NULL
        COMMENT 'The tenant of the member.',
    `user` VARBINARY(255) NOT NULL
        COMMENT 'The member.',
    device_id VARBINARY(16) NOT NULL
        COMMENT 'The device, which chose the id. Different members may have devices with the same id.',
    signer_key_id VARBINARY(16) NOT NULL
        COMMENT 'The wrapping key whose integrity key made the MAC.',
    state VARBINARY(16) NOT NULL
        COMMENT 'trusted, untrusted or lost.',
    name VARBINARY(128) NOT NULL
        COMMENT 'The name that the member gave the device.',
    kind VARBINARY(64) NOT NULL
        COMMENT 'The type of the device, as its app states it.',
    verification_key VARBINARY(65) NOT NULL
        COMMENT 'The public key of the signatures of the device: Ed25519 or P-256.',
    key_name VARBINARY(64) NOT NULL
        COMMENT 'The name of the user key that the device opens.',
    revision BIGINT NOT NULL
        COMMENT 'The revision of the user key that the device opens.',
    sealed_user_key VARBINARY(1024) NOT NULL
        COMMENT 'The user key, encrypted to the public key of the device; empty unless the device is trusted.',
    sealed_public_key VARBINARY(2048) NOT NULL
        COMMENT 'The public key of the device, encrypted with the user key; empty unless the device is trusted.',
    sealed_private_key VARBINARY(8192) NOT NULL
        COMMENT 'The private key of the device, encrypted with its device key; empty unless the device is trusted.',
    trusted_us BIGINT NOT NULL
        COMMENT 'When the trust was established.',
    changed_us BIGINT NOT NULL
        COMMENT 'When the row was last changed, except the time of its last use.',
    signed_us BIGINT NOT NULL
        COMMENT 'The time of the last signature of the device that was accepted.',
    lost_us BIGINT NULL
        COMMENT 'When the device was reported as lost.',
    used_us BIGINT NULL
        COMMENT 'When the device last fetched its keys. Not covered by the MAC.',
    mac VARBINARY(32) NOT NULL
        COMMENT 'HMAC by the integrity key of signer_key_id over all of the above, except signer_key_id and used_us.',
    PRIMARY KEY (tenant, `user`, device_id),
    CONSTRAINT devices_device_id_length CHECK (length(device_id) = 16),
    CONSTRAINT devices_signer_key_id_length CHECK (length(signer_key_id) = 16),
    INDEX devices_signer (signer_key_id)
) ENGINE = InnoDB COMMENT = 'Devices of members. The encrypted keys belong to the app on the device: the broker cannot open them.';
CREATE TABLE IF NOT EXISTS access_requests (
    request_id VARBINARY(16) NOT NULL
        COMMENT 'The request.',
    signer_key_id VARBINARY(16) NOT NULL
        COMMENT 'The wrapping key whose integrity key made the MAC.',
    state VARBINARY(16) NOT NULL
        COMMENT 'pending, approved, denied, consumed or revoked. An open request whose time has passed counts as expired.',
    road VARBINARY(16) NOT NULL
        COMMENT 'Who is asked to approve: device or administrator.',
    tenant VARBINARY(64) NOT NULL
        COMMENT 'The tenant of the member.',
    `user` VARBINARY(255) NOT NULL
        COMMENT 'The member.',
    key_name VARBINARY(64) NOT NULL
        COMMENT 'The name of the requested user key.',
    device_id VARBINARY(16) NOT NULL
        COMMENT 'The device that asks.',
    device_name VARBINARY(128) NOT NULL
        COMMENT 'The name of this device.',
    device_kind VARBINARY(64) NOT NULL
        COMMENT 'The type of this device, as its app states it.',
    verification_key VARBINARY(65) NOT NULL
        COMMENT 'The public key of the signatures of this device.',
    public_key VARBINARY(1024) NOT NULL
        COMMENT 'The public key to which the answer is encrypted, as SubjectPublicKeyInfo.',
    code_mac VARBINARY(32) NOT NULL
        COMMENT 'HMAC by the integrity key of code_key_id over request and access code.',
    code_key_id VARBINARY(16) NOT NULL
        COMMENT 'The wrapping key whose integrity key made code_mac.',
    requested_by VARBINARY(2048) NOT NULL
        COMMENT 'The principal that made the request.',
    peer VARBINARY(64) NOT NULL
        COMMENT 'The network address from which the request came.',
    requested_us BIGINT NOT NULL
        COMMENT 'When the request was made.',
    expires_us BIGINT NOT NULL
        COMMENT 'When the request or its answer expires.',
    tries BIGINT NOT NULL
        COMMENT 'How many wrong access codes the requesting principal sent.',
    first_approved_by VARBINARY(2048) NOT NULL
        COMMENT 'The first of two approving administrators, if two are needed; empty before.',
    decided_by VARBINARY(2048) NOT NULL
        COMMENT 'The principal that approved or denied the request; empty before.',
    decided_device VARBINARY(16) NOT NULL
        COMMENT 'The device that approved the request; empty unless a device did.',
    decided_us BIGINT NULL
        COMMENT 'When the request was approved or denied.',
    answer VARBINARY(1024) NOT NULL
        COMMENT 'The user key, encrypted to public_key; empty unless the request is approved.',
    answer_form VARBINARY(32) NOT NULL
        COMMENT 'How the answer is encrypted, as the approving device states it, or the algorithm of the token.',
    fetched_us BIGINT NULL
        COMMENT 'When the answer was first fetched.',
    closed_us BIGINT NULL
        COMMENT 'When the answer was confirmed, or the approval withdrawn.',
    mac VARBINARY(32) NOT NULL
        COMMENT 'HMAC by the integrity key of signer_key_id over all of the above, except signer_key_id.',
    PRIMARY KEY (request_id),
    CONSTRAINT access_requests_request_id_length CHECK (length(request_id) = 16),
    CONSTRAINT access_requests_signer_key_id_length CHECK (length(signer_key_id) = 16),
    CONSTRAINT access_requests_device_id_length CHECK (length(device_id) = 16),
    CONSTRAINT access_requests_code_key_id_length CHECK (length(code_key_id) = 16),
    INDEX access_requests_user (tenant, `user`),
    INDEX access_requests_expires (expires_us)
) ENGINE = InnoDB COMMENT = 'Requests of new devices to receive the user key of their member.';
