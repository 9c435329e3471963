"""`undiffuse likelihood`: bits of a data set, the same however it is cut, and every refusal."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import undiffuse as ud
from undiffuse.inference import dequantise

FAST = ["--tolerance", "1e-2", "--samples", 6, "--json", "--quiet"]


def rows_of(record: dict) -> dict[str, np.ndarray]:
    files = sorted(Path(record["rows"]).glob("part-*.npz"))
    columns = {"rows": [], "nats": [], "nfe": []}
    for file in files:
        with np.load(file) as arrays:
            for name, column in columns.items():
                column.append(arrays[name])
    return {name: np.concatenate(column) for name, column in columns.items()}


@pytest.fixture
def run(image_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(image_run.folder, folder)
    return folder


def test_its_figures_are_those_of_the_library(run, command):
    result = command("likelihood", run, *FAST, "--divergence", "hutch++", "--probes", 2)
    assert result.exit_code == 0, result.stderr
    record = result.json()
    found = rows_of(record)
    assert found["rows"].tolist() == list(range(6))
    loaded = ud.load_run(run)
    x, labels = loaded.recipe.data("held-out").batch(torch.arange(6))
    for row in (0, 4):
        own = ud.Streams.of(0, 1, first=row)
        v = dequantise(x[row : row + 1].double(), own.fold("noise"), levels=17)
        rule = ud.inference.HutchPP(2)
        told = ud.log_likelihood(
            loaded.denoiser(), v, divergence=rule, rtol=1e-2, atol=1e-2, seed=own.fold("divergence"),
            cond=labels[row : row + 1],
        )  # fmt: skip
        assert float(told.nats) == pytest.approx(found["nats"][row], abs=1e-2)
    bits = -found["nats"] / (64 * np.log(2)) + np.log2(17 / 2)
    assert record["bits_per_dim"] == pytest.approx(bits.mean(), rel=1e-12)
    assert record["bits_per_dim_error"] == pytest.approx(bits.std(ddof=1) / 6**0.5, rel=1e-12)
    assert record["nats"] == pytest.approx(found["nats"].mean(), rel=1e-12)
    assert (record["levels"], record["split"], record["n"]) == (17, "held-out", 6)
    assert json.loads((run / "likelihood.jsonl").read_text())["nats"] == record["nats"]


def test_what_is_there_is_kept_and_what_is_broken_is_made_again(run, command, monkeypatch):
    monkeypatch.setattr("undiffuse.cli.measuring_likelihood.PART", 2)
    record = command("likelihood", run, *FAST).json()
    before, folder = rows_of(record), ud.load_run(run).folder / "likelihood"
    files = sorted(folder.rglob("part-*.npz"))
    assert len(files) == 3
    kept = files[0].stat().st_mtime_ns
    files[1].unlink()
    files[2].write_bytes(files[2].read_bytes()[:-40])
    again = command("likelihood", run, *FAST).json()
    assert files[0].stat().st_mtime_ns == kept
    for name, column in rows_of(again).items():
        assert np.array_equal(column, before[name])


def test_two_processes_find_what_one_finds(run, command, process):
    job = process("likelihood", run, *FAST, processes=2)
    out, error = job.communicate(timeout=600)
    assert job.returncode == 0, error
    shared = rows_of(json.loads(out))
    shutil.rmtree(run / "likelihood")
    alone = rows_of(command("likelihood", run, *FAST).json())
    assert np.array_equal(shared["rows"], alone["rows"])
    assert np.allclose(shared["nats"], alone["nats"], atol=1e-3)


def test_noise_is_learned_or_left_out(run, command):
    learned = command("likelihood", run, *FAST, "--dequantise", "variational").json()
    assert learned["levels"] == 17
    plain = command("likelihood", run, *FAST, "--dequantise", "none").json()
    assert "bits_per_dim" not in plain


def test_points_have_nats_only(plane_run, command):
    record = command("likelihood", plane_run.folder, *FAST).json()
    assert "bits_per_dim" not in record
    assert record["dequantisation"] == "none"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--dequantise", "unifrm"], "expected uniform, variational, none"),
        (["--divergence", "hutch"], "Did you mean"),
        (["--probes", "0"], "probes is 0"),
        (["--n", "0"], "expected at least one row"),
        (["--batch-size", "-5"], "expected at least one"),
        (["--tolerance", "0"], "one of them above"),
        (["held-ot"], "held-ot"),
    ],
)
def test_wrong_words_are_explained(run, command, words, says):
    result = command("likelihood", run, *words, "--quiet")
    assert result.exit_code not in (0, 70)
    assert says in result.stderr


def test_one_row_has_no_error_and_a_folder_of_a_split_s_name_does_not_hide_it(run, command, tmp_path):
    (tmp_path / "held-out").mkdir()
    result = command("likelihood", run, "--tolerance", "1e-2", "--samples", 1, "--json")
    assert result.exit_code == 0, result.stderr
    assert result.json()["nats_error"] is None
    text = command("likelihood", run, "--tolerance", "1e-2", "--samples", 1).stdout
    assert text.count("±") == 1  # in the head of the table
