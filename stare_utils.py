"""The world of STARE-VLA: tasks, stages, stage distances, costs and potentials, vectorised environments, scripted expert.

Scripts import this module; it imports none of them, reads no `args`, and holds no loss, advantage or optimiser step.
Letters: N envs, T steps, K stages, A action dimensions. Units: metres, radians, seconds; world frame. Every stage function reads batched
tensors, so the same code serves ManiSkill's GPU simulation (one batched env) and the CPU (one process per env).
A task is one entry of `TASKS`: to add one, write a function that reads its state and one `Stage` per stage (docs/tasks.md); nothing else changes.
"""
import contextlib
import difflib
import fcntl
import importlib.util
import logging
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import unittest.mock
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Idle OpenMP threads must sleep: spinning ones take the cores from the env processes (a forward is 20x slower). Set before torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import gymnasium as gym
import mani_skill.envs  # registers the env ids
import numpy as np
import sapien
import torch
from mani_skill.agents.robots.panda import Panda, PandaWristCam
from mani_skill.agents.robots.widowx.widowx import WidowX250S
from mani_skill.sensors.camera import CameraConfig
from mani_skill.utils.geometry import rotation_conversions as rotations
from mani_skill.utils.registration import REGISTERED_ENVS, TimeLimitWrapper
from mani_skill.utils.sapien_utils import look_at
from mani_skill.utils.structs.pose import Pose
from safetensors import SafetensorError
from safetensors.torch import save_file

Tensor = torch.Tensor
State = dict[str, Tensor]
Views = tuple[tuple[tuple[float, float, float], tuple[float, float, float], float], ...]

TRAIN_SEEDS = EVAL_SEED = 2**30  # episodes of training draw their seeds below this number, evaluation starts here: the two never meet
CONTROL_STEP = 0.05  # s per env step of the Panda's tasks (20 Hz control)
IMAGE_SIZE = 128  # pixels: side of the observation, unless an env is asked for another
OOD_SHIFT, OOD_CAMERA = 0.05, 0.05  # m: how far `--ood position` and `--ood camera` move things
STOCK_SHADERS = sapien.render.set_camera_shader_dir  # what ManiSkill calls for each camera
TRAIN_JITTER = 0.02  # m: how far from SimplerEnv's grid, which evaluation plays, training puts objects along x and y

class UserError(Exception):
    """A mistake that a user can make. Scripts print its one line and exit with code 2."""

class Stop:
    """SIGINT and SIGTERM. They end a script at once, but during a training loop the update ends first and is saved; a second one does not wait."""
    signals: list[int] = []
    held = leaving = False

    @classmethod
    def catch(cls, number: int, frame) -> None:
        cls.signals.append(number)
        if not cls.held or (len(cls.signals) > 1 and not cls.leaving):  # while it saves nothing stops it
            raise KeyboardInterrupt

    @classmethod
    def hold(cls, more: bool) -> bool:
        """The condition of a training loop: while `more`, signals wait for `asked`. Raises KeyboardInterrupt once that has been true, or one waits in vain."""
        if cls.leaving or (cls.signals and not more):
            raise KeyboardInterrupt
        cls.held = more
        return more

    @classmethod
    def asked(cls) -> bool:
        """Whether a signal has come, to any process of a data-parallel job, all of which must ask: the loop then saves."""
        told = [bool(cls.signals)]
        if torch.distributed.is_initialized():
            torch.distributed.all_gather_object(told := told * torch.distributed.get_world_size(), bool(cls.signals))
        cls.leaving = any(told)
        return cls.leaving

