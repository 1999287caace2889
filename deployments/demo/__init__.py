"""The main job, end to end, on real parts: what `engram demo` does and checks.

`client` (of REST and MCP, counting what it sends) · `corpus` (the memories) · `stage` (the stack and its tenants) ·
`steps` (traffic, backup, damage, restore, drill) · `usage` (what was billed) · `checks` (expected against seen). Every
number in the table is read from outside: over HTTP, from PostgreSQL, from the object store, from the files. Nothing is
taken from what a step says of itself.
"""
