"""Random states, steps that are not finite, and signals, each against an uninterrupted run of a tiny model."""

import contextlib
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader

from attnzoo_recipes.callbacks.resilience import GracefulStop, LossGuard, RandomStates, RunStoppedError
from attnzoo_recipes.checkpointing import AtomicCheckpointIO, newest_valid, read_checkpoint, verify
from attnzoo_recipes.random_states import random_states

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '(train|val)_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
]

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["attnzoo_recipes.callbacks.resilience", "attnzoo_recipes.checkpointing"])


class Tiny(L.LightningModule):
    """Dropout, and a loss that draws from every generator; the data of a step depend on its number alone."""

    def __init__(self, fused=True, spoil=None):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.layers = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 1))
        self.inputs = torch.randn(100, 4, 8, generator=generator)
        self.fused = fused
        self.spoil = spoil
        self.losses = {}
        self.validated = []

    def training_step(self, batch, batch_idx):
        noise = random.random() + np.random.rand() + torch.rand(())
        loss = (self.layers(self.inputs[batch_idx % 100]) - noise).square().mean()
        if self.spoil is not None:
            loss = self.spoil(self, loss, batch_idx)
        self.losses[batch_idx] = loss.item()
        return loss

    def validation_step(self, batch, batch_idx):
        self.validated.append((self.global_step, batch_idx))
        torch.rand(3)
        random.random()

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01, fused=self.fused)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def train_dataloader(self):
        return DataLoader([{"index": torch.tensor(1000 + i)} for i in range(2000)], batch_size=1)

    def val_dataloader(self):
        return DataLoader(range(3), batch_size=1)


def trainer(folder, max_steps, *callbacks, **options):
    options = {"accelerator": "cpu", "devices": 1, "num_sanity_val_steps": 0, "limit_val_batches": 0} | options
    return L.Trainer(
        max_steps=max_steps, callbacks=list(callbacks), default_root_dir=folder, logger=False,
        plugins=[AtomicCheckpointIO(), *options.pop("plugins", [])], enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        **options,
    )  # fmt: skip


def seed(value=0):
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def saver(folder, every):
    return ModelCheckpoint(folder / "checkpoints", every_n_train_steps=every, save_top_k=-1)


