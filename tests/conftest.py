"""Helpers and session fixtures that the tests share.

They are a tiny model and its checkpoint, invented demonstrations and roll-outs, two simulators, and
one real chain of runs.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

# Idle OpenMP threads must sleep. The variable is read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# SimplerEnv's assets are beside the repository, or else where ManiSkill puts them. mani_skill reads
# the variable when it is imported.
if Path(__file__).resolve().parents[2].joinpath("shared/simpler_assets").is_dir():
    beside = Path(__file__).resolve().parents[2] / "shared/simpler_assets"
    os.environ.setdefault("MS_ASSET_DIR", str(beside))

import h5py
import hypothesis
import numpy as np
import pytest
import torch
import tyro
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import vla
from plumbing.checkpoint import save_checkpoint
from world.tasks import TASKS, TRAIN_SEEDS, get_task
from world.vector import make_envs

ROOT = Path(__file__).resolve().parent.parent
TASK = TASKS["PickCube-v1"]
# Dimensions 3 and 4 of an action never vary.
STATS = {
    "action": {
        "q01": [-1.0, -1.0, -1.0, 0.0, 0.0, -1.0, -1.0],
        "q99": [1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0],
        "mask": [True] * 7,
    },
    "proprio": {"mean": [0.0] * 8, "std": [1.0] * 8},
}
# The test files that share the chain of runs below.
CHAIN = ("test_docs", "test_rollouts", "test_scripts")
hypothesis.settings.register_profile(
    "stare", deadline=None, derandomize=True, database=None, max_examples=60
)
hypothesis.settings.load_profile("stare")


def pytest_collection_modifyitems(items):
    """Gives one test process a whole file, or all files of the chain, because their tests share."""
    for item in items:
        group = "chain" if item.path.stem in CHAIN else item.path.stem
        item.add_marker(pytest.mark.xdist_group(group))


# ---- running a script ----
# A result of eval.py: one episode is solved, one is lost in transport.
RESULT = {
    "method": "SFT",
    "env_id": "PickCube-v1",
    "success_once": 0.5,
    "success_at_end": 0.5,
    "stage_reach_rate": [1.0, 1.0, 0.5, 0.5],
    "stage_steps": [10.0, 5.0, 20.0, 1.0],
    "episodes": [
        {
            "seed": 0,
            "success_once": True,
            "success_at_end": True,
            "furthest_stage": 4,
            "episode_len": 50,
        },
        {
            "seed": 1,
            "success_once": False,
            "success_at_end": False,
            "furthest_stage": 2,
            "episode_len": 50,
        },
    ],
    "command": "python eval.py",
    "commit": "",
}


def cli(script, *args, cwd, **env):
    """Runs `python script args` in the folder cwd, as the README writes it."""
    command = [sys.executable, ROOT / script, *map(str, args)]
    environ = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", **env}
    return subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True)


def output_of(script, *args, cwd, **env) -> str:
    """What a run that must succeed prints."""
    done = cli(script, *args, cwd=cwd, **env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def call(script, *args):
    """Runs a script's main in this process."""
    script.main(tyro.cli(script.Args, args=[str(arg) for arg in args]))


# ---- reading what a run wrote ----
def tensors(checkpoint: Path, state: bool = False) -> dict:
    """All weights of a checkpoint folder, the value head's too.

    state: with the optimiser's moments as well.
    """
    found = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        if state or file.stem != "training_state":
            found |= {f"{file.name}/{name}": value for name, value in load_file(file).items()}
    return found


def differing(a: Path, b: Path) -> list[str]:
    """Names of the weights and moments in which two checkpoints are not the same bit for bit."""
    a, b = tensors(a, True), tensors(b, True)
    assert a.keys() == b.keys() and a
    return [name for name in a if not torch.equal(a[name], b[name])]


def scalars(run: Path) -> dict[str, list[float]]:
    """All that a run wrote to TensorBoard: values in the order of steps."""
    events = EventAccumulator(str(run)).Reload()
    names = events.Tags()["scalars"]
    return {name: [event.value for event in events.Scalars(name)] for name in names}


