"""Checkpoints: save, load, and notice damage. Formats: docs/data_format.md.

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

import json
import re
import shlex
import shutil
import sys
import tempfile
import zlib
from pathlib import Path

import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import vla
from plumbing import parallel
from plumbing.card import CARD_NAME, NOT_EVALUATED, model_card
from plumbing.strangers import check_files, load_processor, read_config
from world.tasks import UserError

Tensor = torch.Tensor
# The repository, which ships checkpoints.
ROOT = Path(__file__).parent.parent
# No policy has more policies before it.
LONGEST_CHAIN = 9
# Checksums read a file in blocks, because a model can have several gigabytes.
BLOCK_BYTES = 2**24
# A name that may be one of the hub's: owner/name.
HUB_ID = re.compile(r"[\w-]+/[\w.-]+")
ADVICE = "give the folder that a script here wrote, an OpenVLA's, or its hub id"


# ---- save and resume -----------------------------------------------------------------------------
def command_line() -> str:
    """The command of this script, quoted so that a shell takes it as it was given."""
    return shlex.join([*parallel.launcher(), *sys.argv])


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

    settings: what args.json records beside the command; with `env_id` there is a model card, too.
    state: the JSON part of the training state.
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
    # Every checkpoint tells how it was made.
    settings = {**settings, "script": state.get("script", ""), "command": command_line()}
    (new / "args.json").write_text(json.dumps(settings, indent=1))
    if "env_id" in settings:
        (new / CARD_NAME).write_text(model_card(settings, model.config, NOT_EVALUATED))
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


def read_settings(folder: Path) -> dict:
    """A checkpoint's args.json. Raises UserError where it is missing or damaged."""
    file = folder / "args.json"
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} is missing or damaged ({error})") from None


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
    if not current.exists():
        print(f"{current} is missing: going on from the one before")
        old.rename(current)
    elif damage(current) and not damage(old):
        kept = run / "checkpoint.damaged"
        print(f"{current} is damaged: going on from the one before. It is kept as {kept}")
        shutil.rmtree(kept, ignore_errors=True)
        current.rename(kept)
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
    except (OSError, SafetensorError) as error:
        return {"damaged": f"without a training state ({error})"}
    except (ValueError, KeyError, TypeError):
        return {"damaged": "without a training state (training_state.safetensors is another file)"}


# ---- integrity -----------------------------------------------------------------------------------
def checksums(folder: Path) -> dict[str, int]:
    """CRC-32 of each file in a folder, except checksums.json itself and the card.

    An evaluation writes the card again.
    """
    sums = {}
    for file in sorted(folder.iterdir()):
        if not file.is_file() or file.name in ("checksums.json", CARD_NAME):
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
    # Published models have no checksums.
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, TypeError):
        return "checksums.json"
    now = checksums(folder)
    return ", ".join(name for name in written if now.get(name) != written[name])


def check_folder(folder: Path, origin: str = "") -> None:
    """Raises ValueError where a folder cannot be loaded as a policy.

    It holds no whole model whose actions are tokens, or files that changed after they were written.
    Or its fingerprint is not `origin`, where that is given.
    """
    if not folder.is_dir():
        raise ValueError(missing_folder(folder))
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
    check_files(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"no checkpoint at that place (config.json is missing): {ADVICE}")


def missing_folder(folder: Path) -> str:
    """What to say of a folder that does not exist."""
    advice = ADVICE
    if HUB_ID.fullmatch(str(folder)) and folder.parent.exists():
        advice = (
            f"a hub id is looked up only where there is no folder {str(folder.parent)!r}, "
            "so start elsewhere to have the hub's model"
        )
    return f"no checkpoint at that place (no such folder, working directory {Path.cwd()}): {advice}"


