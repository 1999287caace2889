-- Every statement the product runs against the control plane, loaded by name (shared/control_plane.py).
-- A line `-- name: x` starts a query; a test EXPLAINs each against a real PostgreSQL.

-- name: tenant_insert
INSERT INTO tenants (tenant_id, plan_id, state, schema_version, machine_id)
VALUES (%(tenant_id)s, %(plan_id)s, 'creating', %(schema_version)s, %(machine_id)s)
ON CONFLICT (tenant_id) DO NOTHING;

-- name: tenant_set_state
UPDATE tenants SET state = %(state)s, updated_at = clock_timestamp()
WHERE tenant_id = %(tenant_id)s AND state = ANY (%(from_states)s)
RETURNING tenant_id;

-- name: tenant_set_generation
UPDATE tenants
SET generation = %(generation)s, schema_version = %(schema_version)s, updated_at = clock_timestamp()
WHERE tenant_id = %(tenant_id)s;

-- name: tenant_set_active_generation
UPDATE tenants SET generation = %(generation)s, updated_at = clock_timestamp()
WHERE tenant_id = %(tenant_id)s AND generation <> %(generation)s;

-- name: tenant_get
SELECT tenant_id, plan_id, state, schema_version, generation, machine_id, created_at
FROM tenants WHERE tenant_id = %(tenant_id)s;

-- name: tenant_list
SELECT tenant_id, plan_id, state, schema_version, generation, machine_id, created_at
FROM tenants ORDER BY tenant_id;

-- name: tenants_of_machine
SELECT tenant_id FROM tenants WHERE machine_id = %(machine_id)s AND state = 'active' ORDER BY tenant_id;

-- name: tenant_standings
-- All rows, or those of transactions that were not over at the read that said `since`; always one, if only to say the
-- next `since`. xmin is the transaction that wrote a row; age() compares such numbers although they wrap around.
SELECT t.tenant_id, t.state, NULLIF(t.machine_id, %(machine_id)s) AS elsewhere, now.since::text
FROM (SELECT pg_snapshot_xmin(pg_current_snapshot())::xid AS since) now
LEFT JOIN tenants t ON %(since)s::xid IS NULL OR age(t.xmin) <= age(%(since)s::xid);

-- name: backup_insert
WITH done AS (DELETE FROM backup_uploads WHERE key = %(key)s)
INSERT INTO backups (backup_id, tenant_id, ts, schema_version, size_bytes, stored_bytes, sha256,
                     stored_sha256, packing, key_id, key, kind, status, manifest, flow_run_id, verified_at)
SELECT %(backup_id)s, tenant_id, %(ts)s, %(schema_version)s, %(size_bytes)s, %(stored_bytes)s, %(sha256)s,
       %(stored_sha256)s, %(packing)s, %(key_id)s, %(key)s, %(kind)s, 'available', %(manifest)s, %(flow_run_id)s,
       clock_timestamp()
-- Not of a tenant that is deleted meanwhile: FOR SHARE waits for that, or it waits for this.
FROM tenants WHERE tenant_id = %(tenant_id)s AND state NOT IN ('deleting', 'deleted') FOR SHARE
-- A repair that met the live upload was first, and knew no run.
ON CONFLICT (key) DO UPDATE SET flow_run_id = EXCLUDED.flow_run_id WHERE backups.flow_run_id IS NULL;

-- name: backup_get
SELECT backup_id, tenant_id, ts, schema_version, size_bytes, stored_bytes, sha256,
       coalesce(stored_sha256, sha256) AS stored_sha256, packing, key_id, key, kind, status, manifest,
       verified_at, created_at
FROM backups WHERE backup_id = %(backup_id)s;

-- name: backup_newest
SELECT backup_id, tenant_id, ts, schema_version, size_bytes, stored_bytes, sha256,
       coalesce(stored_sha256, sha256) AS stored_sha256, packing, key_id, key, kind, status, manifest,
       verified_at, created_at
FROM backups
WHERE tenant_id = %(tenant_id)s AND status = 'available' AND verified_at IS NOT NULL
  -- A safety backup holds what a restore was meant to replace: chosen by its id or by a time, never as "the newest".
  AND CASE WHEN %(at)s::timestamptz IS NULL THEN kind <> 'safety' ELSE ts <= %(at)s::timestamptz END
ORDER BY ts DESC LIMIT 1;

-- name: backup_list
SELECT backup_id, tenant_id, ts, schema_version, size_bytes, stored_bytes, sha256,
       coalesce(stored_sha256, sha256) AS stored_sha256, packing, key_id, key, kind, status, manifest,
       verified_at, created_at
FROM backups WHERE tenant_id = %(tenant_id)s ORDER BY ts DESC LIMIT %(limit)s;

-- name: lease_acquire
INSERT INTO maintenance_locks (tenant_id, epoch, holder, reason, acquired_at, expires_at)
VALUES (%(tenant_id)s, 1, %(holder)s, %(reason)s, clock_timestamp(),
        clock_timestamp() + make_interval(secs => %(lease_seconds)s))
ON CONFLICT (tenant_id) DO UPDATE
SET epoch = maintenance_locks.epoch + 1, holder = EXCLUDED.holder, reason = EXCLUDED.reason,
    acquired_at = clock_timestamp(), expires_at = EXCLUDED.expires_at
WHERE maintenance_locks.holder IS NULL OR maintenance_locks.expires_at < clock_timestamp()
   OR maintenance_locks.holder = EXCLUDED.holder  -- our own grant, whose reply was lost
RETURNING epoch, expires_at;

-- name: lease_renew
UPDATE maintenance_locks SET expires_at = clock_timestamp() + make_interval(secs => %(lease_seconds)s)
WHERE tenant_id = %(tenant_id)s AND epoch = %(epoch)s AND holder = %(holder)s AND expires_at > clock_timestamp()
RETURNING expires_at;

-- name: lease_release
UPDATE maintenance_locks SET holder = NULL, reason = NULL, expires_at = clock_timestamp()
WHERE tenant_id = %(tenant_id)s AND holder = %(holder)s
RETURNING epoch;

-- name: lease_release_dead
-- Whoever calls this holds the tenant's restore mutex, so the holder of the lease is gone.
UPDATE maintenance_locks SET holder = NULL, reason = NULL, expires_at = clock_timestamp()
WHERE tenant_id = %(tenant_id)s AND holder IS NOT NULL
RETURNING epoch;

-- name: lease_get
SELECT tenant_id, epoch, holder, reason, acquired_at, expires_at, expires_at < clock_timestamp() AS expired
FROM maintenance_locks WHERE tenant_id = %(tenant_id)s;

-- name: restore_insert
INSERT INTO restores (restore_id, tenant_id, backup_id, kind, state, requested_by, reason, flow_run_id)
VALUES (%(restore_id)s, %(tenant_id)s, %(backup_id)s, %(kind)s, 'running', %(requested_by)s, %(reason)s,
        %(flow_run_id)s)
ON CONFLICT (restore_id) DO NOTHING;

-- name: restore_source
-- What was really staged.
UPDATE restores SET backup_id = %(backup_id)s, source = %(source)s, source_at = %(source_at)s, note = %(note)s
WHERE restore_id = %(restore_id)s;

-- name: restore_fenced
UPDATE restores SET fence_epoch = %(epoch)s WHERE restore_id = %(restore_id)s;

-- name: restore_swapping
-- Written under the fence, with the proof that the lease still holds: what a sweep needs to close the row.
UPDATE restores SET from_generation = %(from_generation)s, to_generation = %(to_generation)s
WHERE restore_id = %(restore_id)s;

-- name: restores_left_open
-- Restores of this machine that hold a lease, or say running for longer than a lease lasts.
SELECT t.tenant_id, r.restore_id, r.to_generation
FROM tenants t
LEFT JOIN maintenance_locks l ON l.tenant_id = t.tenant_id AND l.holder IS NOT NULL
LEFT JOIN restores r ON r.tenant_id = t.tenant_id AND r.state = 'running'
WHERE t.machine_id = %(machine_id)s AND t.state NOT IN ('deleting', 'deleted')
  AND (l.tenant_id IS NOT NULL
       OR r.created_at < clock_timestamp() - make_interval(secs => %(older_than_seconds)s))
ORDER BY t.tenant_id, r.created_at;

-- name: tenants_restored
-- Active tenants that had another generation before.
SELECT tenant_id, generation FROM tenants WHERE state = 'active' AND generation > 1 ORDER BY tenant_id;

-- name: restore_last
-- The last restore or undo of a tenant that made another database active.
SELECT restore_id, kind, finished_at FROM restores
WHERE tenant_id = %(tenant_id)s AND state = 'restored' ORDER BY finished_at DESC LIMIT 1;

-- name: restore_window
-- The median of how long the last restores of this fleet held writes, in ms; null before the first.
SELECT percentile_cont(0.5) WITHIN GROUP (ORDER BY locked_ms) AS locked_ms
FROM (SELECT locked_ms FROM restores WHERE locked_ms IS NOT NULL ORDER BY created_at DESC LIMIT 50) AS last_ones;

