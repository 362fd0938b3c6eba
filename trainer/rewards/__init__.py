"""Rewards: differentiable scores of images under prompts."""
