"""Whatever is given, there is a message or a skip with a note: never a traceback, never a hang.

The passes here are short and the same every time; `-m slow` makes long ones, each time others.
"""

import contextlib
import copy
import io
import json
import os
import re
import signal
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image, features
from safetensors.torch import load_file, save_file
from test_data import data_options

import train_dti_sana
import train_dti_sdxl as script
from train_dti_sdxl import UserError


pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("UserWarning", "RuntimeWarning")]  # Pillow's


def short_and_long(short: int, long: int):
    """Parametrizes a test with the number of examples, the long pass under the marker `slow`."""
    return pytest.mark.parametrize("examples", [short, pytest.param(long, marks=pytest.mark.slow)])


def passes(examples: int):
    return settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=examples <= 500,
        suppress_health_check=list(HealthCheck),
    )


@contextlib.contextmanager
def in_time(seconds: int = 60):
    """Ends what hangs, as reading a pipe would."""

    def stop(*args):
        raise TimeoutError(f"nothing after {seconds} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def message(call, *args, **kwargs) -> str | None:
    """What the call complains of, which must be one readable line, or None where it goes through."""
    with in_time():
        try:
            call(*args, **kwargs)
        except (UserError, train_dti_sana.UserError) as error:
            assert str(error) and str(error).isprintable()
            return str(error)


# Any text that a file's name or an argument can be: also bytes that are no UTF-8, which Python holds as half characters.
arguments = st.one_of(
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40),
    st.binary(max_size=40).map(lambda data: os.fsdecode(data.replace(b"\0", b""))),
)
numbers = st.one_of(
    st.integers().map(str),
    st.integers(-3, 300).map(str),
    st.floats().map(str),
    st.sampled_from(["1e400", "-0", "0x10", "1_000", "٣", "9" * 5000, "1" + "0" * 400, "inf", " 3 ", "1e-400"]),
)


# The options.


@short_and_long(150, 10000)
@pytest.mark.parametrize("module", [script, train_dti_sana])
def test_options(module, examples, tmp_path, monkeypatch):
    name = f"{module.__name__}.py"
    monkeypatch.setattr("sys.argv", [name])
    job = {
        "--pretrained_model_name_or_path": "model",
        "--instance_data_dir": "photos",
        "--placeholder_token": "<x>",
        "--initializer_token": "dog",
        "--output_dir": str(tmp_path / "out"),
        "--report_to": "none",
    }
    actions = [
        action
        for action in module.make_parser(module.MODEL_CLASS)._actions
        if action.dest not in ("help", "output_dir")
    ]

    def values(action):
        likely = st.sampled_from(list(action.choices)) if action.choices else st.one_of(numbers, arguments)
        return st.tuples(st.just(action), st.one_of(likely, numbers, arguments))

    @passes(examples)
    @given(
        given_values=st.lists(st.sampled_from(actions).flatmap(values), max_size=6),
        left_out=st.sets(st.sampled_from(list(job)[:4]), max_size=1),
        folder=arguments,
        joined=st.booleans(),
    )
    @example([(next(a for a in actions if a.dest == "seed"), "1" + "0" * 400)], set(), "", True)
    @example([], set(), "x" * 5000, True)
    def check(given_values, left_out, folder, joined):
        argv = [part for k, v in job.items() if k not in left_out for part in (k, v)]
        argv += ["--output_dir", str(tmp_path / f"out{folder.replace('/', '_')}")]
        for action, value in given_values:
            option = action.option_strings[0]
            argv += [option] if action.nargs == 0 else [f"{option}={value}"] if joined else [option, value]
        printed = io.StringIO()
        try:
            with contextlib.redirect_stderr(printed):
                args = module.parse_args(argv, module.MODEL_CLASS)
        except SystemExit as error:
            assert error.code == 2
            usage, _, rest = printed.getvalue().partition("\n")
            assert usage.startswith("usage: ") and rest.startswith(f"{name}: error: ")
            return
        except module.UserError as error:  # --config
            assert str(error) and str(error).isprintable()
            return
        with in_time():
            try:
                module.check_options(module.MODEL_CLASS(args))
            except module.UserError as error:
                assert str(error) and str(error).isprintable()
                return
        assert all(abs(v) < 2**32 for v in vars(args).values() if type(v) is int)
        assert all(np.isfinite(v) for v in vars(args).values() if type(v) is float)
        assert json.dumps({k: str(v) for k, v in vars(args).items()}, ensure_ascii=False).encode()

    check()


