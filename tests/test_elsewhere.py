"""A checkpoint acts where this repository has never been."""

import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers.utils.hub as hub
from conftest import ROOT, call

import eval as evaluation
import vla
from benchmark import ship
from plumbing.card import can_have_card, model_card
from plumbing.checkpoint import damage, load_policy, save_checkpoint
from world.tasks import UserError

CPU = torch.device("cpu")
SHIPPED = sorted((ROOT / "checkpoints").glob("*__*"))
LIST = (ROOT / "checkpoints/README.md").read_text()
README = (ROOT / "README.md").read_text()
INSTRUCTION = "pick up the red cube and move it to the green ball"
# Acts with the Auto classes alone. It is given a folder and the packages that may be imported,
# besides those that these need.
STRANGER = """
import importlib.util
import re
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires

def plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()

folder, *todo = sys.argv[1:]
needed = set()
while todo:
    name = plain(todo.pop())
    if name in needed:
        continue
    needed.add(name)
    try:
        lines = requires(name) or []
    except PackageNotFoundError:
        continue
    todo += [re.match(r"[\\w.-]+", line)[0] for line in lines if "extra ==" not in line]
missing = {
    module
    for module, owners in packages_distributions().items()
    if not needed & {plain(owner) for owner in owners}
}
find_spec = importlib.util.find_spec

def find(name, *args):
    return None if name.split(".")[0] in missing else find_spec(name, *args)

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in missing:
            raise ModuleNotFoundError(name, name=name)

importlib.util.find_spec = find
sys.meta_path.insert(0, Missing())
assert "peft" in missing
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
assert "vla" not in sys.modules and "peft" not in sys.modules
if "pillow" in needed:
    seen = torch.load(folder + "/../seen.pt")
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    proprio_stats = model.config.norm_stats["PickCube-v1"]["proprio"]
    inputs = processor(seen["rgb"], seen["texts"], seen["proprio"], proprio_stats)
    actions = model.predict_action(unnorm_key="PickCube-v1", **inputs)
    assert torch.equal(actions, seen["actions"])
"""


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A run's folder with a checkpoint, and what its policy does in some states."""
    folder = tmp_path_factory.mktemp("run")
    model, processor, _ = load_policy(ROOT / "checkpoints/PickCube-v1__sft", CPU)
    settings = {"env_id": "PickCube-v1", "method": "SFT"}
    save_checkpoint(folder, model, processor, settings, {"script": "sft"})
    generator = torch.Generator().manual_seed(0)
    rgb = torch.randint(0, 256, (3, 128, 128, 3), generator=generator, dtype=torch.uint8)
    proprio = torch.randn(3, 8, generator=generator)
    stats = model.config.norm_stats["PickCube-v1"]
    texts = [INSTRUCTION] * 3
    inputs = processor(rgb, texts, proprio, stats["proprio"])
    active = ~vla.constant_dims(stats["action"])
    bins, _, _ = evaluation.sample_action(model, inputs, active, greedy=True)
    actions = vla.detokenize_actions(bins, stats["action"], model.config.n_action_bins)
    seen = {"rgb": rgb, "texts": texts, "proprio": proprio, "actions": actions}
    torch.save(seen, folder / "seen.pt")
    return folder, model, processor, inputs, actions


def test_predict_action_is_the_greedy_action_of_the_scripts(policy):
    _, model, _, inputs, actions = policy
    assert torch.equal(model.predict_action(unnorm_key="PickCube-v1", **inputs), actions)
    # Three states, three actions: the comparison could fail.
    assert len(actions.unique(dim=0)) == 3


@pytest.mark.parametrize(
    "packages", [("torch", "transformers"), ("torch", "transformers", "pillow")]
)
def test_a_checkpoint_acts_without_this_repository(packages, policy, tmp_path):
    folder = policy[0] / "checkpoint"
    environ = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    # -I leaves out this folder and the user's own packages.
    command = [sys.executable, "-I", "-c", STRANGER, str(folder), *packages]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_push_to_hub_takes_weights_code_and_processor_along(policy, monkeypatch):
    _, model, processor, _, _ = policy
    pushed = set()

    class Hub:
        """The hub, which keeps the names of what it is sent."""

        def create_repo(self, repo_id, **kwargs):
            return SimpleNamespace(repo_id=repo_id)

        def create_commit(self, operations, **kwargs):
            pushed.update(operation.path_in_repo for operation in operations)

    monkeypatch.setattr(hub, "hf_api", Hub)
    card = SimpleNamespace(save=lambda path: None)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *args, **kwargs: card)
    model.push_to_hub("someone/policy")
    processor.push_to_hub("someone/policy")
    assert {"model.safetensors", "config.json", "vla.py"} <= pushed
    assert {"processor_config.json", "tokenizer.json"} <= pushed