-- name: restore_finish
UPDATE restores
SET state = %(state)s, error = %(error)s, locked_ms = %(locked_ms)s,
    from_generation = coalesce(%(from_generation)s, from_generation),
    to_generation = coalesce(%(to_generation)s, to_generation), finished_at = clock_timestamp()
WHERE restore_id = %(restore_id)s AND state = 'running';

-- name: restore_by_flow_run
SELECT restore_id, tenant_id, backup_id, kind, state, fence_epoch, from_generation, to_generation, locked_ms,
       error, source, source_at, note, created_at, finished_at
FROM restores WHERE flow_run_id = %(flow_run_id)s ORDER BY created_at DESC LIMIT 1;

-- name: drill_candidates
-- Every tenant, a suspended one too, that has a backup to drill, with what the selection looks at (shared/selection.py).
SELECT t.tenant_id, t.machine_id, t.created_at, b.size_bytes, b.schema_version, d.finished_at AS drilled_at,
       d.schema_version AS drilled_schema_version, coalesce(d.outcome = 'fail', false) AS failed,
       coalesce(i.count, 0)::int AS inconclusive, i.tried_at, r.restored_at
FROM tenants t
JOIN LATERAL (
    SELECT size_bytes, schema_version FROM backups
    WHERE tenant_id = t.tenant_id AND status = 'available' AND verified_at IS NOT NULL AND kind <> 'safety'
    ORDER BY ts DESC LIMIT 1
) b ON true
LEFT JOIN LATERAL (
    SELECT x.finished_at, x.outcome, y.schema_version
    FROM restore_tests x LEFT JOIN backups y USING (backup_id)
    WHERE x.tenant_id = t.tenant_id AND x.outcome <> 'inconclusive' ORDER BY x.finished_at DESC LIMIT 1
) d ON true
LEFT JOIN LATERAL (
    SELECT count(*) AS count, max(finished_at) AS tried_at FROM restore_tests
    WHERE tenant_id = t.tenant_id AND outcome = 'inconclusive'
      AND finished_at > coalesce(d.finished_at, '-infinity'::timestamptz)
) i ON true
LEFT JOIN LATERAL (
    SELECT max(finished_at) AS restored_at FROM restores WHERE tenant_id = t.tenant_id AND state = 'restored'
) r ON true
WHERE t.state IN ('active', 'suspended')
ORDER BY t.tenant_id;

-- name: drill_points
-- The recovery points of some tenants; `true_until` is the instant up to which each holds all that was written.
SELECT b.backup_id, b.tenant_id, b.ts, b.kind, coalesce(b.current_at, b.ts) AS true_until,
       EXISTS (SELECT 1 FROM restore_tests d WHERE d.backup_id = b.backup_id AND d.outcome <> 'inconclusive') AS drilled
FROM backups b
WHERE b.tenant_id = ANY (%(tenant_ids)s::text[]) AND b.status = 'available' AND b.verified_at IS NOT NULL
ORDER BY b.tenant_id, b.ts;

-- name: drill_insert
-- Twice is once: a reply may be lost.
INSERT INTO restore_tests (test_id, tenant_id, backup_id, outcome, checks, rto_ms, rpo_seconds, flow_run_id,
                           started_at, finished_at, reason, download_ms, decrypt_ms, verify_ms, smoke_ms,
                           sentinel_age_seconds)
VALUES (%(test_id)s, %(tenant_id)s, %(backup_id)s, %(outcome)s, %(checks)s, %(rto_ms)s, %(rpo_seconds)s,
        %(flow_run_id)s, %(started_at)s, clock_timestamp(), %(reason)s, %(download_ms)s, %(decrypt_ms)s,
        %(verify_ms)s, %(smoke_ms)s, %(sentinel_age_seconds)s)
ON CONFLICT (test_id) DO NOTHING;

-- name: copy_drill_insert
INSERT INTO point_in_time_tests (test_id, tenant_id, generation, txid, outcome, checks, reason, rto_ms, age_seconds,
                                 flow_run_id, started_at, finished_at)
VALUES (%(test_id)s, %(tenant_id)s, %(generation)s, %(txid)s, %(outcome)s, %(checks)s, %(reason)s, %(rto_ms)s,
        %(age_seconds)s, %(flow_run_id)s, %(started_at)s, clock_timestamp())
ON CONFLICT (test_id) DO NOTHING;

-- name: drill_trend
-- The last drills, of one tenant or of all, newest first.
SELECT test_id, tenant_id, outcome, rto_ms, rpo_seconds, finished_at FROM restore_tests
WHERE %(tenant_id)s::text IS NULL OR tenant_id = %(tenant_id)s::text
ORDER BY finished_at DESC LIMIT %(limit)s;

-- name: drill_never
-- Tenants, suspended ones too, with a backup and without a drill that passed or failed; `total` counts them all.
SELECT t.tenant_id, count(*) OVER () AS total FROM tenants t
WHERE t.state IN ('active', 'suspended')
  AND EXISTS (SELECT 1 FROM backups b
              WHERE b.tenant_id = t.tenant_id AND b.status = 'available' AND b.verified_at IS NOT NULL)
  AND NOT EXISTS (SELECT 1 FROM restore_tests d WHERE d.tenant_id = t.tenant_id AND d.outcome <> 'inconclusive')
ORDER BY t.created_at, t.tenant_id LIMIT %(limit)s;

-- name: fleet_ages
SELECT
    -- Of the tenant, active or suspended, that is worst off: since when a restore of its newest backup would lose what is written.
    -- Only what `backup_newest` would choose counts; a tenant without one counts from its creation. The earlier of the
    -- two clocks that date a backup is believed; `current_at` is when it was last seen to hold all there is.
    (SELECT greatest(EXTRACT(EPOCH FROM clock_timestamp() - min(
         coalesce(greatest(least(b.ts, b.created_at), b.current_at), t.created_at))), 0)
     FROM tenants t
     LEFT JOIN LATERAL (
         SELECT ts, created_at, current_at FROM backups
         WHERE tenant_id = t.tenant_id AND status = 'available' AND verified_at IS NOT NULL AND kind <> 'safety'
         ORDER BY ts DESC LIMIT 1) b ON true
     WHERE t.state IN ('active', 'suspended')) AS backup_age_seconds,
    (SELECT count(*) FROM backups WHERE status = 'corrupt') AS backups_corrupt,
    -- Of those tenants with a backup the one whose last passed drill is oldest; never passed: since its creation.
    -- Bounded by the share a weekly run drills (2 / share weeks), so beyond that it says that some tenant is left out.
    (SELECT EXTRACT(EPOCH FROM clock_timestamp() - min(coalesce(d.finished_at, t.created_at)))
     FROM tenants t
     LEFT JOIN LATERAL (
         SELECT finished_at FROM restore_tests
         WHERE tenant_id = t.tenant_id AND outcome = 'pass' ORDER BY finished_at DESC LIMIT 1) d ON true
     WHERE t.state IN ('active', 'suspended') AND EXISTS (
         SELECT 1 FROM backups b
         WHERE b.tenant_id = t.tenant_id AND b.status = 'available' AND b.verified_at IS NOT NULL)
    ) AS drill_age_seconds,
    -- The newest passed drill of all: whether drills are run at all. Null before the first.
    (SELECT EXTRACT(EPOCH FROM clock_timestamp() - max(finished_at))
     FROM restore_tests WHERE outcome = 'pass') AS drill_last_age_seconds,
    (SELECT count(*) FROM maintenance_locks WHERE holder IS NOT NULL) AS maintenance_locks,
    -- Since when the oldest lease is held, and how far one has outlived its expiry: its holder died and no sweep came.
    (SELECT coalesce(EXTRACT(EPOCH FROM clock_timestamp() - min(acquired_at)), 0)
     FROM maintenance_locks WHERE holder IS NOT NULL) AS maintenance_held_seconds,
    (SELECT coalesce(greatest(EXTRACT(EPOCH FROM clock_timestamp() - min(expires_at)), 0), 0)
     FROM maintenance_locks WHERE holder IS NOT NULL) AS maintenance_overdue_seconds,
    -- Days after today, in a row, whose partition is there; -1 when today's is not.
    (SELECT min(n) - 1 FROM generate_series(0, 400) AS n
     WHERE NOT EXISTS (
         SELECT 1 FROM pg_inherits
         WHERE inhparent = 'usage_events'::regclass AND NOT inhdetachpending
         AND inhrelid = to_regclass('usage_events_' || to_char((now() AT TIME ZONE 'UTC')::date + n, 'YYYYMMDD'))
     )) AS usage_partitions_ahead_days;

-- name: usage_copy
-- Events that are expected to be new, sorted by id. One that is not fails it, and `usage_insert` takes its place.
COPY usage_events (request_id, tenant_id, route, status, api_calls, search_queries, memories_created, ts)
FROM STDIN (FORMAT BINARY);

-- name: usage_insert
-- Insert by request_id; the ids that were new. Ordered by its key: unsorted overlapping batches deadlocked.
INSERT INTO usage_events (request_id, tenant_id, route, status, api_calls, search_queries, memories_created, ts)
SELECT * FROM unnest(%(request_id)b::uuid[], %(tenant_id)b::text[], %(route)b::text[],
                     %(status)b::smallint[], %(api_calls)b::int[], %(search_queries)b::int[],
                     %(memories_created)b::int[], %(ts)b::timestamptz[])
