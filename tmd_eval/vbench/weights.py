"""VBench's weights on this machine: what is there and whole, what is missing, and getting it.

Files lie under ``TMD_EVAL_HOME/vbench-weights`` as VBench wants them. A file comes into place whole and checked, or not
at all: downloads go on where they stopped in ``NAME.part`` beside it.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

from students.errors import ConfigError, EnvironmentMissingError, TmdError
from students.machine import home
from tmd_eval.files import TEMPORARY, disk_full, is_disk_full, write_json
from tmd_eval.vbench import torch_file
from tmd_eval.vbench.dimensions import DREAMSIM, weights_of
from tmd_eval.vbench.weights_manifest import BY_PATH, FILES, WeightFile

PART = ".part"
_CHUNK = 1 << 20
_HASHES = ".hashes.json"
_STAMP = ".unpacked.json"
_DINO_FILE = "dino_vitbase16_pretrain.pth"


def folder() -> Path:
    """Where VBench looks for its weights (``VBENCH_CACHE_DIR`` of the workers)."""
    return home() / "vbench-weights"


def needed(dimensions: Iterable[str]) -> list[WeightFile]:
    """The files some dimensions, or other tasks of workers, need: each once, in the manifest's order."""
    wanted = {name for dimension in dimensions for name in weights_of(dimension)}
    return [file for file in FILES if file.path in wanted]


def problem(file: WeightFile, path: Path, *, unverified: bool = False) -> str | None:
    """What is wrong with a copy of a weights file, None if nothing is.

    Args:
        file: what it should be.
        path: the copy.
        unverified: accept another hash and size than the published ones.
    """
    if not path.is_file():
        return "is missing"
    if reason := _format_problem(file, path):
        return reason
    if unverified:
        return None
    if file.size is not None and path.stat().st_size != file.size:
        return f"has {path.stat().st_size} bytes instead of the published {file.size}"
    if file.sha256 is not None and not (found := sha256(path)).startswith(file.sha256):
        return f"has SHA-256 {found[:12]}..., the published one is {file.sha256[:12]}..."
    return None


def problems(dimension: str, *, unverified: bool = False) -> dict[str, str]:
    """The weights of a dimension that are not as they should be: path under the folder to what is wrong."""
    found = {f.path: problem(f, folder() / f.path, unverified=unverified) for f in needed([dimension])}
    return {path: reason for path, reason in found.items() if reason}


def hashes(dimension: str) -> dict[str, str]:
    """SHA-256 of each weights file a dimension reads (code and vocabularies among them)."""
    return {file.path: sha256(folder() / file.path) for file in needed([dimension])}


def sha256(path: Path) -> str:
    """SHA-256 of a file; that of a file in the weights' folder is remembered as long as its size and date stay."""
    stat, cache = path.stat(), folder() / _HASHES
    inside = path.is_relative_to(folder())
    key = [stat.st_size, stat.st_mtime_ns]
    known = _read_hashes(cache) if inside else {}
    name = str(path.relative_to(folder())) if inside else ""
    entry = known.get(name)
    if isinstance(entry, list) and entry[:2] == key:
        return str(entry[2])
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if inside and os.access(folder(), os.W_OK):
        write_json(cache, {**_read_hashes(cache), name: [*key, digest]})
    return digest


