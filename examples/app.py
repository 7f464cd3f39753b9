#!/usr/bin/env python
"""One page in the browser for all of it: photographs in, training with its curves, pictures out, a slider between two words.

    pip install "gradio>=6"
    python examples/app.py

Without a model the page uses the miniature world's, which trains on a laptop's CPU, and offers its photographs. For your own:

    python examples/app.py --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 --output_dir out/app

The model decides which training script is used. Options that this script does not have go to the training script, such as
--mixed_precision bf16 (the default on a GPU), --preset fast or --rank 32; those on model, precision and resolution go to both.

The training is a process of its own. It goes on while the page is closed or reloaded. Stop, and the end of this script, let it
save a checkpoint, from which Resume goes on. Written to --output_dir: `words/<word>`, the training script's output folder and
its log.txt; and `photographs/`, copies of what was given to it. The page is served to this computer only.

Sections: 1 options, 2 training process, 3 pictures, 4 page, 5 main.
"""

import argparse
import contextlib
import functools
import html
import importlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import diffusers
import torch
import transformers
from evaluate import MINIATURE, miniature
from export import Embedding, UserError, check_output_dir, make_parser, read_embedding, run, web_name
from generate import (
    ENCODERS,
    add_model_options,
    choose_device,
    choose_dtype,
    configured_as,
    fill_prompt,
    find_loras,
    generate_pairs,
    load_embedding,
    load_loras,
    number,
    pipeline_family,
    sampling,
    settle_options,
    start_pipeline,
    thumbnail,
)
from interpolate import interpolate
from pictures import open_picture, training
from PIL import Image
from rescale import check_fits, model_family


os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # else gradio reports every start
try:
    import gradio as gr
    import pandas as pd  # gradio needs it
except ImportError:
    gr = None

SCRIPTS = {"sdxl": "train_dti_sdxl", "sana": "train_dti_sana", "sd": "train_dti_sd"}
# Options of generate.py that the training scripts have too.
SHARED = ("pretrained_model_name_or_path", "revision", "variant", "single_file_config", "prediction_type")
SHARED += ("rescale_betas_zero_snr", "complex_human_instruction", "base_precision", "resolution")
CURVES = {"loss": "loss", "angle_to_initializer": "angle to the class word (degrees)", "norm": "norm"}


# ----------------------------------------------------------------------------------------------------------------------
# 1. Options
# ----------------------------------------------------------------------------------------------------------------------


def command_line() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    add = parser.add_argument
    # fmt: off
    add("--output_dir", type=Path, default=Path("app-runs"), help="Folder for the learned words and the photographs. Default: app-runs.")
    add("--port", type=number(int, 1), default=None, help="Port of the page on 127.0.0.1. Default: the first free one from 7860.")
    # fmt: on
    add_model_options(parser, model_required=False)
    parser.set_defaults(pretrained_model_name_or_path=str(MINIATURE / "sdxl"))
    parser.set_defaults(scheduler="paper", seeds=None)  # what generate.py's functions ask for besides
    return parser


def is_miniature(model: str) -> bool:
    return MINIATURE.resolve() in Path(model).resolve().parents


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The options, checked; `further` holds those for the training script. Raises UserError."""
    args, args.further = command_line().parse_known_args(argv)
    if gr is None or int(gr.__version__.partition(".")[0]) < 6:
        raise UserError('The page needs gradio 6 or newer: pip install "gradio>=6"')
    if args.enable_sequential_cpu_offload:
        raise UserError("--enable_sequential_cpu_offload would hide new words: use --enable_model_cpu_offload.")
    model = args.pretrained_model_name_or_path
    args.family = model_family(configured_as(model, args.single_file_config), args.revision)
    settle_options(args, args.family)
    args.device = choose_device(args)
    args.script = importlib.import_module(SCRIPTS[args.family])

    given = {name: getattr(args, name) for name in SHARED}
    if is_miniature(model) and given["resolution"] is None:
        given["resolution"] = 64
    shared = [f"--{name}={value}" for name, value in given.items() if value not in (None, False, "auto", "none")]
    shared += ["--mixed_precision=bf16"] if torch.cuda.is_available() else []
    args.further = [*shared, *args.further]
    try:  # its defaults, and an option that it does not have ends here in its own message
        words = ["--placeholder_token=<word>", "--output_dir=words"]
        args.training = training.parse_args([*args.further, *words], args.script.MODEL_CLASS)
    except training.UserError as error:
        raise UserError(str(error)) from None
    return args


# ----------------------------------------------------------------------------------------------------------------------
# 2. Training process
# ----------------------------------------------------------------------------------------------------------------------


def last_lines(path: Path, size: int = 20_000) -> list[str]:
    """The lines in the last `size` bytes of a file, a progress bar's states among them; none if there is no file."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - size))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return [line for line in re.split(r"[\r\n]+", text) if line.strip()]


