"""Perturbations that the simulator itself shows: where things and cameras are, how they are lit and coloured."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from dysl_vla.envs.perturbations.base import Perturbation, register
from dysl_vla.envs.rendering import Decoration, Scene

Floats = NDArray[np.float64]

GREY = np.array([0.3, 0.59, 0.11])
"""How much red, green and blue add to brightness."""
BACKGROUND_SIZE = 0.25
"""Metres around its middle that a fixed geometry reaches, from which on it counts as background."""
WORKSPACE = 0.35
"""Metres around the first things that are moved within which distractors stand."""
PLACE_TRIES = 100
APART = 0.09
"""Metres between a distractor and what moves."""
DEEPER = 0.001
"""Metres by which a thing may press deeper into what it stands on."""
ARM_STEPS = 60
"""Steps within which the hand is brought to where it begins; they are not part of the episode."""
HAND_NEAR = 0.005
GAIN = 8.0
OPEN = -1.0
"""The gripper's command that opens it, in every simulator here."""


class ScenePerturbation(Perturbation):
    """One that changes a MuJoCo scene."""

    shows = True

    @classmethod
    def applies_to(cls, env: Any) -> bool:
        """See `Perturbation`."""
        return env.scene is not None

    def begin(self, env: Any) -> None:
        """See `Perturbation`."""
        self.change(env, env.scene)

    @abstractmethod
    def change(self, env: Any, scene: Scene) -> None:
        """Change the scene of an episode that has just begun."""

    def direction(self, dimensions: int = 3) -> Floats:
        """A random unit vector."""
        vector = self.rng.normal(size=dimensions)
        return vector / np.linalg.norm(vector)


@register
class Camera(ScenePerturbation):
    """Every camera is moved by so many cm, and turned by 2/3 of a degree for each; on the hand a third as much."""

    name = "camera"
    magnitudes = (1, 2, 4, 6, 9)

    def change(self, env: Any, scene: Scene) -> None:
        """See `ScenePerturbation`."""
        import mujoco

        for camera in env.embodiment.cameras:
            self.rng = self.draw(camera)
            index = scene.model.camera(camera).id
            on_hand = scene.model.body_weldid[scene.model.cam_bodyid[index]] != 0
            size = self.size / 3 if on_hand else self.size
            scene.changed("cam_pos")[index] += 0.01 * size * self.direction()
            turn, turned = np.zeros(4), np.zeros(4)
            mujoco.mju_axisAngle2Quat(turn, self.direction(), np.deg2rad(size * 2 / 3))
            mujoco.mju_mulQuat(turned, scene.model.cam_quat[index], turn)
            scene.changed("cam_quat")[index] = turned


@register
class Light(ScenePerturbation):
    """All lights get so many per cent brighter or darker, half as much tinted, and placed ones move by as many cm."""

    name = "light"
    magnitudes = (15, 30, 45, 60, 75)

    def change(self, env: Any, scene: Scene) -> None:
        """See `ScenePerturbation`."""
        share = self.size / 100
        strength = 1 + share * self.rng.choice((-1.0, 1.0))
        tint = 1 + share / 2 * self.rng.uniform(-1, 1, 3)
        moved = share * self.direction()
        for light in ("light_ambient", "light_diffuse"):
            scene.changed(light)[:] *= strength * tint
        scene.changed("light_pos")[:] += moved
        for part in ("ambient", "diffuse"):
            scene.changed_headlight(part)[:] *= strength * tint


@register
class Background(ScenePerturbation):
    """Large fixed surfaces (floor, walls, table) go so many per cent towards another colour of the same brightness."""

    name = "background"
    magnitudes = (15, 30, 50, 70, 90)

    @classmethod
    def applies_to(cls, env: Any) -> bool:
        """See `Perturbation`."""
        return env.scene is not None and len(_background(env.scene)) > 0

    def change(self, env: Any, scene: Scene) -> None:
        """See `ScenePerturbation`."""
        material, share = scene.model.geom_matid, self.size / 100
        surfaces = dict.fromkeys(
            ("mat_rgba", material[geom]) if material[geom] >= 0 else ("geom_rgba", geom) for geom in _background(scene)
        )
        for array, index in surfaces:
            colours = scene.changed(array)[index, :3]
            other = self.rng.uniform(0.1, 1, 3)
            other *= (colours @ GREY) / (other @ GREY)
            colours[:] = np.clip((1 - share) * colours + share * other, 0, 1)


@register
class Distractors(ScenePerturbation):
    """So many coloured bodies stand where nothing else does. They are seen, and cannot be touched."""

    name = "distractors"
    magnitudes = (1, 2, 3, 5, 8)

    def change(self, env: Any, scene: Scene) -> None:
        """See `ScenePerturbation`."""
        import mujoco

        kinds = (mujoco.mjtGeom.mjGEOM_BOX, mujoco.mjtGeom.mjGEOM_CYLINDER, mujoco.mjtGeom.mjGEOM_SPHERE)
        for _ in range(int(self.size)):
            kind, half = kinds[self.rng.integers(3)], self.rng.uniform(0.015, 0.03)
            angle, colour = self.rng.uniform(0, 2 * np.pi), (*self.rng.uniform(0, 1, 3), 1.0)
            place = self._free_place(scene)
            if place is None:
                return  # there is no more room
            turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
            scene.renderer.decorations.append(
                Decoration(int(kind), np.full(3, half), place + np.array([0, 0, half]), turn, np.array(colour))
            )

    def _free_place(self, scene: Scene) -> Floats | None:
        """A place on a fixed surface, away from what moves and from other distractors; None if none is found."""
        import mujoco

        model, data = scene.model, scene.data
        moving = [i for i in range(1, model.nbody) if model.body_weldid[i] != 0]
        others = np.concatenate(
            [data.xpos[moving], [one.position for one in scene.renderer.decorations] or np.empty((0, 3))]
        )
        middle = _things_middle(scene)
        down, hit = np.array([0.0, 0.0, -1.0]), np.zeros(1, np.int32)
        for _ in range(PLACE_TRIES):
            above = np.array([*(middle[:2] + self.rng.uniform(-WORKSPACE, WORKSPACE, 2)), middle[2] + 0.6])
            distance = mujoco.mj_ray(model, data, above, down, None, 1, -1, hit)
            place: Floats = above + distance * down
            is_fixed = hit[0] >= 0 and model.body_weldid[model.geom_bodyid[hit[0]]] == 0
            if is_fixed and abs(place[2] - middle[2]) < 0.15 and np.linalg.norm(others - place, axis=1).min() > APART:
                return place
        return None