def install(source: Path, dimensions: Iterable[str], *, unverified: bool = False) -> dict[str, str]:
    """Copy weights from a folder someone brought: laid out as VBench's, or all files in one place.

    Args:
        source: the folder.
        dimensions: whose files to take.
        unverified: accept files whose hash differs from the published one; never code, which would be run.

    Returns:
        What could not be taken: path to reason.

    Raises:
        ConfigError: no such folder.
        TmdError: the disk is full.
    """
    if not source.is_dir():
        raise ConfigError(f"There is no folder {source} with VBench's weights.")
    failed = {}
    for file in needed(dimensions):
        target = folder() / file.path
        if problem(file, target, unverified=unverified) is None:
            continue
        copies = [source / file.path]
        if file.path.startswith("bert-base-uncased/"):
            copies.append(source / Path(file.path).name)
        else:
            copies.extend(sorted(source.rglob(Path(file.path).name)))
        found = [copy for copy in copies if copy.is_file()]
        if not found:
            failed[file.path] = f"is not in {source}"
            continue
        # several files bear one name (vision_transformer.py, __init__.py): the published one is meant
        reasons = {copy: problem(file, copy) for copy in found}
        if unverified and not _is_code(file) and None not in reasons.values():
            reasons = {copy: problem(file, copy, unverified=True) for copy in found}
        chosen = next((copy for copy, reason in reasons.items() if reason is None), None)
        if chosen is None:
            failed[file.path] = f"{found[0]} {reasons[found[0]]}"
            continue
        part = target.with_name(f"{TEMPORARY}{target.name}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(chosen, part)
            part.replace(target)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise (disk_full(target) if is_disk_full(error) else error) from error
    return failed


def fetch(
    dimensions: Iterable[str], *, unverified: bool = False, log: Callable[[str], None] = lambda _: None
) -> dict[str, str]:
    """Download the weights that are missing or broken; a broken-off download goes on where it stopped.

    Args:
        dimensions: whose files to get.
        unverified: accept files whose hash differs from the published one; never code, which would be run.
        log: told each step.

    Returns:
        What could not be got: path to reason.

    Raises:
        TmdError: the disk is full.
    """
    failed = {}
    for file in needed(dimensions):
        target = folder() / file.path
        if problem(file, target, unverified=unverified) is None:
            continue
        reasons = []
        for url in file.urls:
            log(f"fetching {url}")
            try:
                reason = _download(file, url, target, unverified and not _is_code(file))
            except OSError as error:
                if is_disk_full(error):
                    raise disk_full(target) from error
                reason = str(getattr(error, "reason", None) or error)
            if reason is None:
                break
            reasons.append(f"{url}: {reason}")
        else:
            failed[file.path] = "; ".join(reasons)
    return failed


def prepare() -> None:
    """Put in place what VBench needs and can be had without a network.

    Raises:
        EnvironmentMissingError: the folder cannot be written to, or an archive in it is damaged.
    """
    root = folder()
    try:
        root.mkdir(parents=True, exist_ok=True)
        dino = root / "dino_model" / _DINO_FILE
        hub = root / "torch" / "hub" / "checkpoints" / dino.name  # where DINO's own code reads them, second place
        if dino.is_file() and not (hub.is_symlink() and hub.exists()):
            hub.parent.mkdir(parents=True, exist_ok=True)
            hub.unlink(missing_ok=True)
            hub.symlink_to(os.path.relpath(dino, hub.parent))
        file = BY_PATH["ViCLIP/bpe_simple_vocab_16e6.txt.gz"]
        target = root / file.path
        for copy in (home() / "vbench-env").glob("lib/python3*/site-packages/clip/bpe_simple_vocab_16e6.txt.gz"):
            if problem(file, target) is not None and problem(file, copy) is None:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(copy, part := target.with_name(TEMPORARY + target.name))
                part.replace(target)
        if problem(BY_PATH[DREAMSIM], root / DREAMSIM, unverified=True) is None:
            _unpack_dreamsim(root / DREAMSIM)
    except zipfile.BadZipFile as error:
        raise EnvironmentMissingError(
            f"{root / DREAMSIM} is damaged ({error}); delete it and run tmd-eval vbench setup --long --fetch."
        ) from error
    except OSError as error:
        if is_disk_full(error):
            raise disk_full(root) from error
        raise EnvironmentMissingError(f"VBench's weights folder {root} cannot be used ({error.strerror}).") from error


def _unpack_dreamsim(archive: Path) -> None:
    """Unpack DreamSim's archive beside it, with DINO's code and weights where its code asks torch.hub for them."""
    target, stat = archive.with_suffix(""), archive.stat()
    stamp = json.dumps([stat.st_size, stat.st_mtime_ns])
    if (target / _STAMP).is_file() and (target / _STAMP).read_text() == stamp:
        return
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=archive.parent) as work:
        made = Path(work, "new")
        with zipfile.ZipFile(archive) as opened:
            opened.extractall(made)
        dino = Path("..", "..", "dino_model")
        (made / "checkpoints").mkdir()
        (made / "checkpoints" / _DINO_FILE).symlink_to(Path("..") / dino / _DINO_FILE)
        (made / "facebookresearch_dino_main").symlink_to(dino / "facebookresearch_dino_main")
        (made / _STAMP).write_text(stamp)
        if target.exists():
            target.rename(Path(work, "old"))
        made.replace(target)


