"""The SANA pipeline that loads learned tokens: what a token does to the prompt, and that unloading leaves no trace."""

import inspect
from pathlib import Path

import make_small_sana
import pytest
import torch
from diffusers import DiffusionPipeline, SanaPipeline
from diffusers.utils import dynamic_modules_utils
from pipeline_sana_textual_inversion import SanaTextualInversionPipeline
from safetensors.torch import save_file
from transformers import Gemma2Model


FILE = Path(inspect.getfile(SanaTextualInversionPipeline))
INSTRUCTION = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
WIDTH = make_small_sana.TEXT_WIDTH
PROMPT = "a photo of <my-pot> on the table"
STAND_INS = ["<unused0>", "<mask>", "▁▁▁"]  # tokens of the stock vocabulary that can be written in a prompt


@pytest.fixture
def stock(small) -> SanaPipeline:
    return SanaPipeline.from_pretrained(small / "sana")


@pytest.fixture
def pipeline(small) -> SanaTextualInversionPipeline:
    return SanaTextualInversionPipeline.from_pretrained(small / "sana")


def vectors(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def encode(pipe: SanaPipeline, prompt, instruction=None) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return pipe.encode_prompt(prompt, False, device="cpu", complex_human_instruction=instruction)[:2]


def seen_ids(pipe: SanaPipeline, prompt: str, instruction=None) -> list[int]:
    """The token ids that reach the text encoder, without padding."""
    seen = []
    hook = pipe.text_encoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0][kwargs["attention_mask"].bool()].tolist()), with_kwargs=True
    )
    encode(pipe, prompt, instruction)
    hook.remove()
    return seen[0]


def by_hand(stock: SanaPipeline, learned: torch.Tensor, prompt: str, instruction):
    """What the stock pipeline makes of the prompt with `learned` written over rows of its vocabulary."""
    tokens = STAND_INS[: len(learned)]
    rows = stock.tokenizer.convert_tokens_to_ids(tokens)
    stock.text_encoder.get_input_embeddings().weight.data[rows] = learned.to(stock.text_encoder.dtype)
    return encode(stock, prompt.replace("<my-pot>", " ".join(tokens)), instruction)


def same(pair, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(pair, other, strict=True))


def image(pipe: SanaPipeline, prompt: str):
    generator = torch.Generator().manual_seed(0)
    size = {"height": 64, "width": 64, "use_resolution_binning": False}
    return pipe(prompt, **size, num_inference_steps=2, generator=generator, output_type="np").images[0]


# The small pipeline


def test_the_small_text_encoder_has_the_weights_that_the_class_wants(small):
    _, info = Gemma2Model.from_pretrained(small / "sana" / "text_encoder", output_loading_info=True)
    assert not any(info.values()), info


def test_the_small_tokenizer_behaves_like_gemmas(stock):
    tokenizer = stock.tokenizer
    assert tokenizer.padding_side == "left"
    assert tokenizer.tokenize("a photo  of a dog") == ["a", "▁photo", "▁▁", "of", "▁a", "▁dog"]
    assert tokenizer.encode("", return_tensors="pt").tolist() == [[tokenizer.bos_token_id]]
    assert all(len(tokenizer.tokenize(space + word)) == 1 for word in make_small_sana.WORDS for space in ("", " "))
    assert len(tokenizer) == tokenizer.vocab_size == len(stock.text_encoder.get_input_embeddings().weight)


@pytest.mark.parametrize("prompt", ["naïve 漢字 😀", "\x00\x7f\u200d", "עברית\tالعربية", "x" * 5000, ""])
def test_any_text_tokenizes(pipeline, prompt):
    pipeline.load_textual_inversion({"<my-pot>": vectors(2)})
    ids = seen_ids(pipeline, f"{prompt} <my-pot>")
    assert pipeline.tokenizer.unk_token_id not in ids and len(ids) <= 300
    assert encode(pipeline, prompt)[0].isfinite().all()


# Loading


@pytest.mark.parametrize("instruction", [None, INSTRUCTION], ids=["plain", "instruction"])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("prompt", [PROMPT, "<my-pot>", "A Photo of <My-Pot>, and <my-pot>"])
def test_embeds_are_those_of_the_vectors_put_in_by_hand(stock, pipeline, prompt, count, instruction):
    pipeline.load_textual_inversion({"<my-pot>": vectors(count)})
    got = encode(pipeline, prompt, instruction)
    assert got[0].shape == (1, 300, WIDTH) and got[1].shape == (1, 300)
    assert not torch.equal(got[0], encode(pipeline, prompt.lower().replace("<my-pot>", "teapot"), instruction)[0])
    assert same(got, by_hand(stock, vectors(count), prompt.lower(), instruction))


@pytest.mark.parametrize("instruction", [None, INSTRUCTION], ids=["plain", "instruction"])
def test_all_vectors_reach_the_encoder_in_their_order(pipeline, instruction):
    pipeline.load_textual_inversion({"<my-pot>": vectors(3)})
    ids = seen_ids(pipeline, PROMPT, instruction)
    weight = pipeline.text_encoder.get_input_embeddings().weight
    learned = [index for index in ids if index >= pipeline.tokenizer.vocab_size]
    assert torch.equal(weight[learned], vectors(3))
    space = pipeline.tokenizer.convert_tokens_to_ids("▁")
    assert ids[ids.index(learned[0]) - 1 :][:6] == [space, learned[0], space, learned[1], space, learned[2]]


