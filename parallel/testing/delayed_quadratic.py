"""How fast momentum with delayed gradients converges on a quadratic: theory that tests and the benchmark share.

On an eigenvector with eigenvalue x (times the learning rate) and a consistent delay D, the linear recurrences of
pipeline.mitigation have the characteristic polynomials

    LWPv(T) + SC(a, b)   (z - m)(z - 1) z^D     + x ((a + b) z - b m + T (z - 1))        = 0
    LWPw(T) + SC(a, b)   (z - m)(z - 1) z^(D+1) + x ((a + b) z - b m)((1 + T) z - T)     = 0

(T = 0, a = 1, b = 0 is plain momentum.) The largest |z| is the factor by which the error shrinks an update. The
half-life is that of the slowest of all eigenvalues in [1, condition number], at the best learning rate and momentum.
"""

import numpy as np
from numpy.typing import NDArray

from fourfold.parallel.pipeline.mitigation import spike_compensation

CONDITION = 1000.0
POINTS = 20  # learning rates (and eigenvalues) a decade
METHODS = {  # name: (SC in units of D, LWP form, T in units of D)
    "plain": (0.0, "v", 0.0),
    "SC_D": (1.0, "v", 0.0),
    "LWP_D": (0.0, "v", 1.0),
    "SC_2D": (2.0, "v", 0.0),
    "LWP_2D": (0.0, "v", 2.0),
    "LWPv_D+SC_D": (1.0, "v", 1.0),
    "LWPw_D+SC_D": (1.0, "w", 1.0),
}
Array = NDArray[np.float64]
MOMENTA: Array = np.concatenate([[0.0], 1 - np.logspace(0, -5, 101)[1:]])


def polynomial(x: float, m: float, delay: int, *, a: float, b: float, horizon: float, form: str) -> Array:
    """Coefficients of the characteristic polynomial, highest power first.

    Args:
        x: learning rate times eigenvalue. m: momentum. a, b: of spike compensation.
        horizon: T, in updates. form: "v" for LWP^v, "w" for LWP^w.
    """
    # Momentum descent alone is (z - m)(z - 1); spike compensation shapes what the gradient adds to it.
    momentum = np.polymul([1.0, -m], [1.0, -1.0])
    step = np.array([a + b, -b * m])
    if form == "w":
        delayed, pull = np.polymul(momentum, [1.0] + [0.0] * (delay + 1)), np.polymul(step, [1 + horizon, -horizon])
    else:
        delayed, pull = np.polymul(momentum, [1.0] + [0.0] * delay), step + np.array([horizon, -horizon])
    return np.asarray(np.polyadd(delayed, x * pull), dtype=np.float64)


def spectral_radii(polynomials: Array) -> Array:
    """The largest |root| of each row of [n, degree + 1] coefficients with leading ones."""
    degree = polynomials.shape[1] - 1
    companions = np.zeros((len(polynomials), degree, degree))
    companions[:, 0] = -polynomials[:, 1:] / polynomials[:, :1]
    companions[:, np.arange(1, degree), np.arange(degree - 1)] = 1.0
    return np.asarray(np.abs(np.linalg.eigvals(companions)).max(1))


def half_life(
    delay: int, method: str, *, condition: float = CONDITION, momenta: Array = MOMENTA
) -> tuple[float, float, float]:
    """Updates until the error has halved, at the best learning rate (x largest eigenvalue) and momentum, and these."""
    over, form, ahead = METHODS[method]
    # A window of this many rates holds all eigenvalues from 1 to the condition number.
    window = round(np.log10(condition) * POINTS)
    x = np.logspace(-7, 1, 8 * POINTS + 1)
    best = (np.inf, 0.0, 0.0)
    for m in momenta:
        # The spectral radius at every rate, and in every window the slowest of its eigenvalues.
        a, b = spike_compensation(over * delay, float(m))
        rows = [polynomial(one, m, delay, a=a, b=b, horizon=ahead * delay, form=form) for one in x]
        radii = spectral_radii(np.array(rows))
        slowest = np.lib.stride_tricks.sliding_window_view(radii, window + 1).max(1)
        # The best rate is the one whose slowest eigenvalue is fastest.
        at = int(slowest.argmin())
        life = np.log(0.5) / np.log(slowest[at]) if slowest[at] < 1 else np.inf
        best = min(best, (float(life), float(x[at + window]), float(m)))
    return best
