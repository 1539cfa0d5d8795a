"""How the package hangs together: imports go one way, and importing it costs next to nothing beside torch."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

import halotune
from halotune.engine.adapted import AdaptedModel
from halotune.engine.model import PeftModel
from halotune.engine.tuner import AdapterModel
from halotune.methods.registry import kinds, methods

ROOT = Path(halotune.__file__).parent
MODULE_NAME = re.compile(r"halotune(\.\w+)+")  # a text that is one names a module to be imported

# part -> the other parts, or modules of theirs, that it may import; None is anything.
ALLOWED: dict[str, set[str] | None] = {
    "core": {"ops"},
    "ops": set(),
    "methods": {"core", "ops"},
    "export": {"core"},
    "engine": {"core", "ops", "export", "methods.registry"},
    "convert": {"core", "engine", "export.components", "methods.registry", "methods.lycoris_form"},
    "quant": {"core"},
    "integrations": {"engine", "core", "methods.registry"},
    "recipes": None,
    "report": {"core"},
    "inspect": {"cli.loading", "report", "core", "engine", "methods.registry", "methods.measures"},
    "demo": None,
    "bench": None,
    "cli": None,
    "__main__": {"cli"},
    "api": None,
    "compat": {"core", "engine", "methods.registry"},
    "__init__": {"api", "compat", "methods", "methods.registry"},
}
THIRD_PARTY = {"torch", "safetensors", "typing_extensions"}


def files() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def part_of(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(file: Path, *, lazy: bool = True) -> Iterator[str]:
    """Full names of what a file imports, by name (`import_module`) too; `lazy=False`: only what importing the file imports."""
    package = ".".join(("halotune", *file.relative_to(ROOT).parts[:-1]))

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            typing_only = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
            if lazy or not (inside or typing_only):
                yield child
                yield from walk(child)

    for node in walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif lazy and isinstance(node, ast.Constant) and isinstance(node.value, str):
            if MODULE_NAME.fullmatch(node.value):
                yield node.value
        elif lazy and isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            name = node.args[0]
            if isinstance(name, ast.Constant) and name.value.startswith("."):
                yield resolve_name(name.value, package)


def within(name: str, places: Iterable[str]) -> bool:
    return any(f"{name}.".startswith(f"halotune.{place}.") for place in places)


def third_party(names: Iterator[str]) -> set[str]:
    return {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"halotune", "__future__"}


def test_every_part_has_its_place():
    assert {part_of(f) for f in files()} <= ALLOWED.keys(), "say in ALLOWED what the new part may import"


@pytest.mark.parametrize("part", [p for p, allowed in ALLOWED.items() if allowed is not None])
def test_imports_go_one_way(part):
    allowed = {part, *ALLOWED[part]}
    for file in (f for f in files() if part_of(f) == part):
        wrong = {name for name in imports(file) if name.startswith("halotune.") and not within(name, allowed)}
        assert not wrong, f"{file.relative_to(ROOT)} imports {wrong}"


def test_the_walk_finds_imports():
    """Else the tests above would hold of anything."""
    model = ROOT / "engine" / "model.py"
    assert {"halotune.methods.registry.method_of", "halotune.engine.injection.modules.adapted_layers"} <= set(imports(model))
    assert "halotune.ops.kernels" in set(imports(ROOT / "ops" / "product.py"))  # by name
    assert "halotune.api" in set(imports(ROOT / "__init__.py"))
    hub = ROOT / "core" / "files.py"
    assert "huggingface_hub" in third_party(imports(hub)) - third_party(imports(hub, lazy=False))


KERNELS = {"kernels.py", "grouped_kernels.py", "grouped_linear_kernels.py", "launch.py"}


def test_core_and_methods_need_torch_alone():
    for file in (f for f in files() if part_of(f) in ("core", "ops", "methods") and f.name not in KERNELS):
        assert third_party(imports(file, lazy=False)) <= THIRD_PARTY, file
        assert third_party(imports(file)) <= THIRD_PARTY | {"huggingface_hub"}, file


def test_kernels_alone_need_triton():
    """And they are imported where a kernel is asked for, never with the package."""
    modules = {name.removesuffix(".py") for name in KERNELS}
    for file in files():
        named = imports(file, lazy=False)
        if file.name in KERNELS:
            assert third_party(named) <= THIRD_PARTY | {"triton"}, file
        else:
            assert not any({"triton", *modules} & set(name.split(".")) for name in named), file


def test_importing_takes_nothing_but_torch():
    """Whatever else a feature needs is imported where it is used, parts of torch as well: its compiler takes seconds."""
    code = "import sys, torch; before = {*sys.modules}; import halotune.api; print(*sys.modules.keys() - before)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    imported = {name.split(".")[0] for name in out.split()} - sys.stdlib_module_names
    assert imported <= {"halotune", "typing_extensions"}, imported


# Where code may name a method: the format `lora` and what other programs call theirs, and what is chosen by hand.
NAMED: dict[str, set[str]] = {
    "bench/config.py": {"hra", "loha", "bone", "bat", "lora"},  # presets
    "bench/rows.py": {"lora"},
    "bench/report.py": {"lora"},
    "demo/methods.py": {"hra", "loha", "bone", "bat", "lora"},
    "recipes/common/config.py": {"hra"},  # the default method
    "recipes/diffusion.py": {"lora"},  # --also
    "recipes/language/answers.py": {"lora"},  # the form in which vLLM takes an adapter
    "recipes/language/evaluated.py": {"lora"},
    "recipes/math.py": {"hra"},  # whose paper the presets are of
    "demo/report.py": {"hra", "loha", "bone", "bat", "lora"},
    "engine/adapted.py": {"lora", "bone", "miss"},  # export("lora"), save_pretrained(bone_as_miss=True)
    "integrations/diffusers/pipeline.py": {"bone", "miss"},
    "integrations/diffusers/models.py": {"lora"},  # diffusers' own methods
    "engine/weights/combine.py": {"lora"},
    "engine/files/export.py": {"lora"},
    "engine/files/state_dict.py": {"lora"},  # kohya's names
    "convert": {"lora"},
    "export": {"lora"},
    "cli/export.py": {"lora"},
    "cli/main.py": {"lora"},
    "cli/convert.py": {"bone", "miss", "lora"},  # examples in the help
}


def calls(file: Path, name: str) -> Iterator[ast.Call]:
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    return (node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == name)


def test_fork_rng_is_told_the_devices():
    """Without them it initializes every GPU that there is, and warns of it where there are two."""
    tests = sorted(Path(__file__).parent.rglob("*.py"))
    found = [(file, call) for file in [*files(), *tests] for call in calls(file, "fork_rng")]
    assert {ROOT / "core" / "generators.py", Path(__file__).with_name("demo") / "conftest.py"} <= {file for file, _ in found}
    assert [str(file) for file, call in found if not (call.args or call.keywords)] == []


def code_texts(file: Path) -> Iterator[str]:
    """Identifiers and strings of a file, without docstrings."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        for name, value in ast.iter_fields(node):
            if isinstance(value, str) and name != "type_comment" and id(node) not in docs:
                yield value
            if isinstance(node, (ast.Global, ast.Nonlocal)) and isinstance(value, list):
                yield from value


