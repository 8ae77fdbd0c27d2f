"""STA-PPO, step 3 of IPI: PPO on the task itself, with a potential-based reward for progress inside the present stage.

    python sta_ppo.py --env-id PickCube-v1                    # from the newest STA-TPO (else SFT) run of this env, else the shipped checkpoint
    python sta_ppo.py --env-id PickCube-v1 --reward sparse    # plain PPO, the ablation; --reward dense is ManiSkill's own reward

  r'_t = r_t + w * (gamma * Phi(s_{t+1}) - Phi(s_t)),  Phi(s) = k + phi_k(s),  Phi of a terminal state = 0   (r' is the paper's; k + is ours, docs/sta_ppo.md)
  loss = -mean min(ratio * A, clip(ratio, 1 - eps, 1 + eps) * A) + c_v * mean (V - return)^2 / 2 + c_kl * KL(pi || pi_start)
The ratio is that of the whole action (sum of its tokens' log-probabilities). Deviations from CleanRL's ppo.py and RL4VLA: a truncated episode
is bootstrapped with the value of its final observation, a terminated one is not; advantages are normalised over the whole buffer, once
(or within each stage: --stage-advantage); logged losses are means over the update; the critic is warmed up, its loss not clipped, its learning rate
its own; AdamW (0.9, 0.95), no entropy bonus; episodes begin anew with a roll-out, where the horizon allows. `grep STARE` shows what differs from PPO.
To add a task edit TASKS in stare_utils.py, nothing here, and imitate it first (sft.py).
Letters: T steps of a roll-out, N envs, B batch (minibatch), A action tokens, D hidden width, K stages.
"""
import json
import math
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import stare_utils  # before torch: it makes idle OpenMP threads sleep  # isort: skip
import numpy as np
import torch
import torch.distributed as dist
import tyro
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, set_seed

import vla
from eval import evaluate
from stare_utils import Stop, UserError, make_envs, shape_rewards


@dataclass
class Args:
    seed: int = 1
    """seed of the episodes, sampling and minibatch order"""
    cuda: bool = True
    """train on the GPU if there is one"""
    track: bool = False
    """log to Weights & Biases too (needs `pip install wandb`)"""
    output_dir: str = ""
    """run folder: checkpoint/, TensorBoard files; empty: runs/{env_id}__sta_ppo__{seed}__{time}"""
    resume: bool = False
    """go on from the checkpoint in --output-dir, if there is one"""

    checkpoint: str = ""
    """policy to start from; empty: the newest sta_tpo.py (else sft.py) run of this env under runs/, else the one shipped with the repository"""
    vla: str = ""
    """an OpenVLA instead of --checkpoint: its folder in the published layout, or its hub id, with --unnorm-key"""
    unnorm_key: str = ""
    """of which data set in its `norm_stats` the task's actions are, `bridge_orig` for SimplerEnv's tasks"""
    env_id: str = "PickCube-v1"
    """task"""
    num_envs: int = 8
    """env processes (CPU) or parallel envs (GPU), of each process of a `torchrun` job"""
    backend: Literal["cpu", "cuda"] = "cpu"
    """physics: cpu (one process per env) or cuda (ManiSkill's GPU simulation)"""

    reward: Literal["stare", "sparse", "dense"] = "stare"
    """stare: success plus shaping by the stage potential; sparse: success alone (plain PPO); dense: ManiSkill's normalized_dense, which pays
    every step; it therefore does not end an episode at success, and is divided by the horizon, so that an episode pays 1 at most, as with the others"""
    shaping_weight: float = -1.0
    """w; negative: 1 / K, so that w * Phi in [0, 1] is a first guess of the value; 0 equals --reward sparse bit for bit"""
    potential: Literal["sigmoid", "linear"] = "sigmoid"
    """form of phi_k: the paper's sigmoid(1 - d / L), rescaled, or max(0, 1 - d / L)"""
    potential_across_stages: Literal["offset", "bare"] = "offset"
    """offset: Phi = k + phi_k; bare: phi_k alone, as in the notes on the paper, but rescaled; it falls at each stage switch"""
    silent_stages: str = ""
    """stages, separated by commas, that pay only when they end: Phi = k inside them, nothing for their beginning or their distance (an ablation)"""
    stage_advantage: bool = False
    """normalise advantages within each stage instead of over the whole buffer"""
    stage_source: Literal["rules", "learned"] = "rules"
    """rules read the simulator's state; learned is the separator that sft.py trained on the frozen SFT policy's features: no state, Phi = k alone"""

    total_timesteps: int = 65536
    """env steps in all, rounded up to whole updates"""
    num_steps: int = 100
    """T: env steps per env between updates. New episodes begin every ceil(horizon / T) updates; a run resumed there equals an
    uninterrupted one, on a CPU bit for bit"""
    gamma: float = 0.97
    """discount: a step saved is worth (1 - gamma) V"""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation; at 0.5 --reward sparse learned to stand still on PlaceSphere-v1 (docs/results.md), the stage one did not"""
    num_minibatches: int = 4
    """optimiser steps per epoch; num_envs * num_steps must be a multiple of it"""
    update_epochs: int = 2
    """passes over each roll-out"""
    chunk_size: int = 128
    """steps or frames per forward and backward pass of an update: bounds its memory, changes no result"""
    gradient_checkpointing: bool = False
    """compute a layer's activations anew in the backward pass instead of keeping them: less memory, a third more computation"""
    clip_coef: float = 0.2
    """eps of the clipped ratio"""
    vf_coef: float = 0.5
    """c_v: weight of the value loss"""
    kl_coef: float = 0.0
    """c_kl: weight of the KL to the policy that the run started from; 0 leaves it out"""
    target_kl: float | None = None
    """no further epoch in this update once the KL of an epoch's last minibatch exceeds this; without effect at --update-epochs 1"""
    critic_warmup: int = 2
    """updates in which the VLA's learning rate is 0 while Adam's second moments fill: an untrained critic punishes good actions, and Adam's
    first steps are its largest. All momentum is then forgotten and grows anew: of ten steps or so, the first are small"""
    lora_rank: int = 0
    """0 trains all weights; else LoRA matrices of this rank on the linear layers (not the vocabulary's head), merged into what is written"""
    learning_rate: float = 5e-5
    """AdamW, the VLA"""
    value_learning_rate: float = 1e-3
    """AdamW, value head"""
    anneal_lr: bool = True
    """lower both learning rates linearly to zero at --total-timesteps; a run that is to be resumed beyond needs --no-anneal-lr"""
    max_grad_norm: float = 1.0
    """gradients are clipped to this norm"""

    save_freq: int = 10
    """updates between checkpoints (rounded up to where new episodes begin, see --num-steps)"""
    eval_freq: int = 0
    """updates between evaluations; 0: only at the end"""
    num_eval_episodes: int = 16
    """episodes of each evaluation; 0 leaves it out"""

    # to be filled in runtime
    batch_size: int = 0
    """num_envs * num_steps * processes (computed)"""
    minibatch_size: int = 0
    """batch_size / num_minibatches (computed)"""
    num_iterations: int = 0
    """total_timesteps / batch_size, rounded up (computed)"""


