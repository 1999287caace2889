"""The dashboard: `dashboard.py` builds `engram.json`, which Grafana imports or provisions as it is."""
