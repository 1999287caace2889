-- What a plan allows in a calendar month (UTC), and how many bytes at any time. NULL: no limit. Beyond soft a
-- tenant is warned, at hard it is refused.
CREATE TABLE plans (
    plan_id               text PRIMARY KEY,
    api_calls_soft        bigint CHECK (api_calls_soft >= 0),
    api_calls_hard        bigint CHECK (api_calls_hard >= 0),
    search_queries_soft   bigint CHECK (search_queries_soft >= 0),
    search_queries_hard   bigint CHECK (search_queries_hard >= 0),
    memories_created_soft bigint CHECK (memories_created_soft >= 0),
    memories_created_hard bigint CHECK (memories_created_hard >= 0),
    storage_bytes_soft    bigint CHECK (storage_bytes_soft >= 0),
    storage_bytes_hard    bigint CHECK (storage_bytes_hard >= 0),
    created_at            timestamptz NOT NULL DEFAULT clock_timestamp()
);
INSERT INTO plans (plan_id) VALUES ('standard');
