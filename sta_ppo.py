"""STA-PPO: PPO on the task itself, with a stage reward for progress inside each stage.

It is step 3 of IPI: sft.py (imitation), sta_tpo.py (preference), sta_ppo.py (interaction).

    python sta_ppo.py --env-id PickCube-v1
        starts from the newest STA-TPO (else SFT) run of this task, else from the shipped checkpoint
    python sta_ppo.py --env-id PickCube-v1 --reward sparse
        plain PPO, the ablation (--reward dense is ManiSkill's own reward)

    r'_t = r_t + w * (gamma * Phi(s_{t+1}) - Phi(s_t))
    Phi(s) = k + phi_k(s): k = 0 .. K - 1 is the stage of s, phi_k in [0, 1] its progress
    loss = -mean min(ratio * adv, clip(ratio, 1 - eps, 1 + eps) * adv)
           + c_v * mean (V - return)^2 / 2 + c_kl * mean (log pi - log pi_start)^2 / 2

r' is the paper's stage reward with three changes: the term k, the scale of phi_k, and Phi = 0 at
success. docs/sta_ppo.md says why. --stage-reward has three more forms.
The ratio is that of the whole action. Its log-probability is the sum over the action's tokens.

What differs from CleanRL's ppo.py:
- A truncated episode is bootstrapped with the value of its final observation, except where the
  horizon ends the task (--stage-reward progress and paced).
- Advantages are normalised once over the whole buffer, not in each minibatch.
- Logged losses are means over the update, not those of the last minibatch.
- The critic has a warm-up and a learning rate of its own. Its loss is not clipped.
- There is no entropy bonus. The optimiser is AdamW with betas (0.9, 0.95).
- All episodes start again every ceil(horizon / T) updates.
docs/sta_ppo.md compares with RL4VLA.

Comments that begin with STARE show where stages enter PPO. What a stage pays follows from its
`distance` and `length`, and from the task's `pace`, in world/tasks.py. The formulas are in
stare_utils.py.
A new task is an entry of TASKS in world/tasks.py (docs/tasks.md) and needs nothing here. Imitate it
first with sft.py.
Letters: T steps of a roll-out, N envs, n some of the envs, B length of a batch, A action tokens,
D hidden width, K stages, H steps of the longest episode (the horizon).
"""

import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

# An idle OpenMP thread spins for a moment, because waking it takes longer. Then it must sleep:
# spinning on would take the cores from the env processes. torch reads both when it is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
import tyro
from safetensors.torch import load_file
from torch import nn
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
from plumbing.run import (
    Metrics,
    Progress,
    Run,
    Stop,
    check_numbers,
    one_line_errors,
    ppo_symptoms,
    refuse_nan,
)
from stare_utils import pace_rewards, shape_rewards
from world.assets import check_world, choose_renderer
from world.resets import StageResets
from world.statistics import EpisodeStatistics
from world.tasks import TRAIN_SEEDS, Task, UserError, env_ids, get_task, require_pace
from world.vector import make_envs


