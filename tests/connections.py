"""A guard for tests of what must open no connection."""

import contextlib
import socket
from collections.abc import Iterator
from unittest import mock


@contextlib.contextmanager
def no_connections() -> Iterator[None]:
    """Lets the block fail if it looks up a host or connects to one, whoever catches the error."""
    tried = []

    def refuse(*arguments, **_):
        tried.append(arguments)
        raise OSError("a test opens no connections")

    with (
        mock.patch.object(socket, "getaddrinfo", refuse),
        mock.patch.object(socket.socket, "connect", refuse),
        mock.patch.object(socket.socket, "connect_ex", refuse),
    ):
        yield
    assert not tried, f"connections were tried: {tried}"
