"""The adapters of one network, by name: LoRAs by peft, and whole versions of its weights from full fine-tuning.

`base` means none; `tuned`, and what an objective has beside it, is what training moves; any others are frozen. One adapter is active at a
time, and beside each of them the training adapter where there is one: it undoes a distillation while a model trains, and belongs to no
result.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..policy import Lora
from .full_tuning import WeightSwap, weights_of

TRAINING = "training_adapter"
"""The training adapter."""
_PEFT_NAMES = {"tuned": "default"}  # peft's own name of a first adapter, which parameter names in checkpoints carry


class Adapters:
    """Attach, activate and merge adapters of `network`.

    Switching costs no walk over the network: peft's layers are listed once per attached adapter.
    """

    def __init__(self, network: Any, targets: Collection[str]) -> None:
        self.network = network
        self.targets = targets
        """The modules that a LoRA without targets of its own adapts."""
        self.active = "tuned"
        self._beside: tuple[str, ...] = ()  # the training adapter where it is on
        self._swaps: dict[str, WeightSwap] = {}  # adapters that are versions of the weights
        self._attached: set[str] = set()
        self._layers: dict[str, Any] = {}  # peft's layers by module name
        self._inside: dict[nn.Module, set[nn.Module]] = {}  # modules of a block
        self._merged: list[tuple[nn.Module, nn.Parameter, nn.Parameter]] = []  # module, its weight, weight with the adapter inside
        adaptable = ((name, module) for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d))
        self._adaptable: dict[str, nn.Linear | nn.Conv2d] = dict(adaptable)

    def __contains__(self, name: object) -> bool:
        return name in self._names()

    def _names(self) -> set[str]:
        return {"base", "tuned", *self._attached, *self._swaps} - {TRAINING}

    def check(self, name: str) -> None:
        """Raise ValueError unless the adapter is loaded."""
        if name not in self:
            raise ValueError(f"no adapter {name!r} is loaded: use one of {', '.join(sorted(self._names()))}")

    @property
    def tuned(self) -> bool:
        """Whether a tuned model exists beside the base."""
        return "tuned" in self._attached or "tuned" in self._swaps

    @property
    def merged(self) -> bool:
        """Whether the active adapter is merged into the weights, so that no gradient reaches it."""
        return bool(self._merged)

    # -- attaching -------------------------------------------------------------------------------------------------

    def attach(self, name: str, lora: Lora, *, trained: bool = False) -> dict[str, nn.Parameter]:
        """Add a LoRA; returns its float32 parameters by peft's names, `<module>.lora_A.<adapter>.weight`.

        B is zero, so the network computes what it did before. One that is not `trained` is frozen. Targets are whole module
        names or their last parts. Raises ValueError where the name is taken or no module matches.
        """
        from peft import LoraConfig

        if name in self._attached or name in self._swaps:
            raise ValueError(f"this policy already has the adapter {name!r}")
        if "tuned" in self._swaps:
            raise ValueError(f"attach the adapter {name!r} before full tuning: peft freezes every weight")
        targets = self.targets if lora.targets is None else lora.targets
        modules = self.matching(targets)
        if not modules:
            raise ValueError(f"no module of this model is called {', '.join(targets)}: nothing to train")
        alpha: Any = lora.alpha  # peft computes with any number, and types it int
        pattern = "|".join(map(re.escape, modules))  # exact: peft would match a list by last parts
        before = [(p, p.requires_grad) for p in self.network.parameters()]
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are intended
                warnings.filterwarnings("ignore", "TorchaoLoraLinear was instantiated")  # quantised weights are never merged
                settings = LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=pattern, init_lora_weights=True)
                self.network.add_adapter(settings, _peft_name(name))
        finally:
            for parameter, flag in before:
                parameter.requires_grad_(flag)
        self._attached.add(name)
        self._beside = (TRAINING,) if TRAINING in self._attached else ()
        self._list_layers()
        for layer in self._layers.values():
            for side in (layer.lora_A, layer.lora_B):
                if _peft_name(name) in side:  # peft leaves a second adapter on the CPU where the network is on the meta device
                    side[_peft_name(name)].to(layer.base_layer.weight.device, torch.float32).requires_grad_(trained)
        self._switch(self.active)
        return self.parameters(name)

    def _list_layers(self) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        self._layers = {name: layer for name, layer in self.network.named_modules() if isinstance(layer, BaseTunerLayer)}
        self._inside.clear()

    def matching(self, targets: Collection[str]) -> list[str]:
        """The adaptable modules that are called one of `targets`, or else whose last parts are."""
        whole = {target for target in targets if target in self._adaptable}
        ends = tuple(f".{target}" for target in targets if target not in whole)
        return [name for name in self._adaptable if name in whole or name.endswith(ends)]

    def adaptable(self) -> Mapping[str, nn.Linear | nn.Conv2d]:
        """The network's own linear and convolutional modules by name, adapted or not."""
        return self._adaptable

    def parameters(self, name: str = "tuned") -> dict[str, nn.Parameter]:
        """An adapter's parameters by peft's names; those of a version of the weights by their own names."""
        if name in self._swaps:
            return dict(self._swaps[name].tuned)
        key = _peft_name(name)
        sides = ((path, half, getattr(layer, f"lora_{half}")) for path, layer in self._layers.items() for half in "AB")
        return {f"{path}.lora_{half}.{key}.weight": side[key].weight for path, half, side in sides if key in side}

    # -- full tuning -----------------------------------------------------------------------------------------------

    def tune_weights(self, names: Collection[str] | None = None, adapter: str = "tuned") -> dict[str, nn.Parameter]:
        """Make copies of the network's parameters `names` (default: all) an adapter; the originals stay as `base`."""
        if adapter in self._attached or adapter in self._swaps:
            raise ValueError(f"this policy already has the adapter {adapter!r}")
        active = self.active
        self._switch("base")
        self._swaps[adapter] = WeightSwap(self.network, names)
        self._switch(active)
        return self._swaps[adapter].tuned

    @property
    def original(self) -> dict[str, nn.Parameter]:
        """The base version of the weights that full tuning trains; empty with a LoRA."""
        return self._swaps["tuned"].original if "tuned" in self._swaps else {}

    def network_weights(self) -> dict[str, nn.Parameter]:
        """The network's own parameters in their active version, by name."""
        return {name: module.get_parameter(key) for name, module, key in weights_of(self.network)}

    # -- switching -------------------------------------------------------------------------------------------------

    @contextmanager
    def using(self, name: str, block: nn.Module | None = None) -> Generator[None]:
        """Activate an adapter inside the `with`, and the one before it afterwards.

        `block` limits the switch to a part of the network, the only one that is evaluated inside.
        """
        if name == self.active:
            yield
            return
        self.check(name)
        before, merged = self.active, self._merged
        self._unmerge()
        self._switch(name, block)
        try:
            yield
        finally:
            self._switch(before, block)
            self._merge(merged)

    def _switch(self, name: str, block: nn.Module | None = None) -> None:
        self.active = name
        inside = self._modules_of(block) if block is not None else None
        for other, swap in self._swaps.items():
            if other != name:
                swap.activate(tuned=False, within=inside)
        if name in self._swaps:
            self._swaps[name].activate(tuned=True, within=inside)
        active = self._of_peft(name)
        for layer in self._layers.values():
            if inside is None or layer in inside:
                # not by peft's methods, which also set requires_grad
                layer._disable_adapters = not active
                if active:
                    layer._active_adapter = active

    def _of_peft(self, name: str) -> list[str]:
        """peft's names of what is active with an adapter."""
        return [_peft_name(each) for each in (name, *self._beside) if each != "base"]

    @contextmanager
    def without_training(self) -> Generator[None]:
        """Inside, the training adapter is off: the model as images are drawn with it."""
        beside, merged = self._beside, self._merged
        if not beside:
            yield
            return
        self._unmerge()
        self._beside = ()
        self._switch(self.active)
        try:
            yield
        finally:
            self._beside = beside
            self._switch(self.active)
            self._merge(merged)

    def _modules_of(self, block: nn.Module) -> set[nn.Module]:
        if block not in self._inside:
            self._inside[block] = set(block.modules())
        return self._inside[block]

    # -- merging ---------------------------------------------------------------------------------------------------

    @contextmanager
    def merging(self) -> Generator[None]:
        """Inside, the weights are W + (alpha/rank)·BA of what is active, which costs no more than the base model.

        Afterwards the original tensors are put back. They are kept meanwhile: one more copy of the adapted matrices.
        """
        if self._merged or self.active == "base":
            yield
            return
        self._merge(self._merged_weights(self._of_peft(self.active)))
        try:
            yield
        finally:
            self._unmerge()

    @torch.no_grad()
    def _merged_weights(self, names: list[str]) -> list[tuple[nn.Module, nn.Parameter, nn.Parameter]]:
        return [
            (module, module.weight, nn.Parameter(sum(deltas, cast(Tensor, module.weight)), requires_grad=False))
            for layer in self._layers.values()
            if (deltas := [layer.get_delta_weight(name) for name in names if name in layer.lora_A])
            for module in [layer.get_base_layer()]
        ]

    def _merge(self, weights: list[tuple[nn.Module, nn.Parameter, nn.Parameter]]) -> None:
        self._merged = weights
        for module, _, weight in weights:
            module.weight = weight
        if weights:
            for layer in self._layers.values():
                layer._disable_adapters = True

    def _unmerge(self) -> None:
        if self._merged:
            for module, weight, _ in self._merged:
                module.weight = weight
            self._merged = []
            self._switch(self.active)


def _peft_name(adapter: str) -> str:
    return _PEFT_NAMES.get(adapter, adapter)
