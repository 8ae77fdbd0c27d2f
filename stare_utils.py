"""The world of STARE-VLA: tasks, stages, stage distances, costs and potentials, vectorised environments, scripted expert.

Scripts import this module; it imports none of them, reads no `args`, and holds no loss, advantage or optimiser step.
Letters: N envs, T steps, K stages, A action dimensions. Every stage function reads batched tensors, so the same code
serves ManiSkill's GPU simulation (one batched env) and the CPU (one process per env).

A task is one entry of `TASKS`. To add one, write a function that reads its state and one `Stage` per stage; nothing else changes.
"""
import difflib
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Idle OpenMP threads must sleep: spinning ones take the cores from the env processes (a forward is 20x slower). Set before torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import gymnasium as gym
import numpy as np
import torch

Tensor = torch.Tensor
State = dict[str, Tensor]

TRAIN_SEEDS = 2**30  # episodes of training draw their seeds below this number ...
EVAL_SEED = 2**30  # ... and evaluation starts here: the two never meet
CONTROL_STEP = 0.05  # seconds per env step (20 Hz control)
IMAGE_SIZE = 128  # pixels: side of the observation
EE_STEP = 0.1  # metres (and radians) that an action of 1 moves the tool in pd_ee_delta_pose


class UserError(Exception):
    """A mistake that a user can make. Scripts print its one line and exit with code 2."""


def make_folder(path: str | Path) -> Path:
    """Makes the folder where there is none. Raises UserError where nothing can be written."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"cannot write to {folder}: permission denied")
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Tasks: one entry each. Thresholds in metres, radians and seconds.
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Stage:
    name: str
    entry: Callable[[State], Tensor]
    """(N,) bool: true once this stage has begun; it is the end condition of the stage before (stage 0: always true)"""
    distance: Callable[[State], Tensor]
    """(N,) metres >= 0: what is left to do in this stage"""
    length: float
    """L_k in metres: median of `distance` at entry on expert episodes (`benchmark/expert.py` measures it)"""
    target: Callable[[State], Tensor]
    """(N, 3) metres, world frame: where the expert drives the tool during this stage"""
    gripper: float
    """what the expert commands the gripper: 1 opens, -1 closes"""


@dataclass(frozen=True)
class Task:
    instruction: str
    stage_table: tuple[Stage, ...]
    observe: Callable[[gym.Env], State]
    """reads the simulator: `tool` (N, 3), `object` (N, 3), `goal` (N, 3), `yaw_error` (N,), `opening` (N,), `grasped` (N,) and so on"""
    max_episode_steps: int
    views: tuple[tuple[tuple[float, float, float], tuple[float, float, float], float], ...]
    """eye, look-at point and vertical field of view (radians) of each camera. Their pictures stand side by side in one image. Two views at a
    right angle: what the hand hides in one is seen in the other, and depth needs no guessing; the object spans at least 8 pixels in each"""
    control_mode: str = "pd_ee_delta_pose"

    @property
    def stages(self) -> tuple[str, ...]:
        return tuple(stage.name for stage in self.stage_table)


def norm(x: Tensor) -> Tensor:
    """Euclidean length of the last axis, (N, 3) -> (N,)."""
    return torch.linalg.vector_norm(x, dim=-1)


def up(height: Tensor) -> Tensor:
    """(N,) heights -> (N, 3) vertical offsets."""
    return torch.stack([torch.zeros_like(height), torch.zeros_like(height), height], -1)


def yaw(q: Tensor) -> Tensor:
    """Rotation about the vertical axis of a (w, x, y, z) quaternion, (N, 4) -> (N,) radians."""
    w, x, y, z = q.unbind(-1)
    return torch.atan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))


def observe_pick_cube(env) -> State:
    grasped = env.agent.is_grasping(env.cube)
    tool, cube = env.agent.tcp_pose, env.cube.pose
    # a cube looks the same after a quarter turn: the nearest of the four yaws
    error = torch.remainder(yaw(cube.q) - yaw(tool.q) + torch.pi / 4, torch.pi / 2) - torch.pi / 4
    return {
        "tool": tool.p, "object": cube.p, "goal": env.goal_site.pose.p, "grasped": grasped, "yaw_error": error,
        "opening": env.agent.robot.qpos[:, -2:].sum(-1), "speed": norm(env.agent.tcp.linear_velocity),
    }  # fmt: skip


HOVER = 0.08  # m: how far above the object the expert comes in
CENTRED = 0.01  # m: this near to the object's centre the fingers close; from further off they may hold a corner, which slips out
LIFT = 0.03  # m: lifted or carried this far, a grasped object is being transported
NEAR = 0.04  # m: transport becomes place


def hover(s: State) -> Tensor:
    """Height above the object at which the tool should be: a funnel. It does not wait for the yaw: where the expert stands still, an
    argmax policy stands still for ever, and the fingers open wider than the object's diagonal."""
    return (4 * (norm((s["object"] - s["tool"])[:, :2]) - 0.01)).clamp(0, HOVER)


