"""One ManiSkill environment with stage signals.

`StageEnv` is a batch of N envs on a GPU, or a single env on a CPU. world/vector.py runs many single
ones in processes. Everything is a tensor with one row per env.
Letters: N envs, K stages, A numbers of an action. Units: metres, radians; world frame.
"""

import copy
import logging
import os
from pathlib import Path

import mani_skill
import numpy as np
import sapien
import torch
from mani_skill.agents.robots.panda import Panda, PandaWristCam
from mani_skill.agents.robots.widowx.widowx import WidowX250S
from mani_skill.utils.registration import TimeLimitWrapper

from stare_utils import State, Tensor, stage_signals
from world.assets import IMAGE_SIZE, STOCK_SHADERS, draws_on_gpu, light_assets, scene_class
from world.tasks import EVAL_SEED, TRAIN_SEEDS, Task, env_ids, geometry, get_task

# SimplerEnv's camera with 320 x 240 pixels in place of 640 x 480.
SMALL_CAMERA = {
    "width": 320,
    "height": 240,
    "intrinsic": np.array([[311.794, 0, 159.75], [0, 311.794, 119.77], [0, 0, 1]]),
}


# ---- what ManiSkill is told ----
def install_assets(light_folder: Path | None, segmentation: bool = True) -> None:
    """Chooses the robots' files and the shaders.

    light_folder: of `light_assets`; None: stock. segmentation: whether the pictures need one.

    ManiSkill has no arguments for these. It reads them from its classes, so they are set there, for
    the whole process.
    """
    # ManiSkill warns of its own assets.
    mani_skill.logger.setLevel(logging.ERROR)
    folder = light_folder or Path(mani_skill.PACKAGE_ASSET_DIR) / "robots/panda"
    Panda.urdf_path = str(folder / "panda_v2.urdf")
    PandaWristCam.urdf_path = str(folder / "panda_v3.urdf")
    # No policy here sees through the camera on the wrist.
    PandaWristCam._sensor_configs = []
    # ManiSkill's WidowX has an .srdf file that switches off collisions of the arm with itself.
    # SimplerEnv's WidowX has none, and its fingers jam.
    WidowX250S.disable_self_collisions = True

    shaders = "shaders" if segmentation else "colour_shaders"

    # ManiSkill calls this for each camera.
    def set_shaders(name: str) -> None:
        STOCK_SHADERS(str(light_folder / shaders / name) if light_folder else name)

    sapien.render.set_camera_shader_dir = set_shaders


def simulator_options(
    task: Task, backend: str, light: bool, reward: str, render: bool, image_size: int
) -> dict:
    """Arguments of ManiSkill's env class. light: spare the renderer what no policy needs."""
    device = ""
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        # Each process of a torchrun job has a GPU of its own, if there are as many.
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        device = f":{local_rank % max(1, torch.cuda.device_count())}"
    options = {
        "sim_backend": f"physx_{backend}",
        "reward_mode": "none",
        "sensor_configs": {},
    }
    if backend == "cuda":
        options["sim_backend"] += device
    if reward == "dense":
        options["reward_mode"] = "normalized_dense"
    # A policy with small images sees the same in a quarter of SimplerEnv's pixels.
    if task.grid and light and image_size <= IMAGE_SIZE:
        options["sensor_configs"] = dict(SMALL_CAMERA)

    if not render:
        return options | {"obs_mode": "none", "render_backend": "none"}
    # SimplerEnv pastes a photograph behind the robot. It finds the robot by the segmentation.
    options["obs_mode"] = "rgb+segmentation" if task.grid else "rgb"
    options["render_backend"] = "cpu"
    if draws_on_gpu():
        # ManiSkill renders on the GPU under any name that begins with "cuda".
        # Under the plain name "cuda" it also hands the pixels over as CUDA tensors.
        # These would cost each env process a context on the GPU, and so memory and time.
        options["render_backend"] = f"cuda_{backend}{device}"
    return options


