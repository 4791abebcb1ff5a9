"""Diagnostics of attention: spectra against random-matrix theory."""

from attnzoo.diagnostics import similarity
from attnzoo.diagnostics.spectrum import SpectrumRecord, analyze_attention, analyze_matrix
from attnzoo.diagnostics.weightwatcher import ww_dataframe, ww_details

__all__ = ["SpectrumRecord", "analyze_attention", "analyze_matrix", "similarity", "ww_dataframe", "ww_details"]
