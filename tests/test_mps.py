"""Apple's GPUs, by a stand-in that refuses what they lack: float64, some calls, and operations that PyTorch has no kernel for.

No such machine was at hand. Whether an operation has a kernel is read from the list that PyTorch ships.
"""

import re
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_dti_sana
import train_dti_sdxl as script


class OnHost(torch.Tensor):
    """What `.cpu()` gives and all that is made of it: there everything is allowed."""


class AppleGpu(TorchDispatchMode):
    """Takes every tensor for one on the GPU but those on the host, refuses what fails there, and notes what is called."""

    def __init__(self):
        super().__init__()
        self.called = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = tree_leaves((args, kwargs))
        name = func.overloadpacket.__name__
        if any(isinstance(x, OnHost) for x in given) or name == "lift_fresh":  # the latter is from_numpy's
            return result
        if any(torch.is_tensor(x) and x.dtype in (torch.float64, torch.complex128) for x in tree_leaves(result)):
            raise TypeError(f"Cannot convert a MPS Tensor to float64 dtype: {name}")
        if name == "_adaptive_avg_pool2d" and any(a % b for a, b in zip(args[0].shape[-2:], args[1], strict=True)):
            raise RuntimeError("Adaptive pool MPS: input sizes must be divisible by output sizes.")
        if name == "_pin_memory":
            raise RuntimeError("Cannot pin memory for an Apple GPU")
        self.called.add(name)
        return result


@pytest.fixture
def apple(monkeypatch):
    copy = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x, *args, **kwargs: copy(x, *args, **kwargs).as_subclass(OnHost))
    with AppleGpu() as gpu:
        yield gpu


def without_kernel(names: set[str]) -> set[str]:
    """Those of the operations that PyTorch runs on CPUs but not on Apple's GPUs, by its own list."""
    torchgen = pytest.importorskip("torchgen")
    text = (Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml").read_text()
    kernels = {}
    for entry in text.split("\n- func: ")[1:]:
        kernels[re.match(r"[\w.]+", entry)[0]] = entry
    lacking = set()
    for full, entry in kernels.items():
        if delegate := re.search(r"structured_delegate: ([\w.]+)", entry):
            entry = kernels[delegate[1]]
        if re.search(r"^    .*\bCPU\b", entry, re.M) and not re.search(r"\bMPS\b|Composite", entry):
            lacking.add(full.split(".")[0])
    return names & lacking


@pytest.mark.parametrize("trainer", [script, train_dti_sana], ids=["sdxl", "sana"])
@pytest.mark.parametrize("words", ["", "--magnitude free --optimizer adamw --rank 2 --no_cache_latents --alpha_mask"])
def test_a_run_asks_an_apple_gpu_for_nothing_that_it_lacks(trainer, words, train, small, tmp_path, apple):
    photos = small / "photos"
    if "alpha" in words:
        photos = tmp_path / "cut"
        photos.mkdir()
        for path in sorted((small / "photos").iterdir()):
            picture = script.Image.open(path).convert("RGBA")
            picture.paste((0, 0, 0, 0), (0, 0, 40, picture.height))
            picture.save(photos / path.name)
    shown = {"validation_prompt": "a {}", "num_validation_images": 1, "validation_inference_steps": 1}
    out = train(*words.split(), **shown, max_train_steps=1, instance_data_dir=photos)
    assert (out / "validation-1.png").is_file()
    on_cpus = {"_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward"}
    assert without_kernel(apple.called) <= on_cpus


def test_the_stand_in_refuses():
    with AppleGpu(), pytest.raises(TypeError, match="float64"):
        torch.ones(3).double()
    with AppleGpu(), pytest.raises(RuntimeError, match="divisible"):
        torch.nn.functional.adaptive_avg_pool2d(torch.ones(1, 1, 10, 10), (4, 4))
    assert without_kernel({"linalg_eig", "mm", "add", "relu"}) == {"linalg_eig"}


@pytest.mark.parametrize("rule", ["mean", "min", "2mean"])
def test_the_magnitude_is_summed_in_float64_on_the_host(apple, rule):
    vocabulary = torch.ones(5, 4) * torch.arange(5).view(5, 1)
    assert script.vocabulary_magnitude(vocabulary, rule) == {"mean": 5.0, "min": 2.0, "2mean": 10.0}[rule]
