"""The vocabulary that crosses rooms: what a world shows, what a policy answers, and what both declare of themselves.

Plain data on NumPy. Nothing here knows a simulator, a model or a file, so that every room, the torch-free robot runtime
included, can import it.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from dysl_vla.errors import ActionError, ConfigError, ObservationError

FloatArray = NDArray[np.float32]
ImageArray = NDArray[np.uint8]

Observation = Mapping[str, Any]
"""One moment as the world shows it, under LeRobot's keys.

`observation.images.<camera>`: uint8, (height, width, 3). `observation.state`: float32, (state,). `task`: str, the
instruction in plain English.
"""

IMAGE_PREFIX = "observation.images."
STATE_KEY = "observation.state"
TASK_KEY = "task"


RELATIVE = ("dx", "dy", "dz", "droll", "dpitch", "dyaw")
"""Names of actions that move the end effector by so much, so that zero holds it."""
ACTION_KINDS = ("position", "velocity", "torque", "delta")
"""What an action can be: a position to go to, a velocity to move at, a torque (or effort, or current) to apply, or a
change of position."""


def is_gripper(name: str) -> bool:
    """Whether a dimension is a gripper's: "gripper", LeRobot's "gripper.pos" and "left_gripper.pos"."""
    return "gripper" in re.split(r"[._\W]+", name.lower())


def gripper_columns(names: Sequence[str]) -> tuple[int, ...]:
    """Which of some dimensions are grippers'."""
    return tuple(index for index, name in enumerate(names) if is_gripper(name))


def action_kinds(names: Sequence[str]) -> tuple[str, ...]:
    """The kind of each action, one of `ACTION_KINDS`, as its name tells it.

    Names in `RELATIVE` are deltas. Names that end in "velocity", "_vel" or ".vel" are velocities; those that end in
    "torque", "effort" or ".current" are torques. All others are positions: joints ("shoulder", "shoulder.pos"), "x" and
    grippers.
    """
    return tuple(map(_action_kind, names))


def _action_kind(name: str) -> str:
    lower = name.lower()
    if name in RELATIVE:
        return "delta"
    if lower == "vel" or lower.endswith(("velocity", "_vel", ".vel")):
        return "velocity"
    return "torque" if lower.endswith(("torque", "effort", ".current")) else "position"


@dataclass(frozen=True)
class EmbodimentSpec:
    """What a world (a simulated environment or a robot) shows and accepts.

    Attributes:
        cameras: Camera name to image size, (height, width) in pixels.
        state_names: One name a dimension of `observation.state`.
        action_names: One name a dimension of the action.
        action_low: Smallest accepted action, a value a dimension, in the world's units.
        action_high: Largest accepted action.
        rate_hz: Actions a second.
        action_kinds: One of `ACTION_KINDS` for each dimension of the action; None: as the names tell.

    Raises:
        ConfigError: `action_kinds` has an unknown kind, or not one for each action.
    """

    cameras: Mapping[str, tuple[int, int]]
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    rate_hz: float
    action_kinds: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.action_kinds is None:
            return
        if len(self.action_kinds) != len(self.action_names):
            raise ConfigError(
                f"action_kinds must have one kind for each of the {len(self.action_names)} actions, "
                f"{', '.join(self.action_names)}; got {len(self.action_kinds)}."
            )
        for name, kind in zip(self.action_names, self.action_kinds, strict=True):
            if kind not in ACTION_KINDS:
                raise ConfigError(f"action_kinds must be among {', '.join(ACTION_KINDS)}; got {kind!r} for {name}.")

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of each action: as declared, or as the names tell."""
        return action_kinds(self.action_names) if self.action_kinds is None else self.action_kinds

    def clip(self, actions: FloatArray) -> FloatArray:
        """Actions as they are executed, (..., action): inside the accepted range."""
        return np.clip(actions, np.asarray(self.action_low, np.float32), np.asarray(self.action_high, np.float32))


@dataclass(frozen=True)
class Normalisation:
    """Mean and deviation of the training data, a value a dimension.

    Raises:
        ConfigError: They differ in length, are not finite, or a deviation is not above zero.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std):
            raise ConfigError(f"normalisation: mean has {len(self.mean)} dimensions, std has {len(self.std)}.")
        if not all(np.isfinite(self.mean)) or not all(0 < s < np.inf for s in self.std):
            raise ConfigError(f"normalisation: {self} must be finite, with std above zero.")

    def apply(self, values: FloatArray) -> FloatArray:
        """To mean 0 and deviation 1; (..., dimension)."""
        mean, std = self._arrays
        return (values - mean) / std

    def undo(self, values: FloatArray) -> FloatArray:
        """Back to the world's units; (..., dimension)."""
        mean, std = self._arrays
        return values * std + mean

    @cached_property
    def _arrays(self) -> tuple[FloatArray, FloatArray]:
        return np.array(self.mean, np.float32), np.array(self.std, np.float32)


