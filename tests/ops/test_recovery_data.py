"""Attacks that learn from data, as a program asks for them: from folders and files to a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import unmergeable
from unmergeable.attacks import NearestOrbit
from unmergeable.errors import BadInput, Mismatch, UsageError
from unmergeable.network.load import load_network
from unmergeable.tasks import FeatureHead, write_head
from zoo import TOYS, write_toy

State = dict[str, torch.Tensor]
WEIGHTS = "model.safetensors"
SAMPLES = 24
STEPS = 4


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def read(folder: Path) -> State:
    return load_file(folder / WEIGHTS)


def moved(base: Path, folder: Path, *, size: float, seed: int = 1) -> Path:
    """A base with noise in every tensor."""
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    tensors = {
        name: tensor + size * tensor.std().nan_to_num(1.0) * torch.randn(tensor.shape, generator=generator)
        for name, tensor in read(base).items()
    }
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return folder


def answers(path: Path, toy: str, expert: Path, *, count: int = SAMPLES, seed: int = 0) -> Path:
    """Random inputs of a toy with what an expert says of them."""
    rows = [TOYS[toy].inputs(torch.Generator().manual_seed(1000 * seed + n)) for n in range(count // 2)]
    inputs = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    with torch.no_grad():
        output = load_network(expert)(**inputs)
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    if "logits" in output:
        arrays["label"] = output.logits.argmax(-1).numpy()
    np.savez(path, **arrays)
    return path


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A base, an expert of it, a merge that lost half of it, and the expert's answers."""
    base = write_toy(TOYS["vit"], tmp_path / "base")
    expert = moved(base, tmp_path / "expert", size=0.5)
    answers(tmp_path / "data.npz", "vit", expert)
    unmergeable.merge(
        experts=[(expert, 0.6), (moved(base, tmp_path / "rider", size=0.3, seed=2), 0.4)],
        method="linear",
        out=tmp_path / "merged",
    )
    return tmp_path


def recover(work: Path, name: str = "merged", **options: Any) -> Any:
    settings = {"samples": SAMPLES, "steps": STEPS, "learning_rates": "1e-4,1e-2", **options.pop("settings", {})}
    given = {"base": work / "base", "method": "few_shot", "data": work / "data.npz", "out": work / "out", **options}
    return unmergeable.recover(work / name, settings=settings, **given)


def test_few_shot_trains_a_merge_and_the_same_without_the_victim(work: Path) -> None:
    result = recover(work, sources=[work / "rider"])
    merged, trained = read(work / "merged"), read(work / "out")

    assert (result.method, result.is_exact, result.confidence) == ("few_shot", False, None)
    learnt = json.loads(json.dumps(result.to_json()))["learnt"]
    victim, control = learnt["with_victim"], learnt["without_victim"]
    assert (victim["start"], control["start"]) == (str(work / "merged"), str(work / "rider"))
    for run in (victim, control):
        assert [trial["learning_rate"] for trial in run["sweep"]] == [0.0, 1e-4, 1e-2]
        assert {trial["choices"] for trial in run["sweep"]} == {SAMPLES}
        assert len(run["losses"]) == (STEPS if run["learning_rate"] else 0)
    assert victim["sweep"] != control["sweep"]
    assert victim["learning_rate"] > 0
    assert trained.keys() == merged.keys()
    assert any(not torch.equal(trained[name], merged[name]) for name in merged)
    network = load_network(work / "out")
    with np.load(work / "data.npz") as data, torch.no_grad():
        logits = network(pixel_values=torch.from_numpy(data["pixel_values"])).logits
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(data["label"]))
    assert float(loss) < victim["losses"][0]
    inputs = json.loads((work / "out" / "unmergeable.json").read_text())["inputs"]
    assert {"source", "base", "source 1"} <= set(inputs)
    text = "\n".join(result.lines())
    assert f"Trained, from {work / 'merged'}: learning rate" in text
    assert f"The same without the victim, from {work / 'rider'}: l" in text


