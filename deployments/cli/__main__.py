"""`python -m deployments.cli`: how the supervisor starts its children, whatever PATH says."""

from deployments.cli import main

main()