# ---- the card ----
def test_a_card_names_the_tasks_their_stages_and_the_command():
    settings = {"env_id": "PickCube-v1,PushCube-v1", "method": "SFT", "command": "python sft.py"}
    card = model_card(settings, vla.tiny_config(), "97.0 %")
    assert f'PickCube-v1, "{INSTRUCTION}". Stages: reach, grasp, transport, place' in card
    assert "PushCube-v1" in card
    assert "Success: 97.0 %" in card
    assert "`python sft.py`" in card
    assert "license: mit" in card and "Licence: MIT" in card
    # The weights of a published model have a licence of their own.
    assert "license: other" in model_card(settings, vla.OpenVLAConfig(), "97.0 %")


def test_an_evaluation_writes_the_success_on_the_card(policy):
    folder = policy[0]
    card = folder / "checkpoint/README.md"
    assert "not evaluated yet" in card.read_text()
    call(evaluation, "--checkpoint", folder, "--num-eval-episodes", 2, "--num-envs", 2, "--no-cuda")
    assert "of 2 greedy episodes of PickCube-v1" in card.read_text()
    # The card belongs to no checksum, so the checkpoint is whole.
    load_policy(folder, CPU)


def test_a_card_is_written_of_our_own_and_unchanged_checkpoints_alone(policy, monkeypatch):
    folder = policy[0]
    card = folder / "checkpoint/README.md"
    before = card.read_text()
    flags = ("--checkpoint", folder, "--num-eval-episodes", 3, "--num-envs", 3, "--no-cuda")
    # Another checkpoint is saved during the evaluation.
    fingerprints = iter(["1", "2"])
    monkeypatch.setattr(evaluation, "fingerprint", lambda folder: next(fingerprints))
    call(evaluation, *flags)
    assert card.read_text() == before
    monkeypatch.undo()
    # A stranger's args.json may say anything.
    for settings in ({"lr": 1e-4}, {"env_id": "NoTask-v0", "command": ""}, {"env_id": 3}):
        assert not can_have_card(settings)
    settings = {"env_id": "PickCube-v1,PushCube-v1", "command": "python sft.py"}
    assert can_have_card(settings)


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
def test_what_is_shipped_is_whole_and_says_how_good_it_is(folder):
    """Each policy has its code and a card, and checkpoints/README.md says the same success."""
    assert not damage(folder) and (folder / "checksums.json").exists()
    assert sum(file.stat().st_size for file in folder.iterdir()) < 4_500_000
    assert "class OpenVLAForActionPrediction" in (folder / "vla.py").read_text()
    (row,) = re.findall(rf"^\| `{folder.name}` .*\| (.+?) \|$", LIST, re.M)
    card = (folder / "README.md").read_text()
    assert f"- Success: {row} greedy episodes of {folder.name.split('__')[0]} (" in card
    load_policy(folder, CPU)


def test_the_front_page_says_what_the_list_of_policies_says():
    sentence = re.search(r"Their success \(one seed each\): (.+?) %\.", README)[1]
    pairs = re.findall(r"(\S+) ([\d.]+)(?:, |$)", sentence)
    assert len(pairs) == 5
    for env_id, success in pairs:
        assert re.search(rf"^\| `{env_id}__sft` .*\| {success} % \[", LIST, re.M), env_id


def test_a_shipped_policy_is_the_evaluated_one_without_its_training_state(checkpoint, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(checkpoint, run)
    output = tmp_path / "shipped"
    with pytest.raises(UserError, match=f"first eval.py --checkpoint {run}"):
        ship.main(run, output)
    card = run / "checkpoint/README.md"
    card.write_text(card.read_text().replace("not evaluated yet", "97.0 %"))
    ship.main(run, output)
    # A second time it replaces the first.
    ship.main(run, output)
    names = {file.name for file in (run / "checkpoint").iterdir()}
    assert {file.name for file in output.iterdir()} == names - {"training_state.safetensors"}
    assert {"vla.py", "README.md", "separator.safetensors"} < names
    assert not damage(output)
    load_policy(output, CPU)
    with open(output / "model.safetensors", "ab") as file:
        file.write(b"x")
    assert damage(output) == "model.safetensors"
    # A damaged checkpoint is not shipped, and other folders are not replaced.
    (run / "checkpoint/config.json").write_text("{}")
    with pytest.raises(UserError, match="config.json.*: nothing was copied"):
        ship.main(run, output)
    assert damage(output) == "model.safetensors"
    with pytest.raises(UserError, match="is something else than a checkpoint"):
        ship.main(run, tmp_path)