def moved(s: State) -> Tensor:
    """(N,) metres: how far the object is from where the episode began."""
    return norm(s["object"] - s["object_start"])


def geometry(s: State) -> Tensor:
    """(N, 6) metres: from the tool to the object, from the tool to the goal. No policy sees it; sft.py's auxiliary loss does."""
    return torch.cat([s["object"] - s["tool"], s["goal"] - s["tool"]], -1)


PICK_CUBE = Task(
    instruction="pick up the red cube and move it to the green ball",
    stage_table=(
        Stage("reach", lambda s: torch.ones_like(s["grasped"]),
              lambda s: norm(s["tool"] - s["object"]),
              0.17, lambda s: s["object"] + up(hover(s)), 1.0),
        Stage("grasp", lambda s: s["grasped"] | (norm(s["tool"] - s["object"]) < CENTRED),
              lambda s: norm(s["tool"] - s["object"]) + (~s["grasped"]) * (s["opening"] - 0.04).clamp(min=0) + (LIFT - moved(s)).clamp(min=0),
              0.08, lambda s: s["object"] + up(0.06 * (s["opening"] < 0.045)), -1.0),
        Stage("transport", lambda s: s["grasped"] & (moved(s) > LIFT),
              lambda s: norm(s["object"] - s["goal"]),
              0.17, lambda s: s["tool"] + s["goal"] - s["object"], -1.0),
        Stage("place", lambda s: s["grasped"] & (norm(s["object"] - s["goal"]) < NEAR),
              lambda s: norm(s["object"] - s["goal"]) + CONTROL_STEP * s["speed"],
              0.05, lambda s: s["tool"] + s["goal"] - s["object"], -1.0),
    ),
    observe=observe_pick_cube, max_episode_steps=50, views=(((0.0, 0.62, 0.32), (0.0, 0.0, 0.165), 0.82), ((0.62, 0.0, 0.32), (0.0, 0.0, 0.165), 0.82)),
)  # fmt: skip

TASKS: dict[str, Task] = {"PickCube-v1": PICK_CUBE}


def get_task(env_id: str) -> Task:
    """The entry of an env id. Raises UserError with the nearest names."""
    if env_id in TASKS:
        return TASKS[env_id]
    near = difflib.get_close_matches(env_id, TASKS, n=3, cutoff=0.3) or list(TASKS)
    raise UserError(f"unknown --env-id {env_id!r}; the nearest known: {', '.join(near)}. New tasks are entries of TASKS in stare_utils.py")


# ---------------------------------------------------------------------------------------------------------------------
# Stages: separator and calculator
# ---------------------------------------------------------------------------------------------------------------------
def stage_potential(distance: Tensor, length: Tensor, form: str = "sigmoid") -> Tensor:
    """phi_k in [0, 1], 1 where nothing is left to do. distance, length: metres, any shape; form: "sigmoid" is the paper's
    sigmoid(1 - d / L_k), here divided by sigmoid(1) so that d = 0 gives 1; "linear" is max(0, 1 - d / L_k)."""
    if form == "linear":
        return (1 - distance / length).clamp(min=0)
    return torch.sigmoid(1 - distance / length) / torch.sigmoid(torch.tensor(1.0))


