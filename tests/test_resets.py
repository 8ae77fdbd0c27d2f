"""--stage-resets: episodes that begin in a later stage."""

import numpy as np
import pytest
import torch
from conftest import TASK, call

import sta_ppo
from world.resets import POOL_SIZE, StageResets
from world.tasks import TRAIN_SEEDS, UserError
from world.vector import ScriptedExpert, make_envs

K = len(TASK.stages)


def test_the_last_env_begins_where_another_entered_a_stage():
    envs = make_envs("PickCube-v1", 3, 0)
    resets = StageResets(envs, 1, seed=0)
    expert = ScriptedExpert(envs)
    obs, infos = resets.reset(7)
    # There is no such state yet.
    assert infos["elapsed_steps"].tolist() == [0, 0, 0]
    starts = []
    entered = {}
    # An episode that begins in success begins in its first stage.
    before = infos["stage"] % K
    for _ in range(60):
        actions = expert.act()
        for half in resets.halves:
            resets.send(half, actions[half])
        for half in resets.halves:
            obs, _, terminated, truncated, infos = resets.receive(half)
            done = terminated | truncated
            for j, i in enumerate(range(half.start, half.stop)):
                assert infos["seed"][j] < TRAIN_SEEDS
                stage = int(infos["stage"][j])
                key = (stage, *obs["proprio"][j].tolist())
                if done[j] and i == 2:
                    starts.append((stage, key, obs["rgb"][j].clone(), int(infos["seed"][j])))
                elif done[j]:
                    assert infos["elapsed_steps"][j] == 0
                elif stage > before[i]:
                    entered[key] = (obs["rgb"][j].clone(), int(infos["seed"][j]))
                before[i] = stage % K if done[j] else max(before[i], stage)
    envs.close()
    assert len(starts) >= 4
    assert {stage for stage, *_ in starts} <= {1, 2, 3} and len({stage for stage, *_ in starts}) > 1
    for _, key, rgb, seed in starts:
        kept, its_seed = entered[key]
        assert torch.equal(rgb, kept) and seed == its_seed


class NoEnvs:
    """Stands for envs of which only the numbers matter."""

    num_envs = 2
    num_stages = 3
    halves = [slice(0, 2)]

    def save_where(self, wanted):
        return [{"env": i} if w else None for i, w in enumerate(wanted)]

    def go_to(self, targets, obs, infos, first=0):
        self.targets = targets


def test_a_stage_that_is_seldom_completed_is_drawn_more_often():
    resets = StageResets(NoEnvs(), 1, seed=0)
    assert resets.draw() is None
    for k, (begun, completed) in enumerate([(9, 9), (10, 9), (10, 1)]):
        resets.begun[k] = begun
        resets.completed[k] = completed
    resets.pools[1].append({"stage": 1})
    resets.pools[2].append({"stage": 2})
    drawn = [resets.draw()["stage"] for _ in range(2000)]
    # The chances are 0.1 + 0.05 and 0.9 + 0.05.
    assert np.mean([k == 2 for k in drawn]) == pytest.approx(0.95 / 1.1, abs=0.03)


def test_what_is_counted_of_a_stage():
    resets = StageResets(NoEnvs(), 1, seed=0)
    both = slice(0, 2)
    yes, no = torch.ones(2, dtype=torch.bool), torch.zeros(2, dtype=torch.bool)
    resets.begin(both, yes, {}, {"stage": torch.tensor([0, 3])})
    # Env 0 skips a stage. Env 1 began in success, which counts as stage 0, and drops to it.
    resets.keep(both, torch.tensor([2, 0]), no)
    resets.keep(both, torch.tensor([1, 1]), no)
    # Success is no state to begin in.
    resets.keep(both, torch.tensor([3, 1]), torch.tensor([True, False]))
    assert resets.begun.tolist() == [2, 1, 1, 1]
    assert resets.completed.tolist() == [2, 0, 1]
    assert [len(pool) for pool in resets.pools] == [0, 1, 1]
    for _ in range(2 * POOL_SIZE):
        resets.furthest[:] = 0
        resets.keep(both, torch.tensor([1, 1]), no)
    assert len(resets.pools[1]) == POOL_SIZE
    # Only the last env moves.
    resets.begin(both, yes, {}, {"stage": torch.tensor([0, 1])})
    assert resets.envs.targets[0] is None and resets.envs.targets[1] is not None


def test_flags_that_do_not_go_together(checkpoint):
    for flags, what in (
        (("--stage-resets", 0.9, "--num-envs", 2), "one as usual"),
        (("--stage-resets", 0.1, "--num-envs", 2), "at least one"),
        (("--stage-resets", 0.5, "--reward", "dense"), "end at success"),
        (("--stage-resets", 0.5, "--stage-source", "learned"), "goes by the rules"),
    ):
        with pytest.raises(UserError, match=what):
            call(sta_ppo, "--checkpoint", checkpoint, "--no-cuda", *flags)
