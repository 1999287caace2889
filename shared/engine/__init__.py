"""The tenant's SQLite database: its schema, how it is opened, memories and search.

`schema` (versions and migrations) · `database` (one connection under the restore fence) · `memories` (create,
get, update, delete, list) · `search` (FTS5, bm25). All synchronous: a caller with an event loop decides what
may run on it.
"""
