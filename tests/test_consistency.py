"""The layout: which room imports which, what is copied, how long functions are, and what
arguments say."""

import ast
import subprocess
import sys
from collections import defaultdict

import pytest
from conftest import ROOT

SCRIPTS = ("sft", "sta_tpo", "sta_ppo", "eval")
WORLD = tuple(f"world.{path.stem}" for path in sorted((ROOT / "world").glob("[a-z]*.py")))
PLUMBING = tuple(f"plumbing.{path.stem}" for path in sorted((ROOT / "plumbing").glob("[a-z]*.py")))
MODULES = (*SCRIPTS, "stare_utils", "vla", *WORLD, *PLUMBING)
# The lines of `main`, and of a function.
MAIN_LINES = {"sta_ppo": 260, "sta_tpo": 230, "sft": 160, "eval": 160}
FUNCTION_LINES = 50
# What makes a log-probability is copied into the scripts that need it.
COPIES = {"sample_action", "action_logprob"}
# Arguments whose meaning is a script's own, so that their help may differ.
OWN_HELP = {
    "seed",
    "cuda",
    "output_dir",
    "resume",
    "checkpoint",
    "env_id",
    "num_envs",
    "num_eval_episodes",
    "save_freq",
    "batch_size",
    "learning_rate",
    "vla",
    "stage_source",
}


def source(module: str) -> str:
    return (ROOT / f"{module.replace('.', '/')}.py").read_text()


TREE = {module: ast.parse(source(module)) for module in MODULES}


