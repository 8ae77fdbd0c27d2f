"""benchmark/point_mass.py and state_policy.py: the test beds play what they say."""

import sys

import pytest
import torch
from conftest import ROOT, output_of

sys.path.insert(0, str(ROOT / "benchmark"))
import point_mass
import state_policy

import sta_ppo
from world.tasks import get_task
from world.vector import make_envs

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


@pytest.mark.slow
def test_a_roll_out_of_a_real_task_has_the_value_of_the_true_next_state():
    task = get_task("PushCube-v1")
    args = sta_ppo.Args(stage_reward="gain", num_envs=2, gamma=0.97)
    paying = sta_ppo.StageReward(args, task, 0.5, torch.device("cpu"))
    torch.manual_seed(1)
    envs = make_envs("PushCube-v1", 2, 0, render=False)
    states, labels = state_policy.demonstrations(envs, num_demos=3, seed=1)
    assert len(states) == len(labels) > 3 and labels.shape[1] == 7
    agent = point_mass.Agent(point_mass.fit(states, labels, num_updates=300), -2.0)
    agent.critic[-1].weight.data.normal_()
    rollout = state_policy.Rollout(envs, agent, paying, seed=1)
    rows, completed = rollout.play()
    envs.close()
    _, _, _, value, reward, next_value, terminated, done = rows
    assert value.shape == reward.shape == (state_policy.T, 2)
    ended = done[:-1]
    assert torch.allclose(next_value[:-1][~ended], value[1:][~ended], atol=1e-5)
    assert not torch.isclose(next_value[:-1][ended], value[1:][ended]).any()
    assert len(completed) == int(done.sum()) >= 4
    # The last stage is completed by success alone, and a stage only after the one before.
    assert sum(stages[-1] for stages in completed) == int(terminated.sum())
    assert all(stages == sorted(stages, reverse=True) for stages in completed)


@pytest.mark.slow
def test_the_state_policy_prints_the_stages_as_it_learns():
    flags = "--env-id PushCube-v1 --stage-reward sparse --num-demos 2 --num-envs 2"
    out = output_of("benchmark/state_policy.py", *flags.split(), "--num-steps", 1600, cwd=ROOT)
    name, shares = out.splitlines()[0].split(" step 1600 ")
    assert name == "PushCube-v1 sparse lambda 0.95 seed 1" and len(shares.split()) == 2
