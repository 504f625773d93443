"""Whole files under one root, a folder or s3://bucket/prefix: they appear complete or not at all, and once where asked.

All that this package writes goes through here, but for what Ray Train and MLflow keep themselves. Knows nothing of what
the files hold.

An S3 endpoint other than AWS's is set by $AWS_ENDPOINT_URL_S3, $AWS_ENDPOINT_URL or, first of all, by the root itself:
s3://bucket/prefix?endpoint_override=http://host:port. Writing to S3 takes the extra `s3`; URIs of other filesystems can
only be read.
"""

import contextlib
import errno
import functools
import hashlib
import os
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pyarrow as pa
import pyarrow.fs as pa_fs

from tipl_ray.digest import redacted
from tipl_ray.errors import UserError

TEMPORARY = ".tmp-"
"""Prefix of files that are not yet published; a killed process leaves them behind."""
LATEST = "latest"
"""Name of the link in a storage that leads to the newest report's folder."""
LEFT_AFTER_SECONDS = 3600.0
"""Age at which a file that is not yet published is taken for left behind: writing one takes far less."""
REQUESTS_AT_ONCE = 16
"""Requests under way at once where each is a round trip."""
ATTEMPTS = 9
"""Times that a request to S3 is made before the storage gives up, about a minute in all with what is waited between
them; $AWS_MAX_ATTEMPTS goes before."""
CONFLICTS = 50
"""Conditional puts of one name that may meet another under way before the storage gives up."""

_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.ENOSYS)
"""Errors of network and FUSE file systems that cannot sync a folder, and keep its names in their own way."""

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class StoreError(UserError):
    """The storage refuses: names the file or field, what is wrong with it, and what to do."""


