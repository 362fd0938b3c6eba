"""One loss of an objective outside a run."""

from __future__ import annotations

from trainer.objectives import RunContext


def loss_of(objective, policy, batch, reward, **context):
    """Loss () and logs of one micro-batch."""
    return objective.begin(RunContext(policy, reward, **context))(batch)
