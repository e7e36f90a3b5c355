"""Published settings of the method, in place of this package's defaults.

`paper` is the regime of DySL-VLA (arXiv 2602.22896), which publishes one for OpenVLA-OFT on LIBERO and for RoboFlamingo
on CALVIN:

- a fifth of the layers is static: the best ratio of its sweep; fewer are faster and worse (section 3.1);
- a block can be left at each of its dynamic layers, which all have an adapter and a controller (section 3.1);
- two stages take 6.7 k steps in all, 13.7 times fewer than DeeR-VLA's 92 k (abstract, and the comparison on CALVIN);
- in stage 2 each block is left at one layer, drawn with a probability ~ 1/rank, its target gets a mixture, and the loss
  is the action's and lambda (1 - c) (s - i), without one of hidden states (section 3.4);
- importance is the continuity of the last 5 actions, `guidance.WINDOW`: 1 and 9 are worse in its ablation.

It leaves open how the steps are divided between the stages, lambda, the batch, the learning rate and its schedule, the
sizes of adapters and controllers, and how the action's loss weighs the steps of a chunk. Those stay the defaults.
"""

from __future__ import annotations

from dataclasses import replace

from dysl_vla.training.calibrate import CalibrateConfig
from dysl_vla.training.distill_config import DistillRunConfig

STATIC_RATIO = 0.2
STEPS = 6700


def paper_calibration(config: CalibrateConfig) -> CalibrateConfig:
    """Return a configuration with the paper's settings in place of its own; see the module."""
    return replace(config, static_ratio=STATIC_RATIO, exits="all")


def paper_distillation(config: DistillRunConfig) -> DistillRunConfig:
    """Return a configuration with the paper's settings in place of its own; see the module.

    The static ratio and the exits count where no plan is given.
    """
    training = replace(
        config.training,
        skip_steps=max(1, STEPS - config.training.adapter_steps),
        objective="mixture",
        joint_exit_prob=0.0,
        keep_block_prob=0.0,
        hidden_weight=0.0,
    )
    return replace(config, static_ratio=STATIC_RATIO, exits="all", importance="continuity", training=training)
