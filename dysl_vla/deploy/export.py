"""`dysl export`: turn a checkpoint that skips layers into a bundle that needs no torch."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dysl_vla import provenance
from dysl_vla.checkpoint import CONFIG as DOCUMENT
from dysl_vla.checkpoint import MANIFEST, TOKENIZER, find_checkpoint, has_skips
from dysl_vla.denoising import LEFTS, SEEN, STATE, beginning
from dysl_vla.deploy.onnx_backend import (
    BACKBONE,
    DECIDED,
    EMBEDS,
    ENCODER,
    EXPERT,
    NOISY,
    PASSING,
    TIME,
    VELOCITY,
    open_backend,
    open_graph,
)
from dysl_vla.deploy.runtime import EXAMPLE, FILES, FORMAT, POLICY_TYPE, Bundle
from dysl_vla.errors import CheckpointError, ConfigError
from dysl_vla.extras import needs_extra
from dysl_vla.files import (
    TEMPORARY,
    atomic_write,
    check_memory,
    is_unused,
    locked_dir,
    read_json,
    sha256,
    write_json,
    write_text,
)
from dysl_vla.images import looked_at
from dysl_vla.policies import ExportablePolicy, load_skippable_policy
from dysl_vla.types import IMAGE_PREFIX, STATE_KEY, TASK_KEY, with_suffix

with needs_extra("policy"):
    import torch
    from torch import Tensor, nn

    from dysl_vla.deploy.graphs import DATA, quantize, write_graph
    from dysl_vla.policies.dysl import SkipSettings, load_dysl, read_skips
    from dysl_vla.policies.flow.conditional import ConditionalPrefix, ConditionalVelocity, PrefixEncoder
    from dysl_vla.policies.flow.policy import FlowPolicy
    from dysl_vla.skip_controller.conditional import ConditionalDecoder, PrunedDecoder
    from dysl_vla.skip_controller.heads import SkipHeads
    from dysl_vla.skip_controller.plan import SkipPlan
    from dysl_vla.skip_controller.skipping import attach
    from dysl_vla.skip_controller.torch_backend import TorchBackend

GRAPHS = (ENCODER, BACKBONE, EXPERT)
GRAPHS_FIX = "export it on a machine with more memory, or serve it with dysl serve"
OTHER_INSTRUCTIONS = ("Pick up the red cube.", "put  it in the bin", "x" * 200, "go\n")
"""Instructions that show whether the tokenizer alone makes the token ids, unlike in a policy with a template."""


@dataclass(frozen=True)
class ExportConfig:
    """Turn a checkpoint that skips layers into a folder that runs with NumPy and ONNX Runtime alone.

    Raises:
        ConfigError: `skip` is out of range.
    """

    out: Path
    """Folder for the bundle; a bundle in it is replaced."""
    policy: str = "metaworld-mini"
    """A shipped name, a checkpoint's folder or a hub id, of a policy made by `dysl distill`."""
    precision: Literal["fp32", "int8"] = "fp32"
    """Precision of weights and matrix products: as trained, or 8 bits, which are smaller and less exact."""
    skip: float | None = None
    """The bundle's operating point. It is the checkpoint's when not given."""
    prune: bool = False
    """Leave out the layers that never run at operating point 1, and the controllers: the bundle is smaller, and can do
    nothing but take the shortest path."""

    def __post_init__(self) -> None:
        if self.skip is not None and not 0 < self.skip <= 1:
            raise ConfigError(f"skip must be above 0 and at most 1, got {self.skip}.")


