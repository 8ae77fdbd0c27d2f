"""STA-TPO: stage-wise preferences between roll-outs from the same initial state.

It is step 2 of IPI: sft.py (imitation), sta_tpo.py (preference), sta_ppo.py (interaction).

    python sta_tpo.py --env-id PickCube-v1
        starts from the newest sft.py run of this task, else from the shipped checkpoint
    python sta_tpo.py --env-id PickCube-v1 --cost mean
        the paper's cost: the mean distance of a segment instead of the sum
    python sta_tpo.py --env-id PickCube-v1 --no-stage-aware --max-pairs-per-stage 24
        plain TPO: whole trajectories, as many pairs in all
    python sta_tpo.py --env-id PickCube-v1 --branch
        both roll-outs of a pair begin the stage in the same state, see `Tree`
    python sta_tpo.py --env-id PickCube-v1 --export-pairs DIR
        clips for a person to judge; --preferences DIR/pairs.jsonl trains on the verdicts

    q(tau_k)  = mean over the steps of segment k of [log pi(a_t|s_t) - log pi_ref(a_t|s_t)]
    q^(tau_k) = q(tau_k) - lambda * l_k(tau_k)        l_k: sum (or mean) of d_k / L_k
    loss      = -mean over pairs of log sigmoid(beta * (q^(chosen) - q^(rejected)))
                - c_a * mean over pairs of (mean over the winner's steps of log pi)

A pair exists for stage k only if both roll-outs completed stage k - 1. The winner completed stage
k. Where both did, the winner is the one whose cost is lower by a margin.
The reference is the checkpoint itself, as cached fp32 log-probabilities.
docs/sta_tpo.md has the equations, the choices, and what differs from GRAPE.

Comments that begin with STARE show where stages enter TPO.
Letters: T steps, K stages, P pairs, S steps of all segments in a batch, U different ones among
them, B steps in a chunk, A action tokens, N envs, D hidden width.
"""

import json
import math
import os
import shutil
import time
import zlib
from dataclasses import asdict, dataclass, field
from itertools import combinations
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
from transformers import set_seed

import vla
from eval import evaluate
from plumbing import parallel
from plumbing.checkpoint import (
    fingerprint,
    given_policy,
    load_policy,
    model_folder,
    require_separator,
    save_checkpoint,
    task_stats,
)
from plumbing.folders import find_checkpoint
from plumbing.human_pairs import export_pairs, read_preferences
from plumbing.report import write_text
from plumbing.run import (
    Progress,
    Run,
    Stop,
    check_numbers,
    one_line_errors,
    refuse_nan,
    tpo_symptoms,
)
from stare_utils import decode_stages, segment_stages, segment_steps, stage_costs
from world.assets import check_world, choose_renderer
from world.tasks import TRAIN_SEEDS, Task, UserError, env_ids, get_task, require_pace
from world.vector import last_states, make_envs


@dataclass
class Args:
    # the run
    seed: int = 1
    """seed of the roll-outs' initial states, of sampling and of the pairs' order"""
    cuda: bool = True
    """train on the GPU if there is one"""
    track: bool = False
    """log to Weights & Biases too (needs `pip install wandb`)"""
    output_dir: str = ""
    """run folder with checkpoint/, TensorBoard files and roll-outs; empty:
    runs/{env_id}__sta_tpo__{seed}__{time}"""
    resume: bool = False
    """go on from the checkpoint and the finished roll-outs in --output-dir, if there are any"""

    # the policy and the task
    checkpoint: str = ""
    """policy to start from, which is also the reference; empty: the newest sft.py run of this task
    under runs/, else the checkpoint shipped with the repository"""
    vla: str = ""
    """an OpenVLA instead of --checkpoint: its folder in the published layout, or its hub id"""
    unnorm_key: str = ""
    """data set whose action statistics to use, e.g. bridge_orig: a key of norm_stats in config.json
    or of dataset_statistics.json beside it"""
    env_id: str = "PickCube-v1"
    """task"""
    num_envs: int = 8
    """env processes for roll-outs and evaluation"""
    render: Literal["auto", "cpu", "gpu"] = "auto"
    """where pictures are drawn: cpu is Mesa's software driver, auto is the GPU if there is one"""

    # roll-outs
    num_initial_states: int = 64
    """different initial states"""
    rollouts_per_state: int = 8
    """sampled roll-outs from each of them; pairs never mix initial states"""
    branch: bool = False
    """sample each stage on its own: --rollouts-per-state continuations from one state per stage
    and initial state, so that both roll-outs of a pair begin the stage in the same state"""

    # pairs
    stage_aware: bool = True
    """pairs and q per stage (STA-TPO); off: pairs and q of whole trajectories (plain TPO)"""
    stage_source: Literal["rules", "learned"] = "rules"
    """rules: read the simulator's state. learned: sft.py's separator, decoded by Viterbi. It knows
    no distances, so only completion makes pairs"""
    export_pairs: str = ""
    """folder: write the pairs there as clips, left beside right, with a pairs.jsonl for a person to
    fill in, and stop"""
    preferences: str = ""
    """pairs.jsonl in which a person wrote "left", "right" or "tie": train on these instead, in the
    same run (--resume --output-dir)"""
    tpo_reduction: Literal["mean", "sum"] = "mean"
    """q is the mean over a segment's steps (the paper) or the sum (GRAPE), which needs a smaller
    beta, such as 0.3"""
    beta: float = 5.0
    """inverse temperature of the preference; a larger one keeps the policy nearer the reference"""
    cost: Literal["sum", "mean"] = "sum"
    """l_k is the sum of a segment's distances, in which each step costs, or the paper's mean, which
    mostly prefers the slower roll-out (docs/results.md)"""
    cost_coef: float | None = None
    """lambda: weight of the stage cost in q^; costs are in units of L_k; empty: 0.01 with --cost
    sum, 0.1 with --cost mean, because a segment has some ten steps"""
    cost_margin: float = 0.1
    """where both roll-outs completed a stage, the cheaper one wins only by this margin, in units of
    L_k; 1e9: only completion makes pairs"""
    branch_patience: float = 2.0
    """a branch ends after this many times the expert's steps in its stage; more for a policy that
    was taught to be slower, as by sft.py's --demo-speed 0.4"""
    blame_steps: int = 0
    """of a loser that did not complete its stage, only the last steps, this many, enter q: those
    before them may have been right; 0: all steps. Not with --preferences, which say who is better
    and not who completed"""
    anchor_coef: float = 0.0
    """c_a: weight of -mean log pi over the winners' steps, which keeps their log-probability from
    falling with the losers' (RPO, CPL)"""
    max_pairs_per_stage: int = 6
    """at most this many pairs per initial state and stage, completions first, so that easy stages
    do not drown the others"""

    # the optimiser
    lora_rank: int = 0
    """0 trains all weights; else LoRA matrices of this rank, merged into what is written"""
    learning_rate: float = 5e-5
    """AdamW, constant"""
    max_grad_norm: float = 1.0
    """the gradient's norm is clipped to this, over all parameters together"""
    num_epochs: int = 1
    """passes over the pairs"""
    batch_size: int = 64
    """pairs per optimiser step, of each process"""
    chunk_size: int = 128
    """samples per forward and backward pass of an update: bounds memory, not the result"""
    gradient_checkpointing: bool = False
    """compute a layer's activations again in the backward pass: less memory, a third more work"""

    # saving and evaluating
    save_freq: int = 20
    """optimiser steps between checkpoints"""
    num_eval_episodes: int = 16
    """episodes of the evaluation at the end; 0 leaves it out"""