# ---- find and load -------------------------------------------------------------------------------
def model_folder(name: str | Path) -> Path:
    """The folder that holds a model.

    name: that folder, a run's folder, or a hub id `owner/name` where there is no folder `owner`.
    A model of the hub is downloaded once. Raises UserError where the hub does not give it.
    A folder that does not exist is returned as it is.
    """
    folder = Path(name)
    if HUB_ID.fullmatch(str(name)) and not folder.parent.exists():
        wanted = ["*.json", "*.safetensors", "tokenizer.model"]
        # Parts of a model that is refused by their names must arrive as well.
        wanted += ["*head*", "*projector*", "*backbone*"]
        try:
            folder = Path(snapshot_download(name, allow_patterns=wanted))
        # The hub and every layer of the network below it raise errors of their own.
        except Exception as error:
            place = f"no such folder, working directory {Path.cwd()}"
            cause = hub_failure(name, error)
            raise UserError(
                f"{name} cannot be loaded: no checkpoint at that place ({place}), and {cause}"
            ) from None
    # A run's folder holds its model in checkpoint/.
    in_run = folder / "checkpoint"
    return in_run if in_run.is_dir() else folder


def hub_failure(name: str, error: Exception) -> str:
    """Why the hub did not give a model, and what to do about it."""
    if isinstance(error, GatedRepoError):
        page = f"https://huggingface.co/{name}"
        return f"the hub's model is gated: accept its terms at {page}, then `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return (
            "the hub has no such model, or a private one: check its name, "
            "or log in with `hf auth login`"
        )
    cache = Path(constants.HF_HUB_CACHE)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cache).close()
    except OSError as refusal:
        reason = refusal.strerror
        return f"the hub's cache {cache} cannot be written ({reason}): set HF_HOME to another place"
    if constants.HF_HUB_OFFLINE:
        return (
            f"HF_HUB_OFFLINE is set and the cache {cache} does not hold the model: "
            "unset it, or give the folder of a copy"
        )
    # Without a network the hub looks for a copy in its cache.
    if isinstance(error, (LocalEntryNotFoundError, ConnectionError, TimeoutError)):
        return (
            "the hub is out of reach: check the network, "
            "or download the model elsewhere and give its folder"
        )
    reason = first_line(error)
    return f"the download from the hub failed ({reason}): give the command again"


def first_line(error: Exception) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def given_policy(checkpoint: str, vla_source: str) -> str:
    """The policy of --checkpoint or --vla, "" without either. Raises UserError for both."""
    if checkpoint and vla_source:
        raise UserError("--checkpoint and --vla name two policies: leave one of them out")
    return checkpoint or vla_source


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
        config, precision = read_config(folder)
        processor = load_processor(folder, config)
        model = vla.OpenVLAForActionPrediction.from_pretrained(
            folder, config=config, dtype=precision
        )
        model = model.to(device).eval()
    # A file may hold anything, so any error may come up.
    except Exception as error:
        raise UserError(f"{folder} cannot be loaded: {first_line(error)}") from None
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
            folder = model_folder(read_settings(folder)["checkpoint"])
        # Without a separator at the end of the chain this raises an error.
        weights = load_file(folder / "separator.safetensors", device=str(device))
        num_stages, width = weights["weight"].shape
        separator = nn.Linear(width, num_stages).to(device).requires_grad_(False)
        separator.load_state_dict(weights)
        # The SFT run may have been one of other tasks, whose stages are others.
        env_ids = read_settings(folder)["env_id"].split(",")
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
        UserError,
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
    dims = {name: len(stats["action"]["q01"]) for name, stats in known.items()}
    # Data sets of other robots may have other numbers of actions.
    names = [name for name in known if dims[name] == 7]
    if key not in names:
        size = f", which has {dims[key]} (two arms or another robot)" if key in dims else ""
        raise UserError(
            f"this checkpoint was trained with 7 actions on {', '.join(names) or 'no task'}, "
            f"not on {key}{size}; --unnorm-key takes one of those for a task"
        )
    stats = known[key]
    # A model without proprioception is a published one: its gripper may run from 0 to 1.
    if not model.config.proprio_dim:
        try:
            stats = vla.signed_gripper(stats)
        except ValueError as error:
            raise UserError(f"norm_stats[{key!r}]['action']: {error}") from None
    known[env_id] = stats
    return stats


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