@short_and_long(60, 2000)
def test_model_folders(examples, tmp_path):
    index = tmp_path / "pipeline" / "model_index.json"
    index.parent.mkdir()

    @passes(examples)
    @given(name=st.one_of(arguments, st.none()), data=st.one_of(st.binary(max_size=60), json_values.map(as_bytes)))
    @example("x" * 5000, b"")
    @example(None, b"[]")
    @example(None, b'{"_class_name": ["StableDiffusionXLPipeline"]}')
    def check(name, data):
        index.write_bytes(data)
        name = index.parent if name is None else tmp_path / f"no{name.replace('/', '_')}"
        argv = ["--pretrained_model_name_or_path", str(name), "--placeholder_token=<x>", "--output_dir=out"]
        assert message(script.check_model, script.MODEL_CLASS(script.parse_args(argv, script.MODEL_CLASS)))

    check()


@short_and_long(200, 20000)
@pytest.mark.parametrize("kind", ["toml", "yaml", "json"])
def test_files_of_options(kind, examples, tmp_path):
    path = tmp_path / f"options.{kind}"
    names = st.sampled_from(
        [a.option_strings[0] for a in script.make_parser(script.MODEL_CLASS)._actions] + ["x", "options", ""]
    )
    tables = st.dictionaries(names, json_values, max_size=3)

    @passes(examples)
    @given(data=st.one_of(st.binary(max_size=60), json_values.map(as_bytes), tables.map(as_bytes)))
    @example(b"a: &a [*a]")
    @example(b"[" * 100_000)
    @example(b"kappa = 2020-01-01")
    @example(b"<<: {kappa: 1}")
    @example(b"? [a, {b: c}]\n: d")
    def check(data):
        path.write_bytes(data)
        with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()):
            message(script.parse_args, [f"--config={path}"], script.MODEL_CLASS)

    check()


# The photographs.


def go_through(folder, **options) -> str | None:
    """Everything that happens to photographs before and in the training. Returns the message, if there is one."""
    args = data_options(folder, **{"resolution": 16, "random_flip": True} | options)
    state = {}

    def before_training():
        state["photographs"] = script.load_photographs(args)
        state["prompts"] = script.prompts_by_image(state["photographs"], args)
        script.check_images(state["photographs"], args.resolution)

    complaint = message(before_training)
    if complaint is None:
        examples = script.TrainingExamples(*state.values(), None, 0, args)
        for position in range(len(state["photographs"])):
            with in_time():
                seen = examples[position]
            assert seen["pixel_values"].shape == (3, 16, 16) and seen["pixel_values"].abs().max() <= 1
            assert "<new>" in seen["prompt"]
    return complaint


def picture(mode: str = "RGB", size: tuple[int, int] = (24, 20)) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    if mode == "I;16":
        return Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    if mode == "LAB":
        return Image.frombytes("LAB", size, noise.tobytes())
    return Image.fromarray(noise).convert(mode)


def encoded(mode: str, kind: str, **options) -> bytes:
    file = io.BytesIO()
    if options.get("save_all"):
        options["append_images"] = [picture(mode).rotate(90), picture(mode).rotate(180)]
    picture(mode).save(file, kind, **options)
    return file.getvalue()


