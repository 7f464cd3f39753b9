"""Masks: they go with their views, weigh the loss, come from a folder or the alpha channel, and are refused where they cannot."""

import argparse

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from test_data import data_options

import train_dti_sana
import train_dti_sdxl as script
from train_dti_sdxl import UserError


def blob(width: int, height: int, seed: int = 0) -> Image.Image:
    """A white blob somewhere on black."""
    rng = np.random.default_rng(seed)
    image = Image.new("L", (width, height))
    x, y = rng.uniform(0.3, 0.7, 2) * (width, height)
    ImageDraw.Draw(image).ellipse((x - 15, y - 10, x + 15, y + 20), fill=255)
    return image


@pytest.fixture
def masked(tmp_path):
    """Photographs that are their own masks, white where the subject is, so that a view shows what its mask should be."""
    for folder in ("photos", "masks", "alpha"):
        (tmp_path / folder).mkdir()
    for number, size in enumerate([(90, 70), (70, 120), (64, 64)]):
        mask = blob(*size, number)
        mask.convert("RGB").save(tmp_path / "photos" / f"{number}.png")
        mask.save(tmp_path / "masks" / f"{number}.png")
        transparent = Image.new("RGB", size, "white")
        transparent.putalpha(mask)
        transparent.save(tmp_path / "alpha" / f"{number}.png")
    return tmp_path


def mask_options(folder, **changes) -> argparse.Namespace:
    defaults = {"mask_dir": folder / "masks", "random_flip": True, "crops_per_image": 6, "resolution": 64}
    return data_options(folder / "photos", **defaults | changes)


# The loss.


def test_the_loss_is_the_weighted_mean_of_each_example():
    errors = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(2, 1, 16, 16)
    mask[0, 0, :8, :8] = 1  # a quarter of the latent positions
    mask[1, 0, 4:8, 2:8] = 1  # one position, and half of another
    w = torch.full((2, 4, 4), 0.1)
    w[0, :2, :2] = 1
    w[1, 1, 0], w[1, 1, 1] = 0.1 + 0.9 * 0.5, 1
    expected = np.mean([np.average(errors[i].mean(dim=0), weights=w[i]) for i in range(2)])
    found = script.mean_over_subject(errors, {"mask": mask}, 0.1)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    pooled = script.mean_over_subject(errors, {"mask": F.adaptive_avg_pool2d(mask, 4)}, 0.1)  # as it is cached
    assert torch.allclose(pooled, found)
    assert script.mean_over_subject(errors, {}, None) == errors.mean()
    assert torch.allclose(script.mean_over_subject(errors, {"mask": torch.ones(2, 1, 8, 8)}, 0.1), errors.mean())


def test_without_background_only_the_subject_counts():
    errors = torch.rand(2, 3, 4, 4, requires_grad=True)
    mask = torch.zeros(2, 1, 4, 4)
    mask[0, 0, 1, 2] = 1  # and the second example shows nothing of it
    loss = script.mean_over_subject(errors, {"mask": mask}, 0.0)
    loss.backward()
    assert loss.item() == pytest.approx(errors[0, :, 1, 2].mean().item() / 2)
    assert errors.grad[0, :, 1, 2].tolist() == pytest.approx([1 / 6] * 3)
    errors.grad[0, :, 1, 2] = 0
    assert not errors.grad.any()


# A mask goes with its view.


@pytest.mark.parametrize("how", ["mask_dir", "alpha_mask"])
def test_a_mask_has_its_view_s_crop_and_flip(masked, how):
    args = mask_options(masked)
    if how == "alpha_mask":
        args = mask_options(masked, mask_dir=None, alpha_mask=True, instance_data_dir=masked / "alpha")
    photographs = script.load_photographs(args)
    examples = script.TrainingExamples(photographs, [["a <new>"]] * 3, None, 0, args)
    shown = script.TrainingExamples(script.load_photographs(mask_options(masked)), [["a <new>"]] * 3, None, 0, args)
    seen = set()
    for position in range(24):
        mask = examples[position]["mask"]
        assert mask.shape == (1, 64, 64) and mask.min() == 0 and mask.max() == 1
        if how == "mask_dir":
            torch.testing.assert_close(mask, (shown[position]["pixel_values"][:1] + 1) / 2)
        else:  # the same views, of the photographs that their alpha channels were
            view = shown_view(examples, position, masked)
            torch.testing.assert_close(mask, view)
        seen.add(mask.sum().item())
    assert len(seen) > 6


