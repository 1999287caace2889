-- Tenants, backups, leases, restores, drills and usage. Times are timestamptz, sizes are bytes.

CREATE TABLE tenants (
    tenant_id      text PRIMARY KEY CHECK (tenant_id ~ '^[a-z0-9][a-z0-9_-]{0,62}$'),
    plan_id        text NOT NULL DEFAULT 'standard',
    state          text NOT NULL CHECK (state IN ('creating', 'active', 'suspended')),
    schema_version integer NOT NULL,
    generation     bigint NOT NULL DEFAULT 1,
    machine_id     text NOT NULL,
    created_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    updated_at     timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- A row is written only after the object was read back whole; `verified_at` is when that last happened.
CREATE TABLE backups (
    backup_id      uuid PRIMARY KEY,
    tenant_id      text NOT NULL REFERENCES tenants,
    ts             timestamptz NOT NULL,
    schema_version integer NOT NULL,
    size_bytes     bigint NOT NULL,
    stored_bytes   bigint NOT NULL,
    sha256         text NOT NULL CHECK (sha256 ~ '^[0-9a-f]{64}$'),
    key            text NOT NULL UNIQUE,
    kind           text NOT NULL CHECK (kind IN ('scheduled', 'manual', 'safety')),
    status         text NOT NULL CHECK (status IN ('available', 'corrupt', 'deleted')),
    manifest       jsonb NOT NULL DEFAULT '{}',
    flow_run_id    text,
    verified_at    timestamptz,
    created_at     timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX backups_newest ON backups (tenant_id, ts DESC) WHERE status = 'available';

-- One row a tenant for ever: the epoch only counts up. Free: holder IS NULL or expires_at has passed.
CREATE TABLE maintenance_locks (
    tenant_id   text PRIMARY KEY REFERENCES tenants,
    epoch       bigint NOT NULL,
    holder      text,
    reason      text,
    acquired_at timestamptz NOT NULL,
    expires_at  timestamptz NOT NULL
);

CREATE TABLE restores (
    restore_id      uuid PRIMARY KEY,
    tenant_id       text NOT NULL REFERENCES tenants,
    backup_id       uuid REFERENCES backups,
    kind            text NOT NULL CHECK (kind IN ('restore', 'undo')),
    state           text NOT NULL CHECK (state IN ('running', 'restored', 'put_back', 'refused', 'failed')),
    fence_epoch     bigint,
    from_generation bigint,
    to_generation   bigint,
    locked_ms       double precision,
    requested_by    text,
    reason          text,
    flow_run_id     text,
    error           text,
    created_at      timestamptz NOT NULL DEFAULT clock_timestamp(),
    finished_at     timestamptz
);
CREATE INDEX restores_by_tenant ON restores (tenant_id, created_at DESC);
CREATE INDEX restores_by_flow_run ON restores (flow_run_id);

CREATE TABLE restore_tests (
    test_id     uuid PRIMARY KEY,
    tenant_id   text NOT NULL REFERENCES tenants,
    backup_id   uuid REFERENCES backups,
    outcome     text NOT NULL CHECK (outcome IN ('pass', 'fail', 'inconclusive')),
    checks      jsonb NOT NULL,
    rto_ms      double precision,
    rpo_seconds double precision,
    flow_run_id text,
    started_at  timestamptz NOT NULL,
    finished_at timestamptz NOT NULL
);
CREATE INDEX restore_tests_by_tenant ON restore_tests (tenant_id, finished_at DESC);

-- request_id is a UUIDv7 minted at the edge: its first 48 bits are the time, so inserts land at one end.
CREATE TABLE usage_events (
    request_id       uuid PRIMARY KEY,
    tenant_id        text NOT NULL,
    route            text NOT NULL,
    status           smallint NOT NULL,
    api_calls        integer NOT NULL,
    search_queries   integer NOT NULL,
    memories_created integer NOT NULL,
    storage_bytes    bigint,
    ts               timestamptz NOT NULL
);

CREATE TABLE usage_hourly (
    tenant_id        text NOT NULL,
    bucket           timestamptz NOT NULL,
    api_calls        bigint NOT NULL DEFAULT 0,
    search_queries   bigint NOT NULL DEFAULT 0,
    memories_created bigint NOT NULL DEFAULT 0,
    storage_bytes    bigint,
    PRIMARY KEY (tenant_id, bucket)
);
CREATE TABLE usage_daily (LIKE usage_hourly INCLUDING ALL);

-- Events that cannot be billed as they are, kept with their cause, never away.
CREATE TABLE usage_quarantine (
    quarantine_id  bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    segment        text NOT NULL,
    request_id     uuid NOT NULL,
    tenant_id      text NOT NULL,
    reason         text NOT NULL,
    event          jsonb NOT NULL,
    quarantined_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    UNIQUE (segment, request_id)
);

-- The audit of the drain: what each segment held and what became of it.
CREATE TABLE usage_segments (
    segment     text PRIMARY KEY,
    events      integer NOT NULL,
    inserted    integer NOT NULL,
    duplicates  integer NOT NULL,
    quarantined integer NOT NULL,
    corrupt_bytes bigint NOT NULL,
    drained_at  timestamptz NOT NULL DEFAULT clock_timestamp()
);
