"""Claims about the gateway's web page, in a real Chromium without a screen.

Skipped, with the reason, only where there is no Chromium: Debian's package `chromium`, or `playwright install chromium`.
"""

from __future__ import annotations

import re
import shutil
import wave
from pathlib import Path

import pytest

pytest.importorskip("av", reason="the gateway extra is not installed: make .venv/gateway")
sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: make .venv/test")
from gateways import NOBODY, one_more_cancelled, running_gateway, scripted_server  # noqa: E402
from playwright.sync_api import expect  # noqa: E402

from barkstream.voices import list_voices  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
CSS = (ROOT / "clients/gateway/page/page.css").read_text()
TEXT = "Good morning, how are you today?"
LONG_TEXT = "And so it went on and on, all through the day and the night. " * 20
RATE = 24_000  # Hz
PATIENCE_MS = 60_000  # the machine may be busy
DESKTOP, PHONE = {"width": 1024, "height": 900}, {"width": 320, "height": 640}


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
        found = [path for path in map(shutil.which, names) if path]
        if Path(playwright.chromium.executable_path).exists():
            found.append(playwright.chromium.executable_path)
        if not found:
            pytest.skip("no Chromium: `apt install chromium` or `playwright install chromium`")
        with playwright.chromium.launch(executable_path=found[0]) as browser:
            yield browser


@pytest.fixture(scope="module")
def url(server, repository):
    with running_gateway(url=server.grpc_url, repository=repository) as url:
        yield url


@pytest.fixture(scope="module")
def url_alone(tmp_path_factory):
    """A gateway whose speech server is not there."""
    with running_gateway(url=NOBODY, repository=tmp_path_factory.mktemp("empty")) as url:
        yield url


@pytest.fixture
def open_page(browser):
    """Opens a page; at the end no script may have failed, and nothing may have been asked of another site."""
    pages, wrong = [], []

    def open_page(url, size=DESKTOP, **options):
        page = browser.new_page(viewport=size, **options)
        page.set_default_timeout(PATIENCE_MS)
        page.on("pageerror", lambda error: wrong.append(error))
        page.on("request", lambda asked: asked.url.startswith((url, "blob:", "data:")) or wrong.append(asked.url))
        page.goto(url)
        page.evaluate("import(new URL('page/page.js', location)).then((module) => { window.now = module.now; })")
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert wrong == []


def fill(page, text=TEXT, **fields) -> None:
    page.get_by_label("Text").fill(text)
    for label, value in fields.items():
        page.get_by_label(label.capitalize()).fill(str(value))
    page.get_by_label("Voice").select_option("heart_0")


def wait_for(page, condition: str) -> None:
    """Until a JavaScript expression holds. The page's policy forbids the `eval` of Playwright's wait_for_function."""
    page.evaluate(f"async () => {{ while (!({condition})) await new Promise(requestAnimationFrame); }}")


