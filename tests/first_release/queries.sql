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

-- name: tenant_states
SELECT tenant_id, state FROM tenants;

-- name: backup_insert
INSERT INTO backups (backup_id, tenant_id, ts, schema_version, size_bytes, stored_bytes, sha256, key, kind,
                     status, manifest, flow_run_id, verified_at)
VALUES (%(backup_id)s, %(tenant_id)s, %(ts)s, %(schema_version)s, %(size_bytes)s, %(stored_bytes)s, %(sha256)s,
        %(key)s, %(kind)s, 'available', %(manifest)s, %(flow_run_id)s, clock_timestamp())
ON CONFLICT (key) DO NOTHING;

-- name: backup_get
SELECT backup_id, tenant_id, ts, schema_version, size_bytes, stored_bytes, sha256, key, kind, status, manifest,
       verified_at, created_at
FROM backups WHERE backup_id = %(backup_id)s;

-- name: backup_newest
SELECT backup_id, tenant_id, ts, schema_version, size_bytes, stored_bytes, sha256, key, kind, status, manifest,
       verified_at, created_at
FROM backups
WHERE tenant_id = %(tenant_id)s AND status = 'available' AND verified_at IS NOT NULL
  AND (%(at)s::timestamptz IS NULL OR ts <= %(at)s::timestamptz)
ORDER BY ts DESC LIMIT 1;

-- name: backup_list
SELECT backup_id, tenant_id, ts, schema_version, size_bytes, stored_bytes, sha256, key, kind, status, manifest,
       verified_at, created_at
FROM backups WHERE tenant_id = %(tenant_id)s ORDER BY ts DESC LIMIT %(limit)s;

-- name: backup_mark_corrupt
UPDATE backups SET status = 'corrupt' WHERE backup_id = %(backup_id)s AND status = 'available';

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

-- name: lease_held_count
SELECT count(*) FROM maintenance_locks WHERE holder IS NOT NULL;

-- name: restore_insert
INSERT INTO restores (restore_id, tenant_id, backup_id, kind, state, requested_by, reason, flow_run_id)
VALUES (%(restore_id)s, %(tenant_id)s, %(backup_id)s, %(kind)s, 'running', %(requested_by)s, %(reason)s,
        %(flow_run_id)s);

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
WHERE t.machine_id = %(machine_id)s
  AND (l.tenant_id IS NOT NULL
       OR r.created_at < clock_timestamp() - make_interval(secs => %(older_than_seconds)s))
ORDER BY t.tenant_id, r.created_at;

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
       error, created_at, finished_at
FROM restores WHERE flow_run_id = %(flow_run_id)s ORDER BY created_at DESC LIMIT 1;

-- name: drill_pick
SELECT t.tenant_id
FROM tenants t
JOIN LATERAL (
    SELECT 1 FROM backups b
    WHERE b.tenant_id = t.tenant_id AND b.status = 'available' AND b.verified_at IS NOT NULL LIMIT 1
) b ON true
LEFT JOIN LATERAL (
    SELECT max(d.finished_at) AS drilled_at FROM restore_tests d
    WHERE d.tenant_id = t.tenant_id AND d.outcome <> 'inconclusive'
) d ON true
WHERE t.state = 'active'
ORDER BY d.drilled_at ASC NULLS FIRST, t.created_at, t.tenant_id
LIMIT 1;

-- name: drill_insert
INSERT INTO restore_tests (test_id, tenant_id, backup_id, outcome, checks, rto_ms, rpo_seconds, flow_run_id,
                           started_at, finished_at)
VALUES (%(test_id)s, %(tenant_id)s, %(backup_id)s, %(outcome)s, %(checks)s, %(rto_ms)s, %(rpo_seconds)s,
        %(flow_run_id)s, %(started_at)s, clock_timestamp());