def shown_view(examples, position: int, folder) -> torch.Tensor:
    """The mask of the example's view, cut out of the mask's own file."""
    epoch, place = divmod(position, 3)
    index = int(np.random.default_rng([0, 0, epoch]).permutation(3)[place])
    rng = np.random.default_rng([0, 1, position])
    rng.integers(1)  # the prompt
    mask = Image.open(folder / "masks" / f"{index}.png")
    view = script.draw_view(mask.size, examples.args, rng, mask)
    return script.render_view(mask.convert("RGB"), mask, view, 64)["mask"]


@pytest.mark.parametrize("module", [script, train_dti_sana])
def test_masks_are_cached_with_the_views_at_the_latents_size(masked, module, small, tmp_path):
    model_class = module.MODEL_CLASS
    argv = f"--pretrained_model_name_or_path {small}/{module.__name__[10:]} --placeholder_token <new> --output_dir out"
    argv += f" --initializer_token dog --instance_data_dir {masked}/photos --mask_dir {masked}/masks --resolution 64"
    model = model_class(module.parse_args(f"{argv} --random_flip --crops_per_image 6".split(), model_class))
    assert model.args.mask_background == 0.1
    model.load_tokenizers()
    model.load(torch.float32)
    photographs = module.load_photographs(model.args)
    cached = []
    encode = model.encode_images
    model.encode_images = lambda pixels: cached.append(pixels) or encode(pixels)
    views = module.cache_latents(model, photographs, 0, module.Accelerator(cpu=True))
    views = [view for each in views for view in each]
    assert len(views) == len(cached) > 6
    for view, pixels in zip(views, cached, strict=True):
        latents = view.get("mean", view.get("latents"))
        assert view["mask"].shape == (1, *latents.shape[1:])
        expected = F.adaptive_avg_pool2d((pixels[0, :1] + 1) / 2, latents.shape[1:])
        torch.testing.assert_close(view["mask"], expected)


def test_views_show_the_subject():
    mask = Image.new("L", (640, 64))
    mask.paste(255, (500, 20, 540, 50))
    args = data_options(resolution=64)
    seen = [script.draw_view(mask.size, args, np.random.default_rng(i), mask) for i in range(40)]
    shares = [script.subject_share(mask, view, 64) for view in seen]
    assert sum(share >= 0.5 for share in shares) > 20
    blind = [script.draw_view(mask.size, args, np.random.default_rng(i)) for i in range(40)]
    assert sum(script.subject_share(mask, view, 64) >= 0.5 for view in blind) < 10
    assert max(shares) == pytest.approx(1, abs=0.05) and min(shares) >= 0


# A run.


def load_embedding(folder) -> torch.Tensor:
    return load_file(folder / "learned_embeds.safetensors")["<my-pot>"]


@pytest.mark.parametrize("trainer", [script, train_dti_sana], indirect=True)
def test_masks_change_what_is_learned_and_views_cached_or_not_agree(trainer, train, masked, tmp_path):
    def learned(*flags, **changes) -> torch.Tensor:
        options = {"instance_data_dir": masked / "photos", "train_batch_size": 2, "max_train_steps": 2}
        out = train(
            "--center_crop", *flags, output_dir=tmp_path / f"out{len(list(tmp_path.iterdir()))}", **options | changes
        )
        return load_embedding(out)

    plain, with_masks = learned(), learned(mask_dir=masked / "masks")
    assert script.angle(plain, with_masks).max() > 0.02
    fresh = learned("--no_cache_latents", mask_dir=masked / "masks")
    assert script.angle(fresh, with_masks).max() < 1e-3
    assert torch.equal(learned(mask_dir=masked / "masks", mask_background=0.1), with_masks)
    assert script.angle(learned(mask_dir=masked / "masks", mask_background=0.5), with_masks).max() > 0.01


