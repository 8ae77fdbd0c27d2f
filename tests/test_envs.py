"""The real simulator: what make_envs promises, the scripted expert, demonstrations, evaluation."""

import dataclasses
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
import vla
import world.assets
import world.demos
import world.envs
import world.vector
from plumbing.report import mean_rows, paired_difference, result_table, wilson
from world.assets import (
    STOCK_SHADERS,
    check_renderer,
    choose_renderer,
    draws_on_gpu,
    light_assets,
)
from world.demos import read_demos
from world.envs import StageEnv
from world.episodes import join
from world.tasks import ALIASES, EVAL_SEED, TRAIN_SEEDS, UserError
from world.vector import (
    ScriptedExpert,
    StageVectorEnv,
    info_fields,
    make_envs,
    make_process_env,
    pack_infos,
    unpack_infos,
)

K = len(TASK.stages)
INFOS = {
    "stage": torch.long,
    "furthest_stage": torch.long,
    "potential": torch.float32,
    "stage_distance": torch.float32,
    "success": torch.bool,
    "seed": torch.long,
    "elapsed_steps": torch.long,
}
# Both arms stay where they are, with open grippers.
HOLD = torch.tensor([[0.0, 0, 0, 0, 0, 0, 1]] * 2)
# The first arm goes up, with a closed gripper.
LEAVE = torch.tensor([[0.0, 0, 1, 0, 0, 0, -1]])
# The expert of a single env plays the present stage.
RIGHT = torch.zeros(1, dtype=torch.long)


def equal(a: dict, b: dict, row=slice(None), keys=None) -> bool:
    """Whether two dicts of tensors are the same bit for bit in some rows."""
    return all(torch.equal(a[key][row], b[key][row]) for key in keys or a)


def check_batch(obs, infos):
    """Observations and infos of two envs have the types and shapes that are promised."""
    assert obs["rgb"].dtype == torch.uint8
    assert obs["rgb"].shape == (2, 128, 128, 3)
    assert obs["proprio"].dtype == torch.float32
    assert obs["proprio"].shape == (2, 8)
    assert {name: infos[name].dtype for name in INFOS} == INFOS
    assert all(infos[name].shape == (2,) for name in INFOS)


def play(envs, seeds, steps):
    """Observations and infos of the expert's first steps after a reset."""
    seen = [envs.reset(seed=seeds)]
    for _ in range(steps):
        obs, *_, infos = envs.step(ScriptedExpert(envs).act())
        seen.append((obs, infos))
    return seen


# ---- episodes and steps ----
def test_reset_and_step_return_the_contract(envs):
    check_batch(*envs.reset(seed=0))
    obs, reward, terminated, truncated, infos = envs.step(HOLD)
    check_batch(obs, infos)
    ended = infos["_final_info"]
    assert reward.dtype == torch.float32
    assert terminated.dtype == truncated.dtype == ended.dtype == torch.bool
    assert reward.shape == terminated.shape == truncated.shape == ended.shape == (2,)
    assert infos["elapsed_steps"].tolist() == [1, 1]
    assert not ended.any()


def test_reset_gives_env_i_the_seed_plus_i_and_takes_a_list_as_it_is(envs):
    obs, infos = envs.reset(seed=7)
    same_obs, same = envs.reset(seed=[7, 8])
    _, other = envs.reset(seed=[8, 8])
    assert infos["seed"].tolist() == [7, 8]
    assert other["seed"].tolist() == [8, 8]
    assert equal(infos, same)
    assert equal(obs, same_obs)
    assert infos["potential"][0] != infos["potential"][1]
    assert other["potential"][0] == other["potential"][1]


def test_a_seed_of_any_size_begins_episodes():
    env = make_envs("PickCube-v1", 1, 5_000_000_000, render=False)
    _, infos = env.reset()
    assert infos["seed"].item() == 5_000_000_000 % (2**32 - 1)
    env.close()


def test_an_error_in_the_env_processes_ends_the_script():
    lines = (
        "from world.vector import make_envs; "
        "make_envs('PickCube-v1', 2, 0, render=False).reset(seed=2**33)"
    )
    command = [sys.executable, "-c", lines]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1
    assert "ValueError: Seed must be between" in run.stderr.splitlines()[-1]


