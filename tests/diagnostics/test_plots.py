"""Pictures: what is drawn at which place, in both themes; records over training; refusals."""

import dataclasses
import io
import math
import warnings

import pytest
import torch

from attnzoo.diagnostics import analyze_matrix, plots
from attnzoo.diagnostics.training_records import (
    by_layer_and_step,
    finite,
    label,
    over_steps,
    read_records,
    spike_history,
    to_line,
)

pytest.importorskip("matplotlib")


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted(theta=2.0):
    u, v = (torch.nn.functional.normalize(noise(n, seed=n), dim=0) for n in (300, 150))
    return analyze_matrix(noise(300, 150) / 300**0.5 + theta * torch.outer(u, v), keep_eigenvalues=True)


def product(wide, narrow):
    return analyze_matrix([noise(wide, narrow), noise(narrow, wide, seed=1)], keep_eigenvalues=True)


def rows(layers=3, steps=(0, 100, 500), factor=1.0):
    return [
        {
            "layer": f"blocks.{layer}.attn", "head": head, "step": step,
            "stable_rank": factor * (10 * layer + head + step),
        }
        for step in steps for layer in range(layers) for head in range(2)
    ]  # fmt: skip


def pattern(H=3, T=7):
    scores = noise(H, T, T).masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
    return scores.softmax(-1)


DRAWINGS = {
    "esd": lambda theme: plots.esd(planted(), theme=theme),
    "esd_product": lambda theme: plots.esd(product(90, 30), theme=theme),
    "heatmap": lambda theme: plots.heatmap({"a": rows(), "b": rows(factor=2.0)}, "stable_rank", theme=theme),
    "trajectory": lambda theme: plots.trajectory(rows(), "stable_rank", theme=theme),
    "head_map": lambda theme: plots.head_map(noise(4, 5), "loss added (nats)", center=0.0, theme=theme),
    "pruning": lambda theme: plots.pruning_curves(
        {"importance": ([0, 1, 2], [1.0, 1.1, 1.3]), "random": ([0, 1, 2], [1.0, (1.0, 1.2, 1.5), (1.2, 1.5, 1.9)])},
        {"structural": ([0, 1, 2], [1.0, 1.1, 1.2])}, theme=theme,
    ),
    "similarity": lambda theme: plots.similarity_matrix({"0": torch.corrcoef(noise(5, 9))}, theme=theme),
    "attention": lambda theme: plots.attention_maps(pattern(), theme=theme),
}  # fmt: skip


def pixels(png):
    from PIL import Image

    with Image.open(io.BytesIO(png)) as image:
        return torch.tensor(list(image.convert("RGB").tobytes())).view(image.height, image.width, 3)


@pytest.mark.parametrize("name", DRAWINGS)
def test_both_themes_show_something_on_their_own_ground(name):
    for theme, bright in (("light", True), ("dark", False)):
        figure = DRAWINGS[name](theme)
        shown = pixels(plots.to_png(figure, dpi=50))
        corner = tuple(shown[0, 0].tolist())
        assert corner == tuple(int(plots.THEMES[theme]["background"][i : i + 2], 16) for i in (1, 3, 5))
        assert (sum(corner) > 600) is bright
        assert (shown != shown[0, 0]).any(-1).double().mean() > 0.02
        named = [(axes.get_xlabel(), axes.get_ylabel()) for axes in figure.axes]
        assert any(x for x, _ in named)
        assert all(y for _, y in named), named
    with pytest.raises(ValueError, match="theme must be one of 'light', 'dark', got 'blue'"):
        DRAWINGS[name]("blue")


