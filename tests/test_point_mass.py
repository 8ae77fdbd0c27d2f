"""benchmark/point_mass.py: its expert solves the task, and the stages describe it."""

import sys

import pytest
import torch
from conftest import ROOT, output_of

sys.path.insert(0, str(ROOT / "benchmark"))
import point_mass

import sta_ppo

K = point_mass.K


@pytest.fixture
def env():
    torch.manual_seed(1)
    return point_mass.PointMass(64)


def test_the_expert_solves_it_stage_by_stage(env):
    stages = [env.signals()[0]]
    solved = torch.zeros(64, dtype=torch.bool)
    for _ in range(point_mass.HORIZON):
        env.step(env.expert())
        stage, potential, success = env.signals()
        solved |= success
        stages.append(stage)
        assert torch.equal(potential[success], torch.full_like(potential[success], K))
    assert solved.float().mean() > 0.95
    seen = torch.stack(stages)
    for k in range(K):
        assert (seen == k).any(0).float().mean() > 0.7, k


def test_a_reset_changes_its_envs_alone(env):
    env.step(env.expert())
    before = env.observe()
    which = torch.arange(64) < 8
    env.reset(which)
    same = (env.observe() == before).all(1)
    assert torch.equal(same, ~which)
    assert env.elapsed.tolist() == [0] * 8 + [1] * 56


@pytest.mark.parametrize("form", ["gain", "paced"])
def test_a_roll_out_has_the_value_of_the_true_next_state(env, form):
    """The values of a state are the next values of the step before, except at an episode's end."""
    args = sta_ppo.Args(stage_reward=form, num_envs=64, gamma=0.97)
    paying = sta_ppo.StageReward(args, point_mass.TASK, 1 / K, torch.device("cpu"))
    agent = point_mass.Agent(point_mass.clone(4), -1.4)
    agent.critic[-1].weight.data.normal_()
    (x, _, _, value, _, next_value, terminated, done), successes = point_mass.roll_out(
        env, agent, paying
    )
    goes_on = ~done[:-1]
    assert torch.allclose(next_value[:-1][goes_on], value[1:][goes_on], atol=1e-5)
    assert len(successes) == int(done.sum()) >= 2 * 64
    # Under paced the horizon ends the task.
    assert torch.equal(terminated, done) == (form == "paced")
    assert x[..., -1].any() == (form == "paced")


def test_prints_success_as_it_learns():
    flags = "--stage-reward sparse --num-steps 50000"
    out = output_of("benchmark/point_mass.py", *flags.split(), cwd=ROOT)
    assert "sparse seed 1 step 51200 success 0.0" in out
