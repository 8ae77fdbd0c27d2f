"""Demonstrations as a LeRobotDataset (v3, a local folder), which LeRobot's tools read and write.

`read_lerobot` reads one that shows what our policies see, in our action convention:

    observation.images.base   (side, side, 3) image or video, our camera's picture
    observation.state         (8,) tool position, tool quaternion (w, x, y, z), gripper opening
    action                    (A,) the labels, in the env's own units
    geometry, stage           (8,), (1,) optional: targets of sft.py's auxiliary loss, and the stage

The task of the dataset is the env's instruction, and its frames per second are the env's steps.
`write_lerobot` writes the same. Images are PNGs, so nothing is lost.
lerobot itself is not needed. Its format is that of lerobot 0.4.4 (src/lerobot/datasets).
Letters: T steps of an episode, A numbers of an action.
"""

import io
import itertools
import json
import tempfile
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
from PIL import Image
from tqdm import tqdm

from stare_utils import Tensor
from world.assets import IMAGE_SIZE
from world.episodes import PIXELS, WHOLE, Episode, Frames, damage_in_one_line, join
from world.tasks import PANDA, UserError, get_task

try:
    import pandas as pd
    import pyarrow  # noqa: F401
except ImportError:
    # Nothing else here needs them.
    raise UserError("LeRobot datasets need two packages: pip install pandas pyarrow") from None

VERSION = "v3.0"
IMAGE = "observation.images.base"
STATE = "observation.state"
# LeRobot's name for whether a frame's action led to success.
SUCCESS = "next.success"
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
# What each frame has beside the features of the recorder.
COUNTERS = {
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}


