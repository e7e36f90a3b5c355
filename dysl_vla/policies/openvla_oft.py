"""OpenVLA-OFT (Kim et al. 2025, "Fine-Tuning Vision-Language-Action Models"), read from the checkpoints on the hub.

Two vision transformers encode each camera's image, a projector makes 256 tokens of it, and one more token is
proprioception. An unmodified Hugging Face `LlamaModel` with attention in both directions reads them, the instruction
and one empty placeholder for each number of the chunk; a head maps the placeholders' hidden states to the actions.

A checkpoint is a folder as the authors publish it:

    config.json, model-*.safetensors, model.safetensors.index.json
    action_head--N_checkpoint.pt, proprio_projector--N_checkpoint.pt   of training step N
    dataset_statistics.json                                           quantiles of states and actions
    preprocessor_config.json, tokenizer.json

What it stores nowhere is an option with LIBERO's value as its default; see `OpenVLAOptions`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from dysl_vla.checkpoint import CONFIG, TOKENIZER, WEIGHTS, canonical, read_document
from dysl_vla.errors import CheckpointError, ConfigError
from dysl_vla.policies.backbone import EMBEDS, BackbonePolicy
from dysl_vla.policies.base import policies
from dysl_vla.policies.base_reference import Base, find_base, save_reference
from dysl_vla.policies.compute import ComputeConfig, check_device_memory
from dysl_vla.policies.openvla_images import prepared
from dysl_vla.policies.vit import VisionShape, VisionTransformer, count_layers
from dysl_vla.types import IMAGE_PREFIX, STATE_KEY, TASK_KEY, EpisodeState, Normalisation, Observation, PolicySpec

POLICY_TYPE = "openvla-oft"
INDEX, STATISTICS, PREPROCESSOR = (
    "model.safetensors.index.json",
    "dataset_statistics.json",
    "preprocessor_config.json",
)
PROMPT = "In: What action should the robot take to {}?\nOut:"
BEGIN, END, EMPTY = 1, 2, 29871
"""Tokens of Llama 2: the first of a prompt, the last of a sequence, and "▁", which ends every prompt."""
CAMERAS = ("agentview", "robot0_eye_in_hand")
STATE_NAMES = ("x", "y", "z", "rx", "ry", "rz", "finger_left", "finger_right")
ACTION_NAMES = ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper")
VISION_HEADS = {"vit_large_patch14_reg4_dinov2": 16, "vit_so400m_patch14_siglip_224": 16}
"""Name of a vision transformer in timm to its number of attention heads, which its tensors do not tell."""


@dataclass(frozen=True)
class OpenVLAOptions:
    """What a checkpoint of OpenVLA-OFT stores nowhere. The defaults are those of the authors' evaluation in LIBERO.

    Raises:
        ConfigError: A value is out of range; the message names the option.
    """

    chunk_length: int = 8
    """Number of actions that an inference predicts."""
    num_images: int = 2
    """Number of cameras."""
    cameras: str = ""
    """Names of the cameras, separated by commas, the first one being outside of the robot."""
    image_size: int = 256
    """Pixels on each side of a camera's image, as the environment renders it."""
    norm_stats: str = ""
    """Data set, by its key in dataset_statistics.json, whose states and actions the robot has."""
    use_proprio: bool = True
    """Whether the policy was trained with proprioception."""
    execute_steps: int = 8
    """Number of actions that are executed before the next inference."""
    rate_hz: float = 20.0
    """Actions a second."""

    def __post_init__(self) -> None:
        for name in ("chunk_length", "num_images", "image_size", "execute_steps", "rate_hz"):
            if not 0 < getattr(self, name) < 10_000:
                raise ConfigError(f"{name} must be from 1 to 9999, got {getattr(self, name)}.")
        if self.execute_steps > self.chunk_length:
            raise ConfigError(
                f"execute_steps must be at most the chunk_length of {self.chunk_length}, got {self.execute_steps}."
            )
        if len(set(self.camera_names)) != self.num_images:
            raise ConfigError(
                f"num_images must be the number of cameras ({', '.join(self.camera_names)}), got {self.num_images}; "
                "name them by the option cameras=NAME,NAME."
            )

    @property
    def camera_names(self) -> tuple[str, ...]:
        """Return the names of the cameras, in the order in which the policy was trained on them."""
        return tuple(self.cameras.split(",")) if self.cameras else CAMERAS[: self.num_images]

    @classmethod
    def parse(cls, options: Mapping[str, str]) -> OpenVLAOptions:
        """Make options from texts.

        Raises:
            ConfigError: A name is unknown, or a value is out of range; the message names it.
        """
        kinds = {field.name: type(field.default) for field in fields(cls)}
        values: dict[str, Any] = {}
        for name, text in options.items():
            if name not in kinds:
                raise ConfigError(f"policy_options must be among {', '.join(kinds)} and base, got {name!r}.")
            kind = kinds[name]
            if kind is bool and text not in ("true", "false"):
                raise ConfigError(f"{name} must be true or false, got {text!r}.")
            try:
                values[name] = text == "true" if kind is bool else kind(text)
            except ValueError as error:
                wanted = "an integer" if kind is int else "a number"
                raise ConfigError(f"{name} must be {wanted}, got {text!r}.") from error
        if "chunk_length" in values and "execute_steps" not in values:
            values["execute_steps"] = min(values["chunk_length"], cls.execute_steps)
        return cls(**values)


