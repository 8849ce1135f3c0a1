"""The page in the browser: what it answers, what it refuses, and what a visitor cannot read."""

from __future__ import annotations

import io
import shutil
import tempfile
import threading
from pathlib import Path

import pytest
import requests
import torch
from PIL import Image

import pc_clip
from pc_clip.core.errors import UserError
from pc_clip.demo import page
from pc_clip.demo.pictures import UPLOADS, Desk, Pictures

COLOURS = {"red.png": "red", "green.png": "green", "blue.png": "blue"}


def nothing(share: float, what: str) -> None:
    """A progress bar that nobody sees."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("pictures")
    for name, colour in COLOURS.items():
        Image.new("RGB", (64, 64), colour).save(made / name)
    return made


@pytest.fixture(scope="module")
def desk(folder) -> Desk:
    """The example as it is, and the same with another text tower in the place of a finetuned one."""
    models = {"before": pc_clip.load("example"), "finetuned": pc_clip.load("example")}
    with torch.no_grad():
        models["finetuned"].clip.model.text_projection.mul_(-1)
    return Desk(models, Pictures.of(str(folder)))


def test_pictures_are_ranked_by_both_models_and_embedded_once(desk, folder, monkeypatch):
    galleries, agreement, table = desk.rank("a red object", "a blue object", None, nothing)
    assert table.picture.tolist()[0] == "red.png"
    assert {name: len(shown) for name, shown in galleries.items()} == {"before": 3, "finetuned": 3}
    assert agreement == "The two models put 0 % of all pairs of these 3 pictures in the same order."
    torch.testing.assert_close(torch.tensor(table.before.values), -torch.tensor(table.finetuned.values))
    monkeypatch.setattr(pc_clip.Model, "embed_images", lambda *_: pytest.fail("embedded again"))
    desk.rank("a circle", "", None, nothing)


def test_dropped_pictures_are_ranked_in_place_of_the_folder(desk, folder):
    _, _, table = desk.rank("a green object", "", [str(folder / "green.png"), str(folder / "blue.png")], nothing)
    assert sorted(table.picture) == ["blue.png", "green.png"]


def test_two_pictures_are_compared_in_each_wording_and_its_mirror(desk, folder):
    first, second = str(folder / "red.png"), str(folder / "blue.png")
    rows = desk.compare(first, second, "The first image is red, the second is blue.\n\na red object")
    assert rows.wording.tolist() == ["as written"] * 2 + ["mirrored"] * 2 + ["as written"] * 2
    assert rows.sentence[2] == "The second image is red, the first is blue."
    expected = desk.models["before"].difference([first], [second], ["a red object"]).item()
    assert rows.score[4] == pytest.approx(expected, abs=1e-4)
    assert [bar.get_width() for bar in page.bars_of(rows).axes[0].patches[:3]] == rows.score[::2].tolist()


def test_a_picture_is_classified_plainly_and_with_comparisons(desk, folder):
    shares = desk.classify(str(folder / "red.png"), "red object\nblue object", "red object | blue object | warmer")
    assert list(shares) == [f"{name}{how}" for name in desk.models for how in ("", ", with comparisons")]
    assert next(iter(shares["before"])) == "red object"
    assert sum(shares["before"].values()) == pytest.approx(1, abs=1e-5)


def test_what_a_visitor_did_wrong_is_one_sentence(desk, folder, tmp_path):
    red, broken = str(folder / "red.png"), tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    for ask, message in [
        (lambda: desk.rank(" ", "", None, nothing), "write a sentence"),
        (lambda: desk.rank("a", "", [red] * (UPLOADS + 1), nothing), "201 pictures were dropped; at most"),
        (lambda: desk.rank("a", "", [str(broken)], nothing), "broken.png cannot be read as a picture"),
        (lambda: desk.compare(red, None, "a"), "give two pictures"),
        (lambda: desk.compare(red, red, "\n"), "between one and 20 sentences"),
        (lambda: desk.classify(None, "a\nb", ""), "give a picture"),
        (lambda: desk.classify(red, "a\na", ""), "at least two classes"),
        (lambda: desk.classify(red, "a\nb", "a | c | larger"), "'a | c | larger' is not a comparison"),
        (lambda: Pictures.of(str(tmp_path / "absent")), "absent"),
        (lambda: page.models_of("absent.pt"), "absent.pt"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            ask()
        assert str(tmp_path) not in str(error.value) or "absent" in message


@pytest.fixture(scope="module")
def address(desk):
    """Where the page is served."""
    gradio = pytest.importorskip("gradio", reason="the page needs gradio: pip install -r requirements-demo.txt")
    built = page.build(desk)
    _, url, _ = built.queue().launch(
        server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, max_file_size=page.MOST, footer_links=[]
    )
    yield url.rstrip("/")
    built.close()
    assert gradio and threading.active_count()


def test_no_file_outside_what_was_dropped_can_be_read_through_the_page(address, folder):
    (folder / "link.png").symlink_to("/etc/passwd")
    for path in ("/etc/passwd", str(folder / "red.png"), str(folder / "link.png"), "../../../../etc/passwd", __file__):
        for route in ("/gradio_api/file=", "/file="):
            answer = requests.get(f"{address}{route}{path}", timeout=30)
            assert answer.status_code in (400, 403, 404) and b"root:" not in answer.content, (route, path)
    large = io.BytesIO(bytes(21 << 20))
    answer = requests.post(f"{address}/gradio_api/upload", files={"files": ("large.png", large)}, timeout=60)
    assert answer.status_code == 413


@pytest.fixture
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for word in ("headless=new", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking"):
        options.add_argument(f"--{word}")
    options.add_argument(f"--user-data-dir={tempfile.mkdtemp()}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.chrome.service.Service(driver))
    yield browser
    browser.quit()


@pytest.mark.slow
def test_each_tab_is_used_as_a_person_would(address, browser, folder):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    def wait(until) -> None:
        WebDriverWait(browser, 60).until(lambda _: until())

    def open_tab(name: str) -> None:
        tabs = browser.find_elements(By.CSS_SELECTOR, "button[role=tab]")
        [tab for tab in tabs if tab.is_displayed() and tab.text.strip() == name][-1].click()

    def drop(*names: str) -> None:
        shown = [
            i
            for i in browser.find_elements(By.CSS_SELECTOR, "input[type=file]")
            if i.get_attribute("accept") == "image/*"
        ]
        for place, name in zip(shown[1:] if len(names) == 2 else shown[-1:], names):
            before = browser.page_source.count("/gradio_api/file=")
            place.send_keys(str(folder / name))
            wait(lambda before=before: browser.page_source.count("/gradio_api/file=") > before)

    browser.get(address)
    wait(lambda: browser.find_elements(By.ID, "go-rank"))
    browser.find_element(By.ID, "go-rank").send_keys(Keys.ENTER)  # by the keyboard alone
    wait(lambda: "of all pairs of these 3 pictures in the same order" in browser.page_source)
    open_tab("Compare two")
    browser.find_element(By.ID, "go-compare").click()
    wait(lambda: "give two pictures" in browser.page_source)
    drop("red.png", "blue.png")
    browser.find_element(By.ID, "go-compare").click()
    wait(lambda: "as written" in browser.page_source)
    open_tab("Classify")
    drop("red.png")
    browser.find_element(By.ID, "go-classify").click()
    wait(lambda: "%" in browser.find_element(By.TAG_NAME, "body").text)
    assert not [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]
