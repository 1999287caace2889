"""What the playbook's tests share: the settings of the session's gateway, one way to ask, the rows of the book."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from shared import limits
from shared.playbook import audit
from shared.playbook.action import Outcome, Request
from shared.playbook.perform import perform
from shared.settings import Settings
from tests.gateway_stack import ISSUER, Gateway, Stack, stack  # noqa: F401


def settings_of(stack: Stack, gateway: Gateway | None = None, **changes: Any) -> Settings:  # noqa: F811
    """As a command beside that gateway has them."""
    running = gateway or stack.gateway
    found = {
        "data_dir": running.data_dir,
        "jwks_url": stack.issuer.url,
        "jwt_issuer": ISSUER,
        "gateway_port": urlsplit(running.url).port,
    }
    return stack.settings.model_copy(update=found | changes)


@pytest.fixture
def settings(stack: Stack) -> Iterator[Settings]:  # noqa: F811
    """The session's gateway's; what a test sets there is gone afterwards."""
    found = settings_of(stack)
    yield found
    for name in limits.active(found):
        limits.clear(found, name)


def ask(stack: Stack, settings: Settings, action: str, tenant_id: str | None = None, /, **more: Any) -> Outcome:  # noqa: F811
    """Carry one action out as a person would; what is no field of a request is an argument."""
    own = {name: more.pop(name) for name in list(more) if name in Request.__struct_fields__}
    request = Request(action, tenant_id, more, **{"reason": "test", "who": "pytest"} | own)
    return perform(settings, stack.control_plane, request)


def newest(stack: Stack, **which: Any) -> dict[str, Any]:  # noqa: F811
    """The newest row of the book."""
    return audit.history(stack.control_plane, limit=1, **which)[0]
