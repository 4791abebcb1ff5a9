"""What ships, what importing costs, which way imports point, and what no file may do."""

import ast
import importlib.metadata
import inspect
import io
import json
import os
import re
import subprocess
import sys
import tokenize
import tomllib
import zipfile
from functools import cache
from pathlib import Path

import pytest
import yaml
from hatchling.builders.wheel import WheelBuilder

import attnzoo
from attnzoo_recipes import commands

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = {
    "attnzoo": ROOT / "attnzoo",
    "attnzoo_kernels": ROOT / "kernels" / "attnzoo_kernels",
    "attnzoo_recipes": ROOT / "recipes" / "attnzoo_recipes",
}
STANDARD = sys.stdlib_module_names


def sources(*packages: str) -> list[Path]:
    """Every Python file of these packages."""
    return sorted(path for name in packages for path in PACKAGES[name].rglob("*.py"))


def imports(tree: ast.AST) -> list[tuple[ast.AST, str]]:
    """Each import below tree: its node and the dotted module it names."""
    found: list[tuple[ast.AST, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node, "." * node.level + (node.module or "")))
    return found


def top_level_imports(tree: ast.Module) -> set[str]:
    """Top packages that importing the file imports: everything outside functions and TYPE_CHECKING."""
    inside: set[ast.AST] = set()
    for node in ast.walk(tree):
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if lazy or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)):
            inside |= set(ast.walk(node))
    return {name.split(".")[0] for node, name in imports(tree) if node not in inside}


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    (built,) = WheelBuilder(str(ROOT)).build(directory=str(directory), versions=["standard"])
    return Path(built)


def test_wheel_holds_the_packages_the_configs_and_nothing_else(wheel):
    expected = {"attnzoo/py.typed"}
    for name, folder in PACKAGES.items():
        expected |= {f"{name}/{path.relative_to(folder).as_posix()}" for path in folder.rglob("*.py")}
    configs = {path.relative_to(ROOT / "configs").as_posix() for path in (ROOT / "configs").rglob("*.yaml")}
    assert {"pretrain.yaml", "attention/kha.yaml"} <= configs
    expected |= {f"attnzoo_recipes/configs/{name}" for name in configs}
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert held == expected
        assert not any(Path(name).name.startswith(("test_", "conftest")) for name in held)
        metadata = archive.read(f"attnzoo-{attnzoo.__version__}.dist-info/METADATA").decode()
        names = archive.namelist()
    assert f"attnzoo-{attnzoo.__version__}.dist-info/licenses/LICENSE" in names
    required = re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", metadata, re.MULTILINE)
    assert sorted(required) == ["einops", "torch"]


def test_wheel_imports_without_the_repository(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = "import attnzoo; print(attnzoo.__file__); print(attnzoo.__version__)"
    file, version = run(code, tmp_path).split()
    assert Path(file).is_relative_to(tmp_path)
    assert version == attnzoo.__version__


def run(code: str, *paths: Path) -> str:
    """Output of a fresh interpreter that sees these folders before everything installed."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=paths[0],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_brings_in_nothing_but_itself():
    code = """
import json, sys
import torch, einops
before = {name.split(".")[0] for name in sys.modules}
import attnzoo
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules} - before)))
"""
    new = set(json.loads(run(code, ROOT, ROOT / "kernels", ROOT / "recipes")))
    assert "attnzoo" in new
    assert new - STANDARD <= {"attnzoo", "attnzoo_kernels"}


def test_import_works_where_an_extra_is_missing():
    extras = ["triton", "lightning", "transformers", "datasets", "matplotlib", "scipy", "pandas"]
    code = f"""