def exif_file() -> bytes:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    return encoded("RGB", "JPEG", exif=exif)


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n{} loop\n"
FILES = {
    **{f"jpeg {mode}": encoded(mode, "JPEG") for mode in ("L", "RGB", "CMYK")},
    "jpeg progressive": encoded("RGB", "JPEG", progressive=True),
    "jpeg turned": exif_file(),
    **{f"png {mode}": encoded(mode, "PNG") for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")},
    "png transparent": encoded("P", "PNG", transparency=3),
    "apng": encoded("RGB", "PNG", save_all=True),
    "gif": encoded("P", "GIF"),
    "gif animated": encoded("P", "GIF", save_all=True, duration=40),
    "webp": encoded("RGB", "WEBP"),
    "webp lossless": encoded("RGBA", "WEBP", lossless=True),
    "webp animated": encoded("RGB", "WEBP", save_all=True),
    **{f"tiff {mode}": encoded(mode, "TIFF") for mode in ("1", "L", "RGB", "CMYK", "I;16", "LA")},
    **{f"tiff {c}": encoded("RGB", "TIFF", compression=c) for c in ("tiff_lzw", "tiff_adobe_deflate", "jpeg")},
    "tiff pages": encoded("RGB", "TIFF", save_all=True),
    "bmp": encoded("RGB", "BMP"),
    "ppm": encoded("RGB", "PPM"),
    "tga": encoded("RGB", "TGA"),
    "tga packed": encoded("RGBA", "TGA", compression="tga_rle"),
    "ico": encoded("RGBA", "ICO"),
    **({"avif": encoded("RGB", "AVIF")} if features.check("avif") else {}),
    "heif": encoded("RGB", "HEIF"),
    "jpeg xl": encoded("RGB", "JXL"),
}
REFUSED = {
    "tiff float": (encoded("F", "TIFF"), "x.png has floating-point pixels, .* save it with 8 or 16 bits"),
    "postscript": (POSTSCRIPT, "x.png is PostScript, which is not read"),
    "nothing": (b"", "is damaged or not an image"),
    "a page": (b"<html><body>404</body></html>", "is damaged or not an image"),
}


@pytest.mark.parametrize("kind", FILES)
def test_every_kind_of_file_under_every_suffix(tmp_path, kind):
    for suffix in script.IMAGE_SUFFIXES:
        (tmp_path / f"x{suffix}").write_bytes(FILES[kind])
    assert go_through(tmp_path) is None


@pytest.mark.parametrize("kind", REFUSED)
def test_files_that_no_picture_can_be_made_of(tmp_path, kind):
    data, expected = REFUSED[kind]
    (tmp_path / "x.png").write_bytes(data)
    assert re.search(expected, go_through(tmp_path))


def test_lab_is_read_or_refused_by_pillows_version(tmp_path):
    (tmp_path / "x.tif").write_bytes(encoded("LAB", "TIFF"))
    assert "LAB" in (go_through(tmp_path) or "LAB")


@short_and_long(300, 30000)
def test_damaged_files(examples, tmp_path):
    """Cut short, overwritten, stretched, or nothing but chance."""
    path = tmp_path / "x.jpg"
    changes = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 3), st.binary(max_size=12)), max_size=4)

    @passes(examples)
    @given(start=st.one_of(st.sampled_from(list(FILES.values())), st.binary()), changes=changes, end=st.floats(0, 1.2))
    def check(start, changes, end):
        data = bytearray(start[: round(len(start) * end)])
        for place, skipped, inserted in changes:
            place = round(place * len(data))
            data[place : place + skipped] = inserted
        path.write_bytes(data)
        go_through(tmp_path)

    check()


@pytest.mark.parametrize("kind", FILES)
def test_every_file_cut_short(tmp_path, kind):
    data = FILES[kind]
    for length in sorted({*range(0, 40), *np.linspace(0, len(data) - 1, 40).astype(int).tolist()}):
        (tmp_path / "x.png").write_bytes(data[:length])
        go_through(tmp_path)


