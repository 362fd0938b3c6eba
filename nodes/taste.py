"""Choices between the images that a graph makes: kept per user, asked for in the browser, read by Load Pairs and the headless trainer."""

from __future__ import annotations

import json
from collections import Counter, OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy_api.latest import io, ui
from PIL.PngImagePlugin import PngInfo

from ..trainer.data.images import to_pil
from ..trainer.scoring.origin import Origin, origin
from ..trainer.taste.choices import save_image
from ..trainer.taste.questions import Questions
from . import host
from .sockets import CATEGORY, pixels, schema
from .taste_route import Access, add_routes, questions_of
from .taste_sets import DEFAULT_USER

EVENT = "imagerefl.taste"
KINDS = {"pairs": "pair", "best of n": "best", "like or dislike": "thumb"}
_USERS: OrderedDict[str, str] = OrderedDict()  # by tab, where there are several users
_MOST_TABS = 1000
_DELETIONS: Counter[str] = Counter()  # by name


def register_routes() -> None:
    """The routes of the running server; called once, when ComfyUI loads the pack."""
    server = host.server()
    if server is not None:
        temporary = Path(folder_paths.get_temp_directory())
        add_routes(server.routes, Access(host.user_of, host.user_folder, lambda: temporary, _changed, _deleted, _seen))


def _changed(name: str) -> None:
    server = host.server()
    if server is not None:
        server.send_sync(EVENT, {"name": name})


def _deleted(name: str) -> None:
    _DELETIONS[name] += 1


def _seen(client: str, user: str) -> None:
    _USERS[client] = user
    _USERS.move_to_end(client)
    while len(_USERS) > _MOST_TABS:
        _USERS.popitem(last=False)


def mine(name: str) -> Questions:
    """The set of a name, of the user whose tab queued what runs now."""
    user = _USERS.get(host.client() or "") if host.has_users() else DEFAULT_USER
    if user is None:
        raise ValueError("this ComfyUI has several users, and whose tab queued this is not known: reload the page, and queue again")
    return questions_of(host.user_folder(user), name)


class CollectPreferences(io.ComfyNode):
    """IMAGE -> questions in the browser, and the images."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Sockets and texts."""
        return schema(
            node_id="ImageReFLTaste",
            display_name="Collect Preferences (Taste)",
            category=f"{CATEGORY}/training",
            description="Asks which of the images it is given you prefer: pairs, the best of n, or a thumb for each. It never waits: "
            "choose whenever you like, by mouse or keyboard. Load Pairs and the headless trainer read the choices.",
            search_aliases=[
                *("human feedback", "pairwise comparison", "best of n", "thumbs up", "like dislike", "rate images", "image chooser"),
                *("preference data", "rlhf", "annotate"),
            ],
            is_output_node=True,
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            shown=("name", "ask", "n"),
            inputs=[
                io.Image.Input(
                    "images", tooltip="What to ask about. Pairs and the best of n are made of images of one prompt, over many runs."
                ),
                io.String.Input("name", default="taste", tooltip="Choices of one name are one file: letters, digits, _ and -."),
                io.Combo.Input(
                    "ask",
                    options=list(KINDS),
                    tooltip="pairs: which of two. best of n: which of n, worth n-1 pairs. like or dislike: one image at a time.",
                ),
                io.Int.Input("n", default=4, min=2, max=9, tooltip="Images of one question where ask is best of n."),
                io.String.Input("person", default="", tooltip="Who chooses, where several people do: written to each choice."),
                io.Boolean.Input(
                    "save_metadata", default=False, tooltip="Keep the workflow in the saved images. Off: they hold pixels alone."
                ),
                io.String.Input(
                    "prompt", optional=True, force_input=True, tooltip="Not connected: read from the graph, at the images' sampler."
                ),
                io.Int.Input(
                    "seed", optional=True, force_input=True, min=0, max=2**64 - 1, tooltip="Not connected: read from the graph, if it says."
                ),
            ],
            outputs=[io.Image.Output("images_out", display_name="images", tooltip="The images, unchanged.")],
        )

    @classmethod
    def fingerprint_inputs(cls, name: str = "", **_: Any) -> int:
        """Asks again about the same images where the choices of this name were deleted."""
        return _DELETIONS[name]

    @classmethod
    def execute(
        cls,
        images: torch.Tensor,
        name: str,
        ask: str,
        n: int,
        person: str,
        save_metadata: bool,
        prompt: str | None = None,
        seed: int | None = None,
    ) -> io.NodeOutput:
        """Save the images, ask, and pass them on."""
        one, found = mine(name), _origin(cls.hidden)
        text = (prompt if prompt is not None else found.prompt or "").strip()
        if not text:
            why = "it is empty" if prompt is not None else found.unclear or "the graph does not tell"
            raise ValueError(f"no prompt for these images ({why}): connect its text to prompt")
        metadata = _metadata(cls.hidden) if save_metadata and not host.args.disable_metadata else None
        made = [
            save_image(one.folder, to_pil(image), found.seed if seed is None else seed, found.model, metadata) for image in pixels(images)
        ]
        added = one.add(made, KINDS[ask], text, n, person.strip()[:256])
        _changed(name)
        said = f"{added.questions} new questions in {name}" + (f"; {added.known} images were asked about before" if added.known else "")
        said += f"; {added.refused} images found no place: choose first" if added.refused else ""
        return io.NodeOutput(images, ui=ui.PreviewText(said))


def _origin(hidden: Any) -> Origin:
    graph, number = getattr(hidden, "prompt", None), getattr(hidden, "unique_id", None)
    return origin(graph, str(number)) if isinstance(graph, Mapping) and number is not None else Origin(None, None, None)


def _metadata(hidden: Any) -> PngInfo:
    info = PngInfo()
    for key, value in {"prompt": hidden.prompt, **(hidden.extra_pnginfo or {})}.items():
        if value is not None:
            info.add_text(key, json.dumps(value))
    return info


NODES = [CollectPreferences]
