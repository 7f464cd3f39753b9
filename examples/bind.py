#!/usr/bin/env python
"""Draw two learned words in one prompt, and count whose attributes arrive where they belong and whose leak to the other.

    python examples/bind.py --pairs clown_fish+chess_flower clown_fish+blueprint --output_dir binding \
      --embeddings "TI=reproduction/runs/{}/TI-0" "DTI=reproduction/runs/{}/DTI-0"

This is a measurement in the miniature world, where classifiers read a picture's attributes. A pair is two of its concepts:
two subjects, or a subject and a style. {} in a path is the concept's name, as in the folders that reproduce.py writes. A
repeated name gives further runs of a method, which are averaged.

Two subjects are drawn in prompts of this world's grammar, "a {0} left of a small {1}", each of the two once as the large
object and once as the small one. An attribute *arrives* if its own object has it. It *leaks* if the object has the other
subject's instead, where the two differ; a colour that both have is no leak. The classifiers read all attributes of the large
object, and shape and colour of the small one. The world's small objects are plain: either of a subject's two colours is right for
one. Its pattern and eyes are read in an enlarged crop, and only the table by attribute has them. A subject and a style are
drawn in "a picture in the style of a {1} of a {0}".

Every method is drawn in three forms: the learned words alone, each with its class word after it, and with the small object
or the style in words. Reference rows, which are not trained, have the class words, and both described in words. The report
also says how far the classifiers can be trusted, by rendered scenes of the same prompts: as they should be, and with the two
swapped.

Written to --output_dir: `report.md`, `report.json` with a record for each picture, `sheet.png`, and `pictures`. A repeated run
keeps the pictures that were made with the same settings.

Sections: 1 options, 2 prompts, 3 words, 4 pictures, 5 reading and counting, 6 rendered scenes, 7 report, 8 main.
"""

import argparse
import itertools
import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from evaluate import (
    MINIATURE,
    SUBJECT_ATTRIBUTES,
    Prompt,
    cell,
    check_output_dir,
    folder_name,
    interval,
    load_classifiers,
    miniature,
    named_path,
    prompt_lines,
    subject_attributes,
)
from export import Embedding, make_parser, markdown_table, read_embedding, renamed, run, write_files
from generate import (
    add_model_options,
    check_model_fits,
    choose_device,
    choose_dtype,
    configured_as,
    contact_sheet,
    digest,
    draw_missing,
    fill_prompt,
    sampling_settings,
    settle_options,
    start_pipeline,
    to_png,
)
from generate import number as at_least
from pictures import open_picture
from PIL import Image


world = miniature("world")


# ----------------------------------------------------------------------------------------------------------------------
# 1. Options
# ----------------------------------------------------------------------------------------------------------------------


def named_template(text: str) -> tuple[str, str]:
    """Parse NAME=PATH, where {} in the path stands for the concept."""
    name, path = named_path(text)
    if "{}" not in str(path):
        raise argparse.ArgumentTypeError(f"{text!r} has no {{}} for the concept, such as {name}=runs/{{}}/{name}-0")
    return name, str(path)


def concept_pair(text: str) -> tuple[str, str]:
    """Parse SUBJECT+SUBJECT or SUBJECT+STYLE."""
    names = text.split("+")
    if len(names) != 2 or names[0] == names[1]:
        raise argparse.ArgumentTypeError(f"{text!r} is not two concepts, such as clown_fish+zebra_star")
    for name in names:
        if not subject_attributes(name):
            raise argparse.ArgumentTypeError(f"{name!r} is none of the world's concepts: {', '.join(world.CONCEPTS)}")
    if is_style(names[0]):
        raise argparse.ArgumentTypeError(f"{text!r} has no subject before the style: write clown_fish+{names[0]}")
    return names[0], names[1]


# fmt: off
def command_line() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add_model_options(parser, model_required=False)
    parser.set_defaults(pretrained_model_name_or_path=str(MINIATURE / "sdxl"), batch_size=8, scheduler="paper", negative_prompt=None, overwrite=True)
    add("--output_dir", type=Path, required=True, help="Output folder. A repeated run continues in it.")
    add("--pairs", type=concept_pair, nargs="+", required=True, metavar="A+B", help="Two subjects, or a subject and a style: concepts of the miniature world.")
    add("--embeddings", type=named_template, nargs="+", required=True, metavar="NAME=PATH", help="Methods and their embeddings, with {} for the concept.")
    add("--forms", choices=[*FORMS], nargs="+", default=[*FORMS], help="How the learned words are written: alone, each before its class word, or with the second one in words. Default: all.")
    add("--seeds", type=at_least(int, 0), nargs="+", default=[0], help="Seeds: one picture per prompt and seed. Default: 0.")
    add("--classifiers", type=Path, default=MINIATURE / "classifiers", help="Folder with the world's attribute classifiers.")
    return parser
