"""The natural logarithm by one fixed sequence of IEEE fp64 operations, so that every backend has the same bits.

x = 2^e·m with m in [√½, √2), f = (m − 1)/(m + 1), log m = 2·artanh f = 2f(1 + f²/3 + f⁴/5 + …). |f| < 0.172, so ten
terms after the first leave a relative error near 1e-16. Nothing here may be fused into a multiply-add or
handed to libm.
"""

import torch
from torch import Tensor

LN2 = 0.6931471805599453
SQRT2 = 1.4142135623730951
COEFFICIENTS = tuple(1.0 / (2 * n + 1) for n in range(10, 0, -1))  # 1/21, 1/19, …, 1/3

_MANTISSA = (1 << 52) - 1
_ONE = 1023 << 52


def fixed_log(x: Tensor) -> Tensor:
    """log x of positive, normal fp64 numbers."""
    bits = x.view(torch.int64)
    exponent = (bits >> 52) - 1023
    m = (bits & _MANTISSA | _ONE).view(torch.float64)
    above = m >= SQRT2
    m = torch.where(above, m * 0.5, m)
    e = torch.where(above, exponent + 1, exponent).double()
    f = (m - 1.0) / (m + 1.0)
    square = f * f
    series = torch.full_like(f, COEFFICIENTS[0])
    for coefficient in COEFFICIENTS[1:]:
        series = series * square + coefficient
    return e * LN2 + (f * 2.0) * (series * square + 1.0)
