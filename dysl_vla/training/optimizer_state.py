"""An optimizer's state in a safetensors file, so that a training that was killed goes on as if nothing had happened."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""The state that AdamW keeps of a parameter that has had a gradient."""


def optimizer_tensors(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """Return an optimizer's state as named tensors.

    Args:
        parameters: All parameters that are optimised, by name.
        optimizer: Their optimizer.
    """
    return {
        f"adam.{moment}.{name}": optimizer.state[parameter][moment]
        for name, parameter in parameters.items()
        for moment in MOMENTS
        if parameter in optimizer.state
    }


def restore_optimizer(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.AdamW, file: Any) -> None:
    """Restore the state that `optimizer_tensors` returned.

    Args:
        parameters: All parameters that are optimised, by name.
        optimizer: Their optimizer.
        file: An open safetensors file.

    Raises:
        KeyError: The file holds the state of other parameters.
    """
    names = {name for name in file.keys() if name.startswith("adam.")}  # noqa: SIM118 # it is no mapping
    expected = {f"adam.{moment}.{name}" for name in parameters for moment in MOMENTS}
    if not names <= expected:
        raise KeyError(min(names - expected))
    for name, parameter in parameters.items():
        if f"adam.step.{name}" in names:
            moments = {moment: file.get_tensor(f"adam.{moment}.{name}") for moment in MOMENTS}
            optimizer.state[parameter] = {
                moment: value if moment == "step" else value.to(parameter.device) for moment, value in moments.items()
            }
