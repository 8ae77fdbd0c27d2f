"""The layout: copies are identical, arguments documented, files short, imports harmless."""
import ast
import subprocess
import sys
from collections import defaultdict

import pytest
from conftest import ROOT

SCRIPTS = ("sft", "sta_tpo", "sta_ppo", "eval")
CEILINGS = {"sft": 450, "sta_tpo": 650, "sta_ppo": 700, "eval": 400, "stare_utils": 860}
# Fields whose meaning is a script's own, so that their help may differ
OWN_HELP = {"seed", "cuda", "output_dir", "resume", "checkpoint", "env_id", "num_envs", "num_eval_episodes", "save_freq", "batch_size", "learning_rate",
            "stage_source", "vla"}
SOURCE = {name: (ROOT / f"{name}.py").read_text() for name in (*SCRIPTS, "stare_utils", "vla")}
TREE = {name: ast.parse(text) for name, text in SOURCE.items()}


def fields(script: str) -> dict:
    """Args of a script: name -> (annotation, help)."""
    (args,) = (node for node in TREE[script].body if isinstance(node, ast.ClassDef) and node.name == "Args")
    out = {}
    for node, following in zip(args.body, [*args.body[1:], None]):
        if isinstance(node, ast.AnnAssign):
            documented = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            out[node.target.id] = ast.unparse(node.annotation), following.value.value if documented else ""
    return out


def test_functions_of_the_same_name_are_copies():
    copies = defaultdict(dict)
    for script in SCRIPTS:
        for node in TREE[script].body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in ("main", "Args"):
                copies[node.name][script] = ast.get_source_segment(SOURCE[script], node)
    assert sum(len(versions) > 1 for versions in copies.values()) > 3
    assert {name: list(versions) for name, versions in copies.items() if len(set(versions.values())) > 1} == {}


def test_arguments_of_the_same_name_have_one_type_and_one_help():
    types, helps = defaultdict(set), defaultdict(set)
    for script in SCRIPTS:
        for name, (annotation, help_text) in fields(script).items():
            types[name].add(annotation)
            helps[name].add(help_text)
    assert {name: kinds for name, kinds in types.items() if len(kinds) > 1} == {}
    assert {name: texts for name, texts in helps.items() if len(texts) > 1 and name not in OWN_HELP} == {}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_argument_is_documented(script):
    assert [name for name, (_, help_text) in fields(script).items() if len(help_text) < 4] == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_common_flags_are_there(script):
    common = {"env_id", "output_dir", "seed", "num_envs", "num_eval_episodes"} | (set() if script == "eval" else {"resume"})
    assert common <= fields(script).keys()
    assert ("vla" if script == "sft" else "checkpoint") in fields(script)


def test_no_script_imports_another_except_for_evaluate():
    for name, tree in TREE.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module in SCRIPTS:
                assert (node.module, [alias.name for alias in node.names]) == ("eval", ["evaluate"]) and name in SCRIPTS
            elif isinstance(node, ast.Import):
                assert not {alias.name for alias in node.names} & set(SCRIPTS)


@pytest.mark.parametrize("name", CEILINGS)
def test_files_keep_their_ceilings(name):
    assert len(SOURCE[name].splitlines()) <= CEILINGS[name]


@pytest.mark.parametrize("name", SOURCE)
def test_functions_are_short(name):
    functions = [node for node in ast.walk(TREE[name]) if isinstance(node, ast.FunctionDef) and node.name != "main"]
    assert [node.name for node in functions if node.end_lineno - node.lineno + 1 > 60] == []


def test_shared_modules_read_no_arguments_and_hold_no_optimiser():
    for name in ("stare_utils", "vla"):
        words = {getattr(node, "id", getattr(node, "attr", None)) for node in ast.walk(TREE[name]) if isinstance(node, (ast.Name, ast.Attribute))}
        assert not words & {"args", "backward", "optim", "advantages"}


def test_importing_a_script_has_no_side_effect(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['x', '--no-such-flag']\n"
        "import mani_skill.envs\n"  # rich, which it imports where it is installed, draws one number
        "import numpy, random, torch; before = random.getstate(), torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist()\n"
        f"import {', '.join(SCRIPTS)}\n"
        "assert before == (random.getstate(), torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist())\n"
        "assert not torch.cuda.is_initialized()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert list(tmp_path.iterdir()) == []