@dataclass
class Args:
    # the run
    seed: int = 1
    """seed of the episodes, of sampling and of the minibatch order"""
    cuda: bool = True
    """train on the GPU if there is one"""
    track: bool = False
    """log to Weights & Biases too (needs `pip install wandb`)"""
    output_dir: str = ""
    """run folder with checkpoint/ and TensorBoard files; empty:
    runs/{env_id}__sta_ppo__{seed}__{time}"""
    resume: bool = False
    """go on from the checkpoint in --output-dir, if there is one"""

    # the policy and the task
    checkpoint: str = ""
    """policy to start from; empty: the newest sta_tpo.py (else sft.py) run of this task under
    runs/, else the checkpoint shipped with the repository"""
    vla: str = ""
    """an OpenVLA instead of --checkpoint: its folder in the published layout, or its hub id"""
    unnorm_key: str = ""
    """data set whose action statistics to use, e.g. bridge_orig: a key of norm_stats in config.json
    or of dataset_statistics.json beside it"""
    env_id: str = "PickCube-v1"
    """task"""
    num_envs: int = 8
    """N: env processes (CPU) or parallel envs (GPU), for each process of a `torchrun` job"""
    backend: Literal["cpu", "cuda"] = "cpu"
    """physics: cpu (one process per env) or cuda (ManiSkill's GPU simulation)"""
    render: Literal["auto", "cpu", "gpu"] = "auto"
    """where pictures are drawn: cpu is Mesa's software driver, auto is the GPU if there is one"""

    # the reward
    reward: Literal["stare", "sparse", "dense"] = "stare"
    """stare: success plus the stage reward. sparse: success alone, which is plain PPO. dense:
    ManiSkill's normalized_dense over the horizon, so that an episode pays at most 1; its episodes
    go on after success"""
    stage_reward: Literal["shaping", "gain", "progress", "paced"] = "shaping"
    """shaping: w * (gamma * Phi(s') - Phi(s)) with Phi = 0 at success, which never changes the
    optimal policy. gain: w * (Phi(s') - Phi(s)) with Phi = K at success. progress: as gain, with
    gamma. paced: each stage pays once, when it is completed, and a quick one pays more. Under
    progress and paced a truncation counts as a termination, and the critic sees the time"""
    shaping_weight: float = -1.0
    """w; a negative number means 1 / K, which keeps w * Phi in [0, 1]; 0 equals --reward sparse bit
    for bit"""
    potential: Literal["sigmoid", "linear"] = "sigmoid"
    """form of phi_k: sigmoid(1 - d / L) / sigmoid(1), or max(0, 1 - d / L)"""
    potential_across_stages: Literal["offset", "bare"] = "offset"
    """offset: Phi = k + phi_k. bare: phi_k alone, as in the paper, which falls between stages"""
    silent_stages: str = ""
    """stages, with commas between them, whose distance pays nothing: Phi = k inside them"""
    stage_resets: float = 0.0
    """share of the envs that begin in a later stage, in a state in which an earlier episode entered
    it. Stages that are seldom completed are drawn more often. These envs count in no statistic of
    episodes. A run with them is not resumed bit for bit"""
    stage_advantage: bool = False
    """normalise advantages within each stage instead of over the whole buffer"""
    stage_source: Literal["rules", "learned"] = "rules"
    """rules: read the simulator's state. learned: the separator that sft.py trained on the frozen
    SFT policy's features. It knows no distances, so Phi = k"""

    # PPO
    total_timesteps: int = 65536
    """env steps in all, rounded up to whole updates"""
    num_steps: int = 100
    """T: env steps per env between updates. All episodes start again every ceil(horizon / T)
    updates. A run that is resumed at such an update equals an uninterrupted one, on a CPU bit for
    bit"""
    gamma: float = 0.97
    """discount: finishing one step earlier is worth about (1 - gamma) V"""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation; a small lambda handicaps a sparse reward
    (docs/results.md)"""
    num_minibatches: int = 4
    """optimiser steps per epoch; num_envs * num_steps must be a multiple of it"""
    update_epochs: int = 2
    """passes over each roll-out"""
    chunk_size: int = 128
    """samples per forward and backward pass of an update: bounds memory, not the result"""
    gradient_checkpointing: bool = False
    """compute a layer's activations again in the backward pass: less memory, a third more work"""
    clip_coef: float = 0.2
    """eps of the clipped ratio"""
    vf_coef: float = 0.5
    """c_v: weight of the value loss"""
    kl_coef: float = 0.0
    """c_kl: weight of the KL to the policy that the run started from; 0 leaves it out"""
    kl_anneal: float = 0.0
    """share of the run over which c_kl falls linearly to 0; 0: it stays"""
    target_kl: float | None = None
    """stop an update's epochs once the KL of the last minibatch of an epoch is above this"""
    critic_warmup: int = 2
    """updates in which only the value head learns, so that an untrained critic does not mislead the
    policy. Adam's momentum is reset at their end"""

    # the optimiser
    lora_rank: int = 0
    """0 trains all weights; else LoRA matrices of this rank, merged into what is written"""
    learning_rate: float = 5e-5
    """AdamW's learning rate of the VLA"""
    value_learning_rate: float = 1e-3
    """AdamW's learning rate of the value head"""
    anneal_lr: bool = True
    """lower both learning rates linearly to zero at --total-timesteps. Use --no-anneal-lr if you
    will resume the run past --total-timesteps"""
    max_grad_norm: float = 1.0
    """the gradient's norm is clipped to this, over all parameters together"""

    # saving and evaluating
    save_freq: int = 10
    """updates between checkpoints, rounded up to where all episodes start again"""
    eval_freq: int = 0
    """updates between evaluations; 0: only at the end"""
    num_eval_episodes: int = 16
    """episodes of each evaluation; 0 leaves it out"""

    # to be filled in at run time
    batch_size: int = 0
    """num_envs * num_steps * processes (computed)"""
    minibatch_size: int = 0
    """batch_size / num_minibatches (computed)"""
    num_iterations: int = 0
    """total_timesteps / batch_size, rounded up (computed)"""
    round_length: int = 0
    """number of updates in a round, which begins where all episodes start again (computed)"""
    episodes_per_round: int = 0
    """episodes of each env that end within a round even if all reach the horizon (computed)"""
    num_moved: int = 0
    """how many envs begin in later stages: --stage-resets of num_envs (computed)"""


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


class ValueHead(nn.Module):
    """V(s) from the hidden state that predicts the first action token, (B, D) -> (B,).

    The last layer starts at zero, so V = 0 everywhere. clock: (B,) t / H where the horizon ends the
    task, else 0. There V depends on the time that is left (Pardo et al. 2018).
    """

    def __init__(self, width: int):
        super().__init__()
        self.first = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 256))
        self.clock_weight = nn.Parameter(torch.zeros(256))
        self.last = nn.Linear(256, 1)
        # A random V would give the policy random advantages at first.
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, hidden: torch.Tensor, clock: torch.Tensor) -> torch.Tensor:
        assert clock.shape == hidden.shape[:1], "one time per state"
        x = self.first(hidden.float()) + clock[:, None] * self.clock_weight
        return self.last(nn.functional.gelu(x))[:, 0]


@torch.no_grad()
def value_of(model, value_head: ValueHead, inputs: dict, clock: torch.Tensor) -> torch.Tensor:
    """V (n,) of observations, from a pass over the prompt alone. clock: (n,), see ValueHead."""
    out = model(**inputs, logits_to_keep=1)
    return value_head(out.last_hidden_state[:, -1], clock)


class Buffers:
    """Storage of a roll-out: row t is step t, column n is env n."""

    def __init__(self, T: int, N: int, A: int, image_size: int, device: torch.device):
        # What belongs to a state has T + 1 rows. Row T is where the envs stand after the last step.
        self.obs = {
            "rgb": torch.zeros(T + 1, N, image_size, image_size, 3, dtype=torch.uint8),
            "proprio": torch.zeros(T + 1, N, 8),
        }
        self.values = torch.zeros(T + 1, N, device=device)
        self.stages = torch.zeros(T + 1, N, dtype=torch.long, device=device)
        self.potentials = torch.zeros(T + 1, N, device=device)
        # t / H for the critic, see ValueHead
        self.clock = torch.zeros(T + 1, N, device=device)
        self.bins = torch.zeros(T, N, A, dtype=torch.long, device=device)
        # PPO's old log-probabilities, one per action
        self.logprobs = torch.zeros(T, N, device=device)
        self.rewards = torch.zeros(T, N, device=device)
        # Step t is terminal for GAE: no V of its next state is added.
        self.terminated = torch.zeros(T, N, dtype=torch.bool, device=device)
        # Step t has ended the episode by success or at the horizon, and the env has begun another.
        # (In CleanRL dones[t] is about step t - 1.)
        self.done = torch.zeros(T, N, dtype=torch.bool, device=device)
        # V of the final observation, where step t has ended the episode
        self.final_values = torch.zeros(T, N, device=device)

    def put_state(
        self,
        t: int,
        half: slice,
        obs: dict,
        stage: torch.Tensor,
        phi: torch.Tensor,
        clock: torch.Tensor,
    ) -> None:
        """Keeps the state before step t. half: of which envs, a slice of the N."""
        # Assigning a single number to a slice would copy it to all envs without an error.
        assert stage.shape == phi.shape == clock.shape == self.stages[t, half].shape
        for name, value in obs.items():
            assert value.shape == self.obs[name][t, half].shape
            self.obs[name][t, half] = value
        self.stages[t, half] = stage
        self.potentials[t, half] = phi
        self.clock[t, half] = clock

    def obs_at(self, t: int, half: slice) -> dict:
        """The observations before step t. half: of which envs, a slice of the N."""
        return {name: value[t, half] for name, value in self.obs.items()}

    def carry_last_state(self) -> None:
        """Begins a roll-out where the one before has ended. The value there is computed again."""
        for buffer in (*self.obs.values(), self.stages, self.potentials, self.clock):
            buffer[0] = buffer[-1]

    def reset(self, envs, seed: int, stage_of, stage_reward: "StageReward") -> dict:
        """Starts all episodes, in env i with seed + i. Returns their infos."""
        # Training seeds are below TRAIN_SEEDS, evaluation seeds are not.
        obs, info = envs.reset(seed=seed % (TRAIN_SEEDS - envs.num_envs))
        stage, phi = stage_of(obs, info)
        every = slice(None)
        self.put_state(0, every, obs, stage, phi, stage_reward.clock(info))
        stage_reward.begin(every, torch.ones_like(stage, dtype=torch.bool), stage)
        return info


