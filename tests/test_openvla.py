"""Folders in openvla-7b's published layout: the published code's logits, names of remote code that are not run, parts that are missing."""
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
import stare_utils
import vla

PUBLISHED = {  # as the published files say; the remote code that they name is not there
    "config.json": {"architectures": ["OpenVLAForActionPrediction"], "model_type": "openvla",
                    "auto_map": {"AutoConfig": "configuration_prismatic.OpenVLAConfig",
                                 "AutoModelForVision2Seq": "modeling_prismatic.OpenVLAForActionPrediction"}},
    "preprocessor_config.json": {"auto_map": {"AutoImageProcessor": "processing_prismatic.PrismaticImageProcessor",
                                              "AutoProcessor": "processing_prismatic.PrismaticProcessor"},
                                 "image_processor_type": "PrismaticImageProcessor", "processor_class": "PrismaticProcessor",
                                 "image_resize_strategy": "resize-naive", "interpolations": ["bicubic", "bicubic"],
                                 "tvf_do_letterbox": False, "use_fused_vision_backbone": True,
                                 "means": [[0.484375, 0.455078125, 0.40625], [0.5] * 3], "stds": [[0.228515625, 0.2236328125, 0.224609375], [0.5] * 3]},
    "tokenizer_config.json": {"auto_map": {"AutoProcessor": "processing_prismatic.PrismaticProcessor"}, "processor_class": "PrismaticProcessor",
                              "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<PAD>"},
}  # fmt: skip