class Trainer:
    """The training process, at most one at a time, and what the runs have written.

    A run is the folder of a learned word; what is told of it is read from there, so that it outlives page and process.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.words = args, args.output_dir / "words"
        self.process, self.folder, self.stopping, self.lock = None, None, False, threading.Lock()

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def runs(self) -> list[str]:
        """The names of all runs, the last one that was written to first."""
        folders = [path for path in self.words.glob("*") if path.is_dir()]
        return [path.name for path in sorted(folders, key=lambda path: path.stat().st_mtime, reverse=True)]

    def learned(self) -> list[str]:
        """The names of the runs that have finished."""
        return sorted(name for name in self.runs() if self.finished(self.words / name))

    def finished(self, folder: Path) -> bool:
        return (folder / "learned_embeds.safetensors").is_file() and not (self.running and folder == self.folder)

    def start(self, photographs: list[str], word: str, class_word: str, steps: str, vectors: str, prompts: str) -> str:
        """Start a new run and return its name. The training script checks what it is given. Raises UserError."""
        if not word:
            raise UserError("There is no new word yet: write one, such as <my-dog>.")
        folder = self.words / web_name(word)
        if self.finished(folder) or any(folder.glob("checkpoint-*")):
            raise UserError(f"{word} is there already: resume its training, choose another word, or delete {folder}.")
        names = [Path(file).name for file in photographs]
        if twice := {name for name in names if names.count(name) > 1}:
            raise UserError(f"Two photographs have the name {min(twice)}: rename one.")
        folders = (self.args.output_dir / "photographs" / f"{folder.name}-{n}" for n in itertools.count(1))
        copies = next(path for path in folders if not path.exists())
        every = max(1, min(10, int(steps) // 20)) if steps.isdecimal() else 10  # of what the page shows
        options = ["--report_to=none", f"--logging_steps={every}", f"--checkpointing_steps={every}"]
        options += ["--checkpoints_total_limit=2"]
        if prompts.strip():
            seen = max(1, int(steps) // 4) if steps.isdecimal() else 100
            options += ["--validate_first", f"--validation_steps={seen}", "--num_validation_images=3"]
            options += [f"--validation_prompt={line}" for line in prompts.splitlines() if line.strip()]
        options += self.args.further  # they win over the page's choices, and its fields over them
        options += [f"--instance_data_dir={copies}", f"--output_dir={folder}", f"--placeholder_token={word}"]
        options += [f"--initializer_token={class_word}", f"--max_train_steps={steps}"]
        options += [f"--num_vectors={vectors}"] if vectors else []
        with self.lock:
            self.check_free()
            copies.mkdir(parents=True)
            for file in photographs:
                shutil.copy(file, copies)
            check_output_dir(folder)
            (folder / "training_options.json").unlink(missing_ok=True)  # of a run that never had a step
            self.launch(folder, options)
        return folder.name

    def resume(self, name: str) -> None:
        """Go on with a run from its last checkpoint, with the options that it was started with. Raises UserError."""
        with self.lock:
            self.check_free()
            options = self.words / name / "training_options.json"
            self.launch(self.words / name, [f"--config={options}", "--resume_from_checkpoint=latest"])

    def check_free(self) -> None:
        if self.running:
            raise UserError(f"{self.folder.name} is being trained: stop it, or wait until it is finished.")

    def launch(self, folder: Path, options: list[str]) -> None:
        environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
        with (folder / "log.txt").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-u", self.args.script.__file__, *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # the terminal's Ctrl-C reaches this process, which stops that one by `stop`
            )
        self.folder, self.stopping = folder, False

    def stop(self) -> None:
        """Let the training finish its step and save a checkpoint. It does not wait for that."""
        with self.lock:
            if self.running and not self.stopping:  # a second signal would end it without a checkpoint
                self.stopping = True
                self.process.terminate()

    def close(self) -> None:
        """Stop the training and wait for its checkpoint."""
        if self.running:
            print(f"{self.folder.name} is stopped. Resume goes on from its checkpoint.")
            self.stop()
            self.process.wait()

    def entries(self, folder: Path) -> tuple[int, list[dict]]:
        """The last checkpoint's step, 0 without one, and its log entries, from which the curves are drawn."""
        states = {int(path.parent.name.partition("-")[2]): path for path in folder.glob("checkpoint-*/state.json")}
        for step in sorted(states, reverse=True):
            with contextlib.suppress(OSError, ValueError, KeyError):  # removed at this moment
                return step, json.loads(states[step].read_text(encoding="utf-8"))["entries"]
        return 0, []

    def status(self, name: str) -> tuple[str, float | None]:
        """What a run does or how it ended, in words, and the share of its steps that are done, if that is known."""
        folder = self.words / name
        lines = last_lines(folder / "log.txt")
        step, total, left = self.entries(folder)[0], None, "?"
        with contextlib.suppress(OSError, ValueError, KeyError):
            options = json.loads((folder / "training_options.json").read_text(encoding="utf-8"))["options"]
            total = options["max_train_steps"]
        bars = [bar for line in lines if (bar := re.search(r"^Steps:.* (\d+)/(\d+) \[.*?<([^,]*)", line))]
        if self.running and folder == self.folder:
            if bars:
                step, total, left = int(bars[-1][1]), int(bars[-1][2]), bars[-1][3]
            if self.stopping:
                return "Stopping. The step is finished and a checkpoint saved.", step / total if total else None
            if not bars:
                return "Starting. The models are loaded and the photographs encoded.", 0
            if step == total:
                return f"All {total} steps are done. The result is saved and the last pictures are drawn.", 1
            return f"Training: step {step} of {total}" + (f", {left} left." if "?" not in left else "."), step / total
        if self.finished(folder):
            return f"Finished{f' after {total} steps' if total else ''}. Use the word under Draw.", 1
        errors = [error[1] for line in lines if (error := re.match(r"(?:\S+\.py: )?error: (.+)", line))]
        if errors:
            return f"Error: {errors[-1]}", None
        if any(line.startswith(("Stopped after step", "Interrupted.")) for line in lines[-3:]):
            resume = (
                f" after step {step} of {total}. Resume goes on from there." if step else " before the first step."
            )
            return f"Stopped{resume}", step / total if step else None
        last = lines[-1] if lines else "nothing"
        return f"Error: the training ended early; its last words are: {last} ({folder / 'log.txt'} has all)", None

    def resumable(self, name: str) -> bool:
        """Whether a run has begun, and neither runs nor is finished."""
        begun = (self.words / name / "training_options.json").is_file()
        return begun and not self.running and not self.finished(self.words / name)


