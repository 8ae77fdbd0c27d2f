"""What a file says of one episode of demonstrations, checked as far as anything can tell.

world/demos.py and world/lerobot.py read the files. Their errors name the file, the episode and the
field at fault.
Letters: T steps, A numbers of an action, M frames of all episodes.
"""

import contextlib
import reprlib
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from stare_utils import Tensor
from world.tasks import PANDA, Arm, UserError, get_task

# An episode of T steps as arrays: rgb (T, H, W, 3), proprioception (T, 8), actions (T, A),
# geometry (T, 8), stage (T,).
Frames = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]

# Types of numbers, as numpy's characters.
FLOATS = "efd"
PIXELS = "B"
WHOLE = "bBhHiIlLqQ"
# Metres, radians, and both per second: no env has larger numbers.
LARGEST = 1e3
# As Python, JSON and numpy write them.
TRUTH = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


@contextlib.contextmanager
def damage_in_one_line(path: Path) -> Iterator[None]:
    """Raises UserError in place of what the libraries raise where they meet damaged bytes."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"cannot read {path}: there is no file of that name") from None
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        RuntimeError,
        MemoryError,
    ) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"cannot read {path}: its bytes are damaged ({reason})") from None


def truth(value: object) -> bool | None:
    """What a file means by a truth value, also in a list of one. None: an unknown form."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    # h5py reads strings as bytes.
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    return TRUTH.get(text.lower())


