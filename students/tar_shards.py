"""Large training sets: webdataset shards (tar files) of latents and text embeddings, read at random.

A folder holds ``00000.tar``, ...; a sample is the members ``{key}.safetensors`` (``latents`` (C, T, H, W) and ``text``
(n, D) without its padding) and ``{key}.json`` (prompt, source, seed). Beside each tar lies ``00000.json`` with its hash
and the place and checksum of every sample, so that a draw reads only its own samples and a damaged one is noticed.
``data.json`` comes last and makes the folder complete; ``negative.safetensors`` is the negative prompt's embedding, so
that training loads no text encoder.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import tarfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from students.errors import ConfigError
from students.method import Batch
from students.order import Order, stream_seed

FORMAT = "webdataset"
NEGATIVE = "negative.safetensors"
ATTEMPTS = 20
OPEN_FILES = 128

log = logging.getLogger(__name__)


class Sample(NamedTuple):
    """One training pair as it is stored."""

    data: bytes
    """Safetensors with ``latents`` (C, T, H, W) and ``text`` (n, D)."""
    record: dict[str, Any]
    """Where it comes from."""


def pack(latents: Tensor, text: Tensor, record: dict[str, Any], dtype: torch.dtype) -> Sample:
    """A pair in the form it is stored.

    Args:
        latents: normalised, (C, T, H, W).
        text: embedding, zeros at padding, (length, D); the padding is not stored.
        record: where it comes from; plain values.
        dtype: storage.

    Raises:
        ConfigError: a value is not finite, or not within the range of ``dtype``.
    """
    used = int(text.ne(0).any(dim=1).nonzero().max()) + 1 if text.any() else 1
    tensors = {"latents": latents.to("cpu", dtype).contiguous(), "text": text[:used].to("cpu", dtype).contiguous()}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ConfigError(f"{name} of {record} hold values that are not finite in {dtype}; use a wider --dtype.")
    return Sample(save(tensors), record)


def write_tar(folder: Path, index: int, samples: Iterable[Sample], skipped: list[dict[str, str]]) -> None:
    """Write a shard and its index atomically; the same samples give the same bytes.

    Args:
        folder: data folder.
        index: number of the shard.
        samples: in order.
        skipped: what was left out, with the reason.
    """
    path = folder / f"{index:05d}.tar"
    partial = folder / f".{path.name}.{os.getpid()}"
    places, statistics = [], Statistics()
    try:
        with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
            for row, sample in enumerate(samples):
                key = f"{index:05d}{row:05d}"
                places.append([_add(tar, f"{key}.safetensors", sample.data), len(sample.data), zlib.crc32(sample.data)])
                _add(tar, f"{key}.json", json.dumps(sample.record, ensure_ascii=False).encode())
                statistics.add(load(sample.data))
        with partial.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        size = partial.stat().st_size
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    record = {
        "sha256": digest, "bytes": size, "samples": places, "skipped": skipped, "statistics": statistics.sums(),
    }  # fmt: skip
    replace_text(folder / f"{index:05d}.json", json.dumps(record))


def replace_text(path: Path, text: str) -> None:
    """Write a small file under a temporary name and rename it into place."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Add a member; returns where its content starts in the file."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    start = tar.offset + tarfile.BLOCKSIZE
    tar.addfile(member, io.BytesIO(data))
    return start


def shard_record(folder: Path, index: int) -> dict[str, Any] | None:
    """The index of a complete shard; None if the shard is missing or cut short."""
    try:
        record = json.loads((folder / f"{index:05d}.json").read_text())
        return record if (folder / f"{index:05d}.tar").stat().st_size == record["bytes"] else None
    except (OSError, ValueError, KeyError):
        return None


class Statistics:
    """Sums over samples from which :func:`summarise` makes means and spreads."""

    def __init__(self) -> None:
        self.count, self.values, self.tokens, self.longest = 0, 0, 0, 0
        self.total = self.squares = torch.zeros((), dtype=torch.float64)
        self.largest = 0.0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Take in one sample."""
        latents = tensors["latents"].double().flatten(1)
        self.count, self.values = self.count + 1, self.values + latents.shape[1]
        self.total, self.squares = self.total + latents.sum(1), self.squares + latents.square().sum(1)
        self.largest = max(self.largest, float(latents.abs().max()))
        self.tokens += len(tensors["text"])
        self.longest = max(self.longest, len(tensors["text"]))

    def sums(self) -> dict[str, Any]:
        """Plain values, to be added up over shards."""
        return {
            "samples": self.count, "values_per_channel": self.values, "sum": self.total.tolist(),
            "sum_of_squares": self.squares.tolist(), "largest": self.largest, "tokens": self.tokens,
            "longest": self.longest,
        }  # fmt: skip


def summarise(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Statistics of a whole set from those of its shards: the normalised latents should be near mean 0, spread 1."""
    parts = [part for part in parts if part["samples"]]
    count, values = sum(p["samples"] for p in parts), sum(p["values_per_channel"] for p in parts)
    mean = np.sum([p["sum"] for p in parts], axis=0) / values
    spread = np.sqrt(np.maximum(np.sum([p["sum_of_squares"] for p in parts], axis=0) / values - mean**2, 0))
    return {
        "samples": count,
        "latent_mean": [round(float(v), 4) for v in mean],
        "latent_spread": [round(float(v), 4) for v in spread],
        "latent_largest": round(max(p["largest"] for p in parts), 4),
        "tokens_mean": round(sum(p["tokens"] for p in parts) / count, 2),
        "tokens_longest": max(p["longest"] for p in parts),
    }


