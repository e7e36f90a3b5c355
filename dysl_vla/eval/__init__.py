"""Evaluation: it runs a policy on a suite, keeps records that survive a kill, and reports and compares the results.

Importing this subpackage imports neither torch nor a simulator.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dysl_vla.eval.config import EvalConfig


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Run what is missing of an evaluation, and write its figures.

    Returns:
        The figures of each variant, by its name, under "variants"; without `config.variants` there is one, "policy".
        They are those of its `result.json`; with `config.data`, `offline.evaluate_offline` says what they are, and
        which others stand beside "variants".

    Raises:
        ConfigError: A value cannot work, the policy does not fit the suite or the data, or `out` holds another run.
            Nothing was written.
        MissingExtraError: The suite's simulator is not installed; with `config.data`, none is needed.
    """
    if config.data is not None:
        from dysl_vla.eval.offline import evaluate_offline

        return evaluate_offline(config)
    from dysl_vla.eval.runner import evaluate_in_simulation

    return evaluate_in_simulation(config)
