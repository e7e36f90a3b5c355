"""`dysl serve`: a policy behind the openpi websocket protocol; every connection is one robot and one running episode.

The event loop only moves bytes. One thread infers; what waits for it meanwhile is inferred together, where that was
measured to be faster.
"""

from __future__ import annotations

import asyncio
import errno
import hmac
import logging
import queue
import signal
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dysl_vla import provenance
from dysl_vla.deploy.robot import open_policy
from dysl_vla.deploy.wire import pack, unpack
from dysl_vla.errors import ActionError, ConfigError, DyslError, ObservationError
from dysl_vla.extras import needs_extra
from dysl_vla.policies.base import Policy
from dysl_vla.types import (
    IMAGE_PREFIX,
    STATE_KEY,
    TASK_KEY,
    ActionChunk,
    EpisodeState,
    Observation,
)

with needs_extra("serve"):
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
    from websockets.asyncio.server import ServerConnection, serve
    from websockets.datastructures import Headers
    from websockets.exceptions import ConnectionClosed
    from websockets.frames import CloseCode
    from websockets.http11 import Request, Response

LOOPBACK = ("127.0.0.1", "::1", "localhost")
PROMPT, RESET, EXECUTED = "prompt", "reset", "executed"
SEND_S = 10.0
"""A client that takes no answer for so long is let go."""
DRAIN_S, CLOSE_S = 3.0, 0.5
"""For what runs when the server is told to end; for goodbyes."""
MAX_PROMPT, MAX_ERROR = 2000, 1000
"""Characters."""
LARGEST_FRAME = 64 * 2**20
"""Bytes; or four times what the policy expects, where that is more. A frame up to here is read whole, so that the
answer can name the image that is too large: two of 4K make 50 MB. A larger one ends its connection.

What is too large is refused as soon as it is there, and kept by nobody. A client that asks one thing at a time, as all
honest ones do, has one frame on the server; one that does not has at most four: one is refused, `WAITING` and one more
wait, one arrives. Many connections can hold much, but only clients on this machine, and those with the key, have one.
"""
WAITING = 1
"""Frames of a connection that wait for another to be answered, before no more is read: clients ask one at a time."""
MAX_EXECUTED = 64
"""Actions since the last request: guidance looks back on less."""
MAX_CONNECTIONS = 1024
BATCHES = (2, 4, 8)
MIN_BATCH_GAIN = 0.9
"""A batch must take less than this share of its rows one by one."""
BUCKETS = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
log = logging.getLogger("dysl.serve")


@dataclass(frozen=True)
class ServeConfig:
    """Serve a policy to openpi clients over websockets."""

    bundle: Path | None = None
    """Folder of `dysl export`."""
    policy: str | None = None
    """Instead of a bundle: a shipped name, a checkpoint's folder or a hub id, run by PyTorch."""
    host: str = "127.0.0.1"
    """Address to listen on; another than this machine's own needs a key."""
    port: int = 8000
    """Port to listen on; 0: any free one."""
    api_key_file: Path | None = None
    """File with the key that clients must show; nobody else should be able to read it."""
    skip: float | None = None
    """How much to skip, from 0, the full model, to 1; None: the stored operating point."""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ConfigError(f"port must be 0-65535, got {self.port}.")
        if self.host not in LOOPBACK and self.api_key_file is None:
            raise ConfigError(f"host {self.host} can be reached from other machines; give an --api-key-file.")


@dataclass
class _Waiting:
    """A request on its way through the inference thread."""

    observation: Observation
    state: EpisodeState
    answer: asyncio.Future[ActionChunk]

    def tell(self, loop: asyncio.AbstractEventLoop, result: ActionChunk | Exception) -> None:
        """Answer, from another thread."""

        def settle() -> None:
            if self.answer.done():
                return
            if isinstance(result, Exception):
                self.answer.set_exception(result)
            else:
                self.answer.set_result(result)

        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle)


