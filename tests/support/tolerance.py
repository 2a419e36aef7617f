"""How far fp32 arithmetic may be from exact arithmetic, or from itself in another order."""

from __future__ import annotations

from typing import Any

import numpy as np

EPS = float(np.finfo(np.float32).eps)
#: Products that are summed on the way to a logit of a model of hf_models, 3 layers of at most about 1,100 each: QKV,
#: scores, values, the output projection, both of the MLP's.
_MODEL_TERMS = 3300
#: The same of the example's 4 layers, with scores and values of up to 512 tokens.
_EXAMPLE_TERMS = 4 * (160 + 128 + 512 + 512 + 160 + 432)


def sum_rounding(terms: int, largest: float) -> float:
    """Bound of an fp32 sum's rounding, in any order, of so many terms of at most ``largest``: n · eps · max|term|.

    Each addition rounds a partial sum by eps / 2 of it at most; that all partial sums are of the size of n terms, with
    all roundings of one sign, is never near, which leaves room for several such sums in a row.
    """
    return terms * EPS * largest


def chain_rounding(terms: int, largest: float) -> float:
    """Of sums that feed each other, of so many terms together: 8 · eps · sqrt(n) of the largest result.

    Roundings of eps have signs of their own and add up as the steps of a random walk do; 8 is for what nonlinear
    functions between the sums make of them, and for the largest of many results.
    """
    return 8 * EPS * terms**0.5 * largest


def model_rounding(logits: Any) -> float:
    """Of logits, an array or a tensor, of a random model of hf_models."""
    return chain_rounding(_MODEL_TERMS, float(abs(logits).max()))


def example_rounding(logits: Any) -> float:
    """Of logits, or log-probabilities, of the example model."""
    return chain_rounding(_EXAMPLE_TERMS, float(abs(logits).max()))
