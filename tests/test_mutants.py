"""The defects of ``make mutants`` can be put where they belong; whether tests notice them is that command's to say."""

import ast
from pathlib import Path

import pytest
from mutants import MUTANTS, Mutant

import torch2ebm

PACKAGE = Path(torch2ebm.__file__).parent
ROOT = Path(__file__).parents[1]


def test_there_are_enough_and_no_two_are_the_same() -> None:
    assert len(MUTANTS) >= 30
    assert len({mutant.name for mutant in MUTANTS}) == len({(m.file, m.old, m.new) for m in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_defect_changes_one_place_to_other_python(mutant: Mutant) -> None:
    text = (PACKAGE / mutant.file).read_text()
    changed = ast.dump(ast.parse(mutant.applied_to(text)))
    assert changed != ast.dump(ast.parse(text))


@pytest.mark.parametrize("argument", sorted({each for mutant in MUTANTS for each in mutant.arguments}))
def test_the_tests_that_have_to_notice_are_there(argument: str) -> None:
    file, _, test = argument.partition("::")
    assert f"\ndef {test}" in (ROOT / file).read_text()


def test_a_defect_whose_place_is_gone_is_an_error() -> None:
    gone, twice = (Mutant("no place", "engine/energies.py", old, "", "solvers") for old in ("no such text", "error"))
    for mutant in (gone, twice):
        with pytest.raises(ValueError, match="not once"):
            mutant.applied_to((PACKAGE / mutant.file).read_text())
