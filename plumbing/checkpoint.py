"""Checkpoints: save, load, find, and notice damage. Formats: docs/data_format.md.

A run's folder `output/checkpoint/` holds
- model.safetensors, config.json: the whole model, LoRA merged, with its tasks' statistics;
- processor_config.json, tokenizer.json, tokenizer_config.json: the processor;
- args.json: the settings of the run and its command;
- {name}.safetensors: each head that was trained beside the model ("separator", "value_head");
- training_state.safetensors: what --resume needs beside these (see `write_state`);
- checksums.json: CRC-32 of every file above.

How it is kept whole: a checkpoint is written as `checkpoint.new` and then renamed. The checkpoint
before it stays as `checkpoint.old`. A run that dies while it saves therefore keeps one that is
whole, and `recover` puts it back. A file that is cut short or changed does not match its checksum.
Nothing in a checkpoint is unpickled.
"""

import contextlib
import json
import os
import re
import shutil
import sys
import zlib
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

import vla
from world.tasks import UserError

Tensor = torch.Tensor
# The repository, which ships checkpoints.
ROOT = Path(__file__).parent.parent
# No policy has more policies before it.
LONGEST_CHAIN = 9
# Checksums read a file in blocks, because a model can have several gigabytes.
BLOCK_BYTES = 2**24


# ---- save and resume -----------------------------------------------------------------------------
def save_checkpoint(
    output: Path,
    model: vla.OpenVLAForActionPrediction,
    processor: vla.PrismaticProcessor,
    settings: dict,
    state: dict,
    optimizer: torch.optim.Optimizer | None = None,
    heads: dict[str, nn.Module] | None = None,
) -> None:
    """Writes output/checkpoint and keeps the one before as output/checkpoint.old.

    settings: what args.json records beside the command. state: the JSON part of the training state.
    heads: modules by name, one file each. The LoRA matrices are stored where settings has a
    lora_rank, because the written model has them merged.
    """
    new = output / "checkpoint.new"
    current = output / "checkpoint"
    old = output / "checkpoint.old"
    # A save that died may have left a part of a checkpoint.
    shutil.rmtree(new, ignore_errors=True)
    model.save_pretrained(new)
    processor.save_pretrained(new)
    command = " ".join(["python", *sys.argv])
    # Every checkpoint tells how it was made.
    args = json.dumps({**settings, "command": command}, indent=1)
    (new / "args.json").write_text(args)
    for name, head in (heads or {}).items():
        save_file(head.state_dict(), new / f"{name}.safetensors")
    moments = optimizer.state_dict()["state"] if optimizer else {}
    adapted = model if settings.get("lora_rank") else None
    # The training state comes last, because it adds the checksums of all files.
    write_state(new, state, moments, adapted)
    if current.exists():
        shutil.rmtree(old, ignore_errors=True)
        current.rename(old)
    new.rename(current)


def load_state(output: Path, script: str) -> dict | None:
    """The training state of output/checkpoint, as `read_state` returns it.

    None where there is no checkpoint. The caller holds the lock of the folder and has called
    `recover`. Raises UserError when the state is damaged, or of another script than `script`.
    """
    folder = output / "checkpoint"
    if not folder.exists():
        return None
    state = read_state(folder)
    # A state that cannot be read has no script either.
    if state.get("script") != script:
        found = state.get("damaged") or "of " + state.get("script", "another script")
        raise UserError(f"{folder} is {found}, not of {script}: choose another --output-dir")
    return state


def recover(run: Path) -> None:
    """Puts a run's checkpoint.old back where its checkpoint is missing or damaged."""
    current = run / "checkpoint"
    old = run / "checkpoint.old"
    if not old.exists():
        return
    # A run that died between the two renames of a save has no checkpoint.
    if not current.exists() or damage(current):
        print(f"{current} is missing or damaged: going on from the one before")
        shutil.rmtree(current, ignore_errors=True)
        old.rename(current)


def write_state(
    folder: Path,
    state: dict,
    moments: dict[int, dict[str, Tensor]],
    adapted: nn.Module | None,
) -> None:
    """Writes training_state.safetensors, then checksums.json of the whole folder.

    state: JSON, stored as metadata. moments: the optimiser's state by the number of the parameter.
    adapted: the model whose trainable (LoRA) parameters are stored too, or None.
    """
    tensors = {}
    for i, row in moments.items():
        for name, moment in row.items():
            tensors[f"moments/{i}/{name}"] = moment.contiguous()
    if adapted is not None:
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                # The number of a LoRA matrix is left empty, because its name is enough.
                tensors[f"adapter//{name}"] = parameter.detach().contiguous()
    metadata = {"state": json.dumps(state)}
    save_file(tensors, folder / "training_state.safetensors", metadata)
    (folder / "checksums.json").write_text(json.dumps(checksums(folder)))