def export(config: ExportConfig) -> Path:
    """Write the bundle, and check it against PyTorch.

    Returns:
        Its folder.

    Raises:
        ConfigError: The policy cannot be exported, `out` holds something else, or its disk has no space.
        CheckpointError: The policy is damaged, or the exported one computes other actions.
        MissingExtraError: onnx is not installed.
    """
    if not is_unused(config.out) and not (config.out / BACKBONE).exists():
        raise ConfigError(
            f"out must be a new folder or one of a bundle; {config.out} is not empty and holds no bundle."
        )
    policy = _exportable(config.policy)
    folder = find_checkpoint(config.policy)
    if not has_skips(folder):
        raise ConfigError(f"policy must have adapters and controllers; {config.policy} has none, so use dysl distill.")
    settings, _ = read_skips(folder)
    skip = settings.skip if config.skip is None else config.skip
    if config.prune and policy.followers:
        raise ConfigError(f"prune must be left out for {config.policy}, whose expert follows its decoder.")
    if config.prune and skip != 1:
        raise ConfigError(
            f"skip must be 1 to prune, where only the shortest path runs, got {skip}; add --skip 1 if its success is "
            f"enough (dysl eval --policy {config.policy} --skip 1 measures it)."
        )
    with locked_dir(config.out), tempfile.TemporaryDirectory(dir=config.out, prefix=".", suffix=TEMPORARY) as name:
        _check_disk(config, policy)  # after `locked_dir` has removed what an export that was killed left behind
        made = Path(name)
        _write(config, policy, folder, made)
        try:
            Bundle(made)
        except CheckpointError as error:
            raise CheckpointError(f"The exported policy does not act as the checkpoint does: {error}") from error
        files = _files(made)
        for file in files:
            (made / file).replace(config.out / file)
        for other in (EXPERT, *(graph + DATA for graph in GRAPHS)):
            if other not in files:  # of the bundle that is replaced
                (config.out / other).unlink(missing_ok=True)
        (made / MANIFEST).replace(config.out / MANIFEST)  # the last: until then, the folder is no bundle
    return config.out


def _files(folder: Path) -> list[str]:
    """Return the names of a bundle's files except its manifest."""
    others = [EXPERT, *(graph + DATA for graph in GRAPHS)]
    return [*FILES, *(name for name in others if (folder / name).exists())]


def _check_disk(config: ExportConfig, policy: ExportablePolicy) -> None:
    """Refuse a bundle that the disk has no space for, before time is spent on it."""
    modules = [part for part in (policy, policy.backbone) if isinstance(part, nn.Module)]
    weights = {id(one): one for part in modules for one in (*part.parameters(), *part.buffers())}
    needed = sum(one.nbytes for one in weights.values())
    if config.precision != "fp32":
        needed += needed // 4  # beside the exact ones, which it is made from
    free = shutil.disk_usage(config.out).free
    if free < needed:
        raise ConfigError(
            f"out must be on a disk with space: {config.out} needs about {needed / 1e6:,.1f} MB while the bundle is "
            f"written, and its disk has {free / 1e6:,.1f} MB free; free some, or give a folder on another disk."
        )


def _exportable(name: str) -> ExportablePolicy:
    policy = load_skippable_policy(name)
    for part in ("backbone", "resizes", "crops", "tokenizer", "inputs", "decode", "token_ids"):
        if not hasattr(policy, part):
            raise ConfigError(
                f"policy must be a policies.ExportablePolicy; {name!r} offers no {part!r}, so run it with PyTorch: "
                "dysl serve --policy or dysl control --policy."
            )
    is_flow = isinstance(policy, FlowPolicy)
    if policy.has_memory or (policy.followers and not is_flow):
        what = "remembers earlier inferences" if policy.has_memory else "has decoders that follow another"
        raise ConfigError(f"policy must be one that a bundle can run; {name!r} {what}, so serve it with dysl serve.")
    exportable = cast("ExportablePolicy", policy)
    exportable.token_ids(OTHER_INSTRUCTIONS[0])  # a policy whose words are more than the instruction refuses
    if isinstance(policy, FlowPolicy):
        # Others are loaded like that. The graphs are made of copies, and opened once while the policy is there.
        check_memory(3 * 4 * sum(p.numel() for p in policy.parameters()), f"graphs of {name} in float32", GRAPHS_FIX)
        policy.to("cpu", torch.float32)
    return exportable


