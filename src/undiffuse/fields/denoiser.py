"""`Denoiser`: the one face of a model that everything else is derived from."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from operator import attrgetter
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from undiffuse.core.errors import ArgumentError
from undiffuse.core.instants import known, sent
from undiffuse.core.shapes import as_time, pad_to
from undiffuse.core.sums import added, combine
from undiffuse.fields import prediction as predictions
from undiffuse.fields.prediction import Coefficients, Prediction
from undiffuse.paths import Path, change_of_path, is_value

Event = Float[Tensor, "b *event"]
Time = Float[Tensor, ""] | Float[Tensor, " b"] | float
Cond = Tensor | dict[str, Tensor] | None


# (x_t, t, cond) -> the answer; None at a time that was not foreseen.
Reading = Callable[[Tensor, float, Cond], "Answer | None"]


class Answer(NamedTuple):
    """`E[x_0 | x_t] = on_x x_t + on_output output`, not yet added up: a solver adds it to x_t anyway.

    To be used before the model's next call, which may overwrite the output.
    """

    output: Event
    on_x: float = 0.0
    on_output: float = 1.0

    def weights(self, a: float, b: float) -> tuple[float, float]:
        """Of x_t and of the output in `a x_t + b E[x_0 | x_t]`."""
        return added(a, b * self.on_x), b * self.on_output

    def plus(self, x_t: Event, a: float, b: float, spent: Event | None = None) -> Event:
        """`a x_t + b E[x_0 | x_t]`; `spent`: a tensor that may be written over, such as x_t."""
        on_x, on_output = self.weights(a, b)
        return combine(x_t, on_x, self.output, on_output, spent)

    def data(self, x_t: Event) -> Event:
        """`E[x_0 | x_t]`."""
        return self.output if self.on_x == 0 and self.on_output == 1 else self.plus(x_t, 0.0, 1.0)


class _AsWritten:
    """Whether a module's methods of these names are what they are now: not overridden, nor replaced, here or there."""

    def __init__(self, kind: type[nn.Module], *names: str):
        self.names, self.methods = names, attrgetter(*names)
        self.written = self.methods(kind)

    def __call__(self, module: nn.Module) -> bool:
        return self.methods(type(module)) == self.written and vars(module).keys().isdisjoint(self.names)