def check(dimension: str, *, unverified: bool = False) -> None:
    """Fail unless every weights file of a dimension is there and whole.

    Raises:
        EnvironmentMissingError: names each file, what is wrong and what to do.
    """
    if found := problems(dimension, unverified=unverified):
        listed = ", ".join(f"{folder() / path} {reason}" for path, reason in found.items())
        raise EnvironmentMissingError(
            f"{dimension} lacks weights: {listed}; tmd-eval vbench setup --fetch downloads them, "
            "setup --weights DIR takes them from a folder"
            + (", --no-static-filter goes without." if dimension == "static_filter" else ".")
        )


def _is_code(file: WeightFile) -> bool:
    return file.path.endswith(".py")


def _download(file: WeightFile, url: str, target: Path, unverified: bool) -> str | None:
    """None when the file is in place, else why not; raises OSError (URLError is one) when the network fails."""
    part = target.with_name(target.name + PART)
    target.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        reply = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # the part is as long as the file, or longer: judge it below
            return f"HTTP {error.code}"
    else:
        with reply:
            resumed = reply.status == 206
            left = int(reply.headers.get("Content-Length") or 0)
            if (free := shutil.disk_usage(part.parent).free) < left:
                raise TmdError(
                    f"{target.name} needs {left >> 20} MiB more, and {part.parent} has {free >> 20} MiB free."
                )
            with part.open("ab" if resumed else "wb") as output:
                while chunk := reply.read(_CHUNK):
                    output.write(chunk)
            total = left + (have if resumed else 0)
        if left and part.stat().st_size < total:
            return f"broke off after {part.stat().st_size} of {total} bytes; run the same command again to go on"
    if reason := problem(file, part, unverified=unverified):
        part.unlink()
        return f"what came {reason}"
    part.replace(target)
    return None


def _format_problem(file: WeightFile, path: Path) -> str | None:
    with path.open("rb") as opened:
        head = opened.read(512)
    if not head:
        return "is empty"
    if head.lstrip()[:1] == b"<":
        return "is a web page, not weights"
    if file.kind == "gzip":
        try:
            with gzip.open(path) as stream:
                while stream.read(_CHUNK):
                    pass
        except (OSError, EOFError):
            return "is truncated or not gzip"
    elif file.kind == "zip":
        if not zipfile.is_zipfile(path):  # looks for the directory, at the end
            return "is truncated or not a zip archive"
    elif file.kind == "safetensors":
        length = int.from_bytes(head[:8], "little")
        try:
            with path.open("rb") as opened:
                opened.seek(8)
                header = json.loads(opened.read(min(length, 100 << 20)))
            ends = [value["data_offsets"][1] for name, value in header.items() if name != "__metadata__"]
            if path.stat().st_size != 8 + length + max(ends, default=0):
                return "is truncated"
        except (ValueError, KeyError, TypeError):
            return "is not a safetensors file"
    elif file.kind in ("torch", "torchscript"):
        zipped = head[:2] == b"PK"
        if zipped and not zipfile.is_zipfile(path):
            return "is truncated"
        if not zipped and head[:1] != b"\x80":
            return "is not a file of torch.save"
        if not zipped and not torch_file.is_whole(path):
            return "is truncated or damaged"
        if file.kind == "torchscript":
            names = zipfile.ZipFile(path).namelist() if zipped else []
            if not any("/code/" in name for name in names):
                return "is not a TorchScript archive, which VBench needs here (a plain state dict does not load)"
    return None


def _read_hashes(path: Path) -> dict[str, object]:
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
