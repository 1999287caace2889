"""Composes processes and environments: the command line, the local stack, and what production is made of.

Importable with the standard library alone: `python3 -m deployments` runs before anything is installed.
"""
