"""How far fp32 arithmetic may be from exact arithmetic, or from itself in another order."""

import numpy as np

EPS = float(np.finfo(np.float32).eps)


def sum_rounding(terms: int, largest: float) -> float:
    """Bound of the rounding of an fp32 sum, in any order, of products of at most ``largest``: n · eps · max|term|.

    Each of n additions rounds a partial sum of at most n terms by half an eps. Neither that all partial sums are of
    that size nor that all roundings have one sign is ever near: the bound leaves room for a few such sums in a row.
    """
    return terms * EPS * largest
