"""Which geometries of a MuJoCo scene a camera cannot see.

MuJoCo draws every geometry of a scene, also those behind the camera, and with a software renderer each of their
triangles costs time. Here the bounding box of each geometry is compared with the camera's frustum; what lies wholly
outside changes no pixel and can be left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import mujoco

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]

PLANE, BOX = 0, 6
"""MuJoCo's numbers of the types of geometries that can reflect."""
SHADOW, REFLECTION = 0, 2
"""MuJoCo's numbers of the flags of rendering."""
MARGIN = 1e-3
"""Metres by which a box must lie outside a frustum to be left out, against rounding in single precision."""


class Culling:
    """Finds the geometries that cannot show in a picture of one camera.

    Args:
        model: The scene. Its geometries may move, but keep their sizes and materials.
        groups: The groups of geometries that are drawn.
    """

    def __init__(self, model: mujoco.MjModel, groups: Indices) -> None:
        material = model.geom_matid
        reflecting = (material >= 0) & (model.mat_reflectance[material] > 0 if model.nmat else False)
        drawn = np.isin(model.geom_group, groups)
        mirrors = drawn & reflecting & np.isin(model.geom_type, (PLANE, BOX))
        # MuJoCo draws the first mirror before everything else, so that leaving one out would change the order.
        self._candidates = np.flatnonzero(drawn & ~mirrors & (model.geom_type != PLANE) & (model.geom_rbound > 0))
        self._mirrors = np.flatnonzero(mirrors)
        self._boxes = model.geom_aabb[self._candidates]

    def unseen(self, data: mujoco.MjData, scene: mujoco.MjvScene, aspect: float) -> Indices:
        """Find the geometries that change no pixel.

        Args:
            data: The scene's current state.
            scene: The scene, whose camera and lights are up to date.
            aspect: The picture's width over its height.

        Returns:
            Which of the model's geometries can be left out, (n,).
        """
        frustum = _frustum(scene, aspect)
        if frustum is None or (scene.flags[REFLECTION] and self._mirrors.size) or _casts_shadows(scene):
            return self._candidates[:0]
        rotations = data.geom_xmat[self._candidates].reshape(-1, 3, 3)
        centers = data.geom_xpos[self._candidates] + (rotations @ self._boxes[:, :3, None])[..., 0]
        return self._candidates[_outside(centers, rotations * self._boxes[:, None, 3:], *frustum)]


def _outside(centers: Floats, axes: Floats, normals: Floats, offsets: Floats) -> NDArray[np.bool_]:
    """Find the boxes that lie wholly on the outer side of at least one plane.

    Args:
        centers: The boxes' centers, (n, 3).
        axes: The boxes' half axes as columns, (n, 3, 3).
        normals: Unit normals that point inwards, (planes, 3).
        offsets: A point x is inside where normal @ x >= offset, (planes,).
    """
    reach = np.abs(normals @ axes).sum(-1)
    return np.asarray((centers @ normals.T + reach < offsets - MARGIN).any(-1))


def _frustum(scene: Any, aspect: float) -> tuple[Floats, Floats] | None:
    """The planes between which the scene's camera sees, as `_outside` takes them; None for parallel projection."""
    left, right = scene.camera[0], scene.camera[1]  # MuJoCo renders with the mean of both eyes
    if left.orthographic or scene.enabletransform or scene.stereo:
        return None

    def mean(name: str) -> Floats:
        return np.asarray(0.5 * (np.float64(getattr(left, name)) + np.float64(getattr(right, name))))

    eye, forward, up = mean("pos"), mean("forward"), mean("up")
    side = np.cross(forward, up)
    near, far, center = mean("frustum_near"), mean("frustum_far"), mean("frustum_center")
    bottom, top = mean("frustum_bottom"), mean("frustum_top")
    half = mean("frustum_width") or 0.5 * aspect * (top - bottom)
    normals = np.stack(
        [
            side - forward * (center - half) / near,
            forward * (center + half) / near - side,
            up - forward * bottom / near,
            forward * top / near - up,
            forward,
            -forward,
        ]
    )
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    offsets = normals @ eye
    offsets[4] += near
    offsets[5] -= far
    return normals, offsets


def _casts_shadows(scene: Any) -> bool:
    return bool(scene.flags[SHADOW]) and any(light.castshadow for light in scene.lights[: scene.nlight])