class Perceptron(nn.Module):
    """Linear layers `fc1`, `fc2` and so on, with an exact GELU between them."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.depth = len(widths) - 1
        for index in range(self.depth):
            self.add_module(f"fc{index + 1}", nn.Linear(widths[index], widths[index + 1]))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., first width) to (..., last width)."""
        for index in range(self.depth):
            x = getattr(self, f"fc{index + 1}")(functional.gelu(x) if index else x)
        return x


class ResidualBlock(nn.Module):
    """One block of the action head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., width) to the same shape."""
        return x + self.ffn(x)  # type: ignore[no-any-return]


class ResidualPerceptron(nn.Module):
    """The action head, which maps the hidden states of one action's placeholders, side by side, to the action."""

    def __init__(self, inputs: int, width: int, outputs: int, blocks: int) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(inputs)
        self.fc1 = nn.Linear(inputs, width)
        self.mlp_resnet_blocks = nn.Sequential(*(ResidualBlock(width) for _ in range(blocks)))
        self.layer_norm2 = nn.LayerNorm(width)
        self.fc2 = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., inputs) to (..., outputs)."""
        x = self.mlp_resnet_blocks(functional.relu(self.fc1(self.layer_norm1(x))))
        return self.fc2(self.layer_norm2(x))  # type: ignore[no-any-return]


class OpenVLAOFT(BackbonePolicy, nn.Module):
    """The policy that this module describes, as a `SkippablePolicy`.

    Args:
        vision: The vision transformers, of DINOv2 first, then of SigLIP.
        llama: Configuration of the decoder.
        head: Width of the action head, and its number of residual blocks.
        spec: Cameras, state, actions, their normalisation, rate and chunk.
        use_proprio: Whether proprioception is a token.
        pixel_means: Mean of the three colours, from 0 to 1, for each vision transformer.
        pixel_deviations: Their standard deviations.
        tokenizer: The tokenizer of instructions.
    """

    takes_compute = True
    backbone: LlamaModel
    base: Base
    files_dtype: torch.dtype

    def __init__(
        self,
        vision: Sequence[VisionShape],
        llama: LlamaConfig,
        head: tuple[int, int],
        spec: PolicySpec,
        *,
        use_proprio: bool,
        pixel_means: Sequence[Sequence[float]],
        pixel_deviations: Sequence[Sequence[float]],
        tokenizer: Tokenizer,
    ) -> None:
        super().__init__()
        hidden, self.actions = int(llama.hidden_size), len(spec.action_names)
        widths = sum(shape.width for shape in vision)
        self.vision = nn.ModuleList(VisionTransformer(shape) for shape in vision)
        self.projector = Perceptron(widths, 4 * widths, hidden, hidden)
        self.proprio_projector = Perceptron(len(spec.state_names), hidden, hidden) if use_proprio else None
        self.backbone = LlamaModel(llama)
        self.head = ResidualPerceptron(hidden * self.actions, head[0], self.actions, head[1])
        self.spec = spec
        self.image_size = vision[0].image_size
        self.pixel_means, self.pixel_deviations = pixel_means, pixel_deviations
        self.tokenizer = tokenizer
        self.provenance: dict[str, Any] = {}
        self._token_ids: dict[str, list[int]] = {}

    def encode(self, observations: Sequence[Observation], states: Sequence[EpisodeState]) -> list[dict[str, Tensor]]:
        """Compute everything before the decoder; see `SkippablePolicy.encode`."""
        for observation in observations:
            self.spec.check_observation(observation)
        images = [
            prepared(observation[IMAGE_PREFIX + camera], self.image_size)
            for observation in observations
            for camera in self.spec.cameras
        ]
        seen = self.projector(self.see(torch.from_numpy(np.stack(images))))
        seen = seen.reshape(len(observations), -1, seen.shape[-1])
        if self.proprio_projector is not None:
            state = np.stack([observation[STATE_KEY] for observation in observations]).astype(np.float32)
            state = np.clip(self.spec.state_normalisation.apply(state), -1, 1)
            proprio = self.proprio_projector(torch.from_numpy(state).to(seen))
            seen = torch.cat([seen, proprio[:, None]], dim=1)
        return [{EMBEDS: self._sequence(o[TASK_KEY], row)} for o, row in zip(observations, seen, strict=True)]

    def see(self, images: Tensor) -> Tensor:
        """Encode prepared images, (images, size, size, 3) uint8, to (images, patches, both widths)."""
        weight = self.head.fc2.weight
        pixels = images.to(weight.device).permute(0, 3, 1, 2).float() / 255
        views = []
        for transformer, mean, deviation in zip(self.vision, self.pixel_means, self.pixel_deviations, strict=True):
            normalised = (pixels - _channels(mean, pixels)) / _channels(deviation, pixels)
            views.append(transformer(normalised.to(weight.dtype)))
        return torch.cat(views, dim=2)

    def _sequence(self, instruction: str, seen: Tensor) -> Tensor:
        """Combine an instruction and what was seen, (tokens, hidden), to the decoder's input, (tokens, hidden)."""
        ids = torch.tensor([*self.token_ids(instruction), END], device=seen.device)
        words = self.backbone.embed_tokens(ids)
        placeholders = seen.new_zeros((self.spec.chunk_length * self.actions, seen.shape[-1]))
        return torch.cat([words[:1], seen, words[1:-1], placeholders, words[-1:]])

    def token_ids(self, instruction: str) -> list[int]:
        """Return the token ids of the prompt with an instruction."""
        if instruction not in self._token_ids:
            if len(self._token_ids) > 1000:
                self._token_ids.clear()
            ids = self.tokenizer.encode(PROMPT.format(instruction.lower())).ids
            ids = ids if ids[:1] == [BEGIN] else [BEGIN, *ids]
            self._token_ids[instruction] = ids if ids[-1] == EMPTY else [*ids, EMPTY]
        return self._token_ids[instruction]

    def decode(self, hidden: Tensor) -> Tensor:
        """Map the backbone's output, (batch, tokens, hidden), to normalised actions, (batch, chunk, action), in float32.

        The reference was trained to read each number one token before its placeholder, from the prompt's last token on.
        The head's gripper is 1 to open and 0 to close; LIBERO's is -1 and 1.
        """
        count = self.spec.chunk_length * self.actions
        read = hidden[:, -count - 2 : -2].reshape(len(hidden), self.spec.chunk_length, -1)
        actions = self.head(read).float()
        return torch.cat([actions[..., :-1], 1 - 2 * actions[..., -1:]], dim=-1)

    @property
    def fingerprint(self) -> str:
        """Return a digest of the checkpoint's files, the options and the type of numbers."""
        return self._fingerprint(self.head.fc2.weight.dtype)

    @property
    def known_as(self) -> tuple[str, ...]:
        """Return the fingerprint with the checkpoint's own type of numbers, which heads are trained for."""
        return (self._fingerprint(self.files_dtype),)

    def _fingerprint(self, dtype: torch.dtype) -> str:
        options = canonical(OpenVLAOptions.parse(self.base.options))
        return hashlib.sha256(f"{self.base.fingerprint}{options}{dtype}".encode()).hexdigest()

    def save_pretrained(self, folder: Path) -> None:
        """Write a checkpoint that refers to the base's files, which are too large to copy."""
        save_reference(folder, POLICY_TYPE, self.base, self.provenance)

    @classmethod
    def from_pretrained(cls, name: str, compute: ComputeConfig | None = None) -> OpenVLAOFT:
        """Load a checkpoint from a folder or a Hugging Face hub id, or one that refers to it.

        Args:
            name: The checkpoint.
            compute: Device, type of numbers, attention and options. On the device "meta" no weights are read.

        Raises:
            CheckpointError: A file or tensor is missing, damaged or unknown, or the checkpoint is of another kind.
            ConfigError: An option is unknown or does not fit the checkpoint.
        """
        compute = compute or ComputeConfig()
        folder, base = find_base(name, compute.options)
        options = OpenVLAOptions.parse(base.options)
        device = compute.torch_device(is_large=True)
        files = _Files(folder, device, use_proprio=options.use_proprio)
        dtype = compute.torch_dtype() or files.dtype
        with torch.device("meta"):
            policy = _build(cls, files, options, compute.attention)
        policy.to(dtype)
        expected = policy.state_dict()
        files.check(expected)
        size = sum(value.nbytes for value in expected.values())
        check_device_memory(device, size, "the policy's weights", "give --dtype bfloat16, or a larger device")
        if device.type != "meta":
            policy.load_state_dict(dict(files.weights(expected.keys(), dtype)), assign=True)
        with device:
            policy.backbone.rotary_emb = LlamaRotaryEmbedding(policy.backbone.config)  # no checkpoint stores it
        policy.base, policy.files_dtype = base, files.dtype
        return policy.eval()


