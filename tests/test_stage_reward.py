"""The four forms of the stage reward, on the chain of states of benchmark/chain.py."""

import json
import sys

import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

import sta_ppo
from stare_utils import pace_rewards
from world.tasks import TASKS

sys.path.insert(0, str(ROOT / "benchmark"))
from chain import (
    END,
    FAR,
    GAMMA,
    PACE,
    WEIGHT,
    H,
    K,
    action_values,
    advantages,
    stage_reward,
    step,
    value,
    weak_policy,
)


# ---- what a policy that never succeeds is taught ----
def test_shaping_teaches_a_policy_that_never_succeeds_nothing():
    for x in range(END):
        assert value("shaping", x, 0, 0, FAR, True) == pytest.approx(-WEIGHT * x / 2, abs=1e-5)
        # The one move that it never makes would tell.
        expected = [0, 0, float(x == END - 1)]
        assert advantages("shaping", x) == pytest.approx(expected, abs=1e-5), x


def test_progress_teaches_it_to_go_on():
    for left in range(1, H + 1):
        for x in range(END - 1):
            qs = action_values("progress", x, 0, 0, left, weak=True)
            assert qs[1] > qs[0] >= qs[-1]
            assert qs[1] - value("progress", x, 0, 0, left, True) > 1e-3


def weak_chances() -> torch.Tensor:
    """The weak policy's transitions, (END + 1, END + 1)."""
    chances = torch.zeros(END + 1, END + 1, dtype=torch.float64)
    for x in range(END):
        for move, chance in weak_policy(x).items():
            chances[x, max(x + move, 0)] += chance
    return chances


def test_gain_teaches_it_to_go_on():
    for x in range(END - 1):
        back, stay, on = advantages("gain", x)
        assert on > max(stay, back, 0.01)


def test_gain_pays_the_potential_of_the_steps_ahead():
    """V = w * ((1 - gamma) * sum over t >= 1 of gamma^(t-1) * E[Phi_t] - Phi_0)."""
    chances = weak_chances()
    phi = torch.arange(END + 1, dtype=torch.float64) / 2
    ahead = torch.zeros_like(phi)
    for t in range(1, FAR + 1):
        ahead += (1 - GAMMA) * GAMMA ** (t - 1) * chances.matrix_power(t) @ phi
    for x in range(END):
        expected = WEIGHT * float(ahead[x] - phi[x])
        assert value("gain", x, 0, 0, FAR, True) == pytest.approx(expected, abs=1e-5)


def test_progress_pays_how_far_an_episode_has_come():
    """V = w * (gamma^left * E[Phi at the end] - Phi), for a policy that never succeeds."""
    chances = weak_chances()
    phi = torch.arange(END + 1, dtype=torch.float64) / 2
    for left in range(1, H + 1):
        expected = WEIGHT * (GAMMA**left * chances.matrix_power(left) @ phi - phi)
        for x in range(END):
            found = value("progress", x, 0, 0, left, True)
            assert found == pytest.approx(float(expected[x]), abs=1e-5)


def test_paced_teaches_it_to_complete_a_stage():
    for left in range(1, H + 1):
        for stage in range(K - 1):
            state = ("paced", 2 * stage + 1, stage, 4, left, True)
            qs = action_values(*state)
            assert qs[1] > max(qs[0], qs[-1])
            assert qs[1] - value(*state) > 1e-3


