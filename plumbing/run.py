"""What every training run needs: signals, one-line errors, its folder, its log, named symptoms.

A script calls these in order. `one_line_errors` stands around main. `Run` locks the folder and
reads the checkpoint to resume from. `run.open` makes the folder, once everything else is known to
work, so that a mistake leaves nothing behind. The loop `while Stop.hold(...)` logs with `run.log`
and saves when `Stop.asked()`.
"""

import contextlib
import importlib.util
import math
import multiprocessing
import os
import select
import shutil
import signal
import sys
import threading
import time
import uuid
import weakref
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from plumbing import parallel
from plumbing.checkpoint import load_state, read_settings, recover
from plumbing.folders import holds_run, lock_run, make_folder
from world.tasks import UserError

# Seconds until the first line of a progress report that is not on a terminal, and between two.
# The first line says how long this machine will take.
FIRST_LINE = 10
HEARTBEAT = 30
PATIENCE = 8  # seconds that a process has for its end after a second signal
SIGNALS = (signal.SIGINT, signal.SIGTERM)
STOPPED = "a training run goes on with --resume and its --output-dir"


# ---- signals and errors ----
class Stop:
    """What SIGINT (Ctrl-C) and SIGTERM do.

    They end a script at once, except in a training loop: there the update ends first and is saved.
    A second signal does not wait for the update. It lets a save go on for PATIENCE seconds.
    """

    signals: list[int] = []
    held = False  # a training loop is running
    leaving = False  # the loop has seen a signal and saves
    watched = False  # a thread reads the signals too

    @classmethod
    def catch(cls, number: int, frame) -> None:
        """The signal handler."""
        cls.signals.append(number)
        again = len(cls.signals) > 1 and not cls.leaving
        if again or not cls.held:
            raise KeyboardInterrupt

    @classmethod
    def watch(cls) -> None:
        """Makes sure that a second signal ends this process.

        Python calls a handler in the main thread alone, which may hang in a library: in a file, in
        a pipe, in a sum over processes. The system writes each signal into a pipe for this thread.
        """
        if cls.watched:
            return
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=end_after_two, args=(reader,), daemon=True).start()
        cls.watched = True

    @classmethod
    def hold(cls, more: bool) -> bool:
        """The condition of a training loop: while `more` is true, signals wait for `asked`.

        Raises KeyboardInterrupt after `asked` was true, or where a signal came after the last one.
        """
        if cls.leaving:
            raise KeyboardInterrupt
        if cls.signals and not more:
            raise KeyboardInterrupt
        cls.held = more
        return more

    @classmethod
    def asked(cls) -> bool:
        """Whether a signal has come, so that the loop must save now and leave.

        In a data-parallel job all processes must call it, because all leave when one was asked to.
        """
        cls.leaving = any(parallel.gather(bool(cls.signals)))
        return cls.leaving


def end_after_two(pipe: int) -> None:
    """Ends this process and its env processes PATIENCE seconds after a second signal.

    pipe: each signal's number is read from it, as a byte.
    """
    asked = 0
    while asked < 2:
        (number,) = os.read(pipe, 1)
        asked += number in SIGNALS
    # The main thread is quicker, unless it hangs or saves.
    time.sleep(PATIENCE)
    for process in multiprocessing.active_children():
        process.kill()
    with contextlib.suppress(OSError, ValueError):
        # The reader of a pipe may hang too.
        _, writable, _ = select.select([], [2], [], 0)
        if writable:
            os.write(2, f"stopped at the second signal; {STOPPED}\n".encode())
    os._exit(128 + number)


