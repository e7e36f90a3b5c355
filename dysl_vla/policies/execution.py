"""Executing chunks of actions: one inference, then its actions one at a time.

What is executed is appended to the episode's state here, so that no caller forgets it: guidance compares a policy's
next chunk with it. It is not for a robot's control loop, where inference goes on while actions are executed.
"""

from __future__ import annotations

from dysl_vla.policies.base import Policy
from dysl_vla.types import ActionChunk, EmbodimentSpec, EpisodeState, FloatArray, Observation, check_actions


def select_action(
    policy: Policy, observation: Observation, state: EpisodeState, embodiment: EmbodimentSpec | None = None
) -> FloatArray:
    """Return the next action of one episode: of the running chunk, or of a new one when that has been executed.

    Args:
        policy: The policy that acts.
        observation: The present observation; only a new inference reads it.
        state: The episode's state, from `policy.reset()`.
        embodiment: The embodiment whose limits the action is clipped to; None: it is not clipped.

    Returns:
        The action, (action,), in the embodiment's units. It counts as executed.

    Raises:
        ObservationError: The observation does not fit the policy.
        ActionError: The policy's chunk has NaN or infinity. Nothing counts as executed.
    """
    if not state.planned:
        start_chunk(policy, observation, state, embodiment)
    return next_action(state)


def start_chunk(
    policy: Policy, observation: Observation, state: EpisodeState, embodiment: EmbodimentSpec | None = None
) -> ActionChunk:
    """Infer a chunk for one episode; its first `execute_steps` actions become the state's plan. See `select_action`."""
    [chunk] = policy.infer([observation], [state])
    check_actions(chunk.actions, len(policy.spec.action_names))
    actions = chunk.actions[: policy.spec.execute_steps]
    state.planned.clear()
    state.planned.extend(actions if embodiment is None else embodiment.clip(actions))
    return chunk


def next_action(state: EpisodeState) -> FloatArray:
    """Return the first action of the state's plan, (action,), which then counts as executed.

    Raises:
        IndexError: The plan is empty; call `start_chunk` first.
    """
    action = state.planned.popleft()
    state.executed.append(action)
    return action