@contextlib.contextmanager
def one_line_errors():
    """Ends a script in one line that says what to do, and exit code 2, where the user or the machine is at fault and not the code; 128 + signal where
    one has stopped it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, Stop.catch)
    try:
        return (yield)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one ends it here
        for process in multiprocessing.active_children():
            process.kill()  # an env process would be asked to end, and waited for
        code = 128 + (Stop.signals or [signal.SIGTERM])[-1]  # another process of the job has had it
        line = "stopped; " + "the last update is saved, " * Stop.leaving + "a training run goes on with --resume and its --output-dir"
    except (UserError, OSError, RuntimeError, MemoryError, SafetensorError) as error:
        code, line = 2, next(iter(str(error).splitlines()), "")
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in line or "out of memory" in line:
            line = "out of memory: lower --num-envs; where it trains --chunk-size too, or add --gradient-checkpointing or --lora-rank 32"
        elif "invalid device ordinal" in line:
            line = f"more processes than GPUs on this node: give torchrun --nproc-per-node {torch.cuda.device_count()}"
        elif torch.distributed.is_initialized() and ("gloo" in line or isinstance(error, torch.distributed.DistError)):
            line = "another process of this job died, its own lines say why: give the command again, with --resume and the job's --output-dir"
        elif isinstance(error, (SafetensorError, shutil.Error)):  # of writing: who reads catches it
            line = f"cannot use the disk: {line}"
        elif isinstance(error, OSError) and (error.filename or error.errno in (24, 28, 122)):  # files open, full, quota
            line = f"cannot use {error.filename or 'the disk'}: {next(iter(error.strerror.splitlines()))}" + ", lower --num-envs" * (error.errno == 24)
        elif not isinstance(error, UserError):
            raise
    print(f"error: {line}" if code == 2 else line, file=sys.stderr)
    sys.exit(code)

def check_args(given: dict, least: dict[str, float]) -> None:
    """Raises UserError where a number of the command line is not finite, below its least (by its argument's name, else 0) or too large a seed, and
    where --track or --backend ask for what is not here."""
    for name, value in given.items():
        if isinstance(value, (int, float)) and not (math.isfinite(value) and value >= least.get(name, 0)):
            raise UserError(f"--{name.replace('_', '-')} must be a finite number, at least {least.get(name, 0)}, not {value}")
    if given["seed"] >= 2**32:  # random generators take no larger ones
        raise UserError(f"--seed must be below {2**32}, not {given['seed']}")
    if given.get("track") and not importlib.util.find_spec("wandb"):
        raise UserError("--track needs wandb: `pip install wandb`, or leave it out")
    if given.get("backend") == "cuda" and not torch.cuda.is_available():
        raise UserError("--backend cuda needs an NVIDIA GPU: leave it out")

def lock_run(folder: Path, held: dict[Path, int] = {}) -> None:  # noqa: B006  one for all calls: the locks that this process holds until it ends
    """Keeps other processes out of a run's folder. Raises UserError when one is in it."""
    if folder.resolve() not in held:
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is at work in {folder}: wait for it, stop it, or choose another --output-dir") from None
        held[folder.resolve()] = handle

def refuse_nan(losses: dict[str, float], output: Path, batch: dict[str, Tensor]) -> None:
    """Raises UserError when a loss or gradient is no number: the weights are lost, the last checkpoint is whole. The batch is kept to look at."""
    if bad := [name for name, value in losses.items() if not math.isfinite(value)]:
        file = output / f"nan_batch{os.environ.get('RANK', '')}.safetensors"
        save_file({name: x.detach().contiguous() for name, x in batch.items()}, file.with_suffix(".tmp"))
        file.with_suffix(".tmp").rename(file)
        raise UserError(f"not finite: {', '.join(bad)}. The batch is in {file}. Go on from the last checkpoint with --resume and a lower --learning-rate")

# ------------------------------------------------------------ Tasks ------------------------------------------------------------
@dataclass(frozen=True)
class Arm:
    tool: str  # link between the fingertips, which open along its y axis
    control_mode: str
    unit: tuple[float, ...]  # (6,) how far, in world axes, an action of 1 moves (m) and turns (rad) the tool
    limit: tuple[float, ...]  # (A,) the largest action that the expert takes: what tokens and demonstrations span

# ManiSkill scales the Panda's rotations by their lower bound, -0.1 rad. The WidowX is driven in its base's frame, turned by 180 degrees
PANDA = Arm("panda_hand_tcp", "pd_ee_delta_pose", (0.1, 0.1, 0.1, -0.1, -0.1, -0.1), (1.0,) * 7)
WIDOWX = Arm("ee_gripper_link", "arm_pd_ee_target_delta_pose_align2_gripper_pd_joint_pos", (-1, -1, 1, -1, -1, 1), (0.05,) * 3 + (0.3,) * 3 + (1.0,))

@dataclass(frozen=True)
class Stage:
    name: str
    entry: Callable[[State], Tensor] | None  # (N,) bool: this stage has begun: the end condition of the stage before (None for stage 0)
    distance: Callable[[State], Tensor]  # (N,) m (rad for orientation) >= 0: what is left to do in this stage
    length: float  # L_k: median of `distance` at entry on expert episodes (benchmark/expert.py measures it)
    target: Callable[[State], Tensor]  # (N, 3): where the expert drives the tool during this stage
    gripper: Callable[[State], Tensor]  # (N,): what the expert commands the gripper, 1 opens, -1 closes
    turn: Callable[[State], Tensor] = lambda s: torch.zeros_like(s["tool"])  # (N, 3) rotation vector by which the expert turns the tool

@dataclass(frozen=True)
class Task:
    instruction: str
    paraphrases: tuple[str, ...]  # the same in words that are never trained on: `eval.py --instruction-set paraphrase`
    stage_table: tuple[Stage, ...]
    observe: Callable[[gym.Env], State]  # reads the simulator: what observe_arm returns, and whatever else the task's stages read
    max_episode_steps: int
    # eye, look-at point, vertical field of view of each camera; (): the env's own. Two at a right angle: what the hand hides in one is seen in the other
    views: Views = ()
    wide: bool = False  # two pictures of 128 x 64 pixels, one above the other, instead of 64 x 128 side by side
    arm: Arm = PANDA
    movable: Callable[[gym.Env], list] = lambda env: [env.obj]  # actors that `--ood position` moves together, the object first
    grid: int = 0  # SimplerEnv: how many initial configurations, each played once in an evaluation; 0: episodes are drawn at random
    report: tuple[str, ...] = ()  # entries of the state that evaluation reports beside success

    @property
    def stages(self) -> tuple[str, ...]:
        return tuple(stage.name for stage in self.stage_table)

def norm(x: Tensor) -> Tensor:
    """Euclidean length of the last axis, (N, 3) -> (N,)."""
    return torch.linalg.vector_norm(x, dim=-1)

def up(height: Tensor) -> Tensor:
    """(N,) heights -> (N, 3) vertical offsets; as a rotation vector: a turn about the vertical."""
    return torch.stack([torch.zeros_like(height), torch.zeros_like(height), height], -1)

def flat(x: Tensor) -> Tensor:
    """The horizontal part of (N, 3)."""
    return x * torch.tensor([1.0, 1.0, 0.0], device=x.device)

def axis(q: Tensor, i: int) -> Tensor:
    """Where a body's own x (i = 0) or y (1) axis points, (N, 4) quaternions (w, x, y, z) -> (N, 3)."""
    w, x, y, z = q.unbind(-1)
    ways = (1 - 2 * (y * y + z * z), 2 * (x * y + w * z), 2 * (x * z - w * y)), (2 * (x * y - w * z), 1 - 2 * (x * x + z * z), 2 * (y * z + w * x))
    return torch.stack(ways[i], -1)

def heading(x: Tensor) -> Tensor:
    """Direction of (N, 3) on the table, (N,) radians."""
    return torch.atan2(x[:, 1], x[:, 0])

def wrap(angle: Tensor, period: float) -> Tensor:
    """The equal turn that is nearest to zero."""
    return torch.remainder(angle + period / 2, period) - period / 2

def observe_arm(env, arm: Arm, pose, goal: Tensor, grasped: Tensor, width: float | Tensor, period: float = torch.pi, grip: Tensor | None = None) -> State:
    """What every task reads. pose: the object's, its long axis first; goal (N, 3); grasped (N,) bool; width: finger opening at which it is held;
    period: it looks alike after this turn; grip (N, 3): where the tool takes hold of it, its centre by default."""
    tool, controller = env.agent.robot.links_map[arm.tool], env.agent.controller.controllers["arm"]
    # a controller with a target moves that, and the tool follows late
    command = env.agent.robot.pose * controller._target_pose if controller.config.use_target else tool.pose
    grip, offset, opening = pose.p if grip is None else grip, pose.p - goal, env.agent.robot.qpos[:, -2:].sum(-1)
    return {
        "tool": tool.pose.p, "quaternion": tool.pose.q, "command": command.p, "speed": norm(tool.linear_velocity), "opening": opening,
        "object": pose.p, "goal": goal, "grip": grip, "grasped": grasped, "width": 0 * opening + width, "wait": 0 * opening,
        "to_grip": norm(tool.pose.p - grip), "to_goal": norm(offset), "beside_goal": norm(flat(offset)), "above_goal": offset[:, 2],
        "yaw_error": wrap(heading(axis(pose.q, 0)) + torch.pi / 2 - heading(axis(command.q, 1)), period)}  # fmt: skip

def geometry(s: State) -> Tensor:
    """(N, 8): tool to object, tool to goal (m); cosine and sine, x 0.1, of twice the turn that the tool lacks. For sft.py's auxiliary loss alone."""
    return torch.cat([s["object"] - s["tool"], s["goal"] - s["tool"], 0.1 * (turn := 2 * s["yaw_error"][:, None]).cos(), 0.1 * turn.sin()], -1)

HOVER = 0.08  # m: how far above the object the expert comes in
CENTRED = 0.01  # m: this near to the grip the fingers close; from further off they may hold a corner, which slips out
LIFT = 0.03  # m: lifted or carried this far, a grasped object is being transported

def gripper(command: float) -> Callable[[State], Tensor]:
    return lambda s: torch.full_like(s["opening"], command)

def moved(s: State) -> Tensor:
    """(N,) metres: how far the object is from where the episode began."""
    return norm(s["object"] - s["object_start"])

def lifted(s: State) -> Tensor:
    return s["grasped"] & (moved(s) > LIFT)

def hover(s: State) -> Tensor:
    """(N, 3) above the grip: a funnel. It waits for the yaw only where a task says so (`wait`): where the expert stands still, an argmax policy
    stands still for ever, and the fingers open wider than most objects' diagonal."""
    return s["grip"] + up((4 * (norm(flat(s["grip"] - s["tool"])) - 0.01)).clamp(0, HOVER).maximum(s["wait"]))

def straight(s: State) -> Tensor:
    return s["tool"] + s["goal"] - s["object"]

def carry(s: State, clearance: float) -> Tensor:
    """Where the tool should be, (N, 3), to bring the object over the goal: up first, across `clearance` above it, then down."""
    climb = (4 * (s["beside_goal"] - 0.01)).clamp(0, clearance) - s["above_goal"]
    return s["tool"] + flat(s["goal"] - s["object"]) * (climb < 0.02)[:, None] + up(climb)

def release(s: State) -> Tensor:
    """Opens the fingers where the object lies at the goal, and where they have begun to."""
    return torch.where((s["beside_goal"] < 0.012) & (s["above_goal"].abs() < 0.005) | ~s["grasped"], 1.0, -1.0)

def pick(reach_length: float, grasp_length: float, lift: float = 0.06) -> tuple[Stage, ...]:
    """An object is reached from above and grasped. The tool rises, `lift` above the grip, while the fingers close: it never stands still."""
    return (
        Stage("reach", None, lambda s: s["to_grip"], reach_length, hover, gripper(1.0), lambda s: up(s["yaw_error"])),
        Stage("grasp", lambda s: s["grasped"] | (s["to_grip"] < CENTRED),
              lambda s: s["to_grip"] + (~s["grasped"]) * (s["opening"] - s["width"]).clamp(min=0) + (LIFT - moved(s)).clamp(min=0),
              grasp_length, lambda s: s["grip"] + up(lift * (s["opening"] < s["width"] + 0.008)), gripper(-1.0)),
    )  # fmt: skip

def place_on(transport_length: float, place_length: float, clearance: float, near: float) -> tuple[Stage, ...]:
    """A grasped object is carried over its goal, put down and let go."""
    return (
        Stage("transport", lifted, lambda s: s["to_goal"], transport_length, lambda s: carry(s, clearance), gripper(-1.0)),
        Stage("place", lambda s: (s["beside_goal"] < near) & (s["above_goal"].abs() < near),
              lambda s: s["to_goal"] + (s["width"] + 0.01 - s["opening"]).clamp(min=0), place_length,
              lambda s: torch.where(s["grasped"][:, None], carry(s, clearance), s["tool"]), release),
    )  # fmt: skip

def observe_stack_cube(env) -> State:
    goal = env.cubeB.pose.p + torch.tensor([0, 0, 0.04], device=env.device)
    s = observe_arm(env, PANDA, env.cubeA.pose, goal, env.agent.is_grasping(env.cubeA), 0.04, torch.pi / 2)
    # Where the other cube is near, the fingers must not close from its side: the tool turns to the cube's other two sides before it goes down
    crowded, other = s["beside_goal"] < 0.08, s["yaw_error"] - torch.pi / 2 * torch.where(s["yaw_error"] > 0, 1.0, -1.0)
    side = wrap(heading(goal - s["object"]) - heading(axis(s["quaternion"], 1)) - s["yaw_error"], torch.pi)
    s["yaw_error"] = torch.where(crowded & (side.abs() < torch.pi / 4), other, s["yaw_error"])
    return {**s, "wait": 0.05 * (crowded & (s["yaw_error"].abs() > 0.35))}

def observe_push(env) -> State:
    """The tool first goes, fingers closed, to where it is behind the cube, on the side away from the goal."""
    cube, goal = env.obj.pose, env.goal_region.pose.p
    way = torch.nn.functional.normalize(flat(goal - cube.p), dim=-1)
    s = observe_arm(env, PANDA, cube, goal, torch.zeros(len(goal), dtype=torch.bool, device=goal.device), 0.0, grip=cube.p - 0.045 * way)
    back = s["object"] - s["tool"]
    along = (back * way).sum(-1)
    s["behind"] = (along > 0.01) & (along < 0.08) & (norm(flat(back) - along[:, None] * way) < 0.03) & (back[:, 2].abs() < 0.02)
    return {**s, "way": way, "left": (s["beside_goal"] - env.goal_radius).clamp(min=0)}

def push(name: str) -> tuple[Stage, ...]:
    return (
        Stage("reach", None, lambda s: s["to_grip"], 0.17, hover, gripper(-1.0)),
        Stage(name, lambda s: s["behind"], lambda s: s["left"], 0.1, lambda s: s["object"] + (s["left"] + 0.02)[:, None] * s["way"], gripper(-1.0)),
    )

def observe_place_sphere(env) -> State:
    goal = env.bin.pose.p + torch.tensor([0, 0, env.radius + env.block_half_size[0]], device=env.device)
    s = observe_arm(env, PANDA, env.obj.pose, goal, env.agent.is_grasping(env.obj), 0.04)
    return {**s, "yaw_error": 0 * s["yaw_error"]}  # a ball has none

def observe_lift_peg(env) -> State:
    """The peg is gripped 3 cm from one end; its other end, the foot, stays on the table and the peg is raised like a lever, a little ahead."""
    half, long, centre = env.peg_half_length, axis(env.peg.pose.q, 0), env.peg.pose.p
    foot, grip = centre - half * long, centre + (half - 0.03) * long
    across, tilt = torch.nn.functional.normalize(flat(long), dim=-1), torch.acos(long[:, 2].abs().clamp(max=1.0))
    goal = flat(foot) + torch.tensor([0, 0, half], device=env.device)
    s = observe_arm(env, PANDA, env.peg.pose, goal, env.agent.is_grasping(env.peg), 2 * env.peg_half_width, grip=grip)
    ahead = (torch.asin(long[:, 2].clamp(-1, 1)) + 0.35).clamp(max=torch.pi / 2)
    return {**s, "tilt": tilt, "rise": flat(foot) + norm(grip - foot)[:, None] * (across * torch.cos(ahead)[:, None] + up(torch.sin(ahead)))}

def observe_peg_insertion(env) -> State:
    peg, hole, half = env.peg.pose, env.goal_pose, env.peg_half_sizes
    grip = peg.p - (half[:, :1] / 2 + 0.01).clamp(min=0.05) * axis(peg.q, 0)
    s = observe_arm(env, PANDA, peg, hole.p, env.agent.is_grasping(env.peg), 2 * half[:, 2], grip=grip)
    turn = rotations.standardize_quaternion(rotations.quaternion_multiply(hole.q, rotations.quaternion_invert(peg.q)))
    head, middle, into = (env.box_hole_pose.inv() * env.peg_head_pose).p, (hole.inv() * peg).p, axis(hole.q, 0)
    aside, left = torch.maximum(norm(head[:, 1:]), norm(middle[:, 1:])), ((hole.p - peg.p) * into).sum(-1, keepdim=True)  # from the axis, along it
    # twice the sideways error: the arm goes less than half of the way that it is told, and sags by some millimetres
    onward = 2 * (hole.p - peg.p - left * into) + left.clamp(max=0.04) * (1 - aside / 0.005).clamp(min=0)[:, None] * into
    return {**s, "wait": 0.06 * (s["yaw_error"].abs() > 0.1), "depth": (-head[:, 0]).clamp(min=0), "aside": aside, "onward": onward,
            "outside": hole.p - (half[:, :1] + 0.02) * into, "peg_turn": rotations.quaternion_to_axis_angle(turn)}  # fmt: skip

def observe_bridge(env) -> State:
    """SimplerEnv's scenes: the source object is at its goal when its lower side is on the target's upper side."""
    source, target = (env.objs[name] for name in (env.source_obj_name, env.target_obj_name))
    size, under = (env.episode_model_bbox_sizes[name].float() for name in (env.source_obj_name, env.target_obj_name))
    goal = target.pose.p + up(((size + under)[2] / 2).expand(len(target.pose.p)))
    period = torch.pi / 2 if size[0] == size[1] else torch.pi
    return observe_arm(env, WIDOWX, source.pose, goal, env.agent.is_grasping(source), size[1] + 0.021, period)  # each finger is 1 cm thick

def around(x: float, z: float, fov: float, side: int = 1) -> Views:
    """Two wide views of the table around (x, 0, z), from one side and from the front."""
    return ((x, 1.25 * side, 0.6), (x, 0.0, z), fov), ((x + 1.1, 0.0, 0.55), (x, 0.0, z), 1.2 * fov)

def bridge(instruction: str, paraphrases: tuple[str, ...], clearance: float, near: float, place_length: float, steps: int = 60, grid: int = 24) -> Task:
    return Task(instruction, paraphrases, (*pick(0.165, 0.055, 0.03), *place_on(0.155, place_length, clearance, near)), observe_bridge, steps,
                arm=WIDOWX, grid=grid, movable=lambda env: list(env.objs.values())[: 1 if env.scene_setting == "sink" else 2])  # the basket stays  # fmt: skip

NEAR_VIEWS = ((0.0, 0.62, 0.32), (0.0, 0.0, 0.165), 0.82), ((0.62, 0.0, 0.32), (0.0, 0.0, 0.165), 0.82)  # the object spans at least 8 pixels
TASKS: dict[str, Task] = {
    "PickCube-v1": Task(
        "pick up the red cube and move it to the green ball",
        ("move the red cube to the green ball", "grab the red block and bring it to the green sphere", "take the cube to the ball"),
        (
            *pick(0.17, 0.08),
            Stage("transport", lifted, lambda s: s["to_goal"], 0.17, straight, gripper(-1.0)),
            Stage("place", lambda s: s["grasped"] & (s["to_goal"] < 0.04), lambda s: s["to_goal"] + CONTROL_STEP * s["speed"], 0.05, straight, gripper(-1.0)),
        ), lambda env: observe_arm(env, PANDA, env.cube.pose, env.goal_site.pose.p, env.agent.is_grasping(env.cube), 0.04, torch.pi / 2), 50, NEAR_VIEWS,
        movable=lambda env: [env.cube, env.goal_site]),
    "StackCube-v1": Task(
        "stack the red cube on the green cube", ("put the red block on top of the green block", "place the red cube onto the green one", "pile red on green"),
        (*pick(0.2, 0.08), *place_on(0.17, 0.04, 0.03, 0.03)),
        observe_stack_cube, 50, around(0.0, 0.06, 0.23), True, movable=lambda env: [env.cubeA, env.cubeB]),
    "PushCube-v1": Task(
        "push the blue cube to the target",
        ("shove the blue block onto the target", "move the blue cube forward to the red circle", "push the cube to the goal"),
        push("push"), observe_push, 50, around(0.13, 0.04, 0.22), True, movable=lambda env: [env.obj, env.goal_region]),
    "PullCube-v1": Task(
        "pull the blue cube to the target", ("drag the blue block onto the target", "draw the blue cube back to the red circle", "pull the cube to the goal"),
        push("pull"), observe_push, 50, around(-0.13, 0.04, 0.22), True, movable=lambda env: [env.obj, env.goal_region]),
    "LiftPegUpright-v1": Task(
        "lift the peg and stand it upright on the table", ("put the peg upright", "stand the peg up on its end", "raise the stick until it stands"),
        (   # a loose grip lets the peg turn between the fingers: turning the hand itself takes too long (0.04 rad a step)
            *pick(0.19, 0.07),
            Stage("upright", lifted, lambda s: s["tilt"], 1.4, lambda s: s["rise"] + up(0 * s["tilt"] + 0.005), gripper(0.2)),
            Stage("place", lambda s: s["tilt"] < 0.2, lambda s: s["to_goal"], 0.02, lambda s: s["rise"], gripper(0.2)),
        ), observe_lift_peg, 50, around(0.0, 0.13, 0.32), True, movable=lambda env: [env.peg], report=("tilt",)),
    "PlaceSphere-v1": Task(
        "put the blue ball into the bin", ("place the blue sphere in the bin", "drop the ball into the box", "move the blue ball to the bin"),
        (*pick(0.17, 0.08), *place_on(0.15, 0.03, 0.03, 0.02)),
        observe_place_sphere, 50, NEAR_VIEWS, movable=lambda env: [env.obj, env.bin]),
    "PegInsertionSide-v1": Task(
        "insert the peg into the hole of the box", ("put the peg in the hole", "push the orange end of the stick into the box", "plug the peg into the box"),
        (
            *pick(0.25, 0.08),
            Stage("align", lifted, lambda s: s["aside"], 0.13, lambda s: s["tool"] + 1.5 * (s["outside"] - s["object"]), gripper(-1.0),
                  lambda s: 2 * s["peg_turn"]),
            Stage("insert", lambda s: s["grasped"] & (s["aside"] < 0.01) & (norm(s["peg_turn"]) < 0.15), lambda s: s["depth"] + s["aside"], 0.14,
                  lambda s: s["tool"] + s["onward"], gripper(-1.0), lambda s: 2 * s["peg_turn"]),
        ), observe_peg_insertion, 100, around(0.0, 0.08, 0.36, -1), True, movable=lambda env: [env.peg, env.box]),
    "PutCarrotOnPlateInScene-v1": bridge(
        "put carrot on plate", ("place the carrot on the plate", "move the carrot onto the dish", "carrot to plate"), 0.05, 0.085, 0.094),
    "PutSpoonOnTableClothInScene-v1": bridge(
        "put the spoon on the towel", ("place the spoon onto the cloth", "lay the spoon on the blue towel", "spoon to towel"), 0.05, 0.08, 0.09),
    "StackGreenCubeOnYellowCubeBakedTexInScene-v1": bridge(
        "stack the green block on the yellow block",
        ("put the green cube on top of the yellow cube", "place the green block onto the yellow one", "pile up the blocks"), 0.05, 0.03, 0.028),
    "PutEggplantInBasketScene-v1": bridge(
        "put eggplant into yellow basket",
        ("place the eggplant in the basket", "move the aubergine to the yellow basket", "eggplant to basket"), 0.1, 0.1, 0.13, 120, 64),
}  # fmt: skip
ALIASES = {  # SimplerEnv's own names
    "widowx_carrot_on_plate": "PutCarrotOnPlateInScene-v1", "widowx_spoon_on_towel": "PutSpoonOnTableClothInScene-v1",
    "widowx_stack_cube": "StackGreenCubeOnYellowCubeBakedTexInScene-v1", "widowx_put_eggplant_in_basket": "PutEggplantInBasketScene-v1"}  # fmt: skip

def env_ids(text: str) -> list[str]:
    """The env ids in a comma-separated list, SimplerEnv's names as ManiSkill's. Raises UserError on one without an entry, with the nearest names."""
    ids = [ALIASES.get(name.strip(), name.strip()) for name in text.split(",")]
    for name in ids:
        if name not in TASKS:
            near = ", ".join(difflib.get_close_matches(name, [*TASKS, *ALIASES], n=3, cutoff=0.3) or TASKS)
            what = "ManiSkill knows it, TASKS in stare_utils.py does not yet" if name in REGISTERED_ENVS else f"the nearest known: {near}"
            raise UserError(f"no task for --env-id {name!r}: {what}. docs/tasks.md adds one in 25 lines")
    return ids

def get_task(env_id: str) -> Task:
    """The entry of one env id or SimplerEnv name; UserError: see env_ids."""
    return TASKS[env_ids(env_id)[0]]

# ------------------------------------------------- Stages: separator and calculator -------------------------------------------------
def stage_potential(distance: Tensor, length: Tensor, form: str = "sigmoid") -> Tensor:
    """phi_k in [0, 1], 1 where nothing is left to do. distance, length: metres, any shape; form: "sigmoid" is the paper's
    sigmoid(1 - d / L_k), here divided by sigmoid(1) so that d = 0 gives 1; "linear" is max(0, 1 - d / L_k)."""
    if form == "linear":
        return (1 - distance / length).clamp(min=0)
    return torch.sigmoid(1 - distance / length) / torch.sigmoid(torch.tensor(1.0))

def stage_signals(task: Task, state: State, success: Tensor, potential: str, across: str) -> dict[str, Tensor]:
    """What the state says about the stages: `stage` (N,) long in 0..K, `stage_distance` (N,) metres (0 at success), `distances` (N, K) of every stage,
    `potential` (N,) = Phi(s). `stage` is the largest k whose entry condition holds; lower ones need not.
    across="offset": Phi = k + phi_k, K at success, so that Phi never falls at a stage switch. across="bare": the paper's phi_k alone."""
    K = len(task.stage_table)
    entered = [torch.ones_like(success), *(stage.entry(state) for stage in task.stage_table[1:])]
    stage = (torch.stack(entered, -1) * torch.arange(K, device=success.device)).amax(-1)  # (N,)
    distances = torch.stack([stage.distance(state) for stage in task.stage_table], -1)  # (N, K)
    distance = distances.gather(-1, stage[:, None])[:, 0]  # (N,)
    length = torch.tensor([stage.length for stage in task.stage_table], device=distance.device)[stage]
    phi = stage_potential(distance, length, potential)
    assert stage.shape == distance.shape == phi.shape == success.shape, "one number per env: anything else would broadcast"
    stage, distance = torch.where(success, K, stage), torch.where(success, 0.0, distance)
    phi = torch.where(success, 0.0 if across == "offset" else 1.0, phi)
    return {"stage": stage, "stage_distance": distance, "distances": distances, "potential": stage + phi if across == "offset" else phi}

def segment_stages(stage: Tensor, num_stages: int) -> Tensor:
    """Cuts trajectories by the first entry into each stage: the running maximum of the labels, clipped to K - 1.
    stage: (T,) or (T, N) integers in 0..K, time first. Returns the same shape: the segment of each step, monotone in time."""
    return torch.cummax(torch.as_tensor(stage), 0).values.clamp(max=num_stages - 1)

def decode_stages(logprobs: Tensor) -> Tensor:
    """The most likely segments: of all (T,) labels that never fall those of the largest sum of logprobs (T, K), a learned separator's (Viterbi 1967)."""
    score, before = logprobs[0], []
    for row in logprobs[1:]:
        best, came_from = torch.cummax(score, 0)  # over the stages up to this one
        score, before = best + row, [*before, came_from]
    path = [score.argmax()]
    for came_from in reversed(before):
        path.append(came_from[path[-1]])
    return torch.stack(path[::-1])

def stage_costs(distance: Tensor, segment: Tensor, num_stages: int) -> Tensor:
    """l_k: mean distance over the steps of segment k. distance, segment: (T,). Returns (K,) float, NaN for stages never entered."""
    member = torch.nn.functional.one_hot(torch.as_tensor(segment).long(), num_stages).to(torch.as_tensor(distance).dtype)  # (T, K)
    return torch.as_tensor(distance) @ member / member.sum(0)

def shape_rewards(rewards: Tensor, potentials: Tensor, next_potentials: Tensor, terminated: Tensor, gamma: float, weight: float) -> Tensor:
    """Potential-based shaping (Ng, Harada, Russell 1999; the paper's r'): r'_t = r_t + w * (gamma * Phi(s_{t+1}) - Phi(s_t)).
    All of one shape, (T, N) or (N,). `next_potentials[t]` is Phi of the true next state (of the final observation at an episode's end). It counts as 0
    where `terminated`, else the optimal policy would change; a truncated episode goes on, so there it stays."""
    assert rewards.shape == potentials.shape == next_potentials.shape == terminated.shape, "shapes differ: this would broadcast"
    return rewards + weight * (gamma * torch.where(terminated, 0.0, next_potentials) - potentials)

# ------------------------------------------------------------ Environments ------------------------------------------------------------
def light_assets() -> Path:
    """Folder, made once in the user's cache, that spares a software renderer what nobody sees. Panda URDFs whose visual meshes have 5 % of the triangles
    (134,924 -> 6,725): three quarters of a frame; the physics is the same, collision meshes are untouched. shaders/: SAPIEN's, without the table for
    reflections of an environment map, which no scene here has and every process would compute for some ten seconds; the pixels are the same."""
    import trimesh

    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "stare-vla" / f"light-{mani_skill.__version__}-{sapien.__version__}"
    if cache.exists():
        return cache
    cache.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache.parent) as new:
        folder = Path(new) / "panda"
        shutil.copytree(Path(mani_skill.PACKAGE_ASSET_DIR) / "robots/panda", folder)
        for file in (folder / "franka_description/meshes/visual").glob("*.glb"):
            scene = trimesh.load_scene(file, process=False)
            for name, mesh in scene.geometry.items():
                merged = mesh.copy()
                merged.merge_vertices(merge_tex=True, merge_norm=True)  # the files hold loose triangles, which cannot collapse
                scene.geometry[name] = merged.simplify_quadric_decimation(percent=0.95)  # by fast_simplification
                scene.geometry[name].visual = trimesh.visual.TextureVisuals(material=mesh.visual.material)
            scene.export(file)
        wrist = folder / "panda_v3.urdf"  # the camera on its wrist has more triangles than all the rest
        wrist.write_text(re.sub(r"<visual>(?:(?!</visual>).)*realsense2.*?</visual>", "", wrist.read_text(), flags=re.S))
        shutil.copytree(Path(sapien.__file__).parent / "vulkan_shader", folder / "shaders")
        for shader in (folder / "shaders/minimal").glob("*.frag"):
            shader.write_text(re.sub(r"texture\(samplerBRDFLUT.*\.xy", "vec2(0)", re.sub(r"layout.*samplerBRDFLUT;\n", "", shader.read_text())))
        with contextlib.suppress(OSError):  # another process was faster
            folder.rename(cache)
    return cache

