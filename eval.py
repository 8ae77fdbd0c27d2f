"""Evaluation of a policy: greedy actions, full episodes, a seed per episode that no training sees.

    python eval.py --checkpoint runs/PickCube-v1__sta_ppo__1__...  # table, results, report.html
    python eval.py --checkpoint DIR --capture-video                # films 16 episodes, too
    python eval.py --checkpoint DIR --ood camera                   # or position, lighting
    python eval.py --checkpoint DIR --instruction-set paraphrase   # words not trained on
    python eval.py --compare sft.json sta_ppo.json                 # paired difference by seed

Success is ManiSkill's. `success_once` is success at any step of the registered horizon,
`success_at_end` at its last step. The stage funnel is P(stage k completed | stage k - 1 completed):
it shows where episodes are lost. SimplerEnv's tasks have a grid of 24 or 64 initial configurations.
Each is played once, because a greedy policy would only repeat itself.
Letters: T steps, N envs, K stages, B batch, A action tokens, D width.
"""

import json
import math
import os
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

# Idle OpenMP threads that spin take the cores from the env processes: a forward pass is then 20
# times slower. PyTorch reads this when it is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import tyro

import vla
from plumbing.card import CARD_NAME, can_have_card, model_card
from plumbing.checkpoint import (
    check_instructions,
    command_line,
    fingerprint,
    given_policy,
    load_policy,
    load_separator,
    read_settings,
    task_stats,
)
from plumbing.page import write_page
from plumbing.report import (
    check_same_episodes,
    check_writable,
    draw,
    if_possible,
    mean_rows,
    read_results,
    result_table,
    separator_line,
    success_line,
    write_text,
    write_video,
)
from plumbing.run import Progress, check_numbers, one_line_errors
from stare_utils import decode_stages, segment_stages
from world.assets import check_world, choose_renderer
from world.tasks import EVAL_SEED, TASKS, Task, UserError, env_ids, get_task
from world.vector import make_envs

# How many episodes a video shows.
NUM_FILMS = 16


# ---- command line ----
@dataclass
class Args:
    checkpoint: str = ""
    """folder of a checkpoint, or the run folder that holds it, from any of the three scripts"""
    vla: str = ""
    """an OpenVLA instead of --checkpoint: a folder in the published layout, or its hub id"""
    unnorm_key: str = ""
    """data set whose action statistics to use, e.g. bridge_orig: a key of norm_stats in config.json
    or of dataset_statistics.json beside it"""
    env_id: str = ""
    """task, or several with commas between them. Empty: all that the checkpoint was trained on"""
    num_eval_episodes: int = 100
    """episodes. At 90 % success the 95 % interval is +-6 points with 100 and +-3.4 with 300"""
    seed: int = 0
    """evaluation seeds are EVAL_SEED + 100000 * seed + episode. Training uses none of them"""
    num_envs: int = 8
    """env processes (CPU) or parallel envs (GPU)"""
    backend: Literal["cpu", "cuda"] = "cpu"
    """physics: cpu (one process per env) or cuda (ManiSkill's GPU simulation)"""
    render: Literal["auto", "cpu", "gpu"] = "auto"
    """where pictures are drawn: cpu is Mesa's software driver, auto is the GPU if there is one"""
    cuda: bool = True
    """put the model on the GPU if there is one"""
    capture_video: bool = False
    """film the first 16 episodes as the policy sees them: in report.html, and video.mp4"""
    ood: Literal["none", "position", "camera", "lighting"] = "none"
    """what each episode's seed changes: object places, camera places or lamps (docs/tasks.md)"""
    instruction_set: Literal["train", "paraphrase"] = "train"
    """words of the instruction: as trained, or the task's held-out paraphrases in turn"""
    instruction: str = ""
    """give these words to the policy instead"""
    full_meshes: bool = False
    """on a CPU, take ManiSkill's own classes and meshes, and SimplerEnv at 640 x 480: 3 to 20
    times slower (docs/speed.md)"""
    output_dir: str = ""
    """where results.json, report.html and video.mp4 go. Empty: the checkpoint's run folder"""
    method: str = ""
    """name of the method in the result. Empty: as the checkpoint says, for example STA-PPO"""
    compare: tuple[str, ...] = ()
    """results.json files: print one table with paired differences on common seeds, and stop"""


# ---- the policy ----
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


