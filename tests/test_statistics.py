"""What the logs say about finished episodes, against numbers computed by hand."""

import math

import pytest
import torch

from stare_utils import Stage, shape_rewards
from world.statistics import EpisodeStatistics

# Two stages of L = 0.5 and L = 2. Success is stage 2.
STAGES = (
    Stage("reach", None, None, 0.5, None, None),
    Stage("place", None, None, 2.0, None, None),
)
K = len(STAGES)
KEYS = set(
    "charts/success_once charts/success_at_end charts/episodic_return charts/shaped_return "
    "charts/episodic_length charts/furthest_stage "
    "stage/0_reach_reached stage/0_reach_steps stage/0_reach_paid stage/0_reach_cost "
    "stage/1_place_reached stage/1_place_steps stage/1_place_paid stage/1_place_cost".split()
)
ONE = slice(0, 1)


def state(*envs: tuple[int, float, int]) -> dict:
    """Infos of states, one (stage, distance, elapsed steps) per env."""
    stage, distance, elapsed = zip(*envs)
    return {
        "stage": torch.tensor(stage),
        "stage_distance": torch.tensor(distance, dtype=torch.float32),
        "elapsed_steps": torch.tensor(elapsed),
    }


def no_end(n: int = 1) -> dict:
    """Infos of a step of n envs in which no episode ends."""
    return {"_final_info": torch.zeros(n, dtype=torch.bool)}


def end(*envs: tuple[int, bool, int] | None) -> dict:
    """Infos of a step, one (furthest stage, success, length) per env; None: its episode goes on."""
    ended = torch.tensor([env is not None for env in envs])
    furthest, success, length = zip(*(env or (0, False, 0) for env in envs))
    final = {
        "furthest_stage": torch.tensor(furthest),
        "success": torch.tensor(success),
        "elapsed_steps": torch.tensor(length),
    }
    return {"_final_info": ended, "final_info": final}


def pay(*rewards: float) -> torch.Tensor:
    return torch.tensor(rewards, dtype=torch.float32)


def step(statistics, half: slice, env_rewards, rewards, info: dict) -> None:
    """What the stage reward has paid is what is not the env's own."""
    statistics.step(half, env_rewards, rewards, rewards - env_rewards, info)


def quick_episode(statistics, half: slice, reward: float) -> None:
    """An episode of one step in the only env of `half`, which pays `reward`."""
    statistics.observe(half, state((0, 0.5, 0)))
    step(statistics, half, pay(reward), pay(reward), end((0, False, 1)))


def test_a_row_is_what_the_episode_did():
    statistics = EpisodeStatistics(STAGES, 1, gamma=0.5)
    statistics.begin_round(1)
    # d / L is 1 and 0.5 in "reach", and 0.5 in "place". Then the env succeeds and resets itself.
    statistics.observe(ONE, state((0, 0.5, 0)))
    step(statistics, ONE, pay(0), pay(0.1), no_end())
    statistics.observe(ONE, state((0, 0.25, 1)))
    step(statistics, ONE, pay(0), pay(0.2), no_end())
    statistics.observe(ONE, state((1, 1.0, 2)))
    step(statistics, ONE, pay(1), pay(0.8), end((2, True, 3)))
    # This state is of the next episode.
    statistics.observe(ONE, state((0, 5.0, 0)))
    (row,) = statistics.rows
    expected = {
        "charts/success_once": 1,
        "charts/success_at_end": 1,
        "charts/episodic_return": 1,
        "charts/shaped_return": 0.1 + 0.5 * 0.2 + 0.25 * 0.8,
        "charts/episodic_length": 3,
        "charts/furthest_stage": 2,
        "stage/0_reach_reached": 1,
        "stage/0_reach_steps": 2,
        "stage/0_reach_paid": 0.1 + 0.2,
        "stage/0_reach_cost": 0.75,
        "stage/1_place_reached": 1,
        "stage/1_place_steps": 1,
        "stage/1_place_paid": 0.8 - 1,
        "stage/1_place_cost": 0.5,
    }
    assert expected.keys() == KEYS
    assert row == pytest.approx(expected)
    assert all(type(value) is float for value in row.values())


