"""Closed forms: advantages, the preference loss and its pairs, the gradients of imitation and of the two passes."""
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
from stare_utils import shape_rewards

GAMMA, LAMBDA, T, N = 0.9, 0.8, 9, 40


def rollout(seed=0):
    """Rewards, values, values of the true next states, terminated, done: (T, N) of doubles and bools with both kinds of ending."""
    g = torch.Generator().manual_seed(seed)
    rewards, values, next_values = (torch.randn(T, N, generator=g, dtype=torch.double) for _ in range(3))
    ending = torch.rand(T, N, generator=g)
    terminated, done = ending < 0.15, ending < 0.3
    next_values[:-1] = torch.where(done[:-1], next_values[:-1], values[1:])
    return rewards, values, next_values, terminated, done


def test_gae_is_the_lambda_mean_of_n_step_advantages():
    rewards, values, next_values, terminated, done = rollout()
    assert terminated.any() and (done & ~terminated).any()
    advantages, returns = sta_ppo.compute_gae(rewards, values, next_values, terminated, done, GAMMA, LAMBDA)
    for n in range(N):
        for t in range(T):
            horizon = next((u for u in range(t, T) if done[u, n]), T - 1) - t + 1  # steps to the episode's or the roll-out's end
            step_advantages = []
            for h in range(1, horizon + 1):
                bootstrap = 0 if terminated[t + h - 1, n] else GAMMA**h * next_values[t + h - 1, n]
                step_advantages.append(sum(GAMMA**i * rewards[t + i, n] for i in range(h)) + bootstrap - values[t, n])
            expected = LAMBDA ** (horizon - 1) * step_advantages[-1] + (1 - LAMBDA) * sum(LAMBDA**h * a for h, a in enumerate(step_advantages[:-1]))
            assert advantages[t, n].item() == pytest.approx(float(expected), abs=1e-12)
    assert torch.equal(returns, advantages + values)


def test_a_termination_has_no_future_and_a_truncation_has_one():
    one, two, half = torch.tensor([[1.0]]), torch.tensor([[2.0]]), torch.tensor([[0.5]])
    true, false = torch.tensor([[True]]), torch.tensor([[False]])
    assert sta_ppo.compute_gae(one, half, two, true, true, GAMMA, LAMBDA)[0].item() == pytest.approx(1 - 0.5)
    assert sta_ppo.compute_gae(one, half, two, false, true, GAMMA, LAMBDA)[0].item() == pytest.approx(1 + GAMMA * 2 - 0.5)


def test_no_advantage_leaks_across_an_episode_border():
    rewards, values, next_values, terminated, done = rollout()
    before = sta_ppo.compute_gae(rewards, values, next_values, terminated, done, GAMMA, LAMBDA)[0]
    border = done.double().argmax(0)  # the first ending of each env
    later = torch.arange(T)[:, None] > border
    after = sta_ppo.compute_gae(rewards + later * 100, values - later * 7, next_values + later * 3, terminated, done, GAMMA, LAMBDA)[0]
    earlier = ~later & done.any(0)
    assert torch.equal(after[earlier], before[earlier]) and not torch.equal(after, before)


def test_shaping_with_a_critic_that_knows_the_potential_changes_no_advantage():
    rewards, values, next_values, terminated, done = rollout()
    potentials, next_potentials, *_ = rollout(seed=1)
    shaped = shape_rewards(rewards, potentials, next_potentials, terminated, GAMMA, 0.25)
    plain = sta_ppo.compute_gae(rewards, values, next_values, terminated, done, GAMMA, LAMBDA)[0]
    other = sta_ppo.compute_gae(shaped, values - 0.25 * potentials, next_values - 0.25 * next_potentials, terminated, done, GAMMA, LAMBDA)[0]
    assert torch.allclose(plain, other)


@pytest.mark.parametrize("which", range(5))
def test_gae_refuses_shapes_that_would_broadcast(which):
    inputs = list(rollout())
    inputs[which] = inputs[which][0]
    with pytest.raises(AssertionError):
        sta_ppo.compute_gae(*inputs, GAMMA, LAMBDA)


def test_advantages_are_normalised_over_the_buffer_or_within_each_stage():
    advantages, stages = torch.randn(500) * 3 + 5, torch.randint(0, 4, (500,))
    stages[0] = 9  # a stage of one step has no deviation
    whole, by_stage = sta_ppo.normalize(advantages, None), sta_ppo.normalize(advantages, stages)
    groups = [whole] + [by_stage[stages == k] for k in range(4)]
    assert all(abs(group.mean()) < 1e-5 and abs(group.std() - 1) < 1e-5 for group in groups) and by_stage[0] == 0
    assert torch.equal(whole.argsort(), advantages.argsort())


