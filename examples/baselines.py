#!/usr/bin/env python
"""Train the paper's rival methods on Stable Diffusion 1.5 and 2.1-base: P+, NeTI and CoRe (Table 7 of arXiv 2512.13672).

    python examples/baselines.py --method plus --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
      --instance_data_dir photos/dog --placeholder_token "<my-dog>" --initializer_token dog --output_dir out/plus-dog

plus: P+ (arXiv 2303.09522), one embedding for each cross-attention layer. neti: NeTI (arXiv 2305.15391), a small network
that gives the embedding for each layer and timestep. core: CoRe (arXiv 2408.15914), Textual Inversion with a penalty on
the words around the new one. Steps, learning rate and batch are those of each method unless they are given.

The file adds three model classes to train_dti_sd.py. Options, checks, photographs, checkpoints and curves are those of
train_dti_sdxl.py, which documents them. The model itself stays as it is.

Written to --output_dir: `learned_embeds.safetensors`, whose header names method, placeholder, initializer and model, and
the curves, options and checkpoints of train_dti_sdxl.py. A stock pipeline loads CoRe's result as any embedding. generate.py
and evaluate.py load all three; `install` here does so for a pipeline.

Sections: 1 words that depend on the layer, 2 the text for each layer, 3 P+ and NeTI, 4 CoRe, 5 reading and installing, 6 main.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from export import Embedding, EmbeddingError, check_token, find_file, read_embedding, read_state
from train_dti_sd import StableDiffusion


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from train_dti_sdxl import (  # noqa: E402
    ExtendedEmbedding,
    LearnedToken,
    UserError,
    config_arguments,
    file_metadata,
    initializer_ids,
    interruption,  # noqa: F401  train_many.py uses this name
    make_parser,
    number,
    parse_given,
    read_templates,
    run,
    save_tensors,
)
from train_dti_sdxl import main as train  # noqa: E402


# ----------------------------------------------------------------------------------------------------------------------
# 1. Words whose embedding depends on the layer. L layers, N copies of a prompt, d the text encoder's width.
# ----------------------------------------------------------------------------------------------------------------------


class LayerWord(LearnedToken):
    """P+: the word has an embedding e_l for each cross-attention layer l (Voynov et al., arXiv 2303.09522).

        layer l is conditioned on  E(y(e_l)),  l = 1..L

    with E the text encoder and y(e) the prompt with e in the word's place. `parameter` is (L, d).
    """

    by_timestep = False

    def rows(self, times: torch.Tensor, layers: torch.Tensor, generator=None) -> tuple[torch.Tensor, None]:
        """The embeddings (N, d) for timesteps and layers (N,), and no bypass."""
        return self.parameter.to(layers.device)[layers], None

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is saved: (d,) for each layer."""
        return {f"layer.{index}": row for index, row in enumerate(self.parameter.detach())}

    @classmethod
    def read(cls, embedding: "Word", first_id: int) -> "LayerWord":
        return cls(first_id, None, torch.nn.Parameter(embedding.vectors["text_encoder"], False), None, None, (1,))


FREQUENCIES, HIDDEN = 1024, 128  # NeTI's released sizes: random features and hidden units
ANCHOR_TIMES = torch.arange(0, 1000, 100)  # of Stable Diffusion's 1000 timesteps
SIGMAS = (0.03, 2.0)  # of the random frequencies, per timestep and per layer


def anchors(layers: int) -> tuple[torch.Tensor, torch.Tensor]:
    """NeTI's 10 L anchors: their timesteps and layers."""
    return ANCHOR_TIMES.repeat_interleave(layers), torch.arange(layers).repeat(len(ANCHOR_TIMES))


