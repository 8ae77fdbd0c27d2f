"""STA-TPO, step 2 of IPI: stage-wise preferences between roll-outs of the imitated policy that began in the same state.

    python sta_tpo.py --env-id PickCube-v1                    # from the newest sft.py run of this env, else the shipped checkpoint
    python sta_tpo.py --env-id PickCube-v1 --cost-sum --cost-coef 0.01   # each step costs; the paper's mean rewards lingering
    python sta_tpo.py --env-id PickCube-v1 --no-stage-aware --max-pairs-per-stage 24   # plain TPO: whole trajectories, as many pairs in all
    python sta_tpo.py --env-id PickCube-v1 --export-pairs DIR # clips for a person to judge; --preferences DIR/pairs.jsonl trains on the verdicts

  q(tau_k)  = mean over the steps of segment k of [ log pi(a_t|s_t) - log pi_ref(a_t|s_t) ]
  q^(tau_k) = q(tau_k) - lambda * l_k(tau_k)                      l_k: mean (or sum of the) stage distance / L_k
  loss      = -mean over pairs of log sigmoid( beta * (q^(chosen) - q^(rejected)) )
A pair exists for stage k only if both roll-outs finished stage k - 1; the winner finished stage k or, when both did, was cheaper by a margin.
The reference is the checkpoint itself, as cached fp32 log-probabilities. Equations, choices, what differs from GRAPE: docs/sta_tpo.md.
Letters: R roll-outs, T steps, K stages, P pairs, S steps of all pairs in a batch, A action tokens, B chunk of steps, N envs, D hidden width.
"""
import json
import math
import os
import shutil
import sys
import time
import zlib
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import combinations
from pathlib import Path
from typing import Literal

import stare_utils  # before torch: it makes idle OpenMP threads sleep  # isort: skip
import imageio
import numpy as np
import torch
import torch.distributed as dist
import tyro
from safetensors.torch import save_file
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, set_seed

import vla
from eval import evaluate
from stare_utils import TRAIN_SEEDS, Stop, UserError, decode_stages, make_envs, segment_stages, stage_costs


@dataclass
class Args:
    seed: int = 1
    """seed of the roll-outs' initial states, sampling and pair order"""
    cuda: bool = True
    """train on the GPU if there is one"""
    track: bool = False
    """log to Weights & Biases too (needs `pip install wandb`)"""
    output_dir: str = ""
    """run folder: checkpoint/, TensorBoard files, roll-outs; empty: runs/{env_id}__sta_tpo__{seed}__{time}"""
    resume: bool = False
    """go on from the checkpoint (and the finished roll-outs) in --output-dir, if there are any"""

    checkpoint: str = ""
    """policy to start from, also the reference; empty: the newest sft.py run of this env under runs/, else the one shipped with the repository"""
    vla: str = ""
    """an OpenVLA instead of --checkpoint: its folder in the published layout, or its hub id, with --unnorm-key"""
    unnorm_key: str = ""
    """of which data set in its `norm_stats` the task's actions are, `bridge_orig` for SimplerEnv's tasks"""
    env_id: str = "PickCube-v1"
    """task"""
    num_envs: int = 8
    """env processes for roll-outs and evaluation"""

    num_initial_states: int = 64
    """different initial states"""
    rollouts_per_state: int = 8
    """sampled roll-outs from each of them; pairs never mix initial states"""

    stage_aware: bool = True
    """pairs and q per stage (STA-TPO); off: pairs and q of whole trajectories (plain TPO)"""
    stage_source: Literal["rules", "learned"] = "rules"
    """rules read the simulator's state; learned: sft.py's separator, decoded by Viterbi; it knows no distances, so pairs are by completion alone"""
    export_pairs: str = ""
    """folder: write the pairs there as clips, left beside right, and pairs.jsonl for a person to fill in, and stop"""
    preferences: str = ""
    """pairs.jsonl in which a person wrote "left", "right" or "tie": train on these instead (of the same run: --resume --output-dir)"""
    tpo_reduction: Literal["mean", "sum"] = "mean"
    """q is the mean over a segment's steps (the notes on the paper) or the sum (GRAPE); with sum choose a smaller beta"""
    beta: float = 5.0
    """inverse temperature of the preference; raising it keeps the policy nearer to the reference"""
    cost_coef: float = 0.1
    """lambda: weight of the stage cost in q^ (costs are in units of L_k)"""
    cost_sign: Literal[-1, 1] = -1
    """-1 is the paper's q - lambda * l; 1 turns the cost into a margin that the policy must exceed"""
    cost_margin: float = 0.1
    """when both roll-outs finished a stage, the cheaper one wins only by this margin (in units of L_k); 1e9: pairs by completion alone"""
    cost_sum: bool = False
    """l_k is the sum of a segment's distances, in which each step costs, not the paper's mean, which lingering lowers; take --cost-coef 0.01 with it"""
    max_pairs_per_stage: int = 6
    """at most this many pairs per initial state and stage, completions first, so that easy stages do not drown the others"""

    lora_rank: int = 0
    """0 trains all weights; else LoRA matrices of this rank on the linear layers (not the vocabulary's head), merged into what is written"""
    learning_rate: float = 5e-5
    """AdamW, constant"""
    max_grad_norm: float = 1.0
    """gradients are clipped to this norm"""
    num_epochs: int = 1
    """passes over the pairs"""
    batch_size: int = 64
    """pairs per optimiser step, of each process"""
    chunk_size: int = 128
    """steps or frames per forward and backward pass of an update: bounds its memory, changes no result"""
    gradient_checkpointing: bool = False
    """compute a layer's activations anew in the backward pass instead of keeping them: less memory, a third more computation"""

    save_freq: int = 20
    """optimiser steps between checkpoints"""
    num_eval_episodes: int = 16
    """episodes of the evaluation at the end; 0 leaves it out"""


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