def test_the_look_leaves_matplotlib_as_it_was():
    import matplotlib

    before = dict(matplotlib.rcParams)
    plots.trajectory(rows(), "stable_rank", theme="dark")
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_a_histogram_and_its_law_enclose_the_same_share(scale):
    record = planted()
    (axes,) = plots.esd(record, scale=scale).axes
    (histogram,) = axes.patches
    counts, edges, _ = histogram.get_data()
    edges = torch.tensor(edges).log10() if scale == "log" else torch.tensor(edges)
    assert float((torch.tensor(counts) * edges.diff()).sum()) == pytest.approx(1)
    law = next(line for line in axes.lines if line.get_label() == "Marchenko-Pastur")
    x, y = (torch.tensor(list(data)) for data in law.get_data())
    x = x.log10() if scale == "log" else x
    assert float(torch.trapezoid(y, x)) == pytest.approx(1 - 1 / 150, abs=0.01)
    labels = axes.get_legend_handles_labels()[1]
    assert labels[-1].startswith("1 outlier, ")
    places = {line.get_label(): line.get_xdata()[0] for line in axes.lines}
    assert places["edge of the law"] == record.lambda_plus
    assert places["threshold"] == record.threshold
    assert places[labels[-1]] == pytest.approx(record.lambda_max)
    assert axes.get_xscale() == scale


def test_a_product_is_drawn_against_the_law_of_products():
    record = product(400, 200)
    (axes,) = plots.esd(record, title="t").axes
    law = next(line for line in axes.lines if line.get_label() == "product of random matrices")
    x, y = (torch.tensor(list(data)) for data in law.get_data())
    below = torch.tensor(record.eigenvalues).log10()
    # The law's distribution function against the eigenvalues' own.
    area = torch.cumulative_trapezoid(y, x.log10())
    share = torch.searchsorted(below, x.log10()[1:]) / below.numel()
    assert float((area - share).abs().max()) < 0.03
    assert axes.get_title() == "t"
    assert "Marchenko-Pastur" not in axes.get_legend_handles_labels()[1]


def test_heatmaps_have_layers_down_steps_across_and_one_scale():
    figure = plots.heatmap({"a": rows(), "b": rows(factor=2.0)}, "stable_rank")
    first, second, bar = figure.axes
    for axes, factor in ((first, 1.0), (second, 2.0)):
        (image,) = axes.images
        expected = [[factor * (10 * layer + 0.5 + step) for step in (0, 100, 500)] for layer in range(3)]
        assert image.get_array().tolist() == expected
        assert image.get_clim() == (0.5, 2 * 520.5)
        assert [text.get_text() for text in axes.get_xticklabels()] == ["0", "100", "500"]
        assert [text.get_text() for text in axes.get_yticklabels()] == ["0", "1", "2"]
    assert (first.get_title(), second.get_title()) == ("a", "b")
    assert bar.get_ylabel() == label("stable_rank") == "stable rank (dimensions)"


def test_trajectories():
    (axes,) = plots.trajectory({"a": rows(), "b": rows(factor=2.0)}, "stable_rank").axes
    assert [line.get_label() for line in axes.lines] == ["a", "b"]
    assert list(axes.lines[0].get_ydata()) == [10.5, 110.5, 510.5]
    assert len({(line.get_color(), line.get_marker()) for line in axes.lines}) == 2
    (axes,) = plots.trajectory(rows(), "stable_rank", by="layer").axes
    assert [line.get_label() for line in axes.lines] == ["layer 0", "layer 1", "layer 2"]
    assert list(axes.lines[2].get_ydata()) == [20.5, 120.5, 520.5]


def test_ablation_maps_diverge_from_their_centre():
    table = torch.tensor([[0.1, -0.3], [0.2, math.nan]])
    (axes, _) = plots.head_map(table, "loss added", center=0.0, layers=["h.0", "h.1"]).axes
    (image,) = axes.images
    low, high = image.get_clim()
    assert (low, high) == pytest.approx((-0.3, 0.3))
    assert image.get_array().mask.tolist() == [[False, False], [False, True]]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["0", "1"]


def test_pruning_panels_share_their_axis():
    upper, lower = DRAWINGS["pruning"]("light").axes
    assert upper.get_shared_x_axes().joined(upper, lower)
    assert upper.get_ylabel() == "loss (nats per token)"
    assert lower.get_ylabel() == "speed / whole model's"
    assert lower.get_xlabel() == "heads removed"
    assert upper.get_position().x0 == pytest.approx(lower.get_position().x0)


