"""One settings model for every process; prefix `ENGRAM_`, the unit is part of the name.

What differs between dev, staging and prod is in their value files, not in code: `shared.environment` says how they are
found and what wins. `shared.safety` says which values staging and prod refuse to start with.

Empty strings mean "not set": `engram up` fills them with its own embedded parts (PostgreSQL, Prefect server,
token issuer, a local object store below the data directory) and hands the result to its children through the
environment, so a child never guesses. In staging and prod there are no embedded parts: `require` names what
is missing.

The fields are in the modules beside this one, a section each; which go together is decided here.
"""

from __future__ import annotations

import functools
import os
from typing import Any, Literal

from pydantic import SecretStr, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from shared import environment
from shared.errors import Permanent
from shared.settings import (
    backups,
    control_plane,
    gateway,
    limits,
    monitoring,
    objects,
    operators,
    place,
    restores,
    stack,
    tokens,
    usage,
)
from shared.settings.values import by_machine, redact_url, words

__all__ = ["Contradictions", "Settings", "by_machine", "redact_url", "settings", "variable", "words"]


class Settings(  # the last comes first in `model_fields` and in what is printed
    stack.Up,
    stack.Prefect,
    monitoring.Bridge,
    monitoring.Monitoring,
    monitoring.Prometheus,
    restores.Moves,
    restores.Restores,
    restores.RestoreTests,
    backups.Fleet,
    usage.Usage,
    gateway.Browsers,
    operators.Operators,
    limits.Limits,
    limits.Patience,
    gateway.Databases,
    gateway.Routing,
    gateway.Gateway,
    tokens.Tokens,
    backups.PointInTime,
    backups.Retention,
    backups.Packing,
    objects.Objects,
    control_plane.ControlPlane,
    place.Place,
    BaseSettings,
):
    """Values come from the process's environment and the value file; a name that is no setting is an error."""

    model_config = SettingsConfigDict(
        env_prefix=environment.PREFIX,
        extra="ignore",
        populate_by_name=True,
        env_ignore_empty=True,
        hide_input_in_errors=True,  # it would print the secrets beside the value that is wrong
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, _ValueFile(settings_cls)

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        set_by_person = set(self.model_fields_set)
        self.data_dir = self.data_dir.expanduser().absolute()
        if not self.object_store_url and self.env == "dev":
            self.object_store_url = (self.data_dir / "objects").as_uri()
        if found := self._contradictions():
            raise Contradictions(found)
        # Assigning marks a field as set; `is_set` must go on telling what the person set.
        self.__pydantic_fields_set__.intersection_update(set_by_person)
        return self

    def _contradictions(self) -> list[tuple[tuple[str, ...], str]]:
        """Settings that do not go together: which to leave out and the others do, and what is wrong."""
        found: list[tuple[tuple[str, ...], str]] = []
        if self.usage_durability == "sync" and self.usage_at_limit == "drop":
            both = "usage_durability=sync loses no event and usage_at_limit=drop does: choose one"
            found.append((("usage_at_limit",), both))
        if self.point_in_time == "litestream" and self.backup_encryption != "none":
            plain = "litestream cannot encrypt its copies: choose point_in_time or backup_encryption"
            found.append((("point_in_time",), plain))
        if self.s3_checksum == "none" and not self.object_store_read_back:
            unread = "without s3_checksum an upload must be read back: set object_store_read_back"
            found.append((("s3_checksum",), unread))
        if self.routing == "fly-replay" and not (self.routing_apps and words(self.trusted_proxies)):
            found.append((("routing",), "routing=fly-replay needs routing_apps, and Fly's proxy in trusted_proxies"))
        if self.routing == "forward" and not self.routing_urls:
            found.append((("routing",), "routing=forward needs routing_urls"))
        pairs = [("tls_certificate", "tls_key")]
        pairs += [(f"s3_{role}_access_key_id", f"s3_{role}_secret_access_key") for role in ("read", "delete")]
        for one, other in pairs:
            if bool(_plain(getattr(self, one))) != bool(_plain(getattr(self, other))):
                found.append(((one, other), f"{one} and {other} belong together: set both or none"))
        return found

    def is_set(self, name: str) -> bool:
        """Whether the environment or the value file set this value, rather than a default filling it."""
        return name in self.model_fields_set

    def require(self, *names: str) -> None:
        """Raise `Permanent` naming every one of `names` that is empty, all at once."""
        missing = [n for n in names if not _plain(getattr(self, n))]
        if missing:
            raise Permanent("not set: " + ", ".join(variable(n) for n in missing))

    def s3_credentials(self, role: Literal["write", "read", "delete"]) -> tuple[str, str]:
        """Key id and secret for what is to be done. Raises `Permanent` when there are none."""
        own = "" if role == "write" or not getattr(self, f"s3_{role}_access_key_id") else f"{role}_"
        names = (f"s3_{own}access_key_id", f"s3_{own}secret_access_key")
        self.require(*names)
        return _plain(getattr(self, names[0])), _plain(getattr(self, names[1]))


class Contradictions(ValueError):
    """All settings that do not go together: names and what is wrong with them."""

    def __init__(self, found: list[tuple[tuple[str, ...], str]]) -> None:
        super().__init__("; ".join(what for _, what in found))
        self.found = found


# Read by Prefect's own clients under these names, so they have no prefix.
_PREFECTS_OWN = frozenset({"prefect_api_url", "prefect_api_auth_string"})


def _plain(value: object) -> str:
    return value.get_secret_value() if isinstance(value, SecretStr) else str(value)


def variable(name: str) -> str:
    """What a setting is called outside."""
    return name.upper() if name in _PREFECTS_OWN else f"{environment.PREFIX}{name.upper()}"


class _ValueFile(PydanticBaseSettingsSource):
    """`deployments/environments/{env}.env`, below the process's environment; checks the names in both."""

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        return None, field_name, False  # all at once below

    def __call__(self) -> dict[str, Any]:
        known = frozenset(self.settings_cls.model_fields)
        environment.check_names(os.environ, known)
        env = self.current_state.get("env", "dev")
        if env not in environment.ENVIRONMENTS:
            return {}  # pydantic says so
        return dict(environment.read(environment.value_file(env), known))


@functools.cache
def settings() -> Settings:
    """The process's settings, read once from the environment."""
    return Settings()
