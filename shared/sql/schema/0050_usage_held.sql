-- How many events each drained segment held, by UTC day and tenant: {"2026-11-23": {"acme": 17}}. Kept for as long as
-- gateways keep what they counted (shared/tally.py), with which it is compared.
CREATE TABLE usage_held (
    segment    text PRIMARY KEY,
    machine_id text NOT NULL,
    held       jsonb NOT NULL,
    drained_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX usage_held_by_age ON usage_held USING brin (drained_at);

-- 'discard': what a dry run examined is not to be billed.
ALTER TABLE usage_corrections DROP CONSTRAINT usage_corrections_kind_check;
ALTER TABLE usage_corrections ADD CONSTRAINT usage_corrections_kind_check
    CHECK (kind IN ('import', 'repair', 'discard'));
