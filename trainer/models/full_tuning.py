"""Two versions of a network's weights, the originals and tuned ones, either of which can be in place.

What changes places are the parameters themselves: nothing is copied, and a graph keeps the version that it was built with.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import nn


class Versions:
    """The parameters `names` of a network (all of them without), twice; the tuned ones start equal and in place.

    Names are the network's own before any adapter was put into it; adapters have one version.
    """

    def __init__(self, network: nn.Module, names: Collection[str] | None = None) -> None:
        self.original: dict[str, nn.Parameter] = {}
        self.tuned: dict[str, nn.Parameter] = {}
        self._places: dict[str, tuple[nn.Module, str]] = {}
        for name, module, key in places(network):
            if names is None or name in names:
                self._places[name] = module, key
                self.original[name] = module.get_parameter(key)
                self.tuned[name] = nn.Parameter(self.original[name].detach().clone(), requires_grad=False)
        self.show(tuned=True)

    def show(self, *, tuned: bool) -> None:
        """Put one version in place."""
        for name, parameter in (self.tuned if tuned else self.original).items():
            module, key = self._places[name]
            setattr(module, key, parameter)


def places(network: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Each parameter's name without adapters, the module that has it, and its name there."""
    for path, module in network.named_modules():
        if ".lora_" not in path:
            for key, _ in module.named_parameters(recurse=False):
                yield f"{path}.{key}".replace(".base_layer.", ".").removeprefix("."), module, key
