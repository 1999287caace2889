"""Who leaves a pool first."""

from __future__ import annotations

from gateway.recency import Recency


def _order(recency: Recency[int]) -> list[int]:
    return list(recency.leaving())


def test_keys_used_once_leave_before_those_used_again() -> None:
    """A sweep over many keys must not push out the few that are used all the time."""
    recency: Recency[int] = Recency(10)
    for n in range(10):
        recency.add(str(n), n)
    assert [recency.use("2"), recency.use("0"), recency.use("nobody")] == [2, 0, None]
    assert _order(recency) == [1, 3, 4, 5, 6, 7, 8, 9, 2, 0]
    recency.use("2")
    assert _order(recency)[-2:] == [0, 2]


def test_keys_used_often_in_the_past_make_way_in_time() -> None:
    """At most 8 of 10 places are for the often used; the longest unused of them goes back among the others."""
    recency: Recency[int] = Recency(10)
    for n in range(10):
        recency.add(str(n), n)
    for n in range(9):
        recency.use(str(n))
    assert _order(recency) == [9, 0, *range(1, 9)]


def test_a_removed_key_is_gone_and_a_cleared_one_is_handed_back() -> None:
    """The pool closes what it gets back, so nothing may be handed back twice or forgotten."""
    recency: Recency[int] = Recency(1)
    for n in range(3):
        recency.add(str(n), n)
    assert recency.use("1") == 1 and recency.get("1") == 1
    recency.remove("1")
    recency.remove("1")
    assert recency.get("1") is None and len(recency) == 2
    assert sorted(recency.clear()) == [0, 2] and len(recency) == 0
