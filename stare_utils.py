"""STARE's idea on one page: stages, the separator, the calculator, and the stage reward.

A long manipulation episode is cut into semantic stages, for example reach, grasp, transport, place.
The *separator* says which stage a state is in (`stage_signals`) and cuts trajectories into segments
(`segment_stages`, `segment_steps`). The *calculator* gives each stage a cost (`stage_costs`, used
by sta_tpo.py) and a potential (`stage_potential`, used by sta_ppo.py). `shape_rewards` turns the
potential into the stage reward. `pace_rewards` is another one.

This module needs torch alone. It knows no simulator, no model and no algorithm. Stages are data:
the eleven tasks' stage tables are in world/tasks.py, and docs/tasks.md shows how to write one.

Every function reads batched tensors, so the same code serves ManiSkill's GPU simulation (one
batched env) and CPU simulation (one process per env).
Letters: T steps, N envs, K stages. Units: metres, radians, seconds; world frame.
Source: STARE-VLA, arXiv 2512.05107. docs/choices.md lists what the paper leaves open.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

Tensor = torch.Tensor
# What a task reads off its simulator, by name: one row per env.
State = dict[str, Tensor]


def no_turn(state: State) -> Tensor:
    """A rotation vector (N, 3) that turns nothing."""
    return torch.zeros_like(state["tool"])


@dataclass(frozen=True)
class Stage:
    """One stage of a task: when it begins, what is left to do in it, how the expert plays it."""

    name: str
    # (N,) bool: this stage has begun, so the stage before is completed. None for the first stage.
    entry: Callable[[State], Tensor] | None
    # d_k, (N,) >= 0, in metres (radians for an orientation): what is left to do in this stage.
    distance: Callable[[State], Tensor]
    # L_k, the stage's length scale: the median of `distance` where the expert enters the stage.
    # benchmark/expert.py measures it.
    length: float
    # (N, 3) metres: where the scripted expert drives the tool during this stage.
    target: Callable[[State], Tensor]
    # (N,): the expert's gripper command. 1 opens, -1 closes.
    gripper: Callable[[State], Tensor]
    # (N, 3) radians: rotation vector by which the expert turns the tool.
    turn: Callable[[State], Tensor] = no_turn


# ---- the separator: which stage is a state in? ----
def stage_signals(
    stage_table: tuple[Stage, ...], state: State, success: Tensor, potential: str, across: str
) -> dict[str, Tensor]:
    """The stage of each env's state, what is left to do in it, and the potential Phi.

    stage_table: the K stages of a task. state: what the task reads off its simulator. success: (N,)
    bool. potential: the form of phi_k, see `stage_potential`.
    across: "offset" is Phi = k + phi_k, and K at success, so that Phi never falls where a stage
    ends. "bare" is phi_k alone, as in the paper, and 1 at success.

    Returns `stage` (N,) long in 0..K, `stage_distance` (N,) d_k of that stage (0 at success),
    `distances` (N, K) d_k of every stage, and `potential` (N,) Phi.
    """
    K = len(stage_table)
    # The first stage needs no event.
    entered = [torch.ones_like(success)]
    for stage in stage_table[1:]:
        entered.append(stage.entry(state))
    # The stage is the largest k whose entry condition holds now; lower ones need not hold.
    # So the label falls back when an object is dropped.
    index = torch.arange(K, device=success.device)
    label = (torch.stack(entered, -1) * index).amax(-1)  # (N,)

    distances = torch.stack([stage.distance(state) for stage in stage_table], -1)  # (N, K)
    lengths = torch.tensor([stage.length for stage in stage_table], device=distances.device)
    distance = distances.gather(-1, label[:, None])[:, 0]  # (N,)
    phi = stage_potential(distance, lengths[label], potential)  # (N,)
    assert label.shape == distance.shape == phi.shape == success.shape, "one number per env"

    # Success is stage K: nothing is left to do.
    label = torch.where(success, K, label)
    distance = torch.where(success, 0.0, distance)
    if across == "offset":
        phi = label + torch.where(success, 0.0, phi)
    else:
        phi = torch.where(success, 1.0, phi)
    return {
        "stage": label,
        "stage_distance": distance,
        "distances": distances,
        "potential": phi,
    }


def segment_stages(stage: Tensor, num_stages: int) -> Tensor:
    """Cuts trajectories by the first entry into each stage.

    stage: (T,) or (T, N) integers in 0..K, time first. Returns the same shape: the segment of each
    step, which is the running maximum of the labels, clipped to K - 1.
    """
    running = torch.cummax(torch.as_tensor(stage), 0).values
    return running.clamp(max=num_stages - 1)


def segment_steps(stage: Tensor, num_stages: int) -> list[Tensor]:
    """The steps of each segment of one trajectory, in order.

    stage: (T,) integers in 0..K. Returns K long tensors; a skipped stage has an empty one.
    """
    segment = segment_stages(stage, num_stages)
    return [(segment == k).nonzero()[:, 0] for k in range(num_stages)]


def decode_stages(logprobs: Tensor) -> Tensor:
    """The most likely segments by a learned separator (Viterbi 1967).

    logprobs: (T, K). Returns labels (T,): those with the largest sum of log-probabilities among
    all labels that never fall.
    """
    score = logprobs[0]  # (K,): the best sum of a path that ends in each stage
    came_from = []
    for row in logprobs[1:]:
        # A path may come from any stage up to its own.
        best, previous = torch.cummax(score, 0)
        score = best + row
        came_from.append(previous)
    path = [score.argmax()]
    for previous in reversed(came_from):
        path.append(previous[path[-1]])
    return torch.stack(path[::-1])


# ---- the calculator: what does a stage cost, and how far is it? ----
def stage_costs(distance: Tensor, segment: Tensor, num_stages: int) -> Tensor:
    """l_k, the mean distance over the steps of each segment.

    distance, segment: (T,). Returns (K,), NaN for stages that were never entered. Multiply by the
    number of steps for the summed cost, in which each step costs.
    """
    distance = torch.as_tensor(distance)
    segment = torch.as_tensor(segment).long()
    member = torch.nn.functional.one_hot(segment, num_stages).to(distance.dtype)  # (T, K)
    return distance @ member / member.sum(0)


def stage_potential(distance: Tensor, length: Tensor, form: str = "sigmoid") -> Tensor:
    """phi_k in [0, 1], which is 1 where nothing is left to do.

    distance, length: d_k and L_k, of any one shape. form "sigmoid" is the paper's
    sigmoid(1 - d_k / L_k), divided by sigmoid(1) so that d_k = 0 gives 1. form "linear" is
    max(0, 1 - d_k / L_k).
    """
    if form == "linear":
        return (1 - distance / length).clamp(min=0)
    return torch.sigmoid(1 - distance / length) / torch.sigmoid(torch.tensor(1.0))


# ---- the stage reward ----
def shape_rewards(
    rewards: Tensor,
    potentials: Tensor,
    next_potentials: Tensor,
    terminated: Tensor,
    gamma: float,
    weight: float,
) -> Tensor:
    """The stage reward r'_t = r_t + w * (gamma * Phi(s_{t+1}) - Phi(s_t)).

    It is potential-based shaping (Ng, Harada, Russell 1999). All tensors have one shape, (T, N) or
    (N,). next_potentials[t] is Phi of the true next state: at an episode's end that of its final
    observation, not of the next episode's first one. terminated: where that Phi counts as 0.
    """
    shapes = {x.shape for x in (rewards, potentials, next_potentials, terminated)}
    assert len(shapes) == 1, "shapes differ: this would broadcast"
    next_potentials = torch.where(terminated, 0.0, next_potentials)
    return rewards + weight * (gamma * next_potentials - potentials)


def pace_rewards(
    furthest: Tensor,
    steps: Tensor,
    next_stage: Tensor,
    pace: Tensor,
    weight: float,
) -> Tensor:
    """w / (1 + T_k / Tbar_k) for the step that completes stage k, once in an episode; else 0.

    All (N,), but pace: (K,) Tbar_k. furthest: k, the largest stage before this step. steps: T_k,
    since k was entered, this one included. next_stage: where the step leads. A skipped stage pays
    nothing.
    """
    assert furthest.shape == steps.shape == next_stage.shape, "one number per env"
    # Stage K is success. Nothing follows it, so any pace will do there.
    k = furthest.clamp(max=len(pace) - 1)
    pays = weight / (1 + steps / pace[k])
    completes = next_stage > furthest
    return torch.where(completes, pays, 0.0)
