"""What stands around a task: light meshes, cameras, out-of-distribution scenes, and the renderer.

`light_assets` and `LightScene` spare a software renderer what nobody sees. `scene_class` gives
ManiSkill's envs our cameras and, if asked, one thing that training never varies. `check_world`
finds what is missing before a script makes anything.
Letters: N envs. Units: metres.
"""

import functools
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import fast_simplification
import mani_skill
import numpy as np
import sapien
import torch
from mani_skill.envs.sapien_env import BaseEnv
from mani_skill.sensors.camera import CameraConfig
from mani_skill.utils.registration import REGISTERED_ENVS
from mani_skill.utils.sapien_utils import look_at
from mani_skill.utils.structs.actor import Actor
from mani_skill.utils.structs.pose import Pose

from stare_utils import Tensor
from world.lean import LeanEnv
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
# The share of its triangles that a fine mesh keeps.
KEPT = 0.05
# A mesh with fewer triangles than this is not simplified.
FINE = 1000
# The name of Mesa's software driver begins with this.
SOFTWARE_DRIVER = "lvp_icd"
# SAPIEN's own function, which ManiSkill calls for each camera. world/envs.py replaces it.
STOCK_SHADERS = sapien.render.set_camera_shader_dir


# ---- light meshes and shaders ----
def light_assets() -> Path:
    """The folder of the Panda's files and of shaders that spare a software renderer much work.

    The folder is made once, in the user's cache. It holds panda_v2.urdf, panda_v3.urdf (with the
    wrist camera), shaders/ and colour_shaders/. The latter draw no segmentation. The physics is the
    same, because collision meshes are untouched.
    Raises UserError if the folder cannot be written.
    """
    # The number is that of what `make_light_assets` makes. A new one leaves old caches aside.
    name = f"light-3-{mani_skill.__version__}-{sapien.__version__}"
    cache = cache_home() / "stare-vla" / name
    if cache.exists():
        return cache
    try:
        make_light_assets(cache)
    except OSError as error:
        # shutil's errors are a list of all files that failed. The first says why.
        reason = error.args[0][0][-1] if isinstance(error, shutil.Error) else error
        raise UserError(
            f"the light meshes cannot be written to {cache.parent} ({reason}): set XDG_CACHE_HOME"
            " to another folder"
        ) from None
    return cache


def cache_home() -> Path:
    """The folder of the user's caches. Raises UserError where the user has no home."""
    given = os.environ.get("XDG_CACHE_HOME")
    if given:
        return Path(given)
    try:
        return Path.home() / ".cache"
    # A container may give a process a user number that has no name.
    except RuntimeError:
        raise UserError(
            "this user has no home folder: set XDG_CACHE_HOME to a folder that can be written"
        ) from None