def _channels(values: Sequence[float], like: Tensor) -> Tensor:
    """Return a value for each colour as a tensor that fits (images, 3, height, width)."""
    return torch.tensor(values, device=like.device)[:, None, None]


class _Files:
    """The files of a checkpoint: the shapes of all tensors at once, the weights as they are asked for.

    Args:
        folder: The folder.
        device: Where the weights go.
        use_proprio: Whether the projector of proprioception belongs to it.

    Raises:
        CheckpointError: A file is missing or damaged, or the checkpoint is of a kind that is not supported.
    """

    UNUSED = re.compile(r"^vision\.\d\.(norm|attn_pool)\.|^language_model\.lm_head\.|rotary_emb\.inv_freq$")

    def __init__(self, folder: Path, device: torch.device, *, use_proprio: bool) -> None:
        self.folder, self.device = folder, device
        self._check_kind()
        self.loose = self._loose("action_head", "head.", "model.")
        if any(name.startswith("head.noise_predictor.") for name in self.loose):
            raise CheckpointError(f"{folder}: its action head is a diffusion model, which is not supported.")
        if use_proprio:
            self.loose |= self._loose("proprio_projector", "proprio_projector.", "")
        self.shards: dict[str, tuple[Path, str]] = {}
        self.shapes = {name: tuple(value.shape) for name, value in self.loose.items()}
        for path in self._shard_paths():
            try:
                with safe_open(path, framework="pt") as file:
                    for key in file.keys():  # noqa: SIM118 # it is no mapping
                        name = _renamed(key)
                        self.shards[name] = (path, key)
                        self.shapes[name] = tuple(file.get_slice(key).get_shape())
            except (SafetensorError, OSError, ValueError) as error:
                raise CheckpointError(f"{path}: is missing or damaged ({error}); get it again.") from error
        if film := [name for name in self.shapes if re.match(r"vision.*\.(scale|shift)\.", name)]:
            raise CheckpointError(f"{folder}: has FiLM layers ({film[0]}), which are not supported.")

    def _check_kind(self) -> None:
        """Refuse, by name, what the authors' code can train but this policy is not."""
        for pattern, what in (
            ("vision_backbone--*", "is a checkpoint with FiLM, language in the vision transformers"),
            ("noisy_action_projector--*", "is a checkpoint with a diffusion head"),
        ):
            if found := sorted(self.folder.glob(pattern)):
                raise CheckpointError(f"{self.folder}: {what} ({found[0].name}), which is not supported.")

    def _loose(self, part: str, prefix: str, old_prefix: str) -> dict[str, Tensor]:
        """Read a part that is kept beside the shards, by its tensors' names in the policy."""
        found = sorted(self.folder.glob(f"{part}--*_checkpoint.pt"))
        if not found:
            what = {
                "action_head": "which maps hidden states to continuous actions; the original OpenVLA, whose actions are "
                "tokens, has none and is not supported. Get the file, or take a checkpoint of OpenVLA-OFT",
                "proprio_projector": "which makes a token of the robot's state. Get the file, or, if the policy was "
                "trained without, give --policy-options use_proprio=false",
            }[part]
            raise CheckpointError(f"{self.folder}: there is no {part}--N_checkpoint.pt, {what}.")
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise CheckpointError(
                f"{self.folder}: must have one {part}, got {names}; keep the one of the shards' step."
            )
        try:
            tensors = torch.load(found[0], map_location=self.device, weights_only=True)
            values = {key.removeprefix("module.").removeprefix(old_prefix): value for key, value in tensors.items()}
            if not all(isinstance(value, Tensor) for value in values.values()):
                raise ValueError("it holds other things than tensors")
        except UnpicklingError as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(
                f"{found[0]}: needs pickle, which could run any program and is never used; save its state_dict ({reason})."
            ) from error
        except Exception as error:  # torch's errors for a damaged file are many
            raise CheckpointError(f"{found[0]}: is damaged ({str(error).splitlines()[0]}); get it again.") from error
        return {prefix + key: value for key, value in values.items()}

    def _shard_paths(self) -> list[Path]:
        if not (self.folder / INDEX).is_file():
            return [self.folder / WEIGHTS]
        places = read_document(self.folder / INDEX).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise CheckpointError(f"{self.folder / INDEX}: field 'weight_map' is missing; get the checkpoint again.")
        return [self.folder / name for name in sorted(set(places.values()))]

    @property
    def dtype(self) -> torch.dtype:
        """Return the type of numbers of the files."""
        path, key = self.shards[self.required("backbone.norm.weight")]
        with safe_open(path, framework="pt") as file:
            dtype: torch.dtype = file.get_tensor(key).dtype
        return dtype

    def required(self, name: str) -> str:
        """Return a tensor's name, which must be there.

        Raises:
            CheckpointError: It is missing.
        """
        if name not in self.shapes:
            raise CheckpointError(f"{self.folder}: there is no tensor {name!r}; get the checkpoint again.")
        return name

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape.

        Raises:
            CheckpointError: It is missing.
        """
        return self.shapes[self.required(name)]

    def check(self, expected: Mapping[str, Tensor]) -> None:
        """Compare the files' tensors with those of the policy.

        Raises:
            CheckpointError: One is missing, unknown, or of another shape.
        """
        for name, value in expected.items():
            if self.shapes[self.required(name)] != tuple(value.shape):
                raise CheckpointError(
                    f"{self.folder}: {name} must be {tuple(value.shape)} as in config.json, got {self.shapes[name]}."
                )
        for name in self.shapes:
            if name not in expected and not self._is_unused(name):
                raise CheckpointError(f"{self.folder}: has an unknown tensor {name!r}; take another checkpoint.")

    def _is_unused(self, name: str) -> bool:
        """Tell whether a tensor belongs to the part of a model that the policy does not need."""
        if match := re.match(r"(vision\.\d\.)blocks\.(\d+)\.", name):
            return (
                int(match[2]) == count_layers(self.shapes, match[1]) - 1
            )  # the states before the last layer are taken
        return bool(self.UNUSED.search(name))

    def weights(self, names: Collection[str], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Yield tensors, one after the other, on the device and as a type of numbers."""
        for name in list(self.loose):
            yield name, self.loose.pop(name).to(self.device, dtype)
        for path in sorted({path for path, _ in self.shards.values()}):
            with safe_open(path, framework="pt") as file:
                for name, (place, key) in self.shards.items():
                    if place == path and name in names:
                        yield name, file.get_tensor(key).to(self.device, dtype)


