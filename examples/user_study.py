#!/usr/bin/env python
"""Ask people which method's pictures are better: the paper's user study as one page without a server.

    python examples/user_study.py --evaluation evaluation --methods DTI TI CrossInit --questions 10 --output_dir study
    python examples/user_study.py --tally answers/*.json --key study/key.json --output_dir study

The first command draws questions from an output folder of evaluate.py and writes `study/page.html`, a self-contained file.
Send it to the participants, who open it in a browser. It asks "Which picture shows the subject of the reference pictures
best?" and "Which picture fits the text best?" equally often. Every question shows each method once, for the same prompt and
seed, in random order. The page does not name the methods: `study/key.json` has the assignment, so keep it to yourself. At
the end the page saves a small JSON file, which the participants send back.

The second command counts the votes and writes `results.md` and `results.json`: each method's share with a 95% interval over
participants. As in the paper (arXiv 2512.13672), sheets that always choose the same position are excluded. So are incomplete
sheets and duplicates.

Sections: 1 options, 2 questions, 3 page, 4 tally, 5 main.
"""

import argparse
import base64
import hashlib
import html
import io
import json
import sys
from pathlib import Path

import numpy as np
from evaluate import cell, interval
from export import UserError, make_parser, markdown_table, run, write_files
from generate import number as at_least
from pictures import open_picture
from PIL import Image


KINDS = ("subject", "text")
ASKED = {
    "subject": "Which picture shows the subject of the reference pictures best?",
    "text": "Which picture fits the text best?",
}


# ----------------------------------------------------------------------------------------------------------------------
# 1. Options
# ----------------------------------------------------------------------------------------------------------------------


# fmt: off
def command_line() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--output_dir", type=Path, required=True, help="Output folder for page and key, or for the results.")
    add("--evaluation", type=Path, help="Output folder of evaluate.py.")
    add("--methods", nargs="+", help="Methods to compare. Default: all methods of the evaluation.")
    add("--questions", type=at_least(int, 1), default=10, help="Number of questions of each of the two kinds.")
    add("--seed", type=at_least(int, 0), default=0, help="Seed of the questions and their order.")
    add("--tally", type=Path, nargs="+", metavar="JSON", help="Answer sheets to count.")
    add("--key", type=Path, help="key.json of the study. Default: the one in --output_dir.")
    return parser
# fmt: on


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The options, checked. Raises UserError."""
    args = command_line().parse_args(argv)
    if (args.evaluation is None) == (args.tally is None):
        raise UserError("Give either --evaluation, to make a study, or --tally, to count its answers.")
    if args.methods and len(set(args.methods)) < len(args.methods):
        raise UserError(f"--methods {' '.join(args.methods)}: a method is given twice.")
    return args


# ----------------------------------------------------------------------------------------------------------------------
# 2. Questions
# ----------------------------------------------------------------------------------------------------------------------


def read_json(option: str, path: Path) -> dict:
    """A JSON file that holds an object. Raises UserError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{option} {path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{option} {path} is not JSON ({error}): give the unchanged file.") from None
    if not isinstance(content, dict):
        raise UserError(f"{option} {path} is not of this study: it is not a JSON object.")
    return content


def read_evaluation(folder: Path) -> dict:
    """Read the report of evaluate.py. Raises UserError."""
    if not (folder / "evaluation.json").is_file():
        raise UserError(f"--evaluation {folder} has no evaluation.json: give the output folder of evaluate.py.")
    report = read_json("--evaluation", folder / "evaluation.json")
    if not {"records", "subjects"} <= set(report):
        raise UserError(f"--evaluation {folder}: its evaluation.json is not from evaluate.py.")
    return report


def choose_methods(report: dict, methods: list[str] | None) -> list[str]:
    """The methods to compare. Raises UserError."""
    there = list(dict.fromkeys(record["method"] for record in report["records"]))
    chosen = methods or there
    if unknown := [method for method in chosen if method not in there]:
        raise UserError(f"--methods {unknown[0]}: the evaluation has only {', '.join(there)}.")
    if len(chosen) < 2:
        raise UserError(f"--methods {' '.join(chosen)}: give at least two methods.")
    return chosen


def draw_questions(report: dict, methods: list[str], count: int, seed: int) -> list[dict]:
    """`count` questions of each kind, in their order on the page. Raises UserError if there are too few.

    A question is a subject, a prompt and a seed for which every method has a picture. Subjects take turns. No question is
    repeated within a kind, and the two kinds are mixed.
    """
    files = {}
    for record in report["records"]:
        key = (record["subject"], record["prompt"], record["seed"])
        files.setdefault(key, {})[record["method"]] = record["file"]
    usable = [key for key, by_method in files.items() if set(methods) <= set(by_method)]
    if len(usable) < count:
        raise UserError(
            f"--questions {count}: only {len(usable)} prompts and seeds have a picture of every method: ask for fewer."
        )
    rng = np.random.default_rng(seed)
    questions = []
    for kind in KINDS:
        for subject, prompt, number in take_turns(usable, count, rng):
            order = [methods[i] for i in rng.permutation(len(methods))]
            mine = files[subject, prompt, number]
            questions.append(
                {"kind": kind, "subject": subject, "prompt": prompt, "seed": number, "methods": order}
                | {"files": [mine[method] for method in order]}
            )
    questions = [questions[i] for i in rng.permutation(len(questions))]
    return [{"id": f"q{index:02d}"} | question for index, question in enumerate(questions, 1)]


def take_turns(keys: list[tuple], count: int, rng: np.random.Generator) -> list[tuple]:
    """`count` keys in random order, with their first parts (the subjects) distributed as evenly as possible."""
    piles = {}
    for index in rng.permutation(len(keys)):
        piles.setdefault(keys[index][0], []).append(keys[index])
    taken = []
    while len(taken) < count:
        taken += [pile.pop() for pile in piles.values() if pile]
    return taken[:count]


# ----------------------------------------------------------------------------------------------------------------------
# 3. Page
# ----------------------------------------------------------------------------------------------------------------------


def data_url(path: Path, side: int) -> tuple[str, bool]:
    """The picture within `side` pixels as a data URL, and whether it is small and should be enlarged without smoothing.

    It is encoded again, because its file's metadata may reveal the method.
    """
    picture = open_picture(path)
    picture.thumbnail((side, side), Image.LANCZOS)
    small = max(picture.size) <= 128
    picture.save(content := io.BytesIO(), **({"format": "png"} if small else {"format": "jpeg", "quality": 88}))
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}", small


