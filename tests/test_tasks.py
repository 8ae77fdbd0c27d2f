"""All tasks in the real simulator, without images where none are needed.

The tests are about experts, stages on ManiSkill's own trajectories, and SimplerEnv's grid. Others
are about out-of-distribution scenes, ManiSkill's demonstrations, and one policy for several tasks.
"""

import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, call, needs_assets, output_of, scalars, tiny_model, write_demos
from mani_skill.utils.structs import Pose

import eval as evaluation
import sft
import world.tasks
from stare_utils import segment_stages, shape_rewards
from world.assets import OOD_CAMERA, OOD_SHIFT, TRAIN_JITTER
from world.demos import read_demos
from world.envs import StageEnv
from world.tasks import ALIASES, EVAL_SEED, TASKS, UserError, env_ids, get_task
from world.vector import ScriptedExpert

# The expert plays the present stage.
RIGHT = torch.zeros(1, dtype=torch.long)
PUT_CARROT = "PutCarrotOnPlateInScene-v1"
PUT_EGGPLANT = "PutEggplantInBasketScene-v1"
PEG_INSERTION = "PegInsertionSide-v1"


def state_env(env_id, **options) -> StageEnv:
    """One simulator without images."""
    return StageEnv(env_id, 1, "cpu", 0, render=False, **options)


def slow_tasks(*env_ids: str) -> list:
    """The tasks as parameters of slow tests."""
    return [needs_assets(env_id, slow=True) for env_id in env_ids]


# ---- the expert ----
SIGNALS = ("stage", "stage_distance", "potential")
FINALS = ("success", "stage", "potential", "elapsed_steps")


def new_episode() -> dict:
    """An episode before its first step."""
    return {name: [] for name in (*SIGNALS, "reward")}


def run_expert(envs, num_episodes: int, seed: int = 100) -> list[dict]:
    """Episodes of the expert, after one reset at the very start.

    Each has the stages, distances and potentials of the states acted in, the rewards, and the last
    infos.
    """
    expert = ScriptedExpert(envs)
    limit = torch.tensor(envs.task.arm.limit)
    episodes = []
    _, infos = envs.reset(seed=seed)
    present = [new_episode() for _ in range(envs.num_envs)]
    while len(episodes) < num_episodes:
        actions = expert.act()
        assert actions.shape == (envs.num_envs, 7)
        assert (actions.abs() <= limit).all()
        for i, episode in enumerate(present):
            for name in SIGNALS:
                episode[name].append(infos[name][i].item())
        _, reward, terminated, _, infos = envs.step(actions)
        for i, episode in enumerate(present):
            episode["reward"].append(float(reward[i]))
            if infos["_final_info"][i]:
                episode["terminated"] = bool(terminated[i])
                episode["final"] = {name: infos["final_info"][name][i].item() for name in FINALS}
                episodes.append(episode)
                present[i] = new_episode()
    return episodes


def visited(episode: dict, K: int) -> list[int]:
    """The segments that an episode goes through."""
    return segment_stages(torch.tensor(episode["stage"]), K).unique().tolist()


def check_solved(episode: dict, K: int) -> None:
    """A solved episode goes through the stages in order, and its rewards add up."""
    segment = segment_stages(torch.tensor(episode["stage"]), K)
    assert (segment.diff() >= 0).all()
    assert segment[0] == 0
    # Success comes only after the last stage.
    assert max(episode["stage"]) < K
    assert episode["final"]["stage"] == K
    assert episode["terminated"]
    assert sum(episode["reward"]) == 1
    assert episode["final"]["elapsed_steps"] == len(episode["stage"])
    # The shaped return telescopes. Discounting aside, the episode pays its success minus what it
    # began with.
    phi = [*episode["potential"], episode["final"]["potential"]]
    phi = torch.tensor(phi, dtype=torch.double)[:, None]
    rewards = torch.tensor(episode["reward"], dtype=torch.double)[:, None]
    terminated = torch.arange(len(rewards))[:, None] == len(rewards) - 1
    shaped = shape_rewards(rewards, phi[:-1], phi[1:], terminated, 1.0, 1 / K)
    assert shaped.sum().item() == pytest.approx(1 - episode["potential"][0] / K)
    assert phi.max() == phi[-1] == K
    assert episode["potential"][0] < 1


