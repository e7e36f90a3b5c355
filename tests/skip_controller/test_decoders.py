"""Decoders of others: what their layers are called with, however odd."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen2VLTextConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLTextModel

from dysl_vla.errors import ConfigError
from dysl_vla.skip_controller import HeadsConfig, SkipHeads, SkipPlan, attach, decoders
from dysl_vla.skip_controller.decoders import find_layers, run_rows

PLAN, WIDTH = SkipPlan(6, (0, 3, 5)), 32
ROWS = np.array([[0, 99], [99, 0], [99, 99]])


def heads() -> SkipHeads:
    torch.manual_seed(1)
    made = SkipHeads(PLAN, HeadsConfig(WIDTH, adapter_size=8, controller_size=4))
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made.eval()


@pytest.mark.parametrize("rows", [2, 3, 4])
def test_positions_in_time_height_and_width_belong_to_their_rows(rows: int) -> None:
    """(3, batch, tokens), also where the batch has three rows."""
    torch.manual_seed(0)
    config = Qwen2VLTextConfig(
        vocab_size=8,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
        use_cache=False,
    )
    model = Qwen2VLTextModel(config).eval()
    embeds = torch.randn(rows, 7, WIDTH)
    positions = torch.randint(0, 9, (3, rows, 7))
    skipper = attach(model, PLAN, heads())
    points = np.resize(ROWS, (rows, 2))
    with torch.inference_mode():
        model(inputs_embeds=embeds, position_ids=positions)
        with skipper.step(points, threshold=-1.0):
            together = model(inputs_embeds=embeds, position_ids=positions).last_hidden_state
        for row in range(rows):
            one = slice(row, row + 1)
            with skipper.step(points[one], threshold=-1.0):
                alone = model(inputs_embeds=embeds[one], position_ids=positions[:, one]).last_hidden_state
            torch.testing.assert_close(alone[0], together[row], rtol=1e-4, atol=1e-4)


def layer(hidden: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Tensor:
    mask = torch.zeros(len(hidden), 1, 1, hidden.shape[1]) if attention_mask is None else attention_mask
    return hidden + mask.mean(dim=(1, 2))[..., None]


def test_a_mask_of_four_dimensions_belongs_to_its_rows() -> None:
    hidden, mask = torch.randn(4, 5, 2), torch.randn(4, 1, 5, 5)
    some = run_rows(layer, "hidden", {"hidden": hidden, "attention_mask": mask}, [1, 3])
    full = layer(hidden, mask)
    assert torch.equal(some[[0, 2]], hidden[[0, 2]])
    torch.testing.assert_close(some[[1, 3]], full[[1, 3]])


def test_the_layers_can_be_named_where_two_lists_are_equally_long() -> None:
    both = nn.ModuleDict({name: nn.ModuleList(nn.Linear(2, 2) for _ in range(6)) for name in ("vlm", "expert")})
    with pytest.raises(ConfigError, match="one list of 6 layers, got 2"):
        find_layers(both, 6)
    assert find_layers(both["vlm"], 6) is both["vlm"]


class Device(nn.Module):
    """A layer that runs on another device, with no weights."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.to(self.name)


def test_a_mask_follows_the_hidden_states_to_the_device_of_their_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    made, devices = heads(), []
    skipper = attach(nn.ModuleList(Device("cpu" if i < 3 else "meta") for i in range(6)), PLAN, made)
    made.adapters["4"].to("meta")

    def decide(hidden: Tensor, mask: Tensor) -> Tensor:
        assert (hidden.device, len(hidden)) == (mask.device, len(mask))
        devices.append((mask.device.type, len(mask)))
        return torch.zeros(len(hidden), requires_grad=True)

    for controller in made.controllers.values():
        monkeypatch.setattr(controller, "forward", decide)

    def run() -> None:
        hidden = torch.randn(2, 3, WIDTH)
        for one in skipper.layers:
            hidden = one(hidden)

    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    for points in ([[1, 0], [1, 0]], [[99, 99], [1, 0]]):
        with skipper.step(np.array(points), threshold=0.6, mask=mask):
            run()
    with skipper.force_exits([2, 4], mask=mask):
        run()
    assert devices == [("cpu", 2), ("meta", 2), ("cpu", 1), ("meta", 1), ("cpu", 2), ("meta", 2)]


def test_checkpointing_finds_the_device_whose_random_state_it_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    monkeypatch.setattr(decoders, "checkpoint", lambda _, *args, **__: found.extend(args) or args[0])
    layers, hidden = nn.ModuleList(Device("cpu") for _ in range(6)), torch.randn(2, 3, WIDTH)
    with attach(layers, PLAN, heads()).force_exits([None, None], is_checkpointed=True):
        layers[0](hidden=hidden)
    assert len(found) == 1
    assert found[0] is hidden


def test_a_follower_of_another_depth_or_before_its_decoder_is_refused() -> None:
    layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))
    with pytest.raises(ConfigError, match="the plan's 6 layers, and one has 5"):
        attach(layers, PLAN, followers=[nn.ModuleList(nn.Linear(2, 2) for _ in range(5))])
    follower = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))
    skipper = attach(layers, PLAN, heads(), followers=[follower])
    with pytest.raises(ConfigError, match="had decided"), skipper.step(np.zeros((1, 2), np.int64)):
        follower[0](torch.randn(1, 2, WIDTH))
    with pytest.raises(ConfigError, match="followers must not be already attached"):
        attach(nn.ModuleList(nn.Linear(2, 2) for _ in range(6)), PLAN, followers=[follower])
    skipper.detach()
    assert all("forward" not in one.__dict__ for one in (*layers, *follower))