# ---- roll-out ----
class Episode(NamedTuple):
    """One evaluated episode."""

    # The episode's row in the result, see plumbing/report.py.
    row: dict
    # Frames (H, W, 3) uint8 to be shown. Empty where the episode is not filmed.
    film: list[np.ndarray]
    # What compare_separator reads, see there.
    labels: tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Round:
    """One episode in each of N envs: what the evaluation keeps of them."""

    def __init__(self, task: Task, N: int):
        T = task.max_episode_steps
        K = len(task.stages)
        self.stage_names = (*task.stages, "done")
        # Of each state acted in: the stage by the rules, the stage by the learned separator, and
        # whether success has come by then.
        self.stages = torch.zeros(T, N, dtype=torch.long)
        self.stage_logprobs = torch.zeros(T, N, K)
        self.over = torch.zeros(T, N, dtype=torch.bool)
        # Of each episode up to now.
        self.once = torch.zeros(N, dtype=torch.bool)
        self.returns = torch.zeros(N)
        self.films = [[] for _ in range(N)]
        # What the task reports, at the first success. NaN before.
        self.reported = {name: torch.full((N,), math.nan) for name in task.report}

    def add_step(self, half: slice, reward: torch.Tensor, info: dict) -> None:
        """Counts what a step of the envs in `half` led to."""
        # A task reports about the moment of success, so a later success changes nothing.
        first = info["success"].cpu() & ~self.once[half]
        for name, values in self.reported.items():
            values[half] = torch.where(first, info[name].cpu(), values[half])
        self.once[half] |= first
        self.returns[half] += reward.cpu()

    def add_frames(self, half: slice, rgb: torch.Tensor, info: dict, num_films: int) -> None:
        """Draws a frame of each env in `half` that is among the first `num_films` envs."""
        for i in range(half.start, min(half.stop, num_films)):
            j = i - half.start
            stage_name = self.stage_names[info["stage"][j]]
            potential = float(info["potential"][j])
            success = bool(info["success"][j])
            self.films[i].append(draw(rgb[j], stage_name, potential, success))

    def episodes(self, info: dict) -> list[Episode]:
        """The N episodes. info: the envs' infos at their last step."""
        N, K = self.stage_logprobs.shape[1:]
        # Label K counts the steps in which the task is solved.
        steps = torch.nn.functional.one_hot(self.stages, K + 1).sum(0)  # (N, K + 1)
        episodes = []
        for i in range(N):
            row = {
                "seed": int(info["seed"][i]),
                "success_once": bool(self.once[i]),
                "success_at_end": bool(info["success"][i]),
                "return": float(self.returns[i]),
                "episode_len": int(info["elapsed_steps"][i]),
                "furthest_stage": int(info["furthest_stage"][i]),
                "stage_steps": steps[i].tolist(),
            }
            if self.once[i]:
                row |= {name: float(values[i]) for name, values in self.reported.items()}
            labels = (self.stages[:, i], self.stage_logprobs[:, i], self.over[:, i])
            episodes.append(Episode(row, self.films[i], labels))
        return episodes


def overwrite(batch: dict, half: slice, new: dict) -> None:
    """Writes the tensors of the envs in `half` into those of all envs, where both have a name."""
    for name in batch.keys() & new.keys():
        batch[name][half] = new[name]


def play_round(model, processor, stats, envs, seeds, texts, separator, num_films) -> list[Episode]:
    """Plays one episode in each of the N envs, to the registered horizon.

    stats: see task_stats. seeds, texts: N seeds, and the N instructions that the policy is given.
    separator: the linear map from the hidden state to stage logits, or None. num_films: how many
    envs to film, the first ones.
    """
    T = envs.task.max_episode_steps
    K = envs.num_stages
    n_bins = model.config.n_action_bins
    device = next(model.parameters()).device
    # Action dimensions that never vary are not decoded.
    active = ~vla.constant_dims(stats["action"])
    played = Round(envs.task, envs.num_envs)
    obs, info = envs.reset(seed=seeds)
    for t in range(T + 1):
        # One half of the envs simulates while the policy acts for the other half.
        for half in envs.halves:
            # ---- what the actions of step t - 1 led to ----
            if t > 0:
                next_obs, reward, _, truncated, next_info = envs.receive(half)
                if truncated.all():
                    # The envs stand at the start of new episodes already.
                    # The end of the present ones is kept apart.
                    next_obs = next_info["final_obs"]
                    next_info = next_info["final_info"]
                played.add_step(half, reward, next_info)
                played.add_frames(half, next_obs["rgb"], next_info, num_films)
                overwrite(obs, half, next_obs)
                overwrite(info, half, next_info)
            # ---- act ----
            if t < T:
                rgb = obs["rgb"][half]
                proprio = obs["proprio"][half]
                inputs = processor(rgb, texts[half], proprio, stats.get("proprio"), device)
                bins, _, hidden = sample_action(model, inputs, active, greedy=True)
                if separator is not None:
                    logits = separator(hidden.float())[:, :K]
                    played.stage_logprobs[t, half] = logits.log_softmax(-1).cpu()
                played.stages[t, half] = info["stage"][half].cpu()
                played.over[t, half] = played.once[half]
                envs.send(half, vla.detokenize_actions(bins, stats["action"], n_bins))
    return played.episodes(info)


