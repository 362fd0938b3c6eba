"""The tests of the nodes on every ComfyUI that is found and can start, oldest first.

Usage: ladder.py [ARGUMENT OF PYTEST ...]. Prints a line for each; exits with 1 if one fails. Where to look: helpers/hosts.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as xml
from pathlib import Path

from helpers.hosts import ROOT, hosts, left_out, version


def run(place, arguments, report):
    """pytest on one ComfyUI: its exit code, and how many passed, failed and were skipped."""
    environment = {**os.environ, "COMFYUI_PATH": str(place)}
    command = [sys.executable, "-m", "pytest", f"--junitxml={report}", *(arguments or ["tests/nodes"])]
    code = subprocess.run(command, cwd=ROOT, env=environment).returncode
    if not report.is_file():
        return code, 0, 1, 0
    suite = xml.parse(report).getroot().find("testsuite").attrib
    failed, skipped = int(suite["failures"]) + int(suite["errors"]), int(suite["skipped"])
    return code, int(suite["tests"]) - failed - skipped, failed, skipped


def main(arguments):
    lines, bad = [], False
    with tempfile.TemporaryDirectory() as folder:
        for i, place in enumerate(hosts()):
            print(f"ComfyUI {version(place)}, {place}", flush=True)
            code, passed, failed, skipped = run(place, arguments, Path(folder, f"{i}.xml"))
            lines.append(f"ComfyUI {version(place)}: {passed} passed, {failed} failed, {skipped} skipped")
            bad = bad or code != 0
    print("\n".join([*left_out(), *(lines or ["skipped: no ComfyUI (name checkouts in COMFYUI_LADDER)"])]))
    return int(bad)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
