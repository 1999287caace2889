-- Moves of a tenant from one machine to another (shared/move.py): the journal both machines and their sweeps go by.
-- Who serves the tenant is `tenants.machine_id` alone; it changes in the transaction that makes a row `routed`.
CREATE TABLE moves (
    move_id         uuid PRIMARY KEY,
    tenant_id       text NOT NULL REFERENCES tenants,
    source          text NOT NULL,
    target          text NOT NULL CHECK (target <> source),
    state           text NOT NULL CHECK (state IN ('copying', 'copied', 'arriving', 'staged', 'held', 'final', 'ready',
                                                   'routed', 'done', 'undone')),
    first_backup_id uuid REFERENCES backups, -- made while writes went on
    final_backup_id uuid REFERENCES backups, -- made while they were held; the first one when nothing had been written
    fence_epoch     bigint,
    from_generation bigint,
    to_generation   bigint,
    memories        bigint,
    size_bytes      bigint,
    held_ms         double precision,        -- from the first write refused to the target serving, seen by the source
    requested_by    text,
    reason          text,
    flow_run_id     text,
    error           text,
    created_at      timestamptz NOT NULL DEFAULT clock_timestamp(),
    held_at         timestamptz,
    routed_at       timestamptz,
    finished_at     timestamptz,             -- done or undone
    remove_after    timestamptz,             -- the source's files may go
    removed_at      timestamptz              -- they are gone
);
CREATE UNIQUE INDEX moves_open ON moves (tenant_id) WHERE state NOT IN ('done', 'undone');
CREATE INDEX moves_of_tenant ON moves (tenant_id, created_at DESC);
CREATE INDEX moves_by_flow_run ON moves (flow_run_id);
CREATE INDEX moves_kept ON moves (source) WHERE state = 'done' AND removed_at IS NULL;
