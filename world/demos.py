"""Demonstrations: the scripted expert makes them, and sft.py learns from them.

`collect_demos` writes ManiSkill's trajectory format: an .h5 file with a .json file beside it
(docs/data_format.md). `read_demos` reads such files, and those of ManiSkill's own tools.

    python -m world.demos to-lerobot demos.h5 FOLDER    # the same as a LeRobotDataset

Letters: T steps, N envs, A numbers of an action, M frames of all demonstrations.
"""

import json
import os
import reprlib
import sys
from pathlib import Path

import h5py
import numpy as np
import torch
import tyro
from tqdm import tqdm
from tyro.conf import Positional

from stare_utils import Tensor
from world.assets import IMAGE_SIZE, check_world, choose_renderer
from world.envs import StageEnv
from world.episodes import Episode, Frames, damage_in_one_line, join, truth
from world.tasks import TRAIN_SEEDS, UserError, get_task
from world.vector import ScriptedExpert, make_envs

# The arrays of an episode that are read, beside env_states.
FIELDS = (
    "actions",
    "success",
    "expert_actions",
    "geometry",
    "stage",
    "obs/proprio",
    "obs/sensor_data/base_camera/rgb",
)


def open_h5(path: Path, mode: str = "r") -> h5py.File:
    """Opens an .h5 file to read ("r") or to write ("w") it. Raises UserError that says why not."""
    try:
        return h5py.File(path, mode)
    except OSError as error:
        reason = str(error).splitlines()[0]
    if "unable to lock" in reason:
        # Linux gives this number where another process holds the lock.
        if "errno = 11," in reason:
            reason = "another process has it open"
        else:
            reason = "its file system has no locks: set HDF5_USE_FILE_LOCKING=FALSE"
    if mode == "w":
        # The file is made before it is locked.
        path.unlink(missing_ok=True)
    raise UserError(f"cannot {'write' if mode == 'w' else 'read'} {path}: {reason}")