# fmt: on


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The options, checked. Raises UserError."""
    args = command_line().parse_args(argv)
    args.pairs, args.forms, args.seeds = ([*dict.fromkeys(x)] for x in (args.pairs, args.forms, args.seeds))
    args.device = choose_device(args)
    return args


# ----------------------------------------------------------------------------------------------------------------------
# 2. Prompts, in the words of the world's captions, with what they state besides the two concepts
# ----------------------------------------------------------------------------------------------------------------------

# {0} is the large object, {1} the small one. Captions call the second object small wherever they have one.
TWO_SUBJECTS = prompt_lines(
    """
    a photo of a {0} left of a small {1}: style=photo relation=left
    a photo of a {0} right of a small {1} in the snow: style=photo place=snow relation=right
    in the forest, a {0} left of a small {1}: place=forest relation=left
    a {0}, right of a small {1}, on the beach: place=beach relation=right
    a {0} above a small {1} on grass: place=grass relation=above
    at night, a {0} below a small {1}: place=night relation=below
    a small {1} left of a {0} in the mountains: place=mountains relation=right
    a small {1} above a {0} in the water: place=water relation=below
    a pencil sketch of a {0} left of a small {1}: style=sketch relation=left
    pixel art of a {0} right of a small {1}: style=pixel art relation=right
    """,
    "subjects",
)
# {0} is the subject, {1} the style.
IN_A_STYLE = prompt_lines(
    """
    a picture in the style of a {1} of a {0} on grass: place=grass
    a picture in the style of a {1} of a {0} in the snow: place=snow
    a picture in the style of a {1} of a {0} on the beach: place=beach
    a picture in the style of a {1} of a {0} in front of a brick wall: place=brick
    a picture in the style of a {1} of a {0} wearing a red hat: prop=hat prop_colour=red
    a {0} in the mountains in the style of a {1}: place=mountains
    a {0} in the forest in the style of a {1}: place=forest
    a {0} at night in the style of a {1}: place=night
    a {0} holding a blue balloon in the style of a {1}: prop=balloon prop_colour=blue
    a {0} left of a small red square in the style of a {1}: other_shape=square other_colour=red relation=left
    """,
    "style",
)


def is_style(concept: str) -> bool:
    return "style" in subject_attributes(concept)


def orders(pair: tuple[str, str]) -> list[tuple[str, str]]:
    """The pair as {0} and {1}: two subjects in both orders, for each is once the large and once the small object."""
    return [pair] if is_style(pair[1]) else [pair, pair[::-1]]


def prompts_of(order: tuple[str, str]) -> list[Prompt]:
    return IN_A_STYLE if is_style(order[1]) else TWO_SUBJECTS


# ----------------------------------------------------------------------------------------------------------------------
# 3. Words: how a row of the report writes the two concepts
# ----------------------------------------------------------------------------------------------------------------------

FORMS = {  # how the first and the second concept are written, and what the report calls it
    "alone": (("token",), ("token",), ""),
    "class": (("token", "initializer"), ("token", "initializer"), ", class words after"),
    "words": (("token",), ("description",), ", the second in words"),
}
UNTRAINED = {  # reference rows
    "class words": (("initializer",), ("initializer",)),
    "described in words": (("description",), ("description",)),
}


@dataclass(frozen=True)
class Row:
    """A row of the report.

    Attributes:
        parts: what {0} and {1} are made of: "token", or an attribute of the concept.
        runs: index of each run of the method; empty where nothing is learned.
    """

    name: str
    parts: tuple[tuple[str, ...], tuple[str, ...]]
    runs: tuple[int, ...] = ()

    def learned(self, order: tuple[str, str]) -> list[str]:
        """The concepts that stand in the prompt as learned words."""
        return [concept for concept, parts in zip(order, self.parts, strict=True) if "token" in parts]

    def prompt(self, prompt: Prompt, order: tuple[str, str], index: int | None) -> str:
        """The prompt with the two concepts in words, the learned ones as the tokens of the run."""
        words = []
        for name, parts in zip(order, self.parts, strict=True):
            concept = concept_of(name)
            words.append(" ".join(token_of(name, index) if p == "token" else getattr(concept, p) for p in parts))
        return re.sub(r"\ba (?=[aeiou])", "an ", fill_prompt(prompt.text, words))


def concept_of(name: str):
    return world.CONCEPTS.get(name) or world.compose_concept(int(name.removeprefix("composed_")))


def token_of(concept: str, index: int) -> str:
    """Methods and runs share a concept's token in their files, so each gets one of its own."""
    return f"<{concept}-{index}>"