# ---- reading ----
def read_lerobot(
    folder: Path,
    env_id: str,
    num_demos: int,
    image_size: int = IMAGE_SIZE,
    progress: type[tqdm] = tqdm,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The frames of the first `num_demos` episodes of a LeRobotDataset: see demos.read_demos.

    Geometry is NaN where the dataset has none, and the stage is -1.
    Raises UserError that names the folder, the episode and the field at fault.
    """
    info = read_info(folder, env_id)
    check_words(folder, env_id)
    dataset = Dataset(folder, info)
    rows = dataset.episode_rows()
    bar = progress(total=min(num_demos, len(rows)), desc="read demonstrations", unit="episode")
    frames = []
    for i, row in enumerate(rows):
        if len(frames) == num_demos:
            print(f"{folder}: read {num_demos} episodes, not the {len(rows) - i} after them")
            break
        episode = dataset.episode(row, env_id)
        if episode.success() is False:
            continue
        frames.append(recorded(episode, image_size))
        bar.update()
    bar.close()
    if not frames:
        raise UserError(f"{folder} holds no successful episode")
    return join(folder, env_id, frames, scripted=False)


def recorded(episode: Episode, side: int) -> Frames:
    """The frames of one episode, checked."""
    T = episode.T
    rgb = episode.array(IMAGE, (T, side, side, 3), PIXELS)
    proprio = episode.array(STATE, (T, 8))
    geometry = np.full((T, 8), np.nan, np.float32)
    if "geometry" in episode.arrays:
        geometry = episode.array("geometry", (T, 8))
    steps = episode.array("frame_index", (T,), WHOLE)
    if (steps != np.arange(T)).any():
        raise episode.error("frame_index does not count from 0: frames are missing or mixed up")
    return rgb, proprio, episode.labels(), geometry, episode.stages()


def read_info(folder: Path, env_id: str) -> dict:
    """meta/info.json, of a dataset that suits the env. Raises UserError that says what does not."""
    file = folder / "meta/info.json"
    try:
        info = json.loads(file.read_text())
        version = info["codebase_version"]
        fps = info["fps"]
        found = {name: feature["dtype"] for name, feature in info["features"].items()}
        # Without a video there is no path to one.
        paths = [info["data_path"], info.get("video_path") or ""]
        well_formed = all(isinstance(path, str) for path in paths)
        well_formed &= type(info["total_episodes"]) is int and type(fps) in (int, float)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        well_formed = False
    if not well_formed:
        raise UserError(f"{folder} is no LeRobotDataset: {file} is missing or damaged")
    if not str(version).startswith("v3."):
        raise UserError(
            f"{folder} is a LeRobotDataset {version}: convert it to {VERSION} with `python -m "
            "lerobot.datasets.v30.convert_dataset_v21_to_v30`"
        )
    arm = get_task(env_id).arm
    # The same numbers mean another speed there.
    if fps != arm.control_freq:
        raise UserError(
            f"{folder} has {fps} frames per second, and {env_id} has {arm.control_freq} steps: "
            "record it again"
        )
    missing = [name for name in (IMAGE, STATE, "action") if name not in found]
    if missing:
        raise UserError(f"{folder}: feature {missing[0]} is missing; it has {', '.join(found)}")
    if found[IMAGE] not in ("image", "video"):
        raise UserError(f"{folder}: feature {IMAGE} is {found[IMAGE]}, neither image nor video")
    # LeRobot has no entry for it. `write_lerobot` adds one.
    mode = info.get("control_mode", arm.control_mode)
    if mode != arm.control_mode:
        raise UserError(f"{folder}: control_mode is {mode}, {env_id} needs {arm.control_mode}")
    if "control_mode" not in info:
        print(f"{folder} names no control mode: its actions are taken as {arm.control_mode}")
    return info


def check_words(folder: Path, env_id: str) -> None:
    """Raises UserError where a dataset's tasks are not the env's instruction alone."""
    instruction = get_task(env_id).instruction
    # The words are the table's index.
    words = list(read_table(folder / "meta/tasks.parquet").index)
    if words != [instruction]:
        raise UserError(
            f"{folder} holds demonstrations of {words}, and {env_id} is {instruction!r}"
        )


def read_table(path: Path, columns: list[str] | None = None) -> pd.DataFrame:
    """A .parquet file. columns: which; None: all. Raises UserError that names the file."""
    with damage_in_one_line(path):
        return pd.read_parquet(path, columns=columns)


def decode(data: bytes) -> np.ndarray:
    """A picture (H, W, 3) uint8 of a file's bytes."""
    try:
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    # Each format of pictures raises errors of its own.
    except Exception:
        raise ValueError("a picture cannot be decoded") from None


class Dataset:
    """A LeRobotDataset that is read episode by episode. A file holds many of them."""

    def __init__(self, folder: Path, info: dict):
        """info: of `read_info`."""
        self.folder = folder
        self.info = info
        wanted = (STATE, "action", "geometry", "stage", "frame_index", SUCCESS, IMAGE)
        features = info["features"]
        self.is_film = features[IMAGE]["dtype"] == "video"
        self.columns = ["episode_index", *[name for name in wanted if name in features]]
        if self.is_film:
            self.columns.remove(IMAGE)
        # The file that was read last, and the video with the number of its next frame.
        self.table_path = None
        self.film_path = None

    def episode_rows(self) -> list[pd.Series]:
        """What the table of episodes says of each. Raises UserError where one is missing."""
        rows = []
        folder = self.folder / "meta/episodes"
        for path in sorted(folder.glob("*/*.parquet")):
            rows += [row for _, row in read_table(path).iterrows()]
        with damage_in_one_line(folder):
            numbers = [int(row["episode_index"]) for row in rows]
        total = self.info["total_episodes"]
        if sorted(numbers) != list(range(total)):
            raise UserError(
                f"{self.folder} says that it has {total} episodes, and {folder} lists {len(rows)}: "
                "some are missing, or there twice"
            )
        return rows

    def place(self, template: str, row: pd.Series, key: str) -> Path:
        """The file in which an episode lies. key: of the row's columns."""
        numbers = {name: int(row[f"{key}/{name}"]) for name in ("chunk_index", "file_index")}
        return self.folder / template.format(video_key=IMAGE, **numbers)

    def episode(self, row: pd.Series, env_id: str) -> Episode:
        """One episode. row: of `episode_rows`."""
        with damage_in_one_line(self.folder / "meta/episodes"):
            number = int(row["episode_index"])
            length = int(row["length"])
            path = self.place(self.info["data_path"], row, "data")
        if path != self.table_path:
            self.table = read_table(path, self.columns)
            self.table_path = path
        table = self.table[self.table["episode_index"] == number]
        arrays = {}
        with damage_in_one_line(path):
            for name in table.columns if len(table) else []:
                if name == IMAGE:
                    arrays[name] = np.stack([decode(cell["bytes"]) for cell in table[name]])
                else:
                    arrays[name.removeprefix("next.")] = np.stack(table[name])
        if self.is_film:
            arrays[IMAGE] = self.film(row, length)
        entry = {"episode_id": number, "elapsed_steps": length}
        return Episode(self.folder, entry, env_id, arrays, "action")

    def film(self, row: pd.Series, length: int) -> np.ndarray:
        """The pictures (T, H, W, 3) of an episode, from a video of several episodes."""
        with damage_in_one_line(self.folder / "meta/episodes"):
            path = self.place(self.info["video_path"], row, f"videos/{IMAGE}")
            first = round(float(row[f"videos/{IMAGE}/from_timestamp"]) * self.info["fps"])
        with damage_in_one_line(path):
            if path != self.film_path or first < self.next_frame:
                fps = imageio.immeta(path, plugin="FFMPEG")["fps"]
                if round(fps, 2) != self.info["fps"]:
                    raise UserError(
                        f"{path} has {fps} frames per second, and info.json says "
                        f"{self.info['fps']}: record it again"
                    )
                self.frames = imageio.imiter(path, plugin="FFMPEG")
                self.film_path = path
                self.next_frame = 0
            skipped = first - self.next_frame
            self.next_frame = first + length
            return np.stack(list(itertools.islice(self.frames, skipped, skipped + length)))


# ---- writing ----
def encode(frame: np.ndarray) -> bytes:
    """The bytes of a picture as a PNG file. frame: (H, W, 3) uint8."""
    file = io.BytesIO()
    Image.fromarray(frame).save(file, format="png")
    return file.getvalue()


def write_lerobot(folder: Path, env_id: str, episodes: list[Frames]) -> None:
    """Writes episodes into a new folder. episodes: of demos.py's `read_episodes`.

    The folder gets its name last, so it is whole or not there.
    Raises UserError where it is there already.
    """
    if folder.exists():
        raise UserError(f"{folder} is there already: give another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    numbers = []
    start = 0
    for number, episode in enumerate(episodes):
        numbers.append(numbers_of(episode, number, start, get_task(env_id).arm.control_freq))
        start += len(episode[0])
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        new = Path(work) / "dataset"
        data = new / DATA_PATH.format(chunk_index=0, file_index=0)
        data.parent.mkdir(parents=True)
        (new / "meta").mkdir()
        write_data(data, episodes, numbers)
        write_meta(new / "meta", env_id, episodes, numbers)
        new.rename(folder)


def features_of(episode: Frames) -> dict[str, dict]:
    """LeRobot's description of what each frame holds."""
    rgb, proprio, action, geometry, _ = episode
    picture = {"dtype": "image", "shape": rgb.shape[1:], "names": ["height", "width", "channels"]}
    features = {
        IMAGE: picture,
        STATE: {"dtype": "float32", "shape": proprio.shape[1:], "names": None},
        "action": {"dtype": "float32", "shape": action.shape[1:], "names": None},
        "geometry": {"dtype": "float32", "shape": geometry.shape[1:], "names": None},
        "stage": {"dtype": "int64", "shape": (1,), "names": None},
    }
    for name, dtype in COUNTERS.items():
        features[name] = {"dtype": dtype, "shape": (1,), "names": None}
    return features


def numbers_of(episode: Frames, number: int, start: int, fps: int) -> dict[str, np.ndarray]:
    """All of an episode but the pictures, T rows each. start: the dataset's frames before it."""
    rgb, proprio, action, geometry, stage = episode
    steps = np.arange(len(rgb))
    return {
        STATE: proprio.astype(np.float32),
        "action": action.astype(np.float32),
        "geometry": geometry.astype(np.float32),
        "stage": stage.astype(np.int64),
        "timestamp": (steps / fps).astype(np.float32),
        "frame_index": steps,
        "episode_index": np.full(len(rgb), number),
        "index": start + steps,
        "task_index": np.zeros(len(rgb), np.int64),
    }


def write_data(path: Path, episodes: list[Frames], numbers: list[dict[str, np.ndarray]]) -> None:
    """Writes the frames of all episodes into one file. numbers: of `numbers_of`."""
    tables = []
    for (rgb, *_), columns in zip(episodes, numbers):
        pictures = []
        for t, frame in enumerate(rgb):
            pictures.append({"bytes": encode(frame), "path": f"frame-{t:06d}.png"})
        rows = {name: list(column) for name, column in columns.items()}
        tables.append(pd.DataFrame({IMAGE: pictures, **rows}))
    pd.concat(tables).to_parquet(path, index=False)


def statistics(values: np.ndarray, shape: tuple[int, ...]) -> dict[str, list]:
    """Smallest, largest, mean and deviation of values (M, numbers), each in LeRobot's shape."""
    found = {
        "min": values.min(0),
        "max": values.max(0),
        "mean": values.mean(0),
        "std": values.std(0),
    }
    return {name: value.reshape(shape).tolist() for name, value in found.items()}


def all_statistics(episodes: list[Frames], numbers: list[dict[str, np.ndarray]]) -> dict:
    """What LeRobot's stats.json holds. numbers: of `numbers_of`."""
    stats = {}
    for name in numbers[0]:
        column = np.concatenate([columns[name] for columns in numbers]).astype(np.float64)
        column = column.reshape(len(column), -1)
        stats[name] = {**statistics(column, column.shape[1:]), "count": [len(column)]}
    # Some pixels of some pictures are enough, as in LeRobot. Channels are from 0 to 1.
    pictures = [rgb[:: max(1, len(rgb) // 4), ::4, ::4] for rgb, *_ in episodes]
    pictures = np.concatenate(pictures)
    pixels = pictures.reshape(-1, 3) / 255
    stats[IMAGE] = {**statistics(pixels, (3, 1, 1)), "count": [len(pictures)]}
    return stats


def write_meta(
    folder: Path, env_id: str, episodes: list[Frames], numbers: list[dict[str, np.ndarray]]
) -> None:
    """Writes what describes the frames. numbers: of `numbers_of`."""
    task = get_task(env_id)
    N = len(episodes)
    lengths = [len(rgb) for rgb, *_ in episodes]
    ends = np.cumsum(lengths)
    info = {
        "codebase_version": VERSION,
        "robot_type": "panda" if task.arm is PANDA else "widowx",
        "control_mode": task.arm.control_mode,
        "total_episodes": N,
        "total_frames": int(ends[-1]),
        "total_tasks": 1,
        "chunks_size": 1000,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "fps": task.arm.control_freq,
        "splits": {"train": f"0:{N}"},
        "data_path": DATA_PATH,
        "video_path": None,
        "features": features_of(episodes[0]),
    }
    (folder / "info.json").write_text(json.dumps(info, indent=4))
    stats = all_statistics(episodes, numbers)
    (folder / "stats.json").write_text(json.dumps(stats, indent=4))
    # The words are the table's index.
    words = pd.DataFrame({"task_index": [0]}, index=[task.instruction])
    words.to_parquet(folder / "tasks.parquet")
    rows = {
        "episode_index": range(N),
        "tasks": [[task.instruction]] * N,
        "length": lengths,
        "data/chunk_index": 0,
        "data/file_index": 0,
        "dataset_from_index": ends - lengths,
        "dataset_to_index": ends,
        "meta/episodes/chunk_index": 0,
        "meta/episodes/file_index": 0,
    }
    path = folder / "episodes/chunk-000/file-000.parquet"
    path.parent.mkdir(parents=True)
    pd.DataFrame(rows).to_parquet(path, index=False)
