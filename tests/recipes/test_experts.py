"""BlockCoordinateDescent: who moves in which step, phases outside steps, and a run from the command line."""

import functools

import lightning as L
import pytest
import torch
import torch.nn.functional as F

import attnzoo
from attnzoo_recipes.callbacks.experts import BlockCoordinateDescent
from attnzoo_recipes.checkpointing import read_checkpoint
from attnzoo_recipes.lm import DecoderLM

V = 11
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
]


class Module(L.LightningModule):
    """A small decoder that notes its phase and what each step moves; AdamW has moments and weight decay."""

    def __init__(self, scheme="bcd", attention=attnzoo.MixtureOfAttentiveExperts):
        super().__init__()
        torch.manual_seed(0)
        options = {"training_scheme": scheme, "gate_hidden": 8} if scheme else {}
        self.model = DecoderLM(V, functools.partial(attention, num_heads=4, **options), embed_dim=16, num_layers=2)
        self.phases, self.moved = [], []

    def training_step(self, tokens):
        self.phases.append({layer.phase for layer in self.model.modules() if hasattr(layer, "phase")})
        return F.cross_entropy(self.model(tokens)[:, :-1].mT, tokens[:, 1:])

    def on_train_batch_start(self, *_):
        self.before = {name: p.detach().clone() for name, p in self.named_parameters()}

    def on_train_batch_end(self, *_):
        moved = {name for name, p in self.named_parameters() if not torch.equal(p, self.before[name])}
        self.moved.append(moved)

    def validation_step(self, tokens):
        assert {layer.phase for layer in self.model.modules() if hasattr(layer, "phase")} == {"mixture"}

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2, weight_decay=0.5)


def fit(module, tmp_path, callback, **options):
    torch.manual_seed(1)
    data = torch.utils.data.DataLoader(torch.randint(V, (24, 10)), batch_size=2)
    trainer = L.Trainer(
        max_steps=6, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, callbacks=[callback], num_sanity_val_steps=0,
        val_check_interval=2, **options,
    )  # fmt: skip
    trainer.fit(module, data, data)


def test_a_step_moves_the_gates_or_all_the_rest(tmp_path):
    module = Module()
    fit(module, tmp_path, BlockCoordinateDescent(every_n_steps=3), gradient_clip_val=1.0)
    assert module.phases == [{"expert"}, {"expert"}, {"mixture"}] * 2
    gates = {name for name, _ in module.named_parameters() if ".gate_fc" in name}
    assert len(gates) == 8
    for step, moved in enumerate(module.moved):
        assert moved
        if step % 3 == 2:
            assert moved <= gates
        else:
            assert not moved & gates
            assert {name for name in moved if ".q_proj" in name}
    assert module.moved[5] == gates


@pytest.mark.parametrize(
    ("scheme", "attention"), [("joint", attnzoo.MixtureOfAttentiveExperts), (None, attnzoo.MultiHeadAttention)]
)
def test_a_model_with_nothing_to_alternate_is_refused(scheme, attention, tmp_path):
    with pytest.raises(ValueError, match="needs attention layers with training_scheme 'bcd', got none"):
        fit(Module(scheme, attention), tmp_path, BlockCoordinateDescent())


def test_a_period_without_steps_of_the_experts_is_refused():
    with pytest.raises(ValueError, match="every_n_steps must be at least 2, got 1"):
        BlockCoordinateDescent(1)


def test_a_run_from_the_command_line(arguments, run, tmp_path):
    callback = "--trainer.callbacks+=attnzoo_recipes.callbacks.experts.BlockCoordinateDescent"
    scheme = "--model.attention.init_args.training_scheme=bcd"
    run(arguments("mae", scheme, callback, "--trainer.callbacks.every_n_steps=2", steps=2))
    assert read_checkpoint(tmp_path / "run")["global_step"] == 2
