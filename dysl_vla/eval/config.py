"""What an evaluation is of. Needs no simulator, which an evaluation on demonstrations does without."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dysl_vla.errors import ConfigError
from dysl_vla.policies import Policy, load_policy
from dysl_vla.provenance import FIRST_EVALUATION_SEED
from dysl_vla.skip_controller.operating import ABLATIONS, Ablation


@dataclass(frozen=True)
class EvalConfig:
    """Evaluate a policy in simulation or on demonstrations. The same command continues a run that was interrupted."""

    out: Path
    """Folder for records, figures and videos."""
    policy: str = "metaworld-mini"
    """A shipped checkpoint's name, a checkpoint's folder, a Hugging Face hub id, or mock (for the mock suite)."""
    data: Path | None = None
    """Folder of demonstrations, a LeRobotDataset v3: no simulator, but the distance of the policy's actions from those
    demonstrated in held-out episodes, of the full model and of the one that skips layers, where it can. Of the other
    options, `--out`, `--policy`, `--skip`, `--variants`, `--episodes` (in all) and `--held-out` count then."""
    held_out: float | None = None
    """With `--data`: share of its episodes that are held out; when not given, as the policy was trained; 1: all of
    them, for demonstrations that the policy was not trained on."""
    suite: str = ""
    """What is evaluated: metaworld-mt10, metaworld-mt50, robosuite-5, robosuite-all, mock; when empty, the suite that
    the policy was trained in."""
    robot: str = ""
    """Another robot than the suite's own, where its simulator has several: Sawyer, UR5e, ... in robosuite."""
    tasks: str = ""
    """Comma-separated tasks; when empty, all of the suite, or those of it that the policy was trained in when none is
    named."""
    episodes: int = 10
    """Episodes of each task."""
    seed: int = FIRST_EVALUATION_SEED
    """Seed of the initial states; from 100000 on, those below are for demonstrations."""
    workers: int = 1
    """Processes that run episodes side by side, one inference thread each. Latencies are only comparable with 1."""
    video: int = 0
    """Record videos of this many episodes of each task."""
    skip: float | None = None
    """How much a policy with adapters and controllers skips, from 0 (the full model, exactly) to 1; its checkpoint's
    operating point when not given."""
    variants: str = ""
    """Comma-separated: run each episode once with each of these variants of the policy, in turn, each into its own
    folder under `out`, and compare them with the first: full, dysl, no-guidance, no-verification, controllers
    (neither), random."""

    def __post_init__(self) -> None:
        for name in ("episodes", "workers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name)} must be at least 1.")
        if self.held_out is not None and self.data is None:
            raise ConfigError("held_out: goes with --data.")


@dataclass(frozen=True)
class Variant:
    """One variant of the policy that is evaluated."""

    name: str
    skip: float | None
    ablation: Ablation | None

    def load(self, policy: str) -> Policy:
        """This variant of the policy of a name."""
        return load_policy(policy, skip=self.skip, ablation=self.ablation)

    def folder(self, out: Path) -> Path:
        """Where its records are."""
        return out / self.name


def variants_of(config: EvalConfig) -> list[Variant]:
    """The variants that are run: one, into `out` itself, unless `variants` names several.

    Raises:
        ConfigError: A name that means nothing, or is there twice.
    """
    if not config.variants:
        return [Variant("", config.skip, None)]
    variants = []
    for name in map(str.strip, config.variants.split(",")):
        if name != "full" and name not in ABLATIONS:
            raise ConfigError(f"variants: unknown {name!r}; there are: full, {', '.join(ABLATIONS)}.")
        variants.append(Variant(name, 0.0, None) if name == "full" else Variant(name, config.skip, ABLATIONS[name]))
    if config.skip == 0 and any(variant.name != "full" for variant in variants):
        raise ConfigError(f"skip: 0 is the full model; leave {config.variants!r} out, or take a skip above 0.")
    if len({variant.name for variant in variants}) < len(variants):
        raise ConfigError(f"variants: {config.variants!r} names one twice.")
    return variants
