"""Optimisation of the noise that a sampler starts from, by a reward.

`settings` is the table of methods, `optimise` the loops, `images` runs them under a prompt.
"""