def imports(tree: ast.Module) -> set[str]:
    """The modules of this repository that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
            # `from plumbing import parallel` imports a module.
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found & set(MODULES)


def functions(tree: ast.Module) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def fields(script: str) -> dict:
    """Args of a script: name -> (annotation, help)."""
    (args,) = (n for n in TREE[script].body if isinstance(n, ast.ClassDef) and n.name == "Args")
    out = {}
    for node, following in zip(args.body, [*args.body[1:], None]):
        if not isinstance(node, ast.AnnAssign):
            continue
        help_text = ""
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            help_text = " ".join(following.value.value.split())
        out[node.target.id] = ast.unparse(node.annotation), help_text
    return out


# ---- rooms ----
def allowed(module: str) -> set[str]:
    """The modules that a module may import."""
    if module == "stare_utils" or module == "vla":
        return set()
    if module in WORLD:
        return {"stare_utils", *WORLD}
    if module in PLUMBING:
        return {"vla", "world.tasks", *PLUMBING}
    below = {"stare_utils", "vla", *WORLD, *PLUMBING}
    return below if module == "eval" else below | {"eval"}


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_downwards_only(module):
    assert imports(TREE[module]) - allowed(module) == set()


def test_training_scripts_import_nothing_but_evaluate_from_a_script():
    for script in ("sft", "sta_tpo", "sta_ppo"):
        taken = set()
        for node in ast.walk(TREE[script]):
            if isinstance(node, ast.ImportFrom) and node.module == "eval":
                taken |= {alias.name for alias in node.names}
        assert taken == {"evaluate"}


def test_no_module_imports_itself_through_others():
    below = {module: imports(tree) for module, tree in TREE.items()}
    for _ in MODULES:
        for module, reached in below.items():
            below[module] = reached.union(*(below[other] for other in reached))
    assert [module for module, reached in below.items() if module in reached] == []


def test_the_idea_needs_torch_alone():
    names = set()
    for node in ast.walk(TREE["stare_utils"]):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    assert names - set(sys.stdlib_module_names) == {"torch"}
    assert len(source("stare_utils").splitlines()) <= 200


@pytest.mark.parametrize("module", ["stare_utils", "vla", *WORLD, *PLUMBING])
def test_what_scripts_share_holds_no_loss_and_takes_no_args(module):
    words = set()
    for node in ast.walk(TREE[module]):
        if isinstance(node, ast.Name):
            words.add(node.id)
        elif isinstance(node, ast.Attribute):
            words.add(node.attr)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            words.add(node.name)
    assert not words & {"Args", "backward", "AdamW", "advantages", "zero_grad", "logsigmoid"}
    for function in functions(TREE[module]):
        named = [argument.arg for argument in function.args.args + function.args.kwonlyargs]
        assert "args" not in named, function.name


# ---- copies ----
def test_only_what_makes_a_log_probability_is_copied():
    bodies = defaultdict(dict)
    for script in SCRIPTS:
        for node in TREE[script].body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                bodies[node.name][script] = ast.get_source_segment(source(script), node)
    for name in COPIES:
        assert len(bodies[name]) > 1 and len(set(bodies[name].values())) == 1, name
    twice = defaultdict(list)
    for name, versions in bodies.items():
        for script, text in versions.items():
            if name not in COPIES:
                twice[text].append(f"{script}.{name}")
    assert [places for places in twice.values() if len(places) > 1] == []


# ---- lines ----
@pytest.mark.parametrize("module", MODULES)
def test_functions_are_short(module):
    for node in functions(TREE[module]):
        limit = MAIN_LINES[module] if node.name == "main" else FUNCTION_LINES
        assert node.end_lineno - node.lineno + 1 <= limit, node.name


@pytest.mark.parametrize("folder", ["benchmark", "tests"])
def test_other_functions_are_short_too(folder):
    for path in (ROOT / folder).glob("*.py"):
        for node in functions(ast.parse(path.read_text())):
            assert node.end_lineno - node.lineno + 1 <= FUNCTION_LINES, f"{path.name} {node.name}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_comes_before_the_loop_is_short(script):
    """The set-up of a training script has at most 50 lines before its loop."""
    (main,) = (node for node in functions(TREE[script]) if node.name == "main")
    loops = (node for node in ast.walk(main) if isinstance(node, ast.While))
    first = min((loop.lineno for loop in loops), default=main.lineno)
    # STA-TPO samples roll-outs and builds pairs before its loop.
    assert first - main.lineno <= (130 if script == "sta_tpo" else 50)


def test_a_main_has_at_most_150_statements():
    """The limit for other functions is in pyproject.toml."""
    command = [sys.executable, "-m", "ruff", "check", "--select", "PLR0915", "--ignore-noqa"]
    limit = ["--config", "lint.pylint.max-statements = 150"]
    files = [f"{script}.py" for script in SCRIPTS]
    done = subprocess.run([*command, *limit, *files], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("module", MODULES)
def test_no_assignment_hides_in_an_expression(module):
    assert not any(isinstance(node, ast.NamedExpr) for node in ast.walk(TREE[module]))


@pytest.mark.parametrize("script", [*SCRIPTS, "stare_utils"])
def test_a_line_has_few_tokens_and_comments_say_why(script):
    text = source(script)
    lines = text.splitlines()
    comments = sum(line.strip().startswith("#") for line in lines)
    assert comments / len(lines) >= 0.08
    assert max(map(len, lines)) <= 100
    assert tokens_per_code_line(text) <= 10


def tokens_per_code_line(text: str) -> float:
    """Tokens that are neither comments nor docstrings, by line that holds some."""
    import io
    import tokenize

    docs = set()
    for node in ast.walk(ast.parse(text)):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_text and isinstance(node.value.value, str):
            docs |= set(range(node.lineno, node.end_lineno + 1))
    skipped = {
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.COMMENT,
        tokenize.ENDMARKER,
    }
    code = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in skipped and token.start[0] not in docs:
            code.append(token.start[0])
    return len(code) / len(set(code))


# ---- arguments ----
def test_arguments_of_the_same_name_have_one_type_and_one_help():
    types = defaultdict(set)
    helps = defaultdict(set)
    for script in SCRIPTS:
        for name, (annotation, help_text) in fields(script).items():
            types[name].add(annotation)
            helps[name].add(help_text)
    assert {name: kinds for name, kinds in types.items() if len(kinds) > 1} == {}
    several = {name: texts for name, texts in helps.items() if len(texts) > 1}
    assert {name: texts for name, texts in several.items() if name not in OWN_HELP} == {}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_argument_is_documented(script):
    assert [name for name, (_, text) in fields(script).items() if len(text) < 4] == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_common_flags_are_there(script):
    common = {"env_id", "output_dir", "seed", "num_envs", "num_eval_episodes"}
    if script != "eval":
        common.add("resume")
    assert common <= fields(script).keys()
    assert ("vla" if script == "sft" else "checkpoint") in fields(script)


def test_importing_a_script_has_no_side_effect(tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
sys.argv = ["x", "--no-such-flag"]
import mani_skill.envs  # rich, which it imports where it is installed, draws one number
import numpy, random, torch
def state():
    return random.getstate(), torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist()
before = state()
import {", ".join(SCRIPTS)}
assert before == state()
assert not torch.cuda.is_initialized()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert list(tmp_path.iterdir()) == []
