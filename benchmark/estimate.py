"""How long ./ipi.sh will take on this machine, from some seconds of its two kinds of work.

    python benchmark/estimate.py PickCube-v1

It measures env steps and updates alone, and counts how many of each the scripts' defaults need.
"""

import math
import os
import sys
from pathlib import Path
from typing import Annotated

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see sta_ppo.py
sys.path.insert(0, str(Path(__file__).parent.parent))

import tyro
from speed_part import env_rate, sample_ms, update_ms

import sft
import sta_ppo
import sta_tpo
from plumbing.run import one_line_errors
from world.assets import choose_renderer
from world.tasks import UserError, env_ids, get_task

# The model of every task has the same size, and this one is shipped.
SHIPPED = "PickCube-v1"


def count_steps(env_id: str, num_eval_episodes: int) -> int:
    """Env steps of the whole chain: demonstrations, roll-outs, interaction, three evaluations."""
    task = get_task(env_id)
    horizon = task.max_episode_steps
    imitation, preference, interaction = sft.Args(), sta_tpo.Args(), sta_ppo.Args()
    # A demonstration takes the expert's own time, divided by its speed.
    demos = imitation.num_demos * sum(task.pace) / imitation.demo_speed
    rollouts = preference.num_initial_states * preference.rollouts_per_state * horizon
    evaluations = 3 * (task.grid or num_eval_episodes) * horizon
    return math.ceil(demos + rollouts + interaction.total_timesteps + evaluations)


def count_samples(env_id: str) -> int:
    """Frames that go through a forward and a backward pass in the whole chain."""
    imitation, preference, interaction = sft.Args(), sta_tpo.Args(), sta_ppo.Args()
    demos = imitation.num_updates * imitation.batch_size
    horizon = get_task(env_id).max_episode_steps
    # At most each step of a roll-out is a part of one pair.
    pairs = preference.num_initial_states * preference.rollouts_per_state * horizon
    return demos + pairs + interaction.update_epochs * interaction.total_timesteps


def main(
    env_id: Annotated[str, tyro.conf.Positional] = "PickCube-v1", num_eval_episodes: int = 300
) -> None:
    """Prints the estimate. num_eval_episodes: of each of the three evaluations."""
    choose_renderer("auto")
    env_id, *others = env_ids(env_id)
    if others:
        raise UserError("./ipi.sh takes one task: sta_tpo.py and sta_ppo.py know no more")
    num_envs = sft.Args().num_envs
    # Seconds per env step: simulation and pictures, and an action of the policy.
    simulate = 1 / env_rate(env_id, num_envs)
    act = sample_ms(SHIPPED, num_envs) / 1000 / num_envs
    learn = update_ms(SHIPPED, 64) / 1000 / 64
    seconds = count_steps(env_id, num_eval_episodes) * (simulate + act)
    seconds += count_samples(env_id) * learn
    print(f"about {max(1, round(seconds / 60))} minutes in all on this machine")


if __name__ == "__main__":
    with one_line_errors():
        tyro.cli(main)
