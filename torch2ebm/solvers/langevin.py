"""Langevin dynamics: values are sampled from the energy, and do not come to rest (Oliviers et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from torch2ebm.common.checks import check_positive, check_step_size, check_steps
from torch2ebm.errors import ConfigurationError
from torch2ebm.inference.solver import ValueSolver
from torch2ebm.inference.steepness import Stability
from torch2ebm.inference.step_size import auto_rate
from torch2ebm.inference.value_inference import ValueInference


@dataclass(frozen=True)
class Langevin(ValueSolver):
    """``v <- v - lr dF/dv + sqrt(2 lr temperature) noise`` for all free values at once (Oliviers et al. 2024).

    The values wander, and are distributed as ``exp(-F / temperature)``. In a linear Gaussian network their mean is the
    equilibrium, and their covariance is that of the posterior. ``model.infer`` returns the draws as ``samples``. In
    training, Monte-Carlo predictive coding, the gradients are the mean over all draws. A step size leaves a bias: a
    direction of curvature h has its variance divided by ``1 - lr h / 2``.

    Args:
        temperature: tau. 1 is the posterior of the energy; the limit of 0 is gradient descent.
        steps: All steps, those of the burn-in too.
        lr: Step size; ``"auto"``: a tenth of the largest stable one, from the curvature.
        burn_in: So many steps are taken before the first draw.
        thinning: Steps from one draw to the next.
        chains: How many independent chains ``model.infer`` runs beside each other, for each sample of the batch.
        generator: Where the noise comes from; None is torch's own. It has to be on the device of the values.

    Raises:
        ConfigurationError: for a temperature, step size or number outside its range, or a burn-in that leaves no draw.

    Example:
        >>> import torch, torch2ebm
        >>> model = torch2ebm.convert(torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False)))
        >>> noise = torch2ebm.Langevin(steps=3000, lr=0.1, burn_in=100, chains=20)
        >>> prior = {"input": torch2ebm.Gaussian()}
        >>> found = model.infer(torch.zeros(1, 1), free=["input"], prior=prior, solver=noise)
        >>> found.samples["input"].shape
        torch.Size([2900, 20, 1, 1])
        >>> 0.9 < float(found.samples["input"].var()) < 1.2  # the prior's 1, divided by 1 - 0.1 / 2
        True
    """

    temperature: float = 1.0
    steps: int = 1000
    lr: float | str = 0.01
    burn_in: int = 100
    thinning: int = 1
    chains: int = 1
    generator: torch.Generator | None = field(default=None, compare=False, repr=False)

    remedy: ClassVar[str] = 'Take a smaller step size, or lr="auto".'
    coordinates: ClassVar[str] = "values"
    descends: ClassVar[bool] = False
    samples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive("Langevin", temperature=self.temperature)
        check_steps("Langevin", self.steps)
        check_step_size("Langevin", self.lr)
        check_steps("Langevin", self.thinning, "thinning")
        check_steps("Langevin", self.chains, "chains")
        legal = isinstance(self.burn_in, int) and not isinstance(self.burn_in, bool)
        if not legal or not 0 <= self.burn_in < self.steps or self.steps - self.burn_in < self.thinning:
            raise ConfigurationError(
                "Langevin(burn_in=...)",
                f"{self.burn_in!r} of {self.steps} steps, and a draw every {self.thinning}",
                "a whole number, 0 or more, after which there is at least one draw",
                "Take more steps.",
            )

    @property
    def tol(self) -> float:  # type: ignore[override]
        """Samples do not come to rest."""
        return 0.0

    def with_steps(self, steps: int) -> Langevin:
        """So many steps; the burn-in shrinks with them."""
        burn_in = min(self.burn_in, steps // 2)
        return replace(self, steps=steps, burn_in=burn_in, thinning=min(self.thinning, max(steps - burn_in, 1)))

    def good_step(self, stability: Stability) -> float:
        return 0.1 * self.largest_step(stability)

    def is_draw(self, step: int) -> bool:
        return step > self.burn_in and (step - self.burn_in) % self.thinning == 0

    def start(self, inference: ValueInference) -> Tensor | None:
        return auto_rate(self, inference)

    def step(self, inference: ValueInference, state: Tensor | None) -> Tensor | None:
        rate = torch.tensor(float(self.lr)) if state is None else state
        # the noise first, as directions: a sweep leaves out values whose gradient is exactly zero
        size = (2 * rate * self.temperature).sqrt()
        ahead = {slot: self._noise(like) * size for slot, like in inference.values.origins.items()}
        for slot, gradient in inference.sweep():
            ahead[slot] = ahead[slot] - gradient * rate
        # after the sweep, which reads the values: those that it leaves out move, too
        for slot, direction in ahead.items():
            inference.move(slot, direction.to(inference.values.origins[slot]), 1.0)
        return state

    def _noise(self, value: Tensor) -> Tensor:
        return torch.randn(value.shape, dtype=value.dtype, device=value.device, generator=self.generator)
