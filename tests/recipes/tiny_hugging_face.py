"""Hugging Face folders of random models with a tokenizer of a few words."""

import torch

WORDS = "the cat sat on a mat and the dog ran to see what it was that had found under its ; [PAD] [UNK] [CLS] [SEP]"


def tokenizer(around):
    """One token a word; with `around`, [CLS] and [SEP] stand around a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = list(dict.fromkeys(["[PAD]", *WORDS.split()]))
    numbers = {name: i for i, name in enumerate(names)}
    made = Tokenizer(models.WordLevel(numbers, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]"}
    if around:
        made.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[(name, numbers[name]) for name in ("[CLS]", "[SEP]")]
        )
        special |= {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def llama(folder):
    """A decoder of 2 layers with 4 query and 2 key/value heads; (folder, model, tokenizer)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=12, vocab_size=64, max_position_embeddings=256, initializer_range=0.2,
    )  # fmt: skip
    return _saved(folder, LlamaForCausalLM(config), tokenizer(around=False))


def bert(folder):
    """An encoder of 2 layers with 3 heads; (folder, model, tokenizer)."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(2)
    config = BertConfig(
        hidden_size=36, intermediate_size=48, num_hidden_layers=2, num_attention_heads=3, vocab_size=64,
        max_position_embeddings=40, initializer_range=0.2,
    )  # fmt: skip
    return _saved(folder, BertModel(config, add_pooling_layer=False), tokenizer(around=True))


def _saved(folder, model, words):
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder, model.eval(), words