class _Encoder(nn.Module):
    """A policy's `inputs`, as a module."""

    def __init__(self, policy: ExportablePolicy) -> None:
        super().__init__()
        self._policy = policy

    def forward(self, images: dict[str, Tensor], state: Tensor, token_ids: Tensor) -> dict[str, Tensor]:
        return self._policy.inputs(images, state, token_ids)


class _Decode(nn.Module):
    """A policy's `decode`, as a module."""

    def __init__(self, policy: ExportablePolicy) -> None:
        super().__init__()
        self._policy = policy

    def forward(self, hidden: Tensor) -> Tensor:
        return self._policy.decode(hidden)


def _write(config: ExportConfig, policy: ExportablePolicy, folder: Path, out: Path) -> None:
    settings, document = read_skips(folder)
    with closing(load_dysl(policy, folder)) as dysl:
        heads = dysl.heads
    heads.requires_grad_(False)
    trained = {**policy.provenance, "skipping": document.get("provenance")}
    example = _example(policy, next(iter(provenance.known_instructions(trained)), "do it"))
    with tqdm(total=4, desc="exporting", unit="part") as progress:
        _write_encoder(policy, example, out)
        progress.update()
        if isinstance(policy, FlowPolicy):
            _write_flow(policy, settings.plan, heads, example, out)
        elif config.prune:
            _write_pruned_backbone(policy, settings.plan, heads, example, out)
        else:
            _write_backbone(policy, settings.plan, heads, example, out)
        progress.update()
        if config.precision == "int8":
            for name in GRAPHS:
                if (out / name).exists():
                    quantize(out / name)
        progress.update()
        write_text(out / TOKENIZER, policy.tokenizer.to_str())
        write_json(out / DOCUMENT, _document(config, policy, settings, trained, str(example[TASK_KEY])))
        answers = _answers(policy, settings.plan, heads, example)
        if config.precision != "fp32":  # what this bundle computes here is what it must compute elsewhere
            exact, answers = answers, _own_answers(config, out, example, policy, settings.plan)
            names = ["skipping"] if config.prune else list(exact)
            distances = [float(np.abs(answers[name] - exact[name]).max()) for name in names]
            print(f"{config.precision}: actions differ from PyTorch's by at most {max(distances):.2g} deviations.")
        if config.prune:
            del answers["full"]
        with atomic_write(out / EXAMPLE) as temporary, temporary.open("wb") as file:
            np.savez(file, **example, **answers)
        write_json(out / MANIFEST, {name: sha256(out / name) for name in _files(out)})
        progress.update()


def _write_encoder(policy: ExportablePolicy, example: dict[str, NDArray[Any]], out: Path) -> None:
    """Write the graph from images, state and token ids to the decoder's arguments."""
    arguments = _encoder_arguments(policy, example)
    names = [*(IMAGE_PREFIX + camera for camera in arguments[0]), STATE_KEY, "token_ids"]
    module = PrefixEncoder(policy) if isinstance(policy, FlowPolicy) else _Encoder(policy)
    write_graph(module, arguments, (names, list(_inputs(policy, example))), out / ENCODER)


def _write_backbone(
    policy: ExportablePolicy, plan: SkipPlan, heads: SkipHeads, example: dict[str, NDArray[Any]], out: Path
) -> None:
    """Write the graph of the decoder with adapters, controllers and the action head."""
    inputs = _inputs(policy, example)
    decoder = ConditionalDecoder(policy.backbone, plan, heads, _Decode(policy))
    arguments = (inputs, *_passing(plan))
    names = [*inputs, *PASSING], ["actions", *DECIDED]
    write_graph(decoder, arguments, names, out / BACKBONE, has_conditions=True)


def _passing(plan: SkipPlan) -> tuple[Tensor, Tensor, Tensor]:
    """Return what a pass gets beside the policy's inputs, `PASSING`."""
    return torch.zeros(len(plan.blocks), dtype=torch.int64), torch.tensor(0.0), torch.tensor(0)


