"""Sampling with the caches, and the command that does it."""

import subprocess
import sys

import pytest
import torch

from attnzoo_recipes.checkpointing import newest_valid
from attnzoo_recipes.generate import main
from attnzoo_recipes.lm import DecoderLM
from attnzoo_recipes.sampling import choose, generate
from tests.zoo import MECHANISMS


def decoder(mechanism="kha"):
    return DecoderLM(29, MECHANISMS[mechanism], embed_dim=32, num_layers=2, init_std=0.3).double().eval()


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_greedy_with_caches_is_greedy_without(mechanism):
    model, prompt = decoder(mechanism), torch.randint(0, 29, (3, 5))
    made = generate(model, prompt, 12, temperature=0)
    tokens = prompt
    for _ in range(12):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(made, tokens[:, 5:])


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}])
def test_what_leaves_one_token_is_greedy(options):
    model, prompt = decoder(), torch.randint(0, 29, (2, 4))
    assert torch.equal(generate(model, prompt, 8, **options), generate(model, prompt, 8, temperature=0))


def test_the_seed_decides_and_the_global_random_state_is_left_alone():
    model, prompt = decoder(), torch.randint(0, 29, (1, 4))
    before = torch.get_rng_state()
    first, again, other = (generate(model, prompt, 30, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_follow_the_probabilities():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0]).expand(20_000, 5)
    drawn = choose(logits, 2.0, 4, 0.8, torch.Generator().manual_seed(0))
    # Of the four likeliest, with 0.455, 0.276, 0.167 and 0.102, the first three are needed to reach 0.8.
    likeliest = torch.tensor([2.0, 1.0, 0.0, -1.0]).div(2).softmax(-1)
    expected = likeliest[:3] / likeliest[:3].sum()
    counts = torch.bincount(drawn, minlength=5) / 20_000
    assert (counts[:3] - expected).abs().max() < 0.015
    assert counts[3:].sum() == 0


def test_it_ends_with_the_stop_token():
    model, prompt = decoder(), torch.randint(0, 29, (1, 4))
    free = generate(model, prompt, 20, temperature=0)[0].tolist()
    made = generate(model, prompt, 20, temperature=0, stop=[free[6]])[0].tolist()
    assert made == free[: free.index(free[6]) + 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must be finite and not negative, got -1"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\], got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        generate(decoder(), torch.zeros(1, 2, dtype=torch.int64), **{"max_new_tokens": 3, **options})


def test_the_command_continues_a_prompt(arguments, run, tmp_path, capsys):
    run(arguments("gta"))
    capsys.readouterr()
    texts = []
    for path in (tmp_path / "run", newest_valid(tmp_path / "run")):
        main([str(path), "--prompt", "the cat", "--max-new-tokens", "20", "--seed", "3"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0].startswith("the cat")


def test_the_command_refuses_in_one_sentence(arguments, run, tmp_path, capsys):
    run(arguments("mqa"))
    good = newest_valid(tmp_path / "run")
    torn = tmp_path / "torn.ckpt"
    torn.write_bytes(good.read_bytes()[:1000])
    for words, message in (
        (["nowhere.ckpt"], "nowhere.ckpt"),
        ([str(torn)], "torn.ckpt"),
        ([str(tmp_path / "data")], "no valid checkpoint"),
        ([str(good), "--top-p", "2"], "top_p"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_help_lists_every_option():
    done = subprocess.run(
        [sys.executable, "-m", "attnzoo_recipes.generate", "--help"], capture_output=True, text=True, check=True
    )
    for option in ("--prompt", "--temperature", "--top-k", "--top-p", "--seed", "--max-new-tokens", "--allow-import"):
        assert option in done.stdout
