"""What stands around a task: light meshes, cameras, out-of-distribution scenes, and the renderer.

`light_assets` spares a software renderer what nobody sees. `scene_class` gives ManiSkill's envs our
cameras and, if asked, one thing that training never varies. `check_world` finds what is missing
before a script makes anything.
Letters: N envs. Units: metres.
"""

import contextlib
import os
import re
import shutil
import tempfile
from pathlib import Path

import mani_skill
import numpy as np
import sapien
import torch
from mani_skill.envs.sapien_env import BaseEnv
from mani_skill.sensors.camera import CameraConfig
from mani_skill.utils.registration import REGISTERED_ENVS
from mani_skill.utils.sapien_utils import look_at
from mani_skill.utils.structs.pose import Pose

from stare_utils import Tensor
from world.tasks import Task, UserError, flat, get_task

# Pixels: the side of the square observation, unless an env is asked for another.
IMAGE_SIZE = 128
# Metres: how far `--ood position` moves the object and what belongs to it.
OOD_SHIFT = 0.05
# Metres: how far `--ood camera` moves each camera.
OOD_CAMERA = 0.05
# Metres: training moves SimplerEnv's objects this far, along x and y, from the grid of initial
# configurations. Evaluation plays the grid itself.
TRAIN_JITTER = 0.02
# SAPIEN's own function, which ManiSkill calls for each camera. world/envs.py replaces it.
STOCK_SHADERS = sapien.render.set_camera_shader_dir


# ---- light meshes and shaders ----
def light_assets() -> Path:
    """The folder of the Panda's files and of shaders that spare a software renderer much work.

    The folder is made once, in the user's cache. It holds panda_v2.urdf, panda_v3.urdf (with the
    wrist camera) and shaders/. The physics is the same, because collision meshes are untouched.
    """
    cache_home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    name = f"light-{mani_skill.__version__}-{sapien.__version__}"
    cache = cache_home / "stare-vla" / name
    if cache.exists():
        return cache
    cache.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache.parent) as new:
        folder = Path(new) / "panda"
        shutil.copytree(Path(mani_skill.PACKAGE_ASSET_DIR) / "robots/panda", folder)
        for file in (folder / "franka_description/meshes/visual").glob("*.glb"):
            simplify_mesh(file)
        remove_wrist_camera(folder / "panda_v3.urdf")
        light_shaders(folder / "shaders")
        # The rename fails if another process was faster. Its folder is the same.
        with contextlib.suppress(OSError):
            folder.rename(cache)
    return cache


def simplify_mesh(file: Path) -> None:
    """Keeps 5 % of the triangles of a visual mesh: 6,725 of the Panda's 134,924.

    The other triangles take three quarters of the time of a frame, and nobody sees them.
    """
    # Only the run that makes the cache needs this slow import.
    import trimesh

    scene = trimesh.load_scene(file, process=False)
    for name, mesh in scene.geometry.items():
        merged = mesh.copy()
        # The file holds loose triangles. They can collapse only after their corners are merged.
        merged.merge_vertices(merge_tex=True, merge_norm=True)
        # trimesh calls the package fast_simplification here.
        light = merged.simplify_quadric_decimation(percent=0.95)
        light.visual = trimesh.visual.TextureVisuals(material=mesh.visual.material)
        scene.geometry[name] = light
    scene.export(file)


def remove_wrist_camera(urdf: Path) -> None:
    """Removes the visual mesh of the camera on the wrist. Its mass and its collision box stay.

    The mesh has more triangles than all the rest of the robot.
    """
    visual = r"<visual>(?:(?!</visual>).)*realsense2.*?</visual>"
    urdf.write_text(re.sub(visual, "", urdf.read_text(), flags=re.S))