def test_attention_maps_show_tokens_of_any_script():
    tokens = ["<s>", " the", "$x$", "\n", "中", "", "é"]
    figure = plots.attention_maps(pattern(), tokens, heads=[4, 0, 2])
    assert [axes.get_title() for axes in figure.axes[:3]] == ["head 4", "head 0", "head 2"]
    shown = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert shown == ["<s>", "·the", "\\$x\\$", "↵", "□", "∅", "é"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.to_png(figure, dpi=40)
    longer = plots.attention_maps(torch.full((5, 3), 1 / 3), ["a", "b", "c"]).axes[0]
    assert [text.get_text() for text in longer.get_yticklabels()] == ["0", "1", "2", "3", "4"]
    assert figure.axes[1].images[0].get_array()[6, 2] == pytest.approx(pattern()[1, 6, 2].sqrt().item())


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_small_maps_have_numbers_with_common_decimals():
    (axes, _) = plots.head_map(torch.tensor([[0.214, -0.004], [0.1, math.nan]])).axes
    assert texts(axes) == ["0.21", "0.00", "0.10"]
    (axes, _) = plots.head_map(torch.tensor([[4123.4, 17.0]])).axes
    assert texts(axes) == ["4123", "17"]
    first, _, _ = plots.heatmap({"a": rows(), "b": rows(factor=2.0)}, "stable_rank").axes
    assert texts(first) == [str(round(10 * layer + 0.5 + step)) for layer in range(3) for step in (0, 100, 500)]
    attention, *_ = plots.attention_maps(pattern()[:, :3, :3]).axes
    assert texts(attention) == [f"{float(x):.2f}" for x in pattern()[0, :3, :3].flatten()]
    (axes, _) = plots.head_map(noise(9, 9)).axes
    assert texts(axes) == []


def test_heads_are_not_compared_with_themselves():
    table = torch.tensor([[1.0, 0.2, 0.3], [0.2, 1.0, -0.1], [0.3, -0.1, 1.0]])
    (axes, _) = plots.similarity_matrix(table).axes
    assert axes.images[0].get_array().mask.diagonal().all()
    assert axes.images[0].get_clim() == pytest.approx((-0.3, 0.3))
    assert texts(axes) == ["0.20", "0.30", "0.20", "-0.10", "0.30", "-0.10"]


@pytest.mark.parametrize(("kind", "begins"), [("png", b"\x89PNG"), ("pdf", b"%PDF-"), ("svg", b"<?xml")])
def test_files_of_every_kind_are_the_same_each_time(kind, begins, tmp_path):
    made = [plots.save(plots.trajectory(rows(), "stable_rank"), tmp_path / f"{i}.{kind}").read_bytes() for i in "ab"]
    assert made[0] == made[1]
    assert made[0].startswith(begins)
    if kind == "pdf":
        assert b"/Type3" not in made[0]


def test_other_kinds_of_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="kind must be one of png, pdf, svg, got 'gif'"):
        plots.save(plots.trajectory(rows(), "stable_rank"), tmp_path / "a.gif")
    assert list(tmp_path.iterdir()) == []