import os, sys
import torch
for extra in {extras}:
    child = os.fork()
    if not child:
        sys.modules[extra] = None
        import attnzoo
        print(extra, attnzoo.MultiHeadAttention(8, 2).num_heads, flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, extra
"""
    assert run(code, ROOT, ROOT / "kernels").splitlines() == [f"{extra} 2" for extra in extras]


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("attnzoo", {"attnzoo", "torch", "einops"}),
        ("attnzoo_kernels", {"attnzoo_kernels", "torch", "triton"}),
    ],
)
def test_files_import_only_what_their_layer_may(package, allowed):
    for path in sources(package):
        foreign = top_level_imports(parsed(path)) - allowed - STANDARD
        if path.parent == ROOT / "attnzoo" / "hugging_face":
            foreign -= {"transformers"}
        assert not foreign, f"{path.relative_to(ROOT)} imports {foreign}"


def test_imports_point_one_way():
    assert sources("attnzoo_kernels")
    for package, forbidden in (
        ("attnzoo_kernels", ("attnzoo", "attnzoo_recipes")),
        ("attnzoo", ("attnzoo_recipes",)),
    ):
        for path in sources(package):
            for _, name in imports(parsed(path)):
                assert name.split(".")[0] not in forbidden, f"{path.relative_to(ROOT)} imports {name}"


def dotted(path: Path) -> str:
    """The module's name."""
    name = next(name for name, folder in PACKAGES.items() if path.is_relative_to(folder))
    parts = path.relative_to(PACKAGES[name]).with_suffix("").parts
    return ".".join([name, *(part for part in parts if part != "__init__")])


def arrows(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """Which of these modules each of them imports, anywhere in the file."""
    graph: dict[str, set[str]] = {}
    for module, tree in trees.items():
        targets = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                targets |= (inner & set(trees)) or {node.module}
        graph[module] = {target for target in targets if target in trees and target != module}
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or around."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen, waiting = set(), list(graph[start])
        while waiting:
            module = waiting.pop()
            if module not in seen:
                seen.add(module)
                waiting += graph[module]
        reached[start] = seen
    groups = {frozenset(b for b in reached[a] if a in reached[b]) for a in graph if a in reached[a]}
    return sorted(sorted(group) for group in groups)


# Rooms of each package from the lowest up; files outside rooms carry their own names. A module imports its own room
# and those before it.
# Modules that only warn and lead on.
OLD_NAMES = {"corpus": "Corpus", "load_model": "load_model", "tokenization": "BpeTokenizer"}
FLOORS = {
    "attnzoo": [
        {"tracing", "rules"}, {"backends", "masks", "rotary", "cache"}, {"cache_state"}, {"ops", "distributed"},
        {"modules"},
        {"adapters", "conversion", "costs", "description"}, {"__init__"}, {"__main__", "diagnostics"},
        {"hugging_face"},
    ],
    "attnzoo.diagnostics": [
        {"arguments", "configs", "drawing", "layer_probe"}, {"projections", "batches", "training_records"},
        {"attention_layer"}, {"layers"}, {"heads"}, {"pruning", "spectra", "capacity"}, {"plots"}, {"__init__"},
    ],
    "attnzoo_recipes": [
        {"__init__", "allowlist", "commands", "files", "losses", "optimisers", "random_states",
         "sharded_checkpoints", "signals", "tables"},
        {"data", "feed_forward", "lm", "model_config", "options"},
        {"checkpointing", "initial_weights", "sampling", "sharding", "trainer"}, {"training"}, {"callbacks"},
        {"commandline", "consolidate", "diagnose", "generate", "export", "convert"},
        {"compare", "pretrain"}, {"evidence", *OLD_NAMES},
    ],
}  # fmt: skip


def floor_of(module: str, package: str) -> int | None:
    """On which floor of the package a module is, None for one outside."""
    if module != package and not module.startswith(f"{package}."):
        return None
    room = "__init__" if module == package else module.removeprefix(f"{package}.").split(".")[0]
    (floor,) = (number for number, rooms in enumerate(FLOORS[package]) if room in rooms)
    return floor


def upward(graph: dict[str, set[str]], package: str) -> list[tuple[str, str]]:
    """Imports that go to a higher floor of the package."""
    return [
        (module, target)
        for module, targets in sorted(graph.items())
        for target in sorted(targets)
        if (here := floor_of(module, package)) is not None
        and (there := floor_of(target, package)) is not None
        and there > here
    ]


@cache
def import_graph() -> dict[str, set[str]]:
    return arrows({dotted(path): parsed(path) for path in sources(*PACKAGES)})


@pytest.mark.parametrize("module", OLD_NAMES)
def test_an_old_name_of_a_module_warns_and_leads_on(module):
    sys.modules.pop(f"attnzoo_recipes.{module}", None)
    with pytest.warns(DeprecationWarning, match=f"attnzoo_recipes.{module} is attnzoo_recipes.* since 0.2.0"):
        old = importlib.import_module(f"attnzoo_recipes.{module}")
    found = getattr(old, OLD_NAMES[module])
    assert found is getattr(sys.modules[found.__module__], OLD_NAMES[module])


def test_no_imports_in_a_circle():
    assert circles(import_graph()) == []


@pytest.mark.parametrize("package", FLOORS)
def test_no_imports_upwards(package):
    assert upward(import_graph(), package) == []


def test_the_checks_of_imports_see_circles_and_upward_arrows():
    trees = {
        "attnzoo.masks": ast.parse("def f():\n    from attnzoo.ops import softmax"),
        "attnzoo.ops.softmax": ast.parse("import attnzoo.masks"),
        "attnzoo.modules.gqa": ast.parse("from attnzoo.ops.softmax import attend\nimport torch"),
    }
    graph = arrows(trees)
    assert circles(graph) == [["attnzoo.masks", "attnzoo.ops.softmax"]]
    assert upward(graph, "attnzoo") == [("attnzoo.masks", "attnzoo.ops.softmax")]
    assert graph["attnzoo.modules.gqa"] == {"attnzoo.ops.softmax"}


def private_names(tree: ast.AST) -> set[str]:
    """Private methods and attributes that classes below tree define."""
    found = set()
    for cls in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        for node in ast.walk(cls):
            if isinstance(node, ast.FunctionDef):
                found.add(node.name)
            elif (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and ast.unparse(node.value) == "self"
            ):
                found.add(node.attr)
            elif isinstance(node, ast.AnnAssign | ast.Assign) and node in cls.body:
                targets = [node.target] if isinstance(node, ast.AnnAssign) else node.targets
                found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return {name for name in found if name.startswith("_") and not name.startswith("__")}


def private_uses(tree: ast.AST, names: set[str]) -> set[str]:
    """Those of the names that are read off anything but self, or named in a string of getattr."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in names and ast.unparse(node.value) not in ("self", "cls"):
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in names:
            found.add(node.value)
    return found


def test_a_file_of_a_mechanism_can_be_read_in_one_go():
    lengths = sorted(len(path.read_text().splitlines()) for path in (PACKAGES["attnzoo"] / "modules").glob("*.py"))
    assert lengths[len(lengths) // 2] < 200
    assert lengths[-1] <= 350


def test_no_private_attribute_of_a_mechanism_is_named_outside_modules():
    modules = PACKAGES["attnzoo"] / "modules"
    names = {name for path in modules.glob("*.py") for name in private_names(parsed(path))}
    assert "_base_arguments" in names
    for path in sources(*PACKAGES):
        if not path.is_relative_to(modules):
            assert not private_uses(parsed(path), names), path.relative_to(ROOT)
    planted = ast.parse("class A:\n    def _b(self):\n        self._c = 1\n    _d: int = 2")
    assert private_names(planted) == {"_b", "_c", "_d"}
    assert private_uses(ast.parse("x._b\nself._c\ngetattr(x, '_d', 1)"), {"_b", "_c", "_d"}) == {"_b", "_d"}


def test_diagnostics_and_recipes_know_no_mechanism_by_its_class():
    classes = {name for name in attnzoo.__all__ if name.endswith(("Attention", "Heads"))}
    assert "GroupedQueryAttention" in classes
    for path in [*(PACKAGES["attnzoo"] / "diagnostics").rglob("*.py"), *sources("attnzoo_recipes")]:
        used = {node.id for node in ast.walk(parsed(path)) if isinstance(node, ast.Name)}
        assert not used & classes, path.relative_to(ROOT)


def test_no_function_shadows_its_module():
    code = """
import importlib, pkgutil, types
shadowed = []
for top in ("attnzoo", "attnzoo_kernels", "attnzoo_recipes"):
    package = importlib.import_module(top)
    for info in pkgutil.walk_packages(package.__path__, top + "."):
        if not info.name.endswith("__main__"):
            importlib.import_module(info.name)
    for info in pkgutil.walk_packages(package.__path__, top + "."):
        if info.name.endswith("__main__"):
            continue
        parent, _, name = info.name.rpartition(".")
        thing = getattr(importlib.import_module(parent), name)
        if not isinstance(thing, types.ModuleType):
            shadowed.append(info.name)
print(shadowed)
"""
    assert run(code, ROOT, ROOT / "kernels", ROOT / "recipes").strip() == "[]"


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import a.b, c\nfrom d import e", {"a", "c", "d"}),
        ("def f():\n    import a\n    from b import c", set()),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import a", {"typing"}),
        ("try:\n    import a\nexcept ImportError:\n    a = None", {"a"}),
        ("class A:\n    import b", {"b"}),
    ],
)
def test_the_import_check_sees(source, names):
    assert top_level_imports(ast.parse(source)) == names


def offences(tree: ast.AST) -> list[str]:
    """Ways to run code that came as data."""
    found = [
        f"import of {name}"
        for _, name in imports(tree)
        if name.split(".")[0] in {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    ]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in {"eval", "exec", "compile", "os.system", "builtins.eval", "builtins.exec"}:
            found.append(f"{called}()")
        loads = called == "torch.load" or called.endswith(".load_from_checkpoint")
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        safe = "weights_only" in keywords and ast.unparse(keywords["weights_only"]) == "True"
        if loads and not safe:
            found.append(f"{called} without weights_only=True")
        if ast.unparse(keywords.get("trust_remote_code", ast.Constant(False))) != "False":
            found.append("trust_remote_code")
        if ast.unparse(keywords.get("shell", ast.Constant(False))) != "False":
            found.append("a shell command")
    return found


def test_no_data_is_executed():
    for path in sources(*PACKAGES):
        assert not offences(parsed(path)), f"{path.relative_to(ROOT)}: {offences(parsed(path))}"


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("import pickle", 1),
        ("from pickle import loads", 1),
        ("torch.load(f)", 1),
        ("torch.load(f, weights_only=False)", 1),
        ("torch.load(f, weights_only=True)", 0),
        ("Model.load_from_checkpoint(f)", 1),
        ("eval('1')", 1),
        ("model.eval()", 0),
        ("re.compile('a')", 0),
        ("load(name, trust_remote_code=True)", 1),
        ("load(name, trust_remote_code=own)", 1),
        ("load(name, trust_remote_code=False)", 0),
        ("subprocess.run('ls', shell=True)", 1),
    ],
)
def test_the_security_check_sees(source, count):
    assert len(offences(ast.parse(source))) == count


def test_trust_remote_code_is_nowhere():
    folders = ("attnzoo", "kernels", "recipes", "configs", "benchmarks")
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*")):
        if path.suffix in {".py", ".yaml", ".toml", ".sh"}:
            assert not re.search(r"trust_remote_code(?!=False\b)", path.read_text()), path.relative_to(ROOT)


def test_public_names_resolve_and_are_documented():
    for name in attnzoo.__all__:
        thing = getattr(attnzoo, name)
        if not (inspect.isclass(thing) or inspect.isfunction(thing)):
            continue
        assert vars(thing)["__doc__"] if inspect.isclass(thing) else thing.__doc__, name
        members = vars(thing).items() if inspect.isclass(thing) else ()
        for member, value in members:
            function = getattr(value, "__func__", getattr(value, "fget", value))
            if not member.startswith("_") and inspect.isfunction(function):
                assert function.__doc__, f"{name}.{member}"


def test_every_module_class_and_public_function_is_documented():
    for path in sources(*PACKAGES):
        tree = parsed(path)
        assert ast.get_docstring(tree), path.relative_to(ROOT)
        for node in tree.body:
            if not isinstance(node, ast.ClassDef | ast.FunctionDef) or node.name.startswith("_"):
                continue
            if "overload" in {ast.unparse(decorator) for decorator in node.decorator_list}:
                continue
            if node.name.endswith("_kernel"):
                # A kernel's comment above gives grid, ownership and what is never stored.
                above = path.read_text(encoding="utf-8").splitlines()[node.decorator_list[0].lineno - 2]
                assert above.startswith("#"), f"{path.relative_to(ROOT)}: {node.name}"
            else:
                assert ast.get_docstring(node), f"{path.relative_to(ROOT)}: {node.name}"


def test_source_roots_are_no_packages():
    for root in ("kernels", "recipes", "."):
        assert not (ROOT / root / "__init__.py").exists(), root


def test_version_is_the_same_everywhere():
    assert "version" not in PYPROJECT["project"], "the package's own number is the one place"
    assert PYPROJECT["tool"]["hatch"]["version"]["path"] == "attnzoo/__init__.py"
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(r'^version: "?([^"\n]+)"?$', citation, re.MULTILINE)[1] == attnzoo.__version__
    released = re.search(r"^## \[(\d.*)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released[1] == attnzoo.__version__
    assert re.search(r'^date-released: "?([^"\n]+)"?$', citation, re.MULTILINE)[1] == released[2]


def test_types_are_shipped():
    assert (ROOT / "attnzoo" / "py.typed").read_text() == ""


def test_console_scripts_resolve():
    scripts = PYPROJECT["project"]["scripts"]
    names = (
        "pretrain", "generate", "export", "convert", "consolidate", "compare", "evidence", "spectrum", "heads", "prune",
    )  # fmt: skip
    assert set(scripts) == {f"attnzoo-{name}" for name in names}
    for name, target in scripts.items():
        command = importlib.metadata.EntryPoint(name, target, "console_scripts").load()
        # A console script calls it without arguments.
        inspect.signature(command).bind()


@pytest.mark.parametrize("name", PYPROJECT["project"]["scripts"])
def test_a_command_without_its_packages_says_which_extra_brings_them(name, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None if package == "lightning" else package)
    command = importlib.metadata.EntryPoint(name, PYPROJECT["project"]["scripts"][name], "console_scripts").load()
    with pytest.raises(SystemExit) as stopped:
        command()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"{name}: error: the command needs lightning: pip install 'attnzoo[train]'\n"


def test_a_command_that_is_stopped_while_it_imports_says_so(monkeypatch, capsys):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands.importlib, "import_module", interrupted)
    with pytest.raises(SystemExit) as stopped:
        commands.generate([])
    assert (stopped.value.code, capsys.readouterr().err) == (130, "attnzoo-generate: stopped\n")


def test_constraints_are_exact_pins_from_a_registry():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line.strip() and not line.startswith("#")]
    assert "torch==2.13.0" in pins
    for pin in pins:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!_-]+( *;.*)?", pin), pin


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda path: path.stem)
def test_workflows_run_what_is_there(path):
    workflow = yaml.safe_load(path.read_text())
    targets = re.findall(
        r"^([\w./-]+):", (ROOT / "Makefile").read_text().replace("$(READY)", ".venv/.installed"), re.MULTILINE
    )
    for name, job in workflow["jobs"].items():
        assert job["timeout-minutes"] > 0, name
        for step in job["steps"]:
            for target in re.findall(r"\bmake (\S+)", step.get("run", "")):
                assert target in targets, f"{name}: make {target}"
            for file in re.findall(r"(?<!\S)(tests/\S+|\.ci/\S+)", step.get("run", "")):
                assert (ROOT / file).exists(), f"{name}: {file}"
    if path.stem == "ci":
        assert workflow["jobs"]["test"]["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]


def test_no_two_test_files_share_a_name():
    """Pytest imports them by their names alone, and then refuses the second when all of them run."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names)), sorted({name for name in names if names.count(name) > 1})


def code_lines(text: str) -> int:
    """Lines that hold code: neither blank nor of comments and docstrings alone."""
    words = {
        line
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    empty = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    held = {line for token in tokens if token.type not in empty for line in range(token.start[0], token.end[0] + 1)}
    return len(held - words)


@pytest.mark.parametrize(
    ("name", "most"), [("gqa", 170), ("kha", 150), ("mla", 280), ("moh", 180), ("dcmha", 260), ("mhla", 250)]
)
def test_a_mechanism_is_read_in_a_few_pages(name: str, most: int) -> None:
    text = (ROOT / "attnzoo" / "modules" / f"{name}.py").read_text()
    assert code_lines(text) <= most
    assert code_lines(text + "\nlast = 1  # a line\n# and a comment\n") == code_lines(text) + 1