def _write_flow(
    policy: FlowPolicy, plan: SkipPlan, heads: SkipHeads, example: dict[str, NDArray[Any]], out: Path
) -> None:
    """Write the graph of the prefix's decoder with adapters and controllers, and that of one denoising step."""
    inputs = _inputs(cast("ExportablePolicy", policy), example)
    read = {name: inputs[name] for name in (STATE, SEEN)}
    decoder_inputs = {name: value for name, value in inputs.items() if name != STATE}
    prefix = ConditionalPrefix(policy, plan, heads)
    pair_names = [f"{kind}_{layer}" for layer in range(plan.num_layers) for kind in ("keys", "values")]
    arguments = (decoder_inputs, *_passing(plan))
    names = [*decoder_inputs, *PASSING], [*pair_names, *DECIDED]
    write_graph(prefix, arguments, names, out / BACKBONE, has_conditions=True)
    shape = policy.expert.shape
    pairs = [torch.zeros(1, shape.kv_heads, inputs[EMBEDS].shape[1], shape.head_dim) for _ in pair_names]
    noisy = torch.zeros(1, policy.spec.chunk_length, policy.action_width)
    read = {**read, LEFTS: torch.zeros(len(prefix.exits), dtype=torch.bool)}
    names = [NOISY, TIME, *read, *pair_names], [VELOCITY]
    step = ConditionalVelocity(policy, plan, heads)
    write_graph(step, (noisy, torch.ones(1), read, pairs), names, out / EXPERT, has_conditions=True)


def _write_pruned_backbone(
    policy: ExportablePolicy, plan: SkipPlan, heads: SkipHeads, example: dict[str, NDArray[Any]], out: Path
) -> None:
    """Write the graph of the decoder's shortest path with its adapters, and the action head."""
    inputs = _inputs(policy, example)
    pruned = PrunedDecoder(policy.backbone, plan, heads, _Decode(policy))
    write_graph(pruned, (inputs,), (list(inputs), ["actions"]), out / BACKBONE)


