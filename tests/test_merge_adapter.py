"""An adapter is merged from file to file, in little memory. What comes of each kind of adapter: test_adapters.py."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Project
from families import FAMILIES
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3Config, PreTrainedModel

from pipeline.common.errors import UserError
from pipeline.common.outputs import write_json
from pipeline.export.disk import room_for
from pipeline.export.merging import merge
from pipeline.model.base import copy_tokenizer, describe, file_hashes
from pipeline.model.loading import load_quantized, load_tuned
from pipeline.model.skeleton import skeleton
from pipeline.model.transformers_internals import names_in_files
from stages import merge_adapter, prepare_base

CPU = torch.device("cpu")
TINY = ROOT / "models/tiny-base"
MERGED = Path("models/merged")
LORA = Path("outputs/aligned/adapter_model.safetensors")
CONFIG = Path("outputs/aligned/adapter_config.json")
LINEAR = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def make_adapter(base: Path, adapter: Path, **changed: object) -> None:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned = get_peft_model(model, LoraConfig(**LINEAR | changed))
    for name, weight in tuned.named_parameters():
        if "lora_B" in name or "trainable_tokens" in name:
            weight.data += 0.1 * torch.randn(weight.shape)
    tuned.save_pretrained(adapter, save_embedding_layers=False)


def tensors(model: Path) -> dict[str, torch.Tensor]:
    return {name: weight for file in model.glob("*.safetensors") for name, weight in load_file(file).items()}


@torch.inference_mode()
def require_same_logits(merged: Path, live: PreTrainedModel) -> None:
    ids = torch.arange(1, 100)[None]
    logits = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)(ids).logits
    torch.testing.assert_close(logits, live(ids).logits, rtol=0, atol=1e-3)


@pytest.fixture
def sharded(project: Project) -> Path:
    """The built-in base in several files, as the project's base, with an adapter in outputs/aligned."""
    base = Path("models/sharded")
    AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.bfloat16).save_pretrained(base, max_shard_size="2MB")
    copy_tokenizer(TINY, base)
    project.set(base__model=str(base))
    write_json("models/base.json", describe(str(base), None))
    make_adapter(base, LORA.parent)
    shutil.copy("models/base.json", LORA.parent)
    return base


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path, Path]:
    """For a base in 32 bits, where no rounding hides an error, an adapter, and the merged model."""
    base, adapter, merged = (tmp_path / name for name in ("base", "adapter", "merged"))
    AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).save_pretrained(base)
    shutil.copytree(base, merged)
    return base, adapter, merged


def test_all_but_the_changed_weights_is_as_the_base_has_it(sharded: Path) -> None:
    merge_adapter.main()
    before, after = file_hashes(sharded), file_hashes(MERGED)
    shards = {name for name in before if name.endswith(".safetensors")}
    assert len(shards) > 2 and before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} == shards
    merged = tensors(MERGED)
    for name, weight in tensors(sharded).items():
        assert weight.dtype == merged[name].dtype == torch.bfloat16
        assert weight.equal(merged[name]) == ("proj" not in name)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_merges_onto_the_nf4_that_it_was_trained_on(tmp_path: Path, family: str) -> None:
    base, adapter, merged = (tmp_path / name for name in ("base", "adapter", "merged"))
    FAMILIES[family](base)
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).save_pretrained(base)
    make_adapter(base, adapter)
    shutil.copytree(base, merged)
    merge(base, adapter, merged, on_nf4=True)
    require_same_logits(merged, load_tuned(base, adapter, "nf4", CPU, torch.float32))


def test_only_what_training_had_in_nf4_is_rounded_to_it_and_vision_is_kept(tmp_path: Path) -> None:
    """Of a Gemma 3 with vision, which has matrices of many kinds, and other names in files than in memory."""
    base, adapter, merged = (tmp_path / name for name in ("base", "adapter", "merged"))
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = shape | {"num_key_value_heads": 1, "head_dim": 32, "vocab_size": 512}
    vision = shape | {"image_size": 32, "patch_size": 8}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    as_on_the_hub = {name.replace("tower", "tower.vision_model"): weight for name, weight in tensors(base).items()}
    save_file(as_on_the_hub, base / "model.safetensors", metadata={"format": "pt"})
    make_adapter(base, adapter, target_modules=["q_proj"], exclude_modules=".*vision.*")
    shutil.copytree(base, merged)
    merge(base, adapter, merged, on_nf4=True)
    changed = {name for name, weight in tensors(merged).items() if not weight.equal(as_on_the_hub[name])}
    names = names_in_files(skeleton(base), as_on_the_hub)
    in_memory = load_quantized(base, CPU, torch.float32).named_parameters()
    quantized = {name for name, weight in in_memory if weight.dtype == torch.uint8}
    assert changed == {names[name] for name in quantized if "language_model" in name} and len(changed) == 7
    assert len(quantized) > 7


