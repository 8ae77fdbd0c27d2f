"""The eleven tasks: what each reads off its simulator, its stages, and how its expert plays.

A task is one entry of `TASKS`, which is near the end of this file. The same entry drives the stage
separator, the stage costs and potentials, the scripted expert and the evaluation. To add a task,
write a function that reads its state and one `Stage` per stage. docs/tasks.md shows an example and
describes every stage below in words.

Functions of a state read batched tensors with one row per env. So the same code serves ManiSkill's
GPU simulation (one batched env) and CPU simulation (one process per env).
Letters: N envs, A action dimensions. Units: metres, radians, seconds; world frame. Quaternions are
(w, x, y, z). The tool is the point between the fingertips.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass

import torch

# Importing any part of mani_skill.envs registers ManiSkill's env ids.
from mani_skill.envs.sapien_env import BaseEnv
from mani_skill.utils.geometry import rotation_conversions as rotations
from mani_skill.utils.registration import REGISTERED_ENVS
from mani_skill.utils.structs.actor import Actor
from mani_skill.utils.structs.pose import Pose

from stare_utils import Stage, State, Tensor

# Training draws its episodes' seeds below this number.
TRAIN_SEEDS = 2**30
# Evaluation's seeds begin here, so the two never meet.
EVAL_SEED = TRAIN_SEEDS

# Metres: how far above the object the expert comes in.
HOVER = 0.08
# Metres: the fingers close this near to the grip. From further off they may hold a corner, and the
# object slips out.
CENTRED = 0.01
# Metres: a grasped object that has moved this far is being transported.
LIFT = 0.03
# Metres per radian: how much a missing turn counts in a stage distance. The arms turn 0.1 to 0.3
# rad in a step, in which they move 2 to 5 cm.
TURN = 0.1


class UserError(Exception):
    """A mistake that a user can make. Scripts print its one line and exit with code 2."""


# ---- what a task is ----
@dataclass(frozen=True)
class Arm:
    """A robot arm and its controller, as the expert needs them."""

    # The link between the fingertips, which open along its y axis.
    tool: str
    control_mode: str
    # Env steps per second.
    control_freq: int
    # (6,): how far an action of 1 moves (m) and turns (rad) the tool, in world axes.
    unit: tuple[float, ...]
    # (A,): the largest action of the expert. Tokens and demonstrations span -limit to limit.
    limit: tuple[float, ...]


PANDA = Arm(
    tool="panda_hand_tcp",
    control_mode="pd_ee_delta_pose",
    control_freq=20,
    # ManiSkill scales the Panda's rotations by their lower bound, which is -0.1 rad.
    unit=(0.1, 0.1, 0.1, -0.1, -0.1, -0.1),
    limit=(1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0),
)
WIDOWX = Arm(
    tool="ee_gripper_link",
    control_mode="arm_pd_ee_target_delta_pose_align2_gripper_pd_joint_pos",
    control_freq=5,
    # The WidowX is driven in the frame of its base, which is turned by 180 degrees.
    unit=(-1, -1, 1, -1, -1, 1),
    limit=(0.05, 0.05, 0.05, 0.3, 0.3, 0.3, 1.0),
)

Point = tuple[float, float, float]
# One entry per camera: eye (m), the point that it looks at (m), vertical field of view (rad).
Views = tuple[tuple[Point, Point, float], ...]


@dataclass(frozen=True)
class Task:
    """One task: its words, its stages, what they read off the simulator, and its cameras."""

    instruction: str
    # The same in words that are never trained on, for `eval.py --instruction-set paraphrase`.
    paraphrases: tuple[str, ...]
    stage_table: tuple[Stage, ...]
    # Reads the simulator: all that `observe_arm` returns, and what else the stages need.
    observe: Callable[[BaseEnv], State]
    max_episode_steps: int
    # Tbar_k per stage: the median number of steps that the expert takes in it, as measured by
    # benchmark/expert.py. `--stage-reward paced` needs it.
    pace: tuple[float, ...] = ()
    # Two views at a right angle, because one shows what the hand hides in the other.
    # (): the env's own camera.
    views: Views = ()
    # True: two pictures of 128 x 64 pixels, one above the other. False: 64 x 128, side by side.
    wide: bool = False
    arm: Arm = PANDA
    # The actors that `--ood position` moves together, the object first.
    movable: Callable[[BaseEnv], list[Actor]] = lambda env: [env.obj]
    # SimplerEnv: the number of initial configurations. An evaluation plays each of them once.
    # 0: episodes are drawn at random.
    grid: int = 0
    # Entries of the state that evaluation reports beside success.
    report: tuple[str, ...] = ()

    @property
    def stages(self) -> tuple[str, ...]:
        """The names of the K stages, in order."""
        return tuple(stage.name for stage in self.stage_table)


# ---- geometry ----
def norm(x: Tensor) -> Tensor:
    """Euclidean length of the last axis, (N, 3) -> (N,)."""
    return torch.linalg.vector_norm(x, dim=-1)


def up(height: Tensor) -> Tensor:
    """(N,) heights -> (N, 3) vertical offsets. As a rotation vector: turns about the vertical."""
    return torch.stack([torch.zeros_like(height), torch.zeros_like(height), height], -1)


def flat(x: Tensor) -> Tensor:
    """The horizontal part of (N, 3)."""
    return x * torch.tensor([1.0, 1.0, 0.0], device=x.device)


def axis(q: Tensor, i: int) -> Tensor:
    """Where a body's own x axis (i = 0) or y axis (1) points. q: (N, 4). Returns (N, 3)."""
    # These are the first two columns of the rotation matrix.
    w, x, y, z = q.unbind(-1)
    if i == 0:
        direction = [
            1 - 2 * (y * y + z * z),
            2 * (x * y + w * z),
            2 * (x * z - w * y),
        ]
    else:
        direction = [
            2 * (x * y - w * z),
            1 - 2 * (x * x + z * z),
            2 * (y * z + w * x),
        ]
    return torch.stack(direction, -1)


