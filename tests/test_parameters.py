import re
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from pipeline.parameters import Parameters, check, load, only
from pipeline.refusal import Refused


def changed(tmp_path: Path, old: str, new: str) -> Path:
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    assert re.search(old, text)
    path = tmp_path / "params.yaml"
    path.write_text(re.sub(old, new, text, count=1), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        (r"r: 16 ", "r: abc ", r"lora\.r is 'abc': input should be a valid integer"),
        (r"r: 16 ", "r: 0 ", r"lora\.r is 0: input should be greater than or equal to 1"),
        (r"4\.0e-3", "2e-4", r"train\.learning_rate is '2e-4': .* \(YAML reads 2e-4 as text; write 2\.0e-04"),
        (
            r"  r: 16",
            "  rr: 8\n  r: 16",
            r"lora\.rr is not a parameter; accepted here: r, alpha, dropout, target_modules",
        ),
        (r"  r: 16.*\n", "", r"lora\.r is missing"),
        (r"q4_k_m\]", "q3]", r"gguf\.quantize is 'q3': input should be 'q8_0', .* or 'q4_0'"),
        (r"all-linear #", "5 #", r"lora\.target_modules is 5: input should be 'all-linear', or .* list"),
        (r"epochs: 12", "epochs: .inf", r"train\.epochs is inf: input should be a finite number"),
        (r"lora:", "lora: [", r"not YAML: .* line \d+"),
    ],
)
def test_a_wrong_value_is_refused_in_one_line_that_names_it(tmp_path: Path, old: str, new: str, line: str) -> None:
    with pytest.raises(Refused) as refusal:
        check(changed(tmp_path, old, new))
    assert re.search(line, str(refusal.value))
    assert "\n" not in str(refusal.value)


def test_every_parameter_has_a_comment_on_its_line() -> None:
    for line in (ROOT / "params.yaml").read_text(encoding="utf-8").splitlines():
        assert re.fullmatch(r"|\w+:|\s*\w+: .+ # .+", line), line


def test_a_stage_can_read_what_it_declares_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    parameters = load("train_qlora")
    assert parameters.lora.r and parameters.seed is not None and parameters.base.device
    with pytest.raises(AttributeError, match=r"'model' is read but not declared: add it to the stage in dvc\.yaml"):
        _ = parameters.base.model
    with pytest.raises(AttributeError, match="'gguf' is read but not declared"):
        _ = parameters.gguf


def test_a_whole_section_or_a_single_key_can_be_declared() -> None:
    parameters = check(ROOT / "params.yaml")
    assert only(parameters, ["lora"]).lora == parameters.lora
    assert only(parameters, ["lora.r"]).lora.r == parameters.lora.r


def test_the_schema_is_exactly_what_params_yaml_holds() -> None:
    given = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    assert Parameters.model_validate(given).model_dump() == given