def make_page(questions: list[dict], report: dict, folder: Path, study: str) -> str:
    """The page's HTML. It contains neither methods nor file names."""
    references, sections = {}, []
    for question in questions:
        subject = question["subject"]
        if question["kind"] == "subject" and subject not in references:
            urls = [data_url(folder / name, 256) for name in report["subjects"][subject]["references"][:5]]
            references[subject] = "".join(
                f'<img src="{url}" alt="Reference {i}"{pixelated(small)}>' for i, (url, small) in enumerate(urls, 1)
            )
    for number, question in enumerate(questions, 1):
        word = report["subjects"][question["subject"]]["class_word"]
        text = html.escape(question["prompt"].replace("{}", word))
        if question["kind"] == "subject":
            given = f'<div class="references" role="group" aria-label="Reference pictures">{references[question["subject"]]}</div>'
        else:
            given = f'<p class="text">“{text}”</p>'
        options = []
        for position, file in enumerate(question["files"]):
            url, small = data_url(folder / file, 512)
            letter = chr(ord("A") + position)
            options.append(
                f'<label class="option"><input type="radio" name="{question["id"]}" value="{position}">'
                f'<img src="{url}" alt="Picture {letter}"{pixelated(small)}>'
                f'<span class="letter" aria-hidden="true">{letter}</span></label>'
            )
        sections.append(
            f'<section data-id="{question["id"]}" hidden><fieldset><legend><span class="count">Question {number} of'
            f" {len(questions)}</span>{ASKED[question['kind']]}</legend>{given}"
            f'<div class="options">{"".join(options)}</div></fieldset></section>'
        )
    return PAGE.replace("%STUDY%", study).replace("%SECTIONS%", "\n".join(sections))


