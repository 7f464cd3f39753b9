"""examples/app.py: the whole way in a browser where there is one, from photographs to pictures between two words."""

import io
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_user_study import browser  # noqa: F401


sys.path.append(str(ROOT / "examples" / "miniature"))

import app  # noqa: E402
import world  # noqa: E402
from export import Embedding, UserError, read_embedding, write_embedding  # noqa: E402
from generate import generate, load_embedding, load_pipeline  # noqa: E402


SCRIPT, MODEL = ROOT / "examples" / "app.py", ROOT / "examples" / "miniature" / "sdxl"
QUICK = ["--num_inference_steps", "4", "--train_batch_size", "1", "--crops_per_image", "1", "--seed", "0"]
QUICK += ["--validation_inference_steps", "2", "--device", "cpu"]
STEPS = 80


def wait_for(found, what: str, seconds: float = 300):
    """What `found` returns, as soon as that is something."""
    for _ in range(int(seconds / 0.2)):
        if result := found():
            return result
        time.sleep(0.2)
    pytest.fail(f"not within {seconds} seconds: {what}")


@pytest.fixture
def photographs(tmp_path):
    """The files of three pictures of the miniature's fish."""
    (tmp_path / "photos").mkdir()
    for index, picture in enumerate(world.instance_pictures(world.CONCEPTS["clown_fish"], 3, "beach")):
        picture.save(tmp_path / "photos" / f"{index}.png")
    return sorted(str(path) for path in (tmp_path / "photos").iterdir())


@pytest.fixture
def served(tmp_path):
    """The page's address and the folder of its runs, in which another word lies that was learned before."""
    pytest.importorskip("gradio", "6")
    widths = {x: json.loads((MODEL / x / "config.json").read_text())["hidden_size"] for x in app.ENCODERS["sdxl"]}
    generator = torch.Generator().manual_seed(1)
    vectors = {name: torch.randn(2, width, generator=generator) / width**0.5 for name, width in widths.items()}
    write_embedding(Embedding("<other>", vectors), tmp_path / "runs" / "words" / "other")
    argv = [sys.executable, str(SCRIPT), "--output_dir", str(tmp_path / "runs"), *QUICK]
    # What could make the page public is set, and has no effect.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GRADIO_SERVER_NAME": "0.0.0.0", "GRADIO_SHARE": "True"}
    log = tmp_path / "app.log"
    with log.open("wb") as file:
        process = subprocess.Popen(argv, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: "in a browser" in log.read_text() or process.poll() is not None, "the page")
        assert process.poll() is None, log.read_text()
        yield re.search(r"Open (http://127\.0\.0\.1:\d+/)", log.read_text())[1], tmp_path / "runs"
        assert "Traceback" not in log.read_text(), log.read_text()
    finally:
        process.terminate()
        process.wait(60)


# Without a browser


def test_without_gradio_it_says_what_to_install(tmp_path):
    (tmp_path / "gradio.py").write_text("raise ImportError")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, str(SCRIPT)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == 'app.py: error: The page needs gradio 6 or newer: pip install "gradio>=6"'
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "app-runs").exists()


def refuse_to_start(*argv: str):
    with pytest.raises((UserError, SystemExit)) as error:
        app.parse_args(list(argv))
    return error.value


def test_options_are_checked_at_the_start(small, monkeypatch, capsys):
    monkeypatch.setattr(app, "gr", type("gradio", (), {"__version__": "6.0"}))
    args = app.parse_args([])
    assert args.script.__name__ == "train_dti_sdxl" and "--resolution=64" in args.further
    args = app.parse_args(["--pretrained_model_name_or_path", str(small / "sana"), "--preset", "fast"])
    assert args.script.__name__ == "train_dti_sana" and args.training.preset == "fast"
    assert "a whole pipeline" in str(refuse_to_start("--pretrained_model_name_or_path", str(small / "photos")))
    assert "hide new words" in str(refuse_to_start("--enable_sequential_cpu_offload"))
    assert refuse_to_start("--no_such_option").code == 2
    assert "--no_such_option" in capsys.readouterr().err
    monkeypatch.setattr(app, "gr", None)
    assert "pip install" in str(refuse_to_start())


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    monkeypatch.setattr(app, "gr", type("gradio", (), {"__version__": "6.0"}))
    trainer = app.Trainer(app.parse_args(["--output_dir", str(tmp_path / "runs"), *QUICK]))
    yield trainer
    trainer.close()


