"""Singular values of attention's matrices against the Marchenko-Pastur law."""
