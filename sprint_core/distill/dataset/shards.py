"""Webdataset shards: the files of a .tar, found by their headers, and read where they lie when they are needed."""

import posixpath
import tarfile
from dataclasses import dataclass
from pathlib import Path

COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")


@dataclass(frozen=True)
class Member:
    """One file of a shard."""

    shard: Path
    start: int
    size: int

    def read_bytes(self) -> bytes:
        """Raises OSError if the shard ends before it does."""
        with open(self.shard, "rb") as file:
            file.seek(self.start)
            data = file.read(self.size)
        if len(data) < self.size:
            raise OSError("truncated")
        return data


def members(shard: Path) -> tuple[dict[str, Member], str]:
    """Its files by name in its order, without hidden ones; and what is wrong with the rest of it, or "".

    Raises ValueError if it is no shard at all.
    """
    with open(shard, "rb") as file:
        if file.read(6).startswith(COMPRESSED):
            raise ValueError(f"{shard}: compressed; unpack it, since its images are read where they lie")
    members: dict[str, Member] = {}
    wrong, places = "", {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                name = posixpath.normpath(member.name).lstrip("/")
                if member.isreg():
                    places[member.name] = Member(shard, member.offset_data, member.size)
                elif member.islnk() and member.linkname in places:  # stored once, as an earlier file
                    places[member.name] = places[member.linkname]
                if member.name in places and not any(part.startswith(".") for part in name.split("/")):
                    members[name] = places[member.name]
    except (tarfile.TarError, OSError, EOFError) as error:
        if not members:
            raise ValueError(f"{shard}: {error}") from None
        wrong = str(error) or type(error).__name__
    size = shard.stat().st_size
    whole = {name: member for name, member in members.items() if member.start + member.size <= size}
    return whole, wrong or ("truncated" if len(whole) < len(members) else "")
