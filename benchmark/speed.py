"""What a step costs here, against the usual ways: the table of docs/speed.md, docs/speed.jsonl and docs/speed.svg.

    python benchmark/speed.py                    # PickCube-v1, 8 envs; about ten minutes on two CPU cores, which must be idle otherwise
    python benchmark/speed.py --no-growth        # without the plot of how cost grows; --compile: with torch.compile, which takes minutes to begin

roll-out     sta_ppo.py's loop: sampled actions, 8 env processes, light meshes; half of the envs compute while the model acts for the others
in step      the same without that overlap. Its parts: physics = envs without rendering, rendering = what it adds, model = sample_action on the same
             observations, rest = what is left
stock        the same loop on ManiSkill's own meshes
ppo_rgb      ManiSkill's ppo_rgb.py in spirit: stock camera and meshes, a CNN with as many parameters as the VLA, a Gaussian policy
generate     transformers' generate for the same seven tokens, against sample_action"""
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import stare_utils  # before torch  # isort: skip
import gymnasium as gym
import torch
import tyro
from torch import nn

import vla
from sta_ppo import action_logprob, load_policy, sample_action, task_stats

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
    """measurements of each figure: the median is told"""
    compile: bool = False
    """measure sampling with torch.compile too: it takes minutes"""
    growth: bool = True
    """measure how cost grows too"""


class StockEnv(gym.Wrapper):
    """ManiSkill's env of one, on the CPU, with its own camera and meshes, as gymnasium's AsyncVectorEnv wants it."""

    def __init__(self, env_id: str):
        torch.set_num_threads(1)
        super().__init__(gym.make(env_id, num_envs=1, obs_mode="rgb", control_mode="pd_ee_delta_pose", sim_backend="physx_cpu",
                                  render_backend="gpu" if torch.cuda.is_available() else "cpu"))  # fmt: skip
        self.observation_space = gym.spaces.Box(0, 255, (128, 128, 3), "uint8")
        self.action_space = self.env.unwrapped.single_action_space

    def image(self, obs: dict):
        return obs["sensor_data"]["base_camera"]["rgb"][0].numpy()

    def reset(self, **kwargs):
        return self.image(self.env.reset(seed=kwargs.get("seed"))[0]), {}

    def step(self, action):
        obs, reward, terminated, truncated, _ = self.env.step(torch.as_tensor(action)[None])
        return self.image(obs), float(reward), bool(terminated), bool(truncated), {}


def median(measure, repeats: int) -> float:
    return statistics.median(measure() for _ in range(repeats))


def timed(work) -> float:
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


class Rollout:
    """sta_ppo.py's roll-out, and its parts."""

    def __init__(self, args: Args, model, processor, **kwargs):
        self.args, self.model, self.processor = args, model, processor
        self.device, self.stats = next(model.parameters()).device, task_stats(model, args.env_id)
        self.active, self.task = ~vla.constant_dims(self.stats["action"]), stare_utils.get_task(args.env_id)
        self.envs = stare_utils.make_envs(args.env_id, args.num_envs, 1, **kwargs)
        self.obs = self.envs.reset(seed=1)[0]

    def act(self, obs: dict) -> torch.Tensor:
        inputs = self.processor(obs["rgb"], [self.task.instruction] * len(obs["rgb"]), obs["proprio"], self.stats.get("proprio"), self.device)
        bins = sample_action(self.model, inputs, self.active)[0]
        return vla.detokenize_actions(bins, self.stats["action"])

    def whole(self) -> None:
        """As in sta_ppo.py: the policy acts for one half of the envs while the other computes."""
        for _, rows, obs, *_ in self.envs.play(lambda t, rows: self.act({name: x[rows] for name, x in self.obs.items()}), self.args.steps):
            for name, x in obs.items():
                self.obs[name][rows] = x

    def in_step(self) -> None:
        """All envs, then the policy, then all envs."""
        for _ in range(self.args.steps):
            self.obs = self.envs.step(self.act(self.obs))[0]

    def model_only(self) -> None:
        for _ in range(self.args.steps):
            self.act(self.obs)

    def envs_only(self) -> None:
        action = torch.zeros(self.args.num_envs, 7)
        for _ in range(self.args.steps):
            self.obs = self.envs.step(action + 0.3 * torch.randn_like(action))[0]


