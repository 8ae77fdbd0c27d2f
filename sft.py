"""Imitation: a VLA learns the demonstrations' actions as tokens.

It is step 1 of IPI: sft.py (imitation), sta_tpo.py (preference), sta_ppo.py (interaction).

    python sft.py --env-id PickCube-v1
        the scripted expert makes demonstrations, then the policy is trained on them
    python sft.py --env-id PickCube-v1 --demo-path demos.h5
        ManiSkill's own trajectory format, seen through our cameras
    python sft.py --env-id PickCube-v1,PushCube-v1
        one VLA for several tasks, told apart by their instructions

    loss = -mean over samples of
               [sum over active action tokens of log pi(token | observation, instruction, tokens
               before)] / (number of active tokens)
           + c_aux * smooth L1 distance between a linear read-out of the hidden state and
               where object and goal are, and how far the tool must turn

An action dimension is active if it varies in the demonstrations. docs/sft.md has the equations, the
choices, and what differs from OpenVLA's recipe. The line marked STARE trains the learned separator.
Letters: B batch, M frames of all demonstrations, A action tokens, D hidden width, K stages.
"""

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

# An idle OpenMP thread spins for a moment, because waking it takes longer. Then it must sleep:
# spinning on would take the cores from the env processes. torch reads both when it is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from safetensors.torch import load_file
from transformers import set_seed

import vla
from eval import evaluate
from plumbing import parallel
from plumbing.checkpoint import (
    check_instructions,
    fingerprint,
    load_policy,
    model_folder,
    save_checkpoint,
)
from plumbing.run import (
    Metrics,
    Progress,
    Run,
    Stop,
    check_numbers,
    one_line_errors,
    refuse_nan,
)
from world.assets import check_world, choose_renderer
from world.demos import collect_demos, read_demos
from world.episodes import is_ordinary
from world.tasks import TASKS, UserError, env_ids

LOG_FREQ = 50  # updates between two rows of the log
BASE = Path(__file__).parent / "checkpoints/base"  # benchmark/base.py makes it
# Flags that say how the expert's demonstrations are made.
RECORDING = ("demo_speed", "demo_noise", "demo_slip", "demo_pause", "demo_twist")
METRICS = ("ce", "aux", "token_accuracy", "action_l1", "stage_accuracy", "grad_norm")


@dataclass
class Args:
    # the run
    seed: int = 1
    """seed of initialisation, data order and demonstrations"""
    cuda: bool = True
    """train on the GPU if there is one"""
    track: bool = False
    """log to Weights & Biases too (needs `pip install wandb`)"""
    output_dir: str = ""
    """run folder with checkpoint/, TensorBoard files and demonstrations; empty:
    runs/{env_id}__sft__{seed}__{time}"""
    resume: bool = False
    """go on from the checkpoint in --output-dir, if there is one"""

    # the policy and the tasks
    vla: str = "base"
    """`base` (the shipped tiny model, which has learned where objects are, and no action), `tiny`
    (the same from scratch), a checkpoint folder, an OpenVLA's published folder, or its hub id"""
    env_id: str = "PickCube-v1"
    """task, or several with commas between them"""
    num_envs: int = 8
    """env processes (CPU) or parallel envs (GPU) that make demonstrations and evaluate"""
    backend: Literal["cpu", "cuda"] = "cpu"
    """physics: cpu (one process per env) or cuda (ManiSkill's GPU simulation)"""
    render: Literal["auto", "cpu", "gpu"] = "auto"
    """where pictures are drawn: cpu is Mesa's software driver, auto is the GPU if there is one"""

    # demonstrations
    demo_path: str = ""
    """ManiSkill .h5 with its .json beside it, or the folder of a LeRobotDataset; one per task with
    commas between them; empty: the scripted expert makes `num_demos` demonstrations"""
    num_demos: int = 100
    """demonstrations of each task that the expert makes, or the most to read from --demo-path"""
    demo_speed: float = 0.7
    """the tool moves at most this share of the expert's largest step along each axis, because
    people are slower than a script; 1 is the expert itself"""
    demo_noise: float = 0.25
    """deviation of the noise on the executed motion, in shares of the largest step, on a random
    half of the steps; labels stay clean (DART, Laskey 2017)"""
    demo_slip: float = 0.05
    """chance per step that the expert plays a wrong stage for 3 to 8 steps, for example closes on
    air or drops the object; the label stays the right action"""
    demo_pause: float = 0.0
    """chance per step that the expert stands still for 2 to 6 steps, as people do. Pauses are
    labels too: imitation copies them"""
    demo_twist: int = 0
    """a demonstration begins with up to this many steps in which the tool turns to a random side.
    Otherwise the tool's own pose may tell how the object lies, and the policy need not look"""

    # the optimiser
    lora_rank: int = 0
    """0 trains all weights; else LoRA matrices of this rank, merged into what is written"""
    learning_rate: float = 1e-3
    """AdamW, peak of the schedule: linear warm-up of 100 updates, then cosine to zero"""
    num_updates: int = 2500
    """optimiser steps; a few hundred learn nothing from scratch"""
    batch_size: int = 64
    """frames per optimiser step, of each process"""
    chunk_size: int = 128
    """samples per forward and backward pass of an update: bounds memory, not the result"""
    gradient_checkpointing: bool = False
    """compute a layer's activations again in the backward pass: less memory, a third more work"""
    max_grad_norm: float = 1.0
    """the gradient's norm is clipped to this, over all parameters together"""

    # the loss
    image_shift: int = 4
    """each image of a batch is moved by up to this many pixels along both axes, a new shift each
    time (DrQ, Yarats 2021): few demonstrations show few places"""
    label_jitter: float = 4.0
    """deviation, in bins, of noise on each target except the gripper's: a soft target over
    neighbouring bins, for a policy that explores"""
    aux_coef: float = 5.0
    """c_aux: weight of the auxiliary loss, by which the tiny model learns to see; 0: cross-entropy
    alone"""

    # saving and evaluating
    save_freq: int = 500
    """optimiser steps between checkpoints"""
    num_eval_episodes: int = 16
    """episodes of the evaluation at the end; 0 leaves it out"""

    # to be filled in at run time
    processes: int = 1
    """processes of a `torchrun` job, each with its own --batch-size (computed)"""


