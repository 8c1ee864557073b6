"""A user's energy whose hand-written gradients do not belong to its value is refused, once, before anything learns.

Each entry of the gradients is held against central differences of the value in double precision. Where an energy is
defined is not known, so several domains are tried, and an energy that is right in one of them passes. An entry next to
a kink, or whose differences round, says nothing: there two widths do not agree.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from torch2ebm.engine.energies import Energy
from torch2ebm.errors import EnergyGradientError
from torch2ebm.isolation.random_numbers import Generators
from torch2ebm.potentials.energy_parameters import tensors_of

SHAPES = ((3, 4), (3, 4, 5), (2, 2, 3, 3), (6,))  # [batch, ...]
WIDTHS = (1e-5, 1e-3)  # the second for an energy that rounds to single precision inside
TOLERANCE = 1e-4
_OWN = "torch2ebm."  # the library's energies are held against autograd by its tests
# by id, since an energy need not have a hash; what is gone leaves
_passed: weakref.WeakValueDictionary[int, Energy] = weakref.WeakValueDictionary()


def check_energy_gradients(energies: Mapping[str, Energy]) -> None:
    """Check every energy that has not been checked yet.

    Raises:
        EnergyGradientError: naming the energy's class and which of its two derivatives is another one's.
    """
    for name, energy in energies.items():
        if _passed.get(id(energy)) is not energy:
            energy.check(f"the energy of node '{name}'")
            if not type(energy).__module__.startswith(_OWN):
                _check(name, energy)
            try:
                _passed[id(energy)] = energy
            except TypeError:  # a class with slots: checked at each attach
                continue


@dataclass(frozen=True)
class _Mismatch:
    derivative: str
    got: str
    expected: str
    at: str = ""
    has_other_shape: bool = False


def _check(name: str, energy: Energy) -> None:
    generators = Generators(_device(energy))
    found: list[_Mismatch] = []
    try:
        for shape in _shapes(energy):
            for value, prediction in _domains(shape, _device(energy)):
                try:
                    mismatch = _compared(energy, value, prediction)
                except _SaysNothingError:
                    continue
                if mismatch is None:
                    return
                found.append(mismatch)
            # a shape that broadcasts to another one may be none that it is for
            if any(not mismatch.has_other_shape for mismatch in found):
                break
    finally:
        generators.restore()
    if found:
        raise _of_mismatch(name, energy, min(found, key=lambda mismatch: mismatch.has_other_shape))


class _SaysNothingError(Exception):
    """The energy is not defined there, or is not smooth."""


def _compared(energy: Energy, value: Tensor, prediction: Tensor) -> _Mismatch | None:
    def of(v: Tensor, p: Tensor) -> Tensor:
        found = energy.of_batch(v - p, p)
        if found.dtype in (torch.float16, torch.bfloat16):
            raise _SaysNothingError  # too few digits for a difference
        return found

    with torch.no_grad():
        try:
            own, against = energy.gradients(value - prediction, prediction)
            pairs = [
                ("dphi/dvalue", own, _differences(lambda v: of(v, prediction), value)),
                ("-dphi/dprediction", against, [-d for d in _differences(lambda p: of(value, p), prediction)]),
            ]
        except Exception as error:  # whatever an energy raises outside of its domain or shape
            raise _SaysNothingError from error
    mismatches = [_mismatch(*pair, value, prediction) for pair in pairs]
    return next((mismatch for mismatch in mismatches if mismatch is not None), None)


def _mismatch(
    derivative: str, given: Tensor, differences: list[Tensor], value: Tensor, prediction: Tensor
) -> _Mismatch | None:
    """The entry that is furthest off; None where all agree. The first width at which half of the entries are sure."""
    given = given if isinstance(given, Tensor) else torch.full_like(value, torch.nan)
    try:
        given = given.expand_as(value).double()
    except RuntimeError:
        got, expected = (f"a tensor of shape {tuple(each.shape)}" for each in (given, value))
        return _Mismatch(derivative, got, expected, has_other_shape=True)
    for narrow, wide in zip(differences[::2], differences[1::2], strict=True):
        scale = torch.maximum(narrow.abs().max(), given.nan_to_num().abs().max())
        doubt = (narrow - wide).abs()
        sure = narrow.isfinite() & wide.isfinite() & (doubt <= TOLERANCE * scale)
        if int(sure.sum()) * 2 < sure.numel():
            continue
        off = torch.where(sure, (narrow - given).abs() - 10 * doubt, 0.0)
        off = torch.where(sure & given.isnan(), torch.inf, off)
        place = off.argmax()
        if not float(off.flatten()[place]) > TOLERANCE * float(scale) + 1e-9:
            return None
        entry, difference, at, mu = (each.flatten()[place].item() for each in (given, narrow, value, prediction))
        where = f", at value {at:.4g} and prediction {mu:.4g}"
        return _Mismatch(derivative, f"{entry:.6g}", f"{difference:.6g}", where)
    raise _SaysNothingError


def _differences(function: Callable[[Tensor], Tensor], at: Tensor) -> list[Tensor]:
    """Central differences of every entry, each width and then twice that width."""
    found = []
    for size in (size for width in WIDTHS for size in (width, 2 * width)):
        entries = []
        for entry in range(at.numel()):
            shift = torch.zeros_like(at).flatten()
            shift[entry] = size
            shift = shift.reshape(at.shape)
            entries.append((function(at + shift).double() - function(at - shift).double()).sum() / (2 * size))
        found.append(torch.stack(entries).reshape(at.shape))
    return found


def _shapes(energy: Energy) -> Iterator[tuple[int, ...]]:
    """That of its tensors first, as precisions a feature or a sample; then usual ones."""
    own = [tuple(tensor.shape) for tensor in tensors_of(energy) if tensor.ndim]
    if own:
        try:
            shape = torch.Size(torch.broadcast_shapes(*own))  # type: ignore[no-untyped-call]
        except RuntimeError:  # tensors that belong to no one shape
            shape = torch.Size(sorted(own, key=len)[-1])
        if 0 < shape.numel() <= 4096:  # entry by entry: more would take seconds
            yield (2, *shape)
            if len(shape) == 1:
                yield (*shape, 3)  # a weight of each sample
            yield shape
    yield from SHAPES


def _domains(shape: tuple[int, ...], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Values and predictions, with errors of both signs: all numbers, positive ones, parts, distributions."""
    generator = torch.Generator().manual_seed(0)  # the user's generators stay as they are

    def normal() -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)

    def unit() -> Tensor:
        return 0.1 + 0.8 * torch.rand(shape, generator=generator, dtype=torch.float64).to(device)

    yield normal(), normal()
    yield (0.5 * normal()).exp(), (0.5 * normal()).exp()
    yield unit(), unit()
    yield normal().softmax(-1), normal().softmax(-1)
    yield unit(), normal()  # a probability, and logits
    yield (0.5 * normal()).exp(), normal()  # a count, and the logarithm of a rate
    yield normal(), (0.5 * normal()).exp()
    yield -(0.5 * normal()).exp(), -(0.5 * normal()).exp()
    yield normal().softmax(-1).log(), normal().softmax(-1).log()
    yield 0.1 * normal(), 0.1 * normal()


def _device(energy: Energy) -> torch.device:
    return next((tensor.device for tensor in tensors_of(energy)), torch.device("cpu"))


def _of_mismatch(name: str, energy: Energy, found: _Mismatch) -> EnergyGradientError:
    index = {"dphi/dvalue": "first", "-dphi/dprediction": "second"}[found.derivative]
    return EnergyGradientError(
        f"{type(energy).__name__}.gradients, the energy of node '{name}'",
        f"{found.got} for {found.derivative}, the {index} of the two{found.at}",
        found.expected
        if found.has_other_shape
        else f"{found.expected}, by differences of {type(energy).__name__}.of_batch",
        "Return dphi/dvalue and -dphi/dprediction of what of_batch sums; a test by torch.autograd.grad of "
        "of_batch(value - prediction, prediction) shows both.",
    )
