"""Types that all subpackages share: observations, action chunks, and the specifications of embodiments and policies.

They are plain data on NumPy. Nothing here knows a simulator, a model or a file, so that every subpackage, the
torch-free robot runtime included, can import it.
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
"""What a robot or a simulated environment shows at one moment, under LeRobot's keys.

`observation.images.<camera>`: uint8, (height, width, 3). `observation.state`: float32, (state,). `task`: str, the
instruction in plain English.
"""

IMAGE_PREFIX = "observation.images."
STATE_KEY = "observation.state"
TASK_KEY = "task"


RELATIVE = ("dx", "dy", "dz", "droll", "dpitch", "dyaw")
"""Names of action dimensions that are displacements of the end effector, so that zero holds it."""
LIBERO_STATE = ("x", "y", "z", "rx", "ry", "rz", "finger_left", "finger_right")
"""Names of LIBERO's state: the end effector's position in metres and rotation vector, the fingers' joint positions."""
LIBERO_ACTIONS = (*RELATIVE, "gripper")
"""Names of LIBERO's actions; its gripper is -1 to open and 1 to close."""
ACTION_KINDS = ("position", "velocity", "torque", "delta")
"""What an action can be: a position to go to, a velocity to move at, a torque (or effort, or current) to apply, or a
change of position."""


def is_gripper(name: str) -> bool:
    """Tell whether a dimension is a gripper's: "gripper", LeRobot's "gripper.pos" and "left_gripper.pos" are."""
    return "gripper" in re.split(r"[._\W]+", name.lower())


