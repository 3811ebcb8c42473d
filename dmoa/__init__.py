"""dmoa: Differentiable Mixture-of-Agents (arXiv 2605.15706) as a system to train and serve.

Importing the package loads nothing heavy: torch, ray, transformers and the rest are loaded where they are used.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("dmoa")
except PackageNotFoundError:
    __version__ = "0+unknown"
