"""The scripts' model code on the real models' widths, so that no shape error hides behind the small ones.

Every module has the published configuration's widths, heads and channels, with random weights; only the depth (layers a
block) and the vocabulary's unused rows are cut. One forward and backward pass each, on one small latent.
"""

import argparse

import pytest
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SanaTransformer2DModel,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, Gemma2Config, Gemma2Model

import train_dti_sana
import train_dti_sdxl


pytestmark = pytest.mark.slow


def token_options() -> argparse.Namespace:
    return argparse.Namespace(magnitude="mean", init="token", initializer_token="teapot", optimizer="rsgd", kappa=1e-4)


def frozen(model):
    return model.to(torch.bfloat16).requires_grad_(False).eval()


def clip_text_encoder(cls, width, intermediate, heads, activation):
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=intermediate,
        projection_dim=width,
        num_attention_heads=heads,
        num_hidden_layers=2,  # 12 and 32
        hidden_act=activation,
        eos_token_id=2,
    )
    return frozen(cls(config))


def sdxl_unet():
    return frozen(
        UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,  # 2
            attention_head_dim=(5, 10, 20),
            transformer_layers_per_block=1,  # 1, 2, 10
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
    )


def sdxl_vae():
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,  # 2
        latent_channels=4,
        sample_size=1024,
        scaling_factor=0.13025,
    ).requires_grad_(False)


def sana_transformer():
    """SANA 1.5: 1.6B has 20 layers and 4.8B has 60 of these, nothing else differs."""
    return frozen(
        SanaTransformer2DModel(
            in_channels=32,
            out_channels=32,
            num_attention_heads=70,
            attention_head_dim=32,
            num_layers=2,  # 20 or 60
            num_cross_attention_heads=20,
            cross_attention_head_dim=112,
            cross_attention_dim=2240,
            caption_channels=2304,
            mlp_ratio=2.5,
            sample_size=32,
            patch_size=1,
            qk_norm="rms_norm_across_heads",
        )
    )


def sana_vae():
    blocks = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    scales = ((), (), (), (5,), (5,), (5,))
    return AutoencoderDC(
        latent_channels=32,
        attention_head_dim=32,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=(128, 256, 512, 512, 1024, 1024),
        decoder_block_out_channels=(128, 256, 512, 512, 1024, 1024),
        encoder_layers_per_block=(1,) * 6,  # 2, 2, 2, 3, 3, 3
        decoder_layers_per_block=(1,) * 6,  # 3 each
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        upsample_block_type="interpolate",
        downsample_block_type="conv",
        scaling_factor=0.41407,
    ).requires_grad_(False)


def gemma():
    return frozen(
        Gemma2Model(
            Gemma2Config(
                vocab_size=256000,
                hidden_size=2304,
                intermediate_size=9216,
                num_hidden_layers=2,  # 26
                num_attention_heads=8,
                num_key_value_heads=4,
                head_dim=256,
                query_pre_attn_scalar=256,
                sliding_window=4096,
                use_cache=False,
            )
        )
    )


def check_a_step(script, models, args, widths, latent_shape):
    """Add the new word, encode an image, take one step; every direction must have turned by arctan of the rate."""
    for encoder, tokenizer in zip(models.text_encoders, models.tokenizers, strict=True):
        first_id = script.add_placeholder(tokenizer, "<new>", 1)
        models.tokens.append(script.make_token(encoder, tokenizer, first_id, 1, None, args))
    assert [tuple(token.parameter.shape) for token in models.tokens] == [(1, width) for width in widths]
    pixels = torch.rand(1, 3, 64, 64) * 2 - 1
    batch = {"pixel_values": pixels, "prompt": ["a photo of <new> on grass"]}
    batch |= {k: v[None] for k, v in script.size_conditioning((64, 64), script.View(False, 0, 0), 64).items()}
    latents = script.encode_images(models.vae, pixels)
    assert all(x.shape == latent_shape and x.isfinite().all() for x in latents.values())

    before = [token.parameter.detach().clone() for token in models.tokens]
    optimizer = script.make_optimizer(models.tokens, argparse.Namespace(**vars(args), learning_rate=0.1))
    loss = script.diffusion_loss(models, {**batch, "generators": [torch.Generator().manual_seed(0)]})
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    for token, v in zip(models.tokens, before, strict=True):
        assert script.angle(token.parameter.detach(), v).item() == pytest.approx(5.7106, abs=1e-3)


def test_sdxl(small):
    script = train_dti_sdxl
    args = argparse.Namespace(pretrained_model_name_or_path=str(small / "sdxl"), revision=None, hub_token=None)
    models = script.Models(
        tokenizers=script.load_tokenizers(args),
        text_encoders=[
            clip_text_encoder(CLIPTextModel, 768, 3072, 12, "quick_gelu"),
            clip_text_encoder(CLIPTextModelWithProjection, 1280, 5120, 20, "gelu"),
        ],
        unet=sdxl_unet(),
        vae=sdxl_vae(),
        noise_scheduler=DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        tokens=[],
    )
    check_a_step(script, models, token_options(), (768, 1280), (1, 4, 8, 8))


def test_sana(small):
    script = train_dti_sana
    args = script.parse_args(
        f"--pretrained_model_name_or_path {small / 'sana'} --placeholder_token <new> --initializer_token teapot"
        " --output_dir unused".split()
    )
    scheduler = FlowMatchEulerDiscreteScheduler()
    models = script.Models(
        tokenizers=script.load_tokenizers(args),
        text_encoders=[gemma()],
        transformer=sana_transformer(),
        vae=sana_vae(),
        timesteps=scheduler.timesteps,
        sigmas=scheduler.sigmas,
        instruction="",
        max_length=300,
        args=args,
        tokens=[],
    )
    check_a_step(script, models, token_options(), (2304,), (1, 32, 2, 2))