def _only_called(module: nn.Module) -> bool:
    """Whether a call is but a call: nothing hooked, nothing compiled."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl
    )


def _counted(x: Tensor) -> bool:
    """Whether changes of x are, which tells who writes into it."""
    return not (x.is_inference() or torch.is_inference_mode_enabled())


class Denoiser(nn.Module):
    """`D(x_t, t) = E[x_0 | x_t]` on a path.

    Noise, score and velocity follow from it (Prop. 6.3.1). A subclass gives `estimate`, which returns both
    conditional means `(E[x_0 | x_t], E[eps | x_t])`, or `forward` alone, from which the noise is then derived.

    All methods take `x_t` (B, *event), `t` () or (B,), and `cond` (None: unconditional).
    """

    path: Path

    def __init__(self, path: Path):
        super().__init__()
        self.path = path

    @property
    def t_low(self) -> float:
        """The smallest time at which the model knows an answer: the path's `t_low`, where training ends.

        Exact denoisers answer down to `path.t_min`.
        """
        return self.path.t_low

    @abstractmethod
    def forward(self, x_t: Event, t: Time, cond: Cond = None) -> Event:
        """`E[x_0 | x_t]`, a new tensor at each call: solvers keep what they were answered."""

    def estimate(self, x_t: Event, t: Time, cond: Cond = None) -> tuple[Event, Event]:
        """`(E[x_0 | x_t], E[eps | x_t])` from one call; `eps = (x_t - alpha x_0) / sigma`."""
        time = as_time(t, x_t)
        x_0 = self(x_t, t, cond)
        alpha, sigma = pad_to(self.path.alpha(time), x_t), pad_to(self.path.sigma(time), x_t)
        return x_0, (x_t - alpha * x_0) / sigma

    def ask(self, x_t: Event, t: Time, cond: Cond = None) -> Answer:
        """`E[x_0 | x_t]` as a sum, where the model makes it of x_t and of one tensor by numbers."""
        return Answer(self(x_t, t, cond))

    def reading(self, times: tuple[float, ...], like: Event) -> Reading | None:
        """`ask` for a run that asks at these times, about x like this one, where all but x can be known before."""
        return None

    def noise(self, x_t: Event, t: Time, cond: Cond = None) -> Event:
        """`E[eps | x_t]`."""
        return self.estimate(x_t, t, cond)[1]

    def score(self, x_t: Event, t: Time, cond: Cond = None) -> Event:
        """`grad log p_t(x_t) = -E[eps | x_t] / sigma` (Tweedie)."""
        return -self.noise(x_t, t, cond) / pad_to(self.path.sigma(as_time(t, x_t)), x_t)

    def velocity(self, x_t: Event, t: Time, cond: Cond = None) -> Event:
        """`alpha' E[x_0 | x_t] + sigma' E[eps | x_t]`, the right-hand side of the PF-ODE (Prop. 6.3.2)."""
        time = as_time(t, x_t)
        x_0, noise = self.estimate(x_t, t, cond)
        return pad_to(self.path.alpha_dot(time), x_t) * x_0 + pad_to(self.path.sigma_dot(time), x_t) * noise


class NetworkDenoiser(Denoiser):
    """A network read as one of the predictions of `undiffuse.fields.PREDICTIONS`.

    The network is called as `net(c_in x_t, c_noise, cond)` in its own dtype, c_noise of shape (B,), and its output F
    gives `x_0 = c_skip x_t + c_out F`; see `undiffuse.predictions`.

    Where the signal is gone (alpha = 0) a predicted noise or score does not determine x_0; such predictions are
    evaluated at `path.t_high` there.

    Args:
        net: called as above; returns the shape of its input.
        path: the path it is trained on.
        prediction: a name, or a `Prediction`.
        sigma_data: standard deviation of the data, used by "edm".

    Raises:
        ArgumentError: unknown prediction; sigma_data <= 0; a network that returns another shape.
    """

    # What the coefficients were computed for, and they, by time; how a net was called that left its input as it was.
    _kept: tuple[tuple, dict[float, Coefficients[float]]] = ((), {})
    _only_reads: tuple[nn.Module, bool, bool] | None = None

    def __init__(self, net: nn.Module, path: Path, prediction: str | Prediction = "noise", sigma_data: float = 0.5):
        super().__init__(path)
        if not sigma_data > 0:
            raise ArgumentError(f"sigma_data is {sigma_data}: expected the data's standard deviation, > 0")
        self.net = net
        self.prediction = predictions.get(prediction)
        self.sigma_data = sigma_data

    def output(self, x_t: Event, t: Time, cond: Cond = None) -> tuple[Event, Coefficients[Tensor]]:
        """The network's output F and the coefficients that give it its meaning; what objectives regress."""
        c = self._coefficients(as_time(t, x_t))
        return self._called(self.net, c.scaled(x_t), c, x_t, cond, self._dtype(x_t)), c

    def _coefficients(self, time: Tensor) -> Coefficients[Tensor]:
        return self.prediction.coefficients(self.path, self.prediction.reach(self.path, time), self.sigma_data)

    def _dtype(self, x_t: Event) -> torch.dtype:
        """What the network reads."""
        return next((p.dtype for p in self.net.parameters() if p.is_floating_point()), x_t.dtype)

    @staticmethod
    def _called(net: nn.Module, x_in: Event, c: Coefficients, x_t: Event, cond: Cond, dtype: torch.dtype) -> Event:
        output = net(x_in if x_in.dtype == dtype else x_in.to(dtype), c.labels(x_t), cond)
        if output.shape != x_t.shape:
            raise ArgumentError(
                f"the network returned shape {tuple(output.shape)} for x of shape {tuple(x_t.shape)}: expected the same"
            )
        return output if output.dtype == x_t.dtype else output.to(x_t.dtype)

    def _settled(self) -> bool:
        """Whether the coefficients are functions of the time alone, for good."""
        values = is_value(self.path) and self.prediction.value and isinstance(self.sigma_data, int | float)
        return values and _READ(self)

    def _numbers(self, t: Time) -> Coefficients[float] | None:
        """The coefficients as numbers, where that of the time is known and nothing in them can change."""
        instant = known(t)
        if instant is None or not self._settled():
            return None
        of = self.path, self.prediction, instant.among, self.sigma_data
        kept = self._kept
        if kept[0] != of:
            kept = self._kept = of, predictions.numbers(*of)
        return kept[1][instant.number]

    def _read(self, net: nn.Module, c: Coefficients[float], x_t: Event, cond: Cond, dtype: torch.dtype) -> Event:
        """F, by numbers."""
        if c.c_in != 1 or x_t.requires_grad or not (x_t.is_contiguous() and _counted(x_t)):
            return self._called(net, c.scaled(x_t), c, x_t, cond, dtype)
        # x as it is, unless the network writes into what it is given, as its first call on a copy has told.
        how = net, cond is None, net.training
        x_in = x_t if self._only_reads == how else x_t.clone()
        before = x_in._version
        output = self._called(net, x_in, c, x_t, cond, dtype)
        if x_in._version == before:
            self.__dict__["_only_reads"] = how
        elif x_in is x_t:
            raise ArgumentError("the network has begun to change its input in place, x is lost: let it work on a copy")
        return output

    def _said(self, x_t: Event, t: Time, cond: Cond) -> tuple[Event, Coefficients]:
        """`output`, by numbers where they are known."""
        c = self._numbers(t)
        if c is None:
            return self.output(x_t, t, cond)
        return self._read(self.net, c, x_t, cond, self._dtype(x_t)), c

    def forward(self, x_t: Event, t: Time, cond: Cond = None) -> Event:
        output, c = self._said(x_t, t, cond)
        return c.data(output, x_t)

    def ask(self, x_t: Event, t: Time, cond: Cond = None) -> Answer:
        c = self._numbers(t)
        # Where F is E[x_0] a solver may keep it.
        if c is None or c.c_skip == 0 or not (_ASKED(self) and _only_called(self)):
            return super().ask(x_t, t, cond)
        return Answer(self._read(self.net, c, x_t, cond, self._dtype(x_t)), c.c_skip, c.c_out)

    def reading(self, times: tuple[float, ...], like: Event) -> Reading | None:
        asked = _counted(like) and not torch.compiler.is_compiling()
        if not (asked and self._settled() and _ASKED(self) and _only_called(self)):
            return None
        return _Reading(self, predictions.numbers(self.path, self.prediction, times, self.sigma_data), like)

    def estimate(self, x_t: Event, t: Time, cond: Cond = None) -> tuple[Event, Event]:
        output, c = self._said(x_t, t, cond)
        return c.data(output, x_t), c.noise(output, x_t)


