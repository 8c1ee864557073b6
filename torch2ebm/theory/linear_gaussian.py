"""Closed forms of linear Gaussian networks, for every pattern of clamped values: what a relaxation has to end in.

Each node's value is Gaussian around a linear prediction from its parents. The energy of all values is then quadratic,

    F(z) = sum over nodes of 1/2 (v_n - mu_n)^T Pi_n (v_n - mu_n),    mu_n = sum over parents of W v_parent + b_n

and its matrix P = sum of A_n^T Pi_n A_n, with A_n z = v_n - sum of W v_parent, is the joint precision of all nodes.
With some values clamped, the rest is Gaussian: its precision is the block of P that the free values span. Everything
here follows by one linear solve, in double precision, and is differentiable in the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn

from torch2ebm.errors import ConfigurationError, UnsupportedError
from torch2ebm.theory.posterior import Posterior, check_known, slices

INPUT = "input"
Weights = Sequence[Tensor] | Mapping[str, Mapping[str, Tensor]]
ByNode = Sequence[Tensor | None] | Mapping[str, Tensor]
Precision = float | Tensor
Prior = tuple[Tensor | float, Precision]
_WHERE = "theory.LinearGaussian"


class LinearGaussian:
    """A network whose nodes are Gaussian around linear predictions, in closed form.

    Args:
        weights: A matrix ``[out, in]`` for each layer of a chain, whose nodes are called ``"0"``, ``"1"`` and so on, as
            in an ``nn.Sequential``, after the node ``"input"``. For any other graph: node name to parents, parents
            before children, each with its matrix: ``{"a": {"input": W}, "b": {"a": V, "input": U}}``. A parent that
            is no node itself is an input.
        biases: One ``[out]`` for each layer, or by node name; zero where there is none.
        precisions: Node name to precision, a number, a vector ``[features]`` or a matrix ``[features, features]``;
            1 elsewhere.
        prior: Mean and precision of the input where it is free, or a dict of such pairs by input; a precision is as in
            ``precisions``. An input without one has no energy of its own.

    Raises:
        ConfigurationError: for shapes that do not fit, unknown names, a precision that is not positive.

    Attributes:
        sizes: Node name to number of features, inputs first.
        precision: Joint precision of all nodes, in this order, shape ``[entries, entries]``: the Hessian of F.

    Example:
        A decoder: its input is the latent, and its output is data.

        >>> import torch
        >>> from torch2ebm import theory
        >>> decoder = theory.LinearGaussian([torch.tensor([[2.0], [1.0]])], prior=(0.0, 1.0))
        >>> found = decoder.posterior({"0": torch.tensor([[2.0, 1.0]])})
        >>> found.mean["input"], found.covariance  # precision 1 + 2^2 + 1^2
        (tensor([[0.8333]], dtype=torch.float64), tensor([[0.1667]], dtype=torch.float64))
    """

    def __init__(
        self,
        weights: Weights,
        biases: ByNode | None = None,
        precisions: Mapping[str, Precision] | None = None,
        prior: Prior | Mapping[str, Prior] | None = None,
    ) -> None:
        self._weights = _by_parent(weights)
        self.sizes = _sizes(self._weights)
        self._at = slices(self.sizes)
        inputs = [name for name in self.sizes if name not in self._weights]
        self._offsets = self._read_biases(biases)
        self._precisions = {
            name: _matrix(name, (precisions or {}).get(name, 1.0), self.sizes[name]) for name in self._weights
        }
        check_known(f"{_WHERE}(precisions=...)", precisions or {}, self._weights)
        self._read_priors(inputs, prior)
        self.precision = sum(
            (rows.mT @ self._precisions[name] @ rows for name, rows in self._rows()),
            start=self._zeros(self._entries, self._entries),
        )

    @staticmethod
    def of(
        module: nn.Module,
        precisions: Mapping[str, Precision] | None = None,
        prior: Prior | Mapping[str, Prior] | None = None,
    ) -> LinearGaussian:
        """The same of a chain of ``nn.Linear``, whose nodes have the names of the layers.

        Args:
            module: An ``nn.Linear``, or an ``nn.Sequential`` of them, of ``nn.Identity`` and of other such sequences.
            precisions: As for the class.
            prior: As for the class.

        Returns:
            With the weights as they are now.

        Raises:
            UnsupportedError: for any other layer.

        Example:
            >>> import torch
            >>> from torch2ebm import theory
            >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 3))
            >>> theory.LinearGaussian.of(net).sizes
            {'input': 4, '0': 8, '1': 3}
        """
        layers = _layers(module)
        parents = [INPUT, *layers][: len(layers)]
        chain = {
            name: {parent: layer.weight.detach()} for (name, layer), parent in zip(layers.items(), parents, strict=True)
        }
        biases = {name: layer.bias.detach() for name, layer in layers.items() if layer.bias is not None}
        return LinearGaussian(chain, biases, precisions, prior)

    def posterior(self, clamped: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None = None) -> Posterior:
        """What the free values are, given the clamped ones.

        Args:
            clamped: Node name to value, shape ``[batch, features]``, or ``[features]`` for the same in every sample.
                Inputs are nodes, too; with an input and an output this is training.
            masks: Node name to which entries of a clamped value count, booleans of shape ``[features]``; the others are
                free. All count without it.

        Returns:
            Mean, covariance and energy of all nodes.

        Raises:
            ConfigurationError: for unknown names, shapes that do not fit, or values that nothing holds: F has then no
                single minimum, for example where a free input has no prior.
        """
        masks = masks or {}
        check_known(f"{_WHERE}.posterior(clamped=...)", clamped, self.sizes)
        check_known(f"{_WHERE}.posterior(masks=...)", masks, clamped)
        batch, held = self._held(clamped), self._mask(clamped, masks)
        values = self._zeros(batch, self._entries)
        for name, value in clamped.items():
            values[:, self._at[name]] = _double(value)
        values = torch.where(held, values, 0.0)
        free = ~held
        hessian = self.precision[free][:, free]
        self._check_held(hessian, free)
        # P_ff v_f = h_f - P_fc v_c, where dF/dv is zero; h = sum of A_n^T Pi_n b_n
        pull = self._pull()[free] - values @ self.precision[:, free]
        values = values.index_put(
            (torch.arange(batch)[:, None], free.nonzero()[:, 0]), torch.linalg.solve(hessian, pull.mT).mT
        )
        mean = {name: values[:, at] for name, at in self._at.items()}
        error = {name: values @ rows.mT - self._offsets[name] for name, rows in self._rows()}
        parts = [0.5 * ((e @ self._precisions[name]) * e).sum(1) for name, e in error.items()]
        named_free = {name: free[at] for name, at in self._at.items()}
        return Posterior(
            MappingProxyType(mean),
            MappingProxyType(error),
            sum(parts[1:], start=parts[0]),
            MappingProxyType(named_free),
            hessian,
        )

    # the matrices

    @property
    def _entries(self) -> int:
        return sum(self.sizes.values())

    @property
    def _device(self) -> torch.device:
        return next(iter(next(iter(self._weights.values())).values())).device

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float64, device=self._device)

    def _rows(self) -> list[tuple[str, Tensor]]:
        """A_n of every node that has an energy, ``[features, entries]``."""
        found = []
        for name in self._precisions:
            parts = {parent: -weight for parent, weight in self._weights.get(name, {}).items()}
            parts[name] = torch.eye(self.sizes[name], dtype=torch.float64, device=self._device)
            blocks = [parts.get(each, self._zeros(self.sizes[name], size)) for each, size in self.sizes.items()]
            found.append((name, torch.cat(blocks, 1)))
        return found

    def _pull(self) -> Tensor:
        parts = [rows.mT @ (self._precisions[name] @ self._offsets[name]) for name, rows in self._rows()]
        return sum(parts[1:], start=parts[0])

    # what the user gave

    def _read_biases(self, biases: ByNode | None) -> dict[str, Tensor]:
        if biases is None:
            biases = {}
        if not isinstance(biases, Mapping):
            if len(biases) != len(self._weights):
                raise _refused(
                    "biases=...", f"{len(biases)} for {len(self._weights)} layers", "one for each layer, or None"
                )
            biases = {name: bias for name, bias in zip(self._weights, biases, strict=True) if bias is not None}
        check_known(f"{_WHERE}(biases=...)", biases, self._weights)
        return {name: _vector(f"biases[{name!r}]", biases.get(name, 0.0), self.sizes[name]) for name in self._weights}

    def _read_priors(self, inputs: Sequence[str], prior: Prior | Mapping[str, Prior] | None) -> None:
        if prior is not None and not isinstance(prior, Mapping):
            if len(inputs) != 1:
                raise _refused("prior=...", f"one pair for the inputs {', '.join(inputs)}", "a dict of pairs by input")
            prior = {inputs[0]: prior}
        check_known(f"{_WHERE}(prior=...)", prior or {}, inputs)
        for name, (mean, precision) in (prior or {}).items():
            self._offsets[name] = _vector(f"prior[{name!r}]", mean, self.sizes[name])
            self._precisions[name] = _matrix(name, precision, self.sizes[name])

    def _held(self, clamped: Mapping[str, Tensor]) -> int:
        """The batch size, from values that have the shapes of their nodes."""
        batch = 1
        for name, value in clamped.items():
            fits = value.ndim in (1, 2) and value.shape[-1] == self.sizes[name]
            size = len(value) if fits and value.ndim == 2 else 1
            if not fits or (size != batch and 1 not in (size, batch)):
                got = f"'{name}' of shape {tuple(value.shape)}" + (f" in a batch of {batch}" if fits else "")
                raise _refused("clamped=...", got, f"[batch, {self.sizes[name]}], the same batch for all", ".posterior")
            batch = max(batch, size)
        return batch

    def _mask(self, clamped: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> Tensor:
        parts = []
        for name, size in self.sizes.items():
            mask = masks.get(name)
            if mask is None:
                mask = torch.full((size,), name in clamped)
            elif mask.dtype != torch.bool or mask.shape != (size,):
                got = f"'{name}' of shape {tuple(mask.shape)}, {mask.dtype}"
                raise _refused("masks=...", got, f"booleans of shape [{size}]", ".posterior")
            parts.append(mask.to(self._device))
        return torch.cat(parts)

    def _check_held(self, hessian: Tensor, free: Tensor) -> None:
        """A minimum in the free values: no direction of theirs may cost nothing."""
        if not len(hessian):
            return
        values, vectors = torch.linalg.eigh(hessian.detach())
        slack = values < len(values) * torch.finfo(values.dtype).eps * values[-1]
        if not bool(slack.any()):
            return
        spread = torch.zeros(len(free), dtype=values.dtype, device=values.device)
        spread[free] = vectors[:, slack].square().sum(1)
        loosest = max(self._at, key=lambda name: float(spread[self._at[name]].sum()))
        raise ConfigurationError(
            f"{_WHERE}.posterior(...), node '{loosest}'",
            f"{int(slack.sum())} directions of the free values in which the energy is flat",
            "an energy that holds every free value",
            f"Clamp '{loosest}', or give it a prior: prior=(0.0, 1.0).",
        )


def _by_parent(weights: Weights) -> dict[str, dict[str, Tensor]]:
    if not isinstance(weights, Mapping):
        names = [str(i) for i in range(len(weights))]
        weights = {name: {parent: w} for name, parent, w in zip(names, [INPUT, *names], weights, strict=False)}
    if not weights or not all(weights.values()):
        raise _refused("weights=...", "no matrix", "at least one matrix for each node")
    return {name: {parent: _double(w) for parent, w in own.items()} for name, own in weights.items()}


def _sizes(weights: Mapping[str, Mapping[str, Tensor]]) -> dict[str, int]:
    """Features of every node, inputs first. Refuses matrices that do not fit, and parents that come later."""
    of_nodes = {name: len(next(iter(own.values()))) for name, own in weights.items()}
    sizes: dict[str, int] = {}
    seen: set[str] = set()
    for name, own in weights.items():
        for parent, weight in own.items():
            if parent in weights and parent not in seen:
                raise _refused(
                    "weights=...", f"'{parent}' before it is a node, as a parent of '{name}'", "parents before children"
                )
            known = of_nodes.get(parent) or sizes.setdefault(parent, weight.shape[-1])
            if tuple(weight.shape) != (of_nodes[name], known):
                got = f"{tuple(weight.shape)} from '{parent}' to '{name}'"
                raise _refused("weights=...", got, f"a matrix of shape {(of_nodes[name], known)}")
        seen.add(name)
    return {**sizes, **of_nodes}


def _vector(where: str, given: Tensor | float, size: int) -> Tensor:
    vector = _double(given)
    if vector.ndim == 0:
        vector = vector.expand(size)
    if vector.shape != (size,):
        raise _refused(where, f"shape {tuple(vector.shape)}", f"a vector [{size}]")
    return vector


def _matrix(name: str, given: Precision, size: int) -> Tensor:
    """A precision as a matrix. Refuses one that is not symmetric and positive."""
    matrix = _double(given)
    if matrix.ndim < 2 and matrix.numel() in (1, size):
        matrix = torch.diag(matrix.expand(size))
    if matrix.shape != (size, size):
        raise _refused(
            f"precision of '{name}'", f"shape {tuple(matrix.shape)}", f"a number, [{size}] or [{size}, {size}]"
        )
    plain = matrix.detach()
    if not torch.allclose(plain, plain.mT) or not bool(torch.linalg.eigvalsh(plain)[0] > 0):
        raise _refused(f"precision of '{name}'", "a matrix that is not symmetric and positive", "a positive precision")
    return matrix


def _layers(module: nn.Module) -> dict[str, nn.Linear]:
    found: dict[str, nn.Linear] = {}
    for name, part in module.named_modules():
        if type(part) is nn.Linear:
            found[name or "(all)"] = part
        elif not isinstance(part, (nn.Sequential, nn.Identity)):
            raise UnsupportedError(
                f"{_WHERE}.of(module), '{name or '(all)'}'",
                type(part).__name__,
                "nn.Linear, nn.Identity, and nn.Sequential of them",
                "Give the matrices yourself: LinearGaussian({'node': {'parent': matrix}}).",
            )
    return found


def _double(given: Tensor | float) -> Tensor:
    return given.double() if isinstance(given, Tensor) else torch.tensor(float(given), dtype=torch.float64)


def _refused(where: str, got: str, expected: str, method: str = "") -> ConfigurationError:
    return ConfigurationError(f"{_WHERE}{method}({where})", got, expected, "Look at the shapes in its documentation.")