def heading(x: Tensor) -> Tensor:
    """The direction of (N, 3) on the table, (N,) radians."""
    return torch.atan2(x[:, 1], x[:, 0])


def wrap(angle: Tensor, period: float) -> Tensor:
    """The equal turn that is nearest to zero. angle: (N,) radians."""
    return torch.remainder(angle + period / 2, period) - period / 2


def observe_arm(
    env: BaseEnv,
    arm: Arm,
    pose: Pose,
    goal: Tensor,
    grasped: Tensor,
    width: float | Tensor,
    period: float = torch.pi,
    grip: Tensor | None = None,
) -> State:
    """What every task reads. docs/tasks.md lists the entries.

    pose: of the object, its long axis is x. goal: (N, 3) where the object belongs. grasped: (N,)
    bool. width: the finger opening (m) at which the object is held. period: the object looks the
    same after this turn (rad). grip: (N, 3) where the tool takes hold of the object; by default its
    centre.
    """
    tool = env.agent.robot.links_map[arm.tool]
    tool_pose = tool.pose
    controller = env.agent.controller.controllers["arm"]
    # A controller with a target moves that target, and the tool follows late.
    if controller.config.use_target:
        command = env.agent.robot.pose * controller._target_pose
    else:
        command = tool_pose
    grip = pose.p if grip is None else grip
    offset = pose.p - goal
    # The fingers are the robot's last two joints.
    opening = env.agent.robot.qpos[:, -2:].sum(-1)
    # The fingers open along the tool's y axis. They must open across the object's long axis.
    yaw_error = heading(axis(pose.q, 0)) + torch.pi / 2 - heading(axis(command.q, 1))
    return {
        "tool": tool_pose.p,
        "quaternion": tool_pose.q,
        "command": command.p,
        "speed": norm(tool.linear_velocity),
        "opening": opening,
        "object": pose.p,
        "goal": goal,
        "grip": grip,
        "grasped": grasped,
        "width": 0 * opening + width,
        "wait": 0 * opening,
        "to_grip": norm(tool_pose.p - grip),
        "to_goal": norm(offset),
        "beside_goal": norm(flat(offset)),
        "above_goal": offset[:, 2],
        "yaw_error": wrap(yaw_error, period),
        "alike": 0 * opening + 2 * torch.pi / period,
    }


def geometry(state: State) -> Tensor:
    """(N, 8): the label of sft.py's auxiliary loss, which alone reads it.

    Three numbers are tool to object (m), three are tool to goal (m). The last two are cosine and
    sine, times 0.1, of the turn that the tool lacks, times the number of turns that look alike.
    """
    to_object = state["object"] - state["tool"]
    to_goal = state["goal"] - state["tool"]
    # Of this multiple cosine and sine do not jump where the turn wraps.
    turn = (state["alike"] * state["yaw_error"])[:, None]
    return torch.cat([to_object, to_goal, 0.1 * turn.cos(), 0.1 * turn.sin()], -1)


