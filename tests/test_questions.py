"""Ten questions of an engineer, of a researcher who knows JPC, and of a teacher: where the site answers each.

An answer stands within two clicks of the home page, under its heading. A click is a link in a text, a tab, or an entry
of the open section beside the text.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from posixpath import dirname, join, normpath
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)")
FENCED = re.compile(r"^```.*?^```", re.M | re.S)
HOME = "index.md"
SCRIPTS = [path.name for path in (ROOT / "tutorials").glob("*.py")]

# the question, the page that answers it, the heading above the answer (none: before the first one), and a part of it
ENGINEER = [
    ("How do I install it, without CUDA?", "start.md", "Install", "https://download.pytorch.org/whl/cpu"),
    ("Which lines of my loop change?", "index.md", "", "+ optimizer = torch2ebm.EnergyOptimizer("),
    ("Can a ResNet be converted?", "supported.md", "Families of models", "| ResNet-18 | 38 |"),
    ("How much slower is it?", "choose.md", "What was measured", "*time* is its training time over that of backprop"),
    ("Does it work with mixed precision?", "mixed_precision.md", "", "with torch.autocast("),
    ("Does it work with DDP?", "distributed.md", "", "wrapper = nn.parallel.DistributedDataParallel(model)"),
    ("What does a checkpoint hold?", "optimizers.md", "Checkpoints", "`optimizer.state_dict()` has"),
    ("My energy rises. What do I do?", "choose.md", "It does not learn: symptom, cause, remedy", "the energy rises |"),
    ("How do I log to TensorBoard or W&B?", "watching.md", "TensorBoard and W&B", "Several(TensorBoard("),
    ("How do I get backprop back?", "start.md", "Your own model", "`optimizer.detach()` ends it"),
]
RESEARCHER = [
    ("What is make_pc_step here?", "from_jpc.md", "", "| `make_pc_step(model, optim, ...)` |"),
    ("How does my step size translate?", "from_jpc.md", "", "`0.5` for 64 samples is `0.5 / 64` here"),
    ("How do I train with muPC?", "from_jpc.md", "`mupc`", "self.scale = nn.Linear("),
    ("Where is the ODE solver?", "inference.md", "Solvers", "| `ODEFlow(duration, rtol, atol, method)` |"),
    ("Is there the theoretical energy of linear nets?", "analysis.md", "Closed forms", "LinearGaussian("),
    ("Can I have the Hessian?", "analysis.md", "The Hessian", "`model.hessian(loss_fn, batch)`"),
    ("Is a value before or behind the activation?", "nodes.md", "", '| `"preactivation"` |'),
    ("How do I write a solver?", "extending.md", "A solver", "class "),
    ("Where is the equation, and what tests it?", "theory/index.md", "", "the test that holds the code to it"),
    ("What can JPC do that this cannot?", "from_jpc.md", "Where JPC is ahead", "Diffrax"),
]
TEACHER = [
    ("What is predictive coding?", "index.md", "", "predicts the value of the next layer"),
    ("How does it differ from backprop?", "index.md", "", "learns from the error that is left at its own place"),
    ("What may my students open without installing?", "index.md", "Tutorials", "open in Colab"),
    ("Does it need a GPU?", "index.md", "", "takes ten minutes, without a GPU"),
    ("How long does the first lesson run?", "../tutorials/1_first_network.py", "1. A first network", "than a minute"),
    ("What do the words mean?", "reference/glossary.md", "", "| nudge, `beta` |"),
    ("Is there a picture for my slides?", "gallery.md", "", "use them in talks and lessons"),
    ("What is local, and what is not?", "nodes.md", "What it changes", "**What is local.**"),
    ("Which papers do my students read?", "theory/index.md", "", "[arXiv 2206.02629]"),
    ("Which algorithms are there?", "choose.md", "Which algorithm?", "`EquilibriumPropagation(nudging)`"),
]


def text_of(page: str) -> str:
    path = DOCS / page
    text = path.read_text(encoding="utf-8")
    return re.sub(r"^# ?", "", text, flags=re.M) if path.suffix == ".py" else text


def links(page: str) -> set[str]:
    """The pages to which the text of a page leads, from the folder of the documents."""
    text = FENCED.sub("", text_of(page))
    return {normpath(join(dirname(page), target)) for target in LINK.findall(text)}


def leaves(entry: Any) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
        return
    for child in entry.values() if isinstance(entry, dict) else entry:
        yield from leaves(child)


def sections() -> list[list[str]]:
    """Each tab with its pages; the tutorials are added as website/hooks.py does."""
    navigation = re.split(r"^nav:", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), flags=re.M)[1]
    found = []
    for entry in yaml.safe_load(navigation):
        ((title, children),) = entry.items()
        tutorials = [f"../tutorials/{name}" for name in sorted(SCRIPTS, key=lambda name: int(name.split("_")[0]))]
        found.append(tutorials if title == "Tutorials" else [*leaves(children)])
    return found


def clicks() -> dict[str, int]:
    """How many clicks each page is from the home page, two at most."""
    tabs = sections()
    reached = {HOME: 0}
    for distance in (1, 2):
        for page in [page for page, before in reached.items() if before == distance - 1]:
            if not (DOCS / page).exists():  # made from a file at the root: leads nowhere that counts
                continue
            beside = {other for tab in tabs if page in tab for other in tab}
            for target in links(page) | beside | {tab[0] for tab in tabs}:
                reached.setdefault(target, distance)
    return reached


def answer(page: str, heading: str) -> str:
    """What stands under a heading, up to the next one of its level; without one, before the first of the second."""
    text = text_of(page)
    if not heading:
        return re.split(r"^## ", text, maxsplit=1, flags=re.M)[0]
    found = re.search(rf"^(#+) {re.escape(heading)}\n(.*?)(?=^#{{1,6}} |\Z)", text, re.M | re.S)
    assert found is not None, f"{page} has no heading {heading}"
    level = len(found[1])
    return re.split(rf"^#{{1,{level}}} ", text[found.start(2) :], maxsplit=1, flags=re.M)[0]


QUESTIONS = [*ENGINEER, *RESEARCHER, *TEACHER]


def test_there_are_ten_of_each() -> None:
    assert [len({question for question, *_ in asked}) for asked in (ENGINEER, RESEARCHER, TEACHER)] == [10, 10, 10]


@pytest.mark.parametrize(("question", "page", "heading", "part"), QUESTIONS, ids=[row[0] for row in QUESTIONS])
def test_the_answer_is_within_two_clicks(question: str, page: str, heading: str, part: str) -> None:
    assert clicks().get(page, 9) <= 2
    assert part in answer(page, heading)


def test_what_is_not_linked_is_not_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative twin: without the navigation a page that only others name is too far."""
    everything = clicks()
    assert everything["theory/e.md"] == 2 and everything["choose.md"] == 1
    monkeypatch.setitem(globals(), "sections", lambda: [[HOME]])
    alone = clicks()
    assert alone["choose.md"] == 1 and alone["nodes.md"] == 1
    assert "reference/cli.md" in everything and "reference/cli.md" not in alone


def test_the_home_page_names_no_more_than_it_says() -> None:
    """Ten lines and one picture stand above the first heading; words that nobody knows yet are explained there."""
    above = answer(HOME, "")
    assert above.count("![") == 1
    told = re.split(r"^```diff", above, flags=re.M)[0]
    assert len([line for line in told.splitlines() if line.strip()]) <= 10
    for word in ("*Predictive coding*", "*value*", "*energy*"):
        assert word in told
