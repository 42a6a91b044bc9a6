"""Every file that the sixteen dimensions and VBench-Long read besides what pip installs: its source and its place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

_HF = "https://huggingface.co"
_VBENCH = f"{_HF}/OpenGVLab/VBench_Used_Models/resolve/main"
_CLIP = "https://openaipublic.azureedge.net/clip/models"
_DINO = "https://raw.githubusercontent.com/facebookresearch/dino/7c446df5b9f45747937fb0d72314eb9f7b66930a"
_BERT = f"{_HF}/google-bert/bert-base-uncased/resolve/86b5e0934494bd15c9632b12f734a8a67f723594"

_DINO_V2 = "https://raw.githubusercontent.com/facebookresearch/dinov2/b8931f7bf91576930313be2c6d6af376033b35f0"
_DREAMSIM = "https://github.com/ssundaram21/dreamsim/releases/download/v0.2.0-checkpoints"
_LONG = "https://raw.githubusercontent.com/Vchitect/VBench/45e79ec14e69a2187202c675d2dbce1a71843d53/vbench2_beta_long"

Kind = Literal["torch", "torchscript", "safetensors", "gzip", "zip", "text"]


@dataclass(frozen=True, kw_only=True)
class WeightFile:
    """One file."""

    path: str
    """Where VBench looks for it, relative to the weights' folder."""
    kind: Kind
    """Format: a file of another one (a web page saved in its place, a plain state dict for CLIP) is refused."""
    urls: tuple[str, ...]
    """Where to get it: the source that VBench names, where that is alive, and mirrors."""
    sha256: str | None = None
    """SHA-256 as published, or its first digits; None where nobody published one, then that of the file here is
    recorded with every score."""
    size: int | None = None
    """Bytes, where published."""


_DINO_V2_CODE = {
    "dinov2/__init__.py": "0d2b87b7e71c7f7279ccc4b4f8b541d26071425284a0ea01a5a435fac4511cfe",
    "dinov2/models/__init__.py": "87b360c71997314f41be1c497cc42326fc32617d3a2840f2f19d3795ca8b85ee",
    "dinov2/models/vision_transformer.py": "495c685c6da47452fd6b2ef0d2e04563e6cfc9a090ff5dec3c5b4386bb7cdf30",
    "dinov2/layers/__init__.py": "1b55deed39d5ab0b589bef421bbfe06f24a10cd590a0f8403234c9ee4e34109d",
    "dinov2/layers/attention.py": "79c7be7a452b3aad96698ec38d5d5150b9f4d8ac084fa93324510dc9f624775d",
    "dinov2/layers/block.py": "60c0ac7dfa4474be313fabfa5a23d82faf6f0cecd4e720a88be35de9788cb636",
    "dinov2/layers/dino_head.py": "9fdb1fa61c0609dc0876f711f9d0d828c33bf9fd972aab3d9c968d44e16b98d1",
    "dinov2/layers/drop_path.py": "b9f8236e86054b9d9a71275efcad2a9ecaa1f86b529d4b8d6109ddb5e806f67a",
    "dinov2/layers/layer_scale.py": "dadd5aafe178f1bf72a205a02a6645c7e635cacbad585d4a7369c200c6e89135",
    "dinov2/layers/mlp.py": "255825c73b60a916dd00eb1e38aacbcdbf316e40d6a005efb46e245b7edb43aa",
    "dinov2/layers/patch_embed.py": "40da6add3d811198ea3e17cb99cdd4e5cda59e369efbbe3d18d89308618cf142",
    "dinov2/layers/swiglu_ffn.py": "e46d2948fb97e497cf991ff82ce30cb59b59fdf2e12a19568417113716b4f119",
}
"""SHA-256 of the files of DINOv2's code that its plain ViT needs."""