# ----------------------------------------------------------------------------------------------------------------------
# 3. Pictures
# ----------------------------------------------------------------------------------------------------------------------


def put_word(pipe, embedding: Embedding) -> str:
    """Put vectors behind a word of the pipeline, and return that word. Raises EmbeddingError if they do not fit.

    Embeddings with as many vectors share a word, the last one's vectors count: so a slider does not fill the vocabulary.
    """
    encoders = {name: getattr(pipe, name) for name in ENCODERS[pipeline_family(pipe)]}
    widths = {name: x.get_input_embeddings().weight.shape[-1] for name, x in encoders.items()}
    check_fits(embedding, widths, embedding.token, type(pipe).__name__)
    alias = f"<app-{len(embedding)}>"
    if alias not in pipe.tokenizer.get_vocab():
        load_embedding(pipe, replace(embedding, token=alias))
    names = [alias, *(f"{alias}_{index}" for index in range(1, len(embedding)))]  # as diffusers' loader has them
    for name, encoder in encoders.items():
        ids = getattr(pipe, name.replace("text_encoder", "tokenizer")).convert_tokens_to_ids(names)
        rows = encoder.get_input_embeddings().weight.data
        rows[ids] = embedding.vectors[name].to(rows)
    return alias


class Painter:
    """The pipeline, which is loaded for the first picture, and gives a GPU up when a training starts."""

    def __init__(self, args: argparse.Namespace, trainer: Trainer):
        self.args, self.trainer, self.pipe, self.loras = args, trainer, None, []

    def release(self) -> None:
        if self.args.device != "cpu":
            self.pipe = None
            diffusers.training_utils.free_memory()

    def load(self, loras: list[Path]):
        """The pipeline with these LoRA weights. Raises UserError."""
        if self.trainer.running and self.args.device != "cpu":
            raise UserError("The training has the GPU: wait until it is finished, or stop it. Resume goes on later.")
        if self.pipe is None:
            dtype = choose_dtype(self.args.dtype, self.args.family, self.args.device)
            self.pipe, self.loras = start_pipeline(self.args, dtype, self.args.device, [], []), []
        if self.loras != loras:
            self.pipe.unload_lora_weights()
            load_loras(self.pipe, loras)
            self.loras = loras
        return self.pipe

    def draw(
        self, words: list[Path], t: float, prompt: str, seeds: list[int], guidance_scale: float
    ) -> Iterator[Image.Image]:
        """Draw a prompt with each seed. Of two words it draws the one at `t` between them. Raises UserError."""
        embeddings = [read_embedding(folder) for folder in words]
        drawn = embeddings[0] if len(words) == 1 else interpolate(*embeddings, t)
        for embedding in embeddings:
            prompt = prompt.replace(embedding.token, "{}")
        if "{}" not in prompt:
            raise UserError(f"The prompt lacks the word: write {{}} or {embeddings[0].token} where it stands.")
        pipe = self.load(find_loras(words, self.args.family) if len(words) == 1 else [])
        prompt = fill_prompt(prompt, [put_word(pipe, drawn)])
        options = sampling(self.args) | {"guidance_scale": guidance_scale}
        try:
            yield from (image for *_, image in generate_pairs(pipe, [(prompt, seed) for seed in seeds], **options))
        except torch.cuda.OutOfMemoryError:
            raise UserError(
                "The GPU's memory is too small: start this script with --base_precision int8, --enable_model_cpu_offload"
                " or --enable_vae_tiling."
            ) from None


