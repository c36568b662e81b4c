"""The command `serve`: tokens, TLS, the end of the server, refused options."""

import asyncio
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time

import aiohttp
import pytest
from commands import assert_one_line, run
from served import PATIENCE, Served, Talk, receive, talk
from small_models import save, speech

from espnet_kv.bin import serve

TOKEN = "a-token-of-some-length"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> list[str]:
    return save(tmp_path_factory.mktemp("tones"))


class TestToken:
    @pytest.fixture(scope="class")
    def server(self, model, tmp_path_factory):
        file = tmp_path_factory.mktemp("token") / "token"
        file.write_text(TOKEN + "\n")
        with Served(*model, "--token_file", str(file), "--host", "0.0.0.0") as served:
            served.url = served.url.replace("0.0.0.0", "127.0.0.1")
            yield served

    @pytest.mark.parametrize("way", ["header", "query"])
    def test_a_client_with_the_token_is_served(self, server, way):
        if way == "header":
            done = talk(
                server.url, speech("AB"), "Done", headers={"Authorization": f"Bearer {TOKEN}"}
            )
        else:
            done = talk(f"{server.url}/?token={TOKEN}", speech("AB"), "Done")
        assert asyncio.run(done).text == "AB"

    @pytest.mark.parametrize(
        "query", ["", "?token=", "?token=wrong", "?token=%C3%A9", "?token=%FF"]
    )
    def test_others_get_status_401_and_its_clients_notice_nothing(self, server, query):
        async def both():
            bearer = {"Authorization": f"Bearer {TOKEN}"}
            good = talk(server.url, speech("ABBA"), "Done", pause=0.02, headers=bearer)
            bad = talk(f"{server.url}/{query}", "Done")
            return await asyncio.gather(good, bad, return_exceptions=True)

        good, refused = asyncio.run(both())
        assert good.text == "ABBA" and good.closed is None
        assert isinstance(refused, aiohttp.WSServerHandshakeError) and refused.status == 401
        bearer = {"headers": {"Authorization": f"Bearer {TOKEN}"}}
        assert server.metric('espnet_kv_streams_refused_total{reason="token"}', **bearer) > 0

    def test_a_header_of_arbitrary_bytes_is_refused_too(self, server):
        with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as raw:
            raw.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer \xff\r\n\r\n")
            assert raw.recv(100).startswith(b"HTTP/1.1 401")

    def test_the_page_and_health_need_none_and_metrics_do(self, server):
        assert server.get("/")[0] == 200 and server.health()["token"]
        status, text = server.get("/metrics")
        assert status == 401 and json.loads(text) == {"error": "the token is missing or wrong"}

    def test_the_environment_may_hold_it(self, model, monkeypatch):
        monkeypatch.setenv("ESPNET_KV_TOKEN", TOKEN)
        with Served(*model) as server:
            assert server.health()["token"] and server.get("/metrics")[0] == 401
            assert server.get(f"/metrics?token={TOKEN}")[0] == 200

    def test_a_token_in_the_environment_is_one_word(self, model, monkeypatch):
        monkeypatch.setenv("ESPNET_KV_TOKEN", "two words")
        assert_one_line(run(serve.main, *model), "the variable ESPNET_KV_TOKEN: allowed: one word")

    def test_a_server_for_other_machines_without_token_is_warned_of(self, model, monkeypatch):
        monkeypatch.delenv("ESPNET_KV_TOKEN", raising=False)
        with Served(*model, "--host", "0.0.0.0") as server:
            ended = server.stop()
        (line,) = (line for line in ended.stderr.splitlines() if "warning" in line)
        assert "--host 0.0.0.0" in line and "--token_file" in line


class TestOrigin:
    """Browsers send the origin of a page with its websockets; other clients send none."""

    SITE = "https://captions.example.org"

    @pytest.fixture(scope="class")
    def server(self, model):
        with Served(*model, "--allowed_origins", self.SITE, "http://localhost:8000") as served:
            yield served

    @staticmethod
    def opened(server: Served, **headers: str) -> Talk:
        return asyncio.run(talk(server.url, speech("AB"), "Done", headers=headers))

    @pytest.mark.parametrize(
        "origin",
        [SITE, f"{SITE}:443", SITE.upper(), "http://localhost:8000", "http://127.0.0.1:PORT"],
    )
    def test_its_own_page_and_those_allowed_are_served(self, server, origin):
        origin = origin.replace("PORT", str(server.port))
        assert self.opened(server, Origin=origin).text == "AB"

    @pytest.mark.parametrize("host", ["asr.example.org", "asr.example.org:8443", "[::1]:6006"])
    def test_its_own_page_behind_a_proxy_that_ends_tls(self, server, host):
        assert self.opened(server, Origin=f"https://{host}", Host=host).text == "AB"

    @pytest.mark.parametrize(
        "origin",
        [
            "https://evil.example",
            "http://captions.example.org",
            f"{SITE}:8443",
            f"{SITE}.evil.example",
            "http://127.0.0.1",
            "http://127.0.0.1:1",
            "http://127.0.0.1:port",
            f"https://x@{SITE[8:]}",
            "null",
            "",
        ],
    )
    def test_pages_of_others_get_status_403(self, server, origin):
        reason = 'espnet_kv_streams_refused_total{reason="origin"}'
        before = server.metric(reason)
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            self.opened(server, Origin=origin)
        assert refused.value.status == 403 and server.metric(reason) == before + 1

    def test_the_refusal_names_the_option(self, server):
        upgrade = {
            "Upgrade": "websocket",
            "Connection": "Upgrade",
            "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
        }
        status, text = server.get("/", headers=upgrade | {"Origin": "https://evil.example"})
        assert status == 403 and "--allowed_origins" in json.loads(text)["error"]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
