"""VBench's weights: what is refused, how copies and downloads come into place, and what is said about the rest."""

from __future__ import annotations

import functools
import hashlib
import io
import pickle
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from students.errors import ConfigError, EnvironmentMissingError, TmdError
from tmd_eval.vbench import detectron, weights
from tmd_eval.vbench.dimensions import DIMENSIONS, OTHER_WEIGHTS
from tmd_eval.vbench.weights_manifest import BY_PATH, FILES, WeightFile

AMT = BY_PATH["amt_model/amt-s.pth"]


def archive(name: str = "x/data.pkl", size: int = 5000) -> bytes:
    """What torch.save writes: a zip file."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr(name, bytes(size))
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMD_EVAL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_the_manifest_covers_every_dimension() -> None:
    needed = {path for one in DIMENSIONS.values() for path in one.weights} | set().union(*OTHER_WEIGHTS.values())
    assert needed == set(BY_PATH) and len(FILES) == len(BY_PATH)
    assert [name for name, one in DIMENSIONS.items() if not one.weights] == ["temporal_flickering"]
    assert all(file.urls and all(url.startswith("https://") for url in file.urls) for file in FILES)
    assert not any("blob.core.windows.net" in url for file in FILES for url in file.urls)  # GRiT's dead source


@pytest.mark.parametrize(
    ("path", "content", "reason"),
    [
        (AMT.path, b"", "empty"),
        (AMT.path, b"<!DOCTYPE html><html>404", "web page"),
        (AMT.path, archive()[:2000], "truncated"),
        (AMT.path, b"some text", "not a file of torch.save"),
        ("clip_model/ViT-B-32.pt", archive(), "TorchScript"),
        ("clip_model/ViT-B-32.pt", archive("x/code/__torch__.py"), "SHA-256"),
        ("ViCLIP/bpe_simple_vocab_16e6.txt.gz", b"\x1f\x8b\x08\x00\x00", "gzip"),
        ("bert-base-uncased/vocab.txt", b"[PAD]\n", "bytes instead of"),
        ("bert-base-uncased/model.safetensors", b"\x02\x00\x00\x00\x00\x00\x00\x00{}rest", "truncated"),
    ],
)
def test_wrong_files_are_told_apart(path: str, content: bytes, reason: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.write_bytes(content)
    assert reason in str(weights.problem(BY_PATH[path], copy))


def test_a_cut_file_of_the_old_format_is_truncated(tmp_path: Path) -> None:
    import torch

    path = tmp_path / "raft-things.pth"
    shared = torch.arange(50.0)
    state = {"module.a": shared[:20], "module.b": shared, "c": torch.ones(7, dtype=torch.int64), "epoch": 3}
    torch.save(state, path, _use_new_zipfile_serialization=False)
    file, whole = BY_PATH["raft_model/models/raft-things.pth"], path.read_bytes()
    assert weights.problem(file, path, unverified=True) is None
    for length in (3, 40, len(whole) // 2, len(whole) - 60, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert weights.problem(file, path, unverified=True) == "is truncated or damaged", length
    path.write_bytes(whole + b"more")
    assert weights.problem(file, path, unverified=True) == "is truncated or damaged"
    path.write_bytes(pickle.dumps({"a": 1}))  # somebody's own pickle announces nothing
    assert weights.problem(file, path, unverified=True) is None
    path.write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
    weights.problem(file, path, unverified=True)
    path.write_bytes(b"\x80\x02cos\nsystem\n(X" + len(b"false").to_bytes(4, "little") + b"falsetR.")
    assert weights.problem(file, path, unverified=True) is None and not (tmp_path / "ran").exists()  # nothing was run


def test_a_hash_that_differs_is_refused_unless_asked_for(own_home: Path) -> None:
    target = weights.folder() / "clip_model" / "ViT-B-32.pt"
    target.parent.mkdir(parents=True)
    target.write_bytes(archive("x/code/__torch__.py"))
    with pytest.raises(EnvironmentMissingError, match=r"ViT-B-32\.pt has SHA-256") as caught:
        weights.check("background_consistency")
    assert caught.value.exit_code == 4
    weights.check("background_consistency", unverified=True)
    digest = hashlib.sha256(target.read_bytes()).hexdigest()
    assert weights.hashes("background_consistency") == {"clip_model/ViT-B-32.pt": digest}
    target.write_bytes(archive("x/code/__torch__.py", 6000))  # the remembered hash is not used for another file
    assert weights.hashes("background_consistency") != {"clip_model/ViT-B-32.pt": digest}


def test_an_offline_copy_in_either_layout(tmp_path: Path) -> None:
    source = tmp_path / "brought"
    (source / "amt_model").mkdir(parents=True)
    (source / "amt_model" / "amt-s.pth").write_bytes(archive())
    (source / "raft-things.pth").write_bytes(archive()[:3000])
    failed = weights.install(source, ["motion_smoothness", "dynamic_degree", "human_action"])
    assert "truncated" in failed["raft_model/models/raft-things.pth"]
    assert "is not in" in failed["umt_model/l16_ptk710_ftk710_ftk400_f16_res224.pth"] and len(failed) == 2
    assert weights.problems("motion_smoothness") == {}
    assert not (weights.folder() / "raft_model" / "models" / "raft-things.pth").exists()
    (source / "raft-things.pth").write_bytes(archive())
    assert weights.install(source, ["dynamic_degree"]) == {}
    with pytest.raises(ConfigError, match="no folder"):
        weights.install(tmp_path / "absent", ["color"])


def test_files_of_one_name_are_told_apart_by_their_hash(
    own_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DINO and DINOv2 both have a vision_transformer.py; code of another hash is never taken, as it would be run."""
    path = "dino_model/facebookresearch_dino_main/vision_transformer.py"
    source = tmp_path / "brought"
    for folder, text in (("a", "of DINOv2"), ("b", "of DINO")):
        (source / folder).mkdir(parents=True)
        (source / folder / "vision_transformer.py").write_text(text)
    file = replace(BY_PATH[path], sha256=hashlib.sha256(b"of DINO").hexdigest())
    monkeypatch.setattr(weights, "needed", lambda dimensions: [file])
    for unverified in (False, True):
        assert weights.install(source, ["subject_consistency"], unverified=unverified) == {}
        assert (weights.folder() / path).read_text() == "of DINO"
        (weights.folder() / path).unlink()
    (source / "b" / "vision_transformer.py").write_text("changed")
    failed = weights.install(source, ["subject_consistency"], unverified=True)
    assert "SHA-256" in failed[path] and not (weights.folder() / path).exists()