def llama_tokenizer() -> Tokenizer:
    """Llama's tokenizer in small: the same normaliser and fallback to bytes, letters instead of words, and the space where it stands in Llama's vocabulary."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}, "▁": 29871}
    vocab |= {letter: 300 + i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyzIO:?")}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token) for token in ("<unk>", "<s>", "</s>", "<PAD>")])
    return tokenizer


def write_published(folder, config: dict, image_size: int, weights: dict) -> None:
    """A folder in the published layout, its weights in two files with an index."""
    for name, content in PUBLISHED.items():
        more = {"config.json": config, "preprocessor_config.json": {"input_sizes": [[3, image_size, image_size]] * 2}}.get(name, {})
        (folder / name).write_text(json.dumps({**content, **more}))
    llama_tokenizer().save(str(folder / "tokenizer.json"))
    place = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(weights)}
    for shard in set(place.values()):
        save_file({name: weights[name] for name in weights if place[name] == shard}, folder / shard, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))


@pytest.fixture
def published(tmp_path):
    """The shrunken two towers as a published folder."""
    model, _ = two_towers()
    small = {name: getattr(model.config, name) for name in ("timm_model_ids", "image_sizes", "vit_overrides")}
    text = dict(vocab_size=32064, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, pad_token_id=0)
    stats = {"bridge_orig": {"action": {"q01": [-0.03] * 6 + [0.0], "q99": [0.03] * 6 + [1.0], "mask": [True] * 6 + [False]}}}
    torch.manual_seed(0)
    model = vla.OpenVLAForActionPrediction(vla.OpenVLAConfig(text, **small)).eval()
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    unused = {"vision_backbone.fused_featurizer.attn_pool.latent": torch.zeros(1, 1, 32)}
    write_published(tmp_path, {**small, "text_config": text, "norm_stats": stats, "pad_to_multiple_of": 64, "n_action_bins": 256}, 28, {**weights, **unused})
    return tmp_path, model


def test_a_published_folder_loads_without_its_remote_code(published):
    folder, written = published
    model, processor, _ = evaluation.load_policy(str(folder), torch.device("cpu"))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in written.state_dict().items())
    assert model.config.action_id_end == 32000 and list(model.config.norm_stats) == ["bridge_orig"]
    text = ["Put the carrot on plate", "push it"]
    inputs = processor(frames(2)["rgb"], text)
    ids = processor.tokenizer.convert_ids_to_tokens(processor.prompt_ids(text[0]))
    assert "".join(ids).startswith("▁In:▁What▁action▁should▁the▁robot▁take▁to▁put▁the▁carrot".replace("W", "<0x57>"))
    assert (inputs["input_ids"][:, 0] == 1).all() and (inputs["input_ids"][:, -1] == 29871).all() and inputs["pixel_values"].shape == (2, 6, 28, 28)
    with torch.no_grad():
        bins, logprob, _ = sta_ppo.sample_action(model, inputs, torch.tensor([True] * 7))
        assert torch.allclose(sta_ppo.action_logprob(model, inputs, bins, torch.tensor([True] * 7))[0], logprob, atol=1e-4)


def test_ragged_instructions_have_the_log_probabilities_of_one_alone():
    model, processor = two_towers()
    active, bins, rgb = torch.tensor([True] * 7), torch.randint(0, 256, (4, 7), generator=torch.Generator().manual_seed(0)), frames(4)["rgb"]
    model = model.double()
    double = lambda inputs: {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}  # noqa: E731
    with torch.no_grad():
        together = sta_ppo.action_logprob(model, double(processor(rgb, RAGGED)), bins, active)[0]
        alone = [sta_ppo.action_logprob(model, double(processor(rgb[i : i + 1], RAGGED[i : i + 1])), bins[i : i + 1], active)[0] for i in range(4)]
    assert (together - torch.cat(alone)).abs().max() < 1e-5


@pytest.mark.parametrize("spoilt", ["shard", "tensor", "shape"])
def test_a_folder_with_missing_or_other_weights_is_refused(spoilt, published):
    folder, _ = published
    shard = folder / "model-00002-of-00002.safetensors"
    if spoilt == "shard":
        shard.unlink()
    else:
        weights, name = load_file(shard), "projector.fc1.bias"
        weights = weights if name in weights else load_file(shard := folder / "model-00001-of-00002.safetensors")
        kept = {key: value for key, value in weights.items() if key != name} | ({name: torch.zeros(3)} if spoilt == "shape" else {})
        save_file(kept, shard, metadata={"format": "pt"})
    with pytest.raises(stare_utils.UserError, match="cannot be loaded") as error:
        evaluation.load_policy(str(folder), torch.device("cpu"))
    assert "\n" not in str(error.value)


def test_weights_that_transformers_changed_after_loading_are_noticed(published, monkeypatch):
    folder, _ = published
    load = vla.PreTrainedModel.from_pretrained.__func__

    def spoil(cls, *args, **kwargs):
        model, info = load(cls, *args, **kwargs)
        model.projector.fc2.weight.data += 1e-3
        return model, info

    monkeypatch.setattr(vla.PreTrainedModel, "from_pretrained", classmethod(spoil))
    with pytest.raises(ValueError, match=r"1 weights are not those of its files, projector\.fc2\.weight"):
        AutoModelForImageTextToText.from_pretrained(folder)


def test_the_gripper_of_openvla_s_data_opens_at_1_and_closes_at_0(published):
    model, _, _ = evaluation.load_policy(str(published[0]), torch.device("cpu"))
    stats = sta_ppo.task_stats(model, "PutCarrotOnPlateInScene-v1", "bridge_orig")
    assert stats is model.config.norm_stats["PutCarrotOnPlateInScene-v1"] and not vla.constant_dims(stats["action"]).any()  # so a checkpoint knows the task
    closed, opened = vla.tokenize_actions(torch.tensor([[0.0, 1.0]]), {"q01": [0, 0], "q99": [1, 1], "mask": [False, False]})[0]  # as OpenVLA's data has it
    half_closed, half_opened = vla.tokenize_actions(torch.tensor([[0.45], [0.55]]), {"q01": [0], "q99": [1], "mask": [False]})[:, 0]
    actions = vla.detokenize_actions(torch.stack([closed, half_closed, half_opened, opened])[:, None].expand(4, 7), stats["action"])
    assert actions[:, -1].tolist() == [-1, -1, 1, 1] and len(actions[:, 0].unique()) > 2
    back = vla.tokenize_actions(torch.tensor([[0.0] * 6 + [-1.0], [0.0] * 6 + [1.0]]), stats["action"])[:, -1]
    assert (back - torch.stack([closed, opened])).abs().max() <= 1
    assert torch.allclose(vla.detokenize_actions(torch.tensor([[254] * 7]), stats["action"])[0, :6], torch.tensor(0.03), atol=3e-4)
    assert vla.signed_gripper({"action": {"q01": [0.0], "q99": [1.0]}})["action"]["binary"] == [False]  # published statistics may have no mask
    assert vla.signed_gripper(stats)["action"]["binary"] == stats["action"]["binary"]  # --unnorm-key may name what has been signed before


@pytest.mark.slow
def test_all_scripts_start_from_a_published_folder(published, tmp_path, monkeypatch):
    """On a Panda task, in its units by bridge_orig's: nothing sensible is learned, but everything runs, with images of the model's size."""
    folder, sizes, make_envs = published[0], [], stare_utils.make_envs

    def record(*args, **kwargs):
        sizes.append(kwargs["image_size"])
        return make_envs(*args, **kwargs)

    for script in (evaluation, sta_ppo, sta_tpo):
        monkeypatch.setattr(script, "make_envs", record)
    common = ["--vla", folder, "--unnorm-key", "bridge_orig", "--env-id", "PickCube-v1", "--num-envs", 2, "--no-cuda"]
    call(sta_ppo, *common, "--num-steps", 5, "--total-timesteps", 10, "--num-minibatches", 1, "--lora-rank", 2, "--num-eval-episodes", 0, "--output-dir",
         tmp_path / "ppo")  # fmt: skip
    with pytest.raises(stare_utils.UserError, match="no pair"):  # two roll-outs that both fail in reach
        call(sta_tpo, *common, "--num-initial-states", 1, "--rollouts-per-state", 2, "--output-dir", tmp_path / "tpo")
    call(evaluation, "--checkpoint", tmp_path / "ppo", "--env-id", "PickCube-v1", "--num-eval-episodes", 1, "--num-envs", 1, "--no-cuda")
    assert sizes == [28, 28, 28]
    demos = write_demos(tmp_path / "demos.h5", size=28)
    call(sft, "--vla", folder, "--env-id", "PickCube-v1", "--demo-path", demos, "--num-updates", 2, "--batch-size", 4, "--num-eval-episodes", 0, "--no-cuda",
         "--output-dir", tmp_path / "sft")  # fmt: skip
    assert {"bridge_orig", "PickCube-v1"} == set(json.loads((tmp_path / "sft/checkpoint/config.json").read_text())["norm_stats"])


@pytest.mark.parametrize(
    ("words", "args"),
    [("bridge_orig, not on bridge", ["--unnorm-key", "bridge"]), ("bridge_orig, not on PickCube-v1", [])],
)  # fmt: skip
@pytest.mark.parametrize("script", [evaluation, sta_tpo, sta_ppo])
def test_statistics_that_are_not_there(script, words, args, published, tmp_path):
    with pytest.raises(stare_utils.UserError, match=words) as error:
        call(script, "--vla", published[0], "--env-id", "PickCube-v1", "--output-dir", tmp_path / "out", "--no-cuda", *args)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_model_that_the_hub_does_not_have(monkeypatch, tmp_path):
    def refuse(name, **kwargs):
        raise ConnectionError(name)

    monkeypatch.setattr(vla, "snapshot_download", refuse)
    with pytest.raises(stare_utils.UserError, match="nobody/nothing cannot be loaded: no checkpoint at"):
        call(evaluation, "--vla", "nobody/nothing", "--env-id", "PickCube-v1", "--output-dir", tmp_path / "out")
    with pytest.raises(stare_utils.UserError, match="--vla needs --env-id"):
        call(evaluation, "--vla", "nobody/nothing")


@pytest.mark.slow
def test_logits_are_those_of_openvlas_published_code(tmp_path):
    """Full-size towers, a Llama of two layers, every weight a function of its name; tests/openvla_golden.json holds what the published remote code
    (transformers 4.40.1, timm 0.9.16, fp32) computes with them."""
    golden = json.loads((ROOT / "tests/openvla_golden.json").read_text())

    def weight(name: str, shape) -> torch.Tensor:
        x = np.random.RandomState((zlib.crc32(name.encode()) + golden["seed"]) % 2**32).randn(*shape).astype(np.float32)
        x = 0.5 + 0.1 * x if name.endswith("scale_factor") else 1 + 0.1 * x if "norm" in name and name.endswith("weight") else 0.04 * x
        return torch.from_numpy(x).to(torch.bfloat16)

    text = {"model_type": "llama", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
            "vocab_size": 32064, "pad_token_id": 32000, "torch_dtype": "bfloat16", "max_position_embeddings": 2048, "rms_norm_eps": 1e-6}  # fmt: skip
    config = {"timm_model_ids": list(vla.TOWERS), "image_sizes": [224, 224], "pad_to_multiple_of": 64, "torch_dtype": "bfloat16", "text_config": text}
    with torch.device("meta"):
        names = {name: value.shape for name, value in vla.OpenVLAForActionPrediction(vla.OpenVLAConfig(text, list(vla.TOWERS))).state_dict().items()}
    write_published(tmp_path, config, 224, {name: weight(name, shape) for name, shape in names.items()})
    model = AutoModelForImageTextToText.from_pretrained(tmp_path).float().eval()
    assert AutoProcessor.from_pretrained(tmp_path).image_processor.input_sizes == [[3, 224, 224]] * 2
    rng = np.random.RandomState(1000 + golden["seed"])
    ids = torch.from_numpy(np.concatenate([np.full((2, 1), 1), rng.randint(300, 31000, (2, 12)), np.full((2, 1), 29871)], 1))
    pixels = torch.from_numpy(rng.randn(2, 6, 224, 224).astype(np.float32))
    with torch.no_grad():
        logits = model(ids, torch.ones_like(ids), pixels).logits
    assert list(logits.shape) == golden["shape"]
    found = {"last_position_action_logits": logits[:, -1, 31744:32000], "first_position_head": logits[:, 0, :16], "patch_position_head": logits[:, 200, :16]}
    for name, values in found.items():
        assert (values - torch.tensor(golden[name])).abs().max() < 1e-3, name


@pytest.mark.slow
def test_what_a_gpu_would_cost_is_measured_in_a_table_and_json(tmp_path):
    printed = output_of("benchmark/gpu_7b.py", "--size", "small", "--batch-sizes", 2, 3, "--repeats", 1, cwd=tmp_path)
    rows = json.loads((tmp_path / "gpu_7b.json").read_text())["rows"]
    assert [row["batch"] for row in rows] == [2, 3] and printed.count("\n| ") == 2
    for row in rows:
        assert row["env_share"] + row["model_share"] + row["rest_share"] == pytest.approx(1) and row["ppo_steps_per_s"] > 0
        assert row["logprob_gap"] < 0.3  # bfloat16 on a CPU
