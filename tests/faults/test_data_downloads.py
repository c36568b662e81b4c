"""Downloads that cannot work, that drop, and that do not fit on the disk."""

import hashlib
import re
import socket
import ssl
import time
import urllib.error

import pytest

from espnet_kv.errors import UserError
from espnet_kv.recipe.corpora import download


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (urllib.error.URLError(socket.gaierror(-2, "Name or service not known")), "not known"),
        (urllib.error.URLError(socket.gaierror(-3, "Temporary failure")), "Temporary failure"),
        (urllib.error.URLError(ssl.SSLCertVerificationError("self-signed")), "self-signed"),
        (urllib.error.URLError(OSError("Tunnel connection failed: 403 Forbidden")), "403"),
        (urllib.error.HTTPError("u", 404, "Not Found", {}, None), "404 Not Found"),
        (urllib.error.HTTPError("u", 403, "Forbidden", {}, None), "403 Forbidden"),
    ],
    ids=["unknown name", "no network", "certificate", "proxy", "404", "403"],
)
def test_what_no_second_attempt_mends_is_final_at_once(tmp_path, monkeypatch, error, message):
    def urlopen(*args, **options):
        raise error

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    start = time.monotonic()
    with pytest.raises(UserError, match=rf"https://x/a: .*{message}.* OPENSLR_URL") as caught:
        download.fetch("https://x/a", tmp_path / "a")
    assert time.monotonic() - start < 1
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("url", ["htps://x/a", "openslr/a", "http://[x/a", "https://x/a b"])
def test_what_is_no_address_is_final_at_once(tmp_path, url):
    with pytest.raises(UserError, match=re.escape(url)):
        download.fetch(url, tmp_path / "a")


@pytest.mark.parametrize(
    "error", [TimeoutError("timed out"), ssl.SSLError("EOF"), OSError(104, "reset")]
)
def test_a_connection_that_drops_is_tried_again(tmp_path, monkeypatch, error):
    served = []

    def urlopen(request, **options):
        served.append(request)
        if len(served) < 3:
            raise urllib.error.URLError(error)
        return opened(f"file://{tmp_path}/source", timeout=1)

    opened = download.urllib.request.urlopen
    (tmp_path / "source").write_bytes(b"content")
    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    download.fetch("https://x/a", tmp_path / "a", wait=0.001)
    assert len(served) == 3 and (tmp_path / "a").read_bytes() == b"content"


def test_a_full_disk_is_named_and_not_tried_again(tmp_path):
    (tmp_path / "source").write_bytes(bytes(10))
    (tmp_path / "a.part").symlink_to("/dev/full")
    with pytest.raises(
        UserError, match=r"cannot write .*a\.part: No space left on device; .*resumes"
    ):
        download.fetch(f"file://{tmp_path}/source", tmp_path / "a")


def test_a_download_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "downloads").write_text("a file")
    with pytest.raises(
        UserError, match=r"cannot write .*downloads/a: (File exists|Not a directory)"
    ):
        download.fetch("https://x/a", tmp_path / "downloads" / "a")


@pytest.mark.parametrize("good_at", [1, 2])
def test_a_wrong_checksum_is_downloaded_once_more(tmp_path, monkeypatch, good_at):
    calls = []

    def served(url, part, *rest):
        calls.append(url)
        part.write_bytes(b"good" if len(calls) > good_at else b"bad")

    monkeypatch.setattr(download, "_download", served)
    md5 = hashlib.md5(b"good").hexdigest()
    if good_at == 1:
        download.fetch("https://x/a", tmp_path / "a", md5)
        assert (tmp_path / "a").read_bytes() == b"good"
    else:
        with pytest.raises(UserError, match=rf"expected {md5}, twice in a row"):
            download.fetch("https://x/a", tmp_path / "a", md5)
        assert not list(tmp_path.iterdir())
    assert len(calls) == 2