# ----------------------------------------------------------------------------------------------------------------------
# 4. Page
# ----------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def shown():
    """Show a user's mistake on the page, until it is closed there."""
    try:
        yield
    except UserError as error:
        raise gr.Error(html.escape(str(error)), duration=None, print_exception=False) from None


def bar(text: str, share: float | None) -> str:
    """The status as HTML: the text, and how far it is."""
    progress = "" if share is None else f'<progress max="1" value="{share:.3f}"></progress>'
    kind = ' class="error"' if text.startswith("Error:") else ""
    return f'<div role="status"{kind}>{html.escape(text)}{progress}</div>'


def curve(entries: list[dict], key: str):
    """A curve's points: the loss, or a value of each text encoder."""
    points = [
        {"step": entry["step"], "value": value, "encoder": name.partition("/")[0].replace("_", " ")}
        for entry in entries
        for name, value in entry.items()
        if name == key or name.endswith(f"/{key}")
    ]
    return pd.DataFrame(points, columns=["step", "value", "encoder"])


def validation_pictures(folder: Path) -> list[Path]:
    """The validation pictures, the newest first."""
    return sorted(folder.glob("validation-*.png"), key=lambda path: -int(path.stem.partition("-")[2]))


def opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


@functools.cache
def example_photographs(concept: str) -> list[str]:
    """The files of the miniature's photographs of one of its subjects, all taken on the beach."""
    world, folder = miniature("world"), Path(tempfile.mkdtemp(prefix="dti-"))
    for index, picture in enumerate(world.instance_pictures(world.CONCEPTS[concept], place="beach")):
        picture.save(folder / f"{index}.png")
    return [str(path) for path in sorted(folder.iterdir())]


