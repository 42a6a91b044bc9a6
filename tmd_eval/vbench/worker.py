"""Runs inside VBench's environment, as a script: one request in a JSON file, one reply in another.

It must not import the project, whose packages conflict with VBench's. Called as ``python -I worker.py REQUEST REPLY``.
The request is ``{"action": "import", "dimensions"}``; ``{"action": "split", "videos": [{"path", "folder", "cuts",
"names", "first_frames", "fps"}]}``; for the actions "score", "static", "features" and "first_frames" ``{"dimension",
"weights", "videos", "results", "work", "device"}`` where each of the videos is ``{"key", "file", "path", "prompt",
"auxiliary_info"}``, ``path`` being a link to ``file``; or for "fast" ``{"tasks": [{"dimension", "weights", "videos",
"results"}], "work", "device"}``. The reply is ``{"ok": true, ...}`` or ``{"ok": false, "error", "message",
"traceback"}``. A result is appended to the file ``results``, one JSON line a video, as soon as it is there, so that a
killed worker loses one video. All connections to the network are refused: a metric whose weights are missing must fail,
not fetch something that nobody recorded.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import itertools
import json
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

INNER = {
    "aesthetic_quality": "laion_aesthetic",
    "imaging_quality": "technical_quality",
}
"""Function of the dimension's module that scores a list of videos, where it is not called after the dimension."""


STOPWATCH: Any = None
"""Where the time goes, if a benchmark asks for it."""


def load_beside(name: str) -> Any:
    """A file beside this one as a module: the package around it cannot be imported here."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def refuse_network(event: str, arguments: tuple[Any, ...]) -> None:
    """Audit hook: no connections but to sockets of this machine's own processes."""
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        raise PermissionError(f"no network in a VBench worker (wanted {arguments[1][0]})")


def why_not(module: str) -> str | None:
    """Why a module cannot be imported, None if it can.

    In a forked process: several dimensions put folders with modules named ``utils`` on the path, and one must not pass
    thanks to another.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        reason = ""
        try:
            importlib.import_module(module)
        except BaseException as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        os.write(writing, reason.encode()[:4000])
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:  # noqa: PTH123 - a descriptor
        reason = pipe.read().decode(errors="replace")
    status = os.waitpid(child, 0)[1]
    return reason or (None if status == 0 else f"the import ended the process with status {status}")


class Results:
    """Appends results of videos to a file, each line whole and synced."""

    def __init__(self, path: str, videos: list[dict[str, Any]]) -> None:
        self.file = Path(path).open("ab", buffering=0)  # noqa: SIM115 - held for the whole job
        if self.file.tell() and not Path(path).read_bytes().endswith(b"\n"):
            self.file.write(b"\n")  # after a line that a killed worker left half-written
        self.keys = {video["path"]: video["key"] for video in videos}
        self.start()

    def start(self) -> None:
        """A video begins."""
        if STOPWATCH is not None:
            STOPWATCH.reset()
        self.clocks = time.perf_counter(), time.process_time()

    def add(self, path: str, row: dict[str, Any] | None) -> None:
        """Write one video's result; None when the official code leaves the video out of the average."""
        seconds, cpu = time.perf_counter() - self.clocks[0], time.process_time() - self.clocks[1]
        value: Any = None if row is None else row["video_results"]
        if isinstance(value, bool) or hasattr(value, "item"):
            value = float(value)
        extra = {} if row is None else {k: v for k, v in row.items() if k not in ("video_path", "video_results")}
        if isinstance(value, float) and not math.isfinite(value):
            value, extra = None, {"not_a_number": str(row and row["video_results"])}
        line = {"key": self.keys[path], "value": value, "extra": extra}
        line |= {"seconds": round(seconds, 3), "cpu_seconds": round(cpu, 3)}
        if STOPWATCH is not None:
            line["parts"] = STOPWATCH.seconds
        self.file.write((json.dumps(line, default=_number) + "\n").encode())
        os.fsync(self.file.fileno())


def _number(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)


def frame_pairs(path: str) -> int:
    """Pairs of neighbouring frames, as subject consistency counts them."""
    from decord import VideoReader  # type: ignore[import-not-found]  # lives in VBench's environment

    return len(VideoReader(path, num_threads=1)) - 1