# ---- entry conditions, distances and the expert's targets that several tasks share ----
def gripper(command: float) -> Callable[[State], Tensor]:
    """The same gripper command (N,) in every state. 1 opens, -1 closes."""
    return lambda state: torch.full_like(state["opening"], command)


def to_grip(state: State) -> Tensor:
    """(N,) metres: tool to grip."""
    return state["to_grip"]


def to_turned_grip(state: State) -> Tensor:
    """(N,) metres: tool to grip, and the turn about the vertical that the tool lacks."""
    return state["to_grip"] + TURN * state["yaw_error"].abs()


def to_goal(state: State) -> Tensor:
    """(N,) metres: object to goal."""
    return state["to_goal"]


def moved(state: State) -> Tensor:
    """(N,) metres: how far the object is from where the episode began."""
    return norm(state["object"] - state["object_start"])


def lifted(state: State) -> Tensor:
    """(N,) bool: the object is held and has left its place."""
    return state["grasped"] & (moved(state) > LIFT)


def centred(state: State) -> Tensor:
    """(N,) bool: the object is held, or the tool is where the fingers may close."""
    return state["grasped"] | (state["to_grip"] < CENTRED)


def left_to_grasp(state: State) -> Tensor:
    """(N,) metres: tool to grip, what the fingers still have to close, and the missing lift."""
    to_close = (~state["grasped"]) * (state["opening"] - state["width"]).clamp(min=0)
    to_lift = (LIFT - moved(state)).clamp(min=0)
    return state["to_grip"] + to_close + to_lift


def left_to_release(state: State) -> Tensor:
    """(N,) metres: object to goal, and what the fingers still have to open to let it go."""
    return state["to_goal"] + (state["width"] + 0.01 - state["opening"]).clamp(min=0)


def hover(state: State) -> Tensor:
    """(N, 3) metres: a funnel above the grip, through which the expert comes down.

    The expert waits above for the yaw only where a task says so (`wait`). Where the expert stands
    still, an argmax policy stands still forever. Most objects need no waiting, because the fingers
    open wider than the object's diagonal.
    """
    aside = norm(flat(state["grip"] - state["tool"]))
    height = (4 * (aside - 0.01)).clamp(0, HOVER).maximum(state["wait"])
    return state["grip"] + up(height)


def turn_to_grip(state: State) -> Tensor:
    """(N, 3) radians: the turn about the vertical that the tool lacks."""
    return up(state["yaw_error"])


def straight(state: State) -> Tensor:
    """(N, 3) metres: where the tool brings the object straight to the goal."""
    return state["tool"] + state["goal"] - state["object"]


def carry(state: State, clearance: float) -> Tensor:
    """(N, 3) metres: where the tool should be to bring the object over the goal.

    It goes up first, then across at `clearance` (m) above the goal, then down.
    """
    # The object descends only in the last centimetres beside the goal.
    climb = (4 * (state["beside_goal"] - 0.01)).clamp(0, clearance) - state["above_goal"]
    # It moves across only where it is almost high enough.
    across = flat(state["goal"] - state["object"]) * (climb < 0.02)[:, None]
    return state["tool"] + across + up(climb)


def release(state: State) -> Tensor:
    """(N,): the command opens the fingers where the object lies at the goal or is not held."""
    at_goal = (state["beside_goal"] < 0.012) & (state["above_goal"].abs() < 0.005)
    # Fingers that have begun to open go on, because the object is not held any more.
    return torch.where(at_goal | ~state["grasped"], 1.0, -1.0)


# ---- stages that several tasks share ----
def pick(
    reach_length: float,
    grasp_length: float,
    lift: float = 0.06,
    reach: Callable[[State], Tensor] = to_turned_grip,
) -> tuple[Stage, ...]:
    """Two stages: an object is reached from above and grasped.

    reach_length, grasp_length: L_k of the two stages (m). lift: how far above the grip the tool
    rises while the fingers close (m), so it never stands still. reach: d_k of the first stage;
    `to_grip` where the object can be held from any side.
    """

    def close_and_rise(state: State) -> Tensor:
        """(N, 3) metres: the grip, or above it where the fingers are almost closed."""
        closed = state["opening"] < state["width"] + 0.008
        return state["grip"] + up(lift * closed)

    return (
        Stage(
            name="reach",
            entry=None,
            distance=reach,
            length=reach_length,
            target=hover,
            gripper=gripper(1.0),
            turn=turn_to_grip,
        ),
        Stage(
            name="grasp",
            entry=centred,
            distance=left_to_grasp,
            length=grasp_length,
            target=close_and_rise,
            gripper=gripper(-1.0),
        ),
    )


