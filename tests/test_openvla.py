"""Folders in openvla-7b's published layout.

Their logits are those of the published code. The remote code that they name is not run. Parts that
are missing are noticed.
"""

import json
import zlib

import numpy as np
import pytest
import torch
from conftest import ROOT, call, frames, output_of, write_demos
from safetensors.torch import load_file, save_file
from test_policy import RAGGED, two_towers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import AutoModelForImageTextToText, AutoProcessor

import eval as evaluation
import sft
import sta_ppo
import sta_tpo
import vla
from plumbing import checkpoint
from plumbing.checkpoint import load_policy, task_stats
from world.tasks import UserError
from world.vector import make_envs

CPU = torch.device("cpu")
ALL = torch.tensor([True] * 7)
# What the published files say. The remote code that they name is not there.
PUBLISHED = {
    "config.json": {
        "architectures": ["OpenVLAForActionPrediction"],
        "model_type": "openvla",
        "auto_map": {
            "AutoConfig": "configuration_prismatic.OpenVLAConfig",
            "AutoModelForVision2Seq": "modeling_prismatic.OpenVLAForActionPrediction",
        },
    },
    "preprocessor_config.json": {
        "auto_map": {
            "AutoImageProcessor": "processing_prismatic.PrismaticImageProcessor",
            "AutoProcessor": "processing_prismatic.PrismaticProcessor",
        },
        "image_processor_type": "PrismaticImageProcessor",
        "processor_class": "PrismaticProcessor",
        "image_resize_strategy": "resize-naive",
        "interpolations": ["bicubic", "bicubic"],
        "tvf_do_letterbox": False,
        "use_fused_vision_backbone": True,
        "means": [[0.484375, 0.455078125, 0.40625], [0.5] * 3],
        "stds": [[0.228515625, 0.2236328125, 0.224609375], [0.5] * 3],
    },
    "tokenizer_config.json": {
        "auto_map": {"AutoProcessor": "processing_prismatic.PrismaticProcessor"},
        "processor_class": "PrismaticProcessor",
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<PAD>",
    },
}
# The statistics of one data set.
BRIDGE = {
    "action": {
        "q01": [-0.03] * 6 + [0.0],
        "q99": [0.03] * 6 + [1.0],
        "mask": [True] * 6 + [False],
    }
}


