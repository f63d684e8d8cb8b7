"""How fast momentum with delayed gradients converges on a quadratic, with and without mitigation.

    PYTHONPATH=src python -m benchmarks.pipelined_backprop.quadratic

On an eigenvector with eigenvalue x (times the learning rate) and a consistent delay D, the linear recurrences of
weight_prediction.py have the characteristic polynomials

    LWPv(T) + SC(a, b)   (z - m)(z - 1) z^D     + x ((a + b) z - b m + T (z - 1))        = 0
    LWPw(T) + SC(a, b)   (z - m)(z - 1) z^(D+1) + x ((a + b) z - b m)((1 + T) z - T)     = 0

(T = 0, a = 1, b = 0 is plain momentum.) The largest |z| is the factor by which the error shrinks an update. The
half-life is that of the slowest of all eigenvalues in [1, condition number], at the best learning rate and momentum.
"""

from pathlib import Path

import numpy as np
from benchmarks.rows import measurement, write_rows
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
    """Coefficients of the characteristic polynomial, highest power first."""
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
    window = round(np.log10(condition) * POINTS)
    x = np.logspace(-7, 1, 8 * POINTS + 1)
    best = (np.inf, 0.0, 0.0)
    for m in momenta:
        a, b = spike_compensation(over * delay, float(m))
        rows = [polynomial(one, m, delay, a=a, b=b, horizon=ahead * delay, form=form) for one in x]
        radii = spectral_radii(np.array(rows))
        slowest = np.lib.stride_tricks.sliding_window_view(radii, window + 1).max(1)
        at = int(slowest.argmin())
        life = np.log(0.5) / np.log(slowest[at]) if slowest[at] < 1 else np.inf
        best = min(best, (float(life), float(x[at + window]), float(m)))
    return best


def main() -> None:
    rows = []
    print(f"half-life in updates, condition number {CONDITION:g} (learning rate x largest eigenvalue, momentum)")
    print("| D | " + " | ".join(METHODS) + " |\n|" + "---|" * (len(METHODS) + 1))
    for delay in (0, 1, 4, 8):
        cells = []
        for method in METHODS if delay else ["plain"]:
            life, lr, m = half_life(delay, method)
            cells.append(f"{life:.0f} ({lr:.2g}, {m:.5f})")
            rows.append(
                measurement(
                    benchmark="pipelined_backprop/quadratic", provider="fourfold", metric="half_life", unit="updates",
                    case=f"delay={delay} method={method} condition={CONDITION:g}", samples=[life], kind="modelled",
                )
            )  # fmt: skip
        print(f"| {delay} | " + " | ".join(cells) + " |", flush=True)
    write_rows(Path(__file__).with_name("quadratic.csv"), rows)


if __name__ == "__main__":
    main()