@contextlib.contextmanager
def one_line_errors():
    """Ends a script in one line where the user or the machine is at fault, and not the code.

    The exit code is 2 for an error, and 128 + the signal's number after a signal. The code's own
    faults keep their traceback.
    """
    for number in SIGNALS:
        signal.signal(number, Stop.catch)
    Stop.watch()
    line = ""
    code = 0
    try:
        yield
    except KeyboardInterrupt:
        # A second signal ends the script here.
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        # Killing env processes is quicker than asking them to end and waiting.
        for process in multiprocessing.active_children():
            process.kill()
        # Without a signal of its own, this process follows another one of its job.
        number = Stop.signals[-1] if Stop.signals else signal.SIGTERM
        saved = "the last update is saved, " if Stop.leaving else ""
        line = f"stopped; {saved}{STOPPED}"
        code = 128 + number
    except (
        UserError,
        OSError,
        RuntimeError,
        MemoryError,
        SafetensorError,
        UnicodeEncodeError,
    ) as error:
        reason = explain(error)
        if not reason:
            raise
        line = f"error: {reason}"
        code = 2
    if line:
        print(line, file=sys.stderr)
    # Nothing is left to save. A library that hangs at the end must not keep the process.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    if code:
        sys.exit(code)


def first_line(text: str) -> str:
    """The first line of a text that may be empty."""
    return next(iter(text.splitlines()), "")


def explain(error: Exception) -> str:
    """One line that says what the user can do about an error; "" where the code is at fault."""
    line = first_line(str(error))
    if isinstance(error, UserError):
        return line
    out_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    if out_of_memory or "allocate memory" in line or "out of memory" in line:
        return (
            "out of memory: lower --num-envs; where it trains --chunk-size too, "
            "or add --gradient-checkpointing or --lora-rank 32"
        )
    if "invalid device ordinal" in line:
        gpus = torch.cuda.device_count()
        return f"more processes than GPUs on this node: give torchrun --nproc-per-node {gpus}"
    if torch.distributed.is_initialized():
        if "gloo" in line or isinstance(error, torch.distributed.DistError):
            return (
                "another process of this job died, its own lines say why: give the command again, "
                "with --resume and the job's --output-dir"
            )
    if isinstance(error, UnicodeEncodeError):
        return "a name has letters that this locale cannot write: set LC_ALL=C.UTF-8"
    # Readers catch these errors themselves, so here they come from writing.
    if isinstance(error, (SafetensorError, shutil.Error)):
        return f"cannot use the disk: {line}"
    if isinstance(error, OSError):
        return explain_os_error(error)
    return ""


def explain_os_error(error: OSError) -> str:
    """The line for a file that cannot be used; "" where the system names neither file nor limit."""
    too_many_files, disk_full, quota = 24, 28, 122
    if not error.filename and error.errno not in (too_many_files, disk_full, quota):
        return ""
    line = f"cannot use {error.filename or 'the disk'}: {first_line(error.strerror)}"
    if error.errno == too_many_files:
        line += ", lower --num-envs"
    return line


# Numbers that are at most 1, in any script.
SHARES = ("gamma", "gae_lambda", "kl_anneal", "stage_resets", "demo_slip", "demo_pause")


def check_numbers(given: dict, least: dict[str, float]) -> None:
    """Checks the command line before anything is made.

    given: all arguments by name. least: the smallest value allowed, 0 for names that it lacks.
    Raises UserError where a number is not finite, too small or, as a share, above 1, where the seed
    is too large, and where --track or --backend ask for what is not installed.
    """
    for name, value in given.items():
        if not isinstance(value, (int, float)):
            continue
        flag = name.replace("_", "-")
        smallest = least.get(name, 0)
        if not (math.isfinite(value) and value >= smallest):
            raise UserError(f"--{flag} must be a finite number, at least {smallest}, not {value}")
        if name in SHARES and value > 1:
            raise UserError(f"--{flag} must be at most 1, not {value}")
    for name in ("max_grad_norm", "beta"):
        if given.get(name) == 0:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} 0 makes every gradient 0, so nothing would be learned")
    if given["seed"] >= 2**32:
        # Random generators take no larger seeds.
        raise UserError(f"--seed must be below {2**32}, not {given['seed']}")
    if given.get("track") and not importlib.util.find_spec("wandb"):
        raise UserError("--track needs wandb: `pip install wandb`, or leave it out")
    if given.get("backend") == "cuda" and not torch.cuda.is_available():
        raise UserError("--backend cuda needs an NVIDIA GPU: leave it out")