def pixelated(small: bool) -> str:
    return ' class="pixels"' if small else ""


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Which picture is better?</title>
<style>
:root { color-scheme: light dark; --back: #f6f5f1; --card: #fff; --ink: #1d1d1f; --soft: #5f6068; --line: #d9d7cf;
  --accent: #1f5fbf; --on: #fff; }
@media (prefers-color-scheme: dark) { :root { --back: #17181b; --card: #222428; --ink: #f0f0ee; --soft: #a9abb3;
  --line: #3a3d44; --accent: #7fb0ff; --on: #10131a; } }
* { box-sizing: border-box; }
[hidden] { display: none !important; }
body { margin: 0; background: var(--back); color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1rem 1rem 6.5rem; }
header { position: sticky; top: 0; background: var(--back); padding: .75rem 1rem; z-index: 1; }
progress { display: block; width: 100%; max-width: 58rem; margin: 0 auto; height: .5rem; accent-color: var(--accent); }
h1:focus { outline: none; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 1.5rem 0 .75rem; }
fieldset { border: 0; margin: 0; padding: 0; min-width: 0; }
legend { font-size: 1.35rem; font-weight: 650; line-height: 1.3; padding: 0; margin-bottom: .75rem; }
.count { display: block; font-size: .85rem; font-weight: 400; color: var(--soft); }
.text { margin: 0 0 1.25rem; padding: .9rem 1.1rem; background: var(--card); border-left: 4px solid var(--accent);
  border-radius: .4rem; font-size: 1.2rem; }
.references { display: flex; gap: .5rem; margin-bottom: 1.25rem; padding: .6rem; background: var(--card);
  border-radius: .6rem; overflow-x: auto; }
.references img { height: 7rem; border-radius: .35rem; }
.options { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 10.5rem), 1fr)); gap: 1rem; }
.option { position: relative; display: block; cursor: pointer; background: var(--card); border: 3px solid var(--line);
  border-radius: .8rem; padding: .4rem; }
