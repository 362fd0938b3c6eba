"""Start a ComfyUI once, and run scripts of this folder in copies of it: the start is most of what a small script takes.

Usage: serve.py COMFYUI PACK. Reads lines of JSON (script, arguments, cwd, out, err), runs each in a fork, and prints its exit status.
"""

import json
import os
import runpy
import signal
import sys
import traceback
from pathlib import Path

import embedded  # first: it puts ComfyUI on the path
import torch

HERE = Path(__file__).resolve().parent
SECONDS = 900


def run(script, arguments, cwd, out, err):
    """In the fork: the script as if it had been started by itself."""
    signal.alarm(SECONDS)
    os.chdir(cwd)
    for number, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
    embedded.arguments[:] = arguments
    torch.set_num_threads(1)  # renews the pool that a fork leaves broken: threads that load weights would race for it
    runpy.run_path(str(HERE / script), run_name="__main__")


for line in sys.stdin:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            run(**json.loads(line))
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
