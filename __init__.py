"""ImageReFL for ComfyUI. Nothing is imported here at module level: ComfyUI calls the entry point, pytest must not."""

WEB_DIRECTORY = "./web"  # help pages


async def comfy_entrypoint():
    """The extension that ComfyUI loads."""
    from .nodes import Extension

    return Extension()
