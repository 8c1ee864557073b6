"""``python -m torch2ebm``: a demo, gradients compared, a graph shown, and a model diagnosed, without writing code."""

from __future__ import annotations

import argparse
import importlib.util
import operator
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch2ebm.algorithms import FixedPrediction, PredictiveCoding, ZeroDivergence
from torch2ebm.check import check
from torch2ebm.common.version import version
from torch2ebm.compare import compare
from torch2ebm.diagnose import diagnose
from torch2ebm.errors import ConfigurationError, Torch2EBMError
from torch2ebm.graph.granularity import Granularity
from torch2ebm.model.energy_model import convert

DTYPES: Final = {"float32": torch.float32, "int64": torch.int64}
LOSSES: Final = ("cross_entropy", "mse")
TRACEBACK: Final = "where something goes wrong, show the whole traceback"
GRANULARITIES: Final = ("auto", "layer", "preactivation", "module", "op", "children")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 when it did what it should, 1 where it found something wrong, 2 after a message on stderr."""
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as stop:  # argparse has said why, or has shown the help
        return int(stop.code or 0)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(arguments.seed)
            code: int = arguments.command(arguments)
        sys.stdout.flush()  # here, where a full disk or a closed pipe can still be told
    except KeyboardInterrupt:
        print("torch2ebm: interrupted", file=sys.stderr)
        return 130  # as a shell reports SIGINT
    except BaseException as error:  # the user's code may raise anything, and exit
        return _failed(error, arguments.traceback)
    return code


def _failed(error: BaseException, whole: bool) -> int:
    if isinstance(error, OSError):
        _give_up_stdout()
    if whole:
        traceback.print_exception(error)
    known = isinstance(error, (Torch2EBMError, OSError))
    print(f"torch2ebm: {_text_of(error) if known else _said(error)}", file=sys.stderr)
    if not whole and (error.__cause__ is not None or not known):
        print("torch2ebm: add --traceback to see where it happened", file=sys.stderr)
    return 2


def _give_up_stdout() -> None:
    """What is left in a buffer that nobody takes would be tried once more when Python ends, with a message of its."""
    with suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
        return
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where there is one to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        nothing = action.default is None or action.default is False
        return action.help if nothing else super()._get_help_string(action)


# arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m torch2ebm", description=__doc__)
    parser.add_argument("--version", action="version", version=f"torch2ebm {version()}")
    parser.add_argument("--traceback", action="store_true", help=TRACEBACK)
    parser.set_defaults(seed=0)
    commands = parser.add_subparsers(required=True, metavar="demo | compare | graph | diagnose")
    for name, arguments, does in (
        ("demo", _demo_arguments, "train a small network three ways; takes less than a minute"),
        ("compare", _compare_arguments, "the gradients of a model against backpropagation's"),
        ("graph", _graph_arguments, "the nodes of a model, as a table and a picture"),
        ("diagnose", _diagnose_arguments, "what a model needs, and what is wrong with settings; ends with 1 if so"),
    ):
        command = commands.add_parser(name, help=does, description=does, formatter_class=_Defaults)
        arguments(command)
        # no default: it would take the place of what stands before the command
        command.add_argument("--traceback", action="store_true", help=TRACEBACK, default=argparse.SUPPRESS)
    return parser


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_demo)
    parser.add_argument("--epochs", type=_count, default=12, help="passes over the digits")
    parser.add_argument("--output", type=_path, default="demo_output", help="folder of the pictures and of the page")
    parser.add_argument("--seed", type=_seed, default=0, help="of the weights and of the order of the digits")


def _compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_compare)
    _model_arguments(parser)
    parser.add_argument("--classes", type=_count, help="of the random targets; default: last dimension of the output")
    parser.add_argument("--steps", type=_count, default=20, help="inference steps")
    parser.add_argument("--lr", type=float, default=0.1, help="step size of the inference")
    parser.add_argument("--double", action="store_true", help="in float64")
    parser.add_argument("--output", type=_path, help="picture file")
    parser.add_argument("--html", type=_path, metavar="PATH", help="page with all tables, to open in a browser")


def _graph_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_graph, double=False)
    _model_arguments(parser)
    parser.add_argument(
        "--nodes", type=_nodes, default="auto", help=f"one of {', '.join(GRANULARITIES)}, or submodule names: a,b"
    )
    parser.add_argument("--output", type=_path, default="graph.png", help="picture file, .dot for the text of Graphviz")
    parser.add_argument("--depth", type=_depth, help="modules deeper than this are one box each; default: every node")


def _diagnose_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_diagnose)
    _model_arguments(parser)
    parser.add_argument("--classes", type=_count, help="of the random targets; default: last dimension of the output")
    parser.add_argument("--steps", type=_count, help="inference steps; default: PredictiveCoding() with nothing set")
    parser.add_argument("--lr", type=float, help="step size of the inference")
    parser.add_argument("--loss", choices=LOSSES, default="cross_entropy", help="mse: against random numbers")
    parser.add_argument("--double", action="store_true", help="in float64")


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("factory", help="module:name or path.py:name of a module, or of a callable that makes one")
    parser.add_argument("--input-shape", type=_shape, required=True, help="of the random input: 8,1,28,28")
    parser.add_argument("--input-dtype", choices=DTYPES, default="float32", help="of the random input")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 1 or more")
    return int(text)


def _depth(text: str) -> int:
    return 0 if text == "0" else _count(text)


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


def _demo(arguments: argparse.Namespace) -> int:
    from torch2ebm.demo import run  # the other commands need none of it

    run(arguments.epochs, arguments.output, arguments.seed)
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    # the factory may change the folder
    picture, page = (os.path.abspath(path) if path else None for path in (arguments.output, arguments.html))
    model, x = _model_and_input(arguments)
    target = _classes(arguments, _logits(_output(model, x)))
    algorithms = [
        ZeroDivergence(),
        FixedPrediction(arguments.steps, arguments.lr),
        PredictiveCoding(arguments.steps, arguments.lr),
    ]
    comparison = _run(lambda: compare(model, _cross_entropy, (x, target), algorithms))
    if picture:
        comparison.plot(picture)
    if page:
        comparison.to_html(page)
    print(comparison.table())
    if arguments.output:
        print(f"\nPicture: {arguments.output}")
    if arguments.html:
        print(f"\nPage: {arguments.html}")
    return 0


def _graph(arguments: argparse.Namespace) -> int:
    picture = os.path.abspath(arguments.output) if arguments.output else ""
    model, x = _model_and_input(arguments)
    _output(model, x)
    converted = _run(lambda: convert(model, arguments.nodes, example_inputs=x))
    converted.torch2ebm.draw(picture, depth=arguments.depth)
    print(_run(lambda: check(model, x, arguments.nodes)))
    print(f"\nPicture: {arguments.output}")
    return 0


def _diagnose(arguments: argparse.Namespace) -> int:
    given = {name: getattr(arguments, name) for name in ("steps", "lr")}
    algorithm = PredictiveCoding(**{name: number for name, number in given.items() if number is not None})
    model, x = _model_and_input(arguments)
    output = _logits(_output(model, x))
    if arguments.loss == "mse":
        target, loss = torch.randn_like(output), _squared_error
    else:
        target, loss = _classes(arguments, output), _cross_entropy
    diagnosis = _run(lambda: diagnose(model, loss, (x, target), algorithm))
    print(diagnosis)
    return 0 if diagnosis.ok else 1


def _classes(arguments: argparse.Namespace, output: Tensor) -> Tensor:
    """Random targets, as many classes as were asked for."""
    classes = arguments.classes or output.shape[-1]
    if classes > output.shape[-1]:
        raise ConfigurationError(
            "--classes", str(classes), f"at most {output.shape[-1]}, the last dimension of the output", "Leave it out."
        )
    return torch.randint(classes, output.shape[:-1])


def _squared_error(output: Any, target: Tensor) -> Tensor:
    return F.mse_loss(_logits(output), target)


def _cross_entropy(output: Any, target: Tensor) -> Tensor:
    """Over the last dimension, mean over all others: [batch, classes] and [batch, time, classes] alike."""
    return F.cross_entropy(_logits(output).flatten(0, -2), target.flatten())


# the user's model


def _model_and_input(arguments: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    model = load(arguments.factory)
    shape, dtype = arguments.input_shape, DTYPES[arguments.input_dtype]
    x: Tensor = _attempt(f"an input of shape {shape}", lambda: _random_input(model, shape, dtype), "Take less samples.")
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
        what = f"the model on an input of shape {tuple(x.shape)}, {x.dtype}"
        output = _attempt(what, lambda: model(x), "Check the input's shape and dtype (--input-dtype int64 for tokens).")
    _tell_of_cache(model, output)
    return output


def _run(action: Callable[[], Any]) -> Any:
    """What torch2ebm does with the user's model; what that prints goes to stderr, and stdout has results alone."""
    with redirect_stdout(sys.stderr):
        return action()