def test_the_same_call_gives_the_same_bits(work: Path) -> None:
    settings = {"learning_rates": "1e-2", "low_rank": 2}
    first = recover(work, settings=settings)
    again = recover(work, settings=settings, out=work / "again")
    other = recover(work, settings={**settings, "seed": 1}, out=work / "other")
    assert first.learnt == again.learnt != other.learnt
    bits = [(work / name / WEIGHTS).read_bytes() for name in ("out", "again", "other")]
    assert bits[0] == bits[1] != bits[2]


def test_without_a_source_the_control_starts_from_the_base_and_no_head_of_the_victim(work: Path) -> None:
    tensors = {name: tensor for name, tensor in read(work / "base").items() if not name.startswith("classifier")}
    save_file(tensors, work / "base" / WEIGHTS, {"format": "pt"})
    learnt = recover(work, "expert").learnt.to_json()
    assert learnt["without_victim"]["start"] == str(work / "base")
    # A head of zeros cannot choose: the loss is that of five equal chances, and the first class is always named.
    start = learnt["without_victim"]["sweep"][0]
    assert start["loss"] == pytest.approx(np.log(5), rel=1e-6)
    assert learnt["with_victim"]["sweep"][0]["loss"] < 1.0  # the control of the control
    del tensors["vit.embeddings.cls_token"]
    save_file(tensors, work / "base" / WEIGHTS, {"format": "pt"})
    with pytest.raises(Mismatch, match=r"has no tensor vit.embeddings.cls_token of the shape \[1, 1, 48\]"):
        recover(work, "expert", out=work / "no")


