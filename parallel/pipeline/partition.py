"""Cut a chain of layers into pipeline stages, and a stage's weights into shares. No torch: layouts uses it too.

grid.layer_ranges counts layers; `balanced_ranges` weighs them, by costs that decoder.balance measures. `owners` says
which replica of a stage owns which of its weights where optimizer states are sharded.
"""

import heapq
from collections.abc import Sequence


def balanced_ranges(costs: Sequence[float], num_stages: int) -> list[range]:
    """The cut of a chain into `num_stages` non-empty runs with the least largest sum.

    Args:
        costs: one a layer, at least 0, in any unit (seconds of forward + backward).
    Returns:
        One range of layer numbers a stage. Among equally good cuts, stages fill from the front.
    Raises:
        ValueError: fewer layers than stages, or a negative cost.
    Cost: O(len(costs)^2 * num_stages).
    """
    num_layers = len(costs)
    if not 1 <= num_stages <= num_layers:
        raise ValueError(f"{num_layers} layers cannot fill {num_stages} stages: at least one layer a stage")
    if min(costs) < 0:
        raise ValueError(f"a cost is negative: {min(costs)}")
    total = [0.0]
    for cost in costs:
        total.append(total[-1] + cost)
    # best[k][n]: the least largest sum of the first n layers in k stages, with the start of the last of these stages.
    best = [[(total[n], 0) for n in range(num_layers + 1)]]
    for stages in range(2, num_stages + 1):
        row = [(float("inf"), 0)] * (num_layers + 1)
        for n in range(stages, num_layers + 1):
            row[n] = min(
                ((max(best[-1][start][0], total[n] - total[start]), -start) for start in range(stages - 1, n)),
                key=lambda entry: entry,
            )
            row[n] = (row[n][0], -row[n][1])
        best.append(row)
    ranges: list[range] = []
    end = num_layers
    for row in reversed(best):
        start = row[end][1]
        ranges.append(range(start, end))
        end = start
    return ranges[::-1]


def owners(sizes: Sequence[int], num_owners: int) -> list[int]:
    """Who of `num_owners` owns each of some tensors, whole ones, so that the largest share is small.

    The largest tensor goes first, always to who has least so far; of equal ones the earlier first, to the lower number.
    The largest share is at most 4/3 of the smallest that could be, and never below the largest tensor's.

    Args:
        sizes: of the tensors, in elements.
    Returns:
        A number below `num_owners` for each tensor; some own none where tensors are fewer.
    Cost: O(len(sizes) (log len(sizes) + log num_owners)).
    Source: Graham 1969, "Bounds on Multiprocessing Timing Anomalies" (longest processing time first).
    """
    loads = [(0, number) for number in range(num_owners)]
    found = [0] * len(sizes)
    for at in sorted(range(len(sizes)), key=lambda at: -sizes[at]):
        load, number = heapq.heappop(loads)
        found[at] = number
        heapq.heappush(loads, (load + sizes[at], number))
    return found