@register
class Layout(ScenePerturbation):
    """Every thing that stands freely is moved by at most so many cm, and turned by at most ten degrees for each.

    It stays on what it stands on, and touches nothing else.
    """

    name = "layout"
    magnitudes = (1, 2, 3, 4, 6)
    varies_by_task = True

    @classmethod
    def applies_to(cls, env: Any) -> bool:
        """See `Perturbation`."""
        return env.scene is not None and len(_free_joints(env.scene.model)) > 0

    def change(self, env: Any, scene: Scene) -> None:
        """See `ScenePerturbation`."""
        import mujoco

        model, data = scene.model, scene.data
        for joint in _free_joints(model):
            at = model.jnt_qposadr[joint]
            before, touched = data.qpos[at : at + 7].copy(), touching(scene, model.jnt_bodyid[joint])
            turn = np.zeros(4)
            for _ in range(PLACE_TRIES):
                step = self.direction(2) * 0.01 * self.size * np.sqrt(self.rng.uniform())
                data.qpos[at : at + 2] = before[:2] + step
                mujoco.mju_axisAngle2Quat(
                    turn, np.array([0.0, 0.0, 1.0]), np.deg2rad(10 * self.size) * self.rng.uniform(-1, 1)
                )
                mujoco.mju_mulQuat(data.qpos[at + 3 : at + 7], turn, before[3:])
                mujoco.mj_forward(model, data)
                now = touching(scene, model.jnt_bodyid[joint])
                if now.keys() == touched.keys() and all(now[geom] > touched[geom] - DEEPER for geom in now):
                    break
            else:
                data.qpos[at : at + 7] = before
        mujoco.mj_forward(model, data)


@register
class ArmPose(ScenePerturbation):
    """The hand begins so many cm away, sideways or above; the robot's own controller brings it there."""

    name = "arm"
    magnitudes = (2, 4, 6, 9, 12)
    axes: ClassVar[tuple[str, ...]] = ("x", "y", "z")

    @classmethod
    def applies_to(cls, env: Any) -> bool:
        """See `Perturbation`."""
        spec = env.embodiment
        moves = {f"d{axis}" for axis in cls.axes} | {"gripper"}
        return env.scene is not None and set(cls.axes) <= set(spec.state_names) and moves <= set(spec.action_names)

    def change(self, env: Any, scene: Scene) -> None:
        """See `ScenePerturbation`."""
        spec = env.embodiment
        state = [spec.state_names.index(axis) for axis in self.axes]
        moves = [spec.action_names.index(f"d{axis}") for axis in self.axes]
        direction = self.direction()
        direction[2] = abs(direction[2])
        target = env.proprioception()[state] + 0.01 * self.size * direction
        for _ in range(ARM_STEPS):
            away = target - env.proprioception()[state]
            action = np.zeros(len(spec.action_names), np.float32)
            action[spec.action_names.index("gripper")] = OPEN
            if np.linalg.norm(away) > HAND_NEAR:
                action[moves] = np.clip(GAIN * away, -1, 1)
            env.rehearse(action)


def _background(scene: Scene) -> list[int]:
    """The large geometries that never move and are drawn."""
    model = scene.model
    is_fixed = model.body_weldid[model.geom_bodyid] == 0
    is_large = (model.geom_rbound > BACKGROUND_SIZE) | (model.geom_rbound == 0)  # a plane has no bound
    is_drawn = (scene.renderer.drawn_groups[np.clip(model.geom_group, 0, 5)]) & (model.geom_rgba[:, 3] > 0)
    return [int(geom) for geom in np.flatnonzero(is_fixed & is_large & is_drawn)]


def _free_joints(model: Any) -> list[int]:
    import mujoco

    return [int(joint) for joint in np.flatnonzero(model.jnt_type == mujoco.mjtJoint.mjJNT_FREE)]


def _things_middle(scene: Scene) -> Floats:
    """The middle of the things that stand freely, else of all that moves, at the height of its lowest part."""
    model = scene.model
    free = [model.jnt_bodyid[joint] for joint in _free_joints(model)]
    bodies = free or [body for body in range(1, model.nbody) if model.body_weldid[body] != 0]
    places = scene.data.xpos[bodies]
    middle: Floats = np.array([*np.median(places[:, :2], axis=0), places[:, 2].min()])
    return middle


def touching(scene: Scene, body: int) -> dict[int, float]:
    """The geometries of others that a body touches, with the distance, in metres, which is negative inside of them."""
    contacts = scene.data.contact
    welded = scene.model.body_weldid[scene.model.geom_bodyid]
    own, found = scene.model.body_weldid[body], dict[int, float]()
    for pair, distance in zip(contacts.geom[: scene.data.ncon], contacts.dist[: scene.data.ncon], strict=True):
        for mine, other in (pair, pair[::-1]):
            if welded[mine] == own and welded[other] != own:
                found[int(other)] = min(float(distance), found.get(int(other), np.inf))
    return found