def play_episodes(
    model, processor, stats, envs, num_episodes, seed, texts, separator, film, progress
) -> list[Episode]:
    """Plays `num_episodes` episodes, a round of N at a time, each with a seed of its own.

    seed: of the evaluation. texts: instructions for the policy, in turn. film: keep the frames of
    the first 16 episodes. The rest: see play_round.
    """
    N = envs.num_envs
    # Training may go on after an evaluation, so both are put back at the end.
    was_training = model.training
    num_threads = torch.get_num_threads()
    model.eval()
    # The env processes need the cores, so PyTorch computes on one alone.
    torch.set_num_threads(1)
    episodes = []
    while len(episodes) < num_episodes:
        first = len(episodes)
        numbers = range(first, first + N)
        seeds = [EVAL_SEED + (100_000 * seed + i) % 2**31 for i in numbers]
        # Episode i is given instruction i, and the first one again after the last.
        words = [texts[i % len(texts)] for i in numbers]
        num_films = NUM_FILMS - first if film else 0
        played = play_round(model, processor, stats, envs, seeds, words, separator, num_films)
        # The last round may play more episodes than are left.
        played = played[: num_episodes - first]
        episodes += played
        progress.update(len(played))
    model.train(was_training)
    torch.set_num_threads(num_threads)
    return episodes


# ---- the learned separator ----
def first_entry(segment: torch.Tensor, k: int) -> int | None:
    """The first step in stage k or later, of labels (T,). None where there is none."""
    steps = (segment >= k).nonzero()
    return int(steps[0]) if len(steps) else None


def mean_of(flags: list[torch.Tensor]) -> float:
    """The share of True in bool tensors, all steps counted alike."""
    return float(torch.cat(flags).float().mean())


def compare_separator(
    episodes: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], num_stages: int
) -> dict:
    """The learned separator against the rules, on episodes up to their success or their end.

    episodes: of each the rules' stage (T,), the separator's log-probabilities (T, K), and (T,)
    bool, true from the first success on. Returns
    `causal_accuracy`: share of steps whose most likely stage is the rules'. STA-PPO uses these.
    `viterbi_accuracy`: share of steps in the rules' segment. STA-TPO uses these.
    `boundary_error`: steps between the two first entries into a stage, the mean over the boundaries
    that both have; NaN where there is none.
    `boundary_missed`: share of boundaries that only one of the two has.
    `num_steps`: how many steps were compared.
    """
    causal = []
    viterbi = []
    gaps = []
    num_missed = 0
    for stage, logprobs, over in episodes:
        # An episode that begins in success has stage K there: that is its first stage.
        stage = stage[~over] % num_stages
        logprobs = logprobs[~over]
        # Both are labels that never fall.
        rules = segment_stages(stage, num_stages)
        decoded = decode_stages(logprobs)
        causal.append(logprobs.argmax(-1) == stage)
        viterbi.append(decoded == rules)
        for k in range(1, num_stages):
            entries = [first_entry(rules, k), first_entry(decoded, k)]
            found = [step for step in entries if step is not None]
            if len(found) == 2:
                gaps.append(abs(found[0] - found[1]))
            elif len(found) == 1:
                num_missed += 1
    return {
        "causal_accuracy": mean_of(causal),
        "viterbi_accuracy": mean_of(viterbi),
        "boundary_error": float(np.mean(gaps)) if gaps else math.nan,
        "boundary_missed": num_missed / max(1, num_missed + len(gaps)),
        "num_steps": sum(len(steps) for steps in causal),
    }


