"""Denoisers of functions."""

from __future__ import annotations


class ToyDenoiser:
    """`function(x, sigma)` as the denoiser of some prompts, which are counted."""

    def __init__(self, prompts, function):
        self.prompts, self.function = prompts, function

    def __call__(self, x, sigma):
        assert len(self.prompts) == len(x) == len(sigma)
        return self.function(x, sigma)

    def rows(self, index):
        return ToyDenoiser([self.prompts[i] for i in index.tolist()], self.function)
