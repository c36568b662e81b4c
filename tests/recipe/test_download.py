"""Downloads against a local server that cuts connections, lies and forgets about ranges."""

import hashlib
import io
import random
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from espnet_kv.errors import UserError
from espnet_kv.recipe.corpora import download
from espnet_kv.recipe.corpora.download import download_subset, fetch, fetch_and_extract

CONTENT = bytes(range(256)) * 12289  # 3 MiB and a bit
MD5 = hashlib.md5(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.requests.append((self.path, self.headers.get("Range")))
        if server.errors:
            return self.send_error(server.errors.pop(0))
        if self.path not in server.files:
            return self.send_error(404)
        body = server.files[self.path]
        start = 0
        if server.ranges and (wanted := self.headers.get("Range")):
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(body):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(body)}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        end = start + server.cuts.pop(0) if server.cuts else len(body)
        self.wfile.write(body[start:end])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files = {"/file.bin": CONTENT}
    server.requests, server.cuts, server.errors, server.ranges = [], [], [], True
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def get(server, path, md5=MD5, **options):
    fetch(f"{server.url}/file.bin", path, md5, **({"wait": 0.001} | options))


def ranges(server):
    return [wanted for _, wanted in server.requests]


def archive_of(files, compression="gz"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=f"w:{compression}") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def test_fetch_writes_only_the_finished_file(server, tmp_path):
    get(server, tmp_path / "new" / "file.bin")
    assert (tmp_path / "new" / "file.bin").read_bytes() == CONTENT
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file.bin"]
    get(server, tmp_path / "new" / "file.bin")
    assert len(server.requests) == 1, "a finished file is not asked for again"


def test_a_cut_connection_is_resumed(server, tmp_path):
    server.cuts = [1000, 2_000_000]
    get(server, tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert ranges(server) == [None, "bytes=1000-", "bytes=2001000-"]


def test_a_part_of_an_earlier_run_is_resumed(server, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:777])
    get(server, tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert ranges(server) == ["bytes=777-"]


def test_a_complete_part_needs_nothing_more(server, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(CONTENT)
    get(server, tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


def test_a_part_longer_than_the_file_is_thrown_away(server, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(CONTENT + b"more")
    get(server, tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


def test_a_server_without_ranges_starts_over(server, tmp_path):
    server.ranges = False
    server.cuts = [1000]
    get(server, tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert ranges(server) == [None, "bytes=1000-"]


def test_a_wrong_checksum_removes_the_file(server, tmp_path):
    with pytest.raises(UserError, match=rf"file\.bin: MD5 is {MD5}, expected 0123, twice.*removed"):
        get(server, tmp_path / "file.bin", md5="0123")
    assert ranges(server) == [None, None], "downloaded once more, from the start"
    assert not list(tmp_path.iterdir())


def test_a_file_put_there_by_hand_is_verified(server, tmp_path, capsys):
    (tmp_path / "file.bin").write_bytes(b"something else")
    get(server, tmp_path / "file.bin")
    assert "file.bin has another checksum" in capsys.readouterr().out
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


def test_refusals_are_not_repeated(server, tmp_path):
    with pytest.raises(UserError, match=r"/gone: 404 .*OPENSLR_URL.*LIBRISPEECH"):
        fetch(f"{server.url}/gone", tmp_path / "gone", wait=0.001)
    assert len(server.requests) == 1
    assert not list(tmp_path.iterdir())


def test_server_errors_are_tried_again(server, tmp_path):
    server.errors = [503, 500, 429]
    get(server, tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


def test_giving_up_keeps_what_came(server, tmp_path):
    server.cuts = [5000] + [0] * 10
    with pytest.raises(UserError, match="connection was cut, 3 times; run again to resume"):
        get(server, tmp_path / "file.bin", attempts=3)
    assert (tmp_path / "file.bin.part").read_bytes() == CONTENT[:5000]
    assert len(server.requests) == 4


def test_an_unreachable_server_is_named(tmp_path):
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9/x: .*2 times"):
        fetch("http://127.0.0.1:9/x", tmp_path / "x", attempts=2, wait=0.001)


def test_extraction_is_marked_once_complete_and_not_repeated(server, tmp_path):
    server.files["/a.tar.gz"] = archive_of({"tree/one.txt": b"1", "tree/two.txt": b"22"})
    for _ in range(2):
        fetch_and_extract(f"{server.url}/a.tar.gz", tmp_path, tmp_path / "tree" / ".complete")
    assert (tmp_path / "tree" / "two.txt").read_bytes() == b"22"
    assert len(server.requests) == 1


@pytest.mark.parametrize("damage", ["truncated", "flipped", "not gzip", "escapes"])
def test_a_bad_archive_is_removed_and_leaves_no_marker(server, tmp_path, damage):
    noise = random.Random(0).randbytes(50_000)
    good = archive_of({"tree/one.bin": noise})
    server.files["/a.tar.gz"] = {
        "truncated": good[:-30_000],
        "flipped": good[:-6] + bytes([good[-6] ^ 1]) + good[-5:],
        "not gzip": b"<html>login</html>" * 100,
        "escapes": archive_of({"../evil": b"x"}),
    }[damage]
    into = tmp_path / "into"
    with pytest.raises(UserError, match=r"a\.tar\.gz is damaged \(.*run again") as caught:
        fetch_and_extract(f"{server.url}/a.tar.gz", into, into / ".complete")
    assert "\n" not in str(caught.value)
    assert not (into / ".complete").exists()
    assert not (into / "a.tar.gz").exists()
    assert not (tmp_path / "evil").exists()


def test_subsets_come_from_where_openslr_url_says(server, tmp_path, monkeypatch):
    archive = archive_of({"LibriSpeech/dev-clean-2/1/2/1-2.trans.txt": b"1-2-0000 HI\n"})
    server.files["/mirror/31/dev-clean-2.tar.gz"] = archive
    monkeypatch.setenv("OPENSLR_URL", f"{server.url}/mirror/")
    with pytest.raises(UserError, match="expected 6d7ab67ac6a1d2c993d050e16d61080d"):
        download_subset("dev-clean-2", tmp_path)
    md5 = hashlib.md5(archive).hexdigest()
    monkeypatch.setitem(download.ARCHIVES, "dev-clean-2", (31, md5))
    tree = download_subset("dev-clean-2", tmp_path)
    assert tree == tmp_path / "LibriSpeech"
    assert (tree / "dev-clean-2" / ".complete").exists()
    assert (tree / "dev-clean-2/1/2/1-2.trans.txt").read_text() == "1-2-0000 HI\n"


def test_every_archive_has_a_checksum():
    for number, md5 in download.ARCHIVES.values():
        assert number in (12, 31)
        assert len(bytes.fromhex(md5)) == 16
