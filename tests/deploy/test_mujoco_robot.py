"""Simulated robots: in real time, with faults, and by name."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import replace
from multiprocessing import Lock
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dysl_vla.deploy import simulator_process
from dysl_vla.deploy.control import ControlLoop, LoopConfig
from dysl_vla.deploy.limits import Limits
from dysl_vla.deploy.loop_stats import render_stats
from dysl_vla.deploy.mujoco_robot import MujocoRobot
from dysl_vla.deploy.run_control import ControlConfig, control
from dysl_vla.deploy.simulator_process import Cameras, Simulation, make_env
from dysl_vla.errors import ConfigError, DyslError, ObservationError, RobotFault, SafetyStop
from dysl_vla.types import ActionChunk
from tests.deploy.stand_ins import Counting


class Circling(Counting):
    """Never stands still, never reaches a wall."""

    def infer(self, observations: Any, states: Any) -> list[ActionChunk]:
        [chunk] = super().infer(observations, states)
        x, y = observations[0]["observation.state"]
        chunk.actions[:] = np.clip([-3 * y - x, 3 * x - y, 0], -0.5, 0.5)
        return [chunk]


def simulate(seconds: float, simulation: Simulation, **options: Any) -> tuple[Any, MujocoRobot, float]:
    """Control a simulated robot; the statistics or the error, the robot, and when after the start it ended."""
    robot = MujocoRobot(simulation)
    config = LoopConfig(warm_up=2, frozen_s=0.3, **{"stop_after": 6, **options})
    control_loop = ControlLoop(Circling(), robot, 20.0, Limits(), config)
    started = time.perf_counter()
    outcome: Any
    try:
        outcome = control_loop.run(seconds)
    except DyslError as error:
        outcome = error
    return outcome, robot, time.perf_counter() - started


def test_a_simulated_robot_runs_in_real_time_in_a_process_of_its_own() -> None:
    stats, robot, seconds = simulate(1.5, Simulation("mock-reach"), stop_after=1000)
    assert not isinstance(stats, Exception), stats
    assert 1.5 < seconds < 6
    assert stats.cycles == 30
    report = robot.report()
    assert report["unsafe commands refused"] == 0
    assert 20 <= report["commands executed"] <= 34
    assert stats.robot == report
    assert "30 cycles" in render_stats(stats)


@pytest.mark.parametrize(
    ("fault", "kind", "words", "within"),
    [
        ({"freeze_after": 0.5}, SafetyStop, "very same image", 1.5),
        ({"nan_after": 0.5}, ObservationError, "not finite", 1.2),
        ({"drop_after": 0.5}, (RobotFault, SafetyStop), "no observation|in a row", 1.7),
        ({"late_after": 0.5, "late_s": 0.45}, SafetyStop, "in a row", 1.7),
        ({"stall_after": 0.5}, (RobotFault, SafetyStop), "no observation|in a row|no command", 1.7),
    ],
)
def test_each_fault_ends_safely_in_its_time(fault: dict[str, float], kind: Any, words: str, within: float) -> None:
    outcome, robot, seconds = simulate(5, Simulation("mock-reach", **fault))
    assert isinstance(outcome, kind), outcome
    assert any(word in str(outcome) for word in words.split("|"))
    assert seconds < within + 2.5  # the last 2: a stalled process is waited for, then killed
    assert robot.report()["unsafe commands refused"] == 0
    assert robot._process is not None
    assert not robot._process.is_alive()
    assert robot._memory is None  # its memory was freed


@pytest.mark.parametrize("freeze_after", [0.0, 1e9])
def test_only_a_frozen_camera_shows_the_very_same_image_all_the_time(freeze_after: float) -> None:
    """This holds even if nothing moves in its view, which an arm may have left."""
    cameras = Cameras(Simulation("mock-reach", freeze_after=freeze_after), 0.0)
    still = np.zeros((4, 4, 3), np.uint8)
    arrived = [cameras.frames({"observation.images.top": still}, time.perf_counter()) for _ in range(20)]
    shown = {observation["observation.images.top"].tobytes() for frames in arrived for observation, _ in frames}
    assert (len(shown) == 1) == (freeze_after == 0)
    assert not still.any()


def test_a_robot_of_full_quality_is_seen_with_shadows_and_reflections() -> None:
    images = []
    for full_quality in (0, 0, 1):
        robot = MujocoRobot(Simulation("metaworld-drawer-open", full_quality=full_quality), {"corner2": (64, 64)})
        try:
            robot.connect(20.0)
            images.append(robot.observe(0.0).observation["observation.images.corner2"].astype(float))
        finally:
            robot.stop()
    plain, again, full = images
    assert np.abs(plain - again).mean() < 1  # the sensor's noise
    assert np.abs(plain - full).mean() > 3
    with pytest.raises(ConfigError, match="full_quality must be 0 or 1, got 2"):
        Simulation("mock-reach", full_quality=2)


def test_a_robot_whose_controller_is_gone_holds() -> None:
    robot = MujocoRobot(Simulation("mock-reach"))
    assert robot.embodiment.action_names == ("dx", "dy", "gripper")
    robot.connect(20.0)
    robot.act(np.array([0.5, 0.5, 1], np.float32))
    time.sleep(0.8)
    robot.stop()
    report = robot.report()
    assert report["periods held for want of a command"] >= 8
    assert 1 <= report["commands executed"] <= 6
    with pytest.raises(RobotFault, match="stopped"):
        robot.act(np.zeros(3, np.float32))


def test_a_simulated_arm_of_torques_is_refused_before_it_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process holds it whenever no command comes, which no torque can do."""
    env = make_env("mock-reach", None)
    torques = replace(env.embodiment, action_kinds=("torque",) * 3)
    sent: list[Any] = []
    with closing(env):
        unmoving = SimpleNamespace(embodiment=torques)
        monkeypatch.setattr(simulator_process, "make_env", lambda *_: unmoving)
        monkeypatch.setattr(simulator_process, "begin_worker", lambda: None)
        simulator_process.simulate(Simulation("mock-reach"), None, Lock(), SimpleNamespace(send=sent.append))  # type: ignore[arg-type]
    [error] = sent
    assert isinstance(error, ConfigError)
    assert "are torques" in str(error)


def test_names_that_mean_nothing_are_refused() -> None:
    for text, words in (("mock-fly", "mock-reach"), ("nothing-x", "nothing to simulate")):
        with pytest.raises(ConfigError, match=words):
            assert MujocoRobot(Simulation(text)).embodiment
    with pytest.raises(ConfigError, match=r"has no option .speed.; it has episode"):
        Simulation.parse("mock-reach?speed=3")
    with pytest.raises(ConfigError, match=r"answer_s must be .*not negative, got nan"):
        Simulation.parse("mock-reach?answer_s=nan")
    with pytest.raises(ConfigError, match=r"episode must be a number, got .x."):
        Simulation.parse("mock-reach?episode=x")
    with closing(make_env("mock-Reach@Point", None)) as env:
        assert env.task == "reach"
    with pytest.raises(ConfigError, match=r"no robot 'Panda'"):
        make_env("mock-reach@Panda", None)
    assert Simulation.parse("mock-reach?episode=2&nan_after=1.5") == Simulation("mock-reach", 2, nan_after=1.5)
    assert Simulation.parse("mock-reach?full_quality=1") == Simulation("mock-reach", full_quality=1)
    for name, words in (("mujoco", "KIND:NAME"), ("ur5:x", "among lerobot, mujoco; got 'ur5'")):
        with pytest.raises(ConfigError, match=words):
            control(ControlConfig(name, policy="mock"))
