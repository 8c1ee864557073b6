"""An integration test stays at home: it reaches no network, and writes in its own folder alone."""

import os
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from helpers import forget_accelerator

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Guard:
    """Listens to what Python opens; an audit hook cannot be taken away, hence the folder that switches it."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.seen: list[str] = []

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event == "socket.connect":
            self.refuse(f"connect to {arguments[1]}")
        if event == "open" and isinstance(arguments[0], (str, bytes)) and arguments[2] & WRITING:
            path = Path(os.fsdecode(arguments[0])).absolute()
            if not path.is_relative_to(self.folder) and "__pycache__" not in path.parts and path != Path(os.devnull):
                self.refuse(f"write {path}")

    def refuse(self, what: str) -> None:
        self.seen.append(what)
        raise PermissionError(f"an integration test may not {what}")


GUARD = Guard()
sys.addaudithook(GUARD)


@pytest.fixture(autouse=True)
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Refused at once, and told here too, since libraries swallow the error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    generators = random.getstate(), numpy.random.get_state()
    GUARD.folder, GUARD.seen = tmp_path, []
    with torch.random.fork_rng(devices=[]):  # trainers seed every generator that there is
        yield
    GUARD.folder = None
    random.setstate(generators[0])
    numpy.random.set_state(generators[1])
    forget_accelerator()
    assert GUARD.seen == []
