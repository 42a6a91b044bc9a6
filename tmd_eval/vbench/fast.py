"""The fast engine: the official models and weights without the work that the official code does twice.

Runs inside VBench's environment, loaded by ``worker.py``. Each video's value is the official one to 1e-4. All its
dimensions go through one worker, which decodes a video once by each decoder that the official code of the dimensions
uses (decord; OpenCV for RAFT), resizes and crops it for CLIP once, and loads each model once. Beyond that:

- subject consistency: DINO on batches of frames instead of one at a time;
- imaging quality: MUSIQ on batches;
- appearance style: the style's text is encoded once, not once a frame, and frames go in batches;
- temporal style and overall consistency: one ViCLIP, which sees a video once where both ask for it;
- background consistency and aesthetic quality: batched by the official code already, so only the sharing is saved;
- dynamic degree and the static filter: RAFT encodes a frame once, not once for each pair it is in; upsamples only the
  last of its twenty iterations; and stops as soon as the answer is known, for both are yes or no.
"""

from __future__ import annotations

import functools
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

BATCH = 16
AESTHETIC_BATCH = 32
"""The official code's own: equal batches keep equal arithmetic in half precision."""


class Clip:
    """The frames of one video, decoded and prepared once for all dimensions that want them alike."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.seen: dict[str, Any] = {}
        """Features of the whole video by the model's name."""

    @cached_property
    def frames(self) -> Any:
        """(T, H, W, 3) of uint8, by decord."""
        from vbench.utils import load_video

        return load_video(self.path, return_tensor=False)

    @cached_property
    def pixels(self) -> Any:
        """(T, 3, H, W) of float 0 to 255."""
        import torch

        return torch.Tensor(self.frames).permute(0, 3, 1, 2)

    @cached_property
    def clip_images(self) -> Any:
        """(T, 3, 224, 224) as CLIP wants them, from float pixels."""
        from vbench.utils import clip_transform

        return clip_transform(224)(self.pixels)


Score = Callable[[Clip, dict[str, Any]], dict[str, Any]]
"""From a clip and its request's video to a row with ``video_results``."""


def batches(frames: Any, size: int = BATCH) -> Iterator[Any]:
    """Consecutive batches of frames."""
    for start in range(0, len(frames), size):
        yield frames[start : start + size]


@functools.cache
def load_dino(device: str) -> Any:
    """DINO ViT-B/16, as the official code gets it."""
    import torch
    from vbench.utils import init_submodules

    return torch.hub.load(**init_submodules(["subject_consistency"], local=True)["subject_consistency"]).to(device)


@functools.cache
def load_clip(path: str, device: str) -> Any:
    """A CLIP of OpenAI's: half precision on a GPU, as in the official code."""
    import clip  # type: ignore[import-not-found]  # lives in VBench's environment
    import torch

    return clip.load(path, device=torch.device(device))[0]


@functools.cache
def load_viclip(path: str, vocabulary: str, device: str) -> Any:
    """ViCLIP."""
    from vbench.third_party.ViCLIP.simple_tokenizer import SimpleTokenizer
    from vbench.third_party.ViCLIP.viclip import ViCLIP

    return ViCLIP(tokenizer=SimpleTokenizer(vocabulary), pretrain=path).to(device)


def load_musiq(path: str, device: str) -> Any:
    """MUSIQ."""
    from pyiqa.archs.musiq_arch import MUSIQ  # type: ignore[import-not-found]  # lives in VBench's environment

    return MUSIQ(pretrained_model_path=path).to(device).eval()


def consistency(features: Any) -> tuple[float, int]:
    """Sum over frames of the mean cosine with the previous and the first frame, each at least 0; and their number.

    Args:
        features: (T, D).
    """
    from torch.nn.functional import cosine_similarity, normalize

    features = normalize(features, dim=-1)
    previous = cosine_similarity(features[:-1], features[1:]).clamp(min=0)
    first = cosine_similarity(features[:1], features[1:]).clamp(min=0)
    return float(((previous.double() + first.double()) / 2).sum()), len(features) - 1


def subject_consistency(weights: Sequence[str], device: str) -> Score:
    """Mean of the cosines with the previous and the first frame in DINO's features."""
    import torch
    from vbench.utils import dino_transform

    model, transform = load_dino(device), dino_transform(224)

    def score(clip: Clip, video: dict[str, Any]) -> dict[str, Any]:
        features = torch.cat([model(batch.to(device)) for batch in batches(transform(clip.pixels))])
        total, pairs = consistency(features)
        return {"video_results": total / pairs, "frame_pairs": pairs}

    return score


