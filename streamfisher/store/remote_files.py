"""The files of one array of a run that lies below a URL, for Zarr: to be read only, and each looked at before."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable

from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype

from streamfisher.runtime.remote_path import RemotePath

#: Reads the content of a file by its name in the array, `None` where there is none.
ReadFile = Callable[[str, BufferPrototype | None, ByteRequest | None], Buffer | None]


class RemoteFiles(Store):
    """A store of Zarr that cannot be written.

    zarr's own store for fsspec reads whatever is there; this one has every file read, and held against what its array
    has, by the function that reads the files of local runs.

    Args:
        root: of the array.
        read: what reads one file.
    """

    supports_writes = False
    supports_deletes = False
    supports_listing = True

    def __init__(self, root: RemotePath, read: ReadFile) -> None:
        super().__init__(read_only=True)
        self.root, self._content = root, read

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemoteFiles) and self.root == other.root

    def __hash__(self) -> int:
        return hash(self.root)

    def __str__(self) -> str:
        return str(self.root)

    def with_read_only(self, read_only: bool = False) -> RemoteFiles:
        """Return itself: it is to be read only."""
        return self

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return a file's content, `None` where there is none."""
        return await asyncio.to_thread(self._content, key, prototype, byte_range)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Return the contents of several files."""
        return list(await asyncio.gather(*(self.get(key, prototype, part) for key, part in key_ranges)))

    async def exists(self, key: str) -> bool:
        """Return whether there is a file of that name."""
        return await asyncio.to_thread((self.root / key).is_file)

    async def set(self, key: str, value: Buffer) -> None:
        """Refuse to write."""
        raise ValueError(f"{self.root} is open for reading only.")

    async def delete(self, key: str) -> None:
        """Refuse to delete."""
        raise ValueError(f"{self.root} is open for reading only.")

    async def list(self) -> AsyncIterator[str]:
        """Return the names of all files."""
        for path in self.root.rglob("*"):
            yield str(path.relative_to(self.root))

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """Return the names of all files that begin so."""
        async for name in self.list():
            if name.startswith(prefix):
                yield name

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Return the names in a folder."""
        for path in (self.root / prefix.strip("/") if prefix.strip("/") else self.root).iterdir():
            yield path.name
