"""The control loop: actions go out at a fixed rate, whatever inference and cameras do. Knows no simulator and no torch.

Three threads. One looks and infers: it waits for a reading, predicts a chunk, and puts it down. One keeps the schedule,
an absolute one: each cycle it takes, from the latest chunk, the action that was predicted for this very time (the i-th
of a chunk is for i periods after its reading), joins it to what it sent before, checks it against the limits, and sends
it. The third, the caller's, watches both, and stops the robot whatever hangs. An action of a reading that is too old is
never sent; what happens instead is declared.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dysl_vla import provenance
from dysl_vla.deploy.chunks import Plan, Predicted
from dysl_vla.deploy.cycle_log import NAP_S, CycleLog
from dysl_vla.deploy.limits import ActionLimiter, Limits
from dysl_vla.deploy.loop_stats import LoopStats, render_stats
from dysl_vla.deploy.robot import Robot, TimedObservation, make_robot, open_policy
from dysl_vla.deploy.stopping import ANSWER_S, CONNECT_S, WatchedRobot, handled_signals, say, stop_robot
from dysl_vla.errors import ConfigError, DyslError, RobotFault, SafetyStop
from dysl_vla.files import is_unused
from dysl_vla.policies.base import Policy
from dysl_vla.types import IMAGE_PREFIX, STATE_KEY, TASK_KEY, ActionChunk, FloatArray, ImageArray, Observation

clock = time.perf_counter
HISTORY = 64
FIRST_CHUNK_S = 10.0
READINGS = 3
"""Whose ages are measured before anything moves."""
MOVED = 0.1
"""Change of the state, in deviations of the demonstrated states, that a camera must show."""
LATE = 0.1
"""A cycle that sends this share of a period after its time is late; a whole period after it, missed."""
SLOWEST_DECAY = 0.95
"""How the slowest inference is forgotten, an inference."""


@dataclass(frozen=True)
class LoopConfig:
    """How a control loop behaves."""

    on_miss: Literal["hold", "continue", "stop"] = "continue"
    """When no fresh chunk is there: hold still, go on with the last chunk as long as it is not too old, or stop."""
    stop_after: int = 20
    """Missed cycles in a row after which the robot is stopped; with `--on-miss stop` the first one does."""
    max_age_s: float = 0.4
    """Age of a reading, of its oldest part, beyond which no action that was predicted from it is sent."""
    blend_steps: int = 2
    """Cycles in which a new chunk takes over from the one before; 0: at once."""
    frozen_s: float = 1.0
    """A camera that shows the very same image for so long, although the robot has moved, stops it."""
    warm_up: int = 10
    """Inferences before anything moves: the first are slow, and a policy that is too slow for the rate is refused."""
    far_start: Literal["approach", "refuse"] = "approach"
    """Where the robot stands farther from the first action than `--max-change` allows in one step: go there at that
    speed, or do not move at all."""
    connect_s: float = CONNECT_S
    """Longest that connecting may take."""
    answer_s: float = ANSWER_S
    """Longest that any other call of the robot may take, beyond the next frame's time, before it is stopped."""

    def __post_init__(self) -> None:
        if self.on_miss not in ("hold", "continue", "stop"):
            raise ConfigError(f"on_miss: {self.on_miss!r} is none of hold, continue, stop.")
        if self.far_start not in ("approach", "refuse"):
            raise ConfigError(f"far_start: {self.far_start!r} is none of approach, refuse.")
        if self.stop_after < 1 or self.warm_up < 1 or self.blend_steps < 0:
            raise ConfigError("stop_after and warm_up must be at least 1, blend_steps not negative.")
        for name in ("max_age_s", "frozen_s", "connect_s", "answer_s"):
            if not 0 < getattr(self, name) < np.inf:
                raise ConfigError(f"{name}: {getattr(self, name)} must be above zero and finite.")


@dataclass(frozen=True)
class LastFrame:
    """When a camera's image was first the present one, and the normalised state then."""

    image: ImageArray
    state: FloatArray
    since: float


