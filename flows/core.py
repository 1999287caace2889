"""The core as one flow process holds it: settings, control plane, object store, opened once."""

import functools

from shared import log
from shared.control_plane import ControlPlane
from shared.objects import ObjectStore
from shared.settings import Settings, settings

__all__ = ["control_plane", "objects", "settings"]


@functools.cache
def control_plane() -> ControlPlane:
    """This process's control plane; logs go to stderr from here on."""
    log.configure(configuration().log_level)
    return ControlPlane(configuration())


@functools.cache
def objects() -> ObjectStore:
    return ObjectStore(configuration())


def configuration() -> Settings:
    return settings()