def test_dino_s_two_places(own_home: Path) -> None:
    own = weights.folder() / "dino_model" / "dino_vitbase16_pretrain.pth"
    own.parent.mkdir(parents=True)
    own.write_bytes(archive())
    weights.prepare()
    second = weights.folder() / "torch" / "hub" / "checkpoints" / own.name
    assert second.read_bytes() == own.read_bytes()
    weights.prepare()
    assert second.is_symlink()


def dreamsim_archive(size: int) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as opened:
        opened.writestr("clip_vitb16_pretrain.pth.tar", bytes(size))
        opened.writestr("ensemble_lora/adapter_config.json", "{}")
    return data.getvalue()


def test_dreamsim_s_archive_is_unpacked_whole_and_once(own_home: Path) -> None:
    archive = weights.folder() / "dreamsim_model" / "dreamsim_ensemble_checkpoint.zip"
    archive.parent.mkdir(parents=True)
    archive.write_bytes(dreamsim_archive(5000)[:4000])
    assert "truncated" in weights.problems("first_frames_dreamsim")[weights.DREAMSIM]
    weights.prepare()
    assert [path.name for path in archive.parent.iterdir()] == [archive.name]
    archive.write_bytes(dreamsim_archive(5000).replace(bytes(100), b"x" * 100, 1))
    with pytest.raises(EnvironmentMissingError, match=r"is damaged \(Bad CRC-32.*setup --long --fetch"):
        weights.prepare()
    assert [path.name for path in archive.parent.iterdir()] == [archive.name]
    for size in (5000, 6000):  # the second time another archive
        archive.write_bytes(dreamsim_archive(size))
        weights.prepare()
        clip = archive.with_suffix("") / "clip_vitb16_pretrain.pth.tar"
        before = clip.stat()
        assert before.st_size == size and (archive.with_suffix("") / "ensemble_lora" / "adapter_config.json").is_file()
        weights.prepare()
        assert clip.stat().st_ino == before.st_ino
    dino = weights.folder() / "dino_model"
    (dino / "facebookresearch_dino_main").mkdir(parents=True)
    (dino / "facebookresearch_dino_main" / "hubconf.py").write_text("code")
    (dino / "dino_vitbase16_pretrain.pth").write_text("weights")
    assert (archive.with_suffix("") / "facebookresearch_dino_main" / "hubconf.py").read_text() == "code"
    assert (archive.with_suffix("") / "checkpoints" / "dino_vitbase16_pretrain.pth").read_text() == "weights"
    assert {path.name for path in archive.parent.iterdir()} == {archive.name, archive.stem}