def refuse_nan(losses: dict[str, float], output: Path, batch: dict[str, torch.Tensor]) -> None:
    """Raises UserError when a loss or gradient is not a finite number.

    The weights are lost then, but the last checkpoint is whole. The batch is kept in `output`.
    """
    bad = [name for name, value in losses.items() if not math.isfinite(value)]
    if not bad:
        return
    file = output / f"nan_batch{os.environ.get('RANK', '')}.safetensors"
    new = file.with_suffix(".tmp")
    save_file({name: x.detach().contiguous() for name, x in batch.items()}, new)
    new.rename(file)
    raise UserError(
        f"not finite: {', '.join(bad)}. The batch is in {file}. "
        "Go on from the last checkpoint with --resume and a lower --learning-rate"
    )


# ---- the run's folder ----
class Run:
    """A training run's folder: its lock, the state to resume from, its TensorBoard log.

    Making one reads and writes nothing, except that with `resume` it locks the folder, repairs its
    checkpoint and reads it. `open` makes the folder. Rank 0 alone writes.
    """

    def __init__(self, script: str, output_dir: str, resume: bool, rank: int):
        """script: "sft", "sta_tpo" or "sta_ppo". Raises UserError where it cannot be resumed."""
        if resume and not output_dir:
            raise UserError("--resume needs the run's --output-dir")
        self.script = script
        self.folder = Path(output_dir)
        self.rank = rank
        self.writer = None
        self.warned: set[str] = set()
        # The training state of the checkpoint to go on from, and its args.json.
        self.state: dict | None = None
        self.settings: dict = {}
        if resume:
            if rank == 0 and self.folder.is_dir():
                lock_run(self.folder)
                recover(self.folder)
            parallel.barrier()
            self.state = load_state(self.folder, script)
        if self.state:
            settings = read_settings(self.folder / "checkpoint")
            # Runs from before LoRA trained all weights.
            self.settings = {"lora_rank": 0, **settings}
        before = self.state["wall_s"] if self.state else 0
        self.start = time.time() - before

    def seconds(self) -> float:
        """How long the run has taken, including the time before it was resumed."""
        return time.time() - self.start

    def check_same(self, flag: str, name: str, now: object) -> None:
        """Raises UserError where a resumed run was begun with another value of a setting."""
        begun = self.settings.get(name, now)
        if begun != now:
            raise UserError(
                f"{self.folder} was begun with {flag} = {begun}, not {now}: resume with the same"
            )

    def restore(self, model, optimizer: torch.optim.Optimizer) -> None:
        """Puts back what the checkpoint's training state holds: Adam's moments, a LoRA adapter."""
        # The learning rates are this call's own.
        optimizer.load_state_dict({**optimizer.state_dict(), "state": self.state["moments"]})
        model.load_state_dict(self.state["adapter"], strict=False)

    def open(self, settings: dict, output_dir: str, step: int) -> None:
        """Makes the folder and the TensorBoard writer, without what was logged after `step`.

        settings: all arguments, to be logged. output_dir: "" makes a new folder under runs/.
        Raises UserError when the folder holds a run already and --resume was not given.
        """
        if self.rank == 0:
            if not output_dir:
                self.folder = make_folder(settings["env_id"], self.script, settings["seed"])
            self.folder.mkdir(parents=True, exist_ok=True)
            lock_run(self.folder)
            if holds_run(self.folder) and not settings["resume"]:
                raise UserError(
                    f"{self.folder} holds a run already: add --resume to go on with it, "
                    "or choose another --output-dir"
                )
            self.print_changes(settings)
            if settings["track"]:
                log_to_wandb(self.folder, settings)
            self.writer = SummaryWriter(self.folder, purge_step=step + 1)
            rows = "\n".join(f"|{key}|{value}|" for key, value in settings.items())
            self.writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{rows}")
        self.folder = Path(parallel.from_rank_0(str(self.folder)))
        if not self.folder.is_dir():
            raise UserError(
                f"process {self.rank} cannot see {self.folder}: "
                "the nodes of a job need a file system that they share"
            )

    def print_changes(self, settings: dict) -> None:
        """Says that the run is resumed, and which settings differ from those before."""
        if not self.state:
            return
        changed = []
        for name, value in settings.items():
            if name in ("resume", "checkpoint", "output_dir"):
                continue
            before = self.settings.get(name, value)
            if before != value:
                changed.append(f"--{name.replace('_', '-')} {before} -> {value}")
        if changed:
            print(f"resumed with other settings than before: {', '.join(changed)}")
        else:
            print("resumed")

    def log(self, scalars: dict[str, float], step: int) -> None:
        """Writes scalars to TensorBoard."""
        if self.rank == 0:
            for name, value in scalars.items():
                self.writer.add_scalar(name, value, step)

    def log_evaluation(
        self, result: dict, seconds: float, step: int, label: str = "", suffix: str = ""
    ) -> None:
        """Writes what eval.evaluate returned, and prints its success after `label`.

        suffix: is added to each metric's name, where a run has several tasks.
        """
        scalars = {f"time/eval{suffix}": seconds}
        for name, value in result.items():
            if isinstance(value, float):
                scalars[f"eval/{name}{suffix}"] = value
        self.log(scalars, step)
        episodes = len(result["episodes"])
        print(f"{label}success_once {result['success_once']:.3f} over {episodes} episodes")

    def warn(self, lines: list[str]) -> None:
        """Prints warnings, each of them once in a run."""
        for line in lines:
            if line not in self.warned:
                print(f"warning: {line}")
                self.warned.add(line)

    def close(self) -> None:
        """Ends the log of a run that has finished."""
        self.writer.close()
        print(f"wrote {self.folder / 'checkpoint'} after {self.seconds():.0f} s")