def rows_of(args: argparse.Namespace) -> list[Row]:
    names = [name for name, _ in args.embeddings]
    runs = {name: tuple(i for i, other in enumerate(names) if other == name) for name in dict.fromkeys(names)}
    rows = [
        Row(name + said, (first, second), runs[name])
        for name in runs
        for first, second, said in (FORMS[form] for form in args.forms)
    ]
    return rows + [Row(name, parts) for name, parts in UNTRAINED.items()]


def read_embeddings(args: argparse.Namespace) -> dict[tuple[str, int], Embedding]:
    """The embeddings by concept and index of --embeddings, checked against the model.

    Also fills `args` with the model family's defaults. Raises UserError.
    """
    model = configured_as(args.pretrained_model_name_or_path, args.single_file_config)
    sources, embeddings = [], {}
    for concept in dict.fromkeys(itertools.chain(*args.pairs)):
        for index, (_, path) in enumerate(args.embeddings):
            sources.append(Path(path.replace("{}", concept)))
            embeddings[concept, index] = renamed(read_embedding(sources[-1]), token_of(concept, index))
    family, _ = check_model_fits(model, args.revision, sources, list(embeddings.values()))
    settle_options(args, family)
    args.dtype = str(choose_dtype(args.dtype, family, args.device)).removeprefix("torch.")
    return embeddings


# ----------------------------------------------------------------------------------------------------------------------
# 4. Pictures
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawing:
    """A picture to draw: a row's prompt for a pair in this order. `run` is None where nothing is learned."""

    row: Row
    order: tuple[str, str]
    prompt: Prompt
    run: int | None
    seed: int
    path: Path


def drawings_of(args: argparse.Namespace) -> list[Drawing]:
    found = []
    for pair, row in itertools.product(args.pairs, rows_of(args)):
        for order, index, seed in itertools.product(orders(pair), row.runs or (None,), args.seeds):
            folder = args.output_dir / "pictures" / "+".join(order) / folder_name(row.name)
            for number, prompt in enumerate(prompts_of(order)):
                name = f"{number:02d}-{seed}.png" if index is None else f"{number:02d}-{seed}-run-{index}.png"
                found.append(Drawing(row, order, prompt, index, seed, folder / name))
    return found


def draw(drawings: list[Drawing], embeddings: dict[tuple[str, int], Embedding], args: argparse.Namespace) -> int:
    """Draw the pictures that are missing or were made with other settings. Returns how many. Raises UserError."""
    dtype = getattr(torch, args.dtype)
    settings, jobs, told = sampling_settings(args, dtype, []), {}, {}
    for x in drawings:
        used = {concept: digest(embeddings[concept, x.run]) for concept in x.row.learned(x.order)}
        told[x.path] = x.row.prompt(x.prompt, x.order, x.run)
        jobs[x.path] = (told[x.path], x.seed, settings | {"embeddings": used})
    return draw_missing(
        lambda: start_pipeline(args, dtype, args.device, list(embeddings.values()), []), jobs, args, told
    )


# ----------------------------------------------------------------------------------------------------------------------
# 5. Reading a picture, and counting what arrived and what leaked
# ----------------------------------------------------------------------------------------------------------------------

# The label of each attribute of {0} and {1}.
LARGE = {name: name for name in SUBJECT_ATTRIBUTES}
SMALL = {"shape": "other_shape", "colour": "other_colour", "pattern": "other_pattern", "eyes": "other_eyes"}
STYLE = {"style": "style", "tone": "tone"}
# Where the world puts the small object, by the large one's position relative to it.
SMALL_AT = {"left": (51, 44), "right": (13, 44), "above": (32, 46), "below": (32, 18)}
CROP = 12  # pixels from there to the crop's edges, so that the large object is outside


