"""Imitation, step 1 of IPI: a VLA learns the demonstrations' actions as tokens.

    python sft.py --env-id PickCube-v1                        # makes demonstrations with the scripted expert, then trains
    python sft.py --env-id PickCube-v1 --demo-path demos.h5   # ManiSkill's own trajectory format, seen anew through our cameras
    python sft.py --env-id PickCube-v1,PushCube-v1            # one VLA for several tasks, told apart by their instructions

loss = -mean over samples of [ sum over active action tokens of log pi(token | image, proprioception, instruction, tokens before) ] / (active tokens)
       + c_aux * smooth L1 distance between a linear read-out of the hidden state and where object and goal are, and the turn that the tool lacks
Equations, choices, what differs from OpenVLA's recipe: docs/sft.md.
Letters: B batch, M frames, A action tokens, D hidden width.
"""
import json
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import stare_utils  # before torch: it makes idle OpenMP threads sleep  # isort: skip
import h5py
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from mani_skill.trajectory import utils as trajectory_utils
from safetensors.torch import load_file, save_file
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm, trange
from transformers import AutoModelForImageTextToText, AutoProcessor, set_seed

import vla
from eval import evaluate
from stare_utils import TASKS, TRAIN_SEEDS, ScriptedExpert, Stop, UserError, make_envs


@dataclass
class Args:
    seed: int = 1
    """seed of initialisation, data order and demonstrations"""
    cuda: bool = True
    """train on the GPU if there is one"""
    track: bool = False
    """log to Weights & Biases too (needs `pip install wandb`)"""
    output_dir: str = ""
    """run folder: checkpoint/, TensorBoard files, demonstrations; empty: runs/{env_id}__sft__{seed}__{time}"""
    resume: bool = False
    """go on from the checkpoint in --output-dir, if there is one"""

    vla: str = "tiny"
    """`tiny` (from scratch), a checkpoint folder, or an OpenVLA: its folder in the published layout, or its hub id"""
    env_id: str = "PickCube-v1"
    """task, or several with commas between them"""
    num_envs: int = 8
    """env processes (CPU) or parallel envs (GPU) that make demonstrations and evaluate"""
    backend: Literal["cpu", "cuda"] = "cpu"
    """physics: cpu (one process per env) or cuda (ManiSkill's GPU simulation)"""

    demo_path: str = ""
    """ManiSkill .h5 (its .json beside it), one per task with commas between; empty: the scripted expert makes `num_demos` demonstrations"""
    num_demos: int = 1000
    """demonstrations of each task that the expert makes, or the most that are read from --demo-path"""
    demo_speed: float = 0.4
    """the expert moves by at most this share of its largest step along each axis: demonstrations are slow, as people's are; 1 is the expert itself"""
    demo_noise: float = 0.1
    """deviation of the noise on the executed motion (shares of the largest step; every other step, at random); labels stay clean (DART, Laskey 2017)"""
    demo_slip: float = 0.02
    """chance per step that the expert plays a wrong stage for 3 to 8 steps (closes on air, drops the object); the label stays the right action"""
    demo_pause: float = 0.04
    """chance per step that the expert stands still for 2 to 6 steps, as people do. Pauses are labels too: imitation copies, reinforcement unlearns them"""
    demo_twist: int = 0
    """a demonstration begins with up to this many steps in which the tool turns to a random side: where its own pose tells how the object lies, nobody looks"""

    lora_rank: int = 0
    """0 trains all weights; else LoRA matrices of this rank on the linear layers (not the vocabulary's head), merged into what is written"""
    learning_rate: float = 1e-3
    """peak of the schedule: linear warm-up of 100 updates, then cosine to zero"""
    num_updates: int = 2500
    """optimiser steps; a few hundred learn nothing from scratch"""
    batch_size: int = 64
    """frames per optimiser step, of each process"""
    chunk_size: int = 128
    """steps or frames per forward and backward pass of an update: bounds its memory, changes no result"""
    gradient_checkpointing: bool = False
    """compute a layer's activations anew in the backward pass instead of keeping them: less memory, a third more computation"""
    max_grad_norm: float = 1.0
    """gradients are clipped to this norm"""

    label_jitter: float = 4.0
    """deviation, in bins, of noise on each target but the gripper's at every draw: a soft target over neighbouring bins, for a policy that explores"""
    aux_coef: float = 5.0
    """weight of the auxiliary loss: the hidden state also tells where things are and how they lie: the tiny model learns to see; 0: cross-entropy alone"""

    save_freq: int = 500
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


