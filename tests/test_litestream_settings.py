"""What Litestream is started with: nothing it cannot do, nothing it must not know."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deployments.parts import plan
from deployments.ports import PortReservations
from shared import litestream
from shared.errors import Permanent
from shared.settings import Settings
from tests.core_fixtures import settings_in


def test_a_data_directory_too_long_for_a_socket_is_refused_by_name(tmp_path: Path) -> None:
    """Litestream itself would only warn, and never be heard of again."""
    with pytest.raises(Permanent, match="ENGRAM_DATA_DIR"):
        litestream.socket_path(Settings(data_dir=tmp_path / ("x" * 120)))


def test_copies_that_litestream_cannot_encrypt_are_refused_beside_encrypted_backups() -> None:
    """Deleting a tenant's key must erase everything that was stored of it."""
    with pytest.raises(ValueError, match="cannot encrypt"):
        Settings(point_in_time="litestream", backup_encryption="age")


def test_the_stack_has_the_part_only_when_it_is_asked_for(tmp_path: Path) -> None:
    """It is off by default; and it gets no key of the backups."""
    for point_in_time in ("off", "litestream"):
        ports = PortReservations()
        try:
            made = plan(Settings(data_dir=tmp_path, point_in_time=point_in_time), ports)  # type: ignore[arg-type]
        finally:
            ports.release_all()
        assert (made.litestream is not None) == (point_in_time == "litestream")


def test_credentials_that_are_kept_apart_stay_apart(tmp_path: Path) -> None:
    """Who copies must not be able to delete, and who restores not to write."""
    settings = settings_in(
        tmp_path, "", object_store_url="s3://b/p", s3_access_key_id="writes", s3_secret_access_key="w",
        s3_read_access_key_id="reads", s3_read_secret_access_key="r",
        s3_delete_access_key_id="deletes", s3_delete_secret_access_key="d",
    )  # fmt: skip
    assert litestream.environment(settings)["AWS_ACCESS_KEY_ID"] == "writes"
    assert litestream.environment(settings, reading=True)["AWS_SECRET_ACCESS_KEY"] == "r"
    assert json.loads(litestream.configuration(settings, {}))["retention"] == {"enabled": False}
    plain = settings.model_copy(update={"s3_delete_access_key_id": "", "s3_read_access_key_id": ""})
    assert litestream.environment(plain, reading=True)["AWS_ACCESS_KEY_ID"] == "writes"
    assert json.loads(litestream.configuration(plain, {}))["retention"] == {"enabled": True}
