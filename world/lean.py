"""One env on a CPU without ManiSkill's batched tensors: the same numbers in a third of the time.

ManiSkill computes on tensors with one row per env. With one env, calling torch costs more than the
arithmetic. The classes here compute on numpy arrays without the batch axis. Each operation is
ManiSkill's own, in its order and in float32, so each result is equal to the bit.
tests/test_lean.py plays whole episodes of every task against ManiSkill's classes.

Positions are (3,) in metres. Quaternions are (4,), (w, x, y, z). Poses are (7,), position first.
"""

import numpy as np
import sapien
import torch
from mani_skill.agents.controllers.pd_ee_pose import PDEEPoseController
from mani_skill.agents.controllers.pd_joint_pos import PDJointPosMimicController
from mani_skill.utils.structs.actor import Actor
from mani_skill.utils.structs.pose import Pose

from stare_utils import Tensor

# Row i of a quaternion product is the left factor's entry i, times entries of the right factor.
PRODUCT_ORDER = np.array([[0, 1, 2, 3], [1, 0, 3, 2], [2, 3, 0, 1], [3, 2, 1, 0]])
PRODUCT_SIGNS = np.array(
    [[1, 1, 1, 1], [-1, 1, -1, 1], [-1, 1, 1, -1], [-1, -1, 1, 1]], dtype=np.float32
)
CONJUGATE = np.array([1, -1, -1, -1], dtype=np.float32)


