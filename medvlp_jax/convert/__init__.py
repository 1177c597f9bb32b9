"""Weights in from Hugging Face and back out: `load`, `load_into`, `save`."""

from medvlp_jax.convert.beside import image_processor
from medvlp_jax.convert.checkpoint import load, load_into, save
from medvlp_jax.convert.hub import fetch

__all__ = ["fetch", "image_processor", "load", "load_into", "save"]
