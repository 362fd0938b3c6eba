"""The ComfyUI side of the pack: the only place that imports ComfyUI."""

from comfy_api.latest import ComfyExtension, io

from . import combined, demo, judging, lora, objectives, rewards, scoring, sweep, switch, training


class Extension(ComfyExtension):
    """What ComfyUI asks for the pack's nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Every node of the pack."""
        rewards.register_folder()
        modules = (switch, combined, lora, rewards, scoring, training, objectives, judging, sweep, demo)
        return [node for module in modules for node in module.NODES]