def test_a_batch_and_the_negative_prompt_take_learned_tokens_too(pipeline):
    pipeline.load_textual_inversion({"<my-pot>": vectors(2)})
    with torch.no_grad():
        embeds, mask, negative, negative_mask = pipeline.encode_prompt([PROMPT, "a dog"], negative_prompt=PROMPT)
    alone, alone_mask = encode(pipeline, PROMPT)
    torch.testing.assert_close(embeds[:1], alone)
    torch.testing.assert_close(negative[1:], alone)
    assert torch.equal(mask[:1], alone_mask) and torch.equal(negative_mask[:1], alone_mask)


def test_bfloat16(small):
    folder = small / "sana"
    pipeline = SanaTextualInversionPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    pipeline.load_textual_inversion({"<my-pot>": vectors(2)})
    got = encode(pipeline, PROMPT)
    assert got[0].dtype == torch.bfloat16
    stock = SanaPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    assert same(got, by_hand(stock, vectors(2), PROMPT, None))


def test_loads_from_a_folder_and_from_the_one_key_gemma_file(pipeline, tmp_path):
    save_file({"<my-pot>": vectors(2)}, tmp_path / "learned_embeds.safetensors")
    save_file({"gemma": vectors(2)}, tmp_path / "my-pot.safetensors")
    pipeline.load_textual_inversion(str(tmp_path))
    expected = encode(pipeline, PROMPT)
    pipeline.unload_textual_inversion()
    with pytest.raises(ValueError, match="token="):
        pipeline.load_textual_inversion(str(tmp_path / "my-pot.safetensors"))
    pipeline.load_textual_inversion(str(tmp_path / "my-pot.safetensors"), token="<my-pot>")
    assert same(encode(pipeline, PROMPT), expected)


def test_a_placeholder_with_capitals_is_refused_before_anything_changes(pipeline):
    before = len(pipeline.tokenizer), pipeline.text_encoder.get_input_embeddings().weight.shape
    with pytest.raises(ValueError, match="lowercases.*<my-pot>"):
        pipeline.load_textual_inversion({"<My-Pot>": vectors(1)})
    assert before == (len(pipeline.tokenizer), pipeline.text_encoder.get_input_embeddings().weight.shape)
    pipeline.load_textual_inversion({"<My-Pot>": vectors(1)}, token="<my-pot>")
    assert "<my-pot>" in pipeline.tokenizer.get_vocab()


def test_is_a_custom_pipeline(small, tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    custom = DiffusionPipeline.from_pretrained(small / "sana", custom_pipeline=str(FILE), trust_remote_code=True)
    assert isinstance(custom, SanaPipeline) and type(custom).__name__ == "SanaTextualInversionPipeline"
    custom.load_textual_inversion({"<my-pot>": vectors(2)})
    pipeline = SanaTextualInversionPipeline.from_pretrained(small / "sana")
    pipeline.load_textual_inversion({"<my-pot>": vectors(2)})
    assert same(encode(custom, PROMPT), encode(pipeline, PROMPT))


def test_the_token_changes_the_picture(pipeline):
    pipeline.load_textual_inversion({"<my-pot>": vectors(2)})
    with_token, with_class = image(pipeline, PROMPT), image(pipeline, PROMPT.replace("<my-pot>", "teapot"))
    assert with_token.shape == (64, 64, 3) and with_token.std() > 0.01
    assert abs(with_token - with_class).max() > 1e-4


# Unloading


@pytest.mark.parametrize("tokens", [None, "<my-pot>", ["<my-pot>"]])
def test_unloading_leaves_the_stock_pipeline(stock, pipeline, tokens):
    prompts = [PROMPT, "two\n\nlines,  two spaces,   three <mask> <unused0>"]  # Gemma's own added tokens
    picture = image(stock, prompts[1])
    pipeline.load_textual_inversion({"<my-pot>": vectors(3)})
    image(pipeline, PROMPT)
    pipeline.unload_textual_inversion(tokens)

    assert pipeline.tokenizer.get_vocab() == stock.tokenizer.get_vocab()
    assert pipeline.tokenizer.get_added_vocab() == stock.tokenizer.get_added_vocab()
    assert pipeline.text_encoder.config.vocab_size == stock.text_encoder.config.vocab_size
    weights, expected = pipeline.text_encoder.state_dict(), stock.text_encoder.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    for prompt in prompts:
        assert seen_ids(pipeline, prompt) == seen_ids(stock, prompt)
        assert same(encode(pipeline, prompt, INSTRUCTION), encode(stock, prompt, INSTRUCTION))
    assert (image(pipeline, prompts[1]) == picture).all()


def test_unloading_one_of_two_keeps_the_other(pipeline):
    pipeline.load_textual_inversion({"<other>": vectors(2, seed=1)})
    expected = encode(pipeline, "a <other>")
    pipeline.unload_textual_inversion()
    pipeline.load_textual_inversion([{"<my-pot>": vectors(2)}, {"<other>": vectors(2, seed=1)}])
    pipeline.load_textual_inversion({"<third>": vectors(1, seed=2)})
    pipeline.unload_textual_inversion("<my-pot>")
    assert same(encode(pipeline, "a <other>"), expected)
    third = pipeline.tokenizer.convert_tokens_to_ids("<third>")
    assert torch.equal(pipeline.text_encoder.get_input_embeddings().weight[third], vectors(1, seed=2)[0])
    pipeline.load_textual_inversion({"<my-pot>": vectors(2)})  # its name is free again
    assert same(encode(pipeline, "a <other>"), expected)


def test_unloading_what_is_not_loaded_says_what_is(pipeline):
    pipeline.unload_textual_inversion()  # nothing to do
    pipeline.load_textual_inversion({"<my-pot>": vectors(1)})
    with pytest.raises(ValueError, match="'<your-pot>' is not loaded.*<my-pot>"):
        pipeline.unload_textual_inversion("<your-pot>")