def place_on(
    transport_length: float, place_length: float, clearance: float, near: float
) -> tuple[Stage, ...]:
    """Two stages: a grasped object is carried over its goal, put down and let go.

    transport_length, place_length: L_k of the two stages (m). clearance: how far above the goal the
    expert carries the object (m). near: placing begins within this of the goal, both horizontally
    and vertically (m).
    """

    def is_near(state: State) -> Tensor:
        """(N,) bool: the object is near the goal, held or not."""
        return (state["beside_goal"] < near) & (state["above_goal"].abs() < near)

    def carry_over(state: State) -> Tensor:
        """(N, 3) metres: see `carry`."""
        return carry(state, clearance)

    def put_down(state: State) -> Tensor:
        """(N, 3) metres: as `carry`, but the tool stays where it has let go."""
        held = state["grasped"][:, None]
        return torch.where(held, carry(state, clearance), state["tool"])

    return (
        Stage(
            name="transport",
            entry=lifted,
            distance=to_goal,
            length=transport_length,
            target=carry_over,
            gripper=gripper(-1.0),
        ),
        Stage(
            name="place",
            entry=is_near,
            distance=left_to_release,
            length=place_length,
            target=put_down,
            gripper=release,
        ),
    )


# ---- PickCube-v1 ----
def observe_pick_cube(env: BaseEnv) -> State:
    """The goal is the green ball. It may hang in the air."""
    goal = env.goal_site.pose.p
    grasped = env.agent.is_grasping(env.cube)
    return observe_arm(env, PANDA, env.cube.pose, goal, grasped, 0.04, torch.pi / 2)


def held_near_goal(state: State) -> Tensor:
    """(N,) bool: the cube is held within 4 cm of the ball."""
    return state["grasped"] & (state["to_goal"] < 0.04)


def left_to_rest(state: State) -> Tensor:
    """(N,) metres: cube to ball, and how far the tool moves in one step.

    Success needs the robot at rest.
    """
    return state["to_goal"] + state["speed"] / PANDA.control_freq


# ---- StackCube-v1 ----
def observe_stack_cube(env: BaseEnv) -> State:
    """Red cube A goes on top of green cube B."""
    # The edge of a cube is 4 cm long.
    goal = env.cubeB.pose.p + torch.tensor([0, 0, 0.04], device=env.device)
    grasped = env.agent.is_grasping(env.cubeA)
    state = observe_arm(env, PANDA, env.cubeA.pose, goal, grasped, 0.04, torch.pi / 2)

    # Where the other cube is near, the fingers must not close from its side. The tool then turns to
    # the cube's other two sides before it goes down.
    error = state["yaw_error"]
    crowded = state["beside_goal"] < 0.08
    other_sides = error - torch.pi / 2 * torch.where(error > 0, 1.0, -1.0)
    to_neighbour = heading(goal - state["object"])
    fingers = heading(axis(state["quaternion"], 1))
    between = wrap(to_neighbour - fingers - error, torch.pi).abs() < torch.pi / 4
    error = torch.where(crowded & between, other_sides, error)

    state["yaw_error"] = error
    state["wait"] = 0.05 * (crowded & (error.abs() > 0.35))
    return state


# ---- PushCube-v1 and PullCube-v1 ----
def observe_push(env: BaseEnv) -> State:
    """The grip is behind the cube, on the side away from the goal.

    The tool first goes there with its fingers closed. Adds to the state:
    `way` (N, 3), the direction from the cube to the goal;
    `behind` (N,) bool, the tool is where it may push;
    `left` (N,), from the cube to the goal's rim (m).
    """
    cube = env.obj.pose
    goal = env.goal_region.pose.p
    way = torch.nn.functional.normalize(flat(goal - cube.p), dim=-1)
    grip = cube.p - 0.045 * way
    # No finger ever holds the cube.
    grasped = torch.zeros(len(goal), dtype=torch.bool, device=goal.device)
    state = observe_arm(env, PANDA, cube, goal, grasped, 0.0, grip=grip)

    to_cube = state["object"] - state["tool"]
    along = (to_cube * way).sum(-1)
    aside = norm(flat(to_cube) - along[:, None] * way)
    in_line = (along > 0.01) & (along < 0.08) & (aside < 0.03)
    state["behind"] = in_line & (to_cube[:, 2].abs() < 0.02)
    state["way"] = way
    state["left"] = (state["beside_goal"] - env.goal_radius).clamp(min=0)
    return state