def enlarged(picture: Image.Image, relation: str) -> Image.Image:
    """The small object at twice its size, alone: the classifiers then take it for the subject."""
    x, y = SMALL_AT[relation]
    padded = np.pad(np.asarray(picture.convert("RGB")), ((CROP, CROP), (CROP, CROP), (0, 0)), mode="edge")
    crop = Image.fromarray(padded[y : y + 2 * CROP, x : x + 2 * CROP]).resize((4 * CROP, 4 * CROP), Image.BICUBIC)
    rim = (world.SIZE - 4 * CROP) // 2
    return Image.fromarray(np.pad(np.asarray(crop), ((rim, rim), (rim, rim), (0, 0)), mode="edge"))


def read_labels(classifiers, pictures: list[Image.Image], prompts: list[Prompt]) -> list[dict[str, str]]:
    """Labels of each picture, in prompts with a small object also its `other_pattern` and `other_eyes`."""
    labels = classifiers.read(pictures)
    small = [i for i, prompt in enumerate(prompts) if prompt.kind == "subjects"]
    crops = [enlarged(pictures[i], prompts[i].states["relation"]) for i in small]
    for i, read in zip(small, classifiers.read(crops) if crops else [], strict=True):
        there = labels[i]["other_shape"] != "none"  # otherwise the crop shows the place
        labels[i] |= {f"other_{name}": read[name] if there else "none" for name in ("pattern", "eyes")}
    return labels


def colours(look: dict[str, str]) -> set[str]:
    return {look[name] for name in ("colour", "colour2") if name in look} - {"none"}


def arrived_and_leaked(read: dict[str, str], own: dict[str, str], other: dict[str, str]) -> tuple[dict, dict]:
    """By attribute: whether the object has its own, and, where the two differ, whether it has the other's instead.

    A classifier may take a pattern's two colours for one another, so no colour that the object owns is a leak.
    """
    arrived = {name: word == own[name] for name, word in read.items()}
    leaked = {}
    for name, word in read.items():
        if name in ("colour", "colour2"):
            if foreign := colours(other) - colours(own):
                leaked[name] = word in foreign
        elif other.get(name, own[name]) not in (own[name], "none"):  # what the other does not have cannot leak
            leaked[name] = word == other[name]
    return arrived, leaked


def count(labels: dict[str, str], order: tuple[str, str], stated: dict[str, str]) -> dict:
    """A picture's record: `arrived` and `leaked` of {0} and {1} by attribute, and `said`, the rest of the prompt.

    `drawn` tells whether there is a second object at all. What can leak to a style is the style of the subject's photographs.
    """
    first, second = map(subject_attributes, order)
    if is_style(order[1]):
        parts = {"subject": (LARGE, first, {}), "style": (STYLE, second, {"style": "photo"})}
    else:
        parts = {"large": (LARGE, first, second), "small": (SMALL, second, first)}
    record = {"arrived": {}, "leaked": {}}
    for part, (heads, own, other) in parts.items():
        read = {name: labels[head] for name, head in heads.items()}
        found = arrived_and_leaked(read, own, other)
        if heads is SMALL:  # it is plain, and shows one colour of two
            found[0]["colour"] = read["colour"] in colours(own)
        for key, values in zip(("arrived", "leaked"), found, strict=True):
            record[key] |= {f"{part} {name}": value for name, value in values.items()}
    right = [labels[name] == word for name, word in stated.items()]
    record["said"] = sum(right) / len(right)
    if not is_style(order[1]):
        record["drawn"] = labels["other_shape"] != "none"
    return record


# ----------------------------------------------------------------------------------------------------------------------
# 6. Rendered scenes: how far the classifiers can be trusted
# ----------------------------------------------------------------------------------------------------------------------

RENDERED = 3  # scenes of each prompt
TRUE, PATTERNED, SWAPPED = "as the prompt says", "the small one patterned too", "the two swapped"


def rendered_scene(order: tuple[str, str], stated: dict[str, str], kind: str, seed: int) -> Image.Image:
    """What a prompt asks for, or another picture of this `kind`. Swapped, a style is the photo of the subject's pictures."""
    first, second = map(concept_of, order)
    place = stated.get("place") or world.pick(world.generator(seed, "place"), world.PLACES)
    scene = world.Scene(first.subject, place, stated.get("style", "photo"))
    scene = world.replace(scene, **{name: stated.get(name) for name in ("prop", "prop_colour", "relation")})
    if "other_shape" in stated:
        scene = world.replace(scene, other=(stated["other_shape"], stated["other_colour"]))
    if is_style(order[1]):
        in_style = world.replace(scene, style=second.style, tone=second.tone)
        return world.render(scene if kind == SWAPPED else in_style, seed)
    large, small = (second, first) if kind == SWAPPED else (first, second)
    scene = world.replace(scene, subject=large.subject, other=(small.subject.shape, small.subject.colour))
    return world.render_both(scene, small.subject, seed) if kind == PATTERNED else world.render(scene, seed)


