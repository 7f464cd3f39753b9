#!/usr/bin/env python
"""Evaluate learned embeddings with the paper's protocol: pictures, image and text scores, tables, sheets and a plot.

    python examples/evaluate.py --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \
      --embeddings DTI=out/dog TI=out/ti-dog --rescale TI=mean --instance_data_dir photos/dog --class_word dog \
      --prompts live --output_dir evaluation

Every prompt is sampled with every seed: 40 prompts x 4 seeds = 160 pictures per subject and method. The image score is the
mean cosine between DINOv2's class features of a picture and of every reference picture. The text score is the sigmoid of
SigLIP's image-text logit, with the class word in place of the placeholder (arXiv 2512.13672).

Several subjects come from a table (CSV, or JSON with a list of objects) with one row per subject and method:

    subject,method,path,instance_data_dir,class_word,prompts
    dog,DTI,out/dog,photos/dog,dog,live
    dog,TI,out/ti-dog,photos/dog,dog,live
    teapot,DTI,out/teapot,photos/teapot,teapot,object

    python examples/evaluate.py --pretrained_model_name_or_path ... --table table.csv --output_dir evaluation

For the miniature world, where classifiers can read the attributes of a picture, add `--prompts world --classifiers FOLDER`, or
`--prompts world-style` for a style. In the prompts for styles {} stands for the style.

Written to --output_dir: `pictures/<subject>/<method>/<prompt>-<seed>.png`, `references`, `report.md`,
`scores.csv` (one row per picture), `evaluation.json` (everything, for user_study.py), `scatter.png`, and `sheets` with the
methods side by side. A repeated run keeps the pictures that were made with the same settings and makes the others.

google/siglip's tokenizer needs the packages sentencepiece and protobuf.

Sections: 1 options, 2 prompts, 3 subjects and methods, 4 pictures, 5 scores, 6 attributes of the miniature world,
7 statistics, 8 tables, sheets and plot, 9 main.
"""

import argparse
import csv
import gc
import importlib
import io
import itertools
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from baselines import read_word
from export import Embedding, UserError, make_parser, markdown_table, renamed, run, write_files
from generate import (
    LORA_FILE,
    add_model_options,
    check_model_fits,
    choose_device,
    choose_dtype,
    configured_as,
    contact_sheet,
    digest,
    draw_missing,
    sampling_settings,
    settle_options,
    start_pipeline,
    to_png,
)
from generate import number as at_least
from generate import read_prompts as read_lines
from pictures import check_apart, open_mask, open_picture, pictures_in, same_name
from PIL import Image, ImageOps
from rescale import chosen_magnitudes, magnitude_rule, magnitudes, model_family, one_line, rescale
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer


MINIATURE = Path(__file__).resolve().parent / "miniature"


# ----------------------------------------------------------------------------------------------------------------------
# 1. Options
# ----------------------------------------------------------------------------------------------------------------------


def rescale_option(text: str) -> tuple[str | None, str | float]:
    """Parse METHOD=RULE as (method, rule). A rule alone applies to every method."""
    method, equals, rule = text.rpartition("=")
    return method if equals else None, magnitude_rule(rule)