def test_an_episode_after_a_reset_depends_on_its_seed_alone(envs):
    """Up to the contact with the cube, whatever was done before.

    Without this, neither evaluation nor --resume would be exact.
    """
    first = play(envs, [3, 4], steps=15)
    generator = torch.Generator().manual_seed(0)
    for length in (20, 23, 26):
        envs.reset(seed=length)
        for _ in range(length):
            envs.step(2 * torch.rand(2, 7, generator=generator) - 1)
        second = play(envs, [3, 4], steps=15)
        for t, (before, after) in enumerate(zip(first, second, strict=True)):
            assert equal(before[0], after[0]), (length, t)
            assert equal(before[1], after[1], keys=INFOS), (length, t)


def test_auto_reset_after_success_starts_a_clean_episode_in_that_env_alone(envs):
    obs, infos = envs.reset(seed=3)
    step = 0
    terminated = torch.zeros(1)
    # The expert plays in env 0. Env 1 stands still.
    while not terminated.any():
        actions = torch.cat([ScriptedExpert(envs).act()[:1], HOLD[:1]])
        step += 1
        obs, reward, terminated, truncated, infos = envs.step(actions)
        if not terminated.any():
            assert step < 30
            assert not infos["_final_info"].any()
            assert (reward == 0).all()
    assert terminated.tolist() == infos["_final_info"].tolist() == [True, False]
    assert not truncated.any()
    assert reward.tolist() == [1, 0]
    final = infos["final_info"]
    assert final["success"][0]
    assert final["stage"][0] == final["furthest_stage"][0] == final["potential"][0] == K
    assert final["seed"][0] == 3
    assert final["elapsed_steps"][0] == step
    assert final["stage_distance"][0] == 0
    assert infos["final_obs"]["rgb"].shape == (2, 128, 128, 3)
    # The cube is still held.
    assert infos["final_obs"]["proprio"][0, -1] < 0.06
    # The top level is the new episode's: nothing of the grasp is left.
    for name in ("stage", "furthest_stage", "elapsed_steps", "success"):
        assert int(infos[name][0]) == 0
    assert infos["potential"][0] < 1
    assert infos["elapsed_steps"][1] == step
    assert infos["seed"][1] == 4
    seed = int(infos["seed"][0])
    assert 0 <= seed < TRAIN_SEEDS
    assert seed != 3
    fresh_obs, fresh = envs.reset(seed=[seed, 0])
    assert equal(infos, fresh, row=0, keys=INFOS)
    assert equal(obs, fresh_obs, row=0)
    after_obs, *_, after = envs.step(HOLD)
    envs.reset(seed=[seed, 0])
    again_obs, *_, again = envs.step(HOLD)
    assert equal(after_obs, again_obs)
    assert equal(after, again, keys=INFOS)


def test_truncation_at_the_horizon_keeps_the_last_state_in_final_obs(envs):
    envs.reset(seed=0)
    envs.set_next_seeds([100, 200])
    for step in range(30):
        obs, reward, terminated, truncated, infos = envs.step(HOLD)
        assert truncated.all() == (step == 29)
    assert truncated.all()
    assert not terminated.any()
    assert infos["_final_info"].all()
    assert (reward == 0).all()
    final = infos["final_info"]
    assert final["elapsed_steps"].tolist() == [30, 30]
    assert final["seed"].tolist() == [0, 1]
    assert not final["success"].any()
    check_batch(infos["final_obs"], final)
    check_batch(obs, infos)
    assert infos["seed"].tolist() == [100, 200]
    assert infos["elapsed_steps"].tolist() == [0, 0]
    fresh_obs, fresh = envs.reset(seed=[100, 200])
    assert equal(infos, fresh, keys=INFOS)
    assert equal(obs, fresh_obs)
    assert not torch.equal(infos["final_obs"]["rgb"], obs["rgb"])


def test_success_in_the_reset_state_counts_nowhere(envs):
    """`stage_reach_rate` must end in `success_once`.

    PickCube draws its goal on the lying cube in about one episode of 150.
    """
    _, infos = envs.reset(seed=[1_073_741_855, 0])
    assert infos["success"].tolist() == [True, False]
    assert infos["stage"][0] == K
    assert infos["furthest_stage"].tolist() == [0, 0]
    # Success needs a robot at rest.
    up = HOLD + torch.tensor([0.0, 0, 1, 0, 0, 0, 0])
    *_, infos = envs.step(up)
    assert infos["success"].tolist() == [False, False]
    assert (infos["furthest_stage"] < K).all()


