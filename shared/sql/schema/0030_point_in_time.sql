-- Point in time (shared/litestream_copies.py): what a restore really took, and the tests of Litestream's copies. Those
-- are kept apart from `restore_tests`: a copy that works says nothing about a tenant's backups, and must not hide that
-- they were never drilled.
ALTER TABLE restores
    ADD COLUMN source    text,        -- in words; null for rows from before
    ADD COLUMN source_at timestamptz, -- the instant the restored database is of
    ADD COLUMN note      text;        -- why it is not what was planned

CREATE TABLE point_in_time_tests (
    test_id     uuid PRIMARY KEY,
    tenant_id   text NOT NULL REFERENCES tenants,
    generation  bigint, -- null: there was no copy, or nobody could look
    txid        bigint,
    outcome     text NOT NULL CHECK (outcome IN ('pass', 'fail', 'inconclusive')),
    checks      jsonb NOT NULL,
    reason      text,
    rto_ms      double precision,
    age_seconds double precision, -- from the instant of what was tested to the test
    flow_run_id text,
    started_at  timestamptz NOT NULL,
    finished_at timestamptz NOT NULL
);
CREATE INDEX point_in_time_tests_by_tenant ON point_in_time_tests (tenant_id, finished_at DESC);
