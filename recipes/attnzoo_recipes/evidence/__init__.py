"""Claims of papers, their protocols at small scale, and verdicts by rules that are fixed before the runs."""