ORDER BY 1
ON CONFLICT (request_id) DO NOTHING
RETURNING request_id;

-- name: usage_hourly_add
-- The sums of new events. Hourly before daily, each ordered by its key, so that drains never wait in a circle.
INSERT INTO usage_hourly (tenant_id, bucket, api_calls, search_queries, memories_created)
SELECT * FROM unnest(%(tenant_id)b::text[], %(bucket)b::timestamptz[], %(api_calls)b::bigint[],
                     %(search_queries)b::bigint[], %(memories_created)b::bigint[])
ORDER BY 1, 2
ON CONFLICT (tenant_id, bucket) DO UPDATE
SET api_calls = usage_hourly.api_calls + EXCLUDED.api_calls,
    search_queries = usage_hourly.search_queries + EXCLUDED.search_queries,
    memories_created = usage_hourly.memories_created + EXCLUDED.memories_created;

-- name: usage_daily_add
-- From the same hours.
INSERT INTO usage_daily (tenant_id, bucket, api_calls, search_queries, memories_created)
SELECT tenant_id, date_trunc('day', bucket, 'UTC'), sum(api_calls), sum(search_queries), sum(memories_created)
FROM unnest(%(tenant_id)b::text[], %(bucket)b::timestamptz[], %(api_calls)b::bigint[],
            %(search_queries)b::bigint[], %(memories_created)b::bigint[])
    AS added (tenant_id, bucket, api_calls, search_queries, memories_created)
GROUP BY 1, 2
ORDER BY 1, 2
ON CONFLICT (tenant_id, bucket) DO UPDATE
SET api_calls = usage_daily.api_calls + EXCLUDED.api_calls,
    search_queries = usage_daily.search_queries + EXCLUDED.search_queries,
    memories_created = usage_daily.memories_created + EXCLUDED.memories_created;

-- name: usage_hourly_storage
-- A gauge: the last measurement of the hour stands. Same order of keys and of tables as the drain's sums.
INSERT INTO usage_hourly (tenant_id, bucket, storage_bytes)
SELECT tenant_id, date_trunc('hour', %(measured_at)s::timestamptz, 'UTC'), storage_bytes
FROM unnest(%(tenant_id)b::text[], %(storage_bytes)b::bigint[]) AS measured (tenant_id, storage_bytes)
ORDER BY 1, 2
ON CONFLICT (tenant_id, bucket) DO UPDATE SET storage_bytes = EXCLUDED.storage_bytes
WHERE usage_hourly.storage_bytes IS DISTINCT FROM EXCLUDED.storage_bytes;

-- name: usage_daily_storage
INSERT INTO usage_daily (tenant_id, bucket, storage_bytes)
SELECT tenant_id, date_trunc('day', %(measured_at)s::timestamptz, 'UTC'), storage_bytes
FROM unnest(%(tenant_id)b::text[], %(storage_bytes)b::bigint[]) AS measured (tenant_id, storage_bytes)
ORDER BY 1, 2
ON CONFLICT (tenant_id, bucket) DO UPDATE SET storage_bytes = EXCLUDED.storage_bytes
WHERE usage_daily.storage_bytes IS DISTINCT FROM EXCLUDED.storage_bytes;

-- name: usage_known
-- Which of these ids are there already, between the smallest and the largest of them.
SELECT count(*) FROM usage_events
WHERE request_id = ANY (%(request_id)b::uuid[]) AND request_id BETWEEN %(first)s AND %(last)s;

-- name: usage_quarantine_insert
INSERT INTO usage_quarantine (segment, request_id, tenant_id, reason, event)
SELECT %(segment)s, * FROM unnest(%(request_id)s::uuid[], %(tenant_id)s::text[], %(reason)s::text[], %(event)s::jsonb[])
ON CONFLICT (segment, request_id) DO NOTHING;

-- name: usage_segment_insert
-- A replay leaves the first record, unless it brings what was not there: then both are counted.
WITH held AS (
    INSERT INTO usage_held (segment, machine_id, held)
    SELECT segment, %(machine_id)s, held FROM unnest(%(segment)s::text[], %(held)s::jsonb[]) AS h (segment, held)
    ON CONFLICT (segment) DO NOTHING
)
INSERT INTO usage_segments (segment, events, inserted, duplicates, quarantined, corrupt_bytes, by_day, machine_id)
SELECT *, %(machine_id)s
FROM unnest(%(segment)s::text[], %(events)s::int[], %(inserted)s::int[], %(duplicates)s::int[],
            %(quarantined)s::int[], %(corrupt_bytes)s::bigint[], %(by_day)s::jsonb[])
ON CONFLICT (segment) DO UPDATE
SET inserted = usage_segments.inserted + EXCLUDED.inserted,
    by_day = (SELECT jsonb_object_agg(day, n) FROM (
                  SELECT key AS day, sum(value::bigint) AS n
                  FROM (SELECT * FROM jsonb_each_text(usage_segments.by_day)
                        UNION ALL SELECT * FROM jsonb_each_text(EXCLUDED.by_day)) AS both_of_them
                  GROUP BY key) AS added)
WHERE EXCLUDED.inserted > 0;

-- name: partitions_list
-- Every table named as a day of usage_events, and whether it is one now.
SELECT to_date(right(c.relname, 8), 'YYYYMMDD') AS day,
       CASE WHEN i.inhrelid IS NULL THEN 'detached' WHEN i.inhdetachpending THEN 'pending' ELSE 'attached' END AS state
FROM pg_class c
LEFT JOIN pg_inherits i ON i.inhrelid = c.oid AND i.inhparent = 'usage_events'::regclass
WHERE c.relname ~ '^usage_events_[0-9]{8}$' AND c.relkind = 'r'
AND c.relnamespace = (SELECT relnamespace FROM pg_class WHERE oid = 'usage_events'::regclass);

-- name: partition_size
SELECT pg_total_relation_size(to_regclass(%(table)s)) AS size_bytes;

-- name: partitions_lock
-- Held to the end of the transaction by whoever attaches, creates or drops a day.
SELECT pg_advisory_xact_lock(x'656E6772616D01'::bigint);

-- name: retention_lock
-- One run at a time drops days.
SELECT pg_try_advisory_xact_lock(x'656E6772616D02'::bigint) AS locked;

-- name: usage_days_dropped
SELECT day, events, size_bytes FROM usage_days_dropped WHERE day = ANY (%(days)s::date[]);

-- name: usage_segments_expire
-- The audit of segments drained before the retention; in portions, so that no statement grows with the backlog.
DELETE FROM usage_segments WHERE segment IN (
    SELECT segment FROM usage_segments WHERE drained_at < %(before)s LIMIT 10000
);

-- name: quota_usage
-- Active tenants whose plan limits anything: the limits, and this month's counts until now. In one snapshot with
-- which of the named segments these counts hold: what is in the others comes on top.
WITH limited AS (
    SELECT * FROM plans
    WHERE num_nonnulls(api_calls_soft, api_calls_hard, search_queries_soft, search_queries_hard,
                       memories_created_soft, memories_created_hard, storage_bytes_soft, storage_bytes_hard) > 0
), used AS (
    SELECT t.tenant_id, t.plan_id, coalesce(sum(d.api_calls), 0)::bigint AS api_calls,
           coalesce(sum(d.search_queries), 0)::bigint AS search_queries,
           coalesce(sum(d.memories_created), 0)::bigint AS memories_created
    FROM tenants t
    JOIN limited USING (plan_id)
    LEFT JOIN usage_daily d ON d.tenant_id = t.tenant_id AND d.bucket >= date_trunc('month', now(), 'UTC')
    WHERE t.state = 'active'
    GROUP BY t.tenant_id
), drained AS (
    SELECT coalesce(array_agg(segment), '{}') AS segments
    FROM usage_segments WHERE segment = ANY (%(segments)s::text[])
)
SELECT used.tenant_id, used.api_calls, used.search_queries, used.memories_created, limited.*, drained.segments
FROM drained LEFT JOIN (used JOIN limited ON limited.plan_id = used.plan_id) ON true;

-- Keys of encrypted backups, and uploads under way (shared/keys.py, shared/backup.py)

-- name: backup_upload_begin
-- What this tenant's earlier uploads left, while this one is written down. Its commit is not waited for on the disk:
-- should PostgreSQL and the upload's process both die within half a second, the object is found as a stray.
-- Not of a tenant that is being deleted; `begun` says so, in a row of nulls when nothing was left.
WITH soon AS (SELECT set_config('synchronous_commit', 'off', true) AS set), begun AS (
    INSERT INTO backup_uploads (key, tenant_id, stored)
    SELECT %(key)s, t.tenant_id, %(stored)s::jsonb FROM soon, tenants t
    WHERE t.tenant_id = %(tenant_id)s AND t.state NOT IN ('deleting', 'deleted')
    ON CONFLICT (key) DO UPDATE SET stored = EXCLUDED.stored, started_at = clock_timestamp()
    RETURNING key
), earlier AS (
    SELECT key, stored, started_at FROM backup_uploads WHERE tenant_id = %(tenant_id)s AND key <> %(key)s
    ORDER BY key LIMIT 100
)
SELECT e.key, e.stored, e.started_at, EXISTS (SELECT 1 FROM begun) AS begun
FROM (SELECT 1) AS always LEFT JOIN earlier e ON true
ORDER BY e.key;

