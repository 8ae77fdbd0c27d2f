"""Every mistake that a user can make ends in one line and exit code 2. It leaves nothing behind."""

import dataclasses
import json
import shutil

import pytest
from conftest import call, cli, needs_assets, write_demos

import eval as evaluation
import sft
import sta_ppo
import sta_tpo
from plumbing.checkpoint import fingerprint, write_state
from plumbing.folders import find_checkpoint
from plumbing.report import check_same_episodes
from plumbing.run import one_line_errors
from world.tasks import TASKS, UserError
from world.vector import make_envs

SCRIPTS = {"sft": sft, "sta_tpo": sta_tpo, "sta_ppo": sta_ppo, "eval": evaluation}
TRAINING = ("sft", "sta_tpo", "sta_ppo")


@pytest.fixture
def refuses(tmp_path):
    """Calls a script's main and checks that it refuses.

    It must do so in one line that holds `words`, and its output folder must stay as it was.
    """

    def check(script, words, *args, output=None):
        folder = output or tmp_path / "out"
        before = sorted(folder.rglob("*")) if folder.exists() else []
        with pytest.raises(UserError) as error:
            call(SCRIPTS[script], *args, "--output-dir", folder, "--no-cuda")
        message = str(error.value)
        assert words in message and "\n" not in message
        assert (sorted(folder.rglob("*")) if folder.exists() else []) == before

    return check


def start(script, checkpoint) -> list:
    """Flags that a script needs to start at all."""
    return [] if script == "sft" else ["--checkpoint", checkpoint]


@pytest.fixture
def copy(checkpoint, tmp_path):
    """A checkpoint that a test may damage."""
    copy = shutil.copytree(checkpoint / "checkpoint", tmp_path / "copy")
    (copy / "checksums.json").unlink()
    return copy


# ---- tasks and instructions ----
@pytest.mark.parametrize("script", SCRIPTS)
def test_unknown_env_id_names_the_nearest(script, checkpoint, refuses):
    refuses(script, "PickCube-v1", *start(script, checkpoint), "--env-id", "PickCub-v1")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_seed_that_random_generators_do_not_take(script, checkpoint, refuses):
    words = "--seed must be below 4294967296"
    refuses(script, words, *start(script, checkpoint), "--seed", 2**32)


@pytest.mark.parametrize("script", SCRIPTS)
def test_env_id_of_maniskill_without_an_entry_here(script, checkpoint, refuses):
    words = "docs/tasks.md adds one"
    refuses(script, words, *start(script, checkpoint), "--env-id", "PlugCharger-v1")


@pytest.mark.parametrize("script", ["sta_tpo", "sta_ppo"])
def test_several_tasks_where_one_is_taken(script, checkpoint, refuses):
    ids = "PickCube-v1,PushCube-v1"
    refuses(script, "one task here", *start(script, checkpoint), "--env-id", ids)


def test_as_many_demonstration_files_as_tasks(tmp_path, refuses):
    demos = write_demos(tmp_path / "demos.h5")
    ids = "PickCube-v1,PushCube-v1"
    refuses("sft", "1 files for 2 tasks", "--env-id", ids, "--demo-path", demos)


def test_instruction_longer_than_the_context(checkpoint, refuses, monkeypatch, tmp_path):
    words = "the model has room for"
    instruction = "again and " * 200
    refuses("eval", words, "--checkpoint", checkpoint, "--instruction", instruction)
    wordy = dataclasses.replace(TASKS["PickCube-v1"], instruction=instruction)
    monkeypatch.setitem(TASKS, "PickCube-v1", wordy)
    demos = write_demos(tmp_path / "demos.h5")
    refuses("sft", words, "--vla", checkpoint, "--demo-path", demos)


# ---- stages ----
@pytest.mark.parametrize("script", ["sta_tpo", "sta_ppo"])
def test_a_policy_behind_which_there_is_no_separator(script, copy, refuses):
    (copy / "separator.safetensors").unlink()
    words = "no learned separator of PickCube-v1"
    refuses(script, words, "--checkpoint", copy, "--stage-source", "learned")


@pytest.mark.parametrize(
    ("words", "args"),
    [
        ("some of reach,grasp,transport,place", ["--silent-stages", "reach,gasp"]),
        (
            "the offset potential",
            ["--silent-stages", "reach", "--potential-across-stages", "bare"],
        ),
        ("knows no distances", ["--silent-stages", "reach", "--stage-source", "learned"]),
        ("pays no potential", ["--silent-stages", "reach", "--stage-reward", "paced"]),
        ("pays no potential", ["--potential", "linear", "--stage-reward", "paced"]),
    ],
)
def test_stages_that_cannot_be_silent(words, args, checkpoint, refuses):
    refuses("sta_ppo", words, "--checkpoint", checkpoint, *args)