-- name: fleet_ages
SELECT
    (SELECT EXTRACT(EPOCH FROM clock_timestamp() - min(newest)) FROM (
        SELECT coalesce(max(b.ts), min(t.created_at)) AS newest
        FROM tenants t LEFT JOIN backups b ON b.tenant_id = t.tenant_id AND b.status = 'available'
        WHERE t.state = 'active' GROUP BY t.tenant_id) AS last_backup) AS backup_age_seconds,
    -- Before the first drill that passed: since the oldest tenant could have been drilled.
    (SELECT EXTRACT(EPOCH FROM clock_timestamp() - coalesce(
        (SELECT max(finished_at) FROM restore_tests WHERE outcome = 'pass'),
        (SELECT min(created_at) FROM tenants WHERE state = 'active')))) AS drill_age_seconds,
    (SELECT count(*) FROM maintenance_locks WHERE holder IS NOT NULL) AS maintenance_locks;

-- name: usage_insert
-- One statement: insert by request_id, and count into both rollups exactly the rows that were new. Every
-- INSERT is ordered by its key: unsorted overlapping batches deadlocked.
WITH inserted AS (
    INSERT INTO usage_events (request_id, tenant_id, route, status, api_calls, search_queries,
                              memories_created, ts)
    SELECT * FROM unnest(%(request_id)s::uuid[], %(tenant_id)s::text[], %(route)s::text[],
                         %(status)s::smallint[], %(api_calls)s::int[], %(search_queries)s::int[],
                         %(memories_created)s::int[], %(ts)s::timestamptz[])
    ORDER BY 1
    ON CONFLICT (request_id) DO NOTHING
    RETURNING tenant_id, ts, api_calls, search_queries, memories_created
), hourly AS (
    INSERT INTO usage_hourly (tenant_id, bucket, api_calls, search_queries, memories_created)
    SELECT tenant_id, date_trunc('hour', ts, 'UTC'), sum(api_calls), sum(search_queries), sum(memories_created)
    FROM inserted GROUP BY 1, 2 ORDER BY 1, 2
    ON CONFLICT (tenant_id, bucket) DO UPDATE
    SET api_calls = usage_hourly.api_calls + EXCLUDED.api_calls,
        search_queries = usage_hourly.search_queries + EXCLUDED.search_queries,
        memories_created = usage_hourly.memories_created + EXCLUDED.memories_created
), daily AS (
    INSERT INTO usage_daily (tenant_id, bucket, api_calls, search_queries, memories_created)
    SELECT tenant_id, date_trunc('day', ts, 'UTC'), sum(api_calls), sum(search_queries), sum(memories_created)
    FROM inserted GROUP BY 1, 2 ORDER BY 1, 2
    ON CONFLICT (tenant_id, bucket) DO UPDATE
    SET api_calls = usage_daily.api_calls + EXCLUDED.api_calls,
        search_queries = usage_daily.search_queries + EXCLUDED.search_queries,
        memories_created = usage_daily.memories_created + EXCLUDED.memories_created
)
SELECT count(*) FROM inserted;

-- name: usage_quarantine_insert
INSERT INTO usage_quarantine (segment, request_id, tenant_id, reason, event)
VALUES (%(segment)s, %(request_id)s, %(tenant_id)s, %(reason)s, %(event)s)
ON CONFLICT (segment, request_id) DO NOTHING;

-- name: usage_segment_insert
INSERT INTO usage_segments (segment, events, inserted, duplicates, quarantined, corrupt_bytes)
VALUES (%(segment)s, %(events)s, %(inserted)s, %(duplicates)s, %(quarantined)s, %(corrupt_bytes)s)
ON CONFLICT (segment) DO NOTHING;

-- name: usage_totals
SELECT coalesce(sum(api_calls), 0)::bigint AS api_calls, coalesce(sum(search_queries), 0)::bigint AS search_queries,
       coalesce(sum(memories_created), 0)::bigint AS memories_created
FROM usage_hourly
WHERE tenant_id = %(tenant_id)s AND bucket >= %(from)s AND bucket < %(to)s;

-- name: usage_buckets
SELECT bucket, api_calls, search_queries, memories_created
FROM usage_hourly
WHERE tenant_id = %(tenant_id)s AND bucket >= %(from)s AND bucket < %(to)s
ORDER BY bucket;

-- name: usage_event_count
SELECT count(*) FROM usage_events WHERE tenant_id = %(tenant_id)s;
