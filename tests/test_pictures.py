"""Pictures: light scenes are drawn in less time, with the same pixels and the same physics.

The reference has the robot of `light_assets` too. All else in it is ManiSkill's and SAPIEN's own.
"""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import mani_skill
import numpy as np
import pytest
import sapien
import torch
from conftest import ROOT, needs_assets

import world.assets
import world.envs
from world.assets import STOCK_SHADERS, check_simplerenv, light_assets, light_shaders
from world.envs import StageEnv
from world.tasks import TASKS, UserError

RIGHT = torch.zeros(1, dtype=torch.long)
EGGPLANT = "PutEggplantInBasketScene-v1"
# Grey levels: the mean difference that is allowed, and the one that few numbers may exceed.
MEAN_DIFFERENCE = 0.02
LARGE_DIFFERENCE = 8
LARGE_SHARE = 5e-4
# A process that makes the cache, or says in one line why it cannot.
MAKE_CACHE = """
from world.assets import light_assets
from world.tasks import UserError
try:
    print(light_assets())
except UserError as error:
    print(error)
"""


# ---- the same pixels ----
def play(env: StageEnv, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures and simulator states of one episode of the expert and one of random actions."""
    random = torch.Generator().manual_seed(0)
    limit = torch.tensor(env.task.arm.limit)
    pictures = []
    states = []
    for seed in (3, 4):
        obs, _ = env.reset([seed])
        for _ in range(steps):
            pictures.append(obs["rgb"].numpy())
            states.append(env.base.get_state().numpy())
            action = env.expert_action(RIGHT)
            if seed == 4:
                action = (2 * torch.rand(action.shape, generator=random) - 1) * limit
            obs = env.step(action)[0]
    return np.concatenate(pictures), np.concatenate(states)


def compare_pictures(env_id: str, ood: str, steps: int, monkeypatch) -> None:
    """Asserts that a light scene looks and moves as the reference does."""
    env = StageEnv(env_id, 1, "cpu", 0, ood=ood)
    light, light_states = play(env, steps)
    env.close()

    monkeypatch.setattr(world.assets, "redraw", lambda actor, shape: None)
    # SAPIEN has shaders of the same name.
    monkeypatch.setattr(world.envs, "STOCK_SHADERS", lambda path: STOCK_SHADERS(Path(path).name))
    env = StageEnv(env_id, 1, "cpu", 0, ood=ood)
    reference, states = play(env, steps)
    env.close()

    assert np.array_equal(light_states, states)
    assert reference.std() > 10
    difference = np.abs(light.astype(int) - reference)
    assert difference.mean() < MEAN_DIFFERENCE
    assert (difference > LARGE_DIFFERENCE).mean() <= LARGE_SHARE


def test_light_scenes_look_the_same(monkeypatch):
    compare_pictures("PickCube-v1", "none", 8, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("ood", ["none", "position", "camera", "lighting"])
@pytest.mark.parametrize("env_id", [needs_assets(env_id) for env_id in TASKS])
def test_light_scenes_look_the_same_in_every_task(env_id, ood, monkeypatch):
    compare_pictures(env_id, ood, 25, monkeypatch)


def test_an_edit_that_misses_is_an_error(tmp_path, monkeypatch):
    edits = (("there is no such line", ""),)
    monkeypatch.setattr(world.assets, "COLOUR_EDITS", edits)
    with pytest.raises(AssertionError, match="no such line is 0 times"):
        light_shaders(tmp_path / "shaders", segmentation=True)


# ---- fewer triangles ----
def count_triangles(env: StageEnv, name: str) -> int:
    """The triangles with which one actor is drawn."""
    (entity,) = env.base.scene.actors[name]._objs
    body = entity.find_component_by_type(sapien.render.RenderBodyComponent)
    return sum(len(part.triangles) for shape in body.render_shapes for part in shape.parts)


@pytest.mark.parametrize(
    "env_id, name, full, most",
    [
        ("PickCube-v1", "ground", 20_000, 2),
        pytest.param(*needs_assets(EGGPLANT).values, "sink", 19_410, 6_000),
    ],
)
def test_light_scenes_have_few_triangles_and_the_same_physics(env_id, name, full, most):
    states = []
    counts = []
    for full_meshes in (True, False):
        env = StageEnv(env_id, 1, "cpu", 0, full_meshes=full_meshes)
        states.append(play(env, 8)[1])
        # The last reset has built the scene again.
        counts.append(count_triangles(env, name))
        env.close()
    assert np.array_equal(*states)
    assert counts[0] == full and counts[1] <= most


def test_full_meshes_are_not_redrawn(monkeypatch):
    def fail(*args):
        raise AssertionError("ManiSkill's own scene was changed")

    monkeypatch.setattr(world.assets, "redraw", fail)
    monkeypatch.setattr(world.envs, "light_assets", fail)
    env = StageEnv("PegInsertionSide-v1", 1, "cpu", 0, full_meshes=True)
    env.reset([1])
    env.close()


# ---- the cache ----
def start(code: str, *limit: str, **environ: str) -> subprocess.Popen:
    """Starts a process of Python. limit: a command that goes before it."""
    command = [*limit, sys.executable, "-c", code]
    environ = {**os.environ, **environ}
    return subprocess.Popen(command, cwd=ROOT, env=environ, text=True, stdout=subprocess.PIPE)


def test_two_processes_make_the_cache_at_once(tmp_path):
    makers = [start(MAKE_CACHE, XDG_CACHE_HOME=str(tmp_path)) for _ in range(2)]
    printed = {maker.communicate()[0].strip() for maker in makers}
    assert [maker.returncode for maker in makers] == [0, 0]
    # Both name the one folder that there is.
    (folder,) = (tmp_path / "stare-vla").iterdir()
    assert printed == {str(folder)}
    shaders = folder / "shaders/minimal/gbuffer.frag"
    colour = folder / "colour_shaders/minimal/gbuffer.frag"
    assert "samplerBRDFLUT" not in shaders.read_text() + colour.read_text()
    assert "outPositionSegmentation" in shaders.read_text()
    assert "outPositionSegmentation" not in colour.read_text()


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    # No file may be longer than this, as if the disk were full.
    maker = start(MAKE_CACHE, "prlimit", "--fsize=100000", XDG_CACHE_HOME=str(tmp_path))
    (line,) = maker.communicate()[0].splitlines()
    assert "File too large" in line and "set XDG_CACHE_HOME to another folder" in line
    assert list((tmp_path / "stare-vla").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    with pytest.raises(UserError, match="cannot be written.*set XDG_CACHE_HOME") as error:
        light_assets()
    assert "\n" not in str(error.value)


# ---- SimplerEnv's assets ----
def snapshot(folder: Path) -> dict[Path, tuple[int, int]]:
    """Size (bytes) and time of the last change (ns) of all that is in a folder."""
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


@pytest.mark.slow
@pytest.mark.parametrize("env_id", [needs_assets(EGGPLANT)])
def test_assets_are_only_read(env_id, tmp_path):
    shutil.copytree(mani_skill.ASSET_DIR, tmp_path / "data", copy_function=shutil.copyfile)
    paths = [tmp_path, *tmp_path.rglob("*")]
    for path in paths:
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    before = snapshot(tmp_path)
    code = f"""
from world.assets import check_world
from world.envs import StageEnv
check_world("{env_id}")
env = StageEnv("{env_id}", 1, "cpu", 0)
print(env.reset([1])[0]["rgb"].float().std().item())
"""
    player = start(code, MS_ASSET_DIR=str(tmp_path))
    assert float(player.communicate()[0]) > 10
    assert snapshot(tmp_path) == before
    for path in paths:
        path.chmod(path.stat().st_mode | stat.S_IWUSR)


@pytest.mark.parametrize(
    "file",
    [
        "robots/widowx/wx250s.urdf",
        "robots/widowx/meshes_wx250s/WXSA-250-M-4-UF.stl",
        "tasks/bridge_v2_real2sim_dataset/custom/models/sink/textured.dae",
        "tasks/bridge_v2_real2sim_dataset/real_inpainting/bridge_sink.png",
    ],
)
@pytest.mark.parametrize("env_id", [needs_assets(EGGPLANT)])
def test_a_missing_mesh_is_named(env_id, file, tmp_path, monkeypatch):
    data = tmp_path / "data"
    shutil.copytree(mani_skill.ASSET_DIR, data, copy_function=os.symlink)
    monkeypatch.setattr(mani_skill, "ASSET_DIR", data)
    check_simplerenv(env_id, "cpu", "sparse")
    (data / file).unlink()
    with pytest.raises(UserError, match="download_asset.*MS_ASSET_DIR") as error:
        check_simplerenv(env_id, "cpu", "sparse")
    assert Path(file).stem in str(error.value) and "\n" not in str(error.value)
