"""The folders of runs: their names, their locks, and which run another one starts from."""

import contextlib
import fcntl
import os
import time
from pathlib import Path

from plumbing import parallel
from plumbing.checkpoint import ROOT, check_folder, first_line, read_settings
from world.tasks import UserError

# The locks that this process holds until it ends, by folder.
LOCKS: dict[Path, int] = {}
# What only a run writes. A log file in the folder, as batch systems write it, is no run.
RUN_FILES = (
    "checkpoint",
    "checkpoint.old",
    "checkpoint.new",
    "events.out.tfevents.*",
    "demos_*.h5",
    "rollouts",
    "source.txt",
    "results.json",
)
# Runs from before args.json named its script have an argument that no other script has.
OWN_ARGUMENT = {"num_demos": "sft", "num_initial_states": "sta_tpo", "num_steps": "sta_ppo"}


# ---- locks and names ----
def lock_run(folder: Path) -> None:
    """Keeps other processes out of a run's folder. Raises UserError when one is in it."""
    folder = folder.resolve()
    if folder in LOCKS:
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UserError(
            f"another process is at work in {folder}: wait for it, stop it, "
            "or choose another --output-dir"
        ) from None
    # Some file systems of networks have no locks.
    except OSError as error:
        print(f"warning: {folder} cannot be locked ({error.strerror}): start no second run in it")
    LOCKS[folder] = handle


def is_locked(folder: Path) -> bool:
    """Whether a process is at work in a run's folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        # Shared locks keep no other reader out.
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    # On file systems without locks nobody can tell.
    except OSError:
        return False
    finally:
        os.close(handle)
    return False


def make_folder(env_id: str, script: str, seed: int) -> Path:
    """A new folder in runs/. env_id: task, or several with commas between them."""
    # --demo-path has commas between its files.
    env_ids = env_id.replace(",", "+")
    runs = Path("runs")
    runs.mkdir(exist_ok=True)
    begun = int(time.time())
    while True:
        folder = runs / f"{env_ids}__{script}__{seed}__{begun}"
        try:
            folder.mkdir()
            return folder
        # Another run has begun in the same second.
        except FileExistsError:
            begun += 1


def holds_run(folder: Path) -> bool:
    """Whether there is a file that only a run writes."""
    return any(any(folder.glob(name)) for name in RUN_FILES)


# ---- where a run starts ----
def find_checkpoint(env_id: str, scripts: tuple[str, ...]) -> str:
    """The newest checkpoint in runs/ of the first of `scripts` that was run on this env.

    If there is none, the one that the repository ships. It prints which it takes, and which it
    passes over. Rank 0 searches for all processes of a job. Raises UserError where there is none.
    """
    found = None
    if parallel.rank() == 0:
        found = search_runs(env_id, scripts)
    taken, passed_over = parallel.from_rank_0(found)
    others = f"; passed over: {', '.join(passed_over)}" if passed_over else ""
    if not Path(taken).is_dir():
        raise UserError(
            f"no checkpoint for {env_id}: run `python sft.py --env-id {env_id}` first, "
            f"or give --checkpoint{others}"
        )
    print(f"no --checkpoint given, so this run starts from {taken}{others}")
    return taken


def search_runs(env_id: str, scripts: tuple[str, ...]) -> tuple[str, list[str]]:
    """The checkpoint to take, see `find_checkpoint`, and the runs that are passed over."""
    found = []
    passed_over = []
    # A run that died while it saved may have a checkpoint.old alone.
    places = [*Path("runs").glob("*/checkpoint"), *Path("runs").glob("*/checkpoint.old")]
    for run in {path.parent for path in places}:
        script, env_ids = made_by(run)
        if script in scripts and env_id in env_ids:
            found.append((scripts.index(script), -saved_at(run), run))
        elif not script:
            passed_over.append(f"{run} (no args.json that names its script and task)")
    for *_, run in sorted(found):
        reason = unusable(run)
        if not reason:
            return str(run / "checkpoint"), passed_over
        passed_over.append(f"{run} ({reason})")
    return str(ROOT / "checkpoints" / f"{env_id}__sft"), passed_over


def made_by(run: Path) -> tuple[str, list[str]]:
    """The script and the tasks of a run; "" where nothing tells the script."""
    # The folder's name tells them where args.json does not.
    env_ids, _, rest = run.name.partition("__")
    script = rest.partition("__")[0]
    try:
        settings = read_settings(run / "checkpoint")
        env_ids = settings["env_id"]
        for argument, its_script in OWN_ARGUMENT.items():
            if argument in settings:
                script = its_script
        script = settings.get("script") or script
    # A file may hold anything.
    except (UserError, KeyError):
        pass
    return script, str(env_ids).replace("+", ",").split(",")


def saved_at(run: Path) -> float:
    """When a run's newest checkpoint was saved, in seconds."""
    for name in ("checkpoint", "checkpoint.old"):
        # The run may be at work, and rename it just now.
        with contextlib.suppress(FileNotFoundError):
            return (run / name).stat().st_mtime
    return 0


def unusable(run: Path) -> str:
    """Why no other run may start from a run's checkpoint; "" where it may."""
    try:
        if is_locked(run):
            return "another process is at work in it"
        if not (run / "checkpoint").is_dir():
            return "it died while it saved: --resume puts its checkpoint back"
        check_folder(run / "checkpoint")
    # A file may hold anything, so any error may come up.
    except Exception as error:
        return first_line(error)
    return ""
