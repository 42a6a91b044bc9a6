"""Where a worker's time goes: decoding, preparing images, models, the rest. For benchmarks/vbench_speed.py.

Runs inside VBench's environment, loaded by ``worker.py`` where ``TMD_EVAL_VBENCH_PARTS`` is set. The calls that do the
work in both engines are wrapped: decord's and OpenCV's readers; torchvision's transforms; every other module of torch,
with RAFT's correlations, which are no module. A call inside another counts for the outer one.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

PARTS = ("decode", "prepare", "forward")


class Stopwatch:
    """Processor and wall seconds of each part since the last :meth:`reset`."""

    def __init__(self) -> None:
        self.inside = False
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self.seconds = {part: [0.0, 0.0] for part in PARTS}

    def wrap(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call, timed as a part."""
        return functools.wraps(call)(lambda *a, **k: self._time(part, call, *a, **k))

    def wrap_module(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """``torch.nn.Module.__call__``, timed: transforms are modules too."""

        def timed(module: Any, *arguments: Any, **options: Any) -> Any:
            part = "prepare" if type(module).__module__.startswith("torchvision.transforms") else "forward"
            return self._time(part, call, module, *arguments, **options)

        return timed

    def _time(self, part: str, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        if self.inside:
            return call(*arguments, **options)
        self.inside = True
        before = _now()
        try:
            return call(*arguments, **options)
        finally:
            after = _now()
            self.seconds[part] = [s + b - a for s, a, b in zip(self.seconds[part], before, after, strict=True)]
            self.inside = False


def _now() -> tuple[float, float]:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.process_time(), time.perf_counter()


def install() -> Stopwatch:
    """Wrap the calls; returns the stopwatch that times them."""
    import cv2  # type: ignore[import-not-found]  # lives in VBench's environment, as do the next three
    import decord  # type: ignore[import-not-found]
    import torch
    from torchvision.transforms import Compose  # type: ignore[import-untyped]
    from vbench.third_party.RAFT.core.corr import CorrBlock

    watch = Stopwatch()

    class TimedCapture(cv2.VideoCapture):
        read = watch.wrap("decode", cv2.VideoCapture.read)

    cv2.VideoCapture = TimedCapture
    for name in ("__init__", "get_batch", "next"):
        setattr(decord.VideoReader, name, watch.wrap("decode", getattr(decord.VideoReader, name)))
    Compose.__call__ = watch.wrap("prepare", Compose.__call__)
    for name in ("__init__", "__call__"):
        setattr(CorrBlock, name, watch.wrap("forward", getattr(CorrBlock, name)))
    torch.nn.Module.__call__ = watch.wrap_module(torch.nn.Module.__call__)  # type: ignore[method-assign]
    return watch
