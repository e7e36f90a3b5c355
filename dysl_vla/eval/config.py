"""The configuration of an evaluation, and the variants of a policy that it runs.

Needs no simulator, so that an evaluation on demonstrations does without one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dysl_vla.errors import ConfigError
from dysl_vla.policies import ComputeConfig, Policy, load_variants
from dysl_vla.provenance import FIRST_EVALUATION_SEED
from dysl_vla.skip_controller.operating import ABLATIONS, Ablation


@dataclass(frozen=True)
class EvalConfig:
    """Evaluate a policy in simulation or on demonstrations. The same command continues a run that was interrupted.

    Raises:
        ConfigError: A value is out of range, or two options contradict each other.
    """

    out: Path
    """Folder for records, figures and videos."""
    policy: str = "metaworld-mini"
    """A shipped checkpoint's name, a checkpoint's folder, a Hugging Face hub id, or mock (for the mock suite)."""
    data: Path | None = None
    """Folder of demonstrations, a LeRobotDataset v3. No simulator is needed then: the policy's actions are compared
    with those demonstrated in held-out episodes, for the full model and, where the policy can skip layers, for
    skipping. Of the other options only `--out`, `--policy`, `--skip`, `--variants`, `--episodes` (in all) and
    `--held-out` count."""
    held_out: float | None = None
    """With `--data`: the share of its episodes that is held out. When not given, the split of the policy's training
    applies; 1 takes all of them, for demonstrations that the policy was not trained on."""
    suite: str | None = None
    """Suite to evaluate on: metaworld-mt10, metaworld-mt50, robosuite-5, robosuite-all, robosuite-5-libero (with
    LIBERO's observations), libero-spatial, libero-object, libero-goal, libero-10, libero-90, their perturbed forms
    libero-pro-{spatial,object,goal,10}-{language,object,swap,task}, libero-chain (five instructions in a row) or mock.
    When not given, it is the suite that the policy was trained in."""
    robot: str | None = None
    """Another robot than the suite's own, where its simulator has several: Sawyer, UR5e, ... in robosuite."""
    perturb: str | None = None
    """What perturbs the world, NAME or NAME:LEVEL with levels from 1 to 5: camera, light, background, distractors,
    layout, arm (where it begins), noise, blur, exposure, occlusion, dropped-frames, instruction, action-noise, latency
    or clock. Several joined by + are there at once; plus, or plus:LEVEL, is a sweep in which each episode has another
    one. The suites metaworld-mt10-plus and robosuite-5-plus are sweeps."""
    tasks: str | None = None
    """Comma-separated tasks. When not given, they are all of the suite, or, without a suite, those that the policy was
    trained in."""
    episodes: int = 10
    """Episodes of each task."""
    seed: int = FIRST_EVALUATION_SEED
    """Seed of the initial states, at least 100000: lower ones belong to demonstrations. In LIBERO's suites, 100000 has
    the fifty fixed states of the benchmark, and every other seed has states of its own. In libero-chain, the seed also
    decides which instructions follow one another."""
    workers: int = 1
    """Processes that run episodes side by side, one inference thread each. Latencies are only comparable with 1."""
    video: int = 0
    """Number of episodes of each task that are recorded as videos."""
    skip: float | None = None
    """How much a policy with adapters and controllers skips, from 0 (the full model, exactly) to 1. When not given, it
    is the operating point of its checkpoint."""
    variants: str | None = None
    """Comma-separated variants of the policy: full, dysl, no-guidance, no-verification, controllers (neither), random.
    Each episode is run once with each of them, in turn; each has its own folder under `out`, and is compared with the
    first."""
    compute: ComputeConfig = field(default_factory=ComputeConfig)

    def __post_init__(self) -> None:
        for name in ("episodes", "workers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.video < 0:
            raise ConfigError(f"video must be at least 0, got {self.video}; 0 records none.")
        if self.seed < FIRST_EVALUATION_SEED:
            raise ConfigError(
                f"seed must be at least {FIRST_EVALUATION_SEED}, got {self.seed}; lower ones belong to demonstrations."
            )
        if self.skip is not None and not 0 <= self.skip <= 1:
            raise ConfigError(f"skip must be from 0 (the full model) to 1, got {self.skip}.")
        if self.held_out is not None and self.data is None:
            raise ConfigError("held_out is only used with data; add --data, or leave --held-out out.")
        variants_of(self)


@dataclass(frozen=True)
class Variant:
    """One variant of the policy that is evaluated.

    Attributes:
        name: Its name, which is also its folder's; empty for the only one of a run.
        skip: How much it skips; None: the operating point of its checkpoint.
        ablation: Parts of the method that are switched off; None for the full method and the full model.
    """

    name: str
    skip: float | None
    ablation: Ablation | None

    def folder(self, out: Path) -> Path:
        """The folder of its records, in the run's folder `out`."""
        return out / self.name


def load_all(config: EvalConfig, variants: Sequence[Variant]) -> list[Policy]:
    """Load the policy as each of its variants."""
    return load_variants(config.policy, [(variant.skip, variant.ablation) for variant in variants], config.compute)


def variants_of(config: EvalConfig) -> list[Variant]:
    """The variants that are run: those that `variants` names, else a single one, whose records are in `out` itself.

    Raises:
        ConfigError: A name is unknown or given twice, or `skip` is 0 for a variant that skips.
    """
    if config.variants is None:
        return [Variant("", config.skip, None)]
    variants = []
    for name in map(str.strip, config.variants.split(",")):
        if name != "full" and name not in ABLATIONS:
            raise ConfigError(f"variants must be of full, {', '.join(ABLATIONS)}, got {name!r}.")
        skip, ablation = (0.0, None) if name == "full" else (config.skip, ABLATIONS[name])
        variants.append(Variant(name, skip, ablation))
    if config.skip == 0 and any(variant.name != "full" for variant in variants):
        raise ConfigError(
            f"skip must be above 0 with variants {config.variants!r}, got 0, which is the full model; leave one out."
        )
    if len({variant.name for variant in variants}) < len(variants):
        raise ConfigError(f"variants must name each one once, got {config.variants!r}.")
    return variants
