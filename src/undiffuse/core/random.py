"""Random numbers that belong to a sample, not to a batch.

Sample `i` of a seed owns a stream: a counter-based generator (SplitMix64; Steele, Lea and Flood, 2014) whose
key is a hash of the seed and of `i`. Number `j` of draw `d` is a pure function of (seed, i, d, j), so the noise of
a sample does not depend on the batch size, on the number of processes, or on an interruption.

Normals come from the inverse of the normal distribution function (Wichura 1988, algorithm AS 241, relative error
below 1e-15). The logarithm it needs is made of `frexp` and a series, so that every operation is one that IEEE 754
rounds correctly: the bits are the same in a vectorised loop, in its scalar tail, and on another device.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from undiffuse.core.errors import ArgumentError

_MASK = (1 << 64) - 1


def _signed(value: int) -> int:
    """A 64-bit pattern as the int64 that torch can hold."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Logical shift of int64: torch's own keeps the sign."""
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    """The finaliser of SplitMix64, a bijection of 64-bit words."""
    z = (z ^ _shift_right(z, 30)).mul_(_MIX_1)
    z = (z ^ _shift_right(z, 27)).mul_(_MIX_2)
    return z ^ _shift_right(z, 31)


def _word(value: int) -> np.ndarray:
    """A 64-bit pattern as an array of one unsigned word; arrays wrap around in silence."""
    return np.array([value & _MASK], dtype=np.uint64)


_FACTOR_1, _FACTOR_2 = _word(_MIX_1), _word(_MIX_2)
_SHIFTS = tuple(_word(bits) for bits in (30, 27, 31))


def _mixed(z: np.ndarray) -> np.ndarray:
    """`_mix` of unsigned words, for a few of which calls to torch would cost more."""
    z = (z ^ (z >> _SHIFTS[0])) * _FACTOR_1
    z = (z ^ (z >> _SHIFTS[1])) * _FACTOR_2
    return z ^ (z >> _SHIFTS[2])


def hash_key(*parts: int | str) -> int:
    """A 64-bit key from integers and names, order mattering; the same on every machine."""
    key = _word(0)
    for part in parts:
        if isinstance(part, str):
            part = int.from_bytes(hashlib.blake2b(part.encode(), digest_size=8).digest(), "little")
        key = _mixed(key + _word(_GAMMA + part))
    return _signed(int(key[0]))


def fresh_seed() -> int:
    """A seed from the operating system, for callers who gave none. No global generator is touched."""
    return secrets.randbits(31)


def _keys(seed: int, n: int, first: int, device: torch.device) -> Tensor:
    """The keys of samples `first ... first + n - 1` of a seed."""
    index = np.arange(first + 1, first + 1 + n).view(np.uint64)
    words = _mixed(index * _word(_GAMMA) + _mixed(_word(seed + _GAMMA)))
    return torch.from_numpy(words.view(np.int64)).to(device)


