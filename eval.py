"""Evaluation: greedy decoding, full episodes, every episode with its own seed that no training ever sees.

    python eval.py --checkpoint runs/PickCube-v1__sta_ppo__1__...      # table, results.json with a row per episode
    python eval.py --checkpoint DIR --capture-video                    # and an mp4 grid: stage, Phi and success drawn on the frames
    python eval.py --checkpoint DIR --ood camera                       # out of distribution: position, camera, lighting
    python eval.py --checkpoint DIR --instruction-set paraphrase       # the same tasks in words that were not trained on
    python eval.py --compare sft.json sta_ppo.json                     # paired difference of two results on the same seeds

Success is ManiSkill's: `success_once` at any step of the registered horizon, `success_at_end` at its last. The stage funnel is
P(stage k completed | stage k-1 completed): it says where the episodes are lost. SimplerEnv's tasks have a grid of 24 or 64 initial
configurations: each is played once, a greedy repeat would be no new trial.
Letters: N envs, T steps, K stages, A action dimensions, B batch, D hidden width.
"""
import contextlib
import json
import math
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import stare_utils  # before torch: it makes idle OpenMP threads sleep  # isort: skip
import imageio
import numpy as np
import torch
import tyro
from PIL import Image, ImageDraw
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

import vla
from stare_utils import EVAL_SEED, UserError, decode_stages, make_envs, segment_stages

CURVES = ("charts/success_once", "charts/shaped_return", "losses/explained_variance", "losses/ce", "losses/action_l1", "rewards/margins", "logps/chosen")


@dataclass
class Args:
    checkpoint: str = ""
    """checkpoint folder (or the run folder that holds it) of any of the three stages"""
    vla: str = ""
    """an OpenVLA instead of --checkpoint: its folder in the published layout, or its hub id, with --unnorm-key"""
    unnorm_key: str = ""
    """of which data set in its `norm_stats` the task's actions are, `bridge_orig` for SimplerEnv's tasks"""
    env_id: str = ""
    """task, or several with commas between them; empty: all that the checkpoint was trained on"""
    num_eval_episodes: int = 100
    """episodes, each of the registered horizon; the 95 % interval at 90 % success is +-6 points with 100 episodes and +-3.4 with 300"""
    seed: int = 0
    """evaluation seeds are EVAL_SEED + 100000 * seed + episode, disjoint from those of training"""
    num_envs: int = 8
    """env processes (CPU) or parallel envs (GPU)"""
    backend: Literal["cpu", "cuda"] = "cpu"
    """physics: cpu (one process per env) or cuda (ManiSkill's GPU simulation)"""
    cuda: bool = True
    """put the model on the GPU if there is one"""
    capture_video: bool = False
    """write video.mp4: a grid of the first 16 episodes as the policy sees them"""
    ood: Literal["none", "position", "camera", "lighting"] = "none"
    """what differs from training, drawn anew from each episode's seed: where the objects lie, where the cameras stand, the lamps (docs/tasks.md)"""
    instruction_set: Literal["train", "paraphrase"] = "train"
    """words of the instruction: as trained, or the task's held-out paraphrases in turn"""
    instruction: str = ""
    """these words instead"""
    full_meshes: bool = False
    """on a CPU too: the Panda's original visual meshes (4x slower), SimplerEnv's camera at 640 x 480 (2x slower)"""
    output_dir: str = ""
    """where results.json and video.mp4 go; empty: the checkpoint's run folder"""
    method: str = ""
    """name of the method in the result row; empty: the script that made the checkpoint"""
    compare: tuple[str, ...] = ()
    """results.json files: print one table with the paired difference of each to the one before on their common seeds, and stop"""


def load_policy(checkpoint: str, device: torch.device, origin: str = ""):
    """Model, processor and folder of a checkpoint (its folder, its run's, or a hub id). UserError: it is not ours, or no longer that of this fingerprint."""
    folder = vla.model_folder(checkpoint)
    try:
        vla.check_folder(folder, origin)
        return AutoModelForImageTextToText.from_pretrained(folder).to(device).eval(), AutoProcessor.from_pretrained(folder), folder
    except Exception as error:  # a file may hold anything
        raise UserError(f"{folder} cannot be loaded: {next(iter(str(error).splitlines()), type(error).__name__)}") from None


def check_instructions(model, processor, texts: list[str]) -> None:
    """Raises UserError when an instruction leaves no room for the action tokens in the model's context."""
    for text in texts:
        length, room = len(processor.prompt_ids(text)), model.text_room()
        if length > room:
            raise UserError(f"the instruction {text[:40]!r}... has {length} tokens, the model has room for {room}: shorten it")


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