def read_state(folder: Path) -> dict:
    """What `write_state` has written: the entries of `state`, and `moments` and `adapter`.

    moments: number of the parameter -> name -> tensor. adapter: name -> tensor.
    Returns {"damaged": why} where the checkpoint is damaged or has no training state.
    """
    try:
        damaged = damage(folder)
        if damaged:
            return {"damaged": f"damaged ({damaged})"}
        moments = {}
        adapter = {}
        with safe_open(folder / "training_state.safetensors", "pt") as file:
            state = json.loads(file.metadata()["state"])
            for key in file.keys():
                kind, i, name = key.split("/")
                if kind == "moments":
                    moments.setdefault(int(i), {})[name] = file.get_tensor(key)
                else:
                    adapter[name] = file.get_tensor(key)
        return {**state, "moments": moments, "adapter": adapter}
    # A shipped checkpoint has no training state, and a file may hold anything.
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        return {"damaged": f"without a training state ({error})"}


# ---- integrity -----------------------------------------------------------------------------------
def checksums(folder: Path) -> dict[str, int]:
    """CRC-32 of each file in a folder, except checksums.json itself."""
    sums = {}
    for file in sorted(folder.iterdir()):
        if not file.is_file() or file.name == "checksums.json":
            continue
        crc = 0
        with open(file, "rb") as content:
            block = content.read(BLOCK_BYTES)
            while block:
                crc = zlib.crc32(block, crc)
                block = content.read(BLOCK_BYTES)
        sums[file.name] = crc
    return sums


def fingerprint(folder: Path) -> str:
    """Tells a checkpoint from others that were at the same place.

    "" where it has no checksums, as in published models.
    """
    file = folder / "checksums.json"
    return f"{zlib.crc32(file.read_bytes()):08x}" if file.exists() else ""


def damage(folder: Path) -> str:
    """Names the files of a checkpoint that do not match its checksums.json.

    "" where all files match, or where there are no checksums.
    """
    try:
        written = dict(json.loads((folder / "checksums.json").read_text()))
    # Published and shipped checkpoints have no checksums.
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, TypeError):
        return "checksums.json"
    now = checksums(folder)
    return ", ".join(name for name in written if now.get(name) != written[name])


