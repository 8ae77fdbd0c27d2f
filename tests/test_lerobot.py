"""LeRobotDatasets: what is written is read again, by lerobot itself too, and faults are named.

LEROBOT_PYTHON may name the Python of another venv, which has lerobot 0.4 (it needs an older torch).
"""

import json
import os
import subprocess
import sys

import imageio.v3 as imageio
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, call, output_of, scalars, write_demos
from tqdm import tqdm

import sft
from world.demos import read_demos, read_episodes, read_meta
from world.lerobot import IMAGE, STATE, read_lerobot, write_lerobot
from world.tasks import TASKS, UserError

ENV_ID = "PickCube-v1"
LEROBOT = os.environ.get("LEROBOT_PYTHON", sys.executable)
FLAGS = "--vla tiny --num-updates 2 --batch-size 4 --num-eval-episodes 0 --no-cuda".split()

# What lerobot sees of a folder, as JSON.
LOOK = """
import json, sys
import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset
data = LeRobotDataset("local/demos", root=sys.argv[1])
frame = data[7]
print(json.dumps({
    "episodes": data.num_episodes,
    "frames": len(data),
    "fps": data.fps,
    "task": frame["task"],
    "rgb": (frame["observation.images.base"] * 255).round().long().permute(1, 2, 0).tolist(),
    "state": frame["observation.state"].tolist(),
    "action": frame["action"].tolist(),
    "mean": np.asarray(data.meta.stats["action"]["mean"]).tolist(),
}))
"""

# A dataset of two episodes that lerobot itself records, with its video encoder.
RECORD = """
import sys
import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset
features = {
    "observation.images.base": {"dtype": "video", "shape": (128, 128, 3),
                                "names": ["height", "width", "channels"]},
    "observation.state": {"dtype": "float32", "shape": (8,), "names": None},
    "action": {"dtype": "float32", "shape": (7,), "names": None},
}
data = LeRobotDataset.create("local/x", fps=20, features=features, root=sys.argv[1])
for episode in range(2):
    for t in range(10 + episode):
        rgb = np.full((128, 128, 3), 50 + 80 * episode + 5 * t, np.uint8)
        frame = {"observation.images.base": rgb, "task": sys.argv[2]}
        frame["observation.state"] = np.full(8, t, np.float32)
        frame["action"] = np.full(7, 0.05 * t, np.float32)
        data.add_frame(frame)
    data.save_episode()
data.finalize()
"""


@pytest.fixture
def file(tmp_path):
    """Three made-up episodes in ManiSkill's format."""
    return write_demos(tmp_path / "demos.h5")


@pytest.fixture
def folder(file, tmp_path):
    """The same episodes as a LeRobotDataset."""
    meta = read_meta(file)
    episodes = read_episodes(file, ENV_ID, meta, 100, 128, tqdm)
    write_lerobot(tmp_path / "set", ENV_ID, episodes)
    return tmp_path / "set"


def change_info(folder, **changes) -> None:
    """Writes other values into meta/info.json."""
    path = folder / "meta/info.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_data(folder, change) -> None:
    """Lets `change` work on the table of all frames."""
    path = folder / "data/chunk-000/file-000.parquet"
    table = pd.read_parquet(path)
    change(table).to_parquet(path, index=False)


def change_episodes(folder, change) -> None:
    """Lets `change` work on the table of episodes."""
    path = folder / "meta/episodes/chunk-000/file-000.parquet"
    change(pd.read_parquet(path)).to_parquet(path, index=False)


def drop(folder, *names: str) -> None:
    """Takes features away."""
    change_data(folder, lambda table: table.drop(columns=list(names)))
    features = json.loads((folder / "meta/info.json").read_text())["features"]
    change_info(folder, features={k: v for k, v in features.items() if k not in names})