@short_and_long(100, 5000)
def test_names(examples, tmp_path_factory):
    picture_file = FILES["png RGB"]

    @passes(examples)
    @given(
        names=st.lists(st.tuples(arguments, st.sampled_from(sorted(script.IMAGE_SUFFIXES))), min_size=1, max_size=4),
        folder=arguments,
    )
    @example([("a\nb [x] *? {} %s \x1b[31m", ".JPG")], "new\nline")
    @example([("caf\udce9", ".png")], "x")
    @example([("metadata", ".png"), ("test-0001-of-0002", ".png"), (" ", ".png")], "train")
    def check(names, folder):
        parent = tmp_path_factory.mktemp("names")
        folder = parent / f"x{folder.replace('/', '_')}"
        folder.mkdir()
        names = {f"x{name.replace('/', '_')}{suffix}" for name, suffix in names}
        for name in names:
            (folder / name).write_bytes(picture_file)
        complaint = go_through(folder)
        with contextlib.suppress(UnicodeEncodeError):
            "".join([str(folder), *names]).encode()
            assert complaint is None
            return
        assert "is not valid UTF-8" in complaint

    check()


def test_what_is_no_file_is_left_out_with_a_note(tmp_path, caplog):
    (tmp_path / "a picture.png").write_bytes(FILES["png RGB"])
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    (tmp_path / "itself.jpg").symlink_to(tmp_path)
    (tmp_path / "endless.jpg").symlink_to("/dev/zero")
    (tmp_path / "metadata.jsonl").mkdir()
    with caplog.at_level("INFO", logger="dti"):
        assert go_through(tmp_path) is None
    for name in ("folder", "pipe", "dangling", "loop", "itself", "endless"):
        assert f"'{name}.jpg'" in caplog.text
    (tmp_path / "a picture.png").unlink()
    assert "holds no images" in go_through(tmp_path)


@pytest.mark.parametrize("name", ["loop", "dangling", "pipe", "x" * 5000, "a/" * 3000, "loop/inside"])
def test_folders_that_are_none(tmp_path, name):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    assert re.search("does not exist|is not a folder", go_through(tmp_path / name))
    assert message(script.check_output_dir, tmp_path / name) or name == "dangling"
    assert message(script.read_warm_start, script.MODEL_CLASS, tmp_path / name, [32, 48])


def test_what_may_not_be_read(tmp_path, monkeypatch):
    """As if modes forbade it: they do not hold for root, whom tests may run as."""
    (tmp_path / "x.png").write_bytes(FILES["png RGB"])
    (tmp_path / "metadata.jsonl").write_text("{}")

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "open", refuse)
        assert re.search("metadata.jsonl cannot be read .*Permission denied", go_through(tmp_path))
    (tmp_path / "metadata.jsonl").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", refuse)
        assert re.search("x.png cannot be read: Permission denied", go_through(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "iterdir", refuse)
        assert re.search("--instance_data_dir .* cannot be read: Permission denied", go_through(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", refuse)
        assert re.search("--instance_data_dir .* does not exist", go_through(tmp_path))


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has next to no data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def test_decompression_bombs(tmp_path):
    bmp = bytearray(FILES["bmp"])
    bmp[18:26] = struct.pack("<ii", 100000, 100000)
    gif = bytearray(FILES["gif"])
    gif[6:10] = b"\xff" * 4
    for data in (png_header(60000, 60000), png_header(2**31 - 1, 2**31 - 1), bytes(bmp), bytes(gif)):
        (tmp_path / "x.png").write_bytes(data)
        assert re.search("x.png (has more than 536870912 pixels|is damaged)", go_through(tmp_path))
    (tmp_path / "x.png").write_bytes(png_header(9000, 9000))  # a size that is let through, and no pixels
    go_through(tmp_path)


@pytest.mark.parametrize("size", [(1, 1), (1, 30000), (65000, 1), (2, 3), (6000, 5000)])
def test_sizes(tmp_path, size):
    Image.new("RGB", size, "red").save(tmp_path / "x.png")
    Image.new("L", size, 9).save(tmp_path / "x.jpg")
    assert go_through(tmp_path) is None
    assert go_through(tmp_path, center_crop=True) is None


# Captions and templates.

json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(st.characters(), max_size=20)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=10), inner, max_size=4)),
    max_leaves=10,
)
rows = st.fixed_dictionaries(
    {},
    optional={"file_name": st.one_of(st.just("x.png"), json_values), "text": st.one_of(st.just("a {}"), json_values)},
)


