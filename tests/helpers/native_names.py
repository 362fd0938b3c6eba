"""Networks in diffusers' names as ComfyUI's own loaders want them; run inside a ComfyUI."""

import comfy.model_detection
from original_names import original_anima, original_krea


def native(state):
    """A transformer's weights by ComfyUI's names, None for a UNet's.

    Its converter knows FLUX.1's names: here those of FLUX.2 that differ, and the bias that it looks for and FLUX.2 lacks.
    """
    if "txt_norm.weight" in state:  # Qwen-Image's names are diffusers'
        return dict(state)
    if "distilled_guidance_layer.in_proj.weight" in state:  # Chroma, which is FLUX.1 but for these
        names = {
            name: name.replace(".linear_1.", ".in_layer.").replace(".linear_2.", ".out_layer.") for name in state if "distilled" in name
        }
        apart = {there: state[here] for here, there in names.items()}
        return {**comfy.model_detection.convert_diffusers_mmdit({k: v for k, v in state.items() if k not in names}, ""), **apart}
    if "time_embed.t_embedder.linear_1.weight" in state:
        return original_anima(state, {})
    if "text_fusion.projector.weight" in state:
        return original_krea(state)
    if "single_stream_modulation.linear.weight" not in state:
        return comfy.model_detection.convert_diffusers_mmdit(state, "")
    state = {name.replace("time_guidance_embed", "time_text_embed"): value for name, value in state.items()}
    shared = {name.replace(".linear.", ".lin."): state.pop(name) for name in [*state] if "stream_modulation" in name}
    found = comfy.model_detection.convert_diffusers_mmdit({**state, "x_embedder.bias": state["x_embedder.weight"][:, 0]}, "")
    found.pop("img_in.bias")
    return {**found, **shared}
