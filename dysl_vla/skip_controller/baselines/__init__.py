"""Other methods that run fewer layers of the same frozen decoder, for comparison; see `methods`.

They are for policies that read the last token, act by one forward and keep no cache. One observation is inferred at a
time: a batch would run the layers that any of its rows needs.
"""

from dysl_vla.skip_controller.baselines.methods import METHODS, BaselineConfig, make_baseline
from dysl_vla.skip_controller.baselines.running import Baseline, BaselineRunner, Pass
from dysl_vla.skip_controller.baselines.trainer import BaselineTrainer, BaselineTrainingConfig

__all__ = [
    "METHODS",
    "Baseline",
    "BaselineConfig",
    "BaselineRunner",
    "BaselineTrainer",
    "BaselineTrainingConfig",
    "Pass",
    "make_baseline",
]