def background_consistency(weights: Sequence[str], device: str) -> Score:
    """The same in CLIP's features."""
    model = load_clip(weights[0], device)

    def score(clip: Clip, video: dict[str, Any]) -> dict[str, Any]:
        total, pairs = consistency(model.encode_image(clip.clip_images.to(device)))
        return {"video_results": total / pairs, "video_sim": total, "cnt_per_video": pairs}

    return score


def aesthetic_quality(weights: Sequence[str], device: str) -> Score:
    """Mean of LAION's aesthetic score of each frame, a linear map of CLIP's features, over 10."""
    import torch
    from torch.nn.functional import normalize
    from vbench.aesthetic_quality import get_aesthetic_model

    model = load_clip(weights[0], device)
    head = get_aesthetic_model(str(Path(weights[1]).parent)).to(device)

    def score(clip: Clip, video: dict[str, Any]) -> dict[str, Any]:
        scores = [
            head(normalize(model.encode_image(batch.to(device)).float(), dim=-1))[:, 0]
            for batch in batches(clip.clip_images, AESTHETIC_BATCH)
        ]
        return {"video_results": float((torch.cat(scores) / 10).mean())}

    return score


def appearance_style(weights: Sequence[str], device: str) -> Score:
    """Mean cosine of CLIP's features of the frames and of the style's text."""
    import clip as openai_clip
    import torch
    from PIL import Image
    from torch.nn.functional import normalize
    from vbench.utils import clip_transform_Image

    model, transform = load_clip(weights[0], device), clip_transform_Image(224)

    @functools.cache
    def text(style: str) -> Any:
        return normalize(model.encode_text(openai_clip.tokenize([style]).to(device)), dim=-1)

    def score(clip: Clip, video: dict[str, Any]) -> dict[str, Any]:
        style = text(video["auxiliary_info"]["appearance_style"]["appearance_style"])
        images = [transform(Image.fromarray(frame)) for frame in clip.frames]
        cosines = []
        for batch in batches(images):
            features = normalize(model.encode_image(torch.stack(batch).to(device)), dim=-1)
            cosines += (model.logit_scale.exp() * features @ style.T / 100)[:, 0].tolist()
        return {"video_results": sum(cosines) / len(cosines), "frame_results": cosines, "cur_sim": cosines[-1]}

    return score


def _viclip(weights: Sequence[str], device: str) -> Score:
    """Cosine of ViCLIP's features of eight frames and of the prompt."""
    import torch
    from torch.nn.functional import normalize
    from vbench.utils import clip_transform, get_frame_indices

    model, transform = load_viclip(weights[0], weights[1], device), clip_transform(224)

    @functools.cache
    def text(prompt: str) -> Any:
        return normalize(model.encode_text(prompt).float(), dim=-1)

    def score(clip: Clip, video: dict[str, Any]) -> dict[str, Any]:
        if "viclip" not in clip.seen:
            places = get_frame_indices(8, len(clip.frames), sample="middle")
            images = torch.from_numpy(clip.frames[places]).permute(0, 3, 1, 2)  # uint8: resized with rounding
            clip.seen["viclip"] = normalize(
                model.encode_vision(transform(images).to(device)[None], test=True).float(), dim=-1
            )
        return {"video_results": float((clip.seen["viclip"] @ text(video["prompt"]).T)[0, 0])}

    return score


def imaging_quality(weights: Sequence[str], device: str) -> Score:
    """Mean of MUSIQ's score of each frame, 0 to 100."""
    from vbench.imaging_quality import transform

    model = load_musiq(weights[0], device)

    def score(clip: Clip, video: dict[str, Any]) -> dict[str, Any]:
        images = transform(clip.pixels, "longer")
        scores = [score for batch in batches(images) for score in model(batch.to(device)).flatten().tolist()]
        return {"video_results": sum(scores) / len(scores)}

    return score


class Flows:
    """RAFT's flows between frames of one video: each frame is encoded once."""

    def __init__(self, model: Any, frames: list[Any]) -> None:
        from vbench.third_party.RAFT.core.utils_core.utils import InputPadder

        pad = InputPadder(frames[0].shape).pad
        self.model, self.frames = model, [2 * (pad(frame)[0] / 255.0) - 1.0 for frame in frames]
        self.features: dict[int, Any] = {}
        self.contexts: dict[int, Any] = {}
        self.correlation = sys.modules[type(model).__module__].CorrBlock

    def _feature(self, place: int) -> Any:
        if place not in self.features:
            self.features[place] = self.model.fnet(self.frames[place]).float()
        return self.features[place]

    def speed(self, one: int, other: int, share: float) -> float:
        """Mean length, in pixels, of the fastest vectors of the flow.

        Args:
            one: place of the first frame.
            other: of the second.
            share: of the vectors that count.
        """
        import torch

        model, image = self.model, self.frames[one]
        lookup = self.correlation(self._feature(one), self._feature(other), radius=model.args.corr_radius)
        if one not in self.contexts:
            net, given = torch.split(model.cnet(image), [model.hidden_dim, model.context_dim], dim=1)
            self.contexts = {one: (torch.tanh(net), torch.relu(given))}  # the next pair begins with the next frame
        net, given = self.contexts[one]
        start, end = model.initialize_flow(image)
        block = model.update_block
        for _ in range(20):
            motion = block.encoder(end - start, lookup(end))
            net = block.gru(net, torch.cat([given, motion], dim=1))
            end = end + block.flow_head(net)
        flow = model.upsample_flow(end - start, 0.25 * block.mask(net))
        speeds = flow[0].norm(dim=0).flatten()
        return float(speeds.topk(int(len(speeds) * share)).values.mean())


