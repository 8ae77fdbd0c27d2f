"""Copies the policy of an evaluated run into checkpoints/, without what only a resume reads.

    python benchmark/ship.py runs/PickCube-v1__sft__1__ipi checkpoints/PickCube-v1__sft

The card of the checkpoint goes along. It says how good the policy is.
"""

import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import tyro

from plumbing.card import CARD_NAME, NOT_EVALUATED
from plumbing.checkpoint import checksums, damage
from plumbing.run import one_line_errors
from world.tasks import UserError

# What only a resume reads.
TRAINING = ("training_state.safetensors", "heads.safetensors", "value_head.safetensors")


def ship(checkpoint: Path, output: Path) -> None:
    """Copies the files of a checkpoint except TRAINING, with checksums of their own.

    What was at `output` is replaced. Raises UserError where the checkpoint is damaged.
    """
    damaged = damage(checkpoint)
    if damaged:
        raise UserError(f"{checkpoint} is damaged ({damaged}): nothing was copied")
    new = output.with_name(f"{output.name}.tmp")
    shutil.rmtree(new, ignore_errors=True)
    shutil.copytree(checkpoint, new, ignore=shutil.ignore_patterns(*TRAINING))
    (new / "checksums.json").write_text(json.dumps(checksums(new)))
    # The folder gets its name last, so it is whole or not there.
    shutil.rmtree(output, ignore_errors=True)
    new.rename(output)


def main(run: tyro.conf.Positional[Path], output: tyro.conf.Positional[Path]) -> None:
    """run: a run's folder, evaluated, because its card says how good it is. output: the copy."""
    card = run / "checkpoint" / CARD_NAME
    # A card is written anew with each checkpoint, so an older evaluation does not count.
    if not card.exists() or NOT_EVALUATED in card.read_text():
        raise UserError(f"{run} is no evaluated run: first eval.py --checkpoint {run}")
    if output.exists() and not (output / "args.json").exists():
        raise UserError(f"{output} is something else than a checkpoint: give another folder")
    ship(run / "checkpoint", output)


if __name__ == "__main__":
    with one_line_errors():
        tyro.cli(main)
