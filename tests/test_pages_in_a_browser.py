"""The HTML pages in a real browser: both widths, light and dark; what the slider shows; play; tables that sort."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from browser import WIDTHS, Opened, browser, opened
from torch import nn

import torch2ebm

pytestmark = pytest.mark.slow
EVIL = '"</script><b>'
STEPS = 8


@dataclass
class Pages:
    """Files of pages, and what they were made of."""

    folder: Path
    relaxation: torch2ebm.Relaxation
    comparison: torch2ebm.GradientComparison

    def address(self, name: str) -> str:
        return (self.folder / f"{name}.html").as_uri()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def pages(chromium: Any, tmp_path_factory: pytest.TempPathFactory) -> Pages:  # which skips before anything relaxes
    """A small run and a comparison, a run of 300 nodes, one of 1000 steps, and one whose names are hostile."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pages")
    batch = torch.randn(6, 4).double(), torch.tensor([0, 1, 2, 0, 1, 2])

    def run(name: str, net: nn.Module, algorithm: torch2ebm.Algorithm) -> torch2ebm.Report:
        model = torch2ebm.convert(net.double())
        model.attach(algorithm)
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        measured = (F.cross_entropy, batch) if name != "large" else ()
        report = torch2ebm.report(model, *measured)
        report.to_html(folder / f"{name}.html")
        return report

    small = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    relaxation = run("run", small, torch2ebm.PredictiveCoding(steps=STEPS, lr=0.2)).relaxation
    run("exact", small, torch2ebm.ZeroDivergence())
    deep = nn.Sequential(*(part for _ in range(299) for part in (nn.Linear(4, 4), nn.Tanh())), nn.Linear(4, 3))
    run("large", deep, torch2ebm.PredictiveCoding(steps=10, lr=0.1))
    run("long", small, torch2ebm.PredictiveCoding(steps=1000, lr=0.1))
    hostile = nn.Sequential()
    for name, part in ((EVIL, nn.Linear(4, 5)), ("tanh", nn.Tanh()), ("<img src=x>", nn.Linear(5, 3))):
        hostile.add_module(name, part)
    run("hostile", hostile, torch2ebm.PredictiveCoding(steps=3, lr=0.2))
    named = {"exact": torch2ebm.ZeroDivergence("levels"), "slow": torch2ebm.PredictiveCoding(steps=5, lr=0.2)}
    comparison = torch2ebm.compare(small, F.cross_entropy, batch, named, steps=[1, 2, 4])
    comparison.to_html(folder / "comparison.html")
    return Pages(folder, relaxation, comparison)


def moved(found: Opened, step: int) -> None:
    """As a user does who drags the slider."""
    found.page.locator("#step").fill(str(step))


def boxes(found: Opened) -> dict[str, tuple[str, str, str]]:
    """Node, or the loss, to the number in its box, the colour of it, and the classes of the box."""
    read = """found => found.map(box => [".name", ".number"].map(part => box.querySelector(part).textContent).concat(
              [getComputedStyle(box.querySelector("rect")).fill, box.getAttribute("class")]))"""
    return {name: tuple(rest) for name, *rest in found.page.locator(".box[data-column]").evaluate_all(read)}


# ---- every page


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["run", "exact", "large", "long", "hostile", "comparison"])
def test_a_page_opens_without_an_error_and_fits(
    name: str, width: int, scheme: str, pages: Pages, chromium: Any
) -> None:
    with opened(chromium, pages.address(name), width, scheme) as found:
        assert found.page.locator("section").count() == 3
        assert found.errors == [] and found.requests == [] and found.failed == []
        assert found.overflow() <= 0
        read = "() => { const s = getComputedStyle(document.body); return [s.backgroundColor, s.color] }"
        colours = found.page.evaluate(read)
        lightness = [sum(map(int, re.findall(r"\d+", colour)[:3])) / 3 for colour in colours]
        assert lightness[0] > 200 > 100 > lightness[1] if scheme == "light" else lightness[0] < 60 < 180 < lightness[1]


def test_an_error_a_request_and_an_overflow_would_be_seen(tmp_path: Path, chromium: Any) -> None:
    """The negative twin."""
    page = '<!DOCTYPE html><p style="width: 3000px">a</p><img src="absent.png"><script>absent()</script>'
    (tmp_path / "page.html").write_text(page)
    with opened(chromium, (tmp_path / "page.html").as_uri(), 400) as found:
        assert any("absent is not defined" in error for error in found.errors)
        assert len(found.requests) == 1 and len(found.failed) == 1
        assert found.overflow() > 2000


