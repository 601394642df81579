"""Names of many images in little memory: made when asked for, equal to a list of the same."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]


class Names(Sequence[str]):
    """What `Numbered`, `Joined` and `Taken` share; they only know how to make one name."""

    @abstractmethod
    def _name(self, number: int) -> str: ...

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self._name(i) for i in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        return self._name(number % len(self))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # as a list has none


class Numbered(Names):
    """`prefix/0` and so on."""

    def __init__(self, prefix: str, count: int) -> None:
        self._prefix, self._count = prefix, count

    def __len__(self) -> int:
        return self._count

    def _name(self, number: int) -> str:
        return f"{self._prefix}/{number}"


class Joined(Names):
    """One text of all of them, UTF-8, and where each begins, with the end of the last."""

    def __init__(self, text: npt.NDArray[np.uint8], starts: Numbers) -> None:
        self.text, self.starts = text, starts

    @classmethod
    def of(cls, names: Iterable[str]) -> Joined:
        text, ends = bytearray(), [0]
        for name in names:
            text += name.encode()
            ends.append(len(text))
        return cls(np.frombuffer(bytes(text), np.uint8), np.array(ends, np.int64))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def _name(self, number: int) -> str:
        return self.text[self.starts[number] : self.starts[number + 1]].tobytes().decode()


class Taken(Names):
    """Some of others, by number."""

    def __init__(self, names: Sequence[str], index: Numbers) -> None:
        self._names, self._index = names, index

    def __len__(self) -> int:
        return len(self._index)

    def _name(self, number: int) -> str:
        name: str = self._names[self._index[number]]
        return name
