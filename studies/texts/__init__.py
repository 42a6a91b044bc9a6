"""Texts of the page, one YAML file a language."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import yaml

from studies.errors import StudyError

DEFAULT = "en"


def load_texts(language: str = DEFAULT) -> dict[str, Any]:
    """Read the texts of a language.

    Args:
        language: name of a file beside this one, such as "en", or the path of a YAML file.

    Raises:
        StudyError: there is no such file, or its keys are not those of the English one.
    """
    here = Path(__file__).parent
    named = here / f"{language}.yaml"
    path = named if language.isalpha() and named.is_file() else Path(language)
    try:
        texts = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, yaml.YAMLError) as error:
        known = ", ".join(sorted(file.stem for file in here.glob("*.yaml")))
        raise StudyError(f"No texts in {language!r} ({error}); there are {known}, or give a YAML file.") from error
    if path != here / f"{DEFAULT}.yaml":
        _compare(load_texts(), texts, "")
    return dict(texts)


def consent_hash(texts: dict[str, Any]) -> str:
    """SHA-256 of the consent text, stored with every consent."""
    return hashlib.sha256(json.dumps(texts["consent"], sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _compare(ours: Any, theirs: Any, where: str) -> None:
    if type(ours) is not type(theirs):
        raise StudyError(f"The texts have {type(theirs).__name__} under {where or 'the top'}, where English has other.")
    if isinstance(ours, dict):
        for key in ours.keys() ^ theirs.keys():
            raise StudyError(f"The texts {'lack' if key in ours else 'have the unknown'} key {where}{key}.")
        for key, value in ours.items():
            _compare(value, theirs[key], f"{where}{key}.")