def stage_signals(task: Task, state: State, success: Tensor, potential: str, across: str) -> dict[str, Tensor]:
    """What the state says about the stages: `stage` (N,) long in 0..K, `stage_distance` (N,) metres (0 at success),
    `potential` (N,) = Phi(s). `stage` is the largest k whose entry condition holds; lower ones need not.

    across="offset": Phi = k + phi_k, K at success, so that Phi never falls at a stage switch. across="bare": the paper's phi_k alone.
    """
    K = len(task.stage_table)
    entered = torch.stack([stage.entry(state) for stage in task.stage_table], -1)  # (N, K)
    stage = (entered * torch.arange(1, K + 1, device=entered.device)).amax(-1) - 1  # (N,)
    distances = torch.stack([stage.distance(state) for stage in task.stage_table], -1)  # (N, K)
    distance = distances.gather(-1, stage[:, None])[:, 0]
    length = torch.tensor([stage.length for stage in task.stage_table], device=distance.device)[stage]
    phi = stage_potential(distance, length, potential)
    stage, distance = torch.where(success, K, stage), torch.where(success, 0.0, distance)
    phi = torch.where(success, 0.0 if across == "offset" else 1.0, phi)
    return {"stage": stage, "stage_distance": distance, "potential": stage + phi if across == "offset" else phi}


def segment_stages(stage: Tensor, num_stages: int) -> Tensor:
    """Cuts trajectories by the first entry into each stage: the running maximum of the labels, clipped to K - 1.

    stage: (T,) or (T, N) integers in 0..K, time first. Returns the same shape: the segment of each step, monotone in time.
    """
    return torch.cummax(torch.as_tensor(stage), 0).values.clamp(max=num_stages - 1)


def stage_costs(distance: Tensor, segment: Tensor, num_stages: int) -> Tensor:
    """l_k: mean distance over the steps of segment k. distance, segment: (T,). Returns (K,) float, NaN for stages never entered."""
    member = torch.nn.functional.one_hot(torch.as_tensor(segment).long(), num_stages).to(torch.as_tensor(distance).dtype)  # (T, K)
    return torch.as_tensor(distance) @ member / member.sum(0)


def shape_rewards(
    rewards: Tensor, potentials: Tensor, next_potentials: Tensor, terminated: Tensor, gamma: float, weight: float
) -> Tensor:
    """Potential-based shaping (Ng, Harada, Russell 1999; the paper's r'): r'_t = r_t + w * (gamma * Phi(s_{t+1}) - Phi(s_t)).

    All (T, N). `next_potentials[t]` is Phi of the true next state (of the final observation at an episode's end). It counts as 0
    where `terminated`, else the optimal policy would change; a truncated episode goes on, so there it stays.
    """
    assert rewards.shape == potentials.shape == next_potentials.shape == terminated.shape, "shapes differ: this would broadcast"
    return rewards + weight * (gamma * torch.where(terminated, 0.0, next_potentials) - potentials)


# ---------------------------------------------------------------------------------------------------------------------
# Environments
# ---------------------------------------------------------------------------------------------------------------------
def light_panda() -> str:
    """Path of a Panda URDF whose visual meshes have 5 % of the triangles (134,924 -> 6,813), made once in the user's cache.

    A software renderer spends three quarters of a frame on them. Collision meshes are untouched: the physics is the same.
    """
    import fast_simplification
    import mani_skill
    import trimesh

    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "stare-vla" / f"panda-{mani_skill.__version__}"
    if not cache.exists():
        cache.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=cache.parent)) / "panda"
        shutil.copytree(Path(mani_skill.PACKAGE_ASSET_DIR) / "robots/panda", folder)
        for file in (folder / "franka_description/meshes/visual").glob("*.glb"):
            scene = trimesh.load_scene(file, process=False)
            for name, mesh in scene.geometry.items():
                merged = mesh.copy()
                merged.merge_vertices(merge_tex=True, merge_norm=True)  # the files hold loose triangles, which cannot collapse
                points, faces = fast_simplification.simplify(merged.vertices.astype(np.float32), merged.faces, target_reduction=0.95)
                scene.geometry[name] = trimesh.Trimesh(points, faces, process=False)
                scene.geometry[name].visual = trimesh.visual.TextureVisuals(material=mesh.visual.material)
            scene.export(file)
        try:
            folder.rename(cache)
        except OSError:  # another process was faster
            pass
        shutil.rmtree(folder.parent)
    return str(cache / "panda_v2.urdf")