def test_success_on_the_way_counts_as_success_once_and_as_no_stage():
    """Where an episode goes on after success, the states of success are in none of the stages."""
    statistics = EpisodeStatistics(STAGES, 1, gamma=1.0)
    statistics.begin_round(1)
    statistics.observe(ONE, state((1, 1.0, 0)))
    step(statistics, ONE, pay(1), pay(1), no_end())
    statistics.observe(ONE, state((2, 7.0, 1)))
    step(statistics, ONE, pay(0), pay(0), no_end())
    # The object has fallen back into the first stage.
    statistics.observe(ONE, state((0, 1.0, 2)))
    step(statistics, ONE, pay(0), pay(0), end((2, False, 3)))
    (row,) = statistics.rows
    assert row["charts/success_once"] == 1 and row["charts/success_at_end"] == 0
    assert row["stage/0_reach_steps"] == 1 and row["stage/0_reach_cost"] == 2
    assert row["stage/1_place_steps"] == 1 and row["stage/1_place_cost"] == 0.5
    assert row["stage/0_reach_reached"] == row["stage/1_place_reached"] == 1


def test_only_the_first_episodes_of_each_env_count():
    """Env 0 ends four episodes while env 1 ends one; two of each would count."""
    statistics = EpisodeStatistics(STAGES, 2, gamma=1.0)
    first, second = slice(0, 1), slice(1, 2)
    statistics.begin_round(2)
    statistics.observe(second, state((0, 0.5, 0)))
    for reward in (1, 2, 4, 8):
        quick_episode(statistics, first, reward)
        step(statistics, second, pay(10), pay(0), no_end())
        statistics.observe(second, state((1, 2.0, 1)))
    step(statistics, second, pay(10), pay(0), end((1, False, 5)))
    returns = [row["charts/episodic_return"] for row in statistics.rows]
    assert returns == [1, 2, 50]
    # Of env 1 all steps count, and none of env 0's.
    row = statistics.rows[-1]
    assert row["stage/0_reach_steps"] == 1 and row["stage/1_place_steps"] == 4
    assert row["stage/0_reach_reached"] == 1 and row["stage/1_place_reached"] == 0


def test_both_envs_of_a_half_may_end_in_one_step():
    """The half is the second one, so its first env is env 1."""
    statistics = EpisodeStatistics(STAGES, 3, gamma=1.0)
    half = slice(1, 3)
    statistics.begin_round(1)
    statistics.observe(half, state((0, 1.0, 0), (1, 1.0, 0)))
    step(statistics, half, pay(1, 2), pay(3, 4), end((0, False, 1), (1, False, 1)))
    returns = [row["charts/episodic_return"] for row in statistics.rows]
    shaped = [row["charts/shaped_return"] for row in statistics.rows]
    costs = [row["stage/0_reach_cost"] for row in statistics.rows]
    assert returns == [1, 2] and shaped == [3, 4]
    assert costs[0] == 2 and math.isnan(costs[1])
    # Their next episodes do not count any more, and env 0 still has its own to come.
    statistics.observe(half, state((0, 1.0, 0), (1, 1.0, 0)))
    step(statistics, half, pay(1, 2), pay(3, 4), end((0, False, 1), (1, False, 1)))
    assert len(statistics.rows) == 2
    quick_episode(statistics, ONE, 5)
    assert [row["charts/episodic_return"] for row in statistics.rows] == [1, 2, 5]


def test_a_round_begins_with_nothing():
    """What the unfinished episodes of the round before have collected is dropped, and its rows."""
    statistics = EpisodeStatistics(STAGES, 1, gamma=0.5)
    statistics.begin_round(1)
    quick_episode(statistics, ONE, 1)
    statistics.observe(ONE, state((0, 0.5, 0)))
    step(statistics, ONE, pay(100), pay(100), no_end())
    statistics.observe(ONE, state((1, 1.0, 1)))
    statistics.begin_round(1)
    assert statistics.rows == []
    quick_episode(statistics, ONE, 2)
    (row,) = statistics.rows
    assert row["charts/episodic_return"] == row["charts/shaped_return"] == 2
    assert row["stage/0_reach_steps"] == 1 and row["stage/1_place_steps"] == 0


