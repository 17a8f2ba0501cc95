"""Lay the library out as Hugging Face's ``kernels`` loads it: ``python hub/build.py FOLDER``.

FOLDER becomes a kernel repository: ``build/torch-<backend>/`` with the package's files and a ``metadata.json`` in each.
The loader imports the package under the id that the metadata gives, so the copy's imports are made relative, and its
operators take their namespace from that id (`fastlenet.ops.NAMESPACE`), which differs for every content.

Only the files that ``import fastlenet`` needs are copied, without the trainer and the command line.
"""

from __future__ import annotations

import ast
import hashlib
import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAME = "fastlenet"
BACKENDS = ("cpu", "cuda", "rocm")
# Counts incompatible changes of the copy's interface. Users ask for the copy by this number.
VERSION = 1


def source_of(module: str) -> Path | None:
    """The file of a module of the package, or None if there is no such module."""
    folder, parts = ROOT / NAME, module.split(".")[1:]
    if parts[:1] == ["kernels"]:
        folder, parts = ROOT / "kernels", parts[1:]
    path = folder.joinpath(*parts)
    return next((file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()), None)


def imports(tree: ast.AST, package: str) -> list[tuple[ast.ImportFrom, str]]:
    """The package's own imports in a syntax tree, with the absolute name of the module that each is from.

    Raises:
        ValueError: for ``import fastlenet...``, which has no relative form.
    """
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and any(alias.name.split(".")[0] == NAME for alias in node.names):
            raise ValueError(
                f"line {node.lineno}: write 'from {NAME} import ...'; without 'from' an import is absolute"
            )
        if isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            if module.split(".")[0] == NAME:
                found.append((node, module))
    return found


def package_of(module: str, file: Path) -> str:
    """The package that a module's relative imports start from."""
    return module if file.name == "__init__.py" else module.rpartition(".")[0]


def relative(text: str, package: str) -> str:
    """Rewrite a module's imports of the package as relative ones; nothing else changes."""
    lines = text.splitlines(keepends=True)
    for node, module in imports(ast.parse(text), package):
        if node.level == 0:
            dots = "." * len(package.split("."))
            below = module.removeprefix(NAME).removeprefix(".")
            line = lines[node.lineno - 1]
            lines[node.lineno - 1] = line.replace(f"from {module} import", f"from {dots}{below} import", 1)
    return "".join(lines)


def collect() -> dict[str, bytes]:
    """The files of the copy by path: the package's ``__init__`` and all that it leads to, and the layers."""
    layers = relative((ROOT / "hub" / "layers.py").read_text(encoding="utf-8"), NAME)
    files: dict[str, bytes] = {"layers.py": layers.encode()}
    waiting, seen = [NAME], {NAME}
    while waiting:
        module = waiting.pop()
        file = source_of(module)
        assert file is not None, module
        text, package = file.read_text(encoding="utf-8"), package_of(module, file)
        for node, origin in imports(ast.parse(text), package):
            parts = origin.split(".")
            # A module's parents are imported with it, and a name may itself be a module.
            names = [".".join(parts[: end + 1]) for end in range(len(parts))]
            names += [f"{origin}.{alias.name}" for alias in node.names]
            new = [name for name in names if name not in seen and source_of(name) is not None]
            seen.update(new)
            waiting += new
        copy = relative(text, package)
        if module == NAME:
            copy += "\nfrom . import layers as layers  # noqa: E402  (what kernelize looks for)\n"
        path = Path(*module.split(".")[1:])
        files[str(path / "__init__.py" if file.name == "__init__.py" else path.with_suffix(".py"))] = copy.encode()
    for data in sorted((ROOT / "kernels").glob("*.json")):
        files[f"kernels/{data.name}"] = data.read_bytes()
    return files


def build(folder: Path) -> list[Path]:
    """Write the repository in place of an earlier build; return the folders of its variants."""
    files = collect()
    content = hashlib.sha256()
    for path in sorted(files):
        content.update(path.encode() + b"\0" + files[path] + b"\0")
    variants = []
    for backend in BACKENDS:
        variant = folder / "build" / f"torch-{backend}"
        shutil.rmtree(variant, ignore_errors=True)
        for path, data in files.items():
            target = variant / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        metadata = {
            "name": NAME,
            "id": f"_{NAME}_{backend}_{content.hexdigest()[:7]}",
            "version": VERSION,
            "license": "MIT",
            "python-depends": [],
            "backend": {"type": backend},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
        variants.append(variant)
    return variants


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} FOLDER")
    for made in build(Path(sys.argv[1])):
        print(made)