def wilson(successes: float, n: int) -> tuple[float, float]:
    """95 % Wilson interval of a share (Wilson 1927)."""
    z, p = 1.959964, successes / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


def paired_difference(a: list[dict], b: list[dict]) -> dict:
    """Mean of success_once(b) - success_once(a) over the episodes with the same seed, with a 95 % interval: the normal one once two pairs have been
    added, half of one won and half of one lost among them (Agresti and Min 2005), which holds the truth as often as it says with 24 pairs, too."""
    first = {row["seed"]: row["success_once"] for row in a}
    diff = np.array([float(row["success_once"]) - float(first[row["seed"]]) for row in b if row["seed"] in first])
    if len(diff) < 2:
        raise UserError("the two results share fewer than two seeds: evaluate both with the same --seed and --num-eval-episodes")
    n = len(diff) + 2
    middle, half = diff.sum() / n, 1.959964 * math.sqrt(np.abs(diff).sum() + 1 - diff.sum() ** 2 / n) / n
    return {"difference": diff.mean(), "low": middle - half, "high": middle + half, "num_episodes": len(diff)}


def draw(rgb: torch.Tensor, stage_name: str, potential: float, success: bool) -> np.ndarray:
    """A frame (H, W, 3) uint8 at twice its size with the stage, Phi and success written on it."""
    image = Image.fromarray(rgb.cpu().numpy()).resize((2 * rgb.shape[1], 2 * rgb.shape[0]))
    pen = ImageDraw.Draw(image)
    pen.rectangle([0, 0, image.width, 14], fill=(0, 110, 0) if success else (0, 0, 0))
    pen.text((3, 1), f"{stage_name}  Phi {potential:.2f}{'  success' if success else ''}", fill=(255, 255, 255))
    return np.asarray(image)


def write_video(path: Path, episodes: list[list[np.ndarray]]) -> None:
    """An mp4 grid (4 columns) of episodes, each a list of T frames; written beside its place and renamed."""
    columns = min(4, len(episodes))
    episodes = episodes + [[np.zeros_like(frame) for frame in episodes[0]]] * (-len(episodes) % columns)  # black, to fill the last row
    with imageio.get_writer(path.with_suffix(".tmp.mp4"), fps=10, macro_block_size=None) as writer:
        for frames in zip(*episodes, strict=True):
            writer.append_data(np.concatenate([np.concatenate(frames[i : i + columns], 1) for i in range(0, len(frames), columns)], 0))
    path.with_suffix(".tmp.mp4").rename(path)


def compare_separator(read: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], num_stages: int) -> dict:
    """The learned separator against the rules, on episodes up to their success, or their end.

    read: per episode the rules' stage (T,), the separator's log-probabilities (T, K) and (T,) bool, true from success on. Returns `causal_accuracy`
    (share of steps whose most likely stage is the rules': what STA-PPO uses), `viterbi_accuracy` (share of steps in the rules' segment: what STA-TPO
    uses), `boundary_error` (steps between the two first entries into a stage, mean over the boundaries that both have), `boundary_missed` (share of
    boundaries that only one of them has) and `num_steps`.
    """
    causal, viterbi, gaps, single = [], [], [], 0
    for stage, logprobs, over in read:
        stage, logprobs = stage[~over] % num_stages, logprobs[~over]  # an episode that begins in success begins in its first stage
        rules, decoded = segment_stages(stage, num_stages), decode_stages(logprobs)
        causal.append(logprobs.argmax(-1) == stage)
        viterbi.append(decoded == rules)
        for k in range(1, num_stages):
            first = [int((path >= k).float().argmax()) for path in (rules, decoded) if (path >= k).any()]
            gaps += [abs(first[0] - first[1])] if len(first) == 2 else []
            single += len(first) == 1
    share = lambda x: float(torch.cat(x).float().mean())  # noqa: E731
    return {"causal_accuracy": share(causal), "viterbi_accuracy": share(viterbi), "boundary_error": float(np.mean(gaps or math.nan)),
            "boundary_missed": single / max(1, single + len(gaps)), "num_steps": sum(map(len, causal))}  # fmt: skip


