"""What a step costs here, against the usual ways.

    python benchmark/speed.py
        PickCube-v1, 8 envs: about ten minutes on two CPU cores, which must be idle otherwise
    python benchmark/speed.py --no-growth
        without the plot of how cost grows
    python benchmark/speed.py --compile
        with torch.compile, which takes minutes to begin

It writes the table of docs/speed.md, docs/speed.jsonl and docs/speed.svg:
roll-out: the loop of sta_ppo.py, with sampled actions, 8 env processes and light meshes. One half
    of the envs simulates while the policy acts for the other half.
in step: the same without that overlap. Its parts are physics (envs without rendering), rendering
    (what it adds), model (sample_action on the same observations) and rest (what is left).
stock: the roll-out on ManiSkill's own meshes.
ppo_rgb: like ManiSkill's ppo_rgb.py, with stock camera and meshes, a Gaussian policy, and a CNN
    that has as many parameters as the VLA.
generate: transformers' generate for the same seven tokens, against sample_action.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

# The variable is read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

sys.path.insert(0, str(Path(__file__).parent.parent))
import gymnasium as gym
import torch
import tyro
from torch import nn

import vla
from plumbing.checkpoint import load_policy, task_stats
from plumbing.run import one_line_errors
from sta_ppo import action_logprob, sample_action
from world.tasks import get_task
from world.vector import make_envs

DOCS = Path(__file__).parent.parent / "docs"


@dataclass
class Args:
    env_id: str = "PickCube-v1"
    """a task with a shipped checkpoint"""
    num_envs: int = 8
    """env processes"""
    steps: int = 50
    """env steps per env in each measurement"""
    repeats: int = 3
    """measurements of each figure, whose median is reported"""
    compile: bool = False
    """measure sampling with torch.compile too, which takes minutes"""
    growth: bool = True
    """measure how cost grows too"""


def timed(work: Callable) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def median_seconds(work: Callable, repeats: int) -> float:
    """The median of the seconds of some calls."""
    return statistics.median(timed(work) for _ in range(repeats))


# ---- the roll-out ----
class Rollout:
    """sta_ppo.py's roll-out, and its parts."""

    def __init__(self, args: Args, model, processor, **kwargs):
        """kwargs: of make_envs."""
        device = next(model.parameters()).device
        stats = task_stats(model, args.env_id)
        instruction = get_task(args.env_id).instruction
        n_bins = model.config.n_action_bins
        self.T = args.steps
        self.model = model
        self.codec = vla.Codec(processor, instruction, stats, n_bins, device)
        self.active = ~vla.constant_dims(stats["action"])
        self.envs = make_envs(args.env_id, args.num_envs, 1, **kwargs)
        self.obs, _ = self.envs.reset(seed=1)

    def act(self, obs: dict) -> torch.Tensor:
        """Sampled actions for observations."""
        bins, _, _ = sample_action(self.model, self.codec.inputs(obs), self.active)
        return self.codec.actions(bins)

    def whole(self) -> None:
        """As in sta_ppo.py: one half of the envs simulates while the policy acts for the other."""
        for t in range(self.T + 1):
            for half in self.envs.halves:
                if t > 0:
                    obs, *_ = self.envs.receive(half)
                    for name, x in obs.items():
                        self.obs[name][half] = x
                if t < self.T:
                    obs = {name: x[half] for name, x in self.obs.items()}
                    self.envs.send(half, self.act(obs))

    def in_step(self) -> None:
        """All envs move, then the policy acts for all of them."""
        for _ in range(self.T):
            self.obs, *_ = self.envs.step(self.act(self.obs))

    def model_only(self) -> None:
        """The policy acts, and no env moves."""
        for _ in range(self.T):
            self.act(self.obs)

    def envs_only(self) -> None:
        """The envs move at random."""
        for _ in range(self.T):
            action = 0.3 * torch.randn(self.envs.num_envs, 7)
            self.obs, *_ = self.envs.step(action)


