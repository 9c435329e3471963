"""Errors name what was given, the nearest known name, and the extra that is missing."""

import pytest

from undiffuse.core import errors
from undiffuse.core.errors import ArgumentError, MissingExtraError, UndiffuseError, choose, nearest, require

SOLVERS = {"euler": 1, "heun": 2, "ddim": 3}


def test_choose_returns_the_entry():
    assert choose("heun", SOLVERS, "solver") == 2


def test_choose_offers_the_nearest_and_lists_all_in_order():
    with pytest.raises(ArgumentError) as refusal:
        choose("huen", SOLVERS, "solver")
    assert str(refusal.value) == "unknown solver 'huen'. Did you mean 'heun'? Known: ddim, euler, heun."


def test_choose_offers_nothing_where_nothing_is_near():
    with pytest.raises(ArgumentError) as refusal:
        choose("picard", SOLVERS, "solver")
    assert str(refusal.value) == "unknown solver 'picard'. Known: ddim, euler, heun."
    assert nearest("zzz", SOLVERS) == ""
    assert nearest("eular", SOLVERS) == " Did you mean 'euler'?"


def test_every_error_is_ours_and_tells_the_command_how_to_exit():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    codes = {kind.__name__: kind.exit_code for kind in kinds if issubclass(kind, UndiffuseError)}
    assert codes == {
        "UndiffuseError": 1,
        "ArgumentError": 2,
        "RecipeError": 2,
        "DataError": 3,
        "RunError": 4,
        "CheckpointError": 4,
        "TrainingError": 5,
        "SamplingError": 5,
        "MissingExtraError": 6,
    }


def test_errors_are_caught_by_the_builtin_that_a_caller_expects():
    with pytest.raises(ValueError, match="unknown"):
        choose("x", SOLVERS, "solver")
    assert issubclass(errors.DataError, ValueError)
    assert issubclass(MissingExtraError, ImportError)


def test_require_imports_or_names_the_extra():
    assert require("math", "data").sqrt(4.0) == 2.0
    with pytest.raises(MissingExtraError) as refusal:
        require("absent_package.part", "tracking")
    assert str(refusal.value) == "this needs the package 'absent_package': pip install 'undiffuse[tracking]'"


def test_require_does_not_blame_a_package_that_is_there_for_what_it_lacks(tmp_path, monkeypatch):
    (tmp_path / "present_package.py").write_text("import absent_inside\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="absent_inside") as refusal:
        require("present_package", "tracking")
    assert not isinstance(refusal.value, MissingExtraError)
