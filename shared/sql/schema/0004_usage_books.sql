-- What is needed to say of a day and a tenant: everything is here, and nothing twice.

-- Whose spool a segment came from, and how many of its new events belong to which UTC day: {"2026-11-23": 4990}.
-- NULL in rows from before this migration.
ALTER TABLE usage_segments ADD COLUMN machine_id text, ADD COLUMN by_day jsonb;

-- Every request that began on a machine before `complete_until` is in usage_events and the rollups.
CREATE TABLE usage_watermarks (
    machine_id     text PRIMARY KEY,
    complete_until timestamptz NOT NULL,
    updated_at     timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- Whoever changes usage by hand leaves a row: a backfill ('import') or rollups made anew from the events ('repair').
CREATE TABLE usage_corrections (
    correction_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    kind          text NOT NULL CHECK (kind IN ('import', 'repair')),
    reason        text NOT NULL CHECK (reason <> ''),
    requested_by  text NOT NULL,
    details       jsonb NOT NULL,
    created_at    timestamptz NOT NULL DEFAULT clock_timestamp()
);
