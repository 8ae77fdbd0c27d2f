"""All tasks in the real simulator, without images where none are needed: experts, stages on ManiSkill's own trajectories, SimplerEnv's grid,
what is out of distribution, demonstrations made by ManiSkill's tools, and one policy for several tasks."""
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, call, needs_assets, output_of, scalars, tiny_model, write_demos
from mani_skill.utils.structs import Pose

import eval as evaluation
import sft
import stare_utils
from stare_utils import EVAL_SEED, TASKS, ScriptedExpert, StageEnv, segment_stages, shape_rewards

RIGHT = torch.zeros(1, dtype=torch.long)  # the expert plays the present stage
PUT_CARROT = "PutCarrotOnPlateInScene-v1"


def state_env(env_id, **options) -> StageEnv:
    return StageEnv(env_id, 1, "cpu", 0, render=False, **options)


def run_expert(envs, num_episodes: int, seed: int = 100) -> list[dict]:
    """Episodes of the expert, one reset at the very start: stages, distances and potentials of the states acted in, rewards and final infos of each."""
    expert, episodes, (_, infos) = ScriptedExpert(envs), [], envs.reset(seed=seed)
    limit, names = torch.tensor(envs.task.arm.limit), ("stage", "stage_distance", "potential", "reward")
    open_rows = [{name: [] for name in names} for _ in range(envs.num_envs)]
    while len(episodes) < num_episodes:
        actions = expert.act()
        assert actions.shape == (envs.num_envs, 7) and (actions.abs() <= limit).all()
        for i, row in enumerate(open_rows):
            for name in names[:3]:
                row[name].append(infos[name][i].item())
        _, reward, terminated, _, infos = envs.step(actions)
        for i, row in enumerate(open_rows):
            row["reward"].append(float(reward[i]))
            if infos["_final_info"][i]:
                final = {name: infos["final_info"][name][i].item() for name in ("success", "stage", "potential", "elapsed_steps")}
                episodes.append({**row, "terminated": bool(terminated[i]), "final": final})
                open_rows[i] = {name: [] for name in names}
    return episodes


@pytest.mark.parametrize("env_id", [needs_assets(env_id, slow=env_id[:6] in ("PegIns", "PutEgg")) for env_id in TASKS])
def test_expert_goes_through_every_stage_in_order_to_success(env_id, envs, request):
    if env_id != "PickCube-v1":  # that one in two processes, with images
        envs = state_env(env_id)
        request.addfinalizer(envs.close)
    K, episodes, whole = envs.num_stages, run_expert(envs, 8), 0
    solved = [episode for episode in episodes if episode["final"]["success"]]
    assert len(solved) >= 7
    for episode in solved:
        segment = segment_stages(torch.tensor(episode["stage"]), K)
        assert (segment.diff() >= 0).all() and segment[0] == 0
        whole += segment.unique().tolist() == list(range(K))
        assert max(episode["stage"]) < K and episode["final"]["stage"] == K  # success only after the last stage
        assert episode["terminated"] and sum(episode["reward"]) == 1 and episode["final"]["elapsed_steps"] == len(episode["stage"])
        # the shaped return telescopes: discounting aside, the episode pays its success minus what it began with
        phi = torch.tensor([*episode["potential"], episode["final"]["potential"]], dtype=torch.double)[:, None]
        rewards = torch.tensor(episode["reward"], dtype=torch.double)[:, None]
        terminated = torch.arange(len(rewards))[:, None] == len(rewards) - 1
        assert shape_rewards(rewards, phi[:-1], phi[1:], terminated, 1.0, 1 / K).sum().item() == pytest.approx(1 - episode["potential"][0] / K)
        assert phi.max() == phi[-1] == K and episode["potential"][0] < 1
    assert whole >= 6  # a step may jump over a stage, and a goal close to the object be reached in one
    for k, stage in enumerate(envs.task.stage_table):  # L_k is the distance at entry
        entered = [episode["stage_distance"][episode["stage"].index(k)] for episode in solved if k in episode["stage"]]
        assert 0.5 < np.median(entered) / stage.length < 2, stage.name