def seconds_of(args: Args, model, processor, part: str, **kwargs) -> float:
    """The median seconds of a part of the roll-out in new envs. kwargs: of make_envs."""
    rollout = Rollout(args, model, processor, **kwargs)
    seconds = median_seconds(getattr(rollout, part), args.repeats)
    rollout.envs.close()
    return seconds


# ---- like ManiSkill's ppo_rgb.py ----
class StockEnv(gym.Wrapper):
    """ManiSkill's single env on the CPU, as gymnasium's AsyncVectorEnv wants it.

    It has its own camera and meshes.
    """

    def __init__(self, env_id: str):
        torch.set_num_threads(1)
        env = gym.make(
            env_id,
            num_envs=1,
            obs_mode="rgb",
            control_mode="pd_ee_delta_pose",
            sim_backend="physx_cpu",
            render_backend="gpu" if torch.cuda.is_available() else "cpu",
        )
        super().__init__(env)
        self.observation_space = gym.spaces.Box(0, 255, (128, 128, 3), "uint8")
        self.action_space = self.env.unwrapped.single_action_space

    def image(self, obs: dict):
        """The picture (128, 128, 3) of an observation."""
        return obs["sensor_data"]["base_camera"]["rgb"][0].numpy()

    def reset(self, **kwargs):
        obs, _ = self.env.reset(seed=kwargs.get("seed"))
        return self.image(obs), {}

    def step(self, action):
        action = torch.as_tensor(action)[None]
        obs, reward, terminated, truncated, _ = self.env.step(action)
        return self.image(obs), float(reward), bool(terminated), bool(truncated), {}