class StageReward:
    """STARE: what the stage reward pays for a step, in the form of --stage-reward.

    shaping   w * (gamma * Phi(s') - Phi(s)), Phi = 0 at success (Ng, Harada, Russell 1999)
    gain      w * (Phi(s') - Phi(s)), Phi = K at success: a step pays at once for what it gains
    progress  w * (gamma * Phi(s') - Phi(s)), Phi = K at success
    paced     w / (1 + T_k / Tbar_k), once, when stage k is completed. T_k: the steps since it was
              entered, Tbar_k: the expert's
    """

    def __init__(self, args: Args, task: Task, weight: float, device: torch.device):
        self.form = args.stage_reward
        self.weight = weight
        self.gamma = args.gamma
        # The horizon is an end here: what was paid is kept, and no V of a next state is added.
        self.horizon_ends = weight > 0 and self.form in ("progress", "paced")
        self.horizon = task.max_episode_steps
        self.stages = task.stages
        self.pace = torch.tensor(task.pace, device=device)
        # Of each env's episode: the furthest stage so far, and the steps since it was entered.
        self.furthest = torch.zeros(args.num_envs, dtype=torch.long, device=device)
        self.steps = torch.zeros(args.num_envs, device=device)

    def begin(self, half: slice, began: torch.Tensor, stages: torch.Tensor) -> None:
        """Episodes begin in the envs of `half` where `began` (n,) is true, in `stages` (n,)."""
        # An episode that begins in success, which is stage K, begins in stage 0.
        stages = torch.where(stages == len(self.stages), 0, stages)
        self.furthest[half] = torch.where(began, stages, self.furthest[half])
        self.steps[half] = torch.where(began, 0, self.steps[half])

    def clock(self, info: dict) -> torch.Tensor:
        """What the critic sees of the time, (n,): see ValueHead. info: of the states."""
        elapsed = info["elapsed_steps"].to(self.steps.device)
        if self.horizon_ends:
            return elapsed / self.horizon
        return torch.zeros(len(elapsed), device=elapsed.device)

    def __call__(
        self,
        half: slice,
        phi: torch.Tensor,
        next_phi: torch.Tensor,
        next_stage: torch.Tensor,
        success: torch.Tensor,
    ) -> torch.Tensor:
        """(n,) of the envs in `half`, for the step from a state to the next one."""
        if self.weight == 0:
            return torch.zeros_like(phi)
        if self.form == "paced":
            self.steps[half] += 1
            furthest = self.furthest[half]
            reward = pace_rewards(furthest, self.steps[half], next_stage, self.pace, self.weight)
            entered = next_stage > furthest
            self.steps[half] = torch.where(entered, 0, self.steps[half])
            self.furthest[half] = furthest.maximum(next_stage)
            return reward
        gamma = 1.0 if self.form == "gain" else self.gamma
        zero_phi = success & (self.form == "shaping")
        no_reward = torch.zeros_like(phi)
        return shape_rewards(no_reward, phi, next_phi, zero_phi, gamma, self.weight)


class RuleStages:
    """STARE: the stage (n,) and Phi (n,) of states by the rules, which read the simulator."""

    def __init__(self, stage_names: tuple[str, ...], silent_stages: str, device: torch.device):
        # In a silent stage Phi = k: its distance pays nothing. The last entry is success.
        silent = [name in silent_stages.split(",") for name in stage_names]
        self.silent = torch.tensor([*silent, False], device=device)  # (K + 1,)

    def __call__(self, obs: dict, info: dict) -> tuple[torch.Tensor, torch.Tensor]:
        stage = info["stage"].to(self.silent.device)
        phi = info["potential"].to(self.silent.device)
        return stage, torch.where(self.silent[stage], stage, phi)