def test_tls(model, tmp_path):
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    request = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate]
    subprocess.run([*request.split(), *names], check=True, capture_output=True)
    context = ssl.create_default_context(cafile=certificate)
    with Served(*model, "--certificate", str(certificate), "--key", str(key)) as server:
        assert server.url.startswith("https://127.0.0.1:")
        talked = asyncio.run(talk(server.url, speech("AB"), "Done", ssl=context))
        assert talked.text == "AB" and talked.closed is None
        assert server.get("/health", ssl=context)[0] == 200
    both = tmp_path / "both.pem"
    both.write_text(certificate.read_text() + key.read_text())
    with Served(*model, "--certificate", str(both)) as server:
        assert server.get("/health", ssl=context)[0] == 200
    refused = run(serve.main, *model, "--certificate", str(certificate))
    assert_one_line(refused, "--certificate .*certificate.pem: it and its key are no pair")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_open_streams_with_their_text(model, number):
    with Served(*model) as server:

        async def stop_while_open():
            async with (
                aiohttp.ClientSession() as session,
                session.ws_connect(server.url) as busy,
                session.ws_connect(server.url) as quiet,
                session.get(server.url + "/health"),  # kept alive
            ):
                mute = socket.create_connection(("127.0.0.1", server.port))
                await busy.send_bytes(speech("AB").numpy().tobytes())
                await busy.receive(timeout=PATIENCE)
                os.kill(server.pid, number)
                talks = await asyncio.gather(receive(busy), receive(quiet))
                mute.close()
                return talks

        began = time.monotonic()
        busy, quiet = asyncio.run(stop_while_open())
        ended = server.stop(0)
        assert time.monotonic() - began < 10
    assert ended.returncode == 0 and ended.stderr == "", ended.stderr
    assert (busy.text, quiet.text) == ("AB", "")
    for talked in (busy, quiet):
        assert talked.closed == (1001, "the server is shutting down") == (1001, talked.error)
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", server.port), timeout=1)


def test_a_killed_server_can_be_restarted_on_its_port(model):
    with Served(*model) as server:

        async def kill_while_open():
            async with aiohttp.ClientSession() as session, session.ws_connect(server.url) as socket:
                await socket.send_bytes(speech("AB").numpy().tobytes())
                await socket.receive(timeout=PATIENCE)
                os.kill(server.pid, signal.SIGKILL)
                return await receive(socket)

        code, _ = asyncio.run(kill_while_open()).closed
        assert code == 1006
        assert server.stop(0).returncode == -signal.SIGKILL
    with Served(*model, "--port", str(server.port)) as again:
        assert again.port == server.port
        assert asyncio.run(talk(again.url, speech("AB"), "Done")).text == "AB"
        second = run(serve.main, *model, "--port", str(server.port))
    assert_one_line(second, f"--port {server.port}: Address already in use: name another")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--left_chunks", "-1"], "--left_chunks -1: .* give e.g. --left_chunks 4"),
        (["--max_segment_seconds", "0"], "--max_segment_seconds 0: .* 30"),
        (["--max_streams", "0"], "max_streams: '0' is not a whole number from 1"),
        (["--max_batch_size", "0"], "max_batch_size: '0'"),
        (["--max_wait_ms", "-1"], "max_wait_ms: '-1' is not a whole number from 0"),
        (["--idle_seconds", "0"], "--idle_seconds 0.0: allowed"),
        (["--idle_seconds", "nan"], "--idle_seconds nan: allowed"),
        (["--max_stream_seconds", "-1"], "--max_stream_seconds -1.0: allowed"),
        (["--port", "70000"], "port: '70000'"),
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid .*name another"),
        (["--token_file", "nothing"], "nothing: No such file"),
        (["--token_file", os.devnull], "--token_file /dev/null: allowed: one word"),
        (["--key", "key.pem"], "--key key.pem: give the --certificate, too"),
        (["--allowed_origins", "*"], r"--allowed_origins \*: allowed: the beginning"),
        (["--allowed_origins", "https://a.example/page"], "--allowed_origins https://a.example/pa"),
        (["--certificate", "nothing.pem"], "nothing.pem: No such file"),
        (["--asr_model_file", "nothing.pth"], "nothing.pth does not exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_used_is_refused_in_one_line(model, options, said):
    assert_one_line(run(serve.main, *model, "--port", "0", *options), said)


def test_the_extra_is_named_when_it_is_missing(model, monkeypatch):
    monkeypatch.delitem(sys.modules, "espnet_kv.serve.server", raising=False)
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    assert_one_line(
        run(serve.main, *model), r'aiohttp is not installed: pip install "espnet_kv.serve'
    )
