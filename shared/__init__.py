"""The core: true whoever runs it.

Knows SQLite, PostgreSQL, the object store and the spool; knows neither Prefect, Litestar nor Granian
(`tests/test_imports.py` holds that). The two shells, `gateway` and `flows`, meet only in what this package
keeps on disk and in the control plane: the usage spool, the tenant lease, the tables.
"""