def _renamed(key: str) -> str:
    """Return a shard's tensor's name in the policy."""
    for old, new in (("featurizer", "vision.0"), ("fused_featurizer", "vision.1")):
        key = key.replace(f"vision_backbone.{old}.", f"{new}.")
    return key.replace("language_model.model.", "backbone.")


def _build(cls: type[OpenVLAOFT], files: _Files, options: OpenVLAOptions, attention: str | None) -> OpenVLAOFT:
    """Make a policy of a checkpoint's sizes: those of the decoder stand in config.json, the others in the tensors."""
    path = files.folder / CONFIG
    config = read_document(path)
    blocks = re.compile(r"head\.mlp_resnet_blocks\.(\d+)\.")
    found = [int(match[1]) for match in map(blocks.match, files.shapes) if match]
    head = (files.shape("head.fc1.bias")[0], 1 + max(found, default=-1))
    means, deviations = _pixel_statistics(files.folder)
    try:
        text = {**config["text_config"], "is_causal": False, "use_cache": False}
        llama = LlamaConfig(**text, attn_implementation=attention or "sdpa")
        ids, sizes = config["timm_model_ids"], config["image_sizes"]
        vision = [
            _vision_shape(files, f"vision.{index}.", *pair) for index, pair in enumerate(zip(ids, sizes, strict=True))
        ]
        tokenizer = Tokenizer.from_file(str(files.folder / TOKENIZER))
    except KeyError as error:
        raise CheckpointError(f"{path}: field {error} is missing; get the checkpoint again.") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return cls(
        vision,
        llama,
        head,
        _spec(files.folder, config, options),
        use_proprio=options.use_proprio,
        pixel_means=means,
        pixel_deviations=deviations,
        tokenizer=tokenizer,
    )


