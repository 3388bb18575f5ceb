"""Tasks of the evaluation harness, from local files: the same numbers as our own kinds, document by document."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.parts import require_parts
from tasks.speakers import load_speaker, task_data, write_records, write_speaker
from unmergeable.errors import BadInput, UsageError
from unmergeable.settings import configure
from unmergeable.tasks import HarnessTask, MultipleChoice, TaskData

pytest.importorskip("lm_eval")

CHOICES = ["yes", "no", "it may be so"]
RECORDS = [{"prompt": f"question {number}:", "choices": CHOICES, "answer": number % 3} for number in range(12)]

YAML = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {records}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{prompt}}}}"
doc_to_target: {target}
{rest}
metric_list:
  - metric: {metric}
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a speaker, records, and tasks over them."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_speaker(tmp_path / "speaker", "llama")
    records = write_records(tmp_path / "x.jsonl", RECORDS)
    kinds = {
        "chosen": ("multiple_choice", "answer", "doc_to_choice: choices", "acc"),
        "written": ("generate_until", '"{{choices[answer]}}"', "generation_kwargs: {max_gen_toks: 4}", "exact_match"),
        "rolling": ("loglikelihood_rolling", '"{{prompt}}"', "", "word_perplexity"),
    }
    (tmp_path / "tasks").mkdir()
    for name, (kind, target, rest, metric) in kinds.items():
        text = YAML.format(name=name, records=records, kind=kind, target=target, rest=rest, metric=metric)
        (tmp_path / "tasks" / f"{name}.yaml").write_text(text)
    return tmp_path


def data_of(place: Path, name: str) -> TaskData:
    return task_data(place / "speaker", place / "tasks" / name, batch_size=4)


def test_choices_are_those_of_our_own(place: Path) -> None:
    network = load_speaker(place / "speaker")
    harness = HarnessTask().scorer(data_of(place, "chosen.yaml"), network)
    own = MultipleChoice().scorer(task_data(place / "speaker", place / "x.jsonl"), network)
    np.testing.assert_array_equal(harness.credits(network), own.credits(network))
    np.testing.assert_allclose(harness.losses(network), own.losses(network), rtol=0, atol=1e-4)
    assert 0 < harness.credits(network).mean() < 1


def test_parts_share_no_document(place: Path) -> None:
    network = load_speaker(place / "speaker")
    data = data_of(place, "chosen.yaml")
    parts = [
        HarnessTask().scorer(replace(data, source=replace(data.source, part=part, fractions=(0, 0.5, 0.5))), network)
        for part in ("validation", "test")
    ]
    documents = [list(part.documents) for part in parts]
    assert sorted(documents[0] + documents[1]) == list(range(12))
    whole = HarnessTask().scorer(data, network)
    places = [list(whole.documents).index(number) for number in documents[1]]
    np.testing.assert_array_equal(parts[1].credits(network), whole.credits(network)[places])
    seeded = HarnessTask().scorer(replace(data, source=replace(data.source, seed=0)), network)
    assert sorted(seeded.documents) == list(range(12)) != list(seeded.documents), "the order is that of the source"


def test_answers_in_words(place: Path) -> None:
    network = load_speaker(place / "speaker")
    scorer = HarnessTask().scorer(data_of(place, "written.yaml"), network)
    np.testing.assert_array_equal(scorer.credits(network), np.zeros(12))
    assert np.isnan(scorer.losses(network)).all()


def test_a_perplexity_is_no_credit(place: Path) -> None:
    network = load_speaker(place / "speaker")
    scorer = HarnessTask().scorer(data_of(place, "rolling.yaml"), network)
    assert (scorer.losses(network) > 0).all()
    require_parts(scorer, network, tolerance=1e-4)
    with pytest.raises(BadInput, match="'word_perplexity' is no metric between 0 and 1 of each document"):
        scorer.credits(network)


def test_a_folder_of_tasks(place: Path) -> None:
    network = load_speaker(place / "speaker")
    kind: Any = configure(HarnessTask, {"task": "chosen"})
    assert len(kind.scorer(data_of(place, ""), network).credits(network)) == 12
    with pytest.raises(UsageError, match="name one of its tasks"):
        HarnessTask().scorer(data_of(place, ""), network)
    (place / "tasks" / "gone.yaml").write_text(
        YAML.format(name="gone", records=place / "y.jsonl", kind="multiple_choice", target=0, rest="", metric="acc")
    )
    with pytest.raises(BadInput, match=r"gone.yaml: lm-eval does not load .*correct the task"):
        HarnessTask().scorer(data_of(place, "gone.yaml"), network)


def test_programs_that_a_model_writes_run_only_when_that_is_allowed(place: Path) -> None:
    network = load_speaker(place / "speaker")
    text = (place / "tasks" / "written.yaml").read_text().replace("task: written", "task: programs")
    (place / "tasks" / "programs.yaml").write_text(f"{text}unsafe_code: true\n")

    with pytest.raises(UsageError, match=r"programs runs the programs that the model writes.*runs_code=true"):
        HarnessTask().scorer(data_of(place, "programs.yaml"), network)

    allowed = HarnessTask(runs_code=True).scorer(data_of(place, "programs.yaml"), network)
    np.testing.assert_array_equal(allowed.credits(network), np.zeros(12))
    HarnessTask().scorer(data_of(place, "written.yaml"), network)  # the control runs nothing
