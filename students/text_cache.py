"""Caption embeddings on disk, by content: a caption is encoded once per text encoder, whatever asks for it.

Wan's text encoder has 5.7 billion parameters; with all captions of a set here it is not even loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor


class TextCache:
    """Embeddings under ``folder``, one small safetensors file a caption, without the zeros of the padding.

    Args:
        folder: made when something is stored.
        identity: all that decides an embedding beside the caption: hashes of encoder and tokenizer, length, precision.
        length: tokens an embedding is padded to.
    """

    def __init__(self, folder: Path, identity: str, length: int) -> None:
        self.folder = folder / hashlib.sha256(identity.encode()).hexdigest()[:16]
        self.length = length

    def get(self, prompt: str) -> Tensor | None:
        """The embedding (length, D) on the CPU, or None where it is not stored or its file is damaged."""
        try:
            rows = load_file(self._path(prompt))["text"]
        except (OSError, SafetensorError, KeyError):
            return None
        return torch.cat([rows, rows.new_zeros(self.length - len(rows), rows.shape[1])])

    def put(self, prompt: str, embedding: Tensor) -> None:
        """Store an embedding (length, D) atomically; a full or read-only disk only means that it is not kept."""
        used = embedding.abs().amax(dim=1).nonzero()
        rows = embedding[: int(used.max()) + 1 if len(used) else 0].contiguous().cpu()
        temporary = self.folder / f".tmp-{secrets.token_hex(8)}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file({"text": rows}, temporary)
            temporary.replace(self._path(prompt))
        except (OSError, SafetensorError):
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _path(self, prompt: str) -> Path:
        return self.folder / f"{hashlib.sha256(prompt.encode()).hexdigest()}.safetensors"