def record_steps(monkeypatch) -> list[tuple[list[float], list[list[torch.Tensor]]]]:
    """A list that each step of AdamW adds to: the groups' learning rates, and all parameters.

    Of each parameter it has the value before the step and the gradient (zeros where it has none).
    """
    seen = []

    class Spy(torch.optim.AdamW):
        def step(self, *args):
            found = []
            for p in [p for group in self.param_groups for p in group["params"]]:
                grad = torch.zeros_like(p) if p.grad is None else p.grad
                found.append([p.detach().clone(), grad.detach().clone()])
            seen.append(([group["lr"] for group in self.param_groups], found))
            return super().step(*args)

    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    return seen


# ---- inventing a model and its data ----
def tiny_model(width: int = 64, layers: int = 2):
    """The tiny architecture, made smaller still, and its processor.

    Its head is sharp enough that its actions differ.
    """
    torch.manual_seed(0)
    config = vla.tiny_config(width=width, layers=layers)
    model = vla.OpenVLAForActionPrediction(config).eval()
    model.language_model.lm_head.weight.data *= 10
    model.config.norm_stats = {"PickCube-v1": STATS}
    return model, vla.tiny_processor([TASK.instruction])


def frames(n: int, seed: int = 0) -> dict:
    """Invented observations."""
    g = torch.Generator().manual_seed(seed)
    rgb = torch.randint(0, 256, (n, 128, 128, 3), generator=g, dtype=torch.uint8)
    return {"rgb": rgb, "proprio": torch.randn(n, 8, generator=g)}


def needs_assets(env_id: str, slow: bool = False):
    """The env id as a parameter of a test that is skipped where SimplerEnv's assets are missing."""
    import mani_skill

    assets = mani_skill.ASSET_DIR / "tasks/bridge_v2_real2sim_dataset"
    missing = get_task(env_id).grid and not assets.is_dir()
    reason = "SimplerEnv's assets are neither in MS_ASSET_DIR nor in ../shared/simpler_assets"
    marks = [pytest.mark.skipif(missing, reason=reason)]
    if slow:
        marks.append(pytest.mark.slow)
    return pytest.param(env_id, marks=marks)


def prompt(processor, obs: dict, text: list[str] | None = None):
    """The model's inputs for observations."""
    text = text or [TASK.instruction] * len(obs["rgb"])
    return processor(obs["rgb"], text, obs["proprio"], STATS["proprio"])


def write_demos(
    path: Path,
    env_id="PickCube-v1",
    control_mode=TASK.arm.control_mode,
    actions=True,
    lengths=(6, 9),
    size=128,
) -> Path:
    """Invented demonstrations in ManiSkill's format: `path` (.h5) and the .json beside it.

    Their pictures have size x size pixels.
    """
    rng = np.random.default_rng(0)
    limit = TASKS.get(env_id, TASK).arm.limit
    episodes = []
    with h5py.File(path, "w") as file:
        for i, length in enumerate(lengths):
            obs = frames(length + 1, seed=i)
            group = file.create_group(f"traj_{i}")
            group["obs/sensor_data/base_camera/rgb"] = obs["rgb"][:, :size, :size].numpy()
            group["obs/proprio"] = obs["proprio"].numpy()
            group["geometry"] = rng.uniform(-0.2, 0.2, (length, 8)).astype(np.float32)
            if actions:
                drawn = rng.uniform(-1, 1, (length, 7)) * limit
                group["actions"] = drawn.astype(np.float32)
            episode = {
                "episode_id": i,
                "episode_seed": i,
                "control_mode": control_mode,
                "elapsed_steps": length,
                "success": True,
            }
            episodes.append(episode)
    written = {"env_info": {"env_id": env_id}, "episodes": episodes}
    path.with_suffix(".json").write_text(json.dumps(written))
    return path