def true_next(
    stage: torch.Tensor, phi: torch.Tensor, info: dict, stage_of
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stage (n,) and Phi (n,) of the states to which a step has led.

    stage, phi: of the states in which the envs stand now. Where the step has ended an episode, the
    env stands in a new one, and the step has led to the final observation.
    """
    ended = info["_final_info"]
    if not ended.any():
        return stage, phi
    final_stage, final_phi = stage_of(info["final_obs"], info["final_info"])
    ended = ended.to(stage.device)
    return torch.where(ended, final_stage, stage), torch.where(ended, final_phi, phi)


def final_value(model, value_head: ValueHead, codec: vla.Codec, info: dict, stage_reward):
    """V of the final observations of the episodes that a step has ended."""
    ended = info["_final_info"]
    inputs = codec.inputs({name: x[ended] for name, x in info["final_obs"].items()})
    clock = stage_reward.clock(info["final_info"])[ended.to(codec.device)]
    return value_of(model, value_head, inputs, clock)


class LearnedStages:
    """STARE: the stage (n,) and Phi (n,) of states as sft.py's separator sees them.

    It reads the hidden state of the frozen SFT policy, step by step. It knows no distance: Phi = k.
    Success is the env's own, and stage K.
    """

    def __init__(self, sft_model, separator: nn.Linear, num_stages: int, codec: vla.Codec):
        self.sft_model = sft_model
        self.separator = separator
        self.num_stages = num_stages
        self.codec = codec

    @torch.no_grad()
    def __call__(self, obs: dict, info: dict) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = self.codec.inputs(obs)
        # the hidden state that predicts the first action token, as in sft.py
        hidden = self.sft_model(**inputs, logits_to_keep=1).last_hidden_state[:, -1]
        # The separator may know tasks with more stages than this one.
        stage_logits = self.separator(hidden.float())[:, : self.num_stages]
        success = info["success"].to(stage_logits.device)
        stage = torch.where(success, self.num_stages, stage_logits.argmax(-1))
        return stage, stage.float()


def compute_gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    next_values: torch.Tensor,
    terminated: torch.Tensor,
    done: torch.Tensor,
    gamma: float,
    gae_lambda: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016).

    All (T, N). terminated, done: bool; done = terminated or truncated. next_values[t] is V of the
    true next state: at an episode's end that of its final observation. A truncation bootstraps
    that value, a termination does not. After either of them the recursion over advantages starts
    again.
    Returns advantages, and returns = advantages + values.
    """
    shapes = {x.shape for x in (rewards, values, next_values, terminated, done)}
    assert len(shapes) == 1, "shapes differ: this would broadcast"
    # delta_t = r_t + gamma * V(s_{t+1}) - V(s_t), where a terminal state has V = 0
    deltas = rewards + gamma * next_values * ~terminated - values
    advantages = torch.zeros_like(rewards)
    last = torch.zeros_like(rewards[0])
    # A_t = delta_t + gamma * lambda * A_{t+1}, where an episode's last step has no A_{t+1}
    for t in reversed(range(len(rewards))):
        last = deltas[t] + gamma * gae_lambda * last * ~done[t]
        advantages[t] = last
    return advantages, advantages + values


def ppo_loss(logratio: torch.Tensor, advantages: torch.Tensor, clip_coef: float) -> torch.Tensor:
    """-mean min(ratio * adv, clip(ratio, 1 - eps, 1 + eps) * adv) (Schulman et al. 2017, eq. 7).

    Both (B,): one ratio per action.
    """
    assert logratio.shape == advantages.shape, "shapes differ: this would broadcast"
    assert logratio.ndim == 1, "one ratio per action"
    # The max of the two losses is the min of the two objectives.
    ratio = logratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_coef, 1 + clip_coef)
    return torch.max(unclipped, clipped).mean()


def kl_loss(logprob: torch.Tensor, ref_logprob: torch.Tensor) -> torch.Tensor:
    """mean (log pi - log pi_ref)^2 / 2 on the roll-out's actions, both (B,).

    On actions that pi itself has sampled, its gradient is the gradient of KL(pi || pi_ref). Its
    value is another number (docs/sta_ppo.md).
    """
    assert logprob.shape == ref_logprob.shape, "shapes differ: this would broadcast"
    return 0.5 * (logprob - ref_logprob).square().mean()


