"""The figures of the Score SDE chapter are redrawn, and what they show is so.

As in test_03.py: figures of merit of the scripts, fixed seeds, smaller budgets than the scripts' own.
"""

import pytest

from examples.test_03 import FIGURES, drawn, example

__all__ = ["example"]  # a fixture


@pytest.mark.parametrize("name", ["04_predictor_corrector", "04_sde"])
def test_the_chapter_has_its_pictures(name):
    drawn(FIGURES, name)


def test_three_processes_have_one_density_and_two_of_them_one_joint_law(example, tmp_path):
    """Correlations of 2000 paths: a standard error of 0.02 where 0.4 is true."""
    value = example("04_sde").main(tmp_path)
    drawn(tmp_path, "04_sde")
    for name in ("forward", "reverse", "PF-ODE"):
        assert value[f"Fokker-Planck residual, {name}"] < 1e-11
    assert value["residual of modes 1 % too wide, mean"] > 1e-3
    assert value["reverse: energy distance / 99 % of null"] < 1
    assert value["PF-ODE: energy distance / 99 % of null"] < 1
    true = value["correlation of the ends, closed form"]
    assert value["correlation of the ends, forward"] == pytest.approx(true, abs=0.06)
    assert value["correlation of the ends, reverse"] == pytest.approx(true, abs=0.06)
    assert value["correlation of the ends, PF-ODE"] > 0.9


def test_correctors_alone_are_worst_and_mend_a_poor_predictor(example, tmp_path):
    """Widths of modes, of 200 x 64 numbers: a standard error of 0.6 %."""
    value = example("04_predictor_corrector").main(tmp_path, n=200, steps=50)
    drawn(tmp_path, "04_predictor_corrector")
    assert (tmp_path / "04_predictor_corrector.md").read_text().count("\n") == 6
    assert value["the law itself"] == pytest.approx(1, abs=0.02)

    def error(path, predictor, column):
        return abs(value[f"{path}, {predictor}, {column}"] - 1)

    for path in ("VE", "VP"):
        assert error(path, "none", "C100") > 3
        assert all(
            error(path, p, c) < 0.6 for p in ("ancestral sampling", "reverse diffusion") for c in ("P100", "PC50")
        )
        # At equal cost, where the predictor leaves much to mend.
        assert error(path, "probability flow", "PC50") < 0.7 * error(path, "probability flow", "P100")
        assert error(path, "probability flow", "P100") < 0.7 * error(path, "probability flow", "P50")
    widths = [value[f"VE, probability flow, PC50, snr {snr}"] for snr in (0.03, 0.06, 0.1, 0.16)]
    assert widths == sorted(widths, reverse=True)
    assert error("VE", "none", "C1000") < 0.1