class _Reading:
    """A network along one run: its coefficients by time, and the dtype that it reads."""

    def __init__(self, field: NetworkDenoiser, numbers: dict[float, Coefficients[float]], like: Event):
        self.field, self.numbers, self.dtype = field, numbers, field._dtype(like)

    def __call__(self, x_t: Event, t: float, cond: Cond) -> Answer | None:
        c = self.numbers.get(t)
        if c is None or c.c_skip == 0:  # where F is E[x_0] a solver may keep it
            return None
        field = self.field
        return Answer(field._read(field.net, c, x_t, cond, self.dtype), c.c_skip, c.c_out)


_READ = _AsWritten(NetworkDenoiser, "output", "_coefficients")
_ASKED = _AsWritten(NetworkDenoiser, "forward", "__call__")


class OnPath(Denoiser):
    """A denoiser trained on one path, asked on another (Prop. 6.3.3): `D(x, t) = D_source(x / c, tau)`."""

    # What times and scales were computed for, and they, by time.
    _kept: tuple[tuple, dict[float, tuple[Tensor, float]]] = ((), {})

    def __init__(self, source: Denoiser, path: Path):
        super().__init__(path)
        self.source = source

    @property
    def t_low(self) -> float:
        lowest = torch.tensor(self.source.t_low, dtype=torch.float64)
        mapped = float(change_of_path(self.path, self.source.path, lowest)[0])
        return self.path.t_min if self.source.t_low == self.source.path.t_min else mapped

    def _moved(self, x_t: Event, t: Time) -> tuple[Event, Tensor]:
        move = self._known_move(x_t, t)
        if move is not None:
            return move[:2]
        tau, scale = change_of_path(self.source.path, self.path, as_time(t, x_t))
        return x_t / pad_to(scale, x_t), tau

    def _known_move(self, x_t: Event, t: Time) -> tuple[Event, Tensor, float] | None:
        """x / c, tau and c of a time whose number is known, on paths that have nothing to learn: once for a run."""
        instant, paths = known(t), (self.source.path, self.path)
        if instant is None or not all(map(is_value, paths)):
            return None
        of = *paths, instant.among, x_t.dtype, x_t.device, torch.is_inference_mode_enabled()
        kept = self._kept
        if kept[0] != of:
            times = torch.tensor(instant.among, dtype=torch.float64, device="cpu")
            places, scales = (part.tolist() for part in change_of_path(*paths, times))
            there = sent(places, x_t)
            kept = self._kept = of, {at: (there[tau], c) for at, tau, c in zip(instant.among, places, scales)}
        tau, scale = kept[1][instant.number]
        return (x_t if scale == 1 else x_t / scale), tau, scale

    def forward(self, x_t: Event, t: Time, cond: Cond = None) -> Event:
        x_tau, tau = self._moved(x_t, t)
        return self.source(x_tau, tau, cond)

    def ask(self, x_t: Event, t: Time, cond: Cond = None) -> Answer:
        move = self._known_move(x_t, t) if _MOVED(self) and _only_called(self) else None
        if move is None:
            return super().ask(x_t, t, cond)
        x_tau, tau, scale = move
        answer = self.source.ask(x_tau, tau, cond)
        return answer._replace(on_x=answer.on_x / scale)

    def estimate(self, x_t: Event, t: Time, cond: Cond = None) -> tuple[Event, Event]:
        x_tau, tau = self._moved(x_t, t)
        return self.source.estimate(x_tau, tau, cond)


_MOVED = _AsWritten(OnPath, "forward", "__call__", "_moved")


def on_path(denoiser: Denoiser, path: Path) -> Denoiser:
    """The same model on another path: train on one, sample on another (Prop. 6.3.3)."""
    return OnPath(denoiser, path)
