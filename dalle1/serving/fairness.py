"""How the places of a batch are shared among those who wait."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil


def fair_shares(wanted: Sequence[int], places: int) -> list[int]:
    """Places for each of those who wait, the longest waiting first.

    All get the same number, except for those who want fewer; what these leave goes to the others.
    Where there are fewer places than who wait, the first ones get one each. One alone gets parts of
    about equal size, as many as it needs.

    Args:
        wanted: by each, at least 1.
        places: at least 1.

    Returns:
        As many numbers, at most `places` in all.
    """
    if len(wanted) == 1:
        return [ceil(wanted[0] / ceil(wanted[0] / places))]
    given = [0] * len(wanted)
    left = places
    while left and (hungry := [i for i, want in enumerate(wanted) if given[i] < want]):
        each = max(1, left // len(hungry))
        for i in hungry[:left]:
            more = min(each, wanted[i] - given[i])
            given[i] += more
            left -= more
    return given
