"""Values of the training commands are checked when their configurations are made, before anything is read."""

from pathlib import Path
from typing import Any

import pytest

from dysl_vla.errors import ConfigError
from dysl_vla.training.calibrate import CalibrateConfig
from dysl_vla.training.distill import DistillRunConfig
from dysl_vla.training.train import TrainConfig
from dysl_vla.training.tune import TuneConfig

HERE = Path("nowhere")


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (CalibrateConfig, {"static_ratio": 1.2}, "static_ratio must be above 0 and below 1, got 1.2"),
        (CalibrateConfig, {"static_ratio": 0.0}, "static_ratio must be above 0"),
        (CalibrateConfig, {"longest_block": 0}, "longest_block must be at least 1, got 0; leave it out"),
        (CalibrateConfig, {"frames": 0}, "frames must be at least 1, got 0"),
        (DistillRunConfig, {"frames": 0}, "frames must be at least 1, got 0"),
        (DistillRunConfig, {"augment_copies": -1}, "augment_copies must be at least 0, got -1"),
        (DistillRunConfig, {"augment_images": True}, "augment_images must come with augment_copies"),
        (DistillRunConfig, {"adapter_size": 0}, "adapter_size must be at least 1, got 0"),
        (DistillRunConfig, {"importance": "touch"}, "unknown importance measure 'touch'"),
        (DistillRunConfig, {"init_heads": True, "plan": HERE}, "plan must not be given with init_heads"),
        (TuneConfig, {}, "target must be given once, by one of --target-ms, .*; got 0"),
        (TuneConfig, {"target_ms": 5.0, "target_action_error": 0.1}, "target must be given once, .*; got 2"),
        (TuneConfig, {"target_ms": -1.0}, "target_ms must be finite and not negative, got -1.0"),
        (TuneConfig, {"target_success_drop": float("nan")}, "target_success_drop must be finite"),
        (TuneConfig, {"target_ms": 5.0, "episodes": 0}, "episodes must be at least 1, got 0"),
        (TuneConfig, {"target_ms": 5.0, "workers": 0}, "workers must be at least 1, got 0"),
        (TrainConfig, {"layers": 0}, "layers must be at least 1, got 0"),
        (TrainConfig, {"execute": 9}, "execute must be from 1 to the chunk's 8 actions, got 9"),
        (TrainConfig, {"resize": "front=9"}, "resize"),
        (TrainConfig, {"crops": "top=1x2"}, "crops"),
        (TrainConfig, {"grids": "top=x"}, "grids"),
        (TrainConfig, {"init": "mine", "hidden": 64}, "hidden must not be given with init"),
    ],
)
def test_values_that_cannot_work_are_refused_before_anything_is_read(
    config: type[Any], values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        config(HERE, HERE, **values)


@pytest.mark.parametrize("config", [CalibrateConfig, DistillRunConfig, TrainConfig])
def test_defaults_are_accepted(config: type[Any]) -> None:
    config(HERE, HERE)
