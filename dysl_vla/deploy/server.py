"""A policy behind the openpi websocket protocol; every connection is one robot and one running episode.

The event loop only moves bytes. One thread infers; requests that wait for it meanwhile are inferred as a batch, where
that was measured to be faster.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import queue
import signal
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from dysl_vla.deploy.server_requests import RequestFormat
from dysl_vla.deploy.wire import pack
from dysl_vla.errors import ActionError, ConfigError, DyslError
from dysl_vla.extras import needs_extra
from dysl_vla.policies.base import Policy
from dysl_vla.provenance import known_instructions
from dysl_vla.types import ActionChunk, EpisodeState, Observation

with needs_extra("serve"):
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
    from websockets.asyncio.server import ServerConnection, serve
    from websockets.datastructures import Headers
    from websockets.exceptions import ConnectionClosed
    from websockets.frames import CloseCode
    from websockets.http11 import Request, Response

SEND_S = 10.0
"""A client that takes no answer for so long is disconnected."""
DRAIN_S, CLOSE_S = 3.0, 0.5
"""Time for requests that run when the server is asked to end, and for closing handshakes."""
MAX_ERROR = 1000
"""Largest number of characters of an error's answer."""
LARGEST_FRAME = 64 * 2**20
"""Bytes of the largest frame that is read; four times what the policy expects, where that is more. A frame up to this
size is read whole, so that the answer can name the image that is too large: two images of 4K make 50 MB. A larger frame
ends its connection.

A request that is too large is refused as soon as it is there, and kept by nobody. A client that asks one thing at a
time, as all honest ones do, has one frame on the server; one that does not has at most four: one is refused, `WAITING`
and one more wait, one arrives. Many connections can hold much, but only clients on this machine, and those with the
key, have one.
"""
WAITING = 1
"""Frames of a connection that wait for another to be answered, before no more is read: clients ask one at a time."""
MAX_CONNECTIONS = 1024
BATCHES = (2, 4, 8)
MIN_BATCH_GAIN = 0.9
"""A batch must take less than this share of the time that its rows take one by one."""
BUCKETS = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
log = logging.getLogger("dysl.serve")


@dataclass
class _Waiting:
    """A request on its way through the inference thread."""

    observation: Observation
    state: EpisodeState
    answer: asyncio.Future[ActionChunk]

    def set_result(self, loop: asyncio.AbstractEventLoop, result: ActionChunk | Exception) -> None:
        """Answer, from another thread."""

        def settle() -> None:
            if self.answer.done():
                return
            if isinstance(result, Exception):
                self.answer.set_exception(result)
            else:
                self.answer.set_result(result)

        with suppress(RuntimeError):  # the loop is closed, so nobody waits any more
            loop.call_soon_threadsafe(settle)


