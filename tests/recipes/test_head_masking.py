"""HeadMask: which heads, how many, when; gradients, resuming, and runs from the command line."""

import copy
import functools
import itertools

import lightning as L
import pytest
import torch
import torch.nn.functional as F

import attnzoo
from attnzoo.diagnostics.pruning.importance import head_importance
from attnzoo.diagnostics.pruning.masks import masked_heads
from attnzoo_recipes.callbacks.head_mask import HeadMask, masked, most_important
from attnzoo_recipes.lm import DecoderLM
from tests import golden_decoder
from tests.golden_decoder import WITHIN, next_token_losses, pairs

LAYERS, HEADS, V = 3, 4, 11


@pytest.fixture(scope="module")
def stored():
    return golden_decoder.load()


@pytest.fixture(scope="module")
def decoder(stored):
    return golden_decoder.build(stored)


@pytest.fixture(scope="module")
def batch(stored):
    return golden_decoder.examples(stored)


class Module(L.LightningModule):
    """A decoder of 3 layers of 4 heads that notes what every step masks and computes."""

    def __init__(self, attention=attnzoo.MultiHeadAttention, dropout=0.0, lr=0.1, **options):
        super().__init__()
        torch.manual_seed(0)
        made = functools.partial(attention, num_heads=HEADS, **options)
        self.model = DecoderLM(V, made, embed_dim=16, num_layers=LAYERS, dropout=dropout)
        self.register_buffer("count", torch.zeros(()))
        self.lr, self.masks, self.losses, self.grads, self.logged = lr, [], [], [], 0

    def forward(self, tokens):
        return self.model(tokens)

    def training_step(self, tokens):
        self.count += 1
        loss = F.cross_entropy(self.model(tokens)[:, :-1].mT, tokens[:, 1:])
        self.log("loss", loss)
        return loss

    def log(self, *values, **options):
        self.logged += 1
        super().log(*values, **options)

    def on_after_backward(self):
        self.grads.append({name: p.grad.clone() for name, p in self.named_parameters()})

    def on_train_batch_end(self, outputs, *_):
        (callback,) = [c for c in self.trainer.callbacks if isinstance(c, HeadMask)] or [None]
        self.losses.append(outputs["loss"].item())
        self.masks.append(None if callback is None or callback.mask is None else callback.mask.clone())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)


def batches(n, size=2):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(V, (size, 8), generator=generator) for _ in range(n)]


def fit(module, callback, steps, tmp_path, checkpoint=None, resume=None, **options):
    trainer = L.Trainer(
        accelerator="cpu", max_steps=steps, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, callbacks=[] if callback is None else [callback],
        **options,
    )  # fmt: skip
    data = torch.utils.data.DataLoader(batches(64), batch_size=None)
    trainer.fit(module, data, ckpt_path=resume)
    if checkpoint is not None:
        trainer.save_checkpoint(checkpoint)
    return module


@pytest.fixture(autouse=True)
def quiet_lightning():
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        warnings.filterwarnings("ignore", ".*LeafSpec.*is deprecated.*")
        warnings.filterwarnings("ignore", ".*dataloader is not resumable.*")
        yield


# Which heads


def test_stored_figures(stored, decoder, batch):
    t, meta = stored
    n, everything = meta["config"]["headmask_n"], torch.ones(3, 4, dtype=torch.bool)
    importance = head_importance(decoder, [batch], next_token_losses, granularity="batch", normalize=None)
    chosen = most_important(importance, n, everything)
    assert torch.equal(chosen, t["output.headmask_important"])
    for rescale, key in ((False, "headmask_important_loss"), (True, "headmask_important_rescaled_loss")):
        with masked_heads(decoder, masked(chosen, everything, rescale=rescale).double()):
            loss = next_token_losses(decoder, batch).mean().item()
        # The factors are float32 in training: 12 / 9 is not exact there.
        assert loss == pytest.approx(t[f"output.{key}"].item(), abs=1e-6 if rescale else WITHIN)


def test_the_callback_masks_the_stored_heads(stored, decoder, batch, tmp_path):
    t, meta = stored
    module = Module()
    module.model = copy.deepcopy(decoder)
    module.training_step = lambda batch, batch_idx: next_token_losses(module.model, batch).mean()
    callback = HeadMask(meta["config"]["headmask_n"], mode="important")
    trainer = L.Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, callbacks=[callback],
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader([batch], batch_size=None))
    assert set(pairs((callback.mask == 0).nonzero())) == set(pairs(t["output.headmask_important"]))
    assert module.losses[0] == pytest.approx(t["output.headmask_important_loss"].item(), abs=WITHIN)