class StageEnv:
    """A ManiSkill env with stage signals: batched tensors in and out, no automatic reset.

    Observations: `rgb` (N, H, W, 3) uint8, `proprio` (N, 8) float: tool position, tool quaternion (w, x, y, z), gripper opening.
    """

    def __init__(
        self, env_id: str, num_envs: int, backend: str, seed: int, terminate_on_success: bool = True, full_meshes: bool = False,
        max_episode_steps: int | None = None, reward: str = "sparse", potential: str = "sigmoid", potential_across_stages: str = "offset",
        stock_camera: bool = False,
    ):  # fmt: skip
        """reward: "sparse" is 1 on a success step and else 0; "dense" is ManiSkill's normalized_dense. potential, potential_across_stages: see
        stage_potential and stage_signals. max_episode_steps: None is the registered horizon. stock_camera: the env's own view."""
        import mani_skill.envs  # noqa: F401  registers the env ids
        from mani_skill.agents.robots.panda import Panda
        from mani_skill.sensors.camera import CameraConfig
        from mani_skill.utils.registration import REGISTERED_ENVS, TimeLimitWrapper
        from mani_skill.utils.sapien_utils import look_at

        self.task, self.num_envs, self.terminate_on_success = get_task(env_id), num_envs, terminate_on_success
        self.potential, self.across, self.backend = potential, potential_across_stages, backend
        if backend == "cpu" and not full_meshes:
            Panda.urdf_path = light_panda()
        views = self.task.views
        cameras = [CameraConfig(f"view_{i}", look_at(*view[:2]), IMAGE_SIZE // len(views), IMAGE_SIZE, view[2], 0.01, 100) for i, view in enumerate(views)]
        # ManiSkill has no argument that adds a camera: a subclass with ours
        ours = {} if stock_camera else {"_default_sensor_configs": property(lambda env: cameras)}
        env_class = type(env_id, (REGISTERED_ENVS[env_id].cls,), ours)
        env = env_class(
            num_envs=num_envs, obs_mode="rgb", control_mode=self.task.control_mode, reward_mode="normalized_dense" if reward == "dense" else "sparse",
            sim_backend=f"physx_{backend}", render_backend="gpu" if torch.cuda.is_available() else "cpu",
        )  # fmt: skip
        self.env = TimeLimitWrapper(env, max_episode_steps or self.task.max_episode_steps)
        self.base = self.env.unwrapped
        self.next_seed = [seed + i for i in range(num_envs)]
        self.furthest = torch.zeros(num_envs, dtype=torch.long, device=self.base.device)
        self.object_start = torch.zeros(num_envs, 3, device=self.base.device)
        self.seeds = torch.zeros(num_envs, dtype=torch.long, device=self.base.device)

    def reset(self, seed: list[int] | None = None, env_idx: Tensor | None = None) -> tuple[State, State]:
        """Starts episodes in all envs, or in `env_idx` alone. Without a seed the next one of each env's own sequence is used."""
        index = torch.arange(self.num_envs, device=self.base.device) if env_idx is None else env_idx
        explicit = seed is not None
        seed = seed if explicit else [self.next_seed[i] for i in index.tolist()]
        # PhysX keeps contacts that no reset clears; rebuilding the scene makes an explicitly seeded episode a function of its seed alone
        options = {"reconfigure": explicit and self.backend == "cpu"} if env_idx is None else {"env_idx": env_idx}
        obs, _ = self.env.reset(seed=seed if len(seed) == self.num_envs else None, options=options)
        for i, s in zip(index.tolist(), seed, strict=True):
            self.next_seed[i] = int(np.random.default_rng(s).integers(TRAIN_SEEDS))
        if self.base._hidden_objects:  # PickCube's goal: a policy that sees only images must see it
            for marker in self.base._hidden_objects:
                marker.show_visual()
            self.base._hidden_objects.clear()
            obs = self.base.get_obs(self.base.get_info())
        self.seeds[index] = torch.tensor(seed, device=self.base.device)
        self.furthest[index] = 0
        self.state = self.task.observe(self.base)
        self.state["grasped"][index] = False  # contact forces are those of the last physics step, of the episode before
        self.object_start[index] = self.state["object"][index]
        return self.observation(obs), self.infos(self.base.evaluate())

    def step(self, action: Tensor) -> tuple[State, Tensor, Tensor, Tensor, State]:
        """One env step. action: (N, A). Returns observation, reward (N,), terminated (N,), truncated (N,), infos."""
        obs, reward, terminated, truncated, info = self.env.step(action)
        terminated = torch.as_tensor(terminated) & self.terminate_on_success
        self.state = self.task.observe(self.base)
        infos = self.infos(info)
        # The state after a reset does not count: no action led to it, and a goal may be drawn where the object lies
        self.furthest = torch.maximum(self.furthest, infos["stage"])
        infos["furthest_stage"] = self.furthest.clone()
        return self.observation(obs), reward, terminated, torch.as_tensor(truncated), infos

    def observe_state(self, state: dict) -> State:
        """The observation, with `geometry`, of a recorded ManiSkill state, which replaces the present one (batch 1)."""
        self.base.set_state_dict(state)
        return {**self.observation(self.base.get_obs()), "geometry": geometry(self.task.observe(self.base))}

    def observation(self, obs: dict) -> State:
        rgb = torch.cat([camera["rgb"] for camera in obs["sensor_data"].values()], 2)
        pose, opening = obs["extra"]["tcp_pose"], obs["agent"]["qpos"][:, -2:].sum(-1, keepdim=True)
        return {"rgb": rgb, "proprio": torch.cat([pose, opening], -1).float()}

    def infos(self, info: dict) -> State:
        self.state["object_start"] = self.object_start
        signals = stage_signals(self.task, self.state, info["success"], self.potential, self.across)
        return {**signals, "furthest_stage": self.furthest.clone(), "success": info["success"], "seed": self.seeds.clone(),
                "elapsed_steps": self.base.elapsed_steps.long().clone(), "geometry": geometry(self.state)}  # fmt: skip

    def expert_action(self, slip: Tensor) -> Tensor:
        """The expert's action for the present state, (N, A). A function of the state alone, so it needs no reset. slip: (N,) long; it plays
        the stage that many after the present one, modulo K: 0 is right, all else a mistake to recover from."""
        s, table = self.state, self.task.stage_table
        stage = stage_signals(self.task, s, torch.zeros_like(s["grasped"]), self.potential, self.across)["stage"]
        stage = (stage + slip.to(stage.device)) % len(table)
        target = torch.stack([entry.target(s) for entry in table], 1)[torch.arange(self.num_envs), stage]  # (N, 3)
        gripper = torch.tensor([entry.gripper for entry in table], device=stage.device)[stage]
        turn = torch.where(gripper > 0, s["yaw_error"], 0.0)  # once the fingers close, the object turns with them
        zero = torch.zeros_like(turn)
        # ManiSkill scales rotations by the lower bound (-0.1 rad), hence the sign
        rotation = torch.stack([zero, zero, -turn / EE_STEP], -1)
        return torch.cat([(target - s["tool"]) / EE_STEP, rotation, gripper[:, None]], -1).clamp(-1, 1)


class ProcessEnv(gym.Env):
    """One StageEnv as a process of gymnasium's AsyncVectorEnv wants it: numpy, without the batch axis."""

    def __init__(self, env_id: str, index: int, **kwargs):
        torch.set_num_threads(1)
        self.index = index
        self.env = StageEnv(env_id, num_envs=1, backend="cpu", **kwargs)
        obs, _ = self.env.reset()
        self.env.next_seed = [kwargs["seed"]]
        self.observation_space = gym.spaces.Dict({
            "rgb": gym.spaces.Box(0, 255, obs["rgb"].shape[1:], np.uint8),
            "proprio": gym.spaces.Box(-np.inf, np.inf, obs["proprio"].shape[1:], np.float32),
        })  # fmt: skip
        self.action_space = self.env.base.single_action_space

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        obs, info = self.env.reset(None if seed is None else [seed])
        return self.first(obs), self.first(info)

    def step(self, action: np.ndarray):
        obs, reward, terminated, truncated, info = self.env.step(torch.as_tensor(action)[None])
        return self.first(obs), float(reward), bool(terminated), bool(truncated), self.first(info)

    def expert_action(self, slip: Tensor) -> np.ndarray:
        return self.env.expert_action(slip[self.index, None])[0].numpy()

    def set_next_seed(self, seeds: list[int]) -> None:
        self.env.next_seed = [seeds[self.index]]

    def close(self):
        self.env.env.close()

    @staticmethod
    def first(batch: State) -> dict[str, np.ndarray]:
        return {name: value[0].numpy() for name, value in batch.items()}


class StageVectorEnv:
    """What `make_envs` returns. Same-step auto-reset: at an episode's end the observation and infos are the new episode's, and
    `final_obs`, `final_info` hold the ended one's, valid where `_final_info` (N,) is true. All values are torch tensors.

    `reset(seed=s)` gives env i the seed s + i, a list is taken as it is; each later episode of an env has a seed of its own below
    TRAIN_SEEDS, derived from the one before. Infos: `stage`, `furthest_stage`, `potential`, `stage_distance`, `success`, `seed`, `elapsed_steps`,
    `geometry` (N, 6).
    """

    def __init__(self, env_id: str, num_envs: int, backend: str, seed: int, kwargs: dict):
        self.task, self.num_envs, self.backend = get_task(env_id), num_envs, backend
        self.num_stages = len(self.task.stages)
        if backend == "cuda":
            self.envs = StageEnv(env_id, num_envs, backend, seed, **kwargs)
            self.single_action_space = self.envs.base.single_action_space
        else:
            # Processes are forked from a clean server that has imported what they need once. It must also import the running
            # script's heavy modules, because each process imports the script again.
            from multiprocessing import set_forkserver_preload

            set_forkserver_preload(["stare_utils", "mani_skill.envs", "tyro", "tqdm", "torch.utils.tensorboard", "vla", "peft", "imageio"])
            self.envs = gym.vector.AsyncVectorEnv(
                [lambda i=i: ProcessEnv(env_id, i, seed=seed + i, **kwargs) for i in range(num_envs)],
                context="forkserver", autoreset_mode=gym.vector.AutoresetMode.SAME_STEP,
            )  # fmt: skip
            self.single_action_space = self.envs.single_action_space

    def reset(self, seed: int | list[int] | None = None) -> tuple[State, State]:
        seeds = [seed + i for i in range(self.num_envs)] if isinstance(seed, int) else seed
        obs, info = self.envs.reset(seed=seeds)
        return (obs, info) if self.backend == "cuda" else (self.tensors(obs), self.tensors(info))

    def step(self, actions: Tensor) -> tuple[State, Tensor, Tensor, Tensor, dict]:
        """actions: (N, A) in the env's own units. Returns observation, reward (N,), terminated (N,), truncated (N,), infos."""
        if self.backend == "cuda":
            return self.step_cuda(actions)
        obs, reward, terminated, truncated, info = self.envs.step(actions.cpu().numpy())
        done = torch.from_numpy(terminated | truncated)
        infos = self.tensors(info)
        infos["_final_info"] = done
        if done.any():
            infos["final_info"] = self.tensors(info["final_info"])
            infos["final_obs"] = {name: torch.zeros_like(value) for name, value in self.tensors(obs).items()}
            for i in done.nonzero()[:, 0].tolist():
                for name, value in info["final_obs"][i].items():
                    infos["final_obs"][name][i] = torch.as_tensor(value)
        return self.tensors(obs), torch.from_numpy(reward).float(), torch.from_numpy(terminated), torch.from_numpy(truncated), infos

    def step_cuda(self, actions: Tensor) -> tuple[State, Tensor, Tensor, Tensor, dict]:
        obs, reward, terminated, truncated, infos = self.envs.step(actions)
        done = terminated | truncated
        if done.any():
            final_obs, final_info = {name: value.clone() for name, value in obs.items()}, infos
            obs, infos = self.envs.reset(env_idx=done.nonzero()[:, 0])
            infos = {**infos, "final_obs": final_obs, "final_info": final_info}
        return obs, reward, terminated, truncated, {**infos, "_final_info": done}

    def set_next_seeds(self, seeds: list[int]) -> None:
        """The seeds (N) of the episodes that begin when the present ones end."""
        if self.backend == "cuda":
            self.envs.next_seed = list(seeds)
        else:
            self.envs.call("set_next_seed", seeds)

    def expert_action(self, slip: Tensor) -> Tensor:
        """(N, A): see StageEnv.expert_action."""
        return self.envs.expert_action(slip) if self.backend == "cuda" else torch.from_numpy(np.stack(self.envs.call("expert_action", slip)))

    def close(self) -> None:
        self.envs.env.close() if self.backend == "cuda" else self.envs.close()

    @staticmethod
    def tensors(batch: dict) -> dict[str, Tensor]:
        return {name: torch.from_numpy(np.array(value)) for name, value in batch.items() if name[0] != "_" and not name.startswith("final_")}


def prepare_renderer(full_meshes: bool = False) -> None:
    """Chooses the software driver where there is no GPU, makes the light meshes once, and raises UserError when SAPIEN cannot render."""
    import sapien

    if not torch.cuda.is_available():
        for driver in Path("/usr/share/vulkan/icd.d").glob("lvp_icd*.json"):  # the software driver, where several are installed
            os.environ.setdefault("VK_ICD_FILENAMES", str(driver))
        os.environ.setdefault("LP_NUM_THREADS", "0")  # it draws in the process that asks: the env processes are the parallelism
    sapien.render.set_log_level("off")  # the error below says what its three lines say
    try:
        sapien.render.RenderSystem("cuda" if torch.cuda.is_available() else "cpu")
    except RuntimeError as error:
        raise UserError(
            f"no Vulkan renderer ({str(error).strip().splitlines()[-1]}). Run ./setup.sh, or: apt-get install mesa-vulkan-drivers libvulkan1"
            " (Debian 12: from bookworm-backports)"
        ) from None
    if not full_meshes:
        light_panda()  # once here, not once in every process


def make_envs(
    env_id: str, num_envs: int, seed: int, terminate_on_success: bool = True, *, backend: str = "cpu", full_meshes: bool = False, **kwargs
) -> StageVectorEnv:
    """Vectorised envs of a task. backend: "cpu" (one process per env) or "cuda" (ManiSkill's GPU simulation); kwargs: of StageEnv.

    On the CPU an explicitly seeded episode is a function of its seed; GPU simulation draws a whole batch from its first seed.
    Raises UserError on an unknown env id, num_envs < 1, or when there is no renderer.
    """
    get_task(env_id)
    if num_envs < 1:
        raise UserError(f"--num-envs must be at least 1, not {num_envs}")
    prepare_renderer(full_meshes)
    return StageVectorEnv(env_id, num_envs, backend, seed, {"terminate_on_success": terminate_on_success, "full_meshes": full_meshes, **kwargs})


def make_single_env(env_id: str) -> StageEnv:
    """One StageEnv in this process, for looking at recorded states."""
    prepare_renderer()
    env = StageEnv(env_id, 1, "cpu", 0)
    env.reset()
    return env


class ScriptedExpert:
    """Solves each task stage by stage from the simulator's state. `envs` is what make_envs returns."""

    def __init__(self, envs: StageVectorEnv):
        self.envs = envs

    def act(self, slip: Tensor | None = None) -> Tensor:
        """Actions for the present states, (N, A), as `envs.step` takes them. Valid after every reset and step: the plan is a function of the
        state, so an env that was reset starts afresh by itself. slip (N,) long: how many stages off to play; None: the right one."""
        return self.envs.expert_action(torch.zeros(self.envs.num_envs, dtype=torch.long) if slip is None else slip)
