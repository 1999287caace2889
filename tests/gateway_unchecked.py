"""`python -m gateway.serve` without its look at unsafe values: a test of one setting of prod needs no more of it."""

from __future__ import annotations

from gateway.serve import serve
from shared.settings import settings

if __name__ == "__main__":
    serve(settings())
