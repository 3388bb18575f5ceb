"""Every format that is read: a valid file, how it is changed, and what reads it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml

from fuzzing import mutators
from fuzzing.mutators import Mutation
from zoo import TOYS, write_toy


@dataclass(frozen=True)
class Target:
    """``file`` (below the folder of all) is changed by ``mutate``; ``read`` is then given that folder."""

    file: str
    mutate: Mutation
    read: Callable[[Path], object]


def prepare(folder: Path) -> None:
    """Write one valid file of each format."""
    from datasets import Dataset
    from PIL import Image
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers

    from unmergeable.cli import main

    for seed, name in enumerate(("base", "model")):
        write_toy(TOYS["llama"], folder / name, seed=seed)
    _run(
        main, "protect", folder / "model", "--base", folder / "base", "--out", folder / "release", "--key", folder / "k"
    )
    (folder / "k").rename(folder / "the.key")
    _write_sharded(folder / "base", folder / "sharded")
    _write_adapter(folder / "adapter")
    shutil.copytree(folder / "model", folder / "pickled")
    tensors = {name: torch.zeros(2) for name in ("a", "b")}
    (folder / "pickled" / "model.safetensors").unlink()
    torch.save(tensors, folder / "pickled" / "pytorch_model.bin")
    from unmergeable.tasks import FeatureHead, write_head

    write_head(FeatureHead(torch.ones(3, 16), pooling="rest"), folder / "head.safetensors")
    rows = [{"text": "one", "label": 0}, {"text": "two", "label": 1, "extra": [1, {"a": None}]}]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "data.txt").write_text("one\ntwo\n\nthree\n")
    (folder / "probe.jsonl").write_text("\n".join(json.dumps({"input_ids": [3, number]}) for number in range(3)))
    for name in ("data", "probe"):
        np.savez(folder / f"{name}.npz", input_ids=np.ones((3, 4), np.int64), attention_mask=np.ones((3, 4), np.int64))
    dataset = Dataset.from_list([{"text": "one", "label": 0}, {"text": "two", "label": 1}])
    dataset.to_parquet(folder / "data.parquet")
    dataset.save_to_disk(folder / "saved")
    (folder / "images").mkdir()
    Image.fromarray(np.zeros((5, 4, 3), np.uint8)).save(folder / "images" / "a.png")
    (folder / "recipe.json").write_text(json.dumps({"method": "gauge", "settings": {"condition": 2}}))
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"method": "mergelock", "settings": {"condition": 3.5}}))
    merge = {"merge_method": "ties", "base_model": "base", "dtype": "float32", "parameters": {"normalize": True}}
    models_ = [{"model": "model", "parameters": {"weight": [0.1, 0.9], "density": 0.5}}]
    (folder / "merge.yaml").write_text(yaml.safe_dump({**merge, "models": models_}))
    _write_plans(folder)
    vocabulary = {"<unk>": 0, "a": 1, "b": 2}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    (folder / "tokenizer").mkdir()
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    shutil.copy(folder / "model" / "config.json", folder / "tokenizer" / "config.json")
    root = Path(__file__).parents[2]
    shutil.copy(root / "benchmarks" / "results" / "diffusion_audit.json", folder / "audit.json")
    maps = root / "src" / "unmergeable" / "architecture" / "maps"
    (folder / "maps").mkdir()
    shutil.copy(maps / "mpnet.json", folder / "maps" / "mpnet.json")
    from safetensors.torch import load_file

    save_file(load_file(folder / "model" / "model.safetensors"), folder / "plain.safetensors")


def _run(main: Callable[[list[str]], int], *arguments: object) -> None:
    assert main([*map(str, arguments), "--quiet"]) == 0


def _write_sharded(source: Path, folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(source / "model.safetensors")
    names = sorted(tensors)
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        shard = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _write_plans(folder: Path) -> None:
    """An audit's and a table's, with most of what such plans may hold."""
    experts = [
        {"name": name, "path": path, "task": f"{name} task"} for name, path in (("a", "model"), ("b", "release"))
    ]
    protect = {"expert": "a", "methods": ["gauge", {"name": "m", "method": "mergelock", "settings": {"condition": 2}}]}
    files = {"validation": "data.jsonl", "test": "data.npz", "head": "head.safetensors", "examples": {"test": 2}}
    tasks = [{"name": f"{name} task", "batch_size": 2, **files} for name in "ab"]
    coefficients = {"defended": [0.5, 1.0], "rider": [1.0], "refinements": 2}
    audit = {"base": "base", "experts": experts, "protect": protect, "tasks": tasks, "coefficients": coefficients}
    attacks = {"recoveries": ["taylor_inversion, nearest_orbit", {"name": "r", "steps": ["kabsch"]}], "seeds": [0, 1]}
    (folder / "audit.yaml").write_text(yaml.safe_dump({**audit, **attacks, "merges": ["ties"], "connectivity": 5}))
    merges = ["ties", {"method": "linear", "coefficients": [0.3, 0.7], "then": {"method": "unmask"}}]
    table = {"title": "T", "source": "S", "base": "base", "experts": experts, "merges": merges, "partners": [1]}
    owners = {"experts": ["a", "b"], "methods": protect["methods"]}
    (folder / "table.yaml").write_text(yaml.safe_dump({**table, "tasks": tasks, "protect": owners}))


def _write_adapter(folder: Path) -> None:
    from safetensors.torch import save_file

    folder.mkdir()
    config = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "bias": "none",
        "rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {}, "fan_in_fan_out": False,
        "base_model_name_or_path": "base", "modules_to_save": None, "use_rslora": False, "task_type": "CAUSAL_LM",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    prefix = "base_model.model.model.layers.0.self_attn"
    shapes = {"q_proj": 48, "v_proj": 24}
    tensors = {f"{prefix}.{name}.lora_A.weight": torch.ones(2, 48) for name in shapes}
    tensors |= {f"{prefix}.{name}.lora_B.weight": torch.ones(rows, 2) for name, rows in shapes.items()}
    save_file(tensors, folder / "adapter_model.safetensors")


def _header(folder: Path) -> object:
    from unmergeable.checkpoint.header import read_header

    return read_header(folder / "plain.safetensors", "plain.safetensors")


def _checkpoint(name: str) -> Callable[[Path], object]:
    def read(folder: Path) -> object:
        from unmergeable.ops.opened import open_with_architecture

        source, _ = open_with_architecture(folder / name)
        return [source.tensor(tensor) for tensor in source.names]

    return read


def _adapter(folder: Path) -> object:
    from unmergeable.checkpoint.open import open_checkpoint

    source = open_checkpoint(folder / "adapter", base=folder / "base")
    return [source.tensor(name) for name in source.names if "layers.0" in name]


def _pickle(folder: Path) -> object:
    from unmergeable.checkpoint.open import open_checkpoint

    source = open_checkpoint(folder / "pickled", allow_pickle=True)
    return [source.tensor(name) for name in source.names]


def _recipe(name: str) -> Callable[[Path], object]:
    def read(folder: Path) -> object:
        from unmergeable.cli.recipe import read_recipe
        from unmergeable.ops.steps import steps_of

        return steps_of(*read_recipe(folder / name))

    return read


def _merge(folder: Path) -> object:
    from unmergeable.merges.mergekit.config import read_config
    from unmergeable.merges.mergekit.meaning import meaning_of

    return meaning_of(read_config(folder / "merge.yaml")).vary(("model.layers.0.mlp.up_proj.weight", "lm_head.weight"))


def _key(folder: Path) -> object:
    from unmergeable import ops

    (folder / "the.key").chmod(0o600)
    return ops.show_key(folder / "the.key", releases=[folder / "release"]).lines()


def _manifest(folder: Path) -> object:
    from unmergeable import ops
    from unmergeable.checkpoint.manifest import read_manifest
    from unmergeable.ops.recorded import condition_of, earlier_steps, methods_of

    manifest = read_manifest(folder / "release")
    assert manifest is not None
    found = condition_of(manifest), earlier_steps(manifest), methods_of(manifest.details)
    return found, ops.verify_manifest(folder / "release").lines()


def _audit(folder: Path) -> object:
    from unmergeable.evaluation import model_card, read_audit, summary

    result = read_audit(folder / "audit.json")
    return summary(result), model_card(result), result.to_json()


def _audit_plan(folder: Path) -> object:
    from unmergeable.evaluation.plans.audit_plan import read_plan

    plan = read_plan(folder / "audit.yaml")
    return plan.paths, plan.as_released()


def _table_plan(folder: Path) -> object:
    from unmergeable.evaluation.plans.table_plan import read_table_plan

    return read_table_plan(folder / "table.yaml").paths


def _data(name: str) -> Callable[[Path], object]:
    def read(folder: Path) -> object:
        from unmergeable.data import DataSource

        source = DataSource(folder / name)
        return list(source)

    return read


def _probe(name: str) -> Callable[[Path], object]:
    def read(folder: Path) -> object:
        from unmergeable.network.logits import read_probe

        return read_probe(folder / name, folder / "model")

    return read


def _head(folder: Path) -> object:
    from unmergeable.tasks import read_head

    return read_head(folder / "head.safetensors")


def _tokenizer(folder: Path) -> object:
    from unmergeable.network.load import encoded_texts, load_tokenizer

    return encoded_texts(load_tokenizer(folder / "tokenizer"), ["a b", "b"])


def _map(folder: Path) -> object:
    from unmergeable.architecture import derived

    text = (folder / "maps" / "mpnet.json").read_text(errors="replace")
    return derived._read(text, "mpnet.json")


TARGETS: Mapping[str, Target] = {
    "safetensors header": Target("plain.safetensors", mutators.safetensors_changed, _header),
    "safetensors checkpoint": Target("model/model.safetensors", mutators.safetensors_changed, _checkpoint("model")),
    "config": Target("model/config.json", mutators.json_changed, _checkpoint("model")),
    "index": Target("sharded/model.safetensors.index.json", mutators.json_changed, _checkpoint("sharded")),
    "adapter config": Target("adapter/adapter_config.json", mutators.json_changed, _adapter),
    "adapter": Target("adapter/adapter_model.safetensors", mutators.safetensors_changed, _adapter),
    "pickle": Target("pickled/pytorch_model.bin", mutators.archive_changed, _pickle),
    "recipe, JSON": Target("recipe.json", mutators.json_changed, _recipe("recipe.json")),
    "recipe, YAML": Target("recipe.yaml", mutators.yaml_changed, _recipe("recipe.yaml")),
    "mergekit": Target("merge.yaml", mutators.yaml_changed, _merge),
    "key": Target("the.key", mutators.json_changed, _key),
    "manifest": Target("release/unmergeable.json", mutators.json_changed, _manifest),
    "audit": Target("audit.json", mutators.json_changed, _audit),
    "plan of an audit": Target("audit.yaml", mutators.yaml_changed, _audit_plan),
    "plan of a table": Target("table.yaml", mutators.yaml_changed, _table_plan),
    "derived map": Target("maps/mpnet.json", mutators.json_changed, _map),
    "data, jsonl": Target("data.jsonl", mutators.lines_changed, _data("data.jsonl")),
    "data, text": Target("data.txt", mutators.bytes_changed, _data("data.txt")),
    "data, npz": Target("data.npz", mutators.archive_changed, _data("data.npz")),
    "data, parquet": Target("data.parquet", mutators.bytes_changed, _data("data.parquet")),
    "data, saved": Target("saved/state.json", mutators.json_changed, _data("saved")),
    "image": Target("images/a.png", mutators.bytes_changed, _data("images")),
    "probe, jsonl": Target("probe.jsonl", mutators.lines_changed, _probe("probe.jsonl")),
    "probe, npz": Target("probe.npz", mutators.archive_changed, _probe("probe.npz")),
    "head": Target("head.safetensors", mutators.safetensors_changed, _head),
    "tokenizer": Target("tokenizer/tokenizer.json", mutators.json_changed, _tokenizer),
    "tokenizer config": Target("tokenizer/tokenizer_config.json", mutators.json_changed, _tokenizer),
}
