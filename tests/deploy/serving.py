"""Policy servers for tests: in a thread, and in a process of their own."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dysl_vla.deploy.run_server import bind
from dysl_vla.deploy.server import PolicyServer
from tests.policies.test_dysl import observe


def message(number: int, **changes: Any) -> dict[str, Any]:
    observation = observe(number)
    observation["prompt"] = observation.pop("task")
    return {**observation, **changes}


@contextmanager
def served(
    policy: Any, key: str | None = None, host: str = "127.0.0.1", port: int = 0
) -> Iterator[tuple[PolicyServer, str]]:
    """A server in a thread of this process, and its address."""
    ready = threading.Event()
    parts: dict[str, Any] = {}

    def work() -> None:
        async def run() -> None:
            server = parts["server"] = PolicyServer(policy, key)
            parts["loop"] = asyncio.get_running_loop()
            task = asyncio.create_task(server.run(bind(host, port), handle_signals=False))
            while not server.port and not task.done():
                await asyncio.sleep(0.01)
            ready.set()
            await task

        asyncio.run(run())

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert ready.wait(20)
    try:
        yield parts["server"], f"ws://{f'[{host}]' if ':' in host else host}:{parts['server'].port}"
    finally:
        parts["loop"].call_soon_threadsafe(parts["server"].end)
        thread.join(10)
        assert not thread.is_alive()


@contextmanager
def process(bundle: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "dysl_vla.cli", "serve", "--bundle", str(bundle), "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        assert "Serving on" in line
        yield server, line.split()[-1]
    finally:
        server.kill()
        server.wait()