class PolicyServer:
    """Serves a policy.

    Args:
        policy: Any.
        api_key: What clients must show; None: nothing.

    Attributes:
        port: That it listens on, once it does.
    """

    def __init__(self, policy: Policy, api_key: str | None = None) -> None:
        self._policy = policy
        self._key = api_key
        self._spec = policy.spec
        self._instruction = str(next(iter(policy.provenance.get("data", {}).get("instructions", [])), "do it"))
        self._waiting: queue.SimpleQueue[_Waiting] = queue.SimpleQueue()
        self._running = 0
        self._is_ending = False
        self._connections: set[ServerConnection] = set()
        self._end = asyncio.Event()
        images = sum(height * width * 3 for height, width in policy.spec.cameras.values())
        self._largest = max(LARGEST_FRAME, 4 * images)
        self.port = 0
        self.max_batch = 1
        registry = self._registry = CollectorRegistry()
        self._robots = Gauge("dysl_connections", "Open connections.", registry=registry)
        self._requests = Counter("dysl_requests", "Requests by outcome.", ["outcome"], registry=registry)
        self._seconds = Histogram(
            "dysl_request_seconds", "From a whole request to its answer.", buckets=BUCKETS, registry=registry
        )
        self._inference_seconds = Histogram(
            "dysl_inference_seconds", "Of the policy.", buckets=BUCKETS, registry=registry
        )
        self._layers = Counter("dysl_layers", "Layers of the backbone that ran.", registry=registry)

    async def run(self, address: socket.socket, *, handle_signals: bool = True) -> None:
        """Serve until told to end.

        Args:
            address: Of `bind`; closed in the end.
            handle_signals: SIGTERM and SIGINT end it.
        """
        loop = asyncio.get_running_loop()
        self.max_batch = await loop.run_in_executor(None, self._measure_batches)
        # a daemon: an inference that hangs must not keep the process
        threading.Thread(target=self._infer_forever, args=(loop,), name="inference", daemon=True).start()
        async with serve(
            self._connection,
            sock=address,
            process_request=self._http,
            compression=None,
            max_size=self._largest,
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
            for connection in list(self._connections):  # those that do not even take a goodbye
                connection.transport.abort()

    def end(self) -> None:
        """Finish what runs, and return from `run`; from the loop's thread."""
        self._end.set()

    @property
    def metadata(self) -> dict[str, Any]:
        """The first frame of every connection."""
        spec = self._spec
        return {
            "observation": {
                **{
                    IMAGE_PREFIX + camera: {"shape": [*size, 3], "dtype": "uint8"}
                    for camera, size in spec.cameras.items()
                },
                STATE_KEY: {"shape": [len(spec.state_names)], "dtype": "float32", "names": list(spec.state_names)},
                PROMPT: {"shape": [], "dtype": "str"},
                RESET: {"shape": [], "dtype": "bool", "optional": True},
                EXECUTED: {"shape": [-1, len(spec.action_names)], "dtype": "float32", "optional": True},
            },
            "actions": {"shape": [spec.chunk_length, len(spec.action_names)], "names": list(spec.action_names)},
            "execute_steps": spec.execute_steps,
            "rate_hz": spec.rate_hz,
            "max_frame_bytes": self._largest,
            "versions": provenance.versions(),
        }

    def _measure_batches(self) -> int:
        """How many rows are worth waiting for each other."""
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
        """Plain HTTP, and who may connect."""
        path = request.path.partition("?")[0]
        if path == "/healthz":
            return connection.respond(503, "ending\n") if self._is_ending else connection.respond(200, "OK\n")
        if self._key is not None:
            shown = request.headers.get("Authorization", "")
            if not hmac.compare_digest(shown.encode(), f"Api-Key {self._key}".encode()):
                return connection.respond(401, "Send the header 'Authorization: Api-Key KEY'.\n")
        if path == "/metrics":
            return Response(200, "OK", Headers({"Content-Type": CONTENT_TYPE_LATEST}), generate_latest(self._registry))
        if self._is_ending or len(self._connections) >= MAX_CONNECTIONS:
            return connection.respond(503, "ending\n" if self._is_ending else "too many connections\n")
        return None

    async def _connection(self, connection: ServerConnection) -> None:
        """One robot."""
        state = self._policy.reset()
        planned: list[Any] = []  # what a client that does not say otherwise has executed
        self._robots.inc()
        self._connections.add(connection)
        try:
            await self._send(connection, pack(self.metadata))
            previous_s: float | None = None
            async for frame in connection:
                started = time.perf_counter()
                self._running += 1
                try:
                    if self._is_ending:
                        raise ConfigError("The server is ending; connect to another.")
                    observation, begins, executed = self._read(frame)
                    if begins:
                        state = self._policy.reset()
                    state.executed.extend(planned if executed is None and not begins else executed or ())
                    planned = []
                    chunk = await self._ask(observation, state)
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
            if end.sent is not None and end.sent.code == CloseCode.MESSAGE_TOO_BIG:  # its client may not get to read it
                log.warning("a connection was closed: %s", end.sent.reason)
        finally:
            self._connections.discard(connection)
            self._robots.dec()

    async def _send(self, connection: ServerConnection, answer: bytes | str) -> None:
        """To a client that may not read: it is waited for a while, and nobody else is."""
        try:
            await asyncio.wait_for(connection.send(answer), SEND_S)
        except TimeoutError:
            connection.transport.abort()
            raise

    def _read(self, frame: bytes | str) -> tuple[dict[str, Any], bool, list[Any] | None]:
        """A request: the observation, whether it begins an episode, and what was executed since the last one."""
        if isinstance(frame, str):
            raise ObservationError("A frame must be a msgpack map in a binary message, got text.")
        message = unpack(frame)
        begins = message.get(RESET, False)
        if not isinstance(begins, (bool, np.bool_)):
            raise ObservationError(f"{RESET} must be true or false, got {type(begins).__name__}.")
        prompt = self._prompt(message.get(PROMPT))
        for name in (*(IMAGE_PREFIX + camera for camera in self._spec.cameras), STATE_KEY):
            if message.get(name) is None:
                raise ObservationError(f"{name} is missing; the frame holds {', '.join(map(repr, message))}.")
        observation = {IMAGE_PREFIX + camera: message[IMAGE_PREFIX + camera] for camera in self._spec.cameras}
        observation |= {STATE_KEY: _float32(message[STATE_KEY]), TASK_KEY: prompt}
        self._spec.check_observation(observation)
        return observation, bool(begins), self._executed(message.get(EXECUTED))

    def _prompt(self, prompt: Any) -> str:
        """The instruction of a request."""
        if prompt is None:
            raise ObservationError(
                f"{PROMPT} is missing; it holds the instruction (which datasets call {TASK_KEY!r}), such as "
                f"{self._instruction!r:.200}."
            )
        if not isinstance(prompt, str) or len(prompt) > MAX_PROMPT:
            kind = f"{len(prompt)} characters" if isinstance(prompt, str) else type(prompt).__name__
            raise ObservationError(
                f"{PROMPT} must be the instruction as text of at most {MAX_PROMPT} characters, got {kind}."
            )
        if not prompt.strip():
            raise ObservationError(
                f"{PROMPT} is blank, so it does not say what to do; send the instruction, such as "
                f"{self._instruction!r:.200}."
            )
        return prompt

    def _executed(self, executed: Any) -> list[Any] | None:
        """What a client says that it executed; None: nothing is said."""
        if executed is None:
            return None
        dim = len(self._spec.action_names)
        is_array = isinstance(executed, np.ndarray)
        if not is_array or executed.ndim != 2 or len(executed) > MAX_EXECUTED or executed.shape[1] != dim:
            kind = f"{executed.dtype} {executed.shape}" if is_array else type(executed).__name__
            raise ObservationError(f"{EXECUTED} must be an array (at most {MAX_EXECUTED}, {dim}), got {kind}.")
        executed = _float32(executed)
        if not np.isfinite(executed).all():
            raise ObservationError(f"{EXECUTED} has a value that is not finite; send actions as they were executed.")
        return list(executed)

    async def _ask(self, observation: Observation, state: EpisodeState) -> ActionChunk:
        waiting = _Waiting(observation, state, asyncio.get_running_loop().create_future())
        self._waiting.put(waiting)
        return await waiting.answer

    def _infer_forever(self, loop: asyncio.AbstractEventLoop) -> None:
        """The inference thread."""
        while True:
            batch = [self._waiting.get()]
            with suppress(queue.Empty):
                while len(batch) < self.max_batch:
                    batch.append(self._waiting.get_nowait())
            try:
                self._infer(loop, batch)
            except Exception as failure:
                if len(batch) == 1:
                    batch[0].tell(loop, failure)
                    continue
                for waiting in batch:  # one by one: nobody pays for another's request
                    try:
                        self._infer(loop, [waiting])
                    except Exception as error:
                        waiting.tell(loop, error)

    def _infer(self, loop: asyncio.AbstractEventLoop, batch: list[_Waiting]) -> None:
        started = time.perf_counter()
        chunks = self._policy.infer([w.observation for w in batch], [w.state for w in batch])
        self._inference_seconds.observe(time.perf_counter() - started)
        for waiting, chunk in zip(batch, chunks, strict=True):
            if not np.isfinite(chunk.actions).all():
                waiting.tell(loop, ActionError("The policy's actions are not finite, and are not sent."))
                continue
            if chunk.skips is not None:
                self._layers.inc(chunk.skips.layers)
            waiting.tell(loop, chunk)

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


def serve_policy(config: ServeConfig) -> None:
    """Load, and serve until SIGTERM or SIGINT.

    Raises:
        DyslError: The policy cannot be loaded, the key not be read, or the address is none to listen on.
    """
    key = _read_key(config.api_key_file)
    with bind(config.host, config.port) as address:
        policy = open_policy(config.bundle, config.policy, config.skip)
        try:
            asyncio.run(PolicyServer(policy, key).run(address))
        except OSError as error:  # another one, bound like this one, listens since
            if error.errno != errno.EADDRINUSE:
                raise
            raise _cannot_listen(config.host, config.port, error) from error


def bind(host: str, port: int) -> socket.socket:
    """Take an address, on which nobody is answered yet.

    Args:
        host: A name or number of this machine's.
        port: 0: any that is free.

    Raises:
        ConfigError: It cannot be taken; the message says what to do.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        raise ConfigError(f"host {host} is unknown ({error}); give an address of this machine.") from error
    # "localhost" may be two: the older one is what clients try first or last, but always.
    family, kind, protocol, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise _cannot_listen(host, port, error) from error
    return bound


def _cannot_listen(host: str, port: int, error: OSError) -> ConfigError:
    mend = {
        errno.EADDRINUSE: "end the program that listens there, or give another --port",
        errno.EADDRNOTAVAIL: "give a --host that is an address of this machine",
        errno.EACCES: "give a --port from 1024 on, those below are the system's",
    }.get(error.errno or 0, "give another --host or --port")
    return ConfigError(f"The server cannot listen on {host}:{port} ({error.strerror}); {mend}.")


def _float32(value: Any) -> Any:
    """Numbers in the precision that they are used in; what is too large becomes infinite, and is refused as such."""
    with np.errstate(over="ignore"):
        return value.astype(np.float32) if isinstance(value, np.ndarray) else value


def _read_key(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        key = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"api_key_file {path} cannot be read ({error}); give a file with the key in it.") from error
    if not key or not key.isascii() or not key.isprintable():
        raise ConfigError(f"api_key_file {path} must hold one line of printable ASCII, the key.")
    return key