@pytest.mark.parametrize("env_id", [needs_assets(env_id) for env_id in TASKS])
def test_stage_functions_read_each_row_of_a_batch_by_itself(env_id):
    """GPU simulation hands them N states at once: they must say of each what they say of it alone."""
    env = state_env(env_id)
    env.reset(7)
    states, alone = [], []
    for _ in range(12):
        action = env.expert_action(RIGHT)
        states.append({name: value.clone() for name, value in env.state.items()})
        alone.append((action, env.infos(torch.zeros(1, dtype=torch.bool))))
        env.step(action)
    env.num_envs, env.state = len(states), {name: torch.cat([state[name] for state in states]) for name in states[0]}
    env.object_start = env.object_start.expand(len(states), 3)
    together = env.infos(torch.zeros(len(states), dtype=torch.bool))
    for name in ("stage", "stage_distance", "potential", "geometry"):
        assert torch.allclose(together[name], torch.cat([infos[name] for _, infos in alone]), atol=1e-6), name
    assert torch.allclose(env.expert_action(RIGHT.expand(len(states))), torch.cat([action for action, _ in alone]), atol=1e-5)
    env.close()


@pytest.mark.parametrize("env_id", [needs_assets(PUT_CARROT)])
def test_geometry_tells_how_the_object_lies(env_id):
    """SimplerEnv's carrot lies in two ways, for one of which the tool has to turn by a right angle."""
    env = state_env(env_id)
    turns = []
    for seed in (EVAL_SEED, EVAL_SEED + 1):
        infos, s = env.reset(seed)[1], env.state
        assert torch.equal(infos["geometry"][:, :6], torch.cat([s["object"] - s["tool"], s["goal"] - s["tool"]], -1))
        assert torch.linalg.vector_norm(infos["geometry"][:, 6:]).item() == pytest.approx(0.1)
        turns.append(0.5 * torch.atan2(infos["geometry"][0, 7], infos["geometry"][0, 6]).item())
        assert turns[-1] == pytest.approx(s["yaw_error"].item(), abs=1e-5)
    assert abs(turns[0]) < 0.1 and abs(turns[1]) > 1.4
    env.close()


@pytest.mark.parametrize("env_id", [needs_assets(PUT_CARROT)])
def test_what_is_let_go_where_success_reaches_is_in_its_last_stage(env_id):
    """A carrot at the plate's rim, 6 cm from its middle: not yet a success in the first step, one in the third."""
    env, stages = state_env(env_id, terminate_on_success=False), []
    env.reset(EVAL_SEED + 1)
    carrot, plate = (env.base.objs[name] for name in (env.base.source_obj_name, env.base.target_obj_name))
    carrot.set_pose(Pose.create_from_pq(plate.pose.p + torch.tensor([0.055, 0, 0.04]), torch.tensor([1.0, 0, 0, 0])))
    for _ in range(3):
        *_, infos = env.step(torch.tensor([[0, 0, 0, 0, 0, 0, 1.0]]))
        stages.append(int(infos["stage"]))
    assert stages[0] == 3 and stages[-1] == 4 and (env.state["beside_goal"] > 0.05).all()
    env.close()


class Recorder:
    """What ManiSkill's motion planner takes for an env: a StageEnv under joint control, whose stages are written down."""

    def __init__(self, env_id: str):
        self.env = StageEnv(env_id, 1, "cpu", 0, terminate_on_success=False, max_episode_steps=10_000, render=False, control_mode="pd_joint_pos")
        self.unwrapped, self.stages, self.success = self.env.base, [], []

    def reset(self, seed=None, options=None):
        _, infos = self.env.reset(seed)
        self.stages, self.success = [int(infos["stage"])], [bool(infos["success"])]
        self.apart = float(self.env.state["to_goal"])

    def step(self, action):
        obs, reward, terminated, truncated, infos = self.env.step(torch.as_tensor(np.asarray(action), dtype=torch.float32).view(1, -1))
        self.stages.append(int(infos["stage"]))
        self.success.append(bool(infos["success"]))
        return obs, reward, terminated, truncated, infos


