"""A random state dict in the layout of the published Inception file."""

from __future__ import annotations

import torch


def random_state():
    """Names and shapes of `pt_inception-2015-12-05-6726825d.pth`, with activations of about one."""
    from torchvision.models.inception import Inception3

    with torch.device("meta"):
        wanted = Inception3(num_classes=1008, aux_logits=False, init_weights=False).state_dict()
    rng, state = torch.Generator().manual_seed(7), {}
    for key, value in sorted(wanted.items()):
        if key.endswith("num_batches_tracked"):
            continue  # the published file is older than these
        drawn = torch.randn(value.shape, generator=rng)
        scale = (2 / value[0].numel()) ** 0.5 if value.ndim > 1 else 0.1
        state[key] = drawn * scale + float(key.endswith(("bn.weight", "running_var")))
        if key.endswith("running_var"):
            state[key] = state[key].abs()
    return state


def images_of(size):
    """Two images of 8 bits with edges and a gradient, (2,3,height,width) in [0,1]."""
    height, width = size
    rows, columns = torch.arange(height)[:, None], torch.arange(width)[None]
    planes = [(rows * 7 + columns * 3) % 256, (rows * columns) % 251, ((rows // 9 + columns // 5) % 2 * 255).expand(height, width)]
    image = torch.stack([p.expand(height, width) for p in planes]).float() / 255
    return torch.stack([image, image.flip(2) * 0.5]).mul(255).round() / 255