def test_every_step_masks_n_heads_and_the_loss_is_the_masked_one(tmp_path):
    module = Module(lr=0.0)
    fit(module, HeadMask(5), 6, tmp_path)
    assert [int((mask == 0).sum()) for mask in module.masks] == [5] * 6
    assert len({tuple(mask.flatten().tolist()) for mask in module.masks}) > 1
    module.eval()
    for mask, loss, tokens in zip(module.masks, module.losses, batches(6), strict=True):
        with masked_heads(module, mask):
            expected = F.cross_entropy(module(tokens)[:, :-1].mT, tokens[:, 1:])
        assert loss == pytest.approx(expected.item(), abs=1e-6)


def test_random_masks_take_every_head_equally_often(tmp_path):
    from scipy.stats import chi2

    steps, n = 600, 3
    callback = HeadMask(n)
    module = Module()
    fit(module, callback, 1, tmp_path)
    counts = torch.zeros(LAYERS, HEADS)
    for _ in range(steps):
        counts += callback._draw(None, None, None, 0) == 0
    expected = steps * n / (LAYERS * HEADS)
    # Drawn without replacement: the variance is that of the multinomial times (M - n) / (M - 1).
    statistic = ((counts - expected) ** 2 / expected).sum() * (LAYERS * HEADS - 1) / (LAYERS * HEADS - n)
    assert chi2.sf(float(statistic), LAYERS * HEADS - 1) > 0.001


def test_bernoulli_masks_keep_the_expected_output(tmp_path):
    callback = HeadMask(mode="bernoulli", p=0.25)
    fit(Module(), callback, 1, tmp_path)
    masks = torch.stack([callback._draw(None, None, None, 0) for _ in range(2000)])
    assert masks.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    torch.testing.assert_close(masks.mean(0), torch.ones(LAYERS, HEADS), atol=0.07, rtol=0)


@pytest.mark.parametrize("mode", ["random", "important"])
def test_rescaled_survivors_and_excluded_layers(mode, tmp_path):
    module = Module()
    fit(module, HeadMask(2, mode=mode, rescale=True, exclude_layers=[1]), 3, tmp_path)
    for mask in module.masks:
        assert mask[1].tolist() == [1.0] * 4
        assert sorted(mask[[0, 2]].flatten().tolist()) == [0.0] * 2 + [pytest.approx(8 / 6)] * 6


def test_the_default_is_an_eighth_of_the_heads(tmp_path):
    module = Module()
    fit(module, HeadMask(), 1, tmp_path)
    assert int((module.masks[0] == 0).sum()) == round(12 / 8)


# Important heads


def test_important_heads_are_those_of_this_batch(tmp_path):
    module = Module(lr=0.0)
    fit(module, HeadMask(4, mode="important"), 4, tmp_path)
    for mask, tokens in zip(module.masks, batches(4), strict=True):
        xi = torch.ones(LAYERS, HEADS, requires_grad=True)
        with masked_heads(module, xi):
            loss = F.cross_entropy(module(tokens)[:, :-1].mT, tokens[:, 1:])
        (grad,) = torch.autograd.grad(loss, xi)
        assert set(grad.abs().flatten().topk(4).indices.tolist()) == set((mask == 0).flatten().nonzero()[:, 0].tolist())


@pytest.mark.parametrize("mode", ["random", "important"])
def test_masked_heads_get_no_gradient_and_the_rest_that_of_the_masked_pass(mode, tmp_path):
    module = Module(lr=0.0)
    fit(module, HeadMask(4, mode=mode), 2, tmp_path)
    module.eval()
    for mask, grads, tokens in zip(module.masks, module.grads, batches(2), strict=True):
        for layer in range(LAYERS):
            for part in "qkv":
                rows = grads[f"model.blocks.{layer}.attn.{part}_proj.weight"].view(HEADS, -1)
                assert (rows.abs().sum(1) == 0).tolist() == (mask[layer] == 0).tolist()
        module.zero_grad()
        with masked_heads(module, mask):
            F.cross_entropy(module(tokens)[:, :-1].mT, tokens[:, 1:]).backward()
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(grads[name], parameter.grad, msg=name)