def join_processes(cuda: bool) -> tuple[int, int, torch.device]:
    """Rank, number of processes and device, of a data-parallel job that `torchrun` started or of this process alone. Rank 0 alone prints and writes."""
    rank, world, local = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    cuda = cuda and torch.cuda.is_available()
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(days=7))  # the others wait while rank 0 makes demonstrations or evaluates
        sys.stdout = sys.stdout if rank == 0 else open(os.devnull, "w")
        if cuda:
            torch.cuda.set_device(local)
    return rank, world, torch.device("cuda", local) if cuda else torch.device("cpu")


def sum_over_processes(tensors: list[torch.Tensor | None]) -> None:
    """Sums tensors (None: a weight that has no gradient) over the processes of a data-parallel job, in place."""
    for x in tensors if dist.is_initialized() else ():
        if x is not None:
            dist.all_reduce(x)


def open_run(args, script: str, rank: int, step: int) -> tuple[Path, SummaryWriter | None]:
    """The run folder and, of rank 0, its TensorBoard writer, without what was logged after `step`. Raises UserError when the folder holds a run already."""
    if args.resume and not args.output_dir:
        raise UserError("--resume needs the run's --output-dir")
    name = [args.output_dir or f"runs/{args.env_id}__{script}__{args.seed}__{int(time.time())}"]
    if rank > 0:
        dist.broadcast_object_list(name)  # once rank 0 has made it
        return Path(name[0]), None
    output = Path(name[0])
    output.mkdir(parents=True, exist_ok=True)
    stare_utils.lock_run(output)
    if any(output.iterdir()) and not args.resume:
        raise UserError(f"{output} holds a run already: add --resume to go on with it, or choose another --output-dir")
    if (file := output / "checkpoint" / "args.json").exists():
        before, ignored = json.loads(file.read_text()), ("resume", "checkpoint", "output_dir")
        changed = [f"--{name.replace('_', '-')} {before[name]} -> {value}" for name, value in asdict(args).items()
                   if name not in ignored and before.get(name, value) != value]  # fmt: skip
        print("resumed" + f" with other settings than before: {', '.join(changed)}" * bool(changed))
    if args.track:
        import wandb

        wandb.init(project="stare-vla", name=output.name, config=asdict(args), sync_tensorboard=True)
    writer = SummaryWriter(output, purge_step=step + 1)
    writer.add_text("hyperparameters", "|param|value|\n|-|-|\n" + "\n".join(f"|{key}|{value}|" for key, value in asdict(args).items()))
    if dist.is_initialized():
        dist.broadcast_object_list(name)
    return output, writer


def save_checkpoint(output: Path, model, processor, args: dict, state: dict, optimizer=None, heads: dict = {}) -> None:  # noqa: B006
    """Writes output/checkpoint: model with its statistics, processor, args.json, each head by its name, and the training state (vla.write_state). The
    folder is written beside its place and renamed, so a run that dies while saving keeps the one before, which stays as checkpoint.old."""
    new, old = output / "checkpoint.new", output / "checkpoint.old"
    shutil.rmtree(new, ignore_errors=True)
    model.save_pretrained(new)
    processor.save_pretrained(new)
    (new / "args.json").write_text(json.dumps({**args, "command": " ".join(["python", *sys.argv])}, indent=1))
    for name, head in heads.items():
        save_file(head.state_dict(), new / f"{name}.safetensors")
    vla.write_state(new, state, optimizer.state_dict()["state"] if optimizer else {}, model if args.get("lora_rank") else None)
    if (output / "checkpoint").exists():
        shutil.rmtree(old, ignore_errors=True)
        (output / "checkpoint").rename(old)
    new.rename(output / "checkpoint")