def whole_number(value: object) -> int | None:
    """A whole number, also as 3.0 and in a list of one. None: an unknown form."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if type(value) is float and value.is_integer():
        return int(value)
    return value if type(value) is int else None


class Episode:
    """What a file says of one episode of T steps.

    All methods raise UserError that names the file, the episode and the field at fault.
    """

    def __init__(
        self,
        path: Path,
        entry: dict,
        env_id: str,
        arrays: dict[str, np.ndarray],
        actions: str = "actions",
    ):
        """entry: of the .json file. arrays: by their names. actions: the name of the actions."""
        self.path = path
        self.entry = entry
        self.env_id = env_id
        self.task = get_task(env_id)
        self.arrays = arrays
        self.actions = actions
        shape = self.arrays.get(actions, np.array(0)).shape
        if not shape or shape[0] == 0:
            raise self.error("there are no actions")
        self.T = shape[0]
        steps = entry.get("elapsed_steps", self.T)
        if whole_number(steps) != self.T:
            raise self.error(
                f"elapsed_steps is {reprlib.repr(steps)}, and there are {self.T} actions"
            )

    def error(self, what: str) -> UserError:
        """The error to raise. what: the field, and what is wrong with it."""
        return UserError(f"{self.path} episode {self.entry['episode_id']}: {what}")

    def array(
        self, field: str, shape: tuple[int, ...], types: str = FLOATS, largest: float = LARGEST
    ) -> np.ndarray:
        """One array, float32 where it has floats. shape: the right one. types: of its numbers.

        largest: the largest absolute value allowed.
        """
        if field not in self.arrays:
            raise self.error(f"{field} is missing")
        array = self.arrays[field]
        if array.dtype.char not in types:
            raise self.error(f"{field} has numbers of another type: {array.dtype}")
        if array.shape != shape:
            raise self.error(
                f"{field} has the shape {array.shape}, where {self.T} actions need {shape} for "
                "this policy"
            )
        if array.dtype.char not in FLOATS:
            return array
        # NaN fails this test.
        if not (np.abs(array.astype(np.float64)) <= largest).all():
            raise self.error(f"{field} has numbers that are not finite, or beyond {largest:g}")
        return array.astype(np.float32)

    def success(self) -> bool | None:
        """Whether the episode ended in success, wherever it is said. None: nowhere."""
        info = self.entry.get("info")
        said = {}
        if "success" in self.entry:
            said["success"] = self.entry["success"]
        # This is the place of ManiSkill 2.
        if isinstance(info, dict) and "success" in info:
            said["info.success"] = info["success"]
        if "success" in self.arrays:
            rows = self.arrays["success"]
            if len(np.atleast_1d(rows)) != self.T:
                raise self.error(f"success of the .h5 file has not {self.T} rows")
            last = np.atleast_1d(rows)[-1]
            said["success of the .h5 file"] = last.tolist() if hasattr(last, "tolist") else last
        for field, value in said.items():
            if truth(value) is None:
                raise self.error(f"{field} is {reprlib.repr(value)}, neither true nor false")
        verdicts = {truth(value) for value in said.values()}
        if len(verdicts) == 2:
            raise self.error(f"{' and '.join(said)} contradict each other")
        return verdicts.pop() if verdicts else None

    def seed(self) -> int:
        """The seed of the reset that began the episode."""
        own = self.entry.get("episode_seed")
        kwargs = self.entry.get("reset_kwargs")
        # This is the place of ManiSkill 2.
        given = kwargs.get("seed") if isinstance(kwargs, dict) else None
        # Parallel envs were reset with a list of seeds. `episode_seed` is that of this one.
        if isinstance(given, list) and len(given) > 1 and own is not None:
            given = None
        seeds = set()
        for field, value in (("episode_seed", own), ("reset_kwargs.seed", given)):
            if value is None:
                continue
            seed = whole_number(value)
            if seed is None or not 0 <= seed < 2**32:
                raise self.error(
                    f"{field} is {reprlib.repr(value)}, not one whole number from 0 to 2**32 - 1"
                )
            seeds.add(seed)
        # The sizes of the objects depend on the seed.
        if not seeds:
            raise self.error("episode_seed is missing, and so is reset_kwargs.seed")
        if len(seeds) == 2:
            raise self.error("episode_seed and reset_kwargs.seed contradict each other")
        return seeds.pop()

    def check_control_mode(self, meta: dict) -> None:
        """Refuses another control mode: the same numbers mean another motion there."""
        mode = self.entry.get("control_mode")
        needed = self.task.arm.control_mode
        if not isinstance(mode, str):
            raise self.error(f"control_mode is missing, and {self.env_id} needs {needed}")
        if mode != needed:
            advice = conversion_advice(self.path, mode, needed, self.entry, meta)
            raise self.error(f"control_mode is {mode}, {self.env_id} needs {needed}: {advice}")

    def labels(self, source_type: object = None) -> np.ndarray:
        """The actions to learn, (T, A), as the controller executes them."""
        arm = self.task.arm
        shape = (self.T, len(arm.limit))
        # The controller clips a large number, if it is finite.
        largest = np.finfo(np.float32).max
        labels = self.array(self.actions, shape, largest=largest)
        # The labels are what was executed, except where the file has clean ones.
        if "expert_actions" in self.arrays or source_type == "scripted":
            labels = self.array("expert_actions", shape, largest=largest)
        return executed(labels, arm)

    def stages(self, source_type: object = None) -> np.ndarray:
        """The stage of each step, (T,) int64; -1 where it is unknown.

        Recorded states alone do not tell the stage, because they lack contact forces.
        """
        if "stage" not in self.arrays and source_type != "scripted":
            return np.full(self.T, -1)
        recorded = self.array("stage", (self.T,), WHOLE + FLOATS)
        stage = recorded.astype(np.int64)
        if (stage != recorded).any():
            raise self.error("stage has numbers that are not whole")
        K = len(self.task.stages)
        if (stage < -1).any() or (stage > K).any():
            raise self.error(f"stage has labels beyond -1 (unknown) to {K} (success)")
        # Some episodes begin in success. That is label K, and no stage.
        stage[stage == K] = -1
        return stage

    def recorded_frames(self, image_size: int, source_type: object, success: bool | None) -> Frames:
        """The frames of an episode that sft.py or a recorder like it made.

        source_type: "scripted" is sft.py, which leaves no array out.
        """
        if success is None:
            raise self.error("success is missing")
        T = self.T
        side = image_size
        rgb = self.array("obs/sensor_data/base_camera/rgb", (T + 1, side, side, 3), PIXELS)
        proprio = self.array("obs/proprio", (T + 1, 8))
        geometry = self.array("geometry", (T, 8))
        labels = self.labels(source_type)
        # No action follows the last observation.
        return rgb[:-1], proprio[:-1], labels, geometry, self.stages(source_type)

    def states(self, widths: dict[str, int]) -> list[dict]:
        """The T + 1 recorded states. widths: of `StageEnv.state_widths`."""
        if not any(field.startswith("env_states") for field in self.arrays):
            raise self.error(
                "there are neither images of our camera (geometry) nor env_states: record it again "
                "with sft.py or with ManiSkill's RecordEpisode"
            )
        if "env_states" in self.arrays:
            raise self.error("env_states is one array, as ManiSkill 2 wrote it: use ManiSkill 3")
        found = {field.removeprefix("env_states/") for field in self.arrays}
        # The controller's state is no body's, and ManiSkill does not put it back.
        found = {name for name in found if name.startswith(("actors/", "articulations/"))}
        missing = sorted(widths.keys() - found)
        extra = sorted(found - widths.keys())
        robots = [name for name in extra if name.startswith("articulations/")]
        own_robots = [name for name in missing if name.startswith("articulations/")]
        if robots and own_robots:
            raise self.error(f"env_states has {robots[0]}, and {self.env_id} has {own_robots[0]}")
        if missing:
            raise self.error(f"env_states/{missing[0]} is missing")
        if extra:
            raise self.error(f"env_states/{extra[0]} is not in {self.env_id}")
        states = [{"actors": {}, "articulations": {}} for _ in range(self.T + 1)]
        for name, width in widths.items():
            rows = self.array(f"env_states/{name}", (self.T + 1, width))
            # A body's row begins with its position and its quaternion.
            if (np.abs(np.linalg.norm(rows[:, 3:7], axis=1) - 1) > 0.01).any():
                raise self.error(f"env_states/{name} has quaternions whose length is not 1")
            kind, body = name.split("/")
            for state, row in zip(states, rows):
                state[kind][body] = row
        return states


def conversion_advice(path: Path, mode: str, needed: str, entry: dict, meta: dict) -> str:
    """How to convert an episode to the control mode `needed`, or that nothing does."""
    # ManiSkill's tool converts from positions of the Panda's joints alone. It breaks down on steps
    # of the joints, and knows no other source.
    if mode != "pd_joint_pos" or needed != PANDA.control_mode:
        return f"ManiSkill's replay_trajectory cannot convert it, so record it again in {needed}"
    if "env_kwargs" not in meta["env_info"] or "reset_kwargs" not in entry:
        return "ManiSkill converts no file without env_info.env_kwargs and reset_kwargs"
    if path.suffix != ".h5" or type(entry.get("episode_seed")) is not int:
        return "ManiSkill converts only .h5 files whose episode_seed are numbers"
    # Conversion needs a CPU simulation, wherever the file was recorded.
    command = "python -m mani_skill.trajectory.replay_trajectory --traj-path"
    flags = f"-c {needed} -b physx_cpu -o none --save-traj"
    return f"convert it with `{command} {shlex.quote(str(path))} {flags}`"


def executed(actions: np.ndarray, arm: Arm) -> np.ndarray:
    """What the controller makes of actions (T, A), in the same units.

    The fingers' command is clipped to [-1, 1]. So are the Panda's translations. The Panda's turns
    are shortened to the length 1. The WidowX's arm takes metres and radians as they are.
    """
    actions = actions.copy()
    actions[:, 6:] = actions[:, 6:].clip(-1, 1)
    if arm.control_mode != PANDA.control_mode:
        return actions
    actions[:, :3] = actions[:, :3].clip(-1, 1)
    # The square of a large float32 would be infinite.
    turn = actions[:, 3:6].astype(np.float64)
    length = np.linalg.norm(turn, axis=1, keepdims=True)
    actions[:, 3:6] = turn / np.maximum(length, 1)
    return actions


# ---- all episodes of a file or folder ----
def is_ordinary(actions: Tensor, arm: Arm) -> Tensor:
    """(M,) bool: which actions (M, A) an arm can follow. All others are faults of a recorder."""
    # The expert, or nine of ten of these actions, stay below half of what is ordinary.
    usual = torch.maximum(torch.tensor(arm.limit), actions.abs().quantile(0.9, 0))
    return (actions.abs() <= 2 * usual).all(1)


def join(path: Path, env_id: str, episodes: list[Frames], scripted: bool) -> tuple[Tensor, ...]:
    """The frames of all episodes, one after the other: five tensors of M rows, see Frames.

    path: whose episodes they are. scripted: whether the expert has made them.
    Prints a warning where many are longer than the task's, and where actions are no arm's.
    """
    task = get_task(env_id)
    lengths = [len(rgb) for rgb, *_ in episodes]
    # A policy that is as slow as they are would not finish in time.
    horizon = task.max_episode_steps
    num_late = sum(length > horizon for length in lengths)
    # The expert's noise and slips cost steps, too. No label repeats them.
    allowed = 0.75 if scripted else 0.1
    if num_late > allowed * len(lengths):
        advice = "record faster ones, because a policy learns their pace"
        if scripted:
            advice = "make them with a higher --demo-speed"
        print(
            f"warning: {num_late} of {len(lengths)} demonstrations of {env_id} take longer than "
            f"its episodes of {horizon} steps: {advice}"
        )
    parts = [torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*episodes)]
    glitches = (~is_ordinary(parts[2], task.arm)).sum()
    if glitches:
        print(
            f"warning: {glitches} actions of {path} are more than twice as large as the expert's "
            "largest and as nine of ten others: their labels are cut to the range of the others"
        )
    return tuple(parts)
