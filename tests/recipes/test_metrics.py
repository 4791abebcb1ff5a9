"""The folder of a run, and the losses in its log."""

import types

import pytest
import torch

from attnzoo_recipes.callbacks.metrics import Metrics
from attnzoo_recipes.data.module import TextDataModule
from attnzoo_recipes.training import Pretraining


def test_runs_that_start_together_have_folders_of_their_own(tmp_path, monkeypatch):
    root = tmp_path / "runs"
    monkeypatch.setattr(Metrics, "_get_next_version", lambda logger: 0)  # what all of them see
    loggers = [Metrics(str(root)) for _ in range(3)]
    assert not root.exists()
    assert [logger.version for logger in loggers] == [0, 1, 2]
    assert [logger.version for logger in loggers] == [0, 1, 2]
    assert sorted(path.name for path in root.iterdir()) == ["version_0", "version_1", "version_2"]
    monkeypatch.setattr("attnzoo_recipes.callbacks.metrics.rank_zero_only.rank", 1)
    assert Metrics(str(root)).version == 0  # another process creates none


@pytest.mark.parametrize(("last", "expected"), [(False, []), (True, [3.0])])
def test_a_step_of_fewer_batches_logs_their_mean(last, expected):
    module, logged = Pretraining(lambda width: None, vocab_size=5), []
    module.trainer = types.SimpleNamespace(accumulate_grad_batches=4, is_last_batch=False)
    module.log = lambda name, value, **options: logged.append(float(value))
    module._log_of_step("train_loss", torch.tensor(2.0), 0)
    module.trainer.is_last_batch = last
    module._log_of_step("train_loss", torch.tensor(4.0), 1)
    assert logged == expected


def test_a_trainer_in_python_may_not_cut_the_data_either():
    module = TextDataModule()
    module.trainer = types.SimpleNamespace(fast_dev_run=False, limit_train_batches=3, overfit_batches=0)
    with pytest.raises(ValueError, match=r"trainer\.limit_train_batches must be left out"):
        module.train_dataloader()