class Streams:
    """One random stream per sample of a batch; each call of `normal`, `uniform` or `integers` is one draw.

    `Streams.of(seed, n)` holds streams (seed, 0) ... (seed, n - 1); `Streams.of([s_0, s_1, ...])` holds stream
    0 of each seed, so that row i of `of(seed=[a, b])` equals row 0 of `of(seed=[b])` where i is b's place.

    Args:
        keys: one 64-bit key per sample, shape (B,), or what makes them when they are first asked for: many a run that
            is given streams draws nothing.
        draw: index of the next draw.
    """

    def __init__(self, keys: Int[Tensor, " b"] | Callable[[], Int[Tensor, " b"]], draw: int = 0):
        self._keys = keys
        self.draw = draw

    @property
    def keys(self) -> Int[Tensor, " b"]:
        """One 64-bit key per sample."""
        if not isinstance(self._keys, Tensor):
            self._keys = self._keys()
        if self._keys.dtype != torch.int64:
            self._keys = self._keys.to(torch.int64)
        return self._keys

    def at(self, draw: int) -> Streams:
        """The same streams, at another draw."""
        return Streams(self._keys, draw)

    @classmethod
    def of(cls, seed: int | Sequence[int] | Tensor, n: int | None = None, *, first: int = 0, device=None) -> Streams:
        """Streams of samples `first ... first + n - 1` of one seed, or the first stream of each of many seeds.

        Raises:
            ArgumentError: seeds that are no whole numbers of 64 bits, or of another shape; one seed without n.
        """
        try:
            seeds = torch.as_tensor(seed)
            whole = not (seeds.is_floating_point() or seeds.is_complex()) or seeds.numel() == 0
        except (TypeError, ValueError, RuntimeError, OverflowError):
            whole = False
        if not whole:
            raise ArgumentError(f"seed is {seed!r}: expected a whole number of 64 bits, or one for each sample")
        seeds = seeds.to(torch.int64)
        device = device if device is not None else seeds.device
        if seeds.ndim == 0 and (n is None or n < 0):
            raise ArgumentError(f"one seed for a batch needs n, the number of samples: given {n}")
        if seeds.ndim > 1 or (seeds.ndim == 1 and n is not None and n != len(seeds)):
            raise ArgumentError(
                f"seed has shape {tuple(seeds.shape)}: expected an integer, or one integer for each of {n} samples"
            )
        if seeds.ndim == 0:
            return cls(partial(_keys, int(seeds), int(n or 0), first, device))
        return cls(_mix(_mix(seeds.to(device) + _GAMMA) + _signed((first + 1) * _GAMMA)))

    def __len__(self) -> int:
        return self.keys.shape[0]

    def fold(self, part: int | str) -> Streams:
        """Independent streams for another purpose (a name) or another moment (a step)."""
        return Streams(_mix(self.keys ^ hash_key(part)))

    def select(self, index: Tensor | slice) -> Streams:
        """The streams of some of the samples, at the same draw."""
        return Streams(self.keys[index], self.draw)

    def bits(self, shape: Sequence[int], device=None) -> Tensor:
        """One draw of uniform 64-bit words, shape (B, *event)."""
        if len(shape) == 0 or shape[0] != len(self):
            raise ArgumentError(
                f"shape {tuple(shape)} asked of {len(self)} streams: its first size must be {len(self)}"
            )
        keys = self.keys.to(device) if device is not None else self.keys
        key = _mix(keys + _signed((self.draw + 1) * _GAMMA))
        self.draw += 1
        size = math.prod(shape[1:])
        counter = torch.arange(1, size + 1, dtype=torch.int64, device=key.device).mul_(_GAMMA)
        return _mix(key[:, None] + counter).reshape(tuple(shape))

    def uniform(self, shape: Sequence[int], *, dtype: torch.dtype = torch.float32, device=None) -> Tensor:
        """Uniform on (0, 1), both ends excluded."""
        open_unit = (_shift_right(self.bits(shape, device), 12).to(torch.float64) + 0.5) * 2.0**-52
        # Rounding to a narrow type may reach 0 or 1: stay between them.
        info = torch.finfo(dtype)
        return open_unit.to(dtype).clamp_(min=info.tiny, max=1.0 - info.eps / 2)

    def normal(self, shape: Sequence[int], *, dtype: torch.dtype = torch.float32, device=None) -> Tensor:
        """Standard normal."""
        open_unit = (_shift_right(self.bits(shape, device), 12).to(torch.float64) + 0.5) * 2.0**-52
        return normal_quantile(open_unit).to(dtype)

    def integers(self, high: int, shape: Sequence[int], *, device=None) -> Tensor:
        """Uniform integers in [0, high), 1 <= high <= 2^31; bias below 2^-21."""
        if not 1 <= high <= 2**31:
            raise ArgumentError(f"high is {high}: expected 1 to 2^31")
        return (self.uniform(shape, dtype=torch.float64, device=device) * high).to(torch.int64)


Generator = torch.Generator | Streams | None


def _device_for(generator: Generator, device):
    return device if device is not None else getattr(generator, "device", None)


def normal(shape: Sequence[int], generator: Generator = None, *, dtype=torch.float32, device=None) -> Tensor:
    """Standard normal noise from streams, from a torch generator, or (None) from torch's global one."""
    if isinstance(generator, Streams):
        return generator.normal(shape, dtype=dtype, device=device)
    drawn_on = _device_for(generator, device)
    return torch.randn(tuple(shape), generator=generator, dtype=dtype, device=drawn_on)