class Mapper(torch.nn.Module):
    """NeTI's network (Alaluf et al., arXiv 2305.15391): timestep t and layer l to the word's embedding and a bypass.

        f(t, l) = [sin(W (t, l)), cos(W (t, l))] / norm,  W ~ N(0, diag(.03^2, 2^2)), fixed
        h = LeakyReLU(LN(Linear(LeakyReLU(LN(Linear(A f))))))
        (u, v_bypass) = Linear(h),  e = m u / |u|

    The first layer A starts as the features of 10 L anchors (t, l). m is the norm of the class word's embedding. Nested
    dropout keeps only the first of h's 128 units, and sets the others to zero.

    Departure from the released code: that normalises u and v_bypass together and so leaves |e| open.
    """

    def __init__(self, width: int, layers: int, norm: float):
        super().__init__()
        self.norm = norm
        times, of_layers = anchors(layers)
        self.register_buffer("frequencies", torch.randn(FREQUENCIES, 2) * torch.tensor(SIGMAS))
        self.anchors = torch.nn.Linear(2 * FREQUENCIES, len(times))
        self.first, self.first_norm = torch.nn.Linear(len(times), HIDDEN), torch.nn.LayerNorm(HIDDEN)
        self.second, self.second_norm = torch.nn.Linear(HIDDEN, HIDDEN), torch.nn.LayerNorm(HIDDEN)
        self.output = torch.nn.Linear(HIDDEN, 2 * width)
        self.anchors.weight.data = self.features(times, of_layers)

    def features(self, times: torch.Tensor, layers: torch.Tensor) -> torch.Tensor:
        """f(t, l), (N, 2048), rows of length 1."""
        angles = torch.stack([times, layers], dim=-1).float() @ self.frequencies.T
        return F.normalize(torch.cat([angles.sin(), angles.cos()], dim=-1), dim=-1)

    def forward(self, times: torch.Tensor, layers: torch.Tensor, kept: torch.Tensor | None = None):
        """Embeddings (N, d) of norm m and bypass vectors (N, d); `kept` (N,) is how many hidden units each row keeps."""
        h = self.anchors(self.features(times, layers))
        h = F.leaky_relu(self.first_norm(self.first(h)))
        h = F.leaky_relu(self.second_norm(self.second(h)))
        if kept is not None:
            h = torch.where(torch.arange(HIDDEN, device=h.device) < kept[:, None], h, 0.0)
        u, bypass = self.output(h).chunk(2, dim=-1)
        return self.norm * F.normalize(u, dim=-1), bypass


@dataclass
class MappedWord(LearnedToken):
    """NeTI: the word as a `Mapper` gives it. `parameter` is (1, P), all weights of the network in one row.

    As one row they pass through the script's optimizer, checkpoints and processes as an embedding does. `start` holds the
    random features, by which a checkpoint of another network is refused.
    """

    mapper: Mapper
    layers: int
    alpha: float  # the bypass's length beside the output that it is added to
    nested_dropout: float = 0.0  # probability that a row is cut
    by_timestep = True

    def weights(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The network's parameters and buffers by name, as views of `parameter`."""
        shapes = {name: p.shape for name, p in self.mapper.named_parameters()}
        parts = self.parameter[0].to(device).split([shape.numel() for shape in shapes.values()])
        views = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        return views | {name: x.to(device) for name, x in self.mapper.named_buffers()}

    def rows(self, times: torch.Tensor, layers: torch.Tensor, generator=None) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings and bypass vectors (N, d) for timesteps and layers (N,); a generator switches nested dropout on."""
        kept = None
        if generator is not None:
            cut = torch.rand(len(layers), generator=generator) < self.nested_dropout
            kept = torch.where(cut, torch.randint(HIDDEN, (len(layers),), generator=generator), HIDDEN)
            kept = kept.to(layers.device)
        return torch.func.functional_call(self.mapper, self.weights(layers.device), (times, layers, kept))

    def embedding(self) -> torch.Tensor:
        """(10 L, d): the word at every anchor. The curves follow it, and it identifies a file."""
        return self.rows(*(x.to(self.parameter.device) for x in anchors(self.layers)))[0]

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is saved: the network's weights by name."""
        return {f"mapper.{name}": x.detach().clone() for name, x in self.weights(self.parameter.device).items()}

    @classmethod
    def read(cls, embedding: "Word", first_id: int, norm: float | None = None) -> "MappedWord":
        """By default of norm m as the vectors have it, so that a rescaled word gives a rescaled network."""
        state = {name.removeprefix("mapper."): x for name, x in embedding.state.items()}
        norm = embedding.vectors["text_encoder"][0].norm().item() if norm is None else norm
        mapper = Mapper(len(state["output.bias"]) // 2, embedding.layers, norm).requires_grad_(False)
        mapper.load_state_dict(state)
        parameter = flat(mapper).requires_grad_(False)
        return cls(first_id, None, parameter, None, None, (1,), mapper, embedding.layers, embedding.alpha)


def flat(mapper: Mapper) -> torch.nn.Parameter:
    """A network's parameters as one row (1, P)."""
    return torch.nn.Parameter(torch.nn.utils.parameters_to_vector(mapper.parameters()).detach().clone()[None])


# ----------------------------------------------------------------------------------------------------------------------
# 2. The text for each layer
# ----------------------------------------------------------------------------------------------------------------------


class LayerAttention:
    """Cross-attention that takes its own layer's part of the text.

    The text is (B, 77, L 2 d): for each layer the states for keys and those for values. A text (B, 77, d) is for all layers.
    """

    def __init__(self, index: int, layers: int):
        self.index, self.layers = index, layers

    def states(self, attn, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What this layer's keys and values are computed from, each (B, 77, d)."""
        if text.shape[-1] == attn.cross_attention_dim:
            return text, text
        return text.unflatten(-1, (self.layers, 2, attn.cross_attention_dim))[:, :, self.index].unbind(2)

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, **options):
        keys, values = self.states(attn, encoder_hidden_states)
        parts = attn.to_q(hidden_states), attn.to_k(keys), attn.to_v(values)
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in parts)
        self.observe(q, k)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](mixed))

    def observe(self, q: torch.Tensor, k: torch.Tensor) -> None:
        """Does nothing; CoRe looks at the attention here."""