def test_the_first_pass_leaves_no_trace(tmp_path):
    # Random draws, buffers and logs are those of a run whose masks were given.
    module, replayed = Module(dropout=0.3), Module(dropout=0.3)
    torch.manual_seed(5)
    fit(module, HeadMask(4, mode="important"), 4, tmp_path)
    masks, given = iter(module.masks), HeadMask(4)
    given._draw = lambda *_: next(masks)
    torch.manual_seed(5)
    fit(replayed, given, 4, tmp_path)
    assert module.losses == replayed.losses
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), replayed.parameters(), strict=True))
    assert module.count == module.logged == 4


# When


@pytest.mark.parametrize("callback", [HeadMask(0), HeadMask(0, mode="important"), HeadMask(mode="bernoulli", p=0.0)])
def test_nothing_masked_is_plain_training(callback, tmp_path):
    plain, none = Module(dropout=0.2), Module(dropout=0.2)
    torch.manual_seed(3)
    fit(plain, None, 4, tmp_path)
    torch.manual_seed(3)
    fit(none, callback, 4, tmp_path)
    assert none.losses == plain.losses
    assert all(torch.equal(a, b) for a, b in zip(none.parameters(), plain.parameters(), strict=True))


def test_masks_are_off_in_eval_mode_and_gone_after_training(tmp_path):
    seen = []

    class Watched(Module):
        def on_train_batch_end(self, *_):
            self.eval()
            with torch.no_grad():
                seen.append(torch.equal(self(batches(1)[0]), copy.deepcopy(self.model)(batches(1)[0])))
                hooks = [len(block.attn.o_proj._forward_pre_hooks) for block in self.model.blocks]
                plain = copy.deepcopy(self.model)
                for block in plain.blocks:
                    block.attn.o_proj._forward_pre_hooks.clear()
                seen.append(torch.equal(self(batches(1)[0]), plain(batches(1)[0])) and hooks == [1] * LAYERS)
            self.train()

    module = fit(Watched(), HeadMask(6), 2, tmp_path)
    assert seen == [True] * 4
    assert not any(block.attn.o_proj._forward_pre_hooks for block in module.model.blocks)


def test_hooks_go_with_an_exception(tmp_path):
    class Failing(Module):
        def training_step(self, tokens):
            raise RuntimeError("no step")

    module = Failing()
    with pytest.raises(RuntimeError, match="no step"):
        fit(module, HeadMask(3), 2, tmp_path)
    assert not any(block.attn.o_proj._forward_pre_hooks for block in module.model.blocks)


def test_a_mask_stays_for_some_steps_and_for_all_micro_batches(tmp_path):
    module = Module()
    fit(module, HeadMask(4, every_n_steps=2), 6, tmp_path)
    masks = [tuple(mask.flatten().tolist()) for mask in module.masks]
    assert [a == b for a, b in itertools.pairwise(masks)] == [True, False, True, False, True]
    module = Module()
    fit(module, HeadMask(4), 2, tmp_path, accumulate_grad_batches=2)
    masks = [tuple(mask.flatten().tolist()) for mask in module.masks]
    assert [a == b for a, b in itertools.pairwise(masks)] == [True, False, True]


def test_important_heads_of_every_micro_batch(tmp_path):
    accumulated, single = Module(lr=0.0), Module(lr=0.0)
    fit(accumulated, HeadMask(4, mode="important"), 2, tmp_path, accumulate_grad_batches=2)
    fit(single, HeadMask(4, mode="important"), 4, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(accumulated.masks, single.masks, strict=True))


@pytest.mark.parametrize("callback", [lambda: HeadMask(4, every_n_steps=2), lambda: HeadMask(mode="bernoulli", p=0.3)])
def test_a_resumed_run_masks_the_same_heads(callback, tmp_path):
    whole = Module()
    fit(whole, callback(), 8, tmp_path)
    fit(Module(), callback(), 3, tmp_path, checkpoint=tmp_path / "some.ckpt")
    rest = Module()
    fit(rest, callback(), 8, tmp_path, resume=tmp_path / "some.ckpt")
    assert len(rest.masks) == 5
    assert all(torch.equal(a, b) for a, b in zip(rest.masks, whole.masks[3:], strict=True))