-- name: backup_uploads_left
SELECT key, stored, started_at FROM backup_uploads WHERE tenant_id = %(tenant_id)s ORDER BY key LIMIT 100;

-- name: backup_uploads_of_machine
SELECT DISTINCT u.tenant_id FROM backup_uploads u JOIN tenants t USING (tenant_id)
WHERE t.machine_id = %(machine_id)s AND t.state NOT IN ('deleting', 'deleted') ORDER BY u.tenant_id LIMIT 1000;

-- name: backup_upload_end
DELETE FROM backup_uploads WHERE key = %(key)s;

-- name: backup_uploads_erase
DELETE FROM backup_uploads WHERE tenant_id = %(tenant_id)s;

-- name: tenant_key_current
SELECT key_id, tenant_id, recipient, wrapped, master FROM tenant_keys
WHERE tenant_id = %(tenant_id)s AND retired_at IS NULL;

-- name: tenant_key_get
SELECT key_id, tenant_id, recipient, wrapped, master FROM tenant_keys WHERE key_id = %(key_id)s;

-- name: tenant_key_insert
-- Not of a tenant that is deleted meanwhile: FOR SHARE waits for that, or it waits for this.
INSERT INTO tenant_keys (key_id, tenant_id, recipient, wrapped, master)
SELECT %(key_id)s, tenant_id, %(recipient)s, %(wrapped)s, %(master)s
FROM tenants WHERE tenant_id = %(tenant_id)s AND state NOT IN ('deleting', 'deleted') FOR SHARE
ON CONFLICT (tenant_id) WHERE retired_at IS NULL DO NOTHING
RETURNING key_id, tenant_id, recipient, wrapped, master;

-- name: tenant_key_retire
UPDATE tenant_keys SET retired_at = clock_timestamp() WHERE tenant_id = %(tenant_id)s AND retired_at IS NULL;

-- name: tenant_keys_of_other_masters
SELECT key_id, tenant_id, recipient, wrapped, master FROM tenant_keys
WHERE master <> %(master)s AND (%(after)s::uuid IS NULL OR key_id > %(after)s::uuid)
ORDER BY key_id LIMIT 500;

-- name: tenant_key_rewrap
UPDATE tenant_keys SET wrapped = %(wrapped)s, master = %(master)s WHERE key_id = %(key_id)s AND master = %(was)s;

-- name: tenant_keys_count
SELECT count(*) AS count FROM tenant_keys WHERE master = %(master)s;

-- name: tenant_keys_list
SELECT k.key_id, k.tenant_id, k.recipient, k.master, k.created_at, k.retired_at,
       (SELECT count(*) FROM backups b
        WHERE b.tenant_id = k.tenant_id AND b.key_id = k.key_id AND b.status = 'available') AS backups
FROM tenant_keys k WHERE k.tenant_id = %(tenant_id)s ORDER BY k.created_at DESC, k.key_id DESC;

-- name: tenant_keys_erase
DELETE FROM tenant_keys WHERE tenant_id = %(tenant_id)s RETURNING key_id;

-- name: tenant_keys_erase_left
-- Of deleted tenants whose backups were kept, and are gone now.
DELETE FROM tenant_keys k USING tenants t
WHERE t.tenant_id = k.tenant_id AND t.state = 'deleted'
  AND NOT EXISTS (SELECT 1 FROM backups b WHERE b.tenant_id = k.tenant_id AND b.status <> 'deleted')
RETURNING k.tenant_id;

-- The books of usage: what is complete, what agrees, what was corrected by hand.

-- name: usage_by_bucket
-- A tenant's usage by hour or day, from the hours that begin in [from, to). Storage is a gauge: the last one stands.
SELECT date_trunc(%(granularity)s, bucket, 'UTC') AS bucket, sum(api_calls)::bigint AS api_calls,
       sum(search_queries)::bigint AS search_queries, sum(memories_created)::bigint AS memories_created,
       (array_agg(storage_bytes ORDER BY bucket DESC) FILTER (WHERE storage_bytes IS NOT NULL))[1] AS storage_bytes
FROM usage_hourly
WHERE tenant_id = %(tenant_id)s AND bucket >= %(from)s AND bucket < %(to)s
GROUP BY 1
ORDER BY 1;

-- name: usage_watermark_set
-- It goes back when an old segment was put into the spool again.
INSERT INTO usage_watermarks (machine_id, complete_until) VALUES (%(machine_id)s, %(complete_until)s)
ON CONFLICT (machine_id) DO UPDATE SET complete_until = EXCLUDED.complete_until, updated_at = clock_timestamp();

-- name: usage_watermark_of_tenant
-- `bound`: what machines that had the tenant before have of it, while that is less; `unknown`: one never said.
SELECT t.machine_id, w.complete_until, b.bound, b.unknown
FROM tenants t LEFT JOIN usage_watermarks w USING (machine_id)
CROSS JOIN LATERAL (
    SELECT min(s.complete_until) AS bound, coalesce(bool_or(s.machine_id IS NULL), false) AS unknown
    FROM moves m LEFT JOIN usage_watermarks s ON s.machine_id = m.source
    WHERE m.tenant_id = t.tenant_id AND m.source <> t.machine_id AND m.routed_at >= coalesce(s.complete_until, 'epoch')
) b
WHERE t.tenant_id = %(tenant_id)s;

-- name: usage_books_of_day
-- A UTC day (`day` is its midnight) from all sides, in one snapshot; hours are those of the ids.
WITH counted AS (
    SELECT tenant_id,
           to_timestamp((('x' || translate(left(request_id::text, 13), '-', ''))::bit(48)::bigint / 3600000) * 3600)
               AS bucket,
           count(*) AS events, sum(api_calls) AS api_calls, sum(search_queries) AS search_queries,
           sum(memories_created) AS memories_created
    FROM usage_events
    WHERE request_id >= usage_id_from(%(day)s) AND request_id < usage_id_from(%(day)s + interval '24 hours')
    GROUP BY 1, 2
), hours AS (
    SELECT tenant_id, coalesce(c.events, 0) AS events,
           coalesce(c.api_calls, 0) AS c1, coalesce(c.search_queries, 0) AS c2, coalesce(c.memories_created, 0) AS c3,
           coalesce(h.api_calls, 0) AS h1, coalesce(h.search_queries, 0) AS h2, coalesce(h.memories_created, 0) AS h3
    FROM counted c
    FULL JOIN (SELECT * FROM usage_hourly WHERE bucket >= %(day)s AND bucket < %(day)s + interval '24 hours') h
        USING (tenant_id, bucket)
), summed AS (
    SELECT tenant_id, sum(events) AS events, count(*) FILTER (WHERE (c1, c2, c3) <> (h1, h2, h3)) AS hours_differing,
           ARRAY[sum(c1), sum(c2), sum(c3)] AS of_events, ARRAY[sum(h1), sum(h2), sum(h3)] AS of_hours
    FROM hours GROUP BY tenant_id
), days AS (
    SELECT tenant_id, ARRAY[api_calls, search_queries, memories_created]::numeric[] AS of_day
    FROM usage_daily WHERE bucket = %(day)s
), books AS (
    SELECT tenant_id, coalesce(events, 0) AS events, coalesce(hours_differing, 0) AS hours_differing,
           coalesce(of_events, '{0,0,0}') AS of_events, coalesce(of_hours, '{0,0,0}') AS of_hours,
           coalesce(of_day, '{0,0,0}') AS of_day
    FROM summed FULL JOIN days USING (tenant_id)
), differing AS (
    SELECT * FROM books WHERE hours_differing > 0 OR of_events <> of_day
), audited AS (
    SELECT sum((by_day ->> %(day_text)s)::bigint) AS inserted, count(*) FILTER (WHERE by_day IS NULL) AS unaudited
    FROM usage_segments WHERE drained_at >= %(audited_from)s
)
SELECT (SELECT count(*) FROM books) AS tenants,
       (SELECT coalesce(sum(events), 0)::bigint FROM books) AS events,
       (SELECT count(*) FROM differing) AS tenants_differing,
       (SELECT jsonb_agg(jsonb_build_object('tenant_id', tenant_id, 'events', of_events, 'hourly', of_hours,
                                            'daily', of_day, 'hours_differing', hours_differing) ORDER BY tenant_id)
        FROM (SELECT * FROM differing ORDER BY tenant_id LIMIT %(limit)s) AS first_ones) AS differences,
       coalesce(audited.inserted, 0)::bigint AS audited, audited.unaudited,
       d.events AS dropped_events,
       ARRAY[d.api_calls, d.search_queries, d.memories_created]::numeric[] AS dropped_sums,
       (SELECT ARRAY[coalesce(sum(of_day[1]), 0), coalesce(sum(of_day[2]), 0), coalesce(sum(of_day[3]), 0)] FROM days)
           AS daily_sums
FROM audited LEFT JOIN usage_days_dropped d ON d.day = %(day_text)s::date;

-- name: usage_known_ids
SELECT request_id FROM usage_events WHERE request_id = ANY (%(request_id)s::uuid[]);