def test_a_tied_base_with_its_head_in_a_file_too_stays_tied(folders: tuple[Path, Path, Path]) -> None:
    base, adapter, merged = folders
    make_adapter(base, adapter, trainable_token_indices={"embed_tokens": [1, 2], "lm_head": [1, 2]})
    live = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    weights = tensors(base)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    merge(base, adapter, merged, on_nf4=False)
    assert tensors(merged)["lm_head.weight"].equal(tensors(merged)["model.embed_tokens.weight"])
    require_same_logits(merged, live)


def test_a_head_trained_apart_from_the_embedding_that_it_is_tied_to_is_refused(
    folders: tuple[Path, Path, Path],
) -> None:
    base, adapter, merged = folders
    make_adapter(base, adapter, modules_to_save=["embed_tokens", "lm_head"])
    lora = load_file(adapter / LORA.name)
    lora["base_model.model.lm_head.weight"] += 1
    save_file(lora, adapter / LORA.name)
    with pytest.raises(UserError, match="adapter has different lm_head and embed_tokens, but the base has one matrix"):
        merge(base, adapter, merged, on_nf4=False)


def test_the_memory_that_a_merge_needs_does_not_grow_with_the_model(tmp_path: Path) -> None:
    width, rank, layer = 2**12, 8, "model.layers.0.mlp.down_proj"
    for name, rows in {"small": 2**9, "large": 2**13}.items():
        folder, matrix = tmp_path / name, torch.ones(rows, width).bfloat16()
        (folder / "merged").mkdir(parents=True)
        save_file(
            {f"{layer}.weight": matrix, "model.embed_tokens.weight": matrix.clone()}, folder / "model.safetensors"
        )
        lora = {"lora_A.weight": torch.ones(rank, width), "lora_B.weight": torch.ones(rows, rank)}
        adapter = {f"base_model.model.{layer}.{part}": weight for part, weight in lora.items()}
        save_file(adapter, folder / LORA.name)
        LoraConfig(**LINEAR | {"target_modules": ["down_proj"]}).save_pretrained(folder)
        AutoConfig.from_pretrained(TINY).save_pretrained(folder)  # has a layer of this name
    command = [sys.executable, "-c", MEASURED, str(tmp_path)]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    small, large, on_nf4 = (int(kib) * 2**10 for kib in printed.split())
    assert large - small < 0.5 * matrix.nbytes  # the same merge differs by some MiB from run to run
    assert on_nf4 - large < 8 * matrix.nbytes
    assert tensors(tmp_path / "large/merged")[f"{layer}.weight"].unique().tolist() == [1 + rank]  # alpha / r is 1


MEASURED = """
import sys
from pathlib import Path
import bitsandbytes.functional
from pipeline.export.merging import in_nf4, merge

in_nf4(Path(sys.argv[1], "large"), {}, {})  # imports what merge needs for NF4, which has its own size

for name, on_nf4 in [("small", False), ("large", False), ("large", True)]:
    folder = Path(sys.argv[1], name)
    merge(folder, folder, folder / "merged", on_nf4)
    print(*[line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")])
"""


def cut_off(base: Path) -> None:
    shard = max(base.glob("*.safetensors"))
    os.truncate(shard, shard.stat().st_size - 1)


def lose_a_tensor(base: Path) -> None:
    shard = max(base.glob("*.safetensors"))
    save_file(dict(list(load_file(shard).items())[1:]), shard)


def swap_the_adapter(_: Path) -> None:
    wider = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(TINY, intermediate_size=1024))
    get_peft_model(wider, LoraConfig(**LINEAR)).save_pretrained(LORA.parent, save_embedding_layers=False)


def lose_half_of_a_pair(_: Path) -> None:
    lora = load_file(LORA)
    del lora["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"]
    save_file(lora, LORA)