def evaluate(
    model, processor, env_id: str, num_episodes: int, seed: int, num_envs: int, *, backend: str = "cpu", full_meshes: bool = False, ood: str = "none",
    instructions: tuple[str, ...] = (), video: Path | None = None, separator: torch.nn.Linear | None = None,
) -> dict:
    """Greedy evaluation on full episodes (no termination, no partial reset). A task with a grid of initial configurations has no more episodes than that.
    Returns `success_once`, `success_at_end`, `return`, `episode_len`, `furthest_stage` (means), `stage_reach_rate` (K,) = share of episodes that
    completed stage k (the last equals success_once), `stage_steps` (K,) mean steps per episode labelled k, and `episodes`: rows of the same with their
    seed and what the task reports at success. instructions: words given to the policy, in turn; empty: the task's. video: where to write an mp4 of the
    first 16 episodes. separator: see compare_separator."""
    stats, device, was_training = task_stats(model, *stare_utils.env_ids(env_id)), next(model.parameters()).device, model.training
    task, active = stare_utils.get_task(env_id), ~vla.constant_dims(stats["action"])
    num_episodes, texts, rows, films, read = min(num_episodes, task.grid or num_episodes), instructions or (task.instruction,), [], [], []
    envs = make_envs(env_id, min(num_envs, num_episodes), 0, terminate_on_success=False, backend=backend, full_meshes=full_meshes, ood=ood,
                     image_size=processor.image_size)  # fmt: skip
    N, K, T, names, threads = envs.num_envs, envs.num_stages, task.max_episode_steps, (*task.stages, "done"), torch.get_num_threads()
    model.eval()
    torch.set_num_threads(1)  # the env processes are the parallelism
    progress = tqdm(total=num_episodes, desc=f"evaluate {env_id}", unit="episode", disable=None)

    def act(t: int, n: slice) -> torch.Tensor:
        """Actions (n, A) of the envs n, in their own units. Where envs are processes, the other half computes meanwhile."""
        words = [texts[(len(rows) + i) % len(texts)] for i in range(n.start, n.stop)]
        bins, _, hidden = sample_action(model, processor(obs["rgb"][n], words, obs["proprio"][n], stats.get("proprio"), device), active, greedy=True)
        if separator is not None:
            stage_logprobs[t, n] = separator(hidden.float())[:, :K].log_softmax(-1).cpu()
        stages[t, n], over[t, n] = info["stage"][n].cpu(), once[n]
        return vla.detokenize_actions(bins, stats["action"], model.config.n_action_bins)

    while len(rows) < num_episodes:
        obs, info = envs.reset(seed=[EVAL_SEED + (100_000 * seed + len(rows) + i) % 2**31 for i in range(N)])
        once, returns, film = torch.zeros(N, dtype=torch.bool), torch.zeros(N), [[] for _ in range(N)]
        reported = {name: torch.full((N,), math.nan) for name in task.report}
        # (T, N, ...): stage by the rules, the separator's log-probabilities, over yet
        stages, stage_logprobs, over = torch.zeros(T, N, dtype=torch.long), torch.zeros(T, N, K), torch.zeros(T, N, dtype=torch.bool)
        for _, n, now_obs, reward, _, truncated, now in envs.play(act, T):
            last_obs, now = (now["final_obs"], now["final_info"]) if truncated.all() else (now_obs, now)
            first = now["success"].cpu() & ~once[n]
            for name, values in reported.items():
                values[n] = torch.where(first, now[name].cpu(), values[n])
            once[n], returns[n] = once[n] | first, returns[n] + reward.cpu()
            for here, new in ((obs, now_obs), (info, now)):
                for name in here.keys() & new.keys():
                    here[name][n] = new[name]
            for j in range(min(n.stop, 16 - len(films)) - n.start if video else 0):
                film[n.start + j].append(draw(last_obs["rgb"][j], names[now["stage"][j]], float(now["potential"][j]), bool(now["success"][j])))
        steps = torch.nn.functional.one_hot(stages, K + 1).sum(0)
        for i in range(min(N, num_episodes - len(rows))):
            rows.append({"seed": int(info["seed"][i]), "success_once": bool(once[i]), "success_at_end": bool(info["success"][i]),
                         "return": float(returns[i]), "episode_len": int(info["elapsed_steps"][i]), "furthest_stage": int(info["furthest_stage"][i]),
                         "stage_steps": steps[i].tolist(), **{name: float(values[i]) for name, values in reported.items() if once[i]}})  # fmt: skip
            films.append(film[i])
            read += [(stages[:, i], stage_logprobs[:, i], over[:, i])] if separator is not None else []
            progress.update()
    progress.close()
    envs.close()
    model.train(was_training)
    torch.set_num_threads(threads)
    if video:
        write_video(video, films[:16])
    return mean_rows(rows, K) | ({"separator": compare_separator(read, K)} if read else {})