def _tell_of_cache(model: nn.Module, output: Any) -> None:
    """A Hugging Face model that generates keeps the keys and values of each layer, and all of these are outputs."""
    if getattr(output, "past_key_values", None) is not None:
        print(
            f"torch2ebm: {type(model).__name__} returns the keys and values of every layer, which are outputs then; "
            "set model.config.use_cache = False in the factory (from_pretrained(..., use_cache=False))",
            file=sys.stderr,
        )


def _logits(output: Any) -> Tensor:
    """The output, or what a Hugging Face model calls so in its output."""
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    output = output if found is None else found
    if not isinstance(output, Tensor) or output.ndim < 2 or output.shape[-1] < 2:
        got = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ConfigurationError(
            "the model's output", got, "logits: a tensor [batch, ..., classes], two classes or more",
            "Compare other models with torch2ebm.compare(model, loss_fn, batch, algorithms) from Python.",
        )  # fmt: skip
    return output


def load(factory: str) -> nn.Module:
    """The module that ``package.module:name`` or ``path.py:name`` is or makes. Raises :class:`ConfigurationError`."""
    place, _, name = factory.rpartition(":")
    if not place or not name:
        raise ConfigurationError(
            "factory", repr(factory), "module:name or path.py:name",
            "For example mypackage.models:make_net, or models/net.py:Net.",
        )  # fmt: skip
    folder = os.getcwd()
    if folder not in sys.path and not getattr(sys.flags, "safe_path", False):
        sys.path.insert(0, folder)
    is_file = place.endswith(".py")
    read = (lambda: _module_of_file(Path(place))) if is_file else (lambda: import_module(place))
    module = _attempt(f"import {place}", read, "Check the name and the folder; a file is given as path.py:name.")
    found = _attempt(factory, lambda: operator.attrgetter(name)(module), f"Check the name in {place}.")
    made = found
    if not isinstance(found, nn.Module) and callable(found):
        made = _attempt(f"{factory}()", found, "Point at a callable that takes no arguments and does not fail.")
    if not isinstance(made, nn.Module):
        raise ConfigurationError(
            factory, f"a {type(made).__name__}", "a torch.nn.Module, or a callable without arguments that makes one",
            "Point at the class, the object or a function that returns it.",
        )  # fmt: skip
    return made


def _module_of_file(path: Path) -> ModuleType:
    """Run a file as a module; what it imports beside it is found."""
    name = path.stem if path.stem.isidentifier() and path.stem not in sys.modules else f"torch2ebm_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))
    sys.modules[name] = module  # dataclasses and pickles look there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _attempt(what: str, action: Callable[[], Any], remedy: str) -> Any:
    """Run the user's code, which may raise, print and exit; what it prints goes to stderr."""
    try:
        with redirect_stdout(sys.stderr):
            return action()
    except KeyboardInterrupt:
        raise
    except SystemExit as error:
        raise ConfigurationError(
            what, f"an exit with code {error.code!r}", "code that returns",
            "Guard what a script does with if __name__ == '__main__'.",
        ) from error  # fmt: skip
    except BaseException as error:
        raise ConfigurationError(what, _said(error), "no error", remedy) from error


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {_text_of(error)}".strip().splitlines()[0].removesuffix(":")


def _text_of(error: BaseException) -> str:
    try:
        return str(error).strip()
    except Exception:  # an error of the user's may fail to say what it is
        return ""
