"""The commands on a run of an energy."""

import pytest

from cli.conftest import npz
from recipes.test_energies import PERSISTENT, TINY

CHAINS = ["sampling.solver={name: mala, step_size: 0.01}", "sampling.initial={name: uniform, scale: 2.0}"]
FEW = ["sampling.n=20", "evaluation.n=30", "evaluation.metrics=[sliced-wasserstein]"]
WORDS = [*TINY, PERSISTENT, *CHAINS, *FEW]


@pytest.fixture
def trained(command):
    done = command("train", "ebm-ring", *WORDS, "training.sample_every=2", "--run", "run")
    assert done.exit_code == 0, done.stderr


def test_from_training_to_the_page(command, trained, tmp_path):
    assert (tmp_path / "run/samples/step-0000002.png").stat().st_size > 300
    drawn = command("sample", "run", "--seeds", "0-9", "--json")
    assert drawn.exit_code == 0, drawn.stderr
    said = drawn.json()
    assert (said["solver"]["name"], said["nfe"], said["grid"]) == ("mala", 4, "none")
    assert said["initial"] == {"name": "uniform", "scale": 2.0}
    assert npz(tmp_path / said["out"])["samples"].shape == (10, 2)
    other = command("sample", "run", "--seeds", "0-9", "--solver", "langevin:step_size=0.01", "--steps", 7, "--json")
    assert other.json()["nfe"] == 7
    assert other.json()["out"] != said["out"]
    measured = command("evaluate", "run", "--json")
    assert measured.exit_code == 0, measured.stderr
    protocol = measured.json()["results"][0]["protocol"]
    assert protocol["path"] == "chains from FromNoise(initial='uniform', scale=2.0)"
    assert protocol["solver"].startswith("mala(step_size=0.01")
    page = command("report", "run", "--json")
    assert page.exit_code == 0, page.stderr
    text = (tmp_path / "run/report.html").read_text()
    assert "step 3" in text
    assert "sliced-wasserstein" in text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--grid", "time"], "no grid of times"),
        (["--solver", "heun"], "unknown kernel 'heun'"),
        (["--solver", "mala:step=1"], "Did you mean '--solver.step_size'?"),
        (["--label", "3"], "label 3: this model knows none"),
    ],
)
def test_what_makes_no_sense_for_an_energy(command, trained, words, says):
    done = command("sample", "run", *words)
    assert done.exit_code == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