def mean_rows(rows: list[dict], num_stages: int) -> dict:
    """What evaluate returns, from its rows."""
    names, furthest = ("success_once", "success_at_end", "return", "episode_len", "furthest_stage"), np.array([row["furthest_stage"] for row in rows])
    return {
        **{name: float(np.mean([row[name] for row in rows])) for name in names},
        "stage_reach_rate": [float((furthest > k).mean()) for k in range(num_stages)],
        "stage_steps": np.mean([row["stage_steps"][:num_stages] for row in rows], 0).tolist(),
        "episodes": rows,
    }


def result_table(results: list[dict]) -> str:
    """Text with a row per result: success with its interval, where the episodes are lost, and the paired difference to the row before."""
    if len({result["env_id"] for result in results}) > 1:
        raise UserError(f"these results are of different tasks: {', '.join(result['env_id'] for result in results)}")
    task = stare_utils.get_task(results[0]["env_id"])
    columns = " ".join(f"{name:>9s}" for name in task.stages)
    labels = [", ".join([result["method"], *[result.get("ood")] * (result.get("ood", "none") != "none"), *["other words"] * bool(result.get("instructions"))])
              for result in results]  # fmt: skip
    width = max(10, *map(len, labels))
    lines = [f"{'method':{width}s} {'success_once [95 %]':>22s} {'at_end':>7s}   {columns}   difference to the row above [95 %]"]
    for before, result, label in zip([None, *results], results, labels, strict=False):
        n = len(result["episodes"])
        low, high = wilson(result["success_once"] * n, n)
        funnel = [rate / last if last else math.nan for last, rate in zip([1, *result["stage_reach_rate"]], result["stage_reach_rate"], strict=False)]
        line = f"{label:{width}s} {100 * result['success_once']:6.1f} % [{100 * low:4.1f}, {100 * high:5.1f}] {100 * result['success_at_end']:5.1f} %   "
        line += " ".join(f"{100 * p:7.1f} %" for p in funnel)
        if before:
            line += "   {difference:+.3f} [{low:+.3f}, {high:+.3f}], {num_episodes} pairs".format(**paired_difference(before["episodes"], result["episodes"]))
        lines.append(line)
        for name in task.report:
            values = [row[name] for row in result["episodes"] if row["success_once"]]
            lines.append(f"{'':{width}s} {name} at success: median {np.median(values or math.nan):.3f}, largest {np.max(values, initial=0):.3f}")
    n = ", ".join(str(len(result["episodes"])) for result in results)
    lines.append(f"{task.instruction!r}: {n} greedy episodes; a stage's column is P(stage completed | stage before completed)")
    return "\n".join(lines)


def read_results(path: str) -> dict:
    """A results.json of this script. Raises UserError on anything else."""
    try:
        result = json.loads(Path(path).read_text())
        _ = [result[name] for name in ("method", "env_id", "success_once", "success_at_end", "stage_reach_rate")]  # what the comparison reads
        _ = [(row["seed"], row["success_once"]) for row in result["episodes"]]
        return result
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"cannot read {path}: --compare takes results.json files written by eval.py") from None


def write_text(path: Path, text: str) -> None:
    """Writes beside the place and renames, so that no reader ever sees half a file."""
    path.with_name(path.name + ".tmp").write_text(text)
    path.with_name(path.name + ".tmp").replace(path)


def write_summary(run: Path, name: str, row: dict, trained: dict, table: str) -> None:
    """`summary.md` in a run's folder: the table, where the episodes are lost (stages.png), the curves of its TensorBoard files (curves.png), commands and
    versions. Further results of the run (name) have a summary of their own."""
    from matplotlib.figure import Figure  # a second of start-up, which training scripts do without
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    suffix, stages = name.removeprefix("results"), stare_utils.get_task(row["env_id"]).stages
    figure = Figure((6, 3), layout="constrained")
    figure.add_subplot(ylabel="episodes that completed it, %", ylim=(0, 100)).bar(stages, 100 * np.array(row["stage_reach_rate"]))
    figure.savefig(run / f"stages{suffix}.png")
    events = EventAccumulator(str(run)).Reload()
    shown = [key for key in CURVES if key in events.Tags()["scalars"]]
    if shown:
        figure = Figure((3 * len(shown), 2.4), layout="constrained")
        for axis, key in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
            axis.plot(*zip(*((event.step, event.value) for event in events.Scalars(key)), strict=True))
            axis.set_title(key, fontsize=9)
        figure.savefig(run / "curves.png")
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "mani_skill", "sapien", "numpy"))
    text = f"# {row['method']} on {row['env_id']}\n\n```\n{table}\n```\n\n![stages](stages{suffix}.png)\n\n" + "![curves](curves.png)\n\n" * bool(shown)
    text += f"Trained by `{trained.get('command', 'unknown')}` ({trained.get('env_steps')} env steps, {trained.get('wall_s')} s), evaluated by "
    text += f"`{row['command']}` at commit {row['commit'] or 'unknown'}. Python {sys.version.split()[0]}, {versions}. Every flag: checkpoint/args.json.\n"
    write_text(run / f"summary{suffix}.md", text)


