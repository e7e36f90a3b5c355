"""Records what LeRobot computes with the tiny policies of `folders`, and the small files that it writes for them.

It runs where LeRobot is installed, with the transformers that it was written for (lerobot 0.6.1, transformers 5.5.4):

    python record_lerobot.py     in an empty folder; then copy what it wrote, but for the weights, beside this file
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.processor import tokenizer_processor
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    GemmaConfig,
    LlamaConfig,
    PaliGemmaConfig,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
    SmolVLMConfig,
)
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig

sys.path.insert(0, str(Path(__file__).parent))
import folders

VLM = "tiny-vlm"
WIDTH, WORDS = 32, 300


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a few merges."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, special_tokens=["<pad>"])
    tokenizer.train_from_iterator([f"{task}\n" for task in folders.TASKS], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")  # noqa: S106 # it is no password


def features() -> dict[str, Any]:
    """Inputs and outputs of every policy."""
    images = {
        f"observation.images.{name}": PolicyFeature(FeatureType.VISUAL, (3, *size))
        for name, size in folders.CAMERAS.items()
    }
    state = {"observation.state": PolicyFeature(FeatureType.STATE, (folders.STATES,))}
    return {
        "input_features": {**images, **state},
        "output_features": {"action": PolicyFeature(FeatureType.ACTION, (folders.ACTIONS,))},
        "chunk_size": folders.CHUNK,
        "n_action_steps": 4,
        "max_state_dim": 9,
        "max_action_dim": folders.PADDED,
        "device": "cpu",
    }


def make_smolvla() -> tuple[Any, Any]:
    """The policy, and the function that makes its processors."""
    from lerobot.policies.smolvla import smolvlm_with_expert
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
    from lerobot.policies.smolvla.processor_smolvla import make_smolvla_pre_post_processors

    llama = LlamaConfig(
        vocab_size=320,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},  # LeRobot takes 10,000 whatever it says
    )
    vision = SmolVLMVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
    )
    SmolVLMConfig(text_config=llama, vision_config=vision, scale_factor=2).save_pretrained(VLM)
    asked = SimpleNamespace(fake_image_token_id=1, global_image_token_id=2)  # of special tokens that are not used
    processor = SimpleNamespace(tokenizer=asked)
    smolvlm_with_expert.AutoProcessor = SimpleNamespace(from_pretrained=lambda _: processor)
    config = SmolVLAConfig(
        **features(),
        resize_imgs_with_padding=(32, 32),
        vlm_model_name=VLM,
        num_vlm_layers=4,
        self_attn_every_n_layers=2,
        expert_width_multiplier=0.75,
        num_steps=5,
    )
    return SmolVLAPolicy(config).float().eval(), make_smolvla_pre_post_processors


class Fixed:
    """A configuration that keeps some of its sizes, whatever the policy sets them to."""

    @staticmethod
    def keep(config: Any, names: set[str]) -> None:
        """Ignore later changes of some attributes."""
        kind = type(config)

        def assign(self: Any, name: str, value: Any) -> None:
            if name not in names:
                kind.__setattr__(self, name, value)

        object.__setattr__(config, "__class__", type(kind.__name__, (kind,), {"__setattr__": assign}))


def tiny_paligemma() -> PaliGemmaConfig:
    """PaliGemma's configuration, at sizes that LeRobot would overwrite."""
    vision = SiglipVisionConfig(
        hidden_size=72,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=1,
        image_size=28,
        patch_size=14,
        projection_dim=WIDTH,
        vision_use_head=False,
    )
    gemma = GemmaConfig(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=1,
        head_dim=8,
    )
    config = PaliGemmaConfig(vision_config=vision, text_config=gemma, projection_dim=WIDTH)
    Fixed.keep(config.vision_config, {"projection_dim", "intermediate_size"})
    Fixed.keep(config.text_config, {"vocab_size"})
    return config


