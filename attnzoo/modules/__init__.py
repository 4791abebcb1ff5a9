"""One mechanism, one file that reads like its paper."""