def main(args: Args) -> None:
    if args.compare:
        return print(result_table([read_results(path) for path in args.compare]))
    if args.vla and not (args.env_id and args.output_dir):
        raise UserError("--vla needs --env-id, and --output-dir for the results")
    if not (args.vla or args.checkpoint):
        raise UserError("--checkpoint is missing: give the folder that sft.py, sta_tpo.py or sta_ppo.py wrote")
    stare_utils.check_args(asdict(args), {"num_eval_episodes": 1, "num_envs": 1})
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    model, processor, folder = load_policy(args.vla or args.checkpoint, device)
    ours = [key for key in model.config.norm_stats if key in stare_utils.TASKS]  # an OpenVLA's data sets stand there too
    env_ids = stare_utils.env_ids(args.env_id or ",".join(ours or model.config.norm_stats))
    texts = {}
    for env_id in env_ids:
        stare_utils.check_world(env_id, args.full_meshes)
        task_stats(model, env_id, args.unnorm_key)
        if args.ood == "camera" and not stare_utils.get_task(env_id).views:
            raise UserError(f"--ood camera: {env_id}'s camera cannot move, a photograph stands behind its scene; use position or lighting")
        texts[env_id] = (args.instruction,) if args.instruction else stare_utils.get_task(env_id).paraphrases if args.instruction_set == "paraphrase" else ()
        check_instructions(model, processor, texts[env_id])
    output = Path(args.output_dir or (folder.parent if folder.name == "checkpoint" else folder))
    output.mkdir(parents=True, exist_ok=True)
    trained = dict(json.loads((folder / "args.json").read_text())) if (folder / "args.json").exists() else {}
    commit = ""
    with contextlib.suppress(OSError):  # no git here
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    for env_id in env_ids:
        start = time.time()
        known = (folder / "separator.safetensors").exists() and env_id in trained.get("env_id", "").split(",")
        _, separator = known and vla.load_separator(folder, env_id, device) or (None, None)
        # each task, --ood and other words have files of their own
        words = ["own_words"] if args.instruction else ["other_words"] * bool(texts[env_id])
        kinds = [env_id] * (len(model.config.norm_stats) > 1) + [args.ood] * (args.ood != "none") + words
        name = "_".join(["results", *kinds])
        video = output / f"{name.replace('results', 'video')}.mp4" if args.capture_video else None
        result = evaluate(model, processor, env_id, args.num_eval_episodes, args.seed, args.num_envs, backend=args.backend,
                          full_meshes=args.full_meshes, ood=args.ood, instructions=texts[env_id], video=video, separator=separator)  # fmt: skip
        row = {"method": args.method or trained.get("method", ""), "env_id": env_id, "seed": trained.get("seed"), "num_episodes": len(result["episodes"]),
               "env_steps": trained.get("env_steps"), "wall_s": trained.get("wall_s"), "eval_wall_s": round(time.time() - start, 1), "ood": args.ood,
               "instructions": texts[env_id], "commit": commit, "command": " ".join(["python", *sys.argv])}  # fmt: skip
        print(table := result_table([{**row, **result}]))
        write_summary(output, name, {**row, **result}, trained, table)
        write_text(output / f"{name}.json", json.dumps({**row, **result}))  # last: who finds it finds all
        if separator is not None:
            print("learned separator against the rules: causal {causal_accuracy:.3f}, Viterbi {viterbi_accuracy:.3f} of {num_steps} steps right; boundaries "
                  "{boundary_error:.2f} steps off, {boundary_missed:.3f} of them missed or made up".format(**result["separator"]))  # fmt: skip
        print(f"wrote {output / name}.json, {output / name.replace('results', 'summary')}.md" + (f" and {video}" if video else ""))


if __name__ == "__main__":
    with stare_utils.one_line_errors():
        main(tyro.cli(Args))
