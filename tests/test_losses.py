"""Closed forms of advantages, of the preference loss and its pairs, and of the scripts' gradients.

The gradients are those of imitation and of the two passes of the preference step.
"""

import inspect
import math
from itertools import combinations

import h5py
import numpy as np
import pytest
import torch
from conftest import STATS, call, invent_rollouts, prompt, record_steps, scalars, write_demos
from hypothesis import given
from hypothesis import strategies as st

import sft
import sta_ppo
import sta_tpo
import vla
from plumbing.checkpoint import load_policy
from stare_utils import segment_stages, shape_rewards
from world.demos import read_demos

GAMMA = 0.9
LAMBDA = 0.8
T = 9
N = 40


# ---- advantages ----
def rollout(seed=0):
    """Rewards, values, values of the true next states, terminated, done: (T, N) each.

    The first three are doubles, the last two bools. Both kinds of ending occur.
    """
    g = torch.Generator().manual_seed(seed)
    rewards = torch.randn(T, N, generator=g, dtype=torch.double)
    values = torch.randn(T, N, generator=g, dtype=torch.double)
    next_values = torch.randn(T, N, generator=g, dtype=torch.double)
    ending = torch.rand(T, N, generator=g)
    terminated = ending < 0.15
    done = ending < 0.3
    next_values[:-1] = torch.where(done[:-1], next_values[:-1], values[1:])
    return rewards, values, next_values, terminated, done


def lambda_mean(rewards, values, next_values, terminated, done, t: int, n: int) -> float:
    """The lambda-weighted mean of the n-step advantages of env n at step t."""
    # Steps to the end of the episode or of the roll-out.
    horizon = next((u for u in range(t, T) if done[u, n]), T - 1) - t + 1
    steps = []
    for h in range(1, horizon + 1):
        bootstrap = GAMMA**h * next_values[t + h - 1, n]
        if terminated[t + h - 1, n]:
            bootstrap = 0
        paid = sum(GAMMA**i * rewards[t + i, n] for i in range(h))
        steps.append(paid + bootstrap - values[t, n])
    early = sum(LAMBDA**h * advantage for h, advantage in enumerate(steps[:-1]))
    return float(LAMBDA ** (horizon - 1) * steps[-1] + (1 - LAMBDA) * early)


def test_gae_is_the_lambda_mean_of_n_step_advantages():
    inputs = rollout()
    _, values, _, terminated, done = inputs
    assert terminated.any()
    assert (done & ~terminated).any()
    advantages, returns = sta_ppo.compute_gae(*inputs, GAMMA, LAMBDA)
    for n in range(N):
        for t in range(T):
            expected = lambda_mean(*inputs, t, n)
            assert advantages[t, n].item() == pytest.approx(expected, abs=1e-12)
    assert torch.equal(returns, advantages + values)


def test_a_termination_has_no_future_and_a_truncation_has_one():
    reward = torch.tensor([[1.0]])
    value = torch.tensor([[0.5]])
    next_value = torch.tensor([[2.0]])
    true = torch.tensor([[True]])
    false = torch.tensor([[False]])
    ended, _ = sta_ppo.compute_gae(reward, value, next_value, true, true, GAMMA, LAMBDA)
    assert ended.item() == pytest.approx(1 - 0.5)
    cut, _ = sta_ppo.compute_gae(reward, value, next_value, false, true, GAMMA, LAMBDA)
    assert cut.item() == pytest.approx(1 + GAMMA * 2 - 0.5)


def test_no_advantage_leaks_across_an_episode_border():
    rewards, values, next_values, terminated, done = rollout()
    before, _ = sta_ppo.compute_gae(rewards, values, next_values, terminated, done, GAMMA, LAMBDA)
    # The first ending of each env.
    border = done.double().argmax(0)
    later = torch.arange(T)[:, None] > border
    after, _ = sta_ppo.compute_gae(
        rewards + later * 100,
        values - later * 7,
        next_values + later * 3,
        terminated,
        done,
        GAMMA,
        LAMBDA,
    )
    earlier = ~later & done.any(0)
    assert torch.equal(after[earlier], before[earlier])
    assert not torch.equal(after, before)