@pytest.mark.parametrize(
    ("words", "args"),
    [
        ("--no-stage-aware uses no stages", ["--no-stage-aware", "--stage-source", "learned"]),
        ("--export-pairs needs whole roll-outs", ["--branch", "--export-pairs", "pairs"]),
    ],
)
def test_flags_of_preferences_that_do_not_go_together(words, args, checkpoint, refuses):
    refuses("sta_tpo", words, "--checkpoint", checkpoint, *args)


def bridge_checkpoint(copy):
    """A checkpoint that says that it knows SimplerEnv's carrot."""
    config = json.loads((copy / "config.json").read_text())
    config["norm_stats"] = {"PutCarrotOnPlateInScene-v1": config["norm_stats"]["PickCube-v1"]}
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize("env_id", [needs_assets("PutCarrotOnPlateInScene-v1")])
def test_what_simplers_tasks_do_not_have(env_id, copy, refuses):
    refuses(
        "eval", "camera cannot move", "--checkpoint", bridge_checkpoint(copy), "--ood", "camera"
    )
    dense = ("--env-id", env_id, "--reward", "dense")
    refuses("sta_ppo", "no dense reward", "--checkpoint", copy, *dense)
    with pytest.raises(UserError, match="no dense reward"):
        make_envs(env_id, 1, 0, reward="dense")
    with pytest.raises(UserError, match="trains with --backend cpu"):
        make_envs(env_id, 1, 0, backend="cuda")


# ---- resuming ----
@pytest.mark.parametrize("script", TRAINING)
def test_resuming_another_scripts_run(script, checkpoint, tmp_path, refuses):
    run = shutil.copytree(checkpoint, tmp_path / "run")
    write_state(run / "checkpoint", {"script": "sta_other"}, {}, None)
    words = "is of sta_other, not of"
    refuses(script, words, *start(script, checkpoint), "--resume", output=run)


@pytest.mark.parametrize("script", TRAINING)
def test_resuming_from_a_policy_that_is_not_what_it_was(script, checkpoint, tmp_path, refuses):
    source = shutil.copytree(checkpoint, tmp_path / "source")
    run = shutil.copytree(checkpoint, tmp_path / "run")
    origin = fingerprint(source / "checkpoint")
    (run / "source.txt").write_text(f"{source / 'checkpoint'}\n{origin}")
    args = {"env_id": "PickCube-v1", "seed": 1, "batch_size": 800, "lora_rank": 2}
    (run / "checkpoint/args.json").write_text(json.dumps({**args, "vla": str(source)}))
    state = {"script": script, "source": str(source), "origin": origin, "wall_s": 0}
    write_state(run / "checkpoint", state, {}, None)
    # The policy at the run's start is trained on.
    write_state(source / "checkpoint", {"trained": "on"}, {}, None)
    flags = ["--lora-rank", 2, "--resume"]
    if script == "sft":
        flags += ["--vla", source]
    refuses(script, "another policy is there now", *flags, output=run)


# ---- the machine and the output folder ----
@pytest.mark.slow
def test_missing_assets_name_the_download(tmp_path):
    flags = ("--env-id", "widowx_stack_cube", "--output-dir", "out")
    done = cli("sft.py", *flags, cwd=tmp_path, MS_ASSET_DIR=str(tmp_path))
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "out").exists()
    (line,) = done.stderr.splitlines()
    assert "mani_skill.utils.download_asset bridge_v2_real2sim" in line and "MS_ASSET_DIR" in line


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_envs(script, checkpoint, refuses):
    refuses(script, "--num-envs", *start(script, checkpoint), "--num-envs", 0)


@pytest.mark.parametrize("script", SCRIPTS)
def test_output_folder_that_cannot_be_written(script, checkpoint, tmp_path, capsys):
    flags = ("--output-dir", "/dev/null/x", "--no-cuda")
    with pytest.raises(SystemExit) as stopped, one_line_errors():
        call(SCRIPTS[script], *start(script, checkpoint), *flags)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: cannot ")
    assert "/dev/null/x" in error
    assert "Not a directory" in error


def test_a_name_that_the_locale_cannot_write(capsys):
    with pytest.raises(SystemExit) as stopped, one_line_errors():
        # Python reads such a name so where LC_ALL is C.
        "\udcc3\udca4".encode()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == (
        "error: a name has letters that this locale cannot write: set LC_ALL=C.UTF-8\n"
    )


