"""Requests to a policy server: how they are described to clients, and how they are checked when they come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dysl_vla import provenance
from dysl_vla.deploy.wire import unpack
from dysl_vla.errors import ObservationError
from dysl_vla.types import IMAGE_PREFIX, STATE_KEY, TASK_KEY, FloatArray, PolicySpec

PROMPT, RESET, EXECUTED = "prompt", "reset", "executed"
MAX_PROMPT = 2000
"""Largest number of characters of an instruction."""
MAX_EXECUTED = 64
"""Largest number of actions since the last request: guidance uses fewer."""


@dataclass(frozen=True)
class Request:
    """A request that was checked.

    Attributes:
        observation: Fits the policy.
        begins: Whether it begins an episode.
        executed: Actions that were executed since the last request, each (action,); None: the client does not say.
    """

    observation: dict[str, Any]
    begins: bool
    executed: list[FloatArray] | None


class RequestFormat:
    """What requests for a policy hold.

    Args:
        spec: The policy's specification.
        instruction: An instruction, as an example for messages.
    """

    def __init__(self, spec: PolicySpec, instruction: str) -> None:
        self._spec, self._instruction = spec, instruction

    def metadata(self, max_frame_bytes: int) -> dict[str, Any]:
        """Description of requests and answers for clients: the first frame of every connection.

        Args:
            max_frame_bytes: Size of the largest frame that the server reads.
        """
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
            "max_frame_bytes": max_frame_bytes,
            "versions": provenance.versions(),
        }

    def parse(self, frame: bytes | str) -> Request:
        """Read and check a request.

        Raises:
            ObservationError: The frame is not a request, or its observation does not fit the policy.
        """
        if isinstance(frame, str):
            raise ObservationError("A frame must be a msgpack map in a binary message, got text.")
        message = unpack(frame)
        begins = message.get(RESET, False)
        if not isinstance(begins, (bool, np.bool_)):
            raise ObservationError(f"{RESET} must be true or false, got {type(begins).__name__}.")
        prompt = self._checked_prompt(message.get(PROMPT))
        for name in (*(IMAGE_PREFIX + camera for camera in self._spec.cameras), STATE_KEY):
            if message.get(name) is None:
                raise ObservationError(f"{name} is missing; the frame holds {', '.join(map(repr, message))}.")
        observation = {IMAGE_PREFIX + camera: message[IMAGE_PREFIX + camera] for camera in self._spec.cameras}
        observation |= {STATE_KEY: _float32(message[STATE_KEY]), TASK_KEY: prompt}
        self._spec.check_observation(observation)
        return Request(observation, bool(begins), self._checked_executed(message.get(EXECUTED)))

    def _checked_prompt(self, prompt: Any) -> str:
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

    def _checked_executed(self, executed: Any) -> list[FloatArray] | None:
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


def _float32(value: Any) -> Any:
    """An array in the precision that it is used in; what is too large becomes infinite, and is refused as that."""
    with np.errstate(over="ignore"):
        return value.astype(np.float32) if isinstance(value, np.ndarray) else value