def build_cnn(num_params: int) -> nn.Sequential:
    """The CNN of ppo_rgb.py, pictures (B, 3, 128, 128) -> mean actions (B, 7)."""
    convolutions = nn.Sequential(
        nn.Conv2d(3, 32, 8, 4),
        nn.ReLU(),
        nn.Conv2d(32, 64, 4, 2),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, 1),
        nn.ReLU(),
        nn.Flatten(),
    )
    features = 64 * 12 * 12
    # Each hidden unit has a weight per feature and eight more numbers.
    left = num_params - sum(p.numel() for p in convolutions.parameters())
    width = max(8, left // (features + 8))
    return nn.Sequential(
        convolutions,
        nn.Linear(features, width),
        nn.ReLU(),
        nn.Linear(width, 7),
    )


def ppo_rgb_seconds(args: Args, num_params: int, device: torch.device) -> float:
    """The median seconds of the same number of env steps in the style of ppo_rgb.py."""
    makers = [lambda: StockEnv(args.env_id)] * args.num_envs
    envs = gym.vector.AsyncVectorEnv(makers, context="forkserver")
    net = build_cnn(num_params).to(device)
    obs, _ = envs.reset(seed=1)

    @torch.no_grad()
    def run() -> None:
        nonlocal obs
        for _ in range(args.steps):
            pictures = torch.from_numpy(obs).to(device).movedim(-1, 1)
            action = torch.normal(net(pictures.float() / 255), 0.5).clamp(-1, 1)
            obs, *_ = envs.step(action.cpu().numpy())

    seconds = median_seconds(run, args.repeats)
    envs.close()
    return seconds


# ---- one action ----
@torch.no_grad()
def generate(model, inputs: dict) -> torch.Tensor:
    """Seven tokens that transformers' generate samples over the whole vocabulary.

    OpenVLA's predict_action asks the Llama inside for them in this way.
    """
    llama = model.language_model
    text = llama.get_input_embeddings()(inputs["input_ids"])
    images = model.projector(model.vision_backbone(inputs["pixel_values"]))
    proprio = model.proprio_projector(inputs["proprio"])[:, None]
    embeds = torch.cat([text[:, :1], images, proprio, text[:, 1:]], 1)
    mask = inputs["attention_mask"]
    inserted = mask.new_ones(len(mask), model.num_prefix())
    mask = torch.cat([mask[:, :1], inserted, mask[:, 1:]], 1)
    return llama.generate(
        inputs_embeds=embeds,
        attention_mask=mask,
        max_new_tokens=7,
        min_new_tokens=7,
        do_sample=True,
        pad_token_id=0,
    )


def sampling_ms(args: Args, model, inputs: dict, active: torch.Tensor) -> dict[str, float]:
    """Milliseconds of an action for all envs, by sample_action and by generate."""
    everything = torch.ones(7, dtype=torch.bool)
    ways = {
        "sample_ms": lambda: sample_action(model, inputs, active),
        "sample_all_7_ms": lambda: sample_action(model, inputs, everything),
        "generate_ms": lambda: generate(model, inputs),
    }
    return {name: 1000 * median_seconds(work, 9) for name, work in ways.items()}


def compiled_sampling(model, inputs: dict, active: torch.Tensor) -> dict[str, float]:
    """Seconds of the first action with torch.compile, and milliseconds of the later ones."""
    compiled = torch.compile(model, dynamic=True)

    def sample() -> None:
        sample_action(compiled, inputs, active)

    seconds = timed(sample)
    return {"compile_s": seconds, "sample_compiled_ms": 1000 * median_seconds(sample, 9)}


# ---- growth ----
# Points (what grows, milliseconds).
Line = list[tuple[float, float]]


def rollout_growth(args: Args, model, processor) -> dict[str, Line]:
    """Milliseconds of a roll-out per env step, by env processes and by horizon."""
    by_envs = []
    for n in (1, 2, 4, 8, 16):
        seconds = seconds_of(replace(args, num_envs=n, repeats=1), model, processor, "whole")
        by_envs.append((n, 1000 * seconds / n / args.steps))
    by_horizon = []
    for horizon in (25, 50, 100, 200):
        longer = replace(args, steps=horizon, repeats=1)
        seconds = seconds_of(longer, model, processor, "whole", max_episode_steps=horizon)
        by_horizon.append((horizon, 1000 * seconds / args.num_envs / horizon))
    return {"envs": by_envs, "horizon": by_horizon}


def tokens_growth(model, inputs: dict) -> dict[str, Line]:
    """Milliseconds of an action by its sampled tokens, per observation of the inputs."""
    B = len(inputs["input_ids"])
    line = []
    for tokens in range(1, 8):
        active = torch.arange(7) < tokens
        seconds = median_seconds(lambda a=active: sample_action(model, inputs, a), 9)
        line.append((tokens, 1000 / B * seconds))
    return {"tokens": line}


def parameters_growth(inputs: dict) -> dict[str, Line]:
    """Milliseconds of an action and of its update by the model's parameters, per observation."""
    B = len(inputs["input_ids"])
    device = inputs["input_ids"].device
    active = torch.ones(7, dtype=torch.bool)
    bins = torch.zeros(B, 7, dtype=torch.long, device=device)
    sampling = []
    updating = []
    for width, layers in ((64, 2), (128, 3), (256, 6), (512, 8)):
        config = vla.tiny_config(width=width, layers=layers)
        model = vla.OpenVLAForActionPrediction(config).to(device).eval()
        millions = sum(p.numel() for p in model.parameters()) / 1e6

        def update(model=model) -> None:
            logprob, *_ = action_logprob(model, inputs, bins, active)
            logprob.sum().backward()

        seconds = median_seconds(lambda m=model: sample_action(m, inputs, active), 5)
        sampling.append((millions, 1000 / B * seconds))
        updating.append((millions, 1000 / B * median_seconds(update, 5)))
    return {"parameters": sampling, "parameters, update": updating}


def measure_growth(args: Args, model, processor) -> dict[str, Line]:
    """Milliseconds against what makes them grow."""
    found = rollout_growth(args, model, processor)
    rgb = torch.zeros(args.num_envs, 128, 128, 3, dtype=torch.uint8)
    texts = [get_task(args.env_id).instruction] * args.num_envs
    stats = task_stats(model, args.env_id)
    device = next(model.parameters()).device
    proprio = torch.zeros(args.num_envs, 8)
    inputs = processor(rgb, texts, proprio, stats["proprio"], device)
    return found | tokens_growth(model, inputs) | parameters_growth(inputs)


def plot(found: dict[str, Line]) -> None:
    """Writes docs/speed.svg."""
    # Only this plot needs matplotlib.
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    labels = {
        "envs": "roll-out, env processes",
        "horizon": "roll-out, horizon",
        "tokens": "an action, its tokens",
        "parameters": "parameters, millions",
    }
    figure, axes = plt.subplots(1, 4, figsize=(12, 2.8), layout="constrained")
    for axis, (name, label) in zip(axes, labels.items(), strict=True):
        axis.plot(*zip(*found[name]), "o-", label="sampling")
        axis.set(xlabel=label, ylabel="ms per env step")
        if name == "parameters":
            axis.plot(*zip(*found["parameters, update"]), "s-", label="update, one pass")
            axis.set(xscale="log", yscale="log")
            axis.legend(fontsize=7)
        else:
            axis.set_ylim(bottom=0)
    figure.savefig(DOCS / "speed.svg", metadata={"Date": None})


# ---- the table ----
def rollout_figures(args: Args, model, processor, num_params: int) -> tuple[dict, Rollout]:
    """Env steps per second in each style and shares of the parts; and the roll-out, closed."""
    rollout = Rollout(args, model, processor)
    # The first roll-out allocates and is not counted.
    rollout.whole()
    seconds = {}
    for part in ("whole", "in_step", "model_only", "envs_only"):
        seconds[part] = median_seconds(getattr(rollout, part), args.repeats)
    rollout.envs.close()
    physics = seconds_of(args, model, processor, "envs_only", render=False)
    stock = seconds_of(args, model, processor, "whole", full_meshes=True)
    peer = ppo_rgb_seconds(args, num_params, next(model.parameters()).device)
    steps = args.num_envs * args.steps
    in_step = seconds["in_step"]
    envs_only = seconds["envs_only"]
    model_only = seconds["model_only"]
    figures = {
        "steps_per_s": steps / seconds["whole"],
        "steps_per_s_in_step": steps / in_step,
        "steps_per_s_stock": steps / stock,
        "steps_per_s_ppo_rgb": steps / peer,
        "share_physics": physics / in_step,
        "share_rendering": (envs_only - physics) / in_step,
        "share_model": model_only / in_step,
        "share_rest": 1 - (envs_only + model_only) / in_step,
    }
    return figures, rollout


def write_table(row: dict) -> None:
    """Prints a row as a table and writes it into docs/speed.md."""
    lines = ["| what | figure |", "|---|---|"]
    for name, value in row.items():
        shown = f"{value:.3g}" if isinstance(value, float) else value
        lines.append(f"| `{name}` | {shown} |")
    table = "\n".join(lines)
    print(table)
    page = DOCS / "speed.md"
    before, _, rest = page.read_text().partition("<!-- table -->\n")
    after = rest.partition("<!-- /table -->")[2]
    page.write_text(f"{before}<!-- table -->\n{table}\n<!-- /table -->{after}")


def main(args: Args) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    checkpoint = DOCS.parent / "checkpoints" / f"{args.env_id}__sft"
    model, processor, _ = load_policy(str(checkpoint), device)
    num_params = sum(p.numel() for p in model.parameters())
    # As in the roll-out of the scripts, torch gets one thread.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    figures, rollout = rollout_figures(args, model, processor, num_params)
    inputs = rollout.codec.inputs(rollout.obs)
    row = {
        "env_id": args.env_id,
        "num_envs": args.num_envs,
        "device": str(device),
        "cores": threads,
        "parameters": num_params,
        **figures,
        **sampling_ms(args, model, inputs, rollout.active),
        "command": " ".join(["python", *sys.argv]),
    }
    if args.compile:
        row |= compiled_sampling(model, inputs, rollout.active)
    torch.set_num_threads(threads)
    write_table(row)
    if args.growth:
        row["growth"] = measure_growth(args, model, processor)
        plot(row["growth"])
    (DOCS / "speed.jsonl").write_text(json.dumps(row) + "\n")


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Args))
