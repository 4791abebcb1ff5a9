"""A small corpus, and runs of the command line in this process."""

import warnings

import pytest

TEXT = "the cat sat on a mat and the dog ran to see what it was that the cat had found under its mat"

SMALL = [
    "fit",
    "--config",
    "configs/pretrain.yaml",
    "--config",
    "configs/smoke.yaml",
    "--trainer.enable_progress_bar",
    "false",
    "--trainer.enable_model_summary",
    "false",
]


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory):
    """60 short documents, one a line."""
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    words = TEXT.split()
    lines = [" ".join(words[(3 * i + j * j) % len(words)] for j in range(20 + i % 7)) for i in range(60)]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def arguments(corpus_file, tmp_path):
    """Arguments of a run of two steps on that corpus, below tmp_path; the mechanism's name, and what else to add."""

    def made(mechanism="kha", *more, steps=2):
        return [
            *SMALL,
            "--config",
            f"configs/attention/{mechanism}.yaml",
            f"--trainer.max_steps={steps}",
            f"--trainer.default_root_dir={tmp_path / 'run'}",
            "--data.source=text",
            f"--data.files=['{corpus_file}']",
            "--data.unit=line",
            "--data.val_fraction=0.2",
            f"--data.cache_dir={tmp_path / 'data'}",
            "--samples.max_new_tokens=5",
            *more,
        ]

    return made


@pytest.fixture(autouse=True)
def quiet_jsonargparse(monkeypatch):
    """Lightning calls what jsonargparse is about to rename."""
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")


@pytest.fixture
def run():
    """attnzoo-pretrain in this process."""

    def called(arguments):
        from attnzoo_recipes.pretrain import main

        with warnings.catch_warnings():
            # Of lightning's own code: its use of a class that torch is about to remove.
            warnings.filterwarnings("ignore", ".*LeafSpec.*is deprecated.*")
            main(arguments)

    return called
