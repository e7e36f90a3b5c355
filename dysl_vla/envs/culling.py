"""Which geometries of a MuJoCo scene a camera cannot see.

MuJoCo draws every geometry of a scene, also those behind the camera, and with a software renderer each of their
triangles costs time. Here the bounding box of each geometry is compared with the space that the camera sees, directly
and in mirrors; what lies wholly outside changes no pixel and can be left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import mujoco

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Indices = NDArray[np.intp]

PLANE, BOX = 0, 6
"""MuJoCo's numbers of the types of geometries that can reflect."""
SHADOW, REFLECTION = 0, 2
"""MuJoCo's numbers of the flags of rendering."""
MARGIN = 1e-3
"""Metres by which a box must lie outside to be left out, against rounding in single precision."""


class Culling:
    """Finds the geometries that cannot show in a picture of one camera.

    Args:
        model: The scene. Its geometries may move, but keep their sizes, groups and materials.
        groups: The groups of geometries that are drawn.
    """

    def __init__(self, model: mujoco.MjModel, groups: Indices) -> None:
        self._casts_shadows = bool(model.light_castshadow.any())
        material = model.geom_matid
        reflecting = (material >= 0) & (model.mat_reflectance[material] > 0 if model.nmat else False)
        drawn = np.isin(model.geom_group, groups)
        mirrors = drawn & reflecting & np.isin(model.geom_type, (PLANE, BOX))
        # MuJoCo draws the first mirror before everything else, so that leaving one out would change the order.
        self._candidates = np.flatnonzero(drawn & ~mirrors & (model.geom_type != PLANE) & (model.geom_rbound > 0))
        self._boxes = model.geom_aabb[self._candidates]
        self._mirrors = np.flatnonzero(mirrors)
        self._mirror_sizes = model.geom_size[self._mirrors]
        self._mirror_sizes[model.geom_type[self._mirrors] == PLANE, 2] = 0  # a box reflects with its upper face

    def unseen(self, data: mujoco.MjData, scene: mujoco.MjvScene, aspect: float) -> Indices:
        """Find the geometries that change no pixel.

        Args:
            data: The scene's current state.
            scene: The scene, whose camera is up to date.
            aspect: The picture's width over its height.

        Returns:
            Which of the model's geometries can be left out, (n,). There are none where that is not simple: with
            shadows, infinite mirrors and parallel projection.
        """
        mirrors = self._mirrors if scene.flags[REFLECTION] else self._mirrors[:0]
        has_shadows = scene.flags[SHADOW] and self._casts_shadows  # a new scene does not have its lights yet
        if scene.camera[0].orthographic or has_shadows or not self._mirror_sizes[: len(mirrors), :2].all():
            return self._candidates[:0]
        eye, normals, offsets = _frustum(scene, aspect)
        boxes = _Boxes.of(data, self._candidates, self._boxes)
        unseen = boxes.beyond(normals, offsets)
        for mirror, size in zip(mirrors, self._mirror_sizes, strict=False):
            rotation = data.geom_xmat[mirror].reshape(3, 3)
            face = data.geom_xpos[mirror] + rotation[:, 2] * size[2]
            if (eye - face) @ rotation[:, 2] > -MARGIN:
                unseen &= boxes.beyond(*_reflected(eye, face, rotation, size))
        return self._candidates[unseen]


@dataclass(frozen=True)
class _Boxes:
    """Boxes in the world: centers (n, 3), rotations whose columns are their axes (n, 3, 3), and half sizes (n, 3)."""

    centers: Floats
    rotations: Floats
    halves: Floats

    @classmethod
    def of(cls, data: mujoco.MjData, geoms: Indices, boxes: Floats) -> _Boxes:
        rotations = data.geom_xmat[geoms].reshape(-1, 3, 3)
        return cls(data.geom_xpos[geoms] + (rotations @ boxes[:, :3, None])[..., 0], rotations, boxes[:, 3:])

    def beyond(self, normals: Floats, offsets: Floats) -> Bools:
        """Find the boxes wholly on the outer side of at least one plane; x is inside where normals @ x >= offsets."""
        reach = np.abs(normals @ self.rotations * self.halves[:, None]).sum(-1)
        return np.asarray((self.centers @ normals.T + reach < offsets - MARGIN).any(-1))


def _frustum(scene: Any, aspect: float) -> tuple[Floats, Floats, Floats]:
    """The space that a camera sees: its eye (3,), and planes as `_Boxes.beyond` takes them."""
    left, right = scene.camera[0], scene.camera[1]  # MuJoCo renders with the mean of both eyes

    def mean(name: str) -> Any:
        return 0.5 * (np.float64(getattr(left, name)) + np.float64(getattr(right, name)))

    eye, forward, up = mean("pos"), mean("forward"), mean("up")
    near, far, bottom, top = (mean(f"frustum_{name}") for name in ("near", "far", "bottom", "top"))
    side, half = np.cross(forward, up), mean("frustum_width") or 0.5 * aspect * (top - bottom)
    first, last = mean("frustum_center") - half, mean("frustum_center") + half
    normals = np.stack(
        [
            near * side - first * forward,
            last * forward - near * side,
            near * up - bottom * forward,
            top * forward - near * up,
            forward,
            -forward,
        ]
    )
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    offsets = normals @ eye + [0, 0, 0, 0, near, -far]
    return eye, normals, offsets


def _reflected(eye: Floats, face: Floats, rotation: Floats, size: Floats) -> tuple[Floats, Floats]:
    """The space that an eye sees in a rectangular mirror: what its mirror image sees through the rectangle.

    Args:
        eye: Where the eye is, (3,).
        face: The rectangle's center, (3,).
        rotation: The rectangle's axes as columns, the last of which it faces, (3, 3).
        size: Half its sides, (2,) or more.

    Returns:
        Planes as `_Boxes.beyond` takes them.
    """
    normal = rotation[:, 2]
    image = eye - 2 * ((eye - face) @ normal) * normal
    rays = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * size[:2] @ rotation[:, :2].T + face - image
    normals = np.concatenate([np.cross(rays, np.roll(rays, -1, axis=0)), normal[None]])
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-12)
    return normals, np.append(normals[:4] @ image, normal @ face)
