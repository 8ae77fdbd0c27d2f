"""The real simulator: what make_envs promises, the scripted expert, evaluation."""
import functools
import json
import multiprocessing.spawn as spawn
import os
import signal
import subprocess
import sys
import types
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import h5py
import numpy as np
import pytest
import sapien
import torch
from conftest import ROOT, STATS, TASK, needs_assets, tiny_model, write_demos
from mani_skill.envs.utils.system.backend import parse_sim_and_render_backend

import eval as evaluation
import sft
import stare_utils
import vla
from stare_utils import ScriptedExpert, make_envs

K = len(TASK.stages)
INFOS = {"stage": torch.long, "furthest_stage": torch.long, "potential": torch.float32, "stage_distance": torch.float32, "success": torch.bool,
         "seed": torch.long, "elapsed_steps": torch.long}  # fmt: skip
HOLD = torch.tensor([[0.0, 0, 0, 0, 0, 0, 1]] * 2)  # stay, gripper open


def equal(a: dict, b: dict, row=slice(None), keys=None) -> bool:
    return all(torch.equal(a[key][row], b[key][row]) for key in keys or a)


def check_batch(obs, infos):
    assert obs["rgb"].dtype == torch.uint8 and obs["rgb"].shape == (2, 128, 128, 3)
    assert obs["proprio"].dtype == torch.float32 and obs["proprio"].shape == (2, 8)
    assert {name: infos[name].dtype for name in INFOS} == INFOS
    assert all(infos[name].shape == (2,) for name in INFOS)


def play(envs, seeds, steps):
    """Observations and infos of the expert's first steps after a reset."""
    seen = [envs.reset(seed=seeds)]
    for _ in range(steps):
        obs, *_, infos = envs.step(ScriptedExpert(envs).act())
        seen.append((obs, infos))
    return seen


def test_reset_and_step_return_the_contract(envs):
    check_batch(*envs.reset(seed=0))
    obs, reward, terminated, truncated, infos = envs.step(HOLD)
    check_batch(obs, infos)
    assert reward.dtype == torch.float32 and terminated.dtype == truncated.dtype == infos["_final_info"].dtype == torch.bool
    assert reward.shape == terminated.shape == truncated.shape == infos["_final_info"].shape == (2,)
    assert infos["elapsed_steps"].tolist() == [1, 1] and not infos["_final_info"].any()


def test_reset_gives_env_i_the_seed_plus_i_and_takes_a_list_as_it_is(envs):
    (obs, infos), (same_obs, same), (_, other) = envs.reset(seed=7), envs.reset(seed=[7, 8]), envs.reset(seed=[8, 8])
    assert infos["seed"].tolist() == [7, 8] and other["seed"].tolist() == [8, 8]
    assert equal(infos, same) and equal(obs, same_obs)
    assert infos["potential"][0] != infos["potential"][1] and other["potential"][0] == other["potential"][1]


def test_a_seed_of_any_size_begins_episodes():
    env = make_envs("PickCube-v1", 1, 5_000_000_000, render=False)
    assert env.reset()[1]["seed"].item() == 5_000_000_000 % (2**32 - 1)
    env.close()


