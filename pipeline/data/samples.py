"""Random access to samples by row number, and the one way in which an image's bytes become pixels.

Images are read with one positioned read (`pread`) from the tar or file that the manifest names; captions come from
the manifest.
"""

from __future__ import annotations

import hashlib
import io
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from pipeline.data.manifest import Manifest, ManifestRow
from pipeline.errors import PipeError

MAX_IMAGE_BYTES = 64 * 2**20
MAX_IMAGE_PIXELS = 178_956_970  # where Pillow, too, speaks of a decompression bomb
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # not all of Pillow's: some start other programs
CLOSE_ENOUGH = 2**16  # bytes between image and caption that are read along rather than seeked over


class SampleError(Exception):
    """This one sample cannot be used; the others can."""


class SampleUnavailable(SampleError):
    """What was indexed cannot be read now; it may be back later, which a broken image never is."""


class SampleChanged(SampleError):
    """Where a sample was indexed lies another image now, or a damaged one."""


class ImageTooLarge(SampleError):
    """More bytes or pixels than we accept."""


def decode_image(data: bytes) -> Image.Image:
    """Decode the whole image to RGB.

    EXIF orientation is ignored, as in open_clip's and torchvision's loaders: width, height and pixels are those stored.
    Transparency is dropped, an animation gives its first frame, 16-bit grey is scaled to 8 bits.

    Raises:
        ImageTooLarge: over `MAX_IMAGE_BYTES`, or over `MAX_IMAGE_PIXELS` (told from the header, before decoding).
        SampleError: not an image, or cut, or broken.
    """
    if len(data) > MAX_IMAGE_BYTES:
        raise ImageTooLarge(f"{len(data):,} bytes, more than {MAX_IMAGE_BYTES:,}")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise ImageTooLarge(f"{image.width} x {image.height} pixels, more than {MAX_IMAGE_PIXELS:,}")
            image.load()
            return _to_rgb(image)
    except (SampleError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise ImageTooLarge(str(error)) from error
    except UnidentifiedImageError as error:  # its own text holds an address in memory, another one each time
        raise SampleError(f"cannot decode: no {', '.join(FORMATS[:-1])} or {FORMATS[-1]}") from error
    except Exception as error:  # a broken file makes Pillow's decoders raise whatever they stumble over
        raise SampleError(f"cannot decode: {str(error) or type(error).__name__}"[:200]) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        # A JPEG's pixels are its own once they are loaded: a copy would take 3 to 17 % more time (docs/benchmarks.md).
        return image if type(image) is JpegImageFile else image.copy()
    if image.mode == "F":
        raise SampleError("cannot decode: floating-point pixels have no known range")
    if image.mode.startswith("I"):  # 16-bit grey; convert() would clip it to white
        grey = np.clip(np.asarray(image).astype(np.int64) // 257, 0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


class _OpenFile:
    """A file descriptor that closes itself when the last thread that reads from it lets go.

    Attributes:
        touched: whether the file's time of change is another than when it was indexed.
    """

    def __init__(self, path: Path) -> None:
        self.descriptor, self.touched = -1, False
        self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def read(self, offset: int, count: int) -> bytes:
        """`count` bytes at `offset`, fewer only at the end of the file."""
        parts = []
        while count > 0:
            part = os.pread(self.descriptor, count, offset)
            if not part:
                break
            parts.append(part)
            offset, count = offset + len(part), count - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


class SampleReader:
    """Images and captions by row number. Picklable; opens files when needed; safe in threads, forked and spawned
    processes (descriptors are never seeked, so that sharing them does no harm).

    Args:
        manifest: whose rows to read.
        max_open: how many tars are kept open at a time.
        verify: compare every image with its SHA-256 in the manifest. Else that is done where there is reason to: for
            files that a table names, and for tars whose time of change is not the indexed one.
    """

    def __init__(self, manifest: Manifest, max_open: int = 64, *, verify: bool = False) -> None:
        self.manifest, self.max_open, self.verify = manifest, max(1, max_open), verify
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        return {"manifest": self.manifest, "max_open": self.max_open, "verify": self.verify}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.manifest, self.max_open, self.verify = state["manifest"], state["max_open"], state["verify"]
        self._forget()

    def _forget(self) -> None:
        self._open: OrderedDict[str, _OpenFile] = OrderedDict()
        self._lock, self._pid = threading.Lock(), os.getpid()

    def read(self, row: int) -> tuple[Image.Image, list[str]]:
        """RGB image and captions of a row."""
        return self.image(row), self.captions(row)

    def captions(self, row: int) -> list[str]:
        return self.manifest.captions(row)

    def image(self, row: int) -> Image.Image:
        """RGB image of a row; raises SampleError where it cannot be decoded, SampleChanged where it is another one."""
        data, changed = self._checked_bytes(row)
        picture = decode_image(data)
        if changed:
            raise SampleChanged(changed)
        return picture

    def image_bytes(self, row: int) -> bytes:
        """The encoded image as it lies in its source.

        Raises:
            SampleError: the row has no image.
            SampleUnavailable: it had one, which is gone or unreadable.
            SampleChanged: the bytes are not those that were indexed.
            PipeError: the row's tar is gone or was changed since it was indexed.
        """
        data, changed = self._checked_bytes(row)
        if changed:
            raise SampleChanged(changed)
        return data

    def _checked_bytes(self, row: int) -> tuple[bytes, str]:
        """A row's bytes, and what is wrong with them: "" where nothing is, or nothing was looked for."""
        record = self._with_image(row)
        if self.manifest.source_table[record.source].kind == "table":
            data, doubtful = self._file_bytes(record), True
        else:
            data = self._exactly(record, record.image_offset, record.image_bytes)
            doubtful = self._source(record.source).touched
        if (doubtful or self.verify) and record.sha256 and hashlib.sha256(data).hexdigest() != record.sha256:
            return data, f"row {row}: {record.key} of {record.source} changed since it was indexed"
        return data, ""

    def will_need(self, rows: Iterable[int]) -> None:
        """Begin to read the images of `rows` from their tars, and return at once. A hint: it never fails."""
        if not hasattr(os, "posix_fadvise"):
            return
        for row in rows:
            with suppress(SampleError, PipeError, OSError, IndexError):
                record = self._with_image(int(row))
                if self.manifest.source_table[record.source].kind == "tar":
                    handle = self._source(record.source).descriptor
                    os.posix_fadvise(handle, record.image_offset, record.image_bytes, os.POSIX_FADV_WILLNEED)

    def raw(self, row: int) -> tuple[bytes, bytes]:
        """Image bytes and caption member (text, or JSON where there is no text), from one read where they are close.

        A table's row has no caption bytes of its own: b"".
        """
        record = self._with_image(row)
        if record.caption_offset < 0:
            return self.image_bytes(row), b""
        image, caption = (record.image_offset, record.image_bytes), (record.caption_offset, record.caption_bytes)
        start = min(image[0], caption[0])
        end = max(sum(image), sum(caption))
        if end - start > record.image_bytes + record.caption_bytes + CLOSE_ENOUGH:
            return self.image_bytes(row), self._exactly(record, *caption)
        both = self._exactly(record, start, end - start)
        return tuple(both[at - start : at - start + size] for at, size in (image, caption))  # type: ignore[return-value]

    def _with_image(self, row: int) -> ManifestRow:
        record = self.manifest.record(row)
        if record.image_offset < 0:
            raise SampleError(f"row {row} has no image ({record.reason or record.status})")
        if record.image_bytes > MAX_IMAGE_BYTES:
            raise ImageTooLarge(f"row {row}: {record.image_bytes:,} bytes, more than {MAX_IMAGE_BYTES:,}")
        return record

    def _exactly(self, record: ManifestRow, offset: int, count: int) -> bytes:
        try:
            data = self._source(record.source).read(offset, count)
        except OSError as error:
            raise SampleUnavailable(f"row {record.row}: cannot read {record.source} ({error.strerror})") from error
        if len(data) < count:
            raise SampleUnavailable(f"row {record.row}: {record.source} ends {count - len(data):,} bytes too early")
        return data

    def _file_bytes(self, record: ManifestRow) -> bytes:
        path = self.manifest.source_path(record.source).parent / record.key
        try:
            data = _OpenFile(path).read(0, record.image_bytes + 1)
        except OSError as error:
            raise SampleUnavailable(f"row {record.row}: cannot read {record.key} ({error.strerror})") from error
        return data

    def _source(self, name: str) -> _OpenFile:
        """The open tar, least recently used ones making room."""
        if self._pid != os.getpid():  # forked: the parent's lock may be held by a thread that is not here
            self._forget()
        with self._lock:
            found = self._open.get(name)
            if found is None:
                found = self._open_source(name)
                self._open[name] = found
                if len(self._open) > self.max_open:
                    self._open.popitem(last=False)
            self._open.move_to_end(name)
            return found

    def _open_source(self, name: str) -> _OpenFile:
        path = self.manifest.source_path(name)
        fix = "put the file back, or move the manifest away and run: pipe index"
        try:
            opened = _OpenFile(path)
        except OSError as error:
            raise PipeError(f"cannot open a source of the manifest ({error.strerror})", where=path, fix=fix) from error
        indexed, now = self.manifest.source_table[name], os.fstat(opened.descriptor)
        if now.st_size != indexed.bytes:
            raise PipeError("this source changed since it was indexed", where=path, fix=fix)
        opened.touched = now.st_mtime_ns != indexed.mtime_ns  # a copy, perhaps, or another tar of the same size
        return opened