@pytest.mark.parametrize("form", ["shaping", "gain", "progress", "paced"])
def test_the_best_policy_of_the_chain_is_the_same_under_all_forms(form):
    for x in range(END):
        for steps in range(3):
            left = END - x if stage_reward(form).horizon_ends else FAR
            qs = action_values(form, x, x // 2, steps, left, weak=False)
            assert max(qs, key=qs.get) == 1, x


# ---- sums over an episode ----
def test_gains_add_up_to_the_way_made():
    """A way back costs what the way there paid."""
    path = [0, 1, 2, 1, 2, 3, 2, 1]
    paid = [step("gain", x, 0, 0, after - x)[0] for x, after in zip(path, path[1:])]
    assert sum(paid) == pytest.approx(WEIGHT * (path[-1] - path[0]) / 2, abs=1e-6)


@pytest.mark.parametrize("form", ["shaping", "progress"])
def test_discounted_sums_telescope(form):
    path = [0, 1, 2, 1, 2, 3, 4, 5, 6]
    total = 0.0
    for t, (x, after) in enumerate(zip(path, path[1:])):
        paid, *_ = step(form, x, 0, 0, after - x)
        total += GAMMA**t * (paid - (after == END))
    last_phi = K if form == "progress" else 0
    start_phi = path[0] / 2
    assert total == pytest.approx(
        WEIGHT * (GAMMA ** (len(path) - 1) * last_phi - start_phi), abs=1e-6
    )


def test_paced_pays_each_stage_once_by_its_pace():
    paying = stage_reward("paced")
    every = slice(0, 1)
    nothing = torch.zeros(1)
    # Two steps in stage 0, three in stage 1, a drop to stage 0, the way back, then success.
    stages = [0, 1, 1, 1, 0, 0, 1, 2, 3]
    paid = []
    for stage in stages:
        pay = paying(every, nothing, nothing, torch.tensor([stage]), nothing.bool())
        paid.append(float(pay))
    expected = [0.0] * len(stages)
    expected[1] = WEIGHT / (1 + 2 / 2)
    # Stage 1 was entered by step 1 and left upwards by step 7.
    expected[7] = WEIGHT / (1 + 6 / 3)
    expected[8] = WEIGHT / (1 + 1 / 4)
    assert paid == pytest.approx(expected)


def paced_by_hand(stages: list[int], first: int) -> list[float]:
    """The same in plain Python, from the episode's whole history."""
    paid = []
    for t, stage in enumerate(stages):
        before = [first, *stages[:t]]
        k = max(before)
        # The step that first led to stage k; -1 is the reset.
        entered = before.index(k) - 1
        completes = stage > k
        paid.append(WEIGHT / (1 + (t - entered) / PACE[k]) if completes else 0.0)
    return paid


@given(st.integers(0, K - 1), st.lists(st.integers(0, K), min_size=1, max_size=30))
def test_paced_is_what_its_definition_says(first, stages):
    # Nothing comes after success.
    if K in stages:
        stages = stages[: stages.index(K) + 1]
    paying = stage_reward("paced", num_envs=2)
    half = slice(1, 2)
    true = torch.ones(1, dtype=torch.bool)
    paying.begin(half, true, torch.tensor([first]))
    paid = []
    for stage in stages:
        phi = torch.zeros(1)
        paid.append(float(paying(half, phi, phi, torch.tensor([stage]), ~true)))
    assert paid == pytest.approx(paced_by_hand(stages, first))
    # A stage pays once, one that was skipped never, and the other env nothing.
    assert sum(pay > 0 for pay in paid) <= len(set(stages) | {first}) - 1
    assert int(paying.furthest[0]) == 0 and float(paying.steps[0]) == 0


def test_an_env_that_begins_again_owes_nothing_to_the_episode_before():
    paying = stage_reward("paced", num_envs=2)
    both = slice(0, 2)
    zeros = torch.zeros(2)
    for _ in range(3):
        paying(both, zeros, zeros, torch.tensor([1, 0]), zeros.bool())
    paying.begin(both, torch.tensor([True, False]), torch.tensor([0, 0]))
    paid = paying(both, zeros, zeros, torch.tensor([1, 1]), zeros.bool())
    assert paid.tolist() == pytest.approx([WEIGHT / (1 + 1 / 2), WEIGHT / (1 + 4 / 2)])


def test_one_number_per_env():
    one = torch.zeros(1)
    with pytest.raises(AssertionError, match="one number per env"):
        pace_rewards(torch.zeros(2, dtype=torch.long), one, one.long(), torch.ones(K), 1.0)


def test_the_pace_of_each_task_is_what_benchmark_expert_py_measured():
    rows = [json.loads(line) for line in (ROOT / "docs/expert.jsonl").read_text().splitlines()]
    measured = {row["env_id"]: row["stage_steps"] for row in rows if "stage_steps" in row}
    assert measured.keys() == TASKS.keys()
    for env_id, steps in measured.items():
        assert dict(zip(TASKS[env_id].stages, TASKS[env_id].pace, strict=True)) == steps


# ---- the critic's clock ----
def test_the_critic_sees_the_time_where_the_horizon_ends_the_task():
    info = {"elapsed_steps": torch.tensor([0, 5, 10])}
    assert stage_reward("paced", 3).clock(info).tolist() == [0, 0.5, 1]
    assert stage_reward("progress", 3).clock(info).tolist() == [0, 0.5, 1]
    assert stage_reward("shaping", 3).clock(info).tolist() == [0, 0, 0]
    head = sta_ppo.ValueHead(8)
    torch.nn.init.normal_(head.last.weight)
    torch.nn.init.normal_(head.clock_weight)
    hidden = torch.randn(8).expand(3, 8)
    assert len(head(hidden, torch.tensor([0.0, 0.5, 1.0])).unique()) == 3
