"""What a node's error costs, against the distributions that the energies are named after."""

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Normal, kl_divergence

import torch2ebm

SHAPES = [(3, 4), (3, 2, 4), (3, 2, 5, 4)]


def drawn(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_categorical_energy_is_the_divergence_summed_over_the_positions_of_a_sample(shape: tuple[int, ...]) -> None:
    value, prediction = drawn(shape)
    divergence = kl_divergence(Categorical(logits=value), Categorical(logits=prediction))  # [batch, *positions]
    expected = divergence.reshape(len(value), -1).sum(1)
    energy = torch2ebm.Categorical()
    torch.testing.assert_close(energy.of_samples(value - prediction, prediction), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(energy.of_batch(value - prediction, prediction), expected.sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_gaussian_energy_is_minus_the_logarithm_of_a_density_up_to_its_normaliser(shape: tuple[int, ...]) -> None:
    value, prediction = drawn(shape)
    normal = Normal(prediction, 2.5**-0.5)
    density = (normal.log_prob(value) - normal.log_prob(prediction)).reshape(len(value), -1).sum(1)
    energy = torch2ebm.Gaussian(2.5)
    torch.testing.assert_close(energy.of_samples(value - prediction, prediction), -density, rtol=1e-12, atol=0)
    torch.testing.assert_close(energy.of_batch(value - prediction, prediction), -density.sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("energy", [torch2ebm.Gaussian(2.5), torch2ebm.Categorical()], ids=str)
def test_gradients_are_those_of_the_energy_of_the_batch(energy: torch2ebm.Energy, shape: tuple[int, ...]) -> None:
    value, prediction = (each.requires_grad_() for each in drawn(shape))
    own, against = torch.autograd.grad(energy.of_batch(value - prediction, prediction), [value, prediction])
    found = energy.gradients((value - prediction).detach(), prediction.detach())
    torch.testing.assert_close(found[0], own, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(found[1], -against, rtol=1e-10, atol=1e-14)