def set_processors(unet: torch.nn.Module, kind: type) -> list:
    """Give the UNet's cross-attention layers processors of this kind, in the order of computation, and return them."""
    order = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}  # the UNet itself lists its middle last
    names = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    names.sort(key=lambda name: order[name.split(".")[0]])
    made = {name: kind(index, len(names)) for index, name in enumerate(names)}
    unet.set_attn_processor({**unet.attn_processors, **made})
    return list(made.values())


class LayeredText:
    """The text of prompts for each layer: every prompt is encoded L times, each time with that layer's embedding.

    It stands in an ExtendedEmbedding as the learned token does, with a row for every word in every copy of a prompt.
    """

    def __init__(self, encoder, words: list, layers: int):
        self.encoder, self.words, self.layers = encoder, words, layers
        self.first_id = min(word.first_id for word in words)
        self.table = None  # the rows that the prompts in work read
        self.ids = None  # of the pipeline's prompts, the negative ones first, as its UNet gets them
        self.kept = None  # their text, where it is the same at every step

    def embedding(self) -> torch.Tensor:
        return self.table

    def states(self, ids: torch.Tensor, times: torch.Tensor, generator=None) -> torch.Tensor:
        """The text (B, 77, L 2 d) of token ids (B, 77) at timesteps (B,)."""
        count, layers = len(ids) * self.layers, torch.arange(self.layers, device=ids.device).repeat(len(ids))
        copies, times = ids.repeat_interleave(self.layers, dim=0), times.repeat_interleave(self.layers)
        table, bypasses, own_rows = [], [], copies
        for index, word in enumerate(self.words):
            place = copies == word.first_id
            rows, bypass = word.rows(times, layers, generator)
            table.append(rows)
            row_ids = self.first_id + index * count + torch.arange(count, device=ids.device)
            own_rows = torch.where(place, row_ids[:, None], own_rows)
            bypasses += [(place, word.alpha, bypass)] if bypass is not None else []
        self.table = torch.cat(table)
        keys = values = self.encoder(own_rows).last_hidden_state
        for place, alpha, bypass in bypasses:
            # v = v_base + alpha v_bypass / |v_bypass| |v_base|, at the word only, for the values only (NeTI)
            length = keys.norm(dim=-1, keepdim=True)
            shift = (alpha * F.normalize(bypass, dim=-1)).to(keys.dtype)[:, None] * length
            values = torch.where(place[..., None], values + shift, values)
        return torch.stack([keys, values], dim=-2).unflatten(0, (len(ids), self.layers)).transpose(1, 2).flatten(2)

    def tokenize(self, pipe, prompts: str | list[str], device: torch.device) -> torch.Tensor:
        texts = pipe.maybe_convert_prompt([prompts] if isinstance(prompts, str) else prompts, pipe.tokenizer)
        return token_ids(pipe.tokenizer, texts).to(device)

    def attach(self, pipe) -> None:
        """Let the pipeline note the prompts of each call, and give its UNet their text before every step."""
        encode, unet = pipe.encode_prompt, pipe.unet

        def encode_prompt(prompt, device, num_images_per_prompt, guidance, negative_prompt=None, **options):
            # The stock encoding of a prompt with a word is replaced before it is used: any rows do.
            ids = max(word.first_id for word in self.words) - self.first_id + 1
            self.table = torch.zeros(ids, self.encoder.config.hidden_size, device=device)
            self.ids = self.kept = None
            result = encode(prompt, device, num_images_per_prompt, guidance, negative_prompt, **options)
            if prompt is not None:
                self.ids = self.tokenize(pipe, prompt, device)
                negative = [""] * len(self.ids) if negative_prompt is None else negative_prompt
                self.ids = torch.cat([self.tokenize(pipe, negative, device), self.ids]) if guidance else self.ids
            return result

        pipe.encode_prompt = encode_prompt
        self.hook = unet.register_forward_pre_hook(self.before_unet, with_kwargs=True)

    def before_unet(self, unet, args: tuple, options: dict) -> tuple[tuple, dict] | None:
        """Replace the stock text (B, 77, d) of prompts with a word by their text for each layer."""
        base = options.get("encoder_hidden_states")
        if self.ids is None or base is None:
            return None
        ids = self.ids.repeat_interleave(len(base) // len(self.ids), dim=0)
        with_word = torch.stack([ids == word.first_id for word in self.words]).any(dim=0).any(dim=-1)
        if not with_word.any():
            return None
        if self.kept is None or any(word.by_timestep for word in self.words):
            times = torch.as_tensor(args[1], device=base.device).expand(len(base))
            text = base.repeat(1, 1, 2 * self.layers)
            text[with_word] = self.states(ids[with_word], times[with_word]).to(base.dtype)
            self.kept = text
        return args, {**options, "encoder_hidden_states": self.kept}


def token_ids(tokenizer, texts: list[str]) -> torch.Tensor:
    """(B, 77), as the stock pipeline pads and cuts."""
    length = tokenizer.model_max_length
    return tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


# ----------------------------------------------------------------------------------------------------------------------
# 3. The methods' options, P+ and NeTI
# ----------------------------------------------------------------------------------------------------------------------


def only(method: str) -> tuple:
    """For IDLE: the option is another method's."""
    return (lambda args: args.method != method, f"except with --method {method}", "")


def same_presets(steps: int, learning_rate: float) -> dict:
    """A method has one setting, whichever preset is named."""
    return dict.fromkeys(("default", "paper"), {"adamw": (steps, learning_rate, "constant", "free")})


class Baseline(StableDiffusion):
    """What the methods share. One of them is mixed in by `main`."""

    method_name = "P+, NeTI or CoRe"
    presets = same_presets(500, 5e-3)
    defaults = {**StableDiffusion.defaults, "optimizer": "adamw"}
    idle_options = {
        **StableDiffusion.idle_options,
        **dict.fromkeys(("nested_dropout", "bypass_alpha"), only("neti")),
        **dict.fromkeys(("context_weight", "attention_weight", "context_prompts"), only("core")),
        **dict.fromkeys(("rescale_start_step", "rescale_stop_step"), only("core")),
    }
    web_keys, web_limits, web_spelling = (), (), ""  # no file for the web tools, so no limits to its name
    # Options that are DTI's or CrossInit's, or were not tried with these methods.
    fixed = {"optimizer": "adamw", "magnitude": "free", "init": "token", "reg_weight": 0.0, "init_embedding": None}
    fixed |= {"rank": 0, "push_to_hub": False, "compile": False, "further_word": []}

    # fmt: off
    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument_group("baseline").add_argument
        add("--method", choices=list(METHODS), required=True, help="P+, NeTI or CoRe. It also chooses steps, learning rate and batch.")
        add("--nested_dropout", type=number(float, 0), default=0.5, help="NeTI: probability that a row of hidden units is cut in training; paper: 0.5.")
        add("--bypass_alpha", type=number(float, 0), default=0.2, help="NeTI: length of the textual bypass beside the text encoder's output; paper: 0.2. 0: no bypass.")
        add("--context_weight", type=number(float, 0), default=1.5e-4, help="CoRe: weight of the context's output embeddings; released: 1.5e-4.")
        add("--attention_weight", type=number(float, 0), default=0.05, help="CoRe: weight of the context's attention; released: 0.05. 0 saves two of three passes of the UNet.")
        add("--context_prompts", type=Path, default=None, help="CoRe: file of context prompts, one a line, with {} for the new word, instead of the built-in ones.")
        add("--rescale_start_step", type=number(int, 0), default=120, help="CoRe: step whose norm of the embedding is then held; released: 120.")
        add("--rescale_stop_step", type=number(int, 0), default=180, help="CoRe: last step at which the norm is held; released: 180.")
        StableDiffusion.add_options(parser)
    # fmt: on

    def __init__(self, args: argparse.Namespace):
        super().__init__(args)
        for name, value in self.fixed.items():
            if getattr(args, name) != value:
                given = f"--{name}" if getattr(args, name) is True else f"--{name} {getattr(args, name)}"
                raise UserError(f"{given} is not for --method {args.method}: leave it out.")
        if args.nested_dropout > 1:
            raise UserError(f"--nested_dropout {args.nested_dropout:g} is a probability: give at most 1.")
        if args.initializer_token is None:
            raise UserError(f"--method {args.method} needs --initializer_token, the class word, such as dog.")

    def baseline_metadata(self) -> dict[str, str]:
        return {"baseline.method": self.args.method}

    def save_result(self, step: int, about: dict[str, str], suffix: str = "") -> None:
        """Write the word to one file, with placeholder, initializer and model in its header as train_dti_sdxl.py has them."""
        metadata = file_metadata(self, step, about, self.args.placeholder_token)
        what, dti = metadata["modelspec.description"], "Directional Textual Inversion (arXiv 2512.13672)"
        metadata["modelspec.description"] = what.replace(dti, self.method_name)
        path = self.args.output_dir / f"{self.embedding_files[0]}{suffix}.safetensors"
        tensors = {name: x.cpu().contiguous() for name, x in self.result_tensors().items()}
        save_tensors(tensors, path, {**metadata, **self.baseline_metadata()})

    def loading_snippet(self, device: torch.device, dtype: torch.dtype, repository: str | None = None) -> str:
        model, folder = (shlex.quote(str(x)) for x in (self.args.pretrained_model_name_or_path, self.args.output_dir))
        prompt = '--prompt "a photo of a {}" --output_dir pictures'
        return f"\npython examples/generate.py {folder} --pretrained_model_name_or_path {model} {prompt}\n"


class Layered(Baseline):
    """What P+ and NeTI share: a text for each cross-attention layer."""

    def load_tokenizers(self) -> None:
        super().load_tokenizers()
        args = self.args
        if args.num_vectors not in (None, 1):
            raise UserError(f"--num_vectors {args.num_vectors}: --method {args.method} has one a layer: leave it out.")
        if (count := len(initializer_ids(self.tokenizers[0], args.initializer_token))) > 1:
            given = f"--initializer_token {args.initializer_token!r} has {count} tokens"
            raise UserError(f"{given}, and --method {args.method} starts from one: give a single word, such as dog.")

    def make_token(self, encoder, tokenizer, first_id: int, counts: Sequence[int], warm_start) -> LearnedToken:
        self.layers = len(set_processors(self.denoiser, LayerAttention))
        word = self.make_word(super().make_token(encoder, tokenizer, first_id, counts, warm_start))
        self.text = LayeredText(encoder, [word], self.layers)
        encoder.get_input_embeddings().learned = (self.text,)
        return word

    def predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, batch: dict) -> torch.Tensor:
        ids = token_ids(self.tokenizers[0], batch["prompt"]).to(noisy.device)
        text = self.text.states(ids, timesteps, batch["generators"][0])
        return self.denoiser(noisy.to(text.dtype), timesteps, text).sample

    def sample_latents(self, prompt: str, negative_prompt: str | None, seed: int) -> list[torch.Tensor]:
        try:
            return super().sample_latents(prompt, negative_prompt, seed)
        finally:
            self.text.hook.remove()

    def make_pipeline(self, scheduler):
        pipe = super().make_pipeline(scheduler)
        self.text.attach(pipe)
        return pipe

    def result_tensors(self) -> dict[str, torch.Tensor]:
        return self.tokens[0].tensors()

    def baseline_metadata(self) -> dict[str, str]:
        return {**super().baseline_metadata(), "baseline.layers": str(self.layers)}


