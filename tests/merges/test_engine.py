"""On files the merges do what they do in memory, refuse before they write, and lose nothing."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import load_file
from torch import Tensor

from merges.small_models import State, make_models, write_checkpoint
from unmergeable.checkpoint.manifest import FileRecord, check_files, read_manifest, record_file, record_header
from unmergeable.checkpoint.open import open_checkpoint
from unmergeable.checkpoint.rewrite import OutputTensor
from unmergeable.checkpoint.source import TensorSource
from unmergeable.errors import BadInput, Mismatch, UnmergeableError, UsageError
from unmergeable.merges import (
    MERGES,
    Breadcrumbs,
    DareLinear,
    Della,
    IsoC,
    Linear,
    Merge,
    ModelStock,
    TaskArithmetic,
    Ties,
    TsvM,
    engine,
    merge,
    merge_state_dicts,
)
from unmergeable.merges.plan import dtype_changes
from unmergeable.merges.variation import Variation

METHODS: list[Merge] = [
    *(method() for method in MERGES.values()),
    Ties(trim="tensor", average="weight", undecided="positive"),
    DareLinear(rescale="norm"),
    Della(rescale="norm"),
    Breadcrumbs(trim="row"),
    ModelStock(filter_wise=True),
]


def write_models(folder: Path, states: list[State], *, shards: int | list[int] = 1) -> list[TensorSource]:
    counts = shards if isinstance(shards, list) else [shards] * len(states)
    folder.mkdir(exist_ok=True)
    return [
        open_checkpoint(write_checkpoint(folder / f"model{number}", state, shards=count))
        for number, (state, count) in enumerate(zip(states, counts, strict=True))
    ]


def coefficients_for(method: Merge) -> list[float | None]:
    given: list[float | None] = [None, None] if method.name == "model_stock" else [0.4, 0.9]
    return given[: method.most_experts]


def is_spectral(method: Merge) -> bool:
    """Whether it takes matrices as wholes, not by blocks; a large one costs a second."""
    return method.name in ("tsv_m", "iso_c", "wudi")


def merge_files(sources: list[TensorSource], method: Merge, out: Path, **settings: Any) -> Path:
    base, *experts = sources
    coefficients = coefficients_for(method)
    merge(base, list(zip(experts[: len(coefficients)], coefficients, strict=True)), method, out, **settings)
    return out


def read_all(folder: Path) -> State:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def file_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "unmergeable.json"}


@pytest.mark.parametrize(
    ("method", "dtype"),
    [(method, torch.bfloat16) for method in METHODS]
    + [(method, torch.float32) for method in (TaskArithmetic(), Ties(), Della(), IsoC())],
    ids=str,
)
def test_files_and_memory_give_the_same_bits(tmp_path: Path, method: Merge, dtype: torch.dtype) -> None:
    base, experts = make_models(2, dtype, several_blocks=dtype == torch.bfloat16 and not is_spectral(method))
    sources = write_models(tmp_path / "in", [base, *experts])
    merged = read_all(merge_files(sources, method, tmp_path / "out"))
    coefficients = coefficients_for(method)
    expected = merge_state_dicts(base, experts[: len(coefficients)], method=method, coefficients=coefficients)
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_any_number_of_threads_and_any_shards_give_the_same_bytes(tmp_path: Path, method: Merge) -> None:
    base, experts = make_models(2, torch.bfloat16)
    states = [base, *experts]
    whole = write_models(tmp_path / "whole", states)
    cut = write_models(tmp_path / "cut", states, shards=[1, 3, 4])
    first = file_bytes(merge_files(whole, method, tmp_path / "first", threads=1))
    for number, (sources, threads) in enumerate([(whole, 5), (cut, 3)]):
        assert file_bytes(merge_files(sources, method, tmp_path / f"{number}", threads=threads)) == first
    # Control: another expert gives another merge.
    other = merge_files([whole[0], whole[2], whole[2]], method, tmp_path / "other")
    assert file_bytes(other) != first


@pytest.mark.parametrize("method", [Ties(), DareLinear()], ids=repr)
def test_a_base_in_shards_gives_a_merge_in_shards_of_the_same_tensors(tmp_path: Path, method: Merge) -> None:
    base, experts = make_models(2, torch.bfloat16, several_blocks=True)
    states = [base, *experts]
    out = merge_files(write_models(tmp_path / "cut", states, shards=3), method, tmp_path / "sharded", threads=2)
    assert len(list(out.glob("*.safetensors"))) == 3
    merged = read_all(out)
    expected = read_all(merge_files(write_models(tmp_path / "whole", states), method, tmp_path / "first", threads=1))
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_the_output_may_have_another_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    base, experts = make_models(2)
    config: dict[str, object] = {"torch_dtype": "float32", "text_config": {"dtype": "float32", "depth": 2}}
    sources = [
        open_checkpoint(write_checkpoint(tmp_path / f"{number}", state, config=config))
        for number, state in enumerate((base, *experts))
    ]
    out = merge_files(sources, TaskArithmetic(), tmp_path / "out", out_dtype=dtype)
    merged, full = read_all(out), merge_state_dicts(base, experts, method=TaskArithmetic(), coefficients=[0.4, 0.9])
    in_memory = merge_state_dicts(base, experts, method=TaskArithmetic(), coefficients=[0.4, 0.9], out_dtype=dtype)
    for name, tensor in full.items():
        expected = tensor.to(dtype) if tensor.is_floating_point() else tensor
        if dtype.itemsize < 4:
            assert torch.equal(merged[name], expected)  # float32 is rounded once more
        assert merged[name].dtype == expected.dtype
        assert torch.equal(merged[name], in_memory[name])
    written = json.loads((out / "config.json").read_text())
    name = str(dtype).removeprefix("torch.")
    assert (written["torch_dtype"], written["text_config"]) == (name, {"dtype": name, "depth": 2})
    assert dtype_changes({"model_type": "toy"}, dtype) == {"dtype": name}


def test_terms_that_vary_are_the_same_on_files_and_are_recorded(tmp_path: Path) -> None:
    base, experts = make_models(2, torch.bfloat16)
    sources = write_models(tmp_path / "in", [base, *experts])

    def vary(name: str) -> Variation:
        return Variation((0.1, None)) if name.startswith("layers.0") else Variation()

    merged = read_all(merge_files(sources, TaskArithmetic(), tmp_path / "out", vary=vary))
    expected = merge_state_dicts(base, experts, method=TaskArithmetic(), coefficients=[0.4, 0.9], vary=vary)
    plain = merge_state_dicts(base, experts, method=TaskArithmetic(), coefficients=[0.4, 0.9])
    assert all(torch.equal(merged[name], expected[name]) for name in base)
    assert {n for n in base if not torch.equal(merged[n], plain[n])} == {"layers.0.weight", "layers.0.bias"}
    varied = read_manifest(tmp_path / "out").details["recipe"]["varied"]
    assert {"coefficients": [0.1, 0.3], "settings": {}, "tensors": ["layers.0.weight", "layers.0.bias"]} in [
        {**entry, "tensors": sorted(entry["tensors"], reverse=True)} for entry in varied
    ]


def test_a_source_that_computes_its_tensors_merges_like_a_file(tmp_path: Path) -> None:
    base, experts = make_models(2)
    sources = write_models(tmp_path / "in", [base, *experts])

    class Computed:
        """An adapter, as far as a merge can tell: it has whole tensors only."""

        def __init__(self, source: TensorSource) -> None:
            self.folder, self.description, self.config = source.folder, source.description, source.config
            self.index, self.names, self.spec = source.index, source.names, source.spec
            self._source = source

        def tensor(self, name: str) -> Tensor:
            return self._source.tensor(name)

    expected = file_bytes(merge_files(sources, Ties(), tmp_path / "stored"))
    computed: list[TensorSource] = [sources[0], Computed(sources[1]), sources[2]]
    assert file_bytes(merge_files(computed, Ties(), tmp_path / "computed")) == expected


def test_the_base_is_the_template_and_the_first_expert_without_one(tmp_path: Path) -> None:
    base, experts = make_models(2)
    folders = [
        write_checkpoint(tmp_path / f"{number}", state, config={"note": number})
        for number, state in enumerate((base, *experts))
    ]
    sources = [open_checkpoint(folder) for folder in folders]
    merge_files(sources, Linear(), tmp_path / "with")
    merge(None, [(sources[1], None), (sources[2], None)], Linear(), tmp_path / "without")
    assert (tmp_path / "with" / "config.json").read_bytes() == (folders[0] / "config.json").read_bytes()
    assert (tmp_path / "without" / "config.json").read_bytes() == (folders[1] / "config.json").read_bytes()
    assert (tmp_path / "with" / "tokenizer.json").read_text() == "{}"


def test_the_manifest_says_what_was_merged(tmp_path: Path) -> None:
    base, experts = make_models(2)
    sources = write_models(tmp_path / "in", [base, *experts])
    base_source, *expert_sources = sources
    returned = merge(
        base_source, [(expert_sources[0], None), (expert_sources[1], 0.7)], TaskArithmetic(), tmp_path / "out"
    )
    manifest = read_manifest(tmp_path / "out")
    assert manifest == returned
    assert manifest.details["recipe"] == {
        "merge": "task_arithmetic",
        "settings": {"scaling_coefficient": 0.3},
        "coefficients": [0.3, 0.7],
    }
    assert set(manifest.inputs) == {"source", "expert 1", "expert 2"}
    assert check_files(tmp_path / "out") == ()


def test_weights_are_hashed_only_when_asked(tmp_path: Path) -> None:
    base, experts = make_models(2)
    sources = write_models(tmp_path / "in", [base, *experts])
    merge_files(sources, TaskArithmetic(), tmp_path / "plain")
    merge_files(sources, TaskArithmetic(), tmp_path / "hashed", checksums=True)
    assert file_bytes(tmp_path / "plain") == file_bytes(tmp_path / "hashed")

    def record_read(path: Path) -> FileRecord:
        return FileRecord(path.name, path.stat().st_size, xxh3_128=xxhash.xxh3_128_hexdigest(path.read_bytes()))

    for folder, of_written, of_read in (("plain", record_header, record_header), ("hashed", record_file, record_read)):
        manifest = read_manifest(tmp_path / folder)
        for out, records, record in (
            (tmp_path / folder, manifest.outputs, of_written),
            (sources[1].folder, manifest.inputs["expert 1"], of_read),
        ):
            recorded = {file.name: file for file in records}
            assert recorded["model.safetensors"] == record(out / "model.safetensors")
            assert recorded["config.json"] == record_file(out / "config.json")
        assert check_files(tmp_path / folder) == ()


REFUSED: list[tuple[str, dict[str, object], type[UnmergeableError], str]] = [
    ("model_type", {"model_type": "other"}, Mismatch, "model_type is toy in .* but other in"),
    ("heads", {"num_attention_heads": 8}, Mismatch, "num_attention_heads is 4 .* but 8"),
]


@pytest.mark.parametrize(("config", "error", "message"), [case[1:] for case in REFUSED], ids=[c[0] for c in REFUSED])
def test_refuses_another_architecture(
    tmp_path: Path, config: dict[str, object], error: type[UnmergeableError], message: str
) -> None:
    base, experts = make_models(2)
    plain: dict[str, object] = {"num_attention_heads": 4, "tie_word_embeddings": False}
    sources = [
        open_checkpoint(write_checkpoint(tmp_path / f"{number}", state, config=plain | extra))
        for number, (state, extra) in enumerate(zip((base, *experts), ({}, {}, config), strict=True))
    ]
    with pytest.raises(error, match=message):
        merge_files(sources, TaskArithmetic(), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_refuses_before_writing(tmp_path: Path, method: Merge) -> None:
    base, experts = make_models(2)
    experts[0]["lm_head.weight"] = experts[0]["embed.weight"].clone()
    sources = write_models(tmp_path / "in", [base, *experts])
    with pytest.raises(Mismatch, match=r"lm_head.weight is in expert 1 \(.*model1\) but not in base .*--template 1"):
        merge_files(sources, method, tmp_path / "out")
    with pytest.raises(BadInput, match="exists"):
        merge_files(sources, method, tmp_path / "in")
    assert not list(tmp_path.glob("out*"))


def test_refuses_a_number_of_experts_the_method_cannot_use(tmp_path: Path) -> None:
    base, experts = make_models(1)
    sources = write_models(tmp_path / "in", [base, *experts])
    for method in (ModelStock(), TsvM()):
        with pytest.raises(UsageError, match="1 experts given, at least 2 needed"):
            merge(sources[0], [(sources[1], None)], method, tmp_path / "out")
    with pytest.raises(UsageError, match="name the base"):
        merge(None, [(sources[1], None)], TaskArithmetic(), tmp_path / "out")


def test_a_merge_that_is_not_finite_leaves_no_result(tmp_path: Path) -> None:
    base, experts = make_models(2)
    experts[0]["scale"].fill_(torch.nan)
    sources = write_models(tmp_path / "in", [base, *experts])
    with pytest.raises(BadInput, match=r"scale: expert 1 \(.*model1\) holds NaN"):
        merge_files(sources, TaskArithmetic(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tensor_lost_on_the_way_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, experts = make_models(2)
    sources = write_models(tmp_path / "in", [base, *experts])
    write = engine.rewrite

    def lossy(source: TensorSource, out: Path, planned: Sequence[OutputTensor], **options: Any) -> Any:
        kept = [tensor for tensor in planned if not tensor.name.endswith("bias")]
        return write(source, out, kept, **options)

    monkeypatch.setattr(engine, "rewrite", lossy)
    with pytest.raises(Mismatch, match=r"template and merge: tensor 'layers.0.bias'"):
        merge_files(sources, TaskArithmetic(), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_progress_counts_to_the_end_of_every_stage(tmp_path: Path) -> None:
    base, experts = make_models(2)
    sources = write_models(tmp_path / "in", [base, *experts])
    calls: list[tuple[str, int, int]] = []
    merge_files(
        sources, Ties(), tmp_path / "out", progress=lambda stage, done, total, unit: calls.append((stage, done, total))
    )
    last = {stage: (done, total) for stage, done, total in calls}
    assert len(last) >= 2
    assert any("ranking" in stage for stage in last)
    assert all(done == total for done, total in last.values())


def test_torch_threads_are_given_back(tmp_path: Path) -> None:
    base, experts = make_models(2)
    sources = write_models(tmp_path / "in", [base, *experts])
    torch.set_num_threads(2)
    seen: list[int] = []
    merge_files(sources, Linear(), tmp_path / "out", progress=lambda *call: seen.append(torch.get_num_threads()))
    assert set(seen) == {1}
    assert torch.get_num_threads() == 2