def test_masks_do_not_depend_on_other_random_numbers(tmp_path):
    one, two = Module(), Module()
    torch.manual_seed(1)
    fit(one, HeadMask(4, seed=7), 4, tmp_path)
    torch.manual_seed(2)
    fit(two, HeadMask(4, seed=7), 4, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(one.masks, two.masks, strict=True))
    other = fit(Module(), HeadMask(4, seed=8), 4, tmp_path)
    assert not all(torch.equal(a, b) for a, b in zip(one.masks, other.masks, strict=True))


def test_compiled_and_recomputing_models_see_the_masks(tmp_path):
    plain, compiled, recomputing = Module(), Module(), Module()
    compiled.model.compile(backend="eager")
    recomputing.model.activation_checkpointing = True
    for module in (plain, compiled, recomputing):
        fit(module, HeadMask(5), 4, tmp_path)
    assert compiled.losses == pytest.approx(plain.losses, abs=1e-6)
    assert recomputing.losses == pytest.approx(plain.losses, abs=1e-6)


@pytest.mark.parametrize("mode", ["random", "important"])
def test_from_the_command_line(mode, arguments, run, tmp_path, capsys):
    callback = [
        "--trainer.callbacks+=attnzoo_recipes.callbacks.head_mask.HeadMask",
        "--trainer.callbacks.num_masked=2",
        f"--trainer.callbacks.mode={mode}",
    ]
    run(arguments("gqa", *callback))
    (path,) = (tmp_path / "run").rglob("*.ckpt")
    saved = torch.load(path, weights_only=True)["callbacks"]["HeadMask"]
    assert int((saved["mask"] == 0).sum()) == 2


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "all"}, "mode must be 'random', 'important' or 'bernoulli', got 'all'"),
        ({"num_masked": -1}, "num_masked must not be negative, got -1"),
        ({"num_masked": 2.5}, "num_masked must be an integer, got 2.5"),
        ({"fraction": "a"}, r"fraction must lie in \[0, 1\), got 'a'"),
        ({"every_n_steps": 1.5}, "every_n_steps must be an integer, got 1.5"),
        ({"seed": "a"}, "seed must be an integer, got 'a'"),
        ({"rescale": "yes"}, "rescale must be True or False, got 'yes'"),
        ({"exclude_layers": 1}, "exclude_layers must be several integers, got 1"),
        ({"exclude_layers": [0.5]}, "exclude_layers must be integers, got 0.5"),
        ({"mode": "bernoulli", "p": "a"}, r"p must lie in \[0, 1\) in mode 'bernoulli', got a"),
        ({"num_masked": 1, "fraction": 0.1}, "num_masked and fraction exclude each other, got 1 and 0.1"),
        ({"fraction": 1.0}, r"fraction must lie in \[0, 1\), got 1.0"),
        ({"every_n_steps": 0}, "every_n_steps must be at least 1, got 0"),
        ({"p": 0.5}, "p needs mode 'bernoulli', got mode 'random'"),
        ({"mode": "bernoulli"}, r"p must lie in \[0, 1\) in mode 'bernoulli', got None"),
        ({"mode": "bernoulli", "p": 0.1, "rescale": True}, "mode 'bernoulli' takes p, and neither"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        HeadMask(**options)


@pytest.mark.parametrize(
    ("callback", "options", "message"),
    [
        (HeadMask(12), {}, "num_masked must leave a head of the 12 that may be masked, got 12"),
        (HeadMask(exclude_layers=[3]), {}, "exclude_layers must lie between 0 and 2, got 3"),
        (HeadMask(exclude_layers=[0, 1, 2]), {}, "exclude_layers must leave a layer to mask"),
        (
            HeadMask(2, mode="important", every_n_steps=2),
            {"accumulate_grad_batches": 2},
            "mode 'important' with accumulated gradients needs every_n_steps=1",
        ),
    ],
)
def test_refusals_when_training_starts(callback, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        fit(Module(), callback, 1, tmp_path, **options)


def test_torch_attention_is_refused(tmp_path):
    module = Module()
    module.model = torch.nn.TransformerEncoderLayer(16, 4, 16, batch_first=True)
    with pytest.raises(ValueError, match="takes no hooks on its heads"):
        fit(module, HeadMask(1), 1, tmp_path)