def sta_tpo_loss(
    q_chosen: torch.Tensor, q_rejected: torch.Tensor, cost_chosen: torch.Tensor, cost_rejected: torch.Tensor, beta: float, cost_coef: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """loss = -log sigmoid(beta * (q^+ - q^-)), q^ = q - cost_coef * cost. All (P,); returns loss per pair, chosen and rejected reward beta * q^."""
    assert q_chosen.shape == q_rejected.shape == cost_chosen.shape == cost_rejected.shape, "shapes differ: this would broadcast"
    chosen_rewards = beta * (q_chosen - cost_coef * cost_chosen)
    rejected_rewards = beta * (q_rejected - cost_coef * cost_rejected)
    return -torch.nn.functional.logsigmoid(chosen_rewards - rejected_rewards), chosen_rewards, rejected_rewards


def build_stage_pairs(
    rollouts: list[dict], num_stages: int | None = None, cost_margin: float = 0.1, max_pairs_per_stage: int = 10**9, stage_aware: bool = True, cost_sum=False
) -> list[dict]:
    """Preference pairs between roll-outs of the same initial state.

    rollouts: dicts with `init_seed` int, `stage` (T,) labels 0..K of the states acted in, `distance` (T,) stage distance (any unit, here d / L_k),
    `success` bool. Returns dicts `stage`, `chosen`, `rejected` (indices into rollouts), `reason` "completed" (the winner finished the stage,
    the loser did not) or "cost" (both did, the winner's mean (or sum of) distance is lower by `cost_margin`), `cost_chosen`, `cost_rejected`.
    stage_aware=False: the whole trajectory is one stage, finished by success.
    """
    K = num_stages or int(max(torch.as_tensor(r["stage"]).max() for r in rollouts)) + 1
    groups, segments, costs, finished = {}, [], [], []
    for i, rollout in enumerate(rollouts):
        groups.setdefault(rollout["init_seed"], []).append(i)
        stage = torch.as_tensor(rollout["stage"])
        # STARE: cut into stages, a cost for each; with stage_aware=False the trajectory is one
        segments.append(segment_stages(stage, K) if stage_aware else torch.zeros_like(stage))
        steps = torch.bincount(segments[i], minlength=K) if cost_sum else 1
        costs.append((stage_costs(torch.as_tensor(rollout["distance"]).double(), segments[i], K) * steps).tolist())
        finished.append((K if rollout["success"] else min(int(stage.max()), K - 1)) if stage_aware else int(rollout["success"]))  # stages behind it
    pairs = []
    for group in groups.values():
        for k in range(K if stage_aware else 1):
            candidates = []
            for i, j in combinations(group, 2):
                if min(finished[i], finished[j]) < k or math.isnan(costs[i][k]) or math.isnan(costs[j][k]):
                    continue  # one of them never got here, or skipped the stage
                done_i, done_j = finished[i] > k, finished[j] > k
                if done_i != done_j:
                    chosen, rejected, reason = (i, j, "completed") if done_i else (j, i, "completed")
                elif done_i and abs(costs[i][k] - costs[j][k]) > cost_margin:
                    chosen, rejected, reason = (i, j, "cost") if costs[i][k] < costs[j][k] else (j, i, "cost")
                else:
                    continue
                candidates.append({"stage": k, "chosen": chosen, "rejected": rejected, "reason": reason,
                                   "cost_chosen": costs[chosen][k], "cost_rejected": costs[rejected][k]})  # fmt: skip
            # Then the widest gaps; where all are alike, a roll-out is in as few of the first pairs as can be
            candidates.sort(key=lambda pair: (pair["reason"] != "completed", pair["cost_chosen"] - pair["cost_rejected"],
                                              (pair["rejected"] - pair["chosen"]) % len(group)))  # fmt: skip
            pairs += candidates[:max_pairs_per_stage]
    return pairs


def collect_rollouts(folder: Path, model, processor, active: torch.Tensor, stats: dict, args: Args, rank: int = 0, world: int = 1) -> list[Path]:
    """Samples `rollouts_per_state` episodes from each initial state and writes each as an .npz of its own, so that a stopped run goes on
    where it was. Envs take the next episode as soon as they are free, processes every world-th one. Returns the files of all."""
    states = np.random.default_rng(args.seed).choice(TRAIN_SEEDS, args.num_initial_states, replace=False)
    folder.mkdir(exist_ok=True)
    jobs = [(int(s), r) for s in states for r in range(args.rollouts_per_state)]
    files = [folder / f"{s}_{r}.npz" for s, r in jobs]
    mine = list(zip(jobs, files, strict=True))[rank::world]
    todo = [job for job, file in mine if not file.exists()]
    if not todo:
        return files
    torch.manual_seed((args.seed * 1_000_003 + len(mine) - len(todo)) * world + rank)  # a stopped collection does not sample again what it has sampled
    progress = tqdm(total=len(mine), initial=len(mine) - len(todo), desc="roll-outs", unit="episode", disable=rank > 0 or None)
    device, N, threads = next(model.parameters()).device, min(args.num_envs, len(todo)), torch.get_num_threads()
    torch.set_num_threads(1)  # the env processes are the parallelism
    envs = make_envs(args.env_id, N, 0, image_size=processor.image_size)  # CPU physics: GPU simulation cannot repeat one initial state
    lengths, K = torch.tensor([stage.length for stage in envs.task.stage_table]), envs.num_stages
    queue, episodes = iter(todo), [[] for _ in range(N)]
    current = [next(queue) for _ in range(N)]
    obs, info = envs.reset(seed=[s for s, _ in current])
    ahead = [next(queue, None) for _ in range(N)]  # what each env plays after its present episode
    envs.set_next_seeds([job[0] if job else 0 for job in ahead])
    while any(current):
        inputs = processor(obs["rgb"], [envs.task.instruction] * N, obs["proprio"], stats.get("proprio"), device)
        bins, _, _ = sample_action(model, inputs, active)
        next_obs, _, _, _, next_info = envs.step(vla.detokenize_actions(bins, stats["action"], model.config.n_action_bins))
        for i in range(N):
            gaps = info["distances"][i].cpu() / lengths  # % K: an episode that begins in success begins in its first stage
            episodes[i].append((obs["rgb"][i].cpu(), obs["proprio"][i].cpu(), bins[i].cpu(), info["stage"][i].cpu() % K, gaps))
            if next_info["_final_info"][i]:
                if current[i]:
                    rgb, proprio, steps, stage, gaps = (torch.stack(x) for x in zip(*episodes[i], strict=True))
                    gap = gaps.gather(1, segment_stages(stage, K)[:, None])[:, 0]  # d_k / L_k of the segment's stage, which a drop does not change
                    name = f"{current[i][0]}_{current[i][1]}.npz"
                    np.savez(folder / f"tmp_{name}", rgb=rgb, proprio=proprio, bins=steps, stage=stage, distance=gap, init_seed=current[i][0],
                             success=bool(next_info["final_info"]["success"][i]))  # fmt: skip
                    (folder / f"tmp_{name}").rename(folder / name)
                    progress.update()
                current[i], ahead[i], episodes[i] = ahead[i], next(queue, None), []
        if next_info["_final_info"].any():
            envs.set_next_seeds([job[0] if job else 0 for job in ahead])
        obs, info = next_obs, next_info
    progress.close()
    envs.close()
    torch.set_num_threads(threads)
    return files


def read_rollouts(files: list[Path]) -> list[dict]:
    """Roll-outs as dicts of tensors. Raises UserError on a file that cannot be read."""
    rollouts = []
    for file in files:
        try:
            rollout = {name: torch.from_numpy(values) for name, values in np.load(file).items()}
            rollouts.append({**rollout, "init_seed": int(rollout["init_seed"]), "success": bool(rollout["success"])})
        except Exception as error:  # half a zip file may raise anything
            raise UserError(f"{file} is damaged ({type(error).__name__}): remove it, --resume samples it again") from None
    return rollouts


def segment_rows(rollout: dict, stage: int, num_stages: int, stage_aware: bool) -> torch.Tensor:
    """The steps of a roll-out's segment, in order; of the whole roll-out where trajectories are not cut into stages."""
    segment = segment_stages(rollout["stage"], num_stages) if stage_aware else torch.zeros_like(rollout["stage"])
    return (segment == stage).nonzero()[:, 0]


def export_pairs(folder: Path, pairs: list[dict], rollouts: list[dict], names: list[str], task, args: Args, output: Path) -> None:
    """Writes a clip per pair, its two segments and the frame after each side by side in random order, and pairs.jsonl: a line per pair with `clip`,
    `stage`, `stage_name`, `instruction`, `left` and `right` (roll-outs), `left_steps`, `right_steps` [first, last] and `preferred` null."""
    lines, rng = [], np.random.default_rng(args.seed)
    folder.mkdir(parents=True, exist_ok=True)
    for p, pair in enumerate(tqdm(pairs, desc="clips", unit="pair", disable=None)):
        name = task.stages[pair["stage"]] if args.stage_aware else "trajectory"
        films, row = [], {"clip": f"pair_{p:04d}.mp4", "stage": pair["stage"], "stage_name": name, "instruction": task.instruction}
        for side, i in zip(("left", "right"), rng.permutation([pair["chosen"], pair["rejected"]]), strict=True):
            rows = segment_rows(rollouts[i], pair["stage"], len(task.stages), args.stage_aware)
            row |= {side: names[i], f"{side}_steps": [int(rows[0]), int(rows[-1])]}
            frames = rollouts[i]["rgb"][rows[0] : rows[-1] + 2].numpy()  # the frame after shows the event
            films.append(np.repeat(np.repeat(frames, 3, 1), 3, 2))  # (T, 3 H, 3 W, 3)
        left, right = (np.pad(film, ((0, max(map(len, films)) - len(film)), *[(0, 0)] * 3), "edge") for film in films)  # the shorter one stands still
        imageio.mimwrite(folder / row["clip"], np.concatenate([left, np.full_like(left[:, :, :12], 255), right], 2), fps=10, macro_block_size=None)
        lines.append(json.dumps({**row, "preferred": None}))
    (folder / "pairs.tmp").write_text("\n".join(lines) + "\n")
    (folder / "pairs.tmp").rename(folder / "pairs.jsonl")
    print(f"wrote {len(pairs)} clips. Fill in {folder}/pairs.jsonl, then give this command again with --output-dir {output} --resume "
          f"--preferences {folder}/pairs.jsonl in place of --export-pairs")  # fmt: skip


def read_preferences(path: Path, rollouts: list[dict], names: list[str], num_stages: int, stage_aware: bool) -> list[dict]:
    """Pairs that a person has judged, as build_stage_pairs returns them, without a cost (reason "human", or "tie": its loss is the mean of either order's,
    least where q is the same). Raises UserError that names the line when one cannot be read, and when none is filled in."""
    index, pairs, filled = {name: i for i, name in enumerate(names)}, [], 0
    lines = [(n, line) for n, line in enumerate(path.read_text(errors="replace").splitlines(), 1) if line.strip()]
    for n, line in lines:
        try:
            row = json.loads(line)
            stage, verdict, sides = row["stage"], row["preferred"], [index[row[side]] for side in ("left", "right")]
            steps = [segment_rows(rollouts[i], stage, num_stages, stage_aware).tolist() for i in sides]
            same = [[rows[0], rows[-1]] for rows in steps] == [row["left_steps"], row["right_steps"]]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RuntimeError, OverflowError) as error:
            raise UserError(f"{path} line {n} cannot be read: {type(error).__name__} {error}; it must name two roll-outs of this run and a stage") from None
        if not same or sides[0] == sides[1] or len({rollouts[i]["init_seed"] for i in sides}) > 1:
            raise UserError(f"{path} line {n} is not a pair of this run: train with the flags and the --output-dir of --export-pairs")
        if verdict not in ("left", "right", "tie", None):
            raise UserError(f'{path} line {n}: "preferred" is {verdict!r}, not "left", "right", "tie" or null')
        filled += verdict is not None
        if verdict:
            chosen, rejected = sides if verdict != "right" else sides[::-1]
            reason = "tie" if verdict == "tie" else "human"
            pairs.append({"stage": stage, "chosen": chosen, "rejected": rejected, "reason": reason, "cost_chosen": 0.0, "cost_rejected": 0.0})
    if not pairs:
        raise UserError(f'{path} has no verdict yet: write "left", "right" or "tie" behind "preferred"')
    print(f"{filled} of {len(lines)} lines of {path} are filled in")
    return pairs


