"""Files under one URI, the same on disk and on S3; the only file that knows boto3.

pyarrow moves the bytes. boto3 is needed for one thing pyarrow lacks: a put that fails when the object exists, which
makes finishing a station atomic on S3. Credentials, region and endpoint come from the usual AWS_* variables of the
process, on drivers and workers alike.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import fs

from emu_ray.errors import StationConflictError, StationError, first_line

COPY_CHUNK_BYTES = 8 << 20


class Store:
    """Reads and writes files by name relative to `uri`, bytes as they are (no .gz is unpacked); building one does no IO.

    Every failure of the disk or the bucket becomes a StationError that names the file and the reason.
    """

    def __init__(self, uri: str | os.PathLike[str]) -> None:
        text = os.fspath(uri)
        if text.startswith("file://"):
            text = text.removeprefix("file://")
        if "://" in text and not text.startswith("s3://"):
            raise StationError(f"expected a directory or s3://bucket/prefix, found {text!r}")
        self.uri = text.rstrip("/") if text.startswith("s3://") else os.path.abspath(text)

    @property
    def is_local(self) -> bool:
        """Whether it lies on a mounted disk."""
        return not self.uri.startswith("s3://")

    def path(self, name: str = "") -> str:
        """The URI of the file or folder `name`."""
        return f"{self.uri}/{name}" if name else self.uri

    def filesystem(self) -> tuple[fs.FileSystem, str]:
        """A pyarrow file system and the path on it that `uri` means."""
        return open_filesystem(self.uri)

    def _on(self, name: str) -> tuple[fs.FileSystem, str]:
        system, base = self.filesystem()
        return system, f"{base}/{name}" if name else base

    def get(self, name: str) -> bytes | None:
        """The bytes of `name`, or None when it doesn't exist."""
        system, path = self._on(name)
        with said_plainly("read", self.path(name)):
            try:
                with system.open_input_stream(path, compression=None) as stream:
                    return bytes(stream.read())
            except FileNotFoundError:
                return None

    def put(self, name: str, content: bytes | Path) -> None:
        """Write `name`; a reader sees the old file or the whole new one."""
        with self.writing(name) as sink:
            if isinstance(content, bytes):
                sink.write(content)
                return
            with open(content, "rb") as source:
                while chunk := source.read(COPY_CHUNK_BYTES):
                    sink.write(chunk)

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[pa.NativeFile]:
        """A sink whose file appears under `name` when the block ends, and not at all when it raises."""
        system, path = self._on(name)
        with said_plainly("write", self.path(name)):
            if (
                not self.is_local
            ):  # written here first: pyarrow can only close an S3 stream, which would publish a half file
                with tempfile.NamedTemporaryFile(prefix="emu_ray-") as here:
                    with pa.OSFile(here.name, "wb") as sink:
                        yield sink
                    with open(here.name, "rb") as source, system.open_output_stream(path, compression=None) as there:
                        shutil.copyfileobj(source, there, COPY_CHUNK_BYTES)
                return
            os.makedirs(os.path.dirname(path), exist_ok=True)
            partial = _partial_path(path)
            try:
                with system.open_output_stream(partial, compression=None) as sink:
                    yield sink
                os.replace(partial, path)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(partial)

    def put_new(self, name: str, content: bytes) -> None:
        """Write `name` only if it doesn't exist; StationConflictError when another was first, however close."""
        taken = f"{self.path(name)} was written by another run at the same time; this run's work was not committed"
        with said_plainly("write", self.path(name)):
            if self.is_local:
                path = self.path(name)
                partial = _partial_path(path)
                try:
                    with open(partial, "wb") as file:
                        file.write(content)
                        file.flush()
                        os.fsync(file.fileno())
                    os.link(partial, path)
                except FileExistsError:
                    raise StationConflictError(taken) from None
                finally:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(partial)
                return
        self._put_new_s3(name, content, taken)

    def _put_new_s3(self, name: str, content: bytes, taken: str) -> None:
        import boto3
        from botocore.exceptions import BotoCoreError, ClientError

        address = urlsplit(self.path(name))
        try:
            client = boto3.client("s3", endpoint_url=_s3_endpoint(), region_name=_s3_region())
            client.put_object(Bucket=address.netloc, Key=address.path.lstrip("/"), Body=content, IfNoneMatch="*")
        except ClientError as error:
            if error.response.get("Error", {}).get("Code") in (
                "PreconditionFailed",
                "ConditionalRequestConflict",
                "412",
                "409",
            ):
                raise StationConflictError(taken) from None
            raise StationError(f"cannot write {self.path(name)}: {error}") from error
        except BotoCoreError as error:
            raise StationError(f"cannot write {self.path(name)}: {error}") from error

    def sizes(self) -> dict[str, int]:
        """Relative name -> bytes of every file below, sorted by name; empty when nothing lies there."""
        system, base = self.filesystem()
        with said_plainly("list", self.uri):
            found = system.get_file_info(fs.FileSelector(base, recursive=True, allow_not_found=True))
        files = {i.path[len(base) :].lstrip("/"): int(i.size or 0) for i in found if i.type == fs.FileType.File}
        return dict(sorted(files.items()))

    def delete(self, name: str) -> None:
        """Remove one file if it exists."""
        system, path = self._on(name)
        with said_plainly("remove", self.path(name)), contextlib.suppress(FileNotFoundError):
            system.delete_file(path)

    def download(self, name: str, local: Path) -> None:
        """Copy the file `name` to `local`."""
        system, path = self._on(name)
        with said_plainly("download", self.path(name)), system.open_input_stream(path, compression=None) as source:
            local.parent.mkdir(parents=True, exist_ok=True)
            with open(local, "wb") as sink:
                shutil.copyfileobj(source, sink, COPY_CHUNK_BYTES)


def open_filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """A pyarrow file system for a local path or `s3://`, and the path on it."""
    if not uri.startswith("s3://"):
        return fs.LocalFileSystem(), os.path.abspath(uri.removeprefix("file://"))
    endpoint = _s3_endpoint()
    scheme, _, host = endpoint.partition("://") if endpoint else ("https", "", "")
    system = fs.S3FileSystem(
        endpoint_override=host.rstrip("/") or None,
        scheme=scheme,
        region=_s3_region(),
        connect_timeout=10,
        request_timeout=60,
    )
    return system, uri.removeprefix("s3://").rstrip("/")


def _s3_endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def _s3_region() -> str | None:
    return (
        os.environ.get("AWS_REGION")
        or os.environ.get("AWS_DEFAULT_REGION")
        or ("us-east-1" if _s3_endpoint() else None)
    )


def _partial_path(path: str) -> str:
    """A name beside `path` that no reader takes for a part, also when a killed writer leaves it behind."""
    folder, name = os.path.split(path)
    return os.path.join(folder, f"._{name}.{uuid.uuid4().hex[:12]}.partial")


@contextlib.contextmanager
def said_plainly(action: str, uri: str) -> Iterator[None]:
    """Turn what a file system raises into a StationError that names the file and the reason."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise StationError(f"cannot {action} {uri}: {reason}") from error
