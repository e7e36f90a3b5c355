"""Cameras of MuJoCo scenes without a screen, for every simulator.

The GL backend is chosen once: `MUJOCO_GL` if the user set it, else EGL if its library is there, else OSMesa, else an
error that says what to install. The default scene quality is made for policies: without shadows, reflections and
multi-sampling a 128-pixel frame takes a tenth of the time. Nothing is ever shown on a screen.
"""

from __future__ import annotations

import atexit
import ctypes.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from dysl_vla.envs.culling import Culling
from dysl_vla.errors import RenderingError
from dysl_vla.extras import needs_extra
from dysl_vla.types import ImageArray

if TYPE_CHECKING:
    import mujoco

_open: WeakSet[SceneRenderer] = WeakSet()
NOT_DRAWN = 5
"""The last of MuJoCo's groups of geometries; none of the offered scenes draws it."""
FIX = "install one with: sudo apt-get install libegl1 libgl1-mesa-dri   (or libosmesa6, and set MUJOCO_GL=osmesa)"


def choose_gl_backend() -> str:
    """Decide how MuJoCo renders, before MuJoCo is first imported.

    Returns:
        The backend, which `MUJOCO_GL` then also names: "egl", "osmesa" or what the user asked for.

    Raises:
        RenderingError: No OpenGL library for rendering without a screen is installed.
    """
    asked = os.environ.get("MUJOCO_GL")
    if asked:
        return asked
    for backend, library in (("egl", "EGL"), ("osmesa", "OSMesa")):
        if ctypes.util.find_library(library):
            os.environ["MUJOCO_GL"] = backend
            # PyOpenGL reads its own variable, and robosuite would otherwise choose by platform.
            os.environ.setdefault("PYOPENGL_PLATFORM", backend)
            return backend
    raise RenderingError(f"no OpenGL library for rendering without a screen (neither EGL nor OSMesa); {FIX}")


def load_mujoco() -> Any:
    """Import MuJoCo with the chosen GL backend; do this before importing a simulator that imports it.

    Raises:
        RenderingError: The backend's library cannot be loaded.
        MissingExtraError: MuJoCo is not installed.
    """
    backend = choose_gl_backend()
    try:
        with needs_extra("sim"):
            import mujoco
    except (ImportError, RuntimeError, AttributeError) as error:  # what PyOpenGL and MuJoCo raise without a library
        raise RenderingError(f"MuJoCo cannot be imported with MUJOCO_GL={backend} ({error}); {FIX}") from error
    return mujoco


def _close_all() -> None:
    for renderer in list(_open):
        renderer.close()


@dataclass(frozen=True)
class Decoration:
    """A body that is drawn with a scene, and is not part of its physics.

    Attributes:
        kind: MuJoCo's number of its shape.
        size: Half its sides, in metres, (3,).
        position: Its middle, in metres, (3,).
        rotation: Its rotation, (3, 3).
        colour: Red, green, blue and opacity, from 0 to 1, (4,).
    """

    kind: int
    size: NDArray[np.float64]
    position: NDArray[np.float64]
    rotation: NDArray[np.float64]
    colour: NDArray[np.float64]