def through_cube(state: State) -> Tensor:
    """(N, 3) metres: a point ahead of the cube, 2 cm further than the goal's rim."""
    return state["object"] + (state["left"] + 0.02)[:, None] * state["way"]


def push(name: str) -> tuple[Stage, ...]:
    """Two stages: the tool goes behind the cube, then moves it. name: of the second stage."""
    return (
        Stage(
            name="reach",
            entry=None,
            distance=to_grip,
            length=0.17,
            target=hover,
            gripper=gripper(-1.0),
        ),
        Stage(
            name=name,
            entry=lambda state: state["behind"],
            distance=lambda state: state["left"],
            length=0.1,
            target=through_cube,
            gripper=gripper(-1.0),
        ),
    )


# ---- LiftPegUpright-v1 ----
def observe_lift_peg(env: BaseEnv) -> State:
    """The peg is gripped 3 cm from one end and raised like a lever.

    Its other end, the foot, stays on the table. Adds to the state:
    `tilt` (N,), the angle of the long axis to the vertical (rad);
    `rise` (N, 3), where the grip should be next (m).
    """
    half = env.peg_half_length
    long = axis(env.peg.pose.q, 0)
    centre = env.peg.pose.p
    foot = centre - half * long
    grip = centre + (half - 0.03) * long
    # The peg stands upright on its foot at the end.
    goal = flat(foot) + torch.tensor([0, 0, half], device=env.device)
    grasped = env.agent.is_grasping(env.peg)
    width = 2 * env.peg_half_width
    state = observe_arm(env, PANDA, env.peg.pose, goal, grasped, width, grip=grip)

    state["tilt"] = torch.acos(long[:, 2].abs().clamp(max=1.0))
    # The grip moves on an arc about the foot. The target is 0.35 rad ahead of it.
    across = torch.nn.functional.normalize(flat(long), dim=-1)
    ahead = (torch.asin(long[:, 2].clamp(-1, 1)) + 0.35).clamp(max=torch.pi / 2)
    direction = across * torch.cos(ahead)[:, None] + up(torch.sin(ahead))
    state["rise"] = flat(foot) + norm(grip - foot)[:, None] * direction
    return state


def rise(state: State) -> Tensor:
    """(N, 3) metres: the next point of the grip's arc."""
    return state["rise"]


def rise_higher(state: State) -> Tensor:
    """(N, 3) metres: 5 mm above the next point of the grip's arc."""
    return state["rise"] + up(0 * state["tilt"] + 0.005)


# ---- PlaceSphere-v1 ----
def observe_place_sphere(env: BaseEnv) -> State:
    """The goal is where the sphere lies in the bin."""
    height = env.radius + env.block_half_size[0]
    goal = env.bin.pose.p + torch.tensor([0, 0, height], device=env.device)
    grasped = env.agent.is_grasping(env.obj)
    state = observe_arm(env, PANDA, env.obj.pose, goal, grasped, 0.04)
    # A sphere can be gripped from any side.
    state["yaw_error"] = 0 * state["yaw_error"]
    return state


# ---- PegInsertionSide-v1 ----
def observe_peg_insertion(env: BaseEnv) -> State:
    """The peg is gripped in its rear half. Peg and hole differ in size from episode to episode.

    Adds to the state:
    `depth` (N,), how far the head must still go in (m);
    `aside` (N,), from the head or the centre to the hole's axis, the larger distance (m);
    `outside` (N, 3), where the peg waits before the hole (m);
    `onward` (N, 3), how the expert moves the peg into the hole (m);
    `peg_turn` (N, 3), the rotation vector from the peg to the hole (rad).
    """
    peg = env.peg.pose
    hole = env.goal_pose
    # (N, 3): half the peg's length, width and height.
    half = env.peg_half_sizes
    grip = peg.p - (half[:, :1] / 2 + 0.01).clamp(min=0.05) * axis(peg.q, 0)
    grasped = env.agent.is_grasping(env.peg)
    state = observe_arm(env, PANDA, peg, hole.p, grasped, 2 * half[:, 2], grip=grip)
    state["wait"] = 0.06 * (state["yaw_error"].abs() > 0.1)

    # Head and centre of the peg in the frame of the hole, whose axis is x.
    head = (env.box_hole_pose.inv() * env.peg_head_pose).p
    centre = (hole.inv() * peg).p
    aside = torch.maximum(norm(head[:, 1:]), norm(centre[:, 1:]))
    state["depth"] = (-head[:, 0]).clamp(min=0)
    state["aside"] = aside

    into = axis(hole.q, 0)
    left = ((hole.p - peg.p) * into).sum(-1, keepdim=True)  # (N, 1) along the axis
    # The arm goes less than half of the way that it is told, and sags by some millimetres.
    # So the expert commands twice the sideways error.
    sideways = 2 * (hole.p - peg.p - left * into)
    # The peg goes in only while it is within 5 mm of the axis.
    forward = left.clamp(max=0.04) * (1 - aside / 0.005).clamp(min=0)[:, None] * into
    state["onward"] = sideways + forward
    state["outside"] = hole.p - (half[:, :1] + 0.02) * into

    turn = rotations.quaternion_multiply(hole.q, rotations.quaternion_invert(peg.q))
    turn = rotations.standardize_quaternion(turn)
    state["peg_turn"] = rotations.quaternion_to_axis_angle(turn)
    return state