def check_folder(folder: Path, origin: str = "") -> None:
    """Raises ValueError where a folder cannot be loaded as a policy.

    It holds no model, a model of another kind, or files that changed after they were written. Or
    its fingerprint is not `origin`, where that is given.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(
            "no checkpoint at that place: give the folder that a script here wrote, "
            "an OpenVLA's, or its hub id (merge a LoRA adapter first)"
        )
    damaged = damage(folder)
    if damaged:
        raise ValueError(
            f"damaged: {damaged}; a run keeps the checkpoint before this one beside it, "
            "as checkpoint.old"
        )
    if origin and origin != fingerprint(folder):
        raise ValueError(
            "another policy is there now than the one from which this run started: "
            "put that one back, or choose another --output-dir"
        )
    config = dict(json.loads((folder / "config.json").read_text()))
    kind = config.get("model_type")
    if kind != "openvla":
        raise ValueError(
            f"this is a {kind!r} model; these scripts train model_type 'openvla' (see vla.py)"
        )
    # The statistics turn tokens into actions, and a config.json may have been edited by hand.
    norm_stats = config.get("norm_stats") or {}
    for name, stats in norm_stats.items():
        check_statistics(name, stats, config.get("proprio_dim"))


def check_statistics(name: str, stats: dict, proprio_dim: int | None) -> None:
    """Raises ValueError where statistics have lists of different lengths or no finite numbers."""
    action = stats["action"]
    lists = [action["q01"], action["q99"], action.get("mask", action["q01"])]
    fit = len({len(numbers) for numbers in lists}) == 1
    # Published data sets have proprioception that the model does not read.
    if proprio_dim and "proprio" in stats:
        proprio = [stats["proprio"]["mean"], stats["proprio"]["std"]]
        fit = fit and all(len(numbers) == proprio_dim for numbers in proprio)
        lists += proprio
    if not fit or not torch.tensor(sum(lists, [])).isfinite().all():
        raise ValueError(
            f"norm_stats of {name} in config.json: lists of different lengths, "
            "or numbers that are not finite"
        )


# ---- find and load -------------------------------------------------------------------------------
def find_checkpoint(env_id: str, scripts: tuple[str, ...]) -> str:
    """The newest checkpoint in runs/ of the first of `scripts` that was run on this env.

    If there is none, the one that the repository ships. Raises UserError if that is missing too.
    """
    for script in scripts:
        found = []
        for folder in Path("runs").glob(f"*__{script}__*/checkpoint"):
            # A run of several tasks has all of their names, with commas between them.
            env_ids = folder.parent.name.split("__")[0].split(",")
            if env_id in env_ids:
                found.append(folder)
        if found:
            return str(max(found, key=os.path.getmtime))
    shipped = ROOT / "checkpoints" / f"{env_id}__sft"
    if shipped.is_dir():
        return str(shipped)
    raise UserError(
        f"no checkpoint for {env_id}: run `python sft.py --env-id {env_id}` first, "
        "or give --checkpoint"
    )


def model_folder(name: str) -> Path:
    """The folder that holds a model.

    name: that folder, a run's folder, or a hub id `owner/name` where there is no folder `owner`.
    A model of the hub is downloaded once. Where the hub does not have it or is out of reach, the
    result is a folder that does not exist.
    """
    folder = Path(name)
    if not folder.parent.exists() and re.fullmatch(r"[\w-]+/[\w.-]+", name):
        wanted = ["*.json", "*.safetensors", "tokenizer.model"]
        # The hub and every layer of the network below it raise errors of their own.
        with contextlib.suppress(Exception):
            folder = Path(snapshot_download(name, allow_patterns=wanted))
    # A run's folder holds its model in checkpoint/.
    in_run = folder / "checkpoint"
    return in_run if in_run.is_dir() else folder


def load_policy(
    checkpoint: str,
    device: torch.device,
    origin: str = "",
) -> tuple[vla.OpenVLAForActionPrediction, vla.PrismaticProcessor, Path]:
    """Model in evaluation mode, processor and folder of a checkpoint.

    checkpoint: its folder, that of its run, or a hub id. origin: the fingerprint that it must have.
    Raises UserError when it cannot be loaded, or when its fingerprint is another one.
    """
    folder = model_folder(checkpoint)
    try:
        check_folder(folder, origin)
        model = AutoModelForImageTextToText.from_pretrained(folder)
        model = model.to(device).eval()
        processor = AutoProcessor.from_pretrained(folder)
    # A file may hold anything, so any error may come up.
    except Exception as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise UserError(f"{folder} cannot be loaded: {lines[0]}") from None
    return model, processor, folder


def load_separator(
    folder: Path,
    env_id: str,
    device: torch.device,
) -> tuple[Path, nn.Linear] | None:
    """The learned separator of a policy, found by following its checkpoints back to sft.py's.

    Returns that checkpoint's folder, and the linear map from the hidden state of its model (B, D)
    to the logits of the stages (B, most stages of its tasks). None where there is none for this
    task.
    """
    try:
        for _ in range(LONGEST_CHAIN):
            if (folder / "separator.safetensors").exists():
                break
            # Each args.json names the policy from which that run started.
            settings = json.loads((folder / "args.json").read_text())
            folder = model_folder(settings["checkpoint"])
        # Without a separator at the end of the chain this raises an error.
        weights = load_file(folder / "separator.safetensors", device=str(device))
        num_stages, width = weights["weight"].shape
        separator = nn.Linear(width, num_stages).to(device).requires_grad_(False)
        separator.load_state_dict(weights)
        # The SFT run may have been one of other tasks, whose stages are others.
        settings = json.loads((folder / "args.json").read_text())
        env_ids = settings["env_id"].split(",")
        return (folder, separator) if env_id in env_ids else None
    # A file on the way may be missing or hold anything.
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RuntimeError,
        SafetensorError,
    ):
        return None


def require_separator(
    folder: Path,
    env_id: str,
    device: torch.device,
) -> tuple[Path, nn.Linear]:
    """What `load_separator` returns. Raises UserError where there is none for this task."""
    learned = load_separator(folder, env_id, device)
    if learned is None:
        raise UserError(
            f"no learned separator of {env_id} behind this policy: "
            "sft.py trains one on demonstrations that it makes itself"
        )
    return learned


# ---- what a policy knows -------------------------------------------------------------------------
def task_stats(
    model: vla.OpenVLAForActionPrediction,
    env_id: str,
    unnorm_key: str = "",
) -> dict:
    """The statistics (`action`, `proprio`) with which a task's numbers are normalised.

    unnorm_key: the task takes over the statistics of this data set or other task. The model's
    configuration keeps them, so the next checkpoint knows the task. Raises UserError when the
    checkpoint was not trained on them, or on other actions than the 7 of every task here.
    """
    known = model.config.norm_stats
    key = unnorm_key or env_id
    # Data sets of other robots may have other numbers of actions.
    names = [name for name, stats in known.items() if len(stats["action"]["q01"]) == 7]
    if key not in names:
        raise UserError(
            f"this checkpoint was trained with 7 actions on {', '.join(names) or 'no task'}, "
            f"not on {key}; --unnorm-key takes one of those for a task"
        )
    if unnorm_key:
        stats = known[unnorm_key]
        # A model without proprioception is a published one: its gripper runs from 0 to 1.
        known[env_id] = stats if model.config.proprio_dim else vla.signed_gripper(stats)
    return known[env_id]


def check_instructions(
    model: vla.OpenVLAForActionPrediction,
    processor: vla.PrismaticProcessor,
    texts: list[str],
) -> None:
    """Raises UserError when an instruction leaves no room for the action tokens."""
    room = model.text_room()
    for text in texts:
        length = len(processor.prompt_ids(text))
        if length > room:
            raise UserError(
                f"the instruction {text[:40]!r}... has {length} tokens, "
                f"the model has room for {room}: shorten it"
            )
