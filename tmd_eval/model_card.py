"""The model card (README.md) of an exported pipeline folder, made from the student's own record."""

from __future__ import annotations

import json
from typing import Any

from students.base import Base
from students.nfe import effective_nfe
from students.spec import StudentSpec

PAPERS = {
    "tmd": "Transition Matching Distillation for Fast Video Generation, arXiv 2601.09881",
    "tm_mf": "Transition Matching Distillation for Fast Video Generation (stage 1 only), arXiv 2601.09881",
}


def model_card(spec: StudentSpec | None, base: Base, stored: dict[str, Any]) -> str:
    """Markdown with the hub's front matter: what the model is, how to sample it, where it comes from.

    Args:
        spec: the student's record; None for a teacher.
        base: its base model.
        stored: ``parameters`` and ``dtypes`` of the network.
    """
    front = ["---", "library_name: diffusers", "pipeline_tag: text-to-video"]
    if base.revision is not None:  # a hub id, which the hub can link to
        front.append(f"base_model: {json.dumps(base.ref)}")
    front += ["tags:", *(f"- {tag}" for tag in _tags(spec)), "---", ""]
    title = f"{_kind(spec)} of {_code(base.ref)}"
    return (
        "\n".join([*front, f"# {title}", "", *_facts(spec, base, stored), "", *_usage(spec), "", *_origin(spec)]) + "\n"
    )


def _kind(spec: StudentSpec | None) -> str:
    if spec is None:
        return "Pipeline"
    if spec.plain:
        return f"Few-step student ({_code(spec.method)}, {spec.m} steps)"
    return f"TMD-N{spec.n}H{spec.h} student, M = {spec.m},"


def _tags(spec: StudentSpec | None) -> list[str]:
    return ["text-to-video", "wan"] + (["few-step", "distillation", "tmd-eval"] if spec else [])


def _facts(spec: StudentSpec | None, base: Base, stored: dict[str, Any]) -> list[str]:
    rows = [
        ("parameters of the network", f"{stored['parameters']:,} ({', '.join(stored['dtypes'])})"),
        ("video", f"{base.frames} frames of {base.height}x{base.width} at {base.fps} a second"),
        ("tokens of a caption", str(base.text_length)),
    ]
    if spec is None:
        rows.append(("guidance", f"{base.guidance:g}"))
    else:
        nfe = effective_nfe(spec.m, spec.n, spec.h, spec.blocks)
        rows += [
            ("method", _code(spec.method) + (f" ({PAPERS[spec.method]})" if spec.method in PAPERS else "")),
            ("effective NFE", f"{nfe:.4g}"),
            ("guidance", "built in: one forward pass a step" if spec.guidance == 1 else f"{spec.guidance:g}"),
            ("times", ", ".join(f"{t:.6g}" for t in reversed(spec.outer_grid))),
            ("sampler", _code(spec.sampler)),
        ]
        if spec.initial == "scaled":
            rows.append(("start", f"{spec.outer_grid[-1]:.6g} times the noise; pipelines and servers take it unscaled"))
        if spec.time_precision != "float64":
            rows.append(("network time", f"1000 t rounded to {spec.time_precision}, which only tmd-eval does"))
        if not spec.plain:
            rows.append(("inner times", ", ".join(f"{s:.6g}" for s in reversed(spec.inner_grid))))
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]


def _usage(spec: StudentSpec | None) -> list[str]:
    lines = ["## Use", "", "```", 'tmd-eval generate --ckpt FOLDER --prompt "..." --out RUN', "```", ""]
    if spec is None:
        code = ["from diffusers import WanPipeline", "", 'pipeline = WanPipeline.from_pretrained("FOLDER")']
    elif spec.plain:
        lines += [
            "`dmd2_config` in `model_index.json` holds the times and the solver for servers that read it. In diffusers "
            "the times are set by hand:",
            "",
        ]
        sigmas = [float(f"{t:.9g}") for t in reversed(spec.outer_grid[1:])]
        code = [
            "from diffusers import WanPipeline", "", 'pipeline = WanPipeline.from_pretrained("FOLDER")',
            "set_timesteps = pipeline.scheduler.set_timesteps",
            "pipeline.scheduler.set_timesteps = lambda *args, device=None, **kw: set_timesteps(",
            f"    sigmas={sigmas}, device=device)",
            f'video = pipeline("...", num_inference_steps={spec.m}, guidance_scale={spec.guidance:g}).frames',
        ]  # fmt: skip
    else:
        lines += ["With tmd-eval installed:", ""]
        code = [
            "from students.pipeline import TMDPipeline", "", 'pipeline = TMDPipeline.from_pretrained("FOLDER")',
            'video = pipeline("...", seed=0).frames',
        ]  # fmt: skip
    return [*lines, "```python", *code, "```"]


def _origin(spec: StudentSpec | None) -> list[str]:
    if spec is None:
        return []
    base = {"ref": spec.base.ref, "revision": spec.base.revision, "sha256": spec.base.hash}
    record = json.dumps({"base": base, **spec.training}, indent=2, ensure_ascii=False)
    return ["## Origin", "", "```json", record.replace("```", "'''"), "```"]


def _code(text: str) -> str:
    return "`" + text.replace("`", "'").replace("\n", " ").replace("|", "/") + "`"
