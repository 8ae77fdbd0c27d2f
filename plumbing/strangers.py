"""The files of a model that somebody else wrote: config.json, weights, statistics, processor.

Each file may hold anything. What is unknown or does not fit is refused with a ValueError that
names the file and the field. No pickle is opened, and no code beside a model is run.
"""

import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoProcessor

import vla

# Parts of a continuous action head beside a model, such as action_head--150000_checkpoint.pt.
HEAD = re.compile("head|projector|backbone|diffusion|film", re.IGNORECASE)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# The precisions of safetensors in which models are loaded.
PRECISIONS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# No number of any statistics is larger.
LARGEST_NUMBER = 1e6
# Llama-2's sizes, which the published config.json leaves out.
LLAMA_SIZES = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
}
# Fields with one value that is computed here. They may be missing.
LLAMA_FIXED = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "rope_scaling": None,
}
TOP_FIXED = {"tie_word_embeddings": False}
# Another number of bins or of padding would make other tokens the actions.
PUBLISHED_FIXED = {
    "use_fused_vision_backbone": True,
    "image_resize_strategy": "resize-naive",
    "timm_override_act_layers": [None, None],
    "pad_to_multiple_of": 64,
    "n_action_bins": 256,
}
# The largest size that a field may have.
LARGEST_SIZE = 2**20


# ---- the folder's files ----
def read_object(file: Path) -> dict:
    """The object in a JSON file. Raises ValueError, which names the file, where there is none."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file.name} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} is not a JSON object")
    return content


def check_files(folder: Path) -> None:
    """Raises ValueError where a continuous head or an adapter stands beside the model."""
    for file in sorted(folder.iterdir()):
        name = file.name
        weights = file.suffix in (".safetensors", *PICKLES)
        # The heads of these scripts and value functions give no actions.
        if weights and HEAD.search(name) and "value" not in name and name != "heads.safetensors":
            raise ValueError(
                f"{name} belongs to a model with a continuous action head (OpenVLA-OFT), "
                "these scripts read models whose actions are tokens"
            )
        if name.startswith("adapter_"):
            raise ValueError(
                f"{name} belongs to a LoRA adapter: merge it with peft, PeftModel.from_pretrained("
                "BASE, ADAPTER).merge_and_unload().save_pretrained(NEW), see docs/platforms.md; "
                "if the model beside it is merged, remove the adapter_* files"
            )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files from which a model's weights are read.

    Raises ValueError where there are none, because no pickle is opened here.
    """
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        pickled = [file.name for file in sorted(folder.iterdir()) if file.suffix in PICKLES]
        if pickled:
            raise ValueError(
                f"{pickled[0]} is a pickle, which can run code, so it is not opened: write "
                "model.safetensors with safetensors.torch.save_file, see docs/platforms.md"
            )
        raise ValueError(
            "model.safetensors is missing: copy all model*.safetensors again "
            "(no .bin is read, see docs/platforms.md)"
        )
    content = read_object(index)
    for name in ("metadata", "weight_map"):
        if not isinstance(content.get(name), dict):
            raise ValueError(f"{index.name}: {name} is missing or no object: copy it again")
    files = []
    for name in sorted({str(name) for name in content["weight_map"].values()}):
        # A name with a slash would lead out of the folder.
        if "/" in name or not (folder / name).is_file():
            raise ValueError(f"{name!r:.80} of {index.name} is missing: copy it again")
        files.append(folder / name)
    return files


def read_shapes(folder: Path) -> tuple[dict[str, list[int]], dict[str, torch.dtype]]:
    """Shape and precision of each weight in a folder, by its name.

    Only the headers of the files are read. Raises ValueError where a file is damaged or quantised.
    """
    shapes = {}
    precisions = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():
                    weight = tensors.get_slice(name)
                    shapes[name] = list(weight.get_shape())
                    precisions[name] = weight.get_dtype()
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file.name} is damaged: {error}") from None
    for name, precision in precisions.items():
        if precision not in PRECISIONS:
            raise ValueError(
                f"{name} has numbers of type {precision}, not {', '.join(PRECISIONS)}: "
                "these scripts read no quantised models"
            )
        precisions[name] = PRECISIONS[precision]
    return shapes, precisions


