"""The control loop: actions go out at a fixed rate, whatever inference and cameras do. Knows no simulator and no torch.

Two threads. One looks and infers: it waits for a reading, predicts a chunk, and puts it down. The other keeps the
schedule, an absolute one: each cycle it takes, from the latest chunk, the action that was predicted for this very time
(the i-th of a chunk is for i periods after its reading), joins it to what it sent before, checks it against the limits,
and sends it. An action of a reading that is too old is never sent; what happens instead is declared.
"""

from __future__ import annotations

import json
import math
import queue
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dysl_vla import provenance
from dysl_vla.deploy.limits import Guard, Limits
from dysl_vla.deploy.robot import Reading, Robot, make_robot, open_policy
from dysl_vla.errors import ConfigError, DyslError, RobotFault, SafetyStop
from dysl_vla.files import is_unused, write_json
from dysl_vla.policies.base import Policy
from dysl_vla.types import IMAGE_PREFIX, STATE_KEY, TASK_KEY, ActionChunk, FloatArray, ImageArray, Observation

clock = time.perf_counter
LOG, ACCOUNT = "cycles.jsonl", "account.json"
HISTORY = 64
FIRST_CHUNK_S = 10.0
JOIN_S = 5.0
NAP_S = 0.02
MOVED = 0.1
"""Change of the state, in deviations of the demonstrated states, that a camera must show."""
LATE = 0.1
"""A cycle that sends this share of a period after its time is late; a whole period after it, missed."""
HISTOGRAM_MS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)


@dataclass(frozen=True)
class LoopConfig:
    """How a control loop behaves."""

    on_miss: Literal["hold", "continue", "stop"] = "continue"
    """When no fresh chunk is there: hold still, go on with the last chunk as long as it is not too old, or stop."""
    stop_after: int = 20
    """Missed cycles in a row after which the robot is stopped; with `--on-miss stop` the first one does."""
    max_age_s: float = 0.4
    """Age of a reading beyond which no action that was predicted from it is sent."""
    blend: int = 2
    """Cycles in which a new chunk takes over from the one before; 0: at once."""
    frozen_s: float = 1.0
    """A camera that shows the very same image for so long, although the robot has moved, stops it."""
    warm_up: int = 10
    """Inferences before the robot is enabled: the first ones are slow."""

    def __post_init__(self) -> None:
        if self.on_miss not in ("hold", "continue", "stop"):
            raise ConfigError(f"on_miss: {self.on_miss!r} is none of hold, continue, stop.")
        if self.stop_after < 1 or self.warm_up < 1 or self.blend < 0:
            raise ConfigError("stop_after and warm_up must be at least 1, blend not negative.")
        for name in ("max_age_s", "frozen_s"):
            if not 0 < getattr(self, name) < np.inf:
                raise ConfigError(f"{name}: {getattr(self, name)} must be above zero and finite.")


@dataclass
class Account:
    """What became of the cycles.

    Attributes:
        cycles: In all.
        on_time: Sent within a tenth of a period of their time.
        late: Sent later, within the period.
        missed: Sent after it, or without a fresh action.
        clamped: Changed by a limit.
        inferences: Chunks predicted.
        verified: Of them, predicted again by the full model.
        unverified: Of them, to be predicted again, for which there was no time.
        stopped: Why the robot was stopped; empty: the time was over.
        jitter_ms: Delay of sending behind the schedule, of each cycle.
        inference_ms: Of each chunk.
        age_ms: Age of the reading behind each sent action.
        robot: What the robot reports.
    """

    cycles: int = 0
    on_time: int = 0
    late: int = 0
    missed: int = 0
    clamped: int = 0
    inferences: int = 0
    verified: int = 0
    unverified: int = 0
    stopped: str = ""
    jitter_ms: list[float] = field(default_factory=list)
    inference_ms: list[float] = field(default_factory=list)
    age_ms: list[float] = field(default_factory=list)
    robot: Mapping[str, Any] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Counts, percentiles and the histogram of jitter."""
        counts = {
            name: getattr(self, name)
            for name in ("cycles", "on_time", "late", "missed", "clamped", "inferences", "verified", "unverified")
        }
        parts = {name: _percentiles(getattr(self, name)) for name in ("jitter_ms", "inference_ms", "age_ms")}
        edges = [0.0, *HISTOGRAM_MS, np.inf]
        histogram = np.histogram(np.maximum(self.jitter_ms, 0), edges)[0].tolist() if self.jitter_ms else []
        return {**counts, "stopped": self.stopped, "robot": dict(self.robot), **parts, "jitter_histogram": histogram}


@dataclass(frozen=True)
class _Seen:
    """When a camera's image was first the present one, and the normalised state then."""

    image: ImageArray
    state: FloatArray
    since: float