class PPlus(Layered):
    """P+ (arXiv 2303.09522): see LayerWord. All embeddings start at the class word's and are trained together.

    The paper's settings are those of Textual Inversion with 500 steps and a batch of 8.
    """

    method_name = "P+ (arXiv 2303.09522)"
    presets = same_presets(500, 5e-3)
    defaults = {**Baseline.defaults, "train_batch_size": 8}

    def make_word(self, token: LearnedToken) -> LayerWord:
        start, mu = (x.repeat(self.layers, 1) for x in (token.start, token.prior_mean))
        return LayerWord(token.first_id, None, torch.nn.Parameter(start.clone()), mu, start, (1,))


class NeTI(Layered):
    """NeTI (arXiv 2305.15391): see Mapper, and LayeredText.states for the textual bypass.

    The released settings are 1000 steps, a batch of 8 (4 accumulated ones of 2), and a rate of 1e-3 that is multiplied by
    that batch. Departure: the released code adds the bypass in front of the text encoder's last LayerNorm, and this one
    behind it, to the output itself.
    """

    method_name = "NeTI (arXiv 2305.15391)"
    presets = same_presets(1000, 8e-3)
    defaults = {**Baseline.defaults, "train_batch_size": 8}

    def make_word(self, token: LearnedToken) -> MappedWord:
        # By the run's seed alone, so that a resumed run has the same random features.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch.initial_seed())
            mapper = Mapper(token.start.shape[-1], self.layers, token.start.norm().item()).to(token.start.device)
        given = (mapper, self.layers, self.args.bypass_alpha, self.args.nested_dropout)
        return MappedWord(token.first_id, None, flat(mapper), token.prior_mean, mapper.frequencies, (1,), *given)

    def baseline_metadata(self) -> dict[str, str]:
        own = {"norm": self.tokens[0].mapper.norm, "bypass_alpha": self.args.bypass_alpha}
        return {**super().baseline_metadata(), **{f"baseline.{name}": str(value) for name, value in own.items()}}