def press(page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


# --- the player, on a clock that stands still between two steps -----------------------------------------------------


def render(page, pushes: list[tuple[float, int]], seconds: float) -> dict:
    """What a Player makes of pushes (at seconds, samples) of a 440 Hz tone: its state, and the audio that came out."""
    return page.evaluate(
        """async ([pushes, seconds, rate]) => {
            const { Player } = await import(new URL("page/player.js", location));
            const context = new OfflineAudioContext(1, seconds * rate, rate);
            const player = new Player(context);
            let n = 0;
            const push = (length) => {
                const samples = Float32Array.from({ length }, (_, i) => Math.sin((n + i) * 2 * Math.PI * 440 / rate));
                n += length;
                player.push(samples);
                if (n === pushes.reduce((sum, [, length]) => sum + length, 0)) player.end();
            };
            for (const [at, length] of pushes) {
                if (at === 0) push(length);
                else context.suspend(at).then(() => { push(length); context.resume(); });
            }
            const audio = await context.startRendering();
            await player.finished;
            const { scheduled, nUnderruns } = player;
            return { scheduled, nUnderruns, audio: Array.from(audio.getChannelData(0)) };
        }""",
        [pushes, seconds, RATE],
    )


def test_chunks_that_arrive_in_time_play_as_the_whole(open_page, url_alone):
    page = open_page(url_alone)
    played = render(page, [(0, 7681), (0.2, 4097), (0.4, 333), (0.4096, 12_001)], 2)
    assert played["nUnderruns"] == 0
    first = played["scheduled"][0]["frame"]
    n_samples = sum(chunk["length"] for chunk in played["scheduled"])
    whole = render(page, [(0, n_samples)], 2)
    assert n_samples == 7681 + 4097 + 333 + 12_001
    assert played["audio"][first : first + n_samples] == whole["audio"][first : first + n_samples]
    assert max(map(abs, played["audio"][first + n_samples :])) == 0


def test_playback_waits_for_a_small_buffer_and_for_a_larger_one_after_it_ran_dry(open_page, url_alone):
    tenth = RATE // 10
    pushes = [(0, tenth), (0.0512, tenth), (0.512, tenth), (0.64, tenth), (0.7168, tenth), (0.768, tenth)]
    played = render(open_page(url_alone), pushes, 2)
    assert played["nUnderruns"] == 1
    starts = [chunk["frame"] / RATE for chunk in played["scheduled"]]
    assert starts[0] == pytest.approx(0.0512 + 0.02, abs=0.01)  # .15 s were there
    assert starts[2] == pytest.approx(0.7168 + 0.02, abs=0.01)  # .3 s were there
    assert starts[1] - starts[0] == pytest.approx(0.1)
    assert starts[5] - starts[2] == pytest.approx(0.3)


# --- speech ---------------------------------------------------------------------------------------------------------


def test_speech_arrives_plays_without_a_gap_and_is_kept(open_page, url, tmp_path):
    page = open_page(url)
    fill(page, seed=3)
    press(page, "Speak")
    expect(page.get_by_role("status")).to_contain_text("of speech", timeout=PATIENCE_MS)
    scheduled, n_underruns, n_samples = page.evaluate(
        "[now.player.scheduled, now.player.nUnderruns, now.speech.nSamples]"
    )
    assert len(scheduled) >= 3
    assert sum(chunk["length"] for chunk in scheduled) == n_samples > RATE
    ends = [chunk["frame"] + chunk["length"] for chunk in scheduled]
    gaps = [b["frame"] - end for end, b in zip(ends, scheduled[1:], strict=False)]
    assert min(gaps) == 0
    assert sum(gap > 0 for gap in gaps) <= n_underruns  # silence only where the server was late, and it is counted
    assert re.fullmatch(r"\d+ ms", page.locator("#ttfa").inner_text())
    assert float(page.locator("#rtf").inner_text()) > 0
    assert page.locator("#used-seed").inner_text() == "3"
    assert is_drawn(page)

    with page.expect_download() as downloading:
        page.get_by_role("button", name=f"Download: {TEXT}").click()
    downloading.value.save_as(tmp_path / "speech.wav")
    with wave.open(str(tmp_path / "speech.wav")) as file:
        assert (file.getframerate(), file.getnframes()) == (RATE, n_samples)

    page.get_by_label("Text").fill("Something else.")
    page.get_by_role("button", name=f"Use again: {TEXT}").click()
    assert page.get_by_label("Text").input_value() == TEXT
    page.get_by_role("button", name=f"Play: {TEXT}").click()
    wait_for(page, "now.player.playedS > 0.2")
    press(page, "Stop")
    expect(page.get_by_role("status")).to_have_text("Stopped.")
    assert page.get_by_role("listitem").count() == 1


def is_drawn(page) -> bool:
    return page.evaluate(
        """() => {
            const canvas = document.getElementById("waveform");
            const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
            return pixels.some((value) => value > 0);
        }"""
    )


def test_it_is_heard_while_it_is_made_and_stop_cancels_on_the_server(open_page, url, server):
    page = open_page(url)
    fill(page, LONG_TEXT)
    with one_more_cancelled(server):
        press(page, "Speak")
        wait_for(page, "now.player.playedS > 0.3")  # and there is a minute of it to come
        press(page, "Stop")
        expect(page.get_by_role("status")).to_have_text("Stopped.")
    assert page.evaluate("now.player.sources.size") == 0
    expect(page.get_by_role("listitem")).to_contain_text("cut short")


def test_the_keyboard_is_enough(open_page, url, server):
    page = open_page(url)
    order = []
    for _ in range(5):
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.id"))
    assert order == ["text", "voice", "seed", "temperature", "speak"]
    fill(page, LONG_TEXT)
    with one_more_cancelled(server):
        page.get_by_label("Text").press("Control+Enter")
        wait_for(page, "now.speech?.nSamples > 0")
        page.keyboard.press("Escape")
        expect(page.get_by_role("status")).to_have_text("Stopped.")


# --- what goes wrong ------------------------------------------------------------------------------------------------


def test_an_error_is_shown_in_the_servers_words(open_page, url):
    page = open_page(url)
    fill(page)
    page.evaluate("document.getElementById('voice').selectedOptions[0].value = 'hart_0'")
    press(page, "Speak")
    expect(page.get_by_role("alert")).to_contain_text("did you mean 'heart_0'")
    expect(page.get_by_role("button", name="Stop", exact=True)).to_be_disabled()


def test_a_server_that_is_not_ready_is_said(open_page, url_alone):
    page = open_page(url_alone)
    press(page, "Speak")
    expect(page.get_by_role("alert")).to_contain_text("not ready")


def test_speech_that_breaks_off_is_said_and_what_came_is_kept(open_page):
    with scripted_server("INTERNAL: bark_fine failed") as speech_server, running_gateway(url=speech_server) as url:
        page = open_page(url)
        press(page, "Speak")
        expect(page.get_by_role("alert")).to_have_text("The speech broke off.")
        expect(page.get_by_role("status")).to_have_text("Broke off after 1.0 s of speech.")
        expect(page.get_by_role("listitem")).to_contain_text("cut short")


def test_with_keys_the_page_asks_for_one(open_page, repository):
    with running_gateway(repository=repository, api_keys=("secret",)) as url:
        page = open_page(url)
        expect(page.get_by_role("alert")).to_contain_text("API key")
        page.get_by_label("API key").fill("secret")
        page.get_by_label("API key").press("Tab")
        expect(page.get_by_label("Voice").locator("option")).to_have_count(
            1 + len(list_voices(repository / "bark/1/voices"))
        )
        expect(page.get_by_role("alert")).to_be_hidden()


# --- for everybody --------------------------------------------------------------------------------------------------


def test_it_fits_a_small_phone_and_a_finger(open_page, url_alone):
    page = open_page(url_alone, PHONE, has_touch=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    for control in page.locator("button:visible, input:visible, select:visible").all():
        assert control.bounding_box()["height"] >= 40


def colours(scheme: str) -> dict[str, str]:
    return dict(re.findall(r"--([\w-]+): (#\w{6})", CSS.split("prefers-color-scheme: dark")[scheme == "dark"]))


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2)."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    dark, light = sorted([luminance(first), luminance(second)])
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_controls_have_contrast(scheme):
    colour = colours(scheme)
    for text in ("ink", "faint", "error"):
        assert contrast(colour[text], colour["card"]) >= 4.5
        assert contrast(colour[text], colour["paper"]) >= 4.5
    assert contrast(colour["on-accent"], colour["accent"]) >= 4.5
    assert contrast(colour["edge"], colour["card"]) >= 3
    for drawn in ("accent", "ahead"):
        assert contrast(colour[drawn], colour["paper"]) >= 3