def as_bytes(value) -> bytes:
    return json.dumps(value).encode()


metadata = st.one_of(
    st.binary(max_size=200),
    st.lists(st.one_of(rows, json_values).map(as_bytes), max_size=4).map(b"\n".join),
    st.text(max_size=200).map(lambda text: b"file_name,text\nx.png,a {}\n" + text.encode(errors="replace")),
    st.text(st.sampled_from('x.png,"\n\r\0{}text file_name'), max_size=80).map(str.encode),
)


@short_and_long(200, 20000)
@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_metadata(examples, tmp_path, name):
    (tmp_path / "x.png").write_bytes(FILES["png L"])

    @passes(examples)
    @given(data=metadata, column=st.sampled_from([None, "text", "file_name"]))
    @example(b"[" * 200000, None)
    @example(b'file_name,text\nx.png,"' + b"a" * 200000 + b'"\n', None)
    @example(b'{"file_name": "x.png", "text": "a {} \\ud800"}', None)
    @example(b'{"file_name": "x.png", "text": ' + b"9" * 5000 + b"}", None)
    @example(b"file_name,text\nx.png\n", None)
    def check(data, column):
        (tmp_path / name).write_bytes(data)
        complaint = go_through(tmp_path, caption_column=column)
        assert complaint or b"x.png" in data

    check()


def test_the_byte_order_mark_of_a_spreadsheet_is_no_part_of_a_column(tmp_path):
    (tmp_path / "x.png").write_bytes(FILES["png L"])
    (tmp_path / "metadata.csv").write_text("file_name,text\nx.png,a {}\n", encoding="utf-8-sig")
    assert go_through(tmp_path) is None
    (tmp_path / "templates").write_text("{} there\n", encoding="utf-8-sig")
    assert script.read_templates(tmp_path / "templates") == ["{} there"]


@short_and_long(200, 10000)
def test_templates(examples, tmp_path):
    path = tmp_path / "templates"

    @passes(examples)
    @given(data=st.one_of(st.binary(max_size=100), st.text(st.sampled_from("a{} \n\r\x0b\u2028\ufeff"))))
    def check(data):
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        if message(script.read_templates, path) is None:
            assert all("{}" in template for template in script.read_templates(path))

    check()
    for wrong in (tmp_path, tmp_path / ("x" * 5000), tmp_path / "none"):
        assert message(script.read_templates, wrong)


# The new word.


def with_tokenizers(small, module):
    argv = ["--pretrained_model_name_or_path", str(small / module.__name__.removeprefix("train_dti_"))]
    argv += ["--placeholder_token=<x>", "--output_dir=out"]
    model = module.MODEL_CLASS(module.parse_args(argv, module.MODEL_CLASS))
    model.load_tokenizers()
    return model


words = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    st.text(st.sampled_from("<>abcAB_1-{}/\\.|"), max_size=12),
    st.text(
        st.sampled_from("a\u0301\u200d\u202e\u05d0\u0627\ufe0f\U0001f469\x00\x1b\x7f\x85\ufeff\u00ad"), max_size=12
    ),
    st.integers(1, 400).map(lambda n: "語" * n),
)


