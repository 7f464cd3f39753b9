"""--base_precision int8: the gradient and the pictures stay what they are, the weights take half, and nothing is kept."""

import copy
import json
import re
import shutil

import generate
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from safetensors.torch import load_file

import train_dti_sana
import train_dti_sdxl


LAYERS = (train_dti_sdxl.Int8Linear, train_dti_sdxl.Int8Conv2d, train_dti_sana.Int8Linear, train_dti_sana.Int8Conv2d)
FLOOR = 0.995  # of the gradient's cosine; bf16 has .9994 and more, with scales that are wrong by a tenth it is .92 and less


@pytest.fixture(params=[train_dti_sdxl, train_dti_sana], ids=["sdxl", "sana"])
def trainer(request):
    return request.param


def miniature(trainer):
    return ROOT / "examples" / "miniature" / trainer.__name__.removeprefix("train_dti_")


def gradients(model, seed: int = 0, size: int = 4) -> list[torch.Tensor]:
    """The gradient of the loss of a batch of soft noise with respect to the new word, for each text encoder."""
    pixels = torch.rand(size, 3, 64, 64, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    batch = dict(model.encode_images((F.avg_pool2d(pixels, 9, 1, 4) * 3).clamp(-1, 1)))
    batch["prompt"] = ["a photo of a <my-pot>"] * size
    batch["generators"] = [torch.Generator().manual_seed(seed + index) for index in range(size)]
    batch["time_ids"] = torch.tensor([[64.0, 64, 0, 0, 64, 64]]).repeat(size, 1)
    for token in model.tokens:
        token.parameter.grad = None
    model.loss(batch).backward()
    return [token.parameter.grad.clone() for token in model.tokens]


def cosine(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """The smaller one of the text encoders'."""
    return min(F.cosine_similarity(a.flatten(), b.flatten(), dim=0).item() for a, b in zip(one, other, strict=True))


def int8_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [layer for layer in model.modules() if isinstance(layer, LAYERS)]


@pytest.mark.parametrize("geometry", [None, {}, {"stride": 2, "padding": 1}, {"groups": 8, "padding": 1}])
def test_the_gradient_is_that_of_the_weight_which_it_stands_for(geometry):
    """Forward and backward as the stock layer has them with the rounded weight, which is near the one that was there."""
    torch.manual_seed(0)
    kind = torch.nn.Linear if geometry is None else torch.nn.Conv2d
    stock = kind(16, 8) if geometry is None else kind(16, 8, 3, **geometry)
    with torch.no_grad():
        stock.weight[3] = 0  # a channel of zeros
        stock.weight[5] *= 1000  # each channel has a scale of its own
    layer = train_dti_sdxl.to_int8(torch.nn.Sequential(copy.deepcopy(stock)), torch.float32)[0]
    assert layer.weight.dtype == torch.int8 and isinstance(layer, kind)
    rounded = layer.weight * layer.scale
    largest = stock.weight.flatten(1).abs().amax(1)
    assert ((rounded - stock.weight).flatten(1).abs().amax(1) <= largest / 127 / 2 * 1.001).all()
    stock.weight.data = rounded
    x = torch.randn(2, 16, 9, 9).movedim(1, -1 if kind is torch.nn.Linear else 1).requires_grad_()
    outputs = [part(x) for part in (layer, stock)]
    assert torch.equal(*outputs)
    (ours,), (theirs,) = (torch.autograd.grad(output.square().sum(), x) for output in outputs)
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-3 * theirs.std().item())


def test_what_is_kept_for_the_backward_pass_is_the_int8_weight_alone():
    """Neither a copy of the weight in the activations' precision nor the activations."""
    kept = []
    model = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3), torch.nn.Conv2d(8, 8, 1)).requires_grad_(False)
    train_dti_sdxl.to_int8(model, torch.bfloat16).to(torch.bfloat16)
    x = torch.randn(1, 8, 6, 6, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        model(x)
    own = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert {tensor.data_ptr() for tensor in kept} <= own and len(kept) == 4
    assert max(kept, key=torch.Tensor.numel).dtype == torch.int8


def test_the_gradient_keeps_its_direction_and_a_broken_scale_is_noticed(loaded, trainer):
    options = {"pretrained_model_name_or_path": miniature(trainer), "initializer_token": "heart"}
    wanted = gradients(loaded(**options))
    model = loaded("--gradient_checkpointing", **options, base_precision="int8")
    assert cosine(wanted, gradients(model)) > FLOOR

    # Half of SANA's weights are convolutions: what is not in int8 are the VAE, embeddings, norms, biases, and ends.
    for part in (model.denoiser, *model.text_encoders):
        layers = {n: type(x) for n, x in part.named_modules() if isinstance(x, (torch.nn.Linear, torch.nn.Conv2d))}
        assert {n for n, kind in layers.items() if kind not in LAYERS} == {
            n for n in layers if not re.search(r"\.\d", n)
        }
        weights = [p.nbytes for p in part.parameters() if p.dtype == torch.int8]
        assert sum(weights) > 0.6 * sum(p.nbytes for p in part.parameters())

    kinds = [torch.nn.Linear, torch.nn.Conv2d]
    for kind in kinds:
        layers = [layer for layer in int8_layers(model.denoiser) if isinstance(layer, kind)]
        for layer in layers:
            layer.scale *= 1.1
        assert cosine(wanted, gradients(model)) < FLOOR, kind
        for layer in layers:
            layer.scale /= 1.1
    assert cosine(wanted, gradients(model)) > FLOOR


def test_a_run_repeats_to_the_bit_and_goes_on_from_a_checkpoint(train, trainer, models_seen, tmp_path):
    """With adapters on the int8 layers, gradient checkpointing and half precision; the base stays in int8 as it was."""
    run = {"base_precision": "int8", "rank": 2, "mixed_precision": "bf16", "checkpointing_steps": 2}
    first = train("--gradient_checkpointing", **run)
    base = {k: v.clone() for k, v in models_seen[0].denoiser.state_dict().items() if v.dtype == torch.int8}
    killed = tmp_path / "killed"
    shutil.copytree(first / "checkpoint-2", killed / "checkpoint-2")
    train("--gradient_checkpointing", **run, output_dir=killed, resume_from_checkpoint="latest")
    files = [*trainer.MODEL_CLASS.embedding_files, "pytorch_lora_weights"]
    for name in files:
        a, b = (load_file(folder / f"{name}.safetensors") for folder in (first, killed))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert any(rows.any() for name, rows in a.items() if name.endswith("lora_B.weight"))

    denoiser = models_seen[1].denoiser
    layers = int8_layers(denoiser)
    assert {p.dtype for name, p in denoiser.named_parameters() if "lora_" in name} == {torch.float32}
    assert {layer.weight.dtype for layer in layers} == {torch.int8} and {x.scale.dtype for x in layers} == {
        torch.bfloat16
    }
    after = denoiser.state_dict()
    assert base and all(torch.equal(after[name], weight) for name, weight in base.items())
    assert "int8" in json.loads((first / "training_options.json").read_text())["derived"]["precision"]


def test_the_vocabulary_stays_on_the_cpu(loaded, trainer):
    """Wherever the encoder goes; it is cast as the rest is, and its rows are those that were there."""
    plain, model = loaded(), loaded(base_precision="int8")
    for ours, stock in zip(model.text_encoders, plain.text_encoders, strict=True):
        ids = torch.tensor([[5, model.tokens[0].first_id, 7]])
        embedding = ours.get_input_embeddings()
        assert torch.equal(embedding(ids), stock.get_input_embeddings()(ids))
        assert sum(p.numel() for p in stock.parameters()) - embedding.weight.numel() == sum(
            p.numel() for p in ours.parameters()
        )
        ours.to("meta", torch.bfloat16)
        assert embedding.weight.device.type == "cpu" and embedding.weight.dtype == torch.bfloat16
        assert ours.device.type == "meta"  # which encode_prompts asks for


def test_the_vae_works_in_tiles_where_the_memory_is_too_small(loaded, monkeypatch, caplog):
    """And only there; where a tile is too much as well, the error is the device's own."""
    model = loaded(resolution=1024)
    pixels = torch.zeros(1, 3, 1024, 1024)
    whole, forward = model.encode_images(pixels), model.vae.encoder.forward
    assert not model.vae.use_tiling and "tiles" not in caplog.text

    def of_at_most(side: int):
        def encode(x):
            if x.shape[-1] > side:
                raise torch.cuda.OutOfMemoryError
            return forward(x)

        monkeypatch.setattr(model.vae.encoder, "forward", encode)

    of_at_most(512)
    tiled = model.encode_images(pixels)
    assert {name: x.shape for name, x in tiled.items()} == {name: x.shape for name, x in whole.items()}
    assert caplog.text.count("tiles") == 1 and model.vae.use_tiling
    of_at_most(256)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        model.encode_images(pixels)


@pytest.mark.parametrize("family", ["sdxl", "sana", "sd"])
def test_pictures_are_nearly_the_same(small, family):
    """generate.py and evaluate.py draw by this; after the whole sampling few pixels differ by much."""
    path = ROOT / "examples" / "miniature" / family
    path = path if path.is_dir() else small / family
    options = {"steps": 4, "guidance_scale": 3.0, "resolution": 64}
    pictures = []
    for precision in ("auto", "int8"):
        pipe = generate.load_pipeline(str(path), base_precision=precision)
        assert bool(int8_layers(generate.denoiser_of(pipe))) == (precision == "int8")
        assert bool(int8_layers(pipe.text_encoder)) == (precision == "int8")
        ((_, _, picture),) = generate.generate(pipe, ["a photo of a heart"], [0], **options)
        pictures.append(np.asarray(picture, float))
    assert 0 < np.abs(pictures[0] - pictures[1]).mean() < 5  # of 255


@pytest.mark.slow
def test_compiled_blocks_and_two_processes_give_the_same(launch, train, tmp_path):
    run = {"base_precision": "int8", "gradient_checkpointing": "true"}
    plain = load_file(train(**run, output_dir=tmp_path / "plain") / "learned_embeds.safetensors")
    compiled = load_file(train("--compile", **run, output_dir=tmp_path / "compiled") / "learned_embeds.safetensors")
    halves = launch(launcher="torch.distributed.run --standalone --nproc_per_node 2", **run, train_batch_size=1)
    assert halves.returncode == 0, halves.stderr
    for other in (compiled, load_file(tmp_path / "out" / "learned_embeds.safetensors")):
        assert torch.allclose(plain["<my-pot>"], other["<my-pot>"], atol=1e-5)
