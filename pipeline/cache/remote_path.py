"""A store that is not on this machine's disks: paths that are URLs, and byte ranges of the files behind them.

    s3://, gs://         tensorstore's key-value stores; with fsspec (s3fs, gcsfs) in a forked process, see below
    http://, https://    the standard library
    any other scheme     fsspec (memory://, sftp://, github://, ...)

Nothing stays open between two reads but what tensorstore and fsspec keep; fsspec opens anew after a fork.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import io
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from pipeline.cache import layout
from pipeline.cache.kvstore import RETRIES, SILENCE, read_object, s3_options, tensorstore_usable
from pipeline.errors import PipeError

AT_ONCE = 16  # requests in flight

Range = tuple[int | None, int | None]  # first byte, end; (None, n): the last n; (None, None): all


@dataclass(frozen=True)
class RemotePath:
    """As much of a pathlib.Path as reading a cache needs, for a URL. Picklable; opens nothing until it is read."""

    url: str

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if not parts.scheme or (parts.scheme in ("s3", "gs", "http", "https") and not parts.netloc):
            raise PipeError("this is not a URL", where=self.url, fix="write scheme://place/folder")
        object.__setattr__(self, "url", self.url.rstrip("/"))

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self.url}/{name}")

    def __str__(self) -> str:
        return self.url

    @property
    def scheme(self) -> str:
        return urlsplit(self.url).scheme

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[-1]

    def read_bytes(self) -> bytes:
        """The whole file.

        Raises:
            FileNotFoundError: there is nothing.
            OSError: the server cannot be reached, refuses, or failed `RETRIES` times; strerror says which.
        """
        return read_range(self, (None, None))

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return self.read_bytes().decode(encoding, errors)

    def open(self, mode: str = "rb", *_: Any, **__: Any) -> IO[bytes]:
        """The whole file in memory: what `pathlib.Path.read_bytes` calls."""
        if mode != "rb":
            raise ValueError(f"a remote path is opened for reading bytes, not {mode!r}")
        return io.BytesIO(self.read_bytes())

    def exists(self) -> bool:
        """Whether there is a file; PipeError where the server does not say."""
        try:
            self.read_bytes()
        except FileNotFoundError:
            return False
        except OSError as error:
            raise PipeError(f"cannot read the cache: {error.strerror}", where=self.url) from error
        return True

    def is_dir(self) -> bool:
        """Whether there is a Zarr array or group of this name: object stores have no folders."""
        return (self / layout.METADATA).exists()

    def read_many(self, names: Sequence[str]) -> list[bytes | None]:
        """The files `names` below this, 16 at a time; None where there is nothing. Errors as `read_bytes`."""

        def read(name: str) -> bytes | None:
            try:
                return (self / name).read_bytes()
            except FileNotFoundError:
                return None

        return in_parallel([partial(read, name) for name in names])


def in_parallel(jobs: Sequence[Callable[[], Any]]) -> list[Any]:
    """Results of `jobs` in their order, 16 at a time; the first error is raised."""
    if len(jobs) < 2:
        return [job() for job in jobs]
    with ThreadPoolExecutor(min(AT_ONCE, len(jobs)), thread_name_prefix="remote") as pool:
        waiting = [pool.submit(job) for job in jobs]
        try:
            return [future.result() for future in waiting]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # a dead server is not asked again for the rest
            raise


def read_ranges(root: Path | RemotePath, wanted: Iterable[tuple[str, Range]]) -> list[bytes]:
    """Parts of files below `root`, a Path or a RemotePath: (name, range) each. Errors as `RemotePath.read_bytes`."""
    wanted = list(wanted)
    if not isinstance(root, RemotePath):
        return _file_ranges(root, wanted)
    jobs = [partial(read_range, root / name, span) for name, span in wanted]
    if root.scheme in ("http", "https") or not jobs:
        return in_parallel(jobs)
    return _fsspec_ranges([job.args[0] for job in jobs], [job.args[1] for job in jobs])


def read_range(path: RemotePath, span: Range) -> bytes:
    """A part of one file, or all of it; errors as `RemotePath.read_bytes`. Shorter where the file is."""
    if path.scheme in ("http", "https"):
        return _http_range(path, span)
    if path.scheme in ("s3", "gs") and span == (None, None) and tensorstore_usable():
        return read_object(path.url)
    return _fsspec_ranges([path], [span])[0]


def _file_ranges(root: Path, wanted: Sequence[tuple[str, Range]]) -> list[bytes]:
    """Each file is opened once."""
    found = []
    with contextlib.ExitStack() as stack:
        handles: dict[str, int] = {}
        for name, (first, end) in wanted:
            if name not in handles:
                handles[name] = os.open(root / name, os.O_RDONLY)
                stack.callback(os.close, handles[name])
            handle = handles[name]
            if first is None or end is None:
                size = os.fstat(handle).st_size
                first, end = (first or 0, size) if end is None else (max(size - end, 0), size)
            found.append(os.pread(handle, end - first, first))
    return found


# --- http -------------------------------------------------------------------------------------------------------------


def _http_range(path: RemotePath, span: Range) -> bytes:
    first, end = span
    headers = {} if span == (None, None) else {"Range": f"bytes={_bounds(first, end)}"}
    for attempt in range(RETRIES):
        try:
            request = urllib.request.Request(path.url, headers=headers)
            with urllib.request.urlopen(request, timeout=SILENCE) as answer:
                data: bytes = answer.read()
                # A server without ranges sends the whole file.
                return data if not headers or answer.status == http.client.PARTIAL_CONTENT else _cut(data, span)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in (http.client.NOT_FOUND, http.client.GONE):
                raise FileNotFoundError(errno.ENOENT, "not found", path.url) from error
            if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
                return b""
            if error.code < 500 or attempt == RETRIES - 1:
                raise OSError(errno.EIO, f"the server answers {error.code} {error.reason}", path.url) from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError) or attempt == RETRIES - 1:
                raise OSError(
                    errno.EIO, f"cannot read from the server: {reason or type(error).__name__}", path.url
                ) from error
        time.sleep(0.1 * 3**attempt)
    raise AssertionError("the last attempt returns or raises")


def _bounds(first: int | None, end: int | None) -> str:
    if first is None:
        return f"-{end}"
    return f"{first}-" if end is None else f"{first}-{end - 1}"


def _cut(data: bytes, span: Range) -> bytes:
    first, end = span
    return data[max(len(data) - (end or 0), 0) :] if first is None else data[first:end]


# --- fsspec -----------------------------------------------------------------------------------------------------------


def fsspec_options(scheme: str) -> dict[str, Any]:
    """What s3fs is told that tensorstore is told too: the endpoint, and to sign nothing; {} for other schemes."""
    if scheme != "s3":
        return {}
    told = s3_options()
    found: dict[str, Any] = {"endpoint_url": told["endpoint"]} if "endpoint" in told else {}
    return found | ({"anon": True} if told["aws_credentials"] == {"type": "anonymous"} else {})


def _fsspec_ranges(paths: Sequence[RemotePath], spans: Sequence[Range]) -> list[bytes]:
    import fsspec

    try:
        system, _ = fsspec.core.url_to_fs(paths[0].url, **fsspec_options(paths[0].scheme))
    except (ImportError, ValueError) as error:
        fix = "install what reads it (for s3://: s3fs), or start workers by spawn instead of fork"
        raise PipeError(f"cannot read {paths[0].scheme}:// here ({error})", where=paths[0].url, fix=fix) from error
    names = [system._strip_protocol(path.url) for path in paths]
    starts = [-end if first is None and end else first for first, end in spans]
    ends = [None if first is None else end for first, end in spans]
    try:
        return [bytes(part) for part in system.cat_ranges(names, starts, ends, on_error="raise")]
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, "not found", paths[0].url if len(paths) == 1 else str(error)) from error
    except Exception as error:  # every file system has errors of its own
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise OSError(errno.EIO, f"cannot read from {paths[0].scheme}://: {reason}", paths[0].url) from error