def action_logprob(model, inputs: dict, bins: torch.Tensor, active: torch.Tensor):
    """Log-probability of given actions, in one pass over the prompt and the action tokens.

    The log-probability is the same function of the weights as in `sample_action`.
    inputs: what the processor returns. bins: (B, A) long. active: (A,) or (B, A) bool.
    Returns logprob (B,) fp32 and entropy (B,), both sums over the active tokens, hidden (B, D) at
    the token before the first action token, and the likeliest bins (B, A).
    """
    # Bin b is token id end - 1 - b.
    end = model.config.action_id_end
    n_bins = model.config.n_action_bins
    A = bins.shape[1]
    # The last action token is not an input, because nothing comes after it.
    tokens = end - 1 - bins[:, :-1]
    ids = torch.cat([inputs["input_ids"], tokens], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(tokens)], 1)
    inputs = {**inputs, "input_ids": ids, "attention_mask": mask}
    out = model(**inputs, logits_to_keep=A)
    # The flip puts bin 0 first.
    logits = out.logits[..., end - n_bins : end].flip(-1)
    logp = logits.float().log_softmax(-1)  # (B, A, n_bins)
    assert active.shape[-1] == A, "one flag per action token"
    active = active.to(bins.device)
    chosen_logp = logp.gather(-1, bins[..., None])[..., 0]  # (B, A)
    logprob = (chosen_logp * active).sum(-1)
    entropy = (-(logp.exp() * logp).sum(-1) * active).sum(-1)
    assert logprob.shape == entropy.shape == bins.shape[:1], "one number per action"
    # logits_to_keep=A keeps the last A positions of logits and hidden states alike. The first of
    # them is the token before the first action token.
    hidden = out.last_hidden_state[:, 0]
    return logprob, entropy, hidden, logp.argmax(-1)


# ---- demonstrations ----
@dataclass
class Frames:
    """The frames of all tasks' demonstrations, in one flat list of M."""

    rgb: torch.Tensor  # (M, H, W, 3) uint8
    proprio: torch.Tensor  # (M, 8)
    bins: torch.Tensor  # (M, A) long: the action, as tokens
    geometry: torch.Tensor  # (M, 8): where object and goal are, see world.tasks.geometry
    stage: torch.Tensor  # (M,) long, -1 where it is unknown
    task: torch.Tensor  # (M,) long: index of the frame's task
    active: torch.Tensor  # (tasks, A) bool: which action dimensions vary in a task