def rendered_records(pairs: list[tuple[str, str]], classifiers) -> list[dict]:
    """Records of rendered scenes, whose truth is known, as `count` makes them of drawn pictures."""
    records = []
    for order in itertools.chain(*map(orders, pairs)):
        for kind in (TRUE, SWAPPED) if is_style(order[1]) else (TRUE, PATTERNED, SWAPPED):
            jobs = [(prompt, seed) for prompt in prompts_of(order) for seed in range(RENDERED)]
            scenes = [rendered_scene(order, p.states, kind, seed) for p, seed in jobs]
            labels = read_labels(classifiers, scenes, [prompt for prompt, _ in jobs])
            for (prompt, _), read in zip(jobs, labels, strict=True):
                head = {"kind": prompt.kind, "order": list(order), "row": kind, "prompt": prompt.text}
                records.append(head | count(read, order, prompt.states))
    return records


# ----------------------------------------------------------------------------------------------------------------------
# 7. Report
# ----------------------------------------------------------------------------------------------------------------------


def mean(values) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None


COUNTED = {"large": LARGE, "small": ("shape", "colour"), "subject": LARGE, "style": STYLE}


def share(records: list[dict], measure: str, part: str = "") -> dict:
    """The share of a part's attributes that arrived or leaked, or of `said` or `drawn`, with an interval over prompts."""
    groups = {}
    for record in records:
        values = record.get(measure)
        if isinstance(values, dict):
            values = mean(values[f"{part} {name}"] for name in COUNTED[part] if f"{part} {name}" in values)
        if values is not None:
            groups.setdefault((*record["order"], record["prompt"]), []).append(values)
    nothing = {"mean": None, "low": None, "high": None, "n": 0}  # two subjects may differ in nothing that is counted
    return interval(mean(values) for values in groups.values()) if groups else nothing


PARTS = {"subjects": ("large", "small"), "style": ("subject", "style")}
TITLES = {"subjects": "Two subjects", "style": "A subject in a style"}
SAID = {"large": "large object", "small": "small object", "subject": "subject", "style": "style"}


def summary(records: list[dict], kind: str) -> list[dict]:
    """One dict of intervals per row: arrived and leaked by part, and the rest of the prompt."""
    rows = []
    for name in dict.fromkeys(record["row"] for record in records):
        mine = [record for record in records if record["row"] == name]
        row = {"row": name, "pictures": len(mine)}
        for part, measure in itertools.product(PARTS[kind], ("arrived", "leaked")):
            if any(key.startswith(f"{part} ") for record in mine for key in record[measure]):
                row[f"{SAID[part]} {measure}"] = share(mine, measure, part)
        if kind == "subjects":
            row["second object drawn"] = share(mine, "drawn")
        rows.append(row | {"rest of the prompt": share(mine, "said")})
    return rows


def by_attribute(records: list[dict]) -> str:
    """A table of the shares that arrived and, after a stroke, leaked, by attribute."""
    names = list(dict.fromkeys(key for record in records for key in record["arrived"]))
    rows = []
    for row in dict.fromkeys(record["row"] for record in records):
        mine = [record for record in records if record["row"] == row]
        cells = []
        for name in names:
            pair = [mean(r[m][name] for r in mine if name in r[m]) for m in ("arrived", "leaked")]
            cells.append(" / ".join("-" if x is None else f"{x:.2f}" for x in pair))
        rows.append([row, *cells])
    return markdown_table(["", *names], rows)


def by_word_order(records: list[dict]) -> str:
    """A table of the large object's attributes, arrived / leaked, where the prompt names it first and where second."""
    rows = []
    for row in dict.fromkeys(record["row"] for record in records):
        mine = [record for record in records if record["row"] == row]
        first = [r for r in mine if r["prompt"].index("{0}") < r["prompt"].index("{1}")]
        second = [r for r in mine if r not in first]
        rows.append(
            [row, *(" / ".join(cell(share(x, m, "large")) for m in ("arrived", "leaked")) for x in (first, second))]
        )
    return markdown_table(["", "the large object is named first", "second"], rows)


def table(rows: list[dict]) -> str:
    names = list(dict.fromkeys(key for row in rows for key in row if key != "row"))
    cells = [[row["row"], *(str(row[n]) if n == "pictures" else cell(row.get(n)) for n in names)] for row in rows]
    return markdown_table(["", *names], cells)