-- name: usage_set_aside_between
-- What drains set aside in [from, to), by tenant and cause.
SELECT tenant_id, reason, count(*) AS events FROM usage_quarantine
WHERE quarantined_at >= %(from)s AND quarantined_at < %(to)s
GROUP BY 1, 2 ORDER BY 1, 2 LIMIT %(limit)s;

-- name: usage_held_of_lives
-- What drained segments of these lives of workers held, by tenant and day; `beside` are on disk and counted there.
-- Names of segments begin with their creation.
SELECT t.key AS tenant_id, d.key::date AS day, sum(t.value::bigint)::bigint AS events
FROM usage_held h
JOIN unnest(%(pid)s::text[], %(since)s::text[]) AS life (pid, since)
    ON split_part(h.segment, '-', 2) = life.pid AND h.segment >= life.since
CROSS JOIN jsonb_each(h.held) AS d
CROSS JOIN jsonb_each_text(d.value) AS t
WHERE h.machine_id = %(machine_id)s AND h.drained_at >= %(from)s AND h.segment <> ALL (%(beside)s::text[])
AND d.key = ANY (%(days)s::text[])
GROUP BY 1, 2;

-- name: usage_held_discard
-- Segments that were examined and are not to be billed: they are accounted for like drained ones.
INSERT INTO usage_held (segment, machine_id, held)
SELECT segment, %(machine_id)s, held FROM unnest(%(segment)s::text[], %(held)s::jsonb[]) AS h (segment, held)
ON CONFLICT (segment) DO NOTHING;

-- name: usage_held_expire
DELETE FROM usage_held WHERE segment IN (
    SELECT segment FROM usage_held WHERE drained_at < %(before)s LIMIT 10000
);

-- name: usage_rollups_repair_hourly
-- The hours of a day anew from its events; only those that differ. The tables are locked by the caller.
INSERT INTO usage_hourly AS into_ (tenant_id, bucket, api_calls, search_queries, memories_created)
SELECT tenant_id, bucket, coalesce(c.api_calls, 0), coalesce(c.search_queries, 0), coalesce(c.memories_created, 0)
FROM (
    SELECT tenant_id,
           to_timestamp((('x' || translate(left(request_id::text, 13), '-', ''))::bit(48)::bigint / 3600000) * 3600)
               AS bucket,
           sum(api_calls) AS api_calls, sum(search_queries) AS search_queries, sum(memories_created) AS memories_created
    FROM usage_events
    WHERE request_id >= usage_id_from(%(day)s) AND request_id < usage_id_from(%(day)s + interval '24 hours')
    GROUP BY 1, 2
) c
FULL JOIN (SELECT * FROM usage_hourly WHERE bucket >= %(day)s AND bucket < %(day)s + interval '24 hours') h
    USING (tenant_id, bucket)
WHERE (coalesce(c.api_calls, 0), coalesce(c.search_queries, 0), coalesce(c.memories_created, 0))
   <> (coalesce(h.api_calls, 0), coalesce(h.search_queries, 0), coalesce(h.memories_created, 0))
ORDER BY 1, 2
ON CONFLICT (tenant_id, bucket) DO UPDATE
SET api_calls = EXCLUDED.api_calls, search_queries = EXCLUDED.search_queries,
    memories_created = EXCLUDED.memories_created
RETURNING tenant_id;

-- name: usage_rollups_repair_daily
-- The day from its hours.
INSERT INTO usage_daily AS into_ (tenant_id, bucket, api_calls, search_queries, memories_created)
SELECT tenant_id, %(day)s, coalesce(h.api_calls, 0), coalesce(h.search_queries, 0), coalesce(h.memories_created, 0)
FROM (
    SELECT tenant_id, sum(api_calls) AS api_calls, sum(search_queries) AS search_queries,
           sum(memories_created) AS memories_created
    FROM usage_hourly WHERE bucket >= %(day)s AND bucket < %(day)s + interval '24 hours' GROUP BY tenant_id
) h
FULL JOIN (SELECT * FROM usage_daily WHERE bucket = %(day)s) d USING (tenant_id)
WHERE (coalesce(h.api_calls, 0), coalesce(h.search_queries, 0), coalesce(h.memories_created, 0))
   <> (coalesce(d.api_calls, 0), coalesce(d.search_queries, 0), coalesce(d.memories_created, 0))
ORDER BY 1
ON CONFLICT (tenant_id, bucket) DO UPDATE
SET api_calls = EXCLUDED.api_calls, search_queries = EXCLUDED.search_queries,
    memories_created = EXCLUDED.memories_created
RETURNING tenant_id;

-- name: usage_correction_insert
INSERT INTO usage_corrections (kind, reason, requested_by, details)
VALUES (%(kind)s, %(reason)s, %(requested_by)s, %(details)s)
RETURNING correction_id;

-- name: usage_segments_named
SELECT segment, events, inserted, duplicates, quarantined FROM usage_segments
WHERE segment = ANY (%(segments)s::text[]);

-- Fleet: backups of all tenants of one machine (shared/fleet.py).

-- name: fleet_run_begin
-- The same run again goes on with what it did not finish, and stays forced.
INSERT INTO fleet_runs (run_id, machine_id, shard, shards, kind, flow_run_id, whole, force)
VALUES (%(run_id)s, %(machine_id)s, %(shard)s, %(shards)s, %(kind)s, %(flow_run_id)s, %(whole)s, %(force)s)
ON CONFLICT (run_id, machine_id, shard, shards)
DO UPDATE SET finished_at = NULL, flow_run_id = EXCLUDED.flow_run_id, force = fleet_runs.force OR EXCLUDED.force
RETURNING force;

-- name: fleet_run_finish
UPDATE fleet_runs
SET finished_at = clock_timestamp(), made = %(made)s, skipped = %(skipped)s, failed = %(failed)s
WHERE run_id = %(run_id)s AND machine_id = %(machine_id)s AND shard = %(shard)s AND shards = %(shards)s;

-- name: fleet_run_newest
-- The newest run over all tenants of a machine, or of one shard; with all shards of it that were begun.
SELECT run_id, shards, bool_or(force) AS force, bool_or(finished_at IS NULL OR failed > 0) AS unfinished
FROM fleet_runs
WHERE machine_id = %(machine_id)s AND whole
  AND (%(shard)s::int IS NULL OR (shard = %(shard)s::int AND shards = %(shards)s::int))
GROUP BY run_id, shards
ORDER BY max(started_at) DESC LIMIT 1;

-- name: fleet_tenants
-- A machine's tenants with their last good backup and the mark beside it; those longest without a true one first.
SELECT t.tenant_id, m.fingerprint, m.run_id, m.backup_id AS marked_backup_id,
       b.backup_id, b.ts, b.key, b.sha256, b.size_bytes, b.packing,
       b.key_id IS NULL OR EXISTS (
           SELECT 1 FROM tenant_keys k WHERE k.key_id = b.key_id AND k.retired_at IS NULL) AS key_current
FROM tenants t
LEFT JOIN backup_marks m ON m.tenant_id = t.tenant_id
LEFT JOIN LATERAL (
    SELECT backup_id, ts, key, sha256, size_bytes, packing, key_id, current_at FROM backups
    WHERE tenant_id = t.tenant_id AND status = 'available' AND verified_at IS NOT NULL AND kind <> 'safety'
    ORDER BY ts DESC LIMIT 1
) b ON true
WHERE t.machine_id = %(machine_id)s AND t.state IN ('active', 'suspended')
  AND (%(tenant_ids)s::text[] IS NULL OR t.tenant_id = ANY (%(tenant_ids)s::text[]))
ORDER BY coalesce(b.current_at, b.ts) NULLS FIRST, t.tenant_id;

-- name: backups_of_flow_run
SELECT tenant_id, backup_id, key, sha256, size_bytes FROM backups
WHERE flow_run_id = %(flow_run_id)s
  AND (%(tenant_ids)s::text[] IS NULL OR tenant_id = ANY (%(tenant_ids)s::text[]))
ORDER BY tenant_id;

-- name: fleet_machines
SELECT machine_id, count(*) AS tenants FROM tenants WHERE state IN ('active', 'suspended')
GROUP BY machine_id ORDER BY machine_id;

-- name: backup_mark
-- Tenants whose database is what the backup holds, seen at `checked_at`. Returns those whose backup can still be
-- trusted; for the others nothing is written. A machine's clock that is ahead makes nothing younger than it is.
WITH seen AS (
    SELECT * FROM unnest(%(tenant_ids)s::text[], %(backup_ids)s::uuid[], %(fingerprints)s::text[],
                         %(checked_at)s::timestamptz[]) AS s (tenant_id, backup_id, fingerprint, checked_at)
), trusted AS (
    UPDATE backups b SET current_at = greatest(b.current_at, least(s.checked_at, clock_timestamp()))
    FROM seen s
    WHERE b.backup_id = s.backup_id AND b.tenant_id = s.tenant_id AND b.status = 'available'
      AND b.verified_at IS NOT NULL
    RETURNING s.tenant_id, s.backup_id, s.fingerprint, s.checked_at
)
INSERT INTO backup_marks AS m (tenant_id, backup_id, fingerprint, run_id, checked_at)
SELECT tenant_id, backup_id, fingerprint, %(run_id)s, checked_at FROM trusted ORDER BY tenant_id
ON CONFLICT (tenant_id) DO UPDATE
SET backup_id = EXCLUDED.backup_id, fingerprint = EXCLUDED.fingerprint, run_id = EXCLUDED.run_id,
    checked_at = EXCLUDED.checked_at
