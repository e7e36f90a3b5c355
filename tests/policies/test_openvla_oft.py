"""OpenVLA-OFT: it computes what the authors' code computes, and reads their layout or refuses it with the reason."""

from __future__ import annotations

import ctypes
import gc
import json
import shutil
import socket
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dysl_vla.errors import CheckpointError, ConfigError, DyslError, ObservationError
from dysl_vla.policies import ComputeConfig, load_policy, load_variants, names_of
from dysl_vla.policies.dysl import DyslPolicy, SkipSettings
from dysl_vla.policies.openvla_images import prepared
from dysl_vla.policies.openvla_oft import OpenVLAOFT
from dysl_vla.skip_controller import HeadsConfig, SkipHeads, SkipPlan
from dysl_vla.skip_controller.operating import SkipStatistics
from tests.policies.openvla_folder import INSTRUCTIONS, Geometry, make_observation, write_openvla_folder

GOLDEN = json.loads(Path(__file__).with_name("openvla_golden.json").read_text(encoding="utf-8"))
SHARD = "model-00001-of-00002.safetensors"
HEAD, PROPRIO = "action_head--150000_checkpoint.pt", "proprio_projector--150000_checkpoint.pt"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint in bfloat16, as the public ones are."""
    return write_openvla_folder(tmp_path_factory.mktemp("openvla"))


@pytest.fixture(scope="module")
def policy(folder: Path) -> OpenVLAOFT:
    """It, in single precision."""
    return load(folder, dtype="float32")


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def load(folder: Path, *options: str, **compute: Any) -> OpenVLAOFT:
    policy = load_policy(str(folder), compute=ComputeConfig(**compute, policy_options=options))
    assert isinstance(policy, OpenVLAOFT)
    return policy


def infer(policy: Any, *observations: dict[str, Any]) -> np.ndarray[Any, Any]:
    chunks = policy.infer(observations, [policy.reset() for _ in observations])
    return np.stack([chunk.actions for chunk in chunks])


def relative(found: Any, wanted: Any) -> float:
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def test_each_part_and_all_actions_are_the_references(tmp_path: Path) -> None:
    policy = load(write_openvla_folder(tmp_path, image_size=224, dtype=torch.float32))
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: seen.__setitem__(name, output)

    for index in (0, 1):
        policy.vision[index].register_forward_hook(
            lambda module, inputs, output, index=index: seen.__setitem__(f"pixels{index}", inputs[0])
        )
    for name in ("projector", "proprio_projector", "head"):
        getattr(policy, name).register_forward_hook(keep(name))
    policy.projector.register_forward_pre_hook(lambda module, inputs: seen.__setitem__("vision", inputs[0]))
    policy.backbone.norm.register_forward_hook(keep("llm"))
    for number, wanted in enumerate(GOLDEN["actions"]):
        [actions] = infer(policy, make_observation(0, number))
        assert relative(actions.reshape(-1), wanted) <= 1e-4
        np.testing.assert_array_equal(actions[:, 6], wanted[6::7])
        pixels = torch.cat([seen["pixels0"], seen["pixels1"]], dim=1).numpy()  # to the bit
        assert zlib.crc32(np.ascontiguousarray(pixels).tobytes()) == GOLDEN["pixels"][number]
        if number < 2:
            seen["proprio"] = seen["proprio_projector"]
            for name, samples in GOLDEN["parts"].items():
                values = seen[name].reshape(-1)
                places = np.linspace(0, len(values) - 1, len(samples[number])).astype(int)
                assert relative(values[places], samples[number]) <= 1e-5, name


def test_an_image_of_the_transformers_size_is_cropped_only() -> None:
    image = make_observation(0, 3, size=56)["observation.images.agentview"]
    np.testing.assert_array_equal(prepared(np.full_like(image, 7), 56), np.full_like(image, 7))
    assert np.abs(prepared(image, 56).astype(int)[28, 28] - image[28, 28]).max() < 40  # the centre stays


def test_a_row_alone_is_the_row_in_a_batch_of_other_prompt_lengths(policy: OpenVLAOFT) -> None:
    rows = [make_observation(1, number) for number in range(4)]
    assert len({len(policy.token_ids(text)) for text in INSTRUCTIONS}) == 3
    alone = np.concatenate([infer(policy, row) for row in rows])
    np.testing.assert_allclose(infer(policy, *rows), alone, atol=1e-5)


def test_every_token_attends_to_every_other_one(policy: OpenVLAOFT) -> None:
    [item] = policy.encode([make_observation(0, 0)], [policy.reset()])
    changed = item["inputs_embeds"].clone()
    changed[-1] += 1
    one, other = (policy.backbone(inputs_embeds=e[None]).last_hidden_state[0, 0] for e in (changed, *item.values()))
    assert (one - other).abs().max() > 1e-4


def test_prompts_are_in_lower_case_and_end_in_the_empty_token(policy: OpenVLAOFT) -> None:
    ids = policy.token_ids("Open the Drawer")
    assert ids == policy.token_ids("open the drawer")
    assert ids[0] == 1
    assert ids[-1] == 29871
    assert ids.count(1) == 1


def dysl(policy: OpenVLAOFT, skip: float) -> DyslPolicy:
    plan = SkipPlan(8, (0, 1, 7))
    torch.manual_seed(0)
    heads = SkipHeads(plan, HeadsConfig(64, adapter_size=4, controller_size=4)).to(torch.bfloat16)
    for parameter in heads.parameters():
        nn.init.normal_(parameter, std=0.3)
    statistics = SkipStatistics((0.0, 0.5, 1.0), (0.1, 0.2, 0.3), (-0.1, 0.05, 0.1))
    settings = SkipSettings(plan, heads.config, policy.fingerprint, 7, statistics, 1, skip=0.9, mean_layers=4.5)
    return DyslPolicy(policy, heads.eval(), settings, skip=skip)


def test_where_all_layers_run_and_where_it_is_verified_the_actions_are_the_full_models(folder: Path) -> None:
    rows = [make_observation(0, number) for number in range(3)]
    full = infer(load(folder), *rows)
    running = dysl(load(folder), 0.5)
    running._step._guidance.observe = lambda memory, _: memory.allow_points.fill(99)  # type: ignore[method-assign]
    np.testing.assert_array_equal(infer(running, *rows), full)
    verified = dysl(load(folder), 1.0)
    verified._guidance.update_and_check = lambda *_: True  # type: ignore[method-assign]
    chunks = verified.infer(rows, [verified.reset() for _ in rows])
    assert all(chunk.skips and chunk.skips.is_verified and not chunk.skips.layers_run.all() for chunk in chunks)
    np.testing.assert_array_equal(np.stack([chunk.actions for chunk in chunks]), full)


def test_its_type_of_numbers_is_the_checkpoints_or_the_wanted_one(folder: Path, policy: OpenVLAOFT) -> None:
    coarse = load(folder)
    assert {value.dtype for value in coarse.state_dict().values()} == {torch.bfloat16}
    assert coarse.backbone.rotary_emb.inv_freq.dtype == torch.float32
    exact, rounded = infer(policy, make_observation(0, 0)), infer(coarse, make_observation(0, 0))
    assert 0 < relative(rounded[..., :6], exact[..., :6]) < 0.05
    assert policy.fingerprint != coarse.fingerprint
    assert coarse.fingerprint in names_of(policy)


def test_attention_may_be_computed_otherwise(folder: Path, policy: OpenVLAOFT) -> None:
    eager = load(folder, dtype="float32", attention="eager")
    assert eager.backbone.config._attn_implementation == "eager"
    row = make_observation(0, 0)
    np.testing.assert_allclose(infer(eager, row), infer(policy, row), atol=1e-4)
    with pytest.raises(ConfigError, match="attention must be one that transformers offers here, got 'none'"):
        load(folder, attention="none")


def test_variants_share_one_copy_of_the_weights(folder: Path) -> None:
    one, other = load_variants(str(folder), [(0, None), (0, None)])
    assert isinstance(one, OpenVLAOFT)
    assert isinstance(other, OpenVLAOFT)
    assert one.head.fc2.weight is other.head.fc2.weight
    np.testing.assert_array_equal(infer(one, make_observation(0, 0)), infer(other, make_observation(0, 0)))


def test_on_the_meta_device_no_weights_are_read(folder: Path, policy: OpenVLAOFT) -> None:
    planned = load(folder, device="meta")
    assert {value.device.type for value in planned.state_dict().values()} == {"meta"}
    shapes = {name: value.shape for name, value in policy.state_dict().items()}
    assert {name: value.shape for name, value in planned.state_dict().items()} == shapes


def test_a_saved_policy_refers_to_its_base(folder: Path, tmp_path: Path) -> None:
    policy = load(folder, "chunk_length=5", "rate_hz=10")
    policy.save_pretrained(tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 10_000
    again = load(tmp_path)
    assert again.spec == policy.spec
    assert again.spec.chunk_length == again.spec.execute_steps == 5
    assert again.fingerprint == policy.fingerprint != load(folder).fingerprint
    assert again.provenance == policy.provenance
    assert again.provenance["base"]["name"] == str(folder)


def test_options_say_what_the_checkpoint_does_not(folder: Path) -> None:
    policy = load(folder, "cameras=front,left,wrist", "image_size=64", "execute_steps=4", "use_proprio=false")
    assert policy.spec.cameras == {"front": (64, 64), "left": (64, 64), "wrist": (64, 64)}
    assert policy.proprio_projector is None
    row = make_observation(0, 0, size=64)
    images = {f"observation.images.{name}": row["observation.images.agentview"] for name in policy.spec.cameras}
    assert infer(policy, {**row, **images}).shape == (1, 8, 7)
    one = load(folder, "num_images=1")
    assert list(one.spec.cameras) == ["agentview"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("norm_stats=libero_10", "norm_stats must be one of libero_spatial_no_noops, got 'libero_10'"),
        ("num_images=3", r"num_images must be the number of cameras \(agentview, robot0_eye_in_hand\), got 3"),
        ("num_images=two", "num_images must be an integer, got 'two'"),
        ("chunk_length=0", "chunk_length must be above 0"),
        ("execute_steps=9", "execute_steps must be at most the chunk_length of 8, got 9"),
        ("rate_hz=nan", "rate_hz must be above 0"),
        ("use_proprio=yes", "use_proprio must be true or false, got 'yes'"),
        ("chunk=8", "policy_options must be among chunk_length, .*, got 'chunk'"),
    ],
)
def test_an_option_that_cannot_be_is_refused(folder: Path, option: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(folder, option)


def test_an_observation_of_another_number_of_images_is_refused(policy: OpenVLAOFT) -> None:
    row = make_observation(0, 0)
    del row["observation.images.robot0_eye_in_hand"]
    with pytest.raises(ObservationError, match=r"observation.images.robot0_eye_in_hand: expected uint8"):
        infer(policy, row)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_shard(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], shard: str = SHARD) -> None:
    tensors = load_file(folder / shard)
    change(tensors)
    save_file(tensors, folder / shard, metadata={"format": "pt"})


EMBED = "vision_backbone.featurizer.pos_embed"
BREAKS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no head": (lambda f: (f / HEAD).unlink(), "has no action_head--N_checkpoint.pt, which maps .*original OpenVLA"),
    "no proprio": (lambda f: (f / PROPRIO).unlink(), "has no proprio_projector--N_.*use_proprio=false"),
    "two heads": (
        lambda f: shutil.copy(f / HEAD, f / "action_head--5_checkpoint.pt"),
        "must have one action_head, got action_head--1500.*, action_head--5_",
    ),
    "pickled head": (lambda f: torch.save({"a": Path("x")}, f / HEAD), "needs pickle, which could run any program"),
    "damaged head": (lambda f: (f / HEAD).write_bytes(b"PK\3\4 no"), f"{HEAD} is damaged"),
    "no tensors": (lambda f: torch.save({"step": 5}, f / HEAD), "is damaged .it holds other things than tensors"),
    "diffusion": (lambda f: torch.save({}, f / "noisy_action_projector--1_checkpoint.pt"), "has a diffusion head"),
    "diffusion head": (
        lambda f: torch.save({"noise_predictor.mlp_resnet.fc1.bias": torch.ones(2)}, f / HEAD),
        r"has a diffusion head \(head.noise_predictor",
    ),
    "film": (lambda f: torch.save({}, f / "vision_backbone--150000_checkpoint.pt"), "has FiLM, which changes"),
    "film tensors": (
        lambda f: change_shard(
            f, lambda t: t.update({"vision_backbone.featurizer.blocks.0.scale.weight": torch.ones(2, 2)})
        ),
        r"has FiLM, which changes .*blocks.0.scale.weight",
    ),
    "missing tensor": (lambda f: change_shard(f, lambda t: t.pop(EMBED)), "must have a tensor 'vision.0.pos_embed'"),
    "missing norm": (
        lambda f: change_shard(f, lambda t: t.pop("language_model.model.norm.weight"), SHARD.replace("1-", "2-")),
        "must have a tensor 'backbone.norm.weight'",
    ),
    "unknown tensor": (
        lambda f: change_shard(f, lambda t: t.update(more=torch.ones(2))),
        "has an unknown tensor 'more'",
    ),
    "other shape": (
        lambda f: change_shard(f, lambda t: t.update({EMBED: torch.ones(1, 9, 64)})),
        r"vision.0.pos_embed must be \(1, 16, 64\), .*got \(1, 9, 64\)",
    ),
    "missing shard": (lambda f: (f / SHARD).unlink(), f"{SHARD} is missing or damaged"),
    "damaged shard": (lambda f: (f / SHARD).write_bytes(b"no"), f"{SHARD} is missing or damaged"),
    "empty index": (
        lambda f: edit(f / "model.safetensors.index.json", weight_map={}),
        "field 'weight_map' is missing",
    ),
    "other transformer": (
        lambda f: edit(f / "config.json", timm_model_ids=["vit_base", "vit_so400m_patch14_siglip_224"]),
        "timm_model_ids must be among .*, got 'vit_base'",
    ),
    "no decoder": (lambda f: edit(f / "config.json", text_config=None), "does not describe an OpenVLA-OFT"),
    "three heads": (
        lambda f: edit(f / "config.json", text_config={"hidden_size": 64, "num_attention_heads": 3}),
        "does not describe an OpenVLA-OFT .*not a multiple of the number of attention heads",
    ),
    "other image size": (
        lambda f: edit(f / "config.json", image_sizes=[70, 70]),
        r"vision.0.pos_embed must be \(1, 25, 64\), as .*, got \(1, 16, 64\)",
    ),
    "text for a size": (lambda f: edit(f / "config.json", image_sizes=["a", "a"]), "does not describe an OpenVLA-OFT"),
    "no statistics": (
        lambda f: (edit(f / "config.json", norm_stats=None), (f / "dataset_statistics.json").unlink()),
        "has no dataset_statistics.json",
    ),
    "seven states": (
        lambda f: edit(
            f / "dataset_statistics.json", libero_spatial_no_noops={"proprio": {"q01": [0.0] * 7, "q99": [1.0] * 7}}
        ),
        "libero_spatial_no_noops must have q01 and q99 of 8 states and 7 actions",
    ),
    "no pixels": (
        lambda f: edit(f / "preprocessor_config.json", tvf_normalize_params=[{}]),
        "normalisation is damaged",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json is missing or damaged"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_folder_that_is_no_checkpoint_of_it_is_refused_with_the_reason(copy: Path, name: str) -> None:
    damage, message = BREAKS[name]
    damage(copy)
    with pytest.raises(CheckpointError, match=message):
        load(copy)


def test_statistics_may_be_in_the_configuration(copy: Path, policy: OpenVLAOFT) -> None:
    every = json.loads((copy / "dataset_statistics.json").read_text())
    edit(copy / "config.json", norm_stats=every | {"other": {}})
    (copy / "dataset_statistics.json").unlink()
    assert load(copy, "norm_stats=libero_spatial_no_noops").spec == policy.spec
    with pytest.raises(ConfigError, match="norm_stats must be one of libero_spatial_no_noops, other, got ''"):
        load(copy)


def test_a_base_that_changed_since_its_heads_were_trained_is_refused(copy: Path, tmp_path: Path) -> None:
    load(copy).save_pretrained(tmp_path / "fast")
    torch.save({"module.fc1.bias": torch.ones(64)}, copy / PROPRIO)
    with pytest.raises(CheckpointError, match=r"the base was changed since the heads in .* were trained"):
        load(tmp_path / "fast")


def test_too_little_memory_is_said_before_weights_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dysl_vla.policies.compute.available_memory", lambda: 1000)
    with pytest.raises(ConfigError, match=r"the policy's weights need .*give --dtype bfloat16"):
        load(folder)


def test_no_gpu_where_one_was_asked_for_is_one_error(folder: Path) -> None:
    with pytest.raises(DyslError, match="device must be one of this machine's, got 'cuda:7'"):
        load(folder, device="cuda:7")


def allocated() -> int:
    """Bytes of memory that this process has now, without those of files, which the system may drop and read again."""
    [found] = [row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("RssAnon")]
    return 1024 * int(found.split()[1])


@contextmanager
def watched() -> Iterator[list[int]]:
    """Look at the memory a thousand times a second while the body runs."""
    seen, is_over = [allocated()], threading.Event()

    def watch() -> None:
        while not is_over.wait(0.001):
            seen.append(allocated())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        is_over.set()
        watcher.join()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells how much memory a process has")
def test_loading_needs_no_network_and_holds_the_weights_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    load(write_openvla_folder(tmp_path / "small", num_layers=1), dtype="float16")  # imports are not measured
    geometry = Geometry(num_layers=16, hidden=128, intermediate=4096, image_size=28)
    folder = write_openvla_folder(tmp_path / "large", geometry=geometry, shards=16)
    largest = max(path.stat().st_size for path in folder.iterdir())
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # memory that was freed before would be used again, and hide what is needed
    with watched() as seen:
        policy = load(folder, dtype="float16")
    peak = max(seen) - seen[0]
    weights = sum(parameter.nbytes for parameter in policy.parameters())
    assert weights > 50e6
    assert 0.8 * weights <= peak <= weights + largest + 30e6  # the weights, and the shard that is open; not twice


@pytest.mark.parametrize("name", ["../outside/model.safetensors", "/etc/passwd", "sub/a.safetensors", 3, None, "a.bin"])
def test_shards_lie_beside_the_index(name: Any, tmp_path: Path) -> None:
    folder = write_openvla_folder(tmp_path / "base", num_layers=1)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="field 'weight_map' must name safetensors files beside it, got"):
        OpenVLAOFT.from_pretrained(str(folder))


def test_parts_of_two_training_steps_are_refused(tmp_path: Path) -> None:
    folder = write_openvla_folder(tmp_path / "base", num_layers=1)
    (folder / "proprio_projector--150000_checkpoint.pt").rename(folder / "proprio_projector--50000_checkpoint.pt")
    with pytest.raises(CheckpointError, match="must have parts of one training step, got action_head--150000"):
        OpenVLAOFT.from_pretrained(str(folder))


@pytest.mark.parametrize("text", [{"model_type": "mistral"}, {"quantization_config": {"bits": 4}}])
def test_another_decoder_is_not_computed_as_a_llama(text: dict[str, Any], tmp_path: Path) -> None:
    folder = write_openvla_folder(tmp_path / "base", num_layers=1)
    document = json.loads((folder / "config.json").read_text())
    document["text_config"] |= text
    (folder / "config.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="a Llama which is not quantised"):
        OpenVLAOFT.from_pretrained(str(folder))


def test_a_gripper_of_libero_is_a_sign_also_where_it_is_normalised(tmp_path: Path) -> None:
    folder = write_openvla_folder(tmp_path / "base", num_layers=1)
    document = json.loads((folder / "dataset_statistics.json").read_text())
    [statistics] = document.values()
    del statistics["action"]["mask"]
    (folder / "dataset_statistics.json").write_text(json.dumps(document))
    policy = OpenVLAOFT.from_pretrained(str(folder))
    [chunk] = policy.infer([make_observation(0, 1)], [policy.reset()])
    assert set(chunk.actions[:, 6].tolist()) <= {-1.0, 0.0, 1.0}


def test_other_files_beside_a_base_do_not_change_it(tmp_path: Path) -> None:
    folder = write_openvla_folder(tmp_path / "base", num_layers=1)
    before = OpenVLAOFT.from_pretrained(str(folder)).fingerprint
    (folder / "trainer_state.json").write_text("{}")
    (folder / "optimizer.pt").write_bytes(b"x")
    assert OpenVLAOFT.from_pretrained(str(folder)).fingerprint == before