def demo_paths(text: str) -> list[Path]:
    """The files and folders of --demo-path. A comma may be a part of a name, or separate two."""
    if os.path.exists(text):
        return [Path(text)]
    paths = []
    start = ""
    for part in text.split(","):
        start += part
        # There is no such file yet, so the comma may be a part of its name.
        if os.path.exists(start):
            paths.append(Path(start))
            start = ""
        elif start:
            start += ","
    if start:
        paths = [Path(part) for part in text.split(",") if part]
    if text and not paths:
        raise UserError(f"--demo-path {text!r} names no file")
    return paths


def read_files(args: Args, ids: list[str], image_size: int) -> list:
    """The demonstrations of --demo-path, per task; an empty list where there are none."""
    # One file per task, in the same order.
    demos = []
    for path, env_id in zip(demo_paths(args.demo_path), ids):
        read = read_demos
        if path.is_dir():
            # Its packages are needed for nothing else.
            from world.lerobot import read_lerobot as read
        demo = read(path, env_id, args.num_demos, image_size, Progress)
        # Raises where there is nothing to learn, before a folder is made.
        action_stats(demo[2], env_id)
        demos.append(demo)
    return demos


def make_demos(args: Args, ids: list[str], folder: Path, image_size: int, rank: int) -> list:
    """The demonstrations that the scripted expert makes in the run's folder, per task."""
    demos = []
    for env_id in ids:
        file = folder / f"demos_{env_id}.h5"
        if file.exists():
            print(
                f"{file} is there: at most --num-demos of its demonstrations are used, which were "
                "made with their own --demo flags"
            )
        elif rank == 0:
            collect_demos(
                file,
                env_id,
                args.num_demos,
                args.num_envs,
                args.seed,
                speed=args.demo_speed,
                noise=args.demo_noise,
                slip=args.demo_slip,
                pause=args.demo_pause,
                twist=args.demo_twist,
                backend=args.backend,
                image_size=image_size,
                progress=Progress,
            )
        # The other processes wait for the file.
        parallel.barrier()
        demos.append(read_demos(file, env_id, args.num_demos, image_size, Progress))
    return demos


def action_stats(actions: torch.Tensor, env_id: str) -> dict:
    """The `action` entry of `norm_stats`. actions: (M, A).

    The range is that of the task's expert, or the demonstrations' where theirs is larger, so that
    reinforcement learning may leave the demonstrations' range. OpenVLA's percentiles would clip the
    policy to what the expert did. A dimension that does not vary is its constant.
    Raises UserError where none varies.
    """
    arm = TASKS[env_id].arm
    # One outlier would stretch the range and make every bin coarser.
    ordinary = actions[is_ordinary(actions, arm)]
    low = ordinary.amin(0)
    high = ordinary.amax(0)
    # The range is the same to both sides, so that the middle bin is rest.
    limit = torch.maximum(torch.tensor(arm.limit), ordinary.abs().amax(0))
    constant = high - low < 1e-3 * limit
    if constant.all():
        raise UserError(
            f"{env_id}: no action varies in the {len(actions)} frames of the demonstrations, so "
            "there is nothing to learn"
        )
    middle = (low + high) / 2
    return {
        "q01": torch.where(constant, middle, -limit).tolist(),
        "q99": torch.where(constant, middle, limit).tolist(),
        "mask": [True] * len(low),
    }


def add_statistics(model, ids: list[str], demos: list) -> list[dict]:
    """Adds the tasks' statistics to the model's, and returns them.

    A policy keeps the units in which it was trained: those of its proprioception, and those of the
    actions of each task that it knows.
    """
    known = model.config.norm_stats
    proprio = torch.cat([demo[1] for demo in demos])
    proprio_stats = {
        "mean": proprio.mean(0).tolist(),
        "std": proprio.std(0).clamp(min=1e-3).tolist(),
    }
    if model.config.proprio_dim:
        for stats in known.values():
            if "proprio" in stats:
                proprio_stats = stats["proprio"]
                break
    all_stats = []
    for env_id, demo in zip(ids, demos):
        stats = known.get(env_id)
        if stats:
            warn_of_other_range(env_id, demo[2], stats["action"], model.config.n_action_bins)
        else:
            stats = {"action": action_stats(demo[2], env_id), "proprio": proprio_stats}
        all_stats.append(stats)
    model.config.norm_stats = {**known, **dict(zip(ids, all_stats))}
    return all_stats


