"""The data-flow form of a skipping decoder answers what the control-flow form does."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from dysl_vla.errors import ConfigError
from dysl_vla.skip_controller import SkipPlan, attach
from dysl_vla.skip_controller.conditional import ConditionalDecoder
from tests.skip_controller.test_skipping import WIDTH, make, make_heads

PLANS = [SkipPlan(6, (0, 3, 5)), SkipPlan(6, (5,)), SkipPlan(6, (0, 5), exits=(1, 3))]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma", "smolvlm"])
@torch.inference_mode()
def test_it_decides_and_answers_as_the_skipper_does(name: str, plan: SkipPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    # outside of an export, torch.cond would compile each condition
    monkeypatch.setattr(torch, "cond", lambda which, one, other, inputs: (one if which else other)(*inputs))
    model, heads = make(name), make_heads(plan)
    conditional = ConditionalDecoder(model, plan, heads, nn.Identity())
    seen = set()
    for seed in range(12):
        rng = np.random.default_rng(seed)
        embeds = torch.randn(1, 5, WIDTH, generator=torch.Generator().manual_seed(seed))
        points = rng.integers(0, 3, (1, len(plan.blocks)))
        threshold = float(rng.uniform(0.2, 0.8))
        inputs = {"inputs_embeds": embeds}
        odds = torch.tensor(math.log(threshold / (1 - threshold)))
        resumed = None
        allowed = torch.from_numpy(points[0])
        with conditional.installed():
            hidden, asked, logits, lefts, first = conditional(inputs, allowed, odds, torch.tensor(0))
            if lefts.any():
                layer = min(layer for layer, left in zip(conditional.exits, lefts.tolist(), strict=True) if left)
                resumed = conditional({"inputs_embeds": first}, allowed, odds, torch.tensor(layer))[0]
        full = model(**inputs).last_hidden_state
        skipper = attach(model, plan, heads)
        with skipper.step(points, threshold=threshold) as step:
            expected = model(**inputs).last_hidden_state
        skipper.detach()
        assert [layer for layer, left in zip(conditional.exits, lefts.tolist(), strict=True) if left] == sorted(
            step.targets[0]
        )
        outputs = {
            layer: logit
            for layer, is_asked, logit in zip(conditional.exits, asked.tolist(), logits.sigmoid().tolist(), strict=True)
            if is_asked
        }
        assert outputs == pytest.approx(step.outputs[0], abs=1e-5)
        torch.testing.assert_close(hidden, expected)
        if resumed is not None:
            torch.testing.assert_close(resumed, full)
        seen.add(len(step.targets[0]))
    assert len(seen) > 1


def test_what_cannot_be_exported_is_refused() -> None:
    plan = PLANS[0]
    model, heads = make("llama"), make_heads(plan)
    attach(model, plan, heads)
    with pytest.raises(ConfigError, match="detach it first"):
        ConditionalDecoder(model, plan, heads, nn.Identity())
