"""report.html: its numbers by hand, and the page in a real browser (headless Chromium)."""

import re
import shutil
import subprocess

import numpy as np
import pytest
from conftest import RESULT

from plumbing import page

STAGES = ("reach", "grasp", "transport", "place")
CHROMIUM = shutil.which("chromium")

# Runs after the page's own script. A title is what a dump of the page tells of a video.
CLICK = """<script>
document.querySelector('button[value="lost in transport"]').click();
for (const video of document.querySelectorAll("video"))
  video.onloadeddata = () => video.title = video.videoWidth + " wide";
</script>"""


def row(furthest: int) -> dict:
    """An episode that came to stage `furthest`; 4 is success."""
    return {"success_once": furthest == 4, "furthest_stage": furthest}


def test_an_episode_is_lost_in_the_stage_that_it_did_not_complete():
    found = [page.outcome_of(row(furthest), STAGES) for furthest in range(5)]
    lost = ["lost in reach", "lost in grasp", "lost in transport", "lost in place"]
    assert found == [*lost, "solved"]


def test_outcomes_are_counted_in_the_order_of_the_stages():
    rows = [row(2), row(0), row(4), row(0)]
    counts = page.count_outcomes(rows, STAGES)
    assert list(counts.items()) == [("solved", 1), ("lost in reach", 2), ("lost in transport", 1)]


def test_the_funnel_has_no_share_where_no_episode_came():
    result = {"stage_reach_rate": [0.5, 0.0, 0.0, 0.0], "stage_steps": [1.0, 2.0, 0.0, 0.0]}
    reach, grasp, transport, place = page.funnel_rows(result, STAGES).splitlines()
    shown = r">([0-9.]+ %|&ndash;|[0-9.]+)<"
    assert re.findall(shown, reach) == ["50.0 %", "50.0 %", "1.0"]
    assert re.findall(shown, grasp) == ["0.0 %", "0.0 %", "2.0"]
    assert re.findall(shown, transport) == ["0.0 %", "&ndash;", "0.0"]


def test_the_headline_names_the_conditions(tmp_path):
    path = tmp_path / "report.html"
    page.write_page(path, {**RESULT, "ood": "camera"}, {}, "table", [], tmp_path)
    assert "<h1>SFT, camera on PickCube-v1</h1>" in path.read_text()


def test_words_from_outside_are_text_and_no_html(tmp_path):
    path = tmp_path / "report.html"
    method = "<script>alert(1)</script>"
    result = {**RESULT, "method": method, "command": method, "commit": method}
    trained = {"command": method, "env_steps": method, "wall_s": method}
    page.write_page(path, result, trained, method, [], tmp_path)
    assert method not in path.read_text()
    assert path.read_text().count("&lt;script&gt;") == 8


def test_a_strangers_settings_may_say_nothing(tmp_path):
    path = tmp_path / "report.html"
    page.write_page(path, RESULT, {"command": None}, "table", [], tmp_path)
    assert "Trained by <code>None</code> (None env steps" in path.read_text()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A page with two films: a solved episode, and one that is lost in transport."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    frames = np.random.default_rng(0).integers(0, 255, (10, 64, 64, 3), dtype=np.uint8)
    page.write_page(path, RESULT, {}, "table", [list(frames), list(frames)], path.parent)
    return path


def browse(path, *flags: str) -> str:
    """Opens a file in Chromium without a network, and returns what it prints."""
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--host-rules=MAP * ~NOTFOUND",
    ]
    command += ["--virtual-time-budget=5000", *flags, path.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium (Debian: apt-get install chromium)")
def test_a_click_leaves_the_episodes_of_one_outcome_and_videos_play(written):
    clicked = written.with_name("clicked.html")
    clicked.write_text(written.read_text().replace("</body>", CLICK + "</body>"))
    dom = browse(clicked, "--dump-dom")
    hidden = re.findall(r'<(\w+) data-outcome="([^"]+)" hidden', dom)
    assert hidden == [("figure", "solved"), ("tr", "solved")]
    pressed = re.findall(r'<button value="([^"]+)" aria-pressed="true"', dom)
    assert pressed == ["lost in transport"]
    assert dom.count('title="64 wide"') == 2


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium (Debian: apt-get install chromium)")
def test_a_screenshot_shows_bars_and_films(written, tmp_path):
    from PIL import Image

    # The button that is pressed is as green as the bars.
    bare = written.with_name("bare.html")
    bare.write_text(written.read_text().replace("</style>", "button { display: none; }</style>"))
    picture = tmp_path / "page.png"
    browse(bare, f"--screenshot={picture}", "--window-size=1000,1200")
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    green = (np.abs(pixels - [34, 170, 119]).max(-1) < 3).sum()
    # Four bars of 320 x 19 pixels, filled by 100, 100, 50 and 50 %.
    assert abs(green / (3 * 320 * 19) - 1) < 0.05
    # The films are noise in colour. Nothing else on the page is.
    colourful = (pixels.max(-1) - pixels.min(-1) > 30).sum() - green
    assert colourful > 0.5 * 2 * 256 * 256