.option img { display: block; width: 100%; border-radius: .45rem; }
.option input { position: absolute; opacity: 0; inset: 0; width: 100%; height: 100%; margin: 0; cursor: pointer; }
.option:hover { border-color: var(--soft); }
.option:has(input:checked) { border-color: var(--accent); box-shadow: 0 0 0 2px var(--accent); }
.option:has(input:focus-visible) { outline: 3px solid var(--ink); outline-offset: 3px; }
.letter { position: absolute; top: .9rem; left: .9rem; width: 2rem; height: 2rem; border-radius: 50%; display: grid;
  place-items: center; background: var(--card); color: var(--ink); font-weight: 650; box-shadow: 0 1px 4px #0006; }
.option:has(input:checked) .letter { background: var(--accent); color: var(--on); }
.pixels { image-rendering: pixelated; }
.references img.pixels { width: 7rem; }
nav { position: fixed; bottom: 0; left: 0; right: 0; background: var(--card); border-top: 1px solid var(--line); }
nav div { max-width: 60rem; margin: 0 auto; padding: .75rem 1rem; display: flex; gap: .75rem; align-items: center; }
nav .hint { flex: 1; color: var(--soft); font-size: .85rem; text-align: center; }
button { font: inherit; font-weight: 600; padding: .65rem 1.4rem; border-radius: .6rem; border: 1px solid var(--line);
  background: var(--card); color: var(--ink); cursor: pointer; min-height: 2.9rem; }
button.main { background: var(--accent); color: var(--on); border-color: var(--accent); }
button:disabled { opacity: .45; cursor: default; }
button:focus-visible { outline: 3px solid var(--ink); outline-offset: 2px; }
textarea { width: 100%; height: 9rem; font: .8rem/1.4 ui-monospace, monospace; border-radius: .4rem; }
@media (max-width: 30rem) { .options { grid-template-columns: repeat(2, 1fr); gap: .6rem; } nav .hint { display: none; }
  nav div { justify-content: space-between; } .references img { height: 5rem; } .references img.pixels { width: 5rem; } }
</style>
</head>
<body>
<header><progress id="progress" value="0" aria-label="Questions answered"></progress></header>
<main>
<section id="start">
<h1>Which picture is better?</h1>
<p>You will see <strong id="total"></strong> questions. Each shows some pictures, and you choose one. Sometimes the question
is about a subject that you see in reference pictures, sometimes about a text. There are no right answers; go by your
first impression, and where two seem equal, take the one you like better.</p>
<p>By keyboard: <kbd>A</kbd>, <kbd>B</kbd> ... or <kbd>1</kbd>, <kbd>2</kbd> ... choose, <kbd>Enter</kbd> goes on,
<kbd>←</kbd> and <kbd>→</kbd> leaf through. Nothing is sent anywhere: at the end you save a small file yourself.</p>
</section>
%SECTIONS%
<section id="end" hidden>
<h1 tabindex="-1">Thank you!</h1>
<p>Save your answers, and send the file to the person who gave you this page.</p>
<p><button type="button" class="main" id="save">Save my answers</button> <span id="saved" role="status"></span></p>
<details><summary>No file appears?</summary><p>Then copy this text into your message instead.</p>
<textarea id="copy" readonly aria-label="Your answers as text"></textarea></details>
<p><button type="button" id="again">Start anew for another person</button></p>
</section>
</main>
<nav aria-label="Questions"><div><button type="button" id="back">Back</button>
<span class="hint" id="hint" role="status"></span><button type="button" class="main" id="next">Start</button></div></nav>
<script>
"use strict";
const study = "%STUDY%";
const pages = [...document.querySelectorAll("main > section")];
const questions = pages.filter(page => page.dataset.id);
const by = id => document.getElementById(id);
const fresh = () => ({ participant: crypto.getRandomValues(new Uint32Array(2)).join("-"), at: 0, answers: {} });
// After an accidental close the page continues where it was, if the browser allows storage.
const memory = { key: "study-" + study,
  read() { try { return JSON.parse(localStorage.getItem(this.key)); } catch { return null; } },
  write() { try { localStorage.setItem(this.key, JSON.stringify(state)); } catch { } } };
let state = memory.read() || fresh();

function sheet() {
  return { study, participant: state.participant, answers: state.answers };
}
function show(at, focus = true) {
  state.at = Math.max(0, Math.min(at, pages.length - 1));
  memory.write();
  pages.forEach((page, index) => { page.hidden = index !== state.at; });
  refresh();
  scrollTo(0, 0);
  const target = pages[state.at].querySelector("input:checked, input, h1[tabindex]");
  if (focus && target) target.focus({ preventScroll: true });
}
function refresh() {
  const page = pages[state.at], id = page.dataset.id;
  by("progress").max = questions.length;
  by("progress").value = Object.keys(state.answers).length;
  by("total").textContent = questions.length;
  by("back").hidden = state.at === 0;
  by("next").hidden = page.id === "end";
  by("next").disabled = Boolean(id) && !(id in state.answers);
  by("next").textContent = page.id === "start" ? "Start" : state.at === questions.length ? "Finish" : "Next";
  by("hint").textContent = id && !(id in state.answers) ? "Choose a picture" : "";
  by("copy").value = JSON.stringify(sheet());
}
function go(step) {
  if (step > 0 && (by("next").disabled || by("next").hidden)) return;
  show(state.at + step);
}
for (const question of questions) {
  const id = question.dataset.id;
  for (const input of question.querySelectorAll("input")) {
    input.checked = state.answers[id] === Number(input.value);
    input.addEventListener("change", () => { state.answers[id] = Number(input.value); memory.write(); refresh(); });
  }
}
by("next").addEventListener("click", () => go(1));
by("back").addEventListener("click", () => go(-1));
by("save").addEventListener("click", () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(sheet(), null, 1)], { type: "application/json" }));
  link.download = "answers-" + state.participant + ".json";
  link.click();
  by("saved").textContent = "Saved as " + link.download;
});
by("again").addEventListener("click", () => {
  state = fresh();
  document.querySelectorAll("main input").forEach(input => { input.checked = false; });
  by("saved").textContent = "";
  show(0);
});
document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.target.matches("textarea, summary")) return;
  const inputs = [...pages[state.at].querySelectorAll("input")];
  const key = event.key.toLowerCase();
  const chosen = /^[1-9]$/.test(key) ? Number(key) - 1 : /^[a-z]$/.test(key) ? key.charCodeAt(0) - 97 : -1;
  if (inputs[chosen]) { inputs[chosen].click(); inputs[chosen].focus(); event.preventDefault(); }
  else if (key === "enter" && !event.target.matches("button")) { go(1); event.preventDefault(); }
  else if (key === "arrowright") { go(1); event.preventDefault(); }
  else if (key === "arrowleft") { go(-1); event.preventDefault(); }
});
show(state.at, false);
</script>
</body>
</html>
"""


def make_study(args: argparse.Namespace) -> Path:
    """Write page.html and key.json. Returns the page's path. Raises UserError."""
    page, key = args.output_dir / "page.html", args.output_dir / "key.json"
    if there := [path for path in (page, key) if path.exists()]:
        raise UserError(f"{there[0]} exists, and answers may need its key: choose another --output_dir.")
    report = read_evaluation(args.evaluation)
    methods = choose_methods(report, args.methods)
    questions = draw_questions(report, methods, args.questions, args.seed)
    study = hashlib.sha256(json.dumps(questions).encode()).hexdigest()[:12]
    text = make_page(questions, report, args.evaluation, study)
    content = {"study": study, "methods": methods, "seed": args.seed, "questions": questions}
    write_files({page: text.encode(), key: (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()})
    return page


# ----------------------------------------------------------------------------------------------------------------------
# 4. Tally
# ----------------------------------------------------------------------------------------------------------------------


def read_key(path: Path) -> dict:
    key = read_json("--key", path)
    if not {"study", "methods", "questions"} <= set(key):
        raise UserError(f"--key {path} is not a key.json of a study.")
    return key


def check_sheet(sheet: dict, key: dict, path: Path) -> dict[str, int]:
    """The sheet's answers: positions by question. Raises UserError if it is damaged or of another study."""
    if sheet.get("study") != key["study"]:
        raise UserError(
            f"--tally {path} and the key are of different studies: leave it out, or give its own key by --key."
        )
    answers, sizes = sheet.get("answers"), {q["id"]: len(q["methods"]) for q in key["questions"]}
    if not isinstance(answers, dict) or not isinstance(sheet.get("participant"), str):
        raise UserError(f"--tally {path} is damaged: it has no answers or no participant.")
    for name, position in answers.items():
        if name not in sizes or type(position) is not int or not 0 <= position < sizes[name]:
            raise UserError(f"--tally {path} is damaged: its answer {name!r} is {position!r}.")
    return answers


def left_out(answers: dict[str, int], key: dict) -> str | None:
    """Why a sheet is excluded; None if it counts."""
    if len(answers) < len(key["questions"]):
        return f"incomplete: {len(answers)} of {len(key['questions'])} questions"
    # A preference for one method does not lead to this: its position is random in each question.
    if len(set(answers.values())) == 1 and len(answers) > 2:
        return f"always picture {chr(ord('A') + next(iter(answers.values())))}"
    return None


def count_votes(answers: dict[str, int], key: dict) -> dict[str, dict[str, int]]:
    """A participant's votes, by kind of question and method."""
    votes = {kind: dict.fromkeys(key["methods"], 0) for kind in KINDS}
    for question in key["questions"]:
        votes[question["kind"]][question["methods"][answers[question["id"]]]] += 1
    return votes


def tally(paths: list[Path], key: dict) -> dict:
    """Count answer sheets.

    Returns:
        `participants`, `left_out` (file and reason), and by kind of question and method `votes` and `share`: the mean
        over participants of their share of votes, with a 95% interval (Student's t, clipped to 0 and 1).

    Raises:
        UserError: for a file that is not a sheet of this study.
    """
    counted, excluded, seen = [], [], set()
    for path in paths:
        sheet = read_json("--tally", path)
        answers = check_sheet(sheet, key, path)
        twin = "a second copy of a participant's sheet" if sheet["participant"] in seen else None
        if reason := left_out(answers, key) or twin:
            excluded.append({"file": path.name, "reason": reason})
            continue
        seen.add(sheet["participant"])
        counted.append(count_votes(answers, key))
    result = {"participants": len(counted), "left_out": excluded}
    for kind in KINDS if counted else ():
        shares = {m: [votes[kind][m] / sum(votes[kind].values()) for votes in counted] for m in key["methods"]}
        result[kind] = {
            method: {"votes": sum(votes[kind][method] for votes in counted), "share": within_one(interval(values))}
            for method, values in shares.items()
        }
    return result


def within_one(value: dict) -> dict:
    """The interval of a share, clipped to 0 and 1."""
    if value["low"] is None:
        return value
    return value | {"low": max(0.0, value["low"]), "high": min(1.0, value["high"])}


def to_markdown(result: dict, key: dict) -> str:
    """The results as Markdown."""
    count = result["participants"]
    parts = [
        "# User study",
        f"{count} participant{'' if count == 1 else 's'}, {len(key['questions']) // len(KINDS)} questions of each kind."
        " Shares of votes with 95% intervals over participants.",
    ]
    if count:
        rows = []
        for method in key["methods"]:
            row = [method]
            for kind in KINDS:
                share = result[kind][method]["share"]
                bounds = f" [{share['low']:.3f}, {share['high']:.3f}]" if share["low"] is not None else ""
                row += [f"{cell({'mean': share['mean']})}{bounds}", str(result[kind][method]["votes"])]
            rows.append(row)
        parts.append(markdown_table(["method", "subject", "votes", "text", "votes"], rows))
    if result["left_out"]:
        parts.append(markdown_table(["left out", "why"], [[x["file"], x["reason"]] for x in result["left_out"]]))
    return "\n\n".join(parts) + "\n"


# ----------------------------------------------------------------------------------------------------------------------
# 5. Main
# ----------------------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.evaluation is not None:
        page = make_study(args)
        print(f"{page} ({page.stat().st_size / 2**20:.1f} MB) is for the participants. Keep key.json to yourself.")
        return
    key = read_key(args.key or args.output_dir / "key.json")
    result = tally(args.tally, key)
    text = to_markdown(result, key)
    content = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    write_files({args.output_dir / "results.md": text.encode(), args.output_dir / "results.json": content.encode()})
    print(text)
    if not result["participants"]:
        print("No sheet counts.", file=sys.stderr)


if __name__ == "__main__":
    run(main)
