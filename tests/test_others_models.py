"""Models of other people: folders in OpenVLA's layout that say what is not so.

Each is refused in one line that names the cause, or it is read rightly.
"""

import copy
import json
import math
import pickle
import types
from pathlib import Path

import httpx
import pytest
import torch
from conftest import ROOT, frames
from huggingface_hub import constants, errors
from huggingface_hub.utils import filter_repo_objects
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_fuzz import JUNK, memory_limit
from test_openvla import BRIDGE, write_published
from test_policy import two_towers
from transformers import AutoModelForImageTextToText

import vla
from plumbing import checkpoint
from plumbing.checkpoint import load_policy, load_separator, model_folder, task_stats
from world.tasks import UserError

CPU = torch.device("cpu")
ENV_ID = "PutCarrotOnPlateInScene-v1"
# What OpenVLA's fine-tuning writes into dataset_statistics.json.
CARROTS = {
    "action": {
        "mean": [0.0] * 7,
        "std": [1.0] * 7,
        "min": [-0.05] * 6 + [0.0],
        "max": [0.05] * 6 + [1.0],
        "q01": [-0.04] * 6 + [0.0],
        "q99": [0.04] * 6 + [1.0],
        "mask": [True] * 6 + [False],
    },
    "proprio": {"mean": [0.0] * 7, "std": [1.0] * 7},
    "num_transitions": 1234,
    "num_trajectories": 50,
}
# Fields of the published config.json, beside the sizes of the small model.
EXTRA = {
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "arch_specifier": "no-align+fused-gelu-mlp",
    "image_resize_strategy": "resize-naive",
    "timm_override_act_layers": [None, None],
    "use_fused_vision_backbone": True,
    "output_projector_states": False,
}
TEXT = {
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "vocab_size": 32064,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "pad_token_id": 32000,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
}
MODEL = {}


def make_folder(folder: Path, **changes) -> Path:
    """A small folder as people have it after fine-tuning. changes: to config.json."""
    tower, _ = two_towers()
    names = ("timm_model_ids", "image_sizes", "vit_overrides")
    small = {name: getattr(tower.config, name) for name in names}
    if not MODEL:
        torch.manual_seed(0)
        model = vla.OpenVLAForActionPrediction(vla.OpenVLAConfig(TEXT, **small))
        MODEL.update(model.state_dict())
    config = {
        **small,
        **EXTRA,
        "text_config": TEXT,
        "norm_stats": {"bridge_orig": BRIDGE},
        "pad_to_multiple_of": 64,
        "n_action_bins": 256,
        **changes,
    }
    write_published(folder, config, 28, {name: value for name, value in MODEL.items()})
    (folder / "dataset_statistics.json").write_text(json.dumps({"my_carrots": CARROTS}))
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder that loads."""
    return make_folder(tmp_path_factory.mktemp("good"))


@pytest.fixture
def good(made) -> Path:
    """The same folder for many tests. Every test gets its JSON files as they were."""
    before = {file: file.read_text() for file in made.glob("*.json")}
    yield made
    for file, text in before.items():
        file.write_text(text)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder of a test's own."""
    (tmp_path / "model").mkdir()
    return make_folder(tmp_path / "model")


@pytest.fixture
def unbuilt(monkeypatch):
    """Loading ends before the weights are read: the model is its configuration alone."""

    class Unbuilt:
        def __init__(self, config):
            self.config = config

        def to(self, device):
            return self

        def eval(self):
            return self

        @classmethod
        def from_pretrained(cls, folder, config, **kwargs):
            return cls(config)

    stand_in = types.SimpleNamespace(**vars(vla))
    stand_in.OpenVLAForActionPrediction = Unbuilt
    monkeypatch.setattr(checkpoint, "vla", stand_in)


def refusal(folder, unnorm_key: str = "my_carrots") -> str:
    """The line with which a folder is refused."""
    with pytest.raises(UserError) as error:
        model, _, _ = load_policy(str(folder), CPU)
        task_stats(model, ENV_ID, unnorm_key)
    check_line(str(error.value))
    return str(error.value)


def check_line(line: str) -> None:
    """One line in words, with nothing that only Python says."""
    assert "\n" not in line and len(line) < 700
    for word in ("KeyError", "NoneType", "zip()", "unpack", "attribute", "subscriptable", "iterab"):
        assert word not in line


