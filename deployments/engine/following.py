"""Whether a sequence had better wait for another that is computing the beginning of its prompt: pure functions.

Choices of one request, and requests that come at the same time with the same long instructions, would else all compute the same
tokens side by side. Who waits loses the time that the other takes for what both want, and saves as many tokens of its own: where
that is most of them both are done sooner. Of short beginnings waiting would only leave steps half empty.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence as Items


def common(first: Items[bytes], second: Items[bytes]) -> int:
    """How many digests are alike from the beginning on. Each stands for everything before it, so after the first difference all
    others differ, too."""
    return bisect_left(range(min(len(first), len(second))), True, key=lambda place: first[place] != second[place])


def pays(num_saved: int, num_pending: int) -> bool:
    """Whether to wait for `num_saved` of the `num_pending` tokens that one would compute alone."""
    return 2 * num_saved >= num_pending > 0 and num_saved > 0