def weights(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


# random states


def straight(folder, steps, **options):
    seed()
    model = Tiny()
    trainer(folder / "straight", steps, RandomStates(), **options).fit(model)
    return model


def resumed(folder, steps, stop, *callbacks, **options):
    """Train to `stop`, then go on from the checkpoint in what might be a new process."""
    callbacks = (*callbacks, saver(folder, stop))
    seed()
    trainer(folder, stop, *callbacks, **options).fit(Tiny())
    seed(99)
    model = Tiny()
    trainer(folder, steps, *callbacks, **options).fit(model, ckpt_path=newest_valid(folder))
    return model


VALIDATION = {"val_check_interval": 3, "check_val_every_n_epoch": None, "limit_val_batches": 2}


@pytest.mark.parametrize("options", [{}, VALIDATION], ids=["plain", "validation after the checkpoint"])
def test_resuming_with_dropout_is_bit_exact(tmp_path, options):
    expected = straight(tmp_path, 8, **options)
    model = resumed(tmp_path, 8, 3, RandomStates(), **options)
    assert model.losses == {step: loss for step, loss in expected.losses.items() if step >= 3}
    assert equal(weights(model), weights(expected))


def test_without_the_callback_resuming_is_not_exact(tmp_path):
    assert not equal(weights(resumed(tmp_path, 8, 3)), weights(straight(tmp_path, 8)))


def test_validation_changes_no_later_draw(tmp_path):
    assert straight(tmp_path, 7).losses == straight(tmp_path, 7, **VALIDATION).losses


def test_what_other_callbacks_draw_after_validation_changes_no_later_draw(tmp_path):
    class Drawing(L.Callback):
        def on_validation_end(self, *arguments):
            torch.rand(3)

    losses = []
    for callbacks in ([RandomStates()], [RandomStates(), Drawing()]):
        seed()
        model = Tiny()
        trainer(tmp_path, 7, *callbacks, **VALIDATION).fit(model)
        losses.append(model.losses)
    assert losses[0] == losses[1]


def test_states_load_as_plain_data(tmp_path):
    seed()
    trainer(tmp_path, 2, RandomStates(), saver(tmp_path, 2)).fit(Tiny())
    states = read_checkpoint(tmp_path)["callbacks"]["RandomStates"]
    assert len(states["ranks"]) == 1
    assert set(states["ranks"][0]) == {"python", "torch", "cuda", "numpy"}


def test_another_seed_has_no_effect_and_is_said_to_have_none(tmp_path, monkeypatch):
    seeds = []
    for number, steps in enumerate((2, 3, 4)):
        monkeypatch.setenv("PL_GLOBAL_SEED", str(5 + number))
        path = newest_valid(tmp_path)
        said = [] if path is None else [f"seed_everything {5 + number} has no effect.*whose seed was 5"]
        with contextlib.ExitStack() as stack:
            for match in said:
                stack.enter_context(pytest.warns(UserWarning, match=match))
            trainer(tmp_path, steps, RandomStates(), saver(tmp_path, 1)).fit(Tiny(), ckpt_path=path)
        seeds.append(read_checkpoint(newest_valid(tmp_path))["callbacks"]["RandomStates"]["seed"])
    assert seeds == ["5"] * 3


@pytest.mark.parametrize("saved", [4, 3, 0], ids=["the same processes", "other processes", "a new run"])
@pytest.mark.filterwarnings("ignore:The checkpoint holds the random states of")
def test_processes_that_share_heads_draw_alike(saved):
    states = []
    for number in range(saved):
        seed(number)
        states.append(RandomStates().state_dict()["ranks"][0])
    drawn = []
    for rank in range(4):
        callback = RandomStates()
        if saved:
            callback.load_state_dict({"ranks": states})
        seed(9)
        strategy = SimpleNamespace(tensor_parallel_size=2)
        callback.on_train_batch_start(SimpleNamespace(global_rank=rank, world_size=4, strategy=strategy))
        drawn.append(float(torch.rand(())))
        # Later batches are not seeded again.
        after = random_states()["torch"]
        callback.on_train_batch_start(SimpleNamespace(global_rank=rank, world_size=4, strategy=strategy))
        assert torch.equal(random_states()["torch"], after)
    assert drawn[0] == drawn[1] != drawn[2] == drawn[3]
    if not saved:
        seed(9)
        assert drawn[0] == float(torch.rand(())), "the first process draws as one alone"


def test_another_number_of_processes_is_seeded_alike_every_time(tmp_path):
    seed()
    states = RandomStates().state_dict()["ranks"] * 2
    models = [Tiny(), Tiny()]
    for value, model in enumerate(models):
        seed(value)
        callback = RandomStates()
        callback.load_state_dict({"ranks": states})
        with pytest.warns(UserWarning, match="random states of 2 processes, but 1 are running"):
            trainer(tmp_path, 3, callback).fit(model)
    assert models[0].losses == models[1].losses


def train_on_two(folder, steps, checkpoint, results):
    """Two processes with different draws, which gradients average."""

    class Different(Tiny):
        def on_train_start(self):
            if checkpoint is None:
                seed(self.global_rank)

        def on_train_end(self):
            torch.save((self.losses, weights(self)), f"{results}-{self.global_rank}.pt")

    run = trainer(folder, steps, RandomStates(), saver(folder, 3), accelerator="cpu", devices=2, strategy="ddp_fork")
    run.fit(Different(), ckpt_path=checkpoint)


def test_two_processes_resume_bit_exactly(tmp_path):
    for folder, steps, checkpoint, results in (
        ("straight", 5, None, "straight"), ("cut", 3, None, "cut"), ("cut", 5, "cut", "resumed")
    ):  # fmt: skip
        arguments = (tmp_path / folder, steps, checkpoint and tmp_path / checkpoint, tmp_path / results)
        process = processes.Process(target=train_on_two, args=arguments)
        process.start()
        process.join(100)
        assert process.exitcode == 0
    assert len(read_checkpoint(tmp_path / "cut")["callbacks"]["RandomStates"]["ranks"]) == 2
    losses = []
    for rank in range(2):
        expected, found = (torch.load(tmp_path / f"{name}-{rank}.pt") for name in ("straight", "resumed"))
        losses.append(found[0])
        assert found[0] == {step: loss for step, loss in expected[0].items() if step >= 3}
        assert equal(found[1], expected[1])
    assert losses[0] != losses[1]


# steps that are not finite


def nan_loss(module, loss, batch_idx):
    return loss * float("nan")


def infinite_loss(module, loss, batch_idx):
    return loss + float("inf")


def nan_gradient(module, loss, batch_idx):
    """sqrt has an infinite slope at 0, and 0 times infinity is NaN; the loss itself is finite."""
    return loss + (0 * module.layers[2].weight.sum()).sqrt()


def at(steps, spoil):
    return lambda module, loss, batch_idx: spoil(module, loss, batch_idx) if batch_idx in steps else loss


class Watch(L.Callback):
    """Weights, optimiser state and learning rate after every step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, module, *arguments):
        optimizer = trainer.optimizers[0]
        state = [value.clone() for entry in optimizer.state.values() for value in entry.values()]
        self.seen.append((weights(module), state, optimizer.param_groups[0]["lr"]))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("spoil", [nan_loss, infinite_loss, nan_gradient])
def test_a_bad_step_changes_nothing(tmp_path, spoil, fused):
    watch, model = Watch(), Tiny(fused, at({3}, spoil))
    with pytest.warns(UserWarning, match=r"Step 3 is skipped: .*1 in a row, 10 stop"):
        trainer(tmp_path, 6, LossGuard(), watch, gradient_clip_val=1.0).fit(model)
    states = watch.seen
    assert equal(states[3][0], states[2][0])
    assert equal(states[3][1], states[2][1])
    assert states[3][2] < states[2][2], "the learning rate goes on"
    assert not equal(states[4][0], states[3][0])
    assert all(weight.isfinite().all() for weight in weights(model))


@pytest.mark.parametrize("spoil", [nan_loss, infinite_loss, nan_gradient])
def test_the_device_skips_a_step_by_itself(tmp_path, spoil):
    runs = {}
    for wait in (True, False):
        seed()
        watch, folder = Watch(), tmp_path / str(wait)
        folder.mkdir()
        with pytest.warns(UserWarning, match=r"Step 3 is skipped: .*1 in a row, 10 stop"):
            trainer(folder, 6, LossGuard(wait=wait), watch, gradient_clip_val=1.0).fit(Tiny(True, at({3}, spoil)))
        (report,) = folder.iterdir()
        runs[wait] = watch.seen, json.loads(report.read_text())
    for waited, other in zip(runs[True][0], runs[False][0], strict=True):
        assert equal(waited[0], other[0])
        assert equal(waited[1], other[1])
        assert waited[2] == other[2]
    reports = [report for _, report in runs.values()]
    assert reports[1].pop("gradients") == {}
    assert reports[0].pop("gradients")
    assert reports[0] == reports[1]


def test_a_bad_last_step_is_reported_without_waiting(tmp_path):
    with pytest.warns(UserWarning, match=r"Step 2 is skipped"):
        trainer(tmp_path, 3, LossGuard(wait=False)).fit(Tiny(True, at({2}, nan_loss)))


def test_ten_in_a_row_stop_the_run_without_waiting(tmp_path):
    watch, model = Watch(), Tiny(True, spoil=at({2, *range(4, 50)}, nan_loss))
    with (
        pytest.warns(UserWarning, match="in a row, 10 stop the run"),
        pytest.raises(RunStoppedError, match=r"not finite in 10 steps in a row; no weight has changed since step 4"),
    ):
        trainer(tmp_path, 50, LossGuard(wait=False), watch).fit(model)
    assert max(model.losses) == 14, "one step later"
    assert equal(weights(model), watch.seen[3][0])


def test_optimisers_that_cannot_skip_are_waited_for(tmp_path):
    watch = Watch()
    with pytest.warns(UserWarning, match="Step 3 is skipped"):
        trainer(tmp_path, 6, LossGuard(wait=False), watch).fit(Tiny(False, at({3}, nan_gradient)))
    assert equal(watch.seen[3][0], watch.seen[2][0])
    assert json.loads((tmp_path / "nonfinite-step=3-rank=0.json").read_text())["gradients"]


def test_the_guard_can_be_switched_off(tmp_path):
    model = Tiny(True, at({3}, nan_loss))
    trainer(tmp_path, 6, LossGuard(enabled=False)).fit(model)
    assert not all(weight.isfinite().all() for weight in weights(model))
    assert list(tmp_path.iterdir()) == []


def test_a_bad_first_step_leaves_no_optimiser_state(tmp_path):
    watch, model = Watch(), Tiny(spoil=at({0}, nan_loss))
    with pytest.warns(UserWarning, match="Step 0 is skipped"):
        trainer(tmp_path, 1, LossGuard(), watch).fit(model)
    assert watch.seen[0][1] == []
    assert equal(watch.seen[0][0], weights(Tiny()))


def test_accumulation_drops_the_whole_step(tmp_path):
    watch, model = Watch(), Tiny(spoil=at({4}, infinite_loss))
    with pytest.warns(UserWarning, match="Step 2 is skipped"):
        trainer(tmp_path, 4, LossGuard(), watch, accumulate_grad_batches=2).fit(model)
    states = watch.seen
    assert len(states) == 8
    assert equal(states[5][0], states[3][0])
    assert not equal(states[7][0], states[5][0])
    report = json.loads((tmp_path / "nonfinite-step=2-rank=0.json").read_text())
    assert [batch["index"] for batch in report["batches"]] == [[1004], [1005]]
    assert report["batches"][0]["loss"] == "inf"
    assert report["batches"][1]["loss"] == pytest.approx(model.losses[5])


def test_the_report_says_where_it_went_wrong(tmp_path):
    with pytest.warns(UserWarning, match="nonfinite-step=1-rank=0.json"):
        trainer(tmp_path, 3, LossGuard()).fit(Tiny(spoil=at({1}, nan_gradient)))
    assert [path.name for path in tmp_path.iterdir()] == ["nonfinite-step=1-rank=0.json"]
    report = json.loads((tmp_path / "nonfinite-step=1-rank=0.json").read_text())
    assert (report["step"], report["rank"], report["in_a_row"], report["gradient_norm"]) == (1, 0, 1, "nan")
    assert report["batches"][0]["batch_idx"] == 1
    assert isinstance(report["batches"][0]["loss"], float)
    assert report["gradients"]["layers.2.weight"]["not_finite"] == 16
    assert report["gradients"]["layers.0.weight"]["not_finite"] == 0
    assert report["gradients"]["layers.0.weight"]["elements"] == 128
    assert report["gradients"]["layers.0.weight"]["largest_finite"] > 0


def test_ten_in_a_row_stop_the_run(tmp_path):
    watch, model = Watch(), Tiny(spoil=at({2, *range(4, 50)}, nan_loss))
    with (
        pytest.warns(UserWarning, match="in a row, 10 stop the run"),
        pytest.raises(RunStoppedError, match=r"not finite in 10 steps in a row; no weight has changed since step 4")
        as caught,
    ):  # fmt: skip
        trainer(tmp_path, 50, LossGuard(), watch).fit(model)
    assert caught.value.exit_code == 3
    assert max(model.losses) == 13
    assert equal(weights(model), watch.seen[3][0])


def test_a_gradient_scaler_deals_with_its_own_overflow(tmp_path):
    def overflow(module, loss, batch_idx):
        return loss * 0 + 1e36 * module.layers[2].weight.sum()

    def half():
        return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))

    plugin = half()
    guard, model = LossGuard(patience=1), Tiny(fused=False, spoil=at({2}, overflow))
    trainer(tmp_path, 4, guard, plugins=[plugin]).fit(model)
    assert plugin.scaler.get_scale() == 512, "it has met the overflow and halved its scale"
    assert not list(tmp_path.glob("nonfinite*"))
    run = trainer(tmp_path, 4, guard, plugins=[half()])
    with pytest.warns(UserWarning, match="Step 1 is skipped"), pytest.raises(RunStoppedError):
        run.fit(Tiny(fused=False, spoil=at({1}, nan_loss)))


def train_with_one_bad_rank(results, wait):
    class OneIsBad(Tiny):
        def on_train_end(self):
            torch.save(weights(self), f"{results}/weights-{self.global_rank}.pt")

    def spoil(module, loss, batch_idx):
        """Infinite on one process, with a gradient of 0."""
        return loss * 0 + float("inf") if module.global_rank == 1 and batch_idx == 0 else loss

    trainer(results, 1, LossGuard(wait=wait), devices=2, strategy="ddp_fork").fit(OneIsBad(spoil=spoil))


@pytest.mark.parametrize("wait", [True, False])
def test_all_processes_skip_alike(tmp_path, wait):
    process = processes.Process(target=train_with_one_bad_rank, args=(tmp_path, wait))
    process.start()
    process.join(100)
    assert process.exitcode == 0
    for rank in range(2):
        assert equal(torch.load(tmp_path / f"weights-{rank}.pt"), weights(Tiny()))
    reports = [json.loads((tmp_path / f"nonfinite-step=0-rank={rank}.json").read_text()) for rank in range(2)]
    assert reports[1]["batches"][0]["loss"] == "inf"
    assert isinstance(reports[0]["batches"][0]["loss"], float)


def test_patience_must_be_positive():
    with pytest.raises(ValueError, match="patience must be at least 1, got 0"):
        LossGuard(patience=0)


# signals


def send(number):
    def spoil(module, loss, batch_idx):
        os.kill(os.getpid(), number)
        return loss

    return spoil


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 0)])
def test_a_signal_stops_after_the_step_with_a_checkpoint(tmp_path, number, code):
    expected = straight(tmp_path, 8)
    before = [signal.getsignal(each) for each in signal.valid_signals()]
    seed()
    model = Tiny(spoil=at({3}, send(number)))
    with pytest.raises(RunStoppedError, match=rf"stopped by {number.name} after step 4; resume with .*") as caught:
        trainer(tmp_path, 8, RandomStates(), GracefulStop(), saver(tmp_path, 100)).fit(model)
    assert caught.value.exit_code == code
    assert [signal.getsignal(each) for each in signal.valid_signals()] == before
    path = tmp_path / "checkpoints" / "stopped-step=4.ckpt"
    assert verify(path) is None
    seed(99)
    again = Tiny()
    trainer(tmp_path, 8, GracefulStop(), RandomStates(), saver(tmp_path, 100)).fit(again, ckpt_path=path)
    assert model.losses | again.losses == expected.losses
    assert equal(weights(again), weights(expected))


def test_a_signal_waits_for_the_optimiser_step(tmp_path):
    model = Tiny(spoil=at({2}, send(signal.SIGTERM)))
    with pytest.raises(RunStoppedError, match="after step 2"):
        trainer(tmp_path, 8, GracefulStop(), accumulate_grad_batches=2).fit(model)
    assert max(model.losses) == 3
    assert read_checkpoint(tmp_path / "checkpoints")["global_step"] == 2


@pytest.mark.parametrize("order", [1, -1])
def test_a_signal_breaks_validation_off(tmp_path, order):
    class Impatient(Tiny):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            if self.global_step == 3 and batch_idx == 0:
                os.kill(os.getpid(), signal.SIGTERM)

    options = VALIDATION | {"limit_val_batches": 3}
    expected = straight(tmp_path, 8, **options)
    seed()
    model, again = Impatient(), Tiny()
    with pytest.raises(RunStoppedError, match="after step 3"):
        trainer(tmp_path, 8, *[RandomStates(), GracefulStop()][::order], **options).fit(model)
    assert model.validated == [(3, 0)]
    seed(99)
    trainer(tmp_path, 8, RandomStates(), **options).fit(again, ckpt_path=newest_valid(tmp_path))
    assert model.losses | again.losses == expected.losses
    assert equal(weights(again), weights(expected))
    assert again.validated == [(6, 0), (6, 1), (6, 2)]


def test_a_failed_save_is_said(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("attnzoo_recipes.files.write_all", full)
    with (
        pytest.warns(UserWarning, match="No space left"),
        pytest.raises(RunStoppedError, match="no checkpoint could be saved"),
    ):
        trainer(tmp_path, 8, GracefulStop()).fit(Tiny(spoil=at({0}, send(signal.SIGTERM))))


def test_handlers_are_given_back_after_a_whole_run(tmp_path):
    before = [signal.getsignal(each) for each in signal.valid_signals()]
    during = []

    class Look(L.Callback):
        def on_train_batch_end(self, *arguments):
            during.append(signal.getsignal(signal.SIGTERM))

    stop = GracefulStop()
    trainer(tmp_path, 1, stop, Look()).fit(Tiny())
    assert during == [stop.stop.handle]
    assert [signal.getsignal(each) for each in signal.valid_signals()] == before


def train_slowly(folder, ready, hang):
    class Slow(Tiny):
        def training_step(self, batch, batch_idx):
            if batch_idx == 1:
                ready.set()
            if hang and batch_idx == 2:
                time.sleep(60)
            time.sleep(0.002)
            return super().training_step(batch, batch_idx)

    seed()
    run = trainer(folder, 2000, RandomStates(), GracefulStop(), saver(folder, 20), **VALIDATION)
    try:
        run.fit(Slow())
    except RunStoppedError as error:
        sys.exit(error.exit_code)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 0)])
def test_exit_codes_at_random_moments(tmp_path, number, code):
    draw = random.Random(int(number))
    for attempt in range(3):
        ready, folder = processes.Event(), tmp_path / str(attempt)
        process = processes.Process(target=train_slowly, args=(folder, ready, False))
        process.start()
        assert ready.wait(60)
        time.sleep(draw.uniform(0, 0.3))
        os.kill(process.pid, number)
        sent = time.monotonic()
        process.join(20)
        assert process.exitcode == code
        assert time.monotonic() - sent < 10
        assert "stopped-step=" in newest_valid(folder).name


def test_a_second_signal_exits_at_once(tmp_path):
    ready = processes.Event()
    process = processes.Process(target=train_slowly, args=(tmp_path, ready, True))
    process.start()
    assert ready.wait(60)
    for pause in (0.3, 0.1, 0.6):
        time.sleep(pause)
        assert process.is_alive(), "a second signal just after the first is the same one"
        os.kill(process.pid, signal.SIGTERM)
    process.join(10)
    assert process.exitcode == 128 + signal.SIGTERM
    assert newest_valid(tmp_path) is None


def test_lightnings_own_note_of_a_signal_is_taken_over(tmp_path):
    class Early(L.Callback):
        def on_train_start(self, trainer, module):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(RunStoppedError, match="stopped by SIGTERM after step 1") as caught:
        trainer(tmp_path, 8, Early(), GracefulStop()).fit(Tiny())
    assert caught.value.exit_code == 143
    assert read_checkpoint(tmp_path)["global_step"] == 1