class Server(SimpleHTTPRequestHandler):
    """Serves a folder with ranges, as the sources of the weights do; cuts the first reply short."""

    cut = True
    ranges: list[str]

    def do_GET(self) -> None:
        data = Path(self.translate_path(self.path)).read_bytes()
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        type(self).ranges.append(self.headers.get("Range", ""))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        rest = data[start:]
        self.wfile.write(rest[: len(rest) // 2] if self.cut else rest)
        type(self).cut = False

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    folder = tmp_path / "served"
    folder.mkdir()
    Server.cut, Server.ranges = True, []
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Server, directory=str(folder)))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_address[1]}", folder
    httpd.shutdown()


def test_a_download_goes_on_and_comes_whole(server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    url, folder = server
    data = archive(size=50_000)
    (folder / "amt-s.pth").write_bytes(data)
    file = WeightFile(
        path=AMT.path, kind="torch", urls=(f"{url}/amt-s.pth",), sha256=hashlib.sha256(data).hexdigest(), size=len(data)
    )
    monkeypatch.setattr(weights, "FILES", (file,))
    target = weights.folder() / file.path
    failed = weights.fetch(["motion_smoothness"])
    assert "broke off" in failed[file.path] and not target.exists()
    assert weights.fetch(["motion_smoothness"]) == {} and target.read_bytes() == data
    assert Server.ranges == ["", f"bytes={len(data) // 2}-"]
    assert [path.name for path in target.parent.iterdir()] == ["amt-s.pth"]
    assert weights.fetch(["motion_smoothness"]) == {} and len(Server.ranges) == 2  # there already


def test_what_a_source_sends_instead(server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    url, folder = server
    (folder / "page").write_text("<html>sorry</html>" * 100)
    Server.cut = False
    file = WeightFile(path=AMT.path, kind="torch", urls=(f"{url}/page", "http://127.0.0.1:9/dead"))
    monkeypatch.setattr(weights, "FILES", (file,))
    reason = weights.fetch(["motion_smoothness"])[file.path]
    assert "web page" in reason and "refused" in reason and not (weights.folder() / file.path).exists()
    monkeypatch.setattr(weights.shutil, "disk_usage", lambda path: type("U", (), {"free": 10}))
    with pytest.raises(TmdError, match="MiB free"):
        weights.fetch(["motion_smoothness"])


def test_detectron2_from_a_checkout(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    (checkout / "detectron2" / "modeling").mkdir(parents=True)
    for name in ("__init__.py", "modeling/__init__.py", "modeling/kernel.cu"):
        (checkout / "detectron2" / name).write_text("")
    assert not detectron.installed()
    detectron.install(checkout)
    assert detectron.installed() and not list(detectron.code_folder().rglob("*.cu"))
    detectron.install(checkout)  # again: replaced
    assert [path.name for path in detectron.code_folder().iterdir()] == ["detectron2"]
    with pytest.raises(ConfigError, match="not a checkout"):
        detectron.install(tmp_path)
