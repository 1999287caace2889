-- How long a plan's backups are kept: shared/retention.py says what each number means.
ALTER TABLE plans
    ADD COLUMN backups_last        integer NOT NULL DEFAULT 3  CHECK (backups_last >= 1),
    ADD COLUMN backups_hourly      integer NOT NULL DEFAULT 0  CHECK (backups_hourly >= 0),
    ADD COLUMN backups_daily       integer NOT NULL DEFAULT 7  CHECK (backups_daily >= 0),
    ADD COLUMN backups_weekly      integer NOT NULL DEFAULT 5  CHECK (backups_weekly >= 0),
    ADD COLUMN backups_monthly     integer NOT NULL DEFAULT 12 CHECK (backups_monthly >= 0),
    ADD COLUMN backups_yearly      integer NOT NULL DEFAULT 0  CHECK (backups_yearly >= 0),
    ADD COLUMN backups_safety_days integer NOT NULL DEFAULT 30 CHECK (backups_safety_days >= 0);

-- `deleting`: decided, not choosable any more, the object may still be there. `deleted`: it is gone.
ALTER TABLE backups DROP CONSTRAINT backups_status_check;
ALTER TABLE backups ADD CONSTRAINT backups_status_check
    CHECK (status IN ('available', 'corrupt', 'deleting', 'deleted'));
ALTER TABLE backups
    ADD COLUMN status_reason text,        -- why it is corrupt, deleting or deleted
    ADD COLUMN status_at     timestamptz, -- since when; null for one that was always available
    ADD COLUMN status_before text,        -- of one that is deleting
    ADD COLUMN delete_error  text,        -- why its object is still there after the last try
    ADD COLUMN held_until    timestamptz, -- not deleted before; 'infinity' is a legal hold
    ADD COLUMN hold_reason   text;

CREATE INDEX backups_kept ON backups (tenant_id) WHERE status IN ('available', 'corrupt');
CREATE INDEX backups_deleting ON backups (backup_id) WHERE status = 'deleting';
CREATE INDEX backups_by_verification ON backups (verified_at NULLS FIRST) WHERE status = 'available';
CREATE INDEX backups_corrupt ON backups (status_at) WHERE status = 'corrupt';
CREATE INDEX restores_running ON restores (backup_id) WHERE state = 'running';
