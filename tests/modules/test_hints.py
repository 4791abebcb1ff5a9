"""What a call with arguments of other libraries is told, what printing shows, and starts that survive."""

import inspect
import re
import sys

import pytest
import torch
from torch import nn

import attnzoo
from attnzoo.modules.hints import HINTS
from tests import zoo

x = torch.randn(2, 6, zoo.E).double()
OTHERS = {
    "attn_mask": "mask=, a boolean tensor", "key_padding_mask": "mask=AttentionMask.padding",
    "need_weights": "diagnostics.capture", "is_causal": "causal= to the constructor", "key": "context=",
}  # fmt: skip
NAMES = (*zoo.MECHANISMS, "chai")


def built(name):
    return attnzoo.ClusteredHeadAttention(zoo.build("mha"), 2) if name == "chai" else zoo.build(name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("argument", OTHERS)
def test_arguments_of_other_libraries_get_a_hint(name, argument):
    module = built(name).eval()
    message = rf"^{type(module).__name__}\(\) got an unexpected keyword argument '{argument}'; in place of {argument}, "
    with torch.no_grad(), pytest.raises(TypeError, match=message + ".*" + re.escape(OTHERS[argument])):
        module(x, **{argument: None})


def test_the_class_that_was_called_is_named():
    module = attnzoo.MultiHeadAttention(16, 2)
    with pytest.raises(TypeError, match=r"^MultiHeadAttention\(\) missing a required argument: 'x'$"):
        module()
    with pytest.raises(TypeError, match=r"^MultiHeadAttention\(\) too many positional arguments; .* give context="):
        module(torch.randn(1, 3, 16), torch.randn(1, 3, 16), torch.randn(1, 3, 16))
    with pytest.raises(TypeError, match=r"^MultiHeadAttention\(\) got an unexpected keyword argument 'msk'$"):
        module(torch.randn(1, 3, 16), msk=None)


def test_other_type_errors_stay_as_they_are():
    def broken(*_):
        raise TypeError("mine")

    module = attnzoo.MultiHeadAttention(16, 2)
    module.o_proj.register_forward_hook(broken)
    with pytest.raises(TypeError, match=r"^mine$"):
        module(torch.randn(1, 3, 16))


def test_every_hint_is_of_an_argument_that_no_mechanism_takes():
    for name in NAMES:
        assert not HINTS.keys() & inspect.signature(built(name).forward).parameters.keys()


class Deep(nn.Module):
    """How many Python frames are on the stack when its forward runs."""

    def forward(self, x):
        self.frames, frame = 0, sys._getframe()
        while frame is not None:
            self.frames, frame = self.frames + 1, frame.f_back
        return x


class Hinted(attnzoo.modules.hints.HintedCall, Deep):
    pass


def test_hints_add_no_frame():
    plain, hinted = Deep(), Hinted()
    plain(x), hinted(x)
    assert plain.frames == hinted.frames
    assert plain.frames > 2


def test_tracers_that_patch_the_call_see_the_module():
    class Leaves(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, attnzoo.MultiHeadAttention) or super().is_leaf_module(module, name)

    model = nn.Sequential(nn.Linear(16, 16), attnzoo.MultiHeadAttention(16, 2))
    calls = [node.target for node in Leaves().trace(model).nodes if node.op == "call_module"]
    assert calls == ["0", "1"]


@pytest.mark.parametrize("name", NAMES)
def test_printing_shows_the_sizes_of_every_part(name):
    for part in built(name).modules():
        line = repr(part).partition("\n")[0] + part.extra_repr()
        for key, parameter in part.named_parameters(recurse=False):
            sizes = tuple(parameter.shape)
            # Linear layers, norms and convolutions have forms of their own.
            known = isinstance(part, nn.Linear | nn.RMSNorm) or line.startswith(("CausalConvolution", "HeadNorm"))
            assert known or f"{key}={sizes}" in line, (line, key, sizes)


@pytest.mark.parametrize("name", [name for name in zoo.MECHANISMS if name.startswith(("dcmha", "kha"))])
def test_starts_survive_an_initialisation_of_linear_layers(name):
    def init_weights(module):
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)

    module = built(name)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    module.apply(init_weights)
    changed = [key for key, value in module.state_dict().items() if not torch.equal(value, before[key])]
    assert changed
    assert not [key for key in changed if "dyn." in key or "knock." in key or "base" in key], changed


@pytest.mark.parametrize("name", ["mha", "mla", "linear", "dcmha"])
def test_additive_masks_are_refused_with_the_way_to_do_it(name):
    module, additive = built(name).eval(), torch.zeros(6, 6).double()
    with pytest.raises(ValueError, match=r"mask must be boolean .*, got torch.float64; .*, give mask == 0"):
        module(x, mask=additive)


def test_compilation_counts_each_class_alone():
    ids = {id(type(built(name)).__call__.__code__) for name in NAMES}
    assert len(ids) == len({type(built(name)) for name in NAMES})