def as_video(folder, fps: int = 20) -> None:
    """Replaces a dataset's pictures by a video, as lerobot does by default. Nothing is lost."""
    path = folder / "data/chunk-000/file-000.parquet"
    table = pd.read_parquet(path)
    frames = [imageio.imread(cell["bytes"]) for cell in table.pop(IMAGE)]
    table.to_parquet(path, index=False)
    film = folder / f"videos/{IMAGE}/chunk-000/file-000.mp4"
    film.parent.mkdir(parents=True)
    options = {"fps": fps, "codec": "libx264rgb", "pixelformat": "rgb24"}
    imageio.imwrite(film, np.stack(frames), output_params=["-crf", "0"], **options)
    info = json.loads((folder / "meta/info.json").read_text())
    info["features"][IMAGE]["dtype"] = "video"
    video_path = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
    change_info(folder, features=info["features"], video_path=video_path)
    video = {f"videos/{IMAGE}/chunk_index": 0, f"videos/{IMAGE}/file_index": 0}
    start = f"videos/{IMAGE}/from_timestamp"
    change_episodes(
        folder,
        lambda rows: rows.assign(**video, **{start: rows["dataset_from_index"] / 20}),
    )


# ---- what is written is read again ----
def test_nothing_is_lost_on_the_way(file, folder):
    before = read_demos(file, ENV_ID, 100)
    after = read_lerobot(folder, ENV_ID, 100)
    assert len(before[0]) > 0
    for old, new in zip(before, after, strict=True):
        assert old.dtype == new.dtype and torch.equal(old, new)


def test_the_first_episodes_are_taken(file, folder):
    first = read_demos(file, ENV_ID, 1)
    assert torch.equal(read_lerobot(folder, ENV_ID, 1)[0], first[0])


def test_a_video_of_several_episodes_is_cut_at_the_right_frames(folder):
    before = read_lerobot(folder, ENV_ID, 100)[0]
    as_video(folder)
    assert torch.equal(read_lerobot(folder, ENV_ID, 100)[0], before)


def test_without_geometry_and_stage_both_are_unknown(folder):
    drop(folder, "geometry", "stage")
    _, _, _, geometry, stage = read_lerobot(folder, ENV_ID, 100)
    assert geometry.isnan().all() and (stage == -1).all()


def test_a_folder_in_its_place_is_left_alone(folder):
    with pytest.raises(UserError, match="is there already: give another folder"):
        write_lerobot(folder, ENV_ID, [])