def test_value_head_begins_at_zero():
    assert (sta_ppo.ValueHead(16)(torch.randn(5, 16)) == 0).all()


def test_tpo_loss_is_ln_2_where_both_are_equal():
    zero, cost = torch.zeros(5), torch.rand(5)
    loss, chosen, rejected = sta_tpo.sta_tpo_loss(zero, zero, cost, torch.rand(5), beta=0.7, cost_coef=0.0)
    assert torch.allclose(loss, torch.full((5,), math.log(2))) and (chosen == 0).all() and (rejected == 0).all()
    assert torch.allclose(sta_tpo.sta_tpo_loss(zero + 3, zero + 3, cost, cost, 0.7, 0.1)[0], torch.full((5,), math.log(2)))


def test_tpo_loss_by_hand():
    loss, chosen, rejected = sta_tpo.sta_tpo_loss(*(torch.tensor([x]) for x in (0.3, -0.1, 0.2, 0.5)), beta=2.0, cost_coef=0.1)
    assert chosen.item() == pytest.approx(2 * (0.3 - 0.02)) and rejected.item() == pytest.approx(2 * (-0.1 - 0.05))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.86)))


def test_tpo_gradient_raises_the_chosen_and_lowers_the_rejected():
    q_chosen, q_rejected = torch.randn(6, requires_grad=True), torch.randn(6, requires_grad=True)
    loss, chosen, rejected = sta_tpo.sta_tpo_loss(q_chosen, q_rejected, torch.rand(6), torch.rand(6), beta=0.5, cost_coef=0.1)
    loss.sum().backward()
    weight = 0.5 * torch.sigmoid(rejected - chosen)
    assert torch.allclose(q_chosen.grad, -weight) and torch.allclose(q_rejected.grad, weight)


def test_tpo_loss_refuses_shapes_that_would_broadcast():
    with pytest.raises(AssertionError):
        sta_tpo.sta_tpo_loss(torch.zeros(3), torch.zeros(3, 1), torch.zeros(3), torch.zeros(3), 1.0, 0.1)


K = 3
ROLLOUTS = st.lists(
    st.tuples(st.integers(0, 2), st.lists(st.tuples(st.integers(0, K - 1), st.floats(0, 3)), min_size=1, max_size=8), st.booleans()), min_size=1, max_size=8
).map(lambda rows: [{"init_seed": seed, "stage": torch.tensor([s for s, _ in steps]), "distance": torch.tensor([d for _, d in steps], dtype=torch.double),
                     "success": success} for seed, steps, success in rows])  # fmt: skip


def describe(rollout, stage_aware=True):
    """(stages finished, mean distance per segment), in plain Python."""
    if not stage_aware:
        return int(rollout["success"]), {0: rollout["distance"].mean().item()}
    furthest, steps = 0, {}
    for stage, distance in zip(rollout["stage"].tolist(), rollout["distance"].tolist()):
        furthest = max(furthest, stage)
        steps.setdefault(furthest, []).append(distance)
    return K if rollout["success"] else furthest, {k: sum(d) / len(d) for k, d in steps.items()}


@given(ROLLOUTS, st.floats(0, 1), st.booleans())
def test_pairs_are_exactly_those_of_the_definition(rollouts, margin, stage_aware):
    pairs = sta_tpo.build_stage_pairs(rollouts, K, cost_margin=margin, stage_aware=stage_aware)
    assert all(rollouts[pair["chosen"]]["init_seed"] == rollouts[pair["rejected"]]["init_seed"] for pair in pairs)
    expected = set()
    for i, j in combinations(range(len(rollouts)), 2):
        (done_i, cost_i), (done_j, cost_j) = describe(rollouts[i], stage_aware), describe(rollouts[j], stage_aware)
        for k in range(K if stage_aware else 1):
            if rollouts[i]["init_seed"] != rollouts[j]["init_seed"] or min(done_i, done_j) < k or k not in cost_i or k not in cost_j:
                continue  # another initial state, or one never came here, or skipped it
            if (done_i > k) != (done_j > k):
                expected.add((k, i, j, "completed") if done_i > k else (k, j, i, "completed"))
            elif done_i > k and abs(cost_i[k] - cost_j[k]) > margin + 1e-9:
                expected.add((k, i, j, "cost") if cost_i[k] < cost_j[k] else (k, j, i, "cost"))
    found = {(pair["stage"], pair["chosen"], pair["rejected"], pair["reason"]) for pair in pairs}
    assert len(found) == len(pairs)
    assert {pair for pair in found ^ expected if abs(abs(cost_gap(rollouts, pair, stage_aware)) - margin) > 1e-9} == set()


