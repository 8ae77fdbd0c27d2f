"""The simulator's side: tasks, environments, demonstrations. It knows no algorithm and no model."""