def test_saving_is_in_one_piece(tmp_path):
    figure = plots.trajectory(rows(), "stable_rank")
    path = plots.save(figure, tmp_path / "new" / "picture.png")
    assert path.read_bytes() == plots.to_png(figure)
    assert [p.name for p in path.parent.iterdir()] == ["picture.png"]
    array = plots.to_array(figure, dpi=50)
    assert array.dtype == torch.uint8
    assert tuple(array.shape) == (220, 425, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plots.esd(analyze_matrix(noise(20, 10))), r"record must hold eigenvalues .* got none"),
        (lambda: plots.esd(planted(), bins=1), "bins must be at least 2, got 1"),
        (lambda: plots.esd(planted(), scale="cube"), "scale must be 'auto', 'linear' or 'log', got 'cube'"),
        (lambda: plots.heatmap(rows(), "mp_gap"), "records must hold the figure 'mp_gap', got 18 rows without it"),
        (lambda: plots.heatmap({}, "mp_gap"), "records must hold at least one model, got none"),
        (lambda: plots.head_map(noise(3)), r"values must have shape \(L, H\), got \(3,\)"),
        (lambda: plots.head_map(noise(3, 2), layers=["a"]), "layers must hold one name a row of the values, got 1 for"),
        (lambda: plots.head_map(torch.full((2, 2), math.nan)), "values must hold at least one finite number, got none"),
        (lambda: plots.similarity_matrix(noise(3, 4)), r"matrices must have shape \(H, H\), got \(3, 4\)"),
        (lambda: plots.similarity_matrix(noise(1, 1)), "matrices must hold at least one finite entry off their diagon"),
        (lambda: plots.attention_maps(noise(4)), r"pattern must have shape .* got \(4,\)"),
        (lambda: plots.attention_maps(pattern(), ["a"]), "tokens must hold one text a key, got 1 for 7 keys"),
        (lambda: plots.attention_maps(pattern(), heads=[1]), r"heads must hold one number a head .* got 1 for 3"),
        (lambda: plots.pruning_curves({"x": ([0, 1], [1.0])}), r"curve 'x' must have as many values .* got 1 and 2"),
    ],
)  # fmt: skip
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def drawn_numbers(axes):
    return [text.get_text() for text in axes.texts]


def extents(figure, texts):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return [text.get_window_extent(canvas.get_renderer()) for text in texts]


def test_long_titles_stay_inside():
    name = "model.decoder.transformer.layers.17.self_attention.attention.module.wrapped.by.an.adapter"
    record = dataclasses.replace(planted(), layer=name, head=12, matrix="parametrizations.q_proj.weight")
    figure = plots.esd(record)
    (extent,) = extents(figure, [figure.axes[0].title])
    assert 0 <= extent.x0 < extent.x1 <= figure.bbox.width
    assert figure.axes[0].get_title().replace("\n", "").replace(" ", "") == f"{name},head12,{record.matrix}"


def test_many_models_are_drawn_in_rows():
    models = {f"model number {i}": rows() for i in range(9)}
    for figure in (plots.heatmap(models, "stable_rank"), plots.head_map({name: noise(6, 8) for name in models})):
        panels = [axes for axes in figure.axes if axes.get_title()]
        titles = extents(figure, [axes.title for axes in panels])
        assert [axes.get_subplotspec().rowspan.start for axes in panels] == [0] * 4 + [1] * 4 + [2]
        assert not any(one.overlaps(other) for i, one in enumerate(titles) for other in titles[:i])
        assert all(axes.get_ylabel() == "layer" for axes in panels[::4])


def test_long_legends_leave_the_curves_their_room():
    short = plots.trajectory({"a": rows()}, "stable_rank")
    long = plots.trajectory({f"a model with a very long name and number {i}": rows() for i in range(20)}, "stable_rank")
    (alone,), (beside,) = (extents(figure, [figure.axes[0].patch]) for figure in (short, long))
    assert beside.width > 0.8 * alone.width
    (legend,) = extents(long, [long.axes[0].get_legend()])
    assert legend.x0 > beside.x1
    assert legend.x1 <= long.bbox.width


def test_numbers_of_every_size_are_readable():
    table = torch.tensor([[1e-6, 1.0], [1e3, 1e6]])
    made = [{"layer": i, "step": j, "m": float(table[i, j])} for i in range(2) for j in range(2)]
    assert drawn_numbers(plots.heatmap(made, "m", log=True).axes[0]) == ["1e-06", "1", "1e+03", "1e+06"]
    assert drawn_numbers(plots.head_map(table * 1e6).axes[0]) == ["1", "1e+06", "1e+09", "1e+12"]
    assert drawn_numbers(plots.head_map(torch.tensor([[0.25, 1.0]])).axes[0]) == ["0.25", "1.00"]


