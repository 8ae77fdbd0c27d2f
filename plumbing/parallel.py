"""Data-parallel training: one process per GPU, started by `torchrun`.

Without a job there is one process, and these functions do nothing.
"""

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist


def join(cuda: bool) -> tuple[int, int, torch.device]:
    """Joins the job that `torchrun` started, if there is one.

    cuda: use the GPU if there is one. Returns the process's rank, the number of processes, and the
    device. Only rank 0 prints and writes.
    """
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    cuda = cuda and torch.cuda.is_available()
    if world_size > 1 and not dist.is_initialized():
        # The others wait for rank 0 while it makes demonstrations or evaluates, perhaps for hours.
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(days=7))
        if rank > 0:
            sys.stdout = open(os.devnull, "w")
        if cuda:
            torch.cuda.set_device(local_rank)
    if cuda:
        return rank, world_size, torch.device("cuda", local_rank)
    return rank, world_size, torch.device("cpu")


def barrier() -> None:
    """Waits until every process of the job has come here."""
    if dist.is_initialized():
        dist.barrier()


def sum_over_processes(tensors: list[torch.Tensor | None]) -> None:
    """Sums tensors over the processes of a job, in place. None is a weight without a gradient."""
    if not dist.is_initialized():
        return
    for x in tensors:
        if x is not None:
            dist.all_reduce(x)


def largest_over_processes(x: torch.Tensor) -> None:
    """Replaces a tensor by its element-wise maximum over the processes of a job, in place."""
    if dist.is_initialized():
        dist.all_reduce(x, op=dist.ReduceOp.MAX)


def gather(value: object) -> list:
    """What every process of the job gives here, by rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_rank_0(value: object) -> object:
    """What rank 0 gives here. The other processes wait for it."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def concatenate(x: torch.Tensor, rank: int, world_size: int) -> torch.Tensor:
    """The tensors (R, B) of all processes, one behind the other: (R, world_size * B)."""
    B = x.shape[1]
    everyone = x.new_zeros(len(x), world_size * B)
    everyone[:, rank * B : (rank + 1) * B] = x
    sum_over_processes([everyone])
    return everyone