def test_a_training_that_the_script_refuses_shows_the_scripts_message(trainer, photographs):
    name = trainer.start(photographs, "fish", "fish", "20", "", "a {}")
    with pytest.raises(UserError, match="is being trained"):
        trainer.start(photographs, "<my-fish>", "fish", "20", "", "a {}")
    trainer.process.wait(300)
    text, share = trainer.status(name)
    assert text.startswith("Error: --placeholder_token 'fish'") and "is in the vocabulary" in text
    assert share is None and not trainer.resumable(name) and trainer.learned() == []
    with pytest.raises(UserError, match="no new word yet"):
        trainer.start(photographs, "", "fish", "20", "", "a {}")
    with pytest.raises(UserError, match="Two photographs have the name 0.png"):
        trainer.start([*photographs, photographs[0]], "<my-fish>", "fish", "20", "", "a {}")


@pytest.mark.slow
def test_the_end_of_the_page_leaves_a_training_that_can_be_resumed(trainer, photographs):
    name = trainer.start(photographs, "<my-fish>", "fish", "100000", "2", "a {}")
    wait_for(lambda: trainer.entries(trainer.words / name)[1], "a checkpoint")
    trainer.close()
    assert trainer.process.returncode == 143 and trainer.resumable(name)
    step, entries = trainer.entries(trainer.words / name)
    assert trainer.status(name)[0] == f"Stopped after step {step} of 100000. Resume goes on from there."
    assert entries[-1]["step"] <= step and entries[-1]["loss"] > 0
    with pytest.raises(UserError, match="is there already"):
        trainer.start(photographs, "<my-fish>", "fish", "20", "2", "a {}")


# In a browser


class Page:
    """The page as a person sees it: fields by their labels, buttons by their texts."""

    def __init__(self, window, url: str):
        from selenium.webdriver.common.by import By

        self.window, self.css, self.xpath = window, By.CSS_SELECTOR, By.XPATH
        window.get(url)

    def resize(self, width: int, height: int = 900):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.window.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def visible(self, xpath: str):
        """The first element that is shown, once there is one."""

        def look():
            return next((x for x in self.window.find_elements(self.xpath, xpath) if x.is_displayed()), None)

        return wait_for(look, xpath)

    def field(self, label: str):
        inputs = "*[self::input[not(@type='range')] or self::textarea]"
        title = f"//span[@data-testid='block-info'][contains(normalize-space(), '{label}')]"
        return self.visible(f"{title}/ancestor::*[.//{inputs}][1]//{inputs}")

    def write(self, label: str, text: str):
        from selenium.webdriver.common.keys import Keys

        field = self.field(label)
        field.send_keys(Keys.CONTROL + "a")
        field.send_keys(text + Keys.TAB)

    def press(self, text: str, kind: str = "button"):
        self.visible(f"//{kind}[normalize-space()='{text}'][not(@disabled)]").click()

    def choose(self, label: str, option: str):
        self.field(label).click()
        self.visible(f"//*[@role='option'][contains(., '{option}')]").click()

    def status(self) -> str:
        shown = [x.text for x in self.window.find_elements(self.css, "[role=status]") if x.is_displayed()]
        return shown[0] if shown else ""

    def wait_for_status(self, beginning: str) -> str:
        return wait_for(lambda: self.status().startswith(beginning) and self.status(), beginning)

    def pictures(self, gallery: str) -> list[np.ndarray]:
        images = self.window.find_elements(self.css, f"#{gallery} button img")
        sources = [image.get_attribute("src") for image in images if image.is_displayed()]
        contents = [urllib.request.urlopen(source).read() for source in sources]
        return [np.asarray(Image.open(io.BytesIO(content)).convert("RGB")) for content in contents]

    def fits(self) -> bool:
        return self.window.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")

    def screenshot(self, name: str) -> None:
        """Into the folder in DTI_SCREENSHOTS, to be looked at."""
        if folder := os.environ.get("DTI_SCREENSHOTS"):
            self.window.save_screenshot(f"{folder}/{name}.png")