# ---- config.json ----
def read_config(folder: Path) -> tuple[vla.OpenVLAConfig, torch.dtype]:
    """The configuration of the model in a folder, and the precision of its weights.

    Raises ValueError, which names the field, where a file says what cannot be.
    """
    fields = read_object(folder / "config.json")
    kind = fields.get("model_type")
    if kind != "openvla":
        raise ValueError(
            f"config.json: model_type is {kind!r:.40}; these scripts train 'openvla' (see vla.py)"
        )
    shapes, precisions = read_shapes(folder)
    config = parse_config(fields, shapes)
    config.norm_stats = read_statistics(folder, fields, config.proprio_dim)
    return config, precisions["language_model.lm_head.weight"]


def parse_config(fields: dict, shapes: dict[str, list[int]]) -> vla.OpenVLAConfig:
    """The configuration that config.json describes, with nothing that is unknown here.

    fields: the content of config.json. shapes: name -> shape of the weights beside it.
    transformers never sees the other fields: remote code, quantisation, names of other files.
    Raises ValueError where a field is missing, of another type, or unlike the weights. It names the
    field. No memory is allocated for the weights.
    """
    text = read_text(fields.get("text_config"), shapes)
    vision = read_vision(fields, shapes)
    check_fixed(fields, TOP_FIXED)
    n_bins = read_size(fields, "n_action_bins", 256, least=2)
    padding = read_size(fields, "pad_to_multiple_of", 64, least=0)
    if n_bins + padding > text["vocab_size"]:
        raise ValueError(
            f"config.json: n_action_bins {n_bins} and pad_to_multiple_of {padding} "
            f"are more than text_config.vocab_size {text['vocab_size']}"
        )
    config = vla.OpenVLAConfig(
        text,
        n_action_bins=n_bins,
        pad_to_multiple_of=padding,
        proprio_dim=read_size(fields, "proprio_dim", 0, least=0),
        **vision,
    )
    check_shapes(config, shapes)
    return config


def read_size(fields: dict, name: str, default: int | None, least: int = 1, where: str = "") -> int:
    """A whole number of config.json, or its default where it is missing or null."""
    value = fields.get(name)
    value = default if value is None else value
    if value is None:
        raise ValueError(f"config.json: {where}{name} is missing: copy the model's own config.json")
    # true and false are numbers in Python.
    if type(value) is not int or not least <= value <= LARGEST_SIZE:
        raise ValueError(
            f"config.json: {where}{name} is {value!r:.40}, "
            f"not a whole number from {least} to {LARGEST_SIZE}"
        )
    return value


def read_number(fields: dict, name: str, default: float, where: str) -> float:
    """A positive number of config.json, or its default where it is missing or null."""
    value = fields.get(name)
    value = default if value is None else value
    # No such number of a Llama is larger. The comparison is false for NaN.
    if type(value) not in (int, float) or not 0 < value <= 1e9:
        raise ValueError(f"config.json: {where}{name} is {value!r:.40}, not a positive number")
    return value


def check_fixed(fields: dict, fixed: dict, where: str = "") -> None:
    """Raises ValueError where a field has another value than the one that is computed here."""
    for name, only in fixed.items():
        value = fields.get(name)
        # 1 and true are equal in Python.
        if value is not None and (value != only or type(value) is not type(only)):
            raise ValueError(
                f"config.json: {where}{name} is {value!r:.60}, these scripts read {only!r} alone"
            )


def size_in(shapes: dict[str, list[int]], name: str, axis: int) -> int:
    """A size of a weight. Raises ValueError where the files do not hold the weight."""
    if len(shapes.get(name, [])) <= axis:
        raise ValueError(f"the weights hold no {name}: copy all model*.safetensors again")
    return shapes[name][axis]


def count_in(shapes: dict[str, list[int]], prefix: str) -> int:
    """How many layers the weights have whose names begin with `prefix`."""
    return len({name[len(prefix) :].split(".")[0] for name in shapes if name.startswith(prefix)})


def check_equal(name: str, value: int, found: int) -> None:
    """Raises ValueError where a field of config.json is not the size that the weights have."""
    if value != found:
        raise ValueError(
            f"config.json: {name} is {value} (given or by default), but its weights have {found}"
        )


