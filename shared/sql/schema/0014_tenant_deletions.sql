-- deleting: refused by the gateway, being removed. deleted: what is left is this row, its usage and the receipt.
ALTER TABLE tenants DROP CONSTRAINT tenants_state_check;
ALTER TABLE tenants ADD CONSTRAINT tenants_state_check
    CHECK (state IN ('creating', 'active', 'suspended', 'deleting', 'deleted'));

-- One row a deletion. `inventory` is written before anything is removed; `receipt` is JSON, byte by byte what
-- `receipt_sha256` is of.
CREATE TABLE tenant_deletions (
    deletion_id    uuid PRIMARY KEY,
    tenant_id      text NOT NULL REFERENCES tenants,
    reason         text NOT NULL,
    requested_by   text NOT NULL,
    keep_backups   boolean NOT NULL,
    inventory      jsonb NOT NULL,
    receipt        text,
    receipt_sha256 text,
    erased         boolean NOT NULL DEFAULT false,
    started_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    finished_at    timestamptz
);
CREATE UNIQUE INDEX tenant_deletions_open ON tenant_deletions (tenant_id) WHERE finished_at IS NULL;
CREATE INDEX tenant_deletions_of ON tenant_deletions (tenant_id, started_at DESC);
