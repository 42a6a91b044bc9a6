"""Settings of a training from several places of the experiment file; what does not fit is told with its own line."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from students.errors import ConfigError
from tmd_eval.experiment.schema import Stage

if TYPE_CHECKING:
    from students.config import TrainConfig


class Blamed(ConfigError):
    """Mistakes with the lines on which they stand, which are not those of the cells that they spoil."""

    def __init__(self, *parts: tuple[int, str]):
        super().__init__("; ".join(text for _, text in parts))
        self.parts = parts


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Settings from one place of the file."""

    line: int
    """Where their values stand."""
    settings: Mapping[str, Any]
    names_line: int | None = None
    """Where their names stand, if elsewhere."""


class Settings:
    """Presets with settings on top, each combination resolved once."""

    def __init__(self, beside: Path, blocks: int):
        """Take where presets are looked for first, and L of the base model."""
        self.beside, self.blocks = beside, blocks
        self._configs: dict[str, TrainConfig] = {}
        self._presets: dict[str, Any] = {}

    def resolved(self, stage: Stage, layers: Sequence[Layer]) -> TrainConfig:
        """The settings of a stage, later layers over earlier ones.

        Raises:
            Blamed: they do not fit; names every wrong setting of the first layer that breaks them.
        """
        try:
            return self._config(stage, _together(layers))
        except ConfigError:
            for count, layer in enumerate(layers):
                before = _together(layers[:count])
                whole = self._fault(stage, before | dict(layer.settings))
                if whole is not None:
                    single = [self._fault(stage, before | {name: value}) for name, value in layer.settings.items()]
                    texts = [text for text in single if text is not None] or [whole]
                    raise Blamed(*(self._part(layer, text) for text in texts)) from None
            raise

    @staticmethod
    def _part(layer: Layer, text: str) -> tuple[int, str]:
        of_name = layer.names_line is not None and text.startswith("unknown key")
        return layer.names_line if of_name else layer.line, text  # type: ignore[return-value]

    def _fault(self, stage: Stage, settings: Mapping[str, Any]) -> str | None:
        try:
            self._config(stage, settings)
        except ConfigError as error:
            return re.sub(r"--set:? ", "", str(error))
        return None

    def _config(self, stage: Stage, settings: Mapping[str, Any]) -> TrainConfig:
        from students.config import resolve
        from students.settings import Layer as Named
        from students.settings import yaml_layers

        key = json.dumps([stage.preset, settings])
        if key not in self._configs:
            if stage.preset not in self._presets:
                self._presets[stage.preset] = yaml_layers(self._preset(stage))
            config = resolve([*self._presets[stage.preset], Named("--set", dict(settings))])
            config.check_base(self.blocks)
            self._configs[key] = config
        return self._configs[key]

    def _preset(self, stage: Stage) -> Path:
        shipped = Path(str(resources.files("tmd_eval") / "presets" / stage.preset))
        found = next((path for path in (self.beside / stage.preset, shipped) if path.is_file()), None)
        if found is None:
            raise ConfigError(f"the preset {stage.preset} does not exist.")
        return found


def _together(layers: Sequence[Layer]) -> dict[str, Any]:
    return {name: value for layer in layers for name, value in layer.settings.items()}