def load_policy(checkpoint: str, device: torch.device, origin: str = ""):
    """Model, processor and folder of a checkpoint (its folder, its run's, or a hub id). UserError: it is not ours, or no longer that of this fingerprint."""
    folder = vla.model_folder(checkpoint)
    try:
        vla.check_folder(folder, origin)
        return AutoModelForImageTextToText.from_pretrained(folder).to(device).eval(), AutoProcessor.from_pretrained(folder), folder
    except Exception as error:  # a file may hold anything
        raise UserError(f"{folder} cannot be loaded: {next(iter(str(error).splitlines()), type(error).__name__)}") from None


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


def check_instructions(model, processor, texts: list[str]) -> None:
    """Raises UserError when an instruction leaves no room for the action tokens in the model's context."""
    for text in texts:
        length, room = len(processor.prompt_ids(text)), model.text_room()
        if length > room:
            raise UserError(f"the instruction {text[:40]!r}... has {length} tokens, the model has room for {room}: shorten it")


def collect_demos(path: Path, env_id: str, args: Args, image_size: int) -> None:
    """Runs the scripted expert until `num_demos` episodes have succeeded and writes them as ManiSkill does: `traj_i` groups with
    `actions` (executed, T x A), `obs` (T + 1 rows) and `success`, plus `expert_actions` (T x A, the clean labels), `geometry` (T x 8) and `stage` (T)."""
    task = TASKS[env_id]
    horizon, limit = 2 * task.max_episode_steps, torch.tensor(task.arm.limit)  # who is slow and errs needs time
    envs = make_envs(env_id, args.num_envs, args.seed, backend=args.backend, max_episode_steps=horizon, image_size=image_size)
    expert, episodes, kept, failures = ScriptedExpert(envs), [[] for _ in range(args.num_envs)], [], 0
    rng, K = np.random.default_rng(args.seed), envs.num_stages
    slip, slip_left, pause_left, twist = (torch.zeros(args.num_envs, dtype=torch.long) for _ in range(4))
    obs, info = envs.reset(seed=[int(s) for s in rng.integers(TRAIN_SEEDS, size=args.num_envs)])
    progress = tqdm(total=args.num_demos, desc=f"{env_id} demonstrations", unit="episode", disable=None)
    with h5py.File(path.with_suffix(".tmp"), "w") as file:
        while len(kept) < args.num_demos:
            begin = torch.from_numpy(rng.random(args.num_envs) < args.demo_slip) & (slip_left == 0)
            slip[begin], slip_left[begin] = (torch.from_numpy(rng.integers(*span, args.num_envs))[begin] for span in ((1, K), (3, 9)))
            label, played = expert.act().cpu(), expert.act(slip * (slip_left > 0)).cpu()
            label[:, :3], played[:, :3] = (move[:, :3].clamp(-args.demo_speed * limit[:3], args.demo_speed * limit[:3]) for move in (label, played))
            noise = torch.from_numpy(rng.normal(0, args.demo_noise, label.shape)).float() * (torch.arange(len(limit)) < 3)  # a turned wrist it hardly mends
            twist = torch.where(info["elapsed_steps"].cpu() == 0, torch.from_numpy(rng.integers(-args.demo_twist, args.demo_twist + 1, args.num_envs)), twist)
            played[:, 5] = torch.where(info["elapsed_steps"].cpu() < twist.abs(), twist.sign() * limit[5], played[:, 5])
            action = (played + limit * noise * torch.from_numpy(rng.random((args.num_envs, 1)) < 0.5)).clamp(-limit, limit)
            begin = torch.from_numpy(rng.random(args.num_envs) < args.demo_pause) & (slip_left == 0) & (pause_left == 0)
            pause_left[begin] = torch.from_numpy(rng.integers(2, 7, args.num_envs))[begin]
            label[pause_left > 0, :-1] = 0
            action[pause_left > 0] = label[pause_left > 0]
            slip_left, pause_left = (slip_left - 1).clamp(min=0), (pause_left - 1).clamp(min=0)
            next_obs, _, _, _, next_info = envs.step(action)
            seen = [x.cpu() for x in (obs["rgb"], obs["proprio"], action, label, info["geometry"], info["stage"])]
            for i, ended in enumerate(next_info["_final_info"].tolist()):
                episodes[i].append([x[i] for x in seen])
                if ended:
                    if next_info["final_info"]["success"][i] and len(kept) < args.num_demos:
                        rgb, proprio, actions, labels, where, stage = (torch.stack(x).numpy() for x in zip(*episodes[i], strict=True))
                        group, final = file.create_group(f"traj_{len(kept)}"), next_info["final_obs"]
                        rgb, proprio = (np.concatenate([x, final[name][i][None].cpu()]) for x, name in ((rgb, "rgb"), (proprio, "proprio")))
                        group.create_dataset("obs/sensor_data/base_camera/rgb", data=rgb, compression="lzf")
                        group["obs/proprio"], group["success"] = proprio, np.arange(1, len(actions) + 1) == len(actions)
                        group["actions"], group["expert_actions"], group["geometry"], group["stage"] = actions, labels, where, stage
                        kept.append({"episode_id": len(kept), "episode_seed": int(info["seed"][i]), "control_mode": task.arm.control_mode,
                                     "elapsed_steps": len(actions), "success": True})  # fmt: skip
                        progress.update()
                    failures += not next_info["final_info"]["success"][i]
                    episodes[i], slip_left[i], pause_left[i] = [], 0, 0
            if failures > 20 + 10 * len(kept):
                envs.close()
                raise UserError(f"the expert failed in {failures} episodes and solved {len(kept)}: raise --demo-speed, lower --demo-noise or --demo-slip")
            obs, info = next_obs, next_info
    progress.close()
    envs.close()
    meta = {"env_info": {"env_id": env_id, "max_episode_steps": horizon}, "source_type": "scripted", "episodes": kept}
    path.with_suffix(".json").write_text(json.dumps(meta))
    path.with_suffix(".tmp").rename(path)


