"""`dysl bench serve`: how a policy server answers many robots, also beside others that misbehave."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from dysl_vla.deploy.client import Client
from dysl_vla.deploy.wire import pack
from dysl_vla.errors import ConfigError, RobotFault
from dysl_vla.extras import needs_extra
from dysl_vla.types import FloatArray

with needs_extra("serve"):
    from websockets.sync.client import connect

START_S = 60.0
KILLED = (
    "import sys; from dysl_vla.deploy.bench_serve import requests;"
    "from dysl_vla.deploy.client import Client\n"
    "client = Client(sys.argv[1]); ask = requests(client.metadata)\n"
    "client.infer(next(ask)); print('asking', flush=True)\n"
    "while True: client.infer(next(ask))"
)


@dataclass(frozen=True)
class ServeBenchConfig:
    """Measure a server's answers to one client, to many, and beside clients that never read or are killed."""

    bundle: Path
    """Folder of `dysl export`."""
    clients: int = 32
    """Number of clients where there are many."""
    requests: int = 200
    """Requests of each client."""
    deaf: int = 4
    """Clients that ask and never read."""
    killed: int = 4
    """Client processes killed while they ask."""


@dataclass(frozen=True)
class Served:
    """Answers to the clients that behave, in one situation.

    Attributes:
        name: The situation.
        clients: Number of clients that behave.
        milliseconds: From each request to its answer, (requests,).
        refused: Number of requests without an answer.
        a_second: Answers a second, to all of them together.
    """

    name: str
    clients: int
    milliseconds: FloatArray
    refused: int
    a_second: float


def bench_serve(config: ServeBenchConfig) -> list[Served]:
    """Measure a server with one client, with many, and with many beside clients that misbehave.

    Raises:
        ConfigError: A number of clients or requests is too small.
        RobotFault: The server does not start, or ended early.
    """
    if config.clients < 1 or config.requests < 1 or config.deaf < 0 or config.killed < 0:
        raise ConfigError(
            "clients and requests must be at least 1, deaf and killed at least 0; got "
            f"{config.clients}, {config.requests}, {config.deaf} and {config.killed}."
        )
    with _server(config.bundle) as uri:
        measured = [_measure("one client", uri, 1, config.requests)]
        measured.append(_measure("many", uri, config.clients, config.requests))
        with ExitStack() as others:
            for _ in range(config.deaf):
                others.enter_context(_deaf(uri))
            others.enter_context(_dying(uri, config.killed))
            measured.append(_measure("many, others deaf or dying", uri, config.clients, config.requests))
    return measured


def requests(metadata: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Observations of noise, as a server's metadata describe them, without end."""
    rng = np.random.default_rng(0)
    while True:
        observation: dict[str, Any] = {"prompt": "do it"}
        for name, kind in metadata["observation"].items():
            if kind["dtype"] == "uint8":
                observation[name] = rng.integers(0, 256, kind["shape"], np.uint8)
            elif kind["dtype"] == "float32" and not kind.get("optional"):
                observation[name] = np.zeros(kind["shape"], np.float32)
        yield observation


def _measure(name: str, uri: str, clients: int, count: int) -> Served:
    def ask(_: int) -> tuple[list[float], int]:
        times, refused = [], 0
        with Client(uri) as client:
            observations = requests(client.metadata)
            for _ in range(count):
                observation = next(observations)
                started = time.perf_counter()
                try:
                    client.infer(observation)
                    times.append(1e3 * (time.perf_counter() - started))
                except RobotFault:
                    refused += 1
        return times, refused

    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(ask, range(clients)))
    seconds = time.perf_counter() - started
    if not any(some for some, _ in answers):
        raise RobotFault("The server refused every request of every client.")
    times = np.array([value for some, _ in answers for value in some], np.float32)
    return Served(name, clients, times, sum(refused for _, refused in answers), len(times) / seconds)


@contextmanager
def _server(bundle: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "dysl_vla.cli", "serve", "--bundle", str(bundle), "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        if not line.startswith("Serving on "):
            raise RobotFault("The server did not start; its message is above.")
        yield line.split()[-1]
        if server.poll() is not None:
            raise RobotFault(f"The server ended with code {server.returncode}; its message is above.")
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(START_S)


@contextmanager
def _deaf(uri: str) -> Iterator[None]:
    """A client that sends requests and reads no answer, until the sockets are full."""
    with Client(uri) as client:
        frame = pack(next(requests(client.metadata)))
    small = socket.socket()
    small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    address = urlsplit(uri)
    small.connect((address.hostname, address.port))
    deaf = connect(uri, sock=small, compression=None, max_queue=1, close_timeout=0.1)
    with deaf as connection, ThreadPoolExecutor(1) as pool:
        asking = pool.submit(_ask_on, connection, frame)
        try:
            yield
        finally:
            small.shutdown(socket.SHUT_RDWR)
            asking.exception()


def _ask_on(connection: Any, frame: bytes) -> None:
    while True:
        connection.send(frame)


@contextmanager
def _dying(uri: str, count: int) -> Iterator[None]:
    """Processes that send requests, each of which is killed while it does, and replaced by the next."""
    is_over = threading.Event()

    def kill_on(number: int) -> None:
        rng = np.random.default_rng(number)
        while not is_over.is_set():
            with subprocess.Popen([sys.executable, "-c", KILLED, uri], stdout=subprocess.PIPE) as victim:
                assert victim.stdout is not None
                victim.stdout.readline()
                is_over.wait(float(rng.uniform(0, 0.2)))
                os.kill(victim.pid, signal.SIGKILL)

    with ThreadPoolExecutor(max(1, count)) as pool:
        killers = [pool.submit(kill_on, number) for number in range(count)]
        try:
            yield
        finally:
            is_over.set()
            for killer in killers:
                killer.result()


def render_served(measured: list[Served]) -> str:
    """The measurement as Markdown."""
    lines = [
        "| | clients | answers a second | p50 ms | p99 ms | max ms | refused |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for one in measured:
        p50, p99 = np.percentile(one.milliseconds, (50, 99))
        lines.append(
            f"| {one.name} | {one.clients} | {one.a_second:.0f} | {p50:.2f} | {p99:.2f} "
            f"| {one.milliseconds.max():.2f} | {one.refused} |"
        )
    return "\n".join(lines)
