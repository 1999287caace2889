-- Backups of a whole machine: what a run has finished, and what each database looked like when it was last backed up.

-- When the database was last seen to hold exactly what this backup holds; null means at `ts`, never since. An idle
-- tenant's backup stays as true as on its first day: the age of a tenant's last good backup is
-- now - coalesce(current_at, ts).
ALTER TABLE backups ADD COLUMN current_at timestamptz;

CREATE INDEX backups_by_flow_run ON backups (flow_run_id);

-- `fingerprint` is the stat of the database files before the snapshot of `backup_id`; null: it proves nothing.
-- `run_id` is the last run that finished the tenant.
CREATE TABLE backup_marks (
    tenant_id   text PRIMARY KEY REFERENCES tenants ON DELETE CASCADE,
    backup_id   uuid NOT NULL REFERENCES backups ON DELETE CASCADE,
    fingerprint text,
    run_id      text,
    checked_at  timestamptz NOT NULL
);
CREATE INDEX backup_marks_by_backup ON backup_marks (backup_id);

-- One run over the tenants of one machine and shard. Unfinished: it was killed, and the same run_id goes on with it.
CREATE TABLE fleet_runs (
    run_id      text NOT NULL,
    machine_id  text NOT NULL,
    shard       integer NOT NULL CHECK (shard >= 0),
    shards      integer NOT NULL CHECK (shards > shard),
    kind        text NOT NULL,
    flow_run_id text,
    started_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    finished_at timestamptz,
    made        integer,
    skipped     integer,
    failed      integer,
    PRIMARY KEY (run_id, machine_id, shard, shards)
);
CREATE INDEX fleet_runs_newest ON fleet_runs (machine_id, started_at DESC);
