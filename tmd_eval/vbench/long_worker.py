"""VBench-Long's own steps, for the worker beside this file: cutting videos, and the networks that see first frames.

As ``worker.py`` it runs in VBench's environment and must not import the project.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIDE = 224
"""Pixels of the images' sides, for both networks."""
Network = tuple[Callable[[Any], Any], Callable[[Any], Any]]
"""From images (T, 3, 224, 224) to features (T, D), and from uint8 (T, 3, H, W) to images."""


def frames(path: str) -> Any:
    """A video's frames, uint8 (T, 3, H, W), as the official code reads them."""
    from vbench.utils import load_video

    return load_video(path)


def write_clip(path: Path, frames: Any, fps: int) -> None:
    """Write (T, H, W, 3) of uint8 as VBench-Long does, with x264's defaults; one thread, for the same bytes always."""
    import av

    part = path.with_name(f".tmp-{os.getpid()}.mp4")
    with av.open(str(part), "w", options={"fflags": "+bitexact"}) as container:
        stream: Any = container.add_stream("libx264", rate=fps)
        stream.pix_fmt = "yuv420p"
        stream.height, stream.width = frames.shape[1:3]
        stream.options = {"threads": "1"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    part.replace(path)


def split(videos: list[dict[str, Any]]) -> dict[str, str]:
    """Cut videos into VBench-Long's pieces, and put the first frames of the pieces, as coded, into a video.

    Args:
        videos: each with path, folder, cuts, names, first_frames and fps.

    Returns:
        Why each failed that did, by path.
    """
    import numpy as np
    from vbench.utils import load_video

    failed = {}
    for video in videos:
        folder, firsts = Path(video["folder"]), []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            frames = load_video(video["path"], return_tensor=False)
            for (start, stop), name in zip(video["cuts"], video["names"], strict=True):
                write_clip(folder / name, frames[start:stop], video["fps"])
                firsts.append(load_video(str(folder / name), return_tensor=False)[0])
            if len(firsts) > 1:
                write_clip(folder / video["first_frames"], np.stack(firsts), video["fps"])
        except Exception as error:
            traceback.print_exc()
            failed[video["path"]] = f"{type(error).__name__}: {error}"
    return failed


def dinov2(weights: Path, device: str) -> Network:
    """DINOv2's ViT-B/14, which sees subjects; its code lies beside its weights."""
    import torch
    from torchvision import transforms  # type: ignore[import-untyped]

    sys.path.insert(0, str(weights.parent))
    from dinov2.models.vision_transformer import vit_base  # type: ignore[import-not-found]

    model = vit_base(patch_size=14, img_size=518, init_values=1.0, ffn_layer="mlp", block_chunks=0)  # as in its hubconf
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    model.to(device).eval()
    transform = transforms.Compose(
        [
            transforms.Resize(256, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(SIDE),
            transforms.Lambda(lambda x: x.float().div(255.0)),
            transforms.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        ]
    )
    return lambda images: torch.cat([model(image[None]) for image in images]), transform


def dreamsim(weights: Path, device: str) -> Network:
    """DreamSim's ensemble, which sees backgrounds; ``weights`` is its archive, unpacked beside."""
    import dreamsim as package  # type: ignore[import-not-found]  # lives in VBench's environment
    from torchvision import transforms

    model, _ = package.dreamsim(device=device, cache_dir=str(weights.with_suffix("")))
    transform = transforms.Compose(
        [
            transforms.Resize((SIDE, SIDE), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.Lambda(lambda x: x.float().div(255.0)),
        ]
    )
    return model.embed, transform


NETWORKS: dict[str, Callable[[Path, str], Network]] = {
    "first_frames_dinov2": dinov2,
    "first_frames_dreamsim": dreamsim,
}
"""By the task's name."""
