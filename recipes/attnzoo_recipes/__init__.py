"""attnzoo_recipes: train a decoder language model on real text and swap its attention mechanism.

`lm` is the decoder, `data` the text, `training` loss, optimiser and schedule, `pretrain` and `generate` the
two commands. Nothing is imported here, so that a part can be used without the others' dependencies.
"""
