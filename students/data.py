"""Training data: latents and text embeddings in safetensors shards, drawn as a pure function of the iteration.

A data folder holds ``00000.safetensors``, ... with ``latents`` (n, C, T, H, W) and ``text`` (n, length, D), and
``data.json``, written last, which lists the shards with their sha256: a folder without it is unfinished. Large sets
have webdataset shards instead (:mod:`students.tar_shards`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from students.base import Base
from students.errors import ConfigError
from students.machine import home
from students.method import Batch
from students.micro import world
from students.order import Order
from students.order import stream_seed as stream_seed
from students.tar_shards import FORMAT, TarShards
from students.weights import file_hash

INDEX = "data.json"
SHARD = 512  # clips of the micro world a shard


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where training pairs come from."""

    kind: Literal["micro", "shards"] = "micro"
    """micro: clips of the micro world's training split, generated and encoded on first use; shards: a folder."""
    clips: int = 4096
    """Number of generated clips (micro)."""
    seed: int = 0
    """Seed of the generated clips (micro); not the run's seed, so that runs of several seeds share their data."""
    cache: str | None = None
    """Folder that keeps encoded clips between runs (micro); null: latents/ under TMD_EVAL_HOME (~/.cache/tmd-eval)."""
    folder: str | None = None
    """Folder of shards (shards): what tmd-eval data encode and data synthesize make."""

    def __post_init__(self) -> None:
        if self.clips < 1:
            raise ConfigError(f"data.clips must be at least 1, not {self.clips}.")
        if self.seed < 0:
            raise ConfigError(f"data.seed must be at least 0, not {self.seed}.")
        if self.kind == "shards" and not self.folder:
            raise ConfigError("data.kind is shards: name the folder of shards in data.folder.")
        if self.kind == "micro" and self.folder:
            raise ConfigError(
                "data.folder is given but data.kind is micro; set data.kind to shards to read the folder."
            )


