"""Shared by the scripts about weights and patches: a small network of ComfyUI's own layers in any storage, and strange layers."""

import hashlib
import sys
import types
from pathlib import Path

import embedded  # first: it puts ComfyUI on the path
import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.weight_adapter
import torch
from torch import nn

package = types.ModuleType(f"{embedded.spec.name}.nodes")  # without its nodes, which take long to import
package.__path__ = [str(Path(embedded.pack) / "nodes")]
sys.modules[package.__name__] = package
gates, host, residency, same = (embedded.ours(f"nodes.{name}") for name in ("gate", "host", "residency", "same"))

CPU, WIDTH = torch.device("cpu"), 96  # 96 x 96 float32 is above the 16 KiB under which dynamic VRAM attaches nothing
Quantized = getattr(comfy.ops, "QuantizedTensor", None)
rng = torch.Generator().manual_seed(0)
WEIGHTS = {
    "first.weight": torch.randn(WIDTH, WIDTH, generator=rng) / 10, "first.bias": torch.randn(WIDTH, generator=rng),
    "norm.weight": 1 + torch.randn(WIDTH, generator=rng) / 10, "norm.bias": torch.randn(WIDTH, generator=rng) / 10,
    "conv.weight": torch.randn(WIDTH, WIDTH, 3, generator=rng) / 17, "conv.bias": torch.randn(WIDTH, generator=rng),
    "last.weight": torch.randn(WIDTH, WIDTH, generator=rng) / 10, "last.bias": torch.randn(WIDTH, generator=rng),
}  # fmt: skip
X = torch.randn(2, 5, WIDTH, generator=rng)


class Block(nn.Module):
    def __init__(self, ops, dtype, linear=None):
        super().__init__()
        linear = linear or ops.Linear
        self.first, self.last = (linear(WIDTH, WIDTH, device=CPU, dtype=dtype) for _ in range(2))
        self.norm = ops.LayerNorm(WIDTH, device=CPU, dtype=dtype)
        self.conv = ops.Conv1d(WIDTH, WIDTH, 3, padding=1, device=CPU, dtype=dtype)

    def forward(self, x):
        return self.last(self.conv(self.norm(self.first(x)).movedim(-1, 1)).movedim(1, -1))


class Network(nn.Module):
    """What the switch asks of a BaseModel."""

    def __init__(self, block):
        super().__init__()
        self.diffusion_model, self.model_sampling, self.latent_format = block, nn.Module(), object()
        self.model_config = types.SimpleNamespace(unet_config={})


def network(ops=comfy.ops.manual_cast, dtype=torch.float32, linear=None, store=None, norm_dtype=None):
    """The same weights in a storage; `store` turns a matrix of a Linear into what its layer holds."""
    block = Block(ops, dtype, linear)
    for name, value in WEIGHTS.items():
        layer, kind = getattr(block, name.partition(".")[0]), name.partition(".")[2]
        value = value.to(norm_dtype or dtype)
        if store is not None and kind == "weight" and name[:4] in ("firs", "last"):
            value = store(layer, WEIGHTS[name])
        setattr(layer, kind, value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False))
    return Network(block)


def lora(size, seed=3, biases=True):
    """Patches of `size` times the weights' own: LoRAs of the matrices, differences of norms and biases."""
    rng, patches = torch.Generator().manual_seed(seed), {}
    for name, value in WEIGHTS.items():
        if value.ndim > 1:
            up, down = (torch.randn(shape, generator=rng) for shape in ((WIDTH, 4), (4, value[0].numel())))
            scale = size * float(value.std()) / 2
            patches[f"diffusion_model.{name}"] = comfy.weight_adapter.LoRAAdapter(set(), (up * scale, down, 4.0, None, None, None))
        elif biases:
            patches[f"diffusion_model.{name}"] = ("diff", (size * torch.randn(value.shape, generator=rng),))
    return patches


def patcher(model, kind=None):
    return (kind or comfy.model_patcher.ModelPatcher)(model, CPU, CPU)


BASE, TUNED = (), (1,)  # the adapters that are on


def gated(base, tuned):
    """The switched model and its gate, as the switch makes them."""
    shared, early, late = residency.split(base, tuned)
    return gates.gated(shared, [early, late])


def parts(tensor):
    if Quantized is not None and isinstance(tensor, Quantized):
        return [p for name in tensor.__tensor_flatten__()[0] for p in parts(getattr(tensor, name))]
    return [tensor.detach().contiguous().view(torch.uint8)] if tensor.ndim else [tensor.detach().reshape(1).view(torch.uint8)]


def digest(model):
    """Of every byte of every parameter."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.named_parameters()):
        found.update(name.encode())
        for part in parts(tensor):
            found.update(part.numpy().tobytes())
    return found.hexdigest()


def distance(a, b):
    """Relative root mean square; 0.0 is bit for bit."""
    return 0.0 if torch.equal(a, b) else float((a.float() - b.float()).square().mean().sqrt() / b.float().square().mean().sqrt())


def cast(layer, x, **kwargs):
    """The weight with which a layer computes, and its bias."""
    return [host.plain(t, t.dtype).float() for t in comfy.ops.cast_bias_weight(layer, x, **kwargs)[:2]]


class Resident(comfy.ops.manual_cast.Linear):
    """Hands its weight functions the stored tensor itself, as the streaming of dynamic VRAM does."""

    def forward(self, x):
        weight, bias = self.weight, self.bias
        for function in self.weight_function:
            weight = function(weight)
        for function in self.bias_function:
            bias = function(bias)
        return nn.functional.linear(x, weight, bias)


class Dynamic(comfy.model_patcher.ModelPatcher):
    """Attaches weight wrappers to layers above 16 KiB alone, as ModelPatcherDynamic does."""

    def load(self, *args, **kwargs):
        super().load(*args, **kwargs)
        for module in self.model.modules():
            if hasattr(module, "weight_function") and comfy.model_management.module_size(module) <= 16 * 1024:
                module.weight_function, module.bias_function = [], []


class OwnPatches(comfy.ops.manual_cast.Linear):
    """As the layers of GGUF models: weight functions are there and ignored; the stored tensor's own patches are added when decoded."""

    def decoded(self):
        weight = self.weight.detach().float() / 2000
        for patches, key in getattr(self.weight, "patches", []):
            weight = comfy.lora.calculate_weight(patches, weight, key)
        return weight

    def forward(self, x):
        return nn.functional.linear(x, self.decoded(), self.bias)


class Ignoring(OwnPatches):
    """And one that takes no patches at all."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight.float() / 2000, self.bias)


def listing(_layer, weight):
    stored = nn.Parameter((weight * 2000).round().to(torch.int16), requires_grad=False)
    stored.patches = []
    return stored


def quantized(format_, dtype, layer, weight):
    """A matrix as a layer of a quantised checkpoint holds it, without the hardware that multiplies in the format."""
    layer.quant_format, layer.layout_type, layer._full_precision_mm = format_, comfy.ops.QUANT_ALGOS[format_]["comfy_tensor_layout"], True
    return Quantized.from_float(weight.to(dtype), layer.layout_type)
