-- How an object is packed, its own sha256 (to check it without a key), and the tenants' keys.

ALTER TABLE backups
    ADD COLUMN packing text NOT NULL DEFAULT 'none' CHECK (packing IN ('none', 'zstd', 'age', 'zstd+age')),
    ADD COLUMN stored_sha256 text CHECK (stored_sha256 ~ '^[0-9a-f]{64}$'),  -- NULL: plain, it is sha256
    ADD COLUMN key_id uuid,  -- no foreign key: the row outlives an erased key and says whose it was
    ADD CONSTRAINT backups_packed CHECK (packing = 'none' OR stored_sha256 IS NOT NULL),
    ADD CONSTRAINT backups_keyed CHECK ((key_id IS NOT NULL) = (packing LIKE '%age'));

-- `wrapped` is the tenant's age identity, itself an age file for the master key `master`. Deleting the row erases
-- every backup encrypted with it. At most one is current: new backups use that one, the others only open old ones.
CREATE TABLE tenant_keys (
    key_id     uuid PRIMARY KEY,
    tenant_id  text NOT NULL REFERENCES tenants,
    recipient  text NOT NULL,
    wrapped    bytea NOT NULL,
    master     text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    retired_at timestamptz
);
CREATE UNIQUE INDEX tenant_keys_current ON tenant_keys (tenant_id) WHERE retired_at IS NULL;
CREATE INDEX tenant_keys_of ON tenant_keys (tenant_id);
CREATE INDEX tenant_keys_master ON tenant_keys (master);

-- An upload about to begin: all that its catalogue row would say. Gone with the row's insert. What a crash between
-- the two left is read back and registered by the tenant's next backup.
CREATE TABLE backup_uploads (
    key        text PRIMARY KEY,
    tenant_id  text NOT NULL REFERENCES tenants,
    stored     jsonb NOT NULL,
    started_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX backup_uploads_of ON backup_uploads (tenant_id);
