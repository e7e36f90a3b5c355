"""Where a policy is computed, and with which type of numbers: options that most commands share."""

from __future__ import annotations

from dataclasses import dataclass

from dysl_vla.errors import ConfigError

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ComputeConfig:
    """Where a policy is computed, and with which type of numbers.

    Raises:
        ConfigError: The type is unknown.
    """

    device: str | None = None
    """Device on which the policy runs, as PyTorch names it: cpu, cuda, cuda:1. It is the CPU when not given."""
    dtype: str | None = None
    """Type of the policy's weights: float32, bfloat16 or float16. It is that of its checkpoint when not given."""

    def __post_init__(self) -> None:
        if self.dtype not in (None, *DTYPES):
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}.")
