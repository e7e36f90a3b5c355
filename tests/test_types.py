from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dysl_vla.errors import ActionError, ConfigError, ObservationError
from dysl_vla.types import EmbodimentSpec, Normalisation, PolicySpec, check_actions, gripper_columns

WORLD = EmbodimentSpec(
    cameras={"top": (32, 32)},
    state_names=("x", "y"),
    action_names=("dx", "gripper"),
    action_low=(-1.0, -1.0),
    action_high=(1.0, 1.0),
    rate_hz=20.0,
)
POLICY = PolicySpec(
    cameras={"top": (32, 32)},
    state_names=("x", "y"),
    action_names=("dx", "gripper"),
    rate_hz=20.0,
    chunk_length=4,
    execute_steps=2,
    state_normalisation=Normalisation((0.0, 0.0), (1.0, 1.0)),
    action_normalisation=Normalisation((0.0, 0.0), (1.0, 1.0)),
)


def observation(**changes: object) -> dict[str, object]:
    fine: dict[str, object] = {
        "observation.images.top": np.zeros((32, 32, 3), np.uint8),
        "observation.state": np.zeros(2, np.float32),
        "task": "go",
    }
    return fine | {key.replace("__", "."): value for key, value in changes.items()}


def test_a_fitting_world_and_observation_pass() -> None:
    POLICY.check_embodiment(WORLD)
    POLICY.check_observation(observation())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("cameras", {"side": (32, 32)}),
        ("cameras", {"top": (64, 32)}),
        ("state_names", ("x", "z")),
        ("action_names", ("dx",)),
        ("rate_hz", 10.0),
    ],
)
def test_a_world_that_does_not_fit_is_refused_by_field(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^{field}:"):
        POLICY.check_embodiment(replace(WORLD, **{field: value}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"observation__images__top": np.zeros((32, 32, 3), np.float32)}, "observation.images.top"),
        ({"observation__images__top": np.zeros((3, 32, 32), np.uint8)}, "observation.images.top"),
        ({"observation__images__top": None}, "observation.images.top"),
        ({"observation__state": np.zeros(3, np.float32)}, "observation.state"),
        ({"observation__state": np.array([0, np.nan], np.float32)}, "observation.state"),
        ({"task": 3}, "task"),
    ],
)
def test_an_observation_that_does_not_fit_is_refused_by_key(changes: dict[str, object], key: str) -> None:
    with pytest.raises(ObservationError, match=f"^{key}:"):
        POLICY.check_observation(observation(**changes))


@given(hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=2, max_side=5), elements=st.floats(width=32)))
def test_actions_pass_exactly_when_finite_and_of_the_dimension(actions: np.ndarray) -> None:
    if actions.shape[-1] == 3 and np.isfinite(actions).all():
        check_actions(actions, 3)
    else:
        with pytest.raises(ActionError, match=r"^action:"):
            check_actions(actions, 3)


FINITE = st.floats(-1e3, 1e3, width=32)
SCALE = st.floats(0.125, 1e3, width=32)


@given(
    st.lists(st.tuples(FINITE, SCALE), min_size=1, max_size=5),
    st.lists(FINITE, min_size=5, max_size=5),
)
def test_normalising_and_back_is_the_identity(parameters: list[tuple[float, float]], values: list[float]) -> None:
    normalisation = Normalisation(*map(tuple, zip(*parameters, strict=True)))  # type: ignore[arg-type]
    array = np.array(values[: len(parameters)], np.float32)
    np.testing.assert_allclose(normalisation.undo(normalisation.apply(array)), array, rtol=1e-4, atol=1e-2)


@given(hnp.arrays(np.float32, (3, 2), elements=FINITE))
def test_clipped_actions_are_accepted_ones(actions: np.ndarray) -> None:
    clipped = WORLD.clip(actions)
    assert (np.abs(clipped) <= 1).all()
    inside = np.abs(actions) <= 1
    np.testing.assert_array_equal(clipped[inside], actions[inside])


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"execute_steps": 0}, "execute_steps"),
        ({"execute_steps": 5}, "execute_steps"),
        ({"rate_hz": 0.0}, "rate_hz"),
        ({"state_normalisation": Normalisation((0.0,), (1.0,))}, "state_normalisation"),
    ],
)
def test_a_spec_that_cannot_work_is_refused(changes: dict[str, object], field: str) -> None:
    with pytest.raises(ConfigError, match=f"^{field}:"):
        replace(POLICY, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("std", [(0.0, 1.0), (np.nan, 1.0), (-1.0, 1.0), (1.0,)])
def test_a_normalisation_that_cannot_work_is_refused(std: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match=r"^normalisation:"):
        Normalisation((0.0, 0.0), std)


@pytest.mark.parametrize(
    ("names", "columns"),
    [
        (("dx", "dy", "gripper"), (2,)),
        (("shoulder_pan.pos", "gripper.pos"), (1,)),
        (("left_wrist.pos", "left_gripper.pos", "right_wrist.pos", "right_gripper.pos"), (1, 3)),
        (("gripper_open", "Gripper"), (0, 1)),
        (("grippers", "agripper", "0", ""), ()),
    ],
)
def test_grippers_are_known_by_name(names: tuple[str, ...], columns: tuple[int, ...]) -> None:
    assert gripper_columns(names) == columns