def check_half(half, sent, whole) -> None:
    """What `receive` gave for a half is what `step` gave for all envs, in the rows of this half."""
    obs, *numbers, infos = sent
    all_obs, *all_numbers, all_infos = whole
    for of_half, of_all in zip(numbers, all_numbers, strict=True):
        assert torch.equal(of_all[half], of_half)
    assert all(torch.equal(all_obs[name][half], obs[name]) for name in all_obs)
    for name in ("stage", "potential", "seed", "_final_info"):
        assert torch.equal(all_infos[name][half], infos[name])
    if infos["_final_info"].all():
        stage = infos["final_info"]["stage"]
        assert torch.equal(all_infos["final_info"]["stage"][half], stage)
        rgb = infos["final_obs"]["rgb"]
        assert torch.equal(all_infos["final_obs"]["rgb"][half], rgb)


def test_halves_that_take_turns_take_the_same_steps(envs):
    """To the end of the episode. The second half begins while the first one is at work."""
    generator = torch.Generator().manual_seed(0)
    actions = 0.5 * torch.randn(30, 2, 7, generator=generator)
    assert envs.halves == [slice(0, 1), slice(1, 2)]
    envs.reset(seed=[5, 6])
    received = []
    for t in range(31):
        for half in envs.halves:
            if t > 0:
                received.append(envs.receive(half))
            if t < 30:
                envs.send(half, actions[t, half])
    envs.reset(seed=[5, 6])
    for t in range(30):
        whole = envs.step(actions[t])
        for half, sent in zip(envs.halves, received[2 * t : 2 * t + 2], strict=True):
            check_half(half, sent, whole)
            # All episodes end at the horizon.
            assert sent[-1]["_final_info"].all() == (t == 29)


def test_a_single_env_has_one_half_whose_step_is_the_whole_step():
    """The envs of GPU simulation are of this class too, and all of them move at once."""
    env = StageEnv("PickCube-v1", 1, "cpu", 0, render=False)
    (half,) = env.halves
    assert half == slice(0, 1)
    env.reset([5])
    env.send(half, HOLD[:1])
    obs, reward, terminated, truncated, infos = env.receive(half)
    env.reset([5])
    same_obs, *numbers, same = env.step(HOLD[:1])
    assert equal(obs, same_obs)
    assert equal(infos, same, keys=INFOS)
    assert all(map(torch.equal, (reward, terminated, truncated), numbers))
    env.close()


def test_the_policy_sees_the_tool_s_pose_and_the_goal_and_the_next_seed_is_another(envs):
    env = StageEnv("PickCube-v1", 1, "cpu", 0, render=False)
    obs, _ = env.reset([3])
    # The next seed is not the neighbour's.
    assert abs(env.next_seed[0] - 3) > 1000
    opening = env.state["opening"][:, None]
    expected = torch.cat([env.state["tool"], env.state["quaternion"], opening], -1)
    assert torch.equal(obs["proprio"], expected)
    assert torch.allclose(obs["proprio"][:, :3], env.base.agent.tcp.pose.p)
    env.close()
    obs, _ = envs.reset(seed=[3, 4])
    red, green, blue = obs["rgb"].int().unbind(-1)
    goal = (green > red + 60) & (green > blue + 60)
    assert (goal.sum((1, 2)) > 10).all()


def test_a_reset_of_one_env_of_a_batch_leaves_the_others_alone():
    """As GPU simulation does it, with a simulator that says the same of all three."""
    env = StageEnv("PickCube-v1", 1, "cpu", 0, render=False)
    env.reset([3])
    env.close()
    state = {name: x.expand(3, *x.shape[1:]).clone() for name, x in env.state.items()}
    held = {"grasped": torch.ones(3, dtype=torch.bool), "object": torch.ones(3, 3)}
    no_success = {"success": torch.zeros(3, dtype=torch.bool)}
    env.num_envs = 3
    env.env = types.SimpleNamespace(reset=lambda seed, options: ({}, {}))
    env.base = types.SimpleNamespace(
        device=torch.device("cpu"),
        evaluate=lambda: no_success,
        elapsed_steps=torch.zeros(3),
        _hidden_objects=[],
    )
    env.task = dataclasses.replace(env.task, observe=lambda base: {**state, **held})
    env.observation = lambda obs: obs
    env.seeds = torch.tensor([7, 8, 9])
    env.furthest = torch.full((3,), 2)
    env.object_start = torch.zeros(3, 3)
    env.next_seed = [70, 80, 90]
    _, infos = env.reset(env_idx=torch.tensor([1]))
    assert infos["seed"].tolist() == [7, 80, 9]
    assert env.furthest.tolist() == [2, 0, 2]
    assert env.state["grasped"].tolist() == [True, False, True]
    assert env.object_start[:, 0].tolist() == [0, 1, 0]
    assert env.next_seed[::2] == [70, 90]
    assert env.next_seed[1] != 80


