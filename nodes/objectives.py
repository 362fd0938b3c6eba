"""One node per objective of the trainer: its widgets are the dataclass's fields, so that a new objective appears by itself."""

from __future__ import annotations

import inspect
from typing import Any

from comfy_api.latest import io

from ..trainer.objectives import OBJECTIVES
from .sockets import CATEGORY, Objective, collected, schema, widgets

# Other words for which people search
_ALIASES = ["reward gradient", "reward fine-tuning", "rlhf", "preference optimization", "policy gradient"]


def objective_node(name: str, objective: type[Any]) -> type[io.ComfyNode]:
    """The node of one objective."""

    class Node(io.ComfyNode):
        @classmethod
        def define_schema(cls) -> io.Schema:
            """Sockets and texts."""
            return schema(
                node_id=f"ImageReFLObjective{objective.__name__}",
                display_name=f"Objective: {objective.title}",
                category=f"{CATEGORY}/training",
                description=" ".join(inspect.cleandoc(objective.__doc__ or "").split()),
                search_aliases=[objective.__name__, *_ALIASES],
                inputs=widgets(objective, objective.unread),
                outputs=[Objective.Output("objective", display_name="OBJECTIVE", tooltip="For Train LoRA (any objective).")],
            )

        @classmethod
        def execute(cls, **values: Any) -> io.NodeOutput:
            """The objective; impossible settings are refused here, before any step."""
            return io.NodeOutput((name, collected(objective, values)))

    Node.__name__ = f"Objective{objective.__name__}"
    return Node


NODES = [objective_node(name, cls) for name, cls in OBJECTIVES.items()]
