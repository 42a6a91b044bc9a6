"""Full-size random weights for VBench's sixteen dimensions and VBench-Long, in the formats of the published files.

Runs inside VBench's environment, never inside the project's:

    $TMD_EVAL_HOME/vbench-env/bin/python tests/vbench_random_weights.py WEIGHTS [--dino-code CHECKOUT]

Files that are there stay. Scores with these weights mean nothing: they show that each dimension runs, how long it takes
and that two engines agree. GRiT is biased to see a bicycle in every frame (and to call it red when asked for a
caption), so that ``color`` has something to score: "a red bicycle" scores 1.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import os
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

STUB = '''"""Stands in for DINO's code: the same architecture from timm."""

dependencies = ["torch", "timm"]


def dino_vitb16(pretrained=True, **kwargs):
    import timm
    import torch

    model = timm.create_model("vit_base_patch16_224", num_classes=0, dynamic_img_size=True, dynamic_img_pad=True)
    if pretrained:
        path = "https://example.invalid/dino_vitbase16_pretrain.pth"
        model.load_state_dict(torch.hub.load_state_dict_from_url(url=path, map_location="cpu"))
    return model
'''
DINO_V2_STUB = '''"""Stands in for DINOv2's code: the same architecture from timm."""


def vit_base(patch_size=14, img_size=518, **kwargs):
    import timm

    return timm.create_model("vit_base_patch14_dinov2", num_classes=0, img_size=img_size, dynamic_img_size=True)
