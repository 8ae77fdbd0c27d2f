"""Helpers and session fixtures: a tiny model and its checkpoint, invented demonstrations and roll-outs, simulators, one real chain of runs."""
import json
import os
import subprocess
import sys
from pathlib import Path

# SimplerEnv's assets: in MS_ASSET_DIR, else beside the repository, else where ManiSkill puts them. mani_skill reads the variable when imported
os.environ.setdefault("MS_ASSET_DIR", str(max([Path(__file__).resolve().parents[2] / "shared/simpler_assets", Path.home() / ".maniskill"], key=Path.is_dir)))

import stare_utils  # before torch: it makes idle OpenMP threads sleep  # isort: skip
import h5py
import hypothesis
import numpy as np
import pytest
import torch
import tyro
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import sft
import vla

ROOT = Path(__file__).resolve().parent.parent
TASK = stare_utils.TASKS["PickCube-v1"]
STATS = {  # dimensions 3 and 4 never vary
    "action": {"q01": [-1.0, -1.0, -1.0, 0.0, 0.0, -1.0, -1.0], "q99": [1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0], "mask": [True] * 7},
    "proprio": {"mean": [0.0] * 8, "std": [1.0] * 8},
}
hypothesis.settings.register_profile("stare", deadline=None, derandomize=True, database=None, max_examples=60)
hypothesis.settings.load_profile("stare")


def pytest_collection_modifyitems(items):
    """Of two test processes one takes a whole file, for what its tests share; the files that share the chain of runs below stay together."""
    for item in items:
        item.add_marker(pytest.mark.xdist_group("chain" if item.path.stem in ("test_docs", "test_rollouts", "test_scripts") else item.path.stem))


def cli(script, *args, cwd, **env):
    """`python script args` in the folder cwd, as the README writes it."""
    environ = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", **env}
    return subprocess.run([sys.executable, ROOT / script, *map(str, args)], cwd=cwd, env=environ, capture_output=True, text=True)


