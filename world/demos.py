"""Demonstrations: the scripted expert makes them, and sft.py learns from them.

`collect_demos` writes ManiSkill's trajectory format: an .h5 file with a .json file beside it
(docs/data_format.md). `read_demos` reads such files, and those of ManiSkill's own tools.
Letters: T steps, N envs, A numbers of an action, M frames of all demonstrations.
"""

import json
from pathlib import Path

import h5py
import numpy as np
import torch
from mani_skill.trajectory import utils as trajectory_utils
from tqdm import tqdm

from stare_utils import Tensor
from world.assets import IMAGE_SIZE
from world.envs import StageEnv
from world.tasks import TRAIN_SEEDS, UserError, get_task
from world.vector import ScriptedExpert, make_envs

# An episode of T steps as arrays: rgb (T, H, W, 3), proprioception (T, 8), actions (T, A),
# geometry (T, 8), stage (T,).
Frames = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]


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
        slip: float,
        pause: float,
        twist: int,
    ):
        """speed: the largest motion along each axis, in shares of the expert's largest.

        noise: standard deviation, in the same shares. slip, pause: chances per step that one
        begins. twist: the largest number of steps that an episode begins with.
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
    with h5py.File(path.with_suffix(".tmp"), "w") as file:
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

    Returns rgb (M, image_size, image_size, 3) uint8, proprioception (M, 8), actions (M, A), which
    are the clean labels where the file has them, geometry (M, 8), and stage labels (M,), -1 where
    the stage is unknown. progress: the class of the progress bar.
    Raises UserError on a file of another env or control mode, or one that does not hold what it
    should. Prints a warning where many episodes are longer than the task's.
    """
    try:
        frames = read_episodes(path, env_id, num_demos, image_size, progress)
        warn_of_long_episodes(env_id, [len(rgb) for rgb, *_ in frames])
        return tuple(torch.from_numpy(np.concatenate(parts)) for parts in zip(*frames))
    # A file from elsewhere may hold anything.
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        RuntimeError,
    ) as error:
        raise UserError(
            f"cannot read {path} with {path.with_suffix('.json').name} beside it: "
            f"{type(error).__name__} {str(error).splitlines()[:1]}"
        ) from None


def read_episodes(
    path: Path, env_id: str, num_demos: int, image_size: int, progress: type[tqdm]
) -> list[Frames]:
    """The frames of each episode, see read_demos. Raises UserError, or what a broken file raises.

    An episode that sft.py did not record has no images of our camera. Its recorded states are put
    back into a simulator, and are seen through our camera there.
    """
    task = get_task(env_id)
    episodes = successful_episodes(path, env_id, num_demos)
    simulator = None
    frames = []
    with h5py.File(path) as file:
        for episode in progress(episodes, desc="read demonstrations", unit="episode"):
            group = file.get(f"traj_{episode['episode_id']}", {})
            check_actions(path, env_id, episode, group)
            # The labels are what was executed, except where the file has clean ones.
            actions = group.get("expert_actions", group["actions"])[:]
            if "geometry" in group:
                rgb, proprio, geometry = read_observations(group)
            elif "env_states" in group:
                # One simulator serves all episodes.
                if simulator is None:
                    simulator = StageEnv(env_id, 1, "cpu", 0, image_size=image_size)
                # The sizes of the objects belong to the episode, so its seed begins it.
                simulator.reset(episode.get("episode_seed"))
                rgb, proprio, geometry = look_at_states(group, simulator, len(actions))
            else:
                raise UserError(
                    f"{path} has neither images of our camera nor env_states: record it again "
                    "with sft.py or with ManiSkill's RecordEpisode"
                )
            stage = read_stages(group, len(geometry), len(task.stages))
            found = (rgb, proprio, actions, geometry, stage)
            if not are_complete(found, len(task.arm.limit), image_size):
                raise UserError(
                    f"{path} episode {episode['episode_id']}: wrong shapes, or numbers that are "
                    "not finite: record it again for this policy"
                )
            frames.append(found)
    return frames


