"""What the plans at full scale read, made from the hub: checkpoints as safetensors, zero-shot heads, texts.

    python plans/prepare.py MODELS vision-base|vision-large|flan-t5|mistral|llama-2|llama-3

Needs the internet, `pip install 'unmergeable[hf,data]'`, and disk for every model once more. What is there is not made
again. For flan-t5, whose checkpoints need no preparation, the prompts that its experts were trained with are read from
`pip install --no-deps fusion-bench`.

A CLIP expert on the hub is an image tower. It is put into the whole CLIP model, so that one zero-shot head scores base,
experts and merges. Language models come as pickles, and with rows of the embedding for tokens of their own: weights are
read without running code, cut to the base's tokens and stored as the base is.
"""

from __future__ import annotations

import argparse
import json
import runpy
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

EIGHT = {
    "sun397": "tanganke/sun397",
    "stanford-cars": "tanganke/stanford_cars",
    "resisc45": "tanganke/resisc45",
    "eurosat": "tanganke/eurosat",
    "svhn": "ufldl-stanford/svhn:cropped_digits",
    "gtsrb": "tanganke/gtsrb",
    "mnist": "ylecun/mnist",
    "dtd": "tanganke/dtd",
}
"""The data of the eight tasks of FusionBench (arXiv 2406.03280) by the names that its experts have."""

VISION = {"vision-base": "clip-vit-base-patch32", "vision-large": "clip-vit-large-patch14"}

LANGUAGE = {
    "mistral": {
        "mistral-7b": "mistralai/Mistral-7B-v0.1",
        "metamath-mistral-7b": "meta-math/MetaMath-Mistral-7B",
        "biomistral-7b": "BioMistral/BioMistral-7B",
        "trendyol-7b": "Trendyol/Trendyol-LLM-7b-base-v1.0",
        "mistral-7b-instruct": "mistralai/Mistral-7B-Instruct-v0.2",
    },
    "llama-3": {
        "llama-3-8b-instruct": "meta-llama/Meta-Llama-3-8B-Instruct",
        "bio-medical-llama-3-8b": "ContactDoctor/Bio-Medical-Llama-3-8B",
        "cybersentinel": "dad1909/CyberSentinel",
        "suzume-llama-3-8b-japanese": "lightblue/suzume-llama-3-8B-japanese",
    },
    "llama-2": {
        "llama-2-13b": "unsloth/llama-2-13b",
        "wizardlm-13b": "WizardLMTeam/WizardLM-13B-V1.2",
        "wizardmath-13b": "vanillaOVO/WizardMath-13B-V1.0",
        "code-alpaca-13b": "layoric/llama-2-13b-code-alpaca",
    },
}
"""Language models by the folders they go to; the first of each is the base."""

TEXTS = {
    "gsm8k": ("openai/gsm8k", "main", "question", "answer"),
    "medqa": ("GBaker/MedQA-USMLE-4-options", None, "question", "answer"),
    "code": ("iamtarun/python_code_instructions_18k_alpaca", None, "instruction", "output"),
    "instructions": ("tatsu-lab/alpaca", None, "instruction", "output"),
}
"""Training texts by name: repository, configuration, and two fields."""

GLUE = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2")
"""The tasks of FusionBench's Flan-T5 experts that are right or wrong."""

GLUE_TEMPLATES = "fusion_bench/tasks/flan_t5_text_generation/glue_prompt_templates.py"

TEMPLATES = ("a photo of a {}.",)


def whole_clip(clip: Any, tower: Any) -> Any:
    """A CLIP model with the image tower of another model in place of its own."""
    inner = getattr(tower, "vision_model", tower)  # one module inside another, before transformers 5
    clip.vision_model.load_state_dict(inner.state_dict())
    return clip


def cut_to(network: Any, rows: int) -> Any:
    """A language model with the first ``rows`` rows of its embedding."""
    if network.get_input_embeddings().weight.shape[0] != rows:
        network.resize_token_embeddings(rows)
    return network