def one_by_one(inner: Callable[..., Any], dimension: str, results: Results) -> Callable[..., Any]:
    """The official function over a list of videos, called for one video after the other.

    Its models are loaded once by the official code around it, and each video's result is written when it is there. The
    aggregate of the list is not used: tmd-eval aggregates the results per video itself.
    """

    def scored(*arguments: Any, **options: Any) -> tuple[float, list[dict[str, Any]]]:
        place = next(i for i, a in enumerate(arguments) if isinstance(a, list))  # the only list of all signatures
        rows: list[dict[str, Any]] = []
        for item in arguments[place]:
            results.start()
            path = item if isinstance(item, str) else item["video_list"][0]
            try:
                _, found = inner(*arguments[:place], [item], *arguments[place + 1 :], **options)
            except ZeroDivisionError:
                if dimension != "color":
                    raise
                found = []  # no object of the prompt with any colour: the official average leaves the video out
            if found and dimension == "subject_consistency":
                found[0]["frame_pairs"] = frame_pairs(path)
            results.add(path, found[0] if found else None)
            rows += found
        return 0.0, rows

    return scored


def load_once(module: Any) -> None:
    """Human action builds its model for each list of videos; here each list has one video, so keep the model.

    The checkpoint is loaded with ``strict=False``, so loading it again and loading nothing are the same.
    """
    import torch

    module.create_model = functools.cache(module.create_model)
    load, seen = torch.load, set[Any]()

    def first(path: Any, *arguments: Any, **options: Any) -> Any:
        if path in seen:
            return {}
        seen.add(path)
        return load(path, *arguments, **options)

    torch.load = first  # type: ignore[assignment]


def score(request: dict[str, Any]) -> dict[str, Any]:
    """Let the official package score videos in one dimension."""
    import torch
    from vbench.utils import init_submodules

    if request["device"].startswith("cuda") and not torch.cuda.is_available():
        raise RuntimeError("VBench's environment finds no GPU")
    dimension, videos = request["dimension"], request["videos"]
    module = importlib.import_module(f"vbench.{dimension}")
    name = INNER.get(dimension, dimension)
    results = Results(request["results"], videos)
    setattr(module, name, one_by_one(getattr(module, name), dimension, results))
    # torch 2.6 made weights_only=True the default of torch.load; several official files hold more than tensors
    torch.load = functools.partial(torch.load, weights_only=False)
    torch.set_grad_enabled(False)  # background consistency forgets to, at the price of gigabytes
    if dimension == "human_action":
        load_once(module)
    info = Path(request["work"], "info.json")
    entries = [
        {
            "prompt_en": video["prompt"], "dimension": [dimension], "video_list": [video["path"]],
            **({"auxiliary_info": video["auxiliary_info"]} if video.get("auxiliary_info") else {}),
        }
        for video in videos
    ]  # fmt: skip
    info.write_text(json.dumps(entries))
    submodules = init_submodules([dimension], local=True)[dimension]
    # a torch.device, not a string: with the string "cuda", motion smoothness depends on the GPU's memory
    getattr(module, f"compute_{dimension}")(str(info), torch.device(request["device"]), submodules)
    return {}


def static(request: dict[str, Any]) -> dict[str, Any]:
    """VBench's static filter: which videos hold still, by RAFT's flow between neighbouring frames and the ends.

    The same steps and constants as ``static_filter.py`` of Vchitect/VBench, which the package does not contain: the
    mean of the fastest 2 % of each flow; still when at most round(2 n / 16) of the n - 1 neighbouring flows are above
    3 (short side / 256) pixels and both flows between the first and the last frame at most 2 round(2 n / 16) times
    that.
    """
    import torch
    from easydict import EasyDict  # type: ignore[import-not-found]  # lives in VBench's environment
    from vbench.dynamic_degree import DynamicDegree
    from vbench.third_party.RAFT.core.utils_core.utils import InputPadder

    torch.load = functools.partial(torch.load, weights_only=False)
    arguments = EasyDict(model=request["weights"][0], small=False, mixed_precision=False, alternate_corr=False)
    raft = DynamicDegree(arguments, torch.device(request["device"]))
    raft.extract_frame = lambda frames, interval: frames  # all frames, not 8 a second
    results = Results(request["results"], request["videos"])
    for video in request["videos"]:
        results.start()
        frames = raft.get_frames(video["path"])
        threshold, allowed = 3.0 * min(frames[0].shape[-2:]) / 256.0, round(2 * len(frames) / 16.0)
        pairs = [*itertools.pairwise(frames), (frames[0], frames[-1]), (frames[-1], frames[0])]
        speeds = []
        with torch.no_grad():
            for pair in pairs:
                _, flow = raft.model(*InputPadder(pair[0].shape).pad(*pair), iters=20, test_mode=True)
                speed = flow[0].norm(dim=0).flatten().sort(descending=True).values
                speeds.append(float(speed[: int(len(speed) * 0.02)].mean()))
        still = sum(s > threshold for s in speeds[:-2]) <= allowed
        still = still and not any(s > threshold * allowed * 2 for s in speeds[-2:])
        results.add(video["path"], {"video_results": float(still)})
    return {}