RETURNING m.tenant_id;

-- Retention of backups (shared/retention.py decides, shared/expiry.py deletes).

-- name: retention_tenants
SELECT tenant_id FROM tenants WHERE tenant_id > %(after)s ORDER BY tenant_id LIMIT %(limit)s;

-- name: retention_lock_backups
-- Before a decision is carried out: nobody marks these corrupt, restores from them or changes the tenant meanwhile.
-- FOR UPDATE, so that a restore's row, whose foreign key locks its backup, is either seen or waits.
WITH owners AS (
    SELECT tenant_id FROM tenants WHERE tenant_id = ANY (%(tenant_ids)s::text[]) ORDER BY tenant_id FOR SHARE
)
SELECT b.backup_id FROM backups b
WHERE b.tenant_id IN (SELECT tenant_id FROM owners) AND b.status IN ('available', 'corrupt')
ORDER BY b.backup_id FOR UPDATE;

-- name: retention_rows
-- The backups of some tenants that are there, each with its tenant, its plan and what needs it. One row with nulls
-- for a tenant without any.
SELECT t.tenant_id, t.plan_id, p.plan_id IS NOT NULL AS plan_known, p.backups_last AS last,
       p.backups_hourly AS hourly, p.backups_daily AS daily, p.backups_weekly AS weekly,
       p.backups_monthly AS monthly, p.backups_yearly AS yearly, p.backups_safety_days AS safety_days,
       CASE WHEN t.state = 'deleted' THEN t.updated_at END AS deleted_at, clock_timestamp() AS now,
       b.backup_id, b.ts, b.created_at AS entered_at, b.kind, b.status, b.verified_at, b.status_at,
       CASE WHEN r.backup_id IS NOT NULL THEN 'a restore is running'
            WHEN b.held_until > clock_timestamp() THEN coalesce(b.hold_reason, 'by hand') END AS held
FROM tenants t
LEFT JOIN plans p USING (plan_id)
LEFT JOIN backups b ON b.tenant_id = t.tenant_id AND b.status IN ('available', 'corrupt')
LEFT JOIN (SELECT DISTINCT backup_id FROM restores WHERE state = 'running') r ON r.backup_id = b.backup_id
WHERE t.tenant_id = ANY (%(tenant_ids)s::text[])
ORDER BY t.tenant_id;

-- name: backups_mark_deleting
UPDATE backups b
SET status = 'deleting', status_before = b.status, status_reason = m.reason, status_at = clock_timestamp(),
    delete_error = NULL
FROM unnest(%(backup_ids)s::uuid[], %(reasons)s::text[]) AS m (backup_id, reason)
WHERE b.backup_id = m.backup_id AND b.status IN ('available', 'corrupt')
RETURNING b.backup_id;

-- name: backups_deleting
SELECT backup_id FROM backups
WHERE status = 'deleting' AND (%(after)s::uuid IS NULL OR backup_id > %(after)s::uuid)
ORDER BY backup_id LIMIT %(limit)s;

-- name: backup_deleting_lock
-- One that is to go, for this run alone; and whether its tenant can still do without it.
SELECT b.backup_id, b.tenant_id, b.key, b.status_before,
       coalesce(b.held_until > clock_timestamp(), false) AS held,
       t.state IN ('deleting', 'deleted') OR EXISTS (
           SELECT 1 FROM backups g
           WHERE g.tenant_id = b.tenant_id AND g.status = 'available' AND g.verified_at IS NOT NULL
             AND (g.kind <> 'safety' OR b.kind = 'safety' OR b.status_before = 'corrupt')
       ) AS expendable
FROM backups b JOIN tenants t USING (tenant_id)
WHERE b.backup_id = %(backup_id)s AND b.status = 'deleting'
FOR NO KEY UPDATE OF b SKIP LOCKED;

-- name: backup_deleted
UPDATE backups SET status = 'deleted', status_at = clock_timestamp(), delete_error = NULL
WHERE backup_id = %(backup_id)s AND status = 'deleting';

-- name: backup_delete_failed
UPDATE backups SET delete_error = %(error)s WHERE backup_id = %(backup_id)s AND status = 'deleting';

-- name: backup_taken_back
UPDATE backups
SET status = %(status)s, status_before = NULL, status_reason = %(reason)s, status_at = clock_timestamp(),
    delete_error = NULL,
    verified_at = CASE WHEN %(status)s = 'available' THEN clock_timestamp() ELSE verified_at END
WHERE backup_id = %(backup_id)s AND status = 'deleting';

-- name: backup_hold
-- Keep a backup that is there until a time at least; a longer hold stands.
UPDATE backups SET held_until = greatest(held_until, %(until)s), hold_reason = %(reason)s
WHERE backup_id = %(backup_id)s AND status = 'available'
RETURNING backup_id;

-- name: backups_stale
-- Tenants, suspended ones too, or one, whose last good backup is older than that, the worst first: those behind `backup_age_seconds`.
SELECT tenant_id, machine_id, backup_id, good_at, EXTRACT(EPOCH FROM clock_timestamp() - since)::float8 AS age_seconds
FROM (
    SELECT t.tenant_id, t.machine_id, b.backup_id, greatest(least(b.ts, b.created_at), b.current_at) AS good_at,
           coalesce(greatest(least(b.ts, b.created_at), b.current_at), t.created_at) AS since
    FROM tenants t
    LEFT JOIN LATERAL (
        SELECT backup_id, ts, created_at, current_at FROM backups
        WHERE tenant_id = t.tenant_id AND status = 'available' AND verified_at IS NOT NULL AND kind <> 'safety'
        ORDER BY ts DESC LIMIT 1) b ON true
    WHERE t.state IN ('active', 'suspended') AND (%(tenant_id)s::text IS NULL OR t.tenant_id = %(tenant_id)s::text)
) AS last_good
WHERE since < clock_timestamp() - make_interval(secs => %(older_than_seconds)s)
ORDER BY since, tenant_id LIMIT %(limit)s;

-- name: backups_corrupt_newest
-- Tenants, suspended ones too, or one, whose newest backup is corrupt or missing: the older one, if any, is all a restore could take.
SELECT t.tenant_id, n.key
FROM tenants t
JOIN LATERAL (
    SELECT key, status FROM backups
    WHERE tenant_id = t.tenant_id AND status IN ('available', 'corrupt') AND kind <> 'safety'
    ORDER BY ts DESC LIMIT 1) n ON n.status = 'corrupt'
WHERE t.state IN ('active', 'suspended') AND (%(tenant_id)s::text IS NULL OR t.tenant_id = %(tenant_id)s::text)
ORDER BY t.tenant_id LIMIT %(limit)s;

-- Objects without a row (shared/strays.py).

-- name: strays_of
-- Of these keys those the catalogue does not know, or calls deleted; `needed`: their tenant has no good backup.
SELECT k.key, b.status, u.key IS NOT NULL AS uploading, t.tenant_id IS NOT NULL AS tenant_known,
       coalesce(t.state IN ('deleting', 'deleted'), false) AS tenant_leaving,
       -- At once after a deletion that erased everything; beside kept backups as long as they are kept.
       coalesce(t.state = 'deleted' AND (
           t.updated_at < clock_timestamp() - make_interval(days => %(deleted_days)s)
           OR (SELECT d.erased FROM tenant_deletions d WHERE d.tenant_id = t.tenant_id
               ORDER BY d.started_at DESC LIMIT 1)), false) AS tenant_gone,
       (SELECT max(d.finished_at) FROM tenant_deletions d WHERE d.tenant_id = t.tenant_id AND d.erased) AS erased_at,
       coalesce(t.state NOT IN ('deleting', 'deleted'), false) AND NOT EXISTS (
           SELECT 1 FROM backups g
           WHERE g.tenant_id = k.tenant_id AND g.status = 'available' AND g.verified_at IS NOT NULL) AS needed
FROM unnest(%(keys)s::text[], %(tenant_ids)s::text[]) AS k (key, tenant_id)
LEFT JOIN backups b ON b.key = k.key
LEFT JOIN backup_uploads u ON u.key = k.key
LEFT JOIN tenants t ON t.tenant_id = k.tenant_id
WHERE b.key IS NULL OR b.status = 'deleted'
ORDER BY k.key;

-- name: backup_undeleted
UPDATE backups SET status = 'corrupt', status_at = clock_timestamp(),
       status_reason = 'its row said deleted, its object is there and the tenant has no good one'
WHERE key = %(key)s AND status = 'deleted';

-- name: tenant_key_ids
SELECT key_id FROM tenant_keys WHERE tenant_id = %(tenant_id)s ORDER BY created_at DESC;

-- name: backup_adopted
UPDATE backups SET status_reason = 'adopted: the object had no row', status_at = clock_timestamp()
WHERE backup_id = %(backup_id)s;

-- Verification of stored backups (shared/verify.py).

