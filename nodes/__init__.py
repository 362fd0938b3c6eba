"""The ComfyUI side of the pack: the only place that imports ComfyUI."""

from comfy_api.latest import ComfyExtension, io

from . import switch


class Extension(ComfyExtension):
    """What ComfyUI asks for the pack's nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Every node of the pack."""
        return switch.NODES