def as_texts(records: Iterable[Mapping[str, Any]], question: str, answer: str, out: Path) -> None:
    """Write two fields of records as texts, one a line, for protections that are calibrated or trained."""
    lines = [json.dumps({"text": f"{record[question]}\n{record[answer]}"}) for record in records]
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def prepare_vision(models: Path, name: str) -> None:
    """A whole CLIP for the base and each expert, and a head for each task."""
    from datasets import load_dataset_builder
    from transformers import CLIPModel, CLIPProcessor, CLIPVisionModel

    from unmergeable.tasks import write_head
    from unmergeable.tasks.clip_head import clip_head

    original = f"openai/{name}"
    if not (models / name).exists():
        CLIPModel.from_pretrained(original).save_pretrained(models / name)
        CLIPProcessor.from_pretrained(original).save_pretrained(models / name)
    for task, data in EIGHT.items():
        expert, head = models / f"{name}_{task}", models / f"{name}_{task}-head.safetensors"
        if not expert.exists():
            tower = CLIPVisionModel.from_pretrained(f"tanganke/{name}_{task}")
            whole_clip(CLIPModel.from_pretrained(original), tower).save_pretrained(expert)
            CLIPProcessor.from_pretrained(original).save_pretrained(expert)
        if not head.exists():
            repository, _, configuration = data.partition(":")
            features = load_dataset_builder(repository, configuration or None).info.features
            classes = [label.replace("_", " ") for label in features["label"].names]
            write_head(clip_head(models / name, classes, TEMPLATES), head)


def prepare_language(models: Path, names: Mapping[str, str]) -> None:
    """A base and its fine-tunes with the same tensors, and texts of their tasks."""
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows, tokenizer = 0, None
    for folder, name in names.items():
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(name)
            rows = len(tokenizer)
        if not (models / folder).exists():
            network = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
            cut_to(network, rows).save_pretrained(models / folder)
            tokenizer.save_pretrained(models / folder)
    for name, (repository, configuration, question, answer) in TEXTS.items():
        out = models / f"{name}-train.jsonl"
        if not out.exists():
            as_texts(load_dataset(repository, configuration, split="train"), question, answer, out)


def glue_templates() -> dict[str, Any]:
    """For each task how its records are asked (``input_text``) and answered (``target_text``, by label)."""
    try:
        path = distribution("fusion-bench").locate_file(GLUE_TEMPLATES)
    except PackageNotFoundError:
        raise SystemExit("flan-t5 needs the prompts of FusionBench: pip install --no-deps fusion-bench") from None
    found: dict[str, Any] = runpy.run_path(str(path))["glue_prompt_templates"]
    return found


def as_questions(records: Iterable[Mapping[str, Any]], template: Mapping[str, Any], out: Path) -> None:
    """Write records of GLUE as prompts and answers, one a line."""
    lines = [
        json.dumps(
            {"prompt": template["input_text"].format(**record), "answer": template["target_text"][str(record["label"])]}
        )
        for record in records
    ]
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def prepare_glue(models: Path) -> None:
    """The questions of each task of GLUE; its test part has no labels, so that they are those of validation."""
    from datasets import load_dataset

    templates = glue_templates()
    for task in GLUE:
        out = models / f"glue-{task}-test.jsonl"
        if not out.exists():
            split = "validation_matched" if task == "mnli" else "validation"
            as_questions(load_dataset("nyu-mll/glue", task, split=split), templates[task], out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("kind", choices=[*VISION, "flan-t5", *LANGUAGE])
    arguments = parser.parse_args()
    arguments.models.mkdir(parents=True, exist_ok=True)
    if arguments.kind in VISION:
        prepare_vision(arguments.models, VISION[arguments.kind])
    elif arguments.kind == "flan-t5":
        prepare_glue(arguments.models)
    else:
        prepare_language(arguments.models, LANGUAGE[arguments.kind])


if __name__ == "__main__":
    main()