def test_methods_are_named_in_their_folders_alone():
    names = {"oft", *(m.peft_type.lower() for m in methods()), *(name.lower() for name in kinds())}
    word = re.compile(rf"(?<![A-Za-z])(?i:{'|'.join(sorted(names))})(?![a-z]|[A-Z]+\b)")
    found: dict[str, set[str]] = {}
    for file in (f for f in files() if part_of(f) != "methods"):
        path = file.relative_to(ROOT).as_posix()
        allowed = set().union(*(words for place, words in NAMED.items() if f"{path}/".startswith(f"{place}/")))
        texts = (text.replace("lycoris-lora", "") for text in code_texts(file))
        found[path] = {w.lower() for text in texts for w in word.findall(text)} - allowed
    wrong = {path: words for path, words in found.items() if words}
    assert not wrong, "what is a method's own belongs into its folder, or into the registry"


def test_the_named_are_still_named():
    """An exception that nothing needs any more is deleted."""
    for place, words in NAMED.items():
        texts = " ".join(
            t for f in files() if f"{f.relative_to(ROOT).as_posix()}/".startswith(f"{place}/") for t in code_texts(f)
        )
        assert all(w in texts.lower() for w in words), place


def test_what_an_adapter_model_has_a_peft_model_has():
    """As methods of its own, which type checkers and editors see."""
    internal = {"prefix", "tuner_layer_cls", "target_module_mapping", "release"}
    own = {name for c in (AdapterModel, AdaptedModel) for name in vars(c) if not name.startswith("_")} - internal
    missing = [name for name in sorted(own) if not hasattr(PeftModel, name)]
    assert not missing
    assert all(
        getattr(PeftModel, name).__doc__
        for name in own
        if name not in ("peft_config", "active_adapter", "active_adapters", "tuner")
    )


def test_the_names_in_front_are_few_and_the_others_are_there():
    assert len(halotune.__all__) < 25
    others = [
        "PeftModelForCausalLM",
        "AutoPeftModelForCausalLM",
        "PeftType",
        "AdapterConfig",
        *(f"{n}Model" for n in ("HRA", "LoHa")),
    ]
    assert all(hasattr(halotune, name) and name not in halotune.__all__ for name in others)


def test_the_package_runs_as_a_module():
    out = subprocess.run([sys.executable, "-m", "halotune", "--version"], capture_output=True, text=True, check=True).stdout
    assert out == f"halotune {halotune.__version__}\n"
