"""examples/user_study.py: a blind page drawn from a seed, driven in a browser where there is one, and the tally by hand."""

import base64
import io
import json
import re
import shutil
import sys
import time
from collections import Counter

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image, PngImagePlugin


sys.path.append(str(ROOT / "examples" / "miniature"))

import user_study  # noqa: E402
import world  # noqa: E402
from export import UserError, run  # noqa: E402


METHODS = ("Directional-xyz", "Plain-xyz", "Crossed-xyz")
PROMPTS = ("a {} on <grass>", "a {} & a dog", "the {} at night")


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    """What evaluate.py leaves, of two subjects, three methods, three prompts and two seeds."""
    folder = tmp_path_factory.mktemp("evaluation")
    records, count = [], 0
    subjects = {name: {"class_word": "star", "references": []} for name in ("zebra_star", "other")}
    for subject, entry in subjects.items():
        for index in range(3):
            entry["references"].append(f"references/{subject}/{index}.png")
        for method in METHODS:
            for number, prompt in enumerate(PROMPTS):
                for seed in (0, 1):
                    file = f"pictures/{subject}/{method}/{number:02d}-{seed}.png"
                    records.append(
                        {"subject": subject, "method": method, "prompt": prompt, "seed": seed, "file": file}
                    )
    files = [r["file"] for r in records] + [f for s in subjects.values() for f in s["references"]]
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        info = PngImagePlugin.PngInfo()
        info.add_text("comment", f"made by {file}")
        Image.fromarray(world.picture_array(count)[1]).save(folder / file, pnginfo=info)
        count += 1
    report = {"subjects": subjects, "records": records}
    (folder / "evaluation.json").write_text(json.dumps(report))
    return folder


@pytest.fixture
def study(evaluation, tmp_path):
    """A study with six questions of each kind, and its key."""
    user_study.main(["--evaluation", str(evaluation), "--questions", "6", "--output_dir", str(tmp_path / "study")])
    return tmp_path / "study", json.loads((tmp_path / "study" / "key.json").read_text())


def write_sheets(folder, key, choices: list[dict]) -> list[str]:
    """An answer sheet for each dictionary, from question to method or position."""
    paths = []
    for number, chosen in enumerate(choices):
        answers = {
            q["id"]: q["methods"].index(chosen[q["id"]]) if isinstance(chosen[q["id"]], str) else chosen[q["id"]]
            for q in key["questions"]
            if q["id"] in chosen
        }
        path = folder / f"sheet-{number}.json"
        path.write_text(json.dumps({"study": key["study"], "participant": f"p{number}", "answers": answers}))
        paths.append(str(path))
    return paths


# Questions and page


def test_the_page_is_blind(study):
    folder, key = study
    page = (folder / "page.html").read_text(encoding="utf-8")
    words = re.sub(r"base64,[A-Za-z0-9+/=]+", "", page)
    for name in (*METHODS, "xyz", "pictures/", "zebra_star", "seed"):
        assert name not in words
    for picture in re.findall(r"base64,([A-Za-z0-9+/=]+)", page):
        content = base64.b64decode(picture)
        assert b"xyz" not in content and b"made by" not in content  # nothing of the file's own metadata
    assert not re.search(r'(src|href)="(?!data:)', words) and "http" not in words  # it needs nothing from elsewhere
    assert set(key["methods"]) == set(METHODS)


def test_every_question_shows_each_method_once_for_one_prompt_and_seed(study, evaluation):
    _, key = study
    for kind in user_study.KINDS:
        mine = [q for q in key["questions"] if q["kind"] == kind]
        assert len(mine) == 6 == len({(q["subject"], q["prompt"], q["seed"]) for q in mine})
        assert Counter(q["subject"] for q in mine) == {"zebra_star": 3, "other": 3}  # subjects take turns
    report = json.loads((evaluation / "evaluation.json").read_text())
    by_file = {r["file"]: r for r in report["records"]}
    for question in key["questions"]:
        assert sorted(question["methods"]) == sorted(METHODS)
        for method, file in zip(question["methods"], question["files"], strict=True):
            record = by_file[file]
            assert record["method"] == method
            assert all(record[name] == question[name] for name in ("subject", "prompt", "seed"))
    assert len({tuple(q["methods"]) for q in key["questions"]}) > 2  # the order changes


def test_pictures_stand_in_the_keys_order(study, evaluation):
    folder, key = study
    sections = re.findall(r'<section data-id="(q\d+)".*?</section>', (folder / "page.html").read_text(), re.S)
    assert sections == [q["id"] for q in key["questions"]]
    bodies = re.findall(r'<section data-id="q\d+".*?</section>', (folder / "page.html").read_text(), re.S)
    for question, body in zip(key["questions"], bodies, strict=True):
        shown = re.findall(r'value="(\d)"><img src="data:image/png;base64,([^"]+)"', body)
        assert [position for position, _ in shown] == ["0", "1", "2"]
        for (_, data), file in zip(shown, question["files"], strict=True):
            pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
            assert np.array_equal(pixels, np.asarray(Image.open(evaluation / file)))
        if question["kind"] == "text":  # with the class word, and safe in HTML
            assert question["prompt"] not in body and "a star" in body.replace("the star", "a star")
            assert "<grass>" not in body and "& a" not in body