@short_and_long(100, 5000)
@pytest.mark.parametrize("module", [script, train_dti_sana])
def test_placeholders(module, examples, small, tmp_path):
    model = with_tokenizers(small, module)

    @passes(examples)
    @given(word=words, count=st.one_of(st.integers(1, 3), st.just(2**32 - 1)))
    @example("<\u202eabc>", 2)
    @example("x" * 100000, 1)
    @example("../../x", 1)
    @example("<LEARNED_EMBEDS>", 1)
    def check(word, count):
        for tokenizer in map(copy.deepcopy, model.tokenizers):
            with in_time():
                try:
                    first = module.add_placeholder(model, tokenizer, word, count)
                except module.UserError as error:
                    assert str(error).isprintable()
                    continue
                ids = tokenizer(model.to_pipeline_prompt(f"a photo of {word} on grass", tokenizer)).input_ids
            assert [token_id for token_id in ids if token_id >= first] == [first + i for i in range(count)]
            file = tmp_path / f"{module.web_name(word)}-steps-4294967295.safetensors"
            assert file.parent == tmp_path and module.web_name(word).lower() not in model.embedding_files
            module.save_tensors({word: torch.ones(1)}, file, {"modelspec.trigger_phrase": word})
            assert list(load_file(file)) == [word]
            file.unlink()

    check()


@short_and_long(100, 5000)
@pytest.mark.parametrize("module", [script, train_dti_sana])
def test_initializers(module, examples, small):
    known = with_tokenizers(small, module).tokenizers

    @passes(examples)
    @given(word=st.one_of(words, st.integers(70, 400).map(lambda n: "dog " * n)))
    def check(word):
        for tokenizer in known:
            with contextlib.suppress(module.UserError):
                assert 0 < len(module.initializer_ids(tokenizer, word)) < tokenizer.model_max_length

    check()


@short_and_long(100, 10000)
def test_captions_of_any_length(examples, small):
    model = with_tokenizers(small, script)
    for tokenizer in model.tokenizers:
        script.add_placeholder(model, tokenizer, "<x>", 2)

    @passes(examples)
    @given(text=st.lists(st.one_of(words, st.just("<x>"), st.just("<x>_1")), max_size=60).map(" ".join))
    def check(text):
        message(script.check_prompts, model, [[text]], [2])

    check()


# Embeddings to start from.


@short_and_long(150, 10000)
def test_random_files_to_start_from(examples, tmp_path):
    path = tmp_path / "learned_embeds.safetensors"
    save_file({"<x>": torch.ones(1, 32)}, path)
    good = path.read_bytes()

    @passes(examples)
    @given(data=st.binary(max_size=100), place=st.integers(0, len(good)), whole=st.booleans())
    @example(b"", 0, True)
    def check(data, place, whole):
        path.write_bytes(data if whole else good[:place] + data + good[place + len(data) :])
        message(script.read_warm_start, script.MODEL_CLASS, path, [32, 48])
        message(script.read_warm_start, script.MODEL_CLASS, tmp_path, [32, 48])
        message(train_dti_sana.read_warm_start, train_dti_sana.MODEL_CLASS, path, [32])

    check()


WHOLE = [torch.int64, torch.uint8, torch.bool]
FLOATING = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]
WRONG = [(dtype, value) for dtype in FLOATING[:4] for value in (0.0, float("nan"), float("inf"), 1e300)]


@pytest.mark.parametrize("shape", ["", "{}", "1 {}", "3 {}", "0 {}", "1 1 {}", "{} 1", "0"])
@pytest.mark.parametrize("dtype, value", [*((dtype, 1.0) for dtype in FLOATING + WHOLE), *WRONG], ids=str)
def test_tensors_of_any_kind_to_start_from(tmp_path, dtype, shape, value):
    path = tmp_path / "x.safetensors"
    shapes = [[int(n) for n in shape.format(width).split()] for width in (32, 48)]
    save_file(
        {
            key: torch.full(s, value, dtype=torch.float64).to(dtype)
            for key, s in zip(script.MODEL_CLASS.web_keys, shapes, strict=True)
        },
        path,
    )
    complaint = message(script.read_warm_start, script.MODEL_CLASS, path, [32, 48])
    assert (complaint is None) == (dtype.is_floating_point and value == 1 and shape in ("{}", "1 {}", "3 {}"))
    if complaint is None:
        rows = script.read_warm_start(script.MODEL_CLASS, path, [32, 48])
        assert all(row.dtype == torch.float32 and row.ndim == 2 and (row == 1).all() for row in rows)
