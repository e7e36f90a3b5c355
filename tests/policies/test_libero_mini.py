"""libero-mini follows instructions, which alone tell libero-goal's tasks apart, and is evaluated as every policy is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from dysl_vla.envs import FIRST_EVALUATION_SEED, libero_chain
from dysl_vla.envs.libero import instruction_of
from dysl_vla.envs.libero_chain import LiberoChainEnv
from dysl_vla.eval import evaluate
from dysl_vla.eval.compare import compare
from dysl_vla.eval.config import EvalConfig
from dysl_vla.files import read_lines
from dysl_vla.policies import Policy, load_policy
from dysl_vla.policies.execution import next_action, start_chunk
from dysl_vla.types import TASK_KEY

STEPS = 120
TASKS = ("put_the_bowl_on_the_plate", "turn_on_the_stove", "push_the_plate_to_the_front_of_the_stove")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load_policy("libero-mini")


@pytest.fixture(scope="module")
def env(policy: Policy) -> Iterator[LiberoChainEnv]:
    with closing(LiberoChainEnv(cameras=policy.spec.cameras)) as made:
        yield made


def reached(env: LiberoChainEnv) -> set[str]:
    """Return the tasks of the scene whose goals hold."""
    return {task for task, goal in env._goals.items() if all(map(env._world._eval_predicate, goal))}


@pytest.mark.parametrize("task", TASKS)
def test_another_instruction_in_the_same_state_leads_to_another_goal(
    env: LiberoChainEnv, policy: Policy, task: str
) -> None:
    env.reset(seed=FIRST_EVALUATION_SEED)
    assert not reached(env)
    state = policy.reset()
    for _ in range(STEPS):
        if not state.planned:
            told = {**env.observe(), TASK_KEY: instruction_of(task)}
            start_chunk(policy, told, state, env.embodiment)
        env.advance(next_action(state))
        if now := reached(env):
            break
    assert now == {task}


def test_liberos_suites_run_in_workers_go_on_and_are_compared(tmp_path: Path) -> None:
    tasks = ("turn_on_the_stove", "open_the_middle_drawer_of_the_cabinet")
    config = EvalConfig(
        out=tmp_path,
        policy="libero-mini",
        suite="libero-goal",
        tasks=",".join(tasks),
        episodes=1,
        workers=2,
        variants="full,dysl",
    )
    evaluate(config)
    runs = [tmp_path / name for name in ("full", "dysl")]
    before = [read_lines(run / "episodes.jsonl") for run in runs]
    assert [sorted(episode["task"] for episode in episodes) for episodes in before] == [sorted(tasks)] * 2
    [comparison] = compare(runs)
    assert comparison.success.episodes == 2
    assert comparison.success.both >= 1
    evaluate(config)
    assert [read_lines(run / "episodes.jsonl") for run in runs] == before


def test_a_chain_is_evaluated_and_ends_where_a_task_takes_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libero_chain, "TASK_STEPS", 8)
    result = evaluate(EvalConfig(out=tmp_path, policy="libero-mini", suite="libero-chain", episodes=2))
    chains = result["variants"]["policy"]["chains"]
    assert chains["average_length"] == 0
    assert len(chains["in_a_row"]) == 5
    for episode in read_lines(tmp_path / "episodes.jsonl"):
        assert (episode["steps"], episode["completed"], len(set(episode["instructions"]))) == (8, 0, 5)