@dataclass(frozen=True)
class _Predicted:
    """A chunk and its reading."""

    number: int
    chunk: ActionChunk
    taken_at: float
    seconds: float


class ControlLoop:
    """Runs a policy on a robot.

    Args:
        policy: A bundle, or any policy.
        robot: Not connected yet.
        rate_hz: Cycles a second.
        limits: Checked last.
        config: Of deadlines and watchdogs.
        instruction: Replaces the robot's own; None: the reading's.
        log: New folder for the log; None: none.
        robot_name: For the log.

    Raises:
        ConfigError: Policy, robot, rate and limits do not fit each other.
    """

    def __init__(
        self,
        policy: Policy,
        robot: Robot,
        rate_hz: float,
        limits: Limits,
        config: LoopConfig | None = None,
        *,
        instruction: str | None = None,
        log: Path | None = None,
        robot_name: str = "",
    ) -> None:
        if not 0 < rate_hz < np.inf:
            raise ConfigError(f"rate_hz: {rate_hz} must be above zero and finite.")
        self._config = config or LoopConfig()
        if self._config.max_age_s < 1 / rate_hz:
            raise ConfigError(f"max_age_s: {self._config.max_age_s} is shorter than a period, {1 / rate_hz:g} s.")
        policy.spec.check_world(robot.world)
        self._guard = Guard(limits, robot.world, rate_hz)
        self._limits = limits
        self._policy, self._robot = policy, robot
        self._period = 1 / rate_hz
        self._instruction = instruction
        self._log_folder, self._robot_name = log, robot_name
        self._is_over = False
        self._stop_reason = ""
        self._fault: DyslError | None = None
        self._predicted: _Predicted | None = None
        self._history: deque[tuple[float, FloatArray]] = deque(maxlen=HISTORY)
        self._last: FloatArray | None = None
        self._sends_plan = False
        self._start: float | None = None
        self._images: dict[str, _Seen] = {}
        self.account = Account()

    def stop(self, reason: str) -> None:
        """Ask the loop to end, from any thread or signal handler: takes no lock."""
        self._stop_reason = self._stop_reason or reason
        self._is_over = True

    def run(self, seconds: float) -> Account:
        """Connect, warm up, control for so long, stop.

        Args:
            seconds: Of control.

        Returns:
            The account; `stopped` says why it ended early.

        Raises:
            ConfigError: The first reading does not fit the policy.
            RobotFault: The robot could not be connected, or never answered.
            SafetyStop: Something was wrong while it moved; it was stopped, and the log is whole.
        """
        log: _Log | None = None
        eyes = threading.Thread(target=self._look, name="inference", daemon=True)
        try:
            with handled_signals(self.stop):
                try:
                    if not 0 < seconds < np.inf:
                        raise ConfigError(f"seconds: {seconds} must be above zero and finite.")
                    log = _Log(self._log_folder) if self._log_folder else None
                    self._robot.connect(1 / self._period)
                    self._warm_up()
                    eyes.start()
                    self._await_first_chunk()
                    self._cycle(math.ceil(seconds / self._period), log)
                finally:
                    self._is_over = True
                    self._robot.stop()
                    self.account.robot = self._robot.report()
            if self._fault is not None:
                raise self._fault
            self.account.stopped = self._stop_reason
        except BaseException as error:
            self.account.stopped = f"{type(error).__name__}: {error}"
            raise
        finally:
            if eyes.is_alive():
                eyes.join(timeout=JOIN_S)
            if log is not None:
                log.close({**self.account.summary(), **self._described()})
        return self.account

    def _described(self) -> dict[str, Any]:
        """What a log must know to be read and played back."""
        world = self._robot.world
        return {
            "rate_hz": 1 / self._period,
            "robot_name": self._robot_name,
            "action_names": world.action_names,
            "state_names": world.state_names,
            "cameras": self._policy.spec.cameras,
            "config": asdict(self._config),
            "limits": asdict(self._limits),
            "policy": self._policy.fingerprint,
            **provenance.record(),
        }

    def _warm_up(self) -> None:
        """The first inferences are slow, and their readings show whether robot and policy fit."""
        reading = self._robot.observe(-math.inf)
        for _ in range(self._config.warm_up):
            self._policy.infer([self._seen(reading)], [self._policy.reset()])

    def _look(self) -> None:
        """The inference thread."""
        period, spec = self._period, self._policy.spec
        after = -math.inf
        try:
            state = self._policy.reset()
            while not self._is_over:
                reading = self._robot.observe(after)
                observation = self._seen(reading)
                self._guard.observe(observation[STATE_KEY], reading.taken_at)
                self._watch(reading)
                executed = [action for sent_at, action in list(self._history) if sent_at < reading.taken_at]
                state.executed.clear()
                state.executed.extend(executed)
                state.needed_at = self._needed_at()
                started = clock()
                [chunk] = self._policy.infer([observation], [state])
                ready_at = clock()
                if not np.isfinite(chunk.actions).all():
                    raise SafetyStop(
                        f"action: the policy answered a value that is not finite: {chunk.actions.tolist()}."
                    )
                self._record(chunk, ready_at - started)
                number = self._predicted.number + 1 if self._predicted else 0
                self._predicted = _Predicted(number, chunk, reading.taken_at, ready_at - started)
                after = reading.taken_at + (spec.execute_steps - 0.5) * period
        except Exception as error:  # whatever it is, the robot must stop, and the loop's thread says why
            if not self._is_over:  # else the robot was stopped under our eyes
                unknown = RobotFault(f"inference: {type(error).__name__}: {error}")
                self._fault = error if isinstance(error, DyslError) else unknown
                self.stop(str(self._fault))

    def _needed_at(self) -> float | None:
        """When the coming chunk is: at the first cycle for which the one before has no fresh action."""
        before, start = self._predicted, self._start
        if before is None or start is None:
            return None
        stale_at = before.taken_at + (self._policy.spec.execute_steps + 1) * self._period
        return start + math.ceil((stale_at - start) / self._period) * self._period

    def _seen(self, reading: Reading) -> Observation:
        observation = reading.observation
        if self._instruction is not None:
            observation = {**observation, TASK_KEY: self._instruction}
        self._policy.spec.check_observation(observation)
        if not observation[TASK_KEY].strip():
            raise ConfigError("instruction: this robot does not say what to do; give an --instruction.")
        return observation

    def _watch(self, reading: Reading) -> None:
        """A camera that shows the same, while the robot has moved, is broken."""
        state = self._policy.spec.state_normalisation.apply(reading.observation[STATE_KEY])
        for camera in self._policy.spec.cameras:
            image = reading.observation[IMAGE_PREFIX + camera]
            seen = self._images.get(camera)
            if seen is None or not np.array_equal(seen.image, image):
                self._images[camera] = _Seen(image, state, reading.taken_at)
                continue
            seconds = reading.taken_at - seen.since
            if seconds >= self._config.frozen_s and np.abs(state - seen.state).max() > MOVED:
                raise SafetyStop(
                    f"{camera}: the camera has shown the very same image for {seconds:.1f} s, and the robot has moved "
                    "meanwhile; see to the camera."
                )

    def _record(self, chunk: ActionChunk, seconds: float) -> None:
        account = self.account
        account.inferences += 1
        account.inference_ms.append(1e3 * seconds)
        if chunk.skips is not None:
            account.verified += chunk.skips.is_verified
            account.unverified += chunk.skips.is_verification_late

    def _await_first_chunk(self) -> None:
        limit = clock() + FIRST_CHUNK_S
        while self._predicted is None and not self._is_over:
            time.sleep(0.001)
            if clock() > limit:
                raise RobotFault(f"inference: no action within {FIRST_CHUNK_S:g} s of enabling.")

    def _cycle(self, cycles: int, log: _Log | None) -> None:
        """The loop's own thread."""
        account, period = self.account, self._period
        self._last = self._robot.hold(None)  # so that the first command does not jump, either
        if self._last is not None and (self._last != self._robot.world.clip(self._last)).any():
            raise SafetyStop(f"robot: stands at {self._last.tolist()}, outside of what it accepts; move it by hand.")
        start = self._start = clock() + period
        plan: _Plan | None = None
        misses = 0
        for cycle in range(cycles):
            due = start + cycle * period
            while (left := due - clock()) > 0 and not self._is_over:
                time.sleep(min(left, NAP_S))
            if self._is_over:
                return
            now = clock()
            line: dict[str, Any] = {"cycle": cycle, "due_s": round(due - start, 6)}
            predicted = self._predicted
            assert predicted is not None
            if plan is None or plan.number != predicted.number:
                plan = self._joined(predicted, plan, now)
                line["inference"] = _told(predicted)
            is_passed = now - due >= period  # the machine had no time for us: this cycle's time is over
            is_fresh = not is_passed and self._send(plan, now, line)
            jitter = clock() - due
            status = "missed" if not is_fresh else "late" if jitter > LATE * period else "on_time"
            account.cycles += 1
            account.jitter_ms.append(1e3 * jitter)
            setattr(account, status, getattr(account, status) + 1)
            if log is not None:
                log.write({**line, "status": status, "jitter_ms": round(1e3 * jitter, 3), "state": self._guard.state})
            misses = 0 if is_fresh else misses + 1
            if misses and (self._config.on_miss == "stop" or misses >= self._config.stop_after):
                raise SafetyStop(f"deadline: {misses} cycles in a row were missed, {_why(is_passed, now, plan)}.")

    def _joined(self, predicted: _Predicted, before: _Plan | None, now: float) -> _Plan:
        """A new chunk takes over in equal parts from what would have been sent, so that no action jumps."""
        plan = _Plan(predicted.number, predicted.chunk.actions, predicted.taken_at)
        if before is None or self._last is None:
            return plan
        rest = before.actions[before.index(now, self._period) :]
        fresh = math.floor((before.taken_at + self._config.max_age_s - now) / self._period) + 1  # not too old by then
        rest = rest[: max(0, fresh)] if self._sends_plan else rest[:0]
        return plan.joined(plan.index(now, self._period), rest, self._last, self._config.blend)

    def _send(self, plan: _Plan, now: float, line: dict[str, Any]) -> bool:
        """Send what is for now, or what was declared for want of it; was it fresh?"""
        index, age = plan.index(now, self._period), now - plan.taken_at
        is_usable = index < len(plan.actions) and age <= self._config.max_age_s
        is_fresh = is_usable and index <= self._policy.spec.execute_steps
        action: FloatArray | None
        if is_fresh or (is_usable and self._config.on_miss == "continue"):
            action = plan.actions[index]
            self._sends_plan = True
            self.account.age_ms.append(1e3 * age)
            line |= {"sent": "action", "chunk": plan.number, "index": index, "age_ms": round(1e3 * age, 3)}
        else:
            action = self._robot.hold(self._last)
            self._sends_plan = False
            line["sent"] = "hold"
        if action is not None:
            action, breaches = self._guard.check(np.asarray(action, np.float32), self._last, now)
            self._robot.act(action)
            self._history.append((clock(), action))
            self._last = action
            self.account.clamped += bool(breaches)
            line |= {"action": action.tolist(), "breaches": breaches}
        return is_fresh


