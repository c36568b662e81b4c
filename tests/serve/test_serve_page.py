"""The server's page in a browser: a recording and a microphone are recognized."""

import asyncio
import re

import numpy as np
import pytest
import soundfile
from chromium import PROGRAM, Page
from commands import wait_until
from served import PATIENCE, Served, talk
from small_models import RATE, save, speech

SPOKEN = "AB_____BA"
TOKEN = "a-token"

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="needs Chromium")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tones")
    save(folder)
    soundfile.write(folder / "speech.wav", speech(SPOKEN).numpy(), RATE)
    (folder / "token").write_text(TOKEN)
    return folder


@pytest.fixture(scope="module")
def server(folder):
    options = ["--asr_train_config", str(folder / "config.yaml")]
    options += ["--asr_model_file", str(folder / "model.pth"), "--max_streams", "2"]
    with Served(*options, "--token_file", str(folder / "token")) as served:
        yield served


@pytest.fixture(scope="module")
def browser(folder, tmp_path_factory):
    with Page(
        tmp_path_factory.mktemp("browser"),
        "--use-fake-device-for-media-stream",
        "--use-fake-ui-for-media-stream",
        f"--use-file-for-fake-audio-capture={folder / 'speech.wav'}%noloop",
        "--autoplay-policy=no-user-gesture-required",
    ) as page:
        yield page


@pytest.fixture
def page(browser, server):
    """The page, opened anew, with the token."""
    browser.show(width=900, dark=False)
    browser.open(server.url)
    assert wait_until(lambda: "Hz" in text(browser, "#model"), PATIENCE)
    browser.evaluate(f"document.querySelector('#token').value = {TOKEN!r}")
    return browser


def text(page: Page, selector: str) -> str:
    return page.evaluate(f"document.querySelector({selector!r}).textContent")


def segments(page: Page) -> list[str]:
    return page.evaluate(
        "[...document.querySelectorAll('#segments li > span')].map(e => e.textContent)"
    )


def assert_quiet(page: Page, server: Served) -> None:
    """No message in the console, and no request but to the server."""
    assert page.complaints() == []
    assert {address.split("/")[2] for address in page.requests()} <= {
        server.url.split("/")[2],
        "",  # the icon, which is a data: address
    }


def test_a_recording_is_recognized(page, server, folder):
    page.choose("#file", folder / "speech.wav")
    assert wait_until(lambda: text(page, "#status") == "The stream has ended", PATIENCE)
    assert segments(page) == ["AB", "BA"]
    times = page.evaluate("document.querySelector('#segments time').textContent")
    assert times.startswith("0.00") and times.endswith(" s")
    assert text(page, "#latency").endswith(" ms") and text(page, "#audio").endswith(" s")
    assert text(page, "#held").endswith(" kB") and text(page, "#allocated").endswith(" kB")
    assert_quiet(page, server)


def test_a_microphone_is_recognized_while_it_runs(page, server):
    page.click("#microphone")
    assert wait_until(lambda: text(page, "#partial") != "", PATIENCE)
    assert text(page, "#status") == "Listening"
    assert wait_until(lambda: text(page, "#streams") == "1 of 2", PATIENCE)
    assert wait_until(lambda: text(page, "#partial").endswith("BA"), PATIENCE)
    assert len(segments(page)) == 1
    page.click("#stop")
    assert wait_until(lambda: text(page, "#status") == "The stream has ended", PATIENCE)
    # on a busy machine the browser's false microphone loses samples, which splits a tone
    assert [re.sub(r"(.)\1+", r"\1", found) for found in segments(page)] == ["AB", "BA"]
    assert wait_until(lambda: text(page, "#streams") == "0 of 2", PATIENCE)
    assert_quiet(page, server)


@pytest.mark.parametrize("rate", [16000, 44100, 48000])
def test_the_recorder_resamples(page, rate):
    """A tone below half the model's rate is kept, one above it is removed."""
    page.evaluate(f"({RECORD})({rate})")
    assert wait_until(lambda: page.evaluate("window.recorded !== undefined"), PATIENCE)
    recorded = page.evaluate("window.recorded")
    kept, removed = (np.array(recorded[hertz]) for hertz in ("1000", "11000"))
    assert len(kept) == pytest.approx(RATE // 2, abs=256)  # silence follows
    expected = np.sin(2 * np.pi * 1000 * np.arange(len(kept)) / RATE)
    inner = slice(100, RATE // 2 - 100)
    np.testing.assert_allclose(kept[inner], expected[inner], atol=2e-3)
    if rate > 22000:  # else there is no such tone
        assert np.abs(removed[inner]).max() < 2e-3


RECORD = """async (rate) => {
    const recorded = {};
    for (const hertz of [1000, 11000]) {
        const context = new OfflineAudioContext(1, rate / 2 + 256, rate);
        await context.audioWorklet.addModule("recorder.js");
        const tone = context.createBuffer(1, rate / 2, rate);
        tone.getChannelData(0).forEach((_, n, samples) => {
            samples[n] = Math.sin(2 * Math.PI * hertz * n / rate);
        });
        const source = new AudioBufferSourceNode(context, { buffer: tone });
        const options = { processorOptions: { rate: 16000 } };
        const recorder = new AudioWorkletNode(context, "recorder", options);
        source.connect(recorder).connect(context.destination);
        const pieces = [];
        const over = new Promise((resolve) => {
            recorder.port.onmessage = ({ data }) => data ? pieces.push(...data) : resolve();
        });
        source.start();
        await context.startRendering();
        recorder.port.postMessage("end");
        await over;
        recorded[hertz] = pieces;
    }
    window.recorded = recorded;
}"""


def test_what_goes_wrong_is_said(page, server, folder):
    page.evaluate("document.querySelector('#token').value = 'wrong'")
    page.choose("#file", folder / "speech.wav")
    assert wait_until(lambda: text(page, "#status") == "The token is wrong", PATIENCE)
    page.evaluate(f"document.querySelector('#token').value = {TOKEN!r}")
    page.choose("#file", folder / "token")
    assert wait_until(lambda: "cannot decode this file" in text(page, "#status"), PATIENCE)
    assert not page.evaluate("document.querySelector('#microphone').disabled")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_the_window_and_text_stands_out(browser, server, width, dark):
    browser.show(width=width, dark=dark)
    browser.open(server.url)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(CONTRAST) >= 4.5


CONTRAST = """(() => {
    const light = colour => {
        const [r, g, b] = colour.match(/[0-9.]+/g).map(v => v / 255)
            .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const style = (s, key) => getComputedStyle(document.querySelector(s))[key];
    const pairs = [['h1', 'body'], ['.muted', 'body'], ['#empty', 'section'],
        ['dt', '.numbers div'],
        ['#microphone', '#microphone'], ['section h2', 'section']];
    return Math.min(...pairs.map(([text, ground]) => {
        const [a, b] = [light(style(text, 'color')), light(style(ground, 'backgroundColor'))]
            .sort((x, y) => y - x);
        return (a + 0.05) / (b + 0.05);
    }));
})()"""


def test_pages_have_a_policy_against_other_hosts(server):
    import aiohttp

    async def policy() -> str:
        async with aiohttp.ClientSession() as session, session.get(server.url) as answer:
            return answer.headers["Content-Security-Policy"]

    assert "default-src 'none'" in asyncio.run(policy())
    assert asyncio.run(talk(f"{server.url}/?token={TOKEN}", "Done")).closed is None
    assert server.get("/server.py")[0] == 404