@pytest.mark.parametrize(
    "env_id",
    [needs_assets(env_id, slow=env_id in (PEG_INSERTION, PUT_EGGPLANT)) for env_id in TASKS],
)
def test_expert_goes_through_every_stage_in_order_to_success(env_id, envs, request):
    # PickCube-v1 runs in two processes, with images.
    if env_id != "PickCube-v1":
        envs = state_env(env_id)
        request.addfinalizer(envs.close)
    K = envs.num_stages
    episodes = run_expert(envs, 8)
    solved = [episode for episode in episodes if episode["final"]["success"]]
    assert len(solved) >= 7
    for episode in solved:
        check_solved(episode, K)
    # A step may jump over a stage, and a goal close to the object may be reached in one step.
    whole = [episode for episode in solved if visited(episode, K) == list(range(K))]
    assert len(whole) >= 6
    # L_k is the distance at entry.
    for k, stage in enumerate(envs.task.stage_table):
        entered = []
        for episode in solved:
            if k in episode["stage"]:
                entered.append(episode["stage_distance"][episode["stage"].index(k)])
        assert 0.5 < np.median(entered) / stage.length < 2, stage.name


# ---- stages ----
@pytest.mark.parametrize("env_id", [needs_assets(env_id) for env_id in TASKS])
def test_stage_functions_read_each_row_of_a_batch_by_itself(env_id):
    """GPU simulation gives them N states at once. They must say of each what they say of it alone.

    The N states are those of twelve steps.
    """
    env = state_env(env_id)
    env.reset(7)
    no_success = torch.zeros(1, dtype=torch.bool)
    states = []
    actions = []
    alone = []
    for _ in range(12):
        actions.append(env.expert_action(RIGHT))
        states.append({name: value.clone() for name, value in env.state.items()})
        alone.append(env.infos(no_success))
        env.step(actions[-1])
    N = len(states)
    env.num_envs = N
    env.state = {name: torch.cat([state[name] for state in states]) for name in states[0]}
    env.object_start = env.object_start.expand(N, 3)
    together = env.infos(no_success.expand(N))
    for name in ("stage", "stage_distance", "potential", "geometry"):
        expected = torch.cat([infos[name] for infos in alone])
        assert torch.allclose(together[name], expected, atol=1e-6), name
    found = env.expert_action(RIGHT.expand(N))
    assert torch.allclose(found, torch.cat(actions), atol=1e-5)
    env.close()


@pytest.mark.parametrize(("env_id", "alike"), [("StackCube-v1", 4), ("PegInsertionSide-v1", 2)])
def test_geometry_does_not_jump_where_the_turn_wraps(env_id, alike):
    env = state_env(env_id)
    env.reset(0)
    sides = []
    for sign in (-1, 1):
        # Half of the smallest turn after which the object looks the same.
        turn = torch.tensor([sign * (math.pi / alike - 1e-4)])
        sides.append(world.tasks.geometry({**env.state, "yaw_error": turn}))
    assert torch.allclose(*sides, atol=1e-3)
    assert torch.allclose(sides[0][0, 6:], torch.tensor([-0.1, 0.0]), atol=1e-3)
    env.close()


