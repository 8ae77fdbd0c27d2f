"""What each form of the stage reward teaches a policy that never succeeds.

    python benchmark/chain.py

A chain of states, solved exactly. Position x runs from 0 to 2 K. Its stage is x // 2, Phi = x / 2,
and 2 K is success. A move is -1, 0 or 1. An episode has H steps. The rewards are those of
sta_ppo.py's own `StageReward`. It prints the advantage of each move for a converged critic.
"""

import functools
import os
import sys
import types
from pathlib import Path

# The variable is read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch

import sta_ppo

K = 3
H = 10
END = 2 * K
GAMMA = 0.9
WEIGHT = 1 / K
PACE = (2.0, 3.0, 4.0)
MOVES = (-1, 0, 1)
TASK = types.SimpleNamespace(stages=("a", "b", "c"), pace=PACE, max_episode_steps=H)
# Where the horizon does not end the task, an episode that is truncated would have gone on.
FAR = 200


def stage_reward(form: str, num_envs: int = 1) -> sta_ppo.StageReward:
    """sta_ppo.py's stage reward for this chain."""
    args = sta_ppo.Args(stage_reward=form, num_envs=num_envs, gamma=GAMMA)
    return sta_ppo.StageReward(args, TASK, WEIGHT, torch.device("cpu"))


def weak_policy(x: int) -> dict[int, float]:
    """Chances of the moves at position x. This policy never makes the last one."""
    if x == END - 1:
        return {-1: 0.3, 0: 0.7, 1: 0.0}
    return {-1: 0.2, 0: 0.3, 1: 0.5}


@functools.cache
def step(form: str, x: int, furthest: int, steps: int, move: int) -> tuple[float, int, int, int]:
    """A step's reward with success, then where it leads: position, furthest stage, steps in it."""
    after = max(x + move, 0)
    paying = stage_reward(form)
    paying.furthest[:] = furthest
    paying.steps[:] = steps
    success = torch.tensor([after == END])
    phi, next_phi = torch.tensor([x / 2]), torch.tensor([after / 2])
    paid = paying(slice(0, 1), phi, next_phi, torch.tensor([after // 2]), success)
    return float(paid + success), after, int(paying.furthest), int(paying.steps)


@functools.cache
def value(form: str, x: int, furthest: int, steps: int, left: int, weak: bool) -> float:
    """V with `left` steps to go: of the weak policy, or of the best one."""
    if x == END or left == 0:
        return 0.0
    qs = action_values(form, x, furthest, steps, left, weak)
    if not weak:
        return max(qs.values())
    return sum(chance * qs[move] for move, chance in weak_policy(x).items())


def action_values(
    form: str, x: int, furthest: int, steps: int, left: int, weak: bool
) -> dict[int, float]:
    """Q of each move, see `value`."""
    qs = {}
    for move in MOVES:
        paid, *after = step(form, x, furthest, steps, move)
        qs[move] = paid + GAMMA * value(form, *after, left - 1, weak)
    return qs


def advantages(form: str, x: int) -> list[float]:
    """A of each move of the weak policy at position x, in an episode's first step."""
    left = H if stage_reward(form).horizon_ends else FAR
    state = (form, x, x // 2, 0, left, True)
    return [q - value(*state) for q in action_values(*state).values()]


def main() -> None:
    """Prints a table per form."""
    for form in ("shaping", "gain", "progress", "paced"):
        print(f"{form}: advantage of the moves {MOVES} at each position")
        for x in range(END):
            print(
                f"  x = {x}, stage {x // 2}: " + " ".join(f"{a:+.3f}" for a in advantages(form, x))
            )


if __name__ == "__main__":
    main()
