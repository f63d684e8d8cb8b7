"""How fast momentum with delayed gradients converges on a quadratic, with and without mitigation.

    PYTHONPATH=src python -m benchmarks.pipelined_backprop.quadratic

Half-lives from characteristic polynomials: fourfold.parallel.testing.delayed_quadratic.
"""

from pathlib import Path

from benchmarks.rows import measurement, write_rows

from fourfold.parallel.testing.delayed_quadratic import CONDITION, METHODS, half_life


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