def edit(folder: Path, name: str, change) -> None:
    """Applies `change` to the object in a JSON file."""
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


# ---- statistics ----
def test_statistics_beside_a_fine_tuned_model_are_read(folder):
    model, _, _ = load_policy(str(folder), CPU)
    assert list(model.config.norm_stats) == ["bridge_orig", "my_carrots"]
    stats = task_stats(model, ENV_ID, "my_carrots")
    largest = vla.detokenize_actions(torch.tensor([[254] * 7]), stats["action"])[0]
    assert largest[:6].tolist() == pytest.approx([0.04] * 6, rel=0.01) and largest[6] == 1
    # Those of another robot's proprioception are left out.
    assert list(stats) == ["action"]
    # A run saves the statistics with the model.
    model.save_pretrained(folder.parent / "saved")
    saved = json.loads((folder.parent / "saved/config.json").read_text())["norm_stats"]
    assert saved[ENV_ID] == stats and "my_carrots" in saved


def test_the_file_beside_counts_where_both_have_a_key(folder, unbuilt):
    (folder / "dataset_statistics.json").write_text(json.dumps({"bridge_orig": CARROTS}))
    model, _, _ = load_policy(str(folder), CPU)
    assert task_stats(model, ENV_ID, "bridge_orig")["action"]["q99"][0] == 0.04
    edit(folder, "config.json", lambda config: config.pop("norm_stats"))
    model, _, _ = load_policy(str(folder), CPU)
    assert task_stats(model, ENV_ID, "bridge_orig")["action"]["q99"][0] == 0.04


@pytest.mark.parametrize(
    ("low", "high", "mask", "expected"),
    [
        # The gripper's token has the value -1, -0.3, 0.3, 0.6 and 1.
        (0, 1, [True] * 6 + [False], [-1, -1, -1, 1, 1]),
        (0, 1, [1, 1, 1, 1, 1, 1, 0], [-1, -1, -1, 1, 1]),
        (-1, 1, [True] * 6 + [False], [-1, -1, -1, 1, 1]),
        (1, 1, [True] * 6 + [False], [-1, -1, -1, 1, 1]),
        (0, 1, [True] * 7, [-1, -1, 1, 1, 1]),
        (0, 1, None, [-1, -1, 1, 1, 1]),
        (0, 1, "missing", [-1, -1, 1, 1, 1]),
        (1, 1, None, [1, 1, 1, 1, 1]),
        (-1, 1, None, [-1, -0.3, 0.3, 0.6, 1]),
        (-1, -1, None, [-1] * 5),
        (0, 0.08, [True] * 7, "the gripper, last in q01 and q99, runs from 0.0 to 0.08"),
        (0, 0.08, [True] * 6 + [False], "neither from 0 (closed) to 1 (open) nor from -1 to 1"),
        (0, 255, None, "runs from 0.0 to 255.0"),
        (0, 0, None, "runs from 0.0 to 0.0"),
        (0, 1, [True] * 5 + [False] * 2, "only the gripper, the last, may be unscaled"),
        (0, 1, [True] * 6, "norm_stats['my_carrots']['action']['mask'] has 6 numbers, not 7"),
        (0, 1, "yes", "['action']['mask'] is 'yes', not a list of numbers"),
        (0, 1, [True] * 6 + [2], "['action']['mask'][6] is 2, neither true nor false"),
        (0, 1, [True] * 6 + ["no"], "['action']['mask'][6] is 'no'"),
    ],
)
def test_grippers_and_masks(low, high, mask, expected, good, unbuilt):
    action = {"q01": [-0.04] * 6 + [float(low)], "q99": [0.04] * 6 + [float(high)], "mask": mask}
    if mask == "missing":
        del action["mask"]
    carrots = {"my_carrots": {"action": action}}
    edit(good, "config.json", lambda config: config.update(norm_stats=carrots))
    (good / "dataset_statistics.json").unlink()
    if isinstance(expected, str):
        assert expected in refusal(good)
        return
    model, _, _ = load_policy(str(good), CPU)
    stats = task_stats(model, ENV_ID, "my_carrots")
    bins = torch.tensor([[0], [89], [165], [204], [254]]).expand(5, 7)
    commands = vla.detokenize_actions(bins, stats["action"])[:, -1]
    assert commands.tolist() == pytest.approx(expected, abs=0.01)
    # The same statistics may be taken over again.
    assert vla.signed_gripper(stats) == stats


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("q99", None, "['action']['q99'] is None, not a list of numbers"),
        ("q99", "missing", "['action']['q99'] is missing"),
        ("q99", "0.04", "['action']['q99'] is '0.04', not a list of numbers"),
        ("q99", [[0.04] * 7], "['action']['q99'][0] is [0.04, 0.04"),
        ("q99", ["0.04"] * 7, "['action']['q99'][0] is '0.04', not a finite number"),
        ("q99", [0.04] * 6 + [math.nan], "['action']['q99'][6] is nan, not a finite number"),
        ("q99", [math.inf] + [0.04] * 6, "['action']['q99'][0] is inf, not a finite number"),
        ("q99", [10**400] + [0.04] * 6, "['action']['q99'][0] is 1000"),
        ("q99", [0.04] * 6, "['action']['q99'] has 6 numbers, not 7"),
        ("q99", [-0.05] + [0.04] * 6, "['action']['q01'][0] is -0.04, above q99, which is -0.05"),
        ("q01", [True] * 7, "['action']['q01'][0] is True, not a finite number"),
        ("q01", {}, "['action']['q01'] is {}, not a list of numbers"),
    ],
)
def test_statistics_that_are_none(name, value, words, good, unbuilt):
    stats = copy.deepcopy(CARROTS)
    stats["action"][name] = value
    if value == "missing":
        del stats["action"][name]
    (good / "dataset_statistics.json").write_text(json.dumps({"my_carrots": stats}))
    assert f"dataset_statistics.json: ['my_carrots']{words}" in refusal(good)