def output_of(script, *args, cwd, **env) -> str:
    """What a run that must succeed prints."""
    done = cli(script, *args, cwd=cwd, **env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def call(script, *args):
    """Runs a script's main in this process."""
    script.main(tyro.cli(script.Args, args=[str(arg) for arg in args]))


def tensors(checkpoint: Path, state: bool = False) -> dict:
    """All weights of a checkpoint folder, the value head's too; with `state` the optimiser's moments as well."""
    files = [file for file in sorted(checkpoint.glob("*.safetensors")) if state or file.stem != "training_state"]
    return {f"{file.name}/{name}": value for file in files for name, value in load_file(file).items()}


def differing(a: Path, b: Path) -> list[str]:
    """Names of the weights, and moments, in which two checkpoints are not the same bit for bit."""
    a, b = tensors(a, True), tensors(b, True)
    assert a.keys() == b.keys() and a
    return [name for name in a if not torch.equal(a[name], b[name])]


def scalars(run: Path) -> dict[str, list[float]]:
    """All that a run wrote to TensorBoard: values in the order of steps."""
    events = EventAccumulator(str(run)).Reload()
    return {key: [event.value for event in events.Scalars(key)] for key in events.Tags()["scalars"]}


def record_steps(monkeypatch) -> list[tuple[list[float], list[list[torch.Tensor]]]]:
    """Filled at each step of AdamW: the groups' learning rates, and of each parameter value and gradient (zeros where it has none)."""
    seen = []

    class Spy(torch.optim.AdamW):
        def step(self, *args):
            params = [p for group in self.param_groups for p in group["params"]]
            found = [[x.detach().clone() for x in (p, torch.zeros_like(p) if p.grad is None else p.grad)] for p in params]
            seen.append(([group["lr"] for group in self.param_groups], found))
            return super().step(*args)

    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    return seen


def tiny_model(width: int = 64, layers: int = 2):
    """The tiny architecture, smaller still, with a head sharp enough that its actions differ, and its processor."""
    torch.manual_seed(0)
    model = vla.OpenVLAForActionPrediction(vla.tiny_config(width=width, layers=layers)).eval()
    model.language_model.lm_head.weight.data *= 10
    model.config.norm_stats = {"PickCube-v1": STATS}
    return model, vla.tiny_processor([TASK.instruction])


def frames(n: int, seed: int = 0) -> dict:
    """Invented observations."""
    g = torch.Generator().manual_seed(seed)
    return {"rgb": torch.randint(0, 256, (n, 128, 128, 3), generator=g, dtype=torch.uint8), "proprio": torch.randn(n, 8, generator=g)}


def needs_assets(env_id: str, slow: bool = False):
    """The env id as a parameter of a test that is skipped where SimplerEnv's assets are missing."""
    import mani_skill

    missing = stare_utils.get_task(env_id).grid and not (mani_skill.ASSET_DIR / "tasks/bridge_v2_real2sim_dataset").is_dir()
    marks = [pytest.mark.skipif(missing, reason="SimplerEnv's assets are neither in MS_ASSET_DIR nor in ../shared/simpler_assets")]
    return pytest.param(env_id, marks=[*marks, pytest.mark.slow] if slow else marks)


def prompt(processor, obs: dict, text: list[str] | None = None):
    return processor(obs["rgb"], text or [TASK.instruction] * len(obs["rgb"]), obs["proprio"], STATS["proprio"])


def write_demos(path: Path, env_id="PickCube-v1", control_mode=TASK.arm.control_mode, actions=True, lengths=(6, 9), size=128) -> Path:
    """Invented demonstrations in ManiSkill's format, of pictures of size x size: path (.h5) and the .json beside it."""
    rng, episodes = np.random.default_rng(0), []
    with h5py.File(path, "w") as file:
        for i, length in enumerate(lengths):
            obs, group = frames(length + 1, seed=i), file.create_group(f"traj_{i}")
            group["obs/sensor_data/base_camera/rgb"], group["obs/proprio"] = obs["rgb"][:, :size, :size].numpy(), obs["proprio"].numpy()
            group["geometry"] = rng.uniform(-0.2, 0.2, (length, 8)).astype(np.float32)
            if actions:
                group["actions"] = (rng.uniform(-1, 1, (length, 7)) * stare_utils.TASKS.get(env_id, TASK).arm.limit).astype(np.float32)
            episodes.append({"episode_id": i, "episode_seed": i, "control_mode": control_mode, "elapsed_steps": length, "success": True})
    path.with_suffix(".json").write_text(json.dumps({"env_info": {"env_id": env_id}, "episodes": episodes}))
    return path


def invent_rollouts(init_seeds) -> list[dict]:
    """From each initial state: one that never grasps, one that drops the cube, and two that succeed at different cost."""
    rollouts = []
    labels = ([0] * 9, [0, 0, 1, 1, 2, 2, 0, 0], [0, 0, 0, 1, 1, 2, 2, 3, 3], [0, 0, 0, 0, 1, 2, 2, 2, 3, 3, 3])
    for init_seed in init_seeds:
        for i, label in enumerate(labels):
            g = torch.Generator().manual_seed(1000 * len(rollouts) + 7)
            bins = torch.randint(0, 256, (len(label), 7), generator=g)
            bins[:, 3:5] = 128
            rollouts.append({**frames(len(label), seed=len(rollouts)), "bins": bins, "stage": torch.tensor(label), "init_seed": int(init_seed),
                             "distance": (1 + i) * torch.rand(len(label), generator=g), "success": i > 1})  # fmt: skip
    return rollouts


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """Run folder with a checkpoint of the tiny model and a separator, not trained."""
    run, model = tmp_path_factory.mktemp("checkpoint"), tiny_model()
    sft.save_checkpoint(run, *model, {"method": "SFT", "seed": 1, "env_id": "PickCube-v1"}, {}, heads={"separator": torch.nn.Linear(64, 4)})
    return run


@pytest.fixture(scope="session")
def envs():
    """Two simulators as training uses them, with a horizon of 30."""
    envs = stare_utils.make_envs("PickCube-v1", 2, seed=0, max_episode_steps=30)
    yield envs
    envs.close()


@pytest.fixture(scope="session")
def workspace(tmp_path_factory) -> Path:
    """Where the chain of runs below has its runs/."""
    return tmp_path_factory.mktemp("workspace")


@pytest.fixture(scope="session")
def sft_run(workspace) -> Path:
    """python sft.py --env-id PickCube-v1, tiny."""
    output_of("sft.py", "--env-id", "PickCube-v1", "--num-demos", 3, "--demo-slip", 0.1, "--demo-pause", 0.1, "--num-updates", 4, "--batch-size", 8,
              "--num-envs", 2, "--num-eval-episodes", 0, "--no-cuda", cwd=workspace)  # fmt: skip
    (run,) = (workspace / "runs").glob("PickCube-v1__sft__1__*")
    return run


@pytest.fixture(scope="session")
def tpo_run(workspace, sft_run) -> Path:
    """python sta_tpo.py --env-id PickCube-v1, tiny; it samples two roll-outs of six: an untrained policy would never make a pair."""
    run, (init_seed,) = workspace / "runs/PickCube-v1__sta_tpo__1__0", np.random.default_rng(1).choice(stare_utils.TRAIN_SEEDS, 1, replace=False)
    (run / "rollouts").mkdir(parents=True)
    for i, rollout in enumerate(invent_rollouts([init_seed])):
        np.savez(run / f"rollouts/{init_seed}_{i}.npz", **{name: np.asarray(value) for name, value in rollout.items()})
    output_of("sta_tpo.py", "--resume", "--env-id", "PickCube-v1", "--num-initial-states", 1, "--rollouts-per-state", 6, "--num-envs", 2, "--cost-coef", 0,
              "--batch-size", 4, "--num-eval-episodes", 0, "--output-dir", run, "--no-cuda", cwd=workspace)  # fmt: skip
    return run


PPO = ("--env-id", "PickCube-v1", "--num-envs", 2, "--num-steps", 25, "--num-minibatches", 2, "--critic-warmup", 2, "--no-anneal-lr", "--no-cuda")
PPO_UPDATE = 50  # env steps


@pytest.fixture(scope="session")
def ppo_run(workspace, tpo_run) -> Path:
    """python sta_ppo.py --env-id PickCube-v1, tiny: four updates, with an evaluation at the end."""
    output_of("sta_ppo.py", *PPO, "--total-timesteps", 4 * PPO_UPDATE, "--num-eval-episodes", 2, cwd=workspace)
    (run,) = (workspace / "runs").glob("PickCube-v1__sta_ppo__1__*")
    return run