@pytest.mark.parametrize("env_id", [needs_assets(PUT_CARROT)])
def test_geometry_tells_how_the_object_lies(env_id):
    """SimplerEnv's carrot lies in two ways. For one of them the tool turns by a right angle."""
    env = state_env(env_id)
    turns = []
    for seed in (EVAL_SEED, EVAL_SEED + 1):
        _, infos = env.reset(seed)
        state = env.state
        to_object = state["object"] - state["tool"]
        to_goal = state["goal"] - state["tool"]
        assert torch.equal(infos["geometry"][:, :6], torch.cat([to_object, to_goal], -1))
        cosine, sine = infos["geometry"][0, 6:]
        assert torch.hypot(cosine, sine).item() == pytest.approx(0.1)
        turns.append(0.5 * torch.atan2(sine, cosine).item())
        assert turns[-1] == pytest.approx(state["yaw_error"].item(), abs=1e-5)
    assert abs(turns[0]) < 0.1
    assert abs(turns[1]) > 1.4
    env.close()


@pytest.mark.parametrize("env_id", [needs_assets(PUT_CARROT)])
def test_what_is_let_go_where_success_reaches_is_in_its_last_stage(env_id):
    """A carrot at the plate's rim, 6 cm from its middle.

    It is not yet a success in the first step, and it is one in the third.
    """
    env = state_env(env_id, terminate_on_success=False)
    env.reset(EVAL_SEED + 1)
    carrot = env.base.objs[env.base.source_obj_name]
    plate = env.base.objs[env.base.target_obj_name]
    rim = plate.pose.p + torch.tensor([0.055, 0, 0.04])
    carrot.set_pose(Pose.create_from_pq(rim, torch.tensor([1.0, 0, 0, 0])))
    stages = []
    for _ in range(3):
        *_, infos = env.step(torch.tensor([[0, 0, 0, 0, 0, 0, 1.0]]))
        stages.append(int(infos["stage"]))
    assert stages[0] == 3
    assert stages[-1] == 4
    assert (env.state["beside_goal"] > 0.05).all()
    env.close()


class Recorder:
    """What ManiSkill's motion planner takes for an env.

    It is a StageEnv under joint control, whose stages are written down.
    """

    def __init__(self, env_id: str):
        self.env = StageEnv(
            env_id,
            1,
            "cpu",
            0,
            terminate_on_success=False,
            max_episode_steps=10_000,
            render=False,
            control_mode="pd_joint_pos",
        )
        self.unwrapped = self.env.base
        self.stages = []
        self.success = []

    def reset(self, seed=None, options=None):
        _, infos = self.env.reset(seed)
        self.stages = [int(infos["stage"])]
        self.success = [bool(infos["success"])]
        # How far the object is from its goal.
        self.apart = float(self.env.state["to_goal"])

    def step(self, action):
        action = torch.as_tensor(np.asarray(action), dtype=torch.float32).view(1, -1)
        result = self.env.step(action)
        infos = result[-1]
        self.stages.append(int(infos["stage"]))
        self.success.append(bool(infos["success"]))
        return result


@pytest.mark.parametrize(
    "env_id",
    [
        "PickCube-v1",
        *slow_tasks("StackCube-v1", "PushCube-v1", "PullCube-v1", "LiftPegUpright-v1"),
        *slow_tasks(PEG_INSERTION),
    ],
)
def test_stages_hold_on_trajectories_of_maniskills_motion_planner(env_id):
    """No code of ours acts here.

    Every success comes after all stages, which are entered in order. Only success ends the last
    stage.
    """
    from mani_skill.examples.motionplanning.panda.run import MP_SOLUTIONS

    recorder = Recorder(env_id)
    K = recorder.env.num_stages
    solved = 0
    for seed in range(8):
        MP_SOLUTIONS[env_id](recorder, seed=seed, debug=False, vis=False)
        assert [stage == K for stage in recorder.stages] == recorder.success
        if True not in recorder.success:
            continue
        solved += 1
        before = recorder.stages[: recorder.success.index(True)]
        expected = list(range(K))
        # Within transport's 3 cm plus place's 4 cm there is nothing to transport.
        near = env_id == "PickCube-v1" and recorder.apart < 0.07
        if near and 2 not in before:
            expected = [0, 1, 3]
        segment = segment_stages(torch.tensor(before), K)
        assert segment.unique().tolist() == expected, (seed, before)
    # The planner itself fails often in PegInsertionSide-v1.
    assert solved >= (3 if env_id == PEG_INSERTION else 6)
    recorder.env.close()