class ControlLoop:
    """Runs a policy on a robot.

    Args:
        policy: A bundle, or any policy.
        robot: Not connected yet.
        rate_hz: Cycles a second.
        limits: Checked last.
        config: Deadlines and watchdogs.
        instruction: Replaces the robot's own; None: the reading's.
        log: New folder for the log; None: none.
        robot_name: For the log.
        tell: Called with what is going on, a line each.

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
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        if not 0 < rate_hz < np.inf:
            raise ConfigError(f"rate_hz: {rate_hz} must be above zero and finite.")
        self._config = config or LoopConfig()
        if self._config.max_age_s < 1 / rate_hz:
            raise ConfigError(f"max_age_s: {self._config.max_age_s} is shorter than a period, {1 / rate_hz:g} s.")
        policy.spec.check_embodiment(robot.embodiment)
        self._limiter = ActionLimiter(
            limits, robot.embodiment, rate_hz, provenance.demonstrated_change(policy.provenance)
        )
        self._policy = policy
        self._robot = WatchedRobot(robot, self._config.connect_s, self._config.answer_s)
        self._rate_hz, self._period = rate_hz, 1 / rate_hz
        self._instruction = instruction
        self._log_folder, self._robot_name, self._tell = log, robot_name, tell
        self._predicted: Predicted | None = None
        self._slowest_s = 0.0  # what a reading's age and an inference took together, at most lately
        self._history: deque[tuple[float, FloatArray]] = deque(maxlen=HISTORY)
        self._last: FloatArray | None = None
        self._sends_plan = False
        self._has_arrived = False
        self._start: float | None = None
        self._images: dict[str, LastFrame] = {}
        self._inference = threading.Thread(target=self._inference_loop, name="inference", daemon=True)
        self.account = LoopStats()

    def stop(self, reason: str) -> None:
        """Ask the loop to end, from any thread or signal handler: takes no lock."""
        self._robot.stop(reason)

    def run(self, seconds: float) -> LoopStats:
        """Connect, warm up, control for so long, stop. The robot is stopped and its motors are released in any case.

        Args:
            seconds: Of control.

        Returns:
            The account; `stopped` says why it ended early.

        Raises:
            ConfigError: The first reading does not fit the policy, or the policy is too slow. Nothing moved.
            RobotFault: The robot could not be connected, did not answer, or answered what cannot be; or it could not be
                stopped, and must be switched off.
            SafetyStop: Something was wrong while it moved; it was stopped, and the log is whole.
        """
        log: CycleLog | None = None
        robot = self._robot
        with handled_signals(self.stop):
            try:
                log = CycleLog(self._log_folder) if self._log_folder else None
            except (ConfigError, OSError) as error:
                robot.fail(error)
            stopped = robot.run(lambda: self._control(seconds, log))
            self.account.robot = stopped.report
            if self._inference.is_alive():
                robot.join(self._inference)
            fault = robot.fault or (RobotFault(stopped.problem) if stopped.problem else None)
            reasons = [f"{type(fault).__name__}: {fault}" if fault else robot.reason]
            reasons += [stopped.problem] if stopped.problem and robot.fault else []
            reasons += [f"robot: {name} has still not returned." for name in robot.hanging]
            self.account.stopped = " ".join(filter(None, reasons))
            if log is not None:
                log.close({**self.account.summary(), **self._described()})
        if fault is not None:
            raise fault
        return self.account

    def _control(self, seconds: float, log: CycleLog | None) -> None:
        """What the control thread does, from connecting to the last cycle."""
        if not 0 < seconds < np.inf:
            raise ConfigError(f"seconds: {seconds} must be above zero and finite.")
        self._tell("Connecting to the robot.")
        self._robot.connect(self._rate_hz)
        self._warm_up()
        self._inference.start()
        self._await_first_chunk()
        self._tell(f"Controlling for {seconds:g} s at {self._rate_hz:g} Hz; Ctrl-C stops the robot.")
        self._cycle(math.ceil(seconds / self._period), log)

    def _described(self) -> dict[str, Any]:
        """What a log must know to be read and played back."""
        embodiment = self._robot.embodiment
        return {
            "rate_hz": self._rate_hz,
            "robot_name": self._robot_name,
            "action_names": embodiment.action_names,
            "state_names": embodiment.state_names,
            "cameras": self._policy.spec.cameras,
            "config": asdict(self._config),
            "limits": asdict(self._limiter.limits),
            "policy": self._policy.fingerprint,
            **provenance.record(),
        }

    def _warm_up(self) -> None:
        """The first inferences are slow, and the first readings show whether robot, policy and rate fit each other."""
        ages, after = [], -math.inf
        for _ in range(1 + READINGS):
            reading = self._robot.observe(after)
            ages.append(clock() - reading.timestamp)
            after = reading.timestamp
        age_s = float(np.median(ages[1:]))  # the first may be from before the cameras ran
        if age_s > self._config.max_age_s:
            raise RobotFault(
                f"robot: a reading is {age_s:.2f} s old when it arrives, more than --max-age-s "
                f"{self._config.max_age_s:g}; see to its cameras, and that readings are stamped with time.perf_counter."
            )
        observation = self._seen(reading)
        times = []
        for _ in range(self._config.warm_up):
            if self._robot.is_over:
                return
            started = clock()
            self._policy.infer([observation], [self._policy.reset()])
            times.append(clock() - started)
        self._check_pace(float(np.median(times[len(times) // 2 :])), age_s)

    def _check_pace(self, inference_s: float, age_s: float) -> None:
        """Refuse a policy that cannot keep up: a chunk must come before the executed part of the last one ends.

        A chunk is late by the age of its reading and one inference, and the next one is begun when it is there.

        Raises:
            ConfigError: It takes too long; the message says which rates would work.
        """
        steps, max_age_s = self._policy.spec.execute_steps, self._config.max_age_s
        periods = self._fresh_periods
        needed_s = age_s + 2 * inference_s
        if needed_s > self._lasts_s:
            fix = "export it (dysl export), let it skip more (--skip 1), or use a faster machine"
            rate = periods / needed_s
            if needed_s <= max_age_s and rate >= 0.1:
                fix = f"at most --rate {math.floor(10 * rate) / 10:g} would work, if the robot takes it; or " + fix
            elif needed_s <= periods * self._period:
                fix = f"with --max-age-s {math.ceil(100 * needed_s) / 100:g} it would work; or " + fix
            raise ConfigError(
                f"rate: at {self._rate_hz:g} Hz a chunk's {steps} executed actions last {self._lasts_s:.3f} s, but "
                f"an inference takes {inference_s:.3f} s here, of a reading that is {age_s:.3f} s old: actions would "
                f"come too late. Nothing was moved; {fix}."
            )
        self._slowest_s = age_s + inference_s

    @property
    def _lasts_s(self) -> float:
        """How long after its reading a chunk has fresh actions."""
        return min(self._fresh_periods * self._period, self._config.max_age_s)

    @property
    def _fresh_periods(self) -> int:
        """Cycles for which a chunk has fresh actions: the executed ones, and one more where it has more."""
        spec = self._policy.spec
        return min(spec.execute_steps + 1, spec.chunk_length)

    def _inference_loop(self) -> None:
        """The inference thread."""
        robot = self._robot
        after = -math.inf
        try:
            state = self._policy.reset()
            while not robot.is_over:
                # Look
                reading = robot.observe(after)
                observation = self._seen(reading)
                self._limiter.observe(observation[STATE_KEY], reading.timestamp)
                self._watch(reading)
                # Infer
                executed = [action for sent_at, action in list(self._history) if sent_at < reading.timestamp]
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
                # Put it down, and wait until the next one is wanted
                self._record(chunk, ready_at - started)
                number = self._predicted.number + 1 if self._predicted else 0
                self._predicted = Predicted(number, chunk, reading.timestamp, ready_at - started)
                self._slowest_s = max(ready_at - reading.timestamp, SLOWEST_DECAY * self._slowest_s)
                after = reading.timestamp + self._pause_s()
        except DyslError as error:
            robot.fail(error)
        except Exception as error:  # whatever it is, the robot must stop, and the caller of `run` is told
            robot.fail(RobotFault(f"inference: {type(error).__name__}: {error}"))

    def _pause_s(self) -> float:
        """From a reading to the next: as long as the executed actions last, and less where inference takes longer."""
        latest = (self._policy.spec.execute_steps - 0.5) * self._period
        return max(0.0, min(latest, self._lasts_s - self._slowest_s - 0.5 * self._period))

    def _needed_at(self) -> float | None:
        """When the coming chunk is: at the first cycle for which the one before has no fresh action."""
        before, start = self._predicted, self._start
        if before is None or start is None:
            return None
        stale_at = before.timestamp + self._fresh_periods * self._period
        return start + math.ceil((stale_at - start) / self._period) * self._period

    def _seen(self, reading: TimedObservation) -> Observation:
        observation = reading.observation
        if self._instruction is not None:
            observation = {**observation, TASK_KEY: self._instruction}
        self._policy.spec.check_observation(observation)
        if not observation[TASK_KEY].strip():
            raise ConfigError("instruction: this robot does not say what to do; give an --instruction.")
        return observation

    def _watch(self, reading: TimedObservation) -> None:
        """A camera that shows the same, while the robot has moved, is broken."""
        state = self._policy.spec.state_normalisation.apply(reading.observation[STATE_KEY])
        for camera in self._policy.spec.cameras:
            image = reading.observation[IMAGE_PREFIX + camera]
            seen = self._images.get(camera)
            if seen is None or not np.array_equal(seen.image, image):
                self._images[camera] = LastFrame(image, state, reading.timestamp)
                continue
            seconds = reading.timestamp - seen.since
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
        while self._predicted is None and not self._robot.is_over:
            time.sleep(0.001)
            if clock() > limit:
                raise RobotFault(f"inference: there was no action within {FIRST_CHUNK_S:g} s; see to the cameras.")

    def _cycle(self, cycles: int, log: CycleLog | None) -> None:
        """Keep the schedule: a cycle a period."""
        account, period, robot = self.account, self._period, self._robot
        self._last = robot.hold(None)
        start = self._start = clock() + period
        self._check_start(start)
        plan: Plan | None = None
        misses = 0
        for cycle in range(cycles):
            # Wait for this cycle's time
            due = start + cycle * period
            while (left := due - clock()) > 0 and not robot.is_over:
                time.sleep(min(left, NAP_S))
            if robot.is_over:
                return
            # Take over the latest chunk, and send what it has for now
            now = clock()
            line: dict[str, Any] = {"cycle": cycle, "due_s": round(due - start, 6)}
            predicted = self._predicted
            assert predicted is not None
            if plan is None or plan.number != predicted.number:
                plan = self._blend_chunks(predicted, plan, now)
                line["inference"] = predicted.told()
            is_passed = now - due >= period  # the machine had no time for us: this cycle's time is over
            is_fresh = not is_passed and self._send(plan, now, line)
            # LoopStats for it
            jitter = clock() - due
            status = "missed" if not is_fresh else "late" if jitter > LATE * period else "on_time"
            account.cycles += 1
            account.jitter_ms.append(1e3 * jitter)
            setattr(account, status, getattr(account, status) + 1)
            if log is not None:
                log.write({**line, "status": status, "jitter_ms": round(1e3 * jitter, 3), "state": self._limiter.state})
            misses = 0 if is_fresh else misses + 1
            if misses and (self._config.on_miss == "stop" or misses >= self._config.stop_after):
                raise SafetyStop(f"deadline: {misses} cycles in a row were missed, {self._why(is_passed, now, plan)}.")

    def _check_start(self, start: float) -> None:
        """Before the first command: may the robot go from where it stands to what the policy wants?

        Raises:
            SafetyStop: It does not say where it stands, it stands outside of what it accepts, or too far away.
        """
        embodiment, held, predicted = self._robot.embodiment, self._last, self._predicted
        if held is None:
            if self._limiter.positions:
                raise SafetyStop(
                    "robot: does not say where it holds, so that its first command could be a jump; its hold(None) "
                    "must answer the present position."
                )
            self._has_arrived = True
            return
        if (held != embodiment.clip(held)).any():
            raise SafetyStop(f"robot: stands at {held.tolist()}, outside of what it accepts; move it by hand.")
        if predicted is None:  # the robot is being stopped
            return
        actions = embodiment.clip(predicted.chunk.actions)
        index = min(len(actions) - 1, max(0, math.floor((start - predicted.timestamp) / self._period)))
        far = np.abs(actions[index] - held) * (self._limiter.towards(actions[index], held) != actions[index])
        self._has_arrived = not far.any()
        if self._has_arrived:
            return
        worst = int(far.argmax())
        where = (
            f"{embodiment.action_names[worst]} stands at {held[worst]:.4g}, the policy's first action is "
            f"{actions[index][worst]:.4g}, and {self._limiter.limits.max_change[worst]:.4g} a step are allowed"
        )
        if self._config.far_start == "refuse":
            raise SafetyStop(f"far_start: {where}; move the robot nearer, or let it --far-start approach.")
        self._tell(f"The robot goes to where the policy begins first: {where}.")

    def _blend_chunks(self, predicted: Predicted, before: Plan | None, now: float) -> Plan:
        """A new chunk takes over in equal parts from what would have been sent, so that no action jumps.

        The first one takes over from the position that the robot holds.
        """
        plan = Plan(predicted.number, predicted.chunk.actions, predicted.timestamp)
        if self._last is None:
            return plan
        rest = plan.actions[:0]
        if before is not None and self._sends_plan:
            rest = before.actions[before.index(now, self._period) :]
            expires_at = before.timestamp + self._config.max_age_s
            rest = rest[: max(0, math.floor((expires_at - now) / self._period) + 1)]
        return plan.blended(plan.index(now, self._period), rest, self._last, self._config.blend_steps)

    def _send(self, plan: Plan, now: float, line: dict[str, Any]) -> bool:
        """Send what is for now, or what was declared for want of it; was it fresh?"""
        index, age = plan.index(now, self._period), now - plan.timestamp
        is_usable = index < len(plan.actions) and age <= self._config.max_age_s
        is_fresh = is_usable and index <= self._policy.spec.execute_steps
        action: FloatArray | None
        if is_fresh or (is_usable and self._config.on_miss == "continue"):
            action = self._approached(np.asarray(plan.actions[index], np.float32), line)
            self._sends_plan = True
            self.account.age_ms.append(1e3 * age)
            line |= {"sent": "action", "chunk": plan.number, "index": index, "age_ms": round(1e3 * age, 3)}
        else:
            action = self._robot.hold(self._last)
            self._sends_plan = False
            line["sent"] = "hold"
        if action is not None:
            action, breaches = self._limiter.check(np.asarray(action, np.float32), self._last, now)
            self._robot.act(action)
            self._history.append((clock(), action))
            self._last = action
            self.account.clamped += bool(breaches)
            line |= {"action": action.tolist(), "breaches": breaches}
        return is_fresh

    def _approached(self, action: FloatArray, line: dict[str, Any]) -> FloatArray:
        """What is sent on the way to an action, until the robot has come to where the policy wants it once."""
        if self._has_arrived or self._last is None:
            return action
        action = self._robot.embodiment.clip(action)
        near = self._limiter.towards(action, self._last)
        self._has_arrived = bool((near == action).all())
        self.account.approaching += not self._has_arrived
        line["approaching"] = not self._has_arrived
        return near

    def _why(self, is_passed: bool, now: float, plan: Plan) -> str:
        """Why cycles were missed."""
        if is_passed:
            return "the last one because this process was not run in time"
        hanging = "".join(f"; the robot's {name} has not returned yet" for name in self._robot.hanging if name != "act")
        return f"the latest prediction is of a reading that is {now - plan.timestamp:.2f} s old{hanging}"


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


def control(config: ControlConfig) -> LoopStats:
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
            tell=say,
        )
    except BaseException:
        stop_robot(robot)
        raise
    try:
        return loop.run(config.seconds)
    except DyslError:
        if loop.account.cycles:
            print(render_stats(replace(loop.account, stopped="")))  # why, follows
        raise
