"""Prometheus, Alertmanager, and the bridge from there to Prefect."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field, SecretStr


class Prometheus(BaseModel):
    """Asked by reports and diagnoses; empty: they say so and go on with what they have."""

    prometheus_url: str = ""
    prometheus_timeout_seconds: float = Field(default=10.0, gt=0)


class Monitoring(BaseModel):
    """What `engram up --monitoring` and `engram monitor` start (deployments/monitoring.py)."""

    alertmanager_url: str = ""
    prometheus_host: Literal["127.0.0.1", "0.0.0.0", "::"] = Field(
        default="127.0.0.1", description="where Prometheus listens: here alone, or on every address"
    )
    prometheus_port: int = Field(default=9090, ge=0, le=65535)
    alertmanager_port: int = Field(default=9093, ge=0, le=65535)
    probe_port: int = Field(default=9115, ge=0, le=65535)
    monitoring_scrape_seconds: float = Field(default=15.0, gt=0)
    monitoring_retention_days: int = Field(default=35, ge=1, description="the error budgets look 30 days back")
    monitoring_minute_seconds: float = Field(
        default=60.0, gt=0, le=60, description="what a minute in the rules becomes in a rehearsal; 60 is as it is"
    )
    monitoring_targets: str = Field(
        default="", description="host:port of each gateway's /metrics, comma-separated, for `engram monitor`"
    )
    monitoring_probe_urls: str = Field(
        default="", description="each gateway as its clients reach it, comma-separated, for `engram monitor`"
    )


class Bridge(BaseModel):
    """From Alertmanager to Prefect (deployments/bridge.py)."""

    bridge_host: str = "127.0.0.1"
    bridge_port: int = Field(default=8082, ge=0, le=65535)
    bridge_token: SecretStr = Field(default=SecretStr(""), description="Alertmanager's credential; dev makes one")
    bridge_body_limit_bytes: int = Field(default=1_048_576, ge=1_024)
    heartbeat_url: SecretStr = Field(
        default=SecretStr(""), description="of a dead man's switch elsewhere; asked once a minute while alerts get here"
    )