@pytest.mark.parametrize("env_id", ["PickCube-v1", *(needs_assets(f"{name}-v1", slow=True) for name in
                                    ("StackCube", "PushCube", "PullCube", "LiftPegUpright", "PegInsertionSide"))])  # fmt: skip
def test_stages_hold_on_trajectories_of_manisklls_motion_planner(env_id):
    """No code of ours acts here. Every success comes after all stages, entered in order; the last stage is passed by success alone."""
    from mani_skill.examples.motionplanning.panda.run import MP_SOLUTIONS

    recorder, solved = Recorder(env_id), 0
    K = recorder.env.num_stages
    for seed in range(8):
        MP_SOLUTIONS[env_id](recorder, seed=seed, debug=False, vis=False)
        assert [stage == K for stage in recorder.stages] == recorder.success
        if True not in recorder.success:
            continue
        solved += 1
        before = recorder.stages[: recorder.success.index(True)]
        near = env_id == "PickCube-v1" and recorder.apart < 0.07  # a goal within transport's 3 cm plus place's 4 cm: nothing to transport
        assert segment_stages(torch.tensor(before), K).unique().tolist() == ([0, 1, 3] if near and 2 not in before else list(range(K))), (seed, before)
    assert solved >= (3 if env_id == "PegInsertionSide-v1" else 6)  # the planner itself fails often there
    recorder.env.close()


def layout(env) -> torch.Tensor:
    """(actors, 7) poses of what belongs to the task."""
    return torch.cat([actor.pose.raw_pose for actor in env.task.movable(env.base)])


@pytest.mark.parametrize("env_id", [needs_assets(PUT_CARROT, slow=True), needs_assets("PutEggplantInBasketScene-v1", slow=True)])
def test_evaluation_plays_simplers_grid_once_and_training_begins_beside_it(env_id):
    env = state_env(env_id)
    grid = []
    for i in range(env.task.grid):
        env.reset(EVAL_SEED + 100_000 + i)
        grid.append(layout(env).flatten())
    grid = torch.stack(grid)
    apart = torch.cdist(grid, grid) + torch.eye(len(grid))
    assert len(grid) == env.task.grid == len(env.base.xyz_configs) * len(env.base.quat_configs) and apart.min() > 1e-3
    env.reset(EVAL_SEED)
    first = layout(env).flatten()
    env.reset(EVAL_SEED + env.task.grid)
    assert torch.equal(layout(env).flatten(), first)  # it begins anew
    for seed in range(6):
        env.reset(seed)
        assert (layout(env).flatten() - grid).norm(dim=1).min() > 1e-3, seed
    env.close()


def test_simplers_names_are_aliases_and_lists_are_split():
    assert stare_utils.env_ids("widowx_stack_cube, PickCube-v1") == ["StackGreenCubeOnYellowCubeBakedTexInScene-v1", "PickCube-v1"]
    assert len({stare_utils.get_task(alias).instruction for alias in stare_utils.ALIASES}) == 4


@pytest.mark.parametrize("env_id", [needs_assets(env_id, slow=True) for env_id in ("PickCube-v1", "PegInsertionSide-v1", PUT_CARROT)])
def test_out_of_distribution_changes_one_thing_drawn_from_the_seed(env_id):
    seeds, seen = [EVAL_SEED, EVAL_SEED + 1], {}
    for ood in ("none", "position", "camera", "lighting"):
        env = StageEnv(env_id, 1, "cpu", 0, ood=ood)
        first, second, again = ((env.reset(seed)[0]["rgb"].float(), layout(env)) for seed in (*seeds, seeds[0]))
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])  # drawn from the seed
        seen[ood] = first, second
        env.close()
    for i in range(2):
        (rgb, poses), moved = seen["none"][i], seen["position"][i][1] - seen["none"][i][1]
        assert moved[:, :2].norm(dim=-1) == pytest.approx(stare_utils.OOD_SHIFT, abs=1e-5) and not moved[:, 2:].any()
        assert torch.allclose(moved, moved[:1].expand_as(moved), atol=1e-6)  # what belongs together moves together
        for ood in ("camera", "lighting"):
            if ood == "camera" and env_id == PUT_CARROT:
                continue  # its camera is fixed to the photograph behind it
            assert torch.equal(seen[ood][i][1], poses)
            assert (seen[ood][i][0] - rgb).abs().mean() > 3, ood
    changes = [seen["lighting"][i][0] - seen["none"][i][0] for i in range(2)]
    assert not torch.allclose(changes[0].mean((1, 2)), changes[1].mean((1, 2)), atol=1)  # another seed, other lamps


