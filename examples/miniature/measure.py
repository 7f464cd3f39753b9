"""Measure how well the miniature's generator draws what prompts say, and show it.

    python measure.py                                   # 400 prompts, 25 steps, guidance 5
    python measure.py --model sana --count 40 --guidance_scale 1.5

Prompts are captions of scenes from a seed range that no training uses. Attribute classifiers (`classifiers/`, trained on
other seeds) judge a picture, each attribute only if the prompt states it. Concepts, whose looks the training captions never
name, are prompted by descriptions in words and counted separately.

Writes `report.json`, `report.md`, `grid.png` and `concepts.png` to --output_dir. In the sheets, the words in brackets are the
attributes that the classifiers read differently from the prompt.
"""

import argparse
import json
import time
from pathlib import Path

import judges
import torch
import world


HERE = Path(__file__).resolve().parent
FIRST_SEED = 30_000_000
TARGETS = {
    "shape": 95,
    "place": 95,
    "prop": 95,
    "style": 95,
    "colour": 90,
    "pattern": 75,
    "relation": 75,
    "second object": 75,
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=HERE / "sdxl", help="pipeline folder")
    parser.add_argument("--output_dir", type=Path, default=HERE / "report", help="folder for the report and the grid")
    parser.add_argument("--count", type=int, default=400, help="number of prompts")
    parser.add_argument("--steps", type=int, default=25, help="sampling steps")
    parser.add_argument("--guidance_scale", type=float, default=5.0)
    parser.add_argument("--batch", type=int, default=50, help="pictures per batch")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def held_out_prompts(count):
    """(seed, scene, prompt, stated attributes) of scenes that no training uses."""
    prompts = []
    for seed in range(FIRST_SEED, FIRST_SEED + count):
        scene = world.sample_scene(seed)
        prompts.append((seed, scene, *world.caption(scene, seed, leave_out=0.08)))
    return prompts


def concept_prompts(each=4):
    """Prompts that describe the subject concepts in words, in several places."""
    prompts = []
    for concept in world.CONCEPTS.values():
        for seed in range(each if concept.subject else 0):
            scene = world.concept_scene(concept, 50 + seed)
            place = world.PLACE_WORDS[scene.place][0]
            said = {"shape", "colour", "pattern", "colour2", "place", "style"} | (
                {"eyes"} if concept.subject.eyes else set()
            )
            prompts.append((seed, scene, f"a photo of {world.article(concept.description)} {place}", frozenset(said)))
    return prompts


# SanaPipeline's defaults are for prompts of 300 tokens and pictures of at least 1024 pixels.
SANA_OPTIONS = {"complex_human_instruction": None, "use_resolution_binning": False, "max_sequence_length": 48}


def generate(pipe, prompts, args):
    """One picture per prompt, with noise from the prompt's own seed."""
    options = SANA_OPTIONS if hasattr(pipe, "transformer") else {}
    pictures = []
    for i in range(0, len(prompts), args.batch):
        part = prompts[i : i + args.batch]
        pictures += pipe(
            [text for _, _, text, _ in part],
            height=world.SIZE,
            width=world.SIZE,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for seed, *_ in part],
            **options,
        ).images
    return pictures


def compare(scene, stated, read):
    """Whether each stated attribute is right. "second object" requires both its shape and colour."""
    truth = world.attributes(scene)
    verdict = {k: read[k] == truth[k] for k in stated}
    if {"other_shape", "other_colour"} <= stated:
        verdict["second object"] = verdict["other_shape"] and verdict["other_colour"]
    return verdict


def tally(verdicts):
    """{attribute: (percent right, how often stated)}."""
    table = {}
    for key in (*TARGETS, *(k for k in world.LABELS if k not in TARGETS)):
        hits = [v[key] for v in verdicts if key in v]
        if hits:
            table[key] = (round(100 * sum(hits) / len(hits), 1), len(hits))
    return table


def markdown(table, concepts):
    lines = [
        "| attribute | right, % | prompts that state it | target, % | concepts in words, % |",
        "| --- | --- | --- | --- | --- |",
    ]
    for key, (percent, count) in table.items():
        worded = concepts[key][0] if key in concepts else ""
        lines.append(f"| {key} | {percent} | {count} | {TARGETS.get(key, '')} | {worded} |")
    return "\n".join(lines) + "\n"


def captioned(prompts, verdicts, reads):
    texts = []
    for (_, _, text, _), verdict, read in zip(prompts, verdicts, reads, strict=False):
        wrong = [f"{k}: {read[k]}" for k, right in verdict.items() if not right and k in read]
        texts.append(text + (f" [{', '.join(wrong)}]" if wrong else ""))
    return texts


def main(argv=None):
    from diffusers import DiffusionPipeline

    args = parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    pipe = DiffusionPipeline.from_pretrained(args.model).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    classifiers = judges.load_classifiers()
    prompts, worded = held_out_prompts(args.count), concept_prompts()
    began = time.time()
    pictures = generate(pipe, prompts, args)
    seconds = (time.time() - began) / len(pictures)
    reads = classifiers.read(pictures)
    verdicts = [compare(scene, stated, read) for (_, scene, _, stated), read in zip(prompts, reads, strict=False)]
    worded_pictures = generate(pipe, worded, args)
    worded_reads = classifiers.read(worded_pictures)
    worded_verdicts = [compare(s, stated, read) for (_, s, _, stated), read in zip(worded, worded_reads, strict=False)]
    table, concepts = tally(verdicts), tally(worded_verdicts)
    settings = {
        "prompts": args.count,
        "steps": args.steps,
        "guidance_scale": args.guidance_scale,
        "seconds_a_picture": round(seconds, 3),
    }
    report = settings | {"accuracy": table, "targets": TARGETS, "concepts_in_words": concepts}
    (args.output_dir / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.output_dir / "report.md").write_text(markdown(table, concepts))
    texts = captioned(prompts, verdicts, reads)
    world.sheet(pictures[:48], texts[:48]).save(args.output_dir / "grid.png")
    world.sheet(worded_pictures, captioned(worded, worded_verdicts, worded_reads)).save(
        args.output_dir / "concepts.png"
    )
    print(json.dumps(settings))
    print(markdown(table, concepts))


if __name__ == "__main__":
    main()
