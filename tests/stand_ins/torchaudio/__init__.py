"""In the place of torchaudio, where it is not installed: ComfyUI imports it when it starts, and uses it for sound alone."""

import sys
import types

__version__ = "0.0"


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})


for _name in ("functional", "transforms"):
    _module = sys.modules[f"{__name__}.{_name}"] = globals()[_name] = types.ModuleType(f"{__name__}.{_name}")
    _module.__getattr__ = __getattr__