def gripper_columns(names: Sequence[str]) -> tuple[int, ...]:
    """Return the indices of the dimensions that are grippers'."""
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
    """What an embodiment (a robot or a simulated environment) shows and accepts.

    Attributes:
        cameras: Camera name to image size, (height, width) in pixels.
        state_names: A name for each dimension of `observation.state`.
        action_names: A name for each dimension of the action.
        action_low: Smallest accepted action, a value for each dimension, in the embodiment's units.
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
        """Clip actions, (..., action), to the accepted range: that is how they are executed."""
        return np.clip(actions, np.asarray(self.action_low, np.float32), np.asarray(self.action_high, np.float32))


@dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation of the training data, a value for each dimension.

    Attributes:
        mean: Mean of each dimension.
        std: Standard deviation of each dimension.
        signs: Dimensions that take only the values -1 and 1, as a gripper that opens or closes: `undo` returns the sign
            of their value.

    Raises:
        ConfigError: They differ in length, are not finite, a deviation is not above zero, or a sign's dimension is not
            there.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    mean: tuple[float, ...]
    std: tuple[float, ...]
    signs: tuple[int, ...] = field(default=(), repr=False)  # not in version 0.1, whose fingerprints hash the repr

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.signs) - set(range(len(self.mean)))):
            raise ConfigError(f"normalisation: signs must be among {len(self.mean)} dimensions, got {unknown[0]}.")
        if len(self.mean) != len(self.std):
            raise ConfigError(
                f"normalisation: mean and std must be of one length, got {len(self.mean)} and {len(self.std)}."
            )
        if not all(np.isfinite(self.mean)) or not all(0 < s < np.inf for s in self.std):
            raise ConfigError(f"normalisation: mean and std must be finite, std also above zero, got {self}.")

    def apply(self, values: FloatArray) -> FloatArray:
        """Normalise values, (..., dimension), to mean 0 and deviation 1."""
        mean, std = self._arrays
        return (values - mean) / std

    def undo(self, values: FloatArray) -> FloatArray:
        """Convert normalised values, (..., dimension), back to their units."""
        mean, std = self._arrays
        restored: FloatArray = values * std + mean
        if self.signs:
            columns = list(self.signs)
            restored[..., columns] = np.sign(restored[..., columns])
        return restored

    def as_executed(self, values: FloatArray) -> FloatArray:
        """Return normalised values as they are executed: dimensions of `signs` are brought to one of their two."""
        return self.apply(self.undo(values)) if self.signs else values

    @cached_property
    def _arrays(self) -> tuple[FloatArray, FloatArray]:
        return np.array(self.mean, np.float32), np.array(self.std, np.float32)


FULL_QUALITY = "full"


@dataclass(frozen=True)
class PolicySpec:
    """What a policy expects of an embodiment, and what it predicts.

    Attributes:
        cameras: Camera name to image size, (height, width) in pixels, that the policy was trained on.
        state_names: A name for each dimension of `observation.state`.
        action_names: A name for each dimension of the action.
        rate_hz: Actions a second of the embodiment that the policy was trained on.
        chunk_length: Actions predicted by one inference.
        execute_steps: How many of them are executed before the next inference.
        state_normalisation: Normalisation of `observation.state`.
        action_normalisation: Normalisation of actions.
        rendering: `FULL_QUALITY` for a policy that was trained on simulated images with shadows and reflections; None:
            without them, or on a real robot.

    Raises:
        ConfigError: A field is out of range; the message names it.
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
    rendering: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.rendering not in (None, FULL_QUALITY):
            raise ConfigError(f"rendering: must be {FULL_QUALITY!r} or left out, got {self.rendering!r}.")
        if not 1 <= self.execute_steps <= self.chunk_length:
            raise ConfigError(
                f"execute_steps: must be from 1 to the chunk_length of {self.chunk_length}, got {self.execute_steps}."
            )
        if not self.rate_hz > 0:
            raise ConfigError(f"rate_hz: must be above zero, got {self.rate_hz}.")
        for name, normalisation, names in (
            ("state_normalisation", self.state_normalisation, self.state_names),
            ("action_normalisation", self.action_normalisation, self.action_names),
        ):
            if len(normalisation.mean) != len(names):
                raise ConfigError(
                    f"{name}: must have {len(names)} dimensions, as there are names, got {len(normalisation.mean)}."
                )

    def check_embodiment(self, embodiment: EmbodimentSpec) -> None:
        """Refuse an embodiment that this policy cannot control, before anything moves.

        Raises:
            ConfigError: A field differs; the message names the first one.
        """
        for camera, size in self.cameras.items():
            if camera not in embodiment.cameras:
                offered = ", ".join(sorted(embodiment.cameras))
                raise ConfigError(f"cameras: the policy needs camera {camera!r}; this embodiment has {offered}.")
            if tuple(embodiment.cameras[camera]) != tuple(size):
                raise ConfigError(
                    f"cameras: the policy was trained on {camera!r} at {size[0]}x{size[1]} pixels, this embodiment has "
                    f"{embodiment.cameras[camera][0]}x{embodiment.cameras[camera][1]}; ask it for the policy's size."
                )
        for name, mine, theirs in (
            ("state_names", self.state_names, embodiment.state_names),
            ("action_names", self.action_names, embodiment.action_names),
            ("rate_hz", self.rate_hz, embodiment.rate_hz),
        ):
            if mine != theirs:
                raise ConfigError(
                    f"{name}: the policy was trained with {_shown(mine)}, this embodiment has {_shown(theirs)}; "
                    "run the policy where it was trained, or train it on demonstrations of this embodiment."
                )

    def blank_observation(self, instruction: str) -> dict[str, Any]:
        """Make an observation that fits this policy, of black images and the mean state, for measurements of time."""
        return {
            **{IMAGE_PREFIX + camera: np.zeros((*size, 3), np.uint8) for camera, size in self.cameras.items()},
            STATE_KEY: np.array(self.state_normalisation.mean, np.float32),
            TASK_KEY: instruction,
        }

    def check_observation(self, observation: Observation) -> None:
        """Refuse an observation of another kind, shape or size than the policy was trained on.

        Raises:
            ObservationError: A value does not fit; the message names its key, what was expected and what came.
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
            raise ObservationError(f"{STATE_KEY}: has a value that is not finite: {state.tolist()}; check the sensor.")
        if not isinstance(observation.get(TASK_KEY), str):
            raise ObservationError(
                f"{TASK_KEY}: expected the instruction as text, got {_kind(observation.get(TASK_KEY))}."
            )


@dataclass(frozen=True)
class InferenceTiming:
    """The parts of one inference's time, in seconds of a monotonic clock.

    A batch of observations is inferred together, so its chunks share one timing.
    """

    encode_s: float
    llm_s: float
    decode_s: float
    guidance_s: float = 0.0

    @property
    def total_s(self) -> float:
        """Time of the whole policy: encode + LLM + decode + guidance."""
        return self.encode_s + self.llm_s + self.decode_s + self.guidance_s


@dataclass(frozen=True)
class SkipTrace:
    """What layer skipping did in one inference of one episode.

    Attributes:
        layers_run: Which layers ran in the pass that could skip, (layers,).
        skips: Exit at which a block was left, to the target, where the pass went on.
        outputs: Layer to its controller's output, for the controllers that were asked.
        allow_points: For each block, the number of dynamic layers that had to run.
        continuity: Continuity of the trajectory before the inference; None while it is not known.
        is_verified: Whether the full model predicted again.
        is_verification_late: Whether it should have, but no time was left.
        resumed_from: The first layer that ran once more in verification.
        controllers_s: Seconds in controllers, for the whole batch.
        adapters_s: Seconds in adapters.
        verify_s: Seconds in verification.
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
        """Number of layers that ran, verification included."""
        again = len(self.layers_run) - self.resumed_from if self.resumed_from is not None else 0
        return int(self.layers_run.sum()) + again


