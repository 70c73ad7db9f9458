"""Distributed distillation of masked diffusion language models into few-step Infinite Mask Diffusion Models."""

__version__ = "0.1.0"
