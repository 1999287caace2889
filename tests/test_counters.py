"""Counters in files that outlive their processes, and may not outlive the machine whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared import counters


@pytest.mark.parametrize("damage", [b"", b"\xff" * 4_096, (100).to_bytes(4, "little") + bytes(4_092)])
def test_a_file_a_power_loss_left_half_costs_what_is_in_it_and_not_the_start(tmp_path: Path, damage: bytes) -> None:
    """The gateway reads them before it starts: an error there would come again at every start."""
    counters.carry_lost(tmp_path, 7)
    (tmp_path / "counter_4711.db").write_bytes(damage)
    assert counters.lost(tmp_path) == 7