def test_expert_slips_only_where_told(envs):
    envs.reset(seed=[5, 6])
    expert = ScriptedExpert(envs)
    right = expert.act()
    slipped = expert.act(torch.tensor([1, 0]))
    whole_turn = expert.act(torch.full((2,), K))
    assert right[:, -1].tolist() == [1, 1]
    # The gripper closes in the air.
    assert slipped[:, -1].tolist() == [-1, 1]
    assert torch.equal(slipped[1], right[1])
    assert torch.equal(whole_turn, right)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"reward": "dense"},
        {"stock_camera": True},
        {"full_meshes": True},
        {"potential": "linear", "potential_across_stages": "bare"},
    ],
)
def test_every_option_of_the_simulator_keeps_the_contract(options):
    envs = make_envs("PickCube-v1", 2, seed=0, **options)
    check_batch(*envs.reset(seed=0))
    for _ in range(3):
        obs, reward, terminated, _, infos = envs.step(ScriptedExpert(envs).act())
        check_batch(obs, infos)
        # Nothing is grasped in three steps.
        assert (infos["potential"] <= 1).all()
        assert (reward > 0).all() == (options.get("reward") == "dense")
        assert (reward < 1).all()
        assert not terminated.any()
    envs.close()


# ---- what a software renderer is spared ----
def parts_of(urdf: Path) -> dict[str, list[bytes]]:
    """What the physics reads of a robot's file."""
    root = ElementTree.parse(urdf).getroot()
    tags = ("joint", "collision", "inertial")
    return {tag: [ElementTree.tostring(node) for node in root.iter(tag)] for tag in tags}


def size_of_meshes(urdf: Path) -> int:
    """Bytes of the visual meshes beside a robot's file."""
    folder = urdf.parent / "franka_description/meshes/visual"
    return sum(file.stat().st_size for file in folder.iterdir())


def test_light_meshes_leave_joints_and_collisions_alone():
    import mani_skill

    full = Path(mani_skill.PACKAGE_ASSET_DIR) / "robots/panda/panda_v2.urdf"
    light = light_assets() / "panda_v2.urdf"
    assert parts_of(full) == parts_of(light)
    assert all(parts_of(full).values())
    for mesh in ElementTree.parse(full).getroot().findall(".//collision//mesh"):
        name = mesh.get("filename")
        assert (full.parent / name).read_bytes() == (light.parent / name).read_bytes()
    assert size_of_meshes(light) < 0.5 * size_of_meshes(full)


@pytest.mark.slow
@pytest.mark.parametrize("env_id", ["PickCube-v1", needs_assets("PutEggplantInBasketScene-v1")])
def test_light_shaders_draw_the_same_pixels(env_id, monkeypatch):
    shader = light_assets() / "shaders/minimal/gbuffer.frag"
    assert "samplerBRDFLUT" not in shader.read_text()
    frames = []
    for light in (True, False):
        env = StageEnv(env_id, 1, "cpu", 0)
        # The camera was made with our shaders. A reset makes it again, with SAPIEN's.
        if not light:
            monkeypatch.setattr(sapien.render, "set_camera_shader_dir", STOCK_SHADERS)
        env.reset([5])
        seen = [env.step(torch.full((1, 7), 0.02 * i))[0]["rgb"] for i in range(4)]
        frames.append(torch.cat(seen))
        env.close()
    assert torch.equal(*frames)
    assert frames[0].float().std() > 10


@pytest.mark.parametrize(
    "env_id",
    [
        needs_assets("PutCarrotOnPlateInScene-v1"),
        needs_assets("PutEggplantInBasketScene-v1", slow=True),
    ],
)
def test_a_quarter_of_simplerenvs_pixels_shows_a_small_policy_the_same(env_id):
    frames = []
    sizes = []
    for full in (False, True):
        env = StageEnv(env_id, 1, "cpu", 0, full_meshes=full)
        env.reset([5])
        seen = [env.step(env.expert_action(RIGHT))[0]["rgb"] for _ in range(6)]
        frames.append(torch.cat(seen).float())
        cameras = env.base._sensor_configs.values()
        sizes.append([(camera.width, camera.height) for camera in cameras])
        env.close()
    assert sizes == [[(320, 240)], [(640, 480)]]
    difference = (frames[0] - frames[1]).abs().mean()
    assert difference < 1
    # A wrong intrinsic would move the picture by a pixel.
    moved = (frames[0] - frames[0].roll(1, 2)).abs().mean()
    assert moved > 3 * difference
    large = StageEnv(env_id, 1, "cpu", 0, image_size=224)
    assert [camera.width for camera in large.base._sensor_configs.values()] == [640]
    large.close()


