"""Features: batches, identity, and a TorchScript file that is opened only under its own checksum."""

import hashlib

import pytest
import torch

from undiffuse.core.errors import ArgumentError, DataError
from undiffuse.metrics import Features, as_bytes_rgb, torchscript_features, weights_hash


class Projection(torch.nn.Module):
    """A stand-in for a feature network: a matrix, and a switch that its call understands."""

    def __init__(self, scale: float = 1.0):
        super().__init__()
        weight = torch.arange(24, dtype=torch.float32).reshape(12, 2)
        self.weight = torch.nn.Parameter(weight * scale)

    def forward(self, x, double: bool = False):
        rows = x.to(torch.float32).flatten(1) @ self.weight
        return 2.0 * rows if double else rows


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "tiny.pt"
    torch.jit.script(Projection().eval()).save(str(path))
    return path


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def images(n, channels=3, seed=0):
    return torch.rand(n, channels, 2, 2, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("batch", [1, 3, 10, 64])
def test_batches_give_what_all_rows_at_once_give(batch):
    x, seen = images(10), []

    def function(rows):
        seen.append(len(rows))
        return rows.flatten(1) * 2

    found = Features(function, "double", batch=batch)(x)
    assert torch.equal(found, x.flatten(1) * 2)
    assert sum(seen) == 10
    assert max(seen) == min(batch, 10)


def test_features_carry_no_graph_and_report_progress():
    calls = []
    found = Features.of(Projection().eval(), "tiny")(images(70), lambda *call: calls.append(call))
    assert not found.requires_grad
    assert calls == [("features tiny", 64, 70), ("features tiny", 70, 70)]


def test_a_module_is_known_by_its_weights():
    one, same, other = Projection().eval(), Projection().eval(), Projection(1.0001).eval()
    assert weights_hash(one) == weights_hash(same) == Features.of(one).hash
    assert weights_hash(one) != weights_hash(other)
    half = Projection().to(torch.bfloat16).eval()
    assert len(weights_hash(half)) == 64
    assert weights_hash(half) != weights_hash(one)


def test_a_module_in_training_mode_is_refused():
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout()).train()
    with pytest.raises(ArgumentError, match=r"training mode.*eval"):
        Features.of(net)


def test_a_callable_without_weights_has_a_name_and_no_hash():
    found = Features.of(lambda x: x.flatten(1), "flat")
    assert (found.name, found.hash) == ("flat", "unhashed")
    assert Features.of(found) is found


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x, r"are \(4, 3, 2, 2\): expected a tensor \(4, d\)"),
        (lambda x: x.flatten(1)[:-1], r"are \(3, 12\)"),
        (lambda x: x.flatten(1).argsort(), "int64"),
        (lambda x: [x.flatten(1)], "are list"),
    ],
)
def test_features_of_a_wrong_form_are_refused(function, message):
    with pytest.raises(ArgumentError, match=message):
        Features(function, "wrong")(images(4))


def test_an_empty_set_has_no_features():
    with pytest.raises(ArgumentError, match="empty set"):
        Features(lambda x: x.flatten(1), "flat")(images(0))


def test_an_archive_with_its_checksum_is_loaded_and_known_by_it(archive):
    found = torchscript_features(archive, sha256(archive).upper())
    assert (found.name, found.hash) == ("tiny", sha256(archive))
    x = images(5)
    torch.testing.assert_close(found(x), Projection()(x).detach())
    doubled = torchscript_features(archive, sha256(archive), options={"double": True})
    torch.testing.assert_close(doubled(x), 2 * found(x))


def test_preparation_is_part_of_the_name(archive):
    found = torchscript_features(archive, sha256(archive), prepare=as_bytes_rgb)
    assert found.name == "tiny(as_bytes_rgb)"
    x = images(5, channels=1)
    torch.testing.assert_close(found(x), Projection()(as_bytes_rgb(x)).detach())


def flip_a_bit(content):
    return content[:100] + bytes([content[100] ^ 1]) + content[101:]


@pytest.mark.parametrize("alter", [flip_a_bit, lambda c: c[:-1], lambda c: c + b"\0", lambda c: b""])
def test_an_altered_archive_is_never_opened(archive, alter, monkeypatch):
    wanted = sha256(archive)
    archive.write_bytes(alter(archive.read_bytes()))

    def opened(*_args, **_options):
        pytest.fail("the file was opened before its checksum was compared")

    monkeypatch.setattr(torch.jit, "load", opened)
    with pytest.raises(DataError, match=f"has sha256 {sha256(archive)}, you stated {wanted}"):
        torchscript_features(archive, wanted)


def test_what_is_loaded_is_what_was_hashed_even_if_the_file_changes_in_between(archive, tmp_path, monkeypatch):
    wanted, load = sha256(archive), torch.jit.load

    def replaced_meanwhile(source, **options):
        torch.jit.script(Projection(100.0).eval()).save(str(archive))
        return load(source, **options)

    monkeypatch.setattr(torch.jit, "load", replaced_meanwhile)
    x = images(3)
    torch.testing.assert_close(torchscript_features(archive, wanted)(x), Projection()(x).detach())
    assert sha256(archive) != wanted


def test_a_file_that_is_no_archive_or_not_there_is_named(tmp_path):
    text = tmp_path / "weights.pt"
    text.write_text("not TorchScript")
    with pytest.raises(DataError, match=r"weights\.pt is not a TorchScript archive"):
        torchscript_features(text, sha256(text))
    with pytest.raises(DataError, match=r"absent\.pt cannot be read: No such file"):
        torchscript_features(tmp_path / "absent.pt", "0" * 64)


def test_a_pickle_is_not_executed_even_under_its_own_checksum(tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    path = tmp_path / "evil.pt"
    torch.save(Payload(), path)
    with pytest.raises(DataError, match="not a TorchScript archive"):
        torchscript_features(path, sha256(path))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("text", ["", "abc", "0" * 63, "g" * 64, "md5:" + "0" * 60])
def test_a_checksum_that_is_none_is_refused(archive, text):
    with pytest.raises(ArgumentError, match="64 hexadecimal digits"):
        torchscript_features(archive, text)


def test_bytes_are_those_of_a_saved_image():
    levels = torch.arange(256, dtype=torch.float32)
    x = (levels / 127.5 - 1).reshape(1, 1, 16, 16)
    found = as_bytes_rgb(x)
    assert found.shape == (1, 3, 16, 16)
    for channel in range(3):
        assert torch.equal(found[0, channel].flatten().float(), levels)
    assert as_bytes_rgb(torch.full((1, 3, 1, 1), 1.7)).unique().item() == 255
    assert as_bytes_rgb(torch.full((1, 3, 1, 1), -1.7)).unique().item() == 0
    with pytest.raises(ArgumentError, match="1 or 3"):
        as_bytes_rgb(torch.zeros(1, 4, 2, 2))
