"""The inputs of a question: what each is given as, and which of them are values that move."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from torch2ebm.clamping.asking import Question, by_name
from torch2ebm.clamping.places import INPUT
from torch2ebm.clamping.priors import Flat, Prior
from torch2ebm.engine.energies import Energy
from torch2ebm.errors import ConfigurationError

MISSING = inspect.Parameter.empty


@dataclass(frozen=True, eq=False)
class Inputs:
    """The inputs of a question: what each is given as, and which of them are values.

    Attributes:
        bound: All arguments of the call; a free one holds the mean of its prior, or where it begins.
        nodes: From the argument of a free input to the name of its node.
        question: The same question, with what was passed for an input that is given in part among its clamps.
        energies: By node, of the priors.
        begun: Nodes of free inputs whose start was given, to whether by ``start=``, or passed to the call.
    """

    bound: inspect.BoundArguments
    nodes: Mapping[str, str]
    question: Question
    energies: Mapping[str, Energy]
    begun: Mapping[str, bool] = field(default_factory=dict)

    @property
    def places(self) -> dict[str, str]:
        """What a free input may be called, to the name of its node."""
        return {**self.nodes, **{node: node for node in self.nodes.values()}}

    @property
    def fixed(self) -> dict[str, Any]:
        """The tensors that are given to the call itself, by argument; the only one is ``"input"``, too."""
        held = {a: v for a, v in self.bound.arguments.items() if a not in self.nodes and isinstance(v, Tensor)}
        return {**held, INPUT: next(iter(held.values()))} if len(held) == 1 and not self.nodes else held


class Asked:
    """What a question says of the inputs of a module.

    Args:
        module: The module.
        args: Positional arguments of the call; a free input may be missing.
        kwargs: Its keyword arguments.
        question: What is given and free, by name.
        prior: By the name of a free input.
        seen: Tensors of an earlier call by argument, for the shape of an input that is missing.
    """

    def __init__(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        question: Question,
        prior: Mapping[str, Any],
        seen: Mapping[str, Tensor],
    ) -> None:
        self.module, self.question, self.prior, self.seen = module, question, prior, seen
        self.signature = inspect.signature(module.forward)
        try:
            self.bound = self.signature.bind_partial(*args, **kwargs)
        except TypeError as error:
            raise ConfigurationError(
                "model.infer(...)",
                str(error).removeprefix("got "),
                f"the arguments {self.signature}",
                "Name all others: clamp=, free=.",
            ) from error
        self.layers = {name for name, _ in module.named_modules()}
        every = self.signature.parameters.values()
        self.arguments = [p.name for p in every if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        self.only = self._only()

    def _only(self) -> str | None:
        """The argument that ``"input"`` stands for: the only tensor, or the only one that has to be given."""
        tensors = [name for name, value in self.bound.arguments.items() if isinstance(value, Tensor)]
        needed = [name for name in self.arguments if self.signature.parameters[name].default is MISSING]
        wanted = list(dict.fromkeys([*needed, *tensors]))
        return wanted[0] if len(wanted) == 1 else self.arguments[0] if len(self.arguments) == 1 else None

    def argument(self, name: str) -> str | None:
        """The argument that a name stands for; None for another name. A layer of that name goes first."""
        if name in self.layers:
            return None
        return self.only if name == INPUT and name not in self.arguments else name if name in self.arguments else None

    def _by_argument(self, named: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
        return {a: (name, value) for name, value in named.items() if (a := self.argument(name)) is not None}

    def inputs(self) -> Inputs:
        """All inputs.

        Raises:
            ConfigurationError: for an input that cannot be free, or of which nobody knows the shape.
        """
        question = self.question
        for name in by_name("model.infer(prior=...)", self.prior):
            if self.argument(name) is None:
                raise ConfigurationError(
                    question.at("prior", name),
                    f"{name!r}, which is no input",
                    f"a free input: {', '.join(self.arguments)}",
                    "The energy of a node is given by energies= or precisions=.",
                )
        self._check_starts()
        names = {a: n for n in [*question.free, *question.mask, *self.prior] if (a := self.argument(n)) is not None}
        clamped, started = self._by_argument(question.clamp), self._by_argument(question.start)
        clamp, start = dict(question.clamp), {n: v for n, v in question.start.items() if self.argument(n) is None}
        energies: dict[str, Energy] = {}
        nodes: dict[str, str] = {}
        begun: dict[str, bool] = {}
        for argument, name in names.items():
            passed = self.bound.arguments.get(argument)
            own = Prior.of(name, self.prior[name]) if name in self.prior else Prior(Flat())
            node = nodes[argument] = self.node_of(argument, name)
            begins = started.get(argument, (name, passed))[1]
            known = clamped.pop(argument, (name, passed if name in question.mask else None))[1]
            like = self._like(name, [passed, begins, known, own.mean], argument)
            mean = like_it(0.0 if own.mean is None else own.mean, like, question.at("prior", name))
            if argument in started or passed is not None:
                begun[node] = argument in started
            begins = mean if begins is None else like_it(begins, like, question.at("start", name))
            begins = torch.where(torch.isfinite(begins), begins, mean)
            flat = isinstance(own.energy, Flat)
            self.bound.arguments[argument] = begins if flat else mean
            energies[node] = own.energy
            if not flat or argument in started:  # an answer near a start is one of many, and asked for
                start[node] = begins
            if known is not None:
                clamp.pop(name, None)
                clamp[node] = known
        for argument, (name, value) in clamped.items():
            if argument not in self.bound.arguments:  # else it may be an output of the same name
                self.bound.arguments[argument] = value
                del clamp[name]
        self._check_complete()
        self.bound.apply_defaults()
        mask = {nodes.get(self.argument(n) or "", n): m for n, m in question.mask.items()}
        free = [nodes.get(self.argument(n) or "", n) for n in question.free]
        asked = replace(question, clamp=clamp, start=start, mask=mask, free=free)
        return Inputs(self.bound, nodes, asked, energies, begun)

    def _check_starts(self) -> None:
        free = {self.argument(name) for name in [*self.question.free, *self.question.mask, *self.prior]}
        for name in self.question.start:
            if self.argument(name) is not None and self.argument(name) not in free:
                raise ConfigurationError(
                    self.question.at("start", name),
                    f"{name!r}, an input that is given",
                    "an input that is free",
                    f"Add free=[{name!r}], or pass the input itself.",
                )

    def node_of(self, argument: str, name: str) -> str:
        """What the value node of an input is called. Raises :class:`ConfigurationError` where a layer is called so."""
        node = INPUT if argument == self.only and INPUT not in self.layers else argument
        if node not in self.layers:
            return node
        raise ConfigurationError(
            f"model.infer(free=[{name!r}])",
            f"an input {argument!r} beside a layer {node!r}",
            "names that differ",
            "Wrap the module in one whose argument has another name.",
        )

    def _like(self, name: str, sources: Sequence[Any], argument: str) -> Tensor:
        """A tensor in the shape of a free input."""
        seen = self.seen.get(argument)
        rows_missing = None if seen is None else seen.shape[1:]  # what is given for all samples
        tensors = (each for each in sources if isinstance(each, Tensor))
        found = next((each for each in tensors if each.shape != rows_missing or each is sources[0]), None)
        if found is None and seen is not None:
            found = seen.new_zeros((self._rows(), *seen.shape[1:]))
        if found is None:
            raise ConfigurationError(
                f"model.infer(free=[{name!r}])",
                "no shape for it",
                "a value to begin at, or an earlier call of the model",
                f"Give start={{{name!r}: a tensor}}, or convert with example_inputs.",
            )
        if not found.is_floating_point():
            raise ConfigurationError(
                f"model.infer(free=[{name!r}])",
                f"an input of {str(found.dtype).removeprefix('torch.')}",
                "an input of floating point numbers, which can move",
                "Free the value of the embedding instead: it is a node.",
            )
        # an input that is made here has the precision of the module
        return found if found is sources[0] else found.to(self._dtype(found) if seen is None else seen.dtype)

    def _dtype(self, found: Tensor) -> torch.dtype:
        floats = (p.dtype for p in self.module.parameters() if p.is_floating_point())
        return next(floats, found.dtype)

    def _rows(self) -> int:
        """The number of samples, by what is given; one where that is without a batch dimension."""
        tensors = [value for value in self.question.clamp.values() if isinstance(value, Tensor) and value.ndim > 1]
        return len(tensors[0]) if tensors else 1

    def _check_complete(self) -> None:
        parameters = self.signature.parameters.values()
        needed = [p.name for p in parameters if p.name in self.arguments and p.default is MISSING]
        missing = [name for name in needed if name not in self.bound.arguments]
        if missing:
            raise ConfigurationError(
                "model.infer(...)",
                f"no {', '.join(missing)}",
                f"the arguments {self.signature}",
                f"Pass it, or let it be found: free=[{missing[0]!r}].",
            )


def nodes_of_inputs(
    where: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], free: Sequence[str]
) -> dict[str, str]:
    """The arguments that are values of their own, to the names of their nodes.

    Raises:
        ConfigurationError: for a name of no input, or an input that cannot move.
    """
    asked = Asked(module, args, kwargs, Question(), {}, {})
    found: dict[str, str] = {}
    for name in free:
        argument = asked.argument(name)
        given = asked.bound.arguments.get(argument or "")
        if argument is None or not isinstance(given, Tensor) or not given.is_floating_point():
            got = f"{name!r}, which is no input" if argument is None else f"an input {argument!r} of {_kind(given)}"
            raise ConfigurationError(
                f"{where}(free=[{name!r}])",
                got,
                f"an input of floating point numbers among {', '.join(asked.arguments)}",
                "Free the value of an embedding by its node: it is free as it is.",
            )
        found[argument] = asked.node_of(argument, name)
    return found


def _kind(given: Any) -> str:
    return str(given.dtype).removeprefix("torch.") if isinstance(given, Tensor) else type(given).__name__


def like_it(value: Any, like: Tensor, where: str) -> Tensor:
    """A number, or a tensor with or without the batch dimension, in the shape of another tensor."""
    if isinstance(value, Tensor) and tuple(value.shape) not in (tuple(like.shape), tuple(like.shape[1:])):
        raise ConfigurationError(
            where, f"shape {tuple(value.shape)}", f"{tuple(like.shape)} or {tuple(like.shape[1:])}", "Give another."
        )
    return torch.as_tensor(value, dtype=like.dtype, device=like.device).detach().expand(like.shape).clone()
