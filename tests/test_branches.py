"""One state, again and again: StageEnv.save and restore, and what --branch samples from it."""

import pytest
import torch
from conftest import ROOT, STATS, TASK, call, output_of

import sta_tpo
import vla
from stare_utils import segment_stages
from world.envs import StageEnv
from world.tasks import UserError, get_task
from world.vector import ScriptedExpert, make_envs

K = len(TASK.stages)
CPU = torch.device("cpu")
NO_SLIP = torch.zeros(1, dtype=torch.long)
# Task, step, whether the object is held there. No finger closes or lets go in the ten steps after.
STATES = [
    ("PickCube-v1", 2, False),
    ("PickCube-v1", 14, True),
    ("StackCube-v1", 20, True),
    ("LiftPegUpright-v1", 14, True),
    ("PushCube-v1", 4, False),
]


def play(env: StageEnv, actions: list[torch.Tensor] | None) -> tuple[list, list]:
    """Ten steps, of the expert or with given actions. Returns the actions, and what happened."""
    played = []
    seen = []
    for t in range(10):
        action = actions[t] if actions else env.expert_action(NO_SLIP)
        _, _, terminated, truncated, infos = env.step(action)
        played.append(action)
        done = terminated | truncated
        last = infos["final_info"] if done else infos
        places = torch.cat([env.state["object"], env.state["tool"]], -1)
        seen.append((bool(terminated), bool(truncated), int(last["stage"]), places))
        if done:
            break
    return played, seen


@pytest.mark.parametrize(("env_id", "step", "held"), STATES)
def test_a_state_comes_back_in_another_env(env_id, step, held):
    first = StageEnv(env_id, 1, "cpu", 0, max_episode_steps=step + 8)
    other = StageEnv(env_id, 1, "cpu", 5, max_episode_steps=step + 8)
    obs, infos = first.reset(3)
    for _ in range(step):
        obs, _, _, _, infos = first.step(first.expert_action(NO_SLIP))
    assert bool(first.state["grasped"]) == held
    saved = first.save()
    actions, seen = play(first, None)
    for env in (other, first, other):
        again, known = env.restore(saved)
        assert all(torch.equal(again[name], obs[name]) for name in obs)
        assert known.keys() == infos.keys() - {"_final_info"}
        assert all(torch.equal(known[name], infos[name]) for name in known)
        # The picture of the simulator's state, not the one that was kept.
        drawn = env.observation(env.base.get_obs(env.base.get_info()))
        assert (drawn["rgb"].int() - obs["rgb"].int()).abs().max() <= 1
        assert torch.allclose(drawn["proprio"], obs["proprio"], atol=1e-6)
        _, comes = play(env, actions)
        assert len(comes) == len(seen)
        for (*before, places), (*after, places_again) in zip(seen, comes):
            assert before == after
            # Where an episode has ended, the next one has begun elsewhere.
            assert before[0] or before[1] or (places - places_again).abs().max() < 1e-4
    first.close()
    other.close()


def test_a_restored_state_is_the_same_each_time_to_the_bit():
    env = StageEnv("StackCube-v1", 1, "cpu", 0, render=False)
    env.reset(3)
    for _ in range(14):
        env.step(env.expert_action(NO_SLIP))
    saved = env.save()
    actions, _ = play(env, None)
    runs = []
    for seed in (None, 9, None):
        # Other sizes are another scene, which is built again.
        if seed:
            env.reset(seed)
        env.restore(saved)
        runs.append(play(env, actions)[1])
    for run in runs[1:]:
        for (*a, places), (*b, places_again) in zip(runs[0], run, strict=True):
            assert a == b and torch.equal(places, places_again)
    env.close()