# ---- the evaluation: the training scripts import this function ----
def evaluate(
    model,
    processor,
    env_id: str,
    num_episodes: int,
    seed: int,
    num_envs: int,
    *,
    backend: str = "cpu",
    full_meshes: bool = False,
    ood: str = "none",
    instructions: tuple[str, ...] = (),
    films: list | None = None,
    separator: torch.nn.Linear | None = None,
) -> dict:
    """Evaluates a policy greedily on full episodes: success does not end one.

    A task with a grid of initial configurations has no more episodes than that. instructions: words
    for the policy, in turn; empty: the task's. films: a list that gets the frames of the first 16
    episodes. separator: see play_round.
    Returns what `mean_rows` does, and with a separator what `compare_separator` does, too.
    """
    task = get_task(env_id)
    stats = task_stats(model, *env_ids(env_id))
    # A grid of 0 means that episodes are drawn at random, as many as are asked for.
    num_episodes = min(num_episodes, task.grid or num_episodes)
    texts = instructions or (task.instruction,)
    film = films is not None
    envs = make_envs(
        env_id,
        min(num_envs, num_episodes),
        0,
        terminate_on_success=False,
        backend=backend,
        full_meshes=full_meshes,
        ood=ood,
        image_size=processor.image_size,
    )
    progress = Progress(total=num_episodes, desc=f"evaluate {env_id}", unit="episode")
    episodes = play_episodes(
        model, processor, stats, envs, num_episodes, seed, texts, separator, film, progress
    )
    progress.close()
    envs.close()
    if film:
        films.extend(episode.film for episode in episodes[:NUM_FILMS])
    result = mean_rows([episode.row for episode in episodes], envs.num_stages)
    if separator is not None:
        result["separator"] = compare_separator([e.labels for e in episodes], envs.num_stages)
    return result


# ---- the script ----
def words_for(env_id: str, instruction: str, instruction_set: str) -> tuple[str, ...]:
    """The instructions to give to the policy in place of the task's own; empty: none."""
    if instruction:
        return (instruction,)
    if instruction_set == "paraphrase":
        return get_task(env_id).paraphrases
    return ()


def check_task(model, processor, env_id, unnorm_key, words, ood, full_meshes) -> None:
    """Raises UserError where the policy cannot be evaluated on a task with these flags."""
    check_world(env_id, full_meshes)
    task_stats(model, env_id, unnorm_key)
    if ood == "camera" and not get_task(env_id).views:
        raise UserError(
            f"--ood camera: {env_id}'s camera cannot move, because a photograph stands behind its "
            "scene; use position or lighting"
        )
    check_instructions(model, processor, words)


def separator_of(folder: Path, trained: dict, env_id: str, device: torch.device):
    """The learned separator of an SFT checkpoint, None where it has none of this task.

    trained: the checkpoint's args.json.
    """
    # The separator tells the stages of the tasks that it was trained on.
    known = env_id in trained.get("env_id", "").split(",")
    if not known or not (folder / "separator.safetensors").exists():
        return None
    found = load_separator(folder, env_id, device)
    return found[1] if found else None