@torch.no_grad()
def sample_action(model, inputs: dict, active: torch.Tensor, greedy: bool = False):
    """One action, decoded token by token over the action bins alone, with a key-value cache.

    inputs: what the processor returns for B observations. active: (A,) bool, false where the
    action never varies: its bin is n_bins // 2 and is left out of the log-probability.
    Returns bins (B, A) long, logprob (B,) fp32 (the sum over active tokens), and hidden (B, D),
    the last layer's output at the token before the first action token.
    """
    # Bin b is token id end - 1 - b.
    end = model.config.action_id_end
    n_bins = model.config.n_action_bins
    out = model(**inputs, use_cache=True, logits_to_keep=1)
    hidden = out.last_hidden_state[:, -1]
    # Later passes need a mask over the whole sequence, in which the model has inserted its image
    # and proprioception tokens after <s>.
    mask = inputs["attention_mask"]
    inserted = mask.new_ones(len(mask), model.num_prefix())
    mask = torch.cat([mask[:, :1], inserted, mask[:, 1:]], 1)
    bins = torch.full((len(mask), len(active)), n_bins // 2, device=mask.device)
    logprob = torch.zeros(len(mask), device=mask.device)
    num_fed = 0
    for a in active.nonzero()[:, 0].tolist():
        if a > num_fed:
            # Feed the tokens that the model has not seen: the last decoded one, and fixed ones.
            tokens = end - 1 - bins[:, num_fed:a]
            num_fed = a
            mask = torch.cat([mask, torch.ones_like(tokens)], 1)
            cache = out.past_key_values
            out = model(tokens, mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
        # The flip puts bin 0 first.
        logits = out.logits[:, -1, end - n_bins : end].flip(-1)
        logp = logits.float().log_softmax(-1)  # (B, n_bins)
        if greedy:
            bins[:, a] = logp.argmax(-1)
        else:
            bins[:, a] = torch.multinomial(logp.exp(), 1)[:, 0]
        logprob += logp.gather(-1, bins[:, a : a + 1])[:, 0]
    return bins, logprob, hidden


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


def sta_tpo_loss(
    q_chosen: torch.Tensor,
    q_rejected: torch.Tensor,
    cost_chosen: torch.Tensor,
    cost_rejected: torch.Tensor,
    beta: float,
    cost_coef: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """loss = -log sigmoid(beta * (q^+ - q^-)), q^ = q - cost_coef * cost.

    All (P,). Returns the loss per pair, and the chosen and rejected rewards beta * q^.
    """
    # (P,) and (P, 1) would give P * P losses without an error.
    shapes = {x.shape for x in (q_chosen, q_rejected, cost_chosen, cost_rejected)}
    assert len(shapes) == 1, "shapes differ: this would broadcast"
    chosen_rewards = beta * (q_chosen - cost_coef * cost_chosen)
    rejected_rewards = beta * (q_rejected - cost_coef * cost_rejected)
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards)
    return losses, chosen_rewards, rejected_rewards


# ---- roll-outs of the reference policy ----
def rollout_jobs(args: Args) -> list[tuple[int, ...]]:
    """(seed of the initial state, number) of each roll-out. With --branch (seed,) of each tree."""
    # The seed alone decides the initial states, so that a resumed run finds its files again. More
    # states begin with the same ones, because the seeds are drawn one after another.
    rng = np.random.default_rng(args.seed)
    init_seeds = []
    while len(init_seeds) < args.num_initial_states:
        drawn = int(rng.integers(TRAIN_SEEDS))
        if drawn not in init_seeds:
            init_seeds.append(drawn)
    if args.branch:
        return [(seed,) for seed in init_seeds]
    return [(seed, r) for seed in init_seeds for r in range(args.rollouts_per_state)]


def files_of(folder: Path, jobs: list[tuple[int, ...]]) -> list[Path]:
    """The .npz of each roll-out. With --branch the folder with those of each tree."""
    if len(jobs[0]) == 1:
        return [folder / str(seed) for (seed,) in jobs]
    return [folder / f"{seed}_{number}.npz" for seed, number in jobs]


def collect_rollouts(
    folder: Path,
    model,
    codec: vla.Codec,
    active: torch.Tensor,
    image_size: int,
    args: Args,
    rank: int = 0,
    world_size: int = 1,
) -> list[Path]:
    """Samples `rollouts_per_state` episodes from each initial state. Returns the files of all.

    Each roll-out is an .npz of its own, so that a stopped run goes on where it was. A process of a
    job takes every world_size-th one. With --branch a tree takes the place of a roll-out.
    """
    folder.mkdir(exist_ok=True)
    jobs = rollout_jobs(args)
    files = files_of(folder, jobs)
    mine = range(rank, len(jobs), world_size)
    todo = [jobs[i] for i in mine if not files[i].exists()]
    if not todo:
        return files
    if args.preferences:
        raise UserError(
            f"{folder} lacks roll-outs that were judged: give the flags of the --export-pairs"
        )
    num_done = len(mine) - len(todo)
    # A stopped collection must not sample again what it has sampled.
    torch.manual_seed((args.seed * 1_000_003 + num_done) * world_size + rank)
    # The env processes are the parallelism, so torch gets one thread.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    N = min(args.num_envs, len(todo))
    # CPU physics: ManiSkill's GPU simulation cannot repeat one initial state.
    envs = make_envs(args.env_id, N, 0, image_size=image_size)
    unit = "state" if args.branch else "episode"
    progress = Progress(total=len(mine), initial=num_done, desc="roll-outs", unit=unit)
    if args.branch:
        R = args.rollouts_per_state
        for tree in sample_trees(envs, model, codec, active, todo, R, args.branch_patience):
            write_tree(folder, tree)
            progress.update()
    else:
        for job, rollout in sample_rollouts(envs, model, codec, active, todo):
            write_rollout(folder, job, rollout)
            progress.update()
    progress.close()
    envs.close()
    torch.set_num_threads(threads)
    return files


def sample_rollouts(envs, model, codec: vla.Codec, active: torch.Tensor, todo: list):
    """Plays one episode per job, from the job's initial state. Yields (job, roll-out)."""
    N = envs.num_envs
    lengths = torch.tensor([stage.length for stage in envs.task.stage_table])
    # Each env plays its `current` job. None: all jobs are taken, and its episodes do not count.
    queue = iter(todo)
    current = [next(queue) for _ in range(N)]
    obs, info = envs.reset(seed=[seed for seed, _ in current])
    # An env resets itself at an episode's end, so it must know its next seed before that.
    ahead = [next(queue, None) for _ in range(N)]
    envs.set_next_seeds([job[0] if job else 0 for job in ahead])
    episodes = [[] for _ in range(N)]
    while any(current):
        bins, _, _ = sample_action(model, codec.inputs(obs), active)
        next_obs, _, _, _, next_info = envs.step(codec.actions(bins))
        ended = next_info["_final_info"]
        for i in range(N):
            episodes[i].append(recorded_step(i, obs, info, bins, lengths))
            if not ended[i]:
                continue
            if current[i]:
                rollout = stack_steps(episodes[i], envs.num_stages)
                rollout["success"] = bool(next_info["final_info"]["success"][i])
                yield current[i], rollout
            current[i] = ahead[i]
            ahead[i] = next(queue, None)
            episodes[i] = []
        if ended.any():
            envs.set_next_seeds([job[0] if job else 0 for job in ahead])
        obs, info = next_obs, next_info


def recorded_step(i: int, obs: dict, info: dict, bins: torch.Tensor, lengths: torch.Tensor):
    """What is kept of env i's step. lengths: (K,) L_k."""
    return {
        # Copies, because an env may be moved to another state.
        "rgb": obs["rgb"][i].cpu().clone(),
        "proprio": obs["proprio"][i].cpu().clone(),
        "bins": bins[i].cpu(),
        # An episode that begins in success, which is stage K, begins in stage 0.
        "stage": info["stage"][i].cpu() % len(lengths),
        "distances": info["distances"][i].cpu() / lengths,
    }


@dataclass
class Tree:
    """STARE: what is sampled from one initial state, a stage at a time.

    All branches of a stage begin in one state: where a branch of the stage before has entered it.
    """

    seed: int
    # where the present branches begin: the seed of a reset, or a saved state
    origin: int | dict
    stage: int = 0
    # how many branches of this stage have ended
    num_branches: int = 0
    # the steps of the present branch, and the finished branches of all stages
    steps: list[dict] = field(default_factory=list)
    rollouts: list[dict] = field(default_factory=list)
    # the state in which a branch has first entered a later stage, and that stage
    entered: dict | None = None
    next_stage: int = 0

    def end_branch(self, reached: int, success: bool, num_stages: int) -> None:
        """Keeps the present branch. reached: the stage of its last state, K at success."""
        rollout = stack_steps(self.steps, num_stages)
        rollout["success"] = success
        rollout["completed"] = max(reached, self.stage)
        self.rollouts.append(rollout)
        self.num_branches += 1
        self.steps = []

    def advance(self, branches_per_stage: int) -> int | dict | None:
        """Goes on to the next branch, perhaps of the next stage. Returns where it begins.

        None: all branches of the stage have ended, and none has entered a later one.
        """
        if self.num_branches < branches_per_stage:
            return self.origin
        self.origin = self.entered
        self.stage = self.next_stage
        self.num_branches = 0
        self.entered = None
        return self.origin


def sample_trees(
    envs, model, codec: vla.Codec, active: torch.Tensor, todo: list, R: int, patience: float
):
    """Plays one tree per job, R branches in each stage that is reached. Yields the trees.

    A branch ends where its stage is completed, with its episode, or when it has taken `patience`
    times the expert's steps.
    """
    N = envs.num_envs
    K = envs.num_stages
    lengths = torch.tensor([stage.length for stage in envs.task.stage_table])
    most_steps = [patience * steps for steps in envs.task.pace]
    new_trees = (Tree(seed, origin=seed) for (seed,) in todo)
    # Each env plays a tree. None: all trees are taken.
    trees = [next(new_trees) for _ in range(N)]
    obs, info = envs.reset(seed=[tree.seed for tree in trees])
    while any(trees):
        bins, _, _ = sample_action(model, codec.inputs(obs), active)
        next_obs, _, _, _, next_info = envs.step(codec.actions(bins))
        ended, reached, success = last_states(next_info)
        enters = [False] * N
        for i, tree in enumerate(trees):
            if not tree:
                continue
            is_first_step = not tree.rollouts and not tree.steps
            if is_first_step:
                tree.stage = int(info["stage"][i]) % K
            tree.steps.append(recorded_step(i, obs, info, bins, lengths))
            # After the end of an episode there is no state to go on from.
            enters[i] = bool(reached[i] > tree.stage and not ended[i])
        # The first branch that enters a later stage gives the state where its branches begin.
        saved = envs.save_where([e and not t.entered for e, t in zip(enters, trees)])
        targets = [None] * N
        for i, tree in enumerate(trees):
            if not tree:
                continue
            if saved[i]:
                tree.entered = saved[i]
                tree.next_stage = int(reached[i])
            late = len(tree.steps) >= most_steps[tree.stage]
            if not (enters[i] or ended[i] or late):
                continue
            tree.end_branch(int(reached[i]), bool(success[i]), K)
            targets[i] = tree.advance(R)
            if targets[i] is None:
                yield tree
                trees[i] = next(new_trees, None)
                targets[i] = trees[i].seed if trees[i] else None
        obs, info = next_obs, next_info
        envs.go_to(targets, obs, info)


def stack_steps(steps: list[dict], num_stages: int) -> dict:
    """A roll-out's arrays (T, ...) from its steps."""
    rollout = {name: torch.stack([step[name] for step in steps]) for name in steps[0]}
    # Of each step the distance of its segment's stage, in units of L_k. A drop changes the label,
    # but not the segment.
    segment = segment_stages(rollout["stage"], num_stages)
    distances = rollout.pop("distances")  # (T, K)
    rollout["distance"] = distances.gather(1, segment[:, None])[:, 0]
    return rollout


def write_rollout(folder: Path, job: tuple[int, int], rollout: dict) -> None:
    """Writes a roll-out beside its place and renames it."""
    seed, number = job
    # A run that dies here leaves no half file behind that a resumed one would read.
    new = folder / f"tmp_{seed}_{number}.npz"
    np.savez(new, **rollout, init_seed=seed)
    new.rename(folder / f"{seed}_{number}.npz")


def write_tree(folder: Path, tree: Tree) -> None:
    """Writes a tree's roll-outs into a folder beside its place and renames it."""
    # A run that dies here leaves no half folder behind that a resumed one would read.
    new = folder / f"tmp_{tree.seed}"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    for number, rollout in enumerate(tree.rollouts):
        np.savez(new / f"{tree.seed}_b{number}.npz", **rollout, init_seed=tree.seed)
    new.rename(folder / str(tree.seed))


def rollout_files(paths: list[Path]) -> list[Path]:
    """The .npz files of all roll-outs. paths: these files, or the folders of trees."""
    files = []
    for path in paths:
        if path.is_dir():
            files += sorted(path.glob("*.npz"), key=lambda file: int(file.stem.split("_b")[1]))
        else:
            files.append(path)
    return files


def read_rollouts(files: list[Path]) -> list[dict]:
    """Roll-outs as dicts of tensors. Raises UserError on a file that cannot be read."""
    rollouts = []
    for file in files:
        try:
            arrays = np.load(file).items()
            rollout = {name: torch.from_numpy(values) for name, values in arrays}
            rollout["init_seed"] = int(rollout["init_seed"])
            rollout["success"] = bool(rollout["success"])
            if "completed" in rollout:
                rollout["completed"] = int(rollout["completed"])
        except Exception as error:
            # The branches of a tree are sampled together.
            place = file.parent if "_b" in file.stem else file
            # Half a zip file may raise anything.
            raise UserError(
                f"{file} is damaged ({type(error).__name__}): remove {place}, "
                "--resume samples it again"
            ) from None
        rollouts.append(rollout)
    return rollouts


@torch.no_grad()
def relabel(
    rollouts: list[dict], sft_model, separator, codec: vla.Codec, K: int, chunk_size: int
) -> None:
    """STARE: replaces the rules' stages by the learned separator's. It knows no distances."""
    for rollout in Progress(rollouts, desc="separator", unit="roll-out"):
        stage_logits = []
        for chunk in torch.arange(len(rollout["stage"])).split(chunk_size):
            inputs = codec.inputs({name: rollout[name][chunk] for name in ("rgb", "proprio")})
            hidden = sft_model(**inputs, logits_to_keep=1).last_hidden_state[:, -1]
            # The classifier has an output for each stage of its longest task.
            stage_logits.append(separator(hidden.float())[:, :K])
        logprobs = torch.cat(stage_logits).log_softmax(-1)  # (T, K)
        # Viterbi: a trajectory's stages never fall.
        rollout["stage"] = decode_stages(logprobs.cpu())
        rollout["distance"] = torch.zeros(len(rollout["stage"]))


# ---- pairs ----
def segments_of(rollout: dict, num_stages: int, stage_aware: bool) -> list[torch.Tensor]:
    """The steps of each segment, in order; without stages the whole trajectory is one segment."""
    stage = torch.as_tensor(rollout["stage"])
    if stage_aware:
        return segment_steps(stage, num_stages)
    return [torch.arange(len(stage))]


def segment_costs(rollout: dict, num_stages: int, stage_aware: bool, cost: str) -> list[float]:
    """STARE: l_k of each segment, NaN for a stage that was skipped or never entered."""
    stage = torch.as_tensor(rollout["stage"])
    distance = torch.as_tensor(rollout["distance"]).double()
    segment = segment_stages(stage, num_stages) if stage_aware else torch.zeros_like(stage)
    # in double, because two roll-outs may differ by little
    costs = stage_costs(distance, segment, num_stages)
    if cost == "sum":
        # mean times steps is the sum, in which each step costs
        costs = costs * torch.bincount(segment, minlength=num_stages)
    return costs.tolist()


def num_completed(rollout: dict, num_stages: int, stage_aware: bool) -> int:
    """How many stages (or, without stages, whole trajectories) a roll-out has completed."""
    if not stage_aware:
        return int(rollout["success"])
    # A branch says so itself, because its last state is not recorded.
    if "completed" in rollout:
        return rollout["completed"]
    if rollout["success"]:
        return num_stages
    return min(int(torch.as_tensor(rollout["stage"]).max()), num_stages - 1)


def build_stage_pairs(
    rollouts: list[dict],
    num_stages: int | None = None,
    cost_margin: float = 0.1,
    max_pairs_per_stage: int = 10**9,
    stage_aware: bool = True,
    cost: str = "sum",
) -> list[dict]:
    """Preference pairs between roll-outs of the same initial state.

    rollouts: dicts with `init_seed` int, `stage` (T,) labels 0..K of the states acted in,
    `distance` (T,) stage distance (any unit, here d / L_k), `success` bool.
    Returns dicts: `stage`, `chosen` and `rejected` (indices into rollouts), `reason`,
    `cost_chosen`, `cost_rejected`. The reason is "completed" (the winner completed the stage, the
    loser did not) or "cost" (both did, and the winner's cost is lower by more than `cost_margin`).
    stage_aware=False: the whole trajectory is one stage, completed by success.
    """
    K = num_stages
    if K is None:
        K = int(max(torch.as_tensor(rollout["stage"]).max() for rollout in rollouts)) + 1
    costs = [segment_costs(rollout, K, stage_aware, cost) for rollout in rollouts]
    completed = [num_completed(rollout, K, stage_aware) for rollout in rollouts]
    # Pairs never mix initial states.
    groups: dict[int, list[int]] = {}
    for i, rollout in enumerate(rollouts):
        groups.setdefault(rollout["init_seed"], []).append(i)
    pairs = []
    for group in groups.values():
        for k in range(K if stage_aware else 1):
            # STARE: every two roll-outs are compared stage by stage.
            candidates = []
            for i, j in combinations(group, 2):
                pair = compare(i, j, k, costs, completed, cost_margin)
                if pair:
                    candidates.append(pair)
            candidates.sort(key=lambda pair: preference_order(pair, len(group)))
            pairs += candidates[:max_pairs_per_stage]
    return pairs


def compare(
    i: int, j: int, k: int, costs: list, completed: list[int], cost_margin: float
) -> dict | None:
    """The pair that roll-outs i and j make in stage k; None where neither is better."""
    # One of the two has not completed stage k - 1, so it never got here.
    if min(completed[i], completed[j]) < k:
        return None
    # One of the two skipped the stage, or is a branch of another one.
    if math.isnan(costs[i][k]) or math.isnan(costs[j][k]):
        return None
    i_completed = completed[i] > k
    j_completed = completed[j] > k
    if i_completed != j_completed:
        reason = "completed"
        i_wins = i_completed
    elif i_completed and abs(costs[i][k] - costs[j][k]) > cost_margin:
        reason = "cost"
        i_wins = costs[i][k] < costs[j][k]
    else:
        return None
    chosen, rejected = (i, j) if i_wins else (j, i)
    return {
        "stage": k,
        "chosen": chosen,
        "rejected": rejected,
        "reason": reason,
        "cost_chosen": costs[chosen][k],
        "cost_rejected": costs[rejected][k],
    }


def preference_order(pair: dict, group_size: int) -> tuple:
    """Sorts pairs: completions first, then the widest gaps.

    Where all gaps are alike, the last entry spreads the first pairs over the roll-outs.
    """
    by_cost = pair["reason"] != "completed"
    gap = pair["cost_chosen"] - pair["cost_rejected"]
    turn = (pair["rejected"] - pair["chosen"]) % group_size
    return by_cost, gap, turn


def print_pairs(
    pairs: list[dict], rollouts: list[dict], segments: list, stages: tuple[str, ...]
) -> None:
    """A table: how many pairs each stage has, and why.

    slower wins: the share of the pairs by cost whose winner took more steps. entry gap: how far
    apart in d_k / L_k the two segments of a pair begin, because only stage 0 starts alike. Learned
    stages know no distances, so their gap is 0.
    """
    success = np.mean([rollout["success"] for rollout in rollouts])
    steps = sum(len(rollout["stage"]) for rollout in rollouts)
    print(f"{len(rollouts)} roll-outs, {success:.3f} successful, {steps} env steps")
    print("stage           pairs   completed   cost   slower wins   human   entry gap (L_k)")
    for k, name in enumerate(stages):
        reasons = []
        slower = []
        gaps = []
        for pair in pairs:
            if pair["stage"] != k:
                continue
            reasons.append(pair["reason"])
            # The gap is where the two segments begin: at their first steps.
            chosen = segments[pair["chosen"]][k]
            rejected = segments[pair["rejected"]][k]
            begin = rollouts[pair["chosen"]]["distance"][chosen[0]]
            other = rollouts[pair["rejected"]]["distance"][rejected[0]]
            gaps.append(float((begin - other).abs()))
            if pair["reason"] == "cost":
                slower.append(len(chosen) > len(rejected))
        completed = reasons.count("completed")
        human = reasons.count("human") + reasons.count("tie")
        share = f"{100 * np.mean(slower):.0f} %" if slower else "-"
        print(
            f"{name:15s} {len(reasons):5d} {completed:11d} {len(slower):6d} {share:>13s} "
            f"{human:7d} {np.mean(gaps or 0):17.2f}"
        )
        if len(slower) >= 10 and np.mean(slower) > 0.5:
            print(
                f"warning: in {name} most winners by cost are the slower roll-outs: with --cost "
                "mean use --cost sum, in which each step costs; else raise --cost-margin"
            )


def log_stages(run: Run, task: Task, rollouts: list[dict], with_costs: bool) -> None:
    """Logs what the roll-outs say about each stage, once.

    It logs the share that completed it, the mean steps, and the mean cost of those that entered it.
    """
    K = len(task.stages)
    segments = [segment_steps(rollout["stage"], K) for rollout in rollouts]
    for k, name in enumerate(task.stages):
        completed = []
        steps = []
        costs = []
        for rollout, segment in zip(rollouts, segments):
            in_stage = segment[k]
            # A branch is of one stage, and says nothing about the others.
            if "completed" in rollout and not len(in_stage):
                continue
            completed.append(num_completed(rollout, K, True) > k)
            steps.append(len(in_stage))
            if len(in_stage) and with_costs:
                costs.append(float(rollout["distance"][in_stage].mean()))
        if not completed:
            continue
        scalars = {
            f"stage/{k}_{name}_reached": np.mean(completed),
            f"stage/{k}_{name}_steps": np.mean(steps),
        }
        if costs:
            scalars[f"stage/{k}_{name}_cost"] = np.mean(costs)
        run.log(scalars, 0)


# ---- log-probabilities at the pairs' steps ----
class PairSteps:
    """The steps of all pairs in one flat list, and the policy's log-probabilities at them."""

    def __init__(
        self, pairs: list[dict], rollouts: list[dict], segments: list, model, codec, active
    ):
        self.model = model
        self.codec = codec
        self.active = active
        # (roll-out, stage) -> where that segment's steps stand in the flat list
        self.where: dict[tuple[int, int], torch.Tensor] = {}
        used = {(pair[side], pair["stage"]) for pair in pairs for side in ("chosen", "rejected")}
        parts = {"rgb": [], "proprio": [], "bins": []}
        self.num_steps = 0
        # A segment that several pairs share is kept once.
        for i, k in sorted(used):
            steps = segments[i][k]
            self.where[i, k] = torch.arange(self.num_steps, self.num_steps + len(steps))
            self.num_steps += len(steps)
            for name, values in parts.items():
                values.append(rollouts[i][name][steps])
        self.flat = {name: torch.cat(values) for name, values in parts.items()}

    def logprobs(self, steps: torch.Tensor) -> torch.Tensor:
        """Log-probability (B,) fp32 of the actions taken at these steps (B,)."""
        obs = {name: values[steps] for name, values in self.flat.items()}
        bins = obs["bins"].to(self.codec.device)
        logprob, *_ = action_logprob(self.model, self.codec.inputs(obs), bins, self.active)
        return logprob

    @torch.no_grad()
    def shared_logprobs(
        self, steps: torch.Tensor, chunk_size: int, rank: int, world_size: int, quiet: bool = True
    ) -> torch.Tensor:
        """The same without a graph, on the CPU. Each process computes its share of the steps."""
        # The others' steps stay zero here, so the sum over processes fills them in.
        out = torch.zeros(len(steps), device=self.codec.device)
        chunks = steps[rank::world_size].split(chunk_size)
        bar = Progress(chunks, desc="reference", unit="chunk", disable=quiet)
        out[rank::world_size] = torch.cat([self.logprobs(chunk) for chunk in bar])
        parallel.sum_over_processes([out])
        return out.cpu()


def sides_of(pairs: list[dict], where: dict, blame_steps: int) -> tuple[list, list]:
    """The steps of each pair's winner and loser that enter q. where: of PairSteps."""
    chosen = []
    rejected = []
    for pair in pairs:
        chosen.append(where[pair["chosen"], pair["stage"]])
        steps = where[pair["rejected"], pair["stage"]]
        # What a loser did long before its end may have been right.
        if blame_steps and pair["reason"] == "completed":
            steps = steps[-blame_steps:]
        rejected.append(steps)
    return chosen, rejected


def anchor_shares(owner: torch.Tensor, lengths: torch.Tensor, is_tie: torch.Tensor):
    """Each step's share of the mean over pairs of (mean over the winner's steps of log pi).

    owner: (S,) the segment of each step, of 2P with the winners first. lengths: (2P,).
    is_tie: (P,) bool, pairs without a winner.
    """
    P = len(is_tie)
    has_share = torch.cat([~is_tie, torch.zeros(P, dtype=torch.bool)])
    return has_share[owner] / (P * lengths.double()[owner])


def segment_means(x: torch.Tensor, owner: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Mean of x over each segment. x: one number per step. owner: its segment. lengths: (2P,)."""
    out = torch.zeros(len(lengths), dtype=torch.double)
    return out.index_add(0, owner, x / lengths.double()[owner])


# ---- set-up ----
def check_args(args: Args) -> Task:
    """Checks the arguments and returns the task."""
    args.env_id, *others = env_ids(args.env_id)
    if others:
        raise UserError("--env-id takes one task here; sft.py and eval.py take several")
    # The smallest values allowed. All other numbers may be 0, but not negative.
    least = {
        "num_envs": 1,
        "num_initial_states": 1,
        "rollouts_per_state": 2,
        "max_pairs_per_stage": 1,
        "num_epochs": 1,
        "batch_size": 1,
        "chunk_size": 1,
        "save_freq": 1,
    }
    check_numbers(asdict(args), least)
    choose_renderer(args.render)
    task = get_task(args.env_id)
    if args.branch and (not args.stage_aware or args.stage_source == "learned"):
        raise UserError(
            "--branch cuts roll-outs by the rules' stages: "
            "leave out --no-stage-aware and --stage-source learned"
        )
    if not args.stage_aware and args.stage_source == "learned":
        raise UserError("--no-stage-aware uses no stages: leave out --stage-source learned")
    if args.branch:
        require_pace(task, "--branch")
    if args.branch and args.export_pairs:
        raise UserError(
            "--export-pairs needs whole roll-outs, because the frame in which a branch completes "
            "its stage is not kept: leave out --branch"
        )
    if args.cost_coef is None:
        args.cost_coef = 0.01 if args.cost == "sum" else 0.1
    # A person judged the roll-outs of one run, so the verdicts go with its folder.
    if args.preferences:
        is_file = Path(args.preferences).is_file()
        if args.export_pairs or not args.resume or not is_file:
            raise UserError(
                f"--preferences {args.preferences} must be the pairs.jsonl of an earlier "
                "--export-pairs; it goes with --resume, without --export-pairs"
            )
    if args.export_pairs:
        folder = Path(args.export_pairs)
        if folder.is_file() or (folder.exists() and any(folder.iterdir())):
            raise UserError(f"{folder} is not an empty folder: choose another --export-pairs")
    return task


def find_start(args: Args, run: Run) -> tuple[str, str]:
    """The policy that the run starts from, and its fingerprint, which is "" for a new run.

    Raises UserError where a resumed run was begun from another policy or for another task.
    """
    given = given_policy(args.checkpoint, args.vla)
    source = ""
    origin = ""
    record = run.folder / "source.txt"
    if args.resume and record.exists():
        # The roll-outs in the folder are those of this policy.
        lines = record.read_text(errors="replace").split("\n")
        if len(lines) < 2:
            raise UserError(f"{record} is damaged: choose another --output-dir")
        # Older runs wrote fewer lines.
        source, origin, env_id, sampled, *_ = [*lines, "", ""]
        if given and Path(source).resolve() != model_folder(given).resolve():
            raise UserError(
                f"the roll-outs in {args.output_dir} are those of {source}, not of {given}: "
                "choose another --output-dir"
            )
        if env_id:
            run.settings.setdefault("env_id", env_id)
        if sampled != sampling(args):
            raise UserError(
                f"the roll-outs in {args.output_dir} were sampled {sampled or 'without --branch'}: "
                "give the same flags, or choose another --output-dir"
            )
    run.check_same("--env-id", "env_id", args.env_id)
    run.check_same("--lora-rank", "lora_rank", args.lora_rank)
    return source or given or find_checkpoint(args.env_id, ("sft",)), origin


def load_learned(args: Args, source: Path, model, device: torch.device):
    """The frozen SFT policy and its separator; (None, None) where the rules give the stages."""
    if args.stage_source == "rules":
        return None, None
    # The separator reads the features of the SFT policy that it was trained with.
    sft_folder, separator = require_separator(source, args.env_id, device)
    # A policy that sft.py wrote reads its own features.
    if sft_folder == source:
        return model, separator
    sft_model, _, _ = load_policy(sft_folder, device)
    return sft_model, separator


def sampling(args: Args) -> str:
    """The flags that make branches. Branches of other flags cannot be mixed with them."""
    if not args.branch:
        return ""
    return (
        f"--branch with --rollouts-per-state {args.rollouts_per_state} "
        f"--branch-patience {args.branch_patience}"
    )


def record_source(output: Path, source: Path, args: Args) -> None:
    """Writes down whose roll-outs the folder holds."""
    # The fingerprint tells whether another policy is at that place when the run is resumed.
    text = f"{source}\n{fingerprint(source)}\n{args.env_id}\n{sampling(args)}"
    write_text(output / "source.txt", text)


def resume(args: Args, run: Run, model, optimizer) -> None:
    """Puts a checkpoint's training state back, once the reference is cached."""
    if not args.lora_rank:
        trained, _, _ = load_policy(args.output_dir, torch.device("cpu"))
        model.load_state_dict(trained.state_dict())
    run.restore(model, optimizer)


def log_evaluation(args: Args, run: Run, model, processor, step: int) -> None:
    """Evaluates the policy greedily on seeds that training never sees."""
    if not args.num_eval_episodes:
        return
    start = time.time()
    episodes = args.num_eval_episodes
    result = evaluate(model, processor, args.env_id, episodes, args.seed, args.num_envs)
    run.log_evaluation(result, time.time() - start, step)


def main(args: Args) -> None:  # noqa: C901, PLR0915
    # ---- set-up: check the arguments ----
    rank, world_size, device = parallel.join(args.cuda)
    task = check_args(args)
    run = Run("sta_tpo", args.output_dir, args.resume, rank)
    source, origin = find_start(args, run)

    # ---- set-up: load. The policy is also the reference ----
    model, processor, source = load_policy(source, device, origin)
    sft_model, separator = load_learned(args, source, model, device)
    stats = task_stats(model, args.env_id, args.unnorm_key)
    active = ~vla.constant_dims(stats["action"])
    codec = vla.Codec(processor, task.instruction, stats, model.config.n_action_bins, device)
    check_world(args.env_id)

    # ---- set-up: build. A folder is made only now, when all input is known to be good ----
    step = run.state["step"] if run.state else 0
    run.open(asdict(args), args.output_dir, step)
    if rank == 0:
        record_source(run.folder, source, args)
    K = len(task.stages)
    # The segments' names. Without stages a trajectory is one segment.
    stages = task.stages if args.stage_aware else ("trajectory",)

    # ---- roll-outs of the reference policy ----
    start_rollout = time.time()
    folder = run.folder / "rollouts"
    size = processor.image_size
    paths = collect_rollouts(folder, model, codec, active, size, args, rank, world_size)
    # The other processes write their share.
    parallel.barrier()
    files = rollout_files(paths)
    rollouts = read_rollouts(files)
    seconds_rollout = time.time() - start_rollout
    env_steps = sum(len(rollout["stage"]) for rollout in rollouts)
    if separator is not None:
        relabel(rollouts, sft_model, separator, codec, K, args.chunk_size)

    # ---- pairs ----
    segments = [segments_of(rollout, K, args.stage_aware) for rollout in rollouts]
    names = [file.stem for file in files]
    if args.preferences:
        pairs = read_preferences(Path(args.preferences), rollouts, segments, names)
    else:
        # STARE: pairs per stage, between roll-outs that both completed the stage before.
        margin = args.cost_margin
        most = args.max_pairs_per_stage
        pairs = build_stage_pairs(rollouts, K, margin, most, args.stage_aware, args.cost)
    if not pairs:
        raise UserError(
            "no pair: all roll-outs ended alike. Raise --num-initial-states or "
            "--rollouts-per-state, or start from a better policy"
        )
    # All processes' pairs per optimiser step
    batch_size = world_size * args.batch_size
    digest = zlib.crc32(json.dumps([pairs, batch_size]).encode())
    if run.state and run.state["pairs"] != digest:
        raise UserError(
            f"{run.folder} was trained on other pairs or batches: remove "
            f"{run.folder / 'checkpoint'}* to train again, or choose another --output-dir"
        )
    print_pairs(pairs, rollouts, segments, stages)
    if args.export_pairs:
        if rank == 0:
            clips = Path(args.export_pairs)
            text = task.instruction
            export_pairs(
                clips,
                pairs,
                rollouts,
                segments,
                names,
                stages,
                text,
                args.seed,
                run.folder,
                Progress,
            )
        return
    if not run.state:
        log_stages(run, task, rollouts, with_costs=separator is None)
    data = PairSteps(pairs, rollouts, segments, model, codec, active)
    del rollouts, sft_model, separator

    # ---- reference: its log-probabilities, before the policy's first step ----
    # A new adapter is the same in all processes, and it changes nothing yet.
    set_seed(args.seed)
    # The dtype may change here, so this comes before the reference's log-probabilities.
    params = vla.prepare_training(model, args.lora_rank, args.gradient_checkpointing)
    every_step = torch.arange(data.num_steps)
    ref_logprobs = data.shared_logprobs(every_step, args.chunk_size, rank, world_size, quiet=False)
    optimizer = torch.optim.AdamW(
        params, lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    if run.state:
        resume(args, run, model, optimizer)
    # Gradient checkpointing needs training mode, which changes nothing else: no dropout.
    model.train(args.gradient_checkpointing)

    updates_per_epoch = math.ceil(len(pairs) / batch_size)
    num_updates = args.num_epochs * updates_per_epoch
    progress = Progress(total=num_updates, initial=step, desc="sta_tpo", unit="update")
    while Stop.hold(step < num_updates):
        start_update = time.time()

        # ---- batch: the epoch's number decides the order of the pairs ----
        epoch, batch = divmod(step, updates_per_epoch)
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + epoch)
        order = torch.randperm(len(pairs), generator=generator)
        mb_inds = order[batch * batch_size : (batch + 1) * batch_size]
        mb_pairs = [pairs[p] for p in mb_inds.tolist()]
        P = len(mb_pairs)
        # 2P segments, the chosen ones first
        chosen, rejected = sides_of(mb_pairs, data.where, args.blame_steps)
        # A step that several pairs share is computed once. row: where each of the S steps stands
        # among these U different ones.
        mb_steps, row = torch.cat(chosen + rejected).unique(return_inverse=True)
        # Each process computes as many steps. Those that are added weigh nothing.
        missing = -len(mb_steps) % world_size
        mb_steps = torch.cat([mb_steps, mb_steps[:1].expand(missing)])
        lengths = torch.tensor([len(segment) for segment in chosen + rejected])
        # of each step in the 2P segments: the segment that it belongs to
        owner = torch.repeat_interleave(torch.arange(2 * P), lengths)
        # weight of each step's log ratio in its segment's q
        share = torch.ones(len(owner), dtype=torch.double)
        if args.tpo_reduction == "mean":
            share = 1 / lengths.double()[owner]

        # ---- pass 1, no graph: q of every segment, and the loss's derivative by it ----
        new_logprobs = data.shared_logprobs(mb_steps, args.chunk_size, rank, world_size)
        logratio = (new_logprobs - ref_logprobs[mb_steps]).double()  # (U,)
        q = torch.zeros(2 * P, dtype=torch.double)
        q = q.index_add(0, owner, share * logratio[row]).requires_grad_()
        cost_chosen = torch.tensor([pair["cost_chosen"] for pair in mb_pairs]).double()
        cost_rejected = torch.tensor([pair["cost_rejected"] for pair in mb_pairs]).double()
        losses, chosen_rewards, rejected_rewards = sta_tpo_loss(
            q[:P],
            q[P:],
            cost_chosen,
            cost_rejected,
            args.beta,
            args.cost_coef,
        )
        # A tie costs the mean of both orders, and -log sigmoid(-x) = x - log sigmoid(x).
        is_tie = torch.tensor([pair["reason"] == "tie" for pair in mb_pairs])
        losses = losses + 0.5 * is_tie * (chosen_rewards - rejected_rewards)
        losses.mean().backward()

        # ---- pass 2, a chunk at a time: the gradient ----
        # d loss / d theta = sum over steps of weight_t * d log pi(a_t|s_t) / d theta. It is exact,
        # because nothing has changed since pass 1: no dropout, no optimiser step. The weight of a
        # step sums over all pairs that share it.
        step_grad = share * q.grad[owner]
        # The anchor is linear in log pi. It is not part of the logged loss.
        step_grad = step_grad - args.anchor_coef * anchor_shares(owner, lengths, is_tie)
        weight = torch.zeros(len(mb_steps), dtype=torch.double)
        weight = weight.index_add(0, row, step_grad).float().to(device)
        optimizer.zero_grad()
        own_steps = mb_steps[rank::world_size].split(args.chunk_size)
        own_weights = weight[rank::world_size].split(args.chunk_size)
        for steps, weights in zip(own_steps, own_weights, strict=True):
            (weights * data.logprobs(steps)).sum().backward()
        parallel.sum_over_processes([p.grad for p in params])
        grad_norm = torch.nn.utils.clip_grad_norm_(params, args.max_grad_norm)
        found = {"loss": losses.sum().item(), "gradient": grad_norm.item()}
        mb_batch = {name: values[mb_steps] for name, values in data.flat.items()}
        refuse_nan(found, run.folder, mb_batch)
        optimizer.step()
        step += 1

        # ---- log ----
        margins = (chosen_rewards - rejected_rewards).detach()
        # log pi of each segment, (2P,), and how far it is from the reference
        logp = segment_means(new_logprobs.double()[row], owner, lengths)
        shift = segment_means(logratio[row], owner, lengths)
        scalars = {
            "losses/tpo_loss": losses.mean().item(),
            "losses/grad_norm": grad_norm.item(),
            "charts/learning_rate": args.learning_rate,
            "rewards/chosen": chosen_rewards.mean().item(),
            "rewards/rejected": rejected_rewards.mean().item(),
            "rewards/margins": margins.mean().item(),
            "rewards/accuracies": (margins > 0).double().mean().item(),
            "logps/chosen": logp[:P].mean().item(),
            "logps/rejected": logp[P:].mean().item(),
            "charts/SPS": len(mb_steps) / (time.time() - start_update),
            "time/rollout": seconds_rollout,
            "time/update": time.time() - start_update,
            "time/peak_gpu_gb": torch.cuda.max_memory_allocated() / 2**30,
        }
        for k, name in enumerate(stages):
            of_stage = torch.tensor([pair["stage"] == k for pair in mb_pairs])
            if of_stage.any():
                scalars[f"stage/{k}_{name}_margin"] = margins[of_stage].mean().item()
                # how far the winners' log-probability has moved from the reference, per step
                scalars[f"stage/{k}_{name}_chosen_shift"] = shift[:P][of_stage].mean().item()
        run.log(scalars, step)
        chosen_shift = shift[:P].mean().item()
        rejected_shift = shift[P:].mean().item()
        run.warn(tpo_symptoms(chosen_shift, chosen_shift - rejected_shift))
        progress.update()

        # ---- save ----
        saves = step % args.save_freq == 0 or step == num_updates
        # Stop.asked() stands first, because all processes of a job must call it.
        if (Stop.asked() or saves) and rank == 0:
            settings = {
                **asdict(args),
                "checkpoint": str(source),
                "method": "STA-TPO" if args.stage_aware else "TPO",
                "env_steps": env_steps,
                "wall_s": round(run.seconds(), 1),
            }
            state = {
                "script": "sta_tpo",
                "step": step,
                "pairs": digest,
                "wall_s": run.seconds(),
            }
            save_checkpoint(run.folder, model, processor, settings, state, optimizer)
            print(
                f"update {step}: loss {scalars['losses/tpo_loss']:.4f} "
                f"margin {scalars['rewards/margins']:+.3f} "
                f"accuracy {scalars['rewards/accuracies']:.2f}"
            )
    progress.close()
    if rank > 0:
        return
    log_evaluation(args, run, model, processor, step)
    run.close()


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Args))
