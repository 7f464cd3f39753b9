"""The method's mathematics: Algorithm 1 against a naive float64 reference and geoopt, and what must hold for any input."""

import math

import geoopt
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from train_dti_sdxl import RiemannianSGD, TokenAdamW, angle, normalize, project_to_tangent, retract


def random_rows(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def make_optimizer(v0: torch.Tensor, mu: torch.Tensor, lr: float, kappa: float):
    v = torch.nn.Parameter(v0.clone())
    return v, RiemannianSGD([{"params": [v], "mu": mu}], lr=lr, kappa=kappa)


def take_step(v, optimizer, gradient):
    v.grad = gradient.clone()
    optimizer.step()


def reference_step(v: np.ndarray, g_data: np.ndarray, mu: np.ndarray, eta: float, kappa: float) -> np.ndarray:
    """Algorithm 1 for one row in float64, written with plain loops and nothing of ours."""
    g_euc = [g - kappa * m for g, m in zip(g_data, mu, strict=True)]
    inner = sum(a * b for a, b in zip(g_euc, v, strict=True))
    g = [a - inner * b for a, b in zip(g_euc, v, strict=True)]
    length = math.sqrt(sum(a * a for a in g))
    moved = [a - eta * b / length for a, b in zip(v, g, strict=True)]
    norm = math.sqrt(sum(a * a for a in moved))
    return np.array([a / norm for a in moved])


@pytest.mark.parametrize("kappa", [0.0, 1e-4, 0.5])
def test_many_steps_follow_the_float64_reference(kappa):
    n, d, eta = 3, 24, 5e-3
    v0, mu = normalize(random_rows(n, d, 0)), normalize(random_rows(n, d, 1))
    v, optimizer = make_optimizer(v0, mu, eta, kappa)
    expected = v0.double().numpy()
    for step in range(200):
        gradient = random_rows(n, d, 100 + step) * 1e-3
        take_step(v, optimizer, gradient)
        rows = zip(expected, gradient.double().numpy(), mu.double().numpy(), strict=True)
        expected = np.stack([reference_step(*row, eta, kappa) for row in rows])
    np.testing.assert_allclose(v.detach().numpy(), expected, atol=2e-6)


def test_agrees_with_geoopt_where_both_do_the_same():
    """geoopt's sphere retracts by renormalisation too; it neither normalises the gradient nor has a prior."""
    v0 = normalize(random_rows(1, 16, 0))
    theirs = geoopt.ManifoldParameter(v0.clone(), manifold=geoopt.Sphere())
    reference = geoopt.optim.RiemannianSGD([theirs], lr=0.1)
    ours, optimizer = make_optimizer(v0, torch.zeros_like(v0), 0.1, kappa=0.0)
    for step in range(50):
        gradient = random_rows(1, 16, 100 + step)
        tangent = project_to_tangent(ours.detach(), gradient)
        theirs.grad = gradient / tangent.norm()  # normalised beforehand
        reference.step()
        take_step(ours, optimizer, gradient)
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


rows_and_steps = {
    "n": st.integers(1, 4),
    "d": st.integers(2, 40),
    "eta": st.floats(1e-4, 0.5),
    "scale": st.floats(1e-12, 1e12),
    "seed": st.integers(0, 2**31),
}


@settings(deadline=None, max_examples=150)
@given(**rows_and_steps)
def test_a_step_turns_every_row_by_arctan_eta_and_keeps_it_on_the_sphere(n, d, eta, scale, seed):
    v0 = normalize(random_rows(n, d, seed))
    v, optimizer = make_optimizer(v0, v0, eta, kappa=0.0)
    take_step(v, optimizer, random_rows(n, d, seed + 1) * scale)
    torch.testing.assert_close(v.norm(dim=-1), torch.ones(n), atol=3e-7, rtol=0)
    expected = torch.full((n,), math.degrees(math.atan(eta)))
    torch.testing.assert_close(angle(v.detach(), v0), expected, atol=3e-5, rtol=2e-3)


@settings(deadline=None, max_examples=50)
@given(n=st.integers(1, 4), d=st.integers(2, 40), seed=st.integers(0, 2**31))
def test_projection_is_tangent_and_idempotent(n, d, seed):
    v, g = normalize(random_rows(n, d, seed)), random_rows(n, d, seed + 1)
    tangent = project_to_tangent(v, g)
    torch.testing.assert_close((tangent * v).sum(dim=-1), torch.zeros(n), atol=1e-5, rtol=0)
    torch.testing.assert_close(project_to_tangent(v, tangent), tangent, atol=1e-5, rtol=0)


def test_the_angle_is_exact_for_tiny_steps():
    v = normalize(random_rows(5, 1280, 0))
    tangent = normalize(project_to_tangent(v, random_rows(5, 1280, 1)))
    expected = torch.full((5,), math.degrees(math.atan(1e-3)))
    torch.testing.assert_close(angle(v, retract(v, 1e-3 * tangent)), expected, rtol=1e-3, atol=0)


def test_large_kappa_pulls_to_mu():
    v0, mu = normalize(random_rows(2, 32, 0)), normalize(random_rows(2, 32, 1))
    v, optimizer = make_optimizer(v0, mu, lr=0.02, kappa=1e6)
    for step in range(200):
        take_step(v, optimizer, random_rows(2, 32, step))
    assert angle(v.detach(), mu).max() < 1.5  # a normalised step of 1.15 degrees never comes closer for good
    assert angle(v0, mu).min() > 45


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_a_row_without_a_usable_gradient_stays_and_is_counted(bad):
    v0 = normalize(random_rows(3, 8, 0))
    v, optimizer = make_optimizer(v0, v0, lr=0.1, kappa=0.0)
    gradient = random_rows(3, 8, 1)
    gradient[1] = bad
    take_step(v, optimizer, gradient)
    take_step(v, optimizer, gradient)
    assert torch.equal(v[1], v0[1])
    assert angle(v.detach(), v0)[[0, 2]].min() > 5
    assert optimizer.state[v]["skipped"] == 2


def test_a_gradient_that_is_radial_up_to_rounding_moves_nothing():
    v0 = normalize(random_rows(4, 768, 0))
    v, optimizer = make_optimizer(v0, v0, lr=0.1, kappa=1e-4)
    take_step(v, optimizer, torch.zeros_like(v0))  # the prior alone, at its own mean
    assert torch.equal(v, v0)
    assert optimizer.state[v]["skipped"] == 4


def test_the_same_gradients_give_the_same_bits():
    def run():
        v0 = normalize(random_rows(2, 64, 0))
        v, optimizer = make_optimizer(v0, v0, lr=5e-3, kappa=1e-4)
        for step in range(20):
            take_step(v, optimizer, random_rows(2, 64, step))
        return v

    assert torch.equal(run(), run())


def test_adamw_on_the_sphere_is_adamw_then_projection():
    v0, mu, kappa = normalize(random_rows(2, 16, 0)), normalize(random_rows(2, 16, 1)), 0.3
    adamw = {"lr": 5e-3, "betas": (0.9, 0.999), "weight_decay": 1e-2, "eps": 1e-8}
    ours, theirs = torch.nn.Parameter(v0.clone()), torch.nn.Parameter(v0.clone())
    optimizer = TokenAdamW([{"params": [ours], "mu": mu}], kappa=kappa, **adamw)
    reference = torch.optim.AdamW([theirs], **adamw)
    for step in range(20):
        gradient = random_rows(2, 16, step)
        take_step(ours, optimizer, gradient)
        theirs.grad = gradient - kappa * mu
        reference.step()
        theirs.data = theirs.data / theirs.data.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(ours, theirs)


def test_free_adamw_is_torchs_and_survives_a_nan():
    x0 = random_rows(2, 16, 0)
    ours, theirs = torch.nn.Parameter(x0.clone()), torch.nn.Parameter(x0.clone())
    optimizer = TokenAdamW([{"params": [ours], "mu": None}], lr=5e-3)
    reference = torch.optim.AdamW([theirs], lr=5e-3)
    for step in range(10):
        take_step(ours, optimizer, random_rows(2, 16, step))
        theirs.grad = random_rows(2, 16, step)
        reference.step()
    assert torch.equal(ours, theirs)
    take_step(ours, optimizer, torch.full_like(x0, math.nan))
    assert ours.isfinite().all()
    assert optimizer.state[ours]["skipped"] == 2


@pytest.mark.parametrize("make", [lambda groups: RiemannianSGD(groups, 0.1, 1.0), TokenAdamW])
def test_the_data_gradients_norm_is_noted_without_the_prior(make):
    v = torch.nn.Parameter(torch.eye(3)[:2])
    optimizer = make([{"params": [v], "mu": torch.eye(3)[1:]}])
    v.grad = torch.tensor([[0.0, 3.0, 4.0], [1.0, 0.0, 0.0]])
    optimizer.step()
    assert optimizer.state[v]["gradient_norm"].item() == pytest.approx(3.0)