def git_commit() -> str:
    """The commit of this repository, "" where there is no git."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError:
        return ""
    return done.stdout.strip()


def file_suffix(env_id: str, ood: str, instruction: str, words: tuple[str, ...]) -> str:
    """What the names of an evaluation's files end in, so that each kind has files of its own.

    env_id: "" where the policy knows one task alone.
    """
    # The training conditions are the rule and have no word in the names.
    kinds = []
    if env_id:
        kinds.append(env_id)
    if ood != "none":
        kinds.append(ood)
    if instruction:
        kinds.append("own_words")
    elif words:
        kinds.append("other_words")
    return "".join(f"_{kind}" for kind in kinds)


def describe(args: Args, means, env_id, trained, words, commit, seconds) -> dict:
    """A result: what evaluate returned, behind the policy and the conditions that gave it.

    trained: the checkpoint's args.json. words: the instructions given. seconds: it took.
    """
    return {
        "method": args.method or trained.get("method", ""),
        "env_id": env_id,
        # The seed, the env steps and the time are those of the training.
        "seed": trained.get("seed"),
        "num_episodes": len(means["episodes"]),
        "env_steps": trained.get("env_steps"),
        "wall_s": trained.get("wall_s"),
        "eval_wall_s": round(seconds, 1),
        "ood": args.ood,
        "backend": args.backend,
        "num_envs": args.num_envs,
        "instructions": words,
        "commit": commit,
        "command": command_line(),
        **means,
    }


def report(output: Path, suffix: str, result: dict, trained: dict, films: list, run: Path) -> None:
    """Prints a result and writes its files. trained: the checkpoint's args.json.

    films: frames of each filmed episode; empty: no video. run: the policy's run folder, which has
    its training curves.
    """
    results = output / f"results{suffix}.json"
    page = output / f"report{suffix}.html"
    video = output / f"video{suffix}.mp4"
    # An evaluation with another seed or length has the same name.
    if results.exists():
        print(f"{results} of an earlier evaluation is replaced")
    # The numbers come first, because the disk may fill up, or nobody may read what is printed.
    write_text(results, json.dumps(result))
    table = result_table([result])
    print(table)
    if "separator" in result:
        print(separator_line(result["separator"]))
    write_page(page, result, trained, table, films, run)
    line = f"wrote {results}, {page}"
    if films and if_possible(str(video), write_video, video, films):
        line += f" and {video}"
    print(line)


def main(args: Args) -> None:
    # ---- check ----
    if args.compare:
        results = [read_results(path) for path in args.compare]
        # Rows are paired by seed, so a seed must stand for the same episode in all results.
        check_same_episodes(results)
        print(result_table(results))
        return
    if args.vla and not (args.env_id and args.output_dir):
        raise UserError("--vla needs --env-id, and --output-dir for the results")
    given = given_policy(args.checkpoint, args.vla)
    if not given:
        raise UserError(
            "--checkpoint is missing: give the folder that sft.py, sta_tpo.py or sta_ppo.py wrote"
        )
    check_numbers(asdict(args), {"num_eval_episodes": 1, "num_envs": 1})
    choose_renderer(args.render, args.backend)
    if args.instruction and args.instruction_set != "train":
        raise UserError("--instruction and --instruction-set exclude each other: leave one out")
    if args.backend == "cuda" and args.ood in ("camera", "lighting"):
        raise UserError(
            f"--ood {args.ood}: GPU simulation builds a scene once, so all episodes would have the "
            "same one; leave out --backend cuda"
        )

    # ---- load ----
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    model, processor, folder = load_policy(given, device)
    # norm_stats may name data sets, too.
    known = [name for name in model.config.norm_stats if name in TASKS]
    if not (args.env_id or known):
        raise UserError(f"{given} knows the actions of no task here: train it with sft.py --vla")
    tasks = env_ids(args.env_id or ",".join(known))
    texts = {}
    for env_id in tasks:
        words = words_for(env_id, args.instruction, args.instruction_set)
        check_task(model, processor, env_id, args.unnorm_key, words, args.ood, args.full_meshes)
        texts[env_id] = words
    # A run that trains on may put another checkpoint here during the evaluation.
    loaded = fingerprint(folder)
    # A published OpenVLA has no args.json.
    trained = read_settings(folder) if (folder / "args.json").exists() else {}

    # ---- evaluate ----
    run = folder.parent if folder.name == "checkpoint" else folder
    # Hours of episodes would be lost if the results could not be written at their end.
    output = Path(args.output_dir or run)
    check_writable(output)
    # The commit is read now, because an evaluation takes long and HEAD may move.
    commit = git_commit()
    for env_id in tasks:
        start = time.time()
        # A policy of one task needs no task in the names of its files.
        task_name = "" if known == [env_id] else env_id
        suffix = file_suffix(task_name, args.ood, args.instruction, texts[env_id])
        films = []
        means = evaluate(
            model,
            processor,
            env_id,
            args.num_eval_episodes,
            args.seed,
            args.num_envs,
            backend=args.backend,
            full_meshes=args.full_meshes,
            ood=args.ood,
            instructions=texts[env_id],
            films=films if args.capture_video else None,
            separator=separator_of(folder, trained, env_id, device),
        )
        seconds = time.time() - start
        result = describe(args, means, env_id, trained, texts[env_id], commit, seconds)
        report(output, suffix, result, trained, films, run)
        # The card of a run's own checkpoint says how good it is, under the training conditions.
        is_own = output == folder.parent and not suffix
        if is_own and can_have_card(trained) and fingerprint(folder) == loaded:
            card = model_card(trained, model.config, success_line(result))
            write_text(folder / CARD_NAME, card)


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Args))