# ---- recording ----
class ClumsyExpert:
    """The scripted expert as slow and as clumsy as people are. Its labels stay right.

    It slips: it plays a wrong stage for 3 to 8 steps, so it closes on air or drops the object.
    It pauses: it stands still for 2 to 6 steps. It twists: an episode begins with steps in which
    the tool turns to a random side. Its motion is noisy at every other step, at random.
    """

    def __init__(
        self,
        expert: ScriptedExpert,
        rng: np.random.Generator,
        *,
        speed: float,
        noise: float,
        slip: float | np.ndarray,
        pause: float | np.ndarray,
        twist: int,
    ):
        """speed: the largest motion along each axis, in shares of the expert's largest.

        noise: standard deviation, in the same shares. slip, pause: chances per step that one
        begins, or one for each env. twist: the largest number of steps that an episode begins with.
        """
        num_envs = expert.envs.num_envs
        self.expert = expert
        self.envs = expert.envs
        self.rng = rng
        self.num_stages = expert.envs.num_stages
        # The largest action (A,).
        self.limit = torch.tensor(expert.envs.task.arm.limit)
        self.speed = speed
        self.noise = noise
        self.slip_chance = slip
        self.pause_chance = pause
        self.max_twist = twist
        # Each env's slip: how many stages off, and how many more steps.
        self.slip = torch.zeros(num_envs, dtype=torch.long)
        self.slip_left = torch.zeros(num_envs, dtype=torch.long)
        self.pause_left = torch.zeros(num_envs, dtype=torch.long)
        # Steps of the present episode's twist. The sign is the side.
        self.twist = torch.zeros(num_envs, dtype=torch.long)

    def act(self, elapsed: Tensor) -> tuple[Tensor, Tensor]:
        """What is executed and what is learned, (N, A) each. elapsed: (N,) steps of each episode.

        The random numbers are drawn in a fixed order, so a seed gives the same demonstrations.
        """
        self.begin_slips()
        # Both are answers to the same state. They differ where the expert slips.
        label = self.slow(self.expert.act().cpu())
        played = self.slow(self.expert.act(self.slip * (self.slip_left > 0)).cpu())
        noise = self.draw_noise(label.shape)
        self.twist_tool(played, elapsed)
        # Every other step is noisy. The labels stay clean (DART, Laskey et al. 2017).
        noisy = torch.from_numpy(self.rng.random((len(label), 1)) < 0.5)
        action = (played + self.limit * noise * noisy).clamp(-self.limit, self.limit)

        self.begin_pauses()
        pausing = self.pause_left > 0
        # A pause is a label, too: imitation copies it, and reinforcement unlearns it.
        # The gripper goes on.
        label[pausing, :-1] = 0
        action[pausing] = label[pausing]
        self.slip_left = (self.slip_left - 1).clamp(min=0)
        self.pause_left = (self.pause_left - 1).clamp(min=0)
        return action, label

    def begin_episode(self, i: int) -> None:
        """Env i has begun an episode: no mistake goes on."""
        self.slip_left[i] = 0
        self.pause_left[i] = 0

    def begin_slips(self) -> None:
        """Draws which envs slip, where none does yet: how many stages off and how long."""
        N = len(self.slip)
        # Each draw is for all envs, also where it is not used. So the stream of random numbers
        # depends on the number of steps alone.
        begin = torch.from_numpy(self.rng.random(N) < self.slip_chance) & (self.slip_left == 0)
        slip = torch.from_numpy(self.rng.integers(1, self.num_stages, N))
        steps = torch.from_numpy(self.rng.integers(3, 9, N))
        self.slip[begin] = slip[begin]
        self.slip_left[begin] = steps[begin]

    def begin_pauses(self) -> None:
        """Draws which envs pause, where none slips or pauses yet, and how long."""
        N = len(self.pause_left)
        # A slip and a pause are played to their end before a pause begins.
        begin = torch.from_numpy(self.rng.random(N) < self.pause_chance)
        begin &= (self.slip_left == 0) & (self.pause_left == 0)
        steps = torch.from_numpy(self.rng.integers(2, 7, N))
        self.pause_left[begin] = steps[begin]

    def slow(self, actions: Tensor) -> Tensor:
        """Limits the motion to a share of the expert's largest, in place."""
        # An action's first three numbers move the tool.
        largest = self.speed * self.limit[:3]
        actions[:, :3] = actions[:, :3].clamp(-largest, largest)
        return actions

    def draw_noise(self, shape: torch.Size) -> Tensor:
        """Noise (N, A) on the motion alone, because the expert hardly corrects a turned wrist."""
        noise = torch.from_numpy(self.rng.normal(0, self.noise, shape)).float()
        return noise * (torch.arange(shape[1]) < 3)

    def twist_tool(self, actions: Tensor, elapsed: Tensor) -> None:
        """Turns the tool to a random side in the first steps of an episode, in place.

        Without that a policy can tell from its own pose how the object lies, and does not look.
        """
        drawn = self.rng.integers(-self.max_twist, self.max_twist + 1, len(elapsed))
        self.twist = torch.where(elapsed == 0, torch.from_numpy(drawn), self.twist)
        # An action's sixth number turns the tool about the vertical.
        turn = self.twist.sign() * self.limit[5]
        actions[:, 5] = torch.where(elapsed < self.twist.abs(), turn, actions[:, 5])


def collect_demos(
    path: Path,
    env_id: str,
    num_demos: int,
    num_envs: int,
    seed: int,
    *,
    speed: float,
    noise: float,
    slip: float,
    pause: float,
    twist: int,
    backend: str = "cpu",
    image_size: int = IMAGE_SIZE,
    progress: type[tqdm] = tqdm,
) -> None:
    """Runs the scripted expert until `num_demos` episodes have succeeded, and writes these.

    path: of the .h5 file. seed: of the episodes and the expert's mistakes. speed, noise, slip,
    pause, twist: see ClumsyExpert. progress: the class of the progress bar.
    Raises UserError where the expert fails far more often than it succeeds.
    """
    # The expert is slow here and makes mistakes, so it needs more time than the task allows.
    horizon = 2 * get_task(env_id).max_episode_steps
    envs = make_envs(
        env_id,
        num_envs,
        seed,
        backend=backend,
        max_episode_steps=horizon,
        image_size=image_size,
    )
    rng = np.random.default_rng(seed)
    mistakes = {"speed": speed, "noise": noise, "slip": slip, "pause": pause, "twist": twist}
    expert = ClumsyExpert(ScriptedExpert(envs), rng, **mistakes)
    bar = progress(total=num_demos, desc=f"{env_id} demonstrations", unit="episode")
    with open_h5(path.with_suffix(".tmp"), "w") as file:
        episodes = record(file, expert, rng, num_demos, bar)
    bar.close()
    envs.close()
    meta = {
        "env_info": {"env_id": env_id, "max_episode_steps": horizon},
        "source_type": "scripted",
        "episodes": episodes,
    }
    path.with_suffix(".json").write_text(json.dumps(meta))
    # The .h5 file gets its name last. If it is there, both files are complete.
    path.with_suffix(".tmp").rename(path)