def load_state(output: Path, script: str, rank: int = 0) -> dict | None:
    """The training state of output/checkpoint, of the one before where that is missing or damaged; None where there is neither (every update seeds its own
    random numbers). No other process may be at work there. Raises UserError when the state is another script's, or damaged too."""
    folder, state = output / "checkpoint", None
    if rank == 0 and output.is_dir():
        stare_utils.lock_run(output)
        vla.recover(output)
    if dist.is_initialized():
        dist.barrier()
    if folder.exists() and (state := vla.read_state(folder)).get("script") != script:
        raise UserError(f"{folder} is {state.get('damaged') or 'of ' + state.get('script', 'another script')}, not of {script}: choose another --output-dir")
    return state


def find_checkpoint(env_id: str, scripts: tuple[str, ...]) -> str:
    """The newest checkpoint of the first of `scripts` that has run on this env, else the one shipped with the repository."""
    root = Path(__file__).parent
    for script in scripts:
        if found := [folder for folder in Path("runs").glob(f"*__{script}__*/checkpoint") if env_id in folder.parent.name.split("__")[0].split(",")]:
            return str(max(found, key=lambda folder: folder.stat().st_mtime))
    if (root / "checkpoints" / f"{env_id}__sft").is_dir():
        return str(root / "checkpoints" / f"{env_id}__sft")
    raise UserError(f"no checkpoint for {env_id}: run `python sft.py --env-id {env_id}` first, or give --checkpoint")


def load_policy(checkpoint: str, device: torch.device, origin: str = ""):
    """Model, processor and folder of a checkpoint (its folder, its run's, or a hub id). UserError: it is not ours, or no longer that of this fingerprint."""
    folder = vla.model_folder(checkpoint)
    try:
        vla.check_folder(folder, origin)
        return AutoModelForImageTextToText.from_pretrained(folder).to(device).eval(), AutoProcessor.from_pretrained(folder), folder
    except Exception as error:  # a file may hold anything
        raise UserError(f"{folder} cannot be loaded: {next(iter(str(error).splitlines()), type(error).__name__)}") from None


def task_stats(model, env_id: str, unnorm_key: str = "") -> dict:
    """The normalisation statistics (`action`, `proprio`) of a task, which are from now on those of OpenVLA's data set `unnorm_key` where one is named.
    Raises UserError when the checkpoint was trained on others, or on other actions than the 7 of every task here."""
    known, key = model.config.norm_stats, unnorm_key or env_id
    if key not in (names := [name for name, stats in known.items() if len(stats["action"]["q01"]) == 7]):
        raise UserError(f"this checkpoint trained 7 actions on {', '.join(names) or 'no task'}, not on {key}; --unnorm-key takes one of those for a task")
    if unnorm_key:
        known[env_id] = known[unnorm_key] if model.config.proprio_dim else vla.signed_gripper(known[unnorm_key])
    return known[env_id]


@torch.no_grad()
def sample_action(model, inputs: dict, active: torch.Tensor, greedy: bool = False):
    """One action by autoregressive decoding over the action bins alone, with a key-value cache.

    inputs: the processor's; active: (A,) bool, false where the action never varies (its bin is fixed).
    Returns bins (B, A) long, logprob (B,) fp32 = sum over active tokens, hidden (B, D) at the token before the first action token.
    """
    end, n, mask = model.config.action_id_end, model.config.n_action_bins, inputs["attention_mask"]
    out = model(**inputs, use_cache=True, logits_to_keep=1)
    hidden = out.last_hidden_state[:, -1]
    mask = torch.cat([mask[:, :1], mask.new_ones(len(mask), model.num_prefix()), mask[:, 1:]], 1)
    bins, logprob = [], torch.zeros(len(mask), device=mask.device)
    fed = 0  # action tokens that the model has seen
    for a, is_active in enumerate(active.tolist()):
        if not is_active:
            bins.append(torch.full_like(mask[:, 0], n // 2))
            continue
        if a > fed:
            tokens, fed = end - 1 - torch.stack(bins[fed:], -1), a
            mask = torch.cat([mask, torch.ones_like(tokens)], 1)
            out = model(tokens, mask, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
        logp = out.logits[:, -1, end - n : end].flip(-1).float().log_softmax(-1)  # (B, n), bin 0 first
        bins.append(logp.argmax(-1) if greedy else torch.multinomial(logp.exp(), 1)[:, 0])
        logprob += logp.gather(-1, bins[-1][:, None])[:, 0]
    return torch.stack(bins, -1), logprob, hidden


def action_logprob(model, inputs: dict, bins: torch.Tensor, active: torch.Tensor):
    """Log-probability of given actions in one teacher-forced pass: the same function of the weights as `sample_action`.

    inputs: the processor's; bins: (B, A) long; active: (A,) or (B, A) bool. Returns logprob (B,) fp32 = sum over active tokens,
    entropy (B,) likewise, hidden (B, D) at the token before the first action token, greedy (B, A) = the most likely bins.
    """
    end, n, A = model.config.action_id_end, model.config.n_action_bins, bins.shape[-1]
    ids = torch.cat([inputs["input_ids"], end - 1 - bins[:, :-1]], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(bins[:, :-1])], 1)
    out = model(**{**inputs, "input_ids": ids, "attention_mask": mask}, logits_to_keep=A)
    logp = out.logits[..., end - n : end].flip(-1).float().log_softmax(-1)  # (B, A, n), bin 0 first
    logprob = (logp.gather(-1, bins[..., None])[..., 0] * active.to(bins.device)).sum(-1)
    entropy = (-(logp.exp() * logp).sum(-1) * active.to(bins.device)).sum(-1)
    assert logprob.shape == entropy.shape == bins.shape[:1], "one number per action: anything else would broadcast"
    return logprob, entropy, out.last_hidden_state[:, 0], logp.argmax(-1)


class ValueHead(nn.Module):
    """V(s) from the hidden state that predicts the first action token, (B, D) -> (B,). The last layer starts at zero: V = 0 everywhere."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 256), nn.GELU(), nn.Linear(256, 1))
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.layers(hidden.float())[:, 0]


def compute_gae(
    rewards: torch.Tensor, values: torch.Tensor, next_values: torch.Tensor, terminated: torch.Tensor, done: torch.Tensor, gamma: float, gae_lambda: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016). All (T, N); terminated, done bool, done = terminated or truncated.

    next_values[t] is V of the true next state (of the final observation at an episode's end): a termination has no future, a truncation
    has one, and neither lets the next episode's advantage through. Returns advantages, returns = advantages + values.
    """
    assert rewards.shape == values.shape == next_values.shape == terminated.shape == done.shape, "shapes differ: this would broadcast"
    deltas = rewards + gamma * next_values * ~terminated - values  # (T, N)
    advantages, last = torch.zeros_like(rewards), torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        last = deltas[t] + gamma * gae_lambda * last * ~done[t]
        advantages[t] = last
    return advantages, advantages + values


def ppo_loss(logratio: torch.Tensor, advantages: torch.Tensor, clip_coef: float) -> torch.Tensor:
    """-mean min(ratio * A, clip(ratio, 1 - eps, 1 + eps) * A) (Schulman et al. 2017, eq. 7). Both (B,): one ratio per action."""
    assert logratio.shape == advantages.shape and logratio.ndim == 1, "shapes differ: this would broadcast"
    ratio = logratio.exp()
    return torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - clip_coef, 1 + clip_coef)).mean()


