"""Captions: from metadata files and from text beside the photographs, what a step sees of them, and what cannot be one."""

import json
import subprocess
import unicodedata

import datasets
import pytest
from PIL import Image
from test_data import data_options

import train_dti_sdxl as script
from train_dti_sdxl import UserError


@pytest.fixture
def photos(tmp_path):
    """A folder of three photographs, and a way to put text into it."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.png", "b.JPG", "caf\u00e9.png"):
        Image.new("RGB", (40, 40)).save(folder / name, "PNG")

    def write(**files: str):
        for name, text in files.items():
            (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
        return folder

    return write


ALL = {"a__txt": "a {} on grass\n", "b__txt": "the <new>, asleep", "caf\u00e9__txt": "{}\n\n  my {} in snow \n"}
PROMPTS = [["a <new> on grass"], ["the <new>, asleep"], ["<new>", "my <new> in snow"]]


def prompts(folder, **options) -> list[list[str]]:
    args = data_options(folder, **options)
    return script.prompts_by_image(script.load_photographs(args), args)


def warnings(caplog) -> list[str]:
    return [record.message for record in caplog.records if record.name == "dti" and record.levelname == "WARNING"]


def test_text_beside_the_photographs(photos, caplog):
    with caplog.at_level("INFO", logger="dti"):
        assert prompts(photos(**ALL)) == PROMPTS
    assert "Not images" not in caplog.text and not warnings(caplog)


@pytest.mark.parametrize(
    "ending, option", [(".caption", None), (".TXT", None), (".tags", "tags"), (".de.txt", ".de.txt")]
)
def test_other_endings(photos, ending, option, caplog):
    extension = script.extension(option) if option else None
    with caplog.at_level("INFO", logger="dti"):
        folder = photos(**{name.replace("__txt", ending): text for name, text in ALL.items()})
        assert prompts(folder, caption_extension=extension) == PROMPTS
    assert "left out" not in caplog.text


def test_a_step_sees_one_line_by_its_position(photos):
    args = data_options(photos(**ALL))
    photographs = script.load_photographs(args)
    made = script.prompts_by_image(photographs, args)
    examples = script.TrainingExamples(photographs, made, [[{}]] * 3, 7, args)
    seen = [examples[position]["prompt"] for position in range(60)]
    assert seen == [examples[position]["prompt"] for position in range(60)]
    assert 4 < seen.count("<new>") < 16 and seen.count("<new>") + seen.count("my <new> in snow") == 20


def metadata(kind: str, folder, key: str = "file_name", names=("./b.JPG", "caf\u00e9.png", "a.png"), column="text"):
    texts = ["the <new>, asleep", "{}\nmy {} in snow", "a {} on grass"]
    rows = [{key: name, "other": 1, column: text} for name, text in zip(names, texts, strict=True)]
    if kind == "jsonl":
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8-sig")
    elif kind == "csv":
        lines = [f"{key},other,{column}", *(f'{n},1,"{t}"' for n, t in zip(names, texts, strict=True))]
        (folder / "metadata.csv").write_text("\n".join(lines), encoding="utf-8")
    else:
        datasets.Dataset.from_list(rows).to_parquet(folder / "metadata.parquet")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("key", ["file_name", "image_file_name", "photo_file_name"])
def test_metadata_files(photos, kind, key, caplog):
    with caplog.at_level("INFO", logger="dti"):
        metadata(kind, folder := photos(), key)
        assert prompts(folder) == PROMPTS
    assert "left out" not in caplog.text
    metadata(kind, folder, key, column="words")
    assert prompts(folder, caption_column="words") == PROMPTS
    with pytest.raises(UserError, match="row 1 has no column 'text': it needs .*file_name and --caption_column text"):
        prompts(folder)


def test_of_several_image_columns_the_option_s_is_taken(photos):
    folder = photos()
    rows = [
        {"mask_file_name": "x.png", "photo_file_name": n, "text": "a {}"} for n in ("a.png", "b.JPG", "caf\u00e9.png")
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert prompts(folder, image_column="photo") == [["a <new>"]] * 3
    with pytest.raises(UserError, match="row 1 has no column 'file_name'"):
        prompts(folder)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "parquet"])
@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_match_in_either_unicode_form(tmp_path, kind, forms):
    photo, text = (unicodedata.normalize(form, "caf\u00e9") for form in forms)
    Image.new("RGB", (40, 40)).save(tmp_path / f"{photo}.png")
    if kind == "txt":
        (tmp_path / f"{text}.txt").write_text("a {}")
    else:
        metadata(kind, tmp_path, names=("x.png", "y.png", f"{text}.png"))
    assert len(prompts(tmp_path)) == 1 and "<new>" in prompts(tmp_path)[0][0]


def test_captions_that_are_not_used_are_a_warning(photos, caplog):
    metadata("csv", folder := photos(**ALL, a__caption="another {}"))
    assert prompts(folder) == PROMPTS
    assert warnings(caplog) == [
        f"{folder} has captions that are not used, as those of metadata.csv are: *.txt, *.caption."
    ]
    caplog.clear()
    (folder / "a.txt").write_text("text {}")
    assert prompts(folder, caption_extension=".txt")[0] == ["text <new>"]
    assert warnings(caplog) == [f"{folder} has captions that are not used, as those of *.txt are: metadata.csv."]
    caplog.clear()
    (folder / "templates").write_text("a {} here\n")
    assert prompts(folder, prompt_templates=folder / "templates") == [["a <new> here"]] * 3
    assert "not used, as --prompt_templates is given: metadata.csv, *.txt, *.caption" in warnings(caplog)[0]
    caplog.clear()
    assert len(prompts(folder, no_captions=True)[0]) > 20
    assert not warnings(caplog)


def test_text_of_no_photograph_and_rows_of_none_are_a_warning(photos, caplog):
    folder = photos(**ALL, readme__txt="hello", **{"._a__txt": "macOS"})
    assert prompts(folder) == PROMPTS
    assert warnings(caplog) == ["Left out, because no photograph has their names: 'readme.txt'"]
    caplog.clear()
    metadata("jsonl", folder, names=("b.JPG", "caf\u00e9.png", "a.png"))
    with (folder / "metadata.jsonl").open("a") as file:
        file.write('\n{"file_name": "train/a.png", "text": "a {}"}\n')
    assert prompts(folder) == PROMPTS
    assert any(
        "metadata.jsonl has rows for files that are not photographs of the folder: 'train/a.png'" in w
        for w in warnings(caplog)
    )


BAD = {
    "nothing": ({"a__txt": " \n"}, r"a\.txt: the caption is empty"),
    "not for all": (
        {"caf\u00e9__txt": None},
        r"caf.*\.png has no caption, and others have: write caf.*\.txt, or add --no_captions",
    ),
    "UTF-16": ({"a__txt": "\ufeffa {}".encode("utf-16")}, r"a\.txt cannot be read as text in UTF-8"),
    "null": (
        {"metadata__jsonl": [("a.png", None)]},
        r"metadata\.jsonl, row 1: the caption is None, which is not text",
    ),
    "a list": (
        {"metadata__jsonl": [("b.JPG", "{}"), ("a.png", ["a {}"])]},
        r"row 2: the caption is \['a \{\}'\], which is",
    ),
    "a number": ({"metadata__jsonl": [("a.png", 5)]}, r"row 1: the caption is 5, which is not text"),
    "no name": ({"metadata__jsonl": [(None, "{}")]}, "row 1: the file_name is None: write a photograph's name"),
    "twice": (
        {"metadata__jsonl": [("a.png", "{}"), ("b.JPG", "{}"), ("./a.png", "my {}")]},
        r"row 3: './a.png' is there a second time, after .*metadata\.jsonl, row 1",
    ),
    "no object": ({"metadata__jsonl": '{"file_name": "a.png", "text": "{}"}\n[1, 2]\n'}, "and text: row 2: .*mapping"),
    "no JSON": (
        {"metadata__jsonl": '{"file_name": "a.png", "text": "{}"}\nhello\n'},
        "and text: row 2: Expecting value",
    ),
    "a comma": (
        {"metadata__csv": "file_name,text\na.png,a {}, asleep\n"},
        "row 1 has more cells than the file has columns",
    ),
    "a short row": ({"metadata__csv": "file_name,text\na.png\n"}, "row 1: the caption is None"),
    "an empty cell": ({"metadata__csv": "file_name,text\na.png,\n"}, "row 1: the caption is empty"),
    "no parquet": ({"metadata__parquet": "hello"}, r"metadata\.parquet cannot be read as rows of file_name and text"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_a_caption_is_named_with_its_file_and_row(photos, case):
    files, message = BAD[case]
    folder = photos(**(ALL if any("txt" in name for name in files) else {}))
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        if content is None:
            path.unlink()
        elif isinstance(content, list):
            rest = [(n, "a {}") for n in ("a.png", "b.JPG", "caf\u00e9.png") if n not in {name for name, _ in content}]
            rows = [{"file_name": n, "text": t} for n, t in content + rest]
            path.write_text("\n".join(map(json.dumps, rows)))
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            rows = "b.JPG,a {}\ncaf\u00e9.png,a {}\n" if name.endswith("csv") else ""
            path.write_text(content + rows, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        prompts(folder)


def test_captions_without_the_new_word_say_how_to_put_it_in(photos):
    folder = photos(
        a__txt="a Dog on grass", b__txt="my dog\na dog, asleep in a dog bed", **{"caf\u00e9__txt": "dogs and a dog"}
    )
    with pytest.raises(UserError) as caught:
        prompts(folder, initializer_token="dog")
    message = str(caught.value)
    assert message.startswith(f"{folder}/a.txt: the caption 'a Dog on grass' has neither {{}} nor '<new>'.")
    command = message.partition("None has. Where they say 'dog', write {} instead, by: ")[2]
    subprocess.run(command, shell=True, check=True)
    made = prompts(folder, initializer_token="dog")
    assert made == [["a <new> on grass"], ["my <new>", "a <new>, asleep in a dog bed"], ["dogs and a <new>"]]
    (folder / "a.txt").write_text("a cat")  # some have the word: nothing general is wrong
    with pytest.raises(UserError, match="a.txt: the caption 'a cat' has neither {} nor '<new>'.$"):
        prompts(folder, initializer_token="dog")


def test_metadata_without_the_new_word_says_so_too(photos):
    folder = photos(metadata__csv="file_name,text\na.png,a dog\nb.JPG,a dog\ncaf\u00e9.png,the dog\n")
    with pytest.raises(
        UserError, match="row 1: the caption 'a dog' has .*None has. Where they say 'dog', write {} instead$"
    ):
        prompts(folder, initializer_token="dog")
    with pytest.raises(UserError, match="row 1: the caption 'a dog' has neither {} nor '<new>'.$"):
        prompts(folder)


def test_a_data_set_s_captions(tmp_path, caplog):
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    picture = Image.new("RGB", (40, 50))

    def save(*texts):
        rows = {"image": [picture] * len(texts), "text": texts}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")

    save("a {}\nmy {}", "the <new>")
    options = {"dataset_name": str(tmp_path), "caption_column": "text"}
    assert prompts(None, **options) == [["a <new>", "my <new>"], ["the <new>"]]
    assert not warnings(caplog)
    assert len(prompts(None, **options | {"caption_column": None})[0]) > 20
    (warning,) = warnings(caplog)
    assert "has captions that are unused: --caption_column text" in warning
    caplog.clear()
    prompts(None, **options | {"caption_column": None, "no_captions": True})
    assert not warnings(caplog)
    save("a {}", None)
    with pytest.raises(UserError, match="--dataset_name .*, row 2: the caption is None, which is not text"):
        prompts(None, **options)


def test_captions_that_are_cut_are_a_warning(loaded, caplog):
    model = loaded()
    counts = [len(model.tokens[0].parameter)]
    script.check_prompts(model, [["a <my-pot>"], ["a <my-pot> " + "very " * 90]], counts)
    assert warnings(caplog) == ["1 of 2 prompts are cut at the 77 tokens that the encoders read."]
