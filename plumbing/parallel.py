"""Data-parallel training: one process per GPU, started by `torchrun`.

Without a job there is one process, and these functions do nothing. A process that waits for the
others of its job says so every 30 seconds.
"""

import contextlib
import math
import os
import sys
import threading
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from world.tasks import UserError

HEARTBEAT = 30  # seconds between two lines of a process that waits
# The environment variables by which a launcher tells a process its place in a job.
PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
ADDRESS = ("MASTER_ADDR", "MASTER_PORT")


# ---- the launcher ----
def read_place() -> tuple[int, int, int]:
    """The rank, the number of processes and the local rank that a launcher gave.

    Without a launcher they are 0, 1 and 0. Raises UserError where its variables do not fit.
    """
    given = {name: os.environ[name] for name in PLACE + ADDRESS if name in os.environ}
    place = [given.get(name, default) for name, default in zip(PLACE, "0101")]
    if not all(text.isascii() and text.isdecimal() for text in place):
        raise launcher_error(given, f"{', '.join(PLACE)} are whole numbers")
    rank, world_size, local_rank, local_size = map(int, place)
    if not local_rank <= rank < world_size:
        raise launcher_error(given, "LOCAL_RANK <= RANK < WORLD_SIZE does not hold")
    if not 1 <= local_size <= world_size:
        raise launcher_error(given, "1 <= LOCAL_WORLD_SIZE <= WORLD_SIZE does not hold")
    if world_size == 1:
        return rank, world_size, local_rank
    missing = [name for name in ("RANK", "LOCAL_RANK", *ADDRESS) if not given.get(name)]
    if missing:
        raise launcher_error(given, f"{' and '.join(missing)} not set")
    port = given["MASTER_PORT"]
    if not (port.isascii() and port.isdecimal() and 0 < int(port) < 2**16):
        raise launcher_error(given, "MASTER_PORT is a number from 1 to 65535")
    return rank, world_size, local_rank


def launcher_error(given: dict[str, str], reason: str) -> UserError:
    """The error that names a launcher's variables. given: those that are set."""
    found = " ".join(f"{name}={text}" for name, text in given.items())
    return UserError(
        f"{found} are no place in a job ({reason}): `unset {' '.join(given)}` to run one process, "
        "or start the job with torchrun"
    )


def launcher() -> list[str]:
    """The words with which a command begins that starts as many processes as there are now."""
    if not dist.is_initialized():
        return ["python"]
    world_size = dist.get_world_size()
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    nodes = world_size // per_node
    where = ["--standalone"] if nodes == 1 else ["--nnodes", str(nodes)]
    return ["torchrun", *where, "--nproc-per-node", str(per_node)]


def join(cuda: bool) -> tuple[int, int, torch.device]:
    """Joins the job that `torchrun` started, if there is one.

    cuda: use the GPU if there is one. Returns the process's rank, the number of processes, and the
    device. Only rank 0 prints and writes. Raises UserError where a launcher's variables do not fit.
    """
    rank, world_size, local_rank = read_place()
    cuda = cuda and torch.cuda.is_available()
    if cuda and local_rank >= torch.cuda.device_count():
        raise UserError(
            f"LOCAL_RANK={local_rank}, but this node has {torch.cuda.device_count()} GPUs: "
            f"give torchrun --nproc-per-node {torch.cuda.device_count()}, or --no-cuda"
        )
    if world_size > 1 and not dist.is_initialized():
        threading.Thread(target=say_waits, args=(rank, world_size), daemon=True).start()
        connect("nccl" if cuda else "gloo")
        if rank > 0:
            sys.stdout = open(os.devnull, "w")
        if cuda:
            torch.cuda.set_device(local_rank)
    if cuda:
        return rank, world_size, torch.device("cuda", local_rank)
    return rank, world_size, torch.device("cpu")


def connect(backend: str) -> None:
    """Meets the other processes of the job. Raises UserError where there is no way to them."""
    try:
        with waiting("the start of the job"):
            # The others wait for rank 0 while it makes demonstrations or evaluates, perhaps for
            # hours.
            dist.init_process_group(backend, timeout=timedelta(days=7))
    # An address that cannot be found, a port that another program uses
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"cannot start a job at {address()} (MASTER_ADDR, MASTER_PORT): {reason}"
        ) from None


def address() -> str:
    """Where the processes of the job meet."""
    return ":".join(os.environ[name] for name in ADDRESS)


def rank() -> int:
    """The process's number in its job."""
    return dist.get_rank() if dist.is_initialized() else 0


# ---- who waits, and for whom ----
class Wait:
    """What this process waits for, and since when. A thread reads it."""

    what = ""
    since = math.inf


@contextlib.contextmanager
def waiting(what: str):
    """Stands around what needs all processes of the job."""
    Wait.what = what
    Wait.since = time.monotonic()
    try:
        yield
    finally:
        Wait.since = math.inf


def say_waits(rank: int, world_size: int) -> None:
    """Prints a line every HEARTBEAT seconds of a wait, for ever."""
    since = math.inf
    due = math.inf
    while True:
        time.sleep(min(1, HEARTBEAT))
        if Wait.since != since:
            since = Wait.since
            due = since + HEARTBEAT
        now = time.monotonic()
        if now >= due:
            due += HEARTBEAT
            print(
                f"process {rank}: waiting for {world_size - 1} of {world_size} processes at "
                f"{address()}, {now - since:.0f} s by now ({Wait.what})",
                file=sys.stderr,
                flush=True,
            )


# ---- what needs all processes of the job ----
def barrier() -> None:
    """Waits until every process of the job has come here."""
    if dist.is_initialized():
        with waiting("barrier"):
            dist.barrier()


def sum_over_processes(tensors: list[torch.Tensor | None]) -> None:
    """Sums tensors over the processes of a job, in place. None is a weight without a gradient."""
    if not dist.is_initialized():
        return
    with waiting("sum"):
        for x in tensors:
            if x is not None:
                dist.all_reduce(x)


def largest_over_processes(x: torch.Tensor) -> None:
    """Replaces a tensor by its element-wise maximum over the processes of a job, in place."""
    if dist.is_initialized():
        with waiting("largest"):
            dist.all_reduce(x, op=dist.ReduceOp.MAX)


def gather(value: object) -> list:
    """What every process of the job gives here, by rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    with waiting("gather"):
        dist.all_gather_object(values, value)
    return values


def from_rank_0(value: object) -> object:
    """What rank 0 gives here. The other processes wait for it."""
    if not dist.is_initialized():
        return value
    box = [value]
    with waiting("rank 0"):
        dist.broadcast_object_list(box)
    return box[0]


def concatenate(x: torch.Tensor, rank: int, world_size: int) -> torch.Tensor:
    """The tensors (R, B) of all processes, one behind the other: (R, world_size * B)."""
    B = x.shape[1]
    everyone = x.new_zeros(len(x), world_size * B)
    everyone[:, rank * B : (rank + 1) * B] = x
    sum_over_processes([everyone])
    return everyone
