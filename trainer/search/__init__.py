"""Reward search: one particle loop, whose methods differ in which particles survive.

`settings` is the table of methods, `plan` the rounds of a search and their cost, `survivors` who survives, `loop` the search.
"""
