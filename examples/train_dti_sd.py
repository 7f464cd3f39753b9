#!/usr/bin/env python
# Copyright 2026 The Directional Textual Inversion developers. Licensed under the Apache License, Version 2.0.
#
# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.4",
#     "diffusers>=0.35.0",
#     "transformers>=4.51.3",
#     "accelerate>=1.6.0",
#     "peft>=0.17.0",
#     "datasets>=3.6.0",
#     "huggingface_hub>=0.34.0",
#     "safetensors>=0.5.3",
#     "pyyaml>=6.0.2",
#     "pillow>=10.4.0",
#     "matplotlib>=3.9.0",
#     "tensorboard>=2.18.0",
# ]
# ///
"""Teach Stable Diffusion 1.5 or 2.1 a new word by Directional Textual Inversion (DTI).

    accelerate launch examples/train_dti_sd.py --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
      --instance_data_dir photos/dog --placeholder_token "<my-dog>" --initializer_token dog --output_dir out/my-dog

This is train_dti_sdxl.py with another model: one text encoder, no size conditioning, no pooled embedding. Fine-tuned models and
models with v-prediction work too. train_dti_sdxl.py defines and documents options, checks and files.

Written to --output_dir: `learned_embeds.safetensors` for `pipe.load_textual_inversion`, `<placeholder>.safetensors` for
ComfyUI, AUTOMATIC1111 and similar tools, and the other files of train_dti_sdxl.py.
"""

import argparse
import contextlib
import json
import sys
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTextModel


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from train_dti_sdxl import (  # noqa: E402
    LORA_FILE,
    StableDiffusionXL,
    UserError,  # noqa: F401  train_many.py uses this name and `interruption`
    check_options,  # noqa: F401  sweep.py uses this name and `parse_args`
    interruption,  # noqa: F401
    model_name,
    number,
    parse_args,  # noqa: F401
    printed_options,
    run,
)
from train_dti_sdxl import main as train  # noqa: E402


class StableDiffusion(StableDiffusionXL):
    """Stable Diffusion 1 and 2, their fine-tuned models included."""

    defaults = {"resolution": 512}
    pipeline_class = StableDiffusionPipeline
    pipeline_options = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    other_scripts = {"StableDiffusionXLPipeline": "train_dti_sdxl.py", "SanaPipeline": "train_dti_sana.py"}
    tokenizer_names = ("tokenizer",)
    text_encoder_names = ("text_encoder",)
    text_encoder_classes = (CLIPTextModel,)
    embedding_files = ("learned_embeds",)
    web_keys = ("emb_params",)  # AUTOMATIC1111 and ComfyUI accept any single key, InvokeAI and kohya need this one
    web_note = ""  # there is no pooled embedding
    web_use = StableDiffusionXL.web_use.replace("ComfyUI, Fooocus", "ComfyUI")  # Fooocus is for SDXL
    web_lora_use = StableDiffusionXL.web_lora_use.replace("ComfyUI, Fooocus", "ComfyUI")
    card_tags = ("stable-diffusion", "stable-diffusion-diffusers")
    single_file_base = None  # single files are not read
    normalizes_latents = False  # StableDiffusionPipeline takes no notice of latents_mean

    # fmt: off
    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument_group("Stable Diffusion").add_argument
        StableDiffusionXL.add_schedule_options(add)
        add("--validation_inference_steps", type=number(int, 1), default=25, help="DDIM steps of a validation image.")
        add("--validation_guidance_scale", type=number(float, 0), default=7.5, help="Guidance scale of the validation images.")
    # fmt: on

    @property
    def architecture(self) -> str:
        """modelspec's name. Stable Diffusion 2 has a wider text encoder; its variant for 768 pixels has v-prediction."""
        if self.text_encoders[0].config.hidden_size < 1024:
            return "stable-diffusion-v1"
        velocity = self.noise_scheduler.config.prediction_type == "v_prediction"
        return "stable-diffusion-v2-768-v" if velocity else "stable-diffusion-v2-512"

    @property
    def kohya_metadata(self) -> dict[str, str]:
        """The metadata by which AUTOMATIC1111 and kohya's tools recognise the base model."""
        second = self.text_encoders[0].config.hidden_size >= 1024
        version = {"ss_base_model_version": "sd_v2" if second else "sd_v1", "ss_v2": str(second)}
        return {"ss_network_module": "networks.lora", **version}

    def choose_pooling(self) -> None:
        """Does nothing: Stable Diffusion has no pooled embedding."""

    def end_token_pooling(self):
        return contextlib.nullcontext()

    @staticmethod
    def conditioning(outputs: list) -> tuple[torch.Tensor]:
        """The text encoder's last layer after the final layer norm (B, 77, d)."""
        return (outputs[0].last_hidden_state,)

    def predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, batch: dict) -> torch.Tensor:
        (prompt_embeds,) = self.encode_prompts(batch["prompt"])
        return self.denoiser(noisy.to(prompt_embeds.dtype), timesteps, prompt_embeds).sample

    def loading_snippet(self, device: torch.device, dtype: torch.dtype, repository: str | None = None) -> str:
        args = self.args
        model = json.dumps(model_name(args) if repository else args.pretrained_model_name_or_path)
        folder = json.dumps(repository or str(args.output_dir))
        prompt = json.dumps(f"a photo of a {args.placeholder_token}", ensure_ascii=False)
        lora = f'\npipe.load_lora_weights({folder}, weight_name="{LORA_FILE}")' if args.rank else ""
        return f"""
import torch
from diffusers import {"EulerDiscreteScheduler, " if self.schedule_options() else ""}StableDiffusionPipeline, __version__

dtype = {{"dtype" if __version__ >= "0.40" else "torch_dtype": {dtype}}}  # diffusers 0.40 renamed it
pipe = StableDiffusionPipeline.from_pretrained({model}{printed_options(args, repository)}, **dtype).to("{device.type}"){self.scheduler_lines()}
pipe.load_textual_inversion({folder}){lora}
pipe({prompt}).images[0].save("picture.png")
"""


MODEL_CLASS = StableDiffusion


def main(argv: list[str] | None = None, model_class: type = MODEL_CLASS) -> None:
    train(argv, model_class)


if __name__ == "__main__":
    run(MODEL_CLASS)