def test_names_are_shown_as_they_are(pages: Pages, chromium: Any) -> None:
    with opened(chromium, pages.address("hostile")) as found:
        assert set(boxes(found)) == {EVIL, "loss"}
        assert found.page.locator("img, main b").count() == 0
        assert f"{EVIL}.weight" in found.page.locator("td:first-child").all_text_contents()


# ---- the slider


def test_numbers_and_colours_follow_the_slider(pages: Pages, chromium: Any) -> None:
    relaxation = pages.relaxation
    with opened(chromium, pages.address("run")) as found:
        colours: dict[int, dict[str, str]] = {}
        for step in (0, 1, 2, STEPS):
            moved(found, step)
            seen = boxes(found)
            expected = {name: column[step] for name, column in relaxation.node_energy.items()}
            expected["loss"] = relaxation.loss[step]
            assert seen.keys() == expected.keys()
            for name, energy in expected.items():
                assert float(seen[name][0]) == pytest.approx(energy, rel=6e-3), name  # three digits
                assert ("none" in seen[name][2].split()) == (energy == 0), name
            colours[step] = {name: colour for name, (_, colour, _) in seen.items()}
            assert found.page.locator("#where").text_content() == f"step {step} of {STEPS}"
            assert float(found.page.locator("#total").text_content()) == pytest.approx(
                relaxation.energy[step], rel=6e-3
            )
        # nothing has reached a layer at first: all have the one grey; later each has a colour of its energy
        assert len({colours[0][name] for name in relaxation.node_energy}) == 1
        assert all(colours[0][name] != colours[STEPS][name] for name in relaxation.node_energy)


def test_more_energy_is_lighter(pages: Pages, chromium: Any) -> None:
    """The scale goes from dark to light, and is the same at every step."""
    with opened(chromium, pages.address("run")) as found:
        pairs = []
        for step in range(1, STEPS + 1):
            moved(found, step)
            for number, colour, kind in boxes(found).values():
                if "none" not in kind.split():
                    red, green, blue = map(int, re.findall(r"\d+", colour)[:3])
                    pairs.append((float(number), 0.2126 * red + 0.7152 * green + 0.0722 * blue))
        pairs.sort()
        assert len(pairs) > 2 * STEPS and pairs[-1][1] - pairs[0][1] > 80
        assert all(later >= earlier - 2 for (_, earlier), (_, later) in pairwise(pairs))


def test_the_slider_is_moved_by_keys_and_says_where_it_is(pages: Pages, chromium: Any) -> None:
    with opened(chromium, pages.address("run")) as found:
        slider = found.page.locator("#step")
        found.page.keyboard.press("Tab")  # play
        found.page.keyboard.press("Tab")
        assert found.page.evaluate("() => document.activeElement.id") == "step"
        found.page.keyboard.press("Home")
        found.page.keyboard.press("ArrowRight")
        assert slider.input_value() == "1"
        assert str(slider.get_attribute("aria-valuetext")).startswith(f"step 1 of {STEPS}, energy ")


def test_the_mark_of_the_curve_follows(pages: Pages, chromium: Any) -> None:
    with opened(chromium, pages.address("run")) as found:
        places = []
        for step in range(STEPS + 1):
            moved(found, step)
            places.append(float(found.page.locator(".chart .mark").get_attribute("x1")))
        widths = [b - a for a, b in pairwise(places)]
        assert min(widths) > 10 and max(widths) - min(widths) < 0.01


def test_play_goes_from_the_start_to_the_end(pages: Pages, chromium: Any) -> None:
    with opened(chromium, pages.address("run")) as found:
        play = found.page.locator("#play")
        assert play.text_content() == "Play"
        play.click()
        assert play.text_content() == "Pause" and int(found.page.locator("#step").input_value()) < STEPS
        found.page.wait_for_function(f"() => document.getElementById('step').value === '{STEPS}'")
        found.page.wait_for_function("() => document.getElementById('play').textContent === 'Play'")
        play.click()
        play.click()  # a pause
        stands = found.page.locator("#step").input_value()
        found.page.wait_for_timeout(1500)
        assert found.page.locator("#step").input_value() == stands != str(STEPS)
        assert found.errors == []


