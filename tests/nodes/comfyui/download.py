"""Run inside a ComfyUI: Download Reward, from a hub that is an HTTP server of our own.

Usage: download.py COMFYUI PACK. Prints one JSON line.
"""

import asyncio
import hashlib
import http.server
import json
import os
import threading
import time
from pathlib import Path

CONTENT = bytes(range(256)) * 2**17  # 32 MiB; the client writes 10 MiB at a time
asked, slow, served = [], threading.Event(), {"content": CONTENT}


class Hub(http.server.BaseHTTPRequestHandler):
    """Any file of any repository."""

    def _head(self):
        content = served["content"]
        asked.append(f"{self.command} {self.path}")
        self.send_response(200 if "missing" not in self.path else 404)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", "c" * 40)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        return content

    def do_HEAD(self):
        self._head()

    def do_GET(self):
        content = self._head()
        try:
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            if slow.is_set():
                time.sleep(60)
            self.wfile.write(content[len(content) // 2 :])
        except OSError:  # the other side was stopped
            pass

    def log_message(self, *_):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
server.daemon_threads = True
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ.update(HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_DISABLE_XET="1")
os.environ.pop("HF_HUB_OFFLINE", None)

import embedded  # first of ComfyUI: it puts it on the path
import comfy.model_management as management
import comfy.utils
import execution
import folder_paths
import nodes as stock

results, values = {}, []
root = Path("rewards").resolve()
folder_paths.folder_names_and_paths["rewards"] = ([str(root)], {".safetensors"})
extension = asyncio.run(embedded.module.comfy_entrypoint())
N = {node.define_schema().node_id: node for node in asyncio.run(extension.get_node_list())}
folder_paths.folder_names_and_paths["rewards"] = ([str(root)], {".safetensors"})
node = N["ImageReFLDownloadReward"]


def progress(value, total, preview, node_id=None):
    values.append((value, total))
    if slow.is_set() and value > 2**20:
        results["before Cancel"] = parts()
        management.interrupt_current_processing(True)


def files():
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() and ".cache" not in path.parts)


def parts():
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if "incomplete" in path.name or path.suffix == ".lock")


def said(output):
    return output.ui.as_dict()["text"][0]


comfy.utils.set_progress_bar_global_hook(progress)
output = node.execute("pickscore", False)
results["not accepted"] = [said(output), output.result[0].message, len(asked), root.exists()]

slow.set()
begin = time.monotonic()
try:
    node.execute("pickscore", True)
    results["cancelled"] = False
except management.InterruptProcessingException:
    results["cancelled"] = [max(value for value, _ in values) > 0, time.monotonic() - begin < 30, files(), parts(), root.exists()]
slow.clear()
management.interrupt_current_processing(False)

values.clear()
output = node.execute("pickscore", True)
record = json.loads((root / "pickscore" / "model.safetensors.json").read_text("utf-8"))
path = root / "pickscore" / "model.safetensors"
results["downloaded"] = [output.result[0], files(), parts(), path.read_bytes() == CONTENT, said(output), values[-1]]
results["recorded"] = [record["sha256"] == hashlib.sha256(CONTENT).hexdigest(), record["revision"]]
number = len(asked)
results["again"] = [node.execute("pickscore", True).result[0], node.execute("pickscore", False).result[0], len(asked) - number]

path.unlink()
served["content"] = CONTENT[::-1]
try:
    node.execute("pickscore", True)
except ValueError as problem:
    results["changed"] = [str(problem), path.exists()]
served["content"] = CONTENT
node.execute("pickscore", True)

stock.NODE_CLASS_MAPPINGS.update({name: kind for name, kind in N.items() if name in ("ImageReFLDownloadReward", "ImageReFLLoadReward")})
prompt = {
    "1": {"class_type": "ImageReFLDownloadReward", "inputs": {"name": "pickscore", "accept_licence": True}},
    "2": {"class_type": "ImageReFLLoadReward", "inputs": {"name": ["1", 0]}},
}
valid = asyncio.run(execution.validate_prompt("a", prompt, None))
results["connects to Load Reward Model"] = [valid[0], [error["type"] for one in valid[3].values() for error in one["errors"]]]
server.shutdown()
server.server_close()
try:
    node.execute("imagereward", True)
except ValueError as problem:
    results["no hub"] = str(problem)
print(json.dumps(results))
