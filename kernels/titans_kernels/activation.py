"""The memory's non-linearities inside kernels: value, first and second derivative from one exponential."""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

ACTIVATIONS = ("gelu", "silu", "relu", "identity")


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """act(z), act'(z), act''(z) in float32; what is not used is not computed."""
    if ACTIVATION == "gelu":
        # The normal distribution's tail by Abramowitz and Stegun, 7.1.26 (error below 1e-7), from the density's own
        # exponential: neither erf nor tanh is called.
        gauss = tl.exp(-0.5 * z * z)
        t = 1.0 / (1.0 + 0.3275911 * 0.7071067811865476 * tl.abs(z))
        series = 0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))
        tail = 0.5 * gauss * t * series
        below = tl.where(z < 0, tail, 1.0 - tail)
        density = 0.3989422804014327 * gauss
        return z * below, below + z * density, density * (2.0 - z * z)
    elif ACTIVATION == "silu":
        s = 1.0 / (1.0 + tl.exp(-z))
        return z * s, s * (1.0 + z * (1.0 - s)), s * (1.0 - s) * (2.0 + z * (1.0 - 2.0 * s))
    elif ACTIVATION == "relu":
        slope = tl.where(z > 0, 1.0, 0.0)
        return z * slope, slope, z * 0.0
    else:
        return z, z * 0.0 + 1.0, z * 0.0
