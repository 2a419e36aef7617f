"""The CPU reference in plain PyTorch: the oracle of the tests and the backend where there is no GPU.

Where several threads share a call (:mod:`threads`), OpenMP's spin while they wait for each other at its end, so that
one core that is busy with something else holds up all of them at every call. They sleep instead, unless
``OMP_WAIT_POLICY`` says otherwise; OpenMP reads it once, when PyTorch is loaded.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