def turn_peg(state: State) -> Tensor:
    """(N, 3) radians: twice the turn that the peg lacks."""
    return 2 * state["peg_turn"]


def before_hole(state: State) -> Tensor:
    """(N, 3) metres: where the tool brings the peg before the hole, 1.5 times the missing way."""
    return state["tool"] + 1.5 * (state["outside"] - state["object"])


def aligned(state: State) -> Tensor:
    """(N,) bool: the peg is held on the hole's axis and is turned as the hole is."""
    on_axis = state["grasped"] & (state["aside"] < 0.01)
    return on_axis & (norm(state["peg_turn"]) < 0.15)


def left_to_align(state: State) -> Tensor:
    """(N,) metres: head or centre of the peg to the hole's axis, and the turn that it lacks."""
    return state["aside"] + TURN * norm(state["peg_turn"])


# ---- SimplerEnv's tasks ----
def observe_bridge(env: BaseEnv) -> State:
    """The source object is at its goal when its lower side is on the target's upper side."""
    source = env.objs[env.source_obj_name]
    target = env.objs[env.target_obj_name]
    # (3,): the sizes of both objects.
    size = env.episode_model_bbox_sizes[env.source_obj_name].float()
    under = env.episode_model_bbox_sizes[env.target_obj_name].float()
    height = (size + under)[2] / 2
    goal = target.pose.p + up(height.expand(len(target.pose.p)))
    # Each finger is 1 cm thick.
    width = size[1] + 0.021
    # A square object looks the same after a quarter turn, any other after half a turn.
    period = torch.pi / 2 if size[0] == size[1] else torch.pi
    grasped = env.agent.is_grasping(source)
    return observe_arm(env, WIDOWX, source.pose, goal, grasped, width, period)


def bridge_movable(env: BaseEnv) -> list[Actor]:
    """Source and target. In the sink the source alone, because the basket stays in its place."""
    actors = list(env.objs.values())
    return actors[:1] if env.scene_setting == "sink" else actors[:2]


def bridge(
    instruction: str,
    paraphrases: tuple[str, ...],
    clearance: float,
    near: float,
    place_length: float,
    pace: tuple[float, ...],
    max_episode_steps: int = 60,
    grid: int = 24,
) -> Task:
    """One of SimplerEnv's tasks, seen through the env's own camera.

    The four share their length scales, except that of placing. Arguments: see `place_on` and
    `Task`.
    """
    return Task(
        instruction=instruction,
        paraphrases=paraphrases,
        stage_table=(
            *pick(0.22, 0.055, 0.03),
            *place_on(0.155, place_length, clearance, near),
        ),
        observe=observe_bridge,
        max_episode_steps=max_episode_steps,
        pace=pace,
        arm=WIDOWX,
        movable=bridge_movable,
        grid=grid,
    )


# ---- cameras ----
# Near views, in which the object spans at least 8 pixels.
NEAR_VIEWS: Views = (
    ((0.0, 0.62, 0.32), (0.0, 0.0, 0.165), 0.82),
    ((0.62, 0.0, 0.32), (0.0, 0.0, 0.165), 0.82),
)


def around(x: float, z: float, fov: float, side: int = 1) -> Views:
    """Two wide views of the table around (x, 0, z): from one side, and from the front.

    x, z: metres. fov: vertical field of view of the first (rad). side: 1 or -1, which side.
    """
    centre = (x, 0.0, z)
    beside = ((x, 1.25 * side, 0.6), centre, fov)
    front = ((x + 1.1, 0.0, 0.55), centre, 1.2 * fov)
    return beside, front


