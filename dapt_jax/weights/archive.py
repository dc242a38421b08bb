"""Zip files (PyTorch's, `.npz`, `.keras`), read within bounds.

The file is memory-mapped: uncompressed members are returned as views of it, so their arrays use no extra
memory. Checksums are verified whenever a member is read.
"""

import mmap
import struct
import zipfile
import zlib
from pathlib import Path

from dapt_jax.errors import UserError
from dapt_jax.weights.source import check_unpacked

MEMBERS = 30_000
"""Maximum number of arrays in a file of any format, and of members in a zip file: each needs about 2 kB
before anything is read. A large transformer with its optimiser state has some thousands."""
_LOCAL = struct.Struct("<4s5H3I2H")
_END = struct.Struct("<4s4H2IH")


class Archive:
    """An open zip file.

    Attributes:
        path: Path of the file.
        names: Names of its members, in order.
    """

    def __init__(self, path: Path):
        """Open a zip file and check its table of contents.

        Raises:
            UserError: The file is damaged, names a member twice, or would decompress to far more than its
                size.
        """
        self.path = path
        with path.open("rb") as file:
            self._map = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        self._refuse_crowds()
        try:
            with zipfile.ZipFile(path) as archive:
                self._members = {info.filename: info for info in archive.infolist()}
                count = len(archive.infolist())
        except (
            zipfile.BadZipFile,
            NotImplementedError,
            ValueError,
            EOFError,
            OSError,
            struct.error,
        ) as error:
            raise UserError(f"{path}: damaged or cut short, or not a zip file ({_told(error)})") from None
        if count != len(self._members):
            raise UserError(
                f"{path}: a zip file that names {count - len(self._members)} of its members twice"
            )
        self.names = tuple(self._members)
        for info in self._members.values():
            # The memory of other decompressors is set by the file: a gigabyte, in a damaged one of a
            # kilobyte.
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise UserError(
                    f"{path}: {info.filename[:80]!r} is packed by method {info.compress_type}; expected "
                    "deflate"
                )
        check_unpacked(sum(info.file_size for info in self._members.values()), path, len(self._map))
        self._verified: set[str] = set()

    def _refuse_crowds(self) -> None:
        """Limit the number of members before zipfile creates an object for each.

        Both the declared and the actual number are checked.
        """
        tail = bytes(self._map[-66_000:])
        at = tail.rfind(b"PK\x05\x06")
        end = tail[at : at + _END.size]
        if at < 0 or len(end) < _END.size:
            return  # zipfile raises the error
        size = _END.unpack(end)[5]
        if (long := tail.rfind(b"PK\x06\x06", 0, at)) >= 0 and len(tail) >= long + 56:  # zip64
            size = max(
                0 if size == 0xFFFFFFFF else size, int.from_bytes(tail[long + 40 : long + 48], "little")
            )
        # A record of the central directory takes 46 bytes and its name; a larger directory does not belong to
        # a weight file.
        if size > MEMBERS * 512:
            raise UserError(
                f"{self.path}: a zip file with a table of contents of {size:,} bytes; expected weights"
            )
        stop = len(self._map) - len(tail) + at
        count = bytes(self._map[max(0, stop - size - 1000) : stop]).count(b"PK\x01\x02")
        if count > MEMBERS:
            raise UserError(f"{self.path}: a zip file of {count:,} members; expected at most {MEMBERS:,}")

    def is_stored(self, name: str) -> bool:
        """Return whether a member is stored without compression."""
        return self._members[name].compress_type == zipfile.ZIP_STORED

    def size(self, name: str) -> int:
        """Return the decompressed size of a member in bytes."""
        return self._members[name].file_size

    def read(self, name: str) -> memoryview:
        """Return the bytes of a member: a view of the mapped file if it is not compressed.

        Raises:
            UserError: The member is damaged or encrypted.
        """
        info = self._members[name]
        start = self._start(info)
        data = self._map[start : start + info.compress_size]
        if not self.is_stored(name):
            data = self._unpack(data, info)
        if len(data) != info.file_size:
            raise UserError(
                f"{self.path}: {name[:80]!r} is cut short: {len(data):,} bytes of {info.file_size:,}"
            )
        if name not in self._verified:
            if zlib.crc32(data) != info.CRC:
                raise UserError(
                    f"{self.path}: {name[:80]!r} is damaged: its checksum does not match (load the file anew)"
                )
            self._verified.add(name)
        return data

    def _start(self, info: zipfile.ZipInfo) -> int:
        """Return the offset of a member's bytes.

        They follow the member's own header, whose length the table of contents does not contain.
        """
        header = bytes(self._map[info.header_offset : info.header_offset + _LOCAL.size])
        if len(header) < _LOCAL.size or header[:4] != b"PK\x03\x04" or info.flag_bits & 1:
            raise UserError(
                f"{self.path}: {info.filename[:80]!r} is damaged or encrypted: no zip header where one is "
                "expected"
            )
        *_, name_length, extra_length = _LOCAL.unpack(header)
        return info.header_offset + _LOCAL.size + name_length + extra_length

    def _unpack(self, data: memoryview, info: zipfile.ZipInfo) -> memoryview:
        """Decompress a member; zipfile would allocate the compressed size that a damaged file declares."""
        try:
            # A limit of 0 means no limit.
            return memoryview(zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, max(info.file_size, 1)))
        except zlib.error as error:
            raise UserError(
                f"{self.path}: {info.filename[:80]!r} cannot be unpacked ({_told(error)})"
            ) from None

    def __contains__(self, name: object) -> bool:
        return name in self._members


def _told(error: Exception) -> str:
    """Return an error as one line, without the long names that some messages repeat."""
    return " ".join(str(error).split())[:120]