def training_page(args: argparse.Namespace, trainer: Trainer, painter: Painter) -> dict:
    """The tab Train. Returns its components by name, and those that `refresh` keeps up to date."""
    small = is_miniature(args.pretrained_model_name_or_path)
    with gr.Row():
        with gr.Column(min_width=300):
            gr.Markdown("### 1. Photographs")
            photographs = gr.File(
                label="Three to six photographs; a .txt beside each, of its name, is its caption",
                file_count="multiple",
                elem_id="photographs",
            )
            looks = gr.Gallery(
                show_label=False,
                columns=6,
                fit_columns=False,
                height="auto",
                visible=False,
                format="png",
                elem_id="looks",
            )
            with gr.Row(visible=small):
                fish = gr.Button("Example: a fish", size="sm")
                heart = gr.Button("Example: a heart", size="sm")
            gr.Markdown("### 2. Word")
            with gr.Row():
                word = gr.Textbox(label="New word", placeholder="<my-dog>", min_width=130)
                class_word = gr.Textbox(label="Class word", placeholder="dog", min_width=130)
            with gr.Row():
                steps = gr.Textbox(label="Steps", value=str(args.training.max_train_steps), min_width=130)
                vectors = gr.Textbox(
                    label="Vectors", value="4" if small else "", placeholder="as the class word has", min_width=130
                )
            prompts = gr.Textbox(
                label="Prompts to watch it by, one a line", value="a photo of a {} at night", lines=2, max_lines=4
            )
            start = gr.Button("Start training", variant="primary")
        with gr.Column(min_width=300):
            gr.Markdown("### 3. Training")
            chosen = gr.Dropdown(
                label="Word that is shown here", choices=trainer.runs(), value=next(iter(trainer.runs()), None)
            )
            status = gr.HTML()
            with gr.Row():
                stop = gr.Button("Stop", interactive=False, min_width=100)
                resume = gr.Button("Resume", interactive=False, min_width=100)
            gallery = gr.Gallery(
                show_label=False,
                columns=1,
                height=330,
                object_fit="contain",
                format="png",
                elem_id="validation",
                visible=False,
            )
            plots = {}
            with gr.Column(elem_id="curves"):
                for key, title in CURVES.items():
                    shape = {"height": 200, "buttons": [], "visible": False}
                    shape |= {} if key == "loss" else {"color": "encoder"}
                    plots[key] = gr.LinePlot(x="step", y="value", title=title, y_title=" ", **shape)

    def look_at(files):
        kept = [file for file in files or [] if Path(file).suffix.lower() in training.IMAGE_SUFFIXES]
        with shown():
            return gr.update(value=[thumbnail(open_picture(Path(file))) for file in kept], visible=bool(kept))

    def begin(files, *fields):
        with shown():
            name = trainer.start(files or [], *(field.strip() for field in fields))
            painter.release()
            return gr.update(choices=trainer.runs(), value=name)

    def go_on(name):
        with shown():
            trainer.resume(name)
            painter.release()

    photographs.change(look_at, photographs, looks)
    for button, concept in ((fish, "clown_fish"), (heart, "two_faced_heart")):
        values = [f"<{concept.replace('_', '-')}>", concept.rpartition("_")[2]]
        button.click(
            lambda concept=concept, values=values: [example_photographs(concept), *values],
            None,
            [photographs, word, class_word],
        )
    start.click(begin, [photographs, word, class_word, steps, vectors, prompts], chosen)
    stop.click(trainer.stop)
    resume.click(go_on, chosen)
    return {"chosen": chosen, "status": status, "stop": stop, "resume": resume, "gallery": gallery, **plots}


def drawing_page(args: argparse.Namespace, trainer: Trainer, painter: Painter) -> dict:
    """The tab Draw. Returns the components that `refresh` keeps up to date."""
    learned = trainer.learned()
    with gr.Row():
        with gr.Column(min_width=300):
            first = gr.Dropdown(label="Learned word", choices=learned, value=next(iter(learned), None))
            prompt = gr.Textbox(label="Prompt, with {} for the word", value="a photo of a {} in the snow", lines=2)
            with gr.Row():
                count = gr.Slider(1, 12, 4, step=1, label="Pictures", min_width=130, buttons=[])
                guidance = gr.Slider(0, 15, args.guidance_scale, step=0.1, label="Guidance", min_width=130, buttons=[])
                seed = gr.Number(0, label="First seed", precision=0, minimum=0, min_width=130)
            second = gr.Dropdown(
                label="Second word, for pictures between the two", choices=["none", *learned], value="none"
            )
            t = gr.Slider(0, 1, 0.5, step=0.05, label="From the first word (0) to the second (1)", visible=False)
            button = gr.Button("Draw", variant="primary")
        with gr.Column(min_width=300):
            note = gr.HTML()
            pictures = gr.Gallery(
                show_label=False, columns=2, fit_columns=False, height="auto", format="png", elem_id="pictures"
            )

    def draw(first, second, t, prompt, count, seed, guidance):
        with shown():
            if first is None:
                raise UserError("There is no learned word yet: train one first.")
            slow = " The training runs beside it, which slows both." if trainer.running else ""
            words = [trainer.words / name for name in (first, second) if name != "none"]
            done = []
            yield bar(f"{'Drawing.' if painter.pipe else 'Loading the model.'}{slow}", 0), gr.skip()
            for image in painter.draw(words, t, prompt, list(range(seed or 0, (seed or 0) + count)), guidance):
                done.append(image)
                yield bar(f"{len(done)} of {count} pictures.{slow}", len(done) / count), done

    second.change(lambda name: gr.update(visible=name != "none"), second, t)
    fields = [first, second, t, prompt, count, seed, guidance]
    gr.on([button.click, prompt.submit, t.release], draw, fields, [note, pictures], trigger_mode="always_last")
    return {"first": first, "second": second}