def light_shaders(folder: Path) -> None:
    """Copies SAPIEN's shaders without the table for reflections of an environment map.

    No scene here has such a map, so the pixels are the same. Every process would compute the table
    for some ten seconds.
    """
    shutil.copytree(Path(sapien.__file__).parent / "vulkan_shader", folder)
    # The shaders name the table in its declaration and in one look-up.
    for shader in (folder / "minimal").glob("*.frag"):
        text = re.sub(r"layout.*samplerBRDFLUT;\n", "", shader.read_text())
        text = re.sub(r"texture\(samplerBRDFLUT.*\.xy", "vec2(0)", text)
        shader.write_text(text)


# ---- scenes ----
def scene_class(env_id: str, stock_camera: bool, ood: str, render: bool, image_size: int) -> type:
    """ManiSkill's env class with our cameras and, out of distribution, one changed thing.

    stock_camera: keep the env's own camera. image_size: the side of the observation (pixels).
    ood: "none", or a thing that training never varies, drawn from each episode's seed. "position"
    moves the object and what belongs to it OOD_SHIFT away from the middle of the table or grid.
    "camera" moves each camera by OOD_CAMERA in a random direction. "lighting" replaces the lamps.
    Raises UserError on an unknown env id.
    """
    task = get_task(env_id)

    class Scene(REGISTERED_ENVS[env_id].cls):
        SUPPORTED_OBS_MODES = ("none", "rgb", "rgb+segmentation")
        if not render:
            # SimplerEnv pastes a photograph behind the robot.
            rgb_overlay_mode = "none"

        @property
        def _default_sensor_configs(self):
            if stock_camera or not task.views:
                return super()._default_sensor_configs
            shifts = np.zeros((len(task.views), 3))
            if ood == "camera":
                shifts = draw_camera_shifts(self, len(task.views))
            return cameras(task, image_size, shifts)

        def _load_lighting(self, options: dict):
            if ood == "lighting":
                hang_random_lamps(self)
            else:
                super()._load_lighting(options)

        def _initialize_episode(self, env_idx: Tensor, options: dict):
            middle = torch.zeros(3, device=self.device)
            if task.grid:
                grid = self.xyz_configs
                middle = grid[:, 0].mean(0)
                # Only an evaluation names its configuration. It plays that as it is.
                if "episode_id" not in options:
                    self.xyz_configs = draw_beside(grid, len(task.movable(self)))
                # The stock env moves the arm back only when the objects have settled.
                # Some would settle in its fingers, so the arm waits high above the table.
                self.agent.robot.set_pose(sapien.Pose([0, 0, 5]))
            super()._initialize_episode(env_idx, options)
            if task.grid:
                self.xyz_configs = grid
            if ood == "position":
                move_outwards(task.movable(self), env_idx, middle)

    return Scene


def draw(env: BaseEnv, *size: int) -> np.ndarray:
    """Standard normal numbers that depend on the episode's seed alone."""
    return np.random.default_rng(int(env._episode_seed[0])).standard_normal(size)


def cameras(task: Task, image_size: int, shifts: np.ndarray) -> list[CameraConfig]:
    """The task's cameras, whose pictures together fill a square of image_size pixels.

    shifts: (number of views, 3) metres, by which the eyes are moved.
    """
    width = image_size if task.wide else image_size // 2
    height = image_size // 2 if task.wide else image_size
    configs = []
    for i, (eye, target, fov) in enumerate(task.views):
        config = CameraConfig(
            uid=f"view_{i}",
            pose=look_at(eye + shifts[i], target),
            width=width,
            height=height,
            fov=fov,
            near=0.01,
            far=100,
        )
        configs.append(config)
    return configs


def draw_camera_shifts(env: BaseEnv, num_views: int) -> np.ndarray:
    """(num_views, 3) metres: one random direction per camera, OOD_CAMERA long."""
    shifts = draw(env, num_views, 3)
    return shifts * (OOD_CAMERA / np.linalg.norm(shifts, axis=1, keepdims=True))


