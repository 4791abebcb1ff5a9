"""Diagnostics of attention: spectra against random-matrix theory."""

from attnzoo.diagnostics.spectrum import SpectrumRecord, analyze_attention, analyze_matrix

__all__ = ["SpectrumRecord", "analyze_attention", "analyze_matrix"]
