"""Paths of pictures and pages: what is none, and what is in no folder, is refused before anything is drawn."""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torch2ebm
from torch2ebm.errors import ConfigurationError
from torch2ebm.reports import plots
from torch2ebm.reports.agreement import Agreement

EACH = {"0.weight": Agreement(1.0, 0.0, 0.0, 1.0, 1.0)}
COMPARED = torch2ebm.GradientComparison(("mine",), tuple(EACH), (), {"mine": EACH}, {"mine": EACH["0.weight"]})
RELAXATION = torch2ebm.Relaxation(node_energy={"a": (0.0, 1.0)})


@cache
def model() -> torch2ebm.EnergyModel:
    return torch2ebm.convert(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)), example_inputs=torch.zeros(4, 2))


PLOTS: dict[str, tuple[str, Callable[..., object]]] = {
    "plot_energy": (".png", lambda path, **own: plots.plot_energy({"a": (2.0, 1.0)}, path, **own)),
    "plot_error_map": (".svg", lambda path, **own: plots.plot_error_map(RELAXATION, path, **own)),
    "plot": (".svg", lambda path, **own: COMPARED.plot(path, **own)),
}
WRITERS: dict[str, tuple[str, Callable[..., object]]] = {
    **PLOTS,
    "model.draw": (".png", lambda path: model().draw(path)),
    "model.draw as text": (".dot", lambda path: model().draw(path)),
    "to_html": (".html", lambda path: COMPARED.to_html(path)),
    "to_html of a run": (".html", lambda path: torch2ebm.Report("Net", "", RELAXATION, page="text").to_html(path)),
}


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.svg").mkdir()
    (tmp_path / "file").write_text("mine")


class BytesPath(os.PathLike[bytes]):
    def __fspath__(self) -> bytes:
        return b"a.svg"


@pytest.mark.parametrize("wrong", [3, True, 1.5, b"a.svg", "", ["a.svg"], BytesPath(), "a\0.svg", "folder.svg"])
@pytest.mark.parametrize("name", WRITERS)
def test_what_is_no_path_of_a_file_is_refused(name: str, wrong: Any, tmp_path: Path) -> None:
    place = name.split(" ")[0]
    with pytest.raises(ConfigurationError, match=rf"^{place}\(path=...\): got .*; expected the path of a file"):
        WRITERS[name][1](wrong)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "folder.svg"]


@pytest.mark.parametrize("folder", ["nodir", "file", "nodir/more"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_folder_that_does_not_exist_is_told_and_not_made(name: str, folder: str, tmp_path: Path) -> None:
    suffix, write = WRITERS[name]
    for path in (f"{folder}/a{suffix}", tmp_path / folder / f"a{suffix}"):
        with pytest.raises(ConfigurationError, match=r"in no folder that exists.*mkdir\(parents=True\)"):
            write(path)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "folder.svg"]


@pytest.mark.parametrize("name", WRITERS)
def test_a_path_without_a_folder_and_one_in_a_folder_are_written(name: str, tmp_path: Path) -> None:
    suffix, write = WRITERS[name]
    for path in (f"a{suffix}", Path("folder.svg", f"b{suffix}"), str(tmp_path / f"c{suffix}")):
        write(path)
        assert Path(path).stat().st_size > 0


@pytest.mark.parametrize("path", [3, "nodir/a.png", "a.nix", "a"])
@pytest.mark.parametrize("name", PLOTS)
def test_axes_are_left_alone_where_the_path_is_refused(name: str, path: Any) -> None:
    from matplotlib.figure import Figure

    axes = Figure().subplots(2)
    with pytest.raises(ConfigurationError, match=rf"^{name}\(path=...\)"):
        PLOTS[name][1](path, ax=list(axes) if name == "plot" else axes[0])
    assert not any(each.has_data() for each in axes)