def successful_episodes(path: Path, env_id: str, num_demos: int) -> list[dict]:
    """The first `num_demos` entries of the .json file that do not say that they failed."""
    meta = json.loads(path.with_suffix(".json").read_text())
    # Stages and cameras are this task's own, so another task's episodes are of no use.
    if meta["env_info"]["env_id"] != env_id:
        raise UserError(f"{path} holds {meta['env_info']['env_id']} demonstrations, not {env_id}")
    episodes = [episode for episode in meta["episodes"] if episode.get("success", True)]
    if not episodes[:num_demos]:
        raise UserError(f"{path} holds no successful episode")
    return episodes[:num_demos]


def check_actions(path: Path, env_id: str, episode: dict, group: h5py.Group | dict) -> None:
    """Raises UserError where an episode has no actions, or those of another control mode."""
    if "actions" not in group:
        raise UserError(
            f"{path} has no actions for episode {episode['episode_id']}: it is not a ManiSkill "
            "trajectory file"
        )
    # The same numbers mean another motion in another control mode.
    mode = get_task(env_id).arm.control_mode
    if episode.get("control_mode") != mode:
        raise UserError(
            f"{path} has control mode {episode.get('control_mode')}, {env_id} needs {mode}: "
            "convert it with `python -m mani_skill.trajectory.replay_trajectory "
            f"--traj-path {path} -c {mode} --save-traj`"
        )


def read_observations(group: h5py.Group) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """rgb, proprioception and geometry of an episode that sft.py recorded."""
    # No action follows the last observation.
    rgb = group["obs/sensor_data/base_camera/rgb"][:-1]
    proprio = group["obs/proprio"][:-1]
    return rgb, proprio, group["geometry"][:]


def look_at_states(
    group: h5py.Group, simulator: StageEnv, T: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """rgb, proprioception and geometry of the first T states of an episode, by our camera."""
    # No action follows the last state, so that one is left out.
    states = trajectory_utils.dict_to_list_of_dicts(group["env_states"])[:T]
    seen = [simulator.observe_state(state) for state in states]
    rgb = np.concatenate([obs["rgb"] for obs in seen])
    proprio = np.concatenate([obs["proprio"] for obs in seen])
    geometry = np.concatenate([obs["geometry"] for obs in seen])
    return rgb, proprio, geometry


def read_stages(group: h5py.Group, T: int, num_stages: int) -> np.ndarray:
    """The stage of each of T steps, (T,) int64; -1 where it is unknown.

    Recorded states alone do not tell the stage, because they lack contact forces.
    """
    if "stage" not in group:
        return np.full(T, -1)
    stage = group["stage"][:].astype(np.int64)
    # Some episodes begin in success. That is label K, and no stage.
    stage[(stage < 0) | (stage >= num_stages)] = -1
    return stage


def are_complete(frames: Frames, num_actions: int, image_size: int) -> bool:
    """Whether an episode's arrays have the right shapes and finite numbers, and at least a step."""
    rgb, proprio, actions, geometry, stage = frames
    T = len(actions)
    if T == 0 or rgb.dtype != np.uint8:
        return False
    if rgb.shape != (T, image_size, image_size, 3) or stage.shape != (T,):
        return False
    # One number that is not finite would spoil the whole training.
    for array, width in ((proprio, 8), (actions, num_actions), (geometry, 8)):
        if array.shape != (T, width) or not np.isfinite(array).all():
            return False
    return True


def warn_of_long_episodes(env_id: str, lengths: list[int]) -> None:
    """Prints a warning where more than a tenth of the episodes are longer than the task's."""
    # A policy that is as slow as they are would not finish in time.
    horizon = get_task(env_id).max_episode_steps
    num_late = sum(length > horizon for length in lengths)
    if num_late > 0.1 * len(lengths):
        print(
            f"warning: {num_late} of {len(lengths)} demonstrations of {env_id} take longer than "
            f"its episodes of {horizon} steps: raise --demo-speed"
        )