# ---- initial states ----
def layout(env) -> torch.Tensor:
    """(actors, 7) poses of what belongs to the task."""
    return torch.cat([actor.pose.raw_pose for actor in env.task.movable(env.base)])


def where(env) -> torch.Tensor:
    """(actors, 3) positions of what belongs to the task."""
    return layout(env)[:, :3]


@pytest.mark.parametrize("env_id", slow_tasks(PUT_CARROT, PUT_EGGPLANT))
def test_evaluation_plays_simplers_grid_once_and_training_begins_beside_it(env_id):
    env = state_env(env_id)
    grid = []
    for i in range(env.task.grid):
        env.reset(EVAL_SEED + 100_000 + i)
        grid.append(layout(env).flatten())
    grid = torch.stack(grid)
    apart = torch.cdist(grid, grid) + torch.eye(len(grid))
    configurations = len(env.base.xyz_configs) * len(env.base.quat_configs)
    assert len(grid) == env.task.grid == configurations
    assert apart.min() > 1e-3
    # After the last configuration the first one comes again.
    env.reset(EVAL_SEED)
    first = layout(env).flatten()
    env.reset(EVAL_SEED + env.task.grid)
    assert torch.equal(layout(env).flatten(), first)
    for seed in range(6):
        env.reset(seed)
        assert (layout(env).flatten() - grid).norm(dim=1).min() > 1e-3, seed
    env.close()


@pytest.mark.parametrize("env_id", [needs_assets(PUT_CARROT)])
def test_training_begins_beside_simplerenv_s_configurations_to_either_side(env_id):
    env = state_env(env_id)
    env.reset(EVAL_SEED)
    first = where(env)
    grid = env.base.xyz_configs.clone()
    moved = []
    for seed in range(8):
        env.reset(seed)
        offsets = where(env)[None, :, :2] - grid[:, :2, :2]
        nearest = offsets.abs().amax((1, 2)).argmin()
        moved.append(offsets[nearest])
    moved = torch.stack(moved)
    assert 0.01 < moved.abs().max() <= TRAIN_JITTER + 1e-4
    assert (moved < -0.002).any()
    assert (moved > 0.002).any()
    env.reset(EVAL_SEED)
    assert torch.equal(where(env), first)
    assert torch.equal(env.base.xyz_configs, grid)
    env.close()


def test_simplers_names_are_aliases_and_lists_are_split():
    names = env_ids("widowx_stack_cube, PickCube-v1")
    assert names == ["StackGreenCubeOnYellowCubeBakedTexInScene-v1", "PickCube-v1"]
    assert len({get_task(alias).instruction for alias in ALIASES}) == 4