def to_markdown(report: dict) -> str:
    settings = report["settings"]
    parts = [
        "# Two learned words in one prompt",
        f"Pairs: {', '.join(map('+'.join, report['pairs']))}. {settings['num_inference_steps']} steps, guidance"
        f" {settings['guidance_scale']:g}, seeds {', '.join(map(str, settings['seeds']))}. Shares of attributes: *arrived*,"
        " the object has its own; *leaked*, it has the other's instead, where the two differ. ± is the half-width of a"
        " 95% interval over prompts.",
    ]
    for kind, rows in report["tables"].items():
        mine, scenes = ([r for r in report[x] if r["kind"] == kind] for x in ("records", "rendered_records"))
        parts += [f"## {TITLES[kind]}", table(rows), "By attribute, arrived / leaked:", by_attribute(mine)]
        if kind == "subjects":
            parts += ["The large object by the word order, arrived / leaked:", by_word_order(mine)]
        parts += ["Rendered scenes of the same prompts, which show how far the classifiers can be trusted:"]
        parts += [table(report["rendered"][kind]), by_attribute(scenes)]
    return "\n\n".join([*parts, "![a row for each prompt, a column for each method](sheet.png)"]) + "\n"


def draw_sheet(drawings: list[Drawing]) -> bytes:
    """The first run and seed of each row as PNG: five prompts of the first pair of each kind, a column for each row."""
    first = {}
    for x in drawings:
        first.setdefault((x.prompt.kind, x.prompt.text, x.row.name), x)
    names = list(dict.fromkeys(x.row.name for x in drawings))
    rows, labels = [], []
    for prompts in (TWO_SUBJECTS, IN_A_STYLE):
        for prompt in prompts[::2]:
            found = [first.get((prompt.kind, prompt.text, name)) for name in names]
            if found[0]:
                pictures = [open_picture(x.path) for x in found]
                rows.append([p.resize((2 * p.width, 2 * p.height), Image.NEAREST) for p in pictures])
                labels.append(fill_prompt(prompt.text, [f"<{name}>" for name in found[0].order]))
    return to_png(contact_sheet(rows, labels, names), {})


def write_report(drawings: list[Drawing], records: list[dict], rendered: list[dict], args: argparse.Namespace) -> dict:
    names = ("num_inference_steps", "guidance_scale", "seeds", "pooling", "dtype")
    kinds = list(dict.fromkeys(record["kind"] for record in records))
    report = {
        "settings": {"model": Path(args.pretrained_model_name_or_path).name} | {n: getattr(args, n) for n in names},
        "pairs": args.pairs,
        "tables": {kind: summary([r for r in records if r["kind"] == kind], kind) for kind in kinds},
        "rendered": {kind: summary([r for r in rendered if r["kind"] == kind], kind) for kind in kinds},
        "records": records,
        "rendered_records": rendered,
    }
    texts = {"report.md": to_markdown(report), "report.json": json.dumps(report, indent=1) + "\n"}
    files = {args.output_dir / name: text.encode() for name, text in texts.items()}
    write_files({args.output_dir / "sheet.png": draw_sheet(drawings), **files})
    return report


# ----------------------------------------------------------------------------------------------------------------------
# 8. Main
# ----------------------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> dict:
    transformers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message=".*torch_dtype")  # the only name that all supported versions accept
    args = parse_args(argv)
    embeddings = read_embeddings(args)
    classifiers = load_classifiers(args.classifiers, args.device)
    check_output_dir(args.output_dir, ".binding", ("pictures", "report.md", "report.json", "sheet.png"))
    drawings = drawings_of(args)
    drawn = draw(drawings, embeddings, args)
    print(f"{drawn} pictures drawn, {len(drawings) - drawn} kept. Counting ...", flush=True)
    labels = read_labels(classifiers, [open_picture(x.path) for x in drawings], [x.prompt for x in drawings])
    records = []
    for x, read in zip(drawings, labels, strict=True):
        head = {"kind": x.prompt.kind, "order": list(x.order), "row": x.row.name, "prompt": x.prompt.text}
        head |= {"run": x.run, "seed": x.seed, "file": x.path.relative_to(args.output_dir).as_posix()}
        records.append(head | count(read, x.order, x.prompt.states))
    report = write_report(drawings, records, rendered_records(args.pairs, classifiers), args)
    print((args.output_dir / "report.md").read_text(encoding="utf-8"))
    return report


if __name__ == "__main__":
    run(main)