def test_shaping_with_a_critic_that_knows_the_potential_changes_no_advantage():
    rewards, values, next_values, terminated, done = rollout()
    potentials, next_potentials, *_ = rollout(seed=1)
    weight = 0.25
    shaped = shape_rewards(rewards, potentials, next_potentials, terminated, GAMMA, weight)
    plain, _ = sta_ppo.compute_gae(rewards, values, next_values, terminated, done, GAMMA, LAMBDA)
    other, _ = sta_ppo.compute_gae(
        shaped,
        values - weight * potentials,
        next_values - weight * next_potentials,
        terminated,
        done,
        GAMMA,
        LAMBDA,
    )
    assert torch.allclose(plain, other)


@pytest.mark.parametrize("which", range(5))
def test_gae_refuses_shapes_that_would_broadcast(which):
    inputs = list(rollout())
    inputs[which] = inputs[which][0]
    with pytest.raises(AssertionError):
        sta_ppo.compute_gae(*inputs, GAMMA, LAMBDA)


def test_advantages_are_normalised_over_the_buffer_or_within_each_stage():
    advantages = torch.randn(500) * 3 + 5
    stages = torch.randint(0, 4, (500,))
    # A stage of one step has no deviation.
    stages[0] = 9
    whole = sta_ppo.normalize(advantages, None)
    by_stage = sta_ppo.normalize(advantages, stages)
    groups = [whole] + [by_stage[stages == k] for k in range(4)]
    for group in groups:
        assert abs(group.mean()) < 1e-5
        assert abs(group.std() - 1) < 1e-5
    assert by_stage[0] == 0
    assert torch.equal(whole.argsort(), advantages.argsort())


def test_the_weight_of_the_kl_falls_to_zero():
    args = sta_ppo.Args(kl_coef=0.8, kl_anneal=0.5, num_iterations=8)
    weights = [sta_ppo.kl_weight(args, iteration) for iteration in range(6)]
    assert weights == pytest.approx([0.8, 0.6, 0.4, 0.2, 0, 0])
    stays = sta_ppo.Args(kl_coef=0.8, num_iterations=8)
    assert sta_ppo.kl_weight(stays, 7) == 0.8


def test_value_head_begins_at_zero():
    assert (sta_ppo.ValueHead(16)(torch.randn(5, 16), torch.rand(5)) == 0).all()


# ---- the preference loss ----
def test_tpo_loss_is_ln_2_where_both_are_equal():
    zero = torch.zeros(5)
    cost = torch.rand(5)
    ln_2 = torch.full((5,), math.log(2))
    loss, chosen, rejected = sta_tpo.sta_tpo_loss(
        zero, zero, cost, torch.rand(5), beta=0.7, cost_coef=0.0
    )
    assert torch.allclose(loss, ln_2)
    assert (chosen == 0).all()
    assert (rejected == 0).all()
    loss, _, _ = sta_tpo.sta_tpo_loss(zero + 3, zero + 3, cost, cost, 0.7, 0.1)
    assert torch.allclose(loss, ln_2)


def test_tpo_loss_by_hand():
    inputs = [torch.tensor([x]) for x in (0.3, -0.1, 0.2, 0.5)]
    loss, chosen, rejected = sta_tpo.sta_tpo_loss(*inputs, beta=2.0, cost_coef=0.1)
    assert chosen.item() == pytest.approx(2 * (0.3 - 0.02))
    assert rejected.item() == pytest.approx(2 * (-0.1 - 0.05))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.86)))


def test_tpo_gradient_raises_the_chosen_and_lowers_the_rejected():
    q_chosen = torch.randn(6, requires_grad=True)
    q_rejected = torch.randn(6, requires_grad=True)
    loss, chosen, rejected = sta_tpo.sta_tpo_loss(
        q_chosen, q_rejected, torch.rand(6), torch.rand(6), beta=0.5, cost_coef=0.1
    )
    loss.sum().backward()
    weight = 0.5 * torch.sigmoid(rejected - chosen)
    assert torch.allclose(q_chosen.grad, -weight)
    assert torch.allclose(q_rejected.grad, weight)


def test_tpo_loss_refuses_shapes_that_would_broadcast():
    q = torch.zeros(3)
    with pytest.raises(AssertionError):
        sta_tpo.sta_tpo_loss(q, torch.zeros(3, 1), q, q, 1.0, 0.1)


