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


def family(name):
    """A random model of 2 layers (in each part) with 4 heads in eval mode, and 6 examples of tensors that it takes."""
    import transformers as t

    torch.manual_seed(3)
    ids, classes = torch.randint(3, 64, (6, 9)), torch.randint(3, (6,))
    special = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    targets = torch.randint(3, 64, (6, 7))
    if name == "vit":
        config = t.ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16,
            patch_size=4, num_labels=5, initializer_range=0.2,
        )  # fmt: skip
        model = t.ViTForImageClassification(config)
        tensors = {"pixel_values": torch.randn(6, 3, 16, 16), "labels": torch.randint(5, (6,))}
    elif name == "whisper":
        config = t.WhisperConfig(
            d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=15, max_target_positions=16,
            init_std=0.2, decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None, **special,
        )  # fmt: skip
        model = t.WhisperForConditionalGeneration(config)
        tensors = {"input_features": torch.randn(6, 8, 30), "labels": targets}
    elif name == "t5":
        config = t.T5Config(
            d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=1, **special
        )  # fmt: skip
        model, tensors = t.T5ForConditionalGeneration(config), {"input_ids": ids, "labels": targets}
    elif name == "gpt2":
        config = t.GPT2Config(
            n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2, **special
        )  # fmt: skip
        model, tensors = t.GPT2LMHeadModel(config), {"input_ids": ids}
    elif name == "deepseek":
        config = t.DeepseekV3Config(
            hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2, kv_lora_rank=12,
            q_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, first_k_dense_replace=1,
            max_position_embeddings=64, initializer_range=0.2, n_shared_experts=1, **special,
        )  # fmt: skip
        model, tensors = t.DeepseekV3ForCausalLM(config), {"input_ids": ids}
    else:
        config = t.DistilBertConfig(
            vocab_size=64, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=64, num_labels=3,
            initializer_range=0.2,
        )  # fmt: skip
        model = t.DistilBertForSequenceClassification(config)
        tensors = {"input_ids": ids, "labels": classes}
    return model.eval(), tensors