def scene_class(env_id: str, stock_camera: bool, ood: str, render: bool, image_size: int) -> type:
    """ManiSkill's env class with our cameras (stock_camera: its own) and, out of distribution, one thing that training never varies, drawn from
    each episode's seed. ood: "position" moves the object and what belongs to it OOD_SHIFT away from the middle of the table or grid, "camera" moves
    each camera by OOD_CAMERA in a random direction, "lighting" replaces the lamps."""
    task, stock = TASKS[env_id], REGISTERED_ENVS[env_id].cls

    def draw(env, *size):
        return np.random.default_rng(int(env._episode_seed[0])).standard_normal(size)

    def cameras(env):
        away, size = draw(env, len(task.views), 3), (image_size, image_size // 2) if task.wide else (image_size // 2, image_size)
        away *= OOD_CAMERA * (ood == "camera") / np.linalg.norm(away, axis=1, keepdims=True)
        return [CameraConfig(f"view_{i}", look_at(eye + away[i], at), *size, fov, 0.01, 100) for i, (eye, at, fov) in enumerate(task.views)]

    def initialize(env, env_idx, options):
        middle = torch.zeros(3, device=env.device)
        if task.grid:  # training begins beside SimplerEnv's configurations, which evaluation plays
            grid, middle = env.xyz_configs, env.xyz_configs[:, 0].mean(0)
            env.xyz_configs = grid.clone()
            moving = len(task.movable(env)) if "episode_id" not in options else 0
            env.xyz_configs[:, :moving] += TRAIN_JITTER * flat(2 * torch.rand_like(grid[:, :moving]) - 1)
            env.agent.robot.set_pose(sapien.Pose([0, 0, 5]))  # stock moves the arm back only when the objects have settled, some in its fingers
        stock._initialize_episode(env, env_idx, options)
        if task.grid:
            env.xyz_configs = grid
        if ood == "position":
            actors = task.movable(env)
            away = OOD_SHIFT * torch.nn.functional.normalize(flat(actors[0].pose.p[env_idx] - middle), dim=-1)
            for actor in actors:
                actor.set_pose(Pose.create_from_pq(actor.pose.p[env_idx] + away, actor.pose.q[env_idx]))

    def lamps(env, options):
        random = draw(env, 9)
        env.scene.set_ambient_light(np.abs(0.3 + 0.15 * random[:3]))
        env.scene.add_directional_light([*random[3:5], -1], np.abs(1 + 0.7 * random[5:8]), shadow=False)

    ours = {"_initialize_episode": initialize, "SUPPORTED_OBS_MODES": ("none", "rgb", "rgb+segmentation")}
    if task.views and not stock_camera:
        ours["_default_sensor_configs"] = property(cameras)
    if ood == "lighting":
        ours["_load_lighting"] = lamps
    if not render:
        ours["rgb_overlay_mode"] = "none"  # SimplerEnv pastes a photograph behind the robot
    return type(env_id, (stock,), ours)

class StageEnv:
    """A ManiSkill env with stage signals. Batched tensors in and out, same-step auto-reset: at an episode's end the observation and infos are the
    new episode's, and `final_obs`, `final_info` hold the ended one's, valid where `_final_info` (N,) is true.

    `reset(seed=s)` gives env i the seed s + i, a list is taken as it is; each later episode of an env has a seed of its own below TRAIN_SEEDS,
    derived from the one before (but ManiSkill's GPU simulation draws it from its own stream). Observations: `rgb` (N, H, W, 3) uint8, `proprio`
    (N, 8) float: tool position, tool quaternion (w, x, y, z), gripper opening. Infos: `stage`, `furthest_stage`, `potential`, `stage_distance`,
    `success`, `seed`, `elapsed_steps` (N,), `distances` (N, K), `geometry` (N, 8) and what the task reports.
    """

    def __init__(
        self, env_id: str, num_envs: int, backend: str, seed: int, terminate_on_success: bool = True, full_meshes: bool = False,
        max_episode_steps: int | None = None, reward: str = "sparse", potential: str = "sigmoid", potential_across_stages: str = "offset",
        stock_camera: bool = False, ood: str = "none", render: bool = True, control_mode: str = "", image_size: int = IMAGE_SIZE,
    ):  # fmt: skip
        """reward: "sparse" is 1 on a success step and else 0; "dense" is ManiSkill's normalized_dense. potential, potential_across_stages: see
        stage_potential and stage_signals. max_episode_steps: None is the task's horizon. stock_camera, ood: see scene_class. render=False: no
        `rgb`, and no renderer is needed. control_mode: "" is the arm's. image_size: of `rgb`, square. full_meshes: draw what nobody sees, too."""
        (env_id,) = env_ids(env_id)
        self.task, self.num_envs, self.backend, self.dense, self.render = TASKS[env_id], num_envs, backend, reward == "dense", render
        self.potential, self.across, self.image_size, self.terminate_on_success = potential, potential_across_stages, image_size, terminate_on_success
        mani_skill.logger.setLevel(logging.ERROR)  # it warns of ManiSkill's own assets
        light = light_assets() if backend == "cpu" and not full_meshes else None
        folder = light or Path(mani_skill.PACKAGE_ASSET_DIR) / "robots/panda"
        Panda.urdf_path, PandaWristCam.urdf_path = (str(folder / name) for name in ("panda_v2.urdf", "panda_v3.urdf"))
        sapien.render.set_camera_shader_dir = lambda name: STOCK_SHADERS(str(light / "shaders" / name) if light else name)
        half = {"width": 320, "height": 240, "intrinsic": np.array([[311.794, 0, 159.75], [0, 311.794, 119.77], [0, 0, 1]])}  # of 640 x 480 pixels
        small = self.task.grid and backend == "cpu" and not full_meshes and image_size <= IMAGE_SIZE
        PandaWristCam._sensor_configs = []  # no policy here sees through it
        WidowX250S.disable_self_collisions = True  # ManiSkill's asset has an .srdf for that; in SimplerEnv's own the fingers jam
        local = f":{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else ""  # a process of a torchrun job has a GPU of its own
        env = scene_class(env_id, stock_camera, ood, render, image_size)(
            num_envs=num_envs, sensor_configs=half if small else {}, obs_mode="none" if not render else "rgb+segmentation" if self.task.grid else "rgb",
            control_mode=control_mode or self.task.arm.control_mode, reward_mode="normalized_dense" if self.dense else "none",
            sim_backend=f"physx_{backend}{local * (backend == 'cuda')}",
            # "cuda", but without ManiSkill's way over CUDA, which would cost each env process a context on the GPU, and so time and memory
            render_backend="none" if not render else f"cuda_{backend}{local}" if torch.cuda.is_available() else "cpu",
        )  # fmt: skip
        self.env = TimeLimitWrapper(env, max_episode_steps or self.task.max_episode_steps)
        self.base, self.next_seed = self.env.unwrapped, [seed + i for i in range(num_envs)]
        self.num_stages, self.single_action_space = len(self.task.stages), self.base.single_action_space
        self.furthest, self.seeds = (torch.zeros(num_envs, dtype=torch.long, device=self.base.device) for _ in range(2))
        self.object_start = torch.zeros(num_envs, 3, device=self.base.device)

    def reset(self, seed: int | list[int] | None = None, env_idx: Tensor | None = None) -> tuple[State, State]:
        """Starts episodes in all envs, or in `env_idx` alone. Without a seed the next one of each env's own sequence is used."""
        seed = [seed + i for i in range(self.num_envs)] if isinstance(seed, int) else seed
        index = torch.arange(self.num_envs, device=self.base.device) if env_idx is None else env_idx
        explicit, seed = seed is not None, seed or [self.next_seed[i] for i in index.tolist()]
        # PhysX keeps contacts that no reset clears; rebuilding the scene makes an explicitly seeded episode a function of its seed alone
        options = {"reconfigure": explicit and self.backend == "cpu"} if len(index) == self.num_envs else {"env_idx": index}
        if self.task.grid and min(seed) >= EVAL_SEED:  # SimplerEnv's configurations in turn
            options["episode_id"] = torch.tensor(seed, device=self.base.device) - EVAL_SEED
        obs, _ = self.env.reset(seed=seed if len(seed) == self.num_envs else None, options=options)
        for i, s in zip(index.tolist(), seed, strict=True):
            self.next_seed[i] = int(np.random.default_rng(s).integers(TRAIN_SEEDS))
        if self.render and self.base._hidden_objects:  # PickCube's goal: a policy that sees only images must see it
            while self.base._hidden_objects:
                self.base._hidden_objects.pop().show_visual()
            obs = self.base.get_obs(self.base.get_info())
        self.seeds[index], self.furthest[index] = torch.tensor(seed, device=self.base.device), 0
        self.state = self.task.observe(self.base)
        self.state["grasped"][index] = False  # contact forces are those of the last physics step, of the episode before
        self.object_start[index] = self.state["object"][index]
        return self.observation(obs), self.infos(self.base.evaluate()["success"])

    def step(self, action: Tensor) -> tuple[State, Tensor, Tensor, Tensor, dict]:
        """One env step. action: (N, A). Returns observation, reward (N,), terminated (N,), truncated (N,), infos."""
        obs, reward, _, truncated, info = self.env.step(action)
        self.state, success, truncated = self.task.observe(self.base), info["success"], torch.as_tensor(truncated)
        infos = self.infos(success)
        # The state after a reset does not count: no action led to it, and a goal may be drawn where the object lies
        self.furthest = torch.maximum(self.furthest, infos["stage"])
        infos["furthest_stage"] = self.furthest.clone()
        obs, reward, terminated = self.observation(obs), reward if self.dense else success.float(), success & self.terminate_on_success
        done = terminated | truncated
        if done.any():
            final = {"final_obs": obs, "final_info": infos}
            obs, infos = self.reset(env_idx=done.nonzero()[:, 0])
            infos |= final
        return obs, reward, terminated, truncated, {**infos, "_final_info": done}

    def play(self, act: Callable[[int, slice], Tensor], steps: int):
        """Steps with the actions act(t, rows): yields t, rows and what `step` returns. One batch computes at once: there are no halves here."""
        for t in range(steps):
            yield t, slice(0, self.num_envs), *self.step(act(t, slice(0, self.num_envs)))

    def set_next_seeds(self, seeds: list[int]) -> None:
        """The seeds (N) of the episodes that begin when the present ones end."""
        self.next_seed = list(seeds)

    def close(self) -> None:
        self.env.close()

    def observe_state(self, state: dict) -> State:
        """The observation, with `geometry`, of a recorded ManiSkill state, which replaces the present one (batch 1)."""
        self.base.set_state_dict(state)
        self.base.agent.controller.controllers["arm"].reset()  # its target, where it has one, is that of the last reset
        self.state = self.task.observe(self.base)
        return {**self.observation(self.base.get_obs()), "geometry": geometry(self.state)}

    def observation(self, obs: dict) -> State:
        seen = {"proprio": torch.cat([self.state["tool"], self.state["quaternion"], self.state["opening"][:, None]], -1)}
        if self.render:
            rgb = torch.cat([camera["rgb"] for camera in obs["sensor_data"].values()], 1 if self.task.wide else 2)
            if rgb.shape[1:3] != (self.image_size, self.image_size):  # SimplerEnv's 4:3, squeezed into a square as for OpenVLA
                rgb = torch.nn.functional.interpolate(rgb.movedim(-1, 1).float(), [self.image_size] * 2, mode="bilinear", antialias=True).movedim(1, -1)
            seen["rgb"] = rgb.round().byte().contiguous()
        return seen

    def infos(self, success: Tensor) -> State:
        self.state["object_start"] = self.object_start
        return {**stage_signals(self.task, self.state, success, self.potential, self.across), "furthest_stage": self.furthest.clone(), "success": success,
                "seed": self.seeds.clone(), "elapsed_steps": self.base.elapsed_steps.long().clone(), "geometry": geometry(self.state),
                **{name: self.state[name] for name in self.task.report}}  # fmt: skip

    def expert_action(self, slip: Tensor) -> Tensor:
        """The expert's action for the present state, (N, A). A function of the state alone, so it needs no reset. slip: (N,) long; it plays
        the stage that many after the present one, modulo K: 0 is right, all else a mistake to recover from."""
        s, table, arm = self.state, self.task.stage_table, self.task.arm
        stage = stage_signals(self.task, s, torch.zeros_like(s["grasped"]), self.potential, self.across)["stage"]
        row = torch.arange(self.num_envs, device=stage.device), (stage + slip.to(stage.device)) % len(table)
        target, turn, grip = (torch.stack([getattr(entry, name)(s) for entry in table], 1)[row] for name in ("target", "turn", "gripper"))
        unit, limit = (torch.tensor(x, dtype=torch.float32, device=stage.device) for x in (arm.unit, arm.limit))
        return torch.cat([torch.cat([target - s["command"], turn], -1) / unit, grip[:, None]], -1).clamp(-limit, limit)

class ProcessEnv(gym.Env):
    """A StageEnv of one as gymnasium's AsyncVectorEnv wants it in a process: numpy, without the batch axis."""

    def __init__(self, env_id: str, index: int, seed: int, **kwargs):
        if multiprocessing.parent_process():  # gymnasium makes one in the script itself, to look at
            torch.set_num_threads(1)
            os.setpgrp()  # Ctrl-C and torchrun's SIGTERM go to the script's whole group: it decides
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # an end without a word where the script is gone
            torch.cuda.synchronize = lambda: None  # ManiSkill calls it, and it would open a context: nothing here runs on CUDA
        self.index, self.env = index, StageEnv(env_id, 1, "cpu", seed, **kwargs)
        obs, _ = self.env.reset()
        self.env.next_seed = [seed]
        low_high = {"rgb": (0, 255), "proprio": (-np.inf, np.inf)}
        self.observation_space = gym.spaces.Dict({name: gym.spaces.Box(*low_high[name], x.shape[1:], x.numpy().dtype.type) for name, x in obs.items()})
        self.action_space = self.env.single_action_space

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        return tuple(map(self.first, self.env.reset(seed)))

    def step(self, action: np.ndarray):
        obs, reward, terminated, truncated, infos = self.env.step(torch.as_tensor(action)[None])
        return self.first(obs), float(reward), bool(terminated), bool(truncated), self.first(infos)

    def expert_action(self, slip: Tensor) -> np.ndarray:
        return self.env.expert_action(slip[self.index, None])[0].numpy()

    def set_next_seed(self, seeds: list[int]) -> None:
        self.env.set_next_seeds([seeds[self.index]])

    def close(self):
        self.env.close()

    @classmethod
    def first(cls, batch: dict) -> dict:
        rename = {"final_obs": "ended_obs"}  # gymnasium would leave that one unbatched
        return {rename.get(name, name): cls.first(x) if isinstance(x, dict) else x[0].numpy() for name, x in batch.items() if name != "_final_info"}

class Processes(gym.vector.AsyncVectorEnv):
    """One half of a StageVectorEnv. They end at once: gymnasium would wait for what they compute, and fail or wait for ever where they are gone."""

    def close(self, **kwargs):
        self.closed = True
        for process in self.processes:
            process.kill()

class StageVectorEnv:
    """The same as a StageEnv of N, on a CPU: one process per env, in two halves that can take turns with a policy (`play`)."""

    def __init__(self, env_id: str, num_envs: int, seed: int, **kwargs):
        multiprocessing.set_forkserver_preload(["stare_utils", "mani_skill.envs"])  # processes are forked from a clean server that has these
        self.task, self.num_envs, self.num_stages = get_task(env_id), num_envs, len(get_task(env_id).stages)
        self.rows = [slice(0, num_envs // 2), slice(num_envs // 2, num_envs)] if num_envs > 1 else [slice(0, 1)]
        self.parts, seen = [], gym.Env()  # gymnasium makes one env in the script itself, to look at its spaces: once is enough

        def maker(i: int, seen: gym.Env) -> Callable[[], gym.Env]:
            return lambda: ProcessEnv(env_id, i, seed + i, **kwargs) if multiprocessing.parent_process() or not seen.action_space else seen

        seen.action_space = None
        for rows in self.rows:
            makers = [maker(i, seen) for i in range(rows.start, rows.stop)]
            # Processes would import the running script again, which takes longer than all that they need: it has no file now. StageEnv resets itself
            with unittest.mock.patch.dict(vars(sys.modules["__main__"]), {"__file__": None, "__spec__": None}):
                self.parts.append(self.ask(Processes, makers, context="forkserver", autoreset_mode=gym.vector.AutoresetMode.DISABLED))
            seen.observation_space, seen.action_space = self.parts[0].single_observation_space, self.parts[0].single_action_space
        self.single_action_space = self.parts[0].single_action_space

    def reset(self, seed: int | list[int] | None = None) -> tuple[State, State]:
        seed = [seed + i for i in range(self.num_envs)] if isinstance(seed, int) else seed
        return self.join([self.result(x) for x in self.all("reset", lambda rows: (seed and seed[rows],))])

    def step(self, actions: Tensor) -> tuple[State, Tensor, Tensor, Tensor, dict]:
        """actions: (N, A) in the env's own units. Returns observation, reward (N,), terminated (N,), truncated (N,), infos."""
        return self.join([self.result(x) for x in self.all("step", lambda rows: (actions[rows].cpu().numpy(),))])

    def play(self, act: Callable[[int, slice], Tensor], steps: int):
        """Steps in which one half of the envs computes while the policy acts for the other. act(t, rows): the actions of these envs at step t. Yields
        t, rows and what `step` returns, of these envs alone; act(t + 1, rows) is asked for when the next one is."""
        for part, rows in zip(self.parts, self.rows, strict=True):
            self.ask(part.step_async, act(0, rows).cpu().numpy())
        for t in range(steps):
            for part, rows in zip(self.parts, self.rows, strict=True):
                yield t, rows, *self.result(self.ask(part.step_wait))
                if t + 1 < steps:
                    self.ask(part.step_async, act(t + 1, rows).cpu().numpy())

    def set_next_seeds(self, seeds: list[int]) -> None:
        self.all("call", lambda rows: ("set_next_seed", seeds))

    def expert_action(self, slip: Tensor) -> Tensor:
        return torch.from_numpy(np.concatenate(self.all("call", lambda rows: ("expert_action", slip))))

    def close(self) -> None:
        for part in self.parts:
            part.close()

    def all(self, name: str, inputs: Callable[[slice], tuple]) -> list:
        """Calls a method of all processes at once; what each half returns."""
        for part, rows in zip(self.parts, self.rows, strict=True):
            self.ask(getattr(part, f"{name}_async"), *inputs(rows))
        return [self.ask(getattr(part, f"{name}_wait")) for part in self.parts]

    def ask(self, method: Callable, *inputs, **kwargs):
        """Calls a method of a half's processes. Where one is gone (UserError) or raises, all are ended."""
        try:
            return method(*inputs, **kwargs)
        except Exception as error:
            self.close()
            if not isinstance(error, (EOFError, ConnectionError)):
                raise
            raise UserError("an env process died (memory full, or killed): lower --num-envs (and raise sta_ppo.py's --num-steps by as much); a training run "
                            "goes on with --resume and its --output-dir") from None

    @classmethod
    def result(cls, found: tuple) -> tuple:
        """What gymnasium returns of a reset or step, as tensors."""
        obs, *numbers, infos = (cls.tensors(x) if isinstance(x, dict) else torch.from_numpy(x) for x in found)
        if not numbers:
            return obs, infos
        reward, terminated, truncated = numbers
        return obs, reward.float(), terminated, truncated, {**infos, "_final_info": terminated | truncated}

    @classmethod
    def tensors(cls, batch: dict) -> dict:
        """Keys that begin with _ are gymnasium's masks."""
        return {name.replace("ended", "final"): cls.tensors(x) if isinstance(x, dict) else torch.from_numpy(x) for name, x in batch.items() if name[0] != "_"}

    def join(self, halves: list) -> tuple | dict | Tensor:
        """Tuples, dicts and tensors of the halves as those of all envs. What one half has not, `final_obs` of no ended episode, is zeros."""
        like = next(x for x in halves if x is not None)
        if isinstance(like, tuple):
            return tuple(map(self.join, map(list, zip(*halves, strict=True))))
        if isinstance(like, dict):
            names = dict.fromkeys(name for half in halves for name in half or ())
            return {name: self.join([(half or {}).get(name) for half in halves]) for name in names}
        return torch.cat([like.new_zeros(rows.stop - rows.start, *like.shape[1:]) if half is None else half for half, rows in zip(halves, self.rows)])

def check_world(env_id: str, full_meshes: bool = False, render: bool = True, backend: str = "cpu", reward: str = "sparse") -> None:
    """Chooses the software driver where there is no GPU, makes the light meshes once, and raises UserError when the task is unknown, its assets
    are missing, SAPIEN cannot render, or ManiSkill has no such reward of it, or no episodes that end at success on this backend."""
    data, grid = mani_skill.ASSET_DIR, get_task(env_id).grid
    if grid and reward == "dense":
        raise UserError(f"{env_id} has no dense reward in ManiSkill: use --reward stare or sparse")
    if grid and backend == "cuda":
        raise UserError(f"{env_id} trains with --backend cpu: on the GPU ManiSkill ends its episodes together, so success could not end one")
    if grid and not ((data / "tasks/bridge_v2_real2sim_dataset").is_dir() and (data / "robots/widowx").is_dir()):
        download = "python -m mani_skill.utils.download_asset"
        raise UserError(f"{env_id} needs assets that are not in {data}: run `{download} bridge_v2_real2sim -y && {download} widowx250s -y`,"
                        " or set MS_ASSET_DIR to the folder whose data/ holds them")  # fmt: skip
    if not render:
        return
    if not torch.cuda.is_available():
        for driver in Path("/usr/share/vulkan/icd.d").glob("lvp_icd*.json"):  # the software driver, where several are installed
            os.environ.setdefault("VK_ICD_FILENAMES", str(driver))
        os.environ.setdefault("LP_NUM_THREADS", "0")  # it draws in the process that asks: the env processes are the parallelism
    sapien.render.set_log_level("off")  # the error below says what its three lines say
    try:
        sapien.render.RenderSystem("cuda" if torch.cuda.is_available() else "cpu")
    except RuntimeError as error:
        raise UserError(f"no Vulkan renderer ({str(error).strip().splitlines()[-1]}): run ./setup.sh, which mends it or says how") from None
    if not full_meshes:
        light_assets()  # once here, not once in every process

def make_envs(
    env_id: str, num_envs: int, seed: int, terminate_on_success: bool = True, *, backend: str = "cpu", full_meshes: bool = False, **kwargs
) -> StageEnv | StageVectorEnv:
    """Vectorised envs of a task. backend: "cpu" (one process per env) or "cuda" (ManiSkill's GPU simulation); kwargs: of StageEnv.

    On the CPU an explicitly seeded episode is a function of its seed; GPU simulation draws a whole batch from its first seed.
    Raises UserError on an unknown env id, num_envs < 1, missing assets, no renderer, or a dense reward where ManiSkill has none.
    """
    if num_envs < 1:
        raise UserError(f"--num-envs must be at least 1, not {num_envs}")
    check_world(env_id, full_meshes, kwargs.get("render", True), backend if terminate_on_success else "cpu", kwargs.get("reward", "sparse"))
    kwargs |= {"terminate_on_success": terminate_on_success, "full_meshes": full_meshes}
    seed %= 2**32 - num_envs  # ManiSkill takes no larger ones
    return StageEnv(env_id, num_envs, backend, seed, **kwargs) if backend == "cuda" else StageVectorEnv(env_id, num_envs, seed, **kwargs)

class ScriptedExpert:
    """Solves each task stage by stage from the simulator's state. `envs` is what make_envs returns."""

    def __init__(self, envs: StageEnv | StageVectorEnv):
        self.envs = envs

    def act(self, slip: Tensor | None = None) -> Tensor:
        """Actions (N, A) for the present states, as `envs.step` takes them; a function of the state, so valid after every reset and step.
        slip (N,) long: how many stages off to play; None: the right one."""
        return self.envs.expert_action(torch.zeros(self.envs.num_envs, dtype=torch.long) if slip is None else slip)
