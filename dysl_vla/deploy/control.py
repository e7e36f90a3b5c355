"""The control loop: actions go out at a fixed rate, whatever inference and cameras do. It knows no simulator, no torch.

It has three threads. The inference thread waits for an observation, predicts a chunk, and puts it down. The control
thread keeps an absolute schedule: each cycle it takes, from the latest chunk, the action that was predicted for this
very time (the i-th of a chunk is for i periods after its observation), blends it with what was sent before, checks it
against the limits, and sends it. The caller's thread watches both, and stops the robot whatever hangs. An action of an
observation that is too old is never sent; `LoopConfig.on_miss` declares what happens instead.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dysl_vla import provenance
from dysl_vla.deploy.approach import Approach
from dysl_vla.deploy.camera_watch import CameraWatch
from dysl_vla.deploy.chunks import Continuation, Plan, Predicted
from dysl_vla.deploy.cycle_log import CycleLog
from dysl_vla.deploy.limits import ActionLimiter, Limits
from dysl_vla.deploy.loop_stats import LoopStats
from dysl_vla.deploy.robot import Robot, TimedObservation
from dysl_vla.deploy.stopping import ANSWER_S, CONNECT_S, WatchedRobot, handled_signals, start_thread
from dysl_vla.errors import ConfigError, DyslError, RobotFault, SafetyStop
from dysl_vla.policies.base import Policy
from dysl_vla.types import STATE_KEY, TASK_KEY, ActionChunk, FloatArray, Observation

clock = time.perf_counter
HISTORY = 64
FIRST_CHUNK_S = 10.0
OBSERVATIONS = 3
"""Observations whose ages are measured before anything moves."""
LATE = 0.1
"""A cycle that sends this share of a period after its time is late; a whole period after it, it is missed."""
SLOWEST_DECAY = 0.95
"""Factor by which the duration of the slowest inference is forgotten with each inference."""


@dataclass(frozen=True)
class LoopConfig:
    """How a control loop behaves."""

    on_miss: Literal["hold", "continue", "stop"] = "continue"
    """What happens when no fresh chunk is there: the robot holds still, goes on with the last chunk as long as that is
    not too old, or is stopped."""
    stop_after: int = 20
    """Missed cycles in a row after which the robot is stopped; with `--on-miss stop` the first one stops it."""
    max_age_s: float = 0.4
    """Age of an observation, that of its oldest part, beyond which no action that was predicted from it is sent."""
    blend_steps: int = 2
    """Cycles in which a new chunk takes over from the one before; with 0 it takes over at once."""
    real_time_chunking: bool = True
    """Let a policy that denoises actions go on from those of the running chunk that will have been sent by the time the
    coming one is there; others' chunks are blended alone."""
    frozen_s: float = 1.0
    """A camera that shows the very same image for so long, although the robot has moved, stops the robot."""
    warm_up: int = 10
    """Inferences before anything moves: the first are slow, and a policy that is too slow for the rate is refused."""
    far_start: Literal["approach", "refuse"] = "approach"
    """What happens when the robot stands farther from the first action than `--max-change` allows in one step: it goes
    there at that speed, or does not move at all."""
    connect_s: float = CONNECT_S
    """Longest time that connecting may take."""
    answer_s: float = ANSWER_S
    """Longest time that any other call of the robot may take, beyond the next frame's time, before it is stopped."""

    def __post_init__(self) -> None:
        if self.on_miss not in ("hold", "continue", "stop"):
            raise ConfigError(f"on_miss must be hold, continue or stop, got {self.on_miss!r}.")
        if self.far_start not in ("approach", "refuse"):
            raise ConfigError(f"far_start must be approach or refuse, got {self.far_start!r}.")
        for name, least in (("stop_after", 1), ("warm_up", 1), ("blend_steps", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        for name in ("max_age_s", "frozen_s", "connect_s", "answer_s"):
            if not 0 < getattr(self, name) < np.inf:
                raise ConfigError(f"{name} must be above zero and finite, got {getattr(self, name)}.")


class ControlLoop:
    """Runs a policy on a robot.

    Args:
        policy: A bundle, or any other policy.
        robot: The robot, not connected yet.
        rate_hz: Cycles a second.
        limits: Limits that each action is checked against last.
        config: Deadlines and watchdogs.
        instruction: Replaces the robot's own instruction; None: the observation's is used.
        log: New folder for the log; None: nothing is logged.
        robot_name: The robot's name, KIND:NAME, for the log.
        notify: Called with lines that say what is going on.

    Attributes:
        stats: What became of the cycles so far.

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
        notify: Callable[[str], None] = lambda _: None,
    ) -> None:
        if not 0 < rate_hz < np.inf:
            raise ConfigError(f"rate_hz must be above zero and finite, got {rate_hz}.")
        self._config = config or LoopConfig()
        if self._config.max_age_s < 1 / rate_hz:
            raise ConfigError(f"max_age_s must be at least a period, {1 / rate_hz:g} s, got {self._config.max_age_s}.")
        policy.spec.check_embodiment(robot.embodiment)
        self._limiter = ActionLimiter(
            limits, robot.embodiment, rate_hz, provenance.demonstrated_change(policy.provenance)
        )
        self._policy = policy
        self._robot = WatchedRobot(robot, self._config.connect_s, self._config.answer_s)
        self._rate_hz, self._period = rate_hz, 1 / rate_hz
        self._instruction = instruction
        self._log_folder, self._robot_name, self._notify = log, robot_name, notify
        self._cameras = CameraWatch(policy.spec, self._config.frozen_s)
        self._approach = Approach(
            robot.embodiment, self._limiter, may_approach=self._config.far_start == "approach", notify=notify
        )
        self._predicted: Predicted | None = None
        self._continuation = Continuation(self._period)
        self._running_plan: Plan | None = None  # as it is sent; None while the robot approaches or holds
        self._slowest_s = 0.0  # the most that an observation's age and an inference took together, of late
        self._history: deque[tuple[float, FloatArray]] = deque(maxlen=HISTORY)
        self._last: FloatArray | None = None
        self._sends_plan = False
        self._start: float | None = None
        self._inference = threading.Thread(target=self._inference_loop, name="inference", daemon=True)
        self.stats = LoopStats()

    def stop(self, reason: str) -> None:
        """Ask the loop to end, from any thread or signal handler: takes no lock."""
        self._robot.stop(reason)

    def run(self, seconds: float) -> LoopStats:
        """Connect, warm up, control, stop. The robot is stopped and its motors are released in any case.

        Args:
            seconds: How long to control the robot.

        Returns:
            What became of the cycles; `stopped` says why the loop ended early.

        Raises:
            ConfigError: The first observation does not fit the policy, the policy is too slow, or the robot cannot be
                held. Nothing moved.
            RobotFault: The robot could not be connected, did not answer, or answered what cannot be; or it could not be
                stopped, and must be switched off.
            SafetyStop: Something was wrong while it moved; it was stopped, and the log is whole.
        """
        log: CycleLog | None = None
        robot = self._robot
        with handled_signals(self.stop):
            try:
                log = CycleLog(self._log_folder) if self._log_folder else None
            except DyslError as error:
                robot.fail(error)
            stopped = robot.run(lambda: self._control(seconds, log))
            self.stats.robot = stopped.report
            if self._inference.is_alive():
                robot.join(self._inference)
            fault = robot.fault
            if stopped.problem:  # above all, whatever else went wrong
                cause = f" It was to be stopped for {type(fault).__name__}: {fault}" if fault else ""
                fault = RobotFault(stopped.problem + cause)
            reasons = [f"{type(fault).__name__}: {fault}" if fault else robot.reason]
            reasons += [f"robot: {name} has still not returned." for name in robot.hanging]
            self.stats.stopped = " ".join(filter(None, reasons))
            if log is not None:
                log.close({**self.stats.summary(), **self._description()})
        if fault is not None:
            raise fault from (robot.fault if robot.fault is not fault else None)
        return self.stats

    def _control(self, seconds: float, log: CycleLog | None) -> None:
        """What the control thread does, from connecting to the last cycle."""
        if not 0 < seconds < np.inf:
            raise ConfigError(f"seconds must be above zero and finite, got {seconds}.")
        self._notify("Connecting to the robot.")
        self._robot.connect(self._rate_hz)
        self._warm_up()
        start_thread(self._inference)
        self._await_first_chunk()
        self._notify(f"Controlling for {seconds:g} s at {self._rate_hz:g} Hz; Ctrl-C stops the robot.")
        self._cycle(math.ceil(seconds / self._period), log)

    def _description(self) -> dict[str, Any]:
        """What a log must contain to be read and replayed."""
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
        """Measure the observations' age and the inferences, and refuse what cannot keep up. The first ones are slow."""
        ages, after = [], -math.inf
        for _ in range(1 + OBSERVATIONS):
            timed = self._robot.observe(after)
            ages.append(clock() - timed.timestamp)
            after = timed.timestamp
        age_s = float(np.median(ages[1:]))  # the first may be from before the cameras ran
        if age_s > self._config.max_age_s:
            raise RobotFault(
                f"robot: an observation is {age_s:.2f} s old when it arrives, more than --max-age-s "
                f"{self._config.max_age_s:g}; check its cameras, and that observations are stamped with "
                "time.perf_counter."
            )
        observation = self._checked(timed)
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

        A chunk is late by the age of its observation and one inference, and the next one is begun when it is there.

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
                f"an inference takes {inference_s:.3f} s here, of an observation that is {age_s:.3f} s old: actions "
                f"would come too late. Nothing was moved; {fix}."
            )
        self._slowest_s = age_s + inference_s

    @property
    def _lasts_s(self) -> float:
        """How long after its observation a chunk has fresh actions."""
        return min(self._fresh_periods * self._period, self._config.max_age_s)

    @property
    def _fresh_periods(self) -> int:
        """Cycles for which a chunk has fresh actions: the executed ones, and one more where it has more."""
        spec = self._policy.spec
        return min(spec.execute_steps + 1, spec.chunk_length)

    def _inference_loop(self) -> None:
        """What the inference thread does."""
        robot = self._robot
        after = -math.inf
        try:
            state = self._policy.reset()
            while not robot.is_over:
                # Observe, and check what is seen
                timed = robot.observe(after)
                observation = self._checked(timed)
                self._limiter.observe(observation[STATE_KEY], timed.timestamp)
                self._cameras.check(timed)
                # Infer from what was executed by then
                executed = [action for sent_at, action in list(self._history) if sent_at < timed.timestamp]
                state.executed.clear()
                state.executed.extend(executed)
                state.needed_at = self._needed_at()
                if self._config.real_time_chunking:
                    self._continuation.prepare(state, self._running_plan, timed.timestamp, self._start)
                started = clock()
                [chunk] = self._policy.infer([observation], [state])
                ready_at = clock()
                if not np.isfinite(chunk.actions).all():
                    raise SafetyStop(
                        f"action: the policy predicted a value that is not finite: {chunk.actions.tolist()}."
                    )
                # Put the chunk down, and wait until the next one is wanted
                self._continuation.took(ready_at - timed.timestamp)
                self._count_inference(chunk, ready_at - started)
                number = self._predicted.number + 1 if self._predicted else 0
                self._predicted = Predicted(number, chunk, timed.timestamp, ready_at - started)
                self._slowest_s = max(ready_at - timed.timestamp, SLOWEST_DECAY * self._slowest_s)
                after = timed.timestamp + self._pause_s()
        except DyslError as error:
            robot.fail(error)
        except Exception as error:  # whatever it is, the robot must stop, and `run` raises it
            robot.fail(RobotFault(f"inference: {type(error).__name__}: {error}"))

    def _pause_s(self) -> float:
        """From one observation to the next: while the executed actions last, less where inference takes longer."""
        latest = (self._policy.spec.execute_steps - 0.5) * self._period
        return max(0.0, min(latest, self._lasts_s - self._slowest_s - 0.5 * self._period))

    def _needed_at(self) -> float | None:
        """When the coming chunk is needed: at the first cycle for which the one before has no fresh action."""
        before, start = self._predicted, self._start
        if before is None or start is None:
            return None
        stale_at = before.timestamp + self._fresh_periods * self._period
        return start + math.ceil((stale_at - start) / self._period) * self._period

    def _checked(self, timed: TimedObservation) -> Observation:
        """The observation as the policy gets it."""
        observation = timed.observation
        if self._instruction is not None:
            observation = {**observation, TASK_KEY: self._instruction}
        self._policy.spec.check_observation(observation)
        if not observation[TASK_KEY].strip():
            raise ConfigError("instruction must say what to do, because this robot does not; give an --instruction.")
        return observation

    def _count_inference(self, chunk: ActionChunk, seconds: float) -> None:
        stats = self.stats
        stats.inferences += 1
        stats.inference_ms.append(1e3 * seconds)
        if chunk.skips is not None:
            stats.verified += chunk.skips.is_verified
            stats.unverified += chunk.skips.is_verification_late

    def _await_first_chunk(self) -> None:
        limit = clock() + FIRST_CHUNK_S
        while self._predicted is None and not self._robot.is_over:
            time.sleep(0.001)
            if clock() > limit:
                raise RobotFault(f"inference: there was no action within {FIRST_CHUNK_S:g} s; check the cameras.")

    def _cycle(self, cycles: int, log: CycleLog | None) -> None:
        """Keep the schedule: one cycle a period."""
        stats, period, robot = self.stats, self._period, self._robot
        # Begin only if the robot stands where it may go on from
        self._last = robot.hold(None)
        start = self._start = clock() + period
        first = self._predicted  # None where the robot is being stopped already
        self._approach.check(self._last, None if first is None else first.action_at(start, period))
        plan: Plan | None = None
        misses = 0
        for cycle in range(cycles):
            # Wait for this cycle's time
            due = start + cycle * period
            robot.wait_until(due)
            if robot.is_over:
                return
            now = clock()
            # Take over the latest chunk
            line: dict[str, Any] = {"cycle": cycle, "due_s": round(due - start, 6)}
            predicted = self._predicted
            assert predicted is not None
            if plan is None or plan.number != predicted.number:
                plan = self._blend_chunks(predicted, plan, now)
                line["inference"] = predicted.log_record()
            # Send what it has for now, unless the machine had no time for this process, and the cycle's time is over
            is_passed = now - due >= period
            is_fresh = not is_passed and self._send(plan, now, line)
            self._running_plan = plan if self._sends_plan and self._approach.has_arrived else None
            # Count and log the cycle
            jitter = clock() - due
            status = "missed" if not is_fresh else "late" if jitter > LATE * period else "on_time"
            stats.cycles += 1
            stats.jitter_ms.append(1e3 * jitter)
            setattr(stats, status, getattr(stats, status) + 1)
            if log is not None:
                log.write({**line, "status": status, "jitter_ms": round(1e3 * jitter, 3), "state": self._limiter.state})
            # Stop after too many misses
            misses = 0 if is_fresh else misses + 1
            if misses and (self._config.on_miss == "stop" or misses >= self._config.stop_after):
                raise SafetyStop(f"deadline: {misses} cycles in a row were missed, {self._why(is_passed, now, plan)}.")

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
        """Send the action that is for now, or what was declared for want of it; whether it was fresh."""
        # Choose
        index, age = plan.index(now, self._period), now - plan.timestamp
        is_usable = index < len(plan.actions) and age <= self._config.max_age_s
        is_fresh = is_usable and index <= self._policy.spec.execute_steps
        action: FloatArray | None
        if is_fresh or (is_usable and self._config.on_miss == "continue"):
            action = np.asarray(plan.actions[index], np.float32)
            if not self._approach.has_arrived and self._last is not None:
                action = self._approach.next_action(action, self._last)
                line["approaching"] = not self._approach.has_arrived
                self.stats.approaching += line["approaching"]
            self._sends_plan = True
            self.stats.age_ms.append(1e3 * age)
            line |= {"sent": "action", "chunk": plan.number, "index": index, "age_ms": round(1e3 * age, 3)}
        else:
            action = self._robot.hold(self._last)
            self._sends_plan = False
            line["sent"] = "hold"
        # Check, and send
        if action is not None:
            action, breaches = self._limiter.check(np.asarray(action, np.float32), self._last, now)
            self._robot.act(action)
            self._history.append((clock(), action))
            self._last = action
            self.stats.clamped += bool(breaches)
            line |= {"action": action.tolist(), "breaches": breaches}
        return is_fresh

    def _why(self, is_passed: bool, now: float, plan: Plan) -> str:
        """Why cycles were missed."""
        if is_passed:
            return "the last one because this process was not run in time"
        hanging = "".join(f"; the robot's {name} has not returned yet" for name in self._robot.hanging if name != "act")
        return f"the latest prediction is of an observation that is {now - plan.timestamp:.2f} s old{hanging}"