class SceneRenderer:
    """Renders the cameras of one MuJoCo model, with one renderer for each frame size and quality.

    What a camera cannot see is not drawn; the pictures are the same to the bit as if it were.

    Args:
        model: The scene. Its geometries may move, but keep their sizes and materials.
        hidden_groups: Groups of geometries that are not drawn, such as those for collisions alone.
    """

    def __init__(self, model: mujoco.MjModel, *, hidden_groups: tuple[int, ...] = ()) -> None:
        self._model = model
        self._mujoco = load_mujoco()
        self._option = self._mujoco.MjvOption()
        self._option.geomgroup[[*hidden_groups, NOT_DRAWN]] = 0
        self._culling = Culling(model, np.flatnonzero(self._option.geomgroup))
        self._renderers: dict[tuple[int, int, bool], mujoco.Renderer] = {}
        self.decorations: list[Decoration] = []
        """Bodies that are drawn with the scene."""
        self.drawn_groups: NDArray[np.bool_] = self._option.geomgroup.astype(np.bool_)
        """Whether each of MuJoCo's groups of geometries is drawn, (6,)."""

    def render(
        self,
        data: mujoco.MjData,
        camera: str,
        height: int,
        width: int,
        *,
        turned: bool = False,
        full_quality: bool = False,
    ) -> ImageArray:
        """Render one frame of one camera.

        Args:
            data: The scene's current state.
            camera: The camera's name in the scene.
            height: Height in pixels.
            width: Width in pixels.
            turned: Whether the camera hangs upside down, so that its picture is turned by 180 degrees.
            full_quality: Whether the frame has shadows, reflections and multi-sampling as the scene's author set them.

        Returns:
            uint8, (height, width, 3).

        Raises:
            RenderingError: The GL library is installed, but gives no context.
        """
        renderer = self._renderer(height, width, full_quality)
        with self._without_unseen(renderer, data, camera):
            renderer.update_scene(data, camera=camera, scene_option=self._option)
        self._add_decorations(renderer.scene)
        frame = renderer.render()
        return np.ascontiguousarray(frame[::-1, ::-1]) if turned else frame

    def _add_decorations(self, scene: mujoco.MjvScene) -> None:
        for one in self.decorations:
            geom, colour = scene.geoms[scene.ngeom], one.colour.astype(np.float32)
            self._mujoco.mjv_initGeom(geom, one.kind, one.size, one.position, one.rotation.ravel(), colour)
            scene.ngeom += 1

    @contextmanager
    def _without_unseen(self, renderer: mujoco.Renderer, data: mujoco.MjData, camera: str) -> Iterator[None]:
        """Move what this camera cannot see into a group that is not drawn, as long as the body runs."""
        view = self._mujoco.MjvCamera()
        view.type, view.fixedcamid = self._mujoco.mjtCamera.mjCAMERA_FIXED, self._model.camera(camera).id
        self._mujoco.mjv_updateCamera(self._model, data, view, renderer.scene)
        unseen = self._culling.unseen(data, renderer.scene, renderer.width / renderer.height)
        groups = self._model.geom_group
        before = groups[unseen]
        groups[unseen] = NOT_DRAWN
        try:
            yield
        finally:
            groups[unseen] = before

    def _renderer(self, height: int, width: int, full_quality: bool) -> mujoco.Renderer:
        key = (height, width, full_quality)
        if key not in self._renderers:
            mujoco = self._mujoco
            visual = self._model.vis
            visual.global_.offheight = max(visual.global_.offheight, height)
            visual.global_.offwidth = max(visual.global_.offwidth, width)
            samples = visual.quality.offsamples
            if not full_quality:
                visual.quality.offsamples = 0
            try:
                renderer = mujoco.Renderer(self._model, height, width)
            except Exception as error:  # mujoco raises whatever its GL binding raised
                raise RenderingError(
                    f"MuJoCo got no OpenGL context with MUJOCO_GL={os.environ.get('MUJOCO_GL')} ({error}); if MuJoCo "
                    f"was imported before dysl_vla.envs, set MUJOCO_GL=egl first; else {FIX}"
                ) from error
            finally:
                visual.quality.offsamples = samples
            if not full_quality:
                renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = False
                renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
            self._renderers[key] = renderer
            if not _open:
                atexit.register(_close_all)  # after MuJoCo's own hook was registered, so that it runs before that
            _open.add(self)
        return self._renderers[key]

    def close(self) -> None:
        """Free the GL contexts; unclosed ones print tracebacks when Python exits."""
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers.clear()


class Scene:
    """A MuJoCo scene that can be changed for an episode and given back as it was.

    Args:
        model: The scene.
        data: Its state.
        renderer: What renders it.
    """

    def __init__(self, model: mujoco.MjModel, data: mujoco.MjData, renderer: SceneRenderer) -> None:
        self.model, self.data, self.renderer = model, data, renderer
        self._before: dict[str, tuple[Any, NDArray[Any]]] = {}

    def changed(self, name: str) -> NDArray[Any]:
        """An array of the model that is about to be changed in place, "cam_pos"; `restore` gives it its values back."""
        return self._noted(name, getattr(self.model, name))

    def changed_headlight(self, part: str) -> NDArray[Any]:
        """The colour of the light at the camera that is about to be changed, "ambient" or "diffuse", (3,)."""
        return self._noted(f"headlight {part}", getattr(self.model.vis.headlight, part))

    def _noted(self, name: str, array: NDArray[Any]) -> NDArray[Any]:
        self._before.setdefault(name, (array, array.copy()))
        return array

    def update(self) -> None:
        """Let cameras and lights follow what was changed about them in the model."""
        load_mujoco().mj_camlight(self.model, self.data)

    def restore(self) -> None:
        """Undo every change, but not the state of the physics."""
        for array, values in self._before.values():
            array[:] = values
        self._before.clear()
        self.renderer.decorations.clear()