def test_statistics_of_two_arms_and_of_other_forms(good, unbuilt):
    file = good / "dataset_statistics.json"
    aloha = {"action": {"q01": [-1.0] * 14, "q99": [1.0] * 14}}
    limits = {"action": {"min": [-0.05] * 7, "max": [0.05] * 7}}
    cases = (
        ({"my_carrots": aloha}, "not on my_carrots, which has 14 (two arms"),
        ({"my_carrots": limits}, "['action']['q01'] is missing: "),
        ({"my_carrots": {}}, "['my_carrots']['action'] is missing or no object"),
        ({"my_carrots": []}, "['my_carrots']['action'] is missing or no object"),
        ({"my_carrots": {"action": [1]}}, "['my_carrots']['action'] is missing or no object"),
        ([], "dataset_statistics.json is not a JSON object"),
        ({}, "trained with 7 actions on bridge_orig, not on my_carrots"),
    )
    for content, words in cases:
        file.write_text(json.dumps(content))
        assert words in refusal(good)
    file.write_text('{"my_carrots": {"action"')
    assert "dataset_statistics.json cannot be read: " in refusal(good)


# ---- what stands beside the model ----
@pytest.mark.parametrize(
    "name",
    [
        "action_head--150000_checkpoint.pt",
        "proprio_projector--150000_checkpoint.pt",
        "noisy_action_projector--5_checkpoint.pt",
        "vision_backbone--150000_checkpoint.pt",
        "action_head--latest_checkpoint.safetensors",
        "L1_Head.pth",
        "diffusion_model.ckpt",
    ],
)
def test_a_continuous_head_beside_the_model(name, good):
    (good / name).write_bytes(b"")
    line = refusal(good)
    (good / name).unlink()
    assert name in line and "continuous action head" in line


def test_what_training_leaves_beside_a_model_is_no_head(good, unbuilt):
    names = ("optimizer.pt", "rng_state.pth", "training_args.bin", "value_head.pt", "README.md")
    for name in names:
        (good / name).write_bytes(b"")
    assert load_policy(str(good), CPU)
    for name in names:
        (good / name).unlink()


def test_an_adapter_is_refused_until_it_is_merged_as_the_docs_say(folder, tmp_path, monkeypatch):
    model, processor, _ = load_policy(str(folder), CPU)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "fc1"]))
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    inputs = processor(frames(2)["rgb"], ["push it"] * 2)
    adapted = wrapped.base_model.model(**inputs).logits
    wrapped.save_pretrained(tmp_path / "ADAPTER")
    line = refusal(tmp_path / "ADAPTER")
    assert "adapter_config.json belongs to a LoRA adapter: merge it with peft" in line
    # A whole model in the same folder may be merged or not.
    beside = folder / "adapter_config.json"
    beside.write_text((tmp_path / "ADAPTER/adapter_config.json").read_text())
    assert "adapter_config.json belongs to a LoRA adapter" in refusal(folder)
    beside.unlink()
    folder.rename(tmp_path / "BASE")
    monkeypatch.chdir(tmp_path)
    exec(docs_code("merge_and_unload"), {})
    merged, _, _ = load_policy("NEW", CPU)
    assert torch.allclose(merged(**inputs).logits, adapted, atol=1e-3)


