"""The sixteen dimensions of VBench 0.1.5: what each needs and how its numbers are scaled."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from students.errors import ConfigError

SAMPLES = 5
"""Videos a prompt (indices 0 to 4), fixed in the official package."""

FILTER_SAMPLES = 25
"""Videos a prompt of temporal_flickering's prompts before the static filter, by VBench's instructions."""
LONG_SECONDS = 5.0
"""From this length on, VBench's authors ask for VBench-Long."""
RULES = {"vbench": "VBench", "long": "VBench-Long", "long-in-clip": "VBench-Long, in-clip only"}
"""Protocols by name, as they are recorded."""

_DINO = (
    "dino_model/dino_vitbase16_pretrain.pth",
    *(f"dino_model/facebookresearch_dino_main/{name}.py" for name in ("hubconf", "vision_transformer", "utils")),
)
_CLIP_B, _CLIP_L = "clip_model/ViT-B-32.pt", "clip_model/ViT-L-14.pt"
_RAFT = "raft_model/models/raft-things.pth"
_BERT = tuple(f"bert-base-uncased/{name}" for name in ("vocab.txt", "config.json", "tokenizer_config.json"))
_GRIT = ("grit_model/grit_b_densecap_objectdet.pth", *_BERT)
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
    reads_prompt: bool = False
    """It compares with the prompt's text, of any video."""
    weight: str | None = None
    """Key of a result row, or of its ``extra``, that weighs it in the official aggregate: a number, or a list whose
    length counts; None for 1."""


DIMENSIONS: dict[str, Dimension] = {
    "subject_consistency": Dimension(weights=_DINO, weight="frame_pairs"),
    "background_consistency": Dimension(weights=(_CLIP_B,), weight="cnt_per_video"),
    "temporal_flickering": Dimension(),
    "motion_smoothness": Dimension(weights=("amt_model/amt-s.pth",)),
    "dynamic_degree": Dimension(weights=(_RAFT,)),
    "aesthetic_quality": Dimension(weights=(_CLIP_L, "aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth")),
    "imaging_quality": Dimension(weights=("pyiqa_model/musiq_spaq_ckpt-358bb6af.pth",), scale=0.01),
    "object_class": Dimension(weights=_GRIT, needs_prompts=True, weight="frame_count"),
    "multiple_objects": Dimension(weights=_GRIT, needs_prompts=True, weight="frame_count"),
    "human_action": Dimension(weights=("umt_model/l16_ptk710_ftk710_ftk400_f16_res224.pth",), reads_prompt=True),
    "color": Dimension(weights=_GRIT, needs_prompts=True),
    "spatial_relationship": Dimension(weights=_GRIT, needs_prompts=True, weight="frame_results"),
    "scene": Dimension(
        weights=("caption_model/tag2text_swin_14m.pth", *_BERT, "bert-base-uncased/model.safetensors"),
        needs_prompts=True,
        weight="frame_count",
    ),
    "appearance_style": Dimension(weights=(_CLIP_B,), needs_prompts=True, weight="frame_results"),
    "temporal_style": Dimension(weights=_VICLIP, reads_prompt=True),
    "overall_consistency": Dimension(weights=_VICLIP, reads_prompt=True),
}


FILTER_WEIGHTS = (_RAFT,)
"""What temporal_flickering's static filter reads."""
FIRST_FRAMES = {"subject_consistency": "first_frames_dinov2", "background_consistency": "first_frames_dreamsim"}
"""VBench-Long's consistency of the first frames of a video's pieces: the task of each dimension that it belongs to."""
LONG_CONFIG = "long_config"
"""Folder of VBench-Long's tables among the weights."""
_LAYERS = (
    "__init__",
    "attention",
    "block",
    "dino_head",
    "drop_path",
    "layer_scale",
    "mlp",
    "patch_embed",
    "swiglu_ffn",
)
_DINO_V2 = (
    "dinov2_model/dinov2_vitb14_pretrain.pth",
    *(f"dinov2_model/dinov2/{name}.py" for name in ("__init__", "models/__init__", "models/vision_transformer")),
    *(f"dinov2_model/dinov2/layers/{name}.py" for name in _LAYERS),
    f"{LONG_CONFIG}/subject_mapping_table.yaml",
)
DREAMSIM = "dreamsim_model/dreamsim_ensemble_checkpoint.zip"
"""DreamSim's three networks and their adapter; ``weights.prepare`` unpacks it."""
OTHER_WEIGHTS = {
    "static_filter": FILTER_WEIGHTS,
    "diversity_dino": _DINO,
    "diversity_clip": (_CLIP_B,),
    FIRST_FRAMES["subject_consistency"]: _DINO_V2,
    FIRST_FRAMES["background_consistency"]: (DREAMSIM, *_DINO, f"{LONG_CONFIG}/background_mapping_table.yaml"),
}
"""What the workers' other tasks read."""


FAST = (
    "subject_consistency", "background_consistency", "aesthetic_quality", "imaging_quality", "appearance_style",
    "temporal_style", "overall_consistency", "dynamic_degree", "static_filter",
)  # fmt: skip
"""Tasks of the fast engine, which share models or frames; the others it leaves to the official code."""


def engine_of(task: str, engine: str) -> str:
    """Which engine does a task: "fast" only where it has a way of its own."""
    return engine if task in FAST else "official"


def weights_of(task: str) -> tuple[str, ...]:
    """Weights files of a dimension, the static filter, or the features of a diversity."""
    return OTHER_WEIGHTS[task] if task in OTHER_WEIGHTS else DIMENSIONS[task].weights


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