# ---- what a run reports while it works ----
def log_to_wandb(folder: Path, settings: dict) -> None:
    """Sends what TensorBoard logs to Weights & Biases, too. WANDB_MODE=offline keeps it here."""
    # Only those who log there have it.
    import wandb

    # A resumed run goes on under the id that it had.
    file = folder / "wandb_id.txt"
    if not file.exists():
        file.write_text(uuid.uuid4().hex)
    try:
        wandb.init(
            project="stare-vla",
            name=folder.name,
            id=file.read_text(),
            resume="allow",
            config=settings,
            sync_tensorboard=True,
        )
    except wandb.Error as error:
        raise UserError(
            f"--track: {first_line(str(error))}; run `wandb login`, or set WANDB_MODE=offline"
        ) from None


class Progress(tqdm):
    """tqdm's bar on a terminal. Elsewhere (nohup, a log file, CI) a plain line now and then.

    In a job of several processes only rank 0 shows it.
    """

    def __init__(self, *args, **kwargs):
        self.is_bar = sys.stderr.isatty()
        self.ended = threading.Event()
        if parallel.rank() > 0:
            kwargs["disable"] = True
        if not self.is_bar:
            # Every step updates `n`, because a line may be due at any time. With `leave` tqdm
            # would end with an empty line.
            kwargs |= {"mininterval": 0, "miniters": 1, "leave": False}
        super().__init__(*args, **kwargs)
        if not self.is_bar and not self.disable:
            # A thread prints the lines, because one step may take longer than HEARTBEAT.
            arguments = (weakref.ref(self), self.ended)
            threading.Thread(target=print_lines, args=arguments, daemon=True).start()

    def display(self, msg=None, pos=None) -> bool | None:
        """Draws the bar, where there is one."""
        if self.is_bar:
            return super().display(msg, pos)

    def close(self) -> None:
        """Ends the bar or the lines."""
        self.ended.set()
        super().close()

    def line(self) -> str:
        """What is being done, how far it is, and how long it takes."""
        seconds = self.format_dict["elapsed"]
        line = f"{self.desc.removesuffix(': ')}: {self.n} of {self.total} {self.unit}s"
        line += f" after {self.format_interval(seconds)}"
        done_here = self.n - self.initial
        if done_here:
            left = seconds * (self.total - self.n) / done_here
            line += f", {self.format_interval(left)} to go"
        return line


