"""Embedded Runge-Kutta pairs: two orders from the same evaluations, and a polynomial between the ends of a step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Row = tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Pair:
    """An explicit pair whose last evaluation is the first of the next step (`k_S = f(y_new)`).

    `k_i = f(t + c_i h, y + h sum_j a_ij k_j)`, `y_new = y + h sum_j a_Sj k_j`, error `h sum_j e_j k_j`, and between,
    at a share u of the step, `y + h sum_j (sum_m p_jm u^m) k_j`, m = 1, 2, ...

    Args:
        order: of y_new.
        order_between: of the polynomial.
        a: rows of a, the lower triangle; the last is the step's own.
        e: weights of the error, those of y_new less those of a solution of one order less.
        p: coefficients of the polynomial, one row per evaluation.
    """

    order: int
    order_between: int
    a: tuple[Row, ...]
    e: Row
    p: tuple[Row, ...]

    @property
    def stages(self) -> int:
        """S, of which one is known from the step before."""
        return len(self.e)

    @property
    def c(self) -> Row:
        """Where in the step each evaluation is: `c_i = sum_j a_ij`."""
        return (0.0, *(sum(row) for row in self.a))

    def between(self, u: Tensor) -> Tensor:
        """Weights of the S evaluations at shares u of the step, (n,) -> (n, S)."""
        table = torch.tensor(self.p, dtype=u.dtype, device=u.device)
        powers = torch.stack([u**m for m in range(1, table.shape[1] + 1)], 1)
        return powers @ table.T


def _expanded(scale: float, *factors: Row) -> Row:
    """Coefficients, lowest degree first and without that of degree 0, of `scale` times a product of polynomials."""
    product = [scale]
    for factor in factors:
        longer = [0.0] * (len(product) + len(factor) - 1)
        for i, a in enumerate(product):
            for j, b in enumerate(factor):
                longer[i + j] += a * b
        product = longer
    return tuple(product[1:])


_U, _UU = (0.0, 1.0), (0.0, 0.0, 1.0)

# Dormand and Prince 1980; the polynomial of order 4 is Shampine's (1986).
DOPRI5 = Pair(
    5,
    4,
    (
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),
    (
        (1.0, -8048581381 / 2820520608, 8663915743 / 2820520608, -12715105075 / 11282082432),
        (0.0, 0.0, 0.0, 0.0),
        (0.0, 131558114200 / 32700410799, -68118460800 / 10900136933, 87487479700 / 32700410799),
        (0.0, -1754552775 / 470086768, 14199869525 / 1410260304, -10690763975 / 1880347072),
        (0.0, 127303824393 / 49829197408, -318862633887 / 49829197408, 701980252875 / 199316789632),
        (0.0, -282668133 / 205662961, 2019193451 / 616988883, -1453857185 / 822651844),
        (0.0, 40617522 / 29380423, -110615467 / 29380423, 69997945 / 29380423),
    ),
)

# Tsitouras 2011, with his polynomial of order 4.
TSIT5 = Pair(
    5,
    4,
    (
        (0.161,),
        (-0.008480655492356989, 0.335480655492357),
        (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
        (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
        (5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401, -0.028269050394068383),
        (0.09646076681806523, 0.01, 0.4798896504144996, 1.379008574103742, -3.290069515436081, 2.324710524099774),
    ),
    (
        -0.00178001105222577714, -0.0008164344596567469, 0.007880878010261995, -0.1447110071732629,
        0.5823571654525552, -0.45808210592918697, 0.015151515151515152,
    ),
    (
        _expanded(-1.0530884977290216, _U, (-1.3299890189751412, 1.0), (0.7139816917074209, -1.4364028541716351, 1.0)),
        _expanded(0.1017, _UU, (1.2949852507374631, -2.1966568338249754, 1.0)),
        _expanded(2.490627285651252793, _UU, (1.57803468208092486, -2.38535645472061657, 1.0)),
        _expanded(-16.54810288924490272, _UU, (-1.21712927295533244, 1.0), (-0.61620406037800089, 1.0)),
        _expanded(47.37952196281928122, _UU, (-1.203071208372362603, 1.0), (-0.658047292653547382, 1.0)),
        _expanded(-34.87065786149660974, _UU, (-1.2, 1.0), (-2 / 3, 1.0)),
        _expanded(2.5, _UU, (-1.0, 1.0), (-0.6, 1.0)),
    ),
)  # fmt: skip

# Bogacki and Shampine 1989; between, the cubic of both ends.
BOSH3 = Pair(
    3,
    3,
    ((1 / 2,), (0.0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
    (-5 / 72, 1 / 12, 1 / 9, -1 / 8),
    ((1.0, -4 / 3, 5 / 9), (0.0, 1.0, -2 / 3), (0.0, 4 / 3, -8 / 9), (0.0, -1.0, 1.0)),
)

PAIRS: dict[str, Pair] = {"dopri5": DOPRI5, "tsit5": TSIT5, "bosh3": BOSH3}
