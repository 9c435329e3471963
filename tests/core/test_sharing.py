"""Whether anyone shares a tensor's memory."""

from __future__ import annotations

import subprocess
import sys
from unittest import mock

import pytest
import torch
from torch._subclasses import FakeTensorMode

from undiffuse.core import sharing
from undiffuse.core.sharing import alone

pytestmark = pytest.mark.skipif(sharing._ALONE is None, reason="this torch does not tell who holds a storage")

HOLDERS = {
    "a view": lambda x: x.view(-1),
    "a slice": lambda x: x[1:],
    "detached": lambda x: x.detach(),
    "data": lambda x: x.data,
    "a row of many": lambda x: x.unbind()[0],
    "numpy": lambda x: x.numpy(),
    "its storage": lambda x: x.untyped_storage(),
    "its typed storage": lambda x: x.storage(),
    "dlpack, of a view": lambda x: torch.utils.dlpack.to_dlpack(x.view(-1)),
    "a graph": lambda x: x.view(-1).requires_grad_().exp().square(),
}


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
def test_a_tensor_is_alone_while_no_other_has_its_memory(hold):
    x = torch.randn(3, 4)
    assert alone(x)
    held = hold(x)
    assert not alone(x)
    del held
    assert alone(x)
    other = hold(x.clone())
    assert alone(x), other


def test_what_other_processes_may_see_is_not_alone():
    assert not alone(torch.ones(2).share_memory_())


def test_asking_needs_no_default_device():
    code = "import torch; torch.set_default_device('meta'); import undiffuse.core.sharing as s; print(s._PROBE.device)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "cpu"


def test_what_is_no_plain_tensor_is_not_alone():
    assert not alone(torch.nn.Parameter(torch.ones(2)))
    with FakeTensorMode():
        assert not alone(torch.ones(2))
    found = []
    torch.func.vmap(lambda x: found.append(alone(x)) or x)(torch.ones(2, 3))
    torch.func.grad(lambda x: found.append(alone(x)) or x.sum())(torch.ones(2))
    assert found == [False, False]


def test_where_torch_cannot_tell_nothing_is_alone():
    with mock.patch.object(sharing, "_ALONE", None):
        assert not alone(torch.ones(2))