# ---- branches ----
@pytest.fixture(scope="module")
def trees():
    """The trees of three initial states, of an expert whose actions are noisy."""
    envs = make_envs("PickCube-v1", 2, 0)
    expert = ScriptedExpert(envs)
    generator = torch.Generator().manual_seed(0)

    def act(model, inputs, active):
        actions = expert.act()
        # Every other action is noisy, because success needs an arm at rest.
        noisy = torch.rand(len(actions), 1, generator=generator) < 0.5
        actions = actions + 0.8 * noisy * torch.randn(actions.shape, generator=generator)
        return vla.tokenize_actions(actions, STATS["action"]), None, None

    class Codec:
        device = CPU

        def inputs(self, obs):
            return {}

        def actions(self, bins):
            return vla.detokenize_actions(bins, STATS["action"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sta_tpo, "sample_action", act)
        found = list(sta_tpo.sample_trees(envs, None, Codec(), None, [(5,), (6,), (7,)], 4, 2.0))
    envs.close()
    return found


def stage_of(rollout: dict) -> int:
    """The stage of a branch, which is that of its first state."""
    return int(rollout["stage"][0])


def test_each_stage_has_as_many_branches_from_one_state(trees):
    assert [tree.seed for tree in trees] != [] and {tree.seed for tree in trees} == {5, 6, 7}
    reached = set()
    for tree in trees:
        stages = [stage_of(rollout) for rollout in tree.rollouts]
        assert stages == sorted(stages)
        for k in set(stages):
            branches = [rollout for rollout in tree.rollouts if stage_of(rollout) == k]
            assert len(branches) == 4
            for rollout in branches:
                assert torch.equal(rollout["rgb"][0], branches[0]["rgb"][0])
                assert torch.equal(rollout["proprio"][0], branches[0]["proprio"][0])
                assert rollout["distance"][0] == branches[0]["distance"][0]
        # A stage comes after one that a branch has completed, and is where that one led.
        for before, after in zip(sorted(set(stages)), sorted(set(stages))[1:]):
            ends = [r["completed"] for r in tree.rollouts if stage_of(r) == before]
            assert after in ends
        reached |= set(stages)
    assert reached == set(range(K))


def test_a_branch_is_its_stage_and_ends_with_it_or_after_twice_the_expert_s_time(trees):
    pace = get_task("PickCube-v1").pace
    endings = set()
    for tree in trees:
        for rollout in tree.rollouts:
            k = stage_of(rollout)
            assert (segment_stages(rollout["stage"], K) == k).all()
            completes = rollout["completed"] > k
            limit = 2 * pace[k]
            assert len(rollout["stage"]) <= limit
            assert completes or len(rollout["stage"]) == limit
            assert rollout["success"] == (rollout["completed"] == K)
            endings.add((completes, rollout["success"]))
    assert {(True, False), (True, True), (False, False)} == endings


def test_pairs_of_branches_share_their_first_frame(trees, capsys):
    rollouts = []
    for tree in trees:
        for rollout in tree.rollouts:
            rollouts.append({**rollout, "init_seed": tree.seed})
    pairs = sta_tpo.build_stage_pairs(rollouts, K, 0.1)
    assert {pair["reason"] for pair in pairs} == {"completed", "cost"}
    assert len({pair["stage"] for pair in pairs}) >= 3
    for pair in pairs:
        chosen, rejected = rollouts[pair["chosen"]], rollouts[pair["rejected"]]
        assert chosen["init_seed"] == rejected["init_seed"]
        assert stage_of(chosen) == stage_of(rejected) == pair["stage"]
        assert torch.equal(chosen["rgb"][0], rejected["rgb"][0])
        if pair["reason"] == "completed":
            assert chosen["completed"] > pair["stage"] >= rejected["completed"]
    segments = [sta_tpo.segments_of(rollout, K, True) for rollout in rollouts]
    sta_tpo.print_pairs(pairs, rollouts, segments, TASK.stages)
    table = capsys.readouterr().out.splitlines()
    rows = [line for line in table if line.split()[0] in TASK.stages]
    assert len(rows) == K and all(row.endswith("0.00") for row in rows)


def test_a_tree_comes_back_from_its_files(trees, tmp_path):
    sta_tpo.write_tree(tmp_path, trees[0])
    # A folder that a run left behind when it died is no tree.
    (tmp_path / "tmp_9").mkdir()
    files = sta_tpo.rollout_files(sta_tpo.files_of(tmp_path, [(trees[0].seed,)]))
    read = sta_tpo.read_rollouts(files)
    assert len(read) == len(trees[0].rollouts)
    for rollout, kept in zip(read, trees[0].rollouts, strict=True):
        assert rollout["init_seed"] == trees[0].seed
        assert rollout["completed"] == kept["completed"]
        assert torch.equal(rollout["bins"], kept["bins"])


def test_other_roll_outs_are_not_mixed_with_branches(checkpoint, tmp_path):
    (tmp_path / "source.txt").write_text(
        f"{checkpoint / 'checkpoint'}\n\nPickCube-v1\n--branch with --rollouts-per-state 8"
        " --branch-patience 2.0"
    )
    flags = ("--checkpoint", checkpoint, "--resume", "--output-dir", tmp_path, "--no-cuda")
    patient = ("--branch", "--rollouts-per-state", 8, "--branch-patience", 4)
    for more in ((), ("--branch", "--rollouts-per-state", 4), patient):
        with pytest.raises(UserError, match="were sampled --branch with --rollouts-per-state 8"):
            call(sta_tpo, *flags, *more)


def test_branches_need_the_rules_stages(checkpoint):
    for flag in ("--no-stage-aware", "--stage-source=learned"):
        with pytest.raises(UserError, match="leave out"):
            call(sta_tpo, "--checkpoint", checkpoint, "--branch", flag, "--no-cuda")


@pytest.mark.slow
def test_the_script_branches_trains_and_resumes(tmp_path):
    flags = (
        "--num-initial-states 2 --rollouts-per-state 3 --num-envs 2 --cost-margin 0 "
        "--num-eval-episodes 0 --no-cuda --branch --output-dir"
    ).split()
    run = tmp_path / "run"
    policy = ROOT / "checkpoints/PickCube-v1__sft"
    first = output_of("sta_tpo.py", "--checkpoint", policy, *flags, run, cwd=tmp_path)
    files = sorted((run / "rollouts").glob("*/*.npz"))
    assert len(files) >= 6
    times = [file.stat().st_mtime_ns for file in files]
    again = output_of("sta_tpo.py", "--resume", *flags, run, cwd=tmp_path)
    # The roll-outs are read again, and give the same pairs.
    assert [file.stat().st_mtime_ns for file in files] == times
    table = [line for line in first.splitlines() if line.split()[0] in TASK.stages]
    assert len(table) == K and all(line.endswith("0.00") for line in table)
    assert set(table) <= set(again.splitlines())
