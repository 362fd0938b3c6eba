"""Full fine-tuning: two versions of a network's weights, of which one is active.

Activating a version replaces the modules' `nn.Parameter` objects. Nothing is copied, and an autograd graph keeps the
version that it was built with.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import nn


class WeightSwap:
    """The original and the tuned version of the parameters `names` of a network (default: all); the tuned ones are active.

    Names are those of the network without adapters; adapters are not versioned. The versions are equal until trained.
    """

    def __init__(self, network: nn.Module, names: Collection[str] | None = None) -> None:
        self.original: dict[str, nn.Parameter] = {}
        self.tuned: dict[str, nn.Parameter] = {}
        self._owners: dict[str, tuple[nn.Module, str]] = {}
        for name, module, key in weights_of(network):
            if names is None or name in names:
                self._owners[name] = module, key
                self.original[name] = module.get_parameter(key)
                self.tuned[name] = nn.Parameter(self.original[name].detach().clone(), requires_grad=False)
        self.activate(tuned=True)

    def activate(self, *, tuned: bool, within: Collection[nn.Module] | None = None) -> None:
        """Put one version into the network, or only into the modules `within` it."""
        for name, parameter in (self.tuned if tuned else self.original).items():
            module, key = self._owners[name]
            if within is None or module in within:
                setattr(module, key, parameter)


def weights_of(network: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Each parameter that belongs to no adapter: its name without peft's wrappers, its module, its name there."""
    for path, module in network.named_modules():
        if ".lora_" not in path:
            for key, _ in module.named_parameters(recurse=False):
                yield f"{path}.{key}".replace(".base_layer.", ".").removeprefix("."), module, key
