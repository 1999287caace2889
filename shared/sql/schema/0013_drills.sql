-- Where the time of a restore test went, what it drilled for, and how old the newest memory of the copy was.
ALTER TABLE restore_tests
    ADD COLUMN reason               text,
    ADD COLUMN download_ms          double precision,
    ADD COLUMN decrypt_ms           double precision, -- and decompress
    ADD COLUMN verify_ms            double precision,
    ADD COLUMN smoke_ms             double precision,
    ADD COLUMN sentinel_age_seconds double precision;
CREATE INDEX restore_tests_newest ON restore_tests (finished_at DESC);
CREATE INDEX restore_tests_passed ON restore_tests (tenant_id, finished_at DESC) WHERE outcome = 'pass';
CREATE INDEX restore_tests_by_backup ON restore_tests (backup_id);
