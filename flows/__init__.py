"""Prefect shells over the core: orchestration that reads like the runbook, and nothing else.

| flow         | deployment                | steps                                                      |
|--------------|---------------------------|------------------------------------------------------------|
| backup       | daily, all tenants        | choose → back-up (one run a machine and shard)             |
| restore      | on demand (form in the UI) | plan → download → safety-backup → lock → swap → verify → release |
| restore-undo | on demand                 | plan → copy → lock → swap → verify → release               |
| move         | on demand                 | plan → copy → arrive → lock → final-copy → fence → route → release |
| move-arrive  | by `move`, on the target  | stage → receive → serve                                    |
| sweep        | every minute              | disk → records → runs                                      |
| restore-test | weekly, a share of the tenants | pick → download → smoke → record                           |
| metering     | resident drain, on demand | collect → drain → report                                   |

Values are handed from step to step, so Prefect draws the graph from them; nothing travels through globals. Results
are not persisted: receipts hold locks of this process, and a run retried from the UI starts from the beginning.
"""