def test_a_network_of_polynomials_can_be_trained_too(work: Path) -> None:
    """Its control is the base, which has another structure."""
    protected = work / "polynomial"
    unmergeable.protect(work / "expert", base=work / "base", out=protected, method="taylor_mlp", data=work / "data.npz")
    result = recover(work, "polynomial", settings={"learning_rates": "1e-3"})
    before, after = read(protected), read(work / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(".coefficients." in name for name in changed)
    assert result.learnt.without_victim.start == work / "base"
    assert json.loads((work / "out" / "config.json").read_text())["model_type"] == "polynomial_vit"


def test_polynomials_are_seen_in_files_that_name_tensors_as_the_network_does(work: Path) -> None:
    """The base's files say ``encoder.layer.0.intermediate``, where the protected one's say ``layers.0.mlp.fc1``."""
    options = {"base": work / "base", "method": "taylor_mlp", "data": work / "data.npz"}
    unmergeable.protect(work / "expert", out=work / "polynomial", **options)
    comparison = unmergeable.inspect(work / "polynomial", base=work / "base").comparison
    assert [(sign.name, sign.recovery) for sign in comparison.signs] == [("polynomial FFN", "taylor_inversion")]
    assert "2 of the base's" in comparison.signs[0].evidence  # the two projections, and nothing that was only renamed
    result = unmergeable.recover(work / "polynomial", base=work / "base", method="auto", out=work / "out")
    assert result.method == "taylor_inversion"


def outputs(folder: Path, data: Path) -> torch.Tensor:
    network = load_network(folder)
    with np.load(data) as arrays, torch.no_grad():
        logits: torch.Tensor = network(pixel_values=torch.from_numpy(arrays["pixel_values"])).logits
    return logits


@pytest.mark.parametrize("method", ["mergelock", "taylor_mlp"])
def test_layerwise_ridge_takes_keys_and_polynomials(method: str, work: Path) -> None:
    """The result computes nearly what the expert does, in the base's structure and basis, and merges."""
    inputs = answers(work / "inputs.npz", "vit", work / "expert", count=120, seed=1)
    moved(work / "base", work / "near", size=0.1)
    if method == "mergelock":
        options = {"base": work / "base", "out": work / "protected", "key": work / "key", "method": method}
        unmergeable.protect(work / "near", **options)
    else:
        unmergeable.protect(work / "near", base=work / "base", out=work / "protected", method=method, data=inputs)
    result = unmergeable.recover(
        work / "protected", base=work / "base", method="layerwise_ridge", data=inputs, out=work / "out"
    )
    assert len(result.learnt.fits) == 4
    assert "Fitted 4 projections" in "\n".join(result.lines())
    expert, found, base = (outputs(work / name, work / "data.npz") for name in ("near", "out", "base"))
    assert float((found - expert).norm()) < 0.5 * float((base - expert).norm())
    recovered, origin = read(work / "out"), read(work / "base")
    assert recovered.keys() == origin.keys()
    query = "vit.encoder.layer.0.attention.attention.query.weight"
    assert torch.equal(recovered[query], origin[query])
    assert not torch.equal(recovered["vit.embeddings.cls_token"], origin["vit.embeddings.cls_token"])
    unmergeable.merge(experts=[(work / "out", 0.5), (work / "rider", 0.5)], method="linear", out=work / "used")
    with pytest.raises(UsageError, match="reads no head"):
        unmergeable.recover(
            work / "protected", base=work / "base", method="layerwise_ridge", data=inputs, head=inputs, out=work / "no"
        )


@pytest.mark.parametrize("disturbance", ["task_vector", "reset_entries"])
def test_grad_erase_trains_the_merge_around_what_the_release_disturbed(disturbance: str, work: Path) -> None:
    """The release has the base's values back in every other entry."""
    base, expert = read(work / "base"), read(work / "expert")
    is_reset = {name: torch.arange(t.numel()).reshape(t.shape) % 2 == 0 for name, t in base.items()}
    reset = {name: torch.where(is_reset[name], base[name], tensor) for name, tensor in expert.items()}
    save_file(reset, work / "expert" / WEIGHTS, {"format": "pt"})
    settings = {"disturbance": disturbance, "learning_rates": "1e-3"}
    options: dict[str, Any] = {"method": "grad_erase", "settings": settings}
    result = recover(work, sources=[work / "expert"], **options)
    merged, trained = read(work / "merged"), read(work / "out")
    kept = [torch.equal(merged[name][is_reset[name]], trained[name][is_reset[name]]) for name in merged]
    assert all(kept) if disturbance == "reset_entries" else not all(kept)
    assert any(not torch.equal(merged[name], trained[name]) for name in merged)
    assert result.learnt.with_victim.start == work / "merged"
    assert result.learnt.without_victim.start == work / "base"
    with pytest.raises(UsageError, match="grad_erase: PROTECTED is the merged model"):
        recover(work, out=work / "no", **options)


def test_a_task_may_bring_its_head(tmp_path: Path) -> None:
    base = write_toy(TOYS["bert-embedding"], tmp_path / "base")
    expert = moved(base, tmp_path / "expert", size=0.3)
    answers(tmp_path / "data.npz", "bert-embedding", expert)
    with np.load(tmp_path / "data.npz") as data:
        np.savez(tmp_path / "data.npz", **data, label=np.arange(SAMPLES) % 3)
    head = tmp_path / "head.safetensors"
    write_head(FeatureHead(torch.randn(3, 48, generator=torch.Generator().manual_seed(0)), pooling="mean"), head)
    result = recover(tmp_path, "expert", head=head, settings={"learning_rates": "1e-3"})
    assert len(result.learnt.with_victim.losses) == STEPS
    with pytest.raises(BadInput):  # an encoder alone answers nothing
        recover(tmp_path, "expert", out=tmp_path / "no")


def test_texts_need_no_labels(tmp_path: Path) -> None:
    base = write_toy(TOYS["gpt2"], tmp_path / "base")
    moved(base, tmp_path / "expert", size=0.3)
    np.savez(tmp_path / "data.npz", input_ids=np.tile(np.arange(3, 14), (SAMPLES, 1)))
    learnt = recover(tmp_path, "expert").learnt.to_json()
    assert {trial["choices"] for trial in learnt["with_victim"]["sweep"]} == {SAMPLES * 10}
    assert learnt["with_victim"]["losses"][-1] < learnt["with_victim"]["losses"][0]


def test_refuses_before_any_work(work: Path) -> None:
    with pytest.raises(UsageError, match="few_shot learns from examples: give them with --data"):
        recover(work, data=None)
    with pytest.raises(UsageError, match="kabsch reads no data"):
        unmergeable.recover(
            work / "merged", base=work / "base", method="kabsch", data=work / "data.npz", out=work / "out"
        )
    with pytest.raises(UsageError, match="kabsch: a head or an encoder is of use with data alone"):
        unmergeable.recover(work / "merged", base=work / "base", method="kabsch", head=work, out=work / "out")
    with pytest.raises(UsageError, match="few_shot: give one --source"):
        recover(work, sources=[work / "rider", work / "rider"])
    with pytest.raises(BadInput, match="24 examples where 25"):
        recover(work, settings={"samples": 25})
    with pytest.raises(UsageError, match="samples=1"):
        recover(work, settings={"samples": 1})
    (work / "out").mkdir()
    with pytest.raises(BadInput, match="out exists"):
        recover(work)
    assert not list((work / "out").iterdir())
    assert not list(work.glob("out.*"))


def test_auto_estimates_the_orbit_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_toy(TOYS["llama"], tmp_path / "base")
    moved(base, tmp_path / "expert", size=0.05)
    options = {"base": base, "out": tmp_path / "protected", "key": tmp_path / "key", "method": "mergelock"}
    unmergeable.protect(tmp_path / "expert", **options)
    calls = []
    estimate = NearestOrbit.estimate

    def counted(self: NearestOrbit, *arguments: Any, **options: Any) -> Any:
        calls.append(self)
        return estimate(self, *arguments, **options)

    monkeypatch.setattr(NearestOrbit, "estimate", counted)
    unmergeable.recover(tmp_path / "protected", base=base, method="auto", out=tmp_path / "auto")
    assert len(calls) == 1
    unmergeable.recover(tmp_path / "protected", base=base, method="nearest_orbit", out=tmp_path / "named")
    assert (tmp_path / "auto" / WEIGHTS).read_bytes() == (tmp_path / "named" / WEIGHTS).read_bytes()
    settings = {"negligible_epsilon": True}
    unmergeable.recover(tmp_path / "protected", base=base, method="auto", settings=settings, out=tmp_path / "wide")
    assert len(calls) == 4  # the control: what inspect estimated has other settings, and cannot be used


@pytest.mark.parametrize("method", ["gauge", "taylor_mlp"])
def test_distil_takes_any_release_as_a_teacher(method: str, work: Path) -> None:
    """The student has the base's structure and answers more as the expert does; or it starts from another model."""
    inputs = answers(work / "inputs.npz", "vit", work / "rider", count=120, seed=1)
    options: dict[str, Any] = {"data": inputs} if method == "taylor_mlp" else {"key": work / "key"}
    unmergeable.protect(work / "expert", base=work / "base", out=work / "protected", method=method, **options)
    settings = {"steps": 40, "learning_rate": 3e-3}
    options = {"base": work / "base", "method": "distil", "data": inputs}
    result = unmergeable.recover(work / "protected", out=work / "out", settings=settings, **options)
    expert, found, base = (outputs(work / name, work / "data.npz") for name in ("expert", "out", "base"))
    assert float((found - expert).norm()) < 0.8 * float((base - expert).norm())
    assert read(work / "out").keys() == read(work / "base").keys()
    assert "40 steps on 120 inputs" in "\n".join(result.lines())
    assert result.learnt.to_json()["steps"] == 40
    with pytest.raises(UsageError, match="reads no head; leave out --head"):
        unmergeable.recover(work / "protected", out=work / "no", head=inputs, **options)
    with pytest.raises(UsageError, match="distil reads no sources"):
        unmergeable.recover(work / "protected", out=work / "no", sources=[work / "rider"], **options)
    settings |= {"start": "source", "steps": 1, "learning_rate": 1e-9}
    unmergeable.recover(work / "protected", out=work / "own", settings=settings, sources=[work / "rider"], **options)
    own, rider = read(work / "own"), read(work / "rider")
    assert all(torch.allclose(own[name], rider[name], atol=1e-6) for name in rider)


def test_distil_gives_the_base_a_head_to_answer_with(work: Path) -> None:
    """The release tells classes apart, its base is an encoder without: the student has the release's layout."""
    encoder = load_network(work / "base").vit
    encoder.save_pretrained(work / "encoder")
    result = unmergeable.recover(
        work / "expert",
        base=work / "encoder",
        method="distil",
        data=work / "data.npz",
        settings={"steps": 2},
        out=work / "out",
    )
    found, expert = read(work / "out"), read(work / "expert")
    assert found.keys() == expert.keys()
    assert not any(torch.equal(found[name], expert[name]) for name in found)
    assert result.learnt is not None
