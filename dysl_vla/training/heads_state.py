"""The state of a distillation on disk, from which it goes on exactly."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dysl_vla.errors import CheckpointError
from dysl_vla.extras import needs_extra
from dysl_vla.files import atomic_write

with needs_extra("policy"):
    import torch
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file

    from dysl_vla.skip_controller.baselines import BaselineTrainer
    from dysl_vla.skip_controller.heads_trainer import HeadsTrainer
    from dysl_vla.training.optimizer_state import optimizer_tensors, restore_optimizer


@dataclass(frozen=True)
class Progress:
    """What a distillation has spent, beside the trainer's own state.

    Attributes:
        seconds: Seconds of training.
        is_streamed: Whether its frames are streamed, which may change the last bits of a batch; None: not decided yet.
    """

    seconds: float = 0.0
    is_streamed: bool | None = None


def save_heads_state(path: Path, trainer: HeadsTrainer | BaselineTrainer, progress: Progress) -> None:
    """Write the heads, their optimizer and the trainer's own values; the file is complete or absent."""
    state = {f"weights.{name}": p.detach() for name, p in trainer.parameters.items()}
    state |= optimizer_tensors(trainer.parameters, trainer.optimizer)
    metadata = {"step": str(trainer.step), "seconds": str(progress.seconds), "streamed": str(progress.is_streamed)}
    if isinstance(trainer, HeadsTrainer):
        metadata["tolerance"] = trainer.tolerance.hex()
    with atomic_write(path) as temporary:
        save_file(state, temporary, metadata=metadata)


@torch.no_grad()
def restore_heads_state(path: Path, trainer: HeadsTrainer | BaselineTrainer) -> Progress:
    """Restore what `save_heads_state` wrote, if it did.

    Raises:
        CheckpointError: The file is damaged, or is of other heads.
    """
    if not path.exists():
        return Progress()
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            for name, parameter in trainer.parameters.items():
                parameter.copy_(file.get_tensor(f"weights.{name}"))
            restore_optimizer(trainer.parameters, trainer.optimizer, file)
        trainer.step = int(metadata["step"])
        if isinstance(trainer, HeadsTrainer):
            trainer.tolerance = float.fromhex(metadata["tolerance"])
        is_streamed = {"True": True, "False": False}.get(metadata.get("streamed", ""))
        return Progress(float(metadata["seconds"]), is_streamed)
    except (SafetensorError, KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); remove it to train from the start.") from error
