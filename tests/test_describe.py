"""caption.py and make_masks.py: what small models say and see is written as the training scripts read it."""

import sys
from types import SimpleNamespace

import caption
import make_masks
import numpy as np
import pytest
import torch
from PIL import Image
from test_examples_use import call  # noqa: F401
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessor,
)

import train_dti_sdxl as script


WORDS = ["<pad>", "<s>", "</s>", "<image>", "user", "teapot", "on", "grass", "sand", "at", "night", "the", "light"]
CHAT = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }} "
    "{% endif %}{% endfor %}{% endfor %}user"
)


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A small vision-language model of random weights, which says words of its own vocabulary."""
    folder = tmp_path_factory.mktemp("talker")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="light"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "light"}
    names = {"additional_special_tokens": ["<image>"], "model_input_names": ["input_ids", "attention_mask"]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, **names)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes | {"num_hidden_layers": 2}, image_size=32, patch_size=16).to_dict(),
        text_config=LlamaConfig(**sizes, vocab_size=len(WORDS), num_key_value_heads=2, eos_token_id=None).to_dict(),
        image_token_index=WORDS.index("<image>"),
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    model.generation_config.suppress_tokens = [0, 1, 2, 3]  # all but words
    model.save_pretrained(folder)
    square = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    processor = LlavaProcessor(
        CLIPImageProcessor(**square),
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    )
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def photos(small, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for path in sorted((small / "photos").iterdir())[:3]:
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def read(train_options, **changes) -> list[list[str]]:
    """The prompts that the training script makes of a folder."""
    args = script.parse_args(train_options(**changes), script.MODEL_CLASS)
    return script.prompts_by_image(script.load_photographs(args), args)


def test_a_models_captions_are_the_training_scripts(call, talker, photos, options):  # noqa: F811
    (photos / "01.txt").write_text("a {} of my own")
    job = ["--instance_data_dir", photos, "--model", talker, "--class_word", "teapot", "--max_new_tokens", 5]
    printed, errors, status = call(caption, *job)
    assert status == 0, errors
    assert "2 captions written, 1 were there. Train with --initializer_token 'teapot'" in printed
    prompts = read(options, instance_data_dir=photos)
    assert prompts[1] == ["a <my-pot> of my own"]
    said = [prompts[0][0], prompts[2][0]]
    assert all("<my-pot>" in text and set(text.split()) & set(WORDS) for text in said)
    assert "3 captions were there" in call(caption, *job)[0]


@pytest.fixture
def answers(monkeypatch):
    """A stand-in for the model: its answers by the question's kind, one for each photograph, the last one repeated."""

    def give(words: list[str], captions: list[str]) -> None:
        def ask(picture, question: str) -> str:
            left = words if question == caption.ASK_WORD else captions
            return left.pop(0) if len(left) > 1 else left[0]

        monkeypatch.setattr(caption, "load_model", lambda args: ask)

    return give


def test_the_word_on_which_all_photographs_agree_is_told_and_used(call, photos, options, answers):  # noqa: F811
    answers(
        ["A dog.", '"Dog"', "dog\nIt is brown."], ["The dog sits on a {beach}, beside a dog.", "Dogs at night.", ""]
    )
    printed, errors, status = call(caption, "--instance_data_dir", photos)
    assert status == 0, errors
    assert "Class words: dog (3 of 3)" in printed and "--initializer_token 'dog'" in printed
    expected = [
        "the <my-pot> sits on a beach, beside a dog",
        "a photo of a <my-pot>, dogs at night",
        "a photo of a <my-pot>",
    ]
    assert [prompts[0] for prompts in read(options, instance_data_dir=photos)] == expected


def test_several_words_are_the_users_choice(call, photos, answers):  # noqa: F811
    answers(["stuffed animal", "the toy", "a stuffed animal with a hat"], ["a thing"])
    printed, errors, status = call(caption, "--instance_data_dir", photos)
    assert "Class words: stuffed animal (2 of 3), toy (1 of 3)" in printed
    assert status == 1 and "several names: choose one and give it as --class_word" in errors.splitlines()[-1]
    assert not list(photos.glob("*.txt"))


