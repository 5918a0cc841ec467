"""Write the values of a recipe into params.yaml. Comments and all other values do not change.

    python -m tools.use RECIPE

recipes/README.md lists the recipes. `git diff` shows the changes; `git checkout params.yaml` undoes them.
"""

import sys
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.common.errors import UserError
from pipeline.common.outputs import atomic_output
from pipeline.common.parameters.params_yaml import check

PARAMETERS = Path("params.yaml")


def main() -> None:
    path = recipe(" ".join(sys.argv[1:]))
    use(path)
    print(f"{PARAMETERS} has the values of {path}: git diff shows them, make check estimates memory and disk")


def recipes() -> dict[str, Path]:
    return {path.stem: path for path in sorted(Path("recipes").glob("*.yaml"))}


def recipe(name: str) -> Path:
    """Raises UserError with all names if no recipe has this name."""
    if name not in recipes():
        raise UserError(f"RECIPE is {name!r}: set it to one of {', '.join(recipes())}")
    return recipes()[name]


def use(recipe: Path) -> None:
    """Write the recipe's values into params.yaml.

    Raises:
        UserError: the recipe or params.yaml has an unknown key or an invalid value. params.yaml does not change.
    """
    check(PARAMETERS)
    yaml = YAML()
    yaml.width = 2**16  # do not fold lines
    yaml.preserve_quotes = True
    yaml.representer.add_representer(type(None), lambda to, _: to.represent_scalar("tag:yaml.org,2002:null", "null"))
    parameters = yaml.load(PARAMETERS)
    try:
        sections = yaml.load(recipe)
    except YAMLError as error:
        raise UserError(f"{recipe} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not (isinstance(sections, dict) and all(isinstance(values, dict) for values in sections.values())):
        raise UserError(f"{recipe} must have sections with keys: write it like params.yaml")
    for section, values in sections.items():
        parameters.setdefault(section, {}).update(values)  # `check` below refuses an unknown section
    with atomic_output(PARAMETERS) as aside:
        yaml.dump(parameters, aside)
        try:
            check(aside)
        except UserError as refusal:
            raise UserError(str(refusal).replace(str(aside), str(recipe))) from None


if __name__ == "__main__":
    main()