def make_light_assets(cache: Path) -> None:
    """Makes the folder of `light_assets`, or nothing at all. Raises OSError if a write fails."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache.parent) as new:
        folder = Path(new) / "panda"
        shutil.copytree(Path(mani_skill.PACKAGE_ASSET_DIR) / "robots/panda", folder)
        for file in (folder / "franka_description/meshes/visual").glob("*.glb"):
            simplify_mesh(file)
        remove_wrist_camera(folder / "panda_v3.urdf")
        light_shaders(folder / "shaders", segmentation=True)
        light_shaders(folder / "colour_shaders", segmentation=False)
        try:
            folder.rename(cache)
        except OSError:
            # Another process may have been faster. Its folder is the same.
            if not cache.exists():
                raise


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
        light = merged.simplify_quadric_decimation(percent=1 - KEPT)
        light.visual = trimesh.visual.TextureVisuals(material=mesh.visual.material)
        scene.geometry[name] = light
    scene.export(file)


def remove_wrist_camera(urdf: Path) -> None:
    """Removes the visual mesh of the camera on the wrist. Its mass and its collision box stay.

    The mesh has more triangles than all the rest of the robot.
    """
    visual = r"<visual>(?:(?!</visual>).)*realsense2.*?</visual>"
    urdf.write_text(re.sub(visual, "", urdf.read_text(), flags=re.S))


# What the colour of a pixel does not need, as (pattern, replacement).
COLOUR_EDITS = (
    # No scene here has an environment map. Every process would compute its table of reflections for
    # some ten seconds, and each pixel would be looked up in a black map.
    (r"layout[^\n]*samplerBRDFLUT;\n", ""),
    (r"vec3 specularIBL.*?\n}\n", ""),
    (r"  vec3 wnormal = .*?(?=  color \+= sceneBuffer\.ambientLight)", ""),
    # The picture is drawn in one pass. A second pass would only put it on a black background, and
    # darken what is half transparent, which nothing is here.
    (r"out vec4 outColorRaw;", "out vec4 outColor;"),
    (r"  outColorRaw = ", "  outColor = "),
)
# Where a photograph will cover the pixel, its distance is enough: see `cover`.
COVER_EDIT = (
    r"void main\(\) \{\n",
    """void main() {
  if (materialBuffer.transmission == 1) {
    outColor = vec4(0, 0, 0, 1);
    outPositionSegmentation = ivec4(ivec3(inPosition * 1000), inSegmentation[1]);
    return;
  }
""",
)
# Without the segmentation, which only the photograph needs.
COLOUR_ONLY_EDITS = (
    (r"layout\(location = 1\) out ivec4 outPositionSegmentation;\n", ""),
    (r"  outPositionSegmentation = [^\n]*\n", ""),
)


def light_shaders(folder: Path, segmentation: bool) -> None:
    """Copies SAPIEN's shaders, and makes those cheaper that draw the pictures of a policy.

    Pixels differ by at most one grey level, unless something is half transparent.
    segmentation: draw the segmentation too.
    Raises AssertionError if SAPIEN's shaders are not those that the edits were written for.
    """
    shutil.copytree(Path(sapien.__file__).parent / "vulkan_shader", folder)
    for second_pass in (folder / "minimal").glob("composite*"):
        second_pass.unlink()
    shader = folder / "minimal/gbuffer.frag"
    text = shader.read_text()
    edits = (COVER_EDIT,) if segmentation else COLOUR_ONLY_EDITS
    for pattern, replacement in COLOUR_EDITS + edits:
        text, count = re.subn(pattern, replacement, text, flags=re.S)
        # Another SAPIEN may have other shaders. A silent miss would draw something else.
        assert count == 1, f"{pattern} is {count} times in SAPIEN's gbuffer.frag"
    shader.write_text(text)


# ---- light scenes ----
class LightScene:
    """Goes before an env's class. Its objects move as before and are drawn with few triangles.

    The shaders must be those of `light_assets`.
    """

    def _load_scene(self, options: dict):
        super()._load_scene(options)
        if not self.scene.can_render():
            return
        if "ground" in self.scene.actors:
            redraw(self.scene.actors["ground"], two_triangles)
        # SimplerEnv names what it shows. A photograph covers all else.
        shown = getattr(self, "objects_excluded_from_greenscreening", self.scene.actors)
        for name, actor in self.scene.actors.items():
            if name not in shown:
                redraw(actor, cover)


def redraw(actor: Actor, shape: Callable) -> None:
    """Gives an actor other shapes to draw. shape: makes a new one of each old one."""
    for entity in actor._objs:
        old = entity.find_component_by_type(sapien.render.RenderBodyComponent)
        new = sapien.render.RenderBodyComponent()
        for old_shape in old.render_shapes:
            new_shape = shape(old_shape)
            new_shape.local_pose = old_shape.local_pose
            new.attach(new_shape)
        entity.remove_component(old)
        entity.add_component(new)


def two_triangles(
    square: sapien.render.RenderShapeTriangleMesh,
) -> sapien.render.RenderShapeTriangleMesh:
    """The same flat square, which ManiSkill makes of 20,000 triangles."""
    (part,) = square.parts
    x, y, _ = part.vertices.T
    # Counterclockwise, because the renderer leaves out triangles that are seen from behind.
    corners = [np.argmin(x + y), np.argmax(x - y), np.argmax(x + y), np.argmin(x - y)]
    return sapien.render.RenderShapeTriangleMesh(
        vertices=part.vertices[corners],
        triangles=[[0, 1, 2], [0, 2, 3]],
        normals=part.get_vertex_normal()[corners],
        uvs=part.get_vertex_uv()[corners],
        material=part.material,
    )


def cover(
    shape: sapien.render.RenderShapeTriangleMesh,
) -> sapien.render.RenderShapeTriangleMesh:
    """A shape that hides what is behind it, in no colour of its own.

    A photograph will cover it, so that only its outline is ever seen.
    """
    vertices, triangles = outline(shape.filename)
    material = sapien.render.RenderMaterial()
    # No scene here has glass, so this number tells the shader not to compute a colour.
    material.transmission = 1
    return sapien.render.RenderShapeTriangleMesh(
        vertices=vertices * shape.scale,
        triangles=triangles,
        normals=np.ones_like(vertices),
        uvs=np.zeros((len(vertices), 2)),
        material=material,
    )


@functools.cache
def outline(file: str) -> tuple[np.ndarray, np.ndarray]:
    """The vertices (V, 3) and triangles (T, 3) of a mesh file, simplified if they are many.

    A scene is built anew for every seeded episode, but the file is simplified once a process.
    """
    parts = sapien.render.RenderShapeTriangleMesh(file).parts
    corners = np.concatenate([part.vertices[part.triangles].reshape(-1, 3) for part in parts])
    # The file holds loose triangles. They can collapse only after their corners are merged.
    vertices, index = np.unique(corners, axis=0, return_inverse=True)
    triangles = index.reshape(-1, 3).astype(np.int32)
    if len(triangles) < FINE:
        return vertices, triangles
    # A collapse may move the outline by very little. It ends with a quarter of the triangles.
    return fast_simplification.simplify(vertices, triangles, target_reduction=1 - KEPT, agg=2)


# ---- scenes ----
def scene_class(
    env_id: str, stock_camera: bool, ood: str, render: bool, image_size: int, light: bool = False
) -> type:
    """ManiSkill's env class with our cameras and, out of distribution, one changed thing.

    stock_camera: keep the env's own camera. image_size: the side of the observation (pixels).
    ood: "none", or a thing that training never varies, drawn from each episode's seed. "position"
    moves the object and what belongs to it OOD_SHIFT away from the middle of the table or grid.
    "camera" moves each camera by OOD_CAMERA in a random direction. "lighting" replaces the lamps.
    light: one env on a CPU, computed and drawn in less time: see `LeanEnv` and `LightScene`.
    Raises UserError on an unknown env id.
    """
    task = get_task(env_id)
    light_bases = (LeanEnv, LightScene) if light else ()

    class Scene(*light_bases, REGISTERED_ENVS[env_id].cls):
        SUPPORTED_OBS_MODES = ("none", "rgb", "rgb+segmentation")
        if not render:
            # SimplerEnv pastes a photograph behind the robot.
            rgb_overlay_mode = "none"

        @property
        def _default_sensor_configs(self):
            if stock_camera or not task.views:
                return super()._default_sensor_configs
            return cameras(self, task, image_size, ood)

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
                # An evaluation names its configuration, and plays that as it is.
                if "episode_id" not in options:
                    self.xyz_configs = draw_beside(grid, len(task.movable(self)))
                # Some objects would settle in the fingers, so the arm waits high above the table.
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


def cameras(env: BaseEnv, task: Task, image_size: int, ood: str) -> list[CameraConfig]:
    """The task's cameras, whose pictures together fill a square of image_size pixels.

    ood: "camera" moves the eyes, see `scene_class`.
    """
    shifts = np.zeros((len(task.views), 3))
    if ood == "camera":
        shifts = draw_camera_shifts(env, len(task.views))
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
        check_renderer(backend)
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
    for file in simplerenv_files(env_id, data):
        # A model's visual mesh has one of several formats.
        if not any(file.parent.glob(file.name)):
            download = "python -m mani_skill.utils.download_asset"
            raise UserError(
                f"{env_id} needs {file}, which is missing: run `{download} bridge_v2_real2sim -y"
                f" && {download} widowx250s -y`, or set MS_ASSET_DIR to the folder whose data/"
                " holds them"
            )


def simplerenv_files(env_id: str, data: Path) -> list[Path]:
    """The meshes that one of SimplerEnv's tasks needs. A name may end with a wildcard.

    data: the folder of all assets.
    """
    env_class = REGISTERED_ENVS[env_id].cls
    scene = data / "tasks/bridge_v2_real2sim_dataset"
    stage = "bridge_table_1_v1.glb"
    photograph = "bridge_real_eval_1.png"
    models = list(env_class.objects_excluded_from_greenscreening)
    if env_class.scene_setting == "sink":
        stage = "bridge_table_1_v2.glb"
        photograph = "bridge_sink.png"
        models += ["sink", "dummy_sink_target_plane"]

    files = [
        scene / "custom/info_bridge_custom_v0.json",
        scene / "stages" / stage,
        scene / "real_inpainting" / photograph,
    ]
    for model in models:
        folder = scene / "custom/models" / model
        files += [folder / "collision.obj", folder / "textured.*"]
    urdf = data / "robots/widowx/wx250s.urdf"
    files.append(urdf)
    if urdf.exists():
        # The robot's description names its meshes.
        meshes = ElementTree.parse(urdf).iter("mesh")
        files += [urdf.parent / mesh.get("filename") for mesh in meshes]
    return files


def choose_renderer(render: str, backend: str = "cpu") -> None:
    """Chooses where pictures are drawn, before any env or env process is made.

    render: "gpu", or "cpu", which is Mesa's software driver. "auto" is the GPU if there is one.
    backend: "cpu" or "cuda", where to simulate.
    Raises UserError if there is no such renderer, or if the backend cannot use it.
    """
    has_gpu = torch.cuda.is_available()
    if render == "gpu" and not has_gpu:
        raise UserError("--render gpu: PyTorch finds no GPU here; use --render cpu")
    if render == "gpu" and not draws_on_gpu():
        raise UserError("--render gpu: VK_ICD_FILENAMES names Mesa's software driver; unset it")
    if render == "cpu" or not has_gpu:
        choose_software(render)
    if backend == "cuda" and not draws_on_gpu():
        raise UserError("--backend cuda draws on the GPU: leave out --render cpu")


def choose_software(render: str) -> None:
    """Lets Mesa's software driver draw. render: see `choose_renderer`."""
    # Several drivers may be installed. This is Mesa's, which renders on the CPU.
    drivers = list(Path("/usr/share/vulkan/icd.d").glob(f"{SOFTWARE_DRIVER}*.json"))
    if render == "cpu" and not drivers:
        raise UserError("--render cpu: Mesa's software driver is not installed; run ./setup.sh")
    if drivers and not (render == "auto" and "VK_ICD_FILENAMES" in os.environ):
        os.environ["VK_ICD_FILENAMES"] = str(drivers[0])
    # The driver draws in the process that asks, because the env processes are parallel already.
    os.environ.setdefault("LP_NUM_THREADS", "0")


def draws_on_gpu() -> bool:
    """Whether a GPU draws the pictures, as `choose_renderer` has chosen."""
    software = SOFTWARE_DRIVER in os.environ.get("VK_ICD_FILENAMES", "")
    return torch.cuda.is_available() and not software


def check_renderer(backend: str) -> None:
    """Raises UserError if SAPIEN cannot render. backend: "cpu" or "cuda", where to simulate."""
    # Without a choice it is the GPU if there is one.
    choose_renderer("auto", backend)
    # SAPIEN would print three lines that say no more than the error below.
    sapien.render.set_log_level("off")
    try:
        sapien.render.RenderSystem("cuda" if draws_on_gpu() else "cpu")
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(
            f"no Vulkan renderer ({reason}): run ./setup.sh, which installs one or says how"
        ) from None