class StageEnv:
    """A ManiSkill env with stage signals. Batched tensors in and out.

    Where an episode ends, the next one begins in the same step. The observation and the infos are
    the new episode's then. `final_obs` and `final_info` hold the ended episode's, and are valid
    where `_final_info` (N,) is true.

    Observations: `rgb` (N, H, W, 3) uint8; `proprio` (N, 8) float: tool position, tool quaternion
    (w, x, y, z), gripper opening.
    Infos: `stage`, `furthest_stage`, `potential`, `stage_distance`, `success`, `seed`,
    `elapsed_steps` (N,), `distances` (N, K), `geometry` (N, 8), and what the task reports.

    backend: "cpu" or "cuda", where to simulate. seed: env i's first episode has the seed + i.
    full_meshes: render ManiSkill's own meshes and pixels, not the light ones.
    max_episode_steps: None is the task's horizon.
    reward: "sparse" is 1 on a success step and else 0; "dense" is ManiSkill's normalized_dense.
    potential, potential_across_stages: see `stage_signals`.
    stock_camera, ood: see `scene_class`.
    render: False leaves out `rgb` and needs no renderer.
    control_mode: "" is the arm's. image_size: the side of `rgb`, in pixels.
    Raises UserError on an unknown env id.
    """

    def __init__(
        self,
        env_id: str,
        num_envs: int,
        backend: str,
        seed: int,
        terminate_on_success: bool = True,
        full_meshes: bool = False,
        max_episode_steps: int | None = None,
        reward: str = "sparse",
        potential: str = "sigmoid",
        potential_across_stages: str = "offset",
        stock_camera: bool = False,
        ood: str = "none",
        render: bool = True,
        control_mode: str = "",
        image_size: int = IMAGE_SIZE,
    ):
        # ---- what it is ----
        (env_id,) = env_ids(env_id)
        self.task = get_task(env_id)
        self.num_stages = len(self.task.stages)
        self.num_envs = num_envs
        # One batch simulates at once, so there is nothing to take turns.
        self.halves = [slice(0, num_envs)]
        self.backend = backend
        self.terminate_on_success = terminate_on_success
        self.dense = reward == "dense"
        self.potential = potential
        self.across = potential_across_stages
        self.render = render
        self.image_size = image_size
        # ---- assets: a software renderer is spared what nobody sees ----
        light = backend == "cpu" and not full_meshes
        install_assets(light_assets() if light else None, segmentation=self.task.grid > 0)
        # ---- ManiSkill's env ----
        options = simulator_options(self.task, backend, light, reward, render, image_size)
        options["control_mode"] = control_mode or self.task.arm.control_mode
        env_class = scene_class(env_id, stock_camera, ood, render, image_size, light)
        self.base = env_class(num_envs=num_envs, **options)
        self.env = TimeLimitWrapper(self.base, max_episode_steps or self.task.max_episode_steps)
        self.single_action_space = self.base.single_action_space
        # ---- counters of each env ----
        device = self.base.device
        # The seed of the next episode, of the present one, and how far the present one has come.
        self.next_seed = [seed + i for i in range(num_envs)]
        self.seeds = torch.zeros(num_envs, dtype=torch.long, device=device)
        self.furthest = torch.zeros(num_envs, dtype=torch.long, device=device)
        # Where the object lay when the present episode began.
        self.object_start = torch.zeros(num_envs, 3, device=device)

    # ---- episodes and steps ----
    def reset(
        self, seed: int | list[int] | None = None, env_idx: Tensor | None = None
    ) -> tuple[State, State]:
        """Begins episodes in all envs, or in those of `env_idx` (n,) alone.

        seed: s gives env i the seed s + i, a list is taken as it is. None: the next seed of each
        env, which is below TRAIN_SEEDS and derived from the seed before it. ManiSkill's GPU
        simulation draws such an episode from its own random stream instead.
        Returns observations and infos of all envs.
        """
        index = torch.arange(self.num_envs, device=self.base.device)
        if env_idx is not None:
            index = env_idx
        options = {}
        if len(index) < self.num_envs:
            options["env_idx"] = index
        else:
            # PhysX keeps contacts that no reset clears, so the scene is built again.
            # An explicitly seeded episode is then a function of its seed alone.
            options["reconfigure"] = seed is not None and self.backend == "cpu"

        seeds = seed
        if seed is None:
            seeds = [self.next_seed[i] for i in index.tolist()]
        elif isinstance(seed, int):
            seeds = [seed + i for i in range(self.num_envs)]
        if self.task.grid and min(seeds) >= EVAL_SEED:
            # Evaluation plays SimplerEnv's initial configurations in turn.
            options["episode_id"] = torch.tensor(seeds, device=self.base.device) - EVAL_SEED
        # ManiSkill takes seeds of all envs or none.
        all_seeds = seeds if len(seeds) == self.num_envs else None
        obs, _ = self.env.reset(seed=all_seeds, options=options)
        for i, s in zip(index.tolist(), seeds, strict=True):
            self.next_seed[i] = int(np.random.default_rng(s).integers(TRAIN_SEEDS))
        obs = self.show_goal(obs)

        self.seeds[index] = torch.tensor(seeds, device=self.base.device)
        self.furthest[index] = 0
        self.state = self.task.observe(self.base)
        # Contact forces are those of the last physics step, which is of the episode before.
        self.state["grasped"][index] = False
        self.object_start[index] = self.state["object"][index]
        self.seen = (self.observation(obs), self.infos(self.base.evaluate()["success"]))
        return self.seen

    def show_goal(self, obs: dict) -> dict:
        """Makes visible what ManiSkill hides, PickCube's goal, and takes the observation again.

        A policy that sees only images must see its goal.
        """
        if not self.render or not self.base._hidden_objects:
            return obs
        while self.base._hidden_objects:
            self.base._hidden_objects.pop().show_visual()
        return self.base.get_obs(self.base.get_info())

    def step(self, action: Tensor) -> tuple[State, Tensor, Tensor, Tensor, dict]:
        """One step of all envs. action: (N, A) in the env's own units.

        Returns observation, reward (N,), terminated (N,), truncated (N,), infos.
        """
        obs, reward, _, truncated, info = self.env.step(action)
        success = info["success"]
        self.state = self.task.observe(self.base)
        obs = self.observation(obs)
        infos = self.infos(success)
        # The furthest stage counts from the first step on, and not in the state after a reset:
        # no action has led there, and a goal may be drawn where the object lies.
        self.furthest = torch.maximum(self.furthest, infos["stage"])
        infos["furthest_stage"] = self.furthest.clone()

        self.seen = (obs, infos)
        if not self.dense:
            reward = success.float()
        terminated = success & self.terminate_on_success
        truncated = torch.as_tensor(truncated)
        done = terminated | truncated
        if done.any():
            final = {"final_obs": obs, "final_info": infos}
            obs, infos = self.reset(env_idx=done.nonzero()[:, 0])
            infos = infos | final
        infos = infos | {"_final_info": done}
        return obs, reward, terminated, truncated, infos

    def send(self, half: slice, actions: Tensor) -> None:
        """Steps the envs in `half`, which are all envs here. actions: (N, A), see `step`."""
        self.arrived = self.step(actions)

    def receive(self, half: slice) -> tuple[State, Tensor, Tensor, Tensor, dict]:
        """What `step` returned of the actions that were sent to the envs in `half`."""
        return self.arrived

    def set_next_seeds(self, seeds: list[int]) -> None:
        """The seeds (N) of the episodes that begin when the present ones end."""
        self.next_seed = list(seeds)

    def close(self) -> None:
        """Ends the simulator."""
        self.env.close()

    # ---- one state, again and again ----
    def save(self) -> dict:
        """The present state of one env on a CPU, for `restore`."""
        assert self.num_envs == 1 and self.backend == "cpu", "one env on a CPU"
        return copy.deepcopy(
            {
                "simulator": self.base.scene.px.pack(),
                # An arm that follows a target goes on from that target, not from where it is.
                "controllers": self.base.agent.controller.get_state(),
                "elapsed_steps": self.base.elapsed_steps,
                "next_seed": self.next_seed,
                "furthest": self.furthest,
                "object_start": self.object_start,
                "state": self.state,
                "seen": self.seen,
            }
        )

    def restore(self, saved: dict) -> tuple[State, State]:
        """Goes back to a state that this env, or another one of its task, has saved.

        Returns the observation and infos that the other env returned there. Contact forces are no
        part of the state, so what comes next may differ by some 0.1 mm from what came next there.
        """
        saved = copy.deepcopy(saved)
        obs, infos = saved["seen"]
        if int(self.seeds[0]) != int(infos["seed"][0]):
            # The sizes of the objects belong to the episode.
            self.reset(int(infos["seed"][0]))
        self.base.scene.px.unpack(saved["simulator"])
        # LeanEnv keeps the grasps of the state before.
        getattr(self.base.agent, "grasps", {}).clear()
        self.base.agent.controller.set_state(saved["controllers"])
        self.base._elapsed_steps[:] = saved["elapsed_steps"]
        self.next_seed = saved["next_seed"]
        self.furthest = saved["furthest"]
        self.object_start = saved["object_start"]
        self.state = saved["state"]
        self.seen = (obs, infos)
        return self.seen

    # ---- what is seen and what is known ----
    def observe_state(self, state: dict) -> State:
        """The observation, with `geometry`, of a recorded ManiSkill state (batch 1).

        The recorded state replaces the present one.
        """
        self.base.set_state_dict(state)
        # An arm that follows a target keeps that of the last reset, which belongs to no recording.
        self.base.agent.controller.controllers["arm"].reset()
        self.state = self.task.observe(self.base)
        obs = self.observation(self.base.get_obs())
        obs["geometry"] = geometry(self.state)
        return obs

    def state_widths(self) -> dict[str, int]:
        """Numbers per row of each body in a recorded state, by name: {"actors/cube": 13, ...}."""
        state = self.base.get_state_dict()
        widths = {}
        for kind in ("actors", "articulations"):
            for name, row in state[kind].items():
                widths[f"{kind}/{name}"] = row.shape[1]
        return widths

    def succeeds(self, state: dict) -> bool:
        """Whether a recorded ManiSkill state (batch 1) is a success. It replaces the present one.

        A state has no contact forces, so nothing counts as grasped.
        """
        self.base.set_state_dict(state)
        # SimplerEnv asks for the force between two objects. Some steps of 2 ms bring it back.
        for _ in range(5 if self.task.grid else 0):
            if self.base.evaluate()["success"]:
                return True
            self.base.scene.step()
        return bool(self.base.evaluate()["success"])

    def observation(self, obs: dict) -> State:
        """What the policy sees. obs: ManiSkill's observation of the present state."""
        opening = self.state["opening"][:, None]
        proprio = torch.cat([self.state["tool"], self.state["quaternion"], opening], -1)
        if not self.render:
            return {"proprio": proprio}
        # Two pictures are put one above the other where they are wide, else side by side.
        pictures = [camera["rgb"] for camera in obs["sensor_data"].values()]
        rgb = torch.cat(pictures, 1 if self.task.wide else 2)
        size = (self.image_size, self.image_size)
        if rgb.shape[1:3] != size:
            # SimplerEnv's 4:3 picture is squeezed into a square, as OpenVLA does it.
            rgb = torch.nn.functional.interpolate(
                rgb.movedim(-1, 1).float(), size, mode="bilinear", antialias=True
            ).movedim(1, -1)
        return {"proprio": proprio, "rgb": rgb.round().byte().contiguous()}

    def infos(self, success: Tensor) -> State:
        """What the rules know of the present state. success: (N,) bool."""
        self.state["object_start"] = self.object_start
        table = self.task.stage_table
        infos = stage_signals(table, self.state, success, self.potential, self.across)
        # Copies, because these counters are written in place.
        infos["furthest_stage"] = self.furthest.clone()
        infos["success"] = success
        infos["seed"] = self.seeds.clone()
        infos["elapsed_steps"] = self.base.elapsed_steps.long().clone()
        infos["geometry"] = geometry(self.state)
        for name in self.task.report:
            infos[name] = self.state[name]
        return infos

    def expert_action(self, slip: Tensor) -> Tensor:
        """The scripted expert's action for the present state, (N, A): see ScriptedExpert.

        slip: (N,) long. The expert plays the stage that many after the present one, modulo K: 0 is
        right, and everything else is a mistake to recover from.
        """
        state = self.state
        table = self.task.stage_table
        arm = self.task.arm
        # Success is no stage to play: the expert goes on with the stage that it was in.
        no_success = torch.zeros_like(state["grasped"])
        signals = stage_signals(table, state, no_success, self.potential, self.across)
        stage = signals["stage"]
        device = stage.device
        # Every stage's command is computed, and that of each env's stage is chosen.
        played = (stage + slip.to(device)) % len(table)
        chosen = (torch.arange(self.num_envs, device=device), played)
        target = torch.stack([entry.target(state) for entry in table], 1)[chosen]
        turn = torch.stack([entry.turn(state) for entry in table], 1)[chosen]
        gripper = torch.stack([entry.gripper(state) for entry in table], 1)[chosen]

        unit = torch.tensor(arm.unit, dtype=torch.float32, device=device)
        limit = torch.tensor(arm.limit, dtype=torch.float32, device=device)
        motion = torch.cat([target - state["command"], turn], -1) / unit
        return torch.cat([motion, gripper[:, None]], -1).clamp(-limit, limit)
