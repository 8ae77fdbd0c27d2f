"""The lean env against ManiSkill's own classes: equal to the bit, in every task."""

import numpy as np
import pytest
import torch
from conftest import needs_assets
from mani_skill.utils.geometry import rotation_conversions as rotations
from mani_skill.utils.structs.pose import Pose

from world import lean
from world.envs import StageEnv
from world.tasks import EVAL_SEED, TASKS

RIGHT = torch.zeros(1, dtype=torch.long)
# One task of each robot, and the one whose objects differ from episode to episode.
FAST = ("PickCube-v1", "PegInsertionSide-v1", "PutCarrotOnPlateInScene-v1")


# ---- rotations and poses ----
def random_pose(random: np.random.Generator) -> np.ndarray:
    """A position and a unit quaternion, (7,)."""
    pose = random.standard_normal(7).astype(np.float32)
    pose[3:] /= np.linalg.norm(pose[3:])
    return pose


def test_poses_are_maniskill_s_to_the_bit():
    random = np.random.default_rng(0)
    for _ in range(500):
        a = random_pose(random)
        b = random_pose(random)
        stock_a = Pose(torch.from_numpy(a)[None])
        stock_b = Pose(torch.from_numpy(b)[None])
        assert np.array_equal(lean.compose(a, b), (stock_a * stock_b).raw_pose[0])
        assert np.array_equal(lean.inverse(a), stock_a.inv().raw_pose[0])


def test_euler_angles_are_maniskill_s_to_the_bit():
    """Small turns, large ones, and turns about some axes alone: each branch of the square roots."""
    random = np.random.default_rng(0)
    branches = set()
    for _ in range(3000):
        size = random.choice([0.01, 0.1, 1, 3])
        angles = (size * random.standard_normal(3)).astype(np.float32)
        angles[random.random(3) < 0.2] = 0
        matrix = rotations.euler_angles_to_matrix(torch.from_numpy(angles)[None], "XYZ")
        stock = rotations.matrix_to_quaternion(matrix)[0]
        assert np.array_equal(lean.euler_quaternion(angles), stock)
        branches.add(int(stock.abs().argmax()))
    assert branches == {0, 1, 2, 3}


# ---- whole episodes ----
def tensors_in(x) -> list[torch.Tensor]:
    """All tensors of nested dicts, in the order of their names."""
    if isinstance(x, dict):
        return [tensor for name in sorted(x) for tensor in tensors_in(x[name])]
    return [torch.as_tensor(x).clone()]


def play(env: StageEnv) -> list[list[torch.Tensor]]:
    """Three episodes: the expert's, a disturbed one, and the first of the evaluation.

    Returns, after each step, what the env tells, the simulator's state, and what the stages read.
    """
    seen = []
    for seed in (0, 1, EVAL_SEED):
        env.reset(seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(env.task.max_episode_steps):
            action = env.expert_action(RIGHT)
            if seed == 1:
                # Some turns are then longer than the controller allows.
                action = action * (1 + torch.randn(action.shape, generator=generator))
            obs, reward, terminated, truncated, infos = env.step(action)
            told = [obs, infos, env.base.get_state_dict(), env.base.evaluate(), env.state]
            found = [tensor for part in told for tensor in tensors_in(part)]
            seen.append([*found, reward, terminated, truncated])
    return seen


@pytest.mark.parametrize("env_id", [needs_assets(name, name not in FAST) for name in TASKS])
def test_whole_episodes_are_the_stock_env_s_to_the_bit(env_id):
    stock = StageEnv(env_id, 1, "cpu", 0, full_meshes=True, render=False)
    light = StageEnv(env_id, 1, "cpu", 0, render=False)
    parts = light.base.agent.controller.controllers
    assert type(parts["arm"]) is lean.LeanArm
    assert type(parts["gripper"]) is lean.LeanFingers
    assert not isinstance(stock.base, lean.LeanEnv)
    expected = play(stock)
    found = play(light)
    assert len(found) == len(expected) == 3 * light.task.max_episode_steps
    for step_found, step_expected in zip(found, expected):
        assert len(step_found) == len(step_expected) > 20
        for a, b in zip(step_found, step_expected):
            assert torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
    stock.close()
    light.close()


# PegInsertionSide-v1's reward asks for a grasp within other limits.
@pytest.mark.parametrize("env_id", ["PickCube-v1", "PegInsertionSide-v1"])
def test_a_dense_reward_is_the_stock_env_s_to_the_bit(env_id):
    rewards = []
    for full_meshes in (True, False):
        env = StageEnv(env_id, 1, "cpu", 0, full_meshes=full_meshes, reward="dense", render=False)
        env.reset(seed=3)
        steps = [env.step(env.expert_action(RIGHT))[1] for _ in range(40)]
        rewards.append(torch.cat(steps))
        env.close()
    assert torch.equal(*rewards)
    assert rewards[0].std() > 0.03


# ---- what could go stale ----
def test_a_grasp_is_computed_once_per_step_and_again_after_a_state_is_put_back(monkeypatch):
    env = StageEnv("PickCube-v1", 1, "cpu", 0, render=False)
    env.reset(seed=0)
    computed = []
    compute = lean.LeanGrasp.compute_grasp

    def count(robot, object):
        computed.append(object)
        return compute(robot, object)

    monkeypatch.setattr(lean.LeanGrasp, "compute_grasp", count)
    held = []
    for _ in range(15):
        env.step(env.expert_action(RIGHT))
        held.append(bool(env.state["grasped"]))
    assert len(computed) == 15
    assert held[-1] and not held[0]
    # A caller may write into what it gets.
    env.base.agent.is_grasping(env.base.cube)[:] = False
    assert env.base.agent.is_grasping(env.base.cube)
    env.base.set_state_dict(env.base.get_state_dict())
    assert env.base.agent.is_grasping(env.base.cube)
    assert len(computed) == 16
    env.close()


def test_an_action_that_is_not_a_number_is_refused():
    env = StageEnv("PickCube-v1", 1, "cpu", 0, render=False)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="not a number"):
        env.step(torch.full((1, 7), torch.nan))
    env.close()
