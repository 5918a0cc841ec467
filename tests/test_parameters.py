import math
import re
from pathlib import Path

import pytest
from conftest import ROOT
from dvc.utils.serialize import load_yaml
from ruamel.yaml import YAML

from pipeline.common.errors import UserError
from pipeline.common.parameters.params_yaml import check, load, only, read_yaml
from pipeline.common.parameters.schema import Parameters


def written(tmp_path: Path, key: str, value: object) -> Path:
    """params.yaml with one key set; REMOVED takes it out."""
    parameters = read_yaml(ROOT / "params.yaml")
    section, _, name = key.partition(".")
    owner, name = (parameters[section], name) if name else (parameters, section)
    owner[name] = value
    if value is REMOVED:
        del owner[name]
    path = tmp_path / "params.yaml"
    YAML(typ="safe", pure=True).dump(parameters, path)
    return path


REMOVED = object()


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("lora.r", "abc", r"lora\.r is 'abc': input should be a valid integer"),
        ("lora.r", 0, r"lora\.r is 0: input should be greater than or equal to 1"),
        ("lora.rr", 8, r"lora\.rr is not a parameter; accepted here: r, alpha, dropout, target_modules, use_rslora"),
        ("lora.r", REMOVED, r"lora\.r is missing"),
        ("lora", 5, r"lora is 5: input should be a valid dictionary"),
        ("lora.target_modules", 5, r"lora\.target_modules is 5: input should be 'all-linear', or .* list"),
        ("lora.target_modules", [], r"lora\.target_modules is \[\]: .*list should have at least 1 item"),
        ("train.learning_rate", "2e-4", r"train\.learning_rate is '2e-4': input should be a valid number"),
        ("train.epochs", math.inf, r"train\.epochs is inf: input should be a finite number"),
        ("gguf.quantize", ["q8_0", "q3"], r"gguf\.quantize is 'q3': input should be 'bf16', .* or 'q2_k'"),
        ("base.model", "", r"base\.model is '': string should have at least 1 character"),
        ("seed", 10**20, r"seed is 1000\d+: input should be less than 4294967296"),
    ],
)
def test_a_wrong_value_is_refused_in_one_line_that_names_it(tmp_path: Path, key: str, value: object, line: str) -> None:
    with pytest.raises(UserError) as refusal:
        check(written(tmp_path, key, value))
    assert re.search(line, str(refusal.value))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("text", [None, "", "lora: [", "- a list", b"\xff"])
def test_a_file_that_holds_no_parameters_is_refused_in_one_line(tmp_path: Path, text: str | bytes | None) -> None:
    path = tmp_path / "params.yaml"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as refusal:
        check(path)
    assert "params.yaml" in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("number", ["5e-5", "2e-4", "2E-4", "0.0002", "2.0e-4"])
def test_a_number_may_be_written_as_dvc_and_people_write_it(tmp_path: Path, number: str) -> None:
    path = written(tmp_path, "train.learning_rate", 0.125)
    path.write_text(path.read_text(encoding="utf-8").replace("0.125", number), encoding="utf-8")
    assert check(path).train.learning_rate == float(number)


def test_a_quantization_may_be_written_as_llama_cpp_does(tmp_path: Path) -> None:
    assert check(written(tmp_path, "gguf.quantize", ["Q4_K_M", "iq4_xs"])).gguf.quantize == ["q4_k_m", "iq4_xs"]


def test_every_parameter_has_a_comment_on_its_line() -> None:
    for line in (ROOT / "params.yaml").read_text(encoding="utf-8").splitlines():
        assert re.fullmatch(r"|\w+:|\s*- \w+|\s*\w+: .+ # .+|\s*\w+: +# .+", line), line


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


def test_values_are_read_as_dvc_reads_them_by_the_parser_in_c(tmp_path: Path) -> None:
    assert "clib" in YAML(typ="safe").Parser.__module__  # else dvc repro with nothing to do takes a quarter more
    path = tmp_path / "params.yaml"
    for written in ["2e-4", "2.0e-4", "010", "0o10", "yes", "off", "~", "1_000", "12:30:00", "+1", ".5", "1.e+3"]:
        path.write_text(f"key: {written}\n", encoding="utf-8")
        assert load_yaml(path) == read_yaml(path)


def test_the_schema_is_exactly_what_params_yaml_holds() -> None:
    given = read_yaml(ROOT / "params.yaml")
    assert Parameters.model_validate(given).model_dump() == given