def test_a_layer_without_the_figure_has_no_line():
    some = [{**row, "stable_rank": math.nan} if row["layer"] == "blocks.1.attn" else row for row in rows()]
    figure = plots.trajectory(some, "stable_rank", by="layer")
    assert [line.get_label() for line in figure.axes[0].lines] == ["layer 0", "layer 2"]
    with pytest.raises(ValueError, match="records must hold the figure 'stable_rank'"):
        plots.trajectory([{**row, "stable_rank": None} for row in rows()], "stable_rank", by="layer")


def test_weights_below_zero_are_not_missing():
    figure = plots.attention_maps(torch.tensor([[[0.25, -0.25], [1.44, 0.0]]]))
    image = figure.axes[0].images[0]
    assert image.get_array().tolist() == [[0.5, -0.5], [pytest.approx(1.2), 0.0]]
    assert image.get_clim() == pytest.approx((-1.2, 1.2))
    assert drawn_numbers(figure.axes[0]) == ["0.2", "-0.2", "1.4", "0.0"]
    ticks = [label.get_text() for label in figure.axes[-1].get_yticklabels()]
    assert ticks == ["-1", "-0.5", "-0.2", "0", "0.2", "0.5", "1"]
    assert plots.attention_maps(pattern()).axes[0].images[0].get_clim() == (0.0, 1.0)


# Records


def test_lines_and_rows(tmp_path):
    path = tmp_path / "r.jsonl"
    row = {"step": 1, "x": math.nan, "y": [math.inf, 2.0], "z": {"a": -math.inf}}
    path.write_text(to_line(row) + to_line({"step": 2}) + '{"step": 3, "x"')
    assert read_records(path) == [{"step": 1, "x": None, "y": [None, 2.0], "z": {"a": None}}, {"step": 2}]
    assert finite((1.0, math.nan)) == [1.0, None]
    path.write_text('{"step": 1\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"line 1 of .* must be a JSON object"):
        read_records(path)
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match=r"line 1 of .* must be a JSON object"):
        read_records(path)


def test_layers_and_steps_with_gaps():
    some = [{"layer": "a", "step": 2, "m": 1.0}, {"layer": "a", "step": 2, "m": 3.0}, {"layer": "b", "step": 1, "m": 5},
            {"layer": "c", "step": 1, "m": math.nan}]  # fmt: skip
    layers, steps, table = by_layer_and_step(some, "m")
    assert (layers, steps) == (["a", "b"], [1, 2])
    assert math.isnan(table[0][0])
    assert table[0][1] == 2.0
    assert over_steps(some, "m") == ([1, 2], [5.0, 2.0], [5.0, 2.0], [5.0, 2.0])


def test_spikes_that_come_stay_and_spread():
    def history(layer, spiked, ranks):
        return [
            {"layer": layer, "step": 10 * i, "outlier_count": int(s), "mp_gap": 0.5 if s else 0.0, "stable_rank": r}
            for i, (s, r) in enumerate(zip(spiked, ranks, strict=True))
        ]

    made = spike_history([
        *history("a", [0, 1, 1, 1, 0, 1, 1, 1], [8, 8, 7, 6, 5, 4, 3.9, 3]),
        *history("b", [0, 1, 1, 0, 1, 1, 1, 1], [8, 8, 8, 8, 8, 8, 8, 8]),
        *history("c", [0, 0, 1, 1, 0, 1, 1, 0], [8, 8, 8, 8, 3, 8, 8, 8]),
    ])  # fmt: skip
    assert made.onset == {"a": 10, "b": 40, "c": None}
    assert made.persistence == {"a": pytest.approx(5 / 6), "b": 1.0, "c": None}
    assert made.spread == 1
    assert made.collapsed == {"a": 60, "b": None, "c": 40}
    small = [{**row, "mp_gap": 0.05} for row in history("a", [1] * 4, [8] * 4)]
    assert spike_history(small).onset == {"a": None}
    assert spike_history(small, gap=0.01).onset == {"a": 0}