def test_a_large_graph_is_seen_as_a_whole_and_near(pages: Pages, chromium: Any) -> None:
    with opened(chromium, pages.address("large"), 400) as found:
        height = "() => document.querySelector('.graph svg').getBoundingClientRect().height"
        frame = "() => document.querySelector('.graph').clientHeight"
        near = found.page.evaluate(height)
        found.page.locator("#whole").click()
        assert found.page.evaluate(height) <= found.page.evaluate(frame) < 800 < near
        whole = found.page.evaluate(height)
        found.page.locator("#larger").click()
        assert whole < found.page.evaluate(height) < near
        assert found.overflow() <= 0


def test_the_slider_of_a_long_relaxation_says_which_step_it_shows(pages: Pages, chromium: Any) -> None:
    with opened(chromium, pages.address("long")) as found:
        last = int(found.page.locator("#step").get_attribute("max"))
        moved(found, last // 2)
        where = found.page.locator("#where").text_content()
        assert last < 300 and re.fullmatch(r"step (4[5-9]\d|5\d\d) of 1000", where)


def test_without_a_relaxation_there_is_no_slider(pages: Pages, chromium: Any) -> None:
    with opened(chromium, pages.address("exact")) as found:
        assert found.page.locator("#step, #play, .chart").count() == 0
        assert all(float(number) > 0 and "none" not in kind for number, _, kind in boxes(found).values())


# ---- tables


def test_a_table_is_sorted_by_its_headers(pages: Pages, chromium: Any) -> None:
    compared = pages.comparison
    with opened(chromium, pages.address("comparison"), 400) as found:
        table = found.page.locator("table").nth(1)

        def column(place: int) -> list[str]:
            return list(table.locator(f"tbody td:nth-child({place})").all_text_contents())

        before = list(zip(column(1), column(2), strict=True))
        assert before == [(parameter, name) for parameter in compared.parameters for name in compared.algorithms]
        angle = table.locator("th").nth(2)
        for direction, sign in (("ascending", 1), ("descending", -1)):
            angle.locator("button").click()
            shown = [sign * float(text) for text in column(3)]
            assert shown == sorted(shown) and len(set(shown)) > 3
            assert angle.get_attribute("aria-sort") == direction
        table.locator("th").nth(3).locator("button").click()
        errors = [float(text) for text in column(4)]
        assert errors == sorted(errors) and max(error for error in errors if error < 1e-9) > 0  # 2e-16 before 0.1
        angle.locator("button").click()
        rows = set(zip(column(1), column(2), column(3), strict=True))
        assert rows == {
            (parameter, name, f"{compared.agreement[name][parameter].angle:.2f}") for parameter, name in before
        }
        found.page.keyboard.press("Shift+Tab")  # to the header beside it
        found.page.keyboard.press("Enter")
        assert column(2) == sorted(column(2)) and angle.get_attribute("aria-sort") is None
        assert found.errors == []


def test_bars_are_as_long_as_the_angles(pages: Pages, chromium: Any) -> None:
    with opened(chromium, pages.address("comparison")) as found:
        share = "bar.firstChild.getBoundingClientRect().width / bar.clientWidth"
        read = f"bars => bars.map(bar => [{share}, bar.nextSibling.textContent])"
        bars = found.page.locator(".bar").evaluate_all(read)
        assert len(bars) == 2 * len(pages.comparison.parameters) + 2
        assert any(share > 0.1 for share, _ in bars)
        for share, angle in bars:
            assert share == pytest.approx(min(float(angle) / 90, 1), abs=0.02)


def test_curves_are_drawn_anew_for_another_width(pages: Pages, chromium: Any) -> None:
    with opened(chromium, pages.address("comparison"), 1280) as found:
        width = "() => document.querySelector('.chart svg').viewBox.baseVal.width"
        wide = found.page.evaluate(width)
        found.page.set_viewport_size({"width": 400, "height": 800})
        found.page.wait_for_function(f"() => ({width})() < {wide} - 100")
        assert found.overflow() <= 0
        text = "() => getComputedStyle(document.querySelector('.chart text')).fontSize"
        assert found.page.evaluate(text) == "12px"  # one unit of the picture is a pixel: as readable as before