@pytest.mark.parametrize("script", TRAINING)
def test_output_folder_that_holds_a_run(script, checkpoint, tmp_path, refuses):
    shutil.copytree(checkpoint, tmp_path / "run")
    refuses(script, "--resume", *start(script, checkpoint), output=tmp_path / "run")


# ---- checkpoints ----
@pytest.mark.parametrize("script", SCRIPTS)
def test_missing_checkpoint(script, tmp_path, refuses):
    flags = ["--checkpoint", tmp_path / "nowhere"]
    if script == "sft":
        demos = write_demos(tmp_path / "demos.h5")
        flags = ["--vla", tmp_path / "nowhere", "--demo-path", demos]
    refuses(script, "no checkpoint at", *flags)


@pytest.mark.parametrize("script", ["sta_tpo", "sta_ppo", "eval"])
def test_two_policies(script, checkpoint, refuses):
    flags = ["--checkpoint", checkpoint, "--vla", "openvla/openvla-7b", "--env-id", "PickCube-v1"]
    refuses(script, "two policies", *flags)


def test_no_checkpoint_to_be_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="python sft.py --env-id Nothing-v1"):
        find_checkpoint("Nothing-v1", ("sta_tpo", "sft"))


@pytest.mark.parametrize("script", ["sta_tpo", "sta_ppo", "eval"])
def test_checkpoint_of_another_kind_of_model(script, tmp_path, refuses):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    refuses(script, "llama", "--checkpoint", tmp_path)


@pytest.mark.parametrize("script", ["sta_tpo", "sta_ppo", "eval"])
def test_checkpoint_of_another_env(script, copy, refuses):
    config = json.loads((copy / "config.json").read_text())
    config["norm_stats"] = {"Other-v1": config["norm_stats"]["PickCube-v1"]}
    (copy / "config.json").write_text(json.dumps(config))
    refuses(script, "Other-v1", "--checkpoint", copy, "--env-id", "PickCube-v1")


@pytest.mark.parametrize("spoil", ["model.safetensors", "config.json"])
def test_checkpoint_with_half_a_file(spoil, copy, refuses):
    (copy / spoil).write_bytes((copy / spoil).read_bytes()[:100])
    refuses("eval", str(copy), "--checkpoint", copy)


# ---- demonstrations ----
@pytest.mark.parametrize(
    ("words", "spoil"),
    [
        ("no actions", {"actions": False}),
        ("pd_joint_pos", {"control_mode": "pd_joint_pos"}),
        ("not PickCube-v1", {"env_id": "StackCube-v1"}),
        ("no successful", {"lengths": ()}),
        ("for this policy", {"size": 64}),
    ],
)
def test_demonstrations_that_do_not_fit(words, spoil, tmp_path, refuses):
    refuses("sft", words, "--demo-path", write_demos(tmp_path / "demos.h5", **spoil))


@pytest.mark.parametrize("name", ["demos.h5", "demos.json"])
def test_demonstrations_with_a_file_missing(name, tmp_path, refuses):
    write_demos(tmp_path / "demos.h5")
    (tmp_path / name).unlink()
    refuses("sft", "cannot read", "--demo-path", tmp_path / "demos.h5")


# ---- numbers and flags ----
def test_sizes_that_do_not_divide(checkpoint, refuses):
    flags = ("--checkpoint", checkpoint, "--num-minibatches", 7)
    refuses("sta_ppo", "--num-minibatches 7", *flags)