'''
WORDS = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 2000: "bicycle", 2001: "red"}


def dino_code(folder: Path, checkout: Path | None) -> None:
    target = folder / "dino_model" / "facebookresearch_dino_main"
    target.mkdir(parents=True, exist_ok=True)
    for name in ("hubconf.py", "vision_transformer.py", "utils.py"):
        if checkout is not None:
            (target / name).write_bytes((checkout / name).read_bytes())
        elif name == "hubconf.py":
            (target / name).write_text(STUB)
        else:
            (target / name).touch()


def dino(folder: Path) -> Any:
    import torch

    code = folder / "dino_model" / "facebookresearch_dino_main"
    return torch.hub.load(str(code), "dino_vitb16", source="local", pretrained=False).state_dict()


def dinov2_code(folder: Path) -> None:
    """Stand-ins for DINOv2's code, and tables of the form of VBench-Long's."""
    code = folder / "dinov2_model" / "dinov2"
    layers = ("__init__", "attention", "block", "dino_head", "drop_path", "layer_scale", "mlp", "patch_embed")
    names = ["__init__", "models/__init__", "models/vision_transformer", "layers/swiglu_ffn"]
    for name in (*names, *(f"layers/{one}" for one in layers)):
        (code / name).parent.mkdir(parents=True, exist_ok=True)
        if not (code / f"{name}.py").exists():
            stub = DINO_V2_STUB if name.endswith("vision_transformer") else "# nothing\n"
            (code / f"{name}.py").write_text(stub)
    (folder / "long_config").mkdir(exist_ok=True)
    table = "".join(f"{n / 100}: {(n / 100) ** 0.25}\n" for n in range(101))
    for stem in ("subject", "background"):
        (folder / "long_config" / f"{stem}_mapping_table.yaml").write_text(table)


def dinov2(folder: Path) -> Any:
    sys.path.insert(0, str(folder / "dinov2_model"))
    from dinov2.models.vision_transformer import vit_base

    return vit_base(patch_size=14, img_size=518, init_values=1.0, ffn_layer="mlp", block_chunks=0).state_dict()


def dreamsim(folder: Path, archive: Path) -> None:
    """DreamSim's archive: three ViT-B/16 as its loaders want them, and an adapter as its training makes it."""
    import torch
    from dreamsim.config import dreamsim_args
    from dreamsim.feature_extraction.vision_transformer import DINOHead, vit_base
    from dreamsim.model import PerceptualModel
    from peft import LoraConfig, get_peft_model

    work = archive.with_suffix(".making")
    shutil.rmtree(work, ignore_errors=True)
    (work / "checkpoints").mkdir(parents=True)
    (work / "facebookresearch_dino_main").symlink_to(folder / "dino_model" / "facebookresearch_dino_main")
    (work / "checkpoints" / "dino_vitbase16_pretrain.pth").symlink_to(
        folder / "dino_model" / "dino_vitbase16_pretrain.pth"
    )
    torch.manual_seed(0)
    head = {f"module.head.{key}": value for key, value in DINOHead(768, 2048).state_dict().items()}
    head["module.head.last_layer.weight"] = torch.randn(2048, 256)
    torch.save({"student": head}, work / "dino_vitb16_pretrain.pth")
    for name in ("clip", "open_clip"):
        model = vit_base(patch_size=16)
        model.pos_drop = torch.nn.LayerNorm(model.embed_dim)
        state = {**model.state_dict(), "proj": 0.03 * torch.randn(768, 512)}
        torch.save({"state_dict": state}, work / f"{name}_vitb16_pretrain.pth.tar")
    model = PerceptualModel(**dreamsim_args["model_config"]["ensemble"], device="cpu", load_dir=str(work))
    adapter = LoraConfig(r=16, lora_alpha=8, lora_dropout=0.3, bias="none", target_modules=["qkv"])
    model = get_peft_model(model, adapter)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:  # zero at first, as if there were no adapter
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(str(work / "ensemble_lora"))
    part = archive.with_name(f".tmp-{archive.name}")
    with zipfile.ZipFile(part, "w") as opened:
        for path in sorted(work.iterdir()):
            for file in [path] if path.suffix in (".pth", ".tar") else sorted(work.glob("ensemble_lora/adapter*")):
                if str(file.relative_to(work)) not in opened.namelist():
                    opened.write(file, file.relative_to(work))
    part.replace(archive)
    shutil.rmtree(work)


def clip(width: int) -> Any:
    """A traced CLIP in half precision: B/32 (512) or L/14 (768)."""
    import torch
    from clip.model import CLIP

    vision = (12, 768, 32) if width == 512 else (24, 1024, 14)
    model = CLIP(width, 224, *vision, 77, 49408, width, width // 64, 12).eval()
    texts = torch.zeros(1, 77, dtype=torch.long)
    texts[0, 5] = 49407
    with torch.no_grad():
        return torch.jit.trace(model, (torch.zeros(1, 3, 224, 224), texts), check_trace=False).half()


def amt() -> Any:
    import vbench
    import vbench.motion_smoothness
    from omegaconf import OmegaConf
    from vbench.third_party.amt.utils.build_utils import build_from_cfg

    config = Path(vbench.__file__).parent / "third_party" / "amt" / "cfgs" / "AMT-S.yaml"
    return {"state_dict": build_from_cfg(OmegaConf.load(config).network).state_dict()}


def raft() -> Any:
    from easydict import EasyDict
    from vbench.third_party.RAFT.core.raft import RAFT

    state = RAFT(EasyDict(small=False, mixed_precision=False, alternate_corr=False)).state_dict()
    return {f"module.{key}": value for key, value in state.items()}


def aesthetic() -> Any:
    import torch

    return torch.nn.Linear(768, 1).state_dict()


def musiq() -> Any:
    from pyiqa.archs.musiq_arch import MUSIQ

    return MUSIQ(pretrained=False).state_dict()


def umt() -> Any:
    from timm.models import create_model
    from vbench.third_party.umt.models.modeling_finetune import vit_large_patch16_224  # noqa: F401 - registers it

    return create_model(
        "vit_large_patch16_224", pretrained=False, num_classes=400, all_frames=16, tubelet_size=1,
        use_learnable_pos_emb=False, use_mean_pooling=True, init_scale=0.001,
    ).state_dict()  # fmt: skip


def viclip(folder: Path) -> Any:
    import torch
    from vbench.third_party.ViCLIP.simple_tokenizer import SimpleTokenizer
    from vbench.third_party.ViCLIP.viclip import ViCLIP

    model = ViCLIP(tokenizer=SimpleTokenizer(str(folder / "ViCLIP" / "bpe_simple_vocab_16e6.txt.gz")), pretrain=None)
    for parameter in model.parameters():  # some are left as torch.empty
        torch.nn.init.normal_(parameter, std=0.02)
    return {"model": model.state_dict()}


def grit() -> Any:
    import torch
    from detectron2.modeling import build_model
    from vbench.third_party.grit_src import image_dense_captions as captions

    arguments = captions.get_parser(torch.device("cpu"), "")
    state = build_model(captions.setup_cfg(arguments)).state_dict()
    for key, value in state.items():
        if key.endswith("agn_hm.bias"):  # every place is a proposal
            value.fill_(6.0)
        elif "box_predictor" in key and key.endswith("cls_score.bias"):  # and surely an object
            value.copy_(torch.tensor([6.0, -6.0])[: value.numel()])
        elif ("box_predictor" in key and key.endswith("cls_score.weight")) or key.endswith(
            "centernet_head.bbox_pred.weight"
        ):
            value.zero_()
        elif key.endswith("centernet_head.bbox_pred.bias"):
            value.fill_(40.0)
    bicycle, red = 2000, 2001
    for key in [k for k in state if k.endswith("textual.embedding.words.weight")]:
        words, places = state[key], state[key.replace("words", "positions")]
        words.zero_(), places.zero_()
        for place in range(64):  # a place decides the next word, but for the first
            places[place, place] = 100.0
        words[104, 700] = 100.0  # the caption's first token
        words[bicycle, 0], words[102, 1], words[red, 700] = 10.0, 10.0, 20.0
    for key in [k for k in state if k.endswith("textual.output.weight")]:
        state[key].copy_(state[key.replace("output", "embedding.words")])
    return {"model": state}


def tag2text() -> Any:
    import vbench
    from vbench.third_party.tag2Text.tag2text import Tag2Text_Caption

    config = Path(vbench.__file__).parent / "third_party" / "tag2Text" / "med_config.json"
    return {"model": Tag2Text_Caption(med_config=str(config), image_size=384, vit="swin_b").state_dict()}


def bert(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import BertConfig

    target = folder / "bert-base-uncased"
    target.mkdir(parents=True, exist_ok=True)
    (target / "vocab.txt").write_text("".join(WORDS.get(i, f"word{i}") + "\n" for i in range(30522)))
    (target / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    BertConfig().save_pretrained(target)
    weights = target / "model.safetensors"
    if not weights.exists():  # all that Tag2Text reads from it is overwritten by its own checkpoint
        one = {"bert.embeddings.LayerNorm.bias": torch.zeros(768)}
        save_file(one, weights, metadata={"format": "pt"})


def save(path: Path, make: Callable[[], Any]) -> None:
    import torch

    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    value = make()
    temporary = path.with_name(f".tmp-{path.name}")
    if isinstance(value, torch.jit.ScriptModule):
        torch.jit.save(value, str(temporary))
    else:
        torch.save(value, temporary)
    temporary.replace(path)
    del value
    gc.collect()
    print(f"{path} {path.stat().st_size / 1e6:.0f} MB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dino-code", type=Path)
    options = parser.parse_args()
    folder = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.update(VBENCH_CACHE_DIR=str(folder), HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    os.chdir(folder)  # "bert-base-uncased" is looked up here
    import clip as openai_clip

    vocabulary = folder / "ViCLIP" / "bpe_simple_vocab_16e6.txt.gz"
    vocabulary.parent.mkdir(exist_ok=True)
    data = (Path(openai_clip.__file__).parent / vocabulary.name).read_bytes()
    gzip.decompress(data)
    vocabulary.write_bytes(data)
    dino_code(folder, options.dino_code)
    dinov2_code(folder)
    bert(folder)
    files: dict[str, Callable[[], Any]] = {
        "dino_model/dino_vitbase16_pretrain.pth": lambda: dino(folder),
        "clip_model/ViT-B-32.pt": lambda: clip(512),
        "clip_model/ViT-L-14.pt": lambda: clip(768),
        "amt_model/amt-s.pth": amt,
        "raft_model/models/raft-things.pth": raft,
        "aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth": aesthetic,
        "pyiqa_model/musiq_spaq_ckpt-358bb6af.pth": musiq,
        "umt_model/l16_ptk710_ftk710_ftk400_f16_res224.pth": umt,
        "ViCLIP/ViClip-InternVid-10M-FLT.pth": lambda: viclip(folder),
        "grit_model/grit_b_densecap_objectdet.pth": grit,
        "caption_model/tag2text_swin_14m.pth": tag2text,
        "dinov2_model/dinov2_vitb14_pretrain.pth": lambda: dinov2(folder),
    }
    failed = []
    for name, make in files.items():
        try:
            save(folder / name, make)
        except Exception as error:
            failed.append(f"{name}: {type(error).__name__}: {error}")
    archive = folder / "dreamsim_model" / "dreamsim_ensemble_checkpoint.zip"
    if not archive.exists():
        dreamsim(folder, archive)
    sys.exit("\n".join(failed) or 0)


if __name__ == "__main__":
    main()