def cost_gap(rollouts, pair, stage_aware):
    k, chosen, rejected, _ = pair
    return describe(rollouts[chosen], stage_aware)[1][k] - describe(rollouts[rejected], stage_aware)[1][k]


def test_who_lingers_near_the_goal_wins_by_the_mean_and_loses_by_the_sum():
    slow, quick = [0.8, 0.4, 0.1, 0.1, 0.1, 0.1, 0.1], [0.8, 0.4, 0.1]
    rollouts = [{"init_seed": 0, "stage": torch.tensor([0] * len(d) + [1]), "distance": torch.tensor([*d, 0.0]), "success": True} for d in (slow, quick)]
    for cost_sum, winner, costs in ((False, 0, (1.7 / 7, 1.3 / 3)), (True, 1, (1.3, 1.7))):
        first, *_ = sta_tpo.build_stage_pairs(rollouts, 2, cost_margin=0.1, cost_sum=cost_sum)
        assert (first["stage"], first["reason"], first["chosen"]) == (0, "cost", winner)
        assert (first["cost_chosen"], first["cost_rejected"]) == pytest.approx(costs)


@given(ROLLOUTS, st.integers(1, 3))
def test_few_pairs_are_kept_per_state_and_stage_completions_first_then_the_widest_gaps(rollouts, most):
    every, kept = (sta_tpo.build_stage_pairs(rollouts, K, max_pairs_per_stage=limit) for limit in (10**9, most))
    for group in {(rollouts[pair["chosen"]]["init_seed"], pair["stage"]) for pair in every}:
        of_group = [[p for p in pairs if (rollouts[p["chosen"]]["init_seed"], p["stage"]) == group] for pairs in (every, kept)]
        order = [[(p["reason"] != "completed", p["cost_chosen"] - p["cost_rejected"]) for p in pairs] for pairs in of_group]
        assert order[1] == sorted(order[0])[:most]


def test_imitation_s_gradients_are_those_of_plain_autograd(checkpoint, tmp_path, monkeypatch):
    """The real main: three updates against the docstring's loss, written anew; and what it logs about them."""
    demos, seen, blurred, blur_bins, lengths = write_demos(tmp_path / "demos.h5"), record_steps(monkeypatch), [], vla.blur_bins, (6, 9)
    with h5py.File(demos, "a") as file:
        for i, length in enumerate(lengths):
            file[f"traj_{i}/stage"] = np.arange(length) % 4

    monkeypatch.setattr(vla, "blur_bins", lambda *args: [blurred.append(blur_bins(*args)), blurred[-1].clone()][1])
    call(sft, "--demo-path", demos, "--vla", checkpoint, "--num-updates", 3, "--batch-size", 8, "--aux-coef", 3, "--max-grad-norm", 1e9, "--seed", 5,
         "--label-jitter", 20, "--num-eval-episodes", 0, "--no-cuda", "--output-dir", tmp_path / "run")  # fmt: skip
    assert [rates for rates, _ in seen] == [pytest.approx([1e-5 * (step + 1), 1e-3]) for step in range(3)]  # warm-up; the separator's own
    (model, processor, _), rows = sft.load_policy(str(checkpoint), torch.device("cpu")), []
    rgb, proprio, actions, where, stages = sft.read_demos(demos, "PickCube-v1", 9)
    labels, active = vla.tokenize_actions(actions, STATS["action"]), ~vla.constant_dims(STATS["action"])
    aux, separator = torch.nn.Linear(64, 8), torch.nn.Linear(64, 4)
    params = [*model.parameters(), *aux.parameters(), *separator.parameters()]
    for step, (_, state) in enumerate(seen):
        for p, (value, _) in zip(params, state, strict=True):
            p.data.copy_(value)
            p.grad = None
        index = torch.randint(15, (8,), generator=torch.Generator().manual_seed(5 * 1_000_003 + step))
        bins = torch.cat([blurred[step][:, :-1], labels[index, -1:]], 1)  # the gripper's label stays
        assert (bins != labels[index])[:, active].any(0).tolist() == [True] * 4 + [False]
        inputs = prompt(processor, {"rgb": rgb[index], "proprio": proprio[index]})
        logprob, _, hidden, greedy = sft.action_logprob(model, inputs, bins, active)
        ce = -logprob.mean() / 5  # of seven dimensions two never vary
        gap = (aux(hidden) - where[index] / 0.1).abs()
        aux_loss = torch.where(gap < 1, gap**2 / 2, gap - 0.5).mean()
        read = separator(hidden.detach()).log_softmax(-1)
        (ce + 3 * aux_loss - read[torch.arange(8), stages[index]].mean()).backward()
        mine, theirs = (torch.cat([grad.flatten() for grad in grads]) for grads in ([p.grad for p in params], [grad for _, grad in state]))
        assert (mine - theirs).norm() < 1e-4 * mine.norm(), step
        right, near = (greedy == labels[index])[:, active].float().mean(), (greedy - labels[index])[:, active].abs().float().mean() * 2 / 255
        policy = torch.cat([p.grad.flatten() for p in params[:-2]]).norm()
        rows.append(torch.stack([ce, aux_loss, right, near, (read.argmax(-1) == stages[index]).float().mean(), policy]).detach())
    curves, names = scalars(tmp_path / "run"), ("ce", "aux", "token_accuracy", "action_l1", "stage_accuracy", "grad_norm")
    assert [curves[f"losses/{name}"][0] for name in names] == pytest.approx(torch.stack(rows).mean(0).tolist(), rel=1e-3)