def _vision_shape(files: _Files, prefix: str, name: str, image_size: int) -> VisionShape:
    """Return the sizes of a vision transformer, of which all but the last layer is computed."""
    short = name.split(".")[0]
    if short not in VISION_HEADS:
        raise CheckpointError(
            f"{files.folder / CONFIG}: timm_model_ids must be among {', '.join(VISION_HEADS)}, got {name!r}."
        )
    width, _, patch_size, _ = files.shape(f"{prefix}patch_embed.proj.weight")
    registers = f"{prefix}reg_token"
    return VisionShape(
        image_size=image_size,
        patch_size=patch_size,
        width=width,
        layers=count_layers(files.shapes, prefix) - 1,
        heads=VISION_HEADS[short],
        hidden=files.shape(f"{prefix}blocks.0.mlp.fc1.bias")[0],
        registers=files.shape(registers)[1] if registers in files.shapes else None,
        is_scaled=f"{prefix}blocks.0.ls1.scale_factor" in files.shapes,
    )


def _pixel_statistics(folder: Path) -> tuple[list[list[float]], list[list[float]]]:
    """Return mean and deviation of the colours for each vision transformer, as they were rounded in training."""
    document = read_document(folder / PREPROCESSOR)
    try:
        if rounded := document.get("tvf_normalize_params"):
            return [entry["mean"] for entry in rounded], [entry["std"] for entry in rounded]
        return document["means"], document["stds"]
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder / PREPROCESSOR}: field {error} is missing; get the checkpoint again."
        ) from error