@dataclass(frozen=True)
class _Plan:
    """What is being executed: a chunk, joined to the one before."""

    number: int
    actions: FloatArray
    taken_at: float

    def index(self, now: float, period: float) -> int:
        """Of the action that is for now."""
        return max(0, math.floor((now - self.taken_at) / period))

    def joined(self, index: int, rest: FloatArray, last: FloatArray, blend: int) -> _Plan:
        """This plan, taking over in equal parts over so many cycles.

        Args:
            index: Of the action that is for now.
            rest: What the plan before has for now and then, (actions, action).
            last: What was sent last, to go on from where `rest` ends.
            blend: Cycles.
        """
        steps = min(blend, len(self.actions) - index)
        if steps < 1:
            return self
        old = np.concatenate([rest[:steps], np.repeat(last[None], max(0, steps - len(rest)), axis=0)])
        share = (np.arange(1, steps + 1, dtype=np.float32) / (blend + 1))[:, None]
        actions = self.actions.copy()
        actions[index : index + steps] = share * actions[index : index + steps] + (1 - share) * old
        return replace(self, actions=actions)


class _Log:
    """Lines to a file, written by a thread of its own: a disk may be slow."""

    def __init__(self, folder: Path) -> None:
        if not is_unused(folder):
            raise ConfigError(f"log: {folder} is not empty; give a new folder.")
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._lines: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._work, name="log", daemon=True)
        self._thread.start()

    def write(self, line: dict[str, Any]) -> None:
        if self._error is None:
            self._lines.put(line)

    def close(self, account: Mapping[str, Any]) -> None:
        """Wait for the last line; a log that could not be written is told, not raised: there may be a worse error."""
        self._lines.put(None)
        self._thread.join()
        try:
            write_json(self._folder / ACCOUNT, json.loads(json.dumps(account, default=str)))
        except OSError as error:
            self._error = self._error or error
        if self._error is not None:
            print(f"log: {self._folder} is not whole ({self._error}).", file=sys.stderr)

    def _work(self) -> None:
        try:
            with (self._folder / LOG).open("w", encoding="utf-8") as file:
                while (line := self._lines.get()) is not None:
                    file.write(json.dumps(line, default=_plain) + "\n")
                    file.flush()
        except OSError as error:
            self._error = error