FILES: tuple[WeightFile, ...] = (
    WeightFile(
        path="dino_model/dino_vitbase16_pretrain.pth",
        kind="torch",
        urls=("https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",),
    ),
    WeightFile(
        path="dino_model/facebookresearch_dino_main/hubconf.py",
        kind="text",
        urls=(f"{_DINO}/hubconf.py",),
        sha256="fa80babf82c71d2123e23b05061eb1991a1fbc9877238f250b2a25023e910f72",
    ),
    WeightFile(
        path="dino_model/facebookresearch_dino_main/vision_transformer.py",
        kind="text",
        urls=(f"{_DINO}/vision_transformer.py",),
        sha256="b1f998d5f49ab43666b9fc6d007c5f6540c3ead2e8645e144f74045f63ff44d7",
    ),
    WeightFile(
        path="dino_model/facebookresearch_dino_main/utils.py",
        kind="text",
        urls=(f"{_DINO}/utils.py",),
        sha256="962a97e1acda1c986dfd921275325e4083f9016dddadcf018f1ccf03fa600eab",
    ),
    WeightFile(
        path="clip_model/ViT-B-32.pt",
        kind="torchscript",
        urls=(f"{_CLIP}/40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",),
        sha256="40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    ),
    WeightFile(
        path="clip_model/ViT-L-14.pt",
        kind="torchscript",
        urls=(f"{_CLIP}/b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt",),
        sha256="b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    ),
    WeightFile(
        path="amt_model/amt-s.pth",
        kind="torch",
        urls=(f"{_HF}/lalala125/AMT/resolve/main/amt-s.pth",),
    ),
    WeightFile(
        path="raft_model/models/raft-things.pth",
        kind="torch",
        # VBench's own source is a zip archive on Dropbox; this is the same file alone
        urls=("https://github.com/sczhou/ProPainter/releases/download/v0.1.0/raft-things.pth",),
    ),
    WeightFile(
        path="aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth",
        kind="torch",
        urls=("https://raw.githubusercontent.com/LAION-AI/aesthetic-predictor/main/sa_0_4_vit_l_14_linear.pth",),
    ),
    WeightFile(
        path="pyiqa_model/musiq_spaq_ckpt-358bb6af.pth",
        kind="torch",
        urls=(
            "https://github.com/chaofengc/IQA-PyTorch/releases/download/v0.1-weights/musiq_spaq_ckpt-358bb6af.pth",
            f"{_HF}/chaofengc/IQA-PyTorch-Weights/resolve/main/musiq_spaq_ckpt-358bb6af.pth",
        ),
        sha256="358bb6af",  # torch.hub's convention: the name carries the first digits
    ),
    WeightFile(
        path="grit_model/grit_b_densecap_objectdet.pth",
        kind="torch",
        urls=(f"{_VBENCH}/grit_b_densecap_objectdet.pth",),  # the source in the PyPI package is dead
    ),
    WeightFile(
        path="umt_model/l16_ptk710_ftk710_ftk400_f16_res224.pth",
        kind="torch",
        urls=(f"{_VBENCH}/l16_ptk710_ftk710_ftk400_f16_res224.pth",),
    ),
    WeightFile(
        path="caption_model/tag2text_swin_14m.pth",
        kind="torch",
        urls=(
            f"{_HF}/spaces/xinyu1205/recognize-anything/resolve/main/tag2text_swin_14m.pth",
            f"{_HF}/spaces/xinyu1205/Tag2Text/resolve/main/tag2text_swin_14m.pth",
        ),
    ),
    WeightFile(
        path="ViCLIP/ViClip-InternVid-10M-FLT.pth",
        kind="torch",
        urls=(f"{_VBENCH}/ViClip-InternVid-10M-FLT.pth",),
    ),
    WeightFile(
        path="ViCLIP/bpe_simple_vocab_16e6.txt.gz",
        kind="gzip",  # `vbench setup` copies it from the openai-clip package
        urls=("https://raw.githubusercontent.com/openai/CLIP/main/clip/bpe_simple_vocab_16e6.txt.gz",),
        sha256="924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a",
    ),
    WeightFile(
        path="bert-base-uncased/vocab.txt",
        kind="text",
        urls=(f"{_BERT}/vocab.txt",),
        sha256="07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
        size=231508,
    ),
    WeightFile(path="bert-base-uncased/config.json", kind="text", urls=(f"{_BERT}/config.json",)),
    WeightFile(path="bert-base-uncased/tokenizer_config.json", kind="text", urls=(f"{_BERT}/tokenizer_config.json",)),
    WeightFile(
        path="bert-base-uncased/model.safetensors",
        kind="safetensors",
        urls=(f"{_BERT}/model.safetensors",),
        sha256="68d45e234eb4a928074dfd868cead0219ab85354cc53d20e772753c6bb9169d3",
        size=440449768,
    ),
    WeightFile(  # from here: what VBench-Long reads besides
        path="dinov2_model/dinov2_vitb14_pretrain.pth",
        kind="torch",
        urls=("https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth",),
    ),
    *(
        WeightFile(path=f"dinov2_model/{name}", kind="text", urls=(f"{_DINO_V2}/{name}",), sha256=digest)
        for name, digest in _DINO_V2_CODE.items()
    ),
    WeightFile(
        path="long_config/subject_mapping_table.yaml",  # the wheel ships VBench-Long's code without it
        kind="text",
        urls=(f"{_LONG}/configs/subject_mapping_table.yaml",),
        sha256="ad6c730b772577d573594ce1ace40e7a70c29ed6b026325589697061cdb86269",
    ),
    WeightFile(
        path="dreamsim_model/dreamsim_ensemble_checkpoint.zip",
        kind="zip",
        urls=(f"{_DREAMSIM}/dreamsim_ensemble_checkpoint.zip",),
    ),
    WeightFile(
        path="long_config/background_mapping_table.yaml",
        kind="text",
        urls=(f"{_LONG}/configs/background_mapping_table.yaml",),
        sha256="47cc19bd7f22907e7c6515f0181d2c032187842d5d1686a238d0341ac2e5a440",
    ),
)
"""All of them. VBench's own local-file flag misses DINO's second place (the hub's checkpoint folder) and
bert-base-uncased; ``weights.prepare`` sees to both."""

BY_PATH = {file.path: file for file in FILES}