def kl_loss(logprob: torch.Tensor, ref_logprob: torch.Tensor) -> torch.Tensor:
    """mean (log pi - log pi_ref)^2 / 2: on the policy's own actions its gradient is that of KL(pi || pi_ref), though not its value. Both (B,).
    (r - 1 - log r with r = pi_ref / pi has the value of that KL but the gradient of the other one, KL(pi_ref || pi).)"""
    assert logprob.shape == ref_logprob.shape, "shapes differ: this would broadcast"
    return 0.5 * (logprob - ref_logprob).square().mean()


def ppo_symptoms(first: dict, now: dict, weight: float, gap: float = 0.05) -> list[str]:
    """Lines that name what is wrong, from the logged scalars of the run's first complete round of episodes and of the present update. weight: of the
    stage reward. gap: by how many nats rounding alone may part the log-probabilities of an action."""
    lines = []
    if abs(now["losses/first_ratio"] - 1) > gap / 5 or now["losses/rollout_update_logprob_gap"] > gap:
        lines.append("the ratio on the first minibatch is not 1: roll-out and update compute different log-probabilities (mode, dropout, padding or dtype)")
    if now["losses/entropy"] < 0.3 * first["losses/entropy"]:
        lines.append("the entropy has collapsed to less than a third: nothing new is tried any more; lower --learning-rate or add --kl-coef")
    if "charts/success_once" in first:
        success, shaped = (now[key] - first[key] for key in ("charts/success_once", "charts/shaped_return"))
        if success < -0.2 and shaped > 0.02 and weight:
            lines.append("the shaped return rises while success falls: the policy collects the stage reward instead of the task; lower --shaping-weight")
        elif success < -0.2:
            lines.append("sampled success falls: the steps are larger than the gradient of such a batch is good for; lower --learning-rate or raise --num-envs")
    return lines