def write_shard(folder: Path, index: int, latents: Tensor, text: Tensor) -> Path:
    """Write one shard atomically.

    Args:
        folder: data folder; made if missing.
        index: number of the shard from 0.
        latents: normalised, (n, C, T, H, W).
        text: embeddings, zeros at padding, (n, length, D); trailing positions that are zero in all rows may be cut.
    """
    if len(latents) != len(text) or not len(latents):
        raise ConfigError(
            f"a shard needs as many text embeddings as latents, at least one, not {len(text)} and {len(latents)}."
        )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{index:05d}.safetensors"
    partial = folder / f".{path.name}.{os.getpid()}"
    try:
        save_file({"latents": latents.contiguous(), "text": text.contiguous()}, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def write_index(folder: Path, *, base_hash: str, source: dict[str, Any]) -> None:
    """Write ``data.json`` over the shards present, which makes the folder complete.

    Args:
        folder: data folder.
        base_hash: hash of the base model whose VAE and text encoder made the shards.
        source: what was encoded, in plain values.
    """
    shards = [{"file": path.name, "sha256": file_hash(path)} for path in sorted(folder.glob("*.safetensors"))]
    partial = folder / f".{INDEX}.{os.getpid()}"
    try:
        partial.write_text(json.dumps({"base_hash": base_hash, "source": source, "shards": shards}, indent=1))
        partial.replace(folder / INDEX)
    finally:
        partial.unlink(missing_ok=True)


def read_index(folder: Path) -> dict[str, Any]:
    """The ``data.json`` of a complete data folder.

    Raises:
        ConfigError: the folder is missing, unfinished or damaged.
    """
    try:
        index = json.loads((folder / INDEX).read_text())
        if not isinstance(index, dict) or not {"base_hash", "shards"} <= set(index):
            raise ConfigError(f"{folder / INDEX} does not name a base model and shards; encode the data again.")
        return index
    except FileNotFoundError:
        what = "is unfinished: it has no data.json" if folder.is_dir() else "does not exist"
        raise ConfigError(f"data folder {folder} {what}.") from None
    except json.JSONDecodeError:
        raise ConfigError(f"{folder / INDEX} is damaged; encode the data again.") from None


class LatentShards:
    """A data folder, read item by item through memory maps."""

    def __init__(self, folder: Path, *, base_hash: str, latent_shape: tuple[int, ...], text_length: int):
        """Open every shard.

        Args:
            folder: data folder.
            base_hash: hash of the base model in training; latents of another model are refused.
            latent_shape: (C, T, H, W) the model expects.
            text_length: shorter text embeddings are padded with zeros to this length.

        Raises:
            ConfigError: the folder is missing, unfinished, truncated, empty, or made for another model.
        """
        folder = Path(folder)
        index = read_index(folder)
        if index["base_hash"] != base_hash:
            raise ConfigError(
                f"data folder {folder} was encoded with base model {index['base_hash'][:12]}, "
                f"but the run's base model is {base_hash[:12]}; encode it again."
            )
        self.hash = hashlib.sha256(json.dumps(index["shards"], sort_keys=True).encode()).hexdigest()
        self.text_length = text_length
        self._shards = []
        counts = []
        for shard in index["shards"]:
            path = folder / shard["file"]
            try:
                handle = safe_open(path, "pt")
                shape = tuple(handle.get_slice("latents").get_shape())
                text = tuple(handle.get_slice("text").get_shape())
            except FileNotFoundError:
                raise ConfigError(f"data shard {path} is missing; encode the data again.") from None
            except SafetensorError as error:
                raise ConfigError(f"data shard {path} is damaged ({error}); encode the data again.") from None
            if shape[1:] != tuple(latent_shape) or text[0] != shape[0] or text[1] > text_length:
                raise ConfigError(
                    f"data shard {path} holds latents {shape} and text {text}, but the base model needs "
                    f"latents (n, {', '.join(map(str, latent_shape))}) and text (n, up to {text_length}, width)."
                )
            self._shards.append(handle)
            counts.append(shape[0])
        if not counts:
            raise ConfigError(f"data folder {folder} holds no shards.")
        self._ends = np.cumsum(counts)
        self._order = Order(len(self))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def items(self, indices: list[int]) -> Batch:
        """The pairs with these numbers, float32."""
        latents, text = [], []
        for i in indices:
            shard = int(np.searchsorted(self._ends, i, side="right"))
            row = i - (int(self._ends[shard - 1]) if shard else 0)
            latents.append(self._shards[shard].get_slice("latents")[row : row + 1])
            part = self._shards[shard].get_slice("text")[row : row + 1]
            text.append(torch.nn.functional.pad(part, (0, 0, 0, self.text_length - part.shape[1])))
        return Batch(latents=torch.cat(latents).float(), text=torch.cat(text).float())

    def draw(self, seed: int, iteration: int, batch: int, part: slice) -> Batch:
        """Some of the pairs of one iteration's global batch: epochs without replacement, each in its own random order.

        Args:
            seed: the run's.
            iteration: counts from 1.
            batch: size of the global batch.
            part: which of its positions; the union over parts does not depend on how the batch is cut.
        """
        positions = range(batch)[part]
        return self.items([self._order.at(seed, (iteration - 1) * batch + p) for p in positions])


def micro_folder(base: Base, config: DataConfig, *, progress: bool = True) -> Path:
    """The data folder of the micro world's training clips as the base model encodes them, made on first use.

    The folder's name is a key over everything its content depends on, so a changed model, seed or world never reuses
    an old one. An interrupted encoding goes on where it stopped.
    """
    if (base.frames, base.height, base.width) != (world.FRAMES, world.SIZE, world.SIZE):
        raise ConfigError(
            f"data.kind is micro, whose clips have {world.FRAMES} frames of {world.SIZE}x{world.SIZE}, but base model "
            f"{base.ref} has {base.frames} of {base.height}x{base.width}; set data.kind to shards and data.folder."
        )
    source = {
        "clips": config.clips,
        "seed": config.seed,
        "latent_shape": list(base.latent_shape),
        "text_length": base.text_length,
        "world": file_hash(Path(world.__file__)),
    }
    key = hashlib.sha256(json.dumps({"base": base.hash, **source}, sort_keys=True).encode()).hexdigest()[:20]
    folder = (Path(config.cache) if config.cache else home() / "latents") / f"micro-{key}"
    if (folder / INDEX).exists():
        return folder
    starts = range(0, config.clips, SHARD)
    for index, start in enumerate(tqdm(starts, desc="encoding clips", unit="shard", disable=not progress)):
        if not (folder / f"{index:05d}.safetensors").exists():
            numbers = range(start, min(start + SHARD, config.clips))
            write_shard(folder, index, *_encode(base, [_training_clip(config.seed, i) for i in numbers]))
    write_index(folder, base_hash=base.hash, source=source)
    return folder


def _training_clip(seed: int, number: int) -> tuple[str, np.ndarray]:
    return world.make_clip((seed, number), held_out=False)


@torch.no_grad()
def _encode(base: Base, clips: list[tuple[str, np.ndarray]], at_once: int = 64) -> tuple[Tensor, Tensor]:
    """Latents and text embeddings on the CPU; every different caption goes through the text encoder once."""
    captions = sorted({caption for caption, _ in clips})
    parts = [captions[i : i + at_once] for i in range(0, len(captions), at_once)]
    text = torch.cat([base.encode_prompts(part).float().cpu() for part in parts])
    row = {caption: i for i, caption in enumerate(captions)}
    videos = torch.from_numpy(np.stack([clip for _, clip in clips]))
    latents = torch.cat([base.encode_videos(part).float().cpu() for part in videos.split(at_once)])
    return latents, text[[row[caption] for caption, _ in clips]]


def open_data(
    base: Base, config: DataConfig, *, first: Callable[[Callable[[], Path]], Path], progress: bool = True
) -> LatentShards | TarShards:
    """The data of a run, encoded if needed.

    Args:
        base: base model.
        config: the run's data section.
        first: runs a function on one rank before the others (see :class:`students.distributed.Ranks`).
        progress: show a bar on stderr while encoding.
    """
    folder = Path(config.folder) if config.folder else first(lambda: micro_folder(base, config, progress=progress))
    index = read_index(folder)
    if index.get("format") == FORMAT:
        if index["encoder_hash"] != base.encoder_hash:
            raise ConfigError(
                f"data folder {folder} was made with VAE and text encoder {index['encoder_hash'][:12]}, but those of "
                f"{base.ref} are {base.encoder_hash[:12]}; make the data with the same ones."
            )
        return TarShards(folder, index, latent_shape=base.latent_shape, text_length=base.text_length)
    return LatentShards(folder, base_hash=base.hash, latent_shape=base.latent_shape, text_length=base.text_length)