def draw_beside(grid: Tensor, num_moving: int) -> Tensor:
    """SimplerEnv's configurations, with the first objects of each moved a little.

    grid: (configurations, objects, 3) metres. num_moving: how many objects move, each by up to
    TRAIN_JITTER along x and y. Training begins beside the configurations that evaluation plays.
    """
    noise = 2 * torch.rand_like(grid[:, :num_moving]) - 1
    beside = grid.clone()
    beside[:, :num_moving] += TRAIN_JITTER * flat(noise)
    return beside


def move_outwards(actors: list, env_idx: Tensor, middle: Tensor) -> None:
    """Moves all actors by OOD_SHIFT, in the direction from `middle` (3,) to the first of them."""
    outwards = flat(actors[0].pose.p[env_idx] - middle)
    shift = OOD_SHIFT * torch.nn.functional.normalize(outwards, dim=-1)
    for actor in actors:
        pose = Pose.create_from_pq(actor.pose.p[env_idx] + shift, actor.pose.q[env_idx])
        actor.set_pose(pose)


def hang_random_lamps(env: BaseEnv) -> None:
    """Ambient light and one lamp, of random colour, direction and strength."""
    random = draw(env, 8)
    ambient = np.abs(0.3 + 0.15 * random[:3])
    direction = [*random[3:5], -1]
    colour = np.abs(1 + 0.7 * random[5:])
    env.scene.set_ambient_light(ambient)
    env.scene.add_directional_light(direction, colour, shadow=False)


# ---- checks before a script makes anything ----
def check_world(
    env_id: str,
    full_meshes: bool = False,
    render: bool = True,
    backend: str = "cpu",
    reward: str = "sparse",
) -> None:
    """Checks that a task can be simulated here, and makes the light meshes once.

    full_meshes, render: as an env takes them. backend: "cpu" or "cuda". reward: "dense" is
    ManiSkill's.
    Raises UserError if the task is unknown, its assets are missing, or SAPIEN cannot render. Also
    if ManiSkill has no such reward, or cannot end the task's episodes at success on this backend.
    """
    if get_task(env_id).grid:
        check_simplerenv(env_id, backend, reward)
    if render:
        check_renderer()
    if render and not full_meshes:
        # The meshes are made once here, and not once in every env process.
        light_assets()


def check_simplerenv(env_id: str, backend: str, reward: str) -> None:
    """Raises UserError if one of SimplerEnv's tasks cannot be played as asked."""
    if reward == "dense":
        raise UserError(f"{env_id} has no dense reward in ManiSkill: use --reward stare or sparse")
    if backend == "cuda":
        raise UserError(
            f"{env_id} trains with --backend cpu: on the GPU ManiSkill ends its episodes together,"
            " so success could not end one"
        )
    data = mani_skill.ASSET_DIR
    scene = data / "tasks/bridge_v2_real2sim_dataset"
    robot = data / "robots/widowx"
    if not (scene.is_dir() and robot.is_dir()):
        download = "python -m mani_skill.utils.download_asset"
        raise UserError(
            f"{env_id} needs assets that are not in {data}: run `{download} bridge_v2_real2sim -y"
            f" && {download} widowx250s -y`, or set MS_ASSET_DIR to the folder whose data/ holds"
            " them"
        )


def check_renderer() -> None:
    """Chooses the software driver if there is no GPU. Raises UserError if SAPIEN cannot render."""
    if not torch.cuda.is_available():
        # Several drivers may be installed. This is Mesa's, which renders on the CPU.
        for driver in Path("/usr/share/vulkan/icd.d").glob("lvp_icd*.json"):
            os.environ.setdefault("VK_ICD_FILENAMES", str(driver))
        # The driver draws in the process that asks, because the env processes are parallel already.
        os.environ.setdefault("LP_NUM_THREADS", "0")
    # SAPIEN would print three lines that say no more than the error below.
    sapien.render.set_log_level("off")
    try:
        sapien.render.RenderSystem("cuda" if torch.cuda.is_available() else "cpu")
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(
            f"no Vulkan renderer ({reason}): run ./setup.sh, which installs one or says how"
        ) from None
