"""SanaPipeline with `load_textual_inversion` and `unload_textual_inversion`, which diffusers' own class does not have.

    import torch
    from diffusers import DiffusionPipeline, __version__

    dtype = {"dtype" if __version__ >= "0.40" else "torch_dtype": torch.bfloat16}  # diffusers 0.40 renamed it
    pipe = DiffusionPipeline.from_pretrained(
        "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers",
        custom_pipeline="examples/pipeline_sana_textual_inversion.py",
        trust_remote_code=True,  # diffusers asks for it also where the file is on this computer
        **dtype,
    ).to("cuda")
    pipe.load_textual_inversion("out/my-dog")  # learned_embeds.safetensors, of one vector or several
    pipe("a photo of a <my-dog> on the beach").images[0].save("beach.png")
    pipe.unload_textual_inversion()

Or `from pipeline_sana_textual_inversion import SanaTextualInversionPipeline`, with the file on Python's path.

A file whose only key is `gemma` carries no placeholder, so name one:
`pipe.load_textual_inversion("out/my-dog/my-dog.safetensors", token="<my-dog>")`.

Placeholders are lower case, for SanaPipeline lowercases every prompt. Leave `clean_caption` off, as it is by default:
it removes whatever stands in angle brackets, as if it were HTML. Works with diffusers 0.35 to 0.42 and transformers
4.51 to 5.
"""

import json
from functools import partial

import torch
from diffusers import SanaPipeline
from diffusers.loaders import TextualInversionLoaderMixin
from tokenizers import Tokenizer


class SanaTextualInversionPipeline(SanaPipeline, TextualInversionLoaderMixin):
    """`SanaPipeline` and diffusers' `TextualInversionLoaderMixin`, mended where they do not fit each other."""

    def _text_preprocessing(self, text, clean_caption=False):
        """Prompts as SanaPipeline prepares them, then "<x>" as "<x> <x>_1 ..." where it has several vectors.

        SanaPipeline prepends its instruction, counts tokens and chooses positions after this: all that stays right.
        """
        return self.maybe_convert_prompt(super()._text_preprocessing(text, clean_caption), self.tokenizer)

    def load_textual_inversion(
        self, pretrained_model_name_or_path, token=None, tokenizer=None, text_encoder=None, **kwargs
    ):
        """As in diffusers; `token` renames the placeholder, or names it where the file does not.

        Raises:
            ValueError: for a placeholder that could never match, and a file of key `gemma` without `token`, besides
                what diffusers refuses.
        """
        text_encoder = text_encoder or self.text_encoder
        # By default new rows are drawn around the mean of all others, which costs a covariance over 256,000 rows, and
        # they are overwritten at once.
        text_encoder.resize_token_embeddings = partial(text_encoder.resize_token_embeddings, mean_resizing=False)
        try:
            super().load_textual_inversion(pretrained_model_name_or_path, token, tokenizer, text_encoder, **kwargs)
        finally:
            del text_encoder.resize_token_embeddings  # the class's own is visible again

    @staticmethod
    def _retrieve_tokens_and_embeddings(tokens, state_dicts, tokenizer):
        for token, state_dict in zip(tokens, state_dicts, strict=False):
            if token is None and isinstance(state_dict, dict) and list(state_dict) == ["gemma"]:
                raise ValueError(
                    "This file holds a `gemma` embedding without a placeholder. Name one, for instance "
                    'load_textual_inversion(file, token="<my-dog>").'
                )
        loader = TextualInversionLoaderMixin
        tokens, embeddings = loader._retrieve_tokens_and_embeddings(tokens, state_dicts, tokenizer)
        for token in tokens:
            if token != token.lower():
                raise ValueError(
                    f"The placeholder {token!r} has capitals, and SanaPipeline lowercases prompts: it cannot match. "
                    f"Load it under another name, for instance token={token.lower()!r}."
                )
        return tokens, embeddings

    def unload_textual_inversion(self, tokens=None, tokenizer=None, text_encoder=None) -> None:
        """Forget the placeholders `tokens` (one, a list, or by default all), each with all its vectors.

        diffusers' own takes every added token that is not special for a learned one, and Gemma ships with hundreds of
        those (line ends, runs of spaces, HTML); and it puts a plain `nn.Embedding` in place of the encoder's, which
        with transformers 5 also scales. Here a learned token is one that lies beyond the vocabulary as shipped.

        Raises:
            ValueError: if a placeholder is not loaded, or the encoder's weights are away (sequential offloading).
        """
        tokenizer, text_encoder = tokenizer or self.tokenizer, text_encoder or self.text_encoder
        if text_encoder.device.type == "meta":
            raise ValueError("Call remove_all_hooks() before unloading, and enable offloading again after it.")
        state, shipped = json.loads(tokenizer.backend_tokenizer.to_str()), tokenizer.vocab_size
        learned = {entry["content"]: entry["id"] for entry in state["added_tokens"] if entry["id"] >= shipped}

        removed = set()
        for token in [tokens] if isinstance(tokens, str) else tokens or learned:
            if token not in learned:
                raise ValueError(f"{token!r} is not loaded; loaded are {sorted(learned)}.")
            vectors = 1
            while f"{token}_{vectors}" in learned:
                vectors += 1
            removed |= {token} | {f"{token}_{index}" for index in range(1, vectors)}

        kept = [token for token in learned if token not in removed]  # move up, in their order
        state["added_tokens"] = [entry for entry in state["added_tokens"] if entry["content"] not in removed]
        for entry in state["added_tokens"]:
            if entry["content"] in kept:
                entry["id"] = shipped + kept.index(entry["content"])
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))

        with torch.no_grad():
            weight = text_encoder.get_input_embeddings().weight
            weight[shipped : shipped + len(kept)] = weight[[learned[token] for token in kept]]
        text_encoder.resize_token_embeddings(shipped + len(kept))
