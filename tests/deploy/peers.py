"""Servers, and what only looks like one, for tests of the client. `SOON` tells a wait from a hang, no more."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import numpy as np
import pytest
from websockets.utils import accept_key

from dysl_vla.deploy.client import Client
from dysl_vla.deploy.wire import pack
from dysl_vla.errors import RobotFault
from tests.deploy.serving import message

SOON = 7.0
LARGE = {"picture": np.zeros(40_000_000, np.uint8)}
"""Part of an observation that is larger than what sockets buffer."""
Behaviour = Callable[[socket.socket], None]


@contextmanager
def peer(behave: Behaviour, host: str = "127.0.0.1") -> Iterator[str]:
    """Listen, and do with every connection what `behave` does; yields the address."""
    open_: list[socket.socket] = []

    def attend(connection: socket.socket) -> None:
        with suppress(OSError, IndexError):  # it ends when the other side does
            behave(connection)

    def accept() -> None:
        with suppress(OSError):
            while True:
                open_.append(listening.accept()[0])
                threading.Thread(target=attend, args=open_[-1:], daemon=True).start()

    with socket.create_server((host, 0)) as listening:
        threading.Thread(target=accept, daemon=True).start()
        try:
            yield f"ws://{host}:{listening.getsockname()[1]}"
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            for connection in open_:
                connection.close()


def handshake(connection: socket.socket) -> bytes:
    """Read the client's handshake; the answer to it."""
    asked = b""
    while not asked.endswith(b"\r\n\r\n"):
        asked += connection.recv(1)
    [key] = [line.split(b": ")[1] for line in asked.split(b"\r\n") if line.startswith(b"Sec-WebSocket-Key")]
    accepted = accept_key(key.decode()).encode()
    upgrade = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    return upgrade + b"Sec-WebSocket-Accept: " + accepted + b"\r\n\r\n"


def frame(data: bytes, kind: int = 2) -> bytes:
    return bytes([0x80 | kind, 126]) + len(data).to_bytes(2, "big") + data


def slowly(connection: socket.socket, data: bytes) -> None:
    for byte in data:
        connection.sendall(bytes([byte]))
        time.sleep(0.05)


def forever(connection: socket.socket) -> None:
    while connection.fileno() >= 0:
        time.sleep(0.05)


def greet(connection: socket.socket) -> None:
    connection.sendall(handshake(connection) + frame(pack({"hello": "there"})))


def says_nothing_first(connection: socket.socket) -> None:
    connection.sendall(handshake(connection))
    forever(connection)


def shakes_hands_slowly(connection: socket.socket) -> None:
    slowly(connection, handshake(connection))


def greets_slowly(connection: socket.socket) -> None:
    connection.sendall(handshake(connection))
    slowly(connection, frame(pack({"hello": "there" * 50})))


def reads_nothing(connection: socket.socket) -> None:
    greet(connection)
    forever(connection)


def reads_slowly(connection: socket.socket) -> None:
    greet(connection)
    while connection.recv(1000):
        time.sleep(0.05)


def answers_nothing(connection: socket.socket) -> None:
    greet(connection)
    while connection.recv(1 << 20):
        pass


def answers_slowly(connection: socket.socket) -> None:
    greet(connection)
    connection.recv(100)
    slowly(connection, frame(pack({"actions": np.zeros((9, 9), np.float32)})))


def answers_in_endless_pieces(connection: socket.socket) -> None:
    greet(connection)
    connection.recv(100)
    connection.sendall(b"\x02\x01a")
    while True:
        time.sleep(0.02)
        connection.sendall(b"\x00\x01a")


def pings_and_reads_nothing(connection: socket.socket) -> None:
    greet(connection)
    while True:
        connection.sendall(frame(b"", 9))
        time.sleep(0.001)


def takes_no_goodbye(connection: socket.socket) -> None:
    greet(connection)
    connection.recv(100)
    connection.sendall(frame(b"\xff\xfe", 1))  # no UTF-8: the client says so, and waits for a goodbye
    forever(connection)


def answering(*answers: bytes) -> Behaviour:
    def behave(connection: socket.socket) -> None:
        greet(connection)
        for answer in answers:
            connection.recv(1 << 20)
            connection.sendall(answer)
        connection.shutdown(socket.SHUT_WR)

    return behave


@contextmanager
def soon() -> Iterator[None]:
    started = time.monotonic()
    yield
    assert time.monotonic() - started < SOON


def check_becomes(is_so: Callable[[], bool]) -> None:
    limit = time.monotonic() + SOON
    while not is_so():
        assert time.monotonic() < limit
        time.sleep(0.01)


def check_is_over(client: Client) -> None:
    with soon():
        for _ in range(50):
            with pytest.raises(RobotFault, match=r"is over: .*Connect again with a new Client"):
                client.infer(message(0))
        client.close()
        client.close()
        client._thread.join(SOON)
        assert not client._thread.is_alive()