def record(
    file: h5py.File, expert: ClumsyExpert, rng: np.random.Generator, num_demos: int, bar: tqdm
) -> list[dict]:
    """Plays and writes episodes until `num_demos` have succeeded. Returns their .json entries.

    Raises UserError where the expert fails far more often than it succeeds.
    """
    envs = expert.envs
    kept = []
    failures = 0
    # The steps of each env's present episode.
    steps = [[] for _ in range(envs.num_envs)]
    seeds = rng.integers(TRAIN_SEEDS, size=envs.num_envs)
    obs, info = envs.reset(seed=[int(s) for s in seeds])
    while len(kept) < num_demos:
        # `obs` and `info` are of the state that the expert acts in.
        action, label = expert.act(info["elapsed_steps"].cpu())
        next_obs, _, _, _, next_info = envs.step(action)
        add_step(steps, obs, info, action, label)
        for i in next_info["_final_info"].nonzero()[:, 0].tolist():
            if not next_info["final_info"]["success"][i]:
                failures += 1
            # The last step may end more episodes than are asked for.
            elif len(kept) < num_demos:
                group = file.create_group(f"traj_{len(kept)}")
                final_obs = {name: x[i] for name, x in next_info["final_obs"].items()}
                write_episode(group, steps[i], final_obs)
                entry = {
                    "episode_id": len(kept),
                    "episode_seed": int(info["seed"][i]),
                    "control_mode": envs.task.arm.control_mode,
                    "elapsed_steps": len(steps[i]),
                    "success": True,
                }
                kept.append(entry)
                bar.update()
            # `next_obs` and `next_info` are of the env's next episode already.
            steps[i] = []
            expert.begin_episode(i)
        # An expert that fails this often would not finish in a reasonable time.
        if failures > 20 + 10 * len(kept):
            envs.close()
            raise UserError(
                f"the expert failed in {failures} episodes and solved {len(kept)}: raise "
                "--demo-speed, lower --demo-noise or --demo-slip"
            )
        obs = next_obs
        info = next_info
    return kept


def add_step(steps: list[list[dict]], obs: dict, info: dict, action: Tensor, label: Tensor) -> None:
    """Adds a step to each env's episode: what was seen before the action, and the action."""
    seen = {
        "rgb": obs["rgb"].cpu(),
        "proprio": obs["proprio"].cpu(),
        "actions": action,
        "expert_actions": label,
        "geometry": info["geometry"].cpu(),
        "stage": info["stage"].cpu(),
    }
    for i, episode in enumerate(steps):
        episode.append({name: x[i] for name, x in seen.items()})


def write_episode(group: h5py.Group, steps: list[dict], final_obs: dict[str, Tensor]) -> None:
    """Writes one successful episode of T steps. final_obs: what was seen after the last of them.

    As ManiSkill does it, the observations have T + 1 rows and all else has T.
    `actions` were executed, `expert_actions` are the labels.
    """
    T = len(steps)
    arrays = {}
    for name in steps[0]:
        arrays[name] = torch.stack([step[name] for step in steps]).numpy()
    rgb = np.concatenate([arrays.pop("rgb"), final_obs["rgb"][None].cpu()])
    proprio = np.concatenate([arrays.pop("proprio"), final_obs["proprio"][None].cpu()])
    # lzf makes the file smaller and is quick to read.
    group.create_dataset("obs/sensor_data/base_camera/rgb", data=rgb, compression="lzf")
    group["obs/proprio"] = proprio
    # The episode ends at its first success.
    group["success"] = np.arange(1, T + 1) == T
    for name, array in arrays.items():
        group[name] = array


