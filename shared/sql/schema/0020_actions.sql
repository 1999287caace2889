-- The incident playbook's book: one row for every action that was asked for, whoever asked through whichever door.
-- Written as `begun` before anything is done: a row that stays so belongs to a process that died in between, and says
-- that nobody knows whether the action took effect.
CREATE TABLE actions (
    action_id    uuid PRIMARY KEY,  -- UUIDv7
    action       text NOT NULL,
    kind         text NOT NULL CHECK (kind IN ('read', 'reversible', 'destructive')),
    tenant_id    text,              -- no foreign key: what was refused may name a tenant that does not exist
    machine_id   text NOT NULL,
    door         text NOT NULL CHECK (door IN ('cli', 'api', 'prefect')),
    requested_by text NOT NULL CHECK (requested_by IN ('person', 'automation')),
    who          text NOT NULL,
    reason       text NOT NULL,
    arguments    jsonb NOT NULL,    -- checked ones only, and never a secret
    ttl_seconds  double precision,
    dry_run      boolean NOT NULL,
    state        text NOT NULL CHECK (state IN ('begun', 'done', 'failed', 'refused')),
    verified     boolean,           -- whether its effect was looked for and found; NULL: not looked for
    before       jsonb,
    after        jsonb,
    undo         jsonb,             -- the words of a command
    expires_at   timestamptz,
    error        text,
    flow_run_id  text,
    begun_at     timestamptz NOT NULL,
    finished_at  timestamptz,
    CHECK ((state = 'begun') = (finished_at IS NULL))
);
CREATE INDEX actions_newest ON actions (begun_at DESC);
CREATE INDEX actions_of_tenant ON actions (tenant_id, begun_at DESC) WHERE tenant_id IS NOT NULL;
CREATE INDEX actions_by_themselves ON actions (begun_at)
    WHERE requested_by = 'automation' AND kind = 'reversible' AND NOT dry_run AND state <> 'refused';