@contextmanager
def handled_signals(stop: Callable[[str], None]) -> Iterator[None]:
    """SIGINT and SIGTERM call `stop` with their name; a second one interrupts. In Python's main thread alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seen: list[int] = []

    def handle(number: int, _: object) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)
        stop(signal.Signals(number).name)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _plain(value: Any) -> Any:
    return value.tolist()


def _told(predicted: _Predicted) -> dict[str, Any]:
    """What the log says of a chunk."""
    skips = predicted.chunk.skips
    told: dict[str, Any] = {"chunk": predicted.number, "inference_ms": round(1e3 * predicted.seconds, 3)}
    if skips is not None:
        told |= {
            "layers": skips.layers,
            "continuity": skips.continuity,
            "verified": skips.is_verified,
            "no_time_to_verify": skips.is_verification_late,
        }
    return told


def _why(is_passed: bool, now: float, plan: _Plan) -> str:
    if is_passed:
        return "the last one because this process was not run in time"
    return f"the latest prediction is of a reading that is {now - plan.taken_at:.2f} s old"


def _percentiles(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    p50, p95, p99 = np.percentile(values, (50, 95, 99))
    return {"p50": round(p50, 3), "p95": round(p95, 3), "p99": round(p99, 3), "max": round(max(values), 3)}


@dataclass(frozen=True)
class ControlConfig:
    """Run a policy on a robot, at a fixed rate, within limits, with an account of every cycle."""

    robot: str
    """KIND:NAME: "mujoco:metaworld-drawer-open" (simulated, in real time), "lerobot:FILE.json", or a plugin's."""
    bundle: Path | None = None
    """Folder of `dysl export`."""
    policy: str | None = None
    """Instead of a bundle: a shipped name, a checkpoint's folder or a hub id, run by PyTorch."""
    rate: float | None = None
    """Actions a second; None: those of the world that the policy was trained in. Simulated time runs as they come."""
    seconds: float = 60.0
    """How long."""
    instruction: str | None = None
    """What to do; None: what the robot's readings say."""
    skip: float | None = None
    """How much to skip, from 0, the full model, to 1; None: the stored operating point."""
    log: Path | None = None
    """New folder for the log, a line a cycle, and the account."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    limits: Limits = field(default_factory=Limits)


def control(config: ControlConfig) -> Account:
    """Load, connect, run.

    Raises:
        DyslError: See `ControlLoop`.
    """
    if config.log is not None and not is_unused(config.log):
        raise ConfigError(f"log: {config.log} is not empty; give a new folder.")
    policy = open_policy(config.bundle, config.policy, config.skip)
    robot = make_robot(config.robot, policy.spec.cameras)
    try:
        rate = policy.spec.rate_hz if config.rate is None else config.rate
        loop = ControlLoop(
            policy,
            robot,
            rate,
            config.limits,
            config.loop,
            instruction=config.instruction,
            log=config.log,
            robot_name=config.robot,
        )
    except BaseException:
        robot.stop()
        raise
    try:
        return loop.run(config.seconds)
    except DyslError:
        if loop.account.cycles:
            print(render_account(replace(loop.account, stopped="")))  # why, follows
        raise


def render_account(account: Account) -> str:
    """For people."""
    told = account.summary()
    lines = [
        f"{told['cycles']} cycles: {told['on_time']} on time, {told['late']} late, {told['missed']} missed; "
        f"{told['clamped']} clamped by a limit.",
        f"{told['inferences']} inferences; surprising actions predicted again: {told['verified']}; left as they were, "
        f"for lack of time: {told['unverified']}.",
        "",
        "| ms | p50 | p95 | p99 | max |",
        "|---|---:|---:|---:|---:|",
    ]
    names = {"jitter_ms": "sent after its time", "inference_ms": "inference", "age_ms": "age of the reading"}
    for key, name in names.items():
        values = told[key]
        if values:
            numbers = " | ".join(f"{values[part]:.2f}" for part in ("p50", "p95", "p99", "max"))
            lines.append(f"| {name} | {numbers} |")
    edges = [*(f"< {edge:g} ms" for edge in HISTOGRAM_MS), f">= {HISTOGRAM_MS[-1]:g} ms"]
    most = max(told["jitter_histogram"], default=0)
    lines.append("")
    for edge, count in zip(edges, told["jitter_histogram"], strict=False):
        if count:
            lines.append(f"{edge:>10}  {count:6d}  {'#' * math.ceil(40 * count / most)}")
    if account.robot:
        lines += [
            "",
            "On the robot's side: " + ", ".join(f"{value} {name}" for name, value in account.robot.items()) + ".",
        ]
    if account.stopped:
        lines.append(f"Stopped early: {account.stopped}")
    return "\n".join(lines)