def test_a_run_resumed_in_the_middle_of_a_round_waits_for_the_next():
    statistics = EpisodeStatistics(STAGES, 1, gamma=1.0)
    statistics.begin_round(0)
    quick_episode(statistics, ONE, 1)
    quick_episode(statistics, ONE, 1)
    assert statistics.rows == []
    statistics.begin_round(1)
    quick_episode(statistics, ONE, 1)
    quick_episode(statistics, ONE, 1)
    assert len(statistics.rows) == 1


@pytest.mark.parametrize(("round_size", "rounds"), [(100, 1), (40, 3), (250, 1), (1, 100)])
def test_means_are_over_whole_rounds_enough_for_100_episodes(round_size, rounds):
    statistics = EpisodeStatistics(STAGES, 1, gamma=1.0)
    assert statistics.means() == {}
    num_rounds = rounds + 2
    for r in range(num_rounds):
        rows = [{"x": float(r)} for _ in range(round_size)]
        # Two processes have ended one round together.
        share = round_size // 3
        statistics.end_round([rows[:share], rows[share:]], round_size)
        latest = list(range(r + 1))[-rounds:]
        assert len(statistics.recent) == round_size * len(latest)
        assert statistics.means() == pytest.approx({"x": sum(latest) / len(latest)})


def test_a_stage_that_was_never_entered_has_no_cost():
    """Its cost is NaN in the row. The mean is over the other episodes, or missing without any."""
    statistics = EpisodeStatistics(STAGES, 1, gamma=1.0)
    statistics.begin_round(3)
    quick_episode(statistics, ONE, 0)
    row = statistics.rows[0]
    assert math.isnan(row["stage/1_place_cost"]) and row["stage/1_place_steps"] == 0
    assert row["stage/0_reach_cost"] == 1
    statistics.end_round([statistics.rows], 1)
    means = statistics.means()
    assert means.keys() == KEYS - {"stage/1_place_cost"}
    assert means["stage/1_place_steps"] == 0

    statistics.observe(ONE, state((1, 1.0, 0)))
    step(statistics, ONE, pay(0), pay(0), end((1, False, 1)))
    statistics.observe(ONE, state((1, 3.0, 0)))
    step(statistics, ONE, pay(0), pay(0), end((1, False, 1)))
    assert len(statistics.rows) == 3
    statistics.end_round([statistics.rows[1:]], 1)
    means = statistics.means()
    # 0.5 and 1.5 of the last two episodes; "reach" has the first one's cost alone.
    assert means["stage/1_place_cost"] == 1 and means["stage/0_reach_cost"] == 1
    assert means["stage/1_place_steps"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("won", [False, True])
def test_the_shaped_return_telescopes(won):
    """The stage reward adds w * (gamma^T * Phi at the end - Phi at the start) to an episode.

    Phi at the end is 0 where the episode ends in success. The first episode begins with the round,
    the second where the first one has ended: its discount begins again at 1.
    """
    gamma, weight, T = 0.9, 0.25, 6
    g = torch.Generator().manual_seed(3)
    statistics = EpisodeStatistics(STAGES, 2, gamma)
    statistics.begin_round(2)
    both = slice(0, 2)
    expected = []
    for _ in range(2):
        phi = 2 * torch.rand(T + 1, 2, generator=g)
        paid = torch.rand(T, 2, generator=g)
        terminated = torch.zeros(T, 2, dtype=torch.bool)
        terminated[-1] = won
        shaped = shape_rewards(paid, phi[:-1], phi[1:], terminated, gamma, weight)
        for t in range(T):
            statistics.observe(both, state((0, 0.1, t), (1, 0.1, t)))
            info = no_end(2)
            if t == T - 1:
                info = end((1, won, T), (1, won, T))
            step(statistics, both, paid[t], shaped[t], info)
        discounts = gamma ** torch.arange(T)
        own = (discounts[:, None] * paid).sum(0)
        final = torch.zeros(2) if won else gamma**T * phi[-1]
        expected += (own + weight * (final - phi[0])).tolist()
    found = [row["charts/shaped_return"] for row in statistics.rows]
    assert found == pytest.approx(expected, abs=1e-5)
