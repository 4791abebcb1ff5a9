"""From text to batches: corpora, tokenizers, packed token files, order of samples."""
