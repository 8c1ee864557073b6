"""The pictures of the page "Gallery": each with a line, and the code that makes it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

MARK = "<!-- the pictures: website/gallery.py -->"


@dataclass(frozen=True)
class Picture:
    """Where the site has it, what one sees, and the file that draws it."""

    place: str
    line: str
    source: str


def tutorial(stem: str, name: str, line: str) -> Picture:
    return Picture(f"tutorials/{stem}/{name}.png", line, f"tutorials/{stem}.py")


def benchmark(name: str, line: str, source: str) -> Picture:
    return Picture(f"benchmarks/results/{name}.png", line, f"benchmarks/{source}.py")


FIRST, INFERENCE, LIMIT = "1_first_network", "2_what_inference_does", "3_infinitesimal_limit"
IMPLICIT, EQUILIBRIUM, GENERATION = "4_implicit_sgd", "5_equilibrium_propagation", "6_generation_and_completion"
MEMORY, DIRECTIONS, DRAWS = "7_associative_memory", "8_two_directions", "9_monte_carlo"
DEEPER = "10_convolutions_and_attention"

SECTIONS = {
    "Values relax": (
        Picture(
            "pictures/relaxation.svg",
            "Values move until the energy is lowest, and the error travels from the output to the input.",
            "website/picture.py",
        ),
        tutorial(FIRST, "1_inference", "Inference trades a little error in each layer for a lower loss."),
        tutorial(INFERENCE, "2_wave_front", "An error goes one layer a step. Grey: no error yet."),
        tutorial(INFERENCE, "2_solvers", "Solvers beside each other: how fast each comes to rest, against depth."),
        tutorial(INFERENCE, "2_too_large", "Step sizes that are too large: the energy rises instead of falling."),
    ),
    "Near to backprop, and far": (
        tutorial(FIRST, "1_angles", "The angle to backprop grows with the strength of the loss."),
        tutorial(LIMIT, "3_orders", "One nudge is exact to first order, two nudges to second order."),
        tutorial(LIMIT, "3_lost_minimum", "A negative nudge that is too large destroys the minimum that it moves."),
        tutorial(IMPLICIT, "4_explicit_implicit", "An explicit step overshoots where an implicit one comes to rest."),
        tutorial(IMPLICIT, "4_stability", "IL-prox learns at any learning rate."),
    ),
    "Convolutions and attention": (
        tutorial(DEEPER, "10_graph", "The nodes of a small ResNet, drawn by `model.draw`."),
        tutorial(DEEPER, "10_accuracy", "A ResNet and a transformer learn beside backprop."),
        tutorial(DEEPER, "10_errors", "Where a ResNet's errors are, when a wrong answer is shown."),
    ),
    "Equilibrium propagation": (
        tutorial(EQUILIBRIUM, "5_free_phase", "Weak feedback settles faster."),
        tutorial(EQUILIBRIUM, "5_process", "The states of the second phase move as the errors of backprop do."),
        tutorial(EQUILIBRIUM, "5_orders", "More nudges on a circle: the error falls geometrically."),
    ),
    "Generate, complete, remember": (
        tutorial(GENERATION, "6_completion", "A decoder that never saw a label restores missing pixels."),
        tutorial(GENERATION, "6_generation", "Images drawn from noise, and images of labels."),
        tutorial(MEMORY, "7_memory", "Half of a digit brings back the whole."),
        tutorial(DIRECTIONS, "8_two_directions", "The network that classifies also draws the classes."),
        tutorial(DRAWS, "9_posterior", "Draws of two latent values, and their exact distribution."),
        tutorial(DRAWS, "9_digits", "Several digits that one half may belong to."),
    ),
    "Measured": (
        benchmark("solvers", "Steps and time to rest, against depth.", "solvers"),
        benchmark("papers_a", "Millidge et al. 2022, repeated: smaller nudges, nearer gradients.", "papers_a"),
        benchmark("papers_c", "Rosenbaum 2022, repeated: the test error of each algorithm, and its time.", "papers_c"),
        benchmark("growth", "Time against width, depth, batch and steps.", "growth"),
    ),
}


def filled(markdown: str, places: Collection[str], repository: str) -> str:
    """The page with its pictures, as far as the site has them."""
    return markdown.replace(MARK, _sections(places, repository)) if MARK in markdown else markdown


def _sections(places: Collection[str], repository: str) -> str:
    parts = []
    for title, pictures in SECTIONS.items():
        parts.append(f"## {title}")
        for picture in pictures:
            parts += [f"![{picture.line}]({picture.place})"] if picture.place in places else []
            absent = "" if picture.place in places else " (Not drawn in this build.)"
            parts.append(f"{picture.line} {_code(picture.source, places, repository)}{absent}")
    return "\n\n".join(parts)


def _code(source: str, places: Collection[str], repository: str) -> str:
    page = source.removesuffix(".py") + ".md"
    address = page if page in places else f"{repository}/blob/main/{source}"
    return f"By [`{source}`]({address})."