def tpo_symptoms(chosen_shift: float, margin: float) -> list[str]:
    """Lines that name what is wrong. chosen_shift: nats that the winners' actions have gained over the reference, margin: how many more than the losers'."""
    line = "logps/chosen falls while the margin grows: both sides are pushed down, the rejected one more; lower --learning-rate or raise --beta"
    return [line] * (chosen_shift < -1 and margin > 0)


def print_pairs(pairs: list[dict], rollouts: list[dict], stages: tuple[str, ...]) -> None:
    """How many pairs each stage has and why; `slower wins`: in what share of those by cost the winner took more steps; the gap of the entry distance
    shows how far the start states of later segments differ."""
    print(f"{len(rollouts)} roll-outs, {np.mean([r['success'] for r in rollouts]):.3f} successful, {sum(len(r['stage']) for r in rollouts)} env steps\n"
          "stage           pairs   completed   cost   slower wins   human   entry gap (L_k)")  # fmt: skip
    for k, name in enumerate(stages):
        mine = [pair for pair in pairs if pair["stage"] == k]
        segments = [[rollouts[pair[side]]["distance"][segment_rows(rollouts[pair[side]], k, len(stages), len(stages) > 1)] for side in ("chosen", "rejected")]
                    for pair in mine]  # fmt: skip
        slower = [len(a) > len(b) for pair, (a, b) in zip(mine, segments, strict=True) if pair["reason"] == "cost"]
        completed, human = (sum(pair["reason"] in reasons for pair in mine) for reasons in (("completed",), ("human", "tie")))
        print(f"{name:15s} {len(mine):5d} {completed:11d} {len(slower):6d} {f'{100 * np.mean(slower):.0f} %' if slower else '-':>13s} {human:7d} "
              f"{np.mean([float((a[0] - b[0]).abs()) for a, b in segments] or 0):17.2f}")  # fmt: skip
        if len(slower) >= 10 and np.mean(slower) > 0.5:
            print(f"warning: in {name} most winners by cost are the slower roll-outs: who lingers wins; --cost-sum --cost-coef 0.01 lets each step cost")


