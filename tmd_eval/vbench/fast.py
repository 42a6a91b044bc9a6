"""The fast engine: the official models and weights without the work that the official code does twice.

Runs inside VBench's environment, loaded by ``worker.py``. Only for tasks where the official code leaves something to
save with the same arithmetic; each video's value is the official one to 1e-4:

- subject consistency: DINO on batches of frames instead of one at a time;
- imaging quality: MUSIQ on batches;
- appearance style: the style's text is encoded once, not once a frame, and frames go in batches;
- dynamic degree and the static filter: RAFT encodes a frame once, not once for each pair it is in; upsamples only the
  last of its twenty iterations; and stops as soon as the answer is known, for both are yes or no.

The rest (background consistency, aesthetic quality, ViCLIP's two) is batched and cached by the official code already.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

BATCH = 16


def batches(frames: Any) -> Iterator[Any]:
    """Consecutive batches of frames."""
    for start in range(0, len(frames), BATCH):
        yield frames[start : start + BATCH]


def subject_consistency(request: dict[str, Any], results: Any) -> None:
    """Mean of the cosines with the previous and the first frame, each at least 0, in DINO's features."""
    import torch
    from torch.nn.functional import normalize
    from vbench.utils import dino_transform, init_submodules, load_video

    model = torch.hub.load(**init_submodules(["subject_consistency"], local=True)["subject_consistency"])
    model, transform = model.to(request["device"]), dino_transform(224)
    for video in request["videos"]:
        results.start()
        images = transform(load_video(video["path"]))
        features = torch.cat([model(batch.to(request["device"])) for batch in batches(images)])
        features = normalize(features, dim=-1)
        previous = (features[1:] * features[:-1]).sum(dim=-1).clamp(min=0)
        first = (features[1:] * features[:1]).sum(dim=-1).clamp(min=0)
        value = ((previous + first) / 2).double().mean().item()
        results.add(video["path"], {"video_results": value, "frame_pairs": len(images) - 1})


def appearance_style(request: dict[str, Any], results: Any) -> None:
    """Mean cosine of CLIP's features of the frames and of the style's text."""
    import clip  # type: ignore[import-not-found]  # lives in VBench's environment
    import torch
    from PIL import Image
    from torch.nn.functional import normalize
    from vbench.utils import clip_transform_Image, load_video

    device, transform = torch.device(request["device"]), clip_transform_Image(224)
    model, _ = clip.load(request["weights"][0], device=device)
    texts: dict[str, Any] = {}
    for video in request["videos"]:
        results.start()
        style = video["auxiliary_info"]["appearance_style"]["appearance_style"]
        if style not in texts:
            texts[style] = normalize(model.encode_text(clip.tokenize([style]).to(device)), dim=-1)
        images = [transform(Image.fromarray(frame)) for frame in load_video(video["path"], return_tensor=False)]
        cosines = []
        for batch in batches(images):
            features = normalize(model.encode_image(torch.stack(batch).to(device)), dim=-1)
            cosines += (model.logit_scale.exp() * features @ texts[style].T / 100)[:, 0].tolist()
        row = {"video_results": sum(cosines) / len(cosines), "frame_results": cosines, "cur_sim": cosines[-1]}
        results.add(video["path"], row)


def imaging_quality(request: dict[str, Any], results: Any) -> None:
    """Mean of MUSIQ's score of each frame, 0 to 100."""
    from pyiqa.archs.musiq_arch import MUSIQ  # type: ignore[import-not-found]  # lives in VBench's environment
    from vbench.imaging_quality import transform
    from vbench.utils import load_video

    model = MUSIQ(pretrained_model_path=request["weights"][0]).to(request["device"]).eval()
    for video in request["videos"]:
        results.start()
        images = transform(load_video(video["path"]), "longer")
        scores = [score for batch in batches(images) for score in model(batch.to(request["device"])).flatten().tolist()]
        results.add(video["path"], {"video_results": sum(scores) / len(scores)})


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


def _raft(request: dict[str, Any]) -> Any:
    import torch
    from easydict import EasyDict  # type: ignore[import-not-found]  # lives in VBench's environment
    from vbench.dynamic_degree import DynamicDegree

    arguments = EasyDict(model=request["weights"][0], small=False, mixed_precision=False, alternate_corr=False)
    return DynamicDegree(arguments, torch.device(request["device"]))


def dynamic_degree(request: dict[str, Any], results: Any) -> None:
    """Whether enough neighbouring frames, 8 a second, move fast enough."""
    raft = _raft(request)
    for video in request["videos"]:
        results.start()
        frames = raft.get_frames(video["path"])
        raft.set_params(frame=frames[0], count=len(frames))
        threshold, wanted = raft.params["thres"], raft.params["count_num"]
        flows, fast, moves = Flows(raft.model, frames), 0, False
        for place in range(len(frames) - 1):
            fast += flows.speed(place, place + 1, 0.05) > threshold
            flows.features.pop(place - 1, None)
            moves = fast >= wanted
            if moves or fast + (len(frames) - 2 - place) < wanted:
                break
        results.add(video["path"], {"video_results": moves})


def static_filter(request: dict[str, Any], results: Any) -> None:
    """VBench's static filter; see ``static`` in worker.py for its rule."""
    raft = _raft(request)
    raft.extract_frame = lambda frames, interval: frames
    for video in request["videos"]:
        results.start()
        frames = raft.get_frames(video["path"])
        last = len(frames) - 1
        threshold, allowed = 3.0 * min(frames[0].shape[-2:]) / 256.0, round(2 * len(frames) / 16.0)
        flows, fast = Flows(raft.model, frames), 0
        still = not any(flows.speed(*pair, 0.02) > threshold * allowed * 2 for pair in ((0, last), (last, 0)))
        for place in range(last):
            if not still:
                break
            fast += flows.speed(place, place + 1, 0.02) > threshold
            still = fast <= allowed
        results.add(video["path"], {"video_results": still})


TASKS: dict[str, Callable[..., None]] = {
    task.__name__: task
    for task in (subject_consistency, appearance_style, imaging_quality, dynamic_degree, static_filter)
}