def test_the_weight_of_the_cost_follows_from_its_kind_unless_it_is_given():
    assert sta_tpo.Args().cost == "sum"
    for cost, told, coef in (("sum", None, 0.01), ("mean", None, 0.1), ("sum", 0.0, 0.0)):
        args = sta_tpo.Args(cost=cost, cost_coef=told)
        sta_tpo.check_args(args)
        assert args.cost_coef == coef


# ---- pairs ----
K = 3


def made_up_rollout(row: tuple) -> dict:
    """A roll-out from (seed of the initial state, [(stage, distance) of each step], success)."""
    seed, steps, success = row
    return {
        "init_seed": seed,
        "stage": torch.tensor([stage for stage, _ in steps]),
        "distance": torch.tensor([distance for _, distance in steps], dtype=torch.double),
        "success": success,
    }


STEPS = st.lists(
    st.tuples(st.integers(0, K - 1), st.floats(0, 3)),
    min_size=1,
    max_size=8,
)
ROLLOUTS = st.lists(
    st.tuples(st.integers(0, 2), STEPS, st.booleans()).map(made_up_rollout),
    min_size=1,
    max_size=8,
)


def describe(rollout, stage_aware=True, cost="mean"):
    """(stages finished, segment -> its cost), in plain Python."""

    def cost_of(distances: list[float]) -> float:
        total = sum(distances)
        return total if cost == "sum" else total / len(distances)

    if not stage_aware:
        return int(rollout["success"]), {0: cost_of(rollout["distance"].tolist())}
    furthest = 0
    steps = {}
    for stage, distance in zip(rollout["stage"].tolist(), rollout["distance"].tolist()):
        furthest = max(furthest, stage)
        steps.setdefault(furthest, []).append(distance)
    finished = K if rollout["success"] else furthest
    return finished, {k: cost_of(distances) for k, distances in steps.items()}


def expected_pair(i: int, j: int, k: int, described: list, margin: float) -> tuple | None:
    """(stage, chosen, rejected, reason) that the definition gives; None where it gives no pair."""
    done_i, costs_i = described[i]
    done_j, costs_j = described[j]
    # One of the two never came to this stage, or skipped it.
    if min(done_i, done_j) < k or k not in costs_i or k not in costs_j:
        return None
    if (done_i > k) != (done_j > k):
        return (k, i, j, "completed") if done_i > k else (k, j, i, "completed")
    if done_i > k and abs(costs_i[k] - costs_j[k]) > margin + 1e-9:
        return (k, i, j, "cost") if costs_i[k] < costs_j[k] else (k, j, i, "cost")
    return None


@given(ROLLOUTS, st.floats(0, 1), st.booleans(), st.sampled_from(["mean", "sum"]))
def test_pairs_are_exactly_those_of_the_definition(rollouts, margin, stage_aware, cost):
    pairs = sta_tpo.build_stage_pairs(
        rollouts, K, cost_margin=margin, stage_aware=stage_aware, cost=cost
    )
    described = [describe(rollout, stage_aware, cost) for rollout in rollouts]
    expected = set()
    for i, j in combinations(range(len(rollouts)), 2):
        for k in range(K if stage_aware else 1):
            pair = expected_pair(i, j, k, described, margin)
            # Pairs never mix initial states.
            if pair and rollouts[i]["init_seed"] == rollouts[j]["init_seed"]:
                expected.add(pair)
    found = set()
    for pair in pairs:
        found.add((pair["stage"], pair["chosen"], pair["rejected"], pair["reason"]))
        chosen = rollouts[pair["chosen"]]
        assert chosen["init_seed"] == rollouts[pair["rejected"]]["init_seed"]
    assert len(found) == len(pairs)
    # Rounding may decide where the gap of two costs is just the margin.
    for k, chosen, rejected, _ in found ^ expected:
        gap = described[chosen][1][k] - described[rejected][1][k]
        assert abs(abs(gap) - margin) <= 1e-9


def solved_with(distances: list[float]) -> dict:
    """A roll-out of two stages that takes these distances in the first one, and then succeeds."""
    return {
        "init_seed": 0,
        "stage": torch.tensor([0] * len(distances) + [1]),
        "distance": torch.tensor([*distances, 0.0]),
        "success": True,
    }


