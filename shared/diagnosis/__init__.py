"""Diagnosis: look at everything a subject depends on, then propose exactly one action. It changes nothing.

    sight     what can be seen: the gateway over HTTP, Prometheus when there is one, the control plane, the disk
    edge, issuer, tenant, books, store, played    the checks, one function each: Sight → findings
    check     which checks a subject has, and how one runs: what cannot be seen is a finding, never green
    table     the decision table: findings → one proposal, in plain code
    finding, proposal    the words for all that

Two shells: `flows/diagnose.py` runs the checks side by side as tasks; `engram diagnose` does without Prefect.
"""