def normalize(advantages: torch.Tensor, stages: torch.Tensor | None) -> torch.Tensor:
    """Advantages (B,) with mean 0 and standard deviation 1, over the buffer or within each stage.

    stages: (B,) the stage of each step, or None for the whole buffer. A stage with a single step
    gets 0, because one number has no deviation.
    """
    if stages is None:
        return (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    # Stages may come as floats, but they are small integers, so == is safe.
    out = torch.zeros_like(advantages)
    for k in stages.unique():
        mine = stages == k
        if mine.sum() > 1:
            out[mine] = normalize(advantages[mine], None)
    return out


def check_args(args: Args, world_size: int) -> Task:
    """Checks the arguments, fills in the computed ones, and returns the task."""
    args.env_id, *others = env_ids(args.env_id)
    if others:
        raise UserError("--env-id takes one task here; sft.py and eval.py take several")
    task = get_task(args.env_id)
    # The smallest values allowed. All other numbers may be 0, but not negative.
    least = {
        "num_envs": 1,
        "num_steps": 1,
        "num_minibatches": 1,
        "total_timesteps": 1,
        "update_epochs": 1,
        "chunk_size": 1,
        "save_freq": 1,
        "shaping_weight": -math.inf,
    }
    check_numbers(asdict(args), least)
    choose_renderer(args.render, args.backend)
    args.num_moved = round(args.stage_resets * args.num_envs)
    check_stage_args(args, task)
    # The advantage of a single step has no deviation to normalise by.
    steps = args.num_envs * args.num_steps
    if steps % args.num_minibatches or steps == 1:
        raise UserError(
            f"num_envs * num_steps = {steps} must be a multiple of "
            f"--num-minibatches {args.num_minibatches}, and more than 1"
        )
    # A minibatch is spread over all processes. Their shares are equal, because `steps` is a
    # multiple of num_minibatches.
    args.batch_size = world_size * steps
    args.minibatch_size = args.batch_size // args.num_minibatches
    args.num_iterations = math.ceil(args.total_timesteps / args.batch_size)
    # A round is the fewest updates that hold a whole episode of any length.
    horizon = task.max_episode_steps
    args.round_length = math.ceil(horizon / args.num_steps)
    args.episodes_per_round = args.round_length * args.num_steps // horizon
    # A checkpoint at the end of a round can be resumed exactly.
    args.save_freq = math.ceil(args.save_freq / args.round_length) * args.round_length
    if args.num_iterations <= args.critic_warmup:
        print(
            f"warning: all {args.num_iterations} updates are critic warm-up and leave the VLA as "
            "it is; raise --total-timesteps or lower --critic-warmup"
        )
    return task


def check_stage_args(args: Args, task: Task) -> None:
    """Raises UserError where flags about stages contradict each other."""
    silent = args.silent_stages.split(",") if args.silent_stages else []
    other_form = args.potential != "sigmoid" or args.potential_across_stages != "offset"
    changes_phi = other_form or silent
    # The learned separator gives no distance, so options about distances are refused.
    if args.stage_source == "learned" and changes_phi:
        raise UserError(
            "--stage-source learned knows no distances, its Phi is k alone: "
            "leave out --potential, --potential-across-stages, --silent-stages"
        )
    if args.stage_reward == "paced":
        require_pace(task, "--stage-reward paced")
    if args.stage_reward == "paced" and changes_phi:
        raise UserError(
            "--stage-reward paced pays no potential: "
            "leave out --potential, --potential-across-stages, --silent-stages"
        )
    if args.stage_resets and (args.backend == "cuda" or args.reward == "dense"):
        raise UserError(
            "--stage-resets needs --backend cpu, and episodes that end at success: "
            "leave out --reward dense"
        )
    if args.stage_resets and args.stage_source == "learned":
        raise UserError("--stage-resets goes by the rules: leave out --stage-source learned")
    if args.stage_resets and not 0 < args.num_moved < args.num_envs:
        raise UserError(
            f"--stage-resets {args.stage_resets} of {args.num_envs} envs is {args.num_moved}: at "
            "least one must begin in a later stage, and one as usual"
        )
    unknown = set(silent) - set(task.stages)
    if unknown or (silent and args.potential_across_stages != "offset"):
        names = ",".join(task.stages)
        raise UserError(f"--silent-stages takes some of {names}, and the offset potential")


def reward_weights(args: Args, task: Task) -> tuple[float, float]:
    """Weight w of the stage reward, and the scale of the env's own reward."""
    K = len(task.stages)
    if args.reward == "dense":
        # Unscaled, the value loss would fill the clipped gradient.
        return 0.0, 1 / task.max_episode_steps
    if args.reward == "sparse":
        return 0.0, 1.0
    # STARE: the weight of the stage reward. At success `shaping` pays -w * Phi(s_t), because Phi of
    # a terminal state is 0. With w = 1 / K the reward 1 - w * Phi is never negative there.
    weight = args.shaping_weight if args.shaping_weight >= 0 else 1 / K
    largest_phi = K if args.potential_across_stages == "offset" else 1
    drops = args.stage_reward == "shaping" and weight * largest_phi > 1
    if drops and args.critic_warmup == 0:
        print(
            f"warning: with --shaping-weight {weight} w * Phi exceeds 1: success looks like a loss "
            "to an untrained critic; add --critic-warmup"
        )
    return weight, 1.0


def find_start(args: Args, run: Run) -> tuple[str, str]:
    """The policy that the run starts from, and the fingerprint of its files.

    Raises UserError where a resumed run was begun from another policy.
    """
    given = given_policy(args.checkpoint, args.vla)
    if not run.state:
        source = given or find_checkpoint(args.env_id, ("sta_tpo", "sft"))
        return source, fingerprint(model_folder(source))
    # A resumed run keeps its start, also where a newer checkpoint could be found by now.
    source = run.state["source"]
    if given and model_folder(given).resolve() != model_folder(source).resolve():
        raise UserError(
            f"{args.output_dir} was begun from {source}, not from {given}: "
            "choose another --output-dir"
        )
    run.check_same("--env-id", "env_id", args.env_id)
    run.check_same("num_envs * num_steps * processes", "batch_size", args.batch_size)
    run.check_same("--lora-rank", "lora_rank", args.lora_rank)
    return source, run.state.get("origin", "")


def load_start(args: Args, run: Run, source: str, origin: str, device: torch.device):
    """Model, processor and folder of the policy to load now.

    A run that is resumed without LoRA loads its checkpoint. Every other run loads the start policy.
    """
    # A LoRA checkpoint is merged. To go on, LoRA needs the start policy, and the adapter that
    # `resume` puts back.
    if run.state and not args.lora_rank:
        return load_policy(args.output_dir, device)
    return load_policy(source, device, origin)


def load_stages(args: Args, task: Task, folder: Path, codec: vla.Codec, device: torch.device):
    """Returns the function (obs, info) -> (stage, Phi).

    folder: the policy's, from which its learned separator is found.
    """
    if args.stage_source == "rules":
        return RuleStages(task.stages, args.silent_stages, device)
    # The separator was trained on the features of that SFT policy, so they stay frozen.
    sft_folder, separator = require_separator(folder, args.env_id, device)
    sft_model, _, _ = load_policy(sft_folder, device)
    return LearnedStages(sft_model, separator, len(task.stages), codec)


def build_envs(args: Args, image_size: int, rank: int):
    """The vectorised envs of the roll-outs."""
    envs = make_envs(
        args.env_id,
        args.num_envs,
        args.seed,
        # A dense reward pays every step, so ending at success would forfeit reward.
        terminate_on_success=args.reward != "dense",
        backend=args.backend,
        reward="dense" if args.reward == "dense" else "sparse",
        potential=args.potential,
        potential_across_stages=args.potential_across_stages,
        image_size=image_size,
    )
    if args.num_moved:
        # STARE: some episodes begin in a later stage.
        return StageResets(envs, args.num_moved, seed=args.seed + rank)
    return envs


def load_reference(args: Args, model, source: str, origin: str, device: torch.device):
    """The policy that the run started from, for the KL; None where the KL is left out."""
    if not args.kl_coef:
        return None
    if args.lora_rank:
        # reference_logprobs switches the adapter off, which leaves the start policy.
        return model
    reference, _, _ = load_policy(source, device, origin)
    return reference.to(model.dtype)


@torch.no_grad()
def reference_logprobs(
    args: Args,
    reference,
    codec: vla.Codec,
    b_obs: dict,
    b_bins: torch.Tensor,
    active: torch.Tensor,
) -> torch.Tensor:
    """Log-probabilities (B,) of the roll-out's actions under the policy of the run's start."""
    chunks = []
    with vla.lora_off(reference):
        for chunk in torch.arange(len(b_bins)).split(args.chunk_size):
            inputs = codec.inputs({name: value[chunk] for name, value in b_obs.items()})
            chunk = chunk.to(b_bins.device)
            logprob, *_ = action_logprob(reference, inputs, b_bins[chunk], active)
            chunks.append(logprob)
    return torch.cat(chunks)


def build_optimizer(args: Args, params: list[nn.Parameter], value_head: ValueHead):
    """AdamW with two groups: the VLA, and the value head with its own learning rate."""
    groups = [
        {"params": params, "lr": args.learning_rate},
        {"params": value_head.parameters(), "lr": args.value_learning_rate},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def set_learning_rates(args: Args, optimizer, iteration: int) -> None:
    """The learning rates of an update. The VLA stands still during critic warm-up."""
    # linear annealing, as in CleanRL
    remaining = 1 - iteration / args.num_iterations if args.anneal_lr else 1
    optimizer.param_groups[0]["lr"] = args.learning_rate * remaining
    optimizer.param_groups[1]["lr"] = args.value_learning_rate * remaining
    if iteration < args.critic_warmup:
        # With a learning rate of 0 Adam still collects its second moments.
        optimizer.param_groups[0]["lr"] = 0.0


def kl_weight(args: Args, iteration: int) -> float:
    """c_kl of an update, which falls linearly to 0 over the share --kl-anneal of the run."""
    if not args.kl_anneal:
        return args.kl_coef
    done = iteration / args.num_iterations
    return args.kl_coef * max(0.0, 1 - done / args.kl_anneal)


def reset_momentum(optimizer) -> None:
    """Sets Adam's momentum to zero, which the untrained critic has shaped."""
    for moments in optimizer.state.values():
        # Adam's step count stays, so its bias correction hardly scales the new momentum up. The
        # next ten steps or so are small.
        moments["exp_avg"].zero_()


def resume(run: Run, model, value_head: ValueHead, optimizer, statistics) -> dict:
    """Puts a checkpoint's training state back. Returns the scalars of the first complete round."""
    if not run.state:
        return {}
    run.restore(model, optimizer)
    value_head.load_state_dict(load_file(run.folder / "checkpoint" / "value_head.safetensors"))
    statistics.recent = run.state["recent"]
    return run.state["first"]


def result_settings(args: Args, weight: float, source: str, env_steps: int, wall_s: float) -> dict:
    """What args.json holds: the arguments, and what eval.py copies into its results."""
    method = "STA-PPO" if weight or args.stage_advantage else "PPO"
    if weight and args.stage_reward != "shaping":
        method = f"STA-PPO-{args.stage_reward}"
    if args.reward == "dense":
        method = "PPO-dense"
    if args.num_moved:
        method += "-resets"
    return {
        **asdict(args),
        "checkpoint": str(source),
        "method": method,
        "env_steps": env_steps,
        "wall_s": round(wall_s, 1),
    }


def ratio_metrics(logratio: torch.Tensor, clip_coef: float) -> dict[str, torch.Tensor]:
    """How far the policy has moved since the roll-out. logratio: (B,), of whole actions."""
    ratio = logratio.exp()
    return {
        "ratio": ratio.mean(),
        "clipfrac": ((ratio - 1).abs() > clip_coef).float().mean(),
        "old_approx_kl": (-logratio).mean(),
        # This estimator is never negative, http://joschu.net/blog/kl-approx.html
        "approx_kl": (ratio - 1 - logratio).mean(),
    }


def loss_scalars(metrics: Metrics) -> dict[str, float]:
    """The logged losses: means over the update's minibatches."""
    return {
        "losses/policy_loss": metrics.mean("policy_loss"),
        "losses/value_loss": metrics.mean("value_loss"),
        "losses/entropy": metrics.mean("entropy"),
        "losses/old_approx_kl": metrics.mean("old_approx_kl"),
        "losses/approx_kl": metrics.mean("approx_kl"),
        "losses/clipfrac": metrics.mean("clipfrac"),
        "losses/grad_norm": metrics.mean("grad_norm"),
        "losses/kl_to_start": metrics.mean("kl_to_start"),
    }


def explained_variance(values: torch.Tensor, returns: torch.Tensor) -> float:
    """Share of the returns' variance that the critic explains. Both (B,)."""
    # Without the clamp a critic and returns that are all zero would give 0 / 0.
    unexplained = (returns - values).var().clamp(min=1e-8)
    return 1 - (unexplained / returns.var().clamp(min=1e-8)).item()


def rounding_gap(model) -> float:
    """By how many nats rounding alone may part the log-probabilities of an action."""
    return 0.5 if model.dtype == torch.bfloat16 else 0.05


def print_update(global_step: int, scalars: dict[str, float]) -> None:
    """One line per update. Success is unknown until the first round of episodes has ended."""
    success = scalars.get("charts/success_once", math.nan)
    length = scalars.get("charts/episodic_length", math.nan)
    print(
        f"step {global_step}: success {success:.2f} length {length:.1f} "
        f"kl {scalars['losses/approx_kl']:.4f} clip {scalars['losses/clipfrac']:.2f} "
        f"ev {scalars['losses/explained_variance']:.2f} "
        f"entropy {scalars['losses/entropy']:.1f} SPS {scalars['charts/SPS']:.0f}",
        flush=True,
    )


def log_evaluation(args: Args, run: Run, model, processor, global_step: int) -> None:
    """Evaluates the policy greedily on seeds that training never sees."""
    if not args.num_eval_episodes or run.rank > 0:
        return
    start = time.time()
    result = evaluate(
        model,
        processor,
        args.env_id,
        args.num_eval_episodes,
        args.seed,
        args.num_envs,
        backend=args.backend,
    )
    run.log_evaluation(result, time.time() - start, global_step)


def main(args: Args) -> None:  # noqa: C901, PLR0915
    # ---- set-up: check the arguments ----
    rank, world_size, device = parallel.join(args.cuda)
    task = check_args(args, world_size)
    weight, reward_scale = reward_weights(args, task)
    stage_reward = StageReward(args, task, weight, device)
    run = Run("sta_ppo", args.output_dir, args.resume, rank)
    source, origin = find_start(args, run)

    # ---- set-up: load the policy ----
    model, processor, folder = load_start(args, run, source, origin, device)
    stats = task_stats(model, args.env_id, args.unnorm_key)
    active = ~vla.constant_dims(stats["action"])
    codec = vla.Codec(processor, task.instruction, stats, model.config.n_action_bins, device)
    # New weights are drawn from here on.
    set_seed(args.seed)
    params = vla.prepare_training(model, args.lora_rank, args.gradient_checkpointing)
    stage_of = load_stages(args, task, folder, codec, device)
    reference = load_reference(args, model, source, origin, device)
    check_world(args.env_id, backend=args.backend, reward=args.reward)

    # ---- set-up: build. A folder is made only now, when all input is known to be good ----
    resumed_at = run.state["iteration"] if run.state else 0
    run.open(asdict(args), args.output_dir, resumed_at * args.batch_size)
    value_head = ValueHead(model.config.text_config.hidden_size).to(device)
    optimizer = build_optimizer(args, params, value_head)
    statistics = EpisodeStatistics(task.stage_table, args.num_envs, args.gamma, args.num_moved)
    first_scalars = resume(run, model, value_head, optimizer, statistics)
    envs = build_envs(args, processor.image_size, rank)
    print(f"{args.num_iterations} updates of {args.batch_size} steps; start: {source}")
    T = args.num_steps
    N = args.num_envs
    buf = Buffers(T, N, len(active), processor.image_size, device)
    progress = Progress(
        total=args.num_iterations, initial=resumed_at, desc="sta_ppo", unit="update"
    )
    iteration = resumed_at
    # Stop.hold returns what it is given. After a signal the running update is still finished and
    # saved, and then Stop.hold ends the script.
    while Stop.hold(iteration < args.num_iterations):
        # The same seed, update and process give the same random numbers, also after a resume.
        torch.manual_seed((args.seed * 1_000_003 + iteration) * world_size + rank)
        set_learning_rates(args, optimizer, iteration)
        kl_coef = kl_weight(args, iteration)

        # ---- roll-out: one half of the envs simulates while the policy acts for the other ----
        start_rollout = time.time()
        # The env processes are the parallelism, so torch gets one thread.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        begins_round = iteration % args.round_length == 0
        if begins_round or iteration == resumed_at:
            first_seed = args.seed * 1_000_003 + (iteration * world_size + rank) * N
            reset_info = buf.reset(envs, first_seed, stage_of, stage_reward)
            # A run that is resumed in the middle of a round counts episodes from the next round on.
            statistics.begin_round(args.episodes_per_round if begins_round else 0)
            statistics.observe(slice(0, N), reset_info)
        else:
            buf.carry_last_state()
        # Pass t stores what step t - 1 brought: its reward in row t - 1, its next state in row t.
        # Then it acts for step t. Pass T only stores.
        for t in range(T + 1):
            for half in envs.halves:
                if t > 0:
                    # Where an episode has ended, obs and info are already the next episode's.
                    step_obs, env_reward, term, trunc, info = envs.receive(half)
                    stage, phi = stage_of(step_obs, info)
                    buf.put_state(t, half, step_obs, stage, phi, stage_reward.clock(info))
                    success = term.to(device)  # nothing else terminates an episode
                    done = (term | trunc).to(device)
                    # The true next state of an ended episode is its final observation.
                    next_stage, next_phi = true_next(stage, phi, info, stage_of)
                    if done.any():
                        value = final_value(model, value_head, codec, info, stage_reward)
                        # `half` is a slice, so this writes into the buffer and not into a copy.
                        buf.final_values[t - 1, half][done] = value
                    # STARE: the stage reward enters here. With weight 0 it is 0.
                    paid = stage_reward(
                        half, buf.potentials[t - 1, half], next_phi, next_stage, success
                    )
                    # The next episode begins only now, after the last step of this one was paid.
                    stage_reward.begin(half, done, stage)
                    # put_state has checked that phi has one number per env.
                    assert env_reward.shape == paid.shape == done.shape == phi.shape
                    reward = reward_scale * env_reward.to(device) + paid
                    buf.rewards[t - 1, half] = reward
                    buf.done[t - 1, half] = done
                    # STARE: under progress and paced a truncation counts as a termination.
                    buf.terminated[t - 1, half] = done if stage_reward.horizon_ends else success
                    statistics.step(half, env_reward, reward, paid, info)
                    statistics.observe(half, info)
                if t < T:
                    # Act. PPO's old log-probabilities and values are made here.
                    inputs = codec.inputs(buf.obs_at(t, half))
                    buf.bins[t, half], logprob, hidden = sample_action(model, inputs, active)
                    value = value_head(hidden, buf.clock[t, half]).detach()
                    # Without this check a single number could be copied to all envs.
                    assert logprob.shape == value.shape == buf.values[t, half].shape
                    buf.logprobs[t, half] = logprob
                    buf.values[t, half] = value
                    envs.send(half, codec.actions(buf.bins[t, half]))

        # ---- advantages: V is bootstrapped after a truncation, not after a termination ----
        inputs = codec.inputs(buf.obs_at(T, slice(None)))
        buf.values[T] = value_of(model, value_head, inputs, buf.clock[T])
        # V of the true next state: of the final observation at an episode's end, else of the next
        # row.
        next_values = torch.where(buf.done, buf.final_values, buf.values[1:])
        advantages, returns = compute_gae(
            buf.rewards,
            buf.values[:T],
            next_values,
            buf.terminated,
            buf.done,
            args.gamma,
            args.gae_lambda,
        )
        torch.set_num_threads(threads)
        # Advantages are normalised over all processes: (4, T, N) -> (4, world_size * T * N).
        own_rows = torch.stack([advantages, returns, buf.values[:T], buf.stages[:T].float()])
        all_advantages, all_returns, all_values, all_stages = parallel.concatenate(
            own_rows.flatten(1), rank, world_size
        )
        # STARE: --stage-advantage normalises within the stage in which the policy acted.
        normalized = normalize(all_advantages, all_stages if args.stage_advantage else None)

        # ---- update: flatten the buffers to B = T * N steps ----
        start_update = time.time()
        B = T * N
        b_obs = {name: value[:T].flatten(0, 1) for name, value in buf.obs.items()}
        b_bins = buf.bins.flatten(0, 1)
        b_logprobs = buf.logprobs.flatten()
        b_returns = returns.flatten()
        b_clock = buf.clock[:T].flatten()
        b_advantages = normalized[rank * B : (rank + 1) * B]
        if reference is not None:
            b_ref_logprobs = reference_logprobs(args, reference, codec, b_obs, b_bins, active)
        metrics = Metrics()
        largest_logratio = torch.zeros((), device=device)
        # Gradient checkpointing needs training mode, which changes nothing else: no dropout.
        model.train(args.gradient_checkpointing)
        for _ in range(args.update_epochs):
            for mb_inds in torch.randperm(B).split(args.minibatch_size // world_size):
                optimizer.zero_grad()
                for chunk in mb_inds.split(args.chunk_size):
                    inputs = codec.inputs({name: value[chunk] for name, value in b_obs.items()})
                    # Observations are on the CPU, all other buffers on the device.
                    chunk = chunk.to(device)
                    newlogprob, entropy, hidden, _ = action_logprob(
                        model, inputs, b_bins[chunk], active
                    )
                    newvalue = value_head(hidden, b_clock[chunk])
                    # Without this check the losses below could broadcast.
                    assert newlogprob.shape == newvalue.shape == b_returns[chunk].shape

                    logratio = newlogprob - b_logprobs[chunk]
                    pg_loss = ppo_loss(logratio, b_advantages[chunk], args.clip_coef)
                    v_loss = 0.5 * (newvalue - b_returns[chunk]).square().mean()
                    # KL to the policy that the run started from
                    ref_loss = torch.zeros((), device=device)
                    if reference is not None:
                        ref_loss = kl_loss(newlogprob, b_ref_logprobs[chunk])
                    loss = pg_loss + args.vf_coef * v_loss + kl_coef * ref_loss
                    # The gradients of all chunks and processes add up to the minibatch's gradient.
                    share = len(chunk) / len(mb_inds) / world_size
                    (share * loss).backward()

                    metrics.add(
                        share,
                        policy_loss=pg_loss,
                        value_loss=v_loss,
                        kl_to_start=ref_loss,
                        entropy=entropy.mean(),
                        **ratio_metrics(logratio.detach(), args.clip_coef),
                    )
                    # In the first minibatch the policy is still the roll-out's: only rounding
                    # differs.
                    if not metrics.minibatches:
                        largest_logratio = logratio.detach().abs().max().maximum(largest_logratio)
                trained = [*params, *value_head.parameters()]
                parallel.sum_over_processes([p.grad for p in trained])
                grad_norm = nn.utils.clip_grad_norm_(trained, args.max_grad_norm)
                metrics.add(1 / world_size, grad_norm=grad_norm)
                metrics.end_minibatch()
                optimizer.step()
            if args.target_kl is not None and metrics.last("approx_kl") > args.target_kl:
                break
        model.eval()
        # From here on `iteration` is the number of finished updates.
        iteration += 1
        if iteration == args.critic_warmup:
            reset_momentum(optimizer)

        # ---- log: means over the update's minibatches ----
        global_step = iteration * args.batch_size
        parallel.largest_over_processes(largest_logratio)
        losses = loss_scalars(metrics)
        batch = {**b_obs, "bins": b_bins, "logprobs": b_logprobs, "advantages": b_advantages}
        refuse_nan(losses, run.folder, {**batch, "returns": b_returns})
        if iteration % args.round_length == 0:
            # Only whole rounds count, because the first episodes to end are mostly successes.
            round_size = world_size * (N - args.num_moved) * args.episodes_per_round
            statistics.end_round(parallel.gather(statistics.rows), round_size)
        now = time.time()
        scalars = {
            **losses,
            "losses/first_ratio": metrics.first("ratio"),
            "losses/rollout_update_logprob_gap": largest_logratio.item(),
            "losses/explained_variance": explained_variance(all_values, all_returns),
            "losses/advantage_std": all_advantages.std().item(),
            "charts/learning_rate": optimizer.param_groups[0]["lr"],
            "charts/SPS": args.batch_size / (now - start_rollout),
            "time/rollout": start_update - start_rollout,
            "time/update": now - start_update,
            "time/peak_gpu_gb": torch.cuda.max_memory_allocated() / 2**30,
            **statistics.means(),
        }
        run.log(scalars, global_step)
        if statistics.recent and not first_scalars:
            # This is the first complete round. The warnings compare with it.
            first_scalars = scalars
        run.warn(ppo_symptoms(first_scalars or scalars, scalars, weight, rounding_gap(model)))
        print_update(global_step, scalars)
        progress.update()

        # ---- save and evaluate ----
        saves = iteration % args.save_freq == 0 or iteration == args.num_iterations
        # Stop.asked() stands first, because all processes of a job must call it.
        if (Stop.asked() or saves) and rank == 0:
            state = {
                "script": "sta_ppo",
                "iteration": iteration,
                "recent": statistics.recent,
                "first": first_scalars,
                "source": str(source),
                "origin": origin,
                "wall_s": run.seconds(),
            }
            settings = result_settings(args, weight, source, global_step, run.seconds())
            save_checkpoint(
                run.folder,
                model,
                processor,
                settings,
                state,
                optimizer,
                heads={"value_head": value_head},
            )
        evaluates = args.eval_freq and iteration % args.eval_freq == 0
        if evaluates and iteration < args.num_iterations and not Stop.leaving:
            log_evaluation(args, run, model, processor, global_step)
    # A run that a signal has stopped does not come here.
    progress.close()
    envs.close()
    if rank == 0:
        log_evaluation(args, run, model, processor, iteration * args.batch_size)
        run.close()


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Args))