# ---- the table ----
# The first two numbers of `pick` and `place_on` are length scales L_k (m).
# L_k is about the median of the stage's distance where the expert enters the stage.
TASKS: dict[str, Task] = {
    "PickCube-v1": Task(
        instruction="pick up the red cube and move it to the green ball",
        paraphrases=(
            "move the red cube to the green ball",
            "grab the red block and bring it to the green sphere",
            "take the cube to the ball",
        ),
        stage_table=(
            *pick(0.17, 0.08, reach=to_grip),
            Stage(
                name="transport",
                entry=lifted,
                distance=to_goal,
                length=0.17,
                target=straight,
                gripper=gripper(-1.0),
            ),
            Stage(
                name="place",
                entry=held_near_goal,
                distance=left_to_rest,
                length=0.05,
                target=straight,
                gripper=gripper(-1.0),
            ),
        ),
        observe=observe_pick_cube,
        max_episode_steps=50,
        pace=(8, 3, 4, 3),
        views=NEAR_VIEWS,
        movable=lambda env: [env.cube, env.goal_site],
    ),
    "StackCube-v1": Task(
        instruction="stack the red cube on the green cube",
        paraphrases=(
            "put the red block on top of the green block",
            "place the red cube onto the green one",
            "pile red on green",
        ),
        stage_table=(
            *pick(0.25, 0.08),
            *place_on(0.17, 0.04, clearance=0.03, near=0.03),
        ),
        observe=observe_stack_cube,
        max_episode_steps=50,
        pace=(9, 3, 7, 4),
        views=around(0.0, 0.06, 0.23),
        wide=True,
        movable=lambda env: [env.cubeA, env.cubeB],
    ),
    "PushCube-v1": Task(
        instruction="push the blue cube to the target",
        paraphrases=(
            "shove the blue block onto the target",
            "move the blue cube forward to the red circle",
            "push the cube to the goal",
        ),
        stage_table=push("push"),
        observe=observe_push,
        max_episode_steps=50,
        pace=(7, 3),
        views=around(0.13, 0.04, 0.22),
        wide=True,
        movable=lambda env: [env.obj, env.goal_region],
    ),
    "PullCube-v1": Task(
        instruction="pull the blue cube to the target",
        paraphrases=(
            "drag the blue block onto the target",
            "draw the blue cube back to the red circle",
            "pull the cube to the goal",
        ),
        stage_table=push("pull"),
        observe=observe_push,
        max_episode_steps=50,
        pace=(7, 4),
        views=around(-0.13, 0.04, 0.22),
        wide=True,
        movable=lambda env: [env.obj, env.goal_region],
    ),
    "LiftPegUpright-v1": Task(
        instruction="lift the peg and stand it upright on the table",
        paraphrases=(
            "put the peg upright",
            "stand the peg up on its end",
            "raise the stick until it stands",
        ),
        # A loose grip (0.2) lets the peg turn between the fingers.
        # Turning the hand itself takes too long, at 0.04 rad per step.
        stage_table=(
            *pick(0.19, 0.07),
            Stage(
                name="upright",
                entry=lifted,
                distance=lambda state: state["tilt"],
                length=1.4,
                target=rise_higher,
                gripper=gripper(0.2),
            ),
            Stage(
                name="place",
                entry=lambda state: state["tilt"] < 0.2,
                distance=to_goal,
                length=0.02,
                target=rise,
                gripper=gripper(0.2),
            ),
        ),
        observe=observe_lift_peg,
        max_episode_steps=50,
        pace=(8, 4, 12, 3),
        views=around(0.0, 0.13, 0.32),
        wide=True,
        movable=lambda env: [env.peg],
        # The env's own check can pass tilted pegs, so evaluation reports the true angle.
        report=("tilt",),
    ),
    "PlaceSphere-v1": Task(
        instruction="put the blue ball into the bin",
        paraphrases=(
            "place the blue sphere in the bin",
            "drop the ball into the box",
            "move the blue ball to the bin",
        ),
        stage_table=(
            *pick(0.17, 0.08, reach=to_grip),
            *place_on(0.15, 0.03, clearance=0.03, near=0.02),
        ),
        observe=observe_place_sphere,
        max_episode_steps=50,
        pace=(8, 3, 7, 5),
        views=NEAR_VIEWS,
        movable=lambda env: [env.obj, env.bin],
    ),
    "PegInsertionSide-v1": Task(
        instruction="insert the peg into the hole of the box",
        paraphrases=(
            "put the peg in the hole",
            "push the orange end of the stick into the box",
            "plug the peg into the box",
        ),
        stage_table=(
            *pick(0.33, 0.08),
            Stage(
                name="align",
                entry=lifted,
                distance=left_to_align,
                length=0.2,
                target=before_hole,
                gripper=gripper(-1.0),
                turn=turn_peg,
            ),
            Stage(
                name="insert",
                entry=aligned,
                distance=lambda state: state["depth"] + state["aside"],
                length=0.14,
                target=lambda state: state["tool"] + state["onward"],
                gripper=gripper(-1.0),
                turn=turn_peg,
            ),
        ),
        observe=observe_peg_insertion,
        max_episode_steps=100,
        pace=(16, 3, 12, 13),
        views=around(0.0, 0.08, 0.36, side=-1),
        wide=True,
        movable=lambda env: [env.peg, env.box],
    ),
    "PutCarrotOnPlateInScene-v1": bridge(
        instruction="put carrot on plate",
        paraphrases=(
            "place the carrot on the plate",
            "move the carrot onto the dish",
            "carrot to plate",
        ),
        clearance=0.05,
        # Success reaches as far as 0.081 m.
        near=0.085,
        place_length=0.094,
        pace=(6.5, 3, 4, 6),
    ),
    "PutSpoonOnTableClothInScene-v1": bridge(
        instruction="put the spoon on the towel",
        paraphrases=(
            "place the spoon onto the cloth",
            "lay the spoon on the blue towel",
            "spoon to towel",
        ),
        clearance=0.05,
        # Success reaches as far as 0.074 m: the spoon may lie over the towel's rim.
        near=0.08,
        place_length=0.09,
        pace=(6, 4, 4, 3),
    ),
    "StackGreenCubeOnYellowCubeBakedTexInScene-v1": bridge(
        instruction="stack the green block on the yellow block",
        paraphrases=(
            "put the green cube on top of the yellow cube",
            "place the green block onto the yellow one",
            "pile up the blocks",
        ),
        clearance=0.05,
        near=0.03,
        place_length=0.028,
        pace=(6, 3, 7, 3),
    ),
    "PutEggplantInBasketScene-v1": bridge(
        instruction="put eggplant into yellow basket",
        paraphrases=(
            "place the eggplant in the basket",
            "move the aubergine to the yellow basket",
            "eggplant to basket",
        ),
        clearance=0.1,
        # Success comes before the eggplant lies in the basket.
        near=0.1,
        place_length=0.13,
        max_episode_steps=120,
        pace=(6, 3, 6, 4),
        grid=64,
    ),
}