def _encoder_arguments(
    policy: ExportablePolicy, example: dict[str, NDArray[Any]]
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    images = {camera: torch.from_numpy(view[None]) for camera, view in _views(policy, example).items()}
    token_ids = torch.tensor([policy.token_ids(str(example[TASK_KEY]))])
    return images, torch.from_numpy(example[STATE_KEY][None]), token_ids


@torch.no_grad()
def _inputs(policy: ExportablePolicy, example: dict[str, NDArray[Any]]) -> dict[str, Tensor]:
    """Compute what the encoder's graph answers for the example."""
    arguments = _encoder_arguments(policy, example)
    return PrefixEncoder(policy)(*arguments) if isinstance(policy, FlowPolicy) else policy.inputs(*arguments)


def _document(
    config: ExportConfig, policy: ExportablePolicy, settings: SkipSettings, trained: dict[str, Any], instruction: str
) -> dict[str, Any]:
    """Return the content of the bundle's config.json."""
    instructions = [*provenance.known_instructions(trained), instruction]
    token_ids = {text: policy.token_ids(text) for text in [*instructions, *OTHER_INSTRUCTIONS]}
    suffix = str(getattr(policy, "instruction_suffix", ""))
    return {
        "policy_type": POLICY_TYPE,
        "format": FORMAT,
        "precision": config.precision,
        "spec": asdict(policy.spec),
        "resizes": policy.resizes,
        "crops": policy.crops,
        "instructions": {text: token_ids[text] for text in instructions},
        "takes_other_instructions": all(
            policy.tokenizer.encode(with_suffix(text, suffix)).ids == list(ids) for text, ids in token_ids.items()
        ),
        "skipping": {
            "plan": asdict(settings.plan),
            "statistics": asdict(settings.statistics),
            "lookahead": settings.lookahead,
            "importance": settings.importance,
            "skip": settings.skip if config.skip is None else config.skip,
            "is_pruned": config.prune,
        },
        "denoising": {"steps": policy.steps, "width": policy.action_width} if isinstance(policy, FlowPolicy) else None,
        "instruction_suffix": suffix,
        "provenance": {
            **trained,
            "export": {
                **provenance.record(),
                "policy": policy.fingerprint,
                "config": json.loads(json.dumps(asdict(config), default=str)),
            },
        },
    }


def robot_to_try(bundle: Path) -> str:
    """Return `dysl control --robot`'s value for a bundle: where its policy was trained, simulated, or a real arm."""
    try:
        suite, tasks = provenance.training_suite(read_json(bundle / DOCUMENT)["provenance"])
    except ConfigError:  # trained on data that name no suite: a real arm's
        return "lerobot:FILE.json --instruction TEXT"
    suite, _, arm = suite.partition("@")
    family = suite if suite.startswith("libero-") else suite.partition("-")[0]  # whose suites share names of tasks
    return f"mujoco:{family}-{(tasks or '').partition(',')[0]}" + (f"@{arm}" if arm else "")


def _example(policy: ExportablePolicy, instruction: str) -> dict[str, NDArray[Any]]:
    """Return an observation with noise in every pixel, which is the same each time."""
    rng = np.random.default_rng(0)
    spec = policy.spec
    return {
        **{
            IMAGE_PREFIX + camera: rng.integers(0, 256, (height, width, 3), np.uint8)
            for camera, (height, width) in spec.cameras.items()
        },
        STATE_KEY: spec.state_normalisation.undo(rng.normal(size=len(spec.state_names)).astype(np.float32)),
        TASK_KEY: np.array(instruction),
    }


def _views(policy: ExportablePolicy, example: dict[str, NDArray[Any]]) -> dict[str, NDArray[np.uint8]]:
    """Return the part of the example's images that the encoder gets, resized."""
    return {
        camera: looked_at(example[IMAGE_PREFIX + camera], policy.resizes.get(camera), place)
        for camera, place in policy.crops.items()
    }


@torch.inference_mode()
def _answers(
    policy: ExportablePolicy, plan: SkipPlan, heads: SkipHeads, example: dict[str, NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    """Compute normalised actions, (chunk, action): those of `infer`, with all layers, and with as few as possible."""
    observation = {**example, TASK_KEY: str(example[TASK_KEY])}
    [full] = policy.infer([observation], [policy.reset()])
    skipper = attach(policy.layers, plan, heads, followers=policy.followers)
    backend = TorchBackend(skipper, policy.act, policy.remember, threshold=-1.0)
    inputs = policy.collate(policy.encode([observation], [policy.reset()]))
    skipping = backend.run(inputs, np.zeros((1, len(plan.blocks)), np.int64))
    skipper.detach()
    return {"full": policy.spec.action_normalisation.apply(full.actions), "skipping": skipping.actions[0]}


def _own_answers(
    config: ExportConfig, out: Path, example: dict[str, NDArray[Any]], policy: ExportablePolicy, plan: SkipPlan
) -> dict[str, NDArray[Any]]:
    """Compute what `_answers` does, with the graphs."""
    steps = policy.steps if isinstance(policy, FlowPolicy) else 0
    backend = open_backend(
        out, plan, actions=len(policy.spec.action_names), denoising_steps=steps, is_pruned=config.prune
    )
    encoder = open_graph(out / ENCODER)
    feeds = {
        **{IMAGE_PREFIX + camera: view[None] for camera, view in _views(policy, example).items()},
        STATE_KEY: example[STATE_KEY][None],
        "token_ids": np.array([policy.token_ids(str(example[TASK_KEY]))]),
    }
    names = [node.name for node in encoder.get_outputs()]
    taken = [node.name for node in encoder.get_inputs()]
    encoded = dict(zip(names, encoder.run(None, {name: feeds[name] for name in taken}), strict=True))
    if isinstance(policy, FlowPolicy):
        encoded |= beginning(example, policy.reset(), policy.spec, policy.action_width)
    answers = {}
    for name, threshold in (("full", math.inf), ("skipping", -math.inf)):
        backend.threshold = threshold
        answers[name] = backend.run(encoded, np.zeros((1, len(plan.blocks)), np.int64)).actions[0]
    return answers