# ----------------------------------------------------------------------------------------------------------------------
# 4. CoRe
# ----------------------------------------------------------------------------------------------------------------------

# Other prompts than evaluate.py's, which would be seen in training.
CONTEXT_PROMPTS = """
an etching of a {} | a charcoal drawing of a {} on grey paper | a stained glass window of a {} | a marble bust of a {}
a wooden toy shaped like a {} | an embroidered {} on a cushion | a mosaic of a {} on the floor of a temple
a {} in a rose garden | a {} by a frozen lake | a {} in an empty subway station | a {} on a balcony at dusk
a {} under a bridge in the fog | a {} on the deck of a ship | a {} in a greenhouse full of ferns | a {} on a haystack
a {} next to a grandfather clock | a {} between two candles | a {} behind a stack of suitcases | a {} on a green armchair
a {} in front of a bakery | a {} in a shopping cart | a {} covered with confetti | a {} wrapped in a striped blanket
a golden {} in a museum | a tiny {} in the palm of a hand | a giant {} above the roofs of a village
a {} with a wreath of flowers | a {} at a birthday party with balloons | a {} beside a bowl of lemons
"""


class ObservedAttention(LayerAttention):
    """Cross-attention that can note how much attention each token gets, (B, 77): the mean over heads and positions."""

    seen: list | None = None

    def observe(self, q: torch.Tensor, k: torch.Tensor) -> None:
        if self.seen is not None:
            scores = q.float() @ k.float().transpose(-1, -2) / q.shape[-1] ** 0.5
            self.seen.append(scores.softmax(dim=-1).mean(dim=(1, 2)))