def normalize(advantages: torch.Tensor, stages: torch.Tensor | None) -> torch.Tensor:
    """(B,) advantages to mean 0, deviation 1: over the buffer, or within each stage label when `stages` (B,) is given."""
    if stages is None:
        return (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    out = torch.zeros_like(advantages)
    for k in stages.unique():
        if (mine := stages == k).sum() > 1:
            out[mine] = normalize(advantages[mine], None)
    return out


def main(args: Args) -> None:
    start = time.time()
    args.env_id, *others = stare_utils.env_ids(args.env_id)
    if others:
        raise UserError("--env-id takes one task here; sft.py and eval.py take several")
    task = stare_utils.get_task(args.env_id)
    sizes = ("num_envs", "num_steps", "num_minibatches", "total_timesteps", "update_epochs", "chunk_size", "save_freq")
    stare_utils.check_args(asdict(args), dict.fromkeys(sizes, 1) | {"shaping_weight": -math.inf})
    if args.stage_source == "learned" and (args.potential, args.potential_across_stages, args.silent_stages) != ("sigmoid", "offset", ""):
        raise UserError("--stage-source learned knows no distances, its Phi is k alone: leave out --potential, --potential-across-stages, --silent-stages")
    if args.silent_stages and not (set(args.silent_stages.split(",")) <= set(task.stages) and args.potential_across_stages == "offset"):
        raise UserError(f"--silent-stages takes some of {','.join(task.stages)}, and the offset potential")
    (rank, world, device), threads = join_processes(args.cuda), torch.get_num_threads()
    T, N = args.num_steps, args.num_envs
    if T * N % args.num_minibatches or T * N == 1:
        raise UserError(f"num_envs * num_steps = {T * N} must be a multiple of --num-minibatches {args.num_minibatches}, and more than 1")
    args.batch_size = world * T * N
    args.minibatch_size = args.batch_size // args.num_minibatches
    args.num_iterations = -(-args.total_timesteps // args.batch_size)
    if args.num_iterations <= args.critic_warmup:
        print(f"warning: all {args.num_iterations} updates are critic warm-up and leave the VLA as it is; raise --total-timesteps or lower --critic-warmup")
    fresh = -(-task.max_episode_steps // args.num_steps)  # updates between fresh starts of all episodes
    whole = fresh * args.num_steps // task.max_episode_steps  # episodes of an env that fit between them whatever their lengths
    save_freq = -(-args.save_freq // fresh) * fresh
    K = len(task.stages)
    # STARE: weight of the stage reward. w = 1 / K keeps w * Phi in [0, 1], the value's own range: success never looks like a loss to a fresh critic
    weight = {"stare": 1 / K if args.shaping_weight < 0 else args.shaping_weight, "sparse": 0.0, "dense": 0.0}[args.reward]
    # A dense reward would make V ten times that of the others, and its loss drown the policy's in the gradient's norm
    reward_scale = 1 / task.max_episode_steps if args.reward == "dense" else 1.0
    if weight * (K if args.potential_across_stages == "offset" else 1) > 1 and args.critic_warmup == 0:
        print(f"warning: with --shaping-weight {weight} w * Phi exceeds 1: success looks like a loss to an untrained critic; add --critic-warmup")
    state = load_state(Path(args.output_dir), "sta_ppo", rank) if args.resume and args.output_dir else None
    given = args.vla or args.checkpoint
    source = state["source"] if state else given or find_checkpoint(args.env_id, ("sta_tpo", "sft"))
    if given and vla.model_folder(given).resolve() != vla.model_folder(source).resolve():
        raise UserError(f"{args.output_dir} was begun from {source}, not from {given}: choose another --output-dir")
    if state:
        begun = {"lora_rank": 0, **json.loads((Path(args.output_dir) / "checkpoint" / "args.json").read_text())}
        for name, flags in (("env_id", "--env-id"), ("batch_size", "num_envs * num_steps * processes"), ("lora_rank", "--lora-rank")):
            if begun[name] != getattr(args, name):
                raise UserError(f"{args.output_dir} was begun with {flags} = {begun[name]}, not {getattr(args, name)}: resume with the same")
    origin = state.get("origin", "") if state else vla.fingerprint(vla.model_folder(source))
    # LoRA goes on from the first policy and its adapter: what a checkpoint holds is merged
    begin = args.output_dir if state and not args.lora_rank else source
    model, processor, folder = load_policy(begin, device, origin if begin == source else "")
    stats = task_stats(model, args.env_id, args.unnorm_key)
    set_seed(args.seed)
    params = vla.prepare_training(model, args.lora_rank, args.gradient_checkpointing)
    if not (learned := vla.load_separator(folder, args.env_id, device) if args.stage_source == "learned" else (None, None)):
        raise UserError(f"no learned separator of {args.env_id} behind this policy: sft.py trains one on demonstrations that it makes itself")
    sft_folder, separator = learned
    sft_model = separator and load_policy(sft_folder, device)[0]
    # Without its adapter LoRA's model is the first
    reference = None if not args.kl_coef else model if args.lora_rank else load_policy(source, device, origin)[0].to(model.dtype)
    active = ~vla.constant_dims(stats["action"])
    silent = torch.tensor([name in args.silent_stages.split(",") for name in (*task.stages, "done")], device=device)  # (K + 1,)
    stare_utils.check_world(args.env_id, backend=args.backend, reward=args.reward)
    output, writer = open_run(args, "sta_ppo", rank, state["iteration"] * args.batch_size if state else 0)
    if not output.is_dir():
        raise UserError(f"process {rank} cannot see {output}: the nodes of a job need a file system that they share")
    value_head = ValueHead(model.config.text_config.hidden_size).to(device)
    optimizer = torch.optim.AdamW(
        [{"params": params, "lr": args.learning_rate}, {"params": value_head.parameters(), "lr": args.value_learning_rate}],
        betas=(0.9, 0.95), weight_decay=0.0, fused=True,
    )  # fmt: skip
    base_rates = [group["lr"] for group in optimizer.param_groups]
    iteration, recent, first, warned = 0, [], {}, set()  # recent: what is logged about the last counted episodes, a dict each
    if state:
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state["moments"]})
        value_head.load_state_dict(load_file(Path(args.output_dir) / "checkpoint" / "value_head.safetensors"))
        model.load_state_dict(state["adapter"], strict=False)
        iteration, recent, first, start = state["iteration"], state["recent"], state["first"], start - state["wall_s"]
    print(f"{args.num_iterations} updates of {args.batch_size} steps in {args.num_minibatches} minibatches of {args.minibatch_size}; start: {source}")

    envs = make_envs(
        args.env_id, args.num_envs, args.seed, terminate_on_success=args.reward != "dense", backend=args.backend,
        reward="dense" if args.reward == "dense" else "sparse", potential=args.potential, potential_across_stages=args.potential_across_stages,
        image_size=processor.image_size,
    )  # fmt: skip

    def policy_inputs(obs: dict) -> dict:
        return processor(obs["rgb"], [task.instruction] * len(obs["rgb"]), obs["proprio"], stats.get("proprio"), device)

    @torch.no_grad()
    def stage_of(obs: dict, info: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """STARE: stage (N,) and Phi (N,) of states: by the rules, or as the learned separator sees them, step by step."""
        if separator is None:
            stage, phi = info["stage"].to(device), info["potential"].to(device)
            return stage, torch.where(silent[stage], stage, phi)
        hidden = sft_model(**policy_inputs(obs), logits_to_keep=1).last_hidden_state[:, -1]
        stage = separator(hidden.float())[:, :K].argmax(-1)
        return stage, stage.float()

    @torch.no_grad()
    def value_of(obs: dict) -> torch.Tensor:
        """V (N,) of observations, from a pass over the prompt alone."""
        return value_head(model(**policy_inputs(obs), logits_to_keep=1).last_hidden_state[:, -1])

    def forward(policy, mb: torch.Tensor):
        """What action_logprob returns for the steps mb (B,) of the roll-out."""
        return action_logprob(policy, policy_inputs({name: value[mb] for name, value in b_obs.items()}), b_bins[mb.to(device)], active)

    def log_evaluation(global_step: int) -> None:
        if args.num_eval_episodes and rank == 0:
            begin, result = time.time(), evaluate(model, processor, args.env_id, args.num_eval_episodes, args.seed, args.num_envs, backend=args.backend)
            scalars = {"time/eval": time.time() - begin} | {f"eval/{key}": value for key, value in result.items() if isinstance(value, float)}
            for key, value in scalars.items():
                writer.add_scalar(key, value, global_step)
            print(f"success_once {result['success_once']:.3f} over {len(result['episodes'])} episodes")

    # ALGO LOGIC: storage, (T, N, ...)
    A = len(active)
    next_obs, next_info = envs.reset()  # for the shapes
    begun_at, lengths = iteration, torch.tensor([stage.length for stage in task.stage_table])
    so_far = {"returns": torch.zeros(N, 2), "steps": torch.zeros(N, K), "costs": torch.zeros(N, K)}  # of each env's present episode
    obs = {name: torch.zeros(T, *value.shape, dtype=value.dtype) for name, value in next_obs.items()}
    bins = torch.zeros(T, N, A, dtype=torch.long, device=device)
    stages = torch.zeros(T, N, dtype=torch.long, device=device)
    logprobs, env_rewards, rewards, potentials, next_potentials, values, final_values = (torch.zeros(T, N, device=device) for _ in range(7))
    terminated, done = (torch.zeros(T, N, dtype=torch.bool, device=device) for _ in range(2))

    def act(t: int, n: slice) -> torch.Tensor:
        """Actions (n, A) at step t of the envs n, in their own units. Where envs are processes, the other half computes meanwhile."""
        for name, value in next_obs.items():
            obs[name][t, n] = value[n]
        # STARE: the stage of the state acted in, and its Phi
        stages[t, n], potentials[t, n] = stage[n], phi[n]
        member = nn.functional.one_hot(next_info["stage"][n].cpu(), K + 1)[:, :K]  # (n, K), by the rules
        so_far["steps"][n] += member
        so_far["costs"][n] += member * (next_info["stage_distance"][n].cpu()[:, None] / lengths)
        bins[t, n], logprob, hidden = sample_action(model, policy_inputs({name: value[n] for name, value in next_obs.items()}), active)
        with torch.no_grad():
            value = value_head(hidden)
        assert logprob.shape == value.shape == phi[n].shape, "one per env: a slice would take one for all"
        logprobs[t, n], values[t, n] = logprob, value  # logprobs: PPO's old ones
        return vla.detokenize_actions(bins[t, n], stats["action"], model.config.n_action_bins)

    progress = tqdm(total=args.num_iterations * args.batch_size, initial=iteration * args.batch_size, desc="sta_ppo", unit="step",
                    disable=rank > 0 or None)  # fmt: skip
    while Stop.hold(iteration < args.num_iterations):
        # Iteration and process alone decide their random numbers and episodes: whoever resumes where episodes begin goes on as if never stopped
        torch.manual_seed((args.seed * 1_000_003 + iteration) * world + rank)
        time_rollout = time.time()
        if iteration % fresh == 0 or iteration == begun_at:
            next_obs, next_info = envs.reset(seed=(args.seed * 1_000_003 + (iteration * world + rank) * N) % (stare_utils.TRAIN_SEEDS - N))
            # Only the first `whole` episodes of each env count in the statistics: another one fits into the roll-out only after a quick success
            counts = torch.full((N,), whole if iteration % fresh == 0 else 0)
            for sums in so_far.values():
                sums.zero_()
            rows = []  # of the episodes that end before the next fresh start
        next_obs = {name: value.clone() for name, value in next_obs.items()}  # the state to act in, from here on written in place
        next_info = {name: next_info[name].clone() for name in ("stage", "stage_distance", "potential", "elapsed_steps")}
        stage, phi = (x.clone() for x in stage_of(next_obs, next_info))
        for group, rate in zip(optimizer.param_groups, base_rates, strict=True):
            group["lr"] = rate * (1 - iteration / args.num_iterations if args.anneal_lr else 1)
        if iteration < args.critic_warmup:
            optimizer.param_groups[0]["lr"] = 0.0  # the VLA stands still while Adam's second moments fill

        # Roll-out, in one torch thread: the env processes are the parallelism
        torch.set_num_threads(1)
        for t, n, now_obs, reward, term, trunc, info in envs.play(act, T):
            discount = args.gamma ** next_info["elapsed_steps"][n].cpu()  # by the episode's age, before it is written over
            for here, now in ((next_obs, now_obs), (next_info, info)):
                for name in here:
                    here[name][n] = now[name]
            assert {x.shape for x in (reward, term, trunc, info["stage"], info["potential"])} == {values[t, n].shape}, "one per env, as above"
            env_rewards[t, n], terminated[t, n], done[t, n] = reward.to(device), term.to(device), (term | trunc).to(device)
            stage[n], phi[n] = stage_of(now_obs, info)
            next_potentials[t, n] = phi[n]
            if (ended := info["_final_info"].cpu()).any():  # a mask there selects from tensors on either device
                # STARE: Phi of the true next state. At an episode's end `info` is already the new episode's
                final, final_obs = info["final_info"], info["final_obs"]
                next_potentials[t, n][ended] = stage_of(final_obs, final)[1][ended]
                final_values[t, n][ended] = value_of({name: value[ended] for name, value in final_obs.items()})
            # STARE: the stage reward enters here; w = 0 leaves the env's own
            rewards[t, n] = reward_scale * env_rewards[t, n]
            if weight:
                rewards[t, n] = shape_rewards(rewards[t, n], potentials[t, n], next_potentials[t, n], terminated[t, n], args.gamma, weight)
            so_far["returns"][n] += torch.stack([env_rewards[t, n].cpu(), discount * rewards[t, n].cpu()], -1)
            for j in ended.nonzero()[:, 0].tolist():
                i = n.start + j
                if counts[i] > 0:
                    furthest, costs = int(final["furthest_stage"][j]), so_far["costs"][i] / so_far["steps"][i]  # NaN: the stage was never entered
                    row = {"success_once": furthest == K, "success_at_end": bool(final["success"][j]), "episodic_return": so_far["returns"][i, 0],
                           "shaped_return": so_far["returns"][i, 1], "episodic_length": final["elapsed_steps"][j], "furthest_stage": furthest}
                    rows.append({f"charts/{key}": float(value) for key, value in row.items()})
                    for k, name in enumerate(task.stages):
                        numbers = {"reached": furthest > k, "steps": so_far["steps"][i, k], "cost": costs[k]}
                        rows[-1] |= {f"stage/{k}_{name}_{key}": float(value) for key, value in numbers.items()}
                counts[i] -= 1
                for sums in so_far.values():
                    sums[i] = 0
        if (iteration + 1) % fresh == 0:  # whole rounds alone: the first rows of a round are its quick episodes, the last ones its failures
            if world > 1:
                dist.all_gather_object(shares := [None] * world, rows)
                rows = [row for share in shares for row in share]
            recent = (recent + rows)[-world * N * whole * -(-100 // (world * N * whole)) :]
        # V of the true next state: the next row's value, after the last row (which cuts episodes, too) that of where the envs stand; at an episode's end,
        # termination or truncation, that of its final observation, which compute_gae takes only for a truncation
        next_values = torch.where(done, final_values, torch.cat([values[1:], value_of(next_obs)[None]]))
        advantages, returns = compute_gae(rewards, values, next_values, terminated, done, args.gamma, args.gae_lambda)
        torch.set_num_threads(threads)
        time_update = time.time()

        # flatten the batch
        b_obs = {name: value.flatten(0, 1) for name, value in obs.items()}
        b_bins, b_logprobs, b_returns = bins.flatten(0, 1), logprobs.flatten(), returns.flatten()
        # of all processes: (4, world * T * N), own steps at `own`
        all_steps, own = torch.zeros(4, world * T * N, device=device), slice(rank * T * N, (rank + 1) * T * N)
        all_steps[:, own] = torch.stack([advantages, returns, values, stages.float()]).flatten(1)
        sum_over_processes([all_steps])
        all_advantages, all_returns, all_values, all_stages = all_steps
        # STARE: --stage-advantage normalises within the stage in which the action was taken
        b_advantages = normalize(all_advantages, all_stages if args.stage_advantage else None)[own]

        if args.kl_coef:
            with torch.no_grad(), vla.lora_off(reference):
                b_ref_logprobs = torch.cat([forward(reference, mb)[0] for mb in torch.arange(T * N).split(args.chunk_size)])

        # Optimizing the policy and value network
        history = []  # a row per minibatch
        model.train(args.gradient_checkpointing)  # which works in this mode alone; the modes differ in nothing else
        for _ in range(args.update_epochs):
            for mb in torch.randperm(T * N).split(args.minibatch_size // world):
                optimizer.zero_grad()
                losses, logratios = [], []
                for chunk in mb.split(args.chunk_size):
                    newlogprob, entropy, hidden, _ = forward(model, chunk)
                    chunk_idx = chunk.to(device)
                    newvalue = value_head(hidden)
                    assert newlogprob.shape == newvalue.shape == b_returns[chunk_idx].shape == chunk.shape, "this would broadcast"

                    # Policy loss
                    logratio = newlogprob - b_logprobs[chunk_idx]
                    pg_loss = ppo_loss(logratio, b_advantages[chunk_idx], args.clip_coef)
                    # Value loss
                    v_loss = 0.5 * (newvalue - b_returns[chunk_idx]).square().mean()
                    # KL to the start
                    ref_loss = kl_loss(newlogprob, b_ref_logprobs[chunk_idx]) if args.kl_coef else torch.zeros((), device=device)
                    loss = pg_loss + args.vf_coef * v_loss + args.kl_coef * ref_loss
                    share = len(chunk) / len(mb)
                    (share / world * loss).backward()  # the gradients of all chunks and processes add up to that of the minibatch's mean
                    losses.append(share * torch.stack([pg_loss, v_loss, ref_loss, entropy.mean()]).detach())
                    logratios.append(logratio.detach())
                sum_over_processes([p.grad for p in (*params, *value_head.parameters())])
                grad_norm = nn.utils.clip_grad_norm_([*params, *value_head.parameters()], args.max_grad_norm)
                optimizer.step()
                logratio, ratio = torch.cat(logratios), torch.cat(logratios).exp()
                row = {
                    **dict(zip(("policy_loss", "value_loss", "kl_to_start", "entropy"), torch.stack(losses).sum(0), strict=True)),
                    "old_approx_kl": (-logratio).mean(), "approx_kl": (ratio - 1 - logratio).mean(),  # never negative, http://joschu.net/blog/kl-approx.html
                    "clipfrac": ((ratio - 1).abs() > args.clip_coef).float().mean(), "grad_norm": grad_norm,
                    "ratio": ratio.mean(),
                }  # fmt: skip
                sum_over_processes([means := torch.stack(list(row.values())) / world])
                gap = logratio.abs().max()
                if world > 1:
                    dist.all_reduce(gap, op=dist.ReduceOp.MAX)
                history.append({**dict(zip(row, means, strict=True)), "largest_logratio": gap})
            if args.target_kl is not None and history[-1]["approx_kl"] > args.target_kl:
                break
        model.eval()
        iteration += 1
        if iteration == args.critic_warmup:
            for moments in optimizer.state.values():
                moments["exp_avg"].zero_()  # the direction that the untrained critic taught; the value head's own as well

        # TRY NOT TO MODIFY: record, means over the update's minibatches
        global_step = iteration * args.batch_size
        names = ("policy_loss", "value_loss", "entropy", "old_approx_kl", "approx_kl", "clipfrac", "grad_norm", "kl_to_start")
        scalars = {f"losses/{name}": torch.stack([row[name] for row in history]).mean().item() for name in names}
        stare_utils.refuse_nan(scalars, output, {**b_obs, "bins": b_bins, "logprobs": b_logprobs, "advantages": b_advantages, "returns": b_returns})
        now = time.time()
        scalars |= {
            "losses/first_ratio": history[0]["ratio"].item(), "losses/rollout_update_logprob_gap": history[0]["largest_logratio"].item(),
            "losses/explained_variance": 1 - ((all_returns - all_values).var().clamp(min=1e-8) / all_returns.var().clamp(min=1e-8)).item(),
            "losses/advantage_std": all_advantages.std().item(),
            "charts/learning_rate": optimizer.param_groups[0]["lr"], "charts/SPS": args.batch_size / (now - time_rollout),
            "time/rollout": time_update - time_rollout, "time/update": now - time_update, "time/peak_gpu_gb": torch.cuda.max_memory_allocated() / 2**30,
        }  # fmt: skip
        for key in recent[0] if recent else ():
            known = [row[key] for row in recent if not math.isnan(row[key])]
            scalars |= {key: float(np.mean(known))} if known else {}
        first = first or (scalars if iteration % fresh == 0 and iteration - begun_at >= fresh else {})  # the first complete round of episodes
        for line in set(ppo_symptoms(first or scalars, scalars, weight, 0.5 if model.dtype == torch.bfloat16 else 0.05)) - warned:
            print(f"warning: {line}")
            warned.add(line)
        progress.update(args.batch_size)
        for key, value in scalars.items() if rank == 0 else ():
            writer.add_scalar(key, value, global_step)
        print(f"step {global_step}: success {scalars.get('charts/success_once', np.nan):.2f} length {scalars.get('charts/episodic_length', np.nan):.1f} "
              f"kl {scalars['losses/approx_kl']:.4f} clip {scalars['losses/clipfrac']:.2f} ev {scalars['losses/explained_variance']:.2f} "
              f"entropy {scalars['losses/entropy']:.1f} SPS {scalars['charts/SPS']:.0f}", flush=True)  # fmt: skip
        if (Stop.asked() or iteration % save_freq == 0 or iteration == args.num_iterations) and rank == 0:
            wall = time.time() - start
            method = "PPO-dense" if args.reward == "dense" else "STA-PPO" if weight or args.stage_advantage else "PPO"
            state = {"script": "sta_ppo", "iteration": iteration, "recent": recent, "first": first, "source": str(source), "origin": origin, "wall_s": wall}
            info = {**asdict(args), "checkpoint": str(source), "method": method, "env_steps": global_step, "wall_s": round(wall, 1)}
            save_checkpoint(output, model, processor, info, state, optimizer, {"value_head": value_head})
        if args.eval_freq and iteration % args.eval_freq == 0 and iteration < args.num_iterations and not Stop.leaving:
            log_evaluation(global_step)
    progress.close()
    envs.close()
    if rank > 0:
        return
    log_evaluation(iteration * args.batch_size)
    writer.close()
    print(f"wrote {output / 'checkpoint'} after {time.time() - start:.0f} s")


if __name__ == "__main__":
    with stare_utils.one_line_errors():
        main(tyro.cli(Args))