def _raft(weights: Sequence[str], device: str) -> Any:
    import torch
    from easydict import EasyDict  # type: ignore[import-not-found]  # lives in VBench's environment
    from vbench.dynamic_degree import DynamicDegree

    arguments = EasyDict(model=weights[0], small=False, mixed_precision=False, alternate_corr=False)
    return DynamicDegree(arguments, torch.device(device))


def dynamic_degree(weights: Sequence[str], device: str) -> Score:
    """Whether enough neighbouring frames, 8 a second, move fast enough."""
    raft = _raft(weights, device)

    def score(clip: Clip, video: dict[str, Any]) -> dict[str, Any]:
        frames = raft.get_frames(clip.path)
        raft.set_params(frame=frames[0], count=len(frames))
        threshold, wanted = raft.params["thres"], raft.params["count_num"]
        flows, fast, moves = Flows(raft.model, frames), 0, False
        for place in range(len(frames) - 1):
            fast += flows.speed(place, place + 1, 0.05) > threshold
            flows.features.pop(place - 1, None)
            moves = fast >= wanted
            if moves or fast + (len(frames) - 2 - place) < wanted:
                break
        return {"video_results": moves}

    return score


def static_filter(weights: Sequence[str], device: str) -> Score:
    """VBench's static filter; see ``static`` in worker.py for its rule."""
    raft = _raft(weights, device)
    raft.extract_frame = lambda frames, interval: frames

    def score(clip: Clip, video: dict[str, Any]) -> dict[str, Any]:
        frames = raft.get_frames(clip.path)
        last = len(frames) - 1
        threshold, allowed = 3.0 * min(frames[0].shape[-2:]) / 256.0, round(2 * len(frames) / 16.0)
        flows, fast = Flows(raft.model, frames), 0
        still = not any(flows.speed(*pair, 0.02) > threshold * allowed * 2 for pair in ((0, last), (last, 0)))
        for place in range(last):
            if not still:
                break
            fast += flows.speed(place, place + 1, 0.02) > threshold
            still = fast <= allowed
        return {"video_results": still}

    return score


TASKS: dict[str, Callable[[Sequence[str], str], Score]] = {
    "subject_consistency": subject_consistency,
    "background_consistency": background_consistency,
    "aesthetic_quality": aesthetic_quality,
    "imaging_quality": imaging_quality,
    "appearance_style": appearance_style,
    "temporal_style": _viclip,
    "overall_consistency": _viclip,
    "dynamic_degree": dynamic_degree,
    "static_filter": static_filter,
}


def run(tasks: Sequence[dict[str, Any]], device: str, write: Callable[[dict[str, Any]], Any]) -> dict[str, str]:
    """Score the videos of several tasks, video by video.

    Args:
        tasks: each with ``dimension``, ``weights``, ``videos`` (each with ``path``, ``file``) and ``results``.
        device: "cpu" or "cuda".
        write: makes a task's ``Results``.

    Returns:
        Why each task failed that did; the others are finished.
    """
    failed: dict[str, str] = {}
    ready: dict[str, tuple[Score, Any]] = {}
    wanted: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for task in tasks:
        name = task["dimension"]
        try:
            ready[name] = TASKS[name](task["weights"], device), write(task)
        except Exception as error:
            traceback.print_exc()
            failed[name] = f"{type(error).__name__}: {error}"
            continue
        for video in task["videos"]:
            wanted.setdefault(video["file"], []).append((name, video))
    for videos in wanted.values():
        clip = Clip(videos[0][1]["path"])
        for name, video in videos:
            if name in failed:
                continue
            score, results = ready[name]
            results.start()
            try:
                results.add(video["path"], score(clip, video))
            except Exception as error:
                traceback.print_exc()
                failed[name] = f"{type(error).__name__}: {error}"
    return failed
