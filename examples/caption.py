#!/usr/bin/env python
"""Write captions beside photographs by a vision-language model, and propose the class word.

    python examples/caption.py --instance_data_dir photos/dog
    python examples/caption.py --instance_data_dir photos/dog --class_word dog

The first line says how the model calls the subject, for --initializer_token. Where it calls it the same in every photograph,
or with --class_word, it writes a file such as photos/dog/01.txt for each, with {} for the subject, which the training scripts
read. Captions that are there stay as they are. Correct what the model has written: it is text.

--model is a folder or Hub id of any chat model that transformers' image-text-to-text pipeline loads. Qwen2.5-VL needs
`pip install torchvision` too.
"""

import argparse
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import transformers
from export import UserError, make_parser, run, write_files
from generate import choose_device, one_line
from generate import number as at_least
from pictures import open_picture, pictures_in
from PIL import Image


QWEN = "Qwen/Qwen2.5-VL-3B-Instruct"
ASK_WORD = "What is the main subject of this photograph? Answer with one or two common words, without an article."
ASK_CAPTION = (
    "In one short sentence, say where the {word} in this photograph is, what it does, and what the background and the light"
    " are. Call it {word}, and do not describe what it looks like."
)
MOST_PIXELS = 1024  # of a side that the model is shown


# fmt: off
def command_line() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--instance_data_dir", type=Path, required=True, help="Folder of photographs. The captions are written into it.")
    add("--class_word", default=None, help="What the subject is, such as dog. Default: what the model calls it in every photograph.")
    add("--model", default=QWEN, help=f"Folder or Hub id of the vision-language model. Default: {QWEN}.")
    add("--revision", default=None, help="Revision of the model on the Hub.")
    add("--max_new_tokens", type=at_least(int, 1), default=60, help="Longest caption. Default: 60.")
    add("--overwrite", action="store_true", help="Replace captions that are there.")
    add("--device", default=None, help="Device of the model. Default: the GPU where there is one.")
    return parser
# fmt: on


def load_model(args: argparse.Namespace) -> Callable[[Image.Image, str], str]:
    """A function that asks the model about a picture. Raises UserError."""
    device = choose_device(args)
    try:
        pipe = transformers.pipeline(
            "image-text-to-text",
            model=args.model,
            revision=args.revision,
            device=device,
            model_kwargs={"torch_dtype": "auto"},
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"--model {args.model} cannot be loaded: {one_line(error)}") from None
    if getattr(pipe.processor, "chat_template", None) is None:
        raise UserError(f"--model {args.model} has no chat template, so it cannot be asked: give a chat model.")

    def ask(picture: Image.Image, question: str) -> str:
        content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
        options = {"max_new_tokens": args.max_new_tokens, "generate_kwargs": {"do_sample": False}}
        answer = pipe(text=[{"role": "user", "content": content}], return_full_text=False, **options)
        return answer[0]["generated_text"]

    return ask


def shown(path: Path) -> Image.Image:
    """The photograph, no larger than the model needs."""
    picture = open_picture(path)
    picture.thumbnail((MOST_PIXELS, MOST_PIXELS))
    return picture


def clean(answer: str) -> str:
    """An answer's first line without quotes, braces and the last full stop."""
    lines = [line.strip() for line in answer.splitlines() if line.strip()]
    return " ".join(re.sub(r"[{}\"*]", "", lines[0] if lines else "").split()).rstrip(".")


def class_word(answer: str) -> str:
    """What the subject is called in an answer: lower case, without an article, at most two words."""
    word = re.sub(r"^(an?|the|this is an?|it is an?) ", "", clean(answer).lower())
    return " ".join(re.findall(r"[\w-]+", word)[:2])


def caption(answer: str, word: str) -> str:
    """The answer as a caption with {} for the subject."""
    text = clean(answer)
    text = text[:1].lower() + text[1:]
    # The first place that names the subject; a second one may be another of its kind.
    named, count = re.subn(rf"\b{re.escape(word)}\b", "{}", text, count=1, flags=re.IGNORECASE)
    if count:
        return named
    return f"a photo of a {{}}, {text}" if text else "a photo of a {}"


def choose_word(pictures: list[Path], ask: Callable[[Image.Image, str], str]) -> str:
    """What the model calls the subject. Raises UserError where the user has to choose."""
    words = Counter(filter(None, (class_word(ask(shown(path), ASK_WORD)) for path in pictures)))
    counted = ", ".join(f"{word} ({count} of {len(pictures)})" for word, count in words.most_common())
    print(f"Class words: {counted or 'none'}")
    if len(words) != 1:
        problem = "calls the subject by several names" if words else "has no name for the subject"
        raise UserError(f"--model {problem}: choose one and give it as --class_word, here and as --initializer_token.")
    return next(iter(words))


def main() -> None:
    args = command_line().parse_args()
    transformers.utils.logging.set_verbosity_error()
    pictures = pictures_in(args.instance_data_dir, "--instance_data_dir")
    if args.class_word is not None and not re.search(r"\w", args.class_word):
        raise UserError("--class_word is empty: give what the subject is, such as dog.")
    files = {path: path.with_suffix(".txt") for path in pictures}
    missing = [path for path in pictures if args.overwrite or not files[path].exists()]
    if not missing and args.class_word:
        print(f"{len(pictures)} captions were there: --overwrite replaces them.")
        return
    ask = load_model(args)
    word = args.class_word or choose_word(pictures, ask)
    for path in missing:
        text = caption(ask(shown(path), ASK_CAPTION.format(word=word)), word)
        write_files({files[path]: f"{text}\n".encode()})
        print(f"{files[path]}: {text}", flush=True)
    kept = f", {len(pictures) - len(missing)} were there" * (len(missing) < len(pictures))
    print(f"{len(missing)} captions written{kept}. Train with --initializer_token {word!r}.")


if __name__ == "__main__":
    run(main)
