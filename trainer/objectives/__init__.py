"""Reward-gradient objectives; an objective's fields are the config keys, the CLI flags and the node widgets."""

from .rollout import ImageReFL, ReFL

OBJECTIVES = {"refl": ReFL, "imagerefl": ImageReFL}
"""Every objective by the name that configs use."""

__all__ = ["OBJECTIVES", "ImageReFL", "ReFL"]