def warn_of_other_range(env_id: str, actions: torch.Tensor, stats: dict, n_bins: int) -> None:
    """Prints a warning where the policy's bins do not reach the actions (M, A) to learn."""
    # A constant dimension has one value, and a number out of range has the last bin.
    bins = vla.tokenize_actions(actions, stats, n_bins)
    width = (torch.tensor(stats["q99"]) - torch.tensor(stats["q01"])) / (n_bins - 1)
    missed = (vla.detokenize_actions(bins, stats, n_bins) - actions).abs() > width + 1e-3
    share = missed.any(1).float().mean()
    if share > 0.01:
        print(
            f"warning: {100 * share:.0f} % of the actions are beyond what this policy can do in "
            f"{env_id}, because it keeps the range of its first demonstrations: begin without --vla"
        )


def flatten(demos: list, all_stats: list[dict], n_bins: int) -> Frames:
    """One list of frames from the demonstrations of each task."""
    lengths = torch.tensor([len(demo[0]) for demo in demos])
    rgb, proprio, _, geometry, stage = (torch.cat(parts) for parts in zip(*demos))
    bins = []
    active = []
    for demo, stats in zip(demos, all_stats):
        bins.append(vla.tokenize_actions(demo[2], stats["action"], n_bins))
        active.append(~vla.constant_dims(stats["action"]))
    # The task of a frame gives its instruction and its active dimensions.
    task = torch.repeat_interleave(torch.arange(len(demos)), lengths)
    return Frames(rgb, proprio, torch.cat(bins), geometry, stage, task, torch.stack(active))


# ---- set-up ----
def check_args(args: Args, world_size: int) -> list[str]:
    """Checks the arguments, fills in the computed one, and returns the env ids."""
    ids = env_ids(args.env_id)
    args.env_id = ",".join(ids)
    args.processes = world_size
    # The smallest values allowed. All other numbers may be 0, but not negative.
    least = {
        "num_envs": 1,
        "num_demos": 1,
        "num_updates": 1,
        "batch_size": 1,
        "chunk_size": 1,
        "save_freq": 1,
    }
    check_numbers(asdict(args), least)
    choose_renderer(args.render, args.backend)
    paths = demo_paths(args.demo_path)
    for name in RECORDING:
        if paths and getattr(args, name) != getattr(Args, name):
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} is for new demonstrations: leave it or --demo-path out")
    if paths and len(paths) != len(ids):
        raise UserError(
            f"--demo-path names {len(paths)} files for {len(ids)} tasks: "
            "give one for each, in the same order"
        )
    for env_id in ids:
        # Files are seen through a CPU env, whatever the backend.
        check_world(env_id, backend="cpu" if paths else args.backend)
    return ids


def start_of(args: Args) -> str:
    """The folder or hub id that --vla names."""
    return str(BASE) if args.vla == "base" else args.vla


def load_start(args: Args, run: Run, origin: str, device: torch.device):
    """Model and processor with which this call begins. origin: the first policy's fingerprint."""
    # A LoRA run goes on from its first policy, because its checkpoint holds the merged adapter.
    if run.state and not args.lora_rank:
        model, processor, _ = load_policy(args.output_dir, device)
        return model, processor
    if args.vla != "tiny":
        model, processor, _ = load_policy(start_of(args), device, origin)
        return model, processor
    model = vla.OpenVLAForActionPrediction(vla.tiny_config()).to(device)
    model.init_action_rows()
    # The tokenizer learns the words of all tasks, so that more of them can be added later.
    return model, vla.tiny_processor([task.instruction for task in TASKS.values()])


def build_heads(width: int, geometry_dim: int, num_stages: int) -> torch.nn.ModuleDict:
    """Linear maps from the hidden state, trained beside the policy: aux and separator."""
    return torch.nn.ModuleDict(
        {
            "aux": torch.nn.Linear(width, geometry_dim),
            "separator": torch.nn.Linear(width, num_stages),
        }
    )


def build_optimizer(args: Args, params: list, heads: torch.nn.ModuleDict):
    """AdamW with two groups: the policy, and the separator with its own learning rate."""
    groups = [
        {"params": params, "lr": args.learning_rate},
        # With --learning-rate 0 the separator alone is trained.
        {"params": heads["separator"].parameters(), "lr": 1e-3},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.01, fused=True)


def resume(run: Run, model, heads: torch.nn.ModuleDict, optimizer, metrics: Metrics) -> None:
    """Puts a checkpoint's training state back."""
    run.restore(model, optimizer)
    heads.load_state_dict(load_file(run.folder / "checkpoint" / "heads.safetensors"))
    # The rows since the last log belong to the next one.
    for row in run.state["history"]:
        values = torch.tensor(row, device=model.device)
        metrics.minibatches.append(dict(zip(METRICS, values)))


