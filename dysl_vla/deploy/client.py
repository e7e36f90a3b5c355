"""A client of `dysl serve`, or of any openpi server: NumPy, websockets and msgpack alone."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from dysl_vla.deploy.wire import pack, unpack
from dysl_vla.errors import ConfigError, ObservationError, RobotFault
from dysl_vla.extras import needs_extra

with needs_extra("serve"):
    from websockets.exceptions import InvalidHandshake, InvalidURI, WebSocketException
    from websockets.sync.client import connect


class Client:
    """One robot's connection to a policy server, and one running episode.

    Args:
        uri: "ws://127.0.0.1:8000".
        api_key: If the server asks for one.
        timeout_s: Of every answer.

    Attributes:
        metadata: What the server expects and answers.

    Raises:
        ConfigError: The address or the key is wrong.
        RobotFault: Nobody answers.
    """

    def __init__(self, uri: str, *, api_key: str | None = None, timeout_s: float = 10.0) -> None:
        headers = {"Authorization": f"Api-Key {api_key}"} if api_key else None
        self._timeout_s = timeout_s
        try:
            self._socket = connect(
                uri, compression=None, max_size=None, additional_headers=headers, open_timeout=timeout_s
            )
        except InvalidURI as error:
            raise ConfigError(f"uri: {error}.") from error
        except InvalidHandshake as error:
            mend = "is the API key right?" if "401" in str(error) else "is a policy server running there?"
            raise ConfigError(f"uri: {uri} refuses the connection ({error}); {mend}") from error
        except (OSError, WebSocketException) as error:
            raise RobotFault(f"uri: {uri} does not answer ({error}); is dysl serve running there?") from error
        try:
            self.metadata = self._receive()
        except RobotFault:
            self.close()
            raise
        self._begins = True

    def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """Ask for actions.

        Args:
            observation: As the metadata says; `prompt` holds the instruction.

        Returns:
            `actions`, (chunk, action), and timings.

        Raises:
            RobotFault: The server answers with an error, or not at all.
        """
        message = {"reset": True, **observation} if self._begins else dict(observation)
        try:
            self._socket.send(pack(message))
        except WebSocketException as error:
            raise RobotFault(f"server: the connection is gone ({error}).") from error
        answer = self._receive()
        self._begins = False
        return answer

    def reset(self) -> None:
        """The next observation begins an episode."""
        self._begins = True

    def close(self) -> None:
        """End the connection."""
        self._socket.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _receive(self) -> dict[str, Any]:
        try:
            frame = self._socket.recv(timeout=self._timeout_s)
            answer = frame if isinstance(frame, str) else unpack(frame)
        except TimeoutError as error:
            self.close()  # an answer that comes later would be taken for that to another question
            raise RobotFault(f"server: no answer within {self._timeout_s:g} s; connect again.") from error
        except WebSocketException as error:
            raise RobotFault(f"server: closed the connection ({error}); connect again.") from error
        except ObservationError as error:
            self.close()
            raise RobotFault(f"server: its answer is no openpi frame ({error})") from error
        if isinstance(answer, str):
            raise RobotFault(f"server: {answer}")
        return answer