@dataclass(frozen=True)
class ActionChunk:
    """What one inference predicts for one episode.

    Attributes:
        actions: (chunk, action) float32, in the embodiment's units, in the order of execution.
        timing: Where the time went.
        skips: What was skipped; None for a policy that skips nothing.
    """

    actions: FloatArray
    timing: InferenceTiming
    skips: SkipTrace | None = None


@dataclass
class EpisodeState:
    """What a policy remembers of one running episode.

    The caller makes it with `Policy.reset`, passes it to every `infer` of that episode, and appends each action that is
    executed, as `policies.select_action` does. A batch of episodes is a list of states; nothing is kept anywhere else.

    Attributes:
        executed: The latest executed actions, oldest first, each (action,) in the embodiment's units.
        planned: Actions of the running chunk that are still to be executed, where `policies.select_action` acts.
        needed_at: Deadline of the coming inference, in seconds of `time.perf_counter`; None for no limit.
        guidance: Memory of layer skipping; None for a policy that skips nothing.
        leftover: The running chunk's actions from the coming observation's time on, (actions, action) in the
            embodiment's units, where the coming chunk shall go on from them; None where it need not.
        sent_before: How many of these will have been sent when the coming chunk is there.
    """

    executed: deque[FloatArray] = field(default_factory=lambda: deque(maxlen=64))
    planned: deque[FloatArray] = field(default_factory=deque)
    needed_at: float | None = None
    guidance: Any = None
    leftover: FloatArray | None = None
    sent_before: int = 0

    def has_time(self, seconds: float) -> bool:
        """Tell whether so many seconds are left before the deadline."""
        return self.needed_at is None or time.perf_counter() + seconds <= self.needed_at


def with_suffix(instruction: str, suffix: str) -> str:
    """Return an instruction that ends in what the policy was trained to see at its end."""
    return instruction if instruction.endswith(suffix) else instruction + suffix


def check_actions(actions: NDArray[Any], action_dim: int) -> None:
    """Refuse actions that must not be executed anywhere.

    Args:
        actions: (action,) or (time, action).
        action_dim: Number of action dimensions of the embodiment.

    Raises:
        ActionError: The dimension differs, or a value is NaN or infinite.
    """
    if actions.shape[-1:] != (action_dim,):
        raise ActionError(
            f"action: expected {action_dim} dimensions, got an array of shape {actions.shape}; "
            "use a policy that was trained on this embodiment."
        )
    if not np.isfinite(actions).all():
        raise ActionError(
            f"action: has a value that is not finite: {actions.tolist()}; nothing was executed. Check the policy's "
            "training curve and the observations that it got."
        )


def _kind(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape}"
    return "nothing" if value is None else type(value).__name__


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)
