"""Downloads with resuming and checksums, and the archives of OpenSLR for the recipe."""

import hashlib
import http.client
import io
import os
import re
import socket
import ssl
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from pathlib import Path

from espnet_kv.cli import progress
from espnet_kv.errors import UserError

# Subset -> (OpenSLR's number, MD5 of SUBSET.tar.gz published by OpenSLR).
ARCHIVES = {
    "train-clean-100": (12, "2a93770f6d5c6c964bc36631d331a522"),
    "dev-clean": (12, "42e2234ba48799c1f50f24a7926300a1"),
    "dev-other": (12, "c8d0bcc9cca99d4f8b62fcc847357931"),
    "test-clean": (12, "32fa31d27d2e1cad72775fee3f4849a9"),
    "test-other": (12, "fb5a50374b501bb3bac4815ee91d3135"),
    "train-clean-5": (31, "5df7d4e78065366204ca6845bb08f490"),
    "dev-clean-2": (31, "6d7ab67ac6a1d2c993d050e16d61080d"),
}
OPENSLR_URL = "https://www.openslr.org/resources"
_MIB = 1 << 20
_INSTEAD = "set OPENSLR_URL to a mirror, or LIBRISPEECH to a copy that you have"
# Errors without a second attempt: unknown host or scheme, bad certificate, refusal by a proxy.
_PERMANENT = (str, socket.gaierror, ssl.SSLCertVerificationError)
_REFUSED = re.compile(r"Tunnel connection failed: 4(?!08|29)")


def download_subset(subset: str, into: Path, base_url: str | None = None) -> Path:
    """Download and extract a LibriSpeech subset, unless this was done before.

    Args:
        subset: a key of ARCHIVES.
        into: folder for SUBSET.tar.gz and LibriSpeech/SUBSET.
        base_url: None: the environment variable OPENSLR_URL, or openslr.org.

    Returns:
        The folder `into`/LibriSpeech.
    """
    number, md5 = ARCHIVES[subset]
    base_url = base_url or os.environ.get("OPENSLR_URL") or OPENSLR_URL
    tree = into / "LibriSpeech"
    fetch_and_extract(
        f"{base_url.rstrip('/')}/{number}/{subset}.tar.gz", into, tree / subset / ".complete", md5
    )
    return tree


def fetch_and_extract(
    url: str, into: Path, marker: Path, md5: str | None = None, *, instead: str = _INSTEAD
) -> None:
    """Download a .tar.gz and extract it into the folder `into`, unless `marker` exists.

    The marker is written last, after a complete extraction. The archive is kept.

    Raises:
        UserError: as `fetch`, or the archive is damaged or would write outside of `into`. Such an
            archive is removed, so that the next run downloads it again.
    """
    if marker.exists():
        return
    archive = into / url.rsplit("/", 1)[-1]
    fetch(url, archive, md5, instead=instead)
    try:
        with (
            open(archive, "rb") as compressed,
            tarfile.open(fileobj=compressed, mode="r:gz") as tar,
            progress(f"extract {archive.name}", archive.stat().st_size, unit="B") as counter,
        ):
            for member in tar:
                tar.extract(member, into, filter="data")
                counter.update(compressed.tell() - counter.n)
            while tar.fileobj and tar.fileobj.read(_MIB):
                pass  # the gzip checksum comes after the last member
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"cannot extract {archive}: {error}") from None
        archive.unlink()
        raise UserError(
            f"{archive} is damaged ({error}) and was removed: run again to download it"
        ) from None
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.touch()


def fetch(
    url: str,
    path: Path,
    md5: str | None = None,
    *,
    attempts: int = 5,
    wait: float = 2.0,
    instead: str = _INSTEAD,
) -> None:
    """Download `url` to `path`, resuming from `path`.part of an earlier run.

    A file with a wrong checksum is downloaded once more.

    Args:
        md5: checksum to verify, also for an existing file.
        attempts: number of consecutive failures without new data before giving up.
        wait: seconds before the second attempt, doubled for each further attempt.
        instead: alternative to the download, for the message.

    Raises:
        UserError: the server is unknown, refuses or stays unreachable, `path` cannot be
            written, or the checksum is wrong twice (the file is removed).
    """
    if path.exists() and (md5 is None or _md5(path) == md5):
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            print(f"  {path} has another checksum than {url} and is downloaded again", flush=True)
            path.unlink()
        part = path.with_name(f"{path.name}.part")
        for again in (True, False):
            _download(url, part, attempts, wait, instead)
            found = _md5(part) if md5 else None
            if found == md5:
                break
            part.unlink()
            if again:
                print(f"  {url}: MD5 is {found}, expected {md5}; downloading it again", flush=True)
        else:
            raise UserError(
                f"{url}: MD5 is {found}, expected {md5}, twice in a row; what came was removed: "
                f"check for a proxy that changes downloads, or {instead}"
            )
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def _download(url: str, part: Path, attempts: int, wait: float, instead: str) -> None:
    print(f"  download {url}", flush=True)
    failures, begun = 0, False
    while True:
        size = part.stat().st_size if part.exists() else 0
        try:
            if _continue(url, part):
                return
            problem = "the connection was cut"
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in (408, 429):
                raise UserError(f"{url}: {error.code} {error.reason}; {instead}") from None
            problem = f"{error.code} {error.reason}"
        except (http.client.InvalidURL, ValueError) as error:
            raise UserError(f"{url} is not a valid address: {error}; {instead}") from None
        except (OSError, http.client.HTTPException) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            # A name that was found a moment ago may be lost for a moment.
            if not begun and (isinstance(reason, _PERMANENT) or _REFUSED.match(str(reason))):
                raise UserError(
                    f"{url}: {reason}; check the address and the network, or {instead}"
                ) from None
            problem = str(reason) or type(error).__name__
        progressed = part.exists() and part.stat().st_size > size
        begun = begun or progressed
        failures = 0 if progressed else failures + 1
        if failures >= attempts:
            raise UserError(
                f"{url}: {problem}, {attempts} times; run again to resume, or {instead}"
            )
        print(f"  {problem}; trying again", flush=True)
        time.sleep(wait * 2**failures)


def _continue(url: str, part: Path) -> bool:
    """Append the rest of `url` to `part`. False: the connection ended too early."""
    done = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        response = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        # No data after `done`: either `part` is complete, or it is not a part of that file.
        if error.headers.get("Content-Range") == f"bytes */{done}":
            return True
        part.unlink()
        return False
    with response:
        resumes = re.match(rf"bytes {done}-", response.headers.get("Content-Range", ""))
        if response.status != 206 or not resumes:
            done = 0  # the server does not support ranges and sends the whole file
        length = response.headers.get("Content-Length")
        total = done + int(length) if length else 0
        counter = progress(f"download {part.stem}", total, initial=done, unit="B")
        with counter, _opened(part, "a" if done else "w") as out:
            while block := response.read(_MIB):
                left = memoryview(block)
                try:
                    while left:  # a nearly full disk writes only a part of a block
                        left = left[out.write(left) :]
                except OSError as error:
                    raise _unwritable(part, error) from None
                done += len(block)
                counter.update(len(block))
    return done >= total


def _opened(part: Path, mode: str) -> io.FileIO:
    try:
        return io.FileIO(part, mode)
    except OSError as error:
        raise _unwritable(part, error) from None


def _unwritable(part: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write {part}: {error.strerror}; what came is kept, and the next run resumes"
    )


def _md5(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "md5").hexdigest()
