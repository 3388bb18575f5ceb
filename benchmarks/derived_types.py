"""The owner's whole job on types that no family declares, through files: small random networks of seventy-eight types.

    python -m benchmarks.derived_types [--only TYPE …] [--out benchmarks/results/derived_types.json]

Each network has the flags of its class and sizes that no map was derived with; the expert differs from the base by a
fiftieth of every tensor's spread. For ``gauge`` and for ``mergelock``, as they are and with ``quantisation: free``:

    loads       plain ``from_pretrained`` of transformers or diffusers reads the release
    error       its outputs against the expert's, relative, stored in float32 and in bfloat16; both run in float32
    moved       share of the tensors that changed by more than a tenth
    merged      change of the outputs by the mean of release and base, and beside it of expert and base (control)
    restored    largest relative difference of a tensor after ``restore``
    recovered   distance from the base after ``nearest_orbit``, over the expert's; beside it the release's (control)

Types are done one after another, and what the file holds is not done again. About ten minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from unmergeable import ops
from unmergeable.architecture.derived import known_map
from unmergeable.derivation.build import Specimen, class_named, is_diffusion
from unmergeable.derivation.model_types import built, usual_config
from unmergeable.derivation.shrink import Sizes
from unmergeable.errors import UnmergeableError

RESULT = Path(__file__).parents[1] / "benchmarks" / "results" / "derived_types.json"

SIZES = Sizes(heads=6, groups=2, head_size=16, intermediate=44, experts=4)
"""Other numbers than the maps were derived with."""

RELEASES: dict[str, dict[str, Any]] = {
    "gauge": {"method": "gauge"},
    "gauge, free": {"method": "gauge", "settings": {"quantisation": "free"}},
    "mergelock": {"method": "mergelock"},
    "mergelock, free": {"method": "mergelock", "settings": {"quantisation": "free"}},
}
"""As they are by themselves, which keeps quantised models, and with any element of every group."""

STEP = 0.02
CONDITION = 4.0

ERROR = {
    torch.float32: 64 * torch.finfo(torch.float32).eps / 2 * CONDITION,
    torch.bfloat16: 8 * torch.finfo(torch.bfloat16).eps / 2 * CONDITION,
}
"""Roundings of size u, some hundreds of them, each carried by a factor of at most the condition number."""

MOVED = 0.15
MERGED = 0.1
RESTORED = 1e-5
RECOVERED = 1.02

KINDS = (
    "apertus", "arcee", "aria_text", "cohere2", "ernie4_5", "ernie4_5_moe", "exaone", "exaone4", "falcon_h1",
    "flex_olmo", "gemma4_text", "glm", "glm4", "glm4_moe", "gpt_bigcode", "gpt_neo", "granite", "granitemoehybrid",
    "helium", "hunyuan_v1_dense", "jais2", "lfm2", "ministral", "ministral3", "minicpm3", "mpt", "nanochat", "nemotron",
    "olmo", "olmo3", "olmoe", "qwen2_moe", "qwen3_5_text", "qwen3_next", "seed_oss", "starcoder2", "xglm", "dots1",
    "persimmon", "gpt_oss", "granitemoe", "laguna",
    "camembert", "data2vec-text", "deberta-v2", "distilbert", "electra", "ernie", "esm", "eurobert", "mpnet", "rembert",
    "deit", "beit", "dinov2_with_registers", "siglip2",
    "bart", "mbart", "marian", "pegasus", "m2m_100", "mt5", "t5gemma", "whisper", "speech_to_text",
    "moonshine",
    "gemma3", "llava", "mistral3", "paligemma", "idefics3", "qwen2_5_vl", "fuyu",
    "PixArtTransformer2DModel", "WanTransformer3DModel", "LTXVideoTransformer3DModel", "SD3Transformer2DModel",
    "FluxTransformer2DModel",
)  # fmt: skip
"""Language models, masked ones, of images, encoder-decoders of text and sound, of images and text, of diffusion."""


EXCEPTIONS = dict.fromkeys(("granitemoehybrid", "qwen3_next"), ("mergelock: moved", "mergelock, free: moved"))
"""What is known not to be kept: MergeLock changes attention alone, which few layers of some hybrids have."""


def specimen(kind: str) -> Specimen:
    derived = known_map(kind)
    assert derived is not None, kind
    network_class = class_named(derived.network_class)
    return built(usual_config(kind, network_class), network_class, SIZES)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def write(tensors: dict[str, Tensor], like: Path, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """``tensors`` with the config of ``like``."""
    folder.mkdir(exist_ok=True)
    (file,) = like.glob("*.safetensors")
    shutil.copyfile(like / "config.json", folder / "config.json")
    stored = {name: one.to(dtype).contiguous() if one.is_floating_point() else one for name, one in tensors.items()}
    save_file(stored, folder / file.name, metadata={"format": "pt"})
    return folder


def outputs(folder: Path, like: Specimen) -> Tensor:
    """All numbers a checkpoint gives out, computed in float32, in one row."""
    is_of_diffusers = is_diffusion(type(like.network))
    options: dict[str, Any] = {"torch_dtype": torch.float32} if is_of_diffusers else {"dtype": torch.float32}
    network = type(like.network).from_pretrained(folder, local_files_only=True, use_safetensors=True, **options).eval()
    inputs = {
        name: one.float() if isinstance(one, Tensor) and one.is_floating_point() else one
        for name, one in like.inputs.items()
    }
    with torch.no_grad():
        found = network(**inputs)
    numbers = next(found[name] for name in ("logits", "sample", "last_hidden_state") if name in found).reshape(-1)
    return numbers[torch.isfinite(numbers)]


def relative(found: Tensor, expected: Tensor) -> float:
    found, expected = found.double(), expected.double()
    return 0.0 if torch.equal(found, expected) else float((found - expected).norm() / expected.norm())


def distance(tensors: dict[str, Tensor], base: dict[str, Tensor]) -> float:
    """Between two checkpoints, from their numbers."""
    return sum(float((tensors[name].double() - base[name].double()).square().sum()) for name in base) ** 0.5


def measured(kind: str, folder: Path) -> dict[str, Any]:
    """Every figure of one type."""
    like = specimen(kind)
    base = folder / "base"
    like.network.float().save_pretrained(base)
    start = tensors_of(base)
    generator = torch.Generator().manual_seed(1)
    tuned = {
        name: one + STEP * one.std(correction=0) * torch.randn(one.shape, generator=generator)
        if one.is_floating_point()
        else one
        for name, one in start.items()
    }
    expert = write(tuned, base, folder / "expert")
    small = [
        write(some, base, folder / name, torch.bfloat16) for some, name in ((start, "base16"), (tuned, "expert16"))
    ]
    expected, expected16 = outputs(expert, like), outputs(small[1], like)
    averaged = {name: (one + tuned[name]) / 2 if one.is_floating_point() else one for name, one in start.items()}
    row: dict[str, Any] = {"merged_control": relative(outputs(write(averaged, base, folder / "mean"), like), expected)}
    for method, chosen in RELEASES.items():
        place = folder / method
        options: dict[str, Any] = {"base": base, "key": folder / f"{method}.key", "seed": 3, **chosen}
        ops.protect(expert, out=place, **options)
        ours = tensors_of(place)
        halves = {name: (one + ours[name]) / 2 if one.is_floating_point() else one for name, one in start.items()}
        options |= {"base": small[0], "key": folder / f"{method}16.key"}
        ops.protect(small[1], out=folder / f"{method}16", **options)
        ops.restore(place, key=folder / f"{method}.key", out=folder / f"{method}-restored")
        back = tensors_of(folder / f"{method}-restored")
        ops.recover(place, base=base, method="nearest_orbit", out=folder / f"{method}-recovered")
        near = distance(tensors_of(folder / f"{method}-recovered"), start) / distance(tuned, start)
        row[method] = {
            "error": relative(outputs(place, like), expected),
            "error_bfloat16": relative(outputs(folder / f"{method}16", like), expected16),
            "moved": sum(relative(ours[name], one) > MERGED for name, one in tuned.items()) / len(tuned),
            "merged": relative(outputs(write(halves, base, folder / "halves"), like), expected),
            "restored": max(relative(back[name], one) for name, one in tuned.items()),
            "recovered": near,
            "recovered_control": distance(ours, start) / distance(tuned, start),
        }
    return row


def failings(row: dict[str, Any]) -> list[str]:
    """What a type's figures do not keep of the contract, in words; empty where all is kept."""
    if "failure" in row:
        return [str(row["failure"])]
    found = []
    for method in RELEASES:
        one = row[method]
        kept = {
            "error": one["error"] <= ERROR[torch.float32],
            "error_bfloat16": one["error_bfloat16"] <= ERROR[torch.bfloat16],
            "moved": one["moved"] > MOVED,
            "merged": one["merged"] > MERGED and one["merged"] > 2 * row["merged_control"],
            "restored": one["restored"] <= RESTORED,
            "recovered": one["recovered"] <= RECOVERED < one["recovered_control"],
        }
        found += [f"{method}: {name} {one[name]:.3g}" for name, holds in kept.items() if not holds]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--only", nargs="*", default=KINDS, metavar="TYPE", help="Do these, again where they are done.")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    document: dict[str, Any] = json.loads(options.out.read_text("utf-8")) if options.out.exists() else {"types": {}}
    document["environment"] = {name: version(name) for name in ("torch", "transformers", "diffusers")}
    for kind in options.only:
        if kind in document["types"] and options.only is KINDS:
            continue
        started = time.process_time()
        with tempfile.TemporaryDirectory() as place:
            try:
                row = measured(kind, Path(place))
            except (UnmergeableError, RuntimeError, ValueError, OSError) as error:
                row = {"failure": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]}
        document["types"][kind] = row
        said = "; ".join(failings(row)) or "whole contract"
        print(f"{kind}: {said} ({time.process_time() - started:.0f} s)", flush=True)
        rounded = json.loads(json.dumps(document), parse_float=lambda text: float(f"{float(text):.3g}"))
        rounded["types"] = dict(sorted(rounded["types"].items()))
        options.out.write_text(json.dumps(rounded, indent=1) + "\n", "utf-8")
    kept = sum(not failings(row) for row in document["types"].values())
    print(f"{kept} of {len(document['types'])} types keep the whole contract")


if __name__ == "__main__":
    main()