def ppo_rgb(args: Args, params: int, device: torch.device) -> float:
    """Seconds of the same number of env steps in the style of ManiSkill's ppo_rgb.py."""
    envs = gym.vector.AsyncVectorEnv([lambda: StockEnv(args.env_id) for _ in range(args.num_envs)], context="forkserver")
    convs = nn.Sequential(nn.Conv2d(3, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU(), nn.Conv2d(64, 64, 3, 1), nn.ReLU(), nn.Flatten())
    width = (params - sum(p.numel() for p in convs.parameters())) // (64 * 12 * 12 + 8)
    net = nn.Sequential(convs, nn.Linear(64 * 12 * 12, max(8, width)), nn.ReLU(), nn.Linear(max(8, width), 7)).to(device)
    state = {"obs": envs.reset(seed=1)[0]}

    @torch.no_grad()
    def run() -> None:
        for _ in range(args.steps):
            mean = net(torch.from_numpy(state["obs"]).to(device).movedim(-1, 1).float() / 255)
            state["obs"] = envs.step(torch.normal(mean, 0.5).clamp(-1, 1).cpu().numpy())[0]

    seconds = median(lambda: timed(run), args.repeats)
    envs.close()
    return seconds


@torch.no_grad()
def generate(model, inputs: dict) -> torch.Tensor:
    """Seven sampled tokens by transformers' generate, as OpenVLA's predict_action asks for them: over the whole vocabulary, by the Llama inside."""
    llama, mask = model.language_model, inputs["attention_mask"]
    text, images = llama.get_input_embeddings()(inputs["input_ids"]), model.projector(model.vision_backbone(inputs["pixel_values"]))
    embeds = torch.cat([text[:, :1], images, model.proprio_projector(inputs["proprio"])[:, None], text[:, 1:]], 1)
    mask = torch.cat([mask[:, :1], mask.new_ones(len(mask), model.num_prefix()), mask[:, 1:]], 1)
    return llama.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=7, min_new_tokens=7, do_sample=True, pad_token_id=0)


def growth(args: Args, model, processor) -> dict[str, list[tuple[float, float]]]:
    """Milliseconds against what makes them grow: roll-out per env step by envs and by horizon, an action by its tokens and by parameters, and its update."""
    found = {"envs": [], "horizon": [], "tokens": [], "parameters": [], "parameters, update": []}
    for n in (1, 2, 4, 8, 16):
        rollout = Rollout(Args(args.env_id, n, args.steps), model, processor)
        found["envs"].append((n, 1000 * timed(rollout.whole) / n / args.steps))
        rollout.envs.close()
    for horizon in (25, 50, 100, 200):
        rollout = Rollout(Args(args.env_id, args.num_envs, horizon), model, processor, max_episode_steps=horizon)
        found["horizon"].append((horizon, 1000 * timed(rollout.whole) / args.num_envs / horizon))
        rollout.envs.close()
    obs = {"rgb": torch.zeros(args.num_envs, 128, 128, 3, dtype=torch.uint8), "proprio": torch.zeros(args.num_envs, 8)}
    stats, texts = task_stats(model, args.env_id), [stare_utils.get_task(args.env_id).instruction] * args.num_envs
    inputs = processor(obs["rgb"], texts, obs["proprio"], stats["proprio"], next(model.parameters()).device)
    for tokens in range(1, 8):
        active = torch.arange(7) < tokens
        found["tokens"].append((tokens, 1000 / args.num_envs * median(lambda a=active: timed(lambda: sample_action(model, inputs, a)), 9)))
    for width, layers in ((64, 2), (128, 3), (256, 6), (512, 8)):
        larger = vla.OpenVLAForActionPrediction(vla.tiny_config(width=width, layers=layers)).to(inputs["input_ids"].device).eval()
        millions, active = sum(p.numel() for p in larger.parameters()) / 1e6, torch.ones(7, dtype=torch.bool)
        bins = torch.zeros(args.num_envs, 7, dtype=torch.long, device=inputs["input_ids"].device)
        sample = lambda m=larger, a=active: timed(lambda: sample_action(m, inputs, a))  # noqa: E731
        update = lambda m=larger, a=active, b=bins: timed(lambda: action_logprob(m, inputs, b, a)[0].sum().backward())  # noqa: E731
        found["parameters"].append((millions, 1000 / args.num_envs * median(sample, 5)))
        found["parameters, update"].append((millions, 1000 / args.num_envs * median(update, 5)))
    return found


