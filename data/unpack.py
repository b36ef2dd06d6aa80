"""Packed files as they unpack: .gz .bz2 .xz .zst are streams here and never written to the disk."""

import bz2
import gzip
import io
import lzma

CHUNK = 1 << 12  # of a .zst at a time, which can't unpack to more than 128 MB [bytes]


def unpacked(file, suffix: str):
    """A binary file of what `file`, an open one, holds; itself if its suffix is none of PACKED."""
    return PACKED[suffix](file) if suffix in PACKED else file


class Zstd(io.RawIOBase):
    """A .zst as it unpacks, frame after frame; EOFError where it was cut off.

    One can seek in it, by unpacking again from the start: Parquet asks for that.
    """

    def __init__(self, file):
        self.file, self.chunks = file, zstd_chunks(file)
        self.rest, self.at = memoryview(b""), 0

    def readable(self):
        return True

    def seekable(self):
        return True

    def readinto(self, buffer) -> int:
        while not self.rest:
            if (chunk := next(self.chunks, None)) is None:
                return 0
            self.rest = memoryview(chunk)
        n = min(len(buffer), len(self.rest))
        buffer[:n], self.rest = self.rest[:n], self.rest[n:]
        self.at += n
        return n

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = 0) -> int:
        if whence == 2:
            while self.read(1 << 20):
                pass
        target = offset + (0, self.at, self.at)[whence]
        if target < self.at:
            self.file.seek(0)
            self.__init__(self.file)
        while self.at < target and self.read(min(1 << 20, target - self.at)):
            pass
        return self.at


def zstd_chunks(file):
    """Yields what the frames of a .zst hold, a little at a time."""
    new_frame = zstd_frames()
    frame, data = None, file.read(CHUNK)
    while data:
        frame = frame or new_frame()
        try:
            yield frame.decompress(data)
        except Exception as error:  # the packages have an exception each
            raise EOFError(str(error)) from None
        data = frame.unused_data or file.read(CHUNK)
        frame = None if frame.eof else frame
    if frame:
        raise EOFError("it ends in the middle")


def zstd_frames():
    """What makes a decompressor for one frame, from Python 3.14 itself or from a package."""
    most = 31  # a window of 2 GB: `zstd --long=31` packed it
    try:
        from compression.zstd import DecompressionParameter, ZstdDecompressor

        return lambda: ZstdDecompressor(options={DecompressionParameter.window_log_max: most})
    except ImportError:
        pass
    try:
        from zstandard import ZstdDecompressor
    except ImportError:
        raise ValueError(
            "to read .zst, Python before 3.14 needs a package: pip install zstandard"
        ) from None
    return ZstdDecompressor(max_window_size=1 << most).decompressobj


PACKED = {
    ".gz": gzip.open,
    ".tgz": gzip.open,  # a tar archive, which its reader calls so
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda file: io.BufferedReader(Zstd(file), 1 << 16),
}