def read_demos(path: Path, env_id: str, num_demos: int, image_size: int = stare_utils.IMAGE_SIZE) -> tuple[torch.Tensor, ...]:
    """Frames (M, H, W, 3) uint8, proprioception (M, 8), actions (M, A), geometry (M, 8) and stage labels (M,) of the first `num_demos` successful episodes
    of a ManiSkill .h5. Episodes that sft.py did not record are put back into the simulator state by state and seen through our camera; their stage is -1,
    unknown, for contact forces are not recorded. Raises UserError on a file of another env or control mode, or one that does not hold what it should."""
    mode, frames, env = TASKS[env_id].arm.control_mode, [], None
    try:
        meta = json.loads(path.with_suffix(".json").read_text())
        if meta["env_info"]["env_id"] != env_id:
            raise UserError(f"{path} holds {meta['env_info']['env_id']} demonstrations, not {env_id}")
        episodes = [episode for episode in meta["episodes"] if episode.get("success", True)][:num_demos]
        if not episodes:
            raise UserError(f"{path} holds no successful episode")
        with h5py.File(path) as file:
            for episode in tqdm(episodes, desc="read demonstrations", unit="episode", disable=None):
                group = file.get(f"traj_{episode['episode_id']}", {})
                if "actions" not in group:
                    raise UserError(f"{path} has no actions for episode {episode['episode_id']}: it is not a ManiSkill trajectory file")
                if episode.get("control_mode") != mode:
                    raise UserError(f"{path} has control mode {episode.get('control_mode')}, {env_id} needs {mode}: convert it with "
                                    f"`python -m mani_skill.trajectory.replay_trajectory --traj-path {path} -c {mode} --save-traj`")  # fmt: skip
                actions = group.get("expert_actions", group["actions"])[:]
                if "geometry" in group:
                    rgb, proprio, where = group["obs/sensor_data/base_camera/rgb"][:-1], group["obs/proprio"][:-1], group["geometry"][:]
                elif "env_states" in group:
                    env = env or stare_utils.StageEnv(env_id, 1, "cpu", 0, image_size=image_size)
                    env.reset(episode.get("episode_seed"))  # objects' sizes belong to the episode
                    states = trajectory_utils.dict_to_list_of_dicts(group["env_states"])[: len(actions)]
                    seen = [env.observe_state(state) for state in states]
                    rgb, proprio, where = (np.concatenate([obs[name] for obs in seen]) for name in ("rgb", "proprio", "geometry"))
                else:
                    raise UserError(f"{path} has neither images of our camera nor env_states: record it again with sft.py or with ManiSkill's RecordEpisode")
                stage = group["stage"][:].astype(np.int64) if "stage" in group else np.full(len(where), -1)
                stage[(stage < 0) | (stage >= len(TASKS[env_id].stages))] = -1  # some episodes begin in success, which is no stage
                T, numbers = len(actions), [(proprio, 8), (actions, len(TASKS[env_id].arm.limit)), (where, 8)]
                if (T == 0 or rgb.shape != (T, image_size, image_size, 3) or rgb.dtype != np.uint8 or stage.shape != (T,)
                        or any(x.shape != (T, width) or not np.isfinite(x).all() for x, width in numbers)):  # fmt: skip
                    raise UserError(f"{path} episode {episode['episode_id']}: wrong shapes, or numbers that are none: record it again for this policy")
                frames.append((rgb, proprio, actions, where, stage))
        horizon = TASKS[env_id].max_episode_steps
        if (late := sum(len(part[0]) > horizon for part in frames)) > 0.1 * len(frames):
            print(f"warning: {late} of {len(frames)} demonstrations of {env_id} take longer than its episodes of {horizon} steps: raise --demo-speed")
        return tuple(torch.from_numpy(np.concatenate(x)) for x in zip(*frames, strict=True))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise UserError(f"cannot read {path} with {path.with_suffix('.json').name} beside it: {type(error).__name__} {str(error).splitlines()[:1]}") from None