@dataclass(frozen=True)
class PolicySpec:
    """What a policy expects of a world, and how it answers.

    Attributes:
        cameras: Camera name to image size, (height, width) in pixels, that the policy was trained on.
        state_names: One name a dimension of `observation.state`.
        action_names: One name a dimension of the action.
        rate_hz: Actions a second of the world that the policy was trained in.
        chunk_length: Actions predicted by one inference.
        execute_steps: How many of them are executed before the next inference.
        state_normalisation: Of `observation.state`.
        action_normalisation: Of actions.

    Raises:
        ConfigError: Naming a field that cannot work.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    cameras: Mapping[str, tuple[int, int]]
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    rate_hz: float
    chunk_length: int
    execute_steps: int
    state_normalisation: Normalisation
    action_normalisation: Normalisation

    def __post_init__(self) -> None:
        if not 1 <= self.execute_steps <= self.chunk_length:
            raise ConfigError(
                f"execute_steps: {self.execute_steps} is not between 1 and the chunk_length of {self.chunk_length}."
            )
        if not self.rate_hz > 0:
            raise ConfigError(f"rate_hz: {self.rate_hz} must be above zero.")
        for name, normalisation, names in (
            ("state_normalisation", self.state_normalisation, self.state_names),
            ("action_normalisation", self.action_normalisation, self.action_names),
        ):
            if len(normalisation.mean) != len(names):
                raise ConfigError(f"{name}: has {len(normalisation.mean)} dimensions, there are {len(names)} names.")

    def check_embodiment(self, embodiment: EmbodimentSpec) -> None:
        """Refuse a world that this policy cannot control, before anything moves.

        Raises:
            ConfigError: Naming the first field that differs.
        """
        for camera, size in self.cameras.items():
            if camera not in embodiment.cameras:
                offered = ", ".join(sorted(embodiment.cameras))
                raise ConfigError(f"cameras: the policy needs camera {camera!r}; this world offers {offered}.")
            if tuple(embodiment.cameras[camera]) != tuple(size):
                raise ConfigError(
                    f"cameras: the policy was trained on {camera!r} at {size[0]}x{size[1]} pixels, this world gives "
                    f"{embodiment.cameras[camera][0]}x{embodiment.cameras[camera][1]}; ask it for the policy's size."
                )
        for name, mine, theirs in (
            ("state_names", self.state_names, embodiment.state_names),
            ("action_names", self.action_names, embodiment.action_names),
            ("rate_hz", self.rate_hz, embodiment.rate_hz),
        ):
            if mine != theirs:
                raise ConfigError(
                    f"{name}: the policy was trained with {_shown(mine)}, this world has {_shown(theirs)}; "
                    "evaluate it in the world that it was trained for, or train it on demonstrations of this one."
                )

    def blank_observation(self, instruction: str) -> dict[str, Any]:
        """What fits this policy and shows nothing: black images, the mean state; for measuring."""
        return {
            **{IMAGE_PREFIX + camera: np.zeros((*size, 3), np.uint8) for camera, size in self.cameras.items()},
            STATE_KEY: np.array(self.state_normalisation.mean, np.float32),
            TASK_KEY: instruction,
        }

    def check_observation(self, observation: Observation) -> None:
        """Refuse an observation of another kind, shape or size than the policy was trained on.

        Raises:
            ObservationError: Naming the key, what came and what was expected.
        """
        for camera, (height, width) in self.cameras.items():
            image = observation.get(IMAGE_PREFIX + camera)
            if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape != (height, width, 3):
                raise ObservationError(
                    f"{IMAGE_PREFIX}{camera}: expected uint8 ({height}, {width}, 3), got {_kind(image)}."
                )
        state = observation.get(STATE_KEY)
        if not isinstance(state, np.ndarray) or state.shape != (len(self.state_names),):
            raise ObservationError(f"{STATE_KEY}: expected float32 ({len(self.state_names)},), got {_kind(state)}.")
        if not np.isfinite(state).all():
            raise ObservationError(f"{STATE_KEY}: has a value that is not finite: {state.tolist()}; mend the sensor.")
        if not isinstance(observation.get(TASK_KEY), str):
            raise ObservationError(
                f"{TASK_KEY}: expected the instruction as text, got {_kind(observation.get(TASK_KEY))}."
            )


@dataclass(frozen=True)
class InferenceTiming:
    """Where one inference spent its time, in seconds of a monotonic clock.

    A batch of observations is inferred together, so its chunks share one timing.
    """

    encode_s: float
    llm_s: float
    decode_s: float
    guidance_s: float = 0.0

    @property
    def total_s(self) -> float:
        """The whole policy: encode + LLM + decode + guidance."""
        return self.encode_s + self.llm_s + self.decode_s + self.guidance_s


@dataclass(frozen=True)
class SkipTrace:
    """What layer skipping did in one inference of one episode.

    Attributes:
        layers_run: Which layers ran when it was decided, (layers,).
        skips: Layer that a block was left at, to the layer landed on.
        outputs: Layer to its controller's output, of those that were asked.
        allow_points: For each block, the dynamic layers that had to run.
        continuity: Of the trajectory, before the inference; None while it is not known.
        is_verified: The full model predicted again.
        is_verification_late: It should have, but there was no time left.
        resumed_from: The first layer that then ran once more.
        controllers_s: Seconds in controllers, for the whole batch.
        adapters_s: Seconds in adapters.
        verify_s: Seconds in predicting again.
    """

    layers_run: NDArray[np.bool_]
    skips: Mapping[int, int]
    outputs: Mapping[int, float]
    allow_points: tuple[int, ...]
    continuity: float | None
    is_verified: bool = False
    is_verification_late: bool = False
    resumed_from: int | None = None
    controllers_s: float = 0.0
    adapters_s: float = 0.0
    verify_s: float = 0.0

    @property
    def layers(self) -> int:
        """How many layers ran in all, verification included."""
        again = len(self.layers_run) - self.resumed_from if self.resumed_from is not None else 0
        return int(self.layers_run.sum()) + again


@dataclass(frozen=True)
class ActionChunk:
    """What one inference answers for one episode.

    Attributes:
        actions: (chunk, action) float32, in the world's units, in the order of execution.
        timing: Where the time went.
        skips: What was skipped; None for a policy that skips nothing.
    """

    actions: FloatArray
    timing: InferenceTiming
    skips: SkipTrace | None = None


@dataclass
class EpisodeState:
    """What a policy remembers of one running episode.

    The caller makes it with `Policy.reset`, hands it to every `infer` of that episode and appends each action as it was
    executed. A batch of episodes is a list of these; nothing is kept anywhere else.

    Attributes:
        executed: The latest executed actions, oldest first, each (action,) in the world's units.
        needed_at: When the answer to the coming inference is needed, in seconds of `time.perf_counter`; None: no limit.
    """

    executed: deque[FloatArray] = field(default_factory=lambda: deque(maxlen=64))
    needed_at: float | None = None

    def has_time(self, seconds: float) -> bool:
        """So much can still be spent on the answer."""
        return self.needed_at is None or time.perf_counter() + seconds <= self.needed_at


def check_actions(actions: NDArray[Any], action_dim: int) -> None:
    """Refuse actions that no world should be given.

    Args:
        actions: (action,) or (time, action).
        action_dim: The world's number of action dimensions.

    Raises:
        ActionError: For another dimension, NaN or infinity.
    """
    if actions.shape[-1:] != (action_dim,):
        raise ActionError(
            f"action: expected {action_dim} dimensions, got an array of shape {actions.shape}; "
            "use a policy that was trained for this world."
        )
    if not np.isfinite(actions).all():
        raise ActionError(
            f"action: has a value that is not finite: {actions.tolist()}; nothing was executed. Look at the policy's "
            "training curve and at the observations that it got."
        )


def _kind(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape}"
    return "nothing" if value is None else type(value).__name__


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)