@pytest.mark.parametrize(
    ("options", "winner", "costs"),
    [
        ({"cost": "mean"}, 0, (1.7 / 7, 1.3 / 3)),
        ({"cost": "sum"}, 1, (1.3, 1.7)),
        # The sum is the default.
        ({}, 1, (1.3, 1.7)),
    ],
)
def test_lingering_near_the_goal_wins_by_the_mean_and_loses_by_the_sum(options, winner, costs):
    slow = solved_with([0.8, 0.4, 0.1, 0.1, 0.1, 0.1, 0.1])
    quick = solved_with([0.8, 0.4, 0.1])
    first, *_ = sta_tpo.build_stage_pairs([slow, quick], 2, cost_margin=0.1, **options)
    assert (first["stage"], first["reason"], first["chosen"]) == (0, "cost", winner)
    assert (first["cost_chosen"], first["cost_rejected"]) == pytest.approx(costs)


@given(ROLLOUTS, st.integers(1, 3), st.sampled_from(["mean", "sum"]))
def test_few_pairs_are_kept_per_state_and_stage_completions_first_then_the_widest_gaps(
    rollouts, most, cost
):
    def in_order(pairs: list[dict], group: tuple) -> list[tuple]:
        """What the pairs of an initial state and stage are sorted by, in their own order."""
        keys = []
        for pair in pairs:
            if (rollouts[pair["chosen"]]["init_seed"], pair["stage"]) == group:
                gap = pair["cost_chosen"] - pair["cost_rejected"]
                keys.append((pair["reason"] != "completed", gap))
        return keys

    every = sta_tpo.build_stage_pairs(rollouts, K, max_pairs_per_stage=10**9, cost=cost)
    kept = sta_tpo.build_stage_pairs(rollouts, K, max_pairs_per_stage=most, cost=cost)
    for group in {(rollouts[pair["chosen"]]["init_seed"], pair["stage"]) for pair in every}:
        assert in_order(kept, group) == sorted(in_order(every, group))[:most]


# ---- gradients of the real scripts ----
def record_results(monkeypatch, name: str) -> list[torch.Tensor]:
    """A list that each call of vla.py's function `name` adds its result to."""
    results = []
    function = getattr(vla, name)

    def record(*args):
        results.append(function(*args))
        return results[-1].clone()

    monkeypatch.setattr(vla, name, record)
    return results


def put_values(params, state) -> None:
    """Gives parameters the values that `record_steps` has seen, and no gradient."""
    for p, (value, _) in zip(params, state, strict=True):
        p.data.copy_(value)
        p.grad = None


def flat_gradient(params) -> torch.Tensor:
    """The gradients of all parameters as one vector, zeros where there is none."""
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
    return torch.cat([grad.flatten() for grad in grads])


def smooth_l1(gap: torch.Tensor) -> torch.Tensor:
    """Mean of the smooth L1 loss. gap: absolute differences."""
    return torch.where(gap < 1, gap**2 / 2, gap - 0.5).mean()


IMITATION = (
    "--num-updates 3 --batch-size 8 --aux-coef 3 --max-grad-norm 1e9 --seed 5 --label-jitter 20 "
    "--num-eval-episodes 0"
)


def first_logged(run) -> list[float]:
    """The first row of sft.py's log, in the order of its METRICS."""
    curves = scalars(run)
    return [curves[f"losses/{name}"][0] for name in sft.METRICS]


def demos_with_stages(path):
    """Invented demonstrations of 6 and 9 steps with stage labels."""
    write_demos(path, lengths=(6, 9))
    with h5py.File(path, "a") as file:
        for i, length in enumerate((6, 9)):
            file[f"traj_{i}/stage"] = np.arange(length) % 4
    return path