def build_page(args: argparse.Namespace, trainer: Trainer, painter: Painter):
    """The whole page, which asks every second what is new in the folder of the run that it shows."""
    with gr.Blocks(title="Directional Textual Inversion", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        model = args.pretrained_model_name_or_path
        model = f"the miniature world's {args.family}" if is_miniature(model) else model
        gr.Markdown(f"# Teach a model a new word\nModel: {model}. Words and photographs stay in {args.output_dir}.")
        with gr.Tab("Train"):
            parts = training_page(args, trainer, painter)
        with gr.Tab("Draw"):
            parts |= drawing_page(args, trainer, painter)
        seen = gr.State({})

        def refresh(name, first, known):
            runs, learned = trainer.runs(), trainer.learned()
            folder = trainer.words / (name or "")
            text, share = trainer.status(name) if name in runs else ("No word has been trained yet.", None)
            entries, pictures = trainer.entries(folder)[1], validation_pictures(folder)
            running = trainer.running and folder == trainer.folder
            now = {
                "chosen": (runs, lambda: gr.update(choices=runs)),
                "status": ([name, text, share], lambda: bar(text, share)),
                "stop": (running and not trainer.stopping, lambda: gr.update(interactive=now["stop"][0])),
                "resume": (name and trainer.resumable(name), lambda: gr.update(interactive=bool(now["resume"][0]))),
                "gallery": (
                    [name, *(path.name for path in pictures)],
                    lambda: gr.update(
                        value=[(opened(path), f"step {path.stem.partition('-')[2]}") for path in pictures],
                        visible=bool(pictures),
                    ),
                ),
                "first": (learned, lambda: gr.update(choices=learned, value=first or next(iter(learned), None))),
                "second": (learned, lambda: gr.update(choices=["none", *learned])),
            }
            drawn = [name, entries[-1]["step"] if entries else 0]
            for key in CURVES:
                now[key] = (drawn, lambda key=key: gr.update(value=curve(entries, key), visible=bool(entries)))
            changed = {parts[key]: update() for key, (state, update) in now.items() if known.get(key, ...) != state}
            return changed | {seen: {key: state for key, (state, _) in now.items()}}

        def newest():
            runs = trainer.runs()
            return gr.update(choices=runs, value=trainer.folder.name if trainer.running else next(iter(runs), None))

        inputs, outputs = [parts["chosen"], parts["first"], seen], [*parts.values(), seen]
        page.load(newest, None, parts["chosen"], show_progress="hidden")
        gr.Timer(1).tick(refresh, inputs, outputs, show_progress="hidden")
    return page


# ----------------------------------------------------------------------------------------------------------------------
# 5. Main
# ----------------------------------------------------------------------------------------------------------------------


CSS = """
[role=status] progress { appearance: none; border: 0; background: #e4e4e7; }
[role=status] progress { display: block; width: 100%; height: 10px; margin-top: 6px; }
[role=status] progress::-webkit-progress-bar { background: #e4e4e7; }
[role=status] progress::-webkit-progress-value { background: #f97316; }
[role=status] progress::-moz-progress-bar { background: #f97316; }
#validation .thumbnail-item { aspect-ratio: auto; height: auto; }
[role=status].error { color: #b00020; overflow-wrap: anywhere; }
"""


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    transformers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.set_verbosity_error()
    check_output_dir(args.output_dir)
    trainer = Trainer(args)
    page = build_page(args, trainer, Painter(args, trainer))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        page.launch(
            server_name="127.0.0.1",
            server_port=args.port,
            share=False,
            quiet=True,
            ssr_mode=False,
            footer_links=[],
            prevent_thread_lock=True,
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
            css=CSS,
        )
        print(f"Open {page.local_url} in a browser. Ctrl-C ends this script.", flush=True)
        page.block_thread()
    except OSError:
        raise UserError(f"--port {args.port or 'from 7860'} is in use: give another one.") from None
    finally:
        trainer.close()


if __name__ == "__main__":
    run(main)
