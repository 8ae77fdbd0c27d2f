"""The model card of a checkpoint: README.md in its folder, which the hub shows."""

from world.tasks import TASKS

CARD_NAME = "README.md"

# What a card says of the success before an evaluation.
NOT_EVALUATED = "not evaluated yet"
# The hub reads the lines between the dashes.
CARD = """---
license: {licence}
library_name: transformers
pipeline_tag: robotics
tags: [vla, openvla, robot-manipulation]
---

# {title}

A vision-language-action model of [STARE-VLA](https://arxiv.org/abs/2512.05107)'s open
implementation.

{tasks}
- Success: {success}
- Made by: `{command}`
- Licence: {licence_line}

## Use

`vla.py` beside this file is all the code that the model needs, after
`pip install torch transformers pillow`.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
stats = model.config.norm_stats["{env_id}"]
# images: (B, H, W, 3) uint8 of both cameras. proprio: (B, 8), docs/data_format.md says what.
inputs = processor(images, ["{instruction}"] * len(images), proprio, stats.get("proprio"))
actions = model.predict_action(unnorm_key="{env_id}", **inputs)  # (B, 7), greedy
```
"""


def can_have_card(settings: dict) -> bool:
    """Whether a checkpoint's args.json is of a script here, and not a stranger's or missing."""
    known = set(str(settings.get("env_id")).split(",")) <= TASKS.keys()
    return known and "command" in settings


def model_card(settings: dict, config, success: str) -> str:
    """The text of the card.

    settings: what args.json holds. config: the model's. success: a line of eval.py's.
    """
    # The tiny model is all our own. An OpenVLA's weights have a licence of their own.
    is_tiny = bool(config.vision_widths)
    env_ids = settings["env_id"].split(",")
    tasks = []
    for env_id in env_ids:
        task = TASKS[env_id]
        stages = ", ".join(task.stages)
        tasks.append(f'- Task: {env_id}, "{task.instruction}". Stages: {stages}')
    return CARD.format(
        title=f"{settings['env_id']}, {settings.get('method', 'SFT')}",
        tasks="\n".join(tasks),
        success=success,
        command=settings["command"],
        licence="mit" if is_tiny else "other",
        licence_line="MIT" if is_tiny else "that of the model that the training began with",
        env_id=env_ids[0],
        instruction=TASKS[env_ids[0]].instruction,
    )