def test_imitation_s_gradients_are_those_of_plain_autograd(checkpoint, tmp_path, monkeypatch):
    """Three updates by the real main, and their log, against the loss written a second time."""
    demos = demos_with_stages(tmp_path / "demos.h5")
    seen = record_steps(monkeypatch)
    blurred = record_results(monkeypatch, "blur_bins")
    shifted = record_results(monkeypatch, "shift_images")
    run = tmp_path / "run"
    flags = ("--demo-path", demos, "--vla", checkpoint, "--output-dir", run, "--no-cuda")
    call(sft, *flags, *IMITATION.split())

    # The first learning rate is in its warm-up. The second one is the separator's own.
    rates = [rates for rates, _ in seen]
    assert rates == [pytest.approx([1e-5 * (step + 1), 1e-3]) for step in range(3)]
    model, processor, _ = load_policy(str(checkpoint), torch.device("cpu"))
    rgb, proprio, actions, where, stages = read_demos(demos, "PickCube-v1", 9)
    labels = vla.tokenize_actions(actions, STATS["action"])
    active = ~vla.constant_dims(STATS["action"])
    aux = torch.nn.Linear(64, 8)
    separator = torch.nn.Linear(64, 4)
    params = [*model.parameters(), *aux.parameters(), *separator.parameters()]
    rows = []
    for step, (_, state) in enumerate(seen):
        put_values(params, state)
        generator = torch.Generator().manual_seed(5 * 1_000_003 + step)
        index = torch.randint(15, (8,), generator=generator)
        # The gripper's label stays.
        bins = torch.cat([blurred[step][:, :-1], labels[index, -1:]], 1)
        moved = (bins != labels[index])[:, active].any(0)
        assert moved.tolist() == [True, True, True, True, False]
        # A small shift moves the pixels of most images.
        assert (shifted[step] != rgb[index]).flatten(1).any(1).sum() >= 4
        inputs = prompt(processor, {"rgb": shifted[step], "proprio": proprio[index]})
        logprob, _, hidden, greedy = sft.action_logprob(model, inputs, bins, active)
        # Of seven dimensions two never vary.
        ce = -logprob.mean() / 5
        aux_loss = smooth_l1((aux(hidden) - where[index] / 0.1).abs())
        read = separator(hidden.detach()).log_softmax(-1)
        stage_loss = -read[torch.arange(8), stages[index]].mean()
        (ce + 3 * aux_loss + stage_loss).backward()
        mine = flat_gradient(params)
        theirs = torch.cat([grad.flatten() for _, grad in state])
        assert all(p.grad is not None for p in params)
        assert (mine - theirs).norm() < 1e-4 * mine.norm(), step
        # The separator's gradient counts in no norm.
        norm = flat_gradient(params[:-2]).norm()
        off = (greedy - labels[index])[:, active].abs()
        numbers = [(off == 0).float(), off.float() * 2 / 255, read.argmax(-1) == stages[index]]
        means = [x.float().mean() for x in numbers]
        rows.append(torch.stack([ce, aux_loss, *means, norm]).detach())
    assert first_logged(run) == pytest.approx(torch.stack(rows).mean(0).tolist(), rel=1e-3)


def use_doubles(monkeypatch) -> list[int]:
    """Makes sta_tpo.py compute in fp64. Returns a list of the sizes of its forward passes."""
    sizes = []
    double = dict(vars(sta_tpo))
    exec(inspect.getsource(sta_tpo.action_logprob).replace(".float()", ".double()"), double)

    def action_logprob(model, inputs, bins, active):
        sizes.append(len(bins))
        return double["action_logprob"](model, inputs, bins, active)

    def load_double(*args):
        model, *rest = load_policy(*args)
        return model.double(), *rest

    monkeypatch.setattr(sta_tpo, "action_logprob", action_logprob)
    monkeypatch.setattr(sta_tpo, "load_policy", load_double)
    return sizes


def segment_rows(rollout: dict, k: int, stage_aware: bool) -> torch.Tensor:
    """(T,) bool: the steps of segment k."""
    stage = rollout["stage"]
    return (segment_stages(stage, 4) if stage_aware else 0 * stage) == k


def preference_loss(pairs, rollouts, ratios, reduction, stage_aware, blame) -> torch.Tensor:
    """The loss of sta_tpo.py's docstring with beta 2 and lambda 0.3, over all pairs.

    ratios: log pi - log pi_ref of the steps of each roll-out. reduction: "mean" or "sum".
    blame: how many of the last steps count of a loser that did not complete its stage; 0: all.
    """
    sides = []
    for side in ("chosen", "rejected"):
        values = []
        for pair in pairs:
            i = pair[side]
            steps = ratios[i][segment_rows(rollouts[i], pair["stage"], stage_aware)]
            if side == "rejected" and pair["reason"] == "completed" and blame:
                steps = steps[-blame:]
            values.append(getattr(steps, reduction)())
        values = torch.stack(values)
        costs = torch.tensor([pair[f"cost_{side}"] for pair in pairs])
        sides.append(values - 0.3 * costs)
    return -torch.nn.functional.logsigmoid(2 * (sides[0] - sides[1])).mean()