@pytest.mark.parametrize(
    ("script", "flag", "value"),
    [
        ("sft", "--batch-size", 0),
        ("sft", "--num-demos", 0),
        ("sta_tpo", "--rollouts-per-state", 1),
        ("sta_tpo", "--chunk-size", 0),
        ("sta_ppo", "--num-steps", 0),
        ("sta_ppo", "--num-minibatches", 0),
        ("eval", "--num-eval-episodes", 0),
        ("sft", "--learning-rate", -1e-3),
        ("sft", "--demo-noise", -0.1),
        ("sta_tpo", "--beta", -5.0),
        ("sta_tpo", "--beta", 0),
        ("sta_tpo", "--cost-margin", -1.0),
        ("sta_ppo", "--max-grad-norm", -1.0),
        ("sta_ppo", "--clip-coef", -0.2),
        ("sta_ppo", "--gamma", float("nan")),
        ("sta_ppo", "--gamma", float("inf")),
        ("sta_ppo", "--gamma", 1.5),
        ("sta_ppo", "--gae-lambda", 95),
        ("sta_ppo", "--max-grad-norm", 0),
        ("sft", "--demo-slip", 2),
    ],
)
def test_numbers_that_would_turn_a_loss_or_a_loop_around(script, flag, value, checkpoint, refuses):
    refuses(script, flag, *start(script, checkpoint), flag, value)


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("sft", ["--track"]),
        ("eval", ["--backend", "cuda"]),
        ("sta_ppo", ["--backend", "cuda"]),
    ],
)
def test_what_is_not_here_is_said_before_anything_is_made(
    script, flags, checkpoint, refuses, monkeypatch
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    words = " ".join([*flags, "needs"])
    refuses(script, words, *start(script, checkpoint), *flags)


def test_conditions_that_do_not_go_together(checkpoint, refuses, tmp_path, monkeypatch):
    given = ("--checkpoint", checkpoint)
    words = ("--instruction", "lift it", "--instruction-set", "paraphrase")
    refuses("eval", "exclude each other", *given, *words)
    demos = write_demos(tmp_path / "demos.h5")
    for flag in ("--demo-speed", "--demo-pause"):
        refuses("sft", f"{flag} is for new", "--demo-path", demos, flag, 0.5)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for script in ("sft", "sta_ppo", "eval"):
        flags = ("--backend", "cuda", "--render", "cpu")
        refuses(script, "leave out --render cpu", *start(script, checkpoint), *flags)
    # A scene is built once there, with one camera and one lamp.
    monkeypatch.delenv("VK_ICD_FILENAMES", raising=False)
    for kind in ("camera", "lighting"):
        refuses("eval", "leave out --backend cuda", *given, "--backend", "cuda", "--ood", kind)


def test_results_of_gpu_simulation_are_compared_with_their_like_alone():
    cpu = {"backend": "cpu", "num_envs": 8}
    gpu = {"backend": "cuda", "num_envs": 8}
    check_same_episodes([{}, cpu, {**cpu, "num_envs": 4}])
    check_same_episodes([gpu, gpu])
    for other in (cpu, {}, {**gpu, "num_envs": 16}):
        with pytest.raises(UserError, match="the same --backend and --num-envs"):
            check_same_episodes([gpu, other])


def test_results_that_cannot_be_compared(tmp_path, refuses):
    row = {
        "method": "SFT",
        "env_id": "PickCube-v1",
        "success_once": 0.0,
        "success_at_end": 0.0,
        "stage_reach_rate": [0.0] * 4,
    }
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    for file, first in ((a, 0), (b, 10)):
        episodes = [{"seed": first + i, "success_once": False} for i in range(3)]
        file.write_text(json.dumps({**row, "episodes": episodes}))
    refuses("eval", "share fewer than two seeds", "--compare", a, b)
    refuses("eval", "cannot read", "--compare", a, tmp_path / "nowhere.json")
    spoilt = [
        {"episodes": [{"success_once": False}]},
        {"episodes": []},
        {"episodes": [{"seed": 0, "success_once": False}], "success_once": None},
        # This task's rows also have a tilt.
        {"episodes": [{"seed": 0, "success_once": True}], "env_id": "LiftPegUpright-v1"},
        {"episodes": [{"seed": 0, "success_once": False}], "env_id": "NoTask-v0"},
    ]
    for text in ("{}", "[]", *(json.dumps({**row, **change}) for change in spoilt)):
        a.write_text(text)
        refuses("eval", "cannot read", "--compare", a, b)


# ---- the same from a shell ----
NO_RENDERER = {"VK_ICD_FILENAMES": "/nonexistent.json", "VK_DRIVER_FILES": "/nonexistent.json"}


@pytest.mark.parametrize(
    ("words", "script", "args", "env"),
    [
        ("PickCube-v1", "sft.py", ["--env-id", "PickCub-v1"], {}),
        pytest.param(
            "--num-minibatches 7",
            "sta_ppo.py",
            ["--num-minibatches", 7],
            {},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "at least 2", "sta_tpo.py", ["--rollouts-per-state", 1], {}, marks=pytest.mark.slow
        ),
        pytest.param(
            "no checkpoint at that place",
            "eval.py",
            ["--checkpoint", "nowhere"],
            {},
            marks=pytest.mark.slow,
        ),
        ("setup.sh", "sft.py", [], NO_RENDERER),
    ],
    ids=["env", "sizes", "tpo", "checkpoint", "renderer"],
)
def test_a_mistake_on_the_command_line_is_one_line_and_exit_code_2(
    words, script, args, env, tmp_path
):
    done = cli(script, *args, "--output-dir", "out", cwd=tmp_path, **env)
    assert done.returncode == 2 and done.stdout == ""
    # The renderer's own log is not ours.
    (line,) = (line for line in done.stderr.splitlines() if "[svulkan2]" not in line)
    assert line.startswith("error: ") and words in line
    assert list(tmp_path.rglob("*")) == []
