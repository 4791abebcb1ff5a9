"""Sampling with the caches, and the command that does it."""

import io
import os
import re
import sys
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from attnzoo_recipes.checkpointing import newest_valid
from attnzoo_recipes.data.tokenizers import ByteTokenizer
from attnzoo_recipes.generate import main
from attnzoo_recipes.lm import DecoderLM
from attnzoo_recipes.sampling import TextStream, choose, generate
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


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}, {"min_p": 1.0}])
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


def test_min_p_keeps_what_is_likely_enough():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(20_000, 4)
    drawn = choose(logits, 1.0, None, None, torch.Generator().manual_seed(0), 0.6)
    counts = torch.bincount(drawn, minlength=4) / 20_000
    assert (counts[:2] - torch.tensor([4 / 7, 3 / 7])).abs().max() < 0.015
    assert counts[2:].sum() == 0


def test_a_repetition_penalty_is_that_of_its_paper():
    model, prompt = decoder(), torch.randint(0, 29, (2, 4))
    made = generate(model, prompt, 10, temperature=0, repetition_penalty=1.7)
    tokens = prompt
    for _ in range(10):
        logits = model(tokens)[:, -1]
        for row in range(2):
            for seen in set(tokens[row].tolist()):
                logits[row, seen] *= 1.7 if logits[row, seen] < 0 else 1 / 1.7
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(made, tokens[:, 4:])
    strong = generate(model, prompt[:1], 20, temperature=0, repetition_penalty=1e6)[0].tolist()
    assert len({*strong, *prompt[0].tolist()}) == 20 + len(set(prompt[0].tolist()))


def test_a_row_is_drawn_from_its_own_seed():
    model, prompt = decoder(), torch.randint(0, 29, (1, 4))
    together = generate(model, prompt.expand(3, -1), 20, seed=7)
    for row in range(3):
        assert torch.equal(together[row], generate(model, prompt, 20, seed=7 + row)[0])
    assert len({tuple(row) for row in together.tolist()}) == 3


def test_it_ends_once_every_row_has_a_stop_token():
    model, prompt = decoder(), torch.randint(0, 29, (2, 4))
    free = generate(model, prompt, 60, seed=1).tolist()
    stop = free[0][3]
    firsts = [row.index(stop) for row in free if stop in row]
    made = generate(model, prompt, 60, seed=1, stop=[stop])
    assert made.shape[1] == (max(firsts) + 1 if len(firsts) == 2 else 60)


def texts(tokens, tokenizer, stop):
    stream = TextStream(tokenizer, stop)
    return [*(stream.add(token) for token in tokens), stream.finish()], stream


def test_text_is_shown_as_it_comes_without_halves_of_characters():
    parts, _ = texts("aé€".encode(), ByteTokenizer(), ())
    assert parts == ["a", "", "é", "", "", "€", ""]
    parts, _ = texts([*b"a", 0xC3], ByteTokenizer(), ())
    assert parts == ["a", "", "\ufffd"]


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (("END",), "one two "),
        (("two", "END"), "one "),
        (("nothing",), "one two END three"),
        (("EN", "END"), "one two "),
    ],
)
def test_text_ends_before_a_stop_string(stop, expected):
    parts, stream = texts(b"one two END three", ByteTokenizer(), stop)
    assert "".join(parts) == expected
    assert stream.ended
    whole = "one two END three"
    for i in range(len(parts) - 1):
        shown = "".join(parts[: i + 1])
        assert whole.startswith(shown)
        assert not any(text in shown for text in stop)


def test_text_ends_with_the_document():
    parts, stream = texts([*b"ab", 256, *b"cd"], ByteTokenizer(), ("bc",))
    assert "".join(parts) == "ab"
    assert stream.tokens == 3


@pytest.fixture
def trained(arguments, run, tmp_path, capsys):
    run(arguments("gta"))
    capsys.readouterr()
    return newest_valid(tmp_path / "run")


def made(capsys, *words):
    main([*map(str, words)])
    return capsys.readouterr()


def test_several_samples_are_those_of_their_seeds(trained, capsys):
    common = [trained, "--prompt", "the cat", "--max-new-tokens", 12]
    single = [made(capsys, *common, "--seed", seed).out for seed in (4, 5)]
    together = made(capsys, *common, "--seed", 4, "--num-samples", 2)
    assert together.out == f"--- sample 0, seed 4\n{single[0]}--- sample 1, seed 5\n{single[1]}"
    assert re.fullmatch(r"\d+ tokens, [\d,.]+ tokens/s with the prompt's time\n", together.err)


@pytest.mark.parametrize(("seed", "samples"), [(2**64, 1), (2**64 - 1, 2), (-(2**63) - 1, 1)])
def test_a_seed_that_torch_does_not_take(seed, samples, capsys):
    with pytest.raises(SystemExit) as stop:
        made(capsys, "nowhere", "--seed", seed, "--num-samples", samples)
    assert stop.value.code == 2
    assert f"--seed must lie between -2^63 and 2^64 less the number of samples, got {seed}" in capsys.readouterr().err