@pytest.mark.slow
def test_the_whole_way(served, browser, photographs):  # noqa: F811
    from selenium.webdriver.common.action_chains import ActionChains

    url, runs = served
    with pytest.raises(ConnectionRefusedError):  # it would be accepted if the page were served to the network
        socket.create_connection(("127.0.0.2", int(url[:-1].rpartition(":")[2])), timeout=5)
    page, run = Page(browser, url), runs / "words" / "my-fish"
    page.resize(1280)

    # Photographs and a word.
    page.press("Example: a fish")
    wait_for(lambda: page.field("New word").get_attribute("value") == "<clown-fish>", "the example's word")
    wait_for(lambda: len(page.pictures("looks")) == 5, "the example's photographs")
    page.visible("//button[@aria-label='Clear']").click()
    browser.find_element(page.css, "#photographs input[type=file]").send_keys("\n".join(photographs))
    wait_for(lambda: len(page.pictures("looks")) == 3, "the photographs")
    values = {"New word": "<my-fish>", "Class word": "fish", "Steps": str(STEPS), "Vectors": "2"}
    for label, text in values.items():
        page.write(label, text)
    page.screenshot("1-filled-in")

    # Training: progress, a validation picture, stop; a new page finds it; resume, finish.
    page.press("Start training")
    wait_for(lambda: re.match("Training: step [1-9]", page.status()), "a step")
    page.press("Stop")
    page.wait_for_status("Stopped after step")
    stopped = int(page.status().split()[3])
    assert 0 < stopped < STEPS and (run / f"checkpoint-{stopped}").is_dir()
    assert not (run / "learned_embeds.safetensors").exists()
    assert len(wait_for(lambda: page.pictures("validation"), "the validation picture")) >= 1
    browser.refresh()
    page.wait_for_status(f"Stopped after step {stopped}")
    page.press("Resume")
    page.wait_for_status(f"Finished after {STEPS} steps")
    log = (run / "log.txt").read_text(encoding="utf-8")
    assert f" {stopped}/{STEPS} [" in log and f" 0/{STEPS} [" not in log
    assert len(read_embedding(run)) == 2
    shown = [path.name for path in app.validation_pictures(run)]
    wait_for(lambda: len(page.pictures("validation")) == len(shown) > 2, "all validation pictures")
    plots = [x for x in browser.find_elements(page.css, "#curves canvas, #curves svg.marks") if x.is_displayed()]
    assert len(plots) == len(app.CURVES) and all(plot.size["width"] > 200 for plot in plots)
    page.screenshot("2-trained")
    page.write("New word", "<my-fish>")  # the fields are empty since the reload
    page.press("Start training")
    assert "is there already" in page.visible("//*[contains(@class, 'toast-body')]").text
    page.screenshot("3-refused")
    page.visible("//button[contains(@class, 'toast-close')]").click()

    # Pictures: the page draws what generate.py draws.
    page.press("Draw", "button[@role='tab']")
    page.choose("Learned word", "my-fish")
    page.write("Prompt", "a photo of a <my-fish> on the grass")
    page.write("Pictures", "1")
    page.press("Draw", "button[not(@role='tab')]")
    page.wait_for_status("1 of 1 pictures")
    (first,) = page.pictures("pictures")
    pipe = load_pipeline(str(MODEL))
    load_embedding(pipe, read_embedding(run))
    prompts, options = ["a photo of a <my-fish> on the grass"], {"steps": 4, "guidance_scale": 5.0}
    ((_, _, expected),) = generate(pipe, prompts, [0], **options)
    assert np.abs(first.astype(int) - np.asarray(expected).astype(int)).max() <= 1

    # Between two words: the middle is another picture, and the slider's left end is the first word's.
    page.choose("Second word", "other")
    slider = page.visible("//input[@type='range'][contains(@aria-label, 'From the first word')]")
    page.press("Draw", "button[not(@role='tab')]")
    middle = wait_for(lambda: [x for x in page.pictures("pictures") if not np.array_equal(x, first)], "the middle")
    page.screenshot("4-drawn")
    left = -slider.size["width"] // 2
    ActionChains(browser).move_to_element(slider).click_and_hold().move_by_offset(left, 0).release().perform()
    wait_for(lambda: [x for x in page.pictures("pictures") if np.array_equal(x, first)], "the first word again")
    assert np.abs(middle[0].astype(int) - first).mean() > 1

    # On a telephone nothing sticks out. Nothing came from elsewhere, and nothing failed.
    page.resize(400)
    assert page.fits()
    page.screenshot("5-drawn-400")
    page.press("Train", "button[@role='tab']")
    page.visible("//button[normalize-space()='Start training']")
    assert page.fits()
    page.screenshot("6-trained-400")
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [name for name in loaded if not name.startswith((url, "data:", "blob:"))] == []
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
