-- When a look at a stored backup last said nothing about it (no key, store away); null once it was read. Such ones are
-- looked at beside a day's share, never in it, so that however many they are the others get their turn.
ALTER TABLE backups ADD COLUMN unread_at timestamptz;
CREATE INDEX backups_unread ON backups (unread_at) WHERE status = 'available' AND unread_at IS NOT NULL;

-- What a run that is gone on with must know: whether it was for all tenants (of its machine and shard), and forced.
ALTER TABLE fleet_runs
    ADD COLUMN whole boolean NOT NULL DEFAULT true,
    ADD COLUMN force boolean NOT NULL DEFAULT false;
