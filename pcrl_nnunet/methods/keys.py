"""The length of a queue of keys, for methods with many negatives."""

from __future__ import annotations

from pcrl_nnunet.errors import UserError

LARGEST_QUEUE = 16384  # the papers of C2L and PCRLv1
KEYS_PER_CASE = 16  # PCRLv1 has 16 pairs of each volume; more keys would be the same views of the same cases again


def queue_size_for(cases: int, given: int, where: str) -> int:
    """Return the number of keys: the given one, or 16 for each case and 16384 at most.

    Args:
        cases: number of cases of the training.
        given: the setting ``queue_size``; 0: not given.
        where: name of the method's block of settings.

    Raises:
        UserError: the given queue is too long.
    """
    largest = min(LARGEST_QUEUE, KEYS_PER_CASE * cases)
    if given > largest:
        raise UserError(
            f"{where}.queue_size is {given}, and {cases} cases allow {largest} keys, {KEYS_PER_CASE} for each case and "
            f"{LARGEST_QUEUE} at most: set {largest} or less, or 0 for {largest}"
        )
    return given or largest