def add_a_layer(_: Path) -> None:
    save_file(load_file(LORA) | {"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.ones(4, 256)}, LORA)


def lose_a_layer(_: Path) -> None:
    save_file({name: weight for name, weight in load_file(LORA).items() if "layers.1." not in name}, LORA)


def lose_all(_: Path) -> None:
    save_file({}, LORA)


def halve_the_rank_of_half_a_pair(_: Path) -> None:
    lora = load_file(LORA)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
    save_file(lora | {name: lora[name][:2].clone()}, LORA)


def train_tokens(ids: list[int] | None, rows: int) -> Callable[[Path], None]:
    def damage(_: Path) -> None:
        config = json.loads(CONFIG.read_text(encoding="utf-8"))
        config["trainable_token_indices"] = ids and {"embed_tokens": ids}
        CONFIG.write_text(json.dumps(config), encoding="utf-8")
        part = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
        save_file(load_file(LORA) | ({part: torch.ones(rows, 256)} if rows else {}), LORA)

    return damage


def overflow(_: Path) -> None:
    save_file({name: weight * 1e38 for name, weight in load_file(LORA).items()}, LORA)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (cut_off, r"models/sharded/model-.*safetensors is damaged \(.*\): fetch or make it again"),
        (lose_a_tensor, r"models/sharded: .*weight is in the index, and in none of its files: fetch the model again"),
    ],
)
def test_a_base_with_damaged_weights_is_refused_before_training(
    sharded: Path, damage: Callable[[Path], None], why: str
) -> None:
    described = Path("models/base.json").read_bytes()
    damage(sharded)
    with pytest.raises(UserError, match=why) as refusal:
        prepare_base.main()
    assert "\n" not in str(refusal.value)
    assert Path("models/base.json").read_bytes() == described


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (swap_the_adapter, r"outputs/aligned: .*mlp.*lora_.* fits no weight of the base: run dvc repro -f align"),
        (lose_half_of_a_pair, r"outputs/aligned has only lora_A\.weight of model\.layers\.1\.mlp\.up_proj\.weight: "),
        (add_a_layer, r"outputs/aligned: base_model\.model\.model\.layers\.9.* fits no weight of the base: run"),
        (lose_a_layer, r"outputs/aligned has no part for model\.layers\.1\..*: run"),
        (lose_all, r"outputs/aligned has no part for model\.layers\.0\..*: run"),
        (lambda _: LORA.unlink(), r"outputs/aligned/adapter_model\.safetensors is damaged \(No such file .*: fetch or"),
        (
            halve_the_rank_of_half_a_pair,
            r"outputs/aligned: lora_A and lora_B of .*1\.mlp\.up_proj\.weight differ in rank",
        ),
        (
            train_tokens([1, 2], 1),
            r"1 trained rows of model\.embed_tokens\.weight are not those of its tokens \[1, 2\]: ",
        ),
        (train_tokens([1], 2), r"2 trained rows of model\.embed_tokens\.weight are not those of its tokens \[1\]: "),
        (train_tokens(None, 1), r"1 trained rows of model\.embed_tokens\.weight are not those of its tokens \[\]: "),
        (train_tokens([99999], 1), r"1 trained rows of .* are not those of its tokens \[99999\]: "),
        (train_tokens([1], 0), r"outputs/aligned has no part for model\.embed_tokens\.weight: run"),
        (lambda _: CONFIG.unlink(), r"adapter_config\.json is missing or damaged \(FileNotFoundError\): run"),
        (lambda _: CONFIG.write_text("{"), r"adapter_config\.json is missing or damaged \(JSONDecodeError\): run"),
        (lambda _: CONFIG.write_text("{}"), r"adapter_config\.json is missing or damaged \(KeyError\): run"),
        (overflow, r"outputs/aligned: the merged model\.layers\..* is not finite in torch\.bfloat16"),
    ],
)
def test_what_cannot_be_merged_is_refused_in_a_line_and_leaves_nothing(
    sharded: Path, damage: Callable[[Path], None], why: str
) -> None:
    damage(sharded)
    write_json("models/base.json", describe(str(sharded), None))  # as if the base had always been so
    shutil.copy("models/base.json", LORA.parent)
    with pytest.raises(UserError, match=why) as refusal:
        merge_adapter.main()
    assert "\n" not in str(refusal.value)
    assert {path.name for path in MERGED.parent.iterdir()} == {"base.json", "sharded", "tiny-base"}


def test_an_adapter_of_another_base_is_refused(project: Project, sharded: Path) -> None:
    project.set(base__model=str(TINY))
    prepare_base.main()
    with pytest.raises(UserError, match=r"outputs/aligned was trained on models/sharded \(\w+\), but base.model is "):
        merge_adapter.main()


def test_a_disk_without_room_is_reported_before_the_work_and_one_that_fills_up_after_it(tmp_path: Path) -> None:
    merged, room = tmp_path / "merged", 2 * shutil.disk_usage(tmp_path).free
    with pytest.raises(UserError, match=r"merged needs .* GiB of disk, but .* are free: "), room_for(room, merged):
        pytest.fail("it should not have begun")
    with pytest.raises(UserError, match=r"the disk was full before .*merged .* was complete: "), room_for(0, merged):
        Path("/dev/full").write_bytes(bytes(1))
