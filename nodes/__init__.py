"""The ComfyUI side of the pack: the only place that imports ComfyUI."""

import logging

from comfy_api.latest import ComfyExtension, io

from . import combined, demo, host, judging, lora, objectives, rewards, scoring, sweep, switch, training


class Extension(ComfyExtension):
    """What ComfyUI asks for the pack's nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Every node of the pack."""
        rewards.register_folder()
        modules = [switch, combined, lora, rewards, scoring, training, objectives, judging, sweep, demo]
        if host.PROBLEM:
            logging.warning(host.PROBLEM)
            modules = [module for module in modules if module not in (switch, combined)]
        return [node for module in modules for node in module.NODES]
