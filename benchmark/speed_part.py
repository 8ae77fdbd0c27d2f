"""One figure of one part, with the code of any commit: benchmark/speed.py calls it.

    python benchmark/speed_part.py env --env-id StackCube-v1 --num-envs 16
        env steps per second of 16 env processes with random actions, pictures included
    python benchmark/speed_part.py env --code OLD
        the same with the code in the folder OLD, from commit 1eeaf82 on

The last line of the output is the figure.
"""

import functools
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

# The variable is read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import tyro

ROOT = Path(__file__).parent.parent
# PickCube-v1's policy decodes five tokens of seven.
ACTIVE = torch.tensor([True, True, True, False, False, True, True])


def median_ms(work: Callable[[], object], repeats: int = 9) -> float:
    """The median of the milliseconds of some calls. The first call is not counted."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


# ---- envs ----
def envs_of(env_id: str, num_envs: int, **kwargs):
    """The vectorised envs. kwargs: of make_envs."""
    # Commit 1eeaf82 has them in another file.
    if Path(sys.path[0], "world").is_dir():
        from world.vector import make_envs
    else:
        from stare_utils import make_envs

    return make_envs(env_id, num_envs, 0, **kwargs)


def env_rate(env_id: str, num_envs: int, **kwargs) -> float:
    """Env steps per second of all processes together, with random actions."""
    envs = envs_of(env_id, num_envs, **kwargs)
    envs.reset(seed=0)
    generator = torch.Generator().manual_seed(0)
    rounds = max(1, 60 // num_envs)

    def play() -> None:
        for _ in range(rounds):
            envs.step(0.3 * torch.randn(num_envs, 7, generator=generator))

    milliseconds = median_ms(play, 3)
    envs.close()
    return 1000 * rounds * num_envs / milliseconds


def start_seconds(env_id: str, num_envs: int) -> float:
    """Seconds until all env processes have begun their first episodes."""
    start = time.perf_counter()
    envs = envs_of(env_id, num_envs)
    envs.reset(seed=0)
    seconds = time.perf_counter() - start
    envs.close()
    return seconds


def floor_ms(env_id: str, num_envs: int) -> float:
    """Milliseconds of physics and inverse kinematics in C++, which nothing here changes."""
    from world.envs import StageEnv

    torch.set_num_threads(1)
    env = StageEnv(env_id, 1, "cpu", 0, render=False)
    env.reset(seed=0)
    base = env.base
    arm = base.agent.controller.controllers["arm"]
    kinematics = arm.kinematics
    joints = kinematics.articulation._objs[0]

    def step() -> None:
        kinematics.pmodel.compute_inverse_kinematics(
            kinematics.end_link_idx,
            arm.ee_link._objs[0].entity_pose,
            initial_qpos=joints.qpos,
            active_qmask=kinematics.qmask.numpy(),
            max_iterations=100,
        )
        for _ in range(base._sim_steps_per_control):
            base.scene.px.step()

    return median_ms(step, 100)


# ---- the policy ----
def load(env_id: str):
    """Model and processor of the task's shipped policy."""
    # This registers the model.
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import vla  # noqa: F401

    folder = ROOT / "checkpoints" / f"{env_id}__sft" / "checkpoint"
    if not folder.is_dir():
        folder = folder.parent
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device), AutoProcessor.from_pretrained(folder)


def random_pictures(B: int) -> torch.Tensor:
    """Random pictures of B observations, (B, 128, 128, 3) uint8."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (B, 128, 128, 3), dtype=torch.uint8, generator=generator)


def make_inputs(model, processor, env_id: str, rgb: torch.Tensor):
    """The model's inputs for B observations with these pictures."""
    B = len(rgb)
    texts = ["pick up the red cube and move it to the green ball"] * B
    stats = model.config.norm_stats[env_id]["proprio"]
    return processor(rgb, texts, torch.zeros(B, 8), stats, model.device)


def sample_ms(env_id: str, B: int) -> float:
    """Milliseconds of B sampled actions in one torch thread, as in a roll-out."""
    from sta_ppo import sample_action

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model, processor = load(env_id)
    inputs = make_inputs(model, processor, env_id, random_pictures(B))
    milliseconds = median_ms(lambda: sample_action(model, inputs, ACTIVE))
    torch.set_num_threads(num_threads)
    return milliseconds


def update_ms(env_id: str, B: int) -> float:
    """Milliseconds of one minibatch of B: inputs, log-probabilities and gradients."""
    from sta_ppo import action_logprob

    model, processor = load(env_id)
    bins = torch.randint(0, 256, (B, 7), device=model.device)
    rgb = random_pictures(B)

    def update() -> None:
        inputs = make_inputs(model, processor, env_id, rgb)
        logprob, *_ = action_logprob(model, inputs, bins, ACTIVE)
        logprob.sum().backward()

    return median_ms(update, 5)


def arithmetic_ms(env_id: str, num_envs: int) -> float:
    """Milliseconds of one core for the model's arithmetic in a step: acting, and two epochs.

    They are its floating-point operations, at the rate of a large matrix product.
    """
    from torch.utils.flop_counter import FlopCounterMode

    from sta_ppo import action_logprob, sample_action

    torch.set_num_threads(1)
    model, processor = load(env_id)
    inputs = make_inputs(model, processor, env_id, random_pictures(8))
    bins = torch.zeros(8, 7, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        sample_action(model, inputs, ACTIVE)
        for _ in range(2):
            logprob, *_ = action_logprob(model, inputs, bins, ACTIVE)
            logprob.sum().backward()
    operations = counter.get_total_flops() / 8
    matrix = torch.randn(1024, 1024)
    rate = 2 * 1024**3 / median_ms(lambda: matrix @ matrix)
    return operations / rate


def main(
    part: Annotated[
        Literal["env", "physics", "stock", "start", "sample", "update", "floor", "arithmetic"],
        tyro.conf.Positional,
    ],
    env_id: str = "PickCube-v1",
    num_envs: int = 1,
    code: Path = ROOT,
    render: Literal["auto", "cpu", "gpu"] = "auto",
) -> None:
    """Prints a figure.

    part: env, env steps/s. physics: env steps/s without pictures. stock: env steps/s of ManiSkill's
    own classes and meshes. start: seconds. All others: milliseconds.
    num_envs: env processes; the batch of sample and update.
    code: the folder of the code to measure. render: where today's code draws pictures.
    """
    sys.path.insert(0, str(code.resolve()))
    # The env processes import from the present folder.
    os.chdir(code)
    if render != "auto":
        from world.assets import choose_renderer

        choose_renderer(render)
    measures = {
        "env": env_rate,
        "physics": functools.partial(env_rate, render=False),
        "stock": functools.partial(env_rate, full_meshes=True),
        "start": start_seconds,
        "sample": sample_ms,
        "update": update_ms,
        "floor": floor_ms,
        "arithmetic": arithmetic_ms,
    }
    print(f"{measures[part](env_id, num_envs):.4g}")


if __name__ == "__main__":
    tyro.cli(main)
