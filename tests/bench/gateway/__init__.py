"""How fast is the gateway, against what: `python -m tests.bench.gateway`.

`load` (the client) · `corpus` (memories and queries) · `world` (tenants, tokens, processes) · `targets` (what is
served) · `floors` (the same SQL in a plain loop) · `plan` (which target, which requests) · `curve` (what many
tenants cost) · `report`.
"""