def action_stats(actions: torch.Tensor, env_id: str) -> dict:
    """The `action` entry of `norm_stats`: the largest actions of the task's expert, or the demonstrations', where these move at all, else the constant, so
    that reinforcement learning may leave the demonstrations' range; the percentiles of OpenVLA would clip it to what the expert did."""
    low, high, limit = actions.amin(0), actions.amax(0), torch.maximum(torch.tensor(TASKS[env_id].arm.limit), actions.abs().amax(0))
    constant, middle = high - low < 1e-3 * limit, (low + high) / 2
    return {"q01": torch.where(constant, middle, -limit).tolist(), "q99": torch.where(constant, middle, limit).tolist(), "mask": [True] * len(low)}


def main(args: Args) -> None:
    start = time.time()
    env_ids = stare_utils.env_ids(args.env_id)
    args.env_id, paths = ",".join(env_ids), [Path(path) for path in args.demo_path.split(",") if path]
    stare_utils.check_args(asdict(args), dict.fromkeys(("num_envs", "num_demos", "num_updates", "batch_size", "chunk_size", "save_freq"), 1))
    if paths and len(paths) != len(env_ids):
        raise UserError(f"--demo-path names {len(paths)} files for {len(env_ids)} tasks: give one for each, in the same order")
    rank, world, device = join_processes(args.cuda)
    set_seed(args.seed)
    for env_id in env_ids:
        stare_utils.check_world(env_id, backend="cpu" if paths else args.backend)  # what can be wrong with the input is found before the run folder is made
    state = load_state(Path(args.output_dir), "sft", rank) if args.resume and args.output_dir else None
    begun = {"lora_rank": 0, **json.loads((Path(args.output_dir) / "checkpoint" / "args.json").read_text())} if state else asdict(args)
    if other := [name for name in ("env_id", "lora_rank", "vla", "seed") if begun[name] != getattr(args, name)]:  # an adapter belongs to its base
        raise UserError(f"{args.output_dir} was begun with {other[0]} = {begun[other[0]]}, not {getattr(args, other[0])}: resume with the same")
    begin = args.output_dir if state and not args.lora_rank else args.vla  # LoRA goes on from the first policy and its adapter: a checkpoint is merged
    origin = state.get("origin", "") if state else vla.fingerprint(vla.model_folder(args.vla))
    if begin != "tiny":
        model, processor, _ = load_policy(begin, device, origin if begin == args.vla else "")
    else:
        model = vla.OpenVLAForActionPrediction(vla.tiny_config()).to(device)
        model.init_action_rows()
        processor = vla.tiny_processor([task.instruction for task in TASKS.values()])
    instructions = [TASKS[env_id].instruction for env_id in env_ids]
    check_instructions(model, processor, instructions)
    demos = [read_demos(path, env_id, args.num_demos, processor.image_size) for path, env_id in zip(paths, env_ids, strict=True)] if paths else []
    output, writer = open_run(args, "sft", rank, state["step"] if state else 0)
    for env_id in env_ids[len(demos) :]:
        if (file := output / f"demos_{env_id}.h5").exists():
            print(f"{file} is there: --num-demos and the other --demo flags are those that it was made with")
        elif rank == 0:
            collect_demos(file, env_id, args, processor.image_size)
        if world > 1:
            dist.barrier()  # the others wait
        demos.append(read_demos(file, env_id, args.num_demos, processor.image_size))
    rgb, proprio, actions, where, stages = (torch.cat(parts) for parts in zip(*demos, strict=True))
    which = torch.repeat_interleave(torch.arange(len(env_ids)), torch.tensor([len(part[0]) for part in demos]))  # (M,) task of each frame
    # A policy keeps the units it was trained in: those of its proprioception, and those of the actions of each task that it knows
    known, pooled = model.config.norm_stats, {"mean": proprio.mean(0).tolist(), "std": proprio.std(0).clamp(min=1e-3).tolist()}
    pooled = next((known[env_id]["proprio"] for env_id in known if model.config.proprio_dim and "proprio" in known[env_id]), pooled)
    stats = [known.get(env_id) or {"action": action_stats(part[2], env_id), "proprio": pooled} for env_id, part in zip(env_ids, demos, strict=True)]
    model.config.norm_stats = {**known, **dict(zip(env_ids, stats, strict=True))}
    bins = torch.cat([vla.tokenize_actions(part[2], s["action"], model.config.n_action_bins) for part, s in zip(demos, stats, strict=True)])
    actives = torch.stack([~vla.constant_dims(s["action"]) for s in stats])  # (tasks, A)
    labelled = [bool((part[4] >= 0).any()) for part in demos]
    del demos
    print(f"{len(rgb)} frames; action dimensions that vary:", *(row.nonzero()[:, 0].tolist() for row in actives), f"after {time.time() - start:.0f} s")
    width, K = model.config.text_config.hidden_size, max(len(TASKS[env_id].stages) for env_id in env_ids)
    # STARE: the learned separator reads the stage off the hidden state and teaches the policy nothing. With --learning-rate 0 it alone is trained
    heads = torch.nn.ModuleDict({"aux": torch.nn.Linear(width, where.shape[-1]), "separator": torch.nn.Linear(width, K)}).to(device)
    params = [*vla.prepare_training(model, args.lora_rank, args.gradient_checkpointing), *heads["aux"].parameters()]
    groups = [{"params": params, "lr": args.learning_rate}, {"params": heads["separator"].parameters(), "lr": 1e-3}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    step, history, time_update = 0, [], time.time()
    if state:
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state["moments"]})
        heads.load_state_dict(load_file(output / "checkpoint" / "heads.safetensors"))
        model.load_state_dict(state["adapter"], strict=False)
        step, history, start = state["step"], list(torch.tensor(state["history"], device=device)), start - state["wall_s"]

    model.train()
    progress = trange(args.num_updates, initial=step, desc="sft", unit="update", disable=rank > 0 or None)
    while Stop.hold(step < args.num_updates):
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)  # the step alone decides its batch: a resumed run sees the same data
        index = torch.randint(len(rgb), (world * args.batch_size,), generator=generator)
        mb_bins = vla.blur_bins(bins[index], args.label_jitter, model.config.n_action_bins, generator).to(device)
        mb_bins[:, -1] = bins[index, -1].to(device)  # the gripper knows a few commands and nothing between
        cosine = 0.5 * (1 + np.cos(np.pi * step / args.num_updates))
        optimizer.param_groups[0]["lr"] = args.learning_rate * min((step + 1) / 100, cosine)
        optimizer.zero_grad()
        rows = []
        for chunk, chunk_bins in zip(index[rank::world].split(args.chunk_size), mb_bins[rank::world].split(args.chunk_size), strict=True):
            active, texts = actives[which[chunk]].to(device), [instructions[i] for i in which[chunk]]  # (B, A), B
            inputs = processor(rgb[chunk], texts, proprio[chunk], stats[0].get("proprio"), device)
            logprob, _, hidden, greedy = action_logprob(model, inputs, chunk_bins, active)
            ce = -(logprob / active.sum(-1)).mean()  # cross-entropy per active token, nats
            aux_loss = F.smooth_l1_loss(heads["aux"](hidden.float()), where[chunk].to(device) / 0.1)  # in units of 10 cm
            stage_logits, mb_stages = heads["separator"](hidden.detach().float()), stages[chunk].to(device)
            stage_loss = F.cross_entropy(stage_logits, mb_stages, ignore_index=-1, reduction="sum") / len(chunk)
            share = len(chunk) / len(index)  # the gradients of all chunks and processes add up to that of the batch's mean
            (share * (ce + args.aux_coef * aux_loss + stage_loss)).backward()
            with torch.no_grad():
                error = (greedy - bins[chunk].to(device)).abs()
                l1 = 2 * error[active].float().mean() / (model.config.n_action_bins - 1)  # in units of the largest action
                right, stage_right = (error[active] == 0).float().mean(), (stage_logits.argmax(-1) == mb_stages).float().mean()
                rows.append(share * torch.stack([ce, aux_loss, right, l1, stage_right]))
        row = torch.stack(rows).sum(0)
        sum_over_processes([row, *(p.grad for group in optimizer.param_groups for p in group["params"])])
        grad_norm = torch.nn.utils.clip_grad_norm_(params, args.max_grad_norm)
        stare_utils.refuse_nan({"loss": row[0].item(), "gradient": grad_norm.item()}, output, {"rgb": rgb[index], "proprio": proprio[index], "bins": mb_bins})
        optimizer.step()
        step += 1
        history.append(torch.cat([row, grad_norm[None]]))
        progress.update()
        if step % 50 == 0 or step == args.num_updates:
            seconds, time_update = (time.time() - time_update) / min(len(history), step - (state["step"] if state else 0)), time.time()
            means, history = torch.stack(history).mean(0).tolist(), []  # since the last line
            names = ("losses/ce", "losses/aux", "losses/token_accuracy", "losses/action_l1", "losses/stage_accuracy", "losses/grad_norm")
            scalars = dict(zip(names, means, strict=True))
            scalars |= {"charts/learning_rate": optimizer.param_groups[0]["lr"], "charts/SPS": len(index) / seconds, "time/update": seconds,
                        "time/peak_gpu_gb": torch.cuda.max_memory_allocated() / 2**30}  # fmt: skip
            if step % 500 == 0:
                print(f"update {step}:", *(f"{name[7:]} {scalars[name]:.4g}" for name in names), f"after {time.time() - start:.0f} s", flush=True)
            for key, value in scalars.items() if rank == 0 else ():
                writer.add_scalar(key, value, step)
        if (Stop.asked() or step % args.save_freq == 0 or step == args.num_updates) and rank == 0:
            state = {"script": "sft", "step": step, "history": [row.tolist() for row in history], "origin": origin, "wall_s": time.time() - start}
            info = {**asdict(args), "method": "SFT", "env_steps": 0, "wall_s": round(state["wall_s"], 1)}
            known = {"heads": heads, **({"separator": heads["separator"]} if all(labelled) else {})}
            save_checkpoint(output, model, processor, info, state, optimizer, known)
    progress.close()
    if rank > 0:
        return
    for env_id in env_ids if args.num_eval_episodes else []:
        begin, result = time.time(), evaluate(model, processor, env_id, args.num_eval_episodes, args.seed, args.num_envs, backend=args.backend)
        scalars = {"time/eval": time.time() - begin} | {f"eval/{key}": value for key, value in result.items() if isinstance(value, float)}
        for key, value in scalars.items():
            writer.add_scalar(key + f"/{env_id}" * (len(env_ids) > 1), value, step)
        print(f"{env_id}: success_once {result['success_once']:.3f} over {len(result['episodes'])} episodes")
    writer.close()
    print(f"wrote {output / 'checkpoint'} after {time.time() - start:.0f} s")


if __name__ == "__main__":
    with stare_utils.one_line_errors():
        main(tyro.cli(Args))