def test_a_model_that_cannot_be_asked_ends_in_one_line(call, photos, tmp_path, talker):  # noqa: F811
    job = ["--instance_data_dir", photos, "--class_word", "pot", "--model"]
    _, errors, status = call(caption, *job, tmp_path / "none")
    assert status == 1 and "none cannot be loaded" in errors.splitlines()[-1]
    assert "--class_word is empty" in call(caption, *job, talker, "--class_word", " ")[1]


# Masks.


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    """A small segmentation model that calls what is bright a pot."""
    folder = tmp_path_factory.mktemp("segmenter")
    sizes = {"num_encoder_blocks": 1, "depths": [1], "sr_ratios": [1], "hidden_sizes": [8], "patch_sizes": [7]}
    sizes |= {"strides": [4], "num_attention_heads": [1], "mlp_ratios": [1], "decoder_hidden_size": 8}
    config = SegformerConfig(**sizes, id2label={0: "ground", 1: "pot"}, label2id={"ground": 0, "pot": 1})
    torch.manual_seed(0)
    SegformerForSemanticSegmentation(config).eval().save_pretrained(folder)
    SegformerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def test_a_models_masks_are_white_where_it_sees_the_label(call, segmenter, photos, tmp_path):  # noqa: F811
    job = ["--instance_data_dir", photos, "--model", segmenter, "--output_dir"]
    for label in ("pot", "ground"):
        call(make_masks, *job, tmp_path / label, "--label", label)
    pairs = [[tmp_path / label / path.name for label in ("pot", "ground")] for path in sorted(photos.iterdir())]
    for pair in pairs:
        masks = [np.asarray(Image.open(path)) if path.exists() else 0 for path in pair]  # none where it sees nothing
        assert (masks[0] + masks[1] == 255).all()
    _, errors, _ = call(make_masks, *job, tmp_path / "masks", "--label", "dog")
    assert "--label dog is none of the model's: ground, pot" in errors.splitlines()[-1]


def test_rembgs_masks_are_the_training_scripts(call, photos, options, tmp_path, monkeypatch):  # noqa: F811
    """By a stand-in for rembg, which finds nothing in the last photograph."""
    seen = []

    def remove(picture, session, only_mask):
        mask = Image.new("L", picture.size)
        seen.append(picture.size)
        mask.paste(255 * (len(seen) < 3), (5, 5, picture.width // 2, picture.height // 2))
        return mask

    monkeypatch.setitem(sys.modules, "rembg", SimpleNamespace(new_session=lambda: None, remove=remove))
    masks = tmp_path / "masks"
    job = ["--instance_data_dir", photos, "--output_dir", masks]
    printed, errors, status = call(make_masks, *job)
    assert status == 0, errors
    assert f"Train with --mask_dir {masks}" in printed and "no subject was found in 02.png" in printed
    args = script.parse_args(options(instance_data_dir=photos, mask_dir=masks), script.MODEL_CLASS)
    rows = script.load_photographs(args)
    script.check_masks(rows, args)
    assert [row["mask"] is not None for row in rows] == [True, True, False]
    assert script.open_mask(rows[0], args).size == seen[0]
    call(make_masks, *job)
    assert len(seen) == 4  # the others stay


def test_what_masks_need_is_said(call, photos, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "rembg", None)
    _, errors, status = call(make_masks, "--instance_data_dir", photos, "--output_dir", tmp_path / "masks")
    assert status == 1 and "Masks need `pip install 'rembg[cpu]'`" in errors.splitlines()[-1]
    _, errors, status = call(make_masks, "--instance_data_dir", photos, "--output_dir", photos)
    assert status == 1 and "--output_dir" in errors.splitlines()[-1]
    _, errors, _ = call(make_masks, "--instance_data_dir", photos, "--output_dir", tmp_path / "m", "--label", "dog")
    assert "--label dog is of a --model" in errors.splitlines()[-1]