-- name: verify_count
SELECT count(*) AS available FROM backups WHERE status = 'available';

-- name: verify_oldest
-- The share; beside it corrupt ones, found last first, and as many as the share that could not be read, tried longest
-- ago first. These come last: nothing waits for them.
(SELECT backup_id, tenant_id, ts, schema_version, size_bytes, stored_bytes, sha256,
        coalesce(stored_sha256, sha256) AS stored_sha256, packing, key_id, key, kind, status, manifest,
        verified_at, created_at
 FROM backups WHERE status = 'available' AND unread_at IS NULL ORDER BY verified_at NULLS FIRST LIMIT %(limit)s)
UNION ALL
(SELECT backup_id, tenant_id, ts, schema_version, size_bytes, stored_bytes, sha256,
        coalesce(stored_sha256, sha256) AS stored_sha256, packing, key_id, key, kind, status, manifest,
        verified_at, created_at
 FROM backups WHERE status = 'corrupt' ORDER BY status_at DESC NULLS LAST LIMIT 100)
UNION ALL
(SELECT backup_id, tenant_id, ts, schema_version, size_bytes, stored_bytes, sha256,
        coalesce(stored_sha256, sha256) AS stored_sha256, packing, key_id, key, kind, status, manifest,
        verified_at, created_at
 FROM backups WHERE status = 'available' AND unread_at IS NOT NULL ORDER BY unread_at LIMIT %(limit)s);

-- name: backup_unread
UPDATE backups SET unread_at = clock_timestamp() WHERE backup_id = %(backup_id)s AND status = 'available';

-- name: backups_seen_last
-- Those that were last known to lie whole in the store.
SELECT key FROM backups WHERE status = 'available' AND verified_at IS NOT NULL
ORDER BY verified_at DESC NULLS LAST LIMIT %(limit)s;

-- name: backup_verified
-- Also of one that was found corrupt and reads whole again: what was damaged then was the way to it.
UPDATE backups
SET verified_at = clock_timestamp(), unread_at = NULL,
    status_at = CASE WHEN status = 'corrupt' THEN clock_timestamp() ELSE status_at END,
    status_reason = CASE WHEN status = 'corrupt' THEN 'read whole again; was: ' || coalesce(status_reason, 'corrupt')
                    ELSE status_reason END,
    status = 'available'
WHERE backup_id = %(backup_id)s AND status IN ('available', 'corrupt');

-- name: backup_found_corrupt
UPDATE backups SET status = 'corrupt', status_at = clock_timestamp(), status_reason = %(reason)s
WHERE backup_id = %(backup_id)s AND status = 'available';

-- Deletion of tenants (shared/deletion.py).

-- name: tenant_holds
SELECT backup_id, coalesce(hold_reason, 'by hand') AS hold_reason FROM backups
WHERE tenant_id = %(tenant_id)s AND status <> 'deleted' AND held_until > clock_timestamp() LIMIT 1;

-- name: tenant_set_deleting
-- A deleted one too: its kept backups are to go now.
UPDATE tenants SET state = 'deleting', updated_at = clock_timestamp() WHERE tenant_id = %(tenant_id)s;

-- name: tenant_set_deleted
UPDATE tenants SET state = 'deleted', updated_at = clock_timestamp()
WHERE tenant_id = %(tenant_id)s AND state = 'deleting';

-- name: tenant_reuse
-- Only of an id of which nothing is left.
UPDATE tenants t
SET state = 'creating', plan_id = %(plan_id)s, machine_id = %(machine_id)s, schema_version = %(schema_version)s,
    generation = 1, created_at = clock_timestamp(), updated_at = clock_timestamp()
WHERE t.tenant_id = %(tenant_id)s AND t.state = 'deleted'
  AND NOT EXISTS (SELECT 1 FROM backups b WHERE b.tenant_id = t.tenant_id AND b.status <> 'deleted')
  AND NOT EXISTS (SELECT 1 FROM tenant_keys k WHERE k.tenant_id = t.tenant_id);

-- name: tenant_deletion_open
SELECT deletion_id, inventory FROM tenant_deletions
WHERE tenant_id = %(tenant_id)s AND finished_at IS NULL FOR UPDATE;

-- name: tenant_deletion_begin
INSERT INTO tenant_deletions (deletion_id, tenant_id, reason, requested_by, keep_backups, inventory)
VALUES (%(deletion_id)s, %(tenant_id)s, %(reason)s, %(requested_by)s, %(keep_backups)s, %(inventory)s)
ON CONFLICT (deletion_id) DO UPDATE SET inventory = EXCLUDED.inventory, keep_backups = EXCLUDED.keep_backups
RETURNING deletion_id, tenant_id, reason, requested_by, keep_backups, inventory, started_at;

-- name: tenant_deletion_finish
UPDATE tenant_deletions
SET receipt = %(receipt)s, receipt_sha256 = %(receipt_sha256)s, erased = %(erased)s, finished_at = clock_timestamp()
WHERE deletion_id = %(deletion_id)s;

-- name: restores_close_deleted
-- The deletion holds the tenant's mutex: whoever ran these is gone.
UPDATE restores SET state = 'failed', error = 'the tenant was deleted', finished_at = clock_timestamp()
WHERE tenant_id = %(tenant_id)s AND state = 'running';

-- name: backups_of_deleted
UPDATE backups
SET status_before = status, status = 'deleting', status_reason = 'tenant deleted', status_at = clock_timestamp()
WHERE tenant_id = %(tenant_id)s AND status IN ('available', 'corrupt');

-- name: backups_deleting_of
SELECT key FROM backups WHERE tenant_id = %(tenant_id)s AND status = 'deleting' ORDER BY key;

-- name: backup_deleted_by_key
UPDATE backups SET status = 'deleted', status_at = clock_timestamp(), delete_error = NULL
WHERE key = %(key)s AND status <> 'deleted';

-- Service levels (shared/slo_report.py).

-- name: slo_usage_top
-- Who used most: the tenants with most billed calls in the days that begin in [from, to), and everybody's sum beside.
SELECT tenant_id, sum(api_calls)::bigint AS api_calls, sum(search_queries)::bigint AS search_queries,
       sum(memories_created)::bigint AS memories_created,
       (array_agg(storage_bytes ORDER BY bucket DESC) FILTER (WHERE storage_bytes IS NOT NULL))[1] AS storage_bytes,
       (sum(sum(api_calls)) OVER ())::bigint AS api_calls_of_all, count(*) OVER () AS tenants
FROM usage_daily
WHERE bucket >= %(from)s AND bucket < %(to)s
GROUP BY tenant_id
ORDER BY sum(api_calls) DESC, tenant_id LIMIT %(limit)s;

-- name: slo_backup_ages
-- RPO: what each tenant, a suspended one too, would lose now, in seconds; the ages of `backups_stale`, of all tenants.
WITH ages AS (
    SELECT b.backup_id, greatest(EXTRACT(EPOCH FROM clock_timestamp()
               - coalesce(greatest(least(b.ts, b.created_at), b.current_at), t.created_at)), 0)::float8 AS age
    FROM tenants t
    LEFT JOIN LATERAL (
        SELECT backup_id, ts, created_at, current_at FROM backups
        WHERE tenant_id = t.tenant_id AND status = 'available' AND verified_at IS NOT NULL AND kind <> 'safety'
        ORDER BY ts DESC LIMIT 1) b ON true
    WHERE t.state IN ('active', 'suspended')
)
SELECT count(*) AS tenants, count(*) FILTER (WHERE backup_id IS NULL) AS never,
       count(*) FILTER (WHERE age > %(older_than_seconds)s) AS stale,
       percentile_cont(ARRAY[0.5, 0.95, 1]) WITHIN GROUP (ORDER BY age) AS quantiles,
       ARRAY[count(*) FILTER (WHERE age < 3600),
             count(*) FILTER (WHERE age >= 3600 AND age < 21600),
             count(*) FILTER (WHERE age >= 21600 AND age < 43200),
             count(*) FILTER (WHERE age >= 43200 AND age < 93600),
             count(*) FILTER (WHERE age >= 93600 AND age < 172800),
             count(*) FILTER (WHERE age >= 172800)] AS buckets
FROM ages;

-- name: slo_drills
-- Restore tests since: outcomes, and of those that passed the median, the 95th percentile and the longest of each part
-- in ms.
SELECT count(*) FILTER (WHERE outcome = 'pass') AS passed, count(*) FILTER (WHERE outcome = 'fail') AS failed,
       count(*) FILTER (WHERE outcome = 'inconclusive') AS inconclusive, max(finished_at) AS last_at,
       percentile_cont(ARRAY[0.5, 0.95, 1]) WITHIN GROUP (ORDER BY download_ms) FILTER (WHERE outcome = 'pass') AS download,
       percentile_cont(ARRAY[0.5, 0.95, 1]) WITHIN GROUP (ORDER BY decrypt_ms) FILTER (WHERE outcome = 'pass') AS decrypt,
       percentile_cont(ARRAY[0.5, 0.95, 1]) WITHIN GROUP (ORDER BY verify_ms) FILTER (WHERE outcome = 'pass') AS verify,
       percentile_cont(ARRAY[0.5, 0.95, 1]) WITHIN GROUP (ORDER BY smoke_ms) FILTER (WHERE outcome = 'pass') AS smoke,
       percentile_cont(ARRAY[0.5, 0.95, 1]) WITHIN GROUP (ORDER BY rto_ms) FILTER (WHERE outcome = 'pass') AS total