def invent_rollouts(init_seeds) -> list[dict]:
    """Four roll-outs from each initial state.

    One never grasps, one drops the cube, and two succeed at different cost.
    """
    rollouts = []
    labels = (
        [0] * 9,
        [0, 0, 1, 1, 2, 2, 0, 0],
        [0, 0, 0, 1, 1, 2, 2, 3, 3],
        [0, 0, 0, 0, 1, 2, 2, 2, 3, 3, 3],
    )
    for init_seed in init_seeds:
        for i, label in enumerate(labels):
            g = torch.Generator().manual_seed(1000 * len(rollouts) + 7)
            bins = torch.randint(0, 256, (len(label), 7), generator=g)
            bins[:, 3:5] = 128
            rollout = {
                **frames(len(label), seed=len(rollouts)),
                "bins": bins,
                "stage": torch.tensor(label),
                "init_seed": int(init_seed),
                "distance": (1 + i) * torch.rand(len(label), generator=g),
                "success": i > 1,
            }
            rollouts.append(rollout)
    return rollouts


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """Run folder with a checkpoint of the tiny model and a separator, both untrained."""
    run = tmp_path_factory.mktemp("checkpoint")
    model, processor = tiny_model()
    settings = {"method": "SFT", "seed": 1, "env_id": "PickCube-v1"}
    heads = {"separator": torch.nn.Linear(64, 4)}
    save_checkpoint(run, model, processor, settings, {}, heads=heads)
    return run


@pytest.fixture(scope="session")
def envs():
    """Two simulators as training uses them, with a horizon of 30."""
    envs = make_envs("PickCube-v1", 2, seed=0, max_episode_steps=30)
    yield envs
    envs.close()


# ---- the chain of runs ----
@pytest.fixture(scope="session")
def workspace(tmp_path_factory) -> Path:
    """The folder in which the chain of runs below has its runs/."""
    return tmp_path_factory.mktemp("workspace")


@pytest.fixture(scope="session")
def sft_run(workspace) -> Path:
    """python sft.py --env-id PickCube-v1 from scratch, tiny."""
    flags = (
        "--env-id PickCube-v1 --vla tiny --num-demos 3 --demo-slip 0.1 --demo-pause 0.1 "
        "--num-updates 4 --batch-size 8 --num-envs 2 --num-eval-episodes 0 --no-cuda"
    )
    output_of("sft.py", *flags.split(), cwd=workspace)
    (run,) = (workspace / "runs").glob("PickCube-v1__sft__1__*")
    return run


@pytest.fixture(scope="session")
def tpo_run(workspace, sft_run) -> Path:
    """python sta_tpo.py --env-id PickCube-v1, tiny.

    It samples two roll-outs of six. The other four are invented, because an untrained policy would
    never make a pair.
    """
    run = workspace / "runs/PickCube-v1__sta_tpo__1__0"
    # The initial state that sta_tpo.py will draw.
    (init_seed,) = np.random.default_rng(1).choice(TRAIN_SEEDS, 1, replace=False)
    (run / "rollouts").mkdir(parents=True)
    for i, rollout in enumerate(invent_rollouts([init_seed])):
        arrays = {name: np.asarray(value) for name, value in rollout.items()}
        np.savez(run / f"rollouts/{init_seed}_{i}.npz", **arrays)
    flags = (
        "--resume --env-id PickCube-v1 --num-initial-states 1 --rollouts-per-state 6 --num-envs 2 "
        "--cost-coef 0 --batch-size 4 --num-eval-episodes 0 --no-cuda --output-dir"
    )
    output_of("sta_tpo.py", *flags.split(), run, cwd=workspace)
    return run


PPO = (
    *("--env-id", "PickCube-v1", "--num-envs", 2, "--num-steps", 25, "--num-minibatches", 2),
    *("--critic-warmup", 2, "--no-anneal-lr", "--no-cuda"),
)
PPO_UPDATE = 50  # env steps


@pytest.fixture(scope="session")
def ppo_run(workspace, tpo_run) -> Path:
    """python sta_ppo.py --env-id PickCube-v1, tiny: four updates and an evaluation at the end."""
    flags = ("--total-timesteps", 4 * PPO_UPDATE, "--num-eval-episodes", 2)
    output_of("sta_ppo.py", *PPO, *flags, cwd=workspace)
    (run,) = (workspace / "runs").glob("PickCube-v1__sta_ppo__1__*")
    return run