# SimplerEnv's own names.
ALIASES = {
    "widowx_carrot_on_plate": "PutCarrotOnPlateInScene-v1",
    "widowx_spoon_on_towel": "PutSpoonOnTableClothInScene-v1",
    "widowx_stack_cube": "StackGreenCubeOnYellowCubeBakedTexInScene-v1",
    "widowx_put_eggplant_in_basket": "PutEggplantInBasketScene-v1",
}


# ---- look-up ----
def env_ids(text: str) -> list[str]:
    """The env ids of a comma-separated list. SimplerEnv's names become ManiSkill's.

    Raises UserError on a name without an entry in TASKS, with the nearest known names.
    """
    names = [name.strip() for name in text.split(",")]
    ids = [ALIASES.get(name, name) for name in names]
    for name in ids:
        if name in TASKS:
            continue
        if name in REGISTERED_ENVS:
            what = "ManiSkill knows it, TASKS in world/tasks.py does not yet"
        else:
            near = difflib.get_close_matches(name, [*TASKS, *ALIASES], n=3, cutoff=0.3)
            what = f"the nearest known: {', '.join(near or TASKS)}"
        raise UserError(
            f"no task for --env-id {name!r}: {what}. docs/tasks.md adds one in 35 lines"
        )
    return ids


def require_pace(task: Task, flag: str) -> None:
    """Raises UserError where a flag needs the task's `pace`, and the table has none."""
    if len(task.pace) != len(task.stages):
        raise UserError(
            f"{flag} needs the pace of this task in world/tasks.py: benchmark/expert.py measures it"
        )


def get_task(env_id: str) -> Task:
    """The entry of one env id or SimplerEnv name. Raises UserError as `env_ids` does."""
    return TASKS[env_ids(env_id)[0]]
