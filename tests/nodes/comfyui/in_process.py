"""Queue prompts in ComfyUI's executor, without a server."""

import inspect
from pathlib import Path

import embedded  # noqa: F401  first: it puts ComfyUI on the path
import execution
import folder_paths


def own_folders():
    """Let ComfyUI write below the current folder."""
    for name in ("output", "temp", "input", "user"):
        Path(name).mkdir(exist_ok=True)
        getattr(folder_paths, f"set_{name}_directory")(str(Path(name).resolve()))


class Server:
    """What PromptExecutor wants of a server."""

    client_id = last_node_id = last_prompt_id = None

    def __init__(self):
        self.sockets_metadata, self.sent = {}, []

    def send_sync(self, event, data, sid=None):
        self.sent.append((event, data))


def caching():
    """Settings of the cache that later versions read while they run a graph: nothing is dropped for want of memory."""
    known = inspect.signature(execution.PromptExecutor).parameters
    return {"cache_args": {"lru": 0, "ram": 0.0, "ram_inactive": 0.0}} if "cache_args" in known else {}


class Executor:
    """A fresh PromptExecutor."""

    def __init__(self):
        self.server = Server()
        self.executor = execution.PromptExecutor(self.server, **caching())

    async def run(self, name, prompt):
        """Whether a prompt, which must be valid, ran."""
        validity = await execution.validate_prompt(name, prompt, None)
        assert validity[0], validity[1:]
        assert not validity[3], validity[3]  # an invalid output would be dropped, and the rest run
        await self.executor.execute_async(prompt, name, {"client_id": "a browser"}, validity[2])
        return self.executor.success

    def problem(self):
        """Why the last prompt failed."""
        return next(data for event, data in self.executor.status_messages if event == "execution_error")["exception_message"].strip()