def llama_tokenizer() -> Tokenizer:
    """Llama's tokenizer in small.

    It has the same normaliser and the same fallback to bytes, letters instead of words, and the
    space where it stands in Llama's vocabulary.
    """
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 29871}
    vocab |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocab |= {letter: 300 + i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyzIO:?")}
    bpe = models.BPE(vocab, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    prepend, replace = normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([prepend, replace])
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(back)
    special = [AddedToken(token) for token in ("<unk>", "<s>", "</s>", "<PAD>")]
    tokenizer.add_special_tokens(special)
    return tokenizer


def write_published(folder, config: dict, image_size: int, weights: dict) -> None:
    """A folder in the published layout, with the weights in two files and an index."""
    own = {
        "config.json": config,
        "preprocessor_config.json": {"input_sizes": [[3, image_size, image_size]] * 2},
    }
    for name, content in PUBLISHED.items():
        (folder / name).write_text(json.dumps({**content, **own.get(name, {})}))
    llama_tokenizer().save(str(folder / "tokenizer.json"))
    place = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(weights)}
    for shard in set(place.values()):
        inside = {name: weights[name] for name in weights if place[name] == shard}
        save_file(inside, folder / shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": place}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture
def published(tmp_path):
    """The shrunken two towers as a published folder, and their model."""
    model, _ = two_towers()
    names = ("timm_model_ids", "image_sizes", "vit_overrides")
    small = {name: getattr(model.config, name) for name in names}
    text = dict(
        vocab_size=32064,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = vla.OpenVLAForActionPrediction(vla.OpenVLAConfig(text, **small)).eval()
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    # The published files hold weights that the model does not use.
    unused = {"vision_backbone.fused_featurizer.attn_pool.latent": torch.zeros(1, 1, 32)}
    config = {
        **small,
        "text_config": text,
        "norm_stats": {"bridge_orig": BRIDGE},
        "pad_to_multiple_of": 64,
        "n_action_bins": 256,
    }
    write_published(tmp_path, config, 28, {**weights, **unused})
    return tmp_path, model


# ---- loading ----
def test_a_published_folder_loads_without_its_remote_code(published):
    folder, written = published
    model, processor, _ = load_policy(str(folder), CPU)
    loaded = model.state_dict()
    for name, value in written.state_dict().items():
        assert torch.equal(value, loaded[name]), name
    assert model.config.action_id_end == 32000
    assert list(model.config.norm_stats) == ["bridge_orig"]
    text = ["Put the carrot on plate", "push it"]
    inputs = processor(frames(2)["rgb"], text)
    ids = processor.tokenizer.convert_ids_to_tokens(processor.prompt_ids(text[0]))
    # The small tokenizer has no letter W, so it falls back to its byte.
    words = "▁In:▁What▁action▁should▁the▁robot▁take▁to▁put▁the▁carrot".replace("W", "<0x57>")
    assert "".join(ids).startswith(words)
    assert (inputs["input_ids"][:, 0] == 1).all() and (inputs["input_ids"][:, -1] == 29871).all()
    assert inputs["pixel_values"].shape == (2, 6, 28, 28)
    with torch.no_grad():
        bins, logprob, _ = sta_ppo.sample_action(model, inputs, ALL)
        again, *_ = sta_ppo.action_logprob(model, inputs, bins, ALL)
    assert torch.allclose(again, logprob, atol=1e-4)


def test_ragged_instructions_have_the_log_probabilities_of_one_alone():
    model, processor = two_towers()
    bins = torch.randint(0, 256, (4, 7), generator=torch.Generator().manual_seed(0))
    rgb = frames(4)["rgb"]
    model = model.double()

    def logprob(rows: slice) -> torch.Tensor:
        inputs = dict(processor(rgb[rows], RAGGED[rows]))
        inputs["pixel_values"] = inputs["pixel_values"].double()
        return sta_ppo.action_logprob(model, inputs, bins[rows], ALL)[0]

    with torch.no_grad():
        together = logprob(slice(0, 4))
        alone = torch.cat([logprob(slice(i, i + 1)) for i in range(4)])
    assert (together - alone).abs().max() < 1e-5


@pytest.mark.parametrize("spoilt", ["shard", "tensor", "shape"])
def test_a_folder_with_missing_or_other_weights_is_refused(spoilt, published):
    folder, _ = published
    name = "projector.fc1.bias"
    shard = folder / "model-00002-of-00002.safetensors"
    if spoilt == "shard":
        shard.unlink()
    else:
        if name not in load_file(shard):
            shard = folder / "model-00001-of-00002.safetensors"
        weights = load_file(shard)
        del weights[name]
        if spoilt == "shape":
            weights[name] = torch.zeros(3)
        save_file(weights, shard, metadata={"format": "pt"})
    with pytest.raises(UserError, match="cannot be loaded") as error:
        load_policy(str(folder), CPU)
    assert "\n" not in str(error.value)


def test_weights_that_transformers_changed_after_loading_are_noticed(published, monkeypatch):
    folder, _ = published
    load = vla.PreTrainedModel.from_pretrained.__func__

    def spoil(cls, *args, **kwargs):
        model, info = load(cls, *args, **kwargs)
        model.projector.fc2.weight.data += 1e-3
        return model, info

    monkeypatch.setattr(vla.PreTrainedModel, "from_pretrained", classmethod(spoil))
    words = r"1 weights are not those of its files, projector\.fc2\.weight"
    with pytest.raises(ValueError, match=words):
        AutoModelForImageTextToText.from_pretrained(folder)


def test_the_gripper_of_openvla_s_data_opens_at_1_and_closes_at_0(published):
    model, _, _ = load_policy(str(published[0]), CPU)
    env_id = "PutCarrotOnPlateInScene-v1"
    stats = task_stats(model, env_id, "bridge_orig")
    # A checkpoint of this model knows the task.
    assert stats is model.config.norm_stats[env_id]
    assert not vla.constant_dims(stats["action"]).any()
    # The gripper as OpenVLA's data has it.
    unscaled = {"q01": [0] * 4, "q99": [1] * 4, "mask": [False] * 4}
    grippers = vla.tokenize_actions(torch.tensor([[0.0, 0.45, 0.55, 1.0]]), unscaled)[0]
    actions = vla.detokenize_actions(grippers[:, None].expand(4, 7), stats["action"])
    assert actions[:, -1].tolist() == [-1, -1, 1, 1] and len(actions[:, 0].unique()) > 2
    commands = torch.tensor([[0.0] * 6 + [-1.0], [0.0] * 6 + [1.0]])
    back = vla.tokenize_actions(commands, stats["action"])[:, -1]
    assert (back - grippers[[0, 3]]).abs().max() <= 1
    largest = vla.detokenize_actions(torch.tensor([[254] * 7]), stats["action"])[0, :6]
    assert torch.allclose(largest, torch.tensor(0.03), atol=3e-4)
    # Published statistics may have no mask. Their gripper is then scaled, and closes at 0 as well.
    no_mask = vla.signed_gripper({"action": {"q01": [0.0], "q99": [1.0]}})
    assert no_mask["action"]["binary"] == [True]
    # --unnorm-key may name statistics that were signed before.
    assert vla.signed_gripper(stats)["action"]["binary"] == stats["action"]["binary"]


# ---- the scripts ----
@pytest.mark.slow
def test_all_scripts_start_from_a_published_folder(published, tmp_path, monkeypatch):
    """On a Panda task, in bridge_orig's units and with images of the model's size.

    Nothing sensible is learned, but everything runs.
    """
    folder = published[0]
    sizes = []

    def record(*args, **kwargs):
        sizes.append(kwargs["image_size"])
        return make_envs(*args, **kwargs)

    for script in (evaluation, sta_ppo, sta_tpo):
        monkeypatch.setattr(script, "make_envs", record)
    task = ("--env-id", "PickCube-v1", "--no-cuda")
    common = ("--vla", folder, "--unnorm-key", "bridge_orig", *task, "--num-envs", 2)
    flags = (
        "--num-steps 5 --total-timesteps 10 --num-minibatches 1 --lora-rank 2 "
        "--num-eval-episodes 0 --output-dir"
    )
    call(sta_ppo, *common, *flags.split(), tmp_path / "ppo")
    # The two roll-outs both fail in reach.
    flags = "--num-initial-states 1 --rollouts-per-state 2 --output-dir"
    with pytest.raises(UserError, match="no pair"):
        call(sta_tpo, *common, *flags.split(), tmp_path / "tpo")
    flags = ("--num-eval-episodes", 1, "--num-envs", 1)
    call(evaluation, "--checkpoint", tmp_path / "ppo", *task, *flags)
    assert sizes == [28, 28, 28]
    demos = write_demos(tmp_path / "demos.h5", size=28)
    flags = "--num-updates 2 --batch-size 4 --num-eval-episodes 0 --output-dir"
    args = ("--vla", folder, *task, "--demo-path", demos)
    call(sft, *args, *flags.split(), tmp_path / "sft")
    config = json.loads((tmp_path / "sft/checkpoint/config.json").read_text())
    assert {"bridge_orig", "PickCube-v1"} == set(config["norm_stats"])


@pytest.mark.parametrize(
    ("words", "args"),
    [
        ("bridge_orig, not on bridge", ["--unnorm-key", "bridge"]),
        ("bridge_orig, not on PickCube-v1", []),
    ],
)
@pytest.mark.parametrize("script", [evaluation, sta_tpo, sta_ppo])
def test_statistics_that_are_not_there(script, words, args, published, tmp_path):
    flags = ("--env-id", "PickCube-v1", "--output-dir", tmp_path / "out", "--no-cuda")
    with pytest.raises(UserError, match=words) as error:
        call(script, "--vla", published[0], *flags, *args)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_model_that_the_hub_does_not_have(monkeypatch, tmp_path):
    def refuse(name, **kwargs):
        raise ConnectionError(name)

    monkeypatch.setattr(checkpoint, "snapshot_download", refuse)
    model = ("--vla", "nobody/nothing")
    words = "nobody/nothing cannot be loaded: no checkpoint at"
    with pytest.raises(UserError, match=words):
        call(evaluation, *model, "--env-id", "PickCube-v1", "--output-dir", tmp_path / "out")
    with pytest.raises(UserError, match="--vla needs --env-id"):
        call(evaluation, *model)


# ---- the published code ----
def weight_of(name: str, shape, seed: int) -> torch.Tensor:
    """A weight as a function of its name."""
    seed = (zlib.crc32(name.encode()) + seed) % 2**32
    x = np.random.RandomState(seed).randn(*shape).astype(np.float32)
    if name.endswith("scale_factor"):
        x = 0.5 + 0.1 * x
    elif "norm" in name and name.endswith("weight"):
        x = 1 + 0.1 * x
    else:
        x = 0.04 * x
    return torch.from_numpy(x).to(torch.bfloat16)


@pytest.mark.slow
def test_logits_are_those_of_openvlas_published_code(tmp_path):
    """Full-size towers and a Llama of two layers, where every weight is a function of its name.

    tests/openvla_golden.json holds what the published remote code computes with them
    (transformers 4.40.1, timm 0.9.16, fp32).
    """
    golden = json.loads((ROOT / "tests/openvla_golden.json").read_text())
    text = {
        "model_type": "llama",
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 32064,
        "pad_token_id": 32000,
        "torch_dtype": "bfloat16",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
    }
    config = {
        "timm_model_ids": list(vla.TOWERS),
        "image_sizes": [224, 224],
        "pad_to_multiple_of": 64,
        "torch_dtype": "bfloat16",
        "text_config": text,
    }
    with torch.device("meta"):
        empty = vla.OpenVLAForActionPrediction(vla.OpenVLAConfig(text, list(vla.TOWERS)))
    shapes = {name: value.shape for name, value in empty.state_dict().items()}
    weights = {name: weight_of(name, shapes[name], golden["seed"]) for name in shapes}
    write_published(tmp_path, config, 224, weights)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path).float().eval()
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert processor.image_processor.input_sizes == [[3, 224, 224]] * 2
    rng = np.random.RandomState(1000 + golden["seed"])
    words = rng.randint(300, 31000, (2, 12))
    ids = np.concatenate([np.full((2, 1), 1), words, np.full((2, 1), 29871)], 1)
    ids = torch.from_numpy(ids)
    pixels = torch.from_numpy(rng.randn(2, 6, 224, 224).astype(np.float32))
    with torch.no_grad():
        logits = model(ids, torch.ones_like(ids), pixels).logits
    assert list(logits.shape) == golden["shape"]
    found = {
        "last_position_action_logits": logits[:, -1, 31744:32000],
        "first_position_head": logits[:, 0, :16],
        "patch_position_head": logits[:, 200, :16],
    }
    for name, values in found.items():
        assert (values - torch.tensor(golden[name])).abs().max() < 1e-3, name


@pytest.mark.slow
def test_what_a_gpu_would_cost_is_measured_in_a_table_and_json(tmp_path):
    flags = "--size small --batch-sizes 2 3 --repeats 1"
    printed = output_of("benchmark/gpu_7b.py", *flags.split(), cwd=tmp_path)
    rows = json.loads((tmp_path / "gpu_7b.json").read_text())["rows"]
    assert [row["batch"] for row in rows] == [2, 3] and printed.count("\n| ") == 2
    for row in rows:
        total = row["env_share"] + row["model_share"] + row["rest_share"]
        assert total == pytest.approx(1) and row["ppo_steps_per_s"] > 0
        # The CPU computes in bfloat16 here.
        assert row["logprob_gap"] < 0.3
