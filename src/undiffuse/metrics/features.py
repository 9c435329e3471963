"""Features: what a metric sees in place of pixels, with a name and a hash that go into the protocol."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path as FilePath

import torch
from jaxtyping import Float
from torch import Tensor, nn

from undiffuse.core.errors import ArgumentError, DataError
from undiffuse.metrics.rows import Points

Progress = Callable[[str, int, int], None]  # what is being done, how much of it is done, of how much

UNHASHED = "unhashed"


@dataclass(frozen=True)
class Features:
    """A map (b, *event) -> (b, d) with an identity.

    Args:
        function: any callable on a batch; a row of its result may depend on that row only.
        name: what it is called in a protocol.
        hash: of its weights, so that two runs can tell whether they used the same.
        batch: rows per call.
        device: where the batches are sent; the features come back to the CPU.
    """

    function: Callable[[Tensor], Tensor]
    name: str
    hash: str = UNHASHED
    batch: int = 64
    device: torch.device | str = "cpu"

    @classmethod
    def of(cls, function: Callable[[Tensor], Tensor] | Features, name: str | None = None) -> Features:
        """`function` with an identity: a module's is its class and weights, another callable's its name.

        Raises:
            ArgumentError: a module in training mode, whose features would depend on chance or on the batch.
        """
        if isinstance(function, Features):
            return function
        own_name = name or getattr(function, "__qualname__", type(function).__qualname__)
        if not isinstance(function, nn.Module):
            return cls(function, own_name)
        if any(module.training for module in function.modules()):
            raise ArgumentError(f"the feature network {own_name} is in training mode: call .eval() on it first")
        device = next((p.device for p in function.parameters()), torch.device("cpu"))
        return cls(function, own_name, weights_hash(function), device=device)

    def __call__(self, x: Points, progress: Progress | None = None) -> Float[Tensor, "n d"]:
        """Features of all rows, batch by batch, on the CPU.

        Raises:
            ArgumentError: x is empty, or the function returns something other than (b, d) floats.
        """
        n = x.shape[0] if x.ndim else 0
        if n == 0:
            raise ArgumentError(f"features of an empty set were asked for: shape {tuple(x.shape)}")
        found = []
        with torch.no_grad():
            for start in range(0, n, self.batch):
                rows = x[start : start + self.batch].to(self.device)
                found.append(self._checked(self.function(rows), len(rows)).cpu())
                if progress is not None:
                    progress(f"features {self.name}", min(start + self.batch, n), n)
        return torch.cat(found)

    def _checked(self, value: Tensor, rows: int) -> Tensor:
        if not isinstance(value, Tensor) or value.ndim != 2 or value.shape[0] != rows:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ArgumentError(f"features {self.name} of {rows} rows are {shape}: expected a tensor ({rows}, d)")
        if not value.is_floating_point():
            raise ArgumentError(f"features {self.name} have dtype {value.dtype}: expected floating point")
        return value


def weights_hash(module: nn.Module) -> str:
    """sha256 over a module's class name and the name, type, shape and bytes of each parameter and buffer."""
    digest = hashlib.sha256(type(module).__qualname__.encode())
    for key, value in sorted(module.state_dict().items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def as_bytes_rgb(x: Float[Tensor, "b channels height width"]) -> Tensor:
    """Images in [-1, 1] as the uint8 RGB that Inception files take: rounded as a saved PNG is, grey repeated.

    Raises:
        ArgumentError: neither 1 nor 3 channels.
    """
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise ArgumentError(f"images have shape {tuple(x.shape)}: expected (b, 1 or 3, height, width)")
    return ((x + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)


@dataclass(frozen=True)
class _Archive:
    """A TorchScript module together with how it is called."""

    module: Callable[..., Tensor]
    prepare: Callable[[Tensor], Tensor] | None
    options: Mapping[str, bool] = field(default_factory=dict)

    def __call__(self, x: Tensor) -> Tensor:
        return self.module(x if self.prepare is None else self.prepare(x), **self.options)


def torchscript_features(
    path: str | FilePath,
    sha256: str,
    *,
    prepare: Callable[[Tensor], Tensor] | None = None,
    options: Mapping[str, bool] | None = None,
    batch: int = 64,
    device: torch.device | str = "cpu",
) -> Features:
    """Features by a TorchScript file (an Inception network, say) whose sha256 you state.

    A TorchScript archive cannot run arbitrary Python, but it is a program all the same, with operators that
    can open files. So its bytes are read once, their sha256 is compared with yours, and only those bytes are
    loaded. The checksum has to come from a source you trust, not from the file.

    Args:
        path: the file.
        sha256: 64 hexadecimal digits.
        prepare: what turns images in [-1, 1] into what the file takes; for the common Inception files
            `as_bytes_rgb`. None: nothing.
        options: further switches of the call, for example `{"return_features": True}`.
        batch: images per call.
        device: where it runs.

    Raises:
        ArgumentError: `sha256` is not a sha256.
        DataError: the file is missing, has another sha256, or is not TorchScript.
    """
    wanted = sha256.strip().lower()
    if len(wanted) != 64 or not set(wanted) <= set("0123456789abcdef"):
        raise ArgumentError(f"sha256 is '{sha256}': expected 64 hexadecimal digits (sha256sum FILE prints them)")
    try:
        content = FilePath(path).read_bytes()
    except OSError as error:
        raise DataError(f"the feature file {path} cannot be read: {error.strerror}") from error
    given = hashlib.sha256(content).hexdigest()
    if given != wanted:
        raise DataError(
            f"the feature file {path} has sha256 {given}, you stated {wanted}: it is another file, or was "
            "altered or cut short; it was not opened. Fetch it again from a source you trust"
        )
    try:
        module = torch.jit.load(io.BytesIO(content), map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        raise DataError(f"the feature file {path} is not a TorchScript archive: {error}") from error
    name = FilePath(path).stem + (f"({getattr(prepare, '__name__', 'prepare')})" if prepare is not None else "")
    return Features(_Archive(module, prepare, dict(options or {})), name, given, batch, device)