class PolicyServer:
    """Serves a policy.

    Args:
        policy: Any policy.
        api_key: Key that clients must send; None: none is needed.

    Attributes:
        port: Port that it listens on, once it does; 0 before.
        max_batch: Number of requests that are inferred together at most.
    """

    def __init__(self, policy: Policy, api_key: str | None = None) -> None:
        self._policy = policy
        self._key = api_key
        self._spec = policy.spec
        self._instruction = next(iter(known_instructions(policy.provenance)), "do it")
        self._waiting: queue.SimpleQueue[_Waiting] = queue.SimpleQueue()
        self._running = 0
        self._is_ending = False
        self._connections: set[ServerConnection] = set()
        self._end = asyncio.Event()
        images = sum(height * width * 3 for height, width in policy.spec.cameras.values())
        self._max_frame_bytes = max(LARGEST_FRAME, 4 * images)
        self._format = RequestFormat(policy.spec, self._instruction)
        self.port = 0
        self.max_batch = 1
        registry = self._registry = CollectorRegistry()
        self._robots = Gauge("dysl_connections", "Open connections.", registry=registry)
        self._requests = Counter("dysl_requests", "Requests by outcome.", ["outcome"], registry=registry)
        self._seconds = Histogram(
            "dysl_request_seconds", "Seconds from a whole request to its answer.", buckets=BUCKETS, registry=registry
        )
        self._inference_seconds = Histogram(
            "dysl_inference_seconds", "Seconds of the policy.", buckets=BUCKETS, registry=registry
        )
        self._layers = Counter("dysl_layers", "Layers of the backbone that ran.", registry=registry)

    async def run(self, address: socket.socket, *, handle_signals: bool = True) -> None:
        """Serve until it is asked to end.

        Args:
            address: A bound socket (`run_server.bind`), which is closed in the end.
            handle_signals: Whether SIGTERM and SIGINT end it.
        """
        loop = asyncio.get_running_loop()
        self.max_batch = await loop.run_in_executor(None, self._measure_batches)
        # A daemon: an inference that hangs must not keep the process
        threading.Thread(target=self._infer_forever, args=(loop,), name="inference", daemon=True).start()
        async with serve(
            self._connection,
            sock=address,
            process_request=self._http,
            compression=None,
            max_size=self._max_frame_bytes,
            max_queue=WAITING,
            write_limit=65536,
            close_timeout=CLOSE_S,
        ) as server:
            host, self.port, *_ = address.getsockname()
            if handle_signals:
                for number in (signal.SIGTERM, signal.SIGINT):
                    loop.add_signal_handler(number, self._end.set)
            print(f"Serving on ws://{f'[{host}]' if ':' in host else host}:{self.port}", flush=True)
            await self._end.wait()
            self._is_ending = True
            limit = time.monotonic() + DRAIN_S
            while self._running and time.monotonic() < limit:
                await asyncio.sleep(0.01)
            server.close()
            await asyncio.wait([asyncio.create_task(server.wait_closed())], timeout=CLOSE_S)
            for connection in list(self._connections):  # those that do not even answer the closing handshake
                connection.transport.abort()

    def end(self) -> None:
        """Finish the requests that run, and return from `run`; called in the loop's thread."""
        self._end.set()

    def _measure_batches(self) -> int:
        """How many requests are worth inferring together."""
        observation = self._spec.blank_observation(self._instruction)

        def seconds(rows: int) -> float:
            times = []
            for _ in range(8):
                states = [self._policy.reset() for _ in range(rows)]
                started = time.perf_counter()
                self._policy.infer([observation] * rows, states)
                times.append(time.perf_counter() - started)
            return float(np.median(times))

        one = seconds(1)
        best = 1
        for rows in BATCHES:
            if seconds(rows) > MIN_BATCH_GAIN * rows * one:
                break
            best = rows
        return best

    def _http(self, connection: ServerConnection, request: Request) -> Response | None:
        """Answer plain HTTP, and refuse who may not connect."""
        path = request.path.partition("?")[0]
        if path == "/healthz":
            return connection.respond(503, "ending\n") if self._is_ending else connection.respond(200, "OK\n")
        if self._key is not None:
            sent = request.headers.get("Authorization", "")
            if not hmac.compare_digest(sent.encode(), f"Api-Key {self._key}".encode()):
                return connection.respond(401, "Send the header 'Authorization: Api-Key KEY'.\n")
        if path == "/metrics":
            return Response(200, "OK", Headers({"Content-Type": CONTENT_TYPE_LATEST}), generate_latest(self._registry))
        if self._is_ending or len(self._connections) >= MAX_CONNECTIONS:
            return connection.respond(503, "ending\n" if self._is_ending else "too many connections\n")
        return None

    async def _connection(self, connection: ServerConnection) -> None:
        """Serve one robot."""
        state = self._policy.reset()
        planned: list[Any] = []  # what a client has executed that does not say otherwise
        self._robots.inc()
        self._connections.add(connection)
        try:
            await self._send(connection, pack(self._format.metadata(self._max_frame_bytes)))
            previous_s: float | None = None
            async for frame in connection:
                started = time.perf_counter()
                self._running += 1
                try:
                    if self._is_ending:
                        raise ConfigError("The server is ending; connect to another.")
                    request = self._format.parse(frame)
                    if request.begins:
                        state = self._policy.reset()
                    is_known = request.executed is not None or request.begins
                    state.executed.extend(request.executed or () if is_known else planned)
                    planned = []
                    chunk = await self._ask(request.observation, state)
                    planned = list(chunk.actions[: self._spec.execute_steps])
                    answer: bytes | str = pack(self._answer(chunk, previous_s))
                    outcome = "ok"
                except DyslError as error:
                    answer, outcome = str(error)[:MAX_ERROR], "refused"
                except Exception as error:  # what a client sent must never end the server
                    log.exception("a request failed")
                    answer, outcome = f"The server failed, {type(error).__name__}: {error}"[:MAX_ERROR], "failed"
                finally:
                    self._running -= 1
                self._requests.labels(outcome).inc()
                await self._send(connection, answer)
                previous_s = time.perf_counter() - started
                self._seconds.observe(previous_s)
        except TimeoutError:
            pass
        except ConnectionClosed as end:
            # The client of a frame that is too large may not get to read why it was disconnected
            if end.sent is not None and end.sent.code == CloseCode.MESSAGE_TOO_BIG:
                log.warning("a connection was closed: %s", end.sent.reason)
        finally:
            self._connections.discard(connection)
            self._robots.dec()

    async def _send(self, connection: ServerConnection, answer: bytes | str) -> None:
        """Send to a client that may not read: only this connection waits for it, and only for a while."""
        try:
            await asyncio.wait_for(connection.send(answer), SEND_S)
        except TimeoutError:
            connection.transport.abort()
            raise

    async def _ask(self, observation: Observation, state: EpisodeState) -> ActionChunk:
        waiting = _Waiting(observation, state, asyncio.get_running_loop().create_future())
        self._waiting.put(waiting)
        return await waiting.answer

    def _infer_forever(self, loop: asyncio.AbstractEventLoop) -> None:
        """What the inference thread does."""
        while True:
            batch = [self._waiting.get()]
            with suppress(queue.Empty):
                while len(batch) < self.max_batch:
                    batch.append(self._waiting.get_nowait())
            try:
                self._infer(loop, batch)
            except Exception as failure:
                if len(batch) == 1:
                    batch[0].set_result(loop, failure)
                    continue
                for waiting in batch:  # one by one: nobody's request fails because of another's
                    try:
                        self._infer(loop, [waiting])
                    except Exception as error:
                        waiting.set_result(loop, error)

    def _infer(self, loop: asyncio.AbstractEventLoop, batch: list[_Waiting]) -> None:
        started = time.perf_counter()
        chunks = self._policy.infer([w.observation for w in batch], [w.state for w in batch])
        self._inference_seconds.observe(time.perf_counter() - started)
        for waiting, chunk in zip(batch, chunks, strict=True):
            if not np.isfinite(chunk.actions).all():
                waiting.set_result(loop, ActionError("The policy's actions are not finite, and are not sent."))
                continue
            if chunk.skips is not None:
                self._layers.inc(chunk.skips.layers)
            waiting.set_result(loop, chunk)

    def _answer(self, chunk: ActionChunk, previous_s: float | None) -> dict[str, Any]:
        timing = chunk.timing
        server: dict[str, float] = {"infer_ms": 1e3 * timing.total_s}
        if previous_s is not None:
            server["prev_total_ms"] = 1e3 * previous_s
        return {
            "actions": chunk.actions,
            "server_timing": server,
            "policy_timing": {
                "infer_ms": 1e3 * timing.total_s,
                "encode_ms": 1e3 * timing.encode_s,
                "llm_ms": 1e3 * timing.llm_s,
            },
        }