def test_an_error_in_the_env_processes_ends_the_script():
    lines = "import stare_utils; stare_utils.make_envs('PickCube-v1', 2, 0, render=False).reset(seed=2**33)"
    run = subprocess.run([sys.executable, "-c", lines], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1 and "ValueError: Seed must be between" in run.stderr.splitlines()[-1]


def test_an_episode_after_a_reset_depends_on_its_seed_alone(envs):
    """Into contact with the cube, whatever was done before: without that, neither evaluation nor --resume would be exact."""
    first, generator = play(envs, [3, 4], steps=15), torch.Generator().manual_seed(0)
    for length in (20, 23, 26):
        envs.reset(seed=length)
        for _ in range(length):
            envs.step(2 * torch.rand(2, 7, generator=generator) - 1)
        for t, ((obs, infos), (same_obs, same)) in enumerate(zip(first, play(envs, [3, 4], steps=15), strict=True)):
            assert equal(obs, same_obs) and equal(infos, same, keys=INFOS), (length, t)


def test_auto_reset_after_success_starts_a_clean_episode_in_that_env_alone(envs):
    obs, infos = envs.reset(seed=3)
    step, terminated = 0, torch.zeros(1)
    while not terminated.any():
        actions, step = torch.cat([ScriptedExpert(envs).act()[:1], HOLD[:1]]), step + 1
        obs, reward, terminated, truncated, infos = envs.step(actions)
        assert terminated.any() or step < 30 and not infos["_final_info"].any() and (reward == 0).all()
    assert terminated.tolist() == infos["_final_info"].tolist() == [True, False] and not truncated.any() and reward.tolist() == [1, 0]
    final, seed = infos["final_info"], int(infos["seed"][0])
    assert final["success"][0] and final["stage"][0] == final["furthest_stage"][0] == final["potential"][0] == K
    assert final["seed"][0] == 3 and final["elapsed_steps"][0] == step and final["stage_distance"][0] == 0
    assert infos["final_obs"]["rgb"].shape == (2, 128, 128, 3) and infos["final_obs"]["proprio"][0, -1] < 0.06  # the cube is still held
    # the top level is the new episode's: nothing of the grasp is left
    assert [int(infos[name][0]) for name in ("stage", "furthest_stage", "elapsed_steps", "success")] == [0, 0, 0, 0] and infos["potential"][0] < 1
    assert infos["elapsed_steps"][1] == step and infos["seed"][1] == 4 and 0 <= seed < stare_utils.TRAIN_SEEDS and seed != 3
    fresh_obs, fresh = envs.reset(seed=[seed, 0])
    assert equal(infos, fresh, row=0, keys=INFOS) and equal(obs, fresh_obs, row=0)
    after = envs.step(HOLD)
    envs.reset(seed=[seed, 0])
    again = envs.step(HOLD)
    assert equal(after[0], again[0]) and equal(after[-1], again[-1], keys=INFOS)


def test_truncation_at_the_horizon_keeps_the_last_state_in_final_obs(envs):
    envs.reset(seed=0)
    envs.set_next_seeds([100, 200])
    for step in range(30):
        before = envs.step(HOLD)
        assert before[3].all() == (step == 29)
    obs, reward, terminated, truncated, infos = before
    assert truncated.all() and not terminated.any() and infos["_final_info"].all() and (reward == 0).all()
    final = infos["final_info"]
    assert final["elapsed_steps"].tolist() == [30, 30] and final["seed"].tolist() == [0, 1] and not final["success"].any()
    check_batch(infos["final_obs"], final)
    check_batch(obs, infos)
    assert infos["seed"].tolist() == [100, 200] and infos["elapsed_steps"].tolist() == [0, 0]
    fresh_obs, fresh = envs.reset(seed=[100, 200])
    assert equal(infos, fresh, keys=INFOS) and equal(obs, fresh_obs)
    assert not torch.equal(infos["final_obs"]["rgb"], obs["rgb"])


def test_expert_slips_only_where_told(envs):
    envs.reset(seed=[5, 6])
    expert = ScriptedExpert(envs)
    right, slipped, whole_turn = expert.act(), expert.act(torch.tensor([1, 0])), expert.act(torch.full((2,), K))
    assert right[:, -1].tolist() == [1, 1] and slipped[:, -1].tolist() == [-1, 1]  # it closes in the air
    assert torch.equal(slipped[1], right[1]) and torch.equal(whole_turn, right)


def test_light_meshes_leave_joints_and_collisions_alone():
    import mani_skill

    full, light = Path(mani_skill.PACKAGE_ASSET_DIR) / "robots/panda/panda_v2.urdf", stare_utils.light_assets() / "panda_v2.urdf"

    def parts(urdf):
        root = ElementTree.parse(urdf).getroot()
        return {tag: [ElementTree.tostring(node) for node in root.iter(tag)] for tag in ("joint", "collision", "inertial")}

    assert parts(full) == parts(light) and all(parts(full).values())
    for mesh in ElementTree.parse(full).getroot().findall(".//collision//mesh"):
        assert (full.parent / mesh.get("filename")).read_bytes() == (light.parent / mesh.get("filename")).read_bytes()
    visual = "franka_description/meshes/visual"
    size = {urdf: sum(file.stat().st_size for file in (urdf.parent / visual).iterdir()) for urdf in (full, light)}
    assert size[light] < 0.5 * size[full]


@pytest.mark.slow
@pytest.mark.parametrize("env_id", ["PickCube-v1", needs_assets("PutEggplantInBasketScene-v1")])
def test_light_shaders_draw_the_same_pixels(env_id, monkeypatch):
    assert "samplerBRDFLUT" not in (stare_utils.light_assets() / "shaders/minimal/gbuffer.frag").read_text()
    frames = []
    for light in (True, False):
        env = stare_utils.StageEnv(env_id, 1, "cpu", 0)
        if not light:  # the camera was made with our shaders: again with SAPIEN's
            monkeypatch.setattr(sapien.render, "set_camera_shader_dir", stare_utils.STOCK_SHADERS)
        env.reset([5])
        frames.append(torch.cat([env.step(torch.full((1, 7), 0.02 * i))[0]["rgb"] for i in range(4)]))
        env.close()
    assert torch.equal(*frames) and frames[0].float().std() > 10


@pytest.mark.parametrize("env_id", [needs_assets("PutCarrotOnPlateInScene-v1")])
def test_objects_do_not_settle_in_the_fingers_of_the_last_episode_s_arm(env_id):
    """Seed 2000's carrot would lie 4 cm from where it belongs."""
    env = stare_utils.StageEnv(env_id, 1, "cpu", 1000, render=False)
    env.reset()
    env.set_next_seeds([2000])
    done = torch.zeros(1, dtype=torch.bool)
    while not done:
        *_, terminated, truncated, infos = env.step(env.expert_action(torch.zeros(1, dtype=torch.long)))
        done = terminated | truncated
    _, fresh = env.reset([2000])
    assert terminated and infos["seed"] == 2000 and torch.allclose(infos["geometry"], fresh["geometry"], atol=1e-4)


@pytest.mark.parametrize("env_id", [needs_assets("PutCarrotOnPlateInScene-v1"), needs_assets("PutEggplantInBasketScene-v1", slow=True)])
def test_a_quarter_of_simplerenvs_pixels_shows_a_small_policy_the_same(env_id):
    frames, sizes = [], []
    for full in (False, True):
        env = stare_utils.StageEnv(env_id, 1, "cpu", 0, full_meshes=full)
        env.reset([5])
        frames.append(torch.cat([env.step(env.expert_action(torch.zeros(1, dtype=torch.long)))[0]["rgb"] for _ in range(6)]).float())
        sizes.append([(camera.width, camera.height) for camera in env.base._sensor_configs.values()])
        env.close()
    assert sizes == [[(320, 240)], [(640, 480)]] and (frames[0] - frames[1]).abs().mean() < 1
    moved = (frames[0] - frames[0].roll(1, 2)).abs().mean()  # one pixel off, what a wrong intrinsic would do
    assert moved > 3 * (frames[0] - frames[1]).abs().mean()
    large = stare_utils.StageEnv(env_id, 1, "cpu", 0, image_size=224)
    assert [camera.width for camera in large.base._sensor_configs.values()] == [640]
    large.close()


@pytest.mark.parametrize("local_rank", ["", "1"])
def test_a_gpu_draws_into_the_memory_of_the_env_process(local_rank, monkeypatch):
    """ManiSkill would hand over tensors on the GPU. Its own word for that backend must not come out, and the device must be the process's own."""
    devices, asked = [], {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sapien, "Device", lambda name: devices.append(name) or name)
    monkeypatch.setattr(stare_utils, "scene_class", lambda *args: lambda **kwargs: asked.update(kwargs))
    monkeypatch.setenv("LOCAL_RANK", local_rank) if local_rank else monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(TypeError):  # there is no env
        stare_utils.StageEnv("PickCube-v1", 1, "cpu", 0)
    backend = parse_sim_and_render_backend(asked["sim_backend"], asked["render_backend"])
    assert backend.render_backend != "sapien_cuda" and backend.device.type == "cpu" and devices[-1] == "cuda" + f":{local_rank}" * bool(local_rank)


def test_env_processes_do_not_import_the_script_again(monkeypatch):
    told, script = [], sys.modules["__main__"]
    monkeypatch.setattr(script, "__file__", "a_script.py", raising=False)  # a test process may be started without one
    monkeypatch.setattr(script, "__spec__", None, raising=False)
    monkeypatch.setattr(stare_utils, "Processes", lambda *args, **kwargs: told.append(spawn.get_preparation_data("env")))
    with pytest.raises(AttributeError):  # there are no envs
        stare_utils.StageVectorEnv("PickCube-v1", 2, 0)
    assert told and not any(key.startswith("init_main") for key in told[0])
    assert any(key.startswith("init_main") for key in spawn.get_preparation_data("another"))


def test_the_env_that_gymnasium_makes_in_the_script_leaves_the_script_as_it_was():
    seen = lambda: (torch.get_num_threads(), os.getpgrp(), signal.getsignal(signal.SIGINT), torch.cuda.synchronize)  # noqa: E731
    before, threads = seen(), torch.get_num_threads()
    torch.set_num_threads(3)
    stare_utils.ProcessEnv("PickCube-v1", 0, 0).close()
    after = seen()
    torch.set_num_threads(threads)
    assert after == (3, *before[1:])


def test_recorded_states_are_seen_through_our_camera(tmp_path, monkeypatch):
    """A ManiSkill trajectory without images gives the frames that its states show."""
    env = stare_utils.StageEnv("PickCube-v1", 1, "cpu", 0)
    obs, _ = env.reset(seed=[5])
    seen, states, actions = [obs], [env.base.get_state_dict()], []
    for _ in range(4):
        actions.append(env.expert_action(torch.zeros(1, dtype=torch.long)))
        obs, *_ = env.step(actions[-1])
        seen.append(obs)
        states.append(env.base.get_state_dict())
    env.reset(seed=[6])
    with h5py.File(tmp_path / "demos.h5", "w") as file:
        file["traj_0/actions"] = torch.cat(actions).numpy()
        for kind, bodies in states[0].items():
            for name in bodies:
                file[f"traj_0/env_states/{kind}/{name}"] = np.concatenate([state[kind][name].numpy() for state in states])
    (tmp_path / "demos.json").write_text('{"env_info": {"env_id": "PickCube-v1"}, "episodes": [{"episode_id": 0, "control_mode": "pd_ee_delta_pose"}]}')
    monkeypatch.setattr(stare_utils, "StageEnv", lambda *args, **kwargs: env)
    rgb, proprio, labels, *_ = sft.read_demos(tmp_path / "demos.h5", "PickCube-v1", 9)
    assert torch.equal(labels, torch.cat(actions)) and rgb.dtype == torch.uint8
    assert torch.allclose(proprio, torch.cat([obs["proprio"] for obs in seen[:-1]]), atol=1e-5)
    difference = (rgb.int() - torch.cat([obs["rgb"] for obs in seen[:-1]]).int()).abs()
    assert rgb.shape == (4, 128, 128, 3) and (difference > 8).float().mean() < 1e-3
    env.env.close()


def test_failed_episodes_and_those_beyond_the_number_are_not_read(tmp_path):
    path = write_demos(tmp_path / "demos.h5", lengths=(5, 6, 7))
    meta = json.loads(path.with_suffix(".json").read_text())
    meta["episodes"][0]["success"] = False
    path.with_suffix(".json").write_text(json.dumps(meta))
    with h5py.File(path, "a") as file:
        file["traj_1/stage"] = np.array([0, 1, 2, 3, 4, -2], np.int32)
    rgb, *_, stage = sft.read_demos(path, "PickCube-v1", 1)
    assert len(rgb) == 6 and stage.tolist() == [0, 1, 2, 3, -1, -1] and stage.dtype == torch.int64  # success is no stage


def test_demonstrations_slower_than_the_task_are_named(tmp_path, capsys):
    sft.read_demos(write_demos(tmp_path / "demos.h5", lengths=(50, 49)), "PickCube-v1", 9)
    assert capsys.readouterr().out == ""
    sft.read_demos(write_demos(tmp_path / "demos.h5", lengths=(50, 51, 60)), "PickCube-v1", 9)
    assert "2 of 3 demonstrations of PickCube-v1 take longer than its episodes of 50 steps" in capsys.readouterr().out


@pytest.fixture(scope="module")
def endless():
    """Two simulators as evaluation uses them: no termination, the registered horizon."""
    envs = make_envs("PickCube-v1", 2, 0, terminate_on_success=False)
    yield envs
    envs.close()


@pytest.fixture
def evaluate(endless, monkeypatch):
    """eval.evaluate with these simulators instead of new ones."""
    monkeypatch.setattr(endless, "close", lambda: None)
    monkeypatch.setattr(evaluation, "make_envs", lambda *args, **kwargs: endless)
    return evaluation.evaluate


def test_evaluating_twice_gives_identical_rows(evaluate, monkeypatch):
    model, processor = tiny_model()
    model.train()
    monkeypatch.setitem(stare_utils.ALIASES, "cube", "PickCube-v1")
    first, second = (evaluate(model, processor, name, 2, 0, 2) for name in ("PickCube-v1", "cube"))
    assert first == second and model.training
    assert [row["seed"] for row in first["episodes"]] == [stare_utils.EVAL_SEED, stare_utils.EVAL_SEED + 1]
    assert [row["episode_len"] for row in first["episodes"]] == [TASK.max_episode_steps] * 2
    assert stare_utils.EVAL_SEED >= stare_utils.TRAIN_SEEDS


def test_evaluation_counts_success_and_stages_of_the_expert(evaluate, endless, monkeypatch):
    """Three episodes in two envs: a batch that is not full. The policy is the expert, as tokens, in env 0 alone; it leaves the last goal again."""
    expert, calls = ScriptedExpert(endless), []

    def act(model, inputs, active, greedy):
        assert greedy
        calls.append(1)
        up = torch.tensor([[0.0, 0, 1, 0, 0, 0, -1]])
        return vla.tokenize_actions(torch.cat([up if len(calls) > 95 else expert.act()[:1], HOLD[:1]]), STATS["action"]), None, None

    monkeypatch.setattr(evaluation, "sample_action", act)
    monkeypatch.setattr(endless, "play", functools.partial(stare_utils.StageEnv.play, endless))  # all envs at once
    result = evaluate(*tiny_model(), "PickCube-v1", 3, 1, 2)
    rows = result["episodes"]
    assert [row["success_once"] for row in rows] == [True, False, True] and [row["success_at_end"] for row in rows] == [True, False, False]
    assert result["success_once"] == result["stage_reach_rate"][-1] == 2 * result["success_at_end"] == pytest.approx(2 / 3)
    assert len(result["stage_reach_rate"]) == K and [row["furthest_stage"] for row in rows] == [K, 0, K]
    assert [row["seed"] - stare_utils.EVAL_SEED for row in rows] == [100_000, 100_001, 100_002]
    assert all(sum(row["stage_steps"]) == row["episode_len"] == 50 for row in rows) and rows[1]["stage_steps"][0] == 50
    assert all(min(row["stage_steps"]) > 0 and row["return"] == row["stage_steps"][K] + row["success_at_end"] for row in (rows[0], rows[2]))


def test_intervals_by_hand():
    assert evaluation.wilson(8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-6)  # as scipy's binomtest(8, 10).proportion_ci(method="wilson")
    a, b = ([{"seed": seed, "success_once": won == 1} for seed, won in rows.items()] for rows in ({5: 0, 6: 0, 7: 0, 8: 1}, {8: 0, 5: 1, 6: 0, 7: 1, 9: 1}))
    found = evaluation.paired_difference(a, b)  # -1, 1, 0, 1, and two more: 2.5 won, 1.5 lost of 6
    assert found["num_episodes"] == 4 and found["difference"] == 0.25
    half = 1.959964 * ((2.5 / 6 + 1.5 / 6 - (1 / 6) ** 2) / 6) ** 0.5
    assert (found["low"], found["high"]) == pytest.approx((1 / 6 - half, 1 / 6 + half), abs=1e-6)


@pytest.mark.parametrize("won, lost", [(0.04, 0.0), (0.1, 0.05), (0.3, 0.1)])
def test_the_paired_interval_of_24_episodes_holds_the_truth_as_often_as_it_says(won, lost):
    """The plain normal interval does so in 62, 91 and 94 %, and is [0, 0] where no pair differs."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(2000):
        a, b = ([{"seed": seed, "success_once": bool(x)} for seed, x in enumerate(outcomes)] for outcomes in
                zip(*rng.choice([[0, 1], [1, 0], [1, 1]], 24, p=[won, lost, 1 - won - lost])))  # fmt: skip
        found = evaluation.paired_difference(a, b)
        held += found["low"] <= won - lost <= found["high"]
    assert held / 2000 > 0.93


def test_where_episodes_are_lost_is_told_stage_by_stage():
    rows = [{"seed": k, "success_once": k == 4, "success_at_end": False, "return": 0.0, "episode_len": 50, "furthest_stage": k, "stage_steps": [k] * 5}
            for k in (0, 1, 3, 4)]  # fmt: skip
    result = evaluation.mean_rows(rows, 4)
    assert result["stage_reach_rate"] == [0.75, 0.5, 0.5, 0.25] and result["stage_steps"] == [2.0] * 4
    _, line, _ = evaluation.result_table([{**result, "method": "SFT", "env_id": "PickCube-v1"}]).splitlines()
    assert line.split("]")[1].split() == "0.0 % 75.0 % 66.7 % 100.0 % 50.0 %".split()
    _, *lines, _ = evaluation.result_table([{**result, "method": "SFT", "env_id": "PickCube-v1", "ood": ood, "instructions": words}
                                            for ood, words in (("camera", ()), ("none", ("pick it",)))]).splitlines()  # fmt: skip
    assert [line.split(" " * 2)[0] for line in lines] == ["SFT, camera", "SFT, other words"]


def test_a_task_s_report_is_of_the_successes():
    result = {"method": "SFT", "env_id": "LiftPegUpright-v1", "success_once": 0.5, "success_at_end": 0.5, "stage_reach_rate": [0.5] * 4}
    episodes = [{"seed": i, "success_once": i > 1, "tilt": tilt} for i, tilt in enumerate((9.0, 0.1, 0.2, 0.3))]
    assert "tilt at success: median 0.250, largest 0.300" in evaluation.result_table([{**result, "episodes": episodes}])


def test_evaluation_reads_the_separator_and_reports_at_the_first_success(envs, monkeypatch):
    """Env 0 is told a success at steps 5 and 6 of 30; of four episodes asked for the grid has two."""
    read, play, won = [], envs.play, []
    task = types.SimpleNamespace(**{**vars(TASK), "stages": TASK.stages, "max_episode_steps": 30, "grid": 2, "report": ("stage_distance",)})

    def cheat(act, steps):
        for t, n, obs, *rest, info in play(act, steps):
            if n.start == 0 and t in (5, 6):
                info["success"][:] = True
                won.append(float(info["stage_distance"][0]))
            yield t, n, obs, *rest, info

    for module, name, value in ((envs, "close", lambda: None), (envs, "play", cheat), (stare_utils, "get_task", lambda env_id: task),
                                (evaluation, "make_envs", lambda *args, **kwargs: envs),
                                (evaluation, "compare_separator", lambda episodes, K: read.extend(episodes) or {})):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    rows = evaluation.evaluate(*tiny_model(), "PickCube-v1", 4, 0, 2, separator=torch.nn.Linear(64, 6))["episodes"]
    assert len(rows) == len(read) == 2 and [int(over.sum()) for _, _, over in read] == [24, 0]
    assert all(logprobs.shape == (30, K) and torch.allclose(logprobs.exp().sum(-1), torch.ones(30)) for _, logprobs, _ in read)
    assert rows[0]["stage_distance"] == won[0] and "stage_distance" not in rows[1]
    assert [torch.bincount(stages, minlength=K + 1).tolist() for stages, _, _ in read] == [row["stage_steps"] for row in rows]


def test_success_in_the_reset_state_counts_nowhere(envs):
    """PickCube draws its goal on the lying cube in about one episode of 150. `stage_reach_rate` must end in `success_once`."""
    _, infos = envs.reset(seed=[1_073_741_855, 0])
    assert infos["success"].tolist() == [True, False] and infos["stage"][0] == K and infos["furthest_stage"].tolist() == [0, 0]
    up = HOLD + torch.tensor([0, 0, 1.0, 0, 0, 0, 0])
    *_, infos = envs.step(up)  # success asks for a robot at rest
    assert infos["success"].tolist() == [False, False] and (infos["furthest_stage"] < K).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"reward": "dense"}, {"stock_camera": True}, {"full_meshes": True}, {"potential": "linear", "potential_across_stages": "bare"}]
)
def test_every_option_of_the_simulator_keeps_the_contract(options):
    envs = make_envs("PickCube-v1", 2, seed=0, **options)
    check_batch(*envs.reset(seed=0))
    for _ in range(3):
        obs, reward, terminated, _, infos = envs.step(ScriptedExpert(envs).act())
        check_batch(obs, infos)
        assert (infos["potential"] <= 1).all()  # nothing is grasped in three steps
        assert (reward > 0).all() == (options.get("reward") == "dense") and (reward < 1).all() and not terminated.any()
    envs.close()


def test_play_takes_the_same_steps_in_turns(envs):
    """To the end of the episode: each half alone, as `step` takes all; the second half is asked for actions while the first one is at work."""
    actions, asked = 0.5 * torch.randn(30, 2, 7, generator=torch.Generator().manual_seed(0)), []

    def act(t, rows):
        asked.append((t, rows.start))
        return actions[t, rows]

    envs.reset(seed=[5, 6])
    halves = list(envs.play(act, 30))
    assert asked == [(t, half) for t in range(30) for half in range(2)] and [(t, rows.start) for t, rows, *_ in halves] == asked
    envs.reset(seed=[5, 6])
    for t in range(30):
        obs, reward, terminated, truncated, infos = envs.step(actions[t])
        for _, rows, its_obs, *numbers, its_infos in halves[2 * t : 2 * t + 2]:
            assert all(torch.equal(a[rows], b) for a, b in zip((reward, terminated, truncated), numbers))
            assert all(torch.equal(obs[name][rows], its_obs[name]) for name in obs)
            assert all(torch.equal(infos[name][rows], its_infos[name]) for name in ("stage", "potential", "seed", "_final_info"))
            if t == 29:
                assert its_infos["_final_info"].all()
                assert torch.equal(infos["final_info"]["stage"][rows], its_infos["final_info"]["stage"])
                assert torch.equal(infos["final_obs"]["rgb"][rows], its_infos["final_obs"]["rgb"])


def test_the_policy_sees_the_tool_s_pose_and_the_goal_and_the_next_seed_is_another(envs):
    env = stare_utils.StageEnv("PickCube-v1", 1, "cpu", 0, render=False)
    obs, _ = env.reset([3])
    assert abs(env.next_seed[0] - 3) > 1000  # not the neighbour's
    assert torch.equal(obs["proprio"], torch.cat([env.state["tool"], env.state["quaternion"], env.state["opening"][:, None]], -1))
    assert torch.allclose(obs["proprio"][:, :3], env.base.agent.tcp.pose.p)
    env.close()
    rgb = envs.reset(seed=[3, 4])[0]["rgb"].int()
    green = (rgb[..., 1] > rgb[..., 0] + 60) & (rgb[..., 1] > rgb[..., 2] + 60)
    assert (green.sum((1, 2)) > 10).all()


def test_a_reset_of_one_env_of_a_batch_leaves_the_others_alone():
    """As GPU simulation does it, with a simulator that says the same of all three."""
    env = stare_utils.StageEnv("PickCube-v1", 1, "cpu", 0, render=False)
    env.reset([3])
    env.close()
    state = {name: x.expand(3, *x.shape[1:]).clone() for name, x in env.state.items()}
    env.num_envs, env.env = 3, types.SimpleNamespace(reset=lambda seed, options: ({}, {}))
    env.base = types.SimpleNamespace(device=torch.device("cpu"), evaluate=lambda: {"success": torch.zeros(3, dtype=torch.bool)}, elapsed_steps=torch.zeros(3),
                                     _hidden_objects=[])  # fmt: skip
    env.task = types.SimpleNamespace(**{**vars(env.task), "stages": env.task.stages})
    env.task.observe = lambda base: {**state, "grasped": torch.ones(3, dtype=torch.bool), "object": torch.ones(3, 3)}
    env.observation = lambda obs: obs
    env.seeds, env.furthest, env.object_start, env.next_seed = torch.tensor([7, 8, 9]), torch.full((3,), 2), torch.zeros(3, 3), [70, 80, 90]
    _, infos = env.reset(env_idx=torch.tensor([1]))
    assert infos["seed"].tolist() == [7, 80, 9] and env.furthest.tolist() == [2, 0, 2] and env.state["grasped"].tolist() == [True, False, True]
    assert env.object_start[:, 0].tolist() == [0, 1, 0] and env.next_seed[::2] == [70, 90] and env.next_seed[1] != 80
