"""Who is given new connections while a worker is replaced: asked of the kernel, with sockets of our own."""

from __future__ import annotations

import select
import socket
from contextlib import ExitStack

from gateway import steering


def accepted(listeners: list[socket.socket], port: int) -> list[int]:
    """How many of 40 new connections each of them is given."""
    with ExitStack() as open_ones:
        for _ in range(40):
            open_ones.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5))
        counts = [0] * len(listeners)
        # A client's connection may be there a moment before the listener has it.
        while sum(counts) < 40 and (arrived := select.select(listeners, (), (), 20)[0]):
            for each in arrived:
                each.accept()[0].close()
                counts[listeners.index(each)] += 1
    return counts


def test_the_newest_is_given_all_until_it_is_one_of_the_usual_number() -> None:
    """Two workers and one that takes the place of the first: all are its own, then everybody's again."""
    with ExitStack() as closing:
        listeners: list[socket.socket] = []
        port = 0
        for _ in range(3):
            one = closing.enter_context(socket.socket())
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            one.bind(("127.0.0.1", port))
            port = one.getsockname()[1]
            one.listen(64)
            one.setblocking(False)
            listeners.append(one)
        assert all(accepted(listeners, port))
        steering._attach(listeners[2], 2)
        assert accepted(listeners, port) == [0, 0, 40]
        listeners.pop(0).close()
        assert all(accepted(listeners, port))


def test_a_process_finds_the_socket_it_listens_on() -> None:
    """Not the ones it is connected by, nor another port's."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_server(("127.0.0.1", 0)) as other:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            found = steering.listener(port)
            assert found is not None and found.getsockname() == server.getsockname()
            found.close()
        assert other.getsockname()[1] != port
    assert steering.listener(port) is None
