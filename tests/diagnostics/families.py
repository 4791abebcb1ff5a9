"""Small models of every text family that the installed transformers can build from its configuration alone."""

import importlib
import inspect
import logging
from contextlib import contextmanager
from pathlib import Path

import torch

SIZES = {
    "vocab_size": 64, "max_position_embeddings": 64, "n_positions": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "head_dim": 8, "num_key_value_heads": 2, "rotary_dim": 4, "embedding_size": 32,
    "word_embed_proj_dim": 32, "num_experts_per_tok": 2, "image_size": 16, "patch_size": 4,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embed_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "hidden_dim", "n_inner", "encoder_ffn_dim",
                     "decoder_ffn_dim"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads",
                     "decoder_attention_heads", "num_experts", "num_local_experts", "n_routed_experts"), 4),
}  # fmt: skip
NORMS = ("qk_layernorm", "use_qk_norm", "qk_norm")


def config_of(kind, **options):
    """A small configuration of a class of them; sizes that the class lacks are left out."""
    default = kind()
    sizes = {name: value for name, value in SIZES.items() if hasattr(default, name)}
    options = {name: value for name, value in options.items() if hasattr(default, name)}
    try:
        return kind(**sizes, **options)
    except Exception:  # Some families compute the width of their heads.
        return kind(**{name: value for name, value in sizes.items() if name != "head_dim"}, **options)


def shaken(model, seed=5, biases=True, dtype=torch.float64):
    """The model in eval mode, norm gains off 1, everything large enough to matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(parameter.nan_to_num().clamp(-1, 1))
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
            if not biases and "bias" in name:
                parameter.zero_()
    return torch.nn.Module.to(model, dtype).eval()


def model_of(name, biases=True, dtype=torch.float64, **options):
    """A small model by the name of its configuration, such as "Llama"."""
    import transformers

    config = config_of(getattr(transformers, f"{name}Config"), **options)
    with torch.device("meta"):
        size = sum(p.numel() for p in transformers.AutoModel.from_config(config).parameters())
    if size > 6e6:
        raise ValueError(f"{name} must be small, but its parts have sizes of their own: {size} parameters")
    torch.manual_seed(0)
    return shaken(transformers.AutoModel.from_config(config), biases=biases, dtype=dtype)


def text_families():
    """Names of all configurations whose base model takes tokens alone, by what is installed."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    text = set(MODEL_FOR_CAUSAL_LM_MAPPING.keys()) | set(MODEL_FOR_MASKED_LM_MAPPING.keys())
    return sorted(kind.__name__.removesuffix("Config") for kind in set(CONFIG_MAPPING.values()) & text)


def attention_classes():
    """All classes of transformers' model files that are named attention, with the configurations of their files."""
    import transformers

    root = Path(transformers.__file__).parent / "models"
    for path in sorted(root.glob("*/modeling_*.py")):
        try:
            file = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
        except ImportError:  # of a package that is not installed
            continue
        here = [value for value in list(vars(file).values()) if isinstance(value, type)]
        configs = [value for value in here if issubclass(value, transformers.PreTrainedConfig)]
        for cls in here:
            if issubclass(cls, torch.nn.Module) and cls.__module__ == file.__name__ and "Attention" in cls.__name__:
                yield cls, configs


def attention_of(cls, configs, **options):
    """One attention module of a class with the first of these configurations that fits, or None."""
    parameters = inspect.signature(cls.__init__).parameters
    keywords = {name: 0 for name in ("layer_idx", "layer_id") if name in parameters}
    for name, value in (("embed_dim", 32), ("hidden_size", 32), ("num_heads", 4), ("num_attention_heads", 4)):
        if name in parameters and parameters[name].default is inspect.Parameter.empty:
            keywords[name] = value
    for kind in configs:
        try:
            config = {"config": config_of(kind, **options)} if "config" in parameters else {}
            torch.manual_seed(0)
            return shaken(cls(**keywords, **config), biases=False)
        except Exception:  # a class of another kind, or sizes that its file refuses
            continue
    return None


@contextmanager
def quiet():
    """Without what transformers logs about configurations of such sizes."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
