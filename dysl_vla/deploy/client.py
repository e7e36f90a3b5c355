"""A client of `dysl serve`, or of any openpi server: NumPy, websockets and msgpack alone.

All that may wait for the network (resolving names, handshakes, sending, receiving, closing) is done by a thread of the
connection's own. The caller waits for that thread, and no longer than `timeout_s`, whatever the network does.
"""

from __future__ import annotations

import logging
import queue
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any

import numpy as np

from dysl_vla.deploy.wire import pack, unpack
from dysl_vla.errors import ConfigError, DyslError, ObservationError, RobotFault
from dysl_vla.extras import needs_extra

with needs_extra("serve"):
    from websockets.exceptions import InvalidHandshake, InvalidStatus, InvalidURI
    from websockets.sync.client import ClientConnection, connect

MAX_WAIT_S = 86400.0
GOODBYE_S = 0.2
"""Time for the server to answer a closing handshake; then the connection is cut."""
_quiet = logging.getLogger("dysl.client")
_quiet.setLevel(
    logging.CRITICAL
)  # websockets prints tracebacks when it is cut, of which an exception informs the caller already


class Client:
    """One robot's connection to a policy server, and one running episode.

    Threads may share a client: their requests wait for each other, and all belong to the one episode.

    Args:
        uri: The server's address, such as "ws://127.0.0.1:8000".
        api_key: The server's key; None: it needs none.
        timeout_s: Longest time that every call takes as a whole: connecting with all that belongs to it, `infer` from
            the first byte sent to the last one received, `close`. Above 0, at most a day.

    Attributes:
        metadata: The server's description of requests and answers.

    Raises:
        ConfigError: The address, the key or the time limit is wrong.
        RobotFault: No server answers in time.
    """

    def __init__(self, uri: str, *, api_key: str | None = None, timeout_s: float = 10.0) -> None:
        if not 0 < timeout_s <= MAX_WAIT_S:
            raise ConfigError(f"timeout_s must be above 0 and at most {MAX_WAIT_S:g} seconds, got {timeout_s}.")
        if api_key and not (api_key.isascii() and api_key.isprintable()):
            raise ConfigError("api_key must be printable ASCII without a line break; strip what was read from a file.")
        deadline = time.monotonic() + timeout_s
        self._uri, self._has_key, self._timeout_s = uri, bool(api_key), timeout_s
        self._begins = True
        self._over = ""  # why there is no connection any more
        self._turn = threading.Lock()
        self._frames: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[bytes | str | Exception] = queue.SimpleQueue()
        self._connection: ClientConnection | None = None
        headers = {"Authorization": f"Api-Key {api_key}"} if api_key else None
        self._thread = threading.Thread(target=self._attend, args=(headers,), name="dysl client", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            raise RobotFault(f"thread: the client's could not be started ({error}); end other programs.") from error
        try:
            self.metadata = self._answer(None, deadline)
        except DyslError as error:
            self._over = self._over or str(error)
            self._cut()
            raise

    def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """Ask for actions.

        Args:
            observation: Images and state as the metadata describe them; `prompt` holds the instruction.

        Returns:
            `actions`, (chunk, action), and timings.

        Raises:
            ObservationError: A part of the observation cannot be sent; nothing was sent.
            RobotFault: The server answers with an error, or not in time. After an error that it answered, the next
                request may succeed; otherwise the connection is over, and every later call raises that at once.
        """
        deadline = time.monotonic() + self._timeout_s
        if not self._turn.acquire(timeout=self._timeout_s):
            raise RobotFault(
                f"Another thread's request took all of timeout_s, {self._timeout_s:g} s, so this one was not sent; "
                "give each thread a Client of its own."
            )
        try:
            self._check_open()
            begins, self._begins = self._begins, False  # a reset from now on is for the next request
            try:
                answer = self._ask({"reset": True, **observation} if begins else observation, deadline)
            except BaseException:
                self._begins |= begins
                raise
        finally:
            self._turn.release()
        return answer

    def _ask(self, observation: Mapping[str, Any], deadline: float) -> dict[str, Any]:
        """The answer to an observation, with actions that can be used; see `infer`."""
        answer = self._answer(self._packed(observation), deadline)
        actions = answer.get("actions")
        if not isinstance(actions, np.ndarray):
            raise RobotFault(
                f"The server at {self._uri} answered no array of actions; check that it is a policy server."
            )
        if not np.isfinite(actions).all():
            raise RobotFault(f"The server at {self._uri} answered actions that are not finite; check its policy.")
        return answer

    def reset(self) -> None:
        """Begin an episode with the next observation that is sent, also while a request is under way."""
        self._begins = True

    def close(self) -> None:
        """End the connection, even while another thread waits for an answer. It is quick, and never raises."""
        if not self._over:
            self._over = "it was closed"
            self._frames.put(None)
            self._thread.join(min(GOODBYE_S, self._timeout_s))
        self._cut()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _attend(self, headers: dict[str, str] | None) -> None:
        """What the connection's thread does: send requests, and hand over answers."""
        try:
            with connect(
                self._uri,
                compression=None,
                max_size=None,
                additional_headers=headers,
                open_timeout=self._timeout_s,
                ping_interval=None,  # timeout_s limits the waiting; a server that infers for long answers no ping
                close_timeout=GOODBYE_S,
                logger=_quiet,
            ) as self._connection:
                if not self._over:  # otherwise it took so long that nobody waits for it
                    self._answers.put(self._connection.recv())
                    while (frame := self._frames.get()) is not None:
                        self._connection.send(frame)
                        self._answers.put(self._connection.recv())
            self._answers.put(EOFError())  # for a request that came while it was being closed
        except Exception as error:  # whatever it is, the thread that waits must get it
            self._answers.put(error)

    def _answer(self, frame: bytes | None, deadline: float) -> dict[str, Any]:
        """The answer to a frame; for None, the server's first frame."""
        try:
            if frame is not None:
                self._frames.put(frame)
            answer = self._answers.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise self._lost(f"The server gave no answer within {self._timeout_s:g} s") from None
        except BaseException:  # Ctrl-C: what comes later would be taken for the answer to another request
            self._lost("A request was interrupted")
            raise
        if isinstance(answer, Exception):
            self._check_open()
            if self._connection is None:
                raise _refusal(self._uri, answer, self._has_key) from answer
            raise self._lost(f"The server closed the connection ({str(answer) or type(answer).__name__})") from answer
        if isinstance(answer, str):
            raise RobotFault(f"The server at {self._uri} answered with an error: {answer}")
        try:
            return unpack(answer)
        except ObservationError as error:
            raise self._lost(f"The server sent what is no openpi frame ({error})") from error

    def _check_open(self) -> None:
        if self._over:
            raise RobotFault(f"The connection to {self._uri} is over: {self._over}. Connect again with a new Client.")

    def _lost(self, why: str) -> RobotFault:
        """End the connection, and make the error that says why."""
        self._over = self._over or why[0].lower() + why[1:]
        self._cut()
        return RobotFault(f"{why}; connect again to {self._uri} with a new Client.")

    def _cut(self) -> None:
        """End the connection now, whatever its thread does."""
        self._frames.put(None)
        if self._connection is not None:
            with suppress(
                OSError, TypeError
            ):  # it is closed; or it is TLS through a TLS proxy, which is no real socket
                socket.socket.shutdown(self._connection.socket, socket.SHUT_RDWR)

    def _packed(self, observation: Mapping[str, Any]) -> bytes:
        try:
            frame = pack(observation)
        except (TypeError, ValueError, OverflowError):
            for name, value in observation.items():
                try:
                    pack({name: value})
                except (TypeError, ValueError, OverflowError) as error:
                    raise ObservationError(
                        f"{name} cannot be sent ({error}); send NumPy arrays of numbers, text, numbers, true or false."
                    ) from error
            raise
        limit = self.metadata.get("max_frame_bytes")
        if isinstance(limit, int) and len(frame) > limit:
            largest = max(observation, key=lambda name: getattr(observation[name], "nbytes", 0))
            raise ObservationError(
                f"The observation makes a frame of {len(frame)} bytes, and the server takes at most {limit}; send its "
                f"largest part, {largest} {np.shape(observation[largest])}, in the shape that the metadata give."
            )
        return frame


def _refusal(uri: str, error: Exception, has_key: bool) -> DyslError:
    """The error that says why there is no connection."""
    if isinstance(error, InvalidStatus) and error.response.status_code in (401, 403):
        response = "refuses this API key" if has_key else "wants an API key, and api_key gives none"
        return ConfigError(f"The server at {uri} {response} ({error}); give the one that it was started with.")
    if isinstance(error, ssl.SSLError):
        return ConfigError(
            f"uri {uri} asks for TLS, which failed ({error}); dysl serve itself speaks ws://, and the certificate of "
            "what speaks wss:// in front of it must be one that this machine trusts."
        )
    if isinstance(error, (InvalidURI, ValueError)):
        return ConfigError(f"uri must be like ws://HOST:8000 or ws://[::1]:8000, got {uri!r} ({error}).")
    if isinstance(error, ImportError) or "proxy" in str(error):
        return ConfigError(
            f"uri {uri} was tried through the proxy that the environment names, which failed ({error}); add its host "
            "to no_proxy to do without."
        )
    reason = str(error) or type(error).__name__
    is_down = not isinstance(error, InvalidHandshake) or isinstance(error.__cause__, EOFError)
    if isinstance(error, InvalidStatus):
        reason += f", {error.response.body.decode(errors='replace').strip()!r:.200}"
        is_down = error.response.status_code >= 500
    if is_down:
        return RobotFault(f"The server at {uri} does not answer ({reason}); check that dysl serve is running there.")
    return ConfigError(f"uri {uri} is answered, but not by a policy server ({reason}); check host and port.")