# ---- reading ----
def read_demos(
    path: Path,
    env_id: str,
    num_demos: int,
    image_size: int = IMAGE_SIZE,
    progress: type[tqdm] = tqdm,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The frames of the first `num_demos` successful episodes of a ManiSkill .h5 file.

    A file is read as a witness: what it says is checked as far as anything can tell.
    Returns rgb (M, image_size, image_size, 3) uint8, proprioception (M, 8), actions (M, A),
    geometry (M, 8), and stage labels (M,), -1 where the stage is unknown. The actions are what the
    controller executes, of the clean labels where the file has them.
    progress: the class of the progress bar.
    Raises UserError that names the file, the episode and the field, on a file of another env or
    control mode, or one that does not hold what it should. Prints a warning where episodes are left
    out, where many are longer than the task's, and where actions are no arm's.
    """
    meta = read_meta(path, env_id)
    frames = read_episodes(path, env_id, meta, num_demos, image_size, progress)
    return join(path, env_id, frames, scripted=meta.get("source_type") == "scripted")


def read_episodes(
    path: Path, env_id: str, meta: dict, num_demos: int, image_size: int, progress: type[tqdm]
) -> list[Frames]:
    """The frames of each episode, see read_demos. meta: of `read_meta`.

    An episode that sft.py did not record has no images of our camera. Its recorded states are put
    back into a simulator, and are seen through our camera there.
    """
    entries = meta["episodes"]
    bar = progress(total=min(num_demos, len(entries)), desc="read demonstrations", unit="episode")
    simulator = None
    frames = []
    lost = 0
    for i, entry in enumerate(entries):
        if len(frames) == num_demos:
            print(f"{path}: read {num_demos} episodes, not the {len(entries) - i} after them")
            break
        # The arrays of failed episodes need no look.
        if truth(entry.get("success")) is False:
            continue
        arrays = read_arrays(path, f"traj_{entry['episode_id']}")
        episode = Episode(path, entry, env_id, arrays)
        success = episode.success()
        if success is False:
            continue
        episode.check_control_mode(meta)
        if "geometry" in episode.arrays:
            found = episode.recorded_frames(image_size, meta.get("source_type"), success)
        else:
            # One simulator serves all episodes.
            if simulator is None:
                simulator = StageEnv(env_id, 1, "cpu", 0, image_size=image_size)
                check_pace(path, meta, simulator.base.control_freq)
            found = look_at_states(episode, simulator)
            # The last state alone tells whether an episode of which nothing is said succeeded.
            lost += found is None and success is True
        if found:
            frames.append(found)
            bar.update()
    bar.close()
    judge_losses(path, lost, len(frames))
    return frames


def judge_losses(path: Path, lost: int, num_read: int) -> None:
    """Says how many episodes did not come back. Raises UserError where they are too many."""
    why = "their last state, put back after a reset with their seed, is no success"
    # Contact forces are recorded nowhere, so a borderline episode may be lost. More than one, and
    # more than a tenth, mean other objects, other seeds or shifted rows.
    too_many = lost > 1 and lost > 0.1 * (lost + num_read)
    if too_many or (lost and not num_read):
        raise UserError(
            f"{path}: {lost} of {lost + num_read} successful episodes do not come back: {why}. "
            "The file is of another env or version, or its rows or seeds are wrong"
        )
    if lost:
        print(
            f"warning: {lost} of {lost + num_read} episodes of {path} are left out, because {why}"
        )
    if not num_read:
        raise UserError(f"{path} holds no successful episode")


def read_meta(path: Path, env_id: str = "") -> dict:
    """The .json file beside the .h5 file. Its `env_info` and `episodes` have their form.

    env_id: the task that it must be of; "": any.
    Raises UserError that names the field which does not.
    """
    if not os.path.isfile(path):
        raise UserError(f"cannot read {path}: there is no file of that name")
    file = path.with_suffix(".json")
    try:
        meta = json.loads(file.read_text())
    except OSError as error:
        raise UserError(f"cannot read {file} beside {path.name}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise UserError(f"cannot read {file} beside {path.name}: it is not JSON") from None
    env_info = meta.get("env_info") if isinstance(meta, dict) else None
    if not isinstance(env_info, dict):
        raise UserError(f"{file}: env_info is missing: it is not of a ManiSkill trajectory file")
    if not isinstance(env_info.get("env_id"), str):
        raise UserError(f"{file}: env_info.env_id is missing")
    # Stages and cameras are this task's own, so another task's episodes are of no use.
    if env_id and env_info["env_id"] != env_id:
        raise UserError(f"{path} holds {env_info['env_id']} demonstrations, not {env_id}")
    episodes = meta.get("episodes")
    if not isinstance(episodes, list):
        raise UserError(f"{file}: episodes is missing, or is no list")
    numbers = set()
    for i, episode in enumerate(episodes):
        number = episode.get("episode_id") if isinstance(episode, dict) else None
        # True is an int for Python.
        if type(number) is not int or number in numbers:
            raise UserError(f"{file}: episode_id of episodes[{i}] is missing, or there twice")
        numbers.add(number)
    return meta


def check_pace(path: Path, meta: dict, control_freq: int) -> None:
    """Raises UserError where the file was recorded with other steps per second than the env's."""
    found = meta["env_info"]
    for field in ("env_kwargs", "sim_config", "control_freq"):
        found = found.get(field) if isinstance(found, dict) else None
    # The same numbers mean another speed there.
    if found is not None and found != control_freq:
        raise UserError(
            f"{path}: env_info.env_kwargs.sim_config.control_freq is {reprlib.repr(found)}, and "
            f"the env has {control_freq} steps per second: record it again"
        )


def read_arrays(path: Path, name: str) -> dict[str, np.ndarray]:
    """The arrays of one episode that are of use here, by their names in the group `name`."""
    datasets = {}
    found = {}

    def add(field: str, item: h5py.Group | h5py.Dataset) -> None:
        if isinstance(item, h5py.Dataset):
            datasets[field] = item

    with damage_in_one_line(path), open_h5(path) as file:
        group = file.get(name)
        if not isinstance(group, h5py.Group):
            raise UserError(f"{path}: {name} is missing, or is no group")
        group.visititems(add)
        for field, dataset in datasets.items():
            # ManiSkill's own pictures may be gigabytes, and are not of our camera.
            observed = field.startswith("obs/") and "geometry" not in datasets
            if not observed and (field in FIELDS or field.startswith("env_states")):
                found[field] = np.asarray(dataset[()])
    return found


def look_at_states(episode: Episode, simulator: StageEnv) -> Frames | None:
    """The frames of an episode whose states are put back. None: its last state is no success."""
    # The sizes of the objects belong to the episode, so its seed begins it.
    seed = episode.seed()
    states = episode.states(simulator.state_widths())
    labels = episode.labels()
    stages = episode.stages()
    simulator.reset(seed)
    if not simulator.succeeds(states[-1]):
        return None
    # No action follows the last state, so that one is left out.
    seen = [simulator.observe_state(state) for state in states[:-1]]
    rgb = np.concatenate([obs["rgb"] for obs in seen])
    proprio = np.concatenate([obs["proprio"] for obs in seen])
    geometry = np.concatenate([obs["geometry"] for obs in seen])
    return rgb, proprio, labels, geometry, stages


# ---- the script ----
def to_lerobot(
    file: Positional[Path], folder: Positional[Path], image_size: int = IMAGE_SIZE
) -> None:
    """Writes the successful episodes of an .h5 file as a LeRobotDataset (v3).

    Args:
        file: in ManiSkill's trajectory format, with its .json file beside it
        folder: a new folder
        image_size: pixels of a picture's side, those of the file where it has pictures
    """
    # Its packages are needed for nothing else.
    from world.lerobot import write_lerobot

    if folder.exists():
        raise UserError(f"{folder} is there already: give another folder")
    meta = read_meta(file)
    env_id = meta["env_info"]["env_id"]
    choose_renderer("auto")
    check_world(env_id)
    frames = read_episodes(file, env_id, meta, len(meta["episodes"]), image_size, tqdm)
    write_lerobot(folder, env_id, frames)
    print(f"wrote {len(frames)} episodes of {env_id} into {folder}")


if __name__ == "__main__":
    try:
        tyro.extras.subcommand_cli_from_dict({"to-lerobot": to_lerobot})
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