def test_the_seed_decides(evaluation):
    report = json.loads((evaluation / "evaluation.json").read_text())
    draw = [user_study.draw_questions(report, list(METHODS), 4, seed) for seed in (3, 3, 4)]
    assert draw[0] == draw[1] != draw[2]


# Tally


def test_shares_and_intervals_by_hand(study, capsys):
    folder, key = study
    texts = [q["id"] for q in key["questions"] if q["kind"] == "text"]
    first = {q["id"]: METHODS[0] for q in key["questions"]}  # always the first method, wherever it stands
    mixed = first | dict.fromkeys(texts[:2], METHODS[1]) | {texts[2]: METHODS[2]}
    other = first | dict.fromkeys(texts[:3], METHODS[1])
    sheets = write_sheets(folder, key, [first, mixed, other])
    user_study.main(["--tally", *sheets, "--output_dir", str(folder)])
    result = json.loads((folder / "results.json").read_text())
    assert result["participants"] == 3 and result["left_out"] == []
    assert result["subject"][METHODS[0]] == {"votes": 18, "share": {"mean": 1, "low": 1, "high": 1, "n": 3}}
    text = result["text"]
    assert [text[m]["votes"] for m in METHODS] == [6 + 3 + 3, 0 + 2 + 3, 1]
    assert [text[m]["share"]["mean"] for m in METHODS] == pytest.approx([12 / 18, 5 / 18, 1 / 18])
    # Shares 1, 1/2, 1/2: mean 2/3, deviation sqrt(1/12), half-width 4.3027 sqrt(1/36), cut off at 1.
    assert text[METHODS[0]]["share"]["low"] == pytest.approx(max(0, 2 / 3 - 4.3027 / 6), abs=1e-3)
    assert text[METHODS[0]]["share"]["high"] == 1
    # Shares 0, 1/3, 1/2.
    half = 4.3027 * np.std([0, 1 / 3, 1 / 2], ddof=1) / 3**0.5
    assert text[METHODS[1]]["share"]["high"] == pytest.approx(5 / 18 + half, abs=1e-3)
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(f"| {METHODS[1]} "))
    assert row.split(" | ")[2] == "0" and "| 0.278 [0.000, " in row and row.endswith("| 5 |")


def test_uniform_incomplete_and_repeated_sheets_are_left_out(study):
    folder, key = study
    good = {q["id"]: METHODS[0] for q in key["questions"]}
    uniform = {q["id"]: 1 for q in key["questions"]}
    incomplete = {q["id"]: METHODS[2] for q in key["questions"][:-1]}
    sheets = write_sheets(folder, key, [good, uniform, incomplete])
    shutil.copy(sheets[0], folder / "sheet-again.json")
    user_study.main(["--tally", *sheets, str(folder / "sheet-again.json"), "--output_dir", str(folder)])
    result = json.loads((folder / "results.json").read_text())
    assert result["participants"] == 1 and result["text"][METHODS[0]]["votes"] == 6
    assert {x["file"]: x["reason"] for x in result["left_out"]} == {
        "sheet-1.json": "always picture B",
        "sheet-2.json": "incomplete: 11 of 12 questions",
        "sheet-again.json": "a second copy of a participant's sheet",
    }
    assert "always picture B" in (folder / "results.md").read_text()


# Bad input


def test_bad_input_ends_in_one_message(study, evaluation, tmp_path):
    folder, key = study
    sheet = {"study": key["study"], "participant": "p", "answers": {"q01": 0}}

    def refused(message, *argv, **changes):
        if changes:
            (tmp_path / "bad.json").write_text(json.dumps(sheet | changes))
        with pytest.raises(UserError, match=message):
            user_study.main([str(word) for word in argv])

    make = ("--evaluation", evaluation, "--output_dir", tmp_path / "new")
    refused("either --evaluation", "--output_dir", tmp_path)
    refused("no evaluation.json", "--evaluation", tmp_path, "--output_dir", tmp_path / "new")
    refused("has only", *make, "--methods", "DTI", METHODS[0])
    refused("two methods", *make, "--methods", METHODS[0])
    refused("given twice", *make, "--methods", METHODS[0], METHODS[0])
    refused("--questions 50: only 12", *make, "--questions", 50)
    assert not (tmp_path / "new").exists()
    refused("page.html exists", "--evaluation", evaluation, "--output_dir", folder)

    count = ("--tally", tmp_path / "bad.json", "--output_dir", folder)
    refused("cannot be read", "--tally", tmp_path / "none.json", "--output_dir", folder)
    refused("key.json cannot be read", "--tally", tmp_path / "bad.json", "--output_dir", tmp_path)
    refused("of different studies", *count, study="0")
    refused("damaged", *count, answers={"q01": 3})
    refused("damaged", *count, answers={"q99": 0})
    refused("damaged", *count, answers=[1, 2])
    refused("damaged", *count, answers={"q01": True})
    (tmp_path / "bad.json").write_text("{")
    refused("is not JSON", *count)