def log_means(
    run: Run, metrics: Metrics, scalars: dict[str, float], step: int, num_updates: int
) -> None:
    """Logs the means since the last row, and prints them now and then."""
    rows = [torch.stack(list(row.values())) for row in metrics.minibatches]
    means = dict(zip(METRICS, torch.stack(rows).mean(0).tolist()))
    losses = {f"losses/{name}": mean for name, mean in means.items()}
    run.log({**losses, **scalars}, step)
    if step % (10 * LOG_FREQ) == 0 or step == num_updates:
        numbers = ", ".join(f"{name} {mean:.4g}" for name, mean in means.items())
        print(f"update {step}: {numbers} after {run.seconds():.0f} s", flush=True)


def log_evaluation(args: Args, run: Run, model, processor, ids: list[str], step: int) -> None:
    """Evaluates the policy greedily on each task, on seeds that training never sees."""
    if not args.num_eval_episodes:
        return
    # A policy of several tasks has a success rate for each.
    for env_id in ids:
        start = time.time()
        result = evaluate(
            model,
            processor,
            env_id,
            args.num_eval_episodes,
            args.seed,
            args.num_envs,
            backend=args.backend,
        )
        suffix = f"/{env_id}" if len(ids) > 1 else ""
        run.log_evaluation(result, time.time() - start, step, label=f"{env_id}: ", suffix=suffix)