@pytest.mark.parametrize("env_id", [needs_assets("PutCarrotOnPlateInScene-v1")])
def test_objects_do_not_settle_in_the_fingers_of_the_last_episode_s_arm(env_id):
    """Seed 2000's carrot would lie 4 cm from where it belongs."""
    env = StageEnv(env_id, 1, "cpu", 1000, render=False)
    env.reset()
    env.set_next_seeds([2000])
    done = torch.zeros(1, dtype=torch.bool)
    while not done:
        *_, terminated, truncated, infos = env.step(env.expert_action(RIGHT))
        done = terminated | truncated
    _, fresh = env.reset([2000])
    assert terminated
    assert infos["seed"] == 2000
    assert torch.allclose(infos["geometry"], fresh["geometry"], atol=1e-4)


# ---- processes ----
@pytest.mark.parametrize("local_rank", ["", "1"])
def test_a_gpu_draws_into_the_memory_of_the_env_process(local_rank, monkeypatch):
    """ManiSkill would return tensors on the GPU.

    Its own word for that backend must not come out, and the device must be the process's own.
    """
    devices = []
    asked = {}

    def device(name):
        devices.append(name)
        return name

    def ask(**kwargs):
        """Stands for ManiSkill's env class, and makes no env."""
        asked.update(kwargs)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("VK_ICD_FILENAMES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(sapien, "Device", device)
    monkeypatch.setattr(world.envs, "scene_class", lambda *args: ask)
    expected = "cuda"
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if local_rank:
        monkeypatch.setenv("WORLD_SIZE", "8")
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        expected = f"cuda:{local_rank}"
    # There is no env for the TimeLimitWrapper.
    with pytest.raises(TypeError):
        StageEnv("PickCube-v1", 1, "cpu", 0)
    backend = parse_sim_and_render_backend(asked["sim_backend"], asked["render_backend"])
    assert backend.render_backend != "sapien_cuda"
    assert backend.device.type == "cpu"
    assert devices[-1] == expected


@pytest.mark.parametrize(
    ("has_gpu", "render", "on_gpu"),
    [
        (True, "auto", True),
        (True, "gpu", True),
        (True, "cpu", False),
        (False, "auto", False),
        (False, "cpu", False),
    ],
)
def test_render_chooses_where_pictures_are_drawn(has_gpu, render, on_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.delenv("VK_ICD_FILENAMES", raising=False)
    monkeypatch.delenv("LP_NUM_THREADS", raising=False)
    choose_renderer(render)
    assert draws_on_gpu() == on_gpu
    # A later check chooses nothing else.
    choose_renderer("auto")
    assert draws_on_gpu() == on_gpu
    options = world.envs.simulator_options(TASK, "cpu", True, "sparse", True, 128)
    assert options["render_backend"] == ("cuda_cpu" if on_gpu else "cpu")
    assert ("lvp" in os.environ.get("VK_ICD_FILENAMES", "")) != on_gpu


def test_the_flag_counts_more_than_the_variable(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("VK_ICD_FILENAMES", "/etc/vulkan/icd.d/nvidia_icd.json")
    choose_renderer("gpu")
    assert draws_on_gpu()
    choose_renderer("cpu")
    assert not draws_on_gpu() and "lvp" in os.environ["VK_ICD_FILENAMES"]
    with pytest.raises(UserError, match="VK_ICD_FILENAMES names Mesa's"):
        choose_renderer("gpu")


def test_a_process_without_a_gpu_of_its_own_shares_one(monkeypatch):
    monkeypatch.setattr(world.envs, "draws_on_gpu", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "3")
    for count, device in ((1, 0), (2, 0), (3, 2)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        monkeypatch.setenv("LOCAL_RANK", "2")
        options = world.envs.simulator_options(TASK, "cpu", True, "sparse", True, 128)
        assert options["render_backend"] == f"cuda_cpu:{device}"


def test_a_renderer_that_is_not_there_is_named(monkeypatch):
    with pytest.raises(UserError, match="--render cpu"):
        choose_renderer("gpu")
    monkeypatch.setattr(world.assets, "SOFTWARE_DRIVER", "no_such_driver")
    with pytest.raises(UserError, match="Mesa"):
        choose_renderer("cpu")
    monkeypatch.undo()
    # The machine has a GPU, and --render cpu has been given.
    choose_renderer("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match="leave out --render cpu"):
        check_renderer("cuda")


def test_env_processes_do_not_import_the_script_again(monkeypatch):
    told = []
    script = sys.modules["__main__"]
    # A test process may be started without a file.
    monkeypatch.setattr(script, "__file__", "a_script.py", raising=False)
    monkeypatch.setattr(script, "__spec__", None, raising=False)

    def start(*args, **kwargs):
        """Stands for Processes, and starts none."""
        told.append(spawn.get_preparation_data("env"))

    monkeypatch.setattr(world.vector, "Processes", start)
    # There are no processes whose spaces could be read.
    with pytest.raises(AttributeError):
        StageVectorEnv("PickCube-v1", 2, 0)
    assert told
    assert not any(key.startswith("init_main") for key in told[0])
    other = spawn.get_preparation_data("another")
    assert any(key.startswith("init_main") for key in other)


def process_settings() -> tuple:
    """What an env process changes about itself."""
    interrupt = signal.getsignal(signal.SIGINT)
    return torch.get_num_threads(), os.getpgrp(), interrupt, torch.cuda.synchronize


def test_the_env_that_gymnasium_makes_in_the_script_leaves_the_script_as_it_was():
    threads, *before = process_settings()
    torch.set_num_threads(3)
    env = make_process_env("PickCube-v1", 0, 0, {"image_size": 64})
    after = process_settings()
    torch.set_num_threads(threads)
    assert after == (3, *before)
    assert not hasattr(env, "env")
    assert env.observation_space["rgb"].shape == (64, 64, 3)


@pytest.mark.parametrize("env_id", ["PickCube-v1", "LiftPegUpright-v1"])
def test_infos_come_out_of_a_row_of_numbers_as_they_went_in(env_id):
    """LiftPegUpright-v1 reports one number more. The seed is too large for a float32."""
    env = StageEnv(env_id, 1, "cpu", 0, render=False)
    env.reset(seed=2**30 - 1)
    *_, infos = env.step(env.expert_action(RIGHT))
    del infos["_final_info"]
    fields = info_fields(env.task)
    row = torch.from_numpy(pack_infos(infos, fields))
    found = unpack_infos(torch.stack([row, row]), fields)
    assert found.keys() == infos.keys()
    for name, x in infos.items():
        assert found[name].dtype == x.dtype
        assert torch.equal(found[name], torch.cat([x, x]))
    assert found["seed"].tolist() == [2**30 - 1] * 2
    env.close()


# ---- demonstrations ----
def test_failed_episodes_and_those_beyond_the_number_are_not_read(tmp_path):
    path = write_demos(tmp_path / "demos.h5", lengths=(5, 6, 7))
    meta = json.loads(path.with_suffix(".json").read_text())
    meta["episodes"][0]["success"] = False
    path.with_suffix(".json").write_text(json.dumps(meta))
    with h5py.File(path, "a") as file:
        file["traj_1/stage"] = np.array([0, 1, 2, 3, 4, -1], np.int32)
    rgb, *_, stage = read_demos(path, "PickCube-v1", 1)
    assert len(rgb) == 6
    # Success is no stage.
    assert stage.tolist() == [0, 1, 2, 3, -1, -1]
    assert stage.dtype == torch.int64


def test_demonstrations_slower_than_the_task_are_named(tmp_path, capsys):
    path = tmp_path / "demos.h5"
    read_demos(write_demos(path, lengths=(50, 49)), "PickCube-v1", 9)
    assert capsys.readouterr().out == ""
    read_demos(write_demos(path, lengths=(50, 51, 60)), "PickCube-v1", 9)
    warning = "2 of 3 demonstrations of PickCube-v1 take longer than its episodes of 50 steps"
    assert warning in capsys.readouterr().out


@pytest.mark.parametrize(("lengths", "told"), [((50, 51, 60, 60), False), ((51, 51, 60, 60), True)])
def test_the_experts_own_recoveries_are_no_slowness(lengths, told, capsys):
    episodes = []
    for length in lengths:
        rgb = np.zeros((length, 2, 2, 3), np.uint8)
        numbers = np.zeros((length, 7), np.float32)
        episodes.append((rgb, numbers, numbers, numbers, np.zeros(length, np.int64)))
    join(Path("demos.h5"), "PickCube-v1", episodes, scripted=True)
    assert ("take longer than its episodes of 50 steps" in capsys.readouterr().out) == told


# ---- evaluation ----
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
    monkeypatch.setitem(ALIASES, "cube", "PickCube-v1")
    first = evaluate(model, processor, "PickCube-v1", 2, 0, 2)
    second = evaluate(model, processor, "cube", 2, 0, 2)
    assert first == second
    assert model.training
    assert [row["seed"] for row in first["episodes"]] == [EVAL_SEED, EVAL_SEED + 1]
    lengths = [row["episode_len"] for row in first["episodes"]]
    assert lengths == [TASK.max_episode_steps] * 2
    assert EVAL_SEED >= TRAIN_SEEDS


class AtOnce:
    """Envs in one half, so that the policy acts for all of them and then all of them move.

    The scripted expert needs that, because it cannot act while an env is at work.
    """

    def __init__(self, envs):
        self.envs = envs
        self.halves = [slice(0, envs.num_envs)]

    def __getattr__(self, name):
        return getattr(self.envs, name)

    def send(self, half, actions):
        self.arrived = self.envs.step(actions)

    def receive(self, half):
        return self.arrived


def test_evaluation_counts_success_and_stages_of_the_expert(evaluate, endless, monkeypatch):
    """Three episodes in two envs, so one round is not full.

    The policy is the expert, as tokens, in env 0 alone. It leaves the last goal again.
    """
    expert = ScriptedExpert(endless)
    calls = []

    def act(model, inputs, active, greedy):
        assert greedy
        calls.append(1)
        action = expert.act()[:1]
        if len(calls) > 95:
            action = LEAVE
        bins = vla.tokenize_actions(torch.cat([action, HOLD[:1]]), STATS["action"])
        return bins, None, None

    monkeypatch.setattr(evaluation, "sample_action", act)
    monkeypatch.setattr(evaluation, "make_envs", lambda *args, **kwargs: AtOnce(endless))
    result = evaluate(*tiny_model(), "PickCube-v1", 3, 1, 2)
    rows = result["episodes"]
    assert [row["success_once"] for row in rows] == [True, False, True]
    assert [row["success_at_end"] for row in rows] == [True, False, False]
    assert result["success_once"] == result["stage_reach_rate"][-1] == pytest.approx(2 / 3)
    assert result["success_once"] == 2 * result["success_at_end"]
    assert len(result["stage_reach_rate"]) == K
    assert [row["furthest_stage"] for row in rows] == [K, 0, K]
    assert [row["seed"] - EVAL_SEED for row in rows] == [100_000, 100_001, 100_002]
    assert all(sum(row["stage_steps"]) == row["episode_len"] == 50 for row in rows)
    assert rows[1]["stage_steps"][0] == 50
    for row in (rows[0], rows[2]):
        assert min(row["stage_steps"]) > 0
        # The last step's success counts in the return, and its state is not acted in.
        assert row["return"] == row["stage_steps"][K] + row["success_at_end"]


def test_evaluation_reads_the_separator_and_reports_at_the_first_success(envs, monkeypatch):
    """Env 0 is told a success at steps 5 and 6 of 30.

    Four episodes are asked for, and the grid has two.
    """
    task = dataclasses.replace(TASK, max_episode_steps=30, grid=2, report=("stage_distance",))
    receive = envs.receive
    steps = []
    won = []
    read = []

    def cheat(half):
        obs, *numbers, infos = receive(half)
        if half.start == 0:
            if len(steps) in (5, 6):
                infos["success"][:] = True
                won.append(float(infos["stage_distance"][0]))
            steps.append(1)
        return obs, *numbers, infos

    def compare(episodes, num_stages):
        read.extend(episodes)
        return {}

    monkeypatch.setattr(envs, "close", lambda: None)
    monkeypatch.setattr(envs, "receive", cheat)
    monkeypatch.setattr(envs, "task", task)
    monkeypatch.setattr(evaluation, "get_task", lambda env_id: task)
    monkeypatch.setattr(evaluation, "make_envs", lambda *args, **kwargs: envs)
    monkeypatch.setattr(evaluation, "compare_separator", compare)
    separator = torch.nn.Linear(64, 6)
    model, processor = tiny_model()
    result = evaluation.evaluate(model, processor, "PickCube-v1", 4, 0, 2, separator=separator)
    rows = result["episodes"]
    assert len(rows) == len(read) == 2
    assert [int(over.sum()) for _, _, over in read] == [24, 0]
    for _, logprobs, _ in read:
        assert logprobs.shape == (30, K)
        assert torch.allclose(logprobs.exp().sum(-1), torch.ones(30))
    assert rows[0]["stage_distance"] == won[0]
    assert "stage_distance" not in rows[1]
    counts = [torch.bincount(stages, minlength=K + 1).tolist() for stages, _, _ in read]
    assert counts == [row["stage_steps"] for row in rows]


# ---- numbers of an evaluation ----
def rows_of(outcomes: dict[int, int]) -> list[dict]:
    """Rows from seed -> 1 for a success, else 0."""
    return [{"seed": seed, "success_once": won == 1} for seed, won in outcomes.items()]


def test_intervals_by_hand():
    # As scipy's binomtest(8, 10).proportion_ci(method="wilson").
    assert wilson(8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-6)
    a = rows_of({5: 0, 6: 0, 7: 0, 8: 1})
    b = rows_of({8: 0, 5: 1, 6: 0, 7: 1, 9: 1})
    found = paired_difference(a, b)
    assert found["num_episodes"] == 4
    assert found["difference"] == 0.25
    # The pairs are -1, 1, 0, 1, and two are added: 2.5 won and 1.5 lost of 6.
    half = 1.959964 * ((2.5 / 6 + 1.5 / 6 - (1 / 6) ** 2) / 6) ** 0.5
    interval = (1 / 6 - half, 1 / 6 + half)
    assert (found["low"], found["high"]) == pytest.approx(interval, abs=1e-6)


@pytest.mark.parametrize(("won", "lost"), [(0.04, 0.0), (0.1, 0.05), (0.3, 0.1)])
def test_the_paired_interval_of_24_episodes_holds_the_truth_as_often_as_it_says(won, lost):
    """The plain normal interval does so in 62, 91 and 94 % of the cases.

    Where no pair differs the plain interval is [0, 0].
    """
    rng = np.random.default_rng(0)
    kinds = [[0, 1], [1, 0], [1, 1]]
    held = 0
    for _ in range(2000):
        pairs = rng.choice(kinds, 24, p=[won, lost, 1 - won - lost])
        a = rows_of(dict(enumerate(pairs[:, 0])))
        b = rows_of(dict(enumerate(pairs[:, 1])))
        found = paired_difference(a, b)
        held += found["low"] <= won - lost <= found["high"]
    assert held / 2000 > 0.93


def test_where_episodes_are_lost_is_told_stage_by_stage():
    rows = []
    for k in (0, 1, 3, 4):
        row = {
            "seed": k,
            "success_once": k == 4,
            "success_at_end": False,
            "return": 0.0,
            "episode_len": 50,
            "furthest_stage": k,
            "stage_steps": [k] * 5,
        }
        rows.append(row)
    result = mean_rows(rows, 4)
    assert result["stage_reach_rate"] == [0.75, 0.5, 0.5, 0.25]
    assert result["stage_steps"] == [2.0] * 4
    result = {**result, "method": "SFT", "env_id": "PickCube-v1"}
    _, line, _ = result_table([result]).splitlines()
    assert line.split("]")[1].split() == "0.0 % 75.0 % 66.7 % 100.0 % 50.0 %".split()
    other_camera = {**result, "ood": "camera", "instructions": ()}
    other_words = {**result, "ood": "none", "instructions": ("pick it",)}
    _, *lines, _ = result_table([other_camera, other_words]).splitlines()
    assert [line.split("  ")[0] for line in lines] == ["SFT, camera", "SFT, other words"]


def test_a_task_s_report_is_of_the_successes():
    episodes = []
    for i, tilt in enumerate((9.0, 0.1, 0.2, 0.3)):
        episodes.append({"seed": i, "success_once": i > 1, "tilt": tilt})
    result = {
        "method": "SFT",
        "env_id": "LiftPegUpright-v1",
        "success_once": 0.5,
        "success_at_end": 0.5,
        "stage_reach_rate": [0.5] * 4,
        "episodes": episodes,
    }
    assert "tilt at success: median 0.250, largest 0.300" in result_table([result])