@pytest.mark.parametrize(("reduction", "sign", "stage_aware"), [("mean", -1, True), ("sum", 1, True), ("mean", -1, False)])
def test_two_pass_gradient_is_that_of_plain_autograd(reduction, sign, stage_aware, checkpoint, tmp_path, monkeypatch):
    """The real main in fp64, two optimiser steps over all pairs, with chunks that end inside segments and no pass longer than a chunk."""
    rollouts, seen, sizes, load_policy, double = invent_rollouts([11, 22]), record_steps(monkeypatch), [], sta_tpo.load_policy, dict(vars(sta_tpo))
    exec(inspect.getsource(sta_tpo.action_logprob).replace(".float()", ".double()"), double)

    def action_logprob(model, inputs, bins, active):
        sizes.append(len(bins))
        return double["action_logprob"](model, inputs, bins, active)

    def load_double(*args):
        model, *rest = load_policy(*args)
        return model.double(), *rest

    monkeypatch.setattr(sta_tpo, "action_logprob", action_logprob)
    monkeypatch.setattr(sta_tpo, "load_policy", load_double)
    monkeypatch.setattr(sta_tpo, "collect_rollouts", lambda *args: [])
    monkeypatch.setattr(sta_tpo, "read_rollouts", lambda folder: list(rollouts))
    call(sta_tpo, "--checkpoint", checkpoint, "--output-dir", tmp_path / "run", "--batch-size", 99, "--chunk-size", 7, "--num-epochs", 2, "--beta", 2,
         "--cost-coef", 0.3, "--max-grad-norm", 1e9, "--learning-rate", 1e-3, "--num-eval-episodes", 0, "--no-cuda", "--tpo-reduction", reduction,
         "--cost-sign", sign, "--stage-aware" if stage_aware else "--no-stage-aware")  # fmt: skip

    assert max(sizes) == 7  # memory is that of a chunk
    pairs = sta_tpo.build_stage_pairs(rollouts, 4, sta_tpo.Args().cost_margin, sta_tpo.Args().max_pairs_per_stage, stage_aware)
    assert len(pairs) > 8 and {pair["reason"] for pair in pairs} == {"completed", "cost"}
    model, processor, _ = sta_tpo.load_policy(str(checkpoint), torch.device("cpu"))
    active = ~vla.constant_dims(STATS["action"])

    def logprobs(rollout):
        return sta_tpo.action_logprob(model, prompt(processor, rollout), rollout["bins"], active)[0]

    with torch.no_grad():
        reference = [logprobs(rollout) for rollout in rollouts]
    assert reference[0].dtype == torch.double
    for (step, loss), (_, state) in zip(enumerate(scalars(tmp_path / "run")["losses/tpo_loss"]), seen, strict=True):
        for p, (value, _) in zip(model.parameters(), state, strict=True):
            p.data.copy_(value)
        model.zero_grad()
        ratio = [logprobs(rollout) - ref for rollout, ref in zip(rollouts, reference)]
        segments = [sta_tpo.segment_stages(r["stage"], 4) if stage_aware else 0 * r["stage"] for r in rollouts]
        q = {(i, k): getattr(ratio[i][segments[i] == k], reduction)() for i in range(len(rollouts)) for k in range(4)}
        inputs = [torch.stack([q[pair[side], pair["stage"]] for pair in pairs]) for side in ("chosen", "rejected")]
        costs = [torch.tensor([pair[f"cost_{side}"] for pair in pairs]) for side in ("chosen", "rejected")]
        expected = -torch.nn.functional.logsigmoid(2 * (inputs[0] - inputs[1] + sign * 0.3 * (costs[0] - costs[1]))).mean()
        expected.backward()
        assert loss == pytest.approx(expected.item(), abs=1e-5)
        grads = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in model.parameters()])
        assert torch.linalg.vector_norm(grads - torch.cat([g.flatten() for _, g in state])) < 1e-6 * torch.linalg.vector_norm(grads)
        assert step == 0 or max(abs(r).max() for r in ratio) > 0.1  # the second step is away from the reference