class Storage:
    """Whole files under one root, by names relative to it: read through pyarrow, written by the root's publisher."""

    def __init__(self, root: str, temporaries: str = "") -> None:
        """Open without touching anything; `temporaries` is the folder in it for files that are not yet published.

        Raises StoreError where no filesystem answers to the URI, or where a file is in the folder's place.
        """
        if not root:
            raise StoreError("the storage's name is empty; use a folder or a URI such as s3://bucket/folder")
        self._root = redacted(root).partition("?")[0].rstrip("/")
        self._publisher: _Publisher
        try:
            if root.startswith("s3://"):
                bucket = _Bucket(root, temporaries)
                self._filesystem, self._base, self._publisher = bucket.reader(), bucket.base, bucket
                self._root = f"s3://{bucket.base}"
            elif "://" in root:
                self._filesystem, self._base = pa_fs.FileSystem.from_uri(root)
                self._publisher = _NoPublisher(self._filesystem.type_name)
            else:
                self._filesystem, self._base = pa_fs.LocalFileSystem(), str(Path(root).absolute())
        except (OSError, ValueError, pa.ArrowException) as error:
            shown = redacted(root)
            raise StoreError(
                f"{shown}: cannot be opened: {_one_line(error).replace(root, shown)}; use a folder or a URI such as "
                "s3://bucket/folder"
            ) from None  # whose text is the URI's
        if self._is_local:
            self._publisher, self._root = _Folder(self._base, temporaries), self._base
            _refuse_file(Path(self._base))

    @property
    def _is_local(self) -> bool:
        return isinstance(self._filesystem, pa_fs.LocalFileSystem)

    @property
    def filesystem(self) -> tuple[pa_fs.FileSystem, str]:
        """pyarrow's filesystem and the root's path in it, for libraries that write through pyarrow themselves."""
        return self._filesystem, self._base

    def show(self, path: str) -> str:
        """Full name for an error message."""
        return f"{self._root}/{path}".rstrip("/")

    def entries(self, folder: str = "") -> dict[str, int | None]:
        """Name -> bytes of the files in a folder, None of the folders in it; empty where there is no folder."""
        kinds = (pa_fs.FileType.File, pa_fs.FileType.Directory)
        selector = pa_fs.FileSelector(f"{self._base}/{folder}".rstrip("/"), allow_not_found=True)
        with self._looked_up(folder):
            return {
                info.base_name: info.size for info in self._filesystem.get_file_info(selector) if info.type in kinds
            }

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Name -> bytes of the files in a folder; empty where there is no folder."""
        return {name: size for name, size in self.entries(folder).items() if size is not None}

    def folders(self, folder: str = "") -> list[str]:
        """Names of the folders in a folder."""
        return [name for name, size in self.entries(folder).items() if size is None]

    def leftovers(self) -> list[str]:
        """Paths of the files, in whatever folder, that a process killed an hour ago or more left unpublished."""
        selector = pa_fs.FileSelector(self._base, allow_not_found=True, recursive=True)
        before = (time.time() - LEFT_AFTER_SECONDS) * 1e9
        with self._looked_up(""):
            return sorted(
                info.path.removeprefix(f"{self._base}/")
                for info in self._filesystem.get_file_info(selector)
                if info.is_file and info.base_name.startswith(TEMPORARY) and info.mtime_ns < before
            )

    def each(self, function: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
        """The function of each item in order; several at once where each is a round trip to another machine."""
        if self._is_local:
            yield from map(function, items)
        else:
            with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
                yield from pool.map(function, items)

    def open(self, path: str) -> pa.NativeFile:
        """The file, for reading. Raises OSError where it cannot be, FileNotFoundError where there is none."""
        if self._is_local:
            _refuse_outside(Path(self._base), Path(self._base, path))
        return self._filesystem.open_input_file(f"{self._base}/{path}")

    def read(self, path: str) -> bytes:
        """All of the file. Raises as `open` does."""
        with self.open(path) as file:
            return file.read()

    def exists(self, path: str) -> bool:
        """Whether there is such a file. Raises StoreError where that cannot be known."""
        with self._looked_up(path):
            return self._filesystem.get_file_info(f"{self._base}/{path}").type == pa_fs.FileType.File

    def write(self, path: str, data: bytes | memoryview) -> None:
        """Publish a whole file under its name, over whatever bears it; durable when it returns. Raises StoreError."""
        with self._refused(path):
            self._publisher.write(path, data)

    def put_if_absent(self, path: str, data: bytes) -> bool:
        """Publish a whole file under its name unless the name is taken; False where it is. Raises StoreError."""
        self.check_put_if_absent()
        with self._refused(path):
            return self._publisher.put_if_absent(path, data)

    def check_put_if_absent(self) -> None:
        """Raises StoreError where two writers of one name could both believe that they were first."""
        if refusal := self._publisher.refusal():
            raise StoreError(
                f"{self._root}: trials cannot be written there: {refusal}; collect into a local folder, or into an S3 "
                "bucket that supports conditional puts"
            )

    def delete(self, path: str) -> None:
        """Delete a file if it exists. Raises StoreError."""
        with self._refused(path), contextlib.suppress(FileNotFoundError):
            self._publisher.delete(path)

    def delete_folder(self, folder: str) -> None:
        """Delete a folder, with all that is in it, if it exists. Raises StoreError."""
        place = f"{self._base}/{folder}"
        with self._looked_up(folder):
            within = self._filesystem.get_file_info(pa_fs.FileSelector(place, allow_not_found=True, recursive=True))
        for info in within:
            if info.is_file:
                self.delete(info.path.removeprefix(f"{self._base}/"))  # not through a link out of the storage
        with self._refused(folder), contextlib.suppress(FileNotFoundError):
            self._filesystem.delete_dir(place)

    @contextlib.contextmanager
    def _looked_up(self, path: str) -> Iterator[None]:
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            raise StoreError(f"{self.show(path)}: cannot be listed: {_one_line(error)}; check the storage") from error

    @contextlib.contextmanager
    def _refused(self, path: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            cause = "the disk is full" if error.errno == errno.ENOSPC else _one_line(error)
            raise StoreError(
                f"{self.show(path)}: cannot be written: {cause}. Free some space or fix permissions, then run again; "
                "earlier commits stay readable"
            ) from error


def join(place: str, *names: str) -> str:
    """A place further down: a folder, or a URI whose options stay at its end.

    >>> join("/data/demo", "models", "0123"), join("s3://bucket/demo/?region=eu-west-1", "models")
    ('/data/demo/models/0123', 's3://bucket/demo/models?region=eu-west-1')
    """
    address, mark, options = place.partition("?") if "://" in place else (place, "", "")
    return "/".join([address.rstrip("/"), *names]) + mark + options


def last_name(place: str) -> str:
    """Last name of a folder or URI.

    >>> last_name("s3://bucket/demo/models/0123?endpoint_override=http://127.0.0.1:9000")
    '0123'
    """
    return (place.partition("?")[0] if "://" in place else place).rstrip("/").rpartition("/")[2]


def local_folder(place: str) -> Path | None:
    """The folder on this machine's own file system; None where the place is elsewhere. Touches nothing.

    >>> local_folder("file:///data/a%20demo"), local_folder("s3://bucket/demo")
    (PosixPath('/data/a demo'), None)
    """
    if place.startswith("file://"):
        return Path(urllib.parse.unquote(urllib.parse.urlsplit(place).path))
    return None if "://" in place else Path(place).absolute()


def link_to(folder: str, name: str) -> str:
    """The address of a file that a browser, or a terminal that follows links, opens.

    >>> link_to("/data/a demo", "report.html"), link_to("s3://bucket/demo", "report.html")
    ('file:///data/a%20demo/report.html', 's3://bucket/demo/report.html')
    """
    local = local_folder(folder)
    return join(folder, name) if local is None else (local / name).as_uri()


def make_latest(storage: str, folder: str) -> bool:
    """Make `latest`, a link in a storage that is a local folder, lead to a folder in it; whether it does now."""
    root, target = local_folder(storage), local_folder(folder)
    if root is None or target is None:
        return False
    link, new = root / LATEST, root / f"{TEMPORARY}{uuid.uuid4().hex}"
    if link.exists() and not link.is_symlink():  # the user's own
        return False
    try:
        new.symlink_to(target.relative_to(root))
        new.replace(link)
    except OSError:  # a file system without links
        new.unlink(missing_ok=True)
        return False
    return True


def write_file(folder: str, name: str, content: bytes) -> None:
    """Put a whole file into a folder, or under a URI, over whatever bears its name. Raises StoreError."""
    Storage(folder).write(name, content)


def read_file(folder: str, name: str) -> bytes:
    """Content of a file in a folder, or under a URI. Raises FileNotFoundError where there is none, else StoreError."""
    storage = Storage(folder)
    try:
        return storage.read(name)
    except FileNotFoundError:
        raise
    except (OSError, pa.ArrowException) as error:
        raise StoreError(f"{storage.show(name)}: cannot be read: {_one_line(error)}; check the storage") from error


def file_exists(folder: str, name: str) -> bool:
    """Whether there is such a file in a folder, or under a URI."""
    return Storage(folder).exists(name)


def publish(folder: str, files: Mapping[str, bytes], record: str) -> None:
    """Put files into a folder, and what `read_published` holds them to: a record of their SHA-256, as sha256sum has it.

    The last file comes last: where it is, all are. Raises StoreError.
    """
    *first, last = files
    lines = [f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in files.items()]
    for name in first:
        write_file(folder, name, files[name])
    write_file(folder, record, "".join(lines).encode())
    write_file(folder, last, files[last])


def read_published(folder: str, name: str, record: str, way_out: str) -> bytes:
    """Content of a file that `publish` put, or that an earlier version put there without a record.

    Raises StoreError, which ends in the way out, where the file is missing or is not the one that was published.
    """
    shown = Storage(folder).show(name)
    try:
        content = read_file(folder, name)
    except FileNotFoundError as error:
        raise StoreError(f"{shown}: is missing; {way_out}") from error
    if file_exists(folder, record):
        line = f"{hashlib.sha256(content).hexdigest()}  {name}"
        if line not in read_file(folder, record).decode(errors="replace").splitlines():
            raise StoreError(f"{shown}: is damaged: its SHA-256 is not the one in {record}; {way_out}")
    return content


class _Publisher(Protocol):
    """Puts and deletes whole files by names relative to a root; raises OSError where the storage refuses."""

    def refusal(self) -> str | None:
        """Why trials cannot be written here; None where they can."""

    def write(self, path: str, data: bytes | memoryview) -> None:
        """Put a file over whatever bears its name."""

    def put_if_absent(self, path: str, data: bytes) -> bool:
        """Put a file unless its name is taken; False where it is."""
        raise NotImplementedError

    def delete(self, path: str) -> None:
        """Delete a file. May raise FileNotFoundError."""


class _NoPublisher:
    """A filesystem without conditional put, as far as is known here: only for reading."""

    def __init__(self, type_name: str) -> None:
        self._refusal = (
            f"no conditional put is known for a filesystem of type {type_name!r}, so a second writer would go unnoticed"
        )

    def refusal(self) -> str | None:
        return self._refusal

    def write(self, path: str, data: bytes | memoryview) -> None:
        raise OSError(errno.EROFS, self._refusal)

    def put_if_absent(self, path: str, data: bytes) -> bool:
        raise OSError(errno.EROFS, self._refusal)

    def delete(self, path: str) -> None:
        raise OSError(errno.EROFS, self._refusal)


class _Folder:
    """A local folder: a file appears whole by rename, or by a hard link, which an existing name refuses."""

    def __init__(self, base: str, temporaries: str) -> None:
        self._base = Path(base)
        self._temporaries = self._base / temporaries

    def refusal(self) -> str | None:
        return None

    def write(self, path: str, data: bytes | memoryview) -> None:
        target = self._target(path)
        with self._temporary(data) as temporary:
            temporary.replace(target)
        _sync_folder(target.parent)

    def put_if_absent(self, path: str, data: bytes) -> bool:
        target = self._target(path)
        with self._temporary(data) as temporary:
            try:
                target.hardlink_to(temporary)
            except FileExistsError:
                # A network's file system repeats a request whose answer was lost: the name may be this very call's.
                if not target.samefile(temporary):
                    return False
            except OSError as error:
                if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                    raise OSError(
                        error.errno, "the file system makes no hard links, without which a second writer goes unnoticed"
                    ) from error
                raise
        _sync_folder(target.parent)
        return True

    def delete(self, path: str) -> None:
        target = self._base / path
        _refuse_outside(self._base, target.parent)
        target.unlink()

    def _target(self, path: str) -> Path:
        target = self._base / path
        _refuse_outside(self._base, target.parent)
        _make_folder(target.parent)
        return target

    @contextlib.contextmanager
    def _temporary(self, data: bytes | memoryview) -> Iterator[Path]:
        """A durable file under a name of its own; gone afterwards unless renamed or killed."""
        _make_folder(self._temporaries)
        path = self._temporaries / f"{TEMPORARY}{uuid.uuid4().hex}"
        try:
            with path.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield path
        finally:
            path.unlink(missing_ok=True)


class _Bucket:
    """An S3 bucket and a prefix in it: a file appears whole by one put, and by a conditional one under a new name.

    Credentials come from where AWS's own tools find them (environment, profile, web identity, machine), for reading
    (pyarrow) as for writing (botocore); none are taken from the URI, which logs show.
    """

    def __init__(self, root: str, temporaries: str) -> None:
        location = urllib.parse.urlsplit(root)
        if "@" in location.netloc:
            raise StoreError(
                f"s3://{location.netloc.rpartition('@')[2]}{location.path}: the URI carries credentials, which every "
                "log would show; pass them by the environment or a profile"
            )
        options = dict(
            urllib.parse.parse_qsl(location.query, keep_blank_values=True, strict_parsing=bool(location.query))
        )
        if unknown := sorted(options.keys() - {"endpoint_override", "scheme", "region"}):
            raise ValueError(f"{unknown[0]!r} is none of endpoint_override, scheme and region")
        if not location.netloc:
            raise ValueError("names no bucket")
        self._bucket, self._prefix = location.netloc, location.path.strip("/")
        self._temporaries = temporaries
        self.base = f"{self._bucket}/{self._prefix}".rstrip("/")
        environment = os.environ.get
        endpoint = (
            options.get("endpoint_override") or environment("AWS_ENDPOINT_URL_S3") or environment("AWS_ENDPOINT_URL")
        )
        if endpoint and redacted(endpoint) != endpoint:
            raise StoreError(
                f"the S3 endpoint {redacted(endpoint)} carries credentials, which every log would show; pass them by "
                "the environment or a profile"
            )
        if endpoint and "://" not in endpoint:
            endpoint = f"{options.get('scheme', 'https')}://{endpoint}"
        self._endpoint = endpoint
        attempts = environment("AWS_MAX_ATTEMPTS") or str(ATTEMPTS)
        if not attempts.isdecimal() or not int(attempts):
            raise ValueError(f"$AWS_MAX_ATTEMPTS={attempts!r} is not a whole number of at least 1")
        self._attempts = int(attempts)
        told = options.get("region") or environment("AWS_REGION") or environment("AWS_DEFAULT_REGION")
        self._region = told or ("us-east-1" if endpoint else pa_fs.resolve_s3_region(self._bucket))

    def reader(self) -> pa_fs.S3FileSystem:
        """The filesystem to read from."""
        scheme, _, host = (self._endpoint or "https://").partition("://")
        return pa_fs.S3FileSystem(
            region=self._region,
            scheme=scheme,
            endpoint_override=host.rstrip("/") or None,
            retry_strategy=pa_fs.AwsStandardS3RetryStrategy(max_attempts=self._attempts),
        )

    def refusal(self) -> str | None:
        return self._refusal

    @functools.cached_property
    def _refusal(self) -> str | None:
        """Found by trying: the second conditional put of one name has to fail."""
        path = f"{self._temporaries}/{TEMPORARY}{uuid.uuid4().hex}".lstrip("/")
        try:
            first, second = self.put_if_absent(path, b""), self.put_if_absent(path, b"")
            self.delete(path)
        except OSError as error:
            return f"a conditional put is refused: {error}"
        if first and not second:
            return None
        return (
            "its conditional puts (If-None-Match: *) let one name be taken twice, so a second writer would go unnoticed"
        )

    def write(self, path: str, data: bytes | memoryview) -> None:
        with self._as_os_error():
            self._client.put_object(Bucket=self._bucket, Key=self._key(path), Body=bytes(data))

    def put_if_absent(self, path: str, data: bytes) -> bool:
        name = {"Bucket": self._bucket, "Key": self._key(path)}
        mark = uuid.uuid4().hex
        with self._as_os_error():
            for _ in range(CONFLICTS):
                try:
                    self._client.put_object(**name, Body=data, IfNoneMatch="*", Metadata={"writer": mark})
                    return True
                except self._client.exceptions.ClientError as error:
                    status = error.response["ResponseMetadata"]["HTTPStatusCode"]
                    if status == 412:
                        # The client repeats a put whose answer was lost: the name may be taken by this very call.
                        return self._client.head_object(**name)["Metadata"].get("writer") == mark
                    if status != 409:
                        raise
                time.sleep(0.1)  # another put or delete of the name was under way
        raise OSError(f"{CONFLICTS} conditional puts of {name['Key']} met others under way")

    def delete(self, path: str) -> None:
        with self._as_os_error():
            self._client.delete_object(Bucket=self._bucket, Key=self._key(path))

    def _key(self, path: str) -> str:
        return f"{self._prefix}/{path}".lstrip("/")

    @functools.cached_property
    def _client(self) -> Any:
        import botocore.config
        import botocore.session

        settings = botocore.config.Config(
            retries={"mode": "standard", "total_max_attempts": self._attempts},
            # Signed bodies are checked by every S3, the newer checksums by AWS's alone.
            request_checksum_calculation="when_required",
            s3={"payload_signing_enabled": True, "addressing_style": "path" if self._endpoint else "auto"},
        )
        return botocore.session.get_session().create_client(
            "s3", region_name=self._region, endpoint_url=self._endpoint, config=settings
        )

    @contextlib.contextmanager
    def _as_os_error(self) -> Iterator[None]:
        try:
            import botocore.exceptions
        except ImportError as error:
            raise OSError("botocore is not installed: pip install 'tipl_ray[s3]'") from error
        try:
            yield
        except (botocore.exceptions.ClientError, botocore.exceptions.BotoCoreError) as error:
            raise OSError(f"{self._endpoint or 'S3'}: {error}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _refuse_outside(root: Path, path: Path) -> None:
    """Raises OSError where links lead out of the storage: neither reads nor writes follow them."""
    if not (target := path.resolve()).is_relative_to(root.resolve()):
        raise OSError(f"{path} leads out of the storage, to {target}")


def _make_folder(folder: Path) -> None:
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def _refuse_file(folder: Path) -> None:
    """Raises StoreError where a folder cannot be, as it or one above it is a file."""
    place = next((place for place in (folder, *folder.parents) if os.path.lexists(place)), folder)
    if place.exists() and not place.is_dir():
        raise StoreError(f"{folder}: {'' if place == folder else f'{place} '}is a file; choose another folder")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)