FROM restore_tests WHERE finished_at >= %(from)s;

-- name: slo_restores
-- Restores since, by how they ended, with the longest time writes were held in ms.
SELECT state, count(*) AS restores, max(locked_ms) AS locked_ms FROM restores
WHERE created_at >= %(from)s GROUP BY state ORDER BY state;

-- name: action_put
-- A row as it begins, or as it ends. One that has ended stays as it is.
INSERT INTO actions (action_id, action, kind, tenant_id, machine_id, door, requested_by, who, reason, arguments,
                     ttl_seconds, dry_run, state, verified, before, after, undo, expires_at, error, flow_run_id,
                     begun_at, finished_at)
VALUES (%(action_id)s, %(action)s, %(kind)s, %(tenant_id)s, %(machine_id)s, %(door)s, %(requested_by)s, %(who)s,
        %(reason)s, %(arguments)s, %(ttl_seconds)s, %(dry_run)s, %(state)s, %(verified)s, %(before)s, %(after)s,
        %(undo)s, %(expires_at)s, %(error)s, %(flow_run_id)s, %(begun_at)s, %(finished_at)s)
ON CONFLICT (action_id) DO UPDATE
SET state = excluded.state, verified = excluded.verified, before = excluded.before, after = excluded.after,
    undo = excluded.undo, expires_at = excluded.expires_at, error = excluded.error, finished_at = excluded.finished_at
WHERE actions.state = 'begun';

-- name: actions_lock
-- Until the transaction ends nobody else counts or begins an action by itself.
SELECT pg_advisory_xact_lock(%(lock)s);

-- name: actions_by_themselves
-- Reversible actions that no person asked for, begun within the last hour.
SELECT count(*) AS actions FROM actions
WHERE requested_by = 'automation' AND kind = 'reversible' AND NOT dry_run AND state <> 'refused'
  AND begun_at > clock_timestamp() - interval '1 hour';

-- name: action_get
SELECT * FROM actions WHERE action_id = %(action_id)s;

-- name: action_history
-- Newest first. `interrupted`: begun, not finished, and too old to be under way.
SELECT *, state = 'begun' AND begun_at < clock_timestamp() - interval '10 minutes' AS interrupted
FROM actions
WHERE (%(tenant_id)s::text IS NULL OR tenant_id = %(tenant_id)s)
  AND (%(action)s::text IS NULL OR action = %(action)s)
ORDER BY begun_at DESC, action_id DESC LIMIT %(limit)s;

-- Moves of a tenant between machines (shared/move.py).

-- name: move_begin
-- Nothing is returned when another move of the tenant is open, or it is not on `source` any more.
INSERT INTO moves (move_id, tenant_id, source, target, state, requested_by, reason, flow_run_id)
SELECT %(move_id)s, tenant_id, %(source)s, %(target)s, 'copying', %(requested_by)s, %(reason)s, %(flow_run_id)s
FROM tenants
WHERE tenant_id = %(tenant_id)s AND machine_id = %(source)s AND state IN ('active', 'suspended')
ON CONFLICT (tenant_id) WHERE state NOT IN ('done', 'undone')
DO UPDATE SET state = moves.state WHERE moves.move_id = EXCLUDED.move_id  -- our own insert, whose reply was lost
RETURNING move_id;

-- name: move_get
SELECT move_id, tenant_id, source, target, state, first_backup_id, final_backup_id, fence_epoch, from_generation,
       to_generation, memories, size_bytes, held_ms, error, created_at, held_at, routed_at, finished_at, remove_after,
       removed_at
FROM moves WHERE move_id = %(move_id)s;

-- name: move_by_flow_run
SELECT move_id FROM moves WHERE flow_run_id = %(flow_run_id)s ORDER BY created_at DESC LIMIT 1;

-- name: move_of_tenant
-- The tenant's newest move that is over or open.
SELECT move_id, source, target, state, routed_at, remove_after, removed_at FROM moves
WHERE tenant_id = %(tenant_id)s AND state <> 'undone' ORDER BY created_at DESC LIMIT 1;

-- name: move_window
-- The median of how long the last moves of this fleet held writes, in ms; null before the first.
SELECT percentile_cont(0.5) WITHIN GROUP (ORDER BY held_ms) AS held_ms
FROM (SELECT held_ms FROM moves WHERE held_ms IS NOT NULL ORDER BY created_at DESC LIMIT 50) AS last_ones;

-- name: move_step
-- One state further; twice is once, for a reply may be lost.
UPDATE moves
SET state = %(state)s,
    first_backup_id = coalesce(%(first_backup_id)s, first_backup_id),
    final_backup_id = coalesce(%(final_backup_id)s, final_backup_id),
    fence_epoch = coalesce(%(epoch)s, fence_epoch),
    from_generation = coalesce(%(from_generation)s, from_generation),
    to_generation = coalesce(%(to_generation)s, to_generation),
    memories = coalesce(%(memories)s, memories),
    size_bytes = coalesce(%(size_bytes)s, size_bytes),
    held_at = CASE WHEN %(state)s = 'held' THEN coalesce(held_at, clock_timestamp()) ELSE held_at END
WHERE move_id = %(move_id)s AND state IN (%(from_state)s, %(state)s)
RETURNING state;

-- name: move_lease
-- Whether the run that would route still has the lease, and keeps it until this transaction ends.
SELECT epoch FROM maintenance_locks
WHERE tenant_id = %(tenant_id)s AND epoch = %(epoch)s AND holder = %(holder)s AND expires_at > clock_timestamp()
FOR SHARE;

-- name: move_routed
UPDATE moves SET state = 'routed', routed_at = clock_timestamp() WHERE move_id = %(move_id)s AND state = 'ready'
RETURNING target, to_generation;

-- name: move_tenant
-- The one statement that changes who serves a tenant.
UPDATE tenants
SET machine_id = %(target)s, generation = %(generation)s, updated_at = clock_timestamp()
WHERE tenant_id = %(tenant_id)s AND machine_id = %(source)s AND state IN ('active', 'suspended')
RETURNING tenant_id;

-- name: move_undo
-- Only of one that is not routed: who gets the row's lock first, this or `move_routed`, decides.
UPDATE moves SET state = 'undone', error = %(error)s, finished_at = clock_timestamp()
WHERE move_id = %(move_id)s AND state NOT IN ('routed', 'done', 'undone');

-- name: move_done
UPDATE moves
SET state = 'done', finished_at = clock_timestamp(),
    remove_after = clock_timestamp() + make_interval(secs => %(seconds)s)
WHERE move_id = %(move_id)s AND state = 'routed'
RETURNING move_id;

-- name: move_held
UPDATE moves SET held_ms = %(held_ms)s WHERE move_id = %(move_id)s AND held_ms IS NULL;

-- name: moves_open_on
-- Open moves that this machine has a part in. A target that has not begun its own has nothing to give up.
SELECT move_id, tenant_id FROM moves
WHERE state NOT IN ('done', 'undone')
  AND (source = %(machine_id)s OR (target = %(machine_id)s AND state NOT IN ('copying', 'copied')))
ORDER BY tenant_id;

-- name: moves_to_remove
-- Files of moved tenants that this machine kept for long enough, none of a tenant that is here or on its way.
SELECT m.move_id, m.tenant_id FROM moves m JOIN tenants t USING (tenant_id)
WHERE m.source = %(machine_id)s AND m.state = 'done' AND m.removed_at IS NULL AND m.remove_after < clock_timestamp()
  AND t.machine_id <> %(machine_id)s
  AND NOT EXISTS (SELECT 1 FROM moves o WHERE o.tenant_id = m.tenant_id AND o.target = %(machine_id)s
                                          AND o.state NOT IN ('done', 'undone'))
  AND (%(tenant_id)s::text IS NULL OR m.tenant_id = %(tenant_id)s::text)
ORDER BY m.tenant_id;

-- name: moves_removed
-- What a machine kept of a tenant from moves away from it is gone.
UPDATE moves SET removed_at = clock_timestamp()
WHERE tenant_id = %(tenant_id)s AND source = %(machine_id)s AND state = 'done' AND removed_at IS NULL;

-- name: moves_kept
-- Machines that keep files of a tenant that was moved away from them.
SELECT source, remove_after FROM moves
WHERE tenant_id = %(tenant_id)s AND state = 'done' AND removed_at IS NULL;

-- name: moves_hurry
-- What they keep is to go at the next sweep there.
UPDATE moves SET remove_after = least(remove_after, clock_timestamp())
WHERE tenant_id = %(tenant_id)s AND state = 'done' AND removed_at IS NULL;

-- name: moves_unsettled_books
-- The oldest move away from this machine whose last requests its watermark does not yet cover.
SELECT min(m.routed_at) AS routed_at
FROM moves m LEFT JOIN usage_watermarks w ON w.machine_id = m.source
WHERE m.source = %(machine_id)s AND m.routed_at > coalesce(w.complete_until, 'epoch');
