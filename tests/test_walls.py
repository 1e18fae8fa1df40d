"""Import arrows point down: between packages as docs/architecture.md says, and never in a circle."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("data", "schedules", "detection")

# What a package may import besides itself. Packages of one line do not know each other.
ALLOWED = {
    "data": set(),
    "schedules": set(),
    "detection.models": set(),
    "detection.reporting": set(),
    "detection.process_exit": set(),
    "detection.errors": set(),
    "detection.config": {"schedules", "data"},
    "detection.evaluation": {"data"},
    "detection.inference": {"detection.models", "detection.evaluation", "detection.reporting", "data"},
    "detection.export": {"detection.models", "detection.reporting", "data"},
    "detection.engine": {
        *("detection.config", "detection.models", "detection.evaluation", "detection.reporting"),
        *("data", "schedules"),
    },
    "train": {"detection.config", "detection.engine", "detection.process_exit"},
}


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(file): file for name in PACKAGES for file in (ROOT / name).rglob("*.py")}
FILES["train"] = ROOT / "train.py"


def imports_of(module: str) -> Iterator[str]:
    """The project's files that a file imports, at its top and inside its functions alike."""
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            base = node.module or ""
            found = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in FILES else base for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found = [word.value for word in node.args if isinstance(word, ast.Constant)]
        else:
            continue
        yield from (name for name in found if name in FILES and name != module)


IMPORTS = {module: sorted(set(imports_of(module))) for module in FILES}


def package_of(module: str) -> str:
    return ".".join(module.split(".")[: 2 if module.startswith("detection.") else 1])


def folder_of(module: str) -> str:
    return str(FILES[module].parent.relative_to(ROOT))


def circle_in(arrows: dict[str, set[str]]) -> list[str]:
    """One circle of the graph, as the names along it; empty where there is none."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for target in sorted(arrows.get(name, ())):
            if found := visit(target, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(arrows) if (found := visit(name, []))), [])


def test_a_file_imports_only_what_its_package_may_know() -> None:
    found = []
    for module, names in IMPORTS.items():
        if (package := package_of(module)) != "detection":  # which shows what a notebook needs, loaded at first use
            known = {package, "detection.errors", *ALLOWED[package]}
            found += [f"{module} imports {name}" for name in names if package_of(name) not in known]
    assert found == []


def test_no_files_import_each_other_in_a_circle() -> None:
    assert circle_in({module: set(found) for module, found in IMPORTS.items()}) == []


def test_no_folders_import_each_other_in_a_circle() -> None:
    arrows: dict[str, set[str]] = {}
    for module, found in IMPORTS.items():
        # An __init__ that shows what is below it, and who takes a name from there, say nothing about the folders.
        if FILES[module].name != "__init__.py":
            targets = {folder_of(name) for name in found if FILES[name].name != "__init__.py"}
            arrows.setdefault(folder_of(module), set()).update(targets - {folder_of(module)})
    assert circle_in(arrows) == []


def test_a_circle_is_found_where_there_is_one() -> None:
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle_in({"a": {"b", "c"}, "b": {"c"}}) == []


def test_a_folder_can_be_read_at_a_glance() -> None:
    folders = {file.parent for name in (*PACKAGES, "scripts", "tests") for file in (ROOT / name).rglob("*.py")}
    full = {str(each.relative_to(ROOT)): len(list(each.glob("*.py"))) for each in folders}
    assert {name: count for name, count in full.items() if count > (24 if name == "scripts" else 14)} == {}


def test_no_constructor_of_the_engine_takes_more_than_8_arguments() -> None:
    found = {}
    for module in (name for name in FILES if name.startswith("detection.engine")):
        for node in ast.walk(ast.parse(FILES[module].read_text())):
            if not isinstance(node, ast.ClassDef):
                continue
            made = [each.args for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "__init__"]
            given = [argument for each in made for argument in (*each.args[1:], *each.kwonlyargs)]
            is_dataclass = any("dataclass" in ast.unparse(each) for each in node.decorator_list)
            fields = [each for each in node.body if isinstance(each, ast.AnnAssign)] if is_dataclass else []
            found[f"{module}.{node.name}"] = len(given) + len(fields)
    assert {name: count for name, count in found.items() if count > 8} == {}