def make_pi0(kind: str) -> tuple[Any, Any]:
    """The policy pi0 or pi0.5, and the function that makes its processors."""
    if kind == "pi0":
        from lerobot.policies.pi0 import modeling_pi0 as module
        from lerobot.policies.pi0.configuration_pi0 import PI0Config as Config
        from lerobot.policies.pi0.processor_pi0 import make_pi0_pre_post_processors as make

        policy = module.PI0Policy
    else:
        from lerobot.policies.pi05 import modeling_pi05 as module
        from lerobot.policies.pi05.configuration_pi05 import PI05Config as Config
        from lerobot.policies.pi05.processor_pi05 import make_pi05_pre_post_processors as make

        policy = module.PI05Policy
    module.CONFIG_MAPPING = {
        "paligemma": tiny_paligemma,
        "gemma": lambda **sizes: GemmaConfig(**{**sizes, "vocab_size": WORDS}),
    }

    def sizes(variant: str) -> Any:
        width, inside = (WIDTH, 64) if variant == "gemma_2b" else (24, 48)
        return module.GemmaConfig(width=width, depth=4, mlp_dim=inside, num_heads=8, num_kv_heads=1, head_dim=8)

    module.get_gemma_config = sizes
    config = Config(**features(), image_resolution=(28, 28), dtype="float32", num_inference_steps=5, empty_cameras=1)
    return policy(config).eval(), make


def statistics(dimensions: int, seed: int) -> dict[str, np.ndarray]:
    """Statistics of a state or an action."""
    rng = np.random.default_rng(seed)
    values = {
        "mean": rng.normal(size=dimensions),
        "std": rng.uniform(0.5, 2, dimensions),
        "q01": -rng.uniform(1, 2, dimensions),
        "q99": rng.uniform(1, 2, dimensions),
    }
    return {name: value.astype(np.float32) for name, value in values.items()}


def record(kind: str) -> None:
    """Make a policy, save it, and record its actions."""
    policy, make = make_smolvla() if kind == "smolvla" else make_pi0(kind)
    out = Path(kind)
    policy.save_pretrained(out)
    from safetensors.numpy import load_file

    shapes = {name: list(value.shape) for name, value in load_file(out / "model.safetensors").items()}
    weights = {name: torch.from_numpy(value) for name, value in folders.random_weights(shapes).items()}
    missing, unexpected = policy.load_state_dict(weights, strict=False)
    assert not unexpected, unexpected
    if kind != "smolvla":
        policy.model.paligemma_with_expert.paligemma.tie_weights()
    print(kind, "not in the file:", missing)
    stats = {
        "observation.state": statistics(folders.STATES, 1),
        "action": statistics(folders.ACTIONS, 2),
    }
    before, after = make(policy.config, stats)
    before.save_pretrained(out)
    after.save_pretrained(out)
    sample, actions = policy.model.sample_actions, []
    for number in range(folders.OBSERVATIONS):
        given = folders.observation(number)
        noise = torch.from_numpy(given.pop("noise"))[None]
        policy.model.sample_actions = lambda *args, n=noise, **named: sample(*args, **{**named, "noise": n})
        tensors = {name: torch.from_numpy(value) for name, value in given.items() if name != "task"}
        batch = {
            name: value.permute(2, 0, 1).float() / 255 if "images" in name else value for name, value in tensors.items()
        }
        with torch.no_grad():
            answer = policy.predict_action_chunk(before({**batch, "task": given["task"]}))
        actions.append(after(answer)[0].numpy())
    np.save(out / "actions.npy", np.stack(actions).astype(np.float32))
    (out / "tensors.json").write_text(json.dumps(shapes))


if __name__ == "__main__":
    words = make_tokenizer()
    words.save_pretrained(VLM)
    tokenizer_processor.AutoTokenizer = SimpleNamespace(from_pretrained=lambda *_, **__: words)
    for each in folders.KINDS:
        record(each)