# ---- the scripts, as a user starts them ----
def test_a_file_becomes_a_dataset_and_a_policy(file, tmp_path):
    command = [sys.executable, "-m", "world.demos", "to-lerobot", file, tmp_path / "set"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"episodes of {ENV_ID} into {tmp_path / 'set'}\n")
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 2 and again.stdout == ""
    assert again.stderr.splitlines()[-1].startswith(f"error: {tmp_path / 'set'} is there already")
    printed = []
    for name, path in {"file": file, "set": tmp_path / "set"}.items():
        flags = ["--demo-path", path, "--output-dir", tmp_path / name, *FLAGS]
        printed.append(
            output_of("sft.py", "--env-id", ENV_ID, *flags, cwd=tmp_path).splitlines()[0]
        )
        assert "frames; action dimensions" in printed[-1]
    assert printed[0] == printed[1]
    weights = [tmp_path / name / "checkpoint/model.safetensors" for name in ("file", "set")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_unknown_geometry_is_no_error(folder, tmp_path):
    drop(folder, "geometry")
    run = tmp_path / "run"
    call(sft, "--env-id", ENV_ID, "--demo-path", folder, "--output-dir", run, *FLAGS)
    logged = scalars(run)
    assert logged["losses/aux"] == [0.0]
    # The cross-entropy still teaches, and no gradient is NaN.
    assert logged["losses/ce"][0] > 0 and logged["losses/grad_norm"][0] > 0


# ---- faults ----
def test_a_folder_that_is_no_dataset_is_named(tmp_path):
    with pytest.raises(UserError, match=r"is no LeRobotDataset: .*info.json is missing"):
        read_lerobot(tmp_path, ENV_ID, 1)


def flip_bits(table):
    """The table with pictures whose bytes are changed in the middle."""

    def flip(cell):
        data = bytearray(cell["bytes"])
        for place in range(len(data) // 3, len(data) // 2):
            data[place] ^= 255
        return {**cell, "bytes": bytes(data)}

    return table.assign(**{IMAGE: [flip(cell) for cell in table[IMAGE]]})


FAULTS = {
    "an older version": (
        lambda folder: change_info(folder, codebase_version="v2.1"),
        r"is a LeRobotDataset v2.1: convert it to v3.0 with",
    ),
    "another pace": (
        lambda folder: change_info(folder, fps=30),
        r"has 30 frames per second, and PickCube-v1 has 20 steps",
    ),
    "no camera of ours": (
        lambda folder: change_info(folder, features={"action": {"dtype": "float32"}}),
        r"feature observation.images.base is missing; it has action",
    ),
    "no pictures": (
        lambda folder: change_data(folder, lambda table: table.drop(columns=[IMAGE])),
        r"cannot read .*file-000.parquet: its bytes are damaged",
    ),
    "a state of another robot": (
        lambda folder: change_data(
            folder, lambda table: table.assign(**{STATE: [np.zeros(6, np.float32)] * len(table)})
        ),
        r"episode 0: observation.state has the shape \(\d+, 6\)",
    ),
    "an action that is not finite": (
        lambda folder: change_data(
            folder, lambda table: table.assign(action=[np.full(7, np.nan, np.float32)] * len(table))
        ),
        r"episode 0: action has numbers that are not finite",
    ),
    "pictures that are none": (
        lambda folder: change_data(
            folder,
            lambda table: table.assign(**{IMAGE: [{"bytes": b"x", "path": ""}] * len(table)}),
        ),
        r"cannot read .*file-000.parquet: its bytes are damaged",
    ),
    "pictures with flipped bits": (
        lambda folder: change_data(folder, flip_bits),
        r"cannot read .*file-000.parquet: its bytes are damaged \(a picture cannot be decoded\)",
    ),
    "lost frames": (
        lambda folder: change_data(folder, lambda table: table.drop(index=2)),
        r"episode 0: elapsed_steps is 6, and there are 5 actions",
    ),
    "mixed frames": (
        lambda folder: change_data(folder, lambda table: table.iloc[::-1]),
        r"episode 0: frame_index does not count from 0",
    ),
    "an episode twice": (
        lambda folder: change_data(folder, lambda table: pd.concat([table, table])),
        r"episode 0: elapsed_steps is 6, and there are 12 actions",
    ),
    "a lost episode": (
        lambda folder: change_episodes(folder, lambda rows: rows.drop(index=0)),
        r"says that it has 2 episodes, and .* lists 1: some are missing, or there twice",
    ),
    "an episode listed twice": (
        lambda folder: change_episodes(folder, lambda rows: rows.assign(episode_index=0)),
        r"says that it has 2 episodes, and .* lists 2: some are missing, or there twice",
    ),
    "a number of episodes that is none": (
        lambda folder: change_info(folder, total_episodes=float("inf")),
        r"is no LeRobotDataset",
    ),
    "no name of the data": (
        lambda folder: change_info(folder, data_path=None),
        r"is no LeRobotDataset",
    ),
    "no numbers of the episodes": (
        lambda folder: change_episodes(folder, lambda rows: rows.drop(columns="episode_index")),
        r"cannot read .*meta/episodes",
    ),
    "another control mode": (
        lambda folder: change_info(folder, control_mode="pd_joint_pos"),
        r"control_mode is pd_joint_pos, PickCube-v1 needs pd_ee_delta_pose",
    ),
    "a missing file": (
        lambda folder: (folder / "data/chunk-000/file-000.parquet").unlink(),
        r"cannot read .*file-000.parquet: there is no file of that name",
    ),
    "a damaged table of episodes": (
        lambda folder: (folder / "meta/episodes/chunk-000/file-000.parquet").write_bytes(b"x"),
        r"cannot read .*file-000.parquet: its bytes are damaged",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named(folder, name):
    spoil, words = FAULTS[name]
    spoil(folder)
    with pytest.raises(UserError, match=words):
        read_lerobot(folder, ENV_ID, 100)


def test_words_of_another_task_are_refused(folder):
    with pytest.raises(UserError, match=r"holds demonstrations of \['pick up.*PushCube-v1 is 'p"):
        read_lerobot(folder, "PushCube-v1", 100)


def test_a_video_that_is_too_short_is_refused(folder):
    as_video(folder)
    start = f"videos/{IMAGE}/from_timestamp"
    change_episodes(folder, lambda rows: rows.assign(**{start: rows[start] + 0.1}))
    with pytest.raises(UserError, match="episode 1: observation.images.base has the shape"):
        read_lerobot(folder, ENV_ID, 100)


def test_a_video_of_another_pace_is_refused(folder):
    as_video(folder, fps=30)
    with pytest.raises(UserError, match="30.0 frames per second, and info.json says 20"):
        read_lerobot(folder, ENV_ID, 100)


def test_a_failed_episode_is_left_out(folder):
    first = read_lerobot(folder, ENV_ID, 1)
    change_data(folder, lambda table: table.assign(**{"next.success": table["episode_index"] == 0}))
    info = json.loads((folder / "meta/info.json").read_text())
    features = {**info["features"], "next.success": {"dtype": "bool", "shape": [1]}}
    change_info(folder, features=features)
    for old, new in zip(first, read_lerobot(folder, ENV_ID, 100), strict=True):
        assert torch.equal(old, new)


def test_pictures_of_another_size_are_kept(tmp_path):
    file = write_demos(tmp_path / "small.h5", size=64)
    command = [sys.executable, "-m", "world.demos", "to-lerobot", file, tmp_path / "small"]
    done = subprocess.run([*command, "--image-size", "64"], cwd=ROOT, capture_output=True)
    assert done.returncode == 0
    assert read_lerobot(tmp_path / "small", ENV_ID, 100, image_size=64)[0].shape[1:] == (64, 64, 3)


def test_everyone_may_read_what_is_written(folder):
    assert folder.stat().st_mode & 0o055 == 0o055


def test_episodes_longer_than_the_task_are_told(tmp_path, capsys):
    file = write_demos(tmp_path / "slow.h5", lengths=(60, 60))
    episodes = read_episodes(file, ENV_ID, read_meta(file), 100, 128, tqdm)
    write_lerobot(tmp_path / "slow", ENV_ID, episodes)
    read_lerobot(tmp_path / "slow", ENV_ID, 100)
    words = f"2 of 2 demonstrations of {ENV_ID} take longer than its episodes of 50 steps: record"
    assert words in capsys.readouterr().out


def test_an_unnamed_control_mode_is_told(folder, capsys):
    info = json.loads((folder / "meta/info.json").read_text())
    del info["control_mode"]
    (folder / "meta/info.json").write_text(json.dumps(info))
    read_lerobot(folder, ENV_ID, 100)
    assert "names no control mode: its actions are taken as pd_ee" in capsys.readouterr().out


# ---- lerobot itself ----
def has_lerobot() -> bool:
    """Whether LEROBOT_PYTHON can import lerobot."""
    command = [LEROBOT, "-c", "import lerobot.datasets.lerobot_dataset"]
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def lerobot():
    """Skips where lerobot is not installed."""
    if not has_lerobot():
        pytest.skip("needs lerobot 0.4; LEROBOT_PYTHON names its Python")


def test_lerobot_reads_what_we_write(lerobot, folder):
    command = [LEROBOT, "-c", LOOK, folder]
    environ = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    rgb, proprio, action, _, _ = read_lerobot(folder, ENV_ID, 100)
    info = json.loads((folder / "meta/info.json").read_text())
    assert (seen["episodes"], seen["frames"]) == (info["total_episodes"], len(rgb))
    assert (seen["fps"], seen["task"]) == (20, TASKS[ENV_ID].instruction)
    assert seen["rgb"] == rgb[7].tolist()
    assert seen["state"] == proprio[7].tolist() and seen["action"] == action[7].tolist()
    assert seen["mean"] == pytest.approx(action.double().mean(0).tolist(), abs=1e-6)


def test_we_read_what_lerobot_records(lerobot, tmp_path):
    folder = tmp_path / "recorded"
    command = [LEROBOT, "-c", RECORD, folder, TASKS[ENV_ID].instruction]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rgb, proprio, action, geometry, stage = read_lerobot(folder, ENV_ID, 100)
    steps = np.concatenate([np.arange(10), np.arange(11)])
    grey = 50 + 80 * np.repeat([0, 1], [10, 11]) + 5 * steps
    # The encoder is off by a few grey levels.
    assert np.abs(rgb.float().mean((1, 2, 3)).numpy() - grey).max() < 4
    assert (proprio.numpy() == steps[:, None]).all()
    assert np.allclose(action.numpy(), 0.05 * steps[:, None])
    assert geometry.isnan().all() and (stage == -1).all()
