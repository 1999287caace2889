"""The gateway: where it listens, whom it believes, whom it passes a request on to, how it opens databases."""

from __future__ import annotations

import ipaddress
from typing import Literal

from pydantic import BaseModel, Field, field_validator

from shared.settings.values import by_machine, words


class Gateway(BaseModel):
    """Its address, workers and connections."""

    gateway_host: str = "127.0.0.1"
    gateway_port: int = Field(default=8080, ge=0, le=65535)
    gateway_workers: int = Field(default=2, ge=1)
    gateway_threads: int = Field(default=4, ge=1, description="threads per worker for SQLite work off the loop")
    gateway_backlog: int = Field(default=1024, ge=128)
    gateway_connections: int = Field(
        default=4_096, ge=1, description="open per worker, idle ones too; at most a quarter of the files it may open"
    )
    gateway_kill_timeout_seconds: int = Field(default=20, ge=1, le=1800)
    tls_certificate: str = Field(default="", description="a PEM file, the leaf first; empty: a proxy ends TLS")
    tls_key: str = Field(default="", description="its private key, a PEM file without a passphrase")
    tls_minimum: Literal["1.2", "1.3"] = "1.2"
    tls_http2: bool = Field(default=True, description="offered by ALPN, beside HTTP/1.1")
    trusted_proxies: str = Field(
        default="", description="networks, comma-separated; only what these say of a client's address is believed"
    )
    client_address_header: str = Field(
        default="x-forwarded-for",
        description="which field those proxies write: x-forwarded-for, forwarded, or one with a single address",
    )
    worker_silence_seconds: float = Field(
        default=10.0, ge=0, description="a worker whose event loop stands still for so long is replaced; 0 is never"
    )
    mcp_at_start: bool = Field(
        default=True, description="workers load the SDK of MCP as they start; false: for the first request of MCP"
    )
    metrics_cache_seconds: float = Field(default=0.5, ge=0, description="/metrics is not rendered more often")
    body_limit_bytes: int = Field(default=1_048_576, ge=1_024)
    answer_limit_bytes: int = Field(
        default=1_048_576, ge=1_024, description="a list or search has fewer memories than asked for, but one, above"
    )

    @field_validator("trusted_proxies")
    @classmethod
    def _are_networks(cls, value: str) -> str:
        for network in words(value):
            ipaddress.ip_network(network)
        return value

    @property
    def gateway_url(self) -> str:
        """Where a client on this machine reaches the gateway. With TLS its certificate names the public host."""
        host = "127.0.0.1" if self.gateway_host in ("0.0.0.0", "::", "") else self.gateway_host
        scheme = "https" if self.tls_certificate else "http"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self.gateway_port}"


class Routing(BaseModel):
    """Requests for tenants of other machines (gateway/routing.py). `routing_apps`, `routing_urls`: a pattern with
    {machine_id} for all machines, or machine=value for one; comma-separated."""

    routing: Literal["off", "fly-replay", "forward"] = Field(
        default="off", description="have Fly's proxy repeat them there, ask that machine's gateway, or refuse them"
    )
    routing_apps: str = Field(default="", description="a machine's Fly app, engram-{machine_id}; for fly-replay")
    routing_urls: str = Field(
        default="",
        description="a machine's gateway, http://engram-{machine_id}.internal:8080; for forward, and for what Fly's"
        " proxy cannot repeat",
    )
    routing_replay_bytes: int = Field(
        default=950_000, ge=0, description="the largest body left to Fly's proxy, which repeats no request over 1 MB"
    )
    routing_timeout_seconds: float = Field(
        default=10.0, gt=0, description="for another machine's gateway to answer; it is reached within 5 s or not"
    )

    @field_validator("routing_apps", "routing_urls")
    @classmethod
    def _are_by_machine(cls, value: str) -> str:
        by_machine(value)
        return value


class Databases(BaseModel):
    """Open tenant databases: gateway/pool.py."""

    tenant_pool_size: int = Field(default=1_024, ge=1, description="open tenant databases per gateway worker")
    sqlite_heap_bytes: int = Field(
        default=268_435_456, ge=16_777_216, description="page caches of a gateway worker recycle above this"
    )
    tenant_refresh_seconds: float = Field(default=2.0, gt=0)
    tenant_lock_wait_seconds: float = Field(default=2.0, ge=0)
    sqlite_busy_timeout_seconds: float = Field(default=5.0, ge=0)
    database_wait_seconds: float = Field(
        default=2.0, gt=0, description="longest wait for a thread and the tenant's turn; then 503, and nothing was done"
    )
    query_timeout_seconds: float = Field(default=5.0, ge=0, description="of a list or a search; 0 is no limit")


class Browsers(BaseModel):
    """Browsers, and people who read the API's description."""

    cors_allowed_origins: str = Field(default="", description="comma-separated, exact")
    cors_localhost: bool = Field(default=False, description="any port of localhost may call from a browser too")
    hsts_seconds: int = Field(default=31_536_000, ge=0, description="staging and prod only; 0 is off")
    docs_pages: bool = Field(default=True, description="/schema and /schema/openapi.json")