def _spec(folder: Path, config: Mapping[str, Any], options: OpenVLAOptions) -> PolicySpec:
    """Return what the policy expects and predicts. Quantiles of the training data are -1 and 1 when normalised.

    Raises:
        ConfigError: The option `norm_stats` names no data set of the checkpoint.
        CheckpointError: The statistics are missing or damaged.
    """
    path = folder / (STATISTICS if (folder / STATISTICS).is_file() else CONFIG)
    every = read_document(path) if path.name == STATISTICS else config.get("norm_stats")
    if not isinstance(every, dict) or not every:
        raise CheckpointError(f"{folder}: there is no {STATISTICS}; get the checkpoint again.")
    key = options.norm_stats or (next(iter(every)) if len(every) == 1 else "")
    if key not in every:
        raise ConfigError(
            f"norm_stats must be one of {', '.join(every)}, got {key!r}; give --policy-options norm_stats=KEY."
        )
    try:
        state = _normalisation(every[key]["proprio"], len(STATE_NAMES))
        action = _normalisation(every[key]["action"], len(ACTION_NAMES))
        # `decode` returns the gripper, g, as 1 - 2 g: LIBERO's is 1 - 2 (s g + m), of which the sign is taken
        mean, std = action.mean[-1], action.std[-1]
        action = Normalisation((*action.mean[:-1], 1 - std - 2 * mean), action.std, signs=(len(ACTION_NAMES) - 1,))
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise CheckpointError(
            f"{path}: {key} must have quantiles of {len(STATE_NAMES)} states and {len(ACTION_NAMES)} actions ({error!r})."
        ) from error
    return PolicySpec(
        cameras=dict.fromkeys(options.camera_names, (options.image_size, options.image_size)),
        state_names=STATE_NAMES,
        action_names=ACTION_NAMES,
        rate_hz=options.rate_hz,
        chunk_length=options.chunk_length,
        execute_steps=options.execute_steps,
        state_normalisation=state,
        action_normalisation=action,
    )


def _normalisation(statistics: Mapping[str, Any], size: int) -> Normalisation:
    """Return the map of the quantiles to -1 and 1; dimensions that are masked out are left alone."""
    low, high = (np.array(statistics[name], np.float64) for name in ("q01", "q99"))
    mask = np.array(statistics.get("mask", [True] * size), bool)
    if not low.shape == high.shape == mask.shape == (size,):
        raise ValueError(f"got {low.size} of {size} dimensions")
    half = (high - low + 1e-8) / 2
    mean, std = np.where(mask, half + low, 0), np.where(mask, half, 1)
    return Normalisation(tuple(map(float, mean)), tuple(map(float, std)))


policies.register(POLICY_TYPE)(OpenVLAOFT)