# ---- out of distribution ----
def first_view(env, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The picture and the poses with which an episode begins."""
    obs, _ = env.reset(seed)
    return obs["rgb"].float(), layout(env)


@pytest.mark.parametrize("env_id", slow_tasks("PickCube-v1", PEG_INSERTION, PUT_CARROT))
def test_out_of_distribution_changes_one_thing_drawn_from_the_seed(env_id):
    seeds = [EVAL_SEED, EVAL_SEED + 1]
    seen = {}
    for ood in ("none", "position", "camera", "lighting"):
        env = StageEnv(env_id, 1, "cpu", 0, ood=ood)
        seen[ood] = [first_view(env, seed) for seed in seeds]
        # The change is drawn from the seed.
        rgb, poses = first_view(env, seeds[0])
        assert torch.equal(seen[ood][0][0], rgb)
        assert torch.equal(seen[ood][0][1], poses)
        env.close()
    for i in range(2):
        rgb, poses = seen["none"][i]
        moved = seen["position"][i][1] - poses
        assert moved[:, :2].norm(dim=-1) == pytest.approx(OOD_SHIFT, abs=1e-5)
        assert not moved[:, 2:].any()
        # What belongs together moves together.
        assert torch.allclose(moved, moved[:1].expand_as(moved), atol=1e-6)
        for ood in ("camera", "lighting"):
            # The carrot's camera is fixed to the photograph behind the scene.
            if ood == "camera" and env_id == PUT_CARROT:
                continue
            other_rgb, other_poses = seen[ood][i]
            assert torch.equal(other_poses, poses)
            assert (other_rgb - rgb).abs().mean() > 3, ood
    # Another seed has other lamps.
    changes = [seen["lighting"][i][0] - seen["none"][i][0] for i in range(2)]
    assert not torch.allclose(changes[0].mean((1, 2)), changes[1].mean((1, 2)), atol=1)


def test_out_of_distribution_things_move_outwards_and_cameras_as_far_as_is_said():
    distances = []
    eyes = []
    for position, camera in (("none", "none"), ("position", "camera")):
        env = state_env("PickCube-v1", ood=position)
        env.reset(EVAL_SEED + 3)
        distances.append(where(env)[0, :2].norm().item())
        env.close()
        env = StageEnv("PickCube-v1", 1, "cpu", 0, ood=camera)
        env.reset(EVAL_SEED + 3)
        views = env.base._sensor_configs.values()
        eyes.append(torch.cat([view.pose.p for view in views]))
        env.close()
    assert distances[1] == pytest.approx(distances[0] + OOD_SHIFT, abs=1e-4)
    shifts = (eyes[1] - eyes[0]).norm(dim=-1).tolist()
    assert shifts == pytest.approx([OOD_CAMERA] * 2, abs=1e-4)


# ---- ManiSkill's demonstrations ----
@pytest.mark.slow
@pytest.mark.parametrize("obs_mode", ["none", "rgb"])
def test_demonstrations_made_by_maniskills_own_tools_train_a_policy(obs_mode, tmp_path):
    def tool(module, flags, *args):
        command = [sys.executable, "-m", module, *flags.split(), *map(str, args)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    flags = "-e PushCube-v1 -n 2 --only-count-success --traj-name planned -b physx_cpu"
    tool("mani_skill.examples.motionplanning.panda.run", flags)
    folder = tmp_path / "demos/PushCube-v1/motionplanning"
    planned = folder / "planned.h5"
    flags = f"-c pd_ee_delta_pose -o {obs_mode} --save-traj -b physx_cpu --traj-path"
    tool("mani_skill.trajectory.replay_trajectory", flags, planned)
    replayed = folder / f"planned.{obs_mode}.pd_ee_delta_pose.physx_cpu.h5"
    with pytest.raises(UserError, match="convert it with"):
        read_demos(planned, "PushCube-v1", 9)
    rgb, _, actions, geometry, stage = read_demos(replayed, "PushCube-v1", 9)
    assert len(rgb) == len(actions) == len(stage) > 40
    # Contact forces are not recorded, so the stage is unknown.
    assert (stage == -1).all()
    assert rgb.float().std() > 10
    assert actions.abs().max() <= 1 + 1e-6
    # The tool comes near the cube.
    assert geometry[:, :3].norm(dim=-1).min() < 0.1
    flags = "--env-id PushCube-v1 --num-updates 60 --batch-size 16 --num-eval-episodes 0 --no-cuda"
    run = tmp_path / "run"
    call(sft, *flags.split(), "--demo-path", replayed, "--output-dir", run)
    curve = scalars(run)["losses/aux"]
    assert curve[-1] < curve[0]


# ---- one policy for several tasks ----
@pytest.fixture(scope="module")
def joint_run(tmp_path_factory):
    """One tiny policy for two tasks of two robots, from invented demonstrations."""
    folder = tmp_path_factory.mktemp("joint")
    pick = write_demos(folder / "a.h5")
    mode = TASKS[PUT_CARROT].arm.control_mode
    carrot = write_demos(folder / "b.h5", env_id=PUT_CARROT, control_mode=mode)
    run = folder / "run"
    flags = (
        "--env-id PickCube-v1,widowx_carrot_on_plate --num-updates 3 --batch-size 8 "
        "--num-eval-episodes 0 --no-cuda"
    )
    call(sft, *flags.split(), "--demo-path", f"{pick},{carrot}", "--output-dir", run)
    return run


@pytest.mark.parametrize("env_id", [needs_assets(PUT_CARROT)])
def test_one_policy_learns_several_tasks_each_in_its_own_units(env_id, joint_run):
    config = json.loads((joint_run / "checkpoint/config.json").read_text())
    stats = config["norm_stats"]
    # `base` is the model that it began with, by default.
    assert list(stats) == ["PickCube-v1", env_id, "base"]
    assert stats["base"]["proprio"] == stats["PickCube-v1"]["proprio"] == stats[env_id]["proprio"]
    for name in ("PickCube-v1", env_id):
        entry = stats[name]
        limit = TASKS[name].arm.limit
        assert entry["action"]["q99"] == pytest.approx(limit)
        assert entry["action"]["q01"] == pytest.approx([-x for x in limit])


@pytest.mark.slow
@pytest.mark.parametrize("env_id", [needs_assets(PUT_CARROT)])
def test_eval_takes_all_tasks_of_a_policy_in_other_words(env_id, joint_run):
    flags = (
        "--num-eval-episodes 2 --num-envs 2 --instruction-set paraphrase --ood lighting --no-cuda"
    )
    printed = output_of("eval.py", "--checkpoint", joint_run, *flags.split(), cwd=joint_run)
    for name in ("PickCube-v1", env_id):
        file = joint_run / f"results_{name}_lighting_other_words.json"
        row = json.loads(file.read_text())
        assert row["env_id"] == name
        assert row["ood"] == "lighting"
        assert tuple(row["instructions"]) == TASKS[name].paraphrases
        assert row["num_episodes"] == len(row["episodes"]) == 2
        assert TASKS[name].instruction in printed


def test_evaluation_gives_the_policy_the_words_it_is_told_in_turn(monkeypatch, envs):
    """Three instructions, four episodes in two envs: episode i gets instruction i mod 3."""
    told = []

    def listen(rgb, text, *args):
        told.extend(text)
        return {}

    def act(*args, **kwargs):
        return torch.zeros(1, 7, dtype=torch.long), None, None

    listen.image_size = 128
    # The policy is asked once per episode, because an episode has one step.
    monkeypatch.setattr(envs, "task", dataclasses.replace(envs.task, max_episode_steps=1))
    monkeypatch.setattr(envs, "close", lambda: None)
    monkeypatch.setattr(evaluation, "sample_action", act)
    monkeypatch.setattr(evaluation, "make_envs", lambda *args, **kwargs: envs)
    model, _ = tiny_model()
    words = ("a", "b", "c")
    evaluation.evaluate(model, listen, "PickCube-v1", 4, 0, 2, instructions=words)
    assert told == ["a", "b", "c", "a"]


# ---- docs/tasks.md ----
def documented_example() -> str:
    """The Python block of docs/tasks.md that adds a task."""
    blocks = (ROOT / "docs/tasks.md").read_text().split("```python\n")[1:]
    (block,) = [block.split("```")[0] for block in blocks if "TASKS[" in block]
    return block


def test_the_documented_example_adds_a_task_that_its_expert_solves(monkeypatch):
    example = documented_example()
    assert len(example.splitlines()) <= 35
    monkeypatch.setattr(world.tasks, "TASKS", dict(TASKS))
    exec(example, {})
    (env_id,) = world.tasks.TASKS.keys() - TASKS.keys()
    env = state_env(env_id)
    K = env.num_stages
    episodes = run_expert(env, 6)
    solved = [episode for episode in episodes if episode["final"]["success"]]
    assert len(solved) >= 5
    for episode in solved:
        assert visited(episode, K) == list(range(K))
    env.close()