def docs_code(word: str) -> str:
    """The command in docs/platforms.md that holds a word."""
    blocks = (ROOT / "docs/platforms.md").read_text().split("```")
    (command,) = (block for block in blocks[1::2] if word in block)
    return command.split('"')[1]


class Touch:
    """What a pickle of this runs when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "x.ckpt", "x.pkl"]
)
def test_no_pickle_is_opened(name, folder, tmp_path):
    for file in folder.glob("model*"):
        file.unlink()
    assert "model.safetensors is missing" in refusal(folder)
    (folder / name).write_bytes(pickle.dumps(Touch(tmp_path / "opened")))
    index = {"metadata": {}, "weight_map": {key: name for key in MODEL}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    line = refusal(folder)
    assert f"{name} is a pickle" in line and "safetensors.torch.save_file" in line
    # Without these scripts, transformers refuses it as well.
    with pytest.raises(OSError, match="no file named"):
        AutoModelForImageTextToText.from_pretrained(folder)
    assert not (tmp_path / "opened").exists()


def test_weights_that_are_converted_as_the_docs_say_load(folder, monkeypatch):
    for file in folder.glob("model*"):
        file.unlink()
    names = sorted(MODEL)
    for i in range(2):
        part = {name: MODEL[name] for name in names[i::2]}
        torch.save(part, folder / f"pytorch_model-0000{i + 1}-of-00002.bin")
    monkeypatch.chdir(folder)
    exec(docs_code("weights_only"), {})
    model, _, _ = load_policy(str(folder), CPU)
    assert all(torch.equal(value, MODEL[name]) for name, value in model.state_dict().items())


# ---- config.json ----
@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("model_type", "prismatic", "model_type is 'prismatic'"),
        ("text_config", {}, "text_config.vocab_size is missing"),
        ("text_config", None, "text_config.vocab_size is missing"),
        ("text_config", "llama", "text_config.vocab_size is missing"),
        (
            "text_config.vocab_size",
            "32064",
            "text_config.vocab_size is '32064', not a whole number",
        ),
        ("text_config.vocab_size", 10**12, "text_config.vocab_size is 1000000000000, not a whole"),
        ("text_config.hidden_size", None, "hidden_size is 4096 (given or by default), but its wei"),
        ("text_config.intermediate_size", 128, "intermediate_size is 128 (given or by default)"),
        ("text_config.num_hidden_layers", 10**6, "num_hidden_layers is 1000000 (given or by def"),
        ("text_config.num_attention_heads", 3, "text_config.num_attention_heads is 3, which does"),
        ("text_config.num_key_value_heads", 2, "k_proj.weight has the shape [64, 64], by config"),
        ("text_config.pad_token_id", 32064, "text_config.pad_token_id is not below vocab_size"),
        ("text_config.hidden_act", "gelu", "text_config.hidden_act is 'gelu', these scripts read"),
        ("text_config.rms_norm_eps", math.nan, "text_config.rms_norm_eps is nan, not a positive"),
        ("text_config.rope_scaling", {"type": "linear"}, "text_config.rope_scaling is {'type'"),
        ("text_config.rope_parameters", [1], "text_config.rope_parameters is [1], not an object"),
        ("text_config.rope_parameters", {"factor": 2}, "rope_parameters.factor is 2"),
        ("text_config.tie_word_embeddings", True, "text_config.tie_word_embeddings is True"),
        ("timm_model_ids", [list(vla.TOWERS)[1]], "timm_model_ids is ['vit_so400m"),
        ("timm_model_ids", None, "timm_model_ids is None; these scripts read two towers"),
        ("use_fused_vision_backbone", False, "use_fused_vision_backbone is False"),
        ("image_resize_strategy", "letterbox", "image_resize_strategy is 'letterbox'"),
        ("timm_override_act_layers", ["quick_gelu", None], "timm_override_act_layers is ['quick"),
        ("vit_overrides", None, "the number of blocks of vit_large_patch14_reg4_dinov2"),
        ("vit_overrides.mlp", "64", "vit_overrides.mlp is '64', not a whole number"),
        ("image_sizes", [28], "image_sizes is [28], not twice the same multiple of 14"),
        ("image_sizes", [30, 30], "image_sizes is [30, 30], not twice the same multiple of 14"),
        ("image_sizes", [42, 42], "pos_embed has the shape [1, 4, 32], by config.json [1, 9, 32]"),
        ("image_sizes", 28, "image_sizes is 28, not a list"),
        ("vision_widths", [32, 64], "image_sizes is [28, 28], not twice the same multiple of 8"),
        ("vision_widths", [3], "vision_widths is [3], not multiples of 8"),
        ("proprio_dim", 8, "4 weights are missing, proprio_projector"),
        ("pad_to_multiple_of", 0, "pad_to_multiple_of is 0, these scripts read 64 alone"),
        ("n_action_bins", 255, "n_action_bins is 255, these scripts read 256 alone"),
        ("norm_stats", [], "norm_stats is [], not an object"),
        ("norm_stats", {"a": 5}, "norm_stats['a']['action'] is missing or no object"),
    ],
)
def test_a_field_of_config_json_is_named(name, value, words, good):
    config = json.loads((good / "config.json").read_text())
    *above, last = name.split(".")
    (config[above[0]] if above else config)[last] = value
    (good / "config.json").write_text(json.dumps(config))
    with memory_limit(2**29):
        line = refusal(good)
    assert "cannot be loaded: " in line and words in line


def test_fields_that_other_versions_write_change_nothing(good):
    plain, processor, _ = load_policy(str(good), CPU)

    def add(config):
        config.update(dtype="float32", some_new_field={"a": 1}, quantization_config={"bits": 4})
        config["text_config"].update(new_thing=True, rope_parameters={"rope_theta": 10000.0})

    edit(good, "config.json", add)
    model, _, _ = load_policy(str(good), CPU)
    inputs = processor(frames(2)["rgb"], ["push it"] * 2)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
    # The precision is that of the weights.
    assert model.dtype == torch.float32


# ---- weights ----
def test_weights_in_files_of_any_name_are_looked_at(folder):
    """The index names them. A shard that it does not name is no part of the model."""
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    old = content["weight_map"]["projector.fc1.weight"]
    weights = load_file(folder / old)
    (folder / old).rename(folder / "part-1.safetensors")
    for name, file in content["weight_map"].items():
        content["weight_map"][name] = "part-1.safetensors" if file == old else file
    index.write_text(json.dumps(content))
    load_policy(str(folder), CPU)
    weights["projector.fc1.weight"][0, 0] = torch.nan
    # It has the name that the shard had.
    save_file(weights, folder / old, metadata={"format": "pt"})
    load_policy(str(folder), CPU)
    save_file(weights, folder / "part-1.safetensors", metadata={"format": "pt"})
    assert "projector.fc1.weight in part-1.safetensors holds NaN" in refusal(folder)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        ("nan", r"projector.fc1.weight in model-0000\d-of-00002.safetensors holds NaN or infinite"),
        ("inf", r"projector.fc1.weight in model-0000\d-of-00002.safetensors holds NaN or infinite"),
        ("missing", "1 weights are missing, projector.fc1.weight for example"),
        ("strange", "1 weights are of another model, projector.fc1.weight.lora_A for example"),
        ("shape", r"projector.fc1.weight has the shape \[2\], by config.json \[256, 64\]"),
        ("int8", "projector.fc1.weight has numbers of type I8, not F32, BF16, F16"),
        ("short", r"model-0000\d-of-00002.safetensors is damaged: "),
        ("index", "model.safetensors.index.json: weight_map is missing or no object"),
        ("outside", r"'../x' of model.safetensors.index.json is missing"),
    ],
)
def test_weights_are_named(spoil, words, folder):
    name = "projector.fc1.weight"
    index = folder / "model.safetensors.index.json"
    file = folder / json.loads(index.read_text())["weight_map"][name]
    weights = load_file(file)
    spoilt = {
        "nan": {name: weights[name] + math.nan},
        "inf": {name: torch.full_like(weights[name], math.inf)},
        "strange": {f"{name}.lora_A": torch.zeros(2)},
        "shape": {name: torch.zeros(2)},
        "int8": {name: weights[name].to(torch.int8)},
    }
    weights.update(spoilt.get(spoil, {}))
    if spoil == "missing":
        del weights[name]
    save_file(weights, file, metadata={"format": "pt"})
    if spoil == "short":
        file.write_bytes(file.read_bytes()[:-7])
    if spoil == "index":
        index.write_text('{"metadata": {}}')
    if spoil == "outside":
        edit(folder, index.name, lambda content: content["weight_map"].update(a="../x"))
    with pytest.raises(UserError, match=words) as error:
        load_policy(str(folder), CPU)
    check_line(str(error.value))


def test_weights_in_half_precision_keep_it(folder):
    for file in folder.glob("model-*.safetensors"):
        half = {name: weight.bfloat16() for name, weight in load_file(file).items()}
        save_file(half, file, metadata={"format": "pt"})
    edit(folder, "config.json", lambda config: config.update(torch_dtype="float32"))
    model, _, _ = load_policy(str(folder), CPU)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


# ---- the processor ----
@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("image_resize_strategy", "letterbox", "image_resize_strategy is 'letterbox', but"),
        ("tvf_do_letterbox", True, "tvf_do_letterbox is True, but the model takes False"),
        ("input_sizes", [[3, 224, 224]] * 2, "input_sizes is [[3, 224, 224], [3, 224, 224]], but"),
        ("means", [[0.5] * 3], "the processor's files are missing or damaged"),
        ("means", [[math.nan] * 3] * 2, "means and stds are not those of the model's towers"),
        ("stds", [[0.0] * 3] * 2, "means and stds are not those of the model's towers"),
        ("stds", None, "the processor's files are missing or damaged"),
    ],
)
def test_a_processor_of_another_model(name, value, words, good, unbuilt):
    edit(good, "preprocessor_config.json", lambda config: config.update({name: value}))
    assert words in refusal(good)


def test_a_missing_tokenizer_is_named(folder, unbuilt):
    (folder / "tokenizer.json").unlink()
    assert "the processor's files are missing or damaged" in refusal(folder)


# ---- the hub ----
RESPONSE = httpx.Response(404, request=httpx.Request("GET", "https://huggingface.co/api/models/x"))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errors.GatedRepoError("no", response=RESPONSE), "gated: accept its terms at https://hugg"),
        (errors.RepositoryNotFoundError("no", response=RESPONSE), "the hub has no such model, or"),
        (errors.LocalEntryNotFoundError("no"), "the hub is out of reach: check the network"),
        (ConnectionError("no"), "the hub is out of reach: check the network"),
        (errors.HfHubHTTPError("500 Server Error\nmore", response=RESPONSE), "500 Server Error"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_why_the_hub_does_not_give_a_model(error, words, monkeypatch, tmp_path):
    def refuse(name, **kwargs):
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(checkpoint, "snapshot_download", refuse)
    line = refusal("nobody/nothing")
    assert words in line and f"no such folder, working directory {tmp_path})" in line


def test_a_hub_that_is_switched_off_and_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    # This is what the environment variable sets, and no network is used.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set and the cache" in refusal("nobody/nothing")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/proc/hf/hub")
    assert "the hub's cache /proc/hf/hub cannot be written" in refusal("nobody/nothing")


def test_a_folder_that_does_not_exist_or_hides_the_hub_s(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    line = refusal("owner/model")
    assert f"no such folder, working directory {tmp_path})" in line
    assert "a hub id is looked up only where there is no folder 'owner'" in line
    line = refusal("runs/PickCube-v1__sft__1__1/checkpoint")
    assert f"no such folder, working directory {tmp_path})" in line and "hub id is" not in line
    assert "(config.json is missing)" in refusal("owner")


def test_a_chain_of_checkpoints_that_ends_at_the_hub_has_no_separator(monkeypatch, tmp_path):
    def refuse(name, **kwargs):
        raise ConnectionError(name)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint, "snapshot_download", refuse)
    (tmp_path / "args.json").write_text('{"checkpoint": "nobody/nothing"}')
    assert load_separator(tmp_path, ENV_ID, CPU) is None


def test_what_the_hub_must_give(monkeypatch, tmp_path):
    """The parts by which a model of another kind is told arrive as well, and no pickled weights."""
    seen = {}

    def download(name, allow_patterns):
        seen["patterns"] = allow_patterns
        return tmp_path

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint, "snapshot_download", download)
    assert model_folder("owner/model") == tmp_path
    there = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.model"]
    there += ["dataset_statistics.json", "adapter_config.json", "action_head--1_checkpoint.pt"]
    there += ["proprio_projector--1_checkpoint.pt", "vision_backbone--1_checkpoint.pt"]
    names = [*there, "pytorch_model.bin", "optimizer.pt", "modeling_prismatic.py"]
    assert list(filter_repo_objects(names, allow_patterns=seen["patterns"])) == there


# ---- any damage ----
def places(content, path: tuple = ()) -> list[tuple]:
    """The paths of everything in a JSON value."""
    inside = []
    if isinstance(content, dict):
        inside = list(content)
    elif isinstance(content, list):
        inside = range(len(content))
    found = [path] if path else []
    for key in inside:
        found += places(content[key], (*path, key))
    return found


def nobody_notices(path: tuple, content: dict, gone: bool) -> bool:
    """Whether the value that is now at a path is as good as the one before, for all that is known.

    content: the damaged file. gone: the entry was taken out.
    """
    last = path[-1]
    above = content
    for key in path[:-1]:
        above = above[key]
    value = None if gone else above[last]
    # Constants of the computation and ids of tokens have no trace in the weights.
    if last in ("rms_norm_eps", "rope_theta"):
        return type(value) in (int, float) and 0 < value < 1e9
    if last in ("pad_token_id", "bos_token_id", "eos_token_id"):
        return value is None or type(value) is int
    # The small towers can have other heads, and the published ones have 16.
    if last == "heads":
        return value is None or type(value) is int
    # Data may have any range.
    if len(path) > 1 and path[-2] in ("q01", "q99") and type(value) in (int, float):
        action = content[path[0]]
        for key in path[1:-2]:
            action = action[key]
        return action["q01"][last] <= action["q99"][last] < 1e6
    # The gripper may be scaled or not. Without a mask it is.
    if last == "mask":
        return value is None
    return path[-2:] == ("mask", 6)


@st.composite
def damages(draw, content: dict):
    """A copy of a JSON object with one damage, which somebody can notice."""
    content = copy.deepcopy(content)
    path = draw(st.sampled_from(places(content)))
    above = content
    for key in path[:-1]:
        above = above[key]
    value = above[path[-1]]
    kinds = ["junk", "nan"]
    kinds += ["remove"] if isinstance(above, dict) else []
    kinds += ["shorten", "lengthen"] if isinstance(value, list) and value else []
    kinds += ["number"] * 2 if type(value) in (int, float) else []
    kind = draw(st.sampled_from(kinds))
    if kind == "remove":
        del above[path[-1]]
    elif kind == "shorten":
        value.pop()
    elif kind == "lengthen":
        value.append(draw(st.sampled_from([value[-1], None])))
    elif kind == "nan":
        above[path[-1]] = draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    elif kind == "number":
        factor = draw(st.sampled_from([-1, 0, 2, 10**6, 10**12]))
        above[path[-1]] = value * factor + draw(st.sampled_from([-1, 0, 1]))
    else:
        above[path[-1]] = draw(JUNK)
    assume(not nobody_notices(path, content, gone=kind == "remove"))
    return content


def known_by(folder: Path) -> tuple[dict, dict, dict]:
    """What a folder's files say of its model: its architecture, and two data sets' statistics."""
    model, _, _ = load_policy(str(folder), CPU)
    shape = model.config.to_dict()
    del shape["norm_stats"]
    # Everything that a policy uses of them.
    return shape, task_stats(model, ENV_ID, "bridge_orig"), task_stats(model, ENV_ID, "my_carrots")


@pytest.mark.parametrize("name", ["config.json", "dataset_statistics.json"])
def test_any_damage_is_noticed_or_changes_nothing(name, good, unbuilt):
    """Equal configurations and files of weights make equal models, so none is built."""
    before = (good / name).read_text()
    expected = known_by(good)
    refused = []

    @settings(max_examples=300)
    @given(damages(json.loads(before)))
    def check(content):
        (good / name).write_text(json.dumps(content))
        try:
            with memory_limit(2**29):
                assert known_by(good) == expected
        except UserError as error:
            check_line(str(error))
            refused.append(str(error))

    check()
    # Most damages are to fields that count.
    assert len(refused) > 50 and len(set(refused)) > 30
