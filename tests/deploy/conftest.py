from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dysl_vla.deploy.export import ExportConfig, export
from dysl_vla.policies.dysl import save_skips
from dysl_vla.policies.mini_vla import MiniVLA
from dysl_vla.skip_controller.operating import SkipStatistics
from tests.conftest import MOCK_INSTRUCTIONS
from tests.policies.test_dysl import make_parts, play


@pytest.fixture(scope="session")
def skipping_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny policy whose controllers sometimes skip, sometimes not, and which sometimes verifies."""
    folder = tmp_path_factory.mktemp("checkpoint")
    policy, heads, settings = make_parts()
    policy.provenance = {"data": {"instructions": MOCK_INSTRUCTIONS[:1], "origins": []}}
    policy.save_pretrained(folder)
    saved = MiniVLA.from_pretrained(str(folder))
    settings = replace(settings, teacher=saved.fingerprint, skip=0.5)
    save_skips(folder, heads, settings, {})
    from dysl_vla.policies.dysl import load_dysl

    dysl = load_dysl(saved, folder, 1.0)
    outputs = [value for chunk in play(dysl, range(60)) for value in chunk.skips.outputs.values()]
    dysl.close()
    statistics = SkipStatistics.measured(outputs, [0.002, 0.01, 0.03], [-0.1, 1e-6, 1e-6])
    save_skips(folder, heads, replace(settings, statistics=statistics), {})
    return folder


@pytest.fixture(scope="session")
def bundle_folder(skipping_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of the same policy, which tests must not write to."""
    return export(ExportConfig(tmp_path_factory.mktemp("bundle") / "b", str(skipping_checkpoint)))
