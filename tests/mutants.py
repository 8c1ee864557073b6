"""One-line defects in the mathematics, each of which the named test files have to notice: ``make mutants``.

The package and its tests are copied, one defect is put into the copy, and the tests run there until the first fails.
``python tests/mutants.py [--jobs 2] [words of the mutants to run ...]`` ends with 1 where a defect survives, and where
the tests fail without one.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMIT = 900  # seconds for the tests of one mutant
COPIED = ("torch2ebm", "tests", "pyproject.toml")


@dataclass(frozen=True)
class Mutant:
    """One defect: in ``file`` of the package ``old``, which stands there once, becomes ``new``."""

    name: str
    file: str
    old: str
    new: str
    tests: str  # names of test files without test_ and .py, or of one test in such a file: file::test

    @property
    def arguments(self) -> tuple[str, ...]:
        """What pytest is given."""
        named = (each.partition("::") for each in self.tests.split())
        return tuple(f"{_place(file)}{separator and f'::test_{test}'}" for file, separator, test in named)

    def applied_to(self, text: str) -> str:
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: {self.old!r} is {text.count(self.old)} times in {self.file}, not once")
        return text.replace(self.old, self.new)


# Tests of files that take long: of Strict, of Z-IL's two schedules, of the binomial law, of the loss in the loop.
STRICT = "algorithms::strict_equals_hand_written_inference_on_a_graph"
LEVELS = "algorithms::both_schedules_give_the_literal_schedule_s_gradients_and_minus_delta"
LINEAR = "algorithms::where_the_loss_is_linear_even_the_unlevelled_schedule_is_the_literal_one"
GAMMA = "algorithms::a_step_other_than_one_scales_a_level_by_its_power"
BINOMIAL = "algorithms::on_a_graph_fixed_prediction_is_the_literal_sweep"
ALONE = "loop::a_sample_relaxes_the_same_alone_or_in_a_batch"
WRITE = "traps::a_write_in_place_leaves_values_alone"
CONSTRUCT = "families::a_forward_with_this_construct_is_exact"
FACTOR = "loop::a_gradient_that_backward_is_given_scales_and_its_sign_enters_the_energy"
PART = "loop::a_factor_before_the_loss_is_part_of_it"
ACCUMULATED = "loop::accumulated_micro_batches_are_their_mean_and_the_whole_batch"


def _place(file: str) -> str:
    """The test file of this name, in whichever wing it stands."""
    (found,) = (ROOT / "tests").rglob(f"test_{file}.py")
    return str(found.relative_to(ROOT))


ENERGIES = [
    Mutant("a sample's energy without its half", "engine/energies.py", "0.5 * error.square().flatten(1)",
           "error.square().flatten(1)", "solvers"),
    Mutant("a batch's energy without its half", "engine/energies.py", "return 0.5 * flat.dot(flat)",
           "return flat.dot(flat)",
           "solvers"),
    Mutant("a precision missing in the gradient", "engine/energies.py", "weighted = error * self._like(error)",
           "weighted = error", "solvers"),
    Mutant("a precision squared in the energy", "engine/energies.py", "self._like(error) ** 0.5", "self._like(error)",
           "solvers"),
    Mutant("the other sign of what a categorical node sends", "engine/energies.py", "-torch.expm1(-ratio)",
           "torch.expm1(-ratio)", "solvers"),
    Mutant("a categorical energy averaged over positions", "engine/energies.py", "divergence.flatten(1).sum(1) if",
           "divergence.flatten(1).mean(1) if", "energies"),
    Mutant("a categorical energy averaged over a batch", "engine/energies.py",
           "return self._divergence(error, prediction).sum()", "return self._divergence(error, prediction).mean()",
           "energies"),
    Mutant("a categorical gradient without its mean", "engine/energies.py", "probability * (ratio - divergence)",
           "probability * ratio", "solvers"),
]  # fmt: skip

VALUES_AND_ERRORS = [
    Mutant("a message with the wrong sign", "inference/value_inference.py", "gradient = pull - message",
           "gradient = pull + message", STRICT),
    Mutant("a first message with the wrong sign", "inference/value_inference.py", "gradient = message.neg()",
           "gradient = message", STRICT),
    Mutant("prediction minus origin", "inference/value_inference.py", "difference = self.origins[slot] - prediction",
           "difference = prediction - self.origins[slot]", STRICT),
    Mutant("values that swallow small displacements", "inference/value_inference.py",
           "difference = self.origins[slot] - prediction\n        return",
           "return self[slot] - prediction\n        return",
           "displacements::stored_values_would_have_rounded_it_away"),
    Mutant("a signal that no displacement has", "inference/value_inference.py",
           "self.origins[slot] * (prediction != self.origins[slot])", "self.origins[slot]",
           "displacements::what_is_kept_counts_as_a_signal"),
    Mutant("a wave front that stops at moved parents", "inference/value_inference.py",
           "not self.moved.isdisjoint(node.slots) or not self.moved.isdisjoint(node.reads)",
           "not self.moved.isdisjoint(node.slots)", STRICT),
    Mutant("the loss's gradient for minus it", "inference/base.py", "slot: gradient.neg() for slot",
           "slot: gradient for slot", STRICT),
    Mutant("errors of the state with the wrong sign", "inference/base.py", "error_unit=-1 / self.loss.scale",
           "error_unit=1 / self.loss.scale", STRICT),
    Mutant("a precision missing in a weight's gradient", "inference/base.py",
           "own if cotangent is error or cotangent is None else cotangent * -self.scale", "own", "solvers"),
    Mutant("one child's message for the sum of them", "inference/base.py",
           "messages[slot] = messages[slot] + message if slot in messages else message", "messages[slot] = message",
           STRICT),
    Mutant("a shared parameter's contribution dropped", "engine/gradients.py",
           "total[name] = total[name] + product if name in total else product", "total[name] = product", LEVELS),
    Mutant("errors that do not pass the message on", "inference/error_inference.py", "message + (cotangent - own)",
           "message",
           "solvers"),
    Mutant("the error's own gradient in place of the message", "inference/error_inference.py",
           "    if own is cotangent:\n        return message", "    if own is cotangent:\n        return own",
           "solvers"),
    Mutant("stale predictions below a moved one", "inference/error_inference.py",
           "                self._changed.update(node.slots)", "                pass", "solvers"),
    Mutant("a value without its error", "inference/error_inference.py",
           "self.values[slot] = prediction + self.errors[slot]",
           "self.values[slot] = prediction", "solvers"),
]  # fmt: skip

CALIBRATED = [
    Mutant("a curvature without the loss's", "inference/curvature.py",
           "product = self.hessian(varied * scale)", "product = varied * scale", "curvature"),
    Mutant("a curvature without precisions", "inference/local_products.py",
           "error / _like(self.precisions[owner[slot].name], error)", "error", "curvature"),
    Mutant("every batch of independent samples", "inference/curvature.py",
           "local.separate = independent(ends, rows)", "local.separate = True", "curvature"),
    Mutant("output nodes that do not bend", "inference/curvature.py",
           "self.bends = any(", "self.bends = False and any(", "bent_outputs"),
    Mutant("output nodes that bend, without the loss's own", "inference/curvature.py",
           "summed(self.local.through_outputs(direction, self._of_loss), self._of_nodes.product(direction))",
           "self._of_nodes.product(direction)", "bent_outputs"),
    Mutant("the loss inside by an output that it ignores", "loss/node_curvature.py", "if slot in self._pulls and",
           "if slot != slot and", "bent_outputs"),
    Mutant("a second derivative that is cut off is zero", "loss/node_curvature.py",
           "and self._is_ones_own(evaluated)", "and False", "bent_outputs"),
    Mutant("steps that do not see the loss inside", "inference/steepness.py",
           "self.ends.product(values if self.ends.bends else moved)", "self.ends.product(moved)", "bent_outputs"),
    Mutant("a nudge that is multiplied by the curvature", "algorithms/predictive_coding.py",
           "beta.real / unit.scale", "beta.real * unit.scale", "relative"),
    Mutant("a direction that is not conjugate", "solvers/error_conjugate_gradient.py",
           "keep, turn = torch.where(rests, 0.0, beta)", "keep, turn = torch.where(rests, 0.0, 0 * beta)",
           "error_conjugate_gradient"),
    Mutant("no metric of the precisions", "solvers/error_conjugate_gradient.py",
           "steepest = there if inverse is None else there * inverse", "steepest = there", "error_conjugate_gradient"),
    Mutant("a step that raises the energy is kept", "solvers/error_conjugate_gradient.py",
           "_chosen(rose & ~quadratic, back, forward, inference.recorded)", "forward()", "error_conjugate_gradient"),
]  # fmt: skip

POTENTIALS = [
    Mutant("a learned precision without its logarithm", "engine/energies.py",
           "return energy - self.precision.half_log_determinant(error)", "return energy", "learned_precisions"),
    Mutant("a determinant of one sample", "engine/precision.py", "* (error.numel() // len(self.log))", "",
           "learned_precisions"),
    Mutant("a full matrix by its factor", "engine/energies.py", "turned = error @ self._like(error)",
           "turned = error @ self.precision.factor()", "relaxations"),
    Mutant("a learned gradient in the scale of the energy", "potentials/energy_parameters.py", "else part * scale",
           "else part", "learned_precisions"),
    Mutant("nothing learned where no error has come", "inference/base.py",
           "if energy := self.energies.get(node.name):", "if False:", "learned_precisions"),
    Mutant("phases whose learned gradients are those of the first", "algorithms/predictive_coding.py",
           "for phase in phases]).mean(0)", "for phase in phases[:1]]).mean(0)", "learned_precisions"),
    Mutant("a shared precision learned from one node", "potentials/energy_parameters.py",
           "total[whole] = total[whole] + gradient if whole in total else gradient", "total[whole] = gradient",
           "learned_precisions"),
    Mutant("precisions that no program is given", "inference/runs.py", "[*tensors, *own]", "tensors",
           "learned_precisions"),
    Mutant("a trained precision unseen", "potentials/energy_parameters.py", "energy.precision, trained=True)",
           "1.0, trained=True)", "learned_precisions"),
    Mutant("a state whose energies learn on", "inference/base.py", "as_they_are(self.energies)", "self.energies",
           "learned_precisions"),
    Mutant("no series near the prediction", "potentials/discrete.py",
           "torch.where(error.abs() < near, self._series(small, value), ", "(lambda each: each)(", "formulas"),
    Mutant("logits of both signs", "potentials/discrete.py", "torch.where(value > 0, -1.0, 1.0)",
           "torch.ones_like(value)", "formulas"),
    Mutant("a squared large error", "potentials/robust.py", "torch.where(ratio.abs() > 1, far, near)",
           "0.5 * torch.log1p(ratio.square())", "formulas"),
    Mutant("a function that need not rest", "potentials/function.py", "        if self.observed:\n            return\n",
           "        return\n", "function_energy"),
    Mutant("a function whose shift is an energy", "potentials/function.py",
           "- self._shift(error, prediction)", "", "function_energy"),
    Mutant("samples may depend on each other", "potentials/function.py",
           "        self._check_samples(where, error, prediction)\n", "", "function_energy"),
    Mutant("data on a free node", "potentials/node_energies.py", "if energy.observed and name not in clamped",
           "if False", "relaxations"),
]  # fmt: skip

STEP_SIZES = [
    Mutant("a message with the wrong sign in the Hessian in values", "inference/steepness.py", "{slot: -weighted for",
           "{slot: weighted for", "step_sizes"),
    Mutant("no curvature of the nodes' own in the Hessian in errors", "inference/steepness.py",
           "summed(self.of_nodes(errors), dict(of_loss))", "dict(of_loss)", "step_sizes"),
    Mutant("an energy of one's own of precision 1", "inference/steepness.py",
           "if energy is None or isinstance(energy, Gaussian):\n        return error if energy is None else",
           "if True:\n        return error if not isinstance(energy, Gaussian) else", "step_sizes"),
    Mutant("twice the largest step of descent", "inference/solver.py", "return 2 / stability.steepest",
           "return 4 / stability.steepest", "step_sizes"),
    Mutant("momentum that takes from the largest step", "solvers/momentum.py", "2 * (1 + self.momentum)",
           "2 * (1 - self.momentum)", "step_sizes"),
    Mutant("local errors with the largest step of descent", "solvers/local_error_descent.py",
           "return 1 / stability.steepest if", "return 2 / stability.steepest if", "step_sizes"),
    Mutant("a step that is measured on every call", "inference/step_size.py", "memory.calls >= EVERY:", "True:",
           "step_sizes"),
    Mutant("a step that no rise makes shorter", "inference/step_size.py", "self.share /= 2", "pass", "step_sizes"),
    Mutant("a rise that is told again", "inference/step_size.py", "    memory.told = True\n    steps", "    steps",
           "step_sizes"),
    Mutant("rest without the sum over levels", "inference/settling.py", "settled & (summed <= self.tol)", "settled",
           "step_sizes"),
    Mutant("an error of zero at rest", "inference/history.py",
           "torch.where(length <= still, 0.0, length / size)", "torch.where(size == 0, 0.0, length / size)",
           "step_sizes"),
]  # fmt: skip

STANDING_STILL = [
    Mutant("frozen batch statistics that follow the values", "engine/call.py",
           "kept = self._statistics_of(node) if self.frozen_statistics else None", "kept = None", "traps"),
    Mutant("running statistics that move with the values", "isolation/batch_statistics.py",
           '{"running_mean": None, "running_var": None}', "{}", "traps"),
    Mutant("a new dropout mask for each evaluation", "engine/call.py",
           "changes.append(self._random[node.name].replayed())", "pass", "traps"),
    Mutant("the variance of a sample for the batch's", "isolation/batch_statistics.py", "correction=0",
           "correction=1", "traps"),
    Mutant("values kept in half precision", "engine/call.py",
           "return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor", "return tensor",
           "traps"),
]  # fmt: skip

LOSS = [
    Mutant("lambda for lambda times B", "loss/replayed_loss.py",
           'return self.call.batch_size if reduction == "mean" and', "return 1 if", ALONE),
    Mutant("gradients in lambda's scale", "loss/replayed_loss.py", "self.scale = self.factor / self.multiplier",
           "self.scale = self.factor", ALONE),
    Mutant("the sign of an outer factor lost", "loss/replayed_loss.py", "scalar.given or 1.0)", "1.0)", FACTOR),
    Mutant("a factor of the loss left out of the energy", "loss/outside.py", "or not _scales(caller)", "", PART),
    Mutant("a division for accumulation that stays in the energy", "loss/replayed_loss.py",
           "accumulation * math.copysign", "math.copysign", ACCUMULATED),
    Mutant("a nudged gradient that is not divided by beta", "loss/output_loss.py",
           "self.scale, self.unit = loss.scale / beta,",
           "self.scale, self.unit = loss.scale,", "nudging"),
    Mutant("two nudges of one sign", "engine/nudging.py", "return (self.beta, -self.beta)\n\n\n",
           "return (self.beta, self.beta)\n\n\n",
           "nudging"),
    Mutant("the sum of two phases for their mean", "algorithms/predictive_coding.py",
           "parameters[name] = parameters[name] / len(phases)", "pass", "nudging"),
    Mutant("input gradients of two phases summed", "algorithms/predictive_coding.py",
           "return sum(found[1:], start=found[0]) / len(parts) if found else None",
           "return sum(found[1:], start=found[0]) if found else None", "nudging"),
    Mutant("a lost minimum found late", "inference/divergence.py", "ASYMMETRY = 9.0", "ASYMMETRY = 90.0", "nudging"),
    Mutant("phases mirrored without their nudges' ratio", "inference/divergence.py",
           "(phase.beta / positive.beta) ** 2 *", "4.0 *", "nudging"),
    Mutant("curvature overestimated", "implicit/curvature.py", "at_least_single(gradients[slot])) / width for",
           "at_least_single(gradients[slot])) / width**2 for", "proximal"),
]  # fmt: skip

EXACT = [
    Mutant("one identity too many on a skip", "graph/energy_graph.py", "for step in range(span - 1):",
           "for step in range(span):",
           "graph::levelling_adds_one_identity_less_than_the_levels_an_edge_spans"),
    Mutant("levels by shortest paths", "graph/energy_graph.py", "max(levels, default=0)", "min(levels, default=0)",
           "graph::levels_are_longest_paths_to_an_output"),
    Mutant("parameters read one level late", "algorithms/zero_divergence.py", "if node.level == step:",
           "if node.level == step - 1:", LEVELS),
    Mutant("an error that does not decay", "algorithms/zero_divergence.py",
           "changes[slot] = changes[slot] - error if slot in changes else -error", "pass", LINEAR),
    Mutant("gamma by the number of edges", "engine/reverse_sweep.py",
           "gamma ** (call.graph.owner[slot].level - node.level)", "gamma", GAMMA),
    Mutant("gamma twice", "algorithms/zero_divergence.py", "values[slot] + gamma * change",
           "values[slot] + gamma * gamma * change", GAMMA),
    Mutant("a path's weight not taken off again", "algorithms/fixed_prediction.py",
           "ratio = arrived[length + 1] / arrived[length]", "ratio = arrived[length + 1]", BINOMIAL),
    Mutant("arrivals that stay", "algorithms/fixed_prediction.py", "(1 - lr) * weights[k] + lr", "weights[k] + lr",
           BINOMIAL),
    Mutant("fixed errors that do not decay", "algorithms/fixed_prediction.py", "kept = (1 - self.lr) * deltas[slot]",
           "kept = deltas[slot]", BINOMIAL),
    Mutant("Torch2PC's message with the wrong sign", "torch2pc.py",
           "v[below] = v[below] + eta * (epsilon[below] - message)",
           "v[below] = v[below] + eta * (epsilon[below] + message)", "torch2pc"),
    Mutant("Torch2PC's stale errors made fresh", "torch2pc.py", "return [*v], [None, *epsilon[1:]]",
           "return [*v], [None, *(chain.evaluate(i, v).predictions[0].detach() - v[i] if i < chain.length else "
           "epsilon[i] for i in range(1, chain.length + 1))]", "torch2pc"),
]  # fmt: skip

SOLVERS = [
    Mutant("Adam's first mean not corrected", "solvers/adam_descent.py",
           "first / (1 - first_decay**state.steps) / root", "first / root", "solvers"),
    Mutant("Adam's second mean not corrected", "solvers/adam_descent.py",
           "(second / (1 - second_decay**state.steps))", "second.clone()", "solvers"),
    Mutant("a heavy ball uphill", "solvers/momentum.py", ".sub_(gradient, alpha=float(self.lr))",
           ".add_(gradient, alpha=float(self.lr))", "solvers"),
    Mutant("sequential steps that do not shrink", "solvers/sequential_descent.py", "-self.lr / (1 + state)",
           "-self.lr", "solvers"),
    Mutant("a stale message in sequential descent", "solvers/sequential_descent.py",
           "self.sent.pop(LOSS if self.inference.graph.nodes[name].is_output else name, None)", "pass", "solvers"),
    Mutant("Anderson's mixing without the gradient's", "solvers/anderson_error_descent.py",
           "self.lr * (gradient - (changes @ weights).squeeze(2))", "self.lr * gradient", "anderson"),
    Mutant("Anderson's memory one too short", "solvers/anderson_error_descent.py",
           "del state.errors[: -self.memory - 1], state.gradients[: -self.memory - 1]",
           "del state.errors[: -self.memory], state.gradients[: -self.memory]", "anderson"),
    Mutant("a local message in place of the total one", "solvers/error_descent.py", "inference.total_sweep()",
           "inference.local_sweep()", "solvers"),
    Mutant("tol met the wrong way round", "inference/solver.py", "return Rest(residual, residual <= tolerance(self),",
           "return Rest(residual, residual >= tolerance(self),", "solvers"),
    Mutant("one step more than asked for", "inference/relaxation.py", "while steps < most:",
           "while steps <= most:", "solvers"),
    Mutant("one term too many in the Neumann series", "equilibrium/linear_solvers.py", "for _ in range(self.terms):",
           "for _ in range(self.terms + 1):", "equilibrium_variants"),
    Mutant("conjugate gradients with another rate", "equilibrium/linear_solvers.py", "_ratio(size, dot(image, image))",
           "_ratio(size, dot(image, direction))", "equilibrium_variants"),
]  # fmt: skip

WEIGHTS_MOVE = [
    Mutant("incremental: weights against the gradient", "algorithms/incremental_predictive_coding.py",
           "scale = -self.inference.loss.scale", "scale = self.inference.loss.scale", "incremental"),
    Mutant("incremental: values uphill", "algorithms/incremental_predictive_coding.py",
           "self.inference.move(slot, gradient, -lr)", "self.inference.move(slot, gradient, lr)", "incremental"),
    Mutant("incremental: the end's energy twice in the history", "algorithms/incremental_predictive_coding.py",
           "self.inference.history.pop()", "pass", "incremental"),
    Mutant("incremental: nodes before their children", "algorithms/incremental_predictive_coding.py",
           "for node in reversed(self.graph.hidden_nodes):", "for node in self.graph.hidden_nodes:", "incremental"),
    Mutant("incremental: weights that momentum has moved taken as unmoved",
           "algorithms/incremental_predictive_coding.py", "step > 1 or self.inference.is_active(node)",
           "self.inference.is_active(node)", "incremental"),
    Mutant("IL-prox: an explicit step for the proximal one", "implicit/proximal_inference.py",
           "norm / (-1 / self.rates.alpha - norm)", "norm / (-1 / self.rates.alpha)", "proximal"),
    Mutant("IL-prox: the bias missing in the norm", "implicit/proximal_inference.py",
           "(self.rates.eps + layer.has_bias)",
           "self.rates.eps", "proximal"),
    Mutant("IL-prox: the norm summed over the batch", "implicit/proximal_inference.py", "flat.dot(flat) / len(rows)",
           "flat.dot(flat)", "proximal"),
    Mutant("IL-prox: the error's rate for the messages", "implicit/proximal_inference.py",
           "move(slot, message, self.rates.feedback_rate)", "move(slot, message, self.rates.error_rate)",
           "proximal"),
    Mutant("IL-prox: errors pushed away", "implicit/proximal_inference.py", ", -self.rates.error_rate)",
           ", self.rates.error_rate)", "proximal"),
    Mutant("IL-prox: a step that is not normalised", "implicit/proximal_inference.py", "-mean / norm, 0.0",
           "-mean, 0.0",
           "proximal"),
    Mutant("IL-prox: a loss too curved by nine tenths", "implicit/proximal_inference.py",
           "if curvature > 1 + 4 * accuracy:", "if curvature > 1.9 + 4 * accuracy:", "proximal"),
    Mutant("implicit SGD: the energy without its half", "implicit/objective.py", "0.5 * self.alpha *", "self.alpha *",
           "implicit_sgd"),
    Mutant("implicit SGD: the bias missing in K", "implicit/objective.py",
           "self.rows @ self.rows.t() + float(self.has_bias)", "self.rows @ self.rows.t()", "implicit_sgd"),
    Mutant("implicit SGD: the bias moved by a mean", "implicit/objective.py", "self.alpha * full.sum(0)",
           "self.alpha * full.mean(0)", "implicit_sgd"),
    Mutant("implicit SGD: a change of parameters at half its price", "implicit/parameter_steps.py", "(2 * self.alpha)",
           "(4 * self.alpha)", "parameter_steps"),
    Mutant("implicit SGD: a bias that moves nothing", "implicit/parameter_steps.py", "self.rows.new_ones(",
           "self.rows.new_zeros(", "parameter_steps"),
    Mutant("implicit SGD: the changes of another place", "implicit/parameter_steps.py", "_joined(term, *term.step())",
           "0 * _joined(term, *term.step())", "parameter_steps"),
    Mutant("MQ: the memory one step ahead", "mq.py", 'state["step"] / (state["step"] + 1)',
           '(state["step"] + 1) / (state["step"] + 2)', "mq"),
    Mutant("MQ: no minimum rate", "mq.py", "(magnitude + r) + minimum_rate)", "(magnitude + r))", "mq"),
    Mutant("MQ: the memory for what is new", "mq.py", "mean(), 1 - memory)", "mean(), memory)", "mq"),
]  # fmt: skip

EQUILIBRIA = [
    Mutant("feedback without its weight", "equilibrium/dynamics.py",
           "add(messages.pop(slot), alpha=1 / self.weight[slot])",
           "add(messages.pop(slot))", "equilibrium"),
    Mutant("a nudge without c_o", "equilibrium/dynamics.py",
           "self.beta * equilibrium.output_weight / equilibrium.weight[slot]",
           "self.beta", "equilibrium_refusals::several_outputs_have_the_gradient_at_the_equilibrium"),
    Mutant("a message not conjugated", "equilibrium/dynamics.py", "message.conj() if message.is_complex() else message",
           "message", "equilibrium_theorems"),
    Mutant("a holomorphic loss conjugated", "loss/replayed_loss.py", "None if each is None else each.conj() for",
           "each for",
           "equilibrium_theorems"),
    Mutant("conjugate nudges counted once", "engine/nudging.py", "(1 if one else 2)", "1", "equilibrium_theorems"),
    Mutant("a symmetric estimate over beta, not twice beta", "algorithms/equilibrium_propagation.py",
           "1 / (len(nudges) * beta)", "1 / beta", "equilibrium"),
    Mutant("the free phase left out of a one-sided estimate", "algorithms/equilibrium_propagation.py",
           "pairs.append((free.settled.states, rest))", "pass", "equilibrium"),
    Mutant("an estimate without c_o", "algorithms/equilibrium_propagation.py",
           "-loss.scale / equilibrium.output_weight", "-loss.scale", "equilibrium"),
    Mutant("damping the other way round", "equilibrium/updates.py", "moved.lerp(states[slot], self.damping)",
           "states[slot].lerp(moved, self.damping)", "equilibrium"),
    Mutant("a damped residual not undone", "equilibrium/settling.py", "residual = paces[0] / update.share",
           "residual = paces[0]",
           "damped_residual"),
    Mutant("contrastive Hebbian learning without gamma's power", "algorithms/clamped.py",
           "loss.scale / (amount * free.equilibrium.output_weight)", "loss.scale / amount", "equilibrium_variants"),
    Mutant("coupled learning: outputs of other depths held too far", "algorithms/clamped.py",
           "alpha=amount * equilibrium.output_weight / equilibrium.weight[slot]", "alpha=amount",
           "clamped_outputs"),
    Mutant("two steps taken for backprop", "inference/relaxation.py", "one_step_is_backprop and steps == 1",
           "one_step_is_backprop and steps >= 1", "regime"),
    Mutant("a residual over the smallest error", "engine/results.py",
           "torch.stack([error.double() for error in errors]).amax(0)",
           "torch.stack([error.double() for error in errors]).amin(0)", "regime"),
    Mutant("one step too few to reach a level", "engine/signal.py", "found[name] + 1", "found[name]", "signal"),
    Mutant("nodes that no loss reads blamed for their gradients", "engine/signal.py",
           "if any(slot in errors for slot in node.slots)", "if node.slots", "signal"),
    Mutant("an energy's second derivative not looked at", "potentials/energy_check.py", "in pairs]", "in pairs[:1]]",
           "energy_check"),
    Mutant("an energy whose gradients are right nowhere passes", "potentials/energy_check.py",
           "        raise _of_mismatch(", "        _of_mismatch(", "energy_check"),
    Mutant("a saddle's matrix with one root of the slopes", "equilibrium/linearised.py",
           "self._by_root(self._hessian(self._by_root(v)))", "self._hessian(self._by_root(v))", "minimum"),
    Mutant("a saddle judged by the smallest eigenvalue", "equilibrium/minimum.py",
           "eigvalsh((matrix + matrix.mT) / 2)[:, -1]", "eigvalsh((matrix + matrix.mT) / 2)[:, 0]", "minimum"),
    Mutant("the adjoint without the slope", "equilibrium/linearised.py",
           "self._hessian(self._divided(self.at_drives(z)))",
           "self._hessian(self._divided(z))", "equilibrium_variants"),
    Mutant("the adjoint without its weights", "equilibrium/linearised.py",
           "slot: each / self.equilibrium.weight[slot] for",
           "slot: each for", "equilibrium_variants"),
]  # fmt: skip

PROGRAMS = [
    Mutant("batch statistics of the first batch in every program", "engine/call.py",
           "return [*named, *passed, *drawn, *statistics]", "return [*named, *passed, *drawn]", "programs"),
    Mutant("an outer factor left out of a program", "inference/runs.py", "torch.tensor(self.inference.loss.scale,",
           "torch.tensor(1.0,", "programs"),
    Mutant("one loss's program for another", "inference/runs.py", "key = (settings_of(solver), on_loss,",
           "key = (settings_of(solver), None,",
           "programs::two_losses_of_the_same_tensors_have_programs_of_their_own"),
    Mutant("the program of a setting that has changed", "common/nested.py",
           "return type(thing), signature(attributes_of(thing))", "return type(thing), id(thing)",
           "own_extensions::an_energy_is_taken_and_a_changed_setting_is_seen"),
    Mutant("a program that forgets which values have moved", "inference/value_inference.py", "frozenset(self.moved)",
           "frozenset()", "programs"),
    Mutant("a round that starts where the one before did", "programs/program.py", "current |= {", "_ = {",
           "programs::several_rounds_of_a_program_are_one_program"),
    Mutant("one setting's program for another", "programs/surroundings.py", "torch.get_num_threads(), settings",
           "torch.get_num_threads()", "program_settings::a_setting_of_a_module_may_change"),
]  # fmt: skip

RUNS = [
    Mutant("a value that forward writes handed on as it is", "capture/watch.py",
           "handed = leaf.clone() if rewritten else leaf", "handed = leaf", WRITE),
    Mutant("writes of buffers taken for other operations", "capture/recorder.py",
           "self.run.effects.add((index, key))\n            return result", "return result",
           "never_stale::a_buffer_that_takes_a_statistic_leaves_the_sequence_of_a_run_as_it_is"),
    Mutant("modes of the run forgotten", "capture/recorder.py", "there = None if ambient == self.start else ambient",
           "there = None", CONSTRUCT),
    Mutant("a graph for other numbers", "model/capture_cache.py",
           "all(a is b or _equal(a, b) for a, b in pairs)", "True",
           "module_view::what_is_written_on_the_model_is_what_forward_reads"),
    Mutant("a composition that moves buffers again", "engine/call.py",
           "within([moved.preserved()], lambda: self._compose", "within([], lambda: self._compose",
           "traps::running_statistics_on_either_side_of_a_branch_move_once_a_step"),
    Mutant("random numbers drawn anew by the nodes", "engine/call.py", "changes.append(state.replayed())", "pass",
           "traps::with_random_draws_zero_divergence_is_autograd_of_the_same_draws"),
]  # fmt: skip

AGREEMENT = [
    Mutant("half of the angle", "reports/agreement.py", "math.degrees(2 * math.atan2", "math.degrees(math.atan2",
           "agreement"),
    Mutant("an error relative to ours", "reports/agreement.py", "/ norm_r, norm_g / norm_r",
           "/ norm_g, norm_g / norm_r",
           "agreement"),
]  # fmt: skip

DIAGNOSIS = [
    Mutant("values without the messages of children", "inference/steepness.py",
           "self.local.one_level_back({**sent, **of_loss})", "of_loss",
           "diagnose::the_ends_of_the_spectrum_in_values_are_those_of_the_dense_hessian"),
    Mutant("a Hessian without the nudge", "diagnosis/measuring.py", "loss if beta is None else NudgedLoss(loss, beta)",
           "loss", "diagnose::sigma_squared_is_that_of_the_model_and_the_spectrum_in_errors_is_made_of_it"),
    Mutant("a spectrum without precisions", "inference/steepness.py",
           "error if energy is None else energy.gradients(error, prediction)[0]", "error",
           "diagnose::the_ends_of_the_spectrum_in_values_are_those_of_the_dense_hessian"),
    Mutant("a bound that is no bound", "diagnosis/spectrum.py",
           "is_bound = float(smallest) - lowest > KNOWN * abs(float(smallest))", "is_bound = False",
           "diagnose::a_condition_number_that_a_few_products_cannot_tell_is_said_to_be_a_bound"),
    Mutant("steps along the longest path", "engine/signal.py", "if parent not in found:",
           "if found.get(parent, -1) <= found[name]:",
           "diagnose::so_many_steps_reach_every_node_and_one_less_does_not"),
    Mutant("a penalty that makes a sum neither", "diagnosis/loss_scale.py",
           "first, second = twice - once, thrice - twice", "first, second = twice - once, once",
           "diagnose::a_penalty_on_weights_hides_neither_a_sum_nor_a_mean"),
    Mutant("a loss that is quadratic here alone", "diagnosis/loss_scale.py",
           "if factor and identity and _stays(call, loss, here, noise, factor):", "if factor and identity:",
           "diagnose::what_is_quadratic_near_the_output_alone_has_no_one_half"),
    Mutant("a module that is not put back", "diagnosis/subject.py",
           "stack.enter_context(untouched(self.module, device))", "pass",
           "diagnose::everything_is_as_before_also_where_the_loss_raises"),
    Mutant("a loss of the user's own that has counted", "diagnosis/subject.py",
           "stack.enter_context(untouched(self.loss_fn, device))", "pass",
           "diagnose::everything_is_as_before_also_where_the_loss_raises"),
    Mutant("errors that values have swallowed", "diagnosis/judging.py", "in lost | swallowed)", "in lost)",
           "diagnose::what_is_wrong_is_named_and_every_advice_cures_it"),
    Mutant("an lr that is advised untried", "diagnosis/judging.py",
           "if again.error is None and not any(_of_step_size(again, bounds)):", "if True:",
           "diagnose::where_curvature_grows_on_the_way_the_lr_that_is_advised_is_below_that_of_the_start"),
    Mutant("a spectrum in values without the loss at bent nodes", "inference/steepness.py",
           "return summed(summed(own, of_loss), self.local.one_level_back(sent))",
           "return summed(own, self.local.one_level_back(sent))", "diagnose::an_output_that_bends_is_in_the_spectrum"),
]  # fmt: skip

AROUND = [
    Mutant("a loop on the module that is told nothing", "wrapper/steps_told.py",
           "forwards.answers != (self._answers or 0)", "forwards.answers != -1", "loops_told"),
    Mutant("a step on the gradients of the one before told", "wrapper/steps_told.py",
           "self._used[0]() is not gradient", "True", "loops_told"),
    Mutant("a backward alone taken for training", "common/plain_loop.py", "== _versions(parameters):", "== []:",
           "loops_told"),
    Mutant("two optimizers of the same parameters", "wrapper/attaching.py", "bool(taken) and not own & taken",
           "bool(taken)", "wrapped_optimizers"),
    Mutant("further steps left out without a word", "optimizer.py", "if self._conversion.forwards.later:",
           "if False:", "wrapped_optimizers"),
    Mutant("a step beside the weights after it", "monitor.py", "vector_norm(before[name]))", "vector_norm(tensor))",
           "monitors"),
    Mutant("an infinite error on the last decade", "reports/broken_axis.py",
           "self.highest + self.gap + self.strip / 2, found)", "self.highest, found)", "broken_axis"),
    Mutant("an error of zero at the smallest number", "reports/broken_axis.py", "floor - self.strip / 2 + given",
           "self.lowest + given", "broken_axis"),
    Mutant("boxes in a circle", "reports/outline.py", "if not _leads(key, before - {key}, after)", "if key",
           "graph_pictures"),
    Mutant("a name that Graphviz reads as another", "reports/dot.py", '.replace("&", "&amp;")', "", "graph_pictures"),
    Mutant("a line of a short relaxation", "reports/progress_line.py", "self.after if", "0.0 if", "progress_line"),
    Mutant("labels cut off to whole numbers", "mnist.py", "(exact == exact.floor()) & ", "", "stored_numbers"),
    Mutant("what follows the announced numbers forgotten", "common/stored_numbers.py", "if stream.read(1):",
           "if False:", "stored_numbers"),
    Mutant("an array of columns read by rows", "common/stored_numbers.py",
           "self.sizes[::-1] if self.column_major else self.sizes", "self.sizes", "stored_numbers"),
    Mutant("an error that is a sum", "analysis/energy_function.py", "else given[slot] - prediction",
           "else given[slot] + prediction", "energy::every_share_of_a_chain"),
    Mutant("a loss without its factor", "analysis/energy_terms.py", "loss = beta * losses_of_samples(",
           "loss = losses_of_samples(", "energy::every_share_of_a_chain"),
    Mutant("a Hessian in the errors taken in the values", "analysis/hessian.py",
           'point.values if coordinates == "values" else point.errors', "point.values",
           "hessian::on_a_dag_with_precisions_and_shared_weights"),
    Mutant("samples that are always apart", "analysis/hessian.py",
           "if call.couples_samples or not curved.commutes(rows):", "if False:",
           "hessian::a_batch_norm_makes_one_block_of_all_samples"),
    Mutant("a step that is counted late", "inference/relaxation.py", "on_step(step_of(inference, steps, beta, ",
           "on_step(step_of(inference, steps - 1, beta, ",
           "on_step::the_values_of_every_step_are_those_of_plain_descent"),
    Mutant("a posterior that clamped values push away", "theory/linear_gaussian.py",
           "pull = self._pull()[free] - values", "pull = self._pull()[free] + values",
           "theory::every_pattern_of_clamped_values"),
    Mutant("intervals that are the whole duration", "solvers/ode_flow.py", "[0.0, self.duration / self.steps]",
           "[0.0, self.duration]", "ode_flow::euler_is_gradient_descent"),
    Mutant("names written into text unchecked", "graph/generated.py", "all(key.isidentifier() and _can_be_written(key)",
           "all(True", "generated"),
    Mutant("half a checkpoint loaded", "wrapper/checkpoints.py",
           'vars(optimizer).update(before)\n        raise _malformed(optimizer, problem)',
           "raise _malformed(optimizer, problem)", "checkpoints"),
    Mutant("other settings of a checkpoint not told", "wrapper/checkpoints.py", "saved[name] != now[name]",
           "False", "resume"),
]  # fmt: skip

# model.infer, clamps in training, and samples.
CLAMPING = [
    Mutant("readers of a part that is given read the wrong part", "clamping/rewriting.py",
           "torch.where(arguments[mask], arguments[given], arguments[here])",
           "torch.where(arguments[mask], arguments[here], arguments[given])", "infer"),
    Mutant("all of a value is held against what is given in part", "clamping/data_loss.py",
           "torch.where(self.mask, error, 0.0)", "torch.where(self.mask, error, error)", "infer"),
    Mutant("the other sign of the pull of data", "clamping/data_loss.py", "_add(found, slot, -back)",
           "_add(found, slot, back)", "infer"),
    Mutant("a tie pulls on one of the two predictions", "clamping/data_loss.py", "_add(found, data.slot, own)",
           "_add(found, data.slot, own * 0)", "infer::two_predictions_of_one_value"),
    Mutant("no energy of what is given in the state's gradients", "clamping/data_loss.py",
           "_sum(gradients, beside)", "_sum(gradients, {})", "training::a_hidden_value_is_given_in_part"),
    Mutant("the mean over batches as the mean of means", "memory/last_values.py", "batch_size / total", "0.5", "start"),
    Mutant("one sign of the nudge for both", "algorithms/predictive_coding.py",
           "return NUDGED if beta > 0 else NUDGED_BACK", "return NUDGED", "start"),
    Mutant("values of another shape are begun at", "memory/last_values.py",
           "all(value.shape == shapes[slot] for slot, value in found.items())", "True", "start"),
    Mutant("a step size that does not know of the data", "clamping/relaxing.py",
           "DataLoss(found, self.call.values)", "DataLoss(found)",
           "infer::an_automatic_step_size_knows_of_the_data"),
    Mutant("a start that is not taken", "clamping/start.py", "inference.values[slot] = value.detach().clone()",
           "inference.values[slot] = prediction", "infer"),
    Mutant("a prior without its mean", "clamping/inputs.py", "0.0 if own.mean is None else own.mean", "0.0",
           "infer::a_latent_with_a_prior_and_a_part_of_the_output"),
    Mutant("conjugate gradients that forget where they begin", "solvers/error_conjugate_gradient.py",
           "here, zero = rows.pack(inference.errors), rows.pack({})", "here, zero = rows.pack({}), rows.pack({})",
           "infer::start_decides_where_there_are_two_lowest_points"),
    Mutant("noise of half the variance", "solvers/langevin.py", "(2 * rate * self.temperature).sqrt()",
           "(rate * self.temperature).sqrt()", "langevin"),
    Mutant("noise that knows no temperature", "solvers/langevin.py", "(2 * rate * self.temperature).sqrt()",
           "(2 * rate).sqrt()", "langevin"),
    Mutant("values that no gradient reaches are not drawn", "solvers/langevin.py",
           "for slot, direction in ahead.items():", "for slot, direction in list(ahead.items())[1:]:", "langevin"),
    Mutant("the sum of the draws in place of their mean", "engine/draws.py", "total / self.count for name, total in "
           "self._parameters", "total for name, total in self._parameters", "training"),
    Mutant("no gradient of the precision of what is given", "clamping/training.py",
           "found.learned[n] + g if n in found.learned else g", "0 * g",
           "training::the_precision_of_a_given_value_learns"),
]  # fmt: skip


MUTANTS = [*ENERGIES, *POTENTIALS, *VALUES_AND_ERRORS, *STANDING_STILL, *CALIBRATED, *STEP_SIZES, *LOSS, *EXACT,
           *SOLVERS, *WEIGHTS_MOVE, *EQUILIBRIA, *PROGRAMS, *RUNS, *AGREEMENT, *DIAGNOSIS,
           *CLAMPING, *AROUND]  # fmt: skip


# Running them ---------------------------------------------------------------------------------------------------------


def copied_to(folder: Path) -> None:
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name)
        else:
            shutil.copy(ROOT / name, folder)


def run_tests(folder: Path, arguments: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """The tests in ``folder``, whose package comes first: ``python -m`` puts the working folder on the path."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--no-header", "--tb=no"]
    return subprocess.run(
        [*command, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT
    )


def verdict(mutant: Mutant) -> tuple[str, str]:
    """``killed``, ``SURVIVED`` or ``ERROR``, and the test that noticed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copied_to(folder)
        file = folder / "torch2ebm" / mutant.file
        file.write_text(mutant.applied_to(file.read_text()))
        done = run_tests(folder, mutant.arguments)
    failed = [line.split(" - ")[0] for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if done.returncode == 0:
        return "SURVIVED", done.stdout.splitlines()[-1]
    if done.returncode == 1 and failed:
        return "killed", failed[0].removeprefix("FAILED tests/")
    return "ERROR", (done.stdout + done.stderr)[-500:]


def is_sound(tests: tuple[str, ...]) -> bool:
    """Whether the tests pass where there is no defect."""
    with tempfile.TemporaryDirectory() as name:
        copied_to(Path(name))
        done = run_tests(Path(name), tests)
    print(f"without a defect  {' '.join(tests)}  {done.stdout.splitlines()[-1]}", flush=True)
    return done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="run the mutants alone whose name or file has one of these in it")
    parser.add_argument("--jobs", type=int, default=2, help="how many run at a time")
    parser.add_argument("--no-baseline", action="store_true", help="do not run the tests without a defect first")
    chosen = parser.parse_args()
    mutants = [m for m in MUTANTS if not chosen.words or any(w in f"{m.name} {m.file}" for w in chosen.words)]
    files = sorted({file for mutant in mutants for file in mutant.arguments})
    with ThreadPoolExecutor(chosen.jobs) as pool:
        sound = chosen.no_baseline or all(pool.map(lambda file: is_sound((file,)), files))

        def timed(mutant: Mutant) -> str:
            start = time.perf_counter()
            outcome, detail = verdict(mutant)
            seconds = time.perf_counter() - start
            print(f"{outcome:8}  {seconds:4.0f} s  {mutant.file}: {mutant.name}  [{detail}]", flush=True)
            return outcome

        outcomes = list(pool.map(timed, mutants))
    print(f"{outcomes.count('killed')} of {len(mutants)} defects were noticed")
    return int(not sound or any(outcome != "killed" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
