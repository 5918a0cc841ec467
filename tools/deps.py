"""Write each stage's code and libraries into dvc.yaml, and the versions of the libraries into libraries.yaml.

    python -m tools.deps

`deps` of a stage get every module that the stage imports, directly or not, and every script of llama.cpp/ that the
stage runs. `params` get every library that these files import, as keys of libraries.yaml. All else in dvc.yaml stays.
"""

import ast
import re
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import packages_distributions
from io import StringIO
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq

from pipeline.common.errors import UserError
from pipeline.common.pinned import pins

ROOT = Path(__file__).parent.parent
PIPELINE, LIBRARIES = ROOT / "dvc.yaml", ROOT / "libraries.yaml"
CODE = ("pipeline/", "stages/", "llama.cpp/")
ASSETS = (".html", ".css", ".js", ".md")  # which a module of the same name reads
SOURCE = "llama.cpp/source.txt"

# No stage depends on these two lists: the entry in dvc.yaml has the stage's own sections of the first, its own paths of
# the second.
LISTS = {"pipeline/common/parameters/schema.py", "pipeline/common/paths.py"}
# These modules read parameters, check, print, and find or restore files. Another version of what they import changes no
# output.
MAKES_NOTHING = re.compile(
    r"pipeline/(common/(parameters/\w+|dvc_\w+|pinned|printing)|model/(hub_cache|free_memory))\.py"
)
PRINTS = {"tqdm"}
OPTIONAL = {"liger_kernel"}  # has no pin in requirements.txt: metrics/details/train.json names the version
# Libraries that work for an imported library: on templates, weights, devices, token ids, rows.
UNDERNEATH = {"transformers": {"accelerate", "jinja2", "safetensors", "tokenizers"}, "datasets": {"pyarrow"}}
# What the scripts of llama.cpp/ take from the archive that source.txt names, and what the converter in there imports.
CONVERTER = {"llama.cpp/fetch.py", SOURCE}
OF_CONVERTER = {"numpy", "sentencepiece", "torch", "transformers"}
OF_SCRIPTS = {"conversion", "fetch", "gguf"}  # modules in that archive, and beside the scripts


def main() -> None:
    for file, text in written(PIPELINE.read_text(encoding="utf-8")).items():
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")
            print(f"{file.name} is new: dvc status shows which stages run again")


def written(text: str) -> dict[Path, str]:
    """dvc.yaml, of which `text` is the present content, and libraries.yaml, as they should be."""
    yaml = YAML()
    yaml.width = 2**16  # no line is folded
    yaml.indent(mapping=2, sequence=4, offset=2)
    pipeline = yaml.load(text)
    pinned, used = pins(), set[str]()
    packages = {top: {str(canonicalize_name(name)) for name in of} for top, of in packages_distributions().items()}
    known = {top: names & pinned.keys() for top, names in packages.items()}
    for name, stage in pipeline["stages"].items():
        files = files_of(name, stage)
        libraries = imported_libraries(files, known)
        used |= libraries
        put(stage, "deps", is_code, sorted(with_assets(files)))
        of_libraries = [{LIBRARIES.name: on_one_line(libraries)}] if libraries else []  # none: DVC would take all
        put(stage, "params", lambda entry: isinstance(entry, dict) and LIBRARIES.name in entry, of_libraries)
    dvc_yaml = StringIO()
    yaml.dump(pipeline, dvc_yaml)
    lines = [f'{name}: "{pinned[name]}"\n' for name in sorted(used)]
    head = "# The pinned version of each library that a stage imports: `make deps` writes this file.\n"
    return {PIPELINE: dvc_yaml.getvalue(), LIBRARIES: head + "".join(lines)}


def put(stage: CommentedMap, key: str, is_generated: Any, generated: list[Any]) -> None:
    """Replace what is generated of a list. The other entries stay first, with their comments."""
    if not generated and key not in stage:
        return
    if not stage.get(key):
        stage.pop(key, None)
        stage.insert(list(stage).index("cmd") + 1, key, CommentedSeq())
    entries = stage[key]
    for at in reversed(range(len(entries))):
        if is_generated(entries[at]):
            del entries[at]
    entries.extend(generated)


def on_one_line(names: set[str]) -> CommentedSeq:
    entries = CommentedSeq(sorted(names))
    entries.fa.set_flow_style()
    return entries


def files_of(name: str, stage: dict[str, Any]) -> set[str]:
    """The modules that the stage imports, directly or not, and the scripts of llama.cpp/ that it runs."""
    sections = {entry.partition(".")[0] for entry in (stage.get("params") or []) if isinstance(entry, str)}
    declared = {f"pipeline/common/parameters/{section}.py" for section in sections}
    new = {"stages/__init__.py", f"stages/{name}.py", *(file for file in declared if (ROOT / file).is_file())}
    found: set[str] = set()
    while new:
        found |= new
        new = {used for file in new for used in used_by(file)} - found - LISTS
    return found


def used_by(file: str) -> Iterator[str]:
    """The modules of this project that a file imports, and the scripts of llama.cpp/ that the file runs."""
    yield from filter(None, map(own_file, imports(file)))
    if file.endswith(".py") and not file.startswith("llama.cpp/"):
        scripts = re.findall(r'(?:run_script|completed)\(\s*"(\w+\.py)"', (ROOT / file).read_text(encoding="utf-8"))
        yield from (f"llama.cpp/{script}" for script in scripts)
        yield from CONVERTER if scripts else ()


def own_file(module: str) -> str | None:
    """The file of a module of this project; None for other modules, and for names in a module."""
    path = Path(*module.split("."))
    file = path / "__init__.py" if (ROOT / path).is_dir() else path.with_suffix(".py")
    return str(file) if str(file).startswith(CODE) and (ROOT / file).is_file() else None


def is_code(dep: str) -> bool:
    """Whether `make deps` writes the dependency; a person may write other files of these folders."""
    return dep.startswith(CODE) and (dep.endswith((".py", *ASSETS)) or dep == SOURCE)


def with_assets(files: set[str]) -> set[str]:
    """The files, and the assets beside the modules."""
    assets = {str(Path(file).with_suffix(suffix)) for file in files for suffix in ASSETS}
    return files | {asset for asset in assets if (ROOT / asset).is_file()}


def imported_libraries(files: set[str], known: Mapping[str, set[str]]) -> set[str]:
    """The pinned packages that the files import. `known` has the pinned packages of each module that is installed.

    Raises:
        UserError: a file imports a package that is not pinned, or not installed.
    """
    makers = [file for file in files if file.endswith(".py") and not MAKES_NOTHING.fullmatch(file)]
    others = {"pipeline", "stages"} | PRINTS | OPTIONAL | set(sys.stdlib_module_names)
    found: set[str] = set()
    for file in makers:
        of_scripts = OF_SCRIPTS if file.startswith("llama.cpp/") else set()
        for top in {module.partition(".")[0] for module in imports(file)} - others - of_scripts:
            if not known.get(top):
                raise UserError(f"{file}: {top} is of no package in requirements.txt that is installed: see make setup")
            found |= known[top]
    found |= {name for library in found for name in UNDERNEATH.get(library, ())}
    found |= OF_CONVERTER if "llama.cpp/convert.py" in files else set()
    return found


def imports(file: str) -> Iterator[str]:
    """The modules that a file imports, at the top or later, but not those for types alone."""
    nodes: list[Any] = [ast.parse((ROOT / file).read_text(encoding="utf-8"))] if file.endswith(".py") else []
    for node in nodes:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom):
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)  # a module of a package, perhaps
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        nodes.extend(ast.iter_child_nodes(node))


if __name__ == "__main__":
    main()
