"""The zip file of results that VBench's submission script reads."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

from students.errors import ConfigError, IncompleteError
from tmd_eval.files import write_atomic
from tmd_eval.vbench.dimensions import DIMENSIONS
from tmd_eval.vbench.summary import read_record, read_sums


def export_zip(run: Path, target: Path) -> Path:
    """Write ``{dimension}_eval_results.json`` of each dimension into a zip, as the official package writes them.

    A file is ``{dimension: [aggregate, [{"video_path", "video_results", ...}]]}``; the script takes the aggregate.

    Args:
        run: scored run folder.
        target: the zip file.

    Returns:
        The zip file.

    Raises:
        ConfigError: the zip file cannot be there, or the run has no scores.
        IncompleteError: a dimension is missing or partial: the script would count it as 0, or as whole.
    """
    if target.is_dir() or not target.parent.is_dir():
        raise ConfigError(f"--out {target} must be a file in a folder that exists.")
    record, sums = read_record(run), read_sums(run)
    missing = [name for name in DIMENSIONS if name not in record["dimensions"] or name not in sums]
    partial = [name for name, one in record["dimensions"].items() if one["partial"]]
    if missing or partial:
        what = [f"{', '.join(missing)} not measured"] if missing else []
        what += [f"{', '.join(partial)} partial"] if partial else []
        raise IncompleteError(f"Nothing was exported: {'; '.join(what)}; a submission needs all sixteen, whole.")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, one in DIMENSIONS.items():
            lines = (run / "scores" / f"{name}.jsonl").read_text("utf-8").splitlines()
            rows = []
            for line in lines:
                row = json.loads(line)
                extra = {k: v for k, v in row["extra"].items() if k not in ("prompt", "protocol")}
                rows.append({"video_path": row["video"], "video_results": row["value"] / one.scale, **extra})
            content = json.dumps({name: [sums[name].aggregate, rows]}, indent=4, allow_nan=False)
            # a fixed date, so that the same scores give the same bytes
            archive.writestr(zipfile.ZipInfo(f"{name}_eval_results.json", (1980, 1, 1, 0, 0, 0)), content)
    write_atomic(target, buffer.getvalue())
    return target
