"""The sixteen dimensions of VBench 0.1.5: what each needs and how its numbers are scaled."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from students.errors import ConfigError

SAMPLES = 5
"""Videos a prompt (indices 0 to 4), fixed in the official package."""

_CLIP_B, _CLIP_L = "clip_model/ViT-B-32.pt", "clip_model/ViT-L-14.pt"
_GRIT = "grit_model/grit_b_densecap_objectdet.pth"
_VICLIP = ("ViCLIP/ViClip-InternVid-10M-FLT.pth", "ViCLIP/bpe_simple_vocab_16e6.txt.gz")


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """One dimension."""

    weights: tuple[str, ...] = ()
    """Files it reads, relative to the weights' folder."""
    scale: float = 1.0
    """Factor from the official value of one video to the aggregate's scale."""
    needs_prompts: bool = False
    """It compares with what VBench records about its own prompts, so other videos cannot be scored."""


DIMENSIONS: dict[str, Dimension] = {
    "subject_consistency": Dimension(weights=("dino_model/dino_vitbase16_pretrain.pth",)),
    "background_consistency": Dimension(weights=(_CLIP_B,)),
    "temporal_flickering": Dimension(),
    "motion_smoothness": Dimension(weights=("amt_model/amt-s.pth",)),
    "dynamic_degree": Dimension(weights=("raft_model/models/raft-things.pth",)),
    "aesthetic_quality": Dimension(weights=(_CLIP_L, "aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth")),
    "imaging_quality": Dimension(weights=("pyiqa_model/musiq_spaq_ckpt-358bb6af.pth",), scale=0.01),
    "object_class": Dimension(weights=(_GRIT,), needs_prompts=True),
    "multiple_objects": Dimension(weights=(_GRIT,), needs_prompts=True),
    "human_action": Dimension(weights=("umt_model/l16_ptk710_ftk710_ftk400_f16_res224.pth",)),
    "color": Dimension(weights=(_GRIT,), needs_prompts=True),
    "spatial_relationship": Dimension(weights=(_GRIT,), needs_prompts=True),
    "scene": Dimension(weights=("caption_model/tag2text_swin_14m.pth",), needs_prompts=True),
    "appearance_style": Dimension(weights=(_CLIP_B,), needs_prompts=True),
    "temporal_style": Dimension(weights=_VICLIP),
    "overall_consistency": Dimension(weights=_VICLIP),
}


def check_dimension(name: str) -> str:
    """The name itself.

    Raises:
        ConfigError: not one of the sixteen; names the nearest.
    """
    if name not in DIMENSIONS:
        near = difflib.get_close_matches(name, DIMENSIONS, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(DIMENSIONS)}."
        raise ConfigError(f"VBench has no dimension {name!r}; {hint}")
    return name