class CoRe(Baseline):
    """CoRe (Wu et al., arXiv 2408.15914): Textual Inversion that holds the words around the new word in place.

    At each step a context prompt is taken once with the new word, y, and once with the class word, y'. c runs over the
    tokens that both have: those before the word, those after it, the start token and the first end token.

        L = L_data + 1.5e-4 (1 - mean_c cos(E(y)_c, E(y')_c)) + 0.05 sum_B mean_l mean_c (a_l(y)_c - a_l(y')_c)^2

    E(y)_c is the text encoder's output, and a_l(y)_c the attention that token c gets in layer l, averaged over heads and
    positions, on the step's own noisy latents; B are the pictures of the batch. From step 120 to 180 the embedding keeps
    its norm. Weights, steps (300), batch (6) and rate are the released ones.

    Departures: the released code takes the cosine over the tokens of each channel. It then fine-tunes the UNet with the
    word as a second stage; here the model stays as it is, as with the other methods.
    """

    method_name = "CoRe (arXiv 2408.15914)"
    presets = same_presets(300, 5e-3)
    defaults = {**Baseline.defaults, "train_batch_size": 6}
    fixed = {**Baseline.fixed, "gradient_checkpointing": False}  # attention is read during the forward pass

    def __init__(self, args: argparse.Namespace):
        super().__init__(args)
        built_in = [prompt.strip() for line in CONTEXT_PROMPTS.strip().splitlines() for prompt in line.split("|")]
        self.contexts = read_contexts(args.context_prompts) if args.context_prompts else built_in

    def load_tokenizers(self) -> None:
        super().load_tokenizers()
        tokenizer, word = self.tokenizers[0], self.args.initializer_token
        class_ids = initializer_ids(tokenizer, word)
        for context in self.contexts:
            start = len(tokenizer(context.partition("{}")[0]).input_ids) - 1  # without the end token
            if tokenizer(context.replace("{}", word)).input_ids[start:][: len(class_ids)] != class_ids:
                raise UserError(f"--context_prompts: in {context!r} {{}} is no word of its own: put spaces around it.")

    def make_token(self, encoder, tokenizer, first_id: int, counts: Sequence[int], warm_start) -> LearnedToken:
        self.attention = set_processors(self.denoiser, ObservedAttention)
        return super().make_token(encoder, tokenizer, first_id, counts, warm_start)

    def loss(self, batch: dict) -> torch.Tensor:
        self.norms = self.tokens[0].parameter.detach().norm(dim=-1, keepdim=True)
        return super().loss(batch) + self.penalty  # in this order: predict computes the penalty

    def predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, batch: dict) -> torch.Tensor:
        """The UNet's prediction. Beside it computes the penalty, which needs the same noisy latents."""
        context = self.contexts[int(torch.randint(len(self.contexts), (1,), generator=batch["generators"][0]))]
        self.penalty = self.context_penalty(context, noisy, timesteps)
        return super().predict(noisy, timesteps, batch)

    def context_penalty(self, context: str, noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Both penalties with their weights, for one context prompt. A float32 scalar, zero for the class word itself."""
        args, encoder = self.args, self.text_encoders[0]
        both = [context.replace("{}", word) for word in (args.placeholder_token, args.initializer_token)]
        ids = self.context_ids(both).to(noisy.device)
        hidden = encoder(ids).last_hidden_state
        shared = self.shared_tokens(ids)
        mine, theirs = (hidden[row, places].float() for row, places in enumerate(shared))
        penalty = args.context_weight * (1 - F.cosine_similarity(mine, theirs, dim=-1).mean())
        if args.attention_weight:
            mine = self.attention_to(hidden[0], shared[0], noisy, timesteps)
            with torch.no_grad():
                theirs = self.attention_to(hidden[1], shared[1], noisy, timesteps)
            errors = torch.stack([(a - b).square() for a, b in zip(mine, theirs, strict=True)])  # (L, B, tokens)
            penalty = penalty + args.attention_weight * errors.mean(dim=-1).mean(dim=0).sum()
        return penalty

    def context_ids(self, prompts: list[str]) -> torch.Tensor:
        return token_ids(self.tokenizers[0], [self.to_pipeline_prompt(x, self.tokenizers[0]) for x in prompts])

    def shared_tokens(self, ids: torch.Tensor) -> list[torch.Tensor]:
        """The places of the shared tokens in the prompt with the new word and in that with the class word (2, 77)."""
        tokenizer = self.tokenizers[0]
        class_ids = initializer_ids(tokenizer, self.args.initializer_token)
        first = int((ids[0] >= self.tokens[0].first_id).nonzero()[0])
        places = []
        for row, width in zip(ids, (len(self.tokens[0].start), len(class_ids)), strict=True):
            end = int((row == tokenizer.eos_token_id).nonzero()[0])
            places.append(torch.tensor([*range(first), *range(first + width, end + 1)], device=ids.device))
        return [place[: min(map(len, places))] for place in places]  # of many vectors the prompt's end is cut

    def attention_to(self, hidden: torch.Tensor, places: torch.Tensor, noisy, timesteps) -> list[torch.Tensor]:
        """How much attention the tokens at these places get from each picture, (B, tokens) for each layer."""
        for processor in self.attention:
            processor.seen = []
        text = hidden.expand(len(noisy), -1, -1)
        self.denoiser(noisy.to(text.dtype), timesteps, text)
        seen = [processor.seen[0][:, places] for processor in self.attention]
        for processor in self.attention:
            processor.seen = None
        return seen

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Give the embedding the norm that it had before the step, from --rescale_start_step on."""
        if self.args.rescale_start_step < step <= self.args.rescale_stop_step:
            parameter = self.tokens[0].parameter
            parameter.mul_(self.norms / parameter.norm(dim=-1, keepdim=True))

    def result_tensors(self) -> dict[str, torch.Tensor]:
        return {self.args.placeholder_token: self.tokens[0].embedding().detach()}


def read_contexts(path: Path) -> list[str]:
    """The prompts of --context_prompts. Raises UserError."""
    try:
        contexts = read_templates(path)
    except UserError as error:
        raise UserError(str(error).replace("--prompt_templates", "--context_prompts")) from None
    if twice := [context for context in contexts if context.count("{}") > 1]:
        raise UserError(f"--context_prompts {path}: the line {twice[0]!r} has {{}} more than once: leave one.")
    return contexts


METHODS = {"plus": PPlus, "neti": NeTI, "core": CoRe}
WORDS = {"plus": LayerWord, "neti": MappedWord}


# ----------------------------------------------------------------------------------------------------------------------
# 5. Reading a result, and installing it in a pipeline
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Word(Embedding):
    """A word of P+ or NeTI from a file. `vectors` are its embeddings in the layers, and with NeTI at the anchors' times.

    Attributes:
        state: the file's tensors by name.
    """

    state: dict[str, torch.Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        """One token of the tokenizer stands for all of it."""
        return 1

    @property
    def layers(self) -> int:
        return int(self.metadata["baseline.layers"])

    @property
    def alpha(self) -> float:
        return float(self.metadata["baseline.bypass_alpha"])


def read_word(path: Path) -> Embedding:
    """A word of P+ or NeTI as a `Word`, anything else as export.py reads it. Raises EmbeddingError."""
    file = find_file(path) if os.path.isdir(path) else path
    state, metadata = read_state(file) if Path(file).suffix == ".safetensors" else ({}, {})
    method = metadata.get("baseline.method")
    if method not in WORDS:
        return read_embedding(path)
    try:
        token = check_token(metadata["modelspec.trigger_phrase"], f"{file}: the token")
        word = Word(token, {}, metadata, state)
        if method == "plus":
            rows = torch.stack([state[f"layer.{index}"] for index in range(word.layers)])
        else:
            rows = MappedWord.read(word, 0, float(metadata["baseline.norm"])).embedding()
    except (KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise EmbeddingError(f"{file} is not whole: it says it is a word of {method}, and lacks {reason}.") from None
    if not rows.isfinite().all():
        raise EmbeddingError(f"{file} has NaN or infinity in its tensors: it is damaged.")
    word.vectors["text_encoder"] = rows
    return word


def check_layers(embedding: Embedding, folder: Path, source: Path | str, model: str) -> None:
    """Refuse a word with other layers than the UNet of the model's folder. Raises EmbeddingError."""
    if not isinstance(embedding, Word):
        return
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder, subfolder="unet"))
    found = sum(name.endswith("attn2.processor") for name in unet.attn_processors)
    if found != embedding.layers:
        raise EmbeddingError(f"{source} is for {embedding.layers} cross-attention layers, and {model} has {found}.")


def install(pipe, words: list[Word]) -> None:
    """Add words of P+ and NeTI to a StableDiffusionPipeline, after all other embeddings. They work anywhere in a prompt."""
    if not words:
        return
    layers, learned = len(set_processors(pipe.unet, LayerAttention)), []
    for word in words:
        pipe.tokenizer.add_tokens([word.token])
        first_id = pipe.tokenizer.convert_tokens_to_ids(word.token)
        learned.append(WORDS[word.metadata["baseline.method"]].read(word, first_id))
    text = LayeredText(pipe.text_encoder, learned, layers)
    pipe.text_encoder.set_input_embeddings(ExtendedEmbedding(pipe.text_encoder.get_input_embeddings(), text))
    text.attach(pipe)


# ----------------------------------------------------------------------------------------------------------------------
# 6. Main
# ----------------------------------------------------------------------------------------------------------------------


MODEL_CLASS = Baseline


def command_line() -> argparse.ArgumentParser:
    """The options of all methods, with the defaults that they share."""
    return make_parser(Baseline)


def chosen_method(argv: list[str] | None) -> str | None:
    """--method of the command line or of --config; None without one, which the parser reports. Raises UserError."""
    given = vars(parse_given(sys.argv[1:] if argv is None else argv, Baseline))
    if "method" not in given and "config" in given:
        given = vars(parse_given(config_arguments(given, Baseline), Baseline))
    return given.get("method")


def main(argv: list[str] | None = None, model_class: type = MODEL_CLASS) -> None:
    method = METHODS.get(chosen_method(argv))
    if method is not None:  # train_many.py gives a subclass of Baseline that keeps the weights between subjects
        model_class = method if model_class is Baseline else type(method.__name__, (method, model_class), {})
    train(argv, model_class)


if __name__ == "__main__":
    run(MODEL_CLASS, main)