def test_prompts_from_a_file_and_from_stdin(trained, capsys, tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_text("the cat é")
    common = [trained, "--max-new-tokens", 5]
    expected = made(capsys, *common, "--prompt", "the cat é").out
    assert made(capsys, *common, "--prompt-file", tmp_path / "prompt.txt").out == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("the cat é".encode())))
    assert made(capsys, *common, "--prompt-file", "-").out == expected


def test_stop_strings_precisions_and_penalties_are_options(trained, capsys):
    common = [trained, "--prompt", "the", "--max-new-tokens", 30, "--temperature", 0]
    free = made(capsys, *common).out[3:-1]
    stop = free[4:6]
    assert made(capsys, *common, "--stop", stop).out == f"the{free[: free.index(stop)]}\n"
    assert made(capsys, *common, "--dtype", "bfloat16").out.startswith("the")
    assert made(capsys, *common, "--repetition-penalty", 50.0).out[3:-1] != free
    assert made(capsys, *common[:-1], 1.0, "--min-p", 1.0).out[3:-1] == free


def test_text_is_written_as_it_is_drawn(trained, monkeypatch):
    written = []
    monkeypatch.setattr(sys, "stdout", types.SimpleNamespace(write=written.append, flush=lambda: written.append(None)))
    main([str(trained), "--prompt", "the", "--max-new-tokens", "5", "--temperature", "0"])
    assert written[:2] == ["the", None]
    assert written.count(None) >= 5


def test_a_reader_that_leaves_is_no_mistake(trained, monkeypatch, capsys):
    reader, writer = os.pipe()

    def leave():
        with open(reader, "rb", buffering=0) as pipe:
            return pipe.read(2)

    with ThreadPoolExecutor(1) as threads, open(writer, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        taken = threads.submit(leave)
        main([str(trained), "--prompt", "abc", "--max-new-tokens", "100"])
        output.flush()
        assert taken.result() == b"ab"
    assert capsys.readouterr().err == ""


def test_a_continuation_that_no_memory_holds(trained, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(trained), "--max-new-tokens", str(2**40)])
    assert stop.value.code == 5
    assert "attnzoo-generate: error: out of memory (" in capsys.readouterr().err


def test_a_checkpoint_without_its_sidecar_is_read_when_asked_for(trained, capsys, tmp_path):
    expected = made(capsys, trained, "--max-new-tokens", 5).out
    alone = tmp_path / "alone.ckpt"
    alone.write_bytes(trained.read_bytes())
    with pytest.raises(SystemExit):
        main([str(alone)])
    assert "--unverified" in capsys.readouterr().err
    with pytest.warns(UserWarning, match=r"alone\.ckpt has no sidecar .*so nothing says whether it is what was saved"):
        assert made(capsys, alone, "--max-new-tokens", 5, "--unverified").out == expected


def test_a_damaged_checkpoint_is_refused_also_then(trained, capsys):
    content = bytearray(trained.read_bytes())
    content[len(content) // 2] ^= 4
    trained.write_bytes(content)
    with pytest.raises(SystemExit):
        main([str(trained), "--unverified"])
    assert "is damaged" in capsys.readouterr().err


def test_no_code_is_run_from_an_unverified_checkpoint(tmp_path, capsys):
    class Payload:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    torch.save({"state_dict": Payload()}, tmp_path / "x.ckpt")
    with pytest.raises(SystemExit), pytest.warns(UserWarning, match="no sidecar"):
        main([str(tmp_path / "x.ckpt"), "--unverified"])
    assert "is not a checkpoint of tensors and plain values" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-samples", "0"], "--num-samples must be at least 1, got 0"),
        (["--num-samples", "9999999999"], "--num-samples must be at most 65,536, got 9999999999"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1, got 0"),
        (["--stop", ""], "--stop must be followed by a text"),
        (["--prompt", "a", "--prompt-file", "b"], "--prompt and --prompt-file must not both be given"),
        (["--prompt-file", "/nowhere"], "/nowhere"),
        (["--min-p", "0"], "min_p must lie in"),
        (["--prompt", "a\udcff"], "--prompt must be text that UTF-8 can write, got 'a\\udcff'"),
    ],
)
def test_mistakes_of_the_command(words, message, trained, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(trained), *words])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("options", [{"temperature": 1e-310}, {"repetition_penalty": 1e-320}], ids=str)
def test_the_smallest_settings_draw_the_likeliest(options):
    model, prompt = decoder(), torch.randint(0, 29, (2, 4))
    made = generate(model, prompt, 6, **options)
    if "temperature" in options:
        assert torch.equal(made, generate(model, prompt, 6, temperature=0))
    assert torch.equal(made, generate(model, prompt, 6, **options))


def test_logits_that_overflow_are_refused():
    logits = torch.tensor([[1.0, torch.inf]], dtype=torch.float16)
    with pytest.raises(ValueError, match=r"must be numbers to sample from, got infinity in torch\.float16"):
        choose(logits, 1.0, None, None, torch.Generator())
    assert choose(-logits, 1.0, None, None, torch.Generator()).tolist() == [0]


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
        ({"min_p": 1.5}, r"min_p must lie in \(0, 1\], got 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be finite and positive, got 0"),
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


def test_help_lists_every_option(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    said = capsys.readouterr().out
    for option in ("--prompt", "--temperature", "--top-k", "--top-p", "--seed", "--max-new-tokens", "--allow-import"):
        assert option in said