def read_text(text, shapes: dict[str, list[int]]) -> dict:
    """The fields of text_config that shape the language model, for LlamaConfig."""
    where = "text_config."
    if not isinstance(text, dict):
        text = {}
    vocab_size = read_size(text, "vocab_size", None, where=where)
    check_fixed(text, LLAMA_FIXED, where)
    known = {"vocab_size": vocab_size}
    for name, default in LLAMA_SIZES.items():
        known[name] = read_size(text, name, default, where=where)
    layer = "language_model.model.layers."
    embedding = "language_model.model.embed_tokens.weight"
    found = {
        "vocab_size": size_in(shapes, embedding, 0),
        "hidden_size": size_in(shapes, embedding, 1),
        "intermediate_size": size_in(shapes, f"{layer}0.mlp.gate_proj.weight", 0),
        "num_hidden_layers": count_in(shapes, layer),
    }
    for name, size in found.items():
        check_equal(where + name, known[name], size)
    heads = known["num_attention_heads"]
    shared = read_size(text, "num_key_value_heads", heads, where=where)
    width = read_size(text, "head_dim", known["hidden_size"] // heads, where=where)
    # The rotation turns pairs of channels.
    if known["hidden_size"] % heads or heads % shared or width % 2:
        raise ValueError(
            f"config.json: text_config.num_attention_heads is {heads}, "
            f"which does not go with hidden_size {known['hidden_size']}, "
            f"num_key_value_heads {shared} and head_dim {width}"
        )
    known |= {"num_key_value_heads": shared, "head_dim": width}
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if text.get(name) is not None:
            known[name] = read_size(text, name, 0, least=0, where=where)
            if known[name] >= vocab_size:
                raise ValueError(f"config.json: {where}{name} is not below vocab_size {vocab_size}")
    known["rms_norm_eps"] = read_number(text, "rms_norm_eps", 1e-6, where)
    known["rope_parameters"] = read_rotation(text)
    return known


def read_rotation(text: dict) -> dict:
    """The rotary position embedding of text_config, as transformers 4 or 5 wrote it."""
    where = "text_config.rope_parameters."
    rotation = text.get("rope_parameters")
    if rotation is None:
        rotation = {}
    if not isinstance(rotation, dict):
        raise ValueError(f"config.json: {where[:-1]} is {rotation!r:.40}, not an object")
    # A scaled rotation has more fields.
    more = set(rotation) - {"rope_theta", "rope_type"}
    check_fixed(rotation, {"rope_type": "default", **dict.fromkeys(more)}, where)
    theta = read_number(text, "rope_theta", 10000.0, "text_config.")
    return {"rope_type": "default", "rope_theta": read_number(rotation, "rope_theta", theta, where)}


def read_vision(fields: dict, shapes: dict[str, list[int]]) -> dict:
    """The fields of config.json that shape the towers, for OpenVLAConfig."""
    sizes = read_sizes(fields, "image_sizes")
    if fields.get("vision_widths") is not None:
        widths = read_sizes(fields, "vision_widths")
        # The first convolution divides the side by 4, each of the others by 2. The groups are 8.
        stride = 4 * 2 ** (len(widths) - 1)
        if len(widths) > 8 or any(width % 8 for width in widths):
            raise ValueError(f"config.json: vision_widths is {widths!r:.60}, not multiples of 8")
        check_image_sizes(sizes, stride)
        return {"vision_widths": widths, "image_sizes": sizes}
    names = fields.get("timm_model_ids")
    if names != list(vla.TOWERS):
        raise ValueError(
            f"config.json: timm_model_ids is {names!r:.80}; these scripts read "
            f"two towers together, {' and '.join(vla.TOWERS)}"
        )
    check_fixed(fields, PUBLISHED_FIXED)
    overrides = fields.get("vit_overrides")
    if overrides is not None:
        check_overrides(overrides)
    for part, name in zip(("featurizer", "fused_featurizer"), names):
        tower = {**vla.TOWERS[name], **(overrides or {})}
        blocks = count_in(shapes, f"vision_backbone.{part}.blocks.")
        check_equal(f"the number of blocks of {name}", tower["blocks"], blocks)
        if tower["width"] % tower["heads"]:
            raise ValueError(
                "config.json: vit_overrides.width is no multiple of vit_overrides.heads"
            )
    check_image_sizes(sizes, tower["patch"])
    return {"timm_model_ids": names, "image_sizes": sizes, "vit_overrides": overrides}


def read_sizes(fields: dict, name: str) -> list[int]:
    """A list of whole numbers of config.json."""
    sizes = fields.get(name)
    if not isinstance(sizes, list) or not sizes:
        raise ValueError(f"config.json: {name} is {sizes!r:.40}, not a list of whole numbers")
    for i, size in enumerate(sizes):
        read_size({f"{name}[{i}]": size}, f"{name}[{i}]", None)
    return sizes


def check_image_sizes(sizes: list[int], patch: int) -> None:
    """Raises ValueError where images are not of one size, in whole patches, for two towers."""
    if len(sizes) != 2 or sizes[0] != sizes[1] or sizes[0] % patch:
        raise ValueError(
            f"config.json: image_sizes is {sizes!r:.60}, not twice the same multiple of {patch}"
        )


def check_overrides(overrides) -> None:
    """Raises ValueError where vit_overrides is no object of the sizes that it may have."""
    sizes = {"width", "blocks", "heads", "mlp"}
    if not isinstance(overrides, dict) or not overrides.keys() <= sizes:
        raise ValueError(
            f"config.json: vit_overrides is {overrides!r:.60}, not an object of {sorted(sizes)}"
        )
    for name in overrides:
        read_size(overrides, name, None, where="vit_overrides.")


def check_shapes(config: vla.OpenVLAConfig, shapes: dict[str, list[int]]) -> None:
    """Raises ValueError where the files do not hold the weights that the configuration needs."""
    # A model on this device has shapes, but no memory.
    with torch.device("meta"):
        model = vla.OpenVLAForActionPrediction(config)
    needed = {name: list(weight.shape) for name, weight in model.state_dict().items()}
    missing = sorted(needed.keys() - shapes.keys())
    if missing:
        raise ValueError(
            f"{len(missing)} weights are missing, {missing[0]} for example: "
            "copy all model*.safetensors again"
        )
    for name, shape in needed.items():
        if shapes[name] != shape:
            raise ValueError(f"{name} has the shape {shapes[name]}, by config.json {shape}")
    unused = "|".join(vla.OpenVLAForActionPrediction._keys_to_ignore_on_load_unexpected)
    strange = [name for name in sorted(shapes.keys() - needed) if not re.search(unused, name)]
    if strange:
        raise ValueError(
            f"{len(strange)} weights are of another model, {strange[0]} for example: "
            "these scripts read OpenVLA's alone, with adapters merged"
        )


# ---- statistics ----
def read_statistics(folder: Path, fields: dict, proprio_dim: int) -> dict:
    """`norm_stats` of config.json (`fields`) and those of dataset_statistics.json beside it.

    Raises ValueError, which names the field, where they are no statistics.
    """
    norm_stats = fields.get("norm_stats")
    sources = {"config.json: norm_stats": {} if norm_stats is None else norm_stats}
    beside = folder / "dataset_statistics.json"
    # Fine-tuning writes this file and leaves the base model's statistics in config.json.
    # Of two entries with one name it counts, as in OpenVLA's own evaluation.
    if beside.is_file():
        sources["dataset_statistics.json: "] = read_object(beside)
    known = {}
    for source, content in sources.items():
        if not isinstance(content, dict):
            raise ValueError(f"{source} is {content!r:.40}, not an object")
        for name, stats in content.items():
            known[name] = check_statistics(f"{source}[{name!r:.80}]", stats, proprio_dim)
    return known


def check_statistics(field: str, stats, proprio_dim: int) -> dict:
    """One entry of `norm_stats`, with a mask of bools. field: its name in messages.

    Raises ValueError where a list is missing, or not of finite numbers, or of another length, or
    where q01 is above q99. Of proprioception only what the model reads is checked.
    """
    action = part(field, stats, "action")
    field_of = "{}['action']['{}']".format
    for name in ("q01", "q99"):
        if name not in action:
            raise ValueError(
                f"{field_of(field, name)} is missing: the policy's tokens are fractions "
                "of the range q01 to q99, which min and max do not replace"
            )
    q01 = numbers(field_of(field, "q01"), action.get("q01"))
    q99 = numbers(field_of(field, "q99"), action.get("q99"), len(q01))
    for i, (low, high) in enumerate(zip(q01, q99)):
        if low > high:
            raise ValueError(f"{field_of(field, 'q01')}[{i}] is {low}, above q99, which is {high}")
    flags = {"mask": [True] * len(q01)}
    for name in ("mask", "binary"):
        if action.get(name) is not None:
            given = numbers(field_of(field, name), action[name], len(q01), flags=True)
            flags[name] = [bool(flag) for flag in given]
    if any(flags.get("binary", [])[:-1]):
        raise ValueError(f"{field_of(field, 'binary')} is true for more than the gripper, the last")
    rest = {name: value for name, value in action.items() if name != "binary"}
    checked = {**stats, "action": {**rest, **flags}}
    if proprio_dim:
        proprio = part(field, stats, "proprio")
        numbers(f"{field}['proprio']['mean']", proprio.get("mean"), proprio_dim)
        std = numbers(f"{field}['proprio']['std']", proprio.get("std"), proprio_dim)
        if min(std) <= 0:
            raise ValueError(f"{field}['proprio']['std'] has {min(std)}, which cannot divide")
    return checked


def part(field: str, stats, name: str) -> dict:
    """The object `name` of statistics."""
    inside = stats.get(name) if isinstance(stats, dict) else None
    if not isinstance(inside, dict):
        raise ValueError(f"{field}['{name}'] is missing or no object")
    return inside


def numbers(field: str, given, length: int = 0, flags: bool = False) -> list:
    """A list of finite numbers, or of true and false. length: as many there must be, if not 0."""
    if not isinstance(given, list) or not given:
        raise ValueError(f"{field} is {given!r:.40}, not a list of numbers")
    kinds = (bool, int, float) if flags else (int, float)
    for i, number in enumerate(given):
        # The comparison is false for NaN.
        if type(number) not in kinds or not abs(number) <= LARGEST_NUMBER:
            raise ValueError(f"{field}[{i}] is {number!r:.40}, not a finite number")
        if flags and number not in (0, 1):
            raise ValueError(f"{field}[{i}] is {number!r:.40}, neither true nor false")
    if length and len(given) != length:
        raise ValueError(f"{field} has {len(given)} numbers, not {length}")
    return given


# ---- the processor ----
def load_processor(folder: Path, config: vla.OpenVLAConfig) -> vla.PrismaticProcessor:
    """The processor in a folder. Raises ValueError where it is not one for this model."""
    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        images = processor.image_processor
        towers = len(images.means)
        normalised = torch.tensor([images.means, images.stds]).isfinite().all()
        normalised = normalised and min(map(min, images.stds)) > 0
        tokens = [processor.tokenizer.bos_token_id, processor.tokenizer.pad_token_id]
        largest = max(*tokens, *processor.tokenizer.get_vocab().values())
    # Each library that reads these files raises errors of its own.
    except Exception:
        raise ValueError(
            "the processor's files are missing or damaged (preprocessor_config.json or "
            "processor_config.json, tokenizer.json, tokenizer_config.json): copy them again"
        ) from None
    size = config.image_sizes[0]
    expected = {
        "input_sizes": [[3, size, size]] * (1 if config.vision_widths else 2),
        "image_resize_strategy": "resize-naive",
        "tvf_do_letterbox": False,
    }
    for name, value in expected.items():
        found = getattr(images, name, value)
        if found != value:
            raise ValueError(
                f"the processor's {name} is {found!r:.60}, but the model takes {value!r}"
            )
    if towers != len(expected["input_sizes"]) or not normalised:
        raise ValueError("the processor's means and stds are not those of the model's towers")
    if largest >= config.text_config.vocab_size:
        raise ValueError(
            f"the tokenizer has token {largest}, which is not in the model's vocabulary"
        )
    return processor