def test_the_script_shows_one_line_and_a_status(tmp_path, monkeypatch):
    argv = ["examples/user_study.py", "--evaluation", str(tmp_path), "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit, match="^user_study.py: error: --evaluation .* has no evaluation.json[^\n]*$"):
        run(user_study.main)


# In a browser


@pytest.fixture
def browser(tmp_path):
    """Chromium without a window, as wide as a phone; files are saved to tmp_path / "downloads"."""
    driver, program = shutil.which("chromedriver"), shutil.which("chromium") or shutil.which("google-chrome")
    try:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service
    except ImportError:
        pytest.skip("needs `pip install selenium` and Debian's packages chromium and chromium-driver")
    if not (driver and program):
        pytest.skip("needs a browser: install Debian's packages chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    (tmp_path / "downloads").mkdir()
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path / "downloads")})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    window = webdriver.Chrome(options=options, service=Service(driver))
    size = {"width": 375, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    window.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    yield window
    window.quit()


def downloaded(folder):
    """The file that the browser saves, once it is whole."""
    for _ in range(100):
        if files := list(folder.glob("answers-*.json")):
            return files[0]
        time.sleep(0.1)
    pytest.fail("nothing was saved")


def test_answers_travel_from_the_page_to_the_tally(study, browser, tmp_path):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    folder, key = study

    def press(keys):
        ActionChains(browser).send_keys(keys).perform()

    def current():
        return browser.find_element(By.CSS_SELECTOR, "main > section:not([hidden])")

    def button(name):
        return browser.find_element(By.ID, name)

    browser.get((folder / "page.html").as_uri())
    assert button("total").text == "12" and not button("back").is_displayed()
    button("next").click()
    for number, question in enumerate(key["questions"]):
        section = current()
        assert section.get_attribute("data-id") == question["id"]
        assert user_study.ASKED[question["kind"]] in section.find_element(By.TAG_NAME, "legend").text
        shown = section.text if question["kind"] == "text" else ""
        assert (question["prompt"].replace("{}", "star") in shown) == (question["kind"] == "text")
        assert len(section.find_elements(By.CSS_SELECTOR, ".references img")) == 3 * (question["kind"] == "subject")
        for image in section.find_elements(By.TAG_NAME, "img"):
            assert image.get_attribute("alt") and image.get_property("naturalWidth") == 64
        assert not button("next").is_enabled()  # not before there is an answer
        position = question["methods"].index(METHODS[number % 2])
        if number < 6:
            press("abc"[position] if number % 3 else str(position + 1))
            assert button("next").is_enabled()
            press(Keys.ENTER)
        else:
            section.find_elements(By.CSS_SELECTOR, ".option")[position].click()
            button("next").click()
        assert button("progress").get_property("value") == number + 1
    wide = browser.execute_script("return document.documentElement.scrollWidth")
    assert wide <= 375  # nothing sticks out on a phone

    # A page that was closed goes on where it was, and an answer can be changed.
    browser.refresh()
    assert current().get_attribute("id") == "end"
    press(Keys.ARROW_LEFT)
    last = key["questions"][-1]
    checked = current().find_element(By.CSS_SELECTOR, "input:checked")
    assert int(checked.get_attribute("value")) == last["methods"].index(METHODS[1])
    press("abc"[last["methods"].index(METHODS[2])])
    press(Keys.ENTER)

    button("save").click()
    saved = downloaded(tmp_path / "downloads")
    user_study.main(["--tally", str(saved), "--output_dir", str(folder)])
    result = json.loads((folder / "results.json").read_text())
    expected = Counter((q["kind"], METHODS[i % 2]) for i, q in enumerate(key["questions"]))
    expected[last["kind"], METHODS[1]] -= 1
    expected[last["kind"], METHODS[2]] += 1
    assert {(k, m): result[k][m]["votes"] for k in user_study.KINDS for m in METHODS} == {
        (k, m): expected[k, m] for k in user_study.KINDS for m in METHODS
    }
    assert button("copy").get_attribute("value") == json.dumps(
        json.loads(saved.read_text()), separators=(",", ":"), ensure_ascii=False
    )

    # Another person at the same machine is another participant, with no answers.
    button("again").click()
    assert current().get_attribute("id") == "start" and button("progress").get_property("value") == 0
    assert json.loads(saved.read_text())["participant"] not in button("copy").get_attribute("value")
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