def main(args: Args) -> None:
    start = time.time()
    args.env_id, *others = stare_utils.env_ids(args.env_id)
    if others:
        raise UserError("--env-id takes one task here; sft.py and eval.py take several")
    task = stare_utils.get_task(args.env_id)
    sizes = ("num_envs", "num_initial_states", "max_pairs_per_stage", "num_epochs", "batch_size", "chunk_size", "save_freq")
    stare_utils.check_args(asdict(args), dict.fromkeys(sizes, 1) | {"rollouts_per_state": 2, "cost_sign": -1})
    if args.preferences and (args.export_pairs or not args.resume or not Path(args.preferences).is_file()):
        raise UserError(f"--preferences {args.preferences} must be the pairs.jsonl of an earlier --export-pairs; it goes with --resume, without --export-pairs")
    if args.export_pairs and (path := Path(args.export_pairs)).exists() and (path.is_file() or any(path.iterdir())):
        raise UserError(f"{path} is not an empty folder: choose another --export-pairs")
    rank, world, device = join_processes(args.cuda)
    given, record, resume = args.vla or args.checkpoint, Path(args.output_dir) / "source.txt", args.resume and args.output_dir
    recorded, origin, env_id = [*record.read_text().split("\n"), args.env_id][:3] if resume and record.exists() else ("", "", args.env_id)
    state = load_state(Path(args.output_dir), "sta_tpo", rank) if resume else None
    if recorded and given and Path(recorded).resolve() != vla.model_folder(given).resolve():
        raise UserError(f"the roll-outs in {args.output_dir} are those of {recorded}, not of {given}: choose another --output-dir")
    begun = {"env_id": env_id, "lora_rank": args.lora_rank}
    if state:
        begun |= {"lora_rank": 0, **json.loads((Path(args.output_dir) / "checkpoint" / "args.json").read_text())}
    for name, flags in (("env_id", "--env-id"), ("lora_rank", "--lora-rank")):
        if begun[name] != getattr(args, name):
            raise UserError(f"{args.output_dir} was begun with {flags} = {begun[name]}, not {getattr(args, name)}: resume with the same")
    source = recorded or given or find_checkpoint(args.env_id, ("sft",))  # a resumed run keeps its roll-outs' policy
    model, processor, source = load_policy(source, device, origin)
    if not (learned := vla.load_separator(source, args.env_id, device) if args.stage_source == "learned" else (source, None)):
        raise UserError(f"no learned separator of {args.env_id} behind this policy: sft.py trains one on demonstrations that it makes itself")
    sft_folder, separator = learned
    sft_model = model if sft_folder == source else load_policy(sft_folder, device)[0]
    stats = task_stats(model, args.env_id, args.unnorm_key)
    active = ~vla.constant_dims(stats["action"])
    stare_utils.check_world(args.env_id)
    output, writer = open_run(args, "sta_tpo", rank, state["step"] if state else 0)
    if rank == 0:
        (output / "source.tmp").write_text(f"{source}\n{vla.fingerprint(source)}\n{args.env_id}")
        (output / "source.tmp").replace(output / "source.txt")

    def policy_inputs(obs: dict, steps: torch.Tensor) -> dict:
        """The model's inputs at these steps (B,) of observations."""
        return processor(obs["rgb"][steps], [task.instruction] * len(steps), obs["proprio"][steps], stats.get("proprio"), device)

    # Roll-outs of the reference policy, and pairs
    time_rollout = time.time()
    files = collect_rollouts(output / "rollouts", model, processor, active, stats, args, rank, world)
    if world > 1:
        dist.barrier()  # until the last process has written its roll-outs
    rollouts, names, time_rollout = read_rollouts(files), [file.stem for file in files], time.time() - time_rollout
    env_steps = sum(len(rollout["stage"]) for rollout in rollouts)
    stages, K = task.stages if args.stage_aware else ("trajectory",), len(task.stages)
    if separator is not None:  # STARE: the learned separator's segments; it knows no distances
        with torch.no_grad():
            for rollout in tqdm(rollouts, desc="separator", unit="roll-out", disable=rank > 0 or None):
                hidden = sft_model(**policy_inputs(rollout, torch.arange(len(rollout["stage"]))), logits_to_keep=1).last_hidden_state[:, -1]
                rollout["stage"] = decode_stages(separator(hidden.float())[:, :K].log_softmax(-1).cpu())
                rollout["distance"] = torch.zeros(len(rollout["stage"]))
    if args.preferences:
        pairs = read_preferences(Path(args.preferences), rollouts, names, K, args.stage_aware)
    else:  # STARE: pairs per stage, of roll-outs that both finished the stage before
        pairs = build_stage_pairs(rollouts, K, args.cost_margin, args.max_pairs_per_stage, args.stage_aware, args.cost_sum)
    if not pairs:
        raise UserError("no pair: all roll-outs ended alike. Raise --num-initial-states or --rollouts-per-state, or start from a better policy")
    digest = zlib.crc32(json.dumps([pairs, world * args.batch_size]).encode())
    if state and state["pairs"] != digest:
        raise UserError(f"{output} was trained on other pairs or batches: remove {output / 'checkpoint'}* to train anew, or choose another --output-dir")
    print_pairs(pairs, rollouts, stages)
    if args.export_pairs:
        return export_pairs(Path(args.export_pairs), pairs, rollouts, names, task, args, output) if rank == 0 else None
    # What the roll-outs say about each stage, logged once: share that completed it, mean steps, mean cost of those that entered it
    for k, name in enumerate(task.stages):
        rows = [segment_rows(rollout, k, K, True) for rollout in rollouts]
        completed = [rollout["success"] or segment_stages(rollout["stage"], K).max() > k for rollout in rollouts]
        costs = [float(rollout["distance"][r].mean()) for rollout, r in zip(rollouts, rows, strict=True) if len(r) and separator is None]
        for key, values in {"reached": completed, "steps": [len(r) for r in rows], "cost": costs}.items():
            if values and rank == 0 and not state:
                writer.add_scalar(f"stage/{k}_{name}_{key}", np.mean(values), 0)
    # Steps of the pairs in one flat list; `where[rollout, stage]` are the places of a segment's steps in it
    where, flat, used = {}, {name: [] for name in ("rgb", "proprio", "bins")}, 0
    for i, k in sorted({(pair[side], pair["stage"]) for pair in pairs for side in ("chosen", "rejected")}):
        rows = segment_rows(rollouts[i], k, K, args.stage_aware)
        where[i, k], used = torch.arange(used, used + len(rows)), used + len(rows)
        for name, values in flat.items():
            values.append(rollouts[i][name][rows])
    flat = {name: torch.cat(values) for name, values in flat.items()}
    del rollouts, sft_model, separator

    def logprobs(steps: torch.Tensor) -> torch.Tensor:
        """Log-probability (B,) fp32 of the actions taken at these steps (B,)."""
        return action_logprob(model, policy_inputs(flat, steps), flat["bins"][steps].to(device), active)[0]

    @torch.no_grad()
    def shared_logprobs(steps: torch.Tensor, desc: str = "") -> torch.Tensor:
        """The same without a graph, (S,) on the CPU: each process computes its share of the steps (S,)."""
        out, chunks = torch.zeros(len(steps), device=device), steps[rank::world].split(args.chunk_size)
        out[rank::world] = torch.cat([logprobs(chunk) for chunk in tqdm(chunks, desc=desc, disable=not desc or rank > 0 or None)])
        sum_over_processes([out])
        return out.cpu()

    set_seed(args.seed)  # a new adapter is the same in all processes
    params = vla.prepare_training(model, args.lora_rank, args.gradient_checkpointing)  # first, for the dtype; a new adapter changes nothing
    ref_logprobs = shared_logprobs(torch.arange(used), "reference")  # the policy before its first step
    if state and not args.lora_rank:
        model.load_state_dict(load_policy(str(output), torch.device("cpu"))[0].state_dict())
    model.train(args.gradient_checkpointing)
    optimizer = torch.optim.AdamW(params, lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    batch_size, step, warned = world * args.batch_size, 0, set()  # of all processes
    updates_per_epoch = math.ceil(len(pairs) / batch_size)
    if state:
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state["moments"]})
        model.load_state_dict(state["adapter"], strict=False)
        step, start = state["step"], start - state["wall_s"]

    progress = tqdm(total=args.num_epochs * updates_per_epoch, initial=step, desc="sta_tpo", unit="update", disable=rank > 0 or None)
    while Stop.hold(step < args.num_epochs * updates_per_epoch):
        time_update = time.time()
        epoch, batch = divmod(step, updates_per_epoch)
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(args.seed * 1_000_003 + epoch))
        mb_pairs = [pairs[p] for p in order[batch * batch_size : (batch + 1) * batch_size].tolist()]
        segments = [where[pair[side], pair["stage"]] for side in ("chosen", "rejected") for pair in mb_pairs]  # 2P, chosen first
        mb_steps, place = torch.cat(segments).unique(return_inverse=True)  # a step that many pairs share is computed once
        mb_steps = torch.cat([mb_steps, mb_steps[:1].expand(-len(mb_steps) % world)])  # as many for each process; these weigh nothing
        owner = torch.repeat_interleave(torch.arange(len(segments)), torch.tensor([len(s) for s in segments]))
        lengths = torch.bincount(owner).double()
        share = 1 / lengths[owner] if args.tpo_reduction == "mean" else torch.ones(len(owner), dtype=torch.double)  # d q / d log pi(a_t|s_t)

        # Pass 1, no graph: q of every segment and the loss's derivative by it
        new_logprobs = shared_logprobs(mb_steps)
        logratio = (new_logprobs - ref_logprobs[mb_steps]).double()  # (S,)
        q = torch.zeros(len(segments), dtype=torch.double).index_add(0, owner, share * logratio[place]).requires_grad_()  # (2P,)
        cost_chosen, cost_rejected = (torch.tensor([pair[f"cost_{side}"] for pair in mb_pairs]).double() for side in ("chosen", "rejected"))
        losses, chosen_rewards, rejected_rewards = sta_tpo_loss(*q.chunk(2), cost_chosen, cost_rejected, args.beta, -args.cost_sign * args.cost_coef)
        tie = torch.tensor([pair["reason"] == "tie" for pair in mb_pairs])
        losses = losses + 0.5 * tie * (chosen_rewards - rejected_rewards)  # the mean of either order's: -log sigmoid(-x) = x - log sigmoid(x)
        losses.mean().backward()
        # Pass 2, a chunk at a time: d loss / d theta = sum over steps of weight_t * d log pi(a_t|s_t) / d theta, exact because nothing
        # changed since pass 1 (no dropout, no optimiser step); a step's weight sums over all pairs that share it
        weight = torch.zeros(len(mb_steps), dtype=torch.double).index_add(0, place, share * q.grad[owner]).float().to(device)
        optimizer.zero_grad()
        for steps, w in zip(mb_steps[rank::world].split(args.chunk_size), weight[rank::world].split(args.chunk_size), strict=True):
            (w * logprobs(steps)).sum().backward()
        sum_over_processes([p.grad for p in params])
        grad_norm = torch.nn.utils.clip_grad_norm_(params, args.max_grad_norm)
        stare_utils.refuse_nan({"loss": losses.sum().item(), "gradient": grad_norm.item()}, output, {name: x[mb_steps] for name, x in flat.items()})
        optimizer.step()
        step += 1
        margins = (chosen_rewards - rejected_rewards).detach()
        both = torch.stack([new_logprobs.double(), logratio], -1)[place] / lengths[owner, None]
        logp, shift = torch.zeros(len(segments), 2, dtype=torch.double).index_add(0, owner, both).unbind(-1)  # (2P,) each: mean over the segment
        scalars = {
            "losses/tpo_loss": losses.mean().item(), "losses/grad_norm": grad_norm.item(), "charts/learning_rate": args.learning_rate,
            "rewards/chosen": chosen_rewards.mean().item(), "rewards/rejected": rejected_rewards.mean().item(), "rewards/margins": margins.mean().item(),
            "rewards/accuracies": (margins > 0).double().mean().item(),
            "logps/chosen": logp[: len(mb_pairs)].mean().item(), "logps/rejected": logp[len(mb_pairs) :].mean().item(),
            "charts/SPS": len(mb_steps) / (time.time() - time_update), "time/rollout": time_rollout, "time/update": time.time() - time_update,
            "time/peak_gpu_gb": torch.cuda.max_memory_allocated() / 2**30,
        }  # fmt: skip
        of_stage = [torch.tensor([pair["stage"] == k for pair in mb_pairs]) for k in range(len(stages))]
        scalars |= {f"stage/{k}_{name}_margin": margins[of_stage[k]].mean().item() for k, name in enumerate(stages) if of_stage[k].any()}
        for key, value in scalars.items() if rank == 0 else ():
            writer.add_scalar(key, value, step)
        chosen_shift, rejected_shift = (half.mean().item() for half in shift.chunk(2))
        for line in set(tpo_symptoms(chosen_shift, chosen_shift - rejected_shift)) - warned:
            print(f"warning: {line}")
            warned.add(line)
        progress.update()
        if (Stop.asked() or step % args.save_freq == 0 or step == args.num_epochs * updates_per_epoch) and rank == 0:
            state = {"script": "sta_tpo", "step": step, "pairs": digest, "wall_s": time.time() - start}
            info = {**asdict(args), "checkpoint": str(source), "method": "STA-TPO" if args.stage_aware else "TPO", "env_steps": env_steps,
                    "wall_s": round(state["wall_s"], 1)}  # fmt: skip
            save_checkpoint(output, model, processor, info, state, optimizer)
            print(f"update {step}: loss {scalars['losses/tpo_loss']:.4f} margin {scalars['rewards/margins']:+.3f} accuracy {scalars['rewards/accuracies']:.2f}")
    progress.close()
    if rank > 0:
        return
    if args.num_eval_episodes:
        begin, result = time.time(), evaluate(model, processor, args.env_id, args.num_eval_episodes, args.seed, args.num_envs)
        scalars = {"time/eval": time.time() - begin} | {f"eval/{key}": value for key, value in result.items() if isinstance(value, float)}
        for key, value in scalars.items():
            writer.add_scalar(key, value, step)
        print(f"success_once {result['success_once']:.3f} over {len(result['episodes'])} episodes")
    writer.close()
    print(f"wrote {output / 'checkpoint'} after {time.time() - start:.0f} s")


if __name__ == "__main__":
    with stare_utils.one_line_errors():
        main(tyro.cli(Args))