def uniform(shape: Sequence[int], generator: Generator = None, *, dtype=torch.float32, device=None) -> Tensor:
    """Uniform numbers on [0, 1), from the same sources as `normal`."""
    if isinstance(generator, Streams):
        return generator.uniform(shape, dtype=dtype, device=device)
    return torch.rand(tuple(shape), generator=generator, dtype=dtype, device=_device_for(generator, device))


def integers(high: int, shape: Sequence[int], generator: Generator = None, *, device=None) -> Tensor:
    """Uniform integers in [0, high), from the same sources as `normal`."""
    if isinstance(generator, Streams):
        return generator.integers(high, shape, device=device)
    return torch.randint(high, tuple(shape), generator=generator, device=_device_for(generator, device))


# ---------------------------------------------------------------- the normal quantile, exactly rounded

# AS 241 (PPND16): numerator and denominator, lowest degree first.
_CENTRE = (
    (3.3871328727963666080, 1.3314166789178437745e2, 1.9715909503065514427e3, 1.3731693765509461125e4,
     4.5921953931549871457e4, 6.7265770927008700853e4, 3.3430575583588128105e4, 2.5090809287301226727e3),
    (1.0, 4.2313330701600911252e1, 6.8718700749205790830e2, 5.3941960214247511077e3,
     2.1213794301586595867e4, 3.9307895800092710610e4, 2.8729085735721942674e4, 5.2264952788528545610e3),
)  # fmt: skip
_NEAR_TAIL = (
    (1.42343711074968357734, 4.63033784615654529590, 5.76949722146069140550, 3.64784832476320460504,
     1.27045825245236838258, 2.41780725177450611770e-1, 2.27238449892691845833e-2, 7.74545014278341407640e-4),
    (1.0, 2.05319162663775882187, 1.67638483018380384940, 6.89767334985100004550e-1,
     1.48103976427480074590e-1, 1.51986665636164571966e-2, 5.47593808499534494600e-4, 1.05075007164441684324e-9),
)  # fmt: skip
_FAR_TAIL = (
    (6.65790464350110377720, 5.46378491116411436990, 1.78482653991729133580, 2.96560571828504891230e-1,
     2.65321895265761230930e-2, 1.24266094738807843860e-3, 2.71155556874348757815e-5, 2.01033439929228813265e-7),
    (1.0, 5.99832206555887937690e-1, 1.36929880922735805310e-1, 1.48753612908506148525e-2,
     7.86869131145613259100e-4, 1.84631831751005468180e-5, 1.42151175831644588870e-7, 2.04426310338993978564e-15),
)  # fmt: skip


def _polynomial(coefficients: Sequence[float], x: Tensor) -> Tensor:
    total = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = total.mul_(x).add_(coefficient)
    return total


def _rational(coefficients, x: Tensor) -> Tensor:
    return _polynomial(coefficients[0], x).div_(_polynomial(coefficients[1], x))


_INVERSE_ODD = tuple(1.0 / (2 * k + 1) for k in range(12))


def _log(x: Tensor) -> Tensor:
    """Natural logarithm by correctly rounded operations: x = m 2^e, log m = 2 atanh((m - 1) / (m + 1))."""
    mantissa, exponent = torch.frexp(x)
    low = mantissa < math.sqrt(0.5)
    mantissa = torch.where(low, mantissa * 2, mantissa)
    exponent = exponent.to(x.dtype) - low.to(x.dtype)
    ratio = (mantissa - 1) / (mantissa + 1)
    return 2 * ratio * _polynomial(_INVERSE_ODD, ratio * ratio) + exponent * math.log(2)


def normal_quantile(p: Tensor) -> Tensor:
    """z with Phi(z) = p, for p in (0, 1), float64 (Wichura 1988, AS 241)."""
    q = p - 0.5
    z = q * _rational(_CENTRE, 0.180625 - q * q)
    tail = (q.abs() > 0.425).nonzero(as_tuple=True)
    p_tail, q_tail = p[tail], q[tail]
    r = torch.sqrt(-_log(torch.minimum(p_tail, 1 - p_tail)))
    z_tail = torch.where(r <= 5, _rational(_NEAR_TAIL, r - 1.6), _rational(_FAR_TAIL, r - 5))
    z[tail] = torch.where(q_tail < 0, -z_tail, z_tail)
    return z