def print_lines(progress: weakref.ref, ended: threading.Event) -> None:
    """Prints a line after FIRST_LINE and every HEARTBEAT seconds until the loop has ended."""
    pause = min(FIRST_LINE, HEARTBEAT)
    while not ended.wait(pause):
        pause = HEARTBEAT
        bar = progress()
        # A loop that an error has left never closes its bar.
        if bar is None:
            return
        print(bar.line(), file=sys.stderr, flush=True)
        # Otherwise this thread would keep the bar alive while it waits.
        del bar


class Metrics:
    """Means over an update of what its minibatches report.

    A minibatch is worked off in chunks, and each process of a job has a share of it. So `add` takes
    the weight of a chunk, and the weights of a minibatch add up to 1 over chunks and processes.
    """

    def __init__(self):
        self.minibatches: list[dict[str, torch.Tensor]] = []
        self.sums: dict[str, torch.Tensor] = {}

    def add(self, weight: float, **values: torch.Tensor) -> None:
        """Adds a chunk's values, each a tensor of one element. Nothing waits for the GPU here."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + weight * value.detach()

    def end_minibatch(self) -> None:
        """Closes a minibatch: its means are those over all chunks and processes."""
        means = torch.stack(list(self.sums.values()))
        parallel.sum_over_processes([means])
        self.minibatches.append(dict(zip(self.sums, means)))
        self.sums = {}

    def first(self, name: str) -> float:
        """The value of the update's first minibatch."""
        return self.minibatches[0][name].item()

    def last(self, name: str) -> float:
        """The value of the update's latest minibatch."""
        return self.minibatches[-1][name].item()

    def mean(self, name: str) -> float:
        """The mean over the update's minibatches."""
        return torch.stack([row[name] for row in self.minibatches]).mean().item()


# ---- symptoms: what is wrong, read off the logged numbers ----
def ppo_symptoms(first: dict, now: dict, weight: float, gap: float = 0.05) -> list[str]:
    """Lines that name what is wrong with a PPO run.

    first: the scalars logged after the run's first complete round of episodes. now: those of the
    present update. weight: of the stage reward. gap: by how many nats rounding alone may part the
    log-probabilities of an action.
    """
    lines = []
    ratio_off = abs(now["losses/first_ratio"] - 1) > gap / 5
    if ratio_off or now["losses/rollout_update_logprob_gap"] > gap:
        lines.append(
            "the ratio on the first minibatch is not 1: roll-out and update compute different "
            "log-probabilities (mode, dropout, padding or dtype)"
        )
    if now["losses/entropy"] < 0.3 * first["losses/entropy"]:
        lines.append(
            "the entropy has collapsed to less than a third: the policy tries nothing new; "
            "lower --learning-rate or add --kl-coef"
        )
    if "charts/success_once" not in first:
        return lines
    success = now["charts/success_once"] - first["charts/success_once"]
    shaped = now["charts/shaped_return"] - first["charts/shaped_return"]
    if success >= -0.2:
        return lines
    if shaped > 0.02 and weight:
        lines.append(
            "the shaped return rises while success falls: the policy collects the stage reward "
            "instead of the task; lower --shaping-weight"
        )
    else:
        lines.append(
            "sampled success falls: the steps are too large for the gradient of such a batch; "
            "lower --learning-rate or raise --num-envs"
        )
    return lines


def tpo_symptoms(chosen_shift: float, lead: float) -> list[str]:
    """Lines that name what is wrong with a preference run.

    chosen_shift: nats that the winners' actions have gained over the reference. lead: how many
    more than the losers' actions.
    """
    if chosen_shift < -1 and lead > 0:
        return [
            "logps/chosen falls while the margin grows: both sides are pushed down, the rejected "
            "one more; lower --learning-rate or raise --beta"
        ]
    return []
