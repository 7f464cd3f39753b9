"""SanaPipeline with `load_textual_inversion` and `unload_textual_inversion`, which diffusers' own class lacks.

    import torch
    from diffusers import DiffusionPipeline, __version__

    dtype = {"dtype" if __version__ >= "0.40" else "torch_dtype": torch.bfloat16}  # diffusers 0.40 renamed it
    pipe = DiffusionPipeline.from_pretrained(
        "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers",
        custom_pipeline="examples/pipeline_sana_textual_inversion.py",
        trust_remote_code=True,  # diffusers requires it for local files too
        **dtype,
    ).to("cuda")
    pipe.load_textual_inversion("out/my-dog")  # learned_embeds.safetensors, with one or several vectors
    pipe("a photo of a <my-dog> on the beach").images[0].save("beach.png")
    pipe.unload_textual_inversion()

Alternatively, `from pipeline_sana_textual_inversion import SanaTextualInversionPipeline`, with the file on Python's path.

A file whose only key is `gemma` has no placeholder, so give one:
`pipe.load_textual_inversion("out/my-dog/my-dog.safetensors", token="<my-dog>")`.

Placeholders must be lower case, because SanaPipeline lowercases every prompt. Keep `clean_caption` off (the default): it
removes text in angle brackets as HTML. Works with diffusers 0.35 to 0.42 and transformers 4.51 to 5.
"""

import json
from functools import partial

import torch
from diffusers import SanaPipeline
from diffusers.loaders import TextualInversionLoaderMixin
from tokenizers import Tokenizer


class SanaTextualInversionPipeline(SanaPipeline, TextualInversionLoaderMixin):
    """`SanaPipeline` with diffusers' `TextualInversionLoaderMixin`, adapted where the two are incompatible."""

    def _text_preprocessing(self, text, clean_caption=False):
        """Prompts as SanaPipeline prepares them, with "<x>" expanded to "<x> <x>_1 ..." if it has several vectors.

        SanaPipeline prepends its instruction, counts tokens and selects positions after this, so these stay correct.
        """
        return self.maybe_convert_prompt(super()._text_preprocessing(text, clean_caption), self.tokenizer)

    def load_textual_inversion(
        self, pretrained_model_name_or_path, token=None, tokenizer=None, text_encoder=None, **kwargs
    ):
        """As in diffusers. `token` renames the placeholder, or names it if the file has none.

        Raises:
            ValueError: for a placeholder that can never match, for a file with key `gemma` without `token`, and as in
                diffusers.
        """
        text_encoder = text_encoder or self.text_encoder
        # By default new rows are drawn around the mean of the others, which needs a covariance over 256,000 rows. They
        # are overwritten immediately.
        text_encoder.resize_token_embeddings = partial(text_encoder.resize_token_embeddings, mean_resizing=False)
        try:
            super().load_textual_inversion(pretrained_model_name_or_path, token, tokenizer, text_encoder, **kwargs)
        finally:
            del text_encoder.resize_token_embeddings  # restores the class's method

    @staticmethod
    def _retrieve_tokens_and_embeddings(tokens, state_dicts, tokenizer):
        for token, state_dict in zip(tokens, state_dicts, strict=False):
            if token is None and isinstance(state_dict, dict) and list(state_dict) == ["gemma"]:
                raise ValueError(
                    "This file has a `gemma` embedding without a placeholder. Name one, for instance "
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
        """Remove the placeholders `tokens` (one, a list, or by default all), each with all its vectors.

        diffusers' own method treats every added token that is not special as learned, and Gemma has hundreds of these
        (line ends, runs of spaces, HTML). It also replaces the encoder's embedding by a plain `nn.Embedding`, but in
        transformers 5 Gemma's embedding also scales. Here a learned token is one beyond the original vocabulary.

        Raises:
            ValueError: if a placeholder is not loaded, or the encoder's weights are on "meta" (sequential offloading).
        """
        tokenizer, text_encoder = tokenizer or self.tokenizer, text_encoder or self.text_encoder
        if text_encoder.device.type == "meta":
            raise ValueError("Call remove_all_hooks() before unloading, and enable offloading again after it.")
        state, shipped = json.loads(tokenizer.backend_tokenizer.to_str()), tokenizer.vocab_size
        learned = {entry["content"]: entry["id"] for entry in state["added_tokens"] if entry["id"] >= shipped}

        removed = set()
        for token in [tokens] if isinstance(tokens, str) else tokens or learned:
            if token not in learned:
                raise ValueError(f"{token!r} is not loaded. Loaded: {sorted(learned)}.")
            vectors = 1
            while f"{token}_{vectors}" in learned:
                vectors += 1
            removed |= {token} | {f"{token}_{index}" for index in range(1, vectors)}

        kept = [token for token in learned if token not in removed]  # they move up and keep their order
        state["added_tokens"] = [entry for entry in state["added_tokens"] if entry["content"] not in removed]
        for entry in state["added_tokens"]:
            if entry["content"] in kept:
                entry["id"] = shipped + kept.index(entry["content"])
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))

        with torch.no_grad():
            weight = text_encoder.get_input_embeddings().weight
            weight[shipped : shipped + len(kept)] = weight[[learned[token] for token in kept]]
        text_encoder.resize_token_embeddings(shipped + len(kept))