def mean_of_winners(pairs, rollouts, logps, stage_aware) -> torch.Tensor:
    """The mean over pairs of the mean of log pi over the winner's segment."""
    means = []
    for pair in pairs:
        i = pair["chosen"]
        means.append(logps[i][segment_rows(rollouts[i], pair["stage"], stage_aware)].mean())
    return torch.stack(means).mean()


@pytest.mark.parametrize(
    ("reduction", "cost", "stage_aware", "blame", "anchor"),
    [
        ("mean", "mean", True, 0, 0),
        ("sum", "sum", True, 0, 0.4),
        ("mean", "sum", True, 2, 0.4),
        ("mean", "mean", False, 3, 0),
    ],
)
def test_two_pass_gradient_is_that_of_plain_autograd(
    reduction, cost, stage_aware, blame, anchor, checkpoint, tmp_path, monkeypatch
):
    """The real main in fp64: two optimiser steps, each over all pairs.

    The chunks end inside segments, and no pass is longer than a chunk.
    """
    rollouts = invent_rollouts([11, 22])
    seen = record_steps(monkeypatch)
    sizes = use_doubles(monkeypatch)
    monkeypatch.setattr(sta_tpo, "collect_rollouts", lambda *args: [])
    monkeypatch.setattr(sta_tpo, "read_rollouts", lambda files: list(rollouts))
    flags = (
        "--batch-size 99 --chunk-size 7 --num-epochs 2 --beta 2 --cost-coef 0.3 "
        "--max-grad-norm 1e9 --learning-rate 1e-3 --num-eval-episodes 0 --no-cuda"
    ).split()
    flags += ["--tpo-reduction", reduction, "--cost", cost]
    flags += ["--blame-steps", str(blame), "--anchor-coef", str(anchor)]
    flags += ["--stage-aware" if stage_aware else "--no-stage-aware"]
    call(sta_tpo, "--checkpoint", checkpoint, "--output-dir", tmp_path / "run", *flags)

    # Memory is that of a chunk.
    assert max(sizes) == 7
    defaults = sta_tpo.Args()
    limits = (defaults.cost_margin, defaults.max_pairs_per_stage)
    pairs = sta_tpo.build_stage_pairs(rollouts, 4, *limits, stage_aware, cost)
    assert len(pairs) > 8 and {pair["reason"] for pair in pairs} == {"completed", "cost"}
    model, processor, _ = sta_tpo.load_policy(str(checkpoint), torch.device("cpu"))
    active = ~vla.constant_dims(STATS["action"])

    def logprobs(rollout):
        inputs = prompt(processor, rollout)
        return sta_tpo.action_logprob(model, inputs, rollout["bins"], active)[0]

    with torch.no_grad():
        reference = [logprobs(rollout) for rollout in rollouts]
    losses = scalars(tmp_path / "run")["losses/tpo_loss"]
    params = list(model.parameters())
    for step, (loss, (_, state)) in enumerate(zip(losses, seen, strict=True)):
        put_values(params, state)
        logps = [logprobs(rollout) for rollout in rollouts]
        ratios = [logp - ref for logp, ref in zip(logps, reference)]
        expected = preference_loss(pairs, rollouts, ratios, reduction, stage_aware, blame)
        (expected - anchor * mean_of_winners(pairs, rollouts, logps, stage_aware)).backward()
        assert loss == pytest.approx(expected.item(), abs=1e-5)
        mine = flat_gradient(params)
        theirs = torch.cat([grad.flatten() for _, grad in state])
        assert torch.linalg.vector_norm(mine - theirs) < 1e-6 * torch.linalg.vector_norm(mine)
        # The second step is away from the reference.
        assert step == 0 or max(abs(ratio).max() for ratio in ratios) > 0.1