def test_alpha_channels_change_nothing_unless_asked(train, masked, tmp_path):
    """Transparency is white, as ever; with --alpha_mask the run is that of the same pictures with masks in a folder."""
    (tmp_path / "flat").mkdir()
    for path in (masked / "photos").iterdir():
        Image.new("RGB", Image.open(path).size, "white").save(tmp_path / "flat" / path.name)

    def learned(name, **changes) -> torch.Tensor:
        return load_embedding(train(output_dir=tmp_path / name, max_train_steps=2, **changes))

    alpha = learned("a", instance_data_dir=masked / "alpha")
    assert torch.equal(alpha, learned("b", instance_data_dir=tmp_path / "flat"))
    with_alpha = learned("c", instance_data_dir=masked / "alpha", alpha_mask=True)
    assert torch.equal(with_alpha, learned("d", instance_data_dir=tmp_path / "flat", mask_dir=masked / "masks"))
    assert not torch.equal(alpha, with_alpha)


# What is wrong with them.


def test_masks_by_name_and_photographs_without(masked, caplog):
    (masked / "masks" / "1.png").unlink()
    args = mask_options(masked)
    photographs = script.load_photographs(args)
    assert "Without a mask, and counted as a whole: '1.png'" in caplog.text
    script.check_masks(photographs, args)
    examples = script.TrainingExamples(photographs, [["a <new>"]] * 3, None, 0, args)
    masks = [examples[i]["mask"] for i in range(3)]
    assert sum(bool((mask == 1).all()) for mask in masks) == 1


def test_a_larger_mask_of_the_same_shape_fits(masked):
    for path in (masked / "masks").iterdir():
        image = Image.open(path)
        image.resize((3 * image.width, 3 * image.height)).save(path)
    args = mask_options(masked)
    photographs = script.load_photographs(args)
    script.check_masks(photographs, args)
    example = script.TrainingExamples(photographs, [["a <new>"]] * 3, None, 0, args)[0]
    assert ((example["mask"] - (example["pixel_values"][:1] + 1) / 2).abs() < 0.2).float().mean() > 0.97


def turned(folder):
    image = Image.open(folder / "masks" / "1.png")
    image.rotate(90, expand=True).save(folder / "masks" / "1.png")


def all_of(colour: int):
    def paint(folder):
        for path in (folder / "masks").iterdir():
            Image.new("L", Image.open(path).size, colour).save(path)

    return paint


def transparent(folder):
    image = Image.open(folder / "masks" / "2.png").convert("RGB")
    image.putalpha(blob(*image.size))
    image.save(folder / "masks" / "2.png")


def damaged(folder):
    (folder / "masks" / "0.png").write_bytes(b"no mask")


def others(folder):
    for path in (folder / "masks").iterdir():
        path.rename(path.with_name(f"mask-{path.name}"))


WRONG = {
    turned: "1.png is 120 x 70, which is not the shape of the photograph, 70 x 120",
    all_of(0): "0.png shows no subject: its mask is black everywhere",
    all_of(255): "--mask_dir .*masks: the masks are white everywhere and would change nothing",
    transparent: "2.png has transparent parts: a mask is grey",
    damaged: "0.png is damaged or not an image",
    others: "--mask_dir .*masks has no mask named as a photograph, such as 0.png",
}


@pytest.mark.parametrize("spoil", WRONG, ids=list(WRONG.values()))
def test_masks_that_cannot_be_used_are_named(masked, spoil):
    spoil(masked)
    args = mask_options(masked)
    with pytest.raises(UserError, match=WRONG[spoil]):
        script.check_masks(script.load_photographs(args), args)


def test_photographs_without_transparency_have_no_alpha_masks(masked):
    args = mask_options(masked, mask_dir=None, alpha_mask=True)
    with pytest.raises(UserError, match="--alpha_mask: the masks are white everywhere and would change nothing"):
        script.check_masks(script.load_photographs(args), args)