def features(request: dict[str, Any]) -> dict[str, Any]:
    """One feature vector a video: the mean of the normalised features of eight frames, DINO's or CLIP's."""
    import torch
    from torch.nn.functional import normalize
    from vbench.utils import clip_transform, dino_transform, load_video

    device = torch.device(request["device"])
    torch.set_grad_enabled(False)
    if request["dimension"] == "diversity_dino":
        code = next(Path(path).parent for path in request["weights"] if path.endswith("hubconf.py"))
        encode = torch.hub.load(str(code), "dino_vitb16", source="local").to(device).eval()
        transform = dino_transform(224)
    else:
        import clip  # type: ignore[import-not-found]  # lives in VBench's environment

        encode = clip.load(request["weights"][0], device=device)[0].encode_image
        transform = clip_transform(224)
    results = Results(request["results"], request["videos"])
    for video in request["videos"]:
        results.start()
        frames = transform(load_video(video["path"], num_frames=8)).to(device)
        vector = normalize(encode(frames).float(), dim=-1).mean(dim=0)
        row = {"video_results": [round(x, 6) for x in vector.tolist()]}
        results.add(video["path"], row)
    return {}


def split(request: dict[str, Any]) -> dict[str, Any]:
    """Cut videos into VBench-Long's pieces; in the file beside this one."""
    return {"failed": load_beside("long_worker").split(request["videos"])}


def first_frames(request: dict[str, Any]) -> dict[str, Any]:
    """VBench-Long's consistency of first frames; in the file beside this one."""
    import torch

    torch.set_grad_enabled(False)
    engine = load_beside("long_worker")
    encode, transform = engine.NETWORKS[request["dimension"]](Path(request["weights"][0]), request["device"])
    results, consistency = Results(request["results"], request["videos"]), load_beside("fast").consistency
    for video in request["videos"]:
        results.start()
        total, pairs = consistency(encode(transform(engine.frames(video["path"])).to(request["device"])))
        results.add(video["path"], {"video_results": total / pairs})
    return {}


def fast(request: dict[str, Any]) -> dict[str, Any]:
    """Let the fast engine, in the file beside this one, do the tasks that it has functions for, all at once."""
    import torch

    engine = load_beside("fast")
    torch.load = functools.partial(torch.load, weights_only=False)
    torch.set_grad_enabled(False)
    if request["device"].startswith("cuda") and not torch.cuda.is_available():
        raise RuntimeError("VBench's environment finds no GPU")
    write = lambda task: Results(task["results"], task["videos"])  # noqa: E731
    return {"failed": engine.run(request["tasks"], request["device"], write)}


def die_with_parent() -> None:
    """End this process soon after the one that started it ends, however that happens."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """Answer one request."""
    sys.addaudithook(refuse_network)
    request = json.loads(Path(sys.argv[1]).read_text())
    if request["action"] != "import":
        die_with_parent()
        if os.environ.get("TMD_EVAL_VBENCH_PARTS"):
            global STOPWATCH
            STOPWATCH = load_beside("stopwatch").install()
    try:
        if request["action"] == "import":
            importlib.import_module("vbench.utils")  # torch and torchvision, once for all
            reply = {"ok": True, "reasons": {name: why_not(f"vbench.{name}") for name in request["dimensions"]}}
            reply["long"] = why_not("vbench2_beta_long.subject_consistency")
        else:
            actions = {
                "score": score, "static": static, "features": features, "fast": fast, "split": split,
                "first_frames": first_frames,
            }  # fmt: skip
            reply = {"ok": True, **actions[request["action"]](request)}
    except Exception as error:
        reply = {"ok": False, "error": type(error).__name__, "message": str(error), "traceback": traceback.format_exc()}
    Path(sys.argv[2]).write_text(json.dumps(reply))


if __name__ == "__main__":
    main()