def main(args: Args) -> None:  # noqa: PLR0915
    # ---- set-up: check the arguments ----
    rank, world_size, device = parallel.join(args.cuda)
    ids = check_args(args, world_size)
    run = Run("sft", args.output_dir, args.resume, rank)
    for name in ("env_id", "lora_rank", "vla", "seed", "processes"):
        run.check_same(name, name, getattr(args, name))

    # ---- set-up: load ----
    set_seed(args.seed)
    origin = fingerprint(model_folder(start_of(args)))
    if run.state:
        origin = run.state.get("origin", "")
    model, processor = load_start(args, run, origin, device)
    instructions = [TASKS[env_id].instruction for env_id in ids]
    check_instructions(model, processor, instructions)
    demos = read_files(args, ids, processor.image_size)

    # ---- set-up: build. A folder is made only now, when all input is known to be good ----
    step = run.state["step"] if run.state else 0
    run.open(asdict(args), args.output_dir, step)
    if not demos:
        demos = make_demos(args, ids, run.folder, processor.image_size, rank)
    n_bins = model.config.n_action_bins
    all_stats = add_statistics(model, ids, demos)
    frames = flatten(demos, all_stats, n_bins)
    # A separator for STA-TPO and STA-PPO needs the stages of every task.
    knows_stages = all((stage >= 0).any() for *_, stage in demos)
    del demos
    varying = [row.nonzero()[:, 0].tolist() for row in frames.active]
    print(f"{len(frames.rgb)} frames; action dimensions that vary: {varying}")

    num_stages = max(len(TASKS[env_id].stages) for env_id in ids)
    width = model.config.text_config.hidden_size
    heads = build_heads(width, frames.geometry.shape[-1], num_stages).to(device)
    params = vla.prepare_training(model, args.lora_rank, args.gradient_checkpointing)
    params = [*params, *heads["aux"].parameters()]
    trained = [*params, *heads["separator"].parameters()]
    optimizer = build_optimizer(args, params, heads)
    metrics = Metrics()
    if run.state:
        resume(run, model, heads, optimizer, metrics)
    first_step = step
    start_row = time.time()
    model.train()
    progress = Progress(total=args.num_updates, initial=step, desc="sft", unit="update")
    while Stop.hold(step < args.num_updates):
        # ---- batch: the step's number decides it, so that a resumed run sees the same data ----
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        B = world_size * args.batch_size
        mb_inds = torch.randint(len(frames.rgb), (B,), generator=generator)
        clean_bins = frames.bins[mb_inds]
        mb_bins = vla.blur_bins(clean_bins, args.label_jitter, n_bins, generator)
        # The gripper knows a few commands and nothing between them.
        mb_bins[:, -1] = clean_bins[:, -1]
        most = args.image_shift
        mb_shift = torch.randint(-most, most + 1, (B, 2), generator=generator)  # pixels

        # ---- update ----
        warmup = (step + 1) / 100
        cosine = 0.5 * (1 + np.cos(np.pi * step / args.num_updates))
        optimizer.param_groups[0]["lr"] = args.learning_rate * min(warmup, cosine)
        optimizer.zero_grad()
        own_inds = mb_inds[rank::world_size].split(args.chunk_size)
        own_bins = mb_bins[rank::world_size].split(args.chunk_size)
        own_shift = mb_shift[rank::world_size].split(args.chunk_size)
        for chunk, chunk_bins, chunk_shift in zip(own_inds, own_bins, own_shift, strict=True):
            active = frames.active[frames.task[chunk]].to(device)  # (chunk, A)
            texts = [instructions[i] for i in frames.task[chunk]]
            # All tasks share one normalisation of the proprioception.
            proprio_stats = all_stats[0].get("proprio")
            rgb = vla.shift_images(frames.rgb[chunk], chunk_shift)
            inputs = processor(rgb, texts, frames.proprio[chunk], proprio_stats, device)
            logprob, _, hidden, likeliest = action_logprob(
                model, inputs, chunk_bins.to(device), active
            )
            # cross-entropy per active token, in nats
            ce = -(logprob / active.sum(-1)).mean()
            # in units of 10 cm
            geometry = frames.geometry[chunk].to(device) / 0.1
            read_out = heads["aux"](hidden.float())
            # NaN stands where a recording does not know the objects' places. Its error is 0.
            target = torch.where(geometry.isnan(), read_out.detach(), geometry)
            aux_loss = F.smooth_l1_loss(read_out, target)
            # STARE: the learned separator reads the stage off the hidden state. It teaches the
            # policy nothing, because the hidden state is detached.
            stage_logits = heads["separator"](hidden.detach().float())
            stage = frames.stage[chunk].to(device)
            stage_loss = F.cross_entropy(stage_logits, stage, ignore_index=-1, reduction="sum")
            right = stage_logits.argmax(-1) == stage
            loss = ce + args.aux_coef * aux_loss + stage_loss / len(chunk)
            # The gradients of all chunks and processes add up to the batch's.
            share = len(chunk) / B
            (share * loss).backward()

            off = (likeliest - frames.bins[chunk].to(device)).abs()[active]
            metrics.add(
                share,
                ce=ce,
                aux=aux_loss,
                token_accuracy=(off == 0).float().mean(),
                # in units of the largest action
                action_l1=2 * off.float().mean() / (n_bins - 1),
                # over the frames whose stage is known
                stage_accuracy=right.sum() / (stage >= 0).sum().clamp(min=1),
            )
        parallel.sum_over_processes([p.grad for p in trained])
        # The separator's gradient is its own and is not clipped.
        grad_norm = torch.nn.utils.clip_grad_norm_(params, args.max_grad_norm)
        metrics.add(1 / world_size, grad_norm=grad_norm)
        metrics.end_minibatch()
        found = {"loss": metrics.last("ce"), "gradient": grad_norm.item()}
        batch = {"rgb": frames.rgb[mb_inds], "proprio": frames.proprio[mb_inds], "bins": mb_bins}
        refuse_nan(found, run.folder, batch)
        optimizer.step()
        step += 1
        progress.update()

        # ---- log ----
        if step % LOG_FREQ == 0 or step == args.num_updates:
            # After a resume the means include older rows. Only this call's rows were timed.
            num_timed = min(len(metrics.minibatches), step - first_step)
            seconds = (time.time() - start_row) / num_timed
            start_row = time.time()
            scalars = {
                "charts/learning_rate": optimizer.param_groups[0]["lr"],
                "charts/SPS": B / seconds,
                "time/update": seconds,
                "time/peak_gpu_gb": torch.cuda.max_memory_allocated() / 2**30,
            }
            log_means(run, metrics, scalars, step, args.num_updates)
            metrics = Metrics()

        # ---- save ----
        saves = step % args.save_freq == 0 or step == args.num_updates
        # Stop.asked() stands first, because all processes of a job must call it.
        if (Stop.asked() or saves) and rank == 0:
            settings = {
                **asdict(args),
                "method": "SFT",
                "env_steps": 0,
                "wall_s": round(run.seconds(), 1),
            }
            history = [[x.item() for x in row.values()] for row in metrics.minibatches]
            state = {
                "script": "sft",
                "step": step,
                "history": history,
                "origin": origin,
                "wall_s": run.seconds(),
            }
            saved = {"heads": heads}
            if knows_stages:
                saved["separator"] = heads["separator"]
            save_checkpoint(run.folder, model, processor, settings, state, optimizer, saved)
    progress.close()
    if rank == 0:
        log_evaluation(args, run, model, processor, ids, step)
        run.close()


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Args))