def named_path(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not (name.strip() and equals and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH, such as DTI=out/dog")
    return name.strip(), Path(path)


# fmt: off
def command_line() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add_model_options(parser)
    parser.set_defaults(batch_size=4, scheduler="paper", negative_prompt=None, overwrite=True)
    add("--output_dir", type=Path, required=True, help="Output folder. A repeated run continues in it.")
    add("--table", type=Path, help="CSV or JSON file with one row per subject and method.")
    add("--embeddings", type=named_path, nargs="+", metavar="NAME=PATH", help="Methods and their embeddings, for one subject.")
    add("--subject", help="The subject's name. Default: the name of --instance_data_dir.")
    add("--instance_data_dir", type=Path, help="Reference pictures.")
    add("--masks", type=Path, help="Masks with the names of the reference pictures, white on the subject. The rest is painted black.")
    add("--class_word", help="The subject's class. It replaces the placeholder in the text score.")
    add("--prompts", default="object", help=f"{', '.join(BUILT_IN)}, or a file with one prompt per line and {{}} for the subject. Default: object.")
    add("--rescale", type=rescale_option, nargs="+", default=[], metavar="[METHOD=]RULE",
        help="Also evaluate METHOD (or all) rescaled to the vocabulary's norm: mean, min or a number.")
    add("--seeds", type=at_least(int, 0), nargs="+", default=[0, 1, 2, 3], help="Seeds: one picture per prompt and seed. Paper: four seeds.")
    add("--dino", default="facebook/dinov2-base", help="Model of the image score: Hub id or folder.")
    add("--siglip", default="google/siglip-base-patch16-512", help="Model of the text score: Hub id or folder.")
    add("--classifiers", type=Path, help="Folder with the miniature world's attribute classifiers.")
    return parser
# fmt: on


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The options, checked. Raises UserError."""
    args = command_line().parse_args(argv)
    check_options(args)
    args.device = choose_device(args)
    return args


def check_options(args: argparse.Namespace) -> None:
    """Check the options without reading any file's content. Raises UserError."""
    if (args.table is None) == (args.embeddings is None):
        raise UserError("Give either --table, or --embeddings with --instance_data_dir and --class_word.")
    for name in ("instance_data_dir", "class_word"):
        if args.embeddings and getattr(args, name) is None:
            raise UserError(f"--embeddings needs --{name} too.")
    for name in ("instance_data_dir", "class_word", "subject", "masks"):
        if args.table and getattr(args, name) is not None:
            raise UserError(f"--{name} is for one subject: with --table, make it a column of {args.table}.")
    if len(set(args.seeds)) < len(args.seeds):
        raise UserError(f"--seeds {' '.join(map(str, args.seeds))}: a seed is given twice.")
    if args.classifiers and not (args.classifiers / "model.safetensors").is_file():
        raise UserError(
            f"--classifiers {args.classifiers} has no model.safetensors: give the miniature's classifiers."
        )


OUTPUTS = "pictures references sheets report.md scores.csv evaluation.json scatter.png".split()


def check_output_dir(folder: Path, mark: str = ".evaluation", outputs: Iterable[str] = OUTPUTS) -> None:
    """Make the folder, or check that this script made it: other files are never overwritten. Raises UserError.

    Another script that writes such a folder has a mark and outputs of its own.
    """
    mark = folder / mark
    try:
        folder.mkdir(parents=True, exist_ok=True)
        foreign = [] if mark.exists() else [name for name in outputs if (folder / name).exists()]
        if foreign:
            raise UserError(
                f"--output_dir {folder} has a {foreign[0]} that this script did not write: choose another folder."
            )
        mark.touch()
    except OSError as error:
        raise UserError(f"--output_dir {folder} cannot be written to: {error.strerror}. Choose another.") from None


# ----------------------------------------------------------------------------------------------------------------------
# 2. Prompts, fixed before any method ran: {} is the subject
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """A prompt, its kind ("simple", "complex" or ""), and in the miniature world the attributes that it states."""

    text: str
    kind: str = ""
    states: dict[str, str] = field(default_factory=dict)

    def with_word(self, word: str) -> str:
        """The prompt with a token or, for the text score, with the class word."""
        return self.text.replace("{}", word)


# DreamBooth's 25 prompts for each kind of subject, without the class word after the token.
BOTH = """
a {} in the jungle | a {} in the snow | a {} on the beach | a {} on a cobblestone street | a {} on top of pink fabric
a {} on top of a wooden floor | a {} with a city in the background | a {} with a mountain in the background
a {} with a blue house in the background | a {} on top of a purple rug in a forest
"""
CHANGED = "a red {} | a purple {} | a shiny {} | a wet {} | a cube shaped {}"
OBJECT_SIMPLE = f"""{BOTH}
a {{}} with a wheat field in the background | a {{}} with a tree and autumn leaves in the background
a {{}} with the Eiffel Tower in the background | a {{}} floating on top of water | a {{}} floating in an ocean of milk
a {{}} on top of green grass with sunflowers around it | a {{}} on top of a mirror
a {{}} on top of the sidewalk in a crowded street | a {{}} on top of a dirt road | a {{}} on top of a white rug
{CHANGED}
"""
LIVE_SIMPLE = f"""{BOTH}
a {{}} wearing a red hat | a {{}} wearing a santa hat | a {{}} wearing a rainbow scarf
a {{}} wearing a black top hat and a monocle | a {{}} in a chef outfit | a {{}} in a firefighter outfit
a {{}} in a police outfit | a {{}} wearing pink glasses | a {{}} wearing a yellow shirt
a {{}} in a purple wizard outfit
{CHANGED}
"""
OBJECT_COMPLEX = """
a watercolor painting of a {} on a windowsill, with rain running down the glass behind it
a {} on a picnic blanket between a basket of apples and a sleeping cat, seen from above
a robot carefully carrying a {} across a busy crosswalk at night, neon signs reflected in puddles
an oil painting of a {} on a royal throne, with two candles burning to its left
a {} half buried in desert sand, with a caravan of camels passing on the horizon at sunset
a black and white pencil drawing of a {} next to an open book and a pair of glasses
a child holding a {} in both hands while standing under a large yellow umbrella
a {} on a shelf between a globe and a stack of old records, lit by a single lamp
a {} inside a glass bottle on a beach, with a sailing ship far behind it
a pixel art scene of a {} guarded by a small dragon in front of a castle
a {} on the surface of the moon, with the earth rising behind an astronaut
a busy market stall with a {} among oranges and flowers, and a bicycle leaning on the right
a paper collage of a {} floating over a green valley with three hot air balloons
a {} on a snow covered bench under a street lamp while a fox walks past
a vintage travel poster showing a {} in front of a lighthouse and crashing waves
"""
LIVE_COMPLEX = """
a watercolor painting of a {} looking out of a window while rain runs down the glass
a {} sitting between a basket of apples and a sleeping rabbit on a picnic blanket, seen from above
a {} riding a skateboard across a busy crosswalk at night, neon signs reflected in puddles
an oil painting of a {} on a royal throne, wearing a golden crown, with two candles to its left
a {} crossing the desert behind a caravan of camels at sunset
a black and white pencil drawing of a {} asleep on an open book next to a pair of glasses
a child in a blue coat hugging a {} under a large yellow umbrella
a {} in a space suit on the surface of the moon, with the earth rising behind it
a {} steering a small wooden boat towards a lighthouse through high waves
a pixel art scene of a {} facing a small dragon in front of a castle
a {} playing the piano on a stage while an audience of penguins listens
a {} behind a busy market stall among oranges and flowers, with a bicycle leaning on the right
a paper collage of a {} floating over a green valley under three hot air balloons
a {} on a snow covered bench under a street lamp while a fox walks past
a vintage travel poster showing a {} surfing in front of a volcano
"""
# The paper shows faces and styles in figures alone; its authors' prompts for styles are 40 things "in {} style". These are ours.
FACE_SIMPLE = """
a photo of a {} on the beach | a photo of a {} in the snow | a photo of a {} in a crowded street | a photo of a {} in a library
a photo of a {} in front of a mountain lake | a photo of a {} at night under street lamps | a photo of a {} on a train
a {} wearing a red hat | a {} wearing sunglasses | a {} with a green scarf | a {} in a suit and tie | a {} in a yellow raincoat
a {} dressed as a chef | a {} dressed as an astronaut | a {} dressed as a knight | a {} dressed as a doctor
a smiling {} | an angry {} | a {} with closed eyes | a {} with long white hair | a very old {}
a pencil sketch of a {} | an oil painting of a {} | a marble statue of a {} | a {} as a cartoon character
"""
FACE_COMPLEX = """
a watercolor painting of a {} reading a letter at a window, with rain running down the glass
a {} on a picnic blanket between a basket of apples and a sleeping cat, seen from above
a {} riding a bicycle across a busy crosswalk at night, neon signs reflected in puddles
an oil painting of a {} on a royal throne, wearing a golden crown, with two candles to the left
a {} crossing the desert behind a caravan of camels at sunset
a black and white drawing of a {} asleep over an open book next to a pair of glasses
a {} in a blue coat holding a large yellow umbrella over a small dog
a {} in a space suit on the surface of the moon, with the earth rising behind
a {} steering a small wooden boat towards a lighthouse through high waves
a pixel art scene of a {} facing a small dragon in front of a castle
a {} playing the piano on a stage while an audience of penguins listens
a {} selling oranges and flowers at a market stall, with a bicycle leaning on the right
a paper collage of a {} floating over a green valley under three hot air balloons
a {} on a snow covered bench under a street lamp while a fox walks past
a vintage travel poster showing a {} surfing in front of a volcano
"""
# Here {} is the style.
STYLE_SIMPLE = """
a dog in the style of a {} | a rabbit in the style of a {} | an owl in the style of a {} | a whale in the style of a {}
a snail in the style of a {} | a bicycle in the style of a {} | a teapot in the style of a {} | a violin in the style of a {}
a lighthouse in the style of a {} | a windmill in the style of a {} | a castle in the style of a {} | a bridge in the style of a {}
a steam train in the style of a {} | a sailing boat in the style of a {} | a hot air balloon in the style of a {}
a robot in the style of a {} | a pair of boots in the style of a {} | an umbrella in the style of a {} | a loaf of bread in the style of a {}
a bowl of cherries in the style of a {} | a sunflower in the style of a {} | a pine tree in the style of a {}
a waterfall in the style of a {} | a thunderstorm in the style of a {} | a dancer in the style of a {}
"""
STYLE_COMPLEX = """
a fox and a heron on opposite banks of a river at dawn, in the style of a {}
a red car under a green tree with a yellow kite above it, in the style of a {}
three cats on a blue sofa below a round mirror, in the style of a {}
an astronaut feeding pigeons in a crowded square, in the style of a {}
a child with an umbrella waiting for a bus at night, in the style of a {}
a desk with an open book, a burning candle and a pair of glasses, in the style of a {}
a ship between two icebergs with a whale in front of it, in the style of a {}
a market stall with oranges on the left and flowers on the right, in the style of a {}
a bear playing the piano while penguins listen, in the style of a {}
a village below a snow covered mountain with smoke from every chimney, in the style of a {}
a bicycle leaning on a brick wall beside a sleeping dog, in the style of a {}
a small dragon guarding a tower of books in a library, in the style of a {}
two old men playing chess under a tree in autumn, in the style of a {}
a glass bottle on a beach with a sailing ship inside, in the style of a {}
a bowl of soup on a windowsill while it rains outside, in the style of a {}
"""
# The miniature's prompts use its captions' words. Second objects are squares and triangles: no named concept is one.
WORLD_SIMPLE = """
a photo of a {} on grass: style=photo place=grass
a photo of a {} in the water: style=photo place=water
a photo of a {} in the snow: style=photo place=snow
a photo of a {} at night: style=photo place=night
a photo of a {} on the beach: style=photo place=beach
a photo of a {} in the forest: style=photo place=forest
a photo of a {} in front of a brick wall: style=photo place=brick
a photo of a {} at sunset: style=photo place=sunset
a photo of a {} in the city: style=photo place=city
a photo of a {} in the mountains: style=photo place=mountains
a {} wearing a red hat: prop=hat prop_colour=red
a {} holding a blue balloon: prop=balloon prop_colour=blue
a {} with a yellow flag: prop=flag prop_colour=yellow
a {} under a green umbrella: prop=umbrella prop_colour=green
a {} standing on a purple block: prop=block prop_colour=purple
a pencil sketch of a {}: style=sketch
pixel art of a {}: style=pixel art
a {} left of a small red square: other_shape=square other_colour=red relation=left
a {} right of a small blue triangle: other_shape=triangle other_colour=blue relation=right
a {} above a small green square: other_shape=square other_colour=green relation=above
"""
WORLD_COMPLEX = """
a photo of a {} wearing a blue hat in the snow: style=photo place=snow prop=hat prop_colour=blue
a photo of a {} holding a red balloon at night: style=photo place=night prop=balloon prop_colour=red
a photo of a {} under a pink umbrella in the city: style=photo place=city prop=umbrella prop_colour=pink
a photo of a {} standing on a white block in the forest: style=photo place=forest prop=block prop_colour=white
a pencil sketch of a {} on the beach: style=sketch place=beach
a pencil sketch of a {} wearing a green hat in the mountains: style=sketch place=mountains prop=hat prop_colour=green
a drawing of the {} with an orange flag at sunset: style=sketch place=sunset prop=flag prop_colour=orange
pixel art of a {} in the water: style=pixel art place=water
pixel art of a {} holding a yellow balloon in the city: style=pixel art place=city prop=balloon prop_colour=yellow
a pixel art picture of the {} under a red umbrella on grass: style=pixel art place=grass prop=umbrella prop_colour=red
in the forest, a {} left of a small yellow triangle: place=forest other_shape=triangle other_colour=yellow relation=left
a {}, right of a small red square, on the beach: place=beach other_shape=square other_colour=red relation=right
at night, a {} above a small white triangle: place=night other_shape=triangle other_colour=white relation=above
in the snow, a {} below a small blue square: place=snow other_shape=square other_colour=blue relation=below
a small green square left of a {} in the city: place=city other_shape=square other_colour=green relation=right
a small purple triangle above a {} on grass: place=grass other_shape=triangle other_colour=purple relation=below
a pencil sketch of a {} right of a small red triangle: style=sketch other_shape=triangle other_colour=red relation=right
pixel art of a {} above a small blue square: style=pixel art other_shape=square other_colour=blue relation=above
a {} wearing a black hat, left of a small pink square: prop=hat prop_colour=black other_shape=square other_colour=pink relation=left
a small yellow square right of a {} with a blue flag, in the mountains: place=mountains prop=flag prop_colour=blue other_shape=square other_colour=yellow relation=left
"""  # noqa: E501
# {} is the style. The subjects are plain, so none of them is a named concept, and all attributes are in words.
WORLD_STYLE = """
a picture in the style of a {} of a red star on grass: shape=star colour=red place=grass
a picture in the style of a {} of a blue fish in the water: shape=fish colour=blue place=water
a picture in the style of a {} of a green mushroom in the snow: shape=mushroom colour=green place=snow
a picture in the style of a {} of a yellow house at night: shape=house colour=yellow place=night
a picture in the style of a {} of a purple heart on the beach: shape=heart colour=purple place=beach
a picture in the style of a {} of an orange flower in the forest: shape=flower colour=orange place=forest
a picture in the style of a {} of a white drop in front of a brick wall: shape=drop colour=white place=brick
a picture in the style of a {} of a black cross at sunset: shape=cross colour=black place=sunset
a picture in the style of a {} of a pink circle in the city: shape=circle colour=pink place=city
a picture in the style of a {} of a red diamond in the mountains: shape=diamond colour=red place=mountains
a blue house on grass in the style of a {}: shape=house colour=blue place=grass
an orange fish in the city in the style of a {}: shape=fish colour=orange place=city
a green heart at night in the style of a {}: shape=heart colour=green place=night
a white star in the forest in the style of a {}: shape=star colour=white place=forest
a purple flower wearing a red hat in the style of a {}: shape=flower colour=purple prop=hat prop_colour=red
a yellow circle holding a blue balloon in the style of a {}: shape=circle colour=yellow prop=balloon prop_colour=blue
a pink mushroom under a green umbrella in the style of a {}: shape=mushroom colour=pink prop=umbrella prop_colour=green
a red drop standing on a white block in the style of a {}: shape=drop colour=red prop=block prop_colour=white
a blue cross left of a small red square in the style of a {}: shape=cross colour=blue other_shape=square other_colour=red relation=left
a green star above a small blue triangle in the style of a {}: shape=star colour=green other_shape=triangle other_colour=blue relation=above
"""  # noqa: E501


def prompt_lines(text: str, kind: str) -> list[Prompt]:
    """Parse built-in prompts: one per line or between bars, the stated attributes after a colon."""
    prompts = []
    for line in itertools.chain.from_iterable(line.split("|") for line in text.strip().splitlines()):
        words, _, states = line.partition(":")
        stated = dict(re.findall(r"(\w+)=(.+?)(?= \w+=|$)", states.strip()))
        prompts += [Prompt(words.strip(), kind, stated)] if words.strip() else []
    return prompts


BUILT_IN = {
    "object": prompt_lines(OBJECT_SIMPLE, "simple") + prompt_lines(OBJECT_COMPLEX, "complex"),
    "live": prompt_lines(LIVE_SIMPLE, "simple") + prompt_lines(LIVE_COMPLEX, "complex"),
    "face": prompt_lines(FACE_SIMPLE, "simple") + prompt_lines(FACE_COMPLEX, "complex"),
    "style": prompt_lines(STYLE_SIMPLE, "simple") + prompt_lines(STYLE_COMPLEX, "complex"),
    "world-style": prompt_lines(WORLD_STYLE, ""),
    "world": prompt_lines(WORLD_SIMPLE, "simple") + prompt_lines(WORLD_COMPLEX, "complex"),
}
BUILT_IN["world-half"] = BUILT_IN["world"][::2]  # for sweeps: every second prompt


def read_prompts(name: str) -> list[Prompt]:
    """Built-in prompts by name, or the prompts of a file, one per line. Raises UserError."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    if not os.path.exists(name):
        raise UserError(f"--prompts {name} is neither a file nor one of {', '.join(BUILT_IN)}.")
    lines = read_lines(Path(name))
    for line in lines:
        if "{}" not in line:
            raise UserError(f"--prompts {name}: the line {line!r} has no {{}} for the subject.")
        if lines.count(line) > 1:
            raise UserError(f"--prompts {name}: the line {line!r} occurs twice.")
    return [Prompt(line) for line in lines]


# ----------------------------------------------------------------------------------------------------------------------
# 3. Subjects and methods
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """An embedding to evaluate: one method for one subject.

    Attributes:
        path: input of baselines.read_word.
        instance_data_dir: folder of reference pictures.
        class_word: replaces the subject in the text score.
        prompts: a name in BUILT_IN, or a file.
        masks: folder of masks named like the reference pictures. None: whole pictures.
        rescale: "mean", "min" or a norm to rescale the embedding to. None: the norm from training.
    """

    subject: str
    method: str
    path: Path
    instance_data_dir: Path
    class_word: str
    prompts: str = "object"
    masks: Path | None = None
    rescale: str | float | None = None


def read_table(path: Path, prompts: str) -> list[Case]:
    """Read the cases from a CSV or JSON file. `prompts` is the default for rows without prompts. Raises UserError."""
    option, needed = f"--table {path}", ("subject", "method", "path", "instance_data_dir", "class_word")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = json.load(file) if path.suffix.lower() == ".json" else list(csv.DictReader(file))
        rows = [{k: str(v).strip() for k, v in row.items() if v not in (None, "") and k} for row in rows]
    except (OSError, ValueError, TypeError, AttributeError, csv.Error) as error:
        raise UserError(f"{option} cannot be read as a table of subjects and methods: {one_line(error)}") from None
    if not rows:
        raise UserError(f"{option} has no rows.")
    for number, row in enumerate(rows, 1):
        if missing := [name for name in needed if name not in row]:
            raise UserError(f"{option}: row {number} has no {', '.join(missing)}.")
        if unknown := sorted(set(row) - {*needed, "prompts", "masks"}):
            raise UserError(
                f"{option}: {unknown[0]} is not a column: the columns are {', '.join(needed)}, prompts and masks."
            )
    return [
        Case(
            row["subject"],
            row["method"],
            Path(row["path"]),
            Path(row["instance_data_dir"]),
            row["class_word"],
            row.get("prompts", prompts),
            Path(row["masks"]) if "masks" in row else None,
        )
        for row in rows
    ]


def cases_of(args: argparse.Namespace) -> list[Case]:
    """The cases that the options ask for; rescaled methods come last. Raises UserError."""
    if args.table:
        cases = read_table(args.table, args.prompts)
    else:
        subject = args.subject or args.instance_data_dir.resolve().name
        common = (args.instance_data_dir, args.class_word, args.prompts, args.masks)
        cases = [Case(subject, method, path, *common) for method, path in args.embeddings]
    methods = list(dict.fromkeys(case.method for case in cases))
    for method, rule in args.rescale:
        if method is not None and method not in methods:
            raise UserError(f"--rescale {method}={rule}: there is no method {method}, only {', '.join(methods)}.")
        for case in [case for case in cases if case.rescale is None and method in (None, case.method)]:
            name = f"{case.method}-rescaled" + ("" if rule == "mean" else f"-{rule}")
            cases.append(replace(case, method=name, rescale=rule))
    check_cases(cases)
    return cases


def folder_name(name: str) -> str:
    """Turn a subject's or method's name into a folder name that is valid on any system."""
    return re.sub(r"[^\w.+-]+", "_", name).strip(".") or "_"


def check_cases(cases: list[Case]) -> None:
    """Refuse duplicates, and methods of one subject that cannot be compared. Raises UserError."""
    seen, subjects = set(), {}
    for case in cases:
        key = (folder_name(case.subject).lower(), folder_name(case.method).lower())
        if key in seen:
            raise UserError(f"Method {case.method} of subject {case.subject} is given twice: rename one.")
        seen.add(key)
        first = subjects.setdefault(case.subject, case)
        for name in ("instance_data_dir", "class_word", "prompts", "masks"):
            mine, others = getattr(case, name), getattr(first, name)
            if mine != others:
                raise UserError(
                    f"Subject {case.subject}: {name} is {others} for {first.method} and {mine} for {case.method}:"
                    " methods can be compared only if it is the same."
                )


def read_embeddings(cases: list[Case], args: argparse.Namespace) -> list[Embedding]:
    """Read each case's embedding, rescale it if required, and give it a unique token: methods share their subject's token.

    Also fills `args` with the model family's defaults, as generate.py does. Raises UserError.
    """
    model, revision = configured_as(args.pretrained_model_name_or_path, args.single_file_config), args.revision
    embeddings = [renamed(read_word(case.path), f"<subject-{i}>") for i, case in enumerate(cases)]
    family = model_family(model, revision)
    check_model_fits(model, revision, [case.path for case in cases], embeddings)
    for case in cases:
        if (case.path / LORA_FILE).is_file():
            print(
                f"Note: the LoRA weights in {case.path} are ignored; only the embedding is evaluated.",
                file=sys.stderr,
            )
    seeds = args.seeds
    settle_options(args, family)
    args.seeds, args.dtype = seeds, str(choose_dtype(args.dtype, family, args.device)).removeprefix("torch.")
    if any(case.rescale is not None for case in cases):
        if os.path.isfile(args.pretrained_model_name_or_path):
            raise UserError("A rescaled norm is read from a model's folder, and a single file is given.")
        found = magnitudes(model, revision, args.variant)
        for index, case in enumerate(cases):
            if case.rescale is not None:
                embeddings[index] = rescale(embeddings[index], chosen_magnitudes(found, case.rescale))
    return embeddings


def read_references(folder: Path, masks: Path | None = None) -> tuple[list[Image.Image], list[Image.Image]]:
    """Read the reference pictures. Returns them unchanged, and as scored: with a mask, black around the subject.

    A mask belongs to the picture with the same name, ignoring suffixes. The subject is where the mask is lighter than half.
    Raises UserError.
    """
    files = pictures_in(folder, "--instance_data_dir")
    pictures = [open_picture(path) for path in files]
    if masks is None:
        return pictures, pictures
    by_name = {same_name(path.stem): path for path in pictures_in(masks, "--masks")}
    found = [by_name.get(same_name(path.stem)) for path in files]
    without = [path.name for path, mask in zip(files, found, strict=True) if mask is None]
    if len(without) == len(files):
        raise UserError(
            f"--masks {masks} has no mask with the name of a picture in {folder}, such as {files[0].stem}.png."
        )
    if without:
        print(f"Note: no mask, so the whole picture is scored: {', '.join(without)}", file=sys.stderr)
    scored = list(pictures)
    for index, (picture, path) in enumerate(zip(pictures, found, strict=True)):
        if path is not None:
            mask = open_mask(path, picture).resize(picture.size, Image.NEAREST).point(lambda x: 255 * (x >= 128))
            scored[index] = Image.composite(picture, Image.new("RGB", picture.size), mask)
    return pictures, scored


# ----------------------------------------------------------------------------------------------------------------------
# 4. Pictures
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Job:
    """A case with its embedding and prompts, and the paths of its pictures by prompt number and seed."""

    case: Case
    embedding: Embedding
    prompts: list[Prompt]
    paths: dict[tuple[int, int], Path]


def make_jobs(cases: list[Case], embeddings: list[Embedding], args: argparse.Namespace) -> list[Job]:
    jobs = []
    for case, embedding in zip(cases, embeddings, strict=True):
        folder = args.output_dir / "pictures" / folder_name(case.subject) / folder_name(case.method)
        prompts = read_prompts(case.prompts)
        keys = itertools.product(range(len(prompts)), args.seeds)
        paths = {(number, seed): folder / f"{number:02d}-{seed}.png" for number, seed in keys}
        jobs.append(Job(case, embedding, prompts, paths))
    return jobs


def generate_missing(jobs: list[Job], args: argparse.Namespace) -> int:
    """Draw the pictures that are missing or were made with other settings. Returns how many. Raises UserError."""
    dtype, embeddings = getattr(torch, args.dtype), [job.embedding for job in jobs]
    settings, pictures, told = sampling_settings(args, dtype, []), {}, {}
    for job in jobs:
        mine = settings | {"embedding": digest(job.embedding)}  # not its token, which depends on the other methods
        for (number, seed), path in job.paths.items():
            pictures[path] = (job.prompts[number].text, seed, mine)
            told[path] = job.prompts[number].with_word(job.embedding.token)
    count = draw_missing(lambda: start_pipeline(args, dtype, args.device, embeddings, []), pictures, args, told)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return count


# ----------------------------------------------------------------------------------------------------------------------
# 5. Scores
# ----------------------------------------------------------------------------------------------------------------------


def load_judge(option: str, name: str, kind: str):
    """Load a judge's config and image processor, before anything large is loaded. Raises UserError."""
    # The PIL-based processors: those on tensors need torchvision and resize slightly differently.
    python = {"use_fast": False} if int(transformers.__version__.split(".")[0]) < 5 else {"backend": "pil"}
    try:
        config = AutoConfig.from_pretrained(name)
        if kind not in config.model_type:
            raise ValueError(f"it is a {config.model_type}, and the protocol needs a {kind}")
        return config, AutoImageProcessor.from_pretrained(name, **python)
    except (OSError, ValueError, ImportError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{option} {name} cannot be used: {one_line(error)}") from None


def load_weights(option: str, name: str, device: str) -> torch.nn.Module:
    try:
        model, info = AutoModel.from_pretrained(name, torch_dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # many kinds: the file, its format or the network
        raise UserError(f"{option} {name} cannot be loaded: {one_line(error)}") from None
    if info["missing_keys"]:
        raise UserError(f"{option} {name} lacks the weights {sorted(info['missing_keys'])[0]} ...")
    return model.eval().requires_grad_(False).to(device)


class ImageScore:
    """DINOv2's class features: does the picture show the same subject?"""

    def __init__(self, name: str = "facebook/dinov2-base", device: str = "cpu"):
        _, self.processor = load_judge("--dino", name, "dino")
        self.name, self.device, self.model = name, device, None

    def load(self) -> None:
        """Load the weights; `features` calls this. Raises UserError."""
        self.model = self.model or load_weights("--dino", self.name, self.device)

    @torch.no_grad()
    def features(self, pictures: list[Image.Image], batch_size: int = 32) -> torch.Tensor:
        """CLS features (N, d) after the last LayerNorm, each of length 1, float32 on the CPU."""
        self.load()
        rows = []
        for start in range(0, len(pictures), batch_size):
            inputs = self.processor(images=pictures[start : start + batch_size], return_tensors="pt")
            states = self.model(pixel_values=inputs.pixel_values.to(self.device)).last_hidden_state
            rows.append(torch.nn.functional.normalize(states[:, 0].float(), dim=-1).cpu())
        return torch.cat(rows)


def image_scores(features: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Mean cosine (N,) of each row of `features` (N, d) with every row of `references` (R, d), all of length 1."""
    return (features @ references.T).mean(dim=1)


class TextScore:
    """SigLIP: does the picture match the text?"""

    LENGTH = 64  # tokens; SigLIP is trained with every text padded to this length, and reads the padding

    def __init__(self, name: str = "google/siglip-base-patch16-512", device: str = "cpu"):
        config, self.processor = load_judge("--siglip", name, "siglip")
        self.name, self.device, self.model = name, device, None
        self.length = min(self.LENGTH, config.text_config.max_position_embeddings)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name)
            self.tokenizer("a")
        except Exception as error:  # the kind depends on the version
            raise UserError(
                f"--siglip {name}: its tokenizer cannot be loaded ({one_line(error)}). google/siglip's needs"
                " `pip install sentencepiece protobuf`."
            ) from None

    def load(self) -> None:
        """Load the weights; `logits` calls this. Raises UserError."""
        self.model = self.model or load_weights("--siglip", self.name, self.device)

    @torch.no_grad()
    def logits(self, pictures: list[Image.Image], texts: list[str], batch_size: int = 16) -> dict[str, torch.Tensor]:
        """`logit` and `cosine` (N,) of each picture with its own text, float32 on the CPU."""
        self.load()
        logit, cosine = [], []
        for start in range(0, len(pictures), batch_size):
            part = texts[start : start + batch_size]
            distinct = list(dict.fromkeys(part))
            ids = self.tokenizer(
                distinct, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
            ).input_ids
            pixels = self.processor(images=pictures[start : start + batch_size], return_tensors="pt").pixel_values
            # No attention mask: see LENGTH.
            output = self.model(input_ids=ids.to(self.device), pixel_values=pixels.to(self.device))
            rows, columns = torch.arange(len(part)), torch.tensor([distinct.index(text) for text in part])
            logit.append(output.logits_per_image.float().cpu()[rows, columns])
            cosine.append((output.image_embeds.cpu() * output.text_embeds.cpu()[columns]).sum(-1))
        return {"logit": torch.cat(logit), "cosine": torch.cat(cosine)}


def text_scores(
    score: TextScore, pictures: list[Image.Image], prompts: list[str], class_word: str
) -> dict[str, torch.Tensor]:
    """`text` (the sigmoid of the logit), `logit` and `cosine` (N,) of pictures with prompts; {} is the subject."""
    found = score.logits(pictures, [prompt.replace("{}", class_word) for prompt in prompts])
    return {"text": found["logit"].sigmoid(), **found}


def score_job(
    job: Job, references: list[Image.Image], image_score: ImageScore, text_score: TextScore, classifiers=None
) -> list[dict]:
    """Score the job's pictures. Returns one record per picture, with its full path in `file`."""
    case, keys = job.case, list(job.paths)
    pictures = [open_picture(job.paths[key]) for key in keys]
    images = image_scores(image_score.features(pictures), image_score.features(references))
    texts = text_scores(text_score, pictures, [job.prompts[p].text for p, _ in keys], case.class_word)
    labels = classifiers.read(pictures) if classifiers else [None] * len(keys)
    records = []
    for index, (number, seed) in enumerate(keys):
        prompt = job.prompts[number]
        record = {"subject": case.subject, "method": case.method, "number": number, "prompt": prompt.text}
        record |= {"kind": prompt.kind, "seed": seed, "file": str(job.paths[number, seed])}
        record |= {"image": images[index].item(), **{name: values[index].item() for name, values in texts.items()}}
        records.append(record | read_attributes(labels[index], prompt.states, subject_attributes(case.subject)))
    return records


# ----------------------------------------------------------------------------------------------------------------------
# 6. Attributes of the miniature world
# ----------------------------------------------------------------------------------------------------------------------

SUBJECT_ATTRIBUTES = ("shape", "colour", "pattern", "colour2", "eyes")


def miniature(name: str):
    """A module of examples/miniature."""
    if str(MINIATURE) not in sys.path:
        sys.path.append(str(MINIATURE))
    return importlib.import_module(name)


def load_classifiers(folder: Path, device: str):
    """Load the miniature's classifiers. Their `read` returns the labels of PIL pictures. Raises UserError."""
    try:
        return miniature("judges").load_classifiers(folder).to(device)
    except Exception as error:  # the files are damaged, or from another world
        raise UserError(f"--classifiers {folder} cannot be loaded: {one_line(error)}") from None


def subject_attributes(subject: str) -> dict[str, str]:
    """The attributes of the world's concept with this name, a subject or a style; empty for any other subject."""
    world = miniature("world")
    composed = re.fullmatch(r"composed_(\d+)", subject)
    concept = world.compose_concept(int(composed[1])) if composed else world.CONCEPTS.get(subject)
    if concept is None:
        return {}
    if concept.subject is None:
        return {"style": concept.style, "tone": concept.tone}
    truth = world.attributes(world.Scene(concept.subject, world.PLACES[0]))
    return {name: truth[name] for name in SUBJECT_ATTRIBUTES}


def read_attributes(labels: dict[str, str] | None, stated: dict[str, str], subject: dict[str, str]) -> dict:
    """Compare a picture's labels with the prompt and the subject: `right` by attribute, and the shares `said` and `kept`.

    "second object" requires both its shape and its colour to be right.
    """
    if labels is None:
        return {}
    right = {name: labels[name] == word for name, word in {**subject, **stated}.items()}
    record = {"right": right}
    if stated:
        record["said"] = float(np.mean([right[name] for name in stated]))
    if subject:
        record["kept"] = float(np.mean([right[name] for name in subject]))
    if {"other_shape", "other_colour"} <= set(stated):
        right["second object"] = right["other_shape"] and right["other_colour"]
    return record


# ----------------------------------------------------------------------------------------------------------------------
# 7. Statistics
# ----------------------------------------------------------------------------------------------------------------------

MEASURES = {
    "image": "image score",
    "text": "text score",
    "cosine": "image-text cosine",
    "said": "prompt's attributes right",
    "kept": "subject's attributes right",
}


def student_t(freedom: int, level: float = 0.95) -> float:
    """The t with P(|T| < t) = `level`, for that many degrees of freedom.

    With t = sqrt(f) tan(a), P(|T| < t) is the integral of cos^(f-1) from 0 to a over that from 0 to pi/2.
    """
    angles = np.linspace(0, math.pi / 2, 200_001)
    density = np.cos(angles) ** (freedom - 1)
    area = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(freedom) * math.tan(np.interp(level, area / area[-1], angles))


def interval(values: Iterable[float]) -> dict:
    """Mean of independent values and its 95% Student-t interval: `mean`, `low`, `high`, `n`. One value has no interval."""
    values = np.asarray(list(values), dtype=np.float64)
    if not len(values):
        raise ValueError("no values")
    mean = float(values.mean())
    if len(values) == 1:
        return {"mean": mean, "low": None, "high": None, "n": 1}
    half = student_t(len(values) - 1) * float(values.std(ddof=1)) / math.sqrt(len(values))
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": len(values)}


def averages(records: Iterable[dict], measure: str, *keys: str) -> dict[tuple, float]:
    """The mean of a measure over all records with the same `keys`. Records without the measure are skipped."""
    groups = {}
    for record in records:
        if measure in record:
            groups.setdefault(tuple(record[key] for key in keys), []).append(record[measure])
    return {key: float(np.mean(values)) for key, values in groups.items()}


def statistics(records: list[dict]) -> dict:
    """All tables: `subjects`, `methods`, `kinds`, `differences` (paired) and `attributes`, each a list of rows.

    Intervals are over subjects, or over prompts (averaged over seeds) if there is only one subject: pictures of one
    prompt, or prompts of one subject, are not independent.
    """
    methods = list(dict.fromkeys(r["method"] for r in records))
    unit = "subject" if len({r["subject"] for r in records}) > 1 else "prompt"
    present = [m for m in MEASURES if any(m in r for r in records)]
    tables = {"unit": unit, "measures": present}
    tables["subjects"] = [
        {"subject": subject, "method": method, "pictures": len(mine)} | {
            m: interval(averages(mine, m, "prompt").values()) for m in present if any(m in r for r in mine)
        }
        for subject in dict.fromkeys(r["subject"] for r in records)
        for method in methods
        if (mine := [r for r in records if (r["subject"], r["method"]) == (subject, method)])
    ]  # fmt: skip
    by_method = {method: [r for r in records if r["method"] == method] for method in methods}
    tables["methods"] = [{"method": k, "pictures": len(v)} | summary(v, unit, present) for k, v in by_method.items()]
    kinds = [kind for kind in dict.fromkeys(r["kind"] for r in records) if kind]
    tables["kinds"] = [
        {"method": method, "kind": kind} | summary([r for r in mine if r["kind"] == kind], unit, present)
        for method, mine in by_method.items()
        for kind in kinds
    ]
    tables["differences"] = []
    for a, b in itertools.combinations(methods, 2):
        row = {"method": a, "minus": b}
        for measure in present:
            one, two = averages(by_method[a], measure, unit), averages(by_method[b], measure, unit)
            if common := [key for key in one if key in two]:
                row[measure] = interval(one[key] - two[key] for key in common)
        tables["differences"].append(row)
    attributes = list(dict.fromkeys(name for r in records for name in r.get("right", {})))
    tables["attributes"] = [
        {"method": method} | {name: share(mine, name) for name in attributes} for method, mine in by_method.items()
    ]
    return tables


def summary(records: list[dict], unit: str, measures: list[str]) -> dict[str, dict]:
    """The interval of each measure over the units."""
    means = {m: averages(records, m, unit) for m in measures}
    return {m: interval(values.values()) for m, values in means.items() if values}


def share(records: list[dict], attribute: str) -> dict:
    """The share of pictures where an attribute is right, and the number of pictures that it applies to."""
    hits = [r["right"][attribute] for r in records if attribute in r.get("right", {})]
    return {"mean": float(np.mean(hits)) if hits else None, "n": len(hits)}


# ----------------------------------------------------------------------------------------------------------------------
# 8. Tables, sheets and plot
# ----------------------------------------------------------------------------------------------------------------------


def cell(value: dict | None, sign: str = "") -> str:
    """Mean and half-width of a 95% interval."""
    if value is None or value["mean"] is None:
        return "-"
    half = f" ± {value['high'] - value['mean']:.3f}" if value.get("high") is not None else ""
    return f"{value['mean']:{sign}.3f}{half}"


def to_markdown(report: dict) -> str:
    """The report as Markdown."""
    tables, settings = report["tables"], report["settings"]
    measures = tables["measures"]
    names = [MEASURES[m] for m in measures]

    def lines(rows: list[dict], *keys: str, sign: str = "") -> list[list[str]]:
        return [[*(row[k] for k in keys), *(cell(row.get(m), sign) for m in measures)] for row in rows]

    count = len(report["subjects"])
    parts = [
        "# Evaluation",
        f"{count} subject{'s' if count > 1 else ''}, seeds {', '.join(map(str, settings['seeds']))}, model"
        f" {settings['pretrained_model_name_or_path']}. Image score: {settings['dino']}; text score:"
        f" {settings['siglip']}. ± is the half-width of a 95% interval (Student's t) over {tables['unit']}s.",
        markdown_table(["method", *names], lines(tables["methods"], "method")),
        "![image against text score](scatter.png)",
    ]
    if tables["differences"]:
        parts += [
            f"## Paired differences\n\nOver the {tables['unit']}s that both methods have.",
            markdown_table(["method", "minus", *names], lines(tables["differences"], "method", "minus", sign="+")),
        ]
    if tables["kinds"]:
        table = markdown_table(["method", "prompts", *names], lines(tables["kinds"], "method", "kind"))
        parts += ["## Simple and complex prompts", table]
    if attributes := [name for name in (tables["attributes"] or [{}])[0] if name != "method"]:
        rows = [[row["method"], *(cell(row[name]) for name in attributes)] for row in tables["attributes"]]
        parts += [
            "## Attributes, share of pictures where they are right",
            markdown_table(["method", *attributes], rows),
        ]
    parts += [
        "## Subjects\n\n± is over prompts here.",
        markdown_table(["subject", "method", *names], lines(tables["subjects"], "subject", "method")),
        *(f"![{Path(sheet).stem}]({sheet})" for sheet in report["sheets"]),
    ]
    return "\n\n".join(parts) + "\n"


def thumbnail(picture: Image.Image, side: int = 192) -> Image.Image:
    """Fit the picture into a white square. A small picture is enlarged without smoothing."""
    small = max(picture.size) < side
    image = ImageOps.contain(picture, (side, side), Image.NEAREST if small else Image.LANCZOS)
    square = Image.new("RGB", (side, side), "white")
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def draw_sheets(records: list[dict], references: dict[str, list[Image.Image]], folder: Path) -> list[str]:
    """Draw contact sheets of the first seed: the references, then ten prompts. Returns their paths within the folder."""
    paths = []
    for subject in references:
        mine = [r for r in records if r["subject"] == subject and r["seed"] == records[0]["seed"]]
        methods, numbers = (list(dict.fromkeys(r[key] for r in mine)) for key in ("method", "number"))
        found = {(r["method"], r["number"]): r for r in mine}
        shown = [thumbnail(picture) for picture in references[subject][:6]]
        for start in range(0, len(numbers), 10):
            rows, labels, captions = [shown], ["references"], [[]]
            for number in numbers[start : start + 10]:
                row = [found[method, number] for method in methods]
                rows.append([thumbnail(open_picture(Path(r["file"]))) for r in row])
                labels.append(row[0]["prompt"].replace("{}", "..."))
                captions.append([f"{r['method']}: image {r['image']:.3f}, text {r['text']:.3f}" for r in row])
            name = f"sheets/{folder_name(subject)}-{start // 10 + 1}.png"
            sheet = contact_sheet(rows, labels, [""] * max(len(methods), len(shown)), captions)
            write_files({folder / name: to_png(sheet, {})})
            paths.append(name)
    return paths


def draw_scatter(tables: dict) -> bytes:
    """Plot image against text score as PNG: faint points for subjects, each method's mean with its interval."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.8), dpi=150, layout="constrained")
    for index, row in enumerate(tables["methods"]):
        colour, marker = f"C{index % 10}", "osD^vP*X"[index % 8]
        mine = [s for s in tables["subjects"] if s["method"] == row["method"]]
        if len(mine) > 1:
            points = [[s[m]["mean"] for s in mine] for m in ("text", "image")]
            axes.scatter(*points, color=colour, marker=marker, s=18, alpha=0.3, linewidths=0)
        x, y = row["text"], row["image"]
        bars = {
            name: [[v["mean"] - v["low"]], [v["high"] - v["mean"]]]
            for name, v in (("xerr", x), ("yerr", y))
            if v["low"] is not None
        }
        style = {"color": colour, "marker": marker, "markersize": 9, "capsize": 3, "linewidth": 1, "linestyle": ""}
        axes.errorbar(x["mean"], y["mean"], **bars, **style, label=row["method"])
    axes.set_xlabel("text score (SigLIP)")
    axes.set_ylabel("image score (DINOv2)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(tables["methods"]) > 6:  # too many to fit beside the points
        figure.set_figwidth(9)
        figure.legend(frameon=False, loc="outside right upper", fontsize=9)
    else:
        axes.legend(frameon=False)
    axes.set_title(f"95% intervals over {tables['unit']}s; up and to the right is better", fontsize=9)
    figure.savefig(content := io.BytesIO(), format="png")
    pyplot.close(figure)
    return content.getvalue()


def save_references(references: dict[str, list[Image.Image]], folder: Path) -> dict[str, list[str]]:
    """Save copies of at most 512 pixels, so that the output folder is self-contained. Returns their paths within it."""
    paths = {}
    for subject, pictures in references.items():
        for number, picture in enumerate(pictures):
            name = f"references/{folder_name(subject)}/{number:02d}.png"
            picture = picture.copy()
            picture.thumbnail((512, 512))
            write_files({folder / name: to_png(picture, {})})
            paths.setdefault(subject, []).append(name)
    return paths


def write_report(report: dict, folder: Path) -> None:
    right = {f"right_{name}": name for record in report["records"] for name in record.get("right", {})}
    names = ["subject", "method", "number", "prompt", "kind", "seed", "file", *MEASURES, "logit", *right]
    rows = [
        r | {k: int(r["right"][v]) for k, v in right.items() if v in r.get("right", {})} for r in report["records"]
    ]
    writer = csv.DictWriter(scores := io.StringIO(), names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    texts = {
        "scores.csv": scores.getvalue(),
        "report.md": to_markdown(report),
        "evaluation.json": json.dumps(report, indent=1, ensure_ascii=False) + "\n",
    }
    write_files({folder / name: text.encode() for name, text in texts.items()})


# ----------------------------------------------------------------------------------------------------------------------
# 9. Main
# ----------------------------------------------------------------------------------------------------------------------


def evaluate(cases: list[Case], args: argparse.Namespace) -> dict:
    """Make and score the pictures of all cases, write everything to args.output_dir, and return the report.

    Args:
        cases: checked cases, as from `cases_of`.
        args: the result of `parse_args`.

    Returns:
        The content of evaluation.json: `settings`, `subjects`, `records` (one dict per picture), `tables`, `sheets`.

    Raises:
        UserError: for unusable input, before the pipeline loads.
    """
    # Small files are read first, then the judges, the pipeline last: errors appear early.
    subjects = {case.subject: case for case in reversed(cases)}
    subjects = {case.subject: subjects[case.subject] for case in cases}
    for case in cases:
        check_apart(args.output_dir, case.instance_data_dir)
    check_output_dir(args.output_dir)
    references = {name: read_references(case.instance_data_dir, case.masks) for name, case in subjects.items()}
    jobs = make_jobs(cases, read_embeddings(cases, args), args)
    image_score, text_score = ImageScore(args.dino, args.device), TextScore(args.siglip, args.device)
    for judge in (image_score, text_score):
        judge.load()
    classifiers = load_classifiers(args.classifiers, args.device) if args.classifiers else None
    total = sum(len(job.paths) for job in jobs)
    print(f"{len(subjects)} subjects, {len(jobs)} embeddings, {total} pictures", flush=True)
    count = generate_missing(jobs, args)
    print(f"{count} pictures made, {total - count} kept. Scoring ...", flush=True)

    records = []
    for job in jobs:
        records += score_job(job, references[job.case.subject][1], image_score, text_score, classifiers)
    shown = {name: pictures for name, (pictures, _) in references.items()}
    sheets = draw_sheets(records, shown, args.output_dir)
    for record in records:
        record["file"] = Path(record["file"]).relative_to(args.output_dir).as_posix()
    copies = save_references(shown, args.output_dir)
    report = {
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k in REPORTED},
        "cases": [{k: str(v) if isinstance(v, Path) else v for k, v in asdict(case).items()} for case in cases],
        "subjects": {k: {"class_word": c.class_word, "references": copies[k]} for k, c in subjects.items()},
        "tables": statistics(records),
        "sheets": sheets,
        "records": records,
    }
    write_files({args.output_dir / "scatter.png": draw_scatter(report["tables"])})
    write_report(report, args.output_dir)
    return report


REPORTED = (
    "pretrained_model_name_or_path", "revision", "variant", "single_file_config", "prediction_type",
    "rescale_betas_zero_snr", "seeds", "num_inference_steps", "guidance_scale", "pooling",
    "dtype", "base_precision", "resolution", "complex_human_instruction", "dino", "siglip", "classifiers",
)  # fmt: skip


def main(argv: list[str] | None = None) -> dict:
    transformers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message=".*torch_dtype")  # the only name that all supported versions accept
    args = parse_args(argv)
    report = evaluate(cases_of(args), args)
    measures = report["tables"]["measures"]
    rows = [[row["method"], *(cell(row.get(m)) for m in measures)] for row in report["tables"]["methods"]]
    print(markdown_table(["method", *(MEASURES[m] for m in measures)], rows))
    print(f"Written to {args.output_dir / 'report.md'}")
    return report


if __name__ == "__main__":
    run(main)
