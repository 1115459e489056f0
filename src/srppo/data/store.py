"""Sequences whose items lie on disk: memory for their places only, however long they are."""

import os
import pickle
from array import array
from collections.abc import Callable, Iterable, Sequence
from tempfile import TemporaryFile
from typing import Generic, TypeVar, overload

from srppo.errors import DataError

T = TypeVar("T")


class Picked(Sequence[T], Generic[T]):
    """Some items of a sequence, in a given order; nothing is copied."""

    def __init__(self, items: Sequence[T], indices: Sequence[int]) -> None:
        self._items, self._indices = items, indices

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice):
            return Picked(self._items, self._indices[index])
        return self._items[self._indices[index]]


class Spans(Sequence[T], Generic[T]):
    """Spans of bytes of a file, each read when it is asked for: 12 bytes of memory an item."""

    def __init__(self, read: Callable[[int, int], T]) -> None:
        """`read(start, length)` makes an item of a span."""
        self._read = read
        self._starts, self._lengths = array("Q"), array("I")

    def add(self, start: int, length: int) -> None:
        """One more item."""
        self._starts.append(start)
        self._lengths.append(length)

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice):
            return Picked(self, range(len(self))[index])
        return self._read(self._starts[index], self._lengths[index])


class OnDisk(Spans[T]):
    """Items pickled into a temporary file without a name; it lies where TMPDIR says.

    Reads do not move the file's position, so processes may share it after a fork.
    """

    def __init__(self, items: Iterable[T] = ()) -> None:
        file = TemporaryFile(buffering=0)  # noqa: SIM115 (closed with the last reference)
        super().__init__(lambda start, n: pickle.loads(os.pread(file.fileno(), n, start)))
        self._file, self._end = file, 0
        for item in items:
            self.append(item)

    def append(self, item: T) -> None:
        """One more item.

        Raises:
            DataError: the disk is full.
        """
        data = pickle.dumps(item, pickle.HIGHEST_PROTOCOL)
        try:
            self._file.write(data)
        except OSError as error:
            raise DataError(
                f"rows cannot be kept in a temporary file ({error}): the data set does not fit "
                "there. Free some space, or set TMPDIR to a directory with more."
            ) from error
        self.add(self._end, len(data))
        self._end += len(data)