class TarShards:
    """A folder of webdataset shards; see :class:`students.method.Pairs`.

    Attributes:
        hash: sha256 that changes with the content.
        negative: the negative prompt's embedding (1, text_length, D); None if the folder has none.
        broken: how many different damaged samples were met so far; others take their places.
    """

    reads_ahead = True
    """Draws read from disk, so the trainer lets a thread do the next one."""

    def __init__(self, folder: Path, index: dict[str, Any], *, latent_shape: tuple[int, ...], text_length: int):
        """Read the indices of all shards.

        Args:
            folder: data folder.
            index: content of its ``data.json``.
            latent_shape: (C, T, H, W) the model expects.
            text_length: text embeddings are padded with zeros to this length.

        Raises:
            ConfigError: a shard is missing or cut short, or the data are for another shape.
        """
        if tuple(index["latent_shape"]) != tuple(latent_shape) or index["text_length"] > text_length:
            raise ConfigError(
                f"data folder {folder} holds latents {tuple(index['latent_shape'])} and text of length "
                f"{index['text_length']}, but the base model needs {tuple(latent_shape)} and {text_length}."
            )
        self.folder, self.latent_shape, self.text_length = folder, tuple(latent_shape), text_length
        self.hash = hashlib.sha256(json.dumps(index["shards"], sort_keys=True).encode()).hexdigest()
        self._places: list[tuple[str, int, int, int]] = []
        for shard in index["shards"]:
            record = shard_record(folder, int(Path(shard["file"]).stem))
            if record is None or record["sha256"] != shard["sha256"]:
                raise ConfigError(
                    f"data shard {folder / shard['file']} is missing, half-written or another one than data.json "
                    "lists; run the command that made the folder again."
                )
            self._places += [(shard["file"], *place) for place in record["samples"]]
        if not self._places:
            raise ConfigError(f"data folder {folder} holds no samples.")
        self.negative = self._read_negative()
        self._order = Order(len(self._places))
        self._files: dict[str, int] = {}
        self._broken: set[int] = set()

    def __len__(self) -> int:
        return len(self._places)

    @property
    def broken(self) -> int:
        return len(self._broken)

    def draw(self, seed: int, iteration: int, batch: int, part: slice) -> Batch:
        """Some of the pairs of one iteration's global batch, in epochs without replacement; a damaged sample is
        replaced by one drawn from (seed, position), the same on any rank and after any interruption.

        Raises:
            ConfigError: so much is damaged that 20 draws in a row fail.
        """
        pairs = [self._sound(seed, (iteration - 1) * batch + p) for p in range(batch)[part]]
        return Batch(latents=torch.stack([p[0] for p in pairs]), text=torch.stack([p[1] for p in pairs]))

    def _sound(self, seed: int, position: int) -> tuple[Tensor, Tensor]:
        number = self._order.at(seed, position)
        for attempt in range(ATTEMPTS):
            try:
                return self.read(number)
            except ConfigError as error:
                if number not in self._broken:
                    log.warning("%s Another sample takes its place.", error)
                self._broken.add(number)
            number = stream_seed(seed, "instead", position, attempt) % len(self)
        raise ConfigError(f"{ATTEMPTS} samples in a row of {self.folder} are damaged; make the data again.")

    def read(self, number: int) -> tuple[Tensor, Tensor]:
        """Latents (C, T, H, W) and padded text (text_length, D) of a sample, float32.

        Raises:
            ConfigError: it is damaged.
        """
        file, start, size, checksum = self._places[number]
        where = f"sample {number} of {self.folder} ({file}, byte {start})"
        try:
            data = os.pread(self._file(file), size, start)
        except OSError as error:
            raise ConfigError(f"{where} cannot be read ({error.strerror}).") from error
        if zlib.crc32(data) != checksum:
            raise ConfigError(f"{where} does not match its checksum.")
        tensors = load(data)
        latents, text = tensors["latents"].float(), tensors["text"].float()
        if tuple(latents.shape) != self.latent_shape or len(text) > self.text_length:
            raise ConfigError(f"{where} has shape {tuple(latents.shape)} and {len(text)} tokens.")
        return latents, torch.nn.functional.pad(text, (0, 0, 0, self.text_length - len(text)))

    def _file(self, name: str) -> int:
        if name not in self._files:
            while len(self._files) >= OPEN_FILES:
                os.close(self._files.pop(next(iter(self._files))))
            self._files[name] = os.open(self.folder / name, os.O_RDONLY)
        return self._files[name]

    def _read_negative(self) -> Tensor | None:
        path = self.folder / NEGATIVE
        if not path.is_file():
            return None
        text = load(path.read_bytes())["text"].float()
        return torch.nn.functional.pad(text, (0, 0, 0, self.text_length - len(text)))[None]