def plot(found: dict) -> None:
    """docs/speed.svg."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(12, 2.8), layout="constrained")
    for axis, key, label in zip(axes, ("envs", "horizon", "tokens", "parameters"),
                                ("roll-out, env processes", "roll-out, horizon", "an action, its tokens", "parameters, millions")):  # fmt: skip
        axis.plot(*zip(*found[key]), "o-", label="sampling")
        if key == "parameters":
            axis.plot(*zip(*found["parameters, update"]), "s-", label="update, one pass")
            axis.set(xscale="log", yscale="log")
            axis.legend(fontsize=7)
        axis.set(xlabel=label, ylabel="ms per env step")
        axis.set_ylim(bottom=None if key == "parameters" else 0)
    figure.savefig(DOCS / "speed.svg", metadata={"Date": None})


def main(args: Args) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, processor, _ = load_policy(str(DOCS.parent / "checkpoints" / f"{args.env_id}__sft"), device)
    params, threads, steps = sum(p.numel() for p in model.parameters()), torch.get_num_threads(), args.num_envs * args.steps
    torch.set_num_threads(1)  # as in the roll-out
    rollout = Rollout(args, model, processor)
    rollout.whole()  # warm
    parts = (rollout.whole, rollout.in_step, rollout.model_only, rollout.envs_only)
    whole, in_step, model_only, envs_only = (median(lambda work=work: timed(work), args.repeats) for work in parts)
    obs = rollout.obs
    rollout.envs.close()
    blind = Rollout(args, model, processor, render=False)
    physics = median(lambda: timed(blind.envs_only), args.repeats)
    blind.envs.close()
    stock = Rollout(args, model, processor, full_meshes=True)
    stock_whole = median(lambda: timed(stock.whole), args.repeats)
    stock.envs.close()
    peer = ppo_rgb(args, params, device)
    inputs = processor(obs["rgb"], [rollout.task.instruction] * args.num_envs, obs["proprio"], rollout.stats["proprio"], device)
    sample = median(lambda: timed(lambda: sample_action(model, inputs, rollout.active)), 9)
    full = median(lambda: timed(lambda: sample_action(model, inputs, torch.ones(7, dtype=torch.bool))), 9)
    generated = median(lambda: timed(lambda: generate(model, inputs)), 9)
    compiled = torch.compile(model, dynamic=True)
    compiling = timed(lambda: sample_action(compiled, inputs, rollout.active)) if args.compile else None
    sample_compiled = median(lambda: timed(lambda: sample_action(compiled, inputs, rollout.active)), 9) if args.compile else None
    torch.set_num_threads(threads)
    row = {
        "env_id": args.env_id, "num_envs": args.num_envs, "device": str(device), "cores": threads, "parameters": params,
        "steps_per_s": steps / whole, "steps_per_s_in_step": steps / in_step, "steps_per_s_stock": steps / stock_whole,
        "steps_per_s_ppo_rgb": steps / peer,
        "share_physics": physics / in_step, "share_rendering": (envs_only - physics) / in_step, "share_model": model_only / in_step,
        "share_rest": 1 - (envs_only + model_only) / in_step, "sample_ms": 1000 * sample, "sample_all_7_ms": 1000 * full,
        "generate_ms": 1000 * generated, "command": " ".join(["python", *sys.argv]),
    }  # fmt: skip
    if args.compile:
        row |= {"compile_s": compiling, "sample_compiled_ms": 1000 * sample_compiled}
    shown = {key: f"{value:.3g}" if isinstance(value, float) else value for key, value in row.items()}
    table = "\n".join(["| what | figure |", "|---|---|", *(f"| `{key}` | {value} |" for key, value in shown.items())])
    print(table)
    page = DOCS / "speed.md"
    before, rest = page.read_text().split("<!-- table -->\n")[0], page.read_text().split("<!-- /table -->")[1]
    page.write_text(f"{before}<!-- table -->\n{table}\n<!-- /table -->{rest}")
    if args.growth:
        row["growth"] = growth(args, model, processor)
        plot(row["growth"])
    (DOCS / "speed.jsonl").write_text(json.dumps(row) + "\n")


if __name__ == "__main__":
    with stare_utils.one_line_errors():
        main(tyro.cli(Args))
