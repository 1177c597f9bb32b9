"""Weights in from Hugging Face and back out: `load`, `load_into`, `save`."""

from medvlp_jax.convert.checkpoint import fetch, image_processor, load, load_into, save

__all__ = ["fetch", "image_processor", "load", "load_into", "save"]
