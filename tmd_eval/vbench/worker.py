"""Runs inside VBench's environment, as a script: one request in a JSON file, one reply in another.

It must not import the project, whose packages conflict with VBench's. Called as
``python -I worker.py REQUEST REPLY``; the request is ``{"action": "import", "dimensions"}`` or ``{"action": "score",
"dimension", "videos", "full_info", "work", "device"}``; the reply ``{"ok": true, ...}`` or ``{"ok": false, "error",
"message", "traceback"}``. All connections to the network are refused: a metric whose weights are missing must fail,
not fetch something that nobody recorded.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any


def refuse_network(event: str, arguments: tuple[Any, ...]) -> None:
    """Audit hook: no connections but to sockets of this machine's own processes."""
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        raise PermissionError(f"no network in a VBench worker (wanted {arguments[1][0]})")


def why_not(dimension: str) -> str | None:
    """Why a dimension cannot be imported, None if it can.

    In a forked process: several dimensions put folders with modules named ``utils`` on the path, and one must not pass
    thanks to another.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        reason = ""
        try:
            importlib.import_module(f"vbench.{dimension}")
        except BaseException as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        os.write(writing, reason.encode()[:4000])
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:  # noqa: PTH123 - a descriptor
        reason = pipe.read().decode(errors="replace")
    status = os.waitpid(child, 0)[1]
    return reason or (None if status == 0 else f"the import ended the process with status {status}")


def score(request: dict[str, Any]) -> dict[str, Any]:
    """Let the official package score a folder of videos in one dimension; returns its own result file's entry."""
    import torch
    from vbench import VBench

    # a torch.device, not a string: with the string "cuda", motion smoothness depends on the GPU's memory
    vbench = VBench(torch.device(request["device"]), request["full_info"], request["work"])
    dimension = request["dimension"]
    vbench.evaluate(
        videos_path=request["videos"], name="run", dimension_list=[dimension], local=True, mode="custom_input"
    )
    results = json.loads(Path(request["work"], "run_eval_results.json").read_text())
    aggregate, rows = results[dimension]
    return {"aggregate": aggregate, "rows": rows}


def main() -> None:
    """Answer one request."""
    sys.addaudithook(refuse_network)
    request = json.loads(Path(sys.argv[1]).read_text())
    try:
        if request["action"] == "import":
            importlib.import_module("vbench.utils")  # torch and torchvision, once for all
            reply = {"ok": True, "reasons": {name: why_not(name) for name in request["dimensions"]}}
        else:
            reply = {"ok": True, **score(request)}
    except Exception as error:
        reply = {"ok": False, "error": type(error).__name__, "message": str(error), "traceback": traceback.format_exc()}
    Path(sys.argv[2]).write_text(json.dumps(reply))


if __name__ == "__main__":
    main()
