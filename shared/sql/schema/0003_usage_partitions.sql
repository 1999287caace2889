-- usage_events by day. The key is the id itself: its first 48 bits are the time in ms, so the ids of a day are one
-- range, and the primary key stays unique over all partitions. No DEFAULT partition: it would forbid both attaching
-- without a scan and detaching CONCURRENTLY. Names and bounds are those of shared/partitions.py.

-- The smallest id of a request minted at or after an instant. `request_id >= usage_id_from(a) AND request_id <
-- usage_id_from(b)` is the time range [a, b), and prunes.
CREATE FUNCTION usage_id_from(at timestamptz) RETURNS uuid
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
RETURN (lpad(to_hex(least(greatest(
    ceil(extract(epoch FROM at - timestamptz '1970-01-01 00:00:00+00') * 1000), 0), 281474976710655)::bigint), 12, '0')
    || '00000000000000000000')::uuid;

ALTER TABLE usage_events RENAME TO usage_events_unpartitioned;
ALTER INDEX usage_events_pkey RENAME TO usage_events_unpartitioned_pkey;
CREATE TABLE usage_events (
    request_id       uuid PRIMARY KEY,
    tenant_id        text NOT NULL,
    route            text NOT NULL,
    status           smallint NOT NULL,
    api_calls        integer NOT NULL,
    search_queries   integer NOT NULL,
    memories_created integer NOT NULL,
    storage_bytes    bigint,
    ts               timestamptz NOT NULL
) PARTITION BY RANGE (request_id);

-- The days that have rows, and the first week to come; after that the retention flow and the drain create them.
DO $$
DECLARE
    day timestamptz;
BEGIN
    FOR day IN
        SELECT to_timestamp(n * 86400)
        FROM (
            SELECT DISTINCT ('x' || translate(left(request_id::text, 13), '-', ''))::bit(48)::bigint / 86400000 AS n
            FROM usage_events_unpartitioned
            UNION
            SELECT floor(extract(epoch FROM now()))::bigint / 86400 + ahead FROM generate_series(0, 7) AS ahead
        ) AS days
        ORDER BY 1
    LOOP
        EXECUTE format(
            'CREATE TABLE %I PARTITION OF usage_events FOR VALUES FROM (%L) TO (%L)',
            'usage_events_' || to_char(day AT TIME ZONE 'UTC', 'YYYYMMDD'),
            usage_id_from(day), usage_id_from(day + interval '24 hours'));
    END LOOP;
END
$$;

INSERT INTO usage_events SELECT * FROM usage_events_unpartitioned ORDER BY request_id;
DROP TABLE usage_events_unpartitioned;

-- Which days of events were dropped, and what they held: the rollups of those days stay and are the record then.
CREATE TABLE usage_days_dropped (
    day              date PRIMARY KEY,
    events           bigint NOT NULL,
    api_calls        bigint NOT NULL,
    search_queries   bigint NOT NULL,
    memories_created bigint NOT NULL,
    size_bytes       bigint NOT NULL,
    dropped_at       timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- The audit of the drain is read by name, and removed by age.
CREATE INDEX usage_segments_by_age ON usage_segments USING brin (drained_at);

-- Every segment updates the rollups of its tenants: room on the page keeps those updates off the index.
ALTER TABLE usage_hourly SET (fillfactor = 70);
ALTER TABLE usage_daily SET (fillfactor = 70);