# ---- rotations and poses, as in mani_skill.utils.geometry.rotation_conversions ----
def multiply(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The product of two quaternions."""
    rows = a[:, None] * (PRODUCT_SIGNS * b[PRODUCT_ORDER])
    return rows[0] + rows[1] + rows[2] + rows[3]


def positive(q: np.ndarray) -> np.ndarray:
    """The same rotation with w >= 0."""
    return -q if q[0] < 0 else q


def rotate(q: np.ndarray, point: np.ndarray) -> np.ndarray:
    """A point (3,) turned by a quaternion."""
    point = np.concatenate([np.zeros(1, np.float32), point])
    return multiply(multiply(q, point), q * CONJUGATE)[1:]


def compose(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The pose b, given in the frame of the pose a."""
    q = positive(multiply(a[3:], b[3:]))
    return np.concatenate([a[:3] + rotate(a[3:], b[:3]), q])


def inverse(pose: np.ndarray) -> np.ndarray:
    """The inverse pose."""
    q = pose[3:] * CONJUGATE
    return np.concatenate([rotate(q, -pose[:3]), q])


def euler_quaternion(angles: np.ndarray) -> np.ndarray:
    """The quaternion of turns about x, y and z. angles: (3,) radians."""
    # numpy's sines and roots differ from torch's in the last bit.
    angles = torch.from_numpy(angles)
    (cx, cy, cz) = torch.cos(angles).numpy()
    (sx, sy, sz) = torch.sin(angles).numpy()
    about_x = [[1, 0, 0], [0, cx, -sx], [0, sx, cx]]
    about_y = [[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]]
    about_z = [[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]]
    turns = torch.from_numpy(np.array([[about_x], [about_y], [about_z]], np.float32))
    # On some processors numpy's matrix product differs from torch's in the last bit.
    m = (turns[0] @ turns[1] @ turns[2])[0].numpy()

    one = np.float32(1)
    squares = [
        one + m[0, 0] + m[1, 1] + m[2, 2],
        one + m[0, 0] - m[1, 1] - m[2, 2],
        one - m[0, 0] + m[1, 1] - m[2, 2],
        one - m[0, 0] - m[1, 1] + m[2, 2],
    ]
    size = torch.sqrt(torch.from_numpy(np.maximum(squares, 0))).numpy()
    # The largest entry is the divisor, because the others may be near zero.
    i = size.argmax()
    square = size[i] * size[i]
    candidates = [
        [square, m[2, 1] - m[1, 2], m[0, 2] - m[2, 0], m[1, 0] - m[0, 1]],
        [m[2, 1] - m[1, 2], square, m[1, 0] + m[0, 1], m[0, 2] + m[2, 0]],
        [m[0, 2] - m[2, 0], m[1, 0] + m[0, 1], square, m[1, 2] + m[2, 1]],
        [m[1, 0] - m[0, 1], m[2, 0] + m[0, 2], m[2, 1] + m[1, 2], square],
    ]
    return positive(np.array(candidates[i]) / (np.float32(2) * size[i]))


def array(pose: sapien.Pose) -> np.ndarray:
    """A pose of SAPIEN as (7,)."""
    return np.concatenate([pose.p, pose.q])


# ---- the arm and the fingers ----
def clip_and_scale(action: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """An action, clipped to [-1, 1], in units of low to high. As in mani_skill.utils.gym_utils."""
    half = np.float32(0.5)
    return half * (high + low) + half * (high - low) * action.clip(-1, 1)


class LeanArm(PDEEPoseController):
    """ManiSkill's controller of the tool's pose, whose actions are in the axes of the base."""

    def set_action(self, action: Tensor) -> None:
        """Drives the joints to where the tool's pose has moved by `action` (1, 6)."""
        move, turn = self.move_and_turn(action[0].numpy())
        base = array(self.root_link._objs[0].entity_pose)
        if self.config.use_target:
            before = self._target_pose.raw_pose[0].numpy()
        else:
            tool = array(self.ee_link._objs[0].entity_pose)
            before = compose(inverse(base), tool)
        q = positive(multiply(euler_quaternion(turn), before[3:]))
        target = np.concatenate([before[:3] + move, q])
        self._target_pose = Pose(torch.from_numpy(target)[None])
        self.drive_to(target)

    def move_and_turn(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Metres (3,) and radians (3,) of an action (6,)."""
        if not self._normalize_action:
            return action[:3], action[3:]
        low = self.action_space_low.numpy()[:3]
        high = self.action_space_high.numpy()[:3]
        move = clip_and_scale(action[:3], low, high)
        turn = action[3:]
        # numpy's norm differs from torch's in the last bit.
        length = torch.linalg.norm(torch.from_numpy(turn)[None], axis=1).numpy()[0]
        if length > 1:
            turn = turn * (np.float32(1) / length)
        # ManiSkill scales turns by their lower bound.
        return move, turn * np.float32(self.config.rot_lower)

    def drive_to(self, pose: np.ndarray) -> None:
        """Sets the joints' targets to those that bring the tool to a pose, if there are any."""
        kinematics = self.kinematics
        now = self.articulation._objs[0].qpos
        joints, success, _ = kinematics.pmodel.compute_inverse_kinematics(
            kinematics.end_link_idx,
            sapien.Pose(pose[:3], pose[3:]),
            initial_qpos=now[kinematics.pmodel_active_joint_indices.numpy()],
            active_qmask=kinematics.qmask.numpy(),
            max_iterations=100,
        )
        if success:
            targets = joints[kinematics.pmodel_controlled_joint_indices.numpy()]
        else:
            targets = now[self.active_joint_indices.numpy()]
        for joint, target in zip(self.joints, targets.astype(np.float32)):
            joint._objs[0].drive_target = target[None]


class LeanFingers(PDJointPosMimicController):
    """ManiSkill's controller of two fingers, of which the second does what the first does."""

    def set_action(self, action: Tensor) -> None:
        """Drives both fingers to the opening that `action` (1, 1) commands."""
        low = self.action_space_low.numpy()
        high = self.action_space_high.numpy()
        opening = clip_and_scale(action[0].numpy(), low, high)
        for joint in self.joints:
            joint._objs[0].drive_target = opening


class LeanGrasp:
    """Comes before a robot's class: a grasp is computed once per step, and only at contact."""

    def is_grasping(self, object: Actor, **limits: float) -> Tensor:
        """(1,) bool: ManiSkill's test of the contact forces. limits: other ones than its own."""
        if limits:
            return super().is_grasping(object, **limits)
        if object not in self.grasps:
            self.grasps[object] = self.compute_grasp(object)
        return self.grasps[object].clone()

    def compute_grasp(self, object: Actor) -> Tensor:
        """(1,) bool. Without contact of both fingers there is no force, and so no grasp."""
        entity = object._bodies[0].entity
        touching = set()
        for contact in self.scene.px.get_contacts():
            pair = [body.entity for body in contact.bodies]
            if entity in pair:
                touching.update(pair)
        fingers = (self.finger1_link, self.finger2_link)
        if all(finger._bodies[0].entity in touching for finger in fingers):
            return super().is_grasping(object)
        return torch.zeros(1, dtype=torch.bool)


def is_delta_pose(controller) -> bool:
    """Whether LeanArm computes what this controller does."""
    config = controller.config
    aligned = "root_translation:root_aligned_body_rotation"
    return type(controller) is PDEEPoseController and config.use_delta and config.frame == aligned


def is_mirrored(controller) -> bool:
    """Whether LeanFingers computes what this controller does."""
    if type(controller) is not PDJointPosMimicController or controller.config.use_delta:
        return False
    same = (controller._multiplier == 1).all() and (controller._offset == 0).all()
    return bool(same) and controller._normalize_action


# ---- the env ----
class LeanEnv:
    """Comes before ManiSkill's env class, for one env on a CPU."""

    def _load_agent(self, options: dict, *poses) -> None:
        super()._load_agent(options, *poses)
        robot = self.agent
        robot.grasps = {}
        robot.__class__ = type("LeanRobot", (LeanGrasp, type(robot)), {})
        # The controllers keep what they hold, and compute it in the lean way from now on.
        parts = robot.controller.controllers
        if is_delta_pose(parts["arm"]):
            parts["arm"].__class__ = LeanArm
        if is_mirrored(parts["gripper"]):
            parts["gripper"].__class__ = LeanFingers

    def _initialize_episode(self, env_idx: Tensor, options: dict) -> None:
        super()._initialize_episode(env_idx, options)
        self.agent.grasps.clear()

    def set_state_dict(self, state: dict, *env_idx) -> None:
        """Puts a recorded state back, in which the fingers are elsewhere."""
        super().set_state_dict(state, *env_idx)
        self.agent.grasps.clear()

    def _step_action(self, action: Tensor) -> Tensor:
        """One action: the controllers set targets, then the physics runs."""
        self.agent.grasps.clear()
        if action.isnan().any():
            raise ValueError(f"the action is not a number: {action}")
        self.agent.set_action(action)
        for _ in range(self._sim_steps_per_control):
            self.scene.px.step()
        return action

    def _get_obs_with_sensor_data(self, info: dict, apply_texture_transforms: bool = True) -> dict:
        """The pictures. No policy here reads ManiSkill's state observation."""
        return {"sensor_data": self._get_obs_sensor_data(apply_texture_transforms)}

    def _green_sceen_rgb(self, rgb: Tensor, segmentation: Tensor, overlay_img: Tensor) -> Tensor:
        """Pastes SimplerEnv's photograph behind the robot and the objects, (1, H, W, 3) uint8."""
        if self.rgb_overlay_mode != "background":
            return super()._green_sceen_rgb(rgb, segmentation, overlay_img)
        # A look-up table over segmentation ids is faster than torch.isin.
        kept = torch.zeros(int(segmentation.max()) + 1, dtype=torch.bool)
        ids = self._segmentation_ids_to_keep
        kept[ids[ids < len(kept)]] = True
        return torch.where(kept[segmentation.int()], rgb, overlay_img)