@pytest.mark.slow
@pytest.mark.parametrize("obs_mode", ["none", "rgb"])
def test_demonstrations_made_by_maniskills_own_tools_train_a_policy(obs_mode, tmp_path):
    def tool(module, *args):
        done = subprocess.run([sys.executable, "-m", module, *map(str, args)], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    tool("mani_skill.examples.motionplanning.panda.run", "-e", "PushCube-v1", "-n", 2, "--only-count-success", "--traj-name", "planned", "-b", "physx_cpu")
    folder = tmp_path / "demos/PushCube-v1/motionplanning"
    tool("mani_skill.trajectory.replay_trajectory", "--traj-path", folder / "planned.h5", "-c", "pd_ee_delta_pose", "-o", obs_mode, "--save-traj",
         "-b", "physx_cpu")  # fmt: skip
    replayed = folder / f"planned.{obs_mode}.pd_ee_delta_pose.physx_cpu.h5"
    with pytest.raises(stare_utils.UserError, match="convert it with"):
        sft.read_demos(folder / "planned.h5", "PushCube-v1", 9)
    rgb, proprio, actions, where, stage = sft.read_demos(replayed, "PushCube-v1", 9)
    assert len(rgb) == len(actions) == len(stage) > 40 and (stage == -1).all()  # nobody recorded the contact forces
    assert rgb.float().std() > 10 and actions.abs().max() <= 1 + 1e-6
    assert where[:, :3].norm(dim=-1).min() < 0.1  # the tool comes near the cube
    call(sft, "--env-id", "PushCube-v1", "--demo-path", replayed, "--num-updates", 60, "--batch-size", 16, "--num-eval-episodes", 0,
         "--output-dir", tmp_path / "run", "--no-cuda")  # fmt: skip
    curve = scalars(tmp_path / "run")["losses/aux"]
    assert curve[-1] < curve[0]


@pytest.fixture(scope="module")
def joint_run(tmp_path_factory):
    """One tiny policy for two tasks of two robots, from invented demonstrations."""
    folder = tmp_path_factory.mktemp("joint")
    pick, carrot = write_demos(folder / "a.h5"), write_demos(folder / "b.h5", env_id=PUT_CARROT, control_mode=TASKS[PUT_CARROT].arm.control_mode)
    run = folder / "run"
    call(sft, "--env-id", "PickCube-v1,widowx_carrot_on_plate", "--demo-path", f"{pick},{carrot}", "--num-updates", 3, "--batch-size", 8,
         "--num-eval-episodes", 0, "--output-dir", run, "--no-cuda")  # fmt: skip
    return run


needs_bridge = pytest.mark.parametrize("env_id", [needs_assets(PUT_CARROT)])


@needs_bridge
def test_one_policy_learns_several_tasks_each_in_its_own_units(env_id, joint_run):
    stats = json.loads((joint_run / "checkpoint/config.json").read_text())["norm_stats"]
    assert list(stats) == ["PickCube-v1", env_id] and stats["PickCube-v1"]["proprio"] == stats[env_id]["proprio"]
    for name, entry in stats.items():
        assert entry["action"]["q99"] == pytest.approx(TASKS[name].arm.limit) and entry["action"]["q01"] == pytest.approx([-x for x in TASKS[name].arm.limit])


@pytest.mark.slow
@needs_bridge
def test_eval_takes_all_tasks_of_a_policy_in_other_words(env_id, joint_run):
    printed = output_of("eval.py", "--checkpoint", joint_run, "--num-eval-episodes", 2, "--num-envs", 2, "--instruction-set", "paraphrase", "--ood", "lighting",
                        "--no-cuda", cwd=joint_run)  # fmt: skip
    for name in ("PickCube-v1", env_id):
        row = json.loads((joint_run / f"results_{name}_lighting_other_words.json").read_text())
        assert row["env_id"] == name and row["ood"] == "lighting" and tuple(row["instructions"]) == TASKS[name].paraphrases
        assert row["num_episodes"] == len(row["episodes"]) == 2 and TASKS[name].instruction in printed


def test_evaluation_gives_the_policy_the_words_it_is_told_in_turn(monkeypatch, envs):
    """Three words, four episodes in two envs: episode i gets word i mod 3."""
    told = []

    def listen(rgb, text, *args):
        told.extend(text)
        return {}

    listen.image_size = 128
    monkeypatch.setattr(envs, "close", lambda: None)
    monkeypatch.setattr(evaluation, "sample_action", lambda *args, **kwargs: (torch.zeros(1, 7, dtype=torch.long), None, None))
    monkeypatch.setattr(envs, "play", lambda act, steps: [act(0, rows) for rows in envs.rows][:0])  # nothing moves
    monkeypatch.setattr(evaluation, "make_envs", lambda *args, **kwargs: envs)
    evaluation.evaluate(tiny_model()[0], listen, "PickCube-v1", 4, 0, 2, instructions=("a", "b", "c"))
    assert told == ["a", "b", "c", "a"]


def documented_example() -> str:
    """The Python block of docs/tasks.md that adds a task."""
    (block,) = (part.split("```")[0] for part in (ROOT / "docs/tasks.md").read_text().split("```python\n")[1:] if "TASKS[" in part)
    return block


def test_the_documented_example_adds_a_task_that_its_expert_solves(monkeypatch):
    monkeypatch.setattr(stare_utils, "TASKS", dict(TASKS))
    exec(documented_example(), {})
    (env_id,) = stare_utils.TASKS.keys() - TASKS.keys()
    assert len(documented_example().splitlines()) <= 35
    env = state_env(env_id)
    episodes = run_expert(env, 6)
    assert sum(episode["final"]["success"] for episode in episodes) >= 5
    for episode in episodes:
        segment = segment_stages(torch.tensor(episode["stage"]), env.num_stages)
        assert not episode["final"]["success"] or segment.unique().tolist() == list(range(env.num_stages))
    env.close()


def where(env) -> torch.Tensor:
    return torch.cat([actor.pose.p for actor in env.task.movable(env.base)])


@needs_bridge
def test_training_begins_beside_simplerenv_s_configurations_to_either_side(env_id):
    env, moved = state_env(env_id), []
    env.reset(EVAL_SEED)
    first, grid = where(env), env.base.xyz_configs.clone()
    for seed in range(8):
        env.reset(seed)
        offsets = where(env)[None, :, :2] - grid[:, :2, :2]
        moved.append(offsets[offsets.abs().amax((1, 2)).argmin()])
    moved = torch.stack(moved)
    assert 0.01 < moved.abs().max() <= stare_utils.TRAIN_JITTER + 1e-4 and (moved < -0.002).any() and (moved > 0.002).any()
    env.reset(EVAL_SEED)
    assert torch.equal(where(env), first) and torch.equal(env.base.xyz_configs, grid)
    env.close()


def test_out_of_distribution_things_move_outwards_and_cameras_as_far_as_is_said():
    seen, eyes = [], []
    for position, camera in (("none", "none"), ("position", "camera")):
        env = state_env("PickCube-v1", ood=position)
        env.reset(EVAL_SEED + 3)
        seen.append(where(env)[0, :2].norm().item())
        env.close()
        env = StageEnv("PickCube-v1", 1, "cpu", 0, ood=camera)
        env.reset(EVAL_SEED + 3)
        eyes.append(torch.cat([view.pose.p for view in env.base._sensor_configs.values()]))
        env.close()
    assert seen[1] == pytest.approx(seen[0] + stare_utils.OOD_SHIFT, abs=1e-4)
    assert (eyes[1] - eyes[0]).norm(dim=-1).tolist() == pytest.approx([stare_utils.OOD_CAMERA] * 2, abs=1e-4)
