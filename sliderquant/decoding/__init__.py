"""Decoding in `generate`: one CUDA graph per token in place of some hundred launches from Python."""

from sliderquant.decoding.runner import DecodeRunner, attach_decode_runner

__all__ = ["DecodeRunner", "attach_decode_runner"]
