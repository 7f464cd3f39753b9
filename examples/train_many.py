#!/usr/bin/env python
"""Train many subjects. Each process loads the models once and trains one subject at a time.

    accelerate launch --num_processes 4 examples/train_many.py --script train_dti_sdxl.py --subjects subjects.csv \
      --output_dir out --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 --mixed_precision bf16

`subjects.csv` has one row per subject (or `subjects.json` a list of objects), with the training script's option names:

    instance_data_dir,placeholder_token,initializer_token
    photos/dog,<my-dog>,dog
    photos/plushie,<my-bear>,stuffed animal

Any other option can be a column too. Further options on the command line apply to every subject. Paths are relative to the
current folder. A subject is written to `<output_dir>/<name>`: the column `name`, or else its folder's name.

A repeated run skips finished subjects and resumes the others from their checkpoints. A failed subject is reported and does
not stop the others. At the end `<output_dir>/summary.md` lists all results. The exit status is 1 if any subject failed.
"""

import argparse
import csv
import importlib.util
import json
import os
import sys
import time
import traceback
from pathlib import Path

from export import forgive_output


def take_one_device() -> tuple[int, int]:
    """Returns this process's rank and the number of processes, and hides the launch from the training script.

    Subjects are independent, so each process trains alone on one device, without a process group.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    local_rank = os.environ.get("LOCAL_RANK")
    if local_rank is not None:
        number = int(local_rank)
        os.environ["CUDA_VISIBLE_DEVICES"] = (
            devices[number] if number < len(devices) and devices[number] else local_rank
        )
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    return rank, world


def load_script(path: Path):
    """Import the training script. Its `main`, `MODEL_CLASS` and `UserError` are used."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    script = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = script
    spec.loader.exec_module(script)
    return script


def loading_once(model_class: type) -> type:
    """A subclass of the script's model class whose `load` reuses the loaded parts if the options are the same.

    The last subject's new word and adapters are removed first, and the parts go back to their original device and dtype.
    In half precision the encoders' other weights stay rounded, which `--init contextual` sees.
    """
    kept = {}

    class LoadedOnce(model_class):
        def load(self, dtype):
            names = ("pretrained_model_name_or_path", "revision", "variant", "gradient_checkpointing", "compile")
            names += ("base_precision", "pooling", "max_sequence_length", "complex_human_instruction")
            names += ("prediction_type", "rescale_betas_zero_snr", "single_file_config")
            key = (dtype, *(getattr(self.args, name, None) for name in names))
            if key not in kept:
                kept.clear()  # one set of parts at a time
                own = vars(self).copy()
                super().load(dtype)
                vocabularies = [encoder.get_input_embeddings() for encoder in self.text_encoders]
                parts = {name: part for name, part in vars(self).items() if name not in own}
                kept[key] = parts, vocabularies, [vocabulary.weight.data for vocabulary in vocabularies]
            parts, *words = kept[key]
            vars(self).update(parts)
            for encoder, vocabulary, rows in zip(self.text_encoders, *words, strict=True):
                encoder.set_input_embeddings(vocabulary)
                encoder.to("cpu", rows.dtype)
                vocabulary.weight.data = rows  # with their full precision
            self.vae.to("cpu")
            self.denoiser.to("cpu")
            if hasattr(self.denoiser, "peft_config"):
                self.denoiser.unload_lora()
                self.denoiser.eval()

    return LoadedOnce


def read_subjects(path: Path) -> list[dict]:
    """Read the subjects from a CSV or JSON file, each with a unique `name`."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            subjects = json.load(file) if path.suffix == ".json" else list(csv.DictReader(file))
        for subject in subjects:
            subject["name"] = subject.get("name") or Path(subject["instance_data_dir"]).name
    except KeyError as error:
        sys.exit(f"train_many.py: error: --subjects {path}: a subject has no {error}.")
    except (OSError, ValueError, TypeError, AttributeError, csv.Error) as error:
        sys.exit(f"train_many.py: error: --subjects {path} cannot be read as a list of subjects: {error}")
    names = [subject["name"] for subject in subjects]
    twice = {name for name in names if names.count(name) > 1}
    if twice or not names:
        problem = f"{', '.join(sorted(twice))} occurs twice: add a column `name`" if twice else "it has no subjects"
        sys.exit(f"train_many.py: error: --subjects {path}: {problem}.")
    return subjects


def train_subject(script, model_class: type, subject: dict, output_dir: Path, common: list[str]) -> str:
    """Train one subject unless it is finished. Returns the result for the summary."""
    folder = output_dir / subject["name"]
    if (folder / "learned_embeds.safetensors").is_file():
        return "finished before"
    options = [f"--{k}={v}" for k, v in subject.items() if k != "name" and v not in (None, "")]
    try:
        arguments = [*common, *options, f"--output_dir={folder}", "--resume_from_checkpoint=latest"]
        script.main(arguments, model_class)
    except script.UserError as error:
        return f"failed: {error}"
    except SystemExit as error:
        if error.code in (130, 143):  # interrupted: the next run continues with this subject
            raise
        return f"failed: see above (exit status {error.code})"
    except Exception as error:  # no error of one subject may stop the others
        traceback.print_exc()
        return f"failed: {type(error).__name__}: {error}"
    return "trained"


def summarise(output_dir: Path, rank: int, world: int, rows: list[dict]) -> list[dict] | None:
    """Save this process's rows. The last process to finish writes all of them to summary.md and returns them."""
    notes = [output_dir / f".summary-{number}-of-{world}.json" for number in range(world)]
    temporary = notes[rank].with_suffix(".tmp")
    temporary.write_text(json.dumps(rows))
    temporary.replace(notes[rank])
    if not all(note.is_file() for note in notes):
        return None
    try:
        rows = [row for note in notes for row in json.loads(note.read_text())]
        for note in notes:
            note.unlink()
    except FileNotFoundError:  # another process finished at the same moment and wrote the summary
        return None
    lines = ["| subject | result | seconds |", "| --- | --- | --- |"]
    lines += [
        f"| {row['name']} | {row['result']} | {row['seconds']:.0f} |" for row in sorted(rows, key=lambda r: r["name"])
    ]
    (output_dir / "summary.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n" + "\n".join(lines))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--script", type=Path, required=True, help="train_dti_sdxl.py, train_dti_sana.py or train_dti_sd.py"
    )
    parser.add_argument("--subjects", type=Path, required=True, help="CSV or JSON file with one row per subject.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Output folder, with one folder per subject.")
    args, common = parser.parse_known_args()
    subjects = read_subjects(args.subjects)
    args.output_dir.mkdir(parents=True, exist_ok=True)

    rank, world = take_one_device()
    (args.output_dir / f".summary-{rank}-of-{world}.json").unlink(missing_ok=True)  # left by an interrupted run
    script = load_script(args.script)
    model_class = loading_once(script.MODEL_CLASS)
    script.interruption.listen()
    rows = []
    for subject in subjects[rank::world]:
        start = time.perf_counter()
        result = train_subject(script, model_class, subject, args.output_dir, common)
        print(f"{subject['name']}: {result}", flush=True)
        rows.append({"name": subject["name"], "result": result, "seconds": time.perf_counter() - start})
    # Only the last process reports failures by its exit status: a launcher stops all processes when one fails.
    everything = summarise(args.output_dir, rank, world, rows) or []
    sys.exit(any(row["result"].startswith("failed") for row in everything))


if __name__ == "__main__":
    forgive_output()
    main()
