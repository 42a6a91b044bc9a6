"""The fast engine against the official functions on tiny models of the same classes; prints both values a line.

Runs inside VBench's environment: ``python tests/vbench_tiny_models.py FAST.PY VIDEO...`` with ``VBENCH_CACHE_DIR`` set.
Every loader is replaced by one of a tiny model, for both engines alike, so all else is the code that users run.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import vbench.utils
from clip.model import CLIP
from easydict import EasyDict
from pyiqa.archs.musiq_arch import MUSIQ
from vbench import (
    aesthetic_quality,
    appearance_style,
    background_consistency,
    dynamic_degree,
    imaging_quality,
    overall_consistency,
    subject_consistency,
    temporal_style,
)
from vbench.third_party.RAFT.core.raft import RAFT
from vbench.third_party.ViCLIP.viclip import ViCLIP
from vbench.third_party.ViCLIP.viclip_text import CLIP_TEXT
from vbench.third_party.ViCLIP.viclip_vision import VisionTransformer

PROMPT, STYLE = "a red bicycle in the rain", "Van Gogh style"
CPU = torch.device("cpu")


class TinyViCLIP(ViCLIP):
    def build_vision_encoder(self) -> Any:
        return VisionTransformer(224, 56, 32, 2, 2, output_dim=16).eval()

    def build_text_encoder(self) -> Any:
        return CLIP_TEXT(16, 32, 49408, 32, 2, 2, 0)


def filled(model: Any) -> Any:
    for parameter in model.parameters():  # some are left as torch.empty, others as zeros
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def main() -> None:
    spec = importlib.util.spec_from_file_location("fast", sys.argv[1])
    assert spec is not None and spec.loader is not None
    fast: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fast)
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    dino = filled(
        timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True, dynamic_img_pad=True, depth=2)
    )
    clip = filled(CLIP(768, 224, 2, 64, 32, 77, 49408, 64, 1, 2))
    viclip = filled(TinyViCLIP(pretrain=None))
    musiq = filled(MUSIQ(pretrained=False, hidden_size=48, mlp_dim=96, num_heads=6, num_layers=2))
    raft = filled(RAFT(EasyDict(small=False, mixed_precision=False, alternate_corr=False)))
    folder = Path(tempfile.mkdtemp())
    head, flows = folder / "sa_0_4_vit_l_14_linear.pth", folder / "raft-things.pth"
    torch.save(torch.nn.Linear(768, 1).state_dict(), head)
    torch.save({f"module.{key}": value for key, value in raft.state_dict().items()}, flows)
    fast.load_dino = lambda device: dino
    fast.load_clip = lambda path, device: clip
    fast.load_viclip = lambda path, vocabulary, device: viclip
    fast.load_musiq = lambda path, device: musiq
    arguments = EasyDict(model=str(flows), small=False, mixed_precision=False, alternate_corr=False)
    moves = dynamic_degree.DynamicDegree(arguments, CPU)
    aesthetic = aesthetic_quality.get_aesthetic_model(str(folder))
    style = {"appearance_style": STYLE}
    official: dict[str, Callable[[list[str]], Any]] = {
        "subject_consistency": lambda v: subject_consistency.subject_consistency(dino, v, CPU, False),
        "background_consistency": lambda v: background_consistency.background_consistency(clip, None, v, CPU, False),
        "aesthetic_quality": lambda v: aesthetic_quality.laion_aesthetic(aesthetic, clip, v, CPU),
        "imaging_quality": lambda v: imaging_quality.technical_quality(musiq, v, CPU),
        "appearance_style": lambda v: appearance_style.appearance_style(
            clip, [{"prompt": PROMPT, "video_list": v, "auxiliary_info": style}], CPU
        ),
        "temporal_style": lambda v: temporal_style.temporal_style(
            viclip, [{"prompt": PROMPT, "video_list": v}], None, CPU
        ),
        "overall_consistency": lambda v: overall_consistency.overall_consistency(
            viclip, [{"prompt": PROMPT, "video_list": v}], None, CPU
        ),
        "dynamic_degree": lambda v: dynamic_degree.dynamic_degree(moves, v),
    }
    decoded: list[str] = []
    load = vbench.utils.load_video
    videos = sys.argv[2:]
    expected = {
        name: {row["video_path"]: row["video_results"] for row in function(videos)[1]}
        for name, function in official.items()
    }
    vbench.utils.load_video = lambda path, **options: decoded.append(path) or load(path, **options)

    class Rows:
        def __init__(self, task: dict[str, Any]) -> None:
            self.name = task["dimension"]

        def start(self) -> None: ...

        def add(self, path: str, row: dict[str, Any]) -> None:
            line = {"dimension": self.name, "official": expected[self.name][path], "fast": row["video_results"]}
            print(json.dumps(line))

    asked = [
        {"path": path, "file": path, "prompt": PROMPT, "auxiliary_info": {"appearance_style": style}} for path in videos
    ]
    files = {"aesthetic_quality": ["", str(head)], "dynamic_degree": [str(flows)]}
    tasks = [{"dimension": name, "weights": files.get(name, ["", ""]), "videos": asked} for name in official]
    failed = fast.run(tasks, "cpu", Rows)
    print(json.dumps({"failed": failed, "decoded": decoded}))


if __name__ == "__main__":
    main()
