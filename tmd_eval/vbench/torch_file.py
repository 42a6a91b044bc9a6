"""Whether a file of ``torch.save``'s old format (before torch 1.6: pickles, then raw storages) is whole.

A file in the new format is a zip, whose directory stands at its end; the old one has no such mark, and several of
VBench's weights are that old. Its pickles are read without running anything they name.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

MAGIC = 0x1950A86A20F9469CFC6C
ELEMENT_BYTES = {
    "DoubleStorage": 8, "LongStorage": 8, "FloatStorage": 4, "IntStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2,
    "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1, "BoolStorage": 1,
}  # fmt: skip


class _Inert(dict[Any, Any]):
    """Stands for every class and function that a pickle names: takes all and does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def append(self, _: Any) -> None: ...

    def extend(self, _: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


class _Reader(pickle.Unpickler):
    """Collects the storages that a pickle refers to."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self.storages: dict[str, int] = {}
        """Bytes of each element by the storage's key; 0 where the type is unknown."""

    def find_class(self, module: str, name: str) -> Any:
        return type(name, (_Inert,), {})

    def persistent_load(self, pid: Any) -> Any:
        self.storages[str(pid[2])] = ELEMENT_BYTES.get(pid[1].__name__, 0)
        return _Inert()


def is_whole(path: Path) -> bool:
    """Whether everything that the file announces is there; True for other pickles, which announce nothing.

    Args:
        path: a file that begins as a pickle does.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        try:
            if _Reader(file).load() != MAGIC:
                return True
            for _ in range(2):  # the format's version, and the machine that wrote it
                _Reader(file).load()
            objects = _Reader(file)
            objects.load()
            for key in _Reader(file).load():
                each = objects.storages.get(str(key), 0)
                head = file.read(8)
                if each == 0:
                    return len(head) == 8  # a type that this list lacks: nothing can be said of what follows
                file.seek(each * int.from_bytes(head, "little"), 1)
                if len(head) < 8 or file.tell() > size:
                    return False
        except Exception:  # a cut pickle fails in many ways
            return False
        return file.tell() == size
