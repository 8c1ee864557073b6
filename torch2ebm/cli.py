"""``python -m torch2ebm``: a demo, gradients compared, and a graph shown, without writing code."""

from __future__ import annotations

import argparse
import operator
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch2ebm.algorithms import FixedPrediction, PredictiveCoding, ZeroDivergence
from torch2ebm.check import check
from torch2ebm.common.version import version
from torch2ebm.compare import compare
from torch2ebm.errors import ConfigurationError, Torch2EBMError
from torch2ebm.graph.granularity import Granularity
from torch2ebm.model.energy_model import convert

DTYPES: Final = {"float32": torch.float32, "int64": torch.int64}
GRANULARITIES: Final = ("auto", "layer", "preactivation", "module", "op", "children")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 when it did what it should, 2 after a message on stderr."""
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as stop:  # argparse has said why, or has shown the help
        return int(stop.code or 0)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(arguments.seed)
            arguments.command(arguments)
    except (Torch2EBMError, OSError) as error:
        print(f"torch2ebm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("torch2ebm: interrupted", file=sys.stderr)
        return 130  # as a shell reports SIGINT
    return 0


# arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m torch2ebm", description=__doc__)
    parser.add_argument("--version", action="version", version=f"torch2ebm {version()}")
    parser.set_defaults(seed=0)
    commands = parser.add_subparsers(required=True, metavar="demo | compare | graph")
    _demo_arguments(commands.add_parser("demo", help="train a small network three ways; takes less than a minute"))
    _compare_arguments(commands.add_parser("compare", help="the gradients of a model against backpropagation's"))
    _graph_arguments(commands.add_parser("graph", help="the nodes of a model, as a table and a picture"))
    return parser


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_demo)
    parser.add_argument("--epochs", type=_count, default=30)
    parser.add_argument("--output", type=_path, default="demo_output", help="folder of the pictures")
    parser.add_argument("--seed", type=_seed, default=0)


def _compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_compare)
    _model_arguments(parser)
    parser.add_argument("--classes", type=_count, help="of the random targets; default: last dimension of the output")
    parser.add_argument("--steps", type=_count, default=20, help="inference steps")
    parser.add_argument("--lr", type=float, default=0.1, help="step size of the inference")
    parser.add_argument("--double", action="store_true", help="in float64")
    parser.add_argument("--output", type=_path, help="picture file")


def _graph_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_graph, double=False)
    _model_arguments(parser)
    parser.add_argument(
        "--nodes", type=_nodes, default="auto", help=f"one of {', '.join(GRANULARITIES)}, or submodule names: a,b"
    )
    parser.add_argument("--output", type=_path, default="graph.png", help="picture file")


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("factory", help="module:name of a torch.nn.Module, or of a callable that makes one")
    parser.add_argument("--input-shape", type=_shape, required=True, help="of the random input: 8,1,28,28")
    parser.add_argument("--input-dtype", choices=DTYPES, default="float32")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 1 or more")
    return int(text)


def _seed(text: str) -> int:
    if not text.lstrip("-").isdecimal() or not -(2**63) <= int(text) < 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at most 63 bits")
    return int(text)


def _path(text: str) -> str:
    if "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is no path: it holds a null character")
    return text


def _shape(text: str) -> tuple[int, ...]:
    return tuple(_count(size.strip()) for size in text.split(","))


def _nodes(text: str) -> Granularity:
    return text if text in GRANULARITIES else text.split(",")


# commands


def _demo(arguments: argparse.Namespace) -> None:
    from torch2ebm.demo import run  # the other commands need none of it

    run(arguments.epochs, arguments.output, arguments.seed)


def _compare(arguments: argparse.Namespace) -> None:
    model, x = _model_and_input(arguments)
    output = _logits(model, x)
    classes = arguments.classes or output.shape[-1]
    if classes > output.shape[-1]:
        raise ConfigurationError(
            "--classes", str(classes), f"at most {output.shape[-1]}, the last dimension of the output", "Leave it out."
        )
    target = torch.randint(classes, output.shape[:-1])
    algorithms = [
        ZeroDivergence(),
        FixedPrediction(arguments.steps, arguments.lr),
        PredictiveCoding(arguments.steps, arguments.lr),
    ]
    comparison = compare(model, _cross_entropy, (x, target), algorithms)
    if arguments.output:
        comparison.plot(arguments.output)
    print(comparison.table())
    if arguments.output:
        print(f"\nPicture: {arguments.output}")


def _graph(arguments: argparse.Namespace) -> None:
    model, x = _model_and_input(arguments)
    _output(model, x)
    convert(model, arguments.nodes, example_inputs=x).torch2ebm.draw(arguments.output)
    print(check(model, x, arguments.nodes))
    print(f"\nPicture: {arguments.output}")


def _cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Over the last dimension, mean over all others: [batch, classes] and [batch, time, classes] alike."""
    return F.cross_entropy(output.flatten(0, -2), target.flatten())


# the user's model


def _model_and_input(arguments: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    model = load(arguments.factory)
    x = _random_input(model, arguments.input_shape, DTYPES[arguments.input_dtype])
    if arguments.double:
        model = model.double()
        x = x.double() if x.is_floating_point() else x
    return model, x


def _random_input(model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if dtype.is_floating_point:
        return torch.randn(shape, dtype=dtype)
    tables = [module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)]
    return torch.randint(min(tables, default=2), shape)


def _output(model: nn.Module, x: Tensor) -> Any:
    """A model that the input does not fit is the caller's mistake: a message, no traceback."""
    with torch.no_grad():
        return _attempt(f"the model on an input of shape {tuple(x.shape)}, {x.dtype}", lambda: model(x))


def _logits(model: nn.Module, x: Tensor) -> Tensor:
    output = _output(model, x)
    if not isinstance(output, Tensor) or output.ndim < 2 or output.shape[-1] < 2:
        got = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ConfigurationError(
            "the model's output", got, "logits: a tensor [batch, ..., classes], two classes or more",
            "Compare other models with torch2ebm.compare(model, loss_fn, batch, algorithms) from Python.",
        )  # fmt: skip
    return output


def load(factory: str) -> nn.Module:
    """The module that ``package.module:name`` is or makes. Raises :class:`ConfigurationError`."""
    module_name, _, name = factory.partition(":")
    if not module_name or not name:
        raise ConfigurationError("factory", repr(factory), "module:name", "For example mypackage.models:make_net.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    module = _attempt(f"import {module_name}", lambda: import_module(module_name))
    found = _attempt(f"{module_name}:{name}", lambda: operator.attrgetter(name)(module))
    made = found if isinstance(found, nn.Module) or not callable(found) else _attempt(f"{factory}()", found)
    if not isinstance(made, nn.Module):
        raise ConfigurationError(
            factory, f"a {type(made).__name__}", "a torch.nn.Module, or a callable without arguments that makes one",
            "Point at the class, the object or a function that returns it.",
        )  # fmt: skip
    return made


def _attempt(what: str, action: Callable[[], Any]) -> Any:
    try:
        return action()
    except Exception as error:  # the user's code may raise anything
        said = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        raise ConfigurationError(what, said, "no error", "Check the names, the folder and the input shape.") from error
