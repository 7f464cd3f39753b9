"""Computed memory: tensors are counted as long as they live, and what saves memory shows in the figures."""

import memory
import pytest
import torch
from conftest import ROOT


META = torch.device("meta")
MIB = 2**20


def test_tensors_are_counted_while_they_live():
    weight = torch.empty(MIB, device=META)  # 4 MiB, there before
    with memory.MemoryCounter([weight]) as counter:
        first = weight * 2  # 4
        second = first.view(2, -1).t()  # the same memory
        third = torch.cat([first, first])  # 8 more
        del first, second
        third.add_(1)
        torch.empty(MIB // 2, device=META)  # 2, in the place of the first 4
        del third
    assert counter.peak == 12 * MIB and counter.live == 0


def test_the_gradient_keeps_what_it_needs():
    """x -> wx -> gelu: for the gradient of x the input of gelu is kept, and neither x nor gelu's output."""
    weight = torch.empty(256, 256, device=META)
    x = torch.empty(1024, 256, device=META, requires_grad=True)  # 1 MiB each
    with memory.MemoryCounter([weight, x]) as counter:
        y = torch.nn.functional.gelu(x @ weight).sum()
        kept = counter.live
        y.backward()
    assert kept - y.nbytes == MIB
    # Its gradient: the sum's (a view of one number), gelu's and then x's.
    assert 2 * MIB <= counter.peak <= 3 * MIB + 64


def test_attention_keeps_no_square_of_the_length():
    q, k, v = (torch.empty(1, 8, 512, 64, device=META, requires_grad=True) for _ in range(3))  # 1 MiB each
    with memory.MemoryCounter([q, k, v]) as counter:
        memory.fused_attention(q, k, v)
    assert counter.peak == MIB + 8 * 512 * 4


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    script = memory.load_script(ROOT / "train_dti_sdxl.py")
    memory.write_full_model(folder, "sdxl", ["a photo of {}"], "memory", torch.bfloat16)

    def compute(size, checkpointing, base_precision):
        configuration = {"resolution": 512, "train_batch_size": size, "mixed_precision": "bf16"}
        configuration |= {"gradient_checkpointing": checkpointing, "base_precision": base_precision}
        return memory.compute(script, folder, configuration)

    runs = ((1, "off", "auto"), (2, "off", "auto"), (2, "on", "auto"), (2, "on", "int8"))
    return {options: compute(*options) for options in runs}


@pytest.mark.slow
def test_sdxl(computed):
    one, two, saving, in_int8 = computed.values()
    # stabilityai/stable-diffusion-xl-base-1.0 has 2,567,463,684 parameters in its UNet, 123,060,480 and 694,659,840 in
    # its text encoders (their sum in the pipeline's fp16 files).
    parameters = 2_567_463_684 + 123_060_480 + 694_659_840
    assert one["weights"] == pytest.approx(2 * parameters, rel=1e-3)
    for phases in computed.values():
        assert all(phases[name] > phases["weights"] for name in ("step", "sampling"))
        assert phases["encoding"] < phases["weights"] / 2  # the VAE is alone
    step = [phases["step"] - phases["weights"] for phases in (one, two, saving)]
    assert step[1] == pytest.approx(2 * step[0], rel=0.1)
    assert step[2] < step[1] / 4
    assert saving["decoding"] < two["decoding"] - two["weights"] / 2
    # A byte for each weight of a linear layer or convolution, and the vocabularies elsewhere.
    vocabularies = 2 * 49409 * (768 + 1280)
    assert in_int8["weights"] == pytest.approx((saving["weights"] - vocabularies) / 2, rel=0.01)
    # For a moment the largest weight is there in bf16 too: 2560 x 1280 x 3 x 3 of 2 bytes.
    extra = in_int8["step"] - in_int8["weights"] - (saving["step"] - saving["weights"])
    assert extra < 1.1 * 2 * 2560 * 1280 * 9
